"""`ssld completion bash|zsh`: a script for the shell that completes sub-commands, flags and the values of flags that can be listed.

    eval "$(ssld completion bash)"        # in ~/.bashrc
    eval "$(ssld completion zsh)"         # in ~/.zshrc, after compinit

The words are taken from the very parsers of the commands and written into the script, so that the tab key starts no Python. Does not import torch.
"""

from argparse import ArgumentParser
from collections.abc import Iterator

from ssld.shared.config.help import choices_of, flags_of
from ssld.shared.errors import UserError

SHELLS = ("bash", "zsh")


def completion_script(shell: str, commands: list[str]) -> str:
    """The script for one shell. Raises UserError for a shell that is not known."""
    if shell not in SHELLS:
        raise UserError(f"ssld completion {shell}: expected {' or '.join(SHELLS)}")
    flags: dict[str, dict[str, list[str]]] = {name: {} for name in commands}
    for name, parser in parsers():
        flags[name].update(
            {
                flag: choices_of(action)
                for _, action in flags_of(parser)
                for flag in action.option_strings
                if flag.startswith("--")
            }
        )
    flags["completion"] = {shell: [] for shell in SHELLS}
    text = _script(flags)
    return text if shell == "bash" else f"autoload -Uz bashcompinit && bashcompinit\n{text}"


def parsers() -> Iterator[tuple[str, ArgumentParser]]:
    """(command, parser) of every command that has flags; of those that dispatch by file, one for each kind."""
    from ssld.pipelines import doctor, init, run
    from ssld.pipelines.runner.stages import KINDS
    from ssld.shared.config.settings import settings_parser

    yield from (("run", run._parser()), ("doctor", doctor.parser()), ("init", init.parser()))
    named = {
        "evaluate_backbone": "evaluate",
        "evaluate_detector": "evaluate",
        "export_backbone": "export",
        "export_detector": "export",
        "convert_backbone": "convert-paddle",
        "convert_detector": "convert-paddle-detector",
    }
    for kind, what in KINDS.items():
        yield named.get(kind, kind.replace("_", "-")), settings_parser(what.config_type, kind)


def _script(flags: dict[str, dict[str, list[str]]]) -> str:
    """A bash function; zsh runs it through bashcompinit. Where it has no words, file names are completed."""
    cases: list[str] = []
    values: dict[tuple[str, str], list[str]] = {}
    for name, words in flags.items():
        cases.append(f"    {name}) words='{' '.join(words)}';;")
        for flag, choices in words.items():
            if choices:
                values.setdefault((flag, " ".join(choices)), []).append(name)
    value_cases = [
        f"    {'|'.join(f'{name}:{flag}' for name in names)}) words='{choices}';;"
        for (flag, choices), names in values.items()
    ]
    return "\n".join(
        [
            "_ssld() {",
            '  local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words=""',
            "  COMPREPLY=()",
            '  if [ "$COMP_CWORD" -eq 1 ]; then',
            f"    COMPREPLY=($(compgen -W '{' '.join(flags)}' -- \"$current\"))",
            "    return",
            "  fi",
            '  case "${COMP_WORDS[1]}:$before" in',
            *value_cases,
            "  esac",
            '  if [ -z "$words" ] && [ "${current#-}" = "$current" ] && [ "${COMP_WORDS[1]}" != completion ]; then',
            "    return",
            "  fi",
            '  [ -n "$words" ] || case "${COMP_WORDS[1]}" in',
            *cases,
            "  esac",
            '  COMPREPLY=($(compgen -W "$words" -- "$current"))',
            "}",
            "complete -o bashdefault -o default -F _ssld ssld",
            "",
        ]
    )
