"""Derivatives: autograd, torch.func, autocast, checkpoints. What is not implemented raises, never is zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import attn_ext
from attn_ext import Causal, Dense, KeyLengths

SCALE = 0.3


def public(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attn_ext.scaled_dot_product_attention(query, key, value, scale=SCALE)


def operator(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.ops.attn_ext.attention_forward(query, key, value, None, None, SCALE, None, None)[0]


def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, scale=SCALE)


@pytest.fixture(params=[public, operator], ids=["public", "operator"])
def attend(request) -> Callable[..., Tensor]:
    """Both ways to the kernels; torch's own attention is the reference of all tests that take it."""
    return request.param


def inputs(*leading: int, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, 2, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6))
    return tuple(
        torch.randn(*leading, *shape, dtype=torch.float64, requires_grad=requires_grad) for shape in shapes
    )


def leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)


def squared_sum(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: attend(*tensors).pow(2).sum()


@pytest.mark.parametrize(
    "mask",
    [
        None,
        Causal(),
        Causal("bottom_right"),
        KeyLengths([3, 0]),
        Dense(torch.eye(5, 7) != 1),
        Dense(torch.eye(5, 7)),
    ],
    ids=str,
)
def test_gradcheck(mask):
    _, key, value = inputs(requires_grad=True)
    query = torch.randn(2, 4, 5, 8, dtype=torch.float64, requires_grad=True)  # two query heads to a key head

    def function(*tensors):
        out, lse = attn_ext.attention(*tensors, mask=mask, return_lse=True)
        return out, torch.where(lse == -torch.inf, 0, lse)

    assert torch.autograd.gradcheck(function, (query, key, value))


def test_gradients_of_lse_alone():
    tensors = inputs(requires_grad=True)
    _, lse = attn_ext.attention(*tensors, return_lse=True)
    grads = torch.autograd.grad(lse.sum(), tensors)
    assert grads[2].eq(0).all()
    assert grads[0].ne(0).any()


@pytest.mark.parametrize("index", range(3))
def test_only_one_input_requires_grad(attend, index):
    tensors = list(inputs())
    tensors[index].requires_grad_()
    (actual,) = torch.autograd.grad(squared_sum(attend)(*tensors), tensors[index])
    (expected,) = torch.autograd.grad(squared_sum(reference)(*tensors), tensors[index])
    torch.testing.assert_close(actual, expected)


def test_the_internal_output_is_not_differentiable():
    results = torch.ops.attn_ext.attention_forward(*inputs(requires_grad=True), None, None, 1.0, None, None)
    assert [result.requires_grad for result in results] == [True, True, False]


def test_without_grad(attend):
    tensors = inputs(requires_grad=True)
    expected = reference(*tensors).detach()
    with torch.no_grad():
        out = attend(*tensors)
    assert not out.requires_grad
    torch.testing.assert_close(out, expected)
    with torch.inference_mode():
        out = attend(*tensors)
        assert out.is_inference()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_dispatch_state_is_restored(mode):
    """The short way past the autograd kernel leaves the dispatcher as it was, even when it raises."""
    query, key, value = inputs()
    is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
    with mode():
        before = is_excluded(torch._C.DispatchKey.AutogradCPU)
        public(query, key, value)
        with pytest.raises(ValueError, match="value must"):
            public(query, key, value[:, :, :3])
        assert is_excluded(torch._C.DispatchKey.AutogradCPU) == before
    assert not is_excluded(torch._C.DispatchKey.AutogradCPU)
    assert public(query.requires_grad_(), key, value).requires_grad


def test_inputs_changed_in_place_are_noticed():
    query, key, value = inputs(requires_grad=True)
    key = key * 1
    out = public(query, key, value)
    key.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# --- What is not implemented --------------------------------------------------------------------------------


def test_double_backward_raises(attend):
    tensors = inputs(requires_grad=True)
    grad_out = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad(attend(*tensors), tensors, grad_out, create_graph=True)
    for target in (*tensors, grad_out):
        with pytest.raises(NotImplementedError, match="double backward of attention is not implemented"):
            torch.autograd.grad(sum(grad.sum() for grad in grads), target, retain_graph=True)


def test_double_backward_under_torch_func_raises(attend):
    query, key, value = inputs()

    def inner(query, key):
        return torch.func.grad(lambda k: attend(query, k, value).pow(2).sum())(key).sum()

    with pytest.raises(NotImplementedError, match="double backward"):
        torch.func.grad(inner)(query, key)
    with pytest.raises(NotImplementedError, match="double backward"):
        inner(query.requires_grad_(), key).backward()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("index", range(3))
def test_dual_tensors_raise(attend, index, requires_grad):
    tensors = list(inputs(requires_grad=requires_grad))
    with forward_ad.dual_level():
        tensors[index] = forward_ad.make_dual(tensors[index], torch.ones_like(tensors[index]))
        with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
            attend(*tensors)


def test_a_forward_mode_level_without_tangents(attend):
    tensors = inputs(requires_grad=True)
    with forward_ad.dual_level():
        out = attend(*tensors)
    torch.testing.assert_close(out, reference(*tensors))
    out.sum().backward()
    assert tensors[0].grad is not None


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.jacfwd(f)(x),
        lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
        lambda f, x: torch.func.linearize(f, x),
        lambda f, x: torch.func.jvp(torch.func.grad(lambda x: f(x).sum()), (x,), (x,)),
        lambda f, x: torch.vmap(lambda t: torch.func.jvp(f, (x,), (t,))[1])(torch.stack([x, x])),
    ],
    ids=["jvp", "jacfwd", "hessian", "linearize", "jvp(grad)", "vmap(jvp)"],
)
def test_forward_mode_transforms_raise(attend, transform):
    query, key, value = inputs()
    with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
        transform(lambda query: attend(query, key, value), query)


