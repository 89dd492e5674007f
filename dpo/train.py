"""The training run: setup -> SFT -> DPO -> what it leaves behind.

A line of metrics.jsonl with `step: n` reports the forward passes made before the n-th update, so line 1 shows the
start. Evaluations follow the update they name; the one at the start is step 0.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dpo.commandline import Command
from dpo.config import to_dict
from dpo.data.loader import StepBatches, whole_pass
from dpo.errors import UserError
from dpo.evaluate import evaluate
from dpo.export import final_dtype, write_weights
from dpo.finish import closing, take_samples
from dpo.model.forward import pair_logps
from dpo.model.load import fetch_weights
from dpo.model.reference import remembered
from dpo.objective.losses import Loss, make_loss
from dpo.objective.metrics import averages, sums
from dpo.plan import show_plan
from dpo.policy import FrozenReference, Policy, start_models
from dpo.report import model_card
from dpo.runtime import checkpoint, distributed
from dpo.runtime import engine as deepspeed_engine
from dpo.runtime.checkpoint import TrainState
from dpo.runtime.schedule import learning_rate
from dpo.runtime.tracking import Recorder, Silent, Tracker, keep_lines, read_lines
from dpo.setup import Setup, prepare
from dpo.sft import run_sft
from dpo.start import check_start
from dpo.types import PackedBatch


@dataclass
class Meter:
    """What has happened since the last line of metrics.jsonl.

    Attributes:
        totals: (10,) fp64 on the device: metric sums and pairs, tokens of the forward passes, padding among them.
        pairs, tokens: Over all ranks.
        seconds: Of training alone: evaluations and checkpoints are not counted.
    """

    totals: torch.Tensor
    pairs: int = 0
    tokens: int = 0
    seconds: float = 0.0
    grad_norm: float | None = field(default=None)

    def carried(self) -> tuple[float, ...]:
        """What a checkpoint must hold for the next line to be whole: empty right after a line; collective."""
        if self.pairs == 0:
            return ()
        return (*distributed.sum_over_ranks(self.totals.clone()).tolist(), self.pairs, self.tokens, self.seconds)

    def take_up(self, carried: tuple[float, ...], is_main: bool) -> None:
        """Go on from what a checkpoint held; rank 0 carries the sums of all."""
        if carried:
            *totals, pairs, tokens, self.seconds = carried
            self.pairs, self.tokens = int(pairs), int(tokens)
            if is_main:
                self.totals += self.totals.new_tensor(totals)

    def line(self, device: torch.device) -> dict[str, float | None]:
        """Means over all ranks' pairs, and speed; one all-reduce; the meter is empty afterwards."""
        *_, forward_tokens, padding = (totals := distributed.sum_over_ranks(self.totals)).tolist()
        values: dict[str, float | None] = dict(averages(totals[:8]))
        values |= {
            "grad_norm": self.grad_norm,
            "perf/pairs_per_second": self.pairs / self.seconds,
            "perf/tokens_per_second": self.tokens / self.seconds,
            "perf/padding_fraction": padding / forward_tokens,
            "perf/peak_memory_gib": _peak_memory_gib(device),
        }
        self.totals.zero_()
        self.pairs = self.tokens = 0
        self.seconds = 0.0
        return values


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _due(step: int, every: int | str, steps_per_epoch: int, total: int) -> bool:
    """Whether something that happens every `every` steps, or every epoch, is due after `step` steps."""
    return step == total or step % (steps_per_epoch if every == "epoch" else int(every)) == 0


