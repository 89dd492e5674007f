"""The soak script sees what a kill hit, and a run that ends otherwise than the undisturbed one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import soak
from benchmarks.soak_rank import open_phases, read_trace


def _trace(path: Path, *names: str, cut: str = "") -> Path:
    path.write_text("".join(f"{name}\t{at}\n" for at, name in enumerate(names)) + cut)
    return path


@pytest.mark.parametrize(
    ("names", "phases"),
    [
        (("sft", "update", "-update", "checkpoint"), ["sft", "checkpoint"]),
        (("sft", "checkpoint", "-checkpoint", "-sft", "step", "update"), ["step"]),
        (("cache check", "-cache check", "cache"), ["cache"]),
        (("evaluation", "-evaluation"), []),
    ],
)
def test_the_phase_of_a_kill_is_the_innermost_one_not_left(tmp_path, names, phases):
    assert open_phases(read_trace(_trace(tmp_path / "trace", *names, cut="-ste"))) == phases


class FakeJob:
    """A job that has written what a run writes, `change` apart if it was ever killed."""

    change: Callable[[Path], None]

    def __init__(self, argv: list[str], folder: Path) -> None:
        folder.mkdir(parents=True)
        everything = ("sft", *["update"] * 6, "-sft", "cache", "-cache", "evaluation", "-evaluation", "step", "-step")
        self.traces = [_trace(folder / "t", *everything, "checkpoint", "-checkpoint", "step")] * 2
        run = Path(argv[argv.index("--train.output_dir") + 1])
        (run / "final").mkdir(parents=True, exist_ok=True)
        (run / "final/model.safetensors").write_bytes(b"weights")
        lines = [{"step": step, "loss": 0.5, "perf/seconds": id(self)} for step in range(3)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if run.name == "killed":
            type(self).change(run)

    def kill(self, victims: list[int]) -> float:
        return 0.5

    def wait(self) -> list[int]:
        return [0, 0]


def _other_weights(run: Path) -> None:
    (run / "final/model.safetensors").write_bytes(b"Weights")


def _step_twice(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines, lines[-1]]) + "\n")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [(lambda run: None, ""), (_other_weights, "other weights"), (_step_twice, "other metrics")],
)
def test_a_run_that_ends_otherwise_than_undisturbed_is_reported(monkeypatch, tmp_path, capsys, change, complaint):
    monkeypatch.setattr(soak, "Job", FakeJob)
    monkeypatch.setattr(soak.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(soak.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    FakeJob.change = staticmethod(change)
    code = soak.main(["--kills", "10", "--json", str(tmp_path / "figures.json")])
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures["kills"]) == 10 and sum(kill["whole_job"] for kill in figures["kills"]) == 5
    assert (code, bool(figures["different"])) == ((1, True) if complaint else (0, False))
    assert complaint in printed