# --- torch.func ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.grad(squared_sum(f), argnums=(0, 1, 2)),
        lambda f: lambda *x: torch.func.vjp(f, *x)[1](torch.ones(2, 2, 5, 6, dtype=torch.float64)),
        lambda f: torch.func.jacrev(f, argnums=(0, 1, 2)),
    ],
    ids=["grad", "vjp", "jacrev"],
)
def test_reverse_mode_transforms(attend, transform):
    tensors = inputs()
    torch.testing.assert_close(transform(attend)(*tensors), transform(reference)(*tensors))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, dims: torch.vmap(f, dims),
        lambda f, dims: torch.vmap(torch.func.grad(squared_sum(f), argnums=(0, 1, 2)), dims),
        lambda f, dims: torch.func.grad(squared_sum(torch.vmap(f, dims)), argnums=(0, 1, 2)),
        lambda f, dims: lambda *x: torch.autograd.grad(squared_sum(torch.vmap(f, dims))(*x), x),
    ],
    ids=["vmap", "vmap(grad)", "grad(vmap)", "backward(vmap)"],
)
@pytest.mark.parametrize(
    "dims", [(0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0), (3, 0, 1)], ids=str
)
def test_vmap(attend, transform, dims):
    shared, mapped = inputs(requires_grad=True), inputs(3, requires_grad=True)
    tensors = [
        s if dim is None else m.movedim(0, dim) for dim, s, m in zip(dims, shared, mapped, strict=True)
    ]
    torch.testing.assert_close(transform(attend, dims)(*tensors), transform(reference, dims)(*tensors))


def test_nested_vmap(attend):
    query, value = inputs(4, 3)[::2]
    key = inputs()[1]

    def twice(function):
        return torch.vmap(torch.vmap(function, (0, None, 0), out_dims=1), (0, None, 0), out_dims=2)

    torch.testing.assert_close(twice(attend)(query, key, value), twice(reference)(query, key, value))


def test_batched_gradients(attend):
    tensors = inputs(requires_grad=True)
    grad_outs = torch.randn(3, 2, 2, 5, 6, dtype=torch.float64)

    def grads(function):
        return torch.autograd.grad(function(*tensors), tensors, grad_outs, is_grads_batched=True)

    torch.testing.assert_close(grads(attend), grads(reference))


