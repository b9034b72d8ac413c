"""From hidden states to log-probabilities in one kernel: right, and the same bits in any batch."""

import math

import pytest
import torch
from rlhf_kernels import linear_token_logprobs, token_logprobs
from rlhf_kernels.rows import Transform, row_stats_reference
from rlhf_kernels.triton_linear import Tile, can_describe, linear_stats_triton, tile_for_device

# bfloat16 products are wrong in the interpreter: float32 operands stand for them
SMALL = Tile(16, 32, 16, 1, 1)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def problem(num_rows, vocab, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, size, generator=generator)
    weight = torch.randn(vocab, size, generator=generator) * 3 / size**0.5
    return hidden, weight, torch.randint(vocab, (num_rows,), generator=generator)


def exact(hidden, weight, bias, tokens, transform, with_entropy):
    logits = hidden.double() @ weight.double().T
    logits = logits if bias is None else logits + bias.double()
    return row_stats_reference(logits, tokens, transform, with_entropy=with_entropy)


def same(ours, theirs):
    for x, y in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(x.double(), y.double(), equal_nan=True, **CLOSE)
    assert torch.equal(ours[-1], theirs[-1])


@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize(
    ("num_rows", "vocab", "size"),
    [(1, 1, 4), (16, 32, 16), (17, 300, 20), (5, 600, 36)],  # one tile, ragged, more than one piece
    ids=str,
)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_matches_float64(num_rows, vocab, size, descriptors, with_entropy):
    hidden, weight, tokens = problem(num_rows, vocab, size)
    ours = linear_stats_triton(
        hidden, weight, None, tokens, Transform(), with_entropy=with_entropy, tile=SMALL, descriptors=descriptors
    )
    same(ours, exact(hidden, weight, None, tokens, Transform(), with_entropy))


def test_every_option():
    hidden, weight, tokens = problem(9, 70, 12)
    bias = torch.randn(70, generator=torch.Generator().manual_seed(1))
    bias[32:64] = -math.inf  # a whole tile that cannot be said
    tokens[tokens.ge(32) & tokens.lt(64)] = 0
    tokens[3] = 40  # chosen all the same: log-probability -inf
    transform = Transform(1.0, torch.rand(9, generator=torch.Generator().manual_seed(2)) + 0.5, 0.0, 1.3)
    ours = linear_stats_triton(hidden, weight, bias, tokens, transform, with_entropy=True)
    assert ours.logprobs[3] == -math.inf
    same(ours, exact(hidden, weight, bias, tokens, transform, True))
    capped = transform._replace(softcap=4.0)
    bias = bias.clamp(min=-9)
    ours = linear_stats_triton(hidden, weight, bias, tokens, capped, with_entropy=True)
    same(ours, exact(hidden, weight, bias, tokens, capped, True))


@pytest.mark.parametrize("descriptors", [True, False])
def test_a_row_has_the_same_bits_in_any_batch(descriptors):
    hidden, weight, tokens = problem(40, 600, 20)

    def run(rows):
        stats = linear_stats_triton(
            hidden[rows], weight, None, tokens[rows], Transform(temperature=0.7), with_entropy=True, tile=SMALL,
            descriptors=descriptors,
        )  # fmt: skip
        return torch.stack([field.float() for field in stats])

    whole = run(torch.arange(40))
    generator = torch.Generator().manual_seed(3)
    some = [torch.randperm(40, generator=generator)[:count] for count in (40, 17, 16, 3)]
    for rows in (*some, torch.tensor([39]), torch.tensor([7, 7, 0, 7])):
        assert torch.equal(run(rows), whole[:, rows])


@pytest.mark.parametrize("group_bytes", [16 * 80, 32 * 80, 8 << 20])
def test_the_order_of_the_work_changes_no_bit(group_bytes, monkeypatch):
    from rlhf_kernels import triton_linear

    hidden, weight, tokens = problem(70, 300, 20)  # five blocks of rows: groups of one, of two and two and one, of all
    whole = linear_stats_triton(hidden, weight, None, tokens, Transform(), with_entropy=True, tile=SMALL)
    monkeypatch.setattr(triton_linear, "GROUP_BYTES", group_bytes)
    grouped = linear_stats_triton(hidden, weight, None, tokens, Transform(), with_entropy=True, tile=SMALL)
    assert all(torch.equal(x, y) for x, y in zip(grouped, whole, strict=True))
    same(grouped, exact(hidden, weight, None, tokens, Transform(), True))


