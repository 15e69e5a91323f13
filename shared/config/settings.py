"""Strict configuration: a YAML file first, typed flags on top, and nothing else.

Flags are generated from the pydantic models by pydantic-settings; environment variables, dotenv files and secrets are deliberately not read. An
unknown key or flag is an error that names the nearest known one. This module does not import torch, so that `--help` and the runner stay fast.
"""

import re
import sys
import typing
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, PrivateAttr, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from ssld.shared.config.annotations import fields_at, kinds_in, models_in
from ssld.shared.config.bounds import Processes
from ssld.shared.config.flag_values import read_flags
from ssld.shared.config.help import HelpAction, settings_help
from ssld.shared.config.validation import validate
from ssld.shared.config.words import underscored, with_short_forms, with_values
from ssld.shared.config.yaml_files import (
    NO_SHORT_FORMS,
    Alternatives,
    ShortForms,
    read_recipe,
    recipe_file,
    without_others,
)
from ssld.shared.errors import UserError
from ssld.shared.wording import did_you_mean

# Settings that do not change a run's identity: where it writes, how fast it runs, what it logs.
NOT_IDENTITY = frozenset(
    {
        "output",
        "resume",
        "workers",
        "threads",
        "log_every",
        "trackers",
        "device",
        "process_timeout",
        "cache_annotations",
        "verbose",
        "look",
    }
)


class Network(NamedTuple):
    """A model reference in settings, with its requirements that are checked before data are read."""

    model: str
    arch: str | None = None
    image_size: int | None = None
    """required side in pixels; None: the model's own"""
    allow_pickle: bool = False
    """whether a state dict in a pickle is allowed"""
    classes: bool = False
    """whether it has to have classes"""


_LONGEST_NAME = 1000


def _named(text: str) -> str:
    if not text.strip():
        raise ValueError("names no model; give timm:NAME, hf-hub:ORG/NAME, a folder or a file")
    if len(text) > _LONGEST_NAME or not text.isprintable():
        raise ValueError(f"not a model name: over {_LONGEST_NAME} characters or unprintable")
    return text


ModelText = Annotated[str, AfterValidator(_named)]
"""a model reference"""


class PlainValues(BaseModel):
    """Settings in which `true` is not a number, a path is not empty, and a path of digits is text."""

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = kinds_in(cls.model_fields[info.field_name or ""].annotation)
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, bool) and kinds & {int, float} and bool not in kinds:
                raise PydanticCustomError("int_type" if int in kinds else "float_type", "has to be a number")
            if isinstance(one, str) and "\0" in one:
                raise PydanticCustomError("nul", "holds a NUL character")
            if one == "" and Path in kinds:
                raise PydanticCustomError("empty_path", "names no file or folder")
            if isinstance(one, float | bool) and Path in kinds and not kinds & {int, float, bool}:
                raise PydanticCustomError("path_type", "has to be a path; put a name like that in quotes")
        if Path in kinds and isinstance(value, list):
            return [str(one) if type(one) is int else one for one in value]
        return str(value) if Path in kinds and type(value) is int else value


class Config(PlainValues):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class CommandConfig(PlainValues, BaseSettings):
    """Settings of one command; every command writes into one run directory."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_parse_none_str="null",
        cli_enforce_required=False,
    )
    output: Path
    """run directory to create, or to resume"""
    threads: Processes | None = None
    """CPU threads per process; null: cores / processes on this machine"""
    verbose: bool = False
    """print the messages of other libraries too; by default they go to log.txt only"""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    recipes: ClassVar[Path | None] = None
    """folder of the shipped recipes of this command, which --config takes by name"""
    other_names: ClassVar[Mapping[str, str]] = {}
    """keys by the names that other programs have for them, for suggestions"""
    alternatives: ClassVar[Alternatives] = ()
    """groups of keys that exclude each other; one on the command line replaces another of the file"""
    short_forms: ClassVar[ShortForms] = NO_SHORT_FORMS
    """groups that may be given as one text, by the key in them that it stands for: `--data PATH` is `--data.source PATH`"""
    may_change: ClassVar[frozenset[str]] = frozenset()
    """keys that may differ between two starts of one run: the change is printed and recorded"""
    may_change_before_the_end: ClassVar[frozenset[str]] = frozenset()
    """keys that may differ between two starts while the run is not finished"""

    _recipe: Path | None = PrivateAttr(None)

    @property
    def recipe(self) -> Path | None:
        """Return the YAML file of the settings, None without one; it is not a setting itself."""
        return self._recipe

    def inputs(self) -> dict[str, Path]:
        """Files and folders this command reads, by the key that names them: their digests belong to the run's identity."""
        return {}

    def networks(self) -> dict[str, Network]:
        """Networks this command reads, by the key that names them."""
        return {}

    def hub_data(self) -> dict[str, str]:
        """Data sets of the Hugging Face hub this command reads, `hub:ORG/NAME` by the key that names them."""
        return {}

    def published_weights(self) -> dict[str, str]:
        """Published weights this command reads, `url:ADDRESS` by `KEY: NAME` as in the settings."""
        return {}

    def remote_references(self) -> dict[str, str]:
        """Everything this command may have to download: models, data sets, published weights."""
        return (
            {key: network.model for key, network in self.networks().items()}
            | self.hub_data()
            | self.published_weights()
        )


ConfigT = TypeVar("ConfigT", bound=CommandConfig)


