"""The PTX interpreter: what nvcc compiles computes what it should, and what kernels do wrong is reported."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_programs import SOURCES, compile_ptx
from programs import ROOT, require, run

from tools.ptxrun import Machine, Module, PtxError, Struct, parse

SCHEDULES = pytest.mark.parametrize("schedule", ["together", "warps"])
Launch = Callable[..., Machine]


@pytest.fixture(scope="module")
def build_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ptxrun")


@pytest.fixture(scope="module")
def kernels(build_directory: Path) -> Module:
    # -fmad=false: the host does not contract either
    return parse(compile_ptx(SOURCES / "kernels.cu", "sm_80", build_directory, "-fmad=false"))


@pytest.fixture(scope="module")
def launch(kernels: Module) -> Launch:
    def launch(
        entry: str, grid: Any, block: Any, *arguments: Any, shared: int = 0, **options: Any
    ) -> Machine:
        machine = Machine(kernels, entry, **options)
        machine.launch(grid, block, arguments, shared)
        return machine

    return launch


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


# Scalars


def sample_integers(random: np.random.Generator, count: int) -> np.ndarray:
    """Of all magnitudes, and edges."""
    edges = [0, 1, -1, 2, -2, 2**31 - 1, -(2**31), 255, 256, -128, 65535, 32768]
    numbers = random.integers(-(2**31), 2**31, count) >> random.integers(0, 31, count)
    return np.where(random.random(count) < 0.3, random.choice(edges, count), numbers).astype(np.int32)


def sample_floats(random: np.random.Generator, count: int) -> np.ndarray:
    edges = [0, -0.0, 1, 0.5, 2.5, -3.5, 1e-3, 65504, 1e5, 3.4e38, 1e-30, np.inf, -np.inf]
    numbers = random.standard_normal(count) * 10.0 ** random.integers(-6, 8, count)
    return np.where(random.random(count) < 0.2, random.choice(edges, count), numbers).astype(np.float32)


def test_scalar_operations_equal_those_of_the_host(
    launch: Launch, random: np.random.Generator, build_directory: Path
) -> None:
    library = build_directory / "scalar.so"
    flags = "-O1", "-std=c++17", "-fwrapv", "-ffp-contract=off", "-shared", "-fPIC"
    run(require("g++"), *flags, SOURCES / "scalar_host.cpp", "-o", library)
    n, results = 2000, 90
    x, y, f, g = (sample(random, n) for sample in 2 * [sample_integers] + 2 * [sample_floats])
    out, expected = np.zeros((2, n, results), np.int64)
    launch("scalar", -(-n // 128), 128, x, y, f, g, out, n)
    host = ctypes.CDLL(str(library)).scalar_ops_all
    host(*(ctypes.c_void_p(array.ctypes.data) for array in (x, y, f, g, expected)), n)
    is_nan = (out > 0x7F800000) & (expected > 0x7F800000)  # whose bits are nobody's promise
    wrong = np.flatnonzero(((out != expected) & ~is_nan).any(0))
    assert wrong.tolist() == []
    assert np.count_nonzero((expected != 0).any(0)) > 75


def test_approximate_functions(launch: Launch) -> None:
    x = np.array([1, 2, 0.5, -3, 100, 1e-3, 0, 1e-40, np.inf, -np.inf, np.nan, -150] * 4, np.float32)
    out = np.empty((6, len(x)), np.float32)
    launch("approximate", 1, len(x), x, out, len(x))
    with np.errstate(all="ignore"):
        normal = np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)
        flushed = np.exp2(normal)
        flushed[flushed < 2.0**-126] = 0
        expected = flushed, np.log2(normal), np.tanh(x), 1 / normal, 1 / np.sqrt(normal), normal
    np.testing.assert_array_equal(out, np.stack(expected))


def test_conversions_saturate(launch: Launch) -> None:
    x = np.array([1.5, -1.5, 2.5, 3e9, -3e9, 5e9, 1e19, -1e19, np.inf, -np.inf, np.nan, 0], np.float32)
    out = np.zeros((3, len(x)), np.int64)
    launch("saturating", 1, len(x), x, out, len(x))
    x = np.nan_to_num(x.astype(np.float64), nan=0)
    for result, rounding, dtype in zip(
        out, (np.trunc, np.rint, np.floor), (np.int32, np.uint32, np.int64), strict=True
    ):
        limits = np.iinfo(dtype)
        assert result.tolist() == [
            int(min(max(int(n), limits.min), limits.max)) for n in rounding(np.clip(x, -1e30, 1e30))
        ]


def test_carries(launch: Launch, random: np.random.Generator) -> None:
    limbs = random.choice(np.array([0, 1, 2**31, 2**32 - 1], np.uint32), (4, 128, 3))
    launch("limbs", 1, 128, *limbs)
    a, b, total, difference = (
        [sum(int(n) << 32 * i for i, n in enumerate(row)) for row in rows] for rows in limbs
    )
    assert total == [(x + y) % 2**96 for x, y in zip(a, b, strict=True)]
    assert difference == [(x - y) % 2**96 for x, y in zip(a, b, strict=True)]


def test_half_precision(launch: Launch, random: np.random.Generator) -> None:
    n = 512
    x, y = (random.standard_normal(n) * 10.0 ** random.integers(-5, 6, n) for _ in range(2))
    x, y = x.astype(np.float32), y.astype(np.float32)
    x[::2] = (x[::2].view(np.uint32) & 0xFFFF0000 | 0x8000).view(np.float32)  # halfway between two bfloat16
    halves, back = np.zeros((4, n, 2), np.uint16), np.zeros((n, 2), np.float32)
    launch("half_precision", 1, n, x, y, halves, back, n)
    pairs = torch.stack([torch.tensor(x), torch.tensor(y)], 1)
    brain, half = pairs.bfloat16(), pairs.half()
    product = (half.double() * half.double() + half.double()).half()
    for result, expected in zip(halves, (brain, half, brain + brain, product), strict=True):
        np.testing.assert_array_equal(result.view(np.int16), expected.view(torch.int16).numpy())
    np.testing.assert_array_equal(back[:, 0], brain[:, 1].float())
    np.testing.assert_array_equal(back[:, 1], half[:, 1].float())


class View(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride_row", ctypes.c_int64), ("stride_column", ctypes.c_int64))


class Params(ctypes.Structure):
    _fields_ = (
        ("bytes", View),
        ("longs", View),
        ("doubles", View),
        ("scale", ctypes.c_double),
        ("rows", ctypes.c_int32),
        ("tag", ctypes.c_uint8),
        ("table", ctypes.c_float * 200),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    )


@pytest.mark.parametrize("bias_is", ["null", "an array", "the output"])
def test_struct_with_pointers(launch: Launch, random: np.random.Generator, bias_is: str) -> None:
    rows = 40
    small = random.integers(0, 256, (rows, 4)).astype(np.uint8)
    longs = random.integers(-1000, 1000, (5, rows))
    doubles, bias = random.standard_normal((rows, 3)), random.standard_normal(rows).astype(np.float32)
    table, out = random.standard_normal(200).astype(np.float32), np.zeros(rows, np.float32)
    params = Params(
        *((0, 4, 1), (0, 1, rows), (0, 3, 1)), 0.3, rows, 9, (ctypes.c_float * 200)(*table), None, None
    )
    pointers = {
        Params.bytes.offset: (small, 1),  # from column 1
        Params.longs.offset: longs,
        Params.doubles.offset: doubles,
        Params.out.offset: out,
    }
    if bias_is == "an array":
        pointers[Params.bias.offset] = bias
    elif bias_is == "the output":
        out[:] = bias
        pointers[Params.bias.offset] = out
    launch("struct_parameter", 1, 64, Struct(bytes(params), pointers))
    byte = small[:, 3]
    expected = np.float32(0.3) * byte.astype(np.float32) + longs[2].astype(np.float32)
    expected = expected + doubles[:, 2].astype(np.float32) + np.float32(9) + table[byte % 200]
    np.testing.assert_array_equal(out, expected + (np.float32(0) if bias_is == "null" else bias))


def test_loads_and_stores_of_every_size(launch: Launch, random: np.random.Generator) -> None:
    source = random.integers(0, 256, 512).astype(np.uint8)
    out = np.zeros((7, 512), np.uint8)
    launch("moves", 1, 32, source, out)
    np.testing.assert_array_equal(out, np.broadcast_to(source, out.shape))


def test_local_and_constant_memory(launch: Launch) -> None:
    index, out = np.array([3, 1, 4, 1, 5, 9, 2, 6] * 4, np.int32), np.zeros(32, np.int32)
    launch("local_array", 1, 32, index, out)
    table = {(i * 3 + 3) & 7: i * i for i in range(8)}
    assert out.tolist() == [table[i & 7] for i in index]
    launch("constants", 1, 32, out)
    assert out.tolist() == [7, -5, 3, 1 << 30] * 8


@pytest.mark.parametrize(("choice", "value", "space"), [((1, 0), 100, 1), ((0, 1), None, 2), ((0, 0), 0, 4)])
def test_generic_addresses(launch: Launch, choice: tuple[int, int], value: int | None, space: int) -> None:
    out = np.zeros((32, 2), np.int32)
    launch("address_spaces", 1, 32, np.array(choice, np.int32), out)
    assert out[:, 0].tolist() == ([*range(32)] if value is None else [value] * 32)
    assert out[:, 1].tolist() == [space] * 32


@SCHEDULES
def test_divergent_loops(launch: Launch, random: np.random.Generator, schedule: str) -> None:
    start, steps = random.integers(1, 3000, 1000).astype(np.int32), np.zeros(1000, np.int32)
    launch("collatz", 8, 128, start, steps, 1000, schedule=schedule)

    def count(x: int) -> int:
        n = 0
        while x != 1 and n <= 500:
            x, n = (3 * x + 1 if x & 1 else x >> 1), n + 1
        return n

    assert steps.tolist() == [count(int(x)) for x in start]


# Warps and blocks


def test_warp_exchanges(launch: Launch, random: np.random.Generator) -> None:
    x, out = random.integers(-100, 100, 64).astype(np.int32), np.zeros((9, 64), np.int32)
    launch("exchanges", 1, 64, x, out)
    thread, lane = np.arange(64), np.arange(64) % 32
    first = thread - lane
    warps = x.reshape(2, 32)
    assert out[0].tolist() == x[first + (thread * 5 + 3) % 32].tolist()
    assert out[1].tolist() == x[np.where(lane >= 3, thread - 3, thread)].tolist()
    assert out[2].tolist() == x[np.where(lane % 8 < 6, thread + 2, thread)].tolist()
    assert out[3].tolist() == x[thread ^ 6].tolist()
    assert out[4].tolist() == np.repeat((warps > 90).any(1) + 2 * (warps > -90).all(1), 32).tolist()
    ballots = [sum(1 << i for i in range(32) if warp[i] > 0) for warp in warps]
    assert out[5].view(np.uint32).tolist() == np.repeat(ballots, 32).tolist()
    assert out[6].tolist() == np.where(thread % 2, x[thread ^ 2], 0).tolist()
    assert out[7].view(np.uint32).tolist() == np.where(thread % 2, 0xAAAAAAAA, 0).tolist()
    assert out[8].tolist() == np.where(thread % 2, x[thread ^ 2], thread).tolist()


def test_warp_reductions(launch: Launch, random: np.random.Generator) -> None:
    x, out = random.integers(-100, 100, 64).astype(np.int32), np.zeros((3, 64), np.int32)
    launch("reductions", 1, 64, x, out)
    warps = x.reshape(2, 32)
    for result, expected in zip(out, (warps.max(1), warps.min(1), warps.sum(1)), strict=True):
        assert result.tolist() == np.repeat(expected, 32).tolist()


@SCHEDULES
def test_block_votes(launch: Launch, random: np.random.Generator, schedule: str) -> None:
    x, out = random.integers(-100, 100, (3, 96)).astype(np.int32), np.zeros((3, 96, 3), np.int32)
    x[1] = 91
    launch("block_votes", 3, 96, x, out, schedule=schedule)
    expected = np.stack([(x > 90).any(1), (x > -90).all(1), (x > 0).sum(1)], 1)
    np.testing.assert_array_equal(out != 0, np.broadcast_to(expected[:, None] != 0, out.shape))
    np.testing.assert_array_equal(out[..., 2], np.repeat(expected[:, 2:], 96, 1))


@SCHEDULES
def test_atomic_operations(launch: Launch, random: np.random.Generator, schedule: str) -> None:
    x, out = random.integers(1, 3000, 1000).astype(np.int32), np.zeros(17, np.int32)
    launch("histogram", 2, 128, x, out, 1000, schedule=schedule)
    assert out.tolist() == [*np.bincount(x & 15, minlength=16), x[:128].max()]


@SCHEDULES
def test_shared_memory_between_barriers(launch: Launch, random: np.random.Generator, schedule: str) -> None:
    x, out = random.standard_normal((3, 320)).astype(np.float32), np.zeros(3, np.float32)
    launch("row_sumsIL5Fault0E", 3, 128, x, out, 320, schedule=schedule)
    np.testing.assert_allclose(out, x.sum(1, dtype=np.float64), rtol=1e-5)
    rows, out = x[0, :256].copy(), np.zeros((8, 32), np.float32)
    launch("reversalsIL5Fault0E", 1, 256, rows, out, 0, schedule=schedule)
    np.testing.assert_array_equal(out, rows.reshape(8, 32)[:, ::-1])
    numbers, out = random.integers(0, 100, (4, 32)).astype(np.float32), np.zeros((4, 32), np.float32)
    launch("relay", 1, 128, numbers, out, schedule=schedule)
    np.testing.assert_array_equal(out, np.broadcast_to(numbers.sum(0), out.shape))


def test_named_barrier(launch: Launch, random: np.random.Generator) -> None:
    x, out = random.standard_normal(128).astype(np.float32), np.zeros(128, np.float32)
    launch("named_barrier", 1, 128, x, out, schedule="warps")
    np.testing.assert_array_equal(out, np.concatenate([x[63::-1], x[64:]]))


@pytest.mark.parametrize(("pitch", "conflicts"), [(32, 32), (33, 1)])
def test_bank_conflicts_are_counted(launch: Launch, pitch: int, conflicts: int) -> None:
    x, out = np.arange(1024, dtype=np.float32), np.zeros((32, 32), np.float32)
    machine = launch("transpose", 1, 1024, x, out, pitch, shared=32 * 33 * 4, statistics=True)
    np.testing.assert_array_equal(out, x.reshape(32, 32).T)
    shared = [site for site in machine.statistics.sites if site.space == "shared"]
    assert [site.requests for site in shared] == [32, 32]
    assert max(site.units / site.ideal for site in shared) == conflicts
    assert all(site.units == site.ideal for site in machine.statistics.sites if site.space == "global")
    assert machine.statistics.report().count("\n") == 3


# Matrices


def random_matrix(
    random: np.random.Generator, shape: tuple[int, ...], kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """The numbers, and their bits."""
    x = torch.tensor(random.standard_normal(shape), dtype=torch.float32)
    if kind == "tf32":  # the lower bits are there, and ignored
        bits = x.numpy().view(np.uint32)
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64), bits
    x = x.to({"f16": torch.float16, "bf16": torch.bfloat16}[kind])
    return x.double().numpy(), x.view(torch.int16).numpy().copy()


def check_product(machine: Machine, random: np.random.Generator, kind: str, k: int) -> None:
    (a, a_bits), (b, b_bits) = random_matrix(random, (16, k), kind), random_matrix(random, (8, k), kind)
    c = random.standard_normal((16, 8)).astype(np.float32)
    expected = (a @ b.T + c).astype(np.float32)
    machine.launch(1, 32, [a_bits, b_bits, c])
    np.testing.assert_array_equal(c, expected)
    assert machine.counters["mma"] == 1


@pytest.mark.parametrize(
    ("name", "kind", "k"),
    [
        ("product_f16", "f16", 16),
        ("product_bf16", "bf16", 16),
        ("product_f16_k8", "f16", 8),
        ("product_bf16_k8", "bf16", 8),
        ("product_tf32", "tf32", 8),
    ],
)
def test_matrix_products(kernels: Module, random: np.random.Generator, name: str, kind: str, k: int) -> None:
    check_product(Machine(kernels, name), random, kind, k)


def test_matrix_product_of_a_transposed_tile(launch: Launch, random: np.random.Generator) -> None:
    (a, a_bits), (b, b_bits) = random_matrix(random, (16, 16), "f16"), random_matrix(random, (16, 8), "f16")
    c = np.zeros((16, 8), np.float32)
    launch("product_transposed", 1, 32, a_bits, b_bits, c)
    np.testing.assert_array_equal(c, (a @ b).astype(np.float32))


def test_matrix_product_of_sm_75(build_directory: Path, random: np.random.Generator) -> None:
    module = parse(compile_ptx(SOURCES / "matrix.cu", "sm_75", build_directory))
    assert module.target == "sm_75"
    check_product(Machine(module), random, "f16", 8)


def test_matrix_stores_of_sm_90(build_directory: Path, random: np.random.Generator) -> None:
    module = parse(compile_ptx(SOURCES / "matrix.cu", "sm_90a", build_directory))
    matrices = random.integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    out, transposed = np.zeros((2, 4, 8, 8), np.uint16)
    Machine(module, "store_matrices").launch(1, 32, [matrices, out, transposed])
    np.testing.assert_array_equal(out, matrices)
    np.testing.assert_array_equal(transposed, matrices.transpose(0, 2, 1))


# A tiled product, right and with each of the mistakes such kernels have

SLIPS = (
    "none",
    "no_barrier",
    "no_wait",
    "late_wait",
    "past_end",
    "swapped",
    "no_clear",
    "shifted",
    "never_waits",
)


def tiled_product(launch: Launch, slip: str, m: int, n: int, k: int, **options: Any) -> float:
    """The largest error of A B^T."""
    random = np.random.default_rng(0)
    (a, a_bits), (b, b_bits) = (random_matrix(random, (rows, k), "bf16") for rows in (m, n))
    c = np.full((m, n), np.nan, np.float32)
    entry, grid = f"product_tilesIL4Slip{SLIPS.index(slip)}E", (-(-m // 64), -(-n // 64))
    launch(entry, grid, 128, a_bits, b_bits, c, m, n, k, **options)
    return np.abs(c - a @ b.T).max()


@SCHEDULES
@pytest.mark.parametrize(("m", "n", "k"), [(128, 64, 64), (100, 65, 96), (1, 3, 32)])
def test_tiled_product(launch: Launch, schedule: str, m: int, n: int, k: int) -> None:
    assert tiled_product(launch, "none", m, n, k, schedule=schedule) < 1e-4


def test_blocks_run_some_at_a_time(launch: Launch) -> None:
    assert tiled_product(launch, "none", 200, 200, 64, blocks_at_once=3) < 1e-4


@SCHEDULES
@pytest.mark.parametrize(
    ("slip", "message"),
    [
        ("no_barrier", r"(shared race: .*|reads uninitialised shared memory)\n.*product\.cuh:\d+"),
        ("no_wait", "cp.async is not waited for"),
        ("late_wait", "cp.async is not waited for"),
        ("past_end", "global access out of bounds: 16 bytes .* buffer below is argument [01]"),
        ("no_clear", "register .* is read but was never written"),
        ("never_waits", "with a cp.async in flight|nobody waited for"),
    ],
)
def test_mistakes_are_reported(launch: Launch, slip: str, message: str, schedule: str) -> None:
    with pytest.raises(PtxError, match=message):
        tiled_product(launch, slip, 100, 65, 96, schedule=schedule)


def test_machine_is_launched_again(kernels: Module) -> None:
    """With other sizes, and after an error."""
    machine, out = Machine(kernels, "row_sumsIL5Fault0E"), np.zeros(4, np.float32)
    for columns, block in [(32, 32), (96, 64)]:
        machine.launch(4, block, [np.ones((4, columns), np.float32), out, columns])
        assert out.tolist() == [columns] * 4
        with pytest.raises(PtxError, match="out of bounds"):
            machine.launch(5, block, [np.ones((5, columns), np.float32), out, columns])
    assert machine.counters["barrier"] > 0


@pytest.mark.parametrize("slip", ["swapped", "shifted"])
def test_mistakes_that_only_numbers_show(launch: Launch, slip: str) -> None:
    assert not tiled_product(launch, slip, 128, 64, 64) < 0.5  # NaN where nothing was written


def test_copies_of_each_size(launch: Launch, random: np.random.Generator) -> None:
    source, count = random.integers(1, 256, 512).astype(np.uint8), random.integers(0, 17, 32).astype(np.int32)
    out = np.zeros((3, 512), np.uint8)
    launch("copies", 1, 32, source, out, count)
    for result, size in zip(out, (4, 8, 16), strict=True):
        expected = source[: 32 * size].reshape(32, size).copy()
        expected[np.arange(size) >= count[:, None]] = 0
        np.testing.assert_array_equal(result[: 32 * size].reshape(32, size), expected)


# What is reported


@SCHEDULES
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, "shared race: thread .* reads what thread .* wrote|uninitialised"),
        (2, "reads uninitialised shared memory"),
        (4, "shared race: thread .* (writes|reads) what thread .* (read|wrote)"),
        (5, "several threads write the same bytes"),
        (6, "deadlock: .*threads wait at PTX line"),
        (7, r"shared access out of bounds: 4 bytes at 128 of 128, thread 64"),
    ],
)
def test_errors_of_blocks_are_reported(launch: Launch, fault: int, message: str, schedule: str) -> None:
    with pytest.raises(PtxError, match=message):
        launch(
            f"row_sumsIL5Fault{fault}E",
            1,
            128,
            np.ones(128, np.float32),
            np.zeros(1, np.float32),
            128,
            schedule=schedule,
        )


@SCHEDULES
def test_race_of_a_reader_is_reported(launch: Launch, schedule: str) -> None:
    with pytest.raises(
        PtxError, match=r"shared race: thread .* (writes what several warps read|reads what thread)"
    ):
        launch("overwritten_by_a_reader", 1, 64, *np.ones((2, 64), np.float32), schedule=schedule)


@SCHEDULES
def test_race_within_a_warp_is_reported(launch: Launch, schedule: str) -> None:
    rows = np.ones((2, 32), np.float32)
    with pytest.raises(PtxError, match="shared race: thread"):
        launch("reversalsIL5Fault3E", 1, 64, rows, np.zeros_like(rows), 0, schedule=schedule)


@pytest.mark.parametrize(
    ("entry", "arguments", "message"),
    [
        (
            "write_past_end",
            (np.zeros(100, np.float32), 100),
            r"out of bounds: 4 bytes .*argument 0 \(\+400\); 1 of",
        ),
        (
            "read_null",
            (np.ones(128, np.float32), np.ones(128, np.float32), 0),
            "out of bounds: 4 bytes at 0x0",
        ),
        (
            "read_misaligned",
            (np.ones(200, np.float32), np.ones(256, np.float32)),
            "misaligned global access of 8",
        ),
        (
            "copies_overlap",
            (np.ones(64, np.uint8), np.ones(128, np.uint8)),
            "writes shared bytes with a cp.async",
        ),
        ("fails", (np.arange(128, dtype=np.int32),), "the kernel traps"),
        ("outside_its_mask", (np.arange(128, dtype=np.int32),), "not in the membermask of its own"),
        ("calls", (np.arange(128, dtype=np.int32),), "not supported: st.param"),
    ],
)
def test_errors_of_threads_are_reported(launch: Launch, entry: str, arguments: tuple, message: str) -> None:
    before = [np.copy(argument) for argument in arguments]
    block = 32 if entry == "copies_overlap" else 128
    with pytest.raises(PtxError, match=message) as report:
        launch(entry, 1, block, *arguments)
    assert ".cuh:" in str(report.value), "no source line"
    for argument, copy in zip(arguments, before, strict=True):
        np.testing.assert_array_equal(argument, copy)


def test_endless_loop_is_reported(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.ptxrun.scheduler._MAX_STEPS", 10_000)
    with pytest.raises(PtxError, match="still running after 10000 instructions"):
        launch("endless", 1, 32, np.zeros(1, np.int32))


def test_launches_check_their_arguments(launch: Launch) -> None:
    x = np.zeros(8, np.float32)
    with pytest.raises(ValueError, match=r"entry must name one of the kernels .*; got 'nothing'"):
        launch("nothing", 1, 32)
    with pytest.raises(ValueError, match="schedule must be 'together' or 'warps'; got 'both'"):
        launch("endless", 1, 32, x, schedule="both")
    with pytest.raises(ValueError, match=r"write_past_end must get 2 arguments, \['u64', 'u32'\]; got 1"):
        launch("write_past_end", 1, 32, x)
    with pytest.raises(TypeError, match="argument 1 must be a u32; got an array"):
        launch("write_past_end", 1, 32, x, x)
    with pytest.raises(TypeError, match="argument 0 must be a Struct; got int"):
        launch("struct_parameter", 1, 32, 3)
    with pytest.raises(ValueError, match="argument 0 of struct_parameter must have 904 bytes; got 8"):
        launch("struct_parameter", 1, 32, Struct(bytes(8)))
    with pytest.raises(ValueError, match="pointers of argument 0 must lie in its 8 bytes; got offset 4"):
        launch("struct_parameter", 1, 32, Struct(bytes(8), {4: x}))
    with pytest.raises(ValueError, match="argument 0 must be a contiguous array; got strides"):
        launch("write_past_end", 1, 32, x[::2], 4)
    with pytest.raises(ValueError, match=r"grid must be one to three positive numbers; got \(0, 1\)"):
        launch("write_past_end", (0, 1), 32, x, 4)
    with pytest.raises(ValueError, match="block must have at most 1024 threads; got 2048"):
        launch("write_past_end", 1, 2048, x, 4)


def test_what_is_no_ptx_is_reported() -> None:
    with pytest.raises(PtxError, match="no PTX at line 3: 'void kernel"):
        parse(".version 8.0\n.target sm_80\nvoid kernel(")


def test_command_line(build_directory: Path, launch: Launch) -> None:
    x = np.arange(128, dtype=np.float32)
    np.savez(build_directory / "in.npz", arg0=x[:32], arg1=np.zeros(32, np.float32), arg2=np.int64(0))
    ptx, out = build_directory / "kernels_sm_80.ptx", build_directory / "out.npz"
    command = [
        sys.executable,
        "-m",
        "tools.ptxrun",
        ptx,
        "--grid",
        "1",
        "--block",
        "32",
        "--args",
        build_directory / "in.npz",
    ]
    run(*command, "--entry", "reversalsIL5Fault0E", "--out", out, "--statistics", cwd=ROOT)
    np.testing.assert_array_equal(np.load(out)["arg1"], x[31::-1])
    failed = subprocess.run([*command, "--entry", "read_null"], capture_output=True, text=True, cwd=ROOT)
    assert failed.returncode == 1
    assert failed.stderr.startswith("ptxrun: global access out of bounds")
