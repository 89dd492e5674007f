"""How pairs are spread over ranks, micro-batches, layouts and ZeRO stages changes no number of a run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.collectives import counted
from dpo.estimate import traffic
from dpo.report.pairs import read_pairs
from tests.invariants.jobs import Run, train_all

STEPS = 3
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
           "logps/rejected")
# name: (ranks, flags)
VARIANTS: dict[str, tuple[int, list[str]]] = {
    "plain": (1, ["--config", "ds_configs/zero2.json"]),
    "packed": (1, ["--config", "ds_configs/zero2.json", "--train.layout", "packed"]),
    "padded": (1, ["--config", "ds_configs/zero2.json", "--train.layout", "padded"]),
    "micro1": (1, ["--config", "ds_configs/zero2.json", "--train.micro_batch_size", "1"]),
    "micro4": (1, ["--config", "ds_configs/zero1.json", "--train.micro_batch_size", "4"]),
    "zero3": (1, ["--config", "SHARDED/zero3.json", "--train.tokens_per_micro_batch", "350"]),
    "fp16_reference": (1, ["--config", "ds_configs/zero2.json", "--reference.dtype", "fp16"]),
    "bf16": (1, ["--config", "ds_configs/zero2.json", "--train.precision", "bf16",
                 "--train.tokens_per_micro_batch", "300"]),
    "cached": (1, ["--config", "ds_configs/zero2.json", "--reference.mode", "cached",
                   "--train.tokens_per_micro_batch", "350"]),
    "two_ranks_cached_zero3": (2, ["--config", "SHARDED/zero3.json", "--reference.mode", "cached",
                                   "--reference.cache_dir", "SHARDED/own"]),
    "two_ranks": (2, ["--config", "ds_configs/zero2.json", "--model.vocabulary_multiple", "100"]),  # the model has 512
    "in_forward": (1, ["--config", "ds_configs/zero1.json", "--model.loss_in_forward", "true",
                       "--model.vocabulary_multiple", "100", "--train.tokens_per_micro_batch", "350"]),
    "two_ranks_in_forward_zero3": (2, ["--config", "SHARDED/zero3.json", "--model.loss_in_forward", "true",
                                       "--model.vocabulary_multiple", "100", "--train.tokens_per_micro_batch", "350"]),
    "two_ranks_static": (2, ["--config", "ds_configs/zero2.json", "--train.static_shapes", "true",
                             "--train.tokens_per_micro_batch", "300"]),
    "two_ranks_zero1": (2, ["--config", "ds_configs/zero1.json", "--train.tokens_per_micro_batch", "300"]),
    "two_ranks_zero3": (2, ["--config", "SHARDED/zero3.json", "--train.micro_batch_size", "3"]),
    "two_ranks_padded": (2, ["--config", "ds_configs/zero2.json", "--train.layout", "padded",
                             "--train.micro_batch_size", "2"]),
}
EQUAL = [name for name in VARIANTS if name not in ("plain", "fp16_reference", "bf16")]


@pytest.fixture(scope="module")
def runs(shared_data, tmp_path_factory) -> dict[str, Run]:
    """Every variant: 9 pairs a step of 26, so that the last step of the epoch is smaller and odd."""
    folder = tmp_path_factory.mktemp("scheduling")
    # A tiny model's weights stay gathered under ZeRO-3 unless these are 0, and then the stage proves nothing.
    always = ("stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
    sharded = {"zero_optimization": {"stage": 3} | dict.fromkeys(always, 0)}
    (folder / "zero3.json").write_text(json.dumps(sharded))
    common = [
        "--model.policy", str(shared_data / "stories260k-llama"), "--data.on_bad_row", "skip",
        "--data.train", str(shared_data / "hh-rlhf/train.jsonl.gz"), "--data.train_limit", "26",
        "--data.validation", str(shared_data / "hh-rlhf/validation.jsonl.gz"), "--data.validation_limit", "9",
        "--data.max_length", "128", "--data.cache_dir", str(folder / "cache"), "--train.global_batch_size", "9",
        "--train.max_steps", str(STEPS), "--train.eval_every", "2", "--optim.lr", "5e-4", "--optim.warmup_steps", "0",
        "--optim.weight_decay", "0.1", "--log.samples", "3", "--log.sample_tokens", "8",
        "--train.precision", "fp32",
    ]
    found: dict[str, Run] = {}
    for ranks in (1, 2):
        jobs = {
            name: common + [flag.replace("SHARDED", str(folder)) for flag in flags]
            for name, (needed, flags) in VARIANTS.items()
            if needed == ranks
        }
        found |= train_all(folder / str(ranks), jobs, ranks)
    return found


def test_the_baseline_learns_and_ends_on_a_smaller_batch(runs):
    lines = [line for line in runs["plain"].lines if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["step"] for line in runs["plain"].lines if "eval_loss" in line] == [0, 2, 3]
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert lines[0]["rewards/margins"] == 0 and lines[0]["rewards/accuracies"] == 0.5
    assert max(abs(line["loss"] - lines[0]["loss"]) for line in lines) > 0.02
    assert sum(map(len, runs["plain"].seen[0]["pairs"][-1])) < 9


@pytest.mark.parametrize("name", EQUAL)
def test_every_metric_of_a_variant_equals_the_baseline(runs, name):
    truth, found = ([line for line in runs[n].lines if "samples/kl" not in line] for n in ("plain", name))
    assert [line.keys() for line in found] == [line.keys() for line in truth]
    for expected, line in zip(truth, found, strict=True):
        prefix = "eval_" if "eval_loss" in line else ""
        for metric in METRICS:
            limit = {"loss": 5e-5, "logps/chosen": 2e-3, "logps/rejected": 2e-3}.get(metric, 1e-4)
            assert line[prefix + metric] == pytest.approx(expected[prefix + metric], abs=limit), (line, metric)
        if not prefix:
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
            assert line["num_tokens"] == expected["num_tokens"]
            assert line["learning_rate"] == expected["learning_rate"]


@pytest.mark.parametrize("name", EQUAL)
def test_every_pair_of_the_first_and_last_evaluation_equals_the_baseline(runs, name):
    truth, found = read_pairs(runs["plain"].folder), read_pairs(runs[name].folder)
    assert [table.step for table in found] == [0, STEPS]
    for expected, table in zip(truth, found, strict=True):
        assert table["pair_id"].tolist() == list(range(len(expected.values))) and len(table.values) == 9
        np.testing.assert_allclose(table.values, expected.values, atol=5e-3, rtol=1e-4)
    assert np.ptp(truth[1].margins) > 0.01


@pytest.mark.parametrize("name", VARIANTS)
def test_the_variants_really_differ(runs, name):
    ranks, flags = VARIANTS[name]
    seen = runs[name].seen
    assert len(seen) == ranks
    assert all(s["code"] == 0 for s in seen)
    assert {s["stage"] for s in seen} == {int(flags[1].removesuffix(".json")[-1])}
    assert all(s["weights_are_whole"] is ("zero3" not in name) for s in seen)
    one_row = all(rows == 1 for s in seen for rows, _ in s["policy_rows"])
    assert one_row is ("padded" not in name)
    if "--train.micro_batch_size" in flags:
        size = int(flags[flags.index("--train.micro_batch_size") + 1])
        assert max(len(ids) for s in seen for step in s["pairs"] for ids in step) == size
    filled = sum(bool(ids) for s in seen for step in s["pairs"] for ids in step)
    assert sum(s["in_forward"] for s in seen) == (filled if "in_forward" in name else 0)
    lengths = {length for s in seen for _, length in s["policy_rows"]}
    assert len(lengths) == 1 or "static" not in name


@pytest.mark.parametrize("name", VARIANTS)
def test_a_micro_batch_is_one_pass_of_the_policy_and_one_of_the_reference(runs, name):
    for seen in runs[name].seen:
        expected = [1, 0] if "cached" in name else [1, 1]
        assert all(calls == expected for calls in seen["calls_a_micro_batch"])
        assert not any(seen["reference_calls"])  # gradients are off
        assert len(seen["policy_rows"]) == sum(map(len, seen["pairs"]))


@pytest.mark.parametrize("name", VARIANTS)
def test_each_step_scores_each_pair_of_its_batch_once_over_all_ranks(runs, name):
    batches = [
        sorted(pair for seen in runs[name].seen for ids in seen["pairs"][step] for pair in ids) for step in range(STEPS)
    ]
    assert batches == [sorted(sum(step, [])) for step in runs["plain"].seen[0]["pairs"]]
    assert all(len(set(batch)) == len(batch) for batch in batches)
    micro_steps = [[len(step) for step in seen["pairs"]] for seen in runs[name].seen]
    assert all(counts == micro_steps[0] for counts in micro_steps)


@pytest.mark.parametrize("name", EQUAL)
def test_reference_and_policy_answer_the_same_under_every_variant(runs, name):
    rows, truth = ((runs[n].folder / "samples.jsonl").read_text().splitlines() for n in (name, "plain"))
    assert len(rows) == 3 and rows == truth
    assert any(json.loads(row)["reference"] != json.loads(row)["policy"] for row in rows)


def test_bf16_starts_at_ln_2_and_exports_the_starting_dtype(runs):
    lines = [line for line in runs["bf16"].lines if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-6) and lines[0]["rewards/margins"] == 0
    truth = [line for line in runs["plain"].lines if "loss" in line]
    assert lines[-1]["loss"] == pytest.approx(truth[-1]["loss"], abs=0.05)
    assert runs["bf16"].seen[0]["reference_dtypes"] == ["torch.bfloat16"]
    config = json.loads((runs["bf16"].folder / "final" / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_rank_0_alone_writes_and_a_log_line_is_one_all_reduce(runs):
    first, second = runs["two_ranks"].seen
    assert (first["recorders"], second["recorders"]) == (1, 0)
    evaluations = sum("eval_loss" in line for line in runs["two_ranks"].lines)
    lines = sum("loss" in line for line in runs["two_ranks"].lines)
    start_check = 1  # the comparison of policy and reference before the first step
    assert first["sums"] == second["sums"] == lines + evaluations + start_check


@pytest.mark.parametrize("name", [n for n in VARIANTS if "zero3" not in n and n not in ("bf16", "cached")])
def test_the_reference_is_a_frozen_plain_module_that_never_moves(runs, name):
    for seen in runs[name].seen:
        expected = "torch.float16" if name == "fp16_reference" else "torch.float32"
        assert seen["reference_dtypes"] == [expected]
        assert seen["engines"] == 1  # the policy's alone
        assert not seen["reference_wants_gradient"]
        assert not seen["reference_in_optimizer"]
        assert seen["reference_moved"] is False


def test_ranks_of_very_different_loss_log_the_mean_over_all_pairs(runs):
    own = zip(*(seen["own_losses"] for seen in runs["two_ranks"].seen), strict=True)
    assert max(abs(a - b) for a, b in own) > 0.1


def test_under_zero_3_the_reference_is_sharded_by_an_engine_of_its_own(runs):
    assert [runs[name].seen[0]["engines"] for name in ("zero3", "two_ranks_zero3")] == [2, 2]


def test_an_fp16_reference_starts_within_the_stated_distance(runs):
    line = next(line for line in runs["fp16_reference"].lines if "loss" in line)
    assert 0 < abs(line["loss"] - 0.693147) < 0.05


@pytest.mark.parametrize(
    "name", ["two_ranks", "two_ranks_static", "two_ranks_zero1", "two_ranks_zero3", "two_ranks_cached_zero3"]
)
def test_a_step_sends_the_bytes_that_the_plan_foretells(runs, name):
    """Under ZeRO-3 a head tied to the embedding is gathered for each of its two uses, which the plan leaves out."""
    for seen in runs[name].seen:
        number, weights = seen["parameters"], 4 * seen["parameters"]
        for batches, found in zip(seen["pairs"], seen["collectives"], strict=True):
            expected = traffic(
                number, stage=seen["stage"], world_size=2, micro_steps=len(batches), width=4,
                reference_width=4 if seen["engines"] == 2 else 0, to_owner=True,
            )
            gradients = expected.pop("gradients reduced", 0) + expected.pop("gradients scattered", 0)
            twice = 1 + seen["tied"] / number if seen["stage"] == 3 else 1
            count = counted(found, 2, weights, error=0.0)
            assert count.gradient_bytes * weights == pytest.approx(gradients, rel=0.002)
            assert count.weight_bytes * weights == pytest.approx(sum(expected.values()) * twice, rel=0.002)


def test_gradients_are_reduced_once_a_step_whatever_the_number_of_micro_batches_under_zero_1_alone(runs):
    """Bytes as multiples of the weights'. ZeRO-2 sends each part to its owner alone: half of an all-reduce."""
    for name, whole_step, micro_batch in (("two_ranks_zero1", 1.0, 0.0), ("two_ranks_static", 0.0, 0.5)):
        seen = runs[name].seen[0]
        for batches, found in zip(seen["pairs"], seen["collectives"], strict=True):
            assert len(batches) > 1
            count = counted(found, 2, 4 * seen["parameters"], error=0.0)
            assert count.gradient_bytes == pytest.approx(whole_step + micro_batch * len(batches), rel=0.002)
