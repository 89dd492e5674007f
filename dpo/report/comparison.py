"""Several runs beside each other: their figures, the settings in which they differ, what cannot be compared."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo.config import OptimConfig
from dpo.errors import UserError
from dpo.objective.catalog import needs_reference
from dpo.report import panels
from dpo.report.content import MAIN, Content

MAX_ANSWERS = 24


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """What to call runs: as much of the end of each path as tells them apart.

    Raises:
        UserError: One is named twice.
    """
    paths = [run.resolve() for run in runs]
    twice = next((run for run, path in zip(runs, paths, strict=True) if paths.count(path) > 1), None)
    if twice is not None:
        raise UserError(f"{twice} is named twice; name each run once")
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = [str(Path(*path.parts[-depth:])) for path in paths]
        if len({*names}) == len(names):
            return names
    return [str(path) for path in paths]


def side_by_side(runs: Sequence[Content]) -> dict[str, Any]:
    """What the page of several runs shows beside their curves.

    Args:
        runs: At least two.
    Returns:
        `rows`: (title, value of every run); `changed`: settings likewise; `warnings`: what cannot be compared;
        `shared`: (prompt, answer of every run's policy).
    """
    rows: list[tuple[str, list[Any]]] = [
        ("state", [run.state for run in runs]),
        ("steps", [run.last_step for run in runs]),
        ("validation pairs", [len(run.pairs[1].values) if run.pairs else None for run in runs]),
    ]
    for name, title in MAIN:
        for kind, prefix in (("validation", "eval_"), ("training", "")):
            rows.append((f"{title}, {kind}, last", [_last_value(run, prefix + name) for run in runs]))
    rows.append(("accuracy, validation, best", [_best(run, "eval_rewards/accuracies") for run in runs]))
    of_pairs = [_facts(run) for run in runs]
    rows.append(("accuracy beyond the first run's, paired", [_gain(run, runs[0]) for run in runs]))
    rows += [(title, [facts.get(title) for facts in of_pairs]) for title in FACTS]
    rows.append(("pairs a second, last", [_last_value(run, "perf/pairs_per_second") for run in runs]))
    changed = _changed_settings(runs)
    return {"rows": rows, "changed": changed, "warnings": _warnings(runs, changed), "shared": _shared_answers(runs)}


FACTS = ("chosen log-prob fell, share", "margin and length, correlation", "calibration error", "log-ratio of answers")


def _facts(run: Content) -> dict[str, float | None]:
    kl = _last_value(run, "samples/kl")
    if run.pairs is None or not len(run.pairs[1].values):
        return {FACTS[3]: kl}
    first, latest = run.pairs
    moved, lengths, calibration = panels.displacement(first, latest), panels.lengths(latest), None
    if run.is_logistic:
        calibration = panels.calibration(latest.margins).error
    return dict(zip(FACTS, (moved.chosen_fell, lengths.correlation, calibration, kl), strict=True))


def _gain(run: Content, first: Content) -> str | None:
    """How much more often a run is right than the first one on the same pairs, with the standard error of that."""
    known = run.validated_on is not None and run.validated_on == first.validated_on
    if run is first or not known or run.pairs is None or first.pairs is None:
        return None
    own, others = run.pairs[1], first.pairs[1]
    if len(own.values) == 0 or not np.array_equal(own["pair_id"], others["pair_id"]):
        return None
    return panels.with_error(panels.accuracies(own.margins) - panels.accuracies(others.margins), sign="+")


def _last_value(run: Content, name: str) -> float | None:
    return next((line[name] for line in reversed(run.lines) if line.get(name) is not None), None)


def _best(run: Content, name: str) -> str | None:
    """The highest value of a metric after training has begun and its step, the later of equals."""
    found = [(line[name], line["step"]) for line in run.lines if line.get(name) is not None and line["step"] > 0]
    return "{:.4g} at step {}".format(*max(found)) if found else None


OF_SFT = re.compile(
    r"model\.(policy|revision|lora|tokenizer\w*|chat_template)"
    r"|data\.(?!(validation|validation_split|validation_limit|workers|cache_dir)$).*"
    r"|optim\.(?!lr$).*|train\.(seed|sft_epochs|global_batch_size|precision)"
)
"""Settings that the result of an SFT stage depends on; optim.lr does so by optim.sft_lr."""


def _warnings(runs: Sequence[Content], changed: Sequence[tuple[str, list[Any]]]) -> list[str]:
    """What cannot be compared between the runs."""
    names, found = [name for name, _ in changed], []
    known = [run.validated_on for run in runs if run.validated_on is not None]
    if any(pairs != known[0] for pairs in known):
        found.append(
            "The validation pairs differ, or are cut or tokenised otherwise: what is measured on them, losses, margins"
            " and accuracies, cannot be compared."
        )
    if any(name.startswith("loss.") for name in names):
        found.append(
            "The objectives differ: their losses cannot be compared, margins scale with beta, and accuracies can be"
            " compared where all have a reference or none has."
        )
    if len(_references(runs)) > 1:
        found.append(
            "The references that rewards are measured from differ: they are the weights that model.policy names, and"
            " a run with train.sft_epochs makes its own. To share these: --model.policy RUN/reference"
            " --train.sft_epochs 0."
        )
    return found


def _references(runs: Sequence[Content]) -> set[str]:
    """The models that the runs measure rewards from; SFT under the same settings makes the same."""
    made: dict[str, str] = {}
    found = set()
    for settings in map(_settings, runs):
        loss, place = settings.get("loss.name", "sigmoid"), settings.get("reference.path")
        names: list[Any] = [loss] if isinstance(loss, str) else loss
        if not needs_reference(names, settings.get("loss.reference_free", False)):
            continue
        if place is None and settings.get("train.sft_epochs"):
            how = json.dumps({name: value for name, value in settings.items() if OF_SFT.fullmatch(name)})
            place = made.setdefault(how, f"{settings.get('train.output_dir')}/reference")
        found.add(str(Path(place or settings.get("model.policy", "")).resolve()))
    return found


def _settings(run: Content) -> dict[str, Any]:
    """Settings by their dotted names; the rate of SFT where there was such a stage, and nowhere else."""
    flat = {f"{section}.{key}": value for section, keys in run.config.items() for key, value in (keys or {}).items()}
    rate = flat.pop("optim.sft_lr", None)
    if flat.get("train.sft_epochs") and "optim.lr" in flat:
        flat["optim.sft_lr"] = rate or float(f"{OptimConfig(lr=flat['optim.lr']).peak_sft_lr:.9g}")
    return flat


def _changed_settings(runs: Sequence[Content]) -> list[tuple[str, list[Any]]]:
    """Settings in which the runs differ, output_dir aside."""
    flat = [_settings(run) for run in runs]
    names = [name for name in dict.fromkeys(n for f in flat for n in f) if name != "train.output_dir"]
    rows = [(name, [f.get(name) for f in flat]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def _shared_answers(runs: Sequence[Content]) -> list[tuple[str, list[str]]]:
    """Prompts that every run has answered, and the policies' answers."""
    answers = [{row["prompt"]: row["policy"] for row in run.samples} for run in runs]
    prompts = [prompt for prompt in answers[0] if all(prompt in known for known in answers)]
    return [(prompt, [known[prompt] for known in answers]) for prompt in prompts[:MAX_ANSWERS]]
