"""Files to batches, for every record kind, standard and conversational; and what becomes of records that do not fit."""

import json
import logging
import math

import pytest
import torch

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.data.readers import Source
from rlhf_lightning.data.splits import as_sources, record_share

USER = {"role": "user", "content": "What?"}


def says(text):
    return [{"role": "assistant", "content": text}]


def batches(path, batch_format, tokenizer, **options):
    options = {"shuffle": False, "batch_size": 4, **options}
    return list(RLHFDataModule(path, **options).setup_for(batch_format, tokenizer).train_dataloader())


def trained(tokenizer, batch):
    return [tokenizer.decode(row[mask]) for row, mask in zip(batch.tokens, batch.mask, strict=True)]


KINDS = {
    "text": ("tokens", {"text": "Paris."}),
    "messages": ("tokens", {"messages": [USER, *says("Paris.")]}),
    "completion": ("tokens", {"prompt": "What?", "completion": " Paris."}),
    "completion-chat": ("tokens", {"prompt": [USER], "completion": says("Paris.")}),
    "pairs": ("pairs", {"prompt": "What?", "chosen": " Paris.", "rejected": " Two."}),
    "pairs-chat": ("pairs", {"prompt": [USER], "chosen": says("Paris."), "rejected": says("Two."), "margin": 2}),
    "pairs-implicit": ("pairs", {"chosen": "What? Paris.", "rejected": "What? Two."}),
    "pairs-implicit-chat": ("pairs", {"chosen": [USER, *says("Paris.")], "rejected": [USER, *says("Two.")]}),
    "pairs-whole-chat": (
        "pairs",
        {"prompt": "x", "chosen": [USER, *says("Paris.")], "rejected": [USER, *says("Two.")]},
    ),
    "triples": ("triples", {"prompt": "What?", "chosen": " Paris.", "rejected": " Two.", "gold": " Paris, of course."}),
    "triples-implicit": (
        "triples",
        {"chosen": "What? Paris.", "rejected": "What? Two.", "gold": "What? Paris, of course."},
    ),
    "triples-implicit-chat": (
        "triples",
        {
            "chosen": [USER, *says("Paris.")],
            "rejected": [USER, *says("Two.")],
            "gold": [USER, *says("Paris, of course.")],
        },
    ),
    "ranked": ("ranked", {"prompt": "What?", "completions": [" Two.", " Paris."], "ranks": [2, 1]}),
    "ranked-chat": ("ranked", {"prompt": [USER], "completions": [says("Two."), says("Paris.")], "ranks": [2, 1]}),
    "rated": ("rated", {"prompt": "What?", "completion": " Paris.", "rating": 4.5}),
    "unpaired": ("unpaired", {"prompt": [USER], "completion": says("Paris."), "label": True}),
    "steps": ("steps", {"prompt": "What?", "completions": ["One.", "Two."], "labels": [True, False]}),
    "prompts": ("prompts", {"prompt": "What?", "answer": "Paris."}),
    "prompts-chat": ("prompts", {"messages": [USER, *says("Paris.")], "answer": "Paris."}),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_record_kind(make_tokenizer, write, name):
    batch_format, record = KINDS[name]
    tokenizer = make_tokenizer("chatml" if "messages" in record or "chat" in name or name == "unpaired" else None)
    (batch,) = batches(write([record]), batch_format, tokenizer)
    chat = tokenizer.chat_template is not None
    good, bad = ("Paris.<|im_end|>", "Two.<|im_end|>") if chat else (" Paris.</s>", " Two.</s>")
    if batch_format == "tokens":
        assert trained(tokenizer, batch) == ["Paris.</s>" if name == "text" else good]
    elif batch_format in ("pairs", "triples"):
        assert trained(tokenizer, batch.chosen) == [good]
        assert trained(tokenizer, batch.rejected) == [bad]
        assert (batch.margins is None) == ("margin" not in record)
        gold = [] if batch.gold is None else trained(tokenizer, batch.gold)
        assert gold == ([good.replace("Paris", "Paris, of course")] if batch_format == "triples" else [])
    elif batch_format == "ranked":
        assert trained(tokenizer, batch.completions) == [bad, good]
        assert (batch.ranks.tolist(), batch.groups.tolist()) == ([2, 1], [0, 0])
    elif batch_format == "steps":
        ends = batch.completions.mask[0].nonzero()[:, 0].tolist()
        texts = [tokenizer.decode(batch.completions.tokens[0, : end + 1]) for end in ends]
        assert texts == ["<s>What?One.\n", "<s>What?One.\nTwo.\n"]
        assert batch.step_labels[0, ends].tolist() == [1.0, 0.0]
    elif batch_format == "prompts":
        assert batch.texts == ["<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n" if chat else "What?"]
        assert tokenizer.decode(batch.tokens[0]).endswith(batch.texts[0])
        assert (batch.records[0]["answer"], batch.indices.tolist()) == ("Paris.", [0])
    else:
        assert trained(tokenizer, batch.completions) == [good]
        values = batch.ratings if batch_format == "rated" else batch.labels
        assert values.tolist() == ([4.5] if batch_format == "rated" else [True])


def test_train_on(make_tokenizer, write):
    tokenizer = make_tokenizer("chatml")
    path = write([{"messages": [USER, *says("Paris."), USER, *says("Two.")]}])
    texts = {
        choice: trained(tokenizer, batches(path, "tokens", tokenizer, train_on=choice)[0])[0]
        for choice in ("answers", "last_answer", "all")
    }
    assert texts["answers"] == "Paris.<|im_end|>Two.<|im_end|>"
    assert texts["last_answer"] == "Two.<|im_end|>"
    assert texts["all"].startswith("user\nWhat?<|im_end|>\n<|im_start|>assistant\nParis.")


def test_padding_side_changes_no_positions_and_no_masks(tokenizer, write):
    path = write([{"prompt": "a" * n, "completion": "b" * n} for n in (1, 5, 9)])
    (right,), (left,) = (batches(path, "tokens", tokenizer, padding_side=side) for side in ("right", "left"))
    for name in ("tokens", "positions", "mask"):
        assert torch.equal(getattr(right, name)[right.attention_mask], getattr(left, name)[left.attention_mask])
    assert not torch.equal(right.attention_mask, left.attention_mask)


def test_packing_holds_every_record_once_with_its_own_positions(tokenizer, write):
    path = write([{"prompt": "a" * n, "completion": "b" * n} for n in range(1, 9)])
    records = {}
    for batch in batches(path, "tokens", tokenizer, batch_size=1):
        records[tuple(batch.tokens[0].tolist())] = batch
    packed = batches(path, "tokens", tokenizer, packing=True, max_length=24, batch_size=2, shuffle=True)
    assert sum(batch.num_sequences for batch in packed) == 8
    for batch in packed:
        assert batch.tokens.shape[1] <= 24
        for row in range(len(batch.tokens)):
            for segment in range(1, int(batch.segments[row].max()) + 1):
                at = batch.segments[row] == segment
                alone = records.pop(tuple(batch.tokens[row][at].tolist()))
                assert torch.equal(batch.positions[row][at], alone.positions[0])
                assert torch.equal(batch.mask[row][at], alone.mask[0])
    assert not records


def test_token_budget_bounds_the_padded_batch(tokenizer, write):
    path = write([{"prompt": "a" * n, "chosen": "b" * n, "rejected": "c"} for n in range(1, 20)])
    found = batches(path, "pairs", tokenizer, tokens_per_batch=100, batch_size=8, shuffle=True)
    assert sum(len(batch.chosen.tokens) for batch in found) == 19
    assert max(batch.chosen.tokens.numel() + batch.rejected.tokens.numel() for batch in found) <= 100
    with pytest.raises(UserError, match="tokens_per_batch=10 cannot hold the largest record of train"):
        batches(path, "pairs", tokenizer, tokens_per_batch=10)


def test_overlong_records_are_cut_left_out_or_refused_and_always_counted(tokenizer, write, caplog):
    path = write(
        [{"prompt": "p" * 20, "chosen": "yes", "rejected": "no"}, {"prompt": "p", "chosen": "y", "rejected": "n"}]
    )
    for overlong, kept, line in (
        ("truncate", 2, "train: 1 truncated (train.jsonl, line 1)"),
        ("drop", 1, "train: 1 left out: record longer than max_length=10 (train.jsonl, line 1)"),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            dm = RLHFDataModule(path, max_length=10, overlong=overlong).setup_for("pairs", tokenizer)
        assert dm.report().kept == kept
        assert line in caplog.messages
    with pytest.raises(UserError, match=r"train.jsonl, line 1: the record has \d+ tokens, max_length is 10; raise it"):
        batches(path, "pairs", tokenizer, max_length=10, overlong="error")
    (batch,) = batches(path, "pairs", tokenizer, max_length=10)
    assert trained(tokenizer, batch.chosen) == ["yes</s>", "y</s>"], "the prompt is cut first"
    shared = [
        rows.tokens[0][rows.attention_mask[0] & ~rows.mask[0]].tolist() for rows in (batch.chosen, batch.rejected)
    ]
    assert shared[0] == shared[1], "both answers keep the same prompt"


def test_a_prompt_longer_than_the_context(tokenizer, write):
    path = write([{"prompt": "abcdefgh" * 4}])
    with pytest.raises(UserError, match=r"line 1: the prompt has \d+ tokens, max_prompt_length is 8; raise it, or set"):
        batches(path, "prompts", tokenizer, max_prompt_length=8, overlong="error")
    (batch,) = batches(path, "prompts", tokenizer, max_prompt_length=8)
    assert batch.tokens.shape == (1, 8)
    assert batch.tokens[0, 0] == tokenizer.bos_token_id
    assert batch.texts[0].endswith("fgh")


def test_texts_can_be_split_into_pieces(tokenizer, write):
    path = write([{"text": "abcdefgh" * 8}])
    whole, pieces = (batches(path, "tokens", tokenizer, **o)[0] for o in ({}, {"max_length": 16, "overlong": "split"}))
    assert pieces.tokens[pieces.attention_mask].tolist() == whole.tokens[0].tolist()
    with pytest.raises(UserError, match="overlong: split cuts texts into pieces; this stage reads pairs"):
        batches(path, "pairs", tokenizer, overlong="split")


def test_an_answer_that_is_cut_away_is_left_out_not_trained_on_nothing(tokenizer, write):
    path = write([{"prompt": "p" * 30, "completion": "c"}, {"prompt": "p", "completion": "c"}])
    dm = RLHFDataModule(path, max_length=8, cut_first="completion").setup_for("tokens", tokenizer)
    assert dm.report().left_out == {"no trained token left": 1}


def test_chosen_equal_to_rejected_is_counted_and_all_of_them_is_an_error(tokenizer, write):
    same, fine = {"prompt": "p", "chosen": "a", "rejected": "a"}, {"prompt": "p", "chosen": "a", "rejected": "b"}
    dm = RLHFDataModule(write([same, fine])).setup_for("pairs", tokenizer)
    assert (dm.report().kept, dm.report().left_out) == (1, {"chosen equals rejected": 1})
    with pytest.raises(
        UserError, match=r"none of its 2 records can be used: 2 chosen equals rejected \(first: .*line 1"
    ):
        batches(write([same, {**same, "prompt": "q"}]), "pairs", tokenizer)


BAD = [
    ("tokens", ['{"text": "a"}\n', '{"text: "b"}\n'], "train.jsonl, line 2: broken JSON"),
    ("tokens", [{"question": "a"}], "missing column prompt completion|missing column"),
    (
        "tokens",
        [{"text": "a"}, {"txt": "b"}],
        r"line 2: missing column text \(did you mean txt\?\); this record has txt",
    ),
    ("tokens", [], r"is empty \(0 bytes\)"),
    ("tokens", [{"prompt": "a", "completion": ""}], "train.jsonl, line 1: completion is empty"),
    ("tokens", [{"messages": [USER]}], "line 1: there is no assistant's message to train on"),
    (
        "rated",
        ['{"prompt": "a", "completion": "b", "rating": NaN}\n'],
        "line 1: rating is nan, a finite number is needed",
    ),
    ("ranked", [{"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2, 3]}], "2 completions but 3 ranks"),
    (
        "ranked",
        [{"prompt": "a", "completions": ["b", "c"], "ranks": [1, 1]}],
        "none of its 1 records.*all ranks are equal",
    ),
    ("steps", [{"prompt": "a", "completions": ["b"], "labels": [None]}], "none of its 1 records.*no step is labelled"),
    ("pairs", [{"chosen": [USER], "rejected": [USER, *says("a")]}], "there is no assistant's message to train on"),
    ("triples", [{"chosen": "a b", "rejected": "a c"}], "missing column gold: this stage reads triples"),
    ("triples", [{"chosen": "a b", "rejected": "a c", "gold": "d e"}], "line 1: gold does not go on from the prompt"),
    ("triples", [{"chosen": "a b", "rejected": "a c", "gold": "a "}], "line 1: gold does not go on from the prompt"),
]


@pytest.mark.parametrize(("batch_format", "records", "message"), BAD, ids=range(len(BAD)))
def test_bad_records_are_errors_that_name_their_place(make_tokenizer, write, batch_format, records, message):
    with pytest.raises(UserError, match=message):
        batches(write(records), batch_format, make_tokenizer("chatml"))


def test_bad_records_can_be_skipped_and_are_counted(tokenizer, write):
    path = write([{"text": "a"}, '{"text"\n', {"text": ""}])
    report = RLHFDataModule(path, on_bad_record="skip").setup_for("tokens", tokenizer).report()
    assert (report.read, report.kept, report.left_out) == (3, 1, {"bad record": 2})
    assert "line 2: broken JSON" in report.examples["bad record"][0]


def test_what_a_datamodule_needs_is_told(tokenizer, write, tmp_path):
    with pytest.raises(UserError, match=r"data.train is not set"):
        RLHFDataModule().setup_for("tokens", tokenizer)
    with pytest.raises(UserError, match=r"no tokenizer: set data.tokenizer"):
        RLHFDataModule(write([{"text": "a"}])).setup_for("tokens")
    with pytest.raises(UserError, match="tokenizer: no such folder: /nowhere/at/all"):
        RLHFDataModule(write([{"text": "a"}])).setup_for("tokens", "/nowhere/at/all")
    with pytest.raises(UserError, match="no such file or folder"):
        RLHFDataModule(str(tmp_path / "none.jsonl")).setup_for("tokens", tokenizer)
    with pytest.raises(UserError, match=r"1 records fill no batch of 8 \(drop_last: true\)"):
        RLHFDataModule(write([{"text": "a"}]), drop_last=True).setup_for("tokens", tokenizer).train_dataloader()


def test_val_frac_is_by_hash_and_adding_records_moves_none(tokenizer, write):
    records = [{"text": f"text {i}"} for i in range(400)]
    first = RLHFDataModule(write(records), val_frac=0.2).setup_for("tokens", tokenizer)
    sizes = first.report("train").kept, first.report("val").kept
    assert sum(sizes) == 400
    # binomial: 80 +- 8
    assert abs(sizes[1] - 80) < 24
    held_out = {r["text"] for r in records if record_share(r) < 0.2}
    assert len(held_out) == sizes[1]
    texts = {tokenizer.decode(item.encoded.ids[1:-1]) for item in first.val_dataloader().items}
    assert texts == held_out
    with pytest.raises(UserError, match=r"val_frac=0.0001 holds out none of the records of .*: raise it, give val"):
        RLHFDataModule(write(records[:3]), val_frac=0.0001).setup_for("tokens", tokenizer)
    with pytest.raises(UserError, match=r"val_frac=0.9999 holds out all of the records of .*: lower it"):
        RLHFDataModule(write(records[:3]), val_frac=0.9999).setup_for("tokens", tokenizer)


def test_too_few_records_held_out_for_a_mismatch_say_by_what(tokenizer, write):
    records = [{"prompt": f"text {i}", "completion": "good", "label": i % 2 == 0} for i in range(6)]
    least, second = sorted(record_share(record) for record in records)[:2]
    share = (least + second) / 2  # holds out one record
    with pytest.raises(UserError, match=r"val \(val_frac=0\.\d+ of .*\): its 1 records share one prompt"):
        RLHFDataModule(write(records), val_frac=share).setup_for("mismatched", tokenizer)


def test_records_in_both_train_and_val_are_warned_of(tokenizer, write, caplog):
    train, val = write([{"text": "a"}, {"text": "b"}]), write([{"text": "b"}, {"text": "c"}], "val.jsonl")
    dm = RLHFDataModule(train, val=val).setup_for("tokens", tokenizer)
    assert "val: 1 of its records are in train too" in caplog.text
    assert dm.report("val").notes == {"also in train": 1}


def test_several_weighted_sources(tokenizer, write):
    sources = [
        Source(write([{"text": "a"}] * 2, "a.jsonl"), weight=2.0),
        Source(write([{"q": "What?", "a": " Two."}], "b.jsonl"), columns={"prompt": "q", "completion": "a"}),
    ]
    dm = RLHFDataModule(sources, batch_size=1, add_eos=False).setup_for("tokens", tokenizer)
    assert sorted(trained(tokenizer, batch)[0] for batch in dm.train_dataloader()) == [" Two.", "a", "a", "a", "a"]
    assert dm.report().notes == {"the same as an earlier record (kept)": 1}


def test_sources_in_every_form():
    assert as_sources("a") == as_sources({"path": "a"}) == as_sources(["a"]) == as_sources(Source("a")) == [Source("a")]
    with pytest.raises(UserError, match="the list of sources is empty"):
        as_sources([])


def test_pretraining_is_a_second_source_of_texts(tokenizer, write):
    dm = RLHFDataModule(
        write([{"prompt": "a"}]), pretraining=write([{"text": "b c"}] * 3, "p.jsonl"), pretraining_batch_size=2
    ).setup_for("prompts", tokenizer)
    (batch, _) = dm.pretraining_dataloader()
    assert trained(tokenizer, batch) == ["b c</s>"] * 2
    with pytest.raises(UserError, match=r"data.pretraining is not set"):
        RLHFDataModule(write([{"prompt": "a"}])).setup_for("prompts", tokenizer).pretraining_dataloader()


def test_control_tokens_in_records_are_reported_and_stay_text(tokenizer, write):
    path = write([{"text": "a</s>b"}])
    dm = RLHFDataModule(path).setup_for("tokens", tokenizer)
    assert dm.report().notes == {"with control tokens spelt out in the text (they stay text)": 1}
    (batch,) = dm.train_dataloader()
    assert (batch.tokens == tokenizer.eos_token_id).sum() == 1
    (batch,) = batches(path, "tokens", tokenizer, parse_special_tokens=True)
    assert (batch.tokens == tokenizer.eos_token_id).sum() == 2


def test_figures_of_the_report(tokenizer, write):
    report = RLHFDataModule(write([{"text": "a"}, {"text": "b"}])).setup_for("tokens", tokenizer).report().as_dict()
    assert (report["read"], report["kept"], report["tokens"], report["trained_tokens"]) == (2, 2, 6, 4)
    assert report["length"] == {"mean": 3.0, "median": 3.0, "p95": 3.0, "max": 3}
    assert json.loads(json.dumps(report)) == report


def test_workers_give_the_same_batches(tokenizer, write):
    path = write([{"prompt": "a" * n, "completion": "b"} for n in range(1, 9)])
    alone, helped = (batches(path, "tokens", tokenizer, shuffle=True, num_workers=n, batch_size=2) for n in (0, 2))
    assert len(alone) == math.ceil(8 / 2)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(alone, helped, strict=True))


def test_tool_calls_are_answers(make_tokenizer, write):
    tokenizer = make_tokenizer("chatml")
    keep = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ 'tool ' + tool['name'] + '\n' }}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{% for call in m['tool_calls'] or [] %}{{ '[call ' + call['function']['name'] + ']' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    records = [
        {"messages": [USER, {"role": "assistant", "content": content, "tool_calls": [call]}, *turns], "tools": tools}
        for content, turns in (("I look.", []), (None, []), ("", [USER, *says("Two.")]))
        for tools in ([{"name": "look"}], '[{"name": "look"}]')
    ]
    try:
        (batch,) = batches(write(records), "tokens", tokenizer, batch_size=8)
    finally:
        tokenizer.chat_template = keep
    assert trained(tokenizer, batch)[::2] == trained(tokenizer, batch)[1::2]
    assert trained(tokenizer, batch)[::2] == [
        "I look.[call look]<|im_end|>",
        "[call look]<|im_end|>",
        "[call look]<|im_end|>Two.<|im_end|>",
    ]
    texts = [tokenizer.decode(row[real]) for row, real in zip(batch.tokens, batch.attention_mask, strict=True)]
    assert all(text.startswith("tool look\n") for text in texts)


def test_more_than_the_tokenizer_allows_is_warned_of(make_tokenizer, write, caplog):
    tokenizer = make_tokenizer()
    keep, tokenizer.model_max_length = tokenizer.model_max_length, 64
    try:
        dm = RLHFDataModule(write([{"text": "abcdefgh" * 40}]), max_length=100).setup_for("tokens", tokenizer)
        assert max(dm.report().lengths) == 100
        assert "max_length=100 is more than the 64 tokens" in caplog.text
        dm = RLHFDataModule(write([{"text": "abcdefgh" * 40}])).setup_for("tokens", tokenizer)
        assert max(dm.report().lengths) == 64
    finally:
        tokenizer.model_max_length = keep
