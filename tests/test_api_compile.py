"""The operators under torch's tools: opcheck, compile, export, make_fx, FLOP counter, profiler."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import attn_ext
from attn_ext import Causal, Dense, KeyLengths, Prefix, Segments
from attn_ext._ops import Options

LENGTHS = torch.tensor([3, 7])
PADDED_AND_CAUSAL = Causal() & KeyLengths(LENGTHS)


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attn_ext.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def dense_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril(1)
    return attn_ext.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


def bottom_right(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out, lse = attn_ext.attention(query, key, value, mask=Causal("bottom_right") & Causal(), return_lse=True)
    return out + lse.unsqueeze(-1)


def mask_from_outside(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attn_ext.attention(query, key, value, mask=PADDED_AND_CAUSAL)


def mask_made_inside(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    mask = KeyLengths(LENGTHS) & Dense(torch.zeros(key.shape[2]))
    return attn_ext.attention(query, key, value, mask=mask, scale=0.2)


def three_dimensions(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attn_ext.scaled_dot_product_attention(query[0], key[0, :1], value[0, :1])


def five_dimensions(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attn_ext.scaled_dot_product_attention(query[None, :, :2], key, value)


FUNCTIONS = [
    *(
        causal,
        dense_mask,
        bottom_right,
        mask_from_outside,
        mask_made_inside,
        three_dimensions,
        five_dimensions,
    )
]


def inputs(
    query_len: int = 5, kv_len: int = 7, *, requires_grad: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Two query heads to a key head; query has memory order (B, L, H, D)."""
    query = torch.randn(2, query_len, 4, 8).transpose(1, 2)
    key, value = torch.randn(2, 2, kv_len, 8), torch.randn(2, 2, kv_len, 6)
    return tuple(tensor.requires_grad_(requires_grad) for tensor in (query, key, value))


def assert_same_training_step(actual, expected, tensors: tuple[Tensor, ...]) -> None:
    """Output, its strides, and gradients."""
    out, expected_out = actual(*tensors), expected(*tensors)
    torch.testing.assert_close(out, expected_out, check_stride=True)
    grad_out = torch.randn_like(expected_out)
    torch.testing.assert_close(
        torch.autograd.grad(out, tensors, grad_out), torch.autograd.grad(expected_out, tensors, grad_out)
    )


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch.compiler.reset()


RANGES = torch.tensor([[[[0, 3]]], [[[2, 7]]]])
OPTIONS = {
    "plain": {},
    "band": {"band_lower": -3, "band_upper": 1},
    "lengths": {"key_ranges": RANGES, "band_upper": 2},
    "mask": {"mask": torch.eye(5, 7).bool()[None, None]},
    "bias": {"bias": torch.randn(2, 1, 5, 7)},
    "bias of bfloat16": {"bias": torch.randn(1, 4, 1, 7).bfloat16()},
    "sinks": {"sinks": torch.randn(4)},
    "segments": {
        "query_segments": torch.tensor([[0, 0, 1, 1, 2]], dtype=torch.int32),
        "kv_segments": torch.tensor([[0, 0, 1, 1, 1, 2, 2]], dtype=torch.int32),
    },
    "alibi": {"alibi_slopes": torch.rand(2, 4, 1)},
    "softcap": {"softcap": 1.5},
    "dropout": {"dropout_p": 0.4, "dropout_seed": torch.tensor(3)},
}
OPTIONS["everything"] = {name: value for options in OPTIONS.values() for name, value in options.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_opcheck(options):
    forward, backward = torch.ops.attn_ext.attention_forward, torch.ops.attn_ext.attention_backward
    options = Options(**{"scale": 0.3, **options})
    differentiable = options._replace(
        **{
            name: tensor.clone().requires_grad_()
            for name, tensor in (("bias", options.bias), ("sinks", options.sinks))
            if tensor is not None
        }
    )
    tensors = inputs()
    torch.library.opcheck(forward.default, (*tensors, *differentiable))
    tensors = tuple(tensor.detach() for tensor in tensors)
    torch.library.opcheck(forward.default, (*tensors, *options))
    results = forward(*tensors, *options)
    grad_out, grad_lse = torch.randn_like(results[0]), torch.randn_like(results[1])
    wants = options.bias is not None, options.sinks is not None
    torch.library.opcheck(backward.default, (grad_out, grad_lse, *tensors, *results, *options, *wants))
    torch.library.opcheck(backward.default, (grad_out, None, *tensors, *results, *options, False, False))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["plain", "band", "lengths", "mask", "bias"])
