"""What `ssld doctor` says of data: detection data by the data check of stage 2, pictures without boxes by opening them.

The data check runs in a process of its own, as the runner starts its stages: its answer, whatever state torch is in. Pictures without boxes are those
to distil on, to curate, to classify, and a detector's unlabeled ones. Does not import torch.
"""

import hashlib
import io
import json
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ssld.pipelines.checks.machine import Line
from ssld.pipelines.runner.stages import ROOT
from ssld.shared.config.settings import CommandConfig
from ssld.shared.files import escaped, list_images, spread
from ssld.shared.tally import Tally
from ssld.shared.wording import count
from ssld.stage1_ssld.config import CurateConfig, PrototypesConfig, SoftLabelsConfig, Stage1Config
from ssld.stage1_ssld.data_config import SourceConfig
from ssld.stage2_detect.config import TrainConfig

DataSet = tuple[Path, Path, Path | None, Path | None]
"""annotations and images for training, and for evaluation"""


class Wanted(NamedTuple):
    """What training wants of a data set."""

    masks: bool
    allow_loss: bool


FLAGS = ("annotations", "images", "val_annotations", "val_images")
"""what `check_data.py` calls them"""
MOST = 5000
"""pictures of a folder that are opened, evenly chosen"""


def check_data(places: Sequence[Path | None], *more: str) -> tuple[int, dict[str, Any] | None]:
    """(exit code, report or None where it came to none) of `check_data.py`, which prints as it always does.

    Args:
        places: in the order of FLAGS.
        more: further words of its command line.
    """
    given = [word for name, path in zip(FLAGS, places, strict=True) if path for word in (f"--{name}", str(path))]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        code = run_script([*given, *more, "--report", str(report)])
        return code, json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None


def run_script(words: list[str]) -> int:
    """Start the script and wait for it; returns its exit code."""
    script = str(ROOT / "stage2_detect" / "check_data.py")
    sys.stdout.flush()
    return subprocess.run([sys.executable, "-W", "ignore", script, *words], check=False).returncode


def folders_of(config: CommandConfig) -> list[Path]:
    """The folders of pictures that a command reads and that are there."""
    sources: list[SourceConfig] = []
    paths: list[Path] = []
    if isinstance(config, Stage1Config | SoftLabelsConfig):
        sources = [*config.data.train, *([config.data.val] if config.data.val else [])]
    elif isinstance(config, CurateConfig):
        sources = [*config.pool, *config.train, *config.val]
    elif isinstance(config, PrototypesConfig):
        sources = config.pool
    elif isinstance(config, TrainConfig) and config.unlabeled:
        paths = [config.unlabeled]
    return list(dict.fromkeys(path for path in [*(Path(one.path) for one in sources), *paths] if path.is_dir()))


def folder_lines(folder: Path, *, most: int = MOST) -> list[Line]:
    """How many pictures a folder has, how many cannot be read, and how many are copies; nothing of a folder of other files."""
    tally = Tally()
    names = list_images(folder, tally=tally)
    if not names:
        return []
    looked = [names[place] for place in spread(len(names), most)]
    broken: list[str] = []
    digests: Counter[bytes] = Counter()
    for name in looked:
        try:
            content = (folder / name).read_bytes()
            with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as picture:
                picture.load()
        except Exception:  # Pillow's decoders fail with errors of many kinds
            broken.append(name)
        else:
            digests[hashlib.sha256(content).digest()] += 1
    text = f"{folder}: {count(len(names), 'picture')}"
    lines = [Line("ok", "pictures", text + (f", of which {most:,} were looked at" if len(looked) < len(names) else ""))]
    if loss := tally.bulk_loss():
        lines.append(Line("fault", "pictures", f"{folder}: {loss}: training stops, if data.allow_loss is not true"))
    elif dropped := tally.describe():
        lines.append(Line("warning" if tally.dropped("image") else "note", "pictures", f"{folder}: {dropped}"))
    if broken:
        stops = len(broken) > 1 and len(broken) > 0.01 * len(looked)
        then = "training stops: more than 1 %" if stops else "training leaves them out"
        what = f"{count(len(broken), 'picture')} of {len(looked):,} cannot be read ({escaped(broken[0])})"
        lines.append(Line("fault" if stops else "warning", "pictures", f"{folder}: {what}: {then}"))
    copies = sum(digests.values()) - len(digests)
    if copies:
        lines.append(Line("note", "pictures", f"{folder}: {count(copies, 'picture')} there already under another name"))
    return lines
