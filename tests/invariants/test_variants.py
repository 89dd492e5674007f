"""LoRA, moving references and offloading: as many ranks and whatever ZeRO stage, the numbers are the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dpo.train
import train_dpo
from dpo.runtime.tracking import read_lines
from tests.data.tiny_tokenizers import plain_rows, written
from tests.invariants.jobs import Run, train_all

ALPHA = 0.25
LORA = ["--model.lora.r", "4", "--optim.lr", "1e-2"]
MOVING = ["--reference.sync_steps", "2", "--reference.sync_alpha", str(ALPHA)]
CUT = ["--train.sequence_parallel_size", "2"]
OTHER = ["--reference.path", "SHARDED/other"]
SFT = ["--train.sft_epochs", "1", "--optim.sft_lr", "1e-3", "--loss.name", "aot", "--reference.mode", "cached"]
# family: the first is the truth of the others; name: (ranks, flags)
VARIANTS: dict[str, dict[str, tuple[int, list[str]]]] = {
    "lora": {
        "lora": (1, ["--config", "ds_configs/zero2.json", *LORA]),
        "lora_two_ranks": (2, ["--config", "ds_configs/zero2.json", *LORA, "--train.micro_batch_size", "2"]),
        "lora_two_ranks_zero3": (2, ["--config", "SHARDED/zero3.json", *LORA, "--model.loss_in_forward", "true"]),
        "lora_cut_two_ranks_zero3": (2, ["--config", "SHARDED/zero3.json", *LORA, *CUT]),
    },
    "moving": {
        "moving": (1, ["--config", "ds_configs/zero2.json", *MOVING]),
        "moving_two_ranks_zero1": (2, ["--config", "ds_configs/zero1.json", *MOVING]),
        "moving_two_ranks_zero3": (2, ["--config", "SHARDED/zero3.json", *MOVING]),
        "moving_cut_two_ranks_zero3": (2, ["--config", "SHARDED/zero3.json", *MOVING, *CUT]),
    },
    "plain": {
        "plain": (1, ["--config", "ds_configs/zero2.json"]),
        "offload_two_ranks": (2, ["--config", "ds_configs/zero2_offload.json"]),
        "cut_two_ranks": (2, ["--config", "ds_configs/zero1.json", *CUT]),
        "offload_two_ranks_zero3": (2, ["--config", "ds_configs/zero3_offload.json"]),
    },
    # Stages and losses that rows cut over ranks could get wrong: what several ranks know must be counted once.
    "other": {
        "other": (1, ["--config", "ds_configs/zero2.json", *OTHER]),
        "other_cut_two_ranks": (2, ["--config", "ds_configs/zero2.json", *OTHER, *CUT]),
    },
    "sft": {
        "sft": (1, ["--config", "ds_configs/zero2.json", *SFT]),
        "sft_two_ranks": (2, ["--config", "ds_configs/zero2.json", *SFT, "--train.micro_batch_size", "2"]),
        "sft_two_ranks_zero3": (2, ["--config", "SHARDED/zero3.json", *SFT]),
        "sft_cut_two_ranks": (2, ["--config", "ds_configs/zero2.json", *SFT, *CUT]),
        "sft_cut_two_ranks_zero3": (2, ["--config", "SHARDED/zero3.json", *SFT, *CUT]),
    },
}
CONTINUED = {
    "continued": ["--config", "ds_configs/zero2.json", *CUT, "--train.max_steps", "2"],
    "continued+whole": ["--config", "ds_configs/zero2.json"],
}
"""A run on two ranks a row that goes on with a row a rank."""
PAIRS = [(family, name) for family, variants in VARIANTS.items() for name in variants if name != family]


def common(folder: Path, policy: object) -> list[str]:
    """Four steps over 13 pairs, 6 a step but for the third, which has one."""
    rows = folder / "rows"
    if not rows.exists():
        rows.mkdir(parents=True)
        written(rows, plain_rows(13))
        always = ("stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
        sharded = {"zero_optimization": {"stage": 3} | dict.fromkeys(always, 0)}
        (folder / "zero3.json").write_text(json.dumps(sharded))
        shutil.copytree(policy, folder / "other")
        weights = load_file(folder / "other/model.safetensors")
        generator = torch.Generator().manual_seed(1)
        moved = {k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in weights.items()}
        save_file(moved, folder / "other/model.safetensors", {"format": "pt"})
    return [
        "--model.policy", str(policy), "--data.train", str(rows / "train.jsonl"), "--data.validation",
        str(rows / "train.jsonl"), "--data.validation_limit", "5", "--data.cache_dir", str(folder / "cache"),
        "--train.global_batch_size", "6", "--train.epochs", "2", "--train.max_steps", "4", "--train.eval_every", "2",
        "--optim.lr", "1e-3", "--optim.warmup_steps", "0", "--optim.schedule", "constant", "--log.samples", "1",
        "--log.sample_tokens", "4",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_policy, tmp_path_factory) -> dict[str, Run]:
    """Every variant, in one process group for each number of ranks."""
    folder = tmp_path_factory.mktemp("variants")
    base = common(folder, tiny_policy)
    found: dict[str, Run] = {}
    for ranks in (1, 2):
        jobs = {
            name: base + [f.replace("SHARDED", str(folder)) for f in flags]
            for variants in VARIANTS.values()
            for name, (needed, flags) in variants.items()
            if needed == ranks
        }
        if ranks == 2:
            jobs |= {name: base + flags for name, flags in CONTINUED.items()}
        found |= train_all(folder / str(ranks), jobs, ranks)
    return found


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_ranks_and_stages_change_no_number(runs, family, name):
    assert all(seen["code"] == 0 for seen in runs[name].seen)
    truth, found = runs[family].lines, runs[name].lines
    assert [line.keys() for line in found] == [line.keys() for line in truth]
    for expected, line in zip(truth, found, strict=True):
        for metric in ("loss", "eval_loss", "rewards/margins", "eval_rewards/chosen", "grad_norm", "sft_loss",
                       "samples/kl"):
            if line.get(metric) is not None or expected.get(metric) is not None:
                assert line[metric] == pytest.approx(expected[metric], abs=1e-4, rel=1e-4), (line, metric)


@pytest.mark.parametrize("name", [name for _, name in PAIRS if "_cut_" in f"_{name}"])
def test_a_rank_of_a_cut_row_computes_half_of_it(runs, name):
    truth = runs["plain"].seen[0]["policy_rows"]  # all pairs of a step in one row
    rows = [seen["policy_rows"][-len(truth) :] for seen in runs[name].seen]
    assert rows[0] == rows[1] == [[1, -(-length // 2)] for _, length in truth]


def test_a_run_goes_on_with_another_number_of_ranks_a_row(runs):
    truth = [line for line in runs["plain"].lines if line["step"] > 2]
    found = [line for line in runs["continued+whole"].lines if line["step"] > 2]
    assert [line.keys() for line in found] == [line.keys() for line in truth] and len(truth) > 2
    for expected, line in zip(truth, found, strict=True):
        for metric in {"loss", "eval_loss", "rewards/margins", "grad_norm", "samples/kl"} & line.keys():
            assert line[metric] == pytest.approx(expected[metric], abs=1e-4, rel=1e-4), (line["step"], metric)


def test_the_moving_reference_changes_what_follows_its_first_move_and_nothing_before(runs):
    moving, plain = ([line["loss"] for line in runs[name].lines if "loss" in line] for name in ("moving", "plain"))
    assert moving[:2] == plain[:2]
    assert all(abs(a - b) > 1e-3 for a, b in zip(moving[2:], plain[2:], strict=True))
    # The evaluation after step 2 is made against the reference as it was at the start.
    after = [
        [line["eval_loss"] for line in runs[name].lines if "eval_loss" in line and line["step"] == 2]
        for name in ("moving", "plain")
    ]
    assert after[0] == after[1] and len(after[0]) == 1


def moving_run(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Train; the reference at the end, by name."""
    kept: list[Any] = []
    original = dpo.train.start_models

    def start(*args: Any) -> Any:
        kept.append(original(*args))
        return kept[-1]

    with monkeypatch.context() as patch:
        patch.setattr(dpo.train, "start_models", start)
        assert train_dpo.main(argv) == 0
    return {name: p.detach().clone() for name, p in kept[-1][1].scorer.model.named_parameters()}


