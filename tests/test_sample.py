"""python -m dpo sample, and all that a run leaves of a data set full of markup."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import yaml

import train_dpo
from dpo import sample as verb
from dpo.__main__ import main
from dpo.commandline import parse
from dpo.data.boundary import encode_prompt
from dpo.errors import UserError
from dpo.model.head import logps_of_logits
from dpo.runtime.files import read_records
from dpo.runtime.tracking import read_lines
from dpo.sample import DEFAULT_PROMPTS
from dpo.sampling.answers import side_by_side
from dpo.types import PreferenceRow
from tests import tiny
from tests.data.tiny_tokenizers import tokenizer_of
from tests.report.runs import HOSTILE

DOCS = Path(__file__).resolve().parents[1] / "docs" / "sampling.md"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT and DPO on conversations whose every text is an attack; evaluated, sampled, finished."""
    folder = tmp_path_factory.mktemp("sample")
    tokenizer = tokenizer_of("byte")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "policy")
    # The random start of the other tests, with a context for the attack.
    tiny.saved(folder / "policy", "llama", vocab_size=len(tokenizer), max_position_embeddings=1024)
    for name, count in (("train", 8), ("validation", 4)):
        rows = [
            {
                "prompt": user(f"{i} {HOSTILE}"),
                "chosen": [{"role": "assistant", "content": f"yes {i} {HOSTILE}"}],
                "rejected": [{"role": "assistant", "content": f"no {i} {HOSTILE}"}],
            }
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = train_dpo.main([
        "--config", "ds_configs/zero2.json", "--model.policy", str(folder / "policy"),
        "--data.train", str(folder / "train.jsonl"), "--data.validation", str(folder / "validation.jsonl"),
        "--data.cache_dir", str(folder / "cache"), "--data.max_length", "1024", "--train.sft_epochs", "1",
        "--train.max_steps", "2", "--train.global_batch_size", "4", "--train.epochs", "2", "--optim.lr", "2e-3",
        "--optim.warmup_steps", "0", "--train.output_dir", str(folder / "run"), "--log.samples", "3",
        "--log.sample_tokens", "12", "--train.precision", "fp32",
    ])  # fmt: skip
    assert code == 0
    return folder / "run"


def load(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


def answered(model: Any, prompt: list[int], most: int) -> list[int]:
    """A greedy answer, token by token."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) - len(prompt) < most:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == model.generation_config.eos_token_id:
                break
    return ids[len(prompt) :]


def logratio(models: list[Any], prompt: list[int], answer: list[int]) -> float:
    found = []
    with torch.no_grad():
        for model in models:
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            found.append(float(logps_of_logits(logits, torch.tensor(answer)).sum()))
    return found[1] - found[0]


def test_the_kl_of_a_run_is_the_mean_log_ratio_of_its_greedy_answers(run: Path) -> None:
    models = [load(run / "reference"), load(run / "final")]
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "final")
    prompts = [encode_prompt(tokenizer, user(f"{i} {HOSTILE}")) for i in range(3)]
    answers = [answered(models[1], prompt, 12) for prompt in prompts]
    expected = sum(logratio(models, p, a) for p, a in zip(prompts, answers, strict=True)) / 3
    (line,) = [line for line in read_lines(run) if "samples/kl" in line]
    assert line["step"] == 2 and line["samples/kl"] == pytest.approx(expected, abs=2e-3) and abs(expected) > 0.05
    assert line["samples/policy_tokens"] == sum(map(len, answers)) / 3


def test_nothing_that_the_run_wrote_lets_markup_through(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "<script>" not in page and "<img" not in page
    assert page.count("&lt;script&gt;window.broken") >= 3  # the prompts of the samples
    rows, torn = read_records(run / "samples.jsonl")
    assert len(rows) == 3 and not torn and all(HOSTILE in row["prompt"] and HOSTILE in row["chosen"] for row in rows)
    worst, _ = read_records(run / "worst_pairs.jsonl")
    assert all(HOSTILE in row["prompt"][0]["content"] for row in worst)
    card = (run / "final/README.md").read_text()
    assert "| training data | `8 pairs` |" in card and "| validation data | `4 pairs` |" in card
    assert "1 x CPU, ZeRO-2, fp32" in card and "chosen log-prob fell" in card and "transformers 5" in card


def test_answers_on_request_are_those_of_both_folders_under_the_training_template(
    run: Path, tmp_path: Path, capsys: Any
) -> None:
    argv = ["sample", str(run), "--prompt", "1", "--prompt", "[x", "--validation", "2", "--max_tokens", "7"]
    assert main([*argv, "--judge", "heuristic", "--output", str(tmp_path / "out.jsonl"), "--batch_size", "3"]) == 0
    rows, _ = read_records(tmp_path / "out.jsonl")
    texts = ["1", "[x", f"0 {HOSTILE}", f"1 {HOSTILE}"]
    assert [row["prompt"] for row in rows] == ["1", "[x", user(texts[2]), user(texts[3])]
    models = [load(run / "reference"), load(run / "final")]
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "final")
    for text, row in zip(texts, rows, strict=True):
        rendered = f"<|user|>{text}{tokenizer.eos_token}<|assistant|>"
        prompt = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        ids = [answered(model, prompt, 7) for model in models]
        expected = [tokenizer.decode(i, skip_special_tokens=True) for i in ids]
        assert [row["reference"], row["policy"]] == expected
        assert row["logratio"] == pytest.approx(logratio(models, prompt, ids[1]), abs=2e-3)
        assert row["verdict"] in (0.0, 0.5, 1.0)
    said = capsys.readouterr().out
    assert "mean log-ratio of the policy's answers (greedy; a KL estimate only at temperature 1)" in said
    assert re.search(r"heuristic: win rate \d+\.\d% \(95% interval .* won, .* tied, .* lost\); at equal length", said)
    assert said.count("policy:    ") == 4


@pytest.mark.parametrize("other", [[], ["--reference.path", "other"]])
@pytest.mark.parametrize("after_sft", [False, True])
def test_answers_of_the_reference_are_those_of_the_one_that_dpo_had(other, after_sft, tmp_path):
    config = parse(["--model.policy", "start", "--data.train", "rows", *other]).config
    if after_sft:
        (tmp_path / "reference").mkdir()
    begin = "other" if other else str(tmp_path / "reference") if after_sft else "start"
    assert verb._start_of(tmp_path, config) == begin


def test_every_command_of_the_docs_runs(run: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(run)
    (tmp_path / "prompts.txt").write_text("How are you?\n\nWhat is 2 + 2?\n")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": user("Hello")}) + "\n" + '{"prompt": "Hi"}\n')
    monkeypatch.chdir(tmp_path)
    text = DOCS.read_text(encoding="utf-8")
    found = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line) for block in found for line in block.replace("\\\n", " ").splitlines()]
    local = [words for words in commands if words[0] == "python" and "--judge" not in words]
    assert len(local) == 6 and main(local[0][3:]) == 0  # the export
    counts = []
    for words in local[1:]:
        assert main([*words[3:], "--max_tokens", "3", "--output", "out.jsonl"]) == 0
        counts.append(len(read_records(tmp_path / "out.jsonl")[0]))
    assert counts == [4, len(DEFAULT_PROMPTS) + 4, 2, 2, 4]
    said = capsys.readouterr().out
    assert "tokens, estimated on 2 drawn ones" in said and "has no more than 4 validation pairs" in said
    judged = [words for words in commands if "--judge" in words]
    assert {words[words.index("--judge") + 1].split(":")[0] for words in judged} == {"heuristic", "reward", "openai"}


def changed(run: Path, folder: Path, **sections: dict[str, Any]) -> Path:
    """The run as one that was trained under other settings."""
    settings = yaml.safe_load((run / "config.yaml").read_text())
    for section, values in sections.items():
        settings[section] |= values
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    for name in ("final", "reference"):
        (folder / name).symlink_to(run / name)
    return folder


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"sequence_parallel_size": 2}},
        {"optim": {"name": "adamw_8bit"}},
        {"model": {"load_in_4bit": True}},
        {"data": {"streaming": True}},
    ],
    ids=str,
)
def test_a_run_is_asked_whatever_machine_and_stream_it_was_trained_on(sections, run, tmp_path, monkeypatch):
    monkeypatch.setattr("dpo.run.checks.find_spec", lambda name: None)  # no bitsandbytes here
    answers = []
    for folder in (run, changed(run, tmp_path / "run", **sections)):
        output = tmp_path / "out.jsonl"
        asked = ["--prompt", "Hi", "--validation", "2", "--max_tokens", "5", "--output", str(output)]
        assert main(["sample", str(folder), *asked]) == 0
        answers.append([(row["policy"], row["logratio"]) for row in read_records(output)[0]])
    assert answers[0] == answers[1] and len(answers[0]) == 3


def test_answers_are_kept_where_the_judge_fails(run, tmp_path, monkeypatch, capsys):
    def out_of_order(cases: Any) -> Any:
        raise UserError("the judge is ill")

    monkeypatch.setattr(verb, "make_judge", lambda name, device: out_of_order)
    output = tmp_path / "out.jsonl"
    asked = ["--prompt", "Hi", "--judge", "heuristic", "--max_tokens", "5", "--output", str(output)]
    assert main(["sample", str(run), *asked]) == 2
    (row,) = read_records(output)[0]
    assert set(row) == {"prompt", "read", "reference", "policy", "logratio"}
    assert "the judge is ill" in capsys.readouterr().err


def test_answers_that_are_there_already_are_kept(run, capsys):
    before = {path.name: path.read_text() for path in run.glob("answers*.jsonl")}
    for _ in range(2):
        assert main(["sample", str(run), "--prompt", "Hi", "--max_tokens", "2"]) == 0
    made = sorted(path.name for path in run.glob("answers*.jsonl") if path.name not in before)
    assert len(made) == 2 and f"{run}/{made[1]}" in capsys.readouterr().out
    assert all((run / name).read_text() == text for name, text in before.items())
    for name in made:
        (run / name).unlink()


def test_validation_prompts_are_never_those_of_training(run, tmp_path, capsys):
    alone = changed(run, tmp_path / "run", data={"validation": None, "validation_split": None})
    assert main(["sample", str(alone), "--validation", "2", "--max_tokens", "2"]) == 2
    assert "has no validation pairs; give --prompt or --file" in capsys.readouterr().err
    output = tmp_path / "out.jsonl"
    assert main(["sample", str(alone), "--max_tokens", "2", "--output", str(output)]) == 0
    assert [row["prompt"] for row in read_records(output)[0]] == list(DEFAULT_PROMPTS)


def test_a_prompt_is_kept_as_it_was_read_and_changed_data_is_told(run, tmp_path, capsys):
    short = changed(run, tmp_path / "run", data={"max_length": 60, "max_prompt_length": 30})
    inputs = json.loads((run / "inputs.json").read_text())
    (short / "inputs.json").write_text(json.dumps(inputs | {"training pairs": ["others"]}))
    output = tmp_path / "out.jsonl"
    assert main(["sample", str(short), "--validation", "1", "--max_tokens", "2", "--output", str(output)]) == 0
    (row,) = read_records(output)[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "final")
    assert len(tokenizer(row["read"], add_special_tokens=False)["input_ids"]) <= 60 < len(row["prompt"][0]["content"])
    said = capsys.readouterr().out  # of the run that was named, wherever config.yaml says that it was trained
    assert f"training pairs of {short} have changed since" in said and f"validation pairs of {short}" in said
    assert main(["sample", str(run), "--validation", "1", "--max_tokens", "2", "--output", str(output)]) == 0
    assert "changed since" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("texts", "shown"),
    [
        (("a ", "b\n\n\n \n\nc", "\n" * 40), "\nprompt:    a\nreference: b\n\nc\npolicy:    \n\n"),
        (("a", "b\n\nc", "d"), "b\n\nc"),
    ],
)
def test_line_breaks_without_end_do_not_fill_the_terminal(texts: tuple[str, str, str], shown: str) -> None:
    assert shown in side_by_side(*texts)


def test_the_default_prompts_hold_the_one_that_everybody_asks() -> None:
    assert "What are the main differences between Python and C++?" in DEFAULT_PROMPTS


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["nowhere"], "nowhere is no run directory: it has no config.yaml; give the folder of a run"),
        (["unfinished"], "unfinished has no final/: the run has not finished"),
        (["RUN", "--file", "no.txt"], "--file no.txt: cannot be read: No such file or directory"),
        (["RUN", "--file", "no.jsonl"], "--file no.jsonl: cannot be read: No such file or directory"),
        (["RUN", "--file", "empty.txt"], "--file empty.txt: holds no prompt"),
        (["RUN", "--file", "bad.jsonl"], "--file bad.jsonl: every line must be an object with a field prompt"),
        (["RUN", "--judge", "me"], "--judge is me; use heuristic, reward:FOLDER or openai:MODEL"),
        (["RUN", "--temperature", "-1"], "--temperature is -1.0; use 0 or more"),
        (["RUN", "--top_p", "0"], "--top_p is 0.0; use a number above 0, at most 1"),
        (["RUN", "--max_tokens", "0"], "--max_tokens is 0; use at least 1"),
        (["RUN", "--policy", "RUN/checkpoints/step-000002"], "step-000002 holds no model; python -m dpo export makes"),
        (["RUN", "--policy", "other"], "--policy other has another tokenizer than the policy: "),
        (["RUN", "--output", "no/x.jsonl"], "no/x.jsonl: no is no folder; name another file by --output"),
        (["RUN", "--prompt"], "--prompt: expected one argument"),
        ([], "run"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], line: str, run: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "unfinished").mkdir()
    settings = "model: {policy: builtin:tiny}\ndata: {train: builtin:world}\n"
    (tmp_path / "unfinished/config.yaml").write_text(settings)
    (tmp_path / "empty.txt").write_text("\n \n")
    tokenizer_of("pieces").save_pretrained(tmp_path / "other")
    (tmp_path / "other/config.json").write_text((run / "final/config.json").read_text())
    (tmp_path / "bad.jsonl").write_text('{"question": "x"}\n')
    monkeypatch.chdir(tmp_path)
    assert main(["sample", *(word.replace("RUN", str(run)) for word in argv)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and line in error, error


def test_messages_without_a_template_are_refused_by_the_file_they_come_from(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text('{"prompt": [{"role": "user", "content": "x"}]}\n')
    setup = SimpleNamespace(
        validation_pairs=None, train_pairs=None, tokenizer=tokenizer_of("byte"),
        texts=lambda pairs, pair_id: PreferenceRow("p", "a", "b", 1),
        config=SimpleNamespace(data=SimpleNamespace(chat_template_kwargs={})),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"--file .*chat.jsonl: has messages, and the run's tokenizer no chat template"):
        verb._prompts(verb.Options(run="r", file=str(file)), setup)
