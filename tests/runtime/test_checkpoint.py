"""The run directory: whose it is, which checkpoints stay, and what appears whole or not at all."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from dpo.config import Config, DataConfig, ModelConfig, to_dict
from dpo.errors import UserError
from dpo.runtime import checkpoint, files, folders, manifest, run_directory
from dpo.runtime.distributed import World
from dpo.runtime.manifest import write_manifest
from dpo.runtime.run_directory import MAY_CHANGE
from dpo.types import TrainState

ALONE = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def config_of(run: Path, **changes: Any) -> Config:
    """A config whose run directory is `run`; changes are given as section__key=value."""
    config = Config(model=ModelConfig(policy="p"), data=DataConfig(train="d"))
    for name, value in ({"train__output_dir": str(run)} | changes).items():
        section, key = name.split("__")
        part = dataclasses.replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def begin(run: Path) -> None:
    """Leave what a first step leaves."""
    (run / "metrics.jsonl").write_text('{"step": 1}\n')


def newest(run: Path, resume: str, stage: int = 2, total_steps: int = 100, world: World = ALONE) -> Path | None:
    return checkpoint.newest(run, resume, world, stage=stage, precision="bf16", total_steps=total_steps)[0]


save = partial(checkpoint.save, precision="bf16")


def open_run(config: Config) -> None:
    with run_directory.opened(config, ALONE):
        pass


def refusal(config: Config) -> str:
    with pytest.raises(UserError) as error:
        run_directory.check_run(config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one"


# --- whose folder it is ----------------------------------------------------------------------------------------------


def test_a_new_or_empty_folder_is_taken_and_checking_writes_nothing(run: Path) -> None:
    run_directory.check_run(config_of(run))
    assert not run.exists()
    run.mkdir(parents=True)
    run_directory.check_run(config_of(run))
    assert not any(run.iterdir())


def test_an_opened_run_is_known_the_second_time_and_holds_its_settings(run: Path) -> None:
    config = config_of(run)
    open_run(config)
    assert sorted(file.name for file in run.iterdir()) == [".lock", "config.yaml"]
    run_directory.check_run(config)
    longer = config_of(run, train__epochs=3)
    open_run(longer)
    assert yaml.safe_load((run / "config.yaml").read_text()) == to_dict(longer)


LOCKED = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from dpo.runtime.run_directory import _lock
stream = open(sys.argv[2] + "/.lock", "a+")
_lock(stream, sys.argv[2])
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_two_processes_never_train_in_one_run_and_a_killed_one_leaves_no_lock(run: Path) -> None:
    config = config_of(run)
    run.mkdir(parents=True)
    argv = [sys.executable, "-c", LOCKED, str(Path(__file__).resolve().parents[2]), str(run)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        pid = other.stdout.readline().strip()
        with pytest.raises(UserError, match=f"{run} is in use by process {pid} on .*; wait for its end, or name anoth"):
            open_run(config)
        assert not (run / "config.yaml").exists()
        other.kill()
    open_run(config)
    with run_directory.opened(config, ALONE), pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
        open_run(config)


def test_a_file_system_without_locks_is_taken_as_it_is(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_directory.fcntl, "flock", without)
    open_run(config_of(run))
    assert (run / "config.yaml").exists()


def test_a_folder_that_another_node_does_not_see_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1's own disk: what rank 0 does is not done there."""
    monkeypatch.setattr(run_directory, "only_main", lambda world, function: None)
    elsewhere = World(rank=1, world_size=2, local_rank=0, device=torch.device("cpu"))
    message = f"{run} is not there for rank 1 on .*; name a folder on a disk that all nodes share"
    with pytest.raises(UserError, match=message), run_directory.opened(config_of(run), elsewhere):
        pass


def test_other_files_are_refused(run: Path) -> None:
    run.mkdir(parents=True)
    (run / "thesis.txt").write_text("mine")
    assert refusal(config_of(run)) == (
        f"train.output_dir {run} holds other files and no run; name a new or empty folder"
    )


