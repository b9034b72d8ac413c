"""OnlineDPOModule against TRL's OnlineDPOTrainer, on the same weights, reference, answers and scores.

Of TRL only the model's `generate` and the scores are replaced: cutting answers at their end token, the penalty of those
without one, the pairs, the loss and its backward pass are its `training_step`'s. Of ours only `generate` is. Where we
differ on purpose, the test is named so and states both numbers.
"""

import warnings
from typing import Any

import pytest

pytest.importorskip("trl", reason="TRL is not installed: pip install 'rlhf-lightning[peers]'")

import torch
from datasets import Dataset
from fits import fit
from lightning.pytorch.callbacks import LambdaCallback
from one_step import Keep, another
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl_peers import options

from rlhf_lightning.core.batches import Generated
from rlhf_lightning.core.interfaces import DetailedScores, PreferenceLoss, RewardFn
from rlhf_lightning.losses import DPO, IPO
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rollout.answers import assemble
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import OnlineDPOModule

PROMPTS = ["the film was", "a", "the actors"]
MAX_NEW = 5
PAD, EOS = 0, 2
FIRST = [[4, 7, EOS, 9, 9], [8, 5, 6, EOS, 4], [10, 11, 12, 13, 14]]
SECOND = [[5, 6, 7, 8, 9], [6, EOS, 4, 4, 4], [11, 4, EOS, 5, 6]]
"""Two drawn answers to each prompt; what follows <eos> is no answer. Two of the six never end."""
SCORES = {4: 1.0, 5: 1.5, 8: -0.5, 6: 0.25, 10: 2.0, 11: 1.0}
"""By first token: the second answer wins, the second, the first."""
BETA = 0.4
NAMES = [f"{what}/{side}" for what in ("rewards", "logps") for side in ("chosen", "rejected")]
NAMES += ["rewards/margins", "rewards/accuracies"]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- TRL's side


def their_trainer(model: Any, folder: Any, scores: dict[int, Any], optimizer: Any = None, **more: Any) -> Any:
    network = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)

    def generate(input_ids: Tensor, **_: Any) -> Tensor:
        asked = [PROMPTS.index(text) for text in tokenizer.batch_decode(input_ids, skip_special_tokens=True)]
        half = len(asked) // 2  # all first answers, then all second ones
        drawn = [FIRST[i] for i in asked[:half]] + [SECOND[i] for i in asked[half:]]
        return torch.cat((input_ids, torch.tensor(drawn)), dim=1)

    network.generate = generate

    def score(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [scores[ids[0]] for ids in completion_ids]

    return OnlineDPOTrainer(
        model=network,
        ref_model=load_policy(another(str(model))).causal_lm.eval(),
        reward_funcs=score,
        args=options(OnlineDPOConfig, folder, max_new_tokens=MAX_NEW, max_length=64, **more),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
        optimizers=(None, None) if optimizer is None else (optimizer(network.parameters()), None),
    )


def their_step(model: Any, folder: Any, scores: dict[int, Any], **more: Any) -> tuple[float, dict[str, Tensor], Any]:
    trainer = their_trainer(model, folder, scores, beta=[BETA], **more)
    loss = trainer.training_step(trainer.model, {"prompt": PROMPTS})
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters()}, trainer.stats


# --- ours


class Known(RewardFn):
    """The fixed scores; an answer of which None is known cannot be scored."""

    def __init__(self, scores: dict[int, float | None]) -> None:
        self.scores = scores

    def __call__(self, samples):
        said = [self.scores[sample.tokens[0]] for sample in samples]
        return DetailedScores([0.0 if score is None else score for score in said], valid=[s is not None for s in said])


