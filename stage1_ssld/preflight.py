"""Is the teacher the right one? It is tried on labelled images before anything is trained: a wrong file or class order costs days otherwise."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from shared.errors import UserError
from shared.processes import to_device
from shared.ranks import gather_lists, rank, world_size
from shared.teacher import Teacher
from stage1_ssld.batch import NO_LABEL, Batch
from stage1_ssld.config import DistillConfig, TeachConfig
from stage1_ssld.data import ValViews, make_loader, val_batches
from stage1_ssld.guidance import Guidance
from stage1_ssld.labels import match_classes
from stage1_ssld.sources import ImageSource

ENOUGH = 100
"""Fewer images prove nothing."""


def try_teacher(
    config: DistillConfig | TeachConfig, guidance: Guidance, val_source: ImageSource | None, *, device: torch.device
) -> str:
    """Try the teacher on labelled images of the validation set, else of the first training source with its classes; a line for the log.

    Raises UserError: see `check_teacher`.
    """
    teacher = guidance.teacher
    assert isinstance(config, DistillConfig)
    assert config.teacher
    assert teacher
    if config.teacher.check_images == 0 or config.teacher.model.startswith("random:"):
        return "teacher: not tried on labelled images"
    chosen = _labelled(val_source, guidance, teacher)
    if chosen is None:
        return "teacher: not tried, there are no labelled images with its classes"
    source, labels = chosen
    data = config.data
    views = ValViews(source, labels, size=data.image_size, crop=data.val_crop, interpolation=data.interpolation)
    count = min(len(views), config.teacher.check_images)
    rows = [number * len(views) // count for number in range(count)]  # spread: folders lie class by class
    order = val_batches(rows, min(config.batch_size, 128), rank(), world_size())
    loader = make_loader(views, order, workers=config.workers, pin_memory=device.type == "cuda")
    return check_teacher(teacher, loader, device=device, where=source.path)


def _labelled(
    val_source: ImageSource | None, guidance: Guidance, teacher: Teacher
) -> tuple[ImageSource, Sequence[int]] | None:
    if val_source and guidance.val_labels is not None:
        return val_source, guidance.val_labels
    for source in guidance.sources:
        try:
            labels = match_classes(source, guidance.class_names, teacher.num_classes, "the teacher")
        except UserError:  # labels of other classes: allowed in training, where nobody reads them
            continue
        if labels is not None:
            return source, labels
    return None


@torch.no_grad()
def check_teacher(teacher: Teacher, batches: Iterable[Batch], *, device: torch.device, where: str) -> str:
    """A line on the teacher's accuracy over this rank's batches, of all ranks together.

    Args:
        batches: labelled images, in the teacher's class numbers.
        where: names these images in messages.

    Raises:
        UserError: with at least 100 images, when it is not better than chance by more than two standard deviations; with the likely cause.
    """
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
    line = f"teacher: {100 * accuracy:.1f} % right on {len(pairs)} images of {where} (chance {100 * chance:.1f} %)"
    if len(pairs) < ENOUGH or accuracy > chance + 2 * math.sqrt(chance * (1 - chance) / len(pairs)):
        return line
    raise UserError(
        f"{teacher.reference.text}: {line.removeprefix('teacher: ')}, which is no better than guessing: {_likely_cause(pairs, chance)}; "
        "teacher.check_images: 0 leaves this check out"
    )


def _likely_cause(pairs: Sequence[tuple[int, int]], chance: float) -> str:
    """If a renaming of its answers, learnt on one half, is right on the other, the weights are good and the class order is not."""
    renaming = {
        answer: Counter(label for label, other in pairs[::2] if other == answer).most_common(1)[0][0]
        for answer in {answer for _, answer in pairs[::2]}
    }
    held_out = pairs[1::2]
    renamed = sum(renaming.get(answer) == label for label, answer in held_out) / len(held_out)
    if renamed > chance + 0.25 * (1 - chance):
        answer, label = next((answer, label) for answer, label in sorted(renaming.items()) if answer != label)
        return (
            f"it knows the images but numbers the classes in another order (its class {answer} is mostly class {label} here; "
            f"with its classes renamed it is right on {100 * renamed:.0f} %)"
        )
    weights = "its weights do not know these images: wrong file or arch, an untrained head, or another mean and std"
    # A renaming of many classes cannot be learnt from a few images each.
    return weights if len(pairs) * chance >= 8 else f"{weights}; or it numbers the classes in another order"
