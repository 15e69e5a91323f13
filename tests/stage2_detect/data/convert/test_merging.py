"""Several COCO files as one: classes by name, new ids, one file name in two folders, conflicts."""

import json
from pathlib import Path

import pytest
from converted_data import write
from many_formats import BOX, coco, roboflow_coco

from ssld.shared.config.settings import parse_config
from ssld.shared.errors import UserError
from ssld.stage2_detect.config import EvaluateConfig, TrainConfig
from ssld.stage2_detect.data.coco import read_coco
from ssld.stage2_detect.data.convert.parts import evaluated_part, find_data
from ssld.stage2_detect.data_config import DetectionDataConfig


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def files(tmp_path: Path) -> list[tuple[Path, Path]]:
    """Two files with images of equal names; the ids of their classes are swapped."""
    root = roboflow_coco(tmp_path / "set")
    write(root / "b.json", json.dumps(coco("valid", ["dog", "cat"])))
    return [(root / "train" / "_annotations.coco.json", root / "train"), (root / "b.json", root / "valid")]


def lists(files: list[tuple[Path, Path]]) -> DetectionDataConfig:
    annotations, images = map(list, zip(*files, strict=True))
    return DetectionDataConfig(train_annotations=annotations, train_images=images)


def test_classes_by_name_and_images_by_folder(files: list[tuple[Path, Path]]) -> None:
    data = find_data(lists(files))
    merged = read_coco(data.train.annotations, data.train.images, training=True)
    assert merged.class_names == ("cat", "dog")
    expected = [(str(files[0][1] / f"{i}.png"), ["cat", "dog"][i % 2]) for i in range(4)]
    expected += [(str(files[1][1] / f"{i}.png"), ["dog", "cat"][i % 2]) for i in range(2)]
    actual = [(record.path, merged.class_names[record.labels_N[0]]) for record in merged.images]
    assert actual == expected
    assert [record.image_id for record in merged.images] == [1, 2, 3, 4, 5, 6]
    assert all(record.file_boxes_N4.tolist() == [BOX] for record in merged.images)
    assert "2 files are read as one" in data.notes[0]
    part, _ = evaluated_part(
        EvaluateConfig(model="m", output="o", annotations=[a for a, _ in files], images=[i for _, i in files])
    )
    assert len(json.loads(part.annotations.read_text())["images"]) == 6


def test_a_file_without_a_class_and_one_image_in_two_files(files: list[tuple[Path, Path]], tmp_path: Path) -> None:
    write(tmp_path / "c.json", json.dumps(coco("train", ["bird"])))
    data = find_data(lists([files[0], (tmp_path / "c.json", files[0][1])]))
    merged = read_coco(data.train.annotations, data.train.images, training=True)
    assert merged.class_names == ("cat", "dog", "bird")
    assert any("c.json: has no class cat, dog: its images count as images without them" in note for note in data.notes)
    assert merged.counts["again"] == 4
    assert "4 images listed before under another id" in merged.describe()


def test_one_file_is_read_in_place_and_one_folder_belongs_to_all(files: list[tuple[Path, Path]]) -> None:
    assert find_data(lists(files[:1])).train[1:] == files[0]
    both = DetectionDataConfig(train_annotations=[files[0][0], files[0][0]], train_images=files[0][1])
    assert [folder for _, folder in both.pairs("train")] == [files[0][1]] * 2


def test_conflicts(files: list[tuple[Path, Path]], tmp_path: Path) -> None:
    write(tmp_path / "c.json", json.dumps(coco("valid", ["Cat", "dog"])))
    with pytest.raises(UserError, match=r"c.json: its class 'Cat' is spelled 'cat' in .*; give both the same name"):
        find_data(lists([files[0], (tmp_path / "c.json", files[1][1])]))
    with pytest.raises(UserError, match=r"2 of the 4 images of .* are missing"):
        find_data(lists([files[1], (files[0][0], files[1][1])]))
    with pytest.raises(UserError, match=r"nowhere.json: no such file"):
        find_data(lists([files[0], (tmp_path / "nowhere.json", files[1][1])]))


def settings(*words: str) -> TrainConfig:
    given = ["--backbone", "random:x", "--output", "o", "--steps", "1", "--batch_size", "2"]
    given += ["--optim.lr", "1", "--optim.reference_batch", "1"]
    return parse_config(TrainConfig, [*given, *words], program="train.py")


def test_lists_and_paths_in_settings(tmp_path: Path) -> None:
    one = settings("--data.train_annotations", "a.json", "--data.train_images", "d").data
    assert (one.train_annotations, one.train_images) == (Path("a.json"), Path("d"))  # recorded as by earlier versions
    two = settings("--data.train_annotations", "a.json,b.json", "--data.train_images", "d,e").data
    assert two.pairs("train") == [(Path("a.json"), Path("d")), (Path("b.json"), Path("e"))]
    comma = tmp_path / "a,b.json"
    write(comma, "")
    assert settings("--data.train_annotations", str(comma), "--data.train_images", "d").data.train_annotations == comma
    assert settings("--data", "x/data.yaml", "--data.keep_empty", "false").data.source == "x/data.yaml"
    base = tmp_path / "mine.yaml"
    write(base, "data: {train_annotations: a, train_images: b, keep_empty: false}")
    over = settings("--config", str(base), "--data", "mine").data
    assert (over.source, over.train_annotations, over.keep_empty) == ("mine", None, False)
    write(tmp_path / "short.yaml", f"base: {base.name}\ndata: other")
    short = settings("--config", str(tmp_path / "short.yaml")).data
    assert (short.source, short.train_images, short.keep_empty) == ("other", None, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--data.train_annotations", "a,b,c", "--data.train_images", "d,e"),
            "data: train_images: has 2 folders for 3 files of train_annotations; give one folder for each file, or one for all",
        ),
        (("--data", "x", "--data.val_images", "d"), "data: source has its own parts for training and evaluation; leave out val_images"),
        (("--data.train_annotations", "a"), "data: give both train_annotations and train_images"),
        (("--data.keep_empty", "false"), "data: names no images to train on; give a path"),
    ],
)  # fmt: skip
def test_mistakes_in_settings(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        settings(*words)
    assert str(caught.value).startswith(f"command line: {message}")


def test_a_repeated_flag_replaces_the_earlier_one() -> None:
    """As of any other flag: a line that is copied and continued must not train on both files."""
    line = ["--data.train_annotations", "a.json", "--data.train_images=a", "--data.train_annotations=b.json"]
    line += ["--data.train_images", "b", "--backbone", "random:test_resnet", "--optim.lr", "0.1"]
    line += ["--optim.reference_batch", "1", "--steps", "1", "--batch_size", "1", "--output", "run"]
    config = parse_config(TrainConfig, line, program="train.py")
    assert config.data.pairs("train") == [(Path("b.json"), Path("b"))]
    both = ["--data.train_annotations", "a.json,b.json", *line[4:]]
    assert len(parse_config(TrainConfig, both, program="train.py").data.pairs("train")) == 2
