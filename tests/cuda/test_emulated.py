"""How calls reach the CUDA kernels, which the emulator runs: checks, layouts, options."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_problems import DTYPES, make_cuda_options
from emulated import A100, Device, emulated, emulator
from problems import FEATURES, MASKS, make_inputs
from test_bindings import BAD_FORWARD, forward_arguments

import attn_ext
from attn_ext import _ops
from attn_ext.testing import check_attention

# Wrong contents: what is checked on the host where it is the host's.
UNREAD = {
    *("range too long", "negative range"),
    *(f"blocks: offsets {where}" for where in ("beyond", "before", "falling")),
    *("blocks: index beyond", "blocks: negative index", "blocks: index twice"),
    *("blocks: tile beyond", "blocks: tile before"),
}


@pytest.fixture(scope="module", autouse=True)
def forward() -> Any:
    """The operator on the emulated kernels."""
    emulator()
    return torch.ops.attn_ext_emulated.attention_forward.default


@pytest.mark.sample(
    40,
    features=(*((name,) for name in (*FEATURES, *MASKS)), ("bias", "causal"), ("blocks", "dropout"), ()),
    query_len=(1, 17, 64, 97),
    kv_len=(0, 1, 16, 63, 130),
    head_dim=(1, 8, 24, 33, 64, 100),
    dtype=DTYPES,
    group=(1, 2, 4),
)
def test_options(case: SimpleNamespace) -> None:
    inputs = make_inputs(2, 4, case.query_len, case.kv_len, case.head_dim, group=case.group, dtype=case.dtype)
    options = make_cuda_options(case.features, 2, 4, case.query_len, case.kv_len)
    with emulated(seed=int(torch.randint(100, ()))):
        check_attention(*inputs, **options, grad=False)


def test_packed_sequences() -> None:
    cu_seqlens = torch.tensor([0, 5, 5, 40, 64])
    inputs = [torch.randn(64, 2, 32) for _ in range(3)]
    expected = attn_ext.attention_varlen(*inputs, cu_seqlens, cu_seqlens, mask=attn_ext.Causal())
    with emulated():
        actual = attn_ext.attention_varlen(*inputs, cu_seqlens, cu_seqlens, mask=attn_ext.Causal())
    torch.testing.assert_close(actual, expected)


def by_rows(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def misaligned(x: torch.Tensor) -> torch.Tensor:
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)
    return storage[1:].view(x.shape).copy_(x)


def padded_rows(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, 1))[..., :-1]


def every_other_column(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def one_for_all_heads(x: torch.Tensor) -> torch.Tensor:
    return misaligned(x[:, :1]).expand_as(x)


LAYOUTS = (by_rows, misaligned, padded_rows, every_other_column, one_for_all_heads)


@pytest.mark.parametrize("head_dim", [32, 33])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: Any, head_dim: int) -> None:
    inputs = [layout(x.half()) for x in make_inputs(2, 2, 19, 35, head_dim)]
    expected = attn_ext.attention(*inputs, return_lse=True)
    with emulated():
        actual = attn_ext.attention(*inputs, return_lse=True)
        (out,) = {attn_ext.attention(*inputs)}
    check_attention(*inputs, attention=lambda *_, **__: actual, grad=False)
    for result, model in zip((*actual, out), (*expected, expected[0]), strict=True):
        assert result.stride() == model.stride()  # as the fake kernel says


def test_rows_that_lie_well_are_not_copied() -> None:
    for layout, copies in ((by_rows, 0), (misaligned, 3)):
        inputs = [layout(x.half()) for x in make_inputs(2, 2, 19, 35, 32)]
        with torch.profiler.profile() as profile, emulated():
            attn_ext.attention(*inputs)
        assert sum(event.name == "aten::copy_" for event in profile.events()) == copies


@pytest.mark.parametrize("case", sorted(set(BAD_FORWARD) - UNREAD))
def test_what_the_operator_refuses(case: str, forward: Any) -> None:
    changes, message = BAD_FORWARD[case]
    arguments = forward_arguments(**changes)
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    before = [x._use_count() for x in tensors]
    with emulated(), pytest.raises(RuntimeError, match=message):
        forward(**arguments)
    assert [x._use_count() for x in tensors] == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", sorted(UNREAD))
def test_wrong_contents_are_harmless(case: str, dtype: torch.dtype, forward: Any) -> None:
    """They are not looked at before the kernel, which reads nothing that is not there."""
    arguments = forward_arguments(**BAD_FORWARD[case][0])
    arguments |= {name: arguments[name].to(dtype) for name in ("query", "key", "value")}
    with emulated():
        out, _, _ = forward(**arguments)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        (A100, torch.float64, "^float64 is not computed on CUDA devices$"),
        (Device(arch=70), torch.float16, "compute capability 7.5"),
        (Device(arch=75), torch.bfloat16, "bfloat16 needs compute capability 8.0"),
        (Device(arch=75, shared_memory=1024), torch.float16, "^heads of this size"),
    ],
)
def test_what_a_device_cannot_do(device: Device, dtype: torch.dtype, message: str) -> None:
    x = torch.randn(1, 1, 4, 16, dtype=dtype)
    with emulated(device=device), pytest.raises(NotImplementedError, match=message):
        attn_ext.attention(x, x, x)


def test_kernels_read_the_seed() -> None:
    """From the tensor, when they run: a graph that is replayed then drops other weights."""
    inputs = make_inputs(1, 2, 40, 40, 32)
    seed = torch.tensor(1)
    with emulated():
        for number in (1, 2):
            seed.fill_(number)
            check_attention(*inputs, dropout_p=0.5, dropout_seed=seed, grad=False)


def test_a_kernel_can_be_chosen() -> None:
    inputs = [x.bfloat16() for x in make_inputs(1, 1, 200, 80, 64)]
    launches = {}
    for variant in ("bf16_64", "bf16_64_long"):
        with emulated(variant=variant) as emulator:
            check_attention(*inputs, grad=False)
            (launches[variant],) = (launch["grid"][0] for launch in emulator.statistics()["launches"])
    assert launches == {"bf16_64": 4, "bf16_64_long": 2}
    with pytest.raises(ValueError, match="no kernel 'bf16_63'"), emulated(variant="bf16_63"):
        pass


def test_the_device_decides_between_kernels() -> None:
    inputs = [x.bfloat16() for x in make_inputs(1, 1, 200, 80, 64)]
    blocks = []
    for processors in (1, 108):
        with emulated(device=Device(processors=processors)) as emulator:
            attn_ext.attention(*inputs)
            blocks.append(emulator.statistics()["launches"][0]["grid"][0])
    assert blocks == [2, 4]


def test_everything_goes_to_the_emulator() -> None:
    x = torch.randn(1, 1, 16, 16)
    ways = (
        lambda: attn_ext.attention(x, x, x),
        lambda: attn_ext.attention(x, x, x, softcap=3.0),
        lambda: attn_ext.attention(x.clone().requires_grad_(), x, x),
        lambda: attn_ext.scaled_dot_product_attention(x, x, x),
        lambda: torch.func.vmap(attn_ext.scaled_dot_product_attention)(x[None], x[None], x[None]),
    )
    for way in ways:
        with emulated() as emulator:
            way()
            assert len(emulator.statistics()["launches"]) == 1
    handle = _ops._forward_handle
    attn_ext.attention(x, x, x, softcap=3.0)
    assert handle is _ops.attention_forward._handle


@pytest.mark.parametrize("seed", [5, -(2**62)])
def test_dropout_mask(seed: int) -> None:
    """What higher derivatives multiply by is what the kernels drop."""
    arguments = torch.tensor(seed), 0.3, 2, 3, 5, 44, 71
    emulator()
    by_cpu, by_kernel = (
        getattr(torch.ops, name).dropout_mask(*arguments) for name in ("attn_ext", "attn_ext_emulated")
    )
    assert torch.equal(by_cpu, by_kernel)
    assert torch.ops.attn_ext_emulated.dropout_mask(*arguments[:5], 5, 71).shape == (2, 3, 0, 71)
