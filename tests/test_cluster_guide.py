"""Commands of the cluster guide are ones that the programs take."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dpo.commandline import parse

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines() if line.strip()
]
TRAINING = [line for line in COMMANDS if "train_dpo.py" in line or "slurm/dpo.sh" in line]


def test_the_guide_has_a_command_for_every_launcher():
    assert {shlex.split(line)[0] for line in TRAINING} == {"python", "torchrun", "deepspeed", "sbatch"}
    assert len(COMMANDS) == len(TRAINING) + 3


@pytest.mark.parametrize("line", TRAINING)
def test_a_training_command_of_the_guide_parses(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = parse(re.split(r"(?:train_dpo\.py|slurm/dpo\.sh) ", line)[1].split())
    assert command.config.train.output_dir in ("runs/gpt2_hh", "runs/node", "runs/nodes")
    assert (command.dry_run, command.prepare_only) == ("--dry_run" in line, "--prepare_only" in line)


def test_the_pages_and_files_that_the_guide_names_exist():
    for page in re.findall(r"\]\(([\w.]+\.md)\)", TEXT):
        assert (ROOT / "docs" / page).is_file()
    for path in re.findall(r"(?:ds_configs|recipes|slurm)/[\w.]+\w", TEXT):
        assert path == "slurm/env.sh" or (ROOT / path).is_file(), path
