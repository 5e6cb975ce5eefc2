"""Evaluates a checkpoint by the paper's protocol: whole images, output stride 8, mIoU over one confusion matrix.

    python evaluate.py --ckpt out/voc/model.pth                        # single scale
    python evaluate.py --ckpt out/voc/model.pth --ms-flip              # six scales, each with its mirror image
    torchrun --nproc_per_node=4 evaluate.py --ckpt out/voc/model.pth   # every image still counts exactly once

Also here: what the scripts share about processes and devices. Shapes: H x W pixels of one image, L classes.
"""
import argparse
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # before torch: threads that spin starve the loader's workers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader

from backbone import UserError, brief
from data import DATASETS, build_dataset, normalise, palette_of, save_index_png
from ema import EMAU, load_checkpoint

TIMEOUT = 600                                           # seconds until a process or worker that hangs ends the job
MS_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)           # two forks' of the released code, which itself has none


# ---- Prediction
@torch.no_grad()
def predict(net, image, ms_flip=False, amp=None):
    """Logits of one whole image, by a network in eval mode on the same device: uint8 (3, H, W) -> float (L, H, W).

    With ms_flip the sum of the logits over MS_SCALES and both mirrorings. amp: None or the dtype of autocast.
    """
    size, total = image.shape[1:], 0
    image = normalise(image[None])  # (1, 3, H, W)
    for scale in MS_SCALES if ms_flip else (1.0,):
        h, w = (max(1, int(side * scale)) for side in size)
        view = F.interpolate(image, (h, w), mode="bilinear", align_corners=True)  # (1, 3, h, w)
        if ms_flip:
            view = torch.cat([view, view.flip(3)])  # (2, 3, h, w)  the mirror image
        view = pad(view, net.config["output_stride"])  # (1 or 2, 3, h', w')
        with torch.autocast(view.device.type, amp, enabled=amp is not None):
            logits = net(view)[:, :, :h, :w]  # (1 or 2, L, h, w)
        if ms_flip:
            logits = logits[:1] + logits[1:].flip(3)  # (1, L, h, w)
        total = total + F.interpolate(logits, size, mode="bilinear", align_corners=True)  # (1, L, H, W)
    return total[0]  # (L, H, W)


def pad(images, stride):
    """Zeros at the right and bottom, up to a multiple of the output stride plus 1, so that align_corners puts every
    feature on a pixel: (B, 3, H, W) -> (B, 3, H', W'). The padding takes part in EM, as in the released code."""
    below, right = ((1 - side) % stride for side in images.shape[2:])
    return F.pad(images, (0, right, 0, below))  # (B, 3, H', W')


# ---- The metric
def confusion_matrix(prediction, label, num_classes):
    """Counts int64 (L, L): rows the label's class, columns the predicted one. Label 255 does not count."""
    # 256 rows are counted, so that label 255 has one; the first L are kept.
    cells = label.flatten().long() * num_classes + prediction.flatten()  # (H * W,)
    return torch.bincount(cells, minlength=256 * num_classes)[:num_classes ** 2].view(num_classes, num_classes)


def scores(confusion):
    """mIoU, pixel accuracy, mean accuracy (0..1), IoU and accuracy per class (L,) of a confusion matrix (L, L).

    A class that occurs neither in the labels nor in the predictions has IoU None and does not count in the mean.
    """
    def numbers(values):                                         # JSON has no nan
        return [None if math.isnan(value) else value for value in values.tolist()]

    confusion = confusion.cpu().double()
    hits, labelled, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)  # (L,) each
    iou = hits / (labelled + predicted - hits)  # (L,)
    return {"miou": iou.nanmean().item(), "pixacc": (hits.sum() / labelled.sum()).item(),
            "macc": (hits / labelled).nanmean().item(), "iou": numbers(iou), "acc": numbers(hits / labelled)}


