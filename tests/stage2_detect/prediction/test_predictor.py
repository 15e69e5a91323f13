"""Predictions from Python: what the command finds and draws, kinds of images, the README's example."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from run_files import content

from ssld.shared.errors import UserError
from ssld.stage2_detect import predict
from ssld.stage2_detect.detector_file import load_detector
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.prediction.predictor import ImageDetections

ROOT = Path(__file__).resolve().parents[3]
Call = Callable[..., int]


def test_three_lines_find_what_the_command_finds(
    call: Call, predict_line: Any, detector_file: Path, photos: Path, tmp_path: Path
) -> None:
    assert call(predict.main, predict_line()) == 0
    detections = content(tmp_path / "predicted" / "predictions.json")
    detector = load_detector(str(detector_file))
    files = [photos / image["file_name"] for image in detections["images"]]
    visible = detector.predict(files, score_threshold=0.3)
    assert len(visible) == 12
    for image, objects in zip(detections["images"], visible, strict=True):
        rows = [row for row in detections["annotations"] if row["image_id"] == image["id"]]
        assert len(rows) == len(objects) == len(list(objects))
        for row, (name, score, box) in zip(rows, objects, strict=True):
            assert name == {3: "wide", 7: "tall"}[row["category_id"]]
            assert score == pytest.approx(row["score"], abs=1e-5)
            x, y, width, height = row["bbox"]
            np.testing.assert_allclose(box, [x, y, x + width, y + height], atol=2e-3)


def test_kinds_of_pictures_and_a_batch_of_unequal_ones(detector_file: Path, photos: Path) -> None:
    detector = load_detector(detector_file)
    photo = Image.open(photos / "5.png")
    (one,) = detector.predict([photos / "5.png"], score_threshold=0.2)
    assert len(one)
    for other in (str(photos / "5.png"), photo, np.array(photo)):
        (same,) = detector.predict([other], score_threshold=0.2)
        np.testing.assert_array_equal(same.boxes_N4, one.boxes_N4)
    wide = Image.new("RGB", (90, 40), (30, 30, 30))
    wide.paste(photo.crop((0, 0, 40, 40)), (10, 0))
    pair = detector.predict([photo, wide], score_threshold=0.05)
    assert pair[1].boxes_N4[:, 2].max() <= 90
    assert pair[1].boxes_N4[:, 3].max() <= 40
    with pytest.raises(TypeError, match="takes a list"):
        detector.predict("photo.jpg")
    with pytest.raises(TypeError, match="uint8"):
        detector.predict([np.zeros((4, 4, 3))])
    with pytest.raises(TypeError, match="uint8"):
        detector.predict([np.zeros((0, 5, 3), np.uint8)])
    for wrong in ({"batch_size": 0}, {"tile": 0}, {"overlap": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))}"):
            detector.predict([], **wrong)
    with pytest.raises(UserError, match="cannot read image"):
        detector.predict([photos / "absent.png"])
    assert detector.predict([]) == []


@pytest.mark.parametrize(("dtype", "scale"), [("uint16", 257.0), ("float32", 1 / 255)])
def test_a_deep_image_of_pil_has_the_detections_of_its_file(
    detector_file: Path, photos: Path, tmp_path: Path, dtype: str, scale: float
) -> None:
    """PIL's own conversion of 16 bits, or of fractions, is white or black."""
    gray_HW = np.array(Image.open(photos / "5.png").convert("L"))
    file = tmp_path / "deep.tif"
    Image.fromarray((gray_HW * scale).astype(dtype)).save(file)
    detector = load_detector(detector_file)
    (of_file,), (of_pil,) = (detector.predict([one], score_threshold=0.05) for one in (file, Image.open(file)))
    assert len(of_file)
    np.testing.assert_array_equal(of_pil.boxes_N4, of_file.boxes_N4)


def test_objects_are_drawn_as_the_command_draws_them(
    call: Call, predict_line: Any, detector_file: Path, photos: Path, tmp_path: Path
) -> None:
    assert call(predict.main, predict_line(images=photos / "5.png")) == 0
    (objects,) = load_detector(detector_file).predict([photos / "5.png"], score_threshold=0.3)
    assert len(objects)
    drawn = objects.draw(photos / "5.png")
    drawn.save(tmp_path / "mine.jpg", quality=92)
    assert (tmp_path / "mine.jpg").read_bytes() == (tmp_path / "predicted" / "pictures" / "5.jpg").read_bytes()


def test_the_readmes_example(detector_file: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    snippet = re.search(r"```python\n(import ssld\n.*?)```", readme, flags=re.DOTALL)
    assert snippet
    code = snippet[1].replace("runs/first/detector/detector.safetensors", str(detector_file))
    files = sorted(photos.glob("*.png"))
    counts = [len(objects) for objects in load_detector(detector_file).predict(files)]
    capsys.readouterr()
    exec(code.replace('"photo.jpg"', repr(str(files[np.argmax(counts)]))), {})
    assert len(capsys.readouterr().out.splitlines()) == max(counts) > 0


def test_detections_are_a_sequence() -> None:
    """Choices by number, slice and list are those of a list of the same objects, in every field."""
    draw = np.random.default_rng(0)
    labels_N = draw.integers(0, 3, 7)
    names = [("cat", "dog", "cow")[label] for label in labels_N]
    masks = [{"number": number} for number in range(7)]
    scores_N = np.sort(draw.random(7, dtype=np.float32))[::-1].copy()
    objects = ImageDetections(
        draw.random((7, 4), dtype=np.float32), scores_N, labels_N, names, masks, ("cat", "dog", "cow")
    )
    listed = list(objects)
    assert [objects[number] for number in range(-7, 7)] == listed + listed
    assert objects[np.argmax(scores_N)] == listed[0]
    sure = objects.scores_N > scores_N[4]
    cats = [name == "cat" for name in objects.names]
    choices: list[tuple[Any, list[int]]] = [
        (slice(2), [0, 1]),
        (slice(None, None, 3), [0, 3, 6]),
        (sure, [0, 1, 2, 3]),
        (torch.from_numpy(sure), [0, 1, 2, 3]),
        (cats, [number for number in range(7) if names[number] == "cat"]),
        ([5, -1, 0], [5, 6, 0]),
        ([], []),
        (slice(9, 12), []),
    ]
    for index, numbers in choices:
        chosen: Any = objects[index]
        assert isinstance(chosen, ImageDetections)
        assert list(chosen) == [listed[number] for number in numbers]
        assert chosen.masks == [masks[number] for number in numbers]
        assert chosen.labels_N.tolist() == labels_N[numbers].tolist()
        assert chosen.boxes_N4.shape == (len(numbers), 4)
        assert chosen.class_names == objects.class_names
    nothing = objects[[]]
    assert len(nothing[nothing.scores_N > 0.5]) == len(nothing[:2]) == 0
    assert len(nothing[[name == "cat" for name in nothing.names]]) == 0
    wrongs: list[Any] = [7, [True, False], [9]]
    for wrong in wrongs:
        with pytest.raises(IndexError):
            objects[wrong]
    for shape in (True, np.zeros((2, 2), int)):
        with pytest.raises(TypeError, match="a number, a slice or a list"):
            objects[shape]


def test_chosen_detections_keep_their_masks() -> None:
    boxes_N4 = torch.arange(12.0).view(3, 4)
    detections = Detections(boxes_N4, torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0, 1, 0]), ["a", "b", "c"])
    kept = detections.where(detections.labels_N == 0)
    assert kept.masks == ["a", "c"]
    assert kept.boxes_N4.equal(boxes_N4[[0, 2]])
