"""Derivatives of every option, in both modes and beyond the first: exact, and in memory that is O(L)."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

import attn_ext
from attn_ext import Causal, Dense, KeyLengths, Prefix, Segments, SlidingWindow, _derivatives, testing

B, H, H_KV, LQ, LK, DK, DV = 2, 2, 1, 3, 4, 2, 3
SEED = 5
IDS = torch.tensor([[0, 0, 1, 1], [2, 1, 2, 3]])
VISIBLE = torch.tensor([[True, False, True, True], [False] * 4, [True, True, False, True]])

MASKS = {
    "causal": Causal("bottom_right"),
    "window": SlidingWindow(1, 0),
    "prefix or causal": Causal() | Prefix(2),
    "lengths": KeyLengths([3, 0]),
    "segments": Segments(IDS[:, :LQ], IDS),
    "dense": Dense(VISIBLE),
    "dense per head": Dense(torch.arange(H * LK).view(H, 1, LK) % 3 != 0),
    "combined": Causal("bottom_right") & KeyLengths([4, 2]) & Dense(VISIBLE),
}
BIAS_SHAPES = [
    (LK,),
    (LQ, 1),
    (LQ, LK),
    (H, 1, LK),
    (B, 1, 1, LK),
    (1, H, LQ, LK),
    (B, H, LQ, LK),
    (B, H, 1, 1),
]
# Options without a derivative, and the shapes of those that have one.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "none": ({}, {}),
    "scale": ({"scale": -0.7}, {}),
    "softcap": ({"softcap": 0.8}, {}),
    "alibi": ({"alibi_slopes": torch.tensor([0.5, -0.25])}, {}),
    "alibi per batch entry": ({"alibi_slopes": torch.tensor([[0.5, 0.1], [1.0, 0.0]])}, {}),
    "dropout": ({"dropout_p": 0.4, "dropout_seed": SEED}, {}),
    "sinks": ({}, {"sinks": (H,)}),
    **{f"mask {name}": ({"mask": mask}, {}) for name, mask in MASKS.items()},
    **{f"bias {shape}": ({}, {"bias": shape}) for shape in BIAS_SHAPES},
    "everything": (
        {
            "mask": KeyLengths([3, 0]) & (Causal("bottom_right") | Prefix(1)),
            "softcap": 0.8,
            "alibi_slopes": torch.tensor([0.5, -0.25]),
            "dropout_p": 0.4,
            "dropout_seed": SEED,
        },
        {"bias": (1, H, 1, LK), "sinks": (H,)},
    ),
}
COMPOSED = ("none", "mask lengths", "bias (2, 1, 1, 4)", "dropout", "everything")

Function = Callable[..., tuple[Tensor, Tensor]]


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Any = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse, 0 where it is -inf, by operators that torch differentiates."""
    key, value = (tensor.repeat_interleave(H // H_KV, dim=1) for tensor in (key, value))
    scores = query @ key.mT * (DK**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        distance = (torch.arange(LQ)[:, None] + LK - LQ - torch.arange(LK)).abs()
        scores = scores - alibi_slopes[..., None, None] * distance
    if bias is not None:
        scores = scores + bias
    visible = torch.ones(B, H, LQ, LK, dtype=torch.bool)
    if mask is not None:
        visible = mask.to_dense(B, H, LQ, LK)
    exponentials = torch.where(visible, torch.exp(torch.where(visible, scores, 0)), 0)
    total = exponentials.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks).view(H, 1, 1)
    dead = total == 0
    total = torch.where(dead, 1, total)
    weights = exponentials / total
    if dropout_p:
        weights = weights * testing.dropout_mask(dropout_seed, dropout_p, B, H, LQ, LK)
    return weights @ value, torch.log(total).squeeze(-1)


def kernels(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = attn_ext.attention(query, key, value, **options, return_lse=True)
    return out, torch.where(lse == -torch.inf, 0, lse)


def problem(
    name: str, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], Callable[[Function], Function]]:
    """The inputs that have a derivative, and what makes a function of them."""
    constants, shapes = OPTIONS[name]
    constants = {
        name: option.to(dtype) if isinstance(option, Tensor) else option for name, option in constants.items()
    }
    sizes = (B, H, LQ, DK), (B, H_KV, LK, DK), (B, H_KV, LK, DV), *shapes.values()
    tensors = [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]

    def bind(function: Function) -> Function:
        def bound(query: Tensor, key: Tensor, value: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
            return function(query, key, value, **constants, **dict(zip(shapes, others, strict=True)))

        return bound

    return tensors, bind


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def loss(function: Function) -> Callable[..., Tensor]:
    """A number with nonlinear use of both results."""

    def of(*tensors: Tensor) -> Tensor:
        out, lse = function(*tensors)
        return out.sin().sum() + (lse * out.sum(-1)).pow(2).sum()

    return of


@pytest.fixture
def two_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three queries are more than one slice then."""
    monkeypatch.setattr(_derivatives, "_SLICE_ELEMENTS", 2 * B * H * LK)


# --- Against finite differences -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.usefixtures("two_rows_at_a_time")
def test_gradcheck(name: str) -> None:
    tensors, bind = problem(name)
    assert gradcheck(
        bind(kernels),
        leaves(tensors),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.usefixtures("two_rows_at_a_time")
def test_gradgradcheck(name: str) -> None:
    tensors, bind = problem(name)
    assert gradgradcheck(
        bind(kernels), leaves(tensors), check_fwd_over_rev=True, check_rev_over_rev=True, atol=1e-4
    )


@pytest.mark.parametrize("name", ["none", "everything"])
def test_gradgradcheck_batched(name: str) -> None:
    tensors, bind = problem(name)
    assert gradgradcheck(bind(kernels), leaves(tensors), check_batched_grad=True)


@pytest.mark.parametrize("index", [0, 1])
def test_gradgradcheck_of_one_result(index: int) -> None:
    tensors, bind = problem("everything")
    assert gradgradcheck(lambda *x: bind(kernels)(*x)[index], leaves(tensors), check_fwd_over_rev=True)


def test_gradgradcheck_of_a_mask_of_torchs_function() -> None:
    shapes = (B, 1, LQ, DK), (B, H, LK, DK), (H, LK, DV), (B, 1, 1, LK)

    def function(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return attn_ext.scaled_dot_product_attention(query, key, value, mask)

    tensors = leaves([torch.randn(shape, dtype=torch.float64) for shape in shapes])
    assert gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True)


def test_hidden_keys_of_a_bias() -> None:
    """-inf in a bias hides a key, has no derivative, and makes none of the others NaN."""
    query, key, value, bias = (
        torch.randn(shape, dtype=torch.float64)
        for shape in ((B, H, LQ, DK), (B, H_KV, LK, DK), (B, H_KV, LK, DV), (LQ, LK))
    )
    hidden = bias.masked_fill(~VISIBLE, -torch.inf)

    def second(bias: Tensor, mask: Any) -> list[Tensor]:
        tensors = leaves([query, key, value, bias])
        out, lse = kernels(*tensors[:3], bias=tensors[3], mask=mask)
        grads = torch.autograd.grad(out.sin().sum() + lse.sum(), tensors, create_graph=True)
        return [*grads, *torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), tensors)]

    actual, expected = second(hidden, None), second(bias, Dense(VISIBLE))
    assert all(tensor.isfinite().all() for tensor in actual)
    torch.testing.assert_close(actual, expected)


# --- Against torch's own derivatives ------------------------------------------------------------------------


@pytest.fixture
def math_attention() -> Iterator[None]:
    """Of torch's attentions the one that has all derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def grad_grad_grad(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    for _ in range(3):
        function = torch.func.grad(squared_norm(function))
    return function(x)


def squared_norm(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *x: function(*x).pow(2).sum()


def jvp_at_itself(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x: torch.func.jvp(function, (x,), (x.sin(),))[1]


TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.sin(),)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(squared_norm(f))(x),
    "jacfwd of jacfwd": lambda f, x: torch.func.jacfwd(torch.func.jacfwd(squared_norm(f)))(x),
    "jacrev of jacrev": lambda f, x: torch.func.jacrev(torch.func.jacrev(squared_norm(f)))(x),
    "jacrev of jacfwd": lambda f, x: torch.func.jacrev(torch.func.jacfwd(squared_norm(f)))(x),
    "jacfwd of hessian": lambda f, x: torch.func.jacfwd(torch.func.hessian(squared_norm(f)))(x),
    "jvp of jvp of jvp": lambda f, x: jvp_at_itself(jvp_at_itself(jvp_at_itself(f)))(x),
    "jvp of jvp of grad": lambda f, x: jvp_at_itself(jvp_at_itself(torch.func.grad(squared_norm(f))))(x),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](x.cos()),
    "vmap of jvp": lambda f, x: torch.vmap(lambda t: torch.func.jvp(f, (x,), (t,))[1])(
        torch.stack([x.sin(), x.cos()])
    ),
    "jvp of vmap": lambda f, x: torch.func.jvp(
        torch.vmap(f), (torch.stack([x, -x]),), (torch.stack([x, x]),)
    ),
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(squared_norm(f)), (x,), (x.sin(),)),
    "grad of jvp": lambda f, x: torch.func.grad(
        lambda x: torch.func.jvp(f, (x,), (x.sin(),))[1].pow(2).sum()
    )(x),
    "vmap of grad of grad": lambda f, x: torch.vmap(
        torch.func.grad(squared_norm(torch.func.grad(squared_norm(f))))
    )(torch.stack([x, -x])),
    "third derivative": grad_grad_grad,
    "torch.autograd.functional.hessian": lambda f, x: torch.autograd.functional.hessian(squared_norm(f), x),
    "torch.autograd.functional.vhp": lambda f, x: torch.autograd.functional.vhp(squared_norm(f), x, x.sin()),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.usefixtures("math_attention")
def test_transforms(transform: Callable[..., Any]) -> None:
    (query, key, value), _ = problem("none")
    for position in range(3):

        def of(function: Callable[..., Tensor], position: int = position) -> Callable[[Tensor], Tensor]:
            def one(changed: Tensor) -> Tensor:
                tensors = [query, key, value]
                tensors[position] = changed
                return function(*tensors, enable_gqa=True)

            return one

        x = (query, key, value)[position]
        torch.testing.assert_close(
            transform(of(attn_ext.scaled_dot_product_attention), x),
            transform(of(F.scaled_dot_product_attention), x),
        )


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x, t: torch.func.jvp(f, x, t),
        lambda f, x, t: torch.func.jacfwd(f, argnums=tuple(range(len(x))))(*x),
        lambda f, x, t: torch.func.jacrev(f, argnums=tuple(range(len(x))))(*x),
        lambda f, x, t: torch.func.hessian(loss(f), argnums=tuple(range(len(x))))(*x),
        lambda f, x, t: torch.func.linearize(f, *x)[1](*t),
        lambda f, x, t: torch.vmap(lambda *t: torch.func.jvp(f, x, t)[1])(
            *(torch.stack([one, 2 * one]) for one in t)
        ),
    ],
    ids=["jvp", "jacfwd", "jacrev", "hessian", "linearize", "vmap of jvp"],
)
@pytest.mark.usefixtures("two_rows_at_a_time")
def test_transforms_with_options(name: str, transform: Callable[..., Any]) -> None:
    tensors, bind = problem(name)
    tangents = tuple(torch.randn_like(tensor) for tensor in tensors)
    torch.testing.assert_close(
        transform(bind(kernels), tuple(tensors), tangents), transform(bind(plain), tuple(tensors), tangents)
    )


