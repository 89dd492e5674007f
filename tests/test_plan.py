"""What a run would do, told without doing it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import train_dpo
from dpo.plan import GIB, memory
from tests.data.tiny_tokenizers import plain_rows, written


def parts(stage: int, **changes: int | bool) -> list[float]:
    """GiB of weights, gradients, optimizer, reference for 2^30 parameters on 4 ranks: the bytes of one parameter."""
    kwargs = dict(stage=stage, world_size=4, half=True, reference_bytes=2) | changes
    return list(memory(GIB, **kwargs).values())  # type: ignore[arg-type]


def test_each_stage_shares_one_part_more_among_the_ranks() -> None:
    assert parts(0) == [2, 4, 12, 2]
    assert parts(1) == [2, 4, 3, 2]
    assert parts(2) == [2, 1, 3, 2]
    assert parts(3) == [0.5, 1, 3, 0.5]


def test_fp32_has_no_master_copy() -> None:
    assert parts(2, half=False, reference_bytes=4) == [4, 1, 2, 4]
    assert parts(3, half=False, reference_bytes=0, world_size=1) == [4, 4, 8, 0]


def test_seven_billion_parameters_on_eight_gpus_take_what_is_known() -> None:
    found = memory(7_000_000_000, stage=2, world_size=8, half=True, reference_bytes=2)
    assert sum(found.values()) == pytest.approx(7e9 * (2 + 4 / 8 + 12 / 8 + 2) / 2**30)
    assert list(found) == ["weights", "gradients", "optimizer (AdamW, fp32 master)", "reference"]


@pytest.mark.parametrize("flag", ["--dry_run", "--prepare_only"])
def test_the_plan_is_printed_and_nothing_is_written(
    flag: str, tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(tmp_path, plain_rows(10))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    argv = ["--model.policy", str(tiny_policy), "--data.train", str(data), "--train.global_batch_size", "4"]
    argv += ["--train.epochs", "3", "--data.cache_dir", str(tmp_path / "cache"), flag]
    before = {file: file.stat().st_mtime_ns for file in tiny_policy.iterdir()}
    assert train_dpo.main(argv) == 0
    shown = re.sub(r"\s+", " ", re.sub("[^ -~]", " ", capsys.readouterr().out))
    assert "pairs: training / validation 10 / 0" in shown
    assert "optimizer steps 9 (3 an epoch)" in shown and "ranks x pairs a step 1 x 4" in shown
    if flag == "--dry_run":
        assert re.search(r"costliest micro-batch \d+ tokens, [\d.]+ s forward and backward", shown)
        assert re.search(r"memory per GPU: sum without activations 0\.00[1-9] GiB", shown)
    else:
        assert f"export HF_HUB_OFFLINE=1 DPO_CACHE={tmp_path / 'cache'}" in shown
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache", "train.jsonl"]
    assert before == {file: file.stat().st_mtime_ns for file in tiny_policy.iterdir()}
