"""Metadata of model files, and configurations of folders in the Hugging Face layout, checked before use.

Both come from outside and are not trusted: every value has its type and range, and arguments for timm are plain JSON values that name
no file and no download. Does not import torch.
"""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from ssld.shared.config.validation import own_words
from ssld.shared.errors import UserError

_LARGEST = 16_384  # of any number among a network's arguments; image sides stay far below it
_DEEPEST = 4
# Arguments of timm that choose weights, files or another kind of network, which only the reference may choose.
_FORBIDDEN = frozenset(
    {
        *(
            "pretrained",
            "pretrained_cfg",
            "pretrained_cfg_overlay",
            "pretrained_strict",
            "pretrained_filter_fn",
            "pretrained_model_args",
        ),
        *(
            "checkpoint_path",
            "cache_dir",
            "scriptable",
            "exportable",
            "no_jit",
            "pruned",
            "model_cfg",
            "kwargs_filter",
            "device",
            "dtype",
            "variant",
        ),
        *("features_only", "feature_cls", "feature_cfg", "out_indices"),
    }
)
_PLACEHOLDER = re.compile(r"LABEL_\d+")


def _plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, int | float):
        return math.isfinite(value) and abs(value) <= _LARGEST
    if value is None or isinstance(value, str):
        return True
    if depth >= _DEEPEST or not isinstance(value, list | tuple | dict) or len(value) > _LARGEST:
        return False
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(inner, depth + 1) for key, inner in value.items())
    return all(_plain(inner, depth + 1) for inner in value)


def _arguments(args: dict[str, Any]) -> dict[str, Any]:
    for name, value in args.items():
        if name in _FORBIDDEN or not name.isidentifier():
            raise ValueError(f"{name[:80]!r} is not a model argument")
        if not _plain(value):
            raise ValueError(f"{name} has to be a plain JSON value, its numbers finite and at most {_LARGEST:,}")
    if args.get("in_chans") not in (None, 3):
        raise ValueError(f"in_chans is {args['in_chans']}, images have 3 channels")
    return args


def _image_size(args: dict[str, Any]) -> dict[str, Any]:
    size = args.get("img_size")
    sides = size if isinstance(size, list | tuple) else [size] * 2
    if size is not None and not (len(sides) == 2 and all(isinstance(side, int) and side >= 8 for side in sides)):
        raise ValueError("img_size has to be a side or two sides in pixels, of at least 8")
    return args


Fraction3 = Annotated[list[Annotated[float, Field(ge=-1e4, le=1e4, strict=True)]], Field(min_length=3, max_length=3)]
Deviation3 = Annotated[list[Annotated[float, Field(ge=1e-6, le=1e6, strict=True)]], Field(min_length=3, max_length=3)]
ModelArgs = Annotated[dict[StrictStr, Any], AfterValidator(_arguments), AfterValidator(_image_size)]


class ModelMetadata(BaseModel):
    """The metadata of a model file that this project reads; further keys are kept as they are."""

    model_config = ConfigDict(extra="allow")

    format: Annotated[StrictInt, Field(ge=1)] = 1
    kind: StrictStr | None = None
    arch: StrictStr | None = None
    num_classes: Annotated[StrictInt, Field(ge=0)] | None = None
    class_names: list[StrictStr] | None = None
    category_ids: list[StrictInt | StrictStr] | None = None
    mean: Fraction3 | None = None
    std: Deviation3 | None = None
    input_size: (
        Annotated[list[Annotated[StrictInt, Field(ge=1, le=_LARGEST)]], Field(min_length=2, max_length=2)] | None
    ) = None
    interpolation: StrictStr | None = None
    crop_pct: Annotated[float, Field(gt=0, le=2, strict=True)] | None = None
    model_args: ModelArgs | None = None
    licence: StrictStr | None = None
    content_sha256: StrictStr | None = None
    model: dict[StrictStr, Any] | None = None
    resize: dict[StrictStr, Any] | None = None
    backbone: dict[StrictStr, Any] | None = None
    teacher: dict[StrictStr, Any] | None = None
    metrics: dict[StrictStr, Any] | None = None
    source: dict[StrictStr, Any] | None = None
    trained_images: list[StrictStr] | None = None

    @model_validator(mode="after")
    def _counts_agree(self) -> "ModelMetadata":
        names, ids = self.class_names, self.category_ids
        if names is not None and self.num_classes is not None and len(names) != self.num_classes:
            raise ValueError(f"class_names: {len(names)} names, but num_classes is {self.num_classes}")
        if ids is not None and len(ids) != len(names or []):
            raise ValueError(f"category_ids: {len(ids)} ids, but {len(names or [])} class_names")
        return self


