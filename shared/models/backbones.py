"""timm models by reference, as classifiers and as pyramid bodies, and the backbone file that links the two stages.

A model reference is one of
    FILE.safetensors   a backbone file, or any safetensors file together with `arch`
    FILE.pth           a state dict, together with `arch`; read with `weights_only=True` (teachers only)
    FOLDER             a folder in the Hugging Face layout (config.json + weights)
    hf-hub:ORG/NAME    a model of the Hugging Face hub
    timm:NAME or NAME  a timm model with its pretrained weights
    random:NAME        a timm model with random weights
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import load_state_dict as timm_load_state_dict
from torch import Tensor, nn

from ssld.shared.errors import UserError
from ssld.shared.models.model_file import content_hash, read_metadata, read_shapes, read_tensors, save_model_file

ModuleT = TypeVar("ModuleT", bound=nn.Module)
PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".ckpt", ".pkl")


@dataclass(frozen=True)
class ModelReference:
    """What a reference names: the timm arch, where its weights come from, and a backbone file's metadata."""

    text: str
    arch: str
    file: Path | None = None
    pretrained: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def model_args(self) -> dict[str, Any]:
        """What `timm.create_model` needs beside arch and classes to rebuild the network of a file: its pooling, the input size of a ViT."""
        return dict(self.metadata.get("model_args") or {})


def parse_reference(text: str, arch: str | None = None, *, allow_pickle: bool = False) -> ModelReference:
    """Understand a model reference (see the module's docstring) without loading weights.

    Raises UserError for an unknown timm name (with the nearest), a missing file, a file that needs `arch`, and a pickle where none is allowed.
    """
    if text.startswith("random:"):
        return ModelReference(text, _known_arch(text.removeprefix("random:")))
    if text.startswith("hf-hub:"):
        return ModelReference(text, text, pretrained=True)
    path = Path(text)
    if path.is_dir():
        if not (path / "config.json").exists():
            files = sorted(path.glob("*.safetensors"))
            hint = f"; did you mean {files[0]}?" if files else ""
            raise UserError(f"{text}: not a folder in the Hugging Face layout (no config.json){hint}")
        return ModelReference(text, f"local-dir:{text}", pretrained=True)
    if text.endswith((".safetensors", *PICKLE_SUFFIXES)) or path.is_file():
        return _file_reference(text, path, arch, allow_pickle)
    if "/" in text:
        raise UserError(f"{text}: no such file or folder")
    return ModelReference(text, _known_arch(text.removeprefix("timm:")), pretrained=True)


def _file_reference(text: str, path: Path, arch: str | None, allow_pickle: bool) -> ModelReference:
    if not path.is_file():
        raise UserError(f"{text}: no such file")
    pickled = path.suffix in PICKLE_SUFFIXES
    if pickled and not allow_pickle:
        raise UserError(f"{text}: is a pickle, which can run code when opened; a .safetensors file is needed")
    metadata = {} if pickled else read_metadata(path, kind="backbone")
    if arch and metadata and metadata["arch"] != arch:
        raise UserError(f"{text}: holds a {metadata['arch']}, but arch says {arch}")
    name = metadata.get("arch") or arch
    if not name:
        raise UserError(f"{text}: does not say which architecture it holds; give `arch` with its timm name")
    return ModelReference(text, _known_arch(name), file=path, metadata=metadata)


def _known_arch(name: str) -> str:
    from difflib import get_close_matches

    base = name.split(".")[0]
    if not timm.is_model(base):
        near = get_close_matches(base, timm.list_models(), n=1)
        raise UserError(f"{name}: timm has no such model{f'; did you mean {near[0]!r}?' if near else ''}")
    return name


