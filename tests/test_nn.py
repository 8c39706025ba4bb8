"""`attn_ext.nn.SelfAttention` against the module it replaces, written out with einsum."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from attn_ext.nn import SelfAttention
from attn_ext.testing import BACKWARD_FACTOR, FORWARD_FACTOR, assert_within_rule

N, HEADS, EMBED = 2, 3, 24
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}


class EinsumSelfAttention(nn.Module):
    def __init__(
        self, embed_size: int, heads: int, scale: str = "embed_size", shared: bool = True, bias: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.shared = heads, embed_size // heads, shared
        self.divisor = (embed_size if scale == "embed_size" else self.head_dim) ** 0.5
        size = self.head_dim if shared else embed_size
        self.values = nn.Linear(size, size, bias=bias)
        self.keys = nn.Linear(size, size, bias=bias)
        self.queries = nn.Linear(size, size, bias=bias)
        self.fc_out = nn.Linear(embed_size, embed_size)

    def split(self, linear: nn.Linear, x: Tensor) -> Tensor:
        if self.shared:
            return linear(x.reshape(*x.shape[:2], self.heads, self.head_dim))
        return linear(x).reshape(*x.shape[:2], self.heads, self.head_dim)

    def forward(self, values: Tensor, keys: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
        values, keys = self.split(self.values, values), self.split(self.keys, keys)
        energy = torch.einsum("nqhd,nkhd->nhqk", self.split(self.queries, query), keys)
        if mask is not None:
            energy = energy.masked_fill(mask == 0, -1e20)
        weights = torch.softmax(energy / self.divisor, dim=3)
        return self.fc_out(torch.einsum("nhqk,nkhd->nqhd", weights, values).flatten(2))


def random_inputs(query_len: int = 7, key_len: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(N, key_len, EMBED), torch.randn(N, key_len, EMBED), torch.randn(N, query_len, EMBED)


def run(
    module: nn.Module, inputs: tuple[Tensor, ...], mask: Tensor | None = None, **kwargs
) -> tuple[Tensor, ...]:
    """The output and the gradients of the inputs and of the parameters."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    out = module(*inputs, mask, **kwargs)
    return out, *torch.autograd.grad(out.square().sum(), (*inputs, *module.parameters()))


def assert_same(
    module: SelfAttention,
    plain: nn.Module,
    inputs: tuple[Tensor, ...],
    mask: Tensor | None = None,
    plain_mask: Tensor | None = None,
    **kwargs,
) -> None:
    """`module` equals `plain` in float64, and in float32 is as near to that as `plain` itself is."""
    plain_mask = mask if plain_mask is None else plain_mask
    doubles = tuple(x.double() for x in inputs)
    exact = run(copy.deepcopy(plain).double(), doubles, plain_mask)
    for actual, expected in zip(
        run(copy.deepcopy(module).double(), doubles, mask, **kwargs), exact, strict=True
    ):
        torch.testing.assert_close(actual, expected, **FLOAT64)
    names = ("out", "values", "keys", "query", *(name for name, _ in module.named_parameters()))
    actuals, references = run(module, inputs, mask, **kwargs), run(plain, inputs, plain_mask)
    singles = zip(names, actuals, exact, references, strict=True)
    for name, actual, expected, reference in singles:
        factor = FORWARD_FACTOR if name == "out" else BACKWARD_FACTOR
        assert_within_rule(actual.detach(), expected.detach(), reference, factor, name)


def modules(
    scale: str = "embed_size", shared: bool = True, bias: bool = False
) -> tuple[SelfAttention, EinsumSelfAttention]:
    plain = EinsumSelfAttention(EMBED, HEADS, scale, shared, bias)
    module = SelfAttention(EMBED, HEADS, scale=scale, shared_projection=shared, bias=bias)
    module.load_state_dict(plain.state_dict())
    return module, plain


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("scale", ["embed_size", "head_dim"])
def test_equals_einsum(isa: str, scale: str, shared: bool, bias: bool) -> None:
    assert_same(*modules(scale, shared, bias), random_inputs())


