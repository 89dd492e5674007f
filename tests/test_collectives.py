"""The counter of benchmarks/collectives.py; what DeepSpeed's steps send is in tests/invariants/test_scheduling.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.collectives import HEADING, Collectives, Count, counted, rows_of
from dpo.runtime import distributed
from dpo.runtime.deepspeed_json import read_json

ROOT = Path(__file__).resolve().parents[1]


def test_every_collective_of_a_thread_is_noted_with_the_bytes_of_its_whole_tensor() -> None:
    distributed.start()
    with Collectives() as collectives:
        torch.distributed.all_reduce(torch.zeros(5))
        torch.distributed.reduce(torch.zeros(3, dtype=torch.bfloat16), 0)
        torch.distributed.all_gather_single(torch.zeros(4), torch.zeros(4))
        torch.zeros(9).sum()
    assert collectives.found == [("allreduce_", 20), ("reduce_", 6), ("_allgather_base_", 16)]


def test_bytes_are_those_of_a_ring_and_flags_are_counted_apart() -> None:
    found = [("allreduce_", 8000), ("reduce_", 8000), ("_allgather_base_", 16000), ("allreduce_", 4)]
    assert counted(found, 4, 16000, 0.5) == Count(2, 1, 1, (2 + 1) * 0.75 * 0.5, 0.75, 0.5)


def test_an_unknown_collective_is_an_error_and_not_nothing() -> None:
    with pytest.raises(KeyError, match="alltoall"):
        counted([("alltoall_", 8000)], 2, 8000, 0.0)


def test_the_table_has_a_cell_under_every_heading() -> None:
    (row,) = rows_of({"ZeRO-1": {3: Count(1, 1, 2, 1.0, 0.5, 0.0023)}})
    assert dict(zip(HEADING, row, strict=True))["error"] == "2.3e-03"


def test_without_a_json_a_run_has_the_settings_of_zero2() -> None:
    assert read_json(None) == json.loads((ROOT / "ds_configs/zero2.json").read_text())
