"""timm models by reference, as classifiers and as pyramid bodies, and the backbone file that links the two stages.

Every reference (`references.py`) is handled in the same way: weights are read from their file, renamed to the network and compared with all of it
(`state_dicts.py`). The metadata of a name, folder or file are kept: mean, std, class names, arguments of the network. Of a file without metadata is
said what was assumed (`twins.py`).
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import PatchEmbed
from timm.models import get_model_input_config, get_pretrained_cfg
from torch import Tensor, nn

from ssld.shared.config.launcher import launched_ranks
from ssld.shared.config.settings import Network
from ssld.shared.errors import UserError
from ssld.shared.models.downloads import require_downloads
from ssld.shared.models.model_file import content_hash, save_model_file
from ssld.shared.models.references import ModelReference, is_encoder, no_classes, parse_reference
from ssld.shared.models.state_dicts import Fitted, create, fit, read_state_dict
from ssld.shared.models.twins import twins
from ssld.shared.terminal import say
from ssld.shared.wording import some

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Classifier(nn.Module):
    """A timm classifier that owns its input normalization: pixels [B,3,H,W] in 0..255 (uint8 or float) -> logits [B,K].

    Its state dict is that of the timm model, so that saved files load in plain timm.

    Attributes:
        args: arguments that timm needs beside arch and classes to build it again.
        loaded: a line about the source of its weights.
        new_head: whether its classification layer is a new one, although other weights were loaded.
    """

    mean_3: Tensor
    std_3: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        args: Mapping[str, Any] | None = None,
        loaded: str = "",
        new_head: bool = False,
    ) -> None:
        super().__init__()
        self.net, self.args, self.loaded, self.new_head = net, dict(args or {}), loaded, new_head
        self.register_buffer("mean_3", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std_3", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.net(self.normalized(pixels_BCHW))
        return logits

    def normalized(self, pixels_BCHW: Tensor) -> Tensor:
        """Normalize pixels to the network's input, in float32 also under autocast: the first convolution casts down by itself."""
        # In place, on a copy: half the time on a CPU, and a third of the memory.
        return pixels_BCHW.to(torch.float32, copy=True).sub_(self.mean_3).div_(self.std_3)


def place(module: ModuleT, device: torch.device | str, *, channels_last: bool) -> ModuleT:
    """Move a network to a device, in channels_last memory format if requested."""
    module.to(device)
    return module.to(memory_format=torch.channels_last) if channels_last else module


@dataclass(frozen=True)
class InputSettings:
    """Input of a model: mean and std in 0..1, (height, width), interpolation, whether other sizes fail."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    interpolation: str
    fixed_size: bool

    @classmethod
    def of_detector(cls, mean: Sequence[float], std: Sequence[float]) -> Self:
        """Return the input of a detector's backbone: size and interpolation of its images are settings of the detector, and unused here."""
        return cls(tuple(mean), tuple(std), (0, 0), "bilinear", False)


def input_settings(net: nn.Module, metadata: dict[str, Any]) -> InputSettings:
    """Return the input settings of a reference's metadata, else of timm's pretrained configuration; for a network of fixed size, its size."""
    data = resolve_model_data_config(net)
    built: dict[str, Any] = get_model_input_config(net)
    own = built["input_size"] if built["fixed_input_size"] else data["input_size"]
    size = (None if built["fixed_input_size"] else metadata.get("input_size")) or own[1:]
    return InputSettings(
        mean=tuple(metadata.get("mean") or data["mean"]),
        std=tuple(metadata.get("std") or data["std"]),
        size=(int(size[0]), int(size[1])),
        interpolation=metadata.get("interpolation") or data["interpolation"],
        fixed_size=bool(getattr(net, "pretrained_cfg", {}).get("fixed_input_size")),
    )


def own_size(reference: ModelReference) -> tuple[int, int]:
    """Return (height, width) of the images that a reference's weights were trained on last, without loading them."""
    with torch.device("meta"):
        net = create(reference.arch, reference.text, **network_args(reference, None))
    return input_settings(net, reference.metadata).size


