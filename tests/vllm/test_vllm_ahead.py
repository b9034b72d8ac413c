"""The real vLLM samples while the policy is trained: by the weights of one rollout before, whichever is faster."""

import copy
import time
from functools import partial

import lightning as L
import pytest
import torch
from fits import fit
from one_step import records

from rlhf_lightning.losses import SamplerCorrection
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout import GenerationSpec, VLLMEngine, VLLMServer
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.stages import GRPOModule


class Watch(L.Callback):
    """How far answers are from the policy that sampled them, and from the policy as it is; trains slowly.

    Args:
        seconds: an optimiser step takes longer by.
    """

    def __init__(self, seconds):
        self.seconds, self.older, self.of_sampler, self.of_policy = seconds, None, [], []

    def on_rollout_scored(self, trainer, module, answers, scored):
        for policy, gaps in ((self.older or module.policy, self.of_sampler), (module.policy, self.of_policy)):
            own = policy(answers).logprobs
            gaps.append((own - answers.sampler_logprobs)[answers.mask].abs().max().item())
        self.older = copy.deepcopy(module.policy)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        time.sleep(self.seconds)


@pytest.mark.parametrize("name", ["VLLMEngine", "VLLMServer"])
def test_rollouts_are_one_behind_whatever_is_faster(name, request, llama, write_jsonl, tmp_path):
    engine = VLLMEngine
    if name == "VLLMServer":
        engine = partial(VLLMServer, url=request.getfixturevalue("server").url)
    prompts = write_jsonl("prompts.jsonl", [{"prompt": row["prompt"]} for row in records("ppo")[:12]])
    ended = []
    for seconds in (0.0, 0.5):
        watch = Watch(seconds)
        module = GRPOModule(
            ModelSpec(path=str(llama)),
            [WeightedReward(LengthReward(target=3), name="reward")],
            generation=GenerationSpec(max_new_tokens=8, num_samples=4, keep_logprobs=True),
            updates=UpdateSpec(inner_epochs=2, async_rollouts=True),
            correction=SamplerCorrection(),
            engine=engine,
            optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
            seed=1,
        )
        data = {"train": prompts, "val": prompts, "batch_size": 4}
        fit(module, tmp_path, data=data, max_epochs=2, val_check_interval=3, callbacks=[watch])
        ended.append(module.state_dict())
        assert len(watch.of_sampler) == 6
        assert max(watch.of_sampler) < 1e-3
        assert watch.of_policy[0] < 1e-3
        assert min(watch.of_policy[1:]) > 1e-2
    assert all(torch.equal(value, ended[1][key]) for key, value in ended[0].items())
