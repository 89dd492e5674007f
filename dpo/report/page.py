"""report.html: one file, no script, no network; every text of the data passes through the template's escaping.

    python -m dpo report RUN            RUN/report.html
    python -m dpo report RUN_A RUN_B    report.html in the working directory, the runs beside each other
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dpo.config import OptimConfig
from dpo.errors import UserError
from dpo.report import panels
from dpo.report.card import closing_rows
from dpo.report.charts import Chart, main_charts, other_charts
from dpo.report.content import MAIN, Content, read_run
from dpo.report.figures import Curve, bars, histogram, reliability
from dpo.runtime.files import write_whole

MAX_ANSWERS = 24
MAX_TEXT = 3000
"""Characters of a text that the page shows."""


@dataclass(frozen=True)
class Options:
    """Arguments of python -m dpo report."""

    runs: list[str]
    """Run directories; several are compared in one page."""
    output: str | None = None
    """File to write; default: report.html in the run directory, or in the working directory for several runs."""


def write_report(runs: Sequence[Path], output: Path, *, running: bool = False) -> None:
    """Write the report of one run, or of several compared.

    Args:
        runs: Run directories.
        output: The HTML file.
        running: The caller is the run itself, so that what is missing is not amiss.
    Raises:
        UserError: One of them is no run directory.
    """
    contents = [read_run(run, running=running) for run in runs]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"show": panels.show, "cut": cut, "plain": plain, "is_table": is_table}
    values = {
        "title": " and ".join(content.name for content in contents) if len(contents) < 3 else f"{len(contents)} runs",
        "written": time.strftime("%Y-%m-%d %H:%M %Z"),
        "runs": contents,
        "charts": main_charts(contents),
        "others": other_charts(contents),
    }
    values |= _of_one(contents[0]) if len(contents) == 1 else _of_several(contents)
    template = environment.get_template("one.html.jinja" if len(contents) == 1 else "several.html.jinja")
    write_whole(output, template.render(values))


def report(options: Options) -> Path:
    """python -m dpo report.

    Returns:
        The file written.
    Raises:
        UserError: What is named is no run directory, or the page cannot be written.
    """
    runs = [Path(run) for run in options.runs]
    if not runs:
        raise UserError("name at least one run directory")
    output = Path(options.output or (runs[0] if len(runs) == 1 else Path()) / "report.html")
    try:
        write_report(runs, output)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}; name another by --output") from None
    return output


@dataclass
class Refresher:
    """Writes the page of a run while it runs, seldom enough to cost no more than a share of its time.

    Attributes:
        run: The run directory.
        say: Shows a line.
        share: Of the time since the last page.
        clock: Seconds; another one in tests.
    """

    run: Path
    say: Callable[[str], None]
    share: float = 0.02
    clock: Callable[[], float] = time.perf_counter
    _cost: float = field(default=3.0, init=False)  # seconds, until one has been measured
    _last: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._last = self.clock()

    def refresh(self) -> bool:
        """Write the page if it is time; a page that cannot be written stops no run.

        Returns:
            Whether it was time.
        """
        now = self.clock()
        if self._cost > self.share * (now - self._last):
            return False
        write_or_say(self.run, self.say, running=True)
        self._last = self.clock()
        self._cost = self._last - now
        return True


def write_or_say(run: Path, say: Callable[[str], None], *, running: bool = False) -> None:
    """Write RUN/report.html, or say why it could not be written: a picture is no reason to lose a run."""
    try:
        write_report([run], run / "report.html", running=running)
    except Exception as error:
        say(f"report.html could not be written: {type(error).__name__}: {error}")


# --- what the templates show ------------------------------------------------------------------------------------------


def cut(text: Any, limit: int = MAX_TEXT) -> str:
    """A text as the page shows it: messages as role and content, the end of a long one left out."""
    text = plain(text)
    return text if len(text) <= limit else f"{text[:limit]} ... ({len(text) - limit:,} more characters)"


def plain(text: Any) -> str:
    """Text of a string, of messages, or of any other value."""
    if isinstance(text, str):
        return text
    if isinstance(text, list) and all(isinstance(m, dict) and "content" in m for m in text):
        return "\n\n".join(f"{m.get('role', '')}: {m['content']}" for m in text)
    return json.dumps(text, ensure_ascii=False, indent=1)


def is_table(rows: Any) -> bool:
    """Whether a list holds objects of the same names and of plain values, or lists of these."""

    def flat(item: Any) -> bool:
        return not isinstance(item, dict) and (not isinstance(item, list) or not any(isinstance(i, dict) for i in item))

    if not rows or not all(isinstance(row, dict) and all(map(flat, row.values())) for row in rows):
        return False
    return all(row.keys() == rows[0].keys() for row in rows)


def _of_one(run: Content) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run": run, "summary": closing_rows(run.lines), "findings": panels.findings(run.lines), "pairs": None,
        "epochs": panels.by_epoch(run.lines), "metrics": [title for _, title in MAIN],
        "answers": _answers(run), "settings": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
    }  # fmt: skip
    return values | (_panels(run) if run.pairs is not None and len(run.pairs[1].values) else {})


def _panels(run: Content) -> dict[str, Any]:
    assert run.pairs is not None
    first, latest = run.pairs
    chosen, rejected = panels.changes(first, latest)
    moved = (Curve("chosen", (), chosen.tolist(), 0), Curve("rejected", (), rejected.tolist(), 1))
    lengths, calibration = panels.lengths(latest), panels.calibration(latest.margins)
    by_difference = _bars(lengths.differences, "chosen minus rejected, tokens")
    by_longest = _bars(lengths.longest, "longer completion, tokens")
    return {
        "pairs": latest,
        "accuracy": float(panels.accuracies(latest.margins).mean()),
        "displacement": panels.displacement(first, latest),
        "first_step": first.step,
        "moved": Chart("Change of the log-prob of a completion, nats", moved, Markup(histogram(moved, "nats"))),
        "lengths": lengths,
        "by_difference": Chart("Accuracy by difference of lengths", (), by_difference),
        "by_longest": Chart("Accuracy by length", (), by_longest),
        "calibration": calibration,
        "reliability": Chart(
            "Predicted and right", (), Markup(reliability(calibration.predicted, calibration.right))
        ),
    }


def _bars(buckets: Sequence[panels.Bucket], x_label: str) -> Markup:
    return Markup(bars([bucket.label for bucket in buckets], [bucket.accuracy for bucket in buckets], x_label))


def _answers(run: Content) -> list[dict[str, Any]]:
    """The samples, those that differ first, with their differences marked."""
    rows = sorted(run.samples, key=lambda row: row["reference"] == row["policy"])
    shown = []
    for row in rows[:MAX_ANSWERS]:
        left, right = panels.differences(cut(row["reference"]), cut(row["policy"]))
        same = row["reference"] == row["policy"]
        shown.append({"prompt": row["prompt"], "reference": left, "policy": right, "same": same})
    return shown


def _of_several(runs: Sequence[Content]) -> dict[str, Any]:
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
    found = panels.displacement(first, latest), panels.lengths(latest), panels.calibration(latest.margins)
    return dict(zip(FACTS, (found[0].chosen_fell, found[1].correlation, found[2].error, kl), strict=True))


def _last_value(run: Content, name: str) -> float | None:
    return next((line[name] for line in reversed(run.lines) if line.get(name) is not None), None)


def _best(run: Content, name: str) -> str | None:
    """The highest value of a metric and its step, the later of equals."""
    found = [(line[name], line["step"]) for line in run.lines if line.get(name) is not None]
    return "{:.4g} at step {}".format(*max(found)) if found else None


OF_SFT = re.compile(
    r"model\.(policy|revision|lora|tokenizer|chat_template)|data\.(train\w*|subset|format|max_\w+|shuffle)"
    r"|optim\.(?!lr$).*|train\.(seed|sft_epochs|global_batch_size|precision)"
)
"""Settings that the result of an SFT stage depends on; optim.lr does so by optim.sft_lr."""


def _warnings(runs: Sequence[Content], changed: Sequence[tuple[str, list[Any]]]) -> list[str]:
    """What cannot be compared between the runs."""
    names, found = [name for name, _ in changed], []
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
