"""Signals raise a flag once; their echo is nothing new, a later one is the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from dpo.runtime import distributed, preemption
from dpo.runtime.preemption import Preempted


@pytest.fixture(autouse=True)
def world() -> None:
    distributed.start()


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_signal_stops_at_the_next_check_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with preemption.listening():
        preemption.check(torch.device("cpu"))
        os.kill(os.getpid(), number)
        assert preemption.is_asked()
        with pytest.raises(Preempted, match=f"{signal.Signals(number).name} received"):
            preemption.check(torch.device("cpu"))
    assert signal.getsignal(number) == before and not preemption.is_asked()


@dataclass
class Watched:
    """Codes with which the process would have ended, and the time."""

    left: list[int]
    now: float = 100.0


@pytest.fixture
def watched(monkeypatch) -> Watched:
    made = Watched([])
    monkeypatch.setattr(preemption.time, "monotonic", lambda: made.now)
    monkeypatch.setattr(preemption.os, "_exit", made.left.append)
    return made


def test_the_echo_of_a_launcher_is_nothing_new_and_a_later_signal_ends_the_process_at_once(watched):
    with preemption.listening():
        os.kill(os.getpid(), signal.SIGINT)
        watched.now += 1
        os.kill(os.getpid(), signal.SIGTERM)
        assert watched.left == []
        watched.now += preemption.ECHO_SECONDS
        os.kill(os.getpid(), signal.SIGTERM)
        assert watched.left == [128 + signal.SIGTERM]


def test_the_signal_that_follows_the_end_of_the_deepspeed_command_does_not_cut_short_what_is_being_written(
    watched, monkeypatch
):
    command = [7]
    monkeypatch.setattr(preemption, "_deepspeed_command", lambda: command[0])
    with preemption.listening():
        assert not preemption.is_asked()
        command[0] = None
        assert preemption.is_asked()
        watched.now += 10 * preemption.ECHO_SECONDS
        os.kill(os.getpid(), signal.SIGTERM)
        assert watched.left == []
        with pytest.raises(Preempted, match="the deepspeed command is gone"):
            preemption.check(torch.device("cpu"))


def test_the_end_that_a_scheduler_has_announced_does_not_cut_short_what_is_being_written(watched):
    with preemption.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        watched.now += 60
        os.kill(os.getpid(), signal.SIGTERM)
        assert watched.left == []
        os.kill(os.getpid(), signal.SIGINT)
        assert watched.left == [128 + signal.SIGINT]


def test_a_signal_that_was_held_back_since_the_start_counts_while_we_listen_and_is_held_back_again_afterwards():
    script = (
        "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)\n"
        "from dpo.runtime import preemption\n"
        "with preemption.listening(): print(preemption.is_asked())\n"
        "os.kill(os.getpid(), signal.SIGUSR1); print('goes on')"
    )
    hold = "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]); "
    hold += "os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])"
    command = [sys.executable, "-c", hold, script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "True\ngoes on\n", done.stderr
