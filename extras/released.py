"""Checkpoints of the released code (https://github.com/XiaLiPKU/EMANet), as checkpoints of ours."""
from data import VOC_CLASSES

NAMES = {  # theirs -> ours. Their extractor is a Sequential of the ResNet's parts.
    "extractor.0.": "backbone.conv1.", "extractor.1.": "backbone.bn1.",
    "extractor.4.": "backbone.layer1.", "extractor.5.": "backbone.layer2.",
    "extractor.6.": "backbone.layer3.", "extractor.7.": "backbone.layer4.",
    "fc0.conv.": "reduce.0.", "fc0.bn.": "reduce.1.", "emau.": "attention.",
    "fc1.0.conv.": "decoder.0.", "fc1.0.bn.": "decoder.1.", "fc2.": "classifier.", "module.": ""}


def convert(state):
    """The state dict of a released network -> a checkpoint of train.py. What differs between these
    networks is read off the shapes. Empty if it is another network's."""
    ours = {}
    for key, value in state.items():
        for theirs, name in NAMES.items():
            key = key.replace(theirs, name)
        ours[key] = value                                   # an unknown name will fail to load
    depth = len({key.split(".")[2] for key in ours if key.startswith("backbone.layer3.")})
    if "attention.mu" not in ours or depth not in (6, 23, 36):
        return {}
    _, channels, num_bases = ours["attention.mu"].shape
    num_classes = len(ours["classifier.bias"])
    network = {"num_classes": num_classes, "stem": "deep", "decoder": True, "channels": channels,
               "num_bases": num_bases,
               "backbone": {6: "resnet50", 23: "resnet101", 36: "resnet152"}[depth]}
    # They were trained on VOC. Another number of classes is somebody's own training.
    classes = VOC_CLASSES if num_classes == 21 else [f"class {c}" for c in range(num_classes)]
    return {"model": ours, "network": network, "dataset": "voc", "classes": classes}
