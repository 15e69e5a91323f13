"""The teacher that a configuration describes, and its trial on labeled images before anything is trained: a wrong file or class order costs days
otherwise."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from ssld.shared.distributed.processes import DTYPES, pins_memory, to_device
from ssld.shared.distributed.ranks import gather_lists, rank, world_size
from ssld.shared.errors import UserError
from ssld.shared.files import spread
from ssld.shared.models.teacher import FrozenTeacher, Teacher, TeacherEnsemble
from ssld.stage1_ssld.config import EVALUATION_BATCH, DistillConfig, SoftLabelsConfig
from ssld.stage1_ssld.data.batch import NO_LABEL, Batch
from ssld.stage1_ssld.data.labels import labels_in_classes
from ssld.stage1_ssld.data.loaders import Labels, ValViews, make_loader, val_batches
from ssld.stage1_ssld.data.sources import ImageSource
from ssld.stage1_ssld.data_config import TeacherConfig

ENOUGH = 100
"""Fewer images prove nothing."""
_PER_CLASS = 8  # images that tell whether a class goes by another number
_GUESSING = "no better than guessing"


def make_teacher(
    config: TeacherConfig,
    *,
    precision: str,
    device: torch.device,
    channels_last: bool,
    classes: bool = True,
) -> Teacher:
    """Load the teacher and its ensemble.

    Args:
        precision: of its forward pass where `config.precision` does not say it.
        classes: whether its answers in classes are needed; False takes a network without any, which has no ensemble.

    Raises:
        UserError: see FrozenTeacher; members whose classes differ.
    """
    members = [
        FrozenTeacher(
            member.model,
            arch=member.arch,
            device=device,
            dtype=DTYPES[config.precision or precision],
            channels_last=channels_last,
            size=member.size,
            batchnorm=config.batchnorm,
            fold_batchnorm=config.fold_batchnorm,
            classes=classes,
            global_pool=config.global_pool,
        )
        for member in (config, *config.ensemble)
    ]
    return TeacherEnsemble(members) if config.ensemble else members[0]


def try_teacher(
    teacher: Teacher,
    sources: Sequence[ImageSource],
    config: DistillConfig | SoftLabelsConfig,
    *,
    device: torch.device,
    val: tuple[ImageSource, Labels] | None = None,
) -> str:
    """Try the teacher on `config.teacher.check_images` labeled images: of `val`, else of the first source that has labels of its classes.

    Returns a line for the log. All ranks call it. Raises UserError as `check_teacher`.
    """
    assert config.teacher is not None
    if teacher.num_classes < 2:
        return "teacher: not tried, it has no classes"
    if config.teacher.check_images == 0:
        return "teacher: not tried, teacher.check_images is 0"
    known = ((source, labels_in_classes(source, teacher.class_names, teacher.num_classes)) for source in sources)
    for source, labels in itertools.chain([val] if val else [], known):
        if labels is not None:
            data = config.data
            views = ValViews(
                source, labels, image_size=data.image_size, val_crop=data.val_crop, interpolation=data.interpolation
            )
            rows = rows_to_try(labels, config.teacher.check_images)
            order = val_batches(rows, min(config.batch_size, EVALUATION_BATCH), rank(), world_size())
            loader = make_loader(views, order, workers=config.workers, pin_memory=pins_memory())
            return check_teacher(teacher, loader, device=device, where=source.path)
    return "teacher: not tried, there are no labeled images with its classes"


def rows_to_try(labels: Sequence[int], check_images: int) -> list[int]:
    """At most `check_images` labeled rows, of classes spread evenly over all: several of a class, because one says nothing about its order."""
    rows: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        if label != NO_LABEL:
            rows.setdefault(label, []).append(row)
    labels_found = sorted(rows)
    chosen = [labels_found[place] for place in spread(len(labels_found), max(1, check_images // _PER_CLASS))]
    each = max(1, check_images // len(chosen)) if chosen else 0
    return [rows[label][place] for label in chosen for place in spread(len(rows[label]), each)][:check_images]


@torch.no_grad()
def check_teacher(teacher: Teacher, batches: Iterable[Batch], *, device: torch.device, where: str) -> str:
    """A line on the teacher's accuracy over this rank's batches, of all ranks together; each network of an ensemble is tried, but none of random
    weights.

    Args:
        batches: labeled images, in the teacher's class numbers.
        where: names these images in messages.

    Raises:
        UserError: with at least 100 images, for a network that guesses, or whose classes are in another order; with the likely cause.
    """
    names = [reference.text for reference in teacher.references]
    tried = [number for number, name in enumerate(names) if not name.startswith("random:")]
    if not tried:
        return "teacher: random weights, not tried"
    found: list[tuple[int, ...]] = []  # label and every network's first class, image by image
    with teacher.running_statistics():
        for batch in batches:
            if len(batch.keys):
                first = [logits.argmax(-1).tolist() for logits in teacher.each(to_device(batch.pixels_BCHW, device))]
                rows = zip(batch.labels_B.tolist(), *first, strict=True)
                found += [row for row in rows if row[0] != NO_LABEL]
    found = gather_lists(found)
    if not found:
        return f"teacher: not tried, {where} has no labeled images"
    right = []
    for number in tried:
        pairs = [(row[0], row[1 + number]) for row in found]
        accuracy = sum(label == answer for label, answer in pairs) / len(pairs)
        right.append(f"{100 * accuracy:.1f} %" + (f" ({names[number]})" if len(names) > 1 else ""))
        cause = _likely_cause(pairs, teacher.num_classes) if len(pairs) >= ENOUGH else None
        if cause:
            raise UserError(
                f"{names[number]}: {100 * accuracy:.1f} % right on {_of(pairs, where, teacher.num_classes)}, {cause}; "
                "teacher.check_images: 0 leaves this check out"
            )
    return f"teacher: {', '.join(right)} right on {_of(found, where, teacher.num_classes)}"


def _of(found: Sequence[tuple[int, ...]], where: str, classes: int) -> str:
    return f"{len(found)} images of {where} (chance {100 / classes:.1f} %)"


def guesses(pairs: Sequence[tuple[int, int]], classes: int) -> bool:
    """Whether (label, answer) pairs are no better than the best guess: always the same class, one of those that were tried.

    Of 1,000 classes only some are tried, of each several images; one answer to everything is then right far more often than 1 in 1,000. What counts
    is the accuracy averaged over the classes tried, so that frequent ones do not help. The bar is three standard deviations above that guess.
    """
    images: Counter[int] = Counter(label for label, _ in pairs)
    hits: Counter[int] = Counter(label for label, answer in pairs if label == answer)
    accuracy = sum(hits[label] / count for label, count in images.items()) / len(images)
    guess = 1 / (len(images) if len(images) > 1 else classes)
    deviation = math.sqrt(guess * (1 - guess) * sum(1 / count for count in images.values())) / len(images)
    return accuracy <= guess + 3 * deviation


def _likely_cause(pairs: Sequence[tuple[int, int]], classes: int) -> str | None:
    """What is wrong with a network of these answers; None where nothing is.

    If a renaming of its answers, learnt on one half, is right on the other, the weights are good and the class order is not. That holds above the
    level of guessing too: two orders of the same classes agree in some.
    """
    chance = 1 / classes
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
    as_it_is = sum(label == answer for label, answer in halves[1]) / max(1, len(halves[1]))
    guessing = guesses(pairs, classes)
    if not guessing and renamed < 2 * as_it_is:
        return None
    # Features of an untrained network tell some classes apart too, so this asks for much.
    moved = [(count, answer, label) for answer, (label, count) in renaming.items() if answer != label]
    if moved and renamed > max(0.15, min(3 * chance, (1 + chance) / 2)):
        _, answer, label = max(moved)
        return (
            f"{_GUESSING if guessing else 'less than half of what it could be'}: "
            f"it knows the images, but its classes are in another order (its class {answer} is class {label} of these labels; "
            f"renamed like that, it is right on {100 * renamed:.0f} %)"
        )
    if not guessing:
        return None
    weights = f"{_GUESSING}: its weights do not know these images: wrong file or arch, an untrained head, other classes, or another mean and std"
    # From a few images of each class no renaming can be learnt.
    return weights if len(pairs) >= _PER_CLASS * len(seen) // 2 else f"{weights}; or its classes are in another order"
