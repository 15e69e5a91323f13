"""Messages of other libraries go to the log of the run instead of the terminal, unless `--verbose` is set.

This covers messages through Python's logging and warnings: timm's unexpected keys, the hub's retries. Progress bars of downloads are switched off.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# They attach a handler of their own to the terminal when they are imported, which is later than this.
_HANDLERS_OF_THEIR_OWN = ("huggingface_hub", "datasets")
_NO_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


class _Sink(logging.Handler):
    """Keep lines until the log file is known."""

    def __init__(self, *, verbose: bool) -> None:
        super().__init__(logging.INFO if verbose else logging.WARNING)
        self._verbose, self._file, self._waiting = verbose, Path(), list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        line = f"[{record.name}] {' '.join(record.getMessage().split())}\n"
        if self._verbose:
            sys.stderr.write(line)
        if self._file == Path():
            self._waiting.append(line)
        else:
            self._write(line)

    def keep_in(self, file: Path) -> None:
        self._file = file
        self._write("".join(self._waiting))
        self._waiting.clear()

    def _write(self, text: str) -> None:
        if text:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(text)


@contextmanager
def libraries_told_apart(*, verbose: bool) -> Iterator[None]:
    """Context manager: messages of libraries go to the file that `keep_noise_in` names, and to the terminal if `verbose`."""
    root, sink = logging.getLogger(), _Sink(verbose=verbose)
    loggers = {name: logging.getLogger(name) for name in _HANDLERS_OF_THEIR_OWN}
    before = {name: (list(logger.handlers), logger.propagate) for name, logger in loggers.items()}
    bars = {name: os.environ.get(name) for name in _NO_BARS}
    for logger in loggers.values():
        logger.handlers, logger.propagate = [], True
        vars(logger)["addHandler"] = lambda handler: None
    if not verbose:
        os.environ.update(dict.fromkeys(_NO_BARS, "1"))
    root.addHandler(sink)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(sink)
        for name, logger in loggers.items():
            vars(logger).pop("addHandler", None)
            logger.handlers, logger.propagate = before[name]
        for name, value in bars.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def keep_noise_in(file: Path) -> None:
    """Append the messages of libraries, those so far and all later ones, to a file."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Sink):
            handler.keep_in(file)
