"""Where the time of a step goes: the operations of a few steps, by part of the step and by kind.

    python benchmarks/step_profile.py --data ROWS --tokenizer FOLDER [--cached] [--docs docs/benchmarks.md]

The work is that of benchmarks/throughput.py. The profiler itself takes time, so that this says what a step consists of
and not how long it takes. Counted are PyTorch's own operations: kernels of compiled blocks and of flex are not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import ours, report, workload  # noqa: E402  (a script's own folder is on the path, the root is not)

PARTS = ("reference", "blocks", "head", "backward", "update")
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "mkldnn_linear", "_addmm_activation")
KINDS = ("products", "attention", "other")


def kind_of(operation: str) -> str:
    """products, attention or other, by the name that PyTorch gives an operation."""
    name = operation.removeprefix("aten::")
    if name in PRODUCTS:
        return "products"
    return "attention" if "attention" in name or "attn" in name else "other"


def part_of(event: Any) -> str:
    """The outermost marked part around an event; on a GPU the backward pass runs in a thread that has no mark."""
    found = "between"
    while event is not None:
        if event.name in PARTS:
            found = event.name
        elif found == "between" and event.name.startswith("autograd::engine"):
            found = "backward"
        event = event.cpu_parent
    return found


def times(events: Iterable[Any], device: str) -> dict[tuple[str, str], float]:
    """(part, kind) -> microseconds of the operations themselves."""
    spent: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        if event.name.startswith("aten::"):
            own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            spent[part_of(event), kind_of(event.name)] += own
    return spent


def table(spent: dict[tuple[str, str], float]) -> str:
    """Shares of all operations: a row per part, a column per kind."""
    total = sum(spent.values())
    rows = []
    for part in (*PARTS, "between"):
        own = [spent.get((part, kind), 0.0) / total for kind in KINDS]
        rows.append([part, *(f"{share:.1%}" for share in (*own, sum(own)))])
    return report.table(["part of a step", "matrix products", "attention", "other operations", "together"], rows)


def _marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return run


def record(argv: Sequence[str], device: str, warmup: int, steps: int) -> dict[tuple[str, str], float]:
    """Train, and note every operation of some steps.

    Args:
        argv: Of train_dpo.py.
        device: cpu or cuda.
        warmup, steps: Optimizer steps before the profiler starts, at least 1, and under it.
    """
    from dpo import train as training
    from dpo.commandline import parse
    from dpo.model import forward, head
    from dpo.runtime import engine, tracking
    from dpo.training.nonfinite import Nonfinite

    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device == "cuda")]
    profiler, seen = profile(activities=activities), [0]

    class Recorder(tracking.Recorder):
        def record(self, values: dict[str, Any]) -> None:
            super().record(values)
            if "loss" in values and values.get("step", 0) > 0:
                seen[0] += 1
                if seen[0] == warmup:
                    profiler.start()
                elif seen[0] == warmup + steps:
                    profiler.stop()

    start_models = training.start_models

    def started(*args: Any) -> Any:
        policy, reference = start_models(*args)
        reference.of_training = _marked("reference", reference.of_training)
        return policy, reference

    changes: list[tuple[Any, str, Any]] = [
        (training, "Recorder", Recorder), (training, "start_models", started),
        (forward.Scorer, "hidden", _marked("blocks", forward.Scorer.hidden)),
        (head.Head, "forward", _marked("head", head.Head.forward)),
        (engine, "backward", _marked("backward", engine.backward)),
        (Nonfinite, "step", _marked("update", Nonfinite.step)),
    ]  # fmt: skip
    with ExitStack() as watched:
        for change in changes:
            watched.enter_context(patch.object(*change))
        training.train(parse(list(argv)))
    return times(profiler.events() or (), device)


def main(argv: Sequence[str] | None = None) -> int:
    """Build the work, train under the profiler, show the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    workload.add_rows(parser)
    workload.add_work(parser)
    add("--cached", action="store_true", help="with the reference's scores from a cache")
    add("--warmup", type=int, default=3, help="optimizer steps before the profiler starts")
    add("--steps", type=int, default=3, help="optimizer steps under it")
    add("--docs", type=Path, help="write the table between the markers of this file")
    args = parser.parse_args(argv)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    block = "-".join([device, *[args.size] * bool(args.size), *["cached"] * args.cached, "profile"])
    if args.docs:
        report.write_block(args.docs, block)
    if min(args.warmup, args.steps) < 1:
        raise SystemExit("--warmup and --steps must be at least 1")
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    size = replace(workload.SIZES[args.size or device], warmup=args.warmup, steps=args.steps)
    try:
        with tempfile.TemporaryDirectory() as folder:
            work = workload.build(
                Path(folder), size, data=args.data, split=args.split, tokenizer=args.tokenizer, seed=args.seed,
                dtype=args.dtype, device=device, beta=0.1,
            )
            options = {"reference.mode": "cached"} if args.cached else {}
            job = replace(work.job, folder=folder, options=options)
            spent = record(ours.arguments(job), device, args.warmup, args.steps)
    finally:
        torch.set_num_threads(threads)
    reference = "cached" if args.cached else "online"
    text = (
        f"{time.strftime('%Y-%m-%d')}. {workload.describe(size, work)}; {args.dtype}, reference {reference};"
        f" {args.steps} steps.\n\n{table(spent)}"
    )
    print("\n" + text)
    if args.docs:
        report.write_block(args.docs, block, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
