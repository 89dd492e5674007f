"""Answers of several messages: what the model says is scored, what tools and users say in between is read alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

import dpo.preference
import train_dpo
from dpo.data.boundary import encode_prompt
from dpo.data.encode import PairEncoder
from dpo.data.mixture import Mixture
from dpo.objective.tokens import weigher
from dpo.runtime.tracking import read_lines
from dpo.types import PreferenceRow, TokenizedPair
from tests.by_path import prepare_pairs
from tests.data.tiny_tokenizers import CHATML, WITH_BOS_AND_EOS, chat, tokenizer_of, written
from tests.test_stages import arguments

LAST_THINKS = CHATML.replace(
    "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
)
"""Writes a reasoning block into the last turn alone, as Qwen3 does."""
CALLS_END_OTHERWISE = CHATML.replace(
    "{{ m.content }}<|im_end|>", "{{ m.content }}{% if m.tool_calls %}<pad>{% else %}<|im_end|>{% endif %}"
)
"""Ends a turn that calls a tool by another token, as Llama 3.1 does."""
CALL: dict[str, Any] = {"role": "assistant", "content": "add 1 2", "tool_calls": [{"function": {"name": "add"}}]}
SUM, TOLD = {"role": "tool", "content": "3"}, {"role": "assistant", "content": "It is 3."}


def encoded(template: str, chosen: list[Any], kind: str = "byte", **options: Any) -> tuple[Any, Any]:
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = template
    row = PreferenceRow(chat("1+2?"), chosen, [{"role": "assistant", "content": "4"}], 1)
    return tokenizer, PairEncoder(tokenizer, **({"max_length": 1000} | options)).encode_rows([row])[0]


def scored_text(tokenizer: Any, pair: Any, is_scored: bool = True) -> str:
    places = set(pair.unscored)
    ids = [*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids]
    answer = range(len(pair.prompt_ids), len(pair.prompt_ids) + len(pair.chosen_ids))
    return str(tokenizer.decode([ids[i] for i in answer if (i not in places) == is_scored]))


@pytest.mark.parametrize("kind", ["byte", "pieces"])
@pytest.mark.parametrize(
    ("template", "own", "others"),
    [
        (CHATML, "add 1 2<|im_end|>It is 3.<|im_end|>", "\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"),
        (
            CALLS_END_OTHERWISE,
            "add 1 2<pad>It is 3.<|im_end|>",
            "<|im_start|>tool\n3<|im_end|><|im_start|>assistant\n",
        ),
    ],
)
def test_what_a_tool_says_is_read_and_not_scored(kind: str, template: str, own: str, others: str) -> None:
    tokenizer, pair = encoded(template, [CALL, SUM, TOLD], kind)
    assert not pair.problems
    spaces = str.maketrans("", "", " ")  # which a SentencePiece-like decoder adds and drops at special tokens
    assert scored_text(tokenizer, pair).translate(spaces) == own.translate(spaces)
    assert scored_text(tokenizer, pair, is_scored=False).translate(spaces) == others.translate(spaces)
    assert pair.targets == (len(pair.chosen_ids) - len(pair.unscored), len(pair.rejected_ids))


def test_the_model_reads_what_it_will_read_when_it_answers_the_tool() -> None:
    tokenizer, pair = encoded(CHATML, [CALL, SUM, TOLD])
    before = encode_prompt(tokenizer, [*chat("1+2?"), CALL, SUM])
    assert (pair.prompt_ids + pair.chosen_ids)[: len(before)] == before == [*before[:-1], before[-1]]
    assert pair.unscored[-1] == len(before) - 1


def test_a_turn_that_is_written_otherwise_where_it_is_the_last_ends_at_its_end_token() -> None:
    tokenizer, pair = encoded(LAST_THINKS, [CALL, SUM, TOLD])
    assert not pair.problems and scored_text(tokenizer, pair) == "add 1 2<|im_end|><think></think>It is 3.<|im_end|>"


@pytest.mark.parametrize(
    "template",
    [
        LAST_THINKS.replace("assistant\n{% endif", "assistant\n<think></think>{% endif"),
        LAST_THINKS.replace("<|im_end|>", "{{ '<pad>' if m.tool_calls else '<|im_end|>' }}"),
        CHATML.replace("{{ m.content }}", "{{ m.content }}{{ messages | length if loop.index0 == 2 else '' }}"),
    ],
)
def test_a_template_that_does_not_show_where_turns_begin_and_end_makes_a_bad_row(template: str) -> None:
    """The first turn begins, or ends, in another way than alone; a tool's message is written in another way."""
    _, pair = encoded(template, [CALL, SUM, TOLD])
    assert [problem.kind for problem in pair.problems] == ["chat template does not fit"]


