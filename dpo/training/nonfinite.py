"""A loss or a gradient that is not finite: no rank steps, the rows are named and kept in nonfinite.jsonl, and the run
stops, or goes on without the step.

A step that is left out keeps its place: the pairs and the learning rates of the steps after it are what they would have
been. Fp16's loss scale overflows as a matter of course; that counts only where it cannot fall any further.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dpo.data.loader import StepBatches
from dpo.errors import UserError
from dpo.run.setup import Setup
from dpo.runtime import distributed, heartbeat, preemption
from dpo.runtime import engine as deepspeed_engine
from dpo.runtime.files import read_records, write_records


def spoil(total: Tensor, losses: Tensor) -> Tensor:
    """Make the gradient of a loss not finite where one of its parts is not, so that DeepSpeed leaves the step out.

    Args:
        total: Scalar whose gradient is taken.
        losses: Parts of it, any shape, detached.
    Returns:
        The same number with the same gradient where all are finite, else NaN; without a wait for the device.
    """
    return total * torch.where(losses.isfinite().all(), 1.0, math.nan)


@dataclass
class Nonfinite:
    """Steps of a stage that were left out.

    Attributes:
        setup: The run.
        stage: What its steps are called in metrics.jsonl.
        say: Shows a line.
        count: Steps left out so far, by any start of the run.
    """

    setup: Setup
    stage: Literal["step", "sft_step"]
    say: Callable[[str], None]
    count: int = 0

    @property
    def skips(self) -> bool:
        """Whether the run goes on without such a step."""
        return self.setup.config.train.on_nonfinite == "skip"

    @property
    def metrics(self) -> dict[str, int]:
        """What a line of metrics.jsonl says of it."""
        return {"skipped_steps": self.count} if self.skips else {}

    def step(
        self, engine: Any, lr: float, work: StepBatches, losses: list[Tensor]
    ) -> tuple[float | None, bool, bool]:
        """Take an optimizer step, unless a loss or the gradient is not finite; collective.

        The host waits for the device here: for the norm and the flags of all ranks at once.

        Args:
            engine: After the step's last `backward`, of losses that went through `spoil`.
            lr: Learning rate of the step.
            work: This rank's micro-batches.
            losses: (P,) each, of the pairs of every micro-batch.
        Returns:
            Gradient norm, see `engine.step`; whether the step counts in the metrics: not if it is left out; whether any
            rank was asked to stop after it.
        Raises:
            UserError: If the run is not to go on; no rank has stepped.
        """
        heartbeat.at(f"at the end of {self._name(work)}, asking the others", in_step=True)
        bad = ~torch.cat(losses).isfinite().all()
        flags = torch.stack((bad, torch.full_like(bad, preemption.is_asked())))
        (is_bad, stop), norm = distributed.any_ranks_and(flags, deepspeed_engine.gradient_norm(engine))
        heartbeat.at(f"in the update of {self._name(work)}", in_step=True)
        if is_bad:
            self._leave_out(work, losses)
        norm, outcome = deepspeed_engine.step(engine, lr, norm)
        assert not (is_bad and outcome == "applied")
        if outcome == "exhausted" and not is_bad:  # else the gradient was spoilt on purpose, and the step is left out
            raise UserError(
                f"{self._name(work)}: the gradient overflows in fp16 and the loss scale is at its minimum; no step was"
                f" taken and the checkpoints are whole; use bf16 or fp32, or lower {self._rate}"
            )
        if outcome == "overflow" and not is_bad:
            self.say(f"{self._name(work)}: the gradient overflows in fp16; no step was taken, the loss scale falls")
        if outcome == "nonfinite" and not is_bad:
            self._leave_out(work, None)
        return norm, not is_bad and outcome != "nonfinite", stop

    def look_at(self, step: int, eval_loss: float) -> None:
        """Stop where an evaluation shows that the weights are destroyed.

        Args:
            step: Optimizer steps done.
            eval_loss: The same on every rank.
        Raises:
            UserError: If it is not finite and the run is not to go on.
        """
        if math.isfinite(eval_loss):
            return
        of_sft = self.stage == "sft_step"
        what = f"the validation loss after {'SFT ' * of_sft}step {step} is {eval_loss}"
        if self.skips:
            self.say(f"{what}; the run goes on (train.on_nonfinite: skip)")
        elif step == 0:
            raise UserError(f"{what}: look at the validation rows, or use bf16 or fp32 where fp16 overflows")
        else:
            raise UserError(
                f"{what}: the weights have left what {self.setup.precision} can express, and no final/ is written;"
                f" begin anew with a lower {self._rate} in another train.output_dir"
            )

    def _leave_out(self, work: StepBatches, losses: list[Tensor] | None) -> None:
        """Name and keep the rows of a step that no rank takes; collective.

        Args:
            work: This rank's micro-batches.
            losses: (P,) each, of the pairs of every micro-batch; None if all are finite and the gradient is not.
        Raises:
            UserError: If the run is not to go on.
        """
        ids = [pair_id for batch in work.batches for pair_id in batch.pair_ids]
        values = [math.nan] * len(ids) if losses is None else torch.cat(losses).tolist()
        bad = [pair_id for pair_id, value in zip(ids, values, strict=True) if not math.isfinite(value)]
        pairs = sorted(set(sum(distributed.gather(bad), [])))
        distributed.only_main(self.setup.world, lambda: self._dump(work.step + 1, pairs))
        named = self.setup.name_rows(pairs[:10])
        what = f"the loss is not finite for {named}"
        if losses is None:
            what = f"the gradient is not finite though every loss is, over {named}"
        self._end_or_go_on(f"{self._name(work)}: {what}")

    @property
    def _rate(self) -> str:
        """The setting that this stage's learning rate comes from."""
        return "optim.sft_lr" if self.stage == "sft_step" else "optim.lr"

    def _name(self, work: StepBatches) -> str:
        return f"{'SFT ' if self.stage == 'sft_step' else ''}step {work.step + 1}"

    def _end_or_go_on(self, what: str) -> None:
        train, rows = self.setup.config.train, f"{self.setup.run}/nonfinite.jsonl"
        fix = f"look at these rows ({rows}), lower {self._rate}, or use bf16 or fp32"
        if not self.skips:
            raise UserError(f"{what}; no step was taken and the checkpoints are whole; {fix}")
        if self.count >= train.max_nonfinite:
            raise UserError(
                f"{what}; {self.count} steps have been left out before it, and train.max_nonfinite allows"
                f" {train.max_nonfinite}; {fix}"
            )
        self.count += 1
        self.say(f"{what}; the step is left out, {self.count} of at most {train.max_nonfinite} (rows in {rows})")

    def _dump(self, step: int, pairs: list[int]) -> None:
        """Put the texts of a step's pairs into nonfinite.jsonl; a step done again replaces its own lines."""
        path, decode = self.setup.run / "nonfinite.jsonl", self.setup.tokenizer.decode
        lines = [line for line in read_records(path)[0] if line.get(self.stage) != step]
        for pair in (self.setup.train_pairs[i] for i in pairs):
            texts = {name: decode(getattr(pair, f"{name}_ids").tolist()) for name in ("prompt", "chosen", "rejected")}
            lines.append({self.stage: step, "rows": self.setup.name_rows([pair.pair_id])} | texts)
        write_records(path, lines)
