"""Model references: resolve a name, file or folder, and read its metadata, before weights are read.

A model reference is one of
    FILE.safetensors   a backbone file, or any safetensors file together with `arch`
    FILE.pth           a state dict, together with `arch`; read with `weights_only=True` (not as the start of a training)
    FOLDER             a folder in the Hugging Face layout (config.json + weights)
    hf-hub:ORG/NAME    a model of the Hugging Face hub
    timm:NAME or NAME  a timm model with its pretrained weights
    random:NAME        a timm model with random weights
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg

from ssld.shared.errors import UserError
from ssld.shared.models.damage import refuse_damaged
from ssld.shared.models.downloads import PICKLE_SUFFIXES, WEIGHT_FILES, Remote, kind_of, timm_weights
from ssld.shared.models.metadata import folder_facts, read_config
from ssld.shared.models.model_file import is_pickle, read_metadata
from ssld.shared.models.timm_names import known_arch
from ssld.shared.wording import count

_OFF = "is a pickle, which can run code when opened; a .safetensors file is needed"


@dataclass(frozen=True)
class ModelReference:
    """A resolved reference.

    Attributes:
        arch: timm's name of the architecture.
        file: the weights; None for random ones.
        metadata: facts under the keys of a model file, also of a folder or a model of the hub.
        foreign: whether the weights are timm's or the hub's, which timm's own conversion is made for.
    """

    text: str
    arch: str
    file: Path | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    foreign: bool = False

    @property
    def pretrained(self) -> bool:
        """Whether it has weights."""
        return self.file is not None

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments of `timm.create_model` beside arch and classes to build the network of the weights: its activation, the input size of a ViT."""
        args = dict(self.metadata.get("model_args") or {})
        args.pop("num_classes", None)  # taken from the weights
        return args


def no_classes(text: str, classes: int = 0) -> str:
    """Return the message on a teacher whose network has too few classes."""
    has = count(classes, "class")
    return f"{text}: has {has}, a teacher needs several; run `ssld prototypes` first, which makes a teacher of an encoder without classes"


def is_encoder(text: str) -> bool:
    """Whether a reference names weights that have no classes by timm's registry, which is known before any download."""
    try:
        cfg: Any = get_pretrained_cfg(known_arch(text.removeprefix("timm:"), text)) if kind_of(text) == "timm" else None
    except UserError:  # no such name: reported where it is read
        return False
    return cfg is not None and cfg.num_classes == 0


def parse_reference(
    text: str, arch: str | None = None, *, allow_pickle: bool = False, arch_key: str = "arch"
) -> ModelReference:
    """Resolve a model reference (see the module's docstring) without loading weights; what is not on this machine yet is downloaded.

    Args:
        arch: timm name of the architecture, for a file that does not name it.
        arch_key: full key of the setting that holds `arch`, for error messages.

    Raises:
        UserError: an unknown timm name or tag (with the nearest), a missing file, a file that needs `arch`, a pickle where none is allowed,
            metadata that cannot be used, a download that is not possible.
    """
    if not text.strip():
        raise UserError("no model is named; give timm:NAME, hf-hub:ORG/NAME, a folder or a file")
    reference = _parsed(text, arch, allow_pickle, arch_key)
    if arch and arch not in (reference.arch, reference.arch.partition(".")[0]):
        raise UserError(
            f"{text}: holds a {reference.arch}, but {arch_key} is {arch}; leave it out, or name another file"
        )
    return reference


def _parsed(text: str, arch: str | None, allow_pickle: bool, arch_key: str) -> ModelReference:
    match kind_of(text):
        case "random":
            return ModelReference(text, known_arch(text.removeprefix("random:"), text))
        case "hub":
            return _hub_reference(text)
        case "folder":
            return _folder_reference(text, Path(text), arch_key)
        case "file":
            return _file_reference(text, Path(text), arch, allow_pickle, arch_key)
        case "path":
            raise UserError(f"{text}: no such file or folder")
    name = known_arch(text.removeprefix("timm:"), text)
    cfg: Any = get_pretrained_cfg(name)
    facts = {"licence": cfg.license, "crop_pct": cfg.crop_pct}
    metadata = {key: value for key, value in facts.items() if value is not None}
    return ModelReference(text, name, file=timm_weights(name).fetch(text), metadata=metadata, foreign=True)


def _file_reference(text: str, path: Path, arch: str | None, allow_pickle: bool, arch_key: str) -> ModelReference:
    refuse_damaged(path)
    pickled = is_pickle(path)
    if pickled and not allow_pickle:
        raise UserError(f"{text}: {_OFF}")
    metadata = {} if pickled else read_metadata(path, kind="backbone")
    name = metadata.get("arch") or arch
    if not name:
        raise UserError(f"{text}: does not name its architecture; set {arch_key} to its timm name")
    return ModelReference(text, known_arch(name, text), file=path, metadata=metadata)


def _folder_reference(text: str, path: Path, arch_key: str) -> ModelReference:
    config = path / "config.json"
    weight_files = sorted(path.glob("*.safetensors"))
    if not config.exists():
        hint = f"; did you mean {weight_files[0]}?" if weight_files else ""
        raise UserError(f"{text}: not a folder in the Hugging Face layout (no config.json){hint}")
    facts = folder_facts(read_config(config), config)
    named = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
    pickles = sorted(file for suffix in PICKLE_SUFFIXES for file in path.glob(f"*{suffix}"))
    files = named or weight_files or pickles
    if not files:
        raise UserError(f"{text}: no weights beside its config.json (expected {WEIGHT_FILES[0]})")
    if not named and len(files) > 1:
        raise UserError(
            f"{text}: several weight files ({', '.join(file.name for file in files[:4])}): "
            f"rename one to {WEIGHT_FILES[0]}, or give that file and set {arch_key}"
        )
    return _with_config(text, files[0], facts, config)


def _with_config(
    text: str, file: Path, facts: dict[str, Any], config: object, *, foreign: bool = False
) -> ModelReference:
    """Merge a config.json with the metadata of the weights, where these are files of this project; both must agree."""
    own = {} if is_pickle(file) else read_metadata(file, kind="backbone")
    for key in ("arch", "class_names"):
        if own.get(key) and facts.get(key) and own[key] != facts[key]:
            raise UserError(f"{file}: its {key} is not that of {config}; give the file, or write the folder again")
    metadata = facts | own
    return ModelReference(text, known_arch(metadata["arch"], config), file=file, metadata=metadata, foreign=foreign)


def _hub_reference(text: str) -> ModelReference:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    repo = text.removeprefix("hf-hub:")
    try:
        validate_repo_id(repo.partition("@")[0])
        if repo.count("/") != 1:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise UserError(f"{text[:200]}: not a valid hf-hub:ORG/NAME ({' '.join(str(error).split())[:120]})") from None
    config = Remote(repo, ("config.json",)).fetch(text)
    weights = Remote(repo, WEIGHT_FILES).fetch(text)
    return _with_config(text, weights, folder_facts(read_config(config), f"{text}, config.json"), config, foreign=True)
