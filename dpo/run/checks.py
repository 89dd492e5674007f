"""What cannot work is refused by name, before weights are loaded: settings that contradict one another or the model."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from dpo.config import Config, LoraConfig
from dpo.data.chat import end_ids
from dpo.data.mixture import Pairs
from dpo.errors import UserError
from dpo.model import adapters, load
from dpo.model.forward import Scorer
from dpo.model.sequence import heads_complaint
from dpo.model.shape import steady_length
from dpo.run import roles
from dpo.runtime import engine as deepspeed_engine


def check_backends(config: Config) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        UserError: Naming the first.
    """
    for name in config.log.backends:
        if find_spec(name) is None:
            raise UserError(f"log.backends names {name}, which is not installed; pip install {name}")


def check_engine(config: Config, engine_config: dict[str, Any], precision: str) -> None:
    """Refuse settings that the DeepSpeed configuration rules out.

    Args:
        config: Settings.
        engine_config: As `engine.build_config` makes it.
        precision: Of the policy.
    Raises:
        UserError: Naming the first.
    """
    sharded = deepspeed_engine.zero_stage(engine_config) == 3
    if config.model.compile and sharded:
        raise UserError("model.compile is true under ZeRO-3, which gathers weights within the blocks; use stage 2")
    if "tdpo" in config.loss.names and sharded:
        raise UserError("loss.name tdpo needs whole weights of the reference, ZeRO-3 shards them; use stage 1 or 2")
    if config.train.on_nonfinite == "skip" and not deepspeed_engine.looks_at_gradient(engine_config, precision):
        raise UserError(
            "train.on_nonfinite is skip and --config tells DeepSpeed not to look whether gradients are finite; take"
            " zero_optimization.compute_grad_norm and bf16.check_grad_overflow out of it, or use stop"
        )


def check_settings(config: Config, zero: dict[str, Any], *, for_elsewhere: bool) -> None:
    """Refuse settings that contradict one another, or that this machine cannot do.

    Args:
        config: Settings.
        zero: Section zero_optimization of the DeepSpeed JSON.
        for_elsewhere: The run will be on another machine: this one's packages do not matter.
    Raises:
        UserError: Naming the first.
    """
    model, reference, mode = config.model, config.reference, roles.reference_mode(config)
    adapted = roles.trains_adapters(config)
    if adapters.is_adapter(model.policy or "") and model.lora != LoraConfig():
        raise UserError(
            f"model.lora.r is {model.lora.r} and model.policy {model.policy} is an adapter already; leave model.lora"
            f" out to train it on, or name its base"
        )
    if adapted and not for_elsewhere:
        adapters.check_installed()
    if mode == "adapter" and not adapted:
        raise UserError("reference.mode is adapter and no adapters are trained; set model.lora.r, or use online")
    if mode == "adapter" and reference.dtype not in ("auto", "policy"):
        raise UserError(f"reference.dtype is {reference.dtype}, but with adapters it is the policy's own; use policy")
    dora = model.lora.dora or adapters.settings_of(model.policy or "").get("use_dora")
    if dora and zero.get("stage") == 3:
        raise UserError("DoRA under ZeRO-3: peft needs the norms of whole weights, which are sharded; use zero2.json")
    if reference.sync_steps is not None and adapted:
        raise UserError(
            "reference.sync_steps with adapters: a mean of two adapters' factors is not the mean of their products;"
            " leave it out, or train all weights (model.lora.r 0)"
        )
    if reference.sync_steps is not None and reference.path is not None:
        raise UserError(
            f"reference.sync_steps with reference.path {reference.path}: only the policy's own start can follow it;"
            f" leave one out"
        )
    if reference.sync_steps is not None and "tdpo" in config.loss.names:
        raise UserError(
            "reference.sync_steps with loss.name tdpo, whose evaluations would need the whole distributions of the"
            " reference as it was at the start; leave one out"
        )
    if config.train.save_weights_only and adapted:
        raise UserError(
            "train.save_weights_only with adapters, whose checkpoints are small: the frozen weights are not in them;"
            " leave it out"
        )
    if model.load_in_4bit:
        _check_four_bits(config, mode, adapted, zero)
        _needs_bitsandbytes("model.load_in_4bit is true", "false", for_elsewhere)
    if config.optim.name == "adamw_8bit":
        if zero.get("offload_optimizer", {}).get("device", "none") != "none":
            raise UserError("optim.name is adamw_8bit with offload_optimizer, whose steps run on the CPU; use adamw")
        _needs_bitsandbytes("optim.name is adamw_8bit", "adamw", for_elsewhere)


def _check_four_bits(config: Config, mode: str, adapted: bool, zero: dict[str, Any]) -> None:
    if not adapted:
        raise UserError("model.load_in_4bit is true and no adapters are trained: 4 bits cannot learn; set model.lora.r")
    if mode != "adapter" and config.reference.path is None:
        raise UserError(f"model.load_in_4bit is true with reference.mode {mode}, a second copy; use adapter")
    if zero.get("stage") == 3:
        raise UserError("model.load_in_4bit is true under ZeRO-3, which cannot shard 4-bit weights; use zero2.json")


def check_sequence(config: Config, model_config: Any) -> None:
    """Refuse what ranks that compute a row together cannot do.

    Args:
        config: Settings.
        model_config: Of the policy.
    Raises:
        UserError: Naming the first.
    """
    size, loss = config.train.sequence_parallel_size, config.loss
    if size == 1:
        return
    heads = heads_complaint(model_config, size)
    refused = {
        f"model.policy {config.model.policy}: {heads}": heads is not None,
        "train.layout padded, and packed rows are cut; use shared": config.train.layout == "padded",
        "loss.name tdpo, which needs whole next-token distributions; use sigmoid": "tdpo" in loss.names,
        "loss.wpo; leave it out": loss.wpo,
        "model.compile; leave it out": config.model.compile,
        "model.loss_in_forward, which needs whole completions on a rank; use auto": (
            config.model.loss_in_forward is True
        ),
    }
    for what, is_set in refused.items():
        if is_set:
            raise UserError(f"train.sequence_parallel_size is {size} with {what} (docs/long_context.md)")


