"""Bad input through the real command line: one clear line, printed once, exit code 2, nothing written, no hang."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch

import train_dpo
from dpo.config import OptimConfig
from dpo.runtime import engine, tracking
from tests import ranks
from tests.data.tiny_tokenizers import plain_rows, written

ROOT = Path(__file__).resolve().parents[1]
Case = Callable[[Path, Path], tuple[list[str], list[str]]]
"""(folder to prepare, policy) -> the arguments and what the line must name."""


def usual(folder: Path, policy: Path, rows: list[Any] | None = None) -> list[str]:
    """Arguments of a run that would work."""
    data = written(folder, plain_rows(20) if rows is None else rows)
    return [
        "--model.policy", str(policy), "--data.train", str(data), "--data.cache_dir", str(folder / "cache"),
        "--train.output_dir", str(folder / "run"), "--train.global_batch_size", "4",
    ]  # fmt: skip


def with_row(row: Any, *named: str) -> Case:
    def case(folder: Path, policy: Path) -> tuple[list[str], list[str]]:
        rows: list[Any] = plain_rows(20)
        rows[16] = row
        return usual(folder, policy, rows), [f"{folder}/train.jsonl", "row 17", *named]

    return case


def with_flags(flags: list[str], *named: str) -> Case:
    return lambda folder, policy: (usual(folder, policy) + flags, list(named))


def broken_json(folder: Path, policy: Path) -> tuple[list[str], list[str]]:
    argv = usual(folder, policy)
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[16] = lines[16][:-5]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return argv, [f"{folder}/train.jsonl row 17", "not valid JSON"]


def missing_file(folder: Path, policy: Path) -> tuple[list[str], list[str]]:
    argv = usual(folder, policy)
    (folder / "train.jsonl").unlink()
    return argv, [f"{folder}/train.jsonl", "no such file"]


def folder_without_data(folder: Path, policy: Path) -> tuple[list[str], list[str]]:
    (folder / "empty").mkdir()
    argv = usual(folder, policy) + ["--data.train", str(folder / "empty")]
    return argv, [f"{folder}/empty", "without data", ".jsonl"]


def other_run(folder: Path, policy: Path) -> tuple[list[str], list[str]]:
    argv = usual(folder, policy)
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("train: {seed: 7}\nloss: {beta: 0.5}\n")
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1}\n')  # it has begun
    return argv, [f"{folder}/run holds another run", "train.seed was 7, now 0", "loss.beta was 0.5, now 0.1"]


def other_files(folder: Path, policy: Path) -> tuple[list[str], list[str]]:
    argv = usual(folder, policy)
    (folder / "run").mkdir()
    (folder / "run" / "thesis.txt").write_text("mine")
    return argv, [f"{folder}/run holds other files"]


def json_config(content: str, *named: str) -> Case:
    def case(folder: Path, policy: Path) -> tuple[list[str], list[str]]:
        (folder / "ds.json").write_text(content)
        return usual(folder, policy) + ["--config", str(folder / "ds.json")], [f"{folder}/ds.json", *named]

    return case


PLAIN = plain_rows(1)[0]
CASES: dict[str, Case] = {
    "missing file": missing_file,
    "a folder without data": folder_without_data,
    "broken JSON": broken_json,
    "a row without rejected": with_row({"prompt": "x", "chosen": "y"}, "'rejected' is missing", "on_bad_row skip"),
    "a completion that is no text": with_row(PLAIN | {"chosen": 3}, "'chosen' is of type int"),
    "a row that is no object": with_row([1], "got list"),
    "an unknown key": with_flags(["--train.epochss", "3"], "unknown key train.epochss", "train.epochs?"),
    "a wrong type": with_flags(["--train.epochs", "many"], "train.epochs is many", "a whole number"),
    "beta 0": with_flags(["--loss.beta", "0"], "loss.beta is 0", "use a positive number"),
    "too long for the model": with_flags(["--data.max_length", "4096"], "data.max_length is 4096", "at most 128"),
    "fp16 on a CPU": with_flags(["--train.precision", "fp16"], "train.precision is fp16", "use bf16 or fp32"),
    "no model": with_flags(["--model.policy", ""], "model.policy is empty; give a hub id or a folder"),
    "no reference": with_flags(["--reference.path", ""], "reference.path is empty; give a hub id or a folder"),
    "no such model": with_flags(["--model.policy", "./none"], "model.policy ./none: no such folder"),
    "no DeepSpeed JSON": with_flags(["--config", "none.json"], "--config none.json: no such file", "ds_configs/"),
    "a second owner": json_config('{"gradient_clipping": 5}', "gradient_clipping is 5", "optim.max_grad_norm"),
    "a section that is none": json_config('{"fp16": true}', "fp16 is true"),
    "another run": other_run,
    "other files": other_files,
}


@pytest.fixture(scope="module", autouse=True)
def deepspeed_has_tried_the_compiler() -> None:
    """It does so once in a process, silently but where standard error is captured, as in tests."""
    engine.build_config({}, optim=OptimConfig(), precision="fp32", global_batch_size=1)


def contents(folder: Path) -> dict[str, str | None]:
    """Everything in a folder but the cache of tokenised data, which a refused run may fill."""
    files = [path for path in folder.rglob("*") if "cache" not in path.relative_to(folder).parts[:1]]
    return {str(path): path.read_text() if path.is_file() else None for path in files}


def check_line(lines: list[str], named: list[str]) -> int:
    """The line is there once, names what it should, and nothing before it is a traceback; where it is."""
    ours = [index for index, line in enumerate(lines) if "train_dpo.py: " in line]
    assert len(ours) == 1, lines
    line = lines[ours[0]]
    assert line.startswith("train_dpo.py: ")
    assert [text for text in named if text not in line] == [], line
    assert not any("Traceback" in line for line in lines[: ours[0]])
    return ours[0]


@pytest.mark.parametrize("name", CASES)
def test_one_rank_says_it_in_one_line_and_writes_nothing(
    name: str, tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    argv, named = CASES[name](tmp_path, tiny_policy)
    monkeypatch.chdir(tmp_path)
    if name == "no such model":
        (tmp_path / "train.jsonl").touch()
    before = contents(tmp_path)
    capfd.readouterr()
    code = train_dpo.main(argv)
    shown = capfd.readouterr()
    assert code == 2 and shown.out == ""
    check_line(shown.err.splitlines(), named)
    assert shown.err.count("\n") == 1
    assert contents(tmp_path) == before


def environment(**more: str) -> dict[str, str]:
    """As of a shell in which no launcher has been at work."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def unreachable(key: str, folder: Path, policy: Path) -> tuple[list[str], list[str]]:
    argv = [*usual(folder, policy), f"--{key}", "nobody/nothing-of-this-name"]
    return argv, ["nobody/nothing-of-this-name", "--prepare_only", "HF_HOME"]


