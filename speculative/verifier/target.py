"""The verifier's target as the settings select it: a whole model, a split one or a synthetic one."""

from dataclasses import asdict, dataclass

import torch
from transformers.modeling_utils import PreTrainedModel

from lab.engine.base import Engine
from lab.engine.compiled import Compiler
from lab.engine.kinds import EngineKind, open_split_engine
from lab.engine.local import open_local_engine
from lab.engine.synthetic import SyntheticEngine
from lab.models.fingerprints import weights_fingerprints
from lab.models.layers import load_proved, with_adapter
from lab.models.sources import end_ids_of, load_tokenizer_only
from lab.settings import ModelSettings, UserError
from lab.text.generation import grammars_of
from speculative.messages import MAX_END_IDS
from speculative.settings import SYNTHETIC_CONTEXT, TargetRoleSettings, TargetSettings
from speculative.vocabulary import token_texts


@dataclass(frozen=True)
class OpenTarget:
    """The target, ready for requests."""

    engine: Engine
    end_ids: list[int]
    model: str
    """Name for messages."""
    dtype: str
    bytes_per_token: int
    """Bytes of keys and values of one token; 0 if another machine holds them."""
    fingerprints: dict[str, str]
    """Weights, precision and all else that a text depends on, by name: it is resumed only if these are the same."""


def open_target(settings: TargetRoleSettings, device: torch.device) -> OpenTarget:
    """Open the engine that `settings` select. UserError for settings that it cannot serve."""
    project, model = settings.project, settings.model
    if project.engine is EngineKind.synthetic:
        size = _synthetic_vocabulary(settings)
        known = {"model": "synthetic", "vocabulary": str(size)}
        return OpenTarget(_synthetic_target(project, size), [], "synthetic", "none", 0, known)
    if project.engine is EngineKind.split:
        fingerprints = weights_fingerprints(model) | {"boundary": project.split.boundary}
        return OpenTarget(_split_target(settings), _ends(model), model.name, model.dtype.name, 0, fingerprints)
    return local_target(settings, load_proved(model, device).model)


def local_target(settings: TargetRoleSettings, base: PreTrainedModel) -> OpenTarget:
    """The engine of a whole model, loaded as its settings say, with the adapter that they name put on here.

    Raises:
        UserError: settings that it cannot serve, an adapter of another model.
    """
    project, model = settings.project, settings.model
    fingerprints = weights_fingerprints(model)
    engine = open_local_engine(
        with_adapter(base, model),
        project,
        sessions=project.sessions,
        exact_rows=project.max_draft_length + 1 if project.exact_shapes else None,
        compiler=Compiler.of(model, settings.device, lasts=True),
        grammars=grammars_of(model),
    )
    if project.exact_shapes:
        fingerprints["shapes"] = "exact"
    if engine.is_compiled:
        fingerprints["layers"] = "compiled"
    return OpenTarget(engine, _ends(model), model.name, model.dtype.name, engine.cache.bytes_per_position, fingerprints)


def _ends(model: ModelSettings) -> list[int]:
    """The ids that end a text. UserError for more than fit into WELCOME."""
    ends = end_ids_of(model)
    if len(ends) > MAX_END_IDS:
        raise UserError(
            f"model {model.name} must end texts with at most {MAX_END_IDS} ids (eos_token_id of its generation "
            f"config), got {len(ends)}"
        )
    return ends


def _synthetic_vocabulary(settings: TargetRoleSettings) -> int:
    """Number of ids of a synthetic target: at least those of the tokenizer. UserError for fewer."""
    known = len(token_texts(load_tokenizer_only(settings.model)))
    asked = settings.project.synthetic.vocabulary_size
    if 0 < asked < known:
        raise UserError(
            f"project.synthetic.vocabulary_size must be 0 or at least {known}, the ids of the tokenizer of model "
            f"{settings.model.name}, got {asked}"
        )
    return asked or known


def _split_target(settings: TargetRoleSettings) -> Engine:
    project = settings.project
    return open_split_engine(
        settings.model,
        settings.network,
        **asdict(project.split),
        context=project.context,
        prefill_chunk=project.prefill_chunk,
    )


def _synthetic_target(project: TargetSettings, vocabulary_size: int) -> SyntheticEngine:
    synthetic = project.synthetic
    return SyntheticEngine(
        vocabulary_size=vocabulary_size,
        context=project.context or SYNTHETIC_CONTEXT,
        sessions=project.sessions,
        step_seconds=synthetic.step_seconds,
        row_seconds=synthetic.row_seconds,
        agreement=1.0,
    )
