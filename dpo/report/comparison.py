"""Several runs beside each other: their figures, the settings in which they differ, what cannot be compared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo.config import OptimConfig
from dpo.errors import UserError
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
    made_own = [run for run in runs if run.setting("train.sft_epochs")]
    if len(made_own) > 1 and any(OF_SFT.fullmatch(name) for name in names):
        found.append(
            "Each run with train.sft_epochs has made the reference that its rewards are measured from, and under"
            " settings that differ. To share one: --model.policy RUN/reference --train.sft_epochs 0."
        )
    return found


def _changed_settings(runs: Sequence[Content]) -> list[tuple[str, list[Any]]]:
    """Settings in which the runs differ, output_dir aside; where there was an SFT stage, with the rate that it took."""
    flat = [{f"{s}.{k}": v for s, keys in run.config.items() for k, v in (keys or {}).items()} for run in runs]
    for settings in flat:
        if settings.get("train.sft_epochs") and settings.get("optim.sft_lr") is None and "optim.lr" in settings:
            settings["optim.sft_lr"] = float(f"{OptimConfig(lr=settings['optim.lr']).peak_sft_lr:.9g}")
    names = [name for name in dict.fromkeys(n for f in flat for n in f) if name != "train.output_dir"]
    rows = [(name, [f.get(name) for f in flat]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def _shared_answers(runs: Sequence[Content]) -> list[tuple[str, list[str]]]:
    """Prompts that every run has answered, and the policies' answers."""
    answers = [{row["prompt"]: row["policy"] for row in run.samples} for run in runs]
    prompts = [prompt for prompt in answers[0] if all(prompt in known for known in answers)]
    return [(prompt, [known[prompt] for known in answers]) for prompt in prompts[:MAX_ANSWERS]]
