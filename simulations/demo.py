"""`make demo`: every pillar once, on this machine, with the commands that anyone would type.

Each part is processes of its own; the last line holds every part's figures.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab import entry
from simulations.demo_page import write_demo_page
from simulations.demo_settings import DemoSettings

log = logging.getLogger(__name__)

FED_SIM = (str(Path(__file__).with_name("fed_sim.py")),)
SPLIT, SPLIT_TRAIN = ("-m", "split.infer"), ("-m", "split.train")
MATRIX = ("-m", "lab.matrix.command")
VERIFIER, DRAFTER = ("-m", "speculative.verifier"), ("-m", "speculative.drafter")


def run(settings: DemoSettings, place: entry.Run) -> dict[str, Any]:
    """The parts in turn; a part that fails ends the demonstration with its own words on stderr."""
    begin = time.perf_counter()
    parts: dict[str, Any] = {}
    for number, (name, show) in enumerate(PARTS.items(), start=1):
        log.info("%d of %d, %s", number, len(PARTS), show.__doc__)
        parts[name] = show(settings, place.folder / name)
    titled = {name.replace("_", " "): figures for name, figures in parts.items()}
    return {
        **parts,
        "plots": [plot for figures in parts.values() for plot in figures.get("plots", [])],
        "report": write_demo_page(place.folder / "report.html", titled),
        "wall_seconds": time.perf_counter() - begin,
    }


def show_federated(settings: DemoSettings, folder: Path) -> dict[str, Any]:
    """federated: sites fine-tune one adapter together, none of them shows its text."""
    figures = last_line([*FED_SIM, *settings.project.federated, run_folder(folder)], settings)
    losses = [figures["eval_loss_before"], *figures["eval_loss_by_round"]]
    log.info("held-out loss %s; picture: %s", " -> ".join(f"{loss:.4f}" for loss in losses), figures["plots"][0])
    return figures


def show_speculative(settings: DemoSettings, folder: Path) -> dict[str, Any]:
    """speculative: a drafter guesses, a verifier in another process checks; the text is the verifier's own."""
    with verifier(settings, folder / "verifier") as port:
        prompt = f"prompt={settings.prompt}"
        words = [*DRAFTER, prompt, f"network.port={port}", *settings.project.drafter, run_folder(folder / "drafter")]
        figures = last_line(words, settings)
    log.info(
        "%d tokens, %.0f %% of the guesses accepted, %.0f ms a token, %d bytes sent and %d received",
        figures["new_tokens"],
        100 * (figures["alpha"] or 0.0),
        figures["ms_per_token_p50"],
        figures["bytes_sent"],
        figures["bytes_received"],
    )
    return figures


def show_split(settings: DemoSettings, folder: Path) -> dict[str, Any]:
    """split: two processes with half of a model each write one text, hidden states cross between them."""
    words = [*SPLIT, f"prompt={settings.prompt}", *settings.project.split, run_folder(folder)]
    figures = last_line(words, settings)
    log.info(
        "%d tokens, %.0f ms a token, %d bytes forward and %d back; picture: %s",
        len(figures["token_ids"]),
        1000 * (figures["token_seconds_p50"] or float("nan")),
        figures["boundary_bytes_per_token"],
        figures["return_bytes_per_token"],
        figures["plots"][0],
    )
    return figures


def show_split_training(settings: DemoSettings, folder: Path) -> dict[str, Any]:
    """split training: two processes with half of a model each train an adapter, gradients cross between them."""
    figures = last_line([*SPLIT_TRAIN, *settings.project.split_training, run_folder(folder)], settings)
    log.info(
        "loss %.4f -> %.4f, at most %.1g from the unsplit run's; %.1f MB crossed a step; picture: %s",
        figures["loss_by_step"][0],
        figures["loss_by_step"][-1],
        figures.get("largest_loss_difference", float("nan")),
        figures["boundary_bytes_per_step"] / 1e6,
        figures["plots"][0],
    )
    return figures


def show_matrix(settings: DemoSettings, folder: Path) -> dict[str, Any]:
    """matrix: what this machine gives, context window by batch size, a process a cell."""
    figures = last_line([*MATRIX, *settings.project.matrix, run_folder(folder)], settings)
    log.info(
        "cells: %d done, %d failed, %d known from before; page: %s",
        figures["ok"] - figures["skipped"],
        figures["failed"],
        figures["skipped"],
        figures["report"],
    )
    return figures


PARTS = {
    "federated": show_federated,
    "speculative": show_speculative,
    "split": show_split,
    "split_training": show_split_training,
    "matrix": show_matrix,
}


@contextmanager
def verifier(settings: DemoSettings, folder: Path) -> Iterator[int]:
    """A verifier on a free port, as long as the block lasts."""
    command = [sys.executable, *VERIFIER, "network.port=0", *settings.project.verifier, run_folder(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        listening = process.stdout.readline()
        if not listening:
            raise RuntimeError(f"the verifier ended with code {process.wait()} before it listened")
        yield int(json.loads(listening)["port"])
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def last_line(words: Sequence[str], settings: DemoSettings) -> dict[str, Any]:
    """Runs one command to its end, its progress on our stderr, and returns the document of its last line."""
    done = subprocess.run(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        text=True,
        timeout=settings.project.part_timeout_seconds,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"python {' '.join(words)} ended with code {done.returncode}")
    *text, document = done.stdout.splitlines()
    print("\n".join(text), flush=True)
    figures: dict[str, Any] = json.loads(document)
    return figures


def run_folder(folder: Path) -> str:
    """The override that puts a part's files below the demonstration's."""
    return f"hydra.run.dir={json.dumps(str(folder))}"


def main() -> None:
    """Composes `conf/demo.yaml` and runs."""
    entry.main("demo", DemoSettings, run)


if __name__ == "__main__":
    main()
