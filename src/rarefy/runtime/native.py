"""The compiled decoding step (``kernels/csrc/decoder.h``) over a decoder that was taken apart."""

from __future__ import annotations

import ctypes
import weakref
from typing import TYPE_CHECKING

import torch
from torch import nn

from rarefy.errors import RarefyError
from rarefy.formats.activation import IntActivation
from rarefy.formats.llm_int8 import LLMInt8
from rarefy.kernels import library
from rarefy.kernels.bind import Int8Kernel, kernel_for
from rarefy.kernels.call import multiply
from rarefy.kernels.library import Matrix
from rarefy.kernels.mixed import MixedKernel
from rarefy.runtime.factored import Factored
from rarefy.runtime.packed import PackedLinear, PackedMatrix, RoundsInputs, TiedHead

if TYPE_CHECKING:
    from torch import Tensor

    from rarefy.runtime.anatomy import Anatomy, Block, Share
    from rarefy.runtime.prefill import KeyValues

PHASES = ("embedding", "q, k, v", "attention", "output", "gate, up", "down", "head")

_KINDS = {torch.float32: library.F32, torch.float16: library.F16, torch.bfloat16: library.BF16}
_AT, _I64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class _Linear(ctypes.Structure):
    """Mirror of ``rarefy_linear``."""

    _fields_ = (
        *(("matrix", Matrix), ("first", Matrix), ("bias", _AT), ("row", _I64), ("rows", _I64)),
        *(("input_scale", _AT), ("rounded", _I64), ("input_group", _I64)),
        ("outlier", ctypes.c_double),
    )


class _Block(ctypes.Structure):
    """Mirror of ``rarefy_block``."""

    _fields_ = (
        *((name, _Linear) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((name, _AT) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, _AT) for name in ("keys", "values")),
        ("window", _I64),
    )


class _Network(ctypes.Structure):
    """Mirror of ``rarefy_network``."""

    _fields_ = (
        *((name, _I64) for name in ("blocks", "hidden", "head_dim", "rotary", "capacity")),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("half_cache", ctypes.c_int32),
        ("block", ctypes.POINTER(_Block)),
        ("embedding", Matrix),
        ("head", _Linear),
        *((name, _AT) for name in ("final_norm", "cosine", "sine")),
    )


