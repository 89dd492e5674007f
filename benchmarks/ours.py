"""Ours, in one measured process: `dpo.train.train` with flags, as train_dpo.py calls it.

A step is done when its line is in metrics.jsonl. Nothing that tunes speed is set: layout, micro-batches and head are
the defaults unless the job's options say otherwise.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.clock import Clock, Job, main

NO_SETTINGS = OWN_GELU, OWN_PRODUCTS, WHOLE_MLP = "own_gelu", "own_products", "whole_mlp"
"""Options: leave the model's activation function, PyTorch's products of bf16, the last block's MLP as they are."""
DEEPSPEED_JSON = Path(__file__).resolve().parents[1] / "ds_configs" / "zero2.json"


def arguments(job: Job) -> list[str]:
    """The command line of a job; its options are settings (`reference.mode: cached`), but for NO_SETTINGS."""
    settings: dict[str, Any] = {
        "model.policy": job.policy,
        "data.train": job.rows,
        "data.max_length": job.max_length,
        "data.cache_dir": job.token_cache,
        "data.shuffle": "false",
        "loss.beta": job.beta,
        "optim.lr": job.lr,
        "optim.schedule": "constant",
        "optim.warmup_steps": 0,
        "train.output_dir": f"{job.folder}/run",
        "train.global_batch_size": job.batch,
        "train.max_steps": job.total_steps,
        "train.precision": job.dtype,
        "train.save_weights_only": "true",  # what is written after the last step is not measured
        "train.export_dtype": "bf16",
        "log.samples": 0,
    }
    if job.dtype == "fp32":
        settings["reference.dtype"] = "policy"  # as every other system's
    if job.options.get("reference.mode") == "cached":
        settings["reference.cache_dir"] = f"{job.folder}/scores"
    settings |= {key: value for key, value in job.options.items() if key not in NO_SETTINGS}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return ["--config", str(DEEPSPEED_JSON), *words]


def run(job: Job) -> dict[str, Any]:
    """Train, and note every line that the recorder writes."""
    from dpo import train as training
    from dpo.commandline import parse
    from dpo.model import blocks, load, products
    from dpo.runtime import tracking

    if job.options.get(OWN_GELU):
        load.fuse_gelu = lambda model: None
    if job.options.get(WHOLE_MLP):
        blocks.LastMlp.learn = lambda *_: None  # type: ignore[method-assign]
    if job.options.get(OWN_PRODUCTS):
        products.fp32_is_faster = lambda: False  # type: ignore[assignment]
    clock, path = Clock(job), list[str]()
    last_said = [time.perf_counter()]

    class Recorder(tracking.Recorder):
        def record(self, values: dict[str, Any]) -> None:
            super().record(values)
            if "loss" in values and values.get("step", 0) > 0:
                clock.tick(values["loss"])
                clock.tokens = values["num_tokens"]

        def say(self, text: str) -> None:
            super().say(text)
            if " is not used: " in text and "model.attention" in job.options:
                raise SystemExit(text)  # another kernel's speed would stand under its name
            if text.startswith("layout: "):
                path.append(text)
            now = time.perf_counter()
            if text.startswith("reference scores:"):
                clock.build_seconds = (clock.build_seconds or 0.0) + now - last_said[0]
            last_said[0] = now

    training.Recorder = Recorder  # type: ignore[misc]
    training.train(parse(arguments(job)))
    return clock.result() | {"path": path[-1].rpartition(";")[0]}


if __name__ == "__main__":
    main(run)
