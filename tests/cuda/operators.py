"""Operators in the place of attn_ext's: how their sources are built, and how they are reached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch.utils import cpp_extension

from attn_ext import _ops, _support, decode


def build_arguments() -> dict[str, list[str]]:
    """Of `emulation.build`, for sources that see torch."""
    (torch_libraries,) = {str(Path(path)) for path in cpp_extension.library_paths()}
    return {
        "defines": ["TORCH_TARGET_VERSION=0x020a000000000000", "TORCH_STABLE_ONLY"],
        "compile_args": [f"-isystem{path}" for path in cpp_extension.include_paths()],
        "link_args": [f"-L{torch_libraries}", "-ltorch_cpu", "-lc10"],
    }


@contextmanager
def attention_by(namespace: str) -> Iterator[None]:
    """The public functions call the operators of `torch.ops.<namespace>`, as far as there are any."""
    operators = getattr(torch.ops, namespace)
    replaced = {}
    for name in ("attention_forward", "attention_output", "attention_backward", "dropout_mask"):
        if hasattr(operators, name):
            replaced[name] = getattr(operators, name).default
    with (
        mock.patch.multiple(
            _ops,
            _forward_handle=replaced["attention_forward"]._handle,
            _output_handle=replaced["attention_output"]._handle,
            **replaced,
        ),
        mock.patch.dict(_support.SELECTORS, cpu=operators),
    ):
        yield


@contextmanager
def decode_by(namespace: str) -> Iterator[None]:
    """`attention_decode` calls the operator of `torch.ops.<namespace>`."""
    operator = getattr(torch.ops, namespace).attention_decode.default
    with mock.patch.multiple(decode, _decode=operator, _decode_handle=operator._handle):
        yield
