"""A run on hardware that is not here: schedule, memory, traffic and time, for any number of ranks.

Data and tokenizer are read as for a run; of the model only its config. The schedule is the planner's own, the same that
the ranks would follow; memory parts are exact for what DeepSpeed keeps, times are estimates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from dpo.commandline import Command
from dpo.data.planner import Layout
from dpo.estimate import (
    GIB,
    GPUS,
    OFFLOADED_BYTES,
    STATES,
    Hardware,
    checkpoint_bytes,
    master_bytes,
    memory,
    reduction_buckets,
    traffic,
)
from dpo.memory.room import Room, first_step_bytes, wanted_tokens
from dpo.model import adapters, load
from dpo.model.head import CHUNK_ROWS
from dpo.model.shape import Shape, adapter_parameters, shape_of
from dpo.planning.spread import Schedule, schedule_of, schedule_rows
from dpo.run.prepare import prepare
from dpo.run.roles import has_own_weights, reference_dtype
from dpo.run.setup import Setup
from dpo.runtime.distributed import World

Rows = list[tuple[str, str]]
FP32_SHARE = 1 / 16
"""Peak in fp32 over the 16-bit tensor-core peak: 1/16 on an A100, 1/15 on an H100, 1/8 on a T4."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a forecast derives from setup and options once.

    Attributes:
        shape: Of the policy.
        stage: ZeRO stage.
        half: 16-bit weights.
        reference_bytes: A parameter of the reference during training; 0 where there is none or its scores are cached.
        copied_bytes: A parameter of the reference while it is loaded.
        recompute: Whether activations are recomputed.
        trained: Parameters that learn: all, or those of the adapters.
    """

    shape: Shape
    stage: int
    half: bool
    reference_bytes: int
    copied_bytes: int
    recompute: bool
    trained: int

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return 2 if self.half else 4


def prepare_for(command: Command) -> Setup:
    """Validate a run for ranks and GPUs that are not here, and tokenise its data.

    Raises:
        UserError: As a run would.
    """
    hardware: Hardware = command.options
    config = command.config
    if config.train.precision == "auto":
        precision: Any = "bf16" if GPUS[hardware.gpu].has_bf16 else "fp16"
        config = replace(config, train=replace(config.train, precision=precision))
    # Only the device's kind is looked at: nothing is put on it.
    there = World(0, hardware.ranks, 0, torch.device("cuda"))
    return prepare(config, there, command.deepspeed_json, for_elsewhere=True)


def machine_of(setup: Setup) -> Machine:
    """Sizes of the policy and how the run would hold it."""
    model, reference = setup.config.model, setup.config.reference
    assert model.policy is not None
    base, revision = adapters.base_of(model.policy, model.revision)
    config = load.load_config(base, revision=revision, trust_remote_code=model.trust_remote_code)
    shape = shape_of(config, setup.dtype, trust_remote_code=model.trust_remote_code)
    stage, mode = setup.zero_stage, setup.reference_mode
    dtype, _ = reference_dtype(reference.dtype, setup.dtype, setup.world.device, sharded=stage == 3, mode=mode)
    return Machine(
        shape=shape,
        stage=stage,
        half=setup.precision != "fp32",
        reference_bytes=dtype.itemsize if mode == "online" else 0,
        copied_bytes=dtype.itemsize if has_own_weights(setup.config, dtype, setup.dtype) else 0,
        recompute=model.gradient_checkpointing is True,
        trained=_trained(setup, config, shape),
    )


def _trained(setup: Setup, config: Any, shape: Shape) -> int:
    """Parameters that learn."""
    model = setup.config.model
    if not setup.trains_adapters:
        return shape.parameters
    stored = adapters.stored_parameters(model.policy or "")
    return stored or adapter_parameters(config, model.lora, trust_remote_code=model.trust_remote_code)


def _size(count: float) -> str:
    """Bytes in the unit that reads best."""
    unit = "KiB" if count < 2**20 else "MiB" if count < GIB else "GiB"
    return f"{count / {'KiB': 2**10, 'MiB': 2**20, 'GiB': GIB}[unit]:,.2f} {unit}"


def _number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _fixed_parts(setup: Setup, machine: Machine) -> dict[str, float]:
    """Part -> GiB per GPU, of what does not depend on the batch."""
    zero = setup.zero
    held = machine.shape.parameters + (machine.trained if setup.trains_adapters else 0)
    parts = memory(
        held, stage=machine.stage, world_size=setup.world.world_size, half=machine.half,
        reference_bytes=machine.reference_bytes, trained=machine.trained, states=STATES[setup.config.optim.name],
        in_4_bits=machine.shape.linear if setup.config.model.load_in_4bit else 0,
    )
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        parts["optimizer (AdamW, fp32 master)"] = parts["gradients"] = 0.0
    if zero.get("offload_param", {}).get("device", "none") != "none":
        parts["weights"] = parts["reference"] = 0.0
    return parts


def memory_parts(setup: Setup, machine: Machine, schedule: Schedule) -> dict[str, float | None]:
    """Part -> GiB per GPU; activations are None where they cannot be told."""
    shape, zero = machine.shape, setup.zero
    parts: dict[str, float | None] = dict(_fixed_parts(setup, machine))
    parts["reduction buckets"] = reduction_buckets(zero, machine.width) / GIB
    if machine.stage == 3:
        live = min(shape.parameters, zero.get("stage3_max_live_parameters", 1e9))
        parts["gathered weights, at most"] = live * machine.width / GIB
    early, of_gpu = setup.loss_in_forward, _of_one_gpu(schedule, setup.ranks_a_row)
    parts |= batch_parts(shape, of_gpu, setup.config.train.layout, machine.width, early, not setup.trains_adapters)
    return parts


def _of_one_gpu(schedule: Schedule, ranks_a_row: int) -> Schedule:
    """The largest micro-batch as one of the ranks that compute its rows together holds it; all its completion tokens
    may stand in one cut."""
    largest = math.ceil(schedule.largest / ranks_a_row)
    return replace(
        schedule, largest=largest, largest_prompts=math.ceil(schedule.largest_prompts / ranks_a_row),
        largest_completions=min(schedule.largest_completions, largest),
    )  # fmt: skip


def batch_parts(
    shape: Shape, schedule: Schedule, layout: Layout, width: int, in_forward: bool, head_learns: bool
) -> dict[str, float | None]:
    """Part -> GiB per GPU, of what a micro-batch needs; activations are None where they cannot be told.

    Checked against the allocations of micro-batches by tests/pretended/.

    Args:
        shape: Of the policy.
        schedule: Sizes of the largest micro-batch.
        layout: Of the micro-batches.
        width: Bytes of a weight.
        in_forward: Whether the gradient of the loss is taken in the forward pass of the head.
        head_learns: Whether the head has a gradient.
    """
    parts: dict[str, float | None] = {}
    for name, recomputed in (("activations, kept", False), ("activations, recomputed", True)):
        kept = shape.kept(
            schedule.largest, schedule.largest_prompts, is_shared=layout == "shared", recomputed=recomputed,
            unread=0 if layout == "padded" else schedule.largest - schedule.largest_completions,
        )  # fmt: skip
        parts[name] = None if kept is None else kept / GIB
    rows, copied = min(CHUNK_ROWS, schedule.largest_completions), width == 2
    name = f"logits tile, {rows:,} rows in fp32{' and a copy in 16 bits' * copied}"
    parts[name] = rows * shape.vocabulary * (6 if copied else 4) / GIB
    if head_learns:  # in fp32 until backward, or of two tiles at a time
        size = 4 if in_forward else 2 * width
        parts["gradient of the head"] = shape.vocabulary * shape.hidden * size / GIB
    return parts


def memory_rows(setup: Setup, machine: Machine, schedule: Schedule, hardware: Hardware) -> Rows:
    """Memory per GPU by part, and whether their sum fits."""
    parts = memory_parts(setup, machine, schedule)
    unused = "activations, kept" if machine.recompute else "activations, recomputed"
    rows = [
        (name + (" (not in use)" if name == unused else ""), "not known" if size is None else _size(size * GIB))
        for name, size in parts.items()
    ]
    total = sum(size or 0.0 for name, size in parts.items() if name != unused)
    room = GPUS[hardware.gpu].memory_gib
    verdict = "fits" if total < 0.9 * room else "close" if total < room else "does not fit"
    return [*rows, ("sum", f"{_size(total * GIB)} of about {room:.0f} GiB of {hardware.gpu}: {verdict}")]


def host_rows(setup: Setup, machine: Machine, hardware: Hardware) -> Rows:
    """Memory of a node while loading, disk and time of checkpoints."""
    shape, train, ranks = machine.shape, setup.config.train, setup.world.world_size
    neighbours = min(ranks, hardware.gpus_per_node)
    loaded = machine.width + machine.copied_bytes if machine.stage < 3 else setup.start_dtype.itemsize
    host = neighbours * shape.parameters * loaded
    one = checkpoint_bytes(
        machine.trained, stage=machine.stage, half=machine.half, weights_only=train.save_weights_only,
        states=STATES[setup.config.optim.name],
    )  # fmt: skip
    best = setup.validation_pairs is not None  # it is kept beside the newest
    held = min(train.keep_checkpoints + best + 1, max(1, setup.total_steps))
    kept = f"{train.keep_checkpoints} kept{', the best,' if best else ''} and one written"
    rows = [
        ("host memory of a node while loading, at most", f"{_size(host)} ({neighbours} ranks)"),
        ("one checkpoint", f"{_size(one)}, {one / machine.trained:.0f} bytes a parameter"),
        ("disk for checkpoints", f"{_size(held * one)}: {kept}"),
        ("time to write one", f"{_number(one / hardware.disk_gb / 1e9)} s at {hardware.disk_gb:g} GB/s"),
    ]
    if setup.zero.get("offload_optimizer", {}).get("device") == "cpu":
        states = OFFLOADED_BYTES * machine.trained * neighbours / ranks
        rows.insert(1, ("host memory of a node for the optimizer", _size(states)))
    return rows


def speed_rows(setup: Setup, machine: Machine, schedule: Schedule, hardware: Hardware) -> Rows:
    """Traffic and an estimate of time."""
    ranks, gpu = setup.world.world_size, GPUS[hardware.gpu]
    zero = setup.zero
    sent = traffic(
        machine.shape.parameters, stage=machine.stage, world_size=ranks, micro_steps=float(schedule.micro_steps.mean()),
        width=machine.width, reference_width=machine.reference_bytes, trained=machine.trained,
        to_owner=not zero.get("use_multi_rank_bucket_allreduce", True),
    )
    within = ranks <= hardware.gpus_per_node
    link, slow = gpu.link_gb, min(gpu.link_gb, hardware.network_gb)
    exchanged = _exchanged(machine, schedule.tokens / ranks, setup.ranks_a_row)
    peak = gpu.tflops * (1 if machine.half else FP32_SHARE)
    waits = schedule.waits if machine.stage >= 2 else schedule.imbalances
    compute = schedule.flops / ranks * float(waits.mean()) / (peak * 1e12 * hardware.peak_share)
    moving = sum(sent.values()) / ((link if within else slow) * 1e9)
    moving += exchanged / ((link if setup.ranks_a_row <= hardware.gpus_per_node else slow) * 1e9)
    sent |= {"queries, keys, values, outputs exchanged": exchanged} if exchanged else {}
    step = compute + moving
    hours, over = setup.total_steps * step / 3600, link if within else slow
    where = "within a node" if within else "between nodes"
    speed = f"{hardware.peak_share:.0%} of {peak:,.0f} TFLOP/s"
    return [
        *((f"sent a step and rank: {name}", f"{_number(count / 1e9)} GB") for name, count in sent.items()),
        ("operations a step, all ranks", f"{_number(schedule.flops / 1e12)} TFLOP"),
        ("computing", f"{_number(compute)} s at {speed}, the slowest rank"),
        ("sending", f"{_number(moving)} s at {over:g} GB/s ({where}), none of it hidden behind computing"),
        ("a step, estimate", f"{_number(step)} s, {_number(schedule.pairs / step)} pairs/s"),
        ("all DPO steps, estimate", f"{_number(hours)} h, evaluation and checkpoints not counted"),
    ]


def _exchanged(machine: Machine, tokens: float, ranks_a_row: int) -> float:
    """Bytes that a rank sends in a step's attention: it trades tokens for heads (Ulysses), of queries, keys and values
    before and of outputs after, forward and back, and again for the reference and where activations are recomputed.

    Args:
        machine: The policy.
        tokens: Of the rank's cuts, over the step.
        ranks_a_row: That compute a row together.
    """
    shape = machine.shape
    of_token = 2 * shape.attention_width * machine.width + shape.keys_and_values
    passes = 2 + machine.recompute + machine.reference_bytes / machine.width
    return (1 - 1 / ranks_a_row) * passes * of_token * tokens


def _room(setup: Setup, machine: Machine, hardware: Hardware) -> Room:
    """What is left of such a GPU for micro-batches."""
    train, ranks, zero = setup.config.train, setup.world.world_size, setup.zero
    parts = _fixed_parts(setup, machine)
    is_offloaded = parts["optimizer (AdamW, fp32 master)"] == 0
    copied = 0 if is_offloaded else master_bytes(machine.stage, machine.width == 2) * machine.trained
    free = GIB * (GPUS[hardware.gpu].memory_gib - parts["weights"] - parts["reference"])
    free -= copied // (ranks if machine.stage else 1)
    free -= first_step_bytes(
        zero, world_size=ranks, width=machine.width, trained=machine.trained,
        largest=min(machine.shape.largest, machine.trained), states=STATES[setup.config.optim.name],
    )  # fmt: skip
    return Room(
        machine.shape, setup.dtype, int(free), machine.stage, machine.trained, setup.longest_row(train.layout),
        train.layout, setup.ranks_a_row,
    )  # fmt: skip


def forecast(setup: Setup, hardware: Hardware) -> dict[str, Rows]:
    """Everything a plan says beyond the run's own settings: title -> rows."""
    machine = machine_of(setup)
    room = _room(setup, machine, hardware)
    if setup.config.model.gradient_checkpointing == "auto":
        wanted = wanted_tokens(setup, room.layout)
        machine = replace(machine, recompute=room.asks_for_recomputation(wanted))
    if setup.config.train.tokens_per_micro_batch == "auto":
        setup = replace(setup, token_budget=room.budget(recomputed=machine.recompute))
    shape = machine.shape
    schedule = schedule_of(setup, shape, recompute=machine.recompute, reference=machine.reference_bytes > 0)
    size = f"{shape.parameters / 1e6:,.1f}M parameters, {shape.body / 1e6:,.1f}M in the body"
    title = f"{hardware.ranks:,} x {hardware.gpu}"
    return {
        "Schedule": [("model", size), *schedule_rows(schedule)],
        f"Memory of each GPU, {title}": memory_rows(setup, machine, schedule, hardware),
        "Host and disk": host_rows(setup, machine, hardware),
        f"Traffic and time, {title}": speed_rows(setup, machine, schedule, hardware),
    }
