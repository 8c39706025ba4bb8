"""Every planted defect still has its place: only some are tried in each run."""

from __future__ import annotations

from typing import Any

import backward_mutants
import decode_mutants
import forward_mutants
import pytest
from programs import ROOT

MUTANTS = (*forward_mutants.MUTANTS, *backward_mutants.MUTANTS, *decode_mutants.MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_text_is_there_once(mutant: Any) -> None:
    assert (ROOT / "csrc" / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
