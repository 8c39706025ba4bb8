"""Builds attn_ext._C; everything else about the package is in pyproject.toml."""

import platform
import resource
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("csrc/bindings/*.cpp", "csrc/cpu/*.cpp", "csrc/cpu/isa/*.cpp")
    for path in ROOT.glob(pattern)
    if platform.machine() == "x86_64" or not path.name.startswith("avx")
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


class TimedBuildExtension(BuildExtension):
    """Says what the build cost: a budget that grows unseen is the usual fate of extensions."""

    def build_extensions(self) -> None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        super().build_extensions()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"compiled attn_ext._C in {seconds:.1f} CPU seconds")


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
    cmdclass={"build_ext": TimedBuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
