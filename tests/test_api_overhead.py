"""What keeps small calls and the import cheap, tested without a clock."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import attn_ext


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_import_prints_nothing_and_loads_nothing_slow():
    """Loading the compiler stack takes longer than loading torch."""
    result = run_python(
        "import sys, torch; before = set(sys.modules); import attn_ext\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert loaded <= {'attn_ext', 'torch'}, loaded\n"
        "new = set(sys.modules) - before\n"
        "compiler = ('torch._dynamo', 'torch._inductor', 'torch.fx.experimental')\n"
        "slow = [name for name in new if name.startswith(compiler)]\n"
        "assert not slow, slow\n"
        "lazy = ('cache', 'integrations', 'nn', 'patterns', 'reference', 'testing')\n"
        "lazy = [n for n in lazy if 'attn_ext.' + n in new]\n"
        "assert not lazy, lazy\n"
        "assert len(new) < 20, new\n"
    )
    assert result.stdout == result.stderr == ""


def test_submodules_load_when_they_are_named():
    names = "nn.SelfAttention", "reference.attention", "testing.use_isa", "integrations.transformers.check"
    run_python("import attn_ext; " + "; ".join(f"attn_ext.{name}" for name in names))


@pytest.mark.parametrize(
    "call",
    [
        lambda q, m: attn_ext.scaled_dot_product_attention(q, q, q),
        lambda q, m: attn_ext.scaled_dot_product_attention(q, q, q, m),
        lambda q, m: attn_ext.scaled_dot_product_attention(q, q[:, :1], q[:, :1], is_causal=True),
        lambda q, m: attn_ext.scaled_dot_product_attention(q[0], q[0], q[0], m[0]),
        lambda q, m: attn_ext.attention(q, q, q, mask=attn_ext.Causal() & attn_ext.Dense(m), return_lse=True),
        lambda q, m: attn_ext.attention(q, q, q, bias=m, softcap=2.0, alibi_slopes=m[0, 0, 0, :3]),
        lambda q, m: attn_ext.attention(q, q, q, sinks=m[0, 0, 0, :3], dropout_p=0.5, dropout_seed=1),
        lambda q, m: attn_ext.scaled_dot_product_attention(q, q, q, m, dropout_p=0.5),
    ],
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_valid_arguments_are_not_examined(call, requires_grad, monkeypatch):
    def fail(*_):
        raise AssertionError("the arguments were examined")

    monkeypatch.setattr(attn_ext._validation, "check_scaled_dot_product_attention", fail)
    monkeypatch.setattr(attn_ext._validation, "check_attention", fail)
    call(torch.randn(2, 3, 4, 5, requires_grad=requires_grad), torch.ones(1, 1, 4, 4))


def test_calls_without_grad_go_past_the_python_kernel(monkeypatch):
    """The autograd kernel is written in Python: reaching it costs more than the rest of a small call."""
    reached = []
    monkeypatch.setattr(attn_ext._ops, "_is_differentiated", lambda *_: reached.append(1) or False)
    query = torch.randn(1, 2, 3, 4)
    torch.ops.attn_ext.attention_forward(query, query, query, *attn_ext._ops.Options())
    assert reached == [1], "the test looks for a function that is no longer called"
    attn_ext.scaled_dot_product_attention(query, query, query)
    attn_ext.attention(query, query, query)
    with torch.no_grad():
        attn_ext.scaled_dot_product_attention(*[query.clone().requires_grad_()] * 3)
    with torch.inference_mode():
        attn_ext.scaled_dot_product_attention(query, query, query)
    assert reached == [1]


def test_training_goes_past_the_python_kernel(monkeypatch):
    reached = []
    monkeypatch.setattr(attn_ext._ops, "_is_differentiated", lambda *_: reached.append(1) or False)
    query = torch.randn(1, 2, 3, 4, requires_grad=True)
    attn_ext.scaled_dot_product_attention(query, query, query).sum().backward()
    assert query.grad is not None
    assert not reached
