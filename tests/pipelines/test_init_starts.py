"""`ssld init`: detectors that start from COCO weights, augmentation and trackers in the written pipeline, and a trial of such a detector.

The file in torch hub's cache is empty where nothing reads it, else that of a small detector under torchvision's names.
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import save_file

from ssld.pipelines import init, run
from ssld.pipelines.runner import trial
from ssld.pipelines.runner.estimate import Rate
from ssld.pipelines.runner.launch import Outcome, Signals
from ssld.pipelines.runner.stages import Stage
from ssld.pipelines.scaffold import augment, starts, weights
from ssld.pipelines.scaffold.split import split_content
from ssld.pipelines.scaffold.suggest import (
    Settings,
    Trained,
    networks_of,
    settings_of,
    shapes,
)
from ssld.pipelines.scaffold.trials import trials
from ssld.shared.errors import UserError
from ssld.shared.models.downloads import Download
from ssld.stage2_detect import train
from ssld.stage2_detect.config import TrainConfig
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.published import PUBLISHED, Published
from tests.pipelines import test_init as base
from tests.pipelines.scaffold.test_suggest import facts as facts_of

NAME = "fasterrcnn_resnet50_fpn_v2"
FAST = "fasterrcnn_resnet50_fpn"  # proposed for a CPU
LINE = ["--images", "photos", "--annotations", "all.json", "--output", "mine.yaml"]
photos = base.photos
Output = pytest.CaptureFixture[str]


@pytest.fixture
def cached(photos: Path) -> Path:
    """The published file in torch hub's cache."""
    starts.hub_folder().mkdir(parents=True)
    file = starts.hub_folder() / PUBLISHED[NAME].file
    file.touch()
    return file


def written(file: str = "mine.yaml") -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(Path(file).read_text())
    return content


def test_coco_weights_at_hand_are_compared_with_imagenets(cached: Path, capfd: Output) -> None:
    """Each detector builds the network of its start; the table and the evaluations compare them."""
    assert init.main(LINE) == 0
    assert "COCO" not in capfd.readouterr().out
    content = written()
    assert list(content["stages"]) == ["detector_coco", "detector_imagenet", "ap_imagenet", "ap_coco", "report"]
    assert content["table"] == {
        "rows": {"COCO": {"detector": "ap_coco"}, "ImageNet": {"detector": "ap_imagenet"}},
        "gain": ["COCO", "ImageNet"],
    }
    configs = base.stages_of("mine.yaml")
    coco, own = configs["detector_coco"], configs["detector_imagenet"]
    assert isinstance(coco, TrainConfig)
    assert isinstance(own, TrainConfig)
    assert coco.model.geometry() == DetectorConfig.model_validate(PUBLISHED[NAME].model).geometry()
    assert (coco.model.roi.convolutions, coco.model.fpn_norm, coco.model.freeze_norm) == (4, "batch", True)
    assert (coco.backbone, str(coco.init), own.init) == (None, f"coco:{NAME}", None)
    assert (own.backbone, own.model.fpn_channels, own.unit_scale) == ("timm:resnet18d.ra2_in1k", 128, True)
    assert own.model.fpn_norm == "none"
    same = ("steps", "batch_size", "data", "optim", "augment", "evaluate_every", "seed")
    assert all(getattr(coco, key) == getattr(own, key) for key in same)
    assert coco.resize == own.resize.model_copy(update={"interpolation": "bilinear"})
    assert str(configs["ap_coco"].compare) == "runs/ap_imagenet/detections.json"
    for flags in ([], ["--smoke"]):
        assert run.main(["mine.yaml", "--dry-run", *flags]) == 0, capfd.readouterr().err
    out = capfd.readouterr().out
    assert "--init null" in out
    assert "about " in out.partition("detector_coco: ")[2].partition("\n")[0]


def test_the_backbone_of_stage_1_below_the_heads_of_coco(cached: Path, capfd: Output) -> None:
    """Where both backbones are of one architecture; the lines of stage 1 and of all four detectors add up in the table."""
    line = [*base.WITH_STAGE_1, "--backbone", "timm:resnet50.a1_in1k"]
    assert init.main(line) == 0
    assert [name for name in written()["stages"] if name.startswith(("ssld", "detector"))] == [
        *("ssld", "detector_coco", "detector_coco_ssld", "detector_imagenet", "detector_ssld")
    ]
    configs = base.stages_of("mine.yaml")
    both, own = configs["detector_coco_ssld"], configs["detector_ssld"]
    assert (str(both.init), both.backbone) == (f"coco:{NAME}", "runs/ssld/student.safetensors")
    assert (own.init, own.backbone, own.model.fpn_norm) == (None, "runs/ssld/student.safetensors", "none")
    assert list(written()["table"]["rows"]) == ["SSLD", "COCO", "SSLD below the heads of COCO", "ImageNet"]
    assert run.main(["mine.yaml", "--dry-run"]) == 0, capfd.readouterr().err


