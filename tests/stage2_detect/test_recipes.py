"""The recipes resolve to the references' values, and each builds, trains two steps and is evaluated at tiny size."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

from ssld.pipelines.toy_data import ToySizes, write_toy_data
from ssld.shared.config.settings import parse_config
from ssld.shared.models.backbones import input_settings
from ssld.shared.run_dir import read_result
from ssld.shared.training.optim import multistep_factor, parameter_groups, scale_lr
from ssld.stage2_detect import evaluate, train
from ssld.stage2_detect.config import TrainConfig
from ssld.stage2_detect.detector_file import load_detector
from ssld.stage2_detect.models.build import build_detector
from ssld.stage2_detect.models.freezing import lr_factor_of_parameter

CONFIGS = Path(__file__).parents[2] / "stage2_detect" / "configs"
ALL = sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("toy_"))
DENSE = [name for name in ALL if name.startswith(("gfl_", "retinanet_"))]  # test_dense_recipes.py
RECIPES = [name for name in ALL if name not in DENSE]
COCO_IMAGES = 117_266  # of train2017 with a box that is no crowd

SSLD_FACTORS = [0.05, 0.05, 0.05, 0.1, 0.15]
SIDES_800 = [640, 672, 704, 736, 768, 800]
SIDES_640 = list(range(384, 673, 32))
IOUS, WEIGHTS = [0.5, 0.6, 0.7], [10.0, 20.0, 30.0]

# PaddleDetection@666f597f: epochs, milestones in epochs, factor at the first step, proposals kept in training, AP
SSLD: dict[str, tuple[int, list[int], float, int, tuple[float, ...]]] = {
    "faster_rcnn_r50vd_ssld_1x": (12, [8, 11], 0.1, 1000, (41.4,)),
    "faster_rcnn_r50vd_ssld_2x": (24, [12, 22], 0.1, 1000, (42.3,)),
    "mask_rcnn_r50vd_ssld_1x": (12, [8, 11], 0.1, 1000, (42.0, 38.2)),
    "mask_rcnn_r50vd_ssld_2x": (24, [12, 22], 0.1, 1000, (42.7, 38.9)),
    "cascade_rcnn_r50vd_ssld_1x": (12, [8, 11], 0.001, 2000, (44.4,)),
    "cascade_rcnn_r50vd_ssld_2x": (24, [12, 22], 0.1, 2000, (45.0,)),
    "cascade_mask_rcnn_r50vd_ssld_1x": (12, [8, 11], 0.001, 2000, (44.9, 39.1)),
    "cascade_mask_rcnn_r50vd_ssld_2x": (24, [12, 22], 0.1, 2000, (45.7, 39.7)),
}
PLAIN = {
    "faster_rcnn_r50vd_1x": (39.5,),
    "mask_rcnn_r50vd_1x": (40.3, 36.4),
    "cascade_rcnn_r50vd_1x": (),
    "cascade_mask_rcnn_r50vd_1x": (),
}
# test sizes, training sides, longest side, published AP to compare with
PSS: dict[str, tuple[tuple[int, int], list[int], int, tuple[float, ...]]] = {
    "pss_faster_dcn_r50vd": ((640, 640), SIDES_640, 1000, (41.5,)),
    "pss_cascade_dcn_r50vd": ((1000, 1500), list(range(640, 1025, 32)), 1500, ()),
    "pss_cascade_dcn_r101vd": ((800, 1333), list(range(640, 1025, 32)), 1500, ()),
}
LSJ = "mask_rcnn_r50_lsj_100e"
OTHERS = {LSJ, "faster_rcnn", "faster_rcnn_mobilenetv3_ssld_1x", "faster_rcnn_convnext_tiny_1x"}


def resolved(name: str, *flags: str) -> TrainConfig:
    return parse_config(TrainConfig, ["--config", str(CONFIGS / f"{name}.yaml"), *flags], program="train.py")


def rate(config: TrainConfig, step: int) -> float:
    """Learning rate at a step (from 0) of a run over COCO."""
    per_epoch = COCO_IMAGES // config.batch_size
    optim = config.optim
    factor = multistep_factor(
        step,
        milestones=optim.milestones(per_epoch, 270_000),
        gamma=optim.gamma,
        warmup_steps=optim.total_warmup_steps(270_000),
        warmup_start=optim.warmup_start,
    )
    return factor * scale_lr(optim.lr, optim.reference_batch, config.batch_size, optim.name)


def expected_scores(config: TrainConfig) -> tuple[float, ...]:
    if config.expected is None:
        return ()
    assert config.expected.images == 5000
    return tuple(score for score in (config.expected.AP, config.expected.AP_segm) if score is not None)


def test_every_recipe_is_in_a_table() -> None:
    assert set(RECIPES) == {*SSLD, *PLAIN, *PSS, *OTHERS}


def assert_common(config: TrainConfig) -> None:
    """Settings that the SSLD, the plain and the PSS-DET recipes share."""
    optim, model, resize = config.optim, config.model, config.resize
    assert (optim.name, optim.momentum, optim.weight_decay, optim.decay_norm_and_bias) == ("sgd", 0.9, 1e-4, True)
    assert (optim.warmup_steps, optim.gamma, optim.clip_grad_norm, config.ema) == (1000, 0.1, None, None)
    assert (resize.interpolation, resize.kernel, resize.flip) == ("bicubic", "reference", 0.5)
    assert not config.data.keep_empty
    assert (model.freeze_stages, model.freeze_norm) == (2, True)
    rpn, roi, cascade = model.rpn, model.roi, model.cascade
    assert rpn.anchor_sizes == [32, 64, 128, 256, 512]
    assert rpn.anchor_ratios == [0.5, 1, 2]
    assert (rpn.positive_iou, rpn.negative_iou, rpn.samples_per_image, rpn.positive_fraction) == (0.7, 0.3, 256, 0.5)
    assert (rpn.nms_iou, roi.samples_per_image, roi.positive_fraction, roi.positive_iou) == (0.7, 512, 0.25, 0.5)
    assert (roi.hidden, roi.sampling_ratio, roi.aligned) == (1024, 0, True)
    assert (roi.score_threshold, roi.nms.kind, roi.nms.iou, roi.detections_per_image) == (0.05, "hard", 0.5, 100)
    assert cascade.positive_ious == IOUS
    assert [weights[0] for weights in cascade.delta_weights] == WEIGHTS
    assert [weights[2] for weights in cascade.delta_weights] == [weight / 2 for weight in WEIGHTS]


@pytest.mark.parametrize("name", [*SSLD, *PLAIN])
def test_ssld_and_plain_recipes(name: str) -> None:
    config = resolved(name)
    like = SSLD[name.replace("vd_1x", "vd_ssld_1x")]
    epochs, milestones, start, proposals, _ = like
    assert config.model.kind == name.partition("_r50vd")[0]
    assert config.train_epochs == epochs
    assert config.optim.milestones(14_658, 270_000) == [14_658 * epoch for epoch in milestones]
    assert config.total_steps(14_658 * 8) == 14_658 * epochs
    assert rate(config, 0) == pytest.approx(0.01 * start)
    assert rate(config, 500) == pytest.approx(0.01 * (start + (1 - start) / 2))
    assert rate(config, 1000) == pytest.approx(0.01)
    assert rate(config, 14_658 * milestones[1]) == pytest.approx(1e-4)
    assert config.batch_size == 8
    plain = "ssld" not in name
    assert config.optim.backbone_lr_factors == ([1.0] * 5 if plain else SSLD_FACTORS)
    assert config.backbone == ("timm:resnet50d.gluon_in1k" if plain else "runs/ssld_resnet50d/student.safetensors")
    assert expected_scores(config) == (PLAIN[name] if plain else like[-1])

    resize = config.resize
    assert (resize.train_short_sides, resize.train_long_side) == (SIDES_800, 1333)
    assert (resize.short_side, resize.long_side) == (800, 1333)
    assert not config.augment.auto_augment

    model = config.model
    assert_common(config)
    assert (model.fpn_channels, model.dcn_strides, model.roi.sampling) == (256, [], "random")
    rpn = model.rpn
    assert (rpn.pre_nms_top_n_train, rpn.post_nms_top_n_train, rpn.pre_nms_top_n_test, rpn.post_nms_top_n_test) == (
        2000,
        proposals,
        1000,
        1000,
    )
    assert (model.roi.box_loss.name, model.roi.box_loss.weight) == ("l1", 1)
    cascade = model.cascade
    assert cascade.loss_weights == [pytest.approx(1 / 3)] * 3
    assert (cascade.add_gt_each_stage, cascade.score_rois) == (False, "own")
    assert (model.mask.hidden, model.mask.convolutions, model.mask.pool_size, model.mask.threshold) == (
        256, 4, 14, 0.5,
    )  # fmt: skip


@pytest.mark.parametrize("name", PSS)
def test_pss_recipes(name: str) -> None:
    config = resolved(name)
    test_sizes, sides, longest, published = PSS[name]
    assert expected_scores(config) == published
    assert (config.batch_size, config.optim.lr, config.optim.reference_batch) == (16, 0.02, 16)
    assert config.optim.backbone_lr_factors == SSLD_FACTORS
    assert (config.resize.short_side, config.resize.long_side) == test_sizes
    assert (config.resize.train_short_sides, config.resize.train_long_side) == (sides, longest)
    assert config.augment.auto_augment
    assert_common(config)
    assert rate(config, 1000) == pytest.approx(0.02)
    model = config.model
    assert (model.fpn_channels, model.dcn_strides) == (64, [8, 16, 32])
    rpn, loss = model.rpn, model.roi.box_loss
    assert (rpn.pre_nms_top_n_train, rpn.post_nms_top_n_train, rpn.pre_nms_top_n_test, rpn.post_nms_top_n_test) == (
        2000,
        2000,
        500,
        300,
    )
    if name == "pss_faster_dcn_r50vd":
        assert config.total_steps(7329 * 16) == 36 * 7329
        assert config.optim.milestones(7329, 270_000) == [24 * 7329, 33 * 7329]
        assert rate(config, 0) == 0
        assert rate(config, 500) == pytest.approx(0.01)
        assert (model.kind, model.roi.sampling, model.roi.libra_bins) == ("faster_rcnn", "libra", 3)
        assert (loss.name, loss.weight, loss.normalization) == ("ciou", 10, "rois")
    else:
        assert config.total_steps(None) == 270_000
        assert config.optim.milestones(7329, 270_000) == [180_000, 240_000]
        assert rate(config, 0) == pytest.approx(0.002)
        assert rate(config, 500) == pytest.approx(0.011)
        assert (model.kind, model.roi.sampling) == ("cascade_rcnn", "random")
        assert (loss.name, loss.alpha, loss.gamma, loss.beta, loss.weight) == ("balanced_l1", 0.5, 1.5, 1, 1)
        assert model.cascade.loss_weights == [1, 0.5, 0.25]
        assert model.cascade.add_gt_each_stage
        assert model.cascade.score_rois == "last"
        assert ("resnet101d" in str(config.backbone)) == ("r101" in name)


def test_recipes_without_a_counterpart() -> None:
    """Those for data of one's own keep images without objects."""
    base, light, modern = (
        resolved(name) for name in ("faster_rcnn", "faster_rcnn_mobilenetv3_ssld_1x", "faster_rcnn_convnext_tiny_1x")
    )
    assert all(config.data.keep_empty and config.train_epochs == 12 for config in (base, light, modern))
    assert all(config.optim.milestones(10, 270_000) == [80, 110] for config in (base, light, modern))
    assert (base.optim.name, base.optim.lr, base.optim.backbone_lr_factors) == ("sgd", 0.01, SSLD_FACTORS)
    assert (light.optim.lr, light.optim.backbone_lr_factors) == (0.01, SSLD_FACTORS)
    assert (light.model.fpn_channels, light.model.freeze_stages, light.resize.short_side) == (128, 1, 640)
    assert (light.model.rpn.pre_nms_top_n_test, light.model.rpn.post_nms_top_n_test) == (500, 300)
    assert (modern.optim.name, modern.optim.lr, modern.optim.weight_decay) == ("adamw", 1e-4, 0.05)
    assert (modern.drop_path, modern.model.freeze_stages, modern.batch_size) == (0.2, 0, 16)
    assert modern.optim.backbone_lr_factors == [0.3, 0.4, 0.55, 0.75, 1.0]


