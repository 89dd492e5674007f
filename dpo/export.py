"""python -m dpo export RUN: the weights of a run as a folder to hand on.

From final/, or from a checkpoint of a run that is not finished; an adapter as it is, or merged into its base. What is
written is plain Hugging Face form (safetensors under the base's names, tokenizer, generation config), as transformers,
peft, vLLM and llama.cpp's converter read it. Everything happens on the CPU of one process.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from dpo.commandline import config_of
from dpo.config import Config, to_dict
from dpo.errors import UserError
from dpo.model import adapters, load
from dpo.report.card import model_card
from dpo.run import roles
from dpo.run.inputs import changed_weights
from dpo.run.prepare import model_and_tokenizer
from dpo.runtime import checkpoint
from dpo.runtime.distributed import World
from dpo.runtime.folders import publish
from dpo.runtime.run_directory import versions
from dpo.runtime.tracking import read_lines
from dpo.runtime.universal import trained_weights
from dpo.runtime.weights import full_state
from dpo.training.export import dtype_of


@dataclass(frozen=True)
class Options:
    """What to export, and where to."""

    run: str
    """Run directory."""
    to: str | None = None
    """Folder to write; default: RUN/export, or RUN/merged, with the checkpoint's name behind it if one is given."""
    merge: bool = False
    """Add the adapter of a LoRA run to the weights beneath it: one plain model."""
    checkpoint: int | str | None = None
    """Checkpoint to take: its optimizer step, its name such as step-000500, or best: by validation accuracy. Default:
    final/."""
    dtype: Literal["fp16", "bf16", "fp32"] | None = None
    """Of the weights; default: train.export_dtype of the run. Digits that final/ does not have come from a checkpoint
    alone."""


def export_run(options: Options) -> Path:
    """Write the weights of a run as a folder.

    Args:
        options: As given on the command line.
    Returns:
        The folder.
    Raises:
        UserError: If there is no such run, checkpoint or final/, nothing to merge, or the folder exists.
    """
    run = Path(options.run)
    config = config_of(run)
    if options.dtype is not None:
        config = replace(config, train=replace(config.train, export_dtype=options.dtype))
    adapted = roles.trains_adapters(config)
    if options.merge and not adapted:
        raise UserError(f"--merge true: {run} trained all weights and has no adapter to merge; leave it out")
    source = _source(run, options.checkpoint)
    ending = "" if options.checkpoint is None else f"-{source.name}"
    target = Path(options.to or run / (("merged" if options.merge else "export") + ending))
    if target.exists():
        raise UserError(f"--to {target} exists already; name another folder, or remove it")

    def write(folder: Path) -> None:
        if options.checkpoint is None and not options.merge and options.dtype is None:
            shutil.copytree(source, folder, dirs_exist_ok=True)
            return
        _write(config, run, source, folder, merge=options.merge, adapted=adapted)
        if options.checkpoint is None and not options.merge:
            shutil.copy(source / "README.md", folder)
            return
        is_adapter = adapted and not options.merge
        lines = read_lines(run)
        facts = {"merged": "a LoRA adapter, into the weights beneath it"} if options.merge else {}
        if options.checkpoint is not None:
            step = int(source.name.removeprefix("step-"))
            lines = [line for line in lines if line.get("step", 0) <= step]
            facts["checkpoint"] = f"after {step} optimizer steps of {config.train.global_batch_size} pairs"
        made_with = versions("peft") if adapted else versions()
        card = model_card(to_dict(config), lines, made_with, facts, adapter=is_adapter)
        (folder / "README.md").write_text(card, encoding="utf-8")

    publish(target, write, World(0, 1, 0, torch.device("cpu")))
    return target


def _source(run: Path, wanted: int | str | None) -> Path:
    """The folder that holds the weights: final/, or a checkpoint."""
    if wanted == "best":
        best = checkpoint.best_of(run, checkpoint.checkpoints(run))
        if best is None:
            raise UserError(f"--checkpoint best: no step of {run} was both evaluated and saved; name one by its number")
        return best
    if wanted is not None:
        name = wanted if isinstance(wanted, str) else checkpoint.step_folder(wanted)
        there = [folder.name for folder in checkpoint.checkpoints(run)]
        if name not in there:
            steps = ", ".join(str(int(name.removeprefix("step-"))) for name in there) or "none"
            raise UserError(f"--checkpoint {wanted}: {run} has no such checkpoint; it has {steps}")
        return run / "checkpoints" / name
    if not (run / "final").is_dir():
        raise UserError(f"{run} has no final/ yet; name a checkpoint by --checkpoint STEP, or let the run finish")
    return run / "final"


def _write(config: Config, run: Path, source: Path, folder: Path, *, merge: bool, adapted: bool) -> None:
    if adapted and (changed := changed_weights(config, run)):
        raise UserError(f"{' and '.join(changed)} has changed since {run} was trained on it; put its weights back")
    model_config, tokenizer = model_and_tokenizer(config)
    dtype = dtype_of(config, load.starting_dtype(model_config))
    model = _model(config, source, adapted=adapted)
    if adapted and not merge:
        state = full_state(model, dtype, keep=True, trained_only=True)
        adapters.save(model, state, tokenizer, folder)
        return
    if merge:
        adapters.merge(model)
    load.save_folder(model, full_state(model, dtype, keep=True), dtype, tokenizer, folder)


def _model(config: Config, source: Path, *, adapted: bool) -> Any:
    """The policy with the weights of final/ or of a checkpoint, in fp32, lest a merge be rounded more than once."""
    settings = config.model
    assert settings.policy is not None
    base, revision = adapters.base_of(settings.policy, settings.revision)
    whole = source if source.name == "final" and not adapted else source / checkpoint.WEIGHTS
    if whole.is_dir():
        base, revision = str(whole), None
    model = load.load_model(
        base, dtype=torch.float32, seed=config.train.seed, revision=revision,
        trust_remote_code=settings.trust_remote_code,
    )
    if whole.is_dir():
        return model
    if source.name == "final":
        adapters.take_up(model, str(source))
        return model
    if adapters.is_adapter(settings.policy):
        adapters.take_up(model, settings.policy)
    elif adapted:
        adapters.add(model, settings.lora, seed=config.train.seed, base=base, revision=revision)
    weight_of = trained_weights(source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or not adapted:
                parameter.copy_(weight_of(f"model.{name}"))
    return model
