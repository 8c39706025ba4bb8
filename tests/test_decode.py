"""`attention_decode` against the reference: caches, pages, rotary embedding, quantisation; and refusals."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from problems import DTYPES
from torch import Tensor

import attn_ext
from attn_ext import Causal, SlidingWindow, attention_decode, testing

HEAD_DIMS = (1, 3, 16, 17, 31, 33, 40, 64, 80, 96, 128, 256)
LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 130, 255, 256, 257, 511, 512, 513, 700, 1030)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class Problem:
    """Sequences of random keys and values in a cache in which all else is NaN.

    The last `appended` tokens of each are not in the cache yet, but given as new_key and new_value.
    """

    def __init__(
        self,
        lengths: tuple[int, ...],
        *,
        heads: int = 2,
        group: int = 1,
        query_len: int = 1,
        appended: int = 0,
        head_dim: int = 16,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        page_size: int | None = None,
    ) -> None:
        batch, columns = len(lengths), (head_dim, head_dim if value_dim is None else value_dim)
        self.query = torch.randn(batch, heads * group, query_len, head_dim, dtype=dtype)
        self.keys, self.values = ([torch.randn(heads, n, d, dtype=dtype) for n in lengths] for d in columns)
        self.seqlens = torch.tensor(lengths, dtype=torch.int32) - appended
        self.new = {}
        if appended:
            for name, rows in (("new_key", self.keys), ("new_value", self.values)):
                self.new[name] = torch.stack([row[:, row.size(1) - appended :] for row in rows])
        self.table, pages, rows = None, batch, max(lengths) + 3
        if page_size is not None:
            each = -(-max(lengths) // page_size) + 1
            pages, rows = batch * each + 2, page_size
            self.table = torch.randperm(pages)[: batch * each].view(batch, each)
        self.key_cache, self.value_cache = (
            torch.full((pages, heads, rows, d), torch.nan, dtype=dtype) for d in columns
        )
        for b, n in enumerate(self.seqlens.tolist()):
            for cache, rows in ((self.key_cache, self.keys[b]), (self.value_cache, self.values[b])):
                cache[self.place(b, torch.arange(n))] = rows[:, :n].transpose(0, 1)

    def place(self, b: int, tokens: Tensor) -> tuple[Tensor, slice, Tensor]:
        """The index, into a cache, of tokens of a sequence: page, all heads, and row."""
        index, row = tokens // self.key_cache.size(2), tokens % self.key_cache.size(2)
        return (torch.full_like(tokens, b) if self.table is None else self.table[b, index]), slice(None), row

    def arguments(self) -> tuple[Tensor, ...]:
        return self.query, self.key_cache, self.value_cache, self.seqlens

    def decode(self, **options: Any) -> tuple[Tensor, Tensor]:
        options = {"block_table": self.table, **self.new, **options}
        return attention_decode(*self.arguments(), **options, return_lse=True)

    def check(self, window: int | None = None, **options: Any) -> None:
        """Compares each sequence with the reference."""
        results = self.decode(window=(window, None), **options)
        mask = Causal("bottom_right")
        if window is not None:
            mask &= SlidingWindow(window, None, "bottom_right")
        scores = {name: options.get(name) for name in ("scale", "softcap", "alibi_slopes", "sinks")}
        for b, result in enumerate(zip(*results, strict=True)):
            check_sequence(self, b, result, self.query[b], mask=mask, **scores)


def check_sequence(
    problem: Problem, b: int, result: tuple[Tensor, ...], query: Tensor, **options: Any
) -> None:
    slopes = options.get("alibi_slopes")
    if slopes is not None and slopes.dim() == 2:
        options["alibi_slopes"] = slopes[b]
    out, lse = (t[None] for t in result)
    inputs = query[None], problem.keys[b][None], problem.values[b][None]
    testing.check_attention(*inputs, **options, grad=False, attention=lambda *_, **__: (out, lse))


@pytest.mark.sample(
    60,
    dtype=DTYPES,
    head_dim=HEAD_DIMS,
    value_dim=HEAD_DIMS,
    group=(1, 2, 3, 4, 5, 8, 16),
    query_len=(1, 1, 1, 2, 3, 4, 8, 16),
    page_size=(None, None, 1, 3, 16, 64),
    appends=(False, True),
    lengths=tuple((n, m) for n in LENGTHS for m in (40, n)),
)
def test_problems(case, isa):
    Problem(
        case.lengths,
        group=case.group,
        query_len=case.query_len,
        appended=min(case.query_len, *case.lengths) if case.appends else 0,
        head_dim=case.head_dim,
        value_dim=case.value_dim,
        dtype=case.dtype,
        page_size=case.page_size,
    ).check()


OPTIONS = {
    "window": {"window": 20},
    "window of one": {"window": 0},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.0])},
    "alibi per sequence": {"alibi_slopes": torch.arange(12.0).view(3, 4) / 16},
    "sinks": {"sinks": torch.tensor([0.5, -torch.inf, 3.0, -2.0])},
    "scale": {"scale": -0.3},
    "all": {
        "window": 100,
        "softcap": 5.0,
        "alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.0]),
        "sinks": torch.tensor([0.5, 1.0, 3.0, -2.0]),
        "scale": 0.5,
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("query_len", [1, 5])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, query_len, dtype, isa):
    problem = Problem((3, 90, 600), group=2, query_len=query_len, dtype=dtype, page_size=16)
    problem.check(**options)


def test_rows_with_nothing_to_attend_to(isa):
    problem = Problem((0, 2), query_len=4)
    out, lse = problem.decode()
    assert not out[0].any()
    assert (lse[0] == -torch.inf).all()
    assert not out[
        1, :, :2
    ].any()  # the sequence has two tokens: the first two of four queries are none of them
    assert (lse[1, :, :2] == -torch.inf).all()
    assert lse[1, :, 2:].isfinite().all()
    sinks = torch.tensor([1.5, -1.0])
    out, lse = problem.decode(sinks=sinks)
    assert not out[0].any()
    torch.testing.assert_close(lse[0], sinks[:, None].expand(2, 4))


@pytest.mark.parametrize("shape", [(0, 2, 1), (2, 0, 1), (2, 2, 0)])
def test_empty(shape):
    batch, heads, _ = shape
    query, cache = torch.randn(*shape, 8), torch.randn(batch, heads, 5, 8)
    out, lse = attention_decode(query, cache, cache, torch.full((batch,), 3), return_lse=True)
    assert out.shape == query.shape
    assert lse.shape == shape


@pytest.mark.parametrize("page_size", [None, 16])
def test_append_writes_the_new_rows_and_nothing_else(page_size):
    problem = Problem((4, 33, 17), query_len=2, appended=3, page_size=page_size)
    expected = []
    for cache, rows in ((problem.key_cache, problem.keys), (problem.value_cache, problem.values)):
        expected.append(cache.clone())
        for b, row in enumerate(rows):
            expected[-1][problem.place(b, torch.arange(row.size(1)))] = row.transpose(0, 1)
    problem.check()
    assert torch.equal(problem.key_cache.nan_to_num(9), expected[0].nan_to_num(9))
    assert torch.equal(problem.value_cache.nan_to_num(9), expected[1].nan_to_num(9))


def test_pages_shared_by_sequences(isa):
    """Two sequences that begin with the same two pages, and go on in pages of their own."""
    problem = Problem((40, 45), page_size=16)
    problem.table[1, :2] = problem.table[0, :2]
    for rows in (problem.keys, problem.values):
        rows[1][:, :32] = rows[0][:, :32]
    problem.check()


def test_strided_caches(isa):
    problem = Problem((70, 33), group=2, head_dim=40, value_dim=24, appended=1)
    for name in ("key_cache", "value_cache"):
        cache = getattr(problem, name)
        rows_outside_heads = cache.transpose(1, 2).contiguous().transpose(1, 2)
        wider = torch.full((*cache.shape[:3], cache.size(3) + 5), torch.nan)
        wider[..., 2:-3] = rows_outside_heads
        setattr(problem, name, wider[..., 2:-3])
    problem.query = problem.query.mT.contiguous().mT
    problem.seqlens = problem.seqlens.repeat_interleave(2)[::2]
    problem.check()


def test_table_of_any_kind():
    problem = Problem((70, 33), page_size=8)
    expected = problem.decode()
    problem.table = problem.table.int().repeat_interleave(3, dim=1)[:, ::3]
    problem.seqlens = problem.seqlens.long()
    assert torch.equal(problem.decode()[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_key_that_only_later_queries_see(dtype, isa):
    problem = Problem((30,), group=4, query_len=3, dtype=dtype, head_dim=64)
    expected = problem.decode()
    at = problem.place(0, torch.tensor([28]))
    problem.key_cache[at] = torch.inf
    problem.value_cache[at] = torch.nan
    actual = problem.decode()
    for before, after in zip(expected, actual, strict=True):
        assert torch.equal(before[:, :, 0], after[:, :, 0])
        assert after[:, :, 1:].isnan().any()


def test_what_is_before_the_window_is_not_read():
    problem = Problem((64, 50), query_len=2, page_size=8)
    expected = problem.decode(window=(9, 0))
    problem.table[0, :6] = -1  # tokens 0 to 47; the first query, token 62, sees 53 to 62
    problem.table[1, :4] = 10**6
    assert torch.equal(problem.decode(window=(9, 0))[0], expected[0])


# --- Rotary embedding ---------------------------------------------------------------------------------------


def rotate(x: Tensor, start: int, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """(H, L, D) from position `start` on, as complex numbers."""
    half = cos.size(1)
    turned = x[..., : 2 * half].double()
    pairs = turned.unflatten(-1, (half, 2)) if interleaved else turned.unflatten(-1, (2, half)).mT
    angle = torch.complex(cos.double(), sin.double())[start : start + x.size(1)]
    result = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * angle)
    return torch.cat(
        ((result if interleaved else result.mT).flatten(-2), x[..., 2 * half :].double()), dim=-1
    )


def tables(positions: int, half: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = torch.arange(positions)[:, None] * 100.0 ** -(torch.arange(half) / half)
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("columns", [2, 8, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(dtype, columns, interleaved, isa):
    problem = Problem((3, 90), query_len=3, appended=2, head_dim=20, dtype=dtype, page_size=16)
    for wide in {dtype, torch.promote_types(dtype, torch.float32)}:
        cos, sin = tables(90, columns // 2, wide)
        results = problem.decode(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved)
        for b, result in enumerate(zip(*results, strict=True)):
            key, total = problem.keys[b], problem.keys[b].size(1)
            turned = rotate(key[:, -2:], total - 2, cos, sin, interleaved)
            stored = problem.key_cache[problem.place(b, torch.arange(total - 2, total))].transpose(0, 1)
            torch.testing.assert_close(stored, turned.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
            problem.keys[b] = torch.cat((key[:, :-2], stored), dim=1)
            query = rotate(problem.query[b], total - 3, cos, sin, interleaved).to(dtype)
            check_sequence(problem, b, result, query, mask=Causal("bottom_right"))
            problem.keys[b] = key


# --- Quantised caches ---------------------------------------------------------------------------------------


def quantise(problem: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """Makes the cache one of `dtype`, and its contents what that can hold; returns the scales."""
    scales = {}
    for name, cache, rows in (
        ("key_scale", "key_cache", problem.keys),
        ("value_scale", "value_cache", problem.values),
    ):
        plain = getattr(problem, cache)
        scale = (0.5 + torch.rand(plain.shape[:2])) * 4 / LARGEST[dtype]
        codes = plain.float().nan_to_num(1) / scale[:, :, None, None]
        codes = codes.round().clamp(-127, 127) if dtype == torch.int8 else codes.clamp(-448, 448)
        setattr(problem, cache, codes.to(dtype))
        dequantised = codes.to(dtype).float() * scale[:, :, None, None]
        for b, row in enumerate(rows):
            rows[b] = dequantised[problem.place(b, torch.arange(row.size(1)))].transpose(0, 1).to(row.dtype)
        scales[name] = scale
    return scales


@pytest.mark.sample(
    24,
    cache=tuple(LARGEST),
    dtype=(torch.float32, torch.bfloat16, torch.float16),
    head_dim=HEAD_DIMS,
    group=(1, 4, 7),
    query_len=(1, 3),
    page_size=(None, 16, 5),
    lengths=((40, 1), (700, 300), (17, 0)),
)
def test_quantised_caches(case, isa):
    """Codes are multiplied by scales in float32: against those products it is as exact as with any cache."""
    problem = Problem(
        case.lengths,
        group=case.group,
        query_len=case.query_len,
        head_dim=case.head_dim,
        page_size=case.page_size,
    )
    scales = quantise(problem, case.cache)
    problem.query = problem.query.to(case.dtype)
    out, lse = problem.decode(**scales)
    for b in range(2):
        exact = attn_ext.reference.attention(
            *(t[None] for t in (problem.query[b], problem.keys[b], problem.values[b])),
            mask=Causal("bottom_right"),
            return_lse=True,
        )
        if case.dtype == torch.float32:
            check_sequence(problem, b, (out[b], lse[b]), problem.query[b], mask=Causal("bottom_right"))
        else:  # the reference's keys are not of the query's dtype: rounding the output is all that is allowed
            plain = attn_ext.reference.attention(
                *(t[None] for t in (problem.query[b], problem.keys[b], problem.values[b])),
                mask=Causal("bottom_right"),
                dtype=torch.float32,
            ).to(case.dtype)
            testing.assert_within_rule(out[b : b + 1], exact[0], plain, testing.FORWARD_FACTOR)
        testing.assert_within_rule(
            lse[b : b + 1], exact[1], exact[1].float(), testing.FORWARD_FACTOR, "lse", 1e-6
        )


def test_every_code(isa):
    """One key has the weight 1: its values come out as they are, and NaN as NaN."""
    query, seqlens, scale = (
        torch.zeros(1, 1, 1, 16),
        torch.ones(1, dtype=torch.int32),
        torch.full((1, 1), 0.25),
    )
    for dtype in LARGEST:
        codes = torch.arange(-128, 128, dtype=torch.int8).view(dtype).view(1, 1, 1, 256)
        key = torch.zeros(1, 1, 1, 16).to(dtype)
        out = attention_decode(query, key, codes, seqlens, key_scale=scale, value_scale=scale)
        expected = codes.float() * 0.25
        torch.testing.assert_close(
            out, expected, equal_nan=True, rtol=2 * torch.finfo(torch.float32).eps, atol=0
        )


@pytest.mark.parametrize("cache", LARGEST)
def test_appended_rows_are_quantised(cache, isa):
    """To the nearest code, ties to even, clamped; a page's own scale."""
    problem = Problem((20, 33), head_dim=128, appended=2, page_size=4)
    scales = quantise(problem, cache)
    rows = problem.new["new_key"] * 10.0 ** torch.randint(-4, 3, problem.new["new_key"].shape)
    rows[0, 0, 0, :4] = torch.tensor([1e30, -1e30, torch.inf, 0.0])
    problem.new = {"new_key": rows, "new_value": rows}
    problem.decode(**scales)
    for stored, scale in ((problem.key_cache, "key_scale"), (problem.value_cache, "value_scale")):
        for b in range(2):
            page, _, row = problem.place(b, problem.seqlens[b] + torch.arange(2))
            expected = rows[b].transpose(0, 1) / scales[scale][page][:, :, None]
            limit = LARGEST[cache]
            expected = expected.clamp(-limit, limit)
            expected = (expected.round() if cache == torch.int8 else expected).to(cache)
            assert torch.equal(stored[page, :, row].float(), expected.float())


