"""Training examples of a split run, in an order that depends on the seed alone."""

import hashlib
import logging
import random
from collections.abc import Iterator
from dataclasses import replace

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lab.learning.data import open_source
from lab.learning.examples import Batch, Example, ExampleReader, batches, split_examples
from lab.learning.training import derive_seed
from lab.settings import DataSettings

log = logging.getLogger(__name__)


def training_examples(data: DataSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Example]:
    """The training part of the data; the held-out part is left for an evaluation.

    Documents are read in an order drawn by `seed`, and only as many as `max_examples` and `max_held_out` need.
    """
    source = open_source(data)
    documents = source.documents()
    random.Random(derive_seed(seed, "documents")).shuffle(documents)
    max_examples, max_held_out = data.caps
    enough = 2 * (max_examples + max_held_out) if max_examples else None
    reader = ExampleReader(tokenizer, data.sequence_length)
    found: list[Example] = []
    for document in documents:
        found += reader.read(source, [document])
        if enough is not None and len(found) >= enough:
            break
    split = split_examples(found, data.held_out_fraction, seed, max_examples, max_held_out)
    counts = reader.counts + split.counts
    log.info("%s", counts.line())
    for warning in counts.warnings(data.sequence_length):
        log.warning("%s", warning)
    return replace(split, counts=counts).with_something_to_train_on(data.sequence_length).train


def examples_digest(found: list[Example]) -> str:
    """Sixteen hex digits over all tokens of all examples, in order, and whether the loss counts each of them."""
    sha = hashlib.sha256()
    for example in found:
        sha.update(len(example.ids_T).to_bytes(8, "little"))
        sha.update(example.ids_T.astype("<i4").tobytes())
        sha.update(example.counted_T.tobytes())
    return sha.hexdigest()[:16]


def ordered(found: list[Example], batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches without end, from the first step on."""
    return batches(found, batch_size, derive_seed(seed, "order", "split"))
