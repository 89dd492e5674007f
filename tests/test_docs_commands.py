"""Every command of the README and the docs runs, at a tiny size and in this process, or stands below with the reason.

A training command is checked in two parts: its launcher takes the options that are shown, and what follows
`train_dpo.py` trains. Commands that run beside other tests as they stand (`deepspeed`, `torchrun`, Slurm) do it there.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers

import train_dpo
from benchmarks import workload
from dpo.__main__ import VERBS, main
from dpo.commandline import parse
from dpo.runtime.status import read_status
from tests import tiny
from tests.data.tiny_tokenizers import tokenizer_of
from tests.test_readme import TINY

ROOT = Path(__file__).resolve().parents[1]
PATHS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PAGES = {path.name: path.read_text(encoding="utf-8") for path in PATHS}
PROGRAMS = ("python", "python3", "torchrun", "deepspeed", "sbatch", "srun", "docker", "make", "pip", "ssh", "bash")
NOT_RUN = {
    "python3 -m venv": "made the environment of these tests",
    ". .venv/bin/activate": "belongs to the shell",
    "pip install": "made the environment of these tests; asks the network",
    "make quickstart": "installs first; tests/test_quickstart.py runs what follows",
    "make test": "runs these tests",
    "mkdir -p": "makes a folder",
    "docker build": "no daemon; tests/test_dockerfile.py reads what would be built",
    "docker run --gpus all -it dpo": "no daemon; tests/test_dockerfile.py parses the command of the image",
    "python -m dpo sample runs/mine --validation 100 --judge openai:gpt-4o": "a service; see sampling/test_judge.py",
}
"""Beginning of a command -> why no test runs it as it stands."""
LAUNCHERS = {
    "sbatch": "tests/slurm runs slurm/dpo.sh on a real Slurm",
    "docker": "no daemon",
    "deepspeed": "tests/test_readme.py runs it as it stands",
    "torchrun": "tests/test_readme.py runs it as it stands",
    "python": "",
}
DATA = {
    "--data.train": "my_pairs.jsonl", "--data.validation": "my_validation.jsonl", "--data.train_split": "train",
    "--data.validation_split": "train",
}  # fmt: skip
LENGTHS = {key: TINY[key] for key in ("--model.policy", "--data.max_length", "--data.max_prompt_length")}
SMALL = {"sample": {"--max_tokens": "4"}, "plan": {"--data.train_limit": "160"} | LENGTHS | DATA}
"""Laid over a verb."""
PLACEHOLDERS = {
    "K": "2", "I": "0", "HOST": "localhost", "...": "ds_configs/zero2.json", "RUN": "runs/lora_1b_16gb", "STEP": "2",
    "FOLDER": "exported", "Anthropic/hh-rlhf": "my_pairs.jsonl",
}  # fmt: skip


def commands(text: str) -> list[str]:
    """Commands of a page's blocks, fenced or indented, joined and parted into what a shell would start."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = []
    for language, block in fences:
        shell = language in ("bash", "sh", "shell", "console")
        joined = [line for line in block.replace("\\\n", " ").splitlines() if line.strip() and line[0] != "#"]
        lines += [line for line in joined if shell or line.split()[0] in PROGRAMS]
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [line for line in re.findall(r"^    (\S.*)$", rest, re.MULTILINE) if line.split()[0] in PROGRAMS]
    parts = [part for line in lines for part in re.sub(r"\s{2,}[(#].*$", "", line).split("&&")]
    return [" ".join(part.split()) for part in parts]


