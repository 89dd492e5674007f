"""TRL's own DPOTrainer, in one measured process, fed with token ids in the columns that its preparation would make.

Without options it is TRL as it comes: activations recomputed, bf16 autocast over fp32 weights, reference online, 8
pairs a forward pass. The options are the ones that a careful user would turn. `sweep` tries them for a few steps each:
first whether to recompute, at one pair a forward pass, then micro-batch and order, always with the reference's scores
precomputed, since that only takes work away; one row with an online reference shows how much.
"""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import DPOConfig, DPOTrainer

from benchmarks.clock import Clock, Job, main

GROUPED_OVER = 50  # micro-batches that transformers sorts by length together, on any data set that is not tiny


class FixedOrder(torch.utils.data.Sampler[int]):
    """The order of training, given."""

    def __init__(self, order: list[int]) -> None:
        self.order = order

    def __iter__(self) -> Any:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


class Measured(DPOTrainer):
    """TRL's trainer in the order of the job, remembering its losses."""

    order: list[int]
    build_seconds: float | None = None

    def __init__(self, **kwargs: Any) -> None:
        self.seen_losses: list[torch.Tensor] = []
        super().__init__(**kwargs)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, *_: Any) -> FixedOrder:
        return FixedOrder(self.order)

    def _precompute_ref_logps(self, *args: Any) -> Any:
        started = time.perf_counter()
        scored = super()._precompute_ref_logps(*args)
        self.build_seconds = time.perf_counter() - started
        return scored

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.seen_losses.append((loss[0] if isinstance(loss, tuple) else loss).detach())
        return loss


class Ticks(TrainerCallback):
    """Notes every optimizer step on the clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.trainer: Any = None
        self.began = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Remember when the loop started."""
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step's loss is the mean over its micro-batches, which are equally large."""
        losses = self.trainer.seen_losses
        self.clock.tick(torch.stack(losses).mean())
        losses.clear()


def order_of(job: Job, pairs: list[dict[str, list[int]]]) -> list[int]:
    """Row numbers in the order of training.

    Grouped by length, the timed pairs stay the timed pairs: what is sorted is their order, by the function that
    `train_sampling_strategy="group_by_length"` uses, over as many micro-batches as on a large data set.
    """
    rows = list(range(len(pairs)))
    if not job.options.get("grouped"):
        return rows
    first = job.warmup * job.batch
    longest = [len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs[first:]]
    generator = torch.Generator().manual_seed(0)
    grouped = get_length_grouped_indices(longest, job.batch, mega_batch_mult=GROUPED_OVER, generator=generator)
    return rows[:first] + [first + int(i) for i in grouped]


def _settings(job: Job) -> DPOConfig:
    micro_batch = job.options.get("micro_batch", min(8, job.batch))
    assert job.batch % micro_batch == 0, f"{job.batch} pairs a step in micro-batches of {micro_batch}"
    chosen: dict[str, Any] = {}
    if job.options.get("tuned"):
        chosen = {
            "gradient_checkpointing": job.options["checkpointing"],
            "precompute_ref_log_probs": job.options["precompute"],
            "logging_steps": 50,
        }
    return DPOConfig(
        output_dir=f"{job.folder}/out", beta=job.beta, learning_rate=job.lr, lr_scheduler_type="constant",
        warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=job.batch // micro_batch, max_steps=job.total_steps, bf16=job.dtype == "bf16",
        use_cpu=job.device == "cpu", save_strategy="no", report_to=[], disable_tqdm=True, max_length=job.max_length,
        **chosen,
    )


def measure(job: Job) -> tuple[Clock, float]:
    """Train; the clock, and the seconds of the whole loop."""
    clock = Clock(job)
    pairs = job.read_pairs()[: job.total_steps * job.batch]
    ticks = Ticks(clock)
    Measured.order = order_of(job, pairs)
    tokenizer = AutoTokenizer.from_pretrained(job.policy)
    trainer = Measured(
        model=AutoModelForCausalLM.from_pretrained(job.policy, dtype=torch.float32), args=_settings(job),
        train_dataset=Dataset.from_list(pairs), processing_class=tokenizer, callbacks=[ticks],
    )
    clock.build_seconds = trainer.build_seconds
    ticks.trainer = trainer
    trainer.train()
    return clock, clock.stamps[-1] - ticks.began


def sweep(job: Job) -> list[dict[str, Any]]:
    """Try options for a few steps each.

    Args:
        job: Its options are `micro_batches` (pairs per forward pass to try) and `sweep_steps`.
    Returns:
        One dict per combination: its options and pairs_per_second, null where memory ran out.
    """
    tried: list[dict[str, Any]] = []

    def attempt(checkpointing: bool, precompute: bool, micro_batch: int, grouped: bool) -> float:
        options = {
            "tuned": True, "checkpointing": checkpointing, "precompute": precompute, "micro_batch": micro_batch,
            "grouped": grouped,
        }
        part = replace(job, warmup=0, steps=job.options["sweep_steps"], options=options)
        try:
            _, seconds = measure(part)
            speed = part.total_steps * part.batch / seconds
        except torch.OutOfMemoryError:
            speed = 0.0
        gc.collect()  # a trainer and its callbacks refer to one another
        if job.device == "cuda":
            torch.cuda.empty_cache()
        tried.append(options | {"pairs_per_second": speed or None})
        return speed

    small, *larger = job.options["micro_batches"]
    measure(replace(job, warmup=0, steps=1, options={"micro_batch": small}))  # warms up, off the record
    recompute = attempt(True, True, small, False) > attempt(False, True, small, False)
    attempt(recompute, False, small, False)
    for micro_batch in larger:
        for grouped in (False, True):
            attempt(recompute, True, micro_batch, grouped)
    return tried


def run(job: Job) -> dict[str, Any]:
    """One measured run, or the sweep."""
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    if "micro_batches" in job.options:
        return {"tried": sweep(job)}
    return measure(job)[0].result()


if __name__ == "__main__":
    main(run)
