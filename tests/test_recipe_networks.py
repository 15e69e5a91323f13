"""Every network that a shipped recipe names, as timm builds it: without memory for its weights, since most are large. None runs in another test."""

import re
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg

ROOT = Path(__file__).resolve().parents[1]
NAMED = re.compile(r"\b(timm|random):(\w[\w.]*)|\b\w+_model: *(\w+)")
FILES = sorted(
    file
    for folder in ("stage1_ssld/configs", "stage2_detect/configs", "pipelines", "pipelines/recipes")
    for file in (ROOT / folder).glob("*.yaml")
)


def networks() -> dict[tuple[str, str], set[str]]:
    """(timm or random, name) -> folders of the recipes that name it."""
    found: dict[tuple[str, str], set[str]] = {}
    for file in FILES:
        for kind, name, variable in NAMED.findall(file.read_text()):
            found.setdefault((kind or "random", name or variable), set()).add(file.parent.parent.name)
    return found


def test_every_network_of_a_recipe_exists_as_the_recipe_needs_it() -> None:
    named = networks()
    assert {("timm", "hgnetv2_b6.ssld_stage2_ft_in1k"), ("random", "resnet50d"), ("random", "resnet34d")} <= set(named)
    for (kind, name), folders in sorted(named.items()):
        cfg: Any = get_pretrained_cfg(name)  # raises for an unknown tag
        maps = "stage2_detect" in folders  # as a detector's pyramid needs them
        with torch.device("meta"):
            net: Any = timm.create_model(name, pretrained=False, features_only=maps)
        if maps:
            assert {4, 8, 16, 32} <= set(net.feature_info.reduction()), name
        if kind == "timm":
            assert cfg.has_weights, name
            assert cfg.num_classes == 1000, name  # as the folders of ImageNet-1k in the recipes
            assert maps or net.num_classes == 1000, name
