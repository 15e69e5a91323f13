"""Sentences on how the rows of the table were made."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from ssld.pipelines.config import PipelineConfig, RowConfig, TableConfig
from ssld.pipelines.report import render
from ssld.pipelines.reports.provenance import Start, alone, brought, compared, origin, start
from ssld.pipelines.reports.table import table_text
from ssld.stage2_detect.model_config import Kind


def write(run: Path, settings: Any, images_seen: Any = None) -> None:
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    if images_seen is not None:
        (run / "result.json").write_text(json.dumps({"metrics": {"images_seen": images_seen}}))


def test_backbone_and_evaluated_detector(tmp_path: Path) -> None:
    student = {
        "student": {"model": "random:resnet18d"},
        "teacher": {"model": str(tmp_path / "teacher/teacher.safetensors")},
    }
    write(tmp_path / "ssld", student | {"data": {"image_size": 48}}, images_seen=25600)
    write(tmp_path / "base", student | {"objective": "labels", "data": {"image_size": 48}})
    resize = {"resize": {"short_side": 128}, "model": {"kind": "gfl"}}
    write(tmp_path / "detector", {"backbone": str(tmp_path / "ssld/student.safetensors"), **resize}, images_seen=2400)
    write(tmp_path / "ap", {"model": str(tmp_path / "detector/detector.safetensors")})
    distilled = "student random:resnet18d distilled from teacher/teacher.safetensors, 25,600 images seen, 48 px"
    expected = f"{distilled}; the detector: GFL, 2,400 images seen, 128 px"
    assert origin(RowConfig(detector=("ap", "ap_1")), tmp_path) == expected
    assert origin(RowConfig(detector=("detector",)), tmp_path) == expected
    assert origin(RowConfig.model_validate({"classifier": "ssld", "detector": "ap"}), tmp_path) == expected
    assert origin(RowConfig.model_validate({"classifier": "ssld"}), tmp_path) == distilled
    row = RowConfig.model_validate({"classifier": "base"})
    assert origin(row, tmp_path) == "student random:resnet18d trained on labels, 48 px"
    write(tmp_path / "teacher", {"model": {"model": "timm:resnet50"}})
    assert origin(RowConfig(classifier=("teacher",)), tmp_path) == "network timm:resnet50 trained on labels"


@pytest.mark.parametrize("kind", get_args(Kind))
def test_each_kind_of_detector_has_its_name(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "detector", {"backbone": "random:resnet18d", "model": {"kind": kind}})
    text = origin(RowConfig(detector=("detector",)), tmp_path)
    assert text is not None
    assert kind not in text.split(", ")


COCO = "coco:fasterrcnn_resnet50_fpn_v2"
NAME = "fasterrcnn_resnet50_fpn_v2"
STARTS: tuple[tuple[dict[str, Any], Start, str], ...] = (
    ({"backbone": "random:resnet18d"}, Start("random weights"), "random weights of resnet18d"),
    ({"backbone": "timm:resnet18d"}, Start("pretrained weights"), "timm's pretrained weights of resnet18d"),
    (
        {"backbone": "a/r18.safetensors"},
        Start("r18.safetensors", "a/r18.safetensors"),
        "weights of r18.safetensors",
    ),
    (
        {"backbone": "timm:resnet18d", "init": "/b/coco.safetensors"},
        Start("detector file", "/b/coco.safetensors"),
        "the detector file coco.safetensors",
    ),
    (
        {"backbone": None, "init": "a/b.safetensors"},
        Start("detector file", "a/b.safetensors"),
        "the detector file b.safetensors",
    ),
    ({"backbone": None, "init": COCO}, Start(f"COCO weights ({NAME})"), f"COCO weights ({NAME})"),
    (
        {"backbone": "/c/my.safetensors", "init": COCO},
        Start("body of my.safetensors under COCO weights", "/c/my.safetensors"),
        f"body of my.safetensors under COCO weights ({NAME})",
    ),
    (
        {"backbone": "timm:resnet50", "init": COCO},
        Start("body of timm:resnet50 under COCO weights"),
        f"body of timm:resnet50 under COCO weights ({NAME})",
    ),
)


def test_every_start_is_named_and_what_is_shared_is_said_once(tmp_path: Path) -> None:
    more = {"resize": {"short_side": 640}, "distill": {"teacher": "big.safetensors"}}
    for number, (settings, _, _) in enumerate(STARTS):
        write(tmp_path / f"d{number}", settings | more, images_seen=800 if number else 400)
    write(tmp_path / "student", {"student": {"model": "timm:resnet18d"}, "teacher": {"model": "timm:resnet50"}}, 1)
    last = len(STARTS)
    write(tmp_path / f"d{last}", {"backbone": str(tmp_path / "student/student.safetensors"), **more}, images_seen=800)
    table = TableConfig.model_validate({"rows": {f"row {n}": {"detector": f"d{n}"} for n in range(last + 1)}})
    assert [start(row, tmp_path) for row in table.rows.values()] == [
        *(short for _, short, _ in STARTS),
        Start("stage 1"),
    ]
    stage1 = "student timm:resnet18d distilled from timm:resnet50, 1 image seen"
    rows = [f"row {n}: {text}, {800 if n else 400} images seen" for n, (_, _, text) in enumerate(STARTS)]
    assert compared(table, tmp_path) == (
        f"Compared: a detector from {last + 1} starts, distilled from big.safetensors, 640 px. "
        f"{'. '.join(rows)}. row {last}: {stage1}; the detector: 800 images seen."
    )
    settings = {"backbone": str(tmp_path / "student/student.safetensors"), "init": COCO}
    write(tmp_path / "both", settings)
    row = RowConfig(detector=("both",))
    assert start(row, tmp_path) == Start("body of stage 1 under COCO weights")
    assert origin(row, tmp_path) == f"body of student/student.safetensors ({stage1}) under COCO weights ({NAME})"
    backbones = TableConfig.model_validate({"rows": {"SSLD": {"classifier": "student"}, "gone": {"classifier": "no"}}})
    assert compared(backbones, tmp_path) == f"Compared: 1 backbone. SSLD: {stage1}."


def test_what_a_moving_teacher_learned_from_is_said(tmp_path: Path) -> None:
    settings = {"backbone": "timm:resnet18d", "resize": {"short_side": 320}}
    read = {"data.train_annotations": photos(41), "moving_teacher.unlabeled": photos(205)}
    for name, record in (("alone", {}), ("moving", {"read": read}), ("old", {"read": {}})):
        teacher = {"moving_teacher": None if name == "alone" else {"unlabeled": "more"}}
        write(tmp_path / name, settings | teacher)
        (tmp_path / name / "result.json").write_text(json.dumps({"metrics": {"images_seen": 800}} | record))
    table = TableConfig.model_validate({"rows": {name: {"detector": name} for name in ("alone", "moving", "old")}})
    weights = "timm's pretrained weights of resnet18d"
    assert compared(table, tmp_path) == (
        f"Compared: 3 detectors from the same start, 800 images seen, 320 px. alone: {weights}. "
        f"moving: {weights}, moving teacher, 205 unlabeled photos. old: {weights}, moving teacher."
    )
    assert start(table.rows["moving"], tmp_path) == Start("pretrained weights, moving teacher, 205 unlabeled photos")


def test_what_a_detector_had_and_its_control_had_not(tmp_path: Path) -> None:
    """A sentence only where all else is the same: batches with unlabeled photos are larger, which is no other setting."""
    student: dict[str, Any] = {"student": {"model": "timm:resnet18d"}, "teacher": {"model": "timm:resnet50"}}
    write(tmp_path / "ssld", student)
    write(tmp_path / "labels", student | {"objective": "labels"})
    pool = {"metrics": {}, "read": {"data.train.0": photos(60), "data.train.1": photos(10), "data.val.0": photos(5)}}
    (tmp_path / "ssld/result.json").write_text(json.dumps(pool))
    rest: dict[str, Any] = {"steps": 60, "batch_size": 2, "optim": {"lr": 0.1, "reference_batch": 8}}
    moving = {"moving_teacher": {"unlabeled": "m"}, "batch_size": 4, "optim": {"lr": 0.1, "reference_batch": 16}}
    own = {"backbone": "timm:resnet18d", "arch": None}
    distilled, on_labels = ({"backbone": str(tmp_path / name / "student.safetensors")} for name in ("ssld", "labels"))
    trainings = {
        "own": rest | own,
        "moving": rest | own | moving,
        "stage 1": rest | distilled,
        "labels": rest | on_labels,
        "both": rest | distilled | moving,
        "longer": rest | distilled | {"steps": 90},
        "other": rest | {"backbone": "timm:resnet50"},
        "larger": rest | distilled | {"batch_size": 4},
    }
    for name, settings in trainings.items():
        write(tmp_path / f"d {name}", settings)
        result = {"metrics": {}, "read": {"moving_teacher.unlabeled": photos(40)} if name == "moving" else {}}
        (tmp_path / f"d {name}" / "result.json").write_text(json.dumps(result))
    rows = {name: RowConfig(detector=(f"d {name}",)) for name in trainings}
    words = {
        ("moving", "own"): "40 unlabeled photos under a moving teacher",
        ("stage 1", "own"): "stage 1 on 70 photos",
        ("stage 1", "labels"): "the teacher's soft labels in stage 1, in place of labels,",
        ("both", "own"): "stage 1 on 70 photos and the unlabeled photos under a moving teacher",
        ("both", "stage 1"): "the unlabeled photos under a moving teacher",
        ("longer", "own"): None,
        ("other", "own"): None,
        ("own", "own"): None,
        ("stage 1", "other"): None,  # another network
        ("stage 1", "moving"): None,  # without the unlabeled photos of the other
        ("larger", "own"): None,
        ("both", "moving"): "stage 1 on 70 photos",
    }
    assert {pair: brought(rows[pair[0]], rows[pair[1]], tmp_path) for pair in words} == words
    for seen, photos_seen in ((69, "69 of 70 photos"), (70, "70 photos"), (700, "70 photos")):
        (tmp_path / "ssld/result.json").write_text(json.dumps(pool | {"metrics": {"images_seen": seen}}))
        assert brought(rows["stage 1"], rows["own"], tmp_path) == f"stage 1 on {photos_seen}"


@pytest.mark.parametrize("boxes", [(0.0, 0.0), (0.0, 0.3), ()])
def test_a_moving_teacher_that_found_nothing_is_named(boxes: tuple[float, ...], tmp_path: Path) -> None:
    """Otherwise the page would say what the unlabeled photos brought where they had no pseudo-box."""
    own: dict[str, Any] = {"backbone": "timm:resnet18d"}
    write(tmp_path / "own", own)
    write(tmp_path / "moving", own | {"moving_teacher": {"unlabeled": "m"}})
    read = {"metrics": {}, "read": {"moving_teacher.unlabeled": photos(40)}}
    (tmp_path / "moving/result.json").write_text(json.dumps(read))
    lines = [{"step": 1, "loss": 2.0}, *({"step": n + 2, "pseudo_boxes": one} for n, one in enumerate(boxes))]
    (tmp_path / "moving/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = TableConfig.model_validate({"rows": {name: {"detector": name} for name in ("own", "moving")}})
    words = brought(table.rows["moving"], table.rows["own"], tmp_path)
    nothing = boxes == (0.0, 0.0)
    assert words == "40 unlabeled photos under a moving teacher" + (" that found no object in them" if nothing else "")
    named = start(table.rows["moving"], tmp_path)
    assert named is not None
    assert named.text.endswith("no object found in them") == nothing
    assert ("moving: its moving teacher found no object" in table_text(table, tmp_path)) == nothing
    assert "collapsed" not in table_text(table, tmp_path)
    (tmp_path / "moving/detector_last_good.safetensors").touch()  # a run that ends without a collapse removes it
    assert ("moving: its moving teacher collapsed in training" in table_text(table, tmp_path)) != nothing


@pytest.mark.parametrize("settings", [{}, {"student": 3, "model": []}, {"model": {"model": 1}, "backbone": 4}, [1]])
def test_runs_without_known_settings_have_no_sentence(settings: Any, tmp_path: Path) -> None:
    write(tmp_path / "a", settings)
    row = RowConfig(classifier=("a",), detector=("a",))
    assert origin(row, tmp_path) is None
    assert start(row, tmp_path) is None
    assert compared(TableConfig(rows={"a": row}), tmp_path) is None
    assert origin(RowConfig(classifier=("gone",), detector=("gone",)), tmp_path) is None


def photos(number: int) -> dict[str, Any]:
    return {"image": {"kept": number, "dropped": {}, "changed": {}}}


def test_a_single_detector_is_compared_with_nothing(tmp_path: Path) -> None:
    settings = {"backbone": "timm:resnet18d", "model": {"kind": "faster_rcnn"}, "resize": {"short_side": 320}}
    write(tmp_path / "detector", settings | {"data": {"keep_empty": True}})
    read = {"data.train_annotations": photos(160), "data.val_annotations": photos(40)}
    record: dict[str, Any] = {"metrics": {"images_seen": 2400, "AP": 0.3}, "read": read}
    (tmp_path / "detector/result.json").write_text(json.dumps(record))
    write(tmp_path / "ap", {"model": str(tmp_path / "detector/detector.safetensors")})
    rows = {"detector": {"detector": "ap"}, "student": {"classifier": "ssld"}}
    table = TableConfig.model_validate({"rows": rows})
    assert alone(table, tmp_path) is None  # nothing is measured yet
    (tmp_path / "ap/result.json").write_text(json.dumps({"metrics": {"AP": 0.3}, "read": {"annotations": photos(29)}}))
    made = "One detector, from timm's pretrained weights of resnet18d: Faster R-CNN, 320 px, 15 passes over 160 photos"
    sentence = f"{made}, evaluated on 29 photos. Nothing was compared."
    one = alone(table, tmp_path)
    assert one
    assert one[0] == sentence
    assert "ssld init --unlabeled DIR --distill yes" in one[1]
    assert "a second stage with like: detector, " in one[1]
    assert table_text(table, tmp_path).splitlines()[-2:] == list(one)
    assert "AP is measured on 29 images: too few" in table_text(table, tmp_path)
    stages = {"detector": {"command": "train"}, "ap": {"command": "evaluate_detector"}, "ssld": {"command": "distill"}}
    pipeline = PipelineConfig.model_validate({"output": "x", "stages": stages, "table": {"rows": rows}})
    page = render(pipeline, tmp_path, title="one")
    assert sentence.replace("'", "&#39;") in page
    assert "Compared:" not in page
    own = TableConfig.model_validate({"rows": {"detector": {"detector": "detector"}}})
    assert (alone(own, tmp_path) or ("",))[0] == f"{made}, evaluated on 40 photos. Nothing was compared."
    for other in (
        {"rows": rows | {"other": {"detector": "ap_2"}}},
        {"rows": rows, "gain": ["detector", "student"]},
        {"rows": {"student": rows["student"]}},
    ):
        assert alone(TableConfig.model_validate(other), tmp_path) is None
    write(tmp_path / "fewer", settings | {"data": {"keep_empty": False}})  # its empty photos are not counted
    (tmp_path / "fewer/result.json").write_text(json.dumps(record | {"read": "damaged"}))
    fewer = alone(TableConfig.model_validate({"rows": {"x": {"detector": "fewer"}}}), tmp_path)
    assert fewer
    assert "Faster R-CNN, 2,400 images seen, 320 px. Nothing" in fewer[0]
