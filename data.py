"""The data sets: images and index labels, read from disk as their authors distribute them, or drawn by program.

    data = build_dataset("voc", "datasets", "val")
    image, label = data[0]                             # uint8 (3, H, W), uint8 (H, W): class index, or 255 = ignored

Everything stays uint8 until it is on the device, where `normalise` makes floats of it.
"""
import argparse
import functools
import glob
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from scipy.io import loadmat, whosmat
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import SBDataset, VOCSegmentation
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.utils import draw_segmentation_masks

from backbone import UserError, first_line

IGNORE = 255                      # label of pixels that count neither in training nor in evaluation
ILLEGAL = 254                     # in a label table: a value that must not occur
MAX_PIXELS = 100_000_000          # of one image or label
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)          # ImageNet's, of images in 0..1
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)                   # of the training view (released code's seven steps)
DATASETS = ("scenes", "cells", "cells-key", "cells-local", "voc", "context", "cocostuff", "cocostuff164k", "coco2voc",
            "folder")

Image.MAX_IMAGE_PIXELS = None     # MAX_PIXELS takes its place

CLASSES = {  # names in the order of the class indices
    "scenes": "sky, sea, grass, sand, mountain, tree, house, boat, sun",
    **dict.fromkeys(("cells", "cells-key", "cells-local"), "dark stripes, bright stripes, lines, checks"),
    "voc": "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, "
           "motorbike, person, pottedplant, sheep, sofa, train, tvmonitor",
    "context": (  # the order of the release's 59_labels.txt
        "aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, table, dog, horse, motorbike, person, "
        "pottedplant, sheep, sofa, train, tvmonitor, bag, bed, bench, book, building, cabinet, ceiling, cloth, "
        "computer, cup, door, fence, floor, flower, food, grass, ground, keyboard, light, mountain, mouse, curtain, "
        "platform, sign, plate, road, rock, shelves, sidewalk, sky, snow, bedclothes, track, tree, truck, wall, "
        "water, window, wood"),
    "cocostuff": (
        "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop "
        "sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, "
        "umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball "
        "glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, "
        "apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, "
        "dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, "
        "refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush, banner, blanket, branch, "
        "bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other, ceiling-tile, cloth, "
        "clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, "
        "floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, "
        "gravel, ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, "
        "net, paper, pavement, pillow, plant-other, plastic, platform, playingfield, railing, railroad, river, "
        "road, rock, roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, "
        "straw, structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete, "
        "wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind, "
        "window-other, wood")}
CONTEXT_IDS = (  # of those 59 among the 459 labels of trainval/*.mat; all others are "other"
    "2 23 25 31 34 45 59 65 72 98 397 113 207 258 284 308 347 368 416 427 9 18 22 33 44 46 68 80 85 104 115 144 158 "
    "159 162 187 189 220 232 259 260 105 296 355 295 324 326 349 354 360 366 19 415 420 424 440 445 454 458")
COCO_REMOVED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)      # ids 1..182 that no pixel has: 171 are left
COCO_OF_VOC = (5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)    # COCO ids of VOC's 1..20
OFFICIAL = {  # images per split, as the authors count them
    "voc": {"train": 1464, "val": 1449, "trainval": 2913, "trainaug": 10582, "test": 1456},
    "context": {"train": 4998, "val": 5105, "trainval": 10103},
    "cocostuff": {"train": 9000, "test": 1000, "all": 10000},
    "cocostuff164k": {"train": 118287, "val": 5000}, "coco2voc": {"train": 118287, "val": 5000},
    "folder": {"train": None, "val": None}}
VAL_SPLIT = {"cocostuff": "test"}          # what others call val; elsewhere it is "val"


def class_names(name):
    return CLASSES[name].split(", ")


# ---------------------------------------------------------------------------------------------------------------------
# Data sets: one function each, which says where the files are, and one table: raw label -> class -> ignored
def build_dataset(name, root="datasets", split=None, context_classes=59):
    """The data set `name` in folder `root`: Images with `name`, `split`, `classes`, `ids`, `labelled`, and items
    (image uint8 (3, H, W), label uint8 (H, W), all 255 where there are no labels). UserError says what is missing.

    split: the name of a list of the data set; by default the one for validation.
    context_classes: 59, or 60 to learn everything else as a class of its own (PASCAL Context only).
    """
    split = split or VAL_SPLIT.get(name, "val")
    if name in DRAWN:
        return Drawn(name, split)
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no folder {root}: --data-root names the folder that holds the data set (README, Data)")
    if name == "context":
        return context(root, split, context_classes)
    return {"voc": voc, "cocostuff": cocostuff, "cocostuff164k": cocostuff164k, "coco2voc": coco2voc,
            "folder": folder}[name](root, split)


class Images(Dataset):
    """What the data sets have in common. A subclass gives `read`, and `to_classes` if its files hold other numbers."""
    labelled, endless, scales = True, False, SCALES

    def __init__(self, name, split, classes, ids):
        self.name, self.split, self.classes = name, split, classes
        self.ids = np.array(ids)      # plain bytes: a list would be copied into every worker as its counts of use change

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        image, raw = self.read(i)
        return image, torch.from_numpy(self.to_classes(raw, i))

    def to_classes(self, raw, i):
        """Raw label values -> class indices and IGNORE, uint8, same shape."""
        return raw


