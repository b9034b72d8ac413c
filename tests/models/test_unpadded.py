"""A batch run without its padding: the same log-probabilities and gradients, in every family, for less work."""

from functools import wraps

import pytest
import torch

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models import unpadded
from rlhf_lightning.models.loading import load_policy, load_scalar_model
from rlhf_lightning.models.spec import LoraSpec, ModelSpec
from rlhf_lightning.models.unpadded import check_unpadded, unpadded_states

EXACT = {"rtol": 1e-5, "atol": 1e-5}  # float32, sums over at most 48 numbers of size 1


def layouts(lab):
    """Records of 9, 4, 1 and 6 tokens in every way that they may lie; sliding windows (3) are shorter."""
    rows = lab.records(9, 4, 1, 6)
    return {
        "right": lab.padded(rows, extra=1),
        "left": lab.padded(rows, "left", extra=2),
        "packed": lab.packed([rows[:3], rows[3:]], extra=2),
        "packed behind padding": lab.packed([rows[:3], rows[3:]], front=2),
    }


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointed"])
def test_log_probabilities_and_gradients_are_those_of_padded_rows(lab, family, options):
    policy, free = lab.policy(family), lab.policy(family, padding_free=True, **options)
    for name, batch in layouts(lab).items():
        expected, scores = policy(batch), free(batch)
        torch.testing.assert_close(scores.logprobs, expected.logprobs, **EXACT, msg=lambda m, n=name: f"{n}: {m}")
        weights = torch.linspace(-1, 1, int(batch.mask.sum()))
        want = torch.autograd.grad((expected.logprobs[batch.mask] * weights).sum(), list(policy.parameters()))
        got = torch.autograd.grad((scores.logprobs[batch.mask] * weights).sum(), list(free.parameters()))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))


def test_the_decoder_sees_real_tokens_alone(lab):
    policy = lab.policy("llama", padding_free=True)
    batch = layouts(lab)["left"]
    policy(batch)
    seen = []
    policy.body.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    hidden = policy.hidden_states(batch.tokens, batch.attention_mask, batch.positions)
    [kwargs] = seen
    assert kwargs["input_ids"].tolist() == [batch.tokens[batch.attention_mask].tolist()]
    assert kwargs["position_ids"].tolist() == [[*range(9), *range(4), 0, *range(6)]]
    assert kwargs["cu_seq_lens_q"].tolist() == [0, 9, 13, 14, 20]
    assert (hidden[~batch.attention_mask] == 0).all()


def test_sampling_is_as_with_padding(lab):
    """The attention that knows records is sdpa where there are none."""
    prompt = torch.stack(lab.records(4, 4))
    drawn = [
        lab.policy(family, **options).eval().generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
        for family, options in [("llama", {}), ("llama", {"padding_free": True})]
    ]
    assert torch.equal(*drawn)


def test_adapters_take_part(lab):
    policies = [lab.policy("llama", lora=LoraSpec(r=2), padding_free=free) for free in (False, True)]
    batch = layouts(lab)["right"]
    for policy in policies:
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.05)
    expected, scores = (policy(batch).logprobs for policy in policies)
    torch.testing.assert_close(scores, expected, **EXACT)


def test_under_autocast_it_is_as_near_as_rounding_lets_it(lab, monkeypatch):
    """Also where varlen takes over, which autocast does not know."""
    batch, policies = layouts(lab)["right"], [lab.policy("llama", padding_free=free) for free in (False, True)]
    exact = policies[0](batch).logprobs[batch.mask]
    with torch.autocast("cpu", torch.bfloat16):
        rounded, free = (policy(batch).logprobs[batch.mask] for policy in policies)
        monkeypatch.setattr(unpadded, "has_varlen", lambda device, dtype: dtype == torch.bfloat16)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", written_out)
        varlen = policies[1](batch).logprobs[batch.mask]
    error = float((rounded - exact).abs().max())
    assert error > 1e-3, "nothing was rounded"
    assert float((free - exact).abs().max()) < 3 * error
    assert float((varlen - exact).abs().max()) < 3 * error


