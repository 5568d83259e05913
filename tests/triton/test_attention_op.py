"""The Triton attention behind the public functions: gradients, dropout, the same bits, and what it leaves to others."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from torch import Tensor
from triton_attention import Case, build, compare

from fastlm import ops
from fastlm.kernels.triton import attention as attention_kernels
from fastlm.kernels.triton import attention_config
from fastlm.kernels.triton.attention_config import Config


def _inputs(device: str, queries: int = 37, keys: int = 51, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [
        torch.randn(2, heads, length, 16, device=device).to(dtype)
        for heads, length in ((4, queries), (2, keys), (2, keys))
    ]


def test_every_door_leads_to_the_kernel(device: str) -> None:
    """attention, attention_lse and attention_varlen, with gradients, against themselves by the reference."""
    tensors, sinks = _inputs(device), torch.randn(4, device=device)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)

    def doors(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> list[Tensor]:
        options: dict[str, Any] = {"causal": True, "window": 30, "sinks": sinks}
        together = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
        return [
            ops.attention(query, key, value, **options),
            *ops.attention_lse(query, key, value, **options),
            ops.attention_varlen(*together, starts * 37, starts * 51, **options),
        ]

    found = []
    for backend in ("triton", "reference"):
        leaves = [t.detach().requires_grad_() for t in (*tensors, sinks)]
        with ops.backend(backend):
            outputs = doors(*leaves)
        torch.manual_seed(3)
        upstream = [torch.randn(o.shape, device=device) for o in outputs]
        found.append([*outputs, *torch.autograd.grad(outputs, leaves, upstream)])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)


def test_dropout_depends_on_the_seed_and_the_place_alone(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tiles, other heads together: the same weights are dropped. Zero scores make each kept weight the same."""
    p, keys = 0.25, 64
    query, key = torch.zeros(2, 4, 50, 16, device=device), torch.randn(2, 2, keys, 16, device=device)
    value = torch.eye(keys, device=device).expand(2, 2, keys, keys)  # so that the output is the weights

    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with ops.backend("triton"):
            return ops.attention(query, key, value, dropout_p=p)

    found = weights(1)
    assert torch.equal(weights(1), found)
    assert not torch.equal(weights(2), found)
    kept = found != 0
    torch.testing.assert_close(found[kept], torch.full_like(found[kept], 1 / keys / (1 - p)))
    count = found.numel()
    assert abs(kept.sum().item() - count * (1 - p)) < 5 * (count * p * (1 - p)) ** 0.5
    for heads in (kept[:, 0], kept[:, 1], kept[0].movedim(0, 1)), (kept[0], kept[1]):
        assert not torch.equal(heads[0], heads[1])
    if device == "cpu":
        monkeypatch.setattr(attention_config, "_INTERPRETED", Config(128, 32, 4, 1))  # packs the heads of a group
        monkeypatch.setattr(attention_config, "_chosen", {})
        assert torch.equal(weights(1) != 0, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_every_time_and_in_any_batch(device: str, dtype: torch.dtype) -> None:
    tensors = [t.requires_grad_() for t in _inputs(device, 40, 40, dtype)]
    upstream = torch.randn(2, 4, 40, 16, device=device).to(dtype)

    def run(rows: slice) -> list[Tensor]:
        leaves = [t[rows].detach().requires_grad_() for t in tensors]
        with ops.backend("triton"):
            output = ops.attention(*leaves, causal=True)
        return [output, *torch.autograd.grad(output, leaves, upstream[rows])]

    both = run(slice(0, 2))
    assert all(torch.equal(a, b) for a, b in zip(run(slice(0, 2)), both, strict=True))
    for b in range(2):
        assert all(torch.equal(a, c[b : b + 1]) for a, c in zip(run(slice(b, b + 1)), both, strict=True))


def test_rows_that_see_nothing(device: str) -> None:
    query, key, value = (t.requires_grad_() for t in _inputs(device, 20, 20))
    mask = torch.rand(20, 20, device=device) < 0.5
    mask[3] = mask[17] = False
    with ops.backend("triton"):
        output, lse = ops.attention_lse(query, key, value, mask=mask)
    assert (output[:, :, [3, 17]] == 0).all() and (lse[:, :, [3, 17]] == -torch.inf).all()
    gradients = torch.autograd.grad(output.sum(), (query, key, value))
    assert all(g.isfinite().all() for g in gradients) and (gradients[0][:, :, [3, 17]] == 0).all()


def test_large_scores_neither_overflow_nor_vanish(device: str) -> None:
    case = build(device, batch=1, causal=True)
    compare(Case([case.tensors[0] * 100, *case.tensors[1:]], case.options, case.upstream))


def test_refusals(device: str) -> None:
    query, key, value = _inputs(device, 3, 3)

    def refused(match: str, *tensors: Tensor, **options: Any) -> None:
        with ops.backend("triton"), pytest.raises(NotImplementedError, match=match):
            ops.attention(*tensors, **options)

    refused("float64: the kernel takes float32, float16 and bfloat16", *(t.double() for t in (query, key, value)))
    refused("more than 256 features", *(t.repeat(1, 1, 1, 17) for t in (query, key, value)))
    wide = [t.repeat(1, 1, 1, 9).requires_grad_() for t in (query, key, value)]
    refused("float32 gradients of more than 128 features", *wide)
    refused("scale is -1.0", query, key, value, scale=-1.0)
    refused("empty", query[:0], key[:0], value[:0])
    refused("gradient of the mask", query, key, value, mask=torch.randn(3, 3, device=device, requires_grad=True))
    if device == "cpu":
        assert ops.explain("attention", query, key, value).chosen == "cpu"  # nobody asked for the interpreter
    query.requires_grad_()
    with ops.backend("triton"):
        grad = torch.autograd.grad(ops.attention(query, key, value).sum(), query, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match=r"fastlm.backend\('reference'\)"):
        torch.autograd.grad(grad.sum(), query)


def test_tiles_shrink_until_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    monkeypatch.setattr(attention_config, "_INTERPRETED", Config(128, 64, 8, 3))
    monkeypatch.setattr(attention_config, "_chosen", {})
    tried: list[Config] = []

    def run(config: Config, room: int = 100) -> None:
        tried.append(config)
        if config.block_n * config.num_stages > room:
            raise OutOfResources(0, 0, "shared memory")

    query = torch.zeros(1)
    attention_config.run_best("forward", query, 64, "", "a mask", run)
    assert tried == [Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(128, 64, 8, 1)]
    attention_config.run_best("forward", query, 64, "", "a mask", run)
    assert tried[3:] == [Config(128, 64, 8, 1)]  # remembered
    attention_config.run_best("forward", query, 64, "", "another", lambda config: run(config, 20))
    assert tried[-1] == Config(32, 16, 8, 1)
    with pytest.raises(RuntimeError, match="no tiles of forward fit"):
        attention_config.run_best("forward", query, 64, "", "a third", lambda config: run(config, 0))


@pytest.mark.parametrize(
    ("options", "dtype", "burden"),
    [
        ({"causal": True, "window": 9}, torch.float32, ""),
        ({"softcap": 2.0}, torch.float32, " all"),
        ({"softcap": 2.0}, torch.bfloat16, " one"),
        ({"softcap": 2.0, "dropout_p": 0.1}, torch.float16, " all"),
        ({"mask": torch.ones(5, 5, dtype=torch.bool)}, torch.float16, " all"),
    ],
)
def test_options_take_smaller_tiles(
    device: str, options: dict[str, Any], dtype: torch.dtype, burden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, str] = {}

    def note(name: str, query: Tensor, features: int, burden: str, *rest: Any) -> None:
        asked[name] = burden
        attention_config.run_best(name, query, features, burden, *rest)

    monkeypatch.setattr(attention_kernels, "run_best", note)
    options = {name: o.to(device) if isinstance(o, Tensor) else o for name, o in options.items()}
    query, key, value = (t.requires_grad_() for t in _inputs(device, 5, 5, dtype))
    with ops.backend("triton"):
        torch.autograd.grad(ops.attention(query, key, value, **options).sum(), query)
    assert asked == dict.fromkeys(("forward", "grad_key_value", "grad_query"), burden)


def test_every_call_has_tiles() -> None:
    for target, kernel, burden in itertools.product(
        attention_config.CONFIGS, ("forward", "grad_key_value", "grad_query"), ("", " one", " all")
    ):
        for size, features in itertools.product((2, 4), (16, 64, 128, 256)):
            refused = size == 4 and (burden == " one" or (features == 256 and kernel != "forward"))
            if not refused:
                config = attention_config.tiles(target, kernel, size, features, burden)
                assert config.block_m * config.block_n <= 128 * 128
