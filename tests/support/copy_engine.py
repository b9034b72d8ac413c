"""An engine with weights of its own, as vLLM's are, that samples as HFGenerate does: its answers show what it holds."""

import copy
import time
from dataclasses import replace

from rlhf_lightning.core.interfaces import RolloutEngine
from rlhf_lightning.rollout.generate import HFGenerate


class CopyEngine(RolloutEngine):
    """Samples from a copy of the policy, made whenever it is given weights.

    Args:
        says: whether answers come with its own log-probabilities, as vLLM's do: without entropies.
        events: where calls are noted.
    """

    def __init__(self, spec, tokenizer, says=False, events=None):
        self.engine, self.tokenizer, self.says = HFGenerate(spec, tokenizer), tokenizer, says
        self.held, self.events = {}, [] if events is None else events

    def with_spec(self, spec):
        other = copy.copy(self)
        other.engine = self.engine.with_spec(spec)
        return other

    def take_weights(self, policy):
        self.events.append("weights")
        self.held["policy"] = copy.deepcopy(policy).eval()

    def ahead(self):
        return self

    def rest(self):
        self.events.append("rest")

    def close(self):
        self.events.append("close")
        self.held.clear()

    def generate(self, policy, prompts, *, seed):
        self.events.append("generate")
        spec = replace(self.engine.spec, keep_logprobs=self.says)
        answers = self.engine.with_spec(spec).generate(self.held["policy"], prompts, seed=seed)
        return replace(answers, sampler_entropy=None, kept=None)


class Own(CopyEngine):
    """Says its log-probabilities.

    Args:
        seconds: it takes longer by.
    """

    def __init__(self, spec, tokenizer, seconds=0.0, **options):
        super().__init__(spec, tokenizer, says=True, **options)
        self.seconds = seconds

    def generate(self, policy, prompts, *, seed):
        time.sleep(self.seconds)
        return super().generate(policy, prompts, seed=seed)


class Lagging(Own):
    """Without any thread: answers by the weights that it was given one time before the last."""

    def take_weights(self, policy):
        super().take_weights(policy)
        given = self.held["policy"]
        self.held |= {"policy": self.held.get("given", given), "given": given}
