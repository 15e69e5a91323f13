"""ENTRY: draw the synthetic data set: crops for stage 1, scenes with boxes and masks for stage 2. Downloads nothing.

    python pipelines/toy_data.py --output runs/toy_data

    toy_data.json                   the parameters; written last
    stage1/labeled/CLASS/*.jpg      the small labeled part
    stage1/unlabeled/*.jpg          the larger unlabeled part; a fraction FOREIGN of it shows objects of no class
    stage1/teacher_train.parquet    many labeled crops, in place of the training data of an off-the-shelf teacher
    stage1/val/CLASS/*.jpg
    stage2/{train,val}/*.jpg        scenes of 128 px, and stage2/{train,val}.json in COCO's format

The parts never share an image. Every image is drawn from (seed, part, number): a larger part begins with the images of a
smaller one, and the same parameters give the same bytes with the same versions of NumPy, Pillow and pyarrow. The drawing
itself is in `pipelines/toy_drawing.py`. Does not import torch.
"""

import io
import json
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

import numpy as np
from numpy.random import Generator
from PIL import Image
from pydantic import Field

from ssld.pipelines.toy_drawing import CLASSES, SCENE_SIZE, Thing, draw_crop, draw_scene
from ssld.shared.config.bounds import Seed
from ssld.shared.config.command import run_command
from ssld.shared.config.settings import CommandConfig, Config
from ssld.shared.errors import UserError

VERSION = 1  # version of the drawing: raised when the same parameters give other images
FOREIGN = 0.15  # fraction of the unlabeled crops
MAX_OBJECTS = 5  # objects of the classes in a scene
# One scene in so many; the first one early, so that small data sets have one too.
EMPTY_EVERY, CROWD_EVERY = 16, 24
# Numbers of the random streams; changing one changes the images.
_LABELED, _UNLABELED, _TEACHER, _VAL, _SCENES, _VAL_SCENES = range(6)
_RECORD, _PARTIAL = "toy_data.json", ".toy_data.partial"
_PARTS = ("stage1", "stage2")


class ToySizes(Config):
    """Number of images of each part; the defaults are those of `pipelines/quickstart.yaml`."""

    labeled: int = Field(800, ge=len(CLASSES), le=1_000_000)
    """number of labeled crops: few, so that the unlabeled ones matter"""
    unlabeled: int = Field(3000, ge=1, le=1_000_000)
    """number of unlabeled crops"""
    teacher_train: int = Field(5000, ge=len(CLASSES), le=1_000_000)
    """number of labeled crops that only the teacher is trained on"""
    val: int = Field(1000, ge=len(CLASSES), le=1_000_000)
    """number of labeled crops for evaluation"""
    train_scenes: int = Field(300, ge=4, le=1_000_000)
    """number of scenes to train a detector on"""
    val_scenes: int = Field(200, ge=4, le=1_000_000)
    """number of scenes to evaluate a detector on"""


class ToyDataConfig(CommandConfig):
    """Draw the synthetic data set."""

    seed: Seed = 0
    """seed of all drawn images, 0 to 2^32 - 1"""
    sizes: ToySizes = ToySizes()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(ToyDataConfig, draw_toy_data, argv, program="toy_data.py", torch_threads=False)


def draw_toy_data(config: ToyDataConfig) -> None:
    """Draw the data set of `config` into its run directory."""
    from ssld.shared.run_dir import RunDir

    run = RunDir(config, "toy_data")
    if run.finished_earlier():
        return
    written = write_toy_data(config.output, seed=config.seed, sizes=config.sizes)
    sizes = ", ".join(f"{count} {part}" for part, count in config.sizes.model_dump().items())
    run.log(f"{run.path}: {'drawn' if written else 'drawn earlier'}: {sizes}; {len(CLASSES)} classes")
    run.finish({"classes": len(CLASSES), **config.sizes.model_dump()}, [run.path / _RECORD])


