"""Runs the experiments of this folder: train.py for every arm and seed, one line of results per run.

    python -m extras.evidence.run cells --jobs 2                # resumes: what has a line is not run again
    python -m extras.evidence.run cells --table                 # mean, deviation, paired difference, of what is there
    python -m extras.evidence.run camvid --data-root DIR
    python -m extras.evidence.run voc320 --data-root DIR --weights FILE --jobs 2

Writes EXPERIMENT.jsonl here; the networks and full logs go to out/evidence/EXPERIMENT-ARM-SEED (`--out` of train.py).
"""
import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from backbone import UserError
from data import build_dataset, within
from ema import EMAU, load_checkpoint
from evaluate import run
from extras.bases import mean_statistics
from extras.curves import read_log

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ARMS = {  # flags of train.py. Learned differently, or something else in the place of EMAU
    "none": "--attention none", "emau-none": "--gradient none", "emau-last": "--gradient last",
    "emau-full": "--gradient full",
    "a2": "--attention a2", "nonlocal": "--attention nonlocal"}
SWEEP = {f"{arm}-lam{lam}": f"{ARMS[arm]} --lam {lam}" for arm in ("emau-none", "emau-last", "emau-full")
         for lam in (4, 16)}
SIZES = {"K4": "--num-bases 4", "K16": "--num-bases 16", "T1": "--em-iterations 1", "T8": "--em-iterations 8"}
SIZES = {f"emau-full-{size}": f"--gradient full {flag}" for size, flag in SIZES.items()}
CELLS = "--iters 400 --eval-every 400 --workers 1"
CAMVID = ("--dataset folder --backbone resnet18 --weights none --output-stride 8 --channels 128 --crop 161 "
          "--batch-size 8 --lr 0.03 --iters 400 --eval-every 400 --workers 1")
# VOC's photographs at 320 pixels, with a pretrained backbone: README.md has the protocol.
VOC320 = ("--dataset voc --split train --backbone resnet50 --output-stride 16 --crop 257 --batch-size 8 --iters 900 "
          "--eval-every 900 --workers 1")
NINE = (0, 8, 9, 10, 12, 13, 15, 17, 18)            # its classes with at least 15 images for validation
EXPERIMENTS = {  # name: flags of all runs, {arm: its flags}, seeds
    "cells": ("--dataset cells " + CELLS, ARMS, 3),
    "cells-key": ("--dataset cells-key " + CELLS, ARMS, 3),
    "cells-sweep": ("--dataset cells " + CELLS, SWEEP, 2),
    "cells-key-sweep": ("--dataset cells-key " + CELLS, SWEEP, 2),
    "cells-sizes": ("--dataset cells " + CELLS, SIZES, 2),
    "cells-local": ("--dataset cells-local " + CELLS, {a: ARMS[a] for a in ("none", "emau-none", "emau-full")}, 1),
    "camvid": (CAMVID, ARMS, 2),
    "voc320-lr": (VOC320, {f"lr{lr}": f"--lr {lr} --attention none" for lr in (0.00225, 0.0045, 0.009)}, 1),
    "voc320": (VOC320 + " --lr 0.009", ARMS, 3)}


def lines(name):
    path = HERE / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def commit():
    """The code that runs, for the record."""
    return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True,
                          check=False).stdout.strip()


def command_of(name, arm, seed):
    flags, arms, _ = EXPERIMENTS[name]
    return " ".join(f"train.py {flags} {arms[arm]} --seed {seed}".split())


def result_of(name, arm, seed):
    """The line of a run, None if there is none with just these flags."""
    # The runs of CamVid had a --cache, which changed their speed alone; train.py has it no more.
    wanted = command_of(name, arm, seed)
    return next((line for line in lines(name) if line["command"].replace(" --cache", "") == wanted), None)