def test_a_file_in_the_way_is_refused(run: Path) -> None:
    run.parent.mkdir()
    run.write_text("mine")
    assert refusal(config_of(run)) == f"train.output_dir {run} is a file; name a folder"
    below = config_of(run / "x")
    assert "cannot be written" in str(pytest.raises(UserError, open_run, below).value)
    assert run.read_text() == "mine"


def test_a_run_that_never_took_a_step_may_start_with_other_settings(run: Path) -> None:
    open_run(config_of(run))
    run_directory.check_run(config_of(run, loss__beta=0.5))
    begin(run)
    assert "loss.beta was 0.1, now 0.5" in refusal(config_of(run, loss__beta=0.5))


def test_another_run_is_refused_and_every_changed_key_is_named(run: Path) -> None:
    open_run(config_of(run))
    begin(run)
    before = (run / "config.yaml").read_text()
    message = refusal(config_of(run, loss__beta=0.5, data__train="e", optim__betas=(0.9, 0.95), train__epochs=7))
    assert message == (
        f"train.output_dir {run} holds another run: data.train was 'd', now 'e', loss.beta was 0.1, now 0.5,"
        f" optim.betas was [0.9, 0.999], now [0.9, 0.95]; name another folder, or give the old values to continue"
    )
    assert (run / "config.yaml").read_text() == before


def test_a_key_that_the_old_run_did_not_have_counts_as_changed_unless_it_is_unset(run: Path) -> None:
    open_run(config_of(run))
    begin(run)
    old = yaml.safe_load((run / "config.yaml").read_text())
    del old["optim"]["lr"], old["data"]["subset"]
    (run / "config.yaml").write_text(yaml.safe_dump(old))
    assert "optim.lr was None, now 1e-06;" in refusal(config_of(run)) and "subset" not in refusal(config_of(run))


OTHER_VALUES: dict[type, Any] = {int: 5, float: 0.25, str: "sdpa", bool: True, type(None): 6, tuple: ("wandb",)}


@pytest.mark.parametrize("key", sorted({*MAY_CHANGE} - {"train.resume", "train.output_dir"}))
def test_settings_that_move_no_step_may_change(run: Path, key: str) -> None:
    section, name = key.split(".")
    open_run(config_of(run))
    other = OTHER_VALUES[type(getattr(getattr(config_of(run), section), name))]
    changed = config_of(run, **{f"{section}__{name}": other})
    assert changed != config_of(run)
    run_directory.check_run(changed)


def test_every_setting_that_may_not_change_is_refused(run: Path) -> None:
    open_run(config_of(run))
    begin(run)
    keys = run_directory._flat(to_dict(config_of(run))).keys() - {*MAY_CHANGE}
    assert {"loss.beta", "optim.lr", "train.seed", "train.global_batch_size", "train.precision"} <= keys
    assert {*MAY_CHANGE} < run_directory._flat(to_dict(config_of(run))).keys(), "a key of MAY_CHANGE is no setting"
    path = run / "config.yaml"
    whole = yaml.safe_load(path.read_text())
    for key in keys:
        section, *between, name = key.split(".")
        changed = copy.deepcopy(whole)
        inner = changed[section]
        for part in between:
            inner = inner[part]
        inner[name] = "other"
        path.write_text(yaml.safe_dump(changed))
        assert f": {key} was 'other', now " in refusal(config_of(run))


def test_the_settings_that_may_change_are_listed_in_the_guide() -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs/reliability.md").read_text(encoding="utf-8")
    listed = guide.split("## What a run that goes on may change")[1].split(".\n\n")[0]
    assert sorted(listed.strip().replace("\n", " ").split(", ")) == sorted(f"`{key}`" for key in MAY_CHANGE)


def test_resume_never_refuses_a_folder_with_a_run(run: Path) -> None:
    run_directory.check_run(config_of(run, train__resume="never"))
    open_run(config_of(run))
    message = refusal(config_of(run, train__resume="never"))
    assert message == f"train.output_dir {run} holds a run and train.resume is never; name another folder"
    run_directory.check_run(config_of(run, train__resume=str(run / "checkpoints" / "step-000001")))


