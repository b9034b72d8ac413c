"""One tiny random model per family, with what makes the family special switched on; batches laid out in every way."""

import torch

from rlhf_lightning.core.batches import TokenBatch
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.spec import ModelSpec

VOCAB = 37
_SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": _SHARED | {"tie_word_embeddings": False, "attention_dropout": 0.5},
    "qwen2": _SHARED
    | {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen3": _SHARED | {"head_dim": 8},
    "gemma2": _SHARED
    | {"head_dim": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0, "sliding_window": 3},
    "gemma3_text": _SHARED | {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 3},
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.3,
        "resid_pdrop": 0.5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "mistral": _SHARED | {"sliding_window": 3},
    "phi": {key: value for key, value in _SHARED.items() if key != "num_key_value_heads"} | {"resid_pdrop": 0.5},
    "granite": _SHARED
    | {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.5},
    "cohere": _SHARED | {"logit_scale": 0.25},
}


def tiny_policy(family: str, **options) -> Policy:
    """A policy of the family, weights named by a seed; a bias of the head, if any, is not 0."""
    policy = load_policy(ModelSpec(config={"model_type": family, **CONFIGS[family]}, **options))
    bias = policy.head().bias
    if bias is not None:
        with torch.no_grad():
            bias.copy_(torch.linspace(-1, 1, len(bias)))
    return policy


def records(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    """Random token sequences; ids 0, 1, 2 (pad, bos, eos) occur among them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor], side: str = "right", *, extra: int = 0, fill: int = 0) -> TokenBatch:
    """One record per row, `extra` columns of padding more than needed; the first token of a record does not count."""
    width = max(map(len, rows)) + extra
    tokens = torch.full((len(rows), width), fill)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.bool)
    mask, positions = attention_mask.clone(), torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        start = 0 if side == "right" else width - len(row)
        here = slice(start, start + len(row))
        tokens[i, here], attention_mask[i, here] = row, True
        mask[i, start + 1 : start + len(row)] = True
        positions[i, here] = torch.arange(len(row))
    return TokenBatch(tokens, attention_mask, mask, positions)


def packed(rows: list[list[torch.Tensor]], *, extra: int = 0, front: int = 0) -> TokenBatch:
    """Several records per row, `front` padding before them and at least `extra` behind."""
    width = front + max(sum(map(len, row)) for row in rows) + extra
    shape = (len(rows), width)
    tokens, positions, segments = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    mask = torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        start = front
        for k, record in enumerate(row):
            here = slice(start, start + len(record))
            tokens[i, here], segments[i, here] = record, k + 1
            positions[i, here] = torch.arange(len(record))
            mask[i, start + 1 : start + len(record)] = True
            start += len(record)
    return TokenBatch(tokens, segments > 0, mask, positions, segments)
