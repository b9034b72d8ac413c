"""Every family's log-probabilities are those of its own logits, however its records lie in the batch."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rlhf_kernels import BackendChoice
from transformers import GenerationConfig

from rlhf_lightning.core.batches import Generated
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.policy import Policy, check_fused, check_head
from rlhf_lightning.models.spec import LoraSpec, ModelSpec

EXACT = {"rtol": 1e-5, "atol": 1e-5}  # float32, sums over at most 48 numbers of size 1


def test_scores_and_gradients_are_those_of_the_models_own_logits(lab, family):
    policy, batch = lab.policy(family), lab.padded(lab.records(6, 6))
    scores = policy(batch, temperature=0.7, with_entropy=True)
    logits = policy.model(input_ids=batch.tokens, attention_mask=batch.attention_mask).logits / 0.7
    own = logits.log_softmax(-1)[:, :-1]
    expected = own.gather(-1, batch.tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(scores.logprobs[:, 1:], expected, **EXACT)
    torch.testing.assert_close(scores.entropy[:, 1:], -(own.exp() * own).sum(-1), **EXACT)
    assert (scores.logprobs[:, 0] == 0).all()

    weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    ours = torch.autograd.grad((weights * scores.logprobs[:, 1:]).sum(), list(policy.parameters()))
    theirs = torch.autograd.grad((weights * expected).sum(), list(policy.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))


def test_padding_side_and_packing_do_not_change_a_record(lab, family):
    """Sliding windows (3) are shorter than the records (up to 9); one record is a single token."""
    policy, rows = lab.policy(family), lab.records(9, 4, 1, 6)
    order = torch.cat([torch.full((len(r) - 1,), i) for i, r in enumerate(rows)])
    alone = torch.cat([policy(lab.padded([row])).logprobs[0, 1:] for row in rows if len(row) > 1])
    layouts = {
        "right": lab.padded(rows),
        "left": lab.padded(rows, "left", extra=2),
        "packed": lab.packed([rows[:3], rows[3:]], extra=2),
        "packed behind padding": lab.packed([rows[:3], rows[3:]], front=2),
        "packed, one row": lab.packed([rows]),
    }
    grads = {}
    for name, batch in layouts.items():
        scores = policy(batch)
        torch.testing.assert_close(scores.logprobs[batch.mask], alone, **EXACT, msg=lambda m, n=name: f"{n}: {m}")
        loss = (scores.logprobs[batch.mask] * (order + 1)).sum()
        grads[name] = torch.autograd.grad(loss, list(policy.parameters()))
        for grad, expected in zip(grads[name], grads["right"], strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_padding_is_harmless_whatever_its_token(lab):
    """Padding with the end token, or with any other: only the attention mask decides what is real."""
    policy, rows = lab.policy("llama"), lab.records(5, 3)
    scores = [policy(lab.padded(rows, fill=fill)).logprobs for fill in (0, 2, 30)]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=0)
    torch.testing.assert_close(scores[0], scores[2], rtol=0, atol=0)


def test_positions_of_padding_may_be_anything(lab):
    """Even past the end of a learned position table."""
    policy, batch = lab.policy("gpt2"), lab.padded(lab.records(5, 3), "left")
    wild = dataclasses.replace(batch, positions=torch.where(batch.attention_mask, batch.positions, 1000))
    torch.testing.assert_close(policy(wild).logprobs, policy(batch).logprobs, rtol=0, atol=0)


def test_sampled_answers_are_scored_like_any_batch(lab):
    """Prompt left-padded, answer right-padded; such batches have no `segments`."""
    policy = lab.policy("qwen2")
    tokens = torch.tensor([[0, 5, 6, 7, 2], [3, 4, 5, 2, 0]])
    real = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    answer = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 1, 0]]).bool()
    positions = torch.tensor([[0, 0, 1, 2, 3], [0, 1, 2, 3, 3]])
    scores = policy(Generated(tokens, real, answer, positions, finished=torch.tensor([True, True])))
    alone = [policy(lab.padded([row])).logprobs[0] for row in (tokens[0, 1:], tokens[1, :4])]
    torch.testing.assert_close(scores.logprobs[0, 3:], alone[0][2:], **EXACT)
    torch.testing.assert_close(scores.logprobs[1, 3], alone[1][3], **EXACT)
    assert (scores.logprobs[~answer] == 0).all()


def test_the_head_does_not_run_over_the_batch(lab):
    policy = lab.policy("llama")
    policy.causal_lm.lm_head.register_forward_hook(lambda *_: pytest.fail("the output head ran"))
    policy(lab.padded(lab.records(4)))


def test_dropout_is_off_in_training_mode_unless_asked_for(lab, family):
    policy, batch = lab.policy(family), lab.padded(lab.records(6))
    assert policy.training
    torch.testing.assert_close(policy(batch).logprobs, policy(batch).logprobs, rtol=0, atol=0)
    if "resid_pdrop" in lab.configs[family] or "attention_dropout" in lab.configs[family]:
        noisy = lab.policy(family, disable_dropout=False)
        assert not torch.equal(noisy(batch).logprobs, noisy(batch).logprobs)
        # the file's rate stays in the config, and so in the export
        assert 0.5 in (policy.config.to_dict().get("resid_pdrop"), policy.config.to_dict().get("attention_dropout"))


def test_gradient_checkpointing_changes_no_gradient(lab, family):
    batch = lab.packed([lab.records(5, 4)])
    grads = []
    for checkpointing in (False, True):
        policy = lab.policy(family, gradient_checkpointing=checkpointing)
        grads.append(torch.autograd.grad(policy(batch).logprobs.sum(), list(policy.parameters())))
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain, **EXACT)


def test_a_head_that_the_policy_misreads_is_refused(lab):
    policy = lab.policy("cohere")
    policy.causal_lm.logit_scale = 3.0  # what the model does is no longer what its config says
    with pytest.raises(UserError, match="'cohere' treat their logits in a way"):
        check_head(policy)


def test_a_model_that_looks_across_packed_records_is_refused(lab):
    policy = lab.policy("llama")
    layer = policy.body.layers[0]
    # a layer that mixes neighbours, as a convolution or a recurrence does
    layer.register_forward_hook(lambda _m, _a, out: out + torch.roll(out, 1, dims=1))
    with pytest.raises(UserError, match=r"'llama' with sdpa attention look across packed records: use packing: false"):
        policy(lab.packed([lab.records(4, 4)]))


def test_generation_continues_with_the_most_probable_token(lab):
    policy = lab.policy("gemma2").eval()
    prompt = lab.padded(lab.records(5, 3), "left")
    with torch.no_grad():
        out = policy.generate(
            input_ids=prompt.tokens, attention_mask=prompt.attention_mask.long(), do_sample=False, max_new_tokens=1
        )
        states = policy.hidden_states(prompt.tokens, prompt.attention_mask, prompt.positions)
    head = policy.head()
    assert torch.equal(out[:, -1], (states[:, -1] @ head.weight.T).argmax(-1))


def test_generating_with_a_borrowed_config_leaves_the_models_own(lab):
    """As sampling does: the wrapper's config is swapped for the call."""
    policy = lab.policy("llama", lora=LoraSpec(r=2)).eval()
    inner, wrapper = policy.causal_lm.generation_config, policy.model.generation_config
    policy.model.generation_config = GenerationConfig(max_new_tokens=2, pad_token_id=0)
    out = policy.generate(input_ids=torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 2, dtype=torch.long))
    policy.model.generation_config = wrapper
    assert out.shape == (1, 4)
    assert policy.causal_lm.generation_config is inner


