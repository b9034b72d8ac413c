"""A micro-language of short English reviews of films and products: its rules, and what its texts are worth.

A review is an opening, perhaps a detail, and a verdict, all about one kind of thing: a film has a plot and a cast, a
product has a battery and a handle. Sentiment is composed by the grammar: "not very good" is milder than "awful".
"""

import random
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from rlhf_lightning.quickstart.grammar import Grammar

# A rule that holds {T} is written once for Film and once for Product. Words stand as they do inside a sentence: only I
# and the names of days and places are capitalised. The notation is that of `Grammar`.
_RULES = """
{T}Review   -> 2 {T}Opening "." {T}Verdict "." | 3 {T}Opening "." {T}Detail "." {T}Verdict "."

{T}Opening  -> 4 {T}Thing Look Judgement | 2 {T}Thing {T}Deed | 2 {T}Fact | Person Liked {T}Thing |
               Person "did not" Like {T}Thing :flip | 2 {T}Thing Look Judgement Link {T}Point :mean
{T}Detail   -> 5 {T}Point | {T}Circumstance | 2 {T}Point Link {T}Point :mean |
               2 "the" {T}Part "and the" {T}Part "were" Judgement
{T}Verdict  -> 2 "in the end I" Liked "it" | 2 "in the end it was" Judgement | "I did not" Like "it at all" :flip |
               2 "I would call it a" Adjective {T}Kind | 3 {T}Advice

{T}Thing    -> 2 "the" {T}Noun | 2 "this" {T}Noun | "the new" {T}Noun
{T}Point    -> 3 "the" {T}Part Look Judgement | 2 "the" {T}Part {T}Deed
{T}Deed     -> {T}Praise :praise | {T}Blame :blame
Person      -> "my" Relative | "our" Relative
Link        -> ", and" | ", while"

Judgement   -> 5 Adjective | 3 Degree Mild :boost | 2 Hedge Mild :soften | 2 Extreme Strong | 2 "not" Adjective :flip |
               "not" Degree Mild :flip | 2 Adjective "and" Adjective :mean | Plain
Adjective   -> 3 Mild | 2 Strong
Mild        -> GoodMild | BadMild
Strong      -> GoodStrong | BadStrong
Hedge       -> "rather" | "a little" | "somewhat"
Degree      -> "very" | "really" | "quite"
Extreme     -> "simply" | "truly" | "absolutely"

FilmFact      -> "we watched" FilmThing "on" Day | Person "took me to" FilmThing | "I saw" FilmThing "with" Person
ProductFact   -> "I bought" ProductThing "for" Person | Person "gave me" ProductThing |
                 "we ordered" ProductThing "on" Day
FilmCircumstance    -> "it lasted about" Number "hours" | "we sat in the" Row "row" | "it is set in" Place
ProductCircumstance -> "it arrived in" Number "days" | "it came in a" Size "box" | "we keep it in the" Room

FilmPraise    -> "kept me guessing" | "made" Someone "laugh" | "moved" Someone "to tears" | "deserved every prize"
FilmBlame     -> "put" Someone "to sleep" | "made" Someone "yawn" | "made no sense" | "wasted my evening"
ProductPraise -> "worked from the first day" | "saved" Someone "a lot of time" | "did the job" |
                 "lasted for" Number Period
ProductBlame  -> "broke after" Number Period | "let" Someone "down" | "stopped working" | "fell apart"

FilmAdvice    -> "I would watch it again" :praise | "do not miss it" :praise | "five stars from me" :praise |
                 "I would rather read a book" :blame | "I left before the end" :blame | "one star from me" :blame
ProductAdvice -> "I would buy it again" :praise | "I use it every day" :praise | "five stars from me" :praise |
                 "I sent it back" :blame | "I want my money back" :blame | "one star from me" :blame

FilmNoun    -> film=0 | movie=0 | comedy=0 | thriller=0 | drama=0 | western=0
FilmPart    -> plot=0 | cast=0 | music=0 | dialogue=0 | ending=0 | humour=0
FilmKind    -> film=0 | movie=0
ProductNoun -> camera=0 | phone=0 | laptop=0 | kettle=0 | keyboard=0 | headset=0 | lamp=0 | watch=0
ProductPart -> battery=0 | screen=0 | handle=0 | cable=0 | motor=0 | switch=0 | design=0
ProductKind -> thing=0 | product=0
Look        -> was=0 | felt=0 | seemed=0 | looked=0
Liked       -> loved=0.9 | enjoyed=0.6 | liked=0.5 | hated=-0.9 | disliked=-0.6 | regretted=-0.7
Like        -> love=0.9 | enjoy=0.6 | like=0.5 | hate=-0.9 | dislike=-0.6 | regret=-0.7
GoodMild    -> good=0.5 | nice=0.5 | pleasant=0.5 | clever=0.5 | charming=0.6 | solid=0.4 | decent=0.3
BadMild     -> bad=-0.5 | dull=-0.5 | weak=-0.5 | clumsy=-0.5 | tiresome=-0.6 | cheap=-0.4 | noisy=-0.4
GoodStrong  -> brilliant=0.9 | wonderful=0.9 | superb=0.9 | fantastic=0.9 | perfect=1 | splendid=0.8
BadStrong   -> terrible=-0.9 | horrible=-0.9 | dreadful=-0.9 | hopeless=-0.9 | pathetic=-1 | miserable=-0.8
Plain       -> long=0 | short=0 | plain=0 | quiet=0 | modern=0
Relative    -> mother=0 | father=0 | sister=0 | brother=0 | neighbour=0 | boss=0
Someone     -> me=0 | us=0 | everyone=0
Day         -> Monday=0 | Tuesday=0 | Friday=0 | Saturday=0 | Sunday=0
Number      -> two=0 | three=0 | four=0 | five=0 | six=0
Period      -> days=0 | weeks=0 | months=0 | years=0
Row         -> front=0 | middle=0 | back=0
Place       -> London=0 | Paris=0 | Texas=0 | space=0
Size        -> small=0 | large=0 | heavy=0
Room        -> kitchen=0 | office=0 | bedroom=0 | garage=0
"""


