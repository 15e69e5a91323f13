"""Curves of a stage-1 run as a picture, `curves.png`: loss, agreement and accuracy, KL of the validation images, learning rate."""

from pathlib import Path
from typing import Any

from shared.run_dir import read_metrics

_PANELS = (
    ("loss", ("loss",), ()),
    ("top-1 and agreement", ("agreement", "accuracy"), ("val_top1", "val_agreement")),
    ("KL to the teacher, nats", (), ("val_kl",)),
    ("learning rate", ("lr",), ()),
)


def write_curves(run: Path) -> None:
    """Draw what metrics.jsonl of a run holds; panels without a single number are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(run)
    panels = [
        (title, found)
        for title, training, validation in _PANELS
        if (found := {name: _points(lines, name) for name in (*training, *validation) if _points(lines, name)[0]})
    ]
    if not panels:
        return
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="constrained", squeeze=False)
    for axis, (title, found) in zip(axes[0], panels, strict=True):
        for name, (steps, values) in found.items():
            dots = "o-" if name.startswith("val_") else "-"
            axis.plot(
                steps, values, dots, markersize=3, label=name.replace("val_", "validation ").replace("top1", "top-1")
            )
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(found) > 1:
            axis.legend()
    figure.savefig(run / "curves.png", dpi=110)
    pyplot.close(figure)


def _points(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in found], [value for _, value in found]
