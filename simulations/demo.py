"""`make demo`: every pillar once, on this machine, with the commands that a user would type.

Each part runs in separate processes; the last line holds the figures of every part.
"""

import logging
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.command import entry
from lab.command.overrides import override
from lab.command.processes import listening, run_to_end
from lab.faults import Fault
from simulations.demo_page import PartResult, write_demo_page
from simulations.demo_settings import DemoSettings

log = logging.getLogger(__name__)

START_SECONDS = 120.0
"""Time limit for a role to listen."""

Figures = Mapping[str, Any]


def run(settings: DemoSettings, place: entry.Run) -> dict[str, Any]:
    """Run the parts one after the other; a part that fails ends the demonstration, with its own message on stderr."""
    begin = time.perf_counter()
    shown: list[PartResult] = []
    place.so_far = lambda: {each.name: each.figures for each in shown}
    for number, part in enumerate(PARTS, start=1):
        left = ", ".join(later.name.replace("_", " ") for later in PARTS[number:]) or "the page"
        since = time.perf_counter() - begin
        log.info("%d of %d, %s: %s (%.0f s so far; then %s)", number, len(PARTS), part.name, part.title, since, left)
        shown.append(show(part, settings, place.folder / part.name))
        log.info("%s took %.0f s: %s", part.name, shown[-1].seconds, shown[-1].found)
    return {
        **place.so_far(),
        "plots": [plot for each in shown for plot in each.figures.get("plots", [])],
        "report": write_demo_page(place.folder / "report.html", shown),
        "wall_seconds": time.perf_counter() - begin,
    }


def show(part: "Part", settings: DemoSettings, folder: Path) -> PartResult:
    """Run one part to its end, with its progress on our stderr. Fault with its command when it fails."""
    begin = time.perf_counter()
    overrides = [f"prompt={settings.prompt}"] * part.generates + getattr(settings.project, part.overrides_key)
    with ExitStack() as stack:
        if part.role is not None:
            name, module = part.role
            own = ["network.port=0", *getattr(settings.project, name)]
            if part.serves_adapter:
                own.append(override("project.adapters", folder.parent / federated.__name__))
            role = listening(module, own, folder / name, START_SECONDS)
            overrides.append(part.address.format(port=stack.enter_context(role)))
            folder /= part.overrides_key
        command = f"python -m {part.module} {' '.join(overrides)}"
        try:
            text, figures = run_to_end(part.module, overrides, folder, settings.project.part_timeout_seconds)
        except subprocess.CalledProcessError as error:
            raise Fault(f"{command} ended with code {error.returncode}") from None
        except subprocess.TimeoutExpired as error:
            raise Fault(f"{command} was not done after {error.timeout:g} s (project.part_timeout_seconds)") from None
    print("\n".join(text), flush=True)
    seconds = time.perf_counter() - begin
    return PartResult(part.name, part.title, [part.module, *overrides], seconds, part.found(figures), figures)


@dataclass(frozen=True)
class Part:
    """One pillar of the demonstration."""

    name: str
    """Key of its figures in the last line."""
    module: str
    """Module that it runs."""
    overrides_key: str
    """Key in `project` of its overrides."""
    found: Callable[[Figures], str]
    """Turns its figures into one sentence; its docstring is the title of the part."""
    generates: bool = False
    """Whether it takes the prompt."""
    role: tuple[str, str] | None = None
    """A role that listens meanwhile: the key in `project` of its overrides, and its module."""
    address: str = "network.port={port}"
    """Override with which the part finds the role."""
    serves_adapter: bool = False
    """Whether the role serves the adapter of the federated part."""

    @property
    def title(self) -> str:
        """Title of the part, in one sentence."""
        return self.found.__doc__ or ""


def federated(figures: Figures) -> str:
    """Sites fine-tune one adapter together, and no text leaves a site."""
    losses = [figures["eval_loss_before"], *figures["eval_loss_by_round"]]
    return (
        f"held-out loss {' -> '.join(f'{loss:.4f}' for loss in losses)} over {figures['num_clients']} sites; "
        f"{figures['uplink_bytes_per_client_round'] / 1e6:.1f} MB of adapter a site and round, and no text"
    )


def speculative(figures: Figures) -> str:
    """A drafter proposes tokens, a verifier in another process checks them; the text is the verifier's own."""
    return (
        f"{figures['new_tokens']} tokens, {100 * (figures['alpha'] or 0.0):.0f} % of the draft tokens accepted, "
        f"{figures['ms_per_token_p50']:.0f} ms a token; "
        f"{figures['bytes_sent']} bytes sent and {figures['bytes_received']} received"
    )


def split(figures: Figures) -> str:
    """Two processes, each with half of the model, write one text; hidden states travel between them."""
    return (
        f"{len(figures['token_ids'])} tokens, {1000 * (figures['token_seconds_p50'] or float('nan')):.0f} ms a token; "
        f"{figures['boundary_bytes_per_token']} bytes forward and {figures['return_bytes_per_token']} back for each"
    )


def split_training(figures: Figures) -> str:
    """Two processes, each with half of the model, train one adapter; gradients travel between them."""
    return (
        f"loss {figures['loss_by_step'][0]:.4f} -> {figures['loss_by_step'][-1]:.4f}, "
        f"at most {figures.get('largest_loss_difference', float('nan')):.1g} from the unsplit run's; "
        f"{figures['boundary_bytes_per_step'] / 1e6:.1f} MB crossed a step"
    )


def matrix(figures: Figures) -> str:
    """The speed of this machine by context window and batch size, in a new process for each cell."""
    return (
        f"cells: {figures['ok'] - figures['skipped']} done, {figures['failed']} failed, "
        f"{figures['skipped']} known from before; page: {figures['report']}"
    )


def serve(figures: Figures) -> str:
    """An HTTP server offers the federation's newest adapter, and a chat client asks it one question."""
    return f"model {figures['model']} answered at {figures['base_url']} with {figures['new_tokens']} tokens"


PARTS = (
    Part("federated", "simulations.fed_sim", "federated", federated),
    Part(
        "speculative",
        "speculative.drafter",
        "drafter",
        speculative,
        generates=True,
        role=("verifier", "speculative.verifier"),
    ),
    Part("split", "split.infer", "split", split, generates=True),
    Part("split_training", "split.train", "split_training", split_training),
    Part("matrix", "matrix", "matrix", matrix),
    Part(
        "serve",
        "serve.chat",
        "chat",
        serve,
        generates=True,
        role=("server", "serve"),
        address="project.base_url=http://127.0.0.1:{port}/v1",
        serves_adapter=True,
    ),
)


main = entry.command("demo", DemoSettings, run)

if __name__ == "__main__":
    main()
