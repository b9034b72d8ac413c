"""Sampling: prompts to answers, and the loader that turns rollouts into minibatches."""
