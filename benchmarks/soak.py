"""Kill small runs again and again, and see that each ends as if nobody had touched it.

    python -m benchmarks.soak --kills 200 --seed 0

A run of the built-in example, on two ranks, with an SFT stage, a reference cache, evaluations and checkpoints, is
killed by SIGKILL, started again with the same command, killed in another phase, and so on until it comes to its end:
its weights must be bit-equal to those of a run of the same seed that was never killed, its `metrics.jsonl` must hold
every step once with the same numbers. In half of the kills every rank dies, in the others one rank, and this launcher
ends the rest as torchrun does. The phase a kill hit is read afterwards from the trace that the killed rank wrote.

Ranks are forked from a server that has imported everything, which is what lets hundreds of starts fit into minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.soak_rank import PHASES, open_phases, read_trace, run_rank
from dpo.runtime.tracking import read_lines

RANKS = 2
LIMIT = 300.0
"""Seconds for one start; the machine may be busy with other things."""
CHAIN = ("sft", "sft", "checkpoint", "cache", "cache", "evaluation", "step", "checkpoint", "step", "evaluation")
"""Phases in which one run is to be killed, in this order: each leaves the next one ahead of it."""


@dataclass(frozen=True)
class Kill:
    """One SIGKILL and what it hit.

    Attributes:
        phase: The innermost open phase in the trace of the killed rank; between, if none was open.
        whole_job: Whether all ranks were killed, else one of them.
        before_first: Whether there was neither a checkpoint nor `reference/` yet.
        over_after: Seconds until the last rank was gone.
    """

    phase: str
    whole_job: bool
    before_first: bool
    over_after: float


@dataclass
class Result:
    """What the kills of this script came to."""

    kills: list[Kill] = field(default_factory=list)
    runs: int = 0
    starts: int = 0
    different: list[str] = field(default_factory=list)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Job:
    """The ranks of one start."""

    def __init__(self, argv: list[str], folder: Path) -> None:
        """Start them; they write their traces and output into `folder`."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.traces = [folder / f"trace-{rank}" for rank in range(RANKS)]
        for trace in self.traces:
            trace.touch()
        context, port = multiprocessing.get_context("forkserver"), _free_port()
        self.ranks = [
            context.Process(target=run_rank, args=(rank, RANKS, port, str(folder), argv)) for rank in range(RANKS)
        ]
        for process in self.ranks:
            process.start()

    def is_running(self) -> bool:
        return all(process.is_alive() for process in self.ranks)

    def kill(self, victims: list[int]) -> float:
        """SIGKILL to some ranks; the others are ended as torchrun does it. Seconds until all are gone."""
        began = time.monotonic()
        for rank in victims:
            os.kill(self.ranks[rank].pid or 0, signal.SIGKILL)
        for rank in victims:
            self.ranks[rank].join()
        for process in self.ranks:
            process.terminate()
        for process in self.ranks:
            process.join(30)
            if process.is_alive():
                process.kill()
                process.join()
        return time.monotonic() - began

    def wait(self) -> list[int | None]:
        """Exit codes, once all have ended by themselves."""
        until = time.monotonic() + LIMIT
        for process in self.ranks:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        for process in self.ranks:
            process.kill()
        return codes


def arguments(seed: int, caches: Path) -> list[str]:
    """The command line of one seed's runs, without its directory."""
    return [
        "--config", "ds_configs/zero2.json", "--recipe", "recipes/quickstart.yaml", "--train.seed", str(seed),
        "--data.train_limit", "64", "--data.validation_limit", "32", "--train.global_batch_size", "16",
        "--train.sft_epochs", "4", "--train.epochs", "2", "--train.save_every", "2", "--train.eval_every", "4",
        "--log.every", "3", "--log.samples", "0", "--optim.warmup_steps", "2", "--reference.mode", "cached",
        "--data.cache_dir", str(caches / "tokens"),
    ]  # fmt: skip


def weights(run: Path) -> str:
    """Fingerprint of the final weights."""
    return hashlib.sha256((run / "final" / "model.safetensors").read_bytes()).hexdigest()


