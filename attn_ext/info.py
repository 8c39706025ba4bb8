"""What this installation is made of and whether it works: ``python -m attn_ext.info [--json]``."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from typing import Any

import torch

from attn_ext import _C, Causal, attention, reference
from attn_ext._version import __version__

ENVIRONMENT = {
    "ATTN_EXT_ISA": "instruction set to use instead of the fastest one",
    "OMP_NUM_THREADS": "threads of torch, and so of attn_ext",
}


def self_check() -> dict[str, Any]:
    """Compare one small causal problem, forward and backward, with the float64 reference.

    Returns:
        ``max_error``: the largest absolute difference of the output and the three gradients;
        ``passed``: whether it is what float32 can give.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, 17, 24, generator=generator) for _ in range(3)]

    def run(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves, mask=Causal())
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    computed, expected = run(attention, torch.float32), run(reference.attention, torch.float64)
    error = max((c.double() - e).abs().max().item() for c, e in zip(computed, expected, strict=True))
    return {"max_error": error, "passed": error < 1e-4}


def collect() -> dict[str, Any]:
    """Everything `python -m attn_ext.info` prints, as JSON-compatible values."""
    build = _C.build_info()
    return {
        "attn_ext": __version__,
        "python": platform.python_version(),
        "torch": {"built_with": build["torch"], "running": torch.__version__},
        "compiler": build["compiler"],
        "cxx_standard": build["cxx_standard"],
        "cpu": {
            "machine": platform.machine(),
            "isa": {
                "compiled": [name for name in _C.isa_names() if _C.isa_compiled(name)],
                "supported": [name for name in _C.isa_names() if _C.isa_supported(name)],
                "current": _C.isa_current(),
            },
            "threads": torch.get_num_threads(),
        },
        "cuda": {"version": build["cuda"], "archs": list(build["cuda_archs"])},
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "self_check": self_check(),
    }


def to_text(info: dict[str, Any]) -> str:
    """The values of `collect` as aligned lines."""
    isa, check = info["cpu"]["isa"], info["self_check"]
    cuda = info["cuda"]
    lines = {
        "attn_ext": info["attn_ext"],
        "Python": info["python"],
        "torch": f"{info['torch']['running']} (built with {info['torch']['built_with']})",
        "compiler": f"{info['compiler']}, C++ {info['cxx_standard']}",
        "instruction sets": " ".join(
            f"[{name}]" if name == isa["current"] else name if name in isa["supported"] else f"({name})"
            for name in isa["compiled"]
        )
        + "   [in use] (not supported by this machine)",
        "threads": info["cpu"]["threads"],
        "CUDA": "not compiled in"
        if cuda["version"] is None
        else f"{cuda['version']}, for compute capability {', '.join(cuda['archs'])}",
        **{name: value if value is not None else "not set" for name, value in info["environment"].items()},
        "self-check": f"{'passed' if check['passed'] else 'FAILED'}, largest error {check['max_error']:.1e}",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; the exit status is 1 if the self-check fails."""
    parser = argparse.ArgumentParser(
        prog="python -m attn_ext.info",
        description="Show how attn_ext was built, what it uses on this machine, and whether it works.",
        epilog="environment: " + "; ".join(f"{name}: {meaning}" for name, meaning in ENVIRONMENT.items()),
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    info = collect()
    print(json.dumps(info, indent=2) if options.json else to_text(info))
    return 0 if info["self_check"]["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
