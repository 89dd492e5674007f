"""argv -> Config: who overrides whom, and one line for every mistake."""

from __future__ import annotations

import builtins
import dataclasses
import gc
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import train_dpo
from dpo import commandline
from dpo.commandline import Command, parse, parse_options
from dpo.config import Config, check_world_size, to_dict
from dpo.errors import UserError
from dpo.objective.catalog import LOSSES
from dpo.recipe import ELSEWHERE, NOWHERE, VALUES_ELSEWHERE, keys_of, unknown_value

GIVEN = ["--model.policy", "p", "--data.train", "d"]
ROOT = Path(__file__).resolve().parents[1]


def recipe(folder: Path, text: str) -> list[str]:
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return ["--recipe", str(folder / "recipe.yaml")]


def message_of(argv: list[str]) -> str:
    with pytest.raises(UserError) as error:
        parse(argv)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- who decides -----------------------------------------------------------------------------------------------------


def test_flags_override_the_recipe_and_the_recipe_the_defaults_in_any_order(tmp_path: Path) -> None:
    named = recipe(tmp_path, "train: {epochs: 5, seed: 7}\noptim: {lr: 0.5}\n")
    flags = [*GIVEN, "--train.epochs", "9"]
    for argv in (named + flags, flags + named, flags[:2] + named + flags[2:]):
        config = parse(argv).config
        assert (config.train.epochs, config.train.seed, config.optim.lr) == (9, 7, 0.5)
        assert config.train.global_batch_size == 64 and config.loss.beta == 0.1


def test_the_last_of_two_equal_flags_counts() -> None:
    assert parse([*GIVEN, "--train.epochs", "2", "--train.epochs=3"]).config.train.epochs == 3


@pytest.mark.parametrize("text", ["5e-7", "5E-7", "0.0000005", "5.0e-07"])
def test_a_number_in_a_recipe_is_a_number_whatever_yaml_thinks(tmp_path: Path, text: str) -> None:
    assert parse([*GIVEN, *recipe(tmp_path, f"optim:\n  lr: {text}\n")]).config.optim.lr == 5e-7
    assert parse([*GIVEN, "--optim.lr", text]).config.optim.lr == 5e-7


@pytest.mark.parametrize("text", ["off", "no", "false", "False"])
def test_off_is_false_in_recipe_and_flag(tmp_path: Path, text: str) -> None:
    assert parse([*GIVEN, *recipe(tmp_path, f"data:\n  shuffle: {text}\n")]).config.data.shuffle is False
    if text != "no":
        assert parse([*GIVEN, "--data.shuffle", text]).config.data.shuffle is False


def test_a_setting_of_two_types_takes_both(tmp_path: Path) -> None:
    text = "train: {eval_every: epoch, save_every: 5}\nmodel: {gradient_checkpointing: false}\n"
    flags = ["--train.tokens_per_micro_batch", "512", "--log.backends", "[wandb]"]
    config = parse([*GIVEN, *recipe(tmp_path, text), *flags]).config
    assert (config.train.eval_every, config.train.save_every) == ("epoch", 5)
    assert config.train.tokens_per_micro_batch == 512
    assert config.model.gradient_checkpointing is False and config.log.backends == ("wandb",)


def test_what_is_no_setting_of_the_run_stands_beside_the_config() -> None:
    argv = [*GIVEN, "--config", "ds.json", "--dry_run"]
    config = parse(GIVEN).config
    assert parse(argv) == Command(config, "ds.json", None, False, dry_run=True, prepare_only=False)
    assert parse([*GIVEN, "--prepare_only"]).prepare_only


@pytest.mark.parametrize("flag", [["--local_rank", "1"], ["--local_rank=1"]])
def test_local_rank_of_the_deepspeed_launcher_changes_nothing(flag: list[str]) -> None:
    assert parse([*flag, *GIVEN]) == parse(GIVEN)


