"""Evaluates a checkpoint by the paper's protocol: whole images, output stride 8, mIoU over one confusion matrix.

    python evaluate.py --ckpt out/voc/model.pth                        # single scale
    python evaluate.py --ckpt out/voc/model.pth --ms-flip              # six scales, each with its mirror image
    torchrun --nproc_per_node=4 evaluate.py --ckpt out/voc/model.pth   # every image still counts exactly once

Shapes: H x W pixels of one image, L classes.
"""
import argparse
import math
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # before torch: threads that spin starve the loader's workers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader

from data import DATASETS, build_dataset, normalise, palette_of, pick_device, run, save_index_png
from ema import UserError, load_checkpoint

MS_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)           # of two forks of the released code, which itself has none


# ---------------------------------------------------------------------------------------------------------------------
# Inference and the metric
def predict(net, image, ms_flip=False):
    """Logits of one whole image: uint8 (3, H, W) on the network's device -> float (L, H, W).

    With ms_flip the sum of the logits over MS_SCALES and both mirrorings.
    """
    size = image.shape[1:]
    image = normalise(image[None])                                             # (1, 3, H, W)
    total = 0
    for scale in MS_SCALES if ms_flip else (1.0,):
        h, w = (int(side * scale) for side in size)
        view = F.interpolate(image, (h, w), mode="bilinear", align_corners=True) if scale != 1 else image
        if ms_flip:
            view = torch.cat([view, view.flip(3)])                             # (2, 3, h, w)  image and its mirror
        # Padding to 8k + 1 pixels lets align_corners put every feature on a pixel. It takes part in EM, as released.
        view = F.pad(view, (0, -(w - 1) % 8, 0, -(h - 1) % 8))                 # (1 or 2, 3, 8k+1, 8l+1)
        logits = net(view)[:, :, :h, :w]                                       # (1 or 2, L, h, w)
        if scale != 1:
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=True)      # (1 or 2, L, H, W)
        total = total + (logits[0] + logits[1].flip(2) if ms_flip else logits[0])          # (L, H, W)
    return total


def confusion_matrix(prediction, label, num_classes):
    """Counts int64 (L, L): rows the label's class, columns the predicted one. Label 255 does not count."""
    # Ignored pixels are counted too, in rows L..255, and cut off: cheaper than picking the others out by a mask.
    cells = label.flatten().long() * num_classes + prediction.flatten()        # (H * W,)
    return torch.bincount(cells, minlength=256 * num_classes)[:num_classes ** 2].view(num_classes, num_classes)


def scores(confusion):
    """mIoU, pixel accuracy, mean accuracy (0..1) and IoU per class (L,) of a confusion matrix (L, L).

    A class that occurs neither in the labels nor in the predictions has IoU nan and does not count in the mean.
    """
    confusion = confusion.double().cpu()
    hits, labelled, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)       # (L,) each
    iou = hits / (labelled + predicted - hits)                                             # (L,)
    return {"miou": iou.nanmean().item(), "pixacc": (hits.sum() / labelled.sum()).item(),
            "macc": (hits / labelled).nanmean().item(), "iou": iou.tolist()}


@torch.no_grad()
def evaluate(net, data, device, ms_flip=False, rank=0, world=1, workers=2, save_png=None, progress=False):
    """Scores a network on a whole data set: the dict of `scores` and `images`, `seconds`. Leaves `net` in eval mode.

    Of `world` processes each takes every world-th image; the matrices are summed, so each image counts exactly once.
    save_png: a folder for the predictions as index PNGs of the original size.
    """
    net.eval()
    mine, start = range(rank, len(data), world), time.time()
    confusion = torch.zeros(len(data.classes), len(data.classes), dtype=torch.int64, device=device)
    loader = DataLoader(data, batch_size=None, sampler=mine, num_workers=min(workers, len(mine)),
                        pin_memory=device.type == "cuda")
    reported = start
    for done, (i, (image, label)) in enumerate(zip(mine, loader, strict=True), 1):
        image, label = image.to(device, non_blocking=True), label.to(device, non_blocking=True)
        prediction = predict(net, image, ms_flip).max(0)[1]                    # (H, W)  max is faster than argmax
        confusion += confusion_matrix(prediction, label, len(data.classes))
        if save_png:
            save_index_png(prediction.cpu().numpy(), Path(save_png) / f"{data.ids[i]}.png", palette_of(data.classes))
        if progress and time.time() - reported > 5:
            reported = time.time()
            rate = done / (reported - start)
            print(f"  {done * world}/{len(data)} images | {rate * world:.1f} img/s | "
                  f"eta {duration((len(mine) - done) / rate)}", flush=True)
    seen = torch.tensor(len(mine), device=device)
    if world > 1:
        dist.all_reduce(confusion)
        dist.all_reduce(seen)
    assert seen == len(data), f"{seen} images evaluated, {len(data)} in the data set"
    return {**scores(confusion), "images": len(data), "seconds": time.time() - start}


