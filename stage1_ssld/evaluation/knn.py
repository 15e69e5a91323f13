"""Nearest-neighbor accuracy, which measures a network's embeddings without its classification layer.

The class of an image is predicted by the votes of its k nearest images in a labeled bank, weighted by exp(cosine / temperature) (Wu et al. 2018,
arXiv 1805.01978). The search is exact. The bank is compared batch by batch and not stored: memory is queries x (embedding + k + one batch of the
bank), independent of the bank's size. Q queries, B images of a batch of the bank, D features.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ssld.shared.distributed.precision import full_float32
from ssld.shared.distributed.processes import to_device
from ssld.shared.distributed.ranks import gather_lists, world_size
from ssld.stage1_ssld.data.batch import NO_LABEL, Batch

TEMPERATURE = 0.07
_CHUNK = 4096  # queries compared at a time
_PLACES = 2**32  # larger than any batch

Embed = Callable[[Tensor], Tensor]


@torch.no_grad()
def knn_accuracy(
    embed: Embed,
    queries: Iterable[Batch],
    bank: Iterable[Batch],
    *,
    neighbors: int,
    classes: int,
    device: torch.device,
    first: int = 0,
    step: int = 1,
    on_unreadable: Callable[[list[str]], None] | None = None,
) -> dict[str, float]:
    """Compute `knn_top1`, the share of labeled queries whose class wins the vote, over all ranks; the result is the same for any number of ranks.

    Args:
        embed: pixels [B,3,H,W] -> embeddings [B,D].
        queries, bank: this rank's batches, with labels in one numbering; unlabeled images are skipped.
        neighbors: k; a bank with fewer readable images votes as a whole, and an empty one gives {}.
        classes: number of classes.
        device: device of the comparison.
        first, step: position of this rank's batches among those of all ranks; on ties the earlier image of the bank wins.
        on_unreadable: called with the locations of this rank's images that could not be read.
    """
    embedded = list(_embedded(embed, queries, device, first, step, on_unreadable))
    queries_QD, labels_Q, places_Q = (_of_all_ranks(_joined(embedded, part), device) for part in range(3))
    in_order = places_Q.argsort()
    queries_QD, labels_Q = queries_QD[in_order], labels_Q[in_order]
    count = len(labels_Q)
    if count == 0:
        return {}
    cosines_Qk = queries_QD.new_full((count, neighbors), float("-inf"))
    classes_Qk = labels_Q.new_zeros((count, neighbors))
    places_Qk = labels_Q.new_full((count, neighbors), torch.iinfo(torch.int64).max)
    for bank_BD, bank_labels_B, bank_places_B in _embedded(embed, bank, device, first, step, on_unreadable):
        for start in range(0, count, _CHUNK):
            rows = slice(start, start + _CHUNK)
            with full_float32():  # TF32 would change the order of near neighbors
                cosines = queries_QD[rows] @ bank_BD.T
            largest, places = _largest(cosines, neighbors)
            cosines_Qk[rows], places_Qk[rows], classes_Qk[rows] = _nearest(
                torch.cat([cosines_Qk[rows], largest], 1),
                torch.cat([places_Qk[rows], bank_places_B[places]], 1),
                torch.cat([classes_Qk[rows], bank_labels_B[places]], 1),
                neighbors,
            )
    if world_size() > 1:
        cosines_Qk, places_Qk, classes_Qk = _nearest(
            torch.cat(_gathered(cosines_Qk), 1),
            torch.cat(_gathered(places_Qk), 1),
            torch.cat(_gathered(classes_Qk), 1),
            neighbors,
        )
    if cosines_Qk[0, 0].isinf():  # no image of the bank could be read
        return {}
    right = 0
    for start in range(0, count, _CHUNK):
        rows = slice(start, start + _CHUNK)
        winners = vote(cosines_Qk[rows], classes_Qk[rows], classes)
        right += int((winners == labels_Q[rows]).sum())
    return {"knn_top1": right / count}


def vote(cosines_Qk: Tensor, classes_Qk: Tensor, classes: int, *, temperature: float = TEMPERATURE) -> Tensor:
    """Class with the largest sum of exp(cosine / temperature) over its neighbors: [Q]; a neighbor at -inf has no vote."""
    # Scaled so that the largest weight of a query is 1, which avoids overflow and keeps the winner.
    weights_Qk = ((cosines_Qk - cosines_Qk.amax(1, keepdim=True)) / temperature).exp()
    votes = weights_Qk.new_zeros(len(weights_Qk), classes)
    return votes.scatter_add_(1, classes_Qk, weights_Qk).argmax(1)


def _largest(cosines: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns; of values equal to the last one, the first columns."""
    largest, columns = cosines.topk(min(k, cosines.shape[1]), dim=1)
    # topk returns any of equal values, and a stable sort is many times slower, so only rows with ties are sorted.
    crowded = ((cosines >= largest[:, -1:]).sum(1) > largest.shape[1]).nonzero()[:, 0]
    if len(crowded):
        columns[crowded] = cosines[crowded].argsort(dim=1, descending=True, stable=True)[:, : columns.shape[1]]
    return largest, columns


def _nearest(cosines: Tensor, places: Tensor, classes: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest cosines of each row, with their places and classes; of equal ones, those with smaller places."""
    by_place = places.argsort(1)
    best = cosines.gather(1, by_place).argsort(dim=1, descending=True, stable=True)[:, :k]
    chosen = by_place.gather(1, best)
    return cosines.gather(1, chosen), places.gather(1, chosen), classes.gather(1, chosen)


def _embedded(
    embed: Embed,
    batches: Iterable[Batch],
    device: torch.device,
    first: int,
    step: int,
    on_unreadable: Callable[[list[str]], None] | None,
) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """(unit embeddings [B,D], labels [B], places [B]) of the labeled images of each batch."""
    for number, batch in enumerate(batches):
        if on_unreadable and batch.unreadable:
            on_unreadable(batch.unreadable)
        known = batch.labels_B != NO_LABEL
        if not known.any():
            continue
        # The whole batch passes the network, so that embeddings do not depend on which images are labeled.
        vectors = F.normalize(embed(to_device(batch.pixels_BCHW, device)).float(), dim=1)
        places = (first + number * step) * _PLACES + torch.arange(len(known))
        yield (
            vectors[known.to(device)],
            to_device(batch.labels_B[known], device),
            to_device(places[known], device),
        )


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]], which: int) -> Tensor | None:
    return torch.cat([part[which] for part in parts]) if parts else None


def _of_all_ranks(rows: Tensor | None, device: torch.device) -> Tensor:
    """Concatenate the rows of all ranks in the order of ranks; None for a rank without rows."""
    described = gather_lists([None if rows is None else (rows.dtype, rows.shape)])
    known = next((item for item in described if item is not None), (torch.int64, torch.Size([0])))
    own = torch.empty(0, *known[1][1:], dtype=known[0], device=device) if rows is None else rows
    if world_size() == 1:
        return own
    lengths = [0 if item is None else item[1][0] for item in described]
    padded = torch.cat([own, own.new_zeros(max(lengths) - len(own), *own.shape[1:])])
    return torch.cat([part[:length] for part, length in zip(_gathered(padded), lengths, strict=True)])


def _gathered(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts
