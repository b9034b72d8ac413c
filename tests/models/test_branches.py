"""A prompt computed once for two completions: the same hidden states and gradients, in every family that can."""

import pytest
import torch

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.branches import branch_states, check_branches


def pairs(lab, side):
    """Three pairs of uneven lengths; the last two rows differ from their first token on."""
    prompts = lab.records(4, 2, 3, seed=1)
    firsts, seconds = lab.records(3, 6, 1, seed=2), lab.records(5, 2, 4, seed=3)
    firsts[1][0] = seconds[1][0]  # completions may begin alike: only the prompt is shared
    rows = [torch.cat(pair) for pair in zip(prompts + prompts, firsts + seconds, strict=True)]
    rows[5][0] = (rows[2][0] + 1) % lab.vocab
    batch = lab.padded(rows, side, extra=2)
    completions = batch.attention_mask & (batch.positions >= torch.tensor([4, 2, 3, 4, 2, 3])[:, None])
    return batch, completions


def sliding(policy):
    return getattr(policy.config.get_text_config(), "sliding_window", None) is not None


@pytest.mark.parametrize("side", ["right", "left"])
def test_hidden_states_and_gradients_are_those_of_two_rows(lab, family, side):
    policy = lab.policy(family)
    batch, completions = pairs(lab, side)
    given = (batch.tokens, batch.attention_mask, batch.positions)
    if sliding(policy):
        with pytest.raises(UserError, match=r"longer than the attention window of 3 .* use share_prompts: false"):
            branch_states(policy.body, *given, completions)
        return
    check_branches(policy.body, lab.vocab)
    apart, together = policy.hidden_states(*given), policy.shared_prompt_states(*given, completions)
    real = batch.attention_mask
    torch.testing.assert_close(together[real], apart[real], rtol=1e-4, atol=1e-4)
    weights = torch.randn(apart[real].shape, generator=torch.Generator().manual_seed(0))
    parameters = [p for p in policy.body.parameters() if p.requires_grad]
    expected = torch.autograd.grad((apart[real] * weights).sum(), parameters, allow_unused=True)
    got = torch.autograd.grad((together[real] * weights).sum(), parameters, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_eager_attention_too(lab):
    policy = lab.policy("llama", attn_implementation="eager")
    batch, completions = pairs(lab, "right")
    given = (batch.tokens, batch.attention_mask, batch.positions)
    real = batch.attention_mask
    apart, together = policy.hidden_states(*given), policy.shared_prompt_states(*given, completions)
    torch.testing.assert_close(together[real], apart[real], rtol=1e-4, atol=1e-4)


def test_fewer_tokens_are_computed(lab, monkeypatch):
    policy = lab.policy("llama")
    batch, completions = pairs(lab, "right")
    widths = []
    policy.body.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    branch_states(policy.body, batch.tokens, batch.attention_mask, batch.positions, completions)
    # 4 + 3 + 5; apart: 6 rows of 11
    assert widths == [(3, 12)]


def test_attention_that_cannot_be_told_who_sees_whom_is_refused(lab):
    policy = lab.policy("llama")
    batch, completions = pairs(lab, "right")
    policy.body.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        UserError, match=r"share_prompts needs attn_implementation sdpa or eager, not flash_attention_2"
    ):
        branch_states(policy.body, batch.tokens, batch.attention_mask, batch.positions, completions)


def test_a_family_that_looks_across_is_refused(lab):
    policy = lab.policy("llama")
    forward = policy.body.forward
    policy.body.forward = lambda attention_mask=None, **more: forward(attention_mask=None, **more)
    with pytest.raises(UserError, match=r"'llama' with sdpa attention cannot compute a prompt once for two answers"):
        check_branches(policy.body, lab.vocab)
