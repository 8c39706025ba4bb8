"""What decoding on the CPU is tested for, of the CUDA kernels: the same tests, by the emulated kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_decode as decode
from emulated import emulated
from test_forward_semantics import problems

# Each test, and of how many of its problems.
TESTS: dict[Callable[..., None], int] = {
    decode.test_problems: 60,
    decode.test_options: 24,
    decode.test_rows_with_nothing_to_attend_to: 1,
    decode.test_empty: 3,
    decode.test_append_writes_the_new_rows_and_nothing_else: 2,
    decode.test_pages_shared_by_sequences: 1,
    decode.test_strided_caches: 1,
    decode.test_table_of_any_kind: 1,
    decode.test_a_key_that_only_later_queries_see: 3,
    decode.test_what_is_before_the_window_is_not_read: 1,
    decode.test_rotary: 18,
    decode.test_quantised_caches: 30,
    decode.test_every_code: 1,
    decode.test_appended_rows_are_quantised: 2,
    decode.test_scales_whose_inverse_overflows: 2,
    decode.test_error_of_quantisation: 2,
    decode.test_splits: 6,
    decode.test_a_split_has_16_keys: 1,
    decode.test_a_sequence_alone_gives_the_same_bits: 1,
    decode.test_generation_token_by_token: 4,
    decode.test_shared_prefix: 12,
    decode.test_shared_prefix_in_half_precision: 2,
    decode.test_rotary_positions_count_from_the_shared_prefix: 2,
    decode.test_a_prefix_leaves_what_is_appended_as_it_is: 3,
    decode.test_entries_of_pages_without_tokens_may_be_anything: 1,
    decode.test_caches_that_overlap_are_not_written: 4,
    decode.test_caches_that_interleave: 5,
    decode.test_huge_windows_hide_nothing: 1,
    decode.test_gradients_are_refused: 1,
    decode.test_writes_are_seen_by_autograd: 1,
    decode.test_valid_arguments_are_not_examined: 1,
}


def parameters() -> Iterator[Any]:
    for test, count in TESTS.items():
        for index, arguments in enumerate(problems(test, count)):
            yield pytest.param(test, arguments, id=f"{test.__name__[5:]}-{index}")


@pytest.mark.parametrize(("test", "arguments"), list(parameters()))
def test_as_on_the_cpu(
    test: Callable[..., None], arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fixtures = {"isa": "", "monkeypatch": monkeypatch}
    wanted = inspect.signature(test).parameters
    with emulated():
        test(**arguments, **{name: value for name, value in fixtures.items() if name in wanted})
