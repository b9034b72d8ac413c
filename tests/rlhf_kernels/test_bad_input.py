"""What a user can get wrong, and that the message names it and says what to do."""

import math

import pytest
import torch
from rlhf_kernels import (
    PolicyLossSpec,
    exact_kl,
    gae,
    kl_shaped_gae,
    linear_exact_kl,
    linear_jsd,
    linear_policy_loss,
    linear_token_logprobs,
    masked_whiten,
    policy_loss,
    token_logprobs,
)

LOGITS, TOKENS = torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)
HIDDEN, WEIGHT = torch.zeros(2, 3), torch.zeros(5, 3)
ONES = torch.ones(2, 3, dtype=torch.bool)
PER_TOKEN, FLAGS = torch.zeros(2), torch.ones(2, dtype=torch.bool)


def loss(**changes):
    arguments = {"mask": FLAGS, "denominator": 1.0, **changes}
    return policy_loss(LOGITS, TOKENS, PER_TOKEN, PER_TOKEN, **arguments)


def shaped(**changes):
    arguments = {"kl_coef": 0.1, "gamma": 1.0, "lam": 1.0, **changes}
    return kl_shaped_gae(PER_TOKEN, *[ONES.float()] * 3, ONES, **arguments)


CASES = [
    (lambda: token_logprobs(LOGITS, torch.zeros(3).long()), r"tokens has shape \(3,\) but logits has shape \(2, 5\)"),
    (lambda: token_logprobs(LOGITS, torch.zeros(2)), r"tokens has dtype torch.float32: give integer"),
    (lambda: token_logprobs(LOGITS.int(), TOKENS), r"logits has dtype torch.int32: give float32"),
    (lambda: token_logprobs(LOGITS, TOKENS + 5), r"token id 5 at \[0\] is outside \[0, 5\)"),
    (lambda: token_logprobs(LOGITS, TOKENS - 1), r"token id -1 at \[0\] is outside"),
    (lambda: token_logprobs(LOGITS[:0], TOKENS[:0]), r"no row to score; skip the empty batch"),
    (lambda: token_logprobs(LOGITS, TOKENS, mask=torch.ones(2)), r"mask has dtype torch.float32: give booleans"),
    (lambda: token_logprobs(LOGITS, TOKENS, mask=FLAGS[:1]), r"mask has shape \(1,\) but tokens asks for \(2,\)"),
    (lambda: token_logprobs(LOGITS, TOKENS, temperature=0.0), r"temperature=0.0 must be positive"),
    (lambda: token_logprobs(LOGITS, TOKENS, temperature=torch.ones(3)), r"temperature has shape \(3,\)"),
    (lambda: token_logprobs(LOGITS, TOKENS, temperature=torch.tensor([1.0, 0.0])),
     r"temperature=0.0 at \[1\] must be positive"),
    (lambda: token_logprobs(LOGITS, TOKENS, temperature=torch.tensor(-1.0)), r"temperature=-1.0 at \[0\] must be posi"),
    (lambda: linear_token_logprobs(HIDDEN, WEIGHT, TOKENS, temperature=torch.zeros(2)), r"temperature=0.0 at \[0\]"),
    (lambda: token_logprobs(LOGITS, TOKENS, temperature=torch.ones(2) > 0), r"temperature has dtype torch.bool"),
    (lambda: exact_kl(LOGITS, LOGITS, temperature=torch.ones(2)),
     r"temperature is a tensor of shape \(2,\): give one number for all rows"),
    (lambda: exact_kl(LOGITS, LOGITS, temperature=-1.0), r"temperature=-1.0 must be positive"),
    # 1 / inf would make every logit 0, and a logit of -inf NaN
    (lambda: token_logprobs(LOGITS, TOKENS, temperature=math.inf), r"temperature=inf must be positive and finite"),
    (lambda: token_logprobs(LOGITS, TOKENS, temperature=torch.tensor([1.0, math.inf])),
     r"temperature=inf at \[1\] must be positive and finite"),
    (lambda: exact_kl(LOGITS[0, 0], LOGITS[0, 0]), r"logits has shape \(\): give \[..., vocab\]"),
    (lambda: linear_exact_kl(HIDDEN[0, 0], WEIGHT, HIDDEN[0, 0], WEIGHT), r"hidden has shape \(\): give \[..., hidden"),
    (lambda: token_logprobs(LOGITS, TOKENS, softcap=-1.0), r"softcap=-1.0 must be positive"),
    (lambda: token_logprobs(LOGITS, TOKENS, softcap=float("inf")), r"softcap=inf must be positive and finite"),
    (lambda: token_logprobs(LOGITS, TOKENS, logit_scale=float("nan")), r"logit_scale=nan must be finite"),
    (lambda: linear_token_logprobs(HIDDEN, WEIGHT.T, TOKENS),
     r"weight has shape \(3, 5\) but hidden has shape \(2, 3\)"),
    (lambda: linear_token_logprobs(HIDDEN, torch.nn.Linear(3, 5), TOKENS),
     r"weight is a Linear: give its weight tensor"),
    (lambda: linear_token_logprobs(HIDDEN, WEIGHT, TOKENS, bias=torch.zeros(4)), r"bias has shape \(4,\)"),
    (lambda: linear_token_logprobs(HIDDEN, WEIGHT, TOKENS, chunk_rows=0), r"chunk_rows=0 must be a whole number, 1 or"),
    (lambda: linear_exact_kl(HIDDEN, WEIGHT, HIDDEN, WEIGHT, chunk_rows=2.5), r"chunk_rows=2.5 must be a whole number"),
    (lambda: linear_token_logprobs(HIDDEN, WEIGHT, TOKENS, method="fast"),
     r"method='fast': use auto, chunked or fused"),
    (lambda: linear_token_logprobs(HIDDEN, WEIGHT, TOKENS, sums="float32"),
     r"sums='float32': use tensor_cores or rounded"),
    (lambda: linear_token_logprobs(HIDDEN, WEIGHT, TOKENS, sums="rounded"),
     r"sums='rounded' is how the fused kernel adds, and method='auto': use method='fused'"),
    (lambda: linear_policy_loss(HIDDEN, WEIGHT, TOKENS, PER_TOKEN, PER_TOKEN, mask=FLAGS, denominator=1.0,
                                method="chunked", sums="rounded"),
     r"sums='rounded' is how the fused kernel adds, and method='chunked': use method='fused'"),
    (lambda: linear_token_logprobs(HIDDEN, WEIGHT, TOKENS, method="fused"),
     r"method='fused' is a kernel that does not run here \(no Triton kernels for cpu tensors\): use auto or chunked"),
    (lambda: linear_token_logprobs(HIDDEN, WEIGHT, TOKENS + 9), r"token id 9 at \[0\] is outside \[0, 5\)"),
    (lambda: exact_kl(LOGITS, LOGITS[:1]), r"ref_logits has shape \(1, 5\) but logits asks for \(2, 5\)"),
    (lambda: exact_kl(LOGITS, LOGITS, direction="both"), r"direction='both': use forward"),
    (lambda: linear_exact_kl(HIDDEN, WEIGHT, HIDDEN, WEIGHT[:4]), r"ref_weight\[:, 0\] has shape \(4,\)"),
    (lambda: linear_exact_kl(HIDDEN, WEIGHT, HIDDEN, WEIGHT, direction="both"), r"direction='both': use forward"),
    (lambda: linear_jsd(HIDDEN, WEIGHT, HIDDEN, WEIGHT, beta=1.0), r"beta=1.0 must be above 0 and below 1; the KL div"),
    (lambda: linear_jsd(HIDDEN, WEIGHT, HIDDEN, WEIGHT, beta=torch.ones(2)), r"beta"),
    (lambda: loss(denominator=0.0), r"denominator=0.0 must be positive"),
    (lambda: loss(denominator=torch.tensor(0.0)), r"denominator=0.0 must be positive: no token of the step counts"),
    (lambda: loss(denominator=torch.ones(2)), r"denominator has shape \(2,\): give one number for the whole step"),
    (lambda: loss(mask=None), r"mask is a NoneType: give a tensor"),
    (lambda: loss(loss={"form": "clipped"}), r"loss is a dict: give a PolicyLossSpec"),
    (lambda: loss(loss=PolicyLossSpec(kl_coef=0.1), ref_logprobs=torch.zeros(3)), r"ref_logprobs has shape \(3,\)"),
    (lambda: loss(loss=PolicyLossSpec(kl_coef=0.1)), r"kl_coef=0.1 needs ref_logprobs"),
    (lambda: loss(loss=PolicyLossSpec(ratio="sequence")), r"ratio 'sequence' needs tokens \[sequences, time\]"),
    (lambda: loss(weights=torch.ones(3)), r"weights has shape \(3,\) but tokens asks for \(2,\)"),
    (lambda: linear_policy_loss(HIDDEN, WEIGHT, TOKENS, PER_TOKEN[:1], PER_TOKEN, mask=FLAGS, denominator=1),
     r"old_logprobs has shape \(1,\)"),
    (lambda: PolicyLossSpec("ppo"), r"form='ppo': use clipped, reinforce, cispo, sapo"),
    (lambda: PolicyLossSpec(dual_clip=0.5), r"dual_clip=0.5 must be above 1"),
    (lambda: PolicyLossSpec(clip_low=-0.2), r"give distances from 1, not signed"),
    (lambda: PolicyLossSpec(clip_high=float("nan")), r"clip_high=nan: give distances from 1"),
    (lambda: PolicyLossSpec(kl_estimator="k4"), r"kl_estimator='k4': use k1, k2, k3"),
    (lambda: PolicyLossSpec(ratio="row"), r"ratio='row': use token or sequence"),
    (lambda: PolicyLossSpec(sapo_tau_up=0.0), r"sapo_tau_up=0.0, sapo_tau_down=1.05 must be positive"),
    (lambda: PolicyLossSpec(entropy_coef=float("nan")), r"entropy_coef=nan must be finite"),
    (lambda: gae(ONES.float(), ONES.float()[:, :2], ONES[:, :2], gamma=1.0, lam=1.0), r"rewards has shape \(2, 3\)"),
    (lambda: gae(ONES.float(), ONES.float(), ONES, gamma=1.5, lam=1.0), r"gamma=1.5 must be in \[0, 1\]"),
    (lambda: gae(ONES.float(), ONES.float(), ONES, gamma=1.0, lam=torch.ones(2)),
     r"lam is a tensor of shape \(2,\): give one number"),
    (lambda: shaped(kl_coef=float("nan")), r"kl_coef=nan must be finite"),
    (lambda: shaped(kl_estimator="k0"), r"kl_estimator='k0': use k1, k2, k3"),
    (lambda: shaped(critic_lam=2.0), r"critic_lam=2.0 must be in \[0, 1\]"),
    (lambda: gae(PER_TOKEN, PER_TOKEN, FLAGS, gamma=1.0, lam=1.0), r"give \[batch, time\]"),
    (lambda: kl_shaped_gae(torch.ones(3), *[ONES.float()] * 3, ONES, kl_coef=0.1, gamma=1.0, lam=1.0),
     r"scores has shape \(3,\): give one per row \(2,\)"),
    (lambda: masked_whiten(PER_TOKEN, FLAGS, moments=torch.ones(2)), r"moments has shape \(2,\): give \[3\]"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), CASES, ids=range(len(CASES)))
