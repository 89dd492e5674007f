"""The Dockerfile holds what hadolint and our own rules ask, and the image what training needs. No test builds it."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dpo.commandline import parse
from tests.test_imports import imports, modules

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def instructions(text: str) -> list[tuple[str, str]]:
    """Keyword and arguments of every instruction, lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0].upper(), " ".join(line.split()[1:])) for line in joined.splitlines()]


def copied(text: str) -> list[str]:
    """What COPY takes from the repository."""
    rest = [arguments for keyword, arguments in instructions(text) if keyword == "COPY"]
    words = [[word for word in arguments.split() if not word.startswith("--")] for arguments in rest]
    return [source for line in words for source in line[:-1]]


def pins() -> set[str]:
    return {line.strip() for file in ROOT.glob("requirements*.txt") for line in file.read_text().splitlines()}


def requirement_files(text: str) -> set[str]:
    """Files that pip is told to read, and those that they name."""
    found, ahead = set(), re.findall(r"\s-[rc] (\S+)", text)
    while ahead:
        name = ahead.pop()
        found.add(name)
        if (ROOT / name).is_file():
            ahead += re.findall(r"^-[rc] (\S+)", (ROOT / name).read_text(), re.MULTILINE)
    return found


def problems(text: str) -> list[str]:
    """What breaks our own rules."""
    found = []
    order = instructions(text)
    given = dict(order)
    keywords = [keyword for keyword, _ in order]
    pip = next(index for index, (_, arguments) in enumerate(order) if "pip install" in arguments)
    if not re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-\w+-ubuntu\d\d\.\d\d", given["FROM"]):
        found.append("the base image has no pinned tag")
    if given.get("USER", "root") in ("root", "0") or "ARG UID=0" in text or "USER" not in keywords[:pip]:
        found.append("pip and the image run as root")
    if "ADD" in keywords:
        found.append("ADD, which takes addresses; COPY does not")
    found += [f"{name} is not there when pip reads it" for name in requirement_files(text) - set(copied(text))]
    found += [f"{pin} is not the tested version" for pin in re.findall(r"\w+==[\w.]+", text) if pin not in pins()]
    found += [f"COPY of {name}, which does not exist" for name in copied(text) if not (ROOT / name).exists()]
    found += [f"{path} is not in the image" for path in needed() if path.split("/")[0] not in copied(text)]
    return found


@functools.cache
def needed() -> set[str]:
    """Files that training reads: what train_dpo.py imports, what those import, and the verbs."""
    files = {f"dpo.{name}": path for name, path in modules().items()}
    seen: set[Path] = set()
    ahead = [ROOT / "train_dpo.py", files["dpo.__main__"]]
    while ahead:
        path = ahead.pop()
        if path not in seen:
            seen.add(path)
            ahead += [files[name] for name in imports(path) if name in files]
    return {str(path.relative_to(ROOT)) for path in seen} | {"ds_configs/zero2.json", "recipes/quickstart.yaml"}


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(hadolint), "Dockerfile"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_dockerfile_keeps_our_rules():
    assert problems(TEXT) == []
    assert len(needed()) > 60 and "dpo/report/page.py" in needed()


@pytest.mark.parametrize(("old", "new", "problem"), [
    ("-base-ubuntu24.04", "", "the base image has no pinned tag"),
    ("nvidia/cuda:13.0.3-base-ubuntu24.04", "nvidia/cuda:latest", "the base image has no pinned tag"),
    ("USER $UID\n", "", "pip and the image run as root"),
    ("USER $UID", "USER root", "pip and the image run as root"),
    ("ARG UID=1000", "ARG UID=0", "pip and the image run as root"),
    ("COPY recipes", "ADD https://example.org/recipes.tar", "ADD, which takes addresses; COPY does not"),
    ("COPY requirements.txt constraints.txt ", "COPY requirements.txt ",
     "constraints.txt is not there when pip reads it"),
    ("-r requirements.txt", "-r requirements-gpu.txt", "requirements-gpu.txt is not there when pip reads it"),
    ("peft==0.21.2", "peft==0.1", "peft==0.1 is not the tested version"),
    ("COPY ds_configs", "COPY configs", "COPY of configs, which does not exist"),
    ("COPY dpo dpo", "", "dpo/train.py is not in the image"),
    ("COPY recipes recipes", "", "recipes/quickstart.yaml is not in the image"),
])  # fmt: skip
def test_a_broken_rule_is_found(old, new, problem):
    assert old in TEXT
    assert problem in problems(TEXT.replace(old, new))


def test_the_builder_is_sent_what_is_copied_and_no_more():
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*" and rules[-1] == "**/__pycache__"
    assert sorted(rules[1:-1]) == sorted(f"!{name}" for name in copied(TEXT))


def test_without_arguments_the_image_trains_the_quickstart_and_arguments_replace_the_command():
    given = dict(instructions(TEXT))
    words = json.loads(given["CMD"])
    assert words[:2] == ["python", "train_dpo.py"] and parse(words[2:]).assumed_quickstart
    assert "ENTRYPOINT" not in given


def test_the_quickstart_writes_into_folders_that_the_user_owns():
    owned = re.search(r"install --directory --owner dpo (.*)", TEXT)
    assert owned is not None
    workdir = dict(instructions(TEXT))["WORKDIR"]
    output = parse(json.loads(dict(instructions(TEXT))["CMD"])[2:]).config.train.output_dir
    assert f"{workdir}/{output.split('/')[0]}" in owned.group(1).split()
