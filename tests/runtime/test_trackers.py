"""Trackers see every line once, under the same names and axes, in however many processes a run was done."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dpo.runtime.trackers import BACKENDS, named
from dpo.runtime.tracking import Recorder, keep_lines, read_lines

CONFIG = {"loss": {"beta": 0.1}, "model": {"policy": "<script>alert(1)</script>"}}
SFT = [{"sft_step": step, "sft_loss": 3.0 / step, "grad_norm": 1.0} for step in (1, 2, 3)]


def dpo_lines(first: int, last: int) -> list[dict[str, Any]]:
    """Training every step, an evaluation and samples every second."""
    lines: list[dict[str, Any]] = []
    for step in range(first, last + 1):
        lines.append({"step": step, "loss": 1.0 / step, "grad_norm": math.inf if step == 3 else 2.0})
        if step % 2 == 0:
            lines += [{"step": step, "eval_loss": 2.0 / step}, {"step": step, "samples/kl": float(step)}]
    return lines


def attempt(run: Path, backend: str, lines: Sequence[dict[str, Any]], checkpoint: int | None) -> None:
    """One process of a run: it takes up a checkpoint, drops the later lines, and is killed without closing anything."""
    recorder = Recorder(run, CONFIG, [backend])
    if checkpoint is not None:
        keep_lines(run, lambda line: "sft_step" in line or line["step"] <= checkpoint)
    for line in lines:
        recorder.record(line)
    if backend == "wandb":
        recorder.__exit__(None)  # its own process would outlive the test
        time.sleep(1.1)  # it names its folders by the second


def whole_run_in_three_processes(run: Path, backend: str) -> None:
    run.mkdir()
    (run / "audit.json").write_text(json.dumps({"version": 1, "sets": [{"name": "<b>set</b>"}]}))
    attempt(run, backend, SFT + dpo_lines(1, 5), None)
    attempt(run, backend, dpo_lines(3, 4), 2)
    attempt(run, backend, dpo_lines(3, 8), 2)


EXPECTED = {
    "sft/loss": [(step, 3.0 / step) for step in (1, 2, 3)],
    "sft/grad_norm": [(step, 1.0) for step in (1, 2, 3)],
    "loss": [(step, 1.0 / step) for step in range(1, 9)],
    "grad_norm": [(step, 2.0) for step in range(1, 9) if step != 3],
    "eval_loss": [(step, 2.0 / step) for step in (2, 4, 6, 8)],
    "samples/kl": [(step, float(step)) for step in (2, 4, 6, 8)],
}


def test_sft_has_names_and_an_axis_of_its_own() -> None:
    assert named({"step": 4, "loss": None, "x": 0.5}) == ("step", 4, {"x": 0.5})
    line = {"sft_step": 6, "sft_loss": 2.0, "sft_epoch": 0.5, "learning_rate": 1e-3}
    assert named({"sft_step": 6, "eval_sft_loss": 2.5}) == ("sft/step", 6, {"sft/eval_loss": 2.5})
    assert named(line) == ("sft/step", 6, {"sft/loss": 2.0, "sft/epoch": 0.5, "sft/learning_rate": 1e-3})


def test_tensorboard_shows_every_step_once_although_the_run_was_killed_twice(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="an extra")
    whole_run_in_three_processes(tmp_path / "run", "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    texts = {}
    for stage in ("sft", "dpo"):
        events = EventAccumulator(str(tmp_path / "run/tensorboard" / stage))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["tensors"]:
            texts[stage, tag] = [e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)]
    assert found.keys() == EXPECTED.keys()
    for name, points in EXPECTED.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points])
    (config,), (audit,) = texts["dpo", "config/text_summary"], texts["dpo", "audit/text_summary"]
    assert "beta: 0.1" in config and "<b>set</b>" in audit
    assert all(line.startswith("    ") for line in (config + audit).splitlines() if line)


def test_tensorboard_keeps_what_a_step_had_before_the_evaluation_in_which_the_run_was_stopped(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="an extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    run.mkdir()
    attempt(run, "tensorboard", [{"step": 3, "loss": 0.75}, {"step": 4, "loss": 0.5}], None)
    attempt(run, "tensorboard", [{"step": 4, "eval_loss": 0.25}, {"step": 5, "loss": 0.125}], 4)
    events = EventAccumulator(str(run / "tensorboard/dpo"))
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {"loss": [(3, 0.75), (4, 0.5), (5, 0.125)], "eval_loss": [(4, 0.25)]}


class FakeModule(types.ModuleType):
    """The functions that Weights & Biases and trackio share; remembers who called them how."""

    def __init__(self) -> None:
        super().__init__("fake")
        self.inits: list[dict[str, Any]] = []
        self.history: list[dict[str, float]] = []

    def init(self, **how: Any) -> None:
        self.inits.append(how)

    def log(self, values: dict[str, float]) -> None:
        self.history.append(values)

    def finish(self) -> None:
        pass


def points_of(history: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for values in history:
        (axis,) = values.keys() & {"step", "sft/step"}
        for name in values.keys() - {axis}:
            found.setdefault(name, []).append((int(values[axis]), values[name]))
    return found


def test_trackio_is_told_every_step_once_and_continues_one_run(tmp_path: Path, monkeypatch: Any) -> None:
    fake = FakeModule()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    whole_run_in_three_processes(tmp_path / "run", "trackio")
    assert points_of(fake.history) == EXPECTED
    assert len(fake.inits) == 3 and len({how["name"] for how in fake.inits}) == 1
    assert {how["resume"] for how in fake.inits} == {"allow"}
    assert fake.inits[0]["config"] == CONFIG | {"audit": {"version": 1, "sets": [{"name": "<b>set</b>"}]}}
    assert len(read_lines(tmp_path / "run")) == len(SFT + dpo_lines(1, 8))


def test_a_tracker_that_joins_a_resumed_run_is_told_all_that_follows(tmp_path: Path, monkeypatch: Any) -> None:
    fake = FakeModule()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in dpo_lines(1, 2)))
    attempt(run, "trackio", [{"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.25}], 1)
    assert points_of(fake.history) == {"loss": [(2, 0.5), (3, 0.25)]}


def test_weights_and_biases_offline_holds_one_run_of_every_step(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("wandb", reason="an extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-own"))
    run = tmp_path / "run"
    whole_run_in_three_processes(run, "wandb")
    identity = json.loads((run / "trackers.json").read_text())["wandb"]["id"]
    files = sorted(run.glob(f"wandb/offline-run-*-{identity}/run-{identity}.wandb"))
    history, configs, axes = [], [], {}
    for file in files:
        for record in records_of(file):
            if record.history.item:
                row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                history.append({key: value for key, value in row.items() if not key.startswith("_")})
            if record.run.config.update:
                configs.append({u.key: json.loads(u.value_json) for u in record.run.config.update})
            if record.metric.step_metric:
                axes[record.metric.name] = record.metric.step_metric
    assert points_of(history) == EXPECTED
    assert configs[0]["loss"] == {"beta": 0.1} and configs[0]["audit"]["version"] == 1
    assert axes == {name: "sft/step" if name.startswith("sft/") else "step" for name in EXPECTED}


def records_of(file: Path) -> list[Any]:
    """Every record of an offline run's log.

    It is a LevelDB log after a header of 7 bytes: blocks of 32 KiB that hold pieces of checksum (4), length (2), kind
    (1: whole, 2 to 4: first, middle, last) and content.
    """
    proto = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, at, held, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no piece begins in the last bytes of a block
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        held += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(proto.Record.FromString(held))
            held = b""
    return records


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, ("dpo", "run")), ({"WANDB_PROJECT": "mine"}, ("mine", "run")), ({"WANDB_NAME": "first"}, ("dpo", "first"))],
)
def test_project_and_name_of_weights_and_biases_are_its_own_variables_where_they_are_set(
    variables, expected, tmp_path, monkeypatch
):
    given: dict[str, Any] = {}
    stand_in = types.SimpleNamespace(init=lambda **arguments: given.update(arguments), log=None, finish=None)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    run.mkdir()
    BACKENDS["wandb"](run, {}, [])
    assert (given.get("project"), given.get("name")) == expected
