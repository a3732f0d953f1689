"""The long fault, fuzz and identity runs: `make soak` (about an hour). Each of them at a small size is a test too.

    python -m tests.soak                                # all
    python -m tests.soak hostile_frames shards_killed   # some; their rows take the place of older ones in the report

Writes benchmarks/results/soak-<commit>.json, and prints the rows as one line of JSON, as benchmarks do: `make bench`
runs those that RESULTS.md shows. Exit code 1 when a run found something.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from lab.bench import write_report
from lab.command.entry import compose_settings
from lab.engine.context import longest_text
from lab.environment import commit
from lab.models.proof import try_out
from lab.settings import to_plain
from lab.tracking import finite
from simulations.demo import PARTS, show
from simulations.demo_settings import DemoSettings
from speculative.settings import Mode
from split.chain.boundary import Boundary
from split.chain.local_shards import LocalShards
from split.inference.open import INFERENCE, fingerprints, join_shards
from split.settings import SplitSettings
from tests import architectures
from tests.fl.run import vanishing
from tests.fl.run.simulated_kills import kill_simulations
from tests.fl.warm import figures
from tests.folder_fuzz import fuzz_folders
from tests.lab.models import adapters
from tests.logit_rules import compare_logit_rules, shards_differ
from tests.role_kills import kill_roles
from tests.serve import http_fuzz
from tests.serve import kills as chain_kills
from tests.serve.adapters import make_adapter
from tests.serve.chat_server import chat_server
from tests.settings_fuzz import change_settings, commands_that_end, reach_work
from tests.speculative.identity import (
    Compared,
    compare_everything,
    compare_quantised,
    compare_random,
    smollm2_subject,
    speculated_equals_alone,
)
from tests.speculative.kills import DELAY_SECONDS, KINDS
from tests.speculative.kills import kill_at_random as kill_drafting
from tests.speculative.processes import RANDOM, verifier
from tests.speculative.verifier.crowd import crowd
from tests.speculative.verifier.leavers import leave_at_random
from tests.speculative.verifier.misuse import LARGEST_GROWTH_BYTES as LARGEST_MISUSE_GROWTH_BYTES
from tests.speculative.verifier.misuse import misuse
from tests.split.chains import saved_model
from tests.split.inference import crowd_processes, hostile, kills, texts
from tests.split.training.kills import kill_while_training
from tests.sweep_pairs import compare_pairs
from tests.test_conf import COMMANDS
from tests.unicode_texts import round_trip
from tests.wire_fuzz import fuzz, server_process

HOSTILE_FRAMES = 200_000
HTTP_REQUESTS = 20_000
CHANGED_FOLDERS = 1500
CHANGED_SETTINGS = 5000
REACHING_SETTINGS = 130
COMPARED_TOKENS = 50_000
QUANTISED_TOKENS = 20_000
LOGIT_RULES_TOKENS = 10_000
SMOLLM2_TOKENS_A_TEXT = 40
LARGEST_TIE = 1e-4
KILLS = 50
SERVER_KILLS = 10
CHAIN_KINDS = ("first", "last", "verifier")
DRAFTING_KILLS = 100
RESUME_SECONDS = 1.0 + 4 * DELAY_SECONDS
"""A round trip at its longest, and a second; the prefill of such texts is not seen beside that."""
DEAD_SECONDS = 5.0
UNICODE_TEXTS = 2000
ROLE_KILLS = 100
LEARNER_KILLS = 10
FEDERATION_KILLS = 30
DEPLOYMENT_KILLS = 5
DEMONSTRATION_SECONDS = 100.0
SITE_KILLS = 20
WARM_TURNS = 3
STRAGGLED_ROUNDS = 20
DETECTION_SECONDS = 2.0
START_SECONDS = 120.0
ATTACKING_FRAMES = 100_000
ATTACKED_CACHE_BYTES = 2**23
LARGEST_GROWTH_BYTES = 2**25
CROWDED_TEXTS = 20

WRONG_REQUESTS = 200
CROWDED_NEW_TOKENS = 200
LEAVERS = 500
LEAVERS_AT_ONCE = 50
SWEEP_PAIRS = 500


def hostile_frames() -> dict[str, Any]:
    """Frames meant to break a listener: no crash, no allocation over the cap, others served throughout."""
    with server_process(handshake_seconds=3) as target:
        report = fuzz(target, frames=HOSTILE_FRAMES, seed=1)
    return {"ok": report.is_harmless(), **asdict(report)}


def http_fuzzed() -> dict[str, Any]:
    """Random and mutated bodies for every endpoint, and bytes that are no HTTP: no 5xx but 503, no traceback, at most
    10 MiB more memory, and the same text afterwards."""
    with tempfile.TemporaryDirectory() as folder, chat_server(Path(folder), *http_fuzz.WORDS) as server:
        found = http_fuzz.Fuzzer(server).fuzz(HTTP_REQUESTS, 1)
    statuses = {str(status): count for status, count in sorted(found.statuses.items())}
    return {"ok": found.is_harmless, **asdict(found), "statuses": statuses}


def speculative_identity() -> dict[str, Any]:
    """Tokens of speculative text that differ from the target's own, float64, all sources and lengths: none may."""
    compared = compare_random(COMPARED_TOKENS, Mode.sync)
    return {"ok": not compared.flips, **_figures(compared)}


