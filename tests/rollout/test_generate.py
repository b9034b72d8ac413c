"""Masks of generated answers, and sampling that is named by its seed."""

import torch

from rlhf_lightning.rollout.generate import assemble


def test_an_answer_counts_up_to_and_with_its_end_token_even_if_pad_is_eos():
    eos = pad = 2
    tokens = torch.tensor([[pad, 7, 5, eos, eos], [7, 8, 5, 6, 9]])
    prompt_mask = torch.tensor([[False, True], [True, True]])
    answers = assemble(tokens, prompt_mask, torch.tensor([4, -1]), pad_id=pad)
    assert answers.mask.tolist() == [[False, False, True, True, False], [False, False, True, True, True]]
    assert answers.finished.tolist() == [True, False]
    assert answers.positions.tolist() == [[0, 0, 1, 2, 2], [0, 1, 2, 3, 4]]


def test_what_follows_a_finished_answer_is_padding():
    tokens = torch.tensor([[1, 5, 2, 9, 9]])
    answers = assemble(tokens, torch.ones(1, 1, dtype=torch.bool), torch.tensor([3]), pad_id=0)
    assert answers.tokens.tolist() == [[1, 5, 2, 0, 0]]
    assert answers.attention_mask.tolist() == [[True, True, True, False, False]]
