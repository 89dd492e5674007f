"""What a run needs, as arithmetic: memory, traffic, operations, disk. No model, no device, no rank.

Legend: P, C, R tokens of prompt, chosen and rejected completion; N parameters; W ranks. Bytes are bytes, GiB is 2^30.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo.data.planner import Costs, Layout, Plan, attention_products, num_tokens, pair_costs

GIB = 2**30
OFFLOADED_BYTES = 20
"""Main memory a parameter of an offloaded optimizer: fp32 weights, AdamW's states, gradients as they add up and as they
are stepped on."""

STATES = {"adamw": 8, "adamw_8bit": 2}
"""Bytes a parameter of an optimizer's two moments; of 8 bits those of small tensors stay in fp32."""
FOUR_BITS = 0.516
"""Bytes a parameter in NormalFloat of 4 bits with quantised constants (Dettmers et al. 2023, arXiv:2305.14314)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device as its data sheet describes it.

    Attributes:
        tflops: Dense 16-bit tensor-core peak, 1e12 operations a second.
        memory_gib: Memory that a program can use, about.
        link_gb: To another GPU of its node, one direction, 1e9 bytes a second.
        has_bf16: Else 16-bit training is fp16.
    """

    tflops: float
    memory_gib: float
    link_gb: float
    has_bf16: bool = True


GPUS = {
    "t4": Gpu(65, 14.5, 12, has_bf16=False),
    "v100": Gpu(125, 31.5, 150, has_bf16=False),
    "l4": Gpu(121, 22, 25),
    "l40s": Gpu(362, 44.5, 25),
    "a100_40gb": Gpu(312, 39.4, 300),
    "a100": Gpu(312, 79.2, 300),
    "h100": Gpu(989, 79.2, 450),
    "h200": Gpu(989, 139.8, 450),
    "b200": Gpu(2250, 178, 900),
}
"""NVIDIA's data sheets, SXM versions where there are two; PCIe cards with what their bus carries in practice."""


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Dense 16-bit peak of a device, by the name that CUDA gives it.

    Returns:
        1e12 operations a second; None in fp32, for devices that are not in GPUS, and for PCIe and NVL versions of the
        H100 and H200, which are slower than the table's.
    """
    words = re.split("[^A-Z0-9]+", device_name.upper())
    if precision == "fp32" or ({"H100", "H200"} & set(words) and {"PCIE", "NVL"} & set(words)):
        return None
    return next((gpu.tflops for name, gpu in GPUS.items() if name.upper() in words), None)


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The hardware to plan for."""

    ranks: int = 1
    """GPUs in all."""
    gpu: str = "h100"
    """t4, v100, l4, l40s, a100_40gb, a100, h100, h200 or b200."""
    gpus_per_node: int = 8
    """GPUs that share a node's memory and its fast links."""
    peak_share: float = 0.4
    """Share of the GPU's 16-bit peak that the computation is assumed to reach, in (0, 1]."""
    network_gb: float = 50.0
    """Network between nodes, 1e9 bytes a second for each GPU, one direction; 50 is one 400 Gb/s port a GPU."""
    disk_gb: float = 2.0
    """Speed of the disk that checkpoints go to, 1e9 bytes a second over all ranks."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "gpu", self.gpu.lower().replace("-", "_"))
        if self.gpu not in GPUS:
            raise ValueError(f"gpu is {self.gpu}; use {', '.join(GPUS)}")
        for key in ("ranks", "gpus_per_node"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; use a whole number of at least 1")
        for key in ("network_gb", "disk_gb"):
            if not 0 < getattr(self, key) < float("inf"):
                raise ValueError(f"{key} is {getattr(self, key)}; use a number above 0")
        if not 0 < self.peak_share <= 1:
            raise ValueError(f"peak_share is {self.peak_share}; use a number above 0, at most 1")


def memory(
    num_parameters: int,
    *,
    stage: int,
    world_size: int,
    half: bool,
    reference_bytes: int,
    trained: int | None = None,
    in_4_bits: int = 0,
    states: int = 8,
) -> dict[str, float]:
    """Memory per GPU that does not depend on the batch, in GiB.

    Checked against the tensors of real engines (DeepSpeed 0.19.8) by tests/test_plan.py: under ZeRO it keeps an fp32
    copy of the weights beside weights in fp32 too, and at stage 1 gradients in 16 bits and, summed, in 32.

    Args:
        num_parameters: N of the policy.
        stage: ZeRO stage: 1 partitions optimizer states, 2 gradients as well, 3 weights as well.
        world_size: Ranks.
        half: Weights of 2 bytes and gradients accumulated in fp32; else fp32 throughout.
        reference_bytes: Per parameter; 0 for none.
        trained: Parameters that learn, where the others are frozen; None for all.
        in_4_bits: Parameters held in 4 bits, whatever `half` says; see FOUR_BITS.
        states: Bytes a parameter of the optimizer's two moments; see STATES.
    Returns:
        Part -> GiB.
    Source:
        Rajbhandari et al. 2020 (ZeRO), arXiv:1910.02054, section 3.
    """
    share = {name: 1 / world_size if stage >= level else 1.0 for name, level in
             (("optimizer", 1), ("gradients", 2), ("weights", 3))}
    per_parameter = {
        "weights": (2 if half else 4) * share["weights"],
        "gradients": 6 if half and stage < 2 else 4 * share["gradients"],
        "optimizer (AdamW, fp32 master)": (master_bytes(stage, half) + states) * share["optimizer"],
        "reference": reference_bytes * share["weights"],
    }
    learning = {"gradients", "optimizer (AdamW, fp32 master)"}
    trained = num_parameters if trained is None else trained
    counts = {name: trained if name in learning else num_parameters for name in per_parameter}
    counts["weights"] -= in_4_bits
    parts = {name: counts[name] * size / GIB for name, size in per_parameter.items()}
    parts["weights"] += in_4_bits * FOUR_BITS / GIB
    return parts


def reduction_buckets(zero: dict[str, Any], width: int) -> int:
    """Bytes per GPU of the buckets in which DeepSpeed reduces gradients.

    Args:
        zero: The section zero_optimization of its config.
        width: Bytes of a gradient on the wire.
    """
    if not zero.get("stage"):
        return 0
    return int(zero.get("reduce_bucket_size", 5e8)) * (2 if zero.get("overlap_comm") else 1) * width


def checkpoint_bytes(
    num_parameters: int, *, stage: int, half: bool, weights_only: bool = False, states: int = 8
) -> int:
    """Disk space of one checkpoint, over all ranks.

    The fp32 master weights and AdamW's two moments of `states` bytes, and, below stage 3, the weights themselves: 14
    bytes a parameter at half precision, 16 in fp32 (12 without ZeRO). Of the weights alone 2 and 4.
    """
    if weights_only:
        return num_parameters * (2 if half else 4)
    return num_parameters * (master_bytes(stage, half) + states + (0 if stage == 3 else 2 if half else 4))


def master_bytes(stage: int, half: bool) -> int:
    """Bytes a parameter of the fp32 copy that the optimizer steps on; weights in fp32 without ZeRO need none."""
    return 4 if half or stage > 0 else 0


def traffic(
    num_parameters: int,
    *,
    stage: int,
    world_size: int,
    micro_steps: float,
    width: int,
    reference_width: int,
    trained: int | None = None,
    to_owner: bool = False,
) -> dict[str, float]:
    """Bytes that one rank sends in one optimizer step, by purpose; it receives as many.

    A ring sends (W-1)/W of the data to gather, scatter or reduce them, twice that to all-reduce. Stage 2 reduces after
    every micro-batch. Stage 3 gathers the weights for every forward and every backward pass.
    benchmarks/collectives.py counts the same in DeepSpeed's own steps.

    Args:
        num_parameters: N of the policy; the reference has as many.
        stage: ZeRO stage.
        world_size: W.
        micro_steps: Micro-batches per step and rank.
        width: Bytes a parameter, of weights and of gradients on the wire.
        reference_width: Bytes a parameter of a reference that is sharded at stage 3; 0 for none.
        trained: Parameters that learn, where the others are frozen; None for all.
        to_owner: Whether stage 2 reduces a part of the gradient to the rank that steps on it, and not to all ranks as
            DeepSpeed 0.19 does by default (use_multi_rank_bucket_allreduce).
    Returns:
        Purpose -> bytes.
    Source:
        Rajbhandari et al. 2020 (ZeRO), arXiv:1910.02054, section 7.
    """
    once = num_parameters * (world_size - 1) / world_size
    learning = once if trained is None else trained * (world_size - 1) / world_size
    if stage == 3:
        return {
            "weights gathered": 2 * once * width * micro_steps,
            "gradients scattered": learning * width * micro_steps,
            "reference gathered": once * reference_width * micro_steps,
        }
    passes = (1 if to_owner else 2) * micro_steps if stage == 2 else 2
    return {
        "gradients reduced": passes * learning * width,
        "weights gathered": learning * width if stage else 0.0,
    }


def costs_of(*, body: int, head: int, attention_width: int) -> Costs:
    """What the planner balances, from a model's sizes; see `useful_flops`."""
    return Costs(completion=round(1e6 * head / max(1, body)), product=round(2e6 * attention_width / max(1, body)))