def async_identity() -> dict[str, Any]:
    """The same in mode async, at random delays."""
    compared = compare_random(COMPARED_TOKENS, Mode["async"])
    return {"ok": not compared.flips, **_figures(compared)}


def compiled_identity() -> dict[str, Any]:
    """The same over compiled layers, both modes, int4, int8 and bfloat16: no token differs where `row_invariant` is
    true, which it is for int4 and int8 on any processor."""
    return _identity_of(compiles=True, threads=1)


def compiled_identity_two_threads() -> dict[str, Any]:
    """The same on two threads."""
    return _identity_of(compiles=True, threads=2)


def compiled_identity_avx2() -> dict[str, Any]:
    """The same with the kernels for AVX2 alone, on any processor (ATEN_CPU_CAPABILITY=avx2)."""
    code = "import json; from tests.soak import compiled_identity; print(json.dumps(compiled_identity()))"
    own = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], env=own, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def eager_identity() -> dict[str, Any]:
    """The same without compiled layers, which claim no `row_invariant`: what differs is counted."""
    return _identity_of(compiles=False, threads=1)


def eager_identity_two_threads() -> dict[str, Any]:
    """The same on two threads."""
    return _identity_of(compiles=False, threads=2)


def _identity_of(*, compiles: bool, threads: int) -> dict[str, Any]:
    found = {
        kind: compare_quantised(QUANTISED_TOKENS, kind, compiles=compiles, threads=threads)
        for kind in ("int4", "int8", "none")
    }
    wrong = [one for is_invariant, one in found.values() if is_invariant and one.flips]
    is_proved = not compiles or (found["int4"][0] and found["int8"][0])
    by_kind = {kind: {"row_invariant": is_so, **_figures(one)} for kind, (is_so, one) in found.items()}
    return {"ok": is_proved and not wrong, "by_quantization": by_kind}


