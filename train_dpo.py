"""Train a policy by Direct Preference Optimization.

    deepspeed train_dpo.py --config ds_configs/zero2.json [--recipe recipes/NAME.yaml] [--section.key VALUE ...]
    torchrun --nproc_per_node N train_dpo.py --config ds_configs/zero2.json ...     (N = 1: one GPU)
    python train_dpo.py --config ds_configs/zero2.json ...                          (one process)
    sbatch [--nodes K] slurm/dpo.sh [the same arguments]

Exit code 2 and one line for whatever the user can mend; 75 for a run that was asked to stop, is safe on disk and goes
on when it is started again. torchrun makes both 1: status.json in the run directory tells them apart.
"""

import gc
import os
import signal
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
    _import_all()
    from dpo.runtime import distributed, preemption
    from dpo.train import train

    try:
        world = distributed.start()
    except UserError as error:
        print(f"train_dpo.py: {error}", file=sys.stderr, flush=True)
        return 2
    try:
        train(distributed.together(lambda: parse(argv)) if world.world_size > 1 else command)
    except UserError as error:
        if world.is_main:
            print(f"train_dpo.py: {error}", file=sys.stderr, flush=True)
        distributed.agree(None)  # nobody leaves, and is noticed by the launcher, before the line is out
        return 2
    except preemption.Preempted as stop:
        if world.is_main:
            print(f"train_dpo.py: {stop}; start again to continue", file=sys.stderr, flush=True)
        distributed.agree(None)
        return preemption.EXIT_CODE
    return 0


def _import_all() -> None:
    """Import what a run needs without looking for garbage meanwhile, then or at the end: a third of a short start."""
    if "dpo.train" in sys.modules or not gc.isenabled():
        return
    gc.disable()
    try:
        import dpo.train  # noqa: F401

        gc.freeze()
    finally:
        gc.enable()


def _interruptible(argv: list[str]) -> int:
    """Until a run listens, and once it writes its result, a signal ends it at once, as nothing would be saved."""
    first = os.environ.get("RANK", "0") == "0"
    for number in (signal.SIGTERM, signal.SIGINT):
        # Ranks that wait in a collective hear no handler.
        signal.signal(number, signal.default_int_handler if first else signal.SIG_DFL)
    try:
        return main(argv)
    except KeyboardInterrupt:
        print("train_dpo.py: interrupted; start again to continue", file=sys.stderr, flush=True)
        return os.EX_TEMPFAIL  # 75, without the import that knows it as preemption.EXIT_CODE


if __name__ == "__main__":
    sys.exit(_interruptible(sys.argv[1:]))
