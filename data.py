"""The data sets, read from disk as their authors distribute them, and the crops to train on.

    data = build_dataset("voc", "datasets", "val")
    image, label = data[0]      # uint8 (3, H, W) and uint8 (H, W): class index, or 255 = ignored

Everything stays uint8 until `normalise` converts it on the device. The names of the classes are at
the end.
"""
from glob import glob
from os.path import splitext
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy.io import loadmat
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms.v2.functional import InterpolationMode, resized_crop

IGNORE = 255                      # label of ignored pixels
ILLEGAL = 254                     # stands for values in label files that no class has
MEAN = 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)        # ImageNet's, for 0..255
STD = 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def build_dataset(name, root="datasets", split=None):
    """The data set `name` of DATASETS in folder `root`. `split` is one of its lists, by default the
    validation list. FileNotFoundError says what is missing."""
    if split is None:
        split = "test" if name == "cocostuff" else "val"
    return DATASETS[name](name, Path(root), split)


class SegmentationDataset(Dataset):
    """Images on disk and their labels.

    item: image uint8 (3, H, W), label uint8 (H, W)

    classes: the names of the classes, in the order of their indices.
    to_class: {value in a label file: class index or 255}. Any other value raises OSError.
    ids: the names of the images.
    images, labels: the paths of their files. If `labels` is None, all labels are 255.
    """
    scales = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)         # of training crops, as released

    def __init__(self, name, split, classes, to_class, ids, images, labels):
        self.name = name
        self.split = split
        self.classes = classes
        self.ids = ids
        self.images = images
        self.labels = labels
        # The table raw label -> class. A label file has 8 or 16 bits.
        self.table = np.full(65536, ILLEGAL, np.uint8)
        self.table[list(to_class)] = list(to_class.values())

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        image = read_image(self.images[i])  # (3, H, W)
        if self.labels is None:
            return image, torch.full(image.shape[1:], IGNORE, dtype=torch.uint8)  # (H, W)
        path = self.labels[i]
        raw = read_label(path)  # (H, W)
        if raw.shape != image.shape[1:]:
            raise OSError(f"{path}: the label and its image differ in size")
        label = self.table.take(raw)  # (H, W)
        if (label == ILLEGAL).any():
            value = raw[label == ILLEGAL][0]
            raise OSError(f"{path}: label value {value} in {self.name}, which has classes 0 to "
                          f"{len(self.classes) - 1} (README, Data)")
        return image, torch.from_numpy(label)


# ---- The data sets. Each function gets a name of DATASETS, the folder --data-root and the name of
# a list. It says where the files are, and which value in a label file is which class.
def voc(name, root, split):
    """PASCAL VOC 2012. Its list trainaug needs SBD, or a SegmentationClassAug/ folder."""
    base = root / "VOCdevkit/VOC2012"
    lists = base / "ImageSets/Segmentation"
    sbd = root / "benchmark_RELEASE/dataset"
    if split == "trainaug" and sbd.is_dir():
        # VOC's training images, and all of SBD's that are not in VOC's train or val.
        train = read_list(lists / "train.txt")
        val = read_list(lists / "val.txt")
        sbd_ids = read_list(sbd / "train.txt") + read_list(sbd / "val.txt")
        added = sorted(set(sbd_ids) - set(train) - set(val))
        ids = train + added
        labels = find_files(base / "SegmentationClass", train, ".png")
        labels += find_files(sbd / "cls", added, ".mat")
    elif split == "trainaug":
        ids = read_list(lists / "trainaug.txt")
        labels = find_files(base / "SegmentationClassAug", ids, ".png")
    else:
        ids = read_list(lists / f"{split}.txt")
        labels = find_files(base / "SegmentationClass", ids, ".png", optional=True)
    to_class = {raw: raw for raw in (*range(21), IGNORE)}
    images = find_files(base / "JPEGImages", ids, ".jpg")
    return SegmentationDataset(name, split, VOC_CLASSES, to_class, ids, images, labels)


