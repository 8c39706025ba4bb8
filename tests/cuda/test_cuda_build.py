"""What setup.py makes where nvcc is: what it compiles, and that the extension is one for any torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT, require, run

from tools import cuda_build, cuda_toolkit

KNOWN = ("75", "80", "86", "87", "88", "89", "90", "100", "103", "110", "120", "121")
ARCH = "80"
COMPILE_BUDGET = 4.5  # CPU seconds for a kernel and one architecture, on slow processors
SIZE_BUDGET = 10e6  # bytes of machine code for one architecture and PTX: the six of a wheel stay below 60 MB


# What the environment asks for


@pytest.fixture
def nvcc(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for nvcc; holds the version that it is of."""
    version = ["13.0"]

    def output(program: Path, option: str) -> str:
        assert program == Path("/cuda/bin/nvcc")
        if option == "--version":
            return f"Cuda compilation tools, release {version[0]}, V{version[0]}.88\n"
        assert option == "--list-gpu-arch"
        return "".join(f"compute_{arch}\n" for arch in KNOWN)

    monkeypatch.setattr(cuda_toolkit, "nvcc", lambda: Path("/cuda/bin/nvcc"))
    monkeypatch.setattr(cuda_build, "_output", output)
    return version


@pytest.mark.parametrize("environment", [{}, {"ATTN_EXT_CUDA": "auto"}, {"ATTN_EXT_CUDA": "1"}])
def test_nvcc_is_used_where_it_is(environment: dict[str, str], nvcc: list[str]) -> None:
    expected = cuda_build.Toolchain(Path("/cuda/bin/nvcc"), (13, 0), cuda_build.DEFAULT_ARCHS)
    assert cuda_build.choose(environment) == expected


def test_cuda_can_be_left_out(nvcc: list[str]) -> None:
    assert cuda_build.choose({"ATTN_EXT_CUDA": "0"}) is None


def test_without_nvcc_the_extension_is_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_toolkit, "roots", lambda: [])
    assert cuda_build.choose({}) is None
    assert cuda_build.choose({"ATTN_EXT_CUDA": "auto"}) is None
    with pytest.raises(FileNotFoundError, match=r"bin/nvcc is not in .*pip install nvidia-cuda-nvcc"):
        cuda_build.choose({"ATTN_EXT_CUDA": "1"})


def test_an_old_nvcc_is_as_good_as_none(nvcc: list[str]) -> None:
    nvcc[:] = ["11.8"]
    assert cuda_build.choose({}) is None
    with pytest.raises(ValueError, match=r"/cuda/bin/nvcc is of CUDA 11\.8; 12\.0 is needed"):
        cuda_build.choose({"ATTN_EXT_CUDA": "1"})


def test_a_wrong_choice_is_an_error() -> None:
    with pytest.raises(ValueError, match="ATTN_EXT_CUDA must be auto, 0 or 1, got 'yes'"):
        cuda_build.choose({"ATTN_EXT_CUDA": "yes"})


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        (None, cuda_build.DEFAULT_ARCHS),
        ("", cuda_build.DEFAULT_ARCHS),
        ("native", ("native",)),
        ("90", ("90",)),
        ("120;80;90;80", ("80", "90", "120")),
        ("80, 90", ("80", "90")),
    ],
)
def test_architectures(text: str | None, archs: tuple[str, ...]) -> None:
    assert cuda_build.parse_archs(text, KNOWN) == archs


def test_an_older_nvcc_knows_fewer_architectures() -> None:
    assert cuda_build.parse_archs(None, KNOWN[:7]) == ("80", "86", "89", "90")


@pytest.mark.parametrize("text", ["70", "sm_80", "80;64", ";", "native;80"])
def test_unknown_architectures_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=f"must be native, or some of 75;80;.*121, got {text!r}"):
        cuda_build.parse_archs(text, KNOWN)


def flags(version: tuple[int, int], *archs: str) -> list[str]:
    return cuda_build.nvcc_flags(cuda_build.Toolchain(Path("nvcc"), version, archs), Path("/src"))


def test_the_last_architecture_is_there_as_ptx_too() -> None:
    assert [flag for flag in flags((13, 0), "80", "90") if "arch" in flag] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert [flag for flag in flags((13, 0), "native") if "arch" in flag] == ["-arch=native"]


