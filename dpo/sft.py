"""Supervised fine-tuning on chosen completions before DPO; its result is frozen as the reference.

The loss of a step is the mean negative log-prob of the chosen completion tokens of its global batch, in nats per token.
The stage writes `reference/` in the run directory. A run killed before that folder is whole starts the stage again; one
killed after never repeats it, and never takes later weights for the reference.
"""

from __future__ import annotations

import time

import torch

from dpo.data.planner import Layout, num_tokens
from dpo.export import write_weights
from dpo.policy import Policy, start_policy
from dpo.runtime import engine as deepspeed_engine
from dpo.runtime.distributed import sum_over_ranks
from dpo.runtime.schedule import learning_rate
from dpo.runtime.tracking import Tracker
from dpo.setup import Setup


def run_sft(setup: Setup, tracker: Tracker) -> None:
    """Train on chosen completions and write the result as `reference/`; collective.

    Args:
        setup: The run; train.sft_epochs >= 1.
        tracker: For progress and metrics, under sft_ names.
    """
    config = setup.config
    assert config.model.policy is not None
    policy = start_policy(setup, config.model.policy, for_sft=True)
    for note in policy.notes:
        tracker.say(note)
    _train(setup, policy, tracker)
    # In the dtype it was trained in: the policy and the reference of DPO are read back from here.
    write_weights(setup, policy, setup.run / "reference", setup.dtype, card=None)
    deepspeed_engine.stop(policy.engine)


def _train(setup: Setup, policy: Policy, tracker: Tracker) -> None:
    config, world = setup.config, setup.world
    # One causal call per row serves a model that cannot attend in segments; else chosen sequences are packed.
    layout: Layout = "padded_chosen" if policy.layout == "padded" else "chosen"
    loader = setup.loader(setup.train_pairs, layout)
    total = config.train.sft_epochs * setup.epochs.steps_per_epoch
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    tokens_seen, since = 0, time.perf_counter()
    for work in loader.steps(0, total):
        lr = learning_rate(
            work.step, total=total, peak=config.optim.peak_sft_lr, schedule=config.optim.schedule,
            warmup_steps=config.optim.warmup_steps,
        )
        for index, batch in enumerate(work.batches):
            nll = -policy.score(batch.to(world.device)).sum()
            scale = world.world_size / work.num_target_tokens
            loss = nll * scale + policy.router_loss(len(batch.target_ids) * scale)
            deepspeed_engine.backward(policy.engine, loss, index == len(work.batches) - 1)
            sums[0] += nll.detach()
        sums[1] += work.num_target_tokens / world.world_size
        grad_norm = deepspeed_engine.step(policy.engine, lr)
        done = work.step + 1
        tokens_seen += int(num_tokens(setup.train_pairs.lengths[setup.epochs.batch(work.step)], "chosen").sum())
        if done % config.log.every == 0 or done == total:
            nll_sum, target_tokens = sum_over_ranks(sums).tolist()
            now = time.perf_counter()
            tracker.record(
                {
                    "sft_step": done,
                    "sft_epoch": done / setup.epochs.steps_per_epoch,
                    "sft_loss": nll_sum / target_tokens,
                    "grad_norm": grad_norm,
                    "learning_rate": lr,
                    "num_tokens": tokens_seen,
                }
            )
            rate = ((done - 1) % config.log.every + 1) / (now - since)
            tracker.progress("SFT", done, total, f"loss {nll_sum / target_tokens:.4f}  {rate:.1f} steps/s")
            sums.zero_()
            since = now
