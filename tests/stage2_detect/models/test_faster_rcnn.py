"""The whole detector on a tiny backbone: the contract, what must not break it, and precision."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from ssld.stage2_detect.models.batch import Detections, ImageBatch, Targets
from ssld.stage2_detect.models.pyramid import TimmPyramid
from ssld.stage2_detect.models.rcnn import RCNN
from ssld.stage2_detect.models.roi_heads import RoIHeads
from ssld.stage2_detect.models.rpn import RPN

LOSSES = {"loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make(name: str = "test_resnet", **pyramid: Any) -> RCNN:
    torch.manual_seed(0)
    body = timm.create_model(name, features_only=True, pretrained=False)
    return RCNN(
        pyramid=TimmPyramid(body, name=name, channels=16, **pyramid),
        rpn=RPN(channels=16, post_nms_top_n_train=100, post_nms_top_n_test=50),
        roi_heads=RoIHeads(classes=4, channels=16, hidden=32, samples_per_image=64),
        mean=MEAN,
        std=STD,
    )


def batch(sizes: tuple[tuple[int, int], ...] = ((96, 128), (80, 100))) -> ImageBatch:
    pixels = torch.zeros(len(sizes), 3, 96, 128, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    for i, (height, width) in enumerate(sizes):
        pixels[i, :, :height, :width] = torch.randint(0, 256, (3, height, width), generator=generator)
    return ImageBatch(pixels, torch.tensor(sizes), torch.tensor([1.0, 0.8][: len(sizes)]))


def targets_of(*images: list[list[float]]) -> Targets:
    most = max(map(len, images))
    boxes, labels = torch.zeros(len(images), most, 4), torch.full((len(images), most), -1)
    for i, rows in enumerate(images):
        if rows:
            boxes[i, : len(rows)], labels[i, : len(rows)] = torch.tensor(rows), torch.arange(len(rows)) % 4
    return Targets(boxes, labels, torch.arange(len(images)) + 40)


def many(count: int) -> list[list[float]]:
    generator = torch.Generator().manual_seed(2)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([90.0, 70.0])
    return torch.cat((corner, corner + 1 + torch.rand(count, 2, generator=generator) * 9), dim=1).tolist()


OBJECTS = [[10.0, 12.0, 60.0, 48.0], [40.0, 5.0, 100.0, 79.0]]
SCENES = {
    "two and one": targets_of(OBJECTS, OBJECTS[:1]),
    "one image is empty": targets_of(OBJECTS, []),
    "all images are empty": targets_of([], []),
    "all are empty, with padding": Targets(torch.zeros(2, 3, 4), torch.full((2, 3), -1), torch.arange(2)),
    "one huge box": targets_of([[0.0, 0.0, 128.0, 96.0]], []),
    "boxes under a pixel": targets_of([[5.0, 5.0, 5.01, 5.01], [9.0, 9.0, 9.4, 60.0]], []),
    "300 boxes": targets_of(many(300), many(1)),
}


@pytest.mark.parametrize("scene", SCENES)
def test_every_parameter_gets_a_finite_gradient(scene: str) -> None:
    model = make()
    losses = model(batch(), SCENES[scene])
    assert set(losses) == LOSSES
    assert all(loss.dtype == torch.float32 and loss.shape == () and loss.isfinite() for loss in losses.values())
    if "empty" in scene and "one" not in scene:
        assert losses["loss_rpn_box"] == losses["loss_box"] == 0
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "mobilenetv3_small_050"])
def test_gradients_go_exactly_to_what_is_not_frozen(name: str) -> None:
    model = make(name, freeze_stages=2, freeze_norm=True)
    sum(model(batch(), SCENES["two and one"]).values()).backward()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trainable
    assert len(trainable) < len(list(model.parameters()))


def test_detections_keep_the_contract() -> None:
    model = make().eval()
    nn.init.normal_(dict(model.named_parameters())["roi_heads.heads.0.logits.weight"], std=1.0)
    results = model(batch())
    assert len(results) == 2
    for detections, (height, width) in zip(results, [(96, 128), (100, 125)], strict=True):
        assert isinstance(detections, Detections)
        count = len(detections.scores_N)
        assert 0 < count <= 100
        assert detections.boxes_N4.shape == (count, 4)
        assert detections.boxes_N4.dtype == detections.scores_N.dtype == torch.float32
        assert detections.labels_N.dtype == torch.int64
        assert set(detections.labels_N.tolist()) <= {0, 1, 2, 3}
        assert (detections.scores_N.diff() <= 0).all()
        assert detections.boxes_N4.min() >= 0
        assert detections.boxes_N4[:, 2].max() <= width
        assert detections.boxes_N4[:, 3].max() <= height
        assert not detections.boxes_N4.requires_grad


def test_normalization_leaves_zeros_in_the_padding() -> None:
    model, images = make(), batch()
    dirty = ImageBatch(images.pixels_BCHW.clone(), images.sizes_B2, images.scales_B)
    dirty.pixels_BCHW[1, :, 80:] = 200
    pixels = model.normalize(dirty)
    assert pixels.dtype == torch.float32
    assert (pixels[1, :, 80:] == 0).all()
    assert (pixels[1, :, :, 100:] == 0).all()
    expected = (images.pixels_BCHW[1, :, :80, :100].double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(
        STD
    ).view(3, 1, 1)
    torch.testing.assert_close(pixels[1, :, :80, :100], expected.float(), atol=1e-5, rtol=1e-5)


def test_normalization_is_no_part_of_the_weights() -> None:
    assert not [name for name in make().state_dict() if "mean_C11" in name or "std_C11" in name]


def test_a_step_is_a_function_of_its_inputs() -> None:
    model = make(freeze_norm=True)  # else running statistics move
    first = model(batch(), SCENES["two and one"])
    torch.manual_seed(123)
    torch.rand(7)
    second = model(batch(), SCENES["two and one"])
    assert all(torch.equal(first[name], second[name]) for name in LOSSES)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_a_batch_is_the_sum_of_its_images(name: str) -> None:
    """With images of equal size and frozen norms the RPN losses of a batch are the means of its images' losses."""
    model = make(name, freeze_norm=True)
    images, truth = batch(((96, 128), (96, 128))), SCENES["two and one"]
    whole = model(images, truth)
    parts = []
    for i in range(2):
        alone = ImageBatch(images.pixels_BCHW[i : i + 1], images.sizes_B2[i : i + 1], images.scales_B[i : i + 1])
        parts.append(
            model(alone, Targets(truth.boxes_BG4[i : i + 1], truth.labels_BG[i : i + 1], truth.seeds_B[i : i + 1]))
        )
    for loss in ("loss_rpn_cls", "loss_rpn_box"):
        assert (parts[0][loss] + parts[1][loss]).item() / 2 == pytest.approx(whole[loss].item(), rel=1e-5)


