"""`--help` in three levels: required and common settings, one group, all. Does not import torch.

--help          the settings that a run needs and those that are set most often, and a line on every group of the others
--help GROUP    the settings of a group, as `--help optim` or `--help model.roi`
--help all      all of them
"""

import argparse
import copy
import difflib
import re
import shutil
import typing
from collections.abc import Iterator, Sequence

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ssld.shared.config.annotations import fields_at, models_in
from ssld.shared.errors import UserError

# fmt: off
COMMON = (
    "config", "model", "model.model", "student.model", "teacher.model", "backbone", "init", "data", "data.path",
    "source", "weights", "pool", "data.source", "data.train", "data.val", "data.train_annotations", "data.train_images",
    "data.val_annotations", "data.val_images", "annotations", "images", "compare", "unlabeled", "pseudo", "distill.teacher",
    "store", "keep", "count", "output", "steps", "train_epochs", "train_images", "batch_size", "data.image_size", "image_size",
    "model.kind", "optim.name", "optim.lr", "optim.warmup_steps", "optim.warmup_epochs", "precision", "workers",
    "evaluate_every", "patience", "score_threshold", "write", "tile", "device", "print_config",
)
# fmt: on
"""common keys, in the order of the help; a command has some of them"""
_NUMBER = "int,float"  # the types of a length in steps or as a fraction, no choices
_NOISE = re.compile(r"\s*\((default: null|required|ifdef: required)\)$")
"""what pydantic-settings appends to a description"""


