"""Ranks and what they say to one another; the only owner of torch.distributed.

Two channels: the device's (gloo or NCCL) for sums of metrics, and a gloo group with a day's patience for everything a
rank may be late for (tokenisation, downloads), which no watchdog of the device's channel ever sees. An error on any
rank is agreed on over the second before anyone raises it, so nobody is left waiting in a collective.
"""

from __future__ import annotations

import atexit
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dpo.errors import UserError
from dpo.machine import available_cpus

T = TypeVar("T")
PATIENCE = timedelta(days=1)
COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""How long a rank waits for the others in a collective of the device; rank 0 may be writing a large model."""


@dataclass(frozen=True)
class World:
    """This process among the others.

    Attributes:
        rank, world_size: Over all nodes.
        local_rank: On this node.
        device: What this rank computes on.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks to the user."""
        return self.rank == 0


def launched_ranks() -> tuple[int, int]:
    """(rank, world_size) as the launcher set them; (0, 1) for a plain process."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


_control: list[dist.ProcessGroup | None] = [None]


def start(*, deterministic: bool = False) -> World:
    """Join the process group that torchrun or deepspeed set up; a plain process becomes a world of one.

    The group lives as long as the process: DeepSpeed remembers it in module state.

    Args:
        deterministic: Have torch use only kernels that give the same result each time, and raise where it has none.
    Returns:
        This rank's place.
    Raises:
        UserError: By this rank alone, where there is no GPU for it.
    """
    rank, world_size = launched_ranks()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if neighbours > 1 and "OMP_NUM_THREADS" not in os.environ:
        # torchrun sets it to 1, deepspeed leaves every rank to take every core.
        torch.set_num_threads(max(1, available_cpus() // neighbours))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {rank} on {platform.node()} has no GPU: {torch.cuda.device_count()} are visible there; start as"
                f" many processes as there are GPUs"
            )
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every new length, and every row is new
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it before its first product
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a pass over each
    if not dist.is_initialized():
        atexit.register(stop)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if world_size == 1:
            for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
                os.environ.setdefault(name, value)
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
            _control[0] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return World(rank, world_size, local_rank, device)


def store() -> Any:
    """A connection of its own to the key-value store over which the ranks of a launcher met."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False)


def stop() -> None:
    """Leave the process group, at the end of the process."""
    if dist.is_initialized():
        _control[0] = None
        dist.destroy_process_group()


def agree(error: str | None) -> str | None:
    """Tell everyone of this rank's error; collective.

    Args:
        error: One line, or None.
    Returns:
        The error of the lowest rank that has one, the same on every rank.
    """
    return next((e for e in gather(error) if e is not None), None)


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of ranks, on every rank; collective, over the patient channel."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_control[0])
    return values


def together(function: Callable[[], T]) -> T:
    """Run a function on every rank; if it is the user's mistake on any, all raise it. Waits up to a day.

    Raises:
        UserError: The same line on every rank.
    """
    result: T | None = None
    error = None
    try:
        result = function()
    except UserError as mistake:
        error = str(mistake)
    error = agree(error)
    if error is not None:
        raise UserError(error)
    return result  # type: ignore[return-value]


def only_main(world: World, function: Callable[[], T]) -> T:
    """Run a function on rank 0 and give its answer to every rank: what is read from the file system is read once, so
    that all decide alike.

    Raises:
        UserError: The same line on every rank.
    """
    answer = [together(function if world.is_main else lambda: None)]
    if world.world_size > 1:
        dist.broadcast_object_list(answer, src=0, group=_control[0])
    return answer[0]  # type: ignore[return-value]


last_words: list[Callable[[str], None]] = []
"""Called with the line by which this process ends without a word to the other ranks."""


def give_up(world: World, line: str) -> NoReturn:
    """End the run for what this rank alone has met, such as a full disk.

    Args:
        world: This rank.
        line: What, and what to do.
    Raises:
        UserError: By one process alone. With several, the ranks that wait for this one can only be ended: it says why
            and leaves, and the launcher ends them.
    """
    if world.world_size == 1:
        raise UserError(line)
    print(f"train_dpo.py: {line}", file=sys.stderr, flush=True)
    for say in last_words:
        say(line)
    os._exit(1)


def neighbours(size: int) -> tuple[Any, int]:
    """The ranks k size to (k + 1) size - 1 among which this one is, on the device's channel; collective.

    Args:
        size: Divides the world.
    Returns:
        The process group, and this rank's place in it.
    """
    group, _ = dist.new_subgroups(group_size=size, timeout=COLLECTIVE_TIMEOUT)
    return group, dist.get_rank(group)


def sum_over_ranks(tensor: Tensor, group: Any = None) -> Tensor:
    """Add a tensor over all ranks, or those of a group, in place: one all-reduce.

    Args:
        tensor: Any shape, the same on all ranks, on the rank's device.
        group: Of `neighbours`; None for all ranks.
    Returns:
        The same tensor.
    """
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def from_main(tensor: Tensor) -> None:
    """Overwrite a tensor with that of rank 0; collective.

    Args:
        tensor: Any shape, the same on all ranks, on the rank's device.
    """
    if dist.get_world_size() > 1:
        dist.broadcast(tensor, src=0)


def any_ranks_and(flags: Tensor, number: Tensor | None) -> tuple[list[bool], float | None]:
    """Which flags are set on any rank, and a number that all ranks have: one all-reduce, and one wait for the device.

    Args:
        flags: (n,) bool on the rank's device, n at most 50.
        number: Scalar on the same device.
    Returns:
        The same on every rank.
    """
    raised = flags.to(torch.int32)
    if dist.get_world_size() > 1:
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    bits = (raised << torch.arange(len(flags), device=flags.device)).sum().double()
    beside = torch.zeros_like(bits) if number is None else number.double()
    both: complex = torch.complex(beside, bits).item()  # type: ignore[assignment]  # one number to wait for
    found = [bool(int(both.imag) >> place & 1) for place in range(len(flags))]
    return found, None if number is None else both.real


def any_rank(flag: Tensor) -> bool:
    """Whether one flag is set on any rank; as `any_ranks_and`.

    Args:
        flag: Scalar bool on the rank's device.
    """
    return any_ranks_and(flag[None], None)[0][0]
