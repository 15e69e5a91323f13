"""The frozen teacher: a plain object, not a module, so that no optimizer, EMA, DDP wrapper or checkpoint can ever hold it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.backbones import ModelReference, create_classifier, licence, parse_reference, place
from shared.errors import UserError
from shared.model_file import content_hash


class FrozenTeacher:
    """Answers pixels [B,3,H,W] in 0..255 with float32 logits [B,K], without gradients and always in evaluation mode.

    It normalises with its own mean and std, and resizes the pixels where it works at one size only.

    Args:
        reference: see `shared/backbones.py`; pickles are read with `weights_only=True`.
        arch: timm name, for weights that do not say it.
        device: where it runs.
        dtype: of its forward pass, by autocast; float32 switches autocast off.
        size: side in pixels to resize its input to; None takes the pixels as they come, or its own size where that is fixed.

    Raises:
        UserError: as `parse_reference` and `create_classifier`.
    """

    def __init__(
        self,
        reference: str,
        *,
        arch: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        size: int | None = None,
    ) -> None:
        self.reference: ModelReference = parse_reference(reference, arch, allow_pickle=True)
        classifier, inputs = create_classifier(self.reference)
        classifier.requires_grad_(False).eval()
        self._classifier = place(classifier, device, channels_last=channels_last)
        self._dtype, self._device_type = dtype, torch.device(device).type
        self.size = (size, size) if size else inputs.size if inputs.fixed_size else None
        self.num_classes = int(getattr(classifier.net, "num_classes", 0))
        self._order: Tensor | None = None
        self.class_names: list[str] | None = self.reference.metadata.get("class_names")
        if self.num_classes < 2:
            raise UserError(f"{reference}: has {self.num_classes} classes; a teacher needs a classification head")

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(self._device_type, self._dtype, enabled=self._dtype != torch.float32):
            if self.size and tuple(pixels_BCHW.shape[-2:]) != self.size:
                pixels_BCHW = F.interpolate(
                    pixels_BCHW.float(), self.size, mode="bilinear", antialias=True, align_corners=False
                )
            logits: Tensor = self._classifier(pixels_BCHW)
        logits = logits.float()
        return logits if self._order is None else logits[:, self._order.to(logits.device)]

    def content_sha256(self) -> str:
        """Hash of its weights, as in a model file."""
        return content_hash(self._classifier.net.state_dict())

    def match_classes(self, names: list[str] | None, count: int, owner: str) -> None:
        """Answer in the class order of `names` from now on.

        Raises UserError when the teacher has other classes than `owner`, by name where both have names, by count otherwise.
        """
        if names and self.class_names:
            strange = sorted(set(names) ^ set(self.class_names))
            if strange:
                raise UserError(
                    f"{self.reference.text}: its classes are not those of {owner}: only one of them has {strange[0]!r}"
                )
            self._order = torch.tensor([self.class_names.index(name) for name in names])
        elif count != self.num_classes:
            raise UserError(f"{self.reference.text}: has {self.num_classes} classes, {owner} have {count}")

    def facts(self) -> dict[str, Any]:
        """What a student's file says about its teacher."""
        return {
            "reference": self.reference.text,
            "arch": self.reference.arch,
            "licence": licence(self.reference, self._classifier.net) or "unknown",
            "content_sha256": self.content_sha256(),
        }