def create_classifier(
    reference: ModelReference,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    drop_path: float = 0.0,
    image_size: int | None = None,
) -> tuple[Classifier, InputSettings]:
    """Create the classifier that a reference names, with its weights loaded and checked.

    Args:
        num_classes: a new head of this many classes where the source has another; None keeps the source's head.
        class_names: of these classes, where known: a source that names other ones, or these in another order, gets a new head too.
        drop_path: stochastic depth; where the arch has none, anything but 0 is an error.
        image_size: side in pixels that a network of fixed size is built for, its position embeddings resampled; other networks take any.

    Raises:
        UserError: the weights do not fit the arch (the first differences are named) or its class names, or it cannot work at `image_size`.
    """
    options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    args = network_args(reference, image_size)
    fitted = _weights(reference, args)
    classes = num_classes if fitted is None else fitted.classes
    net = create(
        reference.arch, reference.text, **args, **options, **({} if classes is None else {"num_classes": classes})
    )
    new_head, notes = False, [*(fitted.notes if fitted else []), *reference.metadata.get("notes", [])]
    if fitted:
        names = reference.metadata.get("class_names")
        if names and classes and len(names) != classes:
            raise UserError(f"{reference.text}: names {len(names)} classes, but its weights have {classes}")
        net.load_state_dict(fitted.tensors)
        other_names = bool(names and class_names) and list(names or []) != list(class_names or [])
        new_head = num_classes is not None and (num_classes != classes or other_names)
        if new_head:
            net.reset_classifier(num_classes)
            if classes and num_classes:
                notes.append("classifier re-initialized: different classes or class order")
    elif classes:
        _calm_classifier(net)
    settings = input_settings(net, reference.metadata)
    if settings.fixed_size:
        notes += unseen_edge(net, settings.size)
    loaded = _loaded_line(reference, fitted, notes)
    return Classifier(net, mean=settings.mean, std=settings.std, args=args, loaded=loaded, new_head=new_head), settings


def _calm_classifier(net: Any) -> None:
    """Give a classification layer with random weights torch's own range, 1 / sqrt(inputs), where timm's is more than twice as wide.

    EfficientNets, MobileNets and their kin start with 1 / sqrt(classes), made for 1,000 of them. With 16 classes, as of prototypes, their logits have
    a standard deviation of 3 at first: the student is sure of random classes, and has to unlearn them.
    """
    layer = net.get_classifier()
    if isinstance(layer, nn.Linear) and layer.weight.std() > 2 / math.sqrt(3 * layer.in_features):
        bound = layer.in_features**-0.5
        nn.init.uniform_(layer.weight, -bound, bound)


def unseen_edge(net: nn.Module, size: tuple[int, int]) -> list[str]:
    """Warn where the patches of a ViT do not divide its input of `size` (height, width): timm leaves the rest out, and its map covers less than
    the image, so that it does not lie on the map of another network. Empty where they do.
    """
    patches = getattr(net, "patch_embed", None)
    if not isinstance(patches, PatchEmbed) or patches.dynamic_img_pad:
        return []
    side = patches.patch_size[0]
    whole = size[0] - size[0] % side
    if whole == size[0]:
        return []
    return [
        f"warning: its patches of {side} pixels do not divide {size[0]}, so the last {size[0] - whole} rows and columns of an image are not seen; "
        f"{whole} and {whole + side} pixels are seen whole"
    ]


def network_args(reference: ModelReference, image_size: int | None) -> dict[str, Any]:
    """Return timm's arguments for a reference's network; with the size where that is fixed and differs from the network's own.

    Raises UserError where the network cannot be built for `image_size`.
    """
    args = reference.model_args
    cfg: Any = get_pretrained_cfg(reference.arch)
    if not cfg.fixed_input_size:
        return args
    own = args.get("img_size") or cfg.input_size[1:]
    own = [own, own] if isinstance(own, int) else list(own)
    if image_size and own != [image_size, image_size]:
        if not _takes_any_size(reference, args):
            args["img_size"] = [image_size, image_size]
        _try_size(reference, args, image_size)
    return args