class Pairs(Images):
    """Images on disk and their labels. `table` maps a raw label value to a class index, IGNORE or ILLEGAL."""

    def __init__(self, name, split, classes, ids, images, labels, table):
        super().__init__(name, split, classes, ids)
        self.images, self.labels = np.array(images), np.array(labels if labels else [])
        self.table, self.labelled = table, labels is not None

    def read(self, i):
        """Image uint8 (3, H, W) and raw label (H, W) as it stands in the file (IGNORE where there is none)."""
        image = read_image(self.images[i])
        if not self.labelled:
            return image, np.full(image.shape[1:], IGNORE, np.uint8)
        raw = read_label(self.labels[i])
        if raw.shape != tuple(image.shape[1:]):
            raise UserError(f"{self.labels[i]}: label is {raw.shape[1]}x{raw.shape[0]}, its image {image.shape[2]}x"
                            f"{image.shape[1]} pixels: the two are not of one release")
        return image, raw

    def to_classes(self, raw, i):
        if not self.labelled:
            return raw
        label = self.table.take(raw)
        if (label == ILLEGAL).any():
            values = ", ".join(str(v) for v in np.unique(raw[label == ILLEGAL])[:5])
            raise UserError(f"{self.labels[i]}: label value {values} does not occur in {self.name}, which has "
                            f"{len(self.classes)} classes (is it another data set's file, or a converted one?)")
        return label


class Cached(Images):
    """A data set decoded once and kept in memory. Loader workers share it where they are forked, as on Linux."""

    def __init__(self, data, workers):
        super().__init__(data.name, data.split, data.classes, data.ids)
        self.scales = data.scales
        loader = DataLoader(data, batch_size=None, num_workers=workers)
        # Copies: what a worker hands over lies in shared memory, and every piece of it holds a file open.
        self.pairs = [(image.clone(), label.numpy().copy()) for image, label in loader]

    def read(self, i):
        return self.pairs[i]                                                   # (3, H, W), (H, W) class indices


def label_table(classes):
    """The table raw label -> class as uint8 (65536,), from {raw value: class index or IGNORE}; the rest is ILLEGAL."""
    table = np.full(65536, ILLEGAL, np.uint8)
    table[list(classes.keys())] = list(classes.values())
    return table


def voc(root, split):
    """PASCAL VOC 2012 in VOCdevkit/VOC2012. trainaug: from SBD's .mat files, or from a SegmentationClassAug/ folder."""
    base = within(root, "VOCdevkit/VOC2012")
    lists, classes = base / "ImageSets" / "Segmentation", class_names("voc")
    sbd = next((root / place for place in SBD_PLACES if (root / place / "cls").is_dir()), None)
    if split == "trainaug" and sbd:
        # VOC's masks for VOC's ids, SBD's for the others; SBD's own lists hold images of VOC val, which must not leak
        own, val = read_list(lists / "train.txt"), set(read_list(lists / "val.txt"))
        more = sorted({*read_list(sbd / "train.txt"), *read_list(sbd / "val.txt")} - set(own) - val)
        ids = own + more
        labels = find_files(base / "SegmentationClass", own, (".png",))
        labels += find_files(sbd / "cls", more, (".mat",))
    elif split == "trainaug" and not (base / "SegmentationClassAug").is_dir():
        raise UserError(f"trainaug needs SBD: unpack benchmark.tgz in {root}, or put SegmentationClassAug/ and its "
                        f"list into {base}; or train on --split train")
    else:
        # validation never depends on somebody's merged copy: VOC's own masks for VOC's own splits
        ids = read_list(lists / f"{split}.txt")
        masks = base / ("SegmentationClassAug" if split == "trainaug" else "SegmentationClass")
        labels = find_files(masks, ids, (".png",)) if split != "test" else None
    images = find_files(base / "JPEGImages", ids, (".jpg",))
    return Pairs("voc", split, classes, ids, images, labels, label_table({c: c for c in (*range(21), IGNORE)}))


SBD_PLACES = ("benchmark_RELEASE/dataset", "VOCaug/dataset", "VOCdevkit/VOCaug/dataset", "sbd", ".")   # torchvision: .


def context(root, split, num_classes):
    """PASCAL Context: labels of 459 classes in trainval/*.mat, of which 59 count; images and lists of VOC 2010."""
    # The lists are the detection ones of 2010. Their images are among those of 2012 as well.
    ids = read_list(within(root, "VOCdevkit/VOC2010/ImageSets/Main") / f"{split}.txt")
    images = find_files(within(root, "VOCdevkit/VOC2010/JPEGImages", "VOCdevkit/VOC2012/JPEGImages"), ids, (".jpg",))
    mats = within(root, "trainval", "VOCdevkit/trainval", "VOCdevkit/VOC2010/trainval", "context/trainval")
    first, other = (0, IGNORE) if num_classes == 59 else (1, 0)
    table = {raw: other for raw in range(460)}
    table |= {int(raw): c for c, raw in enumerate(CONTEXT_IDS.split(), first)}
    classes = ["other"] * first + class_names("context")
    return Pairs("context", split, classes, ids, images, find_files(mats, ids, (".mat",)), label_table(table))


def coco_table(shift):
    """COCO-Stuff's 171 classes: raw = id - shift, ids 1..182 without the removed ones; shift 0: 10K, shift 1: 164K."""
    kept = [i for i in range(1, 183) if i not in COCO_REMOVED]
    table = {i - shift: IGNORE for i in COCO_REMOVED} | {i - shift: c for c, i in enumerate(kept)}
    return table | {0 if shift == 0 else 255: IGNORE}             # unlabelled


def cocostuff(root, split):
    """COCO-Stuff 10K, version 1.1: images/, annotations/*.mat, imageLists/{train,test}.txt."""
    ids = read_list(within(root, "imageLists") / f"{split}.txt")
    return Pairs("cocostuff", split, class_names("cocostuff"), ids, find_files(root / "images", ids, (".jpg",)),
                 find_files(root / "annotations", ids, (".mat",)), label_table(coco_table(0)))


