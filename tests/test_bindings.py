"""The operators refuse whatever a kernel could not handle, whoever calls them, and leak nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attn_ext._ops import Options

forward = torch.ops.attn_ext.attention_forward.default
output = torch.ops.attn_ext.attention_output.default
backward = torch.ops.attn_ext.attention_backward.default
dropout_mask = torch.ops.attn_ext.dropout_mask.default

B, H, H_KV, LQ, LK, DK, DV = 2, 4, 2, 5, 7, 8, 6


def forward_arguments(**changes: Any) -> dict[str, Any]:
    arguments = {
        "query": torch.randn(B, H, LQ, DK),
        "key": torch.randn(B, H_KV, LK, DK),
        "value": torch.randn(B, H_KV, LK, DV),
        **Options(scale=0.5)._asdict(),
    }
    return {**arguments, **changes}


def backward_arguments(**changes: Any) -> dict[str, Any]:
    arguments = forward_arguments()
    out, lse, lse_residual = forward(**arguments)
    results = {
        "grad_out": torch.randn_like(out),
        "grad_lse": None,
        "out": out,
        "lse": lse,
        "lse_residual": lse_residual,
        "wants_grad_bias": False,
        "wants_grad_sinks": False,
    }
    return {**arguments, **results, **changes}


VISIBLE = torch.ones(1, 1, LQ, LK, dtype=torch.bool)
RANGES = torch.tensor([[[[0, LK]]]])
IDS = torch.zeros(1, LK, dtype=torch.int32)
SEED = torch.tensor(1)
# One row of 5 queries, which sees the one block of 7 keys.
BLOCKS = {
    "block_offsets": torch.tensor([[[0, 1]]]),
    "block_indices": torch.zeros(1, dtype=torch.int32),
    "block_tiles": torch.full((1,), -1, dtype=torch.int32),
    "block_bits": torch.zeros(0, 16, 2, dtype=torch.uint8),
}


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


BAD_FORWARD = {
    "3-D query": ({"query": torch.randn(H, LQ, DK)}, "query must have 4 dimensions"),
    "3-D value": ({"value": torch.randn(H_KV, LK, DV)}, "value must have 4 dimensions"),
    "int query": ({"query": torch.ones(B, H, LQ, DK, dtype=torch.int64)}, "query must be float32"),
    "dtype of key": ({"key": torch.randn(B, H_KV, LK, DK).double()}, "key must have the dtype of query"),
    "dtype of value": ({"value": torch.randn(B, H_KV, LK, DV).half()}, "value must have the dtype of query"),
    "batch": ({"key": torch.randn(B + 1, H_KV, LK, DK)}, "key must have shape"),
    "columns of key": ({"key": torch.randn(B, H_KV, LK, DK + 1)}, "key must have shape"),
    "rows of value": ({"value": torch.randn(B, H_KV, LK + 1, DV)}, "value must have shape"),
    "heads": ({"query": torch.randn(B, 3, LQ, DK)}, "multiple of those of key, got 3 and 2"),
    "no heads": ({"key": torch.randn(B, 0, LK, DK), "value": torch.randn(B, 0, LK, DV)}, "got 4 and 0"),
    "no columns": (
        {"query": torch.randn(B, H, LQ, 0), "key": torch.randn(B, H_KV, LK, 0)},
        "1 to 1024 columns",
    ),
    "too many columns": ({"value": torch.randn(B, H_KV, LK, 1025)}, "1 to 1024 columns, got 1025"),
    "bias shape": ({"bias": torch.zeros(B, H, LQ, LK - 1)}, r"bias must broadcast to \(2, 4, 5, 7\)"),
    "bias dimensions": ({"bias": torch.zeros(LQ, LK)}, "bias must have 4 dimensions"),
    "bias dtype": ({"bias": torch.zeros(1, 1, LQ, LK, dtype=torch.int32)}, "bias must be float32"),
    "boolean bias": ({"bias": torch.ones(1, 1, LQ, LK, dtype=torch.bool)}, "bias must be float32"),
    "mask shape": ({"mask": VISIBLE[..., :-1]}, r"mask must broadcast to \(2, 4, 5, 7\)"),
    "mask dimensions": ({"mask": VISIBLE[0, 0]}, "mask must have 4 dimensions"),
    "mask dtype": ({"mask": VISIBLE.float()}, "mask must have dtype bool"),
    "sinks shape": ({"sinks": torch.zeros(H - 1)}, r"sinks must have shape \(4\)"),
    "sinks dimensions": ({"sinks": torch.zeros(1, H)}, "sinks must have 1 dimensions"),
    "ranges batch": ({"key_ranges": RANGES.expand(3, 1, 1, 2)}, "key_ranges must be"),
    "ranges rows": ({"key_ranges": RANGES.expand(1, LQ + 1, 1, 2)}, "key_ranges must be"),
    "ranges columns": ({"key_ranges": RANGES[..., :1]}, "key_ranges must be"),
    "ranges dimensions": ({"key_ranges": RANGES[0]}, "key_ranges must"),
    "ranges dtype": ({"key_ranges": RANGES.int()}, "key_ranges must be int64"),
    "no ranges": ({"key_ranges": RANGES[:, :, :0]}, "key_ranges must have 1 to 4 ranges, got 0"),
    "too many ranges": ({"key_ranges": RANGES.repeat(1, 1, 5, 1)}, "1 to 4 ranges, got 5"),
    "range too long": ({"key_ranges": torch.tensor([[[[0, LK + 1]]]])}, "key_ranges must hold 0 to 7, got 8"),
    "negative range": ({"key_ranges": torch.tensor([[[[-1, 2]]]])}, "key_ranges must hold 0 to 7, got -1"),
    "query_segments alone": ({"query_segments": IDS[:, :LQ]}, "query_segments and kv_segments go together"),
    "kv_segments alone": ({"kv_segments": IDS}, "query_segments and kv_segments go together"),
    "segments length": ({"query_segments": IDS, "kv_segments": IDS}, "query_segments must be"),
    "segments batch": (
        {"query_segments": IDS[:, :LQ], "kv_segments": IDS.expand(3, LK)},
        "kv_segments must be",
    ),
    "segments dtype": (
        {"query_segments": IDS[:, :LQ], "kv_segments": IDS.long()},
        "kv_segments must be int32",
    ),
    "slopes heads": ({"alibi_slopes": torch.ones(1, H - 1, 1)}, "alibi_slopes must be"),
    "slopes rows": ({"alibi_slopes": torch.ones(1, H, LQ + 1)}, "alibi_slopes must be"),
    "slopes dimensions": ({"alibi_slopes": torch.ones(1, H)}, "alibi_slopes must"),
    "positions size": (
        {"alibi_slopes": torch.ones(1, H, 1), "alibi_positions": torch.zeros(LQ + 1, dtype=torch.int64)},
        "alibi_positions must have shape",
    ),
    "positions dtype": (
        {"alibi_slopes": torch.ones(1, H, 1), "alibi_positions": torch.zeros(LQ)},
        "alibi_positions must be int64",
    ),
    "negative softcap": ({"softcap": -1.0}, "softcap must be finite and not negative, got -1"),
    "infinite softcap": ({"softcap": float("inf")}, "softcap must be finite and not negative, got inf"),
    "no seed": ({"dropout_p": 0.5}, "dropout needs a seed"),
    "dropout": ({"dropout_p": 1.5, "dropout_seed": SEED}, "dropout_p must be from 0 to 1, got 1.5"),
    "negative dropout": (
        {"dropout_p": -0.5, "dropout_seed": SEED},
        "dropout_p must be from 0 to 1, got -0.5",
    ),
    "seed dtype": ({"dropout_p": 0.5, "dropout_seed": SEED.int()}, "dropout_seed must be one int64"),
    "seed dimensions": ({"dropout_p": 0.5, "dropout_seed": SEED[None]}, "dropout_seed must be one int64"),
    **{f"blocks without {name}": ({**BLOCKS, name: None}, "block_bits go together") for name in BLOCKS},
    **{
        f"blocks: {name}": ({**BLOCKS, **changes}, message)
        for name, (changes, message) in {
            "offsets dtype": (
                {"block_offsets": BLOCKS["block_offsets"].int()},
                "block_offsets must be int64",
            ),
            "indices dtype": ({"block_indices": torch.zeros(1)}, "block_indices and block_tiles int32"),
            "tiles dtype": ({"block_tiles": torch.zeros(1)}, "block_indices and block_tiles int32"),
            "bits dtype": ({"block_bits": torch.zeros(0, 16, 2)}, "block_bits uint8"),
            "offsets rows": ({"block_offsets": torch.tensor([[[0, 0, 1]]])}, "block_offsets must be"),
            "offsets batch": ({"block_offsets": torch.zeros(3, 1, 2, dtype=torch.int64)}, "must be"),
            "offsets heads": ({"block_offsets": torch.zeros(1, 3, 2, dtype=torch.int64)}, "must be"),
            "offsets dimensions": ({"block_offsets": torch.tensor([[0, 1]])}, "must have 3 dimensions"),
            "offsets beyond": ({"block_offsets": torch.tensor([[[0, 2]]])}, "must rise from 0 to 1"),
            "offsets before": ({"block_offsets": torch.tensor([[[-1, 1]]])}, "must rise from 0 to 1, got -1"),
            "offsets falling": ({"block_offsets": torch.tensor([[[1, 0]]])}, "must rise from 0 to 1"),
            "index beyond": (
                {"block_indices": int32(1)},
                "block_indices of a row must rise and be from 0 to 0",
            ),
            "negative index": ({"block_indices": int32(-1)}, "block_indices of a row must rise"),
            "index twice": (
                {
                    "block_offsets": torch.tensor([[[0, 2]]]),
                    "block_indices": int32(0, 0),
                    "block_tiles": int32(-1, -1),
                },
                "block_indices of a row must rise",
            ),
            "tile beyond": ({"block_tiles": int32(0)}, "block_tiles must be from -1 to -1, got 0"),
            "tile before": ({"block_tiles": int32(-2)}, "block_tiles must be from -1 to -1, got -2"),
            "tiles size": ({"block_tiles": int32(-1, -1)}, "block_tiles must have shape"),
            "no size": ({"block_bits": torch.zeros(0, 16, 0, dtype=torch.uint8)}, "a multiple of 16 queries"),
            "odd size": (
                {"block_bits": torch.zeros(0, 24, 2, dtype=torch.uint8)},
                "a multiple of 16 queries",
            ),
            "huge size": ({"block_bits": torch.zeros(0, 2**17, 2, dtype=torch.uint8)}, "multiple of 16"),
        }.items()
    },
}

BAD_BACKWARD = {
    "grad_out shape": ({"grad_out": torch.randn(B, H, LQ, DV + 1)}, "grad_out must have shape"),
    "grad_out dtype": (
        {"grad_out": torch.randn(B, H, LQ, DV).double()},
        "grad_out must have the dtype of query",
    ),
    "out shape": ({"out": torch.randn(B, H, LQ + 1, DV)}, "out must have shape"),
    "lse shape": ({"lse": torch.randn(B, H, LQ + 1)}, "lse must have shape"),
    "lse dtype": ({"lse": torch.randn(B, H, LQ).double()}, "lse must have dtype float64 for float64"),
    "residual dimensions": (
        {"lse_residual": torch.randn(B, H, LQ, 1)},
        "lse_residual must have 3 dimensions",
    ),
    "grad_lse shape": ({"grad_lse": torch.randn(B, H, 1)}, "grad_lse must have shape"),
}


@pytest.mark.parametrize("case", BAD_FORWARD)
def test_forward_refuses(case: str) -> None:
    changes, message = BAD_FORWARD[case]
    arguments = forward_arguments(**changes)
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    before = [x._use_count() for x in tensors]
    with pytest.raises(RuntimeError, match=message):
        forward(**arguments)
    assert [x._use_count() for x in tensors] == before


@pytest.mark.parametrize("case", BAD_FORWARD)
def test_the_others_refuse_it_too(case: str) -> None:
    changes, message = BAD_FORWARD[case]
    arguments = forward_arguments(**changes)
    accepted = [argument.name for argument in output._schema.arguments]
    if set(changes) <= set(accepted):
        with pytest.raises(RuntimeError, match=message):
            output(**{name: arguments[name] for name in accepted})
    with pytest.raises(RuntimeError, match=message):
        backward(**backward_arguments(**changes))


@pytest.mark.parametrize(
    "sizes", [(-1, 1, 0, 1, 1), (1, -1, 0, 1, 1), (1, 1, -1, 1, 1), (1, 1, 2, 1, 1), (1, 1, 0, 1, -1)]
)
def test_dropout_mask_refuses(sizes: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="sizes must not be negative"):
        dropout_mask(SEED, 0.5, *sizes)
    with pytest.raises(RuntimeError, match="dropout_p must be from 0 to 1"):
        dropout_mask(SEED, 1.5, 1, 1, 0, 1, 1)
    with pytest.raises(RuntimeError, match="dropout_seed must be one int64"):
        dropout_mask(SEED.double(), 0.5, 1, 1, 0, 1, 1)


@pytest.mark.parametrize("case", BAD_BACKWARD)
def test_backward_refuses(case: str) -> None:
    changes, message = BAD_BACKWARD[case]
    arguments = backward_arguments(**changes)
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    before = [x._use_count() for x in tensors]
    with pytest.raises(RuntimeError, match=message):
        backward(**arguments)
    assert [x._use_count() for x in tensors] == before


def test_out_of_memory_is_an_exception() -> None:
    huge = torch.zeros(1, 1, 1, 1).expand(2**10, 2**10, 2**30, 1)
    with pytest.raises(RuntimeError, match="not enough memory"):
        forward(huge, huge, huge, *Options())


def test_sizes_that_overflow_are_an_exception() -> None:
    query = torch.zeros(1, 1, 1, 1).expand(2**20, 2**20, 2**22, 1)
    value = torch.zeros(1, 1, 1, 1).expand(2**20, 2**20, 1, 4)
    with pytest.raises(RuntimeError, match="not enough memory"):
        forward(query, value[..., :1], value, *Options())


@pytest.mark.parametrize("lower", [None, -(2**63), -LQ, 0, LK, 2**63 - 1])
@pytest.mark.parametrize("upper", [None, -(2**63), -LQ, 0, LK, 2**63 - 1])
def test_any_band_is_safe(lower: int | None, upper: int | None) -> None:
    arguments = forward_arguments(band_lower=lower, band_upper=upper)
    offset = torch.arange(LK) - torch.arange(LQ)[:, None]
    visible = torch.ones(LQ, LK, dtype=torch.bool)
    if lower is not None:
        visible &= offset >= lower
    if upper is not None:
        visible &= offset <= upper
    out, lse, _ = forward(**arguments)
    expected = forward(
        **forward_arguments(
            **{**arguments, "mask": visible[None, None], "band_lower": None, "band_upper": None}
        )
    )
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])


def by_rows(*shape: int) -> torch.Tensor:
    batch, heads, rows, columns = shape
    return torch.randn(batch, rows, heads, columns).transpose(1, 2)


@pytest.mark.parametrize("transposed", [False, True])
def test_results_lie_in_the_order_of_what_they_mirror(transposed: bool) -> None:
    make = by_rows if transposed else torch.randn
    changes = {"query": make(B, H, LQ, DK), "key": make(B, H_KV, LK, DK), "value": make(B, H_KV, LK, DV)}
    arguments = forward_arguments(**changes)
    out, lse, lse_residual = forward(**arguments)
    grads = backward(
        grad_out=torch.randn_like(out),
        grad_lse=None,
        out=out,
        lse=lse,
        lse_residual=lse_residual,
        wants_grad_bias=False,
        wants_grad_sinks=False,
        **arguments,
    )
    for result in (out, *grads[:3]):
        assert (result.transpose(1, 2) if transposed else result).is_contiguous()
    assert lse.is_contiguous()


def test_strided_columns_are_copied_once_per_distinct_row() -> None:
    strided = torch.randn(1, 1, LQ, 2 * DK).expand(B, H, LQ, 2 * DK)[..., ::2]
    arguments = forward_arguments(query=strided)
    expected = forward(**{**arguments, "query": strided.contiguous()})
    for actual, result in zip(forward(**arguments), expected, strict=True):
        torch.testing.assert_close(actual, result, rtol=0, atol=0)


def test_statistics_may_be_strided() -> None:
    arguments = backward_arguments(grad_lse=torch.ones(()).expand(B, H, LQ))
    expected = backward(**{**arguments, "grad_lse": torch.ones(B, H, LQ)})
    for actual, result in zip(backward(**arguments), expected, strict=True):
        torch.testing.assert_close(actual, result, rtol=0, atol=0)


@pytest.mark.parametrize("wants_grad_sinks", [False, True])
@pytest.mark.parametrize("wants_grad_bias", [False, True])
def test_gradients_that_are_not_wanted_are_empty(wants_grad_bias: bool, wants_grad_sinks: bool) -> None:
    """Those that are have the precision that sums over the batch need, whatever the dtype of the argument."""
    options = {"bias": torch.zeros(1, H, 1, LK).half(), "sinks": torch.zeros(H).bfloat16()}
    wants = {"wants_grad_bias": wants_grad_bias, "wants_grad_sinks": wants_grad_sinks}
    *_, grad_bias, grad_sinks = backward(**backward_arguments(**options, **wants))
    assert grad_bias.shape == ((1, H, 1, LK) if wants_grad_bias else (0,))
    assert grad_sinks.shape == ((H,) if wants_grad_sinks else (0,))
    assert (grad_bias.dtype, grad_sinks.dtype) == (torch.float32, torch.float64)
