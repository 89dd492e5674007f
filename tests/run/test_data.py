"""Mixtures and named validation sets through whole runs; lists of sources that make no sense."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest

import train_dpo
from dpo.commandline import parse
from dpo.data import example
from dpo.errors import UserError
from dpo.run.data import prepare_data
from dpo.run.prepare import _batch_notes, model_and_tokenizer
from dpo.runtime.tracking import read_lines
from tests.invariants.jobs import train_all, without_drawings
from tests.test_commandline import message_of

WORLD = "builtin:world"
TRAIN = [{"path": WORLD, "weight": 1}, {"path": WORLD, "split": "validation", "weight": 3, "name": "b"}]


def sets(folder: Path) -> list[dict[str, str]]:
    """Five held-out rows, and three that training sees."""
    (folder / "seen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in example.rows("train", limit=3)))
    return [{"path": WORLD, "name": "held"}, {"path": str(folder / "seen.jsonl"), "name": "seen"}]


def argv(folder: Path, train: Any = TRAIN, validation: Any = None, *more: str) -> list[str]:
    return [
        "--config", "ds_configs/zero2.json", "--model.policy", "builtin:tiny", "--data.train", json.dumps(train),
        "--data.validation", json.dumps(validation or sets(folder)), "--data.train_limit", "12",
        "--data.validation_limit", "5", "--data.cache_dir", str(folder / "cache"), "--train.global_batch_size", "7",
        "--train.max_steps", "4",
        "--optim.lr", "1e-3", "--optim.schedule", "constant", "--optim.warmup_steps", "0", "--log.samples", "3",
        "--log.sample_tokens", "2", *more,
    ]  # fmt: skip


def trained(run: Path, *arguments: Any) -> list[dict[str, Any]]:
    assert train_dpo.main([*argv(run.parent, *arguments), "--train.output_dir", str(run)]) == 0
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in read_lines(run)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run on a mixture with two validation sets, of which one has fewer pairs."""
    run = tmp_path_factory.mktemp("mixed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        without_drawings(patch.setattr)
        trained(run)
    return run


def evaluations(lines: list[dict[str, Any]], prefix: str = "eval_") -> list[dict[str, float]]:
    names = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen")
    return [{name: line[prefix + name] for name in names} for line in lines if prefix + "loss" in line]


def test_every_validation_set_has_its_own_metrics_and_eval_is_over_all_their_pairs(whole, tmp_path):
    lines = read_lines(whole)
    held, seen, every = (evaluations(lines, prefix) for prefix in ("eval_held_", "eval_seen_", "eval_"))
    assert len(every) == len(held) == len(seen) >= 2
    for a, b, both in zip(held, seen, every, strict=True):
        for name, value in both.items():
            assert value == pytest.approx((5 * a[name] + 3 * b[name]) / 8, rel=1e-6, abs=1e-9)
    assert held[-1]["loss"] != pytest.approx(seen[-1]["loss"], abs=1e-6)
    # A run that has one of the sets alone says the same of it, without a name.
    alone = evaluations(trained(tmp_path / "run", TRAIN, [{"path": WORLD}]))
    for found, expected in zip(held, alone, strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_samples_are_of_every_validation_set(whole):
    rows = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == 3
    starts = [example.rows(split, limit=1)[0]["chosen"] for split in ("validation", "train")]
    assert [start.startswith(row["prompt"]) for start, row in zip(starts, rows, strict=False)] == [True, True]


def test_a_path_in_a_list_is_a_source_without_further_keys(tmp_path):
    sources = parse([*argv(tmp_path, ["a.jsonl", {"path": "b.jsonl", "format": "hh"}])]).config.data.train_sources
    assert [(source.path, source.format) for source in sources] == [("a.jsonl", None), ("b.jsonl", "hh")]
    of_text, of_mappings = (trained(tmp_path / name, [one], None, "--train.max_steps", "1") for name, one in (
        ("text", WORLD), ("mapping", {"path": WORLD})
    ))  # fmt: skip
    assert of_text == of_mappings and f"`{WORLD}`" in (tmp_path / "text/final/README.md").read_text()


def test_a_mixture_goes_on_where_it_stopped(whole, tmp_path):
    run = tmp_path / "run"
    trained(run, TRAIN, None, "--train.max_steps", "2", "--train.save_every", "1")
    again = trained(run, TRAIN, None, "--train.max_steps", "4", "--train.save_every", "1")
    expected = [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in read_lines(whole)]
    assert [line for line in again if "loss" in line] == [line for line in expected if "loss" in line]


def test_another_weight_is_another_run(whole, tmp_path, capsys):
    other = [TRAIN[0], TRAIN[1] | {"weight": 2}]
    arguments = [*argv(whole.parent, other), "--train.output_dir", str(whole)]
    assert train_dpo.main(arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "holds another run: data.train was [" in line and "'weight': 3" in line and "'weight': 2" in line


def test_two_ranks_and_a_cached_reference_have_the_numbers_of_one(whole, tmp_path):
    jobs = {"cached": argv(tmp_path, TRAIN, None, "--reference.mode", "cached")}
    found = train_all(tmp_path, jobs, ranks=2)["cached"]
    for expected, line in zip(read_lines(whole), found.lines, strict=True):
        assert expected.keys() == line.keys()
        for name, value in expected.items():
            if not name.startswith(("perf/", "samples/")):  # a cached reference is not there to score answers
                assert line[name] == pytest.approx(value, rel=1e-3, abs=2e-5), name
    # Four steps are one epoch of 24 pairs, 7 + 7 + 7 + 3: a quarter of them from the first source of 12.
    steps = [[i for rank in found.seen for ids in rank["pairs"][step] for i in ids] for step in range(4)]
    assert [len(step) for step in steps] == [7, 7, 7, 3]
    assert sum(i < 12 for step in steps for i in step) == 6


@pytest.mark.parametrize(
    ("train", "validation", "named"),
    [
        ([], None, "data.train is an empty list"),
        ([{"weight": 1}], None, "data.train source 1 has no path"),
        ([{"path": "a"}, {"path": "b", "wight": 2}], None, "source 2: unknown key wight; did you mean weight?"),
        ([{"path": "a", "weight": 0}], None, "data.train source 1: weight is 0; use a positive number"),
        ([{"path": "a", "weight": "much"}], None, "data.train source 1: weight is 'much'; use a number"),
        ([{"path": 3}], None, "data.train source 1: path is 3; use text"),
        ([{"path": "a", "weight": 1}, {"path": "b"}], None, "a weight to some sources; to all or to none"),
        ([{"path": "a"}], [{"path": "b", "name": "x/y"}], "data.validation source 1: name is x/y; use letters"),
        ([{"path": "a"}], [{"path": "b"}, {"path": "c"}], "data.validation has the names [None, None]; give each"),
        ([{"path": "a"}], [{"path": "b", "weight": 1}], "data.validation has a weight; every pair is scored once"),
    ],
)
def test_a_list_of_sources_that_makes_no_sense_is_one_line(train, validation, named):
    flags = ["--model.policy", "p", "--data.train", json.dumps(train)]
    flags += [] if validation is None else ["--data.validation", json.dumps(validation)]
    assert named in message_of(flags)


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--data.subset", "data.subset is x and data.train a list; give subset to its sources"),
        ("--data.validation_split", "data.validation_split is x and data.train a list; name data.validation"),
    ],
)
def test_settings_of_one_source_are_refused_beside_a_list(flag, named):
    assert named in message_of(["--model.policy", "p", "--data.train", '[{"path": "a"}]', flag, "x"])


def test_odpo_starts_at_the_loss_of_its_margins_and_refuses_data_without(tmp_path, capsys):
    rows = [{"prompt": f"Q{i}:", "chosen": " a" * (i + 1), "rejected": " b", "margin": i + 0.5} for i in range(7)]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    odpo = ["--loss.name", "odpo", "--loss.odpo_alpha", "0.7", "--train.max_steps", "1", "--reference.dtype", "fp32"]
    rated = [{"path": str(tmp_path / "rated.jsonl")}]
    lines = trained(tmp_path / "run", rated, rated, *odpo)
    offsets = [0.7 * math.log(row["margin"]) for row in rows]
    expected = sum(math.log1p(math.exp(offset)) for offset in offsets) / len(rows)
    assert lines[1]["loss"] == pytest.approx(expected, rel=1e-5)
    first_five = sum(math.log1p(math.exp(offset)) for offset in offsets[:5]) / 5
    assert lines[0]["eval_loss"] == pytest.approx(first_five, rel=1e-5)
    arguments = argv(tmp_path, [{"path": WORLD}], None, *odpo, "--train.output_dir", str(tmp_path / "none"))
    assert train_dpo.main(arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "loss.name odpo needs a margin above 0 for every pair and 12 of builtin:world [train] have none" in line
    assert not (tmp_path / "none").exists()


def test_a_run_without_validation_says_how_to_get_one(tmp_path):
    rows = datasets.Dataset.from_list(example.rows("train", limit=3))
    datasets.DatasetDict({"train_prefs": rows, "test_prefs": rows}).save_to_disk(tmp_path / "data")
    found = []
    for data in (json.dumps([{"path": WORLD}]), str(tmp_path / "data")):
        policy = ["--model.policy", "builtin:tiny", "--data.cache_dir", str(tmp_path / "cache")]
        split = "train" if WORLD in data else "train_prefs"
        config = parse([*policy, "--data.train", data, "--data.train_split", split, "--data.train_limit", "3"]).config
        found.append(prepare_data(config, model_and_tokenizer(config)[1], 99).notes[-1])
    assert found == [
        "no validation: data.train is a list of sources; name validation data by data.validation, or hold out a share"
        " of the prompts by data.validation_fraction",
        "no validation: data.validation is not set and data.train has no split validation or test; it has test_prefs:"
        " name one by data.validation_split, or hold out a share of the prompts by data.validation_fraction",
    ]


def test_a_split_beside_a_list_of_validation_sources_is_refused(capsys):
    argv = ["--model.policy", "builtin:tiny", "--data.train", WORLD, "--data.validation_split", "other"]
    with pytest.raises(UserError, match=r"data.validation_split is other and data.validation a list; give split to"):
        parse([*argv, "--data.validation", json.dumps([{"path": WORLD, "name": "a"}])])


def held_out(fraction: str, *more: str) -> list[str]:
    return ["--model.policy", "builtin:tiny", "--data.validation_fraction", fraction, *more]


def test_a_fraction_of_the_prompts_is_validated_on_and_never_trained_on(tmp_path):
    sources = [{"path": WORLD, "name": "a"}, {"path": WORLD, "split": "validation", "name": "b"}]
    flags = ["--data.train", json.dumps(sources), "--data.train_limit", "40", "--data.cache_dir", str(tmp_path)]
    run = tmp_path / "run"
    short = ["--train.max_steps", "1", "--train.global_batch_size", "8", "--log.samples", "0"]
    arguments = [*held_out("0.25"), *flags, *short, "--train.output_dir", str(run)]
    assert train_dpo.main(["--config", "ds_configs/zero2.json", *arguments]) == 0
    audit = json.loads((run / "audit.json").read_text())
    pairs = {(one["role"], one["name"]): one["pairs"] for one in audit["sets"]}
    assert audit["leaks"] == [] and sum(pairs.values()) == 80
    assert all(pairs["validation", name] in range(3, 18) for name in "ab")
    assert {"eval_loss", "eval_a_loss", "eval_b_loss"} <= read_lines(run)[0].keys()


def test_a_source_too_small_to_hold_out_a_prompt_has_no_validation_and_says_so(tmp_path):
    (tmp_path / "few.jsonl").write_text(json.dumps({"prompt": "Q:", "chosen": " a", "rejected": " b"}) + "\n")
    sources = [{"path": WORLD, "name": "a"}, {"path": str(tmp_path / "few.jsonl"), "name": "few"}]
    flags = ["--data.train", json.dumps(sources), "--data.train_limit", "40", "--data.cache_dir", str(tmp_path)]
    config = parse(held_out("0.1", *flags)).config
    data = prepare_data(config, model_and_tokenizer(config)[1], 99)
    assert [one.name for one in data.validation] == ["a"] and len(data.train) == 2
    assert any("few.jsonl, the 10% of prompts held out: none in 1 rows" in note for note in data.notes)
    sources = [one.report.source.partition("world ")[2] for one in (data.train[0], data.validation[0])]
    assert sources == ["[train], the 90% of prompts to train on", "[train], the 10% of prompts held out"]


def test_a_fraction_that_leaves_nothing_is_refused_by_name(tmp_path):
    flags = held_out("0.0001", "--data.train", WORLD, "--data.train_limit", "3", "--data.cache_dir", str(tmp_path))
    config = parse(flags).config
    with pytest.raises(UserError, match=r"the 0.01% of prompts held out: none in 3 rows; change data"):
        prepare_data(config, model_and_tokenizer(config)[1], 99)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (held_out("1"), "data.validation_fraction is 1.0; use a number between 0 and 1"),
        (held_out("0.1", "--data.validation", "v"), "data.validation_fraction is 0.1 and data.validation is given too"),
        (held_out("0.1", "--data.validation_limit", "9"), "and data.validation_limit is given too"),
        (held_out("0.1", "--data.train", '["a", "b"]'), "data.train has 2 sources; give each a name of its own"),
    ],
)
def test_a_fraction_that_makes_no_sense_is_one_line(flags, named):
    assert named in message_of(flags if "--data.train" in flags else [*flags, "--data.train", "t"])


def test_a_batch_of_more_pairs_than_there_are_is_said_to_be_one_step():
    assert _batch_notes(16, 16) == []
    (note,) = _batch_notes(17, 16)
    assert note == "train.global_batch_size is 17 and there are 16 training pairs: one step an epoch"
