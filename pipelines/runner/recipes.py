"""The shipped recipes and pipelines: a line on each with its published score, image size, cost and purpose.

`ssld recipes` prints them. Score and size come from the settings (`expected`, `resize`, `image_size`), the rest from the comment at the top of the
file. Does not import torch.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ssld.pipelines.runner.stages import ROOT
from ssld.shared.config.yaml_files import read_recipe, read_settings
from ssld.stage1_ssld.config import RECIPES as BACKBONES
from ssld.stage1_ssld.config import DistillConfig
from ssld.stage2_detect.config import RECIPES as DETECTORS
from ssld.stage2_detect.config import ResizeConfig, TrainConfig

PIPELINES = ROOT / "pipelines"
_TOP1 = re.compile(r"Published: (?:[\d.]+ -> )?([\d.]+) top-1")
_SOURCE_AP = re.compile(r"Published for the source's version: ([\d.]+) AP")
_HOURS = re.compile(r"Cost: about (\d+) V100 hours")
_COST_OF = re.compile(r"Cost: (?:on COCO )?as (\w+)\.yaml[.;]")
_END = re.compile(r" \(arXiv [\d.]+;|\. (?=[A-Z])|; |\.$")


class Recipe(NamedTuple):
    """A shipped YAML file.

    Attributes:
        score: published score, such as `41.4 AP` or `82.07 top-1`; empty without one.
        size: sides of the evaluated images in pixels, such as `800 px`.
        cost: published or estimated time, such as `41 V100 h`; empty where none is known.
        purpose: first sentence of its comment.
    """

    name: str
    score: str
    size: str
    cost: str
    purpose: str


def recipe_list() -> str:
    """Format all shipped recipes, grouped by the command that takes them by name."""
    groups = [
        ("detectors: ssld train --config NAME", DETECTORS.glob("*.yaml")),
        ("backbones: ssld distill --config NAME (toy_teacher: ssld teach)", BACKBONES.glob("*.yaml")),
        ("pipelines: ssld run NAME", PIPELINES.rglob("*.yaml")),
    ]
    lines = ["score: published, not reproduced here; size: side of the images; hours: published or estimated, on COCO"]
    for title, files in groups:
        lines += ["", title, *_table([describe(file) for file in sorted(files, key=lambda file: file.stem)])]
    return "\n".join(lines)


def describe(file: Path) -> Recipe:
    """Read the line of one shipped file."""
    about = _comment(file)
    if file.parent == DETECTORS:
        values = read_recipe(file, TrainConfig.alternatives)
        expected = values.get("expected") or {}
        scores = [str(expected[key]) for key in ("AP", "AP_segm") if key in expected]
        if not scores and (source := _SOURCE_AP.search(about)):
            scores = [source[1]]
        score = f"{' / '.join(scores)} AP" if scores else ""
        sides = [(values.get("resize") or {}).get("short_side", ResizeConfig().short_side)]
    else:
        top1 = _TOP1.search(about)
        score = f"{top1[1]} top-1" if top1 else ""
        one = file.parent == BACKBONES
        values = read_recipe(file, DistillConfig.alternatives) if one else read_settings(file)
        sides = sorted(set(_sides(values)))
    purpose = _END.split(about, maxsplit=1)[0].replace(".yaml", "")
    return Recipe(file.stem, score, f"{', '.join(map(str, sides))} px" if sides else "", _cost(about), purpose)


def _comment(file: Path) -> str:
    """Return the text of the comment at the top of a file, without its command line."""
    lines: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("#  "):
            lines.append(line.removeprefix("#").strip())
    return " ".join(line for line in lines if line)


def _cost(about: str) -> str:
    other = _COST_OF.search(f"{about};")
    hours = _HOURS.search(_comment(DETECTORS / f"{other[1]}.yaml") if other else about)
    return f"{hours[1]} V100 h" if hours else ""


def _sides(values: Any, key: str = "") -> Iterator[int]:
    """Yield the image sizes in the settings of a recipe, or of the stages of a pipeline and their recipes."""
    if isinstance(values, dict):
        for name, inner in values.items():
            yield from _sides(inner, str(name))
    elif key.rpartition(".")[2] in ("image_size", "short_side") and isinstance(values, int):
        yield values
    elif key == "config" and isinstance(values, str) and (ROOT / values).is_file():
        yield from _sides(read_recipe(ROOT / values))


def _table(recipes: Sequence[Recipe]) -> list[str]:
    widths = [max(len(one[column]) for one in recipes) for column in range(4)]
    return [
        "  " + "  ".join([*(f"{text:<{width}}" for text, width in zip(one, widths, strict=False)), one.purpose])
        for one in recipes
    ]
