"""A checkpoint of other ranks or of another ZeRO stage, in DeepSpeed's universal form, which any of them loads.

    zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt     a whole parameter, put together from the shares of all ranks
    zero/optimizer_state.pt                         what the engine holds once: loss scale
    *_model_states.pt                               counters

DeepSpeed's own converter serves neither ZeRO-2 to 3 nor 3 to 2 (0.19.8: AdamW's steps are not where the other stage
looks for them), and writes every share to the disk twice. Its loader is used, and two faults of it under ZeRO-3 are
avoided: hyperparameters of the first group would be given to all, so none are written, and one step counter would be
shared by all groups, so each gets its own afterwards.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo.errors import UserError
from dpo.runtime.distributed import World, only_main, together
from dpo.runtime.engine import deepspeed_logger
from dpo.runtime.weights import without_code

WEIGHT, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
GIB = 2**30


def differs(values: dict[str, Any], world: World, stage: int) -> bool:
    """Whether the shares of a checkpoint are not those of this start; without ZeRO every rank holds everything.

    Args:
        values: Its state.json.
        world: This rank.
        stage: ZeRO stage of this start.
    """
    return stage > 0 and (values["world_size"], values["zero_stage"]) != (world.world_size, stage)


def conversion(values: dict[str, Any], world: World, stage: int) -> str:
    """What is told of a checkpoint that `differs`."""
    old = f"{values['world_size']} ranks under ZeRO-{values['zero_stage']}"
    return f"was written by {old}; it is converted to {world.world_size} under ZeRO-{stage}"


def check_convertible(folder: Path, values: dict[str, Any], world: World, stage: int) -> None:
    """Refuse a checkpoint that another start cannot take up; arguments as of `differs`.

    Raises:
        UserError: If one of the two is without ZeRO, or its optimizer is on NVMe.
    """
    old, ranks = values["zero_stage"], values["world_size"]
    if (old == 0) != (stage == 0):
        raise UserError(
            f"checkpoint {folder} was written under ZeRO-{old}, this is ZeRO-{stage}; give a --config of"
            f" {'stage 0' if old == 0 else 'stage 1, 2 or 3'}"
        )
    if differs(values, world, stage) and (folder / "offloaded_tensors").exists():
        raise UserError(
            f"checkpoint {folder} holds an optimizer that {ranks} ranks kept on NVMe; start as many under ZeRO-{old}"
        )


def _read(path: Path) -> dict[str, Any]:
    with without_code(path.parent):
        return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)


class Shards:
    """Trained parameters of a checkpoint, whole, one at a time; files are mapped, not read at once.

    Attributes:
        shapes: Name within the engine's module -> shape.
        steps: AdamW steps done, as the optimizer counts them.
        scaler: What DeepSpeed keeps of the loss scale.
        counters: Of the engine, and its version.
    """

    def __init__(self, folder: Path, world_size: int, stage: int, *, moments: bool = True) -> None:
        """Open the files that `world_size` ranks wrote under ZeRO-`stage`, with AdamW's moments or without."""
        self._folder, self._moments = folder, moments
        ranks = [next(folder.glob(f"*zero_pp_rank_{r}_mp_rank_00_optim_states.pt"), None) for r in range(world_size)]
        models = sorted(folder.glob("*_model_states.pt"))
        if None in ranks or not models:
            raise UserError(f"checkpoint {folder} lacks files of {world_size} ranks; delete it to use the one before")
        model = _read(models[0])
        groups = model["param_shapes"]
        self.shapes: dict[str, torch.Size] = {name: shape for group in groups for name, shape in group.items()}
        self.counters = {key: model[key] for key in ("global_steps", "global_samples", "skipped_steps", "ds_version")}
        self._pieces: dict[str, list[tuple[dict[str, Tensor], int, int]]] = {name: [] for name in self.shapes}
        for path in ranks:
            state = _read(path)["optimizer_state_dict"]  # type: ignore[arg-type]
            self.scaler = {k: state[k] for k in ("loss_scaler", "dynamic_loss_scale", "overflow") if k in state}
            if stage == 3:
                self._add_stage3(state, groups, world_size)
            else:
                self._add_lower(state)

    def _flat(self, weights: Tensor, state: dict[str, Any]) -> dict[str, Tensor]:
        """One rank's share of a group: weights and moments, flat, under the same offsets; zeros before a first step."""
        if not self._moments:
            return {WEIGHT: weights}
        if state and not set(MOMENTS) <= state.keys():
            raise UserError(
                f"checkpoint {self._folder} holds {', '.join(sorted(state))} of its optimizer, not"
                f" {' and '.join(MOMENTS)}: only as many ranks and the ZeRO stage that wrote it can take it up; start"
                f" them"
            )
        return {WEIGHT: weights} | {key: state.get(key, torch.zeros_like(weights)) for key in MOMENTS}

    def _add_lower(self, state: dict[str, Any]) -> None:
        """ZeRO 1 and 2: a rank holds a range of every flat group, and where in it which parameter lies."""
        moments = state["base_optimizer_state"]["state"]
        for index, places in enumerate(state["param_slice_mappings"]):
            flat = self._flat(state["single_partition_of_fp32_groups"][index], moments.get(index, {}))
            self.steps = moments.get(index, {}).get("step", torch.tensor(0.0))
            for name, place in places.items():
                self._pieces[name].append((flat, place.start, place.numel))

    def _add_stage3(self, state: dict[str, Any], groups: list[dict[str, torch.Size]], world_size: int) -> None:
        """ZeRO-3: a rank holds an equal part of every parameter, the last one's end padded."""
        moments = state["optimizer_state_dict"]["state"]
        for index, shapes in enumerate(groups):
            flat = self._flat(state["fp32_flat_groups"][index], moments.get(index, {}))
            self.steps = moments.get(index, {}).get("step", torch.tensor(0.0))
            start = 0
            for name, shape in shapes.items():
                share = math.ceil(shape.numel() / world_size)
                self._pieces[name].append((flat, start, share))
                start += share

    def whole(self, name: str) -> dict[str, Tensor]:
        """A parameter and its moments, fp32, of its shape."""
        shape, found = self.shapes[name], {}
        for key in (WEIGHT, *MOMENTS) if self._moments else (WEIGHT,):
            joined = torch.cat([flat[key].narrow(0, start, count) for flat, start, count in self._pieces[name]])
            if joined.numel() < shape.numel():
                raise UserError(f"checkpoint {self._folder} lacks a part of {name}; delete it to use the one before")
            found[key] = joined[: shape.numel()].view(shape)
        return found

    def __iter__(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """All of them."""
        return ((name, self.whole(name)) for name in self.shapes)


def trained_weights(folder: Path) -> Callable[[str], Tensor]:
    """Weights of a checkpoint, put together from the files of all its ranks one at a time; needs no engine.

    Args:
        folder: As `checkpoint.save` wrote it, with an engine's state.
    Returns:
        Name within the engine's module -> weight in fp32 on the CPU, the master where there is one; frozen weights are
        not known to it.
    Raises:
        UserError: If the files are not those of such a checkpoint.
    """
    try:
        values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if values["zero_stage"] == 0:
            module = _read(folder / "mp_rank_00_model_states.pt")["module"]
            return lambda name: module[name].float()
        shards = Shards(folder, values["world_size"], values["zero_stage"], moments=False)
        return lambda name: shards.whole(name)[WEIGHT]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"checkpoint {folder} cannot be read: {' '.join(str(error).split())[:200]}") from None


