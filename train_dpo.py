"""Train a policy by Direct Preference Optimization.

    deepspeed train_dpo.py --config ds_configs/zero2.json [--recipe recipes/NAME.yaml] [--section.key VALUE ...]
    torchrun --nproc_per_node N train_dpo.py --config ds_configs/zero2.json ...     (N = 1: one GPU)
    python train_dpo.py --config ds_configs/zero2.json ...                          (one process)
    sbatch [--nodes K] slurm/dpo.sh [the same arguments]

Exit code 2 and one line for whatever the user can mend.
"""

import os
import sys

from dpo.commandline import parse
from dpo.errors import UserError


def main(argv: list[str]) -> int:
    """Parse, train, and turn a user's mistake into one line on rank 0 once all ranks know of it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        try:
            command = parse(argv)  # before torch is imported: a typo is answered at once
        except UserError as error:
            print(f"train_dpo.py: {error}", file=sys.stderr)
            return 2
    from dpo.runtime import distributed
    from dpo.train import train

    world = distributed.start()
    try:
        train(distributed.together(lambda: parse(argv)) if world.world_size > 1 else command)
    except UserError as error:
        if world.is_main:
            print(f"train_dpo.py: {error}", file=sys.stderr, flush=True)
        distributed.agree(None)  # nobody leaves, and is noticed by the launcher, before the line is out
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