def logit_rules_identity() -> dict[str, Any]:
    """Speculated text with penalties, biases, banned words and min_p, each and all, sync and async, against the target
    alone, and two shards against the whole model: no token differs."""
    compared = compare_logit_rules(LOGIT_RULES_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        by_shards = shards_differ(Path(folder))
    return {"ok": not compared.flips and not by_shards, **_figures(compared), "differing_by_shards": by_shards}


def smollm2_identity() -> dict[str, Any]:
    """The same with SmolLM2 in float32, about 2,000 tokens: only ties may flip."""
    compared = compare_everything(smollm2_subject(), SMOLLM2_TOKENS_A_TEXT, Mode.sync, whole=False)
    return {"ok": all(flip.margin < LARGEST_TIE for flip in compared.flips), **_figures(compared)}


def shards_killed() -> dict[str, Any]:
    """Texts over three shard processes; SIGKILL of one of them at 50 random points: the same tokens, nothing raised."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*kills.WORDS, f"model.cache_dir={folder}/models"]
        with LocalShards(kills.LAYERS, Path(folder), START_SECONDS, words) as shards:
            came = kills.kill_at_random(KILLS, 1, kills.settings_of(f"{folder}/models"), shards)
    found = came.slowest_detection_seconds <= DETECTION_SECONDS
    return {"ok": came.same_tokens and came.recoveries == came.kills == KILLS and found, **asdict(came)}


def shards_attacked() -> dict[str, Any]:
    """Frames that make no sense at two shard processes that want a key, with the key and without: their client goes on,
    and they grow by no more than the keys and values they may keep."""
    with tempfile.TemporaryDirectory() as folder:
        key_file = Path(folder) / "lab.key"
        key_file.write_text(hostile.KEY.hex() + "\n")
        key_file.chmod(0o600)
        words = [*kills.WORDS, f"model.cache_dir={folder}/models", f"network.key_file={key_file}"]
        words += [f"project.cache_limit_bytes={ATTACKED_CACHE_BYTES}", "project.max_connections=64"]
        settings = compose_settings("split_inf", " ".join(words), SplitSettings)
        with LocalShards([range(0, 2), range(2, 4)], Path(folder), START_SECONDS, words) as shards:
            engine = join_shards(
                settings.model, settings.network, shards=[str(a) for a in shards.addresses], spares=[],
                boundary="float32", context=256, prefill_chunk=128, start_seconds=START_SECONDS, recovery_seconds=0.0,
            )  # fmt: skip
            before = [psutil.Process(process.pid).memory_info().rss for process in shards.processes]
            first = [process.pid for process in shards.processes]
            came = hostile.attack(
                [address.port for address in shards.addresses],
                INFERENCE.endpoint(settings.network, fingerprints(settings.model, Boundary.float32), "client"),
                engine,
                lambda count: texts.greedy(texts.inprocess(settings, (0, 4)), [1, 2, 3], count),
                frames=ATTACKING_FRAMES,
                seed=1,
            )
            after = [psutil.Process(process.pid).memory_info().rss for process in shards.processes]
            lived = first == [process.pid for process in shards.processes]
            engine.shutdown()
    growth = max(b - a for a, b in zip(before, after, strict=True))
    ok = came.same_tokens and lived and growth < ATTACKED_CACHE_BYTES + LARGEST_GROWTH_BYTES
    return {"ok": ok, **asdict(came), "shards_lived": lived, "rss_growth_bytes": growth}


def chain_killed() -> dict[str, Any]:
    """An adapter behind two shards, a verifier, a link of 50 ms and an HTTP server: SIGKILL of any of them at random
    tokens, 50 behind the server and 10 of the server itself. Every text is that of the whole model with the adapter."""
    kinds = [*CHAIN_KINDS * (KILLS // len(CHAIN_KINDS) + 1)][:KILLS] + ["server"] * SERVER_KILLS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with chain_kills.chain(folder, make_adapter(folder / "adapter", 0), rtt_seconds=0.05) as behind:
            came = chain_kills.kill_at_random(behind, kinds, seed=1)
    return {"ok": came.differing == 0 and came.returns >= SERVER_KILLS, **asdict(came)}


def shards_misused() -> dict[str, Any]:
    """200 requests of every wrong kind at two shard processes beside 4 good texts: these are the same to the token."""
    return crowd_processes.misused(WRONG_REQUESTS)


def shards_crowded() -> dict[str, Any]:
    """20 texts of 100 to 900 tokens where there is room for 1,000: every one finishes or is told at once."""
    return crowd_processes.crowded(CROWDED_TEXTS)


def shards_left() -> dict[str, Any]:
    """500 clients that leave at random moments: nobody computes for one that left two passes ago."""
    return crowd_processes.left(LEAVERS)


def split_texts() -> dict[str, Any]:
    """32 greedy texts of 128 tokens of SmolLM2, whole and over 2, 3 and 4 shards: no token differs."""
    came = texts.compare_texts(
        texts.settings_of(), [(0, 15, 30), (0, 7, 22, 30), (0, 4, 11, 23, 30)], prompts=32, tokens=128
    )
    return {"ok": not came.differing, **asdict(came)}


def drafting_killed() -> dict[str, Any]:
    """Texts whose verifier, drafter or link goes at 100 random points (SIGKILL, reset, half-open, stall), mode async:
    the target's own tokens, soon after the peer listens again; who is gone is missed in time."""
    came = kill_drafting(random.Random(2).choices(KINDS, k=DRAFTING_KILLS), seed=2)
    most, found = max(came.resume_seconds), max(came.found_seconds)
    in_time = most <= RESUME_SECONDS and found <= DEAD_SECONDS
    return {
        "ok": came.same_text and in_time and sum(came.kills.values()) == DRAFTING_KILLS,
        "kills": came.kills,
        "resumes": came.resumes,
        "resume_seconds_median": statistics.median(came.resume_seconds),
        "resume_seconds_most": most,
        "found_seconds_most": found,
    }


def verifier_misused() -> dict[str, Any]:
    """Wrong requests of every kind at a verifier process, beside four clients that mean well: their texts are their
    own, the process lives, and grows by 10 MB at most."""
    with verifier(*RANDOM) as running:
        came = misuse(running.port, running.process.pid, RANDOM, WRONG_REQUESTS, seed=1)
        tracebacks = running.stderr().count("Traceback")
    grew = came.rss_growth_bytes > LARGEST_MISUSE_GROWTH_BYTES
    ok = came.same_texts and came.lives and not came.unanswered and not grew and not tracebacks
    return {"ok": ok, **asdict(came), "tracebacks": tracebacks}


def verifier_crowded() -> dict[str, Any]:
    """20 texts of 100 to 900 positions on 1,000 positions of cache, arriving at random, and some that never fit: each
    is finished, as the target alone makes it, or was told at once."""
    came = crowd(CROWDED_TEXTS, CROWDED_NEW_TOKENS, seed=1)
    return {"ok": not came.died and came.same_texts and came.finished == CROWDED_TEXTS, **asdict(came)}


def verifier_left() -> dict[str, Any]:
    """500 clients of both protocols that leave at random moments, in every way: no pass computes a row for one that
    left two passes ago."""
    came = leave_at_random(LEAVERS, LEAVERS_AT_ONCE, seed=1)
    return {"ok": not came.late_rows and came.stayed_text, **asdict(came)}


def federation_killed() -> dict[str, Any]:
    """SIGKILL of a simulation's server process at 30 random points, resumed each time: the adapter of every round is
    that of the uninterrupted run, byte for byte, and no finished round is lost."""
    with tempfile.TemporaryDirectory() as folder:
        came = kill_simulations(FEDERATION_KILLS, seed=1, folder=Path(folder))
    return {"ok": came["same_adapters"] and not came["lost"] and came["kills"] == FEDERATION_KILLS, **came}


def stragglers() -> dict[str, Any]:
    """Rounds per hour of a federation with a site that takes 10 times as long: with a deadline, or with one site more
    than needed, at least 3 times those of waiting for all."""
    with tempfile.TemporaryDirectory() as folder:
        came = vanishing.stragglers(Path(folder), STRAGGLED_ROUNDS)
    return {"ok": min(came["deadline_gain"], came["oversampling_gain"]) >= 3, **came}


def sites_killed() -> dict[str, Any]:
    """30 % of 10 sites killed (SIGKILL) in each of 10 rounds: it finishes, with a perplexity within 1 % of that of the
    same sites without kills."""
    with tempfile.TemporaryDirectory() as folder:
        came = vanishing.killed_sites(Path(folder), 10, 10)
    return {"ok": came["rounds_completed"] == 10 and abs(came["perplexity_ratio"] - 1) <= 0.01, **came}


def demonstration() -> dict[str, Any]:
    """The federated part of `make demo` takes less than 100 s, and its held-out loss falls."""
    settings = compose_settings("demo", [], DemoSettings)
    with tempfile.TemporaryDirectory() as folder:
        came = show(PARTS[0], settings, Path(folder))
    figures = {name: came.figures[name] for name in ("eval_loss_before", "eval_loss_after", "wall_seconds")}
    falls = figures["eval_loss_after"] < figures["eval_loss_before"]
    return {"ok": falls and came.seconds < DEMONSTRATION_SECONDS, "part_seconds": came.seconds, **figures}


def warm_sites() -> dict[str, Any]:
    """warm_over_cold at most 0.35, same_adapters, files_with_a_sites_text none: the time of a round of one step at two
    deployed sites with SmolLM2."""
    words = ["model=smollm2_135m", "model.quantization=nf4", "project.local_steps=1", "project.data.max_held_out=1"]
    with tempfile.TemporaryDirectory() as folder:
        came = figures.warm_over_cold(Path(folder), WARM_TURNS, *words)
    is_same = came["same_adapters"] and not came["files_with_a_sites_text"]
    return {"ok": is_same and came["warm_over_cold"] <= 0.35, **came}


def warm_sites_killed() -> dict[str, Any]:
    """SIGKILL of a site's worker, SuperNode, or both, at 20 random points: a round loses that site at most, the next
    one has its reply again, and nothing is left running."""
    with tempfile.TemporaryDirectory() as folder:
        came = figures.kill_sites(Path(folder), SITE_KILLS, seed=1)
    lost_less = came["most_lost_in_a_round"] <= 1 and came["all_replied_again"]
    ok = came["exit_code"] == 0 and lost_less and not came["left_running"]
    return {"ok": ok and sum(came["kills"].values()) == SITE_KILLS, **came}


def deployment_killed() -> dict[str, Any]:
    """SIGKILL of a deployed run's server process at 5 random points: `python -m fl.run` ends with the same bytes, and
    works on no round again that was finished at a kill."""
    with tempfile.TemporaryDirectory() as folder:
        came = figures.kill_servers(Path(folder), DEPLOYMENT_KILLS, 6, seed=1)
    holds = came["same_adapters"] and not came["rounds_lost"] and came["exit_code"] == 0
    return {"ok": holds and came["kills"] == DEPLOYMENT_KILLS, **came}


def learners_killed() -> dict[str, Any]:
    """A training over two shard processes, of which one is killed (SIGKILL) at 10 random steps: no loss differs from
    the whole model's, which nobody kills."""
    with tempfile.TemporaryDirectory() as folder:
        came = kill_while_training(LEARNER_KILLS, seed=1, folder=Path(folder), words=["tracking=none"])
    figures = {name: came.result[name] for name in ("steps", "recoveries", "largest_loss_difference")}
    return {"ok": came.same_losses and came.kills == LEARNER_KILLS, "kills": came.kills, **figures}


def adapters_changed() -> dict[str, Any]:
    """Changes of adapter folders (each key of the config, each file, tensors): slices say what PEFT says or refuse."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = saved_model("qwen2", Path(folder) / "model")
        came = adapters.fuzz(settings, Path(folder), list(adapters.all_changes()))
    return {"ok": not came.wrong and not came.broken and came.same > 0, **asdict(came)}


def model_folders() -> dict[str, Any]:
    """Model folders changed in one place: transformers' own model, or one line; no traceback."""
    found = fuzz_folders(CHANGED_FOLDERS, seed=1)
    return {"ok": not found.faults, **asdict(found)}


def unicode_texts() -> dict[str, Any]:
    """Random texts through argument, standard input, file and pipe in four locales: the same text or one line."""
    found = round_trip(UNICODE_TEXTS, seed=1)
    return {"ok": not found.faults and found.refused > 0, **asdict(found)}


def roles_killed() -> dict[str, Any]:
    """SIGINT or SIGTERM to every role at 100 random moments: a last line with the text so far, nothing left running."""
    came = kill_roles(ROLE_KILLS, seed=1)
    return {"ok": not came.faults and came.kills == ROLE_KILLS, **asdict(came)}


def settings_changed() -> dict[str, Any]:
    """Wrong values for every key of every command, composed and checked, and some that reach the work: no traceback."""
    with tempfile.TemporaryDirectory() as folder:
        composed = change_settings(COMMANDS, CHANGED_SETTINGS, seed=1)
        reached = reach_work(commands_that_end(Path(folder)), REACHING_SETTINGS, seed=1, folder=Path(folder))
    return {"ok": not composed.faults + reached.faults, **asdict(composed), "reached": asdict(reached)}


SPECULATED_CONTEXT = 120
"""Of `speculated_equals_alone`."""


def families_speculated() -> dict[str, Any]:
    """Every architecture that is proved: speculated text against the target alone, float64."""
    torch.set_num_threads(1)
    flipped, tokens, families = {}, 0, 0
    for name in architectures.NAMES:
        try:
            if try_out(architectures.config_of(name)).engine is not None:
                continue
            target = architectures.target_of(name)
            if (longest_text(target.config) or SPECULATED_CONTEXT) < SPECULATED_CONTEXT:
                continue  # longrope: a twin of it is served with less than these texts take
            compared = speculated_equals_alone(target, seed=families)
        except Exception as error:  # a family whose class has no sensible values of its own
            flipped[name] = f"{type(error).__name__}: {error}"
            continue
        families, tokens = families + 1, tokens + compared.tokens
        flipped |= {name: f"{len(compared.flips)} flips"} if compared.flips else {}
    return {"ok": not flipped and families > 80, "families": families, "tokens": tokens, "flipped": flipped}


def sweeps_over_kept_cells() -> dict[str, Any]:
    """Random pairs of sweeps: the second, over cells that the first left, equals itself run fresh, and has a report."""
    report = compare_pairs(SWEEP_PAIRS, pictures_every=SWEEP_PAIRS // 10)
    return {"ok": report.first_wrong is None and report.pairs == SWEEP_PAIRS, **asdict(report)}


RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    run.__name__: run
    for run in (
        *(hostile_frames, http_fuzzed, speculative_identity, async_identity, smollm2_identity),
        *(compiled_identity, compiled_identity_two_threads, compiled_identity_avx2),
        *(eager_identity, eager_identity_two_threads),
        *(
            drafting_killed,
            shards_killed,
            shards_attacked,
            split_texts,
            learners_killed,
            model_folders,
            adapters_changed,
        ),
        *(families_speculated, logit_rules_identity, shards_misused, shards_crowded, shards_left, chain_killed),
        *(unicode_texts, roles_killed, settings_changed),
        *(verifier_misused, verifier_crowded, verifier_left, sweeps_over_kept_cells),
        *(federation_killed, deployment_killed, stragglers, sites_killed, warm_sites, warm_sites_killed, demonstration),
        demonstration,
    )
}


def _figures(compared: Compared) -> dict[str, Any]:
    return {
        "tokens": compared.tokens,
        "differing": compared.differing,
        "accepted": compared.accepted,
        "shared_passes": compared.shared_passes,
        "sources": sorted({source for source, _, _ in compared.cells}),
        "samplings": sorted({sampling for _, sampling, _ in compared.cells}),
        "draft_lengths": sorted({length for _, _, lengths in compared.cells for length in lengths}),
        "texts_at_once": sorted({len(lengths) for _, _, lengths in compared.cells}),
        "flips": [asdict(flip) for flip in compared.flips],
    }


def measured(name: str) -> dict[str, Any]:
    """One run's row; says when it begins and what came of it."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    begin = time.monotonic()
    target = " ".join((RUNS[name].__doc__ or "").split())
    row = {"run": name, **RUNS[name](), "seconds": time.monotonic() - begin, "target": target}
    print(f"{name}: {'ok' if row['ok'] else 'FAILED'} after {row['seconds']:.0f} s", file=sys.stderr, flush=True)
    return row


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of an earlier report, by run; none when there is none."""
    return {row["run"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}


def main(names: Sequence[str]) -> int:
    """The named runs in turn, all when none is named. The report is written after each."""
    names = [name for name in names if not name.startswith("hydra.run.dir=")]  # `make bench` says it to everyone
    if unknown := set(names) - set(RUNS):
        print(f"error: run must be one of {', '.join(RUNS)}, got {min(unknown)}", file=sys.stderr)
        return 2
    path = Path(f"benchmarks/results/soak-{commit() or 'unknown'}.json")
    done = []
    for name in names or RUNS:
        done.append(row := measured(name))
        write_report(path, "soak", list((rows_of(path) | {name: row}).values()))
    print(path, file=sys.stderr)
    print(json.dumps({"rows": finite(to_plain([_as_benchmarked(row) for row in done]))}))
    return 0 if all(row["ok"] for row in done) else 1


def _as_benchmarked(row: dict[str, Any]) -> dict[str, Any]:
    """A run's row under the names that benchmarks use."""
    return {"part": row["run"], **{key: row[key] for key in row if key not in ("run", "ok")}, "holds": row["ok"]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
