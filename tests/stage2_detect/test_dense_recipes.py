"""The recipes of one-stage detectors resolve to the references' values, and each trains two steps and is evaluated at tiny size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssld.pipelines.toy_data import ToySizes, write_toy_data
from ssld.shared.run_dir import read_result
from ssld.stage2_detect import train
from ssld.stage2_detect.detector_file import load_detector
from ssld.stage2_detect.distill_config import ADLConfig, LDConfig
from tests.stage2_detect.conftest import written_again
from tests.stage2_detect.test_recipes import CONFIGS, DENSE, expected_scores, rate, resolved

SIDES_2X = list(range(480, 801, 32))
TV, GLUON = "timm:{}.tv_in1k", "timm:{}.gluon_in1k"

# HikariTJU/LD@4287990c: backbone, epochs, milestones, sides in training, deformable, published AP, teacher
GFL: dict[str, tuple[str, int, list[int], list[int], bool, float, str | None]] = {
    "gfl_r18_1x": ("resnet18", 12, [8, 11], [800], False, 35.8, None),
    "gfl_r34_1x": ("resnet34", 12, [8, 11], [800], False, 38.9, None),
    "gfl_r50_1x": ("resnet50", 12, [8, 11], [800], False, 40.1, None),
    "gfl_r101_2x": ("resnet101", 24, [16, 22], SIDES_2X, False, 44.6, None),
    "gfl_r101_dcn_2x": ("resnet101", 24, [16, 22], SIDES_2X, True, 47.1, None),
    "gfl_r18_ld_1x": ("resnet18", 12, [8, 11], [800], False, 37.5, "gfl_r101_2x"),
    "gfl_r34_ld_1x": ("resnet34", 12, [8, 11], [800], False, 41.0, "gfl_r101_2x"),
    "gfl_r50_ld_1x": ("resnet50", 12, [8, 11], [800], False, 42.1, "gfl_r101_2x"),
    "gfl_r101_ld_2x": ("resnet101", 24, [16, 22], SIDES_2X, False, 45.4, "gfl_r101_dcn_2x"),
}
# Tangshitao/Semi-supervised-Adaptive-Distillation@3244dfa: backbone, sides, steps, published AP, teacher
RETINANET: dict[str, tuple[str, tuple[int, int], int, float | None, str | None]] = {
    "retinanet_r50_600_1x": (TV.format("resnet50"), (600, 1000), 90_000, 34.3, None),
    "retinanet_r50_600_3x": (TV.format("resnet50"), (600, 1000), 270_000, None, None),
    "retinanet_r50_600_adl_3x": (TV.format("resnet50"), (600, 1000), 270_000, None, "retinanet_r101_600_1x"),
    "retinanet_r50_600_sad_3x": (TV.format("resnet50"), (600, 1000), 270_000, 36.5, "retinanet_r101_600_1x"),
    "retinanet_r101_600_1x": (TV.format("resnet101"), (600, 1000), 90_000, 36.0, None),
    "retinanet_r101_500_1x": (TV.format("resnet101"), (500, 833), 90_000, 34.4, None),
    "retinanet_r101_500_3x": (TV.format("resnet101"), (500, 833), 270_000, None, None),
    "retinanet_r101_500_adl_3x": (TV.format("resnet101"), (500, 833), 270_000, None, "retinanet_x101_64x4d_500_1x"),
    "retinanet_r101_500_sad_3x": (TV.format("resnet101"), (500, 833), 270_000, 36.8, "retinanet_x101_64x4d_500_1x"),
    "retinanet_x101_64x4d_500_1x": (GLUON.format("resnext101_64x4d"), (500, 833), 90_000, 36.6, None),
}


def test_every_recipe_is_in_a_table() -> None:
    assert set(DENSE) == {*GFL, *RETINANET, "gfl_r50_cwd_2x"}


def test_cwd_recipe() -> None:
    """PaddleDetection@005e0ff8: weight 5 at temperature 1 on the class maps, and no other term."""
    config, base = resolved("gfl_r50_cwd_2x"), resolved("gfl_r50_1x")
    distill = config.distill
    assert distill is not None
    assert (distill.cwd_class_weight, distill.cwd_temperature, distill.cwd_weight, distill.pkd(config.model)) == (
        5,
        1,
        0,
        0,
    )
    assert distill.ld == LDConfig(ld_weight=0, ld_vlr_weight=0, kd_weight=0)
    assert distill.teacher == resolved("gfl_r101_2x").output / "detector.safetensors"
    assert (config.train_epochs, config.optim.milestones_epochs, expected_scores(config)) == (24, [16, 22], ())
    changed = dict.fromkeys(("distill", "output", "expected", "train_epochs", "optim"))
    assert vars(config) | changed == vars(base) | changed


def common(name: str) -> None:
    """Settings that all of them share, and settings that students share with their baselines."""
    config = resolved(name)
    optim, model, resize = config.optim, config.model, config.resize
    assert (config.batch_size, optim.name, optim.lr, optim.reference_batch) == (16, "sgd", 0.01, 16)
    assert (optim.momentum, optim.weight_decay, optim.decay_norm_and_bias) == (0.9, 1e-4, True)
    assert optim.clip_grad_norm is None
    assert optim.backbone_lr_factors == [1] * 5
    assert (model.fpn_channels, model.freeze_stages, model.freeze_norm) == (256, 2, True)
    assert (resize.interpolation, resize.flip, config.data.keep_empty) == ("bilinear", 0.5, False)
    assert (model.dense.candidates, model.dense.score_threshold, model.dense.detections_per_image) == (1000, 0.05, 100)
    assert (model.dense.convolutions, model.dense.clip_boxes) == (4, True)
    if config.distill:
        teacher_name = config.distill.teacher.parent.name
        teacher = resolved(teacher_name)
        assert teacher.output == config.distill.teacher.parent
        assert (teacher.model.kind, teacher.model.gfl.reg_max) == (model.kind, model.gfl.reg_max)
        header = (CONFIGS / f"{name}.yaml").read_text().replace("\n# ", " ")
        assert f"{teacher_name}.yaml has to be trained first" in header
        base = resolved(name.replace("_ld_", "_").replace("_adl_", "_").replace("_sad_", "_"))
        same: dict[str, Any] = {"distill": None, "output": None, "expected": None}
        if "_sad_" in name:
            assert config.distill == resolved(name.replace("_sad_", "_adl_")).distill
            assert config.labeled_ratio == 0.75
            assert (
                str(config.pseudo) == f"{config.distill.teacher.parent}"[: -len("_1x")] + "_pseudo/pseudo_labels.json"
            )
            assert (
                f"--output {config.pseudo.parent if config.pseudo else ''}\n" in (CONFIGS / f"{name}.yaml").read_text()
            )
            same |= {"unlabeled": None, "pseudo": None, "labeled_ratio": base.labeled_ratio}
        assert vars(config) | same == vars(base) | same


@pytest.mark.parametrize("name", GFL)
def test_gfl_recipes(name: str) -> None:
    common(name)
    config = resolved(name)
    backbone, epochs, milestones, sides, deformable, published, teacher = GFL[name]
    assert config.backbone == TV.format(backbone)
    assert config.train_epochs == epochs
    assert config.optim.milestones(7329, 270_000) == [7329 * epoch for epoch in milestones]
    assert (rate(config, 0), rate(config, 500)) == (pytest.approx(1e-5), pytest.approx(0.01))
    assert rate(config, 7329 * milestones[1]) == pytest.approx(1e-4)
    assert (config.resize.train_short_sides, config.resize.train_long_side) == (sides, 1333)
    assert (config.resize.short_side, config.resize.long_side) == (800, 1333)
    model = config.model
    assert model.kind == "gfl"
    assert model.dcn_strides == ([8, 16, 32] if deformable else [])
    assert (model.dense.p6_from, model.dense.relu_before_p7, model.dense.nms_iou) == ("p5", False, 0.6)
    gfl = model.gfl
    assert (gfl.reg_max, gfl.tower_bias, gfl.unbiased_std, gfl.ignore_padding) == (16, False, True, True)
    assert (gfl.weight_floor, gfl.box_weight, gfl.dfl_weight) == (1e-6, 2, 0.25)
    assert expected_scores(config) == (published,)
    assert (config.distill.teacher.parent.name if config.distill else None) == teacher
    if config.distill:
        # Of the ResNet101 only main LD is published.
        assert config.distill.ld == (LDConfig(ld_vlr_weight=0, kd_weight=0) if name == "gfl_r101_ld_2x" else LDConfig())
        assert config.distill.pkd(model) == 0


@pytest.mark.parametrize("name", RETINANET)
def test_retinanet_recipes(name: str) -> None:
    common(name)
    config = resolved(name)
    backbone, (short, long), steps, published, teacher = RETINANET[name]
    assert config.backbone == backbone
    assert config.total_steps(None) == steps
    thirds = [steps * 2 // 3, steps * 8 // 9]
    assert (
        config.optim.milestones(7329, 270_000)
        == thirds
        == ([60_000, 80_000] if steps == 90_000 else [180_000, 240_000])
    )
    assert rate(config, 0) == pytest.approx(0.01 / 3, rel=1e-4)
    assert rate(config, 500 if steps == 90_000 else 1000) == pytest.approx(0.01)
    resize = config.resize
    assert (resize.train_short_sides, resize.train_long_side) == ([short], long)
    assert (resize.short_side, resize.long_side) == (short, long)
    model = config.model
    assert (model.kind, model.dcn_strides) == ("retinanet", [])
    assert (model.dense.p6_from, model.dense.relu_before_p7, model.dense.nms_iou) == ("c5", True, 0.5)
    retinanet = model.retinanet
    assert (retinanet.positive_iou, retinanet.negative_iou, retinanet.low_quality_iou) == (0.5, 0.4, 0.4)
    assert (retinanet.alpha, retinanet.gamma, retinanet.smooth_l1_beta) == (0.25, 2, 0.11)
    assert expected_scores(config) == ((published,) if published else ())
    assert (config.distill.teacher.parent.name if config.distill else None) == teacher
    if config.distill:
        assert config.distill.adl == ADLConfig(form="code")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes with boxes."""
    folder = tmp_path_factory.mktemp("toy")
    sizes = ToySizes(labeled=30, unlabeled=1, teacher_train=30, val=30, train_scenes=8, val_scenes=4)
    write_toy_data(folder, sizes=sizes)
    return folder / "stage2"


