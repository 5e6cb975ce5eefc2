"""Is this copy of a data set whole? Checks lists, files and labels, and draws some of them.

    python -m extras.check_data --dataset voc --data-root DIR          # 100 random pairs of a list
    python -m extras.check_data --dataset voc --data-root DIR --all    # every pair

Run it before you train, and paste what it prints into a bug report.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from data import DATASETS, IGNORE, build_dataset
from evaluate import new_folder, positive, run
from visualize import overlay

CONTEXT, COCO_2017 = {"train": 4998, "val": 5105, "trainval": 10103}, {"train": 118287, "val": 5000}
OFFICIAL = {  # images of each list, as the authors count them. The first two lists must be there.
    "voc": {"train": 1464, "val": 1449, "trainval": 2913, "trainaug": 10582, "test": 1456},
    "context": CONTEXT, "context60": CONTEXT,
    "cocostuff": {"train": 9000, "test": 1000, "all": 10000},
    "cocostuff164k": COCO_2017, "coco2voc": COCO_2017}


def check(name, root, count, out):
    """Prints what it finds in a copy of a data set. Returns the faults."""
    print(f"{name} in {root}")
    lists, sheet = OFFICIAL.get(name, {"train": None, "val": None}), None
    faults, needed = [], list(lists)[:2]
    for split, official in lists.items():
        print(f"  {split}")
        try:
            data = build_dataset(name, root, split)
        except OSError as error:
            # The other lists may be absent. But a list without its files is a fault.
            if split in needed or "files are missing" in str(error):
                report([str(error)], faults)
            else:
                print(f"    not there: {error}")
            continue
        print(f"    {len(data)} images" + (f" (official: {official})" if official else ""))
        if data.labels is None:
            report([f"{split} has no labels"] if split in needed else [], faults)
            continue
        bad, counts = read_pairs(data, count)
        report(bad, faults)
        if not bad and not sheet:
            report(print_classes(data.classes, counts), faults)
            sheet = contact_sheet(data)
            sheet.save(out / f"{name}.png")
            print(f"    wrote {out / name}.png: do the labels fit the images?")
    return faults


def report(new, faults):
    """Prints and adds the faults that are not known from another list. Ten lines are enough."""
    new = [fault for fault in new if fault not in faults]
    for fault in new[:10]:
        print(f"    FAULT: {fault}")
    faults += new


class Checked(Dataset):
    """Pairs for the check. An item is the pixels of each label value (256,), or an error's text."""

    def __init__(self, data):
        self.data = data

    def __getitem__(self, i):
        try:
            return np.bincount(self.data[i][1].flatten().numpy(), minlength=256)  # (256,)
        except OSError as error:
            return str(error)


def read_pairs(data, count):
    """Reads `count` random pairs, or all if it is None. Returns the errors' texts and the number of
    pixels of each label value (256,)."""
    wanted = np.sort(np.random.default_rng(0).permutation(len(data))[:count])
    bad, counts = [], np.zeros(256, np.int64)  # (256,)
    loader = DataLoader(Checked(data), batch_size=None, sampler=wanted.tolist(), num_workers=2)
    for done, item in enumerate(loader, 1):
        if isinstance(item, str):
            bad.append(item)
        else:
            counts += item.numpy()  # (256,)
        if done % 1000 == 0:
            print(f"    {done} of {len(wanted)} pairs read", flush=True)
    print(f"    {len(wanted) - len(bad)} of {len(wanted)} pairs read are whole")
    return bad, counts


def print_classes(classes, counts):
    """Prints the share of each class in the pixels counted (256,). Returns the fault of labels in
    which one class alone occurs, or none."""
    for value, name in [*enumerate(classes), (IGNORE, "(ignored)")]:
        print(f"    {name:20s} {100 * counts[value] / counts.sum():6.2f} %")
    absent = [name for name, pixels in zip(classes, counts) if not pixels]
    if absent:
        print(f"    without a pixel in these pairs: {', '.join(absent)}")
    if len(absent) < len(classes) - 1:
        return []
    advice = ("" if len(classes) > 2 else ": are the masks drawn with 0 and 255? 255 is ignored: "
              "write the object as 1, and background first into classes.txt")
    return [f"{len(classes) - len(absent)} of {len(classes)} classes occur{advice}"]


def contact_sheet(data, side=240):
    """Sixteen images from all over the list, with their labels laid over."""
    panels = []
    for i in np.unique(np.linspace(0, len(data) - 1, 16).astype(int)):
        image, label = (to_pil_image(part) for part in data[i])
        image = pil_to_tensor(ImageOps.contain(image, (side, side)))  # (3, h, w)
        label = pil_to_tensor(ImageOps.contain(label, (side, side), Image.NEAREST))[0]  # (h, w)
        panel = overlay(image, label, data.classes)  # (3, h, w)
        beyond = (0, side - panel.shape[2], 0, side - panel.shape[1])
        panels.append(F.pad(panel, beyond, value=255))  # (3, side, side)
    return to_pil_image(make_grid(panels, nrow=4, padding=4, pad_value=255))


def main(argv=None):
    parser = argparse.ArgumentParser(
        usage="check_data.py --dataset NAME [flags, see --help]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", choices=DATASETS, required=True)
    add("--data-root", default="datasets", help="folder of the data set, default: datasets")
    add("--count", type=positive, default=100, help="random pairs of each list, default: 100")
    add("--all", action="store_true", help="read every pair")
    add("--out", type=Path, help="a new folder; default: out/check, which is written again")
    args = parser.parse_args(argv)
    out = args.out or Path("out/check")
    out.mkdir(parents=True, exist_ok=True)
    if args.out:
        new_folder(args.out, "give another --out")
    faults = check(args.dataset, args.data_root, None if args.all else args.count, out)
    if faults:
        sys.exit(f"error: {len(faults)} fault{'s' * (len(faults) > 1)} in {args.data_root}")


if __name__ == "__main__":
    run(main)
