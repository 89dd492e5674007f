"""How evenly a step's pairs are spread over ranks: random assignment, the planner, and the best there can be.

    python -m benchmarks.balance --data train.jsonl.gz --tokenizer gpt2 [--max_length 1024 512] [--write FILE]

Cost of a rank: what its pairs make GPT-2 124M compute, P + C + R tokens, their attention, and the logits of C + R.
Imbalance: the costliest rank over the mean, which is how much longer a step takes than with even ranks. No assignment
of whole pairs goes below the costliest pair over the mean cost of a rank. Lengths only: no model, no GPU. The table
goes to docs/planning.md, between its markers.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.report import write_block
from dpo.config import Source
from dpo.data.planner import Costs, num_tokens, pair_costs, plan_batch
from dpo.data.tokenize import prepare_pairs
from dpo.errors import UserError
from dpo.estimate import costs_beside_tokens, costs_of, imbalance, micro_batch_tokens
from dpo.model.load import load_tokenizer

DOCS = Path(__file__).resolve().parents[1] / "docs" / "planning.md"
RANKS = (8, 64, 256, 1024)
PAIRS_PER_RANK = (4, 8, 16, 32)
TOKEN_BUDGET = 16384
GPT2 = costs_of(body=84_934_656, head=768 * 50257, attention_width=12 * 768)
"""Of GPT-2 124M: matrices of the blocks, hidden size x vocabulary, hidden size summed over layers."""


@dataclass(frozen=True)
class Row:
    """Imbalance of some random steps at one size.

    Attributes:
        ranks, pairs: Of a step.
        random, by_tokens, planned, bound: (draws,) imbalances of random assignment, of the planner if it looked at
            tokens alone, of the planner, and the least there can be.
        seconds: To plan one step, mean.
    """

    ranks: int
    pairs: int
    random: np.ndarray
    by_tokens: np.ndarray
    planned: np.ndarray
    bound: np.ndarray
    seconds: float


def measure(lengths: np.ndarray, ranks: int, pairs: int, draws: int, seed: int = 0) -> Row:
    """Draw steps and assign them both ways.

    Args:
        lengths: (n, 3) int64: prompt, chosen, rejected.
        ranks, pairs: Of a step; pairs divisible by ranks. With more pairs than n they are drawn with replacement.
        draws: Steps.
        seed: Of the draws.
    Returns:
        The figures.
    """
    rng = np.random.default_rng((seed, ranks, pairs))
    random, by_tokens, planned, bound, seconds = [], [], [], [], 0.0
    for _ in range(draws):
        drawn = lengths[rng.choice(len(lengths), pairs, replace=pairs > len(lengths))]
        cost = pair_costs(drawn, "shared", GPT2)
        random.append(imbalance(cost.reshape(ranks, -1)))
        by_tokens.append(_imbalance(drawn, ranks, Costs()))
        started = time.perf_counter()
        planned.append(_imbalance(drawn, ranks, GPT2))
        seconds += time.perf_counter() - started
        bound.append(max(1.0, cost.max() * ranks / cost.sum()))
    arrays = (np.array(values) for values in (random, by_tokens, planned, bound))
    return Row(ranks, pairs, *arrays, seconds / draws)


def _imbalance(lengths: np.ndarray, ranks: int, costs: Costs) -> float:
    """In what pairs really cost, if the planner goes by `costs`."""
    pairs = range(len(lengths))
    plan = plan_batch(pairs, lengths, world_size=ranks, token_budget=TOKEN_BUDGET, layout="shared", costs=costs)
    return imbalance(
        micro_batch_tokens(plan, lengths, "shared") + costs_beside_tokens(plan, lengths, "shared", GPT2)
    )


def table(lengths: np.ndarray, draws: int) -> list[str]:
    """Lines of a Markdown table over RANKS and PAIRS_PER_RANK."""
    lines = [
        "| ranks | pairs a step | random | by tokens alone | planner, mean | planner, worst | least possible, mean |"
        " planning, ms |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for ranks in RANKS:
        for each in PAIRS_PER_RANK:
            row = measure(lengths, ranks, each * ranks, draws)
            again = "*" if row.pairs > len(lengths) else ""
            lines.append(
                f"| {ranks:,} | {row.pairs:,}{again} | {row.random.mean():.2f} | {row.by_tokens.mean():.3f} |"
                f" {row.planned.mean():.3f} | {row.planned.max():.3f} | {row.bound.mean():.3f} |"
                f" {1000 * row.seconds:.1f} |"
            )
    return lines


def report(data: str, tokenizer: str, max_lengths: list[int], draws: int, cache_dir: str | None) -> list[str]:
    """Tokenise, measure, and write down what was measured: lines of Markdown."""
    lines = []
    for max_length in max_lengths:
        pairs, _ = prepare_pairs(
            Source(path=data, split="train"), load_tokenizer(tokenizer), max_length=max_length,
            max_prompt_length=max_length // 2, on_bad_row="skip", cache_dir=cache_dir,
        )  # fmt: skip
        cost = num_tokens(pairs.lengths, "shared")
        lines += [
            f"`data.max_length` {max_length}: {len(pairs):,} pairs, {cost.mean():.0f} tokens a pair on average, the"
            f" longest {cost.max():,}; {draws} random steps a row.",
            "",
            *table(np.asarray(pairs.lengths), draws),
            "",
        ]
    return [*lines, "\\* more pairs than the file has: drawn with replacement.", ""]


def main(argv: list[str]) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.balance", description="Rank imbalance on real lengths.")
    parser.add_argument("--data", required=True, help="preference pairs: file, folder or hub id, as data.train")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id")
    parser.add_argument("--max_length", type=int, nargs="+", default=[1024, 512], help="as data.max_length")
    parser.add_argument("--draws", type=int, default=20, help="random steps a row")
    parser.add_argument("--cache_dir", help="for tokenised pairs, as data.cache_dir")
    parser.add_argument("--write", default=str(DOCS), help="file with the markers; empty: print only")
    args = parser.parse_args(argv)
    try:
        lines = report(args.data, args.tokenizer, args.max_length, args.draws, args.cache_dir)
        print("\n".join(lines))
        if args.write:
            write_block(Path(args.write), "balance", "\n".join(lines).rstrip())
    except UserError as error:
        print(f"benchmarks/balance.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
