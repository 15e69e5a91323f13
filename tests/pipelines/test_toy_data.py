"""The synthetic data set: the same bytes for the same seed, readable by the libraries, COCO annotations that fit the images, safe writing."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssld.pipelines import toy_data
from ssld.pipelines.toy_data import ToyDataConfig, ToySizes, main, write_toy_data
from ssld.pipelines.toy_drawing import CLASSES, CROP_SIZE, SCENE_SIZE, Thing, draw_crop, draw_scene
from ssld.shared.errors import UserError

TINY = ToySizes(labeled=20, unlabeled=24, teacher_train=30, val=10, train_scenes=8, val_scenes=6)
PARTS = ("train", "val")
# pycocotools' decoder has not followed NumPy 2's `__array__`.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    assert write_toy_data(folder, seed=3, sizes=TINY)
    return folder


@pytest.fixture(scope="module", params=PARTS)
def coco(toy: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((toy / "stage2" / f"{request.param}.json").read_text())
    return content | {"part": request.param}


def test_same_seed_same_bytes_and_another_seed_other_bytes(toy: Path, tmp_path: Path) -> None:
    write_toy_data(tmp_path / "again", seed=3, sizes=TINY)
    assert digests(tmp_path / "again") == digests(toy)
    write_toy_data(tmp_path / "other", seed=4, sizes=TINY)
    other = digests(tmp_path / "other")
    assert set(other) == set(digests(toy))
    assert not set(other.values()) & set(digests(toy).values())


def test_larger_parts_begin_with_the_smaller_ones(toy: Path, tmp_path: Path) -> None:
    write_toy_data(tmp_path / "more", seed=3, sizes=TINY.model_copy(update={"labeled": 30, "unlabeled": 25}))
    more = digests(tmp_path / "more" / "stage1")
    kept = {name: code for name, code in digests(toy / "stage1").items() if name.endswith(".jpg")}
    assert kept.items() <= more.items()


def test_no_image_is_in_two_places(toy: Path) -> None:
    import pyarrow.parquet as pq

    codes = [code for name, code in digests(toy).items() if name.endswith(".jpg")]
    images = pq.read_table(toy / "stage1" / "teacher_train.parquet").column("image").to_pylist()
    codes += [hashlib.sha256(image["bytes"]).hexdigest() for image in images]
    assert len(codes) == sum(TINY.model_dump().values())
    assert len(set(codes)) == len(codes)


def test_crops_per_class(toy: Path) -> None:
    assert 8 <= len(CLASSES) <= 10
    for part, count in (("labeled", 2), ("val", 1)):
        folders = {folder.name: list(folder.iterdir()) for folder in (toy / "stage1" / part).iterdir()}
        assert set(folders) == set(CLASSES)
        assert {len(files) for files in folders.values()} == {count}
    unlabeled = list((toy / "stage1" / "unlabeled").iterdir())
    assert len(unlabeled) == 24
    assert not any(name in path.name for name in CLASSES for path in unlabeled)
    with Image.open(unlabeled[0]) as image:
        assert image.size == (CROP_SIZE, CROP_SIZE)


def test_every_class_is_its_own_shape_and_texture() -> None:
    assert len(set(CLASSES.values())) == len(CLASSES)
    assert list(CLASSES) == sorted(CLASSES), "a folder of folders would number them differently"
    shapes, textures = zip(*CLASSES.values(), strict=True)
    for one in (*shapes, *textures):
        assert (*shapes, *textures).count(one) == 2, f"{one} alone must not give the class away"


def test_parquet_reads_with_datasets_and_pyarrow(toy: Path, tmp_path: Path) -> None:
    import datasets
    import pyarrow.parquet as pq

    file = toy / "stage1" / "teacher_train.parquet"
    data = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path))
    assert data.features == datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    assert len(data) == 30
    assert data[0]["image"].size == (CROP_SIZE, CROP_SIZE)
    assert sorted(data["label"]) == sorted(list(range(10)) * 3)
    rows = pq.read_table(file).to_pylist()
    with Image.open(io.BytesIO(rows[7]["image"]["bytes"])) as image:
        assert image.format == "JPEG"
    assert rows[7]["label"] == 7


def test_coco_files_have_what_makes_them_hard_to_read(toy: Path) -> None:
    for part in PARTS:
        content = json.loads((toy / "stage2" / f"{part}.json").read_text())
        annotations = content["annotations"]
        ids = sorted(category["id"] for category in content["categories"])
        assert len(ids) == len(CLASSES)
        assert ids != list(range(ids[0], ids[0] + len(ids))), "category ids without a hole"
        assert {row["id"] for row in content["images"]} - {row["image_id"] for row in annotations}, "no empty image"
        assert sum(row["iscrowd"] for row in annotations) >= 1
        assert any(isinstance(row["segmentation"], dict) and not row["iscrowd"] for row in annotations)
        assert any(isinstance(row["segmentation"], list) for row in annotations)


def test_scenes_and_annotations_refer_to_each_other(coco: dict[str, Any], toy: Path) -> None:
    images = {row["id"]: row for row in coco["images"]}
    assert len(images) == len(coco["images"]) == getattr(TINY, f"{coco['part']}_scenes")
    for row in images.values():
        with Image.open(toy / "stage2" / coco["part"] / row["file_name"]) as image:
            assert image.size == (row["width"], row["height"]) == (SCENE_SIZE, SCENE_SIZE)
    names = {row["id"]: row["name"] for row in coco["categories"]}
    assert list(names.values()) == list(CLASSES)
    assert len({row["id"] for row in coco["annotations"]}) == len(coco["annotations"])
    assert all(row["image_id"] in images and row["category_id"] in names for row in coco["annotations"])
    each = [sum(row["image_id"] == image and not row["iscrowd"] for row in coco["annotations"]) for image in images]
    assert max(each) <= toy_data.MAX_OBJECTS


def test_boxes_are_inside_and_enclose_their_masks(coco: dict[str, Any]) -> None:
    from pycocotools import mask as codec

    for row in coco["annotations"]:
        left, top, width, height = row["bbox"]
        assert left >= 0
        assert top >= 0
        assert width >= 4
        assert height >= 4
        assert left + width <= SCENE_SIZE + 1e-9
        assert top + height <= SCENE_SIZE + 1e-9
        code = codec.frPyObjects(row["segmentation"], SCENE_SIZE, SCENE_SIZE)
        mask = codec.decode(codec.merge(code) if isinstance(code, list) else code)
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        visible = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        edges = np.array([left, top, left + width, top + height])
        if isinstance(row["segmentation"], list):
            # The box is the outline's own; its raster loses the tips of sharp corners but never sticks out.
            corners = np.reshape(row["segmentation"], (-1, 2))
            assert edges == pytest.approx([*corners.min(0), *corners.max(0)], abs=0.011)
            assert ((edges - visible) * [1, 1, -1, -1]).max() <= 1
            assert np.abs(edges - visible).max() <= 4
        else:
            assert np.abs(edges - visible).max() == 0
        assert row["area"] == pytest.approx(mask.sum(), rel=0.1)


def test_pycocotools_reads_the_file_and_rates_it_perfect(coco: dict[str, Any], toy: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(str(toy / "stage2" / f"{coco['part']}.json"))
    results = [row | {"score": 1.0} for row in coco["annotations"] if not row["iscrowd"]]
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_foreign_things_carry_no_label() -> None:
    counts = []
    for number in range(20):
        _, things = draw_scene(np.random.default_rng(number), 2)
        assert all(thing.name in CLASSES for thing in things)
        counts.append(len(things))
    assert max(counts) <= 2
    assert draw_scene(np.random.default_rng(0), 0)[1] == []
    assert draw_crop(np.random.default_rng(0), None).shape == (CROP_SIZE, CROP_SIZE, 3)


def test_objects_of_scenes_are_not_hidden() -> None:
    for number in range(20):
        _, things = draw_scene(np.random.default_rng(number), 5, crowd=number % 4 == 0)
        for thing in things:
            assert thing.visible_HW.sum() >= 0.5 * thing.area


def test_covered_or_cut_objects_are_not_whole() -> None:
    square = np.zeros((8, 8), dtype=bool)
    square[2:6, 2:6] = True
    outline = np.array([[2.0, 2], [6, 2], [6, 6], [2, 6]])
    assert Thing("a", outline, square.copy()).whole
    assert not Thing("a", outline - 3, square.copy()).whole
    covered = Thing("a", outline, square.copy())
    covered.visible_HW[2, 2] = False
    assert not covered.whole


@pytest.mark.parametrize("pixels", ["", "0", "1", "0110", "1001", "1111", "0000"])
def test_run_lengths_are_those_of_coco(pixels: str) -> None:
    from pycocotools import mask as codec

    mask = np.zeros((2, 2), dtype=bool)
    mask.T.flat[: len(pixels)] = [pixel == "1" for pixel in pixels]
    code = toy_data._run_lengths(mask)
    assert sum(code["counts"]) == 4
    decoded = codec.decode(codec.frPyObjects(code, 2, 2))
    assert (decoded == mask).all()


def test_finished_data_is_left_untouched(toy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in toy.rglob("*")}
    assert not write_toy_data(toy, seed=3, sizes=TINY)
    assert {path: path.stat().st_mtime_ns for path in toy.rglob("*")} == before


def test_other_parameters_are_refused(toy: Path) -> None:
    with pytest.raises(UserError, match=r"toy_data\.json: was drawn with other parameters \(seed\)"):
        write_toy_data(toy, seed=4, sizes=TINY)


def test_foreign_folders_are_not_touched(tmp_path: Path) -> None:
    mine = tmp_path / "stage1" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(UserError, match="stage1: exists, but"):
        write_toy_data(tmp_path, sizes=TINY)
    assert mine.read_text() == "mine"


def test_interrupted_writing_leaves_nothing(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(toy_data, "draw_scene", interrupt)
        with pytest.raises(SystemExit):
            write_toy_data(tmp_path, seed=3, sizes=TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_killed_writing_starts_over(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int) -> None:
    """A killed call leaves moved folders behind: they are replaced."""
    rename = Path.rename
    moves: list[Path] = []

    def die(path: Path, target: Path) -> Path:
        if len(moves) == moved:
            raise SystemExit
        moves.append(path)
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(SystemExit):
            write_toy_data(tmp_path, seed=3, sizes=TINY)
    assert not (tmp_path / "toy_data.json").exists()
    assert write_toy_data(tmp_path, seed=3, sizes=TINY)
    assert digests(tmp_path) == digests(toy)


def test_command(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], user_error: Callable[..., str]) -> None:
    output = ["--output", str(tmp_path / "toy")]
    sizes = [f"--sizes.{key}={value}" for key, value in TINY.model_dump().items()]
    assert main([*output, "--seed", "3", *sizes]) == 0
    assert "drawn: 20 labeled, 24 unlabeled" in capsys.readouterr().out
    assert digests(tmp_path / "toy" / "stage2") == digests(toy / "stage2")
    record = json.loads((tmp_path / "toy" / "result.json").read_text())
    assert record["metrics"]["classes"] == len(CLASSES)
    assert main([*output, "--seed", "3", *sizes]) == 0
    assert "is finished; nothing to do" in capsys.readouterr().out
    assert "holds a run with another configuration" in user_error(main, [*output, "--seed", "4", *sizes])
    assert "did you mean '--sizes.labeled'" in user_error(main, [*output, "--sizes.labelt", "9"])


def test_defaults_suit_the_pipeline() -> None:
    sizes = ToyDataConfig(output=Path("x")).sizes
    assert sizes.val_scenes >= 200
    assert sizes.unlabeled > 3 * sizes.labeled


def test_help_claims_no_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert " %" not in capsys.readouterr().out
