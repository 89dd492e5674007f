"""Checkpoints that resume.

    checkpoints/step-000200/     engine state of every rank, state.json, manifest.json; sft-000200 of the SFT stage
                                 (train.save_weights_only: weights/ in place of engine state)

A checkpoint appears whole (folders.py). One damaged later is detected by its manifest, and the one before it is used.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from dpo.errors import UserError, one_line
from dpo.runtime.distributed import World, give_up, only_main, together
from dpo.runtime.files import flush, read_records, write_whole
from dpo.runtime.folders import drop, put_in_place
from dpo.runtime.manifest import complaint, size_of, write_manifest
from dpo.runtime.universal import check_convertible, conversion, differs, load_converted
from dpo.runtime.weights import give_weights, without_code
from dpo.types import TrainState

GIB = 2**30
WEIGHTS = "weights"
ACCURACY = "eval_rewards/accuracies"
Write = Callable[[Path], None]


def step_folder(step: int, kind: str = "step") -> str:
    """Name of the checkpoint after `step` optimizer steps; `kind` is step for DPO and sft for the stage before."""
    return f"{kind}-{step:06d}"


def checkpoints(run: Path, kind: str = "step") -> list[Path]:
    """Checkpoints of a run, oldest first; they were whole when they got their name."""
    found = (p for p in (run / "checkpoints").glob(f"{kind}-*") if p.is_dir())
    return sorted((p for p in found if re.fullmatch(rf"{kind}-\d+", p.name)), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def _read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def _weights_only(folder: Path) -> bool:
    return (folder / WEIGHTS).is_dir()


def best_of(run: Path, folders: list[Path]) -> Path | None:
    """The checkpoint with the best validation accuracy in metrics.jsonl, the later of equals; None if none has one."""
    lines = read_records(run / "metrics.jsonl")[0]
    accuracy = {line.get("step"): line.get(ACCURACY) for line in lines if line.get(ACCURACY) is not None}
    known = [folder for folder in folders if _step_of(folder) in accuracy]
    return max(known, key=lambda folder: (accuracy[_step_of(folder)], _step_of(folder)), default=None)


def _worth_keeping(run: Path, folders: list[Path], keep: int) -> set[Path]:
    """The newest, and the best."""
    best = best_of(run, folders)
    return {*folders[-keep:]} | ({best} if best else set())


def _check_disk(parent: Path, expected_bytes: int, *, weights_only: bool) -> None:
    """Refuse to begin a checkpoint that will not fit: one as large as expected, or as the last one of its sort.

    Raises:
        UserError: If there is too little room; nothing has been written.
    """
    parent.mkdir(parents=True, exist_ok=True)
    folders = sorted((p for p in parent.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
    alike = [folder for folder in folders if _weights_only(folder) == weights_only]
    needed = max([expected_bytes, *map(size_of, alike[-1:])])
    free = shutil.disk_usage(parent).free
    if free < needed:
        last = f"; {folders[-1]} is whole" if folders and size_of(folders[-1]) else ""
        raise UserError(
            f"a checkpoint takes {needed / GIB:.3f} GiB and {parent} has {free / GIB:.3f} GiB left{last}; make room and"
            f" start again, or lower train.keep_checkpoints"
        )


def _write(engine: Any, folder: Path, world: World, more: Write | None, weights: Write | None, state: str) -> None:
    """Fill the folder of a checkpoint; collective."""
    # For DeepSpeed's own converter, which refuses a ZeRO-2 checkpoint without this mark; ours does without it.
    mark = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
    if weights is not None:
        weights(folder / WEIGHTS)
    else:
        engine.save_checkpoint(
            str(folder.parent), tag=folder.name, client_state=mark, save_latest=False,
            exclude_frozen_parameters=_holds_frozen(engine),
        )
        only_main(world, partial(_remove_converters, folder.parent))
    if more is not None:
        more(folder)
    only_main(world, lambda: write_whole(folder / "state.json", state))
    write_manifest(folder, world)


def _remove_converters(parent: Path) -> None:
    """DeepSpeed's own do not know these folders; `python -m dpo export` does."""
    for script in parent.glob("zero_to_*.py"):
        script.unlink()