def _needs_bitsandbytes(what: str, instead: str, for_elsewhere: bool) -> None:
    if not for_elsewhere and find_spec("bitsandbytes") is None:
        raise UserError(f"{what}, which needs bitsandbytes; pip install bitsandbytes, or use {instead}")


def max_length(config: Config, model_config: Any) -> int:
    """data.max_length, resolved.

    Raises:
        UserError: If the model cannot read so much, or not alike in every batch.
    """
    context = load.context_length(model_config)
    wanted = config.data.max_length
    steady = steady_length(model_config)
    if wanted is None:
        return min(1024, context or 1024, steady or 1024)
    if context is not None and wanted > context:
        raise UserError(f"data.max_length is {wanted}, the model's context {context} tokens; use at most {context}")
    if steady is not None and wanted > steady:
        raise UserError(
            f"data.max_length is {wanted}: beyond {steady} tokens this model's rotary embedding follows the longest"
            f" sequence of a batch, so that a pair's score would follow its neighbours; use at most {steady}"
        )
    return wanted


def check_reference_path(config: Config, tokenizer: Any, longest: int) -> None:
    """Refuse another model as reference that cannot read the policy's token ids.

    Args:
        config: With reference.path or without.
        tokenizer: Of the policy.
        longest: Longest prompt + completion in tokens.
    Raises:
        UserError: If a token of the policy has another id in the reference's tokenizer (tokens that only the reference
            has never occur), or the reference's vocabulary or context is too small.
    """
    path, trust = config.reference.path, config.model.trust_remote_code
    if path is None:
        return
    check_same_tokens("reference.path", path, tokenizer, config, config.reference.revision)
    base, revision = adapters.base_of(path, config.reference.revision)
    other = load.load_config(base, revision=revision, trust_remote_code=trust, name="reference.path")
    context, vocabulary = load.context_length(other), other.get_text_config().vocab_size
    if context is not None and context < longest:
        raise UserError(
            f"reference.path {path} reads {context} tokens, pairs have up to {longest}; lower data.max_length"
        )
    if not reads(vocabulary, tokenizer):
        raise UserError(f"reference.path {path} has {vocabulary} tokens, the policy's tokenizer {len(tokenizer)}")


def check_same_tokens(what: str, path: str, tokenizer: Any, config: Config, revision: str | None = None) -> None:
    """Refuse a model whose tokenizer gives a token of the policy's another id.

    Args:
        what: Setting or flag that names it.
        path: Of the model.
        tokenizer: Of the policy.
        config: Settings.
        revision: Of the model on the hub.
    Raises:
        UserError: Naming the token.
    """
    ours = tokenizer.get_vocab()
    theirs = load.load_tokenizer(
        adapters.tokenizer_of(path), revision=revision, trust_remote_code=config.model.trust_remote_code, name=what
    ).get_vocab()
    wrong = next((token for token in ours if theirs.get(token) != ours[token]), None)
    if wrong is not None:
        raise UserError(
            f"{what} {path} has another tokenizer than the policy: {wrong!r} is {theirs.get(wrong)} there and"
            f" {ours[wrong]} here; name a model with the policy's tokenizer"
        )


def check_distributions(config: Config, scorers: Sequence[Scorer]) -> None:
    """Refuse losses of whole next-token distributions where these are not to be had.

    Args:
        config: Settings.
        scorers: Of the policy, and of the reference where there is one.
    Raises:
        UserError: Naming the loss.
    """
    loss = config.loss
    if not loss.wpo and "tdpo" not in loss.names:
        return
    option = "loss.wpo" if loss.wpo else "loss.name tdpo"
    if any(scorer.own_head for scorer in scorers):
        raise UserError(
            f"{option} is for models whose logits are a matrix product, scaled or capped; this head does more, leave it"
            f" out"
        )
    vocabularies = [len(scorer.head.weight) for scorer in scorers]
    if not loss.wpo and len(set(vocabularies)) > 1:
        raise UserError(
            f"loss.name tdpo compares whole next-token distributions: reference.path {config.reference.path} has"
            f" {vocabularies[1]} tokens, the policy {vocabularies[0]}; use a reference with the policy's tokens"
        )


def reads(vocabulary: int, tokenizer: Any) -> bool:
    """Whether a model with so many embeddings reads a tokenizer's tokens, but for added ones that no text needs.

    Such as the token for images in the tokenizer of Gemma-3's models for text.
    """
    beyond = {i for i in tokenizer.added_tokens_decoder if i >= vocabulary}
    needed = {*end_ids(tokenizer), tokenizer.bos_token_id, tokenizer.pad_token_id}
    return len(tokenizer) - len(beyond) <= vocabulary and not beyond & needed


def check_ids(tokenizer: Any, vocabulary: int, *sets: Pairs | None) -> None:
    """Refuse data with tokens that the policy has no embedding for, where the tokenizer has such.

    Raises:
        UserError: Naming one.
    """
    if len(tokenizer) <= vocabulary:
        return
    for pairs in [each for each in sets if each is not None]:
        for index in range(len(pairs)):
            pair = pairs[index]
            highest = max(int(ids.max()) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
            if highest >= vocabulary:
                token = tokenizer.convert_ids_to_tokens(highest)
                raise UserError(
                    f"row {pairs.row_numbers[index]} of the data has {token!r}, and the policy has no embedding for it;"
                    f" leave it out"
                )
