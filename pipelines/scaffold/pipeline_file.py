"""The commented YAML file of a new pipeline, from `init.yaml.jinja`. Does not import torch."""

import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import yaml

from ssld.pipelines.folder import folder_of, written_in
from ssld.pipelines.scaffold.starts import main_row, rows_of
from ssld.pipelines.scaffold.suggest import Facts, Settings
from ssld.shared.models.downloads import kind_of
from ssld.shared.wording import duration, printable
from ssld.stage1_ssld.config import LR_OF_PRETRAINED, LR_OF_RANDOM


class _Comment(str):
    """Text of a comment, written without YAML quoting."""


def pipeline_text(
    output: Path, facts: Facts, chosen: Settings, minutes: float = 60, seconds: float | None = None
) -> str:
    """Render the YAML file, with paths relative to its folder, and commands in its first lines for the current one. Every value that the template
    does not mark as a comment is written by a YAML dumper.

    Args:
        output: the YAML file.
        minutes: time that the settings fit.
        seconds: expected time of the pipeline; None before it is known.
    """
    folder = folder_of(output)
    facts, chosen = _as_seen_from(folder, facts, chosen)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, _Comment) else _dumped(value),
    )
    environment.filters["comment"] = lambda value: _Comment(printable(str(value)))
    template = environment.from_string(Path(__file__).with_name("init.yaml.jinja").read_text(encoding="utf-8"))
    networks = chosen.networks
    moving = facts.moving is not None
    rows = rows_of(facts.starts, facts.init, networks.backbone, networks.arch, moving=moving) if facts.detectors else []
    smaller = sorted((side for side in chosen.short_sides if side < chosen.short_side), reverse=True)
    sides = dict(zip(("medium_size", "small_size"), smaller, strict=False))
    return template.render(
        rows=rows,
        features=chosen.networks.random and bool(rows),
        rate=LR_OF_RANDOM if chosen.networks.random else LR_OF_PRETRAINED,
        main=main_row(rows) if rows else None,
        base=next((row for row in rows if row.baseline is None), None),
        evaluated=sorted(rows, key=lambda row: row.baseline is not None),
        titles={row.evaluation: row.title for row in rows},
        sides=sides,
        train_sides=[f"${{{name}}}" for name in (*reversed(sides), "size")],
        uses_backbone=bool(facts.unlabeled) or any(row.backbone == "${backbone}" for row in rows),
        output=output,
        command=shlex.quote(str(output)),
        elsewhere=folder != Path.cwd(),
        runs=shlex.quote(str((output.parent if folder != Path.cwd() else Path()) / "runs" / output.stem)),
        facts=facts,
        chosen=chosen,
        measured=facts.statistics,
        classes=list(facts.statistics.get("classes", [])),
        sizes=[round(100 * value) for value in facts.statistics.get("object_sizes", [])],
        minutes=minutes,
        expected="" if seconds is None else f"about {duration(seconds)}",
        machine=f"{facts.gpu[0]}, {facts.gpu[2] / 2**30:.0f} GB" if facts.gpu else f"no GPU, {facts.cores} CPU cores",
    )


def _as_seen_from(folder: Path, facts: Facts, chosen: Settings) -> tuple[Facts, Settings]:
    """Return facts and settings with relative paths as they are written in a file in `folder`."""
    paths: dict[str, Any] = {
        key: written_in(path, folder) for key, path in vars(facts).items() if isinstance(path, Path)
    }
    networks: dict[str, Any] = {
        role: str(written_in(Path(text), folder))
        for role in ("backbone", "teacher")
        if kind_of(text := getattr(chosen.networks, role)) in ("file", "folder", "path")
    }
    return replace(facts, **paths), replace(chosen, networks=replace(chosen.networks, **networks))


def _dumped(value: Any) -> str:
    """Format a value as one line of YAML that is also valid between brackets."""
    value = str(value) if isinstance(value, Path) else value
    for style in (None, '"'):  # the dumper splits long or unusual text into several lines unless it is double-quoted
        text = yaml.safe_dump([value], default_flow_style=True, default_style=style, allow_unicode=True, width=math.inf)
        if text.count("\n") == 1:
            break
    return text.strip()[1:-1]
