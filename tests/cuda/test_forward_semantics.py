"""What the CPU kernels are tested for, of the CUDA kernels: the same tests, by the emulated kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import test_block_sparse as sparse
import test_numerics_autograd as autograd
import test_numerics_determinism as determinism
import test_numerics_dropout as dropout
import test_numerics_features as features
import test_numerics_masks as masks
import test_numerics_nonfinite as nonfinite
import test_numerics_properties as properties
import test_numerics_shapes as shapes
import test_numerics_strides as strides
import torch
from cuda_problems import make_cuda_options
from emulated import emulated
from problems import sample

# Each test, and of how many of its problems.
TESTS: dict[Callable[..., None], int] = {
    nonfinite.test_hidden_keys_and_values_are_never_felt: 15,
    nonfinite.test_keys_hidden_from_all_by_the_causal_mask_are_never_felt: 3,
    nonfinite.test_rows_that_do_not_see_a_bad_key_are_unharmed: 24,
    nonfinite.test_scratch_memory_of_an_earlier_call_is_never_felt: 6,
    nonfinite.test_nan_in_an_attended_key_propagates: 6,
    nonfinite.test_nan_in_a_query_stays_in_its_row: 3,
    nonfinite.test_nan_in_an_attended_value_stays_in_its_column: 3,
    nonfinite.test_fully_masked_rows: 12,
    nonfinite.test_non_finite_grad_out_of_a_fully_masked_row_is_never_felt: 3,
    nonfinite.test_rows_masked_by_a_large_finite_bias: 12,
    nonfinite.test_a_large_bias_of_a_whole_row_shifts_only_lse: 6,
    nonfinite.test_huge_equal_scores: 6,
    nonfinite.test_values_near_the_largest_number: 3,
    nonfinite.test_subnormal_inputs: 3,
    nonfinite.test_dead_keys_before_live_ones: 9,
    nonfinite.test_scores_that_grow_along_the_keys: 3,
    features.test_scales_that_are_not_positive: 12,
    features.test_empty: 18,
    features.test_bias_of_fewer_dimensions: 3,
    features.test_bias_strides: 5,
    features.test_bias_equals_additive_mask: 3,
    features.test_rows_of_the_lowest_number: 12,
    features.test_a_huge_softcap_is_none: 3,
    features.test_softcaps_and_scales: 12,
    features.test_softcap_bounds_the_scores: 3,
    features.test_sinks_of_minus_infinity_are_none: 3,
    features.test_sinks_of_rows_that_see_nothing: 3,
    features.test_large_sinks: 9,
    features.test_a_sink_is_a_key_whose_value_is_zero: 3,
    features.test_dropout_beside_rows_that_see_nothing: 3,
    features.test_hidden_keys_and_values_are_never_felt: 6,
    features.test_rows_that_do_not_see_a_bad_key_are_unharmed: 18,
    features.test_nan_in_an_attended_key_propagates: 6,
    features.test_softcaps_of_any_size: 6,
    features.test_a_sum_of_the_lowest_numbers_hides_nothing: 1,
    features.test_alone: 12,
    features.test_pairs: 24,
    features.test_triples: 24,
    features.test_half_precision_gradients_are_nearly_as_exact_as_their_dtype: 6,
    features.test_bias_and_boolean_mask: 4,
    features.test_bias_and_additive_mask: 3,
    features.test_wanting_no_gradient_of_the_bias_changes_no_other: 3,
    features.test_scratch_memory_of_an_earlier_call_is_never_felt: 3,
    features.test_sinks_do_not_feel_gradients_of_rows_that_see_nothing: 1,
    masks.test_causal: 6,
    masks.test_sliding_window: 8,
    masks.test_sliding_window_combinations: 6,
    masks.test_key_lengths: 6,
    masks.test_dense_mask_strides: 5,
    masks.test_combinations: 6,
    masks.test_any_nonzero_byte_is_true: 1,
    masks.test_expressions: len(masks.EXPRESSIONS),
    masks.test_segments: 6,
    masks.test_documents_equal_each_alone: 3,
    shapes.test_lengths: 16,
    shapes.test_head_dims: 12,
    shapes.test_grouped_heads: 12,
    shapes.test_scales: 15,
    shapes.test_empty: 10,
    shapes.test_one_key_returns_its_value: 3,
    strides.test_inputs: 16,
    strides.test_same_bits_as_contiguous: 9,
    strides.test_grad_out: 9,
    strides.test_grad_of_sum: 3,
    strides.test_grad_lse: 3,
    strides.test_outputs_lie_like_their_models: 9,
    properties.test_order_of_keys_does_not_matter: 1,
    properties.test_parts_merge_by_lse: 3,
    properties.test_grouped_heads_equal_repeated_heads: 3,
    properties.test_adding_the_same_to_every_key_shifts_only_lse: 1,
    autograd.test_gradients_of_some_inputs: 3,
    autograd.test_gradients_accumulate_over_two_uses: 1,
    autograd.test_changing_a_saved_input_is_an_error: 3,
    autograd.test_changing_the_saved_output_is_an_error: 1,
    autograd.test_half_precision_gradients_are_nearly_as_exact_as_their_dtype: 4,
    determinism.test_batch_element_alone: 6,
    dropout.test_decisions_do_not_depend_on_what_else_is_computed: 3,
    sparse.test_random_blocks: 12,
    sparse.test_rules_inside_the_blocks: 5,
    sparse.test_few_blocks: 5,
    sparse.test_all_blocks_are_no_mask: 3,
}


def on_cuda(values: Any) -> tuple[Any, ...]:
    """Those that CUDA takes, and that do not take the emulator long."""
    kept = tuple(value for value in values if value is not torch.float64)
    return tuple(value for value in kept if not isinstance(value, int) or value <= 256)


def problems(test: Callable[..., None], count: int) -> Iterator[dict[str, Any]]:
    """`count` of those that the test is marked with, as arguments."""
    parameters, of_case = {}, {}
    for mark in getattr(test, "pytestmark", ()):
        if mark.name == "parametrize":
            names, values = mark.args
            parameters[names if isinstance(names, str) else ",".join(names)] = on_cuda(values)
        elif mark.name == "sample":
            of_case = {name: on_cuda(values) for name, values in mark.kwargs.items()}
    for drawn in sample(count, f"{test.__module__}.{test.__name__}", parameters | of_case):
        values = vars(drawn)
        arguments = {"case": SimpleNamespace(**{name: values[name] for name in of_case})} if of_case else {}
        for names in parameters:
            several = values[names] if "," in names else (values[names],)
            arguments |= zip(names.split(","), several, strict=True)
        yield arguments


def parameters() -> Iterator[Any]:
    for test, count in TESTS.items():
        for index, arguments in enumerate(problems(test, count)):
            yield pytest.param(test, arguments, id=f"{test.__module__[14:]}.{test.__name__[5:]}-{index}")


@pytest.mark.parametrize(("test", "arguments"), list(parameters()))
def test_as_on_the_cpu(test: Callable[..., None], arguments: dict[str, Any]) -> None:
    with mock.patch.object(features, "make_options", make_cuda_options), emulated():
        test(**arguments)