def _grammar() -> Grammar:
    lines = re.sub(r"\|\s*\n\s*", "| ", _RULES).splitlines()
    topics = {line: TOPICS if "{T}" in line else TOPICS[:1] for line in lines}
    return Grammar.from_text("\n".join(line.replace("{T}", topic) for line in lines for topic in topics[line]))


TOPICS = ("Film", "Product")
GRAMMAR = _grammar()
REVIEW_LENGTH = (8, 30)
"""Fewest and most words of a review that is drawn (punctuation not counted)."""

_TOKEN = re.compile(r"[A-Za-z]+|[^\sA-Za-z]")
_NEGATORS = frozenset({"not", "no"})
_WORD_VALUES = {word: value for lexicon in GRAMMAR.lexicons.values() for word, value in lexicon.items() if value}


def sample_review(rng: random.Random) -> str:
    """Draw a grammatical review that says nothing twice: all praise or all blame (2 in 5 each), or as it comes."""
    mood = rng.choices((1, -1, 0), (2, 2, 1))[0]
    shapes = GRAMMAR.productions[f"{rng.choice(TOPICS)}Review"]
    shape = rng.choices(shapes, [shape.weight for shape in shapes])[0]
    while True:
        words = [word for part in shape.parts for word in _sample_in_mood(part, mood, rng)]
        num_words = sum(word.isalpha() for word in words)
        if REVIEW_LENGTH[0] <= num_words <= REVIEW_LENGTH[1] and _repetition(words) == 0:
            return _write(words)


def split_review(review: str, rng: random.Random) -> tuple[str, str]:
    """Cut a review into a prompt of 2 to 5 words that does not judge yet, and the rest; joined they are the review."""
    words = _TOKEN.findall(review)
    neutral = [n for n in range(2, 6) if _is_neutral(words[:n])]
    prompt = " ".join(words[: rng.choice(neutral)])
    return prompt, review[len(prompt) :]


