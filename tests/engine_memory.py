"""What a tiny run really allocates, part by part, and what its checkpoint takes; started by tests/ranks.py.

    tests/engine_memory.py OUT_FOLDER JOB...

JOB: STAGE-PRECISION, e.g. 2-bf16, or STAGE-PRECISION-offload for an optimizer that is kept on the host.
OUT_FOLDER/JOB.RANK.json: part -> bytes on that rank.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dpo.config import OptimConfig
from dpo.model import load
from dpo.model.forward import Scorer
from dpo.runtime import distributed
from dpo.runtime import engine as deepspeed_engine
from tests import tiny


def alive() -> dict[int, torch.UntypedStorage]:
    """Every storage that some tensor or gradient still holds, by address."""
    gc.collect()
    found = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.device.type == "cpu"]
    found += [t.grad for t in found if t.is_leaf and t.grad is not None]  # the collector does not see all of these
    storages = [t.untyped_storage() for t in found]
    return {s.data_ptr(): s for s in storages if s.nbytes() > 0}


def size() -> int:
    """Bytes of all tensors of this process; the least of three looks, since the threads of gloo and of autograd may let
    go of what they had a moment after the main one goes on."""
    looks = []
    for _ in range(3):
        looks.append(sum(s.nbytes() for s in alive().values()))
        time.sleep(0.05)
    return min(looks)


def held(model: Any) -> int:
    """Bytes of a model's weights on this rank."""
    storages = [getattr(p, "ds_tensor", p).untyped_storage() for p in model.parameters()]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def measure(stage: int, precision: str, folder: Path, *, offload: bool) -> dict[str, int]:
    """Bytes of each part in the second optimizer step, of two micro-batches; of gradients, the most there ever are."""
    dtype = deepspeed_engine.DTYPES[precision]
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 1000}
    if stage == 3:  # a tiny model's weights would stay gathered
        always = ("stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
        zero |= dict.fromkeys(always, 0)
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {"zero_optimization": zero}
    optim = OptimConfig()
    config = deepspeed_engine.build_config(config, optim=optim, precision=precision, global_batch_size=2)
    model = load.cast_parameters(tiny.model("llama", dtype=torch.float32, vocab_size=2000), dtype)
    reference = load.frozen_copy(model, dtype)
    parameters = sum(p.numel() for p in model.parameters())
    before = size() - held(model) - held(reference)
    engine = deepspeed_engine.start_training(Scorer(model), config, optim)
    if stage == 3:
        frozen_engine = deepspeed_engine.start_frozen(Scorer(reference), deepspeed_engine.frozen_config(config, dtype))
        assert frozen_engine is not None
    states = 0
    before += held(model) + held(reference)
    for step in range(2):
        for is_last in (False, True):
            ids = torch.arange(8)[None]
            loss = engine.module.model(input_ids=ids, labels=ids).loss
            deepspeed_engine.backward(engine, loss, is_last)
            del loss
            if step == 1:  # the first one only makes AdamW's states
                states = max(states, size() - before)
        deepspeed_engine.step(engine, 1e-6)
        engine.optimizer.zero_grad()
    optimizer = size() - before
    engine.save_checkpoint(str(folder), tag="step")
    written = sum(f.stat().st_size for f in (folder / "step").glob("*") if f.is_file())
    return {
        "parameters": parameters, "weights": held(model), "reference": held(reference),
        "gradients and optimizer": states,
        "optimizer": optimizer, "checkpoint": written,
    }  # fmt: skip


def main(argv: list[str]) -> None:
    """Measure every job in turn."""
    world = distributed.start()
    gc.collect()
    gc.freeze()  # what importing has made is not looked at again and again
    folder = Path(argv[0])
    for job in argv[1:]:
        stage, precision, *more = job.split("-")
        parts = measure(int(stage), precision, folder / job, offload=bool(more))
        (folder / f"{job}.{world.rank}.json").write_text(json.dumps(parts))


if __name__ == "__main__":
    main(sys.argv[1:])
