"""Small one-stage detectors to distil and to distil from, and batches for them."""

import timm
import torch

from ssld.stage2_detect.models.batch import ImageBatch, Targets
from ssld.stage2_detect.models.dense import DenseDetector
from ssld.stage2_detect.models.gfl import GFL
from ssld.stage2_detect.models.pyramid import TimmPyramid
from ssld.stage2_detect.models.retinanet import RetinaNet

K = 3


def detector(kind: str, seed: int) -> DenseDetector:
    torch.manual_seed(seed)
    body = timm.create_model("test_resnet", features_only=True, pretrained=False)
    pyramid = TimmPyramid(body, name="test_resnet", channels=16, freeze_norm=True, p3_p7=True)
    dense: GFL | RetinaNet = GFL(classes=K, channels=16) if kind == "gfl" else RetinaNet(classes=K, channels=16)
    for parameter in dense.parameters():  # heads that say something: they start nearly silent
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return DenseDetector(pyramid=pyramid, dense=dense, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def batch(images: int = 2) -> tuple[ImageBatch, Targets]:
    """`images` images of two kinds, by turns: one with three objects, one with none."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8, generator=generator).repeat(images // 2, 1, 1, 1)
    boxes = torch.tensor([[[8.0, 8, 60, 70], [50, 30, 120, 90], [20, 50, 44, 80]], [[0.0, 0, 0, 0]] * 3])
    labels = torch.tensor([[0, 2, 1], [-1, -1, -1]])
    sizes = torch.tensor([[96, 128]]).repeat(images, 1)
    targets = Targets(boxes.repeat(images // 2, 1, 1), labels.repeat(images // 2, 1), torch.zeros(images).long())
    return ImageBatch(pixels, sizes, torch.ones(images)), targets
