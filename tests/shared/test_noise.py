"""Messages of libraries: in the log of the run, on the terminal only with `verbose`."""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest

from ssld.shared.config.command import run_command
from ssld.shared.config.settings import CommandConfig
from ssld.shared.run_dir import RunDir


class Settings(CommandConfig):
    """Of a command that does nothing."""


def noisy(config: Settings) -> None:
    logging.getLogger("timm.models._builder").warning("Unexpected keys (a) found")
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(logging.StreamHandler())  # as at its import
    logging.getLogger("huggingface_hub.utils._http").warning("Retry 1/5,\nHEAD")
    run = RunDir(config, "noisy")
    logging.getLogger("datasets.load").warning("after")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("Overwriting", stacklevel=1)
    run.log("our own line")


@pytest.mark.parametrize("flags", [[], ["--verbose"], ["--verbose", "true"], ["--verbose", "--threads", "1"]])
def test_messages_of_libraries(flags: list[str], tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "run"
    argv = ["--output", str(folder), *flags]
    assert run_command(Settings, noisy, argv, program="noisy.py", torch_threads=False) == 0
    out, err = capfd.readouterr()
    assert out == "our own line\n"
    expected = [
        "[timm.models._builder] Unexpected keys (a) found",
        "[huggingface_hub.utils._http] Retry 1/5, HEAD",
        "[datasets.load] after",
    ]
    assert err.splitlines()[:3] == (expected if flags else [])
    log = (folder / "log.txt").read_text(encoding="utf-8").splitlines()
    assert log[:3] == expected
    assert "Overwriting" in log[3]
    assert log[-1] == "our own line"
    assert not any(type(handler).__name__ == "_Sink" for handler in logging.getLogger().handlers)
