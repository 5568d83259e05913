"""One time step of fastlm.nn's LSTM and LSTMCell once the weights are packed: the short way and who may not take it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_twins import hidden, leaves, pair, raised

from fastlm import ops
from fastlm.kernels import native


class TestStreamingStep:
    """The short way that one time step of a plain LSTM takes once its weights are packed."""

    @staticmethod
    def warm(**kwargs: Any) -> tuple[Any, Any]:
        """Ours, having stepped before, and torch's."""
        ours, theirs = pair("LSTM", 6, 21, **kwargs)
        with torch.no_grad():
            ours(torch.randn(1, 1, 6), hidden("LSTM", ours, 1, 1))
        return ours, theirs

    @pytest.fixture
    def short(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Fails where the general way is taken."""
        if native.CPU.module is None:
            pytest.skip(str(native.CPU.error))
        return lambda: monkeypatch.setattr(ops, "lstm", lambda *_, **__: pytest.fail("the general way"))

    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("inference", [True, False])
    def test_gives_the_bits_of_the_general_way(self, batch: int, bias: bool, inference: bool, short: Any) -> None:
        ours, _ = self.warm(bias=bias)
        x, hx = torch.randn(1, batch, 6), hidden("LSTM", ours, 1, batch)
        general = [t.detach() for t in leaves(ours(x, hx))]
        short()
        with torch.inference_mode() if inference else torch.no_grad():
            output, (h_n, c_n) = ours(x, hx)
        assert all(torch.equal(a, b) and a.shape == b.shape for a, b in zip((output, h_n, c_n), general, strict=True))
        assert len({t.untyped_storage().data_ptr() for t in (output, h_n, c_n, x, *hx)}) == 6
        assert not output.requires_grad

    def test_a_batch_of_one_may_come_first(self, short: Any) -> None:
        ours, theirs = self.warm(batch_first=True)
        short()
        with torch.no_grad():
            x, hx = torch.randn(1, 1, 6), hidden("LSTM", ours, 1, 1)
            torch.testing.assert_close(ours(x, hx), theirs(x, hx))

    def test_reads_changed_weights(self) -> None:
        ours, theirs = self.warm()
        x, hx = torch.randn(1, 1, 6), hidden("LSTM", ours, 1, 1)
        changes = (
            lambda w: w.mul_(2),
            lambda w: w.data.neg_(),
            lambda w: setattr(w, "data", torch.randn_like(w)),
            lambda w: setattr(w, "data", w.data.flip(0)),
        )
        with torch.no_grad():
            for change in changes:
                for module in (ours, theirs):
                    torch.manual_seed(9)
                    change(module.weight_hh_l0)
                    change(module.bias_ih_l0)
                torch.testing.assert_close(ours(x, hx), theirs(x, hx))
            ours.weight_hh_l0.data = ours.weight_hh_l0.data[:, :7]  # the same address, version and values
            with pytest.raises(ValueError, match=r"weights\[1\] is float32 \[84, 7\]|hidden"):
                ops.lstm(x, hx, ours._weights())
            with pytest.raises((ValueError, RuntimeError)):
                ours(x, hx)

    @pytest.mark.parametrize("kwargs", [{"batch_first": True}, {"bidirectional": True}, {"num_layers": 2}])
    @pytest.mark.parametrize("steps", [1, 3])
    def test_leaves_other_layouts_to_the_general_way(self, kwargs: dict[str, Any], steps: int) -> None:
        ours, theirs = pair("LSTM", 6, 21, **kwargs)
        layers = ours.num_layers * (2 if ours.bidirectional else 1)
        x, hx = torch.randn(1, steps, 6), hidden("LSTM", ours, layers, 1 if ours.batch_first else steps)
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(ours(x, hx), theirs(x, hx))

    @pytest.mark.parametrize(
        ("input", "hx"),
        [
            ((1, 1, 5), ((1, 1, 21), (1, 1, 21))),
            ((1, 1, 6), ((1, 2, 21), (1, 2, 21))),
            ((1, 1, 6), ((1, 1, 21), (1, 1, 20))),
            ((1, 1, 6), ((2, 1, 21), (2, 1, 21))),
            ((1, 1, 6), ((21,), (21,))),
            ((1, 3, 6), ((1, 3, 21), (1, 3, 21))),  # with batch_first: three steps, and states for three rows
        ],
    )
    def test_refuses_as_before(self, input: Any, hx: Any) -> None:
        ours, theirs = self.warm(batch_first=True)
        arguments = torch.zeros(input), tuple(torch.zeros(s) for s in hx)
        with torch.no_grad():
            expected = raised(lambda: theirs(*arguments))
            assert expected is not None
            assert raised(lambda: ours(*arguments)) == expected

    def test_is_not_taken_where_someone_is_looking(self) -> None:
        """Forced backends, gradients, and torch.func see what they see without it."""
        ours, theirs = self.warm()
        x, hx = torch.randn(1, 1, 6), hidden("LSTM", ours, 1, 1)
        with torch.no_grad(), ops.backend("torch"):
            assert torch.equal(ours(x, hx)[0], theirs(x, hx)[0])
        with torch.no_grad():
            assert ops.explain(lambda *a: ours(*a), x, hx).op == "lstm"
            _, derivative = torch.func.jvp(lambda row: ours(row, hx)[0], (x,), (x,))
            near = (ours(1.001 * x, hx)[0] - ours(0.999 * x, hx)[0]) / 0.002
            torch.testing.assert_close(derivative, near, rtol=1e-2, atol=1e-3)
            double = ours.double()
            assert double(x.double(), tuple(s.double() for s in hx))[0].dtype is torch.float64
        assert ours(x.double(), tuple(s.double() for s in hx))[0].requires_grad


@pytest.mark.parametrize("bias", [True, False])
def test_a_cell_steps_again_with_the_same_bits(bias: bool) -> None:
    """The second step finds the weights packed."""
    ours, theirs = pair("LSTMCell", 6, 21, bias=bias)
    x, hx = torch.randn(2, 6), (torch.randn(2, 21), torch.randn(2, 21))
    with torch.no_grad():
        first, second = ours(x, hx), ours(x, hx)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        torch.testing.assert_close(second, theirs(x, hx))
        for module in (ours, theirs):
            module.weight_hh.mul_(2)
        torch.testing.assert_close(ours(x, hx), theirs(x, hx))
        assert raised(lambda: ours(x, (hx[0], hx[1][:1]))) == raised(lambda: theirs(x, (hx[0], hx[1][:1])))
