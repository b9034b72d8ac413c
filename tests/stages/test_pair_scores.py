"""What a preference loss reads, against dense logits."""

import pytest
import torch
from one_step import another, records

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.reference import MeasuredReference, Reference
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.stages.pair_scores import measure, measure_pairs


@pytest.fixture
def pairs(tiny_model, write_jsonl):
    path = write_jsonl("pairs.jsonl", records("dpo"))
    [batch] = RLHFDataModule(path, batch_size=12).setup_for("pairs", str(tiny_model)).train_dataloader()
    return batch


@pytest.fixture
def models(tiny_model):
    return load_policy(ModelSpec(path=str(tiny_model))), Reference(load_policy(another(str(tiny_model))))


def dense(policy, batch):
    """log pi of the whole vocabulary before tokens[1:], one side alone."""
    logits = policy.causal_lm(input_ids=batch.tokens, attention_mask=batch.attention_mask).logits
    return logits[:, :-1].log_softmax(-1)


def test_pairs_against_dense_logits(pairs, models):
    policy, reference = models
    scored, _ = measure_pairs(policy, reference, pairs, {"reference", "ref_kl", "log_collision"}, pad_id=0)
    assert scored.margins is pairs.margins
    for side, batch in ((scored.chosen, pairs.chosen), (scored.rejected, pairs.rejected)):
        mask = batch.mask[:, 1:]
        width = mask.shape[1] + 1
        p, q = dense(policy, batch), dense(reference.policy, batch)
        tokens = batch.tokens[:, 1:, None]
        expected = {
            "logprobs": p.gather(-1, tokens)[..., 0],
            "ref_logprobs": q.gather(-1, tokens)[..., 0],
            "ref_kl": (q.exp() * (q - p)).sum(-1),
            "log_collision": p.exp().square().sum(-1).log(),
        }
        for name, value in expected.items():
            got = getattr(side, name)
            torch.testing.assert_close(got[:, 1:width], torch.where(mask, value, 0.0), rtol=1e-4, atol=1e-5, msg=name)
            assert not got[:, width:].any()
            assert got.requires_grad == (name in ("logprobs", "ref_kl"))
        assert torch.equal(side.mask[:, :width], batch.mask)


def test_without_a_reference_nothing_is_said_of_one(pairs, models):
    scored, measured = measure_pairs(models[0], None, pairs, set(), pad_id=0)
    assert (scored.chosen.ref_logprobs, scored.chosen.ref_kl, measured.ref_hidden) == (None, None, None)
    with pytest.raises(UserError, match=r"compares the policy with a reference, and there is none"):
        _ = scored.log_ratio


def test_what_was_measured_beforehand_has_no_kl_over_the_vocabulary(pairs, models):
    with pytest.raises(UserError, match=r"reference_cache keeps the log-probabilities of the records' own tokens"):
        measure(models[0], MeasuredReference(), pairs.chosen, {"reference", "ref_kl"})
