"""Sheets of the first training images, `ssld doctor FILE --look DIR`: each training starts in a temporary folder and stops before its first step.

Stages whose inputs earlier stages have not written yet have no sheet. Does not import torch.
"""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ssld.pipelines.checks.machine import Line
from ssld.pipelines.checks.settings import stages_of
from ssld.pipelines.folder import shown
from ssld.pipelines.runner.launch import Signals, run_stage
from ssld.pipelines.runner.stages import Stage
from ssld.pipelines.runner.trial import with_settings, without_evaluation
from ssld.shared.config.training import TrainingConfig
from ssld.shared.errors import Stopped, UserError
from ssld.shared.run_dir import read_result
from ssld.shared.wording import some
from ssld.stage2_detect.config import TrainConfig

_SHEET = "batches.jpg"
_QUICK = {"look": True, "resume": "auto", "auto_batch": False, "compile": False, "trackers": []}


def sheet_lines(file: Path, folder: Path, variables: dict[str, str]) -> Iterator[Line]:
    """Write `folder`/STAGE.jpg for every training stage of a settings file, and yield a line on each; nothing for a file with mistakes.

    Raises UserError if the folder cannot be made, Stopped after Ctrl-C or SIGTERM.
    """
    try:
        stages = stages_of(file, variables)
        done = {stage.name for stage in stages if read_result(stage.run) is not None}
    except UserError:
        return  # the check of the settings has reported it
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--look {shown(folder)}: cannot be made ({error.strerror}); give another folder") from None
    with Signals(kill=True) as signals, tempfile.TemporaryDirectory(prefix="ssld_look_") as temporary:
        for stage in stages:
            if not isinstance(stage.config, TrainingConfig):
                continue
            absent = [str(shown(path)) for path in stage.config.inputs().values() if not path.exists()]
            if waits := sorted(stage.needs - done):
                yield Line("note", "look", f"{stage.name}: no sheet yet, it reads from {some(waits)}")
            elif absent:
                yield Line("note", "look", f"{stage.name}: no sheet, these are missing: {some(absent)}")
            else:
                yield _sheet_line(stage, Path(temporary), folder, signals)


def _sheet_line(stage: Stage, temporary: Path, folder: Path, signals: Signals) -> Line:
    """Start a training until its sheet is written, and copy it."""
    quick = _QUICK | without_evaluation(stage) | {"output": str(temporary / stage.name)}
    quick |= {"export_check": False} if isinstance(stage.config, TrainConfig) else {}
    short = replace(with_settings(stage, quick), processes=1)  # which reads the whole batch
    outcome = run_stage(short, temporary / f"{stage.name}.txt", signals, quiet=True)
    if signals.received:
        raise Stopped("stopped; the sheets of the stages before are written")
    sheet = short.run / _SHEET
    if not sheet.is_file():
        return Line("fault", "look", f"{stage.name}: {' '.join(outcome.lines)}")
    shutil.copyfile(sheet, folder / f"{stage.name}.jpg")
    return Line("ok", "look", f"{stage.name}: {shown(folder / f'{stage.name}.jpg')}")
