"""The classes of COCO, by the labels that other projects give them."""


def coco_classes() -> dict[int, str]:
    """Return the names of COCO's 80 classes by category id, 1 to 90 with holes."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # by category id; 0 is background
    return {number: name for number, name in enumerate(names) if number and name != "N/A"}
