"""Draws the training loss and the validation mIoU of one or several runs over their iterations.

    python -m extras.curves out/*/log.jsonl                            # curves.png beside the first
"""
import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evaluate import run

PANELS = {"loss": "training loss", "val_miou": "validation mIoU"}      # keys of log.jsonl, titles
COLOURS = [(178, 34, 34), (31, 90, 180), (34, 139, 34), (218, 140, 0), (128, 0, 128), (0, 150, 150)]
FONT, PANEL = ImageFont.load_default(13), (512, 340)              # width and height of a panel


def read_log(path):
    """The {iteration: record} of a log.jsonl. What a resumed run logs again replaces what stood
    there. A line that the end of a process tore is left out. OSError if there are no records."""
    records = {}
    for line in Path(path).read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            iteration = record["iteration"]                 # the settings have none
        except (ValueError, TypeError, KeyError):
            continue
        # Loss and validation of an iteration are two records.
        records[iteration] = records.get(iteration, {}) | record
    if not records:
        raise OSError(f"{path}: holds no iterations: give a log.jsonl of train.py")
    return dict(sorted(records.items()))


def curves(paths):
    """The curves of several logs: a panel for each of PANELS, then the names of the runs."""
    runs = [read_log(path) for path in paths]
    names = [Path(path).parent.name or str(path) for path in paths]
    width = 2 * PANEL[0] + 10 + round(max(FONT.getlength(name) for name in names))
    sheet = Image.new("RGB", (width, max(PANEL[1], 21 * len(names) + 30)), "white")
    draw = ImageDraw.Draw(sheet)
    for panel, (key, title) in enumerate(PANELS.items()):
        series = [np.array([(i, r[key]) for i, r in records.items() if key in r]).reshape(-1, 2)
                  for records in runs]  # (points, 2) each
        plot(draw, panel * PANEL[0], series, title)
    for i, name in enumerate(names):
        draw.text((2 * PANEL[0], 21 * i + 30), name, COLOURS[i % len(COLOURS)], FONT)
    return sheet


def plot(draw, left, series, title, low=0):
    """Lines through each series of points x, y (n, 2), in the panel at `left`. The axes begin at x
    = 0 and y = low."""
    left, top, right, bottom = left + 48, 30, left + PANEL[0] - 20, PANEL[1] - 24
    low = np.array([0, low])  # (2,)
    high = np.concatenate([[low + 1e-9], *series]).max(0)  # (2,)
    draw.text((left, 8), title, "black", FONT)
    for share in np.linspace(0, 1, 5):                      # grid lines and their numbers
        x, y = left + share * (right - left), bottom + share * (top - bottom)
        draw.line((left, y, right, y), fill=(225, 225, 225))
        at = low + share * (high - low)  # (2,)
        draw.text((left - 44, y - 7), f"{at[1]:.3g}", "black", FONT)
        draw.text((x, bottom + 4), f"{at[0]:g}", "black", FONT, anchor="ma")
    for i, points in enumerate(series):
        points = (points - low) / (high - low) * (right - left, top - bottom)  # (n, 2)
        line = [(left + x, bottom + y) for x, y in points]
        colour = COLOURS[i % len(COLOURS)]
        draw.line(line, fill=colour, width=2)
        for x, y in line if len(line) < 20 else ():         # a line of one point shows nothing
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", help="log.jsonl of train.py, one or several")
    args = parser.parse_args(argv)
    out = Path(args.logs[0]).parent / "curves.png"
    curves(args.logs).save(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main)
