"""Draws what a network sees: predictions, the responsibilities of its bases round by round (Fig. 5), a run's curves.

    python visualize.py --ckpt out/scenes/model.pth                    # images of the data set it was trained on
    python visualize.py --ckpt model.pth --image holiday.jpg           # your own image, or a folder of them
    python visualize.py --ckpt model.pth --bases 3,17                  # these two bases
    python visualize.py --log out/scenes/log.jsonl                     # loss and validation mIoU of a run

Writes to --out, per image, NAME.png (the picture) and NAME_prediction.png (class indices with a palette).

Shapes: H x W pixels of one image, T iterations, K bases.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from backbone import UserError, first_line
from data import (
    CLASSES,
    DATASETS,
    IGNORE,
    class_names,
    memory_format,
    normalise,
    overlay,
    palette_of,
    pick_device,
    read_image,
    run,
    save_index_png,
    to_pil,
)
from ema import EMAU, load_checkpoint
from evaluate import open_dataset, pad, padded_sizes

GAP, TEXT = 8, 13                       # pixels: space between panels, height of letters
LINES = [(178, 34, 34), (31, 90, 180), (34, 139, 34), (218, 140, 0), (128, 0, 128), (0, 150, 150)]     # of curves
HEAT = np.array([(8, 6, 24), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])    # responsibility 0 .. max


# ---------------------------------------------------------------------------------------------------------------------
# What the network sees
@torch.no_grad()
def look(net, image):
    """Prediction and responsibilities of one image: uint8 (3, H, W) -> uint8 (H, W), float (T, K, h, w) or None.

    h x w is the feature map of the padded image. The EM rounds are EMAU's own, run again on its pixels.
    """
    view, (H, W) = pad(normalise(image[None])), image.shape[1:]                # (1, 3, 8h-7, 8w-7)
    features = net.features(view)                                              # (1, C, h, w)
    logits = F.interpolate(net.head(features), view.shape[2:], mode="bilinear", align_corners=True)    # (1, L, ., .)
    prediction = logits[0, :, :H, :W].max(0)[1].byte().cpu()                   # (H, W)
    if not isinstance(net.attention, EMAU):
        return prediction, None
    z = torch.cat([z for z, _ in net.attention.em(net.attention.pixels(features))]).cpu()  # (T, N, K)
    return prediction, z.transpose(1, 2).unflatten(2, features.shape[2:])      # (T, K, h, w)


def choose_bases(wanted, zs, count=4):
    """Indices of the bases to show, for responsibilities zs, a list of (T, K, h, w): given as "3,17", "random" as in
    Fig. 5, or those that hold the most pixels of all the images."""
    K = zs[0].shape[1]
    if wanted == "random":
        return torch.randperm(K, generator=torch.Generator().manual_seed(0))[:count].tolist()
    if wanted:
        bases = [int(word) if word.strip().isdigit() else -1 for word in wanted.split(",")]
        if not all(0 <= k < K for k in bases):
            raise UserError(f"--bases {wanted}: give numbers from 0 to {K - 1} with commas between them, or random")
        return bases
    largest = torch.cat([z[-1].flatten(1).argmax(0) for z in zs])              # (pixels,)
    held = torch.bincount(largest, minlength=K)                                # (K,)
    return held.argsort(descending=True, stable=True)[:count].tolist()


def responsibility_maps(z, bases, size):
    """The maps of some bases at image size: z (T, K, h, w) -> (T, len(bases), H, W)."""
    maps = F.interpolate(z[:, bases], padded_sizes(size, False), mode="bilinear", align_corners=True)
    return maps[:, :, :size[0], :size[1]]


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
def picture(image, label, prediction, z, bases, classes):
    """The whole picture of one image as a PIL image: image, label, prediction, legend; below, one row per basis."""
    palette = palette_of(classes)
    rows = [[(to_pil(image), "image")]]
    if label is not None:
        rows[0].append((to_pil(overlay(image, label, palette)), "label"))
    rows[0].append((to_pil(overlay(image, prediction, palette)), "prediction"))
    if z is not None:
        for k, maps in zip(bases, responsibility_maps(z, bases, image.shape[1:]).unbind(1), strict=True):   # (T, H, W)
            top = max(maps.max().item(), 1e-6)                                 # one scale per basis, so rounds compare
            rows.append([(heat(m / top), f"basis {k}, t = {t}" + f" (brightest: {top:.2f})" * (t == 1))
                         for t, m in enumerate(maps, 1)])
    shown = torch.cat([prediction.flatten(), label.flatten()] if label is not None else [prediction.flatten()])
    present = [int(c) for c in shown.unique() if c != IGNORE]
    return beside(grid(rows), legend([(classes[c], tuple(palette[c].tolist())) for c in present]))


def bases_over_images(seen, bases):
    """The same bases over several images: one row per image, the image and each basis' responsibilities at t = T."""
    rows = []
    for name, image, z in seen:
        maps = responsibility_maps(z[-1:], bases, image.shape[1:])[0]          # (len(bases), H, W)
        rows.append([(to_pil(image), name)] + [(heat(m / max(m.max().item(), 1e-6)), f"basis {k}")
                                               for k, m in zip(bases, maps, strict=True)])
    return grid(rows)


