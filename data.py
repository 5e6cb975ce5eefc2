"""The data sets: images and index labels, read from disk as their authors distribute them, or drawn by program.

    data = build_dataset("voc", "datasets", "val")
    image, label = data[0]                             # uint8 (3, H, W), uint8 (H, W): class index, or 255 = ignored

Everything stays uint8 until it is on the device, where `normalise` makes floats of it. Also here: the training view and
the schedule of a run, and the colours of the classes.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy.io import loadmat, whosmat
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_segmentation_masks

from backbone import UserError, brief

IGNORE = 255                      # label of pixels that count neither in training nor in evaluation
ILLEGAL = 254                     # in a label table: a value that must not occur
MEAN = 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)    # ImageNet's, of pixels 0..255
STD = 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)                   # of the training view (released code's seven steps)
DRAWN = ("scenes", "cells", "cells-key", "cells-local")           # by program: extras/drawn.py
DATASETS = (*DRAWN, "voc", "context", "cocostuff", "cocostuff164k", "coco2voc", "folder")
VAL_SPLIT = {"cocostuff": "test"}                                 # what others call val
HINT = "is --data-root right? (README, Data)"                     # how messages about missing files end

CLASSES = {name: names.split(", ") for name, names in {  # names in the order of the class indices
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
        "window-other, wood")}.items()}
CONTEXT_IDS = (  # of those 59 among the 459 labels of trainval/*.mat; all others are "other"
    2, 23, 25, 31, 34, 45, 59, 65, 72, 98, 397, 113, 207, 258, 284, 308, 347, 368, 416, 427, 9, 18, 22, 33, 44, 46,
    68, 80, 85, 104, 115, 144, 158, 159, 162, 187, 189, 220, 232, 259, 260, 105, 296, 355, 295, 324, 326, 349, 354,
    360, 366, 19, 415, 420, 424, 440, 445, 454, 458)
COCO_REMOVED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)      # ids 1..182 without a class: 171 are left
COCO_CLASS = {i: c for c, i in enumerate(i for i in range(1, 183) if i not in COCO_REMOVED)} | {
    i: IGNORE for i in COCO_REMOVED}                             # id -> class
COCO_OF_VOC = (5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)    # COCO ids of VOC's 1..20


# ---- Data sets: one function each, which says where the files are, and one table: raw label -> class -> ignored
def build_dataset(name, root="datasets", split=None, context_classes=59):
    """The data set `name` in folder `root`. Items: image uint8 (3, H, W), label uint8 (H, W), all 255 if there is none.
    Attributes: `name`, `split`, `classes`, `ids`, `labelled`, `scales` (of TrainView). UserError says what is missing.

    split: the name of a list of the data set; by default the one for validation.
    context_classes: for PASCAL Context, 60 to learn everything else as a class of its own, otherwise 59.
    """
    split, root = split or VAL_SPLIT.get(name, "val"), Path(root)
    if name in DRAWN:
        return Drawn(name, split)
    if not root.is_dir():
        raise UserError(f"no folder {root}: {HINT}")
    if name == "context":
        return context(root, split, context_classes)
    return {"voc": voc, "cocostuff": cocostuff, "cocostuff164k": cocostuff164k, "coco2voc": coco2voc,
            "folder": folder}[name](root, split)


class Pairs(Dataset):
    """Images on disk and their labels. `table` maps a raw label value to a class index, IGNORE or ILLEGAL."""
    scales = SCALES

    def __init__(self, name, split, classes, ids, images, labels, table):
        self.name, self.split, self.classes, self.table = name, split, classes, table
        self.labelled = labels is not None
        # Arrays, not lists: workers count references to a list's entries, which copies the memory they share.
        self.ids, self.images, self.labels = np.array(ids), np.array(images), np.array(labels or [])

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        image = read_image(self.images[i])  # (3, H, W)
        if not self.labelled:
            return image, torch.full(image.shape[1:], IGNORE, dtype=torch.uint8)  # (H, W)
        path, raw = self.labels[i], read_label(self.labels[i])  # (H, W)
        if raw.shape != image.shape[1:]:
            raise UserError(f"{path}: label is {raw.shape[1]}x{raw.shape[0]}, its image {image.shape[2]}x"
                            f"{image.shape[1]} pixels: not of one release, or the image has an EXIF rotation")
        label = self.table.take(raw)  # (H, W)
        if (label == ILLEGAL).any():
            values = ", ".join(str(v) for v in np.unique(raw[label == ILLEGAL])[:5])
            raise UserError(f"{path}: label value {values} does not occur in {self.name}, which has "
                            f"{len(self.classes)} classes (is it another data set's file, or a converted one?)")
        return image, torch.from_numpy(label)


class Drawn(Dataset):
    """Pictures drawn by program when they are asked for: 10,000 for training, a few for validation."""
    labelled, scales = True, (1.0,)

    def __init__(self, name, split):
        from extras import drawn  # here, so that nothing else depends on the drawer

        if split not in ("train", "val"):
            raise UserError(f"{name} has no split {split!r}: there are train and val")
        self.name, self.split = name, split
        self.draw, count, self.classes = drawn.PICTURES[name]    # function of (index, split); pictures to validate on
        self.ids = np.array([f"{name}{i:02d}" for i in range(count if split == "val" else 10_000)])

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        image, label = self.draw(i, self.split)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label)  # (3, H, W), (H, W)


def label_table(classes):
    """The table raw label -> class as uint8 (65536,), from {raw value: class index or IGNORE}; the rest is ILLEGAL."""
    table = np.full(65536, ILLEGAL, np.uint8)
    table[list(classes.keys())] = list(classes.values())
    return table


def voc(root, split):
    """PASCAL VOC 2012 in VOCdevkit/VOC2012. trainaug: from SBD's .mat files, or from a SegmentationClassAug/ folder."""
    base = within(root, "VOCdevkit/VOC2012")
    lists = base / "ImageSets" / "Segmentation"
    places = ("benchmark_RELEASE/dataset", "VOCdevkit/VOCaug/dataset", "VOCaug/dataset", ".")
    sbd = next((root / place for place in places if (root / place / "cls").is_dir()), None)
    if split == "trainaug" and sbd:
        # VOC's masks for VOC's ids, SBD's for the others; SBD's own lists hold images of VOC val, which must not leak
        own, val = read_list(lists / "train.txt"), set(read_list(lists / "val.txt"))
        more = sorted({*read_list(sbd / "train.txt"), *read_list(sbd / "val.txt")} - set(own) - val)
        ids = own + more
        labels = find_files(base / "SegmentationClass", own, (".png",))
        labels += find_files(sbd / "cls", more, (".mat",))
    elif split == "trainaug":
        if not (base / "SegmentationClassAug").is_dir():
            raise UserError(f"trainaug needs SBD: unpack benchmark.tgz in {root}, or put SegmentationClassAug/ and its "
                            f"list into {base}; or train on --split train")
        ids = read_list(lists / "trainaug.txt")
        labels = find_files(base / "SegmentationClassAug", ids, (".png",))
    else:                                            # VOC's own masks, whatever else lies there; test has none
        ids = read_list(lists / f"{split}.txt")
        labels = find_files(base / "SegmentationClass", ids, (".png",)) if split != "test" else None
    images = find_files(base / "JPEGImages", ids, (".jpg",))
    table = label_table({c: c for c in (*range(21), IGNORE)})
    return Pairs("voc", split, CLASSES["voc"], ids, images, labels, table)


