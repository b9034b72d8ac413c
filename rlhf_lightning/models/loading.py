"""From a spec to a policy or a scalar model."""

import difflib
import importlib.util
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.names import without_hub
from rlhf_lightning.models.body import attention_of, dropout_rates
from rlhf_lightning.models.compiled import compile_layers
from rlhf_lightning.models.locate import check_code, check_layers, check_model_folder, resolve_path
from rlhf_lightning.models.lora import add_adapter
from rlhf_lightning.models.policy import Policy, check_head
from rlhf_lightning.models.quantized import bitsandbytes_config, keep_only_trained, settle
from rlhf_lightning.models.scalar_head import POOLINGS, HeadInit, Pooling, ScalarModel, init_head
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.models.tokenizer import first_line, load_tokenizer, say_once
from rlhf_lightning.models.unpadded import know_records

__all__ = ["load_policy", "load_scalar_model", "load_tokenizer"]

_shapes_only: ContextVar[bool] = ContextVar("shapes_only", default=False)
HEAD_FILE = "scalar_head.safetensors"
"""The head of a scalar model whose family has no classification class in transformers."""


def load_policy(spec: ModelSpec) -> Policy:
    """The causal language model of `spec`, ready to train.

    Raises:
        UserError: a folder that is missing or holds no usable weights, a config or option that transformers does not
            know, a tokenizer with more tokens than the model.
    """
    model = _load(spec, AutoModelForCausalLM)
    if model.get_output_embeddings() is None:
        raise UserError(f"{_name(spec)} has no output head: a policy needs a causal language model")
    if spec.path is not None and spec.tokenizer is not None:
        _check_vocabulary(spec, model.config.get_text_config().vocab_size, len(load_tokenizer(spec)))
    prepared = _prepare(model, spec)
    policy = Policy(
        prepared,
        padding_free=spec.padding_free,
        activation_offload=spec.activation_offload,
        logprobs=spec.logprobs,
    )
    if _shapes_only.get():
        return policy.train()
    if spec.quantization is not None:
        keep_only_trained(policy)
    # where models are loaded, on the CPU, kernels of flash attention do not run, and those of flex compile for a minute
    if not spec.attn_implementation.startswith(("flash", "flex")):
        try:
            check_head(Policy(prepared))  # by any method: they differ in speed
            policy.check_padding_free()
        except RuntimeError as error:  # shapes inside that do not fit: head counts, sizes
            raise UserError(f"{_name(spec)} does not run: {first_line(error)}; check its config") from error
    if spec.compile is not None:
        compile_layers(policy.causal_lm)
    return policy.train()


@contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, models are built as their configs describe them and no weights are read: for tensors without numbers."""
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


def load_scalar_model(
    spec: ModelSpec, *, pooling: Pooling | None = None, seed: int = 0, head_init: HeadInit = "normal"
) -> ScalarModel:
    """A reward model or critic.

    Args:
        spec: of a causal language model, whose decoder gets a new head; or of a sequence classifier with one label,
            whose head, pooling and normalisation are taken over.
        pooling: last, mean or steps; None: what the folder says, else last.
        seed: of a new head.
        head_init: of a new head: normal (reward models) or zero (critics).
    """
    if spec.path is None:
        backbone, head, stored = _load(spec, AutoModel), None, {}
    else:
        config = _read_config(spec)
        stored = {key: getattr(config, key) for key in ("pooling", "score_mean", "score_std") if hasattr(config, key)}
        backbone, head = _load_decoder(spec, config)
    pooling = pooling or stored.get("pooling", "last")
    if pooling not in POOLINGS:
        raise UserError(f"pooling={pooling!r} of {_name(spec)} is unknown: use {', '.join(POOLINGS)}")
    model = ScalarModel(
        _prepare(backbone, spec),
        pooling=pooling,
        bias=head is not None and head.get("bias") is not None,
        padding_free=spec.padding_free,
        activation_offload=spec.activation_offload,
    )
    if head is None:
        init_head(model.head, head_init, seed)
    else:
        model.head.load_state_dict({key: value.float() for key, value in head.items()})
    model.set_normalisation(float(stored.get("score_mean", 0.0)), float(stored.get("score_std", 1.0)))
    if spec.quantization is not None:
        keep_only_trained(model)
    if spec.compile is not None:
        compile_layers(model.decoder)
    return model.train()


def _load_decoder(spec: ModelSpec, config: PretrainedConfig) -> tuple[PreTrainedModel, dict[str, torch.Tensor] | None]:
    """The decoder of a folder, and its scalar head if it holds one."""
    assert spec.path is not None
    kind = (config.architectures or [""])[0]
    if _shapes_only.get():
        return _load(spec, AutoModel), None
    if hasattr(config, "score_mean") and not kind.endswith("ForSequenceClassification"):
        head_file = cached_file(resolve_path(spec.path), HEAD_FILE, revision=spec.revision)
        head = load_file(head_file)
        check_finite(spec, head.items())
        return _load(spec, AutoModel), head
    if not kind.endswith("ForSequenceClassification"):
        return _load(spec, AutoModel), None
    if config.num_labels != 1:
        raise UserError(
            f"{spec.path!r} is a classifier of {config.num_labels} labels: a score needs one (num_labels 1)"
        )
    classifier = _load(spec, AutoModelForSequenceClassification)
    score = getattr(classifier, "score", None)
    if not isinstance(score, nn.Linear):
        raise UserError(f"{spec.path!r} is a {kind}, which has no linear `score` head on a decoder")
    return classifier.base_model, dict(score.state_dict())


def _load(spec: ModelSpec, auto: Any) -> PreTrainedModel:
    """A transformers model, from a folder, a hub id or a config. The global random state stays as it was."""
    _check_source(spec)
    options = {
        "dtype": _dtype(spec.dtype, stored=spec.path is not None),
        # None asks for sdpa where the family has it: to name it would be an error where it has not (Gemma 2)
        "attn_implementation": None if spec.attn_implementation == "sdpa" else _attention(spec.attn_implementation),
        "trust_remote_code": spec.trust_remote_code,
    }
    if _shapes_only.get():
        config = _build_config(spec) if spec.path is None else _read_config(spec)
        dtype = options["dtype"] if options["dtype"] != "auto" else (config.dtype or torch.float32)
        model = auto.from_config(config, **(options | {"dtype": dtype}))
        _check_attention(model, spec)
        return model
    if spec.quantization is not None:
        if spec.path is None:
            raise UserError(
                "quantization: a model built from `config` is new, and frozen weights teach it nothing: give `path`"
            )
        options |= {"quantization_config": bitsandbytes_config(spec.quantization), "device_map": {"": "cpu"}}
    try:
        # on the CPU whatever the caller's default device: the same seed must give the same weights everywhere
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), no_progress_bar():
            torch.default_generator.manual_seed(spec.seed)
            if spec.path is None:
                model = auto.from_config(_build_config(spec), **options)
            else:
                model = _from_pretrained(spec, auto, options)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        remedy = "" if spec.path is None or Path(resolve_path(spec.path)).is_dir() else without_hub(spec.path)
        if "custom code" in str(error):
            remedy = "; set trust_remote_code: true if you trust its author"
        raise UserError(f"cannot load {_name(spec)}: {first_line(error).rstrip('.')}{remedy}") from error
    _check_attention(model, spec)
    return model


def _check_attention(model: PreTrainedModel, spec: ModelSpec) -> None:
    """Make sure that the attention in use computes what the family defines; say so if it is not the one asked for."""
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if softcap is not None and attention_of(model) == "sdpa":
        # sdpa has no cap on attention scores (Gemma 2): some versions of transformers leave it out without a word
        model.set_attn_implementation("eager")
    if attention_of(model) != spec.attn_implementation:
        say_once(
            f"{_name(spec)}: {spec.attn_implementation} attention does not serve this family, "
            f"using {attention_of(model)}"
        )


def _from_pretrained(spec: ModelSpec, auto: Any, options: dict[str, Any]) -> PreTrainedModel:
    assert spec.path is not None
    path = resolve_path(spec.path)
    check_model_folder(path)
    check_code(path, spec.trust_remote_code, spec.revision)
    stored = PretrainedConfig.get_config_dict(path, revision=spec.revision)[0]
    check_layers(path, stored)
    if stored.get("quantization_config"):
        raise UserError(
            f"{spec.path!r} was saved in few bits (config.json: quantization_config): give the model that it was made "
            "from, and quantization: {bits: 4} if it is to be held so"
        )
    with no_load_report():
        model, info = auto.from_pretrained(
            path, revision=spec.revision, use_safetensors=True, output_loading_info=True, **options
        )
    saved_as = (model.config.architectures or ["another kind of model"])[0]
    if auto is AutoModelForCausalLM and saved_as.endswith("ForSequenceClassification"):
        raise UserError(f"{spec.path!r} is a {saved_as}, a model that scores: it has no language model's head")
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{spec.path!r} holds no weights for {', '.join(missing[:3])} ({len(missing)} missing): it was saved as "
            f"{saved_as} and cannot serve as {type(model).__name__}"
        )
    check_finite(spec, model.named_parameters())
    return model


def check_finite(spec: ModelSpec, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuses weights that are NaN or infinite, of a run that went wrong or of a cast: every answer would be NaN."""
    if spec.check_finite and (bad := not_finite(weights)):
        raise UserError(
            f"{_name(spec)} has weights that are NaN or infinite: {bad}. Take another copy or an earlier checkpoint; "
            "float16 overflows where bfloat16 does not (dtype). check_finite: false does not look"
        )