def test_opcheck_of_the_output_alone(name, requires_grad):
    options = Options(**{"scale": 0.3, **OPTIONS[name]})
    bias = None if options.bias is None else options.bias.clone().requires_grad_(requires_grad)
    rest = options.mask, options.key_ranges, options.scale, options.band_lower, options.band_upper
    arguments = (*inputs(requires_grad=requires_grad), bias, *rest)
    torch.library.opcheck(torch.ops.attn_ext.attention_output.default, arguments)


def test_opcheck_of_the_dropout_mask():
    arguments = torch.tensor(3), 0.4, 2, 3, 1, 5, 7
    torch.library.opcheck(torch.ops.attn_ext.dropout_mask.default, arguments)


@pytest.mark.parametrize("lengths", [(5, 7), (1, 7), (5, 1), (1, 1), (0, 7), (5, 0)], ids=str)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fake_results_are_laid_out_like_real_ones(dtype, transposed, heads, lengths):
    """For every combination of sizes of 1, which have no order in memory."""

    def make(length: int, columns: int) -> Tensor:
        if transposed:
            return torch.randn(2, length, heads, columns, dtype=dtype).transpose(1, 2)
        return torch.randn(2, heads, length, columns, dtype=dtype)

    def layout(results: tuple[Tensor, ...]) -> list:
        return [(result.shape, result.stride(), result.dtype) for result in results]

    tensors = make(lengths[0], 8), make(lengths[1], 8), make(lengths[1], 6)
    options = Options(scale=0.3)
    output_options = (None, None, None, 0.3, None, None)
    forward, backward = torch.ops.attn_ext.attention_forward, torch.ops.attn_ext.attention_backward
    results = forward(*tensors, *options)
    meta = [tensor.to("meta") for tensor in tensors]
    assert [tensor.stride() for tensor in meta] == [tensor.stride() for tensor in tensors]
    assert layout(forward(*meta, *options)) == layout(results)
    output = torch.ops.attn_ext.attention_output
    outputs = output(*meta, *output_options), output(*tensors, *output_options)
    assert layout(outputs[:1]) == layout(outputs[1:]) == layout(results[:1])
    grads = backward(results[0], None, *tensors, *results, *options, False, False)
    meta_results = [result.to("meta") for result in results]
    assert layout(backward(meta_results[0], None, *meta, *meta_results, *options, False, False)) == layout(
        grads
    )


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_compile_traces_everything_into_one_graph(function, dynamic):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_same_training_step(compiled, function, inputs())


@pytest.mark.parametrize("function", [causal, dense_mask])
def test_compile_with_inductor(function):
    compiled = torch.compile(function, fullgraph=True)
    assert_same_training_step(compiled, function, inputs())


@pytest.mark.parametrize("function", [causal, dense_mask, bottom_right])
def test_compile_does_not_recompile_for_another_length(function):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_same_training_step(compiled, function, inputs())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in [(11, 13), (64, 100), (3, 1000)]:
            assert_same_training_step(compiled, function, inputs(*lengths))


IDS = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]])
PACKED = Segments(IDS[:, :5], IDS)


def plus_lse(results: tuple[Tensor, Tensor]) -> Tensor:
    out, lse = results
    return out + lse.unsqueeze(-1)


