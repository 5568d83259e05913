"""The configurations that attention to a key-value cache launches by default, for compiling them ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

from fastlm.kernels.triton.attention_decode import CHUNK, combine_chunks, decode_chunk, tile
from fastlm.kernels.triton.shipped import TARGETS, Shipped, Work

__all__ = ["shipped"]

_WORD = {"fp32": 4, "bf16": 2, "fp16": 2}


def shipped() -> Iterator[Shipped]:
    """What `attention_decode` and `attention_paged` launch for the usual heads, one new token and a group of 4."""
    for dtype, dim in (("bf16", 64), ("bf16", 80), ("bf16", 128), ("fp16", 128), ("bf16", 256), ("fp32", 64)):
        yield _shipped(dtype, dim, "own", "", chunk=0)
        yield _shipped(dtype, dim, "rows", "")
    for dim in (64, 128):
        yield _shipped("bf16", dim, "pages", "")
        for cache in ("rows", "pages"):
            yield _shipped("bf16", dim, cache, "native", targets=("sm_90", "sm_100"))
            yield _shipped("bf16", dim, cache, "bits", targets=("sm_80", "sm_86", "gfx942"))
            yield _shipped("bf16", dim, cache, "int8")
        yield _shipped("bf16", dim, "rows", "", tokens=16, options=True)
    yield _shipped("fp16", 128, "rows", "int8")
    yield _shipped("fp32", 64, "rows", "int8")
    yield _shipped("bf16", 256, "pages", "int8", tokens=16, options=True)
    yield _shipped("fp32", 256, "rows", "", tokens=16, options=True)
    for dtype, dim, chunks in (("bf16", 64, 8), ("bf16", 128, 64), ("fp32", 256, 64)):
        yield Shipped(
            name=f"attention_decode combine {dtype} d{dim} chunks{chunks}",
            kernel=combine_chunks,
            signature={
                **dict.fromkeys(("partial", "largest", "total"), "*fp32"),
                "output": f"*{dtype}",
                "lengths": "*i64",
                **dict.fromkeys(("window", "tokens", "capacity", "chunks"), "i32"),
            },
            constants={
                "HEADS": 32,
                "DIM": dim,
                "BLOCK_D": min(dim, 64),
                "CHUNK": CHUNK,
                "CHUNKS": chunks,
                "WINDOW": False,
            },
            num_warps=4,
            num_stages=2,
            divisible_by_16=("partial", "largest", "total", "output", "lengths"),
            work=Work(exponentials=chunks, bytes=4 * chunks * (min(dim, 64) + 2)),
        )


def _shipped(
    dtype: str,
    dim: int,
    cache: str,
    codes: str,
    chunk: int = CHUNK,
    tokens: int = 1,
    options: bool = False,
    targets: tuple[str, ...] = TARGETS,
) -> Shipped:
    group = 4
    size = _WORD[dtype]
    sizes = tile(tokens * group, dim, size, codes)
    warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
    stored = {"": f"*{dtype}", "native": "*fp8e4nv", "bits": "*u8", "int8": "*i8"}[codes]
    pointers = {
        "query": f"*{dtype}",
        "keys": stored,
        "values": stored,
        "output": "*fp32" if chunk else f"*{dtype}",
        "largest": "*fp32" if chunk else None,
        "total": "*fp32" if chunk else None,
        "lengths": "*i64",
        "index": None if cache == "own" else "*i64",
        "slopes": "*fp32" if options else None,
        "key_scale": "*fp32" if codes else None,
        "value_scale": "*fp32" if codes else None,
    }
    signature = {name: kind for name, kind in pointers.items() if kind is not None}
    # Triton takes an integer of 1 for a constant: the usual one new token, and rows that lie one after the other.
    ones = [name for name, one in (("tokens", tokens == 1), ("stride_ib", cache == "rows")) if one]
    strides = [f"stride_{t}" for t in ("qb", "qh", "qt", "kr", "kh", "ks", "vr", "vh", "vs", "ib", "slopes")]
    m, n = sizes["BLOCK_M"], sizes["BLOCK_N"]
    return Shipped(
        name=f"attention_decode {dtype} d{dim} {cache}"
        + {"": "", "int8": " int8"}.get(codes, f" float8 {codes}")
        + (" split" if chunk else "")
        + (f" t{tokens} window softcap alibi" if options else ""),
        kernel=decode_chunk,
        signature={
            **signature,
            "factor": "fp32",
            "softcap": "fp32",
            **dict.fromkeys((name for name in ("window", "tokens", "capacity", *strides) if name not in ones), "i32"),
        },
        constants={
            **dict.fromkeys(ones, 1),
            **{name: None for name, kind in pointers.items() if kind is None},
            **sizes,
            "KV_HEADS": 8,
            "GROUP": group,
            "DIM": dim,
            "CHUNK": chunk,
            "CACHE": cache,
            "PAGE": 16 if cache == "pages" else 0,
            "CODES": codes,
            "WINDOW": options,
            "SOFTCAP": options,
            "ALIBI": options,
        },
        num_warps=warps,
        num_stages=stages,
        targets=targets,
        divisible_by_16=(*signature, "capacity", *strides[: 3 if codes == "int8" else -2]),
        work=Work(
            tensor_flops=4 * m * n * sizes["PADDED"],
            exponentials=m * n + m,
            bytes=2 * n * dim * (1 if codes else size),
            streamed=True,
        ),
    )
