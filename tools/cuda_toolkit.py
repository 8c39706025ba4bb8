"""Where the CUDA toolkit is: its compiler, its headers, its other programs.

Looked for in CUDA_HOME, CUDA_PATH, /usr/local/cuda, then in the nvidia-cuda-* Python packages, which share
the directory nvidia/cu13 of site-packages.  PATH is left out: an nvcc there may be a wrapper without headers
beside it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_PACKAGES = {
    "nvcc": "nvidia-cuda-nvcc nvidia-cuda-cccl",
    "cuobjdump": "nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
    "nvdisasm": "nvidia-cuda-nvdisasm",
    "headers": "nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl",
}


def roots() -> list[Path]:
    """The directories that may hold a toolkit, or a part of one; the first to have something wins."""
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    packaged = [Path(entry) / "nvidia" / "cu13" for entry in sys.path]
    return [path for path in (*(Path(name) for name in named if name), *packaged) if path.is_dir()]


def binary(name: str) -> Path:
    """A program of the toolkit.

    Args:
        name: ``"nvcc"``, ``"ptxas"``, ``"cuobjdump"``, ...

    Raises:
        FileNotFoundError: nowhere to be found; says what to install.
    """
    return _find(f"bin/{name}", name)


def nvcc() -> Path:
    """The compiler.

    Raises:
        FileNotFoundError: nowhere to be found; says what to install.
    """
    return binary("nvcc")


def include_dirs() -> list[Path]:
    """What ``g++`` needs to compile ``cuda_runtime.h``, ``cuda_fp16.h`` and ``cuda_bf16.h``; nvcc finds it by
    itself.

    Raises:
        FileNotFoundError: no headers are to be found; says what to install.
    """
    include = _find("include/cuda_runtime.h", "headers").parent
    return [path for path in (include, include / "cccl") if path.is_dir()]


def static_runtime() -> Path:
    """The library that a program links to have the CUDA runtime in it.

    Raises:
        FileNotFoundError: nowhere to be found; says what to install.
    """
    name = "libcudart_static.a"
    return _find(f"lib64/{name}", "headers", f"lib/{name}")


def _find(relative: str, what: str, *others: str) -> Path:
    for root in roots():
        for path in (relative, *others):
            if (root / path).is_file():
                return root / path
    raise FileNotFoundError(
        f"{relative} is not in CUDA_HOME, CUDA_PATH, /usr/local/cuda or a Python package; "
        f"install CUDA and set CUDA_HOME, or: pip install {_PACKAGES.get(what, _PACKAGES['nvcc'])}"
    )
