"""LoRA: the base never changes and is the reference; only the adapter is kept, and peft and transformers read it."""

from __future__ import annotations

import gc
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

import dpo.__main__
import dpo.train
import train_dpo
from dpo.config import LoraConfig
from dpo.data.batch import collate
from dpo.estimate import FOUR_BITS, memory, traffic
from dpo.model import adapters, products
from dpo.model.forward import Scorer, own_logits_logps
from dpo.model.shape import adapter_parameters
from dpo.runtime.tracking import read_lines
from dpo.types import TokenizedPair
from tests import tiny
from tests.data.tiny_tokenizers import plain_rows, tokenizer_of, written
from tests.invariants.jobs import without_drawings

LORA = ["--model.lora.r", "4"]


def arguments(folder: Path, policy: object, *more: str) -> list[str]:
    """A run of 4 steps over 12 pairs at a rate that moves the log-probs, with a checkpoint every second."""
    rows = folder / "rows"
    if not rows.exists():
        rows.mkdir(parents=True)
        written(rows, plain_rows(12))
    return [
        "--config", "ds_configs/zero2.json", "--model.policy", str(policy), "--data.train", str(rows / "train.jsonl"),
        "--data.cache_dir", str(folder / "cache"), "--train.global_batch_size", "6", "--train.epochs", "2",
        "--train.save_every", "2", "--train.keep_checkpoints", "9", "--optim.lr", "1e-2", "--optim.warmup_steps", "0",
        "--optim.schedule", "constant", "--log.samples", "2", "--log.sample_tokens", "6",
        "--train.output_dir", str(folder / "run"), *more,
    ]  # fmt: skip


def live_parameters() -> int:
    """Elements of every parameter that is alive in this process, tied ones once."""
    gc.collect()
    # Not isinstance: asking lazy attributes of torch for their class warns.
    return sum({p.data_ptr(): p.numel() for p in gc.get_objects() if issubclass(type(p), torch.nn.Parameter)}.values())


