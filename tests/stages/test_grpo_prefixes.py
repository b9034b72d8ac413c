"""GRPO: prefixes that an answer begins with and that carry no loss."""

import pytest
import torch
from fits import fit
from grpo_runs import Keep, grpo, prompts
from one_step import records

from rlhf_lightning.core.interfaces import RewardFn
from rlhf_lightning.rollout.prefix import PrefixSpec


class Begins(RewardFn):
    """Remembers what it was shown."""

    def __init__(self) -> None:
        self.seen = []

    def __call__(self, samples):
        self.seen.extend(samples)
        return [float(len(sample.tokens)) for sample in samples]


@pytest.mark.parametrize("in_completion", [True, False])
def test_a_prefix_is_read_but_carries_no_loss(in_completion, tiny_model, write_jsonl, tmp_path):
    reward = Begins()
    module = grpo(tiny_model, reward, prefix=PrefixSpec(share=1.0, in_completion=in_completion))
    keep = Keep(module)
    fit(module, tmp_path, data={"train": prompts(write_jsonl, prefix="was dull but"), "batch_size": 12})
    [rollouts] = keep.rollouts
    begun = module.tokenizer.encode(" was dull but", add_special_tokens=False)
    assert begun
    for row in range(len(rollouts.scores)):
        first = int(rollouts.mask[row].int().argmax())
        assert rollouts.tokens[row, first - len(begun) : first].tolist() == begun
    for sample in reward.seen:
        text = sample.completion if in_completion else sample.prompt
        assert text.strip().startswith("was dull but") if in_completion else text.endswith("was dull but")
    # the gradient with respect to the logits that predict the prefix is exactly 0
    hidden = module.policy.hidden_states(rollouts.tokens, rollouts.attention_mask, rollouts.positions)
    logits = (hidden @ module.policy.head().weight.T).detach().requires_grad_()
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, rollouts.tokens[:, 1:, None])[..., 0]
    logprobs = torch.nn.functional.pad(logprobs, (1, 0))
    output = module.loss(logprobs, rollouts.old_logprobs, rollouts.advantages, rollouts.mask)
    module._mean(output.per_token, rollouts).backward()
    predicts_answer = torch.nn.functional.pad(rollouts.mask[:, 1:], (0, 1))
    assert logits.grad[predicts_answer].abs().max() > 0
    assert not logits.grad[~predicts_answer].any()


def test_a_prefix_that_is_read_back_with_other_spaces_still_belongs_to_the_answer(tiny_model, write_jsonl, tmp_path):
    reward = Begins()
    module = grpo(tiny_model, reward, prefix=PrefixSpec(share=1.0))
    path = prompts(write_jsonl, prefix="was   dull  but")
    fit(module, tmp_path, data={"train": path, "batch_size": 12})
    asked = {row["prompt"] for row in records("ppo")}
    for sample in reward.seen:
        assert sample.prompt in asked
        assert sample.completion.split()[:3] == ["was", "dull", "but"]
        assert len(sample.tokens) <= 5, "the policy's own"


def test_a_share_of_the_prompts_gets_its_prefix_and_evaluation_none(tiny_model, write_jsonl, tmp_path):
    reward = Begins()
    module = grpo(tiny_model, reward, prefix=PrefixSpec(share=0.5))
    path = prompts(write_jsonl, prefix="was dull but")
    fit(module, tmp_path, data={"train": path, "batch_size": 12}, max_epochs=4)
    begun = [sample.completion.strip().startswith("was dull but") for sample in reward.seen]
    assert 0.25 < sum(begun) / len(begun) < 0.75
    reward.seen.clear()
    fit(module, tmp_path, data={"train": path, "val": path, "batch_size": 12, "eval_batch_size": 12}, max_epochs=1)
    assert not all(sample.record.get("prefilled") for sample in reward.seen)
    assert any("prefilled" not in sample.record for sample in reward.seen)
