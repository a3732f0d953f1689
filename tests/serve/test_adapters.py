"""Adapters as models on one base, a federation's newest round, and texts that keep the adapter they began with."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest

from lab.models.peft_folder import IDENTITY_KEY
from serve.models.adapters import LATEST, Turns, find_adapters
from tests.serve.adapters import make_adapter
from tests.serve.servers import Client, said, serving

ASKED = {"prompt": "abcabcabc", "max_tokens": 32, "seed": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters") / "a federation, José"
    make_adapter(root / "french", 0)
    make_adapter(root / "adapters" / "round-0001", 1)
    return root


@pytest.fixture(scope="module")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    words = [f"project.adapters='{root}'", "project.load_adapters=true", "project.follow_seconds=0.2"]
    with serving(tmp_path_factory.mktemp("journal"), *words) as client:
        yield client


def test_each_adapter_is_a_model_on_the_base(server: Client, root: Path) -> None:
    listed = {one["id"]: one["parent"] for one in server.get("/v1/models").json()["data"]}
    assert listed == {"random-1M": None, "french": "random-1M", LATEST: "random-1M"}
    texts = {model: server.text(model=model, **ASKED) for model in listed}
    assert len(set(texts.values())) == 3, "an adapter that changes nothing was not put on"
    prints = {server.complete(model=model, **ASKED)["system_fingerprint"] for model in listed}
    assert len(prints) == 3
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda model: server.text(model=model, **ASKED), [*listed, *listed]))
    assert found == [*texts.values(), *texts.values()], "neither another's weights nor another's cache"


def test_an_adapter_alone_says_the_same(server: Client, root: Path, tmp_path: Path) -> None:
    with serving(tmp_path, f"model.adapter='{root / 'french'}'") as alone:
        assert alone.text(**ASKED) == server.text(model="french", **ASKED)


def test_a_new_round_is_served_and_begun_texts_keep_the_old_one(server: Client, root: Path) -> None:
    asked = {"model": LATEST, "prompt": "abcabcabc", "max_tokens": 400, "seed": 4}
    old = server.complete(**asked)
    with server.streaming(**asked) as events:
        begun = list(islice(events, 10))
        make_adapter(root / "adapters" / "round-0002", 2)
        deadline = time.monotonic() + 60
        while (new := server.complete(**asked))["system_fingerprint"] == old["system_fingerprint"]:
            assert time.monotonic() < deadline, "the new round is not served"
            time.sleep(0.2)
        begun += events
    assert said(begun) == old["choices"][0]["text"] != new["choices"][0]["text"]
    assert {one.data["system_fingerprint"] for one in begun} == {old["system_fingerprint"]}
    again = server.continued(begun[0].data["id"], begun[9].id)
    assert said([*begun[:10], *again]) == old["choices"][0]["text"], "the old round is opened once more"


def test_load_and_unload(server: Client, root: Path) -> None:
    make_adapter(root / ".hidden" / "german", 3)
    loaded = server.post("/v1/load_lora_adapter", lora_name="german", lora_path=".hidden/german")
    assert loaded.json()["parent"] == "random-1M"
    assert server.text(model="german", **ASKED) != server.text(model="french", **ASKED)
    assert server.post("/v1/load_lora_adapter", lora_name="german", lora_path="french").status_code == 400
    assert server.post("/v1/unload_lora_adapter", lora_name="german").status_code == 200
    assert server.post("/v1/completions", model="german", prompt="a").status_code == 404
    assert server.post("/v1/unload_lora_adapter", lora_name="random-1M").status_code == 404


def test_an_adapter_behind_a_link_that_leaves_the_folder_has_streams(
    server: Client, root: Path, tmp_path: Path
) -> None:
    """The owner's own link is followed; a client's path is not."""
    (root / "linked").symlink_to(make_adapter(tmp_path / "elsewhere", 5))
    asked = {"model": "linked", **ASKED}
    deadline = time.monotonic() + 60
    while "linked" not in server.get("/v1/models").text:
        assert time.monotonic() < deadline, "the linked adapter is not served"
        time.sleep(0.1)
    with server.streaming(**asked) as events:
        begun = list(events)
    assert said(begun) == server.text(**asked)
    assert server.post("/v1/load_lora_adapter", lora_name="other", lora_path="linked").status_code == 400
    assert server.post("/v1/unload_lora_adapter", lora_name="linked").status_code == 200
    time.sleep(1.0)  # several looks at the folder: the model is closed, and continuing opens it again
    again = server.continued(begun[0].data["id"], begun[4].id)
    assert said([*begun[:5], *again]) == said(begun)


@pytest.mark.parametrize("path", ["..", "../../etc", "/etc", "french/../..", "nowhere", "", "\0"])
def test_no_other_folder_is_loaded(server: Client, path: str) -> None:
    refused = server.post("/v1/load_lora_adapter", lora_name="other", lora_path=path)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "lora_path"


def test_an_adapter_of_another_base_is_refused_by_name(server: Client, root: Path) -> None:
    other = root / ".hidden" / "other"
    shutil.copytree(root / "french", other)
    record = other / "lab_adapter.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {IDENTITY_KEY: "another"}))
    refused = server.post("/v1/load_lora_adapter", lora_name="other", lora_path=".hidden/other")
    assert refused.status_code == 400
    assert "base" in refused.json()["error"]["message"]


def test_the_newest_round_is_the_highest(tmp_path: Path) -> None:
    for name in ("round-0009", "round-0010", "round-x", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").touch()
    (tmp_path / "round-0011").mkdir()  # not written yet
    assert {one.id: one.folder.name for one in find_adapters(tmp_path)} == {
        LATEST: "round-0010", "other": "other", "round-x": "round-x"
    }  # fmt: skip


def test_turns_are_given_in_the_order_in_which_they_were_asked_for() -> None:
    turns, order = Turns(), list[int]()

    def work(name: int) -> None:
        with turns.turn():
            order.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(6)]
    with turns.turn():
        for place, thread in enumerate(threads):
            thread.start()
            while repr(turns._numbers) != f"count({place + 2})":  # it has asked
                time.sleep(0.001)
    for thread in threads:
        thread.join(10)
    assert order == list(range(6))
