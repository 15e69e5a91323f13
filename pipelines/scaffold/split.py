"""A COCO file cut into a training and an evaluation part: seeded, every class in both where it can be, copies of a picture on one side."""

import hashlib
from collections import defaultdict
from typing import Any

from ssld.shared.errors import UserError


def split_content(
    content: dict[str, Any], *, share: float, seed: int, copies: list[list[Any]] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(training part, evaluation part) of a sound COCO file.

    Classes are served one after the other, the rarest first, since an image of a rare class usually shows common ones too (the idea of iterative
    stratification, Sechidis et al. 2011, in its simplest form). An image's place in the order is a hash of the seed and its id, so that it does
    not depend on the order of the file.

    Args:
        share: of the images that go to evaluation.
        copies: groups of ids of images with the same content, which stay together.

    Raises:
        UserError: fewer than two images with boxes.
    """
    rows = {row["id"]: row for row in content["images"]}
    leader = {image_id: group[0] for group in copies or [] for image_id in group}
    groups: dict[Any, list[Any]] = defaultdict(list)
    for image_id in rows:
        groups[leader.get(image_id, image_id)].append(image_id)
    order = sorted(groups, key=lambda image_id: hashlib.sha256(f"{seed} {image_id!r}".encode()).digest())
    shown: dict[Any, set[Any]] = defaultdict(set)
    for row in content["annotations"]:
        shown[row["category_id"]].add(leader.get(row["image_id"], row["image_id"]))
    side: dict[Any, bool] = {}  # True: evaluation
    for category in sorted(shown, key=lambda category: (len(shown[category]), repr(category))):
        members = [image_id for image_id in order if image_id in shown[category]]
        wanted = max(1, round(share * len(members))) if len(members) > 1 else 0
        missing = wanted - sum(side.get(image_id, False) for image_id in members)
        for image_id in members:
            if image_id not in side:
                side[image_id] = missing > 0
                missing -= side[image_id]
    rest = [image_id for image_id in order if image_id not in side]
    side |= {image_id: place < round(share * len(rest)) for place, image_id in enumerate(rest)}
    chosen = {one for image_id in groups for one in groups[image_id] if side[image_id]}
    if not chosen or len(chosen) == len(rows):
        raise UserError(f"{len(rows)} images are too few to be split; give --val_annotations")
    return tuple(  # type: ignore[return-value]
        {
            **content,
            "images": [row for row in content["images"] if (row["id"] in chosen) == val],
            "annotations": [row for row in content["annotations"] if (row["image_id"] in chosen) == val],
        }
        for val in (False, True)
    )
