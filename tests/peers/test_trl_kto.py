"""Our unpaired losses against TRL's KTOTrainer, on the same tiny weights and records.

TRL 1.16 has no trainer for BCO any more: its pairwise form in the DPO trainer, without a shift, stands in.
"""

import warnings
from typing import Any

import pytest

pytest.importorskip("trl", reason="TRL is not installed: pip install 'rlhf-lightning[peers]'")

import torch
from datasets import Dataset
from fits import fit
from one_step import another
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from rlhf_lightning.core.batches import UnpairedBatch
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.losses.unpaired import BCO, KTO, APOZeroUnpaired, kto
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.stages import KTOModule

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # float32, sums of a few dozen terms in another order
LABELLED = [
    {"prompt": "the film was", "completion": " very good", "label": True},
    {"prompt": "a", "completion": " dull but not long", "label": False},
    {"prompt": "the actors", "completion": " good and great", "label": True},
    {"prompt": "a plot", "completion": " was not very very good", "label": False},
    {"prompt": "the end", "completion": " was great", "label": True},
    {"prompt": "but the film", "completion": " was short and very dull", "label": False},
    {"prompt": "not a long", "completion": " film", "label": True},
    {"prompt": "the plot was", "completion": " bad bad", "label": False},
]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def options(config: type, folder: Any, **more: Any) -> Any:
    """A TRL config for the CPU in float32."""
    still = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_num_workers": 0}
    return config(output_dir=str(folder), **still, **plain, max_length=64, **more)


def their_trainer(model: Any, records: list[dict[str, Any]], folder: Any, batch_size: int, **more: Any) -> KTOTrainer:
    optimizers = more.pop("optimizer", None)
    policy = AutoModelForCausalLM.from_pretrained(model).train()
    return KTOTrainer(
        model=policy,
        ref_model=load_policy(another(str(model))).causal_lm.eval(),
        args=options(KTOConfig, folder, per_device_train_batch_size=batch_size, beta=0.5, **more),
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(model),
        optimizers=(None, None) if optimizers is None else optimizers(policy.parameters()),
    )


def our_module(model: Any, loss: Any, **more: Any) -> KTOModule:
    return KTOModule(ModelSpec(path=str(model)), loss, reference=another(str(model)), **more)


def our_data(model: Any, path: str, batch_size: int = 8) -> RLHFDataModule:
    return RLHFDataModule(path, batch_size=batch_size, max_length=64, shuffle=False).setup_for("mismatched", str(model))


def our_batch(model: Any, path: str) -> UnpairedBatch:
    [batch] = list(our_data(model, path).train_dataloader())
    return batch


def paired_as_ours(theirs: KTOTrainer, model: Any, path: str) -> KTOTrainer:
    """TRL's trainer, with the mismatched completions that we choose."""
    completions = [
        [int(i) for i, counts in zip(item.mismatched.ids, item.mismatched.mask, strict=True) if counts]
        for item in our_data(model, path).items("train")
    ]
    dataset = theirs.train_dataset.remove_columns("KL_completion_ids")
    theirs.train_dataset = dataset.add_column("KL_completion_ids", completions)
    return theirs


LOSSES = {
    "kto": (KTO(0.5, 0.8, 1.2), {"loss_type": "kto", "desirable_weight": 0.8, "undesirable_weight": 1.2}),
    "apo_zero_unpaired": (
        APOZeroUnpaired(0.5, 1.0, 1.3),
        {"loss_type": "apo_zero_unpaired", "undesirable_weight": 1.3},
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_of_the_same_records(name, tiny_model, write_jsonl, tmp_path):
    loss, their_options = LOSSES[name]
    path = write_jsonl("kto.jsonl", LABELLED)
    theirs = their_trainer(tiny_model, LABELLED, tmp_path, 8, **their_options)
    if name == "kto":
        paired_as_ours(theirs, tiny_model, path)
    [inputs] = list(theirs.get_train_dataloader())
    their_loss = theirs.compute_loss(theirs.model, dict(inputs))

    module = our_module(tiny_model, loss)
    module.configure_model()
    batch = our_batch(tiny_model, path)
    our_loss = loss(module(batch.completions).log_ratio, batch.labels, module.baseline(batch)).mean()

    torch.testing.assert_close(our_loss, their_loss, **TOLERANCE)
    if name == "kto":
        assert float(module.baseline(batch)) == pytest.approx(theirs._metrics["train"]["kl"][0], rel=1e-5)
        assert float(module.baseline(batch)) > 0.1
    their_loss.backward()
    our_loss.backward()
    theirs_by_name = dict(theirs.model.named_parameters())
    for parameter_name, parameter in module.policy.causal_lm.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs_by_name[parameter_name].grad, **TOLERANCE)


@pytest.mark.parametrize("name", LOSSES)
def test_twenty_steps_take_the_same_path(name, tiny_model, write_jsonl, tmp_path):
    loss, their_options = LOSSES[name]
    path = write_jsonl("kto.jsonl", LABELLED)

    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)

    def with_constant_rate(parameters):
        optimizer = adamw(parameters)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    theirs = their_trainer(
        tiny_model,
        LABELLED,
        tmp_path,
        4,
        optimizer=with_constant_rate,
        max_steps=20,
        max_grad_norm=0.0,
        **their_options,
    )
    if name == "kto":
        paired_as_ours(theirs, tiny_model, path)
    before = theirs.model.lm_head.weight.detach().clone()
    theirs.train()

    module = our_module(tiny_model, loss, optimizer=adamw)
    data = {"train": path, "batch_size": 4, "max_length": 64, "shuffle": False}
    trainer = fit(module, tmp_path, data=data, max_epochs=None, max_steps=20)
    assert trainer.global_step == theirs.state.global_step == 20

    theirs_by_name = dict(theirs.model.named_parameters())
    for parameter_name, parameter in module.policy.causal_lm.named_parameters():
        torch.testing.assert_close(parameter, theirs_by_name[parameter_name], rtol=1e-4, atol=1e-4)
    assert (theirs.model.lm_head.weight - before).abs().max() > 0.01
    last = next(entry for entry in reversed(theirs.state.log_history) if "rewards/margins" in entry)
    ours = trainer.callback_metrics
    for metric in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert float(ours[metric]) == pytest.approx(float(last[metric]), rel=1e-3, abs=1e-3), metric
    assert float(ours["train/loss"]) == pytest.approx(float(last["loss"]), abs=1e-4)