def context(name, root, split):
    """PASCAL Context. 59 of its 459 label values are classes. The others are ignored; in context60
    they are class 0."""
    base = root / "VOCdevkit/VOC2010"
    ids = read_list(base / f"ImageSets/Main/{split}.txt")   # the lists for detection
    images = find_files(base / "JPEGImages", ids, ".jpg")
    labels = find_files(root / "trainval", ids, ".mat")
    if name == "context60":
        classes = ["other", *CONTEXT_CLASSES]
        to_class = dict.fromkeys(range(460), 0)
        to_class |= {raw: c for c, raw in enumerate(CONTEXT_IDS, 1)}
    else:
        classes = CONTEXT_CLASSES
        to_class = dict.fromkeys(range(460), IGNORE)
        to_class |= {raw: c for c, raw in enumerate(CONTEXT_IDS)}
    return SegmentationDataset(name, split, classes, to_class, ids, images, labels)


def cocostuff(name, root, split):
    """COCO-Stuff 10K, version 1.1. Label 0 is unlabelled."""
    ids = read_list(root / f"imageLists/{split}.txt")
    images = find_files(root / "images", ids, ".jpg")
    labels = find_files(root / "annotations", ids, ".mat")
    to_class = COCO_TO_CLASS | {0: IGNORE}
    return SegmentationDataset(name, split, COCO_CLASSES, to_class, ids, images, labels)


def coco2017(name, root, split):
    """COCO-Stuff 164K, or coco2voc: the same files with VOC's classes and everything else as
    background (Sec. 6.2.3). Labels hold COCO's id - 1, or 255 for unlabelled."""
    base = root / f"images/{split}2017"
    ids = sorted(path.stem for path in base.glob("[!.]*.jpg"))      # not macOS's ._ files
    images = find_files(base, ids, ".jpg")
    labels = find_files(root / f"annotations/{split}2017", ids, ".png")
    if name == "coco2voc":
        classes = VOC_CLASSES
        to_class = dict.fromkeys(range(182), 0)
        to_class |= {coco_id - 1: c for c, coco_id in enumerate(COCO_OF_VOC, 1)}
    else:
        classes = COCO_CLASSES
        to_class = {coco_id - 1: c for coco_id, c in COCO_TO_CLASS.items()}
    to_class[255] = IGNORE
    return SegmentationDataset(name, split, classes, to_class, ids, images, labels)


def folder(name, root, split):
    """Your own images in VOC's layout: JPEGImages/, SegmentationClass/, classes.txt (one name
    per line), ImageSets/Segmentation/SPLIT.txt (names without suffix)."""
    classes = read_list(root / "classes.txt")
    ids = read_list(root / f"ImageSets/Segmentation/{split}.txt")
    images = find_files(root / "JPEGImages", ids, ".jpg", ".jpeg", ".png")
    labels = find_files(root / "SegmentationClass", ids, ".png", optional=True)
    to_class = {raw: raw for raw in (*range(len(classes)), IGNORE)}
    return SegmentationDataset(name, split, classes, to_class, ids, images, labels)


def scenes(name, root, split):
    """Landscapes that a program draws, without files."""
    from extras.drawn import Scenes
    return Scenes(split)


# A new data set is a function above, an entry here, and perhaps a recipe in train.py.
DATASETS = {"voc": voc, "context": context, "context60": context, "cocostuff": cocostuff,
            "cocostuff164k": coco2017, "coco2voc": coco2017, "folder": folder, "scenes": scenes}


