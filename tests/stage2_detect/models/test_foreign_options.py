"""Settings that detectors of other projects need: strides of Caffe's ResNets, maps of the last stage, averaged logits, clipping after NMS."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.shared.models.backbones import InputSettings
from ssld.stage2_detect.deploy.graph import DetectorGraph
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models import boxes
from ssld.stage2_detect.models.batch import ImageBatch
from ssld.stage2_detect.models.build import build_detector
from ssld.stage2_detect.models.inference import for_inference
from ssld.stage2_detect.models.pyramid import LastStage, TimmPyramid

INPUTS = InputSettings.of_detector((0.5,) * 3, (0.5,) * 3)


def detector(arch: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = DetectorConfig.model_validate({"fpn_channels": 16} | settings)
    body = timm.create_model(arch, features_only=True)
    return build_detector(config, classes=3, body=body, arch=arch, inputs=INPUTS).eval()


def image(height: int = 64, width: int = 96) -> ImageBatch:
    pixels = torch.randint(0, 256, (1, 3, height, width), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return ImageBatch(pixels, torch.tensor([[height, width]]), torch.ones(1))


def test_strides_move_to_the_first_convolution() -> None:
    body = timm.create_model("resnet50", features_only=True)
    TimmPyramid(body, name="resnet50", channels=8, stride_in_1x1=True)
    blocks = [body.get_submodule(f"layer{stage}.0") for stage in (1, 2, 3, 4)]
    assert [block.conv1.stride for block in blocks] == [(1, 1), (2, 2), (2, 2), (2, 2)]
    assert {block.conv2.stride for block in blocks} == {(1, 1)}
    with pytest.raises(UserError, match="stride_in_1x1: backbone resnet18 has no bottlenecks with a stride"):
        TimmPyramid(timm.create_model("resnet18", features_only=True), name="resnet18", stride_in_1x1=True)


def test_maps_of_the_last_stage() -> None:
    """Those of timm's own modules, one after the other; frozen, folded and refused as for every body."""
    body: Any = timm.create_model("mobilenetv3_large_100", features_only=True).eval()
    last = LastStage(body, "mobilenetv3_large_100")
    assert last.state_dict().keys() == body.state_dict().keys()
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        middle, end = last(pixels)
        x = body.act1(body.bn1(body.conv_stem(pixels)))
        for stage in body.blocks[:5]:
            x = stage(x)
        assert torch.equal(middle, body.blocks[5][0](x))
        assert torch.equal(end, body(pixels)[-1])
    assert (middle.shape[1:], end.shape[1:]) == ((160, 2, 3), (960, 2, 3))
    sizes = {"anchor_sizes": [32, 32, 32], "post_nms_top_n_test": 20}
    model = detector("mobilenetv3_large_100", fpn_maps="last_stage", freeze_stages=3, rpn=sizes)
    assert model.pyramid.strides == (32, 32, 64)
    assert model.roi_heads.strides == (32,)
    frozen = {
        name.partition("blocks.")[2][:1]
        for name, one in model.pyramid.body.named_parameters()
        if not one.requires_grad and "conv" in name
    }
    assert frozen == {"", "0", "1", "2"}
    with torch.no_grad():
        for one, other in zip(for_inference(model).features(image()), model.features(image()), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="fpn_maps: last_stage: backbone resnet18 has no stages of inverted residuals"):
        LastStage(timm.create_model("resnet18", features_only=True), "resnet18")
    with pytest.raises(ValueError, match="fpn_maps: last_stage is for R-CNN, not for gfl"):
        DetectorConfig.model_validate({"kind": "gfl", "fpn_maps": "last_stage", "rpn": sizes})
    with pytest.raises(ValueError, match=r"rpn.anchor_sizes has 5 entries; fpn_maps: last_stage has 3 levels"):
        DetectorConfig.model_validate({"fpn_maps": "last_stage"})
    with pytest.raises(ValueError, match="has 4 entries; one per level are needed: 5"):
        DetectorConfig.model_validate({"rpn": {"anchor_sizes": [8, 16, 32, 64]}})


