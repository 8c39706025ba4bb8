"""`python -m attn_ext.info` says what is installed and checks that it computes right."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import attn_ext
from attn_ext import _C, info, testing


def run_info(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "attn_ext.info", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )


def test_json_is_complete_and_true() -> None:
    report = json.loads(run_info("--json").stdout)
    assert report["attn_ext"] == attn_ext.__version__
    assert report["torch"]["running"] == torch.__version__
    assert report["cxx_standard"] >= 202002
    isa = report["cpu"]["isa"]
    assert "baseline" in isa["supported"]
    assert isa["current"] in isa["supported"]
    assert set(isa["supported"]) <= set(isa["compiled"]) <= set(_C.isa_names())
    assert report["cuda"] == {"version": None, "archs": []}
    assert report["self_check"]["passed"]
    assert set(report["environment"]) == set(info.ENVIRONMENT)


def test_text_shows_the_instruction_set_in_use() -> None:
    completed = run_info()
    assert completed.stderr == ""
    assert f"[{_C.isa_current()}]" in completed.stdout
    assert "self-check" in completed.stdout
    assert "passed" in completed.stdout


def test_a_failed_self_check_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(info, "self_check", lambda: {"max_error": 0.5, "passed": False})
    assert info.main([]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("name", testing.available_isas())
def test_the_self_check_passes_with_every_instruction_set(name: str) -> None:
    with testing.use_isa(name):
        assert info.self_check()["passed"]