@pytest.mark.parametrize("cache", LARGEST)
def test_scales_whose_inverse_overflows(cache):
    scale = torch.full((1, 1), 2.0**-140)
    codes = torch.tensor([0.0, 1.0, -3.0, 5.0]).expand(1, 1, 1, 4)
    caches = [torch.ones(1, 1, 2, 4).to(cache) for _ in range(2)]
    new = {"new_key": codes * scale, "new_value": codes * scale}
    attention_decode(codes, *caches, torch.tensor([1]), **new, key_scale=scale, value_scale=scale)
    for stored in caches:
        assert torch.equal(stored[:, :, 1:].float(), codes)


@pytest.mark.parametrize("cache", LARGEST)
@pytest.mark.parametrize("name", ["key_scale", "value_scale"])
def test_a_page_without_a_scale_is_not_written(name, cache):
    arguments = valid()
    arguments |= {name: arguments[name].to(cache) for name in ("key_cache", "value_cache")}
    arguments |= {"key_scale": torch.ones(6, 2), "value_scale": torch.ones(6, 2)}
    arguments[name][[0, 2, 4]] = 0  # what the first sequence filled before, and pages without tokens
    attention_decode(**arguments)
    before = arguments["key_cache"].clone()
    arguments[name][3, 1] = 0
    arguments["new_key"] = arguments["new_key"] + 1
    with pytest.raises(ValueError, match=f"{name} must not be 0 where new_key and new_value are written"):
        attention_decode(**arguments)
    assert torch.equal(arguments["key_cache"].float(), before.float())
    attention_decode(**{**arguments, "new_key": None, "new_value": None})
    whole = {
        part: arguments[part][1:5:2] for part in ("key_cache", "value_cache", "key_scale", "value_scale")
    }
    with pytest.raises(ValueError, match=f"{name} must not be 0 where"):  # without pages
        attention_decode(**{**arguments, **whole, "block_table": None, "cache_seqlens": torch.tensor([3, 3])})


