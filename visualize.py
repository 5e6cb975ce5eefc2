"""Draws what a network sees: its prediction and the responsibilities of its bases (Fig. 5).

    python visualize.py --ckpt out/scenes/model.pth                    # validation images
    python visualize.py --ckpt model.pth --image holiday.jpg           # your own image or folder

Shapes: H x W pixels of an image, T iterations, K bases, h x w features of the padded image.
"""
import argparse
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import ImageDraw
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_segmentation_masks, make_grid

from data import DATASETS, IGNORE, normalise, palette_of, read_image
from ema import EMAU, load_checkpoint
from evaluate import init_process, new_folder, open_dataset, pad, positive, predict, run

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")


# ---- What the network sees
@torch.no_grad()
def responsibilities(net, image):
    """EMAU's z after 1 ... T rounds, for an image uint8 (3, H, W): float (K, T, H, W)."""
    padded = pad(normalise(image[None]), net.output_stride)  # (1, 3, H', W')
    features = net.features(padded)  # (1, C, h, w)
    # As in EMAU.forward, once for each number of rounds.
    emau = net.attention
    x = emau.conv1(features).flatten(2).transpose(1, 2)  # (1, N, C)
    z = torch.cat([emau.em(x, t)[0] for t in range(1, emau.iterations + 1)])  # (T, N, K)
    z = z.permute(2, 0, 1).unflatten(2, features.shape[2:])  # (K, T, h, w)
    z = F.interpolate(z, padded.shape[2:], mode="bilinear", align_corners=True)  # (K, T, H', W')
    return z[:, :, :image.shape[1], :image.shape[2]].cpu()  # (K, T, H, W)


def fullest_bases(z):
    """The four bases that win most pixels of z (K, T, H, W) in the last round."""
    pixels = torch.bincount(z[:, -1].argmax(0).flatten(), minlength=len(z))  # (K,)
    return pixels.argsort(descending=True)[:4].tolist()


# ---- The picture
def picture(image, label, prediction, maps, classes):
    """A row with image, label and prediction, then a row for each basis: its responsibilities after
    each round, white where they are largest.

    image: uint8 (3, H, W). label, prediction: uint8 (H, W). maps: a float (T, H, W) for each basis
    """
    rows = [[image, overlay(image, label, classes), overlay(image, prediction, classes)]]
    for rounds in maps:  # (T, H, W)
        grey = (255 * rounds / rounds.max()).byte()  # (T, H, W)
        rows.append([panel.expand(3, -1, -1) for panel in grey])
    width = max(len(row) for row in rows)
    panels = []
    for row in rows:                                        # short rows end with white panels
        panels += row + [torch.full_like(image, 255)] * (width - len(row))
    return to_pil_image(make_grid(panels, nrow=width, padding=4, pad_value=255))


def overlay(image, label, classes):
    """The image uint8 (3, H, W) with the classes of label uint8 (H, W) in colour, and named."""
    present = [c for c in label.unique().tolist() if c != IGNORE]
    if not present:
        return image
    palette = palette_of(classes)
    colours = [tuple(palette[c].tolist()) for c in present]
    masks = torch.stack([label == c for c in present])  # (classes present, H, W)
    panel = to_pil_image(draw_segmentation_masks(image, masks, alpha=0.6, colors=colours))
    draw = ImageDraw.Draw(panel)
    for row, c in enumerate(present):
        draw.text((4, 4 + 17 * row), classes[c], colours[row], font_size=13,
                  stroke_width=2, stroke_fill="white")      # dark colours need the outline
    return pil_to_tensor(panel)  # (3, H, W)


# ---- The script
def own_images(path):
    """Yields name, image uint8 (3, H, W), rotated as its EXIF says, and an empty label (H, W)."""
    files = [Path(path)]
    if os.path.isdir(path):
        files = [file for file in sorted(Path(path).glob("[!.]*"))
                 if file.suffix.lower() in SUFFIXES]
    if not files:
        raise FileNotFoundError(f"{path}: no file ends in one of {SUFFIXES}")
    for file in files:
        image = to_pil_image(read_image(file, exif=True))
        image.thumbnail((513, 513))                         # about as in training
        image = pil_to_tensor(image)  # (3, H, W)
        yield file.name, image, torch.full_like(image[0], IGNORE)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage="visualize.py --ckpt FILE [flags, see --help]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, help="model.pth of train.py, or a released checkpoint")
    add("--dataset", choices=DATASETS, help="default: what it was trained on")
    add("--data-root", default="datasets", help="its folder, default: datasets")
    add("--split", help="default: the validation list")
    add("--count", type=positive, default=4, help="images, default: 4")
    add("--image", metavar="FILE|DIR", help="your own image or folder")
    add("--bases", type=int, nargs="+", help="default: those with the most pixels")
    add("--out", metavar="DIR", help="a new folder, default: beside the checkpoint")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    net = load_checkpoint(args.ckpt)
    if args.image:
        images = own_images(args.image)
    else:
        data = open_dataset(args, net)
        images = ((name, *data[i]) for i, name in enumerate(data.ids[:args.count]))
    out = Path(args.ckpt).parent / "pictures"               # overwritten by the next run
    if args.out:
        out = Path(args.out)
        new_folder(out)
    device = init_process(args.device)
    net.to(device, memory_format=torch.channels_last)
    for name, image, label in images:
        prediction = predict(net, image.to(device)).argmax(0).byte().cpu()  # (H, W)
        bases = []
        maps = []
        if isinstance(net.attention, EMAU):
            z = responsibilities(net, image.to(device))  # (K, T, H, W)
            bases = args.bases or fullest_bases(z)
            if not 0 <= min(bases) <= max(bases) < len(z):
                sys.exit(f"error: --bases: choose from 0 to {len(z) - 1}")
            maps = z[bases]  # (bases, T, H, W)
        path = out / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(image, label, prediction, maps, net.classes).save(path)
        print(f"wrote {path}; bases, from top to bottom: {bases}")


if __name__ == "__main__":
    run(main)