class Classifier(nn.Module):
    """A timm classifier that owns its input normalisation: pixels [B,3,H,W] in 0..255 (uint8 or float) -> logits [B,K].

    Its state dict is the timm model's own, so that what is saved loads anywhere.
    """

    mean_3: Tensor
    std_3: Tensor

    def __init__(self, net: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean_3", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std_3", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.net(self.normalised(pixels_BCHW))
        return logits

    def normalised(self, pixels_BCHW: Tensor) -> Tensor:
        """What the network sees, in float32 also under autocast: the first convolution casts down by itself."""
        return (pixels_BCHW.float() - self.mean_3) / self.std_3


def place(module: ModuleT, device: torch.device | str, *, channels_last: bool) -> ModuleT:
    """Move a network to a device, in channels-last memory layout if asked."""
    module.to(device)
    return module.to(memory_format=torch.channels_last) if channels_last else module


@dataclass(frozen=True)
class InputSettings:
    """How a model wants its images: mean and std in 0..1, (height, width), interpolation, whether other sizes work."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    interpolation: str
    fixed_size: bool


def input_settings(net: nn.Module, metadata: dict[str, Any]) -> InputSettings:
    """A backbone file's own settings where it has them, timm's pretrained configuration otherwise."""
    data = resolve_model_data_config(net)
    size = metadata.get("input_size") or data["input_size"][1:]
    return InputSettings(
        mean=tuple(metadata.get("mean") or data["mean"]),
        std=tuple(metadata.get("std") or data["std"]),
        size=(int(size[0]), int(size[1])),
        interpolation=metadata.get("interpolation") or data["interpolation"],
        fixed_size=bool(getattr(net, "pretrained_cfg", {}).get("fixed_input_size")),
    )


def create_classifier(
    reference: ModelReference, *, num_classes: int | None = None, drop_path: float = 0.0
) -> tuple[Classifier, InputSettings]:
    """The classifier that a reference names, weights loaded and checked.

    Args:
        num_classes: a new head of this many classes where the source has another; None keeps the source's head.
        drop_path: stochastic depth; where the arch has none, anything but 0 is an error.

    Raises:
        UserError: keys or shapes do not fit the arch (the first differences are named), or the weights cannot be had.
    """
    options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    if reference.file is None:
        return _classifier(_create_named(reference, num_classes, **options), reference)
    if reference.file.suffix in PICKLE_SUFFIXES:
        tensors = _read_pickle(reference.file)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    else:
        tensors, shapes = {}, read_shapes(reference.file)
    file_classes = check_fits(reference, shapes)
    net: Any = _create(reference.arch, num_classes=file_classes, **reference.model_args, **options)
    net.load_state_dict(tensors or read_tensors(reference.file))
    if num_classes not in (None, file_classes):
        net.reset_classifier(num_classes)
    return _classifier(net, reference)


def _classifier(net: nn.Module, reference: ModelReference) -> tuple[Classifier, InputSettings]:
    settings = input_settings(net, reference.metadata)
    return Classifier(net, mean=settings.mean, std=settings.std), settings


def _create(arch: str, **options: Any) -> Any:
    try:
        return timm.create_model(arch, **options)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise UserError(f"{arch}: has no stochastic depth; leave drop_path at 0") from None


def _create_named(reference: ModelReference, num_classes: int | None, **options: Any) -> nn.Module:
    if num_classes is not None:
        options["num_classes"] = num_classes
    try:
        net: nn.Module = _create(reference.arch, pretrained=reference.pretrained, **options)
    except UserError:
        raise
    except Exception as error:
        if not reference.pretrained:
            raise
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"{reference.text}: its weights cannot be had ({why}); offline, give a file or a folder instead"
        ) from None
    return net


def architecture(reference: ModelReference, net: nn.Module) -> str:
    """The timm name to write into a file: what a hub id or a folder turned out to hold, not where it came from."""
    if reference.arch.startswith(("hf-hub:", "local-dir:")):
        cfg: Any = getattr(net, "pretrained_cfg", None) or {}
        return str(cfg.get("architecture"))
    return reference.arch


def licence(reference: ModelReference, net: nn.Module) -> str | None:
    """Licence of a reference's weights: None for random ones, "unknown" where nobody says it."""
    if reference.file is None and not reference.pretrained:
        return None
    cfg: Any = getattr(net, "pretrained_cfg", None) or {}
    return str(reference.metadata.get("licence") or (cfg.get("license") if reference.pretrained else None) or "unknown")


def check_fits(reference: ModelReference, shapes: dict[str, tuple[int, ...]]) -> int:
    """Compare a file's keys and shapes with its arch on the meta device; returns the file's number of classes.

    Raises UserError naming the first differences. Needed because timm loads feature networks without a word about missing layers.
    """
    with torch.device("meta"):
        cfg: Any = timm.create_model(reference.arch).default_cfg
        head = cfg.get("classifier")
        head = head[0] if isinstance(head, tuple | list) else head
        classes = shapes.get(f"{head}.weight", (0,))[0]
        expected = {
            name: tuple(tensor.shape)
            for name, tensor in timm.create_model(reference.arch, num_classes=classes, **reference.model_args)
            .state_dict()
            .items()
        }
    missing = [f"{name} missing" for name in expected if name not in shapes]
    extra = [f"{name} unknown" for name in shapes if name not in expected]
    other = [f"{n} {shapes[n]} instead of {expected[n]}" for n in expected if n in shapes and shapes[n] != expected[n]]
    if missing or extra or other:
        first = "; ".join([*missing[:2], *other[:2], *extra[:2]])
        counts = f"{len(missing)} missing, {len(extra)} unknown, {len(other)} of another shape"
        raise UserError(f"{reference.text}: does not hold a {reference.arch} ({counts}: {first})")
    return classes


def create_body(reference: ModelReference, **options: Any) -> tuple[nn.Module, str]:
    """The features-only network of a reference for a detector's pyramid, and a line saying what was loaded.

    Raises UserError when the file does not fit its arch, or when any tensor of the network did not come from the file.
    """
    if reference.file is None:
        body = _create_named(reference, None, features_only=True, **options)
        return body, f"{reference.text}: {'pretrained' if reference.pretrained else 'random'} weights"
    classes = check_fits(reference, read_shapes(reference.file))
    tensors = read_tensors(reference.file)
    overlay = {"file": str(reference.file), "num_classes": classes}
    if "img_size" in reference.model_args:  # the pooling belongs to the head
        options["img_size"] = reference.model_args["img_size"]
    body = _create(reference.arch, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    # timm renames tensors in some feature networks and loads them non-strictly, so the check is by content.
    available = {content_hash({"": tensor}) for tensor in tensors.values()}
    state = body.state_dict()
    strangers = [name for name, tensor in state.items() if content_hash({"": tensor}) not in available]
    if strangers:
        raise UserError(
            f"{reference.text}: {len(strangers)} of {len(state)} backbone tensors were not loaded, first {strangers[0]}"
        )
    dropped = len(tensors) - len(state)
    return body, f"{reference.text}: loaded {len(state)}/{len(state)} backbone tensors, {dropped} head tensors dropped"


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


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = timm_load_state_dict(str(path), use_ema=True, device="cpu", weights_only=True)
    except Exception as error:
        why = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: cannot be read as a plain state dict of tensors ({why})") from None
    return tensors