def summary(data, result, ms_flip=False):
    """The line that ends every evaluation. Percentages."""
    return (f"eval {data.name} {data.split} {'ms-flip' if ms_flip else 'ss'} | mIoU {100 * result['miou']:.2f} | "
            f"pixAcc {100 * result['pixacc']:.2f} | mAcc {100 * result['macc']:.2f} | {result['images']} images | "
            f"{result['seconds']:.0f} s")


def duration(seconds):
    """3h18m, 4m05s or 12s."""
    m, s = divmod(round(seconds), 60)
    return f"{m // 60}h{m % 60:02d}m" if m >= 60 else f"{m}m{s:02d}s" if m else f"{s}s"


def init_distributed(device_name):
    """rank, world size and device of this process: of torchrun's group, which is joined here, or of a lone process."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, pick_device(device_name)
    rank, world, local = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = pick_device(device_name)
    if device.type == "cuda":
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


# ---------------------------------------------------------------------------------------------------------------------
def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="checkpoint: model.pth of train.py, or a released one")
    parser.add_argument("--dataset", choices=DATASETS, help="data set (default: the one the checkpoint was trained on)")
    parser.add_argument("--data-root", default="datasets", help="folder that holds the data set (default: datasets)")
    parser.add_argument("--split", default="val", help="list of images to evaluate (default: val)")
    parser.add_argument("--ms-flip", action="store_true", help="six scales and their mirror images (paper: MS + Flip)")
    parser.add_argument("--output-stride", type=int, help="8, 16 or 32 (default: the checkpoint's, 8 in the paper)")
    parser.add_argument("--save-png", metavar="DIR", help="write the predictions there as index PNGs, original size")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode ahead (default: 2)")
    parser.add_argument("--device", default="auto", help="auto (cuda, then mps, then cpu) or a torch device")
    return parser.parse_args()


def open_dataset(args, net):
    """The data set of the command line, or else of the checkpoint; UserError where the two do not fit together."""
    name = args.dataset or net.data.get("dataset")
    if name is None:
        raise UserError(f"{args.ckpt} does not say what it was trained on: add --dataset, e.g. --dataset voc")
    data = build_dataset(name, args.data_root, args.split)
    if len(data.classes) != net.config["num_classes"]:
        raise UserError(f"{args.ckpt} has {net.config['num_classes']} classes, {name} has {len(data.classes)}: "
                        "they cannot be compared")
    return data


def main():
    args = parse_args()
    net = load_checkpoint(args.ckpt)
    if args.output_stride:
        net.set_output_stride(args.output_stride)
    data = open_dataset(args, net)
    if not (data.labelled or args.save_png):
        raise UserError(f"{data.name} {data.split} has no labels to score by: --save-png DIR writes the predictions")
    if args.save_png:
        Path(args.save_png).mkdir(parents=True, exist_ok=True)
    rank, world, device = init_distributed(args.device)
    net.to(device, memory_format=torch.channels_last)
    if rank == 0:
        print(f"{args.ckpt} | {net.config['backbone']}, output stride {net.config['output_stride']} | {data.name} "
              f"{data.split}, {len(data)} images | {world} x {device}, torch {torch.__version__}", flush=True)
    result = evaluate(net, data, device, args.ms_flip, rank, world, args.workers, args.save_png, progress=rank == 0)
    if rank == 0 and data.labelled:
        for name, iou in zip(data.classes, result["iou"], strict=True):
            print(f"  {name:20s} " + ("     -  (does not occur)" if math.isnan(iou) else f"{100 * iou:6.2f}"))
        print(summary(data, result, args.ms_flip))
    elif rank == 0:
        print(f"wrote {len(data)} predictions to {args.save_png} (no labels to score them by)")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