@pytest.mark.parametrize("content", [b"- a\n- b\n", b"{", b"\xff\xfe\x00", b"text"])
def test_settings_that_cannot_be_read_are_refused(run: Path, content: bytes) -> None:
    run.mkdir(parents=True)
    (run / "config.yaml").write_bytes(content)
    assert refusal(config_of(run)).startswith(f"{run}/config.yaml is not the settings of a run; name another")


def test_a_finished_run_says_what_to_raise_until_there_are_more_steps(run: Path) -> None:
    run.mkdir(parents=True)
    assert run_directory.finished(run, 4) is None
    (run / "finished.json").write_text('{"step": 4}')
    said = run_directory.finished(run, 4)
    told = f"{run} is finished: 4 steps are done; raise train.epochs or train.max_steps to go on; other settings change"
    assert said is not None and said.startswith(told) and f"python -m dpo export {run} --dtype bf16" in said
    assert run_directory.finished(run, 3) is not None
    assert run_directory.finished(run, 5) is None


# --- checkpoints -----------------------------------------------------------------------------------------------------


class FakeEngine:
    """Writes and reads a folder as DeepSpeed does."""

    module = torch.nn.Linear(1, 1)

    def save_checkpoint(
        self, parent: str, tag: str, client_state: dict[str, Any], save_latest: bool, exclude_frozen_parameters: bool
    ) -> None:
        assert save_latest is False and client_state["universal_checkpoint_info"] and not exclude_frozen_parameters
        (Path(parent) / tag).mkdir(parents=True)
        (Path(parent) / tag / "weights").write_text(tag)
        for name in ("zero_to_fp32.py", "zero_to_torch.py"):
            (Path(parent) / name).write_text("a converter that does not know these folders")

    def load_checkpoint(self, parent: str, tag: str, load_module_strict: bool) -> tuple[str | None, dict[str, Any]]:
        assert load_module_strict
        weights = Path(parent) / tag / "weights"
        return (weights.read_text() if weights.exists() else None), {}

    def zero_optimization_stage(self) -> int:
        return 2


def names(run: Path) -> list[str]:
    return sorted(folder.name for folder in (run / "checkpoints").iterdir())


def test_the_newest_checkpoints_are_kept(run: Path) -> None:
    for step in (2, 4, 6, 12):
        folder = save(FakeEngine(), run, TrainState(step, 10 * step), ALONE, keep=2)
        assert folder == run / "checkpoints" / f"step-{step:06d}"
    assert names(run) == ["step-000006", "step-000012"]
    found = newest(run, "auto")
    assert found == run / "checkpoints" / "step-000012"
    assert checkpoint.load(FakeEngine(), found, ALONE) == TrainState(12, 120)
    assert newest(run, str(run / "checkpoints" / "step-000006")) == run / "checkpoints" / "step-000006"


def test_going_back_to_an_earlier_checkpoint_drops_the_later_ones(run: Path) -> None:
    for step in (2, 4, 6):
        save(FakeEngine(), run, TrainState(step, 10 * step), ALONE, keep=3)
    assert checkpoint.load(FakeEngine(), run / "checkpoints" / "step-000004", ALONE) == TrainState(4, 40)
    assert names(run) == ["step-000002", "step-000004"]


def test_what_the_next_line_already_holds_is_kept(run: Path) -> None:
    state = TrainState(2, 1, (0.5, 1.25, 3.0))
    assert checkpoint.load(FakeEngine(), save(FakeEngine(), run, state, ALONE, keep=1), ALONE) == state


def test_a_checkpoint_without_engine_state_is_refused(run: Path) -> None:
    folder = save(FakeEngine(), run, TrainState(2, 1), ALONE, keep=1)
    (folder / "weights").unlink()
    with pytest.raises(UserError, match="holds no engine state; delete the folder"):
        checkpoint.load(FakeEngine(), folder, ALONE)


def test_a_checkpoint_of_another_run_is_refused(run: Path, tmp_path: Path) -> None:
    other = save(FakeEngine(), tmp_path / "other", TrainState(2, 1), ALONE, keep=1)
    with pytest.raises(UserError, match="is no checkpoint of .*; it has none"):
        newest(run, str(other))


