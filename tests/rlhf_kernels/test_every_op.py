"""What every op owes its caller, as tables: bad input is named, nothing leaks between rows, devices are told apart."""

import pytest
import torch
from rlhf_kernels import (
    PolicyLossSpec,
    exact_kl,
    gae,
    kl_shaped_gae,
    linear_exact_kl,
    linear_jsd,
    linear_policy_loss,
    linear_token_logprobs,
    masked_whiten,
    policy_loss,
    token_logprobs,
)

ROWS, TIME, VOCAB, SIZE = 3, 4, 7, 5


def logits():
    return torch.randn(ROWS, TIME, VOCAB)


def head():
    return {"hidden": torch.randn(ROWS, TIME, SIZE), "weight": torch.randn(VOCAB, SIZE), "bias": torch.randn(VOCAB)}


def per_token():
    return torch.randn(ROWS, TIME)


def tokens():
    return {"tokens": torch.randint(VOCAB, (ROWS, TIME)), "mask": torch.ones(ROWS, TIME, dtype=torch.bool)}


def losses():
    floats = {name: per_token() for name in ("old_logprobs", "advantages", "ref_logprobs", "weights")}
    return {**tokens(), **floats, "denominator": 5.0, "loss": PolicyLossSpec(kl_coef=0.1)}


def kl():
    return {"mask": torch.ones(ROWS, TIME, dtype=torch.bool)}


def scan():
    return {"values": per_token(), **kl(), "gamma": 0.99, "lam": 0.95}


OPS = {
    "token_logprobs": (token_logprobs, lambda: {"logits": logits(), **tokens()}),
    "linear_token_logprobs": (linear_token_logprobs, lambda: {**head(), **tokens()}),
    "exact_kl": (
        exact_kl, lambda: {"logits": logits(), "ref_logits": logits(), "weights": per_token(), **kl()}
    ),
    "linear_exact_kl": (
        linear_exact_kl, lambda: {**head(), **{f"ref_{name}": x for name, x in head().items()}, **kl()}
    ),
    "linear_jsd": (linear_jsd, lambda: OPS["linear_exact_kl"][1]()),
    "policy_loss": (policy_loss, lambda: {"logits": logits(), **losses()}),
    "linear_policy_loss": (linear_policy_loss, lambda: {**head(), **losses()}),
    "gae": (gae, lambda: {"rewards": per_token(), **scan()}),
    "kl_shaped_gae": (
        kl_shaped_gae,
        lambda: {"scores": torch.randn(ROWS), "logprobs": per_token(), "ref_logprobs": per_token(), **scan(),
                 "kl_coef": 0.1},
    ),
    "masked_whiten": (masked_whiten, lambda: {"x": per_token(), **kl()}),
}  # fmt: skip


def arguments(name):
    torch.manual_seed(0)
    return OPS[name][1]()


def call(name, **changes):
    return OPS[name][0](**{**arguments(name), **changes})


TENSORS = [(name, key) for name in OPS for key, value in arguments(name).items() if isinstance(value, torch.Tensor)]
FIRST = {name: next(key for key in arguments(name)) for name in OPS}
"""The argument that the others must fit."""
HALVES = {
    "shape": lambda x: x[:-1],
    "axes": lambda x: x[None],
    "dtype": lambda x: x.to(torch.complex64),
    "device": lambda x: x.to("meta"),
    "kind": lambda x: x.tolist(),
}


@pytest.mark.parametrize(("name", "key"), TENSORS, ids=lambda x: x)
@pytest.mark.parametrize("wrong", HALVES)
def test_a_tensor_that_does_not_fit_is_named(name, key, wrong):
    with pytest.raises(ValueError, match=r"shape|dtype|is on|give a tensor") as raised:
        call(name, **{key: HALVES[wrong](arguments(name)[key])})
    message = str(raised.value)
    # of two that do not fit together either may be meant; both are in the message then
    assert key in message or FIRST[name] in message
    if wrong in ("dtype", "kind"):
        assert message.startswith(key)


class Elsewhere(torch.Tensor):
    """A tensor on a device that nobody here has."""

    @staticmethod
    def __new__(cls, like):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device="hpu")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} was called before the device was looked at")


@pytest.mark.parametrize("name", OPS)
def test_a_device_that_no_op_knows_is_refused_before_anything_runs(name):
    inputs = {key: Elsewhere(x) if isinstance(x, torch.Tensor) else x for key, x in arguments(name).items()}
    with pytest.raises(
        ValueError, match=r"is on hpu.*: supported devices are cpu, cuda, meta, mps, xpu; move it there"
    ):
        OPS[name][0](**inputs)


@pytest.mark.parametrize("name", OPS)
def test_tensors_without_memory_give_the_shapes_of_the_answers(name):
    inputs = {key: x.to("meta") if isinstance(x, torch.Tensor) else x for key, x in arguments(name).items()}
    grads = [x.requires_grad_() for x in inputs.values() if isinstance(x, torch.Tensor) and x.is_floating_point()][:1]
    ours, real = (as_tuple(result) for result in (OPS[name][0](**inputs), call(name)))
    for x, y in zip(ours, real, strict=True):
        assert (x is None) == (y is None)
        if y is not None:
            assert (x.device.type, x.shape, x.dtype) == ("meta", y.shape, y.dtype)
    if ours[0].requires_grad:
        assert torch.autograd.grad(ours[0].sum(), grads)[0].shape == grads[0].shape


