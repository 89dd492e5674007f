"""The reference's scores on disk are those of this reference on these tokens, or they are refused."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dpo.preference
import dpo.training.frozen
import train_dpo
from dpo.data.epochs import Epochs
from dpo.data.loader import Loader
from dpo.data.mixture import Mixture
from dpo.errors import UserError
from dpo.model import products
from dpo.model.check import use_layout
from dpo.model.forward import Scorer
from dpo.model.load import frozen_copy
from dpo.runtime import distributed, heartbeat
from dpo.runtime.weights import fingerprint
from dpo.training import reference_cache
from dpo.training.reference_cache import cached_scores, folder_of, manifest_of
from tests import tiny
from tests.by_path import prepare_pairs
from tests.data.tiny_tokenizers import CHATML, tokenizer_of, with_template
from tests.test_stages import arguments


class Scored:
    """A tiny reference, a data set, and the number of pairs it has scored."""

    def __init__(self, cache: Path, count: int = 10) -> None:
        self.cache, self.world = cache, distributed.start()
        self.pairs = tiny.Pairs(tiny.pairs(count))
        self.scorer = Scorer(tiny.model("llama", dtype=torch.float32))
        use_layout(self.scorer, "shared")
        self.scored = 0

    def manifest(self) -> dict[str, object]:
        return manifest_of(fingerprint(self.scorer.model), self.pairs, torch.float32, "shared", "sdpa per segment")

    def score(self, batch):
        self.scored += len(batch.pair_ids)
        return self.scorer(batch)

    def scores(self) -> torch.Tensor:
        loader = Loader(self.pairs, Epochs(len(self.pairs), 4, 0), 0, 1, "shared", 60)
        return cached_scores(self.score, loader, self.manifest(), self.cache, self.world, lambda _: None)

    @property
    def folder(self) -> Path:
        return folder_of(self.cache, self.manifest())


@pytest.fixture
def scored(tmp_path) -> Scored:
    return Scored(tmp_path)


def test_a_second_run_scores_a_sample_alone_and_gets_the_same_numbers(scored, monkeypatch):
    first = scored.scores()
    assert scored.scored == 10 and first.shape == (10, 2) and first.dtype == torch.float32
    scored.scored = 0
    monkeypatch.setattr(reference_cache, "SAMPLE", 6)
    assert torch.equal(scored.scores(), first)
    assert scored.scored == 6


def test_the_sample_is_of_every_chunk_and_of_no_pair_twice():
    chunks = [range(start, min(start + 100, 1030)) for start in range(0, 1030, 100)]
    ids = reference_cache.sample_of(chunks)
    assert [sum(i in chunk for i in ids) for chunk in chunks] == [6] * 11 and len(set(ids)) == 66
    many = [range(start, start + 10) for start in range(0, 2000, 10)]
    assert [i // 10 for i in reference_cache.sample_of(many)] == list(range(200))
    assert reference_cache.sample_of([range(3)]) == [0, 1, 2]


@pytest.mark.parametrize("part", ["weight", "token", "boundary", "scored", "dtype", "layout", "attention", "version"])
def test_each_part_of_the_key_makes_another_cache(scored, part, monkeypatch):
    before = scored.folder
    manifest = scored.manifest()
    if part == "weight":
        with torch.no_grad():
            scored.scorer.model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6
        manifest = scored.manifest()
    elif part == "token":
        scored.pairs.items[4].chosen_ids[0] += 1
        scored.pairs = tiny.Pairs(scored.pairs.items)
        manifest = scored.manifest()
    elif part == "boundary":
        scored.pairs.lengths[4] += [1, -1, 0]
        manifest = scored.manifest()
    elif part == "scored":
        pair = scored.pairs.items[4]
        scored.pairs.items[4] = replace(pair, chosen_scored=np.arange(len(pair.chosen_ids)) == 0)
        scored.pairs = tiny.Pairs(scored.pairs.items)
        manifest = scored.manifest()
    elif part == "version":
        monkeypatch.setattr(reference_cache, "VERSION", reference_cache.VERSION + 1)
        manifest = scored.manifest()
    else:
        parts = {"dtype": torch.float32, "layout": "shared", "attention": "sdpa per segment"}
        changed = {"dtype": torch.float16, "layout": "padded", "attention": "varlen per segment"}
        weights = fingerprint(scored.scorer.model)
        assert manifest_of(weights, scored.pairs, *parts.values()) == manifest
        manifest = manifest_of(weights, scored.pairs, *(parts | {part: changed[part]}).values())
    assert folder_of(scored.cache, manifest) != before


@pytest.mark.parametrize("part", ["weights", "tokens", "dtype", "layout", "attention"])
def test_a_foreign_cache_is_refused_by_what_differs(scored, part):
    scored.scores()
    path = scored.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: "other"}))
    with pytest.raises(UserError, match=f"is of another {part}; delete"):
        scored.scores()


def test_scores_that_do_not_agree_with_the_reference_are_refused(scored):
    scored.scores()
    path = scored.folder / "scores-000000.npy"
    np.save(path, np.load(path) - 0.5)
    with pytest.raises(UserError, match=r"does not agree with the reference: pair \d+ differs by"):
        scored.scores()


@pytest.mark.parametrize("damage", ["truncated", "nan", "shape", "missing"])
def test_damaged_scores_are_refused_or_made_again(scored, damage):
    truth = scored.scores()
    path = scored.folder / "scores-000000.npy"
    values = np.load(path)
    if damage == "missing":
        path.unlink()
        assert torch.allclose(scored.scores(), truth)
        return
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        np.save(path, values * np.nan if damage == "nan" else values[:3])
    with pytest.raises(UserError, match="delete its folder"):
        scored.scores()


def test_every_rank_scores_its_share_alone(scored, monkeypatch):
    monkeypatch.setattr(reference_cache, "sum_over_ranks", lambda tensor: tensor)
    truth, shares = scored.scores(), []
    for rank in range(2):
        scored.scored, here = 0, replace(scored.world, rank=rank, world_size=2)
        loader = Loader(scored.pairs, Epochs(10, 4, 0), rank, 2, "shared", 60)
        shares.append(reference_cache._score_pairs(scored.score, loader, list(range(10)), here))
        assert scored.scored == 5
    assert torch.allclose(shares[0] + shares[1], truth) and (shares[0] * shares[1] == 0).all()


def test_a_killed_build_goes_on_with_the_next_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_cache, "CHUNK", 4)
    truth = Scored(tmp_path / "whole").scores()
    scored, write = Scored(tmp_path / "killed"), reference_cache._write_chunk

    def dies(path, scores):
        if path.name == "scores-000001.npy":
            raise KeyboardInterrupt
        write(path, scores)

    monkeypatch.setattr(reference_cache, "_write_chunk", dies)
    with pytest.raises(KeyboardInterrupt):
        scored.scores()
    assert heartbeat.place() == "scoring pairs 4 to 7 for the reference cache"
    assert not (scored.folder / "manifest.json").exists()
    monkeypatch.setattr(reference_cache, "_write_chunk", write)
    scored.scored = 0
    assert torch.equal(scored.scores(), truth)
    assert scored.scored == 6


def test_a_copy_made_to_score_is_freed_before_training(tiny_policy, tmp_path, monkeypatch):
    copies: list[weakref.ref] = []
    alive: list[bool] = []

    def copied(*args):
        copy = frozen_copy(*args)
        copies.append(weakref.ref(copy))
        return copy

    step = dpo.preference.take_step

    def looked(*args):
        gc.collect()
        alive.append(copies[0]() is not None)
        step(*args)

    monkeypatch.setattr(dpo.training.frozen.load, "frozen_copy", copied)
    monkeypatch.setattr(dpo.preference, "take_step", looked)
    for mode in ("cached", "online"):
        copies.clear()
        code = train_dpo.main([
            "--config", "ds_configs/zero2.json", "--model.policy", str(tiny_policy), "--data.train", "builtin:world",
            "--data.train_limit", "16", "--data.validation_limit", "4", "--data.cache_dir", str(tmp_path / "cache"),
            "--train.max_steps", "1", "--train.global_batch_size", "8", "--reference.mode", mode,
            "--reference.dtype", "bf16", "--train.output_dir", str(tmp_path / mode), "--log.samples", "1",
            "--log.sample_tokens", "2",
        ])  # fmt: skip
        assert code == 0
    assert alive == [False, True]


def test_scores_of_products_in_fp32_and_in_bf16_have_caches_of_their_own(tiny_policy, tmp_path, monkeypatch):
    """Two a run: of training and of validation pairs."""
    flags = ["--reference.mode", "cached", "--data.cache_dir", str(tmp_path / "c")]
    for precision, caches in (("bf16", [2, 4, 4]), ("fp32", [6, 6, 6])):
        for number, wide in enumerate((True, False, True)):
            monkeypatch.setattr(products, "fp32_is_faster", lambda wide=wide: wide)
            run = ["--train.precision", precision, "--train.output_dir", str(tmp_path / f"{precision}{number}")]
            assert train_dpo.main(arguments(tmp_path, tiny_policy, *flags, *run)) == 0
            assert len(list((tmp_path / "c" / "reference").iterdir())) == caches[number]


def test_a_sharded_copy_made_to_score_gives_its_memory_back_before_training(tiny_policy, tmp_path, monkeypatch):
    start, step = dpo.training.frozen.deepspeed_engine.start_frozen, dpo.preference.take_step
    parameters: list[torch.nn.Parameter] = []
    held: list[int] = []

    def started(*args):
        engine = start(*args)
        parameters.extend(engine.module.parameters())
        return engine

    def looked(*args):
        held.append(sum(p.ds_tensor.untyped_storage().nbytes() + p.untyped_storage().nbytes() for p in parameters))
        return step(*args)

    monkeypatch.setattr(dpo.training.frozen.deepspeed_engine, "start_frozen", started)
    monkeypatch.setattr(dpo.preference, "take_step", looked)
    code = train_dpo.main(arguments(
        tmp_path, tiny_policy, "--config", "ds_configs/zero3.json", "--reference.mode", "cached", "--reference.dtype",
        "bf16",
    ))  # fmt: skip
    assert code == 0 and parameters
    assert held == [0, 0]


def test_the_tokens_of_files_on_disk_and_of_a_mixture_are_in_the_key(tmp_path):
    def made(name: str, answer: str, tool: str) -> Any:
        ask, turns = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": answer}]
        longer = [*turns, {"role": "tool", "content": tool}, *turns]
        rows = [{"prompt": ask, "chosen": longer, "rejected": [{"role": "assistant", "content": "no"}]}]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return prepare_pairs(tmp_path / name, tokenizer, cache_dir=tmp_path / "cache")[0]

    tokenizer = with_template(tokenizer_of("byte"), CHATML)
    first, same, other = made("a.jsonl", "yes", "1"), made("b.jsonl", "yes", "1"), made("c.jsonl", "yes", "2")
    assert len(first.unscored) > 0
    found = [reference_cache.tokens_fingerprint(pairs) for pairs in (first, same, other)]
    assert found[0] == found[1] != found[2]
    mixed = [reference_cache.tokens_fingerprint(Mixture(two, "ab")) for two in ([first, other], [other, first])]
    assert len({*found, *mixed}) == 4
