"""Write docs/api.md from the docstrings of the functions and classes that are meant for other programs.

python docs/make_api_page.py
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ssld
from ssld.shared.errors import Stopped, UserError
from ssld.stage2_detect.data.padding import pad_images, pad_targets
from ssld.stage2_detect.detector_file import LoadedDetector
from ssld.stage2_detect.models.batch import Detections, ImageBatch, Targets
from ssld.stage2_detect.prediction.predictor import ImageDetections, predict
from ssld.stage2_detect.training.new_detector import NewDetector

PAGE = Path(__file__).resolve().parent / "api.md"
HEAD = """# Python functions

`import ssld` gives six functions. They run the code of the commands in the calling process; a mistake raises `UserError`, whose text is the
line that the command prints. Each is imported at its first use, so `import ssld` itself does not load torch. Letters at the end of a name are the
tensor's axes: `boxes_N4` has the shape [N, 4].

Type checkers do not follow the import hook of `pip install -e .`: outside the clone mypy takes every name for `Any`. Run
`MYPYPATH=/path/to/the/clone mypy --follow-imports=silent FILE`, or set `extraPaths: ["/path/to/the/clone"]` for Pyright and VS Code.

This page is written by `python docs/make_api_page.py` from the docstrings.
"""
FUNCTIONS = ("load_detector", "build_detector", "train", "distill", "register_loss", "load_backbone")
RESULTS: tuple[tuple[type, tuple[str, ...]], ...] = (
    (LoadedDetector, ("predict",)),
    (ImageDetections, ("draw", "to_supervision")),
    (NewDetector, ("forward", "unit_scale", "save")),
    (ImageBatch, ("to",)),
    (Targets, ("to",)),
    (Detections, ("where",)),
    (UserError, ()),
    (Stopped, ()),
)


def page() -> str:
    """Return the text of docs/api.md."""
    parts: list[str] = [HEAD, "## Functions\n"]
    for name in FUNCTIONS:
        parts += _entry(f"ssld.{name}", getattr(ssld, name), "###")
    parts.append("## What they return and raise\n")
    for kind, methods in RESULTS:
        parts += [f"### {kind.__name__}\n", f"`from {kind.__module__} import {kind.__name__}`\n", _text(kind)]
        parts += _fields(kind)
        for name in methods:
            parts += _entry(f"{kind.__name__}.{name}", getattr(kind, name), "####")
            if kind is LoadedDetector:  # whose docstring points to the function that it calls
                parts[-1] = _text(predict)
    parts.append("## Batches of your own\n")
    for function in (pad_images, pad_targets):
        parts += [*_entry(function.__name__, function, "###", f"from {function.__module__} import {function.__name__}")]
    return "\n".join(parts).rstrip() + "\n"


def _entry(name: str, function: Any, level: str, line: str | None = None) -> Iterator[str]:
    yield f"{level} {name}\n"
    if line:
        yield f"`{line}`\n"
    yield f"```text\n{_signature(name, function)}\n```\n"
    yield _text(function)


def _signature(name: str, function: Any) -> str:
    """Return a call with its parameters, one per line where they do not fit into one."""
    signature = inspect.signature(function)
    kept = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
    words: list[str] = []
    for before, parameter in zip([None, *kept], kept, strict=False):
        keyword = parameter.kind is parameter.KEYWORD_ONLY
        if keyword and (before is None or before.kind is not parameter.KEYWORD_ONLY):
            words.append("*")
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        words.append(f"{stars}{parameter.name}: {_plain(_spelt(parameter.annotation))}{default}")
    back = (
        "" if signature.return_annotation is signature.empty else f" -> {_plain(_spelt(signature.return_annotation))}"
    )
    whole = f"{name}({', '.join(words)}){back}"
    if len(whole) <= 120:
        return whole
    return f"{name}(\n" + "".join(f"    {word},\n" for word in words) + f"){back}"


def _spelt(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _plain(text: str) -> str:
    """Leave out the modules of types."""
    return re.sub(r"\b(?:[a-z_][a-z0-9_]*\.)+(?=[A-Za-z])", "", text).replace("'", "")


def _fields(kind: type) -> Iterator[str]:
    """The fields of a dataclass, with the strings below them."""
    source = inspect.getsource(kind)
    found = re.findall(
        r'^ {4}(\w+): ([^\n]*?)(?: = [^\n]*)?\n(?: {4}"""(.*?)""")?', source, flags=re.MULTILINE | re.DOTALL
    )
    lines = [f"- `{name}`: {' '.join(text.split()) or f'`{annotation}`'}" for name, annotation, text in found]
    if lines:
        yield "\n".join(lines) + "\n"


def _text(thing: Any) -> str:
    """Return a docstring as Markdown: its sections as lists, indented lines before them as Python."""
    lines = (inspect.getdoc(thing) or "").splitlines()
    out: list[str] = []
    section = code = False
    for line in [*lines, ""]:
        if not section and code != line.startswith("    ") and (line or code):
            code = not code
            out += ["```python"] if code else ["```", ""]
        if code:
            out.append(line[4:])
            continue
        heading = re.fullmatch(r"(Args|Attributes|Raises|Returns):", line)
        entry = re.fullmatch(r" {4}(\*{0,2}[\w, ]+): (.*)", line) if section else None
        if heading:
            section = True
            out += [f"**{heading[1]}**", ""]
        elif section and entry:
            out.append(f"- `{entry[1]}`: {entry[2]}")
        elif section and line.startswith("    "):
            out.append(f"  {line.strip()}" if out[-1].startswith(("-", "  ")) else line.strip())
        else:
            section = section and not line
            out.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