def test_a_checkpoint_beyond_the_end_is_refused(run: Path) -> None:
    save(FakeEngine(), run, TrainState(4, 1), ALONE, keep=1)
    with pytest.raises(UserError, match="is beyond the 3 steps asked for; raise train.max_steps"):
        newest(run, "auto", total_steps=3)


def test_a_checkpoint_whose_optimizer_another_start_cannot_take_is_refused(run: Path) -> None:
    folder = save(FakeEngine(), run, TrainState(4, 1), ALONE, keep=1)
    with pytest.raises(UserError, match="was written under ZeRO-2, this is ZeRO-0; give a --config of stage 1, 2 or 3"):
        newest(run, "auto", stage=0)
    assert newest(run, "auto", stage=3) == folder
    (folder / "offloaded_tensors").mkdir()
    with pytest.raises(UserError, match="an optimizer that 1 ranks kept on NVMe; start as many under ZeRO-2"):
        newest(run, "auto", stage=3)
    assert newest(run, "auto") == folder


def test_a_checkpoint_written_again_replaces_the_old_one(run: Path) -> None:
    save(FakeEngine(), run, TrainState(2, 1), ALONE, keep=3)
    (run / "checkpoints" / "step-000002" / "stale").write_text("")
    save(FakeEngine(), run, TrainState(2, 7), ALONE, keep=3)
    assert names(run) == ["step-000002"]
    assert not (run / "checkpoints" / "step-000002" / "stale").exists()
    assert checkpoint.load(FakeEngine(), run / "checkpoints" / "step-000002", ALONE) == TrainState(2, 7)


