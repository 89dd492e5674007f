"""Ten steps give TRL's numbers: both trainers run here, on the same token ids."""

from __future__ import annotations

import json
import math

import pytest
from transformers import AutoTokenizer

import train_dpo
from dpo.runtime.tracking import read_lines
from tests import ranks
from tests.by_path import prepare_pairs

LOSSES = ("sigmoid", "hinge", "ipo")
STEPS, BATCH, LENGTH, ROWS, BETA, LR = 10, 6, 256, 70, 0.1, 3e-4
DATA = "hh-rlhf/train.jsonl.gz"


@pytest.fixture(scope="module")
def trl(shared_data, tmp_path_factory) -> dict[str, list[dict[str, float]]]:
    """What TRL's trainer gives."""
    folder = tmp_path_factory.mktemp("trl")
    policy = shared_data / "stories260k-llama"
    pairs, _ = prepare_pairs(
        shared_data / DATA, AutoTokenizer.from_pretrained(policy), limit=ROWS, max_length=LENGTH,
        max_prompt_length=LENGTH // 2, on_bad_row="skip", cache_dir=folder / "cache",
    )
    rows = [pairs[i] for i in range(STEPS * BATCH)]
    assert len({len(row.chosen_ids) - len(row.rejected_ids) for row in rows}) > 10
    job = {
        "policy": str(policy), "output_dir": str(folder / "out"), "losses": LOSSES, "beta": BETA, "lr": LR,
        "batch_size": BATCH, "steps": STEPS,
        "pairs": [
            {k: getattr(row, k).tolist() for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in rows
        ],
    }
    (folder / "job.json").write_text(json.dumps(job))
    done = ranks.run(["tests/parity/trl_run.py", str(folder / "job.json"), str(folder / "found.json")])
    assert done.codes == [0], done.output[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize(("loss", "micro_batch"), [("sigmoid", None), ("sigmoid", 2), ("hinge", 2), ("ipo", None)])
def test_ten_steps_equal_those_of_trl(trl, shared_data, tmp_path, loss, micro_batch):
    argv = [
        "--config", "ds_configs/zero2.json", "--model.policy", str(shared_data / "stories260k-llama"),
        "--data.train", str(shared_data / DATA), "--data.train_limit", str(ROWS), "--data.max_length", str(LENGTH),
        "--data.on_bad_row", "skip", "--data.shuffle", "false", "--data.cache_dir", str(tmp_path / "cache"),
        "--train.global_batch_size", str(BATCH), "--train.max_steps", str(STEPS), "--train.precision", "fp32",
        "--train.output_dir", str(tmp_path / "run"), "--loss.name", loss, "--loss.beta", str(BETA),
        "--optim.lr", str(LR), "--optim.schedule", "constant", "--optim.warmup_steps", "0", "--log.samples", "0",
    ]
    if micro_batch:
        argv += ["--train.micro_batch_size", str(micro_batch)]
    assert train_dpo.main(argv) == 0
    ours = read_lines(tmp_path / "run")
    assert len(ours) == STEPS
    assert abs(ours[-1]["loss"] - ours[0]["loss"]) > 0.05 or abs(ours[-2]["loss"] - ours[0]["loss"]) > 0.05
    for mine, theirs in zip(ours, trl[loss], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=5e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        for name in ("logps/chosen", "logps/rejected"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-6), name
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-4), name
    assert all(math.isfinite(line["loss"]) for line in ours)
