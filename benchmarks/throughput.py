"""Measure our training speed against TRL and a plain loop, on the same pairs, in fresh interleaved processes.

    python benchmarks/throughput.py --data ROWS --tokenizer FOLDER [--docs docs/benchmarks.md] [--json raw.json]

A GPU is used where there is one. Exit code 1, and no table is written, if the systems' losses do not agree: then they
did not do the same work, and their speeds mean nothing. What is measured and how: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks import ours, report, workload  # noqa: E402  (a script's own folder is on the path, the root is not)
from benchmarks.clock import Job  # noqa: E402
from dpo.commandline import parse  # noqa: E402
from dpo.errors import UserError  # noqa: E402

SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours_online": ("ours", {}),
    "ours_cached": ("ours", {"reference.mode": "cached"}),
    "ours_8_pairs": ("ours", {"train.micro_batch_size": 8}),
    "ours_packed": ("ours", {"train.layout": "packed"}),
    "ours_padded": ("ours", {"train.layout": "padded"}),
    "ours_single": ("ours", {"train.micro_batch_size": 1}),
    "ours_sdpa": ("ours", {"model.attention": "sdpa"}),
    "ours_flex": ("ours", {"model.attention": "flex"}),
    "ours_flash": ("ours", {"model.attention": "flash"}),
    "ours_static": ("ours", {"train.static_shapes": "true"}),
    "ours_loss_in_forward": ("ours", {"model.loss_in_forward": "true"}),
    "ours_loss_after_forward": ("ours", {"model.loss_in_forward": "false"}),
    "ours_vocabulary_64": ("ours", {"model.vocabulary_multiple": 64}),
    "ours_own_gelu": ("ours", {ours.OWN_GELU: True}),
    "ours_whole_mlp": ("ours", {ours.WHOLE_MLP: True}),
    "ours_own_products": ("ours", {ours.OWN_PRODUCTS: True}),
    "ours_compiled": ("ours", {"model.compile": "true"}),
    "ours_recomputed": ("ours", {"model.gradient_checkpointing": "true"}),
    "trl_default": ("trl_side", {}),
    "trl_tuned": ("trl_side", {}),
    "plain_loop": ("plain_loop", {}),
}
"""System -> module that runs it, its options; those of TRL tuned come from the sweep."""
COMPARED = {
    "cpu": ["ours_online", "ours_cached", "trl_default", "trl_tuned", "plain_loop"],
    "cuda": ["ours_online", "ours_cached", "ours_8_pairs", "trl_default", "trl_tuned", "plain_loop"],
    "llama_1b": ["ours_online", "ours_cached"],
}
"""Table -> the systems in it."""
EVERYWHERE = [
    "ours_packed", "ours_padded", "ours_single", "ours_own_gelu", "ours_whole_mlp", "ours_vocabulary_64",
    "ours_recomputed",
]  # fmt: skip
ABLATIONS = {
    "cpu": ["ours_online", "ours_cached", *EVERYWHERE, "ours_own_products", "ours_loss_in_forward"],
    "cuda": [
        "ours_online", "ours_cached", *EVERYWHERE, "ours_loss_after_forward", "ours_static", "ours_compiled",
        "ours_sdpa", "ours_flex", "ours_flash",
    ],
}  # fmt: skip
"""Device -> the default, then the same with one part changed."""
MICRO_BATCHES = {"cpu": [1, 2, 4, 8], "cuda": [1, 2, 4, 8, 16, 32, 64]}
"""Device -> pairs a forward pass in TRL's sweep."""
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    workload.add_rows(parser)
    workload.add_work(parser)
    add("--systems", nargs="+", choices=SYSTEMS, help="in the order of a round; default: those of the table")
    add("--ablations", action="store_true", help="ours alone, with one part after the other changed")
    add("--rounds", type=int, help="fresh processes per system")
    add("--minutes", type=float, default=float("inf"), help="no process ends later: none is started, or it is killed")
    add("--warmup", type=int, help="optimizer steps before the clock starts, at least 1")
    add("--steps", type=int, help="optimizer steps under the clock")
    add("--micro_batches", type=int, nargs="+", help="pairs a forward pass in TRL's sweep; default: by device")
    add("--sweep_steps", type=int, help="optimizer steps per combination of the sweep")
    add("--lr", type=float, help="large enough for losses to leave ln 2 within the timed steps")
    add("--docs", type=Path, help="write the tables between the markers of this file")
    add("--json", type=Path, help="write the raw numbers there")
    return parser.parse_args(argv)


