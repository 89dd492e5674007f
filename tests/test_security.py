"""What comes from outside is text and numbers: it brings no code, no pickle, no path to follow; no secret gets out."""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from safetensors.torch import load_file

import train_dpo
from dpo.commandline import parse
from dpo.config import OptimConfig
from dpo.errors import UserError
from dpo.model import load
from dpo.runtime import engine
from tests.by_path import load_source, stream_source
from tests.data.tiny_tokenizers import plain_rows, written


@pytest.fixture(scope="module", autouse=True)
def deepspeed_has_tried_the_compiler() -> None:
    """It does so once in a process, silently but where standard error is captured, as in tests."""
    engine.build_config({}, optim=OptimConfig(), precision="fp32", global_batch_size=1)


SECRETS = {
    name: f"secret-of-{name.lower()}" for name in ("HF_TOKEN", "WANDB_API_KEY", "TRACKIO_TOKEN",
    "AWS_SECRET_ACCESS_KEY")
}


def arguments(folder: Path, policy: Path, *more: str) -> list[str]:
    return [
        "--model.policy", str(policy), "--data.train", str(written(folder, plain_rows(12))), "--data.cache_dir",
        str(folder / "cache"), "--train.output_dir", str(folder / "run"), "--train.global_batch_size", "4", *more,
    ]  # fmt: skip


def copied(policy: Path, folder: Path) -> Path:
    """A model folder to spoil."""
    folder.mkdir()
    for file in policy.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def refusal(argv: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    assert train_dpo.main(argv) == 2
    shown = capfd.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1, shown
    return shown.err


def with_code(kind: str, policy: Path, folder: Path) -> tuple[Path, Path]:
    """A model folder that brings code, and the file that its code would leave."""
    made, ran = copied(policy, folder), folder.with_name("ran")
    (made / "mine.py").write_text(
        f"from transformers import LlamaConfig, PreTrainedTokenizerFast\nopen({str(ran)!r}, 'w').close()\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    name, changes = {
        "config": ("config.json", {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig"}}),
        "tokenizer": (
            "tokenizer_config.json",
            {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": [None, "mine.MineTokenizer"]}},
        ),
    }[kind]
    (made / name).write_text(json.dumps(json.loads((made / name).read_text()) | changes))
    return made, ran


@pytest.mark.parametrize("kind", ["config", "tokenizer"])
def test_code_of_a_model_is_run_by_an_explicit_flag_alone(
    kind: str, tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, ran = with_code(kind, tiny_policy, tmp_path / "model")
    line = refusal(arguments(tmp_path, folder), capfd)
    assert f"{folder}: brings code of its own" in line and "--model.trust_remote_code true" in line
    assert not ran.exists() and not (tmp_path / "run").exists()
    argv = arguments(tmp_path, folder, "--model.trust_remote_code", "true", "--prepare_only")
    assert train_dpo.main(argv) == 0
    assert ran.exists()


class Exploit:
    def __init__(self, left: Path) -> None:
        self.left = left

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.left),)


def _dump(value: Any, stream: Any) -> None:
    pickle.dump(value, stream, protocol=2)  # torch warns of later ones before it refuses


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_a_pickle_among_the_weights_is_never_unpickled_as_code(
    kind: str, tiny_policy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, left = copied(tiny_policy, tmp_path / "model"), tmp_path / "left"
    (folder / "model.safetensors").unlink()
    with open(folder / "pytorch_model.bin", "wb") as stream:
        (torch.save if kind == "torch" else _dump)({"weight": Exploit(left)}, stream)
    line = refusal(arguments(tmp_path, folder), capfd)
    assert f"{folder}/pytorch_model.bin: no readable weights" in line
    assert not left.exists() and not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="cannot be loaded"):
        load.load_model(str(folder), dtype=torch.float32)
    assert not left.exists()


def test_a_pickle_in_the_place_of_an_adapter_is_refused(
    tiny_policy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, left = tmp_path / "adapter", tmp_path / "left"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tiny_policy)})
    )
    torch.save({"weight": Exploit(left)}, folder / "adapter_model.bin")
    assert f"{folder}/adapter_model.bin: no readable weights" in refusal(arguments(tmp_path, folder), capfd)
    assert not left.exists() and not (tmp_path / "run").exists()


