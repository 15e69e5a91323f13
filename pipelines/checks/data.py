"""Data checks of `ssld doctor`: detection data by the data check of stage 2, images without boxes by opening them.

The data check runs in a separate process, so that a broken torch cannot crash the doctor. Images without boxes are those for distillation, curation
and classification, and a detector's unlabeled ones. Does not import torch.
"""

import hashlib
import io
import json
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ssld.pipelines.checks.machine import Line
from ssld.pipelines.config import ROOT
from ssld.pipelines.folder import shown
from ssld.shared.config.settings import CommandConfig
from ssld.shared.files import escaped, is_pattern, list_images, spread
from ssld.shared.tally import Tally
from ssld.shared.wording import count
from ssld.stage1_ssld.config import CurateConfig, PrototypesConfig, SoftLabelsConfig, Stage1Config
from ssld.stage1_ssld.data_config import SourceConfig
from ssld.stage2_detect.config import TrainConfig
from ssld.stage2_detect.data_config import as_list

DataSet = tuple[str, ...]
"""words of the command line of `check_data.py` that name the files of a data set"""


class DataNeeds(NamedTuple):
    """Requirements of training on a data set: masks in the annotations; whether bulk loss is allowed."""

    masks: bool
    allow_loss: bool


FLAGS = ("annotations", "images", "val_annotations", "val_images")
"""flags of `check_data.py` for the files of a data set"""
MOST = 5000
"""images opened per folder at most, evenly spread"""


def check_data(places: Sequence[Path | None], *more: str) -> tuple[int, dict[str, Any] | None]:
    """Run `check_data.py`, which prints to the terminal; return (exit code, report or None if it wrote none).

    Args:
        places: files and folders in the order of FLAGS.
        more: further words of its command line.
    """
    return check_words(words_of({name: [path] for name, path in zip(FLAGS, places, strict=True) if path}), *more)


def words_of(paths: Mapping[str, Sequence[object]]) -> DataSet:
    """Return the words that name the files and folders of each flag; a flag without any is left out."""
    return tuple(word for name, several in paths.items() if several for word in (f"--{name}", *map(str, several)))


def check_words(given: Sequence[str], *more: str) -> tuple[int, dict[str, Any] | None]:
    """Do the work of `check_data` for a data set named by words of the command line."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        code = run_script([*given, *more, "--report", str(report)])
        return code, json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None


def run_script(words: list[str]) -> int:
    """Run the data check with these arguments; return its exit code."""
    script = str(ROOT / "stage2_detect" / "check_data.py")
    sys.stdout.flush()
    return subprocess.run([sys.executable, "-W", "ignore", script, *words], check=False).returncode


def sources_of(config: CommandConfig) -> tuple[list[Path], list[str]]:
    """Return (existing folders of images without boxes that a command reads; its other sources: patterns, and files such as lists and Parquet)."""
    sources: list[SourceConfig] = []
    paths: list[Path] = []
    if isinstance(config, Stage1Config | SoftLabelsConfig):
        sources = [*config.data.train, *([config.data.val] if config.data.val else [])]
    elif isinstance(config, CurateConfig):
        sources = [*config.pool, *config.train, *config.val]
    elif isinstance(config, PrototypesConfig):
        sources = config.pool
    elif isinstance(config, TrainConfig):
        paths = [
            *(as_list(config.unlabeled) if config.unlabeled else []),
            *(config.moving_teacher.sources if config.moving_teacher else []),
        ]
    every = dict.fromkeys([*(source.path for source in sources), *map(str, paths)])
    folders = [Path(one) for one in every if Path(one).is_dir()]
    return folders, [one for one in every if Path(one).is_file() or is_pattern(one)]


def folder_lines(folder: Path, *, most: int = MOST) -> list[Line]:
    """Report how many images a folder has, how many cannot be read, and how many are copies; no lines for a folder without images."""
    tally = Tally()
    names = list_images(folder, tally=tally)
    if not names:
        return []
    opened = [names[place] for place in spread(len(names), most)]
    broken: list[str] = []
    digests: Counter[bytes] = Counter()
    for name in opened:
        try:
            content = (folder / name).read_bytes()
            with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
                image.load()
        except Exception:  # Pillow's decoders raise many kinds of exceptions
            broken.append(name)
        else:
            digests[hashlib.sha256(content).digest()] += 1
    place = shown(folder)
    text = f"{place}: {count(len(names), 'image')}"
    lines = [Line("ok", "images", text + (f", {most:,} of them were opened" if len(opened) < len(names) else ""))]
    if loss := tally.bulk_loss():
        lines.append(Line("fault", "images", f"{place}: {loss}: training stops unless data.allow_loss is true"))
    elif dropped := tally.describe():
        lines.append(Line("warning" if tally.dropped("image") else "note", "images", f"{place}: {dropped}"))
    if broken:
        stops = len(broken) > 1 and len(broken) > 0.01 * len(opened)
        effect = "training stops: more than 1 %" if stops else "training skips them"
        which = f"{count(len(broken), 'image')} of {len(opened):,} cannot be read ({escaped(broken[0])})"
        lines.append(Line("fault" if stops else "warning", "images", f"{place}: {which}: {effect}"))
    copies = sum(digests.values()) - len(digests)
    if copies:
        lines.append(Line("note", "images", f"{place}: {count(copies, 'image')} with the same content as another file"))
    return lines
