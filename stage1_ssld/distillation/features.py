"""Feature terms: the student's features, through a small head that is trained along, against the features of a live teacher.

The form is AM-RADIO's (Ranzinger et al. 2024, arXiv 2312.06709, section 3): a head for each kind of feature, a cosine on what is pooled, a smooth L1
on what lies in space, grids resized to a common size. ScaleKD (Fan et al. 2024, arXiv 2411.06786, section 3) also lets the maps of a ViT teach a CNN
through a trained projection; its cross-attention and its second view, in frequencies, are left out. Teacher features are standardised channel by
channel, with statistics of the first training images that stay what they are. PHI-S (arXiv 2410.01680) compares this with rotations, which matter
where several teachers are weighed against each other.

B images, C channels of the student, D of the teacher, N cells of a grid, H rows, W columns.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssld.shared.distributed.processes import to_device
from ssld.shared.distributed.ranks import for_sums, sum_dtype, total_over_ranks
from ssld.shared.errors import UserError
from ssld.shared.models.backbones import Classifier
from ssld.shared.models.teacher import Teacher, TeacherFeatures
from ssld.shared.wording import count
from ssld.stage1_ssld.data.batch import Batch
from ssld.stage1_ssld.data_config import LossConfig

FeaturePairs = Mapping[str, Sequence[tuple[Tensor, Tensor]]]
"""By the name of a term: what the student's heads say and what the teacher has, [B,D] (pooled) or [B,N,D] (spatial, a pair for each level)."""

STATISTICS_IMAGES = 512
"""Views whose teacher features give mean and deviation, rounded up to whole batches."""
_STRIDES = {"c3": 8, "c4": 16, "c5": 32}
_FLOOR = 0.01  # smallest deviation of a channel, as a part of the root mean square of all: a channel that is all but constant stays small


