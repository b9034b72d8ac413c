"""The frozen model that a student learns from: it has to number tokens as the student does."""

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.models.tokenizer import load_tokenizer, say_once


def named_teacher(spec: ModelSpec | None, learner: str) -> ModelSpec:
    """The teacher's spec.

    Args:
        learner: what learns from it, in words.
    Raises:
        UserError: it names no model.
    """
    if spec is None or (spec.path is None and spec.config is None):
        raise UserError(
            f"{learner} learns from a teacher, and none is named: set teacher: {{path: ...}}, a folder or hub id"
        )
    return spec


def load_teacher(
    spec: ModelSpec, student: Policy, tokenizer: PreTrainedTokenizerBase, *, reads_answers: bool = False
) -> Reference:
    """The teacher, frozen. It may be of any size and family, and in few bits.

    Output heads may have different numbers of rows, as where one family pads its vocabulary to 151936 and 152064: what
    lies behind the tokens of the tokenizer has no text. Divergences are then over the rows that both have.

    Args:
        tokenizer: the student's, which both read by.
        reads_answers: whether the teacher reads what the student samples, and not texts alone.
    Raises:
        UserError: the teacher's tokenizer gives some token another number, or a head has no row for some token, or the
            student might say what the teacher cannot read.
    """
    _check_tokens(spec, tokenizer)
    teacher = load_policy(spec)
    ours, theirs = student.head().weight.shape[0], teacher.head().weight.shape[0]
    needed = max(tokenizer.get_vocab().values()) + 1
    if min(ours, theirs) < needed:
        who, rows = ("student", ours) if ours < theirs else (f"teacher {name_of(spec)}", theirs)
        raise UserError(
            f"the tokenizer has {needed} tokens, and the output head of the {who} only {rows} rows: a divergence needs "
            "one for each; use models that were made with this tokenizer"
        )
    if reads_answers and ours > theirs:
        raise UserError(
            f"the student's output head has {ours} rows and the teacher {name_of(spec)} knows {theirs} tokens: an "
            "answer might hold one that the teacher cannot read. Use a teacher with as many rows, or learn from "
            "records (SFTModule)"
        )
    if ours != theirs:
        say_once(
            f"the student's output head has {ours} rows and the teacher's {theirs}, of which the tokenizer uses "
            f"{needed}: divergences are over the first {min(ours, theirs)}"
        )
    return Reference(teacher)


def _check_tokens(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    ours, theirs = tokenizer.get_vocab(), load_tokenizer(spec).get_vocab()
    if ours == theirs:
        return
    token = min((ours.keys() | theirs.keys()), key=lambda t: (ours.get(t) == theirs.get(t), ours.get(t, len(ours)), t))
    mine, other = (f"token {vocab[token]}" if token in vocab else "no token" for vocab in (ours, theirs))
    raise UserError(
        f"the teacher {name_of(spec)} numbers tokens otherwise than the student: {token!r} is {mine} of the student's "
        f"tokenizer and {other} of the teacher's, so their distributions are over different things. Use a teacher of "
        "the student's family, or train on its answers instead (a chain with SampleCompletions, then NLL)"
    )


def name_of(spec: ModelSpec) -> str:
    return repr(spec.path or spec.config)


def inert_teacher_options(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """Options of a teacher that do nothing, and why."""
    frozen = "nothing of the teacher is trained"
    for name, why in (
        ("lora", frozen),
        ("gradient_checkpointing", frozen),
        ("activation_offload", frozen),
        ("chat_template", "records are written by the student's"),
        ("chat_template_kwargs", "records are written by the student's"),
    ):
        if getattr(spec, name):
            yield name, why