def split(command: str) -> tuple[list[str], list[str] | None]:
    """Words of the launcher, and what follows train_dpo.py or slurm/dpo.sh; None where nothing is trained."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(re.sub(r"[\[\]]", "", command))]
    at = next((i for i, word in enumerate(words) if word in ("train_dpo.py", "slurm/dpo.sh")), None)
    return (words, None) if at is None else (words[:at], words[at + 1 :])


def starts(command: str, listed: str) -> bool:
    return f"{command} ".startswith(f"{listed} ")


ALL = [(page, command) for page, text in PAGES.items() for command in commands(text)]
TRAINED = {tuple(after): command for _, command in ALL if (after := split(command)[1]) is not None}
BENCHMARK = re.compile(r"^(?:python|torchrun) (?:.* )?(?:-m benchmarks\.|benchmarks/)(\w+)")
"""Minutes to hours: a test of its own runs it small."""
RUN = [
    c for _, c in ALL
    if split(c)[1] is None and not BENCHMARK.match(c) and not any(starts(c, listed) for listed in NOT_RUN)
]  # fmt: skip


def settings(arguments: Sequence[str]) -> list[str]:
    """The arguments of a training command with tiny sizes and the test's own rows laid over them."""
    over = TINY | {"--log.samples": "1"} | DATA
    if "--train.epochs" in arguments:  # it makes a run longer
        over = {key: value for key, value in over.items() if key not in ("--train.epochs", "--train.max_steps")}
    return [*arguments, *(word for pair in over.items() for word in pair)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages speak of: the repository's own folders, rows, prompts, a recipe, a reward model."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("ds_configs", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "recipe.yaml").write_text(PAGES["from_trl.md"].split("```yaml\n")[1].split("```")[0])
    for name, count in (("my_pairs.jsonl", 160), ("my_validation.jsonl", 4)):
        rows = [{"prompt": f"{i} + {count}?", "chosen": f" {i + count}", "rejected": " 0"} for i in range(count)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text('{"prompt": "What is 1 + 1?"}\n')
    judge, tokenizer = folder / "models/reward", tokenizer_of("byte")
    tokenizer.save_pretrained(judge)
    tokenizer.save_pretrained(folder / "gpt2")
    config = tiny.model("llama", vocab_size=len(tokenizer)).config
    config.num_labels, config.pad_token_id = 1, tokenizer.eos_token_id
    transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(judge)
    return folder


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    monkeypatch.setenv("DPO_CACHE", str(place / "cache"))
    return place


def have(run: str) -> None:
    """Make the run that a command speaks of, by its recipe if it has one."""
    if not Path(run, "final").is_dir():
        recipe = Path("recipes", f"{Path(run).name}.yaml")
        given = ["--recipe", str(recipe)] if recipe.is_file() else ["--train.sft_epochs", "1"]
        assert train_dpo.main(settings(["--config", "ds_configs/zero2.json", *given, "--train.output_dir", run])) == 0


@pytest.mark.parametrize("arguments", TRAINED, ids=TRAINED.get)
def test_what_follows_train_dpo_trains_or_plans(arguments, inside, capsys):
    command = parse(settings(arguments))
    run = Path(command.config.train.output_dir)
    if "--train.epochs" in arguments:
        have(str(run))
    before, steps = times(run), status(run)
    assert train_dpo.main(settings(arguments)) == 0
    if command.dry_run or command.prepare_only:
        assert times(run) == before and "optimizer steps" in capsys.readouterr().out
    else:
        assert (run / "finished.json").is_file() and any((run / "final").glob("*.safetensors"))
        assert status(run) > steps or before, "nothing was trained"
        assert status(run) > steps or "--train.epochs" not in arguments, "the run was not made longer"


def times(run: Path) -> dict[Path, int]:
    """When each file of a run was written."""
    return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def status(run: Path) -> int:
    """Steps that a run has on disk."""
    return read_status(run).get("step", 0)


@pytest.mark.parametrize("command", sorted({c for _, c in ALL if split(c)[1] is not None}), ids=str)
def test_a_launcher_takes_what_is_shown(command):
    before, _ = split(command)
    assert before[0] in LAUNCHERS, f"no test knows the launcher {before[0]}"
    if before[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        assert get_args_parser().parse_args([*before[1:], "train_dpo.py"]).training_script == "train_dpo.py"
    elif before[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        assert parse_args([*before[1:], "train_dpo.py"]).user_script == "train_dpo.py"
    elif before[0] == "docker":
        assert before[:2] == ["docker", "run"] and before[before.index("dpo") + 1 :] == ["deepspeed"]
    elif before[0] == "python":
        assert before == ["python"]


@pytest.mark.parametrize("command", RUN, ids=str)
def test_a_verb_does_what_is_shown(command, inside, capsys):
    words, _ = split(command)
    assert words[:3] == ["python", "-m", "dpo"], f"neither run nor listed: {command}"
    verb, rest = words[3], words[4:]
    for run in [word for word in rest if word.startswith("runs/")]:
        if run == "runs/other":
            have("runs/mine")
            shutil.copytree("runs/mine", run, dirs_exist_ok=True)
        else:
            have(run)
    if "--to" in rest:
        shutil.rmtree(rest[rest.index("--to") + 1], ignore_errors=True)
    if "--policy" in rest and not Path(rest[rest.index("--policy") + 1]).is_dir():
        shutil.copytree("runs/mine/final", rest[rest.index("--policy") + 1])
    rest += [word for pair in SMALL.get(verb, {}).items() for word in pair]
    assert main([verb, *rest]) == 0
    assert capsys.readouterr().out.strip()
    for flag in ("--output", "--json", "--to"):
        assert flag not in rest or (inside / rest[rest.index(flag) + 1]).exists()


def test_every_command_that_is_not_run_is_in_the_docs():
    for listed in NOT_RUN:
        assert any(starts(command, listed) for _, command in ALL), listed
    for reason in (*NOT_RUN.values(), *LAUNCHERS.values()):
        assert all((ROOT / path).exists() for path in re.findall(r"tests/[\w./]*\w", reason))
    assert {split(c)[0][0] for c in TRAINED.values()} | {"sbatch", "docker"} <= set(LAUNCHERS)


def test_a_benchmark_of_the_docs_has_a_test_and_the_flags_that_are_shown():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    found = {match.group(1): command for _, command in ALL if (match := BENCHMARK.match(command))}
    assert {"throughput", "frontier"} <= set(found)
    for name, command in found.items():
        assert re.search(rf"from benchmarks(\.{name} import| import (\w+, )*{name})|benchmarks\.{name}\b", tests), name
        source = (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
        shared = re.findall(r"workload\.(add_\w+)\(parser\)", source)
        source += "".join(inspect.getsource(getattr(workload, adds)) for adds in shared)
        own = command.split(name, 1)[1]
        assert all(f'"{flag}"' in source for flag in re.findall(r"--\w+", own)), command


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_a_sentence_name_modules_verbs_and_flags_that_exist(page, capsys):
    for command in re.findall(r"`(python3? -m [^`\n]+)`", PAGES[page]):
        words = command.split()
        spec = importlib.util.find_spec(words[2])
        assert spec is not None, command
        if words[2] == "dpo" and words[3:4] != ["VERB"]:
            assert words[3] in VERBS, command
            with pytest.raises(SystemExit):
                main([words[3], "--help"])
            known = capsys.readouterr().out
        else:
            known = Path(str(spec.origin)).read_text(encoding="utf-8")
        assert all(flag in known for flag in re.findall(r"--[\w.]+", command)), command


def test_the_code_of_the_report_page_reads_a_run(inside):
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGES["report.md"], re.MULTILINE | re.DOTALL)
    have("runs/mine")
    found: dict[str, object] = {}
    exec(block, found)
    assert len(found["margins"]) == 4  # type: ignore[arg-type]
