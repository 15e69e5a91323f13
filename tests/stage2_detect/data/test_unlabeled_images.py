"""Images of a moving teacher: where they come from, which are left out, and the batches and views that are made of them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssld.shared.errors import UserError
from ssld.stage2_detect.augment_config import AugmentConfig, StrongViewConfig
from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.data.coco import CocoData, read_coco
from ssld.stage2_detect.data.loaders import TrainBatch, TrainLoader
from ssld.stage2_detect.data.unlabeled_images import LabeledImages, unlabeled_images
from ssld.stage2_detect.distill_config import MovingTeacherConfig


@pytest.fixture
def train(tiny_coco: Any) -> CocoData:
    return read_coco(tiny_coco.train_annotations, tiny_coco.train_images, training=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven images of 64 x 48 pixels, one of them in a subfolder."""
    draw = np.random.default_rng(5)
    place = tmp_path / "more"
    (place / "deep").mkdir(parents=True)
    for number in range(7):
        image = Image.fromarray(draw.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        image.save(place / ("deep" if number == 3 else "") / f"{number}.png")
    return place


def listed(*sources: Path | str, images: Path | None = None, labeled: Any = (), evaluated: Any = ()) -> Any:
    config = MovingTeacherConfig(unlabeled=[Path(one) for one in sources], images=images)
    known = LabeledImages(labeled, evaluated)
    return unlabeled_images(
        "moving_teacher.unlabeled", config.sources, known, images=config.images, images_setting="moving_teacher.images"
    )


# Sources


def test_sources_of_each_kind_give_the_same_images(folder: Path, tmp_path: Path) -> None:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    (tmp_path / "list.txt").write_text("".join(f"more/{name}\n" for name in names))
    content: dict[str, Any] = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "categories": [],
    }
    (tmp_path / "bare.json").write_text(json.dumps(content))
    content["annotations"] = [{"id": 1}, {"id": 2}]
    (folder / "boxes.json").write_text(json.dumps(content))
    expected = [os.path.realpath(folder / name) for name in names]
    for found in (
        listed(folder),
        listed(f"{folder}/**/*.png"),
        listed(tmp_path / "list.txt"),
        listed(tmp_path / "bare.json", images=folder),
        listed(folder / "boxes.json"),
    ):
        assert [os.path.realpath(one.path) for one in found.records] == expected
        assert all(len(one.boxes_N4) == 0 and (one.width, one.height) == (64, 48) for one in found.records)
        assert found.lines[0].startswith("7 unlabeled images of ")
    assert found.lines[1] == f"{folder / 'boxes.json'}: its 2 annotations are not read"
    assert len({one.image_id for one in found.records}) == 7


def test_labeled_and_evaluated_images_and_repeats_are_left_out(
    tiny_coco: Any, train: CocoData, folder: Path, tmp_path: Path
) -> None:
    val = read_coco(tiny_coco.val_annotations, tiny_coco.val_images, training=False)
    (tmp_path / "link").symlink_to(tiny_coco.train_images, target_is_directory=True)
    found = listed(
        tmp_path / "link",
        folder,
        folder / "1.png",
        tiny_coco.val_images,
        labeled=train.images[:9],
        evaluated=val.images,
    )
    assert len(found.records) == 3 + 7
    assert found.tally.kept("image") == 10
    causes = ("labeled", "given twice", "evaluated on")
    assert [found.tally.skipped("image", cause) for cause in causes] == [9, 1, 5]
    assert found.tally.describe().startswith("15 images skipped: 9 labeled (first: ")
    with pytest.raises(
        UserError,
        match=r"moving_teacher.unlabeled: .*: no unlabeled image is left: 12 images skipped: 12 labeled .*; give other images",
    ):
        listed(tiny_coco.train_images, labeled=train.images)


