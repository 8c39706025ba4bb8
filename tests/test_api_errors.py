"""Every bad argument is a TypeError or ValueError that names it, says what it is and what was expected."""

from __future__ import annotations

import pytest
import torch

import attn_ext
from attn_ext import Causal, Dense, KeyLengths, Prefix, Segments, SlidingWindow
from attn_ext._ops import Options

FUNCTIONS = {"sdpa": attn_ext.scaled_dot_product_attention, "attention": attn_ext.attention}
ARGUMENTS = ("query", "key", "value")


def arguments(**replaced) -> dict:
    """Valid arguments, (2, 3, 5, 4), (2, 3, 7, 4) and (2, 3, 7, 6), with some replaced."""
    shapes = {"query": (2, 3, 5, 4), "key": (2, 3, 7, 4), "value": (2, 3, 7, 6)}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | replaced


@pytest.fixture(params=FUNCTIONS.values(), ids=FUNCTIONS)
def function(request):
    return request.param


def test_the_arguments_used_here_are_valid(function):
    function(**arguments())


@pytest.mark.parametrize("bad", [None, 1.0, [[1.0]], "text"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_not_a_tensor(function, name, bad):
    with pytest.raises(TypeError, match=rf"{name} must be a torch.Tensor, got {type(bad).__name__}"):
        function(**arguments(**{name: bad}))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_numpy_arrays_are_not_converted(function, name):
    with pytest.raises(TypeError, match=rf"{name} must be a torch.Tensor, got ndarray"):
        function(**arguments(**{name: arguments()[name].numpy()}))


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_unsupported_dtype(function, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in arguments().items()}
    with pytest.raises(TypeError, match=f"query must be float32, float64, float16 or bfloat16, got {dtype}"):
        function(**tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["key", "value"])
def test_mixed_dtypes(function, name, dtype):
    with pytest.raises(TypeError, match=rf"{name} must have the dtype of query, torch.float32, got {dtype}"):
        function(**arguments(**{name: arguments()[name].to(dtype)}))


@pytest.mark.parametrize("name", ["key", "value"])
def test_mixed_devices(function, name):
    with pytest.raises(ValueError, match=f"{name} must be on the device of query, cpu, got meta"):
        function(**arguments(**{name: arguments()[name].to("meta")}))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_sparse(function, name):
    with pytest.raises(TypeError, match=rf"{name} must be a dense tensor, got layout torch.sparse_coo"):
        function(**arguments(**{name: arguments()[name].to_sparse()}))


def test_mkldnn(function):
    with pytest.raises(TypeError, match=r"query must be a dense tensor, got layout torch._mkldnn"):
        function(**arguments(query=arguments()["query"].to_mkldnn()))


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested(function, layout):
    query = torch.nested.nested_tensor([torch.randn(3, 5, 4), torch.randn(3, 4, 4)], layout=layout)
    with pytest.raises(TypeError, match="query must be a dense tensor, got a nested tensor"):
        function(**arguments(query=query))


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_quantized(function):
    query = torch.quantize_per_tensor(arguments()["query"], 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"query must be float32, .*, got torch.qint8"):
        function(**arguments(query=query))


@pytest.mark.parametrize("shape", [(), (4,)])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_too_few_dimensions(name, shape):
    with pytest.raises(ValueError, match=rf"{name} must have at least 2 dimensions.*got shape"):
        attn_ext.scaled_dot_product_attention(**arguments(**{name: torch.randn(shape)}))


@pytest.mark.parametrize("shape", [(), (4,), (5, 4), (3, 5, 4), (1, 2, 3, 5, 4)])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_attention_takes_four_dimensions(name, shape):
    with pytest.raises(ValueError, match=rf"{name} must be \(B, H, L, D\), got shape"):
        attn_ext.attention(**arguments(**{name: torch.randn(shape)}))


def test_head_dim_of_key(function):
    with pytest.raises(
        ValueError, match=r"key must have the head_dim.*of query, 4, got shape \(2, 3, 7, 8\)"
    ):
        function(**arguments(key=torch.randn(2, 3, 7, 8)))


def test_length_of_value(function):
    with pytest.raises(ValueError, match=r"value must have the length of key, 7, got shape \(2, 3, 8, 6\)"):
        function(**arguments(value=torch.randn(2, 3, 8, 6)))


@pytest.mark.parametrize("head_dim", [0, 1025])
def test_range_of_head_dim(function, head_dim):
    query, key = torch.randn(2, 3, 5, head_dim), torch.randn(2, 3, 7, head_dim)
    with pytest.raises(ValueError, match=rf"query must have a head_dim from 1 to 1024.*{head_dim}\)"):
        function(**arguments(query=query, key=key))
    with pytest.raises(ValueError, match=rf"value must have a head_dim from 1 to 1024.*{head_dim}\)"):
        function(**arguments(value=torch.randn(2, 3, 7, head_dim)))


@pytest.mark.parametrize("name", ["key", "value"])
def test_batch_of_attention(name):
    tensor = torch.randn(4, *arguments()[name].shape[1:])
    with pytest.raises(ValueError, match=f"{name} must have the batch size of query, 2, got shape"):
        attn_ext.attention(**arguments(**{name: tensor}))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_batch_that_does_not_broadcast(name):
    tensor = torch.randn(4, *arguments()[name].shape[1:])
    with pytest.raises(ValueError, match="batch dimensions of query, key and value must broadcast, got"):
        attn_ext.scaled_dot_product_attention(**arguments(**{name: tensor}))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_heads_that_do_not_broadcast(name):
    tensor = torch.randn(2, 6, *arguments()[name].shape[2:])
    with pytest.raises(
        ValueError, match=r"heads of query, key and value.*without enable_gqa, must broadcast"
    ):
        attn_ext.scaled_dot_product_attention(**arguments(**{name: tensor}))


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("heads", [0, 2, 6])
def test_heads_that_do_not_divide(name, heads):
    tensor = torch.randn(2, heads, *arguments()[name].shape[2:])
    message = f"heads of query must be a multiple of those of {name}, got 3 and {heads}"
    with pytest.raises(ValueError, match=message):
        attn_ext.scaled_dot_product_attention(**arguments(**{name: tensor}), enable_gqa=True)


def test_enable_gqa_needs_heads():
    tensors = {name: tensor[0, 0] for name, tensor in arguments().items()}
    with pytest.raises(
        ValueError, match=r"query must be \(..., H, L, D\) with enable_gqa, got shape \(5, 4\)"
    ):
        attn_ext.scaled_dot_product_attention(**tensors, enable_gqa=True)


def test_heads_of_attention():
    with pytest.raises(ValueError, match="heads of query must be a multiple of those of key, got 3 and 2"):
        attn_ext.attention(**arguments(key=torch.randn(2, 2, 7, 4), value=torch.randn(2, 2, 7, 6)))
    with pytest.raises(ValueError, match="value must have as many heads as key, 3, got shape"):
        attn_ext.attention(**arguments(value=torch.randn(2, 1, 7, 6)))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_scale_is_finite(function, scale):
    with pytest.raises(ValueError, match=f"scale must be finite, got {scale}"):
        function(**arguments(), scale=scale)


@pytest.mark.parametrize("scale", ["1", [1.0], 1j, torch.tensor(1.0)])
def test_scale_is_a_number(function, scale):
    with pytest.raises(TypeError, match=rf"scale must be a float or None, got {type(scale).__name__}"):
        function(**arguments(), scale=scale)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.1, float("nan")])