def test_code_is_compressed_by_an_nvcc_that_can() -> None:
    assert "--compress-mode=size" in flags((12, 8), "80")
    assert "--compress-mode=size" not in flags((12, 6), "80")


def test_each_line_of_the_variants_is_a_source() -> None:
    text = "// KERNEL(no, int)\nKERNEL(narrow, 1)\n\nOTHER(wide, 2, x)\n"
    assert cuda_build.variant_sources(text) == {
        "kernel_narrow.cu": '#include "cuda/kernel_instance.cuh"\n\nKERNEL(narrow, 1)\n',
        "other_wide.cu": '#include "cuda/other_instance.cuh"\n\nOTHER(wide, 2, x)\n',
    }


def test_sources_that_are_there_are_not_written_again(tmp_path: Path) -> None:
    sources = cuda_build.kernel_sources(ROOT, tmp_path)
    times = [source.stat().st_mtime_ns for source in sources]
    assert cuda_build.kernel_sources(ROOT, tmp_path) == sources
    assert [source.stat().st_mtime_ns for source in sources] == times


# The commands


@pytest.fixture
def tree(tmp_path: Path) -> tuple[cuda_build.Toolchain, Path]:
    """A repository of one kernel in two variants, and an nvcc that notes what it is called with."""
    for directory in ("csrc/core", "csrc/cuda", "bin"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "csrc/core/variants.def").write_text("KERNEL(a)\nKERNEL(b)\n")
    (tmp_path / "csrc/cuda/common.cu").write_text("\n")
    compiler = tmp_path / "bin/fake nvcc"
    compiler.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"open({str(tmp_path / 'log')!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        "out = sys.argv[sys.argv.index('-o') + 1]\n"
        "open(out, 'w').write('object')\n"
        "open(out + '.d', 'w').write(out.replace(' ', '\\\\ ') + ': \\n')\n"
    )
    compiler.chmod(0o755)
    return cuda_build.Toolchain(compiler, (13, 0), ("80",)), tmp_path


def compiled(root: Path) -> list[str]:
    """The sources that were compiled since the last call."""
    log = root / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return sorted(Path(re.search(r" -c (.*) -o ", line).group(1)).name for line in lines)


def test_what_is_up_to_date_is_not_compiled_again(tree: tuple[cuda_build.Toolchain, Path]) -> None:
    toolchain, root = tree
    build = root / "a build"

    def compile_kernels() -> list[str]:
        objects = cuda_build.compile_kernels(toolchain, root, build, {"MAX_JOBS": "1"})
        assert [path.name for path in objects] == ["common.o", "kernel_a.o", "kernel_b.o"]
        assert all(path.exists() for path in objects)
        return compiled(root)

    assert compile_kernels() == ["common.cu", "kernel_a.cu", "kernel_b.cu"]
    assert compile_kernels() == []
    (root / "csrc/core/variants.def").write_text("KERNEL(a)\nKERNEL(b, changed)\n")
    assert compile_kernels() == ["kernel_b.cu"]