class Fixed(OnlineDPOModule):
    """Online DPO on the fixed answers."""

    def generate(self, prompts: Any, seed: int, spec: Any = None) -> Generated:
        asked = self.tokenizer(
            PROMPTS, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
        drawn = torch.tensor([answer for both in zip(FIRST, SECOND, strict=True) for answer in both])
        width = asked.input_ids.shape[1]
        ends = [width + row.index(EOS) + 1 if EOS in row else -1 for row in drawn.tolist()]
        both = torch.cat((asked.input_ids.repeat_interleave(2, 0), drawn), dim=1)
        mask = asked.attention_mask.bool().repeat_interleave(2, 0)
        return assemble(both, mask, torch.tensor(ends), pad_id=PAD)


def our_module(model: Any, loss: PreferenceLoss, scores: dict[int, Any], **more: Any) -> Fixed:
    return Fixed(
        ModelSpec(path=str(model)),
        [WeightedReward(Known(scores), name="known")],
        loss,
        reference=another(str(model)),
        generation=GenerationSpec(max_new_tokens=MAX_NEW, num_samples=2),
        **{"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)} | more,
    )


@pytest.fixture
def our_step(tiny_model, tmp_path, write_jsonl):
    def step(loss: PreferenceLoss, scores: dict[int, Any], **more: Any) -> tuple[float, dict[str, Tensor], Any]:
        module, keep = our_module(tiny_model, loss, scores, **more), Keep()
        data = {"train": write_jsonl("prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS]), "batch_size": 3}
        metrics = fit(module, tmp_path, data=data, callbacks=[keep]).callback_metrics
        start = "policy.model."
        gradients = {name.removeprefix(start): gradient for name, gradient in keep.gradients.items()}
        return metrics["train/loss"].item(), gradients, metrics

    return step


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    assert largest > 1e-3, "a comparison of zeros shows nothing"
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-5 * largest, msg=name)


LOSSES = {"sigmoid": DPO(beta=BETA), "ipo": IPO(beta=BETA, log_ratio="sum")}


# --- the same


@pytest.mark.parametrize("penalty", [None, 0.75, 1.25])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_gradient_and_metrics(tiny_model, tmp_path, our_step, loss_type, penalty):
    """0.75 takes the first pair's victory from the answer that never ends, 1.25 the third's too."""
    theirs = their_step(tiny_model, tmp_path, SCORES, loss_type=loss_type, missing_eos_penalty=penalty)
    ours = our_step(LOSSES[loss_type], SCORES, missing_eos_penalty=penalty or 0.0)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert_same_gradients(ours[1], theirs[1])
    for name in NAMES:
        assert ours[2][name].item() == pytest.approx(theirs[2][name][-1], rel=1e-5, abs=1e-6), name
    assert ours[2]["pairs/margin"].item() == pytest.approx(theirs[2]["objective/scores_margin"][-1], rel=1e-6)
    assert ours[2]["rollout/finished_frac"].item() == pytest.approx(theirs[2]["val/contain_eos_token"][-1], rel=1e-6)


def test_each_penalty_above_makes_other_pairs(tiny_model, tmp_path, our_step):
    losses = [our_step(DPO(beta=BETA), SCORES, missing_eos_penalty=penalty)[0] for penalty in (0.0, 0.75, 1.25)]
    assert min(abs(a - b) for a in losses for b in losses if a is not b) > 1e-2


def test_twenty_steps(tiny_model, tmp_path, write_jsonl):
    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)

    schedule = {"max_steps": 20, "lr_scheduler_type": "constant", "max_grad_norm": 1.0}
    theirs = their_trainer(tiny_model, tmp_path, SCORES, adamw, beta=[BETA], missing_eos_penalty=0.75, **schedule)
    losses, step = [], theirs.training_step
    theirs.training_step = lambda *args: losses.append(step(*args)) or losses[-1]
    theirs.train()

    ours, logged = our_module(tiny_model, DPO(BETA), SCORES, missing_eos_penalty=0.75, optimizer=adamw), []
    keep = LambdaCallback(on_train_batch_end=lambda t, *_: logged.append(t.callback_metrics["train/loss"].item()))
    data = {"train": write_jsonl("prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS]), "batch_size": 3}
    fit(ours, tmp_path, data=data, max_epochs=20, gradient_clip_val=1.0, callbacks=[keep])

    assert len(logged) == len(losses) == 20
    assert logged == pytest.approx([loss.item() for loss in losses], abs=1e-4)
    assert logged[-1] < logged[0] - 0.05
    for (name, mine), other in zip(ours.policy.causal_lm.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4, msg=name)


# --- where we differ, and by how much


def log_ratios(model: Any) -> Tensor:
    """h of each prompt's first answer against its second."""
    module = our_module(model, DPO(), SCORES)
    module.configure_model()
    answers = module.generate(None, 0)
    policy, reference = (m(answers).logprobs.detach() for m in (module.policy, module.reference))
    of_answers = torch.where(answers.mask, policy - reference, 0.0).sum(-1)
    return of_answers[::2] - of_answers[1::2]


def dpo_loss(h: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-BETA * h))


def test_differs_answers_that_score_the_same_are_a_pair_of_theirs_and_none_of_ours(tiny_model, tmp_path, our_step):
    """Theirs prefers the first of two equal answers, and counts the pair in the mean."""
    equal = SCORES | {8: 0.25}
    h = log_ratios(tiny_model)
    as_they_pair = torch.stack((dpo_loss(-h[0]), dpo_loss(h[1]), dpo_loss(h[2])))
    theirs = their_step(tiny_model, tmp_path, equal)[0]
    ours, _, metrics = our_step(DPO(beta=BETA), equal)
    assert theirs == pytest.approx(as_they_pair.mean().item(), rel=1e-5)
    assert ours == pytest.approx(as_they_pair[[0, 2]].mean().item(), rel=1e-5)
    assert metrics["pairs/trained"].item() == 2
    assert abs(theirs - ours) > 1e-3


def test_differs_an_answer_that_cannot_be_scored_is_0_to_them_and_in_no_pair_of_ours(tiny_model, tmp_path, our_step):
    unknown = SCORES | {11: None}
    h = log_ratios(tiny_model)
    as_they_pair = torch.stack((dpo_loss(-h[0]), dpo_loss(-h[1]), dpo_loss(h[2])))
    theirs = their_step(tiny_model, tmp_path, unknown)[0]
    ours = our_step(DPO(beta=BETA), unknown)[0]
    assert theirs == pytest.approx(as_they_pair.mean().item(), rel=1e-5)
    assert ours == pytest.approx(as_they_pair[:2].mean().item(), rel=1e-5)
    assert abs(theirs - ours) > 1e-3


def test_differs_their_ipo_sums_here_and_divides_by_length_in_their_dpo_trainer(tiny_model, tmp_path, our_step):
    """Our IPO says which (`log_ratio`), and starts with the one of their DPO trainer."""
    theirs = their_step(tiny_model, tmp_path, SCORES, loss_type="ipo")[0]
    assert our_step(IPO(beta=BETA, log_ratio="sum"), SCORES)[0] == pytest.approx(theirs, rel=1e-5)
    h = log_ratios(tiny_model) * torch.tensor([-1.0, -1.0, 1.0])
    assert theirs == pytest.approx((h - 1 / (2 * BETA)).square().mean().item(), rel=1e-5)
    by_length = our_step(IPO(beta=BETA), SCORES)[0]
    assert abs(by_length - theirs) > 0.1


def test_their_list_of_betas_by_epoch_cannot_be_used(tiny_model, tmp_path):
    """TRL's beta may be a list, one for each epoch; a run with one ends at its second step, asking for number 1.0."""
    trainer = their_trainer(tiny_model, tmp_path, SCORES, beta=[0.1, 0.2], max_steps=2)
    with pytest.raises(TypeError, match="list indices must be integers"):
        trainer.train()
