"""The run directory: whose it is, and whether it is finished.

    config.yaml      the resolved settings; a run started again must have the same ones, but for MAY_CHANGE
    .lock            held by the process that trains there
    status.json      running, preempted, failed or finished
    finished.json    written last: the step
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import yaml

from dpo.config import Config, to_dict
from dpo.errors import UserError
from dpo.runtime.distributed import World, only_main, together
from dpo.runtime.files import write_whole
from dpo.runtime.status import read_status

MAY_CHANGE = (
    "train.epochs", "train.max_steps", "train.eval_every", "train.save_every", "train.keep_checkpoints",
    "train.save_weights_only", "train.hang_timeout", "train.on_nonfinite", "train.max_nonfinite",
    "train.export_dtype", "train.resume", "train.output_dir", "train.tokens_per_micro_batch", "train.micro_batch_size",
    "train.sequence_parallel_size", "train.deterministic", "train.layout", "train.static_shapes",
    "model.gradient_checkpointing", "model.attention", "model.loss_in_forward", "model.vocabulary_multiple",
    "model.compile", "data.workers", "data.cache_dir", "reference.cache_dir", "log.every", "log.backends",
    "log.samples", "log.sample_every", "log.sample_tokens",
)
"""Settings that a continued run may change: the steps that are done stay what they were. train.epochs and
train.max_steps stretch the decay of the learning rate over the steps to come; no other moves what a step computes."""


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def check_run(config: Config) -> None:
    """Refuse an output directory that holds something else; writes nothing; on rank 0.

    Raises:
        UserError: If the directory holds another run or other files, or train.resume forbids to continue.
    """
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
    if changed and has_begun(run):
        listed = ", ".join(f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in changed)
        raise UserError(
            f"train.output_dir {run} holds another run: {listed}; name another folder, or give the old values to"
            f" continue"
        )


@contextmanager
def opened(config: Config, world: World) -> Iterator[None]:
    """Create the run directory, or take up the run that is there, and keep other processes out of it; collective.

    Raises:
        UserError: If the directory cannot be written, another process trains in it, or a rank does not see it.
    """
    run, held = Path(config.train.output_dir), ExitStack()

    def work() -> None:
        try:
            run.mkdir(parents=True, exist_ok=True)
            _lock(held.enter_context(open(run / ".lock", "a+", encoding="utf-8")), run)
            write_whole(run / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
        except OSError as error:
            raise UserError(f"train.output_dir {run} cannot be written: {error.strerror}; name another") from None

    with held:
        only_main(world, work)
        together(partial(_check_seen, run, world))
        yield


def _lock(stream: IO[str], run: Path) -> None:
    """Lock a file: whoever has it trains in the run, until the process ends, however it ends."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        who = stream.read().strip() or "another process"
        raise UserError(
            f"train.output_dir {run} is in use by {who}; wait for its end, or name another (if that process is gone:"
            f" delete {run}/.lock)"
        ) from None
    except OSError:  # a file system without locks
        return
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {platform.node()}\n")
    stream.flush()


def _check_seen(run: Path, world: World) -> None:
    """Refuse a folder of one node's own disk: checkpoints are written by all ranks and read by others."""
    os.listdir(run.parent if run.parent.is_dir() else ".")  # has a network file system look again
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"train.output_dir {run} is not there for rank {world.rank} on {platform.node()}; name a folder on a disk"
            f" that all nodes share"
        )


def versions(*more: str) -> dict[str, str]:
    """Versions of what computed a run, and of `more` that did."""
    from importlib.metadata import version

    names = ("torch", "transformers", "deepspeed", "datasets", "numpy", *more)
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def finished(run: Path, total_steps: int) -> str | None:
    """A line that says so if the run has already done all its steps and written its results."""
    path = run / "finished.json"
    done = json.loads(path.read_text())["step"] if path.exists() else 0
    if done < total_steps or not done:
        return None
    asked = "" if done == total_steps else f", of {total_steps} that are asked for"
    return (
        f"{run} is finished: {done} steps are done{asked}; raise train.epochs or train.max_steps to go on; other"
        f" settings change nothing now (another dtype of final/: python -m dpo export {run} --dtype bf16)"
    )


def reopen(run: Path, step: int) -> None:
    """Take a run that has been finished for unfinished, where it goes on from an earlier step."""
    path = run / "finished.json"
    if path.exists() and json.loads(path.read_text())["step"] > step:
        path.unlink()


def check_kept(run: Path) -> None:
    """Refuse to begin a run anew whose checkpoints have been removed.

    Raises:
        UserError: If status.json says that steps were safe on disk; called where there is no checkpoint.
    """
    step = read_status(run).get("step", 0)
    if step:
        raise UserError(
            f"{run} had a checkpoint of step {step}, and holds none: put its checkpoints/ back; to begin anew name"
            f" another train.output_dir, or delete {run}/status.json"
        )


def has_begun(run: Path) -> bool:
    """Whether there is anything in a run directory that other settings would spoil."""
    metrics = run / "metrics.jsonl"
    if any((run / "checkpoints").glob("*-*")) or (run / "reference").exists():
        return True
    return metrics.exists() and metrics.stat().st_size > 0