def test_the_recipe_with_large_scale_jitter() -> None:
    """detectron2@2a365640, configs/new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py and the files that it imports."""
    config = resolved(LSJ)
    assert expected_scores(config) == (44.6,)
    assert config.backbone == "random:resnet50"
    assert (config.augment.large_scale_jitter, config.resize.train_long_side) == ((0.1, 2.0), 1024)
    assert (config.resize.flip, config.resize.interpolation) == (0.5, "bilinear")
    assert (config.resize.short_side, config.resize.long_side) == (800, 1333)
    assert (config.batch_size, config.total_steps(None)) == (64, 184_375)
    assert config.total_steps(None) * 64 == 100 * 118_000  # as the source counts passes
    optim = config.optim
    assert (optim.name, optim.momentum, optim.weight_decay, optim.decay_norm_and_bias) == ("sgd", 0.9, 4e-5, False)
    assert optim.backbone_lr_factors == [1.0] * 5
    assert optim.milestones(1, 184_375) == [163_889, 177_546]
    assert [rate(config, step) for step in (0, 250, 500, 163_888, 163_889, 177_546)] == pytest.approx(
        [0.0067, 0.1 * (0.067 + 0.933 / 2), 0.1, 0.1, 0.01, 0.001]
    )
    model = config.model
    assert (model.kind, model.freeze_stages, model.freeze_norm, model.fpn_norm) == ("mask_rcnn", 0, False, "batch")
    assert (model.fpn_channels, model.rpn.convolutions, model.rpn.samples_per_image) == (256, 2, 256)
    assert (model.roi.convolutions, model.roi.fully_connected, model.roi.hidden) == (4, 1, 1024)
    assert (model.roi.norm, model.mask.norm, model.mask.convolutions, model.mask.hidden) == ("batch", "batch", 4, 256)
    assert (model.rpn.post_nms_top_n_train, model.rpn.post_nms_top_n_test) == (1000, 1000)
    assert not config.data.keep_empty
    longer = header(LSJ).partition("Longer: ")[2].partition(". ")[0].split(", or ")
    for factor, line in zip((2, 4), longer, strict=True):
        more = resolved(LSJ, *line.split())
        assert more.total_steps(None) == factor * 184_375
        assert more.optim.milestones(1, 10**6) == [factor * 163_889, factor * 177_546]


