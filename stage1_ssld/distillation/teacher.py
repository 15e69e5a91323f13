"""Teacher of a configuration, and its check on labeled images before training, which detects a wrong file or class order."""

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
from ssld.shared.run_dir import RunDir
from ssld.stage1_ssld.config import EVALUATION_BATCH, DistillConfig, SoftLabelsConfig
from ssld.stage1_ssld.data.batch import NO_LABEL, Batch
from ssld.stage1_ssld.data.labels import are_prototypes, labels_in_classes
from ssld.stage1_ssld.data.loaders import Labels, ValViews, make_loader, val_batches
from ssld.stage1_ssld.data.sources import ImageSource
from ssld.stage1_ssld.data_config import TeacherConfig

ENOUGH = 100
"""Fewest images for the check."""
_PER_CLASS = 8  # images per class from which a renumbering of classes is detected
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
        precision: precision of its forward pass if `config.precision` is None.
        classes: whether its logits are needed; False accepts a network without classes, which has no ensemble.

    Raises:
        UserError: see FrozenTeacher; members with different classes.
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


def compare_teacher(run: RunDir, teacher: Teacher, config: TeacherConfig, image_size: int) -> None:
    """Record the teacher's weights, and how it sees views of `image_size` pixels. Raises UserError where this run began with others.

    Its precision may change with that of the run.
    """
    settings = {name: value for name, value in teacher.settings().items() if name != "precision"}
    sizes = settings["size"] if config.ensemble else [settings["size"]]
    note = None
    if config.size is None and are_prototypes(teacher.class_names) and [image_size] * 2 not in sizes:
        note = (
            f"warning: earlier versions gave a teacher of prototypes views of {image_size} px as they are; if this run began with one, its "
            "soft labels are others from here on: give another --output to train anew"
        )
    run.compare_network("teacher", {"weights": teacher.content_sha256()[:16], **settings}, note)


def try_teacher(
    teacher: Teacher,
    sources: Sequence[ImageSource],
    config: DistillConfig | SoftLabelsConfig,
    *,
    device: torch.device,
    val: tuple[ImageSource, Labels] | None = None,
) -> str:
    """Check the teacher on `config.teacher.check_images` labeled images of `val`, else of the first source with labels of its classes.

    Returns a log line. All ranks call it. Raises UserError as `check_teacher`.
    """
    assert config.teacher is not None
    if teacher.num_classes < 2:
        return "teacher: not checked, it has no classes"
    if config.teacher.check_images == 0:
        return "teacher: not checked, teacher.check_images is 0"
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
    return "teacher: not checked, there are no labeled images with its classes"


