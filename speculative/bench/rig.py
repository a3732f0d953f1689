"""The benchmark's machines: a verifier on one core, links and the drafter on the other, one text at a time.

Verifier and links are processes; the drafter is this one. Two cores are enough for them: while the verifier computes
the drafter drafts, and a link only moves bytes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

from omegaconf import DictConfig, OmegaConf
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

import conf
from lab.bench import link_process, pinned
from lab.command.entry import compose_settings
from lab.command.overrides import override
from lab.command.processes import listening
from lab.device import open_device
from lab.engine.kinds import EngineKind
from lab.engine.sampling import Sampling
from lab.files import path_of
from lab.models.sources import load_tokenizer_only
from lab.settings import LabSettings, Quantization, UserError
from lab.text.generation import sampling_of
from lab.text.grammars import Grammars
from lab.text.prompts import prompt_ids
from lab.wire.frames import encode
from lab.wire.tokens import pack_tokens
from speculative.bench.settings import BenchEngine
from speculative.drafter.loop import Round, speculate
from speculative.drafter.session import make_request
from speculative.drafter.sources import open_drafts
from speculative.drafter.tally import Tally
from speculative.drafter.target import RemoteTarget, join
from speculative.drafts import Drafts, NoDrafts
from speculative.messages import TABLE, DraftFrame, MessageType, VerdictFrame
from speculative.settings import DraftSource, Mode, SpeculativeSettings
from speculative.theory import IsRight, Speeds
from speculative.vocabulary import token_texts

START_SECONDS = 120.0
IDLE_SECONDS = 3600.0
"""Long enough that an idle connection stays open while texts use others: connecting again would take time of a text."""
VERIFIER_CORE, DRAFTER_CORE = 0, 1
WARM_UP_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One text to measure."""

    mode: Mode
    rtt_seconds: float
    source: DraftSource = DraftSource.none
    draft_length: int | str = "auto"
    acceptance: float = 0.0
    """Probability that a draft token is right (source=synthetic)."""
    prompt: str = "x"
    new_tokens: int = 0
    seed: int = 0
    layers: int = 1
    """Number of the target's layers that draft (source=layers)."""


@dataclass(frozen=True)
class Reading:
    """One run of a case."""

    tally: Tally
    frame_bytes: int
    """Bytes in both directions, headers and heartbeats included."""

    @property
    def figures(self) -> dict[str, Any]:
        """Figures of `speculative.drafter.tally`."""
        return self.tally.figures()

    @property
    def tokens_per_second(self) -> float:
        """Speed over the whole text."""
        return float(self.figures["tokens_per_second"])

    def is_right(self) -> IsRight:
        """Whether each draft token of this text was right, by position, for `simulate`; True where there was none."""
        wrong: set[int] = set()
        place = 0
        for done in self.tally.rounds:
            if done.right < done.checked:
                wrong.add(place + done.right)
            place += len(done.tokens)
        return lambda place, in_epoch: place not in wrong


