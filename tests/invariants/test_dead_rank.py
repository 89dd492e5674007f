"""A rank that is killed, or frozen, ends the whole job under either launcher, and takes no checkpoint with it."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from dpo.runtime.distributed import World
from dpo.runtime.manifest import complaint
from tests.test_stages import arguments

ALONE = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "{port}"],
}


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ranks_of(launcher: psutil.Process) -> dict[int, psutil.Process]:
    """The training processes below a launcher, by their rank."""
    found = {}
    for process in launcher.children(recursive=True):
        if "train_dpo.py" in process.cmdline()[1:3]:  # [python, -u, train_dpo.py, ...]
            found[int(process.environ()["RANK"])] = process
    return found


def until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for something, and fail if it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "launcher"),
    [(signal.SIGKILL, "deepspeed"), (signal.SIGKILL, "torchrun"), (signal.SIGSTOP, "deepspeed")],
    ids=["killed, deepspeed", "killed, torchrun", "stopped, deepspeed"],
)
def test_a_rank_that_is_killed_or_stopped_ends_the_job_by_name_and_leaves_no_process(
    launcher, number, tiny_policy, tmp_path
):
    start = [part.format(port=free_port()) for part in LAUNCHERS[launcher]]
    flags = ["--train.max_steps", "100000", "--train.epochs", "50000", "--train.save_every", "2", "--log.samples", "0"]
    argv = arguments(tmp_path, tiny_policy, *flags, "--train.eval_every", "1000", "--train.hang_timeout", "3")
    run = tmp_path / "run"
    with open(tmp_path / "output", "w") as output:
        job = psutil.Popen(
            [sys.executable, *start, "train_dpo.py", *argv], stdout=output, stderr=output,
            env=os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
    ranks: dict[int, psutil.Process] = {}
    try:
        until(lambda: any((run / "checkpoints").glob("step-*")), 100)
        ranks = ranks_of(job)
        struck = time.monotonic()
        ranks[1].send_signal(number)
        code = job.wait(50)
        took = time.monotonic() - struck
        assert not any(process.is_running() for process in ranks.values())
    finally:
        for process in [*ranks.values(), job]:
            if process.is_running():
                process.kill()
    printed, status = (tmp_path / "output").read_text(), json.loads((run / "status.json").read_text())
    print(f"{launcher}, {number.name}: over after {took:.1f} s")
    assert code != 0 and took < 25, printed[-3000:]
    word = "died" if number == signal.SIGKILL else "gave no sign of life for 3 s"
    named = f"rank 1 on {status['host']} (process {ranks[1].pid}, last known "
    assert status["state"] == "failed" and status["reason"].startswith(named) and word in status["reason"], printed
    assert f"train_dpo.py: {status['reason']}\n" in printed
    assert status["place"]  # what the status said before is not forgotten
    folders = sorted(Path(run / "checkpoints").glob("step-*"))
    assert folders and [complaint(folder, ALONE) for folder in folders] == [None] * len(folders)


def test_ranks_whose_deepspeed_command_is_terminated_stop_at_a_checkpoint(tiny_policy, tmp_path):
    """It passes no signal on: its launcher and the ranks go on without it."""
    start = [part.format(port=free_port()) for part in LAUNCHERS["deepspeed"]]
    flags = ["--train.max_steps", "100000", "--train.epochs", "50000", "--train.save_every", "2", "--log.samples", "0"]
    argv, run = arguments(tmp_path, tiny_policy, *flags, "--train.eval_every", "1000"), tmp_path / "run"
    with open(tmp_path / "output", "w") as output:
        job = psutil.Popen(
            [sys.executable, *start, "train_dpo.py", *argv], stdout=output, stderr=output,
            env=os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
    below: list[psutil.Process] = []
    try:
        until(lambda: any((run / "checkpoints").glob("step-*")), 100)
        below = job.children(recursive=True)
        job.terminate()
        job.wait(20)
        until(lambda: not any(process.is_running() for process in below), 30)
    finally:
        for process in [*below, job]:
            if process.is_running():
                process.kill()
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("preempted", "the deepspeed command is gone")
    assert (run / f"checkpoints/step-{status['step']:06d}").is_dir()
