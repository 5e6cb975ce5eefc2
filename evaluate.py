"""Evaluates a checkpoint as the paper does: whole images, output stride 8, mIoU.

    python evaluate.py --ckpt out/voc/model.pth                        # single scale
    python evaluate.py --ckpt out/voc/model.pth --ms-flip              # six scales, mirrored too
    torchrun --nproc_per_node=4 evaluate.py --ckpt out/voc/model.pth   # on four GPUs

Shapes: H x W pixels of an image, L classes.
"""
import argparse
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader

from data import DATASETS, IGNORE, build_dataset, normalise, save_index_png
from ema import load_checkpoint

TIMEOUT = 600                     # seconds until a hanging process or worker ends the job
MS_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


# ---- Prediction
@torch.no_grad()
def predict(net, image, ms_flip=False, amp=None):
    """Logits (L, H, W) of an image uint8 (3, H, W), by a network in eval mode.

    ms_flip: sum the logits over MS_SCALES and mirror images.
    amp: the dtype of autocast, or None.
    """
    size = image.shape[1:]
    scales = MS_SCALES if ms_flip else (1.0,)
    total = 0
    image = normalise(image[None])  # (1, 3, H, W)
    for scale in scales:
        height, width = (max(1, int(side * scale)) for side in size)
        view = F.interpolate(
            image, (height, width), mode="bilinear", align_corners=True)  # (1, 3, height, width)
        if ms_flip:
            view = torch.cat([view, view.flip(3)])  # (2, 3, height, width)
        with torch.autocast(view.device.type, amp, enabled=amp is not None):
            logits = net(pad(view, net.output_stride))
            logits = logits[:, :, :height, :width]  # (1 or 2, L, height, width)
        if ms_flip:
            logits = logits[:1] + logits[1:].flip(3)  # (1, L, height, width)
        total += F.interpolate(logits, size, mode="bilinear", align_corners=True)  # (1, L, H, W)
    return total[0]  # (L, H, W)


def pad(images, stride):
    """Pads images (B, 3, H, W) with zeros at the right and bottom, up to a multiple of the stride
    plus 1, such as 513. With align_corners every feature then lies on a pixel."""
    below, right = ((1 - side) % stride for side in images.shape[2:])
    return F.pad(images, (0, right, 0, below))  # (B, 3, H', W')


# ---- The metric
def confusion_matrix(prediction, label, num_classes):
    """Counts int64 (L, L) of prediction and label (H, W): rows are the label's class, columns the
    predicted one. Label 255 is ignored."""
    keep = label != IGNORE
    pairs = label[keep].long() * num_classes + prediction[keep]  # (labelled pixels,)
    return torch.bincount(pairs, minlength=num_classes ** 2).view(num_classes, num_classes)


def none_if_nan(value):
    return None if value.isnan() else value.item()          # JSON has no nan


def scores(confusion):
    """mIoU, pixel accuracy, mean accuracy and the IoU of each class, 0..1, of a confusion matrix.
    The IoU of a class that is neither labelled nor predicted is None, and does not count."""
    confusion = confusion.cpu().double()
    hits = confusion.diag()  # (L,)
    labelled = confusion.sum(1)  # (L,)
    predicted = confusion.sum(0)  # (L,)
    iou = hits / (labelled + predicted - hits)  # (L,)
    return {"miou": none_if_nan(iou.nanmean()),
            "pixacc": none_if_nan(hits.sum() / labelled.sum()),
            "macc": none_if_nan((hits / labelled).nanmean()),
            "iou": [none_if_nan(value) for value in iou]}


def evaluate(net, data, device, *, ms_flip=False, amp=None, workers=2, save_png=None):
    """The scores of a network on a whole data set. save_png: a folder for the predictions, as index
    PNGs of the original size."""
    net.eval()
    torch.backends.cudnn.benchmark = False                  # images are of many sizes
    start = time.time()
    # Every world-th image. DistributedSampler would count some twice.
    rank, world = rank_and_world()
    mine = range(rank, len(data), world)
    loader = make_loader(data, device, workers, batch_size=None, sampler=mine)
    L = len(data.classes)
    confusion = torch.zeros(L, L, dtype=torch.int64, device=device)
    for i, (image, label) in zip(mine, loader):
        logits = predict(net, image.to(device), ms_flip, amp)  # (L, H, W)
        _, prediction = logits.max(0)  # (H, W)  faster than argmax on CPUs
        confusion += confusion_matrix(prediction, label.to(device), L)
        if save_png:
            save_index_png(prediction.cpu(), f"{save_png}/{data.ids[i]}.png", data.classes)
        if i > 0 and i % (100 * world) == 0:
            print_on_rank0(f"  {i}/{len(data)}")
    if world > 1:
        dist.all_reduce(confusion)
    return scores(confusion) | {"seconds": time.time() - start}