LOSSES = [name for name in OPS if name not in ("gae", "kl_shaped_gae", "masked_whiten")]
"""Those with a gradient."""


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_derivative_is_refused_never_wrong(name):
    inputs = {
        key: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for key, x in arguments(name).items()
    }
    x = inputs[FIRST[name]].requires_grad_()
    total = as_tuple(OPS[name][0](**inputs))[0].sum()

    def second():
        (grad,) = torch.autograd.grad(total.square(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum() + x.sum(), x)

    op = "linear_exact_kl" if name == "linear_jsd" else name  # which it is one of
    with pytest.raises(RuntimeError, match=rf"{op}\b.*create_graph=True asks for|{op}_grad.*no autograd formula"):
        second()


def test_a_gradient_written_over_the_logits_has_no_second_derivative():
    logits = torch.randn(2, 5, requires_grad=True)
    total = token_logprobs(logits * 1.0, torch.tensor([1, 2]), inplace_backward=True).logprobs.sum()
    with pytest.raises(RuntimeError, match=r"token_logprobs\(inplace_backward=True\) has no gradient of its own"):
        torch.autograd.grad(total.square(), logits, create_graph=True)


def as_tuple(result):
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


@pytest.mark.parametrize("name", OPS)
def test_an_empty_batch_is_refused_or_empty(name):
    heads = ("weight", "bias", "ref_weight", "ref_bias")
    inputs = {
        key: x[:0] if isinstance(x, torch.Tensor) and key not in heads else x for key, x in arguments(name).items()
    }
    if name == "masked_whiten":
        assert OPS[name][0](**inputs).shape == (0, TIME)
        return
    with pytest.raises(ValueError, match=r"shape \(0, 4.*there is no .*; skip the empty batch"):
        OPS[name][0](**inputs)


WITH_TOKENS = [name for name in OPS if "tokens" in arguments(name)]


@pytest.mark.parametrize("name", WITH_TOKENS)
@pytest.mark.parametrize("wrong", [VOCAB, -1, -100])
def test_a_token_id_outside_the_vocabulary_is_named_unless_it_does_not_count(name, wrong):
    inputs = arguments(name)
    inputs["tokens"][1, 2] = wrong
    with pytest.raises(ValueError, match=rf"token id {wrong} at \[1, 2\] is outside \[0, {VOCAB}\): set mask False"):
        OPS[name][0](**inputs)
    inputs["mask"][1, 2] = False
    result = OPS[name][0](**inputs)
    assert result.logprobs[1, 2] == 0
    assert result.logprobs.isfinite().all()


PER_TOKEN = [
    (name, key)
    for name, key in TENSORS
    if key in ("logits", "hidden", "ref_logits", "ref_hidden", "old_logprobs", "advantages", "ref_logprobs", "weights")
    and name not in ("gae", "kl_shaped_gae", "masked_whiten")
]


@pytest.mark.parametrize(("name", "key"), PER_TOKEN, ids=lambda x: x)
def test_nan_gives_nan_for_its_row_only(name, key):
    inputs = arguments(name)
    inputs[key][1, 2] = float("nan")
    learns = inputs["hidden" if "hidden" in inputs else "logits"].requires_grad_()
    result = as_tuple(OPS[name][0](**inputs))
    elsewhere = torch.ones(ROWS, TIME, dtype=torch.bool)
    elsewhere[1, 2] = False
    fields = [x for x in result if x is not None and x.shape == elsewhere.shape and x.is_floating_point()]
    assert fields
    assert all(x[elsewhere].isfinite().all() for x in fields)
    nan_expected = key in ("logits", "hidden", "ref_logits", "ref_hidden")
    if nan_expected:
        assert any(x[1, 2].isnan() for x in fields)
    grad = torch.autograd.grad(result[0].sum(), learns)[0]
    assert grad[elsewhere].isfinite().all()
    if nan_expected:
        assert grad[1, 2].isnan().any()


@pytest.mark.parametrize(("name", "key"), PER_TOKEN, ids=lambda x: x)
def test_nan_where_nothing_counts_is_not_seen(name, key):
    inputs = arguments(name)
    inputs[key][1, 2] = float("nan")
    inputs["mask"][1, 2] = False
    learns = inputs["hidden" if "hidden" in inputs else "logits"].requires_grad_()
    result = as_tuple(OPS[name][0](**inputs))
    assert all(x.isfinite().all() for x in result if x is not None and x.is_floating_point())
    assert torch.autograd.grad(result[0].sum(), learns)[0].isfinite().all()


@pytest.mark.parametrize("name", ["gae", "kl_shaped_gae"])
def test_nan_stays_in_its_sequence_and_is_not_seen_where_nothing_counts(name):
    for key in [key for owner, key in TENSORS if owner == name and key not in ("mask", "scores")]:
        inputs = arguments(name)
        inputs[key][1, 2] = float("nan")
        some = as_tuple(OPS[name][0](**inputs))[:2]
        assert all(x[[0, 2]].isfinite().all() for x in some)
        assert any(x[1].isnan().any() for x in some)
        inputs["mask"][1, 2] = False
        assert all(x.isfinite().all() for x in as_tuple(OPS[name][0](**inputs)))
