"""Loss curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastlm.checkpoints.atomic import write_atomic
from fastlm.training.log import read_log

LOG_NAME = "log.jsonl"


class MovingAverage:
    """The exponential moving average, corrected for its start as in Adam (Kingma and Ba 2015, section 3)."""

    def __init__(self, decay: float = 0.98):
        self._decay, self._sum, self._weight = decay, 0.0, 0.0

    def add(self, value: float) -> float:
        """Takes a value in and returns the average."""
        self._sum = self._decay * self._sum + (1 - self._decay) * value
        self._weight = self._decay * self._weight + (1 - self._decay)
        return self.value

    @property
    def value(self) -> float:
        return self._sum / self._weight


def plot_losses(
    runs: Mapping[str, str | Path], out: str | Path, *, baselines: Mapping[str, float] | None = None
) -> None:
    """Draws the losses of one or several runs into one PNG.

    Args:
        runs: name to show -> log file, or the run folder that has one.
        out: the PNG to write.
        baselines: name -> loss in nats per token, drawn as horizontal lines (an n-gram model's, say).

    Each run has its training loss (faint), the same smoothed, and its validation loss (dots). Raises `ValueError`
    where a log has no steps.
    """
    # The object interface with its own canvas: no pyplot, so no display and nothing shared with the caller's figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    shown: list[float] = []
    for index, (name, source) in enumerate(runs.items()):
        path = Path(source) / LOG_NAME if Path(source).is_dir() else Path(source)
        records = read_log(path)
        steps = [(record["step"], record["loss"]) for record in records if "loss" in record]
        valid = [(record["step"], record["valid_loss"]) for record in records if "valid_loss" in record]
        if not steps:
            raise ValueError(f"{path}: no training steps to plot")
        color = f"C{index}"
        label = f"{name}, " if len(runs) > 1 else ""
        average = MovingAverage()
        smooth = [average.add(loss) for _, loss in steps]
        axes.plot(*_columns(steps), color=color, alpha=0.2, linewidth=0.8, label=f"{label}training")
        axes.plot([step for step, _ in steps], smooth, color=color, linewidth=1.6, label=f"{label}training, smoothed")
        if valid:
            axes.plot(
                *_columns(valid), color=color, linestyle="--", marker="o", markersize=4, label=f"{label}validation"
            )
        shown += smooth[len(smooth) // 50 :] + [loss for _, loss in valid]
    for index, (name, loss) in enumerate((baselines or {}).items()):
        axes.axhline(loss, color="0.3", linestyle=("--", ":", "-.")[index % 3], linewidth=1.2, label=name)
        shown.append(loss)
    margin = 0.05 * (max(shown) - min(shown)) or 0.1
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Loss" if len(runs) > 1 else f"Loss of {next(iter(runs))}")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomic(out, lambda temporary: FigureCanvasAgg(figure).print_figure(temporary, format="png"))


def _columns(pairs: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]