@pytest.mark.parametrize("name", COMPOSED)
def test_third_derivatives(name: str) -> None:
    tensors, bind = problem(name)

    def third(function: Function) -> list[Tensor]:
        inputs = leaves(tensors)
        result = loss(function)(*inputs)
        derivatives = []
        for _ in range(3):
            grads = torch.autograd.grad(result, inputs, create_graph=True)
            derivatives += grads
            result = sum(grad.sin().sum() for grad in grads)
        return derivatives

    torch.testing.assert_close(third(bind(kernels)), third(bind(plain)))


@pytest.mark.parametrize("name", ["everything", "none"])
def test_second_derivatives_of_each_pair(name: str) -> None:
    """One gradient by one input, with the others wanted or not."""
    tensors, bind = problem(name)

    def derivative(function: Function, first: int, second: int, wanted: set[int]) -> Tensor:
        inputs = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
        (grad,) = torch.autograd.grad(loss(bind(function))(*inputs), inputs[first], create_graph=True)
        return torch.autograd.grad(grad.sin().sum(), inputs[second])[0]

    for first, second in itertools.product(range(len(tensors)), repeat=2):
        expected = derivative(plain, first, second, {first, second})
        for wanted in ({first, second}, set(range(len(tensors)))):
            torch.testing.assert_close(derivative(kernels, first, second, wanted), expected)