@torch.no_grad()
def evaluate(net, data, device, *, ms_flip=False, amp=None, workers=2, save_png=None):
    """Scores a network on a whole data set: the dict of `scores`, with `images` and `seconds`. Leaves it in eval mode.

    Of several processes each takes every world-th image; the matrices are summed, so each image counts exactly once.
    save_png: a folder for the predictions as index PNGs of the original size.
    """
    net.eval()
    torch.backends.cudnn.benchmark = False                                     # images are of many sizes
    rank, world = rank_and_world()
    my_indices = range(rank, len(data), world)
    loader = make_loader(data, device, min(workers, len(my_indices)), batch_size=None, sampler=my_indices)
    L, palette = len(data.classes), palette_of(data.classes)
    confusion = torch.zeros(L, L, dtype=torch.int64, device=device)
    start = reported = time.time()
    for i, (image, label) in zip(my_indices, loader, strict=True):
        logits = predict(net, image.to(device), ms_flip, amp)  # (L, H, W)
        prediction = logits.max(0)[1]  # (H, W)  max is faster than argmax
        confusion += confusion_matrix(prediction, label.to(device), L)
        if save_png:
            save_index_png(prediction.cpu().numpy(), Path(save_png) / f"{data.ids[i]}.png", palette)
        if time.time() - reported > 5:
            reported = time.time()
            left = timedelta(seconds=int((reported - start) / (i + 1) * (len(data) - i - 1)))      # if all are as fast
            print_on_rank0(f"  {i + 1}/{len(data)} images | eta {left}")
    if world > 1:
        dist.all_reduce(confusion)
    return {**scores(confusion), "images": len(data), "seconds": time.time() - start}


def summary(data, result, ms_flip=False):
    """The line that ends every evaluation. Percentages."""
    return (f"eval {data.name} {data.split} {'ms-flip' if ms_flip else 'ss'} | mIoU {100 * result['miou']:.2f} | "
            f"pixAcc {100 * result['pixacc']:.2f} | mAcc {100 * result['macc']:.2f} | {result['images']} images | "
            f"{result['seconds']:.0f} s")


# ---- The script
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, help="model.pth of train.py, or a released checkpoint")
    add("--dataset", choices=DATASETS, help="data set (default: the one the checkpoint was trained on)")
    add("--data-root", default="datasets", help="folder that holds the data set (default: datasets)")
    add("--split", help="list of images to evaluate (default: the data set's for validation)")
    add("--ms-flip", action="store_true", help="six scales and their mirror images (paper: MS + Flip)")
    add("--output-stride", type=int, choices=(8, 16, 32), help="(default: the checkpoint's, 8 in the paper)")
    add("--em-iterations", type=int, metavar="T", help="number of EM rounds (default: the checkpoint's)")
    add("--save-png", metavar="DIR", help="write the predictions there as index PNGs, original size")
    add("--amp", choices=("auto", "bf16", "off"), default="off", help="bfloat16 autocast: faster, mIoU moves in the "
        "second decimal (default: off, float32; convolutions on a GPU in its TF32)")
    add("--workers", type=int, default=2, help="processes that decode ahead (default: 2)")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu) or a torch device")
    args = parser.parse_args(argv)
    if args.workers < 0 or args.em_iterations is not None and args.em_iterations < 1:
        raise UserError("--workers must be at least 0, --em-iterations at least 1")
    return args


def open_dataset(args, net):
    """The data set of the command line, or else of the checkpoint; UserError where the two do not fit together."""
    name, num_classes = args.dataset or net.trained_on.get("dataset"), net.config["num_classes"]
    if name not in DATASETS:
        raise UserError("the checkpoint does not say what it was trained on: add --dataset, e.g. --dataset voc")
    data = build_dataset(name, args.data_root, args.split, context_classes=num_classes)    # 59 or 60, for Context alone
    if len(data.classes) != num_classes:
        raise UserError(f"the checkpoint has {num_classes} classes, {name} has {len(data.classes)}: no comparison")
    if net.trained_on.get("classes", data.classes) != data.classes:
        raise UserError(f"the checkpoint's classes have other names, or another order, than those of {name} in "
                        f"{args.data_root}: scores would mean nothing")
    return data


