"""What the DPO paper's own code does, in one measured process.

One padded batch of chosen and rejected rows, the model's full logits in fp32, an online reference, no recomputation,
bf16 autocast over fp32 weights: the loop that most people would write first. It stands beside TRL because TRL's
log-prob head is slow on a CPU.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader

from benchmarks.clock import Clock, Job, main

Batch = dict[str, Tensor]


def collate(pairs: list[dict[str, list[int]]]) -> Batch:
    """Pad 2P rows on the right, chosen first; labels are -100 outside of completions. Each (2P, L) int64."""
    rows = [(pair["prompt_ids"], pair[name]) for name in ("chosen_ids", "rejected_ids") for pair in pairs]
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    batch = {name: torch.full((len(rows), width), fill) for name, fill in
             (("input_ids", 0), ("attention_mask", 0), ("labels", -100))}
    for i, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        batch["input_ids"][i, :end] = torch.tensor(prompt + completion)
        batch["attention_mask"][i, :end] = 1
        batch["labels"][i, len(prompt) : end] = torch.tensor(completion)
    return batch


def sequence_logps(model: Any, batch: Batch) -> Tensor:
    """(2P,) fp32 summed log-probs of the completions, nats."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits.float()
    labels = batch["labels"][:, 1:].clone()
    mask = labels != -100
    labels[~mask] = 0
    token_logps = logits[:, :-1].log_softmax(-1).gather(2, labels[:, :, None]).squeeze(2)
    return (token_logps * mask).sum(-1)


def run(job: Job) -> dict[str, Any]:
    """Train with a loop of a dozen lines."""
    from transformers import AutoModelForCausalLM

    policy: Any = AutoModelForCausalLM.from_pretrained(job.policy, dtype=torch.float32)
    policy.to(job.device)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=job.lr, weight_decay=0.0, fused=True)
    micro_batch = job.options["micro_batch"]
    assert job.batch % micro_batch == 0, f"{job.batch} pairs a step in micro-batches of {micro_batch}"
    pairs: Any = job.read_pairs()
    batches = iter(DataLoader(pairs, batch_size=micro_batch, collate_fn=collate))
    clock = Clock(job)
    policy.train()
    with open(Path(job.folder) / "metrics.jsonl", "w", encoding="utf-8") as log:
        for _ in range(job.total_steps):
            clock.tick(_step(job, policy, reference, optimizer, batches, lambda m: log.write(json.dumps(m) + "\n")))
    return clock.result()


def _step(
    job: Job, policy: Any, reference: Any, optimizer: Any, batches: Iterator[Batch], write: Callable[[Any], Any]
) -> float:
    """One optimizer step; the mean loss of its pairs."""
    micro_steps = job.batch // job.options["micro_batch"]
    total = 0.0
    for _ in range(micro_steps):
        batch = {name: tensor.to(job.device) for name, tensor in next(batches).items()}
        with torch.autocast(job.device, dtype=torch.bfloat16, enabled=job.dtype == "bf16"):
            chosen, rejected = sequence_logps(policy, batch).chunk(2)
            with torch.no_grad():
                reference_chosen, reference_rejected = sequence_logps(reference, batch).chunk(2)
        rewards = job.beta * (chosen - reference_chosen), job.beta * (rejected - reference_rejected)
        loss = -logsigmoid(rewards[0] - rewards[1]).mean() / micro_steps
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    margin, accuracy = (rewards[0] - rewards[1]).mean().item(), (rewards[0] > rewards[1]).float().mean().item()
    write({"loss": total, "grad_norm": norm.item(), "margin": margin, "accuracy": accuracy})
    return total


if __name__ == "__main__":
    main(run)