def not_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Names of weights that are NaN or infinite, the first few; "" if there are none."""
    # the largest entry: a norm that needs no second tensor of this size
    bad = [
        name
        for name, weight in weights
        if weight.is_floating_point()
        and weight.element_size() > 1
        and not weight.is_meta
        and not bool(torch.linalg.vector_norm(weight.detach(), torch.inf).isfinite())
    ]
    return ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers draws a bar for every load and save; the trainer has one of its own."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


NOISY_LOADERS = ("transformers.modeling_utils", "transformers.distributed.tensor_parallel")


@contextmanager
def no_load_report() -> Iterator[None]:
    """transformers prints a table when a decoder is loaded without its head, and which layers no plan would shard.

    What is missing is an error of ours, and nothing is sharded here.
    """
    levels = {name: logging.getLogger(name).level for name in NOISY_LOADERS}
    for name in NOISY_LOADERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _prepare(model: PreTrainedModel, spec: ModelSpec) -> nn.Module:
    """Dropout, gradient checkpointing and adapter, in this order: an adapter has a dropout of its own."""
    if spec.quantization is not None:
        settle(model)
    if spec.padding_free:
        know_records(model)
    if spec.disable_dropout:
        disable_dropout(model)
    if spec.gradient_checkpointing:
        options = {"use_reentrant": False}
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.2x on
        if enable is None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        else:
            enable(activation_checkpointing_kwargs=options)
    return model if spec.lora is None else add_adapter(model, spec.lora, seed=spec.seed)


def disable_dropout(model: nn.Module) -> None:
    """Every dropout rate in the modules to 0; the config, and so an export, keeps what it said."""
    for module, name in dropout_rates(model):
        setattr(module, name, 0.0)


def _build_config(spec: ModelSpec) -> PretrainedConfig:
    """The transformers config that `spec.config` describes, completed from the tokenizer."""
    assert spec.config is not None
    values = dict(spec.config)
    check_layers("built from config", values)
    kind = values.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), 1)
        raise UserError(f"config.model_type={kind!r} is unknown to transformers{_did_you_mean(near)}")
    defaults = CONFIG_MAPPING[kind]()
    known = set(defaults.to_dict()) | set(defaults.attribute_map)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise UserError(f"config.{key}: a {kind} config has no such key{_did_you_mean(near)}")
    if spec.tokenizer is not None:
        tokenizer = load_tokenizer(spec)
        values.setdefault("vocab_size", len(tokenizer))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if name in known:
                values.setdefault(name, getattr(tokenizer, name))
        _check_vocabulary(spec, values["vocab_size"], len(tokenizer))
    elif "vocab_size" not in values:
        raise UserError("config.vocab_size is not given and there is no tokenizer to take it from: give `tokenizer`")
    return AutoConfig.for_model(kind, **values)


def _read_config(spec: ModelSpec) -> PretrainedConfig:
    assert spec.path is not None
    path = resolve_path(spec.path)
    check_model_folder(path)
    check_code(path, spec.trust_remote_code, spec.revision)
    try:
        return AutoConfig.from_pretrained(path, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read the config of {path!r}: {first_line(error)}") from error


def _check_source(spec: ModelSpec) -> None:
    if (spec.path is None) == (spec.config is None):
        raise UserError(f"a model needs either `path` or `config`; got path={spec.path!r}, config={spec.config!r}")


def context_length(spec: ModelSpec) -> int | None:
    """How many tokens the model reads at once, by its config; None if that says nothing."""
    _check_source(spec)
    config = _build_config(spec) if spec.path is None else _read_config(spec)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _check_vocabulary(spec: ModelSpec, model_size: int, tokenizer_size: int) -> None:
    if tokenizer_size > model_size:
        raise UserError(
            f"the tokenizer {spec.tokenizer!r} has {tokenizer_size} tokens and {_name(spec)} only {model_size}: "
            "they do not belong together"
        )


def _dtype(name: str, *, stored: bool) -> torch.dtype | str:
    auto = "auto" if stored else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": auto}
    if name not in known:
        raise UserError(f"dtype={name!r}: use one of {', '.join(known)}")
    return known[name]


def _attention(name: str) -> str:
    if name == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise UserError(
            "attn_implementation=flash_attention_2 needs the package flash-attn, which is not installed: "
            "pip install 'rlhf-lightning[flash]', or use attn_implementation: sdpa"
        )
    known = ("sdpa", "eager", "flash_attention_2", "flex_attention")
    if name not in known:
        raise UserError(f"attn_implementation={name!r}: use one of {', '.join(known)}")
    return name


def _name(spec: ModelSpec) -> str:
    return repr(spec.path) if spec.path is not None else f"a {(spec.config or {}).get('model_type')} built from config"


def _did_you_mean(near: list[str]) -> str:
    return f": did you mean {near[0]}?" if near else ""
