"""Micro-batches on a GPU that is only a name: tensors with a shape, a dtype and a device, and nothing in them.

What the host would have to wait for cannot be computed and is an error; so is a mixture of devices. Every allocation is
counted, at sizes that no CPU holds. Started by tests/pretended/test_gpu.py, in a process of its own:

    python -m tests.pretended.gpu tests/pretended/micro_batches.py OUT.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

from dpo.config import LoraConfig, LossConfig
from dpo.data.batch import collate
from dpo.data.planner import Layout
from dpo.estimate import GIB
from dpo.model import adapters, blocks
from dpo.model.check import use_layout
from dpo.model.forward import Scorer
from dpo.model.reference import nothing, online, online_with_tokens
from dpo.model.shape import shape_of
from dpo.objective.catalog import LOSSES
from dpo.objective.metrics import sums
from dpo.objective.objective import Objective
from dpo.planning.forecast import batch_parts
from dpo.training.meter import NUM_TOTALS, TOKENS, Meter
from dpo.training.nonfinite import spoil
from dpo.training.policy import Policy
from dpo.training.step import losses_of
from dpo.types import Context, LogitMap, TokenizedPair

GPU = torch.device("cuda", 0)
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": dict(vocab_size=50257, n_embd=768, n_layer=4, n_head=12),
    "llama": dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=3, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64,
    ),
}  # fmt: skip
SIZES["cohere"] = SIZES["llama"] | {"logit_scale": 0.0625}
SIZES["llama_mha"] = SIZES["llama"] | {"num_key_value_heads": 32, "vocab_size": 32000}


@dataclass(frozen=True)
class Case:
    """What is computed.

    Attributes:
        family, layers: The model.
        layout, attention, dtype, in_forward, recompute, lora: How.
        multiple: Of which the vocabulary is made one.
        softcap: Of the logits.
        loss: The loss section.
        tokens: About as many are in the micro-batch.
    """

    family: str = "gpt2"
    layers: int | None = 1
    layout: Layout = "shared"
    attention: str = "varlen"
    dtype: torch.dtype = torch.bfloat16
    in_forward: bool = False
    recompute: bool = False
    lora: bool = False
    multiple: int = 1
    softcap: float | None = None
    loss: dict[str, Any] = field(default_factory=dict)
    tokens: int = 1000


VOCABULARIES = {-(-size["vocab_size"] // multiple) * multiple for size in SIZES.values() for multiple in (1, 64)}
NEEDED: dict[str, Any] = {"exo_pair": {"label_smoothing": 0.1}}
WAITS = {
    f"{family}-{layout}-{attention}{'-in_forward' * early}": Case(
        family, layout=layout, attention=attention, in_forward=early
    )
    for family in ("gpt2", "llama")
    for layout, attention in (("shared", "varlen"), ("packed", "varlen"), ("shared", "sdpa"), ("padded", "sdpa"))
    for early in (False, True)
} | {
    "fp16": Case(dtype=torch.float16),
    "fp16-in_forward": Case(dtype=torch.float16, in_forward=True),
    "recompute": Case("llama", 2, recompute=True),
    "recompute-in_forward": Case(recompute=True, in_forward=True),
    "lora": Case("llama", lora=True),
    "lora-in_forward": Case("llama", lora=True, in_forward=True),
    "long": Case(tokens=9000),
    "long-in_forward": Case(tokens=9000, in_forward=True),
    "vocabulary": Case(multiple=64),
    "vocabulary-in_forward": Case(multiple=64, in_forward=True),
    "scaled": Case("cohere"),
    "scaled-in_forward": Case("cohere", in_forward=True),
    "capped": Case(softcap=30.0, tokens=9000),
    "capped-in_forward": Case(softcap=30.0, tokens=9000, in_forward=True),
    "capped-tdpo": Case(softcap=30.0, loss={"name": "tdpo"}),
    "wpo": Case(loss={"wpo": True}),
    "js": Case(loss={"f_divergence": "js"}),
} | {
    name: Case(loss={"name": name} | NEEDED.get(name, {})) for name, facts in LOSSES.items() if not facts.couples
}  # fmt: skip
MEMORY = {
    f"{family}{'-recompute' * again}{'-in_forward' * early}": Case(
        family, layers=None, in_forward=early, recompute=again, tokens=8192
    )
    for family in ("gpt2", "llama", "llama_mha")
    for again in (False, True)
    for early in (False, True)
}


class Strict(TorchDispatchMode):
    """Refuses copies that the host would wait for, and logits that a product has rounded to 16 bits.

    A number may go to the device.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, result = function.name(), function(*args, **kwargs)
        if name in ("aten::_to_copy", "aten::copy_"):
            source, target = (args[1], args[0]) if name == "aten::copy_" else (args[0], result)
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True))
            if waits and source.device != target.device and not (source.device.type == "cpu" and source.dim() == 0):
                raise AssertionError(f"{name} from {source.device.type} to {target.device.type}")
        if name in ("aten::mm", "aten::addmm") and result.shape[1] in VOCABULARIES and result.dtype.itemsize == 2:
            raise AssertionError(f"{name}: logits in 16 bits")
        return result


def pairs_of(tokens: int) -> list[TokenizedPair]:
    """Random pairs of about so many tokens, one of them of single tokens."""
    rng = np.random.default_rng(0)
    lengths = [(1, 1, 1)]
    while sum(map(sum, lengths)) < tokens:
        lengths.append(tuple(int(rng.integers(5, most)) for most in (400, 150, 150)))
    ids = lambda count: rng.integers(0, 1000, size=count).astype(np.int32)  # noqa: E731
    return [TokenizedPair(i, *(ids(n) for n in three), margin=1.0) for i, three in enumerate(lengths)]