def seen_run(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Train; what the models were at the start and are at the end."""
    seen: dict[str, Any] = {}
    original, before = dpo.train.start_models, live_parameters()

    def start(*args: Any) -> Any:
        policy, reference = original(*args)
        model = policy.scorer.model
        seen.update(policy=policy, reference=reference, model=model, parameters=live_parameters() - before)
        seen["start"] = {name: p.detach().clone() for name, p in model.named_parameters()}
        return policy, reference

    with monkeypatch.context() as patch:
        patch.setattr(dpo.train, "start_models", start)
        assert train_dpo.main(argv) == 0
    seen["lines"] = read_lines(Path(argv[argv.index("--train.output_dir") + 1]))
    return seen


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_lines(run) if "loss" in line]


def export(*argv: str) -> int:
    return dpo.__main__.main(["export", *argv])


@pytest.fixture(scope="module")
def lora(tiny_policy, tmp_path_factory) -> Any:
    """A LoRA run: its folder and what was seen of it."""
    folder = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as patch:
        without_drawings(patch.setattr)
        seen = seen_run(arguments(folder, tiny_policy, *LORA), patch)
    return folder, seen


def trained_names(seen: dict[str, Any]) -> set[str]:
    return {name for name in seen["start"] if ".lora_" in name}


# --- training --------------------------------------------------------------------------------------------------------


def test_the_base_is_bit_unchanged_and_every_adapter_matrix_moved(lora, tiny_policy):
    seen, stored = lora[1], load_file(tiny_policy / "model.safetensors")
    now = {name: p.detach() for name, p in seen["model"].named_parameters()}
    adapter = trained_names(seen)
    assert len(adapter) == 2 * 7 * 2  # A and B of seven matrices in two layers
    base = {name.replace(".base_layer", ""): value for name, value in now.items() if name not in adapter}
    assert base.keys() == stored.keys()
    assert all(torch.equal(base[name], stored[name]) for name in stored)
    assert not any(torch.equal(now[name], seen["start"][name]) for name in adapter)


def test_the_run_starts_at_ln_2_and_learns(lora):
    lines = [line for line in lora[1]["lines"] if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-6) and lines[0]["rewards/margins"] == 0
    assert lines[-1]["rewards/margins"] > 0.05


def test_the_reference_costs_no_parameter(lora):
    seen = lora[1]
    assert seen["reference"].scorer is seen["policy"].scorer
    own = sum(p.numel() for p in seen["model"].parameters())
    adapter = sum(seen["start"][name].numel() for name in trained_names(seen))
    # The engine's flat fp32 master copy is of the adapter alone.
    assert own <= seen["parameters"] <= own + adapter


def test_the_log_says_what_is_trained_and_what_the_reference_is(lora):
    notes = " ".join(lora[1]["policy"].notes)
    assert "reference: adapter, float32 (the frozen weights beneath the adapters: no second copy)" in notes
    assert "of them trained (LoRA)" in notes


@pytest.mark.parametrize(
    "flags",
    [["--reference.mode", "online"], ["--reference.mode", "cached"], ["--model.gradient_checkpointing", "true"]],
    ids=" ".join,
)
def test_every_kind_of_reference_and_recomputed_activations_give_the_same_losses(lora, flags, tiny_policy, tmp_path):
    argv = arguments(tmp_path, tiny_policy, *LORA, *flags)
    assert train_dpo.main(argv) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(lora[0] / "run"), abs=1e-6)


@pytest.mark.parametrize("flag", ["dora", "rslora"])
def test_the_variants_start_at_ln_2_and_are_what_peft_calls_them(lora, flag, tiny_policy, tmp_path):
    argv = arguments(tmp_path, tiny_policy, *LORA, f"--model.lora.{flag}", "true", "--model.lora.targets", "[q_proj]")
    assert train_dpo.main(argv) == 0
    found = losses(tmp_path / "run")
    assert found[0] == pytest.approx(0.693147, abs=1e-6) and found[1:] != losses(lora[0] / "run")[1:]
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "run" / "final"))
    assert getattr(config, f"use_{flag}") and config.target_modules == {"q_proj"} and config.lora_alpha == 8


def test_a_resumed_run_is_bit_equal(lora, tiny_policy, tmp_path):
    argv = arguments(tmp_path, tiny_policy, *LORA)
    assert train_dpo.main([*argv, "--train.max_steps", "2"]) == 0
    assert train_dpo.main(argv) == 0
    whole, again = lora[0] / "run", tmp_path / "run"
    assert losses(again) == losses(whole)
    old, new = (load_file(run / "final" / "adapter_model.safetensors") for run in (whole, again))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert (again / "samples.jsonl").read_text().splitlines()[-2:] == (
        (whole / "samples.jsonl").read_text().splitlines()[-2:]
    )


@pytest.mark.parametrize("tied", [False, True])  # a tied embedding has one name more
def test_checkpoints_hold_no_base_weights(tied, lora, tiny_policy, tmp_path, monkeypatch):
    folder, seen = lora
    if tied:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_policy)
        tokenizer.save_pretrained(tmp_path / "start")
        folder, start = tmp_path, tiny.saved(
            tmp_path / "start", "llama", vocab_size=len(tokenizer), tie_word_embeddings=True
        )
        seen = seen_run(arguments(folder, start, *LORA), monkeypatch)
    adapter = sum(seen["start"][name].numel() for name in trained_names(seen))
    stored = torch.load(folder / "run/checkpoints/step-000004/mp_rank_00_model_states.pt", weights_only=False)
    module = stored["module"]
    assert sum(value.numel() for value in module.values()) == adapter
    assert all(".lora_" in name for name in module)
    # fp32 weights, their master copy and two Adam states, and what pickle adds.
    size = sum(file.stat().st_size for file in (folder / "run/checkpoints/step-000004").iterdir())
    assert size < 16 * adapter + 300_000
    assert stored["frozen_param_fragments"] is None


def test_adapters_learn_beside_4_bit_weights_and_resume_bit_equal(tiny_policy, tmp_path, monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the 4-bit kernels are in bitsandbytes")
    argv = arguments(tmp_path, tiny_policy, *LORA, "--model.load_in_4bit", "true", "--log.samples", "0")
    seen = seen_run(argv, monkeypatch)
    layers = [m for m in seen["model"].modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14 and all(layer.weight.dtype == torch.uint8 for layer in layers)  # all but the head
    moved = {name for name, p in seen["model"].named_parameters() if not torch.equal(p, seen["start"][name])}
    assert moved == trained_names(seen)
    whole = [line["loss"] for line in seen["lines"] if "loss" in line]
    assert whole[0] == pytest.approx(0.693147, abs=1e-6) and whole[-1] < 0.5

    stored = torch.load(tmp_path / "run/checkpoints/step-000002/mp_rank_00_model_states.pt", weights_only=False)
    assert all(".lora_" in name for name in stored["module"])
    argv[argv.index(str(tmp_path / "run"))] = str(tmp_path / "again")
    assert train_dpo.main([*argv, "--train.max_steps", "2"]) == 0
    assert train_dpo.main(argv) == 0
    assert losses(tmp_path / "again") == whole


# --- final/ and export -----------------------------------------------------------------------------------------------


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        return model.eval()(ids).logits


def in_peft(base: Path, folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, str(folder))


def test_final_is_an_adapter_folder_that_peft_loads(lora, tiny_policy):
    folder, seen = lora
    final = folder / "run" / "final"
    model = in_peft(tiny_policy, final)
    with seen["policy"].scorer.own_attention():
        torch.testing.assert_close(logits(model), logits(seen["model"]), rtol=0, atol=1e-5)
    assert (logits(model) - logits(transformers.AutoModelForCausalLM.from_pretrained(tiny_policy))).abs().max() > 1e-2
    assert not (final / "config.json").exists()
    values = json.loads((final / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == str(tiny_policy.resolve()) and values["inference_mode"]
    assert transformers.AutoTokenizer.from_pretrained(final).get_vocab()
    front = yaml.safe_load((final / "README.md").read_text().split("---\n")[1])
    assert front["library_name"] == "peft"


def test_the_merged_export_is_a_plain_model_with_the_adapters_answers(lora, tiny_policy, tmp_path):
    run = lora[0] / "run"
    assert export(str(run), "--merge", "true", "--to", str(tmp_path / "merged")) == 0
    merged, start = load_file(tmp_path / "merged/model.safetensors"), load_file(tiny_policy / "model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in merged.items()} == {k: (v.shape, v.dtype) for k, v in start.items()}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(model), logits(in_peft(tiny_policy, run / "final")), rtol=0, atol=1e-5)
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names
    assert "adapter_config.json" not in names
    front = yaml.safe_load((tmp_path / "merged/README.md").read_text().split("---\n")[1])
    assert front["library_name"] == "transformers"
    assert "| merged | `a LoRA adapter, into the weights beneath it` |" in (tmp_path / "merged/README.md").read_text()


def test_the_last_checkpoint_exports_what_final_holds_and_an_earlier_one_something_else(lora, tmp_path):
    run = lora[0] / "run"
    final = load_file(run / "final" / "adapter_model.safetensors")
    for step, equal in ((4, True), (2, False)):
        assert export(str(run), "--checkpoint", str(step), "--to", str(tmp_path / str(step))) == 0
        found = load_file(tmp_path / str(step) / "adapter_model.safetensors")
        assert found.keys() == final.keys()
        assert all(torch.equal(found[name], final[name]) for name in final) is equal


def test_the_best_checkpoint_is_that_with_the_best_accuracy(lora, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(lora[0] / "run", run)
    assert export(str(run), "--checkpoint", "best") == 2
    assert f"--checkpoint best: no step of {run} was both evaluated and saved" in capsys.readouterr().err
    with open(run / "metrics.jsonl", "a") as metrics:
        for step, accuracy in ((0, 0.9), (2, 0.7), (4, 0.6)):
            line = {"step": step, "eval_rewards/accuracies": accuracy, "eval_loss": 1.0, "eval_rewards/margins": 0.0}
            metrics.write(json.dumps(line) + "\n")
    assert export(str(run), "--checkpoint", "best") == 0
    assert capsys.readouterr().out.split() == [str(run / "export-step-000002")]
    card = (run / "export-step-000002/README.md").read_text()
    assert "| accuracy | 0.9000 | 0.7000 |" in card and "0.6000" not in card  # of that step, not of the last
    assert "| checkpoint | `after 2 optimizer steps of" in card


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # GPT-2 ties its head and keeps its matrices transposed
def test_a_checkpoint_of_a_full_run_exports_what_final_holds(family, tmp_path, capsys):
    tokenizer = tokenizer_of("byte")
    tokenizer.save_pretrained(tmp_path / "start")
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "start")
    else:
        tiny.saved(tmp_path / "start", family, vocab_size=len(tokenizer))
    argv = arguments(tmp_path, tmp_path / "start")
    assert train_dpo.main(argv) == 0
    run = tmp_path / "run"
    assert export(str(run)) == 0
    assert export(str(run), "--checkpoint", "4") == 0
    assert capsys.readouterr().out.split() == [str(run / "export"), str(run / "export-step-000004")]
    final = load_file(run / "final/model.safetensors")
    for folder in (run / "export", run / "export-step-000004"):
        found = load_file(folder / "model.safetensors")
        assert found.keys() == load_file(tmp_path / "start/model.safetensors").keys()
        assert all(torch.equal(found[name], final[name]) for name in final)
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert export(str(run), "--dtype", "bf16", "--to", str(tmp_path / "rounded")) == 0
    rounded = load_file(tmp_path / "rounded/model.safetensors")
    assert rounded.keys() == final.keys() and all(torch.equal(rounded[k], final[k].bfloat16()) for k in final)
    assert json.loads((tmp_path / "rounded/config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "rounded/README.md").read_text() == (run / "final/README.md").read_text()


def test_an_adapter_is_merged_into_no_other_weights_than_those_it_was_trained_on(tiny_policy, tmp_path, capsys):
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny_policy, base)
    assert train_dpo.main(arguments(tmp_path, base, *LORA)) == 0
    assert export(str(run), "--merge", "true") == 0
    weights = load_file(base / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert export(str(run), "--merge", "true", "--to", str(tmp_path / "other")) == 2
    assert f"model.policy {base} has changed since {run} was trained on it" in capsys.readouterr().err
    assert export(str(run), "--to", str(tmp_path / "adapter")) == 0  # needs no base
    assert dpo.__main__.main(["sample", str(run), "--prompt", "x", "--max_tokens", "1"]) == 0
    assert f"weights of model.policy {base} of {run} have changed since it was begun" in " ".join(
        capsys.readouterr().out.split()
    )


def test_an_adapter_is_exported_in_another_dtype(lora, tmp_path):
    run = lora[0] / "run"
    assert export(str(run), "--dtype", "bf16", "--to", str(tmp_path / "rounded")) == 0
    final, rounded = (load_file(at / "adapter_model.safetensors") for at in (run / "final", tmp_path / "rounded"))
    assert rounded.keys() == final.keys() and all(torch.equal(rounded[k], final[k].bfloat16()) for k in final)
    assert (tmp_path / "rounded/adapter_config.json").read_text() == (run / "final/adapter_config.json").read_text()


def test_exports_that_cannot_be_are_refused(lora, tmp_path, capsys):
    run = lora[0] / "run"
    full = tmp_path / "full"
    full.mkdir()
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["model"].pop("lora")
    (full / "config.yaml").write_text(yaml.safe_dump(values))
    cases = {
        f"{tmp_path} is no run directory: it has no config.yaml": [str(tmp_path)],
        f"--checkpoint 3: {run} has no such checkpoint; it has 2, 4": [str(run), "--checkpoint", "3"],
        f"--to {run} exists already; name another folder, or remove it": [str(run), "--to", str(run)],
        f"--merge true: {full} trained all weights and has no adapter to merge": [str(full), "--merge", "true"],
        f"{full} has no final/ yet; name a checkpoint by --checkpoint STEP": [str(full)],
    }
    for line, argv in cases.items():
        assert export(*argv) == 2
        assert line in capsys.readouterr().err


# --- continuing an adapter, and SFT ----------------------------------------------------------------------------------


def test_a_continued_adapter_is_its_own_frozen_reference(lora, tiny_policy, tmp_path, monkeypatch):
    start = lora[0] / "run" / "final"
    seen = seen_run(arguments(tmp_path, start), monkeypatch)
    assert f"(a frozen copy of the adapter {start}, over the same weights)" in " ".join(seen["policy"].notes)
    first = next(line for line in seen["lines"] if "loss" in line)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6) and first["rewards/margins"] == 0
    stored = load_file(start / "adapter_model.safetensors")
    now = {name: p.detach() for name, p in seen["model"].named_parameters()}
    for name, value in stored.items():
        inner = name.removeprefix("base_model.model.").removesuffix(".weight")
        assert torch.equal(now[f"{inner}.reference.weight"], value), "the reference moved"
        assert not torch.equal(now[f"{inner}.default.weight"], value), "the policy did not learn"
    last = [line for line in seen["lines"] if "loss" in line][-1]
    assert last["rewards/margins"] > 0.01  # measured from a reference that stayed
    # First-step log-probs are those of the adapter, not of the base.
    other = next(line for line in lora[1]["lines"] if "loss" in line)
    assert abs(first["logps/chosen"] - other["logps/chosen"]) > 1e-3
    final = load_file(tmp_path / "run/final/adapter_model.safetensors")
    assert final.keys() == stored.keys()
    assert not any("reference" in name for name in final)


def test_the_reference_of_an_sft_adapter_multiplies_as_the_policy_does_where_products_are_in_fp32(
    tiny_policy, tmp_path, monkeypatch
):
    """Its adapter joins the model later than the policy's."""
    monkeypatch.setattr(products, "fp32_is_faster", lambda: True)
    flags = ["--train.sft_epochs", "1", "--optim.sft_lr", "1e-2", "--train.precision", "bf16"]
    seen = seen_run(arguments(tmp_path, tiny_policy, *LORA, *flags), monkeypatch)
    first = next(line for line in seen["lines"] if "loss" in line)
    assert first["rewards/margins"] == 0 and first["loss"] == pytest.approx(0.693147, abs=1e-6)
    modules = dict(seen["model"].named_modules())
    pairs = [(m, modules[name.replace(".default", ".reference")]) for name, m in modules.items() if ".default" in name]
    assert pairs and all(type(a) is type(b) for a, b in pairs)
    assert any(isinstance(m, products.WideConv1D | products.WideLinear) for m in modules.values())


def test_a_continued_adapter_resumes_bit_equal(lora, tmp_path):
    start = lora[0] / "run" / "final"
    runs = []
    for name, limits in (("whole", ["4"]), ("parts", ["2", "4"])):
        argv = arguments(tmp_path / name, start)
        for limit in limits:
            assert train_dpo.main([*argv, "--train.max_steps", limit]) == 0
        runs.append(tmp_path / name / "run")
    assert losses(runs[0]) == losses(runs[1])
    old, new = (load_file(run / "final/adapter_model.safetensors") for run in runs)
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_after_sft_the_reference_is_the_sft_adapter(tiny_policy, tmp_path, monkeypatch):
    argv = arguments(tmp_path, tiny_policy, *LORA, "--train.sft_epochs", "1", "--optim.sft_lr", "1e-2")
    seen = seen_run(argv, monkeypatch)
    folder = tmp_path / "run" / "reference"
    assert adapters.is_adapter(str(folder)) and not list(folder.glob("model*.safetensors"))
    first = next(line for line in seen["lines"] if "loss" in line)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6) and first["rewards/margins"] == 0
    with seen["policy"].scorer.own_attention(), seen["reference"].view():
        inside = logits(seen["model"])
    torch.testing.assert_close(inside, logits(in_peft(tiny_policy, folder)), rtol=0, atol=1e-5)
    assert (inside - logits(transformers.AutoModelForCausalLM.from_pretrained(tiny_policy))).abs().max() > 1e-2