def rows_to_try(labels: Sequence[int], check_images: int) -> list[int]:
    """Choose at most `check_images` labeled rows, of classes spread evenly over all; several per class, because one does not show its number."""
    rows: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        if label != NO_LABEL:
            rows.setdefault(label, []).append(row)
    classes = sorted(rows)
    chosen = [classes[place] for place in spread(len(classes), max(1, check_images // _PER_CLASS))]
    each = max(1, check_images // len(chosen)) if chosen else 0
    return [rows[label][place] for label in chosen for place in spread(len(rows[label]), each)][:check_images]


@torch.no_grad()
def check_teacher(teacher: Teacher, batches: Iterable[Batch], *, device: torch.device, where: str) -> str:
    """Measure the teacher's accuracy over the batches of all ranks; returns a log line. Networks of an ensemble are checked one by one, except those
    with random weights.

    Args:
        batches: this rank's labeled images, in the teacher's class numbers.
        where: name of these images in messages.

    Raises:
        UserError: from 100 images on, a network that is no better than guessing, or whose classes are in another order; with the likely cause.
    """
    names = [reference.text for reference in teacher.references]
    checked = [number for number, name in enumerate(names) if not name.startswith("random:")]
    if not checked:
        return "teacher: random weights, not checked"
    predictions: list[tuple[int, ...]] = []  # (label, most likely class of each network) per image
    with teacher.running_statistics():
        for batch in batches:
            if len(batch.keys):
                first = [logits.argmax(-1).tolist() for logits in teacher.each(to_device(batch.pixels_BCHW, device))]
                rows = zip(batch.labels_B.tolist(), *first, strict=True)
                predictions += [row for row in rows if row[0] != NO_LABEL]
    predictions = gather_lists(predictions)
    if not predictions:
        return f"teacher: not checked, {where} has no labeled images"
    accuracies = []
    for number in checked:
        pairs = [(row[0], row[1 + number]) for row in predictions]
        accuracy = sum(label == predicted for label, predicted in pairs) / len(pairs)
        accuracies.append(f"{100 * accuracy:.1f} %" + (f" ({names[number]})" if len(names) > 1 else ""))
        cause = _likely_cause(pairs, teacher.num_classes) if len(pairs) >= ENOUGH else None
        if cause:
            raise UserError(
                f"{names[number]}: accuracy {100 * accuracy:.1f} % on {_of(pairs, where, teacher.num_classes)}, {cause}; "
                "teacher.check_images: 0 skips this check"
            )
    return f"teacher: accuracy {', '.join(accuracies)} on {_of(predictions, where, teacher.num_classes)}"


def _of(predictions: Sequence[tuple[int, ...]], where: str, classes: int) -> str:
    return f"{len(predictions)} images of {where} (chance {100 / classes:.1f} %)"


def guesses(pairs: Sequence[tuple[int, int]], classes: int) -> bool:
    """Whether (label, prediction) pairs are no better than always predicting one of the checked classes.

    Of 1,000 classes only some are checked, with several images each, so a constant prediction is right far more often than 1 in 1,000. The accuracy
    is averaged over the checked classes, so that frequent ones do not help. The threshold is three standard deviations above the constant prediction.
    """
    images: Counter[int] = Counter(label for label, _ in pairs)
    hits: Counter[int] = Counter(label for label, predicted in pairs if label == predicted)
    accuracy = sum(hits[label] / count for label, count in images.items()) / len(images)
    guess = 1 / (len(images) if len(images) > 1 else classes)
    deviation = math.sqrt(guess * (1 - guess) * sum(1 / count for count in images.values())) / len(images)
    return accuracy <= guess + 3 * deviation


def _likely_cause(pairs: Sequence[tuple[int, int]], classes: int) -> str | None:
    """Likely cause of these (label, prediction) pairs; None if they look right.

    If a renumbering of the predicted classes, learned on one half, is right on the other half, the weights are good and the class order is wrong.
    This is checked above the level of guessing too: two orders of the same classes agree in some classes.
    """
    chance = 1 / classes
    halves: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    per_class: Counter[int] = Counter()
    for label, predicted in pairs:
        halves[per_class[label] % 2].append((label, predicted))
        per_class[label] += 1
    labels_of: dict[int, Counter[int]] = {}
    for label, predicted in halves[0]:
        labels_of.setdefault(predicted, Counter())[label] += 1
    renaming = {predicted: labels.most_common(1)[0] for predicted, labels in labels_of.items()}
    hits = sum(predicted in renaming and renaming[predicted][0] == label for label, predicted in halves[1])
    renamed = hits / max(1, len(halves[1]))
    unchanged = sum(label == predicted for label, predicted in halves[1]) / max(1, len(halves[1]))
    guessing = guesses(pairs, classes)
    if not guessing and renamed < 2 * unchanged:
        return None
    # An untrained network separates some classes too, so the threshold is high.
    moved = [(count, predicted, label) for predicted, (label, count) in renaming.items() if predicted != label]
    if moved and renamed > max(0.15, min(3 * chance, (1 + chance) / 2)):
        _, predicted, label = max(moved)
        return (
            f"{_GUESSING if guessing else 'less than half of what it could be'}: "
            f"its classes are in another order than the labels (its class {predicted} is class {label} of these labels; "
            f"renumbered like that, its accuracy is {100 * renamed:.0f} %)"
        )
    if not guessing:
        return None
    weights = f"{_GUESSING}: its weights do not suit these images: wrong file or arch, an untrained head, other classes, or another mean and std"
    # From few images per class no renumbering can be learned.
    return (
        weights if len(pairs) >= _PER_CLASS * len(per_class) // 2 else f"{weights}; or its classes are in another order"
    )