FEATURES = {
    "bias": lambda q, k, v, bias, sinks: attn_ext.attention(q, k, v, bias=bias),
    "bias of one dimension": lambda q, k, v, bias, sinks: attn_ext.attention(q, k, v, bias=bias[0, 0, 0]),
    "attn_mask": lambda q, k, v, bias, sinks: attn_ext.scaled_dot_product_attention(
        q, k, v, bias, enable_gqa=True
    ),
    "sinks": lambda q, k, v, bias, sinks: attn_ext.attention(q, k, v, sinks=sinks),
    "softcap": lambda q, k, v, bias, sinks: attn_ext.attention(q, k, v, softcap=1.5),
    "alibi": lambda q, k, v, bias, sinks: attn_ext.attention(q, k, v, alibi_slopes=torch.ones(4) / 3),
    "dropout": lambda q, k, v, bias, sinks: attn_ext.attention(q, k, v, dropout_p=0.5),
    "dropout by torch's name": lambda q, k, v, bias, sinks: attn_ext.scaled_dot_product_attention(
        q, k, v, dropout_p=0.5, enable_gqa=True
    ),
    "dropout of a number": lambda q, k, v, bias, sinks: attn_ext.attention(
        q, k, v, dropout_p=0.5, dropout_seed=3
    ),
    "prefix or causal": lambda q, k, v, bias, sinks: attn_ext.attention(q, k, v, mask=Prefix(3) | Causal()),
    "segments": lambda q, k, v, bias, sinks: attn_ext.attention(q, k, v, mask=PACKED & Causal()),
    "lse": lambda q, k, v, bias, sinks: plus_lse(attn_ext.attention(q, k, v, return_lse=True)),
    "everything": lambda q, k, v, bias, sinks: plus_lse(
        attn_ext.attention(
            q,
            k,
            v,
            mask=PACKED & (Prefix(3) | Causal("bottom_right")),
            bias=bias,
            softcap=1.5,
            alibi_slopes=torch.ones(2, 4) / 3,
            sinks=sinks,
            dropout_p=0.5,
            return_lse=True,
        )
    ),
}


def assert_same_step_of_features(actual, expected, tensors: tuple[Tensor, ...]) -> None:
    """Output and gradients, from the same state of the generator."""
    results = []
    for function in (actual, expected):
        torch.manual_seed(1)
        copies = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        out = function(*copies)
        out.sin().sum().backward()
        results.append([out.detach(), *(tensor.grad for tensor in copies)])
    assert [x is None for x in results[0]] == [x is None for x in results[1]]
    torch.testing.assert_close(*([x for x in result if x is not None] for result in results))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("function", FEATURES.values(), ids=FEATURES)
def test_compile_features(function, dynamic):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    tensors = *inputs(), torch.randn(1, 4, 5, 7), torch.randn(4)
    assert_same_step_of_features(compiled, function, tensors)
    if dynamic:
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_same_step_of_features(compiled, function, tensors)


@pytest.mark.parametrize("name", ["bias", "everything"])
def test_compile_features_with_inductor(name):
    function = FEATURES[name]
    if name == "everything":  # whose own generator draws another seed
        function = functools.partial(with_seed, torch.tensor(3))
    tensors = *inputs(), torch.randn(1, 4, 5, 7), torch.randn(4)
    assert_same_step_of_features(torch.compile(function, fullgraph=True), function, tensors)


def with_seed(seed: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
    options = {"softcap": 1.5, "bias": bias, "sinks": sinks, "dropout_p": 0.5, "dropout_seed": seed}
    mask = Prefix(3) | Causal("bottom_right")
    return plus_lse(attn_ext.attention(query, key, value, mask=mask, **options, return_lse=True))


def test_compiled_dropout_differs_from_call_to_call():
    tensors = inputs(requires_grad=False)
    for backend in ("aot_eager", "inductor"):
        torch.compiler.reset()
        compiled = torch.compile(
            lambda *x: attn_ext.attention(*x, dropout_p=0.5), fullgraph=True, backend=backend
        )
        first, second = compiled(*tensors), compiled(*tensors)
        assert not torch.equal(first, second)
        torch.manual_seed(1)
        first = compiled(*tensors)
        torch.manual_seed(1)
        assert torch.equal(compiled(*tensors), first)


def test_compile_a_module_in_training():
    module = attn_ext.nn.SelfAttention(32, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, 32)
    parameters = tuple(module.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).pow(2).sum(), parameters),
        torch.autograd.grad(module(x).pow(2).sum(), parameters),
    )


