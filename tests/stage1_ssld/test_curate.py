"""curate.py on small pools with planted copies: what it keeps, what it writes, and that a manifest is a source."""

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import get_worker_info
from torchvision.transforms.v2 import functional as F

from ssld.shared.images import decode_image
from ssld.shared.models.backbones import input_settings, save_backbone
from ssld.stage1_ssld.curate import main as curate
from ssld.stage1_ssld.data.sources import ImageSource
from ssld.stage1_ssld.data.views import val_view
from ssld.stage1_ssld.data_config import SourceConfig
from ssld.stage1_ssld.distill import main as distill

FILES = {
    "selected.parquet",
    "classes.csv",
    "curation.png",
    "examples.png",
    "candidates.parquet",
    "near_duplicates.parquet",
}
FILES |= {"outcome.json"}
RECORDS = {"config.yaml", "environment.json", "log.txt", "pool.json", "result.json", ".lock"}


def scene(number: int, size: tuple[int, int] = (60, 80)) -> Image.Image:
    """A smooth random image, different for every number."""
    cells = torch.randint(0, 256, (3, 6, 8), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    return Image.fromarray(F.resize(cells, list(size), antialias=True).permute(1, 2, 0).numpy())


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pool/: 40 scenes, copies of 6 of them (a_), of validation images (v_, one mirrored, one as it is) and of training images (t_)."""
    folder = tmp_path_factory.mktemp("planted")
    for name in ("pool/deep", "val", "train"):
        (folder / name).mkdir(parents=True)
    for number in range(40):
        scene(number).save(folder / "pool" / f"{number:03d}.png")
    for number in range(6):
        scene(number).resize((100, 75)).save(folder / "pool" / "deep" / f"a_{number:03d}.jpg", quality=70)
    for number in range(1000, 1010):
        scene(number).save(folder / "val" / f"{number}.png")
    for number in range(2000, 2008):
        scene(number).save(folder / "train" / f"{number}.png")
    for number in range(1000, 1004):
        scene(number).resize((100, 75)).save(folder / "pool" / f"v_{number}.jpg", quality=60)
    scene(1004).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "pool" / "v_1004.png")
    shutil.copy(folder / "val" / "1005.png", folder / "pool" / "v_1005.png")
    for number in range(2000, 2003):
        scene(number).convert("L").save(folder / "pool" / f"t_{number}.png")
    return folder


@pytest.fixture(scope="session")
def scene_teacher(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random `test_resnet` that tells the scenes of the pool apart into three classes."""
    torch.manual_seed(3)
    net: Any = timm.create_model("test_resnet", num_classes=3)
    views = [
        val_view(decode_image(file), image_size=32, val_crop=0.875)
        for file in sorted((planted / "pool").glob("0*.png"))
    ]
    with torch.no_grad():
        pixels_BCHW = torch.stack(views) / 127.5 - 1
        embedding = net.eval().forward_head(net.forward_features(pixels_BCHW), pre_logits=True)
        net.get_classifier().weight.copy_(
            torch.randn(3, embedding.shape[1]) / (embedding.std(0) + embedding.std(0).mean())
        )
        net.get_classifier().bias.copy_(-(net(pixels_BCHW) - net.get_classifier().bias).mean(0))
    path = tmp_path_factory.mktemp("scene_teacher") / "teacher.safetensors"
    names = ["disc", "ring", "stripes"]
    save_backbone(path, net, arch="test_resnet", inputs=input_settings(net, {}), classes=3, class_names=names)
    return path


@pytest.fixture
def settings(planted: Path, scene_teacher: Path) -> dict[str, Any]:
    return {
        "threads": 1,
        "workers": 0,
        "device": "cpu",
        "batch_size": 7,
        "pool": [str(planted / "pool")],
        "val": [str(planted / "val")],
        "train": [str(planted / "train")],
        "teacher": str(scene_teacher),
        "keep": 5,
        "candidates": 20,
        "cosine": 0.5,
        "image_size": 32,
        "examples": 3,
    }


def selected(run: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(run / "selected.parquet").to_pylist()
    return rows


def metrics(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "result.json").read_text())["metrics"]
    return result


def test_keeps_the_best_of_each_class_and_no_copy(
    drawn_figures: None,
    arguments: Any,
    settings: dict[str, Any],
    call: Any,
    tmp_path: Path,
    files_below: Any,
    planted: Path,
    scene_teacher: Path,
) -> None:
    """Scores against timm's own forward pass, the choice among the images without a double against sorting these."""
    run = tmp_path / "run"
    assert call(curate, arguments(settings)) == 0
    assert files_below(run) == FILES | RECORDS | {
        "scores/000000.parquet",
        "held_out/000000.parquet",
        "held_out/000001.parquet",
    }
    rows = selected(run)
    keys = [row["key"] for row in rows]
    assert keys == sorted(keys)
    result = metrics(run)
    assert result["like_val"] == 6
    assert result["like_train"] == 3
    assert result["like_better"] == 6
    assert not [key for key in keys if key.startswith(("v_", "t_"))]
    scores = pq.read_table(run / "scores" / "000000.parquet").to_pylist()
    assert len(scores) == result["images"] == 55

    from safetensors.torch import load_file

    net = timm.create_model("test_resnet", num_classes=3)
    net.load_state_dict(load_file(scene_teacher))
    views = [val_view(decode_image(planted / "pool" / row["key"]), image_size=32, val_crop=0.875) for row in scores]
    with torch.no_grad():
        probabilities = net.eval()(torch.stack(views) / 127.5 - 1).softmax(-1)
    score, first = (column.numpy() for column in probabilities.max(-1))
    assert [row["class"] for row in scores] == first.tolist()
    np.testing.assert_allclose([row["score"] for row in scores], score, atol=5e-5)  # BatchNorm is folded

    # Of a scene and its copy the one with the higher score stays.
    by_key = {row["key"]: row for row in scores}
    losers = set()
    for number in range(6):
        pair = [f"{number:03d}.png", f"deep/a_{number:03d}.jpg"]
        losers.add(min(pair, key=lambda key: by_key[key]["score"]))
    clean = [row for row in scores if row["key"] not in losers and not row["key"].startswith(("v_", "t_"))]
    expected = set()
    for number in range(3):
        mine = sorted((row for row in clean if row["class"] == number), key=lambda row: -row["score"])
        expected |= {row["key"] for row in mine[:5]}
    assert set(keys) == expected
    assert {tuple(row[name] for name in ("class", "score", "hash")) for row in rows} <= {
        tuple(row[name] for name in ("class", "score", "hash")) for row in clean
    }

    assert len({row["class"] for row in rows}) == 3
    table = list(csv.DictReader(io.StringIO((run / "classes.csv").read_text())))
    assert [row["name"] for row in table] == ["disc", "ring", "stripes"]
    assert sum(int(row["kept"]) for row in table) == len(rows) == result["kept"]
    for name in ("curation.png", "examples.png"):
        with Image.open(run / name) as drawn:
            colors = np.asarray(drawn.convert("RGB")).reshape(-1, 3)
            assert drawn.width > 300
        assert len(np.unique(colors, axis=0)) > 20
    log = (run / "log.txt").read_text()
    assert "safetensors: loaded " in log
    assert "near-duplicates dropped: 6 of validation images, 3 of training images, 6 of better ones" in log
    short = [row for row in table if int(row["kept"]) < 5]
    assert (f"{len(short)} of 3 classes have fewer than 5 images" in log) == bool(short)


def test_a_manifest_is_a_source(
    arguments: Any, settings: dict[str, Any], call: Any, tmp_path: Path, planted: Path
) -> None:
    """Its rows are the images; its metadata name teacher, classes, settings and numbers."""
    assert call(curate, arguments(settings)) == 0
    source = ImageSource(SourceConfig(path=str(tmp_path / "run" / "selected.parquet")), 0)
    rows = selected(tmp_path / "run")
    assert len(source) == len(rows)
    assert source.labels is None
    for number in (0, len(rows) - 1):
        assert torch.equal(source.read(number), decode_image(planted / "pool" / rows[number]["key"]))
    facts = json.loads(pq.read_schema(tmp_path / "run" / "selected.parquet").metadata[b"ssld"])
    assert facts["class_names"] == ["disc", "ring", "stripes"]
    assert facts["teacher"]["arch"] == "test_resnet"
    assert facts["numbers"] == metrics(tmp_path / "run")
    assert facts["numbers"]["thresholds"]["cosine"] == 0.5


def test_distillation_takes_the_manifest(
    arguments: Any, settings: dict[str, Any], distill_settings: dict[str, Any], call: Any, tmp_path: Path, tiny: Any
) -> None:
    assert call(curate, arguments(settings)) == 0
    data = distill_settings["data"] | {"train": [str(tiny.train), str(tmp_path / "run" / "selected.parquet")]}
    assert call(distill, arguments(distill_settings | {"steps": 2, "data": data}, "student")) == 0
    assert (tmp_path / "student" / "student.safetensors").exists()


def test_min_score_and_more_than_k(arguments: Any, settings: dict[str, Any], call: Any, tmp_path: Path) -> None:
    assert call(curate, arguments(settings, "all")) == 0
    scores = [row["score"] for row in pq.read_table(tmp_path / "all" / "scores" / "000000.parquet").to_pylist()]
    middle = float(np.median(scores))
    assert call(curate, arguments(settings | {"min_score": middle, "keep": 2}, "some")) == 0
    rows = selected(tmp_path / "some")
    assert min(row["score"] for row in rows) >= middle
    assert metrics(tmp_path / "some")["below_min_score"] == sum(score < np.float32(middle) for score in scores)
    assert np.bincount([row["class"] for row in rows]).max() == 2
    assert metrics(tmp_path / "some")["beyond_keep"] > 0


def test_hash_alone_does_not_condemn(
    arguments: Any, settings: dict[str, Any], call: Any, tmp_path: Path, planted: Path
) -> None:
    """Pairs with close hashes whose embeddings are not close stay: with cosine 1 only the very same pixels are a duplicate."""
    for name in ("only_val", "nothing"):
        change: dict[str, Any] = {"cosine": 1.0, "keep": 50}
        if name == "nothing":
            change |= {"val": [], "train": [], "hash_distance": 0}
        assert call(curate, arguments(settings | change, name)) == 0
    assert metrics(tmp_path / "only_val")["like_val"] == 1
    kept = {row["key"] for row in selected(tmp_path / "only_val")}
    assert "v_1005.png" not in kept
    assert {"v_1000.jpg", "v_1004.png"} <= kept
    assert metrics(tmp_path / "only_val")["pairs_compared"] > metrics(tmp_path / "only_val")["pairs_confirmed"] > 0
    assert metrics(tmp_path / "nothing")["kept"] == 55


def test_mirror_images_in_the_pool(arguments: Any, settings: dict[str, Any], call: Any, tmp_path: Path) -> None:
    """Of a scene and its mirror image one stays, unless that is switched off."""
    pool = tmp_path / "flipped"
    pool.mkdir()
    for number in range(5):
        scene(number).save(pool / f"{number}.png")
        scene(number).resize((100, 75)).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(pool / f"m{number}.png")
    change = {"pool": [str(pool)], "cosine": 0.01, "keep": 10}
    assert call(curate, arguments(settings | change, "on")) == 0
    assert call(curate, arguments(settings | change | {"mirrored": False}, "off")) == 0
    kept = [row["key"].removeprefix("m") for row in selected(tmp_path / "on")]
    assert sorted(kept) == [f"{number}.png" for number in range(5)]
    assert metrics(tmp_path / "on")["like_better"] == 5
    assert metrics(tmp_path / "off")["kept"] == 10


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_streamed_pool_gives_the_same_choice(
    kind: str, arguments: Any, settings: dict[str, Any], call: Any, tmp_path: Path, planted: Path
) -> None:
    """Parquet by row group, tar files from front to back; loader workers; the images come along as copies, which are a source."""
    import tarfile

    files = sorted((planted / "pool").rglob("*.*"))
    pool = tmp_path / "pool"
    pool.mkdir()
    for part, names in enumerate(np.array_split(np.array(files), 3)):
        if kind == "parquet":
            images = [{"bytes": Path(name).read_bytes(), "path": None} for name in names]
            pq.write_table(pa.table({"image": images}), pool / f"{part}.parquet", row_group_size=11)
        else:
            with tarfile.open(pool / f"{part}.tar", "w") as archive:
                for name in names:
                    archive.add(name, Path(name).name)
    change = {"pool": [str(pool)], "streaming": True, "materialise": True, "workers": 2}
    assert call(curate, arguments(settings, "folder")) == 0
    assert call(curate, arguments(settings | change, "streamed")) == 0
    one, two = (selected(tmp_path / name) for name in ("folder", "streamed"))
    assert sorted(row["hash"] for row in one) == sorted(row["hash"] for row in two)
    assert len({row["hash"] for row in two}) == len(two) == metrics(tmp_path / "streamed")["kept"]
    copies = ImageSource(SourceConfig(path=str(tmp_path / "streamed" / "selected")), 0)
    assert len(copies) == len(two)
    assert copies.labels is None
    table = pq.read_table(tmp_path / "streamed" / "selected").to_pylist()
    assert [(row["key"], row["class"], row["score"]) for row in table] == [
        (row["key"], row["class"], row["score"]) for row in two
    ]
    by_hash = {row["hash"]: planted / "pool" / row["key"] for row in one}
    for number, row in enumerate(two):
        assert torch.equal(copies.read(number), decode_image(by_hash[row["hash"]]))
    assert get_worker_info() is None
