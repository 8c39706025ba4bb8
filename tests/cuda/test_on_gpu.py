"""The CUDA kernels on a GPU, through the public functions; skipped where there is none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_problems import DTYPES as ALL_DTYPES
from cuda_problems import convert, make_cuda_options
from problems import FEATURES, MASKS, make_block_mask, make_inputs

import attn_ext
from attn_ext import _C
from attn_ext.testing import check_attention

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or _C.build_info()["cuda"] is None,
    reason="torch sees no GPU, or attn_ext is built without CUDA",
)

DEVICE = torch.device("cuda")
DTYPES = tuple(
    dtype for dtype in ALL_DTYPES if dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(False)
)
HEAD_DIMS = (1, 8, 24, 32, 33, 40, 64, 72, 80, 96, 100, 128, 160, 192, 256)
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 300, 513)
DELAY = 100_000_000  # cycles that a GPU sleeps: about 50 ms


def attend(*tensors: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`attn_ext.attention` of CPU tensors, on the GPU."""
    inputs = (tensor.to(DEVICE) for tensor in tensors)
    results = attn_ext.attention(*inputs, **convert(options, lambda tensor: tensor.to(DEVICE)))
    return tuple(result.cpu() for result in results)


def check(*tensors: torch.Tensor, **options: Any) -> None:
    check_attention(*tensors, **options, attention=attend)


def gpu_inputs(*sizes: int, dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in make_inputs(*sizes, dtype=dtype)]


# Against float64


@pytest.mark.sample(
    150,
    query_len=LENGTHS,
    kv_len=(0, *LENGTHS),
    head_dim=HEAD_DIMS,
    dtype=DTYPES,
    group=(1, 2, 4),
    batch=(1, 2, 3),
    mask=((), ("causal",)),
)
def test_shapes(case: SimpleNamespace) -> None:
    sizes = case.batch, 4, case.query_len, case.kv_len
    inputs = make_inputs(*sizes, case.head_dim, group=case.group, dtype=case.dtype)
    check(*inputs, **make_cuda_options(case.mask, *sizes))


@pytest.mark.sample(60, key_dim=HEAD_DIMS, value_dim=HEAD_DIMS[::-1], dtype=DTYPES)
def test_values_of_another_size(case: SimpleNamespace) -> None:
    check(*make_inputs(2, 2, 70, 90, case.key_dim, value_dim=case.value_dim, dtype=case.dtype))


@pytest.mark.sample(
    200,
    features=tuple(
        pair for count in (1, 2, 3) for pair in itertools.combinations((*FEATURES, *MASKS), count)
    ),
    query_len=LENGTHS,
    kv_len=LENGTHS,
    head_dim=HEAD_DIMS,
    dtype=DTYPES,
    group=(1, 2, 4),
)
def test_options(case: SimpleNamespace) -> None:
    sizes = 2, 4, case.query_len, case.kv_len
    inputs = make_inputs(*sizes, case.head_dim, group=case.group, dtype=case.dtype)
    check(*inputs, **make_cuda_options(case.features, *sizes))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tiles(dtype: torch.dtype) -> None:
    """Enough of them for every multiprocessor, so that the kernel with the most queries is taken."""
    for head_dim in (64, 128):
        check(*make_inputs(2, 16, 1024, 1024, head_dim, group=4, dtype=dtype), mask=attn_ext.Causal())


def test_packed_sequences() -> None:
    cu_seqlens = torch.tensor([0, 5, 5, 40, 300], device=DEVICE)
    inputs = [torch.randn(300, 2, 64, device=DEVICE) for _ in range(3)]
    out = attn_ext.attention_varlen(*inputs, cu_seqlens, cu_seqlens, mask=attn_ext.Causal())
    for begin, end in itertools.pairwise(cu_seqlens.tolist()):
        alone = [tensor[None, begin:end].transpose(1, 2).cpu() for tensor in inputs]
        part = out[None, begin:end].transpose(1, 2).cpu()
        expected = attn_ext.attention(*alone, mask=attn_ext.Causal())
        torch.testing.assert_close(part, expected)


