"""The contenders: attn_ext, what PyTorch offers without it, and other libraries where they are installed."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .cases import Case

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Run = Callable[[], tuple[Tensor, ...]]


class Peer:
    """One way to compute attention.

    A subclass names itself and the package that it needs, says what it does not support, and returns from
    ``attend`` the function of query, key and value that solves a case.
    """

    name: str
    package: str = "torch"
    trains = True
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")

    def load(self) -> str:
        """Imports the package and returns its version; raises what a missing or broken package raises."""
        importlib.import_module(self.package)
        return importlib.metadata.version(self.package)

    def unsupported(self, case: Case) -> str | None:
        """Why this peer cannot run the case, or None."""
        if case.direction != "forward" and not self.trains:
            return "forward only"
        if case.dtype not in self.dtypes:
            return f"no {case.dtype}"
        return None

    def attend(self, case: Case) -> Attend:
        raise NotImplementedError

    def prepare(self, case: Case, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Run:
        """What is timed; it returns the output and, in training, the gradients of query, key and value."""
        return bind(self.attend(case), case, inputs)


def bind(attend: Attend, case: Case, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Run:
    """`attend` on the inputs of a case, with the backward if it is one of training."""
    query, key, value, grad_out = inputs

    def forward() -> tuple[Tensor, ...]:
        return (attend(query, key, value),)

    def training() -> tuple[Tensor, ...]:
        out = attend(query, key, value)
        return (out, *torch.autograd.grad(out, (query, key, value), grad_out))

    return training if case.direction == "training" else forward


def _with_options(sdpa: Attend, case: Case) -> Attend:
    """``sdpa`` with the keywords that the case needs and no others: the cost of a call is measured too."""
    needed = {"is_causal": case.causal, "enable_gqa": case.heads != case.key_heads}
    options = {name: True for name, wanted in needed.items() if wanted}
    return partial(sdpa, **options) if options else sdpa


class AttnExt(Peer):
    """This package, through the function that mirrors torch's."""

    name = package = "attn_ext"

    def load(self) -> str:
        import attn_ext

        return attn_ext.__version__  # a tree that is built in place has no installed metadata

    def attend(self, case: Case) -> Attend:
        import attn_ext

        return _with_options(attn_ext.scaled_dot_product_attention, case)


class Torch(Peer):
    """``F.scaled_dot_product_attention`` as it is, with the backend that it picks."""

    name = "torch"

    def attend(self, case: Case) -> Attend:
        return _with_options(F.scaled_dot_product_attention, case)


class TorchMath(Peer):
    """The same function held to its math backend."""

    name = "math"

    def attend(self, case: Case) -> Attend:
        attend = Torch().attend(case)

        def math_only(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return attend(query, key, value)

        return math_only


class Naive(Peer):
    """The textbook: all L x L scores, their softmax and the product with the values, in the inputs' dtype."""

    name = "naive"

    def attend(self, case: Case) -> Attend:
        group = case.heads // case.key_heads
        scale = case.head_dim**-0.5
        hidden = (
            torch.ones(case.query_length, case.key_length, dtype=torch.bool).triu(1) if case.causal else None
        )

        def naive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if group > 1:
                key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
            scores = query @ key.transpose(-1, -2) * scale
            if hidden is not None:
                scores = scores.masked_fill(hidden, float("-inf"))
            return scores.softmax(-1) @ value

        return naive


class Flex(Peer):
    """FlexAttention, compiled for the shape."""

    name = "flex"
    trains = False

    def attend(self, case: Case) -> Attend:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch.compiler.reset()  # beyond a handful of shapes it would fall back to the uncompiled function
        block_mask = None
        if case.causal:
            block_mask = create_block_mask(
                lambda batch, head, row, column: row >= column,
                None,
                None,
                case.query_length,
                case.key_length,
                device="cpu",
            )
        compiled = torch.compile(flex_attention, dynamic=False)
        return partial(compiled, block_mask=block_mask, enable_gqa=case.heads != case.key_heads)


class ZenTorch(Peer):
    """AMD's plug-in for PyTorch."""

    name = package = "zentorch"
    trains = False
    dtypes = ("float32", "bfloat16")

    def attend(self, case: Case) -> Attend:
        sdpa = torch.ops.zentorch.zentorch_sdpa.default
        return lambda query, key, value: sdpa(query, key, value, is_causal=case.causal)[0]


class OpenVino(Peer):
    """OpenVINO's ScaledDotProductAttention, compiled for the shape, on the tensors' own memory."""

    name = package = "openvino"
    trains = False
    dtypes = ("float32", "bfloat16")

    def unsupported(self, case: Case) -> str | None:
        return super().unsupported(case) or ("no grouped heads" if case.heads != case.key_heads else None)

    def attend(self, case: Case) -> Attend:
        import openvino
        from openvino import opset13

        element = {"float32": openvino.Type.f32, "bfloat16": openvino.Type.bf16}[case.dtype]
        shapes = [
            [case.batch, heads, length, case.head_dim]
            for heads, length in ((case.heads, case.query_length), *[(case.key_heads, case.key_length)] * 2)
        ]
        parameters = [opset13.parameter(shape, element) for shape in shapes]
        product = opset13.scaled_dot_product_attention(*parameters, causal=case.causal)
        compiled = openvino.Core().compile_model(
            openvino.Model([product], parameters),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "INFERENCE_PRECISION_HINT": element.get_type_name(),
            },
        )
        request = compiled.create_infer_request()
        bits = {"float32": torch.float32, "bfloat16": torch.uint16}[case.dtype]
        out = torch.empty(shapes[0], dtype=case.torch_dtype)

        def shared(tensor: Tensor) -> openvino.Tensor:
            memory = tensor.detach().view(bits).numpy()
            return openvino.Tensor(memory, openvino.Shape(tensor.shape), element)

        request.set_output_tensor(shared(out))

        def infer(*tensors: Tensor) -> Tensor:
            for index, tensor in enumerate(tensors):
                request.set_input_tensor(index, shared(tensor))
            request.infer()
            return out

        return infer


