"""`ssld completion bash|zsh`: a shell script that completes sub-commands, flags and the values of flags with fixed choices.

    eval "$(ssld completion bash)"        # in ~/.bashrc
    eval "$(ssld completion zsh)"         # in ~/.zshrc, after compinit

shtab generates it from the commands' own parsers, so that completion does not start Python. A separate module because cli.py must not import the
settings of all commands. Does not import torch.
"""

from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Iterator, Mapping

import shtab

from ssld.shared.config.help import choices_of
from ssld.shared.errors import UserError

SHELLS = ("bash", "zsh")


def completion_script(shell: str, commands: Mapping[str, str]) -> str:
    """Return the script for one shell; `commands` is {name: help line}. Raises UserError for an unknown shell."""
    if shell not in SHELLS:
        raise UserError(f"ssld completion {shell}: expected {' or '.join(SHELLS)}")
    flags: dict[str, list[ArgumentParser]] = defaultdict(list)
    for name, parser in parsers():
        flags[name].append(parser)
    whole = ArgumentParser(prog="ssld")
    branches = whole.add_subparsers()
    for name, about in commands.items():
        branch = branches.add_parser(
            name, help=about, parents=flags[name], add_help=False, conflict_handler="resolve"
        )  # commands that dispatch by file get the flags of all kinds
        if name == "completion":
            branch.add_argument("shell", choices=SHELLS)
        if name == "inspect":
            branch.add_argument("path")
        for action in branch._actions:
            action.choices = choices_of(action) or None
            if action.choices is None and action.nargs != 0:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(whole, shell)


def parsers() -> Iterator[tuple[str, ArgumentParser]]:
    """Yield (command, parser) for every command with flags; commands that dispatch by file have one parser per kind."""
    from ssld.pipelines import doctor, init, run
    from ssld.pipelines.runner.stages import KINDS, typed_name
    from ssld.shared.config.settings import settings_parser

    yield from (("run", run.parser()), ("doctor", doctor.parser()), ("init", init.parser()))
    for name, kind in KINDS.items():
        yield typed_name(name), settings_parser(kind.config_type, name)
