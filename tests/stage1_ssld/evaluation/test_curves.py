"""The plot of a run's curves: the drawn points, from given lines of metrics.jsonl."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ssld.stage1_ssld.evaluation.curves import write_curves

LINES = [
    {
        "step": 2,
        "lr": 0.1,
        "loss": 3.0,
        "symmetric_kl": 2.0,
        "dist": 1.0,
        "agreement": 0.2,
        "grad_norm": 0.7,
        "teacher_entropy": 0.5,
        "student_entropy": 1.25,
        "seconds": 1.0,
        "data_wait": 0.1,
    },
    {"step": 2, "val_images": 9, "val_top1": 0.3, "val_agreement": 0.4, "val_teacher_top1": 0.9, "val_kl": 1.5},
    {
        "step": 4,
        "lr": 0.05,
        "loss": 2.0,
        "symmetric_kl": 1.5,
        "dist": 0.5,
        "agreement": 0.5,
        "grad_norm": 0.25,
        "teacher_entropy": 0.5,
        "student_entropy": 0.75,
        "seconds": 1.0,
        "data_wait": 0.1,
    },
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Fills with title -> label -> points of every figure that is saved."""
    from matplotlib.figure import Figure

    result: dict[str, dict[str, list[tuple[float, float]]]] = {}
    save = Figure.savefig

    def remember(self: Any, *arguments: Any, **options: Any) -> None:
        for axis in self.axes:
            result[axis.get_title()] = {
                line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axis.lines
            }
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", remember)
    return result


def write(run: Path, lines: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_every_curve_is_drawn_once(drawn_figures: None, drawn: Any, tmp_path: Path) -> None:
    write(tmp_path, LINES)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # torn by a kill
    write_curves(tmp_path)
    assert drawn == {
        "loss": {"loss": [(2, 3), (4, 2)], "symmetric kl": [(2, 2), (4, 1.5)], "dist": [(2, 1), (4, 0.5)]},
        "top-1 and agreement": {
            "agreement": [(2, 0.2), (4, 0.5)],
            "validation agreement": [(2, 0.4)],
            "validation top-1": [(2, 0.3)],
            "validation teacher top-1": [(2, 0.9)],
        },
        "KL to the teacher, nats": {"validation kl": [(2, 1.5)]},
        "entropy per image, nats": {"teacher entropy": [(2, 0.5), (4, 0.5)], "student entropy": [(2, 1.25), (4, 0.75)]},
        "gradient norm": {"grad norm": [(2, 0.7), (4, 0.25)]},
        "learning rate": {"lr": [(2, 0.1), (4, 0.05)]},
    }
    with Image.open(tmp_path / "curves.png") as plot:
        assert plot.width > 3 * plot.height
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.jsonl", "curves.png"}


def test_without_numbers_there_is_no_panel_and_no_picture(drawn: Any, tmp_path: Path) -> None:
    write_curves(tmp_path)
    write(tmp_path, [])
    write_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()
    write(tmp_path, [{"step": 1, "lr": 0.1, "loss": 1.0, "accuracy": 0.5}])
    write_curves(tmp_path)
    assert list(drawn) == ["loss", "top-1 and agreement", "learning rate"]
    assert drawn["top-1 and agreement"] == {"accuracy": [(1, 0.5)]}


def test_a_distillation_leaves_its_curves(
    drawn: Any, arguments: Any, distill_settings: Any, call: Any, tmp_path: Path
) -> None:
    from ssld.stage1_ssld.distill import main

    assert call(main, arguments(distill_settings | {"evaluate_every": 2, "steps": 4})) == 0
    assert (tmp_path / "run" / "curves.png").exists()
    assert [step for step, _ in drawn["loss"]["loss"]] == [2, 4]
    assert [step for step, _ in drawn["KL to the teacher, nats"]["validation kl"]] == [2, 4]
    assert "validation agreement" in drawn["top-1 and agreement"]
