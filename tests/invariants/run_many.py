"""Run several trainings in one process group and write down what happened inside; started by tests/ranks.py.

    tests/invariants/run_many.py JOBS.json OUT_FOLDER

JOBS.json: name -> argv of train_dpo.py. OUT_FOLDER/NAME.RANK.json: see `watch`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import dpo.model.forward
import dpo.preference
import dpo.train
import train_dpo
from benchmarks.collectives import Collectives
from dpo.runtime import distributed, tracking
from dpo.runtime.engine import deepspeed
from tests.invariants.jobs import without_drawings


def watch(seen: dict[str, Any]) -> Any:
    """Wrap what starts the models, so that hooks see every forward pass of policy and reference.

    Fills `seen` with: stage, calls of both backbones, input shapes of the first layers in training, pair ids of every
    micro-batch, the reference's dtypes, and a closure that tells whether its weights moved.
    """
    original = dpo.train.start_models

    def start_models(*args: Any, **kwargs: Any) -> Any:
        policy, reference = original(*args, **kwargs)
        model = policy.scorer.model
        seen["stage"] = policy.engine.zero_optimization_stage()
        seen["parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in policy.scorer.parameters())
        head, embedding = (f().weight for f in (model.get_output_embeddings, model.get_input_embeddings))
        seen["tied"] = getattr(head, "ds_numel", head.numel()) if head is embedding else 0
        scorers = {"policy": policy.scorer} | ({"reference": reference.scorer} if reference.scorer else {})
        seen["weights_are_whole"] = any(p.numel() > 0 for s in scorers.values() for p in s.parameters())
        for name, scorer in scorers.items():
            watch_calls(seen, name, scorer)
        if reference.scorer is not None:
            watch_reference(seen, policy, reference.scorer)
        return policy, reference

    return start_models


def watch_reference(seen: dict[str, Any], policy: Any, scorer: Any) -> None:
    """What the reference is, and whether it stays so."""
    seen["reference_dtypes"] = sorted({str(p.dtype) for p in scorer.parameters()})
    seen["reference_wants_gradient"] = any(p.requires_grad for p in scorer.parameters())
    outer = policy.engine.optimizer  # without ZeRO there is no inner one
    optimized = {id(p) for g in getattr(outer, "optimizer", outer).param_groups for p in g["params"]}
    seen["reference_in_optimizer"] = any(id(p) in optimized for p in scorer.parameters())
    weights = [p.detach().clone() for p in scorer.parameters()]
    seen["reference_moved"] = lambda: not all(
        torch.equal(a, b) for a, b in zip(weights, scorer.parameters(), strict=True)
    )


def watch_calls(seen: dict[str, Any], name: str, scorer: Any) -> None:
    """Every call of a backbone, and what its first layer is fed in training."""
    calls, rows = seen[f"{name}_calls"], seen[f"{name}_rows"]
    backbone = scorer.model.base_model
    layers = backbone.layers if hasattr(backbone, "layers") else backbone.h
    backbone.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    layers[0].register_forward_pre_hook(
        lambda _, inputs: rows.append(list(inputs[0].shape[:2])) if torch.is_grad_enabled() else None
    )


def run(name: str, argv: list[str], out: Path) -> None:
    """One training run under observation."""
    seen: dict[str, Any] = {"sums": 0, "recorders": 0, "pairs": [], "own_losses": [], "engines": 0, "collectives": []}
    seen |= {"in_forward": 0}
    seen |= {f"{who}_{what}": [] for who in ("policy", "reference") for what in ("calls", "rows")}
    originals = dpo.train.start_models, distributed.sum_over_ranks, tracking.Recorder.__init__, dpo.preference.take_step
    initialize, total_loss = deepspeed.initialize, dpo.model.forward.total_loss

    def counted_loss(*args: Any, **kwargs: Any) -> Any:
        seen["in_forward"] += 1
        return total_loss(*args, **kwargs)

    def counted_initialize(*args: Any, **kwargs: Any) -> Any:
        seen["engines"] += 1
        return initialize(*args, **kwargs)

    def counted_sum(tensor: torch.Tensor, group: Any = None) -> torch.Tensor:
        seen["sums"] += group is None
        return originals[1](tensor, group)

    def counted_init(self: Any, *args: Any, **kwargs: Any) -> None:
        seen["recorders"] += 1
        originals[2](self, *args, **kwargs)

    def seen_step(*args: Any) -> None:
        work, meter = args[4], args[6]
        before = len(seen["policy_calls"]), len(seen["reference_calls"])
        with Collectives() as collectives:
            originals[3](*args)
        seen["collectives"].append(collectives.found)
        seen["own_losses"].append(float(meter.totals[0] / meter.totals[7]))  # of this rank's pairs alone
        after = len(seen["policy_calls"]), len(seen["reference_calls"])
        seen["pairs"].append([list(b.pair_ids) for b in work.batches])
        seen.setdefault("calls_a_micro_batch", []).append(
            [(a - b) / len(work.batches) for a, b in zip(after, before, strict=True)]
        )

    dpo.train.start_models, distributed.sum_over_ranks = watch(seen), counted_sum
    tracking.Recorder.__init__, dpo.preference.take_step = counted_init, seen_step  # type: ignore[method-assign]
    deepspeed.initialize, dpo.model.forward.total_loss = counted_initialize, counted_loss
    try:
        seen["code"] = train_dpo.main(argv)
    finally:
        dpo.train.start_models, distributed.sum_over_ranks = originals[:2]
        tracking.Recorder.__init__, dpo.preference.take_step = originals[2:]  # type: ignore[method-assign]
        deepspeed.initialize, dpo.model.forward.total_loss = initialize, total_loss
    seen["reference_moved"] = seen["reference_moved"]() if "reference_moved" in seen else None
    (out / f"{name}.{distributed.launched_ranks()[0]}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    without_drawings()
    for job, arguments in json.loads(Path(sys.argv[1]).read_text()).items():
        run(job, arguments, Path(sys.argv[2]))
