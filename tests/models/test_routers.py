"""Routers of mixtures of experts are heard token by token, however the decoder runs, and give transformers' loss."""

import pytest
import torch

from rlhf_lightning.core.batches import TokenBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.routers import watch_routers
from rlhf_lightning.models.routing import heard, unheard
from rlhf_lightning.models.spec import LoraSpec, ModelSpec
from rlhf_lightning.stages.router_balance import RouterBalance

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "vocab_size": 21,
    "num_experts_per_tok": 2,
}
FAMILIES = {
    "qwen3_moe": SHAPE | {"moe_intermediate_size": 16, "num_experts": 4},
    "mixtral": SHAPE | {"num_local_experts": 4},
    "olmoe": SHAPE | {"num_experts": 4, "eos_token_id": 2},
}
ANY = {name: value for name, value in SHAPE.items() if name != "num_experts_per_tok"}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK = SHAPE | LATENT | {"moe_intermediate_size": 16, "n_routed_experts": 4, "first_k_dense_replace": 1}


def policy_of(family: str, **options):
    config = FAMILIES.get(family) or DEEPSEEK | {"n_group": 2, "topk_group": 1}
    return load_policy(ModelSpec(config={"model_type": family} | config, **options))


def batch_of(lengths=(7, 3, 5), *, left: bool = False, seed: int = 0) -> TokenBatch:
    width = max(lengths)
    column = torch.arange(width)
    real = torch.stack([column >= width - n if left else column < n for n in lengths])
    drawn = torch.randint(3, 21, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    ordered = torch.zeros_like(drawn)
    for row, n in enumerate(lengths):
        ordered[row, real[row]] = drawn[row, :n]
    return TokenBatch(ordered, real, real.clone(), (real.long().cumsum(-1) - 1).clamp(min=0))


def loss_and_gradients(policy, batch, over="step"):
    balance = RouterBalance(1.0, over)
    balance.watch(policy)
    policy.zero_grad()
    with balance.heard() as hearing:
        policy(batch)
    loss = balance.share(hearing, batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, balance


@pytest.mark.parametrize("moe", FAMILIES)
def test_the_loss_of_a_step_is_that_of_transformers(moe):
    policy, batch = policy_of(moe), batch_of()
    loss, gradients, _ = loss_and_gradients(policy, batch)
    model = policy.causal_lm
    model.zero_grad()
    expected = model(
        input_ids=batch.tokens, attention_mask=batch.attention_mask.long(), output_router_logits=True
    ).aux_loss
    torch.testing.assert_close(loss, expected.detach())
    assert float(expected.detach()) > 2.0  # of two experts a token that would be an even load
    expected.backward()
    theirs = {f"model.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    largest = max(float(g.abs().max()) for g in theirs.values())
    assert gradients.keys() == theirs.keys()
    assert largest > 1e-3
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5 * largest, msg=name)


def assert_same(found, expected):
    assert found[0].item() == pytest.approx(expected[0].item(), abs=1e-5)
    assert found[1].keys() == expected[1].keys()
    largest = max(float(g.abs().max()) for g in expected[1].values())
    assert largest > 1e-3, "a comparison of zeros shows nothing"
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-5, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("over", ["step", "sequence"])
@pytest.mark.parametrize(
    ("options", "left"),
    [({}, True), ({"padding_free": True}, False), ({"gradient_checkpointing": True}, False)],
    ids=["padded on the left", "without padding", "checkpointed"],
)
def test_how_the_decoder_runs_does_not_matter(options, left, over):
    expected = loss_and_gradients(policy_of("qwen3_moe"), batch_of(), over)
    assert_same(loss_and_gradients(policy_of("qwen3_moe", **options), batch_of(left=left), over), expected)


@pytest.mark.parametrize("over", ["step", "sequence"])
@pytest.mark.parametrize("padding_free", [False, True])
def test_packed_sequences_are_balanced_as_on_their_own(padding_free, over):
    rows = batch_of((7, 3, 5))
    expected = loss_and_gradients(policy_of("qwen3_moe"), rows, over)
    apart = [rows.tokens[i, :n] for i, n in enumerate((7, 3, 5))]
    tokens = torch.stack((torch.cat((apart[1], apart[2])), torch.cat((apart[0], torch.zeros(1).long()))))
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1, 0]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0]])
    packed = TokenBatch(tokens, segments > 0, segments > 0, positions, segments)
    assert_same(loss_and_gradients(policy_of("qwen3_moe", padding_free=padding_free), packed, over), expected)


