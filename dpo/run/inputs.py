"""inputs.json of a run: what its data and weights were at the first start, so that a continued run is on the same ones.

A path names them in config.yaml, and what lies there may change between two starts: a file is written anew, a hub gets
a new commit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from dpo.config import Config
from dpo.errors import UserError
from dpo.model import adapters, load
from dpo.run import roles
from dpo.run.setup import Setup
from dpo.runtime import run_directory
from dpo.runtime.files import write_whole

SAMPLES = 16
"""Pieces of a weight file that are hashed."""


def check_inputs(setup: Setup) -> None:
    """Write what a new run is on; refuse to continue one on anything else; on rank 0.

    Args:
        setup: The run; its directory exists.
    Raises:
        UserError: Naming what has changed.
    """
    path = setup.run / "inputs.json"
    now: dict[str, Any] = _pairs(setup) | _start(setup.config, setup.run)
    before = _read(path) if run_directory.has_begun(setup.run) else None
    if before is None:
        write_whole(path, json.dumps(now, indent=1))
        return
    changed = [name for name, value in now.items() if name in before and before[name] != value]
    if changed:
        raise UserError(
            f"{setup.run} was begun on other inputs: {' and '.join(changed)} changed since; name another"
            f" train.output_dir, or, to go on all the same, delete {path}"
        )


def changed_pairs(setup: Setup, run: Path) -> list[str]:
    """Names of the data sets of a run that are no longer what it was begun on, as far as that is written down.

    Args:
        setup: Of the run's settings.
        run: Where the run directory is now.
    """
    before = _read(run / "inputs.json") or {}
    return [name for name, digests in _pairs(setup).items() if before.get(name, digests) != digests]


def changed_weights(config: Config, run: Path) -> list[str]:
    """Settings of a run whose weights are no longer what it was begun on, as far as that is written down.

    Args:
        config: The run's settings.
        run: Where the run directory is now.
    """
    before = _read(run / "inputs.json") or {}
    return [name for name, now in _start(config, run).items() if before.get(name, now) != now]


def _start(config: Config, run: Path) -> dict[str, Any]:
    """The weights that a run starts from and is measured against; after SFT of a whole model its result is that."""
    reference, policy = config.reference.path, config.model.policy
    now = {f"reference.path {reference}": _weights(config, reference, is_policy=False)}
    if roles.trains_adapters(config) or not (run / "reference").is_dir():
        now[f"model.policy {policy}"] = _weights(config, policy, is_policy=True)
    return now


def _pairs(setup: Setup) -> dict[str, list[str]]:
    return {
        "training pairs": [one.report.digest for one in setup.data.train],
        "validation pairs": [one.report.digest for one in setup.data.validation],
    }


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _weights(config: Config, path: str | None, *, is_policy: bool) -> Any:
    """The weights that a path or hub id stands for: files and samples of them, of an adapter and its base both."""
    if path is None:
        return None
    base, revision = adapters.base_of(path, config.revision_of(path, is_policy=is_policy))
    found: dict[str, str] = {}
    for place, at in [(base, revision)] + ([(path, None)] if path != base else []):
        folder = load.fetch_weights(place, revision=at, name="model.policy" if is_policy else "reference.path")
        if folder is not None:
            files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*model*.bin"))
            found |= {f"{place} {file.name}": _sample(file) for file in files}
    return found


def _sample(file: Path) -> str:
    """Hash of a file's size and of SAMPLES pieces of it, which training changes all; a copy has the same."""
    size = file.stat().st_size
    digest = xxhash.xxh3_128(str(size).encode())
    with open(file, "rb") as stream:
        for place in range(SAMPLES):
            stream.seek(size * place // SAMPLES)
            digest.update(stream.read(1 << 16))
    return digest.hexdigest()
