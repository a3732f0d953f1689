"""Cells on a Ray cluster: one task each, with its demands; runs that were lost with a node or worker run again.

A task holds the stdin of its cell's supervisor, so a worker that is killed ends its cell too.
"""

import logging
import subprocess
import sys
from collections.abc import Generator, Sequence
from typing import Any

from typing_extensions import override

from lab.command.ray_signals import ray_leaves_signals_alone
from lab.settings import UserError
from matrix.launching import CellLauncher, run_job
from matrix.settings import SweepSettings
from matrix.supervisor import Job, Outcome

log = logging.getLogger(__name__)

LOST_RETRIES = 3
"""Restarts of a task after its worker or node was lost."""

NEW_CLUSTER = "local"


class RayLauncher(CellLauncher):
    """Spreads cells over the nodes of a cluster, as many concurrently as their demands allow.

    UserError when the cluster does not answer in time.
    """

    def __init__(self, settings: SweepSettings) -> None:
        import ray

        self._settings = settings
        if settings.address != NEW_CLUSTER:
            check_answers(settings.address, settings.address_timeout_seconds)
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
        with ray_leaves_signals_alone():
            ray.init(address=settings.address, **quiet)
        total = ray.cluster_resources()
        wanted = {"CPU": settings.cores, "GPU": settings.gpus, "memory": settings.memory_limit_gib * 2**30}
        lacking = {name: value for name, value in wanted.items() if value > total.get(name, 0.0)}
        if lacking:
            ray.shutdown()
            (name, value), *_ = lacking.items()
            key = {"CPU": "cores", "GPU": "gpus", "memory": "memory_limit_gib"}[name]
            has = f"{total.get(name, 0.0):g} {name}"
            raise UserError(f"matrix.{key} must be at most what the cluster has ({has}), got {value:g} {name}")
        self.at_once = max(1, int(min(total[name] / value for name, value in wanted.items() if value)))

    @override
    def run(self, jobs: Sequence[Job]) -> Generator[tuple[int, Outcome]]:
        import ray

        task = ray.remote(run_job).options(
            num_cpus=self._settings.cores,
            num_gpus=self._settings.gpus,
            memory=int(self._settings.memory_limit_gib * 2**30),
            max_retries=LOST_RETRIES,
        )
        try:
            waiting = {task.remote(job): index for index, job in enumerate(jobs)}
            while waiting:
                (done,), _ = ray.wait(list(waiting), num_returns=1)
                yield waiting.pop(done), _outcome(done)
        finally:
            ray.shutdown()  # ends our workers, and with them their supervisors and cells


def _outcome(task: Any) -> Outcome:
    import ray

    try:
        outcome: Outcome = ray.get(task)
        return outcome
    except ray.exceptions.RayError as error:  # lost too often
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Outcome(failure="error", detail=detail, figures={}, seconds=0.0, peak_rss_bytes=0, host="")


def check_answers(address: str, timeout_seconds: float) -> None:
    """UserError unless a cluster answers. A separate process asks: Ray's own wait has no time limit and may abort."""
    code = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, address],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"matrix.address must be a Ray cluster that answers within {timeout_seconds:g} s, got {address!r}"
        ) from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise UserError(f"matrix.address must be a Ray cluster that answers, got {address!r} ({said[-1]})")
