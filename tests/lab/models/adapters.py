"""Adapters made by PEFT, what PEFT says of them on a whole model and what slices of it say: for tests that compare."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lab.device import TORCH_DTYPES
from lab.models.adapter import add_adapter
from lab.models.layers import load_layers
from lab.models.slices import run_slice
from lab.settings import ModelSettings, UserError

IDS_BT = torch.tensor([[3, 1, 5, 9, 20, 8, 1, 5]])
CPU = torch.device("cpu")


def make_adapter(base: Path, folder: Path, **changes: Any) -> Path:
    """An adapter that PEFT saves, with random numbers in all that it trains."""
    kind = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | changes
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**kind))
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data += 0.1 * torch.randn(weight.shape)
        model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def peft_says(settings: ModelSettings, folder: Path | None) -> torch.Tensor:
    """The logits that transformers and PEFT alone give on the whole model, with an adapter or without."""
    dtype = TORCH_DTYPES[settings.dtype]
    model: Any = AutoModelForCausalLM.from_pretrained(settings.path, dtype=dtype)
    if folder is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(model, folder)
    return torch.as_tensor(model.eval()(IDS_BT).logits)


@torch.inference_mode()
def slices_say(settings: ModelSettings, folder: Path, cuts: tuple[int, ...]) -> torch.Tensor:
    """The logits of slices one after the other. UserError when they refuse the adapter, all of them or none."""
    adapted = replace(settings, adapter=str(folder))
    slices, refusals = [], []
    for first, last in itertools.pairwise(cuts):
        model = load_layers(settings, CPU, range(first, last), embedding=first == 0, head=last == cuts[-1])
        try:
            add_adapter(model, adapted)
            slices.append(model)
        except UserError as error:
            refusals.append(error)
    if refusals:
        assert not slices, f"some slices take what others refuse: {refusals[0]}"
        raise refusals[0]
    states = IDS_BT
    for model in slices:
        states = run_slice(model, states)
    return states


# Fuzz

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 8, 16.5, float("nan"), 1e308, 10**30),
    *(
        "",
        "x",
        "none",
        "all",
        "lora_only",
        "all-linear",
        "pissa",
        "olora",
        "gaussian",
        ".*layers\\.1\\..*",
        "(",
        "LORA",
    ),
    *([], ["q_proj"], ["lm_head"], ["embed_tokens"], ["k_proj", "norm"], [0], [1, 99], [[]], [None], 2 * ["q_proj"]),
    *({}, {"q_proj": 2}, {"layers.1.*q_proj": 64}, {"q_proj": "x"}, {"q_proj": 0}, {"(": 4}, {"embed_tokens": [1]}),
    {"beta": 0.1},
]
UNKNOWN = ["use_foo", "foo_config", "R", "lora_r"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.2.mlp.down_proj": 40}, "use_rslora": True},
    "head": {"modules_to_save": ["lm_head"], "use_dora": True},
}
_CUTS = (0, 2, 4)


@dataclass
class Outcomes:
    """What became of changed folders."""

    same: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    """Another result than PEFT's, or one where PEFT has none."""
    broken: list[str] = field(default_factory=list)
    """Ended in something else than a UserError of one line."""


Change = Callable[[Path], None]


def all_changes() -> Iterator[tuple[str, str, Change]]:
    """Every change of every kind of adapter: kind, what is changed, and how."""
    keys = sorted(peft.LoraConfig().to_dict())
    for kind in KINDS:
        for key in [*keys, *UNKNOWN]:
            yield kind, f"without {key}", _without(key)
            for value in VALUES:
                yield kind, f"{key}={value!r}", _with(key, value)
        for name in ("adapter_config.json", "adapter_model.safetensors", "lab_adapter.json"):
            for how, content in _CONTENTS.items():
                yield kind, f"{name} {how}", _file(name, content)
        for number in range(3):
            for how, change in _TENSORS.items():
                yield kind, f"tensor {number} {how}", _tensor(number, change)


