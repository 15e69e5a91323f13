"""The teacher that a configuration describes."""

import torch

from ssld.shared.distributed.processes import DTYPES
from ssld.shared.models.teacher import FrozenTeacher, Teacher, TeacherEnsemble
from ssld.stage1_ssld.data_config import TeacherConfig


def make_teacher(
    config: TeacherConfig,
    *,
    precision: str,
    device: torch.device,
    channels_last: bool,
) -> Teacher:
    """Load the teacher and its ensemble.

    Args:
        precision: of its forward pass where `config.precision` does not say it.

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
        )
        for member in (config, *config.ensemble)
    ]
    return TeacherEnsemble(members) if config.ensemble else members[0]