class Rig(ExitStack):
    """A verifier with its links and connections. Leaving it ends the processes."""

    def __init__(self, settings: SpeculativeSettings, folder: Path) -> None:
        super().__init__()
        self.settings, self.folder = settings, folder
        self.is_real = settings.project.bench.engine is BenchEngine.real
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer_only(settings.model)
        self.texts = token_texts(self.tokenizer)
        self._links: dict[float, int] = {}
        self._targets: dict[float, RemoteTarget] = {}
        self._drafts: dict[tuple[Any, ...], Drafts] = {}

    def __enter__(self) -> Self:
        self.enter_context(pinned(DRAFTER_CORE))
        with pinned(VERIFIER_CORE):
            self.port = self.enter_context(verifier_process(self.settings, self.folder / "verifier"))
        return self

    @property
    def drafter_overrides(self) -> list[str]:
        """Overrides for a drafter process that suits this verifier."""
        return [*model_overrides(self.settings), "tracking=none", "project.draft.source=random"]

    def link(self, rtt_seconds: float) -> int:
        """Port of a link to the verifier with this round-trip time, half each way."""
        if rtt_seconds not in self._links:
            folder = self.folder / f"link-{rtt_seconds:g}"
            self._links[rtt_seconds] = self.enter_context(link_process(self.port, rtt_seconds, folder, START_SECONDS))
        return self._links[rtt_seconds]

    def join(self, rtt_seconds: float) -> RemoteTarget:
        """A new connection through such a link; the caller closes it."""
        return self.join_at(self.link(rtt_seconds))

    def join_at(self, port: int) -> RemoteTarget:
        """A new connection to a port of this machine; the caller closes it."""
        network = replace(self.settings.network, host="127.0.0.1", port=port)
        return join(replace(self.settings, network=network), self.texts)

    def target(self, rtt_seconds: float) -> RemoteTarget:
        """The warm connection through such a link, which all runs share."""
        if rtt_seconds not in self._targets:
            self._targets[rtt_seconds] = self.enter_context(self.join(rtt_seconds))
            self.generate(Case(mode=Mode.target_only, rtt_seconds=rtt_seconds, new_tokens=WARM_UP_TOKENS))
        return self._targets[rtt_seconds]

    def generate(self, case: Case) -> Reading:
        """Generate one text."""
        target = self.target(case.rtt_seconds)
        before = target.bytes_sent + target.bytes_received
        tally = self.tally(case, target)
        return Reading(tally, target.bytes_sent + target.bytes_received - before)

    def tally(self, case: Case, target: RemoteTarget) -> Tally:
        """Generate one text over a connection."""
        tally = Tally()
        for done in self.rounds(case, target):
            tally.add(done)
        return tally

    def rounds(
        self, case: Case, target: RemoteTarget, wrap: Callable[[Drafts], Drafts] = lambda drafts: drafts
    ) -> Iterator[Round]:
        """The rounds of one text over a connection; `wrap` may wrap its draft source."""
        settings = self.settings_of(case)
        ids = prompt_ids(self.tokenizer, case.prompt, settings.project.chat)
        sampling = sampling_of(settings.project, settings.seed, self.tokenizer, len(ids))
        request = make_request(settings, ids, sampling, settings.project.max_new_tokens)
        drafts: Drafts = NoDrafts()
        if case.mode is not Mode.target_only:
            drafts = self._open_drafts(settings, case, target, sampling)
        return speculate(target, wrap(drafts), request, target.welcome.end_ids)

    def settings_of(self, case: Case) -> SpeculativeSettings:
        """The drafter's settings for a case."""
        project = self.settings.project
        draft = replace(project.draft, source=case.source, length=str(case.draft_length), layers=case.layers)
        return replace(
            self.settings,
            seed=(self.settings.seed + case.seed) % 2**31,
            project=replace(
                project,
                mode=case.mode,
                max_new_tokens=case.new_tokens,
                chat=self.is_real,
                draft=draft,
                synthetic=replace(project.synthetic, agreement=case.acceptance),
            ),
        )

    def speeds(self, rtt_seconds: float) -> Speeds:
        """Speeds of the synthetic engines."""
        synthetic = self.settings.project.synthetic
        return Speeds(
            step_seconds=synthetic.step_seconds,
            row_seconds=synthetic.row_seconds,
            draft_step_seconds=synthetic.draft_step_seconds,
            rtt_seconds=rtt_seconds,
        )

    def _open_drafts(
        self, settings: SpeculativeSettings, case: Case, target: RemoteTarget, sampling: Sampling
    ) -> Drafts:
        """Models are loaded once; other sources are made for each text, since several texts may run concurrently."""
        draft = settings.project.draft
        size = target.welcome.vocabulary_size

        def make() -> Drafts:
            grammars = Grammars(lambda: (self.tokenizer, target.welcome.end_ids))
            return open_drafts(settings, open_device(settings.device), sampling, self.texts, size, grammars)

        if case.source not in (DraftSource.layers, DraftSource.model):
            return make()
        key = (draft.source, draft.layers, draft.model, sampling)
        if key not in self._drafts:
            self._drafts[key] = make()
            self.callback(self._drafts[key].close)
        return self._drafts[key]


