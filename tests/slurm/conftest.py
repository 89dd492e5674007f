"""A real Slurm on loopback (start-slurm.sh of ../shared/slurm), and folders to submit slurm/dpo.sh from."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LAB = REPOSITORY.parent / "shared" / "slurm"
FINAL_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}

# Writes down what it was given, once per node, in place of training.
FAKE_TORCHRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"arguments-$SLURM_NODEID"
echo "${CUDA_VISIBLE_DEVICES:-none}" >"gpus-$SLURM_NODEID"
echo "$PET_NPROC_PER_NODE" >"processes-$SLURM_NODEID"
echo "${SETTING_OF_THE_SITE:-none}" >"setting-$SLURM_NODEID"
[ -z "${FAKE_RANK:-}" ] || { trap 'echo >"term-$SLURM_NODEID"' TERM
    python3 -c "import os, signal, sys
def told(*_):
    if 'FAKE_STEP' in os.environ:
        open(os.environ['DPO_STATUS_FILE'], 'w').write(open('status').read())
    open('usr1', 'w').close()
    os._exit(0)
signal.signal(signal.SIGUSR1, told)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
open('shell', 'w').write(sys.argv[1])
signal.pause()" "$PPID" train_dpo.py & wait; wait; sleep 0.5; }
[ -z "${FAKE_SLEEP:-}" ] || { trap 'echo saved >"saved-$SLURM_NODEID"; exit 9' TERM; sleep "$FAKE_SLEEP" &
    echo >"ready-$SLURM_NODEID"; wait; }
exit "${FAKE_STATUS:-0}"
"""


def _free_ports(count: int) -> int:
    """The first of `count` consecutive free ports."""
    for first in range(17400 + os.getpid() % 100 * 20, 32000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for port, one in enumerate(sockets, first):
                one.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise RuntimeError(f"no {count} consecutive free ports")


class Slurm:
    """A running Slurm; jobs are submitted with a clean environment and followed by polling."""

    def __init__(self, folder: Path, gpus: int) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "DPO_"))}
        self.environment = kept | {
            "SLURM_LAB_DIR": str(folder),
            "SLURM_LAB_PORT": str(_free_ports(3)),
            "SLURM_LAB_GPUS": str(gpus),
            "SLURM_LAB_CPUS": "16" if gpus else "4",
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        # What make test runs in is a virtual environment: a job shall not take it for the user's.
        self.environment.pop("VIRTUAL_ENV", None)

    def call(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Run a client of this Slurm and return what it printed."""
        done = subprocess.run(
            command, cwd=cwd, env=self.environment | environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """sbatch; returns the job id."""
        return self.call("sbatch", "--parsable", "--time=30", *arguments, cwd=cwd, **environment).strip()

    def finish(self, job: str, seconds: float = 20) -> str:
        """Wait for the end of a job and return its state. (sbatch --wait polls ever more slowly.)"""
        deadline = time.monotonic() + seconds
        while True:
            state = self.call("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()
            if state in FINAL_STATES:
                return state
            if time.monotonic() > deadline:
                self.call("scancel", job)
                pytest.fail(f"job {job} is {state} after {seconds} s: {self.call('scontrol', 'show', 'job', job)}")
            time.sleep(0.1)

    def exit_code(self, job: str) -> str:
        """STATUS:SIGNAL of a finished job's batch script."""
        fields = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return next(field.removeprefix("ExitCode=") for field in fields if field.startswith("ExitCode="))


def _start(gpus: int) -> Iterator[Slurm]:
    if not (LAB / "start-slurm.sh").is_file():
        pytest.skip(f"no {LAB}: scripts that start a Slurm")
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [tool for tool in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(tool, path=path)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge)")
    # Not tmp_path: the path of munge's socket must stay short.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    slurm = Slurm(folder, gpus)
    try:
        slurm.call(str(LAB / "start-slurm.sh"))
        yield slurm
    finally:
        slurm.call(str(LAB / "stop-slurm.sh"), "--purge")


@pytest.fixture(scope="session")
def cpu_cluster() -> Iterator[Slurm]:
    """Two nodes without GPUs."""
    yield from _start(gpus=0)


@pytest.fixture(scope="session")
def gpu_cluster() -> Iterator[Slurm]:
    """Two nodes of 8 (fake) GPUs."""
    yield from _start(gpus=8)


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A repository with the real slurm/dpo.sh, whose torchrun (in its .venv) only writes down its arguments."""
    repository = tmp_path / "stand in"
    (repository / "slurm").mkdir(parents=True)
    shutil.copy(REPOSITORY / "slurm" / "dpo.sh", repository / "slurm")
    (repository / "train_dpo.py").touch()
    binaries = repository / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "activate").write_text(f"PATH='{binaries}':$PATH\n")
    (binaries / "torchrun").write_text(FAKE_TORCHRUN)
    (binaries / "torchrun").chmod(0o755)
    return repository


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what a job needs of this repository, so that its output does not land here."""
    repository = tmp_path / "clone"
    repository.mkdir()
    shutil.copy(REPOSITORY / "train_dpo.py", repository)
    leave_out = shutil.ignore_patterns("__pycache__", "env.sh")
    for folder in ("dpo", "ds_configs", "recipes", "slurm"):
        shutil.copytree(REPOSITORY / folder, repository / folder, ignore=leave_out)
    return repository


@pytest.fixture(scope="session")
def path_with_torchrun() -> str:
    """PATH as in an active environment that has the torchrun of the Python that runs the tests."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"
