"""Run directories as a run would leave them, of any length and with any text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dpo.config import Config, DataConfig, ModelConfig, TrainConfig, to_dict
from dpo.report.pairs import COLUMNS, PairTable, write_pairs

HOSTILE = (
    "<script>window.broken = 1</script><img src=x onerror='window.broken = 1'><svg onload='window.broken = 1'>"
    "</textarea></details></pre><a href='javascript:window.broken = 1'>x</a> {{ 7 * 7 }} \u2028 `x` | ``` **b** $x_1$"
)


def table(step: int, chosen: Any, rejected: Any, lengths: Any = None, start: float = -20.0) -> PairTable:
    """An evaluation whose log-ratios are given; beta is 1."""
    chosen, rejected = np.asarray(chosen, dtype=float), np.asarray(rejected, dtype=float)
    count = len(chosen)
    values = np.zeros((count, len(COLUMNS)))
    of = {name: index for index, name in enumerate(COLUMNS)}
    values[:, of["pair_id"]] = np.arange(count)
    values[:, of["loss"]] = np.log1p(np.exp(-(chosen - rejected)))
    for side, ratios in (("chosen", chosen), ("rejected", rejected)):
        values[:, of[f"{side}_reward"]] = ratios
        values[:, of[f"policy_{side}_logps"]] = start + ratios
        values[:, of[f"reference_{side}_logps"]] = start
    both = np.full((count, 2), 10) if lengths is None else np.asarray(lengths)
    values[:, of["chosen_length"]], values[:, of["rejected_length"]] = both[:, 0], both[:, 1]
    return PairTable(step, values)


def training_line(step: int, steps: int, noise: float = 0.0) -> dict[str, Any]:
    margin = 3 * step / steps + noise
    return {
        "step": step, "epoch": step / steps, "loss": float(np.log1p(np.exp(-margin))), "rewards/chosen": -margin / 2,
        "rewards/rejected": -1.5 * margin, "rewards/margins": margin, "rewards/accuracies": min(1.0, 0.5 + margin / 8),
        "logps/chosen": -20 - margin, "logps/rejected": -22 - 2 * margin, "grad_norm": 1 + abs(noise),
        "learning_rate": 1e-6, "num_tokens": 100 * step, "perf/pairs_per_second": 50 + noise,
        "perf/tokens_per_second": 5000.0, "perf/padding_fraction": 0.0, "perf/peak_memory_gib": 2.0,
    }  # fmt: skip


def make_run(
    run: Path, steps: int = 2000, pairs: int = 2000, samples: int = 64, text: str = "fine", *, finished: bool = True
) -> Path:
    """Write a run directory: a line a step, an evaluation every tenth of the run, samples at the end."""
    run.mkdir(parents=True)
    config = Config(
        model=ModelConfig(policy=text if "<" in text else "gpt2"), data=DataConfig(train=text[:200]),
        train=TrainConfig(output_dir=str(run)),
    )  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    rng = np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step:
            lines.append(training_line(step, steps, float(rng.normal(0, 0.2))))
        if step % max(1, steps // 10) == 0:
            line = training_line(step, steps)
            lines.append({"step": step} | {f"eval_{k}": v for k, v in line.items() if "/" in k or k == "loss"})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row: dict[str, Any] = {"prompt": f"{text} prompt", "chosen": f"{text} {'x' * 400}", "rejected": f"{text} bad"}
    write_pairs(run, table(0, np.zeros(pairs), np.zeros(pairs)), lambda _: row | {"origin": "row 1"})
    lengths = rng.integers(5, 200, (pairs, 2))
    chosen, rejected = rng.normal(-1, 1, pairs), rng.normal(-2, 1, pairs)
    write_pairs(run, table(steps, chosen, rejected, lengths), lambda i: row | {"origin": f"row {i + 1}"})
    answers = [
        {"step": steps, "prompt": f"{i} {text}", "reference": f"{text} old answer", "policy": f"{text} new {'y' * 400}"}
        for i in range(samples)
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers), "utf-8")
    if finished:
        (run / "final").mkdir()
        (run / "finished.json").write_text(json.dumps({"step": steps}))
    return run