def text_bytes(prompt_length: int, rounds: Sequence[Round]) -> int:
    """Bytes of every DRAFT and VERDICT of a text of the synchronous loop, headers included."""
    total, epoch, position = 0, 0, prompt_length
    for done in rounds:
        draft = DraftFrame(epoch=epoch, position=position)
        total += len(encode(TABLE, MessageType.draft, 1, draft, pack_tokens(done.draft_ids)))
        epoch += done.accepted < len(done.draft_ids)
        verdict = VerdictFrame(epoch=epoch, position=position, accepted=done.accepted, prefix=None)
        total += len(encode(TABLE, MessageType.verdict, 1, verdict, pack_tokens(done.ids)))
        position += len(done.tokens)
    return total


def for_engine(settings: SpeculativeSettings) -> SpeculativeSettings:
    """Settings for the benchmark's engine. Synthetic engines have no model: both sides use the tokenizer made in code,
    and the verifier's own prompt lookup, which would hide the drafter's draft tokens, is off."""
    if settings.project.bench.engine is BenchEngine.real:
        return settings
    own = settings.model
    for key, value, is_used in (
        ("model.adapter must be null", own.adapter, own.adapter is not None),
        ("model.quantization must be none", own.quantization.name, own.quantization is not Quantization.none),
        ("device.compile must be false or auto", True, settings.device.compile is True),
    ):
        if is_used:
            raise UserError(f"{key} for project.bench.engine=synthetic, which has no model, got {value!r}")
    model = compose_settings("spec_decoding", "model=random", SpeculativeSettings).model
    project = replace(settings.project, engine=EngineKind.synthetic, lookup=False)
    return replace(settings, model=replace(model, cache_dir=settings.model.cache_dir), project=project)


@contextmanager
def verifier_process(settings: SpeculativeSettings, folder: Path, more: Sequence[str] = ()) -> Iterator[int]:
    """Start a verifier with the benchmark's engine; yields its port."""
    project = settings.project
    overrides = [
        *model_overrides(settings),
        "tracking=none",
        "network.port=0",
        f"project.context={project.context}",
        f"project.max_draft_length={project.max_draft_length}",
        f"project.idle_seconds={IDLE_SECONDS}",
        f"project.sessions={max(project.sessions, project.bench.crowd)}",
        *more,
    ]
    if project.bench.engine is BenchEngine.synthetic:
        synthetic = project.synthetic
        overrides += [
            "project.engine=synthetic",
            "project.lookup=false",
            f"project.synthetic.vocabulary_size={synthetic.vocabulary_size}",
            f"project.synthetic.step_seconds={synthetic.step_seconds}",
            f"project.synthetic.row_seconds={synthetic.row_seconds}",
        ]
    with listening("speculative.verifier", overrides, folder, START_SECONDS) as port:
        yield port


def model_overrides(settings: LabSettings) -> list[str]:
    """Overrides that give another process our model."""
    model = settings.model
    files = (Path(conf.__file__).parent / "model").glob("*.yaml")
    names = {cast(DictConfig, OmegaConf.load(file)).get("name"): file.stem for file in files}
    if model.name not in names:
        raise UserError(
            f"model must be one of {', '.join(sorted(names.values()))} for this benchmark, got {model.name!r}"
        )
    cache = path_of(model.cache_dir, "model.cache_dir")
    precision = [f"model.dtype={model.dtype.name}", f"model.quantization={model.quantization.name}"]
    compiles = f"device.compile={str(settings.device.compile).lower()}"
    adapter = [] if model.adapter is None else [override("model.adapter", path_of(model.adapter, "model.adapter"))]
    return [f"model={names[model.name]}", *precision, *adapter, compiles, override("model.cache_dir", cache)]