def test_derivatives_by_the_gradients_of_the_results() -> None:
    tensors, bind = problem("everything")
    grad_outs = torch.randn(B, H, LQ, DV, dtype=torch.float64), torch.randn(B, H, LQ, dtype=torch.float64)

    def derivative(function: Function) -> tuple[Tensor, ...]:
        inputs, outer = leaves(tensors), leaves(list(grad_outs))
        grads = torch.autograd.grad(bind(function)(*inputs), inputs, outer, create_graph=True)
        return torch.autograd.grad(sum(grad.sin().sum() for grad in grads), outer)

    torch.testing.assert_close(derivative(kernels), derivative(plain))


def test_a_gradient_penalty_trains_a_model() -> None:
    """loss.backward() over a gradient, as WGAN-GP has it (Gulrajani et al., 2017)."""
    (query, key, value), bind = problem("none")
    weight = torch.randn(DK, DK, dtype=torch.float64)

    def train(function: Function) -> Tensor:
        parameter, x = weight.clone().requires_grad_(), query.clone().requires_grad_()
        out, _ = bind(function)(x @ parameter, key, value)
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (out.pow(2).sum() + (grad.norm() - 1).pow(2)).backward()
        return parameter.grad

    torch.testing.assert_close(train(kernels), train(plain))