def check_networks(networks: Mapping[str, Network], hub_data: Mapping[str, str] | None = None) -> None:
    """Check the networks of settings before data are read and a run begins: they exist, are known, and fit their image size.

    Prints what will be downloaded. Raises UserError for the first fault, and for weights or data that cannot be downloaded.
    """
    for key, network in networks.items():
        if network.classes and is_encoder(network.model):
            raise UserError(f"{key}: {no_classes(network.model)}")
    models = {key: network.model for key, network in networks.items()} | dict(hub_data or {})
    for line in require_downloads(models):
        if launched_ranks()[0] == 0:
            say(line)
    for key, network in networks.items():
        try:
            group = key.rpartition(".")[0]
            reference = parse_reference(
                network.model,
                network.arch,
                allow_pickle=network.allow_pickle,
                arch_key=f"{group}.arch" if group else "arch",
            )
            network_args(reference, network.image_size)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None


def _takes_any_size(reference: ModelReference, args: Mapping[str, Any]) -> bool:
    """Whether a network resamples its position embeddings by itself, image by image."""
    with torch.device("meta"):
        return not get_model_input_config(create(reference.arch, reference.text, **args))["fixed_input_size"]


def _try_size(reference: ModelReference, args: Mapping[str, Any], size: int) -> None:
    """Raise UserError where a network cannot be built for another size than its own and run at it: windows and patches have to divide it."""
    try:
        with torch.device("meta"), torch.no_grad():
            timm.create_model(reference.arch, **args).eval()(torch.empty(1, 3, size, size))
    except NotImplementedError:  # an operation without a meta kernel: the check is not possible
        return
    except Exception as error:  # assertions, shapes, unknown arguments: every family of networks differs
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(
            f"{reference.text}: {reference.arch} cannot work at {size} pixels ({why}); give another size"
        ) from None


def _weights(reference: ModelReference, args: Mapping[str, Any]) -> Fitted | None:
    """Return the weights of a reference, renamed to its network with `args`; None for random weights."""
    if reference.file is None:
        return None
    tensors, where = read_state_dict(reference.file)
    fitted = fit(
        tensors,
        reference.arch,
        args,
        reference.text,
        trained_with=network_args(reference, None),
        convert_first=reference.foreign,
    )
    notes = [*([f"read from {where!r}"] if where else []), *fitted.notes, *_assumed(reference, fitted.classes)]
    return Fitted(fitted.tensors, fitted.classes, notes)


def _assumed(reference: ModelReference, classes: int) -> Iterator[str]:
    """Yield what a file without metadata leaves open, and what was taken: nothing in its tensors shows a mistake."""
    if reference.metadata.get("arch"):
        return
    cfg: Any = get_pretrained_cfg(reference.arch)
    yield f"mean {_three(cfg.mean)} and std {_three(cfg.std)} are timm's for {reference.arch}, the file names none"
    if others := twins(reference.arch, classes):
        yield f"warning: its tensors fit {some(others)} as well, which computes otherwise; give that name as arch if the weights are of it"


def _three(values: Sequence[float]) -> str:
    return "/".join(f"{value:g}" for value in values)


def _loaded_line(reference: ModelReference, fitted: Fitted | None, notes: list[str]) -> str:
    what = f"loaded {len(fitted.tensors)}/{len(fitted.tensors)} tensors" if fitted else "random weights"
    return f"{reference.text}: {'; '.join([what, *notes])}"


def licence(reference: ModelReference) -> str | None:
    """Return the licence of a reference's weights: None for random weights, "unknown" where none is given."""
    return str(reference.metadata.get("licence") or "unknown") if reference.pretrained else None


