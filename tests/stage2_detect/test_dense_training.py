"""One-stage detectors by the real command: teacher and student, files, resume, ranks, and errors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.batchnorm import _BatchNorm

from ssld.shared.errors import UserError
from ssld.shared.models.model_file import read_metadata
from ssld.shared.run_dir import read_result
from ssld.stage2_detect import evaluate, train
from ssld.stage2_detect.config import TrainConfig
from ssld.stage2_detect.data_config import DetectionDataConfig
from ssld.stage2_detect.detector_file import load_detector
from ssld.stage2_detect.distill_config import ADLConfig, DistillConfig, LDConfig
from ssld.stage2_detect.distillation.dense import DistilledDense
from ssld.stage2_detect.distillation.teacher import FrozenDetector, open_teacher
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.batch import ImageBatch
from ssld.stage2_detect.models.dense import DenseDetector
from ssld.stage2_detect.models.retinanet import RetinaNet

Settings = dict[str, Any]
Arguments = Callable[..., list[str]]
Call = Callable[..., int]
KINDS = ["gfl", "retinanet"]
TERMS = {"gfl": ("ld", "ld_vlr", "kd"), "retinanet": ("adl",)}


def dense_settings(settings: Settings, kind: str) -> Settings:
    model = {"kind": kind, "fpn_channels": 16, "freeze_norm": True, "dense": {"convolutions": 1}, "gfl": {"reg_max": 8}}
    optim = settings["optim"] | {"clip_grad_norm": 5.0}
    return settings | {"model": model, "optim": optim}


@pytest.fixture
def teachers(train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path) -> Callable[[str], Path]:
    """Trains a detector by the command, on the classes in another order than the student's."""

    def make(kind: str, **changes: Any) -> Path:
        data = dict(train_settings["data"])
        for part in ("train", "val"):
            content = json.loads(Path(data[f"{part}_annotations"]).read_text())
            content["categories"].reverse()
            for category, number in zip(content["categories"], (1, 2), strict=True):
                for annotation in content["annotations"]:
                    if annotation["category_id"] == category["id"]:
                        annotation["category_id"] = -number
                category["id"] = number
            for annotation in content["annotations"]:
                annotation["category_id"] *= -1
            data[f"{part}_annotations"] = str(tmp_path / f"reversed_{part}.json")
            (tmp_path / f"reversed_{part}.json").write_text(json.dumps(content))
        settings = dense_settings(train_settings | {"data": data, "seed": 5}, kind)
        settings["model"] |= {key: value for key, value in changes.items() if key in settings["model"]}
        assert call(train.main, arguments(settings, f"teacher_{kind}")) == 0
        return tmp_path / f"teacher_{kind}" / "detector.safetensors"

    return make