def test_copies_in_another_folder_are_left_out_whatever_they_are_called(
    tiny_coco: Any, train: CocoData, folder: Path
) -> None:
    val = read_coco(tiny_coco.val_annotations, tiny_coco.val_images, training=False)
    shutil.copy(train.images[0].path, folder / "deep" / "7.png")
    for name, record in (("8.png", val.images[0]), ("9.png", val.images[1])):
        shutil.copy(record.path, folder / name)
    content = bytearray(Path(val.images[2].path).read_bytes())
    content[-1] ^= 1  # another file of equal size
    (folder / "0.png").write_bytes(content)
    found = listed(folder, labeled=train.images, evaluated=val.images)
    assert [Path(one.path).name for one in found.records] == [f"{number}.png" for number in (0, 1, 2, 4, 5, 6, 3)]
    causes = {"copies of labeled images": 1, "copies of evaluation images": 2}
    assert {cause: found.tally.skipped("image", cause) for cause in causes} == causes


def test_unreadable_images_are_counted_and_too_many_stop_the_run(folder: Path) -> None:
    (folder / "1.png").write_bytes(b"no image")
    found = listed(folder)
    assert len(found.records) == 6
    assert (found.unreadable, found.tally.describe()) == (["1.png"], "1 image dropped: 1 unreadable (first: 1.png)")
    (folder / "2.png").write_bytes(b"no image")
    with pytest.raises(
        UserError, match=r"moving_teacher.unlabeled: 2 of the 7 images in .* cannot be read \(first: 1.png\)"
    ):
        listed(folder)