def voc320(data_root):
    """VOC2012 of `data_root` under the lists kept here, as a folder of links: train and val of the experiments."""
    source = within(Path(data_root or "datasets").resolve(), "VOCdevkit/VOC2012")
    base = ROOT / "out" / "evidence" / "voc320" / "VOCdevkit" / "VOC2012"
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / part).mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        ids = (HERE / f"voc320_{split}.txt").read_text()
        (base / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(ids)
        for i in ids.split():
            mask = source / "SegmentationClassAug" / f"{i}.png"
            link(base / "SegmentationClass" / f"{i}.png",
                 mask if mask.exists() else source / "SegmentationClass" / f"{i}.png")
            link(base / "JPEGImages" / f"{i}.jpg", source / "JPEGImages" / f"{i}.jpg")
    return str(base.parent.parent)


def link(path, target):
    if not target.exists():
        raise UserError(f"no {target}: the evidence needs a SegmentationClassAug/ folder with VOC")
    if not path.is_symlink() or path.readlink() != target:                     # others may be reading it
        path.unlink(missing_ok=True)
        path.symlink_to(target)


def train(name, arm, seed, data_root, weights):
    """One run of train.py, resumed if it was interrupted; its last validation becomes a line of NAME.jsonl. Returns
    whether it came through."""
    command = command_of(name, arm, seed)
    out = ROOT / "out" / "evidence" / f"{name}-{arm}-{seed}"
    where = ["--data-root", data_root] if data_root else []
    where += ["--weights", weights] if weights else []
    code = commit()
    begun = time.time()
    done = subprocess.run([sys.executable, *command.split(), *where, "--out", str(out), "--resume", "auto"], cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name} {arm} {seed} failed: {done.stderr.strip()[-500:]}", flush=True)
        return False
    headers, records = read_log(out / "log.jsonl")
    records = list(records.values())
    last = [r for r in records if "val_miou" in r][-1]
    line = {"arm": arm, "seed": seed, "command": command, "commit": code, "machine": headers[0]["machine"],
            "seconds": round(time.time() - begun), "loss": [round(r["loss"], 4) for r in records if "loss" in r][::5],
            "val_miou": round(last["val_miou"], 5), "val_pixacc": round(last["val_pixacc"], 5),
            **statistics_of_bases(out / "model.pth", data_root),
            **{key: [v and round(v, 5) for v in last[f"val_{key}"]] for key in ("acc", "iou")}}
    with open(HERE / f"{name}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{name} {arm} {seed}: {score(name, line):.2f}, {line['seconds']} s", flush=True)
    return True


def statistics_of_bases(path, data_root):
    """What the bases of a trained network do on the first images for validation; {} where it has none."""
    net = load_checkpoint(path)
    if not isinstance(net.attention, EMAU):
        return {}
    data = build_dataset(net.trained_on["dataset"], data_root or "datasets")
    return {f"bases_{key}": round(v, 5) for key, v in mean_statistics(net, data, torch.device("cpu")).items()}


def score(name, line):
    """What an experiment is judged by, in percent: accuracy on the striped cells, IoU of the nine classes, or mIoU."""
    if name.startswith("voc320"):
        return 100 * float(np.mean([line["iou"][c] for c in NINE]))
    return 50 * sum(line["acc"][:2]) if name.startswith("cells") else 100 * line["val_miou"]


def table(name):
    """Mean and deviation over the seeds; difference from the arm without attention, paired by seed, and its error."""
    _, arms, seeds = EXPERIMENTS[name]
    by_arm = {arm: {seed: r for seed in range(seeds) if (r := result_of(name, arm, seed))} for arm in arms}
    plain = name.removesuffix("-sweep").removesuffix("-sizes")                 # whose arm without attention they share
    base = {r["seed"]: score(name, r) for r in lines(plain) if r["arm"] == "none"}
    print(f"{name:18s}{'seeds':>6s}{'mean':>8s}{'sd':>6s}{'- none':>8s}{'se':>6s}{'|x|':>7s}{'perpl':>7s}{'used':>6s}"
          f"{'rank':>6s}")
    for arm, runs in by_arm.items():
        values = np.array([score(name, r) for r in runs.values()])
        row = f"{arm:18s}{len(values):6d}" if len(values) else f"{arm:18s}  not run"
        if len(values):
            row += f"{values.mean():8.2f}{values.std(ddof=1) if len(values) > 1 else np.nan:6.2f}"
            pairs = np.array([score(name, r) - base[s] for s, r in runs.items() if s in base])
            row += f"{pairs.mean():+8.2f}" if len(pairs) else " " * 8
            row += f"{pairs.std(ddof=1) / len(pairs) ** 0.5:6.2f}" if len(pairs) > 1 else " " * 6
            if "bases_rank" in next(iter(runs.values())):
                means = [np.mean([r[f"bases_{key}"] for r in runs.values()])
                         for key in ("length", "perplexity", "used", "rank")]
                row += f"{means[0]:7.1f}{means[1]:7.1f}{means[2]:6.0f}{means[3]:6.1f}"
        print(row)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=EXPERIMENTS)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, of one thread each (default: 1)")
    parser.add_argument("--data-root", help="folder of the data set, for camvid and voc320")
    parser.add_argument("--weights", help="file of ResNet-50's ImageNet weights, for voc320")
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    args = parser.parse_args(argv)
    done = []
    if not args.table:
        roots = {name: voc320(args.data_root) if name.startswith("voc320") else args.data_root
                 for name in args.experiments}
        with ThreadPoolExecutor(max(1, args.jobs)) as pool:                    # seed by seed, so that arms stay level
            waiting = [(name, arm, seed) for name in args.experiments for seed in range(EXPERIMENTS[name][2])
                       for arm in EXPERIMENTS[name][1]]
            futures = [pool.submit(train, *each, roots[each[0]], args.weights) for each in waiting
                       if not result_of(*each)]
            try:
                done = [future.result() for future in futures]
            except BaseException:                                              # Ctrl-C, or a fault of this script
                pool.shutdown(cancel_futures=True)
                raise
    for name in args.experiments:
        table(name)
    return 0 if all(done) else 1


if __name__ == "__main__":
    run(main)
