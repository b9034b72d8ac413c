"""An output head whose vocabulary is cut over a group of processes: no process ever has all logits of a batch."""

from typing import Any, cast

import torch
from rlhf_kernels import VocabShard
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.body import dropout_rates
from rlhf_lightning.models.policy import Policy

PLANS = ("colwise_gather_output", "colwise_rep")
"""What transformers' `_tp_plan` calls a head whose rows may be cut; the name of before 5.0 is the second."""


class VocabParallelHead(nn.Module):
    """In place of a model's linear head, under the same name: this process's rows of weight and bias.

    Args:
        linear: the head that it replaces, whole on every process.
        mesh: copies over its first dimension, the vocabulary cut over its second.
        dtype: logits are computed with weights in it; None: their own.
    """

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.mesh, self.dtype = mesh, dtype
        self.shard = VocabShard.of(linear.out_features, mesh.get_group(1))
        self.weight = self._part_of(linear.weight)
        self.bias = None if linear.bias is None else self._part_of(linear.bias)

    def _part_of(self, whole: nn.Parameter) -> nn.Parameter:
        rows = whole.detach()[self.shard.first : self.shard.first + self.shard.width]
        part = rows.to(self.mesh.device_type, copy=True)
        cut = DTensor.from_local(
            part, self.mesh, (Replicate(), Shard(0)), run_check=False, shape=whole.shape, stride=whole.stride()
        )
        return nn.Parameter(cut, requires_grad=whole.requires_grad)

    def local(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of this process as plain tensors, in the dtype of the computation."""
        given = [None if x is None else cast(DTensor, x).to_local() for x in (self.weight, self.bias)]
        weight, bias = (x if x is None or self.dtype is None else x.to(self.dtype) for x in given)
        assert weight is not None
        return weight, bias

    def forward(self, hidden: Tensor) -> Tensor:
        """All logits of a few positions, for sampling; no gradient."""
        with torch.no_grad():
            weight, bias = self.local()
            logits = nn.functional.linear(hidden.to(weight.dtype), weight, bias)
            mine = nn.functional.pad(logits, (0, self.shard.widest - self.shard.width)).contiguous()
            group = self.mesh.get_group(1)
            everywhere = [torch.empty_like(mine) for _ in range(group.size())]
            torch.distributed.all_gather(everywhere, mine, group=group)
            return torch.cat(everywhere, dim=-1)[..., : self.shard.vocab]

    def average_gradients(self) -> None:
        """The mean over copies, of what has been added up to now; what is the mean already stays as it is."""
        group = self.mesh.get_group(0)
        for parameter in self.parameters():
            if parameter.grad is None or group.size() == 1:  # None: in all copies, of a step in which nothing counts
                continue
            here = cast(DTensor, parameter.grad).to_local()
            torch.distributed.all_reduce(here, group=group)
            here /= group.size()


def cut_head(policy: Policy, mesh: DeviceMesh, dtype: torch.dtype | None) -> VocabParallelHead:
    """Replace the head of `policy` by this process's part of it.

    Raises:
        UserError: the model's plan does not cut its head, or something that the policy does would need it whole.
    """
    model: Any = policy.causal_lm
    head = model.get_output_embeddings()
    if isinstance(head, VocabParallelHead):
        return head
    kind, size = policy.config.model_type, mesh.size(1)
    asked = f"strategy fsdp2: tensor_parallel_size={size}"
    names = [name for name, part in model.named_modules() if part is head]
    if not isinstance(head, nn.Linear) or not any((model.tp_plan or {}).get(name) in PLANS for name in names):
        raise UserError(
            f"{asked} cuts the output head of a model, and transformers has no such plan for models of type {kind!r} "
            "(_tp_plan): use tensor_parallel_size: 1"
        )
    if head.weight is model.get_input_embeddings().weight:
        raise UserError(
            f"{asked} cuts the output head, which in this {kind} is the input embedding (tie_word_embeddings): use "
            "tensor_parallel_size: 1"
        )
    if policy.logprobs == "fused":
        raise UserError(
            f"{asked} cuts the vocabulary, and logprobs: fused reads all of it in one kernel: set logprobs: auto, or "
            "tensor_parallel_size: 1"
        )
    if any(getattr(module, name) > 0 for module, name in dropout_rates(policy)):
        raise UserError(
            f"{asked}: the processes of a group compute the same hidden states, and dropout would draw others in each: "
            "set disable_dropout: true and lora.dropout: 0, or tensor_parallel_size: 1"
        )
    try:
        part = VocabParallelHead(head, mesh, dtype)
    except ValueError as error:
        raise UserError(f"{asked}: {error}") from error
    model.set_output_embeddings(part)
    return part
