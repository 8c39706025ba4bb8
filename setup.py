"""Builds attn_ext._C; everything else about the package is in pyproject.toml."""

import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # where pip builds, it is not there by itself
from tools import cuda_build  # noqa: E402

SOURCES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("csrc/bindings/*.cpp", "csrc/cpu/*.cpp", "csrc/cpu/isa/*.cpp")
    for path in ROOT.glob(pattern)
    if (platform.machine() == "x86_64" or not path.name.startswith("avx"))
    and path.name not in ("cuda.cpp", "emulated.cpp")  # with CUDA; in the tests
)
HEADERS = sorted(
    str(path.relative_to(ROOT)) for suffix in ("h", "inl") for path in ROOT.glob(f"csrc/**/*.{suffix}")
)
COMPILE_ARGS = [
    "-std=c++20",
    "-O2",
    "-g0",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=off",  # a product fused in one place and rounded in another would not cancel
    f"-ffile-prefix-map={ROOT}/=",
    *(f"-isystem{path}" for path in include_paths()),  # torch's headers are not clean under -Wextra
    # The oldest torch this binary may run under, whatever torch it is built with (torch's stable ABI).
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DTORCH_STABLE_ONLY",
]


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Says what a part of the build cost: a budget that grows unseen is the usual fate of extensions."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    yield
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"compiled {what} in {seconds:.1f} CPU seconds")


class BuildExtensionWithCuda(BuildExtension):
    """Adds the CUDA kernels, where they are wanted: torch's CUDAExtension would ask for a torch with CUDA."""

    def build_extensions(self) -> None:
        (extension,) = self.extensions
        toolchain = cuda_build.choose(os.environ)
        if toolchain is not None:
            with timed(f"the CUDA kernels for {', '.join(toolchain.archs)}"):
                directory = Path(self.build_temp) / "cuda"
                objects = cuda_build.compile_kernels(toolchain, ROOT, directory, os.environ)
            extension.sources.append("csrc/bindings/cuda.cpp")
            extension.extra_objects += map(str, objects)
            extension.extra_link_args += cuda_build.link_flags()
        with timed(extension.name):
            super().build_extensions()


setup(
    ext_modules=[
        CppExtension(
            "attn_ext._C",
            SOURCES,
            depends=HEADERS,
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": COMPILE_ARGS},
            extra_link_args=["-Wl,--as-needed", "-Wl,-s"],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtensionWithCuda},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
