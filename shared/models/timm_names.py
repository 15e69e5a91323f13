"""Names of timm's models, and nothing else that `timm.create_model` takes: names also come from the metadata of files."""

import re
from difflib import get_close_matches

import timm
from timm.models import get_pretrained_cfg

from ssld.shared.errors import UserError

_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)


def known_arch(name: str, source: object) -> str:
    """Return a name that timm knows, possibly with the tag of weights; raise UserError with the nearest one otherwise.

    Nothing else that `timm.create_model` takes passes, as it may name a download or a folder: names also come from the metadata of files.
    """
    where = "" if str(source) in (name, f"timm:{name}") else f"{source}: "
    base, _, tag = name.partition(".")
    printed = name[:200] if name.isprintable() else repr(name[:200])
    if not _NAME.fullmatch(name) or not timm.is_model(base):
        near = get_close_matches(base, timm.list_models(), n=1)
        raise UserError(f"{where}{printed}: timm has no such model{f'; did you mean {near[0]!r}?' if near else ''}")
    if tag:
        try:
            get_pretrained_cfg(name)
        except RuntimeError:
            tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}.*")]
            have = f"it has {', '.join(tags)}" if tags else "it has none"
            raise UserError(f"{where}{printed}: timm has no weights called {tag[:80]!r} for {base}; {have}") from None
    return name
