"""A batch of a training step: its views on the device, what student and teacher make of them, and the losses.

The loop in `distill.py` makes one for each micro-batch and calls backward on its loss.

B images, K classes of the student.
"""

import torch
from torch import Tensor, nn

from ssld.shared.distributed.processes import to_device
from ssld.shared.models.teacher import TeacherFeatures
from ssld.stage1_ssld.data.batch import Batch
from ssld.stage1_ssld.data.mixing import mix_batch
from ssld.stage1_ssld.data.soft_labels import SoftLabels
from ssld.stage1_ssld.data_config import DataConfig
from ssld.stage1_ssld.distillation.losses import entropy
from ssld.stage1_ssld.distillation.objective import Objective, implausible_start
from ssld.stage1_ssld.distillation.student import Student
from ssld.stage1_ssld.distillation.targets import Targets


class ForwardPass:
    """One batch, moved to the device and mixed; `losses` runs the networks, the other methods describe its last call.

    Attributes:
        pixels_BCHW: views that the student and a live teacher see: uint8, float32 where they are mixed; 0..255.
        soft: the teacher's soft labels; None before `losses`, and where no loss term compares logits.

    Args:
        batch: images of the micro-batch, in host memory.
        data: settings of mixup and cutmix.
        student: the trained network.
        targets: the teacher, the store or the labels that it learns from.
        objective: the loss terms.
        device: where the networks are.
        seed: seed of the mixing and of drop-path; the pass is then the same in a resumed run.
    """

    def __init__(
        self,
        batch: Batch,
        data: DataConfig,
        student: Student,
        targets: Targets,
        objective: Objective,
        *,
        device: torch.device,
        seed: int,
    ) -> None:
        self._student, self._targets, self._objective, self._seed = student, targets, objective, seed
        pixels_BCHW, self._labels_B = to_device(batch.pixels_BCHW, device), to_device(batch.labels_B, device)
        self._stored = batch.soft.to(device) if batch.soft else None
        self._mixed = mix_batch(pixels_BCHW, data, seed)
        self.pixels_BCHW = self._mixed.pixels_BCHW if self._mixed else pixels_BCHW
        self.soft: SoftLabels | None = None
        self._features: TeacherFeatures | None = None
        self._logits_BK: Tensor | None = None

    def losses(self, model: nn.Module) -> dict[str, Tensor]:
        """Run the student, and at the first call the teacher; return `loss` and its terms, summed over the batch: see `Objective`.

        Args:
            model: the student's `learner`, as it is prepared for several processes.
        """
        torch.manual_seed(self._seed)
        first = self._logits_BK is None
        logits_BK, predictions = model(self.pixels_BCHW)
        self._logits_BK = logits_BK.detach()
        if first:
            self.soft, self._features = self._targets.for_batch(self.pixels_BCHW, self._stored)
        heads = self._student.heads
        pairs = heads.pairs(predictions, self._features) if heads and self._features else None
        return self._objective(logits_BK, self.soft, self._labels_B, self._mixed, pairs)

    def hits(self) -> dict[str, Tensor]:
        """Number of images whose most likely class is the teacher's (`agreement`), or the label where there is no teacher (`accuracy`); empty without
        classes.
        """
        if not self._targets.classes:
            return {}
        name, expected_B = ("accuracy", self._labels_B) if self.soft is None else ("agreement", self.soft.first_B)
        return {name: (self._logits().argmax(-1) == expected_B).sum()}

    def entropies(self) -> Tensor:
        """Entropies of the soft labels and of the student's predictions on the same classes, summed over the batch: [2], in nats; 0 without soft
        labels.
        """
        if self.soft is None:
            return torch.zeros(2, device=self.pixels_BCHW.device)
        return torch.stack([entropy(self.soft.logits_BM), entropy(self.soft.comparable(self._logits()))])

    def doubt(self) -> str | None:
        """Return a warning if the terms that compare logits are implausible before the first update: see `implausible_start`."""
        if self.soft is None:
            return None
        logits_BK = self._logits()
        first, uniform = (
            self._objective(logits, self.soft, self._labels_B, self._mixed)["loss"]
            for logits in (logits_BK, torch.zeros_like(logits_BK))
        )
        return implausible_start(first, uniform, len(logits_BK))

    def _logits(self) -> Tensor:
        assert self._logits_BK is not None, "losses() comes first"
        return self._logits_BK
