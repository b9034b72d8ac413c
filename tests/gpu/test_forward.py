"""Passes without padding, with prompts shared, packed, recomputed, offloaded or compiled: the numbers of plain ones."""

from functools import wraps

import pytest
import torch
from on_gpu import DEVICE, ON_GPU, or_skip

or_skip()

from families import CONFIGS, packed, padded, records, tiny_policy

from rlhf_lightning.core.batches import TokenBatch
from rlhf_lightning.models.spec import LoraSpec

pytestmark = pytest.mark.gpu

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "mistral", "phi", "granite", "cohere")
assert set(FAMILIES) == set(CONFIGS)


def on_device(family, **options):
    policy = tiny_policy(family, **options)
    if "dtype" in options:  # the same weights, rounded: drawn in bfloat16 they would be others
        policy.load_state_dict(tiny_policy(family).state_dict())
    return policy.to(DEVICE)


def layouts():
    rows = records(9, 4, 1, 6)
    return {
        "right": padded(rows, extra=1),
        "left": padded(rows, "left", extra=2),
        "packed": packed([rows[:3], rows[3:]], extra=2),
    }


def numbers(policy, batch, run=None):
    """Log-probabilities of what counts, and the gradients of a weighted sum of them."""
    batch = batch.to(DEVICE)
    scores = policy(batch) if run is None else run(policy, batch)
    logprobs = scores.logprobs[batch.mask].float()
    weights = torch.linspace(-1, 1, len(logprobs), device=DEVICE)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    return logprobs.detach(), torch.autograd.grad((logprobs * weights).sum(), parameters)


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    largest = max(float(g.abs().max()) for g in expected[1])
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * max(1.0, largest))


def flat(gradients):
    return torch.cat([g.float().flatten() for g in gradients])


def assert_as_near(found, rounded, exact):
    """No farther from what float32 gives than twice what the plain pass in bfloat16 is."""
    error = float((rounded[0] - exact[0]).abs().mean())
    assert error > 1e-4, "nothing was rounded"
    assert float((found[0] - exact[0]).abs().mean()) < 2 * error
    error = float((flat(rounded[1]) - flat(exact[1])).norm())
    assert float((flat(found[1]) - flat(exact[1])).norm()) < 2 * error


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_numbers_of_the_cpu(family):
    batch = layouts()["left"]
    policy = tiny_policy(family)
    logprobs = policy(batch).logprobs[batch.mask]
    weights = torch.linspace(-1, 1, len(logprobs))
    expected = logprobs.detach(), torch.autograd.grad((logprobs * weights).sum(), list(policy.parameters()))
    found = numbers(on_device(family), batch)
    assert_same((found[0].cpu(), [g.cpu() for g in found[1]]), expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mistral"])
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_without_padding(family, layout):
    batch = layouts()[layout]
    assert_same(numbers(on_device(family, padding_free=True), batch), numbers(on_device(family), batch))


HEADS_OF_16 = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.1}


@pytest.fixture
def called(monkeypatch):
    """How often varlen took over, where it can."""
    import torch.nn.attention.varlen as varlen

    own, calls = varlen.varlen_attn, []
    counting = wraps(own)(lambda *a, **k: calls.append(1) or own(*a, **k))  # with the options that it tells of
    monkeypatch.setattr(varlen, "varlen_attn", counting)
    return calls


@pytest.mark.parametrize("kept_in", ["bfloat16", "float32 under autocast"])
@pytest.mark.parametrize("family", ["llama", "mistral"])  # without and with a window
def test_without_padding_in_bfloat16_by_varlen(family, kept_in, monkeypatch, called):
    monkeypatch.setitem(CONFIGS, family, CONFIGS[family] | HEADS_OF_16)
    mixed = kept_in != "bfloat16"
    dtype = {} if mixed else {"dtype": "bfloat16"}
    for batch in layouts().values():
        exact = numbers(on_device(family), batch)
        plain, without = (on_device(family, padding_free=free, **dtype) for free in (False, True))
        with torch.autocast(DEVICE, torch.bfloat16, enabled=mixed):
            rounded = numbers(plain, batch)
            assert not called
            free = numbers(without, batch)
        assert bool(called) == ON_GPU
        called.clear()
        assert_as_near(free, rounded, exact)


