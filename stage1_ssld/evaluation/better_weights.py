"""Comparison of a pretrained student's weights before and after stage 1, without labels.

Three sets of weights are compared: those of the last step, the initial ones, and the mean of both (WiSE-FT, arXiv 2109.01903, at one half). The score
is the share of nearest images by the student's embeddings that are also nearest by the teacher's. A detector whose norms train does not follow this
score (docs/benchmarks/pretrained_student_cpu_2026-11-29.md), so by default the shares are logged and the last weights are kept. A module of its own,
because the training loop and its evaluation handle one set of weights, and this one three.

Shapes: N images, D features.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssld.shared.distributed.precision import full_float32
from ssld.shared.distributed.processes import to_device
from ssld.shared.models.backbones import Classifier
from ssld.shared.models.teacher import Teacher, embed
from ssld.stage1_ssld.data.batch import Batch

NEIGHBORS = 10
MOST_IMAGES, LEAST_IMAGES = 500, 50
"""most and fewest held-out images for the comparison"""

Which = Literal["last", "mean", "start"]
_WORDS: dict[Which, str] = {
    "last": "the weights of the last step",
    "mean": "the mean of the initial and the last weights",
    "start": "the initial weights",
}


@dataclass(frozen=True)
class Choice:
    """Result of a comparison.

    Attributes:
        which: the weights to keep.
        shares: share of the teacher's neighbors, by set of weights.
        images: number of compared images.
        better: whether `keep_weights: better` is set.
    """

    which: Which
    shares: dict[Which, float]
    images: int
    better: bool

    def describe(self) -> str:
        """Format the shares as a log line."""
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
    """Compare the weights of a network with the initial ones, on one process. The network's weights are unchanged afterwards.

    Of equal shares, last wins over mean, and mean over start.

    Args:
        net: trained network in evaluation mode.
        start: state dict of `net.net` before training.
        teacher: teacher whose neighbors are the reference.
        batches: function that returns the held-out images, the same at each call; labels are not read.
        better: whether to choose the weights with the largest share instead of the last ones.

    Returns:
        The comparison; None if fewer than `LEAST_IMAGES` images could be read.
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
            student = nearest_images(_embeddings(lambda pixels: embed(net, pixels), batches(), teacher.device))
            shares[which] = neighbors_in_common(student, nearest)
    finally:
        net.net.load_state_dict(last)
    most = max(shares, key=lambda which: shares[which])
    return Choice(most if better else "last", shares, len(nearest), better)


def weights(which: Which, last: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return one of the three sets of weights; integer counters of the mean are those of the last step."""
    if which == "mean":
        return {
            name: (tensor + start[name].to(tensor)) / 2 if tensor.is_floating_point() else tensor
            for name, tensor in last.items()
        }
    return dict(last if which == "last" else start)


def worse_than_start(metrics: Mapping[str, float], start: Mapping[str, float], *, batch_statistics: bool) -> str | None:
    """Return a warning if training took a student away from its teacher, by agreement and by KL; None otherwise.

    Args:
        metrics: of the trained weights on held-out images: `agreement` (0..1), `kl` (nats per image), `images`.
        start: the same of the initial weights.
        batch_statistics: whether BatchNorm normalizes by batch statistics in training.
    """
    if metrics["agreement"] >= start["agreement"] or metrics["kl"] <= start["kl"]:
        return None
    return (
        f"warning: training took the student away from its teacher: on {metrics['images']:.0f} held-out images both give the same class to "
        f"{100 * metrics['agreement']:.1f} %, with the initial weights to {100 * start['agreement']:.1f} % (KL {metrics['kl']:.3g}, "
        f"with the initial weights {start['kl']:.3g}). "
        f"A detector may do better without stage 1: compare the two. Gentler: {'student.batchnorm: eval, ' * batch_statistics}a lower optim.lr"
    )


def nearest_images(embeddings_ND: Tensor) -> Tensor:
    """Nearest other images of each image by cosine similarity: [N, min(`NEIGHBORS`, N - 1)]."""
    unit_ND = F.normalize(embeddings_ND, dim=1)
    count = min(NEIGHBORS, max(0, len(unit_ND) - 1))
    with full_float32():
        cosines_NN = unit_ND @ unit_ND.T
    return cosines_NN.fill_diagonal_(-2).topk(count, dim=1).indices


def neighbors_in_common(one: Tensor, other: Tensor) -> float:
    """Mean share of common neighbors in two results of `nearest_images`."""
    return (one[:, :, None] == other[:, None, :]).any(-1).float().mean().item()


@torch.no_grad()
def _embeddings(network: Callable[[Tensor], Tensor], batches: Iterable[Batch], device: torch.device) -> Tensor:
    parts = [network(to_device(batch.pixels_BCHW, device)).float() for batch in batches if len(batch.pixels_BCHW)]
    return torch.cat(parts) if parts else torch.zeros(0, 1)
