"""benchmarks/few_labels.py: its settings, its table, and a run at the smallest size."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssld.shared.config.settings import parse_config
from ssld.shared.config.yaml_files import merge
from ssld.stage2_detect.config import TrainConfig
from tests.test_benchmarks import init_in_a_moment, script

__all__ = ["init_in_a_moment"]


def test_every_row_of_few_labels_is_a_valid_run(tmp_path: Path) -> None:
    benchmark = script("few_labels")
    for extra in benchmark.ROWS.values():
        base = {"backbone": "timm:resnet18d", "steps": 10, "batch_size": 2, "optim": {"lr": 0.01, "reference_batch": 2}}
        names = dict.fromkeys(("folder", "images", *benchmark.BODIES, "teacher", "pseudo"), tmp_path)
        settings: dict[str, Any] = merge(base, benchmark._filled(extra, names))
        settings["data"] = {"train_annotations": "a.json", "train_images": "photos"}
        file = tmp_path / "settings.yaml"
        file.write_text(yaml.safe_dump(settings))
        assert parse_config(TrainConfig, ["--config", str(file), "--output", str(tmp_path)], program="train.py")


def test_table_of_few_labels(tmp_path: Path) -> None:
    """One detector finds all objects, the other none: the difference is 100 in every draw."""
    benchmark = script("few_labels")
    options = argparse.Namespace(rows=["supervised", "strong", "light"], base="supervised", steps=10, side=64, draws=20)
    options.data_set, options.labeled = "bccd", 2
    images: list[dict[str, Any]] = [
        {"id": number, "file_name": f"{number}.png", "width": 64, "height": 64} for number in range(3)
    ]
    boxes = [
        {
            "id": 1 + one["id"],
            "image_id": one["id"],
            "category_id": 1,
            "bbox": [8, 8, 32, 32],
            "area": 1024,
            "iscrowd": 0,
        }
        for one in images
    ]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cell"}]}
    folders = {seed: tmp_path / str(seed) for seed in range(2)}
    for folder in folders.values():
        folder.mkdir()
        (folder / "val.json").write_text(json.dumps(content))
        for row, found in {"supervised": [], "strong": [one | {"score": 0.9} for one in boxes]}.items():
            place = benchmark.scored(folder, row, options)
            place.mkdir(parents=True)
            (place / "detections.json").write_text(json.dumps(found))
            (place / "result.json").write_text(json.dumps({"metrics": {}}))
            (place / "seconds.json").write_text("10" if row == "supervised" else "15")
    assert list(benchmark.table(folders, options)) == [
        "| bccd, 2 labeled photos | AP | each seed | to supervised, 95 % interval over the images | over the seeds | processor time |",
        "| --- | --- | --- | --- | --- | --- |",
        "| supervised | 0.0 | 0.0, 0.0 | - | - | x 1.00 |",
        "| strong | 100.0 | 100.0, 100.0 | +100.0 (+100.0 to +100.0) | - | x 1.50 |",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("init_in_a_moment")
def test_few_labels_runs(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    """At a tiny size, in this process: the labeled photos and the others are all training photos."""
    data, benchmark = shared_data("weights").parent, script("few_labels")
    threads = torch.get_num_threads()
    line = [str(data), "--output", str(tmp_path), "--labeled", "20", "--steps", "2", "--side", "64"]
    assert benchmark.main([*line, "--one", "strong", "1"]) == 0
    torch.set_num_threads(threads)
    folder = tmp_path / "bccd-20-1"
    labeled = {one["file_name"] for one in json.loads((folder / "train.json").read_text())["images"]}
    rest = {Path(one).name for one in (folder / "unlabeled.txt").read_text().splitlines()}
    assert (len(labeled), len(rest), labeled & rest) == (20, 185, set())
    used = parse_config(TrainConfig, ["--config", str(folder / "runs/strong-2-64/config.yaml")], program="train.py")
    assert (used.augment.preset, used.steps, used.resize.short_side, used.seed) == ("strong", 2, 64, 1)
    assert benchmark.main([*line, "--rows", "strong", "--seeds", "1", "--draws", "20", "--table-only"]) == 0
