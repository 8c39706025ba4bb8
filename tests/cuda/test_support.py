"""`is_supported` and `why_unsupported`: what calls do, asked beforehand; docs/support.md, made of that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from cuda_problems import make_cuda_options
from emulated import A100, Device, emulated
from problems import DTYPES, make_block_mask, make_inputs
from programs import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

import attn_ext
from attn_ext import Causal, _support, is_supported, why_unsupported
from tools import support

TURING, ADA = Device(75, 64 << 10, 40), Device(89, 99 << 10, 100)
DEVICES = (None, Device(70, 96 << 10, 80), TURING, A100, ADA, Device(80, 1024))
HEAD_DIM, WIDE = "heads of this size are not supported on this CUDA device", 300
FLOAT64 = "float64 is not computed on CUDA devices"
FEATURES = ((), ("causal",), ("bias",), ("blocks",), ("dropout", "window"), ("softcap", "key_lengths"))
FEATURES += (("alibi", "sinks"), ("additive",), ("boolean", "segments"), ("prefix",))


class NoDevice:
    """The CPU's own kernels."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def on(device: Device | None) -> Any:
    return NoDevice() if device is None else emulated(device=device)


def half_inputs(head_dim: int = 16, **sizes: Any) -> tuple[torch.Tensor, ...]:
    return make_inputs(1, 2, 4, 6, head_dim, **{"dtype": torch.float16, **sizes})


def test_document_is_what_the_selectors_say() -> None:
    expected = (ROOT / "docs" / "support.md").read_text()
    assert support.report(emulated) == expected, "run python -m tools.support"


# --- The answer is what the call does -----------------------------------------------------------------------


def outcome(function: Any, *arguments: Any, **options: Any) -> str | None:
    """Why a call has no kernel, in its own words."""
    try:
        function(*arguments, **options)
    except NotImplementedError as error:
        return str(error)
    return None


@pytest.mark.sample(
    120,
    device=DEVICES,
    dtype=DTYPES,
    head_dim=(1, 16, 33, 64, 65, 128, 129, 192, 256, 257),
    value_dim=(8, 24, 64, 130, 256, 264),
    features=FEATURES,
    grad=(False, True),
    group=(1, 2),
)
def test_agrees_with_attention(case: SimpleNamespace) -> None:
    inputs = make_inputs(
        1, 2, 3, 5, case.head_dim, value_dim=case.value_dim, group=case.group, dtype=case.dtype
    )
    options = make_cuda_options(case.features, 1, 2, 3, 5)
    if case.grad:
        leaves = *inputs, *(options[name] for name in ("bias", "sinks") if name in options)
        for leaf in leaves:
            leaf.requires_grad_()

    def call() -> None:
        out = attn_ext.attention(*inputs, **options)
        if case.grad:
            out.sum().backward()

    with on(case.device):
        reason = outcome(call)
        assert why_unsupported(*inputs, **options) == reason
        assert is_supported(*inputs, **options) == (reason is None)
        if not case.grad:
            assert why_unsupported(*inputs, **options, derivatives=0) == reason


@pytest.mark.sample(
    60,
    device=DEVICES,
    dtype=DTYPES,
    head_dim=(16, 33, 64, 128, 256, 257),
    value_dim=(8, 64, 256, 264),
    cache=(None, torch.int8, torch.float8_e4m3fn),
    paged=(False, True),
    prefix=(False, True),
)
def test_agrees_with_attention_decode(case: SimpleNamespace) -> None:
    query, key, value = make_inputs(2, 2, 1, 32, case.head_dim, value_dim=case.value_dim, dtype=case.dtype)
    new = [tensor[:, :, :1] for tensor in make_inputs(2, 2, 1, 1, case.head_dim, value_dim=case.value_dim)]
    options = {"new_key": new[1].to(case.dtype), "new_value": new[2].to(case.dtype)}
    if case.cache is not None and case.dtype != torch.float64:
        key, value = key.to(case.cache), value.to(case.cache)
        options |= {"key_scale": torch.ones(2, 2), "value_scale": torch.ones(2, 2)}
    if case.paged:
        options["block_table"] = torch.tensor([[1], [0]])
    if case.prefix:
        shapes = (1, 2, 3, case.head_dim), (1, 2, 3, case.value_dim)
        options["shared_prefix"] = tuple(torch.randn(shape).to(case.dtype) for shape in shapes)
    arguments = query, key, value, torch.tensor([4, 30])
    before = key.clone()
    with on(case.device):
        reason = why_unsupported(*arguments, **options, function=attn_ext.attention_decode)
        assert torch.equal(key, before)
        assert reason == outcome(attn_ext.attention_decode, *arguments, **options)


