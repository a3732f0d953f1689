"""Compressed federations in this process: every site's memory is on disk, in the folder of the settings."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error, Message
from safetensors.torch import load_file, save_file

from fl.adapters import AdapterIndex, PackedAdapter
from fl.client_app import make_client_app
from fl.compression.messages import BASE, FOLDED, RUN
from fl.compression.server import ServerLink
from fl.messages import CONFIG
from fl.server import serve
from fl.settings import Aggregation, Codec, CompressionSettings, FederatedSettings, WireDtype
from lab.command.entry import Run
from lab.settings import UserError
from tests.federated import InProcessGrid, small_settings, write_dialogues
from tests.fl.aggregation.test_federation import settings_of


class FaultyGrid(InProcessGrid):
    """Loses replies, or asks twice, in some (round, site)."""

    def __init__(self, settings: FederatedSettings, *, lost: Any = (), twice: Any = (), before: Any = None) -> None:
        super().__init__(make_client_app(lambda context: settings), settings.project.num_clients)
        self.lost, self.twice, self.before = lost, twice, before
        self.replies: list[bytes] = []

    def answer(self, message: Message, partition: int) -> Message:
        place = (int(message.metadata.group_id), partition)
        trains = message.metadata.message_type == "train"
        if self.before and trains:
            self.before(*place)
        reply = super().answer(message, partition)
        if place in self.twice and trains:
            first = reply.content["arrays"]["adapter"].data  # type: ignore[index]
            reply = super().answer(message, partition)
            assert reply.content["arrays"]["adapter"].data == first, "it has answered this before"  # type: ignore[index]
        return Message(Error(3, "lost"), reply_to=message) if place in self.lost and trains else reply


def compressed(
    folder: Path, uplink: Codec, downlink: Codec = Codec.none, *more: str, rule: Aggregation = Aggregation.average
) -> FederatedSettings:
    codecs = (f"project.compression.uplink={uplink.name}", f"project.compression.downlink={downlink.name}")
    own = f"project.site_folder={folder / 'sites'}"
    return settings_of(folder, rule, *codecs, own, "project.rounds=3", *more)


def adapters_of(grid: InProcessGrid, settings: FederatedSettings, folder: Path) -> list[dict[str, torch.Tensor]]:
    serve(grid, settings, Run(folder))
    return [load_file(file) for file in sorted(folder.rglob("adapter_model.safetensors"))]


def same(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> list[bool]:
    return [all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize("codec", [Codec.int8, Codec.topk_int8])
def test_both_ways_compressed_the_run_gives_the_same_bytes_in_any_order_and_asked_twice(
    codec: Codec, tmp_path: Path
) -> None:
    rule = Aggregation.rolora if codec is Codec.int8 else Aggregation.average
    settings = compressed(tmp_path, codec, codec, rule=rule)
    plain = FaultyGrid(settings)
    one = adapters_of(plain, settings, tmp_path / "one")
    grid = FaultyGrid(settings, twice={(1, 0), (2, 1), (3, 1), (3, 2)})
    grid.order = lambda ids: ids[::-1]
    assert same(one, adapters_of(grid, settings, tmp_path / "two")) == [True] * 4
    bases = [message.content.config_records[CONFIG].get(BASE) for message in plain.sent]
    assert bases == [None] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert [message.content.config_records[CONFIG][FOLDED] for message in plain.sent[::3]] == [
        [],
        [1] * 3,
        [2] * 3,
        [3] * 3,
    ]
    assert [path.suffix for path in (tmp_path / "sites").rglob("site-*")] == [".safetensors"] * 6, (
        "two runs, three sites"
    )


def test_error_feedback_and_its_absence_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a site that forgets sends something else in the second round, and in the first one not."""
    settings = compressed(tmp_path, Codec.int4)
    one = adapters_of(FaultyGrid(settings), settings, tmp_path / "one")

    def forget(server_round: int, site: int) -> None:
        for file in (tmp_path / "sites").rglob("site-*"):
            file.unlink()

    assert same(one, adapters_of(FaultyGrid(settings, before=forget), settings, tmp_path / "two")) == [
        True,
        True,
        False,
        False,
    ]


def test_a_lost_reply_leaves_the_error_as_it_was(tmp_path: Path) -> None:
    """The same as a site that was never asked in that round."""
    settings = compressed(tmp_path, Codec.int4, Codec.int8)
    lost = FaultyGrid(settings, lost={(2, 1)})
    one = adapters_of(lost, settings, tmp_path / "one")

    class Unasked(FaultyGrid):
        def answer(self, message: Message, partition: int) -> Message:
            if (message.metadata.group_id, partition, message.metadata.message_type) == ("2", 1, "train"):
                return Message(Error(5, "gone"), reply_to=message)
            return super().answer(message, partition)

    assert same(one, adapters_of(Unasked(settings), settings, tmp_path / "two")) == [True] * 4
    whole = adapters_of(FaultyGrid(settings), settings, tmp_path / "three")
    assert same(one, whole) == [True, True, False, False], "that reply had a part in the second round"
    last = [message.content.config_records[CONFIG] for message in lost.sent[6:9]]
    assert [config.get(BASE) for config in last] == [2, None, 2], "it may not have what it was sent then"
    assert last[0][FOLDED] == [2, 1, 2]


