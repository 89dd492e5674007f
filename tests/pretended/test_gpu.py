"""A GPU that is only a name: what would mix devices, wait, or need more memory than planned shows without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What micro_batches.py wrote, in a process that knows the device before it imports torch."""
    folder, home = tmp_path_factory.mktemp("pretended"), Path(torch.__file__).parent
    library = folder / "device.so"
    build = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{home}/include", str(HERE / "device.cpp"), "-o", str(library)]
    subprocess.run([*build, f"-L{home}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home}/lib"], check=True)
    command = [sys.executable, str(HERE / "micro_batches.py"), str(library), str(folder / "seen.json")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "seen.json").read_text())


def test_no_micro_batch_mixes_devices_or_waits_for_the_gpu(seen):
    """Layouts, kernels, dtypes, every loss of a pair's own log-probs, LoRA, recomputed activations, long pairs."""
    assert len(seen["waits"]) > 40
    assert {name: said for name, said in seen["waits"].items() if said} == {}


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("item", "_local_scalar_dense"),
        ("mask", "nonzero"),
        ("copy", "between cpu and cuda"),
        ("upload", "between cpu and cuda"),
        ("mixed", "found at least two devices"),
    ],
)
def test_a_wait_and_a_mixture_of_devices_would_be_seen(mistake, said, seen):
    assert said in seen["mistakes"][mistake]


@pytest.mark.parametrize("early", ["", "-in_forward"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_plan_names_the_memory_that_a_micro_batch_allocates(family, early, seen):
    parts = seen["memory"][family + early]
    planned = parts["planned"] + parts["gradient of the head"]
    assert planned == pytest.approx(parts["peak"], rel=0.03)
    again = seen["memory"][f"{family}-recompute{early}"]  # recomputed, tile and block are not there at once
    planned = max(again["planned"] + again["gradient of the head"], again["gradients"])
    assert 1.0 < planned / again["peak"] < 1.4
