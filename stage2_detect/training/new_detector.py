"""A new detector for your own training loop: a backbone with random heads, and its detector file.

`train.py` does not use it: there settings and classes come from the run's configuration and annotations (`trained_detector.py`).
"""

import json
import operator
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast, get_args

from torch import Tensor, nn

from ssld.shared.config.validation import validate
from ssld.shared.config.yaml_files import merge, read_recipe, recipe_file
from ssld.shared.errors import UserError
from ssld.shared.wording import printable
from ssld.stage2_detect.config import RECIPES, ResizeConfig
from ssld.stage2_detect.data.coco import CocoData
from ssld.stage2_detect.detector_file import save_detector
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models import build
from ssld.stage2_detect.models.batch import Detections, ImageBatch, Targets
from ssld.stage2_detect.models.freezing import untrained_norms
from ssld.stage2_detect.training import unit_scale
from ssld.stage2_detect.training.body import open_body

_RESERVED = {
    *("format", "kind", "arch", "timm_version", "class_names", "category_ids", "mean", "std", "model", "resize"),
    *("backbone", "model_args", "content_sha256", "metadata_sha256", "config", "inputs", "data", "unit_scale"),
    "trained_images",
}
"""metadata keys of a detector file, and arguments of `save_detector`, that are no facts of one's own"""
KINDS: tuple[str, ...] = get_args(DetectorConfig.model_fields["kind"].annotation)


