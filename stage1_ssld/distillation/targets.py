"""Training targets: a live teacher, a store of soft labels, or human labels; and the classes of the network that follow from them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.shared.models.teacher import Teacher, TeacherFeatures
from ssld.shared.wording import count
from ssld.stage1_ssld.config import DistillConfig, TeachConfig
from ssld.stage1_ssld.data.labels import are_prototypes, labeled_classes, match_classes
from ssld.stage1_ssld.data.loaders import Labels
from ssld.stage1_ssld.data.soft_labels import SoftLabels
from ssld.stage1_ssld.data.sources import ImageSource
from ssld.stage1_ssld.data_config import LossConfig
from ssld.stage1_ssld.distillation.soft_label_store import SoftLabelStore
from ssld.stage1_ssld.distillation.teacher import make_teacher


@dataclass(frozen=True)
class Targets:
    """Where the targets of a run come from.

    Attributes:
        classes: number of classes of the network in training, 0 where nothing trains a classifier.
        class_names: their names, where anything says them.
        sources: the sources that take part; train_labels: their labels in the network's class numbers, None where they are not read.
        val_labels: the same for the validation images.
        teacher: a live one; with a store, or with labels as the objective, it only measures agreement.
        store: soft labels written before.
        learns_from_teacher: whether the teacher is the objective, not labels.
        features: the terms of the loss that compare features; soft: whether others compare answers in classes.
    """

    classes: int
    class_names: list[str] | None
    sources: list[ImageSource]
    train_labels: list[Labels]
    val_labels: Labels
    teacher: Teacher | None
    store: SoftLabelStore | None
    learns_from_teacher: bool
    features: tuple[LossConfig, ...]
    soft: bool

    def answers(
        self, pixels_BCHW: Tensor, stored: SoftLabels | None
    ) -> tuple[SoftLabels | None, TeacherFeatures | None]:
        """The soft labels of a batch, those that came with it from a store or the live teacher's, and its features: each None where no term asks
        for it."""
        if not self.learns_from_teacher:
            return None, None
        if stored is not None:
            return stored, None
        assert self.teacher is not None
        if not self.features:
            return SoftLabels(self.teacher(pixels_BCHW)), None
        taught = self.teacher.features(pixels_BCHW, maps=any(term.name == "spatial" for term in self.features))
        return SoftLabels(taught.logits_BK) if self.soft and taught.logits_BK is not None else None, taught

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
    features: tuple[LossConfig, ...] = ()
    soft = False
    if isinstance(config, DistillConfig):
        if config.objective == "teacher":
            features = tuple(term for term in config.losses if term.of_features)
            soft = len(features) < len(config.losses)
        store = SoftLabelStore(config.store) if config.store and config.objective == "teacher" else None
        if config.teacher:
            # Beside a store it must answer as the one that wrote it did.
            precision = store.teacher_precision if store else config.precision
            teacher = make_teacher(
                config.teacher,
                precision=precision,
                device=device,
                channels_last=config.channels_last,
                classes=soft or config.objective == "labels",
            )
    if config.objective == "labels":
        left_out = sum(source.labels is None for source in sources)
        sources, classes, names = labeled_classes(sources, allow_loss=config.data.allow_loss)
        owner = "the training images"
        if left_out:
            log(f"objective labels: {count(left_out, 'unlabeled source')} left out")
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
        if wanted and classes < 2:
            raise UserError(
                f"hard_label_weight: labels are of no classes of {source_of_targets.facts()['reference']}, which has none; leave it at 0"
            )
        if not config.learns_classes:
            classes, names = 0, None
        if wanted and all(source.labels is None for source in sources):
            raise UserError("hard_label_weight: no training source has labels; leave it at 0")
        if wanted and are_prototypes(names):
            raise UserError("hard_label_weight: no human label is one of the teacher's prototypes; leave it at 0")
    return Targets(
        classes=classes,
        class_names=names,
        sources=sources,
        train_labels=[match_classes(source, names, classes, owner) if wanted else None for source in sources],
        val_labels=match_classes(val_source, names, classes, owner) if val_source and classes else None,
        teacher=teacher,
        store=store,
        learns_from_teacher=config.objective == "teacher",
        features=features,
        soft=soft,
    )
