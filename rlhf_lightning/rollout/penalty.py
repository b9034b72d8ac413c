"""Tokens that stand in the prompt or the answer already are made less likely: the repetition penalty."""

import torch
from torch import Tensor
from transformers import LogitsProcessor


def penalise_repetition(scores: Tensor, tokens: Tensor, real: Tensor, penalty: float) -> Tensor:
    """Logits that are penalised for what has been said, as transformers and vLLM do it.

        z_v <- z_v / penalty if z_v > 0, else z_v penalty        for every v of the prompt and the answer so far

    Padding is not said: transformers' own processor penalises the padding token in the rows of a batch that have some.

    Args:
        scores: logits of the next token [rows, vocab].
        tokens: prompts and answers so far [rows, time].
        real: True on tokens that are no padding [rows, time].
    References:
        Keskar et al., CTRL, 2019, section 4.1. arXiv:1909.05858
    """
    # a row's own first token in the place of padding: it is penalised once, however often it is written
    first = tokens.gather(1, real.int().argmax(-1, keepdim=True))
    tokens = torch.where(real, tokens, first)
    said = scores.gather(1, tokens)
    return scores.scatter(1, tokens, torch.where(said < 0, said * penalty, said / penalty))


class RepetitionPenalty(LogitsProcessor):
    """The same for transformers' `generate`.

    Args:
        penalty: above 1 makes repeating less likely.
        attention_mask: real tokens of the left-padded prompts [rows, time].
    """

    def __init__(self, penalty: float, attention_mask: Tensor) -> None:
        self.penalty = penalty
        self.attention_mask = attention_mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = input_ids.shape[1] - self.attention_mask.shape[1]
        real = torch.nn.functional.pad(self.attention_mask, (0, drawn), value=True)
        return penalise_repetition(scores.float(), input_ids, real, self.penalty)
