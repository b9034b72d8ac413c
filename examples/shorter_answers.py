"""PPO that also dislikes length: a stage of your own is a subclass with one method overridden.

PYTHONPATH=examples rlhf-lightning fit --config configs/ppo.yaml --model shorter_answers.ShorterAnswersPPO \
  --allow_module shorter_answers
"""

from rlhf_lightning.core.batches import Generated, PromptBatch
from rlhf_lightning.rewards.combine import ScoredSamples
from rlhf_lightning.stages import PPOModule


class ShorterAnswersPPO(PPOModule):
    """PPO whose score falls with every token of the answer.

    Args:
        price_per_token: what one token costs.
    """

    def __init__(self, price_per_token: float = 0.01, **kwargs) -> None:
        super().__init__(**kwargs)
        self.price_per_token = price_per_token

    def score(self, prompts: PromptBatch, answers: Generated) -> ScoredSamples:
        return super().score(prompts, answers).plus(-self.price_per_token * answers.mask.sum(-1))
