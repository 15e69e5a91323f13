"""A finished store: soft labels are those of the live teacher to the same views, for the sources it was written for."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ssld.stage1_ssld.distillation.soft_label_store as store_module
from ssld.shared.images import UnreadableImage
from ssld.shared.models.teacher import FrozenTeacher
from ssld.stage1_ssld.data.loaders import TrainViews, make_loader
from ssld.stage1_ssld.data.sources import ImageSource, open_sources
from ssld.stage1_ssld.data.views import training_view
from ssld.stage1_ssld.data_config import DataConfig, SourceConfig
from ssld.stage1_ssld.distillation.soft_label_store import SoftLabelStore


def test_soft_labels_are_the_teachers_to_the_same_views(
    written_store: Path, store_data: DataConfig, teacher_file: Path
) -> None:
    store, sources = SoftLabelStore(written_store), open_sources(store_data.train, "data.train")
    assert (store.views, store.top, store.num_classes, store.seed) == (3, 2, 3, 5)
    assert store.class_names == ["disc", "ring", "stripes"]
    store.match(sources, store_data)
    assert [source.number for source in sources] == [1, 0]
    teacher, recorded = FrozenTeacher(str(teacher_file)), 0
    for source in sources:
        for row in range(len(source)):
            for view in range(3):
                try:
                    image = source.read(row)
                except UnreadableImage:
                    with pytest.raises(UnreadableImage, match="was unreadable when the store was written"):
                        store.record(source.number, row, view)
                    continue
                pixels = training_view(image, source.key(row), view, store_data, seed=5)
                expected = F.log_softmax(teacher(pixels[None]), dim=-1)[0]
                record = store.record(source.number, row, view)
                best = expected.topk(2)
                assert record["classes"].tolist() == best.indices.tolist()
                np.testing.assert_allclose(record["log_probs"].astype(np.float64), best.values.numpy(), 1e-3, 1e-4)
                assert record["rest"] == pytest.approx(expected.min().item(), rel=1e-4)
                recorded += 1
    assert recorded == 44 * 3


def test_training_views_are_those_of_the_store(written_store: Path, store_data: DataConfig) -> None:
    """Pass 4 sees view 1, from the store's seed; an image that had no soft label is replaced by the next."""
    store, sources = SoftLabelStore(written_store), open_sources(store_data.train, "data.train")
    store.match(sources, store_data)
    views = TrainViews(sources, [None, None], store_data, seed=77, store=store)
    view = views[(len(sources[0]) + 4, 4)]  # row 4 of the second source, number 0 of the store
    pixels = training_view(sources[1].read(4), sources[1].key(4), 1, store_data, seed=5)
    assert view.pixels_CHW is not None
    assert torch.equal(view.pixels_CHW, pixels)
    assert view.soft is not None
    assert view.soft["rest"] == store.record(0, 4, 1)["rest"]
    broken = next(row for row in range(15) if sources[0].location(row).endswith("broken.png"))
    view = views[(broken, 0)]
    assert view.unreadable == [sources[0].location(broken)]
    assert view.key == sources[0].key(broken + 1)
    assert view.soft is not None
    assert view.soft["rest"] == store.record(1, broken + 1, 0)["rest"]


def test_an_image_that_became_readable_has_no_soft_label_still(
    written_store: Path, store_data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, sources = SoftLabelStore(written_store), open_sources(store_data.train, "data.train")
    store.match(sources, store_data)
    monkeypatch.setattr(ImageSource, "read", lambda source, row: torch.zeros(3, 40, 40, dtype=torch.uint8))
    broken = next(row for row in range(15) if sources[0].location(row).endswith("broken.png"))
    assert TrainViews(sources, [None, None], store_data, 0, store)[(broken, 0)].key == sources[0].key(broken + 1)


def test_loader_processes_read_it_too(written_store: Path, store_data: DataConfig) -> None:
    store, sources = SoftLabelStore(written_store), open_sources(store_data.train, "data.train")
    store.match(sources, store_data)
    store.record(0, 0, 0)  # one map is open before the workers start
    views = TrainViews(sources, [None, None], store_data, seed=0, store=store)
    order = [[(13, 0), (15, 1)], [(30, 2), (44, 5)]]
    actual, other = (list(make_loader(views, order, workers=workers, pin_memory=False)) for workers in (0, 1))
    for a, b in zip(actual, other, strict=True):
        assert a.soft is not None
        assert b.soft is not None
        assert torch.equal(a.pixels_BCHW, b.pixels_BCHW)
        assert a.soft.classes_Bm is not None
        assert b.soft.classes_Bm is not None
        assert torch.equal(a.soft.classes_Bm, b.soft.classes_Bm)
        assert torch.equal(a.soft.logits_BM, b.soft.logits_BM)
        assert a.soft.classes_Bm.dtype == torch.int64
        assert a.soft.logits_BM.dtype == torch.float32
        assert a.soft.logits_BM.shape == (2, 3)  # two classes of three, and the rest


def test_only_so_many_files_are_open(written_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many, few = SoftLabelStore(written_store), SoftLabelStore(written_store)
    monkeypatch.setattr(store_module, "_OPEN_SHARDS", 1)
    for row in (0, 17, 29, 1, 18, 2):
        assert few.record(0, row, 1)["log_probs"].tolist() == many.record(0, row, 1)["log_probs"].tolist()
        assert len(few._shards) == 1


def test_what_a_source_is_known_by(tiny: Any) -> None:
    """64 of its names, also where there are fewer images."""
    source = ImageSource(SourceConfig(path=str(tiny.unlabeled)), 0)
    names = [source.rows.name(len(source) * number // 64) for number in range(64)]
    assert store_module.source_record(source)["names"] == hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
    rows = [(0, len(source) * number // 8, number % 3) for number in range(8)]
    assert store_module.replayed_rows([source], 3) == rows


def test_one_source_of_several_is_enough(written_store: Path, store_data: DataConfig, store_images: Path) -> None:
    sources = [ImageSource(SourceConfig(path=str(store_images / "others"), labels="none"), 0)]
    SoftLabelStore(written_store).match(sources, store_data)
    assert sources[0].number == 1


def test_a_folder_that_has_moved_is_known_by_its_files(
    written_store: Path, store_data: DataConfig, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(store_data.train[0].path, moved)  # keeps the times, as moving does
    sources = [ImageSource(SourceConfig(path=str(moved)), 0)]
    SoftLabelStore(written_store).match(sources, store_data)
    assert sources[0].number == 1