def test_a_cascade_averages_logits() -> None:
    rpn = {"post_nms_top_n_test": 6}
    roi = {"hidden": 8}
    models = {
        kind: detector("test_resnet", kind="cascade_rcnn", rpn=rpn, roi=roi, cascade={"average_of": kind})
        for kind in ("logits", "probabilities")
    }
    logits: list[Tensor] = []
    for model in models.values():
        for head in model.roi_heads.heads:
            torch.nn.init.normal_(head.logits.weight, std=2.0, generator=torch.Generator().manual_seed(len(logits)))
            logits.append(head.logits.weight)
        model.load_state_dict(models["logits"].state_dict())
    noted: list[Tensor] = []
    hooks = [
        head.register_forward_hook(lambda _, __, out: noted.append(out[0])) for head in models["logits"].roi_heads.heads
    ]
    with torch.no_grad():
        features = models["logits"].features(image())
        proposals, _ = models["logits"].rpn(features, torch.tensor([[64, 96]]))
        scores = {
            kind: model.roi_heads.score(features, proposals, torch.tensor([[64, 96]]))[1][0]
            for kind, model in models.items()
        }
    assert len(hooks) == len(noted) == 3
    stages = np.stack([one.double().numpy() for one in noted])

    def softmax(values: np.ndarray) -> np.ndarray:
        shares = np.exp(values - values.max(axis=-1, keepdims=True))
        return np.asarray(shares / shares.sum(axis=-1, keepdims=True))[..., :3]

    np.testing.assert_allclose(scores["logits"].numpy(), softmax(stages.mean(axis=0)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scores["probabilities"].numpy(), softmax(stages).mean(axis=0), rtol=1e-4, atol=1e-6)
    assert (scores["logits"] - scores["probabilities"]).abs().max() > 0.01


def test_clipping_after_nms() -> None:
    """Boxes that overlap much as a whole and little within the image, and one outside of it, which counts among the best four where clipping comes
    last, and is dropped then; the exported graph too."""
    whole = torch.tensor(
        [
            [
                [-60.0, 10, 30, 40],
                [-60, 10, 14, 40],
                [96, 0, 120, 60],
                [50, 10, 80, 40],
                [10, 44, 40, 60],
                [60, 44, 90, 60],
            ]
        ]
    )
    clipped = [[0, 10, 30, 40], [0, 10, 14, 40], [50, 10, 80, 40], [10, 44, 40, 60], [60, 44, 90, 60]]
    scores = torch.tensor([[0.9, 0.8, 0.75, 0.7, 0.6, 0.5]])
    assert boxes.paired_iou(whole[0, 0], whole[0, 1]) > 0.6
    assert boxes.paired_iou(*torch.tensor(clipped[:2])) < 0.5
    found = {}
    for after in (False, True):
        settings = {"clip_after_nms": after, "candidates": None, "detections_per_image": 4}
        model = detector("test_resnet", kind="retinanet", dense=settings)
        grids = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
        count = 9 * sum(rows * columns for rows, columns in grids)
        logits, values = torch.full((1, count, 3), -20.0), torch.zeros(1, count, 4)
        logits[0, : scores.shape[1], 0] = torch.logit(scores[0])
        model.dense.decode = lambda values, index, grids: torch.where(
            index[..., None] < scores.shape[1],
            whole[:, index[0].clamp(max=scores.shape[1] - 1)],
            torch.tensor([1.0, 1, 2, 2]),
        )
        model.dense.forward = lambda features, outputs=(logits, values): outputs
        with torch.no_grad():
            one = model(image())[0]
            *graph_rows, number = DetectorGraph(model)(image().pixels_BCHW, torch.tensor([[64, 96]]))
        for rows, expected in zip(graph_rows, (one.boxes_N4, one.scores_N, one.labels_N), strict=True):
            torch.testing.assert_close(rows[0, : int(number[0])], expected)
        assert graph_rows[0][0, int(number[0]) :].abs().sum() == graph_rows[1][0, int(number[0]) :].sum() == 0
        # In an image of twice the size.
        original = replace(image(), scales_B=torch.tensor([0.5]))
        with torch.no_grad():
            torch.testing.assert_close(model(original)[0].boxes_N4, 2 * one.boxes_N4)
        found[after] = one.boxes_N4.tolist()
    assert found[False] == clipped[:4]
    assert found[True] == [clipped[0], clipped[2], clipped[3]]
