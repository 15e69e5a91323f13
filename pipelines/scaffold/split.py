"""Split of an annotated data set into a part for training and one for evaluation. Does not import torch."""

import hashlib
from collections import defaultdict
from typing import Any

from ssld.shared.errors import UserError


def split_content(
    content: dict[str, Any], *, share: float, seed: int, together: list[list[Any]] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a valid COCO file into (training part, evaluation part).

    Classes are assigned one after the other, the rarest first, since an image of a rare class usually shows common ones too (the idea of iterative
    stratification, Sechidis et al. 2011, in its simplest form). Images are ordered by a hash of the seed and their id, so that the split does not
    depend on the order of the file.

    Args:
        share: fraction of the images for evaluation.
        seed: seed of the split.
        together: groups of ids of near-duplicate images, which stay on one side; groups that share an image are merged.

    Raises:
        UserError: fewer than two images with boxes.
    """
    rows = {row["id"]: row for row in content["images"]}
    leader = _leaders(together or [])
    groups: dict[Any, list[Any]] = defaultdict(list)
    for image_id in rows:
        groups[leader.get(image_id, image_id)].append(image_id)
    order = sorted(groups, key=lambda image_id: hashlib.sha256(f"{seed} {image_id!r}".encode()).digest())
    containing: dict[Any, set[Any]] = defaultdict(set)
    for row in content["annotations"]:
        containing[row["category_id"]].add(leader.get(row["image_id"], row["image_id"]))
    side: dict[Any, bool] = {}  # True: evaluation
    for category in sorted(containing, key=lambda category: (len(containing[category]), repr(category))):
        members = [image_id for image_id in order if image_id in containing[category]]
        target = max(1, round(share * len(members))) if len(members) > 1 else 0
        missing = target - sum(side.get(image_id, False) for image_id in members)
        for image_id in members:
            if image_id not in side:
                side[image_id] = missing > 0
                missing -= side[image_id]
    rest = [image_id for image_id in order if image_id not in side]
    side |= {image_id: place < round(share * len(rest)) for place, image_id in enumerate(rest)}
    chosen = {member for image_id in groups for member in groups[image_id] if side[image_id]}
    if not chosen or len(chosen) == len(rows):
        raise UserError(f"{len(rows)} images are too few to split; give --val_annotations")
    return tuple(  # type: ignore[return-value]
        {
            **content,
            "images": [row for row in content["images"] if (row["id"] in chosen) == val],
            "annotations": [row for row in content["annotations"] if (row["image_id"] in chosen) == val],
        }
        for val in (False, True)
    )


def _leaders(together: list[list[Any]]) -> dict[Any, Any]:
    """Map each image of a group to one representative image."""
    leader: dict[Any, Any] = {}
    for group in together:
        overlapping = {leader[image_id] for image_id in group if image_id in leader}
        if overlapping:
            leader |= {image_id: group[0] for image_id, first in leader.items() if first in overlapping}
        leader |= dict.fromkeys(group, group[0])
    return leader
