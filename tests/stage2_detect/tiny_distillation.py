"""Small detectors to distil and to distil from, and batches that are labeled in part."""

import timm
import torch

from ssld.shared.models.backbones import input_settings
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.batch import ImageBatch, Targets
from ssld.stage2_detect.models.build import build_detector
from ssld.stage2_detect.models.rcnn import RCNN


def architecture(fpn_channels: int) -> DetectorConfig:
    return DetectorConfig(
        fpn_channels=fpn_channels,
        rpn={
            "anchor_sizes": [8, 16, 32, 64, 128],
            "samples_per_image": 32,
            "post_nms_top_n_train": 40,
            "post_nms_top_n_test": 30,
        },
        roi={"hidden": 32, "samples_per_image": 24},
    )


def detector(seed: int, fpn_channels: int = 16) -> RCNN:
    """Random weights whose soft labels are far from uniform, with channels of different means in the maps."""
    torch.manual_seed(seed)
    body = timm.create_model("test_resnet", features_only=True)
    inputs = input_settings(body, {})
    model = build_detector(architecture(fpn_channels), classes=2, body=body, arch="test_resnet", inputs=inputs)
    assert isinstance(model, RCNN)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("roi_heads") and ".logits." in name:
                parameter.normal_(std=0.5)
    return model


def batch(labeled: int = 2, unlabeled: int = 2, seed: int = 0) -> tuple[ImageBatch, Targets]:
    """Images of unequal sizes; the unlabeled ones come with objects that must not be used."""
    generator = torch.Generator().manual_seed(seed)
    count = labeled + unlabeled
    pixels = torch.randint(0, 256, (count, 3, 64, 96), generator=generator, dtype=torch.uint8)
    sizes = torch.tensor([[64, 96], [50, 96], [64, 70], [40, 64]])[:count]
    corners = torch.rand(count, 3, 2, generator=generator) * 30
    sides = 8 + torch.rand(count, 3, 2, generator=generator) * 24
    targets = Targets(
        torch.cat((corners, corners + sides), dim=-1),
        torch.randint(0, 2, (count, 3), generator=generator),
        torch.arange(count) + 17,
        labeled_B=torch.arange(count) < labeled,
    )
    return ImageBatch(pixels, sizes, torch.ones(count)), targets
