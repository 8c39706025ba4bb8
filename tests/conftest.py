"""Seeds, threads and instruction sets of the tests; how the sampled tests get their cases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from problems import describe, sample

from attn_ext import testing

QUICK_SHARE = 6

# Inductor does not ask whether the operators that its cached graphs call still have the same arguments.
torch.compiler.config.force_disable_caches = True


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help=f"one in {QUICK_SHARE} of the sampled problems")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "sample(count, **axes): `case` = each of `count` combinations of the axes' values"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("sample")
    if marker is not None:
        count = marker.args[0]
        if metafunc.config.getoption("quick"):
            count = -(-count // QUICK_SHARE)
        cases = sample(count, metafunc.function.__name__, marker.kwargs)
        metafunc.parametrize("case", cases, ids=describe)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Each test starts from the same seed, on one thread."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=testing.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once under each instruction set of this machine."""
    with testing.use_isa(request.param):
        yield request.param
