"""The network in training: what of it learns, its moving average, and the backbone file it becomes."""

from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssld.shared.errors import UserError
from ssld.shared.models.backbones import (
    Classifier,
    InputSettings,
    create_classifier,
    licence,
    place,
    save_backbone,
)
from ssld.shared.models.references import parse_reference
from ssld.stage1_ssld.config import Stage1Config
from ssld.stage1_ssld.data_config import NetworkConfig


class Student:
    """A classifier in training.

    Attributes:
        model: pixels [B,3,H,W] in 0..255 -> logits [B,K]; what the optimizer changes.
        ema: its moving average, if there is one.
        inputs: how it wants its images.

    Raises:
        UserError: see `parse_reference` and `create_classifier`; or a network without a classifier of its own, where only that is to be trained.
    """

    def __init__(self, network: NetworkConfig, config: Stage1Config, *, classes: int, device: torch.device) -> None:
        self._reference = parse_reference(network.model, network.arch)
        self.name, self.classes, self._seed = network.model, classes, config.seed
        size, data = config.data.image_size, config.data
        self._options: dict[str, Any] = {"drop_path": network.drop_path, "image_size": size}
        self.model, inputs = self._create()
        self.inputs = InputSettings(inputs.mean, inputs.std, (size, size), data.interpolation, inputs.fixed_size)
        self._classifier_only = config.trainable == "classifier"
        if self._classifier_only:
            self._freeze_body()
        place(self.model, device, channels_last=config.channels_last)
        self.ema = ModelEmaV3(self.model, decay=config.ema.decay, use_warmup=config.ema.warmup) if config.ema else None

    def _create(self) -> tuple[Classifier, InputSettings]:
        torch.manual_seed(self._seed)  # of a classifier with other classes than the file's, and of random weights
        return create_classifier(self._reference, num_classes=self.classes, **self._options)

    @property
    def began_trained(self) -> bool:
        """Whether it began with trained weights, as far as its reference tells."""
        return self._reference.pretrained or self._reference.file is not None

    def start(self) -> dict[str, Tensor]:
        """The state dict of timm's model before training."""
        return dict(self._create()[0].net.state_dict())

    @property
    def evaluated(self) -> Classifier:
        """What is evaluated and exported: the average where there is one."""
        model: Classifier = self.ema.module if self.ema else self.model
        return model

    def networks(self) -> dict[str, nn.Module]:
        """What a checkpoint holds."""
        return {"model": self.model.net} | ({"ema": self.ema.module.net} if self.ema else {})

    def train_mode(self) -> None:
        """Before a step. With a frozen body everything stays in evaluation mode: its BatchNorm keeps the statistics it was trained with."""
        self.model.train(not self._classifier_only)

    def uses_batch_statistics(self) -> bool:
        """Whether it trains on statistics of the batch, which one image does not have."""
        return not self._classifier_only and any(isinstance(module, _BatchNorm) for module in self.model.modules())

    def licence(self) -> str | None:
        """Licence of the weights it started from; None for random ones."""
        return licence(self._reference)

    def save(self, path: Path, **facts: Any) -> None:
        """Write the backbone file; `facts` go to its metadata."""
        net = self.evaluated.net
        facts |= {"weights": "ema" if self.ema else "last", "start": self.name}
        if self.model.args:
            facts["model_args"] = self.model.args
        save_backbone(path, net, arch=self._reference.arch, inputs=self.inputs, classes=self.classes, **facts)

    def _freeze_body(self) -> None:
        net: Any = self.model.net
        head = net.get_classifier()
        if not isinstance(head, nn.Module) or not list(head.parameters()):
            raise UserError(f"{self.name}: has no classifier layer of its own; set trainable: all")
        self.model.requires_grad_(False)
        head.requires_grad_(True)
