"""Every loss gives the same steps however its pairs are spread over layouts, micro-batches and ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo.objective.catalog import LOSSES
from tests.ranks import run

NEEDED: dict[str, dict[str, Any]] = {"exo_pair": {"label_smoothing": 0.1}}
OBJECTIVES: dict[str, dict[str, Any]] = {name: {"name": name} | NEEDED.get(name, {}) for name in LOSSES} | {
    "rpo": {"name": ["sigmoid", "sft"], "weights": [1.0, 0.5]},
    "wpo": {"name": "hinge", "wpo": True},
    "ld_alpha": {"name": "sigmoid", "ld_alpha": 0.3},
    "reference_free": {"name": "sigmoid_norm", "beta": 2.0, "reference_free": True},
}
SPREADS = [(ranks, layout, micro) for ranks in (1, 2) for layout in ("shared", "padded") for micro in (1, 3)]
FEW = [(1, "shared", 1), (2, "padded", 3)]
"""All of ranks, layout and micro-batches changed: for losses that are functions of a pair's own two sums alone."""
EVERY = {"sigmoid", "rpo", "wpo", "ld_alpha", "aot", "aot_unpaired", "beta_dpo", "sampo", "tdpo", "odpo"}
assert EVERY <= OBJECTIVES.keys()
WITHOUT_REFERENCE = {"sft", "simpo", "orpo", "cpo", "reference_free"}
CUT = (("sigmoid", "shared", 2), ("simpo", "packed", 1), ("sampo", "shared", 1))
SHARDED = ("wpo", "aot", "simpo", "sampo")


def spreads_of(objective: str) -> list[tuple[int, str, int]]:
    return SPREADS if objective in EVERY else FEW


def name_of(objective: str, ranks: int, layout: str, micro: int) -> str:
    return f"{objective}, {ranks} ranks, {layout}, {micro} micro-batches"


