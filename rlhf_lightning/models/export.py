"""Writing a model as a plain Hugging Face folder: what the next stage, and everybody else, loads."""

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.card import ModelCard, write_card
from rlhf_lightning.models.loading import HEAD_FILE, no_progress_bar
from rlhf_lightning.models.lora import is_adapted, merged, unwrapped, wrap
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.quantized import dequantized_state, is_quantized
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.sharded import is_sharded, whole_state_dict, writes_files

__all__ = ["ModelCard", "export_policy", "export_scalar_model"]

POLICY_USAGE = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
"""

CLASSIFIER_USAGE = """
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
score = (model(**tokenizer(text, return_tensors="pt")).logits[:, 0] - {mean}) / {std}
"""

SCALAR_USAGE = """
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.spec import ModelSpec

model = load_scalar_model(ModelSpec(path="{folder}"))
"""


def export_policy(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    card: ModelCard | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `policy` so that `AutoModelForCausalLM` gives the same logits; an adapter is merged into the weights.

    The adapter alone goes to `folder`/adapter, as peft writes it.

    Args:
        folder: is replaced, in one rename, once everything is written; refused if it holds something else than a model.
        card: what README.md says.
        state_dict: the policy's weights, if not its own. Sharded ones are gathered: all ranks must call this then, and
            the first one writes.
    """
    if state_dict is None and is_sharded(policy):
        state_dict = whole_state_dict(policy)
    if not writes_files(policy):
        return Path(folder)
    model = _whole(policy.model, _under("model.", state_dict))
    card = card or ModelCard()
    with _replacing(folder) as temporary, no_progress_bar(), _completed_generation_config(model, tokenizer):
        model.save_pretrained(temporary)
        _save_adapter(policy.model, _under("model.", state_dict), temporary)
        tokenizer.save_pretrained(temporary)
        usage = POLICY_USAGE.format(folder=Path(folder).name)
        write_card(temporary, card, usage=usage, notes=_adapter_note(policy.model))
    return Path(folder)


