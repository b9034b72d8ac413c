from rlhf_lightning.tasks.characters import character_tokenizer


def test_a_token_per_character_and_nothing_in_front():
    tokenizer = character_tokenizer("ab\n b")  # a character twice is one
    assert len(tokenizer) == 3 + 4
    text = "ba\nb  a"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer(text[:3]).input_ids == ids[:3]
    assert tokenizer("c").input_ids == [tokenizer.unk_token_id]
