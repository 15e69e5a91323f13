"""The classes that weights of other projects were trained on: COCO's, by the labels that other projects give them, or those of a COCO JSON."""

from pathlib import Path

from ssld.stage2_detect.data.coco import CocoData, read_coco

GIVE_ANNOTATIONS = "; give --annotations with a COCO JSON of the data it was trained on"


def coco_classes() -> dict[int, str]:
    """Return the names of COCO's 80 classes by category id, 1 to 90 with holes."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # by category id; 0 is background
    return {number: name for number, name in enumerate(names) if number and name != "N/A"}


def classes_of(annotations: Path | None) -> CocoData:
    """Return the classes of a COCO JSON file, None: of COCO, as a data set without images. Raises UserError for a fault of the file."""
    if annotations:
        return read_coco(annotations, None, training=False)
    coco = coco_classes()
    return CocoData("COCO 2017", False, tuple(coco.values()), tuple(coco), images=[])