def answered():
    """Two prompts of 7 and 4 tokens with three answers each."""
    prompts, answers = padded(records(7, 4), "left"), padded(records(5, 2, 6, 1, 4, 6, seed=1))
    asked = torch.tensor([0, 0, 0, 1, 1, 1])
    real = torch.cat((prompts.attention_mask[asked], answers.attention_mask), dim=1)
    mask = torch.cat((torch.zeros_like(prompts.attention_mask[asked]), answers.attention_mask), dim=1)
    tokens = torch.cat((prompts.tokens[asked], answers.tokens), dim=1)
    return TokenBatch(tokens, real, mask, (real.long().cumsum(-1) - 1).clamp(min=0))


def paired(starts, ends):
    """Pairs of rows that begin with one prompt, the preferred ones first."""
    prompts = records(*starts, seed=1)
    rows = [
        torch.cat(row)
        for seed, some in enumerate(ends)
        for row in zip(prompts, records(*some, seed=2 + seed), strict=True)
    ]
    batch = padded(rows, extra=2)
    mask = batch.attention_mask & (batch.positions >= torch.tensor(starts).repeat(2)[:, None])
    return TokenBatch(batch.tokens, batch.attention_mask, mask, batch.positions)


def by_group(policy, batch):
    return policy(batch, answers=batch.mask)


def by_pair(policy, batch):
    hidden = policy.shared_prompt_states(batch.tokens, batch.attention_mask, batch.positions, batch.mask)
    return policy.scores(hidden, batch.tokens, batch.mask)


SHARED = {
    "group": (answered, by_group, {}),
    "pair, a cache": (lambda: paired((2, 3, 2), ((5, 6, 4), (4, 5, 7))), by_pair, {}),
    "pair, one row": (lambda: paired((9, 8, 7), ((3, 2, 1), (2, 2, 4))), by_pair, {}),
    "pair, without padding": (lambda: paired((9, 8, 7), ((3, 2, 1), (2, 2, 4))), by_pair, {"padding_free": True}),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_prompt_computed_once_for_all_of_its_answers(name, monkeypatch):
    made, run, options = SHARED[name]
    batch = made()
    assert_same(numbers(on_device("llama", **options), batch, run), numbers(on_device("llama"), batch))
    monkeypatch.setitem(CONFIGS, "llama", CONFIGS["llama"] | HEADS_OF_16)
    plain, sharing = on_device("llama"), on_device("llama", **options)
    exact = numbers(plain, batch)
    with torch.autocast(DEVICE, torch.bfloat16):
        rounded, shared = numbers(plain, batch), numbers(sharing, batch, run)
    assert_as_near(shared, rounded, exact)


OPTIONS = {
    "checkpointed": {"gradient_checkpointing": True},
    "offloaded": {"activation_offload": True},
    "checkpointed and offloaded": {"gradient_checkpointing": True, "activation_offload": True},
    "eager": {"attn_implementation": "eager"},
    "flex": {"attn_implementation": "flex_attention"},
    "adapted": {"lora": LoraSpec(r=2)},
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "flex" else n for n in OPTIONS])
def test_options_that_change_no_number(name, monkeypatch):
    if name == "flex":
        if not ON_GPU:
            pytest.skip("compiles for minutes on the CPU")
        monkeypatch.setitem(CONFIGS, "llama", CONFIGS["llama"] | HEADS_OF_16)  # its kernels take none of 8
    batch, options = layouts()["left"], dict(OPTIONS[name])
    plain = {"lora": options["lora"]} if "lora" in options else {}
    if name == "adapted":
        options["gradient_checkpointing"] = True
    assert_same(numbers(on_device("llama", **options), batch), numbers(on_device("llama", **plain), batch))


@pytest.mark.slow
@pytest.mark.skipif(not ON_GPU, reason="waits for a C++ compiler; tests/models/test_compiled.py does")
def test_compiled_layers_have_the_numbers_of_plain_ones():
    policy, compiled = on_device("llama"), on_device("llama", compile="layers")
    try:
        for batch in (padded(records(9, 4, 6)), padded(records(7, 3, 12, 2))):
            assert_same(numbers(compiled, batch), numbers(policy, batch))
    finally:
        torch._dynamo.reset()