def write_toy_data(output: Path, *, seed: int = 0, sizes: ToySizes | None = None) -> bool:
    """Write stage1/, stage2/ and toy_data.json into `output`, which may hold other files; return whether anything was written.

    All files are drawn in a hidden folder and moved at the end, so that an interrupted call leaves no incomplete data
    set; the next call starts over. A finished data set with the same parameters is left untouched.

    Raises:
        UserError: `output` holds a data set with other parameters, or a stage1 or stage2 without toy_data.json.
    """
    sizes = sizes or ToySizes()
    parameters = {"version": VERSION, "seed": seed, "sizes": sizes.model_dump(), "classes": list(CLASSES)}
    record, partial = output / _RECORD, output / _PARTIAL
    if record.exists():
        _require_same(record, parameters)
        return False
    present = [name for name in _PARTS if (output / name).exists()]
    if present and not partial.exists():
        raise UserError(f"{output / present[0]}: exists, but {record} does not; give another --output or delete it")
    # If the hidden folder exists too, a call was killed between its moves.
    for name in (*present, _PARTIAL):
        shutil.rmtree(output / name, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_stage1(partial / "stage1", seed, sizes)
        _write_stage2(partial / "stage2", seed, sizes)
        (partial / _RECORD).write_text(json.dumps(parameters, indent=2) + "\n", encoding="utf-8")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for name in (*_PARTS, _RECORD):
        (partial / name).rename(output / name)
    partial.rmdir()
    return True


def _require_same(record: Path, parameters: dict[str, Any]) -> None:
    try:
        recorded = json.loads(record.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        raise UserError(f"{record}: not valid JSON; give another --output or delete the folder") from None
    if recorded != parameters:
        keys = [key for key in parameters if not isinstance(recorded, dict) or recorded.get(key) != parameters[key]]
        raise UserError(
            f"{record}: was drawn with other parameters ({', '.join(keys)}); give another --output or delete the folder"
        )


def _write_stage1(folder: Path, seed: int, sizes: ToySizes) -> None:
    names = list(CLASSES)
    for name in names:
        (folder / "labeled" / name).mkdir(parents=True)
        (folder / "val" / name).mkdir(parents=True)
    for part, stream, count in (("labeled", _LABELED, sizes.labeled), ("val", _VAL, sizes.val)):
        for number in range(count):
            name = names[number % len(names)]
            crop = draw_crop(_generator(seed, stream, number), name)
            (folder / part / name / f"{number:06d}.jpg").write_bytes(_jpeg(crop))
    (folder / "unlabeled").mkdir()
    for number in range(sizes.unlabeled):
        rng = _generator(seed, _UNLABELED, number)
        class_name = None if rng.random() < FOREIGN else str(rng.choice(names))
        (folder / "unlabeled" / f"{number:06d}.jpg").write_bytes(_jpeg(draw_crop(rng, class_name)))
    labels = [number % len(names) for number in range(sizes.teacher_train)]
    crops = (draw_crop(_generator(seed, _TEACHER, number), names[label]) for number, label in enumerate(labels))
    rows = [{"bytes": _jpeg(crop), "path": f"{number:06d}.jpg"} for number, crop in enumerate(crops)]
    _write_parquet(folder / "teacher_train.parquet", rows, labels, names)


def _write_parquet(file: Path, images: list[dict[str, Any]], labels: list[int], names: list[str]) -> None:
    """Write a Parquet file with an image and a label column, with the class names in the metadata that Hugging Face `datasets` reads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    pq.write_table(pa.table({"image": images, "label": labels}, schema), file, row_group_size=1000, compression="none")


def _write_stage2(folder: Path, seed: int, sizes: ToySizes) -> None:
    for part, stream, count in (("train", _SCENES, sizes.train_scenes), ("val", _VAL_SCENES, sizes.val_scenes)):
        (folder / part).mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(count):
            rng = _generator(seed, stream, number)
            objects = 0 if number % EMPTY_EVERY == 1 else int(rng.integers(1, MAX_OBJECTS, endpoint=True))
            scene, things = draw_scene(rng, objects, crowd=number % CROWD_EVERY == 2)
            file_name = f"{number:06d}.jpg"
            (folder / part / file_name).write_bytes(_jpeg(scene))
            images.append({"id": number + 1, "file_name": file_name, "width": SCENE_SIZE, "height": SCENE_SIZE})
            for thing in things:
                annotations.append({"id": len(annotations) + 1, "image_id": number + 1, **_annotation(thing)})
        content = {"images": images, "annotations": annotations, "categories": _categories()}
        (folder / f"{part}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def _categories() -> list[dict[str, Any]]:
    return [{"id": _category_id(name), "name": name, "supercategory": shape} for name, (shape, _) in CLASSES.items()]


def _category_id(name: str | None) -> int:
    """Return the category id of a class, with gaps as in COCO: 2, 3, 5, 6, 8, ..."""
    index = list(CLASSES).index(str(name))
    return index + 2 + index // 2


def _annotation(thing: Thing) -> dict[str, Any]:
    """Return box and mask of the visible part: a polygon if the whole object is visible, else run lengths."""
    rows, columns = np.flatnonzero(thing.visible_HW.any(1)), np.flatnonzero(thing.visible_HW.any(0))
    left, top, right, bottom = (float(edge) for edge in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    area = float(thing.visible_HW.sum())
    segmentation: Any = _run_lengths(thing.visible_HW)
    if thing.whole:
        outline = thing.outline_P2.round(2)
        (left, top), (right, bottom) = outline.min(0).tolist(), outline.max(0).tolist()
        x, y = outline.T
        area = round(abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2, 2)
        segmentation = [outline.ravel().tolist()]
    return {
        "category_id": _category_id(thing.name),
        "bbox": [left, top, round(right - left, 2), round(bottom - top, 2)],
        "area": area,
        "segmentation": segmentation,
        "iscrowd": int(thing.crowd),
    }


def _run_lengths(mask_HW: np.ndarray) -> dict[str, Any]:
    """Return a mask as COCO's uncompressed run-length encoding: column by column, beginning with a run of zeros."""
    pixels = np.concatenate([[False], mask_HW.ravel(order="F")])
    changes = np.flatnonzero(pixels[1:] != pixels[:-1])
    return {"size": list(mask_HW.shape), "counts": np.diff(changes, prepend=0, append=mask_HW.size).tolist()}


def _generator(seed: int, stream: int, number: int) -> Generator:
    return np.random.default_rng([seed, stream, number])


def _jpeg(pixels_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Color at full resolution, since the textures have periods of a few pixels.
    Image.fromarray(pixels_HWC).save(buffer, "JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