def test_starts_of_ones_own_choice(cached: Path, photos: Path, capfd: Output) -> None:
    assert init.main([*LINE, "--starts", "coco"]) == 0
    assert list(written()["stages"]) == ["detector", "ap", "report"]
    assert "backbone" not in written()["variables"]
    assert "chosen: photos of " in capfd.readouterr().out
    assert init.main([*LINE, "--output", "none.yaml", "--starts", "random"]) == 0
    assert yaml.safe_load(Path("none.yaml").read_text())["variables"]["backbone"] == "random:resnet18d"
    assert base.stages_of("none.yaml")["detector"].backbone == "random:resnet18d"
    assert init.main([*LINE, "--output", "two.yaml", "--starts", "random,imagenet"]) == 0
    configs = base.stages_of("two.yaml")
    none, own = configs["detector_random"], configs["detector_imagenet"]
    assert none.backbone == "random:resnet18d"
    for config in (none, own):  # random weights need BatchNorm that trains, so all detectors have it
        assert (config.model.freeze_norm, config.batch_size) == (False, 4)
    assert written("two.yaml")["table"]["gain"] == ["ImageNet", "random weights"]


def test_a_detector_file_as_a_start(photos: Path, capfd: Output) -> None:
    """Its settings are written, since a training does not read them from the file."""
    metadata: dict[str, Any] = {"kind": "detector", "arch": "resnet18", "resize": {"interpolation": "bilinear"}}
    model = DetectorConfig.model_validate(PUBLISHED[NAME].model | {"fpn_channels": 64})
    metadata["model"] = model.model_dump(mode="json")
    assert init.main([*LINE, "--output", "plain.yaml", "--starts", "imagenet"]) == 0
    save_file({}, "own.safetensors", {"ssld": json.dumps(metadata)})
    assert init.main([*LINE, "--init", "own.safetensors"]) == 0
    assert list(written()["table"]["rows"]) == ["own.safetensors", "ImageNet"]
    configs = base.stages_of("mine.yaml")
    config = configs["detector_coco"]
    assert str(config.init) == str(photos / "own.safetensors")
    assert config.model == model.model_copy(update={"freeze_norm": True})
    assert config.resize.interpolation == "bilinear"
    own, plain = configs["detector_imagenet"], base.stages_of("plain.yaml")["detector"]
    assert (own.model, own.resize, own.init) == (plain.model, plain.resize, None)


def test_without_network_and_files_one_line_says_how(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: Output
) -> None:
    """The proposal is then that of the backbone alone; with a network the file need not be here. What the user names has to be within reach."""
    possible = False

    def looked(references: dict[str, str]) -> list[Download]:
        return [Download(key, "x", possible=possible) for key, text in references.items() if text.startswith("url:")]

    monkeypatch.setattr(weights, "find_downloads_apart", looked)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert init.main(LINE) == 0
    assert list(written()["stages"]) == ["detector", "ap", "report"]
    lines = [line for line in capfd.readouterr().out.splitlines() if "COCO" in line]
    url = PUBLISHED[FAST].url
    assert lines == [
        "COCO weights, which may be the better start, are not on this machine and cannot be downloaded here: "
        f"put {url} into {starts.hub_folder()}, or give a detector file as --init FILE"
    ]
    assert init.main([*LINE, "--output", "other.yaml", "--starts", "coco"]) == 2
    assert f"error: --init coco:{FAST}: its weights are not on this machine" in capfd.readouterr().err
    assert not list(photos.glob("other*"))
    possible = True
    assert init.main([*LINE, "--output", "new.yaml"]) == 0
    assert "detector_coco:" in Path("new.yaml").read_text()
    assert f"coco:{FAST}: its weights are downloaded when the pipeline runs" in capfd.readouterr().out
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # then nobody waits for a proposal
    assert init.main([*LINE, "--output", "offline.yaml"]) == 0
    assert "coco" not in Path("offline.yaml").read_text()


def test_coco_weights_alone_where_the_backbones_are_missing(
    cached: Path, monkeypatch: pytest.MonkeyPatch, capfd: Output
) -> None:
    monkeypatch.setattr(
        weights,
        "find_downloads_apart",
        lambda references: [Download(key, "no", possible=False) for key in references],
    )
    assert init.main(LINE) == 0
    assert written()["stages"]["detector"]["set"]["init"] == f"coco:{NAME}"
    assert f"is not on this machine: the detector starts from coco:{NAME} alone" in capfd.readouterr().out
    assert init.main([*LINE, "--output", "own.yaml", "--backbone", "timm:resnet18d"]) == 2
    assert "no: --backbone FILE --arch NAME" in capfd.readouterr().err


