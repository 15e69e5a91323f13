"""Suggestions of `ssld init`: the evaluation split, the settings that follow from the data and the machine, and names in the pipeline's text."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssld.pipelines.runner.stages import build_stages, read_pipeline
from ssld.pipelines.scaffold.pipeline_file import pipeline_text
from ssld.pipelines.scaffold.split import split_content
from ssld.pipelines.scaffold.suggest import (
    Facts,
    Settings,
    Shape,
    networks_of,
    settings_of,
    shapes,
    wanted_steps,
)
from ssld.shared.errors import UserError
from ssld.stage2_detect.config import TrainConfig

GPU: dict[str, Any] = {"devices": [["NVIDIA H200", 1, 141 * 2**30, 9, 0]]}


def content(images: int = 40) -> dict[str, Any]:
    """Images: each contains `common`, every tenth `rare`, a single one `single`; the last is empty."""
    rows = [{"id": f"i{number}", "file_name": f"{number}.png", "width": 64, "height": 48} for number in range(images)]
    boxes = []
    for number in range(images - 1):
        categories = [1, *([2] if number % 10 == 3 else []), *([3] if number == 5 else [])]
        boxes += [{"image_id": f"i{number}", "category_id": one, "bbox": [2, 3, 20, 20]} for one in categories]
    for number, row in enumerate(boxes):
        row["id"] = number
    names = {1: "common", 2: "rare", 3: "single"}
    return {
        "images": rows,
        "annotations": boxes,
        "categories": [{"id": key, "name": name} for key, name in names.items()],
    }


def ids(part: dict[str, Any]) -> set[str]:
    return {row["id"] for row in part["images"]}


def test_split() -> None:
    whole = content()
    train, val = split_content(whole, share=0.2, seed=1)
    assert ids(train) | ids(val) == ids(whole)
    assert not ids(train) & ids(val)
    assert len(ids(val)) == 8
    for part in (train, val):
        assert all(row["image_id"] in ids(part) for row in part["annotations"])
        assert part["categories"] == whole["categories"]
    counts = [Counter(row["category_id"] for row in part["annotations"]) for part in (train, val)]
    assert counts[0] + counts[1] == Counter(row["category_id"] for row in whole["annotations"])
    assert counts[1][2] == 1  # a fifth of 4
    assert counts[0][3] == 1  # what one image alone shows is trained on
    assert counts[1][3] == 0


def test_split_follows_seed_and_ids_alone() -> None:
    whole = content()
    other = whole | {"images": whole["images"][::-1], "annotations": whole["annotations"][::-1]}
    one = ids(split_content(whole, share=0.2, seed=1)[1])
    assert ids(split_content(other, share=0.2, seed=1)[1]) == one
    assert ids(split_content(whole, share=0.2, seed=2)[1]) != one


def test_split_keeps_copies_together() -> None:
    whole = content()
    together = [["i1", "i2", "i8"], ["i20", "i39"], ["i39", "i3"], ["i8", "i30"], ["i30", "i4"], ["i3", "i30"]]
    one = {"i1", "i2", "i8", "i30", "i4", "i20", "i39", "i3"}
    for seed in range(8):
        val = ids(split_content(whole, share=0.5, seed=seed, together=together)[1])
        assert len(val & one) in (0, len(one))


def test_split_of_too_little() -> None:
    with pytest.raises(UserError, match="1 images are too few to split"):
        split_content(content(2) | {"annotations": []} | {"images": content(2)["images"][:1]}, share=0.2, seed=0)


def facts(images: int, sizes: list[float], gpu: tuple[Any, ...] | None = None) -> Facts:
    measured = {"object_sizes": sizes, "short_side": 480, "long_side": 640, "classes": {"a": 1}}
    place = Path("x")
    return Facts(
        annotations=place,
        images_folder=place,
        val_annotations=place,
        val_images=place,
        split=True,
        images=images,
        val_count=8,
        statistics=measured,
        unlabeled=None,
        unlabeled_images=0,
        pool=None,
        held_out=None,
        listing=None,
        shown=None,
        gpu=gpu,
        gpus=int(gpu is not None),
        cores=2,
        seed=0,
    )


NETWORKS = networks_of(gpu=True, backbone=None, arch=None, teacher=None, teacher_arch=None)


def largest(known: Facts) -> Settings:
    """Settings if time does not matter."""
    shape = max(shapes(known, NETWORKS), key=lambda shape: (shape.networks.channels, shape.short_side))
    return settings_of(known, shape, steps=wanted_steps(known), distill_steps=50, evaluate_every=0.2)


def test_numbers_follow_the_data() -> None:
    gpu = tuple(GPU["devices"][0])
    cells = largest(facts(205, [0.09, 0.15, 0.21, 0.25, 0.34], gpu))  # large objects: the smallest images are enough
    assert (cells.short_side, cells.short_sides) == (320, (256, 288, 320))
    assert cells.anchors == (16, 32, 64, 128, 256)
    small = largest(facts(205, [0.02, 0.04, 0.1, 0.2, 0.3], gpu))
    assert small.short_side == 608  # 24 px of 4 % of it, but not above 1.25 x 480
    assert small.anchors[0] == 8
    assert cells.steps == round(60 * (200 / 205) ** 0.5 * 205 / 8)
    assert cells.warmup == 0.1
    assert largest(facts(118_000, [0.1] * 5, gpu)).steps == 12 * 118_000 // 8
    assert largest(facts(118_000, [0.1] * 5, gpu)).warmup == round(1000 / (12 * 118_000 // 8), 4)
    assert cells.precision == "bf16"
    cpu = largest(facts(118_000, [0.02, 0.04, 0.1, 0.2, 0.3]))
    assert (cpu.precision, cpu.batch) == ("fp32", 2)


@pytest.mark.parametrize(("size", "smaller"), [(320, (256, 288)), (128, (96,)), (64, ())])
def test_sizes_are_variables_of_all_detectors(size: int, smaller: tuple[int, ...], tmp_path: Path) -> None:
    """`size` is that of evaluation and the largest one in training, so that changing it alone stays sensible."""
    known = dataclasses.replace(facts(205, [0.1] * 5), starts=("imagenet", "random"))
    chosen = settings_of(known, Shape(NETWORKS[1], size), steps=70, distill_steps=1, evaluate_every=None)
    file = tmp_path / "mine.yaml"
    file.write_text(pipeline_text(file, known, chosen))
    pipeline = read_pipeline(file)
    names = ("medium_size", "small_size")[: len(smaller)]
    numbers = {
        "steps": 70,
        "size": size,
        "long_side": chosen.long_side,
        **dict(zip(names, reversed(smaller), strict=True)),
    }
    assert pipeline.variables == {name: str(number) for name, number in numbers.items()} | {
        "backbone": NETWORKS[1].backbone
    }
    for given, sides in (({}, (*smaller, size)), ({"size": "480", "long_side": "640"}, (*smaller, 480))):
        for stage in build_stages(pipeline, file, output=tmp_path, variables=given)[:2]:
            assert isinstance(stage.config, TrainConfig)
            resize = stage.config.resize
            assert resize.train_short_sides == list(sides)
            assert resize.short_side == sides[-1]
            assert resize.long_side == resize.train_long_side == int(given.get("long_side", chosen.long_side))


def test_no_image_size_loses_the_small_objects() -> None:
    """Objects at the lower quartile keep 12 px at the smallest size, and no size is below 160 px."""
    for quartile, least, most in ((0.04, 288, 608), (0.15, 160, 320), (0.01, 608, 608), (0.9, 160, 320)):
        sides = [one.short_side for one in shapes(facts(205, [quartile / 2, quartile, 0.95, 0.95, 0.95]), NETWORKS[:1])]
        assert (min(sides), max(sides)) == (least, most)
        assert sides == sorted(set(sides), reverse=True)


def test_no_batch_is_larger_than_the_data() -> None:
    gpu = tuple(GPU["devices"][0])
    for images in (1, 3, 4, 5, 9):
        for device, most in ((None, 2), (gpu, 8)):
            chosen = largest(facts(images, [0.1] * 5, device))
            assert chosen.batch == min(most, images)
            assert chosen.distill_batch == images


def test_few_images_freeze_batch_norm_of_good_weights_alone() -> None:
    """On a CPU a step has two images, whose statistics are too poor; random weights need them anyway, and four images."""
    for images, device, pretrained, expected in (
        (50, None, True, (2, True)),
        (50, None, False, (4, False)),
        (1, None, False, (1, False)),
        (50, tuple(GPU["devices"][0]), True, (8, False)),
    ):
        chosen = largest(dataclasses.replace(facts(images, [0.1] * 5, device), pretrained=pretrained))
        assert (chosen.batch, chosen.freeze_norm) == expected


ODD = [
    "plain",
    "x #1",
    "a: b",
    "- a",
    "null",
    "1e3",
    "yes",
    "[a]",
    "*a",
    "#",
    "'",
    '"',
    "é",
    "two\nlines: true",
    "tab\t",
    "\x1b[2J",
    "{{ 1 }}",
]


@pytest.mark.parametrize("name", ODD)
def test_names_reach_the_pipeline_as_they_are(name: str) -> None:
    """Arbitrary paths and class names are written such that they read back unchanged, without adding keys or lines."""
    measured = facts(9, [0.1] * 5)
    plain = pipeline_text(Path("a.yaml"), measured, largest(measured))
    odd = dataclasses.replace(
        measured,
        annotations=Path(f"{name}.json"),
        val_annotations=Path(f"{name}.json"),
        images_folder=Path(name),
        val_images=Path(name),
        unlabeled=Path(name),
        unlabeled_images=3,
        pool=Path(f"{name}.pool"),
        held_out=Path(f"{name}.held"),
        listing=Path(f"{name}.txt"),
        starts=("imagenet", "ssld"),
        augment_reason=name,
        statistics=measured.statistics | {"classes": {name: 3, f"{name}\noutput: elsewhere": 4}},
        gpu=(name, 2**30, 2**34, 9, 0),
    )
    text = pipeline_text(Path(f"{name}.yaml"), odd, largest(odd))
    content = yaml.safe_load(text)
    assert content["output"] == f"runs/{name}"
    assert list(content) == list(yaml.safe_load(plain))
    assert content["stages"]["ssld"]["set"]["data"]["train"][0] == {"path": f"{name}.pool", "root": name}
    assert content["stages"]["ssld"]["set"]["data"]["val"] == {"path": f"{name}.held", "root": name}
    assert content["stages"]["ssld"]["set"]["data"]["train"][1] == {"path": f"{name}.txt", "root": name}
    data = content["stages"]["detector_imagenet"]["set"]["data"]
    assert (data["train_annotations"], data["val_images"]) == (f"{name}.json", name)
    assert "\x1b" not in text


def test_commands_in_the_first_lines_are_for_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, also where the file is written into another folder, in which its own paths begin."""
    monkeypatch.chdir(tmp_path)
    known = dataclasses.replace(facts(9, [0.1] * 5), trackers=("tensorboard",))
    about = "# Commands for the folder that `ssld init` was called in"
    here = pipeline_text(Path("my own.yaml"), known, largest(known))
    assert "    ssld run 'my own.yaml' --dry-run " in here
    assert "    tensorboard --logdir 'runs/my own' " in here
    assert about not in here
    (tmp_path / "deep").mkdir()
    there = pipeline_text(Path("deep/mine.yaml"), known, largest(known))
    assert about in there
    assert "    ssld run deep/mine.yaml --smoke " in there
    assert "    tensorboard --logdir deep/runs/mine " in there
    assert yaml.safe_load(there)["output"] == "runs/mine"
