"""The norm that the host reads with the step's flags: DeepSpeed takes it, and steps as it would have alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dpo.config import OptimConfig
from dpo.runtime import distributed, engine, weights
from dpo.runtime.engine import build_config

OWN = [(0, "fp32"), (1, "bf16")]
"""Where DeepSpeed finds the norm itself."""
STAGES = [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]


def started(stage: int, precision: str, **zero: Any) -> tuple[Any, torch.Tensor]:
    """An engine after its first backward pass, whose gradient is clipped, and its inputs."""
    distributed.start()
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optim = OptimConfig(max_grad_norm=0.5, weight_decay=0.1)
    given = {"zero_optimization": {"stage": stage} | zero}
    config = build_config(given, optim=optim, precision=precision, global_batch_size=8)
    trained = engine.start_training(module, config, optim)
    inputs = torch.randn(5, 3, dtype=engine.DTYPES[precision])
    engine.backward(trained, trained(inputs).float().square().sum(), is_last=True)
    return trained, inputs


def read(trained: Any) -> float | None:
    norm = engine.gradient_norm(trained)
    return distributed.any_ranks_and(torch.tensor([False, True]), norm)[1]


@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_a_step_with_the_norm_that_was_read_has_the_bits_of_one_that_computes_it(stage, precision):
    results = []
    for reads in (False, True):
        trained, inputs = started(stage, precision)
        for _ in range(3):
            given = read(trained) if reads else None
            assert (given is None) is (not reads or (stage, precision) in OWN)
            norm, outcome = engine.step(trained, 0.01, given)
            assert outcome == "applied" and norm is not None and norm > 0.5
            engine.backward(trained, trained(inputs).float().square().sum(), is_last=True)
        results.append((norm, weights.full_state(trained.module, torch.float32, keep=True)))
        engine.stop(trained)
    (norm, state), (norm_read, state_read) = results
    assert norm == norm_read
    assert all(torch.equal(state[name], state_read[name]) for name in state)


@pytest.mark.parametrize(("stage", "precision"), [s for s in STAGES if s not in OWN])
def test_a_norm_that_is_not_finite_leaves_the_step_out_and_the_next_is_taken(stage, precision):
    trained, inputs = started(stage, precision)
    assert engine.step(trained, 0.01, read(trained))[1] == "applied"
    before = weights.full_state(trained.module, torch.float32, keep=True)
    engine.backward(trained, trained(inputs).float().sum() * math.inf, is_last=True)
    given = read(trained)
    assert given == math.inf
    assert engine.step(trained, 0.01, given) == (None, "nonfinite")
    after = weights.full_state(trained.module, torch.float32, keep=True)
    assert all(torch.equal(before[name], after[name]) for name in before)
    engine.backward(trained, trained(inputs).float().square().sum(), is_last=True)
    assert engine.step(trained, 0.01, read(trained))[1] == "applied"
    engine.stop(trained)


def test_where_the_host_has_the_gradients_or_nobody_wants_their_norm_there_is_none_to_read():
    trained, _ = started(2, "fp32", offload_optimizer={"device": "cpu"})
    assert engine.gradient_norm(trained) is None
    assert engine.step(trained, 0.01)[1] == "applied"
    engine.stop(trained)


@pytest.mark.parametrize("flags", [[False, False], [True, False], [False, True], [True, True]])
@pytest.mark.parametrize("number", [None, 0.0, 1.5, 3.4028234663852886e38, math.inf])
def test_flags_and_number_come_back_as_they_went(flags, number):
    distributed.start()
    beside = None if number is None else torch.tensor(number)
    assert distributed.any_ranks_and(torch.tensor(flags), beside) == (flags, number)
