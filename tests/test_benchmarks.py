"""The benchmark measures systems that do the same work, refuses to report on others, and writes its tables."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import plain_loop, report, throughput, workload
from benchmarks.clock import Job
from dpo.errors import UserError

DOCS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
SYSTEMS = ["ours_online", "ours_cached", "trl_default", "trl_tuned", "plain_loop"]
ARGV = [
    "--size", "quick", "--data", "builtin:world", "--tokenizer", "builtin:tiny", "--device", "cpu", "--dtype", "fp32",
    "--threads", "1", "--micro_batches", "1", "2",
]
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, Results]:
    """Exit code, folder with tables and raw numbers, and what every process gave, of a quick run of all systems."""
    folder, results = tmp_path_factory.mktemp("benchmarks"), {}
    shutil.copy(DOCS, folder / "tables.md")
    run_process = throughput.run_process

    def remember(module: str, job: Job, where: Path, threads: int) -> dict[str, Any]:
        results[where.name] = run_process(module, job, where, threads)
        return dict(results[where.name])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "run_process", remember)
        files = ["--docs", str(folder / "tables.md"), "--json", str(folder / "raw.json")]
        code = throughput.main([*ARGV, "--systems", *SYSTEMS, *files])
    return code, folder, results


def _replayed(results: Results) -> Callable[..., dict[str, Any]]:
    return lambda module, job, where, threads: dict(results[where.name])


def test_all_systems_have_the_same_losses_and_fill_the_tables(quick):
    code, folder, _ = quick
    raw = json.loads((folder / "raw.json").read_text())
    assert code == 0 and raw["problems"] == []
    assert [run["system"] for run in raw["runs"]] == [s for s in SYSTEMS if s not in raw["missing"]]
    losses = np.array([run["losses"] for run in raw["runs"] if run["same_order"]])
    assert len(losses) >= len(raw["runs"]) - 1 and losses.shape[1] == 3
    assert np.ptp(losses, axis=0).max() < report.TOLERANCE["fp32"]
    assert losses[:, 0] == pytest.approx(math.log(2), abs=1e-6) and abs(losses[:, -1] - math.log(2)).min() > 1e-3
    text = (folder / "tables.md").read_text()
    cpu = text.split("<!-- cpu-fp32: begin -->")[1].split("<!-- cpu-fp32: end -->")[0]
    for system in SYSTEMS:
        assert f"| {report.NAMES[system]} |" in cpu
    assert "| at least 8 |" in cpu and "micro-batch 2, grouped by length" in cpu and "load average" in cpu
    outside = DOCS.read_text().split("<!-- cpu-fp32: end -->")[1]
    assert text.endswith(outside) and text.startswith(DOCS.read_text().split("<!-- cpu-fp32: begin -->")[0])


def test_a_wrong_loss_is_an_error_and_leaves_the_tables_alone(quick, tmp_path, monkeypatch, capsys):
    _, _, results = quick
    run_process, replay = throughput.run_process, _replayed(results)

    def wrong(module: str, job: Job, where: Path, threads: int) -> dict[str, Any]:
        if module == "plain_loop":
            return run_process(module, replace(job, beta=2 * job.beta), where, threads)
        return replay(module, job, where, threads)

    monkeypatch.setattr(throughput, "run_process", wrong)
    tables = shutil.copy(DOCS, tmp_path / "tables.md")
    assert throughput.main([*ARGV, "--systems", "ours_online", "plain_loop", "--docs", str(tables)]) == 1
    assert tables.read_text() == DOCS.read_text()
    assert "plain loop has loss" in capsys.readouterr().err


def test_other_pairs_are_an_error(quick, monkeypatch):
    monkeypatch.setattr(throughput, "run_process", _replayed(quick[2]))
    with pytest.raises(SystemExit, match="not the pairs that were drawn"):
        throughput.main([*ARGV, "--systems", "ours_online", "--seed", "1"])


def test_a_process_that_fails_is_an_error_with_its_log(tmp_path):
    job = Job("", "", "", "", "", 8, 4, 1, 1, "fp32", "nowhere", 1e-4, 0.1)
    with pytest.raises(SystemExit, match=r"ceiling failed:\n[\s\S]*nowhere"):
        throughput.run_process("ceiling", job, tmp_path / "job", 1)


def _run(system: str, seconds: float, *losses: float, **more: Any) -> report.Run:
    made = {"system": system, "seconds": seconds, "losses": list(losses), "timed_pairs": 8, "peak_gib": 1.0}
    return made | {"same_order": True, "build_seconds": None} | more


def test_losses_that_prove_nothing_or_are_not_finite_are_found():
    start = math.log(2)
    assert "prove nothing" in report.disagreements([_run("ours_online", 1, start, start)], "fp32")[0]
    assert "not finite" in report.disagreements([_run("plain_loop", 1, start, math.nan)], "fp32")[0]
    far = [_run("ours_online", 1, start, 0.5), _run("trl_default", 1, start, 0.5002)]
    assert len(report.disagreements(far, "fp32")) == 1 and report.disagreements(far, "bf16") == []
    regrouped = [_run("ours_online", 1, start, 0.5), _run("trl_tuned", 1, 0.9, 0.1, same_order=False)]
    assert report.disagreements(regrouped, "fp32") == []


def test_ratios_pair_the_runs_of_a_round():
    runs = [_run("ours_online", 1.0), _run("trl_default", 9.0), _run("ours_online", 2.0), _run("trl_default", 14.0)]
    runs += [_run("ours_online", 1.0), _run("trl_default", 6.0)]
    first = report.ratios(runs, "cpu")[0]
    assert first["values"] == [9.0, 7.0, 6.0]
    table = report.ratios_table(report.ratios(runs, "cpu"))
    assert "| 7.00 (6.00 to 9.00) | at least 8 | missed by 12% |" in table and "| not measured |" in table
    memory = report.ratios([_run("ours_online", 1, peak_gib=2), _run("trl_default", 1, peak_gib=5)], "cuda")[-1]
    assert memory["values"] == [0.4] and "| at most 0.5 | met |" in report.ratios_table([memory])


def test_one_changed_part_is_told_as_time_against_the_default(quick, tmp_path, monkeypatch):
    measured = quick[2]["ours_online-0"]

    def slower(module: str, job: Job, where: Path, threads: int) -> dict[str, Any]:
        if module == "ceiling":
            return dict(quick[2]["ceiling"])
        return measured | {"seconds": measured["seconds"] * (2 if "train.layout" in job.options else 1)}

    monkeypatch.setattr(throughput, "run_process", slower)
    tables = shutil.copy(DOCS, tmp_path / "tables.md")
    argv = [*ARGV, "--dtype", "bf16", "--ablations", "--docs", str(tables)]
    assert throughput.main(argv) == 0
    written = tables.read_text().split("<!-- cpu-ablations: begin -->")[1].split("<!-- cpu-ablations: end -->")[0]
    times = {row.split(" | ")[0]: row.split(" | ")[2] for row in written.splitlines() if row.startswith("| ")}
    assert len(times) == 2 + len(throughput.ABLATIONS["cpu"])
    assert {name for name, time in times.items() if time == "2.00"} == {
        "| " + report.NAMES[system] for system in ("ours_packed", "ours_padded")
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_changed_part_is_a_setting_that_a_run_takes(device):
    job = Job("builtin:tiny", "builtin:world", "", "", "", 8, 4, 1, 1, "fp32", "cpu", 1e-4, 0.1)
    assert all(throughput.unavailable(system, job) is None for system in throughput.ABLATIONS[device])


def test_useful_work_by_hand():
    lengths = np.array([[3, 2, 1]])
    assert workload.useful_tokens(lengths) == 9
    # attended: 15 in prompt + chosen, 3 + 1 from rejected; 6 tokens, 3 scored rows
    assert workload.flops(lengths, 10, 2, 4, 7) == 6 * 10 * 6 + 6 * 4 * 7 * 3 + 12 * 4 * 2 * 19


def test_the_plain_loop_scores_completions_alone():
    batch = plain_loop.collate([{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [1, 2, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 3, -100], [-100, -100, 4, 5]]


def test_a_file_without_markers_is_refused(tmp_path):
    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(UserError, match="must hold"):
        report.write_block(tmp_path / "page.md", "cpu", "text")
