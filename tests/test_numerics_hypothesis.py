"""Whatever the arguments, the kernels agree with the reference: problems that hypothesis composes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from problems import DTYPES, FEATURES, MASKS, assert_same_bits, make_bias, make_inputs, make_options, run
from torch import Tensor

import attn_ext
from attn_ext.testing import available_isas, check_attention, use_isa

LENGTHS = st.integers(0, 90)
HEAD_DIMS = st.sampled_from((4, 8, 16, 20, 33, 64))
SCALES = (None, 0.0, 1.0, -0.4, 1e-4, 1e4, -1e4)
LAYOUTS = ("dense", "heads_last", "padded", "every_other", "shared")
BAD_VALUES = (torch.nan, torch.inf, -torch.inf)


def settings(max_examples: int) -> Any:
    """The same examples in every run, and nothing written to disk."""
    return hypothesis.settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[
            hypothesis.HealthCheck.function_scoped_fixture,
            hypothesis.HealthCheck.too_slow,
            hypothesis.HealthCheck.data_too_large,
        ],
    )


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The numbers of `tensor` (but for shared: of its first entry), elsewhere in memory."""
    batch, heads, length, columns = tensor.shape
    if layout == "heads_last":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "padded":
        return torch.nn.functional.pad(tensor, (3, 2, 1, 1))[:, :, 1 : 1 + length, 3 : 3 + columns]
    if layout == "every_other":
        return tensor.repeat_interleave(2, dim=3)[..., ::2]
    if layout == "shared":
        return tensor[:1].expand(batch, heads, length, columns)
    return tensor


RECIPES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "batch": st.integers(1, 3),
        "kv_heads": st.integers(1, 2),
        "group": st.integers(1, 3),
        "query_len": LENGTHS,
        "kv_len": LENGTHS,
        "head_dims": st.tuples(HEAD_DIMS, HEAD_DIMS),
        "dtype": st.sampled_from(DTYPES),
        "layouts": st.tuples(*(st.sampled_from(LAYOUTS),) * 3),
        "features": st.sets(st.sampled_from((*FEATURES, *MASKS)), max_size=4).map(sorted),
        "scale": st.sampled_from(SCALES),
        "isa": st.sampled_from(available_isas()),
    }
)


def build(recipe: dict[str, Any]) -> dict[str, Any]:
    """Query, key, value and options of `attn_ext.attention`; the numbers come from torch."""
    r = SimpleNamespace(**recipe)
    torch.manual_seed(r.seed)
    sizes = r.batch, r.group * r.kv_heads, r.query_len, r.kv_len
    head_dim, value_dim = r.head_dims
    tensors = make_inputs(*sizes, head_dim, value_dim=value_dim, group=r.group, dtype=r.dtype)
    tensors = map(lay_out, tensors, r.layouts)
    options = make_options(tuple(r.features), *sizes)
    return {**dict(zip(("query", "key", "value"), tensors, strict=True)), **options, "scale": r.scale}


def visible(problem: dict[str, Any]) -> Tensor:
    """(B, H, Lq, Lk): which key which query sees."""
    sizes = (*problem["query"].shape[:3], problem["key"].size(2))
    seen = torch.ones(sizes, dtype=torch.bool)
    if "mask" in problem:
        dense = problem["mask"].to_dense(*sizes)
        seen = seen & (dense if dense.dtype == torch.bool else dense != -torch.inf)
    return seen & (problem["bias"] != -torch.inf) if "bias" in problem else seen


def unseen_keys(problem: dict[str, Any]) -> Tensor:
    """(B, Hkv, Lk, 1): the keys that no query of any head of their group sees."""
    seen, kv_heads = visible(problem), problem["key"].size(1)
    return ~seen.unflatten(1, (kv_heads, -1)).any(3).any(2).unsqueeze(-1)


@settings(150)
@hypothesis.given(recipe=RECIPES)
def test_agrees_with_the_reference(recipe: dict[str, Any]) -> None:
    with use_isa(recipe["isa"]):
        check_attention(**build(recipe))


@settings(100)
@hypothesis.given(
    recipe=RECIPES,
    bad=st.sampled_from(BAD_VALUES),
    hidden=st.sampled_from(("lengths", "boolean", "causal")),
)
def test_what_no_query_sees_is_never_felt(recipe: dict[str, Any], bad: float, hidden: str) -> None:
    problem = build(recipe)
    batch, heads, query_len, kv_len = (*problem["query"].shape[:3], problem["key"].size(2))
    mask = {
        "lengths": attn_ext.KeyLengths(torch.randint(kv_len + 1, (batch,))),
        "boolean": attn_ext.Dense(torch.rand(batch, heads, query_len, kv_len) < 0.1),
        "causal": attn_ext.Causal(),
    }[hidden]
    problem["mask"] = mask & problem["mask"] if "mask" in problem else mask
    unseen = unseen_keys(problem)
    problem["key"] = torch.where(unseen, bad, problem["key"])
    problem["value"] = torch.where(unseen, bad, problem["value"])
    with use_isa(recipe["isa"]):
        check_attention(**problem)


@settings(75)
@hypothesis.given(recipe=RECIPES, share=st.sampled_from((0.1, 0.5, 1.0)))
def test_rows_that_see_nothing(recipe: dict[str, Any], share: float) -> None:
    """Output 0, log-sum-exp the sink or -inf, and no gradient."""
    problem = build(recipe)
    batch, heads, query_len, kv_len = (*problem["query"].shape[:3], problem["key"].size(2))
    dead = torch.rand(batch, heads, query_len, 1) < share
    mask = attn_ext.Dense(~dead.expand(batch, heads, query_len, kv_len).contiguous())
    problem["mask"] = mask & problem["mask"] if "mask" in problem else mask
    with use_isa(recipe["isa"]):
        check_attention(**problem)
        tensors = [problem.pop(name) for name in ("query", "key", "value")]
        results = run(*tensors, **problem)
    for name in ("out", "grad_query"):
        assert (results[name][dead.squeeze(-1)] == 0).all(), name
    sinks = problem.get("sinks", torch.full((heads,), -torch.inf))
    dead = dead.squeeze(-1)
    expected = sinks.double().view(-1, 1).expand(batch, heads, query_len)[dead]
    torch.testing.assert_close(results["lse"][dead].double(), expected, rtol=0.01, atol=0.01)


@settings(75)
@hypothesis.given(
    recipe=RECIPES,
    bias_dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float64)),
    share=st.sampled_from((0.1, 0.5, 0.9)),
)
def test_rows_of_the_lowest_number(recipe: dict[str, Any], bias_dtype: torch.dtype, share: float) -> None:
    """A bias that swallows the scores hides nothing: keys that share it weigh the same."""
    problem = build({**recipe, "features": [name for name in recipe["features"] if name != "additive"]})
    sizes = (*problem["query"].shape[:3], problem["key"].size(2))
    lowest = (torch.rand(*sizes[:3], 1) < share) & (torch.rand(sizes) < 0.7)
    bias = torch.where(lowest, torch.finfo(bias_dtype).min, make_bias(sizes, (True,) * 4, bias_dtype))
    with use_isa(recipe["isa"]):
        check_attention(**{**problem, "bias": bias}, lse=False)


@settings(50)
@hypothesis.given(recipe=RECIPES)
def test_strides_do_not_matter(recipe: dict[str, Any]) -> None:
    problem = build(recipe)
    tensors = [problem.pop(name) for name in ("query", "key", "value")]
    with use_isa(recipe["isa"]):
        assert_same_bits(run(*tensors, **problem), run(*(t.contiguous() for t in tensors), **problem))
