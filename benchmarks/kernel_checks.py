"""What the interpreter cannot show, checked on the device itself: every kernel, in the dtypes that models have.

`run("cuda")` on a GPU; `run("cpu")` under TRITON_INTERPRET=1 goes through the same code with float32 (its bfloat16
products are wrong) and leaves out what a CPU has not: graphs, streams, a second device.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import rlhf_kernels as ours
import torch
from rlhf_kernels import triton_linear
from rlhf_kernels.rows import Transform, row_stats_reference
from torch import Tensor

LOGPROB = 1e-5
"""Largest error of a log-probability or entropy (nats), from float64 of the same operands."""
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 2e-3}
"""Largest norm of the error of a gradient over its norm: roundings of its own dtype."""


def head_tolerance(hidden: Tensor) -> float:
    """As LOGPROB, of logits that a GPU has added up from H products; sums are below 8 here, and rounded to 2^-23 of it.

    Float32 sums are rounded H times, up or down. Tensor cores, for 16-bit operands, add 16 products at a time and cut
    off the bits that the sum has no room for: all errors point to zero.
    """
    if not hidden.is_cuda:
        return LOGPROB
    size = hidden.shape[-1]
    return LOGPROB + 8 * 2**-23 * (size / 16 if hidden.element_size() == 2 else size**0.5)


class WrongError(Exception):
    """A check failed; the message has the numbers."""


def close(name: str, ours: Tensor, exact: Tensor, bound: float) -> float:
    """Largest difference; raises above `bound`."""
    error = float((ours.double() - exact.double()).abs().max())
    if not error <= bound:
        raise WrongError(f"{name}: {error:.1e} from float64, above {bound:.0e}")
    return error


def same_bits(name: str, first: Any, second: Any) -> None:
    for x, y in zip(first, second, strict=True):
        if x is not None and not torch.equal(x, y):
            raise WrongError(f"{name}: {int((x != y).sum())} of {x.numel()} numbers have other bits")


def backend(name: str) -> None:
    os.environ["RLHF_KERNELS_BACKEND"] = name


class Bench:
    """Inputs of any size on a device, always the same ones."""

    def __init__(self, device: str) -> None:
        self.device, self.gpu = device, device == "cuda"
        self.dtypes = (torch.float32, torch.bfloat16, torch.float16) if self.gpu else (torch.float32,)
        self.kernels = "auto" if self.gpu else "triton"
        self.shapes = [(1, 7), (63, 257), (257, 50257), (300, 151936)] if self.gpu else [(3, 7), (5, 257)]
        self.heads = (
            [(1, 7, 16), (130, 4099, 896), (257, 50257, 77), (300, 151936, 2048)] if self.gpu else [(17, 300, 20)]
        )

    def normal(self, *size: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return (torch.randn(size, generator=generator, device=self.device) * scale).to(dtype)

    def tokens(self, rows: int, vocab: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(1)
        return torch.randint(vocab, (rows,), generator=generator, device=self.device)

    def head(self, rows: int, vocab: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.normal(rows, size, dtype=dtype)
        return hidden, self.normal(vocab, size, dtype=dtype, seed=2, scale=3 / size**0.5), self.tokens(rows, vocab)


def against_float64(
    bench: Bench, function: Callable[..., Any], dtype: torch.dtype, *leaves: Tensor, bound: float = LOGPROB
) -> float:
    """Runs `function` of `leaves` with the kernels in `dtype` and as reference in float64; numbers, then gradients."""
    results = []
    for kind, name in ((dtype, bench.kernels), (torch.float64, "reference")):
        backend(name)
        inputs = [x.to(kind).requires_grad_() for x in leaves]
        numbers, total = function(*inputs)
        grads = torch.autograd.grad(total, inputs) if total is not None else ()
        results.append((numbers, grads))
    backend(bench.kernels)
    (numbers, grads), (exact, exact_grads) = results
    what = f"{str(dtype).removeprefix('torch.')} {[tuple(x.shape) for x in leaves]}"
    error = max(close(f"numbers of {what}", x, y, bound) for x, y in zip(numbers, exact, strict=True))
    for x, y in zip(grads, exact_grads, strict=True):
        relative = float((x.double() - y).norm() / y.norm().clamp(min=1e-30))
        if not relative <= GRADIENT[dtype]:
            raise WrongError(f"gradient of {what}: {relative:.1e} of its norm, above {GRADIENT[dtype]:.0e}")
    return error


def check_logits(bench: Bench) -> Iterator[float]:
    """token_logprobs, exact_kl and policy_loss on ragged shapes, forward and gradient."""
    for dtype in bench.dtypes:
        for rows, vocab in bench.shapes:
            logits = bench.normal(rows, vocab, dtype=dtype, scale=3.0)
            reference = bench.normal(rows, vocab, dtype=dtype, seed=5, scale=3.0)
            tokens, factor = bench.tokens(rows, vocab), bench.normal(rows, seed=3)
            mask = factor > -0.5
            mask[0] = True

            def scores(x: Tensor, tokens: Tensor = tokens, mask: Tensor = mask, factor: Tensor = factor) -> Any:
                some = ours.token_logprobs(x, tokens, mask=mask, with_entropy=True, temperature=0.9)
                return some[:2], (some.logprobs * factor + some.entropy).sum()

            def kl(x: Tensor, y: Tensor = reference, factor: Tensor = factor) -> Any:
                per_row = ours.exact_kl(x, y.to(x.dtype))
                return (per_row / per_row.detach().max().clamp(min=1),), (per_row * factor).sum()

            def loss(x: Tensor, tokens: Tensor = tokens, mask: Tensor = mask, factor: Tensor = factor) -> Any:
                old = torch.full_like(factor, -9.0)
                spec = ours.PolicyLossSpec("reinforce", kl_coef=0.1, kl_estimator="k1", entropy_coef=0.01)
                result = ours.policy_loss(
                    x, tokens, old, factor, mask=mask, denominator=float(len(mask)), ref_logprobs=old, loss=spec
                )
                return (result.logprobs, result.entropy), result.loss

            yield against_float64(bench, scores, dtype, logits)
            yield against_float64(bench, kl, dtype, logits)
            yield against_float64(bench, loss, dtype, logits)


@contextmanager
def spoilt_memory() -> Iterator[None]:
    """What the ops allocate starts as NaN (booleans as True): an output that no kernel fills shows."""
    made = torch.empty, torch.empty_like

    def spoil(x: Tensor) -> Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(1) if x.dtype == torch.bool else x

    patched: Any = torch
    patched.empty = lambda *sizes, **options: spoil(made[0](*sizes, **options))
    patched.empty_like = lambda *like, **options: spoil(made[1](*like, **options))
    try:
        yield
    finally:
        patched.empty, patched.empty_like = made


def resident_case(bench: Bench, rows: int, vocab: int, dtype: torch.dtype, every: bool) -> Iterator[float]:
    """policy_loss with hostile and masked rows, twice; with `every` option too; then of a view of two batches."""
    logits, tokens = bench.normal(rows, vocab, dtype=dtype, scale=3.0), bench.tokens(rows, vocab)
    factor, mask = bench.normal(rows, seed=3), bench.normal(rows, seed=4) > -0.5
    mask[:20] = True
    if rows > 20:
        logits[3, 5:], tokens[3] = -torch.inf, 2
        logits[4, 77], tokens[4] = 60.0, 77  # nearly certain
        tokens[5:11] = torch.tensor([0, 4095, 4096, vocab - 9, vocab - 8, vocab - 1], device=bench.device) % vocab
        factor[11] = 0.0
    far = logits.clone()  # at 1e4 a float32 has three decimals: a scale or a temperature would be seen
    far[1:2] += 1e4
    far[2:3] -= 1e4
    old, plain = torch.full_like(factor, -9.0), {"loss": ours.PolicyLossSpec("reinforce")}
    everything = {
        "loss": ours.PolicyLossSpec("reinforce", kl_coef=0.1, kl_estimator="k1", entropy_coef=0.01),
        "ref_logprobs": old, "weights": factor.abs() + 0.1, "temperature": factor.abs() + 0.5, "logit_scale": 1.2,
    }  # fmt: skip

    def loss(x: Tensor, counts: Tensor, options: dict[str, Any]) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        result = ours.policy_loss(leaf, tokens, old, factor, mask=counts, denominator=9.0, **options)
        return [*(y for y in result if y is not None), *torch.autograd.grad(result.loss, leaf)]

    nothing = torch.zeros_like(mask)
    kinds: list[tuple[Tensor, Tensor, dict[str, Any]]] = [(far, mask, plain)]
    if every:
        kinds += [(logits, mask, everything), (logits, mask, {"softcap": 30.0}), (logits, nothing, everything)]
    for x, counts, options in kinds:
        with spoilt_memory():
            first, again = (loss(x, counts, options) for _ in range(2))
        same_bits(f"{rows} x {vocab}, a second time", first, again)
        backend("reference")
        exact = loss(x.double(), counts, options)
        backend(bench.kernels)
        name = f"{rows} x {vocab}, {dtype}, {list(options)}"
        for number, truth in zip(first[:-1], exact[:-1], strict=True):
            scale = 1 + truth.double().abs()
            yield close(name, number.double() / scale, truth.double() / scale, LOGPROB)
        error, size = (first[-1].double() - exact[-1]).norm(dim=-1), exact[-1].norm(dim=-1)
        lost = torch.finfo(dtype).smallest_normal * vocab**0.5  # numbers that small have fewer bits, or become 0
        bound = 4 * GRADIENT[dtype] * size + lost  # of one row; GRADIENT is of all
        if not bool((error <= bound).all()):
            row = int((error - bound).argmax())
            raise WrongError(f"gradient of {name}: {float(error[row]):.1e} of {float(size[row]):.1e} in row {row}")
    if rows > 1:
        views = logits.expand(2, rows, vocab).contiguous()[:, :-1].detach().requires_grad_()
        one = [x[:-1] for x in (tokens, old, factor, mask)]
        two = [x.expand(2, -1) for x in one]
        result = ours.policy_loss(views, *two[:3], mask=two[3], denominator=9.0, **plain)
        alone = loss(logits, mask & (torch.arange(rows, device=bench.device) < rows - 1), plain)
        grads = torch.autograd.grad(result.loss, views)[0]
        expected = [alone[1][:-1], alone[-1][:-1]]
        same_bits(f"{rows} x {vocab}, a view of two", [result.logprobs[1], grads[1]], expected)


def check_resident(bench: Bench) -> Iterator[float]:
    """policy_loss of rows kept on the multiprocessor: every way to cut them, hostile and masked rows, all options."""
    if not bench.gpu or torch.cuda.get_device_properties(bench.device).major != 9:
        return
    half, whole = torch.bfloat16, torch.float32
    cases = [(700, 32000, half, True), (131, 50304, half, False), (132, 65536, half, False), (133, 128256, half, False)]
    cases += [(1, 151936, half, False), (700, 151936, half, True), (140, 152064, half, False)]
    cases += [(133, 151936, torch.float16, False), (700, 16000, whole, False), (133, 75968, whole, True)]
    for rows, vocab, dtype, every in cases:  # each choice of options is a kernel to compile
        yield from resident_case(bench, rows, vocab, dtype, every)


def check_heads(bench: Bench) -> Iterator[float]:
    """linear_token_logprobs and linear_policy_loss by both methods on ragged shapes, forward and gradient."""
    for dtype in bench.dtypes:
        for rows, vocab, size in bench.heads:
            hidden, weight, tokens = bench.head(rows, vocab, size, dtype)
            factor = bench.normal(rows, seed=3)
            for method in ("chunked", "fused"):

                def scores(h: Tensor, w: Tensor, t: Tensor = tokens, f: Tensor = factor, method: str = method) -> Any:
                    way: Any = method if h.dtype != torch.float64 else "chunked"
                    some = ours.linear_token_logprobs(h, w, t, with_entropy=True, temperature=0.9, method=way)
                    return some[:2], (some.logprobs * f).sum()

                yield against_float64(bench, scores, dtype, hidden, weight, bound=head_tolerance(hidden))

            for method in ("chunked", "fused"):
                # fused: the copy engine moves 16 bytes at a time, and exponentials are kept in bfloat16
                if method == "fused" and (size * hidden.element_size() % 16 or dtype != bench.dtypes[bench.gpu]):
                    continue

                def loss(h: Tensor, w: Tensor, t: Tensor = tokens, f: Tensor = factor, method: str = method) -> Any:
                    way: Any = method if h.dtype != torch.float64 else "chunked"
                    old, every = torch.full_like(f, -9.0), f == f
                    old[0] = 70.0  # an estimate that is of no use
                    spec = ours.PolicyLossSpec("reinforce")
                    result = ours.linear_policy_loss(
                        h, w, t, old, f, mask=every, denominator=9.0, loss=spec, method=way
                    )
                    return (result.logprobs,), result.loss

                yield against_float64(bench, loss, dtype, hidden, weight, bound=head_tolerance(hidden))


def check_scans(bench: Bench) -> Iterator[float]:
    """kl_shaped_gae, whole rows and split ones, and masked_whiten."""
    for rows, length in [(3, 1), (5, 1000), (600, 4097), (4, 40000)] if bench.gpu else [(3, 40)]:
        values, logprobs, reference = (bench.normal(rows, length, seed=seed) for seed in range(3))
        mask, scores = bench.normal(rows, length, seed=4) > -0.8, bench.normal(rows, seed=5)

        def scan(v: Tensor, p: Tensor = logprobs, q: Tensor = reference, m: Tensor = mask, s: Tensor = scores) -> Any:
            with torch.no_grad():
                kind = v.dtype
                shaped = ours.kl_shaped_gae(
                    s.to(kind), p.to(kind), q.to(kind), v, m, kl_coef=0.1, gamma=0.99, lam=0.95, critic_lam=1.0
                )
                scale = shaped.returns.abs().max().clamp(min=1)
                numbers = (shaped.advantages / scale, shaped.returns / scale, ours.masked_whiten(v, m))
            return numbers, None

        yield against_float64(bench, scan, torch.float32, values)


def check_batches(bench: Bench) -> Iterator[float]:
    """The fused kernel gives a row the same bits in any batch; descriptors and pointers agree with float64."""
    for dtype in bench.dtypes:
        for _, vocab, size in bench.heads:
            rows = 1000 if bench.gpu else 20
            hidden, weight, tokens = bench.head(rows, vocab, size, dtype)

            def run(some: Tensor, head: tuple[Tensor, Tensor, Tensor] = (hidden, weight, tokens), **how: Any) -> Any:
                states, weight, ids = head[0][some], head[1], head[2][some]
                plain = Transform()
                return triton_linear.linear_stats_triton(states, weight, None, ids, plain, with_entropy=True, **how)

            every = torch.arange(rows, device=bench.device)
            whole = run(every)
            exact = row_stats_reference(hidden.double() @ weight.double().T, tokens, Transform(), with_entropy=True)
            bound = head_tolerance(hidden)
            yield close("fused", whole.logprobs, exact.logprobs, bound)
            yield close("fused entropy", whole.entropy, exact.entropy, 2 * bound)  # two sums with the same logits
            yield close("fused, pointers", run(every, descriptors=False).logprobs, exact.logprobs, bound)
            rounded = LOGPROB if hidden.element_size() == 2 else bound
            yield close("fused, rounded sums", run(every, rounded=True).logprobs, exact.logprobs, rounded)
            shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).to(bench.device)
            for some in (every[:1], every[-2:], every[:17], shuffled[:129], shuffled, every.flip(0)):
                same_bits(f"{len(some)} of {rows} rows, {dtype}", run(some), (field[some] for field in whole))


def check_again(bench: Bench) -> Iterator[float]:
    """The same input gives the same bits, forward and backward."""
    rows, vocab, size = bench.heads[-1]
    dtype = bench.dtypes[-1]
    hidden, weight, tokens = bench.head(rows, vocab, size, dtype)
    ones, mask = torch.ones(rows, device=bench.device), torch.ones(rows, dtype=torch.bool, device=bench.device)

    def run() -> list[Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        x = (hidden @ weight.T).requires_grad_()
        scores = ours.linear_token_logprobs(h, w, tokens, with_entropy=True)
        loss = ours.linear_policy_loss(h, w, tokens, -9 * ones, ones, mask=mask, denominator=3.0).loss
        other = ours.policy_loss(x, tokens, -9 * ones, ones, mask=mask, denominator=3.0).loss
        kl = ours.exact_kl(x, x.detach().flip(0)).sum()
        return [*torch.autograd.grad(scores.logprobs.sum() + loss + other + kl, (h, w, x)), *scores[:3], loss, kl]

    same_bits("a second run", run(), run())
    yield 0.0


def check_graphs(bench: Bench) -> Iterator[float]:
    """Captured in a CUDA graph and replayed on other numbers; on a stream that is not the default one."""
    if not bench.gpu:
        return
    rows, vocab, size = 257, 50257, 896
    hidden, weight, tokens = bench.head(rows, vocab, size, torch.bfloat16)
    logits, ones = hidden @ weight.T, torch.ones(rows, device="cuda")
    mask = tokens % 3 > 0
    rewards, values, counts = bench.normal(64, 5000), bench.normal(64, 5000, seed=1), bench.normal(64, 5000, seed=2) > 0

    def run() -> tuple[Tensor, ...]:
        spec = ours.PolicyLossSpec(entropy_coef=0.01)
        options = {"mask": mask, "denominator": 3.0, "loss": spec}
        return (
            ours.token_logprobs(logits, tokens, mask=mask).logprobs,
            ours.policy_loss(logits, tokens, -9 * ones, ones, **options).loss,
            ours.exact_kl(logits, logits.flip(0)),
            ours.linear_token_logprobs(hidden, weight, tokens, method="fused").logprobs,
            ours.linear_token_logprobs(hidden, weight, tokens).logprobs,
            *ours.gae(rewards, values, counts, gamma=0.99, lam=0.95),
            ours.kl_shaped_gae(
                rewards[:, 0], rewards, values, values, counts, kl_coef=0.1, gamma=0.99, lam=0.95
            ).moments,
        )

    side = torch.cuda.Stream()
    expected = run()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        aside = run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    same_bits("on another stream", aside, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    hidden.copy_(hidden.flip(0))
    logits.copy_(hidden @ weight.T)
    rewards.copy_(rewards.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    same_bits("replayed", captured, run())
    yield 0.0


def check_devices(bench: Bench) -> Iterator[float]:
    """Tensors on the second device while the first is current."""
    if not bench.gpu or torch.cuda.device_count() < 2:
        return
    logits, tokens = bench.normal(63, 257), bench.tokens(63, 257)
    with torch.cuda.device(0):
        there = ours.token_logprobs(logits.to("cuda:1"), tokens.to("cuda:1")).logprobs
    same_bits("on cuda:1", [there.cpu()], [ours.token_logprobs(logits, tokens).logprobs.cpu()])
    yield 0.0


CHECKS = (
    check_logits, check_resident, check_heads, check_scans, check_batches, check_again, check_graphs, check_devices,
)  # fmt: skip


def run(device: str, only: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """One result per check, of `only` these names: what it holds, the largest error, seconds, and what was wrong."""
    bench = Bench(device)
    backend(bench.kernels)
    for check in CHECKS:
        if only is not None and check.__name__ not in only:
            continue
        began, wrong, errors = time.perf_counter(), None, []
        try:
            errors = list(check(bench))
        except Exception as problem:  # any failure is the finding; the next check is another matter
            wrong = f"{type(problem).__name__}: {str(problem)[:500]}"
        what = (check.__doc__ or "").splitlines()[0]
        seconds = round(time.perf_counter() - began, 1)
        outcome = "failed" if wrong else "passed" if errors else "not here"
        yield {"check": check.__name__, "what": what, "outcome": outcome, "error": max(errors, default=None),
               "seconds": seconds, "wrong": wrong}  # fmt: skip
