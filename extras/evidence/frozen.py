"""The paper's ablations in small: only the head is trained, on frozen features of photographs.

    python -m extras.evidence.frozen --features DIR --weights FILE     # once, 20 minutes
    python -m extras.evidence.frozen --part 0               # the even runs; --part 1: the odd ones
    python -m extras.evidence.frozen --only "emau gradient=full, lr 0.03, seed 0"         # again
    python -m extras.evidence.frozen --table                # --figures draws Figs. 3 and 4

Each run becomes a line of frozen.jsonl; what has a line is not run again. README.md beside this
file has the protocol. Shapes: B images, 21 x 21 positions, C = 256 channels, L = 21 classes.
"""
import argparse
import itertools
import json
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

from backbone import DilatedResNet
from data import VOC_CLASSES, SegmentationDataset, normalise, schedule
from ema import EMAU, conv_bn_relu
from evaluate import confusion_matrix, run, scores
from extras.curves import COLOURS, FONT, PANEL, plot
from extras.evidence.photographs import NINE
from extras.relatives import RELATIVES
from train import build_optimizer, segmentation_loss

HERE = Path(__file__).resolve().parent
LOG, STORE = HERE / "frozen.jsonl", Path("out/frozen_features.pt")
SIDE, CHANNELS, BATCH, ITERS = 321, 256, 8, 1200
ROUNDS = (1, 2, 3, 4, 8, 16)                    # T in evaluation

NONE, FULL = "emau gradient=none", "emau gradient=full"
ARMS = ("none", "control", NONE, FULL, "nonlocal", "a2")
FIG3 = ([f"{FULL} base_update={update} base_norm={norm}" for update, norm in
         itertools.product(("average", "backprop", "fixed"), ("l2", "layer", "none"))]
        + [f"{NONE} base_update=average base_norm=l2", f"{NONE} base_update=fixed base_norm=l2"])
FIG4 = [f"{emau} iterations={T}" for emau in (NONE, FULL) for T in (1, 2, 3, 4, 8)]
SIZES = ([f"{FULL} num_bases={K}" for K in (4, 16, 64, 128)]
         + [f"{FULL} lam={lam}" for lam in (0.5, 1.0, 4.0)])
DEFAULTS = (" base_update=average", " base_norm=l2", " iterations=3", " num_bases=64", " lam=1.0")
TABLES = {  # what, arms, learning rates, seeds
    "learning rate": (("none",), (0.01, 0.03, 0.1), 1),
    "arms": (ARMS, (0.03,), 5),
    "arms at other learning rates": (ARMS[:4], (0.01, 0.1), 2),
    "Fig. 4": (FIG4, (0.03,), 3),
    "Fig. 3": (FIG3, (0.03,), 3),
    "K and lambda": (SIZES, (0.03,), 3)}


def name_of(arm, lr, seed):
    """The name of a run. Options that have their default are left out: such runs are the same."""
    for default in DEFAULTS:
        arm = arm.replace(default, "")
    return f"{arm}, lr {lr}, seed {seed}"


def all_runs():
    """The names of all runs, the most important first, each once."""
    return list(dict.fromkeys(
        name_of(arm, lr, seed) for arms, lrs, seeds in TABLES.values()
        for seed in range(seeds) for lr in lrs for arm in arms))


# ---- Features
@torch.no_grad()
def make_features(root, weights):
    """Features (images, C, 21, 21) and labels (images, SIDE, SIDE) of the lists beside this file:
    2,734 images for training, then 520. PCA reduces 2048 channels to C."""
    base = Path(root, "VOCdevkit/VOC2012")
    net = DilatedResNet("resnet50", "7x7", weights, 16).eval()
    ids = [i for split in ("train", "val")
           for i in (HERE / f"voc320_{split}.txt").read_text().split()]
    masks = {path.stem: str(path) for folder in ("SegmentationClass", "SegmentationClassAug")
             for path in (base / folder).glob("*.png")}
    data = SegmentationDataset(
        "voc", "frozen", VOC_CLASSES, {c: c for c in (*range(21), 255)}, ids,
        [base / f"JPEGImages/{i}.jpg" for i in ids], [masks[i] for i in ids])
    features, labels = [], []
    for i in range(len(ids)):
        image, label = data[i]  # (3, H, W), (H, W)
        beyond = (0, SIDE - image.shape[2], 0, SIDE - image.shape[1])
        with torch.autocast("cpu", torch.bfloat16):
            x = net(F.pad(normalise(image[None]), beyond))[0]  # (2048, 21, 21)
        features.append(x.half())
        labels.append(F.pad(label, beyond, value=255))  # (SIDE, SIDE)
    x = torch.stack([f.flatten(1) for f in features[:2734:5]]).float()  # (images, 2048, N)
    x = x.transpose(1, 2).flatten(0, 1)  # (pixels, 2048)
    mean = x.mean(0)  # (2048,)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))  # (2048,), (2048, 2048)
    values, vectors = values[-CHANNELS:], vectors[:, -CHANNELS:]  # (C,), (2048, C)
    print(f"{100 * values.sum() / (x - mean).square().sum(1).mean():.0f}% of the variance")
    scale = values.mean().sqrt()
    reduced = [torch.einsum("chw,cd->dhw", f.float() - mean[:, None, None], vectors) / scale
               for f in features]  # (C, 21, 21) each
    STORE.parent.mkdir(exist_ok=True)
    torch.save({"x": torch.stack(reduced).half(), "label": torch.stack(labels)}, STORE)