def summary(data, result, ms_flip=False):
    """A line about an evaluation."""
    mode = "ms-flip" if ms_flip else "ss"
    L = len(data.classes)
    occurring = L - result["iou"].count(None)
    if occurring == 0:
        return f"eval {data.name} {data.split} {mode} | no pixel has a label"
    note = f" ({occurring} of {L} classes occur)" if occurring < L else ""
    return (f"eval {data.name} {data.split} {mode} | mIoU {100 * result['miou']:.2f}{note} | "
            f"pixAcc {100 * result['pixacc']:.2f} | mAcc {100 * result['macc']:.2f} | "
            f"{len(data)} images | {result['seconds']:.0f} s")


# ---- The script
def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage="evaluate.py --ckpt FILE [flags, see --help]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, help="model.pth of train.py, or a released checkpoint")
    add("--dataset", choices=DATASETS, help="default: what it was trained on")
    add("--data-root", default="datasets", help="default: datasets")
    add("--split", help="default: the validation list")
    add("--ms-flip", action="store_true", help="six scales and mirror images")
    add("--output-stride", type=int, choices=(8, 16), default=8, help="default: 8")
    add("--save-png", help="new folder for the predictions")
    add("--amp", choices=("auto", "bf16", "off"), default="off", help="default: off")
    add("--workers", type=int, default=2, help="for each process, default: 2")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    net = load_checkpoint(args.ckpt)
    data = open_dataset(args, net)
    if args.save_png:
        new_folder(args.save_png)
    device = init_process(args.device)
    net.set_output_stride(args.output_stride)
    net.to(device, memory_format=torch.channels_last)
    result = evaluate(net, data, device, ms_flip=args.ms_flip, amp=pick_amp(args.amp, device),
                      workers=args.workers, save_png=args.save_png)
    for name, iou in zip(data.classes, result["iou"]):
        if iou is not None:
            print_on_rank0(f"  {name:20s} {100 * iou:6.2f}")
    print_on_rank0(summary(data, result, args.ms_flip))


def open_dataset(args, net):
    """The data set of --dataset or the network."""
    data = build_dataset(args.dataset or net.dataset, args.data_root, args.split)
    if data.classes != net.classes:
        sys.exit(f"error: {args.ckpt} has other classes than {data.name}, or another order")
    return data


# ---- What a first reading may skip: processes and devices
def positive(text):
    if int(text) < 1:
        raise ValueError                                    # argparse turns it into a message
    return int(text)


def new_folder(path, advice="choose another folder"):
    """Makes a folder for results. FileExistsError if it is not empty."""
    os.makedirs(path, exist_ok=True)
    if os.listdir(path):
        raise FileExistsError(f"{path} is not empty: {advice}")


def init_process(choice):
    """The device of this process. Under torchrun, which sets LOCAL_RANK, it joins the others and
    gets a GPU of its own."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count()
    device = torch.device("cpu")
    if choice == "cuda" or (choice == "auto" and gpus > 0):
        if local_rank >= gpus:
            sys.exit(f"error: torch sees {gpus} GPUs, and each process needs one")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if "LOCAL_RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(seconds=TIMEOUT))
        dist.barrier()                                      # all have checked before one writes
    return device


def rank_and_world():
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def print_on_rank0(text):
    if rank_and_world()[0] == 0:
        print(text, flush=True)


def pick_amp(choice, device):
    """The dtype of autocast, or None. "auto" is bfloat16 where that is fast."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = torch.cpu._is_avx512_bf16_supported()
    if choice == "bf16" or (choice == "auto" and fast):
        return torch.bfloat16
    return None


def make_loader(data, device, workers, **sampling):
    return DataLoader(data, num_workers=workers, pin_memory=device.type == "cuda",
                      timeout=TIMEOUT if workers else 0, worker_init_fn=hide_tracebacks,
                      **sampling)


def hide_tracebacks(worker):
    # The main process reports a worker's error. Ctrl-C needs no report.
    sys.excepthook = lambda *error: None


def run(main, on_interrupt="stopped"):
    """Runs a script's main. Ctrl-C and a missing or wrong file become one line."""
    if hasattr(sys.stdout, "reconfigure"):                  # not in notebooks
        sys.stdout.reconfigure(errors="backslashreplace")   # for names that it cannot print
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(on_interrupt)
    except OSError as error:
        # A worker's error comes with its traceback, in which the message is the last line.
        message = str(error).strip().splitlines()[-1]
        sys.exit(f"error: {message.removeprefix('OSError: ')}")
    if dist.is_initialized():
        dist.barrier()                                      # torch 2.10 can hang without it
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
