"""What cannot be loaded is told by its cause: the folder, DeepSpeed's settings, or a GPU that is too small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from dpo.errors import UserError
from dpo.model.load import check_weights, load_config, load_model, load_tokenizer


@pytest.mark.parametrize(
    ("error", "zero3", "said"),
    [
        (RuntimeError("odd weights"), False, "cannot be loaded: odd weights; fix the folder, or name another"),
        (RuntimeError("no such op"), True, "no such op; fix zero_optimization in --config, or the folder"),
        (torch.OutOfMemoryError("no room"), False, "does not fit: no room; use more GPUs, or offload"),
    ],
)
def test_an_error_of_loading_names_what_to_fix(
    error: Exception, zero3: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    config = {"zero_optimization": {"stage": 3}} if zero3 else None
    with pytest.raises(UserError, match=f"model.policy {tmp_path}") as caught:
        load_model(str(tmp_path), dtype=torch.float32, zero3_config=config)
    assert said in str(caught.value)


def test_an_id_of_the_hub_that_cannot_be_reached_is_not_taken_for_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(UserError, match="reference.path owner/localmodel: neither a folder nor reachable on the hub"):
        load_config("owner/localmodel", name="reference.path")


def test_a_folder_without_a_tokenizer_says_how_to_name_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=f"tokenizer {tmp_path}: the folder holds no tokenizer; .* name it by model"):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_weights_is_named_by_the_setting_that_gave_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"reference.path {tmp_path}: no weights there"):
        check_weights(str(tmp_path), "reference.path")