def heat(values):
    """Values 0..1 (H, W) -> PIL image from dark to bright."""
    at = np.linspace(0, 1, len(HEAT))
    colours = [np.interp(values.numpy(), at, HEAT[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(colours, axis=-1).astype(np.uint8))


def grid(rows, width=256):
    """Rows of (PIL image, caption) -> one image, every panel `width` pixels wide."""
    heights = [round(width * row[0][0].height / row[0][0].width) or 1 for row in rows]
    step_x, step_y = width + GAP, TEXT + 2 * GAP
    sheet = Image.new("RGB", (GAP + step_x * max(len(row) for row in rows), sum(heights) + step_y * len(rows) + GAP),
                      "white")
    draw, y = ImageDraw.Draw(sheet), GAP
    for row, height in zip(rows, heights, strict=True):
        for x, (image, caption) in zip(range(GAP, sheet.width, step_x), row, strict=False):
            draw.text((x, y), caption, "black", ImageFont.load_default(TEXT))
            sheet.paste(image.resize((width, height), Image.Resampling.BILINEAR), (x, y + TEXT + GAP // 2))
        y += height + step_y
    return sheet


def legend(entries):
    """(name, colour) pairs -> PIL image, one below the other."""
    font = ImageFont.load_default(TEXT)
    width = 3 * TEXT + max(round(font.getlength(name)) for name, _ in entries)
    sheet = Image.new("RGB", (width, (TEXT + GAP) * len(entries) + TEXT + 2 * GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, colour) in enumerate(entries):
        y = TEXT + 2 * GAP + i * (TEXT + GAP)
        draw.rectangle((0, y, TEXT, y + TEXT), fill=colour, outline="black")
        draw.text((TEXT + GAP, y), name, "black", font)
    return sheet


def beside(left, right):
    """Two PIL images side by side, top edges level."""
    sheet = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), "white")
    sheet.paste(left)
    sheet.paste(right, (left.width, 0))
    return sheet


def curves(paths):
    """Training loss and validation mIoU of one or several runs (log.jsonl) over the iterations, as a PIL image."""
    panels = {"loss": "training loss", "val_miou": "validation mIoU"}
    series = {key: [] for key in panels}
    for path in paths:
        try:
            records = [dict(json.loads(line)) for line in Path(path).read_text().splitlines()]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read as a log.jsonl of train.py: {first_line(error)}") from None
        for key in panels:
            points = [(r["iteration"], r[key]) for r in records if key in r]
            series[key].append(np.array(points, float).reshape(-1, 2))         # (points, 2)
    sheets = [(plot(series[key]), title) for key, title in panels.items() if any(len(s) for s in series[key])]
    if not sheets:
        raise UserError(f"{paths[0]}: holds no iterations yet")
    names = [(Path(path).parent.name or str(path), LINES[i % len(LINES)]) for i, path in enumerate(paths)]
    return beside(grid([sheets], width=512), legend(names))


def plot(series, size=(512, 320)):
    """Lines through series of (x, y) points (n, 2) -> PIL image with axes."""
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(TEXT)
    draw = ImageDraw.Draw(sheet)
    points = np.concatenate(series)
    low, high = points.min(0), points.max(0)
    low[:] = 0                                                                 # both axes begin at nought
    left, top, right, bottom = 48, 10, size[0] - 20, size[1] - 24
    scale = np.array([right - left, top - bottom]) / np.maximum(high - low, 1e-9)
    for share in np.linspace(0, 1, 5):                                         # grid lines and their numbers
        x, y = low + share * (high - low)
        px, py = left + share * (right - left), bottom + share * (top - bottom)
        draw.line((left, py, right, py), fill=(225, 225, 225))
        draw.text((4, py - TEXT / 2), f"{y:.3g}", "black", font)
        draw.text((px, bottom + 4), f"{x:.0f}", "black", font, anchor="ma")
    for s, colour in zip(series, LINES * len(series)):
        line = [tuple(p) for p in (s - low) * scale + (left, bottom)]
        draw.line(line, fill=colour, width=2)
        for x, y in line if len(line) < 20 else ():
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# Own images
def own_images(path, size):
    """Name, image uint8 (3, h, w) and original (H, W) of an image file, or of those in a folder. The image is turned
    as its EXIF data says, and brought down to `size` pixels along its longer side: the network knows objects at the
    size they have in its training images, and a photograph of 12 megapixels would not fit into memory."""
    path = Path(path)
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in Image.registered_extensions()) \
        if path.is_dir() else [path]
    if not files:
        raise UserError(f"no images in {path}")
    for file in files:
        image = to_pil(read_image(file, turn=True))
        original = image.height, image.width
        image.thumbnail((size, size), Image.Resampling.BILINEAR)
        yield file.stem, torch.from_numpy(np.array(image)).permute(2, 0, 1), original


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="checkpoint: model.pth of train.py, or a released one")
    parser.add_argument("--dataset", choices=DATASETS, help="data set (default: the one the checkpoint was trained on)")
    parser.add_argument("--data-root", default="datasets", help="folder that holds the data set (default: datasets)")
    parser.add_argument("--split", help="list of images to draw (default: the data set's for validation)")
    parser.add_argument("--count", type=int, default=4, help="how many images of the data set (default: 4)")
    parser.add_argument("--image", metavar="FILE|DIR", help="your own image, or a folder of images, instead")
    parser.add_argument("--size", type=int, default=513, help="own images: longer side, in pixels (default: 513)")
    parser.add_argument("--bases", help="bases to show: 3,17 or random (default: the four that hold the most pixels)")
    parser.add_argument("--log", nargs="+", metavar="FILE", help="draw the curves of these log.jsonl as curves.png")
    parser.add_argument("--out", metavar="DIR", help="output folder (default: pictures, beside the checkpoint or log)")
    parser.add_argument("--device", default="auto", help="auto (cuda, then mps, then cpu) or a torch device")
    args = parser.parse_args()
    if args.count < 1 or args.size < 1:
        raise UserError("--count and --size must be at least 1")
    if not args.ckpt and not args.log:
        raise UserError("nothing to draw: give --ckpt model.pth, or --log log.jsonl")
    return args


def main():
    args = parse_args()
    out = Path(args.out or Path(args.ckpt or args.log[0]).parent / "pictures")
    if args.log:
        sheet = curves(args.log)
        out.mkdir(parents=True, exist_ok=True)
        sheet.save(out / "curves.png")
        print(f"wrote {out}/curves.png")
    if not args.ckpt:
        return

    net, device = load_checkpoint(args.ckpt), pick_device(args.device)
    if args.image:
        classes = net.data.get("classes") or [f"class {c}" for c in range(net.config["num_classes"])]
        if args.dataset in CLASSES and len(class_names(args.dataset)) == len(classes):     # for a released file
            classes = class_names(args.dataset)
        items = ((name, image, None, original) for name, image, original in own_images(args.image, args.size))
    else:
        data = open_dataset(args, net)
        classes = data.classes
        items = ((str(data.ids[i]), image, label if data.labelled else None, image.shape[1:])
                 for i in range(min(args.count, len(data))) for image, label in [data[i]])
    net.to(device, memory_format=memory_format(device))
    out.mkdir(parents=True, exist_ok=True)
    seen = []
    for name, image, label, original in items:
        prediction, z = look(net, image.to(device))
        if z is not None and len(seen) < 8:
            seen.append((name, image, z))
        bases = choose_bases(args.bases, [z]) if z is not None else []
        picture(image, label, prediction, z, bases, classes).save(out / f"{name}.png")
        full = F.interpolate(prediction[None, None], tuple(original), mode="nearest-exact")[0, 0]    # (H, W)
        save_index_png(full.numpy(), out / f"{name}_prediction.png", palette_of(classes))
        print(f"wrote {out}/{name}.png and {name}_prediction.png", flush=True)
    if len(seen) > 1:
        bases = choose_bases(args.bases, [z for _, _, z in seen])
        bases_over_images(seen, bases).save(out / "bases.png")
        print(f"wrote {out}/bases.png: the same bases over these images")


if __name__ == "__main__":
    run(main)
