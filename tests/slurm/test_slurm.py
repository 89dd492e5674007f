"""slurm/dpo.sh, submitted to a real Slurm: it trains as ranks on one node do, and says what is missing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests import ranks

POLICY = Path(__file__).resolve().parents[3] / "shared" / "data" / "stories260k-llama"
SETTINGS = {
    "--config": "ds_configs/zero2.json",
    "--model.policy": str(POLICY),
    "--data.max_length": "128",
    "--train.precision": "fp32",
    "--train.global_batch_size": "6",
    "--train.max_steps": "3",
    "--optim.lr": "1e-3",
    "--log.samples": "0",
}
JOB_SECONDS = 400  # two nodes on two cores: nearly all of it is importing torch, 15 s when nothing else runs


def _train_arguments(rows: Path, run: Path) -> list[str]:
    settings = SETTINGS | {"--data.train": str(rows), "--train.output_dir": str(run)}
    return [word for pair in settings.items() for word in pair]


def _training_lines(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def _environment(cache: Path, path: str) -> dict[str, str]:
    return {"PATH": path, "DPO_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 pairs of unequal lengths."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    animals = ("cat", "dog", "bird", "frog", "bear", "fish")
    with path.open("w") as file:
        for n in range(18):
            prompt = f"Once upon a time there was a little {animals[n % 6]}." + " It was happy." * (n % 4)
            completions = {"chosen": " It liked to play." * (1 + n % 3), "rejected": " The end." * (1 + n % 2)}
            file.write(json.dumps({"prompt": prompt} | completions) + "\n")
    return path


def _submit_and_finish(cluster, *arguments, cwd, **environment) -> tuple[str, str, str]:
    job = cluster.submit(*arguments, cwd=cwd, **environment)
    state = cluster.finish(job)
    return job, state, (cwd / f"dpo-{job}.out").read_text()


def _arguments_of_torchrun(folder: Path, node: int = 0) -> list[str]:
    return (folder / f"arguments-{node}").read_text().splitlines()


def _written(folder: Path, what: str) -> list[str]:
    return [(folder / f"{what}-{node}").read_text().strip() for node in (0, 1)]


def test_arguments_pass_through_unchanged(cpu_cluster, stand_in):
    arguments = ["--config", "a b.json", "--train.output_dir", "$HOME/*", "--loss.beta=0.3"]
    _, state, output = _submit_and_finish(cpu_cluster, "--nodes=2", "slurm/dpo.sh", *arguments, cwd=stand_in)
    assert state == "COMPLETED", output
    for node in (0, 1):
        given = _arguments_of_torchrun(stand_in, node)
        assert given[given.index("train_dpo.py") + 1 :] == arguments


def test_without_arguments_the_built_in_example_is_trained(cpu_cluster, stand_in):
    _, state, output = _submit_and_finish(cpu_cluster, "slurm/dpo.sh", cwd=stand_in)
    assert state == "COMPLETED", output
    assert _arguments_of_torchrun(stand_in)[-3:] == ["train_dpo.py", "--config", "ds_configs/zero2.json"]


@pytest.mark.parametrize(
    "option, own_variable, processes",
    [(None, None, "1"), ("--ntasks-per-node=2", None, "2"), ("--ntasks-per-node=2", "3", "3")],
)
def test_cpu_nodes_run_as_many_processes_as_asked_for(option, own_variable, processes, cpu_cluster, stand_in):
    options = ["--nodes=2", "--cpus-per-task=2"] + ([option] if option else [])
    environment = {"DPO_PROCESSES_PER_NODE": own_variable} if own_variable else {}
    _, state, output = _submit_and_finish(cpu_cluster, *options, "slurm/dpo.sh", cwd=stand_in, **environment)
    assert state == "COMPLETED", output
    assert _written(stand_in, "processes") == [processes, processes]


@pytest.mark.parametrize(
    "option",
    [
        "--gpus-per-node=4",
        "--gres=gpu:4",
        "--gpus-per-task=4",
        "--gpus-per-task=1 --ntasks-per-node=4",
        "--gpus=8",
    ],
)
def test_one_process_per_gpu_and_all_of_the_jobs_gpus_are_visible(option, gpu_cluster, stand_in):
    _, state, output = _submit_and_finish(gpu_cluster, "--nodes=2", *option.split(), "slurm/dpo.sh", cwd=stand_in)
    assert state == "COMPLETED", output
    processes = [int(count) for count in _written(stand_in, "processes")]
    assert sum(processes) == 8
    if option != "--gpus=8":  # which Slurm spreads as it likes
        assert processes == [4, 4]
    for count, visible in zip(processes, _written(stand_in, "gpus"), strict=True):
        assert visible in (",".join(map(str, range(count))), "none")  # none: not root, so no devices


def test_a_job_without_gpus_on_a_gpu_node_is_told_the_option(gpu_cluster, stand_in):
    job, state, output = _submit_and_finish(gpu_cluster, "slurm/dpo.sh", cwd=stand_in)
    assert state == "FAILED" and gpu_cluster.exit_code(job) == "2:0"
    assert "node1 has 8 GPUs and the job got none: submit with --gpus-per-node=8" in output
    assert not (stand_in / "arguments-0").exists()


def test_gpus_that_only_the_driver_knows_are_found(cpu_cluster, stand_in):
    driver = stand_in / ".venv" / "bin" / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'GPU 0: H200 (UUID: x)'\necho 'GPU 1: H200 (UUID: y)'\n")
    driver.chmod(0o755)
    _, state, output = _submit_and_finish(cpu_cluster, "slurm/dpo.sh", cwd=stand_in)
    assert state == "FAILED"
    assert "has 2 GPUs and the job got none" in output


def test_submitted_from_elsewhere_it_says_how_to_name_the_repository(cpu_cluster, stand_in, tmp_path):
    _, state, output = _submit_and_finish(cpu_cluster, str(stand_in / "slurm" / "dpo.sh"), cwd=tmp_path)
    assert state == "FAILED"
    assert f"no train_dpo.py in {tmp_path}: submit from the repository, or with sbatch --chdir=REPOSITORY" in output


def test_the_sites_own_set_up_reaches_every_node(cpu_cluster, stand_in):
    (stand_in / "slurm" / "env.sh").write_text("export SETTING_OF_THE_SITE=ib$#\nlauncher=(env -u HOME)\n")
    binaries = stand_in / ".venv" / "bin"
    path = f"{binaries}:{os.environ['PATH']}"
    _, state, output = _submit_and_finish(cpu_cluster, "--nodes=2", "slurm/dpo.sh", "--x", cwd=stand_in, PATH=path)
    assert state == "COMPLETED", output
    assert _written(stand_in, "setting") == ["ib0", "ib0"]  # 0: env.sh does not see the job's arguments


def test_an_active_environment_is_preferred_to_the_repositorys(cpu_cluster, stand_in, tmp_path):
    active = tmp_path / "active"
    shutil.copytree(stand_in / ".venv" / "bin", active)
    (stand_in / ".venv" / "bin" / "torchrun").write_text("#!/bin/sh\nexit 1\n")
    environment = {"VIRTUAL_ENV": str(active), "PATH": f"{active}:{os.environ['PATH']}"}
    _, state, output = _submit_and_finish(cpu_cluster, "slurm/dpo.sh", cwd=stand_in, **environment)
    assert state == "COMPLETED", output


def test_a_missing_environment_is_named(cpu_cluster, stand_in):
    shutil.rmtree(stand_in / ".venv")
    _, state, output = _submit_and_finish(cpu_cluster, "slurm/dpo.sh", cwd=stand_in, PATH="/usr/bin:/bin")
    assert state == "FAILED"
    assert f"torchrun not found: install into {stand_in}/.venv" in output


def test_the_exit_status_of_training_is_the_jobs(cpu_cluster, stand_in):
    # One node: on several, srun ends the other tasks at the first failure and reports the highest status of all.
    job, state, _ = _submit_and_finish(cpu_cluster, "slurm/dpo.sh", cwd=stand_in, FAKE_STATUS="7")
    assert state == "FAILED" and cpu_cluster.exit_code(job) == "7:0"


def test_a_cancelled_job_lets_training_finish_its_own_end(cpu_cluster, stand_in):
    job = cpu_cluster.submit("--nodes=2", "slurm/dpo.sh", cwd=stand_in, FAKE_SLEEP="60")
    _wait_for_files(stand_in, "ready-0", "ready-1")
    cpu_cluster.call("scancel", job)
    assert cpu_cluster.finish(job) == "CANCELLED"
    _wait_for_files(stand_in, "saved-0", "saved-1")


CGROUP = """#!/bin/sh
[ "$*" != "show config" ] || { echo "ProctrackType           = proctrack/cgroup"; seq 100000 || exit 141; exit; }
exec %s "$@"
"""


def test_a_signal_that_reaches_the_shell_of_a_node_alone_reaches_torchrun_and_the_ranks(cpu_cluster, stand_in):
    """As under proctrack/cgroup, where Slurm signals nothing below it."""
    scontrol = stand_in / ".venv/bin/scontrol"
    scontrol.write_text(CGROUP % shutil.which("scontrol"))
    scontrol.chmod(0o755)
    job = cpu_cluster.submit("slurm/dpo.sh", cwd=stand_in, FAKE_RANK="1")
    _wait_for_files(stand_in, "shell")
    shell = int((stand_in / "shell").read_text())
    os.kill(shell, signal.SIGTERM)
    _wait_for_files(stand_in, "term-0")
    assert not (stand_in / "usr1").exists()
    os.kill(shell, signal.SIGUSR1)
    _wait_for_files(stand_in, "usr1")
    assert cpu_cluster.finish(job) == "COMPLETED"


def test_a_job_goes_back_into_the_queue_from_its_newest_checkpoint_but_not_twice_from_the_same(cpu_cluster, stand_in):
    """Put back after the first and the second round, by the place in status.json; train.resume is for the first."""
    arguments = ["--train.resume", "runs/x/checkpoints/step-000200"]
    job = cpu_cluster.submit("slurm/dpo.sh", *arguments, cwd=stand_in, FAKE_RANK="1", FAKE_STEP="1")
    given = []
    for place in ("after SFT step 200", "after SFT step 300", "after SFT step 300"):
        _wait_for_files(stand_in, "shell", seconds=60)
        status = {"state": "preempted", "step": 0, "place": place, "reason": "x"}
        (stand_in / "status").write_text(json.dumps(status))
        given.append(_arguments_of_torchrun(stand_in)[-4:])
        (stand_in / "shell").unlink()
        cpu_cluster.call("scancel", "--batch", "--signal=USR1", job)
    assert cpu_cluster.finish(job) == "FAILED" and cpu_cluster.exit_code(job) == "2:0"
    output = (stand_in / f"dpo-{job}.out").read_text()
    assert output.count("goes back into the queue") == 2
    assert "twice in a row time was up at the same place (step 0, after SFT step 300): give the job more" in output
    assert given[0][-2:] == arguments and [words[-2:] for words in given[1:]] == [["--train.resume", "auto"]] * 2
    assert not list(stand_in.glob(".dpo-*"))


def test_a_job_that_went_back_into_the_queue_and_finishes_is_completed_and_leaves_no_file_behind(cpu_cluster, stand_in):
    job = cpu_cluster.submit("slurm/dpo.sh", cwd=stand_in, FAKE_RANK="1", FAKE_STEP="1")
    for state in ("preempted", "finished"):
        _wait_for_files(stand_in, "shell", seconds=60)
        (stand_in / "status").write_text(json.dumps({"state": state, "step": 3, "place": state, "reason": ""}))
        (stand_in / "shell").unlink()
        cpu_cluster.call("scancel", "--batch", "--signal=USR1", job)
    assert cpu_cluster.finish(job) == "COMPLETED"
    output = (stand_in / f"dpo-{job}.out").read_text()
    assert output.count("goes back into the queue") == 1 and output.count("slurm/dpo.sh: job") == 2
    assert not list(stand_in.glob(".dpo-*"))


def _wait_for_files(folder: Path, *names: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < deadline, f"{names} are not all in {sorted(folder.iterdir())}"
        time.sleep(0.1)


def _wait_for_step(run: Path, step: int, seconds: float = JOB_SECONDS) -> None:
    """Until metrics.jsonl has a line of a training step of at least `step`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and any(line["step"] >= step for line in _training_lines(run)):
            return
        time.sleep(0.1)
    pytest.fail(f"{run} does not reach step {step}")


