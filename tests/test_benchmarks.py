"""The benchmark measures systems that do the same work, refuses to report on others, and writes its tables."""

from __future__ import annotations

import json
import math
import shutil
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import ceiling, ours, plain_loop, report, seed_study, step_profile, throughput, workload
from benchmarks.clock import Job
from dpo import train as training
from dpo.errors import UserError
from dpo.model import products
from dpo.model.forward import Scorer
from dpo.model.head import Head
from dpo.training.nonfinite import Nonfinite
from tests import ranks

DOCS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
SYSTEMS = ["ours_online", "ours_cached", "ours_own_gelu", "trl_default", "trl_tuned", "plain_loop"]
DATA = ["--data", "builtin:world", "--tokenizer", "builtin:tiny"]
ARGV = [
    *DATA, "--size", "quick", "--device", "cpu", "--dtype", "fp32", "--threads", "1", "--micro_batches", "1", "2",
]
Results = dict[str, dict[str, Any]]


def forked(module: str, job: Job, where: Path, _threads: int) -> dict[str, Any]:
    """What a process of the benchmark gives, without the time to import."""
    where.mkdir()
    (where / "job.json").write_text(replace(job, folder=str(where)).to_json())
    done = ranks.run([f"benchmarks/{module}.py", str(where / "job.json"), str(where / "result.json")])
    assert done.codes == [0], done.output
    return json.loads((where / "result.json").read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, Results]:
    """Exit code, folder with tables and raw numbers, and what every process gave, of a quick run of all systems."""
    folder, results = tmp_path_factory.mktemp("benchmarks"), {}
    shutil.copy(DOCS, folder / "tables.md")
    run_process = throughput.run_process

    def remember(module: str, job: Job, where: Path, threads: int, seconds: float = 0) -> dict[str, Any]:
        way = run_process if module == "trl_side" else forked  # TRL reads its environment when it is imported
        results[where.name] = way(module, job, where, threads)
        return dict(results[where.name])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "run_process", remember)
        files = ["--docs", str(folder / "tables.md"), "--json", str(folder / "raw.json")]
        code = throughput.main([*ARGV, "--systems", *SYSTEMS, *files])
    return code, folder, results


def _replayed(results: Results) -> Callable[..., dict[str, Any]]:
    return lambda module, job, where, *_: dict(results[where.name])


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
    assert "Ours: layout: shared; attention: sdpa per segment. " in text
    cpu = text.split("<!-- cpu-fp32: begin -->")[1].split("<!-- cpu-fp32: end -->")[0]
    for system in SYSTEMS:
        assert f"| {report.NAMES[system]} |" in cpu
    assert "| at least 8 |" in cpu and "micro-batch 2, grouped by length" in cpu and "load average" in cpu
    outside = DOCS.read_text().split("<!-- cpu-fp32: end -->")[1]
    assert text.endswith(outside) and text.startswith(DOCS.read_text().split("<!-- cpu-fp32: begin -->")[0])


def test_a_wrong_loss_is_an_error_and_leaves_the_tables_alone(quick, tmp_path, monkeypatch, capsys):
    _, _, results = quick
    replay = _replayed(results)

    def wrong(module: str, job: Job, where: Path, threads: int, seconds: float = 0) -> dict[str, Any]:
        if module == "plain_loop":
            return forked(module, replace(job, beta=2 * job.beta), where, threads)
        return replay(module, job, where, threads)

    monkeypatch.setattr(throughput, "run_process", wrong)
    tables = shutil.copy(DOCS, tmp_path / "tables.md")
    assert throughput.main([*ARGV, "--systems", "ours_online", "plain_loop", "--docs", str(tables)]) == 1
    assert tables.read_text() == DOCS.read_text()
    assert "plain loop has loss" in capsys.readouterr().err


def test_the_models_own_gelu_is_what_is_measured_under_its_name(quick):
    """It rounds in another way, so that the losses of later steps are others in their last digits."""
    own, fused = (quick[2][f"{name}-0"]["losses"] for name in ("ours_own_gelu", "ours_online"))
    assert own != fused and own == pytest.approx(fused, abs=1e-5)


def test_pytorchs_own_products_are_what_is_measured_under_their_name(monkeypatch, tmp_path):
    job = Job("tiny", "rows", "", "cache", str(tmp_path), 8, 4, 1, 1, "bf16", "cpu", 1e-4, 0.1)
    seen: list[bool] = []
    monkeypatch.setattr(training, "train", lambda command: seen.append(products.fp32_is_faster()))
    monkeypatch.setattr(training, "Recorder", training.Recorder)  # undone after the test
    for options in ({}, throughput.SYSTEMS["ours_own_products"][1]):
        monkeypatch.setattr(products, "fp32_is_faster", lambda: True)
        with pytest.raises(RuntimeError, match="0 steps were seen"):
            ours.run(replace(job, options=options))
    assert seen == [True, False]


