"""TensorBoard, Weights & Biases and trackio: the lines of metrics.jsonl, under the same names and axes in all three.

DPO lines keep their names over the axis `step`; lines of the SFT stage are `sft/loss`, `sft/grad_norm`, ... over
`sft/step`. A run that is resumed continues the one that is there, and no step is drawn twice:

    TensorBoard   what was written at or after the first new step is purged, and so replaced
    the others    forget nothing: steps that they were sent before the run was killed are not sent again; a resumed run
                  computes the same numbers (speed aside), so nothing is missing

trackers.json in the run directory holds the id of the run and how far each of the others was told.
"""

from __future__ import annotations

import importlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from dpo.runtime.files import read_records, write_whole

Line = dict[str, Any]
Backend = tuple[Callable[[Line], None], Callable[[], None]]
"""write(line) and finish()."""


def named(line: Line) -> tuple[str, int, dict[str, float]]:
    """How trackers see a line.

    Args:
        line: Of metrics.jsonl.
    Returns:
        The axis, `step` or `sft/step`; the step; the other numbers by name, without what is missing.
    """
    axis = "sft/step" if "sft_step" in line else "step"
    numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and k not in ("step", "sft_step")}
    if axis == "sft/step":
        numbers = {f"sft/{name.replace('sft_', '')}": value for name, value in numbers.items()}
    return axis, int(line["sft_step" if axis == "sft/step" else "step"]), numbers


def _kind(line: Line) -> str:
    """Which of the lines of a step: of SFT, of training, of an evaluation, of samples."""
    if "sft_step" in line:
        return "sft"
    return next((k for k in ("eval_", "samples/") if any(name.startswith(k) for name in line)), "train")


def _attached(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The resolved settings, and the audit of the data where there is one."""
    audit = run / "audit.json"
    return config | ({"audit": json.loads(audit.read_text(encoding="utf-8"))} if audit.exists() else {})


def tensorboard(run: Path, config: dict[str, Any], lines: Sequence[Line]) -> Backend:
    """Write event files below RUN/tensorboard, those of SFT in a folder of their own: a purge spares no step of its
    folder."""
    from torch.utils.tensorboard import SummaryWriter

    writers: dict[str, Any] = {}

    def writer_of(axis: str, step: int) -> Any:
        if axis not in writers:
            folder = run / "tensorboard" / ("sft" if axis == "sft/step" else "dpo")
            is_new = not folder.exists()
            writers[axis] = SummaryWriter(str(folder), purge_step=step)
            if is_new:
                for name, value in _attached(run, {"config": config}).items():
                    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
                    # Indented, it is code: nothing in it is markup.
                    writers[axis].add_text(name, "".join(f"    {row}\n" for row in text.split("\n")), step)
        return writers[axis]

    def write(line: Line) -> None:
        axis, step, numbers = named(line)
        if axis not in writers:  # the purge takes what a step that is half told has already
            for earlier in read_records(run / "metrics.jsonl")[0]:
                of_axis, of_step, values = named(earlier)
                if (of_axis, of_step) == (axis, step):
                    numbers = values | numbers
        writer = writer_of(axis, step)
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # what a killed process had not flushed would be missing for good

    def finish() -> None:
        for writer in writers.values():
            writer.close()

    return write, finish


def _told(run: Path, name: str, lines: Sequence[Line]) -> tuple[str, dict[str, int]]:
    """The id of a tracker's run, and the last step of each kind of line that it was sent; kept in trackers.json.

    Args:
        run: The run directory.
        name: Of the tracker.
        lines: Of metrics.jsonl as the process before left it.
    """
    path = run / "trackers.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    mine = known.get(name)
    if mine is None:  # a tracker that joins now was sent nothing
        mine = {"id": uuid.uuid4().hex[:8], "told": {}}
    else:
        for line in lines:
            kind, step = _kind(line), named(line)[1]
            mine["told"][kind] = max(step, mine["told"].get(kind, -1))
    write_whole(path, json.dumps(known | {name: mine}, indent=1))
    return mine["id"], mine["told"]


def wandb_like(module_name: str) -> Callable[[Path, dict[str, Any], Sequence[Line]], Backend]:
    """A backend for Weights & Biases, or for trackio, which has its functions."""

    def start(run: Path, config: dict[str, Any], lines: Sequence[Line]) -> Backend:
        module = importlib.import_module(module_name)
        identity, told = _told(run, module_name, lines)
        if module_name == "wandb":
            name = os.environ.get("WANDB_NAME", run.name)
            own = {"project": os.environ.get("WANDB_PROJECT", "dpo"), "id": identity, "name": name, "dir": str(run)}
        else:
            own = {"project": "dpo", "name": f"{run.name}-{identity}"}  # trackio knows runs by their name
        module.init(resume="allow", config=_attached(run, config), **own)
        known: set[str] = set()

        def write(line: Line) -> None:
            axis, step, numbers = named(line)
            for name in sorted(numbers.keys() - known) if hasattr(module, "define_metric") else ():
                module.define_metric(name, step_metric=axis)
                known.add(name)
            if step > told.get(_kind(line), -1):
                module.log(numbers | {axis: step})

        return write, module.finish

    return start


BACKENDS = {"tensorboard": tensorboard, "wandb": wandb_like("wandb"), "trackio": wandb_like("trackio")}
