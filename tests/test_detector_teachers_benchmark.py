"""benchmarks/detector_teachers.py: its settings, its table, and a run at the smallest size."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssld.shared.config.settings import parse_config
from ssld.stage2_detect.config import TrainConfig
from ssld.stage2_detect.predict_config import PredictConfig
from tests.test_benchmarks import script


def write_cells(data: Path, images: int = 11) -> dict[str, Any]:
    """`bccd/` with one object per image; its training and evaluation images are the same."""
    photos = [{"id": k, "file_name": f"{k:02}.jpg", "width": 64, "height": 64} for k in range(images)]
    boxes = [
        {"id": k + 1, "image_id": k, "category_id": 1, "bbox": [8, 8, 32, 32], "area": 1024, "iscrowd": 0}
        for k in range(images)
    ]
    content = {"images": photos, "annotations": boxes, "categories": [{"id": 1, "name": "cell"}]}
    folder = data / "bccd" / "annotations"
    folder.mkdir(parents=True)
    for part in ("train", "val"):
        (folder / f"instances_{part}.json").write_text(json.dumps(content))
    return content


def test_every_row_of_detector_teachers_is_a_valid_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a kind differ in the teacher's terms alone; pseudo-labels come beside as many labeled images per step."""
    benchmark = script("detector_teachers")
    write_cells(tmp_path)
    ran: dict[str, dict[str, Any]] = {}

    def record(_: Any, settings: dict[str, Any], output: Path, *__: str) -> None:
        ran[str(output.relative_to(tmp_path / "grid"))] = settings

    monkeypatch.setattr(benchmark, "command", record)
    arguments = [str(tmp_path), "--output", str(tmp_path / "grid"), "--backbone", "random:test_resnet", "--seeds", "0"]
    assert benchmark.main([*arguments, "--every", "5"]) == 0
    labeled = json.loads((tmp_path / "grid" / "bccd-every5" / "train.json").read_text())
    assert [image["id"] for image in labeled["images"]] == [0, 5, 10]
    assert [one["image_id"] for one in labeled["annotations"]] == [0, 5, 10]
    listed = (tmp_path / "grid" / "bccd-every5" / "unlabeled.txt").read_text().splitlines()
    assert [Path(line).name for line in listed] == [f"{k:02}.jpg" for k in range(11) if k % 5]

    def parsed(kind: Any, name: str) -> Any:
        file = tmp_path / "settings.yaml"
        file.write_text(yaml.safe_dump(ran[f"bccd-every5/{name}"]))
        return parse_config(kind, ["--config", str(file), "--output", str(tmp_path / "run")], program="run")

    for kind, rows in benchmark.ROWS.items():
        alone = parsed(TrainConfig, benchmark.run_name(kind, "alone", 200, 0))
        for row in rows:
            run = parsed(TrainConfig, benchmark.run_name(kind, row, 200, 0))
            assert (run.model, run.resize, run.data, run.optim.lr) == (
                alone.model,
                alone.resize,
                alone.data,
                alone.optim.lr,
            )
            assert run.steps == alone.steps * (2 if "twice the steps" in row else 1)
            pseudo = row in ("pseudo", "sad")
            more_images = pseudo or "unlabeled" in row
            doubled = more_images or "twice the batch" in row
            assert run.batch_size * (0.5 if doubled else 1) == alone.batch_size
            assert run.optim.reference_batch == run.batch_size  # so the learning rate is as without
            assert (run.unlabeled is not None) == more_images
            assert (run.pseudo is not None) == pseudo
            with_teacher = not row.startswith("alone") and row != "pseudo"
            assert (run.distill is not None) == with_teacher
            if run.distill:
                assert run.distill.fault(run.model) is None
        assert parsed(TrainConfig, f"{kind}-teacher-600-0").model == alone.model
    assert parsed(PredictConfig, "retinanet-pseudo-600-0").pseudo_labels
    terms = parsed(TrainConfig, benchmark.run_name("gfl", "ld+ld_vlr", 200, 0)).distill.ld
    assert (terms.ld_weight, terms.ld_vlr_weight, terms.kd_weight) == (0.25, 0.25, 0)

    ran.clear()
    assert benchmark.main([*arguments, "--kinds", "retinanet"]) == 0
    assert not [
        name for name in ran if "-pseudo-" in name or "-sad-" in name or "unlabeled" in name
    ]  # no image is unlabeled


def test_a_row_of_detector_teachers_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [str(tmp_path), "--output", str(tmp_path), "--backbone", "random:test_resnet", "--kinds", "gfl"]
    with pytest.raises(SystemExit, match="2"):
        script("detector_teachers").main([*line, "--rows", "alone", "sad"])
    assert capsys.readouterr().err.endswith("error: --rows: sad: no such row of gfl\n")


def test_table_of_detector_teachers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The teacher finds all objects, a student none, another all in one of two seeds."""
    benchmark = script("detector_teachers")
    content = write_cells(tmp_path, images=3)
    found = [one | {"score": 0.9} for one in content["annotations"]]
    runs = {"alone-200-0": [], "alone-200-1": [], "ld-200-0": found, "ld-200-1": [], "teacher-600-0": found}
    for name, detections in runs.items():
        folder = tmp_path / "grid" / "bccd" / "scores" / f"gfl-{name}"
        folder.mkdir(parents=True)
        (folder / "detections.json").write_text(json.dumps(detections))
        (folder / "result.json").write_text(json.dumps({"metrics": {}}))
    line = [str(tmp_path), "--output", str(tmp_path / "grid"), "--backbone", "random:test_resnet", "--kinds", "gfl"]
    assert benchmark.main([*line, "--seeds", "0", "1", "--draws", "20", "--table-only"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| bccd, gfl | AP | each seed | to alone, 95 % interval over the images | over the seeds |",
        "| --- | --- | --- | --- | --- |",
        "| alone | 0.0 | 0.0, 0.0 | - | - |",
        # 12.706, Student's t with one degree of freedom, times the standard deviation 70.711, by the square root of two
        "| ld | 50.0 | 100.0, 0.0 | +50.0 (+50.0 to +50.0) | -585.3 to +685.3 |",
        "| the teacher | 100.0 | 100.0 | +100.0 (+100.0 to +100.0) | - |",
        "",
    ]


@pytest.mark.slow
def test_detector_teachers_run(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    data = shared_data("weights").parent
    threads = torch.get_num_threads()
    line = [str(data), "--output", str(tmp_path), "--backbone", "random:test_resnet", "--side", "64", "--seeds", "3"]
    line += ["--steps", "2", "--teacher-steps", "2", "--draws", "5", "--kinds", "retinanet", "--rows", "adl"]
    assert script("detector_teachers").main([*line, "--every", "25"]) == 0
    torch.set_num_threads(threads)
    run = tmp_path / "bccd-every25" / "retinanet-adl-2-3"
    used = parse_config(TrainConfig, ["--config", str(run / "config.yaml")], program="train.py")
    assert (used.seed, used.batch_size, used.steps) == (3, 8, 2)
    assert json.loads((tmp_path / "bccd-every25" / "scores" / run.name / "result.json").read_text())["metrics"]
