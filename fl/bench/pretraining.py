"""A small base model: a Llama and a tokenizer of its own, both from the texts of one folder alone."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fl.bench.settings import BaseSettings
from lab.bench import Row
from lab.device import open_device
from lab.learning.data import Document, TextFolder
from lab.learning.examples import ExampleReader, batches, split_examples
from lab.learning.records import Text
from lab.learning.training import derive_seed, evaluate, train_steps
from lab.models.conversion import random_config
from lab.settings import LabSettings

FIGURES = "base.json"
"""File in the model's folder with the figures of its training."""
HELD_OUT_FRACTION = 0.02


def train_base(texts: Path, settings: LabSettings, base: BaseSettings, folder: Path) -> None:
    """Train a model of the sizes in `settings.model` on the files below `texts`, and write it to `folder`."""
    open_device(settings.device)
    source = TextFolder(texts)
    documents = source.documents()
    tokenizer = trained_tokenizer(_texts(source, documents), base.vocabulary)
    examples = ExampleReader(tokenizer, base.sequence_length).read(source, documents)
    split = split_examples(examples, HELD_OUT_FRACTION, settings.seed, 0, 0)
    torch.manual_seed(derive_seed(settings.seed, "weights"))
    config = random_config(settings.model)
    config.vocab_size = len(tokenizer)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    begin, seed = time.perf_counter(), derive_seed(settings.seed, "order")
    order = batches(split.train, base.optimization.batch_size, seed)
    train_steps(model, order, base.optimization, first_step=0, total_steps=base.steps, steps=base.steps, seed=seed)
    figures: Row = {
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "examples": len(split.train),
        "examples_seen": base.steps * base.optimization.batch_size * base.optimization.accumulation,
        "train_seconds": time.perf_counter() - begin,
        "eval_loss": evaluate(model, split.held_out, base.optimization.batch_size),
    }
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / FIGURES).write_text(json.dumps(figures), encoding="utf-8")


def _texts(source: TextFolder, documents: Sequence[Document]) -> list[str]:
    return [record.text for each in documents for record in source.read(each) if isinstance(record, Text)]


def trained_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with at most `vocabulary` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