class NativeStep:
    """Feeds one token at a time.

    Args:
        anatomy: the decoder; its tensors stay where they are, except that dense weights whose
            values a 16-bit type holds exactly are held in that type.
        cache: receives keys and values.

    Attributes:
        logits: float32 [vocabulary], of the last step.
        weight_bytes: of all matrices that a token is multiplied by.

    Raises:
        RarefyError: there are no kernels, or none for one of the matrices.
    """

    def __init__(self, anatomy: Anatomy, cache: KeyValues) -> None:
        if not library.available():
            raise RarefyError(f"there are no compiled kernels: {library.reason()}")
        functions = library.library()
        functions.rarefy_decoder_new.restype = _AT
        functions.rarefy_decoder_new.argtypes = (ctypes.POINTER(_Network),)
        functions.rarefy_decoder_free.restype = None
        functions.rarefy_decoder_free.argtypes = (_AT,)
        functions.rarefy_decoder_step.restype = _INT
        functions.rarefy_decoder_step.argtypes = (_AT, _I64, _I64, _AT, _INT)
        functions.rarefy_decoder_profile.restype = None
        functions.rarefy_decoder_profile.argtypes = (_AT, _INT, _AT)
        self._functions = functions
        self._kept = _Kept()
        network = _network(anatomy, cache, self._kept)
        self._embedding = network.embedding
        self._handle = functions.rarefy_decoder_new(ctypes.byref(network))
        if not self._handle:
            raise RarefyError("there is no compiled kernel for one of the model's matrices")
        weakref.finalize(self, functions.rarefy_decoder_free, self._handle)
        self.weight_bytes = self._kept.weight_bytes
        self.logits = torch.empty(anatomy.head.rows)

    def step(self, token: int, position: int) -> None:
        """Feed a token; keys and values of all earlier positions are in the cache.

        Raises:
            RarefyError: the token is none of the vocabulary, or the position beyond the cache.
        """
        threads = torch.get_num_threads()
        out = self.logits.data_ptr()
        if self._functions.rarefy_decoder_step(self._handle, token, position, out, threads):
            raise RarefyError(f"token {token} at position {position} is outside the model's range")

    def product(self, linear: nn.Module, x: Tensor) -> Tensor:
        """``W x + b`` for rows x float32 [T, n], giving [T, m].

        Args:
            linear: one of the decoder's. x: on the CPU.
        """
        if isinstance(linear, Factored):
            y = self.product(linear.second, self.product(linear.first, x))
        elif isinstance(linear, PackedLinear) and (kernel := int8_kernel(linear)) is not None:
            y = kernel.direct(x, linear.tensors(), linear.input_scale)
        else:
            y = multiply(self._kept.matrices[id(linear)], x)
        bias = getattr(linear, "bias", None)
        return y if bias is None else y.add_(bias)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the embedding, float32 [T, hidden] for ids [T].

        Raises:
            RarefyError: an id is none of the vocabulary.
        """
        found = torch.empty(len(ids), self._embedding.columns)
        call, at = self._functions.rarefy_decode, ctypes.byref(self._embedding)
        for token, row in zip(ids.tolist(), found, strict=True):
            if call(at, token, token + 1, row.data_ptr(), 1):
                raise RarefyError(f"token {token} is outside the model's vocabulary")
        return found

    def profile(self) -> dict[str, float]:
        """Share of the time by phase since the last call; zeros at the first, which starts it."""
        seconds = (ctypes.c_double * len(PHASES))()
        self._functions.rarefy_decoder_profile(self._handle, 1, seconds)
        total = sum(seconds) or 1.0
        return {name: spent / total for name, spent in zip(PHASES, seconds, strict=True)}


class _Kept:
    """Tensors that C code points to, each held once.

    Attributes:
        weight_bytes: of the matrices that :meth:`linear` described.
        matrices: id of a module -> its matrix.
    """

    def __init__(self) -> None:
        self.weight_bytes = 0
        self.matrices: dict[int, Matrix] = {}
        self._tensors: dict[int, Tensor] = {}
        self._counted: set[int] = set()
        self._narrowed: dict[int, Tensor] = {}
        self._described: list[object] = []

    def vector(self, tensor: Tensor | None) -> int | None:
        """Address of a contiguous float32 copy, or of nothing."""
        return None if tensor is None else self._held(tensor.detach().float().contiguous())

    def room(self, tensor: Tensor) -> int:
        """Address of a tensor that is written to."""
        return self._held(tensor)

    def linear(self, share: Share) -> _Linear:
        """Describe some rows of a linear."""
        module = share.linear
        last, first = module, None
        if isinstance(module, Factored):
            last, first = module.second, module.first
        for one in (last, first):
            if _rounds(one) and (first is not None or int8_kernel(one) is None):
                raise RarefyError("the native decoder does not round the inputs of such a matrix")
        found = _Linear(
            self._counting(last), bias=self.vector(share.bias), row=share.row, rows=share.rows,
            rounded=_rounds(last),
        )  # fmt: skip
        if isinstance(last, RoundsInputs) and last.rounding is not None:
            found.input_scale = self.vector(last.input_scale)
            if isinstance(last.rounding, LLMInt8):
                found.outlier = last.rounding.threshold
            if isinstance(last.rounding, IntActivation) and last.rounding.per == "group":
                found.input_group = last.rounding.group
        if first is not None:
            found.first = self._counting(first)
        return found

    def matrix(self, module: nn.Module) -> Matrix:
        """Describe a linear's or an embedding's whole matrix."""
        known = self.matrices.get(id(module))
        if known is None:
            known = self.matrices[id(module)] = self._describe(module)
        return known

    def _describe(self, module: nn.Module) -> Matrix:
        holder = _holder(module)
        if isinstance(holder, PackedMatrix):
            return self._packed(holder)
        weight = getattr(holder, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dtype not in _KINDS:
            raise RarefyError(f"the native decoder cannot run a {type(module).__name__}")
        held = self._narrow(weight.detach())
        rows, columns = held.shape
        return Matrix(kind=_KINDS[held.dtype], rows=rows, columns=columns, codes=self._held(held))

    def _counting(self, module: nn.Module) -> Matrix:
        """Describe a matrix that every token is multiplied by."""
        found = self.matrix(module)
        if found.codes not in self._counted:
            self._counted.add(found.codes)
            holder = _holder(module)
            held = [self._tensors[found.codes]]
            if isinstance(holder, PackedMatrix):
                held = list(holder.tensors().values())
            self.weight_bytes += sum(tensor.nbytes for tensor in held)
        return found

    def _packed(self, holder: PackedMatrix) -> Matrix:
        fmt, columns = holder.fmt, holder.shape[1]
        tensors = holder.tensors()
        for tensor in tensors.values():
            self._held(tensor)
        kernel = kernel_for(fmt)
        if kernel is None or not hasattr(kernel, "matrix"):
            raise RarefyError(f"the native decoder has no kernel for {fmt.label()}")
        found: Matrix = kernel.matrix(tensors, columns)
        self._described += [kernel, found]  # it borrows from both
        return found

    def _narrow(self, weight: Tensor) -> Tensor:
        """The weight in a 16-bit type if that holds it exactly; each tensor is converted once."""
        known = self._narrowed.get(weight.data_ptr())
        if known is not None:
            return known
        found = weight
        if weight.dtype == torch.float32:
            for dtype in (torch.float16, torch.bfloat16):
                small = weight.to(dtype)
                if torch.equal(small.float(), weight):
                    found = small
                    break
        self._narrowed[weight.data_ptr()] = found
        return found

    def _held(self, tensor: Tensor) -> int:
        """Address of a tensor's data, which then outlives the decoder."""
        if tensor.device.type != "cpu":
            raise RarefyError("the native decoder runs on the CPU; move the model there")
        tensor = tensor.contiguous()
        self._tensors.setdefault(tensor.data_ptr(), tensor)
        return tensor.data_ptr()