def train(command: Command) -> None:
    """Run what a command line asks for, from the first line of data to the final folder; collective.

    Args:
        command: Parsed command line.
    Raises:
        UserError: The same line on every rank.
    """
    began = time.perf_counter()
    config = command.config
    world = distributed.start()
    checkpoint.check_run(config, world)
    setup = prepare(config, world, command.deepspeed_json, for_elsewhere=command.prepare_only)
    if command.prepare_only:
        distributed.main_first(world, lambda: fetch_weights(config.model.policy or "", revision=config.model.revision))
        show_plan(setup, command)
        return
    sft_is_done = distributed.only_main(world, lambda: (setup.run / "reference").is_dir())
    start = str(setup.run / "reference") if config.train.sft_epochs else config.model.policy
    assert start is not None
    if command.dry_run:
        # Online, whatever the mode: a look at the plan should not score the whole data set.
        online = replace(config, reference=replace(config.reference, mode="online"))
        setup = replace(setup, config=online)
        policy, reference = start_models(setup, config.model.policy or start, lambda note: None)
        show_plan(setup, command, policy, reference)
        return
    if done := distributed.only_main(world, lambda: checkpoint.finished(setup.run, setup.total_steps)):
        if world.is_main:
            print(done, file=sys.stderr)
        return
    folder = checkpoint.newest(
        setup.run,
        config.train.resume,
        world,
        stage=deepspeed_engine.zero_stage(setup.engine_config),
        total_steps=setup.total_steps,
    )
    checkpoint.open_run(config, world)
    tracker = _tracker(setup)
    for note in _greeting(command) + list(setup.notes):
        tracker.say(note)
    if config.train.sft_epochs and not sft_is_done:
        _keep(setup, lambda line: False)
        run_sft(setup, tracker)
    policy, reference = start_models(setup, start, tracker.say)
    state = _resume(setup, policy, folder, tracker)
    state = _train_dpo(setup, policy, reference, state, tracker)
    card = model_card(to_dict(config), read_lines(setup.run), checkpoint.versions()) if world.is_main else None
    write_weights(setup, policy, setup.run / "final", final_dtype(setup), card)
    closing(setup, tracker, time.perf_counter() - began)
    tracker.close()


def _greeting(command: Command) -> list[str]:
    if not command.assumed_quickstart:
        return []
    return [
        f"neither --recipe nor model.policy nor data.train is given: running {command.recipe} (built-in data, built-in"
        f" tiny model, no network); for GPT-2 on Anthropic HH-RLHF: --recipe recipes/gpt2_hh.yaml"
    ]


def _tracker(setup: Setup) -> Tracker:
    config = setup.config
    if not setup.world.is_main:
        return Silent()
    return Recorder(setup.run, to_dict(config), config.log.backends)


def _keep(setup: Setup, keep: Callable[[dict[str, Any]], bool]) -> None:
    distributed.only_main(setup.world, lambda: keep_lines(setup.run, keep))


def _resume(setup: Setup, policy: Policy, folder: Path | None, tracker: Tracker) -> TrainState:
    """Bring the engine to a checkpoint, if there is one, and metrics.jsonl to the same step."""
    state = checkpoint.load(policy.engine, folder, setup.world) if folder is not None else TrainState()
    if folder is not None:
        tracker.say(f"continuing from {folder} after step {state.step}")
    _keep(setup, lambda line: "sft_step" in line or (folder is not None and line["step"] <= state.step))
    return state


