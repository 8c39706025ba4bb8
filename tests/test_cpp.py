"""The kernel library without torch: its unit tests, natively, on emulated older processors, on aarch64."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import pytest
from programs import ROOT, require, run


def cmake_build(directory: Path, *options: str) -> Path:
    cmake = require("cmake")
    run(cmake, "-S", ROOT, "-B", directory, *options)
    run(cmake, "--build", directory, "--parallel", "2")
    return directory


def ctest(directory: Path, **environment: str) -> None:
    command = require("ctest"), "--test-dir", directory, "--output-on-failure"
    output = run(*command, env=os.environ | environment)
    assert "No tests were found" not in output


@pytest.fixture(scope="module")
def cmake_directory() -> Path:
    return cmake_build(ROOT / "build" / "cmake")


def test_unit_tests(cmake_directory: Path) -> None:
    ctest(cmake_directory)


def test_kernels_under_sanitizers() -> None:
    """Every access inside its array, every value defined: of the kernels too, which the unit tests run."""
    sanitize, build = "-DATTN_EXT_SANITIZE=address,undefined", "-DCMAKE_BUILD_TYPE=None"
    directory = cmake_build(ROOT / "build" / "cmake-sanitized", sanitize, build, "-DCMAKE_CXX_FLAGS=-O1 -g1")
    ctest(directory, ASAN_OPTIONS="detect_leaks=0")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="older x86-64 processors")
@pytest.mark.parametrize("processor", ["Nehalem", "Haswell"])
def test_unit_tests_on_older_processors(cmake_directory: Path, processor: str) -> None:
    """Nehalem has no AVX, Haswell no AVX-512."""
    qemu = require("qemu-x86_64")
    programs = [p for p in (cmake_directory / "tests" / "cpp").glob("test_*") if os.access(p, os.X_OK)]
    assert programs
    for program in programs:
        run(qemu, "-cpu", processor, program, "7", timeout=900)


def test_aarch64() -> None:
    """Compiled for aarch64, and run where an emulator is installed."""
    compiler, emulator = require("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    directory = cmake_build(
        ROOT / "build" / "cmake-aarch64",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}",
        f"-DCMAKE_CROSSCOMPILING_EMULATOR={emulator};-L;/usr/aarch64-linux-gnu" if emulator else "",
    )
    if emulator:
        ctest(directory)
