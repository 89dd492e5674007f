"""TR-DPO: a reference that follows the policy, and its place in a checkpoint.

    reference <- alpha policy + (1 - alpha) reference        after every reference.sync_steps optimizer steps

alpha 1 is the paper's hard update, less than 1 its soft one. The training loss is that of the reference as it stands;
evaluations, and the answers beside the policy's, are of the reference as it was at the start. Gorbatovski et al. 2024,
arXiv:2404.09656, equations 3 and 4.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo.errors import UserError
from dpo.runtime.distributed import World, only_main, together
from dpo.runtime.weights import full_state, set_state
from dpo.training.frozen import FrozenReference

FILE = "reference.safetensors"


def save_reference(reference: FrozenReference, world: World, folder: Path) -> None:
    """Write the reference as it stands into a checkpoint; collective."""
    assert reference.scorer is not None
    model = reference.scorer.model
    state = full_state(model, reference.dtype, keep=world.is_main)
    names = [name for name, _ in model.named_parameters()]  # tied weights once
    only_main(world, lambda: save_file({name: state[name] for name in names}, folder / FILE))


def restore_reference(reference: FrozenReference, folder: Path) -> None:
    """Bring the reference to where it stood at a checkpoint, bit by bit; collective.

    Raises:
        UserError: If the checkpoint does not hold it.
    """
    assert reference.scorer is not None
    path = folder / FILE

    def read() -> dict[str, Tensor]:
        if not path.is_file():
            raise UserError(
                f"checkpoint {folder} holds no {FILE}, the moving reference; delete the folder to use the one before"
            )
        return load_file(path)

    set_state(reference.scorer.model, together(read))