class HelpAction(argparse.Action):
    """`--help [GROUP]`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: typing.Any) -> None:
        text = "print the help of a run, of a group of settings, or (all) of every setting"
        super().__init__(
            option_strings, dest, nargs="?", const="", default=argparse.SUPPRESS, metavar="GROUP", help=text
        )

    def __call__(self, parser: argparse.ArgumentParser, *values: typing.Any) -> None:
        print(settings_help(parser, getattr(parser, "config_type", None), values[1]), end="")
        parser.exit()


def settings_help(
    parser: argparse.ArgumentParser, config_type: type[BaseModel] | None, group: str = "", *, needed_alone: bool = False
) -> str:
    """Format the help of a parser whose flags are the keys of `config_type`; with `needed_alone` only the required settings.

    Args:
        group: dotted name of a group of settings, `all`, or empty for the required and common ones.

    Raises UserError for a group that it does not have.
    """
    page = _Page(parser, config_type)
    if group and group != "all":
        return page.of_group(group)
    page.formatter.add_text(f"usage: {parser.prog} [--config FILE] [--KEY VALUE ...]")
    page.formatter.add_text(parser.description)
    if group == "all":
        return page.of_all()
    return page.of_required() if needed_alone else page.overview()


class _Page:
    """The help of a command, made section by section.

    Attributes:
        formatter: has the sections so far.
    """

    def __init__(self, parser: argparse.ArgumentParser, config_type: type[BaseModel] | None) -> None:
        width = max(60, min(120, shutil.get_terminal_size((120, 24)).columns - 2))
        self.formatter = argparse.HelpFormatter(parser.prog, max_help_position=36, width=width)
        self._program, self._config_type = parser.prog, config_type
        self._by_key = dict(flags_of(parser))
        self._groups = _groups(config_type, self._by_key)

    def of_group(self, group: str) -> str:
        """Format one group with the groups inside it. Raises UserError for an unknown one."""
        keys = [key for key in self._by_key if key == group or key.startswith(f"{group}.")]
        if not keys:
            ends = [name for name in self._groups if name.endswith(f".{group}")]
            near = ends or difflib.get_close_matches(group, self._groups, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"groups: {', '.join(self._groups)}"
            raise UserError(f"--help {group}: no such group of settings; {hint}")
        self._section(self._title(group), keys)
        self._elements(keys)
        return self.formatter.format_help()

    def of_all(self) -> str:
        """Format all settings, group by group."""
        self._section("settings", [key for key in self._by_key if "." not in key])
        for name in self._groups:
            self._section(self._title(name), [key for key in self._by_key if key.rpartition(".")[0] == name])
        self._elements(list(self._by_key))
        return self.formatter.format_help()

    def of_required(self) -> str:
        """Format the required settings alone."""
        self._required()
        self.formatter.add_text(f"{self._program} --help lists the other settings")
        return self.formatter.format_help()

    def overview(self) -> str:
        """Format the required and the common settings, the others that are in no group, and a line on each group."""
        needed = self._required()
        often = [key for key in COMMON if key in self._by_key and key not in needed]
        self._section("set most often", often)
        apart = {*needed, *often, *self._groups}
        self._section("more", [key for key in self._by_key if "." not in key and key not in apart])
        text = self.formatter.format_help()
        top = {name: value for name, value in self._groups.items() if "." not in name}
        if top:
            wide = max(map(len, top))
            lines = [f"  {name:<{wide}}  {number:>3} settings  {about}" for name, (about, number) in top.items()]
            text += "\n".join(["", "groups, shown by --help GROUP (--help all shows everything):", *lines, ""])
        return text

    def _required(self) -> list[str]:
        """Add the section of the settings that every run needs; returns their keys."""
        needed = [
            key
            for key, action in self._by_key.items()
            if "(required)" in (action.help or "") and _stands_alone(key, self._config_type)
        ]
        self._section("required, in the YAML file or as flags", sorted(needed, key=_place))
        return needed

    def _title(self, group: str) -> str:
        return f"{group}: {self._groups.get(group, ('', 0))[0]}".rstrip(": ")

    def _section(self, title: str, keys: Sequence[str]) -> None:
        """Add a section of settings, unless there are none."""
        if not keys:
            return
        self.formatter.start_section(title)
        for key in keys:
            action = copy.copy(self._by_key[key])
            action.help = _NOISE.sub("", action.help or "")
            field = _field(self._config_type, key)
            default = field.default if field else None
            if field and isinstance(default, list) and any(isinstance(element, BaseModel) for element in default):
                names = ", ".join(_short(element) for element in default)  # in place of the elements' repr
                action.help = f"{field.description} (default: [{names}])"
            self.formatter.add_argument(action)
        self.formatter.end_section()

    def _elements(self, keys: Sequence[str]) -> None:
        """Add a section for each setting among `keys` that is a list of groups: the keys of one element."""
        for key in keys:
            field = _field(self._config_type, key)
            if field is None or typing.get_origin(field.annotation) is not list:
                continue
            for model in models_in(field.annotation):
                self.formatter.start_section(f"keys of one element of {key}")
                for name, inner in model.model_fields.items():
                    about = inner.description or ""
                    if not inner.is_required() and inner.default is not None:
                        default = str(inner.default).lower() if isinstance(inner.default, bool) else inner.default
                        about += f" (default: {default})"
                    self.formatter.add_argument(argparse.Action([name], name, nargs=0, help=about.replace("%", "%%")))
                self.formatter.end_section()


def flags_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """Yield (key, action) of every flag with a value, and of every switch."""
    for action in parser._actions:
        flag = next((word for word in action.option_strings if word.startswith("--")), None)
        if flag is not None:
            yield flag[2:].replace("-", "_"), action


def choices_of(action: argparse.Action) -> list[str]:
    """Return the values of a flag, where they can be listed."""
    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    if metavar == "bool":
        return ["true", "false"]
    listed = re.fullmatch(r"(?:list\[)?\{([^{}]*)\}\]?", metavar)
    return listed[1].split(",") if listed and listed[1] != _NUMBER else []


def _short(element: BaseModel) -> str:
    """Write an element of a list in as few words as YAML takes: the value of its first key where the others have their defaults."""
    values = element.model_dump(mode="json", exclude_defaults=True)
    return str(next(iter(values.values()))) if len(values) == 1 else str(values)


def _field(config_type: type[BaseModel] | None, key: str) -> FieldInfo | None:
    """Return the field of a dotted key; None for a flag that is no setting, as --help."""
    fields = fields_at(config_type, key.split(".")) if config_type else []
    return fields[0] if fields else None


def _place(key: str) -> int:
    return COMMON.index(key) if key in COMMON else len(COMMON)


def _stands_alone(key: str, config_type: type[BaseModel] | None) -> bool:
    """Whether a required key is needed by every run: none of the groups around it can be left out."""
    groups = [key.split(".")[:depth] for depth in range(1, key.count(".") + 1)]
    around = [field for group in groups for field in (fields_at(config_type, group) if config_type else [])]
    return all(field.is_required() for field in around)


def _groups(config_type: type[BaseModel] | None, by_key: dict[str, argparse.Action]) -> dict[str, tuple[str, int]]:
    """Return {dotted name: (description, number of settings)} of the groups, in the order of their settings."""
    names = [".".join(key.split(".")[:depth]) for key in by_key for depth in range(1, key.count(".") + 1)]
    found = {}
    for name in dict.fromkeys(names):
        about = ""
        field = _field(config_type, name)
        models = models_in(field.annotation) if field else []
        if models:
            about = (models[0].__doc__ or "").strip().splitlines()[0].rstrip(".")
        found[name] = (about, sum(key.startswith(f"{name}.") for key in by_key))
    return found
