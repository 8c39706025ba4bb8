"""Operators in the place of attn_ext's: how their sources are built, and how they are reached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch.utils import cpp_extension

from attn_ext import _ops, _support, decode

FORWARD, BACKWARD = ("attention_forward", "attention_output"), ("attention_backward",)
ATTENTION = (*FORWARD, *BACKWARD, "dropout_mask")
_HANDLES = {"attention_forward": "_forward_handle", "attention_output": "_output_handle"}


def build_arguments() -> dict[str, list[str]]:
    """Of `emulation.build`, for sources that see torch."""
    (torch_libraries,) = {str(Path(path)) for path in cpp_extension.library_paths()}
    return {
        "defines": ["TORCH_TARGET_VERSION=0x020a000000000000", "TORCH_STABLE_ONLY"],
        "compile_args": [f"-isystem{path}" for path in cpp_extension.include_paths()],
        "link_args": [f"-L{torch_libraries}", "-ltorch_cpu", "-lc10"],
    }


@contextmanager
def attention_by(namespace: str, names: Iterable[str] = ATTENTION) -> Iterator[None]:
    """The public functions call these operators of `torch.ops.<namespace>`."""
    operators = getattr(torch.ops, namespace)
    replaced = {name: getattr(operators, name).default for name in names}
    handles = {_HANDLES[name]: replaced[name]._handle for name in _HANDLES if name in replaced}
    with (
        mock.patch.multiple(_ops, **replaced, **handles),
        mock.patch.dict(_support.SELECTORS, cpu=operators),
    ):
        yield


@contextmanager
def decode_by(namespace: str) -> Iterator[None]:
    """`attention_decode` calls the operator of `torch.ops.<namespace>`."""
    operator = getattr(torch.ops, namespace).attention_decode.default
    with mock.patch.multiple(decode, _decode=operator, _decode_handle=operator._handle):
        yield
