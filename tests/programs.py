"""How the build tests run programs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, **options: object) -> str:
    """The output of a command that must succeed."""
    completed = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert completed.returncode == 0, f"{command}: {completed.returncode}\n{completed.stdout[-6000:]}"
    return completed.stdout


def require(tool: str) -> str:
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"this machine has no {tool}")
    return path
