"""GGUF files, as llama.cpp writes them: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

Constants come from the `gguf` library. Its reader trusts the file and takes seconds for a large vocabulary, so the
structure is read here, every count and offset checked against the file's size. Tensors stay memory-mapped.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType, Keys, dequantize
from torch import Tensor

from fastlm.checkpoints.errors import CheckpointError
from fastlm.checkpoints.weights import Checkpoint, Weight, expect_match, install, skeleton, translate
from fastlm.kernels.cpu.memory import in_huge_pages
from fastlm.models import GPTConfig, LlamaConfig, ModelConfig
from fastlm.ops.quantized import QuantizedTensor
from fastlm.reference.quantized import KINDS

__all__ = ["GGUFFile", "GGUFTensor", "load_gguf"]

_DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SCALARS: dict[int, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}
# No vocabulary comes near; a damaged count must not make a list that fills the memory.
_LONGEST_ARRAY = 1 << 23
_LONGEST_NAME = 1 << 16
_LARGEST_SIZE = 1 << 31


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: its shape in torch's order of dimensions, and its bytes from the start of the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GGUFFile:
    """A GGUF file's metadata as Python values, and its tensors, memory-mapped.

    Raises:
        CheckpointError: the file can't be opened, is no GGUF of version 2 or 3, is damaged or incomplete.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                # Copy-on-write: pages are shared with other processes, yet a parameter over them may be trained.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(self.path, f"can't be read: {error}") from error
        self._at = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        self._read_header()

    def _read_header(self) -> None:
        if self._map[:4] != b"GGUF":
            raise CheckpointError(self.path, f"is no GGUF file: it begins with {self._map[:4]!r}")
        self._at = 4
        (version,) = self._numbers("<I", "the version")
        if version not in (2, 3):
            hint = " (a big-endian file?)" if version and version & 0xFFFF == 0 else ""
            raise CheckpointError(self.path, f"GGUF version is {version}, expected 2 or 3{hint}")
        tensor_count, key_count = self._numbers("<QQ", "the counts")
        for index in range(key_count):
            key = self._string(f"the name of key {index} of {key_count}", _LONGEST_NAME)
            if key in self.metadata:
                raise CheckpointError(self.path, f"key {key!r} occurs twice")
            (kind,) = self._numbers("<I", f"key {key!r}")
            self.metadata[key] = self._value(kind, f"key {key!r}")
        infos = [self._tensor_info(index, tensor_count) for index in range(self._plausible(tensor_count))]
        alignment = self.metadata.get(Keys.General.ALIGNMENT, GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(self.path, f"general.alignment is {alignment!r}, expected a power of two")
        start = -(-self._at // alignment) * alignment
        for info in infos:
            self._add_tensor(start, alignment, *info)

    def _plausible(self, tensor_count: int) -> int:
        smallest = struct.calcsize("<QIIQ")
        if tensor_count > (len(self._map) - self._at) // smallest:
            raise CheckpointError(self.path, f"claims {tensor_count} tensors, more than its size can describe")
        return tensor_count

    def _tensor_info(self, index: int, count: int) -> tuple[str, list[int], int, int]:
        name = self._string(f"the name of tensor {index} of {count}", _LONGEST_NAME)
        (dimensions,) = self._numbers("<I", f"tensor {name!r}")
        if not 1 <= dimensions <= 4:
            raise CheckpointError(self.path, f"tensor {name!r} has {dimensions} dimensions, expected 1 to 4")
        shape = list(self._numbers(f"<{dimensions}Q", f"tensor {name!r}"))[::-1]
        kind, offset = self._numbers("<IQ", f"tensor {name!r}")
        return name, shape, kind, offset

    def _add_tensor(self, start: int, alignment: int, name: str, shape: list[int], code: int, offset: int) -> None:
        where = f"tensor {name!r}"
        if name in self.tensors:
            raise CheckpointError(self.path, f"{where} occurs twice")
        try:
            kind = GGMLQuantizationType(code)
        except ValueError:
            raise CheckpointError(self.path, f"{where} has the unknown quantisation type {code}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if min(shape) < 1 or shape[-1] % block:
            raise CheckpointError(
                self.path, f"{where} is {shape}, expected rows of whole {kind.name} blocks of {block}"
            )
        nbytes = math.prod(shape) // block * block_bytes
        if offset % alignment or start + offset + nbytes > len(self._map):
            raise CheckpointError(
                self.path,
                f"{where} ({kind.name} {shape}) takes bytes {start + offset} to {start + offset + nbytes}, "
                f"expected them aligned to {alignment} and within the file's {len(self._map)}",
            )
        self.tensors[name] = GGUFTensor(name, kind.name, tuple(shape), start + offset, nbytes)

    def _take(self, count: int, what: str) -> int:
        """Moves on by `count` bytes and returns where they begin."""
        begin = self._at
        if begin + count > len(self._map):
            raise CheckpointError(self.path, f"ends at byte {len(self._map)}, within {what}")
        self._at = begin + count
        return begin

    def _numbers(self, layout: str, what: str) -> tuple[int, ...]:
        return struct.unpack_from(layout, self._map, self._take(struct.calcsize(layout), what))

    def _string(self, what: str, longest: int | None = None) -> str:
        (length,) = self._numbers("<Q", what)
        if longest is not None and length > longest:
            raise CheckpointError(self.path, f"{what} is {length} bytes long, expected at most {longest}")
        begin = self._take(length, what)
        try:
            return self._map[begin : begin + length].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(self.path, f"{what} is not UTF-8: {error}") from None

    def _value(self, code: int, what: str, depth: int = 0) -> Any:
        try:
            kind = GGUFValueType(code)
        except ValueError:
            raise CheckpointError(self.path, f"{what} has the unknown type {code}") from None
        if kind == GGUFValueType.STRING:
            return self._string(what)
        if kind != GGUFValueType.ARRAY:
            return self._scalars(kind, 1, what)[0]
        element, count = self._numbers("<IQ", what)
        if count > _LONGEST_ARRAY or depth > 1:
            raise CheckpointError(self.path, f"{what} is an array of {count} elements at depth {depth}: not plausible")
        if element in _SCALARS:
            return self._scalars(GGUFValueType(element), count, what)
        return [self._value(element, what, depth + 1) for _ in range(count)]

    def _scalars(self, kind: GGUFValueType, count: int, what: str) -> list[Any]:
        dtype = _SCALARS[kind]
        begin = self._take(count * dtype.itemsize, what)
        values: list[Any] = np.frombuffer(self._map, dtype, count, begin).tolist()
        return values

    def tensor(self, name: str, *, expand: bool = False) -> Weight:
        """A tensor over the file's memory: dense for F32, F16 and BF16, a QuantizedTensor for the other kinds with
        kernels, and, where `expand`, float32 of its own memory for any other kind.

        Raises:
            CheckpointError: the kind has no kernel here, and `expand` is False.
        """
        info = self.tensors[name]
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=info.nbytes, offset=info.offset)
        if info.kind in _DENSE:
            dtype = _DENSE[info.kind]
            aligned = raw if info.offset % dtype.itemsize == 0 else raw.clone()
            return aligned.view(dtype).view(info.shape)
        if info.kind in KINDS and len(info.shape) == 2:
            shape = info.shape[0], info.shape[1]
            return QuantizedTensor(raw.view(info.shape[0], -1), info.kind, shape, release=partial(self.release, name))
        if expand:
            blocks = raw.numpy().reshape(*info.shape[:-1], -1)
            return torch.from_numpy(dequantize(blocks, GGMLQuantizationType[info.kind]))
        raise CheckpointError(
            self.path,
            f"tensor {name!r} is {info.kind} {list(info.shape)}; kernels exist for matrices of {', '.join(KINDS)}. "
            "Loading with dtype=torch.float32 expands it.",
        )

    def release(self, name: str) -> None:
        """Gives a tensor's memory back. Who reads it again gets it from the file; what was written to it is lost."""
        info = self.tensors[name]
        first, last = -(-info.offset // mmap.PAGESIZE), (info.offset + info.nbytes) // mmap.PAGESIZE
        if first < last and hasattr(mmap, "MADV_DONTNEED"):
            with contextlib.suppress(OSError):  # locked memory stays
                self._map.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)

    def resident(self, name: str) -> Weight:
        """`tensor` for products on this CPU: floats as a copy in huge pages, whose place in the file is released."""
        weight = self.tensor(name)
        if isinstance(weight, Tensor):
            weight = in_huge_pages(weight)
            self.release(name)
        return weight

    def size(self, key: str, default: int | None = None) -> int:
        """The positive integer at `key`. CheckpointError: it is missing without a default, or something else."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < _LARGEST_SIZE:
            raise CheckpointError(self.path, f"key {key!r} is {_shown(value)}, expected a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The positive finite number at `key`. CheckpointError: it is missing without a default, or something else."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise CheckpointError(self.path, f"key {key!r} is {_shown(value)}, expected a positive number")
        return value


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)[:80]


_COMMON = {
    "embedding": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "layers.N.attention_norm": "blk.N.attn_norm",
    "layers.N.attention.output": "blk.N.attn_output",
    "layers.N.mlp_norm": "blk.N.ffn_norm",
    "layers.N.mlp.up": "blk.N.ffn_up",
    "layers.N.mlp.down": "blk.N.ffn_down",
}
_GPT = {**_COMMON, "positions": "position_embd", "layers.N.attention.qkv": "blk.N.attn_qkv"}
_LLAMA = {
    **_COMMON,
    "layers.N.attention.query": "blk.N.attn_q",
    "layers.N.attention.key": "blk.N.attn_k",
    "layers.N.attention.value": "blk.N.attn_v",
    "layers.N.mlp.gate": "blk.N.ffn_gate",
}
_ROPE_FREQS = "rope_freqs.weight"
_ARCHITECTURES = {"gpt2": _GPT, "llama": _LLAMA, "qwen2": _LLAMA}


def _gpt_config(file: GGUFFile, vocab_size: int, hidden_size: int) -> GPTConfig:
    return GPTConfig(
        vocab_size=vocab_size,
        context_length=file.size("gpt2.context_length"),
        num_layers=file.size("gpt2.block_count"),
        num_heads=file.size("gpt2.attention.head_count"),
        hidden_size=hidden_size,
        intermediate_size=file.size("gpt2.feed_forward_length", 4 * hidden_size),
        tie_embeddings="output.weight" not in file.tensors,
        layer_norm_eps=file.number("gpt2.attention.layer_norm_epsilon"),
    )


def _llama_config(file: GGUFFile, vocab_size: int, hidden_size: int) -> LlamaConfig:
    arch = file.metadata[Keys.General.ARCHITECTURE]
    num_heads = file.size(f"{arch}.attention.head_count")
    head_dim = file.size(f"{arch}.attention.key_length", max(1, hidden_size // num_heads))
    if file.size(f"{arch}.attention.value_length", head_dim) != head_dim:
        raise CheckpointError(file.path, "keys and values have heads of different sizes, which no model here has")
    if file.metadata.get(f"{arch}.expert_count"):
        raise CheckpointError(file.path, "is a mixture of experts, which no model here is")
    scaling: dict[str, Any] | None = None
    kind = file.metadata.get(f"{arch}.rope.scaling.type", "none")
    if kind == "linear":
        scaling = {"rope_type": "linear", "factor": file.number(f"{arch}.rope.scaling.factor")}
    elif kind != "none":
        raise CheckpointError(file.path, f"{arch}.rope.scaling.type is {_shown(kind)}, expected none or linear")
    if _ROPE_FREQS in file.tensors:
        divisors = file.tensor(_ROPE_FREQS)
        if not isinstance(divisors, Tensor) or divisors.dim() != 1 or not bool((divisors > 0).all()):
            raise CheckpointError(file.path, f"tensor {_ROPE_FREQS!r}: expected one positive number per frequency")
        scaling = {"rope_type": "divisors", "divisors": divisors.float().tolist()}
    return LlamaConfig(
        vocab_size=vocab_size,
        context_length=file.size(f"{arch}.context_length"),
        num_layers=file.size(f"{arch}.block_count"),
        num_heads=num_heads,
        num_kv_heads=file.size(f"{arch}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        hidden_size=hidden_size,
        intermediate_size=file.size(f"{arch}.feed_forward_length"),
        rope_theta=file.number(f"{arch}.rope.freq_base", 10000.0),
        rope_dim=file.size(f"{arch}.rope.dimension_count", head_dim),
        rope_scaling=scaling,
        # llama.cpp's converter reorders the rows of Llama's query and key so that adjacent pairs rotate; not Qwen2's.
        rope_interleaved=arch == "llama",
        rms_norm_eps=file.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        tie_embeddings="output.weight" not in file.tensors,
        window=file.size(f"{arch}.attention.sliding_window")
        if f"{arch}.attention.sliding_window" in file.metadata
        else None,
    )


def _config(file: GGUFFile) -> ModelConfig:
    arch = file.metadata.get(Keys.General.ARCHITECTURE)
    if not isinstance(arch, str) or arch not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise CheckpointError(file.path, f"general.architecture is {_shown(arch)}, expected one of {known}")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(file.path, "lacks a matrix 'token_embd.weight'")
    vocab_size, hidden_size = embedding.shape
    if file.size(f"{arch}.embedding_length") != hidden_size:
        stated = file.size(f"{arch}.embedding_length")
        raise CheckpointError(
            file.path, f"{arch}.embedding_length is {stated}, but 'token_embd.weight' is {list(embedding.shape)}"
        )
    layers = file.size(f"{arch}.block_count")
    if f"blk.{layers - 1}.attn_norm.weight" not in file.tensors:
        raise CheckpointError(file.path, f"{arch}.block_count is {layers}, but layer {layers - 1} has no tensors")
    return (_gpt_config if arch == "gpt2" else _llama_config)(file, vocab_size, hidden_size)


def load_gguf(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    compute: str = "fast",
) -> Checkpoint:
    """Loads a GGUF file of the llama, qwen2 or gpt2 architecture, with its tokenizer and chat template.

    Args:
        path: the file.
        dtype: None keeps weights as they are stored, the Q kinds memory-mapped, and frozen; else trainable parameters
            of it.
        device: where to put the weights; None: the CPU.
        compute: "fast" or "exact", as in `fastlm.ops.linear`.

    Raises:
        CheckpointError: the file is damaged, or holds a model or a kind of tensor that is not supported.
    """
    from fastlm.data.tokenizer import Tokenizer

    file = GGUFFile(path)
    config = _config(file)
    model = skeleton(file.path, lambda: config)
    names = {
        name: translate(name, _ARCHITECTURES[file.metadata[Keys.General.ARCHITECTURE]]) for name in model.state_dict()
    }
    expected = {names[name]: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ignored = {_ROPE_FREQS} | {name for name in file.tensors if name.endswith("attn_rot_embd.weight")}
    expect_match(file.path, expected, {n: t.shape for n, t in file.tensors.items() if n not in ignored})
    if dtype is None and torch.device(device or "cpu").type == "cpu":
        weights = {ours: file.resident(theirs) for ours, theirs in names.items()}
    else:
        weights = {ours: file.tensor(theirs, expand=dtype is not None) for ours, theirs in names.items()}
    model = install(model, weights, dtype=dtype, device=device, compute=compute)
    tokenizer = None
    if file.metadata.get(Keys.Tokenizer.MODEL, "none") not in ("none", "no_vocab"):
        try:
            tokenizer = Tokenizer.from_gguf(file.metadata)
        except ValueError as error:
            raise CheckpointError(file.path, f"tokenizer: {error}") from error
        if tokenizer.vocab_size > config.vocab_size:
            raise CheckpointError(
                file.path, f"tokenizer has {tokenizer.vocab_size} tokens, but the model only {config.vocab_size}"
            )
    # The vocabulary lives on in the tokenizer; here it would take tens of megabytes.
    metadata = {key: value for key, value in file.metadata.items() if not isinstance(value, list) or len(value) < 1000}
    return Checkpoint(model, tokenizer, metadata)