def test_turns_of_a_template_without_a_generation_prompt() -> None:
    answer = [*chat("x", "a", "b", "c")[1:]]
    tokenizer, pair = encoded(WITH_BOS_AND_EOS, answer)
    assert not pair.problems
    assert scored_text(tokenizer, pair) == " a </s> c </s>"
    assert scored_text(tokenizer, pair, is_scored=False) == "[INST] b [/INST]"


def test_a_template_that_leaves_out_what_a_tool_says_within_a_completion_makes_a_bad_row() -> None:
    users = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    _, pair = encoded(users, [CALL, SUM, TOLD])
    assert [problem.kind for problem in pair.problems] == ["chat template does not fit"]
    assert "leaves out a message of the role tool" in pair.problems[0].detail


@pytest.mark.parametrize(("room", "kind"), [(1000, "chosen == rejected"), (30, "chosen == rejected after truncation")])
def test_a_pair_that_differs_in_what_a_tool_says_alone_makes_a_bad_row(room: int, kind: str) -> None:
    tokenizer = tokenizer_of("byte")
    tokenizer.chat_template = CHATML
    other = [CALL, {**SUM, "content": "4"}, TOLD if room == 1000 else {**TOLD, "content": "Four"}]
    row = PreferenceRow(chat("1+2?"), [CALL, SUM, TOLD], other, 1)
    (pair,) = PairEncoder(tokenizer, max_length=room, max_prompt_length=5).encode_rows([row])
    assert [problem.kind for problem in pair.problems] == [kind]


def test_an_end_token_within_any_turn_makes_a_bad_row() -> None:
    for odd in ([{**CALL, "content": "a<|im_end|>b"}, SUM, TOLD], [CALL, SUM, {**TOLD, "content": "a<|im_end|>b"}]):
        _, pair = encoded(CHATML, odd)
        assert "completion holds the end token" in [problem.kind for problem in pair.problems]


def test_an_answer_that_is_cut_keeps_what_is_scored_of_its_beginning() -> None:
    _, whole = encoded(CHATML, [CALL, SUM, TOLD])
    _, cut = encoded(CHATML, [CALL, SUM, TOLD], max_length=len(whole.prompt_ids) + 12)
    assert cut.chosen_ids == whole.chosen_ids[:12] and cut.completions_cut == 1
    assert cut.unscored == [place for place in whole.unscored if place < len(whole.prompt_ids) + 12] != []
    assert sum(cut.targets) == 12 - len(cut.unscored) + len(cut.rejected_ids)


