"""Looks at trained networks, without training: robustness to the input's variance, compactness of what attention gives,
and a picture of what the bases see in a photograph.

    python -m extras.evidence.look robustness --data-root DIR          # of the networks that run.py camvid has trained
    python -m extras.evidence.look compactness --data-root DIR
    python -m extras.evidence.look settings --data-root DIR            # of those that run.py voc320 has trained
    python -m extras.evidence.look robustness compactness --table      # print what is there, run nothing
    python -m extras.evidence.look photograph                          # with the networks of run.py voc320, seed 0

Writes robustness.jsonl, compactness.jsonl and settings.jsonl here, one line per network; resumes. The photograph:
assets/cat.png.

Shapes: N pixels of the feature map, C channels, K bases, L classes.
"""
import argparse
import io
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from data import IGNORE, build_dataset, normalise, overlay, palette_of, read_image
from ema import EMAU, load_checkpoint
from evaluate import confusion_matrix, evaluate, pad, pick_amp, predict, run, scores
from extras.evidence.run import HERE, NINE, ROOT, commit, lines, voc320
from visualize import at_image_size, choose_bases, grid, heat, responsibilities, shrink

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Robustness: mIoU on disturbed images. Each: (image uint8 (3, H, W), its number) -> image uint8 (3, H, W)
def noise(deviation):
    def disturb(image, i):
        grain = torch.randn(image.shape, generator=torch.Generator().manual_seed(i)) * deviation
        return (image + grain).round().clamp(0, 255).byte()
    return disturb


def brightness(factor):
    return lambda image, i: (image * factor).round().clamp(0, 255).byte()


def jpeg(image, i):
    buffer = io.BytesIO()
    to_pil_image(image).save(buffer, "JPEG", quality=10)
    return pil_to_tensor(Image.open(buffer))


DISTURBANCES = {"clean": lambda image, i: image, **{f"noise {d}": noise(d) for d in (8, 16, 32, 64)},
                "dark 0.7": brightness(0.7), "bright 1.3": brightness(1.3), "jpeg 10": jpeg}


class Disturbed(Dataset):
    def __init__(self, data, disturb):
        self.data, self.disturb, self.classes, self.ids = data, disturb, data.classes, data.ids

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        image, label = self.data[i]
        return self.disturb(image, i), label


def robustness(net, data):
    """{disturbance: mIoU}; and, of a network with EMAU, with its initial bases replaced by random ones."""
    amp = pick_amp("auto", CPU)
    mious = {name: evaluate(net, Disturbed(data, disturb), CPU, workers=0, amp=amp)["miou"]
             for name, disturb in DISTURBANCES.items()}
    if isinstance(net.attention, EMAU):
        net.attention.mu.copy_(random_bases(net))
        mious["random mu^(0)"] = evaluate(net, data, CPU, workers=0, amp=amp)["miou"]
    return mious


# ---------------------------------------------------------------------------------------------------------------------
# Compactness (Secs. 4.3, 6.5)
def random_bases(net):
    mu = torch.randn(net.attention.mu.shape, generator=torch.Generator().manual_seed(0))   # (1, C, K)
    return F.normalize(mu, dim=1)                                              # (1, C, K)


def scatter(x, label):
    """Within-class over total scatter of pixels x (N, C) with label (N,): 0 compact, 1 nothing to do with classes."""
    total = ((x - x.mean(0)) ** 2).sum()
    within = sum(((x[label == c] - x[label == c].mean(0)) ** 2).sum() for c in label.unique())
    return (within / total.clamp_min(1e-12)).item()


def mutual_information(a, b):
    """Normalised mutual information of two labellings (N,): I(a; b) / mean of their entropies, 0..1."""
    joint = np.histogram2d(a, b, bins=(np.arange(a.max() + 2), np.arange(b.max() + 2)))[0] / len(a)
    entropies = [-(p * np.log(p + 1e-30)).sum() for p in (joint.sum(1), joint.sum(0), joint)]
    return 2 * (entropies[0] + entropies[1] - entropies[2]) / (entropies[0] + entropies[1] + 1e-30)


