"""The reference's scores of a data set, computed once and kept on disk.

    <cache>/reference/<key>/scores-000000.npy ...   (pairs of the chunk, 2) fp32: chosen, rejected, nats
    <cache>/reference/<key>/manifest.json           written last: what the scores depend on

The key is the hash of everything they depend on: the weights themselves (not their name), the token ids, dtype, layout,
attention path and the version of this format. Every rank scores its share of a chunk; a chunk is written whole or not
at all, so a killed build goes on with the next chunk. Whoever opens a finished cache scores a few pairs again first.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpo.data.loader import Loader
from dpo.data.mixture import Pairs
from dpo.errors import UserError
from dpo.model.check import TOLERANCE, counted_tokens
from dpo.model.forward import pair_logps
from dpo.runtime import heartbeat, preemption
from dpo.runtime.distributed import World, only_main, sum_over_ranks
from dpo.runtime.files import write_whole
from dpo.types import PackedBatch

VERSION = 2
CHUNK = 4096
"""Pairs between two writes; what a killed build loses at most."""
SAMPLE = 64
"""Pairs scored again when a cache is opened, and at least one of every chunk."""

Score = Callable[[PackedBatch], Tensor]


def tokens_fingerprint(pairs: Pairs) -> str:
    """Hash of every token id, of how the pairs are cut, and of what in them is not scored."""
    digest = hashlib.sha256(np.ascontiguousarray(pairs.lengths).tobytes())
    for part in pairs.parts:
        digest.update(part.tokens.data)
        digest.update(part.unscored.data)
    return digest.hexdigest()


def manifest_of(weights: str, pairs: Pairs, dtype: torch.dtype, layout: str, how: str) -> dict[str, object]:
    """What scores depend on.

    Args:
        weights: Fingerprint of the reference's weights.
        pairs: The data set.
        dtype: Of the reference.
        layout: Of the batches it scores.
        how: Names of the attention path, of the head where it is the model's own, of other products than PyTorch's,
            and what loss.ld_alpha makes of tokens.
    Returns:
        Part -> value; the key of the cache is the hash of it all.
    """
    return {
        "weights": weights,
        "tokens": tokens_fingerprint(pairs),
        "pairs": len(pairs),
        "dtype": str(dtype).removeprefix("torch."),
        "layout": layout,
        "attention": how,
        "version": VERSION,
    }


def folder_of(cache: Path, manifest: dict[str, object]) -> Path:
    """Where the scores of a manifest are kept."""
    return cache / "reference" / hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:32]


def check_manifest(folder: Path, manifest: dict[str, object]) -> bool:
    """Whether a folder holds the finished scores of a manifest.

    Raises:
        UserError: If it holds those of something else, naming what differs.
    """
    path = folder / "manifest.json"
    if not path.exists():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        found = {}
    wrong = [name for name, value in manifest.items() if found.get(name) != value]
    if wrong:
        raise UserError(
            f"reference cache {folder} is of another {' and '.join(wrong)}; delete the folder to have it made again"
        )
    return True


@torch.no_grad()
def _score_pairs(score: Score, loader: Loader, pair_ids: list[int], world: World) -> Tensor:
    """(len(pair_ids), 2) fp32 on the CPU: scores of the pairs, every rank doing its share; collective."""
    device, place = world.device, {pair_id: row for row, pair_id in enumerate(pair_ids)}
    scores = torch.zeros(len(pair_ids), 2, dtype=torch.float32, device=device)
    share, found = loader.share_of(pair_ids), []
    for ids in share:
        batch = loader.build(ids)  # while the device is at the one before
        preemption.check(device)
        logps = pair_logps(score, batch.to(device))
        found.append(torch.stack((logps.chosen, logps.rejected), dim=1).float())
    rows = torch.tensor([place[i] for ids in share for i in ids], dtype=torch.int64, device=device)
    if found:
        scores[rows] = torch.cat(found)
    ranks_a_row = world.world_size // loader.world_size
    return sum_over_ranks(scores if world.rank % ranks_a_row == 0 else torch.zeros_like(scores)).cpu()


def cached_scores(
    score: Score, loader: Loader, manifest: dict[str, object], cache: Path, world: World, say: Callable[[str], None]
) -> Tensor:
    """The reference's scores of a data set, from disk or computed now; collective.

    Args:
        score: Scorer or engine of the reference.
        loader: Over the data set.
        manifest: Of these scores.
        cache: Folder of all caches.
        world: This rank.
        say: Shows a line.
    Returns:
        (n, 2) fp32 on the CPU: summed log-probs of chosen and rejected, nats, by pair id.
    Raises:
        UserError: If the cache is of something else or does not agree with the reference.
    """
    folder = folder_of(cache, manifest)
    count = len(loader.dataset)
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    finished = only_main(world, lambda: check_manifest(folder, manifest))
    done = only_main(world, lambda: [_chunk_file(folder, c).exists() for c in range(len(chunks))])
    for number, (ids, is_done) in enumerate(zip(chunks, done, strict=True)):
        if not is_done:
            heartbeat.at(f"scoring pairs {ids.start} to {ids.stop - 1} for the reference cache")
            scores = _score_pairs(score, loader, list(ids), world).numpy()
            only_main(world, partial(_write_chunk, _chunk_file(folder, number), scores))
            say(f"reference scores: {ids.stop:,} of {count:,} pairs")
    if not finished:
        only_main(world, lambda: write_whole(folder / "manifest.json", json.dumps(manifest, indent=1)))
    values = only_main(world, lambda: np.concatenate([_read_chunk(folder, c, len(r)) for c, r in enumerate(chunks)]))
    known = torch.from_numpy(values)
    if finished:
        again = sample_of(chunks)
        _verify(score, loader, known, again, folder, world, getattr(torch, str(manifest["dtype"])))
        say(f"reference scores: {count:,} pairs from {folder}, {len(again)} of them scored again and equal")
    return known


def sample_of(chunks: Sequence[range]) -> list[int]:
    """Pair ids drawn at random from every chunk, SAMPLE in all or one a chunk; the same on all ranks."""
    rng = np.random.default_rng(sum(map(len, chunks)))
    each = math.ceil(SAMPLE / max(1, len(chunks)))
    return [int(i) for ids in chunks for i in sorted(rng.permutation(len(ids))[:each] + ids.start)]


def _verify(
    score: Score, loader: Loader, known: Tensor, ids: list[int], folder: Path, world: World, dtype: torch.dtype
) -> None:
    """Score some pairs again and compare; collective."""
    again = _score_pairs(score, loader, ids, world)
    gaps = (again - known[ids]).abs() / counted_tokens(torch.from_numpy(loader.dataset.targets[ids]), dtype)
    worst = float(gaps.max())
    if not worst <= TOLERANCE[dtype]:
        pair = ids[int(gaps.max(dim=1).values.argmax())]
        raise UserError(
            f"reference cache {folder} does not agree with the reference: pair {pair} differs by {worst:.3g} nats a"
            f" token; delete the folder to have it made again"
        )


def _chunk_file(folder: Path, number: int) -> Path:
    return folder / f"scores-{number:06d}.npy"


def _write_chunk(path: Path, scores: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.partial")
    with open(unfinished, "wb") as stream:
        np.save(stream, scores)
    os.replace(unfinished, path)


def _read_chunk(folder: Path, number: int, pairs: int) -> np.ndarray:
    path = _chunk_file(folder, number)
    try:
        scores = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"reference cache {path} cannot be read ({error}); delete its folder") from None
    if scores.shape != (pairs, 2) or not np.isfinite(scores).all():
        raise UserError(f"reference cache {path} is damaged; delete its folder to have it made again")
    return scores