def scorer_of(case: Case, recompute: bool = False) -> Scorer:
    """A model as a run on a GPU loads it."""
    config = transformers.AutoConfig.for_model(case.family.split("_")[0], **SIZES[case.family])
    config.num_hidden_layers = case.layers or config.num_hidden_layers
    with GPU:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=case.dtype).eval()
    blocks.fuse_gelu(model)
    if case.lora:
        torch.set_default_dtype(case.dtype)  # peft would change the dtype of modules, and these cannot be changed
        torch.nn.Module._apply, change = lambda module, *_, **__: module, torch.nn.Module._apply
        with GPU:
            adapters.add(model, LoraConfig(r=4), seed=0, base="")
        torch.nn.Module._apply = change
        torch.set_default_dtype(torch.float32)
    if recompute:
        blocks.checkpoint_activations(model)
    scorer = Scorer(model)
    scorer.head.multiple = case.multiple
    if case.softcap is not None:
        scorer.head.logit_map = LogitMap(softcap=case.softcap)
    use_layout(scorer, case.layout, backend=case.attention)
    return scorer


def compute(case: Case, tracker: MemTracker | None = None) -> Scorer:
    """Forward and backward pass of a micro-batch; the policy with its gradients.

    What `dpo.training.step.take_step` does for each of them, without DeepSpeed.
    """
    loss = Objective(LossConfig(**case.loss))
    batch = collate(pairs_of(case.tokens), case.layout)
    scorer = scorer_of(case, case.recompute)
    if tracker is not None or not loss.needs_reference:
        reference = nothing
    else:
        frozen = scorer_of(case)
        frozen.requires_grad_(False)
        reference = online_with_tokens(frozen) if "tdpo" in loss.config.names else online(frozen)
    certain = bool(case.loss.get("wpo"))
    policy = Policy(scorer, scorer, case.layout, case.attention, [], in_forward=case.in_forward, certain=certain)
    meter = Meter(torch.zeros(NUM_TOTALS + len(loss.names_of_parts), dtype=torch.float64, device=GPU))
    on_device = batch.to(GPU)
    context = Context(30.0, {"odpo": on_device.margins[:, None]} if "odpo" in loss.config.names else {})
    with Strict() if tracker is None else tracker:
        meter.totals[TOKENS] += batch.input_ids.numel()
        on_device = batch.to(GPU)
        total, output, logps = losses_of(policy, on_device, reference(on_device), loss, context)
        spoil(total * 0.5, output.losses.detach()).backward()
        meter.add(sums(output, logps))
    return scorer


def outcome(case: Case) -> str:
    """What went wrong; "" for nothing."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            scorer = compute(case)
            learning = [p for p in scorer.parameters() if p.requires_grad]
            whole = all(p.grad is not None and (p.grad.device, p.grad.dtype) == (GPU, case.dtype) for p in learning)
            return "" if whole and learning else "a gradient is missing"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class _CopiesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad.cpu().to(GPU, non_blocking=True)


def mistakes() -> dict[str, str]:
    """What `outcome` must notice, and how it does."""
    pageable = torch.ones(3)
    found = {}
    for name, mistake in {
        "item": lambda x: x.sum().item(),
        "mask": lambda x: x[x > 0],
        "copy": lambda x: x.cpu(),
        "number": lambda x: x.sum().to("cpu"),
        "rounded": lambda x: x.to(torch.bfloat16)[:, None] @ torch.ones(1, 50257, dtype=torch.bfloat16, device=GPU),
        "backward": lambda x: _CopiesInBackward.apply(x.requires_grad_()).sum().backward(),
        "upload": lambda x: pageable.to(GPU) + x,
        "mixed": lambda x: x + pageable,
    }.items():
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                given = torch.ones(3, device=GPU)
                with Strict():
                    mistake(given)
            found[name] = ""
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def memory(case: Case) -> dict[str, float]:
    """GiB of a micro-batch at its peak, weights not counted, beside what a plan says of it."""
    pairs = pairs_of(case.tokens)
    with FakeTensorMode(allow_non_fake_inputs=True):
        tracker = MemTracker()
        scorer = compute(case, tracker)
        peak = tracker.get_tracker_snapshot("peak")[GPU]["Total"]
    shape = shape_of(scorer.model.config, case.dtype)
    batch = collate(pairs, case.layout)
    sizes: Any = SimpleNamespace(
        largest=len(batch.input_ids), largest_completions=len(batch.target_ids),
        largest_prompts=sum(len(pair.prompt_ids) for pair in pairs),
    )  # fmt: skip
    parts = batch_parts(shape, sizes, case.layout, case.dtype.itemsize, case.in_forward, head_learns=True)
    unused = "activations, kept" if case.recompute else "activations, recomputed"
    return {
        "peak": (peak - shape.parameters * case.dtype.itemsize) / GIB,
        "planned": sum(size or 0.0 for name, size in parts.items() if name != unused),
        "gradients": shape.parameters * case.dtype.itemsize / GIB,
    }


if __name__ == "__main__":
    seen = {
        "waits": {name: outcome(case) for name, case in WAITS.items()},
        "mistakes": mistakes(),
        "memory": {name: memory(case) for name, case in MEMORY.items()},
    }
    Path(sys.argv[1]).write_text(json.dumps(seen))
