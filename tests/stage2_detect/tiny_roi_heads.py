"""Small RoI heads with random weights, and the maps, proposals and objects that their tests share."""

from typing import Any

import torch
from torch import Tensor

from ssld.shared.distributed.ranks import ONE_RANK, Ranks
from ssld.stage2_detect.models import boxes
from ssld.stage2_detect.models.batch import Detections, ImageBatch, Targets
from ssld.stage2_detect.models.postprocess import to_original
from ssld.stage2_detect.models.roi_heads import BoxStage, RoIHeads, SampledRoIs
from ssld.stage2_detect.models.rpn import Proposals

STRIDES = (4, 8, 16, 32)
CHANNELS, K = 5, 3
SIZES = torch.tensor([[128, 160], [100, 150]])
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def maps() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, CHANNELS, 128 // s, 160 // s, generator=generator) for s in (*STRIDES, 64)]


def proposals(count: int = 30, seed: int = 1) -> Proposals:
    """Boxes of 1 to 128 px; the last third of the second image is padding."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(2, count, 2, generator=generator) * torch.tensor([160.0, 128.0])
    half = torch.exp(torch.rand(2, count, 2, generator=generator) * 4.2)
    candidates = torch.cat((center - half, center + half), dim=-1)
    for image, objects in enumerate(targets().boxes_BG4):  # some that match
        candidates[image, :9] = objects.repeat(3, 1) + torch.randint(-3, 4, (9, 4), generator=generator)
    candidates = boxes.clip(candidates, SIZES)
    valid = ((candidates[..., 2:] - candidates[..., :2]) >= 1).all(dim=-1)
    valid[1, 2 * count // 3 :] = False
    order = valid.long().argsort(dim=1, descending=True, stable=True)  # as proposals come: padding at the end
    candidates, valid = boxes.take(candidates, order), valid.gather(1, order)
    return Proposals(torch.where(valid[..., None], candidates, 0.0), valid)


def targets() -> Targets:
    expected = torch.zeros(2, 3, 4)
    expected[0, :2] = torch.tensor([[10.0, 12.0, 60.0, 48.0], [40.0, 5.0, 150.0, 120.0]])
    expected[1] = torch.tensor([[3.0, 3.0, 40.0, 38.0], [70.0, 20.0, 120.0, 90.0], [5.0, 60.0, 9.0, 66.0]])
    return Targets(expected, torch.tensor([[2, 0, -1], [1, 1, 0]]), torch.tensor([5, 6]))


def make(**options: Any) -> RoIHeads:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "classes": K,
        "channels": CHANNELS,
        "hidden": 16,
        "pool_size": 3,
        "samples_per_image": 24,
    }
    heads = RoIHeads(**(defaults | options))
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return heads


def cascade(**options: Any) -> Any:
    stages = [BoxStage(0.5, WEIGHTS), BoxStage(0.6, (20.0, 20.0, 10.0, 10.0)), BoxStage(0.7, (30.0, 30.0, 15.0, 15.0))]
    return make(
        **({"stages": stages, "class_agnostic": True, "samples_per_image": 1000, "positive_fraction": 1.0} | options)
    )


def predict_no_shift(heads: RoIHeads) -> None:
    for name, parameter in heads.named_parameters():
        if ".deltas." in name:
            torch.nn.init.zeros_(parameter)


def losses_of(
    heads: RoIHeads,
    features: list[Tensor],
    candidates: Proposals,
    sizes: Tensor,
    truth: Targets,
    ranks: Ranks = ONE_RANK,
) -> tuple[dict[str, Tensor], SampledRoIs, Tensor]:
    """Losses, the RoIs that were sampled for them, and the first stage's logits of these."""
    sampled = heads.sample(candidates, truth)
    losses, logits_NK = heads.losses(features, sampled, sizes, truth, ranks)
    return losses, sampled, logits_NK


def detect(heads: RoIHeads, features: list[Tensor], candidates: Proposals, images: ImageBatch) -> list[Detections]:
    """Detections in original coordinates."""
    network = heads.detect_network(features, candidates, images.sizes_B2)
    parts = zip(network, images.original_sizes(), images.scales_B, strict=True)
    return [to_original(*part)[0] for part in parts]