def test_the_number_of_programs_changes_no_bit(monkeypatch):
    from rlhf_kernels import triton_linear

    hidden, weight, tokens = problem(40, 600, 20)
    results = []
    for count in (1, 3, 1000):
        monkeypatch.setattr(triton_linear, "num_programs", lambda device, count=count: count)
        results.append(linear_stats_triton(hidden, weight, None, tokens, Transform(), with_entropy=True, tile=SMALL))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_nan_and_unknown_ids_stay_in_their_rows():
    hidden, weight, tokens = problem(20, 70, 12)
    hidden[4, 3] = math.nan
    tokens[7], tokens[9] = 70, -1
    ours = linear_stats_triton(hidden, weight, None, tokens, Transform(), with_entropy=True, tile=SMALL)
    assert ours.logprobs.isnan().nonzero()[:, 0].tolist() == [4, 7, 9]
    assert not ours.is_argmax[[4, 7, 9]].any()
    kept = torch.tensor([i for i in range(20) if i not in (4, 7, 9)])
    expected = exact(hidden[kept], weight, None, tokens[kept], Transform(), True)
    same([field[kept] for field in ours], expected)


def test_a_nan_at_the_token_alone_is_not_forgotten():
    hidden, weight, tokens = problem(3, 70, 12)
    weight[int(tokens[1])] = math.nan
    ours = linear_stats_triton(hidden, weight, None, tokens, Transform(), with_entropy=True, tile=SMALL)
    assert ours.logprobs.isnan().all()  # every row sees that column, as its token or among the others


@pytest.mark.parametrize("how", ["rows apart", "columns apart", "odd row", "one row, repeated"])
def test_any_strides(how):
    hidden, weight, tokens = problem(17, 70, 12)
    if how == "one row, repeated":  # the copy engine refuses rows that overlap
        hidden = hidden[:1].expand(17, 12)
        assert not can_describe(hidden)
    expected = exact(hidden, weight, None, tokens, Transform(), False)
    if how == "one row, repeated":
        pass
    elif how == "rows apart":
        hidden, weight = torch.cat((hidden, hidden), 1)[:, :12], torch.cat((weight, weight), 1)[:, :12]
    elif how == "columns apart":
        hidden, weight = hidden.T.contiguous().T, weight.T.contiguous().T
    else:  # 13 floats a row: no 16-byte boundary, so pointers
        hidden, weight = (torch.nn.functional.pad(x, (0, 1))[:, :12] for x in (hidden, weight))
        assert not can_describe(hidden)
    ours = linear_stats_triton(hidden, weight, None, tokens, Transform(), with_entropy=False, tile=SMALL)
    same(ours, expected)


def test_rows_of_the_weight_far_apart():
    # the offset of the last row does not fit in 32 bits; the memory in between is never touched
    storage = torch.UntypedStorage(4 * (2**31 + 64))
    weight = torch.tensor([], dtype=torch.float32).set_(storage).as_strided((3, 16), (2**30 + 16, 1))
    near, hidden = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), torch.ones(2, 16)
    weight.copy_(near)
    tokens = torch.tensor([2, 0])
    ours = linear_stats_triton(
        hidden, weight, None, tokens, Transform(), with_entropy=False, tile=SMALL, descriptors=False
    )
    same(ours, exact(hidden, near, None, tokens, Transform(), False))


@pytest.mark.parametrize("with_mask", [False, True])
def test_the_op_and_its_gradients(both, with_mask):
    hidden, weight, tokens = problem(10, 70, 12)
    hidden, tokens = hidden.view(2, 5, 12), tokens.view(2, 5)
    bias, factor = torch.randn(70), torch.randn(2, 5)
    mask = torch.rand(2, 5) > 0.4 if with_mask else None

    def use(dtype):
        h, w, b = (x.to(dtype).requires_grad_() for x in (hidden, weight, bias))
        result = linear_token_logprobs(
            h, w, tokens, bias=b, mask=mask, with_entropy=True, temperature=0.8, chunk_rows=3,
            method="fused" if dtype == torch.float32 else "chunked",
        )  # fmt: skip
        total = (result.logprobs * factor + result.entropy + result.logsumexp).sum()
        return *result, *torch.autograd.grad(total, (h, w, b))

    for x, y in zip(*both(use), strict=True):
        torch.testing.assert_close(x.double(), y.double(), **CLOSE)


def test_no_row_counts(monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "triton")
    hidden, weight, tokens = problem(4, 70, 12)
    result = linear_token_logprobs(hidden, weight, tokens, mask=torch.zeros(4, dtype=torch.bool), method="fused")
    assert result.logprobs.eq(0).all()


def test_log_probabilities_are_those_of_the_logits(monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "triton")
    hidden, weight, tokens = problem(6, 70, 12)
    fused = linear_token_logprobs(hidden, weight, tokens, method="fused", with_entropy=True)
    whole = token_logprobs(hidden @ weight.T, tokens, with_entropy=True)
    torch.testing.assert_close(tuple(fused), tuple(whole), **CLOSE)