# --- planning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_plan_counts_the_adapters_that_a_run_would_train(family, dora):
    lora, model = LoraConfig(r=4, dora=dora), tiny.model(family, dtype=torch.float32)
    counted = adapter_parameters(model.config, lora)
    adapters.add(model, lora, seed=0, base="")
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_frozen_weights_cost_their_own_bytes_alone(lora, tiny_policy, tmp_path, capsys):
    whole = memory(10**9, stage=2, world_size=1, half=True, reference_bytes=2)
    adapted = memory(10**9, stage=2, world_size=1, half=True, reference_bytes=0, trained=10**7)
    assert sum(whole.values()) * 2**30 == pytest.approx(20e9)
    assert sum(adapted.values()) * 2**30 == pytest.approx(2e9 + 16e7)
    sent = traffic(10**9, stage=2, world_size=2, micro_steps=1, width=2, reference_width=0, trained=10**7)
    assert sum(sent.values()) == pytest.approx(0.5 * (2 + 1) * 2 * 10**7)
    # python -m dpo plan of the same run, and of one that continues its adapter.
    for policy, flags in ((tiny_policy, LORA), (lora[0] / "run" / "final", [])):
        argv = arguments(tmp_path, policy, *flags)
        assert dpo.__main__.main(["plan", *argv, "--ranks", "1", "--gpu", "t4"]) == 0
        # 3,712 parameters: gradients of 4 and optimizer of 12 bytes each.
        shown = capsys.readouterr().out
        assert "14.50 KiB" in shown and "43.50 KiB" in shown


