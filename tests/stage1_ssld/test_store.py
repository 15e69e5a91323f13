"""A finished store: answers are those of the live teacher to the same views, and whatever does not fit is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml

import stage1_ssld.store as store_module
from shared.backbones import input_settings, save_backbone
from shared.errors import UserError
from shared.images import UnreadableImage
from shared.teacher import FrozenTeacher
from stage1_ssld.data import TrainViews, make_loader
from stage1_ssld.data_config import DataConfig, SourceConfig
from stage1_ssld.sources import ImageSource, open_sources
from stage1_ssld.store import SoftLabelStore, header_checksum, source_record, view_settings
from stage1_ssld.views import training_view
from stage1_ssld.write_soft_labels import main

VIEW = {"image_size": 32, "augment": "rand-m5-n1", "erase": 0.2}


@pytest.fixture(scope="module")
def images(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `labelled` (30) and `others` (15, one of them unreadable), apart from those of other tests."""
    folder = tmp_path_factory.mktemp("images")
    shutil.copytree(tiny.train, folder / "labelled")
    shutil.copytree(tiny.unlabelled, folder / "others")
    (folder / "others" / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def written(images: Path, teacher_file: Path, tmp_path_factory: pytest.TempPathFactory, call: Any) -> Path:
    """A store of 3 views of 45 images in files of 16."""
    folder = tmp_path_factory.mktemp("written")
    settings = {
        "output": str(folder / "run"),
        "data": {"train": [str(images / "labelled"), str(images / "others")], **VIEW},
        "teacher": {"model": str(teacher_file)},
        **{"views": 3, "top": 2, "seed": 5, "shard_images": 16, "batch_size": 10},
        **{"threads": 1, "workers": 0, "device": "cpu"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    assert call(main, ["--config", str(folder / "run.yaml")]) == 0
    return folder / "run" / "store"


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    """A store to damage."""
    shutil.copytree(written, tmp_path / "run" / "store")
    return tmp_path / "run" / "store"


@pytest.fixture
def data(images: Path) -> DataConfig:
    """The settings it was written with, sources the other way round."""
    return DataConfig(train=[str(images / "others"), str(images / "labelled")], **VIEW)


def edit_header(store: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what store.json says, and its checksum with it."""
    header = json.loads((store / "store.json").read_text())
    change(header)
    (store / "store.json").write_text(json.dumps(header | {"sha256": header_checksum(header)}))


# ---- answers


def test_answers_are_the_teachers_to_the_same_views(written: Path, data: DataConfig, teacher_file: Path) -> None:
    store, sources = SoftLabelStore(written), open_sources(data.train, "data.train")
    assert (store.views, store.top, store.num_classes, store.seed) == (3, 2, 3, 5)
    assert store.class_names == ["disc", "ring", "stripes"]
    store.match(sources, data)
    assert [source.number for source in sources] == [1, 0]
    teacher, seen = FrozenTeacher(str(teacher_file)), 0
    for source in sources:
        for row in range(len(source)):
            for view in range(3):
                try:
                    image = source.read(row)
                except UnreadableImage:
                    with pytest.raises(UnreadableImage, match="was unreadable when the store was written"):
                        store.answer(source.number, row, view)
                    continue
                pixels = training_view(image, source.key(row), view, data, seed=5)
                expected = F.log_softmax(teacher(pixels[None]), dim=-1)[0]
                answer = store.answer(source.number, row, view)
                best = expected.topk(2)
                assert answer.classes_m.tolist() == best.indices.tolist()
                np.testing.assert_allclose(answer.log_probs_m.astype(np.float64), best.values.numpy(), 1e-3, 1e-4)
                assert answer.log_rest == pytest.approx(expected.min().item(), rel=1e-4)
                seen += 1
    assert seen == 44 * 3


def test_training_views_are_those_of_the_store(written: Path, data: DataConfig) -> None:
    """Pass 4 sees view 1, from the store's seed; an image that had no answer is replaced by the next."""
    store, sources = SoftLabelStore(written), open_sources(data.train, "data.train")
    store.match(sources, data)
    views = TrainViews(sources, [None, None], data, seed=77, store=store)
    view = views[(len(sources[0]) + 4, 4)]  # row 4 of the second source, number 0 of the store
    pixels = training_view(sources[1].read(4), sources[1].key(4), 1, data, seed=5)
    assert view.pixels_CHW is not None
    assert torch.equal(view.pixels_CHW, pixels)
    assert view.answer is not None
    assert view.answer.log_rest == store.answer(0, 4, 1).log_rest
    broken = next(row for row in range(15) if sources[0].location(row).endswith("broken.png"))
    view = views[(broken, 0)]
    assert view.unreadable == [sources[0].location(broken)]
    assert view.key == sources[0].key(broken + 1)
    assert view.answer is not None
    assert view.answer.log_rest == store.answer(1, broken + 1, 0).log_rest


def test_an_image_that_became_readable_has_no_answer_still(
    written: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, sources = SoftLabelStore(written), open_sources(data.train, "data.train")
    store.match(sources, data)
    monkeypatch.setattr(ImageSource, "read", lambda source, row: torch.zeros(3, 40, 40, dtype=torch.uint8))
    broken = next(row for row in range(15) if sources[0].location(row).endswith("broken.png"))
    assert TrainViews(sources, [None, None], data, 0, store)[(broken, 0)].key == sources[0].key(broken + 1)


def test_loader_processes_read_it_too(written: Path, data: DataConfig) -> None:
    store, sources = SoftLabelStore(written), open_sources(data.train, "data.train")
    store.match(sources, data)
    store.answer(0, 0, 0)  # one map is open before the workers start
    views = TrainViews(sources, [None, None], data, seed=0, store=store)
    order = [[(13, 0), (15, 1)], [(30, 2), (44, 5)]]
    ours, theirs = (list(make_loader(views, order, workers=workers, pin_memory=False)) for workers in (0, 1))
    for a, b in zip(ours, theirs, strict=True):
        assert a.soft is not None
        assert b.soft is not None
        assert torch.equal(a.pixels_BCHW, b.pixels_BCHW)
        assert torch.equal(a.soft.classes_Bm, b.soft.classes_Bm)
        assert torch.equal(a.soft.log_probs_Bm, b.soft.log_probs_Bm)
        assert torch.equal(a.soft.log_rest_B, b.soft.log_rest_B)
        assert a.soft.classes_Bm.dtype == torch.int64
        assert a.soft.log_probs_Bm.dtype == torch.float32


def test_only_so_many_files_are_open(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many, few = SoftLabelStore(written), SoftLabelStore(written)
    monkeypatch.setattr(store_module, "_OPEN_SHARDS", 1)
    for row in (0, 17, 29, 1, 18, 2):
        assert few.answer(0, row, 1).log_probs_m.tolist() == many.answer(0, row, 1).log_probs_m.tolist()
        assert len(few._shards) == 1


def test_one_source_of_several_is_enough(written: Path, data: DataConfig, images: Path) -> None:
    sources = [ImageSource(SourceConfig(path=str(images / "others"), labels="none"), 0)]
    SoftLabelStore(written).match(sources, data)
    assert sources[0].number == 1


def test_a_folder_that_has_moved_is_known_by_its_files(written: Path, data: DataConfig, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(data.train[0].path, moved)  # keeps the times, as moving does
    sources = [ImageSource(SourceConfig(path=str(moved)), 0)]
    SoftLabelStore(written).match(sources, data)
    assert sources[0].number == 1


# ---- what does not fit


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("image_size", 40, "32, here it is 40"),
        ("crop_area", (0.5, 1.0), "[0.08, 1.0], here it is [0.5, 1.0]"),
        ("crop_ratio", (1.0, 1.0), "[0.75, 1.3333333333333333], here it is [1.0, 1.0]"),
        ("interpolation", "bicubic", '"bilinear", here it is "bicubic"'),
        ("flip", 0.0, "0.5, here it is 0.0"),
        ("augment", None, '"rand-m5-n1", here it is null'),
        ("augment_probability", 0.5, "1.0, here it is 0.5"),
        ("erase", 0.0, "0.2, here it is 0.0"),
        ("train_view", "center", '"random", here it is "center"'),
    ],
)
def test_other_views(written: Path, data: DataConfig, key: str, value: Any, shown: str) -> None:
    with pytest.raises(UserError) as error:
        SoftLabelStore(written).match([], data.model_copy(update={key: value}))
    assert str(error.value) == (
        f"store {written}: was written with data.{key} {shown}; set it back, or write another store"
    )


def test_views_are_bound_to_what_they_depend_on(written: Path, data: DataConfig) -> None:
    """Training crops do not depend on the evaluation crop, and the other way round."""
    SoftLabelStore(written).match([], data.model_copy(update={"val_crop": 0.5}))
    center = data.model_copy(update={"train_view": "center"})
    assert set(view_settings(center)) == {"image_size", "train_view", "interpolation", "val_crop"}


def test_a_source_that_is_not_in_the_store(written: Path, data: DataConfig, tiny: Any) -> None:
    with pytest.raises(UserError, match=r": has no answers for .*/val; it was written for .*/labelled, .*/others$"):
        SoftLabelStore(written).match([ImageSource(SourceConfig(path=str(tiny.val)), 0)], data)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda folder: (folder / "new.png").write_bytes(b"x"), "rows was 15 and is 16"),
        (lambda folder: (folder / "broken.png").rename(folder / "zebra.png"), "its files have changed"),
        (lambda folder: (folder / "broken.png").write_bytes(b"other"), "its files have changed"),
    ],
)
def test_a_source_that_has_changed(
    written: Path, data: DataConfig, tmp_path: Path, change: Callable[[Path], Any], what: str
) -> None:
    folder = Path(data.train[0].path)
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    try:
        change(folder)
        with pytest.raises(UserError) as error:
            SoftLabelStore(written).match([ImageSource(data.train[0], 0)], data)
    finally:
        shutil.rmtree(folder)
        shutil.move(kept, folder)
    assert str(error.value) == (
        f"store {written}: {folder} is not what it was written for: {what}; write another store"
    )


def test_files_of_a_pattern_are_known_by_their_names(data: DataConfig, tmp_path: Path) -> None:
    """There is no digest of the files: they may lie elsewhere."""
    shutil.copytree(data.train[1].path, tmp_path / "images")
    source = SourceConfig(path=str(tmp_path / "images" / "*" / "*.png"))
    before = source_record(ImageSource(source, 0))
    assert before == source_record(ImageSource(source, 1))
    assert before["digest"] is None
    (tmp_path / "images" / "disc" / "disc_003.png").rename(tmp_path / "images" / "disc" / "new.png")
    after = source_record(ImageSource(source, 0))
    assert {key for key in before if before[key] != after[key]} == {"names"}


def test_views_that_come_out_differently_here(copy: Path, data: DataConfig) -> None:
    def change(header: dict[str, Any]) -> None:
        assert len(header["replayed"]) == 8
        header["replayed"][6][3] = "0" * 16
        header["versions"]["pillow"] = "1.0"

    edit_header(copy, change)
    store, sources = SoftLabelStore(copy), open_sources(data.train, "data.train")
    with pytest.raises(
        UserError, match=r"store .*: view \d of .* is not the one its answer was written for; .*pillow 1\.0 then, 1\d"
    ):
        store.match(sources, data)


def test_other_versions_are_told(copy: Path, written: Path, data: DataConfig) -> None:
    assert SoftLabelStore(written).note() is None
    edit_header(copy, lambda header: header["versions"].update(timm="0.9"))
    store = SoftLabelStore(copy)
    store.match(open_sources(data.train, "data.train"), data)
    note = store.note()
    assert note is not None
    assert note.startswith(f"store {copy}: written with timm 0.9 then, 1.")


def test_another_teacher(written: Path, teacher_file: Path, tmp_path: Path) -> None:
    store = SoftLabelStore(written)
    store.check_teacher(FrozenTeacher(str(teacher_file)))
    assert store.facts() == FrozenTeacher(str(teacher_file)).facts()
    torch.manual_seed(1)
    net: Any = timm.create_model("test_resnet", num_classes=3)
    other = tmp_path / "other.safetensors"
    save_backbone(other, net, arch="test_resnet", inputs=input_settings(net, {}), classes=3)
    with pytest.raises(UserError) as error:
        store.check_teacher(FrozenTeacher(str(other)))
    assert str(error.value) == (
        f"store {written}: holds the answers of {teacher_file}, not of {other}: other weights; give that teacher, or none"
    )


@pytest.mark.parametrize(
    ("change", "key", "here"),
    [({"size": 48}, "size null", "[48, 48]"), ({"dtype": torch.bfloat16}, 'precision "fp32"', '"bf16"')],
)
def test_the_same_teacher_otherwise(
    written: Path, teacher_file: Path, change: dict[str, Any], key: str, here: str
) -> None:
    """The same weights answer otherwise at another size or precision."""
    store = SoftLabelStore(written)
    assert store.header["teacher_settings"] == {"size": None, "precision": "fp32"}
    assert store.teacher_precision == "fp32"
    with pytest.raises(UserError) as error:
        store.check_teacher(FrozenTeacher(str(teacher_file), **change))
    assert str(error.value) == (
        f"store {written}: its answers are those of a teacher with {key}, here it is {here}; "
        f"set teacher.{next(iter(key.split()))} as it was, give no teacher, or write another store"
    )


# ---- damage


def test_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^.*/nothing: holds no store\.json: not a store$"):
        SoftLabelStore(tmp_path / "nothing")


def test_an_unfinished_store(copy: Path) -> None:
    (copy / "store.json").unlink()
    with pytest.raises(UserError, match=r"/store: is unfinished: run write_soft_labels\.py again$"):
        SoftLabelStore(copy)


def test_a_header_that_is_not_json(copy: Path) -> None:
    (copy / "store.json").write_text("{")
    with pytest.raises(UserError, match=r"store\.json: not readable \(.*\); write the store again$"):
        SoftLabelStore(copy)


@pytest.mark.parametrize("content", ["[]", '{"format": 7}', "3"])
def test_a_header_of_another_format(copy: Path, content: str) -> None:
    (copy / "store.json").write_text(content)
    with pytest.raises(UserError, match=r"/store: a store of format (7|None), this version reads 2; write it again$"):
        SoftLabelStore(copy)


def test_a_header_that_was_edited(copy: Path) -> None:
    text = (copy / "store.json").read_text()
    (copy / "store.json").write_text(text.replace('"seed": 5', '"seed": 6'))
    with pytest.raises(UserError, match=r"store\.json: does not match its checksum; put back what was written"):
        SoftLabelStore(copy)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (Path.unlink, "is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "has another size than it was written with"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"?"), "does not match its checksum"),
    ],
)
def test_a_damaged_shard(copy: Path, damage: Callable[[Path], Any], what: str) -> None:
    file = copy / "shard-00001.bin"
    damage(file)
    with pytest.raises(UserError) as error:
        SoftLabelStore(copy)
    assert str(error.value) == (
        f"store {copy}: {file}: {what}; delete that file and {copy.parent / 'result.json'}, and run write_soft_labels.py again"
    )


def test_ranks_share_the_reading_and_tell_the_same(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "shard-00001.bin").unlink()
    monkeypatch.setattr(store_module, "world_size", lambda: 2)
    SoftLabelStore(copy)  # rank 0 reads the other two
    monkeypatch.setattr(store_module, "gather_lists", lambda found: [*found, "what rank 1 found"])
    with pytest.raises(UserError, match=r"/store: what rank 1 found; delete that file"):
        SoftLabelStore(copy)
