"""A store with other views, sources, versions or teachers than it was written with: whatever does not fit is named; which views are replayed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from ssld.shared.errors import UserError
from ssld.shared.models.backbones import input_settings, save_backbone
from ssld.shared.models.teacher import FrozenTeacher
from ssld.stage1_ssld.data.sources import ImageSource, open_sources
from ssld.stage1_ssld.data_config import DataConfig, SourceConfig
from ssld.stage1_ssld.distillation.soft_label_store import (
    SoftLabelStore,
    header_checksum,
    replayed_rows,
    source_record,
    view_settings,
)


def edit_header(store: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change store.json, and its checksum with it."""
    header = json.loads((store / "store.json").read_text())
    change(header)
    (store / "store.json").write_text(json.dumps(header | {"sha256": header_checksum(header)}))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("image_size", 40, "32, but this run has 40"),
        ("crop_area", (0.5, 1.0), "[0.08, 1.0], but this run has [0.5, 1.0]"),
        ("crop_ratio", (1.0, 1.0), "[0.75, 1.3333333333333333], but this run has [1.0, 1.0]"),
        ("interpolation", "bicubic", '"bilinear", but this run has "bicubic"'),
        ("flip", 0.0, "0.5, but this run has 0.0"),
        ("augment", None, '"rand-m5-n1", but this run has null'),
        ("augment_probability", 0.5, "1.0, but this run has 0.5"),
        ("erase", 0.0, "0.2, but this run has 0.0"),
        ("train_view", "center", '"random", but this run has "center"'),
    ],
)
def test_other_views(written_store: Path, store_data: DataConfig, key: str, value: Any, expected: str) -> None:
    with pytest.raises(UserError) as error:
        SoftLabelStore(written_store).match([], store_data.model_copy(update={key: value}))
    assert str(error.value) == (
        f"store {written_store}: was written with data.{key} {expected}; set it back, or write another store"
    )


def test_views_are_bound_to_what_they_depend_on(written_store: Path, store_data: DataConfig) -> None:
    """Training crops do not depend on the evaluation crop, and the other way round."""
    SoftLabelStore(written_store).match([], store_data.model_copy(update={"val_crop": 0.5}))
    center = store_data.model_copy(update={"train_view": "center"})
    assert set(view_settings(center)) == {"image_size", "train_view", "interpolation", "val_crop"}


def test_a_source_that_is_not_in_the_store(written_store: Path, store_data: DataConfig, tiny: Any) -> None:
    with pytest.raises(UserError, match=r": has no soft labels for .*/val; it was written for .*/labeled, .*/others$"):
        SoftLabelStore(written_store).match([ImageSource(SourceConfig(path=str(tiny.val)), 0)], store_data)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda folder: (folder / "new.png").write_bytes(b"x"), "rows was 15 and is 16"),
        (lambda folder: (folder / "broken.png").rename(folder / "zebra.png"), "its files have changed"),
        (lambda folder: (folder / "broken.png").write_bytes(b"other"), "its files have changed"),
    ],
)
def test_a_source_that_has_changed(
    written_store: Path, store_data: DataConfig, tmp_path: Path, change: Callable[[Path], Any], what: str
) -> None:
    folder = Path(store_data.train[0].path)
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    try:
        change(folder)
        with pytest.raises(UserError) as error:
            SoftLabelStore(written_store).match([ImageSource(store_data.train[0], 0)], store_data)
    finally:
        shutil.rmtree(folder)
        shutil.move(kept, folder)
    assert str(error.value) == (
        f"store {written_store}: {folder} has changed since the store was written: {what}; write another store"
    )


def test_files_of_a_pattern_are_known_by_their_names(store_data: DataConfig, tmp_path: Path) -> None:
    """There is no digest of the files: they may lie elsewhere."""
    shutil.copytree(store_data.train[1].path, tmp_path / "images")
    source = SourceConfig(path=str(tmp_path / "images" / "*" / "*.png"))
    before = source_record(ImageSource(source, 0))
    assert before == source_record(ImageSource(source, 1))
    assert before["digest"] is None
    (tmp_path / "images" / "disc" / "disc_003.png").rename(tmp_path / "images" / "disc" / "new.png")
    after = source_record(ImageSource(source, 0))
    assert {key for key in before if before[key] != after[key]} == {"names"}


def test_views_that_come_out_differently_here(store_copy: Path, store_data: DataConfig) -> None:
    def change(header: dict[str, Any]) -> None:
        assert len(header["replayed"]) == 8
        header["replayed"][6][3] = "0" * 16
        header["versions"]["pillow"] = "1.0"

    edit_header(store_copy, change)
    store, sources = SoftLabelStore(store_copy), open_sources(store_data.train, "data.train")
    with pytest.raises(
        UserError,
        match=r"store .*: view \d of .* differs from the one its soft label was written for; .*pillow 1\.0 then, 1\d",
    ):
        store.match(sources, store_data)