NEEDED = {
    "backbone": ("arch",),
    "detector": ("arch", "class_names", "category_ids", "mean", "std", "model", "resize"),
}
"""required keys per kind of file"""


def parse_metadata(text: str, source: object) -> dict[str, Any]:
    """Parse and check the metadata in a JSON text; raise UserError naming `source` for any fault."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{source}: its metadata are not JSON; the file is damaged") from None
    return checked(record, source)


def checked(record: Any, source: object) -> dict[str, Any]:
    """Return `record` if it is valid metadata of a model; raise UserError naming `source` and the first fault otherwise."""
    if not isinstance(record, dict):
        raise UserError(f"{source}: its metadata are not a JSON object; the file is damaged")
    try:
        ModelMetadata.model_validate(record)
    except (ValidationError, RecursionError) as error:
        raise UserError(f"{source}: its metadata cannot be used: {_first_fault(error)}") from None
    return record


def _first_fault(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return "nested too deeply"
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "constrained-")))
    words = " ".join(own_words(first).split())[:200]
    return f"{place}: {words}" if place else words


def folder_facts(config: Any, source: object) -> dict[str, Any]:
    """Convert the config.json of a folder or a hub model to the keys of a model file, with its `arch`.

    timm's layout (`architecture`, `pretrained_cfg`, `model_args`, `label_names`; an older one without `pretrained_cfg`), also as transformers writes
    it around a timm network. `notes` lists what of it could not be used. Raises UserError where it names no timm architecture or holds values of a
    wrong kind.
    """
    if not isinstance(config, dict):
        raise UserError(f"{source}: not a JSON object")
    arch = config.get("architecture")
    if not isinstance(arch, str) or not arch:
        kind = config.get("model_type") or config.get("architectures")
        of = f"of {str(kind)[:60]!r}, " if kind else ""
        raise UserError(
            f"{source}: {of}names no timm architecture (`architecture`); give timm:NAME, or a file and `arch`"
        )
    data = config.get("pretrained_cfg", config)
    if not isinstance(data, dict):
        raise UserError(f"{source}: pretrained_cfg is not a JSON object")
    size = data.get("input_size")
    facts: dict[str, Any] = {
        "arch": arch,
        "num_classes": config.get("num_classes", data.get("num_classes")),
        "mean": data.get("mean"),
        "std": data.get("std"),
        "input_size": size[1:] if isinstance(size, list) else size,
        "interpolation": data.get("interpolation"),
        "crop_pct": data.get("crop_pct"),
        "licence": data.get("license"),
        "model_args": config.get("model_args") or None,
    }
    if data.get("fixed_input_size") and isinstance(size, list) and isinstance(facts["model_args"] or {}, dict):
        facts["model_args"] = {"img_size": size[1:]} | (facts["model_args"] or {})  # as timm takes it
    if isinstance(size, list) and size[:1] != [3]:
        raise UserError(f"{source}: input_size is {str(size)[:60]}, images have 3 channels")
    names, note = _label_names(config, data)
    facts = {key: value for key, value in facts.items() if value is not None}
    checked(facts, source)
    return facts | ({"class_names": names} if names else {}) | ({"notes": [note]} if note else {})


def _label_names(config: dict[str, Any], data: dict[str, Any]) -> tuple[list[str] | None, str | None]:
    """Return (names in the order of the logits or None, the reason where given names cannot be used)."""
    given = next(
        (
            value
            for value in (
                config.get("label_names"),
                data.get("label_names"),
                data.get("labels"),
                config.get("id2label"),
            )
            if value
        ),
        None,
    )
    if given is None:
        return None, None
    if isinstance(given, dict):  # number -> name, possibly with gaps
        given = [given.get(str(number)) for number in range(len(given))]
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        return None, "label names left out: they do not name class 0, 1, 2, ... without gaps"
    if all(_PLACEHOLDER.fullmatch(name) for name in given):
        return None, None
    if len(set(given)) < len(given):
        double = next(name for number, name in enumerate(given) if name in given[:number])
        return None, f"label names left out: several classes are called {double!r}"
    return given, None


def read_config(path: Path) -> Any:
    """Read a folder's config.json; raise UserError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON") from None
