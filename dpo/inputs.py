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
from dpo.data.mixture import Mixture, Pairs
from dpo.errors import UserError
from dpo.model import adapters, load
from dpo.runtime import run_directory
from dpo.runtime.distributed import only_main
from dpo.runtime.files import write_whole
from dpo.setup import Setup

WEIGHTS, SAMPLES = (".safetensors", ".bin"), 16


def check_inputs(setup: Setup) -> None:
    """Write what a new run is on; refuse to continue one on anything else; collective.

    Args:
        setup: The run; its directory exists.
    Raises:
        UserError: Naming what has changed.
    """
    only_main(setup.world, lambda: _check(setup))


def _check(setup: Setup) -> None:
    path, config = setup.run / "inputs.json", setup.config
    now = {
        "training pairs": _tokens(setup.train_pairs),
        "validation pairs": None if setup.validation_pairs is None else _tokens(setup.validation_pairs),
        f"model.policy {config.model.policy}": _weights(config, config.model.policy, is_policy=True),
        f"reference.path {config.reference.path}": _weights(config, config.reference.path, is_policy=False),
    }
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


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _tokens(pairs: Pairs) -> str:
    """Hash of every token id, and of how the pairs are cut."""
    digest = xxhash.xxh3_128()
    for part in pairs.parts if isinstance(pairs, Mixture) else [pairs]:
        digest.update(part.lengths.tobytes())
        digest.update(part.tokens.data)
    return digest.hexdigest()


def _weights(config: Config, path: str | None, *, is_policy: bool) -> Any:
    """Which weights a path stands for: of a folder its files, of a hub id its commit."""
    if path is None:
        return None
    found: list[Any] = []
    base, revision = adapters.base_of(path, config.revision_of(path, is_policy=is_policy))
    for place in dict.fromkeys((path, base)):
        if Path(place).is_dir():
            files = sorted(file for file in Path(place).iterdir() if file.suffix in WEIGHTS)
            found.append([[file.name, _sample(file)] for file in files])
    if not Path(base).is_dir() and not base.startswith("builtin:"):
        trust = config.model.trust_remote_code
        found.append(getattr(load.load_config(base, revision=revision, trust_remote_code=trust), "_commit_hash", None))
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
