"""A checkpoint of another ZeRO stage, put together and loaded: the same weights, moments and next step."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dpo.config import OptimConfig
from dpo.errors import UserError
from dpo.runtime import checkpoint, distributed, engine, universal, weights
from dpo.runtime.engine import deepspeed
from dpo.types import TrainState

WORLD = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
OPTIM = OptimConfig(lr=0.1, weight_decay=0.3, warmup_steps=0)


class Net(nn.Module):
    """Odd sizes, matrices with weight decay and vectors without, a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.frozen = nn.Linear(5, 5, bias=False).requires_grad_(False)
        self.inner = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.last = nn.Linear(7, 3, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.inner(self.frozen(rows)))).square().sum()


def started(stage: int, precision: str = "fp32") -> Any:
    distributed.start()
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    config = engine.build_config({"zero_optimization": zero}, optim=OPTIM, precision=precision, global_batch_size=4)
    return engine.start_training(Net().to(engine.DTYPES[precision]), config, OPTIM)


def step(trained: Any, seed: int) -> float:
    rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)).to(next(trained.module.parameters()).dtype)
    loss = trained(rows)
    engine.backward(trained, loss, True)
    engine.step(trained, 0.1)
    return float(loss.detach())


def held(trained: Any) -> dict[str, torch.Tensor]:
    """Weights and moments of every trained parameter, and the steps of every group."""
    found = {}
    optimizer = trained.optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False  # DeepSpeed 0.19 links the first group's alone
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in trained.module.named_parameters():
        if parameter.requires_grad:
            found[name] = deepspeed.utils.safe_get_full_fp32_param(parameter).clone()
            for key in universal.MOMENTS:
                found[f"{name} {key}"] = deepspeed.utils.safe_get_full_optimizer_state(parameter, key).clone()
    states = list(trained.optimizer.optimizer.state.values())
    assert len({state["step"].data_ptr() for state in states}) == len(states) == 2, "groups share one step counter"
    return found | {f"step {index}": state["step"].clone() for index, state in enumerate(states)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], tuple[Path, Any, Any]]:
    """(stage, precision) -> checkpoint after two steps, what it holds, what a third step makes of it."""
    found = {}
    for stage, precision in ((1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")):
        trained = started(stage, precision)
        step(trained, 1), step(trained, 2)
        run = tmp_path_factory.mktemp("run")
        folder = checkpoint.save(trained, run, TrainState(2, 20), WORLD, keep=1, precision="bf16")
        before = held(trained)
        loss = step(trained, 3)
        found[stage, precision] = folder, before, held(trained) | {"loss": torch.tensor(loss)}
        engine.stop(trained)
    return found


@pytest.mark.parametrize(
    ("old", "new", "precision"),
    [(1, 2, "fp32"), (1, 3, "fp32"), (2, 1, "fp32"), (2, 3, "fp32"), (3, 1, "fp32"), (3, 2, "fp32"),
     (1, 3, "bf16"), (3, 1, "bf16")],
)  # fmt: skip
def test_another_zero_stage_takes_up_weights_moments_and_steps_and_goes_on_the_same(written, old, new, precision):
    folder, before, after = written[old, precision]
    trained = started(new, precision)
    (_, notes) = checkpoint.newest(
        folder.parent.parent, "auto", WORLD, stage=new, precision="bf16", total_steps=9
    )
    change = f"by 1 ranks under ZeRO-{old}; it is converted to 1 under ZeRO-{new}"
    assert notes == [f"checkpoint {folder} was written {change}"]
    assert checkpoint.load(trained, folder, WORLD) == TrainState(2, 20)
    assert [p.name for p in folder.parent.iterdir() if p.is_dir()] == ["step-000002"], "the converted copy was left"
    now = held(trained)
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in now)
    loss = step(trained, 3)
    now = held(trained) | {"loss": torch.tensor(loss)}
    for name in now:
        torch.testing.assert_close(now[name], after[name], rtol=1e-6, atol=1e-7)
    engine.stop(trained)


@pytest.mark.parametrize("which", [(1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")], ids=str)
def test_the_trained_weights_of_every_stage_are_read_without_an_engine(written, which):
    folder, before, _ = written[which]
    weight_of = universal.trained_weights(folder)
    names = [name for name in before if " " not in name]
    assert len(names) == 5 and all(torch.equal(weight_of(name), before[name]) for name in names)


def test_the_trained_weights_of_a_run_without_zero_are_read_without_an_engine(tmp_path):
    trained = started(0)
    step(trained, 1)
    folder = checkpoint.save(trained, tmp_path, TrainState(1, 1), WORLD, keep=1, precision="fp32")
    weight_of = universal.trained_weights(folder)
    for name, parameter in trained.module.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(weight_of(name), parameter)
    engine.stop(trained)
    for file in folder.glob("*.pt"):
        file.unlink()
    with pytest.raises(UserError, match=f"checkpoint {folder} cannot be read: .*No such file"):
        universal.trained_weights(folder)


class Evil:
    """What runs a command when a pickle of it is read by a reader that trusts it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("kind", ["model", "optim"])
@pytest.mark.parametrize("way", ["loaded", "converted", "exported"])
def test_a_checkpoint_with_code_in_a_pickle_is_refused_and_the_code_does_not_run(written, tmp_path, kind, way):
    folder, trace = tmp_path / "run/checkpoints/step-000002", tmp_path / "trace"
    shutil.copytree(written[2, "fp32"][0], folder)
    (file,) = folder.glob(f"*_{kind}_states.pt")
    content = torch.load(file, weights_only=False)
    torch.save(content | {"extra": Evil(trace)}, file)
    trained = started(1 if way == "converted" else 2)
    with pytest.raises(UserError, match=f"checkpoint {folder} holds more than tensors and is not loaded, it could run"):
        universal.trained_weights(folder) if way == "exported" else checkpoint.load(trained, folder, WORLD)
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.exists(), "the pickle is harmless: this test shows nothing"
    engine.stop(trained)


def test_reading_without_code_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (tmp_path / "evil").write_bytes(pickle.dumps(Evil(tmp_path / "trace"), protocol=2))
    with pytest.raises(UserError, match="holds more than tensors"), weights.without_code(tmp_path):
        torch.load(tmp_path / "evil", weights_only=False)
    assert not (tmp_path / "trace").exists()
    assert weights.os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in weights.os.environ


def test_what_cannot_be_converted_is_refused_by_name(written, tmp_path, monkeypatch):
    folder = tmp_path / "step-000002"
    shutil.copytree(written[2, "fp32"][0], folder)
    with pytest.raises(UserError, match="lacks files of 2 ranks; delete it"):
        universal.convert(folder, tmp_path / "out", 2, 2)
    with monkeypatch.context() as patch:
        patch.setattr(universal.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
        with pytest.raises(UserError, match="to convert it takes 0.000 GiB, removed after loading, and 0.000 GiB a"):
            universal.convert(folder, tmp_path / "out", 1, 2)
    (file,) = folder.glob("*_optim_states.pt")
    content = torch.load(file, weights_only=False)
    state = content["optimizer_state_dict"]["base_optimizer_state"]["state"]
    state[0]["state1"] = state[0].pop("exp_avg")
    torch.save(content, file)
    with pytest.raises(UserError, match="holds exp_avg_sq, state1, step of its optimizer, not exp_avg and exp_avg_sq"):
        universal.convert(folder, tmp_path / "out", 1, 2)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_the_sft_stage_is_converted_as_well(written, tmp_path):
    folder = tmp_path / "checkpoints/sft-000002"
    shutil.copytree(written[3, "fp32"][0], folder)
    trained = started(2)
    found, notes = checkpoint.newest(
        tmp_path, "auto", WORLD, stage=2, precision="bf16", total_steps=2, kind="sft"
    )
    assert found == folder and len(notes) == 1
    assert checkpoint.load(trained, folder, WORLD) == TrainState(2, 20)
    now, before = held(trained), written[3, "fp32"][1]
    assert all(torch.equal(now[name], before[name]) for name in before)
    engine.stop(trained)
