"""The transformer blocks of a loaded model computed otherwise, with the same result.

Fused GELU and the last MLP on fewer rows always; activations recomputed and blocks compiled where a run asks for it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer


def fuse_gelu(model: Any) -> None:
    """Compute GPT-2's tanh-GELU in one kernel instead of eight elementwise ones; the same function to 2e-7 in fp32."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def checkpoint_activations(model: Any) -> None:
    """Recompute activations in backward, keeping dropout off.

    transformers checkpoints only layers in training mode; their children stay in eval mode, and rates that a layer
    reads itself become 0.
    """
    # Renamed in transformers 5.2x; the old name warns there and goes in 6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)


def recomputes_activations(model: Any) -> bool:
    """Whether `checkpoint_activations` is in force."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def compile_where_it_helps(model: Any, *, padded: bool) -> str:
    """Compile a policy's blocks, unless rows are padded or activations recomputed, and say so."""
    if padded:
        return "blocks: not compiled: rows of layout padded have many lengths"
    if recomputes_activations(model):
        return "blocks: not compiled: torch.compile leaves blocks alone whose activations are recomputed"
    return f"blocks: {compile_blocks(model)} compiled"


def compile_blocks(model: Any, backend: str = "inductor") -> int:
    """Compile the transformer blocks, each one alike, so that their elementwise work is fused.

    Attention over segments stays outside the compiled code: what it reads changes with every batch.

    Args:
        model: The transformers model.
        backend: Of torch.compile.
    Returns:
        How many blocks there are.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    # Blocks share their code; torch keeps 8 variants of it by default and runs further ones as they were written.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 4 * len(blocks))
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    model.last_mlp = None  # its rows are others in every batch, and code would be made for every number of them
    return len(blocks)


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Within the block compiled blocks run as they were written: code would be made for every length of an answer, and
    then, at the compiler's limit, no more for training."""
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


# --- the last MLP ----------------------------------------------------------------------------------------------------


class LastMlp:
    """Hooks that run the last block's MLP on the rows alone that something reads afterwards.

    Behind the last block's attention nothing mixes tokens any more, and the head reads the rows that predict a
    completion token and no others. What the MLP would add to the rest, prompts above all, moves no log-prob and no
    gradient. The rows come as the keyword argument `predicting` of the model's call, (M,) int64, which is handed down
    to attention. Attention comes before the MLP, also where a pass is recomputed; hooks of the block do not run there.
    Legend: T tokens of a packed row, M rows that predict, H hidden size.
    """

    rows: Tensor | None = None
    tokens = 0

    def begin(self, block: nn.Module, args: Any) -> None:
        """Forget the rows of a pass that broke off."""
        self.rows = None

    def learn(self, child: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Take up the rows of this pass."""
        self.rows = kwargs.get("predicting", self.rows)

    def select(self, mlp: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
        """(1, T, H) -> (1, M, H)."""
        if self.rows is None or len(args) > 1:  # more than hidden states: not a function of each row by itself
            self.rows = None
            return None
        self.tokens = args[0].shape[1]
        return (args[0].index_select(1, self.rows),)

    def restore(self, mlp: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """(1, M, H) -> (1, T, H), zeros in the other rows."""
        rows, self.rows = self.rows, None
        return None if rows is None else output.new_zeros(1, self.tokens, output.shape[2]).index_copy(1, rows, output)


def spare_last_mlp(model: Any) -> None:
    """Have the last block of a model leave out rows that nothing reads, in passes that say which are read.

    Sets `model.last_mlp`, which goes along when the model is copied; None where passes are not to say it.
    """
    if hasattr(model, "last_mlp"):
        return
    model.last_mlp = None
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    mlp = getattr(blocks[-1], "mlp", None) if blocks else None
    if mlp is None:
        return
    model.last_mlp = hooks = LastMlp()
    blocks[-1].register_forward_pre_hook(hooks.begin)
    for child in blocks[-1].children():
        if child is not mlp:
            child.register_forward_pre_hook(hooks.learn, with_kwargs=True)
    mlp.register_forward_pre_hook(hooks.select)
    mlp.register_forward_hook(hooks.restore)
