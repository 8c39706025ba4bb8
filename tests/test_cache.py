"""Caches of keys and values against lists of tokens: what they hold, who has which page, when one is full."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_ext
from attn_ext import CacheFullError, Causal, KVCache, PagedKVCache, attention_decode

HEADS, HEAD_DIM, VALUE_DIM = 2, 3, 5
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
QUANTISED = (torch.int8, torch.float8_e4m3fn)
LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}


def make_tokens(sequences: int, count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random key (n, Hkv, L, D) and value (n, Hkv, L, Dv)."""
    shape = sequences, HEADS, count
    return torch.randn(*shape, HEAD_DIM).to(dtype), torch.randn(*shape, VALUE_DIM).to(dtype)


def make_contiguous(sequences: int = 3, capacity: int = 10, **options: Any) -> KVCache:
    return KVCache(sequences, capacity, HEADS, HEAD_DIM, value_dim=VALUE_DIM, **options)


def make_paged(
    num_pages: int = 9, page_size: int = 4, max_sequences: int = 3, **options: Any
) -> PagedKVCache:
    sizes = num_pages, page_size, HEADS, HEAD_DIM
    return PagedKVCache(*sizes, max_sequences=max_sequences, value_dim=VALUE_DIM, **options)


CACHES = {"contiguous": make_contiguous, "paged": make_paged}


@pytest.fixture(params=CACHES.values(), ids=CACHES)
def make(request):
    return request.param


def state(cache: Any) -> dict[str, Any]:
    return copy.deepcopy(vars(cache))