# ---- A run
class Control(EMAU):
    """EMAU's two convolutions without EM between them."""

    def forward(self, x):  # (B, C, h, w)
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))  # (B, C, h, w)


def build_head(arm, seed):
    """3x3 convolution, attention, classifier. The seed gives all arms the same weights outside the
    attention."""
    torch.manual_seed(seed)
    reduce, classifier = conv_bn_relu(CHANNELS, CHANNELS), nn.Conv2d(CHANNELS, 21, 1)
    kind, *words = arm.split()
    options = dict(word.split("=") for word in words)
    options = {key: float(value) if key == "lam" else int(value) if value.isdigit() else value
               for key, value in options.items()}
    kinds = {"none": lambda channels: nn.Identity(), "emau": EMAU, **RELATIVES,
             "control": lambda channels: Control(channels, gradient="full")}
    head = nn.Sequential(reduce, kinds[kind](CHANNELS, **options), classifier)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 9 / ITERS                     # as in train.py
    return head


def train_head(head, store, lr, seed):
    """The head of train.py's loss and optimiser, by the poly policy. Images are mirrored."""
    optimizer, rng = build_optimizer(head, lr), np.random.default_rng(seed)
    for iteration, batch in enumerate(schedule(range(2734), BATCH, seed, range(1, ITERS + 1))):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - iteration / ITERS) ** 0.9 * group["lr_scale"]
        indices = torch.tensor([index for _, index in batch])  # (B,)
        x = store["x"][indices]  # (B, C, 21, 21)
        label = store["label"][indices, ::4, ::4]  # (B, 81, 81)
        mirrored = torch.from_numpy(rng.random(BATCH) < 0.5)[:, None, None]  # (B, 1, 1)
        label = torch.where(mirrored, label.flip(2), label)
        x = torch.where(mirrored[..., None], x.flip(3), x).float()
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(x).float()  # (B, L, 21, 21)
        logits = F.interpolate(logits, (81, 81), mode="bilinear", align_corners=True)
        segmentation_loss(logits, label).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def judge(head, store):
    """{T: IoU of every class} on the validation images; T is 0 without EMAU."""
    head.eval()
    features = [head[0](x[None].float()) for x in store["x"][2734:]]  # (1, C, 21, 21) each
    found = {}
    for T in ROUNDS if type(head[1]) is EMAU else (0,):
        head[1].iterations = T
        confusion = torch.zeros(21, 21, dtype=torch.int64)
        for x, label in zip(features, store["label"][2734:]):
            logits = F.interpolate(head[1:](x), (SIDE, SIDE), mode="bilinear", align_corners=True)
            confusion += confusion_matrix(logits[0].max(0)[1], label, 21)
        found[T] = [value and round(value, 5) for value in scores(confusion)["iou"]]
    return found


def train_runs(names, log):
    """Trains and judges runs, and adds a line for each to a log."""
    store = torch.load(STORE)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, check=False,
                            capture_output=True, text=True).stdout.strip()
    for name in names:
        began = time.time()
        arm, lr, seed = name.replace("lr ", "").replace("seed ", "").split(", ")
        head = build_head(arm, int(seed))
        train_head(head, store, float(lr), int(seed))
        line = {"name": name, "iou": judge(head, store), "seconds": round(time.time() - began),
                "commit": commit, "torch": torch.__version__}
        with open(log, "a") as file:
            print(json.dumps(line), file=file)
        print(f"{name}: {line['seconds']} s", flush=True)


# ---- Tables
def read_scores():
    """{name of a run: {T: mean IoU of the nine classes, in %}}, of the runs that there are."""
    lines = map(json.loads, LOG.read_text().splitlines())
    return {line["name"]: {int(T): 100 * np.mean([iou[c] for c in NINE])
                           for T, iou in line["iou"].items()} for line in lines}


