"""Train with TRL's own DPOTrainer on given token ids and write what every step gave; started by tests/ranks.py."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


class Recorded(DPOTrainer):
    """TRL's trainer, in the order of the rows, remembering its loss unrounded."""

    seen_losses: list[float]

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # tokenised already, in the columns its own preparation would make

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.seen_losses.append(float(loss[0] if isinstance(loss, tuple) else loss))
        return loss


def run(job: dict[str, Any], loss_type: str) -> list[dict[str, float]]:
    """One training run; a dict per step."""
    model = AutoModelForCausalLM.from_pretrained(job["policy"], dtype=torch.float32)
    arguments = DPOConfig(
        output_dir=job["output_dir"], loss_type=[loss_type], beta=job["beta"], learning_rate=job["lr"],
        per_device_train_batch_size=job["batch_size"], max_steps=job["steps"], lr_scheduler_type="constant",
        warmup_steps=0, max_grad_norm=1.0, weight_decay=0.0, logging_steps=1, save_strategy="no", report_to=[],
        bf16=False, use_cpu=True, gradient_checkpointing=False, max_length=None, disable_tqdm=True, seed=0,
        dataloader_drop_last=False,
    )
    trainer = Recorded(
        model=model, args=arguments, train_dataset=Dataset.from_list(job["pairs"]),
        processing_class=AutoTokenizer.from_pretrained(job["policy"], pad_token="</s>"),
    )
    trainer.seen_losses = []
    trainer.train()
    lines = [line for line in trainer.state.log_history if "grad_norm" in line]
    return [line | {"loss": loss} for line, loss in zip(lines, trainer.seen_losses, strict=True)]


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as stream:
        what = json.load(stream)
    with open(sys.argv[2], "w", encoding="utf-8") as stream:
        json.dump({loss: run(what, loss) for loss in what["losses"]}, stream)