@pytest.mark.parametrize("head_dim", [64, WIDE])
def test_agrees_with_the_other_functions(head_dim: int) -> None:
    inputs = half_inputs(head_dim)
    packed = [tensor[0].transpose(0, 1) for tensor in inputs]
    heads = torch.randn(4, head_dim).half()
    calls = (
        (attn_ext.scaled_dot_product_attention, inputs),
        (attn_ext.scaled_dot_product_attention, (heads, *inputs[1:], torch.zeros(2, 4, 6).half(), 0.5)),
        (attn_ext.block_sparse_attention, (*inputs, make_block_mask((1, 2, 4, 6), (16, 16), 0.5))),
        (attn_ext.attention_varlen, (*packed, torch.tensor([0, 1, 4]), torch.tensor([0, 6, 6]))),
    )
    with emulated():
        for function, arguments in calls:
            reason = why_unsupported(*arguments, function=function)
            assert reason == outcome(function, *arguments) == (HEAD_DIM if head_dim == WIDE else None)


def test_backward_gives_the_reason() -> None:
    """A device may have the forward kernel only."""
    leaves = [tensor.requires_grad_() for tensor in half_inputs(128)]
    with emulated(device=TURING):
        out = attn_ext.attention(*leaves)
        with pytest.raises(NotImplementedError, match=f"^{HEAD_DIM}$"):
            out.sum().backward()
        assert why_unsupported(*leaves) == HEAD_DIM
        assert is_supported(*leaves, derivatives=0)
        with torch.no_grad():
            assert is_supported(*leaves)
        assert why_unsupported(*(leaf.detach() for leaf in leaves), derivatives=1) == HEAD_DIM


def test_gradients_of_float_masks() -> None:
    mask = torch.zeros(1, 4, 6, requires_grad=True)
    asked = []

    def attention_support(*arguments: Any) -> str:
        asked.append(arguments[-4:-1])
        return ""

    selector = SimpleNamespace(attention_support=attention_support)
    with mock.patch.dict(_support.SELECTORS, cpu=selector):
        for options in ({}, {"derivatives": 0}):
            assert is_supported(
                *half_inputs(), mask, function=attn_ext.scaled_dot_product_attention, **options
            )
            assert is_supported(*half_inputs(), mask=attn_ext.Dense(mask), **options)
    assert asked == [(True, False, 1)] * 2 + [(True, False, 0)] * 2


def test_compiled_functions() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return attn_ext.attention(x, x, x) if is_supported(x, x, x) else 2 * x

    x = half_inputs(WIDE)[0]
    with emulated():
        torch.testing.assert_close(torch.compile(function)(x), 2 * x)


def test_derivatives_beyond_the_first() -> None:
    inputs = half_inputs()
    with emulated():
        assert is_supported(*inputs, derivatives=2)
        assert is_supported(*inputs, derivatives=2, dropout_p=0.5)
    assert is_supported(*inputs, derivatives=2, dropout_p=0.5)


def test_decoding_has_no_derivatives() -> None:
    arguments = (*half_inputs(), torch.tensor([6]))
    decode = {"function": attn_ext.attention_decode}
    assert is_supported(*arguments, **decode)
    assert "not differentiable" in why_unsupported(*arguments, **decode, derivatives=1)
    arguments[0].requires_grad_()
    reason = why_unsupported(*arguments, **decode)
    assert reason == outcome(attn_ext.attention_decode, *arguments)
    assert is_supported(*arguments, **decode, derivatives=0)


def test_autocast_decides_the_dtype() -> None:
    """Of which the emulator's operators know nothing: what is asked for is what attn_ext's would cast to."""
    asked = []

    def attention_support(*arguments: Any) -> str:
        asked.append([tensor.dtype for tensor in arguments[:3]])
        return ""

    selector = SimpleNamespace(attention_support=attention_support)
    with mock.patch.dict(_support.SELECTORS, cpu=selector), torch.autocast("cpu", torch.bfloat16):
        assert is_supported(*half_inputs())
        assert is_supported(*half_inputs(dtype=torch.float64))
    assert asked == [[torch.bfloat16] * 3, [torch.float64] * 3]


def test_layouts_that_are_copied() -> None:
    """Rows that would be copied are no other question."""
    storage = torch.zeros(1 + 2 * 4 * 16, dtype=torch.float16)
    query = storage[1:].view(1, 2, 4, 16)
    with emulated():
        assert is_supported(query, query.transpose(1, 2).contiguous().transpose(1, 2), query[..., ::1])
        assert is_supported(query, query.flip(-1).mT.contiguous().mT, query.expand(1, 2, 4, 16))


