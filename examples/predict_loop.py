"""Count the objects of each class in a folder of images, and write the images with their detections drawn.

python examples/predict_loop.py runs/detector/detector.safetensors photos --output runs/counted
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

import ssld

SUFFIXES = (".jpg", ".jpeg", ".png")


def main(argv: Sequence[str] | None = None) -> dict[str, int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="detector file")
    parser.add_argument("images", help="folder of JPEG and PNG files")
    parser.add_argument("--output", required=True, help="folder for the drawn images")
    parser.add_argument("--score_threshold", type=float, default=0.5, help="least score, 0 to 1")
    arguments = parser.parse_args(argv)
    files = sorted(file for file in Path(arguments.images).glob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        parser.error(f"{arguments.images}: no such folder, or no {', '.join(SUFFIXES)} file in it")

    detector = ssld.load_detector(arguments.file)
    detector.model.to("cuda" if torch.cuda.is_available() else "cpu")
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    total: Counter[str] = Counter()
    for start in range(0, len(files), 32):  # so that any number of images fits into memory
        some = files[start : start + 32]
        for file, detections in zip(
            some, detector.predict(some, score_threshold=arguments.score_threshold), strict=True
        ):
            total.update(detections.names)
            detections.draw(file).save(output / f"{file.stem}.png")
            print(f"{file.name}: {dict(Counter(detections.names))}")
    print(f"{len(files)} images: {dict(total)}")
    return dict(total)


if __name__ == "__main__":
    main()
