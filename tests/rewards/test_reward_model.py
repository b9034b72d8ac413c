"""Trained reward models as rewards: the numbers are those of transformers' own classifier, one text at a time."""

import copy
import logging
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import Sample
from rlhf_lightning.models.export import export_scalar_model
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward, score_samples
from rlhf_lightning.rewards.reward_model import RewardModelScore

WORDS = ["<unk>", "</s>", "<|user|>", "<|bot|>", "what", "is", "it", "good", "bad", "a", "table", "?"]
CHAT = (
    "{% for m in messages %}{{ '<|user|> ' if m['role'] == 'user' else '<|bot|> ' }}{{ m['content'] }} "
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|> {% endif %}"
)
SAMPLES = [
    Sample("what is it ?", "a good table"),
    Sample("what ?", "bad"),
    Sample("is it a good good good table ?", "it is"),
    Sample("it is", "", finished=False),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random reward model whose padding is its end token, as transformers writes it."""
    folder = tmp_path_factory.mktemp("reward_model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=["<|user|>", "<|bot|>"],
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForSequenceClassification(config()).save_pretrained(folder)
    return folder


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
        num_labels=1,
        pad_token_id=1,
        eos_token_id=1,
    )


@pytest.fixture(scope="module")
def by_transformers(folder):
    """The classifier's logit of one text alone, nothing padded: read at its last token."""
    model = LlamaForSequenceClassification.from_pretrained(folder)
    model.config.pad_token_id = None

    def score(words: str) -> float:
        with torch.no_grad():
            return model(torch.tensor([[WORDS.index(word) for word in words.split()]])).logits.item()

    return score


def close(expected: list[float]):
    return pytest.approx(expected, abs=1e-5)


def test_scores_are_those_of_the_classifier_on_each_text_alone(folder, by_transformers):
    texts = [f"{s.prompt} {s.completion}" + " </s>" * s.finished for s in SAMPLES]
    expected = [by_transformers(text) for text in texts]
    assert len({round(x, 3) for x in expected}) == len(SAMPLES)
    for batch_size in (1, 3, 32):
        assert RewardModelScore(str(folder), batch_size=batch_size)(SAMPLES) == close(expected)


@pytest.mark.parametrize(("add_eos", "ending"), [("always", " </s>"), ("never", "")])
def test_the_end_token_comes_as_asked(folder, by_transformers, add_eos, ending):
    expected = [by_transformers(f"{s.prompt} {s.completion}{ending}") for s in SAMPLES]
    assert RewardModelScore(str(folder), add_eos=add_eos)(SAMPLES) == close(expected)


def test_conversations_go_through_its_own_template(folder, by_transformers):
    said = [
        {"role": "user", "content": "what is it ?"},
        {"role": "assistant", "content": "a table"},
        {"role": "user", "content": "good ?"},
    ]
    sample = Sample("whatever the policy's own template made of it", "it is bad", {"prompt": said})
    scores = RewardModelScore(str(folder), chat_template=CHAT)([sample])
    read = "<|user|> what is it ? <|bot|> a table </s> <|user|> good ? <|bot|> it is bad </s>"
    assert scores == close([by_transformers(read)])


def test_conversations_without_a_template_are_refused(folder):
    sample = Sample("", "it is bad", {"prompt": [{"role": "user", "content": "what ?"}]})
    with pytest.raises(UserError, match="no chat template"):
        RewardModelScore(str(folder))([sample])


def test_a_long_prompt_loses_its_beginning_and_says_so_once(folder, by_transformers, caplog):
    reward = RewardModelScore(str(folder), max_length=6)
    sample = SAMPLES[2]  # 8 + 2 + 1 tokens
    with caplog.at_level(logging.WARNING):
        assert reward([sample, sample]) == close([by_transformers("good table ? it is </s>")] * 2)
    assert caplog.text.count("do not fit into 6") == 1


def test_the_models_context_is_the_limit_by_default(folder, by_transformers):
    sample = Sample("a " * 40 + "good ?", "bad")
    assert RewardModelScore(str(folder))([sample]) == close([by_transformers("a " * 28 + "good ? bad </s>")])


def test_nothing_asked_and_nothing_said_still_gets_a_score(folder):
    (score,) = RewardModelScore(str(folder), add_eos="never")([Sample("", "")])
    assert isinstance(score, float)


def test_pooling_and_normalisation_come_with_the_export(folder, tmp_path):
    model = load_scalar_model(ModelSpec(path=str(folder)), pooling="mean")
    model.set_normalisation(2.0, 0.5)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    export_scalar_model(model, tokenizer, tmp_path / "export")
    by_mean = RewardModelScore(str(tmp_path / "export"))(SAMPLES[:3])
    one = torch.tensor([[WORDS.index(w) for w in ["what", "?", "bad", "</s>"]]])
    with torch.no_grad():
        values = model.eval().token_values(one, torch.ones_like(one).bool(), torch.arange(4)[None])
    assert by_mean[1] == pytest.approx((values[0, 2:].mean().item() - 2.0) / 0.5, abs=1e-5)


def test_nothing_is_loaded_before_it_is_needed(tmp_path, folder):
    reward = RewardModelScore(str(tmp_path / "later"))
    shutil.copytree(folder, tmp_path / "later")
    reward.to("cpu")
    model = reward.reader.model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert copy.deepcopy(reward.reader)._loaded is None


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        RewardModelScore(str(tmp_path / "nowhere")).to("cpu")


def test_a_language_model_is_no_reward_model(folder, tmp_path):
    LlamaForCausalLM(config()).save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is no reward model: it was saved as LlamaForCausalLM"):
        RewardModelScore(str(tmp_path))(SAMPLES)


def test_several_with_weights(folder):
    reward = RewardModelScore(str(folder))
    out = score_samples([WeightedReward(reward, 2.0, "helpful"), WeightedReward(reward, -1.0, "same")], SAMPLES)
    assert out.total.tolist() == close(reward(SAMPLES))


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"max_length": 0}, {"add_eos": "maybe"}])
def test_impossible_settings_are_named(arguments):
    name, value = next(iter(arguments.items()))
    with pytest.raises(UserError, match=f"{name}={value!r}"):
        RewardModelScore("folder", **arguments)