def header(name: str) -> str:
    head = (CONFIGS / f"{name}.yaml").read_text().partition("\n\n")[0]
    return " ".join(line[1:].strip() for line in head.splitlines() if line.startswith("#"))


@pytest.mark.parametrize("name", [*SSLD, *PSS, LSJ])
def test_the_hours_in_a_header_are_those_of_its_step_times(name: str) -> None:
    """The step times are for 16 images on 8 GPUs; the cost is the sum of the parts named in the header."""
    cost = header(name).partition("Cost: ")[2]
    hours = re.search(r"about (\d+) V100 hours", cost)
    seconds = sum(float(part) for part in re.findall(r"(0\.\d+) s\b", cost))
    config = resolved(name)
    steps = config.total_steps(COCO_IMAGES) * config.batch_size / 16
    assert hours
    assert int(hours[1]) == pytest.approx(steps * seconds * 8 / 3600, rel=0.01)


def test_header_names_source_cost_and_published_scores() -> None:
    for name in ALL:
        comments = header(name)
        assert "ource" in comments or "recipe of this project" in comments, name
        assert "Cost: " in comments, f"{name}: no cost in its header"
        if name in {*SSLD, *PLAIN, *PSS}:
            assert "FPS" in comments or "speed" in comments, f"{name}: no speed in its header"
        for score in expected_scores(resolved(name)):
            assert str(score) in comments, f"{name}: expects {score}, but its header does not give it as published"