def found(scores, arm, lr, seeds, T=None):
    """Mean IoU of each seed (seeds,), with T rounds, by default as many as in training."""
    if T is None:
        T = 0 if "emau" not in arm else int(dict(
            word.split("=") for word in arm.split()[1:]).get("iterations", 3))
    return np.array([scores[name_of(arm, lr, seed)][T] for seed in range(seeds)])


def print_table(what, scores):
    """Mean, deviation, and the mean difference from the control with the same seed and its error;
    for Figs. 3 and 4 mean IoU by T in evaluation as well."""
    arms, lrs, seeds = TABLES[what]
    rounds = ROUNDS if what.startswith("Fig.") else ()
    heads = "".join(f"  T={T:2d}" for T in rounds)
    print(f"{what:66s}runs   mean   dev.  - control  error{heads}")
    for lr, arm in itertools.product(lrs, arms):
        values = found(scores, arm, lr, seeds)  # (seeds,)
        row = f"{arm + f', lr {lr}':66s}{seeds:4d}{values.mean():7.2f}"
        if seeds > 1:
            gain = values - found(scores, "control", lr, seeds)  # (seeds,)
            row += (f"{values.std(ddof=1):7.2f}{gain.mean():+11.2f}"
                    f"{gain.std(ddof=1) / seeds ** 0.5:7.2f}")
        for T in rounds:
            row += f"{found(scores, arm, lr, seeds, T).mean():6.1f}"
        print(row)
    print()


def draw_figures(scores):
    """assets/fig4.png is the matrix of Fig. 4, assets/fig3.png has the curves of Fig. 3."""
    sheets = [Image.new("RGB", (2 * PANEL[0], PANEL[1]), "white") for _ in range(2)]
    fig4, fig3 = map(ImageDraw.Draw, sheets)
    matrices = np.array([[found(scores, arm, 0.03, 3, T).mean() for T in ROUNDS]
                         for arm in FIG4]).reshape(2, -1, len(ROUNDS))  # (gradients, T, T)
    share = (matrices - matrices.min()) / np.ptp(matrices)  # (gradients, T, T)
    for (panel, row, column), value in np.ndenumerate(matrices):
        x, y = panel * PANEL[0] + 70 + 70 * column, 60 + 50 * row
        blue = 255 - int(150 * share[panel, row, column])
        fig4.rectangle((x, y, x + 68, y + 48), (blue, blue, 255))
        fig4.text((x + 34, y + 24), f"{value:.2f}", "black", FONT, anchor="mm")
    for left, emau in ((70, NONE), (PANEL[0] + 70, FULL)):
        title = f"{emau}, T in training (rows) and evaluation (columns)"
        fig4.text((left, 12), title, "black", FONT)
        for column, T in enumerate(ROUNDS):
            fig4.text((left + 34 + 70 * column, 50), f"T = {T}", "black", FONT, anchor="mm")
        for row, arm in enumerate(FIG4[:5]):
            fig4.text((left - 8, 84 + 50 * row), arm[-1], "black", FONT, anchor="rm")
    for panel, arms in enumerate((FIG3[0:7:3], FIG3[:3])):
        series = [np.array([(T, found(scores, arm, 0.03, 3, T).mean()) for T in ROUNDS])
                  for arm in arms]  # (T, 2) each
        plot(fig3, panel * PANEL[0], series, "mean IoU over T in evaluation", low=57)
        for i, arm in enumerate(arms):
            fig3.text((panel * PANEL[0] + 240, 220 + 21 * i), arm[len(FULL):], COLOURS[i], FONT)
    for sheet, name in zip(sheets, ("fig4", "fig3")):
        sheet.save(HERE.parent.parent / f"assets/{name}.png")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--features", metavar="DIR", help="make the features of VOC at 320 pixels in this folder")
    add("--weights", metavar="FILE", help="ResNet-50's ImageNet weights, for --features")
    add("--part", type=int, choices=(0, 1), help="train this half of the runs")
    add("--only", metavar="NAME", help="train one run, into frozen_again.jsonl")
    add("--table", action="store_true", help="print the tables")
    add("--figures", action="store_true", help="draw Figs. 3 and 4")
    args, scores_of_runs = parser.parse_args(argv), read_scores()
    if args.features:
        make_features(args.features, args.weights)
    if args.only:
        train_runs([args.only], HERE / "frozen_again.jsonl")
    elif args.part is not None:
        train_runs([name for name in all_runs()[args.part::2] if name not in scores_of_runs], LOG)
    if args.table:
        for what in TABLES:
            print_table(what, scores_of_runs)
    if args.figures:
        draw_figures(scores_of_runs)


if __name__ == "__main__":
    run(main)
