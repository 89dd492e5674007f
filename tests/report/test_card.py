"""What a run leaves to look at: the curves, the closing table, the model card."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from dpo.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig, to_dict
from dpo.report.card import closing_rows, code, model_card
from dpo.report.figures import plot
from tests.report.runs import HOSTILE

VERSIONS = {"python": "3.11.2", "torch": "2.13.0"}


def training_line(step: int, **changes: Any) -> dict[str, Any]:
    return {"step": step, "loss": 0.7 - step / 10, "rewards/margins": step / 4, "rewards/accuracies": 0.5} | changes


def evaluation_line(step: int, loss: float, margin: float | None, accuracy: float) -> dict[str, Any]:
    return {"step": step, "eval_loss": loss, "eval_rewards/margins": margin, "eval_rewards/accuracies": accuracy}


WITH_VALIDATION = [
    {"sft_step": 1, "sft_loss": 3.0}, {"sft_step": 2, "sft_loss": 2.5}, evaluation_line(0, 0.693147, 0.0, 0.5),
    training_line(1), training_line(2), evaluation_line(2, 0.51234, 1.25, 0.875),
]  # fmt: skip


def size_of_png(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def test_the_curves_are_a_png_with_a_panel_for_sft_where_there_was_one(tmp_path: Path) -> None:
    plot(WITH_VALIDATION, tmp_path / "a.png")
    plot([line for line in WITH_VALIDATION if "step" in line], tmp_path / "b.png")
    assert size_of_png(tmp_path / "a.png") == (4 * 600, 480)
    assert size_of_png(tmp_path / "b.png") == (3 * 600, 480)


def test_the_curves_can_be_drawn_of_anything_a_run_writes(tmp_path: Path) -> None:
    plot([], tmp_path / "a.png")
    plot([training_line(1, loss=None, **{"rewards/margins": None})], tmp_path / "b.png")
    assert size_of_png(tmp_path / "a.png") == size_of_png(tmp_path / "b.png") == (3 * 600, 480)


def test_the_closing_table_holds_first_and_last_validation() -> None:
    assert closing_rows(WITH_VALIDATION) == [
        ["validation", "before", "after"],
        ["accuracy", "0.5000", "0.8750"],
        ["reward margin", "0.0000", "1.2500"],
        ["loss", "0.6931", "0.5123"],
    ]


def test_without_validation_the_closing_table_holds_first_and_last_step() -> None:
    assert closing_rows([training_line(1), training_line(2), training_line(3, loss=None)]) == [
        ["training", "first step", "last step"],
        ["accuracy", "0.5000", "0.5000"],
        ["reward margin", "0.2500", "0.7500"],
        ["loss", "0.6000", "-"],
    ]
    assert closing_rows([])[1] == ["accuracy", "-", "-"]


def card_of(policy: str, loss: LossConfig = LossConfig(), **train: Any) -> tuple[dict[str, Any], str]:  # noqa: B008
    config = Config(
        model=ModelConfig(policy=policy), data=DataConfig(train="owner/pairs"), loss=loss, train=TrainConfig(**train)
    )
    card = model_card(to_dict(config), WITH_VALIDATION, VERSIONS)
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_has_the_metadata_that_the_hub_reads() -> None:
    front, body = card_of("openai-community/gpt2")
    assert front == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["dpo"],
        "base_model": "openai-community/gpt2",
    }  # fmt: skip
    assert body.startswith("\n# gpt2 trained with DPO\n")


@pytest.mark.parametrize("policy", ["./model", "/data/model", "~/model", "builtin:tiny", "a/b/c"])
def test_only_a_hub_id_is_called_a_base_model(policy: str) -> None:
    assert "base_model" not in card_of(policy)[0]


@pytest.mark.parametrize(
    ("folder", "told"),
    [("reference", "`gpt2` after 1 epoch of SFT"), ("final", "`gpt2` after 1 epoch of SFT, then `ipo`")],
)
def test_the_card_says_what_the_result_of_another_run_was_made_from(folder: str, told: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    policy = str(tmp_path / folder)
    assert "base_model" not in card_of(policy)[0]
    settings = {"model": {"policy": "gpt2"}, "train": {"sft_epochs": 1}, "loss": {"name": "ipo"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    front, body = card_of(policy)
    assert front["base_model"] == "gpt2" and body.startswith("\n# gpt2 trained with DPO\n")
    assert f"`{policy}` ({told}) trained on the preferences" in body
    (tmp_path / "config.yaml").write_text("[")
    assert "base_model" not in card_of(policy)[0]


def test_a_folder_that_looks_like_a_hub_id_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in card_of("owner/model")[0]


def test_the_card_says_from_what_how_and_what_came_out() -> None:
    body = card_of("gpt2", sft_epochs=2)[1]
    assert "`gpt2` trained after 2 epochs of SFT on the preferences of `owner/pairs`" in body
    assert "| validation | before | after |\n| --- | ---: | ---: |\n| accuracy | 0.5000 | 0.8750 |\n" in body
    assert "Made with python 3.11.2, torch 2.13.0." in body
    settings = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert settings["loss"]["beta"] == 0.1 and settings["train"]["sft_epochs"] == 2
    assert "SFT" not in card_of("gpt2")[1].split("<details>")[0]


@pytest.mark.parametrize(
    ("name", "method"), [("sft", "`sft`"), ("orpo", "`orpo`"), ("ipo", "DPO")]
)
def test_the_card_of_another_objective_does_not_say_dpo(name: Any, method: str) -> None:
    body = card_of("gpt2", LossConfig(name=name))[1]
    assert f"# gpt2 trained with {method}\n" in body
    assert (f"under the objective `{name}`, beta 0.1." in body) == (name != "sft")


class Elements(HTMLParser):
    """Names of the elements of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.names |= {tag, *(name for name, _ in attrs)}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_no_text_of_the_user_is_markup_in_the_card() -> None:
    name = HOSTILE.replace("/", "")
    model = ModelConfig(policy=f"/models/{name}", chat_template=f"```\n{HOSTILE}\n````\n<script>1</script>")
    config = Config(model=model, data=DataConfig(train=HOSTILE), train=TrainConfig())
    card = model_card(to_dict(config), WITH_VALIDATION, VERSIONS, {"training data": HOSTILE})
    found = Elements(MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("---\n", 2)[2]))
    harmless = {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "style", "code", "class", "pre"}
    assert found.names <= harmless | {"details", "summary"}
    assert found.text.count("<script>window.broken = 1</script>") >= 3  # policy, data, facts: shown as they are
    assert name.replace("\u2028", " ")[:60] in " ".join(found.text.split())


def test_the_facts_are_in_the_card() -> None:
    config = to_dict(Config(model=ModelConfig(policy="gpt2"), data=DataConfig(train="d")))
    card = model_card(config, WITH_VALIDATION, VERSIONS, {"training data": "44 pairs", "hardware": "8 x H100"})
    assert "| training data | `44 pairs` |\n| hardware | `8 x H100` |" in card
    assert "loss `sigmoid`, beta 0.1" in card


@pytest.mark.parametrize(("text", "shown"), [("a", "`a`"), ("a`b", "``a`b``"), ("`a", "`` `a ``"), ("a\n b", "`a b`")])
def test_code_is_code_whatever_it_holds(text: str, shown: str) -> None:
    assert code(text) == shown
    assert "<code>" in MarkdownIt().render(code(text))


def test_the_card_holds_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("HF_TOKEN", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN", "DPO_TEST_PASSWORD")
    for name in names:
        monkeypatch.setenv(name, f"secret-of-{name}")
    config = Config(model=ModelConfig(policy="gpt2"), data=DataConfig(train="d"))
    card = model_card(to_dict(config), WITH_VALIDATION, VERSIONS)
    assert "secret-of" not in card and not any(name in card for name in names)
