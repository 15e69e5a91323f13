"""A folder in the layout of the Hugging Face hub, as timm reads it, and its upload.

    model.safetensors   the weights, with the backbone file's metadata
    config.json         architecture, classes and how images are prepared (timm 1.0.31 timm/models/_hub.py)
    README.md           the model card

`timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, after an upload `hf-hub:ORG/NAME`. Local folders are left out of everything that is
written here: the folder is meant to be published.
"""

import json
from pathlib import Path, PurePath
from typing import Any

from torch import nn

from shared.backbones import InputSettings
from shared.errors import UserError
from shared.model_file import read_tensors, save_model_file


def public(value: Any) -> Any:
    """A JSON value whose absolute paths, also those in a list separated by commas, are cut to their last part."""
    if isinstance(value, dict):
        return {key: public(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [public(inner) for inner in value]
    if isinstance(value, PurePath) or (isinstance(value, str) and "/" in value):
        return ", ".join(_last_part(part) for part in str(value).split(", "))
    return value


def write_folder(
    folder: Path, model: Path, net: nn.Module, inputs: InputSettings, metadata: dict[str, Any], card: str
) -> None:
    """Write the folder for a backbone file.

    Args:
        net: the network of the file, for what timm's configuration says about it.
        inputs: how it wants its images.
        metadata: of the file.
        card: text of README.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in metadata.items() if key not in ("run", "format")}
    save_model_file(folder / "model.safetensors", read_tensors(model), public(kept))
    own: dict[str, Any] = getattr(net, "pretrained_cfg", None) or {}
    config = {
        "architecture": metadata["arch"].split(".")[0],
        "num_classes": metadata["num_classes"],
        "num_features": int(getattr(net, "num_features", 0)),
        "pretrained_cfg": {
            "input_size": [3, *inputs.size],
            "fixed_input_size": inputs.fixed_size,
            "interpolation": inputs.interpolation,
            "crop_pct": metadata.get("crop_pct", 0.875),
            "crop_mode": "center",
            "mean": inputs.mean,
            "std": inputs.std,
            "num_classes": metadata["num_classes"],
            "first_conv": own.get("first_conv"),
            "classifier": own.get("classifier"),
            "license": metadata.get("licence"),
        },
    }
    if metadata.get("class_names"):
        config["label_names"] = metadata["class_names"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def check_name(repository: str) -> None:
    """Raises UserError for what cannot be the name of a repository of the hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"push_to_hub: {repository}: {' '.join(str(error).split())}; give ORG/NAME") from None
    if repository.count("/") != 1:
        raise UserError(f"push_to_hub: {repository}: is no ORG/NAME")


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload the folder, to a new repository if need be; returns where it is.

    Raises UserError for whatever goes wrong: not logged in, no right to write, no network.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Upload by ssld")
    except Exception as error:  # of the hub's client, of the network below it
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"push_to_hub: {repository}: not uploaded ({why}); {folder} is complete: log in with `hf auth login`, "
            "check the name and the network, and run the same command again"
        ) from None
    return str(done.commit_url)


def _last_part(text: str) -> str:
    return PurePath(text).name if text.startswith(("/", "~")) else text
