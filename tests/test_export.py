"""final/: the starting folder with other numbers in it, and the model that was sampled from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors import safe_open

import train_dpo
from dpo.model import load
from tests import tiny
from tests.data.tiny_tokenizers import CHATML, chat, plain_rows, tokenizer_of, written
from tests.invariants.jobs import without_drawings

SAMPLES = 3
# Small weights stay whole under ZeRO-3 unless these are 0, and then nothing would have to be gathered.
ALWAYS = ("stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
SHARDED = {"stage": 3} | dict.fromkeys(ALWAYS, 0)


def start_folder(folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random model with a tokenizer that has a chat template, and generation settings of its own."""
    tokenizer = tokenizer_of("byte", eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    model = tiny.model(family, dtype=torch.float32, vocab_size=len(tokenizer), **changes).to(dtype)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, max_new_tokens=77, repetition_penalty=1.0
    )
    model.save_pretrained(folder)
    return folder


def trained(start: Path, run: Path, data: Path, *flags: str) -> Path:
    """Two steps at a rate that changes the answers."""
    argv = ["--model.policy", str(start), "--data.train", str(data), "--data.cache_dir", str(run.parent / "cache")]
    argv += ["--train.output_dir", str(run), "--train.global_batch_size", "4", "--train.max_steps", "2"]
    argv += ["--optim.lr", "1e-2", "--optim.schedule", "constant", "--optim.warmup_steps", "0"]
    argv += ["--log.samples", str(SAMPLES), "--log.sample_tokens", "12", *flags]
    assert train_dpo.main(argv) == 0
    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories by name; each lies beside the folder it started from."""
    conversations = [
        {"chosen": chat(f"Say {i}", f"{i}" * 3), "rejected": chat(f"Say {i}", "no")} for i in range(1, 9)
    ]
    starts: dict[str, tuple[str, dict[str, Any], list[str]]] = {
        "llama": ("llama", {}, []),
        "tied": ("llama", {"tie_word_embeddings": True}, []),
        "sharded": ("mistral", {"tie_word_embeddings": True}, ["--config", "zero3.json"]),
        "bf16": ("llama", {"dtype": torch.bfloat16}, ["--train.precision", "fp32"]),
        "fp16": ("llama", {}, ["--train.export_dtype", "fp16"]),
    }
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        without_drawings(patch.setattr)
        for name, (family, changes, flags) in starts.items():
            folder = tmp_path_factory.mktemp(name)
            (folder / "zero3.json").write_text(json.dumps({"zero_optimization": SHARDED}))
            flags = [str(folder / flag) if flag.endswith(".json") else flag for flag in flags]
            start = start_folder(folder / "start", family, **changes)
            made[name] = trained(start, folder / "run", written(folder, conversations), *flags)
    return made


NAMES = ["llama", "tied", "sharded", "bf16", "fp16"]


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_those_of_the_starting_folder_and_every_matrix_moved(
    name: str, runs: dict[str, Path]
) -> None:
    start, final = weights(runs[name].parent / "start"), weights(runs[name] / "final")
    assert {key: value.shape for key, value in final.items()} == {key: value.shape for key, value in start.items()}
    for key, value in final.items():
        assert not torch.equal(value, start[key].to(value.dtype)), key


@pytest.mark.parametrize("name", NAMES)
def test_the_config_is_that_of_the_starting_folder_but_for_the_dtype(name: str, runs: dict[str, Path]) -> None:
    start, final = config_of(runs[name].parent / "start"), config_of(runs[name] / "final")
    start.pop("dtype"), final.pop("dtype")
    assert final == start
    read = [json.loads((folder / "generation_config.json").read_text()) for folder in
            (runs[name].parent / "start", runs[name] / "final")]  # fmt: skip
    assert read[0] == read[1] and read[1]["max_new_tokens"] == 77


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", "float32"), ("bf16", "bfloat16"), ("fp16", "float16"), ("sharded", "float32")]
)
def test_the_dtype_is_that_of_the_start_unless_export_dtype_says_otherwise(
    name: str, dtype: str, runs: dict[str, Path]
) -> None:
    assert {value.dtype for value in weights(runs[name] / "final").values()} == {getattr(torch, dtype)}
    assert config_of(runs[name] / "final")["dtype"] == dtype
    loaded = transformers.AutoModelForCausalLM.from_pretrained(runs[name] / "final", dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("name", ["tied", "sharded"])
def test_tied_weights_stay_tied(name: str, runs: dict[str, Path]) -> None:
    assert "lm_head.weight" not in weights(runs[name] / "final")
    model = transformers.AutoModelForCausalLM.from_pretrained(runs[name] / "final")
    assert model.config.tie_word_embeddings
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    apart = weights(runs["llama"] / "final")
    assert not torch.equal(apart["model.embed_tokens.weight"], apart["lm_head.weight"])


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_template_and_card_are_there(name: str, runs: dict[str, Path]) -> None:
    final = runs[name] / "final"
    old, new = (transformers.AutoTokenizer.from_pretrained(at) for at in (runs[name].parent / "start", final))
    assert new.get_vocab() == old.get_vocab() and new.eos_token == "<|im_end|>"
    assert new.chat_template == CHATML
    shown = new.apply_chat_template(chat("Hi"), tokenize=False, add_generation_prompt=True)
    assert str(shown).endswith("assistant\n")
    card = (final / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"
    assert not [file.name for file in final.iterdir() if file.name.startswith(".") or file.suffix == ".new"]


# Half precision rounds what the engine held in fp32, so its answers may differ.
@pytest.mark.parametrize("name", ["llama", "tied", "sharded"])
def test_greedy_answers_of_the_reloaded_folder_are_those_of_the_run(name: str, runs: dict[str, Path]) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(runs[name] / "final")
    tokenizer = transformers.AutoTokenizer.from_pretrained(runs[name] / "final")
    rows = [json.loads(line) for line in (runs[name] / "samples.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"] == 2]
    assert len(rows) == SAMPLES
    for row in rows:
        ids = tokenizer(row["prompt"], add_special_tokens=False, return_tensors="pt")
        made = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        answer = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == row["policy"]
    assert any(row["policy"] != row["reference"] for row in rows), "training changed no answer: nothing was compared"


def test_a_chat_template_given_to_the_run_is_exported(tmp_path: Path) -> None:
    start = start_folder(tmp_path / "start", "llama")
    (start / "chat_template.jinja").unlink()
    (tmp_path / "mine.jinja").write_text(CHATML)
    rows = [{"chosen": chat(f"Say {i}", "yes"), "rejected": chat(f"Say {i}", "no")} for i in range(8)]
    flags = ["--model.chat_template", str(tmp_path / "mine.jinja"), "--log.samples", "0"]
    run = trained(start, tmp_path / "run", written(tmp_path, rows), *flags)
    assert transformers.AutoTokenizer.from_pretrained(run / "final").chat_template == CHATML


def test_a_real_folder_comes_back_with_its_names_and_files(shared_data: Path, tmp_path: Path) -> None:
    start = shared_data / "stories260k-llama"
    run = trained(start, tmp_path / "run", written(tmp_path, plain_rows(8)))
    old, new = weights(start), weights(run / "final")
    assert {k: (v.shape, v.dtype) for k, v in new.items()} == {k: (v.shape, v.dtype) for k, v in old.items()}
    made = {file.name for file in (run / "final").iterdir()}
    kept = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert made - {"chat_template.jinja"} == kept | {"README.md"}
    text = "Once upon a time, there was a little"
    before, after = (transformers.AutoTokenizer.from_pretrained(at)(text)["input_ids"] for at in (start, run / "final"))
    assert before == after


def test_who_generates_from_an_exported_folder_stops_where_training_has_ended_answers(tmp_path):
    """The settings of a base model often know its EOS alone, not what the chat template ends a turn with."""
    tokenizer = tokenizer_of("byte")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    model = tiny.model("llama", dtype=torch.float32, vocab_size=len(tokenizer))
    model.generation_config = transformers.GenerationConfig(eos_token_id=3, temperature=0.6, do_sample=True)
    load.save_folder(model, model.state_dict(), torch.float32, tokenizer, tmp_path)
    found = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert found.eos_token_id == [3, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert found.temperature == 0.6 and model.generation_config.eos_token_id == 3
