"""A detection set of real photos on which the backbone decides: Tiny ImageNet images pasted on canvases, with the boxes of their objects.

    python benchmarks/mosaics.py DIR/tinyimagenet100 --output data/mosaics

Each canvas has one color and shows a few images at random sizes and places, none over another; an object's box is what the data set's `bbox`
column says, moved along. Training canvases are made of `labeled.parquet`, evaluation canvases of `val.parquet`. Writes `train.json`, `val.json`
and the folders `train/`, `val/` of PNG files. The same arguments give the same files.
"""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

SIDE = 64  # pixels per side in the data set


def read_images(file: Path, classes: int) -> list[tuple[bytes, int, list[int]]]:
    """(encoded image, label, box as x0, y0, x1, y1) of the first `classes` classes."""
    rows = pq.read_table(file, columns=["image", "label", "bbox"]).to_pylist()
    return [(row["image"]["bytes"], row["label"], row["bbox"]) for row in rows if row["label"] < classes]


def free_places(draw: np.random.Generator, side: int, sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """(x, y, size) of squares that do not overlap; a square that finds no place in 50 tries is left out."""
    taken: list[tuple[int, int, int]] = []
    for size in sorted(sizes, reverse=True):
        for _ in range(50):
            x, y = (int(draw.integers(0, side - size + 1)) for _ in "xy")
            if all(x + size <= a or a + s <= x or y + size <= b or b + s <= y for a, b, s in taken):
                taken.append((x, y, size))
                break
    return taken


def write_split(
    photos: list[tuple[bytes, int, list[int]]],
    names: Sequence[str],
    folder: Path,
    *,
    images: int,
    side: int,
    seed: int,
) -> None:
    """Write `images` canvases of side x side pixels into `folder`, and `folder`.json beside it."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, list[dict]] = {
        "images": [], "annotations": [], "categories": [{"id": k + 1, "name": name} for k, name in enumerate(names)],
    }  # fmt: skip
    for number in range(images):
        canvas = Image.new("RGB", (side, side), tuple(int(v) for v in draw.integers(64, 192, 3)))
        sizes = draw.integers(side // 4, side // 2 + 1, draw.integers(2, 5))
        for x, y, size in free_places(draw, side, sizes.tolist()):
            encoded, label, (x0, y0, x1, y1) = photos[int(draw.integers(len(photos)))]
            with Image.open(io.BytesIO(encoded)) as photo:
                canvas.paste(photo.convert("RGB").resize((size, size), Image.Resampling.BICUBIC), (x, y))
            scale = size / SIDE  # the column's corners are the first and the last pixel of the object
            box = [x + x0 * scale, y + y0 * scale, (x1 + 1 - x0) * scale, (y1 + 1 - y0) * scale]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number + 1,
                    "category_id": label + 1,
                    "bbox": [round(value, 2) for value in box],
                    "area": round(box[2] * box[3], 2),
                    "iscrowd": 0,
                }
            )
        name = f"{number:05d}.png"
        canvas.save(folder / name)
        content["images"].append({"id": number + 1, "file_name": name, "width": side, "height": side})
    folder.with_suffix(".json").write_text(json.dumps(content))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder with labeled.parquet, val.parquet and classes.json")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--side", type=int, default=160, help="pixels of a canvas")
    parser.add_argument("--train-images", type=int, default=1200)
    parser.add_argument("--val-images", type=int, default=300)
    arguments = parser.parse_args(argv)
    entries = json.loads((arguments.data / "classes.json").read_text())
    names = [entry["name"] for entry in entries[: arguments.classes]]
    for seed, (split, file, images) in enumerate(
        (("train", "labeled.parquet", arguments.train_images), ("val", "val.parquet", arguments.val_images))
    ):
        photos = read_images(arguments.data / file, arguments.classes)
        write_split(photos, names, arguments.output / split, images=images, side=arguments.side, seed=seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
