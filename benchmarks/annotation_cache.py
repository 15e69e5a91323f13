"""Seconds and memory to read a large COCO JSON, with the annotation cache and without it, each in a fresh process.

    python benchmarks/annotation_cache.py [--images 118000] [--rounds 3] [--file instances_train2017.json]

Without --file a file like instances_train2017 is drawn: 7.3 objects per image, polygons of 8 to 44 points, 80 classes. The
cache is in a temporary folder, and filled by one reading before. Both sides take turns; what they read is compared by a
checksum, and a difference is an error.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from ssld.stage2_detect.data.coco import CocoData, read_coco


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the file, read it in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--read", choices=["cache", "parse"], help=argparse.SUPPRESS)
    parser.add_argument("--shapes", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.read:
        print(json.dumps(read(arguments.file, cache=arguments.read == "cache", shapes=arguments.shapes)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        file = arguments.file or draw(Path(folder) / "instances.json", arguments.images)
        if arguments.file is None:  # what changed a moment ago is not cached
            os.utime(file, (time.time() - 60, time.time() - 60))
        print(f"{file.stat().st_size / 2**20:.0f} MB of JSON, {arguments.rounds} rounds in turns\n")
        print("| read | seconds parsed | seconds cached | cached / parsed | peak MB parsed | peak MB cached |")
        print("| --- | --- | --- | --- | --- | --- |")
        for shapes in (False, True):
            start(file, "cache", shapes, folder)
            both = [
                {way: start(file, way, shapes, folder) for way in ("parse", "cache")} for _ in range(arguments.rounds)
            ]
            if len({one["digest"] for pair in both for one in pair.values()}) != 1:
                raise AssertionError("the cache gives something else than the file")
            middle = {
                (way, key): statistics.median(pair[way][key] for pair in both)
                for way in ("parse", "cache")
                for key in ("seconds", "megabytes")
            }
            ratios = sorted(pair["cache"]["seconds"] / pair["parse"]["seconds"] for pair in both)
            print(
                f"| boxes{' and masks' if shapes else ''} | {middle['parse', 'seconds']:.2f} | {middle['cache', 'seconds']:.2f} "
                f"| {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}) "
                f"| {middle['parse', 'megabytes']:.0f} | {middle['cache', 'megabytes']:.0f} |"
            )
    return 0


def draw(file: Path, images: int) -> Path:
    """Write a file of made-up annotations."""
    generator = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image in range(images):
        rows.append({"license": 3, "file_name": f"{image:012d}.jpg", "height": 480, "width": 640, "id": image})
        for _ in range(int(generator.poisson(7.3))):
            width, height = generator.uniform(5, 200, 2)
            x, y = generator.uniform(0, 640 - width), generator.uniform(0, 480 - height)
            points = int(generator.integers(8, 45))
            shape = generator.uniform((x, y), (x + width, y + height), (points, 2)).round(2).ravel().tolist()
            row: dict[str, Any] = {"segmentation": [shape], "area": round(width * height / 2, 4), "iscrowd": 0}
            row |= {"image_id": image, "bbox": [round(value, 2) for value in (x, y, width, height)]}
            annotations.append(row | {"category_id": int(generator.integers(1, 81)), "id": 900_000 + len(annotations)})
    categories = [{"supercategory": "thing", "id": number, "name": f"class {number}"} for number in range(1, 81)]
    content = {"info": {}, "licenses": [], "images": rows, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))
    return file


def start(file: Path, way: str, shapes: bool, folder: str) -> dict[str, Any]:
    """Read the file in a process of its own."""
    line = [sys.executable, __file__, "--file", str(file), "--read", way, *(["--shapes"] if shapes else [])]
    done = subprocess.run(line, check=True, capture_output=True, text=True, env=os.environ | {"XDG_CACHE_HOME": folder})
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def read(file: Path, *, cache: bool, shapes: bool) -> dict[str, Any]:
    """Seconds, peak megabytes, and a digest of what was read."""
    begun = time.perf_counter()
    data = read_coco(file, None, training=True, segmentations=shapes, cache_annotations=cache)
    seconds = time.perf_counter() - begun
    megabytes = peak_megabytes()
    return {"seconds": seconds, "megabytes": megabytes, "digest": digest(data)}


def digest(data: CocoData) -> str:
    """Of all boxes and labels, and of the shapes of every hundredth image."""
    digest = hashlib.sha256(repr((data.class_names, data.category_ids, sorted(data.counts.items()))).encode())
    for number, record in enumerate(data.images):
        digest.update(repr((record.image_id, record.path, record.annotation_ids)).encode())
        for array in (record.boxes_N4, record.labels_N, record.areas_N):
            digest.update(array.tobytes())
        if record.segmentations is not None and number % 100 == 0:
            digest.update(json.dumps(list(record.segmentations)).encode())
    return digest.hexdigest()


def peak_megabytes() -> float:
    """Most resident memory of this process. On Linux `ru_maxrss` begins with the parent's: VmHWM is its own."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    sys.exit(main())
