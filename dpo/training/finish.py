"""What a run leaves on its way and at its end: samples, pairs, report, plot, closing table."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo.config import to_dict
from dpo.data import example
from dpo.model.blocks import uncompiled
from dpo.model.forward import whole_rows
from dpo.report.card import closing_rows, model_card
from dpo.report.content import is_logistic
from dpo.report.figures import plot
from dpo.report.page import write_or_say
from dpo.report.pairs import PairTable, read_pairs, write_pairs
from dpo.report.panels import calibration, displacement, findings
from dpo.run.setup import Setup
from dpo.runtime import heartbeat, preemption
from dpo.runtime.distributed import only_main
from dpo.runtime.files import read_records, write_whole
from dpo.runtime.run_directory import versions
from dpo.runtime.status import write_status
from dpo.runtime.tracking import Tracker, read_lines
from dpo.sampling.answers import Decoding, answer_logps, answers_to, side_by_side, world_rewards, write_samples
from dpo.training.frozen import FrozenReference
from dpo.training.policy import Policy
from dpo.types import PackedBatch


def take_samples(setup: Setup, policy: Policy, reference: FrozenReference, step: int, tracker: Tracker) -> None:
    """Answer the sample prompts by both models, and record how far the policy has gone; collective.

    Args:
        setup: The run.
        policy: The policy as it stands.
        reference: The frozen reference.
        step: Optimizer steps done.
        tracker: For `samples/kl` and the lengths of the answers.
    Raises:
        Preempted: On every rank, if any was asked to stop; nothing has been recorded.
    """
    heartbeat.at(f"in the samples after step {step}")
    device, decoding = setup.world.device, Decoding(setup.config.log.sample_tokens)
    preemption.check(device)
    before = reference.answer(setup)
    preemption.check(device)
    found = answers_to(setup.sample_prompts(), policy.scorer, setup.tokenizer, decoding, device)
    after = only_main(setup.world, lambda: found)  # of two equal logits another GPU may take the other
    kl = None
    if reference.scorer is not None:  # else its scores are cached, and it cannot be asked about new answers
        with whole_rows(policy.scorer, reference.scorer), uncompiled(policy.scorer):
            own = answer_logps(policy.score, after, before, policy.layout, device)
            base = answer_logps(lambda batch: _scores(reference, batch), after, before, policy.layout, device)
        kl = float((own - base)[:, 0].mean())
    lengths = {
        f"samples/{name}_tokens": float(np.mean([len(answer.ids) for answer in answers]))
        for name, answers in (("policy", after), ("reference", before))
    }
    decode = setup.tokenizer.decode
    rows = [
        {
            "prompt": decode(pair.prompt_ids.tolist()),
            "reference": old.text,
            "policy": new.text,
            "chosen": decode(pair.chosen_ids.tolist(), skip_special_tokens=True),
        }
        for pair, old, new in zip(setup.sample_pairs(), before, after, strict=True)
    ]
    only_main(setup.world, lambda: write_samples(setup.run, step, rows))
    # Last: a start that finds this line asks for no answers again.
    tracker.record({"step": step, "epoch": step / setup.epochs.steps_per_epoch, "samples/kl": kl} | lengths)


def _scores(reference: FrozenReference, batch: PackedBatch) -> Tensor:
    """(S,) log-probs of a batch under the reference."""
    logps = reference.of_training(batch)
    return torch.cat((logps.chosen, logps.rejected))


def keep_evaluation(setup: Setup, step: int, pairs: np.ndarray) -> None:
    """Write down what an evaluation said of every pair, on rank 0.

    Args:
        setup: The run.
        step: Optimizer steps done.
        pairs: As `evaluate` gives them.
    """
    data = setup.validation_pairs
    if not setup.world.is_main or data is None:
        return

    def text(pair_id: int) -> dict[str, Any]:
        row = setup.texts(data, pair_id)
        return {"origin": data.origin(pair_id), "prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}

    write_pairs(setup.run, PairTable(step, pairs), text)


def card_of(setup: Setup) -> str | None:
    """README.md of final/, on rank 0."""
    if not setup.world.is_main:
        return None
    lines, world = read_lines(setup.run), setup.world
    validation = "none" if setup.validation_pairs is None else f"{len(setup.validation_pairs):,} pairs"
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    facts = {
        "training data": f"{len(setup.train_pairs):,} pairs",
        "validation data": validation,
        "optimizer steps": f"{setup.total_steps:,} of {setup.config.train.global_batch_size:,} pairs",
        "tokens": f"{next((line['num_tokens'] for line in reversed(lines) if 'loss' in line), 0):,}",
        "hardware": f"{world.world_size} x {device}, ZeRO-{setup.zero_stage}, {setup.precision}",
    }
    if (pairs := read_pairs(setup.run)) is not None and len(pairs[1].values):
        found = displacement(*pairs)
        facts["chosen log-prob fell"] = f"in {found.chosen_fell:.1%} of the validation pairs"
        if is_logistic(setup.config.loss.name):
            facts["calibration error"] = f"{calibration(pairs[1].margins).error:.3f}"
    made_with = versions("peft") if setup.trains_adapters else versions()
    return model_card(to_dict(setup.config), lines, made_with, facts, adapter=setup.trains_adapters)


def closing(setup: Setup, tracker: Tracker, seconds: float) -> None:
    """Draw the curves, print what was reached and where things are, and mark the run as finished; on rank 0.

    Args:
        setup: The run.
        tracker: Where it is shown.
        seconds: Since this process began the run or took it up again.
    """
    run = setup.run
    lines = read_lines(run)
    plot(lines, run / "training_metrics.png")
    samples = _last_samples(run)
    for row in sorted(samples, key=lambda row: row["reference"] == row["policy"])[:2]:
        tracker.say(side_by_side(row["prompt"], row["reference"], row["policy"]))
    rows = closing_rows(lines)
    source = setup.config.data.validation or setup.config.data.train
    if source == "builtin:world" and len(samples) > 1 and all(example.knows(row["prompt"]) for row in samples):
        found = world_rewards(samples)
        rows.append(["reward of greedy answers", f"{found['reference']:.4f}", f"{found['policy']:.4f}"])
        shares = f"{found['parsed']:.0%} parse" + ("" if math.isnan(found["p"]) else f", p = {found['p']:.1e}")
        tracker.say(f"greedy answers to {len(samples)} held-out prompts: {shares}")
    rows.append(["time of this start", "", f"{seconds / 60:.1f} min"])
    tracker.table("DPO: before and after", rows)
    for note in findings(lines):
        tracker.say(note)
    answers = f", answers {run}/samples.jsonl" if samples else ""
    total = setup.total_steps
    write_whole(run / "finished.json", json.dumps({"step": total, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}))
    write_status(run, "finished", total)
    write_or_say(run, tracker.say)
    tracker.say(f"weights {run}/final, report {run}/report.html, curves {run}/training_metrics.png{answers}")


def _last_samples(run: Path) -> list[dict[str, str]]:
    path = run / "samples.jsonl"
    rows = read_records(path)[0]
    return [row for row in rows if row["step"] == rows[-1]["step"]]