# ---- What a run trains on
class TrainView(Dataset):
    """Random scale, crop and flip of a data set (Sec. 6.1).

    key: (iteration, index of an image). The key and the seed determine an item, so that workers,
        processes and restarts change nothing.
    item: image uint8 (3, crop, crop), label uint8 (crop, crop), 255 outside the image
    """

    def __init__(self, data, crop, seed):
        self.data = data
        self.crop = crop
        self.seed = seed

    def __getitem__(self, key):
        iteration, index = key
        rng = np.random.default_rng((self.seed, iteration, index))
        image, label = self.data[index]  # (3, H, W), (H, W)
        scale = rng.choice(self.data.scales)
        # differs: a window is cut out first, then scaled. The released code scales the whole image,
        # and its labels are 0.3 to 0.5 pixels off on average.
        top, height, scaled_height = self.window(rng, image.shape[1], scale)
        left, width, scaled_width = self.window(rng, image.shape[2], scale)
        box = (top, left, height, width)
        size = (scaled_height, scaled_width)
        image = resized_crop(image, *box, size, antialias=False)  # (3, scaled_height, scaled_width)
        nearest = InterpolationMode.NEAREST_EXACT
        label = resized_crop(label[None], *box, size, nearest)[0]  # (scaled_height, scaled_width)

        # The padding is the mean colour, which normalisation turns into about 0.
        padded_image = MEAN.round().byte().repeat(1, self.crop, self.crop)  # (3, crop, crop)
        padded_image[:, :scaled_height, :scaled_width] = image
        padded_label = torch.full((self.crop, self.crop), IGNORE, dtype=torch.uint8)  # (crop, crop)
        padded_label[:scaled_height, :scaled_width] = label
        if rng.random() < 0.5:
            return padded_image.flip(2), padded_label.flip(1)
        return padded_image, padded_label

    def window(self, rng, length, scale):
        """Along one side of the image: where the window starts, its length, and its length after
        scaling. If that is less than the crop, the rest is padding."""
        scaled = min(self.crop, max(1, round(length * scale)))
        part = min(length, round(scaled / scale))
        if scale != 1 and part % 2 == 0:
            # A sample midway between two pixels takes the second one's label: labels would drift.
            # An odd length has no such samples.
            part = part + 1 if part < length else part - 1
        return rng.integers(length - part + 1), part, scaled


def schedule(data, batch_size, seed, iterations, rank=0, world=1):
    """Batch sampler: for each iteration, counted from 1, the keys of this process's share of the
    batch. Each epoch has its own shuffle, and drops its last, incomplete batch. The shuffle is
    computed again for each batch, so that a run can resume anywhere."""
    for iteration in iterations:
        epoch, step = divmod(iteration - 1, len(data) // batch_size)
        order = np.random.default_rng((seed, epoch)).permutation(len(data))
        batch = order[step * batch_size:(step + 1) * batch_size]
        yield [(iteration, int(index)) for index in batch[rank::world]]


def normalise(images):
    """Images uint8 (B, 3, H, W) -> float32, standardised by ImageNet's mean and deviation."""
    mean = MEAN.to(images.device, non_blocking=True)  # (3, 1, 1)
    std = STD.to(images.device, non_blocking=True)  # (3, 1, 1)
    return (images.float() - mean) / std  # (B, 3, H, W)


# ---- What a first reading may skip: files
def read_list(path):
    """The non-empty lines of a text file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: is --data-root right? (README, Data)")
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return [line.strip() for line in lines if line.strip()]


def find_files(folder, ids, *suffixes, optional=False):
    """The path of each id in a folder. An id like "city/0001" lies in a sub-folder. None if the
    files are optional and all missing, like the labels of VOC's test images."""
    found = {}
    for file in sorted(glob("**", root_dir=folder, recursive=True)):
        name, suffix = splitext(file)
        if suffix.lower() in suffixes:
            found.setdefault(name, f"{folder}/{file}")      # im0.jpg wins over im0.png
    missing = [i for i in ids if i not in found]
    if optional and len(missing) == len(ids):
        return None
    if missing or not ids:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of {len(ids)} files are missing, such as {missing[:1]} + "
            f"{suffixes}: is --data-root right, and has the list names without suffix?")
    return [found[i] for i in ids]