@torch.no_grad()
def compactness(net, data, rounds=8):
    """Means over the images: scatter of x, of its best approximation of rank K (PCA), of X~ and of the unit's output;
    agreement of argmax Z with the labels. X~ and Z after t = 1..rounds, for learned and for random mu^(0)."""
    if not isinstance(net.attention, EMAU):
        return None
    unit, own, T = net.attention, net.attention.mu.clone(), net.attention.iterations
    sums = {}

    def add(key, value):
        sums[key] = sums.get(key, 0) + value / len(data)

    for i in range(len(data)):
        image, label = data[i]
        features = net.features(pad(normalise(image[None]), 8))                # (1, C, h, w)
        label = label[::8, ::8]                                                # (h', w') where the features lie, less
        grid = torch.arange(features[0, 0].numel()).view(features.shape[2:])   # those that see padding alone
        at = grid[:label.shape[0], :label.shape[1]][label != IGNORE]           # (M,)   the pixels that have a label
        label = label[label != IGNORE]                                         # (M,)
        x = unit.pixels(features)                                              # (1, N, C)
        add("x", scatter(x[0, at], label))
        u, s, v = torch.linalg.svd(x[0] - x[0].mean(0), full_matrices=False)   # (N, C), (C,), (C, C)
        s[unit.mu.shape[2]:] = 0
        add("PCA", scatter((u * s @ v)[at], label))
        for kind, mu in (("learned", own), ("random", random_bases(net))):
            unit.mu.copy_(mu)
            unit.iterations = T
            add(f"{kind} output", scatter(unit(features)[0].flatten(1).T[at], label))
            unit.iterations = rounds
            for t, (z, bases) in enumerate(unit.em(x), 1):                     # (1, N, K), (1, C, K)
                add(f"{kind} X~ {t}", scatter((z @ bases.transpose(1, 2))[0, at], label))
                add(f"{kind} NMI {t}", mutual_information(z[0, at].argmax(1).numpy(), label.numpy()))
        unit.mu.copy_(own)
    return {key: round(value, 5) for key, value in sums.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Fig. 4 and Sec. 6.1: other settings in evaluation than in training
@torch.no_grad()
def settings(net, data):
    """{setting: mean IoU of the nine classes}: at output stride 16, as in training, and at 8, there with T = 1..16
    rounds of EM, if there are any. The backbone runs once for all T."""
    L, values = len(data.classes), {}
    for stride in (16, 8):
        net.set_output_stride(stride)
        rounds = (1, 2, 3, 4, 8, 16) if stride == 8 and isinstance(net.attention, EMAU) else (0,)
        confusions = dict.fromkeys(rounds, 0)
        for i in range(len(data)):
            image, label = data[i]
            features = net.features(pad(normalise(image[None]), stride))       # (1, C, h, w)
            for T in rounds:
                if T:
                    net.attention.iterations = T
                logits = at_image_size(net.head(features), label.shape, stride)        # (1, L, H, W)
                confusions[T] = confusions[T] + confusion_matrix(logits[0].max(0)[1], label, L)
        for T, confusion in confusions.items():
            iou = scores(confusion)["iou"]
            values[f"stride {stride}" + f", T = {T}" * (T > 0)] = float(np.mean([iou[c] for c in NINE]))
    return values


# ---------------------------------------------------------------------------------------------------------------------
def photograph(plain, net, path):
    """Draws chelsea.png: its prediction by a network without attention and by one with EMAU, and the responsibilities
    of the three bases that hold the most pixels, round by round (Fig. 5)."""
    image = shrink(read_image(HERE / "chelsea.png"), 320)                      # (3, H, W)   as large as those of VOC320
    row = [(to_pil_image(image), "photograph")]
    for network, caption in ((plain, "prediction without attention"), (net, "prediction with EMAU")):
        label = predict(network, image).argmax(0).byte()                       # (H, W)
        row.append((overlay(image, label, palette_of(network.trained_on["classes"])), caption))
    z = responsibilities(net, image)                                           # (T, K, h, w)
    bases = choose_bases(None, z)[:3]
    maps = at_image_size(z[:, bases], image.shape[1:], net.config["output_stride"])    # (T, 3, H, W)
    rows = [[(heat(m, maps[:, n].max().item()), f"basis {k}, round {t}") for t, m in enumerate(maps[:, n], 1)]
            for n, k in enumerate(bases)]
    grid([row, *rows]).save(path)


# ---------------------------------------------------------------------------------------------------------------------
JSONL = {"robustness": robustness, "compactness": compactness, "settings": settings}


def table(name):
    """Means over the seeds of each arm; robustness: also relative to clean, and the paired difference from `none`."""
    done = lines(name)
    if not done:
        return print(f"{name}: not run")
    arms = sorted({line["arm"] for line in done}, key=lambda arm: (arm != "none", arm))
    heads = [f"{arm} ({sum(line['arm'] == arm for line in done)})" for arm in arms]
    print(f"{name:18s}" + "".join(f"{head:>22s}" for head in heads))
    for key in dict.fromkeys(key for line in done for key in line["values"]):
        row = f"{key:18s}"
        for arm in arms:
            runs = {r["seed"]: r["values"] for r in done if r["arm"] == arm and key in r["values"]}
            values = np.array([r[key] for r in runs.values()])
            if not len(values):
                row += f"{'-':>22s}"
            elif name == "settings":
                row += f"{100 * values.mean():22.2f}"
            elif name == "compactness":
                row += f"{values.mean():15.3f} +-{values.std(ddof=1):5.3f}"
            else:
                kept = {seed: r[key] / r["clean"] for seed, r in runs.items()}
                base = {r["seed"]: r["values"][key] / r["values"]["clean"] for r in done
                        if r["arm"] == "none" and key in r["values"]}
                pairs = [100 * (kept[s] - base[s]) for s in kept if s in base]
                error = f"{np.std(pairs, ddof=1) / len(pairs) ** 0.5:4.1f}" if len(pairs) > 1 else ""
                row += f"{100 * values.mean():8.2f} {100 * np.mean(list(kept.values())):4.0f}%" \
                       + (f"{np.mean(pairs):+5.1f}+-{error}" if pairs and arm != "none" else " " * 9)
        print(row)
    return None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=(*JSONL, "photograph"))
    parser.add_argument("--runs", type=Path, default=ROOT / "out" / "evidence", help="where run.py trains")
    parser.add_argument("--arms", nargs="+", default=["none", "emau-none", "emau-last", "emau-full"],
                        help="of which runs")
    parser.add_argument("--data-root", default="datasets", help="folder of the images (default: datasets)")
    parser.add_argument("--table", action="store_true", help="print what is there")
    args = parser.parse_args(argv)
    for what in args.what:
        if what == "photograph":
            if not args.table:
                nets = (load_checkpoint(args.runs / f"voc320-{arm}-0" / "model.pth") for arm in ("none", "emau-none"))
                photograph(*nets, ROOT / "assets" / "cat.png")
            continue
        path, experiment = HERE / f"{what}.jsonl", "voc320" if what == "settings" else "camvid"
        done = [line["network"] for line in lines(what)]
        for checkpoint in [] if args.table else sorted(args.runs.glob(f"{experiment}-*/model.pth")):
            network = checkpoint.parent.name
            arm, seed = network.removeprefix(f"{experiment}-").rsplit("-", 1)
            if network in done or arm not in args.arms:
                continue
            data = build_dataset("folder", args.data_root, "val") if experiment == "camvid" \
                else build_dataset("voc", voc320(args.data_root), "val")
            values = JSONL[what](load_checkpoint(checkpoint), data)
            if values:
                with open(path, "a") as file:
                    file.write(json.dumps({"network": network, "arm": arm, "seed": int(seed), "commit": commit(),
                                           "values": values}) + "\n")
                print(f"{what} {network}: done", flush=True)
        table(what)


if __name__ == "__main__":
    run(main)
