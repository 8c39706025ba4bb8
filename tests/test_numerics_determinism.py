"""Equal bits whatever runs beside the call: repeats, other threads, other batch elements, a fork."""

from __future__ import annotations

import multiprocessing
import threading
from types import SimpleNamespace

import pytest
import torch
from problems import BIAS_SHAPES, DTYPES, assert_same_bits, make_inputs, run

import attn_ext

pytestmark = pytest.mark.usefixtures("isa")

# name: (batch, heads, query_len, kv_len, head_dim), query heads of each key head, alignment if causal
PROBLEMS = {
    "plain": ((2, 4, 130, 170, 32), 1, None),
    "causal": ((1, 3, 300, 300, 64), 1, "top_left"),
    "grouped": ((1, 8, 100, 210, 32), 8, "bottom_right"),
    "one_head_many_keys": ((1, 1, 200, 2500, 16), 1, None),
    "one_head_long_causal": ((1, 1, 1500, 1500, 16), 1, "bottom_right"),
    "one_query": ((1, 2, 1, 3000, 32), 1, None),
    "many_small": ((16, 6, 10, 10, 8), 1, None),
}


def compute(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    sizes, group, align = PROBLEMS[name]
    query, key, value = make_inputs(*sizes, group=group, dtype=dtype)
    mask = attn_ext.Causal(align=align) if align else None
    return run(query, key, value, mask=mask, grad_out=torch.randn_like(query))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_thread_counts_and_repeats(name: str, dtype: torch.dtype) -> None:
    expected = compute(name, dtype)
    for threads in (2, 3, 1, 3):
        torch.set_num_threads(threads)
        assert_same_bits(compute(name, dtype), expected)


@pytest.mark.sample(
    len(BIAS_SHAPES),
    full=BIAS_SHAPES,
    dtype=DTYPES,
    bias_dtype=DTYPES,
    sizes=((3, 4, 100, 210), (1, 4, 60, 1500), (2, 4, 1, 600)),
    group=(1, 2, 4),
    causal=(False, True),
)
def test_gradients_of_bias_and_sinks(case: SimpleNamespace) -> None:
    """Sums over many rows, whose order must not depend on which thread computes what."""
    batch, heads, query_len, kv_len = case.sizes
    inputs = make_inputs(batch, heads, query_len, kv_len, 24, group=case.group, dtype=case.dtype)
    shape = [size if full else 1 for size, full in zip(case.sizes, case.full, strict=True)]
    options = {
        "bias": torch.randn(shape).to(case.bias_dtype),
        "sinks": torch.randn(heads),
        "softcap": 5.0,
        "dropout_p": 0.2,
        "dropout_seed": 1,
        "mask": attn_ext.Causal("bottom_right") if case.causal else None,
        "grad_out": torch.randn_like(inputs[0]),
        "grad_lse": torch.randn(batch, heads, query_len),
    }
    expected = run(*inputs, **options)
    for threads in (2, 3, 1, 2):
        torch.set_num_threads(threads)
        assert_same_bits(run(*inputs, **options), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_a_bias_for_many_keys(dtype: torch.dtype) -> None:
    """Long enough for the keys to be split among the threads."""
    inputs = make_inputs(1, 1, 200, 2500, 16, dtype=dtype)
    for shape in ((2500,), (200, 1), (200, 2500), (1,)):
        bias = torch.randn(shape)
        expected = run(*inputs, bias=bias)
        for threads in (2, 1):
            torch.set_num_threads(threads)
            assert_same_bits(run(*inputs, bias=bias), expected)


@pytest.mark.sample(
    24,
    dtype=DTYPES,
    query_len=(1, 10, 33, 100),
    kv_len=(1, 16, 70, 300),
    group=(1, 3),
    causal=(False, True),
    head_dim=(8, 20, 64),
)
def test_batch_element_alone(case: SimpleNamespace) -> None:
    inputs = make_inputs(3, 6, case.query_len, case.kv_len, case.head_dim, group=case.group, dtype=case.dtype)
    mask = attn_ext.Causal(align="bottom_right") if case.causal else None
    together = run(*inputs, mask=mask)
    for element in range(3):
        alone = run(*(t[element : element + 1] for t in inputs), mask=mask)
        assert_same_bits(alone, {name: t[element : element + 1] for name, t in together.items()})


@pytest.mark.parametrize("kv_len", [1200, 2400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_element_alone_with_many_keys(dtype: torch.dtype, kv_len: int) -> None:
    """Long enough for the keys to be split into ranges, whose sums of dQ have an order."""
    inputs = make_inputs(8, 1, 64, kv_len, 32, dtype=dtype)
    together = run(*inputs)
    alone = run(*(t[2:3] for t in inputs))
    assert_same_bits(alone, {name: t[2:3] for name, t in together.items()})


def test_several_python_threads() -> None:
    torch.set_num_threads(2)
    jobs = [(name, dtype) for name in ("plain", "causal", "many_small") for dtype in DTYPES[:3]]
    # The seed is global to the process: draw the inputs before the threads start.
    inputs = [make_inputs(*PROBLEMS[name][0], dtype=dtype) for name, dtype in jobs]
    expected = [run(*i) for i in inputs]
    failures: list[Exception] = []

    def work(start: int) -> None:
        try:
            for k in range(2 * len(jobs)):
                at = (start + k) % len(jobs)
                assert_same_bits(run(*inputs[at]), expected[at])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def _compare_in_child(connection, expected: dict[str, torch.Tensor]) -> None:
    torch.set_num_threads(1)
    actual = compute("plain", torch.float32)
    connection.send([name for name, t in expected.items() if not torch.equal(actual[name], t)])
    connection.close()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")
def test_fork_after_use() -> None:
    """A child of a process whose thread pool has started computes on its one thread."""
    torch.set_num_threads(2)
    expected = compute("plain", torch.float32)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_compare_in_child, args=(sender, expected))
    child.start()
    try:
        assert receiver.poll(60), "the child hangs"
        assert receiver.recv() == [], "different bits in the child"
    finally:
        child.join(5)
        if child.is_alive():
            child.kill()


def test_batch_element_alone_with_the_gradient_of_a_bias() -> None:
    """Nor do the bits depend on the rest of the batch where it shares a bias."""
    query, key, value = make_inputs(3, 1, 600, 600, 32)
    bias = torch.randn(1, 1, 600, 600)
    together = run(query, key, value, bias=bias, grad_out=value)
    alone = run(query[:1], key[:1], value[:1], bias=bias, grad_out=value[:1])
    for name in ("out", "grad_query", "grad_key", "grad_value"):
        assert torch.equal(together[name][:1], alone[name]), name
