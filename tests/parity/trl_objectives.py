"""Train with TRL's own DPOTrainer under many objectives, in one process; started by tests/ranks.py.

    python tests/parity/trl_objectives.py JOB.json FOLDER

JOB.json: policy, steps, batch_size, lr, beta, pairs (token ids), variants (name -> settings of DPOConfig).
FOLDER/NAME.pt: the loss and gradient norm of every step; the weights after them; and for batches of several sizes the
value and gradients of `DPOTrainer._compute_loss` at these weights. FOLDER/reference_free.pt: what the loss functions of
TRL's CPOTrainer and ORPOTrainer say of the log-probs per token in JOB.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from tests.parity.trl_run import Recorded


def run(job: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """One training run, and what its loss function says afterwards."""
    model = AutoModelForCausalLM.from_pretrained(job["policy"], dtype=torch.float32)
    arguments = DPOConfig(
        output_dir=job["output_dir"], beta=job["beta"], learning_rate=job["lr"], max_steps=job["steps"],
        per_device_train_batch_size=job["batch_size"], lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=1.0,
        weight_decay=0.0, logging_steps=1, save_strategy="no", report_to=[], bf16=False, use_cpu=True,
        gradient_checkpointing=False, max_length=None, disable_tqdm=True, seed=0, dataloader_drop_last=False,
        **settings,
    )  # fmt: skip
    trainer = Recorded(
        model=model, args=arguments, train_dataset=Dataset.from_list(job["pairs"]),
        processing_class=AutoTokenizer.from_pretrained(job["policy"], pad_token=job["pad_token"]),
    )
    trainer.seen_losses = []
    trainer.train()
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    found: dict[str, Any] = {
        "losses": list(trainer.seen_losses), "grad_norms": norms,
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()}, "computed": {},
    }
    for size in job["sizes"]:
        inputs = trainer._prepare_inputs(trainer.data_collator(job["pairs"][:size]))
        model.zero_grad()
        loss = trainer._compute_loss(model, inputs, False)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found["computed"][size] = loss.item(), gradients
    return found


def reference_free(logps: dict[str, list[float]], beta: float) -> dict[str, torch.Tensor]:
    """Preference terms of TRL's trainers without a reference."""
    chosen, rejected = torch.tensor(logps["chosen"]), torch.tensor(logps["rejected"])
    device = SimpleNamespace(device=torch.device("cpu"))
    plain = {"alpha": 0.0, "beta": beta, "label_smoothing": 0.1, "simpo_gamma": 0.7, "accelerator": device}
    cpo = CPOTrainer.cpo_loss(SimpleNamespace(loss_type="sigmoid", **plain), chosen, rejected)[0]
    simpo = SimpleNamespace(loss_type="simpo", **plain | {"label_smoothing": 0.0})
    orpo = ORPOTrainer.odds_ratio_loss(SimpleNamespace(**plain), chosen, rejected)[0]
    return {"cpo": cpo, "simpo": CPOTrainer.cpo_loss(simpo, chosen, rejected)[0], "orpo": -orpo}


if __name__ == "__main__":
    what = json.loads(Path(sys.argv[1]).read_text())
    for variant, chosen in what["variants"].items():
        torch.save(run(what, chosen), Path(sys.argv[2]) / f"{variant}.pt")
    torch.save(reference_free(what["logps"], what["beta"]), Path(sys.argv[2]) / "reference_free.pt")
