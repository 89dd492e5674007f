"""The audit: known figures of real data, every finding on rows made for it, baselines by hand, all text escaped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

import dpo.audit
import dpo.data.audit
import train_dpo
from dpo.__main__ import main
from dpo.data.audit import audit, cached_audit
from dpo.data.heuristics import accuracy, first_token, first_token_rates, longer, overlap
from dpo.data.store import DataSet
from dpo.errors import printable
from tests.by_path import prepare_pairs
from tests.data.tiny_tokenizers import CHATML, chat, tokenizer_of, with_template


def prepared(folder: Path, name: str, role: str, rows: list[Any], tokenizer: Any = None, **options: Any) -> DataSet:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"max_length": 60, "max_prompt_length": 30, "on_bad_row": "skip", "cache_dir": folder / "c"} | options
    return DataSet(name, role, *prepare_pairs(folder / name, tokenizer or tokenizer_of("byte"), **options))


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": f"{prompt}:", "chosen": f" {chosen}", "rejected": f" {rejected}"}


def findings(one: dict[str, Any]) -> dict[str, tuple[int, str, list[int]]]:
    return {f["kind"]: (f["count"], f["fate"], f["rows"]) for f in one["findings"] if f["count"]}


# --- real data -------------------------------------------------------------------------------------------------------


def test_the_audit_of_hh_finds_what_is_known_of_it(shared_data, tmp_path, capsys):
    arguments = ["audit", str(shared_data / "hh-rlhf"), "--tokenizer", str(shared_data / "gpt2-tokenizer")]
    assert main([*arguments, "--json", str(tmp_path / "a.json"), "--cache_dir", str(tmp_path / "c")]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    known = {
        "chosen == rejected": (20, 8), "empty response": (7, 0), "prompts differ": (7, 4),
        "longer than max_length": (30, 13), "repeats an earlier pair": (0, 0),
    }  # fmt: skip
    counts = [{f["kind"]: f["count"] for f in one["findings"]} for one in found["sets"]]
    assert {kind: tuple(c[kind] for c in counts) for kind in known} == known
    assert [h["role"] for h in found["heuristics"]] == ["train", "validation"]
    assert [round(100 * h["longer_characters"]) for h in found["heuristics"]] == [52, 55]
    assert [h["baseline"] >= 0.5 and (h["first_token"] is None) for h in found["heuristics"]] == [True, False]
    assert found["leaks"] == []  # no opening question is in two slices
    printed = capsys.readouterr().out
    assert "no leak: no validation row has a prompt of the training data" in printed
    assert 'the rule "the chosen one is longer in characters" is right in 55.3% of the pairs' in printed


def test_conversations_and_votes_are_audited_without_a_chat_template(shared_data, tmp_path, capsys):
    for name, pairs in (("llamafactory-dpo-en-demo", 300), ("pandalm-testset", 999 - 105 - 6 - 52)):
        file = tmp_path / "a.json"
        arguments = ["audit", str(shared_data / name), "--tokenizer", str(shared_data / "gpt2-tokenizer")]
        assert main([*arguments, "--json", str(file), "--cache_dir", str(tmp_path / "c")]) == 0
        (one,) = json.loads(file.read_text())["sets"]
        assert one["pairs"] == pairs
        if name == "pandalm-testset":
            odd = {kind: (count, fate) for kind, (count, fate, _) in findings(one).items()}
            assert odd["tie"] == (105, "tie") and odd["not a string"] == (6, "bad") and odd["empty response"][0] == 52
    assert "are rendered by the tokenizer's chat template, else by a plain one" in capsys.readouterr().out


# --- findings --------------------------------------------------------------------------------------------------------


def test_repetitions_contradictions_and_leaks_name_their_rows(tmp_path):
    train = [
        pair("p", "a", "b"), pair("q", "a", "b"), pair("p", "a", "b"), pair("q", "b", "a"), pair("q", "a", "c"),
    ]  # fmt: skip
    held = [pair("r", "a", "b"), pair("p", "a", "b"), pair("q", "x", "y")]
    found = audit(
        [prepared(tmp_path, "t.jsonl", "train", train), prepared(tmp_path, "v.jsonl", "validation", held)],
        tokenizer_of("byte"),
    )
    first, second = found["sets"]
    assert findings(first) == {
        "repeats an earlier pair": (1, "kept", [3]),
        "contradicts an earlier pair": (1, "kept", [4]),
        "repeats an earlier prompt": (3, "kept", [3, 4, 5]),
    }
    details = {f["kind"]: f["detail"] for f in first["findings"]}
    assert details["repeats an earlier pair"] == "the same as row 1"
    assert details["contradicts an earlier pair"] == "the other way round in row 2"
    assert findings(second) == {}
    assert found["leaks"] == [
        {"kind": "pair", "validation": "v.jsonl", "count": 1,
         "examples": [{"row": 2, "train": "t.jsonl", "train_row": 1}]},
        {"kind": "prompt", "validation": "v.jsonl", "count": 2,
         "examples": [{"row": 2, "train": "t.jsonl", "train_row": 1}, {"row": 3, "train": "t.jsonl", "train_row": 2}]},
    ]  # fmt: skip
    alone = audit([prepared(tmp_path, "v.jsonl", "validation", held)], tokenizer_of("byte"))
    assert alone["leaks"] == [] and alone["heuristics"][0]["first_token"] is None


def test_turns_within_a_completion_are_no_surprise(tmp_path):
    tokenizer = tokenizer_of("byte")
    tokenizer.chat_template = CHATML
    tool = {"role": "tool", "content": "3"}
    rows = [
        {"prompt": chat("a"), "chosen": [*chat("a", "b")[1:], tool, *chat("a", c)[1:]], "rejected": chat("a", "d")[1:]}
        for c in ("e", "f <pad> g")
    ]
    one = prepared(tmp_path, "t.jsonl", "train", rows, tokenizer, max_length=500)
    odd = findings(audit([one], tokenizer)["sets"][0])
    assert odd.pop("completion holds a message that is not the assistant's") == (2, "kept", [1, 2])
    assert odd == {"special token within a completion": (1, "kept", [2]), "repeats an earlier prompt": (1, "kept", [2])}


def test_surprises_among_special_tokens_are_found(tmp_path):
    tokenizer = tokenizer_of("byte", around="<s> $A")
    rows = [
        pair("plain", "a", "b"),
        pair("one </s> inside", "a", "b"),
        pair("one <s> inside", "a", "b"),
        pair("plain", "a <pad> c", "b"),
        pair("long", "a" * 80, "b"),
        pair("p" * 50, "a" * 20, "b"),
    ]
    found = audit([prepared(tmp_path, "t.jsonl", "train", rows, tokenizer)], tokenizer)
    assert found["tokenizer"] == {"name": "", "bos": "<s>", "eos": "</s>"}
    odd = findings(found["sets"][0])
    for kind in ("longer than max_length", "prompt lost its start", "repeats an earlier prompt"):
        odd.pop(kind)
    assert odd == {
        "special token within a prompt": (2, "kept", [2, 3]),
        "BOS within a text": (1, "kept", [3]),
        "special token within a completion": (1, "kept", [4]),
        "completion without end token": (1, "cut", [5]),
    }


def test_a_word_that_was_added_to_the_vocabulary_is_no_surprise_and_may_end_a_completion(tmp_path):
    tokenizer = tokenizer_of("byte")
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("<end>", special=False)])
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<end>")
    rows = [{"prompt": chat("<think>"), "chosen": chat("", "<think> a")[1:], "rejected": chat("", "b")[1:]}]
    one = prepared(tmp_path, "t.jsonl", "train", rows, tokenizer)
    assert tokenizer.decode(one.pairs[0].chosen_ids) == "<think> a<end>"
    assert findings(audit([one], tokenizer)["sets"][0]) == {}


def test_equal_prompts_are_found_though_their_completions_cut_them_differently(tmp_path):
    prompt = "".join(f"{i}," for i in range(30))
    train, held = [pair(prompt, "a" * 20, "b")], [pair(prompt, "a", "b" * 9), pair(prompt[1:], "c", "d")]
    sets = [prepared(tmp_path, "t.jsonl", "train", train), prepared(tmp_path, "v.jsonl", "validation", held)]
    assert sets[0].pairs[0].prompt_ids.tolist() != sets[1].pairs[0].prompt_ids.tolist()
    (leak,) = audit(sets, tokenizer_of("byte"))["leaks"]
    assert (leak["kind"], leak["count"]) == ("prompt", 1)


def test_a_template_that_writes_bos_twice_is_found_and_its_other_tokens_are_not(tmp_path):
    tokenizer = tokenizer_of("byte")
    rows = [{"prompt": chat("Hi", "Ho", "Hi"), "chosen": chat("", "a")[1:], "rejected": chat("", "b")[1:]}]
    template = "{{ bos_token }}" + CHATML
    once = prepared(tmp_path, "a.jsonl", "train", rows, with_template(tokenizer, template), max_length=200)
    twice = prepared(tmp_path, "b.jsonl", "train", rows, with_template(tokenizer, "<s>" + template), max_length=200)
    found = audit([once, twice], tokenizer)
    assert [findings(one) for one in found["sets"]] == [{}, {"BOS twice at the start": (1, "kept", [1])}]


def test_lengths_are_those_of_the_pairs(tmp_path):
    rows = [pair("p" * size, "a" * size, "b") for size in range(1, 11)]
    one = prepared(tmp_path, "t.jsonl", "train", rows)
    spread = audit([one], tokenizer_of("byte"))["sets"][0]["lengths"]
    assert spread["prompt"]["max"] == 11 and spread["prompt"]["mean"] == pytest.approx(6.5)  # with its colon
    expected = {"mean": 7.5, "p50": 7.5, "p90": 11.1, "p99": 11.91, "max": 12}
    assert spread["chosen"] == pytest.approx(expected)
    assert spread["chosen_characters"]["mean"] == 6.5 and spread["rejected_characters"]["max"] == 2


# --- trivial rules ---------------------------------------------------------------------------------------------------


def test_rules_are_right_as_often_as_worked_by_hand(tmp_path):
    assert accuracy(np.array([1, 2, 3, 4]), np.array([0, 2, 4, 4])) == (1 + 0.5 + 0 + 0.5) / 4
    train = [pair("q", "yes", "no"), pair("r", "yes", "perhaps"), pair("s", "no", "perhaps"), pair("t", "no", "nine")]
    rows = [
        {"prompt": "abc", "chosen": "ab", "rejected": "xxxx"},  # shorter; all of it in the prompt against none
        {"prompt": "abc", "chosen": "\u00e9\u00e9", "rejected": "xyz"},  # 2 characters, 4 tokens; neither in the prompt
        {"prompt": "abc", "chosen": "axyz", "rejected": "abx"},  # longer; 1 of 4 distinct tokens against 2 of 3
        {"prompt": "abc", "chosen": "yyyz", "rejected": "nz"},  # longer; neither
    ]
    # 1 of 2 against 2 of 4 and 1 of 1 against 2 of 3; counted with their end tokens, 1 of 3 against 2 of 5 and a tie.
    ends = [{"prompt": "abc", "chosen": "ax", "rejected": "abyz"}, {"prompt": "abc", "chosen": "a", "rejected": "abx"}]
    assert overlap(prepared(tmp_path, "x.jsonl", "validation", ends).pairs) == (0.5 + 1) / 2
    one = prepared(tmp_path, "v.jsonl", "validation", rows).pairs
    assert longer(one) == {"longer_characters": 2 / 4, "longer_tokens": 3 / 4}
    assert overlap(one) == (1 + 0.5 + 0 + 0.5) / 4
    train = [{part: text.strip() for part, text in row.items()} for row in train]
    known = prepared(tmp_path, "t.jsonl", "train", train).pairs
    tokenizer = tokenizer_of("byte")
    rates = {tokenizer.decode([token]): rate for token, rate in first_token_rates([known]).items()}
    assert rates == {"y": 3 / 4, "n": 3 / 6, "p": 1 / 4}  # chosen 2 of 2, 2 of 4, 0 of 2
    # a and x, the byte of e-acute and x, a and a: never seen, ties; y before n.
    assert first_token(one, first_token_rates([known])) == (0.5 + 0.5 + 0.5 + 1) / 4


def test_the_baseline_is_the_best_rule_or_its_opposite(tmp_path):
    rows = [pair(f"p{i}", "a", "bbb" if i else "") for i in range(4)]
    rows[0] = pair("p0", "aaaa", "b")
    found = audit([prepared(tmp_path, "t.jsonl", "train", rows)], tokenizer_of("byte"))
    (row,) = found["heuristics"]
    assert row["longer_characters"] == 1 / 4 and row["best"] == "longer_characters" and row["baseline"] == 3 / 4
    lines = dpo.audit._conclusions(found)
    assert lines[-1].startswith('train t.jsonl: the rule "the chosen one is not longer in characters" is right in 75.')


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_nothing_of_the_data_reaches_the_terminal_unescaped(tmp_path, capsys):
    file = tmp_path / "a[red]\x1b[31m.jsonl"
    rows = [
        {"prompt": "p:", "chosen": " a\x1b]0;gone\x07", "rejected": " b", "[bold]\x1b[5m": 1},
        {"prompt": "p:", "chosen": " a", "[bold]\x1b[5m": 1},
        {"prompt": "p\u202e", "chosen": "a", "rejected": "b"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["audit", str(file), "--cache_dir", str(tmp_path / "c")]) == 0
    printed = capsys.readouterr().out
    assert not any(c in printed for c in ("\x1b", "\x07", "\u202e"))
    assert "a[red]\\x1b[31m.jsonl" in printed and "U+001B in chosen" in printed.replace("\n", " ")
    assert printable("a\nb\x1b\u202e\ud800\u00e9") == "a\\nb\\x1b\\u202e\\ud800\u00e9"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["absent.jsonl"], "data 'absent.jsonl': no such file or folder"),
        (["DATA", "--tokenizer", "./absent"], "./absent"),
        (["DATA", "--json", "./absent/a.json"], "--json ./absent/a.json: cannot be written: No such file"),
        (["DATA", "--max_lenght", "3"], "unknown key max_lenght; did you mean max_length?"),
        (["DATA", "--limit", "0"], "--limit is 0; use a whole number of at least 1"),
        (["DATA", "--max_length", "1"], "--max_length is 1; use at least 2"),
        (["DATA", "--validation_fraction", "0.0001"], "none in 1 rows; change --validation_fraction"),
        (["data.json"], "data 'data.json': no such file or folder"),
        (["DATA", "--validation_split", "x"], "--validation_split is x but data.train"),
        (["DATA", "--validation_fraction", "2"], "--validation_fraction is 2.0; use a number between 0 and 1"),
        ([], "data"),
    ],
)
def test_a_mistake_is_one_line(arguments, named, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text(json.dumps(pair("p", "a", "b")) + "\n")
    words = [str(tmp_path / "data.jsonl") if word == "DATA" else word for word in arguments]
    assert main(["audit", *words, "--cache_dir", str(tmp_path / "c")]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("python -m dpo audit: ") and captured.count("\n") == 1 and named in captured


def test_the_length_is_that_of_a_run_on_the_model_and_a_share_is_held_out_as_in_one(tiny_policy, tmp_path):
    rows = [pair(f"{i // 2} {'long ' * 60}", "a", "b") for i in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["audit", str(tmp_path / "data.jsonl"), "--tokenizer", str(tiny_policy), "--json", str(tmp_path / "a.json")]
    words += ["--cache_dir", str(tmp_path / "c"), "--limit", "50", "--validation_fraction", "0.3"]
    assert main(words) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    context = json.loads((tiny_policy / "config.json").read_text())["max_position_embeddings"]
    assert [one["max_length"] for one in found["sets"]] == [context, context] and context < 1024
    assert [one["role"] for one in found["sets"]] == ["train", "validation"] and found["leaks"] == []
    assert sum(one["pairs"] for one in found["sets"]) == 50


def test_tools_are_read_by_the_plain_template(tmp_path, capsys):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "clock", "arguments": {}}]}
    row = {"prompt": chat("Time?"), "chosen": [call], "rejected": chat("", "No")[1:], "tools": [{"name": "clock"}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    words = ["audit", str(tmp_path / "data.jsonl"), "--json", str(tmp_path / "a.json"), "--cache_dir", str(tmp_path)]
    assert main(words) == 0, capsys.readouterr().err
    (one,) = json.loads((tmp_path / "a.json").read_text())["sets"]
    assert one["pairs"] == 1 and not {name for name, (_, fate, _) in findings(one).items() if fate == "bad"}


def test_a_run_leaves_its_audit_and_says_the_most_important(tmp_path, capsys, monkeypatch):
    arguments = [
        "--config", "ds_configs/zero2.json", "--model.policy", "builtin:tiny", "--data.train", "builtin:world",
        "--data.validation", '[{"path": "builtin:world", "split": "train", "name": "same"}]',
        "--data.train_limit", "12", "--data.validation_limit", "6", "--data.cache_dir", str(tmp_path / "cache"),
        "--train.max_steps", "1", "--log.samples", "0", "--train.output_dir",
    ]  # fmt: skip
    assert train_dpo.main([*arguments, str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().err
    assert "audit: leak: rows of validation same whose pair is in the training data: 6 (row 1 is row 1 of " in printed
    assert "audit: validation same: the rule " in printed
    found = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert [(one["name"], one["role"], one["pairs"]) for one in found["sets"]] == [
        ("builtin:world", "train", 12), ("same", "validation", 6),
    ]  # fmt: skip
    described = re.findall(r"^    (\w+)  ", str(dpo.data.audit.__doc__), re.MULTILINE)
    assert list(found) == described

    def again(*_: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(dpo.data.audit, "audit", again)
    assert train_dpo.main([*arguments, str(tmp_path / "other")]) == 0
    assert json.loads((tmp_path / "other" / "audit.json").read_text()) == found


def test_an_audit_is_kept_by_what_it_is_of(tmp_path, monkeypatch):
    one = prepared(tmp_path, "t.jsonl", "train", [pair("p", "a", "b")])
    other = prepared(tmp_path, "u.jsonl", "train", [pair("p", "a", "c")])
    tokenizer = tokenizer_of("byte")
    first = cached_audit([one], tokenizer, tmp_path)
    assert cached_audit([one._replace(role="validation")], tokenizer, tmp_path) != first
    assert cached_audit([other], tokenizer, tmp_path)["sets"][0]["name"] == "u.jsonl"
    assert cached_audit([one, other], tokenizer, tmp_path)["leaks"] == []
    assert cached_audit([one], tokenizer, tmp_path) == first
    for file in tmp_path.glob("audit-*.json"):
        file.write_text("{")
    assert cached_audit([one], tokenizer, tmp_path)["sets"] == first["sets"]


def test_an_audit_that_cannot_be_kept_or_that_another_job_is_keeping_is_made_all_the_same(tmp_path, monkeypatch):
    tokenizer, one = tokenizer_of("byte"), prepared(tmp_path, "t.jsonl", "train", [pair("p", "a", "b")])
    expected = audit([one], tokenizer)["sets"]

    def and_meanwhile(*arguments: Any) -> Any:
        """Another process does the same between our look and our own writing."""
        monkeypatch.setattr(dpo.data.audit, "audit", audit)
        monkeypatch.setattr("dpo.data.store.os.getpid", lambda: 1)
        assert cached_audit([one], tokenizer, tmp_path)["sets"] == expected
        monkeypatch.setattr("dpo.data.store.os.getpid", lambda: 2)
        return audit(*arguments)

    monkeypatch.setattr(dpo.data.audit, "audit", and_meanwhile)
    assert cached_audit([one], tokenizer, tmp_path)["sets"] == expected
    assert [json.loads(file.read_text())["sets"] for file in tmp_path.glob("audit-*")] == [expected]
    assert cached_audit([one], tokenizer, tmp_path / "absent")["sets"] == expected
