"""A stage that does no work, for the tests of the runner: run by path as a process, or in-process through `main`."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import ClassVar

from pydantic import Field

from ssld.shared.config.command import run_command
from ssld.shared.config.settings import CommandConfig, Config, dump
from ssld.shared.errors import Stopped, UserError
from ssld.shared.run_dir import RunDir


class Metrics(Config):
    """Metrics that the stage reports."""

    top1: float | None = None
    agreement: float | None = None
    AP: float | None = None
    AP50: float | None = None


class FakeConfig(CommandConfig):
    """Copy a file, or fail as configured."""

    may_change: ClassVar[frozenset[str]] = frozenset({"steps"})

    source: Path | None = None
    sources: list[Path] = []
    text: str = ""
    steps: int = Field(1, ge=1)
    seed: int = 0
    resume: str = "auto"
    metrics: Metrics = Metrics()
    ends: str = "well"
    """how the stage ends: success, a user error, a crash, no result, or waiting for a signal"""

    def inputs(self) -> dict[str, Path]:
        files = {f"sources.{number}": file for number, file in enumerate(self.sources)}
        return files | ({"source": self.source} if self.source else {})


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(FakeConfig, work, argv, program="fake_stage.py", torch_threads=False)


def work(config: FakeConfig) -> None:
    run = RunDir(config, "fake")
    run.log(f"working in {run.path.name}")
    if config.ends == "user error":
        raise UserError("images: no such folder; give another")
    if config.ends == "wrong key":
        raise UserError("text: not allowed")
    if config.ends == "crash":
        for number in range(40):
            print(f"line {number}")
        raise RuntimeError("a bug")
    if config.ends == "no result":
        return
    if config.ends == "waiting":
        wait_for_signal(run)
    text = config.source.read_text() if config.source else ""
    file = run.path / "out.txt"
    file.write_text(text + config.text + os.environ.get("FAKE_STAGE_CHANCE", ""))
    measured = {name: value for name, value in dump(config.metrics).items() if value is not None}
    run.finish({"steps": config.steps, **measured}, [file])
    run.close()


def wait_for_signal(run: RunDir) -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        (run.path / "stopped").write_text(str(number))
        raise Stopped(f"signal {number}")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    run.log(f"group {os.getpgid(0) == os.getpid()}")
    (run.path / "ready").touch()
    time.sleep(60)


if __name__ == "__main__":
    sys.exit(main())
