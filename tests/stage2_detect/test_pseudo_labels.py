"""Semi-supervised training: pseudo-labels from predict.py as targets of a student's own losses, under a teacher or not."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ssld.shared.errors import UserError
from ssld.shared.models.model_file import read_metadata
from ssld.stage2_detect import predict, train
from ssld.stage2_detect.augment_config import AugmentConfig
from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.data.coco import read_coco
from ssld.stage2_detect.data.loaders import TrainLoader
from ssld.stage2_detect.data.unlabeled_images import LabeledImages, UnlabeledImages, pseudo_labeled_images
from ssld.stage2_detect.data.views import draw_view, view_boxes
from tests.stage2_detect.conftest import written_again

Settings = dict[str, Any]
Arguments = Callable[..., list[str]]
Call = Callable[..., int]
RESIZE = ResizeConfig(train_short_sides=[64, 80], train_long_side=80)
NAMES = ("wide", "tall")


@pytest.fixture(scope="module")
def unlabeled(tiny_coco: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 12 training scenes in other files, four of them deeper, and one that shows nothing."""
    folder = tmp_path_factory.mktemp("unlabeled") / "more"
    written_again(tiny_coco.train_images, folder)
    (folder / "deep").mkdir()
    for number in range(4):
        (folder / f"{number}.png").rename(folder / "deep" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def pseudo_file(unlabeled: Path, detector_file: Path, call: Call, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pseudo-labels that predict.py writes for the unlabeled images."""
    run = tmp_path_factory.mktemp("pseudo") / "run"
    flags = [
        "--model",
        str(detector_file),
        "--images",
        str(unlabeled),
        "--output",
        str(run),
        "--score_threshold",
        "0.3",
    ]
    flags += ["--pseudo_labels", "true", "--threads", "1", "--workers", "0", "--device", "cpu"]
    assert call(predict.main, flags) == 0
    return run / "pseudo_labels.json"


@pytest.fixture
def settings(train_settings: Settings, unlabeled: Path, pseudo_file: Path, detector_file: Path) -> Settings:
    """A RetinaNet under a RetinaNet, half of each batch with pseudo-labels."""
    return train_settings | {
        "unlabeled": str(unlabeled),
        "pseudo": str(pseudo_file),
        "labeled_ratio": 0.5,
        "model": {"kind": "retinanet", "fpn_channels": 16, "dense": {"convolutions": 1}},
        "distill": {"teacher": str(detector_file), "check_images": 3, "check_ap": 0.05, "adl": {}},
    }


def with_boxes(
    file: Path, folder: Path, *, masks: bool = False, labeled: Any = (), evaluated: Any = ()
) -> UnlabeledImages:
    known = LabeledImages(labeled, evaluated)
    return pseudo_labeled_images(file, folder, NAMES, known, segmentations=masks, cache_annotations=False)


def loader(tiny_coco: Any, pseudo_file: Path, folder: Path, **changes: Any) -> TrainLoader:
    data = read_coco(tiny_coco.train_annotations, tiny_coco.train_images, training=True)
    more = with_boxes(pseudo_file, folder)
    augment = AugmentConfig(**{key: changes.pop(key) for key in list(changes) if key.startswith("auto_augment")})
    options: dict[str, Any] = {"batch_size": 4, "seed": 3, "start_step": 0, "stop_step": 6}
    options |= {"unlabeled": more.records, "pseudo": True}
    return TrainLoader(data, RESIZE, augment, **(options | changes))


# ---- the data


def test_pseudo_boxes_are_targets_where_the_file_has_them(tiny_coco: Any, pseudo_file: Path, unlabeled: Path) -> None:
    """Against the file's own numbers, moved by the view that seed, id and pass draw."""
    content = json.loads(pseudo_file.read_text())
    ids = {image["id"]: image["file_name"] for image in content["images"]}
    boxes: dict[str, list[list[float]]] = {}
    labels: dict[str, list[int]] = {}
    for row in content["annotations"]:
        x, y, width, height = row["bbox"]
        boxes.setdefault(ids[row["image_id"]], []).append([x, y, x + width, y + height])
        labels.setdefault(ids[row["image_id"]], []).append({3: 0, 7: 1}[row["category_id"]])
    batch_names = set()
    batches = loader(tiny_coco, pseudo_file, unlabeled)
    for step, batch in enumerate(batches):
        assert batch.targets.labeled_B is None  # all count
        for row, record in enumerate(batch.records):
            name = str(record.image_id).removeprefix("unlabeled/0/")
            assert str(record.image_id).startswith("unlabeled/") == (row >= 2)
            if row < 2:
                continue
            batch_names.add(name)
            number = step // batches.steps_per_epoch
            view = draw_view(
                64,
                64,
                seed=3,
                image_id=f"unlabeled/0/{name}",
                view=number,
                train_short_sides=[64, 80],
                train_long_side=80,
                flip=0.5,
            )
            expected_N4 = view_boxes(np.array(boxes[name], dtype=np.float32).clip(0, 64), view)
            count = len(expected_N4)
            np.testing.assert_allclose(batch.targets.boxes_BG4[row, :count].numpy(), expected_N4, atol=1e-3)
            assert batch.targets.labels_BG[row, :count].tolist() == labels[name]
            assert (batch.targets.labels_BG[row, count:] == -1).all()
    assert len(batch_names) > 2
    assert batch_names <= set(boxes)  # never an image without a box


def test_two_ranks_see_the_union_once(tiny_coco: Any, pseudo_file: Path, unlabeled: Path) -> None:
    def images(**changes: Any) -> list[list[str]]:
        batches = loader(tiny_coco, pseudo_file, unlabeled, **changes)
        return [[str(record.image_id) for record in batch.records] for batch in batches]

    whole = images()
    halves = zip(images(ranks=2, rank=0), images(ranks=2, rank=1), strict=True)
    assert [sorted(one + two) for one, two in halves] == [sorted(step) for step in whole]
    parts = images(accumulate=2)
    assert [sorted(parts[2 * step] + parts[2 * step + 1]) for step in range(6)] == [sorted(step) for step in whole]


def test_a_ratio_of_one_leaves_them_out(tiny_coco: Any, pseudo_file: Path, unlabeled: Path) -> None:
    only = loader(tiny_coco, pseudo_file, unlabeled, labeled_ratio=1.0)
    data = read_coco(tiny_coco.train_annotations, tiny_coco.train_images, training=True)
    plain = TrainLoader(data, RESIZE, AugmentConfig(), batch_size=4, seed=3, start_step=0, stop_step=6)
    assert only.steps_per_epoch == plain.steps_per_epoch == 3
    for one, two in zip(only, plain, strict=True):
        assert one.images.pixels_BCHW.equal(two.images.pixels_BCHW)
        assert one.targets.boxes_BG4.equal(two.targets.boxes_BG4)


@pytest.mark.parametrize("strong", [True, False])
def test_augmentation_of_the_unlabeled_alone(tiny_coco: Any, pseudo_file: Path, unlabeled: Path, strong: bool) -> None:
    plain = list(loader(tiny_coco, pseudo_file, unlabeled, auto_augment=not strong))
    other = list(loader(tiny_coco, pseudo_file, unlabeled, auto_augment=not strong, auto_augment_unlabeled=strong))
    differ = 0
    for one, two in zip(plain, other, strict=True):
        height, width = one.images.pixels_BCHW.shape[2:]
        assert one.images.pixels_BCHW[:2].equal(two.images.pixels_BCHW[:2, :, :height, :width])
        differ += int(not one.images.pixels_BCHW[2:].equal(two.images.pixels_BCHW[2:]))
    assert differ >= 3


def test_images_with_labels_are_left_out(tiny_coco: Any, pseudo_file: Path, unlabeled: Path, tmp_path: Path) -> None:
    """An evaluation image with the teacher's boxes would be trained on, and a labeled one twice."""
    everything = with_boxes(pseudo_file, unlabeled)
    by_name = {str(record.image_id): record for record in everything.records}
    labeled, evaluated, *rest = by_name.values()
    shutil.copytree(Path(evaluated.path).parent, tmp_path / "copies")
    copy = replace(evaluated, path=str(tmp_path / "copies" / Path(evaluated.path).name))
    found = with_boxes(pseudo_file, unlabeled, labeled=[labeled], evaluated=[copy])
    assert [record.image_id for record in found.records] == [record.image_id for record in rest]
    assert found.tally.describe().startswith("2 images skipped: 1 labeled (first: ")
    assert found.tally.skipped("image", "copies of evaluation images") == 1
    boxes = sum(len(record.labels_N) for record in rest)
    assert found.lines == [f"{pseudo_file}: {boxes} pseudo-boxes in {len(rest)} of the 12 images in {unlabeled}"]
    with pytest.raises(UserError, match=r"unlabeled: .*: no unlabeled image is left: .* labeled .*; give other images"):
        with_boxes(pseudo_file, unlabeled, labeled=everything.records)


def test_shapes_come_along_for_mask_heads(
    mask_file: Path, unlabeled: Path, call: Call, tmp_path: Path, tiny_coco: Any
) -> None:
    flags = [
        "--model",
        str(mask_file),
        "--images",
        str(unlabeled),
        "--output",
        str(tmp_path / "run"),
        "--score_threshold",
    ]
    flags += ["0", "--pseudo_labels", "true", "--threads", "1", "--workers", "0", "--device", "cpu"]
    assert call(predict.main, flags) == 0
    file = tmp_path / "run" / "pseudo_labels.json"
    data = with_boxes(file, unlabeled, masks=True)
    assert data.lines[0].endswith(f" of the 12 images in {unlabeled}")
    for record in data.records:
        assert record.segmentations is not None
        assert len(record.segmentations) == len(record.labels_N) > 0
    content = json.loads(file.read_text())
    for row in content["annotations"]:
        del row["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"pseudo: .*no usable segmentation"):
        with_boxes(tmp_path / "boxes.json", unlabeled, masks=True)


# ---- training


def test_trains_under_a_teacher_on_both(
    settings: Settings,
    arguments: Arguments,
    call: Call,
    tmp_path: Path,
    files_below: Callable[[Path], set[str]],
    training_files: Callable[..., set[str]],
    metrics_of: Callable[[Path], Any],
    pseudo_file: Path,
    unlabeled: Path,
) -> None:
    assert call(train.main, arguments(settings)) == 0
    run = tmp_path / "run"
    files = {name for name in files_below(run) if not name.startswith("pictures/")}
    assert files == training_files("model", "optimizer")
    content = json.loads(pseudo_file.read_text())
    boxes, images = len(content["annotations"]), len(content["images"])
    log = (run / "log.txt").read_text()
    assert f"{pseudo_file}: {boxes} pseudo-boxes in {images} of the 12 images in {unlabeled}" in log
    lines = [line for line in metrics_of(run) if "loss_adl" in line]
    assert len(lines) == 6
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line[f"loss_{name}"] for name in ("cls", "box", "adl")), rel=1e-3)
        assert line["loss_adl"] > 0
    inputs = json.loads((run / "environment.json").read_text())["inputs"]
    assert {"pseudo", "unlabeled", "distill.teacher"} <= inputs.keys()
    assert read_metadata(run / "detector.safetensors", kind="detector")["teacher"]["kind"] == "retinanet"


def test_goes_on_to_the_same_bits(
    settings: Settings, arguments: Arguments, call: Call, tmp_path: Path, metrics_of: Callable[[Path], Any]
) -> None:
    assert call(train.main, arguments(settings, "whole")) == 0
    assert call(train.main, arguments(settings | {"steps": 3}, "parts")) == 0
    assert call(train.main, arguments(settings, "parts")) == 0
    whole, parts = (load_file(tmp_path / name / "detector.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    lines = {line["step"]: line for line in metrics_of(tmp_path / "whole") if "loss_adl" in line}
    assert all(lines[line["step"]] == line for line in metrics_of(tmp_path / "parts") if "loss_adl" in line)


@pytest.mark.slow
def test_two_ranks_train_as_one(settings: Settings, on_one_and_two: Callable[..., Any]) -> None:
    _, lines = on_one_and_two(train.main, "stage2_detect/train.py", settings | {"steps": 4})
    assert sum("loss_adl" in line for line in lines) == 4


@pytest.mark.parametrize("kind", ["gfl", "faster_rcnn"])
def test_other_detectors_and_no_teacher(
    settings: Settings, arguments: Arguments, call: Call, tmp_path: Path, kind: str, train_settings: Settings
) -> None:
    """Pseudo-labels alone, and the student's loss is another than on the labeled images alone."""
    plain = {key: value for key, value in settings.items() if key != "distill"} | {"steps": 2}
    small = {"kind": "gfl", "fpn_channels": 16, "dense": {"convolutions": 1}}
    plain["model"] = small if kind == "gfl" else train_settings["model"]
    assert call(train.main, arguments(plain, "with")) == 0
    assert call(train.main, arguments(plain | {"labeled_ratio": 1.0}, "without")) == 0
    one, two = (load_file(tmp_path / name / "detector.safetensors") for name in ("with", "without"))
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert all(tensor.isfinite().all() for tensor in one.values())


def test_pseudo_labels_that_are_the_truth_train_as_the_truth_does(
    settings: Settings, arguments: Arguments, call: Call, tmp_path: Path, tiny_coco: Any, metrics_of: Callable[..., Any]
) -> None:
    """Half of each batch labeled, the other half by pseudo-labels which are the true boxes: the losses of a batch of those images, all labeled.

    Its images are known, so the losses are computed once more by hand from the initial weights.
    """
    from ssld.stage2_detect.config import TrainConfig
    from ssld.stage2_detect.data.training_data import read_training_data, training_loader
    from ssld.stage2_detect.training.trained_detector import TrainedDetector

    written_again(tiny_coco.train_images, tmp_path / "same")
    changes = {"pseudo": str(tiny_coco.train_annotations), "unlabeled": str(tmp_path / "same"), "distill": None}
    settings = settings | changes | {"steps": 1, "resize": settings["resize"] | {"flip": 0.0}}
    assert call(train.main, arguments(settings)) == 0
    config = TrainConfig(**settings, output=tmp_path / "x")
    data = read_training_data(config)
    (batch,) = training_loader(config, data, start=0, stop=1, rank=0, ranks=1)
    truth = read_coco(tiny_coco.train_annotations, tiny_coco.train_images, training=True)
    by_file = {Path(record.path).name: record for record in truth.images}
    for row, record in enumerate(batch.records):
        same = by_file[Path(record.path).name]
        count = len(same.labels_N)
        np.testing.assert_array_equal(batch.targets.boxes_BG4[row, :count].numpy(), same.boxes_N4)
        assert batch.targets.labels_BG[row, :count].tolist() == same.labels_N.tolist()
    trained = TrainedDetector(config, truth, device=torch.device("cpu"))
    losses = trained.model.train()(batch.images, batch.targets)
    line = next(line for line in metrics_of(tmp_path / "run") if "loss_cls" in line)
    for name, value in losses.items():
        assert line[name] == pytest.approx(value.item(), rel=1e-4)


# ---- users' mistakes


def test_user_errors(
    settings: Settings, arguments: Arguments, user_error: Callable[..., str], tmp_path: Path, pseudo_file: Path
) -> None:
    def message(**changes: Any) -> str:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        return user_error(train.main, arguments(settings | changes, "bad"))

    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "1.png").write_bytes(b"")
    content = json.loads(pseudo_file.read_text())
    without = tmp_path / "without.json"
    without.write_text(json.dumps(content | {"annotations": []}))
    renamed = tmp_path / "renamed.json"
    names = [{"id": 3, "name": "wide"}, {"id": 7, "name": "high"}]
    renamed.write_text(json.dumps(content | {"categories": names}))
    assert f"unlabeled: no images in {tmp_path / 'empty'}" in message(unlabeled=str(tmp_path / "empty"))
    assert f"pseudo: {without}: no image with a usable box in it" in message(pseudo=str(without))
    differ = "its 2 classes differ from the 2 classes of the detector; unknown: high; missing: tall"
    assert f"pseudo: {renamed}: {differ}" in message(pseudo=str(renamed))
    missing = message(unlabeled=str(tmp_path / "other"))
    assert (
        f"pseudo: {len(content['images'])} of the {len(content['images'])} images of {pseudo_file} are missing"
        in missing
    )
    assert "pseudo: " in message(pseudo=str(tmp_path / "nowhere.json"))
    assert "pseudo: has boxes of unlabeled images; give their folder" in message(unlabeled=None)
    both = [str(tmp_path / "empty"), str(tmp_path / "other")]
    assert "unlabeled: with pseudo, give the one folder that the file names" in message(unlabeled=both)
    assert "give pseudo, which ssld predict --pseudo_labels writes" in message(pseudo=None)
    assert "give distill.teacher or pseudo" in message(pseudo=None, distill=None)
    for ratio in (0, -0.5, 1.5):
        assert "labeled_ratio" in message(labeled_ratio=ratio)
    assert "0 labeled and 4 unlabeled images of a batch of 4" in message(labeled_ratio=0.05)