def test_quickstart_is_assumed_only_where_nothing_names_recipe_model_or_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "model: {policy: quick}\ndata: {train: start}\n"
    monkeypatch.setattr(commandline, "QUICKSTART", Path(recipe(tmp_path, text)[1]))
    assumed = parse(["--train.epochs", "4"])
    assert assumed.assumed_quickstart and assumed.recipe == str(tmp_path / "recipe.yaml")
    assert (assumed.config.model.policy, assumed.config.train.epochs) == ("quick", 4)
    named = parse(["--recipe", str(tmp_path / "recipe.yaml")])
    assert not named.assumed_quickstart and named.config.model.policy == "quick"
    assert not parse(GIVEN).assumed_quickstart and parse(GIVEN).recipe is None
    assert "data.train is not set" in message_of(["--model.policy", "p"])
    assert "model.policy is not set" in message_of(["--data.train=d"])


def test_the_resolved_config_reads_back_the_same(tmp_path: Path) -> None:
    argv = [*GIVEN, "--optim.lr", "5e-7", "--optim.betas", "[0.5, 0.75]", "--log.backends", "[wandb, trackio]"]
    config = parse([*argv, "--data.shuffle", "off", "--train.eval_every", "3", "--train.max_steps", "7"]).config
    written = yaml.safe_dump(to_dict(config), sort_keys=False)
    assert parse(recipe(tmp_path, written)).config == config
    assert yaml.safe_load(written)["optim"]["betas"] == [0.5, 0.75]


def test_help_lists_every_section_and_key_with_the_dataclass_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    config = parse(GIVEN).config

    def check(section: Any, prefix: str) -> None:
        for field in dataclasses.fields(section):
            default = getattr(type(section)(), field.name)
            if dataclasses.is_dataclass(default):
                check(default, f"{prefix}{field.name}.")
                continue
            entry = text.rpartition(f"--{prefix}{field.name} ")[2].partition(" --")[0]
            assert f"default: {'null' if default is None else default})" in entry, (prefix, field.name, entry)
            assert len(entry.partition("(type")[0].split()) > 1, f"{field.name} has no help"

    for section in dataclasses.fields(Config):
        check(getattr(config, section.name), f"{section.name}.")


# --- what is wrong, and what to do -----------------------------------------------------------------------------------

