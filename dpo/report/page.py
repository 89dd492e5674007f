"""report.html: one file, no script, no network; every text of the data passes through the template's escaping.

    python -m dpo report RUN            RUN/report.html
    python -m dpo report RUN_A RUN_B    report.html in the working directory, the runs beside each other
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dpo.errors import UserError
from dpo.report import panels
from dpo.report.card import closing_rows
from dpo.report.charts import Chart, main_charts, other_charts
from dpo.report.comparison import distinct_names, side_by_side
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
    names = distinct_names(runs)
    contents = [replace(read_run(run, running=running), name=name) for run, name in zip(runs, names, strict=True)]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"show": panels.show, "cut": cut, "plain": plain, "is_table": is_table, "places": places}
    values = {
        "title": " and ".join(content.name for content in contents) if len(contents) < 3 else f"{len(contents)} runs",
        "written": time.strftime("%Y-%m-%d %H:%M %Z"),
        "runs": contents,
        "charts": main_charts(contents),
        "others": other_charts(contents),
    }
    values |= _of_one(contents[0]) if len(contents) == 1 else side_by_side(contents)
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
    """A text as the page shows it: messages as role and content, the end of a long one left out, a blank one named."""
    text = plain(text)
    if not text.strip():
        return f"(blank: {len(text)} characters)" if text else "(empty)"
    return text if len(text) <= limit else f"{text[:limit]} ... ({len(text) - limit:,} more characters)"


def plain(text: Any) -> str:
    """Text of a string, of messages, or of any other value."""
    if isinstance(text, str):
        return text
    if isinstance(text, list) and all(isinstance(m, dict) and "content" in m for m in text):
        return "\n\n".join(f"{m.get('role', '')}: {m['content']}" for m in text)
    return json.dumps(text, ensure_ascii=False, indent=1)


def places(sources: Any) -> str:
    """The setting data.train: a path, or those of a list of sources."""
    if not isinstance(sources, list):
        return plain(sources)
    return ", ".join(str(one.get("path")) if isinstance(one, dict) else str(one) for one in sources)


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
        "right": float(panels.accuracies(latest.margins).mean()),
        "accuracy": panels.with_error(panels.accuracies(latest.margins)),
        "margin": panels.with_error(latest.margins),
        "displacement": panels.displacement(first, latest),
        "first_step": first.step,
        "moved": Chart("Change of the log-prob of a completion, nats", moved, Markup(histogram(moved, "nats"))),
        "lengths": lengths,
        "by_difference": Chart("Accuracy by difference of lengths", (), by_difference),
        "by_longest": Chart("Accuracy by length", (), by_longest),
        "calibration": calibration,
        "is_logistic": run.is_logistic,
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