class FeatureHeads(nn.Module):
    """What stands between a student's features and a teacher's: trained heads, and the mean and deviation of the teacher's features.

    A head is LayerNorm and a linear layer on the channels; it does not see how large the features of an arch are. It is trained at the student's rate
    and left out of the student's file.

    Args:
        terms: those of the loss that compare features, at most one of each name.
        classifier: the student's network.
        size: side S of the views in pixels.
        name: of the student, for messages.

    Raises:
        UserError: a network without the levels or maps that are asked for, or whose features are not one vector for each image.
    """

    def __init__(
        self, terms: Sequence[LossConfig], classifier: Classifier, teacher: Teacher, *, size: int, name: str
    ) -> None:
        super().__init__()
        spatial = next((term for term in terms if term.name == "spatial"), None)
        self._places = _places(classifier.net, spatial.levels, name) if spatial else {}
        device = classifier.mean_3.device
        noise = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=noise).to(device)
        with torch.no_grad():
            taught = teacher.features(pixels, maps=bool(spatial))
            _, pooled_BC, maps = student_features(classifier.eval(), pixels, list(self._places.values()))
        self.heads = nn.ModuleDict()
        self._grids: list[tuple[int, int]] = []
        for term in terms:
            ours, theirs = ([pooled_BC], taught.pooled_BD) if term.name == "pooled" else (maps, taught.map_BCHW)
            assert theirs is not None
            if theirs.ndim != (2 if term.name == "pooled" else 4) or any(one.ndim != theirs.ndim for one in ours):
                raise UserError(
                    f"losses: {term.name}: the features of {name} or its teacher have another shape; take another arch"
                )
            if term.name == "spatial":
                self._grids = [_common_grid(one, theirs) for one in ours]
            width = theirs.shape[1]
            self.heads[term.name] = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(one.shape[1]), nn.Linear(one.shape[1], width)) for one in ours
            )
            self.register_buffer(f"{term.name}_mean_D", torch.zeros(width))
            self.register_buffer(f"{term.name}_deviation_D", torch.ones(width))
        self.to(device)

    @property
    def places(self) -> list[int]:
        """Which of timm's intermediate maps the student's levels are."""
        return list(self._places.values())

    def forward(self, pooled_BC: Tensor, maps: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """What the heads say of the teacher's standardised features: [B,D], or [B,N,D] for each of the maps [B,C,H,W]."""
        said: dict[str, list[Tensor]] = {}
        for name, heads in self.heads.items():
            assert isinstance(heads, nn.ModuleList)
            ours = [pooled_BC] if name == "pooled" else map(_tokens, maps, self._grids)
            said[name] = [head(one) for head, one in zip(heads, ours, strict=True)]
        return said

    def pairs(self, said: Mapping[str, list[Tensor]], taught: TeacherFeatures) -> FeaturePairs:
        """What the heads said, beside the teacher's features for it."""
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name, ours in said.items():
            mean_D, deviation_D = getattr(self, f"{name}_mean_D"), getattr(self, f"{name}_deviation_D")
            if name == "pooled":
                theirs = [taught.pooled_BD]
            else:
                assert taught.map_BCHW is not None
                by_grid = {grid: _tokens(taught.map_BCHW, grid) for grid in set(self._grids)}
                theirs = [by_grid[grid] for grid in self._grids]
            pairs[name] = [(one, (other - mean_D) / deviation_D) for one, other in zip(ours, theirs, strict=True)]
        return pairs

    @torch.no_grad()
    def measure(self, teacher: Teacher, batches: Iterable[Batch]) -> str:
        """Take mean and deviation of the teacher's features over the batches of all ranks, which all call it; returns a line for the log.

        Raises UserError for features that are not finite, or the same for every image.
        """
        sums, images = {}, torch.zeros((), dtype=torch.int64, device=teacher.device)
        for name in self.heads:
            width = len(getattr(self, f"{name}_mean_D"))
            sums[name] = torch.zeros(3, width, dtype=sum_dtype(teacher.device), device=teacher.device)
        for batch in batches:
            if len(batch.keys) == 0:
                continue
            images += len(batch.keys)
            taught = teacher.features(to_device(batch.pixels_BCHW, teacher.device), maps="spatial" in sums)
            for name, sum_3D in sums.items():
                values = taught.pooled_BD[..., None, None] if name == "pooled" else taught.map_BCHW
                assert values is not None
                values_ND = for_sums(values).permute(0, 2, 3, 1).flatten(0, 2)
                sum_3D += torch.stack([torch.ones_like(values_ND), values_ND, values_ND.square()]).sum(1)
        images, who = total_over_ranks(images), teacher.references[0].text
        if not images:
            raise UserError(f"data.train: no image could be read, of which {who} would tell how its features spread")
        for name, sum_3D in sums.items():
            number_D, total_D, square_D = total_over_ranks(sum_3D)
            mean_D = total_D / number_D
            variance_D = (square_D / number_D - mean_D.square()).clamp(min=0)
            spread = variance_D.mean().sqrt()
            if not torch.isfinite(spread):
                raise UserError(
                    f"{who}: its features are not finite; set teacher.precision: fp32, or check its weights"
                )
            if spread <= 1e-6 * mean_D.abs().max():
                raise UserError(
                    f"{who}: its features ({name}) are the same for every image: wrong weights, or images of one colour"
                )
            getattr(self, f"{name}_mean_D").copy_(mean_D)
            getattr(self, f"{name}_deviation_D").copy_(variance_D.sqrt().clamp(min=_FLOOR * spread))
        return f"features of {who}: standardised by {count(int(images), 'view')}; kept in the checkpoints"

    def describe(self) -> str:
        """What is compared, for the log."""
        parts = []
        for name in self.heads:
            width = len(getattr(self, f"{name}_mean_D"))
            levels = ", ".join(f"{level} at {h} x {w}" for level, (h, w) in zip(self._places, self._grids, strict=True))
            parts.append(f"{name} in {width} dimensions{f' ({levels})' if name == 'spatial' else ''}")
        numbers = sum(parameter.numel() for parameter in self.parameters())
        return f"features: {', '.join(parts)}; heads of {numbers / 1e6:.2f} M parameters, which stay out of the file"


class Learner(nn.Module):
    """What learns, as one module that data-parallel training can wrap: pixels [B,3,H,W] in 0..255 -> logits [B,K], and what the heads say.

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
    """Logits [B,K], pooled features [B,C] and the intermediate maps [B,C,H,W] at `places`, in one forward pass."""
    net: Any = classifier.net
    x, maps = classifier.normalised(pixels_BCHW), []
    if places:
        features, maps = net.forward_intermediates(x, indices=list(places), output_fmt="NCHW")
    else:
        features = net.forward_features(x)
    pooled_BC = net.forward_head(features, pre_logits=True)
    logits_BK = net.forward_head(features) if net.num_classes else pooled_BC.new_zeros(len(pooled_BC), 0)
    return logits_BK, pooled_BC, maps


def _places(net: Any, levels: Sequence[str] | None, name: str) -> dict[str, int]:
    """Level -> index of the last intermediate map of its stride; without `levels` all there are, or the last map of a network of other strides."""
    strides = [int(info["reduction"]) for info in net.feature_info]
    found = {
        level: len(strides) - 1 - strides[::-1].index(stride) for level, stride in _STRIDES.items() if stride in strides
    }
    for level in levels or []:
        if level not in found:
            has = ", ".join(str(stride) for stride in sorted(set(strides)))
            raise UserError(
                f"losses: spatial: {name} has no level {level} ({_STRIDES[level]} pixels), its maps have strides of {has}; "
                "name others, or leave levels out"
            )
    return {level: found[level] for level in levels} if levels else found or {"last": len(strides) - 1}


def _common_grid(map_BCHW: Tensor, other_BDHW: Tensor) -> tuple[int, int]:
    """The smaller of two grids: nothing is invented between cells."""
    return min(map_BCHW.shape[2], other_BDHW.shape[2]), min(map_BCHW.shape[3], other_BDHW.shape[3])


def _tokens(map_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B,N,C]: a map as the means over the cells of a grid that is no finer."""
    cells = map_BCHW if tuple(map_BCHW.shape[-2:]) == grid else F.adaptive_avg_pool2d(map_BCHW, grid)
    return cells.flatten(2).transpose(1, 2)