def test_the_experimental_trainer_is_the_same():
    from trl.experimental.kto import KTOTrainer as Experimental

    assert issubclass(Experimental, KTOTrainer)
    assert [name for name in vars(Experimental) if not name.startswith("__")] == []


def test_their_kl_is_that_of_a_micro_batch_and_ours_that_of_the_step(tiny_model, write_jsonl, tmp_path):
    """Eight records in two micro-batches of four: TRL compares each with its own KL, we both with that of all eight."""
    path = write_jsonl("kto.jsonl", LABELLED)
    theirs = paired_as_ours(their_trainer(tiny_model, LABELLED, tmp_path, 4), tiny_model, path)
    batches = [dict(inputs) for inputs in theirs.get_train_dataloader()]
    their_loss = torch.stack([theirs.compute_loss(theirs.model, inputs) for inputs in batches]).mean().item()
    their_kl = theirs._metrics["train"]["kl"]

    module = our_module(tiny_model, KTO(0.5))
    module.configure_model()
    batch = our_batch(tiny_model, path)
    ratios, mismatched = (module(part).log_ratio.detach() for part in (batch.completions, batch.mismatched))
    of_halves = [max(float(half.mean()), 0.0) for half in mismatched.chunk(2)]
    assert their_kl == pytest.approx(of_halves, rel=1e-4)
    by_halves = [
        kto(part, labels, torch.tensor(kl), beta=0.5).mean()
        for part, labels, kl in zip(ratios.chunk(2), batch.labels.chunk(2), of_halves, strict=True)
    ]
    assert their_loss == pytest.approx(float(torch.stack(by_halves).mean()), rel=1e-5)

    data = {"train": path, "batch_size": 4, "max_length": 64, "shuffle": False}
    ours = our_module(tiny_model, KTO(0.5), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    metrics = fit(ours, tmp_path, data=data, accumulate_grad_batches=2).callback_metrics
    assert float(metrics["kl/mismatched"]) == pytest.approx(float(mismatched.mean()), rel=1e-5)
    whole = float(kto(ratios, batch.labels, mismatched.mean(), beta=0.5).mean())
    assert float(metrics["train/loss"]) == pytest.approx(whole, rel=1e-5)
    assert abs(whole - their_loss) > 1e-4


def test_they_take_answers_to_the_same_prompt_for_mismatches_and_we_do_not(tiny_model, write_jsonl, tmp_path):
    records = [
        {"prompt": prompt, "completion": completion, "label": completion == " good"}
        for prompt in ("the film was", "a plot was")
        for completion in (" good", " dull")
    ]
    theirs = their_trainer(tiny_model, records, tmp_path, 2).train_dataset
    assert theirs["KL_completion_ids"] == [theirs["completion_ids"][i] for i in (1, 0, 3, 2)]
    items = our_data(tiny_model, write_jsonl("kto.jsonl", records)).items("train")
    for item in items:
        partners = [
            other for other in items if list(other.encoded.ids[-2:]) == list(item.mismatched.ids[-2:])
        ]  # the answers are a word and <eos>; two records give each
        assert any(list(other.encoded.ids[1:-2]) != list(item.encoded.ids[1:-2]) for other in partners)


@pytest.mark.parametrize("balanced", [True, False])
def test_bco_of_a_pair_is_the_sum_over_its_answers(tiny_model, write_jsonl, tmp_path, balanced):
    """TRL's bco_pair is -log sigma(r_w) - log sigma(-r_l): our BCO at its first step, where the shift is 0."""
    pairs = [
        {"prompt": good["prompt"], "chosen": good["completion"], "rejected": bad["completion"]}
        for good, bad in zip(LABELLED[::2], LABELLED[1::2], strict=True)
    ]
    answers = [
        {"prompt": pair["prompt"], "completion": pair[kind], "label": kind == "chosen"}
        for pair in pairs
        for kind in ("chosen", "rejected")
    ]
    theirs = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        ref_model=load_policy(another(str(tiny_model))).causal_lm.eval(),
        args=options(DPOConfig, tmp_path, per_device_train_batch_size=4, beta=0.5, loss_type="bco_pair"),
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    [inputs] = list(theirs.get_train_dataloader())
    their_loss = theirs.compute_loss(theirs.model, dict(inputs))

    loss = BCO(0.5, balanced_shift=balanced)
    module = our_module(tiny_model, loss)
    module.configure_model()
    batch = our_batch(tiny_model, write_jsonl("bco.jsonl", answers))
    our_loss = loss(module(batch.completions).log_ratio, batch.labels, module.baseline(batch)).mean()
    torch.testing.assert_close(2 * our_loss, their_loss, **TOLERANCE)
    their_gradient = torch.autograd.grad(their_loss, theirs.model.lm_head.weight)[0]
    our_gradient = torch.autograd.grad(2 * our_loss, module.policy.causal_lm.lm_head.weight)[0]
    torch.testing.assert_close(our_gradient, their_gradient, **TOLERANCE)
