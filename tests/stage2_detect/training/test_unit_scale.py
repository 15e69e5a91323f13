"""Initial weights that suit the scale of a backbone's maps: any backbone trains at the usual rate, on which without them some diverge."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import FeatureListNet
from timm.models.byobnet import ByoBlockCfg
from timm.models.hgnet import HighPerfGpuNet
from torch import Tensor, nn

import ssld
from ssld.shared.config.settings import parse_config
from ssld.shared.errors import UserError
from ssld.shared.models.backbones import InputSettings, create_body
from ssld.shared.models.model_file import read_metadata
from ssld.shared.models.references import parse_reference
from ssld.shared.training.optim import make_optimizer, parameter_groups, set_lr
from ssld.stage2_detect import train
from ssld.stage2_detect.config import TrainConfig
from ssld.stage2_detect.data.padding import pad_images, pad_targets
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models import freezing
from ssld.stage2_detect.models.batch import ImageBatch, Targets
from ssld.stage2_detect.models.build import Detector, build_detector
from ssld.stage2_detect.training import unit_scale

INPUTS = InputSettings.of_detector((0.5,) * 3, (0.5,) * 3)
SCALE = 50.0
"""root mean square of the maps; EfficientNet-Lite0's, trained on ImageNet, are at 7, which most of these small heads still bear"""
REP_BLOCKS = tuple(ByoBlockCfg(type="rep", d=1, c=width, s=2, gs=0) for width in (16, 32, 48, 64))
FAMILIES: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "test_convnext": {},
    "test_efficientnet": {},
    "mobilenetv3_small_050": {},
    "ghostnet_050": {},
    "dla46_c": {"channels": (8, 8, 16, 32, 48, 64)},
    "regnetx_002": {"depth": 5, "w0": 16, "wa": 24.0, "wm": 2.0, "group_size": 8},
    "densenet121": {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 4, "strict_img_size": False
    },
    "pvt_v2_b0": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 1, 2, 2)},
    "repvgg_a0": {"blocks": REP_BLOCKS, "stem_chs": 16},
    "hgnetv2_b0": {
        "stem_type": "v2",
        "stem_chs": [8, 16],
        "stage1": [16, 8, 32, 1, False, False, 3, 1],
        "stage2": [32, 16, 48, 1, True, False, 3, 1],
        "stage3": [48, 16, 64, 1, True, True, 5, 1],
        "stage4": [64, 32, 96, 1, True, True, 5, 1],
    },
}  # fmt: skip
"""one small network per family, with what makes it small"""
TRAINED = ("repvgg_a0", "hgnetv2_b0")
"""networks that train for some steps before their norms are frozen; with random weights behind frozen norms the body itself may diverge"""


class Loud(nn.Module):
    """A body whose maps have the scale `SCALE`, whatever its weights."""

    def __init__(self, body: nn.Module, pixels_BCHW: Tensor) -> None:
        super().__init__()
        self.body, self.feature_info = body, freezing.feature_info(body)
        self.output_fmt = getattr(body, "output_fmt", timm.layers.Format.NCHW)
        self.factors = [1.0] * len(self.feature_info.channels())
        with torch.no_grad():
            self.factors = [SCALE / one.square().mean().sqrt().item() for one in self.eval()(pixels_BCHW)]

    def forward(self, pixels_BCHW: Tensor) -> list[Tensor]:
        return [factor * one for factor, one in zip(self.factors, self.body(pixels_BCHW), strict=True)]