def test_the_reference_moves_by_the_published_update(tiny_policy, tmp_path, monkeypatch):
    argv = [*common(tmp_path, tiny_policy), *MOVING]
    found = moving_run([*argv, "--train.output_dir", str(tmp_path / "three"), "--train.max_steps", "3"], monkeypatch)
    # Up to step 2 the run is one whose reference stands still: its policy is final/ of two plain steps.
    plain = [*common(tmp_path, tiny_policy), "--train.output_dir", str(tmp_path / "two"), "--train.max_steps", "2"]
    assert train_dpo.main(plain) == 0
    start, policy = load_file(tiny_policy / "model.safetensors"), load_file(tmp_path / "two/final/model.safetensors")
    assert found.keys() == start.keys()
    for name, value in found.items():
        # As TRL's SyncRefModelCallback: target.mul_(1 - alpha).add_(policy, alpha=alpha).
        by_hand = start[name].clone().mul_(1 - ALPHA).add_(policy[name], alpha=ALPHA)
        torch.testing.assert_close(value, by_hand, rtol=0, atol=3e-7)
        assert not torch.equal(value, start[name]) and not torch.equal(value, policy[name])


@pytest.mark.parametrize("stage", ["ds_configs/zero2.json", "SHARDED"])
def test_a_resumed_run_has_the_reference_that_moved_bit_by_bit(stage, tiny_policy, tmp_path, monkeypatch):
    argv = [*common(tmp_path, tiny_policy), *MOVING, "--train.save_every", "1"]
    argv += ["--config", stage.replace("SHARDED", str(tmp_path / "zero3.json"))]
    found = []
    for name, limits in (("whole", ["4"]), ("parts", ["3", "4"])):
        here = [*argv, "--train.output_dir", str(tmp_path / name)]
        for limit in limits:
            moving_run([*here, "--train.max_steps", limit], monkeypatch)
        checkpoint = load_file(tmp_path / name / "checkpoints/step-000004/reference.safetensors")
        lines = [{k: v for k, v in line.items() if "perf/" not in k} for line in read_lines(tmp_path / name)]
        found.append((checkpoint, [line for line in lines if line["step"] >= 3], tmp_path / name / "final"))
    (old, old_lines, old_final), (new, new_lines, new_final) = found
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert old_lines == [line for line in new_lines if line in old_lines] and len(old_lines) > 2
    weights = [load_file(folder / "model.safetensors") for folder in (old_final, new_final)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_checkpoint_without_the_moving_reference_is_refused(tiny_policy, tmp_path, capsys):
    argv = [*common(tmp_path, tiny_policy), *MOVING, "--train.output_dir", str(tmp_path / "run")]
    assert train_dpo.main([*argv, "--train.max_steps", "2"]) == 0
    (tmp_path / "run/checkpoints/step-000002/reference.safetensors").unlink()
    assert train_dpo.main([*argv, "--train.max_steps", "3"]) == 2
    assert "is not used: reference.safetensors is missing; there is no whole checkpoint" in capsys.readouterr().err


def test_after_a_move_evaluations_and_samples_compare_with_the_reference_of_the_start(tiny_policy, tmp_path):
    """alpha 1: after step 2 the reference is the policy, under which every reward were 0; a resume changes nothing."""
    argv = [*common(tmp_path, tiny_policy), "--reference.sync_steps", "2", "--reference.sync_alpha", "1"]
    argv += ["--log.sample_every", "1", "--log.samples", "4", "--log.sample_tokens", "8", "--optim.lr", "1e-2"]
    argv += ["--train.eval_every", "1", "--train.save_every", "1", "--train.output_dir", str(tmp_path / "run")]
    for limit in ("3", "4"):
        assert train_dpo.main([*argv, "--train.max_steps", limit]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    answers = {step: [row["reference"] for row in rows if row["step"] == step] for step in (1, 2, 3, 4)}
    assert len(answers[1]) == 4 and all(answers[step] == answers[1] for step in answers)
    lines = {line["step"]: line for line in read_lines(tmp_path / "run") if "eval_loss" in line}
    assert lines[0]["eval_rewards/margins"] == 0
    for line in (lines[step] for step in (1, 2, 3, 4)):
        gained = line["eval_logps/chosen"] - lines[0]["eval_logps/chosen"]
        assert line["eval_rewards/chosen"] == pytest.approx(0.1 * gained, abs=1e-4) and abs(gained) > 1e-2


def test_a_moving_reference_of_sampo_has_scores_of_its_own(tiny_policy, tmp_path):
    """It scores a sample of a pair's tokens, drawn by the seed."""
    argv = [*common(tmp_path, tiny_policy), *MOVING, "--train.max_steps", "1", "--log.samples", "0"]
    for name, flags in (("a", ["sampo"]), ("b", ["sigmoid"]), ("c", ["sampo", "--train.seed", "7"])):
        assert train_dpo.main([*argv, "--loss.name", *flags, "--train.output_dir", str(tmp_path / name)]) == 0
        first = next(line for line in read_lines(tmp_path / name) if line["step"] == 0)
        assert first["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_a_dry_run_with_a_moving_reference_scores_no_data(tiny_policy, tmp_path):
    argv = [*common(tmp_path, tiny_policy), *MOVING, "--data.cache_dir", str(tmp_path / "cache")]
    assert train_dpo.main([*argv, "--train.output_dir", str(tmp_path / "run"), "--dry_run"]) == 0
    assert not (tmp_path / "cache/reference").exists()