def test_compile_under_autocast():
    def function(*tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return causal(*tensors)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert compiled(*inputs()).dtype == torch.bfloat16
    assert_same_training_step(compiled, function, inputs())


def test_compile_of_transforms():
    tensors = inputs(requires_grad=False)
    stacked = tuple(torch.stack([tensor, 2 * tensor]) for tensor in tensors)
    gradient = torch.func.grad(lambda *tensors: causal(*tensors).pow(2).sum(), argnums=(0, 1, 2))
    for function, arguments in ((gradient, tensors), (torch.vmap(causal), stacked)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), function(*arguments))


def test_compiled_autograd():
    tensors = inputs()
    expected = torch.autograd.grad(causal(*tensors).pow(2).sum(), tensors)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        causal(*tensors).pow(2).sum().backward()
    torch.testing.assert_close(tuple(tensor.grad for tensor in tensors), expected)


class Attention(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.function(query, key, value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("function", [causal, bottom_right])
def test_export(function, strict):
    """Lengths stay dynamic down to 1: no guard of ours narrows them."""
    tensors = inputs(requires_grad=False)
    query_len, kv_len = (torch.export.Dim(name, min=1, max=4096) for name in ("query_len", "kv_len"))
    program = torch.export.export(
        Attention(function),
        tensors,
        strict=strict,
        dynamic_shapes={"query": {2: query_len}, "key": {2: kv_len}, "value": {2: kv_len}},
    )
    for exported in (program, program.run_decompositions()):
        assert re.search(r"attn_ext\.attention_(forward|output)", exported.graph_module.code)
        for lengths in [(5, 7), (1, 1), (1, 9), (20, 3)]:
            tensors = inputs(*lengths, requires_grad=False)
            torch.testing.assert_close(exported.module()(*tensors), function(*tensors))


def test_export_of_a_fixed_length():
    tensors = inputs(requires_grad=False)
    program = torch.export.export(Attention(causal), tensors)
    torch.testing.assert_close(program.module()(*tensors), causal(*tensors))


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(tracing_mode):
    def step(*tensors):
        return torch.autograd.grad(causal(*tensors).sum(), tensors)

    tensors = inputs()
    graph = make_fx(step, tracing_mode=tracing_mode)(*tensors)
    assert "attn_ext.attention_forward" in graph.code
    assert "attn_ext.attention_backward" in graph.code
    torch.testing.assert_close(graph(*tensors), step(*tensors))


@pytest.mark.parametrize("grad", [False, True])
def test_flop_counter(grad):
    """Two products forward and five backward, for each query head, whatever the heads of key."""
    tensors = inputs(requires_grad=grad)
    with FlopCounterMode(display=False) as counter:
        out = causal(*tensors)
        if grad:
            out.sum().backward()
    batch, heads, query_len, kv_len, head_dim, value_dim = 2, 4, 5, 7, 8, 6
    product = 2 * batch * heads * query_len * kv_len
    counts = counter.get_flop_counts()["Global"]
    forward = torch.ops.attn_ext.attention_forward if grad else torch.ops.attn_ext.attention_output
    assert counts.pop(forward) == product * (head_dim + value_dim)
    if grad:
        assert counts.pop(torch.ops.attn_ext.attention_backward) == product * (3 * head_dim + 2 * value_dim)
    assert not counts


@pytest.mark.parametrize("grad", [False, True])
def test_profiler_shows_the_operators(grad):
    tensors = inputs(requires_grad=grad)
    with torch.autograd.profiler.profile() as profile:
        out = causal(*tensors)
        if grad:
            out.sum().backward()
    names = {event.name for event in profile.function_events}
    names = {name for name in names if name.startswith("attn_ext::")}
    training = {"attn_ext::attention_forward", "attn_ext::attention_backward"}
    assert names == (training if grad else {"attn_ext::attention_output"})


def test_function_modes_see_the_operator():
    seen = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    tensors = inputs(requires_grad=False)
    with Recorder():
        causal(*tensors)
    assert torch.ops.attn_ext.attention_forward.default in seen