def run(call: Callable[..., int], name: str, toy: Path, output: Path, *flags: str) -> Path:
    """Two steps of a recipe and an evaluation; only sizes, the body and the data differ from it."""
    settings = {
        "backbone": "random:test_resnet",
        "data.train_annotations": toy / "train.json",
        "data.train_images": toy / "train",
        "data.val_annotations": toy / "val.json",
        "data.val_images": toy / "val",
        "resize.train_short_sides": "64,96",
        "resize.train_long_side": 96,
        "resize.short_side": 64,
        "resize.long_side": 64,
        "model.fpn_channels": 16,
        "steps": 2,
        "batch_size": 2,
        "workers": 0,
        "threads": 1,
        "device": "cpu",
        "output": output,
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    assert call(train.main, ["--config", str(CONFIGS / f"{name}.yaml"), *words, *flags]) == 0
    return output / "detector.safetensors"


@pytest.fixture(scope="module")
def teachers(toy: Path, tmp_path_factory: pytest.TempPathFactory, call: Callable[..., int]) -> dict[str, Path]:
    """A trained teacher of each kind, by its recipe."""
    folder = tmp_path_factory.mktemp("teachers")
    return {kind: run(call, name, toy, folder / kind) for kind, name in (("gfl", "gfl_r101_2x"), ("retinanet", "retinanet_r101_600_1x"))}  # fmt: skip


@pytest.mark.parametrize("name", [*DENSE, "toy_gfl", "toy_retinanet"])
def test_a_recipe_trains_and_is_evaluated(
    name: str, toy: Path, tmp_path: Path, call: Callable[..., int], teachers: dict[str, Path]
) -> None:
    kind = name.replace("toy_", "").split("_")[0]
    flags: list[str] = []
    if "_sad_" in name:  # the annotations serve as pseudo-labels
        same = written_again(toy / "train", tmp_path / "same")
        flags = ["--unlabeled", str(same), "--pseudo", str(toy / "train.json"), "--batch_size", "4"]
    if any(kind in name for kind in ("_ld_", "_cwd_", "_adl_", "_sad_")):
        flags += ["--distill.teacher", str(teachers[kind]), "--distill.check_ap", "0", "--distill.check_images", "1"]
    file = run(call, name, toy, tmp_path / "run", *flags)
    result = read_result(tmp_path / "run")
    assert result
    assert result["metrics"]["AP"] is not None
    loaded = load_detector(file)
    assert loaded.metadata["model"]["kind"] == kind
    assert ("teacher" in loaded.metadata) == bool(flags)
    assert all(torch.isfinite(tensor).all() for tensor in loaded.model.state_dict().values())