def context(root, split, num_classes):
    """PASCAL Context: labels of 459 classes in trainval/*.mat, of which 59 count; images and lists of VOC 2010."""
    # The lists are the detection ones of 2010. Their images are among those of 2012 as well.
    ids = read_list(within(root, "VOCdevkit/VOC2010/ImageSets/Main") / f"{split}.txt")
    images = find_files(within(root, "VOCdevkit/VOC2010/JPEGImages", "VOCdevkit/VOC2012/JPEGImages"), ids, (".jpg",))
    mats = within(root, "trainval", "VOCdevkit/trainval", "VOCdevkit/VOC2010/trainval", "context/trainval")
    sixty = num_classes == 60                        # everything else is class 0, "other"; with 59 it is ignored
    classes = ["other"] * sixty + CLASSES["context"]
    table = {raw: 0 if sixty else IGNORE for raw in range(460)}
    table |= {raw: c for c, raw in enumerate(CONTEXT_IDS, int(sixty))}
    return Pairs("context", split, classes, ids, images, find_files(mats, ids, (".mat",)), label_table(table))


def cocostuff(root, split):
    """COCO-Stuff 10K, version 1.1: images/, annotations/*.mat, imageLists/{train,test}.txt. 0 is unlabelled."""
    ids = read_list(within(root, "imageLists") / f"{split}.txt")
    return Pairs("cocostuff", split, CLASSES["cocostuff"], ids, find_files(root / "images", ids, (".jpg",)),
                 find_files(root / "annotations", ids, (".mat",)), label_table(COCO_CLASS | {0: IGNORE}))


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
    table = {i - 1: c for i, c in COCO_CLASS.items()} | {255: IGNORE}
    return coco164k("cocostuff164k", root, split, CLASSES["cocostuff"], table)


def coco2voc(root, split):
    """COCO 2017 with VOC's classes, everything else background: pre-training for VOC's test server (Sec. 6.2.3)."""
    table = {raw: 0 for raw in range(182)} | {255: IGNORE}           # raw = id - 1; 0: background
    table |= {i - 1: c for c, i in enumerate(COCO_OF_VOC, 1)}
    return coco164k("coco2voc", root, split, CLASSES["voc"], table)