@pytest.mark.parametrize(("sizes", "count"), [([100], 8), ([5, 100], 8), ([3, 4, 5], 9), ([1] * 12, 12), ([2], 8)])
def test_replayed_views_are_of_every_source(sizes: list[int], count: int) -> None:
    class Source:
        def __init__(self, number: int, size: int) -> None:
            self.number, self.size = number, size

        def __len__(self) -> int:
            return self.size

    sources: Any = [Source(number, size) for number, size in enumerate(sizes)]
    chosen = replayed_rows(sources, views=4)
    assert len(set(chosen)) == len(chosen) == count
    assert {number for number, _, _ in chosen} == set(range(len(sizes)))
    assert all(row < sizes[number] and view < 4 for number, row, view in chosen)


def test_other_versions_are_told(store_copy: Path, written_store: Path, store_data: DataConfig) -> None:
    assert list(SoftLabelStore(written_store).notes()) == []
    edit_header(store_copy, lambda header: header["versions"].update(timm="0.9"))
    store = SoftLabelStore(store_copy)
    store.match(open_sources(store_data.train, "data.train"), store_data)
    (note,) = store.notes()
    assert note.startswith(f"store {store_copy}: written with timm 0.9 then, 1.")


def test_what_an_earlier_version_did_not_record(store_copy: Path, teacher_file: Path) -> None:
    def make_old(header: dict[str, Any]) -> None:
        del header["teacher_settings"]["mean"], header["teacher_settings"]["std"]

    edit_header(store_copy, make_old)
    store = SoftLabelStore(store_copy)
    store.check_teacher(FrozenTeacher(str(teacher_file)))
    (note,) = store.notes()
    assert "did not record mean and std" in note


@pytest.mark.parametrize(
    ("size", "warns"), [(None, True), ([None, None], True), ([64, 64], False), ([[64, 64], [64, 64]], False)]
)
def test_prototypes_at_another_size_than_their_own(store_copy: Path, size: Any, warns: bool) -> None:
    """A header without a size is of a version that showed prototypes the views as they are; one or several networks."""

    def make_prototypes(header: dict[str, Any]) -> None:
        header["class_names"] = [f"prototype {number}" for number in range(3)]
        header["teacher_settings"]["size"] = size

    edit_header(store_copy, make_prototypes)
    notes = list(SoftLabelStore(store_copy).notes())
    assert len(notes) == warns
    assert all("prototypes saw views of 32 px as they are" in note for note in notes)


def test_another_teacher(written_store: Path, teacher_file: Path, tmp_path: Path) -> None:
    store = SoftLabelStore(written_store)
    store.check_teacher(FrozenTeacher(str(teacher_file)))
    assert store.facts() == FrozenTeacher(str(teacher_file)).facts()
    torch.manual_seed(1)
    net: Any = timm.create_model("test_resnet", num_classes=3)
    other = tmp_path / "other.safetensors"
    save_backbone(other, net, arch="test_resnet", inputs=input_settings(net, {}), classes=3)
    with pytest.raises(UserError) as error:
        store.check_teacher(FrozenTeacher(str(other)))
    assert str(error.value) == (
        f"store {written_store}: holds the soft labels of {teacher_file}, not of {other}: other weights; give that teacher, or none"
    )


def test_a_size_that_is_that_of_the_views_changes_nothing(written_store: Path, teacher_file: Path) -> None:
    """Null in an older store, and a number now, as of prototypes: the pixels are the same."""
    store = SoftLabelStore(written_store)
    assert store.header["teacher_settings"]["size"] is None
    store.check_teacher(FrozenTeacher(str(teacher_file), size=store.header["view"]["image_size"]))


@pytest.mark.parametrize(
    ("change", "key", "local"),
    [({"size": 48}, "size null", "[48, 48]"), ({"dtype": torch.bfloat16}, 'precision "fp32"', '"bf16"')],
)
def test_the_same_teacher_otherwise(
    written_store: Path, teacher_file: Path, change: dict[str, Any], key: str, local: str
) -> None:
    """The same weights give other logits at another size or precision."""
    store = SoftLabelStore(written_store)
    settings = {key: store.header["teacher_settings"][key] for key in ("size", "precision")}
    assert settings == {"size": None, "precision": "fp32"}
    assert store.teacher_precision == "fp32"
    with pytest.raises(UserError) as error:
        store.check_teacher(FrozenTeacher(str(teacher_file), **change))
    assert str(error.value) == (
        f"store {written_store}: its soft labels are of a teacher with {key}, but this run has {local}; "
        f"set teacher.{next(iter(key.split()))} back, give no teacher, or write another store"
    )