def coco164k(name, root, split, classes, table):
    """The layout of COCO 2017 with stuffthingmaps: images/{train,val}2017/*.jpg, annotations/{train,val}2017/*.png."""
    if split not in ("train", "val"):
        raise UserError(f"{name} has no split {split!r}: there are train and val")
    masks = within(root, f"annotations/{split}2017")
    ids = sorted(path.stem for path in masks.glob("*.png"))
    if not ids:
        raise UserError(f"no .png in {masks}: unpack stuffthingmaps_trainval2017.zip there")
    return Pairs(name, split, classes, ids, find_files(root / f"images/{split}2017", ids, (".jpg",)),
                 find_files(masks, ids, (".png",)), label_table(table))


def cocostuff164k(root, split):
    """COCO-Stuff 164K: the label maps hold id - 1, and 255 where nothing is labelled."""
    return coco164k("cocostuff164k", root, split, class_names("cocostuff"), coco_table(1))


def coco2voc(root, split):
    """COCO 2017 with VOC's classes, everything else background: pre-training for VOC's test server (Sec. 6.2.3)."""
    table = {raw: 0 for raw in range(182)} | {255: IGNORE} | {i - 1: c for c, i in enumerate(COCO_OF_VOC, 1)}
    return coco164k("coco2voc", root, split, class_names("voc"), table)


def folder(root, split):
    """Your own data in VOC's layout: JPEGImages/, SegmentationClass/, ImageSets/Segmentation/SPLIT.txt, classes.txt."""
    classes = read_list(within(root, "classes.txt"), whole_line=True)
    if len(classes) > ILLEGAL:
        raise UserError(f"{root / 'classes.txt'}: {len(classes)} classes, at most {ILLEGAL} fit in a label")
    ids = read_list(root / "ImageSets" / "Segmentation" / f"{split}.txt", whole_line=True)      # names may have spaces
    return Pairs("folder", split, classes, ids, find_files(root / "JPEGImages", ids, (".jpg", ".jpeg", ".png")),
                 find_files(root / "SegmentationClass", ids, (".png",)),
                 label_table({c: c for c in (*range(len(classes)), IGNORE)}))


# ---------------------------------------------------------------------------------------------------------------------
# Files
def within(root, *places):
    """The first of these places that exists below root. UserError tells where it is instead: archives get unpacked one
    level too deep, or the wrong level named."""
    for place in places:
        if (root / place).exists():
            return root / place
    near = [root.resolve().parent, root.resolve().parent.parent, *root.glob("*/"), *root.glob("*/*/")]
    found = next((p for p in near for place in places if (p / place).exists()), None)
    remedy = f"it is in {found}: --data-root {found}" if found else "is --data-root right? (README, Data)"
    raise UserError(f"no {places[0]} in {root}: {remedy}")


def read_list(path, whole_line=False):
    """The entries of a text file, one per line (its first word, as some lists carry a second column)."""
    if not path.is_file():
        others = sorted(p.stem for p in path.parent.glob("*.txt")) if path.parent.is_dir() else []
        hint = f"; lists there: {', '.join(others)}" if others else ": is --data-root right? (README, Data)"
        raise UserError(f"no list {path}{hint}")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    entries = [line if whole_line else line.split()[0] for line in lines if line]
    if not entries:
        raise UserError(f"{path}: empty list")
    return entries


def find_files(base, ids, suffixes):
    """Path of every id in folder `base` with the first fitting suffix; UserError names the first that is missing."""
    if not base.is_dir():
        raise UserError(f"no folder {base}: is --data-root right? (README, Data)")
    there = {entry.name for entry in base.iterdir()}
    names = [next((i + s for s in suffixes if i + s in there), None) for i in ids]
    if None in names:
        lost = [i for i, name in zip(ids, names, strict=True) if name is None]
        deeper = next(base.glob(f"*/{glob.escape(lost[0])}{suffixes[0]}"), None)
        raise UserError(f"no {lost[0]}{suffixes[0]} in {base}: {len(lost)} of {len(ids)} on the list are missing"
                        + (f"; it is in {deeper.parent}: move these files one level up" if deeper else ""))
    return [str(base / name) for name in names]


def read_image(path, turn=False):
    """An image file as uint8 (3, H, W). turn: as its EXIF data says, which the labels of data sets never are."""
    try:
        with Image.open(path) as image:                                    # reads the header only
            check_pixels(path, *image.size)
            if image.format == "JPEG" and image.mode in ("RGB", "L") and not turn:
                data = torch.from_numpy(np.fromfile(path, np.uint8))
                return decode_jpeg(data, mode=ImageReadMode.RGB)           # bit for bit Pillow's result, and faster
            if turn:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                                 # 16 bits of gray: Pillow would cut them off
                image = Image.fromarray((np.array(image) >> 8).clip(0, 255).astype(np.uint8))
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - torchvision and Pillow raise many kinds for broken files
        raise UserError(f"{path}: cannot be read as an image ({first_line(error)}): unpack or fetch it again") from None


def check_pixels(path, width, height):
    """UserError for images that would fill the memory; their header is enough to tell."""
    if width * height > MAX_PIXELS:
        raise UserError(f"{path}: {width}x{height} pixels, more than the limit of {MAX_PIXELS} (data.MAX_PIXELS)")


def read_label(path):
    """The raw values of a label file, uint8 or uint16 (H, W): an index PNG, or a .mat of SBD, Context or COCO-Stuff."""
    try:
        raw = read_mat(path) if str(path).endswith(".mat") else read_index_png(path)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - Pillow and scipy raise many kinds for broken files
        raise UserError(f"{path}: cannot be read as a label ({first_line(error)}): unpack or fetch it again") from None
    if raw.ndim != 2:
        raise UserError(f"{path}: a label has height and width, this has {raw.ndim} dimensions")
    check_pixels(path, *raw.shape[::-1])             # SBD's header does not tell
    if raw.dtype.kind not in "buif":
        raise UserError(f"{path}: holds {raw.dtype.name}, no label numbers")
    if raw.dtype != np.uint8:                    # ids reach 459, and some tools write doubles: never wrap, never round
        whole = raw.astype(np.uint16)
        if (whole != raw).any():
            raise UserError(f"{path}: holds values that are no label numbers")
        raw = whole
    return raw


