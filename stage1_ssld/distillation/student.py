"""The network in training: its trained parameters, moving average and backbone file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.optim import param_groups_layer_decay
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
        model: the trained classifier: pixels [B,3,H,W] in 0..255 -> logits [B,K].
        heads: trained heads on its features, where loss terms compare features; otherwise None.
        learner: model and heads as one module.
        ema: moving average of the model, or None.
        inputs: image size, mean and standard deviation, interpolation.
        unreached: number of parameters that no loss term depends on; they are frozen.

    Args:
        network: reference and settings of the network.
        classes: number of classes, 0 for a network without a classifier.
        features: loss terms that compare features.
        teacher: the teacher whose features they compare.

    Raises:
        UserError: see `parse_reference`, `create_classifier` and `FeatureHeads`; `trainable: classifier` for a network without a classifier layer.
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
        torch.manual_seed(self._seed)  # for random weights, and for a new classification layer
        return create_classifier(self._reference, num_classes=self.classes, **self._options)

    @property
    def began_trained(self) -> bool:
        """Whether the initial weights are trained ones, as far as its reference tells."""
        return self._reference.pretrained or self._reference.file is not None

    @property
    def starts_with_head(self) -> bool:
        """Whether it starts from trained weights that include its classification layer, and BatchNorm normalizes them by batch statistics."""
        return self.began_trained and not self.model.new_head and self.uses_batch_statistics()

    def start(self) -> dict[str, Tensor]:
        """State dict of timm's model before training. A classification layer that was new then is replaced by the trained one."""
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
        """The network that is evaluated and exported: the moving average where there is one."""
        model: Classifier = self.ema.module if self.ema else self.model
        return model

    def networks(self) -> dict[str, nn.Module]:
        """Modules of a checkpoint by name."""
        networks: dict[str, nn.Module] = {"model": self.model.net}
        if self.ema:
            networks["ema"] = self.ema.module.net
        if self.heads:
            networks["heads"] = self.heads
        return networks

    def train_mode(self) -> None:
        """Set training mode; a frozen body stays in evaluation mode, and so does BatchNorm with `batchnorm: eval`."""
        self.model.train(not self._classifier_only)
        if self._keeps_statistics:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def lr_factors(self, layer_decay: float) -> dict[str, float]:
        """Learning-rate factors by parameter name of `learner`: `layer_decay` to the power of the number of layers above, 1 at the top and in heads.

        timm groups the parameters into layers (BEiT's scheme, Bao et al. 2021, arXiv 2106.08254).
        """
        factors = {
            id(parameter): float(group["lr_scale"])
            for group in param_groups_layer_decay(self.model.net, layer_decay=layer_decay)
            for parameter in group["params"]
        }
        return {name: factors.get(id(parameter), 1.0) for name, parameter in self.learner.named_parameters()}

    def uses_batch_statistics(self) -> bool:
        """Whether BatchNorm normalizes by batch statistics in training, for which one image is not enough."""
        fixed = self._classifier_only or self._keeps_statistics
        return not fixed and any(isinstance(module, _BatchNorm) for module in self.model.modules())

    def licence_under(self, teacher: dict[str, str] | None) -> str:
        """Return the licences of the initial weights and of the teacher's weights (its facts), joined."""
        names = [licence(self._reference), teacher["licence"] if teacher else None]
        return " AND ".join(dict.fromkeys(name for name in names if name)) or "none: random weights, no teacher"

    def save(self, path: Path, **facts: Any) -> None:
        """Write the backbone file with `facts` in its metadata."""
        net = self.evaluated.net
        facts |= {"weights": "ema" if self.ema else "last", "start": self.name}
        if self.model.args:
            facts["model_args"] = self.model.args
        save_backbone(path, net, arch=self._reference.arch, inputs=self.inputs, classes=self.classes, **facts)

    def _freeze_unreached(self) -> int:
        """Freeze parameters that no loss term depends on, such as layers after the last compared map: data-parallel training would wait for their
        gradients. Returns their number.
        """
        self.learner.eval()
        noise_BCHW = torch.rand(2, 3, *self.inputs.size, device=self.model.mean_3.device) * 255
        logits_BK, predictions = self.learner(noise_BCHW)
        outputs = [logits_BK, *(one for ones in predictions.values() for one in ones)]
        total = torch.stack([one.float().sum() for one in outputs]).sum()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        unreached = 0
        for parameter, gradient in zip(trained, torch.autograd.grad(total, trained, allow_unused=True), strict=True):
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