def numbers(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock decides."""
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in read_lines(run)]


def _has_checkpoint(run: Path) -> bool:
    return (run / "reference").is_dir() or any((run / "checkpoints").glob("s*-*"))


def _came(job: Job, rank: int, phase: str, after: int) -> bool:
    """Wait until a rank has entered a phase and made `after` updates in it; False if the run ends before."""
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        entries = [entry.name for entry in read_trace(job.traces[rank])]
        if phase in entries and entries[entries.index(phase) :].count("update") >= after:
            return True
        if not job.is_running():
            return False
        time.sleep(0.002)
    raise RuntimeError(f"no {phase} within {LIMIT} s, see {job.traces[rank].parent}")


def _length(traces: list[Path], phase: str) -> float:
    """Seconds that a phase takes in a run that was not killed; of SFT the pace of its updates."""
    entries = read_trace(traces[0])
    if phase == "sft":
        updates = [entry.at for entry in entries if entry.name == "update"]
        return updates[2] - updates[1]
    start = next(entry.at for entry in entries if entry.name == phase)
    return next(entry.at for entry in entries if entry.name == f"-{phase}" and entry.at > start) - start


def soak_one(seed: int, wanted: int, folder: Path, result: Result) -> None:
    """One run that is killed along `CHAIN`, at most `wanted` times, and compared with one that is not."""
    choose, argv = random.Random(seed), arguments(seed, folder)
    whole, run = folder / "whole", folder / "killed"
    apart = ["--train.output_dir", str(whole), "--reference.cache_dir", str(folder / "a")]
    undisturbed = Job([*argv, *apart], folder / "jobs/0")
    if any(undisturbed.wait()):
        raise RuntimeError(f"the undisturbed run of seed {seed} failed, see {folder}/jobs/0")
    argv += ["--train.output_dir", str(run), "--reference.cache_dir", str(folder / "b")]
    result.runs += 1
    for number, phase in enumerate(CHAIN[:wanted], start=1):
        job = Job(argv, folder / f"jobs/{number}")
        result.starts += 1
        whole_job = len(result.kills) % 2 == 0
        victims = list(range(RANKS)) if whole_job else [choose.randrange(RANKS)]
        # In SFT behind its first checkpoint, which is written after two updates.
        if not _came(job, victims[0], phase, choose.randint(3, 6) if phase == "sft" else 0):
            break
        # Of a cache the first half, so that the next start finds a part of it.
        share = choose.random() * (0.5 if phase == "cache" else 1)
        time.sleep(share * _length(undisturbed.traces, phase))
        early = not _has_checkpoint(run)
        seconds = job.kill(victims)
        hit = open_phases(read_trace(job.traces[victims[0]]))
        kill = Kill(hit[-1] if hit else "between", whole_job, early, seconds)
        result.kills.append(kill)
        whom = "the job" if whole_job else f"rank {victims[0]}"
        print(f"seed {seed}, start {number}: killed {whom} in {kill.phase}", flush=True)
    codes = Job(argv, folder / "jobs/last").wait()
    result.starts += 1
    if any(codes):
        result.different.append(f"seed {seed}: the last start ended with {codes}, see {folder}")
    elif weights(run) != weights(whole):
        result.different.append(f"seed {seed}: other weights, see {folder}")
    elif numbers(run) != numbers(whole):
        result.different.append(f"seed {seed}: other metrics, see {folder}")
    else:
        shutil.rmtree(folder)


def report(result: Result) -> str:
    """The figures as text."""
    count = Counter(kill.phase for kill in result.kills)
    total = len(result.kills)
    lines = [f"{total} kills in {result.runs} runs ({result.starts} starts):"]
    lines += [f"  {phase}: {count[phase]}" for phase in (*PHASES, "between")]
    lines += [
        f"  whole job {sum(k.whole_job for k in result.kills)}, one rank {sum(not k.whole_job for k in result.kills)}",
        f"  before the first checkpoint: {sum(k.before_first for k in result.kills)}",
        f"  longest until all ranks were gone: {max((k.over_after for k in result.kills), default=0):.1f} s",
        f"runs that did not end as the undisturbed one: {len(result.different)}",
    ]
    return "\n".join(lines + result.different)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Kill runs at random moments and compare what they end in.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the next ones count on")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.get_context("forkserver").set_forkserver_preload(["benchmarks.soak_rank"])
    result, folder = Result(), Path(tempfile.mkdtemp(prefix="soak-"))
    seed = options.seed
    while len(result.kills) < options.kills:
        soak_one(seed, options.kills - len(result.kills), folder / str(seed), result)
        seed += 1
    print(f"seeds {options.seed} to {seed - 1}\n{report(result)}")
    if options.json:
        options.json.write_text(json.dumps({"seeds": [options.seed, seed - 1]} | asdict(result), indent=1))
    return 1 if result.different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
