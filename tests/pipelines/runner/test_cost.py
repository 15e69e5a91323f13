"""Cost of a pipeline before it starts: steps and disk space."""

import json
from pathlib import Path
from typing import Any

import pytest

from ssld.pipelines.config import PipelineConfig
from ssld.pipelines.runner.cost import disk_bytes, disk_text, steps_text, total_text
from ssld.pipelines.runner.stages import KINDS, Stage, build_stages
from ssld.shared.config.settings import parse_config
from ssld.shared.config.validation import validate
from ssld.stage1_ssld.write_soft_labels import main as write_soft_labels


def test_steps_and_disk(tmp_path: Path) -> None:
    values = {
        "output": str(tmp_path),
        "stages": {
            "t": {
                "command": "distill",
                "set": {
                    "student": {"model": "random:test_resnet"},
                    "objective": "labels",
                    "data.train": ["x"],
                    "steps": 10,
                    "batch_size": 4,
                    "optim": {"lr": 0.1, "reference_batch": 4},
                },
            },
            "e": {"command": "export_backbone", "set": {"model": "${t}/student.safetensors"}},
            "v": {"command": "evaluate_backbone", "set": {"model": "${t}/student.safetensors", "data.path": "x"}},
        },
    }
    pipeline = validate(PipelineConfig, values, source="p")
    stages = build_stages(pipeline, Path("p"), output=tmp_path)
    assert steps_text(stages[0]) == "10 steps of 4 images"
    assert disk_bytes(stages) == {"t": None, "e": None}  # a network that nobody has built yet; an evaluation is small


def test_sizes_for_people() -> None:
    assert disk_text(None) == "disk unknown"
    assert disk_text(2_500_000_000) == "about 2.5 GB of disk"
    assert total_text({}) == "about 0.0 kB of disk"
    assert total_text({"a": 2_000_000, "b": 3_000_000}) == "about 5.0 MB of disk"
    assert total_text({"a": 2_000_000, "b": None}) == "about 2.0 MB of disk, and 1 stage of unknown size"
    assert total_text({"a": None, "b": None}) == "2 stages of unknown size"


def test_a_length_that_is_given_is_known_although_the_optimizer_is_chosen() -> None:
    kind, given = (
        KINDS["distill"],
        ["--output", "o", "--data.train", "x", "--student.model", "random:x", "--teacher.model", "random:x"],
    )
    texts = [
        steps_text(Stage("a", kind, parse_config(kind.config_type, [*given, *more], program="p"), (), 1, frozenset()))
        for more in (["--steps", "12", "--batch_size", "16"], ["--steps", "12"])
    ]
    assert texts == ["12 steps of 16 images", "a length chosen from the images"]


def counted(command: str, *flags: str) -> str:
    kind = KINDS[command]  # type: ignore[index]
    common = "--output o --train_epochs 2.5 --batch_size 4 --optim.lr 0.1 --optim.reference_batch 4"
    config = parse_config(kind.config_type, [*common.split(), *flags], program="p")
    return steps_text(Stage("a", kind, config, (), 1, frozenset()))


def test_passes_become_steps_where_the_images_are(tiny: Any, tmp_path: Path) -> None:
    distill = ["--student.model", "random:x", "--teacher.model", "random:x"]
    both = ["--data.train", f"{tiny.train},{tiny.unlabeled},{tiny.parquet}"]  # 30, 14 without labels, 30
    assert counted("distill", *distill, *both) == "46 steps of 4 images (2.5 epochs of 74 images)"
    assert (
        counted("distill", *distill, *both, "--objective", "labels") == "38 steps of 4 images (2.5 epochs of 60 images)"
    )
    assert counted("teach", "--model.model", "x", *both) == "38 steps of 4 images (2.5 epochs of 60 images)"
    unknown = "2.5 epochs, 4 images per step"
    assert counted("distill", *distill, "--data.train", f"{tiny.train},{tmp_path}/later") == unknown
    joined = json.dumps([{"path": str(tiny.parquet), "labels": "truth.parquet"}])
    assert counted("distill", *distill, "--data.train", joined) == unknown
    train = ["--backbone", "random:x", "--data.train_images", "i", "--data.train_annotations", str(tmp_path / "c.json")]
    assert counted("train", *train) == unknown
    boxes = [{"image_id": 1, "bbox": [0, 0, 5, 5]}, {"image_id": 2, "bbox": [0, 0, 5, 5], "iscrowd": 1}]
    content = {"images": [{"id": number} for number in range(16)], "annotations": boxes}
    (tmp_path / "c.json").write_text(json.dumps(content))
    assert counted("train", *train, "--data.keep_empty", "false") == "1 steps of 4 images (2.5 epochs of 1 images)"
    assert counted("train", *train) == "10 steps of 4 images (2.5 epochs of 16 images)"
    (tmp_path / "c.json").write_text("[")
    assert counted("train", *train) == unknown