FLAG_MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown key": (["--train.epochss", "3"], "unknown key train.epochss; did you mean train.epochs?"),
    "unknown key with =": (["--loss.betta=3"], "unknown key loss.betta; did you mean loss.beta?"),
    "others' name": (["--optim.learning_rate", "1"], "unknown key optim.learning_rate; did you mean optim.lr?"),
    "others' name alone": (["--num_train_epochs=1"], "unknown key num_train_epochs; did you mean train.epochs?"),
    "others' name, misspelt": (["--optim.learningrate=1"], "unknown key optim.learningrate; did you mean optim.lr?"),
    "others' name elsewhere": (["--model.dtype", "bf16"], "unknown key model.dtype; did you mean train.precision?"),
    "others' key that has no like": (
        ["--train.load_best_model_at_end", "true"],
        "unknown key train.load_best_model_at_end; the best checkpoint is kept, and python -m dpo export RUN"
        " --checkpoint best writes it",
    ),
    "a key like none but in its section": (
        ["--train.greedy", "1"],
        "unknown key train.greedy; python train_dpo.py --help lists all keys",
    ),
    "a key like one of another section": (
        ["--loss.shuffl", "on"], "unknown key loss.shuffl; python train_dpo.py --help lists all keys"
    ),
    "weights of one loss": (["--loss.weights", "[2]"], "loss.weights is [2.0] and loss.name is sigmoid alone;"
                            " leave the weights out, or name a list of losses, such as [sigmoid, sft]"),
    "others' name in a section": (
        ["--model.lora.rank", "8"], "unknown key model.lora.rank; did you mean model.lora.r?",
    ),
    "section left out": (["--epochs", "3"], "unknown key epochs; did you mean train.epochs?"),
    "abbreviated key": (["--train.epoch", "3"], "unknown key train.epoch; did you mean train.epochs?"),
    "dash for underscore": (["--train.max-steps", "3"], "unknown key train.max-steps; did you mean train.max_steps?"),
    "several": (
        ["--train.epochss", "3", "--learning_rate=1", "--zzz"],
        "unknown key train.epochss; did you mean train.epochs?; unknown key learning_rate; did you mean optim.lr?;"
        " unknown key zzz; python train_dpo.py --help lists all keys",
    ),
    "nothing like it": (["--zzz", "3"], "unknown key zzz; python train_dpo.py --help lists all keys"),
    "no flag": (["extra"], "unknown argument extra; settings are given as --section.key VALUE"),
    "no value": (["--train.epochs"], "--train.epochs has no value; use a whole number"),
    "no recipe": (["--recipe"], "--recipe has no value; use a path"),
    "no whole number": (["--train.epochs", "x"], "train.epochs is x; use a whole number"),
    "a fraction": (["--train.epochs", "1.5"], "train.epochs is 1.5; use a whole number"),
    "no number": (["--optim.lr", "fast"], "optim.lr is fast; use a number"),
    "an optional number": (["--train.max_steps", "x"], "train.max_steps is x; use a whole number"),
    "number or word": (["--train.eval_every", "often"], "train.eval_every is often; use a whole number or epoch"),
    "number or words": (["--log.sample_every", "x"], "log.sample_every is x; use a whole number or epoch or end"),
    "word or bool": (
        ["--model.gradient_checkpointing", "maybe"], "model.gradient_checkpointing is maybe; use auto or true or false",
    ),
    "no bool": (["--data.shuffle", "maybe"], "data.shuffle is maybe; use true or false"),
    "no choice": (["--train.layout", "dense"], "train.layout is dense; use shared or packed or padded"),
    "neither a choice nor a list": (
        ["--loss.name", "dpo"], 
        f"loss.name is dpo; use {' or '.join(LOSSES)} or a list of them; did you mean sigmoid?",
    ),
    "a choice, misspelt": (
        ["--optim.schedule", "cosin"], "optim.schedule is cosin; use cosine or linear or constant; did you mean cosine?"
    ),
    "a choice as others call it": (
        ["--train.precision", "float16"],
        "train.precision is float16; use auto or fp16 or bf16 or fp32; did you mean fp16?",
    ),
    "another choice's name": (
        ["--reference.mode", "float16"], "reference.mode is float16; use auto or online or cached or adapter or none",
    ),
    "what others call all": (
        ["--model.lora.targets", "all-linear"],
        "model.lora.targets is all-linear; use [text, ...]; leave it out for all linear layers",
    ),
    "no pair": (["--optim.betas", "0.9"], "optim.betas is 0.9; use [a number, a number]"),
    "no list": (["--log.backends", "x"], "log.backends is x; use [tensorboard or wandb or trackio, ...]"),
    "a section": (["--loss", "sigmoid"], "loss is sigmoid; use its keys, as in --loss.KEY VALUE"),
    "null": (["--train.epochs", "null"], "train.epochs is None; use a whole number"),
    "nan": (["--loss.beta", "nan"], "loss.beta is nan; use a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", FLAG_MISTAKES)