def test_jobs_are_limited(tree: tuple[cuda_build.Toolchain, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    toolchain, root = tree
    cuda_build.compile_kernels(toolchain, root, root / "build", {"MAX_JOBS": "3"})
    cuda_build.compile_kernels(toolchain, root, root / "build", {})
    assert [command[3:] for command in commands] == [["-j", "3"], []]


def test_without_ninja_the_error_says_what_to_install(
    tree: tuple[cuda_build.Toolchain, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="pip install ninja"):
        cuda_build.compile_kernels(*tree, tree[1] / "build", {})


# The extension


@pytest.fixture(scope="module")
def extension() -> Path:
    """The package with CUDA kernels for one architecture, in a directory of its own."""
    try:
        cuda_toolkit.nvcc()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    directory = ROOT / "build" / "cuda" / "lib"
    environment = {**os.environ, "ATTN_EXT_CUDA": "1", "ATTN_EXT_CUDA_ARCHS": ARCH}
    command = (sys.executable, "setup.py", "--quiet", "build", "--build-lib", directory)
    log = run(*command, cwd=ROOT, env=environment)
    (seconds,) = re.findall(rf"compiled the CUDA kernels for {ARCH} in ([\d.]+) CPU seconds", log)
    kernels = cuda_build.variant_sources((ROOT / "csrc" / "core" / "variants.def").read_text())
    assert float(seconds) < COMPILE_BUDGET * len(kernels)
    return directory


REPORT = """
import json
import torch
import attn_ext
from attn_ext import _C

def message(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)

def on_cuda(name, *arguments):
    operator = getattr(torch.ops.attn_ext, name).default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return message(lambda: operator.redispatch(keys, *arguments))

def is_registered(name):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"attn_ext::{name}", "CUDA")

x = torch.randn(1, 2, 5, 8)
options = attn_ext._ops.Options()
lengths = torch.zeros(1, dtype=torch.int32)
no_tensors = (None,) * 9
seed = torch.zeros((), dtype=torch.int64)
names = "attention_forward", "attention_output", "attention_backward", "attention_decode", "dropout_mask"
statistics = torch.zeros(1, 2, 5)
print(json.dumps({
    "file": attn_ext.__file__,
    "build": _C.build_info(),
    "registered": list(filter(is_registered, names)),
    "text": attn_ext.info.to_text(attn_ext.info.collect()),
    "forward": on_cuda("attention_forward", x, x, x, *options),
    "output": on_cuda("attention_output", x, x, x, None, None, None, 1.0, None, None),
    "backward": on_cuda(
        "attention_backward", x, None, x, x, x, x, statistics, statistics, *options, False, False
    ),
    "decode": on_cuda("attention_decode", x, x, x, lengths, *no_tensors, 1.0, 0.0, False, None, None),
    "dropout_mask": on_cuda("dropout_mask", seed, 0.5, 1, 1, 0, 1, 1),
}))
"""


@pytest.fixture(scope="module")
def report(extension: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the extension says of itself, under a torch that has no CUDA or no device."""
    environment = {**os.environ, "PYTHONPATH": str(extension), "CUDA_VISIBLE_DEVICES": ""}
    code = "import attn_ext.info" + REPORT
    return json.loads(
        run(sys.executable, "-c", code, env=environment, cwd=tmp_path_factory.mktemp("elsewhere"))
    )


def test_it_tells_what_it_was_built_for(report: dict[str, Any], extension: Path) -> None:
    assert report["file"] == str(extension / "attn_ext" / "__init__.py")
    assert report["build"]["cuda"] == ".".join(
        map(str, cuda_build.parse_version(run(cuda_toolkit.nvcc(), "--version")))
    )
    assert report["build"]["cuda_archs"] == ["8.0"]
    assert re.search(r"^CUDA +\d+\.\d+, for compute capability 8\.0$", report["text"], re.MULTILINE)


def test_the_kernels_of_the_cpu_still_work(report: dict[str, Any]) -> None:
    assert re.search(r"^self-check +passed", report["text"], re.MULTILINE)


def test_what_there_is_for_cuda_is_registered(report: dict[str, Any]) -> None:
    assert report["registered"] == [
        "attention_forward",
        "attention_output",
        "attention_backward",
        "attention_decode",
        "dropout_mask",
    ]


@pytest.mark.parametrize(
    ("operator", "tensor"),
    [
        ("forward", "query"),
        ("output", "query"),
        ("backward", "query"),
        ("decode", "query"),
        ("dropout_mask", "dropout_seed"),
    ],
)
def test_tensors_of_the_cpu_are_refused(report: dict[str, Any], operator: str, tensor: str) -> None:
    kind, message = report[operator]
    assert kind == "RuntimeError"
    assert message.endswith(f"{tensor} must be a CUDA tensor")


def test_it_needs_no_library_of_cuda(extension: Path) -> None:
    (binary,) = (extension / "attn_ext").glob("_C.*.so")
    needed = re.findall(r"NEEDED\s+(\S+)", run(require("objdump"), "-p", binary))
    assert [name for name in needed if "cuda" in name] == []
    undefined = run(require("nm"), "-D", "--undefined-only", binary)
    assert re.findall(r"\bcuda\w+|\bcu[A-Z]\w+", undefined) == []
    assert [name for name in re.findall(r"\baoti_torch_\w*cuda\w*", undefined)] == [
        "aoti_torch_device_type_cuda"
    ]


def test_it_is_small(extension: Path) -> None:
    (binary,) = (extension / "attn_ext").glob("_C.*.so")
    sections = run(require("objdump"), "--section-headers", binary)
    (size,) = re.findall(r" \.nv_fatbin +([0-9a-f]+) ", sections)
    assert int(size, 16) < SIZE_BUDGET