def folder(root, split):
    """Your own data in VOC's layout: JPEGImages/, SegmentationClass/, ImageSets/Segmentation/SPLIT.txt, classes.txt."""
    classes = read_list(within(root, "classes.txt"), whole_line=True)
    if len(classes) > ILLEGAL:
        raise UserError(f"{root / 'classes.txt'}: {len(classes)} classes, at most {ILLEGAL} fit in a label")
    ids = read_list(root / "ImageSets" / "Segmentation" / f"{split}.txt", whole_line=True)      # names may have spaces
    return Pairs("folder", split, classes, ids, find_files(root / "JPEGImages", ids, (".jpg", ".jpeg", ".png", ".JPG")),
                 find_files(root / "SegmentationClass", ids, (".png",)),
                 label_table({c: c for c in (*range(len(classes)), IGNORE)}))


# ---- Files (skip at first reading)
def within(root, *places):
    """The first of these places that exists below root. If it lies one or two levels off, the UserError says where."""
    for place in places:
        if (root / place).exists():
            return root / place
    for base in (root.resolve().parent, root.resolve().parent.parent, *root.glob("*/"), *root.glob("*/*/")):
        if (base / places[0]).exists():
            raise UserError(f"no {places[0]} in {root}: it is in {base}: --data-root {base}")
    raise UserError(f"no {places[0]} in {root}: {HINT}")


def read_list(path, whole_line=False):
    """The entries of a text file, one per line (its first word, as some lists carry a second column)."""
    if not path.is_file():
        others = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt")))
        raise UserError(f"no list {path}" + (f"; lists there: {others}" if others else f": {HINT}"))
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
        raise UserError(f"no folder {base}: {HINT}")
    there = {entry.name for entry in base.iterdir()}
    names = [next((i + suffix for suffix in suffixes if i + suffix in there), None) for i in ids]
    if None in names:
        raise UserError(f"no {ids[names.index(None)]}{suffixes[0]} in {base}: {names.count(None)} of {len(ids)} on the "
                        "list are missing")
    return [str(base / name) for name in names]


def read_image(path, turn=False):
    """An image file as uint8 (3, H, W). turn: apply the EXIF rotation, which labels do not follow."""
    try:
        with Image.open(str(path)) as image:
            if turn:
                image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":                                      # Pillow would cut the upper values off
                raise ValueError("gray of more than 8 bits: save it with 8")
            return pil_to_tensor(image.convert("RGB"))  # (3, H, W)
    except Exception as error:  # noqa: BLE001 - Pillow raises many kinds for broken files
        raise UserError(f"{path}: cannot be read as an image ({brief(error)}): replace this file") from None


def read_label(path):
    """The raw values of a label file, uint8 or uint16 (H, W): an index PNG, or a .mat of SBD, Context or COCO-Stuff."""
    try:
        if str(path).endswith(".mat"):
            raw = read_mat(path)  # (H, W)
        else:
            with Image.open(str(path)) as image:
                # Pillow would stretch gray of 2 or 4 bits, "L;2" and "L;4" in the file, to 0..255.
                if image.mode not in ("P", "L") or image.tile[0][3] in ("L;2", "L;4"):
                    raise ValueError(f"class indices are palette or 8-bit gray, not {image.tile[0][3]}")
                raw = np.array(image)  # (H, W)
        if raw.dtype == np.uint8:
            return raw
        with np.errstate(invalid="ignore"):
            numbers = raw.astype(np.uint16)                                    # ids reach 459, some tools write doubles
        if (numbers != raw).any():                                             # nan, too
            raise ValueError("it holds values that are no label numbers")
        return numbers
    except Exception as error:  # noqa: BLE001 - Pillow and scipy raise many kinds for broken files
        raise UserError(f"{path}: cannot be read as a label ({brief(error)}): replace this file") from None


def read_mat(path):
    """GTcls.Segmentation (SBD), LabelMap (Context) or S (COCO-Stuff 10K) of a MATLAB 5 file."""
    shapes = {name: shape for name, shape, _ in whosmat(path)}
    variable = next((name for name in ("GTcls", "LabelMap", "S") if name in shapes), None)
    if variable is None:
        raise ValueError("it has none of GTcls, LabelMap, S")
    if variable == "S" and max(shapes.get("names", (182,))) != 182:
        raise ValueError("COCO-Stuff 10K version 1.0, numbered differently: get cocostuff-10k-v1.1.zip")
    value = loadmat(path, variable_names=[variable])[variable]
    return np.ascontiguousarray(value[0, 0]["Segmentation"] if variable == "GTcls" else value)  # (H, W)