def steps_of_all(folder: Path, ranks: int, cases: dict[str, Any]) -> dict[str, Any]:
    """Run the cases in one process group."""
    (folder / f"{ranks}.json").write_text(json.dumps(cases))
    found = folder / f"{ranks}.found.json"
    done = run(["tests/invariants/run_losses.py", str(folder / f"{ranks}.json"), str(found)], ranks)
    assert not any(done.codes), done.output[-8000:]
    return json.loads(found.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every objective gave under every spread."""
    folder, results = tmp_path_factory.mktemp("objectives"), {}
    for ranks in (1, 2):
        cases = {
            name_of(objective, *spread): {"loss": loss, "layout": spread[1], "micro_batches": spread[2]}
            for objective, loss in OBJECTIVES.items() for spread in spreads_of(objective) if spread[0] == ranks
        } | {
            f"{objective}, {ranks} ranks, ZeRO-3{', in forward' * in_forward}": {
                "loss": OBJECTIVES[objective], "layout": "shared", "micro_batches": 2, "stage": 3,
                "loss_in_forward": in_forward,
            }
            for objective in SHARDED for in_forward in (False, objective != "wpo") if ranks == 2
        } | {
            f"{objective}, {ranks} ranks a row": {
                "loss": OBJECTIVES[objective], "layout": layout, "micro_batches": micro, "ranks_a_row": ranks,
                "keep_weights": True,
            }
            for objective, layout, micro in CUT
        } | {
            f"{objective}, in forward": {
                "loss": loss, "layout": "shared", "micro_batches": 3, "loss_in_forward": True
            }
            for objective, loss in OBJECTIVES.items() if ranks == 1
        }  # fmt: skip
        results |= steps_of_all(folder, ranks, cases)
    return results


def assert_same_steps(one: dict[str, Any], other: dict[str, Any]) -> None:
    for mine, theirs in zip(one["lines"], other["lines"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=5e-5, rel=2e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-4), name
    assert one["evaluation"] == pytest.approx(other["evaluation"], abs=2e-4, rel=2e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_loss_is_the_same_in_every_layout_on_every_number_of_ranks_and_micro_batches(found, objective):
    truth = found[name_of(objective, 1, "shared", 1)]
    for spread in spreads_of(objective)[1:]:
        assert_same_steps(found[name_of(objective, *spread)], truth)


@pytest.mark.parametrize("objective", SHARDED)
def test_a_loss_is_the_same_under_zero_3(found, objective):
    assert_same_steps(found[f"{objective}, 2 ranks, ZeRO-3"], found[name_of(objective, 1, "shared", 1)])
    if objective != "wpo":
        assert_same_steps(found[f"{objective}, 2 ranks, ZeRO-3, in forward"], found[name_of(objective, 1, "shared", 1)])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_loss_is_the_same_with_its_gradient_taken_in_the_forward_pass(found, objective):
    assert_same_steps(found[f"{objective}, in forward"], found[name_of(objective, 1, "shared", 1)])
    # What needs more than sums of log-probs of a pair goes the other way, and so do all where they are not asked.
    assert (found[f"{objective}, in forward"]["in_forward"] == 9) is (objective not in ("wpo", "tdpo"))
    assert found[name_of(objective, 1, "shared", 1)]["in_forward"] == 0


@pytest.mark.parametrize(("objective", "layout", "micro"), CUT)
def test_two_ranks_that_cut_every_row_train_as_one_that_has_it_whole(found, objective, layout, micro):
    cut, whole = found[f"{objective}, 2 ranks a row"], found[f"{objective}, 1 ranks a row"]
    for mine, theirs in zip(cut["lines"], whole["lines"], strict=True):
        for name in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    assert cut["weights"] == pytest.approx(whole["weights"], abs=1e-5)
    assert cut["evaluation"] == pytest.approx(whole["evaluation"], rel=1e-5, abs=1e-5)
    assert cut["said"][-1].split(" (")[0] == whole["said"][-1].split(" (")[0]  # start: loss 0.693147
    assert cut["pairs"] == whole["pairs"] == 18  # each once
    assert cut["tokens"] == [-(-tokens // 2) for tokens in whole["tokens"]] and max(cut["tokens"]) > 20
    assert any(line.startswith("long context: 2 ranks compute a row together") for line in cut["said"])


def test_the_parts_of_the_gradient_of_a_cut_row_add_up_in_fp64(found):
    gaps = found["fp64 cut"]
    assert gaps["logps"] < 1e-11 and gaps["gradient"] < 1e-11 and gaps["largest_gradient"] > 1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_three_steps_move_every_loss(found, objective):
    truth = found[name_of(objective, 1, "shared", 1)]
    first, *_, last = truth["lines"]
    assert abs(last["loss"] - first["loss"]) > 0.02 * first["loss"]
    assert truth["evaluation"]["eval_loss"] < first["loss"] * (1.2 if objective == "discopop" else 1)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_reference_is_made_for_a_loss_that_needs_none(found, objective):
    for spread in spreads_of(objective):
        run = found[name_of(objective, *spread)]
        assert run["has_reference"] is (objective not in WITHOUT_REFERENCE)
        assert ("no reference to compare with" in run["said"][-1]) is (objective in WITHOUT_REFERENCE)
        assert ("reference: none (the loss needs none)" in run["said"]) is (objective in WITHOUT_REFERENCE)


def test_the_losses_differ_from_one_another(found):
    """DPO's first gradient is that of several losses; after it no two go the same way."""
    ends = [found[name_of(objective, 1, "shared", 1)]["lines"][-1]["loss"] for objective in OBJECTIVES]
    same = {frozenset((a, b)) for a in OBJECTIVES for b in OBJECTIVES if a != b
            and ends[list(OBJECTIVES).index(a)] == ends[list(OBJECTIVES).index(b)]}  # fmt: skip
    assert same == {frozenset(("sigmoid", "robust"))}  # without label smoothing they are one