def factors_of_parameters(name: str, arch: str) -> dict[str, float]:
    """Learning-rate factor of every parameter that trains, as train.py sets it, on the recipe's own architecture."""
    config = resolved(name)
    body = timm.create_model(arch, features_only=True, pretrained=False)
    inputs = input_settings(body, {})
    detector = build_detector(config.model, classes=80, body=body, arch=arch, inputs=inputs)
    factors = lr_factor_of_parameter(body, config.optim.backbone_lr_factors)
    groups = parameter_groups(
        detector,
        weight_decay=config.optim.weight_decay,
        decay_norm_and_bias=config.optim.decay_norm_and_bias,
        lr_factor=lambda parameter: factors.get(parameter.removeprefix("pyramid.body."), 1.0),
    )
    return {parameter: group["lr_factor"] for group in groups for parameter in group["names"]}


@pytest.mark.parametrize(
    ("name", "arch", "blocks"),
    [
        ("cascade_mask_rcnn_r50vd_ssld_2x", "resnet50d", 4 + 6 + 3),
        ("pss_faster_dcn_r50vd", "resnet50d", 4 + 6 + 3),
        ("pss_cascade_dcn_r101vd", "resnet101d", 4 + 23 + 3),
        ("faster_rcnn_r50vd_1x", "resnet50d", 4 + 6 + 3),
    ],
)
def test_learning_rate_of_every_parameter(name: str, arch: str, blocks: int) -> None:
    actual = factors_of_parameters(name, arch)
    plain, deformable = "ssld" not in name and "pss" not in name, "dcn" in name
    expected = {"layer2": 0.05, "layer3": 0.1, "layer4": 0.15}
    for parameter, factor in actual.items():
        part = parameter.removeprefix("pyramid.body.").split(".")[0]
        if not parameter.startswith("pyramid.body.") or ".offset." in parameter or plain:
            assert factor == 1, parameter
        else:
            assert factor == expected[part], parameter  # stem and layer1 are frozen and have no group
        assert ".bn" not in parameter
        assert "downsample.2" not in parameter
    body = [parameter for parameter in actual if parameter.startswith("pyramid.body.")]
    # 3x3 and 1x1 convolutions of the bottlenecks, and a shortcut a stage; two tensors more for each 3x3's offsets
    assert len(body) == 3 * blocks + 3 + (2 * blocks if deformable else 0)
    heads = {parameter.split(".")[2] for parameter in actual if parameter.startswith("roi_heads.heads.")}
    assert len(heads) == (3 if "cascade" in name else 1)
    assert any(parameter.startswith("mask_head.") for parameter in actual) == ("mask" in name)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes with boxes and masks."""
    folder = tmp_path_factory.mktemp("toy")
    write_toy_data(
        folder, sizes=ToySizes(labeled=30, unlabeled=1, teacher_train=30, val=30, train_scenes=8, val_scenes=4)
    )
    return folder / "stage2"


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_and_is_evaluated(name: str, toy: Path, tmp_path: Path, call: Callable[..., int]) -> None:
    """Two steps and an evaluation at tiny size; only sizes, the body and the data differ from the recipe."""
    body = "test_convnext" if "convnext" in name else "test_resnet"
    run = tmp_path / "run"
    flags = {
        "backbone": f"random:{body}",
        "data.train_annotations": toy / "train.json",
        "data.train_images": toy / "train",
        "data.val_annotations": toy / "val.json",
        "data.val_images": toy / "val",
        "resize.train_short_sides": "64,96",
        "resize.train_long_side": 96,
        "resize.short_side": 64,
        "resize.long_side": 64,
        "model.fpn_channels": 16,
        "model.rpn.samples_per_image": 32,
        "model.rpn.post_nms_top_n_train": 40,
        "model.rpn.post_nms_top_n_test": 20,
        "model.roi.samples_per_image": 24,
        "model.roi.hidden": 32,
        "model.mask.hidden": 16,
        "steps": 2,
        "batch_size": 2,
        "workers": 0,
        "threads": 1,
        "device": "cpu",
        "output": run,
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    assert call(train.main, ["--config", str(CONFIGS / f"{name}.yaml"), *words]) == 0
    result = read_result(run)
    assert result
    config = resolved(name)
    assert ("AP_segm" in result["metrics"]) == config.model.has_masks
    loaded = load_detector(run / "detector.safetensors")
    assert loaded.metadata["model"]["kind"] == config.model.kind
    masks = [f"--images={toy / 'val'}", f"--annotations={toy / 'val.json'}", "--workers=0", "--device=cpu"]
    evaluation = tmp_path / "evaluation"
    assert call(evaluate.main, [f"--model={run / 'detector.safetensors'}", *masks, f"--output={evaluation}"]) == 0
    again = read_result(evaluation)
    assert again
    assert again["metrics"]["AP"] == result["metrics"]["AP"]
    for tensor in loaded.model.state_dict().values():
        assert torch.isfinite(tensor).all()
