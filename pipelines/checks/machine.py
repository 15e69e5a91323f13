"""Machine checks of `ssld doctor`: versions, devices, process groups, shared memory, disk. No check fails because a package is broken.

torch is imported, and torchvision's operators are loaded, in a separate process, so that mismatched binaries, or a crash on import, are
reported and do not end the doctor. Versions are those of the packages' metadata: importing everything takes seconds.
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ssld.shared.machine import cores, installed_version

Level = Literal["ok", "note", "warning", "fault"]

PACKAGES = (
    "torch", "torchvision", "timm", "accelerate", "datasets", "pyarrow", "pydantic", "numpy", "pillow", "safetensors", "hotcoco",
)  # fmt: skip
"""packages without which nothing runs, by their names on PyPI"""
OPTIONAL = {"torchcodec": "fast", "av": "video", "onnx": "export", "onnxruntime": "export", "onnxscript": "export"}
"""packages of extras, and their extra"""
_PROBE = """
import json
from importlib.util import find_spec
from pathlib import Path
facts = {"broken": {}}

def load_torch():
    import torch

def load_torchvision():
    # What fails in a mismatched pair is its library; `import torchvision` loads it among much else.
    import torch
    spec = find_spec("torchvision")
    if spec is None:
        raise ImportError("not installed")
    for file in sorted(Path(spec.origin).parent.glob("_C*.so")) or [None]:
        if file is None:
            import torchvision
        else:
            torch.ops.load_library(str(file))