# ---- What a run trains on
class TrainView(Dataset):
    """The training view of a data set: random scale, crop, flip (Sec. 6.1). An item is asked for by (iteration, index)
    and is a function of (seed, iteration, index) alone: workers, processes and resuming cannot change it.

    item: image uint8 (3, crop, crop), label uint8 (crop, crop); beyond the picture mean colour and label 255.
    """

    def __init__(self, data, crop, seed):
        self.data, self.crop, self.seed = data, crop, seed

    def __getitem__(self, key):
        iteration, index = key
        rng = np.random.default_rng((self.seed, iteration, index))
        image, label = self.data[index]  # (3, H, W), (H, W)
        scale, flip = rng.choice(self.data.scales), rng.random() < 0.5
        # Cut crop / scale pixels out of the source, then scale that piece alone, in uint8.
        # differs: the released code scales the whole image, then crops: slower, and the same up to rounding, but its
        # labels lie a little off the image's grid.
        top, height, new_height = self.span(rng, image.shape[1], scale)
        left, width, new_width = self.span(rng, image.shape[2], scale)
        image = image[:, top:top + height, left:left + width]  # (3, height, width)
        label = label[top:top + height, left:left + width]  # (height, width)
        if scale != 1:
            image = F.interpolate(image[None], (new_height, new_width), mode="bilinear", align_corners=True)[0]
            # The label's nearest pixels on the same grid: F.interpolate's "nearest" has no align_corners.
            rows, columns = (np.floor(np.linspace(0, old - 1, new) + 0.5).astype(int)
                             for old, new in ((height, new_height), (width, new_width)))  # (new_height,), (new_width,)
            label = torch.from_numpy(label.numpy()[rows][:, columns])  # (new_height, new_width)
        # differs: the released code pads with 0 after normalisation; the mean colour becomes 0 to within 0.01.
        padded = MEAN.round().byte().repeat(1, self.crop, self.crop)  # (3, crop, crop)
        padded[:, :new_height, :new_width] = image
        label = F.pad(label, (0, self.crop - new_width, 0, self.crop - new_height), value=IGNORE)  # (crop, crop)
        return (padded.flip(2), label.flip(1)) if flip else (padded, label)    # after the padding, as the released code

    def span(self, rng, size, scale):
        """One side of the crop: its first pixel in the source, how many pixels there, and how many after scaling."""
        length = round(self.crop / scale)
        if length <= size:
            return rng.integers(size - length + 1), length, self.crop
        return 0, size, max(1, round(size * scale))                # a smaller image is taken whole, and padded later


def schedule(data, batch_size, seed, iterations, rank=0, world=1):
    """Batch sampler: for each of `iterations`, counted from 1, the (iteration, index) that this process reads."""
    for iteration in iterations:
        yield [(iteration, int(i)) for i in global_batch(data, batch_size, seed, iteration)[rank::world]]


def global_batch(data, batch_size, seed, iteration):
    """The indices of an iteration's batch, over all processes: a function of (seed, iteration) and of nothing else.
    Every epoch is shuffled anew, and its last, incomplete batch is left out."""
    epoch, step = divmod(iteration - 1, len(data) // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(len(data))
    return order[step * batch_size:(step + 1) * batch_size]


def normalise(images):
    """Images uint8 (B, 3, H, W) -> float32, standardised by ImageNet's mean and deviation."""
    # The CPU need not wait for these copies: MEAN and STD are never freed.
    mean, std = (values.to(images.device, non_blocking=True) for values in (MEAN, STD))  # (3, 1, 1) each
    return (images.float() - mean) / std  # (B, 3, H, W)


# ---- Colours (skip at first reading)
def palette_of(classes):
    """VOC's colours, uint8 (256, 3): the bits of a class index in turn give the highest bits of red, green and blue.
    The first, black, is for a background: classes without one begin with the second."""
    palette = np.zeros((256, 3), np.uint8)
    for c in range(256):
        for bit in range(8):
            palette[c, bit % 3] |= (c >> bit & 1) << (7 - bit // 3)
    if classes[0] != "background":
        palette[:IGNORE] = palette[1:]
    return palette


def save_index_png(label, path, palette):
    """Writes class indices uint8 (H, W) as a palette PNG: what VOC's server and label tools read."""
    image = Image.fromarray(np.asarray(label, np.uint8))
    image.putpalette(palette.tobytes())              # all 256 colours, or Pillow would write fewer bits per pixel
    image.save(path)


def overlay(image, label, palette, alpha=0.6):
    """The classes of label uint8 (H, W) in their colours over the image uint8 (3, H, W) -> PIL image."""
    present = [c for c in label.unique().tolist() if c != IGNORE]
    if present:
        masks = torch.stack([label == c for c in present])  # (classes present, H, W)
        image = draw_segmentation_masks(image, masks, alpha, [tuple(palette[c].tolist()) for c in present])
    return to_pil_image(image)