def read_index_png(path):
    with Image.open(path) as image:
        check_pixels(path, *image.size)
        if image.mode not in ("P", "L"):
            raise UserError(f"{path}: a label holds class indices (palette or 8-bit gray), this is {image.mode}")
        return np.array(image)


def read_mat(path):
    """GTcls.Segmentation (SBD), LabelMap (Context) or S (COCO-Stuff 10K) of a MATLAB 5 file."""
    shapes = {name: shape for name, shape, _ in whosmat(path)}
    variable = next((name for name in ("GTcls", "LabelMap", "S") if name in shapes), None)
    if variable is None:
        raise UserError(f"{path}: no label in it (none of GTcls, LabelMap, S)")
    check_pixels(path, *(shapes[variable] * 2)[1::-1])
    if variable == "S" and max(shapes.get("names", (182,))) != 182:
        raise UserError(f"{path}: of COCO-Stuff 10K version 1.0, whose labels are numbered differently: "
                        "get cocostuff-10k-v1.1.zip")
    value = loadmat(path, variable_names=[variable])[variable]
    return np.ascontiguousarray(value[0, 0]["Segmentation"] if variable == "GTcls" else value)


def set_worker_apart(worker_id):
    """A data-loader worker leaves the group that a terminal's Ctrl-C and torchrun's SIGTERM reach as a whole: the
    process that reads from it finishes its step, and ends it then."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ---------------------------------------------------------------------------------------------------------------------
# The training view
class TrainView(Dataset):
    """The training view of a data set: random scale, crop, flip (Sec. 6.1). An item is asked for by (iteration, index)
    and is a function of (seed, iteration, index) alone: workers, processes and resuming cannot change it.

    item: image uint8 (3, crop, crop), label uint8 (crop, crop), box int64 (4,): top, bottom, left, right of the part
    of the crop that holds picture; the rest is padding, label 255, and `normalise` makes the image 0 there.
    """

    def __init__(self, data, crop, seed):
        self.data, self.crop, self.seed = data, crop, seed

    def __getitem__(self, key):
        iteration, index = key
        rng = np.random.default_rng((self.seed, iteration, index))
        image, raw = self.data.read(index)                                     # (3, H, W), (H, W)
        scale, flip = rng.choice(self.data.scales), rng.random() < 0.5
        # differs: the released code scales the whole image in floating point and cuts then. Here the window of
        # crop / scale source pixels is cut first and only it is scaled, in uint8: the same crops to one source pixel
        # and one grey level, three times as fast.
        top, height, out_h = self.window(rng, image.shape[1], scale)
        left, width, out_w = self.window(rng, image.shape[2], scale)
        image = image[:, top:top + height, left:left + width]                  # (3, height, width)
        raw = raw[top:top + height, left:left + width]                         # (height, width)
        if scale != 1:
            image = F.interpolate(image[None], (out_h, out_w), mode="bilinear", align_corners=True)[0]  # (3, h, w)
            # the label's nearest source pixel under the same align_corners grid, so that the two stay in register
            raw = raw[nearest(height, out_h)][:, nearest(width, out_w)]        # (h, w)  in two steps: much faster
        label = torch.from_numpy(np.ascontiguousarray(self.data.to_classes(raw, index)))
        pad = (0, self.crop - out_w, 0, self.crop - out_h)                     # right and bottom
        image, label = F.pad(image, pad), F.pad(label, pad, value=IGNORE)      # (3, crop, crop), (crop, crop)
        box = (0, out_h, 0, out_w)
        if flip:                                                               # after the padding, as the released code
            image, label, box = image.flip(2), label.flip(1), (0, out_h, self.crop - out_w, self.crop)
        return image, label, torch.tensor(box)

    def window(self, rng, size, scale):
        """Along one side: first source pixel, number of source pixels, number of pixels after scaling."""
        length = round(self.crop / scale)
        if length <= size:
            return rng.integers(size - length + 1), length, self.crop
        return 0, size, max(1, round(size * scale))


def nearest(length, out):
    """For `out` positions spread over `length` pixels, ends on ends: the nearest pixel of each."""
    return np.floor(np.linspace(0, length - 1, out) + 0.5).astype(np.int64)


class Schedule:
    """The batches of a run, as a sampler: which (iteration, index) this process reads. A function of (seed, iteration)
    and of nothing else, for a global batch cut into `world` processes times `accumulate` micro-batches.

    An epoch is a new order of all images; what does not fill its last batch is left out.
    """

    def __init__(self, data, batch_size, seed, start, stop, rank=0, world=1, accumulate=1):
        self.data, self.batch_size, self.seed, self.range = data, batch_size, seed, range(start, stop)
        self.rank, self.world, self.accumulate = rank, world, accumulate

    def __len__(self):
        return len(self.range) * self.accumulate

    def __iter__(self):
        for iteration in self.range:
            batch = [(iteration, int(i)) for i in self.indices(iteration)]
            micro = len(batch) // self.accumulate
            for k in range(0, len(batch), micro):
                yield batch[k + self.rank:k + micro:self.world]

    def indices(self, iteration):
        """The indices of the global batch of one iteration."""
        if self.data.endless:
            return range(iteration * self.batch_size, (iteration + 1) * self.batch_size)
        per_epoch = len(self.data) // self.batch_size
        epoch, step = divmod(iteration, per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.data))
        return order[step * self.batch_size:(step + 1) * self.batch_size]


# ---------------------------------------------------------------------------------------------------------------------
# Scenes
# Every scene is painted from five pots, and rivals share one: sky and sea, grass and tree, sand and house wall,
# mountain and roof (and hull and trunk), sun and sail (and lit window). Colour and brushwork belong to the pot, not to
# the class, and change with hour and season, so a close-up look cannot tell the rivals apart: context decides.
SCENE_COLOURS = [(135, 190, 235), (30, 80, 160), (130, 200, 80), (240, 215, 140), (130, 120, 140), (30, 110, 50),
                 (200, 60, 50), (150, 60, 160), (255, 230, 0)]
SKY, SEA, GRASS, SAND, MOUNTAIN, TREE, HOUSE, BOAT, SUN = range(9)
AIR, LEAF, EARTH, ROCK, GLOW = range(5)  # the pots

HOURS = np.array([  # zenith, horizon, tint of the light in percent
    [(62, 122, 192), (190, 220, 232), (102, 102, 99)],   # noon
    [(96, 88, 156), (252, 176, 112), (106, 91, 84)],     # dusk
    [(132, 144, 156), (212, 213, 208), (94, 96, 97)],    # overcast
    [(102, 138, 190), (246, 210, 202), (99, 96, 104)],   # dawn
    [(70, 142, 172), (238, 226, 194), (103, 101, 94)]])  # afternoon
POTS = np.array([  # leaf, earth, rock and glow of a scene are mixed from these
    [(98, 146, 62), (62, 116, 70), (204, 136, 58), (156, 162, 88), (212, 182, 88)],
    [(230, 206, 154), (214, 176, 134), (238, 222, 198), (200, 188, 176), (224, 190, 164)],
    [(108, 110, 140), (142, 100, 88), (104, 94, 132), (92, 110, 120), (166, 92, 72)],
    [(255, 242, 200), (255, 224, 144), (255, 250, 240), (255, 200, 130), (255, 234, 216)]])
DABS = (16, 5), (40, 44), (56, 56), (22, 60), (12, 12)  # how many dabs of each pot's brush go down and across a picture
LAYOUTS = ((SEA, SAND, GRASS), (SEA, GRASS), (SEA, SAND), (GRASS, SEA), (GRASS, SEA, SAND), (GRASS, SAND, SEA),
           (SEA, GRASS, SAND), (SAND, GRASS))  # the ground from the horizon to the viewer


def disc(x, y, radius):
    angle = np.arange(16) * (np.pi / 8)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1)


# Each thing has two kinds; a kind is a list of parts (pot, shade, outline), its foot at (0, 0), y pointing down.
TRUNK = ROCK, 0.7, [(-3, 0), (-2, -14), (2, -14), (3, 0)]
WALL = EARTH, 1.0, [(-12, 0), (-12, -13), (12, -13), (12, 0)]
HULL = ROCK, 0.85, [(-13, -6), (13, -6), (9, 0), (-9, 0)]
WINDOWS = [[(x - 2, -4), (x - 2, -9), (x + 2, -9), (x + 2, -4)] for x in (-6, 6)]
THINGS = {
    TREE: ([TRUNK, (LEAF, 0.86, disc(0, -19, 11)), (LEAF, 1.0, disc(-4, -21, 7)), (LEAF, 1.1, disc(4, -24, 6))],
           [TRUNK, (LEAF, 0.88, [(-11, -5), (0, -23), (11, -5)]), (LEAF, 0.98, [(-9.5, -11), (0, -29), (9.5, -11)]),
            (LEAF, 1.08, [(-8, -17), (0, -34), (8, -17)])]),
    HOUSE: ([WALL, (ROCK, 1.0, [(-14, -11), (-8, -23), (8, -23), (14, -11)])] + [(ROCK, 0.7, w) for w in WINDOWS],
            [WALL, (ROCK, 1.0, [(-14, -11), (0, -26), (14, -11)])] + [(GLOW, 1.0, w) for w in WINDOWS]),
    BOAT: ([(GLOW, 1.0, [(0, -5), (0, -28), (8, -16), (11, -6)]), (GLOW, 0.9, [(0, -5), (-1, -25), (-11, -6)]), HULL],
           [(GLOW, 1.0, [(-10, -6), (-6, -19), (5, -28), (11, -6)]), HULL])}


def draw_scene(index, key, size=(97, 129)):
    """Paint scene `index` of the endless series `key` (0: training, 1: validation); same arguments, same bytes.

    Returns the image, uint8 (H, W, 3), and its label, uint8 (H, W), with class indices.
    """
    rng = np.random.default_rng([key, index])
    uniform = rng.uniform
    height, width = 96, 96 * size[1] / size[0]  # all lengths below are for a picture 96 high
    zoom = 2 * size[0] / height  # shapes are drawn at twice the size, then halved: smooth edges

    zenith, haze, light = HOURS[rng.integers(len(HOURS))] + uniform(-11, 11, (3, 3)) * [[1], [1], [0.6]]
    share = uniform(size=(4, 5, 1)) ** 4
    leaf, earth, rock, glow = (POTS * share).sum(1) / share.sum(1)                         # (3,) each
    upper_colour = np.stack([zenith, leaf * 1.12, earth * 1.06, rock * 1.08, glow])        # (5, 3)
    lower_colour = np.stack([haze, leaf * 0.84, earth * 0.9, rock * 0.9, glow * (1, 0.95, 0.85)])
    canvas = Image.new("L", (2 * size[1], 2 * size[0]))  # the number of the shape seen at each pixel, 0 for the sky
    draw = ImageDraw.Draw(canvas)
    shapes = []  # per shape: label, pot, upper edge, lower edge, the colour there and there

    def paint(label, pot, outline, shade=1.0, distance=0.0):
        outline = np.asarray(outline)
        colours = np.stack([upper_colour[pot], lower_colour[pot]])
        if label == SEA:
            colours = np.stack([0.75 * haze + 0.25 * zenith, zenith])  # the sky upside down
        elif label != SKY:
            colours = colours * (shade * uniform(0.9, 1.1)) + uniform(-9, 9, 3)
        draw.polygon([tuple(point) for point in np.rint(outline * zoom).astype(int).tolist()], fill=len(shapes))
        edges = outline[:, 1].min(), outline[:, 1].max()
        shapes.append((label, pot, *edges, *(colours + distance * (haze - colours))))

    def below(y, amplitude, knots, octaves):
        """All that lies below a fractal line across the picture."""
        x = np.linspace(-2, width + 2, 65)
        for count in knots * 2 ** np.arange(octaves):
            y = y + amplitude * np.interp(x, np.linspace(-2, width + 2, count + 1), uniform(-0.5, 0.5, count + 1))
            amplitude = amplitude / 2
        return [(-2, height + 2), *zip(x, y), (width + 2, height + 2)]

    # the backdrop: sky, sun, ridges one behind the other
    horizon = uniform(36, 50)
    paint(SKY, AIR, [(-2, 0), (width + 2, 0), (width + 2, horizon), (-2, horizon)])
    sun_x, sun_y, sunny = uniform(12, width - 12), uniform(12, horizon - 6), uniform() < 0.75
    if sunny:
        paint(SUN, GLOW, disc(sun_x, sun_y, uniform(9, 12)))
    for distance in (0.5, 0.2)[rng.choice(3, p=(0.45, 0.35, 0.2)):]:
        ridge = below(horizon - uniform(6, 16), uniform(10, 28), rng.integers(2, 5), 4)
        paint(MOUNTAIN, ROCK, ridge, distance=distance)

    # the ground, then the things on it from far to near, larger when nearer
    layout = LAYOUTS[rng.integers(len(LAYOUTS))]
    steps = (np.arange(1, len(layout)) + uniform(-0.15, 0.15, len(layout) - 1)) / len(layout)
    edges = [horizon, *(horizon + (height - horizon) * steps), height + 3]
    things = []
    for label, upper, lower in zip(layout, edges, edges[1:]):
        wave = 0 if label == SEA and upper == horizon else uniform(3, 7)
        paint(label, {SEA: AIR, GRASS: LEAF, SAND: EARTH}[label], below(upper, wave, 3, 2))
        counts = {SEA: {BOAT: rng.integers(1, 3)}, GRASS: {TREE: rng.integers(1, 3), HOUSE: rng.integers(0, 3)}}
        labels = [thing for thing, count in counts.get(label, {}).items() for _ in range(count)]
        for place, thing in zip(rng.permutation(len(labels)), labels):  # side by side, so that none hides its like
            things.append((uniform(upper + 4, lower - 3), (place + uniform(0.2, 0.8)) * width / len(labels), thing))
    for y, x, thing in sorted(things):
        scale = (0.85 + 0.7 * (y - horizon) / (height - horizon)) * uniform(0.9, 1.15, 2) * (rng.choice((-1, 1)), 1)
        for pot, shade, outline in THINGS[thing][rng.integers(2)]:
            paint(thing, pot, (outline + uniform(-0.5, 0.5, (len(outline), 2))) * scale + (x, y), shade)

    # from shape numbers to colours: every shape fades from its upper to its lower edge
    label, pot, upper, lower, first, last = (np.array(column) for column in zip(*shapes))  # (S,) each, first, last (S, 3)
    row, shape = np.arange(2 * size[0])[:, None], np.asarray(canvas)                       # (2H, 1), (2H, 2W)
    fade = first + ((row / zoom - upper) / (lower - upper)).clip(0, 1)[..., None] * (last - first)         # (2H, S, 3)
    image = fade.clip(0, 255).astype(np.uint8).reshape(-1, 3).take(row * len(shapes) + shape, 0)           # (2H, 2W, 3)
    image = np.asarray(Image.fromarray(image).reduce(2), np.float32)                       # (H, W, 3)
    label, pot = label.astype(np.uint8)[shape[::2, ::2]], pot[shape[::2, ::2]]             # (H, W) each

    # sunshine around the sun and in a column on the sea, the brushwork of the pots, the light of the hour, grain
    y, x = np.ogrid[:size[0], :size[1]]
    if sunny:
        away = (2 * x / zoom - sun_x) ** 2 + (label == SKY) * (2 * y / zoom - sun_y) ** 2
        shine = (pot == AIR) * 0.6 / (1 + away / 160)
        image += shine[..., None].astype(np.float32) * (glow.astype(np.float32) - image)
    dabs = [0.3 * rng.integers(0, 256, (*cells, 3)) + 0.7 * rng.integers(38, 218, (*cells, 1)) for cells in DABS]
    dabs = [Image.fromarray(brush.astype(np.uint8)).resize(size[::-1], Image.BICUBIC) for brush in dabs]
    strength = uniform(0.1, 0.2, 5).astype(np.float32)
    image += (np.stack(dabs)[pot, y, x] - np.float32(128)) * strength[pot][..., None]
    image = image * (light / 100).astype(np.float32) + rng.integers(-4, 5, (*size, 1), np.int8)
    return image.clip(0, 255).astype(np.uint8), label


# ---------------------------------------------------------------------------------------------------------------------
# Cells
# A task with known answers, for attention and nothing else: about 40 cells, half of them striped. The striped cells of an
# image are all of class 0 or all of class 1, which differ by `shift` in the mean of a cell's brightness, itself of
# deviation 1: with shift 0.5 one cell tells 60% (the normal distribution's Phi(shift / 2)), the mean of twenty 87%
# (Phi(shift / 2 * sqrt(20))). Only who looks all over the image, at stripes alone, gets there.
CELL_SHIFTS = {"cells": 0.5,            # pool: many weak witnesses
               "cells-key": 0.0,        # key: the square in a corner decides, black or white
               "cells-local": 4.0}      # a control: every cell tells by itself (98%)
CELL_UNIT = 16                          # grey levels


def draw_cells(index, key, shift, side=193):
    """Paints picture `index` of the endless series `key` (0: training, 1: validation); same arguments, same bytes.

    Returns the image, uint8 (H, W, 3), and its label, uint8 (H, W): 0 or 1 striped, 2 lines, 3 checks, IGNORE the square.
    """
    rng = np.random.default_rng([key, index])
    bright = index % 2                                                         # the class of all striped cells
    count = rng.integers(36, 45)
    at = rng.uniform(0, side, (2, count, 1)).astype(np.float32)                # centres of the cells
    y, x = ((np.arange(side, dtype=np.float32) - centre) ** 2 for centre in at)            # (count, side) each
    cell = (y[:, :, None] + x[:, None]).argmin(0)                              # (H, W)  the nearest centre's number
    texture = rng.choice(3, count, p=(0.5, 0.25, 0.25))
    brightness = rng.normal(size=count) + (texture == 0) * shift * (bright - 0.5)
    row, column = np.indices((side, side)) // 2 % 2                            # stripes of two pixels
    pattern = np.stack([column, row, row ^ column])[texture[cell], np.arange(side)[:, None], np.arange(side)]    # (H, W)
    image = 128 + CELL_UNIT * (brightness[cell] + 2 * pattern - 1) + rng.normal(0, 4, (side, side))
    label = np.where(texture == 0, bright, texture + 1).astype(np.uint8)[cell]
    if shift == 0:
        image[:16, :16], label[:16, :16] = 255 * bright, IGNORE
    return np.repeat(image.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2), label


# Function (index, key) -> image, label; number of pictures to validate on
DRAWN = {"scenes": (draw_scene, 64),
         **{name: (functools.partial(draw_cells, shift=shift), 400) for name, shift in CELL_SHIFTS.items()}}
OFFICIAL |= {name: {"train": None, "val": count} for name, (_, count) in DRAWN.items()}


class Drawn(Images):
    """Pictures drawn as they are asked for. Training: endless; validation: always the same."""
    scales = (1.0,)

    def __init__(self, name, split):
        if split not in ("train", "val"):
            raise UserError(f"{name} has no split {split!r}: there are train and val")
        self.draw, count = DRAWN[name]
        super().__init__(name, split, class_names(name), [f"{name.removesuffix('s')}{i:02d}" for i in range(count)])
        self.key, self.endless = int(split == "val"), split == "train"

    def read(self, i):
        image, label = self.draw(i, self.key)
        return torch.from_numpy(image).permute(2, 0, 1), label                 # (3, H, W), (H, W)


# ---------------------------------------------------------------------------------------------------------------------
# What the scripts share
def normalise(images, boxes=None):
    """Images uint8 (B, 3, H, W) -> float32, ImageNet's mean and deviation, on their device; 0 outside the boxes."""
    mean, std = statistics(images.device)                                                       # (3, 1, 1) each
    images = (images.float() - mean) / std
    if boxes is not None:
        top, bottom, left, right = boxes.T[:, :, None, None]                                    # (B, 1, 1) each
        rows = torch.arange(images.shape[2], device=images.device)[:, None]                     # (H, 1)
        columns = torch.arange(images.shape[3], device=images.device)                           # (W,)
        inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)        # (B, H, W)
        images = images * inside[:, None]
    return images


