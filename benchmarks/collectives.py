"""What the ranks send one another in an optimizer step: every collective counted, under each ZeRO stage and setting.

    torchrun --standalone --nproc_per_node 2 -m benchmarks.collectives [--micro_batches 1 3 8] [--write FILE]

A tiny random Llama in bf16, a plain cross-entropy, the engine of a run (`dpo/runtime/engine.py`). Counts and bytes do
not depend on the backend; gloo's times say nothing of NCCL and are not taken. The table goes to docs/performance.md,
between its markers.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.report import table, write_block
from dpo.config import OptimConfig
from dpo.runtime import distributed
from dpo.runtime import engine as deepspeed_engine

SMALL = 1024
"""Bytes under which an all-reduce or a broadcast carries a flag or a norm."""
SEQUENCES, LENGTH, VOCABULARY = 48, 16, 512
RING_PASSES = {
    "allreduce_": 2, "reduce_": 1, "_reduce_scatter_base_": 1, "_allgather_base_": 1, "broadcast_": 1,
}  # fmt: skip
"""Collective -> how often each byte of its whole tensor goes round a ring of W ranks, in (W-1)/W."""
HEADING = ("setting", "micro-batches", "reductions", "gradients sent", "gathers", "weights sent", "small", "error")
GATHERS = ("_allgather_base_", "broadcast_")
ZERO_3 = dict.fromkeys(
    ("stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"), 0
)
"""Without these a tiny model's weights stay gathered."""


@dataclass(frozen=True)
class Case:
    """One way to set DeepSpeed up.

    Attributes:
        name: In the table.
        zero: The JSON's zero_optimization.
        coalesced: Whether the step's backward passes run within `coalesce_grad_reduction`.
        accumulates: The JSON's data_types.grad_accum_dtype.
        checks: The JSON's bf16.check_grad_overflow.
    """

    name: str
    zero: dict[str, Any]
    coalesced: bool = False
    accumulates: str = "fp32"
    checks: bool = True


OWNER = {"use_multi_rank_bucket_allreduce": False}
CASES = (
    Case("ZeRO-1", {"stage": 1}),
    Case("ZeRO-2", {"stage": 2}),
    Case("ZeRO-2, reduced to the owner", {"stage": 2} | OWNER),
    Case("the same, buckets of 20,000", {"stage": 2, "reduce_bucket_size": 20_000} | OWNER),
    Case("the same, overlapped", {"stage": 2, "overlap_comm": True} | OWNER),
    Case("the same, accumulated in bf16", {"stage": 2} | OWNER, accumulates="bf16"),
    Case("the same, no overflow check", {"stage": 2} | OWNER, checks=False),
    Case("the same, coalesced", {"stage": 2} | OWNER, coalesced=True),
    Case("ZeRO-3", {"stage": 3} | ZERO_3),
    Case("ZeRO-3, coalesced", {"stage": 3} | ZERO_3, coalesced=True),
)


class Collectives(TorchDispatchMode):
    """Notes every collective of this thread as (operation, bytes of its whole tensor)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            tensors = [t for arg in args[:2] for t in (arg if isinstance(arg, list) else [arg])]
            sizes = [t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)]
            if sizes:
                self.found.append((function.overloadpacket.__name__, max(sizes)))
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Count:
    """What one rank does in one optimizer step.

    Attributes:
        gradients, weights, small: Collectives that reduce gradients, gather weights, carry a flag or a norm.
        gradient_bytes, weight_bytes: Sent in a ring, as multiples of the weights' own bytes.
        error: Relative error that accumulation and reduction add to the micro-batches' own gradients.
    """

    gradients: int
    weights: int
    small: int
    gradient_bytes: float
    weight_bytes: float
    error: float


def counted(found: Sequence[tuple[str, int]], world_size: int, weights: int, error: float) -> Count:
    """Sum up the collectives of a step.

    Args:
        found: (operation, bytes).
        world_size: Ranks.
        weights: Bytes of the weights.
        error: See `Count`.
    """
    large = [(name, size) for name, size in found if size >= SMALL or name not in ("allreduce_", "broadcast_")]
    gathers = [item for item in large if item[0] in GATHERS]
    reduces = [item for item in large if item[0] not in GATHERS]

    def sent(items: list[tuple[str, int]]) -> float:
        return sum(RING_PASSES[name] * size for name, size in items) * (world_size - 1) / world_size / weights

    small = len(found) - len(large)
    return Count(len(reduces), len(gathers), small, sent(reduces), sent(gathers), error)


def _model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _loss(model: Any, ids: torch.Tensor, world_size: int) -> torch.Tensor:
    """A micro-batch's share of the mean loss, as a run scales it."""
    return model(input_ids=ids, labels=ids).loss * (len(ids) * world_size / SEQUENCES)


