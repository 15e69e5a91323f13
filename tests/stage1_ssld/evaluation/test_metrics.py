"""Evaluation against counts made by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssld.stage1_ssld.data.batch import Batch
from ssld.stage1_ssld.evaluation.metrics import describe, evaluate

CPU, FP32 = torch.device("cpu"), torch.float32


def batches(labels: list[int], sizes: list[int]) -> list[Batch]:
    """Batches whose pixels carry the number of the image."""
    numbers = iter(range(len(labels)))
    out = []
    for size in sizes:
        rows = [next(numbers) for _ in range(size)]
        pixels = torch.tensor(rows, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        out.append(Batch(pixels, torch.tensor([labels[row] for row in rows]), [str(row) for row in rows], []))
    return out


def lookup(table_NK: torch.Tensor):  # type: ignore[no-untyped-def]
    return lambda pixels: table_NK[pixels[:, 0, 0, 0].long()]


def test_against_numpy() -> None:
    generator = np.random.default_rng(0)
    s, t = generator.standard_normal((2, 23, 11)) * 2
    labels = generator.integers(0, 11, 23)
    student, teacher = (lookup(torch.from_numpy(x).float()) for x in (s, t))
    result = evaluate(student, teacher, batches(labels.tolist(), [8, 8, 7]), device=CPU, dtype=FP32)
    log_s, log_t = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (s, t))
    rank_s, rank_t = ((x > x[np.arange(23), labels][:, None]).sum(1) for x in (s, t))
    assert result == pytest.approx(
        {
            "images": 23,
            "top1": (rank_s < 1).mean(),
            "top5": (rank_s < 5).mean(),
            "teacher_top1": (rank_t < 1).mean(),
            "teacher_top5": (rank_t < 5).mean(),
            "agreement": (s.argmax(1) == t.argmax(1)).mean(),
            "kl": (np.exp(log_t) * (log_t - log_s)).sum(1).mean(),
        },
        rel=1e-5,
    )
    again = evaluate(student, teacher, batches(labels.tolist(), [1, 20, 2]), device=CPU, dtype=FP32)
    assert again == pytest.approx(result, rel=1e-6)


def test_only_labeled_images_count_for_accuracy() -> None:
    table = torch.eye(4)
    result = evaluate(lookup(table), None, batches([0, -1, 1, -1], [2, 2]), device=CPU, dtype=FP32)
    assert result == {"images": 4, "top1": 0.5, "top5": 1.0}
    result = evaluate(lookup(table), lookup(table), batches([-1] * 4, [4]), device=CPU, dtype=FP32)
    assert set(result) == {"images", "agreement", "kl"}
    assert result["agreement"] == 1
    assert result["kl"] == pytest.approx(0, abs=1e-6)


def test_batches_without_a_readable_image_are_passed_over() -> None:
    empty = Batch(torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), [], ["broken.jpg"])
    result = evaluate(lookup(torch.eye(2)), None, [empty, *batches([0, 1], [2])], device=CPU, dtype=FP32)
    assert result == {"images": 2, "unreadable": 1, "top1": 1.0, "top5": 1.0}
    reported: list[str] = []
    evaluate(lookup(torch.eye(2)), None, [empty, empty], device=CPU, dtype=FP32, on_unreadable=reported.extend)
    assert reported == ["broken.jpg"] * 2
    assert evaluate(lookup(torch.eye(2)), None, [], device=CPU, dtype=FP32) == {"images": 0}


def test_description() -> None:
    metrics = {"images": 50, "top1": 0.1234, "agreement": 0.5, "kl": 0.25}
    assert describe(metrics) == "top1 12.34 %, agreement 50.00 %, kl 0.2500 on 50 images"


def test_unreadable_validation_images_are_said(
    arguments: Any, distill_settings: Any, call: Any, tmp_path: Path, jpeg: Any
) -> None:
    from ssld.stage1_ssld.distill import main as distill

    (tmp_path / "val").mkdir()
    for seed in range(5):
        (tmp_path / "val" / f"{seed}.jpg").write_bytes(jpeg(seed=seed)[: 300 if seed == 2 else None])
    data = distill_settings["data"] | {"val": str(tmp_path / "val")}
    assert call(distill, arguments(distill_settings | {"data": data})) == 0
    assert "on 4 images (1 unreadable left out)" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("broken", [1, 2])
def test_unreadable_images_of_an_evaluation_are_listed_and_judged(
    broken: int, call: Any, user_error: Any, tmp_path: Path, jpeg: Any, teacher_file: Path
) -> None:
    from ssld.stage1_ssld.evaluate import main

    for number in range(6):
        folder = tmp_path / "val" / ("disc", "ring", "stripes")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(jpeg(seed=number)[: 300 if number < broken else None])
    argv = ["--model", str(teacher_file), "--data.path", str(tmp_path / "val"), "--output", str(tmp_path / "run")]
    argv += ["--threads", "1", "--workers", "0", "--device", "cpu"]
    if broken == 1:
        assert call(main, argv) == 0
    else:
        assert "2 of 6 images cannot be read, listed in" in user_error(main, argv)
    assert (tmp_path / "run" / "result.json").exists() == (broken == 1)
    listed = [f"{tmp_path}/val/disc/0.jpg", f"{tmp_path}/val/ring/1.jpg"][:broken]
    assert (tmp_path / "run" / "quarantine.txt").read_text().splitlines() == listed


def test_the_teacher_of_an_evaluation_has_its_own_precision(
    call: Any, tmp_path: Path, tiny: Any, teacher_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssld.stage1_ssld.distillation import teacher as teacher_module
    from ssld.stage1_ssld.evaluate import main

    made: list[Any] = []

    class Remembered(teacher_module.FrozenTeacher):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self._dtype)

    monkeypatch.setattr(teacher_module, "FrozenTeacher", Remembered)
    argv = ["--model", str(teacher_file), "--data.path", str(tiny.val), "--teacher.model", str(teacher_file)]
    argv += ["--threads", "1", "--workers", "0", "--device", "cpu"]
    assert call(main, [*argv, "--output", str(tmp_path / "plain")]) == 0
    assert call(main, [*argv, "--output", str(tmp_path / "half"), "--teacher.precision", "bf16"]) == 0
    assert made == [torch.float32, torch.bfloat16]
