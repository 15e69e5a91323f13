"""Every command killed at its calls to the file system, and run again: the same files, byte for byte, or the reason why not.

All calls, and not the first from each line alone, with SSLD_TEST_EVERY_KILL=1, which takes many minutes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.process]

SCRIPT = Path(__file__).with_name("killing.py")
IMPORTS = ("sklearn.cluster",)  # beside those of forking.py
TORCH = {"threads": 1, "workers": 0, "device": "cpu"}


def scenes(folder: Path) -> None:
    """Three scenes with boxes as a COCO data set, and as one in YOLO's layout."""
    draw = np.random.default_rng(3)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(3):
        pixels = draw.integers(0, 60, (64, 64, 3), dtype=np.uint8)
        pixels[10:40, 8:48] = (250, 90, 40)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 64, "width": 64})
        annotations.append(
            {"id": number, "image_id": number, "category_id": 3, "bbox": [8, 10, 40, 30], "area": 1200, "iscrowd": 0}
        )
        (folder / "labels" / f"{number}.txt").write_text("0 0.4375 0.390625 0.625 0.46875\n")
    content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "wide"}]}
    (folder / "coco.json").write_text(json.dumps(content))
    (folder / "data.yaml").write_text(yaml.safe_dump({"train": "images", "val": "images", "names": ["wide"]}))


class Cases:
    """The cases of one call of the script."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cases = folder, list[dict[str, Any]]()

    def add(self, name: str, module: str, settings: dict[str, Any], **more: Any) -> Path:
        output = self.folder / name
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(settings | {"output": str(output)}))
        argv = ["--config", str(self.folder / f"{name}.yaml")]
        self.cases.append({"name": name, "module": module, "argv": argv, "output": str(output)} | more)
        return self.folder / f"{name}_whole"

    def run(self, *, imports: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        spec = self.folder / "cases.json"
        every = bool(os.environ.get("SSLD_TEST_EVERY_KILL"))
        spec.write_text(json.dumps({"cases": self.cases, "imports": imports, "every": every}))
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(spec)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        reports = [json.loads(line) for line in done.stdout.splitlines()]
        assert [one["name"] for one in reports] == [case["name"] for case in self.cases]
        return reports


def redo(cases: Cases, folder: Path) -> None:
    """A pipeline that has run, of which a stage and what follows are computed again."""
    source = str(folder / "scenes" / "data.yaml")
    stages = {
        "data": {"command": "convert_data", "set": {"source": source}},
        "report": {"command": "report", "set": {"runs": "${data}"}},
    }
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"output": str(folder / "runs"), "stages": stages}, sort_keys=False))
    line = {"module": "ssld.pipelines.run", "output": str(folder / "runs")}
    cases.cases.append({"name": "run", "argv": [str(file)]} | line)
    cases.cases.append(
        {"name": "redo", "argv": [str(file), "--redo", "data"], "before": str(folder / "run_whole")} | line
    )


def test_the_same_files_after_a_kill_at_any_call(tmp_path: Path, teacher_file: Path, tiny: Any) -> None:
    for kind in ("disc", "ring", "stripes"):
        for part, names in {"train": (0, 1), "val": (2,), "pool": (3, 4, 5, 6)}.items():
            folder = tmp_path / part / ("" if part == "pool" else kind)
            folder.mkdir(parents=True, exist_ok=True)
            for number in names:
                shutil.copy(tiny.train / kind / f"{kind}_{number:03d}.png", folder)
    (tmp_path / "pool" / "broken.png").write_bytes(b"no image")
    scenes(tmp_path / "scenes")
    cases = Cases(tmp_path)
    teacher = {"model": str(teacher_file)}
    data = {"train": [str(tmp_path / "train")], "image_size": 32}
    optim = {"lr": 0.02, "reference_batch": 4, "warmup_steps": 0}
    training = TORCH | {
        "steps": 3,
        "batch_size": 4,
        "save_every": 1,
        "keep_checkpoints": 1,
        "log_every": 1,
        "evaluate_every": 1,
    }
    cases.add("converted", "ssld.stage2_detect.convert_data", {"source": str(tmp_path / "scenes" / "data.yaml")})
    cases.add("store", "ssld.stage1_ssld.write_soft_labels",
        TORCH | {"data": data, "teacher": teacher, "views": 2, "top": 2, "shard_images": 4})  # fmt: skip
    pool = {"pool": [str(tmp_path / "pool")], "examples": 2}
    cases.add("prototypes", "ssld.stage1_ssld.prototypes",
        TORCH | pool | {"encoder": teacher, "prototypes": 3, "perplexity": 2})  # fmt: skip
    curation = pool | {"val": [str(tmp_path / "val")], "train": [str(tmp_path / "train")], "hash_distance": 16}
    cases.add("curation", "ssld.stage1_ssld.curate",
        TORCH | curation | {"teacher": teacher, "keep": 3, "image_size": 32, "materialise": True})  # fmt: skip
    student = {"model": "random:test_convnext"}
    val = data | {"val": str(tmp_path / "val")}
    cases.add(
        "student",
        "ssld.stage1_ssld.distill",
        training | {"data": val, "student": student, "teacher": teacher, "optim": optim, "ema": {"decay": 0.9}},
    )
    cases.add("teacher", "ssld.stage1_ssld.teach", training | {"data": val, "model": student, "optim": optim})
    cases.add("top1", "ssld.stage1_ssld.evaluate", TORCH | {"model": str(teacher_file), "data": str(tmp_path / "val")})
    boxes = {"annotations": str(tmp_path / "scenes" / "coco.json"), "images": str(tmp_path / "scenes" / "images")}
    small = {"train_short_sides": [64], "train_long_side": 64, "short_side": 64, "long_side": 64}
    detector = cases.add("detector", "ssld.stage2_detect.train", training | {
        "backbone": "random:test_resnet", "batch_size": 2, "resize": small,
        "data": {f"{split}_{key}": value for split in ("train", "val") for key, value in boxes.items()},
        "model": {"kind": "retinanet", "fpn_channels": 8, "dense": {"convolutions": 1, "score_threshold": 0.0}},
        "optim": {"lr": 0.01, "reference_batch": 4, "warmup_steps": 0},
    })  # fmt: skip
    model = {"model": str(detector / "detector.safetensors"), "images": boxes["images"]}
    cases.add("ap", "ssld.stage2_detect.evaluate", TORCH | model | boxes)
    predicted = cases.add("predicted", "ssld.stage2_detect.predict",
        TORCH | model | {"score_threshold": 0.005, "batch_size": 1, "write": ["json", "images", "csv", "yolo", "crops"]})  # fmt: skip
    cases.add("report", "ssld.pipelines.report", {"runs": str(predicted)})
    redo(cases, tmp_path)
    reports = cases.run(imports=IMPORTS)
    for one in reports:
        print(one)
    assert [f"{one['name']}: {line}" for one in reports for line in one["wrong"]] == []
    assert all(one["kills"] for one in reports)
