"""The experiment on VOC's photographs: its table, and the picture of the cat.

    python -m extras.evidence.photographs --table           # from voc320.jsonl
    python -m extras.evidence.photographs --none none.pth --emau emau.pth      # -> assets/cat.png
"""
import argparse
import json
from pathlib import Path

import numpy as np
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from data import read_image
from ema import load_checkpoint
from evaluate import predict, run
from visualize import fullest_bases, picture, responsibilities

HERE = Path(__file__).resolve().parent
NINE = (0, 8, 9, 10, 12, 13, 15, 17, 18)        # classes with at least 15 images for validation
ARMS = ("none", "emau-none", "emau-full")       # no attention, EMAU with --gradient none and full


def table():
    """Mean IoU of the nine classes and pixel accuracy, in %. "- none" is the mean difference from
    no attention with the same seed."""
    runs = [json.loads(line) for line in (HERE / "voc320.jsonl").read_text().splitlines()]
    runs = sorted(runs, key=lambda run: run["seed"])
    lines, plain = ["              seeds   mean   dev.  - none  error   pixAcc"], None
    for arm in ARMS:
        done = [run for run in runs if run["arm"] == arm]
        iou = 100 * np.array([np.mean([run["iou"][c] for c in NINE]) for run in done])  # (seeds,)
        plain = iou if plain is None else plain             # of the first arm
        error = (iou - plain).std(ddof=1) / len(iou) ** 0.5
        pixacc = 100 * np.mean([run["val_pixacc"] for run in done])
        lines.append(f"{arm:14s}{len(iou):5d}{iou.mean():7.2f}{iou.std(ddof=1):7.2f}"
                     f"{(iou - plain).mean():+8.2f}{error:7.2f}{pixacc:9.2f}")
    return "\n".join(lines)


def cat(plain, net):
    """Chelsea, the predictions of a network without attention and of one with EMAU. Below, the
    three bases that hold most pixels, round by round (Fig. 5)."""
    image = to_pil_image(read_image(HERE / "chelsea.png"))
    image.thumbnail((320, 320))                             # as large as those in training
    image = pil_to_tensor(image)  # (3, H, W)
    predictions = [predict(each, image).argmax(0).byte() for each in (plain, net)]  # (H, W) each
    z = responsibilities(net, image)  # (K, T, H, W)
    return picture(image, *predictions, z[fullest_bases(z)[:3]], net.classes)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table")
    parser.add_argument("--none", metavar="FILE", help="checkpoint of the arm none")
    parser.add_argument("--emau", metavar="FILE", help="checkpoint of the arm emau-none")
    args = parser.parse_args(argv)
    if args.table:
        print(table())
    elif args.none and args.emau:
        out = HERE.parent.parent / "assets/cat.png"
        cat(load_checkpoint(args.none), load_checkpoint(args.emau)).save(out)
        print(f"wrote {out}")
    else:
        parser.error("give --table, or --none and --emau")


if __name__ == "__main__":
    run(main)
