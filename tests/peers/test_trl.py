"""Our losses against TRL's trainers, on the same tiny weights and the same records or tensors.

TRL has no PPO trainer any more: what is left of PPO's arithmetic there is the clipped loss of its GRPO trainer, the
score at the last token, log-probabilities and entropies. Whitening and GAE are held to published numbers in
`tests/core` and `tests/advantages`.
"""

import warnings
from typing import Any

import pytest

pytest.importorskip("trl", reason="TRL is not installed: pip install 'rlhf-lightning[peers]'")

import torch
from datasets import Dataset
from torch import Tensor
from trl_peers import TOLERANCE, assert_same_loss_and_gradients, gradients_of, options

from rlhf_lightning.core.batches import TokenBatch
from rlhf_lightning.core.masked import reduce_tokens
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.losses.policy import ClippedSurrogate
from rlhf_lightning.losses.reward_model import BradleyTerry
from rlhf_lightning.losses.supervised import DFT, NLL
from rlhf_lightning.models.export import export_scalar_model
from rlhf_lightning.models.loading import load_policy, load_scalar_model, load_tokenizer
from rlhf_lightning.models.scalar_head import init_head
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.stages import RewardModule, SFTModule

PAIRS = [
    {"prompt": "the film was", "chosen": " very good", "rejected": " bad", "margin": 0.5},
    {"prompt": "a", "chosen": " great plot and actors", "rejected": " dull but not long", "margin": 0.0},
    {"prompt": "the actors", "chosen": " good", "rejected": " was not very very good", "margin": 1.5},
]
ANSWERS = [
    {"prompt": "the film was", "completion": " very good and not long"},
    {"prompt": "a plot", "completion": " dull"},
    {"prompt": "the end", "completion": " was great but the film was short"},
]


def their_batch(trainer: Any) -> dict[str, Any]:
    [batch] = list(trainer.get_train_dataloader())
    return dict(batch)


def our_batch(batch_format: str, model: Any, records: str) -> Any:
    data = RLHFDataModule(records, batch_size=3, max_length=64, shuffle=False)
    [batch] = list(data.setup_for(batch_format, str(model)).train_dataloader())
    return batch


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- reward model


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory, tiny_model) -> Any:
    """A reward model with a head that is not zero, loadable by both."""
    spec = ModelSpec(path=str(tiny_model))
    model = load_scalar_model(spec, pooling="last")
    init_head(model.head, "normal", 3)
    return export_scalar_model(model, load_tokenizer(spec), tmp_path_factory.mktemp("models") / "reward")


@pytest.mark.parametrize(("with_margin", "centring"), [(False, None), (True, None), (True, 0.3)])
def test_reward_loss_and_gradient_of_the_same_records(reward_folder, write_jsonl, tmp_path, with_margin, centring):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    records = [record if with_margin else {k: v for k, v in record.items() if k != "margin"} for record in PAIRS]
    theirs = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(reward_folder),
        args=options(RewardConfig, tmp_path, max_length=64, center_rewards_coefficient=centring),
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(reward_folder),
    )
    their_loss = theirs.compute_loss(theirs.model, their_batch(theirs))

    loss = BradleyTerry(centring_coef=centring or 0.0)
    ours = RewardModule(ModelSpec(path=str(reward_folder)), loss=loss)
    ours.configure_model()
    batch = our_batch("pairs", reward_folder, write_jsonl("pairs.jsonl", records))
    our_loss = loss(ours.scores(batch), batch).per_element.sum() / batch.total("pairs")

    torch.testing.assert_close(our_loss, their_loss, **TOLERANCE)
    their_gradient = gradients_of(their_loss, theirs.model.score.weight)
    torch.testing.assert_close(gradients_of(our_loss, ours.model.head.weight), their_gradient, **TOLERANCE)


def test_score_at_the_last_token(reward_folder):
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.utils import get_reward

    tokens = torch.tensor([[1, 4, 5, 6, 2], [1, 7, 8, 0, 0], [1, 9, 10, 2, 0]])
    real = tokens != 0
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder)
    values, scores, _ = get_reward(model, tokens, 0, 1)
    ours = load_scalar_model(ModelSpec(path=str(reward_folder)))
    batch = token_batch(tokens, real, real)
    torch.testing.assert_close(ours(batch), scores, **TOLERANCE)
    ours_everywhere = ours.token_values(tokens, real, batch.positions)
    torch.testing.assert_close(ours_everywhere[real], values.squeeze(-1)[real], **TOLERANCE)


# --- supervised fine-tuning


@pytest.mark.parametrize(("loss_type", "loss"), [("nll", NLL()), ("dft", DFT())])
@pytest.mark.parametrize("kind", ["completions", "texts"])
def test_sft_loss_and_gradient_of_the_same_records(tiny_model, write_jsonl, tmp_path, kind, loss_type, loss):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    texts = [{"text": record["prompt"] + record["completion"]} for record in ANSWERS]
    records = ANSWERS if kind == "completions" else texts
    theirs = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=options(SFTConfig, tmp_path, max_length=64, loss_type=loss_type),
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    inputs = their_batch(theirs)
    their_loss = theirs.compute_loss(theirs.model, inputs)

    ours = SFTModule(ModelSpec(path=str(tiny_model)), loss=loss)
    ours.configure_model()
    batch = our_batch("tokens", tiny_model, write_jsonl("records.jsonl", records))
    assert batch.total("tokens") == int((inputs["labels"][:, 1:] != -100).sum())
    our_loss = token_mean(ours, batch)

    torch.testing.assert_close(our_loss, their_loss, **TOLERANCE)
    their_gradient = gradients_of(their_loss, theirs.model.lm_head.weight)
    torch.testing.assert_close(gradients_of(our_loss, ours.policy.model.lm_head.weight), their_gradient, **TOLERANCE)


