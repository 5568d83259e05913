"""Attention on tensors: launches the kernels of attention_fwd.py and attention_bwd.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from fastlm.kernels.triton.attention_bwd import attention_delta, attention_grad_key_value, attention_grad_query
from fastlm.kernels.triton.attention_config import CONFIGS, Config, burden, run_best, tiles
from fastlm.kernels.triton.attention_fwd import attention_forward
from fastlm.kernels.triton.shipped import Shipped, Work
from fastlm.reference.attention import Options

__all__ = ["attention", "attention_backward", "shipped"]

_DELTA = Config(64, 64, 4, 1)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _precision(tensor: Tensor, features: int) -> str:
    """How float32 is multiplied: three products of TF32 are as good as one of float32 and faster, while registers hold
    the parts."""
    if tensor.dtype is not torch.float32 or torch.version.hip or features > 128:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


class _Arguments:
    """What the kernels have in common: names of their arguments and what a call gives them."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, o: Options) -> None:
        self.packing = o.packing
        query, key, value = _rows(query), _rows(key), _rows(value)
        if o.packing is None:
            self.batch, self.heads, self.queries, dim = query.shape
            kv_heads, self.keys = key.shape[1:3]
        else:
            self.batch, self.queries, self.keys = len(o.packing.starts_q) - 1, o.packing.longest_q, o.packing.longest_k
            self.heads, dim = query.shape[1:]
            kv_heads = key.shape[1]
        self.group = self.heads // kv_heads
        self.tensors: dict[str, Tensor | None] = {"Q": query, "K": key, "V": value}
        self.strides = {**self.layout("q", query), **self.layout("k", key), **self.layout("v", value)}
        mask, slopes = o.mask, o.alibi_slopes
        mask_strides: tuple[int, ...] = (0, 0, 0, 0)
        if mask is not None:
            mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
            mask_strides = mask.expand(self.batch, self.heads, self.queries, self.keys).stride()
        if slopes is not None:
            slopes = slopes.float().contiguous()
        self.features = triton.next_power_of_2(max(dim, value.shape[-1]))
        self.common = {
            "MASK": mask,
            "SLOPES": slopes,
            "SEED": o.seed,
            "STARTS_Q": None if o.packing is None else o.packing.starts_q,
            "STARTS_K": None if o.packing is None else o.packing.starts_k,
            **dict(zip(("stride_mb", "stride_mh", "stride_mi", "stride_mj"), mask_strides, strict=True)),
            "stride_sb": self.heads if slopes is not None and slopes.dim() == 2 else 0,
            "heads": self.heads,
            "queries": self.queries,
            "keys": self.keys,
            "window": o.window,
            "scale": float(o.scale),
            "softcap": o.softcap,
            "dropout_p": float(o.dropout_p),
            "GROUP": self.group,
            "CAUSAL": bool(o.causal),
            "TOP_LEFT": bool(o.top_left),
            "D": dim,
            "DV": value.shape[-1],
            "BLOCK_D": max(16, triton.next_power_of_2(dim)),
            "BLOCK_DV": max(16, triton.next_power_of_2(value.shape[-1])),
            "PRECISION": _precision(query, self.features),
        }
        self.burden = burden(
            query.element_size(), mask is not None, sum(x is not None for x in (slopes, o.seed, o.softcap))
        )
        # What, besides, decides how much memory a block needs.
        absent = (option is None for option in (slopes, o.seed, o.window, o.softcap))
        self.variant = (None if mask is None else mask.dtype, *absent, bool(o.causal), dim, value.shape[-1])

    def layout(self, name: str, tensor: Tensor) -> dict[str, int]:
        """The strides of batch, head and position under the kernels' names for them."""
        strides = tensor.stride()[:3] if self.packing is None else (0, tensor.stride(1), tensor.stride(0))
        return {f"stride_{name}{axis}": stride for axis, stride in zip("bht", strides, strict=True)}

    def per_row(self, name: str, tensor: Tensor) -> dict[str, int]:
        """The same for a number per row: [B, H, T], or [H, sum of T]."""
        batch, head = tensor.stride()[:2] if self.packing is None else (0, tensor.stride(0))
        return {f"stride_{name}b": batch, f"stride_{name}h": head}

    def like(self, tensor: Tensor, features: int) -> Tensor:
        """New memory for a result of `tensor`'s shape but for its last dimension; heads of a position lie together."""
        if self.packing is not None:
            return tensor.new_empty(*tensor.shape[:2], features)
        batch, heads, length, _ = tensor.shape
        return tensor.new_empty(batch, length, heads, features).transpose(1, 2)

    def launch(self, kernel: Any, config: Config, programs: int, **given: Any) -> None:
        """Runs a kernel with those of the arguments that it takes."""
        arguments = {**self.tensors, **self.strides, **self.common, **given}
        taken = {name: arguments[name] for name in kernel.arg_names if name in arguments}
        kernel[(programs,)](
            **taken, **config.blocks(kernel.arg_names), num_warps=config.num_warps, num_stages=config.num_stages
        )


