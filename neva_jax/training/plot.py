"""The loss curve as a picture."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from neva_jax.files import replacing

matplotlib.use("Agg")


def plot_losses(rows: list[dict], path: Path) -> None:
    """Draws training and validation loss over steps (rows of `metrics.jsonl`) into the PNG `path`."""
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, style in (("loss", "-"), ("val_loss", "o-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, linewidth=1.2, markersize=3)
    axes.set(xlabel="step", ylabel="loss per token", ylim=(0, None))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    with replacing(path) as fresh:
        figure.savefig(fresh, format="png")
