"""Operators in the place of attn_ext's: how their sources are built, and how they are reached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch.utils import cpp_extension

from attn_ext import _ops, decode


def build_arguments() -> dict[str, list[str]]:
    """Of `emulation.build`, for sources that see torch."""
    (torch_libraries,) = {str(Path(path)) for path in cpp_extension.library_paths()}
    return {
        "defines": ["TORCH_TARGET_VERSION=0x020a000000000000", "TORCH_STABLE_ONLY"],
        "compile_args": [f"-isystem{path}" for path in cpp_extension.include_paths()],
        "link_args": [f"-L{torch_libraries}", "-ltorch_cpu", "-lc10"],
    }


@contextmanager
def forward_by(namespace: str) -> Iterator[None]:
    """The public functions call the forward operators of `torch.ops.<namespace>`."""
    operators = getattr(torch.ops, namespace)
    with mock.patch.multiple(
        _ops,
        attention_forward=operators.attention_forward.default,
        attention_output=operators.attention_output.default,
        _forward_handle=operators.attention_forward.default._handle,
        _output_handle=operators.attention_output.default._handle,
    ):
        yield


@contextmanager
def decode_by(namespace: str) -> Iterator[None]:
    """`attention_decode` calls the operator of `torch.ops.<namespace>`."""
    operator = getattr(torch.ops, namespace).attention_decode.default
    with mock.patch.multiple(decode, _decode=operator, _decode_handle=operator._handle):
        yield
