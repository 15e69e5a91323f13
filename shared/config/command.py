"""Common frame of the entry scripts: parse settings, set threads, and turn a user's mistake into one line and exit code 2."""

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ssld.shared.config.launcher import launched_number, launched_ranks, stop_with_runner
from ssld.shared.config.settings import ConfigT, parse_config
from ssld.shared.config.system_faults import another_ended, explained, system_fault
from ssld.shared.config.validation import validate
from ssld.shared.config.yaml_files import merge, nested, read_recipe, recipe_file, spelled_out, without_others
from ssld.shared.errors import STOPPED, USER_ERROR, Stopped, UserError
from ssld.shared.machine import default_threads
from ssld.shared.noise import libraries_told_apart
from ssld.shared.terminal import say, silence

_NOBODY_READS = 128 + signal.SIGPIPE
_ANOTHER_ENDED = (
    "another process of this run has ended: see its message, or the signal that the launcher names; "
    "the same command goes on from what has been written"
)
# Held by `call_command`: threads, loggers and accelerate's state belong to the whole process.
_running = threading.Lock()


def run_command(
    config_type: type[ConfigT],
    work: Callable[[ConfigT], None],
    argv: Sequence[str] | None,
    *,
    program: str,
    torch_threads: bool = True,
) -> int:
    """Run `work(config)` and return the exit code: 0 done, 2 a user's mistake, 143 stopped by a signal with a checkpoint written.

    A command that does not use torch passes `torch_threads=False` and starts faster.
    """
    rank, processes = 0, 1
    called = Path(sys.argv[0])
    if called.name == "ssld" or called.parts[-2:] == ("ssld", "__main__.py"):  # which calls this by another name
        program = f"ssld {sys.argv[1]}"
    output: Path | None = None
    auto_batch: bool | None = None  # of a training command
    stop_with_runner()
    try:
        rank, processes = launched_ranks()
        config = parse_config(config_type, _worded(sys.argv[1:] if argv is None else argv), program=program)
        output, auto_batch = config.output, getattr(config, "auto_batch", None)
        with libraries_told_apart(verbose=config.verbose):
            if torch_threads:
                _set_threads(config.threads)
            work(config)
    except UserError as error:
        return _report(str(error), rank, processes, output)
    except (OSError, EOFError, RuntimeError, MemoryError) as error:
        message = system_fault(error, output, auto_batch)
        if message is None and not (processes > 1 and another_ended(error)):
            raise
        if message is None:  # this traceback would hide why
            say(f"[rank {rank}] {_ANOTHER_ENDED}", sys.stderr)
            return 1
        return _report(str(UserError(message)), rank, processes, output)
    except KeyboardInterrupt:
        if rank == 0:
            say("stopped; the same command begins again, and goes on from what it has written", sys.stderr)
        return STOPPED
    except Stopped as error:
        if rank == 0:
            say(f"stopped: {error}; the same command goes on from there", sys.stderr)
        return STOPPED
    return 0


def call_command(
    config_type: type[ConfigT],
    work: Callable[[ConfigT], None],
    config: ConfigT | str | Path | None,
    settings: dict[str, Any],
) -> ConfigT:
    """Run `work(config)` in the caller's process, as `run_command` does for a command line, and return the configuration it ran with.

    The work runs with gradients and float32 as the default type, whatever the caller has set. Afterwards torch's number of threads and default type
    and accelerate's state are what they were before.

    Args:
        config: a configuration, a YAML file, the name of a shipped recipe, or None for `settings` alone.
        settings: settings that override it, as nested dicts or by dotted key.

    Raises:
        UserError: a mistake the user can fix, or another run in progress in this process; also where the command would end with exit code 2 for
            memory or disk that ran out.
        Stopped: after Ctrl-C or SIGTERM, with a checkpoint written.
    """
    import torch

    resolved = _resolved(config_type, config, settings)
    if not _running.acquire(blocking=False):
        raise UserError("another run is in progress in this process; wait for it, or start this one in another process")
    threads, dtype, on_child = torch.get_num_threads(), torch.get_default_dtype(), signal.getsignal(signal.SIGCHLD)
    try:
        torch.set_default_dtype(torch.float32)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _own_accelerate_state(),
            libraries_told_apart(verbose=resolved.verbose),
        ):
            _set_threads(resolved.threads)
            work(resolved)
    except (OSError, EOFError, RuntimeError, MemoryError) as error:
        message = system_fault(error, resolved.output, getattr(resolved, "auto_batch", None))
        if message is None:
            raise
        raise UserError(message) from error
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        _running.release()
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGCHLD, on_child)
    return resolved