def _train_dpo(
    setup: Setup, policy: Policy, reference: FrozenReference, state: TrainState, tracker: Tracker
) -> TrainState:
    """The DPO stage from `state` to the last step."""
    config, world, total = setup.config, setup.world, setup.total_steps
    loss = make_loss(config.loss.name, config.loss.beta, config.loss.label_smoothing)
    loader = setup.loader(setup.train_pairs, policy.layout)
    per_epoch = setup.epochs.steps_per_epoch
    validation: list[PackedBatch] = []
    if setup.validation_pairs is not None:
        validation = whole_pass(setup.loader(setup.validation_pairs, policy.layout))
    known_reference = remembered(reference.validation)

    def evaluate_after(step: int) -> None:
        if validation:
            metrics = evaluate(policy.score, known_reference, validation, loss, world.device)
            tracker.record({"step": step, "epoch": step / per_epoch} | metrics)
            tracker.say(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items() if "logps" not in k))

    if state.step == 0:
        check_start(setup, policy, reference, loss, loader[0].batches, tracker)
        evaluate_after(0)
    meter = Meter(torch.zeros(10, dtype=torch.float64, device=world.device))
    meter.take_up(state.unlogged, world.is_main)
    for work in loader.steps(state.step, total):
        lr = learning_rate(
            work.step, total=total, peak=config.optim.lr, schedule=config.optim.schedule,
            warmup_steps=config.optim.warmup_steps,
        )
        _step(setup, policy, reference, loss, work, lr, meter)
        step = work.step + 1
        state = TrainState(step, state.num_tokens + work.num_tokens)
        if step % config.log.every == 0 or step == total:
            values = meter.line(world.device) | {"learning_rate": lr, "num_tokens": state.num_tokens}
            tracker.record({"step": step, "epoch": step / per_epoch} | values)
            note = (
                f"loss {values['loss']:.4f}  accuracy {values['rewards/accuracies']:.3f}"
                f"  margin {values['rewards/margins']:.3f}  {values['perf/pairs_per_second']:.1f} pairs/s"
            )
            tracker.progress("DPO", step, total, note)
        if _due(step, config.train.eval_every, per_epoch, total):
            evaluate_after(step)
        if config.log.samples and _due(step, _sample_every(config.log.sample_every, total), per_epoch, total):
            take_samples(setup, policy, reference, step)
        if _due(step, config.train.save_every, per_epoch, total):
            whole = replace(state, unlogged=meter.carried())
            checkpoint.save(policy.engine, setup.run, whole, world, config.train.keep_checkpoints)
    return state


def _sample_every(every: int | str, total: int) -> int | str:
    return total if every == "end" else every


def _step(
    setup: Setup,
    policy: Policy,
    reference: FrozenReference,
    loss: Loss,
    work: StepBatches,
    lr: float,
    meter: Meter,
) -> None:
    """One optimizer step: the mean loss over the pairs of the global batch.

    Raises:
        UserError: If a loss is not finite on any rank; then no rank steps.
    """
    world, started = setup.world, time.perf_counter()
    losses = []
    for index, batch in enumerate(work.batches):
        meter.totals[8] += batch.input_ids.numel()
        meter.totals[9] += batch.num_padding_tokens
        on_device = batch.to(world.device)
        reference_logps = reference.train(on_device)
        policy_logps = pair_logps(policy.score, on_device)
        output = loss(policy_logps, reference_logps)
        scaled = output.losses.sum() * world.world_size / work.num_pairs
        deepspeed_engine.backward(policy.engine, scaled, index == len(work.batches) - 1)
        meter.totals[:8] += sums(output, policy_logps)
        losses.append(output.losses.detach())
    if distributed.any_rank(~torch.cat(losses).isfinite().all()):
        _stop_at(setup, work, losses)
    meter.grad_norm = deepspeed_engine.step(policy.engine, lr)
    meter.pairs += work.num_pairs
    meter.tokens += work.num_tokens
    meter.seconds += time.perf_counter() - started


def _stop_at(setup: Setup, work: StepBatches, losses: list[torch.Tensor]) -> None:
    """End the run on every rank, naming the pairs whose loss is not finite."""
    bad = [
        setup.train_pairs.row_numbers[pair]
        for batch, values in zip(work.batches, losses, strict=True)
        for pair, value in zip(batch.pair_ids, values.tolist(), strict=True)
        if not math.isfinite(value)
    ]
    rows = distributed.gather([int(row) for row in bad])
    named = ", ".join(map(str, sorted(sum(rows, []))[:10]))
    raise UserError(
        f"step {work.step + 1}: the loss is not finite for rows {named} of {setup.config.data.train}; no step was taken"
        f" and the checkpoints are whole; look at these rows, lower optim.lr, or use bf16 or fp32"
    )
