"""The page's program for FiftyOne, where FiftyOne and its database are installed."""

import json
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from ssld.stage2_detect import predict

PAGE = Path(__file__).parents[3] / "docs/detectors.md"


@pytest.fixture(scope="session")  # before the detector, which would be trained in vain
def fiftyone() -> Iterator[Any]:
    """FiftyOne with a database."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIFTYONE_DO_NOT_TRACK", "true")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = pytest.importorskip("fiftyone", reason="FiftyOne is not installed")
            try:
                module.list_datasets()
            except Exception as error:  # its own classes, pymongo's and those of its process
                pytest.skip(f"FiftyOne has no database: {error}")
        yield module


@pytest.mark.filterwarnings("ignore")  # those of FiftyOne
def test_the_program_of_the_page(
    fiftyone: Any, predict_line: Any, call: Any, tiny_coco: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Boxes, scores and names in FiftyOne are those of the two files, and every box is judged."""
    (tmp_path / "photos").rename(tmp_path / "others")
    shutil.copytree(tiny_coco.val_images, tmp_path / "photos/val")
    shutil.copyfile(tiny_coco.val_annotations, tmp_path / "val.json")
    assert call(predict.main, predict_line(images=tmp_path / "photos/val", output="runs/predictions")) == 0
    monkeypatch.chdir(tmp_path)
    shown = Mock()
    monkeypatch.setattr(fiftyone, "launch_app", shown)
    (program,) = re.findall(r"```python\n(import fiftyone.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    try:
        exec(program, names)
        shown.assert_called_once_with(names["dataset"])
        samples = {Path(sample.filepath).name: sample for sample in names["dataset"]}
        assert set(samples) == {path.name for path in tiny_coco.val_images.iterdir()}
        for field, file in (("annotations", "val.json"), ("predictions", "runs/predictions/predictions.json")):
            content = json.loads(Path(file).read_text())
            images = {image["id"]: image for image in content["images"]}
            classes = {one["id"]: one["name"] for one in content["categories"]}
            expected = Counter(
                (images[row["image_id"]]["file_name"], classes[row["category_id"]], row.get("score"), *_rounded(row["bbox"], 1))
                for row in content["annotations"]
            )  # fmt: skip
            found = Counter(
                (name, box.label, box.confidence, *_rounded(box.bounding_box, 64))
                for name, sample in samples.items()
                for box in (sample[field].detections if sample[field] else ())
            )
            assert found == expected
            assert found
        judged = names["dataset"].count_values("predictions.detections.eval")
        missed = names["dataset"].count_values("annotations.detections.eval").get("fn", 0)
        boxes = len(json.loads(Path("val.json").read_text())["annotations"])
        assert judged["tp"] + missed == boxes
        assert judged["tp"] > 0
    finally:
        for name in ("dataset", "predictions"):
            if name in names:
                names[name].delete()


def _rounded(box: list[float], side: int) -> tuple[float, ...]:
    """Left, top, width, height in pixels with one decimal."""
    return tuple(round(side * value, 1) for value in box)