def run_process(
    module: str, job: Job, folder: Path, threads: int, seconds: float = float("inf")
) -> dict[str, Any]:
    """Run a module of this package in a process of its own.

    Args:
        module: Its name.
        job: What it is to do; its folder is made.
        folder: For its job, log and result; removed.
        threads: Of the process.
        seconds: After which it is killed.
    Returns:
        Its result.
    Raises:
        SystemExit: If it failed or was killed, with the end of its log.
    """
    folder.mkdir()
    (folder / "job.json").write_text(replace(job, folder=str(folder)).to_json())
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES} | {
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_CACHE": str(folder / "datasets"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    if job.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        argv = [sys.executable, "-m", f"benchmarks.{module}", str(folder / "job.json"), str(folder / "result.json")]
        limit = None if math.isinf(seconds) else max(seconds, 0.0)
        try:
            code = subprocess.run(argv, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = None
    if code != 0:
        end = (folder / "log.txt").read_text(encoding="utf-8")[-4000:]
        killed = f"{end}\n{module} was killed after {seconds:.0f} s"
        raise SystemExit(killed if code is None else f"{module} failed:\n{end}")
    result = json.loads((folder / "result.json").read_text())
    shutil.rmtree(folder)
    return result


def unavailable(system: str, job: Job) -> str | None:
    """Why a system cannot be measured here; None if it can."""
    module, options = SYSTEMS[system]
    if module == "trl_side" and importlib.util.find_spec("trl") is None:
        return "TRL is not installed"
    if module == "ours":
        try:
            parse(ours.arguments(replace(job, options=options)))
        except UserError as error:
            return f"not available: {error}"
    return None


def _options(system: str, size: workload.Size, tried: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if system == "plain_loop":
        return {"micro_batch": size.plain_micro_batch}
    if system == "trl_tuned":
        best = max(tried, key=lambda t: t["pairs_per_second"] or 0.0)
        return {key: value for key, value in best.items() if key != "pairs_per_second"}
    return SYSTEMS[system][1]


def measure(
    args: argparse.Namespace, size: workload.Size, work: workload.Workload, folder: Path, deadline: float
) -> tuple[list[report.Run], list[dict[str, Any]], dict[str, str]]:
    """The sweep and all rounds, at least one.

    Args:
        args, size, work: What to measure.
        folder: For the processes.
        deadline: Time of `time.monotonic` after which no process may end, judged by the system's last one; one that
            would is killed.
    Returns:
        Runs in the order they were made, TRL's combinations tried, and system -> why it could not be measured.
    """
    missing = {s: why for s in args.systems if (why := unavailable(s, work.job)) is not None}
    systems = [s for s in args.systems if s not in missing]
    tried: list[dict[str, Any]] = []
    if "trl_tuned" in systems:
        wanted = args.micro_batches or MICRO_BATCHES[work.job.device]
        micro_batches = [m for m in wanted if size.pairs % m == 0]
        job = replace(work.job, options={"micro_batches": micro_batches, "sweep_steps": size.sweep_steps})
        tried = run_process("trl_side", job, folder / "sweep", args.threads, deadline - time.monotonic())["tried"]
        print(report.sweep_table(tried), flush=True)
    runs: list[report.Run] = []
    took: dict[str, float] = {}
    for number in range(size.rounds):
        for system in [s for s in systems if s not in missing]:
            started = time.monotonic()
            if runs and started + took.get(system, 0.0) > deadline:
                print(f"no time for more within {args.minutes:g} minutes", flush=True)
                return runs, tried, missing | {s: "no time" for s in systems if s not in took and s not in missing}
            job = replace(work.job, options=_options(system, size, tried))
            try:
                left = deadline - time.monotonic()
                result = run_process(SYSTEMS[system][0], job, folder / f"{system}-{number}", args.threads, left)
            except SystemExit as failure:
                if not runs or not (args.ablations or work.job.device == "cuda"):
                    raise
                missing[system] = str(failure).strip().splitlines()[-1]  # no kernel for it, or out of memory
                print(f"round {number + 1}: {report.NAMES[system]}: {missing[system]}", flush=True)
                continue
            if result["tokens"] not in (None, workload.useful_tokens(work.lengths)):
                raise SystemExit(f"{system} trained on {result['tokens']} tokens: not the pairs that were drawn")
            runs.append(
                result
                | {"system": system, "round": number, "timed_pairs": size.steps * size.pairs, "options": job.options}
                | {"same_order": not job.options.get("grouped", False)}
            )
            took[system] = time.monotonic() - started
            speed = 1 / report.seconds_per_pair(runs[-1])
            print(f"round {number + 1}: {report.NAMES[system]}: {speed:.3g} pairs/s", flush=True)
            if args.json:  # what was measured is not lost with a later process
                args.json.write_text(json.dumps({"sweep": tried, "missing": missing, "runs": runs}, indent=1))
    return runs, tried, missing


def _conditions(args: argparse.Namespace, size: workload.Size, work: workload.Workload, facts: dict[str, Any]) -> str:
    """Two sentences over the tables: the work, and the machine."""
    counts = Counter(run["system"] for run in facts["runs"]).values()  # the last round may have ended early
    rounds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    loads = [facts["load_at_start"], *(run["load"] for run in facts["runs"])]
    cores = [run["cores_used"] for run in facts["runs"]]
    ours = {run["path"]: None for run in facts["runs"] if run["system"] == "ours_online" and "path" in run}
    return (
        f"{time.strftime('%Y-%m-%d')}. {workload.describe(size, work)}; {size.warmup} + {size.steps} steps,"
        f" rounds: {rounds}; {args.dtype}, lr {size.lr:g}.\n"
        f"{''.join(f'Ours: {path}. ' for path in ours)}"
        f"{workload.machine(work.job.device)}, {facts['threads']} threads;"
        f" matrix products of {facts['ceiling']['size']} reach"
        f" {facts['ceiling']['flops_per_second'] / 1e12:.3g} TFLOP/s in {facts['ceiling']['dtype']};"
        f" load average {loads[0]:.2f} at the start,"
        f" {min(loads[1:]):.2f} to {max(loads[1:]):.2f} while measuring;"
        f" the processes got {min(cores):.2f} to {max(cores):.2f} cores;"
        f" {', '.join(f'{name} {version}' for name, version in facts['versions'].items())}."
    )


def _text(
    args: argparse.Namespace, size: workload.Size, work: workload.Workload, facts: dict[str, Any], name: str
) -> str:
    runs = facts["runs"]
    parts = [_conditions(args, size, work, facts)]
    if args.ablations:
        parts += [report.ablations_table(runs, facts["missing"])]
    else:
        parts += [
            report.systems_table(runs, facts["missing"], work.useful_tokens),
            report.ratios_table(report.ratios(runs, name)),
        ]
    if facts["sweep"]:
        parts += [report.sweep_table(facts["sweep"])]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Build the work, measure, check, report; 0 if the losses agree."""
    args = _arguments(argv)
    deadline = time.monotonic() + 60 * args.minutes
    load_at_start = os.getloadavg()[0]
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    name = device if args.size in (None, "quick") else args.size
    block = "-".join([name, *["fp32"] * (args.dtype == "fp32"), *["ablations"] * args.ablations])
    if args.docs:
        report.write_block(args.docs, block)
    args.systems = args.systems or (ABLATIONS[device] if args.ablations else COMPARED[name])
    if args.ablations:
        args.systems = list(dict.fromkeys(["ours_online", *args.systems]))  # what the others are compared with
    sizes = ("warmup", "steps", "rounds", "sweep_steps", "lr")
    given = {key: value for key in sizes if (value := getattr(args, key)) is not None}
    size = replace(workload.SIZES[args.size or device], **given)
    if min(size.warmup, size.steps, size.rounds, size.sweep_steps) < 1:
        raise SystemExit("--warmup, --steps, --rounds and --sweep_steps must be at least 1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        work = workload.build(
            folder, size, data=args.data, split=args.split, tokenizer=args.tokenizer, seed=args.seed,
            dtype=args.dtype, device=device, beta=0.1,
        )
        small = {"size": 256} if args.size == "quick" else {}
        ceiling = run_process("ceiling", replace(work.job, options=small), folder / "ceiling", args.threads)
        runs, tried, missing = measure(args, size, work, folder, deadline)
    for run in runs:
        run["mfu"] = work.model_flops / run["seconds"] / ceiling["flops_per_second"]
    threads = sorted({run["threads"] for run in runs})
    facts = {
        "versions": workload.versions(), "load_at_start": load_at_start, "ceiling": ceiling, "sweep": tried,
        "missing": missing, "runs": runs, "threads": " and ".join(map(str, threads)),
        "lengths": work.lengths.tolist(),
    }
    problems = report.disagreements(runs, args.dtype)
    if len(threads) > 1:
        problems.append(f"the processes ran on different numbers of threads: {threads}")
    text = _text(args, size, work, facts, name)
    print("\n" + text)
    if args.json:
        args.json.write_text(json.dumps(facts | {"problems": problems}, indent=1))
    if problems:
        print("\nNot comparable:", *problems, sep="\n", file=sys.stderr)
        return 1
    if args.docs:
        report.write_block(args.docs, block, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
