"""What the steps since the last line of metrics.jsonl have shown, and how fast they were."""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass, replace

import torch

from dpo.data.loader import StepBatches
from dpo.estimate import peak_tflops, useful_flops
from dpo.model.shape import Shape, shape_of
from dpo.objective.metrics import averages
from dpo.objective.objective import Objective
from dpo.run.setup import Setup
from dpo.runtime import distributed
from dpo.training.policy import Policy

METRICS, TOKENS, PADDING, ROUTER, PARTS = slice(0, 8), 8, 9, 10, slice(11, None)
"""Places in a meter's totals: what `metrics.sums` gives, of these the pairs last; tokens of the forward passes, padding
among them; the load-balancing loss of a mixture of experts times pairs; what else `metrics.sums` gives."""
NUM_TOTALS = 11


@dataclass
class Meter:
    """What has happened since the last line of metrics.jsonl.

    Attributes:
        totals: (11 + L,) fp64 on the device: METRICS, TOKENS, PADDING, ROUTER, PARTS.
        pairs, tokens: Over all ranks.
        seconds: Of training alone, waiting for batches among it: evaluations and checkpoints are not counted.
        flops: Operations that the pairs need, over all ranks; see `estimate.useful_flops`.
        shape: Sizes of the policy, where the peak is known.
        peak_tflops: Of all ranks together, 1e12 operations a second; None where it is not known.
        losses: Names of the L losses that are added up; none for a single one.
        with_router: Show the load-balancing loss.
        grad_norm: Of the last step, before clipping; None where it was left out.
    """

    totals: torch.Tensor
    losses: tuple[str, ...] = ()
    pairs: int = 0
    tokens: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    shape: Shape | None = None
    peak_tflops: float | None = None
    with_router: bool = False
    grad_norm: float | None = None

    def add(self, sums: torch.Tensor) -> None:
        """Take in the (8 + L,) sums of a micro-batch."""
        self.totals[METRICS] += sums[METRICS]
        self.totals[PARTS] += sums[METRICS.stop :]

    def count(self, setup: Setup, work: StepBatches, seconds: float) -> None:
        """Add a step of all ranks; `seconds` do not hold the waiting for its batches."""
        self.pairs += work.num_pairs
        self.tokens += work.num_tokens
        self.seconds += seconds + work.waited
        if self.shape is not None:
            lengths = setup.train_pairs.lengths[setup.epochs.batch(work.step)]
            self.flops += useful_flops(lengths, **self.shape.sizes, frozen=setup.trains_adapters)

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
                # Checkpoints of earlier versions do not know the parts of a sum: null in one line.
                self.totals += self.totals.new_tensor(totals + [math.nan] * (len(self.totals) - len(totals)))

    def line(self, device: torch.device) -> dict[str, float | None]:
        """Means over all ranks' pairs, and speed; one all-reduce; the meter is empty afterwards."""
        started = time.perf_counter()
        totals = distributed.sum_over_ranks(self.totals)
        pairs, forward_tokens, padding, router = totals[METRICS.stop - 1 : PARTS.start].tolist()
        self.seconds += time.perf_counter() - started  # the last update has run until now, where a GPU computes it
        values: dict[str, float | None] = dict(
            averages(torch.cat((totals[METRICS], totals[PARTS])), self.losses)
        )
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
    peak, losses = peak_tflops(name, setup.precision), Objective(setup.config.loss).names_of_parts
    totals = torch.zeros(NUM_TOTALS + len(losses), dtype=torch.float64, device=device)
    meter = Meter(totals, losses, with_router=bool(policy.router_coefficient))
    if peak is None:
        return meter
    shape = shape_of(config, setup.dtype, trust_remote_code=setup.config.model.trust_remote_code)
    if shape.has_fused_experts:  # how many of them compute a token is not among the sizes
        return meter
    return replace(meter, shape=shape, peak_tflops=peak * setup.world.world_size)


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
