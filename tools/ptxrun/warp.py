"""Exchanges within a warp (PTX ISA, "Parallel Synchronization and Communication Instructions": shfl, vote,
redux, match).

These run for whole warps: the scheduler brings the lanes together and drops the results of those that did not
come.
"""

from __future__ import annotations

import numpy as np

from .binding import Binding, Execute, builds
from .state import WARP, Selection
from .types import Array

LANE = np.arange(WARP)


@builds("shfl", together=True)
def build_shuffle(binding: Binding) -> Execute:
    """The upper bits of c are the mask of a lane's segment, the lower ones a clamp (PTX ISA, "shfl.sync")."""
    mode, state = binding.one_of("up", "down", "bfly", "idx"), binding.state
    destinations = binding.operands[0]
    destinations = destinations.value if destinations.kind == "either" else [destinations]
    write = binding.write(destinations[0], "b32")
    write_valid = binding.write(destinations[1], "pred") if len(destinations) > 1 else None
    value, b, c = (binding.broadcast(operand, "u32") for operand in binding.operands[1:4])

    def execute(selection: Selection) -> None:
        values = value(selection).reshape(-1, WARP)
        offset = b(selection).reshape(-1, WARP).astype(np.int64) & 31
        bounds = c(selection).reshape(-1, WARP).astype(np.int64)
        segment = bounds >> 8 & 31
        first = LANE & segment
        last = first | bounds & 31 & ~segment
        source = {
            "up": LANE - offset,
            "down": LANE + offset,
            "bfly": LANE ^ offset,
            "idx": first | offset & ~segment,
        }[mode]
        valid = source >= last if mode == "up" else source <= last
        write(np.take_along_axis(values, np.where(valid, source, LANE), 1).reshape(-1), selection)
        if write_valid:
            write_valid(valid.reshape(-1), selection)
        state.counters["shfl"] += len(values)

    return execute


@builds("vote", together=True)
def build_vote(binding: Binding) -> Execute:
    mode = binding.one_of("ballot", "any", "all", "uni")
    read = binding.broadcast(binding.operands[1], "pred")
    write = binding.write(binding.operands[0], "b32" if mode == "ballot" else "pred")
    mask = binding.broadcast(binding.operands[2], "u32")
    bit = np.uint32(1) << LANE.astype(np.uint32)

    def vote(selection: Selection) -> Array:
        holds = read(selection).reshape(-1, WARP)
        votes = (mask(selection).reshape(-1, WARP) & bit) != 0
        if mode == "ballot":
            return np.where(holds & votes, bit, np.uint32(0)).sum(1, dtype=np.uint32)
        some, every = (holds & votes).any(1), (holds | ~votes).all(1)
        return {"any": some, "all": every, "uni": every | ~some}[mode]

    return lambda selection: write(np.repeat(vote(selection), WARP), selection)


@builds("redux", together=True)
def build_redux(binding: Binding) -> Execute:
    function = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[binding.modifiers[1]]
    read, write = (
        binding.broadcast(binding.operands[1], binding.type),
        binding.write(binding.operands[0], binding.type),
    )
    mask = binding.read(binding.operands[2], "u32")

    def execute(selection: Selection) -> None:
        if (mask(selection) != 0xFFFFFFFF).any():
            raise binding.unsupported()
        reduced = function.reduce(read(selection).reshape(-1, WARP), axis=1)
        write(np.repeat(reduced, WARP), selection)

    return execute


@builds("activemask")
def build_active_mask(binding: Binding) -> Execute:
    state, write = binding.state, binding.write(binding.operands[0], "b32")

    def execute(selection: Selection) -> None:
        threads = state.threads(selection)
        masks = np.zeros(state.size // WARP, np.uint32)
        np.bitwise_or.at(masks, threads // WARP, np.uint32(1) << (threads % WARP).astype(np.uint32))
        write(masks[threads // WARP], selection)

    return execute
