"""Streaming an LSTM: one sequence, one time step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.case import Case, require
from fastlm import nn

__all__ = ["cases"]


def cases() -> Iterator[Case]:
    """fastlm.nn.LSTM against torch.nn.LSTM on the same weights, B 1, T 1."""
    for size in (256, 512, 1024):
        torch.manual_seed(0)
        peer = torch.nn.LSTM(size, size).eval().requires_grad_(False)
        ours = nn.LSTM(size, size).eval().requires_grad_(False)
        ours.load_state_dict(peer.state_dict())
        step = torch.randn(1, 1, size)
        state = (torch.randn(1, 1, size), torch.randn(1, 1, size))

        def gate(peer: torch.nn.LSTM = peer, ours: nn.LSTM = ours, step=step, state=state) -> None:  # type: ignore[no-untyped-def]
            with torch.no_grad():
                exact = torch.nn.LSTM(step.shape[-1], step.shape[-1]).double()
                exact.load_state_dict(peer.state_dict())
                want = exact(step.double(), (state[0].double(), state[1].double()))
                got, reference = ours(step, state), peer(step, state)
            for g, r, w in (
                (got[0], reference[0], want[0]),
                (got[1][0], reference[1][0], want[1][0]),
                (got[1][1], reference[1][1], want[1][1]),
            ):
                bound = 2 * (r.double() - w).abs().max() + 1e-6 * w.abs().max()
                require(bool((g.double() - w).abs().max() <= bound), f"LSTM step {step.shape[-1]} is wrong")

        def call(module: torch.nn.Module, step=step, state=state) -> None:  # type: ignore[no-untyped-def]
            with torch.no_grad():
                module(step, state)

        yield Case(
            name="LSTM step",
            shape=f"B 1, T 1, I {size}, H {size}",
            peer_name="torch.nn.LSTM",
            gate=gate,
            ours=lambda ours=ours, call=call: call(ours),  # type: ignore[misc]
            peer=lambda peer=peer, call=call: call(peer),  # type: ignore[misc]
            goal=8.0 if size > 256 else None,
        )