def _check_disk(folder: Path, shapes: dict[str, torch.Size]) -> None:
    """Refuse to begin what will not fit."""
    needed = 12 * sum(shape.numel() for shape in shapes.values()) + 8192 * len(shapes)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"checkpoint {folder} was written by other ranks or under another ZeRO stage; to convert it takes"
            f" {needed / GIB:.3f} GiB, removed after loading, and {free / GIB:.3f} GiB are left; make room, or start"
            f" with the ranks and the stage that wrote it"
        )


def convert(folder: Path, out: Path, world_size: int, stage: int) -> None:
    """Write a checkpoint in the universal form; on one rank.

    Args:
        folder: The checkpoint.
        out: Appears whole; what is there is replaced.
        world_size, stage: Ranks and ZeRO stage that wrote the checkpoint.
    Raises:
        UserError: If the disk has too little room, or its optimizer is not AdamW with fp32 moments.
    """
    unfinished = out.with_name(f"partial-{out.name}")
    for old in (unfinished, out):
        shutil.rmtree(old, ignore_errors=True)
    shards = Shards(folder, world_size, stage)
    _check_disk(folder.parent, shards.shapes)
    (unfinished / "zero").mkdir(parents=True)
    for name, values in shards:
        place = unfinished / "zero" / name
        place.mkdir()
        for key, value in values.items():
            torch.save({"param": value}, place / f"{key}.pt")
        torch.save(shards.steps, place / "step.pt")
    # ZeRO-3 looks in optimizer_state_dict, the others in param_groups: of a group nothing is said.
    groups: list[dict[str, Any]] = [{} for _ in range(len(shards.shapes))]
    stage3 = {"state": {0: {"step": shards.steps}}, "param_groups": [{}]}
    once: dict[str, Any] = {"param_groups": groups, "optimizer_state_dict": stage3}
    once["ds_version"] = shards.counters["ds_version"]
    torch.save(shards.scaler | once, unfinished / "zero" / "optimizer_state.pt")
    model = shards.counters | {"module": {}, "dp_world_size": world_size, "mp_world_size": 1, "lr_scheduler": None}
    for prefix in ("", "zero_pp_rank_0_"):  # as ZeRO 1 and 2, and as ZeRO-3 looks for it
        torch.save(model, unfinished / f"{prefix}mp_rank_00_model_states.pt")
    unfinished.rename(out)


def load_converted(engine: Any, folder: Path, world: World, world_size: int, stage: int) -> bool:
    """Bring an engine to a checkpoint that other ranks or another ZeRO stage wrote; collective.

    Args:
        engine: Of `start_training`, under ZeRO 1, 2 or 3.
        folder: The checkpoint; stays as it is.
        world: This rank.
        world_size, stage: Ranks and ZeRO stage that wrote it.
    Returns:
        Whether there was anything to load.
    """
    out = folder.with_name(f"universal-{folder.name}")
    only_main(world, lambda: convert(folder, out, world_size, stage))
    level = deepspeed_logger.level
    engine._config.load_universal_checkpoint = True
    deepspeed_logger.setLevel(logging.ERROR)  # it warns that there is no tensor parallelism

    def load() -> bool:
        with without_code(out):
            return engine.load_checkpoint(str(out.parent), tag=out.name)[0] is not None

    try:
        loaded = together(load)  # nobody removes what another rank still reads
    finally:
        engine._config.load_universal_checkpoint = False
        deepspeed_logger.setLevel(level)
    for parameter, state in engine.optimizer.optimizer.state.items():
        state["step"] = state["step"].to(parameter.device, copy=True)
    only_main(world, lambda: shutil.rmtree(out))
    return loaded
