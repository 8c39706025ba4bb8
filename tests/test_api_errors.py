"""Every bad argument is a TypeError or ValueError that names it, says what it is and what was expected."""

from __future__ import annotations

import pytest
import torch

import attn_ext
from attn_ext import Causal, Dense, KeyLengths

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
def test_dropout_is_a_probability(dropout_p):
    with pytest.raises(ValueError, match=f"dropout_p must be from 0 to 1, got {dropout_p}"):
        attn_ext.scaled_dot_product_attention(**arguments(), dropout_p=dropout_p)


@pytest.mark.parametrize("dropout_p", ["0", None])
def test_dropout_is_a_number(dropout_p):
    with pytest.raises(TypeError, match=rf"dropout_p must be a float, got {type(dropout_p).__name__}"):
        attn_ext.scaled_dot_product_attention(**arguments(), dropout_p=dropout_p)


@pytest.mark.parametrize("dropout_p", [0.1, 1])
def test_dropout_is_not_implemented(dropout_p):
    with pytest.raises(NotImplementedError, match=rf"dropout is not implemented.*dropout_p={dropout_p}"):
        attn_ext.scaled_dot_product_attention(**arguments(), dropout_p=dropout_p)


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


@pytest.mark.parametrize("inputs_require_grad", [False, True])
def test_gradient_of_the_mask(inputs_require_grad):
    tensors = {name: tensor.requires_grad_(inputs_require_grad) for name, tensor in arguments().items()}
    mask = torch.zeros(1, 1, 5, 7, requires_grad=True)
    calls = [
        lambda: attn_ext.scaled_dot_product_attention(**tensors, attn_mask=mask),
        lambda: attn_ext.scaled_dot_product_attention(**tensors, attn_mask=mask[0, 0]),
        lambda: attn_ext.attention(**tensors, mask=Dense(mask)),
        lambda: torch.ops.attn_ext.attention_forward(*tensors.values(), mask, None, 1.0, None, None),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match="gradient of the attention mask is not implemented"):
            call()
        with torch.no_grad():
            call()


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
            torch.ops.attn_ext.attention_forward(*tensors.values(), None, None, 1.0, None, None)


def test_errors_in_compiled_code():
    """The check runs while tracing; without fullgraph the same error arrives as in eager code."""
    torch.compiler.reset()
    compiled = torch.compile(attn_ext.scaled_dot_product_attention, backend="eager")
    with pytest.raises(ValueError, match="attn_mask must be None when is_causal is True"):
        compiled(**arguments(), attn_mask=torch.ones(5, 7), is_causal=True)
    torch.compiler.reset()  # forgets that the function could not be traced