@lru_cache(maxsize=65536)
def is_grammatical(text: str) -> bool:
    """Whether the whole text is one review of the language, capitals and spacing included."""
    words = _read(text)
    return words is not None and any(GRAMMAR.parse(f"{topic}Review", words) is not None for topic in TOPICS)


@lru_cache(maxsize=65536)
def sentiment(text: str) -> float:
    """From -1 (all blame) to 1 (all praise): the mean over the text's sentences.

    A sentence means what the grammar composes it to. One that the grammar cannot read means the average of its
    loaded words, each turned round by a "not" or "no" among the three words before it.
    """
    sentences = _sentences(text)
    return sum(map(_sentence_value, sentences)) / len(sentences) if sentences else 0.0


@lru_cache(maxsize=65536)
def repetition(text: str) -> float:
    """Share of the text's word pairs that have stood there before: 0 where nothing is said twice."""
    return _repetition(_TOKEN.findall(text.lower()))


def ungrammaticality(text: str) -> float:
    """0 for a review of the language; else from 0.5 (every sentence is right, the whole is not) to 1 (none is)."""
    if is_grammatical(text):
        return 0.0
    sentences = _sentences(text)
    broken = sum(_parse_sentence(words) is None for words in sentences)
    return 0.5 + 0.5 * (broken / len(sentences) if sentences else 1.0)


def gold_score(text: str, *, repetition_coef: float = 1.5, ungrammaticality_coef: float = 1.0) -> float:
    """What the quickstart calls a good review.

    gold = sentiment - 1.5 repetition - ungrammaticality
    """
    return sentiment(text) - repetition_coef * repetition(text) - ungrammaticality_coef * ungrammaticality(text)


def _sample_in_mood(symbol: str, mood: int, rng: random.Random) -> list[str]:
    while True:
        words, value = GRAMMAR.sample(symbol, rng)
        if mood * value >= 0:
            return words


def _is_neutral(words: Sequence[str]) -> bool:
    text = " ".join(words)
    return text.replace(" ", "").isalpha() and not _NEGATORS & set(words) and sentiment(text) == 0


def _write(words: Sequence[str]) -> str:
    text, starts_sentence = "", True
    for word in words:
        shown = _capitalised(word) if starts_sentence else word
        text += shown if not text or not word.isalpha() else " " + shown
        starts_sentence = word == "."
    return text


def _read(text: str) -> list[str] | None:
    """The words of a text as the grammar writes them, or None where spacing or capitals are wrong."""
    words = [word for sentence in _sentences(text) for word in (*sentence, ".")]
    return words if text and _write(words) == text else None


def _sentences(text: str) -> list[list[str]]:
    """The words of each sentence, the capital of its first word taken back unless the word always has one."""
    sentences: list[list[str]] = [[]]
    for token in _TOKEN.findall(text):
        if token == ".":
            sentences.append([])
        elif not sentences[-1] and token not in GRAMMAR.words and token[0].isupper():
            sentences[-1].append(token[0].lower() + token[1:])
        else:
            sentences[-1].append(token)
    return [sentence for sentence in sentences if sentence]


def _capitalised(word: str) -> str:
    return word[0].upper() + word[1:]


def _parse_sentence(words: Sequence[str]) -> float | None:
    readings = (GRAMMAR.parse(topic + part, words) for topic in TOPICS for part in ("Opening", "Detail", "Verdict"))
    return next((value for value in readings if value is not None), None)


def _sentence_value(words: Sequence[str]) -> float:
    composed = _parse_sentence(words)
    if composed is not None:
        return composed
    loaded = [
        -_WORD_VALUES[word] if _NEGATORS & set(words[max(0, i - 3) : i]) else _WORD_VALUES[word]
        for i, word in enumerate(words)
        if word in _WORD_VALUES
    ]
    return sum(loaded) / len(loaded) if loaded else 0.0


def _repetition(words: Sequence[str]) -> float:
    """Share of pairs of neighbours that have stood before; pairs across punctuation are not counted."""
    pairs = [pair for pair in pairwise(words) if pair[0].isalpha() and pair[1].isalpha()]
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0