def test_a_wrong_flag_is_one_line_with_key_value_and_fix(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    flags, expected = FLAG_MISTAKES[case]
    assert message_of([*GIVEN, *flags]) == expected
    assert capfd.readouterr() == ("", ""), "the parser printed something of its own"


VALUE_MISTAKES: dict[str, tuple[Any, str]] = {
    "data.max_length": (1, "use at least 2"),
    "data.max_prompt_length": (0, "use a whole number of at least 1"),
    "data.train_limit": (0, "use a whole number of at least 1"),
    "data.validation_limit": (-3, "use a whole number of at least 1"),
    "data.workers": (0, "use a whole number of at least 1"),
    "loss.beta": (0.0, "use a positive number, 0.1 to 0.5 is usual"),
    "loss.label_smoothing": (0.5, "use a number in [0, 0.5)"),
    "optim.lr": (0.0, "use a positive number such as 1e-6"),
    "optim.sft_lr": (-1.0, "use a positive number such as 1e-6"),
    "optim.warmup_steps": (-1.0, "use a number of at least 0"),
    "optim.weight_decay": (-0.1, "use a number of at least 0"),
    "optim.max_grad_norm": (-1.0, "use a number of at least 0"),
    "optim.betas": ([0.9, 1.0], "use two numbers in [0, 1)"),
    "optim.eps": (0.0, "use a positive number"),
    "train.seed": (-1, "use 0 or more"),
    "train.epochs": (0, "use a whole number of at least 1"),
    "train.max_steps": (0, "use a whole number of at least 1"),
    "train.sft_epochs": (-1, "use 0 or more"),
    "train.global_batch_size": (0, "use a whole number of at least 1"),
    "train.micro_batch_size": (0, "use a whole number of at least 1"),
    "train.tokens_per_micro_batch": (0, "use a whole number of at least 1"),
    "train.eval_every": (0, "use a whole number of at least 1"),
    "train.save_every": (-2, "use a whole number of at least 1"),
    "train.keep_checkpoints": (0, "use a whole number of at least 1"),
    "log.every": (0, "use a whole number of at least 1"),
    "log.samples": (-1, "use 0 or more"),
    "log.sample_every": (0, "use at least 1, epoch or end"),
    "log.sample_tokens": (0, "use at least 1"),
}


@pytest.mark.parametrize("key", VALUE_MISTAKES)
def test_an_impossible_value_is_one_line_with_key_value_and_fix(key: str) -> None:
    value, fix = VALUE_MISTAKES[key]
    assert message_of([*GIVEN, f"--{key}", str(value)]) == f"{key} is {value}; {fix}"


def test_values_that_contradict_each_other_are_named_together() -> None:
    message = message_of([*GIVEN, "--loss.label_smoothing", "0.1", "--loss.name", "hinge"])
    assert message == (
        "loss.label_smoothing is 0.1 with loss.name hinge; it belongs to sigmoid or robust or sigmoid_norm or exo_pair"
        " or aot or aot_unpaired or cpo"
    )
    assert message_of([*GIVEN, "--train.output_dir", ""]) == "train.output_dir is empty; name a folder"


@pytest.mark.parametrize("number", [".nan", ".inf"])
def test_a_number_that_is_none_is_refused(tmp_path: Path, number: str) -> None:
    for key, fix in (("loss.beta", "positive"), ("optim.lr", "positive"), ("optim.weight_decay", "at least 0")):
        section, name = key.split(".")
        message = message_of([*GIVEN, *recipe(tmp_path, f"{section}:\n  {name}: {number}\n")])
        assert message.startswith(f"{key} is {number[1:]}; use a") and fix in message


RECIPE_MISTAKES = {
    "trian:\n  epochs: 3\n": "unknown key trian.epochs; did you mean train.epochs?",
    "train:\n  epochss: 3\n": "unknown key train.epochss; did you mean train.epochs?",
    "train:\n  epochss: 3\nloss: {betta: 1, name: sigmoid}\nzz: 1\n": "unknown key train.epochss; did you mean"
    " train.epochs?; unknown key loss.betta; did you mean loss.beta?; unknown key zz; python train_dpo.py --help lists",
    "train:\n  3: 4\n": "unknown key train.3; python train_dpo.py --help lists all keys",
    "recipe: other.yaml\n": "unknown key recipe; python train_dpo.py --help lists all keys",
    "dry_run: true\n": "unknown key dry_run;",
    "train: 3\n": "section train must hold keys, got 3",
    "train:\nloss: {beta: 1}\n": "section train must hold keys, got None",
    "train: [1]\n": "section train must hold keys, got [1]",
    "- train\n": "expected sections such as 'train:', got list",
    "train\n": "expected sections such as 'train:', got str",
    "train: {epochs: 1\n": "not valid YAML: line 2: expected ',' or '}'",
    "train:\n\tepochs: 1\n": "not valid YAML: line 2: found character",
    "\x00": "not valid YAML: unacceptable character",
    "train:\n  epochs: 1\n  epochs: 2\n": "not valid YAML: line 3: epochs is given twice; keep one",
    "loss: {beta: 1}\ntrain: {}\nloss: {name: ipo}\n": "not valid YAML: line 3: loss is given twice; keep one",
}


@pytest.mark.parametrize("text", RECIPE_MISTAKES)
def test_a_broken_recipe_is_one_line_that_names_the_file(tmp_path: Path, text: str) -> None:
    message = message_of([*GIVEN, *recipe(tmp_path, text)])
    assert message.startswith(f"--recipe {tmp_path}/recipe.yaml: {RECIPE_MISTAKES[text]}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {epochs: soon}", "train.epochs is soon; use a whole number"),
        ("train: {epochs: null}", "train.epochs is null; use a whole number"),
        ("train: {epochs: yes}", "train.epochs is True; use a whole number"),
        ("train: {output_dir: on}", "train.output_dir is True; use text"),
        ("model: {policy: 3}", "model.policy is 3; use text"),
        ("data: {shuffle: null}", "data.shuffle is null; use true or false"),
        ("optim: {betas: [0.9]}", "optim.betas is [0.9]; use [a number, a number]"),
        ("train: {eval_every: [1]}", "train.eval_every is [1]; use a whole number or epoch"),
    ],
)
def test_a_wrong_type_in_a_recipe_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    assert message_of([*GIVEN[2 * ("policy" in text) :], *recipe(tmp_path, text)]) == expected


