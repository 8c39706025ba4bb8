"""The emulator of CUDA kernels: each fault that it reports, what its operations compute, what it counts."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tools.emulation import Emulator, build

HERE = Path(__file__).resolve().parent
FAULTS = HERE / "cu" / "emulation_faults.cu"
SEMANTICS = HERE / "cu" / "emulation_semantics.cu"
READ_ONLY, READ_WRITE, UNDEFINED = Emulator.READ_ONLY, Emulator.READ_WRITE, Emulator.UNDEFINED


@pytest.fixture(scope="module")
def library() -> Path:
    return build([FAULTS, SEMANTICS], HERE.parent.parent / "build" / "emulation" / "test_emulation.so")


@pytest.fixture
def emulator(library: Path) -> Emulator:
    emulator = Emulator(library)
    emulator.start()
    return emulator


def call(emulator: Emulator, name: str, *arguments: Tensor | int) -> None:
    """Runs an entry point on addresses and integers."""
    converted = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
    getattr(emulator.library, name)(*converted)


def run(emulator: Emulator, name: str, *arguments: Tensor | int) -> None:
    """The same for kernels without fault; tensors may be read and written."""
    for tensor in arguments:
        if isinstance(tensor, Tensor):
            emulator.register(tensor, READ_WRITE)
    call(emulator, name, *arguments)
    assert emulator.errors() == ""


# Faults

KINDS = {
    "global_read_bounds": "global out of bounds",
    "global_write_bounds": "global out of bounds",
    "read_only": "write to read-only memory",
    "host_memory": "global out of bounds",
    "global_alignment": "misaligned access",
    "global_uninitialised": "uninitialised global read",
    "race_of_threads": "global race (write after write)",
    "race_of_blocks": "global race (write after write)",
    "last_block": "global race (read after write)",
    "shared_bounds": "shared out of bounds",
    "shared_bounds_below": "shared out of bounds",
    "shared_alignment": "misaligned access",
    "shared_uninitialised": "uninitialised shared read",
    "read_after_write": "shared race (read after write)",
    "write_after_read": "shared race (write after read)",
    "write_after_write": "shared race (write after write)",
    "warp_exchange": "shared race (read after write)",
    "shuffle_is_no_fence": "shared race (read after write)",
    "bytes_of_a_word": "shared race (write after write)",
    "not_shared": "not shared",
    "copy_read_early": "cp.async race",
    "copy_read_by_others": "shared race (read after write)",
    "copy_overwritten": "cp.async race",
    "copy_never_awaited": "cp.async never waited for",
    "copy_alignment": "misaligned access",
    "copy_bounds": "global out of bounds",
    "matrix_of_own_warp": "shared race (read after write)",
    "matrix_alignment": "misaligned access",
    "product_of_part_of_a_warp": "deadlock",
    "barrier_missed": "deadlock",
    "barriers_of_two_lines": "divergent barrier",
    "operations_of_two_kinds": "divergent warp operation",
    "lane_not_in_mask": "warp mask",
    "inactive_lane": "shuffle from an inactive lane",
    "endless": "step limit",
}
ORDERS = (0, 1, 2)


def line_of(fault: str) -> int:
    lines = FAULTS.read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.endswith(f"// fault: {fault}"))


def faults_of(emulator: Emulator, entry: str, seed: int, threads: int = 128) -> str:
    emulator.start(seed=seed, steps_per_block=10_000)
    read, written, counter = torch.randn(threads), torch.empty(threads), torch.zeros(1, dtype=torch.int32)
    emulator.register(read, READ_ONLY)
    emulator.register(written, UNDEFINED)
    emulator.register(counter, READ_WRITE)
    call(emulator, entry, read, written, counter, threads)
    return emulator.errors()


@pytest.mark.parametrize("seed", ORDERS)
@pytest.mark.parametrize("fault", KINDS)
def test_fault(emulator: Emulator, fault: str, seed: int) -> None:
    """Found whatever the order in which threads run."""
    errors = faults_of(emulator, f"{fault}_wrong", seed)
    expected = rf"^{re.escape(KINDS[fault])}: .* at {FAULTS.name}:{line_of(fault)}\b"
    assert re.search(expected, errors, re.MULTILINE), errors
    assert faults_of(emulator, f"{fault}_right", seed) == ""


def test_every_fault_has_a_test() -> None:
    assert re.findall(r"// fault: (\w+)", FAULTS.read_text()) == list(KINDS)


def test_part_of_a_warp_has_no_matrices(emulator: Emulator) -> None:
    assert faults_of(emulator, "product_of_part_of_a_warp_right", 0, threads=80).startswith("warp mask: ")


def test_a_launch_has_limits(emulator: Emulator) -> None:
    read, written = torch.randn(128), torch.empty(128)
    emulator.register(written, UNDEFINED)
    call(emulator, "launch_shared", read, written, read, 128, 227 * 1024)
    assert emulator.errors() == ""
    call(emulator, "launch_shared", read, written, read, 128, 227 * 1024 + 1)
    call(emulator, "launch_shared", read, written, read, 4096, 0)
    assert re.match(r"launch: .* 232449 bytes of shared memory, 2 times", emulator.errors())


@pytest.mark.parametrize("synchronisations", [1, 600_000])
def test_blocks_inherit_nothing(emulator: Emulator, synchronisations: int) -> None:
    out = torch.zeros(6, dtype=torch.int32)
    run(emulator, "run_long_time", out, synchronisations, 0)
    assert (out == 1).all()
    call(emulator, "run_long_time", out, synchronisations, 1)
    assert re.match(r"uninitialised shared read: .*, 4 times", emulator.errors())


def test_time_has_an_end(emulator: Emulator) -> None:
    out = torch.zeros(6, dtype=torch.int32)
    emulator.register(out, READ_WRITE)
    call(emulator, "run_long_time", out, 1 << 20, 0)
    assert re.match(r"step limit: .*, 3 times", emulator.errors())


# Registered memory


def test_registered_memory_ends_where_the_tensor_does(emulator: Emulator) -> None:
    read, written = torch.randn(128), torch.empty(128)
    register = emulator.library.attn_ext_emulation_register_memory
    for bytes_read, fault in ((512, ""), (511, "reads 4 bytes at offset 508 of a range of 511")):
        emulator.start()
        emulator.register(written, UNDEFINED)
        register(read.data_ptr(), bytes_read, READ_ONLY)
        call(emulator, "global_uninitialised_right", read, written, read, 128)
        assert bool(emulator.errors()) == bool(fault)
        assert fault in emulator.errors()


def test_overlapping_ranges_are_their_union(emulator: Emulator) -> None:
    memory = torch.zeros(256)
    register = emulator.library.attn_ext_emulation_register_memory
    register(memory.data_ptr(), 600, READ_ONLY)
    register(memory.data_ptr() + 512, 512, UNDEFINED)
    call(emulator, "global_uninitialised_right", memory[:128], memory[128:], memory, 128)
    assert emulator.errors() == ""


def test_undefined_memory_is_nan_until_written(emulator: Emulator) -> None:
    written = torch.zeros(130)
    emulator.register(written, UNDEFINED)
    call(emulator, "read_only_right", written, written, written, 128)
    assert emulator.errors() == ""
    assert (written[:128] == 1).all()
    assert written[128:].isnan().all()


def test_nothing_is_registered_after_start(emulator: Emulator) -> None:
    written = torch.zeros(128)
    emulator.register(written, READ_WRITE)
    emulator.start()
    call(emulator, "read_only_right", written, written, written, 128)
    assert "which is no device memory" in emulator.errors()
    assert (written == 0).all()


# What operations compute


def shuffled(x: Tensor, arg: int, width: int) -> list[list[float]]:
    """The four kinds, from the prose of the PTX ISA."""
    values = x.tolist()
    first = [lane // width * width for lane in range(32)]
    index = [values[f + arg % width] for f in first]
    up = [values[i - arg] if i - arg >= f else values[i] for i, f in enumerate(first)]
    down = [values[i + arg] if i + arg < f + width else values[i] for i, f in enumerate(first)]
    exchange = [values[i ^ arg] if (i ^ arg) < f + width else values[i] for i, f in enumerate(first)]
    return [index, up, down, exchange]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("arg", "width"), [(1, 32), (16, 32), (3, 8), (5, 4), (0, 1)])
def test_shuffles(emulator: Emulator, dtype: torch.dtype, arg: int, width: int) -> None:
    x, out = torch.randn(32, dtype=dtype), torch.zeros(4, 32, dtype=dtype)
    run(emulator, "run_shuffles" if dtype == torch.float32 else "run_shuffles_double", x, out, arg, width)
    assert out.tolist() == shuffled(x, arg, width)


@pytest.mark.parametrize("threads", [32, 96, 112])
def test_votes(emulator: Emulator, threads: int) -> None:
    x = torch.randint(-99, 101, (threads,), dtype=torch.int32)
    out = torch.zeros(8, threads, dtype=torch.int32)
    run(emulator, "run_votes", x, out, threads)
    values = x.tolist()

    def expected(thread: int) -> list[int]:
        start, half = thread // 32 * 32, thread // 16 * 16
        warp, lanes = values[start : start + 32], values[half : half + 16]
        bits = sum((v > 0) << i for i, v in enumerate(warp))
        half_bits = sum((v > 0) << i for i, v in enumerate(lanes)) << half % 32
        block = sum(v > 0 for v in values), any(v > 100 for v in values), all(v > -100 for v in values)
        row = [bits, any(v > 100 for v in warp), all(v > -100 for v in warp), *block, half_bits, sum(lanes)]
        return [ctypes.c_int32(int(v)).value for v in row]

    assert out.T.tolist() == [expected(thread) for thread in range(threads)]


def test_reductions(emulator: Emulator) -> None:
    x, out = torch.randint(-99, 100, (32,), dtype=torch.int32), torch.zeros(4, 32, dtype=torch.int32)
    run(emulator, "run_reductions", x, out)
    unsigned = x.to(torch.int64) % 2**32
    expected = torch.stack([x.min(), x.max(), unsigned.min(), unsigned.max()]).to(torch.int64)
    assert (out.to(torch.int64) % 2**32 == (expected % 2**32)[:, None]).all()


def pairs(x: Tensor) -> Tensor:
    """16-bit elements, the last two dimensions' pairs as one 32-bit register, the first in its lower half."""
    bits = x.view(torch.int16).to(torch.int64) % 2**16
    return (bits[..., 0] | bits[..., 1] << 16).to(torch.int32)


