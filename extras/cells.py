"""Does attention carry what lies far away? EMAU in a small network of its own, on two tasks.

    python -m extras.cells --arms none emau-full --seeds 1  # without flags: all of it

Every picture is a mosaic of about 40 cells, half of them striped. The striped cells of a picture
are all of class 0 or all of class 1, and a look at one of them hardly tells. The other cells are
of class 2 (lines) or 3 (checks), by their texture alone.

cells: the evidence is spread over the picture. The brightness of a cell is a normal variable of
    deviation 1, its mean +0.25 for stripes of class 1 and -0.25 for class 0. One striped cell
    tells Phi(0.25) = 60% (Phi is the normal distribution function), twenty tell
    Phi(0.25 * sqrt(20)) = 87%. Their mean over pixels, which counts large cells more, tells 84%.
cells-key: the evidence is in one place. The brightness tells nothing, but a square in a corner is
    white in class 1 and black in class 0. Who learns of it knows 100%, who does not 50%.

What is printed is the accuracy on striped pixels in %, the mean of both classes. Shapes: B
pictures of SIDE x SIDE pixels, features and labels of h = w = 25.
"""
import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ema import EMAU
from extras.relatives import A2Block, NonLocal

SHIFTS = {"cells": 0.5, "cells-key": 0.0}                   # of the mean brightness, 1 against 0
ARMS = {                                                    # made with the number of channels
    "none": lambda channels: nn.Identity(),
    "emau-none": lambda channels: EMAU(channels, gradient="none"),
    "emau-full": lambda channels: EMAU(channels, gradient="full"),
    "a2": A2Block,
    "nonlocal": NonLocal}
SIDE, KEY = 97, 12                                          # of a picture and of the key, in pixels
CHANNELS, BATCH, ITERS, LR = 64, 16, 400, 0.003
VALIDATION = 1024                                           # pictures, a multiple of BATCH


def draw_cells(task, index):
    """Draws picture `index` of a task, always the same.

    out: picture (SIDE, SIDE), float32, in deviations of a cell's brightness, and
         label (SIDE, SIDE), int64: 0 or 1 striped, 2 lines, 3 checks, 255 the key (ignored)
    """
    rng = np.random.default_rng(index)
    # The class is drawn, not index % 2. Batches of exactly half and half would leak it through BN.
    bright = rng.integers(2)
    count = rng.integers(36, 45)
    centres = rng.uniform(0, SIDE, (2, count, 1))  # (2, count, 1)
    y, x = (np.arange(SIDE) - centres) ** 2  # (count, SIDE) each
    cell = (y[:, :, None] + x[:, None]).argmin(0)  # (SIDE, SIDE)  the nearest centre's number
    texture = rng.choice(3, count, p=(0.5, 0.25, 0.25))  # (count,)
    shift = SHIFTS[task] * (bright - 0.5)                   # of the striped cells' brightness
    brightness = rng.normal(size=count) + shift * (texture == 0)  # (count,)
    row, column = np.indices((SIDE, SIDE)) // 2 % 2  # (SIDE, SIDE) each  stripes of two pixels
    pattern = np.choose(texture[cell], (column, row, row ^ column))  # (SIDE, SIDE)
    picture = brightness[cell] + 2 * pattern - 1 + rng.normal(0, 0.25, cell.shape)  # (SIDE, SIDE)
    label = np.where(texture == 0, bright, texture + 1)[cell]  # (SIDE, SIDE)
    if task == "cells-key":
        picture[:KEY, :KEY], label[:KEY, :KEY] = 4 * (2 * bright - 1), 255
    return picture.astype(np.float32), label


def draw_batch(task, indices):
    """Pictures (B, 1, SIDE, SIDE) and their labels (B, h, w) at the pixels of the features."""
    pictures, labels = (np.stack(x) for x in zip(*(draw_cells(task, index) for index in indices)))
    return torch.from_numpy(pictures[:, None]), torch.from_numpy(labels[:, ::4, ::4])


def build(arm):
    """A network from pictures (B, 1, SIDE, SIDE) to logits (B, 4, h, w). Without attention they
    depend on 13 x 13 pixels each, less than the area of one cell (15 x 15 on average)."""
    features = nn.Sequential(
        nn.Conv2d(1, CHANNELS, 5, 2, 2, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 5, 2, 2, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU())
    classifier = nn.Conv2d(CHANNELS, 4, 1)
    # The attention is made last, so that a seed gives all else the same weights in every arm.
    return nn.Sequential(features, ARMS[arm](CHANNELS), classifier)


def train(task, arm, seed):
    """Trains one network. All arms of a seed see the same pictures in the same order."""
    torch.manual_seed(seed)
    net = build(arm)
    optimizer = torch.optim.Adam(net.parameters(), LR)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, ITERS, power=0.9)
    first = VALIDATION + seed * ITERS * BATCH               # no picture is seen twice
    for start in range(first, first + ITERS * BATCH, BATCH):
        pictures, labels = draw_batch(task, range(start, start + BATCH))
        loss = F.cross_entropy(net(pictures), labels, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.inference_mode()
def accuracy(net, task):
    """Accuracy on striped pixels in %, the mean of both classes, on the first pictures."""
    correct = total = torch.zeros(2)
    for start in range(0, VALIDATION, BATCH):
        pictures, labels = draw_batch(task, range(start, start + BATCH))
        right = net(pictures).argmax(1) == labels  # (B, h, w)
        correct = correct + labels[right].bincount(minlength=2)[:2]  # (2,)
        total = total + labels.flatten().bincount(minlength=2)[:2]  # (2,)
    return 100 * (correct / total).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    args = parser.parse_args()
    print("task       arm          mean   dev.   each seed, minutes in all")
    for task in SHIFTS:
        for arm in args.arms:
            began = time.perf_counter()
            scores = [accuracy(train(task, arm, seed), task) for seed in range(args.seeds)]
            deviation = np.std(scores, ddof=1) if args.seeds > 1 else np.nan
            minutes = (time.perf_counter() - began) / 60
            print(f"{task:10} {arm:10} {np.mean(scores):6.1f} {deviation:6.1f}  ",
                  *(f"{score:.1f}" for score in scores), f"  {minutes:.1f}", flush=True)


if __name__ == "__main__":
    main()