def test_plain_tensors_in_a_pickle_are_read(tiny_policy: Path, tmp_path: Path) -> None:
    """Else the test above might refuse every .bin."""
    folder = copied(tiny_policy, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    load.check_weights(str(folder))
    loaded = load.load_model(str(folder), dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


@pytest.mark.parametrize("spoil", ["cut", "empty", "none", "config", "tokenizer"])
def test_a_damaged_model_folder_is_refused_before_the_run_begins(
    spoil: str, tiny_policy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tiny_policy, tmp_path / "model")
    weights = folder / "model.safetensors"
    if spoil == "none":
        weights.unlink()
    elif spoil == "tokenizer":
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": []}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    elif spoil == "config":
        (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": "many"}')
    else:
        weights.write_bytes(weights.read_bytes()[: 1000 if spoil == "cut" else 0])
    assert str(folder) in refusal(arguments(tmp_path, folder), capfd)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", [
    "model: !!python/object/apply:os.mkdir [{left}]", "train: {{seed: !!python/name:os.getcwd }}",
    "data: &a {{train: *a}}",
])  # fmt: skip
def test_yaml_of_a_recipe_makes_plain_values_alone(text: str, tmp_path: Path) -> None:
    left, recipe = tmp_path / "left", tmp_path / "recipe.yaml"
    recipe.write_text(text.format(left=left))
    with pytest.raises(UserError, match="recipe.yaml: not valid YAML: line 1: a tag, anchor or alias"):
        parse(["--recipe", str(recipe)])
    assert not left.exists()


def test_hub_revisions_are_handed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of policy, tokenizer and data; the hub is asked for exactly what the flags say."""
    asked: dict[str, Any] = {}

    def config_of(path: str, **options: Any) -> Any:
        asked["policy"] = (path, options["revision"])
        return transformers.LlamaConfig(vocab_size=1000, hidden_size=8, num_attention_heads=1, num_hidden_layers=1)

    def tokenizer_of(path: str, **options: Any) -> Any:
        asked["tokenizer"] = (path, options["revision"])
        return load.example.build_tokenizer()

    def data_of(path: str, **options: Any) -> Any:
        asked["data"] = (path, options["revision"])
        return datasets.Dataset.from_list(plain_rows(8))

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", config_of)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", tokenizer_of)
    monkeypatch.setattr(datasets, "load_dataset", data_of)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train"])
    monkeypatch.setattr(load, "snapshot_download", lambda path, revision, **_: asked.update(fetched=(path,
    revision)) or ".")
    argv = ["--model.policy", "a/b", "--model.revision", "r1", "--model.tokenizer", "c/d", "--model.tokenizer_revision",
            "r2", "--data.train", "e/f", "--data.revision", "r3", "--data.cache_dir", str(tmp_path),
            "--train.output_dir", str(tmp_path / "run"), "--prepare_only"]  # fmt: skip
    assert train_dpo.main(argv) == 0
    assert asked == {"policy": ("a/b", "r1"), "tokenizer": ("c/d", "r2"), "data": ("e/f", "r3"), "fetched": ("a/b",
    "r1")}


@pytest.mark.draws
def test_no_secret_of_the_environment_is_in_any_file_or_line_of_a_run(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    argv = arguments(tmp_path, tiny_policy, "--train.max_steps", "2", "--log.samples", "1", "--log.sample_tokens", "4")
    assert train_dpo.main(argv) == 0
    shown = capfd.readouterr()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any(path.name == "README.md" for path in files) and any(path.name == "config.yaml" for path in files)
    for secret in SECRETS.values():
        assert secret not in shown.out + shown.err
        assert not [path for path, content in files.items() if secret.encode() in content]


PATHS = ["file:///etc/passwd", "/etc/passwd", "../../etc/passwd", "~/.ssh/id_rsa", "https://localhost:1/x"]


def test_a_path_in_a_row_is_text(tmp_path: Path) -> None:
    rows = [{"prompt": path, "chosen": f"{path} a", "rejected": path, "file": path} for path in PATHS]
    file = written(tmp_path, rows)
    assert list(load_source(file)) == rows and list(stream_source(file)) == rows


def test_columns_that_would_open_the_paths_in_them_are_left_closed(tmp_path: Path) -> None:
    """`datasets` opens what an image column names: a local file, or an address."""
    (tmp_path / "secret.png").write_text("not to be read")
    image = {"path": str(tmp_path / "secret.png"), "bytes": None}
    features = datasets.Features(
        {"chosen": datasets.Value("string"), "one": datasets.Image(), "more": datasets.List(datasets.Image())}
    )
    schema = {"chosen": ["a"], "one": [image], "more": [[image]]}
    held = datasets.Dataset(pyarrow.table(schema, schema=features.arrow_schema))
    assert held.features == features
    with pytest.raises(Exception, match="cannot identify image file|install 'Pillow'"):
        held[0]
    held.save_to_disk(tmp_path / "saved")
    assert list(load_source(tmp_path / "saved", split=None)) == [{"chosen": "a"}]
    pyarrow.parquet.write_table(held.data.table, tmp_path / "x.parquet")
    expected = [{"chosen": "a", "one": image, "more": [image]}]
    assert [dict(row, one=dict(row["one"])) for row in load_source(tmp_path / "x.parquet")] == expected


def test_control_characters_of_answers_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dpo.runtime.console import console_on, say, show_table
    from dpo.runtime.tracking import Recorder

    text = "prompt: \x1b]0;title\x07\x1b[31mred\u202e\nnext \ud800 [bold]line[/bold] :smile:"
    Recorder(tmp_path, {}).say(text)
    say(console_on(sys.stderr), text)
    shown = capsys.readouterr().err
    assert re.sub("[ -~]", "", shown) == "\n\n\n\n"
    assert shown.count("\\x1b[31mred\\u202e\nnext \\ud800 [bold]line[/bold] :smile:") == 2
    text = "\x1b[31m\u202e\n[bold]:smile:[/bold]"
    show_table(console_on(sys.stderr), text, [[text, "1"]], [text, "b"])
    shown = capsys.readouterr().err
    assert shown.count("\\x1b[31m\\u202e\\n[bold]:smile:[/bold]") == 3 and "\x1b" not in shown
