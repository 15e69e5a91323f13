"""Trackers of a run: TensorBoard, and through accelerate those that are programs of their own.

TensorBoard's event files lie in the run directory, so that `tensorboard --logdir runs` calls each run by its folder: `quickstart/ssld`. They hold the
curves of metrics.jsonl, and at the end the final scores (`final/AP`), the settings, and the images of the run directory.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from ssld.shared.config.settings import NOT_IDENTITY, CommandConfig, dump, dump_yaml
from ssld.shared.files import IMAGE_SUFFIXES, spread
from ssld.shared.run_dir import SPEED, RunDir

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_DETAILS = ("per_class", "orientation")  # hundreds of numbers with many classes; result.json has them
_MOST_IMAGES = 24
_LONGER_SIDE = 1024  # pixels of an image; larger ones are reduced


def start_trackers(accelerator: Accelerator, config: CommandConfig, run: RunDir) -> None:
    """Start the trackers in `config.trackers`, after the run directory is open: from then on they get every line of its metrics, and its result."""
    names: list[str] = list(getattr(config, "trackers", []))
    if any(name != "tensorboard" for name in names):
        accelerator.init_trackers("ssld", config=dict(_settings(config)))
        run.listeners.append(_AccelerateTrackers(accelerator))
    if "tensorboard" in names and run.main:
        run.listeners.append(TensorBoard(run.path, config))


class _AccelerateTrackers:
    """Trackers that accelerate has started."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def metric(self, step: int, values: Mapping[str, Any]) -> None:
        self._accelerator.log({name: value for name, value in values.items() if _is_number(value)}, step=step)

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Nothing: accelerate ends its trackers before the result is written."""


class TensorBoard:
    """Event files of one run, in its run directory; the first is created with the first line of metrics, or at the end.

    Args:
        run: the run directory.
        config: the settings, shown as text and as hyperparameters.
    """

    def __init__(self, run: Path, config: CommandConfig) -> None:
        self._run, self._config = run, config
        self._writer: SummaryWriter | None = None

    def metric(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line of metrics.jsonl; the first line makes TensorBoard hide those of an earlier attempt from its step on."""
        writer = self._open(step)
        for name, value in values.items():
            if _is_number(value):
                writer.add_scalar(_tag(name), value, step)
        writer.flush()

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write the final scores, the settings and the images, and close the file."""
        from torch.utils.tensorboard.summary import hparams

        writer = self._open(None)
        step = metrics.get("steps")
        step = step if isinstance(step, int) else 0
        overall = {name: value for name, value in metrics.items() if not name.startswith(_DETAILS)}
        scores = {f"final/{name}": value for name, value in _flat(overall) if _is_number(value)}
        for name, value in scores.items():
            writer.add_scalar(name, value, step)
        files: Any = writer.file_writer
        # SummaryWriter.add_hparams would write into a folder of its own, which TensorBoard lists as another run.
        for summary in hparams(dict(_settings(self._config)), scores):
            files.add_summary(summary)
        for file in self._images():
            self._add_image(writer, file, step)
        writer.close()

    def _open(self, step: int | None) -> "SummaryWriter":
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._run), purge_step=step)
            lines = dump_yaml(self._config).splitlines()
            code = "\n".join(f"    {line}" for line in lines)  # in Markdown, indented lines are code
            self._writer.add_text("settings", code, 0)
        return self._writer

    def _images(self) -> list[Path]:
        """Return the images of the run directory and of its `pictures`, evenly spread if there are many."""
        own = sorted(file for file in self._run.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        drawn = sorted(file for file in (self._run / "pictures").rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        return [*own, *(drawn[place] for place in spread(len(drawn), _MOST_IMAGES))]

    def _add_image(self, writer: "SummaryWriter", file: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(file) as stored:
            image = stored.convert("RGB")
        image.thumbnail((_LONGER_SIDE, _LONGER_SIDE))
        writer.add_image(
            file.relative_to(self._run).with_suffix("").as_posix(), np.array(image), step, dataformats="HWC"
        )


def _tag(name: str) -> str:
    """Return the name of a metric in TensorBoard, which groups by what stands before the slash."""
    if name.startswith("val_"):
        return f"evaluation/{name.removeprefix('val_')}"
    return f"speed/{name}" if name in SPEED else f"training/{name}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key with slashes, value) for nested values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _settings(config: CommandConfig) -> Iterator[tuple[str, bool | int | float | str]]:
    """Yield (dotted key, value) of the settings that identify the run; lists as text, without those that are null."""
    for key, value in _flat({key: value for key, value in dump(config).items() if key not in NOT_IDENTITY}):
        if value is not None:
            yield key.replace("/", "."), value if isinstance(value, bool | int | float | str) else json.dumps(value)
