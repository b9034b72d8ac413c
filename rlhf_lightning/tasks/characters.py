"""A tokenizer of single characters: what a model from scratch reads where texts are numbers and letters."""

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """A token per character of `alphabet`, beside padding, end and unknown; nothing is put in front of a text.

    Decoding gives the text back, and the ids of a text's beginning are the beginning of the text's ids.
    """
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS.values(), *dict.fromkeys(alphabet)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=1024, **SPECIAL_TOKENS
    )