def _wait_for_checkpoint(run: Path, step: int, seconds: float = 60) -> int:
    """Until there is one of at least `step`; its step."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = [int(folder.name.split("-")[1]) for folder in (run / "checkpoints").glob("step-*")]
        if found and max(found) >= step:
            return max(found)
        time.sleep(0.1)
    pytest.fail(f"{run} has no checkpoint of step {step}")


def _status(run: Path) -> str:
    return json.loads((run / "status.json").read_text())["state"]


def test_a_job_that_runs_out_of_time_and_is_cancelled_trains_as_two_ranks_that_nothing_disturbs(
    cpu_cluster, clone, rows, path_with_torchrun, tmp_path
):
    """Submitted from elsewhere, on two nodes, it is told that its time is up, goes on when requeued, and is cancelled;
    two ranks without Slurm continue it to the end."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    longer = ["--train.max_steps", "120", "--train.epochs", "99", "--train.save_every", "500"]
    environment = _environment(tmp_path / "cache", path_with_torchrun)
    arguments = [*_train_arguments(rows, run), *longer]

    script = [f"--chdir={clone}", str(clone / "slurm/dpo.sh")]
    job = cpu_cluster.submit("--nodes=2", *script, *arguments, cwd=tmp_path, **environment)
    _wait_for_step(run, 3)
    cpu_cluster.call("scancel", "--batch", "--signal=USR1", job)
    reached = _wait_for_checkpoint(run, 3)
    _wait_for_step(run, reached + 3)
    cpu_cluster.call("scancel", job)
    assert cpu_cluster.finish(job, 60) == "CANCELLED"
    output = (clone / f"dpo-{job}.out").read_text()
    assert f"checkpointed; job {job} goes back into the queue" in output
    assert output.count("slurm/dpo.sh: job") == 2 and "SIGUSR1 received; start again to continue" in output
    assert f"nodes 2, processes on this one 1, rendezvous node1:{15000 + int(job) % 15000}" in output
    assert _status(run) == "preempted", output
    saved = _wait_for_checkpoint(run, reached + 3)
    assert reached + 3 <= saved < 120 and json.loads((run / "status.json").read_text())["step"] == saved

    for folder in (run, whole):
        done = ranks.run(["train_dpo.py", *_train_arguments(rows, folder), *longer], ranks=2)
        assert done.codes == [0, 0], done.output
    assert (run / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()
    lines = _training_lines(run)
    assert [line["step"] for line in lines] == list(range(1, 121))
    for line, wanted in zip(lines, _training_lines(whole), strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert line[key] == pytest.approx(wanted[key], rel=1e-6, abs=1e-7), key
    assert abs(lines[2]["loss"] - lines[0]["loss"]) > 1e-3  # it learned, so equal losses say something