def test_dropout_is_a_probability(function, dropout_p):
    with pytest.raises(ValueError, match=f"dropout_p must be from 0 to 1, got {dropout_p}"):
        function(**arguments(), dropout_p=dropout_p)


@pytest.mark.parametrize("dropout_p", ["0", None, torch.tensor(0.5), [0.5], 1j])
def test_dropout_is_a_number(function, dropout_p):
    with pytest.raises(TypeError, match=rf"dropout_p must be a float, got {type(dropout_p).__name__}"):
        function(**arguments(), dropout_p=dropout_p)


@pytest.mark.parametrize("dropout_p", [0, 0.0, 0.5, 1, 1.0])
def test_dropout_that_is_valid(function, dropout_p):
    assert function(**arguments(), dropout_p=dropout_p).isfinite().all()


@pytest.mark.parametrize("bad", [0, 1, None, "yes"])
def test_is_causal_is_a_bool(bad):
    with pytest.raises(TypeError, match=rf"is_causal must be a bool, got {type(bad).__name__}"):
        attn_ext.scaled_dot_product_attention(**arguments(), is_causal=bad)


def test_is_causal_and_a_mask():
    with pytest.raises(ValueError, match="attn_mask must be None when is_causal is True"):
        attn_ext.scaled_dot_product_attention(
            **arguments(), attn_mask=torch.ones(5, 7, dtype=torch.bool), is_causal=True
        )