def test_a_plan_holds_frozen_linear_layers_in_the_bytes_that_4_bits_take(tiny_policy, tmp_path, capsys):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the 4-bit kernels are in bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(1024, 1024, bias=False, compress_statistics=True, quant_type="nf4").to("cpu")
    state = layer.weight.quant_state
    kept = (layer.weight.data, state.absmax, state.state2.absmax)
    assert sum(tensor.nbytes for tensor in kept) / 1024**2 == pytest.approx(FOUR_BITS, rel=1e-3)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_policy)
    linear = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "proj" in name)
    argv = arguments(tmp_path, tiny_policy, *LORA, "--model.load_in_4bit", "true")
    assert dpo.__main__.main(["plan", *argv, "--ranks", "1", "--gpu", "t4"]) == 0
    size = re.search(r"weights[^\d]*([\d.]+) KiB", capsys.readouterr().out)
    rest = model.num_parameters() + 3712 - linear
    assert size and float(size[1]) * 1024 == pytest.approx(2 * rest + FOUR_BITS * linear, abs=6)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--model.lora.r", "4", "--model.lora.dropout", "0.1"], "model.lora.dropout is 0.1; use 0"),
        (["--model.lora.r", "-1"], "model.lora.r is -1; use a rank such as 16, or 0 for no adapter"),
        (["--model.lora.r", "4", "--model.lora.alpha", "0"], "model.lora.alpha is 0.0; use a positive number"),
        (["--model.lora.dora", "true"], "model.lora.dora is set without a rank; set model.lora.r"),
        (["--reference.mode", "adapter"], "reference.mode is adapter and no adapters are trained; set model.lora.r"),
        ([*LORA, "--reference.dtype", "bf16"], "reference.dtype is bf16, but with adapters it is the policy's own"),
        ([*LORA, "--train.save_weights_only", "true"], "train.save_weights_only with adapters, whose checkpoints are"),
        ([*LORA, "--reference.sync_steps", "2"], "reference.sync_steps with adapters: a mean of two adapters' factors"),
        ([*LORA, "--model.lora.dora", "true", "--config", "ds_configs/zero3.json"], "DoRA under ZeRO-3"),
        (["--model.load_in_4bit", "true"], "model.load_in_4bit is true and no adapters are trained"),
        ([*LORA, "--model.load_in_4bit", "true", "--config", "ds_configs/zero3.json"], "cannot shard 4-bit weights"),
        ([*LORA, "--model.load_in_4bit", "true", "--reference.mode", "online"], "with reference.mode online, a second"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_before_anything_is_written(flags, line, tiny_policy, tmp_path, capsys):
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *flags)) == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("targets", "line"),
    [
        ("[q_proj, v_prj]", "model.lora.targets has v_prj: no layer is called so; the linear ones are down_proj, gate"),
        ("[lm_head]", "an adapter on the head"),
    ],
)
def test_targets_that_are_no_layers_or_the_head_are_refused(targets, line, tiny_policy, tmp_path, capsys):
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *LORA, "--model.lora.targets", targets)) == 2
    assert line in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch, tiny_policy, tmp_path, capsys):
    for module in ("dpo.run.checks", "dpo.model.adapters"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None)
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *LORA)) == 2
    assert "need peft; pip install peft" in capsys.readouterr().err
    from dpo.run import checks

    with pytest.raises(checks.UserError, match="which needs bitsandbytes; pip install bitsandbytes, or use adamw"):
        checks._needs_bitsandbytes("optim.name is adamw_8bit", "adamw", for_elsewhere=False)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"modules_to_save": ["lm_head"]}, "holds whole modules, biases or tokens beside LoRA"),
        ({"base_model_name_or_path": None}, "adapter_config.json names no base model"),
        ({"base_model_name_or_path": "/no/such"}, "its base /no/such is no folder; put it there, or change"),
        ({"peft_type": "IA3"}, "adapter of type IA3; only LORA can be trained"),
        ({"r": 2}, "does not fit its base"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be_continued_are_refused(change, line, lora, tmp_path, capsys):
    folder = tmp_path / "adapter"
    assert export(str(lora[0] / "run"), "--to", str(folder)) == 0
    values = json.loads((folder / "adapter_config.json").read_text()) | change
    (folder / "adapter_config.json").write_text(json.dumps(values))
    assert train_dpo.main(arguments(tmp_path, folder)) == 2
    assert line in capsys.readouterr().err


def test_an_adapter_takes_no_second_one(lora, tmp_path, capsys):
    assert train_dpo.main(arguments(tmp_path, lora[0] / "run" / "final", *LORA)) == 2
    assert "is an adapter already; leave model.lora out to train it on" in capsys.readouterr().err


# --- another model as reference --------------------------------------------------------------------------------------


def other_model(folder: Path, tokenizer_kind: str = "byte", family: str = "qwen2", **changes: Any) -> Path:
    """Another architecture with other weights."""
    tokenizer = tokenizer_of(tokenizer_kind)
    tokenizer.save_pretrained(folder)
    return tiny.saved(folder, family, seed=5, vocab_size=len(tokenizer), **changes)


@pytest.mark.parametrize(
    "flags",
    [[], ["--reference.mode", "cached"], LORA, ["--config", "ds_configs/zero3.json"]],
    ids=["online", "cached", "lora", "zero3"],
)
def test_another_model_as_reference_scores_with_its_own_weights(flags, tiny_policy, tmp_path, monkeypatch, capsys):
    other = other_model(tmp_path / "other")
    argv = arguments(tmp_path, tiny_policy, "--reference.path", str(other), "--train.max_steps", "1", *flags)
    seen = seen_run(argv, monkeypatch)
    pairs = [TokenizedPair(i, *ids) for i, ids in enumerate(token_ids(plain_rows(12)))]
    found = seen["reference"].of_training(collate(pairs[:4], seen["policy"].layout))
    model = transformers.AutoModelForCausalLM.from_pretrained(other).eval()
    truth = torch.stack([own_logits_logps(Scorer(model), pair, torch.device("cpu")) for pair in pairs[:4]])
    torch.testing.assert_close(found.chosen, truth[:, 0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.rejected, truth[:, 1], rtol=1e-5, atol=1e-4)
    first = next(line["loss"] for line in seen["lines"] if "loss" in line)
    assert abs(first - 0.693147) > 0.01  # shown, and nobody stops the run
    assert "policy and reference differ by" in capsys.readouterr().err


def token_ids(rows: list[dict[str, str]]) -> list[tuple[Any, Any, Any]]:
    """Prompt, chosen and rejected ids as a run makes them of plain text."""
    tokenizer = tokenizer_of("byte")
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)

    def ids(text: str) -> Any:
        return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    return [
        (ids(row["prompt"]), *(np.concatenate([ids(row[side]), end]) for side in ("chosen", "rejected")))
        for row in rows
    ]


def test_references_that_cannot_read_the_policys_tokens_are_refused(tiny_policy, tmp_path, capsys):
    cases = {
        "has another tokenizer than the policy": other_model(tmp_path / "tokens", "pieces"),
        "reads 64 tokens, pairs have up to 128; lower data.max_length": other_model(
            tmp_path / "short", max_position_embeddings=64, family="llama"
        ),
    }
    for line, folder in cases.items():
        assert train_dpo.main(arguments(tmp_path, tiny_policy, "--reference.path", str(folder))) == 2
        assert line in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--reference.path", "x", "--reference.mode", "adapter"], "reference.path is x with reference.mode adapter"),
        (["--reference.path", "x", "--loss.name", "simpo"], "reference.path is set with loss.name simpo, which needs"),
        (["--reference.sync_steps", "2", "--reference.path", "x"], "only the policy's own start can follow it"),
        (["--reference.sync_steps", "2", "--reference.mode", "cached"], "whose reference cannot move; use online"),
        (["--reference.sync_steps", "0"], "reference.sync_steps is 0; use a whole number of at least 1"),
        (["--reference.sync_alpha", "1.5"], "reference.sync_alpha is 1.5; use a number in (0, 1]"),
    ],
)
def test_references_that_cannot_be_are_refused(flags, line, tiny_policy, tmp_path, capsys):
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *flags)) == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
