"""The end of a run: samples, plot, closing table."""

from __future__ import annotations

import json
import time
from pathlib import Path

from dpo.data import example
from dpo.policy import FrozenReference, Policy
from dpo.report import closing_rows, plot
from dpo.runtime.checkpoint import write_whole
from dpo.runtime.distributed import only_main
from dpo.runtime.tracking import Tracker, read_lines
from dpo.sample import greedy_answers, world_rewards, write_samples
from dpo.setup import Setup


def take_samples(setup: Setup, policy: Policy, reference: FrozenReference, step: int) -> None:
    """Answer the sample prompts by both models; collective.

    Args:
        setup: The run.
        policy: The policy as it stands.
        reference: The frozen reference.
        step: Optimizer steps done.
    """
    tokens, device = setup.config.log.sample_tokens, setup.world.device
    before = reference.answer(setup)
    after = greedy_answers(policy.scorer, setup.tokenizer, setup.sample_prompts(), tokens, device)
    decode = setup.tokenizer.decode
    rows = [
        {
            "prompt": decode(pair.prompt_ids.tolist()),
            "reference": old,
            "policy": new,
            "chosen": decode(pair.chosen_ids.tolist(), skip_special_tokens=True),
        }
        for pair, old, new in zip(setup.sample_pairs(), before, after, strict=True)
    ]
    only_main(setup.world, lambda: write_samples(setup.run, step, rows))


def closing(setup: Setup, tracker: Tracker, seconds: float) -> None:
    """Draw the curves, print what was reached and where things are, and mark the run as finished; collective.

    Args:
        setup: The run.
        tracker: Where it is shown.
        seconds: Since this process began the run or took it up again.
    """
    only_main(setup.world, lambda: _closing(setup, tracker, seconds))


def _closing(setup: Setup, tracker: Tracker, seconds: float) -> None:
    run = setup.run
    lines = read_lines(run)
    plot(lines, run / "training_metrics.png")
    samples = _last_samples(run)
    differing = [row for row in samples if row["reference"] != row["policy"]]
    for row in (differing + samples)[:2]:
        tracker.say(f"\nprompt:    {row['prompt'].strip()}\nreference: {row['reference']}\npolicy:    {row['policy']}")
    rows = closing_rows(lines)
    source = setup.config.data.validation or setup.config.data.train
    if source == "builtin:world" and len(samples) > 1 and all(example.knows(row["prompt"]) for row in samples):
        found = world_rewards(samples)
        rows.append(["reward of greedy answers", f"{found['reference']:.4f}", f"{found['policy']:.4f}"])
        shares = f"{found['parsed']:.0%} parse, p = {found['p']:.1e}"
        tracker.say(f"greedy answers to {len(samples)} held-out prompts: {shares}")
    rows.append(["time", "", f"{seconds / 60:.1f} min"])
    tracker.table("DPO: before and after", rows)
    answers = f", answers {run}/samples.jsonl" if samples else ""
    tracker.say(f"weights {run}/final, curves {run}/training_metrics.png{answers}")
    total = setup.total_steps
    write_whole(run / "finished.json", json.dumps({"step": total, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}))


def _last_samples(run: Path) -> list[dict[str, str]]:
    path = run / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return [row for row in rows if row["step"] == rows[-1]["step"]]