def test_the_trainer_scores_by_it_what_it_scores_by_chunks(monkeypatch):
    logprobs = pytest.importorskip("rlhf_lightning.core.logprobs")
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "triton")
    hidden, weight, tokens = problem(10, 70, 12)
    hidden, tokens, mask = hidden.view(2, 5, 12), tokens.view(2, 5), torch.rand(2, 5) > 0.3
    chunked, fused = (
        logprobs.token_scores(
            hidden, tokens, mask, logprobs.LMHead(weight, softcap=5.0, method=method), temperature=0.8,
            with_entropy=True,
        )
        for method in ("chunked", "fused")
    )  # fmt: skip
    torch.testing.assert_close(fused.logprobs, chunked.logprobs, **CLOSE)
    torch.testing.assert_close(fused.entropy, chunked.entropy, **CLOSE)
    assert torch.equal(fused.is_argmax, chunked.is_argmax)


def test_fused_compiles_into_one_graph(monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "triton")
    hidden, weight, tokens = problem(3, 40, 12)

    def use(h, w):
        return linear_token_logprobs(h, w, tokens, method="fused").logprobs.sum()

    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = torch.autograd.grad(use(h, w), (h, w))
    compiled = torch.compile(use, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(h, w), (h, w)), expected)


@pytest.mark.parametrize("some", [1, 4, 64])
def test_however_many_pieces_are_merged_at_a_time(some, monkeypatch):
    from rlhf_kernels import triton_linear

    monkeypatch.setattr(triton_linear, "MERGE_PIECES", some)
    hidden, weight, tokens = problem(37, 300, 20)  # ten pieces
    bias = torch.zeros(300)
    bias[32:96] = -math.inf  # two of which cannot be said
    tokens[tokens.ge(32) & tokens.lt(96)] = 0
    ours = linear_stats_triton(
        hidden, weight, bias, tokens, Transform(), with_entropy=True, tile=SMALL._replace(piece=1)
    )
    same(ours, exact(hidden, weight, bias, tokens, Transform(), True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", [16, 64, 100, 136], ids=str)
def test_rounded_sums_are_those_of_tensor_cores_where_nothing_is_cut_off(dtype, size):
    # the interpreter adds in rounded float32 either way, in another order: H is a whole number of groups, or is not
    hidden, weight, tokens = (x.to(dtype) if x.is_floating_point() else x for x in problem(20, 70, size))
    scores = linear_token_logprobs(hidden, weight, tokens, method="fused", sums="rounded", with_entropy=True)
    plain = linear_token_logprobs(hidden, weight, tokens, method="fused", with_entropy=True)
    expected = exact(hidden, weight, None, tokens, Transform(), True)
    torch.testing.assert_close(scores.logprobs.double(), expected.logprobs, **CLOSE)
    torch.testing.assert_close(scores.entropy.double(), expected.entropy, **CLOSE)
    torch.testing.assert_close(scores.logprobs, plain.logprobs, **CLOSE)
    assert torch.equal(scores.logprobs, plain.logprobs) == (size <= 64)  # one group of the interpreter's, or more


def test_rounded_sums_are_of_256_products_whatever_the_tile():
    for dtype, aligned, shared in (
        (torch.bfloat16, True, 227),
        (torch.float16, True, 163),
        (torch.bfloat16, False, 64),
    ):
        tile = tile_for_device(dtype, aligned, shared << 10, rounded=True)
        assert tile.promote * tile.depth == 256
        assert tile_for_device(dtype, aligned, shared << 10).promote == 0
    # operands of float32 are never on tensor cores
    assert tile_for_device(torch.float32, True, 227 << 10, rounded=True).promote == 0


def test_tiles_fit_in_shared_memory():
    for shared, columns in ((227, 256), (163, 128), (99, 128), (64, 128)):
        tile = tile_for_device(torch.bfloat16, True, shared << 10)
        loads = (tile.rows + tile.columns) * tile.depth * tile.stages
        stored = tile.rows * tile.columns // tile.parts if shared == 227 else 0
        assert tile.columns == columns
        assert (loads + stored) * 2 + 1024 <= shared << 10


def test_a_tile_in_parts_has_the_bits_of_as_many_small_tiles():
    hidden, weight, tokens = problem(20, 300, 16)
    expected = exact(hidden, weight, None, tokens, Transform(), True)
    whole, quarters = SMALL._replace(columns=16, piece=4), SMALL._replace(columns=64, parts=4, piece=1)
    one = linear_stats_triton(hidden, weight, None, tokens, Transform(), with_entropy=True, tile=whole)
    same(one, expected)
    # 16 columns at a time either way, 64 in a piece: the same sums in the same order
    other = linear_stats_triton(hidden, weight, None, tokens, Transform(), with_entropy=True, tile=quarters)
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("size", [16, 20])
def test_rounded_sums_of_operands_that_begin_anywhere(size):
    hidden, weight, tokens = problem(20, 70, size)
    room = torch.zeros(20 * size + 1)
    elsewhere = room[1:].view(20, size)
    elsewhere.copy_(hidden)
    assert not can_describe(elsewhere)
    scores = linear_token_logprobs(elsewhere, weight, tokens, method="fused", sums="rounded").logprobs
    assert torch.equal(scores, linear_token_logprobs(hidden, weight, tokens, method="fused", sums="rounded").logprobs)
