"""`override_sdpa`: what it reaches, what it passes on and how it counts, in eager and compiled models."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import attn_ext
from attn_ext import override_sdpa

TORCH_SDPA = F.scaled_dot_product_attention
SHAPE = (2, 4, 6, 8)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    override_sdpa.reset()
    yield
    assert F.scaled_dot_product_attention is TORCH_SDPA
    assert torch.backends.mha.get_fastpath_enabled()


def randn(*shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, dtype=torch.float64, requires_grad=True)


def attend(query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)


def counts() -> tuple[int, int, dict[str, int]]:
    report = override_sdpa.report()
    return report.calls, report.traced, report.passed_on


def assert_same(actual: Tensor, expected: Tensor, inputs) -> None:
    """Outputs and gradients."""
    torch.testing.assert_close(actual, expected)
    grad_out = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, grad_out), torch.autograd.grad(expected, inputs, grad_out)
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.rand(6, 6) < 0.8},
        {"attn_mask": torch.randn(2, 1, 6, 6, dtype=torch.float64)},
        {"attn_mask": causal_upper_left(6, 6)},
        {"attn_mask": causal_lower_right(6, 6)},
        {"enable_gqa": True},
        {"dropout_p": 1.0},
    ],
    ids=lambda options: "-".join(options),
)
def test_calls_equal_torch(options):
    heads = 2 if "enable_gqa" in options else 4
    inputs = randn(), randn(2, heads, 6, 8), randn(2, heads, 6, 8)
    expected = attend(*inputs, **options)
    with override_sdpa():
        actual = attend(*inputs, **options)
    assert counts() == (1, 0, {})
    assert_same(actual, expected, inputs)


def test_the_gradient_of_a_mask():
    inputs = randn(), randn(), randn(), randn(4, 1, 6)
    expected = attend(*inputs)
    with override_sdpa():
        actual = attend(*inputs)
    assert counts() == (1, 0, {})
    assert_same(actual, expected, inputs)


def test_dropout():
    """Attn_ext's own, from torch's generator."""
    inputs = [torch.randn(SHAPE) for _ in range(3)]
    torch.manual_seed(1)
    expected = attn_ext.scaled_dot_product_attention(*inputs, dropout_p=0.5)
    torch.manual_seed(1)
    with override_sdpa():
        actual = attend(*inputs, dropout_p=0.5)
        assert not torch.equal(attend(*inputs, dropout_p=0.5), actual)
    assert torch.equal(actual, expected)
    assert counts() == (2, 0, {})


def test_forward_mode():
    tensors, tangents = [[torch.randn(SHAPE, dtype=torch.float64) for _ in range(3)] for _ in range(2)]

    def tangent() -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(attend(*map(forward_ad.make_dual, tensors, tangents))).tangent

    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        expected = tangent()
    with override_sdpa():
        torch.testing.assert_close(tangent(), expected)
    assert counts() == (1, 0, {})


def test_double_backward():
    inputs = randn(), randn(), randn()

    def second() -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(attend(*inputs).sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), inputs)

    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        expected = second()
    with override_sdpa():
        torch.testing.assert_close(second(), expected)
    assert counts() == (1, 0, {})


def test_outside_nothing_is_counted():
    attend(randn(), randn(), randn())
    assert counts() == (0, 0, {})


# --- What is passed on --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "make", "options"),
    [
        ("tensors on meta", lambda shape: torch.empty(shape, device="meta"), {}),
        ("head_dim above 1024 or 0", lambda shape: torch.randn(1, 1, 2, 1025), {}),
        ("tensor subclass", lambda shape: torch.randn(shape).as_subclass(Subclass), {}),
    ],
)
def test_passed_on(reason, make, options):
    inputs = [make(SHAPE) for _ in range(3)]
    torch.manual_seed(1)
    expected = attend(*inputs, **options)
    torch.manual_seed(1)
    with override_sdpa():
        actual = attend(*inputs, **options)
    assert counts() == (0, 0, {reason: 1})
    assert type(actual) is type(expected)
    if actual.device.type != "meta":
        assert torch.equal(actual, expected)


class Subclass(Tensor):
    pass


def test_nested_tensors_are_passed_on():
    nested = torch.nested.nested_tensor([torch.randn(n, 4, 8) for n in (3, 5)], layout=torch.jagged)
    nested = nested.transpose(1, 2)
    expected = attend(nested, nested, nested)
    with override_sdpa():
        actual = attend(nested, nested, nested)
    assert counts() == (0, 0, {"nested tensors": 1})
    for a, b in zip(actual.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_a_causal_bias_that_is_passed_on_keeps_its_meaning(make):
    query, key = torch.randn(2, 4, 6, 1025), torch.randn(2, 4, 9, 1025)
    expected = attend(query, key, key, make(6, 9))
    with override_sdpa():
        torch.testing.assert_close(attend(query, key, key, make(6, 9)), expected)
    assert counts() == (0, 0, {"head_dim above 1024 or 0": 1})


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((None, None, None), {}),
        ((torch.randn(2, 3),), {}),
        ((torch.randn(2, 3),) * 3, {"no_such_argument": 1}),
        ((torch.randn(2, 3),) * 3 + (None, 0.0, False, 1.0), {}),
        ((torch.randn(2, 3), torch.randn(2, 4), torch.randn(2, 3)), {}),
        ((torch.randn(2, 3), torch.randn(2, 3).double(), torch.randn(2, 3)), {}),
        ((torch.ones(2, 3, dtype=torch.int64),) * 3, {}),
        ((torch.randn(2, 3),) * 3, {"attn_mask": torch.ones(5, 5)}),
        ((torch.randn(2, 3),) * 3, {"attn_mask": torch.ones(2, 2), "is_causal": True}),
        ((torch.randn(2, 3),) * 3, {"dropout_p": 2.0}),
    ],
)
def test_errors_are_those_of_torch(args, options):
    with pytest.raises(Exception) as expected:  # noqa: PT011
        TORCH_SDPA(*args, **options)
    with override_sdpa(), pytest.raises(expected.type):
        F.scaled_dot_product_attention(*args, **options)
    assert counts()[:2] == (0, 0)


# --- Modules ------------------------------------------------------------------------------------------------


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [SelfAttention, encoder_layer])
def test_modules(make, training):
    module, x = make().train(training), randn(2, 5, 8)
    with torch.set_grad_enabled(training):
        expected = module(x)
        with override_sdpa():
            actual = module(x)
    assert counts() == (1, 0, {})
    if training:
        assert_same(actual, expected, (x, *module.parameters()))
    else:
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [SelfAttention, encoder_layer])
def test_compiled_modules(make, training):
    """Compiled before, called within, without and within."""
    module, x = make().train(training), randn(2, 5, 8)
    compiled = torch.compile(module, backend="aot_eager")
    with torch.set_grad_enabled(training):
        expected = compiled(x)
        assert counts() == (0, 0, {})
        with override_sdpa():
            actual = compiled(x)
        assert counts()[1] > 0
        override_sdpa.reset()
        compiled(x)
        with override_sdpa():
            compiled(x)
    assert counts() == (0, 0, {})  # neither traced again
    if training:
        assert_same(actual, expected, (x, *module.parameters()))
    else:
        torch.testing.assert_close(actual, expected)


def test_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    ids = torch.randint(50, (2, 7))
    expected = model(ids).logits
    with override_sdpa():
        actual = model(ids).logits
    assert counts() == (2, 0, {})
    assert_same(actual, expected, tuple(model.parameters()))


# --- Compiled functions -------------------------------------------------------------------------------------


def operators_of(function) -> tuple:
    """The function compiled, and the list of what its graphs call."""
    called: list[str] = []

    def backend(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    return torch.compile(function, backend=backend, fullgraph=True), called


def test_compiled_functions():
    compiled, called = operators_of(attend)
    inputs = [torch.randn(SHAPE) for _ in range(3)]
    expected = compiled(*inputs)
    assert not any("attn_ext" in name for name in called)
    with override_sdpa():
        torch.testing.assert_close(compiled(*inputs), expected)
        assert any("attn_ext" in name for name in called)
        number = len(called)
        with override_sdpa():
            compiled(*inputs)
    assert torch.equal(compiled(*inputs), expected)
    assert len(called) == number, "compiled again"
    assert counts() == (0, 1, {})


@pytest.mark.parametrize(
    "options",
    [{"dropout_p": 0.5}, {"attn_mask": torch.zeros(6, 6, requires_grad=True)}],
    ids=["dropout", "mask gradient"],
)
def test_compiled_functions_take_every_option(options):
    compiled, called = operators_of(attend)
    with override_sdpa():
        compiled(*[torch.randn(SHAPE)] * 3, **options)
    assert counts() == (0, 1, {})
    assert any("attn_ext" in name for name in called)


def test_compiled_functions_pass_on():
    compiled, called = operators_of(attend)
    with override_sdpa():
        compiled(*[torch.randn(1, 1, 2, 1025)] * 3)
    assert counts() == (0, 0, {"head_dim above 1024 or 0": 1})
    assert not any("attn_ext" in name for name in called)


def test_context_in_a_compiled_function():
    @override_sdpa()
    def decorated(x: Tensor) -> Tensor:
        return attend(2 * x, x, x) + 1

    def entered(x: Tensor) -> Tensor:
        with override_sdpa():
            return attend(2 * x, x, x) + 1

    x = torch.randn(SHAPE)
    expected = attend(2 * x, x, x) + 1
    for function in (decorated, entered):
        override_sdpa.reset()
        torch.testing.assert_close(torch.compile(function, backend="eager")(x), expected)
        report = override_sdpa.report()
        assert report.calls + report.traced > 0
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(function, backend="eager", fullgraph=True)(x)


# --- Contexts -----------------------------------------------------------------------------------------------


def test_nesting():
    x = torch.randn(SHAPE)
    outer, inner = override_sdpa(), override_sdpa()
    with outer, inner, outer:
        attend(x, x, x)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    attend(x, x, x)
    inner.__exit__(None, None, None)
    attend(x, x, x)
    assert counts() == (2, 0, {})


def test_decorator_and_exceptions():
    @override_sdpa()
    def function(x: Tensor, depth: int) -> None:
        attend(x, x, x)
        if depth == 0:
            raise KeyError("reached the end")
        function(x, depth - 1)

    with pytest.raises(KeyError, match="reached the end"):
        function(torch.randn(SHAPE), 2)
    assert F.scaled_dot_product_attention is TORCH_SDPA
    assert counts() == (3, 0, {})


def test_a_fast_path_that_was_off_stays_off():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with override_sdpa():
            pass
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_what_was_there_before_gets_what_is_passed_on(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: "patched")
    with override_sdpa():
        assert attend(*[torch.randn(1, 1, 2, 1025)] * 3) == "patched"
    assert attend(None, None, None) == "patched"
    monkeypatch.undo()


def test_threads():
    """The replacement holds for all threads while any is in a context, and no call is lost."""
    taken, passed_on = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 1025)

    def work() -> None:
        for index in range(50):
            x = passed_on if index % 2 else taken
            with override_sdpa():
                attend(x, x, x)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts() == (100, 0, {"head_dim above 1024 or 0": 100})


def test_report():
    x, wide = torch.randn(SHAPE), torch.randn(1, 1, 2, 1025)
    with override_sdpa():
        attend(x, x, x)
        for _ in range(2):
            attend(wide, wide, wide)
    assert str(override_sdpa.report()) == (
        "scaled_dot_product_attention: 1 calls through attn_ext, 0 traced, 2 passed on to torch\n"
        "       2 head_dim above 1024 or 0"
    )
    override_sdpa.reset()
    assert counts() == (0, 0, {})