@functools.cache
def statistics(device):
    """MEAN and STD of pixels 0..255 on a device: put there once, as every copy from the CPU waits for the GPU."""
    return [torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (MEAN, STD)]


def pick_device(name="auto"):
    """torch.device for "auto" (cuda, then mps, then cpu) or a name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} sees no CUDA device; --device cpu works anywhere")
    if name.startswith("mps") and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} sees no mps device; --device cpu works anywhere")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: torch knows no such device; choose auto, cuda, mps or cpu") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from cuda:0")
    return device


def memory_format(device):
    """The layout convolutions are fast in."""
    # On mps the backward pass of BN is wrong, or fails, in channels_last (pytorch issues 134580, 175189).
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def to_device(tensor, device):
    """To the device. The loader pins memory for CUDA; only from such may a copy go on while its source is let go."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def voc_palette():
    """VOC's 256 colours, uint8 (256, 3): the bits of the index, three at a time, from the top bits of R, G, B down."""
    index = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for triple in range(3):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * triple + channel) & 1) << (7 - triple)).astype(np.uint8)
    return palette


def palette_of(classes):
    """The colours of a data set's classes, uint8 (256, 3)."""
    palette = voc_palette()
    if list(classes) == class_names("scenes"):
        palette[:len(SCENE_COLOURS)] = SCENE_COLOURS
    elif classes[0] != "background":                 # VOC's first colour is black, which suits a background only
        palette[:IGNORE] = palette[1:]
    return palette