def test_a_missing_recipe_says_where_recipes_are(tmp_path: Path) -> None:
    for path in (str(tmp_path / "none.yaml"), str(tmp_path)):
        assert message_of(["--recipe", path]).startswith(f"--recipe {path}: no such file; the recipes")


def test_a_recipe_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00t")
    assert "not valid YAML" in message_of(["--recipe", str(tmp_path / "recipe.yaml")])


def test_every_rank_needs_a_pair() -> None:
    config = parse([*GIVEN, "--train.global_batch_size", "4"]).config
    check_world_size(config, 4)
    with pytest.raises(UserError, match="train.global_batch_size is 4 pairs for 5 ranks.*use at least 5, or fewer"):
        check_world_size(config, 5)


def test_a_typo_is_answered_before_torch_is_imported() -> None:
    code = (
        "import sys, train_dpo; found = train_dpo.main(sys.argv[1:]);"
        "sys.exit(found if 'torch' not in sys.modules else 9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *GIVEN, "--train.epochss", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "train_dpo.py: unknown key train.epochss; did you mean train.epochs?\n"


@dataclass
class _Options:
    """Of a verb in the tests."""

    run: str
    """A run directory."""
    top: int = 3
    """How many."""


def test_a_verb_of_its_own_takes_what_has_no_default_by_position():
    assert parse_options(["runs/a", "--top", "5"], "look", "Look.", _Options) == _Options("runs/a", 5)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["runs/a", "--topp", "5"], "unknown key topp; did you mean top?"),
        (["runs/a", "--zzzzzz", "5"], "unknown key zzzzzz; python -m dpo look --help lists all keys"),
        (["runs/a", "--top", "many"], "top is many; use a whole number"),
        ([], "the following arguments are required: run"),
        (["runs/a", "b"], "unknown argument b; python -m dpo look --help lists all arguments"),
    ],
)
def test_a_verb_of_its_own_refuses_what_it_does_not_know_in_one_line(argv, line):
    with pytest.raises(UserError) as caught:
        parse_options(argv, "look", "Look.", _Options)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_section_is_never_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "loss.yaml").write_text("beta: 0.5")
    for argv in (["--loss", str(tmp_path / "loss.yaml")], [f"--loss={tmp_path}/loss.yaml"], ["--loss", "9" * 5000]):
        with pytest.raises(UserError, match="loss is .*; use its keys, as in --loss.KEY VALUE"):
            parse(["--model.policy", "x", "--data.train", "y", *argv])


