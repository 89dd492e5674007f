"""The script that damages checkpoints counts what was told, and what was not."""

from __future__ import annotations

import random
import sys

from benchmarks import damage
from dpo.runtime import checkpoint, manifest


def test_every_kind_of_damage_to_a_real_checkpoint_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["damage", "--count", "2", "--seed", "3"])
    assert damage.main() == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "seed 3: 8 of 8 damaged checkpoints detected"
    assert [line.split(":")[0] for line in printed[-5:-1]] == [
        "truncated", "bit flipped", "missing file", "damaged manifest",
    ]  # fmt: skip


def test_damage_that_nobody_looks_for_is_not_counted_as_detected(tmp_path, monkeypatch):
    run = tmp_path / "run"
    for step in (2, 4):
        folder = run / "checkpoints" / checkpoint.step_folder(step)
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"weights of some step")
        (folder / "state.json").write_text('{"step": 2, "world_size": 1, "zero_stage": 2}')
        manifest.write_manifest(folder, damage.ALONE)
    before = (folder / "weights").read_bytes()
    assert damage.detected(run, damage.bit_flipped, random.Random(1))
    assert (folder / "weights").read_bytes() == before
    monkeypatch.setattr(checkpoint, "complaint", lambda folder, world: None)
    monkeypatch.setattr(damage, "_files", lambda folder: [folder / "weights"])  # a start would stumble over the others
    for kind in damage.KINDS[:2]:
        assert not damage.detected(run, kind, random.Random(1))