def read_image(path, exif=False):
    """An image file as uint8 (3, H, W). exif: apply its EXIF rotation; labels have none."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file) if exif else file
            rgb = pil_to_tensor(image.convert("RGB"))  # (3, H, W)
    except Exception as error:                              # Pillow raises many kinds
        raise OSError(f"{path}: not an image, or damaged ({error}): replace it") from error
    if image.mode.startswith(("I", "F")):                   # 16 or 32 bits, clipped by convert()
        raise OSError(f"{path}: gray of more than 8 bits: save it with 8")
    return rgb


def read_label(path):
    """The raw values of a label file (H, W): a PNG of class indices, or the .mat of SBD (GTcls),
    PASCAL Context (LabelMap) or COCO-Stuff 10K (S)."""
    try:
        if path.endswith(".mat"):
            mat = loadmat(path, variable_names=["GTcls", "LabelMap", "S"])
            if "GTcls" in mat:
                return mat["GTcls"][0, 0]["Segmentation"]  # (H, W)
            raw = mat["LabelMap"] if "LabelMap" in mat else mat["S"]  # (H, W)
            return raw.astype(np.uint16)                    # values reach 459
        with Image.open(path) as file:
            raw = np.array(file, np.uint8)  # (H, W)
    except Exception as error:                              # Pillow and scipy raise many kinds
        raise OSError(f"{path}: not a label file, or damaged ({error}): replace it") from error
    if file.format != "PNG" or file.mode not in ("P", "L", "1"):
        raise OSError(f"{path}: {file.format} {file.mode}: a label must be a PNG of class indices, "
                      "palette or 8-bit gray")
    return raw


# ---- Colours
def palette_of(classes):
    """VOC's colours, uint8 (256, 3): the bits of a class index go in turn to red, green and blue,
    to their highest bits first. Only background is black."""
    palette = np.zeros((256, 3), np.uint8)
    for c in range(256):
        for bit in range(8):
            palette[c, bit % 3] |= ((c >> bit) & 1) << (7 - bit // 3)
    if classes[0] != "background":
        palette[:IGNORE] = palette[1:]
    return palette


def save_index_png(label, path, classes):
    """Writes class indices (H, W) as a palette PNG, as VOC's server wants them."""
    image = Image.fromarray(np.asarray(label, np.uint8))
    image.putpalette(palette_of(classes).tobytes())
    Path(path).parent.mkdir(parents=True, exist_ok=True)    # a name may have a sub-folder
    image.save(path)


# ---- Names of the classes, and their numbers in the label files
VOC_CLASSES = [  # the order of the development kit
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor"]
CONTEXT_CLASSES = [  # the order of the release's 59_labels.txt
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "table", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor", "bag", "bed", "bench", "book", "building", "cabinet", "ceiling", "cloth",
    "computer", "cup", "door", "fence", "floor", "flower", "food", "grass", "ground", "keyboard",
    "light", "mountain", "mouse", "curtain", "platform", "sign", "plate", "road", "rock",
    "shelves", "sidewalk", "sky", "snow", "bedclothes", "track", "tree", "truck", "wall", "water",
    "window", "wood"]
COCO_CLASSES = [  # the order of the release's labels.txt
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote",
    "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush", "banner", "blanket",
    "branch", "bridge", "building-other", "bush", "cabinet", "cage", "cardboard", "carpet",
    "ceiling-other", "ceiling-tile", "cloth", "clothes", "clouds", "counter", "cupboard",
    "curtain", "desk-stuff", "dirt", "door-stuff", "fence", "floor-marble", "floor-other",
    "floor-stone", "floor-tile", "floor-wood", "flower", "fog", "food-other", "fruit",
    "furniture-other", "grass", "gravel", "ground-other", "hill", "house", "leaves", "light",
    "mat", "metal", "mirror-stuff", "moss", "mountain", "mud", "napkin", "net", "paper",
    "pavement", "pillow", "plant-other", "plastic", "platform", "playingfield", "railing",
    "railroad", "river", "road", "rock", "roof", "rug", "salad", "sand", "sea", "shelf",
    "sky-other", "skyscraper", "snow", "solid-other", "stairs", "stone", "straw",
    "structural-other", "table", "tent", "textile-other", "towel", "tree", "vegetable",
    "wall-brick", "wall-concrete", "wall-other", "wall-panel", "wall-stone", "wall-tile",
    "wall-wood", "water-other", "waterdrops", "window-blind", "window-other", "wood"]
CONTEXT_IDS = (  # of the 59 classes among the 459 of trainval/*.mat
    2, 23, 25, 31, 34, 45, 59, 65, 72, 98, 397, 113, 207, 258, 284, 308, 347, 368, 416, 427, 9,
    18, 22, 33, 44, 46, 68, 80, 85, 104, 115, 144, 158, 159, 162, 187, 189, 220, 232, 259, 260,
    105, 296, 355, 295, 324, 326, 349, 354, 360, 366, 19, 415, 420, 424, 440, 445, 454, 458)
COCO_OF_VOC = (  # COCO ids of VOC's classes 1..20
    5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
COCO_REMOVED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)     # of the ids 1..182: no class
COCO_KEPT = [i for i in range(1, 183) if i not in COCO_REMOVED]
COCO_TO_CLASS = {i: c for c, i in enumerate(COCO_KEPT)} | {i: IGNORE for i in COCO_REMOVED}
