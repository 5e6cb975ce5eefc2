"""The data sets: images and index labels, read from disk as their authors distribute them, or drawn by program.

    data = build_dataset("voc", "datasets", "val")
    image, label = data[0]                             # uint8 (3, H, W), uint8 (H, W): class index, or 255 = ignored

Everything stays uint8 until it is on the device, where `normalise` makes floats of it.
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.utils import draw_segmentation_masks

from backbone import UserError, first_line

IGNORE = 255                      # label of pixels that count neither in training nor in evaluation
ILLEGAL = 254                     # in a label table: a value that must not occur
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)          # ImageNet's, of images in 0..1
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)                   # of the training view (released code's seven steps)
DATASETS = ("scenes", "voc", "folder")

CLASSES = {  # names in the order of the class indices
    "scenes": "sky, sea, grass, sand, mountain, tree, house, boat, sun",
    "voc": "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, "
           "motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"}


def class_names(name):
    return CLASSES[name].split(", ")


# ---------------------------------------------------------------------------------------------------------------------
# Data sets
def build_dataset(name, root="datasets", split="val"):
    """The data set `name` in folder `root`: an object with `name`, `split`, `classes`, `ids`, `labelled`, and items
    (image uint8 (3, H, W), label uint8 (H, W), all 255 where there are no labels). UserError says what is missing."""
    if name == "scenes":
        return Scenes(split)
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no folder {root}: --data-root names the folder that holds the data set (README, Data)")
    return {"voc": voc, "folder": folder}[name](root, split)


class Pairs(Dataset):
    """Images on disk and their labels. `table` maps a raw label value to a class index, IGNORE or ILLEGAL."""
    endless, scales = False, SCALES

    def __init__(self, name, split, classes, ids, images, labels, table):
        self.name, self.split, self.classes, self.table, self.labelled = name, split, classes, table, labels is not None
        # numpy keeps these as plain bytes: lists would be copied into every worker as their counts of use change
        self.ids, self.images, self.labels = np.array(ids), np.array(images), np.array(labels if labels else [])

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        image, raw = self.read(i)
        return image, torch.from_numpy(self.to_classes(raw, i))

    def read(self, i):
        """Image uint8 (3, H, W) and raw label (H, W) as it stands in the file (IGNORE where there is none)."""
        image = read_image(self.images[i])
        if not self.labelled:
            return image, np.full(image.shape[1:], IGNORE, np.uint8)
        raw = read_index_png(self.labels[i])
        if raw.shape != tuple(image.shape[1:]):
            raise UserError(f"{self.labels[i]}: label is {raw.shape[1]}x{raw.shape[0]}, "
                            f"its image {image.shape[2]}x{image.shape[1]} pixels")
        return image, raw

    def to_classes(self, raw, i):
        """Raw label values -> class indices and IGNORE, uint8, same shape."""
        if not self.labelled:
            return raw
        label = self.table[raw]
        if (label == ILLEGAL).any():
            values = ", ".join(str(v) for v in np.unique(raw[label == ILLEGAL])[:5])
            raise UserError(f"{self.labels[i]}: label value {values} is none of the {len(self.classes)} classes "
                            f"0..{len(self.classes) - 1}, nor {IGNORE} (ignored)")
        return label


def voc(root, split):
    """PASCAL VOC 2012 in VOCdevkit/VOC2012; trainaug from its SegmentationClassAug/ folder."""
    base = root / "VOCdevkit" / "VOC2012"
    # VOC's own masks for its own splits, so that validation never depends on somebody's merged copy
    labels = {"trainaug": "SegmentationClassAug", "test": None}.get(split, "SegmentationClass")
    return voc_layout("voc", base, split, class_names("voc"), labels)


def folder(root, split):
    """Your own data in VOC's layout: JPEGImages/, SegmentationClass/, ImageSets/Segmentation/SPLIT.txt, classes.txt."""
    return voc_layout("folder", root, split, read_list(root / "classes.txt", whole_line=True), "SegmentationClass")


def voc_layout(name, base, split, classes, label_folder):
    ids = read_list(base / "ImageSets" / "Segmentation" / f"{split}.txt")
    if len(classes) > ILLEGAL:
        raise UserError(f"{base / 'classes.txt'}: {len(classes)} classes, at most {ILLEGAL} fit in a label")
    images = find_files(base / "JPEGImages", ids, (".jpg", ".jpeg", ".png"))
    labels = label_folder and find_files(base / label_folder, ids, (".png",))
    table = np.full(256, ILLEGAL, np.uint8)
    table[:len(classes)], table[IGNORE] = range(len(classes)), IGNORE
    return Pairs(name, split, classes, ids, images, labels, table)