def test_faults_of_sources_are_one_line_each(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.json").write_text("[]")
    (tmp_path / "y.json").write_text('{"images": [{"id": 1}]}')
    (tmp_path / "z.json").write_text('{"images": [{"file_name": "0.png"}, {"file_name": "9.png"}]}')
    (tmp_path / "w.json").write_text('{"images": [{"file_name": "a.png"}, {"file_name": "b.png"}]}')
    (tmp_path / "broken.json").write_text("{")
    (folder / "clip.mp4").write_bytes(b"")
    (tmp_path / "list.txt").write_text("more/clip.mp4\n")
    for source, images, message in (
        (tmp_path / "nowhere", None, "no such image, video, folder or list"),
        (tmp_path / "empty", None, f"no images in {tmp_path / 'empty'}"),
        (tmp_path / "x.json", None, "no COCO JSON: it has no list called images"),
        (tmp_path / "y.json", None, r"images\[0\]: has no file_name"),
        (tmp_path / "broken.json", None, "not valid JSON"),
        (
            tmp_path / "w.json",
            None,
            "2 of the 2 images of .* are missing; .*give their folder as moving_teacher.images",
        ),
        (tmp_path / "z.json", folder, "1 of the 2 images of .* are missing; the first is .*9.png"),
        (tmp_path / "list.txt", None, "1 video in it .first: clip.mp4.; give images"),
    ):
        with pytest.raises(UserError, match=f"^moving_teacher.unlabeled: .*{message}") as error:
            listed(source, images=images)
        assert "\n" not in str(error.value)


# Batches and views


def batches(train: CocoData, folder: Path, *, stop: int = 4, **changes: Any) -> list[TrainBatch]:
    resize = ResizeConfig(train_short_sides=[64, 96], train_long_side=96, short_side=64, long_side=96)
    options: dict[str, Any] = {
        "batch_size": 4,
        "seed": 3,
        "start_step": 0,
        "stop_step": stop,
        "strong": StrongViewConfig(),
    }
    augment = changes.pop("augment", AugmentConfig())
    more = listed(folder).records
    return list(TrainLoader(train, resize, augment, **(options | changes), unlabeled=more))


@pytest.mark.parametrize(("labeled_ratio", "labeled"), [(0.5, 2), (0.25, 1), (0.75, 3)])
def test_batches_have_the_ratio_after_a_burn_in_on_labeled_images(
    train: CocoData, folder: Path, labeled_ratio: float, labeled: int
) -> None:
    made = batches(train, folder, labeled_ratio=labeled_ratio, burn_in=2)
    ids = [[str(record.image_id).startswith("unlabeled/") for record in batch.records] for batch in made]
    assert ids == [[False] * labeled] * 2 + [[False] * labeled + [True] * (4 - labeled)] * 2
    assert [batch.weak is None for batch in made] == [True, True, False, False]
    whole = batches(train, folder, labeled_ratio=labeled_ratio, burn_in=0)
    for batch, other in zip(made, whole, strict=True):  # the burn-in changes nothing for the labeled images
        assert [r.image_id for r in batch.records[:labeled]] == [r.image_id for r in other.records[:labeled]]
        assert torch.equal(batch.targets.boxes_BG4[:labeled], other.targets.boxes_BG4[:labeled])
    assert made[3].targets.labeled_B is not None
    assert made[3].targets.labeled_B.tolist() == [True] * labeled + [False] * (4 - labeled)


def test_both_views_have_one_geometry_and_the_strong_one_other_colors(train: CocoData, folder: Path) -> None:
    augment = AugmentConfig(vertical_flip=0.5, quarter_turns=0.5, crop=0.5, brightness=0.5, erasing=1.0, blur=1.0)
    none = StrongViewConfig(**dict.fromkeys(StrongViewConfig.model_fields, 0.0))
    plain = batches(train, folder, augment=augment, strong=none)
    strong = batches(train, folder, augment=augment)
    brightened = batches(train, folder, augment=augment, strong=StrongViewConfig(**dict(none) | {"brightness": 0.5}))
    for one, two, three in zip(plain, strong, brightened, strict=True):
        assert one.weak is not None
        assert two.weak is not None
        assert torch.equal(one.weak.pixels_BCHW, one.images.pixels_BCHW[2:])
        assert torch.equal(two.weak.pixels_BCHW, one.weak.pixels_BCHW), "the weak view has no changes of colors"
        assert torch.equal(two.weak.sizes_B2, two.images.sizes_B2[2:])
        assert torch.equal(two.weak.scales_B, two.images.scales_B[2:])
        assert two.weak.pixels_BCHW.shape[2:] == two.images.pixels_BCHW.shape[2:]
        assert not torch.equal(two.images.pixels_BCHW[2:], one.images.pixels_BCHW[2:])
        assert torch.equal(two.images.pixels_BCHW[:2], one.images.pixels_BCHW[:2]), (
            "labeled images have their own settings"
        )
        for pixels, weak in zip(three.images.pixels_BCHW[2:], one.weak.pixels_BCHW, strict=True):
            ratio = (pixels.double().sum() / weak.double().sum()).item()
            inside = weak < 160
            assert 0.45 < ratio < 1.55
            np.testing.assert_allclose(
                pixels[inside].numpy(), (weak[inside] * (pixels[inside].sum() / weak[inside].sum())).numpy(), atol=1.5
            )


def test_an_unlabeled_image_has_another_view_in_every_step_and_a_step_is_repeatable(
    train: CocoData, folder: Path
) -> None:
    for path in folder.rglob("*.png"):
        if path.name not in ("0.png", "1.png"):
            path.unlink()
    made = batches(train, folder)
    again = batches(train, folder, start_step=2)
    by_image: dict[Any, set[bytes]] = {}
    for batch in made:
        assert batch.weak is not None
        for record, pixels in zip(batch.records[2:], batch.images.pixels_BCHW[2:], strict=True):
            by_image.setdefault(record.image_id, set()).add(pixels.numpy().tobytes())
    assert [len(views) for views in by_image.values()] == [4, 4]
    for batch, other in zip(made[2:], again, strict=True):
        assert torch.equal(batch.images.pixels_BCHW, other.images.pixels_BCHW)
        assert batch.weak is not None
        assert other.weak is not None
        assert torch.equal(batch.weak.pixels_BCHW, other.weak.pixels_BCHW)


def test_an_unreadable_unlabeled_image_is_replaced_in_both_views(train: CocoData, folder: Path) -> None:
    more = listed(folder).records
    shutil.copy(Path(__file__), more[0].path)
    resize = ResizeConfig(train_short_sides=[48], train_long_side=64, short_side=48, long_side=64)
    none = StrongViewConfig(**dict.fromkeys(StrongViewConfig.model_fields, 0.0))
    options: dict[str, Any] = {"batch_size": 8, "seed": 3, "start_step": 0, "stop_step": 3, "strong": none}
    made = list(TrainLoader(train, resize, AugmentConfig(), **options, unlabeled=more, labeled_ratio=0.25))
    assert any(batch.unreadable for batch in made)
    for batch in made:
        assert more[0].image_id not in [record.image_id for record in batch.records]
        assert batch.weak is not None
        assert torch.equal(batch.weak.pixels_BCHW, batch.images.pixels_BCHW[2:])
