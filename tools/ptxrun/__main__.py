"""``python -m tools.ptxrun kernel.ptx --grid X,Y,Z --block X,Y,Z --args in.npz``: runs a kernel.

The archive holds arg0, arg1, ... in the order of the parameters: arrays become buffers, scalars are passed as
they are.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from . import Machine, PtxError, parse


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.ptxrun", description=__doc__.split("\n")[0])
    parser.add_argument("ptx", type=Path, help="from nvcc -ptx; with -lineinfo, errors name source lines")
    parser.add_argument("--entry", default="", help="the kernel's name or a part of it, if there are several")
    parser.add_argument("--grid", type=_sizes, required=True, metavar="X,Y,Z")
    parser.add_argument("--block", type=_sizes, required=True, metavar="X,Y,Z")
    parser.add_argument("--shared", type=int, default=0, metavar="BYTES", help="dynamic shared memory")
    parser.add_argument("--args", type=Path, required=True, metavar="NPZ", help="arg0, arg1, ...")
    parser.add_argument("--out", type=Path, metavar="NPZ", help="the arguments after the run")
    parser.add_argument("--schedule", choices=("together", "warps"), default="together")
    parser.add_argument("--seed", type=int, default=0, help="of the order of warps")
    parser.add_argument(
        "--statistics", action="store_true", help="print wavefronts and sectors of each access"
    )
    options = parser.parse_args(argv)

    archive = np.load(options.args)
    arguments = [archive[f"arg{i}"] for i in range(len(archive.files))]
    arguments = [argument.copy() if argument.ndim else argument[()] for argument in arguments]
    machine = Machine(
        parse(options.ptx.read_text()),
        options.entry,
        schedule=options.schedule,
        seed=options.seed,
        statistics=options.statistics,
    )
    start = time.perf_counter()
    try:
        machine.launch(options.grid, options.block, arguments, options.shared)
    except PtxError as error:
        print(f"ptxrun: {error}", file=sys.stderr)
        return 1
    print(f"{machine.kernel.name}: {time.perf_counter() - start:.3f} s", file=sys.stderr)
    if machine.statistics:
        print(machine.statistics.report())
    if options.out:
        np.savez(options.out, **{f"arg{i}": argument for i, argument in enumerate(arguments)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