def main(argv=None):
    args = parse_args(argv)
    net = load_checkpoint(args.ckpt)
    if args.output_stride:
        net.set_output_stride(args.output_stride)
    if args.em_iterations:
        if not isinstance(net.attention, EMAU):
            raise UserError(f"--em-iterations: {args.ckpt} has attention {net.config['attention']}, without EM rounds")
        net.attention.iterations = args.em_iterations
    data = open_dataset(args, net)
    if not (data.labelled or args.save_png):
        raise UserError(f"{data.name} {data.split} has no labels to score by: --save-png DIR writes the predictions")
    if args.save_png:
        Path(args.save_png).mkdir(parents=True, exist_ok=True)
    device = init_process(args.device)
    net.to(device, memory_format=layout(device))
    print_on_rank0(f"{args.ckpt} | {net.config['backbone']}, output stride {net.config['output_stride']} | {data.name} "
                   f"{data.split}, {len(data)} images | {rank_and_world()[1]} x {device}, torch {torch.__version__}")
    result = evaluate(net, data, device, ms_flip=args.ms_flip, amp=pick_amp(args.amp, device), workers=args.workers,
                      save_png=args.save_png)
    if data.labelled:
        for name, iou in zip(data.classes, result["iou"], strict=True):
            print_on_rank0(f"  {name:20s} " + ("     -  (does not occur)" if iou is None else f"{100 * iou:6.2f}"))
        print_on_rank0(summary(data, result, args.ms_flip))
    else:
        print_on_rank0(f"wrote {len(data)} predictions to {args.save_png} (no labels to score them by)")


# ---- Processes and devices, for all scripts (skip at first reading)
def init_process(device_name):
    """The device of this process. Under torchrun it joins the group of processes."""
    device = pick_device(device_name)
    if "WORLD_SIZE" not in os.environ:
        return device
    if device.type == "mps":
        raise UserError("several processes cannot share mps: use --device cpu, or one process")
    if device.type == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device.index is not None:
            raise UserError(f"--device {device_name}: each process of torchrun takes its own GPU, --device cuda")
        if local >= count and (count > 1 or "CUDA_VISIBLE_DEVICES" not in os.environ):       # one each, perhaps
            raise UserError(f"there are {count} GPUs: torchrun --nproc_per_node={count} at most")
        device = torch.device("cuda", local % count)
        torch.cuda.set_device(device)
    # gloo beside nccl: the processes agree on when to stop without waiting for the GPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # After torchrun's --max-restarts the store still holds the addresses of those that died: a prefix for each start
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=TIMEOUT)))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT))
    return device


def rank_and_world():
    """The number of this process, and how many there are: 0, 1 without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def print_on_rank0(text):
    if rank_and_world()[0] == 0:
        print(text, flush=True)


def pick_device(name="auto"):
    """torch.device for "auto" (cuda, then mps, then cpu) or a name. UserError if it is not there."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name not in ("auto", *there, *(f"cuda:{i}" for i in range(torch.cuda.device_count()))):
        raise UserError(f"--device {name}: torch sees {', '.join(there)} here")
    return torch.device(there[0] if name == "auto" else name)


def pick_amp(choice, device):
    """The dtype of autocast, or None. auto: bfloat16 where it is fast. It needs no gradient scaler, unlike float16."""
    if choice == "auto" and device.type == "cuda":
        choice = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "off"
    if choice == "auto" and device.type == "cpu":
        choice = "bf16" if torch.cpu._is_avx512_bf16_supported() else "off"
    return torch.bfloat16 if choice == "bf16" else None


def layout(device):
    """The layout convolutions are fast in."""
    # On mps the backward pass of BN is wrong, or fails, in channels_last (pytorch issues 134580, 175189).
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def make_loader(data, device, workers, **sampling):
    # Python 3.14's server of workers would die by a SIGTERM to the group, and they with it: fork, as before.
    context = "fork" if workers and sys.platform == "linux" else None
    return DataLoader(data, num_workers=workers, pin_memory=device.type == "cuda", worker_init_fn=ignore_group_signals,
                      timeout=TIMEOUT if workers else 0, multiprocessing_context=context, **sampling)


def ignore_group_signals(worker_id):
    """Keeps Ctrl-C and torchrun's SIGTERM from a worker: the run still needs it to finish the step."""
    os.setpgrp()


def run(main):
    """Runs a script's main, which may return the exit status. A mistake the user can correct becomes one line."""
    try:
        status = main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: the GPU's memory ran out ({brief(error)}): see README, Memory runs out")
    if dist.is_initialized():
        dist.barrier()                                   # torch 2.10's gloo can hang when a process leaves early
        dist.destroy_process_group()
    sys.exit(status)


if __name__ == "__main__":
    run(main)
