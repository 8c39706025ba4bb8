"""Where the CUDA toolkit is looked for, and what is said if it is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import cuda_toolkit


def test_missing_parts_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_toolkit, "roots", lambda: [])
    for missing, package in [
        ("nvcc", "nvidia-cuda-nvcc"),
        ("cuobjdump", "nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"),
    ]:
        with pytest.raises(
            FileNotFoundError, match=f"bin/{missing} is not in CUDA_HOME.*pip install {package}"
        ):
            cuda_toolkit.binary(missing)
    for find in cuda_toolkit.include_dirs, cuda_toolkit.static_runtime:
        with pytest.raises(FileNotFoundError, match="pip install nvidia-cuda-runtime"):
            find()


def test_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second, packages = tmp_path / "first", tmp_path / "second", tmp_path / "site-packages"
    for root in (second, packages / "nvidia" / "cu13"):
        (root / "bin").mkdir(parents=True)
        (root / "bin" / "ptxas").touch()
    (packages / "nvidia" / "cu13" / "bin" / "bin3c").touch()
    monkeypatch.setenv("CUDA_HOME", str(first))
    monkeypatch.setenv("CUDA_PATH", str(second))
    monkeypatch.syspath_prepend(packages)
    assert cuda_toolkit.binary("ptxas") == second / "bin" / "ptxas"
    assert cuda_toolkit.binary("bin3c") == packages / "nvidia" / "cu13" / "bin" / "bin3c"
    monkeypatch.setenv("CUDA_HOME", str(packages / "nvidia" / "cu13"))
    assert cuda_toolkit.binary("ptxas") == packages / "nvidia" / "cu13" / "bin" / "ptxas"