def under(settings: Settings, kind: str, teacher: Path, **distill: Any) -> Settings:
    return dense_settings(settings, kind) | {
        "distill": {"teacher": str(teacher), "check_ap": 0.0, "check_images": 3, **distill}
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_a_student_and_its_resumption(
    kind: str,
    train_settings: Settings,
    teachers: Callable[[str], Path],
    arguments: Arguments,
    call: Call,
    tmp_path: Path,
    files_below: Callable[[Path], set[str]],
    metrics_of: Callable[[Path], list[dict[str, Any]]],
) -> None:
    teacher = teachers(kind)
    settings = under(train_settings, kind, teacher) | {"ema": {"decay": 0.9}, "val_loss": True}
    assert call(train.main, arguments(settings, "whole")) == 0
    run = tmp_path / "whole"
    parts = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS", "COMPLETE")
    plain = {".lock", "batches.jpg", "config.yaml", "environment.json", "log.txt", "metrics.jsonl", "result.json"}
    checkpoints = {f"checkpoints/step_{step:08d}/{name}" for step in (4, 6) for name in parts}
    checkpoints.add("checkpoints/step_00000006/evaluation.json")
    left = {name for name in files_below(run) if not name.startswith("pictures/")}
    assert left == plain | checkpoints | {"detector.safetensors", "analysis.json"}

    log = (run / "log.txt").read_text()
    assert f"teacher {teacher}: AP " in log
    # Neither can detect anything, so the student has reached its teacher at the first of the evaluations.
    assert log.count("warning: the teacher is no better than its student: AP 0.00 against 0.00 on 3 images of ") == 1
    weights = {"gfl": "loss_ld x0.25, loss_ld_vlr x0.25, loss_kd x10", "retinanet": "loss_adl x1"}[kind]
    assert f"teacher {teacher} ({kind} on test_resnet): {weights}\n" in log
    assert log.count("distill.ld.ld_temperature: 10 suits trainings of many thousand steps") == (kind == "gfl")
    assert ("model.gfl: unused by kind: retinanet\n" in log) == (kind == "retinanet")
    own = ("cls", "box", "dfl") if kind == "gfl" else ("cls", "box")
    steps = [line for line in metrics_of(run) if "loss_cls" in line]
    assert len(steps) == 6
    for line in steps:
        assert line["loss"] == pytest.approx(sum(line[f"loss_{name}"] for name in (*own, *TERMS[kind])), rel=1e-3)
        assert all(line[f"loss_{name}"] > 0 for name in TERMS[kind])
    result = read_result(run)
    assert result
    assert result["metrics"]["loss"] == pytest.approx(sum(result["metrics"][f"loss_{name}"] for name in own))

    metadata = read_metadata(run / "detector.safetensors", kind="detector")
    assert metadata["teacher"]["content_sha256"] == read_metadata(teacher)["content_sha256"]
    model = load_detector(run / "detector.safetensors").model
    assert load_file(run / "checkpoints/step_00000006/model.safetensors").keys() == model.state_dict().keys()
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())

    data = DetectionDataConfig(**settings["data"])
    flags = [f"--annotations={data.val_annotations}", f"--images={data.val_images}", "--workers=0", "--device=cpu"]
    words = [f"--model={run / 'detector.safetensors'}", *flags, f"--output={tmp_path / 'ap'}"]
    assert call(evaluate.main, words) == 0
    again = read_result(tmp_path / "ap")
    assert again
    assert again["metrics"]["AP"] == result["metrics"]["AP"]

    assert call(train.main, arguments(settings | {"steps": 3}, "parts")) == 0
    assert call(train.main, arguments(settings, "parts")) == 0
    last = "checkpoints/step_00000006"
    for file in ("detector", f"{last}/model", f"{last}/ema", f"{last}/optimizer"):
        one, two = (load_file(tmp_path / name / f"{file}.safetensors") for name in ("whole", "parts"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one), file


def test_a_dense_teacher_uses_the_students_class_order(teachers: Callable[[str], Path]) -> None:
    images = torch.randn(1, 16, 4, 4)
    for kind in KINDS:
        file = teachers(kind)
        own = load_detector(file)
        assert own.class_names == ("tall", "wide")
        teacher = open_teacher(
            file, ["wide", "tall"], (8, 16, 32, 64, 128), device=torch.device("cpu"), channels_last=False
        )
        assert isinstance(own.model, DenseDetector)
        (logits, values), (permuted, kept) = own.model.dense([images]), teacher.outputs([images])
        torch.testing.assert_close(permuted, logits[..., [1, 0]])
        assert not torch.allclose(permuted, logits)
        torch.testing.assert_close(kept, values)
        # Its BatchNorm is folded, which does not change its features.
        pixels = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
        batch = ImageBatch(pixels, torch.tensor([[64, 96]]), torch.ones(1))
        for feature, plain in zip(teacher.features(batch), own.model.eval().features(batch), strict=True):
            torch.testing.assert_close(feature, plain, rtol=1e-4, atol=1e-4)
        norms = [sum(isinstance(m, _BatchNorm) for m in net.modules()) for net in (teacher.model, own.model)]
        assert norms[0] < norms[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_distil_as_one(
    kind: str,
    train_settings: Settings,
    teachers: Callable[[str], Path],
    on_one_and_two: Callable[..., Any],
) -> None:
    settings = under(train_settings, kind, teachers(kind)) | {"steps": 4, "batch_size": 6, "auto_batch": True}
    output, lines = on_one_and_two(train.main, "stage2_detect/train.py", settings)
    assert "auto_batch: 3 of 6 images per process and pass fit, so accumulate is 1\n" in output
    assert [line["step"] for line in lines if "loss_cls" in line] == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_scenes_without_any_object_train(
    kind: str,
    train_settings: Settings,
    teachers: Callable[[str], Path],
    arguments: Arguments,
    call: Call,
    tmp_path: Path,
    metrics_of: Callable[[Path], list[dict[str, Any]]],
) -> None:
    """One object in twelve scenes: most batches of two have none."""
    settings = under(train_settings, kind, teachers(kind), pkd_weight=1.0) | {"batch_size": 2, "steps": 6}
    content = json.loads(Path(settings["data"]["train_annotations"]).read_text())
    content["annotations"] = content["annotations"][:1]
    (tmp_path / "bare.json").write_text(json.dumps(content))
    settings["data"] = settings["data"] | {"train_annotations": str(tmp_path / "bare.json")}
    assert call(train.main, arguments(settings)) == 0
    steps = [line for line in metrics_of(tmp_path / "run") if "loss_cls" in line]
    assert len(steps) == 6
    assert sum(line["loss_box"] == 0 for line in steps) >= 5
    for line in steps:
        assert all(torch.isfinite(torch.tensor(value)) for name, value in line.items() if name.startswith("loss"))
    tensors = load_file(tmp_path / "run" / "detector.safetensors").values()
    assert all(torch.isfinite(tensor).all() for tensor in tensors)


def test_correlation_of_maps_of_another_width(
    train_settings: Settings, teachers: Callable[..., Path], arguments: Arguments, call: Call, tmp_path: Path
) -> None:
    settings = under(train_settings, "gfl", teachers("gfl", fpn_channels=24), pkd_weight=2.0) | {"steps": 1}
    assert call(train.main, arguments(settings)) == 0
    assert "loss_kd x10, loss_pkd x2\n" in (tmp_path / "run" / "log.txt").read_text()
    adapters = load_file(tmp_path / "run/checkpoints/step_00000001/adapters.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in adapters.items() if name.endswith("weight")} == {
        f"{level}.weight": (24, 16, 1, 1) for level in range(5)
    }


def test_settings_that_do_not_fit(train_settings: Settings, tmp_path: Path) -> None:
    def fault(kind: str, **distill: Any) -> str:
        settings = dense_settings(train_settings, kind) | {"output": str(tmp_path / "run")}
        settings["distill"] = {"teacher": "teacher.safetensors", **distill}
        with pytest.raises(ValueError, match="distill") as caught:
            TrainConfig(**settings)
        return str(caught.value)

    assert "distill.adl: compares class probabilities per anchor" in fault("gfl", adl={})
    assert "model.kind is gfl, whose settings are distill.ld" in fault("gfl", adl={})
    assert "distill.ld: compares distributions of distances, which only gfl heads predict" in fault("retinanet", ld={})
    assert "model.kind is faster_rcnn, whose settings are distill.pkd_weight, cwd_weight and roi_weight" in fault(
        "faster_rcnn", ld={}
    )
    assert "distill.roi_weight: applies to RoIs" in fault("gfl", roi_weight=1.0)
    assert "distill.temperature: applies to RoIs" in fault("retinanet", temperature=2.0)
    without_ld = fault("gfl", ld={"ld_weight": 0, "ld_vlr_weight": 0, "kd_weight": 0})
    assert "distill.ld, pkd_weight, cwd_weight and cwd_class_weight are 0" in without_ld
    without_adl = fault("retinanet", adl={"weight": 0})
    assert "distill.adl.weight, pkd_weight, cwd_weight and cwd_class_weight are 0" in without_adl
    assert "distill.cwd_class_weight: applies to class maps" in fault("faster_rcnn", cwd_class_weight=1.0)
    distill = DistillConfig(teacher=Path("x"))
    models = [TrainConfig(**dense_settings(train_settings, kind), output=tmp_path).model for kind in ("gfl", "faster_rcnn")]  # fmt: skip
    assert [(distill.pkd(model), distill.roi(model)) for model in models] == [(0, 0), (6, 1)]


@pytest.mark.parametrize("term", [name for name in LDConfig.model_fields if name.endswith("weight")])
def test_each_term_of_ld_uses_the_teacher_alone(term: str) -> None:
    none = {"ld_weight": 0.0, "ld_vlr_weight": 0.0, "kd_weight": 0.0}
    distill = DistillConfig(teacher=Path("x"), ld=LDConfig(**none | {term: 3.0}))
    model = DetectorConfig(kind="gfl")
    assert distill.fault(model) is None
    terms = distill.head_terms(model)
    assert terms
    assert {name: weight for name, weight in terms.weights.items() if weight} == {
        f"loss_{term[: -len('_weight')]}": 3.0
    }


@pytest.mark.parametrize(
    ("ld", "steps", "doubted"),
    [
        ({}, 100, True),
        ({}, 90_000, False),
        ({"ld_temperature": 1.0}, 100, False),
        ({"ld_weight": 0.0}, 100, True),
        ({"ld_weight": 0.0, "ld_vlr_weight": 0.0}, 100, False),
    ],
)
def test_the_temperature_of_a_short_training_is_doubted(ld: dict[str, float], steps: int, doubted: bool) -> None:
    distill = DistillConfig(teacher=Path("x"), ld=LDConfig(**ld))
    assert (distill.doubt(DetectorConfig(kind="gfl"), steps) is not None) == doubted
    assert DistillConfig(teacher=Path("x")).doubt(DetectorConfig(kind="retinanet"), steps) is None


def test_teachers_that_do_not_fit(
    train_settings: Settings,
    teachers: Callable[..., Path],
    arguments: Arguments,
    call: Call,
    user_error: Callable[..., str],
    tmp_path: Path,
    teacher_file: Path,
) -> None:
    def message(settings: Settings) -> str:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        line = user_error(train.main, arguments(settings, "bad"))
        assert not list((tmp_path / "bad").rglob("*.safetensors"))
        return line

    gfl, retinanet = teachers("gfl"), teachers("retinanet")
    assert call(train.main, arguments(train_settings | {"steps": 1}, "rcnn")) == 0
    rcnn = tmp_path / "rcnn" / "detector.safetensors"
    assert message(under(train_settings, "retinanet", gfl)) == (
        f"distill.teacher: {gfl}: it is a gfl detector, and adaptive distillation needs a retinanet teacher; "
        "under this teacher train a gfl student, by LD"
    )
    other = message(under(train_settings, "gfl", retinanet))
    assert (
        "it is a retinanet detector, and LD needs a gfl teacher; under this teacher train a retinanet student" in other
    )
    mixed = message(under(train_settings, "gfl", rcnn))
    assert (
        "it is a faster_rcnn detector; a one-stage detector cannot be the teacher of an R-CNN, or the reverse" in mixed
    )
    plain = train_settings | {"distill": {"teacher": str(gfl), "check_ap": 0.0}}
    assert "it is a gfl detector; a one-stage detector cannot be the teacher of an R-CNN" in message(plain)
    finer = under(train_settings, "gfl", gfl)
    finer["model"] = finer["model"] | {"gfl": {"reg_max": 16}}
    assert "its distances have reg_max 8, the student's 16; set model.gfl.reg_max to 8" in message(finer)
    wide = under(train_settings, "gfl", gfl, ld={"imitation_weight": 1.0})
    wide["model"] = wide["model"] | {"fpn_channels": 24}
    assert "distill.ld.imitation_weight: the teacher's maps have 16 channels, the student's 24" in message(wide)
    assert f"{teacher_file}: " in (line := message(under(train_settings, "gfl", teacher_file)))
    assert "backbone" in line
    with pytest.raises(UserError, match="the 2 of the training annotations: only the training annotations has 'long'"):
        open_teacher(gfl, ["wide", "long"], (8, 16, 32, 64, 128), device=torch.device("cpu"), channels_last=False)
    assert "AP 0.00 on 3 images" in message(under(train_settings, "gfl", gfl, check_ap=1.0))

    model = load_detector(retinanet).model
    assert isinstance(model, DenseDetector)
    assert isinstance(model.dense, RetinaNet)
    strange = load_detector(retinanet).model
    strange.dense.ratios = (0.5, 1.0, 3.0)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="its anchors are not the student's"):
        DistilledDense(model, FrozenDetector(strange), ADLConfig())


def test_init_on_other_classes_keeps_rows(
    train_settings: Settings, teachers: Callable[[str], Path], arguments: Arguments, call: Call, tmp_path: Path
) -> None:
    for kind in KINDS:
        file = teachers(kind)
        settings = dense_settings(train_settings, kind) | {"init": str(file), "steps": 1}
        settings["optim"] = settings["optim"] | {"lr": 1e-30}
        assert call(train.main, arguments(settings, f"on_{kind}")) == 0
        assert "rows of 2 classes kept (wide, tall)" in (tmp_path / f"on_{kind}" / "log.txt").read_text()
        before, after = load_file(file), load_file(tmp_path / f"on_{kind}" / "detector.safetensors")
        name = "dense.head.logits.weight"
        assert torch.equal(after[name], before[name].unflatten(0, (-1, 2)).flip(1).flatten(0, 1))
