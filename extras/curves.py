"""Draws training loss and validation mIoU of one or several runs over their iterations.

    python -m extras.curves out/*/log.jsonl                            # writes curves.png beside the first
"""
import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from backbone import UserError
from evaluate import run

PANELS = {"loss": "training loss", "val_miou": "validation mIoU"}              # keys of log.jsonl, titles
COLOURS = [(178, 34, 34), (31, 90, 180), (34, 139, 34), (218, 140, 0), (128, 0, 128), (0, 150, 150)]
GAP, TEXT = 8, 13                       # pixels: space between panels, height of letters


def read_log(path):
    """A log.jsonl of train.py: its headers, one for every start of the run, and {iteration: record}, in order.

    What a resumed run logged again replaces what it logged before. A line torn by the end of a process is left out.
    """
    headers, records = [], {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a log.jsonl of train.py: {error}") from None
    for line in lines:
        try:
            record = dict(json.loads(line))
        except (ValueError, TypeError):
            continue
        if "iteration" in record:
            records.setdefault(record["iteration"], {}).update(record)         # losses and validation are two lines
        else:
            headers.append(record)
    return headers, dict(sorted(records.items()))


def curves(paths):
    """The curves of several log.jsonl, as a PIL image: one panel for each of PANELS, and the names of the runs."""
    runs = [read_log(path)[1] for path in paths]
    panels = []
    for key, title in PANELS.items():
        series = [np.array([(i, r[key]) for i, r in records.items() if key in r], float).reshape(-1, 2)
                  for records in runs]                                         # (points, 2) each
        if any(len(points) for points in series):
            panels.append(plot(series, title))
    if not panels:
        raise UserError(f"{paths[0]}: holds no iterations yet")
    panels.append(legend([Path(path).parent.name or str(path) for path in paths]))
    sheet = Image.new("RGB", (sum(p.width for p in panels), max(p.height for p in panels)), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel, (sum(p.width for p in panels[:i]), 0))
    return sheet


def plot(series, title, size=(512, 340)):
    """Lines through series of (x, y) points (n, 2) -> PIL image with axes and title."""
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(TEXT)
    draw = ImageDraw.Draw(sheet)
    high = np.concatenate(series).max(0)                                       # both axes begin at nought
    left, top, right, bottom = 48, TEXT + 2 * GAP, size[0] - 20, size[1] - 24
    scale = np.array([right - left, top - bottom]) / np.maximum(high, 1e-9)
    draw.text((left, GAP), title, "black", font)
    for share in np.linspace(0, 1, 5):                                         # grid lines and their numbers
        x, y = share * high
        px, py = left + share * (right - left), bottom + share * (top - bottom)
        draw.line((left, py, right, py), fill=(225, 225, 225))
        draw.text((4, py - TEXT / 2), f"{y:.3g}", "black", font)
        draw.text((px, bottom + 4), f"{x:g}", "black", font, anchor="ma")
    for i, points in enumerate(series):
        line = [tuple(point) for point in points * scale + (left, bottom)]
        draw.line(line, fill=COLOURS[i % len(COLOURS)], width=2)
        for x, y in line if len(line) < 20 else ():
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=COLOURS[i % len(COLOURS)])
    return sheet


def legend(names):
    """The names of the series with their colours, one below the other -> PIL image."""
    font, step = ImageFont.load_default(TEXT), TEXT + GAP
    width = 3 * TEXT + max(round(font.getlength(name)) for name in names)
    sheet = Image.new("RGB", (width, step * (len(names) + 1) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(names):
        y = GAP + step * (i + 1)
        draw.rectangle((0, y, TEXT, y + TEXT), fill=COLOURS[i % len(COLOURS)], outline="black")
        draw.text((step, y), name, "black", font)
    return sheet


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", help="log.jsonl of train.py, one or several")
    parser.add_argument("--out", type=Path, help="the picture (default: curves.png beside the first log)")
    args = parser.parse_args(argv)
    out = (args.out or Path(args.logs[0]).parent / "curves").with_suffix(".png")
    sheet = curves(args.logs)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main)
