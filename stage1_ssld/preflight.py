"""Is the teacher the right one? It is tried on labelled images before anything is trained: a wrong file or class order costs days otherwise."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from shared.errors import UserError
from shared.processes import to_device
from shared.ranks import gather_lists
from shared.teacher import Teacher
from stage1_ssld.batch import NO_LABEL, Batch

ENOUGH = 100
"""Fewer images prove nothing."""
_PER_CLASS = 8  # images that tell whether a class goes by another number


def rows_to_try(labels: Sequence[int], count: int) -> list[int]:
    """At most `count` labelled rows, of classes spread evenly over all: several of a class, because one says nothing about its order."""
    rows: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        if label != NO_LABEL:
            rows.setdefault(label, []).append(row)
    chosen = _spread(sorted(rows), max(1, count // _PER_CLASS))
    each = count // len(chosen) if chosen else 0
    return [row for label in chosen for row in _spread(rows[label], max(1, each))][:count]


@torch.no_grad()
def check_teacher(teacher: Teacher, batches: Iterable[Batch], *, device: torch.device, where: str) -> str:
    """A line on the teacher's accuracy over this rank's batches, of all ranks together. A teacher of random weights is not tried.

    Args:
        batches: labelled images, in the teacher's class numbers.
        where: names these images in messages.

    Raises:
        UserError: with at least 100 images, when it is not better than chance by more than two standard deviations; with the likely cause.
    """
    if teacher.reference.text.startswith("random:"):
        return "teacher: random weights, not tried"
    pairs: list[tuple[int, int]] = []
    with teacher.running_statistics():
        for batch in batches:
            if len(batch.keys):
                answers = teacher(to_device(batch.pixels_BCHW, device)).argmax(-1).tolist()
                pairs += [pair for pair in zip(batch.labels_B.tolist(), answers, strict=True) if pair[0] != NO_LABEL]
    pairs = gather_lists(pairs)
    if not pairs:
        return f"teacher: not tried, {where} has no labelled images"
    right, chance = sum(label == answer for label, answer in pairs), 1 / teacher.num_classes
    accuracy = right / len(pairs)
    line = f"{100 * accuracy:.1f} % right on {len(pairs)} images of {where} (chance {100 * chance:.1f} %)"
    if len(pairs) < ENOUGH or accuracy > chance + 2 * math.sqrt(chance * (1 - chance) / len(pairs)):
        return f"teacher: {line}"
    raise UserError(
        f"{teacher.reference.text}: {line}, no better than guessing: {_likely_cause(pairs, chance)}; "
        "teacher.check_images: 0 leaves this check out"
    )


def _likely_cause(pairs: Sequence[tuple[int, int]], chance: float) -> str:
    """If a renaming of its answers, learnt on one half, is right on the other, the weights are good and the class order is not."""
    halves: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    seen: Counter[int] = Counter()
    for label, answer in pairs:
        halves[seen[label] % 2].append((label, answer))
        seen[label] += 1
    meanings: dict[int, Counter[int]] = {}
    for label, answer in halves[0]:
        meanings.setdefault(answer, Counter())[label] += 1
    renaming = {answer: labels.most_common(1)[0] for answer, labels in meanings.items()}
    hits = sum(answer in renaming and renaming[answer][0] == label for label, answer in halves[1])
    renamed = hits / max(1, len(halves[1]))
    # Features of an untrained network tell some classes apart too, so this asks for much.
    if renamed > max(0.15, min(3 * chance, (1 + chance) / 2)):
        moved = [(count, answer, label) for answer, (label, count) in renaming.items() if answer != label]
        _, answer, label = max(moved)
        return (
            f"it knows the images, but its classes are in another order (its class {answer} is class {label} of these labels; "
            f"renamed like that, it is right on {100 * renamed:.0f} %)"
        )
    weights = "its weights do not know these images: wrong file or arch, an untrained head, other classes, or another mean and std"
    # From a few images of each class no renaming can be learnt.
    return weights if len(pairs) >= _PER_CLASS * len(seen) // 2 else f"{weights}; or its classes are in another order"


def _spread(items: list[int], count: int) -> list[int]:
    """At most `count` of the items, at even distances."""
    if len(items) <= count:
        return items
    return [items[index * len(items) // count] for index in range(count)]
