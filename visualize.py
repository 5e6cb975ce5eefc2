"""Draws what a network sees: its predictions, and the responsibilities of its bases round by round (Fig. 5).

    python visualize.py --ckpt out/scenes/model.pth                    # images of the data set it was trained on
    python visualize.py --ckpt model.pth --image holiday.jpg           # your own image, or a folder of them
    python visualize.py --ckpt model.pth --bases 3,17                  # these two bases, in every picture

Writes to --out, per image, NAME.png (the picture) and NAME_prediction.png (class indices with a palette).

Shapes: H x W pixels of one image, T iterations, K bases, h x w the feature map of the padded image.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from backbone import UserError
from data import CLASSES, DATASETS, IGNORE, normalise, overlay, palette_of, read_image, save_index_png
from ema import EMAU, load_checkpoint
from evaluate import layout, open_dataset, pad, pick_device, predict, run

GAP, TEXT, WIDTH = 8, 13, 256           # pixels: space between panels, height of letters, width of a panel
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")       # of the images in a folder of your own
HEAT = np.array([(8, 6, 24), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])    # responsibility 0 .. max


# ---- What the network sees
@torch.no_grad()
def responsibilities(net, image):
    """Those of a network with an EMAU in every round, for one image: uint8 (3, H, W) -> float (T, K, h, w), on the CPU.
    They are of the padded image, as EM sees it in evaluation."""
    features = net.features(pad(normalise(image[None]), net.config["output_stride"]))  # (1, C, h, w)
    z = torch.cat([z for z, _ in net.attention.em(net.attention.pixels(features))])  # (T, N, K)  a round each
    return z.transpose(1, 2).unflatten(2, features.shape[2:]).cpu()  # (T, K, h, w)


def at_image_size(maps, size, stride):
    """Maps (T, K, h, w) of a padded image, upsampled and cropped as the logits are: (T, K, H, W)."""
    padded = [stride * (side - 1) + 1 for side in maps.shape[2:]]
    return F.interpolate(maps, padded, mode="bilinear", align_corners=True)[:, :, :size[0], :size[1]]


def choose_bases(wanted, z):
    """The bases to show, of z (T, K, h, w): given as "3,17", or the four that hold the most pixels (Fig. 5: random)."""
    K = z.shape[1]
    if wanted:
        bases = [int(word) if word.strip().isdecimal() else -1 for word in wanted.split(",")]
        if not all(0 <= k < K for k in bases):
            raise UserError(f"--bases {wanted}: give numbers from 0 to {K - 1} with commas between them")
        return bases
    held = torch.bincount(z[-1].flatten(1).argmax(0), minlength=K)  # (K,)
    return held.argsort(descending=True, stable=True)[:4].tolist()


# ---- Drawing (skip at first reading). A picture is a grid: rows of (PIL image, caption)
def picture(image, label, prediction, maps, bases, classes):
    """The whole picture of one image: image, label, prediction, the classes' colours; below, one row per basis with
    its responsibilities, maps (T, len(bases), H, W)."""
    palette = palette_of(classes)
    shown = torch.cat([part.flatten() for part in (prediction, label) if part is not None]).unique()
    rows = [[(to_pil_image(image), "image"), (overlay(image, prediction, palette), "prediction"),
             (legend(image, [int(c) for c in shown if c != IGNORE], classes, palette), "")]]
    if label is not None:
        rows[0].insert(1, (overlay(image, label, palette), "label"))
    for n, k in enumerate(bases):
        top = maps[:, n].max().item()  # one scale per basis, so rounds compare
        rows.append([(heat(m, top), f"basis {k}, t = {t}, 0 .. {top:.2f}") for t, m in enumerate(maps[:, n], 1)])
    return grid(rows)


def heat(values, top):
    """Values 0..top (H, W) -> PIL image from dark to bright."""
    values, at = values.numpy() / max(top, 1e-6), np.linspace(0, 1, len(HEAT))
    colours = [np.interp(values, at, HEAT[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(colours, axis=-1).astype(np.uint8))  # (H, W, 3)


def legend(image, shown, classes, palette):
    """The names of the classes in their colours, as a PIL image at least as tall as the other panels."""
    height = max(WIDTH * image.shape[1] // image.shape[2], (TEXT + GAP) * len(shown))
    sheet = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(sheet)
    for y, c in zip(range(0, height, TEXT + GAP), shown, strict=False):
        draw.rectangle((0, y, TEXT, y + TEXT), fill=tuple(palette[c].tolist()), outline="black")
        draw.text((TEXT + GAP, y), classes[c], "black", ImageFont.load_default(TEXT))
    return sheet


def grid(rows):
    """Rows of (PIL image, caption) -> one PIL image, every panel WIDTH pixels wide."""
    heights = [max(round(WIDTH * panel.height / panel.width) for panel, _ in row) or 1 for row in rows]
    size = GAP + (WIDTH + GAP) * max(len(row) for row in rows), sum(heights) + (TEXT + 2 * GAP) * len(rows) + GAP
    sheet = Image.new("RGB", size, "white")
    draw, y = ImageDraw.Draw(sheet), GAP
    for row, height in zip(rows, heights, strict=True):
        for x, (panel, caption) in zip(range(GAP, sheet.width, WIDTH + GAP), row, strict=False):
            draw.text((x, y), caption, "black", ImageFont.load_default(TEXT))
            panel = panel.resize((WIDTH, round(WIDTH * panel.height / panel.width) or 1), Image.Resampling.BILINEAR)
            sheet.paste(panel, (x, y + TEXT + GAP // 2))
        y += height + TEXT + 2 * GAP
    return sheet


# ---- The script
def own_images(path):
    """Yields name, image uint8 (3, H, W), turned as EXIF says, and no label, None: of a file, or a folder's images."""
    files = [Path(path)]
    if files[0].is_dir():
        files = sorted(file for file in files[0].iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"no images in {path}")
    stems = [file.stem for file in files]
    for file in files:
        name = file.stem if stems.count(file.stem) == 1 else file.name         # a.jpg beside a.png
        yield name, read_image(file, turn=True), None