@pytest.mark.parametrize("bad", [1.0, [[True]], Causal()])
def test_attn_mask_is_a_tensor(bad):
    with pytest.raises(
        TypeError, match=rf"attn_mask must be a torch.Tensor or None, got {type(bad).__name__}"
    ):
        attn_ext.scaled_dot_product_attention(**arguments(), attn_mask=bad)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.complex64, torch.float8_e4m3fn])
def test_attn_mask_dtype(dtype):
    with pytest.raises(TypeError, match=rf"attn_mask must be bool \(True = attend\).*got {dtype}"):
        attn_ext.scaled_dot_product_attention(**arguments(), attn_mask=torch.ones(5, 7).to(dtype))


@pytest.mark.parametrize(
    "shape", [(), (6,), (5, 6), (4, 7), (2, 5, 7), (3, 3, 5, 7), (2, 2, 5, 7), (1, 2, 3, 5, 7), (0, 3, 5, 7)]
)
def test_attn_mask_shape(shape):
    with pytest.raises(
        ValueError, match=r"attn_mask must have 1 to 4 dimensions and be broadcastable to \(2, 3, 5, 7\)"
    ):
        attn_ext.scaled_dot_product_attention(**arguments(), attn_mask=torch.ones(shape))


@pytest.mark.parametrize("shape", [(2, 1, 5, 7), (1, 3, 5, 7), (1, 1, 1, 1)])
def test_attn_mask_of_more_dimensions_than_the_inputs(shape):
    tensors = {name: tensor[0] for name, tensor in arguments().items()}
    with pytest.raises(ValueError, match=r"attn_mask must have 1 to 3 dimensions.*\(3, 5, 7\)"):
        attn_ext.scaled_dot_product_attention(**tensors, attn_mask=torch.ones(shape))


def test_attn_mask_device_and_layout():
    mask = torch.ones(5, 7)
    with pytest.raises(ValueError, match="attn_mask must be on the device of query, cpu, got meta"):
        attn_ext.scaled_dot_product_attention(**arguments(), attn_mask=mask.to("meta"))
    with pytest.raises(TypeError, match=r"attn_mask must be a dense tensor, got layout torch.sparse_coo"):
        attn_ext.scaled_dot_product_attention(**arguments(), attn_mask=mask.to_sparse())


@pytest.mark.parametrize("bad", [torch.ones(5, 7), True, "causal", Causal])
def test_mask_is_a_mask(bad):
    with pytest.raises(TypeError, match=rf"mask must be None or an attn_ext mask, got {type(bad).__name__}"):
        attn_ext.attention(**arguments(), mask=bad)


def test_mask_sizes():
    with pytest.raises(
        ValueError, match=r"mask Dense must .* be broadcastable to \(2, 3, 5, 7\), got shape \(5, 6\)"
    ):
        attn_ext.attention(**arguments(), mask=Dense(torch.ones(5, 6)))
    with pytest.raises(ValueError, match="mask KeyLengths must hold one length per batch entry, 2, got 3"):
        attn_ext.attention(**arguments(), mask=KeyLengths([1, 2, 3]))
    for lengths in ([1, 8], torch.tensor([-1, 3])):
        with pytest.raises(ValueError, match="mask KeyLengths must hold lengths from 0 to 7, got"):
            attn_ext.attention(**arguments(), mask=Causal() & KeyLengths(lengths))


def test_segments_sizes():
    ids = torch.zeros(2, 7, dtype=torch.int64)
    for bad in (ids[:, :6], ids[0, :6], torch.zeros(3, 6, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"Segments must have query_ids of shape \(2, 5\) or \(5,\)"):
            attn_ext.attention(**arguments(), mask=Segments(bad, ids[0]))
        with pytest.raises(ValueError, match=r"Segments must have kv_ids of shape \(2, 7\) or \(7,\)"):
            attn_ext.attention(**arguments(), mask=Causal() & Segments(ids[0, :5], bad))


COMBINATIONS = {
    "floating point": (
        Causal() | Dense(torch.zeros(5, 7)),
        TypeError,
        r"masks combined with \| must be boolean, got a floating-point Dense mask",
    ),
    "ranges": (
        Causal() | Prefix(1) | Prefix(2) | Prefix(3) | SlidingWindow(1, 0),
        ValueError,
        "a mask must let a query see at most 4 ranges of keys, got 5",
    ),
    "ranges of both": (
        (Causal() | Prefix(1) | Prefix(2)) & (Causal() | Prefix(1)),
        ValueError,
        "a mask must let a query see at most 4 ranges of keys, got 6",
    ),
    "larger": (
        Dense(torch.ones(7, dtype=torch.bool)) | Causal(),
        NotImplementedError,
        r"\| of a Dense mask and a mask of another kind needs a tensor of shape \(1, 1, 5, 7\)",
    ),
    "scattered": (
        Segments(torch.zeros(5, dtype=torch.int64), torch.arange(7) % 2) | Causal(),
        NotImplementedError,
        r"Segments combined with \| must be contiguous",
    ),
}


@pytest.mark.parametrize(("mask", "error", "message"), COMBINATIONS.values(), ids=COMBINATIONS)
def test_combinations_that_are_refused(mask, error, message):
    with pytest.raises(error, match=message):
        attn_ext.attention(**arguments(), mask=mask)


FLOATING = "must be float32, float64, float16 or bfloat16"
BAD_OPTIONS = {
    "bias": [
        *((bad, TypeError, "must be a torch.Tensor or None, got") for bad in (1.0, [[1.0]], Causal())),
        (torch.ones(5, 7, dtype=torch.bool), TypeError, f"{FLOATING}, got torch.bool: pass mask="),
        (torch.ones(5, 7, dtype=torch.int64), TypeError, f"{FLOATING}, got torch.int64"),
        *(
            (torch.ones(shape), ValueError, r"must have 1 to 4 dimensions and .* to \(2, 3, 5, 7\)")
            for shape in ((), (6,), (5, 6), (4, 7), (2, 5, 7), (3, 3, 5, 7), (1, 2, 3, 5, 7), (0, 3, 5, 7))
        ),
        (torch.ones(5, 7, device="meta"), ValueError, "must be on the device of query, cpu, got meta"),
        (torch.ones(5, 7).to_sparse(), TypeError, "must be a dense tensor, got layout torch.sparse_coo"),
    ],
    "softcap": [
        *((bad, TypeError, "must be a float or None, got") for bad in ("1", [1.0], 1j, torch.tensor(1.0))),
        *(
            (bad, ValueError, f"must be a finite number that is not negative, got {bad}")
            for bad in (-1.0, float("nan"), float("inf"))
        ),
    ],
    "alibi_slopes": [
        *((bad, TypeError, "must be a torch.Tensor or None, got") for bad in (1.0, [0.1, 0.2, 0.3])),
        *((torch.ones(3, dtype=dtype), TypeError, FLOATING) for dtype in (torch.int64, torch.bool)),
        *(
            (torch.ones(shape), ValueError, r"must have shape \(3,\) or \(2, 3\) or \(1, 3\), got shape")
            for shape in ((), (1,), (2,), (3, 3), (3, 1), (1, 1, 3))
        ),
        (torch.ones(3, device="meta"), ValueError, "must be on the device of query, cpu, got meta"),
        (torch.ones(3).to_sparse(), TypeError, "must be a dense tensor, got layout torch.sparse_coo"),
        (torch.ones(3, requires_grad=True), NotImplementedError, "must not require grad"),
    ],
    "sinks": [
        *((bad, TypeError, "must be a torch.Tensor or None, got") for bad in (1.0, [0.1, 0.2, 0.3])),
        *((torch.ones(3, dtype=dtype), TypeError, FLOATING) for dtype in (torch.int64, torch.bool)),
        *(
            (torch.ones(shape), ValueError, r"must have shape \(3,\), got shape")
            for shape in ((), (1,), (2,), (2, 3), (1, 3))
        ),
        (torch.ones(3, device="meta"), ValueError, "must be on the device of query, cpu, got meta"),
        (torch.ones(3).to_sparse(), TypeError, "must be a dense tensor, got layout torch.sparse_coo"),
    ],
    "dropout_seed": [
        *((bad, TypeError, "must be an int, a tensor or None, got") for bad in (1.0, "1", True, [1])),
        *(
            (torch.tensor(1, dtype=dtype), TypeError, f"must be int64, got {dtype}")
            for dtype in (torch.int32, torch.float32, torch.bool)
        ),
        (torch.tensor([1]), ValueError, r"must have no dimension, got shape \(1,\)"),
        (torch.tensor(1, device="meta"), ValueError, "must be on the device of query, cpu, got meta"),
        *((bad, ValueError, f"must fit in 64 bits, got {bad}") for bad in (2**63, -(2**63) - 1)),
    ],
}
BAD_OPTION_CASES = [(name, *case) for name, cases in BAD_OPTIONS.items() for case in cases]


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize(("name", "bad", "error", "message"), BAD_OPTION_CASES)
def test_options_of_attention(name, bad, error, message, dropout_p):
    with pytest.raises(error, match=f"{name} {message}"):
        attn_ext.attention(**arguments(), **{name: bad}, dropout_p=dropout_p)


def test_options_that_are_valid():
    seed, slopes = torch.tensor(-(2**63)), torch.rand(2, 3)
    for options in (
        {"softcap": 0},
        {"softcap": 2, "dropout_p": 1, "dropout_seed": 2**63 - 1},
        {"alibi_slopes": slopes.half(), "sinks": slopes[0].double(), "dropout_p": 0.5, "dropout_seed": seed},
        {"alibi_slopes": slopes[:1].t().expand(3, 2).t(), "bias": torch.zeros(1).bfloat16()},
    ):
        assert attn_ext.attention(**arguments(), **options).isfinite().all()


def test_the_kernels_own_error_is_not_lost(monkeypatch):
    """An error that the arguments do not explain is passed on as it is."""

    def fail(*_):
        raise RuntimeError("out of something")

    monkeypatch.setattr(attn_ext.functional, "attend_output", fail)
    for function in FUNCTIONS.values():
        with pytest.raises(RuntimeError, match="out of something"):
            function(**arguments())


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_operator_checks_what_reaches_the_kernels(name):
    """Called directly, it raises too, for anything that would read or write outside a tensor."""
    for shape in [(2, 3, 5), (9, 3, 7, 4), (2, 9, 7, 4), (2, 3, 7, 9999)]:
        tensors = arguments(**{name: torch.randn(shape)})
        if name == "query" and len(shape) == 4 and shape[1] == 9:
            continue  # nine heads are three groups of three
        with pytest.raises(RuntimeError):
            torch.ops.attn_ext.attention_forward(*tensors.values(), *Options())


COMPILED = [
    ("query", torch.ones(2, 3, 5, 4, dtype=torch.int64), TypeError, "must be float32"),
    ("mask", Causal() | Dense(torch.zeros(5, 7)), TypeError, "combined with"),
    ("mask", COMBINATIONS["ranges"][0], ValueError, "must let a query see at most 4 ranges"),
    ("mask", COMBINATIONS["larger"][0], NotImplementedError, "of a Dense mask and a mask of another"),
    ("dropout_p", 1.5, ValueError, "must be from 0 to 1"),
    ("dropout_p", None, TypeError, "must be a float"),
    *((name, *BAD_OPTIONS[name][index]) for name in BAD_OPTIONS for index in (0, -4)),
]


@pytest.mark.parametrize(("name", "bad", "error", "message"), COMPILED)
def test_errors_in_compiled_code(name, bad, error, message):
    """The check runs while tracing; without fullgraph the same error arrives as in eager code."""
    torch.compiler.reset()
    compiled = torch.compile(attn_ext.attention, backend="eager")
    with pytest.raises(error, match=message if name == "mask" else f"{name} {message}"):
        compiled(**arguments(**{name: bad}))
    torch.compiler.reset()  # forgets that the function could not be traced


@pytest.mark.parametrize(("name", "bad", "error", "message"), COMPILED)
def test_errors_in_fully_compiled_code(name, bad, error, message):
    """The compiler says where it was, and quotes the error."""
    torch.compiler.reset()
    compiled = torch.compile(attn_ext.attention, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=message if name == "mask" else f"{name} {message}"):
        compiled(**arguments(**{name: bad}))
    torch.compiler.reset()


def test_errors_in_compiled_code_of_torchs_function():
    torch.compiler.reset()
    compiled = torch.compile(attn_ext.scaled_dot_product_attention, backend="eager")
    with pytest.raises(ValueError, match="attn_mask must be None when is_causal is True"):
        compiled(**arguments(), attn_mask=torch.ones(5, 7), is_causal=True)
    with pytest.raises(ValueError, match="dropout_p must be from 0 to 1"):
        compiled(**arguments(), dropout_p=-0.5)
    torch.compiler.reset()
