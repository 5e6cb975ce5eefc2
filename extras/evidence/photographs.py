"""The table of the experiment on VOC's photographs: python -m extras.evidence.photographs"""
import json
from pathlib import Path

import numpy as np

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


if __name__ == "__main__":
    print(table())
