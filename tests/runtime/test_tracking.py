"""metrics.jsonl is JSON whatever the numbers are, and a resumed run continues it at the right line."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dpo.runtime import tracking
from dpo.runtime.console import console_on, show_table
from dpo.runtime.files import read_records, write_records
from dpo.runtime.preemption import Preempted
from dpo.runtime.tracking import Recorder, Silent, keep_lines, read_lines


def test_what_json_cannot_say_is_null(tmp_path: Path) -> None:
    values = {"step": 1, "loss": math.nan, "grad_norm": math.inf, "a": -math.inf, "b": None, "c": 0.5, "d": 3}
    Recorder(tmp_path, {}).record(values)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": null, "grad_norm": null, "a": null, "b": null, "c": 0.5, "d": 3}\n'
    assert read_lines(tmp_path) == [json.loads(text)]


def test_every_record_is_a_line_on_disk_at_once_and_another_recorder_continues(tmp_path: Path) -> None:
    first = Recorder(tmp_path, {})
    first.record({"sft_step": 1, "sft_loss": 2.0})
    assert len(read_lines(tmp_path)) == 1
    first.__exit__(None)
    Recorder(tmp_path, {}).record({"step": 1, "loss": 0.5})
    assert read_lines(tmp_path) == [{"sft_step": 1, "sft_loss": 2.0}, {"step": 1, "loss": 0.5}]


def test_keep_lines_drops_later_lines_and_a_torn_last_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"sft_step": 9}', '{"step": 0}', '{"step": 2}', '{"step": 3}', '{"step": 2, "eval_loss": 1}']
    path.write_text("\n".join([*lines, '{"step": 1, "lo']))
    keep_lines(tmp_path, lambda line: "sft_step" in line or line["step"] <= 2)
    assert path.read_text() == "".join(line + "\n" for line in lines if line != '{"step": 3}')
    keep_lines(tmp_path, lambda line: False)
    assert path.read_text() == "" and read_lines(tmp_path) == []
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_keep_lines_and_read_lines_find_nothing_where_nothing_is(tmp_path: Path) -> None:
    keep_lines(tmp_path, lambda line: True)
    assert read_lines(tmp_path) == [] and not any(tmp_path.iterdir())


def test_trackers_start_with_the_first_line_and_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def start(run: Path, config: dict[str, Any], lines: Any) -> Any:
        seen.append((run, config, lines))
        return seen.append, lambda: seen.append("closed")

    monkeypatch.setitem(tracking.BACKENDS, "wandb", start)
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n')
    recorder = Recorder(tmp_path, {"a": 1}, ["wandb"])
    keep_lines(tmp_path, lambda line: False)
    assert seen == []
    recorder.record({"step": 1, "loss": math.nan})
    recorder.__exit__(None)
    assert seen == [(tmp_path, {"a": 1}, [{"step": 7}]), {"step": 1, "loss": None}, "closed"]


def test_a_log_file_gets_about_twenty_progress_lines_with_the_time_left(tmp_path, capsys, monkeypatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now[0])
    recorder = Recorder(tmp_path, {})
    recorder.progress("SFT", 1, 3, "loss 2")  # of whose pace nothing is known yet
    for step in range(201, 1001):  # a run that goes on after step 200, 4 s a step
        now[0] += 4
        recorder.progress("DPO", step, 1000, f"loss {step}")
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "SFT 1/3 loss 2"
    assert len(lines) == 16 and lines[-1] == "DPO 1000/1000 loss 1000"
    assert lines[0] == "DPO 250/1000 loss 250  0:50:00 left" and lines[-2] == "DPO 950/1000 loss 950  0:03:20 left"


def test_lines_and_tables_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder(tmp_path, {})
    recorder.say("data [train]: [bold]kept[/bold] " + "x" * 200)
    recorder.table("Plan", [["name", "before"], ["loss", "0.6931"]])
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == "data [train]: [bold]kept[/bold] " + "x" * 200
    assert lines[1].strip() == "Plan" and any("loss" in line and "0.6931" in line for line in lines)


def test_other_ranks_write_and_say_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    silent = Silent()
    silent.say("x")
    silent.table("x", [["a"]])
    silent.record({"step": 1})
    silent.progress("DPO", 1, 2)
    silent.__exit__(None, None, None)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("cells", "side"),
    [
        (["-5.0", "12"], "right"), (["0.6931", "-"], "right"), (["", "0.6 min"], "right"),
        (["52.0%", "1,024"], "right"), (["nan", "3e-05"], "right"),
        (["0.2 s at 40% of it", "1"], "left"), (["-x", "1"], "left"),
    ],
)  # fmt: skip
def test_columns_of_numbers_stand_to_the_right(cells, side):
    shown = io.StringIO()
    show_table(console_on(shown), "", [["a", cell] for cell in cells], ["name", "a long heading, above"])
    rows = [line for line in shown.getvalue().splitlines() if line.startswith("│ a")]
    assert len(rows) == 2
    for row, cell in zip(rows, cells, strict=True):
        assert row.split("│")[2].strip() == cell
        assert row.endswith(f"{cell} │" if side == "right" else "  │")


def test_a_table_may_have_neither_headings_nor_rows():
    show_table(console_on(io.StringIO()), "Nothing", [])


def test_records_are_written_in_their_own_script_and_a_line_each(tmp_path: Path) -> None:
    rows = [{"prompt": "Grüße, 世界"}, {"prompt": "one\u2028line"}, {"call": "cut \ud83d"}]
    write_records(tmp_path / "rows.jsonl", rows)
    assert "Grüße, 世界" in (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    assert read_records(tmp_path / "rows.jsonl") == (rows, False)


@pytest.mark.parametrize(("ends", "told"), [(None, True), (Preempted, True), (KeyboardInterrupt, False)])
def test_whatever_ends_a_run_gives_the_terminal_back_and_trackers_hear_of_no_failure(
    ends: type[BaseException] | None, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs would look like success; they notice by themselves that a process ends early."""
    seen: list[Any] = []
    monkeypatch.setitem(tracking.BACKENDS, "wandb", lambda *_: (lambda line: None, lambda: seen.append("finished")))
    screen = io.StringIO()
    monkeypatch.setattr(tracking.console, "console_on", lambda _: Console(file=screen, force_terminal=True))
    with contextlib.suppress(*filter(None, [ends])), Recorder(tmp_path, {}, ["wandb"]) as recorder:
        recorder.record({"step": 1, "loss": 0.5})
        recorder.progress("DPO", 1, 3)
        assert "\x1b[?25l" in screen.getvalue() and "\x1b[?25h" not in screen.getvalue()
        if ends is not None:
            raise ends
    assert "\x1b[?25h" in screen.getvalue() and seen == ["finished"] * told