# --- What asking costs --------------------------------------------------------------------------------------


def test_nothing_happens() -> None:
    inputs = half_inputs(33)
    options = {"dropout_p": 0.5, "sinks": torch.ones(2), "alibi_slopes": torch.ones(2), "bias": torch.ones(6)}
    state = torch.get_rng_state()
    with emulated() as emulator, torch.profiler.profile() as profile:
        assert is_supported(*inputs, **options, derivatives=1)
        assert not emulator.statistics()["launches"]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(event.cpu_memory_usage == 0 for event in profile.events())


def test_fake_tensors() -> None:
    with FakeTensorMode():
        for head_dim, reason in ((16, None), (WIDE, HEAD_DIM)):
            tensors = [torch.empty(1, 2, 4, head_dim, dtype=torch.float16) for _ in range(3)]
            with emulated():
                assert why_unsupported(*tensors, mask=Causal()) == reason


def test_meta_tensors() -> None:
    assert is_supported(*(tensor.to("meta") for tensor in half_inputs()))


# --- Bad arguments are those of the call --------------------------------------------------------------------

BAD = {
    "no tensor": ({"query": 1.0}, TypeError, "query must be a torch.Tensor"),
    "shape": ({"key": torch.zeros(1, 2, 6, 17).half()}, ValueError, "key must have the head_dim"),
    "dtype": ({"value": torch.zeros(1, 2, 6, 16)}, TypeError, "value must have the dtype of query"),
    "number": ({"softcap": -1.0}, ValueError, "softcap must be a finite number"),
    "mask": ({"mask": torch.zeros(4, 6)}, TypeError, "mask must be None or an attn_ext mask"),
    "seed": ({"dropout_p": 0.5, "dropout_seed": 1.0}, TypeError, "dropout_seed must be an int"),
    "name": ({"attn_mask": None}, TypeError, "unexpected keyword argument 'attn_mask'"),
}


@pytest.mark.parametrize("device", [None, A100])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str, device: Device | None) -> None:
    changes, error, message = BAD[case]
    arguments = dict(zip(("query", "key", "value"), half_inputs(), strict=True)) | changes
    with on(device):
        for function in (attn_ext.attention, is_supported, why_unsupported):
            with pytest.raises(error, match=message):
                function(**arguments)


def test_bad_arguments_of_the_other_functions() -> None:
    inputs, lengths = half_inputs(), torch.tensor([6])
    for function, arguments, options, error in (
        (attn_ext.attention_decode, (*inputs, lengths + 1), {}, ValueError),
        (attn_ext.attention_decode, (*inputs, lengths), {"validate": 1}, TypeError),
        (attn_ext.attention_decode, (*inputs, lengths), {"window": 3}, TypeError),
        (attn_ext.attention_decode, inputs, {}, TypeError),
        (attn_ext.block_sparse_attention, (*inputs, Causal()), {}, TypeError),
        (attn_ext.attention_varlen, (*inputs, lengths, lengths), {}, ValueError),
    ):
        for call, more in ((function, {}), (is_supported, {"function": function})):
            with pytest.raises(error):
                call(*arguments, **options, **more)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"derivatives": -1}, ValueError, "derivatives must not be negative, got -1"),
        ({"derivatives": 1.0}, TypeError, "derivatives must be an int or None, got float"),
        ({"derivatives": True}, TypeError, "derivatives must be an int or None, got bool"),
        ({"function": torch.softmax}, ValueError, "function must be one of attention, .*, got 'softmax'"),
        ({"function": "attention"}, ValueError, "function must be one of attention, .*, got 'attention'"),
    ],
)
def test_bad_questions(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        why_unsupported(*half_inputs(), **options)


def test_wrong_shapes_come_before_unsupported_dtypes() -> None:
    x = torch.zeros(1, 2, 4, 16, dtype=torch.float64)
    with emulated():
        assert why_unsupported(x, x, x) == FLOAT64
        with pytest.raises(ValueError, match="the batch size of query"):
            why_unsupported(x, x.expand(2, -1, -1, -1), x)


def test_what_masks_cannot_be_combined_to() -> None:
    """Not of a kernel, and told all the same."""
    slopes = torch.ones(2, requires_grad=True)
    reason = why_unsupported(*half_inputs(), alibi_slopes=slopes)
    assert reason == outcome(attn_ext.attention, *half_inputs(), alibi_slopes=slopes)
    assert reason.startswith("alibi_slopes must not require grad")
