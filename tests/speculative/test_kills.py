"""What happens to a text whose peers or link are taken away: a pause, and the same text. `soak` does it 100 times."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from lab.command.entry import compose_settings
from lab.device import open_device
from lab.engine.sampling import Sampling
from lab.models.sources import load_model
from lab.settings import UserError
from speculative.drafter import __main__ as drafter
from speculative.settings import SpeculativeSettings
from tests.in_process import exit_code
from tests.speculative.in_process import decoded_alone, local_engine
from tests.speculative.kills import KINDS, QUICK, kill_at_random
from tests.speculative.processes import END_SECONDS, RANDOM, Role, drafted, drafter_process

PROMPT = "def add(a, b):\n    return a"
LONG = (*RANDOM, "project.max_new_tokens=600", "project.temperature=1.0", "seed=7", "project.draft.source=random")


def test_a_text_survives_whatever_is_taken_away() -> None:
    torch.set_num_threads(1)
    came = kill_at_random([*KINDS, "reset"], seed=3, words=QUICK)
    assert came.same_text
    assert came.kills == {"verifier": 1, "drafter": 1, "reset": 2, "half_open": 1, "stall": 1}
    assert came.resumes >= 4, "a stall is no reason to begin again, everything else is"
    assert all(seconds < 10 for seconds in came.resume_seconds)
    assert len(came.found_seconds) >= 3
    assert all(seconds < 5 for seconds in came.found_seconds)


def test_a_drafter_that_was_killed_is_started_again_and_goes_on_with_its_text(
    random_verifier: Role, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who does not have its run folder is not given the text."""
    words = (*LONG, f"network.port={random_verifier.port}", f"prompt={PROMPT}")
    process = drafter_process(*words, folder=tmp_path / "first")
    assert process.stdout is not None
    assert process.stdout.read(3)  # the text has begun
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=END_SECONDS)
    kept = tmp_path / "first" / "text.json"
    assert kept.stat().st_mode & 0o777 == 0o600

    ticket = json.loads(kept.read_text())
    name = ticket["name"]
    stolen = tmp_path / "stolen.json"
    stolen.write_text(json.dumps(ticket | {"owner": "00" * 16}))
    thief = (*words, f"project.resume={stolen}", f"hydra.run.dir={tmp_path}/thief")
    assert exit_code(drafter.main, *thief) == 2
    assert capsys.readouterr() == ("", f"error: request {name} must be resumed by the client that opened it\n")
    stolen.write_text(json.dumps(ticket | {"target": ticket["target"] | {"adapter": "another"}}))
    assert exit_code(drafter.main, *thief) == 2
    refused = "request must be resumed at its own target: its adapter was another and is none"
    assert capsys.readouterr() == ("", f"error: {refused}\n")
    stolen.write_text("{}")
    with pytest.raises(UserError, match=r"project\.resume must be the text\.json of a drafter's run folder, got "):
        drafted(random_verifier.port, (*LONG, f"project.resume={stolen}"), tmp_path / "thief")

    result = drafted(random_verifier.port, (*LONG, f"project.resume={kept}"), tmp_path / "second")
    settings = compose_settings("spec_decoding", " ".join(LONG), SpeculativeSettings)
    loaded = load_model(settings.model, open_device(settings.device))
    ids = list(loaded.tokenizer(PROMPT)["input_ids"])
    sampling = Sampling(seed=7, temperature=1.0, top_k=0, top_p=1.0)
    whole = decoded_alone(local_engine(loaded.model, 1, context=1024), ids, sampling, 600)
    assert result["token_ids"] == whole[: result["new_tokens"]]
