"""nn.LayerNorm and nn.RMSNorm in place of torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import TINY

from fastlm.nn.norm import LayerNorm, RMSNorm

PAIRS: list[tuple[Any, Any, dict[str, Any]]] = [
    (torch.nn.LayerNorm, LayerNorm, {}),
    (torch.nn.LayerNorm, LayerNorm, {"bias": False, "eps": 0.1}),
    (torch.nn.LayerNorm, LayerNorm, {"elementwise_affine": False}),
    (torch.nn.RMSNorm, RMSNorm, {}),
    (torch.nn.RMSNorm, RMSNorm, {"eps": 0.1}),
    (torch.nn.RMSNorm, RMSNorm, {"elementwise_affine": False}),
]


@pytest.mark.parametrize("pair", range(len(PAIRS)))
@pytest.mark.parametrize("shape", [6, (6,), (4, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_swaps_with_torch(pair: int, shape: Any, dtype: torch.dtype) -> None:
    theirs, ours, options = PAIRS[pair]
    a, b = theirs(shape, dtype=dtype, **options), ours(shape, dtype=dtype, **options)
    for parameter in a.parameters():
        torch.nn.init.normal_(parameter)
    b.load_state_dict(a.state_dict(), strict=True)
    a.load_state_dict(b.state_dict(), strict=True)
    x = torch.randn(3, 4, 6, dtype=dtype, requires_grad=True)
    upstream = torch.randn(3, 4, 6, dtype=dtype)
    torch.testing.assert_close(b(x), a(x))
    got = torch.autograd.grad(b(x), (x, *b.parameters()), upstream)
    expected = torch.autograd.grad(a(x), (x, *a.parameters()), upstream)
    for mine, want in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, want)


@pytest.mark.parametrize("module", [LayerNorm, RMSNorm])
def test_a_wrong_shape_is_named(module: Any) -> None:
    with pytest.raises(ValueError, match=r"input has shape \[2, 5\], expected \[..., 4, 6\]"):
        module((4, 6))(torch.randn(2, 5))


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_a_models_norms_can_be_hooked_and_replaced(family: str) -> None:
    model = TINY[family]()
    ids, called = torch.tensor([[1, 2, 3]]), []
    want = model(ids)
    norms = [module for module in model.modules() if isinstance(module, (LayerNorm, RMSNorm))]
    handles = [norm.register_forward_hook(lambda *_: called.append(1)) for norm in norms]
    torch.testing.assert_close(model(ids), want)
    assert len(called) == len(norms)
    for handle in handles:
        handle.remove()
    model.norm = torch.nn.Identity()
    assert not torch.allclose(model(ids), want)
