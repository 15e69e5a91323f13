"""Encoder whose embeddings are clustered, and its teacher file: the encoder with a linear layer on its pooled features.

B images, D features, K prototypes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models import get_model_args
from torch import Tensor, nn

from ssld.shared.distributed.processes import DTYPES
from ssld.shared.errors import UserError
from ssld.shared.models.backbones import (
    Classifier,
    InputSettings,
    create_classifier,
    licence,
    place,
    save_backbone,
    unseen_edge,
)
from ssld.shared.models.constant_outputs import refuse_constant, two_images
from ssld.shared.models.model_file import content_hash
from ssld.shared.models.references import parse_reference
from ssld.shared.models.teacher import embed, reset_head
from ssld.stage1_ssld.config import PrototypesConfig
from ssld.stage1_ssld.data.labels import prototype_names

_TRIED = 2  # classes of the trial head
_DAMAGED = "its weights are damaged, or of another arch"


class Encoder:
    """Frozen timm network: pixels [B,3,S,S] in 0..255 -> pooled features, with its own normalization.

    Attributes:
        size: side S of the views in pixels.
        width: number D of features.
        arch: timm name.
        facts: its reference, hash of its weights and number of classes.
        loaded: a line about the source of its weights.

    Raises:
        UserError: as `parse_reference` and `create_classifier`; an input size or pooling that the network does not support; a network whose
            classifier is not one linear layer on its pooled features, or that timm cannot rebuild from its name and arguments; one that gives the
            same features for every image.
    """

    def __init__(self, config: PrototypesConfig, device: torch.device) -> None:
        self._reference = parse_reference(config.encoder.model, config.encoder.arch, allow_pickle=True)
        torch.manual_seed(config.seed)  # random weights have to be the same on all ranks
        classifier, inputs = create_classifier(self._reference)
        net: Any = classifier.net
        self.loaded = classifier.loaded
        self.facts = {
            "reference": self._reference.text,
            "content_sha256": content_hash(net.state_dict()),
            "classes": int(getattr(net, "num_classes", 0)),
        }
        self._licence = licence(self._reference) or "none: random weights"
        self.arch = self._reference.arch
        self.size = config.image_size or inputs.size[0]
        if inputs.fixed_size and inputs.size != (self.size, self.size):
            _resize(net, self.size, f"image_size: {self.arch}")
            self.loaded = "; ".join([self.loaded, *unseen_edge(net, (self.size, self.size))])
        reset_head(net, _TRIED, config.encoder.global_pool, key="encoder.global_pool", arch=self.arch)
        self._inputs = InputSettings(
            inputs.mean, inputs.std, (self.size, self.size), inputs.interpolation, inputs.fixed_size
        )
        classifier.requires_grad_(False).eval()
        self._model_args = self._checked_args(classifier)
        self.width = int(net.get_classifier().in_features)
        self._classifier = place(classifier, device, channels_last=config.channels_last)
        self._device, self._dtype, self._precision = device, DTYPES[config.precision], config.precision
        if self._reference.pretrained:
            with torch.no_grad():
                outputs_2D = embed(self._classifier, two_images(self.size, self.size, device))
            refuse_constant(outputs_2D, f"encoder.model: {self._reference.text}")

    def settings(self) -> dict[str, Any]:
        """Return what its features depend on: its weights, side of the views in pixels, mean and std (0..1 per channel)."""
        inputs = self._inputs
        weights = str(self.facts["content_sha256"])[:16]
        return {"weights": weights, "size": self.size, "mean": list(inputs.mean), "std": list(inputs.std)}

    def embed(self, pixels_BCHW: Tensor) -> np.ndarray:
        """Pooled features [B,D] float32. Raises UserError if any is NaN or infinite."""
        mixed = self._dtype != torch.float32
        with torch.no_grad(), torch.autocast(self._device.type, self._dtype, enabled=mixed):
            embedding_BD = embed(self._classifier, pixels_BCHW).cpu()
        self._refuse_nan(embedding_BD, "try precision: fp32" if mixed else _DAMAGED)
        return embedding_BD.numpy()

    def save(self, path: Path, weight_KD: np.ndarray, bias_K: np.ndarray, **facts: Any) -> str:
        """Write the teacher file: this network with a linear layer of K classes, `prototype 0` to `prototype K-1`. Returns its content hash."""
        net: Any = self._classifier.net
        tensors = net.state_dict()
        layer = next(name for name, module in net.named_modules() if module is net.get_classifier())
        tensors[f"{layer}.weight"] = torch.from_numpy(weight_KD.astype(np.float32))
        tensors[f"{layer}.bias"] = torch.from_numpy(bias_K.astype(np.float32))
        if self._model_args:
            facts["model_args"] = self._model_args
        return save_backbone(
            path,
            tensors,
            arch=self.arch,
            inputs=self._inputs,
            classes=len(bias_K),
            class_names=prototype_names(len(bias_K)),
            licence=self._licence,
            **facts,
        )

    def _refuse_nan(self, embedding_BD: Tensor, advice: str) -> None:
        if not bool(torch.isfinite(embedding_BD).all()):
            raise UserError(f"encoder.model: {self._reference.text}: its features are NaN; {advice}")

    def _checked_args(self, classifier: Classifier) -> dict[str, Any]:
        """Arguments with which timm rebuilds exactly this network, verified on noise; {} if the arch is enough."""
        net: Any = classifier.net
        noise_BCHW = torch.rand(2, 3, self.size, self.size, generator=torch.Generator().manual_seed(0)) * 255
        with torch.no_grad():
            embedding_BD, head = embed(classifier, noise_BCHW), net.get_classifier()
            self._refuse_nan(embedding_BD, _DAMAGED)
            linear = isinstance(head, nn.Linear) and embedding_BD.shape == (len(noise_BCHW), head.in_features)
            if linear:
                nn.init.normal_(head.weight)  # some arches start from zeros, which would hide differences
            logits_BK = classifier(noise_BCHW)
            if not linear or not torch.allclose(head(embedding_BD), logits_BK, rtol=1e-4, atol=1e-4):
                raise UserError(
                    f"{self.arch}: its classifier is not one linear layer on its pooled features, which prototypes need; use another arch"
                )
            own = {
                name: value for name, value in get_model_args(net).items() if name not in ("num_classes", "in_chans")
            }
            for args in ({}, own):
                try:
                    again = timm.create_model(self.arch, num_classes=_TRIED, **args).eval()
                    again.load_state_dict(net.state_dict())
                    if torch.equal(again(classifier.normalized(noise_BCHW)), logits_BK):
                        return args
                except Exception:  # timm and torch raise many types for other shapes
                    continue
        raise UserError(
            f"{self.arch}: timm cannot rebuild this network from its name, size and pooling; leave image_size and encoder.global_pool out, "
            "or use another arch"
        )


def _resize(net: Any, size: int, what: str) -> None:
    """Change the input size of a network of fixed size through timm, which interpolates position embeddings."""
    if not hasattr(net, "set_input_size"):
        raise UserError(f"{what}: works at its own size only; leave it out")
    try:
        net.set_input_size(img_size=(size, size))
    except Exception as error:  # many types: windows and patches that do not divide the size
        raise UserError(f"{what}: cannot work at {size} pixels ({' '.join(str(error).split())[:120]})") from None