# --- Forward mode -------------------------------------------------------------------------------------------


def test_a_dual_level_without_tangents() -> None:
    tensors, bind = problem("everything")
    inputs = leaves(tensors)
    expected = bind(kernels)(*inputs)
    with forward_ad.dual_level():
        results = bind(kernels)(*inputs)
        assert all(forward_ad.unpack_dual(result).tangent is None for result in results)
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(
        torch.autograd.grad(results[0].sum(), inputs), torch.autograd.grad(expected[0].sum(), inputs)
    )


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("index", range(5))
def test_one_dual_tensor(index: int, requires_grad: bool) -> None:
    tensors, bind = problem("everything")
    tangent = torch.randn_like(tensors[index])

    def derivative(function: Function) -> list[Tensor]:
        inputs = [x.clone().requires_grad_(requires_grad) for x in tensors]
        with forward_ad.dual_level():
            inputs[index] = forward_ad.make_dual(inputs[index], tangent)
            return [forward_ad.unpack_dual(result).tangent for result in bind(function)(*inputs)]

    for actual, expected in zip(derivative(kernels), derivative(plain), strict=True):
        # Value has no part in lse.
        actual, expected = (torch.zeros(()) if x is None else x for x in (actual, expected))
        torch.testing.assert_close(*torch.broadcast_tensors(actual.double(), expected.double()))


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_tangents_in_lower_precision(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """They have the dtypes of the results, and the numbers of float64 but for rounding."""
    tensors, bind = problem(name, dtype)
    tangents = tuple(torch.randn_like(tensor) for tensor in tensors)
    results, derivatives = torch.func.jvp(bind(kernels), tuple(tensors), tangents)
    assert [t.dtype for t in derivatives] == [t.dtype for t in results] == [dtype, torch.float32]
    doubles = tuple(t.double() for t in tensors), tuple(t.double() for t in tangents)
    constants, shapes = OPTIONS[name]

    def exact(query: Tensor, key: Tensor, value: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        return plain(query, key, value, **constants, **dict(zip(shapes, others, strict=True)))

    _, expected = torch.func.jvp(exact, *doubles)
    for actual, value in zip(derivatives, expected, strict=True):
        torch.testing.assert_close(actual.double(), value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_second_derivatives_in_lower_precision(dtype: torch.dtype) -> None:
    tensors, bind = problem("everything", dtype)

    def second(function: Function, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        out, lse = function(*inputs)
        grads = torch.autograd.grad(out.double().sum() + lse.double().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(grad.double().pow(2).sum() for grad in grads), inputs)

    actual = second(bind(kernels), leaves(tensors))
    expected = second(bind(kernels), leaves([tensor.double() for tensor in tensors]))
    tolerance = 20 * torch.finfo(dtype).eps
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert (a.double() - e).abs().max() <= tolerance * max(1, e.abs().max())


def test_lengths_of_zero() -> None:
    """No queries, no keys, no batch: derivatives are zero, or empty."""
    for shapes in (
        ((2, 2, 0, 4), (2, 1, 3, 4), (2, 1, 3, 5)),
        ((2, 2, 3, 4), (2, 1, 0, 4), (2, 1, 0, 5)),
        ((0, 2, 3, 4), (0, 1, 3, 4), (0, 1, 3, 5)),
        ((2, 0, 3, 4), (2, 0, 3, 4), (2, 0, 3, 5)),
    ):
        tensors = leaves([torch.randn(shape) for shape in shapes])
        grads = torch.autograd.grad(attn_ext.attention(*tensors).sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), tensors)
        assert all(x.eq(0).all() for x in second)
        assert [x.shape for x in second] == [x.shape for x in tensors]
        detached = tuple(x.detach() for x in tensors)
        _, tangent = torch.func.jvp(attn_ext.attention, detached, detached)
        assert tangent.eq(0).all()
        assert tangent.shape == (*shapes[0][:3], shapes[2][3])


# --- Memory -------------------------------------------------------------------------------------------------

PEAK_SCRIPT = """
import resource, sys, torch, attn_ext
torch.set_num_threads(1)

def double_backward(*tensors):
    tensors = [tensor.requires_grad_() for tensor in tensors]
    grads = torch.autograd.grad(attn_ext.attention(*tensors).sin().sum(), tensors, create_graph=True)
    torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), tensors)

def jvp(*tensors):
    torch.func.jvp(attn_ext.attention, tensors, tensors)

def jvp_of_grad(*tensors):
    grad = torch.func.grad(lambda *x: attn_ext.attention(*x).sin().sum(), argnums=(0, 1, 2))
    torch.func.jvp(grad, tensors, tensors)

step, length = globals()[sys.argv[1]], int(sys.argv[2])
step(*(torch.randn(1, 1, 300, 16) for _ in range(3)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(*(torch.randn(1, 1, length, 16) for _ in range(3)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("step", ["double_backward", "jvp", "jvp_of_grad"])
def test_peak_is_linear_in_length(step: str) -> None:
    """In a process of its own, since a peak never falls; tensors have half a MiB each."""
    length = 8192
    result = subprocess.run(
        [sys.executable, "-c", PEAK_SCRIPT, step, str(length)], capture_output=True, text=True, check=True
    )
    peak, scores = int(result.stdout) * 1024, length * length * 8
    assert peak < scores / 2.5, f"{peak / 2**20:.0f} MiB; one score matrix has {scores / 2**20:.0f} MiB"


def test_a_bias_beyond_the_precision_hides_nothing():
    query, key, value = (torch.randn(1, 2, 4, 8) for _ in range(3))
    bias = torch.full((1, 1, 4, 4), torch.finfo(torch.float64).min, dtype=torch.float64)
    primal, tangent = torch.func.jvp(
        lambda v: attn_ext.attention(query, key, v, bias=bias), (value,), (value,)
    )
    torch.testing.assert_close(tangent, primal)


def test_tangents_of_slopes_are_not_implemented():
    inputs = [torch.randn(1, 2, 4, 8) for _ in range(3)]
    slopes = torch.rand(2)
    with pytest.raises(NotImplementedError, match="alibi_slopes"):
        torch.func.jvp(lambda s: attn_ext.attention(*inputs, alibi_slopes=s), (slopes,), (slopes,))


def test_rows_that_see_nothing_do_not_feel_their_gradient():
    query, key, value = (torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = Dense(torch.tensor([False, True, True, True]).view(4, 1))
    out = attn_ext.attention(query, key, value, mask=mask)
    grad_out = torch.randn_like(out)
    grad_out[:, :, 0] = torch.nan
    grad_out.requires_grad_()
    grads = torch.autograd.grad(out, (query, key, value), grad_out, create_graph=True)
    for second in torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), (query, key, value)):
        assert second.isfinite().all()


def test_second_derivatives_without_query_heads():
    query = torch.randn(1, 0, 4, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    grads = torch.autograd.grad(
        attn_ext.attention(query, key, value).sum(), (query, key, value), create_graph=True
    )
    second = torch.autograd.grad(sum(grad.sum() for grad in grads), (key, value))
    assert all(grad.shape == key.shape and grad.eq(0).all() for grad in second)
