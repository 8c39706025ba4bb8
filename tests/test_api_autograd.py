"""First derivatives in reverse mode: autograd, torch.func, vmap, autocast, checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import attn_ext
from attn_ext import Causal, Dense, KeyLengths, Prefix
from attn_ext._ops import Options

SCALE = 0.3


def public(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attn_ext.scaled_dot_product_attention(query, key, value, scale=SCALE)


def operator(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.ops.attn_ext.attention_forward(query, key, value, *Options(scale=SCALE))[0]


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
    results = torch.ops.attn_ext.attention_forward(*inputs(requires_grad=True), *Options())
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


def test_the_gradient_of_slopes_is_not_implemented():
    tensors, slopes = inputs(), torch.rand(2, requires_grad=True)
    with pytest.raises(NotImplementedError, match="alibi_slopes must not require grad"):
        attn_ext.attention(*tensors, alibi_slopes=slopes)
    with torch.no_grad():
        attn_ext.attention(*tensors, alibi_slopes=slopes)
    attn_ext.attention(*tensors, alibi_slopes=slopes.detach())


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


PER_SAMPLE = {
    "bias for all": {"bias": ((1, 1, 5, 7), None)},
    "bias with a batch": {"bias": ((2, 2, 1, 7), None)},
    "bias of two dimensions": {"bias": ((5, 7), None)},
    "mapped bias": {"bias": ((2, 1, 5, 7), 0)},
    "mapped bias for all": {"bias": ((1, 2, 5, 1), 0)},
    "sinks": {"sinks": ((2,), None)},
    "mapped sinks": {"sinks": ((2,), 0)},
    "both": {"bias": ((1, 2, 5, 7), None), "sinks": ((2,), 0)},
    "both mapped": {"bias": ((1, 2, 1, 7), 0), "sinks": ((2,), 0)},
}
CONSTANTS = {
    "none": {},
    "softcap and alibi": {"softcap": 1.5, "alibi_slopes": torch.tensor([0.5, 0.1])},
    "dropout": {"dropout_p": 0.4, "dropout_seed": 3},
    "masks": {"mask": Causal("bottom_right") | Prefix(2)},
}


@pytest.mark.parametrize("constants", CONSTANTS.values(), ids=CONSTANTS)
@pytest.mark.parametrize("arguments", PER_SAMPLE.values(), ids=PER_SAMPLE)
def test_gradients_per_sample(arguments, constants):
    """Of shared parameters there is one gradient for each sample, as a loop has it."""
    tensors, names = [*inputs(4)], list(arguments)
    dims = [0, 0, None]
    tensors[2] = tensors[2][0]
    for shape, dim in arguments.values():
        tensors.append(torch.randn(*([4] if dim == 0 else []), *shape, dtype=torch.float64))
        dims.append(dim)

    def loss(query, key, value, *others):
        options = dict(zip(names, others, strict=True))
        out, lse = attn_ext.attention(query, key, value, **options, **constants, return_lse=True)
        return out.pow(2).sum() + (lse * out.sum(-1)).sum()

    grad = torch.func.grad(loss, argnums=tuple(range(len(tensors))))
    one_by_one = [
        grad(*(x if dim is None else x[i] for x, dim in zip(tensors, dims, strict=True))) for i in range(4)
    ]
    expected = tuple(torch.stack(grads) for grads in zip(*one_by_one, strict=True))
    torch.testing.assert_close(torch.vmap(grad, tuple(dims))(*tensors), expected)


@pytest.mark.parametrize("grad", [False, True])
def test_vmap_of_dropout(grad):
    """As of torch's dropout: an error by default, one draw for all, or one for each."""
    query, key, value = inputs()
    same = torch.stack([query, query, query])

    def loss(query):
        return attn_ext.attention(query, key, value, dropout_p=0.5).pow(2).sum()

    function = torch.func.grad(loss) if grad else loss
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(function)(same)
    torch.manual_seed(1)
    expected = function(query)
    torch.manual_seed(1)
    for result in torch.vmap(function, randomness="same")(same):
        torch.testing.assert_close(result, expected)
    different = torch.vmap(function, randomness="different")(same)
    assert not any(torch.equal(different[i], different[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_vmap_over_seeds():
    query, key, value = inputs()
    seeds = torch.tensor([1, 2, 3])

    def attend(seed):
        return attn_ext.attention(query, key, value, dropout_p=0.5, dropout_seed=seed)

    torch.testing.assert_close(torch.vmap(attend)(seeds), torch.stack([attend(seed) for seed in seeds]))


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0)], ids=str)
def test_vmap_over_slopes_and_ranges(dims):
    query, key, value = inputs()
    slopes, lengths = torch.rand(3, 2), torch.randint(8, (3, 2))

    def attend(slopes, lengths):
        mask = Causal("bottom_right") | KeyLengths(lengths)
        return attn_ext.attention(query, key, value, alibi_slopes=slopes, mask=mask)

    arguments = [x if dim == 0 else x[0] for dim, x in zip(dims, (slopes, lengths), strict=True)]
    one_by_one = [
        attend(*(x if dim is None else x[i] for dim, x in zip(dims, arguments, strict=True)))
        for i in range(3)
    ]
    torch.testing.assert_close(torch.vmap(attend, dims)(*arguments), torch.stack(one_by_one))


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


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout_seed", [None, 3])
def test_checkpoint_with_dropout(use_reentrant, dropout_seed):
    """The seed that is drawn again is the same, and so are all bits."""

    def function(query, key, value, bias, sinks):
        options = {"bias": bias, "sinks": sinks, "dropout_p": 0.5, "dropout_seed": dropout_seed}
        return attn_ext.attention(query, key, value, **options).pow(2).sum()

    tensors = *inputs(), torch.randn(5, 7), torch.randn(2)
    results = []
    for call in (function, lambda *x: checkpoint(function, *x, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        copies = leaves(tensors)
        call(*copies).backward()
        results.append([x.grad for x in copies])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class CountForwards(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.attn_ext.attention_forward.default
        return function(*args, **(kwargs or {}))


def count_forwards(function, compiled):
    """How often the kernel runs. A profiler would also count what a checkpoint takes from its store; a mode
    cannot see into compiled graphs that draw random numbers.
    """
    if not compiled:
        with CountForwards() as counter:
            function()
        return counter.count
    with torch.autograd.profiler.profile() as profile:
        function()
    return sum(event.name == "attn_ext::attention_forward" for event in profile.function_events)


def keep_attention(context, operator, *args, **kwargs):
    kept = operator is torch.ops.attn_ext.attention_forward.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_selective_checkpoint(dropout_p, compiled):
    """With the attention among what is kept, the backward runs all else again."""

    def function(query, key, value, bias, sinks):
        out = attn_ext.attention(query.sin(), key, value, bias=bias, sinks=sinks, dropout_p=dropout_p)
        return out.sin().pow(2).sum()

    contexts = functools.partial(create_selective_checkpoint_contexts, keep_attention)

    def selective(*tensors):
        return checkpoint(function, *tensors, use_reentrant=False, context_fn=contexts)

    def full(*tensors):
        return checkpoint(function, *tensors, use_reentrant=False)

    tensors = *inputs(), torch.randn(5, 7), torch.randn(2)
    results, counts = [], []
    torch.compiler.reset()
    for call in (function, selective, full):
        if compiled:
            call = torch.compile(call, backend="aot_eager", fullgraph=True)
        torch.manual_seed(1)
        copies = leaves(tensors)
        result = call(*copies)
        counts.append(count_forwards(result.backward, compiled))
        results.append([x.grad for x in copies])
    assert counts == [0, 0, 1]
    for grads in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], grads, strict=True))
    torch.compiler.reset()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_keeps_bias_and_sinks(dtype):
    """They, their gradients and the slopes keep their dtype and precision."""
    tensors = tuple(tensor.float() for tensor in inputs())
    bias, sinks, slopes = torch.randn(5, 7).to(dtype), torch.randn(2).to(dtype), torch.rand(2).to(dtype)

    def step(cast):
        query, key, value, *more = leaves((*(x.to(cast) for x in tensors), bias, sinks))
        out, lse = attn_ext.attention(
            query, key, value, bias=more[0], sinks=more[1], alibi_slopes=slopes, return_lse=True
        )
        return out, lse, *torch.autograd.grad(out.float().sum() + lse.sum(), more)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = step(torch.float32)
    expected = step(torch.bfloat16)
    assert [x.dtype for x in actual] == [torch.bfloat16, torch.float32, dtype, dtype]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