def test_default_scale_is_that_of_embed_size() -> None:
    module, plain = modules()
    assert SelfAttention(EMBED, HEADS).scale == "embed_size"
    inputs = random_inputs()
    head_dim_scaled = EinsumSelfAttention(EMBED, HEADS, "head_dim")
    head_dim_scaled.load_state_dict(plain.state_dict())
    assert not torch.allclose(module(*inputs), head_dim_scaled(*inputs, None))


@pytest.mark.parametrize(
    "shape",
    [(11,), (7, 11), (1, 1, 1, 11), (N, 1, 1, 11), (N, 1, 7, 11), (1, HEADS, 7, 1), (N, HEADS, 7, 11)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_mask_zero_means_do_not_attend(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    module, plain = modules()
    mask = torch.rand(shape) < 0.6
    if mask.shape[-1] > 1:
        mask[..., 3] = True
    else:
        mask[:] = True
    assert_same(module, plain, random_inputs(), mask.to(dtype))


@pytest.mark.parametrize(("query_len", "key_len"), [(9, 9), (5, 9), (9, 5)])
def test_is_causal_is_the_lower_triangle(query_len: int, key_len: int) -> None:
    module, plain = modules()
    triangle = torch.ones(query_len, key_len).tril()
    assert_same(module, plain, random_inputs(query_len, key_len), plain_mask=triangle, is_causal=True)


def test_is_causal_and_mask_exclude_both() -> None:
    module, plain = modules()
    padding = torch.ones(N, 1, 1, 9)
    padding[1, ..., 6:] = 0
    both = torch.ones(9, 9).tril() * padding
    assert_same(module, plain, random_inputs(9, 9), padding, plain_mask=both, is_causal=True)


def test_one_argument_attends_to_itself() -> None:
    module, _ = modules()
    x, mask = torch.randn(N, 9, EMBED), torch.ones(9, 9).tril()
    torch.testing.assert_close(module(x), module(x, x, x), rtol=0, atol=0)
    torch.testing.assert_close(module(x, mask=mask), module(x, x, x, mask), rtol=0, atol=0)


def test_query_with_nothing_to_attend_to_gives_the_bias_and_no_gradient() -> None:
    module, _ = modules()
    values, keys, query = (x.requires_grad_() for x in random_inputs())
    mask = torch.ones(7, 11)
    mask[2] = 0
    out = module(values, keys, query, mask)
    assert torch.equal(out[:, 2], module.fc_out.bias.expand(N, EMBED))
    gradients = torch.autograd.grad(out[:, 2].sum(), (values, keys, query))
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    module, plain = modules()
    inputs = tuple(x.to(dtype) for x in random_inputs())
    module, plain = module.to(dtype), plain.to(dtype)
    expected = copy.deepcopy(plain).double()(*(x.double() for x in inputs), None)
    out = module(*inputs)
    assert out.dtype == dtype
    assert_within_rule(out.detach(), expected.detach(), plain(*inputs, None), FORWARD_FACTOR)


@pytest.mark.parametrize(("query_len", "key_len"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sequences(query_len: int, key_len: int) -> None:
    module, _ = modules()
    out = module(*random_inputs(query_len, key_len))
    assert torch.equal(out, module.fc_out.bias.expand(N, query_len, EMBED))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", [True, False])
def test_state_dict_round_trip(shared: bool, bias: bool) -> None:
    module, plain = modules(shared=shared, bias=bias)
    assert list(module.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(module.state_dict())
    rebuilt = SelfAttention.from_state_dict(module.state_dict(), HEADS)
    assert (rebuilt.shared_projection, rebuilt.values.bias is not None) == (shared, bias)
    inputs = random_inputs()
    assert torch.equal(rebuilt(*inputs), module(*inputs))


def test_from_state_dict_keeps_the_dtype() -> None:
    module = SelfAttention(EMBED, HEADS, dtype=torch.bfloat16)
    rebuilt = SelfAttention.from_state_dict(module.state_dict(), HEADS, scale="head_dim")
    assert {p.dtype for p in rebuilt.parameters()} == {torch.bfloat16}
    assert rebuilt.scale == "head_dim"


def test_from_state_dict_says_what_is_wrong() -> None:
    state = SelfAttention(EMBED, HEADS).state_dict()
    with pytest.raises(ValueError, match=r"values\.weight must be \(head_dim, head_dim\) = \(12, 12\)"):
        SelfAttention.from_state_dict(state, heads=2)
    del state["fc_out.weight"]
    with pytest.raises(ValueError, match=r"no fc_out\.weight"):
        SelfAttention.from_state_dict(state, HEADS)


@pytest.mark.parametrize("shared", [True, False])
def test_loading_the_other_projection_names_the_argument(shared: bool) -> None:
    block = nn.ModuleDict({"attention": SelfAttention(EMBED, HEADS, shared_projection=shared)})
    other = nn.ModuleDict({"attention": SelfAttention(EMBED, HEADS, shared_projection=not shared)})
    with pytest.raises(RuntimeError, match=rf"attention\.values\.weight .*shared_projection={not shared}"):
        block.load_state_dict(other.state_dict())


def test_survives_copy_and_pickle(tmp_path) -> None:
    module, _ = modules()
    torch.save(module, tmp_path / "module.pt")
    inputs = random_inputs()
    for twin in (copy.deepcopy(module), torch.load(tmp_path / "module.pt", weights_only=False)):
        assert torch.equal(twin(*inputs), module(*inputs))


@pytest.mark.parametrize(
    ("arguments", "kwargs", "error", "message"),
    [
        ((10, 3), {}, ValueError, "embed_size must be a multiple of heads, got embed_size=10, heads=3"),
        ((8.0, 2), {}, TypeError, "embed_size must be an int, got float"),
        ((8, True), {}, TypeError, "heads must be an int, got bool"),
        ((8, 0), {}, ValueError, "heads must be positive, got 0"),
        ((8, 2), {"scale": "heads"}, ValueError, "scale must be 'embed_size' or 'head_dim', got 'heads'"),
    ],
)
def test_constructor_errors(arguments, kwargs, error, message) -> None:
    with pytest.raises(error, match=message):
        SelfAttention(*arguments, **kwargs)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: m([1.0]), TypeError, "values must be a tensor, got list"),
        (
            lambda m, x: m(x, x),
            TypeError,
            "query must be a tensor, got NoneType; give values alone, or all three",
        ),
        (lambda m, x: m(x[0]), ValueError, r"values must be \(N, L, embed_size=24\), got \(5, 24\)"),
        (
            lambda m, x: m(x, x, x[..., :8]),
            ValueError,
            r"query must be \(N, L, embed_size=24\), got \(2, 5, 8\)",
        ),
        (
            lambda m, x: m(x, x[:, 1:], x),
            ValueError,
            r"values and keys must agree, got \(2, 5, 24\) and \(2, 4, 24\)",
        ),
        (lambda m, x: m(x, x, x[:1]), ValueError, r"query and keys must agree in N, got \(1, 5, 24\)"),
        (lambda m, x: m(x, mask=True), TypeError, "mask must be a tensor, got bool"),
        (lambda m, x: m(x, mask=torch.ones(4)), ValueError, r"= \(2, 3, 5, 5\), got \(4,\)"),
        (lambda m, x: m(x, mask=torch.ones(2, 5, 5)), ValueError, r"= \(2, 3, 5, 5\), got \(2, 5, 5\)"),
        (lambda m, x: m(x, mask=torch.ones(1, 1, 1, 5, 5)), ValueError, "mask must be broadcastable"),
    ],
)
def test_forward_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(SelfAttention(EMBED, HEADS), torch.randn(2, 5, EMBED))
