"""A GPU that is only a name: what would mix devices, wait, or need more memory than planned shows without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What micro_batches.py wrote, in a process that knows the device before it imports torch."""
    out, script = tmp_path_factory.mktemp("pretended") / "seen.json", Path(__file__).with_name("micro_batches.py")
    done = subprocess.run(
        [sys.executable, "-m", "tests.pretended.gpu", str(script), str(out)], cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


def test_no_micro_batch_mixes_devices_waits_for_the_gpu_or_rounds_its_logits(seen):
    """Layouts, kernels, dtypes, every loss of a pair's own log-probs, LoRA, recomputed activations, long pairs."""
    assert len(seen["waits"]) > 40
    assert {name: said for name, said in seen["waits"].items() if said} == {}


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("item", "_local_scalar_dense"),
        ("mask", "nonzero"),
        ("copy", "from cuda to cpu"),
        ("number", "from cuda to cpu"),
        ("backward", "from cuda to cpu"),
        ("rounded", "logits in 16 bits"),
        ("upload", "from cpu to cuda"),
        ("mixed", "found at least two devices"),
    ],
)
def test_what_no_micro_batch_does_would_be_seen(mistake, said, seen):
    assert said in seen["mistakes"][mistake]


@pytest.mark.parametrize("early", ["", "-in_forward"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "llama_mha"])
def test_a_plan_names_the_memory_that_a_micro_batch_allocates(family, early, seen):
    kept, recomputed = seen["memory"][family + early], seen["memory"][f"{family}-recompute{early}"]
    assert kept["planned"] == pytest.approx(kept["peak"], rel=0.03)
    assert recomputed["planned"] < 1.4 * recomputed["peak"]  # tile and block are not there at once
    assert recomputed["peak"] < recomputed["planned"] + recomputed["gradients"]
