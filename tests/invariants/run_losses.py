"""Take three steps under many losses in one process group and write what each gave; started by tests/ranks.py.

    tests/invariants/run_losses.py CASES.json OUT.json

CASES.json: name -> {"loss": the loss section, "layout", "micro_batches", maybe "stage" (of ZeRO), "steps", "shuffle",
"loss_in_forward", "ranks_a_row", "keep_weights"}.
OUT.json: name -> the lines of three steps and of the evaluation after them, as rank 0 logs them. Models, pairs and
steps are those of a run: only the reading of files is left out.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import dpo.model.forward
import dpo.training.frozen
from dpo.config import Config, DataConfig, LogConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from dpo.data.loader import whole_pass
from dpo.evaluate import ValidationShare, evaluate
from dpo.objective.objective import Objective
from dpo.run.data import RunData
from dpo.run.setup import Setup
from dpo.runtime import distributed
from dpo.runtime import engine as deepspeed_engine
from dpo.runtime.distributed import World
from dpo.training.meter import meter_for
from dpo.training.nonfinite import Nonfinite
from dpo.training.start import check_start
from dpo.training.step import take_step
from tests import tiny
from tests.invariants import cut

PAIRS_A_STEP, STEPS, LR = 9, 3, 1e-3


class Said:
    """A tracker that remembers its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def setup_of(case: dict[str, Any], world: World, pairs: tiny.Pairs) -> Setup:
    """The setup of a case."""
    a_rank = -(-PAIRS_A_STEP * case.get("ranks_a_row", 1) // world.world_size)
    optim = OptimConfig(lr=LR, schedule="constant", warmup_steps=0)
    config = Config(
        model=ModelConfig(policy="tiny", loss_in_forward=case.get("loss_in_forward", False)),
        data=DataConfig(train="pairs", shuffle=case.get("shuffle", True)),
        loss=LossConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in case["loss"].items()}),
        optim=optim, log=LogConfig(samples=0),
        train=TrainConfig(
            global_batch_size=PAIRS_A_STEP, layout=case["layout"], precision="fp32",
            micro_batch_size=-(-a_rank // case["micro_batches"]),
            sequence_parallel_size=case.get("ranks_a_row", 1),
        ),
    )  # fmt: skip
    # A tiny model's weights stay gathered under ZeRO-3 unless these are 0.
    always = ("stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
    zero = {"stage": case.get("stage", 2)} | (dict.fromkeys(always, 0) if "stage" in case else {})
    engine_config = deepspeed_engine.build_config(
        {"zero_optimization": zero}, optim=optim, precision="fp32",
        global_batch_size=PAIRS_A_STEP,
    )
    return Setup(
        config=config, world=world, engine_config=engine_config, precision="fp32", tokenizer=[], notes=(),
        data=RunData((), (), (), ()), train_pairs=pairs, validation_pairs=pairs, start_dtype=torch.float32,
    )  # type: ignore[arg-type]


def run(case: dict[str, Any], world: World, pairs: tiny.Pairs) -> dict[str, Any]:
    """Three steps and an evaluation; what was said at the start, and whether a reference was made."""
    setup, said = setup_of(case, world, pairs), Said()
    policy, reference = dpo.training.frozen.start_models(setup, "tiny", said.say)
    tokens: list[int] = []
    policy.scorer.model.base_model.register_forward_pre_hook(
        lambda _, __, inputs: tokens.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    in_forward, total_loss = [0], dpo.model.forward.total_loss

    def counted(*args: Any, **kwargs: Any) -> Any:
        in_forward[0] += 1
        return total_loss(*args, **kwargs)

    dpo.model.forward.total_loss = counted
    loss, loader = Objective(setup.config.loss), setup.loader(setup.train_pairs, policy.layout)
    check_start(setup, policy, reference, loss, loader[0], said)  # type: ignore[arg-type]
    meter, lines = meter_for(setup, policy), []
    nonfinite = Nonfinite(setup, "step", said.say)
    for work in loader.steps(0, case.get("steps", STEPS)):
        assert len(work.batches) == case["micro_batches"]
        take_step(setup, policy, reference, loss, work, LR, meter, nonfinite)
        lines.append(meter.line(world.device))
    dpo.model.forward.total_loss = total_loss
    share = ValidationShare(whole_pass(loader, range(len(pairs))), float(pairs.lengths[:, 1].mean()))
    found, per_pair = evaluate(policy, reference.of_validation, {"": share}, loss, world)
    seen = {"lines": lines, "evaluation": found, "said": said.lines, "has_reference": reference.scorer is not None}
    seen["in_forward"] = in_forward[0]
    if case.get("keep_weights"):
        weights = torch.cat([p.detach().reshape(-1) for p in policy.scorer.model.parameters()])
        seen |= {"weights": weights.tolist(), "tokens": tokens, "pairs": len(per_pair)}
    return seen


if __name__ == "__main__":
    here = distributed.start()
    model = tiny.model("llama", dtype=torch.float32)
    dpo.training.frozen.load_weights = lambda *_, **__: copy.deepcopy(model)  # type: ignore[assignment]
    data = tiny.Pairs([replace(p, margin=0.5 + p.pair_id % 4) for p in tiny.pairs(PAIRS_A_STEP * 2, longest=9)])
    results = {name: run(case, here, data) for name, case in json.loads(Path(sys.argv[1]).read_text()).items()}
    if here.world_size == 2:
        results["fp64 cut"] = cut.gaps()
    if here.is_main:
        Path(sys.argv[2]).write_text(json.dumps(results))