@pytest.mark.parametrize("over", ["step", "sequence"])
@pytest.mark.parametrize("way", ["groups", "pairs behind a cache", "pairs in a row", "pairs in a row, without padding"])
def test_a_prompt_that_answers_share_counts_once_for_each(way, over):
    prompt, answer = (2, 4) if way == "pairs behind a cache" else (4, 3)
    drawn = torch.randint(3, 21, (2, prompt), generator=torch.Generator().manual_seed(1)).repeat(2, 1)
    answers = torch.randint(3, 21, (4, answer), generator=torch.Generator().manual_seed(2))
    tokens = torch.cat((drawn, answers), dim=1)
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[0, -1] = False
    mask = real & (torch.arange(prompt + answer) >= prompt)
    batch = TokenBatch(tokens, real, mask, torch.arange(prompt + answer).expand(4, -1))

    def run(policy, shared):
        balance = RouterBalance(1.0, over)
        balance.watch(policy)
        asked = batch.tokens, batch.attention_mask, batch.positions
        with balance.heard() as hearing:
            if shared and way == "groups":
                hidden = policy.hidden_states(*asked, answers=mask)
            else:
                hidden = policy.shared_prompt_states(*asked, mask) if shared else policy.hidden_states(*asked)
        loss = balance.share(hearing, batch)
        (loss + 0 * hidden.sum()).backward()
        return loss.detach(), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}

    options = {"padding_free": True} if way.endswith("without padding") else {}
    assert_same(run(policy_of("qwen3_moe", **options), True), run(policy_of("qwen3_moe"), False))


def test_adapters_under_the_routers_learn_to_balance():
    loss, gradients, _ = loss_and_gradients(policy_of("qwen3_moe", lora=LoraSpec(r=2)), batch_of())
    assert loss.item() == pytest.approx(loss_and_gradients(policy_of("qwen3_moe"), batch_of())[0].item(), abs=1e-5)
    assert all("lora" in name for name in gradients)
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-4


def test_a_router_of_sigmoids_counts_the_experts_that_it_chose():
    policy, batch = policy_of("deepseek_v3"), batch_of((4,))
    [router] = [m for m in policy.body.modules() if type(m).__name__ == "DeepseekV3TopkRouter"]
    router.e_score_correction_bias[:] = torch.tensor([0.0, 0.0, 9.0, 9.0])  # everything goes to the second group
    loss, _, balance = loss_and_gradients(policy, batch)
    said = []
    router.register_forward_hook(lambda module, inputs, output: said.append(output[0]))
    policy(batch)
    scores = said[0].sigmoid()
    share = (scores / scores.sum(-1, keepdim=True)).mean(0)
    # f = (0, 0, 1, 1)
    assert loss.item() == pytest.approx(4 * (share[2] + share[3]).item(), abs=1e-5)
    assert float(balance.take(lambda x: x)["router/max_load"]) == 1.0


def test_nobody_is_heard_where_nothing_is_trained():
    policy = policy_of("qwen3_moe")
    watch_routers(policy.body, "router_aux_loss_coef=1.0")
    with heard(pool_layers=True) as hearing, unheard():
        policy(batch_of())
    assert hearing.batches == []


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"model_type": "llama"}, {}, "models of type 'llama' have no router"),
        (
            {"model_type": "glm4_moe", "n_routed_experts": 4, "num_experts_per_tok": 2},
            {},
            "what their routers' logits mean is not known here",
        ),
        (FAMILIES["qwen3_moe"] | {"model_type": "qwen3_moe"}, {"compile": "layers"}, "leave compile out"),
        (FAMILIES["qwen3_moe"] | {"model_type": "qwen3_moe", "mlp_only_layers": [0, 1]}, {}, "have no router"),
    ],
    ids=["dense", "unknown", "compiled", "dense layers"],
)
def test_what_cannot_be_balanced_is_refused(config, options, message):
    policy = load_policy(ModelSpec(config=ANY | config, **options))
    with pytest.raises(UserError, match=f"router_aux_loss_coef=0.5.*{message}"):
        RouterBalance(0.5, "step").watch(policy)


def test_a_negative_weight_is_refused():
    with pytest.raises(UserError, match=r"router_aux_loss_coef=-1.0 is no weight .*: give 0 \(none\) or more"):
        RouterBalance(-1.0, "step")