def trajectories(count: int) -> list[dict[str, Any]]:
    plain = {"role": "assistant", "content": "4"}
    return [
        {
            "prompt": chat(f"{i}?"),
            "chosen": [CALL, {"role": "tool", "content": str(i)}, TOLD] if i % 3 else [TOLD],
            "rejected": [CALL, SUM, plain] if i % 2 else [plain],
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_scored_survives_the_disk(tmp_path: Path, workers: int) -> None:
    tokenizer = tokenizer_of("byte")
    tokenizer.chat_template = CHATML
    rows = trajectories(1100)  # of three tasks
    pairs, report = prepare_pairs(written(tmp_path, rows), tokenizer, workers=workers, cache_dir=tmp_path / "cache")
    encoder = PairEncoder(tokenizer, max_length=1024)
    for i in (0, 1, 2, 3, 600, 1099):
        made = PreferenceRow(rows[i]["prompt"], rows[i]["chosen"], rows[i]["rejected"], i + 1)
        truth = encoder.encode_rows([made])[0]
        pair = pairs[i]
        ids = np.concatenate((pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        own = np.ones(len(ids), dtype=bool)
        own[truth.unscored] = False
        start, middle = len(pair.prompt_ids), len(pair.prompt_ids) + len(pair.chosen_ids)
        for (_, found), expected in zip(pair.completions, (own[start:middle], own[middle:]), strict=True):
            assert own.all() if found is None else np.array_equal(found, expected)
        assert pair.targets == truth.targets == tuple(pairs.targets[i])
    assert pairs[0].chosen_scored is None and pairs[1].rejected_scored is not None
    others = report.kinds["completion holds a message that is not the assistant's"]
    assert others.count == 1100 - len(range(0, 1100, 6)) and report.fate(others) == "kept"
    both = Mixture([pairs, pairs], ["a", "b"])
    assert np.array_equal(both.targets[1100:], pairs.targets)
    assert np.array_equal(both[1101].chosen_scored, pairs[1].chosen_scored)


def test_data_that_differ_in_what_is_scored_alone_have_different_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared(name: str) -> tuple[Any, Any]:
        tokenizer = tokenizer_of("byte")
        tokenizer.chat_template = CHATML
        return prepare_pairs(written(tmp_path, trajectories(2)), tokenizer, cache_dir=tmp_path / name)

    def all_scored(encoder: PairEncoder, rows: list[PreferenceRow]) -> Any:
        made = encode(encoder, rows)
        for pair in made:
            pair.unscored = []
        return made

    (masked, report), encode = prepared("masked"), PairEncoder.encode_rows
    monkeypatch.setattr(PairEncoder, "encode_rows", all_scored)
    whole, other = prepared("whole")
    assert np.array_equal(masked.tokens, whole.tokens) and len(masked.unscored) > len(whole.unscored) == 0
    assert report.digest != other.digest


def test_a_run_counts_and_divides_by_scored_tokens_alone(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cpo's term of SFT is divided by the mean scored length; tokens that are computed stay all tokens."""
    train, evaluate, seen = dpo.preference.take_step, dpo.preference.evaluate, []

    def step(*args: Any) -> Any:
        seen.append((args[4].chosen_length, args[4].num_tokens))
        return train(*args)

    def look(policy: Any, reference: Any, sets: Any, *rest: Any) -> Any:
        seen.append((sets[""].chosen_length, None))
        return evaluate(policy, reference, sets, *rest)

    monkeypatch.setattr(dpo.preference, "take_step", step)
    monkeypatch.setattr(dpo.preference, "evaluate", look)
    rows, chat_template = written(tmp_path, trajectories(12)), tmp_path / "chat.jinja"
    chat_template.write_text(CHATML)
    flags = ["--data.train", str(rows), "--data.validation", str(rows), "--model.chat_template", str(chat_template)]
    flags += ["--loss.name", "cpo", "--train.global_batch_size", "12", "--train.max_steps", "1", "--log.samples", "0"]
    more = ["--data.train_limit", "12", "--data.validation_limit", "12", "--data.max_length", "128"]
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *flags, *more)) == 0
    lengths = {"max_length": 128, "max_prompt_length": 64}
    pairs, _ = prepare_pairs(rows, _with_template(tiny_policy), **lengths, cache_dir=tmp_path / "other")
    scored, computed = float(pairs.targets[:, 0].mean()), int(pairs.lengths.sum() + pairs.lengths[:, 0].sum())
    assert seen == [(scored, None), (scored, computed), (scored, None)] and scored < pairs.lengths[:, 1].mean()
    (line,) = [line for line in read_lines(tmp_path / "run") if "loss" in line]
    assert line["num_tokens"] == computed


def _with_template(folder: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML
    return tokenizer


def test_weights_are_those_of_the_scored_tokens() -> None:
    ids = np.arange(1, 7, dtype=np.int32)
    scored = np.array([True, True, False, False, True, True])
    pair = TokenizedPair(0, ids, ids, ids[:3], chosen_scored=scored)
    by_length = weigher(False, 0.5, 0)
    assert by_length is not None and by_length(0, pair)[0].tolist() == [1, 1, 1, 0.5]
    drawn = weigher(True, None, 0)
    assert drawn is not None and [sum(of) for of in drawn(0, pair)] == [3, 3]
