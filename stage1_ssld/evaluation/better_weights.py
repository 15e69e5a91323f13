"""Whether a stage 1 has changed the features of a student that began with trained weights, and which weights it leaves; judged without a label.

Compared are the weights at the end, those of the start, and the mean of both (WiSE-FT, arXiv 2109.01903, at one half): the share of the nearest
images by the student's embeddings that are also the nearest by the teacher's. A detector whose norms train does not follow this order
(docs/benchmarks/pretrained_student_cpu_2026-11-29.md), so by default the shares are told and the last weights stay. A module of its own, because
the loop and its evaluation know one set of weights, and this compares three.

Shapes: N images, D numbers of an embedding.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssld.shared.distributed.processes import to_device
from ssld.shared.models.backbones import Classifier
from ssld.shared.models.teacher import Teacher, embed
from ssld.stage1_ssld.data.batch import Batch

NEIGHBOURS = 10
MOST_IMAGES, LEAST_IMAGES = 500, 50
"""held-out images that are looked at, and how many there have to be"""

Which = Literal["last", "mean", "start"]
_WORDS: dict[Which, str] = {
    "last": "the weights of the last step",
    "mean": "the mean of the weights of start and last step",
    "start": "the weights it began with",
}


@dataclass(frozen=True)
class Choice:
    """The weights that are kept, and the share of the teacher's neighbours that each of the three has kept."""

    which: Which
    shares: dict[Which, float]
    images: int
    better: bool
    """whether the weights with the largest share were asked for"""

    def describe(self) -> str:
        """A line for the log."""
        shares = ", ".join(f"{which} {100 * share:.1f} %" for which, share in self.shares.items())
        return (
            f"nearest images that are also the teacher's, on {self.images} held-out images: {shares}; the file holds {_WORDS[self.which]} "
            f"(keep_weights: {'better' if self.better else 'last'})"
        )


def choose_weights(
    net: Classifier,
    start: Mapping[str, Tensor],
    teacher: Teacher,
    batches: Callable[[], Iterable[Batch]],
    *,
    better: bool,
) -> Choice | None:
    """Compare the weights of a network with those it began with, on one process; the network keeps its own.

    Among equal shares the later weights win.

    Args:
        net: in evaluation mode.
        start: the state dict of `net.net` before training.
        batches: held-out images, the same at each call; labels are not read.
        better: choose the weights with the largest share, not the last ones.

    Returns:
        None where fewer than `LEAST_IMAGES` of them could be read.
    """
    with teacher.running_statistics():
        nearest = nearest_images(_embeddings(teacher.embed, batches(), teacher.device))
    if len(nearest) < LEAST_IMAGES:
        return None
    last = {name: tensor.clone() for name, tensor in net.net.state_dict().items()}
    shares: dict[Which, float] = {}
    try:
        for which in _WORDS:
            net.net.load_state_dict(weights(which, last, start))
            mine = nearest_images(_embeddings(lambda pixels: embed(net, pixels), batches(), teacher.device))
            shares[which] = neighbours_in_common(mine, nearest)
    finally:
        net.net.load_state_dict(last)
    most = max(shares, key=lambda which: shares[which])
    return Choice(most if better else "last", shares, len(nearest), better)


def weights(which: Which, last: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One of the three sets of weights; counters of a mean are those of the last step."""
    if which == "mean":
        return {
            name: (tensor + start[name].to(tensor)) / 2 if tensor.is_floating_point() else tensor
            for name, tensor in last.items()
        }
    return dict(last if which == "last" else start)


def nearest_images(embeddings_ND: Tensor) -> Tensor:
    """The nearest other images of each by cosine, [N, min(`NEIGHBOURS`, N - 1)]."""
    unit_ND = F.normalize(embeddings_ND, dim=1)
    count = min(NEIGHBOURS, max(0, len(unit_ND) - 1))
    return (unit_ND @ unit_ND.T).fill_diagonal_(-2).topk(count, dim=1).indices


def neighbours_in_common(one: Tensor, other: Tensor) -> float:
    """Mean share of the same neighbours in two results of `nearest_images`."""
    return (one[:, :, None] == other[:, None, :]).any(-1).float().mean().item()


@torch.no_grad()
def _embeddings(network: Callable[[Tensor], Tensor], batches: Iterable[Batch], device: torch.device) -> Tensor:
    parts = [network(to_device(batch.pixels_BCHW, device)).float() for batch in batches if len(batch.pixels_BCHW)]
    return torch.cat(parts) if parts else torch.zeros(0, 1)
