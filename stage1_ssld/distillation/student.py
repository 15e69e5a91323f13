"""The network in training: what of it learns, its moving average, and the backbone file it becomes."""

from collections.abc import Sequence
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
from ssld.shared.models.teacher import Teacher
from ssld.stage1_ssld.config import Stage1Config
from ssld.stage1_ssld.data_config import LossConfig, NetworkConfig
from ssld.stage1_ssld.distillation.features import FeatureHeads, Learner


class Student:
    """A classifier in training.

    Attributes:
        model: pixels [B,3,H,W] in 0..255 -> logits [B,K]; what the optimizer changes.
        heads: on its features, where terms of the loss compare them with those of `teacher`.
        learner: model and heads, whose forward pass is trained.
        ema: its moving average, if there is one.
        inputs: how it wants its images.

    Args:
        features: the terms of the loss that compare features.
        teacher: the one whose features these are.

    Raises:
        UserError: see `parse_reference` and `create_classifier`; or a network without a classifier of its own, where only that is to be trained; or
            see `FeatureHeads`.
    """

    def __init__(
        self,
        network: NetworkConfig,
        config: Stage1Config,
        *,
        classes: int,
        class_names: Sequence[str] | None = None,
        device: torch.device,
        features: Sequence[LossConfig] = (),
        teacher: Teacher | None = None,
    ) -> None:
        self._reference = parse_reference(network.model, network.arch)
        self.name, self.classes, self._seed = network.model, classes, config.seed
        size, data = config.data.image_size, config.data
        self._options: dict[str, Any] = {
            "class_names": class_names,
            "drop_path": network.drop_path,
            "image_size": size,
        }
        self.model, inputs = self._create()
        self.inputs = InputSettings(inputs.mean, inputs.std, (size, size), data.interpolation, inputs.fixed_size)
        self._classifier_only = config.trainable == "classifier"
        self._keeps_statistics = network.batchnorm == "eval"
        if self._classifier_only:
            self._freeze_body()
        place(self.model, device, channels_last=config.channels_last)
        self.heads = None
        if features:
            assert teacher is not None
            self.heads = FeatureHeads(features, self.model, teacher, size=size, name=self.name)
        self.learner = Learner(self.model, self.heads)
        self.unreached = self._freeze_unreached() if self.heads else 0
        self.ema = ModelEmaV3(self.model, decay=config.ema.decay, use_warmup=config.ema.warmup) if config.ema else None

    def _create(self) -> tuple[Classifier, InputSettings]:
        torch.manual_seed(self._seed)  # of a classifier with other classes than the file's, and of random weights
        return create_classifier(self._reference, num_classes=self.classes, **self._options)

    @property
    def began_trained(self) -> bool:
        """Whether it began with trained weights, as far as its reference tells."""
        return self._reference.pretrained or self._reference.file is not None

    def start(self) -> dict[str, Tensor]:
        """The state dict of timm's model before training; of a classification layer that was new then, and had learned nothing, that of now."""
        model, evaluated = self._create()[0], self.evaluated
        net: Any = model.net
        now_net: Any = evaluated.net
        heads, trained = net.get_classifier(), now_net.get_classifier()
        for head, now in zip(*(one if isinstance(one, tuple) else (one,) for one in (heads, trained)), strict=True):
            if model.new_head and isinstance(head, nn.Module):
                head.load_state_dict(now.state_dict())
        return {name: tensor.clone() for name, tensor in model.net.state_dict().items()}

    @property
    def evaluated(self) -> Classifier:
        """What is evaluated and exported: the average where there is one."""
        model: Classifier = self.ema.module if self.ema else self.model
        return model

    def networks(self) -> dict[str, nn.Module]:
        """What a checkpoint holds."""
        networks: dict[str, nn.Module] = {"model": self.model.net}
        if self.ema:
            networks["ema"] = self.ema.module.net
        if self.heads:
            networks["heads"] = self.heads
        return networks

    def train_mode(self) -> None:
        """Before a step. With a frozen body everything stays in evaluation mode: its BatchNorm keeps the statistics it was trained with."""
        self.model.train(not self._classifier_only)
        if self._keeps_statistics:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def uses_batch_statistics(self) -> bool:
        """Whether it trains on statistics of the batch, which one image does not have."""
        fixed = self._classifier_only or self._keeps_statistics
        return not fixed and any(isinstance(module, _BatchNorm) for module in self.model.modules())

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

    def _freeze_unreached(self) -> int:
        """Take out of training what no term of the loss depends on, such as layers after the last map that is compared: data-parallel training would
        wait for their gradients. Returns the number of these parameters.
        """
        self.learner.eval()
        noise_BCHW = torch.rand(2, 3, *self.inputs.size, device=self.model.mean_3.device) * 255
        logits_BK, said = self.learner(noise_BCHW)
        total = (
            torch.stack([one.float().sum() for ones in said.values() for one in ones]).sum() + logits_BK.float().sum()
        )
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        unreached = 0
        for parameter, gradient in zip(learning, torch.autograd.grad(total, learning, allow_unused=True), strict=True):
            if gradient is None:
                parameter.requires_grad_(False)
                unreached += parameter.numel()
        return unreached

    def _freeze_body(self) -> None:
        net: Any = self.model.net
        head = net.get_classifier()
        if not isinstance(head, nn.Module) or not list(head.parameters()):
            raise UserError(f"{self.name}: has no classifier layer of its own; set trainable: all")
        self.model.requires_grad_(False)
        head.requires_grad_(True)
