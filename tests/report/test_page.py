"""report.html in a real Chromium: it runs nothing of the data, fits a phone, follows light and dark, stays small."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dpo.__main__ import main
from dpo.errors import UserError
from dpo.report.comparison import OF_SFT
from dpo.report.page import Refresher, places, write_report
from dpo.report.pairs import write_pairs
from tests.report.runs import HOSTILE, make_run, table


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs Debian's chromium; `make test` installs it as root on Debian")
    api = pytest.importorskip("playwright.sync_api", reason="in requirements-dev.txt")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


Open = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """open_page(file, **context options) -> page; `page.asked` holds the addresses it asked for."""
    contexts = []

    def opened(path: Path, **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(path.as_uri(), wait_until="load")
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 2,000 steps with 2,000 validation pairs."""
    run = make_run(tmp_path_factory.mktemp("long") / "long_run", text="An answer of some words. " * 40)
    write_report([run], run / "report.html")
    return run


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose every text is an attack, the audit's and the settings' too."""
    run = make_run(tmp_path_factory.mktemp("hostile") / "hostile", steps=20, pairs=60, samples=3, text=HOSTILE)
    audit = {"findings": [{"name": HOSTILE, "count": 3, "examples": [HOSTILE, {HOSTILE: HOSTILE}]}], HOSTILE: [HOSTILE]}
    (run / "audit.json").write_text(json.dumps(audit))
    lines = (run / "metrics.jsonl").read_text() + json.dumps({"step": 20, HOSTILE: 1.0, "eval_" + HOSTILE: 2.0}) + "\n"
    (run / "metrics.jsonl").write_text(lines)
    write_report([run], run / "report.html")
    return run


BROKEN = "() => window.broken === undefined ? 'whole' : 'broken'"


def test_no_script_of_the_data_runs_even_where_the_page_forbids_none(
    hostile_run: Path, tmp_path: Path, open_page: Open
) -> None:
    other = make_run(tmp_path / HOSTILE.replace("/", "")[:100], steps=20, pairs=60, samples=3, text=HOSTILE)
    write_report([hostile_run, other], tmp_path / "both.html")
    for path in (hostile_run / "report.html", tmp_path / "both.html"):
        page = open_page(path, bypass_csp=True)
        page.evaluate("() => document.querySelectorAll('details').forEach(d => { d.open = true })")
        page.wait_for_timeout(200)
        assert page.evaluate(BROKEN) == "whole"
        assert page.evaluate("() => document.querySelectorAll('script, img, iframe, a[href^=java]').length") == 0
        assert "<script>window.broken = 1</script>" in page.evaluate("() => document.body.textContent")
        assert page.asked == [path.as_uri()]
    # The same text unescaped is noticed, so that the test can fail.
    control = tmp_path / "control.html"
    control.write_text(f"<!doctype html><body>{HOSTILE}")
    assert open_page(control).evaluate(BROKEN) == "broken"


def test_the_page_forbids_scripts_and_network_by_itself(hostile_run: Path, tmp_path: Path, open_page: Open) -> None:
    text = (hostile_run / "report.html").read_text()
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text(text.replace("</body>", "<script>window.broken = 1</script><img src='http://127.0.0.1:9/'></body>"))
    page = open_page(spoilt)
    assert page.evaluate(BROKEN) == "whole"


def test_a_report_of_2000_steps_is_small_and_quick(long_run: Path, tmp_path: Path, open_page: Open) -> None:
    started = time.process_time()
    write_report([long_run], tmp_path / "again.html")
    assert time.process_time() - started < 10  # of work, since the machine may do other things as well
    assert (long_run / "report.html").stat().st_size < 5_000_000
    for _ in range(10):  # a machine that does other things as well may be late now and then
        started = time.perf_counter()
        page = open_page(long_run / "report.html")
        opened = time.perf_counter() - started
        assert page.asked == [(long_run / "report.html").as_uri()]
        if opened < 2:
            break
    assert opened < 2
    assert page.evaluate("() => document.querySelectorAll('svg').length") >= 10


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_in_light_and_dark(
    scheme: str, hostile_run: Path, long_run: Path, open_page: Open
) -> None:
    for run in (long_run, hostile_run):
        page = open_page(run / "report.html", viewport={"width": 390, "height": 844}, color_scheme=scheme)
        page.evaluate("() => document.querySelectorAll('details').forEach(d => { d.open = true })")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in background.strip("rgb()").split(",")) / 3
    assert (brightness > 200) is (scheme == "light") and (brightness < 60) is (scheme == "dark")
    ink = page.evaluate("() => getComputedStyle(document.querySelector('svg text')).fill")
    assert (sum(int(part) for part in ink.strip("rgb()").split(",")) / 3 > 150) is (scheme == "dark")


def test_the_panels_say_what_the_pairs_say(long_run: Path, open_page: Open) -> None:
    text = open_page(long_run / "report.html").evaluate("() => document.body.innerText")
    for heading in ("Displacement", "Length", "Calibration", "Most wrong margins", "Answers of reference and policy"):
        assert heading in text
    assert "Of 2,000 validation pairs, 83.5% have a chosen answer" in text and "Likelihood displacement." in text
    assert "Length bias." not in text and "24 of 64" in text


def test_the_audit_of_the_data_is_shown(tmp_path: Path, open_page: Open) -> None:
    run = make_run(tmp_path / "run", steps=2, pairs=2, samples=1)
    findings = [{"kind": "ties", "count": 3, "rows": [1, 2]}, {"kind": "repeats", "count": 0, "rows": []}]
    audit = {"version": 1, "sets": [{"name": "train", "lengths": {"mean": 2.5}, "findings": findings}]}
    audit["conclusions"] = ["leak: <b>x</b>"]
    (run / "audit.json").write_text(json.dumps(audit))
    write_report([run], run / "report.html")
    page = open_page(run / "report.html")
    before = page.evaluate("() => document.body.innerText")
    assert "leak: <b>x</b>" in before and "kind" not in before
    page.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
    shown = page.evaluate("() => document.body.innerText")
    assert "kind count rows ties 3 1, 2 repeats 0" in " ".join(shown.split()) and "2.5000" in shown
    wide = open_page(run / "report.html", viewport={"width": 390, "height": 844})
    assert wide.evaluate("() => document.documentElement.scrollWidth") <= 390


def test_a_crashed_run_is_reported_and_called_so(tmp_path: Path, open_page: Open, capsys: Any) -> None:
    run = make_run(tmp_path / "crashed", steps=50, pairs=30, finished=False)
    with open(run / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 51, "lo')
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n"
    text = open_page(run / "report.html").evaluate("() => document.body.innerText")
    assert "This run has not finished" in text and "its last whole line is of step 50" in text
    assert "The last line of metrics.jsonl is torn" in text and "There is no final/" in text


def test_what_is_left_of_a_run_killed_at_its_start_is_reported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "it has recorded nothing" in text and "config.yaml is missing" in text
    assert "Nothing has been recorded yet." in text


def test_several_runs_are_compared_in_one_page(tmp_path: Path, monkeypatch: Any, open_page: Open) -> None:
    runs = [make_run(tmp_path / name, steps=steps, pairs=30, samples=2) for name, steps in (("a", 20), ("b", 30))]
    text = (runs[1] / "config.yaml").read_text()
    text = text.replace("beta: 0.1", "beta: 0.25").replace("sft_epochs: 0", "sft_epochs: 1")
    (runs[1] / "config.yaml").write_text(text)
    (runs[1] / "finished.json").unlink()
    monkeypatch.chdir(tmp_path)
    assert main(["report", "a", "b"]) == 0
    page = open_page(tmp_path / "report.html", viewport={"width": 390, "height": 844})
    shown = page.evaluate("() => document.body.innerText")
    assert "loss.beta\t0.1\t0.25" in shown and "train.output_dir" not in shown
    assert "optim.sft_lr\tnull\t2e-05" in shown
    assert "The objectives differ: their losses" in shown and "To share these" in shown  # only one made its reference
    assert re.search(r"accuracy, validation, best\t[\d.]+ at step 20\t[\d.]+ at step 30", shown)
    assert "state\tfinished\tunfinished" in shown and "steps\t20\t30" in shown
    assert "b: This run has not finished" in shown and "Answers to the same prompts" in shown
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390


def test_runs_validated_on_other_pairs_are_told_apart_and_the_untrained_model_is_nobodys_best(tmp_path):
    runs = [make_run(tmp_path / name, steps=4, pairs=2, samples=1) for name in "abc"]
    for run, digest in zip(runs, ("1", "2", None), strict=True):
        if digest is not None:
            (run / "inputs.json").write_text(json.dumps({"training pairs": ["0"], "validation pairs": [digest]}))
    start = {"step": 0, "eval_loss": 0.6931, "eval_rewards/accuracies": 1.0}
    metrics = runs[0] / "metrics.jsonl"
    metrics.write_text(json.dumps(start) + "\n" + metrics.read_text())
    for others, warned in ((runs, True), (runs[1:], False), (runs[::2], False)):
        write_report(others, tmp_path / "some.html")
        assert ("The validation pairs differ" in (tmp_path / "some.html").read_text()) is warned
    row = re.search(r"<th>accuracy, validation, best</th>(.*)</tr>", (tmp_path / "some.html").read_text())
    assert row and "at step 0" not in row[1] and "at step 4" in row[1]


def test_runs_on_the_same_pairs_are_compared_pair_by_pair(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, steps=4, pairs=2, samples=1) for name in "abc"]
    for run, digest, margins in zip(runs, "112", ([1, -1, -1, -1], [1, 1, 1, -1], [1, 1, 1, 1]), strict=True):
        (run / "inputs.json").write_text(json.dumps({"validation pairs": [digest]}))
        write_pairs(run, table(4, margins, np.zeros(4)), lambda _: {})
    write_report(runs, tmp_path / "x.html")
    row = re.search(r"beyond the first run&#39;s, paired</th>(.*)</tr>", (tmp_path / "x.html").read_text())
    # Of four pairs two are gained: mean 0.5, standard deviation 0.5774.
    assert row and re.findall(r">([^<]+)</td>", row[1]) == ["-", "+0.5000 ± 0.2887", "-"]


@pytest.mark.parametrize(
    ("first", "second", "warned"),
    [
        ({}, {"train.sft_epochs": 1}, True),
        ({}, {"reference.path": "elsewhere"}, True),
        ({"train.sft_epochs": 1}, {"model.policy": "{a}/reference"}, False),
        ({"loss.name": "simpo"}, {"train.sft_epochs": 1}, False),
        ({"optim.sft_lr": 1e-3}, {}, False),
    ],
)
def test_references_that_differ_are_told_and_shared_ones_are_not(first, second, warned, tmp_path):
    runs = [make_run(tmp_path / name, steps=2, pairs=2, samples=1) for name in "ab"]
    for run, changes in zip(runs, (first, second), strict=True):
        config = yaml.safe_load((run / "config.yaml").read_text())
        for name, value in changes.items():
            section, key = name.split(".")
            config[section][key] = value.format(a=runs[0]) if isinstance(value, str) else value
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    write_report(runs, tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    assert ("The references that rewards are measured from differ" in text) is warned
    assert ("optim.sft_lr" in text) is (second == {"train.sft_epochs": 1} or "train.sft_epochs" in first)


@pytest.mark.parametrize(
    ("old", "new", "warned"),
    [
        ("  lr: 1.0e-06", "  lr: 2.0e-06", True), ("seed: 0", "seed: 1", True),
        ("keep_checkpoints: 2", "keep_checkpoints: 3", False),
    ],
)  # fmt: skip
def test_runs_that_made_references_of_their_own_under_other_settings_are_told_apart(old, new, warned, tmp_path):
    runs = [make_run(tmp_path / name, steps=2, pairs=2, samples=1) for name in "ab"]
    for run, change in zip(runs, ((old, old), (old, new)), strict=True):
        text = (run / "config.yaml").read_text().replace("sft_epochs: 0", "sft_epochs: 1")
        assert change[0] in text
        (run / "config.yaml").write_text(text.replace(*change))
    write_report(runs, tmp_path / "x.html")
    assert ("To share these: --model.policy RUN/reference" in (tmp_path / "x.html").read_text()) == warned


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["report"], "runs"),
        (["report", "nowhere"], "nowhere is no run directory: it has neither config.yaml nor metrics.jsonl"),
        (["report", "run", "--output", "no/such/x.html"], "no/such/x.html cannot be written: No such file"),
        (["report", "spoilt"], "spoilt/metrics.jsonl: line 1 is no JSON object; fix or delete it"),
        (["report", "run", "--outptu", "x"], "unknown key outptu; did you mean output?"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], line: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    make_run(tmp_path / "run", steps=2, pairs=2, samples=1)
    (tmp_path / "spoilt").mkdir()
    (tmp_path / "spoilt/metrics.jsonl").write_text('nonsense\n{"step": 1}\n')
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and line in error


def test_the_report_needs_neither_torch_nor_deepspeed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2, pairs=2, samples=1)
    code = f"import sys; from dpo.__main__ import main; main(['report', {str(run)!r}]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_running_run_refreshes_its_page_for_a_fiftieth_of_its_time(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2, pairs=2, samples=1, finished=False)
    now = [0.0]
    refresher = Refresher(run, pytest.fail, clock=lambda: now[0])
    assert not refresher.refresh() and not (run / "report.html").exists()
    now[0] = 151.0
    refresher.clock = iter([151.0, 155.0, 300.0, 360.0, 361.0]).__next__  # the page took 4 s
    assert refresher.refresh()
    assert ">running<" in (run / "report.html").read_text() and "no final" not in (run / "report.html").read_text()
    assert not refresher.refresh()  # 145 s later: 4 s would be more than a fiftieth
    assert refresher.refresh()  # 205 s later


def test_a_page_that_cannot_be_written_stops_no_run(tmp_path: Path) -> None:
    said: list[str] = []
    refresher = Refresher(tmp_path / "gone", said.append, share=1e9)
    assert refresher.refresh()
    assert len(said) == 1 and said[0].startswith("report.html could not be written: UserError: ")
    with pytest.raises(UserError):
        write_report([tmp_path / "gone"], tmp_path / "x.html")


def test_the_page_of_several_epochs_has_a_row_for_each(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=6, pairs=4, samples=1)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_report([run], tmp_path / "one.html")
    assert "Epoch by epoch" not in (tmp_path / "one.html").read_text()
    told = [json.dumps(line | {"epoch": line["step"] / 2}) + "\n" for line in lines]
    (run / "metrics.jsonl").write_text("".join(told))
    write_report([run], tmp_path / "three.html")
    table = (tmp_path / "three.html").read_text().partition("Epoch by epoch")[2].partition("</table>")[0]
    assert re.findall(r'<tr><td class="n">(\d)</td>', table) == ["0", "1", "2", "3"]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert "training accuracy" in table and f"{sum(losses[:2]) / 2:.4f}" in table


def test_runs_of_the_same_name_are_told_apart_and_one_is_not_compared_with_itself(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / place / "x", steps=4, pairs=4, samples=1) for place in ("p", "q")]
    write_report(runs, tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text()
    assert "p/x and q/x - DPO report" in text and '<th class="n">p/x</th><th class="n">q/x</th>' in text
    with pytest.raises(UserError, match="p/x is named twice; name each run once"):
        write_report([runs[0], runs[0] / "../x"], tmp_path / "twice.html")


def test_a_calibration_is_not_claimed_of_margins_that_are_no_log_odds(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=4, pairs=30, samples=1)
    for name, claims in (("sigmoid", True), ("ipo", False)):
        settings = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(re.sub(r"(?m)^  name: (sigmoid|ipo)$", f"  name: {name}", settings))
        write_report([run], tmp_path / "one.html")
        assert ("ipo margins are no log-odds" not in re.sub(r"\s+", " ", (tmp_path / "one.html").read_text())) is claims
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        shutil.copytree(run, tmp_path / "other")
        write_report([run, tmp_path / "other"], tmp_path / "two.html")
        row = re.search(r"<th>calibration error</th>(.*)</tr>", (tmp_path / "two.html").read_text())
        assert row and (">-<" not in row[1]) is claims


def test_a_mixed_loss_is_named_with_its_weights_and_blank_answers_are_seen(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=4, pairs=4, samples=2)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["loss"] |= {"name": ["sigmoid", "sft"], "weights": [1.0, 0.2]}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    answers = [{"step": 4, "prompt": "p", "reference": "", "policy": " \n"}]
    (run / "samples.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    write_report([run], tmp_path / "one.html")
    text = (tmp_path / "one.html").read_text()
    assert "; loss 1 sigmoid + 0.2 sft, beta 0.1;" in text
    words = re.sub("<[^>]+>", "", text.partition("Answers of reference and policy")[2])
    assert "(empty)" in words and "(blank: 2 characters)" in words


def test_the_head_of_a_page_says_how_sure_its_accuracy_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=4, pairs=4, samples=1)
    row = dict.fromkeys(("origin", "prompt", "chosen", "rejected"), "")
    write_pairs(run, table(4, [1, 1, 1, -1], np.zeros(4)), lambda _: row)
    write_report([run], tmp_path / "one.html")
    told = "accuracy 0.7500 ± 0.2500, margin 0.5000 ± 0.5000 (± standard error over 4 pairs)"
    assert told in (tmp_path / "one.html").read_text()


def test_the_head_of_a_page_names_sources_by_their_paths(tmp_path: Path) -> None:
    assert places([{"path": "a.jsonl", "weight": 2}, "b.jsonl"]) == "a.jsonl, b.jsonl" and places("c") == "c"


@pytest.mark.parametrize(
    ("name", "matters"),
    [
        ("data.validation_fraction", True), ("data.ranked_pairs", True), ("data.train", True), ("data.workers", False),
        ("data.validation_limit", False), ("optim.lr", False), ("optim.sft_lr", True),
        ("model.tokenizer_revision", True), ("train.epochs", False),
    ],
)  # fmt: skip
def test_runs_with_references_of_their_own_are_told_apart_by_what_sft_depends_on(name: str, matters: bool) -> None:
    assert bool(OF_SFT.fullmatch(name)) is matters
