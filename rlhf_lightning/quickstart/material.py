"""What the quickstart trains on, drawn from the micro-language: a corpus, demonstrations, prompts and a tokenizer."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from tokenizers.trainers import WordLevelTrainer
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.seeding import counter_seed
from rlhf_lightning.pipelines.files import write_folder, write_jsonl
from rlhf_lightning.quickstart.language import sample_review, split_review

SPECIAL_TOKENS = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}


@dataclass(frozen=True)
class MakeReviews:
    """Writes corpus.jsonl, sft.jsonl, prompts.jsonl (each with a *_val.jsonl) and a tokenizer into one folder.

    The corpus is what a base model reads: reviews as they lie about, some of them scrambled. The demonstrations are
    clean reviews cut into prompt and completion. Both praise and blame in equal parts. No prompt of the training sets
    is in a validation set.
    """

    out_dir: str
    """Folder to write."""
    num_reviews: int = 12000
    """Reviews in the corpus."""
    num_demonstrations: int = 3000
    """Prompt-completion records."""
    num_prompts: int = 1500
    """Different prompts to sample from while training on rewards."""
    num_val: int = 256
    """Records of each validation set."""
    scrambled_frac: float = 0.3
    """Share of the corpus that has words shuffled, doubled or lost."""
    seed: int = 0
    """Names all draws."""

    def run(self) -> dict[str, float]:
        if not 0 <= self.scrambled_frac <= 1:
            raise UserError(f"scrambled_frac={self.scrambled_frac}: use a share of the corpus, 0 to 1")
        held_out, known = self._prompts()
        corpus = list(self._corpus("corpus", self.num_reviews))
        sets = {
            "corpus": corpus,
            "corpus_val": list(self._corpus("corpus_val", self.num_val)),
            "sft": list(self._demonstrations("sft", self.num_demonstrations, known)),
            "sft_val": list(self._demonstrations("sft_val", self.num_val, held_out)),
            "prompts": [{"prompt": prompt} for prompt in known],
            "prompts_val": [{"prompt": prompt} for prompt in held_out],
        }
        tokenizer = train_tokenizer(record["text"] for record in corpus)
        folder = Path(self.out_dir)
        for name, records in sets.items():
            write_jsonl(folder / f"{name}.jsonl", records)
        write_folder(folder / "tokenizer", tokenizer.save_pretrained)
        return {
            **{f"num_{name}": float(len(records)) for name, records in sets.items()},
            "vocab": float(len(tokenizer)),
        }

    def _rng(self, *purpose: str) -> random.Random:
        return random.Random(counter_seed(self.seed, "reviews", *purpose))

    def _prompts(self) -> tuple[list[str], list[str]]:
        """Held-out prompts and the others, all different."""
        rng = self._rng("prompts")
        wanted = self.num_val + self.num_prompts
        found: dict[str, None] = {}
        for _ in range(20 * wanted):
            found[split_review(sample_review(rng), rng)[0]] = None
            if len(found) == wanted:
                break
        else:
            raise UserError(
                f"num_prompts={self.num_prompts} and num_val={self.num_val}: the language has few more than "
                f"{len(found)} prompts; use less"
            )
        prompts = list(found)
        rng.shuffle(prompts)  # frequent prompts are found first
        return prompts[: self.num_val], prompts[self.num_val :]

    def _demonstrations(self, purpose: str, count: int, prompts: list[str]) -> Iterable[dict[str, str]]:
        rng, allowed = self._rng(purpose), set(prompts)
        while count:
            prompt, completion = split_review(sample_review(rng), rng)
            if prompt in allowed:
                count -= 1
                yield {"prompt": prompt, "completion": completion}

    def _corpus(self, purpose: str, count: int) -> Iterable[dict[str, str]]:
        rng = self._rng(purpose)
        for _ in range(count):
            review = sample_review(rng)
            yield {"text": scramble(review, rng) if rng.random() < self.scrambled_frac else review}


def scramble(review: str, rng: random.Random) -> str:
    """A review as a careless copyist leaves it: three neighbours in the wrong order, a word doubled, or two lost."""
    words = review.split(" ")
    at = rng.randrange(len(words) - 2)
    damage = rng.choice(("shuffled", "doubled", "lost"))
    if damage == "shuffled":
        words[at : at + 3] = [words[at + 2], words[at], words[at + 1]]
    elif damage == "doubled":
        words.insert(at, words[at])
    else:
        del words[at : at + 2]
    return " ".join(words)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words of `texts`, each with the space before it, and marks of punctuation.

    Decoding gives the text back, and the ids of a text's beginning are the beginning of the text's ids.
    """
    tokenizer = Tokenizer(WordLevel(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[^A-Za-z]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.train_from_iterator(
        texts, WordLevelTrainer(special_tokens=list(SPECIAL_TOKENS.values()), show_progress=False)
    )
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=128, **SPECIAL_TOKENS
    )