def save(
    engine: Any,
    run: Path,
    state: TrainState,
    world: World,
    keep: int,
    more: Write | None = None,
    *,
    precision: str,
    weights: Write | None = None,
    kind: str = "step",
    expected_bytes: int = 0,
) -> Path:
    """Write a checkpoint; collective.

    Args:
        engine: The training engine.
        run: The run directory.
        state: Where the run stands.
        world: This rank.
        keep: Newest checkpoints to keep; of the older ones only the best by validation accuracy stays.
        more: Writes into the folder what else the run needs; called on every rank.
        precision: Of the engine: fp16, bf16 or fp32.
        weights: Writes the weights as a folder, which then stand for the engine; called on every rank.
        kind: See `step_folder`.
        expected_bytes: What it will take on disk at least.
    Returns:
        The checkpoint's folder.
    Raises:
        UserError: If the disk has too little room, or it cannot be written; the checkpoints that are there stay.
    """
    parent, name = run / "checkpoints", step_folder(state.step, kind)
    unfinished = parent / f"partial-{name}"

    def begin() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        _check_disk(parent, expected_bytes, weights_only=weights is not None)

    only_main(world, begin)
    fits = {
        "world_size": world.world_size, "zero_stage": engine.zero_optimization_stage(), "precision": precision,
    }  # fmt: skip
    trouble: str | None = None
    metrics = run / "metrics.jsonl"
    try:
        if world.is_main and metrics.exists():  # a checkpoint knows of no step whose line a loss of power can take
            flush(metrics)
        _write(engine, unfinished, world, more, weights, json.dumps(asdict(state) | fits))
    except (OSError, RuntimeError) as error:
        if not _is_of_disk(error):  # a rank that is gone, or memory: others know what to say of it
            raise
        trouble = one_line(error, 300)
    if trouble is not None:  # only now is every file closed, and its room free once it is deleted
        shutil.rmtree(unfinished, ignore_errors=True)
        who = f"rank {world.rank} on {platform.node()}"
        give_up(
            world,
            f"checkpoint {unfinished} cannot be written by {who}: {trouble}; the checkpoints before it are whole; make"
            f" room and start again",
        )

    def finish() -> None:
        put_in_place(unfinished, parent / name)
        folders = checkpoints(run, kind)
        for old in set(folders) - _worth_keeping(run, folders, keep):
            drop(old)

    only_main(world, finish)
    return parent / name


def _is_of_disk(error: Exception) -> bool:
    """Whether a file could not be written; torch says so by an error of its own."""
    return isinstance(error, OSError) or bool(re.search("PytorchStreamWriter|inline_container", str(error)))


def _holds_frozen(engine: Any) -> bool:
    """Whether an engine holds weights that never change, which a checkpoint leaves out: those beneath adapters."""
    return any(not p.requires_grad for p in engine.module.parameters())