def test_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_id_that_does_not_count_may_be_anything():
    result = token_logprobs(LOGITS, torch.tensor([0, -100]), mask=torch.tensor([True, False]))
    assert result.logprobs[1] == 0


def test_a_temperature_of_a_row_that_does_not_count_may_be_anything():
    mask = torch.tensor([True, False])
    result = token_logprobs(LOGITS, TOKENS, mask=mask, temperature=torch.tensor([1.0, 0.0]))
    assert result.logprobs.isfinite().all()


def test_one_temperature_may_come_in_any_shape():
    expected = token_logprobs(LOGITS, TOKENS, temperature=2.0).logprobs
    for shape in ((), (1,), (1, 1)):
        ours = token_logprobs(LOGITS, TOKENS, temperature=torch.full(shape, 2.0)).logprobs
        torch.testing.assert_close(ours, expected)


def test_a_temperature_that_wants_a_gradient_is_refused():
    with pytest.raises(ValueError, match="temperature requires a gradient"):
        token_logprobs(LOGITS, TOKENS, temperature=torch.ones(2, requires_grad=True))


def test_a_head_with_an_adapter_is_refused_until_it_is_merged():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(3, 5, bias=False)})
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    ).base_model.model  # init_lora_weights=False: an adapter that changes something
    hidden, tokens = torch.randn(2, 3), torch.tensor([1, 4])
    expected = wrapped.lm_head(hidden).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    for call in (
        lambda: linear_token_logprobs(hidden, wrapped.lm_head, tokens),
        lambda: linear_exact_kl(hidden, wrapped.lm_head, hidden, WEIGHT),
        lambda: linear_exact_kl(hidden, WEIGHT, hidden, wrapped.lm_head),
        lambda: linear_policy_loss(hidden, wrapped.lm_head, tokens, PER_TOKEN, PER_TOKEN, mask=FLAGS, denominator=1),
    ):
        with pytest.raises(
            ValueError, match=r"weight is a Linear: give its weight tensor\. A LoRA-wrapped head has to"
        ):
            call()
    before = linear_token_logprobs(hidden, wrapped.lm_head.weight, tokens).logprobs
    assert not torch.allclose(before, expected, atol=1e-3)  # what silence would have given
    wrapped.lm_head.merge()
    torch.testing.assert_close(linear_token_logprobs(hidden, wrapped.lm_head.weight, tokens).logprobs, expected)
