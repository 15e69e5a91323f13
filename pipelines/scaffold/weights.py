"""Weights of a new pipeline: which are on this machine or within reach of the network, and whether files hold what their flags say.

Does not import torch; the networks of files are built in a process of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ssld.pipelines.runner.plan import names_architecture
from ssld.pipelines.scaffold.starts import Init, Start, absence, download_of
from ssld.pipelines.scaffold.suggest import USUAL_TEACHERS, Networks
from ssld.shared.apart import call_apart
from ssld.shared.errors import UserError
from ssld.shared.models.damage import refuse_damaged
from ssld.shared.models.downloads import Download, find_downloads_apart, kind_of
from ssld.shared.terminal import say

_FLAGS = {"backbone": "--backbone FILE --arch NAME", "teacher": "--teacher FILE --teacher_arch NAME"}


@dataclass(frozen=True)
class Available:
    """What is left of networks and starts, and the detector that was proposed but is out of reach, if there is one."""

    networks: list[Networks]
    init: Init | None
    starts: tuple[Start, ...] | None
    absent: Init | None = None


def available(
    networks: list[Networks],
    init: Init | None,
    given: tuple[Start, ...] | None,
    *,
    distills: bool,
    detects: bool,
    own: bool,
) -> Available:
    """Return the networks whose weights are on this machine or can be downloaded, likewise the detector to start from; and the starts.

    Where no network is and the user wants none, the detector is the only start. Raises UserError if nothing is left, or a file is not usable.
    """
    roles = ("backbone", "teacher") if distills else ("backbone",) if given is None or "imagenet" in given else ()
    check_files(networks[0], roles, maps=detects, classes=not (detects and networks[0].random))
    texts = {getattr(one, role): role for one in networks for role in roles}
    remote = download_of(init) if init and not init.here else {}
    found = find_downloads_apart({text: text for text in texts} | remote)
    absent = None
    if init and not init.here and not any(one.possible for one in found if one.key == init.reference):
        if not init.optional:
            raise UserError(absence(init))
        init, absent = None, init
    missing = {one.key: one for one in found if one.key in texts}
    impossible = [text for text, one in missing.items() if not one.possible]
    left = [one for one in networks if not any(getattr(one, role) in impossible for role in roles)]
    if not left and init and init.here and given is None and not distills and not own:
        say(f"{impossible[0]} is not on this machine: the detector starts from {init.reference} alone")
        return Available(networks[:1], init, ("coco",))
    if not left:
        raise UserError(*(_impossible(texts[text], missing[text]) for text in impossible))
    for text, download in missing.items():
        if download.possible and any(text in (one.backbone, one.teacher) for one in left):
            say(download.text)
    return Available(left, init, given, absent)


def _impossible(role: str, download: Download) -> str:
    """Return the error line about weights that cannot be had: a name that timm does not have, or the flags for a file in their place."""
    return f"{download.text}: {_FLAGS[role]}" if download.exists else f"--{role} {download.text}"


def check_files(networks: Networks, roles: tuple[str, ...], *, maps: bool, classes: bool) -> None:
    """Raise UserError, in the words of the user's flags, for a file or a name of `--backbone` or `--teacher` that no training could use.

    With `maps` the backbone has to give maps of features, as a detector needs them; with `classes` the teacher has to have classes.
    """
    given = {}
    for role, flag in zip(roles, ("arch", "teacher_arch"), strict=False):
        text, arch = getattr(networks, role), getattr(networks, flag)
        kind = kind_of(text)
        check_file(role, text)
        if kind == "file" and arch is None and not names_architecture(Path(text)):
            raise UserError(f"--{role} {text}: does not name its architecture; add --{flag} with its timm name")
        unusual = role == "teacher" and kind == "timm" and text not in USUAL_TEACHERS
        if kind in ("file", "folder", "random") or unusual:
            given[role] = (text, arch)
    if faults := faults_apart(given, maps=maps, classes=classes):
        raise UserError(*faults)


def check_file(role: str, text: str) -> None:
    """Raise UserError if a reference is a path of nothing, or a file that cannot be weights by its first bytes."""
    if kind_of(text) == "path":
        raise UserError(f"--{role} {text}: no such file")
    try:
        refuse_damaged(Path(text))
    except UserError as error:
        raise UserError(f"--{role} {error}") from None


def faults_apart(given: Mapping[str, tuple[str, str | None]], *, maps: bool, classes: bool) -> list[str]:
    """Call `faults_of` in a process of its own; no process where nothing is given."""
    return list(call_apart(faults_of, dict(given), maps, classes) or []) if given else []


def faults_of(given: Mapping[str, tuple[str, str | None]], maps: bool = True, classes: bool = True) -> list[str]:
    """Build the network of each reference with its weights, and return a line for each that fails. Imports torch.

    Args:
        given: (reference, timm name of the network or None) by role; a `teacher` may be a pickle, as in stage 1. Of one by timm's
            name, which may have to be downloaded, only what timm's registry says is checked.
        maps: whether a `backbone` has to give maps of features, as a detector needs them; stage 1 alone takes any classifier.
        classes: whether a `teacher` has to have classes; one whose features are learned does not.
    """
    from ssld.shared.models.backbones import create_classifier, load_backbone
    from ssld.shared.models.references import is_encoder, no_classes, parse_reference
    from ssld.shared.models.teacher import FrozenTeacher

    faults = []
    for role, (text, arch) in given.items():
        try:
            if role == "teacher" and kind_of(text) == "timm":
                if classes and is_encoder(text):
                    raise UserError(no_classes(text))
            elif role == "teacher":
                FrozenTeacher(text, arch=arch, classes=classes)
            elif maps:
                load_backbone(text, arch=arch, features_only=True)
            else:
                create_classifier(parse_reference(text, arch))
        except UserError as error:
            faults += [f"--{role} {line}" for line in str(error).splitlines()]
    return faults