def test_the_ceiling_of_a_bf16_run_on_a_cpu_is_the_faster_of_bf16_and_fp32(monkeypatch):
    job = Job("", "", "", "", "", 8, 4, 1, 1, "bf16", "cpu", 1e-4, 0.1, {"size": 16})
    reached = {}
    for slow in (torch.bfloat16, torch.float32):
        multiply = lambda a, b, slow=slow: time.sleep(0.01 * (a.dtype == slow))  # noqa: E731
        monkeypatch.setattr(torch, "mm", multiply)
        reached[slow] = ceiling.run(job)["dtype"]
    assert reached == {torch.bfloat16: "fp32", torch.float32: "bf16"}
    assert ceiling.run(replace(job, dtype="fp32"))["dtype"] == "fp32"


def test_a_page_without_the_block_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(UserError, match="must hold <!-- cpu-fp32-ablations: begin -->"):
        throughput.main([*ARGV, "--ablations", "--docs", str(tmp_path / "page.md")])


def test_a_changed_part_that_cannot_run_is_named_and_the_others_are_measured(quick, tmp_path, monkeypatch, capsys):
    def failing(module: str, job: Job, where: Path, threads: int, seconds: float = 0) -> dict[str, Any]:
        if job.options.get("train.layout") == "padded":
            raise SystemExit("ours failed:\nTraceback\nOutOfMemoryError: played")
        return dict(quick[2]["ceiling" if module == "ceiling" else "ours_online-0"])

    monkeypatch.setattr(throughput, "run_process", failing)
    assert throughput.main([*ARGV, "--ablations", "--rounds", "2"]) == 0
    shown = capsys.readouterr().out
    assert f"| {report.NAMES['ours_padded']} | not measured: OutOfMemoryError: played | - | - |" in shown
    assert shown.count("round 2: ") == len(throughput.ABLATIONS["cpu"]) - 1