def scenes(side: int = 64) -> tuple[ImageBatch, Targets]:
    """Four images of noise with a bright box each."""
    draw = np.random.default_rng(0)
    pixels, objects = [], []
    for number in range(4):
        image = draw.integers(0, 60, (3, side, side), dtype=np.uint8)
        x, y = draw.integers(0, side // 2, 2).tolist()
        image[number % 3, y : y + side // 3, x : x + side // 3] = 250
        pixels.append(torch.from_numpy(image))
        objects.append((np.array([[x, y, x + side // 3, y + side // 3]], np.float32), np.array([number % 2])))
    return pad_images(pixels, [1.0] * 4), pad_targets(objects, [0, 1, 2, 3])


def detector_on(body: nn.Module, arch: str, **settings: Any) -> Detector:
    """A small Faster R-CNN, with the recipes' frozen norms."""
    values: dict[str, Any] = {
        "fpn_channels": 16,
        "rpn": {"anchor_sizes": [8, 16, 32, 64, 128], "post_nms_top_n_train": 20, "samples_per_image": 32},
        "roi": {"hidden": 128, "samples_per_image": 16},
    }
    config = DetectorConfig.model_validate(values | settings)
    return build_detector(config, classes=2, body=body, arch=arch, inputs=INPUTS).train()


def losses_at_the_usual_rate(detector: Detector, steps: int, factors: dict[str, float]) -> list[float]:
    """Losses under the optimizer of faster_rcnn.yaml for a batch of four, with its warm-up over a tenth of the run, before each step."""
    images, targets = scenes()
    groups = parameter_groups(
        detector, weight_decay=1e-4, decay_norm_and_bias=True, lr_factor=lambda name: factors.get(name, 1.0)
    )
    optimizer = make_optimizer("sgd", groups, momentum=0.9)
    totals = []
    for step in range(steps):
        set_lr(optimizer, 0.005 * min(1.0, 0.1 + 0.9 * step / (steps // 10)))
        loss = torch.stack(list(detector(images, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    return totals


def random_body(arch: str) -> nn.Module:
    torch.manual_seed(0)
    options = FAMILIES[arch]
    if arch == "hgnetv2_b0":  # timm.create_model does not take its sizes
        return FeatureListNet(HighPerfGpuNet(options), out_indices=(0, 1, 2, 3), flatten_sequential=True)
    return timm.create_model(arch, features_only=True, pretrained=False, **options)


def loud_detector(arch: str) -> Detector:
    body, pixels = random_body(arch), scenes()[0].pixels_BCHW / 127.5 - 1
    if arch in TRAINED:
        losses_at_the_usual_rate(detector_on(body, arch, freeze_norm=False), 20, {})
    return detector_on(Loud(body, pixels), arch)


def assert_it_learns(detector: Detector, steps: int) -> None:
    scales = unit_scale.measure(detector, scenes()[0], "a body")
    detector.pyramid.divide_inputs(scales)
    totals = losses_at_the_usual_rate(detector, steps, unit_scale.lr_factors(detector, scales, "sgd"))
    assert all(map(math.isfinite, totals)), totals
    assert np.median(totals[-steps // 3 :]) < 0.8 * totals[0], totals


@pytest.mark.parametrize("arch", FAMILIES)
def test_any_body_trains_at_the_usual_rate(arch: str) -> None:
    assert_it_learns(loud_detector(arch), steps=50)


@pytest.mark.parametrize("arch", ["test_convnext", "swin_tiny_patch4_window7_224", "pvt_v2_b0"])
def test_without_it_such_a_body_diverges(arch: str) -> None:
    assert not math.isfinite(losses_at_the_usual_rate(loud_detector(arch), 15, {})[-1])


@pytest.mark.slow
def test_trained_weights_at_the_usual_rate(shared_data: Callable[..., Path]) -> None:
    """The ImageNet weights of EfficientNet-Lite0, as they are."""
    reference = parse_reference(str(shared_data("weights") / "efficientnet_lite0.safetensors"), "tf_efficientnet_lite0")
    torch.manual_seed(0)
    assert_it_learns(detector_on(create_body(reference)[0], "tf_efficientnet_lite0"), steps=20)


@pytest.mark.parametrize(
    "settings",
    [{}, {"kind": "retinanet"}, {"kind": "gfl", "dense": {"p6_from": "c5"}}],
    ids=["faster", "retinanet", "c5"],
)
def test_the_maps_are_those_of_divided_features(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    detector = detector_on(
        timm.create_model("test_resnet", features_only=True, pretrained=False), "test_resnet", **settings
    )
    pyramid, images = detector.pyramid, scenes()[0]
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    pixels = detector.normalize(images)
    with torch.no_grad():
        maps = pyramid.features(pixels)[pyramid.first_level :]
        scales = unit_scale.measure(detector, images, "test_resnet")
        assert scales == pytest.approx(
            [float(np.sqrt(np.square(one.double().numpy()).mean())) for one in maps], rel=1e-6
        )
        assert all(torch.equal(tensor, before[name]) for name, tensor in detector.state_dict().items())
        expected = pyramid.fpn(
            {str(number): one / scale for number, (one, scale) in enumerate(zip(maps, scales, strict=True))}
        )
        pyramid.divide_inputs(scales)
        for one, other in zip(pyramid(pixels), expected.values(), strict=True):
            torch.testing.assert_close(one, other)
    changed = {name for name, tensor in detector.state_dict().items() if not torch.equal(tensor, before[name])}
    laterals = {f"pyramid.fpn.inner_blocks.{number}.0.weight" for number in range(len(maps))}
    assert changed == laterals | ({"pyramid.fpn.extra_blocks.p6.weight"} if "dense" in settings else set())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_training_is_that_of_divided_features(optimizer: Any) -> None:
    """Step by step; Adam's epsilon and the decay of the small weights are left out."""
    body = Loud(
        timm.create_model("test_resnet", features_only=True, pretrained=False), scenes()[0].pixels_BCHW / 127.5 - 1
    )
    results = []
    for divided in (False, True):
        torch.manual_seed(0)
        body.factors = [factor * SCALE if divided else factor for factor in body.factors]
        detector = detector_on(copy.deepcopy(body), "test_resnet").double()
        for parameter in detector.pyramid.body.parameters():
            parameter.requires_grad_(False)
        factors: dict[str, float] = {}
        if divided:
            detector.pyramid.divide_inputs([SCALE] * 4)
            factors = unit_scale.lr_factors(detector, [SCALE] * 4, optimizer)
        groups = parameter_groups(
            detector,
            weight_decay=0.0,
            decay_norm_and_bias=True,
            lr_factor=lambda name, factors=factors: factors.get(name, 1.0),  # type: ignore[misc]
        )
        steps = make_optimizer(optimizer, groups, momentum=0.9)
        set_lr(steps, 1e-3)
        pixels = detector.normalize(scenes()[0]).double()
        for _ in range(3):
            steps.zero_grad()
            torch.stack([one.square().mean() for one in detector.pyramid(pixels)]).sum().backward()
            steps.step()
        results.append([one.detach() for one in detector.pyramid(pixels)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_norms_that_train_are_measured_with_the_statistics_of_the_batch() -> None:
    """Those of random weights are 0 and 1, far from what training sees."""
    torch.manual_seed(0)
    body = timm.create_model("test_byobnet", features_only=True, pretrained=False)
    detector = detector_on(body, "test_byobnet", freeze_norm=False)
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    scales = unit_scale.measure(detector, scenes()[0], "test_byobnet")
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.state_dict().items())
    assert all(module.training for module in detector.modules())
    with torch.no_grad():
        maps = detector.pyramid.features(detector.normalize(scenes()[0]))
    assert scales == pytest.approx([one.square().mean().sqrt().item() for one in maps], rel=1e-5)


@pytest.mark.parametrize(("factor", "what"), [(0.0, "zero"), (math.nan, "nan")])
def test_a_body_without_a_scale(factor: float, what: str) -> None:
    body = Loud(
        timm.create_model("test_resnet", features_only=True, pretrained=False), scenes()[0].pixels_BCHW / 127.5 - 1
    )
    detector = detector_on(body, "test_resnet")
    body.factors[-1] = factor
    with pytest.raises(
        UserError, match=rf"^backbone own cannot be trained: its map of stride 32 is {what} on 4 training images"
    ):
        unit_scale.measure(detector, scenes()[0], "own")


def test_the_command_records_the_scales(
    train_settings: dict[str, Any],
    arguments: Callable[..., list[str]],
    call: Callable[..., int],
    teacher_file: Path,
    tmp_path: Path,
) -> None:
    """From a backbone file of stage 1; a run that is continued and one of another batch size start from the same weights."""
    settings = train_settings | {"backbone": str(teacher_file), "unit_scale": True}
    still = settings | {"steps": 1, "optim": settings["optim"] | {"lr": 1e-30}}
    assert call(train.main, arguments(settings, "whole")) == 0
    assert call(train.main, arguments(settings | {"steps": 3}, "parts")) == 0
    assert call(train.main, arguments(settings, "parts")) == 0
    assert call(train.main, arguments(still, "start")) == 0
    assert call(train.main, arguments(still | {"batch_size": 2}, "small")) == 0
    assert call(train.main, arguments(still | {"unit_scale": False}, "off")) == 0
    files = {name: tmp_path / name / "detector.safetensors" for name in ("whole", "parts", "start", "small", "off")}
    tensors = {name: load_file(file) for name, file in files.items()}
    scales: dict[str, Any] = {
        name: read_metadata(file, kind="detector").get("unit_scale") for name, file in files.items()
    }
    assert scales["whole"] == scales["parts"] == scales["start"] == scales["small"]
    assert scales["off"] is None
    assert all(torch.equal(tensors["whole"][name], tensors["parts"][name]) for name in tensors["whole"])
    for level, scale in enumerate(scales["start"]):
        name = f"pyramid.fpn.inner_blocks.{level}.0.weight"
        torch.testing.assert_close(tensors["start"][name] * scale, tensors["off"][name])
        assert torch.equal(tensors["start"][name], tensors["small"][name])
    log = (tmp_path / "whole" / "log.txt").read_text()
    first = f"{scales['whole'][0]:.3g} (stride 4), "
    assert (
        f"unit_scale: the FPN's lateral convolutions are divided by the root mean square of the backbone's maps: {first}"
        in log
    )
    assert "unit_scale" not in (tmp_path / "off" / "log.txt").read_text()


def test_a_detector_file_keeps_its_pyramid(
    train_settings: dict[str, Any], arguments: Callable[..., list[str]], call: Callable[..., int], tmp_path: Path
) -> None:
    settings = train_settings | {"steps": 1, "optim": train_settings["optim"] | {"lr": 1e-30}}
    assert call(train.main, arguments(settings, "first")) == 0
    first = tmp_path / "first" / "detector.safetensors"
    assert call(train.main, arguments(settings | {"init": str(first), "unit_scale": True}, "second")) == 0
    one, two = load_file(first), load_file(tmp_path / "second" / "detector.safetensors")
    laterals = [name for name in one if "inner_blocks" in name and name.endswith("weight")]
    assert len(laterals) == 4
    assert all(torch.equal(one[name], two[name]) for name in laterals)


def test_in_your_own_loop(tmp_path: Path) -> None:
    detector = ssld.build_detector("faster_rcnn", backbone="random:test_resnet", classes=2, fpn_channels=16)
    before = [block[0].weight.detach().clone() for block in detector.model.pyramid.fpn.inner_blocks]
    scales = detector.unit_scale(scenes()[0])
    for block, weight, scale in zip(detector.model.pyramid.fpn.inner_blocks, before, scales, strict=True):
        torch.testing.assert_close(block[0].weight * scale, weight)
    with pytest.raises(UserError, match="unit_scale: the weights are divided already; call it once"):
        detector.unit_scale(scenes()[0])
    with pytest.raises(UserError, match="save: unit_scale: set by the detector itself"):
        detector.save(tmp_path / "own.safetensors", unit_scale=[1.0])
    detector.save(tmp_path / "own.safetensors")
    assert read_metadata(tmp_path / "own.safetensors", kind="detector")["unit_scale"] == scales


def test_published_recipes_are_as_published() -> None:
    folder = Path(ssld.__file__).parent / "stage2_detect" / "configs"
    on = {file.stem for file in folder.glob("*.yaml") if setting(file)}
    assert on == {"faster_rcnn", "faster_rcnn_mobilenetv3_ssld_1x", "faster_rcnn_convnext_tiny_1x"}


def setting(recipe: Path) -> bool:

    words = ["--config", str(recipe), "--backbone", "random:test_resnet", "--output", "c"]
    words += ["--data.train_annotations", "a", "--data.train_images", "b"]
    return parse_config(TrainConfig, words, program="train.py").unit_scale