def _resolved(config_type: type[ConfigT], config: ConfigT | str | Path | None, settings: dict[str, Any]) -> ConfigT:
    over: dict[str, Any] = {}
    for key, value in settings.items():
        over = merge(over, nested(key.split("."), _plain(value)))
    over = spelled_out(over, config_type.short_forms)
    below: dict[str, Any] = {}
    if isinstance(config, config_type):
        # What was left out follows from all settings, these and those over them.
        below = config.model_dump(exclude_unset=True)
    elif isinstance(config, str | Path):
        config = recipe_file(config, config_type.recipes)
        below = read_recipe(config, config_type.alternatives, config_type.short_forms)
    elif config is not None:
        raise TypeError(f"expected a {config_type.__name__}, a YAML file or None, got {type(config).__name__}")
    values = merge(without_others(below, config_type.alternatives, over), over)
    file = config if isinstance(config, Path) else None
    parts = [*([str(file)] if file else []), *(["the given settings"] if over or not file else [])]
    resolved = validate(config_type, values, source=" with ".join(parts), call=True)
    resolved._recipe = file
    return resolved


def _plain(value: Any) -> Any:
    """Return a value as YAML would give it: paths as text."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


@contextlib.contextmanager
def _own_accelerate_state() -> Iterator[None]:
    """Inside, accelerate starts anew: it keeps one device and precision per process, and refuses others."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    kinds = () if launched_ranks()[1] > 1 else (AcceleratorState, GradientState, PartialState)
    before = [dict(kind._shared_state) for kind in kinds]
    for kind in kinds:
        kind._shared_state.clear()
    try:
        yield
    finally:
        for kind, state in zip(kinds, before, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(state)


def _worded(argv: Sequence[str]) -> list[str]:
    """Give `--verbose` its value, which is usually left out."""
    return [
        "--verbose=true" if word == "--verbose" and after.startswith("--") else word
        for word, after in pairwise([*argv, "--"])
    ]


def exit_code(work: Callable[[], int]) -> int:
    """Return the exit code of `work`, for a command without a run directory: its own, 2 after a user's mistake, printed in one line or more, or 143
    after a signal that raised Stopped."""
    try:
        return work()
    except UserError as error:
        return _report(str(error), 0, 1, None)
    except Stopped as error:
        say(str(error), sys.stderr)
        return STOPPED
    except BrokenPipeError:  # as in `ssld inspect FILE | head`: the reader needs no more
        silence(sys.stdout)
        return _NOBODY_READS
    except OSError as error:
        message = explained(error, None)
        if message is None:
            raise
        return _report(str(UserError(message)), 0, 1, None)


def _report(message: str, rank: int, processes: int, output: Path | None) -> int:
    printed = rank == 0
    # A launcher buries its children's output and changes their exit code: leave the line where the runner finds it. The main rank's line wins;
    # another rank's is printed only if it came first, since most mistakes occur on all ranks alike.
    if processes > 1 and output is not None and output.is_dir():
        record = json.dumps({"error": message, "exit_code": USER_ERROR}) + "\n"
        try:
            with (output / "error.json").open("w" if rank == 0 else "x", encoding="utf-8") as file:
                file.write(record)
            printed = True
        except OSError:
            pass
    for line in message.split("\n") if printed else []:
        say(f"{'' if rank == 0 else f'[rank {rank}] '}error: {line}", sys.stderr)
    return USER_ERROR


def _set_threads(threads: int | None) -> None:
    import torch

    launched_number("LOCAL_WORLD_SIZE", 1)  # a user's mistake where it is no number
    torch.set_num_threads(default_threads(threads)[0])
