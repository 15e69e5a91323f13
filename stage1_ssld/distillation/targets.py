"""Training targets: a live teacher, a store of soft labels, or human labels; and the classes of the network that follow from them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.shared.models.teacher import Teacher
from ssld.shared.wording import count
from ssld.stage1_ssld.config import DistillConfig, TeachConfig
from ssld.stage1_ssld.data.labels import are_prototypes, labeled_classes, match_classes
from ssld.stage1_ssld.data.loaders import Labels
from ssld.stage1_ssld.data.soft_labels import SoftLabels
from ssld.stage1_ssld.data.sources import ImageSource
from ssld.stage1_ssld.distillation.soft_label_store import SoftLabelStore
from ssld.stage1_ssld.distillation.teacher import make_teacher


@dataclass(frozen=True)
class Targets:
    """Where the targets of a run come from.

    Attributes:
        classes: number of classes of the network in training; class_names: their names, where anything says them.
        sources: the sources that take part; train_labels: their labels in the network's class numbers, None where they are not read.
        val_labels: the same for the validation images.
        teacher: a live one; with a store, or with labels as the objective, it only measures agreement.
        store: soft labels written before.
        learns_from_teacher: whether soft labels are the objective.
    """

    classes: int
    class_names: list[str] | None
    sources: list[ImageSource]
    train_labels: list[Labels]
    val_labels: Labels
    teacher: Teacher | None
    store: SoftLabelStore | None
    learns_from_teacher: bool

    def soft_labels(self, pixels_BCHW: Tensor, stored: SoftLabels | None) -> SoftLabels | None:
        """The soft labels of a batch: those that came with it from a store, else the live teacher's; None where labels are the objective."""
        if not self.learns_from_teacher:
            return None
        if stored is not None:
            return stored
        assert self.teacher is not None
        return SoftLabels(self.teacher(pixels_BCHW))

    def facts(self) -> dict[str, Any] | None:
        """What a student's file says about its teacher."""
        if not self.learns_from_teacher:
            return None
        source = self.store or self.teacher
        assert source is not None
        return source.facts()


def open_targets(
    config: DistillConfig | TeachConfig,
    sources: list[ImageSource],
    val_source: ImageSource | None,
    *,
    device: torch.device,
    log: Callable[[str], None],
) -> Targets:
    """Load the teacher or the store and bring all labels to one order of classes.

    Raises:
        UserError: classes that do not fit together, a store of other images, views or another teacher, labels asked for where there are none.
    """
    teacher = store = None
    if isinstance(config, DistillConfig):
        store = SoftLabelStore(config.store) if config.store and config.objective == "teacher" else None
        if config.teacher:
            # Beside a store it must answer as the one that wrote it did.
            precision = store.teacher_precision if store else config.precision
            teacher = make_teacher(
                config.teacher, precision=precision, device=device, channels_last=config.channels_last
            )
    if config.objective == "labels":
        left_out = sum(source.labels is None for source in sources)
        sources, classes, names = labeled_classes(sources, allow_loss=config.data.allow_loss)
        owner = "the training images"
        if left_out:
            log(f"objective labels: {count(left_out, 'unlabelled source')} left out")
        if teacher:
            teacher.match_classes(names, classes, owner)
        wanted = True
    else:
        assert isinstance(config, DistillConfig)
        if store:
            store.match(sources, config.data)
            note = store.note()
            if note:
                log(note)
            if teacher:
                store.check_teacher(teacher)
        source_of_targets = store or teacher
        assert source_of_targets is not None
        classes, names, owner = source_of_targets.num_classes, source_of_targets.class_names, "the teacher"
        wanted = config.hard_label_weight > 0
        if wanted and all(source.labels is None for source in sources):
            raise UserError("hard_label_weight: no training source has labels; leave it at 0")
        if wanted and are_prototypes(names):
            raise UserError("hard_label_weight: no human label is one of the teacher's prototypes; leave it at 0")
    return Targets(
        classes=classes,
        class_names=names,
        sources=sources,
        train_labels=[match_classes(source, names, classes, owner) if wanted else None for source in sources],
        val_labels=match_classes(val_source, names, classes, owner) if val_source else None,
        teacher=teacher,
        store=store,
        learns_from_teacher=config.objective == "teacher",
    )
