"""Rows cut over ranks: which pairs a rank gets, how a row is cut, and what is refused beside it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dpo.__main__
import dpo.planning.forecast
import dpo.training.context
from dpo.config import Config, DataConfig, LogConfig, LossConfig, ModelConfig, TrainConfig, check_world_size
from dpo.data.batch import collate
from dpo.errors import UserError
from dpo.model.check import settle
from dpo.model.forward import Scorer
from dpo.model.load import load_config
from dpo.model.sequence import SequenceGroup
from dpo.model.shape import shape_of
from dpo.objective.objective import Objective
from dpo.planning.spread import Schedule
from dpo.run.checks import check_sequence
from dpo.runtime.distributed import World
from dpo.training.context import contexts_of
from dpo.types import PairLogps
from tests import tiny
from tests.invariants.run_losses import setup_of


def config(size: int = 2, **sections: Any) -> Config:
    """Settings that two ranks a row can do, and changes to them."""
    made = Config(
        model=ModelConfig(policy="tiny"), data=DataConfig(train="pairs"), log=LogConfig(samples=0),
        train=TrainConfig(sequence_parallel_size=size),
    )  # fmt: skip
    return replace(made, **{name: replace(getattr(made, name), **values) for name, values in sections.items()})


def test_ranks_of_a_row_get_the_same_pairs_and_a_budget_for_all_of_them():
    pairs, case = tiny.Pairs(tiny.pairs(18)), {"loss": {}, "layout": "shared", "micro_batches": 2, "ranks_a_row": 2}
    loaders = [
        setup_of(case, World(rank, 4, rank, torch.device("cpu")), pairs).loader(pairs, "shared") for rank in range(4)
    ]
    shares = [[batch.pair_ids for batch in loader[0].batches] for loader in loaders]
    assert shares[0] == shares[1] and shares[2] == shares[3]
    ids = [pair_id for share in (shares[0], shares[2]) for batch in share for pair_id in batch]
    assert sorted(ids) == sorted(loaders[0].epochs.batch(0).tolist())
    assert loaders[0].token_budget == 2 * 4096


def test_a_loss_that_couples_pairs_counts_those_of_a_row_once(monkeypatch):
    loss, device = Objective(LossConfig(name="aot")), torch.device("cpu")
    batches = [collate(tiny.pairs(4)[start : start + 2], "shared") for start in (0, 2)]
    gaps = torch.tensor([[3.0, -1.0], [0.5, 2.0]])
    lengths = torch.ones(2)
    shares = []
    for batch, gap in zip(batches, gaps, strict=True):
        logps = PairLogps(gap, 0 * gap, lengths, lengths)
        reference = PairLogps(gap.flip(0) * 2, 0 * gap, lengths, lengths)
        shares.append((list(batch.pair_ids), dpo.training.context._rows(logps, reference).tolist(), (logps, reference)))

    def partners(group: int, world: World, ranks_a_row: int) -> Any:
        given = [s[:2] for s in shares for _ in range(ranks_a_row)]
        monkeypatch.setattr(dpo.training.context, "gather", lambda own: given)
        known = [shares[group][2]]
        (context,) = contexts_of(loss, [batches[group]], known, 1.0, world, ranks_a_row, is_step=False)
        return context.partners["aot"]

    for group in (0, 1):
        alone = partners(group, World(group, 2, group, device), 1)
        for rank in (2 * group, 2 * group + 1):
            assert torch.equal(partners(group, World(rank, 4, rank, device), 2), alone)


@pytest.mark.parametrize("size", [3, 7])
def test_cuts_of_a_row_hold_every_token_and_every_scored_token_once(size):
    batch = collate(tiny.pairs(4), "shared", [tuple(torch.rand(n).numpy() for n in p.targets) for p in tiny.pairs(4)])
    cuts = [SequenceGroup(rank, size, lambda x: x, None).cut(batch) for rank in range(size)]  # type: ignore[arg-type]
    length = len(batch.input_ids)
    assert {len(cut.input_ids) for cut in cuts} == {-(-length // size)} and length % size
    assert torch.equal(torch.cat([cut.input_ids for cut in cuts])[:length], batch.input_ids)
    assert torch.equal(torch.cat([cut.position_ids for cut in cuts])[:length], batch.position_ids)
    assert {cut.segments.items[-1].end for cut in cuts if cut.segments} == {len(cuts[0].input_ids) * size}
    for name in ("target_ids", "sequence_ids", "token_weights"):
        found = torch.cat([getattr(cut, name) for cut in cuts])
        assert torch.equal(found.sort().values, getattr(batch, name).sort().values), name
    for rank, cut in enumerate(cuts):
        starts = cut.score_index + rank * len(cut.input_ids)
        assert torch.isin(starts, batch.score_index).all() and (cut.score_index < len(cut.input_ids)).all()
        assert torch.equal(cut.predicting, cut.score_index.unique())


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"train": {"layout": "padded"}}, "with train.layout padded, and packed rows are cut; use shared"),
        ({"loss": {"name": "tdpo"}}, "with loss.name tdpo, which needs whole next-token distributions"),
        ({"loss": {"wpo": True}}, "with loss.wpo; leave it out"),
        ({"model": {"compile": True}}, "with model.compile; leave it out"),
        ({"model": {"loss_in_forward": True}}, "with model.loss_in_forward, which needs whole completions on a"),
    ],
)
def test_what_a_cut_row_cannot_do_is_refused_by_name(sections, line):
    model_config = tiny.model("llama").config
    check_sequence(config(), model_config)
    with pytest.raises(UserError, match=f"train.sequence_parallel_size is 2 {line}"):
        check_sequence(config(**sections), model_config)
    check_sequence(config(size=1, **sections), model_config)


@pytest.mark.parametrize(
    ("size", "kv_heads", "line"),
    [(3, 2, "its 4 attention heads are no multiple of 3"), (4, 3, "its 3 key heads are neither a multiple nor a")],
)
def test_heads_that_cannot_be_shared_out_are_refused(size, kv_heads, line):
    model_config = tiny.model("llama").config
    check_sequence(config(size=4), model_config)  # four ranks, two key heads: each is held twice
    model_config.num_key_value_heads = kv_heads
    with pytest.raises(UserError, match=f"with model.policy tiny: {line}"):
        check_sequence(config(size=size), model_config)


def test_a_model_that_only_padded_rows_score_right_is_refused():
    scorer = Scorer(tiny.model("bloom"))
    scorer.across = SequenceGroup(0, 2, lambda x: x, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="layout padded is not used: its rows are not cut over ranks"):
        settle(scorer, "shared", tiny.pairs(2), 30, torch.device("cpu"))


def test_ranks_must_fall_into_whole_groups_that_all_have_pairs():
    with pytest.raises(UserError, match="train.sequence_parallel_size is 2 for 3 ranks; use a number that divides 3"):
        check_world_size(config(), 3)
    check_world_size(config(train={"global_batch_size": 2}), 4)
    with pytest.raises(UserError, match="is 2 pairs for 3 groups of 2 ranks: some would never have a pair"):
        check_world_size(config(train={"global_batch_size": 2}), 6)
    with pytest.raises(ValueError, match="train.sequence_parallel_size is 0"):
        config(size=0)


def test_a_plan_of_rows_on_two_gpus_is_that_of_whole_rows_with_half_of_each_on_a_gpu(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """Two ranks with rows of up to 600 tokens, and four that compute the same rows in twos."""
    schedules: list[Schedule] = []
    made = dpo.planning.forecast.schedule_of
    monkeypatch.setenv("COLUMNS", "200")

    def kept(*args: Any, **options: Any) -> Any:
        schedules.append(made(*args, **options))
        return schedules[-1]

    monkeypatch.setattr(dpo.planning.forecast, "schedule_of", kept)
    argv = ["plan", "--config", "ds_configs/zero2.json", "--model.policy", str(tiny_policy), "--data.train",
            "builtin:world", "--data.train_limit", "64", "--data.cache_dir", str(tmp_path), "--gpu", "a100",
            "--model.gradient_checkpointing", "true", "--model.loss_in_forward", "auto"]  # fmt: skip
    found = []
    for ranks, ranks_a_row, tokens in ((2, 1, 600), (4, 2, 300)):
        sizes = ["--ranks", str(ranks), "--train.sequence_parallel_size", str(ranks_a_row)]
        assert dpo.__main__.main([*argv, *sizes, "--train.tokens_per_micro_batch", str(tokens)]) == 0
        shown = re.sub(r"\s+", " ", re.sub("[^ -~]", " ", capsys.readouterr().out))
        sizes_shown = re.findall(r"(activations, kept|activations, recomputed)[^.]*? ([\d.]+) ([KM]iB)", shown)
        kib = {name: float(value) * {"KiB": 1, "MiB": 1024}[unit] for name, value, unit in sizes_shown}
        found.append((shown, kib))
    whole, cut = schedules
    assert (whole.largest, whole.flops, whole.tokens) == (cut.largest, cut.flops, cut.tokens)
    assert whole.micro_steps.tolist() == cut.micro_steps.tolist() and whole.micro_steps.max() > 1
    (before, old), (after, new) = found
    assert new["activations, recomputed"] == pytest.approx(old["activations, recomputed"] / 2, rel=0.01)
    # Of the last MLP, which spares prompts, a cut may hold more than its share: all completion tokens may stand in it.
    completions, most = whole.largest_completions, whole.largest / 2
    more = shape_of(load_config(str(tiny_policy)), torch.bfloat16).last_mlp * (min(completions, most) - completions / 2)
    assert more > 0
    assert new["activations, kept"] == pytest.approx(old["activations, kept"] / 2 + more / 1024, rel=0.01)
    assert "exchanged" not in before
    # Llama: 4 query and 2 key heads of 8 in 2 layers, 2 bytes: q, o and k, v; forward, backward, once more, reference.
    a_token = 2 * (2 * 4 * 8 + 2 * 2 * 8) * 2
    sent = 0.5 * 4 * a_token * whole.tokens / 4
    size = re.search(r"queries, keys, values, outputs exchanged ([\d.e-]+) GB", after)
    assert size and float(size[1]) == pytest.approx(sent / 1e9, rel=0.01)
