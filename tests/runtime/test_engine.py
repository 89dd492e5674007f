"""The DeepSpeed JSON and the recipe: who owns which number, and what DeepSpeed is given."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dpo.config import OptimConfig
from dpo.errors import UserError
from dpo.runtime import distributed, engine, weights
from dpo.runtime.deepspeed_json import read_json
from dpo.runtime.engine import build_config, zero_stage

# As the documentation of transformers prints them, offloading included.
HF_COMMON: dict[str, Any] = {
    "fp16": {
        "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}  # fmt: skip
OFFLOAD = {"device": "cpu", "pin_memory": True}
HF_ZERO2 = HF_COMMON | {
    "zero_optimization": {
        "stage": 2, "offload_optimizer": OFFLOAD, "allgather_partitions": True, "allgather_bucket_size": 5e8,
        "overlap_comm": True, "reduce_scatter": True, "reduce_bucket_size": 5e8, "contiguous_gradients": True,
    },
}  # fmt: skip
HF_ZERO3 = HF_COMMON | {
    "zero_optimization": {
        "stage": 3, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD, "overlap_comm": True,
        "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}  # fmt: skip
OURS = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))


def built(json_config: dict[str, Any], precision: str = "fp32", **optim: Any) -> dict[str, Any]:
    return build_config(
        json_config, optim=OptimConfig(**optim), precision=precision, global_batch_size=8, name="ds.json"
    )


def refusal(json_config: dict[str, Any], precision: str = "fp32") -> str:
    with pytest.raises(UserError) as error:
        built(json_config, precision)
    message = str(error.value)
    assert message.startswith("ds.json: ") and "\n" not in message
    return message.removeprefix("ds.json: ")


def holds_auto(value: Any) -> bool:
    return any(map(holds_auto, value.values())) if isinstance(value, dict) else value == "auto"


# --- one owner -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [HF_ZERO2, HF_ZERO3, {"zero_optimization": {"stage": 1}, "bf16": "auto",
"fp16": "auto"}])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_auto_anywhere_means_that_the_recipe_decides(given: dict[str, Any], precision: str) -> None:
    before = copy.deepcopy(given)
    config = built(given, precision, max_grad_norm=0.25)
    assert given == before, "the caller's JSON was changed"
    assert not holds_auto(config)
    assert config["gradient_clipping"] == 0.25
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (1, 1)
    assert [config.get(name, {}).get("enabled", False) for name in ("fp16", "bf16")] == [
        precision == "fp16", precision == "bf16",
    ]  # fmt: skip
    assert not {"optimizer", "scheduler", "train_batch_size"} & config.keys()


def test_what_the_recipe_does_not_own_reaches_deepspeed() -> None:
    config = built(HF_ZERO3, "fp16")
    assert config["zero_optimization"] == {
        key: value for key, value in HF_ZERO3["zero_optimization"].items() if value != "auto"
    }
    assert config["fp16"] == HF_COMMON["fp16"] | {"enabled": True}
    assert config["wall_clock_breakdown"] is False
    assert zero_stage(config) == 3 and zero_stage(built({})) == 0


def test_half_precision_accumulates_gradients_in_fp32_unless_the_json_says_otherwise() -> None:
    assert built(read_json(None), "bf16")["data_types"] == {"grad_accum_dtype": "fp32"}
    assert built({"data_types": {"grad_accum_dtype": "bf16"}}, "bf16")["data_types"] == {"grad_accum_dtype": "bf16"}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_adamw_has_the_constants_of_the_recipe(stage: int) -> None:
    distributed.start()
    wanted = OptimConfig(betas=(0.7, 0.95), eps=1e-3, weight_decay=0.25, lr=0.5)
    trained = engine.start_training(nn.Linear(2, 2), built({"zero_optimization": {"stage": stage}}, "fp32"), wanted)
    inner = getattr(trained.optimizer, "optimizer", trained.optimizer)
    assert {(group["betas"], group["eps"]) for group in inner.param_groups} == {((0.7, 0.95), 1e-3)}
    assert sorted(group["weight_decay"] for group in inner.param_groups) == [0.0, 0.25]
    engine.stop(trained)


def test_stage_0_is_refused_where_deepspeed_would_refuse_it_at_the_start() -> None:
    message = refusal({}, "bf16")
    assert message.startswith("zero_optimization.stage is 0 or missing, and bf16 gradients")
    assert "use 1, 2 or 3" in message
    assert "fp16 gradients cannot be scaled as the loss was" in refusal(
        {"data_types": {"grad_accum_dtype": "fp16"}}, "fp16"
    )
    distributed.start()
    engine.start_training(nn.Linear(2, 2), built({}, "fp32"), OptimConfig())
    config = built({"data_types": {"grad_accum_dtype": "bf16"}}, "bf16")
    with pytest.raises(NotImplementedError, match="unsupported mix"):
        mixed = config | {"data_types": {"grad_accum_dtype": "fp32"}}
        engine.start_training(nn.Linear(2, 2).bfloat16(), mixed, OptimConfig())


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"zero_optimisation": {}}, "unknown key zero_optimisation; did you mean zero_optimization?"),
        ({"xyz": 1}, "unknown key xyz; remove it; known here are zero_optimization, "),
        ({"tensorboard": {}}, "tensorboard has no effect here; remove it and use log.backends"),
        ({"steps_per_print": True}, "steps_per_print is true; it must be a whole number"),
        ({"gradient_predivide_factor": "1"}, 'gradient_predivide_factor is "1"; it must be a number'),
        ({"communication_data_type": "fp8"}, "DeepSpeed refuses it: Invalid communication_data_type"),
        ({"data_types": {"grad_accum_dtype": "half"}},
        'data_types.grad_accum_dtype is "half"; use fp16 or bf16 or fp32'),
        ({"fp16": {"loss_scale": "x"}}, 'fp16.loss_scale is "x": '),
        ({"zero_optimization": {"stage": 2, "allgather_bucket_size": 3}},
        "zero_optimization.allgather_bucket_size is 3"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "zero_optimization.offload_param is on nvme without a path; name a folder by nvme_path",
        ),
    ],
)
def test_a_key_or_value_that_deepspeed_would_pass_over_or_die_of_is_named(given: dict[str, Any], found: str) -> None:
    assert refusal(given).startswith(found)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2, "stage": 3}}')
    with pytest.raises(UserError, match="'stage' is given twice; fix it"):
        read_json(str(tmp_path / "ds.json"))


def test_the_same_number_twice_is_fine() -> None:
    built({"train_batch_size": 8, "gradient_clipping": 1.0})
    for precision in ("fp16", "bf16", "fp32"):
        built(read_json(None) | {"fp16": {"enabled": precision == "fp16"}, "bf16": {"enabled": precision == "bf16"}},
        precision)
    built({"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR", "params": {}}})


@pytest.mark.parametrize(
    ("given", "found", "owner"),
    [
        ({"train_batch_size": 16}, "train_batch_size is 16", "train.global_batch_size"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5", "optim.max_grad_norm"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4", "train.micro_batch_size"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2", "train.global_batch_size"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true", "train.precision is fp32"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true", "train.precision is fp32"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}, "optimizer.params is set", "the optim section"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type is Lamb", "the optim section"),
        ({"scheduler": {"params": {"warmup_num_steps": 9}}}, "scheduler.params is set", "the optim section"),
    ],
)
def test_another_value_of_an_owned_number_is_refused_and_names_its_owner(
    given: dict[str, Any], found: str, owner: str
) -> None:
    message = refusal(given)
    assert message.startswith(found) and owner in message
    assert 'write "auto"' in message or "leave it out" in message


def test_switching_off_the_recipes_precision_is_refused() -> None:
    assert refusal({"bf16": {"enabled": False}}, "bf16").startswith("bf16.enabled is false but train.precision is bf16")


# --- what is wrong with the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["zero_optimization", "fp16", "bf16", "data_types", "optimizer", "scheduler"])
@pytest.mark.parametrize("value", [True, "adam", 2, [1], None])
def test_a_section_that_is_no_object_is_refused(key: str, value: Any) -> None:
    assert refusal({key: value}) == f"{key} is {json.dumps(value)}; it must be an object, or leave it out"


@pytest.mark.parametrize("stage", [4, -1, "2", None, [2], 1.5])
def test_an_unknown_stage_is_refused(stage: Any) -> None:
    message = refusal({"zero_optimization": {"stage": stage}})
    assert message == f"zero_optimization.stage is {json.dumps(stage)}; use 1, 2 or 3"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"stagee": 2}, "zero_optimization.stagee is 2: "),
        ({"stage": 2, "overlap_comm": "perhaps"}, 'zero_optimization.overlap_comm is "perhaps": '),
        ({"stage": 3, "offload_optimizer": "cpu"}, 'zero_optimization.offload_optimizer is "cpu": '),
        ({"stage": 3, "offload_param": {"device": "gpu"}}, 'zero_optimization.offload_param.device is "gpu": '),
    ],
)
def test_what_deepspeed_would_stumble_over_is_named(given: dict[str, Any], found: str) -> None:
    assert refusal({"zero_optimization": given}).startswith(found)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"zero_optimization": {"stage": 2,}}', "not valid JSON: "),
        (b"", "not valid JSON: "),
        (b"\xff\xfe{}", "not valid JSON: "),
        (b"[]", "expected a JSON object, got list"),
        (b'"auto"', "expected a JSON object, got str"),
    ],
)
def test_a_file_that_is_no_json_object_is_one_line(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "ds.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(str(tmp_path / "ds.json"))
    assert str(error.value).startswith(f"--config {tmp_path}/ds.json: {found}") and "\n" not in str(error.value)


def test_a_missing_file_says_where_such_files_are(tmp_path: Path) -> None:
    for path in (str(tmp_path / "none.json"), str(tmp_path)):
        with pytest.raises(UserError, match="no such file; the ones that come with the project are in ds_configs/"):
            read_json(path)


def test_without_a_file_the_stage_is_2() -> None:
    assert zero_stage(built(read_json(None))) == 2


@pytest.mark.parametrize("file", OURS, ids=lambda file: file.name)
def test_our_own_files_hold_memory_and_communication_alone(file: Path) -> None:
    content = read_json(str(file))
    stage = int(file.stem.removesuffix("_offload")[-1])
    assert content.keys() == {"zero_optimization"} and zero_stage(built(content)) == stage
    assert ("offload_optimizer" in content["zero_optimization"]) is file.stem.endswith("_offload")


# --- and it runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [HF_ZERO2, HF_ZERO3], ids=["ZeRO-2", "ZeRO-3"])
def test_the_json_of_the_transformers_documentation_takes_the_step_of_plain_adamw(
    given: dict[str, Any],
) -> None:
    distributed.start()
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    plain = copy.deepcopy(module)
    inputs, optim = torch.randn(5, 3), OptimConfig(max_grad_norm=0.5, weight_decay=0.1)
    config = build_config(given, optim=optim, precision="fp32", global_batch_size=8)
    started = engine.start_training(module, config, optim)
    assert started.zero_optimization_stage() == given["zero_optimization"]["stage"]
    engine.backward(started, started(inputs).square().sum(), is_last=False)
    engine.backward(started, started(inputs).sum(), is_last=True)
    norm, outcome = engine.step(started, lr=0.01)

    (plain(inputs).square().sum() + plain(inputs).sum()).backward()
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    groups = [{"params": [plain.weight], "weight_decay": 0.1}, {"params": [plain.bias], "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=0.01).step()
    assert norm == pytest.approx(float(expected), rel=1e-5) and outcome == "applied"
    state = weights.full_state(module, torch.float32, keep=True)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-7)
    assert weights.full_state(module, torch.float32, keep=False) == {}
    started.destroy()


def test_the_ranks_of_a_node_share_the_cpus_that_the_job_was_given(monkeypatch):
    threads: list[int] = []
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    distributed.start()
    assert threads == [3]