def save_index_png(label, path, palette):
    """Writes class indices uint8 (H, W) as a palette PNG: what VOC's server and label tools read."""
    image = Image.fromarray(np.asarray(label, np.uint8))
    image.putpalette(palette.tobytes())              # all 256 colours, or Pillow would write fewer bits per pixel
    image.save(path)


def to_pil(image):
    """Image uint8 (3, H, W) -> PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def overlay(image, label, palette, alpha=0.6):
    """The classes of label uint8 (H, W) in their colours over the image uint8 (3, H, W) -> uint8 (3, H, W)."""
    present = [int(c) for c in torch.unique(label) if c != IGNORE]
    if not present:
        return image
    masks = torch.stack([label == c for c in present])                          # (classes present, H, W)
    return draw_segmentation_masks(image, masks, alpha=alpha, colors=[tuple(palette[c].tolist()) for c in present])


def run(main):
    """Runs a script's main(): a UserError becomes one line and exit status 1."""
    try:
        status = main()                                           # None, or a status
        sys.stdout.flush()
    except UserError as error:
        status = f"error: {error}"
        # The frames of the exception hold the data loader. Let go of them, so that it ends its workers now: those that
        # the interpreter's exit ends are called a fault, by torch's handler.
        fault = error
        while fault:
            fault.__traceback__, fault = None, fault.__context__
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except BrokenPipeError:                                       # whoever read the output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())       # or the interpreter's exit complains
        status = 1
    except OSError as error:                                      # a folder that cannot be written, a full disk
        status = f"error: {error}"
    if status:
        sys.exit(status)