class Parser(ArgumentParser):
    """An argument parser whose mistakes are UserErrors of one line each; an unknown flag names the nearest known one."""

    config_type: "type[CommandConfig] | None" = None
    """whose keys its flags are"""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line. Raises UserError, with a line for each flag that is unknown, for everything that is wrong in it."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise self._unknown(unknown)
        return parsed

    def _unknown(self, words: list[str]) -> UserError:
        flags = [word.split("=")[0] for word in words if re.match("-+[A-Za-z]", word)]
        if not flags:
            if len(words) > 1:  # mostly the files of a pattern that the shell has expanded
                return UserError(
                    f"{words[0]} and {len(words) - 1:,} more: no flag before them; a flag takes one value: put a pattern such as '*.jpg' in quotes, "
                    "and commas between the items of a list (--help lists the flags)"
                )
            return UserError(f"{words[0]}: no flag before it; give it as --NAME {words[0]} (--help lists the flags)")
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        names = self.config_type.other_names if self.config_type else {}
        others = {f"--{name}": f"--{key}" for name, key in names.items()}
        hints = {flag: self._in_a_list(flag) or did_you_mean(flag, known, others) for flag in flags}
        more = "; --help all lists them" if self.config_type else ""
        return UserError(*(f"{flag}: unknown flag{hint}{more * (' of ' in hint)}" for flag, hint in hints.items()))

    def _in_a_list(self, flag: str) -> str:
        """Return the hint on a flag for a setting of the groups in a list, which has no flag of its own; empty for another flag."""
        *outer, inner = flag.removeprefix("--").split(".")
        if not outer or not self.config_type or not fields_at(self.config_type, [*outer, inner]):
            return ""
        models = [model for field in fields_at(self.config_type, outer) for model in models_in(field.annotation)]
        needed = [name for model in models for name, field in model.model_fields.items() if field.is_required()]
        keys = ", ".join(f'"{name}": ...' for name in dict.fromkeys([*needed, inner]))
        name = ".".join(outer)
        return f"; {name} is a list, whose groups are given whole: --{name} '[{{{keys}}}]'"

    def error(self, message: str) -> typing.NoReturn:
        """Raise UserError for a mistake that argparse has found; its text is all that argparse gives of it."""
        if wrong := re.fullmatch(r"argument (\S+): invalid (float|int) value: '(.*)'", message):
            raise UserError(f"{wrong[1]} {wrong[3]}: has to be a {'whole ' * (wrong[2] == 'int')}number")
        if message.startswith("the following arguments are required"):
            self.print_usage(sys.stderr)
        raise UserError(message)


def parse_config(config_type: type[ConfigT], argv: Sequence[str], *, program: str) -> ConfigT:
    """Parse a command line to a configuration.

    `--config FILE` (or the name of a shipped recipe) and its bases come first, flags on top; `--print-config` prints the result as YAML and exits.
    Raises UserError with one line per wrong key.
    """
    bare = not argv
    argv = with_short_forms([underscored(word) for word in argv], config_type.short_forms)
    parser = settings_parser(config_type, program)
    given = vars(parser.parse_args(with_values(config_type, argv)))
    recipe, printed = given.pop("config"), given.pop("print_config")
    flags = read_flags(config_type, given)
    file = recipe_file(recipe, config_type.recipes) if recipe else None
    values = read_recipe(file, config_type.alternatives, config_type.short_forms) if file else {}
    values = without_others(values, config_type.alternatives, flags)
    if bare and any(field.is_required() for field in config_type.model_fields.values()):
        print(settings_help(parser, config_type, needed_alone=True), file=sys.stderr)
    config = validate(config_type, values, source=str(file or "command line"), flags=flags)
    config._recipe = file
    if printed:
        print(dump_yaml(config), end="")
        raise SystemExit(0)
    return config


def settings_parser(config_type: type[CommandConfig], program: str) -> Parser:
    """Return the parser of a command with a flag for each of its settings: it splits a command line into texts by dotted key."""
    parser = Parser(prog=program, description=config_type.__doc__, allow_abbrev=False, add_help=False)
    parser.config_type = config_type
    parser.add_argument("-h", "--help", action=HelpAction)
    what = "YAML file, or name of a shipped recipe (ssld recipes)," if config_type.recipes else "YAML file"
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"{what} with settings; flags override it")
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and exit")
    CliSettingsSource[ArgumentParser](config_type, root_parser=parser)
    return parser


def dump(config: BaseModel) -> dict[str, Any]:
    """Convert the resolved settings to plain JSON values."""
    values: dict[str, Any] = config.model_dump(mode="json")
    return values


def dump_yaml(config: BaseModel) -> str:
    """Convert the resolved settings to YAML that reads back to the same configuration."""
    return yaml.safe_dump(dump(config), sort_keys=False, allow_unicode=True)


def identity(config: BaseModel) -> dict[str, Any]:
    """Return the settings that identify a run: the resolved ones without `NOT_IDENTITY`."""
    return {key: value for key, value in dump(config).items() if key not in NOT_IDENTITY}


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, old, new) of every difference between two dumped configurations; the groups of a list have its numbers as keys."""
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
            before, after = _by_number(before), _by_number(after)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}", before, after


def _by_number(items: list[Any]) -> Any:
    """Return the groups of a list by their number, and any other list as it is."""
    groups = bool(items) and all(isinstance(one, dict) for one in items)
    return {str(number): one for number, one in enumerate(items)} if groups else items