class OnnxRuntime(Peer):
    """ONNX Runtime's MultiHeadAttention, fed in its layout (B, L, H D) to spare it transposed copies."""

    name = package = "onnxruntime"
    trains = False
    dtypes = ("float32",)

    def load(self) -> str:
        importlib.import_module("onnx")
        return super().load()

    def unsupported(self, case: Case) -> str | None:
        return super().unsupported(case) or ("no grouped heads" if case.heads != case.key_heads else None)

    def prepare(self, case: Case, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Run:
        import onnxruntime
        from onnx import TensorProto, helper

        width = case.heads * case.head_dim
        shapes = {
            "query": (case.batch, case.query_length, width),
            "key": (case.batch, case.key_length, width),
            "value": (case.batch, case.key_length, width),
        }

        def declare(name: str, shape: tuple[int, ...]) -> object:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        node = helper.make_node(
            "MultiHeadAttention",
            list(shapes),
            ["out"],
            domain="com.microsoft",
            num_heads=case.heads,
            unidirectional=int(case.causal),
        )
        graph = helper.make_graph(
            [node],
            "attention",
            [declare(*item) for item in shapes.items()],
            [declare("out", shapes["query"])],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        feed = {
            name: tensor.transpose(1, 2).reshape(shapes[name]).contiguous().numpy()
            for name, tensor in zip(shapes, inputs, strict=False)
        }

        def infer() -> tuple[Tensor, ...]:
            (out,) = session.run(None, feed)
            out = torch.from_numpy(out).view(case.batch, case.query_length, case.heads, case.head_dim)
            return (out.transpose(1, 2),)

        return infer


ALWAYS: tuple[Peer, ...] = (AttnExt(), Torch(), TorchMath(), Naive())
EXTRAS: dict[str, Peer] = {peer.name: peer for peer in (ZenTorch(), OnnxRuntime(), OpenVino(), Flex())}


def load_peers(extras: list[str]) -> tuple[list[Peer], dict[str, str]]:
    """The contenders that are here.

    Args:
        extras: names from ``EXTRAS``, or ``all``.

    Returns:
        The peers that loaded, and for every one asked for, its version or why it is missing.

    Raises:
        ValueError: for a name that is no peer.
    """
    if unknown := sorted(set(extras) - EXTRAS.keys() - {"all"}):
        raise ValueError(f"unknown peers {unknown}; there are {sorted(EXTRAS)} and 'all'")
    wanted = [*ALWAYS, *(peer for name, peer in EXTRAS.items() if "all" in extras or name in extras)]
    peers, versions = [], {}
    for peer in wanted:
        try:
            versions[peer.name] = peer.load()
        except Exception as error:  # a broken installation raises anything
            versions[peer.name] = f"missing: {type(error).__name__}: {error}"
        else:
            peers.append(peer)
    return peers, versions
