"""A folder in the layout of the Hugging Face hub, as timm reads it.

    model.safetensors   the weights, with the backbone file's metadata
    config.json         architecture, classes and how images are prepared (timm 1.0.31 timm/models/_hub.py)
    README.md           the model card

`timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, after an upload `hf-hub:ORG/NAME`. Local folders are left out of everything that is
written here: the folder is meant to be published.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn

from ssld.shared.deploy.hub import public
from ssld.shared.models.backbones import InputSettings
from ssld.shared.models.model_file import read_tensors, save_model_file


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
    if metadata.get("model_args"):
        config["model_args"] = metadata["model_args"]
    if metadata.get("class_names"):
        config["label_names"] = metadata["class_names"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
