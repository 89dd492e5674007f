"""A disk that is full, a real one: one line, exit code 2, and the last checkpoint is whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dpo.train
import train_dpo
from benchmarks.soak import numbers, weights
from dpo.errors import UserError
from dpo.preference import Stage
from dpo.runtime import checkpoint, distributed, manifest
from dpo.runtime.distributed import World
from dpo.runtime.tracking import Recorder
from dpo.training.export import write_weights
from tests import ranks
from tests.test_stages import arguments

ALONE = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
LEFT = 20_000
"""Bytes that are left: enough for a line of metrics, for no file of weights."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a tmpfs")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, left: int) -> None:
    """Leave so many bytes free."""
    free = shutil.disk_usage(disk).free
    with open(disk / "ballast", "wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, free - left)


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on_once_there_is_room(
    small_disk, tiny_policy, tmp_path, monkeypatch, capsys
):
    whole = arguments(tmp_path, tiny_policy, "--train.save_every", "1", "--log.samples", "0", "--optim.lr", "1e-3")
    argv = [*whole, "--train.output_dir", str(small_disk / "run")]
    run, save, check = small_disk / "run", Stage.save, checkpoint._check_disk
    first = run / "checkpoints/step-000001"

    def filled(stage, state):
        if state.step == 2:
            fill(small_disk, LEFT)
        save(stage, state)

    def refused() -> str:
        """Start; what it said; the disk has its room again."""
        assert train_dpo.main(argv) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        (small_disk / "ballast").unlink()
        assert [path.name for path in (run / "checkpoints").iterdir() if path.is_dir()] == ["step-000001"]
        assert manifest.complaint(first, ALONE) is None
        assert json.loads((run / "status.json").read_text())["state"] == "failed"
        return line

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "save", filled)
        line = refused()  # seen before the write
        assert "a checkpoint takes 0.00" in line and f"{first} is whole; make room and start again" in line
        # As when another job takes the room meanwhile.
        patch.setattr(checkpoint, "_check_disk", lambda *args, **kwargs: None)
        line = refused()
        assert line.startswith("train_dpo.py: checkpoint ") and "cannot be written by rank 0" in line, line
        assert "the checkpoints before it are whole; make room and start again" in line

        def filled_at_the_end(folder: Path, world: World) -> None:
            if "000002" in folder.name:
                fill(small_disk, 0)
            written(folder, world)

        patch.setattr(Stage, "save", save)
        written = checkpoint.write_manifest
        patch.setattr(checkpoint, "write_manifest", filled_at_the_end)
        assert "No space left on device" in refused()

    def full_before_final(*args) -> None:
        fill(small_disk, LEFT)
        write_weights(*args)

    with monkeypatch.context() as patch:
        patch.setattr(dpo.train, "write_weights", full_before_final)
        assert train_dpo.main(argv) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{run}/final cannot be written: " in line and "make room and start again" in line
    (small_disk / "ballast").unlink()
    assert not (run / "final").exists() and checkpoint._check_disk is check
    assert train_dpo.main(argv) == 0
    assert train_dpo.main(whole) == 0
    assert weights(run) == weights(tmp_path / "run") and numbers(run) == numbers(tmp_path / "run")


def test_a_full_disk_at_a_line_of_metrics_is_one_line_too(small_disk, tiny_policy, tmp_path, monkeypatch, capsys):
    argv = arguments(tmp_path, tiny_policy, "--train.output_dir", str(small_disk / "run"), "--log.samples", "0")
    record = Recorder.record

    def full(recorder, values) -> None:
        if "loss" in values:
            fill(small_disk, 0)
        while "loss" in values:  # until the last block of the file is full
            record(recorder, values)
        record(recorder, values)

    monkeypatch.setattr(Recorder, "record", full)
    assert train_dpo.main(argv) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        f"train_dpo.py: {small_disk}/run: No space left on device; the checkpoints are whole; make room and start again"
    )


def test_one_of_several_ranks_says_what_it_met_and_leaves_where_one_alone_raises(monkeypatch, capsys):
    left: list[int] = []
    monkeypatch.setattr(distributed.os, "_exit", left.append)
    with pytest.raises(UserError, match="no room; make room"):
        distributed.give_up(ALONE, "no room; make room")
    assert not left
    distributed.give_up(replace(ALONE, rank=1, world_size=2), "no room; make room")
    assert left == [1] and capsys.readouterr().err == "train_dpo.py: no room; make room\n"


def test_what_one_of_two_ranks_cannot_write_stands_in_the_status(tiny_policy, tmp_path):
    """Files of at most 100 kB: a checkpoint cannot be written, status.json can."""
    script = tmp_path / "limited.py"
    script.write_text(
        "import resource, signal, sys, train_dpo\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "sys.exit(train_dpo.main(sys.argv[1:]))\n"
    )
    done = ranks.run([str(script), *arguments(tmp_path, tiny_policy, "--log.samples", "0")], ranks=2)
    assert done.codes[0] == 1 and done.codes[1] != 0
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "failed" and "the checkpoints before it are whole" in status["reason"], status
    assert "checkpoint" in status["place"]


def test_a_full_disk_is_one_line_and_no_traceback_on_two_ranks(small_disk, tiny_policy, tmp_path):
    """Rank 0's, at its second line of metrics; the other notices that it is gone."""
    script = tmp_path / "fills.py"
    script.write_text(
        "import sys, train_dpo\n"
        "from pathlib import Path\n"
        "from dpo.runtime.tracking import Recorder\n"
        "from tests.test_disk_full import fill\n"
        "record = Recorder.record\n"
        "def full(recorder, values):\n"
        "    if values.get('step') == 2 and 'loss' in values:\n"
        f"        fill(Path({str(small_disk)!r}), 0)\n"
        "        record(recorder, {'step': 2, 'padding': 'x' * 10_000})\n"
        "    record(recorder, values)\n"
        "Recorder.record = full\n"
        "sys.exit(train_dpo.main(sys.argv[1:]))\n"
    )
    argv = arguments(tmp_path, tiny_policy, "--log.samples", "0", "--train.output_dir", str(small_disk / "run"))
    done = ranks.run([str(script), *argv], ranks=2)
    assert done.codes[0] == 1 and done.codes[1] != 0
    assert done.output.count("/run: No space left on device; the checkpoints are whole; make room and start again") == 1
    assert "OSError" not in done.output, done.output[-3000:]