LANES = torch.arange(32)
GROUP, MEMBER = LANES // 4, LANES % 4  # as the PTX ISA calls them: groupID and threadID_in_group


@pytest.mark.parametrize("matrices", [1, 2, 4])
@pytest.mark.parametrize("transposed", [0, 1])
def test_load_of_matrices(emulator: Emulator, matrices: int, transposed: int) -> None:
    x, out = torch.randn(32, 8).half(), torch.zeros(32, matrices, dtype=torch.int32)
    run(emulator, "run_load_matrices", x, out, matrices, transposed)
    stacked = x[: 8 * matrices].reshape(matrices, 8, 8)
    stacked = stacked.transpose(1, 2) if transposed else stacked
    rows = stacked[:, GROUP]  # [matrices, 32, 8]
    columns = (2 * MEMBER[:, None] + torch.arange(2)).expand(matrices, 32, 2)
    assert torch.equal(out, pairs(rows.gather(2, columns)).T)


def fragments(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The registers of the lanes.  (PTX ISA, "Matrix Fragments for mma.m16n8k8" and "mma.m16n8k16")"""
    k, g, t = a.shape[1], GROUP[:, None], MEMBER[:, None]
    i = torch.arange(4)
    accumulators = c[g + 8 * (i // 2), 2 * t + i % 2]
    if a.dtype == torch.float32:
        i, j = torch.arange(4), torch.arange(2)
        ar, br = a[g + 8 * (i % 2), t + 4 * (i // 2)], b[t + 4 * j, g]
        return ar.view(torch.int32), br.view(torch.int32), accumulators
    i, j = torch.arange(k // 2), torch.arange(k // 4)
    ar = a[g + 8 * (i // 2 % 2), 2 * t + i % 2 + 8 * (i // 4)]
    br = b[2 * t + j % 2 + 8 * (j // 2), g]
    padded = torch.zeros(32, 4, dtype=torch.int32), torch.zeros(32, 2, dtype=torch.int32)
    padded[0][:, : k // 4] = pairs(ar.reshape(32, -1, 2))
    padded[1][:, : k // 8] = pairs(br.reshape(32, -1, 2))
    return *padded, accumulators


ELEMENTS = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("k", [8, 16])
def test_products(emulator: Emulator, dtype: torch.dtype, k: int) -> None:
    if (dtype, k) == (torch.float32, 16):
        return  # no such instruction
    a, b, c = torch.randn(16, k).to(dtype), torch.randn(k, 8).to(dtype), torch.randn(16, 8)
    d = torch.zeros(32, 4)
    registers = fragments(a, b, c)
    run(emulator, "run_multiply", *(r.contiguous() for r in registers), d, ELEMENTS.index(dtype), k)
    if dtype == torch.float32:  # tf32: 13 bits of the mantissa are not read
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    expected = (c.double() + a.double() @ b.double()).float()
    assert torch.equal(d, fragments(a, b, expected)[2])
    assert emulator.statistics()["launches"][0][f"mma_m16n8k{k}"] == 1


@pytest.mark.parametrize(("piece", "source"), [(16, 16), (16, 0), (16, 7), (8, 8), (8, 3), (4, 4), (4, 0)])
def test_asynchronous_copies(emulator: Emulator, piece: int, source: int) -> None:
    x, out = torch.randint(0, 256, (512,), dtype=torch.uint8), torch.zeros(512, dtype=torch.uint8)
    run(emulator, "run_copies", x, out, piece, source)
    expected = x.clone().reshape(-1, piece)
    expected[:, source:] = 0
    assert torch.equal(out, expected.flatten())
    launch = emulator.statistics()["launches"][0]
    assert (launch["cp_async"], launch["cp_async_bytes"]) == (512 // piece, 512 // piece * source)


@pytest.mark.parametrize("seed", ORDERS)
def test_atomic_operations(emulator: Emulator, seed: int) -> None:
    emulator.start(seed=seed)
    x, out = torch.randint(-50, 50, (128,), dtype=torch.int32), torch.zeros(12, dtype=torch.int32)
    total, wide = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    run(emulator, "run_atomics", x, out, total, wide, 2)
    expected = [*torch.bincount((x & 7).long(), minlength=8).tolist(), min(x.min(), 0), max(x.max(), 0), 7, 5]
    assert out.tolist() == expected
    assert (total.item(), wide.item() >> 32) == (x.sum(), x.sum())


def test_indices(emulator: Emulator) -> None:
    out = torch.zeros(24, 24, 4, dtype=torch.int32)
    run(emulator, "run_indices", out)

    def digits(x: int, y: int, z: int) -> Tensor:
        rows, columns = 100 * torch.arange(z)[:, None, None], 10 * torch.arange(y)[:, None]
        return (rows + columns + torch.arange(x)).flatten()

    assert torch.equal(out[:, 0, 0].long(), digits(2, 3, 4))
    assert torch.equal(out[0, :, 1].long(), digits(4, 3, 2))
    assert (out[..., 2:] == torch.tensor([432, 234])).all()


def test_arithmetic(emulator: Emulator) -> None:
    out = torch.zeros(7, dtype=torch.int64)
    run(emulator, "run_arithmetic", out)
    assert out.tolist() == [3, -2, 8 + 400 + 310000, 350, 0x3F800001 + 21, 12962, 3]


# Order


def arrivals(emulator: Emulator, seed: int) -> tuple[list[int], list[int]]:
    emulator.start(seed=seed)
    tickets, out = torch.zeros(2, dtype=torch.int32), torch.zeros(24, dtype=torch.int32)
    run(emulator, "run_arrivals", tickets, out, 16, 8)
    return out[:16].tolist(), out[16:].tolist()


def test_seed_decides_the_order(emulator: Emulator) -> None:
    first, second = arrivals(emulator, 1), arrivals(emulator, 2)
    assert arrivals(emulator, 1) == first
    assert all(a != b for a, b in zip(first, second, strict=True))
    for blocks, warps in (first, second):
        assert (sorted(blocks), sorted(warps)) == (list(range(16)), list(range(8)))
    assert arrivals(emulator, 0) == (list(range(16)), list(range(8)))


# Counts


def site(emulator: Emulator, comment: str) -> dict[str, int]:
    """The place of access in the line that ends so."""
    lines = SEMANTICS.read_text().splitlines()
    numbers = [i for i, line in enumerate(lines, 1) if line.endswith(f"// {comment}")]
    (found,) = (
        s
        for s in emulator.statistics()["sites"]
        if re.match(rf"{SEMANTICS.name}:{numbers[0]}\b", s["where"])
        and f"{s['space']} {s['operation']}" == comment
    )
    return found


STRIDES = {4: {1: 1, 2: 2, 3: 1, 32: 32, 33: 1}, 8: {1: 2, 2: 4, 16: 32}, 16: {1: 4, 2: 8, 8: 32, 9: 4}}


@pytest.mark.parametrize(
    ("size", "stride", "wavefronts"),
    [(size, stride, count) for size, counts in STRIDES.items() for stride, count in counts.items()],
)
def test_bank_conflicts(emulator: Emulator, size: int, stride: int, wavefronts: int) -> None:
    emulator.start(access_sites=True)
    run(emulator, "run_strided", torch.zeros(32 * size // 4), size, stride)
    written = site(emulator, "shared write")
    assert (written["bytes"], written["requests"], written["lanes"]) == (size, 1, 32)
    assert (written["wavefronts"], written["ideal"]) == (wavefronts, size // 4)
    read = site(emulator, "shared read")  # by all lanes from one place
    assert (read["wavefronts"], read["ideal"]) == (size // 4, size // 4)
    stored = site(emulator, "global write")
    assert (stored["sectors"], stored["ideal"]) == (size, size)


@pytest.mark.parametrize(
    ("size", "stride", "first", "lanes", "sectors"),
    [
        *((4, 1, 0, 32, 4), (4, 1, 1, 32, 5), (4, 0, 0, 32, 1), (4, 2, 0, 32, 8), (4, 8, 0, 32, 32)),
        *((2, 1, 0, 32, 2), (16, 1, 0, 32, 16), (16, 1, 1, 32, 17), (4, 1, 0, 5, 1)),
    ],
)
def test_global_sectors(
    emulator: Emulator, size: int, stride: int, first: int, lanes: int, sectors: int
) -> None:
    emulator.start(access_sites=True)
    memory = torch.zeros(1024 + 8)
    aligned = memory[-memory.data_ptr() // 4 % 8 :]
    emulator.register(memory, READ_ONLY)
    call(emulator, "run_gather", aligned, size, stride, first, lanes)
    assert emulator.errors() == ""
    read = site(emulator, "global read")
    assert (read["kernel"], read["bytes"], read["requests"], read["lanes"]) == ("gather", size, 1, lanes)
    assert (read["sectors"], read["ideal"]) == (sectors, -(-lanes * size // 32))


def test_instructions_are_counted_for_each_launch(emulator: Emulator) -> None:
    run(emulator, "run_votes", torch.zeros(96, dtype=torch.int32), torch.zeros(8, 96, dtype=torch.int32), 96)
    run(emulator, "run_load_matrices", torch.zeros(32, 4), torch.zeros(128), 4, 0)
    run(emulator, "run_shuffles", torch.zeros(32), torch.zeros(128), 1, 32)
    votes, matrices, shuffles = emulator.statistics()["launches"]
    assert (votes["kernel"], votes["grid"], votes["block"]) == ("votes", [1, 1, 1], [96, 1, 1])
    assert (votes["votes"], votes["reductions"], votes["barriers"]) == (3 * 3 + 3 * 2, 3 * 2, 3)
    assert (matrices["ldmatrix"], matrices["votes"], shuffles["shuffles"]) == (1, 0, 4)


# Building


def test_build_says_what_the_compiler_says(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text('#include "emulation/emulator.h"\n__global__ void kernel() { missing(); }\n')
    with pytest.raises(RuntimeError, match=r"wrong\.cu:2:.*missing"):
        build([source], tmp_path / "wrong.so")


def test_build_makes_what_has_changed(library: Path, tmp_path: Path) -> None:
    header, source = tmp_path / "value.h", tmp_path / "value.cpp"
    source.write_text('#include "value.h"\nextern "C" int value() { return VALUE * FACTOR; }\n')

    def value(number: int, factor: int) -> int:
        header.write_text(f"#define VALUE {number}\n")
        output = build([source], tmp_path / f"value{number}{factor}.so", defines=[f"FACTOR={factor}"])
        return ctypes.CDLL(str(output)).value()

    assert [value(1, 10), value(2, 10), value(2, 7)] == [10, 20, 14]


def test_build_leaves_what_has_not_changed(library: Path) -> None:
    made = library.stat().st_mtime_ns
    assert build([FAULTS, SEMANTICS], library).stat().st_mtime_ns == made