def test_a_site_that_lost_its_folder_is_sent_the_whole_adapter_next_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = compressed(tmp_path, Codec.none, Codec.int8)

    def forget(server_round: int, site: int) -> None:
        if (server_round, site) == (2, 1):
            for file in (tmp_path / "sites").rglob("site-1.safetensors"):
                file.unlink()

    grid = FaultyGrid(settings, before=forget)
    figures = serve(grid, settings, Run(tmp_path / "run"))
    [refused] = figures["refused"]
    assert "project.site_folder must hold the adapter of round 1, which was sent to site 1" in refused
    assert [message.content.config_records[CONFIG].get(BASE) for message in grid.sent[6:9]] == [2, None, 2]


def test_sites_compute_the_servers_own_adapter_from_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, in every round; and what an update leaves out arrives later."""
    settings, seen = compressed(tmp_path, Codec.none, Codec.topk_int8), []
    from fl.compression.site import SiteLink

    init = SiteLink.__post_init__

    def noted(self: SiteLink) -> None:
        init(self)
        seen.append(self.sent.to_float32().tobytes())

    monkeypatch.setattr(SiteLink, "__post_init__", noted)
    adapters = adapters_of(FaultyGrid(settings), settings, tmp_path / "run")
    index = AdapterIndex.of(adapters[0], WireDtype.float32)
    assert seen == [PackedAdapter.pack(state, index).array.tobytes() for state in adapters for _ in range(3)]
    moved = [sum(int((a[name] != b[name]).sum()) for name in a) for a, b in pairwise(adapters)]
    assert all(0 < count <= 0.04 * index.size for count in moved)


def test_memory_of_another_run_or_of_none_is_never_used(tmp_path: Path) -> None:
    settings = compressed(tmp_path, Codec.int4)
    one = adapters_of(FaultyGrid(settings), settings, tmp_path / "one")
    for file in (tmp_path / "sites").rglob("site-*"):
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    assert same(one, adapters_of(FaultyGrid(settings), settings, tmp_path / "two")) == [True] * 4


def link_of(downlink: Codec) -> ServerLink:
    return ServerLink(CompressionSettings(uplink=Codec.int8, downlink=downlink, topk_fraction=0.1))


def test_a_checkpoint_of_the_link_goes_on_with_the_same_bytes() -> None:
    index = AdapterIndex(("m.lora_A.weight",), ((10, 30),), WireDtype.float32)
    rng = np.random.default_rng(0)
    adapters = [PackedAdapter(index, rng.standard_normal(300).astype(np.float32)) for _ in range(4)]
    one, other = link_of(Codec.topk_int8), link_of(Codec.topk_int8)
    sent = one.advance(1, adapters[0], adapters[1], [(70, 0), (71, None), (72, 2)])
    other.load_state(one.state())
    assert one.state()["folded"].tolist() == [1, 0, 1]
    following = [link.advance(2, sent, adapters[2], [(70, 0)]).array.tobytes() for link in (one, other)]
    assert following[0] == following[1]
    assert following[0] != link_of(Codec.topk_int8).advance(2, sent, adapters[2], [(70, 0)]).array.tobytes()
    assert {name: x.tolist() for name, x in one.state().items()} == {n: x.tolist() for n, x in other.state().items()}
    assert len(link_of(Codec.none).state()["run"]) == 8


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ("project.aggregation=svd", "project.compression.uplink=int8"),
            r"project\.aggregation must be average, ffa or rolora, whose factors keep their basis, for compression, "
            r"got 'svd'",
        ),
        (
            ("project.wire_dtype=bfloat16", "project.compression.downlink=int8"),
            r"project\.wire_dtype must be float32 for compression, which has formats of its own, got 'bfloat16'",
        ),
        (
            ("project.compression.topk_fraction=0",),
            r"project\.compression\.topk_fraction must be in \(0, 1\], got 0\.0",
        ),
    ],
)
def test_what_cannot_be_compressed_is_refused(overrides: tuple[str, ...], line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{line}"):
        small_settings(write_dialogues(tmp_path / "d.jsonl", 30), 3, *overrides)


def test_without_compression_no_message_speaks_of_it(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, Aggregation.average)
    grid = FaultyGrid(settings)
    serve(grid, settings, Run(tmp_path / "run"))
    assert not {RUN, FOLDED, BASE} & {key for message in grid.sent for key in message.content.config_records[CONFIG]}
