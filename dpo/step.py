"""One optimizer step of DPO, and the meter that gathers what the steps since the last log line have shown."""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo.context import contexts_of, look_ahead
from dpo.data.loader import StepBatches
from dpo.estimate import peak_tflops, useful_flops
from dpo.frozen import FrozenReference
from dpo.model.forward import halves
from dpo.model.shape import Shape, shape_of
from dpo.nonfinite import Nonfinite, spoil
from dpo.objective.metrics import averages, sums
from dpo.objective.objective import Objective
from dpo.policy import Policy
from dpo.runtime import distributed, heartbeat
from dpo.runtime import engine as deepspeed_engine
from dpo.setup import Setup
from dpo.types import Context, LossOutput, PackedBatch, PairLogps


@dataclass
class Meter:
    """What has happened since the last line of metrics.jsonl.

    Attributes:
        totals: (11,) fp64 on the device: metric sums and pairs, tokens of the forward passes, padding among them, and
            the load-balancing loss of a mixture of experts times pairs.
        pairs, tokens: Over all ranks.
        seconds: Of training alone, waiting for batches among it: evaluations and checkpoints are not counted.
        flops: Operations that the pairs need, over all ranks; see `estimate.useful_flops`.
        shape: Sizes of the policy, where the peak is known.
        peak_tflops: Of all ranks together, 1e12 operations a second; None where it is not known.
        with_router: Show the load-balancing loss.
        grad_norm: Of the last step, before clipping; None where it was left out.
    """

    totals: torch.Tensor
    pairs: int = 0
    tokens: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    shape: Shape | None = None
    peak_tflops: float | None = None
    with_router: bool = False
    grad_norm: float | None = None

    def carried(self) -> tuple[float, ...]:
        """What a checkpoint must hold for the next line to be whole: empty right after a line; collective."""
        if self.pairs == 0:
            return ()
        return (*distributed.sum_over_ranks(self.totals.clone()).tolist(), self.pairs, self.tokens, self.seconds,
                self.flops)

    def take_up(self, carried: tuple[float, ...], is_main: bool) -> None:
        """Go on from what a checkpoint held; rank 0 carries the sums of all."""
        if carried:
            *totals, pairs, tokens, self.seconds, self.flops = carried
            self.pairs, self.tokens = int(pairs), int(tokens)
            if is_main:
                self.totals += self.totals.new_tensor(totals)

    def line(self, device: torch.device) -> dict[str, float | None]:
        """Means over all ranks' pairs, and speed; one all-reduce; the meter is empty afterwards."""
        started = time.perf_counter()
        *_, pairs, forward_tokens, padding, router = (totals := distributed.sum_over_ranks(self.totals)).tolist()
        self.seconds += time.perf_counter() - started  # the last update has run until now, where a GPU computes it
        values: dict[str, float | None] = dict(averages(totals[:8]))
        values |= {
            "grad_norm": self.grad_norm,
            "perf/pairs_per_second": self.pairs / self.seconds,
            "perf/tokens_per_second": self.tokens / self.seconds,
            "perf/padding_fraction": padding / forward_tokens,
            "perf/peak_memory_gib": _peak_memory_gib(device),
        }
        if self.with_router:
            values["aux_loss"] = router / pairs if pairs else math.nan
        if self.peak_tflops is not None:
            values["perf/mfu"] = self.flops / self.seconds / (self.peak_tflops * 1e12)
            values["perf/peak_tflops"] = self.peak_tflops
        self.totals.zero_()
        self.flops = 0.0
        self.pairs = self.tokens = 0
        self.seconds = 0.0
        return values


def meter_for(setup: Setup, policy: Policy) -> Meter:
    """An empty meter, which knows the peak of the ranks' devices where it is known."""
    device, config = setup.world.device, policy.scorer.model.config
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak, totals = peak_tflops(name, setup.precision), torch.zeros(11, dtype=torch.float64, device=device)
    with_router = bool(policy.router_coefficient)
    if peak is None:
        return Meter(totals, with_router=with_router)
    shape = shape_of(config, setup.dtype, trust_remote_code=setup.config.model.trust_remote_code)
    if shape.has_fused_experts:  # how many of them compute a token is not among the sizes
        return Meter(totals, with_router=with_router)
    return Meter(totals, shape=shape, peak_tflops=peak * setup.world.world_size, with_router=with_router)


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


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
    world, started, of_row = setup.world, time.perf_counter(), setup.config.train.sequence_parallel_size
    losses, before, running = [], meter.totals.clone(), loss.running
    heartbeat.at(f"at the beginning of step {work.step + 1}", in_step=True)
    known = look_ahead(policy, reference.train, work.batches, world.device) if loss.couples else None
    contexts = contexts_of(loss, work.batches, known, work.chosen_length, world, of_row, is_step=True)
    for index, (batch, context) in enumerate(zip(work.batches, contexts, strict=True)):
        heartbeat.at(f"in step {work.step + 1}, micro-batch {index + 1}", in_step=True)
        meter.totals[8] += batch.input_ids.numel()
        meter.totals[9] += batch.num_padding_tokens
        on_device = batch.to(world.device)
        reference_logps = reference.train(on_device) if known is None else known[index][1]
        total, output, policy_logps = losses_of(policy, on_device, reference_logps, loss, context)
        scale = world.world_size / work.num_pairs
        scaled = total * scale + policy.router_loss(len(batch.pair_ids) * scale)
        losses.append(output.losses.detach())
        deepspeed_engine.backward(policy.engine, spoil(scaled, losses[-1]), index == len(work.batches) - 1)
        meter.totals[:8] += sums(output, policy_logps)
        if policy.router_coefficient:
            assert policy.scorer.router_loss is not None
            meter.totals[10] += len(batch.pair_ids) * policy.scorer.router_loss.detach()
    meter.grad_norm, counts, stop = nonfinite.step(policy.engine, lr, work, losses)
    if not counts:
        meter.totals[:8], meter.totals[10], loss.running = before[:8], before[10], running
    meter.pairs += work.num_pairs
    meter.tokens += work.num_tokens
    if (shape := meter.shape) is not None:
        lengths = setup.train_pairs.lengths[setup.epochs.batch(work.step)]
        meter.flops += useful_flops(lengths, **shape.sizes, frozen=setup.trains_adapters)
    meter.seconds += time.perf_counter() - started + work.waited
    heartbeat.at(f"after step {work.step + 1}")
    return stop