def int8_kernel(module: nn.Module | None) -> Int8Kernel | MixedKernel | None:
    """The product of a linear whose inputs become int8 codes, whatever their number."""
    kernel = module.rounding_kernel if isinstance(module, RoundsInputs) else None
    if isinstance(kernel, MixedKernel):
        return kernel if kernel.fmt.bits == 8 else None
    return kernel if isinstance(kernel, Int8Kernel) else None


def _rounds(module: nn.Module | None) -> bool:
    """Whether a linear rounds its inputs."""
    return isinstance(module, RoundsInputs) and module.rounding is not None


def _holder(module: nn.Module) -> nn.Module:
    """The module that has the matrix."""
    return module.embedding[0] if isinstance(module, TiedHead) else module


def _network(anatomy: Anatomy, cache: KeyValues, kept: _Kept) -> _Network:
    """Describe everything."""
    count = len(anatomy.blocks)
    blocks = (_Block * count)(
        *(
            _block(block, keys, values, kept)
            for block, keys, values in zip(anatomy.blocks, cache.keys, cache.values, strict=True)
        )
    )
    return _Network(
        blocks=count,
        hidden=anatomy.final_norm.numel(),
        head_dim=anatomy.head_dim,
        rotary=2 * cache.cosine.shape[1],
        capacity=cache.capacity,
        epsilon=anatomy.epsilon,
        scale=anatomy.scale,
        half_cache=cache.keys[0].dtype == torch.float16,
        block=blocks,
        embedding=kept.matrix(anatomy.embedding),
        head=kept.linear(anatomy.head),
        final_norm=kept.vector(anatomy.final_norm),
        cosine=kept.vector(cache.cosine),
        sine=kept.vector(cache.sine),
    )


def _block(block: Block, keys: Tensor, values: Tensor, kept: _Kept) -> _Block:
    return _Block(
        *(kept.linear(share) for share in block.shares),
        kept.vector(block.attention_norm),
        kept.vector(block.mlp_norm),
        kept.vector(block.query_norm),
        kept.vector(block.key_norm),
        kept.room(keys),
        kept.room(values),
        block.window,
    )
