"""One optimizer step of DPO."""

from __future__ import annotations

import time

from torch import Tensor

from dpo.data.loader import StepBatches
from dpo.model.forward import halves
from dpo.objective.metrics import sums
from dpo.objective.objective import Objective
from dpo.run.setup import Setup
from dpo.runtime import engine as deepspeed_engine
from dpo.runtime import heartbeat
from dpo.training.context import contexts_of, look_ahead
from dpo.training.frozen import FrozenReference
from dpo.training.meter import PADDING, ROUTER, TOKENS, Meter
from dpo.training.nonfinite import Nonfinite, spoil
from dpo.training.policy import Policy
from dpo.types import Context, LossOutput, PackedBatch, PairLogps


def losses_of(
    policy: Policy, batch: PackedBatch, reference: PairLogps, loss: Objective, context: Context
) -> tuple[Tensor, LossOutput, PairLogps]:
    """Score a micro-batch with gradient.

    Args:
        policy: The policy.
        batch: On its device.
        reference, loss, context: See `Objective`.
    Returns:
        Sum of the losses, with gradient; the losses; the log-probs.
    """
    if not policy.takes_loss_in_forward(batch, reference):
        logps = policy.logps(batch, reference)
        output = loss(logps, reference, context)
        return output.losses.sum(), output, logps

    def pair_losses(chosen: Tensor, rejected: Tensor, pairs: slice) -> Tensor:
        known = reference.of(pairs)
        mine = PairLogps(chosen, rejected, known.chosen_lengths, known.rejected_lengths)
        return loss(mine, known, context.of(pairs)).losses

    total, sums = policy.score(batch, pair_losses=pair_losses)
    logps = halves(sums, batch)
    return total, loss(logps, reference, context), logps


def take_step(
    setup: Setup,
    policy: Policy,
    reference: FrozenReference,
    loss: Objective,
    work: StepBatches,
    lr: float,
    meter: Meter,
    nonfinite: Nonfinite,
) -> bool:
    """One optimizer step: the mean loss over the pairs of the global batch; collective.

    A loss that couples pairs first scores the global batch without gradient: one more forward pass of the policy.

    Args:
        setup: The run.
        policy, reference: The models.
        loss: The objective.
        work: This rank's micro-batches of the step.
        lr: Learning rate of the step.
        meter: Takes what the forward passes say.
        nonfinite: What happens at a loss or gradient that is not finite.
    Returns:
        Whether any rank was asked to stop after this step.
    Raises:
        UserError: If a loss or the gradient is not finite on any rank and the run is not to go on; no rank has stepped.
        Preempted: Before anything has changed, where the loss couples pairs.
    """
    world, started = setup.world, time.perf_counter()
    losses, before, running = [], meter.totals.clone(), loss.running
    heartbeat.at(f"at the beginning of step {work.step + 1}", in_step=True)
    known = look_ahead(policy, reference.of_training, work.batches, world.device) if loss.couples else None
    contexts = contexts_of(loss, work.batches, known, work.chosen_length, world, setup.ranks_a_row, is_step=True)
    for index, (batch, context) in enumerate(zip(work.batches, contexts, strict=True)):
        heartbeat.at(f"in step {work.step + 1}, micro-batch {index + 1}", in_step=True)
        meter.totals[TOKENS] += batch.input_ids.numel()
        meter.totals[PADDING] += batch.num_padding_tokens
        on_device = batch.to(world.device)
        reference_logps = reference.of_training(on_device) if known is None else known[index][1]
        total, output, policy_logps = losses_of(policy, on_device, reference_logps, loss, context)
        scale = world.world_size / work.num_pairs
        scaled = total * scale + policy.router_loss(len(batch.pair_ids) * scale)
        losses.append(output.losses.detach())
        deepspeed_engine.backward(policy.engine, spoil(scaled, losses[-1]), index == len(work.batches) - 1)
        meter.add(sums(output, policy_logps))
        if policy.router_coefficient:
            assert policy.scorer.router_loss is not None
            meter.totals[ROUTER] += len(batch.pair_ids) * policy.scorer.router_loss.detach()
    meter.grad_norm, counts, stop = nonfinite.step(policy.engine, lr, work, losses)
    if not counts:
        before[TOKENS], before[PADDING] = meter.totals[TOKENS], meter.totals[PADDING]  # these were computed
        meter.totals, loss.running = before, running
    meter.count(setup, work, time.perf_counter() - started)
    heartbeat.at(f"after step {work.step + 1}")
    return stop
