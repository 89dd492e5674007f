"""A run that goes on with another number of ranks, or under another ZeRO stage, is the same run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.invariants.jobs import Run, train_all
from tests.invariants.test_variants import LORA, MOVING, common

KINDS = {
    "plain": ["--optim.weight_decay", "0.1", "--optim.schedule", "linear"], "lora": LORA, "moving": MOVING,
    "alone": ["--train.save_weights_only", "true"],
}  # fmt: skip
# The uninterrupted runs, on two ranks: kind and ZeRO stage.
WHOLE = [("plain", 0), ("plain", 1), ("plain", 2), ("plain", 3), ("lora", 2), ("moving", 2), ("alone", 3)]
# Those that go on, in the order in which they run: ranks, and name: (kind, stage, whose checkpoint, after which step).
CHAIN: list[tuple[int, dict[str, tuple[str, int, str, int]]]] = [
    (4, {
        "two_to_four": ("plain", 2, "plain2", 2),
        "two_to_four_zero1_to_3": ("plain", 3, "plain1", 2),
    }),
    (1, {
        "two_to_one_zero3_to_2": ("plain", 2, "plain3", 2),
        "four_to_one_zero2_to_1": ("plain", 1, "two_to_four", 3),
        "two_to_one_lora_zero2_to_3": ("lora", 3, "lora2", 2),
        "two_to_one_moving_zero2_to_3": ("moving", 3, "moving2", 2),
        "two_to_one_without_zero": ("plain", 0, "plain0", 2),
    }),
    (2, {
        "one_to_two": ("plain", 2, "two_to_one_zero3_to_2", 3),
        "two_to_two_weights_alone_zero3_to_2": ("alone", 2, "alone3", 3),
        "four_to_two_zero3": ("plain", 3, "two_to_four_zero1_to_3", 3),
    }),
]  # fmt: skip
RESUMED = [(name, ranks, *rest) for ranks, jobs in CHAIN for name, rest in jobs.items()]


def cut_short(whole: Path, run: Path, step: int) -> None:
    """What a run leaves that is killed before step + 1."""
    (run / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(whole / name, run / name)
    shutil.copytree(whole / f"checkpoints/step-{step:06d}", run / f"checkpoints/step-{step:06d}")


@pytest.fixture(scope="module")
def runs(tiny_policy, tmp_path_factory) -> dict[str, Run]:
    """The uninterrupted runs, and those that go on; four steps each."""
    folder = tmp_path_factory.mktemp("elastic")
    base = common(folder, tiny_policy)
    for stage in (0, 1, 2):
        (folder / f"zero{stage}.json").write_text(f'{{"zero_optimization": {{"stage": {stage}}}}}')

    def argv(kind: str, stage: int) -> list[str]:
        often = ["--train.save_every", "1", "--train.eval_every", "4", "--train.keep_checkpoints", "9"]
        return [*base, "--config", str(folder / f"zero{stage}.json"), *KINDS[kind], *often, "--log.samples", "0"]

    found = train_all(folder / "whole", {f"{kind}{stage}": argv(kind, stage) for kind, stage in WHOLE}, 2)
    for ranks, jobs in CHAIN:
        for name, (_, _, before, step) in jobs.items():
            cut_short(found[before].folder, folder / f"on{ranks}" / name, step)
        found |= train_all(folder / f"on{ranks}", {name: argv(*job[:2]) for name, job in jobs.items()}, ranks)
    return found


def pairs_of(run: Run, steps: slice) -> list[list[int]]:
    """Pair ids of every step, over all ranks."""
    by_rank = [seen["pairs"][steps] for seen in run.seen]
    return [sorted(i for rank in step for batch in rank for i in batch) for step in zip(*by_rank, strict=True)]


@pytest.mark.parametrize(("name", "ranks", "kind", "stage", "before", "step"), RESUMED, ids=[r[0] for r in RESUMED])
def test_another_number_of_ranks_or_stage_goes_on_with_the_same_numbers(runs, name, ranks, kind, stage, before, step):
    # Compared with the whole run of its kind; one without ZeRO with one without.
    whole, resumed = runs[next(f"{k}{s}" for k, s in WHOLE if k == kind and (s > 0) == (stage > 0))], runs[name]
    assert all(seen["code"] == 0 and seen["stage"] == stage for seen in resumed.seen) and len(resumed.seen) == ranks
    assert pairs_of(resumed, slice(0, 4)) == pairs_of(whole, slice(step, 4))
    assert [line["step"] for line in resumed.lines] == [line["step"] for line in whole.lines]
    for a, b in zip(whole.lines, resumed.lines, strict=True):
        if kind == "alone" and "eval_loss" in a:
            continue  # after an update with new moments
        for key in (k for k in a if not k.startswith("perf/")):
            near = 1e-5 if key.startswith("eval_logps") else 1e-4
            assert b[key] == pytest.approx(a[key], rel=near, abs=1e-7), (a["step"], key)
    assert not list((resumed.folder / "checkpoints").glob("universal-*"))