def useful_flops(
    lengths: np.ndarray, *, body: int, head: int, attention_width: int, frozen: bool = False
) -> float:
    """Operations that training on pairs needs, as perf/mfu counts them: 6 N_body (P+C+R) + 6 H V (C+R) + attention of
    the shared layout; 4 in place of 6 where the weights are frozen and have no gradient of their own. Prompts once;
    reference and recomputation not counted.

    Args:
        lengths: (n, 3) int64: P, C, R.
        body: Parameters that multiply every token.
        head: H x V.
        attention_width: Heads x head size, summed over layers.
        frozen: Whether only adapters learn, whose own few operations are not counted.
    Returns:
        Multiplications and additions, forward and backward.
    """
    tokens, completions = int(lengths.sum()), int(lengths[:, 1:].sum())
    products = int(attention_products(lengths, "shared").sum())
    of_weight = 4.0 if frozen else 6.0
    return of_weight * (body * tokens + head * completions) + 12.0 * attention_width * products


def computed_flops(
    lengths: np.ndarray,
    layout: Layout,
    *,
    tokens: int,
    body: int,
    head: int,
    attention_width: int,
    recompute: bool,
    reference: bool,
    look_ahead: bool = False,
) -> float:
    """Operations that a layout really spends: with its padding and second prompts, recomputation and the reference.

    Args:
        lengths: (n, 3) int64 of the pairs.
        layout: As scheduled.
        tokens: Of the pairs in that layout, padding included.
        body, head, attention_width: As for `useful_flops`.
        recompute: Whether activations are computed again in backward.
        reference: Whether a reference scores every batch.
        look_ahead: Whether the policy scores it once more, without gradient, for a loss that couples pairs.
    Returns:
        Multiplications and additions. A forward pass counts once, a backward pass twice.
    """
    products = int(attention_products(lengths, layout).sum())
    forward = 2.0 * body * tokens + 4.0 * attention_width * products
    head_forward = 2.0 * head * int(lengths[:, 1:].sum())
    scored = 3 + reference + look_ahead
    return forward * (scored + recompute) + head_forward * scored


def micro_batch_tokens(plan: Plan, lengths: np.ndarray, layout: Layout) -> np.ndarray:
    """Tokens of every micro-batch of a plan, padding included: (ranks, micro-steps) int64."""
    cost = num_tokens(lengths, layout)

    def size(ids: Sequence[int]) -> int:
        if not ids:
            return 0
        return len(ids) * int(cost[ids].max()) if layout.startswith("padded") else int(cost[ids].sum())

    return np.array([[size(ids) for ids in rank] for rank in plan], dtype=np.int64)


def costs_beside_tokens(plan: Plan, lengths: np.ndarray, layout: Layout, costs: Costs) -> np.ndarray:
    """What logits and attention of every micro-batch cost, in tokens' ways through the body: (ranks, micro-steps)."""
    beside = pair_costs(lengths, layout, costs) - 1_000_000 * num_tokens(lengths, layout)
    return np.array([[int(beside[ids].sum()) for ids in rank] for rank in plan]) / 1e6


def imbalance(costs: np.ndarray) -> float:
    """Costliest rank over the mean rank: 1 is perfect.

    Args:
        costs: (ranks, micro-steps): of every micro-batch.
    Returns:
        At least 1; the step takes this many times as long as it would with even ranks.
    """
    loads = costs.sum(axis=1)
    return float(loads.max() / loads.mean())


def waiting(costs: np.ndarray) -> float:
    """Like `imbalance`, where ranks wait for one another after every micro-batch, as ZeRO 2 and 3 make them."""
    return float(costs.max(axis=0).sum() / costs.sum(axis=1).mean())