# ---------------------------------------------------------------------------------------------------------------------
# python data.py: is this copy of a data set whole?
class Checked(Dataset):
    """Reads pairs for the check: item i is (None, counts of label values (256,)), or (the error's text, zeros)."""

    def __init__(self, data):
        self.data = data

    def __getitem__(self, i):
        try:
            return None, np.bincount(self.data[i][1].flatten().numpy(), minlength=256)
        except UserError as error:
            return str(error), np.zeros(256, np.int64)


def check(name, root, context_classes, count, out):
    """Checks a copy of a data set, prints what it finds, draws a contact sheet; returns the number of faults."""
    train = build_dataset(name, root, "train", context_classes)    # nothing there at all: one line is enough
    print(f"{name} in {root}")
    faults, sheet = [], None
    for split, official in OFFICIAL[name].items():
        try:
            data = train if split == "train" else build_dataset(name, root, split, context_classes)
        except UserError as error:
            optional = split != VAL_SPLIT.get(name, "val") or name == "folder"
            print(f"  {split:9s} {'not there' if optional else 'FAULT'}: {error}")
            faults += [] if optional else [str(error)]
            continue
        differ = len(data) - official if official else 0
        print(f"  {split:9s} {len(data)} images"
              + (f", {abs(differ)} {'more' if differ > 0 else 'fewer'} than the official {official}" if differ else
                 ", the official number" if official else ""))
        if not data.labelled:
            continue
        wanted = np.sort(np.random.default_rng(0).permutation(len(data))[:count])
        loader = DataLoader(Checked(data), batch_size=None, sampler=wanted.tolist(), num_workers=2)
        counts, reported = np.zeros(256, np.int64), time.time()
        bad = []
        for done, (error, values) in enumerate(loader, 1):
            bad += [error] if error else []
            counts += np.asarray(values)
            if time.time() - reported > 5:
                reported = time.time()
                print(f"            {done}/{len(wanted)} pairs read", flush=True)
        print(f"            {len(wanted) - len(bad)} of {len(wanted)} pairs read are whole: they decode, sizes agree, "
              "labels are legal")
        new = [line for line in bad if line not in faults]                     # train and val are in trainval again
        for line in new[:10]:
            print(f"            FAULT: {line}")
        faults += new
        if sheet is None and not bad:
            sheet = data, counts
    if sheet:
        data, counts = sheet
        total = max(1, counts.sum())
        print(f"  pixels of the {data.split} pairs read, by class:")
        for c, label in enumerate([*data.classes, "(ignored)"]):
            print(f"    {label:20s} {100 * counts[c if c < len(data.classes) else IGNORE] / total:6.2f} %")
        path = out / f"{name}.png"
        out.mkdir(parents=True, exist_ok=True)
        contact_sheet(data).save(path)
        print(f"  wrote {path}: images with their labels laid over, to look at")
    return len(faults)