def test_arguments_that_are_no_utf8_are_named() -> None:
    with pytest.raises(UserError, match=r"argument '--data.train .+udcff.jsonl' is not UTF-8; rename"):
        parse(["--model.policy", "x", "--data.train", "\udcff.jsonl"])


def test_a_message_is_one_printable_line_of_bounded_length_that_ends_with_the_fix() -> None:
    with pytest.raises(UserError) as error:
        parse(["--data.train", "x", "--model.policy", "\x1b[31m\n" + "a" * 100_000])
    message = str(error.value)
    assert message.isprintable() and len(message) <= 1000
    assert message.startswith("model.policy is ") and "use a shorter name" in message


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("loss: {beta: 0x" + "9" * 3000 + "}", "loss.beta is a number of 12000 bits; use a smaller one"),
        ("#" * 2**18 + "\n", "a file of 262,145 bytes is no recipe"),
        ("nothing: {}", "unknown key nothing; "),
        ("data: {train: 2024-13-45}", "not valid YAML: month must be in 1..12; fix it"),
        ("model: {policy: \"a\\uD800\"}", "not valid YAML: while parsing a quoted scalar"),
    ],
)
def test_odd_values_of_a_recipe_are_one_line(text: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        parse(["--recipe", str(tmp_path / "r.yaml")])
    assert str(error.value).startswith(f"--recipe {tmp_path}/r.yaml: {found}")


def test_a_number_without_end_is_named_by_its_flag() -> None:
    with pytest.raises(UserError, match="--loss.beta 0x9+... is too large a number; use a smaller one"):
        parse(["--model.policy", "x", "--data.train", "y", "--loss.beta", "0x" + "9" * 3000])


@pytest.mark.parametrize(("argv", "remedy"), [
    (["--help=-1"], "leave the value out"), (["--data.train", "[]"], "name a source, or leave it out"),
])  # fmt: skip
def test_rare_refusals_say_what_to_do_too(argv, remedy):
    with pytest.raises(UserError, match=remedy):
        parse(argv)


@pytest.mark.parametrize("breaks", [False, True])
def test_importing_without_a_garbage_collector_ends_with_one(breaks, monkeypatch):
    seen: list[bool] = []

    def imported(name: str, *rest: Any) -> Any:
        if name == "dpo.train":
            seen.append(gc.isenabled())
            if breaks:
                raise ImportError("played")
            return None  # not a second module of the name
        return original(name, *rest)

    original = builtins.__import__
    monkeypatch.delitem(sys.modules, "dpo.train", raising=False)
    monkeypatch.setattr(builtins, "__import__", imported)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    with pytest.raises(ImportError) if breaks else nullcontext():
        train_dpo._import_all()
    assert seen == [False] and gc.isenabled()


def test_what_others_call_a_setting_leads_to_one_that_exists_and_is_none_itself() -> None:
    keys = keys_of()
    assert {name.split()[0] for name in ELSEWHERE.values()} <= {*keys}
    # Only the reference has a dtype of its own; the policy's is train.precision.
    assert {*ELSEWHERE, *NOWHERE} & {key.rpartition(".")[2] for key in keys} == {"dtype"}
    assert not ELSEWHERE.keys() & NOWHERE.keys()
    for name, meant in VALUES_ELSEWHERE.items():
        assert name not in LOSSES and unknown_value(name, list(LOSSES)) in (f"; did you mean {meant}?", "")
        assert all(word in keys for word in meant.split() if "." in word)
    told = [name for name in VALUES_ELSEWHERE if unknown_value(name, list(LOSSES))]
    assert {"kto", "rpo", "mpo", "cdpo", "wpo"} <= {*told} and "fa2" not in told