@pytest.mark.parametrize(
    "dims", [(0, 0, 0), (0, None, 0), (None, 0, 0), (0, 0, None), (None, None, 0)], ids=str
)
@pytest.mark.parametrize("batch", [1, 2])
def test_vmap_of_masks(dims, batch):
    """A mask and lengths that are mapped, or shared, whether the mask has a batch dimension or broadcasts."""
    _, key, value = (tensor[:batch] for tensor in inputs())
    masks, lengths = torch.rand(3, batch, 1, 5, 7) > 0.3, torch.randint(8, (3, batch))
    queries = inputs(3)[0][:, :batch]

    def attend(mask, lengths, query):
        return attn_ext.attention(query, key, value, mask=Dense(mask) & KeyLengths(lengths))

    for mask in (masks, masks[:, :1]):
        tensors = [t if dim == 0 else t[0] for dim, t in zip(dims, (mask, lengths, queries), strict=True)]
        one_by_one = [
            attend(*(t if dim is None else t[i] for dim, t in zip(dims, tensors, strict=True)))
            for i in range(3)
        ]
        torch.testing.assert_close(torch.vmap(attend, dims)(*tensors), torch.stack(one_by_one))


def test_gradients_of_outer_levels(attend):
    """An inner transform over something else must not hide the attention from autograd outside of it."""
    tensors = inputs(requires_grad=True)
    two = torch.tensor(2.0, dtype=torch.float64)

    def loss(function):
        return torch.func.grad(lambda factor: (function(*tensors) * factor).sum())(two)

    torch.testing.assert_close(
        torch.autograd.grad(loss(attend), tensors), torch.autograd.grad(loss(reference), tensors)
    )
    with torch.no_grad():
        grad = torch.func.grad(squared_sum(attend))(*tensors)
    assert not grad.requires_grad


# --- Memory-saving and mixed precision ----------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(attend, use_reentrant):
    plain = inputs(requires_grad=True)
    recomputed = leaves(plain)
    squared_sum(attend)(*plain).backward()
    checkpoint(squared_sum(attend), *recomputed, use_reentrant=use_reentrant).backward()
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_saved_tensors_hooks(attend):
    """Everything the backward keeps goes through the hooks, so that it can be moved or compressed."""
    tensors, saved = inputs(requires_grad=True), []

    def pack(tensor):
        saved.append(tensor.shape)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = attend(*tensors)
    assert sorted(map(tuple, saved)) == sorted(
        [*(tuple(tensor.shape) for tensor in tensors), (2, 2, 5, 6), (2, 2, 5), (2, 2, 5)]
    )
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(reference(*tensors).sum(), tensors)
    )


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_autocast(attend, dtype, autocast_dtype):
    """The dtype of the result is that of torch's attention: float64 stays, the others are cast."""
    tensors = leaves(tuple(tensor.to(dtype) for tensor in inputs()))
    with torch.autocast("cpu", dtype=autocast_dtype):
        out = attend(*tensors)
        assert out.dtype == reference(*tensors).dtype
    cast = tuple(tensor.detach().to(out.dtype).requires_grad_() for tensor in tensors)
    assert torch.equal(out, attend(*cast))
    out.sum().backward()
    assert all(tensor.grad.dtype == dtype for tensor in tensors)
    for actual, expected in zip(tensors, torch.autograd.grad(attend(*cast).sum(), cast), strict=True):
        assert torch.equal(actual.grad, expected.to(dtype))


def test_autocast_of_mixed_dtypes():
    query, key, value = (tensor.float() for tensor in inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = public(query, key.bfloat16(), value)
        assert torch.equal(out, public(query, key, value))
        with pytest.raises(TypeError, match="key must have the dtype of query"):
            public(query, key.double(), value)


def test_autocast_keeps_the_mask():
    """A float32 mask is added as it is; torch rounds it to the lower precision."""
    query, key, value = (tensor.float() for tensor in inputs())
    mask = torch.randn(5, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attn_ext.scaled_dot_product_attention(query, key, value, mask)
    assert torch.equal(
        out, attn_ext.scaled_dot_product_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), mask)
    )
