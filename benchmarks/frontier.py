"""Reward against KL, at small scale: the experiment of the DPO paper's Figure 2 (left), with a reward that is known.

    python -m benchmarks.frontier

As there (Rafailov et al. 2023, section 6.1): a model is fine-tuned on the task (here `builtin:world`), pairs of its own
answers are labelled by the true reward, and each method trains on those pairs for several strengths. Every point is the
mean reward of answers drawn at temperature 1 to held-out prompts, over the KL divergence of the policy from the
reference, estimated on the same answers as the mean of log pi(y|x) - log pi_ref(y|x), in nats an answer.

Two lines need no training. Best of N: the best of N answers of the reference by the true reward; its KL is at most
log N - (N - 1) / N. Optimum: the policy pi_ref exp(r / beta) / Z itself, which solves the problem that DPO starts from
(the paper's equation 4), by weighting the reference's answers. No method can lie above it by more than noise.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train_dpo
from benchmarks.frontier_report import Point, figure, tables
from benchmarks.report import write_block
from dpo.data import example
from dpo.data.boundary import encode_prompt
from dpo.model.forward import Scorer
from dpo.model.load import load_model, load_tokenizer
from dpo.sampling.answers import Answer, Decoding, answer_logps, answers_to

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
METHODS: dict[str, tuple[dict[str, str], str, tuple[float, ...]]] = {
    "DPO": ({"name": "sigmoid"}, "beta", (0.1, 0.3, 1.0, 3.0, 10.0)),
    "IPO": ({"name": "ipo"}, "beta", (0.1, 0.3, 1.0, 3.0)),
    "hinge": ({"name": "hinge"}, "beta", (0.1, 0.3, 1.0, 3.0)),
    "SimPO": ({"name": "simpo"}, "beta", (1.0, 2.5, 10.0)),
    "CPO": ({"name": "cpo"}, "beta", (0.1, 0.3, 1.0)),
    "ORPO": ({"name": "orpo"}, "beta", (0.1, 1.0, 3.0)),
    "Preferred-FT": ({"name": "sft"}, "beta", (0.1,)),
}
"""Name: settings of the loss, what its strength is called here, the strengths. Preferred-FT has none."""


@dataclass(frozen=True)
class Scale:
    """How much work is done."""

    sft_epochs: int = 6
    prompts: int = 4096
    answers: int = 4
    steps: tuple[int, ...] = (16, 48, 144)
    batch: int = 32
    lr: float = 1e-4
    validation: int = 320
    draws: int = 64


def _train(*argv: object) -> None:
    """Run train_dpo.py in this process.

    Raises:
        RuntimeError: If it does not end well.
    """
    given = [str(a) for a in argv]
    code = train_dpo.main(["--config", str(ROOT / "ds_configs/zero2.json"), "--train.precision", "fp32", *given])
    if code != 0:
        raise RuntimeError(f"train_dpo.py {' '.join(given)} ended with {code}")


def fine_tune(work: Path, scale: Scale, seed: int) -> Path:
    """The reference: the built-in model after SFT on the chosen answers of the built-in data."""
    run = work / "sft"
    _train(
        "--recipe", ROOT / "recipes/quickstart.yaml", "--train.sft_epochs", scale.sft_epochs, "--train.max_steps", 1,
        "--log.samples", 0, "--train.seed", seed, "--train.output_dir", run, "--train.eval_every", 1000,
        "--data.cache_dir", work / "cache",
    )  # fmt: skip
    return run / "reference"


def _scorer(folder: Path) -> Scorer:
    scorer = Scorer(load_model(str(folder), dtype=torch.float32, seed=0))
    scorer.own_head = True
    return scorer


def _prompts(split: str, count: int, seed: int) -> list[str]:
    rows = example.rows(split, seed, count)
    return [row["chosen"][: row["chosen"].rindex("\n\nAssistant:") + len("\n\nAssistant:")] for row in rows]


def _draw(scorer: Scorer, tokenizer: Any, prompts: Sequence[str], seed: int) -> list[Answer]:
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    return answers_to(ids, scorer, tokenizer, Decoding(64, temperature=1.0, seed=seed, batch_size=256), CPU)


def rewards(prompts: Sequence[str], answers: Sequence[Answer]) -> np.ndarray:
    """(n,) ground-truth rewards."""
    return np.array([example.reward(p, a.text) for p, a in zip(prompts, answers, strict=True)])


def draw_pairs(reference: Path, work: Path, scale: Scale, seed: int) -> Path:
    """Pairs of the reference's own answers; the one of higher reward is chosen, equal ones make no pair."""
    scorer, tokenizer = _scorer(reference), load_tokenizer(str(reference))
    prompts = _prompts("train", scale.prompts, seed)
    drawn = [_draw(scorer, tokenizer, prompts, seed + i) for i in range(scale.answers)]
    scored = [rewards(prompts, answers) for answers in drawn]
    lines = []
    for first in range(0, scale.answers - 1, 2):
        for row, prompt in enumerate(prompts):
            texts = [drawn[first + k][row].text for k in (0, 1)]
            gain = scored[first + 1][row] - scored[first][row]
            if gain and all(text.strip() and "\n\n" not in text for text in texts):
                chosen, rejected = texts[:: -1 if gain > 0 else 1]
                lines.append(json.dumps({"chosen": prompt + chosen, "rejected": prompt + rejected}))
    path = work / "pairs.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _mean(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def judge(folder: Path, reference: Scorer, prompts: Sequence[str], method: str, strength: float, step: int) -> Point:
    """Draw from a policy, and score what it says."""
    policy, tokenizer = _scorer(folder), load_tokenizer(str(folder))
    answers = _draw(policy, tokenizer, prompts, seed=1000)
    logratios = [answer_logps(model, answers, answers, "padded", CPU)[:, 0] for model in (policy, reference)]
    parsed = np.mean([example.parses(answer.text) for answer in answers])
    return Point(
        method, strength, step, *_mean(rewards(prompts, answers)), *_mean(logratios[0] - logratios[1]), float(parsed)
    )