def test_a_checkpoint_that_was_not_finished_is_never_taken(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    move = os.replace

    def killed(old: Path, new: Path) -> None:
        if old.is_dir():  # everything is written but the last rename
            raise KeyboardInterrupt
        move(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save(FakeEngine(), run, TrainState(4, 2), ALONE, keep=2)
    assert newest(run, "auto") is None
    save(FakeEngine(), run, TrainState(2, 1), ALONE, keep=2)
    (run / "checkpoints" / "partial-step-000009").mkdir()
    assert newest(run, "auto") == run / "checkpoints" / "step-000002"
    save(FakeEngine(), run, TrainState(4, 2), ALONE, keep=2)
    assert newest(run, "auto") == run / "checkpoints" / "step-000004"
    assert "partial-step-000004" not in names(run)


def test_nothing_to_resume_is_no_error_but_a_named_checkpoint_must_be_there(run: Path) -> None:
    assert newest(run, "auto") is None
    with pytest.raises(UserError, match="train.resume .*none is no checkpoint of .*; it has none"):
        newest(run, str(run / "none"))
    save(FakeEngine(), run, TrainState(2, 1), ALONE, keep=1)
    with pytest.raises(UserError, match=f"train.resume .*none is no checkpoint of .*; it has step-000002 in {run}"):
        newest(run, str(run / "none"))


TRAIN_STATE = {"step": 2, "num_tokens": 1, "unlogged": [], "running": 0.0, "skipped": 0}


def test_a_checkpoint_of_other_ranks_is_taken_and_the_log_says_that_it_is_converted(run: Path) -> None:
    folder = save(FakeEngine(), run, TrainState(2, 1), ALONE, keep=2)
    state = json.loads((folder / "state.json").read_text())
    assert state == TRAIN_STATE | {"world_size": 1, "zero_stage": 2, "precision": "bf16"}
    (folder / "state.json").write_text(json.dumps(state | {"world_size": 3}))
    write_manifest(folder, ALONE)
    found, notes = checkpoint.newest(run, "auto", ALONE, stage=2, precision="bf16", total_steps=9)
    assert found == folder
    assert notes == [f"checkpoint {folder} was written by 3 ranks under ZeRO-2; it is converted to 1 under ZeRO-2"]


# --- damage ----------------------------------------------------------------------------------------------------------


def cut(folder: Path) -> str:
    os.truncate(folder / "weights", 3)
    return "weights has 3 bytes of "


def flip_a_bit(folder: Path) -> str:
    content = bytearray((folder / "weights").read_bytes())
    content[2] ^= 1
    (folder / "weights").write_bytes(content)
    return "weights is not what was written (checksum)"


def lose_a_file(folder: Path) -> str:
    (folder / "weights").unlink()
    return "weights is missing"


def lose_the_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "manifest.json is missing"


def cut_the_manifest(folder: Path) -> str:
    os.truncate(folder / "manifest.json", 40)
    return "manifest.json is damaged"


def edit_the_manifest(folder: Path) -> str:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"bytes": ', '"bytes": 1'))
    return "manifest.json is damaged"


DAMAGE = [cut, flip_a_bit, lose_a_file, lose_the_manifest, cut_the_manifest, edit_the_manifest]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_taken(run: Path, damage: Any) -> None:
    before, last = (save(FakeEngine(), run, TrainState(step, 1), ALONE, keep=2) for step in (2, 4))
    wrong = damage(last)
    found, notes = checkpoint.newest(run, "auto", ALONE, stage=2, precision="bf16", total_steps=9)
    assert found == before and len(notes) == 1
    assert notes[0].startswith(f"checkpoint {last} is not used: {wrong}")
    damage(before)
    with pytest.raises(UserError, match=r"no whole checkpoint left: delete .*/checkpoints and .*/status.json to start"):
        newest(run, "auto")


def test_a_damaged_checkpoint_that_was_named_costs_no_other(run: Path) -> None:
    named, last = (save(FakeEngine(), run, TrainState(step, 1), ALONE, keep=2) for step in (2, 4))
    cut(named)
    with pytest.raises(UserError, match="; name another in train.resume, or let auto take the newest") as told:
        newest(run, str(named))
    assert "delete" not in str(told.value) and newest(run, "auto") == last


def test_code_in_the_shard_of_one_rank_ends_the_job_with_its_message(run: Path, monkeypatch: Any) -> None:
    folder = save(FakeEngine(), run, TrainState(2, 1), ALONE, keep=1)
    later = save(FakeEngine(), run, TrainState(4, 1), ALONE, keep=2)

    def evil(*_: object, **__: object) -> None:
        raise pickle.UnpicklingError("global os.system")

    said: list[str] = []
    monkeypatch.setattr(FakeEngine, "load_checkpoint", evil)
    monkeypatch.setattr(checkpoint, "give_up", lambda world, line: said.append(line) or sys.exit(1))
    with pytest.raises(SystemExit):
        checkpoint.load(FakeEngine(), folder, ALONE)
    assert "holds more than tensors" in said[0] and later.is_dir()


def test_the_checkpoint_with_the_best_accuracy_outlives_newer_ones(run: Path) -> None:
    run.mkdir(parents=True)
    for step, accuracy in ((1, 0.6), (2, 0.9), (3, 0.9), (4, None), (5, 0.7), (6, 0.8)):
        with open(run / "metrics.jsonl", "a") as metrics:
            metrics.write(json.dumps({"step": step, "loss": 0.5}) + "\n")
            metrics.write(json.dumps({"step": step, "eval_rewards/accuracies": accuracy}) + "\n" if accuracy else "")
        save(FakeEngine(), run, TrainState(step, 1), ALONE, keep=2)
    assert names(run) == ["step-000003", "step-000005", "step-000006"]


def test_an_evaluation_that_came_after_its_checkpoint_counts_too(run: Path) -> None:
    """As after a stop within the evaluation."""
    for step in (1, 2, 3):
        save(FakeEngine(), run, TrainState(step, 1), ALONE, keep=2)
        if step == 2:
            (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "eval_rewards/accuracies": 0.9}) + "\n")
    assert names(run) == ["step-000001", "step-000002", "step-000003"]


def test_a_folder_of_another_name_is_no_checkpoint(run: Path) -> None:
    last = save(FakeEngine(), run, TrainState(2, 1), ALONE, keep=1)
    for name in ("step-000001.keep", "step-best"):
        (last.parent / name).mkdir()
    assert checkpoint.checkpoints(run) == [last] == [save(FakeEngine(), run, TrainState(2, 1), ALONE, keep=1)]


def test_a_million_steps_are_more_than_one_less(run: Path) -> None:
    for step in (999_999, 1_000_000):
        save(FakeEngine(), run, TrainState(step, 1), ALONE, keep=1)
    assert names(run) == ["step-1000000"] and newest(run, "auto", total_steps=2_000_000) is not None