class NewDetector(nn.Module):
    """A detector with its classes and image sizes, in training mode; `build_detector` makes it.

    `detector(images, targets)` returns the losses in training mode, `detector(images)` the detections in evaluation mode. Its parameters, devices
    and modes are those of any module. Under `DistributedDataParallel` the losses are normalized per process.

    Attributes:
        model: R-CNN or one-stage detector.
        class_names: one name per class.
        config: architecture, as in the recipes' group `model`.
        resize: image sizes, as in the recipes' group `resize`; `load_detector(FILE).predict` resizes to them.
        loaded: a line on the origin of the backbone's weights; a second one warns of random weights whose BatchNorm layers are frozen.
    """

    def __init__(
        self,
        backbone: str,
        arch: str | None,
        *,
        config: DetectorConfig,
        resize: ResizeConfig,
        class_names: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.config, self.resize, self.class_names = config, resize, class_names
        body = open_body(backbone, arch)
        self._arch, self._inputs, self.loaded = body.arch, body.inputs, printable(body.loaded)
        if (
            backbone.startswith("random:")
            and config.freeze_norm
            and (warning := untrained_norms(body.module, backbone))
        ):
            self.loaded += f"\n{warning}"
        self._facts: dict[str, Any] = {
            "backbone": body.origin,
            "licence": body.licence or "none: random weights",
            **({"model_args": body.model_args} if body.model_args else {}),
        }
        self.model = build.build_detector(
            config, classes=len(class_names), body=body.module, arch=self._arch, inputs=self._inputs
        )

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | list[Detections]:
        """Return losses by name (float32 scalars, their sum is minimized) in training mode, the detections of each image in evaluation mode.

        Args:
            images: a padded uint8 batch, as `stage2_detect/data/padding.py: pad_images` makes it; normalized inside.
            targets: boxes [B, G, 4] as (x1, y1, x2, y2) in pixels of the batch, labels [B, G] in 0..K-1, as `pad_targets` makes them.
        """
        output: dict[str, Tensor] | list[Detections] = self.model(images, targets)
        return output

    def unit_scale(self, images: ImageBatch) -> list[float]:
        """Divide the initial weights of the FPN's lateral convolutions by the scale of the backbone's maps.

        `ssld train --unit_scale true` also divides their learning rate, by the scale's square (AdamW: by the scale), which is left to your optimizer.

        Call it once, before training, for a backbone whose maps are far from unit scale (EfficientNet-Lite0's are at 7): at a usual learning rate the
        training would diverge.

        Args:
            images: about eight training images, on the detector's device.

        Returns:
            The root mean square of each map, finest first; `save` writes it to the file.

        Raises:
            UserError: it was called before, or a map is zero everywhere or not finite.
        """
        if "unit_scale" in self._facts:
            raise UserError("unit_scale: the weights are divided already; call it once")
        scales = unit_scale.measure(self.model, images, self._arch)
        self.model.pyramid.divide_inputs(scales)
        self._facts["unit_scale"] = scales
        return scales

    def save(self, path: str | Path, **facts: Any) -> str:
        """Write a detector file, which `load_detector` and the commands read, and return its content hash.

        `facts` (such as `step=100`) go to the file's metadata. The category ids are 1..K.

        Raises:
            UserError: `facts` with a key that the file itself sets or a value that JSON does not have, or a path that is a folder.
        """
        if reserved := sorted(facts.keys() & _RESERVED):
            raise UserError(f"save: {', '.join(reserved)}: set by the detector itself; give it another name")
        try:
            json.dumps(facts)
        except (TypeError, ValueError) as error:
            raise UserError(f"save: {error}; give facts as numbers, text, lists and dicts") from None
        if Path(path).is_dir():
            raise UserError(
                f"{path}: is a folder; give the name of a file, such as {Path(path) / 'detector.safetensors'}"
            )
        ids = tuple(range(1, len(self.class_names) + 1))
        data = CocoData(str(path), training=True, class_names=self.class_names, category_ids=ids, images=[])
        return save_detector(
            Path(path),
            self.model,
            config=self.config,
            resize=self.resize,
            arch=self._arch,
            inputs=self._inputs,
            data=data,
            **self._facts | facts,
        )


def build_detector(
    recipe: str | Path = "faster_rcnn",
    *,
    backbone: str | Path,
    classes: int | Sequence[str],
    arch: str | None = None,
    **settings: Any,
) -> NewDetector:
    """Build a detector for your own training loop: a backbone with its weights, a feature pyramid and random heads.

        detector = ssld.build_detector("faster_rcnn", backbone="runs/mine/student.safetensors", classes=["cat", "dog"])
        losses = detector(images, targets)
        sum(losses.values()).backward()

    Args:
        recipe: `faster_rcnn`, `mask_rcnn`, `cascade_rcnn`, `cascade_mask_rcnn`, `gfl` or `retinanet` with default settings; or the name of a recipe
            in `stage2_detect/configs`, or a YAML file, of which the groups `model` and `resize` count.
        backbone: backbone file, folder, `timm:NAME`, `hf-hub:ORG/NAME` or `random:NAME`; its network has maps of stride 4, 8, 16 and 32.
        classes: number of classes without background, or their names.
        arch: timm's name of the network, for a file that does not say it.
        **settings: settings of the group `model`, such as `freeze_norm=False`, which a backbone with random weights needs.

    Returns:
        A module in training mode; `detector.save(FILE)` writes what `ssld.load_detector` reads.

    Raises:
        UserError: an unknown recipe, kind or setting, `kind` beside a recipe that is a kind, a YAML file without a group `model`, a backbone that
            does not load or has no such maps, or classes that are neither a number from 1 on nor a list of different names.
    """
    names = _class_names(classes)
    if not isinstance(backbone, str | Path):
        raise UserError(
            f"backbone: a reference is needed, such as timm:resnet50d or a backbone file (given: {backbone!r})"
        )
    if not isinstance(recipe, str | Path):
        raise UserError(f"recipe: expected the name of a kind or recipe, or a YAML file (given: {recipe!r})")
    if str(recipe) in KINDS:
        if "kind" in settings:
            raise UserError(
                f"kind: {recipe} is already named as the first argument; leave kind={settings['kind']!r} out"
            )
        values: dict[str, Any] = {"model": {"kind": str(recipe)}}
    else:
        values = read_recipe(file := recipe_file(recipe, RECIPES, KINDS))
        if not isinstance(values.get("model"), dict):
            raise UserError(f"{file}: has no group `model`, which a detector is built from; give a recipe of stage 2")
    model = merge(values["model"], settings)
    config = validate(DetectorConfig, model, source=f"model of {recipe}", call=True)
    resize = validate(ResizeConfig, values.get("resize") or {}, source=f"resize of {recipe}")
    if config.freeze_norm and (norms := config.new_batch_norms):
        raise UserError(
            f"{norms[0]}: batch: its new BatchNorm layers would stay as they are, since freeze_norm freezes them too; "
            "give freeze_norm=False, or group as the norm"
        )
    return NewDetector(str(backbone), arch, config=config, resize=resize, class_names=names)


def _class_names(classes: int | Sequence[str]) -> tuple[str, ...]:
    """Return one name per class; raises UserError for anything but a number from 1 on or a list of different names."""
    names: Sequence[str] = ()
    if isinstance(classes, list | tuple):
        names = classes
    elif not isinstance(classes, bool):
        with suppress(TypeError):
            names = [f"class {number}" for number in range(operator.index(cast(Any, classes)))]
    if not names or not all(isinstance(name, str) and name.strip() for name in names) or len(set(names)) < len(names):
        raise UserError(f"classes: expected a number from 1 on, or a list of different names (given: {classes!r})")
    return tuple(names)