def contact_sheet(data, columns=4, rows=4, side=240):
    """Images of a data set, evenly taken, with their labels laid over, as one PIL image."""
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    palette = palette_of(data.classes)
    for n, i in enumerate(np.unique(np.linspace(0, len(data) - 1, columns * rows).astype(int))):
        image, label = data[i]
        drawn = to_pil(overlay(image, label, palette))
        drawn.thumbnail((side - 4, side - 4))
        sheet.paste(drawn, (n % columns * side, n // columns * side))
    return sheet


def download(name, root):
    """Fetches what torchvision can: VOC 2012 and SBD for voc, VOC 2010's images and lists for context."""
    if name not in ("voc", "context"):
        raise UserError(f"{name} cannot be downloaded from here: the links are in the README (Data)")
    root.mkdir(parents=True, exist_ok=True)
    try:
        VOCSegmentation(root, "2012" if name == "voc" else "2010", "train", download=True)
        if name == "voc" and not (root / "sbd" / "cls").is_dir():   # a second call would fail on what it moved
            SBDataset(root / "sbd", "train", "segmentation", download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"no download ({first_line(error)}): fetch the archives by hand (README, Data)") from None


def main():
    parser = argparse.ArgumentParser(description="Checks a copy of a data set: layout, counts, files, labels; draws "
                                     "some of it. Run it first, and paste what it prints into a bug report.")
    add = parser.add_argument
    add("--dataset", choices=DATASETS, required=True, help="data set")
    add("--data-root", type=Path, default=Path("datasets"), help="folder that holds it (default: datasets)")
    add("--context-classes", type=int, choices=(59, 60), default=59, help="of PASCAL Context (default: 59)")
    add("--count", type=int, default=100, help="random pairs to read of each list (default: 100)")
    add("--all", action="store_true", help="read every pair")
    add("--download", action="store_true", help="fetch it first, through torchvision (voc, context)")
    add("--out", type=Path, default=Path("out/check"), help="folder for the picture (default: out/check)")
    args = parser.parse_args()
    if args.download:
        download(args.dataset, args.data_root)
    faults = check(args.dataset, args.data_root, args.context_classes, None if args.all else args.count, args.out)
    if faults:
        raise UserError(f"{faults} fault{'s' * (faults > 1)} found in {args.data_root}")


if __name__ == "__main__":
    run(main)
