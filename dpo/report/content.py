"""A run directory -> what the report shows of it; reads whatever a run, or a crashed one, has left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo.errors import UserError
from dpo.report.pairs import PairTable, read_pairs, read_worst
from dpo.runtime.files import read_records

MAIN = (("loss", "loss"), ("rewards/margins", "reward margin"), ("rewards/accuracies", "accuracy"))
"""The metrics that are shown first, and their titles."""


def objective(loss: Mapping[str, Any]) -> str:
    """The section loss in a few words: the names of its losses, with their weights where they are given."""
    name, weights = loss.get("name", "sigmoid"), loss.get("weights")
    names = [name] if isinstance(name, str) else list(name)
    if weights is None:
        return " + ".join(names)
    return " + ".join(f"{weight:g} {name}" for name, weight in zip(names, weights, strict=False))


def is_logistic(loss: Any) -> bool:
    """Whether a margin is the log-odds of a preference: it is under the sigmoid loss alone.

    Args:
        loss: loss.name; None where it is not known.
    """
    return loss in (None, "sigmoid", ["sigmoid"], ("sigmoid",))


@dataclass(frozen=True)
class Content:
    """What there is of a run.

    Attributes:
        name: Of the run directory.
        state: running, finished, or unfinished: stopped, or running elsewhere.
        notes: What is amiss with the files, for the head of the page.
        config: Nested settings, {} where they are missing.
        lines: Of metrics.jsonl.
        pairs: First and latest evaluation, pair by pair.
        worst: Pairs with the most wrong margins, with texts.
        samples: Of the latest step: prompt, reference, policy.
        samples_step: That step.
        audit: Content of audit.json; None where there is none.
        validated_on: Hashes of the validation sets' token ids; None where they are not known.
    """

    name: str
    state: str
    notes: tuple[str, ...]
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    pairs: tuple[PairTable, PairTable] | None
    worst: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    samples_step: int
    audit: Any
    validated_on: list[str] | None = None

    @property
    def last_step(self) -> int:
        """Of DPO, as far as there are lines."""
        return max((line["step"] for line in self.lines if "step" in line), default=0)

    @property
    def objective(self) -> str:
        """The loss of this run, in a few words."""
        return objective(self.config.get("loss") or {})

    @property
    def is_logistic(self) -> bool:
        """Whether margins of this run are log-odds of a preference."""
        return is_logistic(self.setting("loss.name"))

    def setting(self, name: str) -> Any:
        """One setting by its dotted name; None where it is missing."""
        section, key = name.split(".")
        return (self.config.get(section) or {}).get(key)


def read_run(run: Path, *, running: bool = False) -> Content:
    """Read a run directory.

    Args:
        run: The directory.
        running: The caller is the run itself.
    Returns:
        Its content.
    Raises:
        UserError: It is no run directory, or a file in it was spoilt by hand.
    """
    if not (run / "config.yaml").is_file() and not (run / "metrics.jsonl").is_file():
        raise UserError(f"{run} is no run directory: it has neither config.yaml nor metrics.jsonl; give a run's folder")
    lines, torn = read_records(run / "metrics.jsonl")
    notes = []
    state = "running" if running else "finished" if _finished(run / "finished.json", lines) else "unfinished"
    if state == "unfinished":
        where = f"its last whole line is of step {_last(lines)}" if lines else "it has recorded nothing"
        notes.append(f"This run has not finished: it was stopped, or it is still running; {where}.")
    if torn:
        notes.append("The last line of metrics.jsonl is torn, as a killed process leaves it; it is not shown.")
    if state != "running" and not (run / "final").is_dir():
        notes.append("There is no final/: the trained weights have not been written.")
    config = _config(run / "config.yaml", notes)
    rows = read_records(run / "samples.jsonl")[0]
    samples = [row for row in rows if {"prompt", "reference", "policy"} <= row.keys()]
    step = max((row.get("step", 0) for row in samples), default=0)
    return Content(
        name=run.resolve().name, state=state, notes=tuple(notes), config=config, lines=lines, pairs=read_pairs(run),
        worst=read_worst(run), samples=[row for row in samples if row.get("step", 0) == step], samples_step=step,
        audit=_audit(run / "audit.json", notes), validated_on=_validated_on(run / "inputs.json"),
    )  # fmt: skip


def _finished(path: Path, lines: list[dict[str, Any]]) -> bool:
    """Whether the run wrote its results, and has done nothing since (a finished run may be given more steps)."""
    try:
        return json.loads(path.read_text())["step"] >= max((line.get("step", 0) for line in lines), default=0)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _last(lines: list[dict[str, Any]]) -> str:
    last = lines[-1]
    return str(last["step"]) if "step" in last else f"{last.get('sft_step', '?')} of SFT"


def _config(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        return config if isinstance(config, dict) else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        notes.append("config.yaml is missing or cannot be read.")
        return {}


def _validated_on(path: Path) -> list[str] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["validation pairs"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _audit(path: Path, notes: list[str]) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        notes.append("audit.json cannot be read.")
        return None
