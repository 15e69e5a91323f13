"""Flags of `ssld init`. Does not import torch."""

from pathlib import Path

from ssld.pipelines.scaffold.augment import AUGMENTS
from ssld.pipelines.scaffold.starts import STARTS
from ssld.shared.config.settings import Parser


def parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser(
        prog="ssld init",
        description="Write a commented pipeline for your own photos, to be read and edited.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="annotated photos by one path: data.yaml or folder (YOLO), folder (VOC, LabelMe, COCO, Roboflow, Hugging Face), Parquet, hub:ORG/NAME",
    )
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="folder of the annotated photos, or one for each of --annotations",
    )
    parser.add_argument(
        "--annotations", type=Path, nargs="+", metavar="JSON", help="COCO JSON file of these photos, or several"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("pipeline.yaml"),
        metavar="YAML",
        help="YAML file to write (default: pipeline.yaml)",
    )
    parser.add_argument(
        "--unlabeled",
        type=Path,
        metavar="DIR",
        help="folder of photos without annotations, for stage 1 and --moving_teacher; without --annotations: a backbone alone",
    )
    parser.add_argument(
        "--distill",
        choices=("auto", "yes", "no"),
        default="auto",
        help="stage 1 on the unlabeled photos; auto: only where it may help (default: auto)",
    )
    parser.add_argument(
        "--moving_teacher",
        choices=("yes", "no"),
        default="no",
        help="yes: one more detector, which also learns from the unlabeled photos under a moving teacher, for comparison (default: no)",
    )
    parser.add_argument(
        "--starts",
        default="auto",
        metavar="LIST",
        help=f"detectors to compare, by their initial weights: {', '.join(STARTS)}; auto: those at hand that fit the time (default: auto)",
    )
    parser.add_argument(
        "--init",
        metavar="MODEL",
        help="detector of the start coco: coco:NAME, torchvision's trained on COCO, or a detector file (default: one that is at hand)",
    )
    parser.add_argument(
        "--augment",
        choices=AUGMENTS,
        default="auto",
        help="named set of augmentations; cells and aerial: for objects without an up direction (default: auto)",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="time of the whole pipeline on this machine, trials included (default: 60)",
    )
    length.add_argument("--hours", type=float, metavar="N", help="the same in hours")
    parser.add_argument(
        "--backbone",
        metavar="MODEL",
        help="backbone, and student of stage 1: a weights file, timm:NAME or random:NAME (default: by the machine)",
    )
    parser.add_argument("--arch", metavar="NAME", help="timm name of the backbone, for a file that does not name it")
    parser.add_argument("--teacher", metavar="MODEL", help="teacher of stage 1: a weights file or timm:NAME")
    parser.add_argument(
        "--teacher_arch", metavar="NAME", help="timm name of the teacher, for a file that does not name it"
    )
    parser.add_argument(
        "--val_annotations",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="COCO JSON file for evaluation (default: a part of --annotations)",
    )
    parser.add_argument(
        "--val_images", type=Path, nargs="+", metavar="DIR", help="folder of the evaluation photos (default: --images)"
    )
    parser.add_argument(
        "--val_share",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="fraction of the images to evaluate on (default: 0.2)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the split and of the runs, 0 to 2^32 - 1 (default: 0)"
    )
    return parser