def test_sft_with_the_load_balancing_loss_of_a_mixture_of_experts(tiny_experts, write_jsonl, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    theirs = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_experts),
        args=options(SFTConfig, tmp_path, max_length=64, router_aux_loss_coef=0.5),
        train_dataset=Dataset.from_list(ANSWERS),
        processing_class=AutoTokenizer.from_pretrained(tiny_experts),
    )
    their_loss = theirs.compute_loss(theirs.model, their_batch(theirs))

    ours = SFTModule(ModelSpec(path=str(tiny_experts)), router_aux_loss_coef=0.5)
    ours.configure_model()
    ours.splitter.more_follow = True  # nothing is logged outside of a run
    our_loss = ours.training_step(our_batch("tokens", tiny_experts, write_jsonl("records.jsonl", ANSWERS)), 0)
    assert our_loss.item() > 1.0  # the loss of the experts alone is half of two, or more
    assert_same_loss_and_gradients(our_loss, their_loss, ours.policy, theirs.model)


# --- PPO's arithmetic


def test_clipped_loss_with_dual_clip_and_token_mean(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    prompt = 3
    tokens = torch.tensor(
        [[0, 1, 4, 5, 6, 7, 2], [1, 8, 9, 10, 2, 0, 0], [0, 1, 11, 12, 13, 2, 0], [0, 0, 1, 4, 4, 4, 4]]
    )
    real = tokens != 0
    completion = torch.zeros_like(real)
    completion[:, prompt:] = real[:, prompt:]
    batch = token_batch(tokens, real, completion)
    policy = load_policy(ModelSpec(path=str(tiny_model)))
    scores = policy(batch)
    generator = torch.Generator().manual_seed(0)
    moved = 2 * torch.randn(tokens.shape, generator=generator)  # ratios far on both sides of all bounds
    old = torch.where(completion, scores.logprobs.detach() + moved, 0.0)
    advantages = torch.where(completion, torch.randn(tokens.shape, generator=generator), 0.0)

    ratio = torch.exp(scores.logprobs.detach() - old)
    for bound_matters in (
        (ratio < 0.9) & (advantages < 0),
        (ratio > 1.3) & (advantages > 0),
        (ratio > 2) & (advantages < 0),
    ):
        assert (bound_matters & completion).any()

    loss = ClippedSurrogate(clip_low=0.1, clip_high=0.3, dual_clip=2.0)
    per_token = loss(scores.logprobs, old, advantages, completion).per_token
    ours = reduce_tokens(per_token, completion, "token_mean", float(completion.sum()))

    theirs = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=options(
            GRPOConfig,
            tmp_path,
            loss_type="bnpo",
            beta=0.0,
            epsilon=0.1,
            epsilon_high=0.3,
            delta=2.0,
            num_generations=3,
        ),
        train_dataset=Dataset.from_list([{"prompt": "the film"}] * 4),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    theirs.current_gradient_accumulation_steps = 1
    their_loss = theirs._compute_loss(
        theirs.model,
        {
            "prompt_ids": tokens[:, :prompt],
            "prompt_mask": real[:, :prompt].long(),
            "completion_ids": tokens[:, prompt:],
            "completion_mask": completion[:, prompt:].long(),
            "advantages": advantages[:, prompt:],
            "old_per_token_logps": old[:, prompt:],
        },
    )
    torch.testing.assert_close(ours, their_loss, **TOLERANCE)
    their_gradient = gradients_of(their_loss, theirs.model.lm_head.weight)
    torch.testing.assert_close(gradients_of(ours, policy.model.lm_head.weight), their_gradient, **TOLERANCE)


def test_log_probabilities_and_entropies_at_a_temperature(tiny_model):
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    tokens = torch.tensor([[1, 4, 5, 6, 2], [1, 7, 8, 9, 10]])
    real = torch.ones_like(tokens, dtype=torch.bool)
    scores = load_policy(ModelSpec(path=str(tiny_model)))(
        token_batch(tokens, real, real), temperature=0.7, with_entropy=True
    )
    logits = AutoModelForCausalLM.from_pretrained(tiny_model)(tokens).logits[:, :-1] / 0.7
    torch.testing.assert_close(scores.logprobs[:, 1:], selective_log_softmax(logits, tokens[:, 1:]), **TOLERANCE)
    torch.testing.assert_close(scores.entropy[:, 1:], entropy_from_logits(logits), **TOLERANCE)


def token_batch(tokens: Tensor, real: Tensor, mask: Tensor) -> TokenBatch:
    positions = (real.cumsum(1) - 1).clamp(min=0)
    return TokenBatch(tokens=tokens, attention_mask=real, mask=mask & (positions > 0), positions=positions)


def token_mean(module: SFTModule, batch: TokenBatch) -> Tensor:
    return reduce_tokens(module.loss(module(batch).logprobs), batch.mask, "token_mean", batch.total("tokens"))
