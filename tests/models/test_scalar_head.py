"""One number per record: which token it is read from, and that the layout of the batch does not matter."""

import dataclasses
import statistics

import pytest
import torch

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.scalar_head import ValueHead, init_head, pool_last, pool_mean
from rlhf_lightning.models.spec import LoraSpec, ModelSpec

EXACT = {"rtol": 1e-5, "atol": 1e-5}


def scalar(lab, family="llama", **options):
    extra = {key: options.pop(key) for key in ("pooling", "seed", "head_init") if key in options}
    return load_scalar_model(ModelSpec(config={"model_type": family, **lab.configs[family]}, **options), **extra)


def test_pooling_by_hand(lab):
    """Two rows: records of 3 and 2 tokens, then one of 4."""
    rows = [torch.tensor([5, 6, 7]), torch.tensor([8, 9]), torch.tensor([5, 6, 7, 8])]
    behind = lab.packed([rows[:2], rows[2:]], front=1)
    right, left = lab.padded(rows), lab.padded(rows, "left")
    packed = lab.packed([rows[:2], rows[2:]], extra=1)
    values = {
        "right": torch.tensor([[1.0, 2, 3, 9], [4, 5, 9, 9], [6, 7, 8, 9]]),
        "left": torch.tensor([[9.0, 1, 2, 3], [9, 9, 4, 5], [6, 7, 8, 9]]),
        "packed": torch.tensor([[1.0, 2, 3, 4, 5, 99], [6, 7, 8, 9, 99, 99]]),
        "behind": torch.tensor([[99, 1.0, 2, 3, 4, 5], [99, 6, 7, 8, 9, 99]]),
    }
    for name, batch in (("right", right), ("left", left), ("packed", packed), ("behind", behind)):
        assert pool_last(values[name], batch).tolist() == [3, 5, 9]
        # the first token of a record does not count
        assert pool_mean(values[name], batch).tolist() == [2.5, 5, 8]


def test_a_record_without_tokens_that_count_has_mean_zero(lab):
    batch = lab.padded([torch.tensor([5]), torch.tensor([5, 6])])
    assert pool_mean(torch.tensor([[3.0, 9], [3, 4]]), batch).tolist() == [0, 4]
    batch = lab.packed([[torch.tensor([5]), torch.tensor([5, 6])]])
    assert pool_mean(torch.tensor([[3.0, 3, 4]]), batch).tolist() == [0, 4]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_layout_does_not_change_a_score_or_its_gradient(lab, family, pooling):
    model, rows = scalar(lab, family, pooling=pooling), lab.records(7, 4, 2, 5)
    alone = torch.cat([model(lab.padded([row])) for row in rows])
    weights = torch.tensor([1.0, -2, 3, -4])
    layouts = [lab.padded(rows), lab.padded(rows, "left", extra=1), lab.packed([rows[:3], rows[3:]], extra=2)]
    grads = []
    for batch in layouts:
        scores = model(batch)
        torch.testing.assert_close(scores, alone, **EXACT)
        grads.append(torch.autograd.grad((weights * scores).sum(), list(model.parameters())))
    for grad in grads[1:]:
        for a, b in zip(grad, grads[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))


def test_the_last_token_is_found_by_mask_where_padding_is_the_end_token(lab):
    """The record ends with the token that the row is padded with."""
    model = scalar(lab)
    row = torch.tensor([5, 6, 2])
    one, two = lab.padded([row], fill=2), lab.padded([row], extra=4, fill=2)
    torch.testing.assert_close(model(one), model(two), **EXACT)
    values = model.token_values(one.tokens, one.attention_mask, one.positions)
    assert model(two).item() == pytest.approx(values[0, 2].item(), abs=1e-5)
    assert model(two).item() != pytest.approx(values[0, 1].item(), abs=1e-3)


def test_a_value_has_read_its_token_and_nothing_later(lab):
    model, batch = scalar(lab), lab.padded([torch.tensor([5, 6, 7, 8])])
    changed = dataclasses.replace(batch, tokens=torch.tensor([[5, 6, 9, 8]]))
    before, after = (model.token_values(b.tokens, b.attention_mask, b.positions)[0] for b in (batch, changed))
    assert torch.equal(before[:2], after[:2])
    assert (before[2:] != after[2:]).all()


def test_normalisation(lab):
    model, batch = scalar(lab), lab.padded(lab.records(5, 4))
    raw = model(batch)
    model.set_normalisation(2.0, 0.5)
    torch.testing.assert_close(model(batch), (raw - 2.0) / 0.5, **EXACT)
    assert {"score_mean", "score_std"} <= set(model.state_dict())
    values = model.token_values(batch.tokens, batch.attention_mask, batch.positions)
    torch.testing.assert_close(pool_last(values, batch), raw, **EXACT)  # values stay as they were


def test_a_new_head_is_small_noise_or_zero(lab):
    head = torch.nn.Linear(4095, 1)
    init_head(head, "normal", seed=0)
    # 4095 draws of standard deviation 1/64: the sample's own lies within 5 %
    assert statistics.pstdev(head.weight[0].tolist()) == pytest.approx(1 / 64, rel=0.05)
    assert head.bias.item() == 0
    assert scalar(lab, head_init="zero").head.weight.abs().sum() == 0
    state = torch.random.get_rng_state()
    first, same, other = (scalar(lab, seed=seed).head.weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_shared_critics_head_starts_at_zero_and_learns():
    head, hidden = ValueHead(8), torch.randn(2, 3, 8, dtype=torch.bfloat16)
    values = head(hidden)
    assert values.shape == (2, 3)
    assert values.dtype == torch.float32
    assert values.abs().sum() == 0
    assert torch.autograd.grad(values.sum(), head.linear.weight)[0].abs().sum() > 0


def test_an_adapter_trains_beside_the_head(lab):
    model = scalar(lab, lora=LoraSpec(r=2))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "head.weight" in trainable
    assert all("lora_" in name or name == "head.weight" for name in trainable)
    assert any("lora_" in name for name in trainable)
    batch = lab.padded(lab.records(5, 4))
    torch.testing.assert_close(model(batch), scalar(lab)(batch), **EXACT)


def test_a_classifier_of_several_labels_is_no_reward_model(lab, tmp_path):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model("llama", **lab.configs["llama"], num_labels=3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="classifier of 3 labels"):
        load_scalar_model(ModelSpec(path=str(tmp_path)))


def test_a_classifier_that_is_no_decoder_is_refused(tmp_path):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tiny = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    config = AutoConfig.for_model("bert", **tiny, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a BertForSequenceClassification, which has no linear `score` head"):
        load_scalar_model(ModelSpec(path=str(tmp_path)))