@pytest.mark.parametrize("cache", LARGEST)
def test_error_of_quantisation(cache):
    """If scale = max / largest, numbers are off by at most scale / 2 (int8), |x| / 16 + scale / 1024 (fp8).

    The output's error follows: that of the values, and through the scores that of the keys.
    """
    exact = Problem((300,), group=4, head_dim=64)
    scale = {f"{name}_scale": torch.zeros(1, 2) for name in ("key", "value")}
    bound = {}
    for name, rows in (("key", exact.keys[0]), ("value", exact.values[0])):
        scale[f"{name}_scale"][0] = rows.abs().amax((1, 2)) / LARGEST[cache]
        s = scale[f"{name}_scale"][0].view(2, 1, 1)
        bound[name] = s / 2 if cache == torch.int8 else rows.abs() / 16 + s / 1024
        bound[name] = bound[name].expand_as(rows) * (1 + 1e-6)
    caches = (torch.zeros(1, 2, 300, 64).to(cache) for _ in range(2))
    new = {"new_key": exact.keys[0][None], "new_value": exact.values[0][None]}
    out = attention_decode(exact.query, *caches, torch.zeros(1, dtype=torch.int64), **new, **scale)
    key, value = (t.repeat_interleave(4, dim=0) for t in (exact.keys[0], exact.values[0]))
    key_error, value_error = (bound[name].repeat_interleave(4, dim=0) for name in ("key", "value"))
    query = exact.query[0]
    weights = torch.softmax(query @ key.mT / 8, dim=-1)
    score_error = (query.abs() @ key_error.mT / 8).amax(-1, keepdim=True)
    # Weights change by a factor within exp(+-2 e): |P' - P| <= (exp(2 e) - 1) P.
    limit = weights @ value_error + torch.expm1(2 * score_error) * (weights @ (value.abs() + value_error))
    assert ((out[0] - weights @ value).abs() <= limit).all()


