"""What docs/memory.md's options save, as far as a CPU can say: python benchmarks/bench_memory.py

Bytes are counted: of what the backward pass keeps (distinct storages that autograd saves, weights left out), of weights
and of optimiser state. Times are seconds of the processor for a forward and backward pass, least of three, one thread;
compare them within one table. Results: benchmarks/results/memory.json. Needs bitsandbytes.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from bench_common import about
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from rlhf_lightning.core.batches import TokenBatch
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.spec import LoraSpec, ModelSpec, QuantizationSpec
from rlhf_lightning.pipelines.files import write_json
from rlhf_lightning.quickstart.material import train_tokenizer

RESULT = Path(__file__).parent / "results" / "memory.json"
LENGTHS = (512, 310, 200, 150, 110, 90, 70, 60, 50, 44, 38, 32, 28, 24, 20, 16)
"""Of records: a long one and a tail, 21 % of the padded rows."""
PAIRS = ((256, 40, 64), (200, 90, 30), (256, 60, 48), (180, 32, 20))
"""Of pairs: prompt, chosen, rejected."""
MODEL = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}


def rows(lengths: list[int], prompts: list[int], seed: int = 0) -> TokenBatch:
    """Random records padded on the right; what follows the prompt counts."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(max(lengths))
    real = steps < torch.tensor(lengths)[:, None]
    tokens = torch.randint(0, MODEL["vocab_size"], real.shape, generator=generator)
    mask = real & (steps >= torch.tensor(prompts)[:, None])
    return TokenBatch(tokens, real, mask, steps.expand_as(tokens))


def pairs() -> TokenBatch:
    """Chosen rows, then rejected ones, of the same prompts."""
    lengths = [p + c for p, c, _ in PAIRS] + [p + r for p, _, r in PAIRS]
    batch = rows(lengths, [p for p, *_ in PAIRS] * 2)
    half = len(PAIRS)
    for i, (prompt, *_) in enumerate(PAIRS):
        batch.tokens[half + i, :prompt] = batch.tokens[i, :prompt]
        batch.tokens[half + i, prompt] = (batch.tokens[i, prompt] + 1) % MODEL["vocab_size"]
    return batch


def hidden(policy: Policy, batch: TokenBatch, share: bool) -> Tensor:
    given = (batch.tokens, batch.attention_mask, batch.positions)
    return policy.shared_prompt_states(*given, batch.mask) if share else policy.hidden_states(*given)


def kept_bytes(policy: Policy, forward: Callable[[], Tensor]) -> int:
    """What autograd keeps of a forward pass, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    kept: dict[int, Tensor] = {}  # holds them, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def seconds(forward: Callable[[], Tensor], policy: Policy) -> float:
    """Of the processor, forward and backward, least of three after one that warms up."""
    took = []
    for _ in range(4):
        began = time.process_time()
        forward().sum().backward()
        took.append(time.process_time() - began)
        policy.zero_grad()
    return min(took[1:])


def runs(cases: dict[str, tuple[dict[str, Any], bool]], batch: TokenBatch) -> dict[str, Any]:
    """Megabytes kept and seconds of each case: options of the model, and whether prompts are shared."""
    figures = {}
    for name, (options, share) in cases.items():
        policy = load_policy(ModelSpec(config=MODEL, **options))

        def forward(policy: Policy = policy, share: bool = share) -> Tensor:
            return hidden(policy, batch, share)[batch.mask]

        figures[name] = {"MB kept for backward": kept_bytes(policy, forward) / 1e6, "s": seconds(forward, policy)}
        print(name, figures[name], flush=True)
    return figures


def weight_bytes(module: nn.Module) -> int:
    """Weights of the decoder's layers, with the scales of quantised ones."""
    total = 0
    for name, parameter in module.named_parameters():
        if ".layers." not in name or "lora_" in name:
            continue
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        parts = [] if state is None else [state.absmax, *([state.state2.absmax] if state.nested else [])]
        if getattr(parameter, "SCB", None) is not None:
            parts.append(parameter.SCB)
        total += sum(part.nbytes for part in parts)
    return total


def formats(folder: str) -> dict[str, Any]:
    """Megabytes of the layers' weights in each format."""
    kinds = {
        "float32": {},
        "bfloat16": {"dtype": "bfloat16"},
        "8 bits": {"quantization": QuantizationSpec(8)},
        "4 bits": {"quantization": QuantizationSpec(double_quant=False)},
        "4 bits, double_quant": {"quantization": QuantizationSpec()},
    }
    return {
        name: {"MB of the layers' weights": weight_bytes(load_policy(ModelSpec(path=folder, **options))) / 1e6}
        for name, options in kinds.items()
    }


def optimisers(folder: str) -> dict[str, Any]:
    """Megabytes of optimiser state after a step."""
    figures = {}
    for name, kind, lora in (
        ("torch.optim.AdamW", torch.optim.AdamW, None),
        ("bitsandbytes.optim.AdamW8bit", bitsandbytes.optim.AdamW8bit, None),
        ("torch.optim.AdamW, lora r 16", torch.optim.AdamW, LoraSpec(r=16)),
    ):
        policy = load_policy(ModelSpec(path=folder, lora=lora))
        optimizer = kind([p for p in policy.parameters() if p.requires_grad], lr=1e-4)
        hidden(policy, rows([8, 8], [0, 0]), False).sum().backward()
        for parameter in policy.parameters():
            if parameter.requires_grad and parameter.grad is None:  # the output head
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        state = [value for of in optimizer.state.values() for value in of.values() if isinstance(value, Tensor)]
        distinct = {value.untyped_storage().data_ptr(): value.nbytes for value in state}  # tables are shared
        figures[name] = {"MB of optimiser state": sum(distinct.values()) / 1e6}
    return figures


def main() -> None:
    torch.set_num_threads(1)
    scratch = Path("runs/bench_memory")
    scratch.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(["a few words"])
    folder = str(export_policy(load_policy(ModelSpec(config=MODEL)), tokenizer, scratch / "model"))
    records = rows(list(LENGTHS), [0] * len(LENGTHS))
    free, once = {"padding_free": True}, True
    sections = {
        "records": runs(
            {
                "padded": ({}, False),
                "padding_free": (free, False),
                "gradient_checkpointing": ({"gradient_checkpointing": True}, False),
                "padding_free, gradient_checkpointing": (free | {"gradient_checkpointing": True}, False),
                "compile: layers": ({"compile": "layers"}, False),
                "compile: layers, padding_free": (free | {"compile": "layers"}, False),
            },
            records,
        ),
        "pairs": runs(
            {
                "padded": ({}, False),
                "share_prompts": ({}, once),
                "padding_free": (free, False),
                "share_prompts, padding_free": (free, once),
            },
            pairs(),
        ),
        "weights": formats(folder),
        "optimisers": optimisers(folder),
    }
    measured_with = about()
    measured_with["versions"]["bitsandbytes"] = bitsandbytes.__version__
    write_json(RESULT, {"about": measured_with, "sections": sections})


if __name__ == "__main__":
    main()