def read_list(path, whole_line=False):
    """The entries of a text file, one per line (its first word, as some lists carry a second column)."""
    if not path.is_file():
        others = sorted(p.stem for p in path.parent.glob("*.txt")) if path.parent.is_dir() else []
        hint = f"; lists there: {', '.join(others)}" if others else ": is --data-root right? (README, Data)"
        raise UserError(f"no list {path}{hint}")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
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
        raise UserError(f"no {lost[0]}{suffixes[0]} in {base}: {len(lost)} of {len(ids)} on the list are missing")
    return [str(base / name) for name in names]


def read_image(path):
    """An image file as uint8 (3, H, W). Never turned by EXIF: the labels of data sets are not, either."""
    try:
        if str(path).lower().endswith((".jpg", ".jpeg")):
            data = torch.from_numpy(np.fromfile(path, np.uint8))
            return decode_jpeg(data, mode=ImageReadMode.RGB)               # bit for bit Pillow's result, and faster
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, RuntimeError, ValueError, SyntaxError) as error:      # torchvision and Pillow, for broken files
        raise UserError(f"{path}: cannot be read as an image: {first_line(error)}") from None


def read_index_png(path):
    """A label file whose pixel values are class indices, uint8 (H, W): a palette PNG, or a gray one of 8 bits."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L"):
                raise UserError(f"{path}: a label holds class indices (palette or 8-bit gray), this is {image.mode}")
            return np.array(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read as a label: {first_line(error)}") from None


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
            raw = raw[nearest(height, out_h)[:, None], nearest(width, out_w)]  # (h, w)
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


def draw_scene(index, key=0, size=(96, 128)):
    """Paint scene `index` of the endless series `key` (0: training, 1: validation); same arguments, same bytes.

    Returns the image, uint8 (H, W, 3), and its label, uint8 (H, W), with class indices.
    """
    rng = np.random.default_rng([key, index])
    uniform = rng.uniform
    height, width = 96, 96 * size[1] / size[0]  # all lengths below are for a picture 96 high
    zoom = 2 * size[0] / height  # shapes are drawn at twice the size, then halved: smooth edges

    zenith, haze, light = HOURS[rng.integers(len(HOURS))] + uniform(-11, 11, (3, 3)) * [[1], [1], [0.6]]
    share = uniform(size=(4, 5, 1)) ** 4
    leaf, earth, rock, glow = (POTS * share).sum(1) / share.sum(1)
    upper_colour = np.stack([zenith, leaf * 1.12, earth * 1.06, rock * 1.08, glow])
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
    label, pot, upper, lower, first, last = (np.array(column) for column in zip(*shapes))
    row, shape = np.arange(2 * size[0])[:, None], np.asarray(canvas)
    fade = first + ((row / zoom - upper) / (lower - upper)).clip(0, 1)[..., None] * (last - first)
    image = fade.clip(0, 255).astype(np.uint8).reshape(-1, 3).take(row * len(shapes) + shape, 0)
    image = np.asarray(Image.fromarray(image).reduce(2), np.float32)
    label, pot = label.astype(np.uint8)[shape[::2, ::2]], pot[shape[::2, ::2]]

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


class Scenes(Dataset):
    """Miniature landscapes, drawn as they are asked for. Training: endless; validation: always the same 64."""
    name, classes, labelled, scales = "scenes", class_names("scenes"), True, (1.0,)

    def __init__(self, split):
        if split not in ("train", "val"):
            raise UserError(f"scenes has no split {split!r}: there are train and val")
        self.split, self.key, self.endless = split, int(split == "val"), split == "train"
        self.ids = [f"scene{i:02d}" for i in range(64)]

    def __len__(self):
        return 64

    def __getitem__(self, i):
        image, label = self.read(i)
        return image, torch.from_numpy(label)

    def read(self, i):
        image, label = draw_scene(i, self.key, size=(97, 129))
        return torch.from_numpy(image).permute(2, 0, 1), label                 # (3, 97, 129), (97, 129)

    def to_classes(self, label, i):
        return label


# ---------------------------------------------------------------------------------------------------------------------
# What the scripts share
def normalise(images, boxes=None):
    """Images uint8 (B, 3, H, W) -> float32, ImageNet's mean and deviation, on their device; 0 outside the boxes."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) * 255 for v in (MEAN, STD))
    images = (images.float() - mean) / std
    if boxes is not None:
        top, bottom, left, right = boxes.to(images.device).T[:, :, None, None]                  # (B, 1, 1) each
        rows = torch.arange(images.shape[2], device=images.device)[:, None]                     # (H, 1)
        columns = torch.arange(images.shape[3], device=images.device)                           # (W,)
        inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)        # (B, H, W)
        images = images * inside[:, None]
    return images


def pick_device(name="auto"):
    """torch.device for "auto" (cuda, then mps, then cpu) or a name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} sees no CUDA device; --device cpu works anywhere")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: torch knows no such device; choose auto, cuda, mps or cpu") from None


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
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