for name, load in (("torch", load_torch), ("torchvision", load_torchvision)):
    try:
        load()
    except BaseException as error:
        facts["broken"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
if "torch" not in facts["broken"]:
    import torch
    import torch.distributed as dist
    facts["cuda"], facts["threads"] = torch.version.cuda, torch.get_num_threads()
    facts["devices"] = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            device = torch.cuda.get_device_properties(number)
            facts["devices"].append([device.name, free, total, device.major, device.minor])
    facts["groups"] = [name for name in ("gloo", "nccl") if dist.is_available() and getattr(dist, f"is_{name}_available")()]
    facts["mps"] = torch.backends.mps.is_available()
print("FACTS" + json.dumps(facts))
"""


@dataclass(frozen=True)
class Line:
    """One finding of the doctor."""

    level: Level
    topic: str
    text: str


def machine_lines(probe: Callable[[], dict[str, Any]]) -> Iterator[Line]:
    """Yield the findings about this machine. `probe` returns the report of `ask_torch`; it takes seconds and is called after the first lines."""
    yield Line(
        "ok",
        "system",
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {cores()} CPU cores",
    )
    versions = {name: installed_version(name) for name in PACKAGES}
    missing = [name for name, version in versions.items() if version is None]
    installed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield Line("ok", "packages", installed)
    if missing:
        yield Line("fault", "packages", f"not installed: {', '.join(missing)}; pip install {' '.join(missing)}")
    yield from requirement_lines(_requirements("ssld"))
    facts = probe()
    yield from pair_lines(versions["torch"], versions["torchvision"], _torchvision_needs(), facts.get("broken", {}))
    absent = sorted({extra for name, extra in OPTIONAL.items() if installed_version(name) is None})
    if absent:
        names = ", ".join(name for name in OPTIONAL if installed_version(name) is None)
        yield Line(
            "note",
            "packages",
            f"optional, not installed: {names}; pip install -e '.[{','.join(absent)}]' in the clone adds them",
        )
    yield from device_lines(facts)
    yield from _memory_lines()


def ask_torch() -> dict[str, Any]:
    """Import torch and load torchvision's operators in a fresh process; return its report, with `broken` = {package: error} of what failed."""
    command = [sys.executable, "-W", "ignore", "-c", _PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        return {"broken": {"torch": "importing it takes more than five minutes"}}
    line = next((line for line in done.stdout.splitlines() if line.startswith("FACTS")), None)
    if line is None:
        last = (done.stderr.strip().splitlines() or [f"the process ended with code {done.returncode}"])[-1]
        return {"broken": {"torch": last[:200]}}
    facts: dict[str, Any] = json.loads(line.removeprefix("FACTS"))
    return facts


def pair_lines(torch: str | None, torchvision: str | None, needs: str | None, broken: dict[str, str]) -> Iterator[Line]:
    """Yield whether torch and torchvision match, and whether they can be imported.

    Args:
        torch, torchvision: versions; None if not installed.
        needs: requirement on torch in torchvision's metadata, as `==2.14.0` or `>=2.14.0`.
        broken: {package: error} of failed imports.
    """
    level: Level = "fault" if "torchvision" in broken else "warning"
    if torch and torchvision:
        builds = [version.partition("+")[2] for version in (torch, torchvision)]
        if not _meets(torch, needs):
            advice = "reinstall both in one command: pip install --upgrade torch torchvision"
            yield Line(level, "torchvision", f"{torchvision} needs torch {needs}, and torch is {torch}; {advice}")
        elif builds[0] != builds[1]:
            text = f"{torchvision} and torch {torch} are different builds; install both from one index"
            yield Line(level, "torchvision", text)
        elif "torchvision" not in broken:
            yield Line("ok", "torchvision", f"{torchvision} matches torch {torch}")
    for name, reason in broken.items():
        yield Line("fault", name, f"import {name} fails: {reason}")


def _meets(version: str, needs: str | None) -> bool:
    """Return whether a version meets `==X` or `>=X`; True for any other requirement."""
    required = re.fullmatch(r"(==|>=)\s*(\d+(?:\.\d+)*)", needs or "")
    if required is None:
        return True
    numbers, least = ([int(part) for part in re.findall(r"\d+", text)] for text in (version.split("+")[0], required[2]))
    return numbers[: len(least)] == least if required[1] == "==" else numbers >= least


def requirement_lines(requirements: list[str]) -> Iterator[Line]:
    """Yield installed packages that are older than required, and required packages that are missing; `requirements` as in the project's metadata.

    An old package that only an extra needs is a note: the extra may not be in use.
    """
    for line in requirements:
        match = re.match(r"([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*\(?([^();]*)", line)
        if match is None:
            continue
        name, needs, version = match[1], match[2].strip(), installed_version(match[1])
        if version is None:
            if ";" not in line and name not in PACKAGES:  # `;` marks extras; missing PACKAGES are reported above
                yield Line("fault", "packages", f"not installed: {name}; pip install '{name}{needs}'")
        elif not _meets(version, needs):
            extra = re.search(r"""extra\s*==\s*["']([^"']+)""", line)
            level: Level = "note" if extra else "warning"
            user = f" (for ssld[{extra[1]}])" if extra else ""
            yield Line(
                level, "packages", f"{name} {version} is not {needs}{user}; pip install --upgrade '{name}{needs}'"
            )


def _requirements(package: str) -> list[str]:
    try:
        return list(dict.fromkeys(importlib.metadata.requires(package) or []))
    except importlib.metadata.PackageNotFoundError:  # run from the source folder, without installation
        return []


def _torchvision_needs() -> str | None:
    """Return the requirement of the installed torchvision on torch."""
    try:
        requirements = importlib.metadata.requires("torchvision") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    matches = (re.fullmatch(r"torch\s*\(?([^();]+)\)?", line.strip()) for line in requirements)
    return next((match[1].strip() for match in matches if match), None)


def device_lines(facts: dict[str, Any]) -> Iterator[Line]:
    """Yield the findings about GPUs and process groups."""
    if "devices" not in facts:
        return
    for number, (name, free, total, major, minor) in enumerate(facts["devices"]):
        precision = "bf16" if major >= 8 else "fp16"
        text = f"cuda:{number} {name}, {total / 2**30:.0f} GB ({free / 2**30:.0f} GB free), capability {major}.{minor}: --precision {precision}"
        yield Line("ok", "device", text)
        if free < 0.5 * total:
            yield Line(
                "warning",
                "device",
                f"cuda:{number}: another program uses {(total - free) / 2**30:.0f} GB of its memory",
            )
    if not facts["devices"]:
        if facts.get("cuda") is None:
            reason = "torch is a build without CUDA"
        else:
            reason = f"torch is built for CUDA {facts['cuda']} but finds no GPU or no driver"
        level: Level = "warning" if facts.get("cuda") and shutil.which("nvidia-smi") else "note"
        yield Line(level, "device", f"CPU with {facts['threads']} threads; {reason}")
    groups = facts["groups"]
    yield Line("ok" if groups else "warning", "processes", f"process groups: {', '.join(groups) or 'none'}")
    if len(facts["devices"]) > 1 and "nccl" not in groups:
        yield Line(
            "fault",
            "processes",
            "several GPUs, but torch has no NCCL: training on more than one GPU will not start",
        )


def _memory_lines() -> Iterator[Line]:
    shared = Path("/dev/shm")
    if shared.is_dir():
        usage = shutil.disk_usage(shared)
        enough = usage.free >= 2**30
        text = f"{usage.free / 2**30:.1f} GB free in /dev/shm"
        advice = (
            ""
            if enough
            else ": too little for batches of worker processes; use docker run --shm-size=8g, or --workers 0"
        )
        yield Line("ok" if enough else "warning", "memory", text + advice)
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        yield Line("ok", "memory", f"{memory:.0f} GB")
    except (ValueError, OSError):
        pass
    usage = shutil.disk_usage(Path.cwd())
    enough = usage.free >= 5 * 2**30
    advice = "" if enough else ": a run of a large network can need more"
    yield Line(
        "ok" if enough else "warning",
        "disk",
        f"{usage.free / 2**30:.0f} GB free in the current folder ({Path.cwd()}){advice}",
    )