def create_body(reference: ModelReference, **options: Any) -> tuple[nn.Module, str]:
    """Create the features-only network of a reference for a detector's pyramid; return it and a line about the loaded weights.

    Raises UserError when the weights do not fit the arch, or when any tensor of the network did not come from them.
    """
    args = network_args(reference, None)
    fitted = _weights(reference, args)
    args = body_args(args)
    if fitted is None:
        return create(
            reference.arch, reference.text, features_only=True, **args, **options
        ), f"{reference.text}: random weights"
    tensors = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in fitted.tensors.items()
    }
    # timm recognizes weights in its own names by their head, so a missing head gets a placeholder, which is dropped.
    cfg: Any = get_pretrained_cfg(reference.arch)
    head = cfg.classifier[0] if isinstance(cfg.classifier, tuple | list) else cfg.classifier
    stand_in = {} if fitted.classes else {f"{head}.weight": torch.zeros(1, 1)}
    overlay = {"state_dict": stand_in | tensors, "num_classes": max(1, fitted.classes), "label_offset": None}
    body = create(
        reference.arch,
        reference.text,
        features_only=True,
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        **args,
        **options,
    )
    for module in body.modules():  # timm keeps the weights that it was given
        getattr(module, "pretrained_cfg", {}).pop("state_dict", None)
    # timm renames tensors in some feature networks and loads them non-strictly, so the check is by content.
    available = {content_hash({"": tensor}) for tensor in tensors.values()}
    state = body.state_dict()
    strangers = [name for name, tensor in state.items() if content_hash({"": tensor}) not in available]
    if strangers:
        raise UserError(
            f"{reference.text}: {len(strangers)} of {len(state)} backbone tensors were not loaded, first {strangers[0]}"
        )
    dropped = f"{len(tensors) - len(state)} head tensors dropped"
    line = "; ".join([f"loaded {len(state)}/{len(state)} backbone tensors, {dropped}", *fitted.notes])
    return body, f"{reference.text}: {line}"


def load_backbone(reference: str | Path, *, arch: str | None = None, features_only: bool = False) -> nn.Module:
    """Load a backbone as a plain timm network in evaluation mode, every tensor checked.

        net = ssld.load_backbone("runs/mine/student.safetensors")
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
        logits = net(transform(image).unsqueeze(0))

    The network takes normalized float images [B, 3, H, W]. Its `pretrained_cfg` has the mean, std, input size and interpolation of the file, and
    under `label_names` its class names, where the file has them.

    Args:
        reference: backbone file, folder, `timm:NAME`, `hf-hub:ORG/NAME` or `random:NAME`.
        arch: timm's name of the network, for a file that does not say it.
        features_only: return the network that gives a list of feature maps, as timm's `features_only=True`, in place of the classifier.

    Raises:
        UserError: no such model, or weights that do not fit the network; nothing is loaded in part.
    """
    if not isinstance(reference, str | Path):
        raise UserError(f"load_backbone: expected a model reference as text, or a path, got {type(reference).__name__}")
    parsed = parse_reference(str(reference), arch)
    if features_only:
        with _silent_about_the_head():
            net = create_body(parsed)[0]
        inputs = input_settings(net, parsed.metadata)
    else:
        classifier, inputs = create_classifier(parsed)
        net = classifier.net
    own = {
        "mean": inputs.mean,
        "std": inputs.std,
        "input_size": (3, *inputs.size),
        "interpolation": inputs.interpolation,
    }
    for key, fact in (("crop_pct", "crop_pct"), ("label_names", "class_names")):
        if parsed.metadata.get(fact):
            own[key] = parsed.metadata[fact]
    net.pretrained_cfg = {**dict(getattr(net, "pretrained_cfg", {})), **own}  # type: ignore[assignment]
    return net.eval()


@contextmanager
def _silent_about_the_head() -> Iterator[None]:
    """Inside, timm does not warn of weights that a features-only network has no place for.

    `create_body` checks that every tensor of the network was loaded, so that only the layers after its last feature map are left out.
    """

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Unexpected keys")

    logger = logging.getLogger("timm.models._builder")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def body_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a network's features-only form: without pooling and classes, which belong to the head."""
    return {name: value for name, value in args.items() if name not in ("global_pool", "num_classes")}


def save_backbone(
    path: Path, net: nn.Module | dict[str, Tensor], *, arch: str, inputs: InputSettings, classes: int, **facts: Any
) -> str:
    """Write a backbone file; `facts` (class_names, model_args, step, metrics, teacher, licence ...) go to its metadata. Returns the content hash."""
    tensors = net if isinstance(net, dict) else net.state_dict()
    metadata = {
        "kind": "backbone",
        "arch": arch,
        "timm_version": timm.__version__,
        "num_classes": classes,
        "mean": inputs.mean,
        "std": inputs.std,
        "input_size": inputs.size,
        "interpolation": inputs.interpolation,
        **facts,
    }
    return save_model_file(path, tensors, metadata)