def test_the_work_of_a_llama_is_a_llama_with_grouped_heads_and_its_operations(quick, tmp_path, monkeypatch, capsys):
    small = replace(workload.SIZES["quick"], family="llama", heads=4, vocabulary=600)
    monkeypatch.setitem(workload.SIZES, "llama_1b", small)
    built: list[workload.Workload] = []
    build = workload.build
    monkeypatch.setattr(workload, "build", lambda *a, **k: built.append(build(*a, **k)) or built[-1])

    def replayed(module: str, job: Job, where: Path, threads: int, seconds: float = 0) -> dict[str, Any]:
        if module == "ceiling":
            config = json.loads(Path(job.policy, "config.json").read_text())
            assert (config["model_type"], config["vocab_size"], config["num_key_value_heads"]) == ("llama", 600, 1)
            assert config["tie_word_embeddings"] is True
            return dict(quick[2]["ceiling"])
        return quick[2]["ours_online-0"] | {"tokens": workload.useful_tokens(built[0].lengths), "seconds": 2.0}

    monkeypatch.setattr(throughput, "run_process", replayed)
    argv = [*DATA, "--size", "llama_1b", "--device", "cpu", "--threads", "1"]
    assert throughput.main(argv) == 0
    h, v, layers = small.width, 600, small.layers
    body = layers * (h * h * 2 + 2 * h * h // 4 + 12 * h * h + 2 * h) + h
    timed = built[0].lengths[small.warmup * small.pairs :]
    assert built[0].parameters == body + h * v
    share = workload.flops(timed, body, layers, h, v) / 2.0 / quick[2]["ceiling"]["flops_per_second"]
    assert f"| MFU: ours, cached reference | {share:.2f} | at least 0.5 |" in capsys.readouterr().out


def test_a_profile_says_what_every_part_of_a_step_takes(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- cpu-quick-profile: begin -->\nold\n<!-- cpu-quick-profile: end -->\n")
    before = Scorer.hidden, Head.forward, Nonfinite.step
    argv = [*DATA, "--size", "quick", "--device", "cpu", "--dtype", "fp32", "--threads", "1", "--warmup", "1",
            "--steps", "1"]  # fmt: skip
    assert step_profile.main([*argv, "--docs", str(page)]) == 0
    assert (Scorer.hidden, Head.forward, Nonfinite.step) == before
    rows = [row.strip("| ").split(" | ") for row in page.read_text().splitlines() if row.startswith("| ")][1:]
    shares = {row[0]: [float(share.rstrip("%")) for share in row[1:]] for row in rows if row[0] != "---"}
    assert list(shares) == [*step_profile.PARTS, "between"]
    assert sum(own[-1] for own in shares.values()) == pytest.approx(100, abs=0.5)
    for part in ("reference", "blocks", "head", "backward"):
        assert shares[part][0] > 0 and shares[part][2] > 0, part
    assert shares["reference"][1] > 0 < shares["blocks"][1] and shares["head"][1] == 0 and shares["update"][2] > 0


def test_operations_are_told_apart_by_name_and_the_outermost_mark():
    assert [step_profile.kind_of(f"aten::{name}") for name in ("addmm", "_flash_attention_forward", "add")] == [
        "products", "attention", "other"
    ]  # fmt: skip
    event = types.SimpleNamespace
    outer = event(name="reference", cpu_parent=None)
    inner = event(name="head", cpu_parent=outer)
    alone = event(name="autograd::engine::evaluate_function: MmBackward0", cpu_parent=None)
    parents = (inner, alone, None)
    assert [step_profile.part_of(event(name="aten::mm", cpu_parent=parent)) for parent in parents] == [
        "reference", "backward", "between"
    ]  # fmt: skip


def test_the_seed_study_is_timed_from_the_first_score_to_the_last_validation(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- seed_study: begin -->\nold\n<!-- seed_study: end -->\n")
    argv = ["--data", "builtin:world", "--validation", "builtin:world", "--validation_split", "validation",
            "--tokenizer", "builtin:tiny", "--pairs", "12", "--validation_pairs", "4", "--epochs", "2", "--quick"]
    assert seed_study.main([*argv, "--docs", str(page)]) == 0
    rows = [row.strip("| ").split(" | ") for row in page.read_text().splitlines() if row.startswith("| ")][2:]
    seconds = {row[0]: float(row[1]) for row in rows}
    assert list(seconds) == [
        "start-up", "data read and tokenised", "SFT", "reference scores", "validation", "checkpoints",
        "DPO steps, and all else", "first score to the end of validation 2",
    ]  # fmt: skip
    assert rows[-1][2] == "target: under 60, met" and seconds["SFT"] > 0
    assert seconds["validation"] < seconds["first score to the end of validation 2"] < 60


def test_other_pairs_are_an_error(quick, monkeypatch):
    monkeypatch.setattr(throughput, "run_process", _replayed(quick[2]))
    with pytest.raises(SystemExit, match="not the pairs that were drawn"):
        throughput.main([*ARGV, "--systems", "ours_online", "--seed", "1"])


def test_a_process_that_fails_is_an_error_with_its_log(tmp_path):
    job = Job("", "", "", "", "", 8, 4, 1, 1, "fp32", "nowhere", 1e-4, 0.1)
    with pytest.raises(SystemExit, match=r"ceiling failed:\n[\s\S]*nowhere"):
        throughput.run_process("ceiling", job, tmp_path / "job", 1)


def test_a_process_that_would_end_later_than_it_may_is_killed_and_said_to_be(tmp_path):
    job = Job("", "", "", "", "", 8, 4, 1, 1, "fp32", "nowhere", 1e-4, 0.1)
    started = time.monotonic()
    with pytest.raises(SystemExit, match="ceiling was killed after 0 s$"):
        throughput.run_process("ceiling", job, tmp_path / "job", 1, seconds=0.1)
    assert time.monotonic() - started < 2


def _run(system: str, seconds: float, *losses: float, **more: Any) -> report.Run:
    made = {"system": system, "seconds": seconds, "losses": list(losses), "timed_pairs": 8, "peak_gib": 1.0}
    return made | {"same_order": True, "build_seconds": None} | more


def test_losses_that_prove_nothing_or_are_not_finite_are_found():
    start = math.log(2)
    still = [_run("ours_online", 1, start, start), _run("trl_default", 1, start, start)]
    assert "prove nothing" in report.disagreements(still, "fp32")[0]
    assert report.disagreements(still[:1], "fp32") == []  # there is nothing to agree with
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
    memory = report.ratios([_run("ours_8_pairs", 1, peak_gib=2), _run("trl_default", 1, peak_gib=5)], "cuda")[-1]
    assert memory["values"] == [0.4] and "| at most 0.5 | met |" in report.ratios_table([memory])
    share = report.ratios([_run("ours_cached", 1, mfu=0.41), _run("ours_cached", 1, mfu=0.43)], "llama_1b")
    assert "| MFU: ours, cached reference | 0.42 (0.41 to 0.43) | at least 0.5 | missed by 16% |" in (
        report.ratios_table(share)
    )


def test_one_changed_part_is_told_as_time_against_the_default(quick, tmp_path, monkeypatch):
    measured = quick[2]["ours_online-0"]

    def slower(module: str, job: Job, where: Path, threads: int, seconds: float = 0) -> dict[str, Any]:
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
