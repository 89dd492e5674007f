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
from dpo.runtime.files import write_whole

MAY_CHANGE = (
    "train.epochs", "train.max_steps", "train.eval_every", "train.save_every", "train.keep_checkpoints",
    "train.export_dtype", "train.resume", "train.output_dir", "train.tokens_per_micro_batch", "train.micro_batch_size",
    "train.layout", "train.static_shapes", "model.gradient_checkpointing", "model.attention",
    "model.loss_in_forward", "model.vocabulary_multiple", "model.compile",
    "data.workers", "data.cache_dir", "log.every", "log.backends", "log.samples", "log.sample_every",
    "log.sample_tokens",
)
"""Settings that a continued run may change: none of them moves what a step computes."""


@dataclass(frozen=True)
class TrainState:
    """Where a run stands.

    Attributes:
        step: Optimizer steps of DPO that are done.
        num_tokens: Useful tokens seen so far.
        unlogged: What the next line of metrics.jsonl already holds, summed over all ranks.
        running: What the objective carries from step to step.
    """

    step: int = 0
    num_tokens: int = 0
    unlogged: tuple[float, ...] = ()
    running: float = 0.0


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


def open_run(config: Config, world: World) -> None:
    """Create the run directory, or take up the run that is there.

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

    only_main(world, work)


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
    if changed and _has_begun(run):
        listed = ", ".join(f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in changed)
        raise UserError(
            f"train.output_dir {run} holds another run: {listed}; name another folder, or give the old values to"
            f" continue"
        )


def _has_begun(run: Path) -> bool:
    """Whether there is anything in a run directory that other settings would spoil."""
    metrics = run / "metrics.jsonl"
    return bool(checkpoints(run)) or (run / "reference").exists() or (metrics.exists() and metrics.stat().st_size > 0)


def step_folder(step: int) -> str:
    """Name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:06d}"


def checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(p.parent for p in (run / "checkpoints").glob("step-*/state.json"))


def save(
    engine: Any, run: Path, state: TrainState, world: World, keep: int, more: Callable[[Path], None] | None = None
) -> Path:
    """Write a checkpoint; collective.

    Args:
        engine: The training engine.
        run: The run directory.
        state: Where the run stands.
        world: This rank.
        keep: Newest checkpoints to keep; older ones are deleted.
        more: Writes into the folder what else the run needs; called on every rank.
    Returns:
        The checkpoint's folder.
    """
    parent, name = run / "checkpoints", step_folder(state.step)
    partial = parent / f"partial-{name}"
    only_main(world, lambda: shutil.rmtree(partial, ignore_errors=True))
    # DeepSpeed's universal checkpoint format, which other world sizes read, wants this mark under ZeRO-2.
    mark = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
    engine.save_checkpoint(
        str(parent), tag=partial.name, client_state=mark, save_latest=False,
        exclude_frozen_parameters=_holds_frozen(engine),
    )
    if more is not None:
        more(partial)

    def finish() -> None:
        fits = {"world_size": world.world_size, "zero_stage": engine.zero_optimization_stage()}
        write_whole(partial / "state.json", json.dumps(asdict(state) | fits))
        shutil.rmtree(parent / name, ignore_errors=True)
        os.replace(partial, parent / name)
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)

    only_main(world, finish)
    return parent / name


def _holds_frozen(engine: Any) -> bool:
    """Whether an engine holds weights that never change, which a checkpoint leaves out: those beneath adapters."""
    return any(not p.requires_grad for p in engine.module.parameters())


def newest(run: Path, resume: str, world: World, *, stage: int, total_steps: int) -> Path | None:
    """The checkpoint to continue from, the same on every rank.

    Args:
        run: The run directory.
        resume: train.resume.
        world: This rank.
        stage: ZeRO stage of this start.
        total_steps: Steps of this start.
    Raises:
        UserError: If train.resume names no checkpoint of this run, or it does not fit this start.
    """

    def find() -> Path | None:
        if resume in ("auto", "never"):
            return next(iter(reversed(checkpoints(run))), None)
        folder = Path(resume).resolve()
        if folder not in [c.resolve() for c in checkpoints(run)]:
            raise UserError(
                f"train.resume {resume} is no checkpoint of {run}; give a folder such as {run}/checkpoints/step-000200"
            )
        return run / "checkpoints" / folder.name

    def checked() -> Path | None:
        folder = find()
        if folder is None:
            return None
        values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if values["world_size"] != world.world_size:
            raise UserError(
                f"checkpoint {folder} was written by {values['world_size']} ranks and there are {world.world_size}"
                f" now; start as many"
            )
        if values["zero_stage"] != stage:
            raise UserError(
                f"checkpoint {folder} was written under ZeRO-{values['zero_stage']}, this is ZeRO-{stage}; give the"
                f" same --config"
            )
        if values["step"] > total_steps:
            raise UserError(
                f"checkpoint {folder} is beyond the {total_steps} steps asked for; raise train.max_steps or"
                f" train.epochs"
            )
        return folder

    return only_main(world, checked)


def load(engine: Any, folder: Path, world: World) -> TrainState:
    """Bring an engine to a checkpoint, and drop later ones, whose steps are done again; collective.

    Returns:
        Where the run stood.
    Raises:
        UserError: If DeepSpeed finds nothing in the folder.
    """

    def state() -> dict[str, Any]:
        for later in checkpoints(folder.parent.parent):
            if later.name > folder.name:
                shutil.rmtree(later)
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))

    loaded, _ = engine.load_checkpoint(
        str(folder.parent), tag=folder.name, load_module_strict=not _holds_frozen(engine)
    )
    if loaded is None:
        raise UserError(f"checkpoint {folder} holds no engine state; delete the folder to use the one before")
    values = only_main(world, state)
    return TrainState(values["step"], values["num_tokens"], tuple(values["unlogged"]), values.get("running", 0.0))


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