def test_autocast() -> None:
    inputs = gpu_inputs(1, 2, 40, 40, 64, dtype=torch.float32)
    with torch.autocast("cuda", torch.float16):
        actual = attn_ext.attention(*inputs)
    assert torch.equal(actual, attn_ext.attention(*(tensor.half() for tensor in inputs)))


def test_compiled() -> None:
    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return attn_ext.attention(*tensors, mask=attn_ext.Causal(), softcap=9.0) + 1

    for head_dim in (64, 33):
        inputs = gpu_inputs(2, 2, 40, 40, head_dim)
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*inputs), function(*inputs))


# Large tensors


def test_more_than_2_31_elements_apart() -> None:
    stride = 2**31 + 64
    storage = torch.empty(stride + 2**20, dtype=torch.float16, device=DEVICE)
    far = storage.as_strided((2, 2, 40, 64), (stride, 40 * 64, 64, 1)).normal_()
    near = far.contiguous()
    assert torch.equal(attn_ext.attention(far, far, far), attn_ext.attention(near, near, near))


def test_a_result_of_more_than_2_31_elements() -> None:
    batch, length = 2**15 + 1, 1024
    one = torch.randn(1, 1, length, 64, dtype=torch.float16, device=DEVICE)
    query = one.expand(batch, -1, -1, -1)
    out = attn_ext.attention(query, one[:, :, :16].expand(batch, -1, -1, -1), query[:, :, :16])
    expected = attn_ext.attention(one, one[:, :, :16], one[:, :, :16])
    assert torch.equal(out[-1], expected[0])
    assert torch.equal(out[batch // 2], expected[0])


def test_memory_is_linear() -> None:
    inputs = gpu_inputs(1, 8, 8192, 8192, 64)
    attn_ext.attention(*inputs)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attn_ext.attention(*inputs, mask=attn_ext.Causal(), return_lse=True)
    # Output and statistics; the score matrix has a gigabyte in float16.
    assert torch.cuda.max_memory_allocated() - before < 2 * inputs[0].nbytes


# Streams, graphs, devices


@contextmanager
def no_waiting() -> Iterator[None]:
    """Makes waiting for the GPU an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_other_streams() -> None:
    query, key, value = gpu_inputs(1, 2, 64, 64, 64)
    expected = attn_ext.attention(2 * query, key, value)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(DELAY)
        query.mul_(2)  # which has not happened yet if the kernel runs on another stream
        out = attn_ext.attention(query, key, value)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_nothing_waits() -> None:
    inputs = gpu_inputs(2, 2, 64, 64, 33)
    packed = [tensor.transpose(1, 2).flatten(0, 1) for tensor in inputs]
    cu_seqlens = torch.arange(0, 129, 64, device=DEVICE)
    with no_waiting():
        mask = attn_ext.KeyLengths(torch.full((2,), 50, device=DEVICE)) & attn_ext.Causal()
        attn_ext.attention(*inputs, mask=mask, dropout_p=0.1, dropout_seed=1)
        attn_ext.attention(*inputs, dropout_p=0.1)
        attn_ext.attention(*inputs, mask=attn_ext.SlidingWindow(9, 0) | attn_ext.Prefix(4))
        attn_ext.attention_varlen(*packed, cu_seqlens, cu_seqlens, mask=attn_ext.Causal())


def test_graphs_are_replayed_with_what_the_tensors_hold_then() -> None:
    inputs = gpu_inputs(2, 2, 100, 100, 64)
    lengths, seed = torch.tensor([100, 7], device=DEVICE), torch.tensor(1, device=DEVICE)

    def attention() -> torch.Tensor:
        mask = attn_ext.KeyLengths(lengths)
        return attn_ext.attention(*inputs, mask=mask, dropout_p=0.5, dropout_seed=seed)

    attention()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention()
    for number in (2, 3):
        for tensor in inputs:
            tensor.normal_()
        lengths.copy_(torch.tensor([13 * number, 1]))
        seed.fill_(number)
        graph.replay()
        assert torch.equal(out, attention())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU only")
def test_the_current_device_does_not_matter() -> None:
    inputs = gpu_inputs(1, 2, 64, 64, 64)
    others = [tensor.to("cuda:1") for tensor in inputs]
    assert torch.cuda.current_device() == 0
    out = attn_ext.attention(*others)
    assert torch.cuda.current_device() == 0
    assert out.device == others[0].device
    assert torch.equal(out.to(DEVICE), attn_ext.attention(*inputs))
    with pytest.raises(ValueError, match="key must be on the device of query, cuda:0, got cuda:1"):
        attn_ext.attention(inputs[0], others[1], others[2])


# Wrong contents and what is not supported


def test_wrong_contents_are_harmless() -> None:
    """Kernels bring them to what there is, since nobody looks at them before."""
    inputs = gpu_inputs(2, 2, 64, 64, 64)
    lengths = torch.tensor([-5, 2**40], device=DEVICE)
    out = attn_ext.attention(*inputs, mask=attn_ext.KeyLengths(lengths))
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert torch.equal(out[1], attn_ext.attention(*inputs)[1])

    for name in ("offsets", "indices", "tiles"):
        for number in (-(2**31), 2**31 - 1):
            mask = make_block_mask((1, 1, 64, 64), (16, 16), density=0.5).to(DEVICE)
            getattr(mask.blocks, name).fill_(number)
            assert attn_ext.attention(*inputs, mask=mask).isfinite().all()


def test_gradients_are_the_same_whenever_they_are_computed() -> None:
    inputs = [tensor.requires_grad_() for tensor in gpu_inputs(2, 8, 700, 900, 64, dtype=torch.bfloat16)]
    bias = torch.randn(1, 8, 1, 900, device=DEVICE, requires_grad=True)
    first = None
    for _ in range(50):
        out = attn_ext.attention(*inputs, mask=attn_ext.Causal("bottom_right"), bias=bias)
        gradients = torch.autograd.grad(out, (*inputs, bias), torch.ones_like(out))
        first = first or gradients
        assert all(map(torch.equal, gradients, first))


def test_what_is_not_supported() -> None:
    inputs, wide = gpu_inputs(1, 1, 8, 8, 16), gpu_inputs(1, 1, 8, 8, 300)
    double = [tensor.double() for tensor in inputs]
    lengths = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    decode = {"function": attn_ext.attention_decode}
    assert attn_ext.is_supported(*inputs)
    assert attn_ext.is_supported(*inputs, lengths, **decode)
    for message, arguments, options in (
        ("float64 is not computed on CUDA devices", double, {}),
        ("heads of this size", wide, {}),
        ("a bias of float64", inputs, {"bias": torch.zeros(8, dtype=torch.float64, device=DEVICE)}),
        ("float64 is not computed on CUDA devices", [*double, lengths], decode),
        ("heads of this size", [*wide, lengths], decode),
    ):
        allocated = torch.cuda.memory_allocated()
        reason = attn_ext.why_unsupported(*arguments, **options)
        assert reason.startswith(message)
        assert torch.cuda.memory_allocated() == allocated
        options = dict(options)
        function = options.pop("function", attn_ext.attention)
        with pytest.raises(NotImplementedError, match=f"^{reason}$"):
            function(*arguments, **options)


def test_tensors_of_another_device_are_refused() -> None:
    query, key, value = gpu_inputs(1, 1, 8, 8, 16)
    with pytest.raises(ValueError, match="key must be on the device of query, cuda:0, got cpu"):
        attn_ext.attention(query, key.cpu(), value)
    with pytest.raises(ValueError, match="bias must be on the device of query, cuda:0, got cpu"):
        attn_ext.attention(query, key, value, bias=torch.zeros(8))
