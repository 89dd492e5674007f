"""Scripts on some ranks, as a launcher starts them, without the time that every rank would take to import.

Importing torch, transformers and DeepSpeed is most of a job of a few steps. One process of its own has imported them
and forks the ranks of every job: new processes with the environment of a launcher, each running the script as
`__main__`. Ranks share the seed of Python's hashes, as forks do. That torchrun, deepspeed and srun start the same
program, in processes of their own, is for the tests that call those.

    run(["train_dpo.py", ...], ranks=2) -> Done
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
GRACE = 60
"""Seconds in which the other ranks must end by themselves after one has failed."""


@dataclass(frozen=True)
class Done:
    """What became of a job.

    Attributes:
        codes: Exit codes by rank; negative: the signal that ended it by itself.
        output: Of all ranks, stdout and stderr as they came.
    """

    codes: list[int]
    output: str


_server: list[subprocess.Popen[str]] = []


def run(argv: list[str], ranks: int = 1, timeout: float = 600) -> Done:
    """Run a script to the end.

    Args:
        argv: Script, relative to the repository, and its arguments.
        ranks: How many processes; several find one another as under torchrun.
        timeout: Seconds after which all are killed.
    """
    if not _server or _server[0].poll() is not None:
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        _server[:] = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.ranks"], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, env=environment | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
            )
        ]  # fmt: skip
        atexit.register(_end, _server[0])
    server = _server[0]
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        job = {"argv": argv, "ranks": ranks, "output": str(output), "timeout": timeout}
        try:
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            answer = server.stdout.readline()
        except BaseException:
            server.kill()  # its answer would be taken for that to the next job
            raise
        assert answer, "the process that forks ranks has died"
        said = output.read_text(encoding="utf-8", errors="replace")
        codes = json.loads(answer)
        assert codes is not None, f"{argv[0]} did not end by itself\n{said[-8000:]}"
        return Done(codes, said)


def _end(server: subprocess.Popen[str]) -> None:
    """Let it leave, as it does at the end of its input; with ranks that do not end it might not."""
    assert server.stdin is not None and server.stdout is not None
    server.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(10)
    server.kill()
    server.wait()
    server.stdout.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _be_a_rank(rank: int, job: dict[str, Any], port: int) -> NoReturn:
    """Run the script and leave, whatever happens."""
    code = 1
    try:
        for number, target in ((os.open(os.devnull, os.O_RDONLY), 0), (_output_of(job), 1), (_output_of(job), 2)):
            os.dup2(number, target)
        if job["ranks"] > 1:
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "LOCAL_WORLD_SIZE": job["ranks"]}
            os.environ.update({k: str(v) for k, v in (places | {"MASTER_PORT": port}).items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        sys.argv = list(job["argv"])
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
        from dpo.runtime import distributed

        distributed.stop()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _output_of(job: dict[str, Any]) -> int:
    return os.open(job["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def _run(job: dict[str, Any]) -> list[int] | None:
    """Fork the ranks and wait for their codes; None if they had to be ended, after the time or a rank's failure."""
    port, end = _free_port(), time.monotonic() + job["timeout"]
    places: dict[int, int] = {}
    for rank in range(job["ranks"]):
        if (pid := os.fork()) == 0:
            _be_a_rank(rank, job, port)
        places[pid] = rank
    codes = [0] * job["ranks"]
    while places:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in places:
            codes[places.pop(pid)] = os.waitstatus_to_exitcode(status)
            if any(codes):
                end = min(end, time.monotonic() + GRACE)
        elif time.monotonic() > end:
            for each in places:
                os.kill(each, signal.SIGKILL)
                os.waitpid(each, 0)
            return None
        else:
            time.sleep(0.01)
    return codes


def _do_what_every_rank_would_do_first() -> None:
    """Imports that come late, and what libraries keep once they have it; no backward pass, which would forbid forks."""
    import deepspeed.runtime.zero.muon.muon_optimizer
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import dpo.train
    from dpo.commandline import parse
    from dpo.runtime.engine import build_config

    assert all((deepspeed.runtime.zero.muon.muon_optimizer, dpo.train))
    config = parse(["--model.policy", "builtin:tiny", "--data.train", "builtin:world"]).config
    build_config({}, optim=config.optim, precision="fp32", global_batch_size=1)
    get_checkpoint_conversion_mapping("llama")


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    gc.disable()
    import benchmarks.collectives
    import tests.invariants.cut
    import train_dpo

    assert all((benchmarks.collectives, tests.invariants.cut, train_dpo))
    _do_what_every_rank_would_do_first()
    gc.collect()
    gc.freeze()  # what is there now is not looked at in a rank, and its memory stays shared
    gc.enable()
    for line in sys.stdin:
        answers.write(json.dumps(_run(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
