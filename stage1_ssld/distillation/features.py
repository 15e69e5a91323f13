"""Feature terms of the loss: the student's features, through small trained heads, against the features of a live teacher.

The form is AM-RADIO's (Ranzinger et al. 2024, arXiv 2312.06709, section 3): one head for each kind of feature, a cosine loss on pooled features, a
smooth L1 loss on feature maps, grids resized to a common size. ScaleKD (Fan et al. 2024, arXiv 2411.06786, section 3) also lets the maps of a ViT
teach a CNN through a trained projection; its cross-attention and its second view, in frequencies, are left out. Teacher features are standardized
per channel, with fixed statistics of the first training images. PHI-S (arXiv 2410.01680) compares this with rotations, which matter where several
teachers are balanced against each other.

B images, C channels of the student, D of the teacher, N cells of a grid, H rows, W columns.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssld.shared.distributed.processes import to_device
from ssld.shared.distributed.ranks import for_sums, sum_dtype, total_over_ranks
from ssld.shared.errors import UserError
from ssld.shared.models.backbones import Classifier
from ssld.shared.models.teacher import Teacher, TeacherFeatures
from ssld.shared.training.progress import Clock
from ssld.shared.wording import count
from ssld.stage1_ssld.data.batch import Batch
from ssld.stage1_ssld.data_config import LossConfig

FeaturePairs = Mapping[str, Sequence[tuple[Tensor, Tensor]]]
"""By kind, (student, teacher) features: one pair [B,D] of `pooled`, one pair [B,N,D] per level of `spatial`."""

STATISTICS_IMAGES = 512
"""Views that give the mean and standard deviation of the teacher's features, rounded up to whole batches."""
_STRIDES = {"c3": 8, "c4": 16, "c5": 32}
# Smallest standard deviation of a channel, as a fraction of the root mean square over channels: a nearly constant channel is not blown up.
_FLOOR = 0.01


