"""How evenly the routers of a mixture of experts use their experts, as a loss.

What f and P are taken over is the caller's: transformers takes all tokens and layers of a batch together, DeepSeek-V3
each sequence in each layer. Both are one formula on other groups of tokens.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def experts_chosen(
    chosen: Int[Tensor, "batch time layers top_k"],
    counts: Bool[Tensor, "batch time"],
    group: Int[Tensor, "batch time"],
    *,
    num_groups: int,
    num_experts: int,
) -> Float[Tensor, "groups layers experts"]:
    """How many of the tokens that count went to each expert, by group and layer; no gradient.

    Args:
        chosen: the experts that each token was sent to.
        group: which group each token belongs to.
    """
    layers = chosen.shape[2]
    layer = torch.arange(layers, device=chosen.device)[:, None]
    place = (group[:, :, None, None] * layers + layer) * num_experts + chosen
    # in one dimension, where sums are the same on every device; those of ones are exact in any order
    ones = counts[:, :, None, None].expand_as(chosen).float()
    total = ones.new_zeros(num_groups * layers * num_experts).index_add(0, place.flatten(), ones.flatten())
    return total.view(num_groups, layers, num_experts)


def load_balancing_loss(
    probs: Float[Tensor, "*groups experts"],
    chosen: Float[Tensor, "*groups experts"],
    tokens: Float[Tensor, "*groups"],
) -> Float[Tensor, "*groups"]:
    """The load-balancing loss of groups of tokens: top_k where experts are used alike, else more as a rule.

        loss = E sum_e f_e P_e,    f_e = chosen_e / tokens,    P_e = probs_e / tokens

    E experts. f carries no gradient, so the loss is linear in `probs`: those of a part of the tokens give its share.

    Args:
        probs: the router's probability of each expert, summed over the tokens of a group, or over a part of them.
        chosen: how many tokens of the whole group each expert was chosen for; they sum to top_k tokens.
        tokens: in the whole group.
    References:
        Fedus et al., Switch Transformers, 2021, eq. 4 to 6. arXiv:2101.03961
        DeepSeek-AI, DeepSeek-V3 Technical Report, 2024, eq. 17 to 20 (per sequence). arXiv:2412.19437
        Qiu et al., Demons in the Detail (f over more than a micro-batch), 2025. arXiv:2501.11873
    """
    size = tokens.clamp(min=1).unsqueeze(-1)
    return probs.shape[-1] * (chosen / size * probs / size).sum(-1)
