"""The study that this suite grew out of, timed: GPT-2 on HH-RLHF, five epochs of DPO, validated after each.

    python benchmarks/seed_study.py --data HH_TRAIN --validation HH_TEST --tokenizer gpt2 [--docs docs/benchmarks.md]

recipes/gpt2_hh.yaml with a cached reference and random weights, on which the time does not depend. Rows are repeated
where there are too few. The time that has a target runs from the first pair that the reference scores to the end of
the last validation; start-up, tokenisation and SFT stand beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

BEGAN = time.perf_counter()

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks import report, workload  # noqa: E402  (a script's own folder is on the path, the root is not)
from dpo.config import Source  # noqa: E402
from dpo.data.sources import load_source  # noqa: E402
from dpo.model.load import load_tokenizer  # noqa: E402

TARGET = 60.0
"""Seconds on one H200; 30 to 40 minutes on a P100 in the study itself."""


class Stages:
    """Seconds of each stage, and when the measured stretch began and ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.begin: float | None = None
        self.validations: list[float] = []
        self.saved_before = 0.0

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to a stage."""

        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            if name == "reference scores" and self.begin is None:
                self.begin = started
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

        return run


def write_rows(path: Path, data: str, split: str, count: int) -> int:
    """Write a number of rows as JSON Lines, from the start again where there are fewer; how many there are."""
    rows = load_source(Source(path=data, split=split))
    with open(path, "w", encoding="utf-8") as stream:
        for i in range(count):
            stream.write(json.dumps(rows[i % len(rows)], ensure_ascii=False, default=str) + "\n")
    return len(rows)


def run(argv: Sequence[str]) -> Stages:
    """Train, and note when the stages began and ended.

    Args:
        argv: Of train_dpo.py.
    """
    from dpo import preference
    from dpo import train as training
    from dpo.commandline import parse
    from dpo.runtime import tracking
    from dpo.training import frozen

    stages = Stages()

    class Recorder(tracking.Recorder):
        def record(self, values: dict[str, Any]) -> None:
            super().record(values)
            if "eval_loss" in values and values["step"] > 0:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                stages.validations.append(time.perf_counter())
                stages.saved_before = stages.seconds.get("checkpoints", 0.0)

    changes: list[tuple[Any, str, Any]] = [
        (training, "Recorder", Recorder),
        (training, "prepare", stages.timed("data read and tokenised", training.prepare)),
        (training, "run_sft", stages.timed("SFT", training.run_sft)),
        (frozen, "cached_scores", stages.timed("reference scores", frozen.cached_scores)),
        (preference, "evaluate", stages.timed("validation", preference.evaluate)),
        (preference.Stage, "save", stages.timed("checkpoints", preference.Stage.save)),
    ]
    stages.seconds["start-up"] = time.perf_counter() - BEGAN
    with ExitStack() as watched:
        for change in changes:
            watched.enter_context(patch.object(*change))
        training.train(parse(list(argv)))
    return stages


def table(stages: Stages) -> str:
    """A row per stage; the measured stretch and its target last."""
    assert stages.begin is not None
    stretch = stages.validations[-1] - stages.begin
    within = ("reference scores", "validation", "checkpoints")
    spent = stages.seconds | {"checkpoints": stages.saved_before}  # the last one comes after the last validation
    spent["DPO steps, and all else"] = stretch - sum(spent[name] for name in within)
    rows = [
        [name, f"{seconds:.1f}", "within" if name in within or name.startswith("DPO") else "before"]
        for name, seconds in spent.items()
    ]
    verdict = f"target: under {TARGET:g}, {'met' if stretch < TARGET else f'missed by {stretch / TARGET - 1:.0%}'}"
    last = f"first score to the end of validation {len(stages.validations)}"
    return report.table(["stage", "seconds", "the measured stretch"], [*rows, [last, f"{stretch:.1f}", verdict]])


def main(argv: Sequence[str] | None = None) -> int:
    """Write rows and weights, train, show the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    workload.add_rows(parser)
    add("--validation", required=True, help="validation rows")
    add("--validation_split", default="test", help="split of them, where there are splits")
    add("--pairs", type=int, default=7000)
    add("--validation_pairs", type=int, default=3000)
    add("--epochs", type=int, default=5)
    add("--quick", action="store_true", help="a tiny model: whether it works, not how fast it is")
    add("--docs", type=Path, help="write the table between the markers of this file")
    args = parser.parse_args(argv)
    if args.docs:
        report.write_block(args.docs, "seed_study")
    size = workload.SIZES["quick" if args.quick else "cuda"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = load_tokenizer(args.tokenizer)
        _, parameters = workload.write_model(folder / "policy", tokenizer, size, 0)
        found = write_rows(folder / "train.jsonl", args.data, args.split, args.pairs)
        validation = write_rows(folder / "valid.jsonl", args.validation, args.validation_split, args.validation_pairs)
        settings: dict[str, Any] = {
            "model.policy": folder / "policy", "data.train": folder / "train.jsonl",
            "data.validation": folder / "valid.jsonl", "data.cache_dir": folder / "cache",
            "data.max_length": size.max_length, "data.max_prompt_length": size.max_length // 2,
            "reference.mode": "cached", "train.epochs": args.epochs, "train.output_dir": folder / "run",
            "log.samples": 0,
        }  # fmt: skip
        flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        files = ["--config", str(ROOT / "ds_configs/zero2.json"), "--recipe", str(ROOT / "recipes/gpt2_hh.yaml")]
        stages = run([*files, *flags])
    machine = workload.machine("cuda" if torch.cuda.is_available() else "cpu")
    text = (
        f"{time.strftime('%Y-%m-%d')}. GPT-2 of {parameters / 1e6:.1f}M parameters, {args.pairs:,} training rows"
        f" ({found:,} different ones), {args.validation_pairs:,} for validation ({validation:,}), {args.epochs} epochs."
        f" {machine}.\n\n{table(stages)}"
    )
    print("\n" + text)
    if args.docs:
        report.write_block(args.docs, "seed_study", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
