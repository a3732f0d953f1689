"""Words for Hydra: what is said is what arrives, and nobody quotes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lab.command.entry import compose_settings
from lab.command.overrides import override, with_texts_as_typed
from split.settings import SplitSettings

SIGNS = "ab ,'\"\\\n${}[]()=:-\t\r+~*?#@!%.é日\U0001f600"
TEXTS = st.text(alphabet=st.one_of(st.sampled_from(SIGNS), st.characters()), max_size=12).filter(
    lambda text: text != "???"
)


@dataclass
class Values:
    """What Hydra does with a word, without all of conf/."""

    text: str | None
    texts: list[str]
    number: float
    count: int
    flag: bool


def arrived(*words: str) -> Any:
    config = OmegaConf.structured(Values(None, [], 0.0, 0, False))
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(list(words)), config)
    return OmegaConf.to_object(config)


@settings(max_examples=80, deadline=None)
@given(TEXTS, st.lists(TEXTS, max_size=3), st.floats(allow_nan=False), st.integers(), st.booleans())
@example("a,b'c\"d[e]\n${x} \\", ["\\", '"', "a, b"], -0.0, -(2**64), True)
@example("", [""], 1e-320, 0, False)
@example("null", ["null", "${x}"], float("inf"), 10**30, True)
def test_every_value_arrives_as_it_was_given(
    text: str, texts: list[str], number: float, count: int, flag: bool
) -> None:
    given = {"text": text, "texts": texts, "number": number, "count": count, "flag": flag}
    assert arrived(*(override(key, value) for key, value in given.items())) == Values(**given)
    assert arrived(override("text", None)).text is None


NAMES = [
    "José",
    "a, b",
    "x=1",
    "[lab]",
    "my lab (2)",
    "{x}",
    "it's",
    '"half',
    " /x ",
    "1e3",
    "a\nb",
    "日本語",
    "true",
    "$x%d.",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_taken_as_it_is_typed(name: str) -> None:
    assert compose_settings("split_inf", ["model=random", f"model.path={name}"], SplitSettings).model.path == name


@pytest.mark.parametrize(
    "word",
    [
        *(
            "model.path=null",
            "model.path='in quotes'",
            "model.cache_dir=${oc.env:HOME}/x",
            "model.path=a\\,b",
            "model.path=",
        ),
        *("project.cuts=1,2", "project.shards=[a:1,b:2]", "seed=1,2", "model=a,b", "--config-dir=a, b", "nonsense"),
    ],
)
def test_what_means_something_to_hydra_stays(word: str) -> None:
    assert with_texts_as_typed([word], SplitSettings) == [word]


def test_a_sweep_of_hydras_own_stays_where_one_was_asked_for() -> None:
    assert with_texts_as_typed(["--multirun", "model.path=a,b"], SplitSettings)[1] == "model.path=a,b"
    assert with_texts_as_typed(["model.path=a,b"], SplitSettings) == ['model.path="a,b"']
    assert with_texts_as_typed(["hydra.run.dir=/José/x"], SplitSettings) == ['hydra.run.dir="/José/x"']
