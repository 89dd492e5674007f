"""The run directory: what identifies it, checkpoints that resume, and folders in Hugging Face form.

    config.yaml                  the resolved settings; a run started again must have the same ones
    checkpoints/step-000200/     engine state of every rank, state.json
    reference/                   after SFT: the frozen start of DPO
    final/                       the trained policy
    finished.json                written last: the step

Whatever must be whole is written under a temporary name and renamed.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo.config import Config, to_dict
from dpo.errors import UserError
from dpo.runtime.distributed import World, only_main

MAY_CHANGE = (
    "train.epochs", "train.max_steps", "train.eval_every", "train.save_every", "train.keep_checkpoints",
    "train.export_dtype", "train.resume", "train.output_dir", "train.tokens_per_micro_batch", "train.micro_batch_size",
    "train.layout", "model.gradient_checkpointing", "model.attention", "data.workers", "data.cache_dir",
    "log.every", "log.backends", "log.samples", "log.sample_every", "log.sample_tokens",
)
"""Settings that a continued run may change: none of them moves what a step computes."""


@dataclass(frozen=True)
class TrainState:
    """Where a run stands.

    Attributes:
        step: Optimizer steps of DPO that are done.
        num_tokens: Useful tokens seen so far.
    """

    step: int = 0
    num_tokens: int = 0


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def check_run(config: Config, world: World) -> None:
    """Refuse an output directory that holds something else; writes nothing.

    Raises:
        UserError: If the directory holds another run or other files, or train.resume forbids to continue.
    """
    only_main(world, lambda: _check_run(config))


def open_run(config: Config, world: World) -> bool:
    """Create the run directory, or take up the run that is there.

    Returns:
        Whether the run was started before.
    Raises:
        UserError: If the directory cannot be written.
    """
    run = Path(config.train.output_dir)

    def work() -> None:
        try:
            run.mkdir(parents=True, exist_ok=True)
            write_whole(run / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
        except OSError as error:
            raise UserError(f"train.output_dir {run} cannot be written: {error.strerror}; name another") from None

    continued = only_main(world, lambda: (run / "config.yaml").exists())
    only_main(world, work)
    return continued


def finished(run: Path, total_steps: int) -> str | None:
    """A line that says so if the run has already done all its steps and written its results."""
    path = run / "finished.json"
    if not path.exists() or json.loads(path.read_text())["step"] < total_steps:
        return None
    return f"{run} is finished: {total_steps} steps are done; raise train.epochs or train.max_steps to go on"


def _check_run(config: Config) -> None:
    run = Path(config.train.output_dir)
    path = run / "config.yaml"
    if run.exists() and not run.is_dir():
        raise UserError(f"train.output_dir {run} is a file; name a folder")
    if not path.exists():
        if run.exists() and any(run.iterdir()):
            raise UserError(f"train.output_dir {run} holds other files and no run; name a new or empty folder")
        return
    if config.train.resume == "never":
        raise UserError(f"train.output_dir {run} holds a run and train.resume is never; name another folder")
    try:
        old = _flat(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
        raise UserError(f"{path} is not the settings of a run; name another train.output_dir") from None
    new = _flat(to_dict(config))
    changed = [key for key in sorted((old.keys() | new.keys()) - {*MAY_CHANGE}) if old.get(key) != new.get(key)]
    if changed:
        listed = ", ".join(f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in changed)
        raise UserError(
            f"train.output_dir {run} holds another run: {listed}; name another folder, or give the old values to"
            f" continue"
        )


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def step_folder(step: int) -> str:
    """Name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:06d}"


def checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(p.parent for p in (run / "checkpoints").glob("step-*/state.json"))


def save(engine: Any, run: Path, state: TrainState, world: World, keep: int) -> Path:
    """Write a checkpoint; collective.

    Args:
        engine: The training engine.
        run: The run directory.
        state: Where the run stands.
        world: This rank.
        keep: Newest checkpoints to keep; older ones are deleted.
    Returns:
        The checkpoint's folder.
    """
    parent, name = run / "checkpoints", step_folder(state.step)
    partial = parent / f"partial-{name}"
    only_main(world, lambda: shutil.rmtree(partial, ignore_errors=True))
    # DeepSpeed's universal checkpoint format, which other world sizes read, wants this mark under ZeRO-2.
    mark = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
    engine.save_checkpoint(str(parent), tag=partial.name, client_state=mark, save_latest=False)

    def finish() -> None:
        write_whole(partial / "state.json", json.dumps(asdict(state) | {"world_size": world.world_size}))
        shutil.rmtree(parent / name, ignore_errors=True)
        os.replace(partial, parent / name)
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)

    only_main(world, finish)
    return parent / name


def newest(run: Path, resume: str, world: World) -> Path | None:
    """The checkpoint to continue from, the same on every rank.

    Raises:
        UserError: If train.resume names something that is no checkpoint, or one of another world size.
    """

    def find() -> str | None:
        if resume in ("auto", "never"):
            found = checkpoints(run)
            folder = found[-1] if found else None
        else:
            folder = Path(resume)
            if not (folder / "state.json").is_file():
                raise UserError(f"train.resume {resume}: no checkpoint; give a folder such as checkpoints/step-000200")
        if folder is not None:
            size = json.loads((folder / "state.json").read_text())["world_size"]
            if size != world.world_size:
                raise UserError(
                    f"checkpoint {folder} was written by {size} ranks and there are {world.world_size} now;"
                    f" start as many"
                )
        return str(folder) if folder else None

    folder = only_main(world, find)
    return Path(folder) if folder else None


def load(engine: Any, folder: Path) -> TrainState:
    """Bring an engine to a checkpoint; collective.

    Returns:
        Where the run stood.
    """
    engine.load_checkpoint(str(folder.parent), tag=folder.name)
    values = json.loads((folder / "state.json").read_text())
    return TrainState(step=values["step"], num_tokens=values["num_tokens"])


def publish(folder: Path, write: Callable[[Path], None], world: World) -> None:
    """Make a folder appear whole or not at all: rank 0 fills a temporary one and renames it.

    Args:
        folder: Its final name; an older folder of that name is replaced.
        write: Fills the folder it is given; called on rank 0 alone.
        world: This rank.
    """

    def make() -> None:
        partial = folder.with_name(f".partial-{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)

    only_main(world, make)


def versions() -> dict[str, str]:
    """Versions of what computed a run."""
    from importlib.metadata import version

    names = ("torch", "transformers", "deepspeed", "datasets", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
