"""Damage the checkpoints of a real run in every way, and see that each is told and the one before it taken.

    python -m benchmarks.damage --count 20 --seed 0

A small run of the built-in example leaves two checkpoints. The newer one is damaged again and again, a file, a place
and a bit drawn from the seed, and each time the run's own search for a checkpoint must pass it over by name.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import train_dpo
from dpo.runtime import checkpoint
from dpo.runtime.distributed import World

ALONE = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
STEPS = 4


def _files(folder: Path) -> list[Path]:
    """What a manifest lists, empty files aside."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    return sorted(p for p in found if p.stat().st_size)


def _cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncated(folder: Path, rng: random.Random) -> None:
    """Cut a file, to nothing perhaps."""
    _cut(rng.choice(_files(folder)), rng)


def bit_flipped(folder: Path, rng: random.Random) -> None:
    """Turn over one bit of a file."""
    _flip(rng.choice(_files(folder)), rng)


def missing_file(folder: Path, rng: random.Random) -> None:
    """Delete a file."""
    rng.choice(_files(folder)).unlink()


def damaged_manifest(folder: Path, rng: random.Random) -> None:
    """Cut the manifest, turn over one of its bits, or delete it."""
    path = folder / "manifest.json"
    rng.choice((_cut, _flip, lambda path, rng: path.unlink()))(path, rng)


KINDS: tuple[Callable[[Path, random.Random], None], ...] = (truncated, bit_flipped, missing_file, damaged_manifest)


def train(folder: Path, seed: int) -> Path:
    """A run that leaves checkpoints after steps 2 and 4; its directory."""
    run = folder / "run"
    code = train_dpo.main([
        "--config", "ds_configs/zero2.json", "--recipe", "recipes/quickstart.yaml", "--train.seed", str(seed),
        "--data.train_limit", "32", "--data.validation_limit", "8", "--data.cache_dir", str(folder / "cache"),
        "--train.global_batch_size", "8", "--train.sft_epochs", "0", "--train.epochs", "1", "--train.save_every", "2",
        "--log.samples", "0", "--train.output_dir", str(run),
    ])  # fmt: skip
    assert code == 0
    return run


def detected(run: Path, kind: Callable[[Path, random.Random], None], rng: random.Random) -> bool:
    """Whether a damaged newest checkpoint is named and the one before it taken; the run is as before afterwards."""
    before, last = (run / "checkpoints" / checkpoint.step_folder(step) for step in (STEPS - 2, STEPS))
    whole = run.parent / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    shutil.copytree(last, whole)
    kind(last, rng)
    try:
        found, notes = checkpoint.newest(run, "auto", ALONE, stage=2, precision="fp32", total_steps=STEPS)
        return found == before and notes[0].startswith(f"checkpoint {last} is not used: ")
    finally:
        shutil.rmtree(last)
        whole.rename(last)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="damages of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, told = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as scratch:
        run = train(Path(scratch), options.seed)
        last = run / "checkpoints" / checkpoint.step_folder(STEPS)
        assert checkpoint.newest(run, "auto", ALONE, stage=2, precision="fp32", total_steps=STEPS) == (last, [])
        for kind in KINDS:
            count = sum(detected(run, kind, rng) for _ in range(options.count))
            print(f"{kind.__name__.replace('_', ' ')}: {count} of {options.count} detected")
            told += count
    print(f"seed {options.seed}: {told} of {options.count * len(KINDS)} damaged checkpoints detected")
    return 0 if told == options.count * len(KINDS) else 1


if __name__ == "__main__":
    sys.exit(main())