def trajectory(
    method: str, strength: float, pairs: Path, reference: Path, prompts: Sequence[str], work: Path, scale: Scale
) -> list[Point]:
    """Train one method, and judge it on the way: a run whose max_steps is raised goes on where it stood."""
    settings, name, _ = METHODS[method]
    run, judged = work / "runs" / f"{method}-{strength}", _scorer(reference)
    points = []
    for step in scale.steps:
        _train(
            "--model.policy", reference, "--data.train", pairs, "--data.on_bad_row", "skip", "--data.cache_dir",
            work / "cache", "--train.output_dir", run, "--train.global_batch_size", scale.batch, "--optim.lr", scale.lr,
            "--optim.schedule", "constant", "--optim.warmup_steps", 8, "--train.max_steps", step, "--train.epochs", 100,
            "--log.samples", 0, f"--loss.{name}", strength,
            *[item for key, value in settings.items() for item in (f"--loss.{key}", value)],
        )  # fmt: skip
        points.append(judge(run / "final", judged, prompts, method, strength, step))
        print(points[-1], flush=True)
    return points


def without_training(reference: Path, prompts: Sequence[str], scale: Scale) -> dict[str, list[tuple[float, float]]]:
    """(KL, reward) of best of N and of the optimum, from `draws` answers of the reference to each prompt."""
    scorer, tokenizer = _scorer(reference), load_tokenizer(str(reference))
    drawn = [rewards(prompts, _draw(scorer, tokenizer, prompts, seed=2000 + i)) for i in range(scale.draws)]
    table = np.stack(drawn, axis=1)  # (prompts, draws)
    counts = [2**i for i in range(int(math.log2(scale.draws)) + 1)]
    best = [
        (math.log(n) - (n - 1) / n, float(table[:, : scale.draws // n * n].reshape(len(table), -1, n).max(2).mean()))
        for n in counts
    ]
    return {"Best of N": best, "Optimum": [optimum(table, beta) for beta in np.geomspace(0.2, 50, 25)]}


def optimum(table: np.ndarray, beta: float) -> tuple[float, float]:
    """(KL, reward) of pi_ref exp(r / beta) / Z.

    Args:
        table: (prompts, draws) rewards of answers drawn from the reference.
        beta: Strength of the KL term.
    """
    scaled = table / beta
    highest = scaled.max(axis=1, keepdims=True)
    weights = np.exp(scaled - highest)
    log_z = np.log(weights.mean(axis=1)) + highest[:, 0]
    weights /= weights.sum(axis=1, keepdims=True)
    kl = (weights * scaled).sum(axis=1) - log_z
    return float(kl.mean()), float((weights * table).sum(axis=1).mean())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Reward against KL for several losses and strengths.")
    parser.add_argument("--work", type=Path, default=Path("runs/frontier"), help="folder of runs, pairs and points")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of frontier.md and frontier.png")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # products this small only lose by more
    scale = Scale(1, 32, 2, (1, 2), 4, validation=8, draws=4) if options.quick else Scale()
    options.work.mkdir(parents=True, exist_ok=True)
    reference = fine_tune(options.work, scale, options.seed)
    pairs = draw_pairs(reference, options.work, scale, options.seed)
    prompts = _prompts("validation", scale.validation, options.seed)
    start = judge(reference, _scorer(reference), prompts, "SFT", 0.0, 0)
    points = [start]
    for method in options.methods:
        for strength in METHODS[method][2][: 1 if options.quick else None]:
            points += trajectory(method, strength, pairs, reference, prompts, options.work, scale)
    lines = without_training(reference, prompts, scale)
    count = len(pairs.read_text(encoding="utf-8").splitlines())
    (options.work / "points.json").write_text(json.dumps({"points": [asdict(p) for p in points], "lines": lines}))
    figure(points, lines, options.docs / "frontier.png")
    write_block(options.docs / "frontier.md", "frontier", tables(points, lines, count))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