def test_a_scalar_model_gives_the_same_scores(lab, tiny_model):
    rows = lab.records(9, 4, 1, 6)
    rows = [row % 20 for row in rows]
    models = [load_scalar_model(ModelSpec(path=str(tiny_model), padding_free=free), seed=3) for free in (False, True)]
    for batch in (lab.padded(rows, extra=1), lab.padded(rows, "left"), lab.packed([rows[:2], rows[2:]])):
        expected, scores = (model(batch) for model in models)
        torch.testing.assert_close(scores, expected, **EXACT)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_shared_prompt_is_computed_once_without_padding(lab, side):
    """Pairs of 3 + (2, 5) and 1 + (4, 1) tokens: 10 + 6 are computed, where padded rows have 4 x 8."""
    prompts, ends = lab.records(3, 1, seed=1), lab.records(2, 4, 5, 1, seed=2)
    rows = [torch.cat((prompts[i % 2], end)) for i, end in enumerate(ends)]
    for i, end in enumerate(ends[:2]):  # completions that begin unlike
        rows[2 + i][len(prompts[i])] = (end[0] + 1) % lab.vocab
    batch = lab.padded(rows, side)
    completions = batch.attention_mask & (batch.positions >= torch.tensor([3, 1, 3, 1])[:, None])
    given = (batch.tokens, batch.attention_mask, batch.positions)
    policy = lab.policy("llama", padding_free=True)
    expected = lab.policy("llama").hidden_states(*given)
    policy.shared_prompt_states(*given, completions)
    computed = []
    policy.body.register_forward_pre_hook(lambda m, a, k: computed.append(k["input_ids"].shape), with_kwargs=True)
    hidden = policy.shared_prompt_states(*given, completions)
    assert computed == [(1, 16)]
    real = batch.attention_mask
    torch.testing.assert_close(hidden[real], expected[real], **EXACT)


# --- kernels that need a GPU: what they are told


def written_out(query, key, value, starts, starts_k, longest, longest_k, *, scale, window_size, enable_gqa=False):
    """`torch.nn.attention.varlen.varlen_attn` by its documentation, record by record: [tokens, heads, width]."""
    assert torch.equal(starts, starts_k)
    assert longest == longest_k >= int(starts.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out = []
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))
        back = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        left, right = window_size
        seen = (back >= -right) & ((back <= left) | (left < 0))
        out.append(((q @ k.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


def of_torch_2_11(query, key, value, starts, starts_k, longest, longest_k, *, scale, window_size):
    return written_out(query, key, value, starts, starts_k, longest, longest_k, scale=scale, window_size=window_size)


@pytest.mark.parametrize("varlen", [written_out, of_torch_2_11])
@pytest.mark.parametrize("name", ["llama", "mistral"])  # without and with a window
def test_varlen_is_told_where_records_begin(lab, name, varlen, monkeypatch):
    called = []
    monkeypatch.setattr(unpadded, "has_varlen", lambda device, dtype: True)
    monkeypatch.setattr(
        "torch.nn.attention.varlen.varlen_attn", wraps(varlen)(lambda *a, **k: called.append(1) or varlen(*a, **k))
    )
    for batch in layouts(lab).values():
        scores = lab.policy(name, padding_free=True)(batch).logprobs
        torch.testing.assert_close(scores, lab.policy(name)(batch).logprobs, **EXACT)
    assert called


def test_flash_attention_is_told_where_records_begin(lab):
    policy, batch = lab.policy("llama"), layouts(lab)["left"]
    policy.body.config._attn_implementation = "flash_attention_2"
    seen = []

    def forward(**kwargs):
        seen.append(kwargs)
        raise InterruptedError

    policy.body.forward = forward
    with pytest.raises(InterruptedError):
        unpadded_states(policy.body, batch.tokens, batch.attention_mask, batch.positions)
    [told] = seen
    assert told["attention_mask"] is None
    assert told["cu_seq_lens_q"].tolist() == told["cu_seq_lens_k"].tolist() == [0, 9, 13, 14, 20]
    assert told["cu_seq_lens_q"].dtype == torch.int32
    assert told["max_length_q"] == told["max_length_k"] == 11  # no fewer than the longest has


# --- what is refused


def test_a_family_that_is_not_told_of_records_is_refused_by_name(lab):
    policy = lab.policy("llama", padding_free=True)
    forward = policy.body.forward
    policy.body.forward = lambda record_places=None, **more: forward(**more)
    with pytest.raises(UserError, match=r"'llama' with sdpa attention are others without padding: .*padding_free: fal"):
        check_unpadded(policy.body, lab.vocab)


def test_a_recurrent_family_is_refused_by_name(tiny_tokenizer):
    config = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    spec = ModelSpec(config=config, tokenizer=str(tiny_tokenizer), attn_implementation="eager", padding_free=True)
    with pytest.raises(UserError, match=r"models of type 'mamba' .* are others without padding"):
        load_policy(spec)


def test_eager_attention_cannot_share_a_prompt_without_padding(lab):
    policy = lab.policy("llama", padding_free=True, attn_implementation="eager")
    batch = layouts(lab)["right"]
    with pytest.raises(UserError, match=r"share_prompts with padding_free needs attn_implementation sdpa, not eager"):
        policy.shared_prompt_states(batch.tokens, batch.attention_mask, batch.positions, batch.mask)