def assert_same_state(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        same = torch.equal(actual[name], value) if isinstance(value, Tensor) else actual[name] == value
        assert same, name


class PagedProgram:
    """A cache, and a model of it: each sequence a list of pages, each page a list of tokens, shared or not.

    The model writes one token after the other, and copies a page when it finds that another sequence has it.
    """

    SEQUENCES = 4

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.num_pages, self.page_size = self.random.randint(2, 12), self.random.randint(1, 4)
        self.max_pages = self.random.choice((self.num_pages, 3))
        self.cache = make_paged(self.num_pages, self.page_size, self.SEQUENCES, max_pages=self.max_pages)
        self.model: dict[int, list[list[tuple[Tensor, Tensor]]]] = {}

    def run(self, steps: int) -> None:
        actions = [self.append] * 6 + [self.allocate] * 2 + [self.fork] * 2 + [self.free, self.defragment]
        for _ in range(steps):
            action = self.random.choice(actions)
            before = state(self.cache)
            try:
                action()
            except CacheFullError:
                assert_same_state(vars(self.cache), before)
            self.check_pages()
            self.check_tokens()

    def chosen(self, most: int) -> list[int]:
        """Some of the sequences in use, in any order."""
        in_use = sorted(self.model)
        return self.random.sample(in_use, self.random.randint(0, min(most, len(in_use))))

    def must_fit(self, fits: bool, method: Callable, *arguments: Any) -> Any:
        """What the method returns; it must raise CacheFullError if that does not fit, and only then."""
        try:
            result = method(*arguments)
        except CacheFullError:
            assert not fits
            raise
        assert fits
        return result

    def begin(self, method: Callable, *arguments: int) -> list[int]:
        """The sequences that a method begins, as many as its last argument says."""
        fits = len(self.model) + arguments[-1] <= self.SEQUENCES
        sequences = self.must_fit(fits, method, *arguments)
        assert len(set(sequences)) == arguments[-1]
        assert not set(sequences) & set(self.model)
        return sequences

    def allocate(self) -> None:
        for sequence in self.begin(self.cache.allocate, self.random.randint(1, 2)):
            self.model[sequence] = []

    def fork(self) -> None:
        for source in self.chosen(1):
            for sequence in self.begin(self.cache.fork, source, self.random.randint(1, 2)):
                self.model[sequence] = list(self.model[source])

    def append(self) -> None:
        sequences, count = self.chosen(self.SEQUENCES), self.random.choice((0, 1, 1, 1, 2, 3, 5))
        key, value = make_tokens(len(sequences), count)
        model = copy.deepcopy(self.model)  # in which pages are shared as before
        for row, sequence in enumerate(sequences):
            pages = model[sequence]
            for token in range(count):
                if not pages or len(pages[-1]) == self.page_size:
                    pages.append([])
                elif sum(page is pages[-1] for other in model.values() for page in other) > 1:
                    pages[-1] = list(pages[-1])
                pages[-1].append((key[row, :, token], value[row, :, token]))
        distinct = {id(page) for pages in model.values() for page in pages}
        fits = len(distinct) <= self.num_pages and max(map(len, model.values()), default=0) <= self.max_pages
        self.must_fit(fits, self.cache.append, key, value, sequences)
        self.model = model

    def free(self) -> None:
        sequences = self.chosen(2)
        self.cache.free(sequences)
        for sequence in sequences:
            del self.model[sequence]

    def defragment(self) -> None:
        self.cache.defragment()
        tables = (self.cache.block_table[sequence, : len(pages)] for sequence, pages in self.model.items())
        used = {page for table in tables for page in table.tolist()}
        assert used == set(range(self.num_pages - self.cache.free_pages))

    def check_pages(self) -> None:
        number: dict[int, int] = {}  # of each of the model's pages
        for sequence in range(self.SEQUENCES):
            pages, table = self.model.get(sequence, []), self.cache.block_table[sequence].tolist()
            assert table[len(pages) :] == [-1] * (len(table) - len(pages))
            assert self.cache.seqlens[sequence] == sum(map(len, pages))
            for page, entry in zip(pages, table, strict=False):
                assert number.setdefault(id(page), entry) == entry
        assert len(set(number.values())) == len(number)  # shared where the model shares, and nowhere else
        assert self.cache.free_pages == self.num_pages - len(number)

    def check_tokens(self) -> None:
        for sequence, pages in self.model.items():
            tokens = [token for page in pages for token in page]
            for part, found in enumerate(self.cache.read(sequence)):
                expected = [token[part] for token in tokens]
                assert torch.equal(found, torch.stack(expected, 1) if expected else found[:, :0])


@pytest.mark.parametrize("seed", range(60))
def test_random_programs(seed):
    PagedProgram(seed).run(80)


def test_a_paged_cache_is_what_the_decoding_takes():
    cache = make_paged(dtype=torch.bfloat16, max_pages=5)
    assert cache.key.shape == (9, HEADS, 4, HEAD_DIM)
    assert cache.value.shape == (9, HEADS, 4, VALUE_DIM)
    assert (cache.block_table.shape, cache.block_table.dtype) == ((3, 5), torch.int32)
    assert (cache.seqlens.shape, cache.seqlens.dtype) == ((3,), torch.int32)
    assert cache.key.is_contiguous()
    assert cache.value.is_contiguous()
    assert cache.block_table.is_contiguous()
    assert (cache.dtype, cache.device, cache.page_size) == (torch.bfloat16, torch.device("cpu"), 4)
    assert cache.key_scale is cache.value_scale is None


def test_a_contiguous_cache_is_what_the_decoding_takes():
    cache = make_contiguous()
    assert (cache.key.shape, cache.value.shape) == ((3, HEADS, 10, HEAD_DIM), (3, HEADS, 10, VALUE_DIM))
    assert (cache.seqlens.shape, cache.seqlens.dtype) == ((3,), torch.int32)
    sequences = cache.allocate(3)
    key, value = make_tokens(3, 4)
    cache.append(key, value)
    cache.append(*make_tokens(1, 2), sequences[1:2])
    assert cache.seqlens.tolist() == [4, 6, 4]
    assert torch.equal(cache.key[:, :, :4], key)
    assert torch.equal(cache.value[:, :, :4], value)


@pytest.mark.parametrize("dtype", FLOATS)
def test_tokens_are_kept_to_the_bit(make, dtype):
    cache = make(dtype=dtype)
    cache.allocate(3)
    parts = [make_tokens(3, count, dtype) for count in (3, 1, 0, 5)]
    for part in parts:
        cache.append(*part)
    key, value = (torch.cat(each, dim=2) for each in zip(*parts, strict=True))
    for sequence in range(3):
        assert torch.equal(cache.read(sequence)[0], key[sequence])
        assert torch.equal(cache.read(sequence)[1], value[sequence])


def test_order_of_sequences(make):
    cache = make()
    cache.allocate(3)
    key, value = make_tokens(2, 5)
    cache.append(key, value, torch.tensor([2, 0], dtype=torch.int32))
    assert torch.equal(cache.read(0)[0], key[1])
    assert torch.equal(cache.read(2)[1], value[0])
    assert cache.read(1)[0].shape == (HEADS, 0, HEAD_DIM)


@pytest.mark.parametrize("dtype", [torch.float32, *QUANTISED])
def test_forks_go_their_own_ways(make, dtype):
    cache = make(dtype=dtype)
    (source,) = cache.allocate()
    cache.append(*make_tokens(1, 6))
    common = cache.read(source)[0]
    copies = cache.fork(source, 2)
    appended = [cache.read(sequence)[0] for sequence in copies]
    assert all(torch.equal(key, common) for key in appended)
    key, value = make_tokens(1, 1)
    cache.append(100 * key, 100 * value, copies[:1])  # for which the scale of its page must grow
    assert torch.equal(cache.read(source)[0], common)
    assert torch.equal(cache.read(copies[1])[0], common)
    assert cache.seqlens.tolist() == [6, 7, 6]


def test_freed_memory_is_used_again(make):
    cache = make()
    for _ in range(5):
        cache.append(*make_tokens(3, 10), cache.allocate(3))
        cache.free()
    assert cache.seqlens.tolist() == [0, 0, 0]
    assert cache.allocate(3) == [0, 1, 2]


def test_a_full_cache_stays_as_it_is(make):
    cache = make(dtype=torch.int8)
    cache.allocate(3)
    cache.append(*make_tokens(3, 8))
    cache.append(*make_tokens(1, 2), [1])
    before = state(cache)
    with pytest.raises(CacheFullError):
        cache.append(*make_tokens(3, 5))
    with pytest.raises(CacheFullError):
        cache.append(*make_tokens(2, 11), [0, 2])
    with pytest.raises(CacheFullError, match="1 sequences are asked for, 0 are unused"):
        cache.allocate()
    with pytest.raises(CacheFullError):
        cache.fork(0)
    assert_same_state(vars(cache), before)
    assert issubclass(CacheFullError, RuntimeError)


def test_sequences_that_share_a_page_and_all_write_to_it():
    """The last one keeps it: no page more than needed."""
    cache = make_paged(num_pages=3, page_size=4)
    cache.allocate()
    cache.append(*make_tokens(1, 2))
    cache.fork(0, 2)
    cache.append(*make_tokens(3, 1))
    assert cache.free_pages == 0
    assert sorted(cache.block_table[:, 0].tolist()) == [0, 1, 2]


def test_a_shared_full_page_is_not_copied():
    cache = make_paged(num_pages=3, page_size=4)
    cache.allocate()
    cache.append(*make_tokens(1, 4))
    cache.fork(0)
    cache.append(*make_tokens(2, 1))
    assert cache.block_table[:2, 0].tolist() == [0, 0]


def test_an_append_that_fails_leaves_the_cache_as_it_was(make, monkeypatch):
    cache = make()
    cache.allocate()
    cache.append(*make_tokens(1, 3))
    cache.fork(0)
    tokens, before = [cache.read(sequence) for sequence in range(2)], state(cache)

    def fail(*_: Any) -> None:
        raise OSError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_write", fail)
        for sequences in ([0, 1], [1]):
            with pytest.raises(OSError, match="no memory"):
                cache.append(*make_tokens(len(sequences), 6), sequences)
    contents = {"key", "value", "_write"}  # pages that nobody has may hold anything
    assert_same_state(vars(cache), {name: part for name, part in before.items() if name not in contents})
    for sequence in range(2):
        assert all(map(torch.equal, cache.read(sequence), tokens[sequence]))
    cache.append(*make_tokens(2, 6))
    assert cache.seqlens.tolist() == [9, 9, 0]


# --- Room for what attention_decode writes ------------------------------------------------------------------


def attend(cache: Any, query: Tensor, lengths: Tensor, sequences: list[int], **options: Any) -> Tensor:
    if isinstance(cache, PagedKVCache):
        return attention_decode(
            query, cache.key, cache.value, lengths, block_table=cache.block_table[sequences], **options
        )
    return attention_decode(
        query, cache.key[: len(sequences)], cache.value[: len(sequences)], lengths, **options
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(n, H, L, D), its first columns turned by the angles of the tokens 0 .. L - 1."""
    a, b, rest = x.tensor_split((cos.shape[1], 2 * cos.shape[1]), dim=-1)
    cos, sin = cos[: x.shape[2]], sin[: x.shape[2]]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def test_generation_in_reserved_room(make):
    """Prompt, steps and a fork in the middle of a page, each step compared with attention to all tokens."""
    cache = make(dtype=torch.float32)
    cache.allocate()
    angles = torch.rand(10, 1)
    tables = angles.cos(), angles.sin()
    key, value = make_tokens(1, 2)
    cache.append(rotate(key, *tables), value)
    sequences = [0]
    for count in (1, 2, 1, 1, 1, 2):
        if count == 2:
            copies = cache.fork(0)
            sequences += copies
            key, value = (torch.cat((tensor, tensor[:1])) for tensor in (key, value))
        new_key, new_value = make_tokens(len(sequences), count)
        query = torch.randn(len(sequences), 2 * HEADS, key.shape[2] + count, HEAD_DIM)
        key, value = torch.cat((key, new_key), 2), torch.cat((value, new_value), 2)
        lengths = cache.reserve(count)
        assert (lengths.dtype, lengths.tolist()) == (torch.int32, [key.shape[2] - count] * len(sequences))
        out = attend(
            *(cache, query[:, :, -count:], lengths, sequences),
            new_key=new_key,
            new_value=new_value,
            rotary_cos=tables[0],
            rotary_sin=tables[1],
        )
        exact = attn_ext.reference.attention(
            rotate(query, *tables), rotate(key, *tables), value, mask=Causal()
        )
        torch.testing.assert_close(out.double(), exact[:, :, -count:], rtol=1e-5, atol=1e-5)
        for sequence in sequences:
            torch.testing.assert_close(cache.read(sequence)[0], rotate(key, *tables)[sequence])
    assert cache.seqlens.tolist() == [10, 10, 10]


def test_what_is_not_reserved_is_not_written():
    """At the end of a page: there is none for the next token, and entry -1 is that of no other sequence."""
    cache = make_paged()
    cache.allocate(2)
    cache.append(*make_tokens(2, 4))
    before = state(cache)
    new_key, new_value = make_tokens(2, 1)
    query = torch.randn(2, HEADS, 1, HEAD_DIM)
    with pytest.raises(ValueError, match=r"block_table must hold pages .*, got \[-1, -1\]"):
        attend(cache, query, cache.seqlens[:2], [0, 1], new_key=new_key, new_value=new_value)
    assert_same_state(vars(cache), before)


def test_reserve_of_some_sequences(make):
    cache = make()
    cache.allocate(3)
    cache.append(*make_tokens(3, 3))
    assert cache.reserve(2, [2, 0]).tolist() == [3, 3]
    cache.append(*make_tokens(3, 1))
    assert cache.seqlens.tolist() == [6, 4, 6]


def test_reserve_of_a_full_cache(make):
    cache = make()
    cache.allocate()
    cache.append(*make_tokens(1, 6))
    cache.fork(0, 2)
    before = state(cache)
    with pytest.raises(CacheFullError):
        cache.reserve(50)
    assert_same_state(vars(cache), before)


def test_reserve_errors(make):
    cache = make()
    cache.allocate()
    with pytest.raises(TypeError, match="count must be an int, got float"):
        cache.reserve(1.0)
    with pytest.raises(ValueError, match="count must be positive, got 0"):
        cache.reserve(0)
    with pytest.raises(ValueError, match="sequences must be in use, got 1"):
        cache.reserve(1, [1])
    for dtype in QUANTISED:
        with pytest.raises(ValueError, match=f"caches that are not quantised, got {dtype}"):
            make(dtype=dtype).reserve(1)


def test_gradients_stop_here(make):
    cache = make()
    cache.allocate()
    cache.append(*(tensor.requires_grad_() for tensor in make_tokens(1, 3)))
    assert not cache.key.requires_grad


# --- Quantised ----------------------------------------------------------------------------------------------


def quantised_error(exact: Tensor, scale: Tensor, dtype: torch.dtype, at_once: bool = False) -> Tensor:
    """The bound that is documented, with the float32 rounding of the division."""
    if dtype == torch.int8:
        return scale * (0.5 if at_once else 1) * (1 + 1e-4)
    return exact.abs() / 16 * (1 + 1e-4) + scale / 512


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("growth", [1.0, 0.3, 1.7, 5.0, 1000.0])
def test_errors_of_tokens_that_come_one_by_one(make, dtype, growth):
    cache = make(dtype=dtype)
    cache.allocate(3)
    factors = growth ** torch.arange(10.0).view(1, 1, -1, 1)
    exact = [tensor * factors for tensor in make_tokens(3, 10)]
    for token in range(10):
        cache.append(*(tensor[:, :, token : token + 1] for tensor in exact))
    check_quantised(cache, exact, dtype)


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("source", FLOATS)
def test_errors_of_tokens_that_come_at_once(make, dtype, source):
    cache = make(dtype=dtype)
    cache.allocate(3)
    exact = make_tokens(3, 10, source)
    cache.append(*exact)
    check_quantised(cache, [tensor.float() for tensor in exact], dtype, at_once=True)


def check_quantised(cache: Any, exact: list[Tensor], dtype: torch.dtype, at_once: bool = False) -> None:
    for sequence in range(3):
        for read, tokens, scales in zip(
            cache.read(sequence), exact, (cache.key_scale, cache.value_scale), strict=True
        ):
            tokens = tokens[sequence]  # (Hkv, L, D)
            size = getattr(cache, "page_size", 10)
            table = cache.block_table[sequence] if hasattr(cache, "block_table") else [sequence]
            for page, part in enumerate(tokens.split(size, dim=1)):
                scale = scales[table[page]]
                largest = part.abs().amax((1, 2))
                assert (scale * LARGEST[dtype] >= largest * (1 - 1e-6)).all()
                assert (scale * LARGEST[dtype] <= largest * (1 if at_once else 2) * (1 + 1e-6)).all()
                error = (read[:, page * size : (page + 1) * size] - part).abs()
                assert (error <= quantised_error(part, scale.view(-1, 1, 1), dtype, at_once)).all()


@pytest.mark.parametrize("dtype", QUANTISED)
def test_zeros_have_no_scale(make, dtype):
    cache = make(dtype=dtype)
    cache.allocate(3)
    cache.append(*(torch.zeros_like(tensor) for tensor in make_tokens(3, 2)))
    assert (cache.read(1)[0] == 0).all()
    key, value = make_tokens(3, 1)
    cache.append(key, value)
    assert (cache.read(1)[0][:, :2] == 0).all()
    error = (cache.read(1)[0][:, 2:] - key[1]).abs()
    assert (error <= quantised_error(key[1], cache.key_scale[:, None, None].amax(), dtype)).all()


@pytest.mark.parametrize("dtype", QUANTISED)
def test_scales_of_earlier_sequences_are_forgotten(make, dtype):
    cache = make(dtype=dtype)
    for factor in (1000, 1):
        cache.free()
        cache.allocate(3)
        exact = [factor * tensor for tensor in make_tokens(3, 10)]
        cache.append(*exact)
    check_quantised(cache, exact, dtype, at_once=True)


# --- Errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": torch.int32}, TypeError, "dtype must be float32, .* or float8_e4m3fn, got torch.int32"),
        ({"dtype": "int8"}, TypeError, "dtype must be float32, .* or float8_e4m3fn, got str"),
    ],
)
def test_dtypes_that_are_not_taken(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("size", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)]
)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((KVCache, name) for name in ("sequences", "capacity", "kv_heads", "head_dim", "value_dim")),
        *((PagedKVCache, name) for name in ("num_pages", "page_size", "kv_heads", "head_dim", "value_dim")),
        *((PagedKVCache, name) for name in ("max_sequences", "max_pages")),
    ],
)
def test_sizes(kind, name, size, error):
    names = {
        KVCache: ("sequences", "capacity", "kv_heads", "head_dim"),
        PagedKVCache: ("num_pages", "page_size", "kv_heads", "head_dim", "max_sequences"),
    }
    sizes = dict.fromkeys(names[kind], 2) | {name: size}
    with pytest.raises(
        error, match=f"{name} must be (positive, got {size}|an int, got {type(size).__name__})"
    ):
        kind(**sizes)


@pytest.mark.parametrize(
    ("tokens", "sequences", "error", "message"),
    [
        ((None, torch.zeros(2, 2, 1, 5)), None, TypeError, "key must be a torch.Tensor, got NoneType"),
        (
            (torch.zeros(2, 2, 1, 3).half(), torch.zeros(2, 2, 1, 5)),
            None,
            TypeError,
            "key must be torch.float32",
        ),
        (
            (torch.zeros(2, 2, 1, 3), torch.zeros(2, 2, 1, 5).int()),
            None,
            TypeError,
            "value must be torch.float32",
        ),
        (
            (torch.zeros(2, 2, 1, 3, device="meta"), torch.zeros(2, 2, 1, 5)),
            None,
            ValueError,
            "key must be on the device of the cache, cpu, got meta",
        ),
        (
            (torch.zeros(2, 2, 3), torch.zeros(2, 2, 1, 5)),
            None,
            ValueError,
            r"key must be \(2, 2, 'L', 3\), got",
        ),
        (
            (torch.zeros(2, 1, 1, 3), torch.zeros(2, 2, 1, 5)),
            None,
            ValueError,
            r"key must be \(2, 2, 1, 3\), got",
        ),
        (
            (torch.zeros(2, 2, 1, 3), torch.zeros(2, 2, 2, 5)),
            None,
            ValueError,
            r"value must be \(2, 2, 1, 5\), got",
        ),
        (
            (torch.zeros(2, 2, 1, 3), torch.zeros(2, 2, 1, 3)),
            None,
            ValueError,
            r"value must be \(2, 2, 1, 5\), got",
        ),
        (
            (torch.zeros(2, 2, 1, 3), torch.zeros(2, 2, 1, 5).to_sparse()),
            None,
            TypeError,
            "value must be a dense tensor, got layout torch.sparse_coo",
        ),
        (make_tokens(1, 1), None, ValueError, r"key must be \(2, 2, 1, 3\), got shape \(1, 2, 1, 3\)"),
        (make_tokens(2, 1), [0, 2], ValueError, "sequences must be in use, got 2"),
        (make_tokens(2, 1), [0, 3], ValueError, "sequences must be in use, got 3"),
        (make_tokens(2, 1), [-1, 0], ValueError, "sequences must be in use, got -1"),
        (make_tokens(2, 1), [1, 1], ValueError, r"sequences must differ, got \[1, 1\]"),
        (make_tokens(2, 1), [0.0, 1.0], TypeError, "sequences must hold ints, got float"),
        (make_tokens(2, 1), torch.tensor([True, False]), TypeError, "sequences must hold ints, got bool"),
    ],
)
def test_append_errors(make, tokens, sequences, error, message):
    cache = make()
    cache.allocate(2)
    before = state(cache)
    with pytest.raises(error, match=message):
        cache.append(*tokens, sequences)
    assert_same_state(vars(cache), before)


def test_quantised_caches_take_floats_only(make):
    cache = make(dtype=torch.int8)
    cache.allocate()
    with pytest.raises(TypeError, match=r"key must be torch\.float32 or .*, got torch.int8"):
        cache.append(*make_tokens(1, 1, torch.int8))


@pytest.mark.parametrize("method", ["fork", "free", "read"])
def test_sequences_not_in_use(make, method):
    cache = make()
    cache.allocate()
    with pytest.raises(ValueError, match="sequences must be in use, got 1"):
        getattr(cache, method)([1] if method == "free" else 1)


def test_allocate_counts(make):
    with pytest.raises(ValueError, match="count must be positive, got 0"):
        make().allocate(0)
    with pytest.raises(TypeError, match="count must be an int, got float"):
        make().allocate(1.0)