def test_a_data_set_on_a_hub_out_of_reach_names_the_offline_way(tiny_policy: Path, tmp_path: Path) -> None:
    argv, named = unreachable("data.train", tmp_path, tiny_policy)
    before = contents(tmp_path)
    offline = environment(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    command = [sys.executable, str(ROOT / "train_dpo.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=offline, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    check_line(done.stderr.splitlines(), [*named, "HF_HUB_OFFLINE=1"])
    assert done.stderr.count("\n") == 1
    assert contents(tmp_path) == before


def test_a_model_on_a_hub_out_of_reach_names_the_offline_way(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    argv, named = unreachable("model.policy", tmp_path, tiny_policy)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    before = contents(tmp_path)
    assert train_dpo.main(argv) == 2
    shown = capfd.readouterr()
    check_line(shown.err.splitlines(), named)
    assert shown.err.count("\n") == 1 and contents(tmp_path) == before


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(argv: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Two ranks of the deepspeed launcher on this machine."""
    start = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    command = [sys.executable, *start, *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=folder, timeout=150)


def more_ranks_than_pairs(folder: Path, policy: Path) -> tuple[list[str], list[str]]:
    argv = usual(folder, policy) + ["--train.global_batch_size", "1"]
    return argv, ["train.global_batch_size is 1 pairs for 2 ranks", "use at least 2, or fewer ranks"]


def test_two_ranks_say_it_once_and_leave(tiny_policy: Path, tmp_path: Path) -> None:
    argv, named = broken_json(tmp_path, tiny_policy)
    before = contents(tmp_path)
    done = launch([str(ROOT / "train_dpo.py"), *argv], tmp_path)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert not any("Traceback" in line for line in lines[check_line(lines, named) :])
    assert "train_dpo.py: " not in done.stdout
    assert contents(tmp_path) == before


EVERY_CASE = """
import json, os, sys
import train_dpo
codes = []
for argv in json.loads(open(sys.argv[1]).read()):
    os.write(2, b"next\\n") if os.environ["RANK"] == "0" else None
    codes.append(train_dpo.main(argv))
os.write(1, f"next\\ncodes {codes}\\n".encode())
"""


def test_two_ranks_survive_every_mistake(tiny_policy: Path, tmp_path: Path) -> None:
    """One launch for all cases: rank 0 says each line once, and both ranks come back with 2, ready for the next."""
    cases = {**CASES, "more ranks than pairs": more_ranks_than_pairs}
    made = []
    for index, (name, case) in enumerate(cases.items()):
        (tmp_path / str(index)).mkdir()
        made.append((name, *case(tmp_path / str(index), tiny_policy)))
    (tmp_path / "every.py").write_text(EVERY_CASE)
    (tmp_path / "argv.json").write_text(json.dumps([argv for _, argv, _ in made]))
    before = {index: contents(tmp_path / str(index)) for index in range(len(made))}
    done = ranks.run([str(tmp_path / "every.py"), str(tmp_path / "argv.json")], ranks=2)
    assert done.output.count(f"codes {[2] * len(made)}") == 2, done.output
    said = done.output.split("next\n")[1 : len(made) + 1]
    for text, (_, _, named) in zip(said, made, strict=True):
        check_line(text.splitlines(), named)
    assert before == {index: contents(tmp_path / str(index)) for index in range(len(made))}


ONE_CANNOT_READ = """
import shutil
import sys
import torch.distributed, train_dpo
from dpo.errors import UserError
from dpo.model import load
def read(*_, **__):
    if torch.distributed.get_rank() == 0:
        raise UserError("model.policy here: a file is torn; copy it again")
    torch.distributed.barrier()
load.load_model = read
sys.exit(train_dpo.main(sys.argv[1:]))
"""


def test_weights_that_rank_0_alone_cannot_read_under_zero_3_end_the_job(tiny_policy: Path, tmp_path: Path) -> None:
    """The others wait for it in a collective of the device, where no error reaches them."""
    (tmp_path / "one.py").write_text(ONE_CANNOT_READ)
    argv = [*usual(tmp_path, tiny_policy), "--config", str(ROOT / "ds_configs/zero3.json")]
    done = ranks.run([str(tmp_path / "one.py"), *argv], ranks=2, timeout=60)
    assert done.codes[0] == 1 and done.codes[1] != 0
    assert "train_dpo.py: model.policy here: a file is torn; copy it again\n" in done.output


def test_a_process_too_many_for_the_gpus_of_a_node_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "9"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "10"), ("LOCAL_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert train_dpo.main([]) == 2
    assert "has no GPU: 1 are visible there; start as many processes as there are GPUs" in capfd.readouterr().err


def test_a_run_that_would_work_does_work(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Else the tests above might all see the same refusal."""
    monkeypatch.chdir(tmp_path)
    argv = [*usual(tmp_path, tiny_policy), "--log.samples", "0", "--train.max_steps", "2"]
    assert train_dpo.main(argv) == 0
    assert [line["step"] for line in tracking.read_lines(tmp_path / "run")] == [1, 2]
    assert "train_dpo.py:" not in capfd.readouterr().err
    assert train_dpo.main(argv) == 0
    assert "is finished: 2 steps are done; raise train.epochs or train.max_steps" in capfd.readouterr().err
    fewer = [*argv[:-1], "1"]
    assert train_dpo.main(fewer) == 0
    assert "is finished: 2 steps are done, of 1 that are asked for; raise" in capfd.readouterr().err
    assert train_dpo.main([*argv, "--train.resume", str(tmp_path / "run/checkpoints/step-000009")]) == 2
    assert "step-000009" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert train_dpo.main([*argv[:-1], "3"]) == 2
    assert "run had a checkpoint of step 2, and holds none: put its checkpoints/ back" in capfd.readouterr().err