def test_coco_weights_that_do_not_fit_are_left_out(
    cached: Path, monkeypatch: pytest.MonkeyPatch, capfd: Output
) -> None:
    def slow(settings: Settings, trained: Trained, limit: float) -> Rate:
        return replace(base.quick_machine(settings, trained, limit), step=9.0 if trained == "coco" else 0.1)

    monkeypatch.setattr(init, "trials", lambda facts, files: nullcontext(slow))
    assert init.main([*LINE, "--minutes", "5"]) == 0
    assert "init:" not in Path("mine.yaml").read_text()
    assert "COCO weights left out: a step of ResNet50 takes 9 s here; they fit in 1" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("asked", "most", "expected"),
    [("auto", 1e9, None), ("auto", 5.0, "strong"), ("none", 5.0, None), ("cells", 1e9, "cells")],
)
def test_augmentation_and_its_reason(
    asked: str, most: float, expected: str | None, photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: Output
) -> None:
    monkeypatch.setattr(augment, "MANY_PASSES", most)
    assert init.main([*LINE, "--augment", asked]) == 0
    detector = base.stages_of("mine.yaml")["detector"]
    assert detector.augment.preset == expected
    images = len(json.loads(Path("mine_train.json").read_text())["images"])
    reason = augment.choose_augment(asked, detector.steps * detector.batch_size / images)[1]
    (line,) = [line for line in Path("mine.yaml").read_text().splitlines() if "augment: " in line]
    assert reason in line
    assert f"augmentation: {expected or 'none'}, {reason}" in capfd.readouterr().out


@pytest.mark.parametrize("installed", [True, False])
def test_tensorboard_where_it_is_installed(installed: bool, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "find_spec", lambda name: object() if installed else None)
    assert init.main(base.WITH_STAGE_1) == 0
    configs = base.stages_of("mine.yaml")
    for name in ("ssld", "detector_imagenet", "detector_ssld"):
        assert configs[name].trackers == (["tensorboard"] if installed else [])
    assert ("tensorboard --logdir runs/mine" in Path("mine.yaml").read_text()) is installed


TINY = {"kind": "faster_rcnn", "fpn_channels": 16, "fpn_norm": "batch", "freeze_norm": False}
TINY |= {
    "rpn": {"anchor_grid": "torchvision", "post_nms_top_n_train": 40},
    "roi": {"hidden": 32, "samples_per_image": 24},
}


@pytest.mark.parametrize("here", [False, True])
def test_a_trial_of_a_start_from_coco_needs_no_weights(
    here: bool,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same network with random weights is as fast: where the file is not here, nothing is downloaded; where it is, it is read."""
    monkeypatch.setitem(PUBLISHED, "tiny", Published("tiny-00000000.pth", TINY, 1.0, arch="test_resnet"))
    seen: list[Stage] = []

    def run_here(stage: Stage, console: Path, signals: Signals, *, quiet: bool = False) -> Outcome:
        words = [*stage.arguments, "--device", "cpu", "--threads", "1", "--workers", "0"]
        seen.append(stage)
        code = call(train.main, words)
        return Outcome(code, ("failed",) if code else ())

    monkeypatch.setattr(trial, "run_stage", run_here)
    detector = starts.published_init("tiny")
    assert not detector.here
    if here:
        starts.hub_folder().mkdir(parents=True)
        (starts.hub_folder() / "tiny-00000000.pth").write_bytes(b"damaged")
        detector = starts.published_init("tiny")
    split = split_content(base.content(), share=0.2, seed=0)
    files = {Path(f"{part}.json"): json.dumps(one) for part, one in zip(("train", "val"), split, strict=True)}
    facts = replace(
        facts_of(100, [0.4] * 5),
        annotations=Path("train.json"),
        val_annotations=Path("val.json"),
        images_folder=photos / "photos",
        val_images=photos / "photos",
        images=32,
        starts=("coco_ssld", "ssld"),
        init=detector,
    )
    networks = networks_of(gpu=False, backbone="random:test_resnet", arch=None, teacher=None, teacher_arch=None)
    (shape, *_) = shapes(facts, networks[1:])
    settings = settings_of(facts, replace(shape, short_side=64), steps=60, distill_steps=20, evaluate_every=None)
    with trials(facts, files) as measured:
        if here:
            with pytest.raises(UserError, match="trial of detector_coco: failed"):
                measured(settings, "coco", 60.0)
            assert "tiny-00000000.pth: its sha256 begins with" in capsys.readouterr().err
            return
        rates = [measured(settings, trained, 60.0) for trained in ("coco", "detector")]
    for rate, stage in zip(rates, seen, strict=True):
        assert rate
        assert rate.step > 0
        assert isinstance(stage.config, TrainConfig)
        assert (stage.config.steps, stage.config.init, stage.config.backbone) == (3, None, "random:test_resnet")
        assert stage.config.data.val_annotations is None
    models = [stage.config.model for stage in seen if isinstance(stage.config, TrainConfig)]
    assert [model.fpn_channels for model in models] == [16, 64]