def images_of(data, count):
    """Yields name, image uint8 (3, H, W), and label uint8 (H, W) or None, of a data set's first images."""
    for i in range(min(count, len(data))):
        image, label = data[i]
        yield str(data.ids[i]), image, label if data.labelled else None


def shrink(image, longer_side):
    """Shrinks an image uint8 (3, H, W) to this longer side at most: about the size it would have in training."""
    image = to_pil_image(image)
    image.thumbnail((longer_side, longer_side), Image.Resampling.BILINEAR)
    return pil_to_tensor(image)  # (3, H', W')


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint: model.pth of train.py, or a released one")
    add("--dataset", choices=DATASETS, help="data set (default: the one the checkpoint was trained on)")
    add("--data-root", default="datasets", help="folder that holds the data set (default: datasets)")
    add("--split", help="list of images to draw (default: the data set's for validation)")
    add("--count", type=int, default=4, help="how many images of the data set (default: 4)")
    add("--image", metavar="FILE|DIR", help="your own image, or a folder of images, instead")
    add("--size", type=int, default=513, help="own images: longer side, in pixels (default: 513)")
    add("--bases", help="bases to show, as in 3,17 (default: the four that hold the most pixels)")
    add("--out", metavar="DIR", help="output folder (default: pictures, beside the checkpoint)")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu) or a torch device")
    args = parser.parse_args(argv)
    if args.count < 1 or args.size < 1:
        raise UserError("--count and --size must be at least 1")
    return args


def main(argv=None):
    args = parse_args(argv)
    net, device = load_checkpoint(args.ckpt), pick_device(args.device)
    if args.bases and not isinstance(net.attention, EMAU):
        raise UserError(f"--bases: {args.ckpt} has attention {net.config['attention']}, which has no bases")
    out = Path(args.out or Path(args.ckpt).parent / "pictures")
    if args.image:
        classes = net.trained_on.get("classes") or CLASSES["voc"]          # the released networks are VOC's
        if len(classes) != net.config["num_classes"]:
            raise UserError(f"{args.ckpt} has {net.config['num_classes']} classes and does not say which")
        image = Path(args.image).resolve()
        if out.resolve() == (image if image.is_dir() else image.parent):
            raise UserError(f"--out {out} holds the images themselves: choose another folder, nothing is overwritten")
        images = own_images(args.image)
    else:
        data = open_dataset(args, net)
        classes, images = data.classes, images_of(data, args.count)
    net.to(device, memory_format=layout(device))
    out.mkdir(parents=True, exist_ok=True)
    for name, image, label in images:
        size = image.shape[1:]
        if args.image:
            image = shrink(image, args.size)  # (3, H', W')
        prediction = predict(net, image.to(device)).argmax(0).byte().cpu()  # (H', W')
        maps, bases = None, []
        if isinstance(net.attention, EMAU):
            z = responsibilities(net, image.to(device))  # (T, K, h, w)
            bases = choose_bases(args.bases, z)
            maps = at_image_size(z[:, bases], image.shape[1:], net.config["output_stride"])  # (T, bases, H', W')
        picture(image, label, prediction, maps, bases, classes).save(out / f"{name}.png")
        prediction = F.interpolate(prediction[None, None], tuple(size), mode="nearest-exact")[0, 0]  # (H, W)
        save_index_png(prediction.numpy(), out / f"{name}_prediction.png", palette_of(classes))
        print(f"wrote {out}/{name}.png and {name}_prediction.png", flush=True)


if __name__ == "__main__":
    run(main)
