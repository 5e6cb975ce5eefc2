"""Is this copy of a data set whole? Checks layout, counts, files and labels, and draws some of it to look at.

    python -m extras.check_data --dataset voc --data-root DIR          # 100 random pairs of every list
    python -m extras.check_data --dataset voc --data-root DIR --all    # every pair

Run it first, and paste what it prints into a bug report. Shapes: H x W pixels of one image.
"""
import argparse
import time
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from backbone import UserError
from data import DATASETS, IGNORE, VAL_SPLIT, build_dataset, overlay, palette_of
from evaluate import run
from extras.drawn import PICTURES

OFFICIAL = {  # images per split, as the authors count them; None: nobody does
    "voc": {"train": 1464, "val": 1449, "trainval": 2913, "trainaug": 10582, "test": 1456},
    "context": {"train": 4998, "val": 5105, "trainval": 10103},
    "cocostuff": {"train": 9000, "test": 1000, "all": 10000},
    "cocostuff164k": {"train": 118287, "val": 5000}, "coco2voc": {"train": 118287, "val": 5000},
    "folder": {"train": None, "val": None},
    **{name: {"train": None, "val": count} for name, (_, count, _) in PICTURES.items()}}


def check(name, root, context_classes, count, out):
    """Checks a copy of a data set, prints what it finds, draws a contact sheet; returns the number of faults."""
    print(f"{name} in {root}")
    faults, sheet = [], None
    for split, official in OFFICIAL[name].items():
        try:
            data = build_dataset(name, root, split, context_classes)
        except UserError as error:
            if split == "train":                           # nothing there at all: one line is enough
                raise
            # Only training and validation need their lists; but a list without some of its files is always a fault.
            needed = split == VAL_SPLIT.get(name, "val") and name != "folder"
            optional = not needed and "are missing" not in str(error)
            print(f"  {split:9s} {'not there' if optional else 'FAULT'}: {error}")
            faults += [] if optional else [str(error)]
            continue
        print(f"  {split:9s} {number_of_images(len(data), official)}")
        if not data.labelled:
            continue
        bad, counts = read_pairs(data, count)
        new = [line for line in bad if line not in faults]                     # train and val are in trainval again
        for line in new[:10]:
            print(f"            FAULT: {line}")
        faults += new
        if sheet is None and not bad:
            sheet = data, counts
    if sheet:
        print_pixels(*sheet)
        out.mkdir(parents=True, exist_ok=True)
        contact_sheet(sheet[0]).save(out / f"{name}.png")
        print(f"  wrote {out / name}.png: images with their labels laid over, to look at")
    return len(faults)


def number_of_images(found, official):
    if not official:
        return f"{found} images"
    if found == official:
        return f"{found} images, the official number"
    more = "more" if found > official else "fewer"
    return f"{found} images, {abs(found - official)} {more} than the official {official}"


class Checked(Dataset):
    """Reads pairs for the check: item i is ("", counts of label values (256,)), or (the error's text, zeros)."""

    def __init__(self, data):
        self.data = data

    def __getitem__(self, i):
        try:
            return "", np.bincount(self.data[i][1].flatten().numpy(), minlength=256)
        except UserError as error:
            return str(error), np.zeros(256, np.int64)


def read_pairs(data, count):
    """Reads `count` random pairs, None for all: the errors' texts, and the pixels of every label value (256,)."""
    wanted = np.sort(np.random.default_rng(0).permutation(len(data))[:count])
    bad, counts, reported = [], np.zeros(256, np.int64), time.time()
    loader = DataLoader(Checked(data), batch_size=None, sampler=wanted.tolist(), num_workers=2)
    for done, (error, values) in enumerate(loader, 1):
        bad += [error] if error else []
        counts += np.asarray(values)
        if time.time() - reported > 5:
            reported = time.time()
            print(f"            {done}/{len(wanted)} pairs read", flush=True)
    print(f"            {len(wanted) - len(bad)} of {len(wanted)} pairs read are whole: they decode, sizes agree, "
          "labels are legal")
    return bad, counts


def print_pixels(data, counts):
    """The share of every class, from the pixels of every label value (256,)."""
    print(f"  pixels of the {data.split} pairs read, by class:")
    for value, name in [*enumerate(data.classes), (IGNORE, "(ignored)")]:
        print(f"    {name:20s} {100 * counts[value] / counts.sum():6.2f} %")


def contact_sheet(data, columns=4, rows=4, side=240):
    """Images of a data set, evenly taken, with their labels laid over, as one PIL image."""
    sheet, palette = Image.new("RGB", (columns * side, rows * side), "white"), palette_of(data.classes)
    for n, i in enumerate(np.unique(np.linspace(0, len(data) - 1, columns * rows).astype(int))):
        image, label = data[i]                                                 # (3, H, W), (H, W)
        drawn = overlay(image, label, palette)
        drawn.thumbnail((side - 4, side - 4))
        sheet.paste(drawn, (n % columns * side, n // columns * side))
    return sheet


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", choices=DATASETS, required=True, help="data set")
    add("--data-root", type=Path, default=Path("datasets"), help="folder that holds it (default: datasets)")
    add("--context-classes", type=int, choices=(59, 60), default=59, help="of PASCAL Context (default: 59)")
    add("--count", type=int, default=100, help="random pairs to read of each list (default: 100)")
    add("--all", action="store_true", help="read every pair")
    add("--out", type=Path, default=Path("out/check"), help="folder for the picture (default: out/check)")
    args = parser.parse_args(argv)
    if args.count < 1:
        raise UserError(f"--count {args.count}: must be at least 1")
    faults = check(args.dataset, args.data_root, args.context_classes, None if args.all else args.count, args.out)
    if faults:
        raise UserError(f"{faults} fault{'s' * (faults > 1)} found in {args.data_root}")


if __name__ == "__main__":
    run(main)