def test_bf16_keeps_geometry_and_losses_in_float32() -> None:
    model = make(freeze_norm=True)
    results: dict[str, Any] = {}
    model.rpn.register_forward_hook(lambda _module, _args, out: results.update(proposals=out[0]))
    model.pyramid.register_forward_hook(lambda _module, _args, out: results.update(features=out))
    exact = model(batch(), SCENES["two and one"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(batch(), SCENES["two and one"])
    assert all(feature.dtype == torch.bfloat16 for feature in results["features"])
    assert results["proposals"].boxes_BR4.dtype == torch.float32
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    for name in ("loss_rpn_cls", "loss_rpn_box", "loss_cls"):  # the RPN's box loss would be halved by bf16 anchors
        assert losses[name].item() == pytest.approx(exact[name].item(), rel=0.02), name
    assert losses["loss_box"].isfinite()  # over other RoIs: proposals of nearly equal scores change places
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_bf16_finds_the_same_boxes() -> None:
    """The proposals that both precisions keep lie within what bf16 deltas allow: 2**-8 of a delta times the anchor."""
    model = make(freeze_norm=True).eval()
    results: list[Tensor] = []
    model.rpn.register_forward_hook(lambda _module, _args, out: results.append(out[0].boxes_BR4[0]))
    model(batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(batch())
    # Near-equal scores may fall in another order, so each box is compared with the nearest of the other set.
    distance = (results[0][:, None] - results[1][None]).abs().amax(dim=-1).amin(dim=1)
    assert (distance < 0.5).float().mean() > 0.9


def test_moving_a_batch() -> None:
    images, truth = batch(), SCENES["two and one"]
    assert torch.equal(images.to("cpu").pixels_BCHW, images.pixels_BCHW)
    moved = truth.to(torch.device("meta"), non_blocking=True)
    assert moved.boxes_BG4.device == moved.labels_BG.device == moved.seeds_B.device == torch.device("meta")
    assert images.to("meta").scales_B.device == torch.device("meta")


def test_it_learns_one_scene_by_heart() -> None:
    model = make("test_convnext")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    images, truth = batch(), SCENES["two and one"]
    history = []
    for step in range(80):
        seeds = Targets(truth.boxes_BG4, truth.labels_BG, truth.seeds_B + step)
        loss = sum(model(images, seeds).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < history[0] / 2  # other initial weights reach a third to a seventh
    for i, results in enumerate(model.eval()(images)):
        for box, label in zip(truth.boxes_BG4[i], truth.labels_BG[i], strict=True):
            if label >= 0:
                same = (results.labels_N == label) & (results.scores_N > 0.5)
                assert (
                    box_iou(box[None] / images.scales_B[i], results.boxes_N4[same]).max() > 0.5
                )  # 0.66 to 0.94 with other seeds