def test_a_checkpoint_of_another_precision_is_refused(run: Path) -> None:
    folder = checkpoint.save(FakeEngine(), run, TrainState(2, 1), ALONE, 1, precision="fp16")
    with pytest.raises(UserError, match=f"{folder} was written in fp16 and this start computes in bf16"):
        newest(run, "auto")
    without = partial(checkpoint.save, precision="fp16", weights=lambda folder: folder.mkdir(parents=True))
    alone = without(FakeEngine(), run, TrainState(4, 1), ALONE, 1)
    assert newest(run, "auto") == alone


def test_what_killed_processes_left_is_removed_and_nothing_else(run: Path) -> None:
    kept = save(FakeEngine(), run, TrainState(2, 1), ALONE, keep=1)
    for name in ("partial-step-000009", "universal-step-000002", "partial-universal-step-000002", "sft-000004"):
        (kept.parent / name / "within").mkdir(parents=True)
    folders.drop_leftovers(kept.parent)
    assert names(run) == ["sft-000004", "step-000002"]


def test_a_checkpoint_that_somebody_reads_is_dropped_without_an_end_of_the_run(run: Path, monkeypatch) -> None:
    """On NFS a file that is open leaves another behind when it is deleted."""
    save(FakeEngine(), run, TrainState(2, 1), ALONE, keep=1)
    monkeypatch.setattr(folders.shutil, "rmtree", lambda path, ignore_errors: None)
    last = save(FakeEngine(), run, TrainState(4, 1), ALONE, keep=1)
    assert checkpoint.checkpoints(run) == [last] and "partial-old-step-000002" in names(run)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, move = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append(f"{old} -> {new}"), move(old, new)))
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text('{"step": 2}\n')
    folder = save(FakeEngine(), run, TrainState(2, 1), ALONE, keep=1)
    unfinished = folder.with_name(f"partial-{folder.name}")
    named = done.index(f"{unfinished} -> {folder}")
    assert f"{run}/metrics.jsonl" in done[:named]  # the lines of its steps too
    assert {str(unfinished / file.name) for file in folder.iterdir() if file.name == "weights"} <= {*done[:named]}
    assert {f"{unfinished}/manifest.json.new", f"{unfinished}/state.json", str(unfinished)} <= {*done[:named]}
    assert str(folder.parent) in done[named:]
    done.clear()
    folders.publish(run / "final", lambda target: (target / "model").write_text("x"), ALONE)
    named = done.index(f"{run}/.partial-final -> {run}/final")
    assert f"{run}/.partial-final/model" in done[:named] and str(run) in done[named:]


def test_a_disk_that_says_only_at_the_end_that_it_is_full_leaves_the_last_checkpoint(run: Path, monkeypatch) -> None:
    last = save(FakeEngine(), run, TrainState(2, 1), ALONE, keep=1)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "flush", full)
    with pytest.raises(UserError, match="cannot be written by rank 0 on .*No space left on device"):
        save(FakeEngine(), run, TrainState(4, 1), ALONE, keep=1)
    assert newest(run, "auto") == last


def test_checkpoints_of_the_sft_stage_are_apart_from_those_of_dpo(run: Path) -> None:
    save(FakeEngine(), run, TrainState(8, 1), ALONE, keep=1, kind="sft")
    assert newest(run, "auto") is None
    save(FakeEngine(), run, TrainState(2, 1), ALONE, keep=1)
    found, _ = checkpoint.newest(run, "auto", ALONE, stage=2, precision="bf16", total_steps=9, kind="sft")
    assert found == run / "checkpoints" / "sft-000008"
    assert newest(run, "auto") == run / "checkpoints" / "step-000002"


def test_too_little_disk_is_seen_before_anything_is_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = save(FakeEngine(), run, TrainState(2, 1), ALONE, keep=1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 2**30))
    with pytest.raises(UserError, match=f"takes 6.000 GiB and .* has 5.000 GiB left; {last} is whole; make room"):
        save(FakeEngine(), run, TrainState(4, 1), ALONE, keep=1, expected_bytes=6 * 2**30)
    assert names(run) == ["step-000002"] and newest(run, "auto") == last
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(UserError, match="make room"):  # the last one's size counts where it is the larger
        save(FakeEngine(), run, TrainState(4, 1), ALONE, keep=1)