# --- Splits and threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 64, 2**63 - 1])
def test_splits(num_splits, isa):
    Problem((1, 700, 1500), group=4, head_dim=64, page_size=16).check(num_splits=num_splits)


def test_a_split_has_16_keys():
    problem = Problem((700, 1500), head_dim=64)
    for splits in (1500, 2**70):
        assert torch.equal(problem.decode(num_splits=splits)[0], problem.decode(num_splits=94)[0])


@pytest.mark.parametrize("num_splits", [None, 5])
def test_threads_give_the_same_bits(num_splits, isa):
    results = []
    for threads in (1, 2):
        torch.manual_seed(1)
        problem = Problem((3000, 700), heads=4, group=2, query_len=2, appended=2, head_dim=64)
        torch.set_num_threads(threads)
        results.append((*problem.decode(num_splits=num_splits), problem.key_cache.nan_to_num(7)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_a_sequence_alone_gives_the_same_bits():
    problem = Problem((3000, 700), heads=4, head_dim=64)
    out, _ = problem.decode()
    for b in range(2):
        one = slice(b, b + 1)
        alone = attention_decode(*(t[one] for t in problem.arguments()))
        assert torch.equal(alone, out[one])


# --- Generation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("interleaved", [False, True])
def test_generation_token_by_token(page_size, interleaved, isa):
    """Prompt, single tokens and a few at once: each step equals attention over all tokens so far."""
    batch, heads, length, head_dim = 2, 2, 40, 16
    query, key, value = (torch.randn(batch, n, length, head_dim) for n in (2 * heads, heads, heads))
    cos, sin = tables(length, 4, torch.float32)
    turned = [torch.stack([rotate(x, 0, cos, sin, interleaved) for x in t]).float() for t in (query, key)]
    expected = attn_ext.attention(*turned, value, mask=Causal())
    problem = Problem((length,) * batch, heads=heads, appended=length, page_size=page_size)
    seqlens = torch.zeros(batch, dtype=torch.int32)
    for count in (9, *(1,) * 12, 3, 1, 4, *(1,) * 11):
        step = slice(int(seqlens[0]), int(seqlens[0]) + count)
        out = attention_decode(
            *(query[:, :, step], problem.key_cache, problem.value_cache, seqlens),
            block_table=problem.table,
            new_key=key[:, :, step],
            new_value=value[:, :, step],
            rotary_cos=cos,
            rotary_sin=sin,
            rotary_interleaved=interleaved,
        )
        torch.testing.assert_close(out, expected[:, :, step], rtol=1e-5, atol=1e-5)
        seqlens += count
    assert int(seqlens[0]) == length


# --- A shared prefix ----------------------------------------------------------------------------------------

PREFIX_OPTIONS = {
    "none": {},
    "window within the suffix": {"window": 3},
    "window into the prefix": {"window": 60},
    "softcap and sinks": {"softcap": 2.0, "sinks": torch.tensor([0.5, -1.0, 3.0, -2.0])},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.0])},
    "all": {
        "window": 60,
        "softcap": 5.0,
        "alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.0]),
        "sinks": torch.tensor([0.5, 1.0, 3.0, -2.0]),
        "scale": 0.5,
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("appended", [0, 3])
@pytest.mark.parametrize("options", PREFIX_OPTIONS.values(), ids=PREFIX_OPTIONS)
def test_shared_prefix(options, appended, dtype):
    problem = Problem(
        (3, 45, 1 + appended), group=2, query_len=3, appended=appended, dtype=dtype, page_size=16
    )
    prefix = tuple(torch.randn(1, 2, 50, 16, dtype=dtype) for _ in range(2))
    for rows, common in ((problem.keys, prefix[0]), (problem.values, prefix[1])):
        rows[:] = [torch.cat((common[0], row), dim=1) for row in rows]
    problem.check(shared_prefix=prefix, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shared_prefix_in_half_precision(dtype):
    """Both parts are rounded before they are merged."""
    problem = Problem((30, 45), group=2, dtype=dtype)
    prefix = tuple(torch.randn(1, 2, 50, 16, dtype=dtype) for _ in range(2))
    out, _ = problem.decode(shared_prefix=prefix)
    for b in range(2):
        key, value = (
            torch.cat((common[0], rows[b]), dim=1).double()[None]
            for common, rows in zip(prefix, (problem.keys, problem.values), strict=True)
        )
        exact = attn_ext.reference.attention(problem.query[b : b + 1], key, value)
        testing.assert_within_rule(out[b : b + 1], exact, exact.to(dtype), testing.FORWARD_FACTOR)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_positions_count_from_the_shared_prefix(interleaved):
    problem = Problem((4, 30), query_len=2, appended=2)
    prefix = tuple(torch.randn(1, 2, 20, 16) for _ in range(2))
    cos, sin = tables(50, 6, torch.float32)
    out, _ = problem.decode(
        shared_prefix=prefix, rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved
    )
    for b in range(2):
        start = 20 + problem.keys[b].size(1) - 2
        query, new = (
            rotate(t, start, cos, sin, interleaved) for t in (problem.query[b], problem.keys[b][:, -2:])
        )
        key = torch.cat((prefix[0][0], problem.keys[b][:, :-2], new), dim=1)
        value = torch.cat((prefix[1][0], problem.values[b]), dim=1)
        exact = attn_ext.reference.attention(query[None], key[None], value[None], mask=Causal("bottom_right"))
        torch.testing.assert_close(out[b : b + 1].double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache", [torch.bfloat16, *LARGEST])
def test_a_prefix_leaves_what_is_appended_as_it_is(cache):
    """To the bit: rotated keys are rounded once."""
    problem = Problem((4, 30), appended=2, dtype=torch.bfloat16, head_dim=64)
    scales = quantise(problem, cache) if cache in LARGEST else {}
    cos, sin = tables(50, 32, torch.float32)
    stored = []
    for length in (0, 20):
        prefix = tuple(torch.randn(1, 2, length, 64, dtype=torch.bfloat16) for _ in range(2))
        rows = {"rotary_cos": cos[20 - length :], "rotary_sin": sin[20 - length :]}
        problem.decode(shared_prefix=prefix if length else None, **rows, **scales)
        stored.append(problem.key_cache.float().nan_to_num(9))
    assert torch.equal(*stored)


# --- What is refused ----------------------------------------------------------------------------------------


def valid() -> dict[str, Any]:
    cache = torch.randn(6, 2, 4, 8)
    return {
        "query": torch.randn(2, 4, 1, 8),
        "key_cache": cache,
        "value_cache": cache.clone(),
        "cache_seqlens": torch.tensor([7, 3]),
        "block_table": torch.tensor([[4, 1, 0], [3, 5, 2]]),
        "new_key": torch.randn(2, 2, 1, 8),
        "new_value": torch.randn(2, 2, 1, 8),
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": 3}, TypeError, "query must be a torch.Tensor, got int"),
        ({"query": torch.zeros(2, 4, 1, 8).int()}, TypeError, "query must be float32 or"),
        ({"query": torch.zeros(2, 4, 8)}, ValueError, "query must be (B, H, L, D), got shape (2, 4, 8)"),
        (
            {"query": torch.zeros(2, 4, 1, 8).double()},
            TypeError,
            "key_cache must be float64, got torch.float32",
        ),
        (
            {"query": torch.zeros(2, 3, 1, 8)},
            ValueError,
            "must be a multiple of those of key_cache, got 3 and 2",
        ),
        ({"query": torch.zeros(2, 4, 1, 9)}, ValueError, "key_cache must be (6, 2, 4, 9)"),
        ({"key_cache": torch.zeros(6, 2, 8)}, ValueError, "key_cache must be (num_pages, Hkv, page_size, D)"),
        ({"key_cache": torch.zeros(6, 2, 8, 4).mT}, ValueError, "key_cache must have adjacent columns"),
        ({"value_cache": torch.zeros(6, 2, 5, 8)}, ValueError, "value_cache must be (6, 2, 4, 8)"),
        (
            {"value_cache": torch.zeros(6, 2, 4, 8).half()},
            TypeError,
            "value_cache must be float32, got torch.float16",
        ),
        ({"block_table": None}, ValueError, "key_cache must hold 2 sequences"),
        (
            {"block_table": torch.zeros(2, 3)},
            TypeError,
            "block_table must be int32 or int64, got torch.float32",
        ),
        ({"block_table": torch.zeros(3, 3).int()}, ValueError, "block_table must be (2, 3)"),
        ({"cache_seqlens": [7, 3]}, TypeError, "cache_seqlens must be a torch.Tensor, got list"),
        ({"cache_seqlens": torch.ones(2).short()}, TypeError, "cache_seqlens must be int32 or int64"),
        ({"cache_seqlens": torch.ones(3).int()}, ValueError, "cache_seqlens must be (2,)"),
        ({"new_key": None}, ValueError, "new_key and new_value must be given together"),
        ({"new_key": torch.zeros(2, 2, 1, 8).half()}, TypeError, "new_key must be float32"),
        ({"new_key": torch.zeros(2, 4, 1, 8)}, ValueError, "new_key must be (2, 2, 1, 8)"),
        ({"new_value": torch.zeros(2, 2, 2, 8)}, ValueError, "new_value must be (2, 2, 1, 8)"),
        ({"rotary_cos": torch.zeros(9, 4)}, ValueError, "rotary_cos and rotary_sin must be given together"),
        (
            {"rotary_cos": torch.zeros(9, 5), "rotary_sin": torch.zeros(9, 5)},
            ValueError,
            "rotary_cos must be (positions, r / 2)",
        ),
        (
            {"rotary_cos": torch.zeros(9, 4).half(), "rotary_sin": torch.zeros(9, 4)},
            TypeError,
            "rotary_cos must be float32",
        ),
        (
            {"rotary_cos": torch.zeros(7, 4), "rotary_sin": torch.zeros(7, 4)},
            ValueError,
            "got 7 rows for 8 tokens",
        ),
        ({"rotary_interleaved": 1}, TypeError, "rotary_interleaved must be a bool"),
        ({"key_scale": torch.ones(6, 2)}, ValueError, "key_scale must be None for caches of torch.float32"),
        ({"shared_prefix": torch.zeros(1)}, TypeError, "shared_prefix must be a pair of tensors"),
        (
            {"shared_prefix": (torch.zeros(1, 4, 3, 8),) * 2},
            ValueError,
            "shared_prefix[0] must be (1, 2, 3, 8)",
        ),
        ({"window": 3}, TypeError, "window must be a pair"),
        ({"window": (1.5, 0)}, TypeError, "window must hold ints or None, got float for left"),
        ({"window": (True, 0)}, TypeError, "window must hold ints or None, got bool for left"),
        ({"window": (0, True)}, TypeError, "window must hold ints or None, got bool for right"),
        ({"window": (0, 1.5)}, TypeError, "window must hold ints or None, got float for right"),
        ({"window": (-1, 0)}, ValueError, "window must not be negative (None is no bound), got left=-1"),
        ({"window": (None, -1)}, ValueError, "window must not be negative (None is no bound), got right=-1"),
        ({"softcap": -1.0}, ValueError, "softcap must be a finite number"),
        ({"softcap": True}, TypeError, "softcap must be a float or None, got bool"),
        ({"softcap": float("inf")}, ValueError, "softcap must be a finite number"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"alibi_slopes": torch.ones(3)}, ValueError, "alibi_slopes must have shape (4,)"),
        ({"alibi_slopes": torch.ones(4).int()}, TypeError, "alibi_slopes must be float32"),
        (
            {"alibi_slopes": torch.ones(2, 4), "shared_prefix": (torch.zeros(1, 2, 3, 8),) * 2},
            ValueError,
            "alibi_slopes must have shape (4,)",
        ),
        ({"sinks": torch.ones(2)}, ValueError, "sinks must have shape (4,)"),
        ({"num_splits": 0}, ValueError, "num_splits must be positive, got 0"),
        ({"num_splits": 1.5}, TypeError, "num_splits must be an int or None, got float"),
        ({"num_splits": True}, TypeError, "num_splits must be an int or None, got bool"),
        (
            {
                "shared_prefix": (torch.zeros(1, 2, 9, 8),) * 2,
                "rotary_cos": torch.zeros(7, 4),
                "rotary_sin": torch.zeros(7, 4),
            },
            ValueError,
            "rotary_cos must have a row for each token, got 7 rows for 17 tokens",
        ),
        (
            {
                "shared_prefix": (torch.zeros(1, 2, 3, 8),) * 2,
                "rotary_cos": torch.zeros(20, 4),
                "rotary_sin": torch.zeros(20, 1),
            },
            ValueError,
            "rotary_sin must be (20, 4)",
        ),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        attention_decode(**{**valid(), **changes})


@pytest.mark.parametrize("cache", LARGEST)
def test_errors_of_quantised_caches(cache):
    arguments = valid()
    arguments |= {name: arguments[name].to(cache) for name in ("key_cache", "value_cache")}
    scales = {"key_scale": torch.ones(6, 2), "value_scale": torch.ones(6, 2)}
    attention_decode(**arguments, **scales)
    for changes, error, message in (
        ({"key_scale": None}, ValueError, "key_scale must be given for caches of"),
        ({"value_scale": torch.ones(2)}, ValueError, "value_scale must be (6, 2)"),
        ({"value_scale": torch.ones(6, 2).double()}, TypeError, "value_scale must be float32"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            attention_decode(**arguments, **{**scales, **changes})


HUGE = 2**62
HOSTILE = [
    ({"cache_seqlens": torch.tensor([7, -1])}, "cache_seqlens must be from 0 to 11"),
    ({"cache_seqlens": torch.tensor([12, 3])}, "cache_seqlens must be from 0 to 11"),
    ({"cache_seqlens": torch.tensor([7, HUGE])}, "cache_seqlens must be from 0 to 11"),
    ({"cache_seqlens": torch.tensor([7, -HUGE])}, "cache_seqlens must be from 0 to 11"),
    ({"block_table": torch.tensor([[4, 1, 0], [6, 5, 2]])}, "block_table must hold pages from 0 to 5"),
    ({"block_table": torch.tensor([[4, -1, 0], [3, 5, 2]])}, "block_table must hold pages from 0 to 5"),
    ({"block_table": torch.tensor([[4, 1, 0], [HUGE, 5, 2]])}, "block_table must hold pages from 0 to 5"),
    ({"block_table": torch.tensor([[4, 1, 0], [-HUGE, 5, 2]])}, "block_table must hold pages from 0 to 5"),
    ({"block_table": torch.zeros(2, 0, dtype=torch.int32)}, "new_key must fit the cache, got 1 tokens for"),
    ({name: torch.zeros(0, 2, 4, 8) for name in ("key_cache", "value_cache")}, "no page of an empty cache"),
]


@pytest.mark.parametrize(("changes", "message"), HOSTILE)
def test_hostile_indices(changes, message):
    """They raise, and nothing was written; the operator, called directly, refuses them too."""
    arguments = {**valid(), **changes}
    caches = [arguments[name].clone() for name in ("key_cache", "value_cache")]
    with pytest.raises(ValueError, match=message):
        attention_decode(**arguments)
    with pytest.raises(RuntimeError, match=r"(cache_seqlens|block_table) must hold"):
        torch.ops.attn_ext.attention_decode(*operator_arguments(arguments))
    assert torch.equal(arguments["key_cache"], caches[0])
    assert torch.equal(arguments["value_cache"], caches[1])


def test_entries_of_pages_without_tokens_may_be_anything():
    arguments = valid()
    expected = attention_decode(**arguments)
    arguments["block_table"] = torch.tensor([[4, 1, -HUGE], [3, HUGE, 99]])  # 8 and 4 tokens in pages of 4
    assert torch.equal(attention_decode(**arguments), expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (torch.zeros(1, 2, 4, 8).expand(6, -1, -1, -1), torch.zeros(6, 2, 4, 8), "key_cache .* itself"),
        (torch.zeros(6, 2, 4, 8), torch.zeros(6, 2, 1, 8).expand(-1, -1, 4, -1), "value_cache .* itself"),
        (*(torch.zeros(6, 2, 4, 8),) * 2, "key_cache and value_cache must not overlap"),
        (*torch.zeros(6, 2, 4, 15).unfold(3, 8, 7).unbind(3), "key_cache and value_cache must not overlap"),
    ],
)
def test_caches_that_overlap_are_not_written(key, value, message):
    arguments = {**valid(), "key_cache": key, "value_cache": value}
    with pytest.raises(ValueError, match=message):
        attention_decode(**arguments)
    assert not key.any()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.attn_ext.attention_decode(*operator_arguments(arguments))
    nothing = {name: arguments[name][:, :, :0] for name in ("new_key", "new_value")}
    for unwritten in (nothing, dict.fromkeys(nothing)):
        attention_decode(**{**arguments, **unwritten})


def pages_in_two_orders() -> tuple[Tensor, Tensor]:
    """Keys have rows inside heads, values heads inside rows."""
    key, value = torch.zeros(6, 128).chunk(2, dim=1)
    return key.unflatten(1, (2, 4, 8)), value.unflatten(1, (4, 2, 8)).transpose(1, 2)


@pytest.mark.parametrize(
    "both",
    [
        torch.zeros(6, 2, 2, 4, 8).unbind(1),  # each page: keys, values
        torch.zeros(6, 2, 4, 2, 8).unbind(3),  # each row
        torch.zeros(6, 2, 4, 16).chunk(2, dim=-1),
        torch.zeros(6, 4, 4, 8).chunk(2, dim=1),  # each head
        pages_in_two_orders(),
    ],
)
def test_caches_that_interleave(both):
    arguments = valid()
    apart = {**arguments, "key_cache": both[0].clone(), "value_cache": both[1].clone()}
    expected = attention_decode(**apart)
    assert torch.equal(
        attention_decode(**{**arguments, "key_cache": both[0], "value_cache": both[1]}), expected
    )
    assert torch.equal(both[1], apart["value_cache"])


def test_huge_windows_hide_nothing():
    arguments = valid()
    assert torch.equal(attention_decode(**arguments, window=(2**70, 2**70)), attention_decode(**arguments))


def test_gradients_of_a_shared_prefix_are_refused():
    prefix = [torch.randn(1, 2, 3, 8) for _ in range(2)]
    for part in prefix:
        part.requires_grad_()
        with pytest.raises(NotImplementedError, match="not differentiable"):
            attention_decode(**valid(), shared_prefix=prefix)
        with torch.no_grad():
            attention_decode(**valid(), shared_prefix=prefix)
        part.requires_grad_(False)


def test_gradients_are_refused():
    arguments = valid()
    for name in ("query", "key_cache", "new_value"):
        wanted = {**arguments, name: arguments[name].clone().requires_grad_()}
        with pytest.raises(NotImplementedError, match=r"not differentiable: .* use attn_ext\.attention"):
            attention_decode(**wanted)
        with pytest.raises(NotImplementedError, match="not differentiable"):
            torch.ops.attn_ext.attention_decode(*operator_arguments(wanted))
        with torch.no_grad():
            attention_decode(**wanted)


# --- Torch's tools ------------------------------------------------------------------------------------------


def operator_arguments(arguments: dict[str, Any]) -> tuple[Any, ...]:
    """Those of the operator, in the order of its schema."""
    values = {"scale": 0.3, "softcap": 0.0, "rotary_interleaved": False, **arguments}
    return tuple(values.get(a.name) for a in torch.ops.attn_ext.attention_decode.default._schema.arguments)


@pytest.mark.parametrize(
    "changes", [{}, {"new_key": None, "new_value": None}, {"window_left": 2, "num_splits": 2}]
)
def test_opcheck(changes):
    torch.library.opcheck(
        torch.ops.attn_ext.attention_decode.default, operator_arguments({**valid(), **changes})
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_results_have_the_memory_order_of_the_query(transposed, dtype):
    query, cache = torch.randn(2, 4, 3, 8).to(dtype), torch.randn(2, 2, 9, 16).to(dtype)
    if transposed:
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
    arguments = query, cache[..., :8], cache, torch.tensor([4, 9])
    out, lse = attention_decode(*arguments, return_lse=True)
    assert out.transpose(1, 2).is_contiguous() == transposed
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = attention_decode(*map(mode.from_tensor, arguments), return_lse=True)
    for real, traced in zip((out, lse), fake, strict=True):
        assert (real.shape, real.dtype, real.stride()) == (traced.shape, traced.dtype, traced.stride())


@pytest.mark.parametrize("prefix", [False, True])
def test_compile(prefix):
    """The cache is changed in place by a compiled step too."""

    def step(**arguments: Any) -> Tensor:
        return attention_decode(**arguments, window=(6, 0)) * 2

    extra = {"shared_prefix": (torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))} if prefix else {}
    eager = {**valid(), **extra}
    compiled = {**eager, **{name: eager[name].clone() for name in ("key_cache", "value_cache")}}
    expected = step(**eager)
    with torch.no_grad():
        actual = torch.compile(step, fullgraph=True, backend="aot_eager")(**compiled)
    torch.testing.assert_close(actual, expected)
    for name in ("key_cache", "value_cache"):
        assert torch.equal(compiled[name], eager[name])


def test_autocast_casts_nothing():
    arguments = valid()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention_decode(**arguments)
    assert torch.equal(out, attention_decode(**arguments))


def test_writes_are_seen_by_autograd():
    """A cache that is changed after it was saved for a gradient must not go unnoticed."""
    arguments = valid()
    weight = torch.ones(8, requires_grad=True)
    loss = (arguments["key_cache"] * weight).sum()
    attention_decode(**arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        arguments = valid()
        attention_decode(**arguments)
    attention_decode(**arguments)


def test_valid_arguments_are_not_examined(monkeypatch):
    def fail(*_: Any) -> None:
        raise AssertionError("the arguments were examined")

    monkeypatch.setattr(attn_ext.decode, "_check", fail)
    attention_decode(**valid(), softcap=2.0, alibi_slopes=torch.ones(4), sinks=torch.ones(4), window=(3, 0))
