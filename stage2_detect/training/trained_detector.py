"""Detector in training: initial weights, moving average, parameter groups, and the detector file."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssld.shared.distributed.ranks import all_ranks, on_main_rank
from ssld.shared.errors import UserError
from ssld.shared.models.backbones import place
from ssld.shared.training.optim import parameter_groups
from ssld.stage2_detect.config import TrainConfig
from ssld.stage2_detect.data.coco import CocoData
from ssld.stage2_detect.data.trained_images import marks_of
from ssld.stage2_detect.detector_file import save_detector
from ssld.stage2_detect.distill_config import DistillConfig, MovingTeacherConfig
from ssld.stage2_detect.distillation.dense import DistilledDense
from ssld.stage2_detect.distillation.moving import SemiSupervised
from ssld.stage2_detect.distillation.rcnn import DistilledRCNN
from ssld.stage2_detect.distillation.teacher import FrozenDetector, open_teacher
from ssld.stage2_detect.models.build import Detector, build_detector
from ssld.stage2_detect.models.freezing import lr_factor_of_parameter, untrained_norms
from ssld.stage2_detect.models.rcnn import RCNN
from ssld.stage2_detect.training import unit_scale
from ssld.stage2_detect.training.body import Body, open_body
from ssld.stage2_detect.training.init_weights import InitWeights, open_init


class TrainedDetector:
    """A detector in training. With a moving teacher, `config` has the burn-in in steps (`TrainConfig.in_steps`).

    Its initial weights are those of `config.init` if given, rows of its heads by class name; else those of the backbone, and random heads. Beside
    published weights (`coco:NAME`) a backbone replaces theirs.

    Attributes:
        detector: the detector that is written to the file.
        model: the module to train: the detector, or the detector with its teacher.
        ema: moving average of the detector, if there is one; a moving teacher is it.
        teacher: teacher detector, if there is one.
        unit_scale: scales of the backbone's maps, by which the initial weights of the pyramid were divided, finest first; None: not divided.
        arch: timm name of the backbone.
        loaded: lines for the log on the loaded weights.

    Raises:
        UserError: see `open_body`, `open_init`, `build_detector` and `open_teacher`; thresholds of unknown classes.
    """

    def __init__(self, config: TrainConfig, data: CocoData, *, device: torch.device) -> None:
        self._config, self._data = config, data
        torch.manual_seed(config.seed)
        options = {"drop_path_rate": config.drop_path} if config.drop_path else {}
        start = open_init(config.init) if config.init else None
        own_body = config.backbone is not None and config.reads_backbone
        if start and not own_body:
            body = start.create_body(**options)
        else:
            body = open_body(str(config.backbone), config.arch, **options)
            if start:
                start.check_body(str(config.backbone), body.arch, body.model_args)
        self.arch, self._inputs, self.loaded = body.arch, body.inputs, [body.loaded]
        self.detector = build_detector(
            config.model,
            classes=len(data.class_names),
            body=body.module,
            arch=self.arch,
            inputs=self._inputs,
            ranks=all_ranks(),
        )
        if start:
            loaded = start.load(self.detector, config.model, data.class_names, keep_body=own_body)
            self.loaded = [*self.loaded, loaded] if own_body else [loaded]
        place(self.detector, device, channels_last=config.channels_last)
        self.unit_scale = self._to_unit_scale(device) if config.unit_scale and not start else None
        ema = config.ema
        self.ema = ModelEmaV3(self.detector, decay=ema.decay, use_warmup=ema.warmup) if ema else None
        self.teacher: FrozenDetector | None = None
        self.model: nn.Module = self.detector
        if config.moving_teacher:
            self.ema, self.model = self._with_moving_teacher(config.moving_teacher)
        if config.distill:
            self.teacher = open_teacher(
                config.distill.teacher,
                data.class_names,
                self.detector.pyramid.strides,
                device=device,
                channels_last=config.channels_last,
            )
            self.model = self._with_teacher(self.teacher, config.distill).to(device)
        self._facts = self._facts_of(body, start)
        self._earlier_marks = start.trained_images if start else ()

    def _facts_of(self, body: Body, start: InitWeights | None) -> dict[str, Any]:
        """Return what the detector file says about the origin of its weights; one licence per source: initial detector, backbone, teacher."""
        config, facts = self._config, self.teacher.facts if self.teacher else {}
        licences = [start.licence if start else "", body.licence, facts.get("licence", "")]
        moving = config.moving_teacher
        return {
            "weights": "ema" if self.ema else "last",
            "backbone": body.origin,
            **({"model_args": body.model_args} if body.model_args else {}),
            "licence": " AND ".join(dict.fromkeys(name for name in licences if name)) or "none: random weights",
            **({"init": str(config.init)} if config.init else {}),
            **({"unit_scale": self.unit_scale} if self.unit_scale else {}),
            **({"teacher": facts} if facts else {}),
            **({"moving_teacher": moving.model_dump(mode="json")} if moving else {}),
        }

    def _to_unit_scale(self, device: torch.device) -> list[float]:
        """Divide the first convolutions by the scale of the backbone's maps; return the scales, equal on every rank."""
        config = self._config

        def measure() -> list[float]:
            images = unit_scale.sample_images(self._data, config.resize, config.augment, config.seed)
            return unit_scale.measure(self.detector, images.to(device), self.arch)

        scales = on_main_rank(measure)
        self.detector.pyramid.divide_inputs(scales)
        return scales

    def _with_teacher(self, teacher: FrozenDetector, distill: DistillConfig) -> DistilledRCNN | DistilledDense:
        """Return the detector with its teacher and the losses between them."""
        model = self._config.model
        maps = {
            "pkd_weight": distill.pkd(model),
            "cwd_weight": distill.cwd_weight,
            "cwd_temperature": distill.cwd_temperature,
        }
        if isinstance(self.detector, RCNN):
            return DistilledRCNN(
                self.detector, teacher, roi_weight=distill.roi(model), temperature=distill.temperature, **maps
            )
        terms = distill.head_terms(model)
        assert terms is not None, f"DistillConfig.head_terms has no losses for {model.kind}"
        return DistilledDense(self.detector, teacher, terms, cwd_class_weight=distill.cwd_class_weight, **maps)

    def _with_moving_teacher(self, moving: MovingTeacherConfig) -> tuple[ModelEmaV3, SemiSupervised]:
        """Return the average of the detector, which is a copy of it until the burn-in ends, and the detector under it."""
        names, model = self._data.class_names, self._config.model
        if strange := sorted(set(moving.class_thresholds) - set(names)):
            raise UserError(
                f"moving_teacher.class_thresholds: {strange[0]!r} is no class of the training annotations ({', '.join(names)})"
            )
        ema = ModelEmaV3(
            self.detector,
            decay=moving.ema_decay,
            use_warmup=moving.ema_decay < 1,
            update_after_step=int(moving.burn_in),
        )
        thresholds_K = torch.tensor([moving.class_thresholds.get(name, moving.threshold(model)) for name in names])
        return ema, SemiSupervised(self.detector, FrozenDetector(ema.module), moving, thresholds_K)

    @property
    def measured(self) -> dict[str, torch.Tensor]:
        """Numbers about a moving teacher in the last forward pass, equal on every rank; empty without one, and in its burn-in."""
        return self.model.measured if isinstance(self.model, SemiSupervised) else {}

    @property
    def evaluated(self) -> Detector:
        """The network to evaluate and export: the moving average if there is one, else the detector."""
        model: Detector = self.ema.module if self.ema else self.detector
        return model

    def networks(self) -> dict[str, nn.Module]:
        """Return the networks of a checkpoint, without the teacher."""
        networks: dict[str, nn.Module] = {"model": self.detector}
        if self.ema:
            networks["ema"] = self.ema.module
        if isinstance(self.model, DistilledRCNN | DistilledDense) and len(self.model.maps.adapters):
            networks["adapters"] = self.model.maps.adapters
        return networks

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups by learning-rate factor and weight decay; the adapters for a teacher have factor 1."""
        optim = self._config.optim
        decay: dict[str, Any] = {
            "weight_decay": optim.weight_decay,
            "decay_norm_and_bias": optim.decay_norm_and_bias,
        }
        factors = lr_factor_of_parameter(self.detector.pyramid.body, optim.backbone_lr_factors)
        factors = {f"pyramid.body.{name}": factor for name, factor in factors.items()}
        factors |= self._divided_factors()
        groups = parameter_groups(self.detector, lr_factor=lambda name: factors.get(name, 1.0), **decay)
        if isinstance(self.model, DistilledRCNN | DistilledDense):
            groups += parameter_groups(self.model.maps.adapters, **decay)
        return groups

    def _divided_factors(self) -> dict[str, float]:
        """Return the learning-rate factors of the weights that `unit_scale` has divided."""
        scales = self.unit_scale
        return unit_scale.lr_factors(self.detector, scales, self._config.optim.name) if scales else {}

    def preview(self) -> Iterator[str]:
        """Yield lines for the log on the weights, the parameters and the teacher."""
        config = self._config
        yield from self.loaded
        if config.backbone and not config.reads_backbone:
            yield f"backbone: {config.backbone} is unused, since init has a backbone"
        if self.unit_scale:
            yield unit_scale.describe(self.detector, self.unit_scale)
        total = sum(parameter.numel() for parameter in self.detector.parameters())
        groups = [(group["lr_factor"], sum(p.numel() for p in group["params"])) for group in self.parameter_groups()]
        trainable = sum(count for _, count in groups)
        yield f"{config.model.kind} on {self.arch}: {trainable / 1e6:.2f} M of {total / 1e6:.2f} M parameters train"
        divided = self._divided_factors().values()
        if len(factors := sorted({factor for factor, _ in groups if factor not in divided})) > 1:
            sums = [f"x{f:g} {sum(n for g, n in groups if g == f) / 1e6:.2f} M" for f in factors]
            yield f"learning-rate factors: {', '.join(sums)}"
        body = self.detector.pyramid.body
        if config.model.freeze_norm and not any(isinstance(module, _BatchNorm) for module in body.modules()):
            yield f"model.freeze_norm: {self.arch} has no BatchNorm, so there is nothing to freeze"
        if config.freezes_random_norms and (warning := untrained_norms(body, str(config.backbone))):
            yield warning
        if unread := config.model.unread:
            yield f"{', '.join(f'model.{name}' for name in unread)}: unused by kind: {config.model.kind}"
        if config.moving_teacher:
            yield self._describe_moving(config.moving_teacher)
        if config.distill and self.teacher:
            facts = self.teacher.facts
            assert isinstance(self.model, DistilledRCNN | DistilledDense)
            terms = self.model.weights()
            weights = ", ".join(f"{name} x{weight:g}" for name, weight in terms.items() if weight)
            yield f"teacher {facts['file']} ({facts['kind']} on {facts['arch']}): {weights}"

    def _describe_moving(self, moving: MovingTeacherConfig) -> str:
        model = self._config.model
        what = f"{moving.dense_loss} loss at all anchors, boxes at {100 * moving.dense_share:g} % of them"
        if not model.is_dense:
            sides = (
                f"sides where {moving.box_jitter} copies spread below {moving.box_spread:g}"
                if moving.box_jitter
                else "all sides"
            )
            classes = "the teacher's class probabilities" if moving.soft else "their classes"
            masks = ", masks of labeled images alone" if model.has_masks else ""
            what = f"pseudo-boxes from score {moving.threshold(model):g}, {classes}, {sides}{masks}"
        return (
            f"moving teacher: a copy until step {moving.burn_in}, then an average with decay up to {moving.ema_decay:g}, evaluated and exported; "
            f"losses on unlabeled images x{moving.unlabeled_weight(dense=model.is_dense):g}: {what}"
        )

    @cached_property
    def _marks(self) -> list[str]:
        """Marks of the training images, and of those of the detector that the run starts from."""
        return sorted({*self._earlier_marks, *marks_of(self._data.images)})

    def save(self, path: Path, **facts: Any) -> None:
        """Write the detector file, with `facts` in its metadata."""
        save_detector(
            path,
            self.evaluated,
            config=self._config.model,
            resize=self._config.resize,
            arch=self.arch,
            inputs=self._inputs,
            data=self._data,
            trained_images=self._marks,
            **self._facts,
            **facts,
        )