def test_a_checkpoint_of_the_weights_alone_needs_no_room_for_an_optimizer(run: Path, monkeypatch) -> None:
    """As when a run goes on with train.save_weights_only because its disk is too small."""
    save(FakeEngine(), run, TrainState(2, 1), ALONE, keep=1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    save(FakeEngine(), run, TrainState(4, 1), ALONE, keep=1, weights=lambda folder: folder.mkdir(parents=True))
    assert names(run) == ["step-000004"]


def test_a_disk_that_is_full_during_the_write_leaves_the_last_checkpoint(run: Path) -> None:
    last = save(FakeEngine(), run, TrainState(2, 1), ALONE, keep=1)

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="cannot be written by rank 0 on .*No space left on device; the checkpoints be"):
        save(FakeEngine(), run, TrainState(4, 1), ALONE, 1, full)
    assert newest(run, "auto") == last


@pytest.mark.parametrize("error", [RuntimeError("Connection reset by peer"), torch.OutOfMemoryError("out of memory")])
def test_a_rank_that_is_gone_and_a_lack_of_memory_are_no_full_disk(run: Path, error: RuntimeError) -> None:
    last = save(FakeEngine(), run, TrainState(2, 1), ALONE, keep=1)

    def fails(folder: Path) -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        save(FakeEngine(), run, TrainState(4, 1), ALONE, 1, fails)
    assert newest(run, "auto") == last


# --- whole or not at all ---------------------------------------------------------------------------------------------


def test_a_published_folder_replaces_the_old_one(run: Path) -> None:
    final = run / "final"
    folders.publish(final, lambda folder: (folder / "old").touch(), ALONE)
    folders.publish(final, lambda folder: (folder / "new").touch(), ALONE)
    assert [file.name for file in final.iterdir()] == ["new"]
    assert [folder.name for folder in run.iterdir()] == ["final"]


def test_an_error_while_publishing_leaves_the_old_folder(run: Path) -> None:
    final = run / "final"
    folders.publish(final, lambda folder: (folder / "old").touch(), ALONE)

    def full(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("No space left on device")

    with pytest.raises(UserError, match="final cannot be written: No space left on device; make room and start again"):
        folders.publish(final, full, ALONE)
    assert [folder.name for folder in run.iterdir()] == ["final"], "the failed attempt keeps its room"
    assert [file.name for file in final.iterdir()] == ["old"]
    folders.publish(final, lambda folder: (folder / "new").touch(), ALONE)
    assert [file.name for file in final.iterdir()] == ["new"], "leftovers of the failed attempt were published"


def test_a_reader_sees_the_old_text_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "status.json"
    checkpoint.write_whole(file, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError()))
    with pytest.raises(OSError):
        checkpoint.write_whole(file, "new")
    assert file.read_text() == "old"


def test_versions_name_what_computed_a_run() -> None:
    assert {"python", "torch", "transformers", "deepspeed"} <= run_directory.versions().keys()


def test_a_rank_reads_back_what_it_has_written_itself():
    """Its host may still have it in memory; sorted by name, rank 10 comes before rank 2."""
    names = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(12)]
    ours = sorted([*names, "latest", "mp_rank_00_model_states.pt"])
    readers = {name: manifest._reader(name, place, 12) for place, name in enumerate(ours)}
    assert [readers[name] for name in names] == list(range(12))
    assert all(0 <= reader < 12 for reader in readers.values())
    assert manifest._reader(names[11], 0, 4) == 3  # of a checkpoint of more ranks


def test_ranks_that_write_a_file_at_the_same_time_do_not_write_into_one_another(monkeypatch, tmp_path):
    used = []
    monkeypatch.setattr(files.os, "replace", lambda new, path: used.append(Path(new).name))
    for rank in ("0", "1", "7"):
        monkeypatch.setenv("RANK", rank)
        files.write_whole(tmp_path / "status.json", "x")
    assert used[0] == "status.json.new" and len(set(used)) == 3