def test_an_adapter_can_be_switched_off_and_comes_back_trainable(lab, family):
    batch = lab.padded(lab.records(6, 4))
    plain, policy = lab.policy(family), lab.policy(family, lora=LoraSpec(r=2))
    assert policy.has_adapter
    assert not plain.has_adapter
    torch.testing.assert_close(policy(batch).logprobs, plain(batch).logprobs, **EXACT)  # B = 0
    trainable = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    assert not torch.allclose(policy(batch).logprobs, plain(batch).logprobs, atol=1e-3)
    with policy.adapter_disabled():
        torch.testing.assert_close(policy(batch).logprobs, plain(batch).logprobs, **EXACT)
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == trainable


@pytest.mark.parametrize(
    ("target", "part"), [(["q_proj", "lm_head"], "output head"), (["q_proj", "embed_tokens"], "input embedding")]
)
def test_an_adapter_where_the_head_would_pass_it_by_is_refused(lab, target, part):
    config = {"model_type": "llama", **lab.configs["llama"], "tie_word_embeddings": part == "input embedding"}
    with pytest.raises(UserError, match=part):
        load_policy(ModelSpec(config=config, lora=LoraSpec(target_modules=target)))


def test_a_head_that_somebody_else_gave_an_adapter_is_refused(lab):
    batch = lab.padded(lab.records(2))
    model = get_peft_model(lab.policy("llama").model, LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(UserError, match=r"output head has an adapter.*leave the head out.*or merge"):
        Policy(model)(batch)
    merged = Policy(model.merge_and_unload())
    assert merged(batch).logprobs.isfinite().all()


def test_a_head_that_is_trained_whole_beside_adapters_is_the_one_that_scores(lab):
    batch = lab.padded(lab.records(2))
    plain = lab.policy("llama")(batch).logprobs
    model = get_peft_model(
        lab.policy("llama").model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    policy = Policy(model)
    with torch.no_grad():
        policy.head().weight.mul_(2)
    check_head(policy)  # log-probabilities are those of the model's own logits
    assert not torch.allclose(policy(batch).logprobs, plain, atol=1e-3)
    with policy.adapter_disabled():
        torch.testing.assert_close(policy(batch).logprobs, plain)


def test_fused_log_probabilities_need_a_device_with_kernels(lab):
    policy = lab.policy("llama", logprobs="fused")
    assert policy.head().method == "fused"
    message = r"logprobs: fused does not run here \(no Triton kernels for cpu tensors\): use auto or chunked"
    with pytest.raises(UserError, match=message):
        policy(lab.padded(lab.records(2)))


def test_fused_log_probabilities_need_one_dtype(monkeypatch):
    monkeypatch.setattr("rlhf_lightning.models.policy.choose", lambda x: BackendChoice("triton", "cuda", ""))
    with pytest.raises(UserError, match=r"they are torch.bfloat16 and torch.float32: store the model in the dtype"):
        check_fused(torch.zeros(1, 2, dtype=torch.bfloat16), torch.zeros(3, 2), truncated=False)


def test_fused_log_probabilities_are_over_the_whole_vocabulary():
    with pytest.raises(UserError, match="drawn from a part of it: generate without top_k, top_p and min_p, or use"):
        check_fused(torch.zeros(1, 2), torch.zeros(3, 2), truncated=True)


def test_an_adapter_for_layers_that_do_not_exist_is_refused(lab):
    with pytest.raises(UserError, match="c_attn"):
        lab.policy("llama", lora=LoraSpec(target_modules=["c_attn"]))


def test_half_precision_scores_are_close_to_full(lab):
    batch = lab.padded(lab.records(6, 4))
    full, half = lab.policy("llama"), lab.policy("llama", dtype="bfloat16")
    half.load_state_dict(full.state_dict())  # drawn in bfloat16 they are others, in some versions of torch
    assert half.head().weight.dtype == torch.bfloat16
    assert half(batch).logprobs.dtype == torch.float32
    # 8 bits of mantissa, two layers of sums: a few per cent of logits of size 10
    torch.testing.assert_close(half(batch).logprobs, full(batch).logprobs, rtol=0, atol=0.5)


def test_a_policy_is_its_model(lab):
    policy = lab.policy("llama")
    assert all(name.startswith("model.") for name in policy.state_dict())
    assert isinstance(Policy(policy.model).config, type(policy.model.config))