def counted_source(path: Path, *flags: str) -> str:
    network = ["--student.model", "random:x", "--teacher.model", "random:x"]
    return counted("distill", *network, "--data.train", str(path), *flags)


def test_what_can_be_counted_without_opening_a_source(tiny: Any, tmp_path: Path) -> None:
    unknown = "2.5 epochs, 4 images per step"
    (tmp_path / "list.txt").write_text("a.png 0\n\nb.png 1\nc.png 2\n")
    assert counted_source(tmp_path / "list.txt") == "2 steps of 4 images (2.5 epochs of 3 images)"
    labels = ["--objective", "labels"]
    assert counted_source(tmp_path / "list.txt", *labels) == "2 steps of 4 images (2.5 epochs of 3 images)"
    (tmp_path / "list.txt").write_text("a.png\nb.png\nc.png\n")
    assert counted_source(tmp_path / "list.txt", *labels) == unknown  # no labeled image: the stage reports it
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(b"")
    for path in (tmp_path / "tars", tmp_path / "tars" / "0.tar", tiny.train / "*" / "*.png", Path("hub:a/b")):
        assert counted_source(path) == unknown
    assert counted_source(Path(f"{tiny.train},{tmp_path}/tars")) == unknown


def size_of(tmp_path: Path, command: str, **settings: Any) -> int | None:
    values = {"output": str(tmp_path / "runs"), "stages": {"a": {"command": command, "set": settings}}}
    pipeline = validate(PipelineConfig, values, source="p")
    return disk_bytes(build_stages(pipeline, Path("p"), output=tmp_path / "runs"))["a"]


@pytest.mark.parametrize(("top", "precision"), [(3, "fp16"), (2, "fp32")])
def test_size_of_a_store_is_that_of_its_files(
    tiny: Any, teacher_file: Path, tmp_path: Path, call: Any, arguments: Any, top: int, precision: str
) -> None:
    settings = {
        "data": {"train": [str(tiny.train), str(tiny.unlabeled)], "image_size": 32},
        "teacher": {"model": str(teacher_file), "check_images": 0},
        **{"views": 3, "top": top, "store_precision": precision, "threads": 1, "workers": 0, "device": "cpu"},
    }
    estimate = size_of(tmp_path, "soft_labels", **settings)
    assert call(write_soft_labels, arguments(settings)) == 0
    assert estimate == sum(file.stat().st_size for file in (tmp_path / "run" / "store").glob("*.bin"))
    settings["data"] = {"train": ["later"], "image_size": 32}
    assert size_of(tmp_path, "soft_labels", **settings) is None


def test_sizes_of_the_other_commands(tiny: Any, teacher_file: Path, tmp_path: Path) -> None:
    pool = {"pool": [str(tiny.train), str(tiny.parquet)], "teacher.model": "random:test_resnet", "keep": 2}
    assert size_of(tmp_path, "curate", **pool) == 60 * 100
    copies = tiny.parquet.stat().st_size + sum(file.stat().st_size for file in tiny.train.rglob("*.png"))
    assert size_of(tmp_path, "curate", **pool, materialise=True) == 60 * 100 + copies
    assert size_of(tmp_path, "curate", **(pool | {"pool": ["later"]})) is None
    assert size_of(tmp_path, "prototypes", **{"pool": pool["pool"], "encoder.model": "random:test_resnet"}) is None
    assert size_of(tmp_path, "export_backbone", model=str(teacher_file)) == 3 * teacher_file.stat().st_size
    assert size_of(tmp_path, "convert_backbone", weights=str(teacher_file)) == teacher_file.stat().st_size
    assert size_of(tmp_path, "convert_detector", weights=str(teacher_file)) == teacher_file.stat().st_size
    assert size_of(tmp_path, "convert_detector", weights="fasterrcnn_resnet50_fpn") is None
    assert size_of(tmp_path, "convert_paddle_detector", weights=str(teacher_file)) == teacher_file.stat().st_size
    assert size_of(tmp_path, "convert_backbone", weights="later.pdparams") is None
