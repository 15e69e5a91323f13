"""Plot of a stage-1 run, `curves.png`: loss and its terms, agreement and accuracy, KL, entropies, gradient norm, learning rate.

Apart from the loop, because it is drawn from metrics.jsonl alone and can be drawn again at any time.
"""

from pathlib import Path
from typing import Any

from ssld.shared.files import atomically
from ssld.shared.run_dir import SPEED, read_metrics

_ENTROPIES = ("teacher_entropy", "student_entropy")
# Keys of a logged training step that are not loss terms.
_NOT_LOSS = ("step", "lr", *SPEED, "agreement", "accuracy", "grad_norm", *_ENTROPIES)


def write_curves(run: Path) -> None:
    """Draw `curves.png` from metrics.jsonl of a run; panels without numbers are left out, and without any number no file is written."""
    # Without pyplot, which would choose a backend for the whole process.
    from matplotlib.figure import Figure

    panels = [(title, curves) for title, curves in _panels(read_metrics(run)) if curves]
    if not panels:
        return
    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    for axis, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in curves.items():
            style = ("o:" if "teacher" in name else "o-") if name.startswith("val_") else "-"
            axis.plot(
                [step for step, _ in points], [value for _, value in points], style, markersize=3, label=_label(name)
            )
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(curves) > 1 or next(iter(curves)).startswith("val_"):
            axis.legend()
    with atomically(run / "curves.png") as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _panels(lines: list[dict[str, Any]]) -> list[tuple[str, dict[str, list[tuple[int, float]]]]]:
    """(title, name -> points (step, value)) of each panel."""
    names = dict.fromkeys(name for line in lines for name in line)
    losses = [name for name in names if name not in _NOT_LOSS and not name.startswith("val_")]
    shares = ["agreement", "accuracy", "val_agreement", "val_top1", "val_teacher_top1"]
    chosen = [
        ("loss", losses),
        ("top-1 and agreement", shares),
        ("KL to the teacher, nats", ["val_kl"]),
        ("entropy per image, nats", list(_ENTROPIES)),
        ("gradient norm", ["grad_norm"]),
        ("learning rate", ["lr"]),
    ]
    return [(title, {name: points for name in keys if (points := _points(lines, name))}) for title, keys in chosen]


def _points(lines: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if name in line]


def _label(name: str) -> str:
    return name.replace("val_", "validation ").replace("_", " ").replace("top1", "top-1")