def _summed(model: Any, shares: Sequence[torch.Tensor], world_size: int) -> torch.Tensor:
    """(N,) fp64: the micro-batches' own bf16 gradients, added up without rounding."""
    total: torch.Tensor = torch.zeros(1, dtype=torch.float64)
    for ids in shares:
        _loss(model, ids, world_size).backward()
        total = total + torch.cat([p.grad.double().flatten() for p in model.parameters()]) / world_size
        model.zero_grad()
    return total


def _backward(engine: Any, shares: Sequence[torch.Tensor], world_size: int, coalesced: bool) -> None:
    with engine.coalesce_grad_reduction() if coalesced else contextlib.nullcontext():
        for index, ids in enumerate(shares):
            loss = _loss(engine, ids, world_size)
            if coalesced:
                engine.backward(loss, scale_wrt_gas=False)
            else:
                deepspeed_engine.backward(engine, loss, index == len(shares) - 1)


def measure(case: Case, micro_batches: Sequence[int], world: distributed.World) -> dict[int, Count]:
    """Count the collectives of the second step for each number of micro-batches; collective.

    Args:
        case: How DeepSpeed is set up.
        micro_batches: Numbers that divide the sequences of a rank.
        world: This rank.
    Returns:
        Micro-batches a step -> what a step sends.
    """
    from deepspeed.utils import safe_get_full_grad

    json_config = {
        "zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 50_000_000} | case.zero,
        "data_types": {"grad_accum_dtype": case.accumulates}, "bf16": {"check_grad_overflow": case.checks},
    }  # fmt: skip
    optim = OptimConfig()
    config = deepspeed_engine.build_config(json_config, optim=optim, precision="bf16", global_batch_size=SEQUENCES)
    model = _model()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    by_rank = ids.chunk(world.world_size)
    engine = deepspeed_engine.start_training(copy.deepcopy(model), config, optim)
    counts = {}
    for number in micro_batches:
        shares, everyones = by_rank[world.rank].chunk(number), [c for i in by_rank for c in i.chunk(number)]
        _backward(engine, shares, world.world_size, case.coalesced)
        found = torch.cat([safe_get_full_grad(p).double().flatten() for p in engine.module.parameters()])
        truth = _summed(model, everyones, world.world_size)
        deepspeed_engine.step(engine, 0.0)  # with this rate the weights stay, and with them the truth
        with Collectives() as collectives:
            _backward(engine, shares, world.world_size, case.coalesced)
            norm = deepspeed_engine.gradient_norm(engine)
            deepspeed_engine.step(engine, 0.0, None if norm is None else float(norm))
        error = float((found - truth).norm() / truth.norm())
        counts[number] = counted(collectives.found, world.world_size, weights, error)
    deepspeed_engine.stop(engine)
    return counts


def rows_of(results: dict[str, dict[int, Count]]) -> list[list[str]]:
    """A row of text per setting and number of micro-batches, under HEADING."""
    return [
        [
            name, str(number), str(count.gradients), f"{count.gradient_bytes:.2f}", str(count.weights),
            f"{count.weight_bytes:.2f}", str(count.small), f"{count.error:.1e}",
        ]
        for name, counts in results.items()
        for number, count in counts.items()
    ]  # fmt: skip


def main(argv: list[str]) -> int:
    """Measure on all ranks, print and write on the first."""
    parser = argparse.ArgumentParser(prog="benchmarks.collectives", description="Collectives of an optimizer step.")
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[1, 3, 8], help="divisors of a rank's 24")
    parser.add_argument("--write", help="file with the markers; without it the table is printed only")
    args = parser.parse_args(argv)
    world = distributed.start()
    lines = table(HEADING, rows_of({case.name: measure(case, args.micro_batches, world) for case in CASES}))
    if world.is_main:
        print(lines)
        if args.write:
            write_block(Path(args.write), "collectives", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