def export_scalar_model(
    model: ScalarModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    card: ModelCard | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `model` so that `AutoModelForSequenceClassification` gives its scores before normalisation.

    Pooling and normalisation go to config.json. A family without such a class in transformers gets its decoder and a
    head file that only `load_scalar_model` reads.
    """
    if state_dict is None and is_sharded(model):
        state_dict = whole_state_dict(model)
    if not writes_files(model):
        return Path(folder)
    backbone = _whole(model.backbone, _under("backbone.", state_dict))
    head = {key: value.detach().cpu() for key, value in model.head.state_dict().items()}
    if state_dict is not None:
        head = {key: value.detach().cpu() for key, value in (_under("head.", state_dict) or {}).items()}
    mean, std = float(model.score_mean), float(model.score_std)
    notes = _adapter_note(model.backbone) + _scalar_notes(model, tokenizer, mean, std)
    classifier = _as_classifier(backbone, head)
    name = Path(folder).name
    if classifier is None:
        usage = SCALAR_USAGE.format(folder=name)
        notes.append(
            f"transformers has no such classifier for {backbone.config.model_type}: the head is in {HEAD_FILE}"
        )
    else:
        usage = CLASSIFIER_USAGE.format(folder=name, mean=mean, std=std)
    with _replacing(folder) as temporary, no_progress_bar():
        (classifier or backbone).save_pretrained(temporary)
        _save_adapter(model.backbone, _under("backbone.", state_dict), temporary)
        if classifier is None:
            save_file(head, temporary / HEAD_FILE)
        config = _scalar_config((classifier or backbone).config)
        config.pad_token_id = tokenizer.pad_token_id  # transformers' classifiers find the last token by it
        config.pooling, config.score_mean, config.score_std = model.pooling, mean, std
        config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_card(temporary, card or ModelCard(), usage=usage, notes=notes)
    return Path(folder)


def _as_classifier(backbone: PreTrainedModel, head: Mapping[str, Tensor]) -> PreTrainedModel | None:
    """transformers' classifier around our weights, without a copy of them; None where the family has none."""
    classes = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(backbone.config) not in classes or "bias" in head:
        return None
    with torch.device("meta"):
        classifier = classes[type(backbone.config)](_scalar_config(backbone.config))
    if not isinstance(getattr(classifier, "score", None), nn.Linear):
        return None
    setattr(classifier, classifier.base_model_prefix, backbone)
    classifier.score.weight = nn.Parameter(head["weight"].to(next(backbone.parameters()).dtype))
    return classifier


def _scalar_config(config: Any) -> Any:
    config = copy.deepcopy(config)
    config.num_labels = 1
    return config


def _scalar_notes(model: ScalarModel, tokenizer: PreTrainedTokenizerBase, mean: float, std: float) -> list[str]:
    """Where transformers' own classifier would give other numbers, and what is written beside the weights."""
    notes = [f"score = (logit - {mean:.6g}) / {std:.6g}; pooling: {model.pooling}"]
    if model.pooling == "mean":
        notes.append("transformers pools the last token; this model was trained on the mean over the completion")
    elif model.pooling == "steps":
        notes.append(
            "a process reward model: sigma(score) at the last token of each step is the probability that the step is "
            "right; transformers gives that of the last one"
        )
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        notes.append(
            "the padding token is the end token: transformers, which finds the last token by its id, reads one token "
            "too early in texts that end with it; `load_scalar_model` goes by the attention mask"
        )
    return notes


def _adapter_note(model: nn.Module) -> list[str]:
    if not is_adapted(model):
        return []
    if is_quantized(model):
        bits = 4 if any(type(p).__name__ == "Params4bit" for p in model.parameters()) else 8
        return [
            f"trained as a low-rank adapter over weights in {bits} bits (QLoRA). Here they are back in full precision, "
            f"as the adapter saw them, and it is merged into them; {ADAPTER_FOLDER}/ holds it alone"
        ]
    return [f"trained as a low-rank adapter, merged into the weights here; {ADAPTER_FOLDER}/ holds it alone"]


ADAPTER_FOLDER = "adapter"
"""In an export: the adapter alone."""


def _save_adapter(model: nn.Module, state_dict: Mapping[str, Tensor] | None, folder: Path) -> None:
    """The adapter of `model` as peft writes it, if it has one; weights taken from `state_dict` if given."""
    if is_adapted(model):
        given = None if state_dict is None else dict(state_dict)
        model.save_pretrained(folder / ADAPTER_FOLDER, state_dict=given, save_embedding_layers=False)


def _whole(model: nn.Module, state_dict: Mapping[str, Tensor] | None) -> PreTrainedModel:
    """The transformers model to save: adapter merged, weights taken from `state_dict` if given. `model` stays as is."""
    if is_quantized(model):
        state_dict = dequantized_state(model)
    if state_dict is not None:
        return merged(_rebuilt(model, state_dict))
    return merged(copy.deepcopy(model)) if is_adapted(model) else model


def _rebuilt(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """The same architecture around other weights. Built anew: a sharded module cannot be copied."""
    inner = unwrapped(model)
    is_language_model = inner.get_output_embeddings() is not None
    config = copy.deepcopy(inner.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        rebuilt = (AutoModelForCausalLM if is_language_model else AutoModel).from_config(config)
        if is_language_model:
            rebuilt.generation_config = inner.generation_config
        if is_adapted(model):
            rebuilt = wrap(rebuilt, copy.deepcopy(model.active_peft_config))
    rebuilt.load_state_dict({key: value.detach() for key, value in state_dict.items()}, strict=False, assign=True)
    unwrapped(rebuilt).tie_weights()
    empty = [name for name, weight in rebuilt.named_parameters() if weight.is_meta]
    assert not empty, f"no weights to export for {empty[0]}"
    return rebuilt


def _under(prefix: str, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    if state_dict is None:
        return None
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


@contextmanager
def _completed_generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """While inside, the model's generation config says where answers end and what to pad with."""
    own = model.generation_config
    config = copy.deepcopy(own)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, name) is None:
            setattr(config, name, getattr(tokenizer, name))
    try:
        config.validate(strict=True)
    except ValueError:
        # some published models set a temperature without do_sample: transformers loads that but refuses to save it
        config.do_sample = True
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _replacing(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well, and vanishes when not."""
    target = Path(folder).expanduser().absolute()
    if target.exists() and not target.is_dir():
        raise UserError(f"cannot export to {str(folder)!r}: it is a file")
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise UserError(
            f"cannot export to {str(folder)!r}: it holds other things than a model ({next(target.iterdir()).name}); "
            "choose another folder"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        if target.is_dir():
            os.rename(target, old)
        os.rename(new, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