class FeatureHeads(nn.Module):
    """Trained heads on the student's features, with the mean and standard deviation of the teacher's features.

    A head is a LayerNorm, which removes the scale of the student's features, and a linear layer over channels. It is trained at the student's
    learning rate and left out of the student's file.

    Args:
        terms: the loss terms that compare features, at most one of each kind.
        classifier: the student's network.
        size: side of the views in pixels.
        name: the student's name, for messages.

    Raises:
        UserError: the network lacks a requested level or has no feature maps, or its pooled features are not one vector per image.
    """

    def __init__(
        self, terms: Sequence[LossConfig], classifier: Classifier, teacher: Teacher, *, size: int, name: str
    ) -> None:
        super().__init__()
        by_kind = {term.loss.compares: term for term in terms}
        spatial = by_kind.get("spatial")
        self._places = _places(classifier.net, spatial.levels, name) if spatial else {}
        device = classifier.mean_3.device
        noise = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=noise).to(device)
        with torch.no_grad():
            targets = teacher.features(pixels, maps=bool(spatial))
            _, pooled_BC, maps = student_features(classifier.eval(), pixels, list(self._places.values()))
        self.heads = nn.ModuleDict()
        self._grids: list[tuple[int, int]] = []
        for kind, term in by_kind.items():
            inputs, target = ([pooled_BC], targets.pooled_BD) if kind == "pooled" else (maps, targets.map_BCHW)
            assert target is not None
            if target.ndim != (2 if kind == "pooled" else 4) or any(one.ndim != target.ndim for one in inputs):
                raise UserError(
                    f"losses: {term.name}: the features of {name} or its teacher have another shape; use another arch"
                )
            if kind == "spatial":
                self._grids = [_common_grid(one, target) for one in inputs]
            width = target.shape[1]
            self.heads[kind] = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(one.shape[1]), nn.Linear(one.shape[1], width)) for one in inputs
            )
            self.register_buffer(f"{kind}_mean_D", torch.zeros(width))
            self.register_buffer(f"{kind}_deviation_D", torch.ones(width))
        self.to(device)

    @property
    def places(self) -> list[int]:
        """Indices of the student's levels among timm's intermediate maps."""
        return list(self._places.values())

    def forward(self, pooled_BC: Tensor, maps: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """Predict the teacher's standardized features by kind: [B,D] of pooled features, [B,N,D] of each map [B,C,H,W]."""
        predictions: dict[str, list[Tensor]] = {}
        for kind, heads in self.heads.items():
            assert isinstance(heads, nn.ModuleList)
            inputs = [pooled_BC] if kind == "pooled" else map(_tokens, maps, self._grids)
            predictions[kind] = [head(one) for head, one in zip(heads, inputs, strict=True)]
        return predictions

    def pairs(self, predictions: Mapping[str, list[Tensor]], targets: TeacherFeatures) -> FeaturePairs:
        """Pair the heads' predictions with the teacher's standardized features."""
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for kind, students in predictions.items():
            mean_D, deviation_D = getattr(self, f"{kind}_mean_D"), getattr(self, f"{kind}_deviation_D")
            if kind == "pooled":
                teachers = [targets.pooled_BD]
            else:
                assert targets.map_BCHW is not None
                by_grid = {grid: _tokens(targets.map_BCHW, grid) for grid in set(self._grids)}
                teachers = [by_grid[grid] for grid in self._grids]
            pairs[kind] = [
                (student, (teacher - mean_D) / deviation_D) for student, teacher in zip(students, teachers, strict=True)
            ]
        return pairs

    @torch.no_grad()
    def measure(
        self, teacher: Teacher, batches: Iterable[Batch], log: Callable[[str], None] = lambda line: None
    ) -> str:
        """Measure mean and standard deviation of the teacher's features over the batches of all ranks, which all call it; returns a log line.

        `log` is called with a progress line after each `SILENCE`, because a large teacher takes minutes.

        Raises UserError for features that are not finite, or constant over all images.
        """
        sums, images = {}, torch.zeros((), dtype=torch.int64, device=teacher.device)
        for kind in self.heads:
            width = len(getattr(self, f"{kind}_mean_D"))
            sums[kind] = torch.zeros(3, width, dtype=sum_dtype(teacher.device), device=teacher.device)
        clock = Clock()
        for batch in batches:
            if len(batch.keys) == 0:
                continue
            images += len(batch.keys)
            clock.add(len(batch.keys))
            if clock.due():
                log(f"features: {count(clock.done, 'view')} measured by this process, {clock.rate:.3g} per second")
            features = teacher.features(to_device(batch.pixels_BCHW, teacher.device), maps="spatial" in sums)
            for kind, sum_3D in sums.items():
                values = features.pooled_BD[..., None, None] if kind == "pooled" else features.map_BCHW
                assert values is not None
                values_ND = for_sums(values).permute(0, 2, 3, 1).flatten(0, 2)
                sum_3D += torch.stack([torch.ones_like(values_ND), values_ND, values_ND.square()]).sum(1)
        images, name = total_over_ranks(images), teacher.references[0].text
        if not images:
            raise UserError(f"data.train: no image could be read, so the features of {name} cannot be standardized")
        for kind, sum_3D in sums.items():
            number_D, total_D, square_D = total_over_ranks(sum_3D)
            mean_D = total_D / number_D
            variance_D = (square_D / number_D - mean_D.square()).clamp(min=0)
            spread = variance_D.mean().sqrt()
            if not torch.isfinite(spread):
                raise UserError(
                    f"{name}: its features are not finite; set teacher.precision: fp32, or check its weights"
                )
            if spread <= 1e-6 * mean_D.abs().max():
                raise UserError(
                    f"{name}: its features ({kind}) are the same for every image: wrong weights, or images of one color"
                )
            getattr(self, f"{kind}_mean_D").copy_(mean_D)
            getattr(self, f"{kind}_deviation_D").copy_(variance_D.sqrt().clamp(min=_FLOOR * spread))
        return f"features of {name}: standardized with {count(int(images), 'view')}; the statistics are kept in the checkpoints"

    def describe(self) -> str:
        """Describe the compared features in one log line."""
        parts = []
        for kind in self.heads:
            width = len(getattr(self, f"{kind}_mean_D"))
            levels = ", ".join(f"{level} at {h} x {w}" for level, (h, w) in zip(self._places, self._grids, strict=True))
            parts.append(f"{kind} in {width} dimensions{f' ({levels})' if kind == 'spatial' else ''}")
        numbers = sum(parameter.numel() for parameter in self.parameters())
        return f"features: {', '.join(parts)}; heads of {numbers / 1e6:.2f} M parameters, left out of the student file"


class Learner(nn.Module):
    """Classifier and heads as one module for data-parallel training: pixels [B,3,H,W] in 0..255 -> logits [B,K], predicted features by kind.

    K is 0 where nothing trains a classifier.
    """

    def __init__(self, classifier: Classifier, heads: FeatureHeads | None) -> None:
        super().__init__()
        self.classifier, self.heads = classifier, heads

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
        if self.heads is None:
            return self.classifier(pixels_BCHW), {}
        logits_BK, pooled_BC, maps = student_features(self.classifier, pixels_BCHW, self.heads.places)
        return logits_BK, self.heads(pooled_BC, maps)


def student_features(
    classifier: Classifier, pixels_BCHW: Tensor, places: Sequence[int]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits [B,K], pooled features [B,C] and the intermediate maps [B,C,H,W] at indices `places`, in one forward pass."""
    net: Any = classifier.net
    x, maps = classifier.normalized(pixels_BCHW), []
    if places:
        features, maps = net.forward_intermediates(x, indices=list(places), output_fmt="NCHW")
    else:
        features = net.forward_features(x)
    pooled_BC = net.forward_head(features, pre_logits=True)
    logits_BK = net.forward_head(features) if net.num_classes else pooled_BC.new_zeros(len(pooled_BC), 0)
    return logits_BK, pooled_BC, maps


def _places(net: Any, levels: Sequence[str] | None, name: str) -> dict[str, int]:
    """Level -> index of the last intermediate map of its stride. `levels` None: all levels of the network, or its last map if it has none of them."""
    strides = [int(info["reduction"]) for info in net.feature_info]
    available = {
        level: len(strides) - 1 - strides[::-1].index(stride) for level, stride in _STRIDES.items() if stride in strides
    }
    for level in levels or []:
        if level not in available:
            has = ", ".join(str(stride) for stride in sorted(set(strides)))
            raise UserError(
                f"losses: spatial: {name} has no level {level} ({_STRIDES[level]} pixels), its maps have strides of {has}; "
                "name others, or leave levels out"
            )
    return {level: available[level] for level in levels} if levels else available or {"last": len(strides) - 1}


def _common_grid(map_BCHW: Tensor, other_BDHW: Tensor) -> tuple[int, int]:
    """The smaller of two grids, so that values are averaged, never interpolated."""
    return min(map_BCHW.shape[2], other_BDHW.shape[2]), min(map_BCHW.shape[3], other_BDHW.shape[3])


def _tokens(map_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map as means over the cells of a grid that is no finer: [B,N,C]."""
    cells = map_BCHW if tuple(map_BCHW.shape[-2:]) == grid else F.adaptive_avg_pool2d(map_BCHW, grid)
    return cells.flatten(2).transpose(1, 2)
