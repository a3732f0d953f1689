"""`make demo`: every pillar once, on this machine, with the commands that anyone would type.

Each part is processes of its own; the last line holds every part's figures.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab.command import entry
from lab.command.processes import first_line, run_to_end, start
from simulations.demo_page import write_demo_page
from simulations.demo_settings import DemoSettings

log = logging.getLogger(__name__)

START_SECONDS = 120.0
"""For the verifier to listen."""


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
    figures = last_line("simulations.fed_sim", settings.project.federated, folder, settings)
    losses = [figures["eval_loss_before"], *figures["eval_loss_by_round"]]
    log.info("held-out loss %s; picture: %s", " -> ".join(f"{loss:.4f}" for loss in losses), figures["plots"][0])
    return figures


def show_speculative(settings: DemoSettings, folder: Path) -> dict[str, Any]:
    """speculative: a drafter guesses, a verifier in another process checks; the text is the verifier's own."""
    with verifier(settings, folder / "verifier") as port:
        words = [f"prompt={settings.prompt}", f"network.port={port}", *settings.project.drafter]
        figures = last_line("speculative.drafter", words, folder / "drafter", settings)
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
    words = [f"prompt={settings.prompt}", *settings.project.split]
    figures = last_line("split.infer", words, folder, settings)
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
    figures = last_line("split.train", settings.project.split_training, folder, settings)
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
    figures = last_line("matrix", settings.project.matrix, folder, settings)
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
    words = ["network.port=0", *settings.project.verifier]
    process = start("speculative.verifier", words, folder, log=False)
    try:
        yield int(first_line(process, START_SECONDS)["port"])
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def last_line(module: str, words: Sequence[str], folder: Path, settings: DemoSettings) -> dict[str, Any]:
    """Runs one command to its end, its progress on our stderr, and returns the document of its last line."""
    try:
        text, figures = run_to_end(module, words, folder, settings.project.part_timeout_seconds)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"python -m {module} {' '.join(words)} ended with code {error.returncode}") from None
    print("\n".join(text), flush=True)
    return figures


def main() -> None:
    """Composes `conf/demo.yaml` and runs."""
    entry.main("demo", DemoSettings, run)


if __name__ == "__main__":
    main()