def _on(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def attention(query: Tensor, key: Tensor, value: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp, float32: as `fastlm.reference.attention.attention_lse`.

    query [B, H, Tq, D], key [B, KVH, Tk, D], value [B, KVH, Tk, Dv], D and Dv up to 256, in float32, float16 or
    bfloat16, with any strides; results [B, H, Tq, Dv] and [B, H, Tq]. With `o.packing` [sum of Tq, H, D] and so on, and
    results [sum of Tq, H, Dv] and [H, sum of Tq]. With `o.dropout_p`, `o.seed` is int64 [1].
    """
    call = _Arguments(query, key, value, o)
    output = call.like(query, value.shape[-1])
    shape = (call.batch, call.heads, call.queries) if o.packing is None else (call.heads, query.shape[0])
    lse = query.new_empty(shape, dtype=torch.float32)
    call.tensors |= {"OUT": output, "LSE": lse, "SINKS": o.sinks}
    call.strides |= {**call.layout("o", output), **call.per_row("l", lse)}

    def run(config: Config) -> None:
        # Few queries: heads that read one key head share a block's rows, and keys and values are read once for all.
        pack = call.group > 1 and 2 * call.queries <= config.block_m
        together = call.group if pack else 1
        config = config.for_rows(call.queries * together)
        blocks = triton.cdiv(call.queries * together, config.block_m)
        call.launch(attention_forward, config, blocks * call.batch * call.heads // together, PACK=pack)

    with _on(query):
        run_best("forward", query, call.features, call.burden, call.variant, run)
    return output, lse


def attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    o: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of query, key, value and sinks; `output` and `lse` are what `attention` gave for the same options.

    The same bits every time.
    """
    call = _Arguments(query, key, value, o)
    grad_output = _rows(grad_output)
    delta = torch.empty_like(lse)
    call.tensors |= {"OUT": output, "DO": grad_output, "LSE": lse, "DELTA": delta}
    call.strides |= {**call.layout("o", output), **call.layout("g", grad_output), **call.per_row("l", lse)}
    if grad_lse is not None:
        grad_lse = _rows(grad_lse)
        call.strides |= call.per_row("e", grad_lse)
    else:
        call.strides |= {"stride_eb": 0, "stride_eh": 0}
    grad_query = call.like(query, query.shape[-1])
    grad_key, grad_value = call.like(key, key.shape[-1]), call.like(value, value.shape[-1])
    call.tensors |= {"DLSE": grad_lse, "DK": grad_key, "DVALUE": grad_value, "DQ": grad_query}
    call.strides |= {**call.layout("dk", grad_key), **call.layout("dv", grad_value), **call.layout("dq", grad_query)}
    heads = call.batch * call.heads

    def of_keys(config: Config) -> None:
        call.launch(attention_grad_key_value, config, triton.cdiv(call.keys, config.block_n) * heads // call.group)

    def of_queries(config: Config) -> None:
        call.launch(attention_grad_query, config, triton.cdiv(call.queries, config.block_m) * heads)

    # In float32 what options add leaves registers for the parts of half as many features.
    call.common["PRECISION"] = _precision(query, call.features * (2 if call.burden else 1))
    with _on(query):
        call.launch(attention_delta, _DELTA, triton.cdiv(call.queries, _DELTA.block_m) * heads)
        run_best("grad_key_value", query, call.features, call.burden, call.variant, of_keys)
        run_best("grad_query", query, call.features, call.burden, call.variant, of_queries)
    grad_sinks = None
    if o.sinks is not None:
        share = torch.exp(o.sinks.float()[:, None] - lse) * delta  # of [B,] H, T
        share = share.masked_fill(lse == -torch.inf, 0.0).sum(-1)
        grad_sinks = -(share if o.packing is not None else share.sum(0)).to(o.sinks.dtype)
    return grad_query, grad_key, grad_value, grad_sinks


def shipped() -> Iterator[Shipped]:
    """The defaults of every architecture for heads of 64, 128 and 256 features, causal; with one option, and with all
    that go together, of which packed sequences have no mask."""
    sizes = (64, 128, 256)
    half = [("bf16", d, "causal") for d in sizes]
    of_forward = [
        *half,
        *(("fp32", d, "causal") for d in sizes),
        ("fp16", 64, "causal"),
        ("fp16", 128, "causal"),
        ("bf16", 128, ""),
        ("fp32", 256, "causal all"),
    ]
    of_gradients = [*half, ("fp32", 64, "causal"), ("fp32", 128, "causal")]
    of_all = [
        *(("bf16", d, "causal dropout") for d in sizes),
        *(("bf16", d, "causal all") for d in sizes),
        ("bf16", 128, "causal all packed"),
        ("fp32", 64, "causal all"),
        ("fp32", 128, "causal all"),
    ]
    for kernel, dtype, d, variant in [
        *((attention_forward, *which) for which in (*of_forward, *of_all)),
        *(
            (kernel, *which)
            for kernel in (attention_grad_key_value, attention_grad_query)
            for which in (*of_gradients, *of_all)
        ),
        (attention_delta, "bf16", 128, ""),
    ]:
        options = {name: _OPTIONS[name] for name in _VARIANTS[variant]}
        load = burden(_BYTES[dtype], "MASK" in options, len({"SLOPES", "SEED", "softcap"} & options.keys()))
        targets: dict[tuple[Config, str], list[str]] = {}
        for target in CONFIGS:
            config = tiles(target, _TABLE[kernel], _BYTES[dtype], d, load) if kernel in _TABLE else _DELTA
            features = 2 * d if load and kernel is not attention_forward else d  # see `attention_backward`
            precision = "tf32x3" if dtype == "fp32" and features <= 128 and target.startswith("sm") else "ieee"
            targets.setdefault((config, precision), []).append(target)
        for (config, precision), which in targets.items():
            yield _shipped(kernel, dtype, d, variant, config, precision, tuple(which), options)


_VARIANTS = {
    "": (),
    "causal": (),
    "causal dropout": ("SINKS", "SEED", "window"),
    "causal all": ("SINKS", "MASK", "SLOPES", "SEED", "window", "softcap"),
    "causal all packed": ("SINKS", "SLOPES", "SEED", "STARTS_Q", "STARTS_K", "window", "softcap"),
}
"""What the calls of the report have, by the name that it goes by there."""
_TABLE = {
    attention_forward: "forward",
    attention_grad_key_value: "grad_key_value",
    attention_grad_query: "grad_query",
}
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_OPTIONS = {
    "SINKS": "*fp32",
    "MASK": "*fp32",
    "SLOPES": "*fp32",
    "SEED": "*i64",
    "STARTS_Q": "*i32",
    "STARTS_K": "*i32",
    "window": "i32",
    "softcap": "fp32",
}
"""What a call may have besides, and its type."""
_FLOAT32 = ("LSE", "DELTA", "DLSE")
_PRODUCTS = {"forward": (1, 1), "grad_key_value": (2, 2), "grad_query": (2, 1)}  # over D and over Dv


def _shipped(
    kernel: Any,
    dtype: str,
    d: int,
    variant: str,
    config: Config,
    precision: str,
    targets: tuple[str, ...],
    options: Mapping[str, str],
) -> Shipped:
    absent = {*_OPTIONS, "DLSE"} - {*options}
    constants = {
        **dict.fromkeys(absent), "GROUP": 4 if options else 1, "PACK": False, "TOP_LEFT": False,
        "CAUSAL": "causal" in variant, "D": d, "DV": d, "BLOCK_D": d, "BLOCK_DV": d, "PRECISION": precision,
        **config.blocks(kernel.arg_names),
    }  # fmt: skip
    constants = {name: constant for name, constant in constants.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        if name in options:
            signature[name] = options[name]
        elif name.isupper() and name not in constants:
            signature[name] = "*fp32" if name in _FLOAT32 else f"*{dtype}"
        elif name not in constants:
            signature[name] = "i64" if name.startswith("stride") else "i32"
    signature |= {name: "fp32" for name in ("scale", "dropout_p") if name in signature}
    aligned = [name for name in signature if name.isupper() or name.startswith("stride")]
    tile, table = config.block_m * config.block_n, _TABLE.get(kernel)
    work = Work(bytes=2 * config.block_m * d * _BYTES[dtype])
    if table is not None:
        read = config.block_m if table == "grad_key_value" else config.block_n
        flops = 2.0 * tile * d * sum(_PRODUCTS[table])
        work = Work(tensor_flops=flops, exponentials=tile, bytes=2 * read * d * _BYTES[dtype])
    name = " ".join((kernel.__name__, dtype, f"d{d}", *variant.split(), *targets))
    # What decides the forward's speed; small blocks of the others may do without.
    must = ("wgmma", "tcgen05") if table == "forward" and not options and dtype != "fp32" and d <= 128 else ()
    return Shipped(
        name, kernel, signature, constants, config.num_warps, config.num_stages, targets, tuple(aligned), work, must
    )