def fuzz(settings: ModelSettings, place: Path, changes: list[tuple[str, str, Change]]) -> Outcomes:
    """Apply each change to a fresh folder below `place`, and compare what slices say with what PEFT says."""
    outcomes = Outcomes()
    for kind, options in KINDS.items():
        make_adapter(Path(str(settings.path)), place / kind, **options)
    for number, (kind, what, change) in enumerate(changes):
        folder = place / f"{number}"
        shutil.copytree(place / kind, folder)
        change(folder)
        name = f"{kind}: {what}"
        try:
            ours = slices_say(settings, folder, _CUTS)
        except UserError as error:
            outcomes.refused += 1
            if "\n" in str(error) or "model.adapter" not in str(error):
                outcomes.broken.append(f"{name}: {error}")
        except Exception as error:
            outcomes.broken.append(f"{name}: {type(error).__name__} {error}")
        else:
            theirs = _or_error(settings, folder)
            if isinstance(theirs, str):
                outcomes.wrong.append(f"{name}: {theirs}")
            elif torch.equal(ours, theirs):
                outcomes.same += 1
            else:
                outcomes.wrong.append(f"{name}: logits differ by {(ours - theirs).abs().max()}")
        shutil.rmtree(folder)
    return outcomes


def sample_of_changes(count: int, seed: int) -> list[tuple[str, str, Change]]:
    """Some of all changes."""
    return random.Random(seed).sample(list(all_changes()), count)


def _or_error(settings: ModelSettings, folder: Path) -> torch.Tensor | str:
    try:
        return peft_says(settings, folder)
    except Exception as error:
        return f"PEFT says {type(error).__name__} {str(error)[:100]}"


def _without(key: str) -> Change:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        found = json.loads(file.read_text())
        found.pop(key, None)
        file.write_text(json.dumps(found))

    return change


def _with(key: str, value: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))

    return change


_CONTENTS: dict[str, Callable[[bytes], bytes] | None] = {
    "is missing": None,
    "is empty": lambda _: b"",
    "is cut": lambda whole: whole[: len(whole) // 2],
    "lacks its end": lambda whole: whole[:-1],
    "is a list": lambda _: b"[1]",
    "is a number": lambda _: b"3",
    "is deep": lambda _: b"[" * 100_000,
    "is binary": lambda _: bytes(range(256)),
    "has a huge header": lambda whole: b"\xff" * 8 + whole[8:],
    "is twice itself": lambda whole: whole + whole,
}


def _file(name: str, content: Callable[[bytes], bytes] | None) -> Change:
    def change(folder: Path) -> None:
        file = folder / name
        whole = file.read_bytes() if file.exists() else b"{}"
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content(whole))

    return change


_TENSORS: dict[str, Callable[[dict[str, torch.Tensor], str], None]] = {
    "is missing": lambda found, name: found.__delitem__(name),
    "is there under another layer too": lambda found, name: found.update(
        {name.replace("layers.0.", "layers.7.") + ("" if "layers.0." in name else ".x"): found[name].clone()}
    ),
    "has no prefix": lambda found, name: found.update({name.removeprefix("base_model.model."): found.pop(name)}),
    "is of another module": lambda found, name: found.update({name.replace("proj", "prox") + "x": found.pop(name)}),
    "is turned": lambda found, name: found.update({name: found[name].T.contiguous()}),
    "is a number": lambda found, name: found.update({name: torch.tensor(1.0)}),
    "is empty": lambda found, name: found.update({name: torch.zeros(0)}),
    "is in 16 bits": lambda found, name: found.update({name: found[name].bfloat16()}),
    "is in 64 bits": lambda found, name: found.update({name: found[name].double()}),
    "holds integers": lambda found, name: found.update({name: (10 * found[name]).to(torch.int64)}),
    "is zero": lambda found, name: found.update({name: torch.zeros_like(found[name])}),
}


def _tensor(number: int, how: Callable[[dict[str, torch.Tensor], str], None]) -> Change:
    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        found = load_file(file)
        how(found, sorted(found)[number * (len(found) - 1) // 2])
        save_file(found, file)

    return change