def newest(
    run: Path, resume: str, world: World, *, stage: int, precision: str, total_steps: int, kind: str = "step"
) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, the same on every rank; collective.

    Args:
        run: The run directory.
        resume: train.resume.
        world: This rank.
        stage, precision: ZeRO stage and precision of this start.
        total_steps: Steps of this start.
        kind: See `step_folder`.
    Returns:
        Its folder, None where there is none, and lines for the log: damaged ones that were passed over, and whether
        it is converted.
    Raises:
        UserError: If train.resume names no checkpoint of this run, if it does not fit this start, or if every
            checkpoint is damaged.
    """
    candidates = only_main(world, lambda: _candidates(run, resume, kind))
    notes: list[str] = []
    for folder in candidates:
        wrong = complaint(folder, world)
        if wrong is None:
            only_main(world, partial(_check_fit, folder, world, stage, precision, total_steps))
            values = only_main(world, partial(_read_state, folder))
            if only_main(world, partial(_weights_only, folder)):
                notes.append(f"checkpoint {folder} holds the weights alone: AdamW's moments start anew")
            elif differs(values, world, stage):
                notes.append(f"checkpoint {folder} {conversion(values, world, stage)}")
            return folder, notes
        notes.append(f"checkpoint {folder} is not used: {wrong}")
    if notes and resume not in ("auto", "never"):
        raise UserError(f"{'; '.join(notes)}; name another in train.resume, or let auto take the newest whole one")
    if notes:
        raise UserError(
            f"{'; '.join(notes)}; there is no whole checkpoint left: delete {run / 'checkpoints'} and"
            f" {run / 'status.json'} to start from the beginning"
        )
    return None, []


def _candidates(run: Path, resume: str, kind: str) -> list[Path]:
    """Checkpoints to try, in order."""
    folders = checkpoints(run, kind)
    if resume in ("auto", "never"):
        return folders[::-1]
    folder = Path(resume).resolve()
    if folder not in [c.resolve() for c in folders]:
        there = ", ".join(found.name for found in folders)
        raise UserError(
            f"train.resume {resume} is no checkpoint of {run}; "
            + (f"it has {there} in {run}/checkpoints" if there else "it has none")
            + "; auto takes the newest"
        )
    return [run / "checkpoints" / folder.name]


def _check_fit(folder: Path, world: World, stage: int, precision: str, total_steps: int) -> None:
    """Refuse a checkpoint that this start cannot take up.

    Raises:
        UserError: If the ZeRO stage, the precision or the number of steps does not fit.
    """
    values = _read_state(folder)
    if not _weights_only(folder):
        check_convertible(folder, values, world, stage)
        if values.get("precision", precision) != precision:
            raise UserError(
                f"checkpoint {folder} was written in {values['precision']} and this start computes in {precision}: its"
                f" optimizer and loss scale do not fit; go on where train.precision can be {values['precision']}"
            )
    if values["step"] > total_steps:
        raise UserError(
            f"checkpoint {folder} is beyond the {total_steps} steps asked for; raise train.max_steps or"
            f" train.epochs"
        )


def load(engine: Any, folder: Path, world: World, read: Callable[[Path], nn.Module] | None = None) -> TrainState:
    """Bring an engine to a checkpoint, and drop later ones, whose steps are done again; collective.

    Args:
        engine: Newly started.
        folder: Of the checkpoint.
        world: This rank.
        read: Makes a model of the folder of a checkpoint of the weights alone; called on rank 0.
    Returns:
        Where the run stood.
    Raises:
        UserError: If DeepSpeed finds nothing in the folder.
    """

    def drop_later() -> None:
        every = checkpoints(folder.parent.parent, folder.name.split("-")[0])
        for later in every[every.index(folder) + 1 :]:
            drop(later)

    values, is_there = only_main(world, partial(_read_state, folder)), True
    if only_main(world, partial(_weights_only, folder)):
        assert read is not None
        give_weights(engine, engine.module.model, together(lambda: read(folder / WEIGHTS) if world.is_main else None))
    elif differs(values, world, engine.zero_optimization_stage()):
        is_there = load_converted(engine, folder, world, values["world_size"], values["zero_stage"])
    else:
        try:
            with without_code(folder):
                loaded, _ = engine.load_checkpoint(
                    str(folder.parent), tag=folder.name, load_module_strict=not _holds_frozen(engine)
                )
        except UserError as error:  # each rank reads a part of its own, and the others may wait in a collective
            give_up(world, str(error))
        is_there = loaded is not None
    if not is_there:
        raise UserError(f"checkpoint {folder} holds no engine state; delete the folder to use the one before")
    only_main(world, drop_later)
    known = {field.name: values[field.name] for field in fields(TrainState) if field.name in values}
    return TrainState(**known | {"unlogged": tuple(values["unlogged"])})
