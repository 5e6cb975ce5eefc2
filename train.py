"""Trains EMANet. Each data set has a recipe, and flags override its settings.

    python train.py                                          # drawn scenes: minutes on any machine
    torchrun --nproc_per_node=4 train.py --dataset voc       # the paper's recipe on four GPUs
    python train.py --dataset folder --data-root my_images   # your own images (README, Data)
    python train.py --dataset voc --resume                   # continues an interrupted run

Writes to --out: model.pth (the network as last validated), last.pth (to continue from) and
log.jsonl (the settings, then the numbers).
"""
import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from backbone import RESNETS, read_checkpoint
from data import DATASETS, IGNORE, TrainView, build_dataset, normalise, schedule
from ema import ATTENTIONS, BASE_NORMS, BASE_UPDATES, GRADIENTS, EMANet, load_checkpoint
from evaluate import (
    evaluate,
    init_process,
    make_loader,
    new_folder,
    pick_amp,
    positive,
    print_on_rank0,
    rank_and_world,
    run,
    summary,
)

# Defaults of the flags marked *: PAPER (Sec. 6.1), or what RECIPES has for the data set instead.
PAPER = {"split": "train", "backbone": "resnet101", "weights": "imagenet", "output_stride": 16,
         "channels": 512, "crop": 513, "iters": 30000, "lr": 0.009}
RECIPES = {
    "voc": {"split": "trainaug"},
    "context": {"iters": 15000},
    "context60": {"iters": 15000},
    "cocostuff": {"output_stride": 8},
    # Not in the paper. 80,000 iterations are usual.
    "cocostuff164k": {"output_stride": 8, "iters": 80000},
    "coco2voc": {"iters": 150000},                          # the first of three stages (Sec. 6.2.3)
    "folder": {"iters": 15000},
    # A smoke test, from scratch.
    "scenes": {"backbone": "resnet18", "weights": "none", "output_stride": 8, "channels": 128,
               "crop": 97, "iters": 360, "lr": 0.1}}


# Flags that are EMAU's arguments.
EMAU_OPTIONS = ("num_bases", "iterations", "lam", "alpha", "base_update", "base_norm", "gradient")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage="train.py [flags, see --help]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog="* see PAPER and RECIPES")
    add = parser.add_argument
    # data
    add("--dataset", choices=DATASETS, default="scenes", help="default: scenes")
    add("--data-root", default="datasets", help="folder of the data set, default: datasets")
    add("--split", help="list of images to train on *")
    add("--crop", type=positive, help="side of the crops in pixels *")
    add("--workers", type=int, default=2, help="for each process, default: 2")
    # network
    add("--backbone", choices=RESNETS, help="*")
    # differs: Table 1's backbone has the deep stem.
    add("--stem", choices=("7x7", "deep"), default="7x7",
        help="deep: the released code's, from resnet50 on")
    add("--weights", help="of the backbone: imagenet, none or a file *")
    add("--init", help="start from the network of a checkpoint")
    add("--output-stride", type=int, choices=(8, 16), help="in training; validation uses 8 *")
    add("--channels", type=positive, help="of the attention, 512 or 256 in the paper *")
    add("--decoder", action="store_true", help="the released code's second 3x3")
    # attention, and EMAU's options
    add("--attention", choices=ATTENTIONS, default="emau", help="or a relative (Sec. 5.4)")
    add("--num-bases", type=positive, default=64, help="K, default: 64")
    add("--em-iterations", dest="iterations", type=positive, default=3, help="T, default: 3")
    add("--lam", type=float, default=1.0, help="lambda of Eq. 12, default: 1")
    add("--alpha", type=float, default=0.9, help="momentum of Eq. 15, default: 0.9")
    add("--base-update", choices=BASE_UPDATES, default="average", help="Sec. 5.2")
    add("--base-norm", choices=BASE_NORMS, default="l2", help="Sec. 5.3")
    add("--gradient", choices=GRADIENTS, default="none", help="through EM, default: none")
    # optimisation
    add("--batch-size", type=positive, default=16, help="over all processes, default: 16")
    add("--accumulate", type=positive, default=1, help="parts of a batch, to save memory; each "
        "updates BN and the bases, default: 1")
    add("--iters", type=positive, help="iterations *")
    add("--lr", type=float, help="initial; decays by the poly policy *")
    add("--seed", type=int, default=0, help="of all that is random, default: 0")
    # running
    add("--out", help="a new folder, default: out/DATASET")
    add("--resume", action="store_true", help="continue the run in --out, if there is one")
    add("--eval-every", type=positive, help="default: a tenth of --iters")
    add("--amp", choices=("auto", "bf16", "off"), default="auto", help="auto: bf16 where fast")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    args = parser.parse_args(argv)
    for key, value in (PAPER | RECIPES.get(args.dataset, {})).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.out = args.out or f"out/{args.dataset}"
    args.eval_every = args.eval_every or max(1, args.iters // 10)
    if args.base_update == "backprop" and args.gradient == "none":
        parser.error("--base-update backprop needs --gradient full")
    if args.stem == "deep" and args.backbone in ("resnet18", "resnet34"):
        parser.error("--stem deep needs --backbone resnet50 or deeper")
    return args


# ---- A step
def segmentation_loss(logits, label):
    """Cross entropy of logits (B, L, H, W) and label uint8 (B, H, W), divided by the number of all
    pixels. The released code does that, and lr 0.009 was tuned for it. A mean over the labelled
    pixels would be nan for a crop that has none."""
    loss = F.cross_entropy(logits, label.long(), ignore_index=IGNORE, reduction="sum")
    return loss / label.numel()


def batch_loss(model, batch, device, amp):
    """The loss of images uint8 (B, 3, crop, crop) and labels uint8 (B, crop, crop)."""
    images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
    with torch.autocast(device.type, amp, enabled=amp is not None):
        return segmentation_loss(model(normalise(images)), labels)


def build_optimizer(net, lr):
    """SGD as released: only weights of convolutions and linear layers decay, and biases have
    twice the learning rate."""
    weights, biases, others = [], [], []
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            biases.append(p)
        elif p.ndim in (2, 4):
            weights.append(p)
        else:
            others.append(p)                                # BN's weights, and learned bases
    return torch.optim.SGD([{"params": weights, "lr_scale": 1, "weight_decay": 1e-4},
                            {"params": others, "lr_scale": 1},
                            {"params": biases, "lr_scale": 2}], lr, momentum=0.9)


def training_step(model, optimizer, batch, lr, accumulate, device, amp):
    """One update, from this process's share of a batch in `accumulate` parts. Returns its loss."""
    model.train()
    torch.backends.cudnn.benchmark = True                   # all crops have one size
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    images, labels = batch
    total = 0
    for part in zip(images.chunk(accumulate), labels.chunk(accumulate)):
        loss = batch_loss(model, part, device, amp) / accumulate
        loss.backward()
        total += loss.detach()                              # item() would wait for the GPU
    optimizer.step()
    optimizer.zero_grad()
    return total


# ---- The network
def build_network(args, checkpoint, classes):
    """The network, and the description from which load_checkpoint builds it again, at output
    stride 8."""
    options = {}
    if args.attention == "emau":
        options = {key: getattr(args, key) for key in EMAU_OPTIONS}
    elif args.attention == "a2":
        options = {"num_bases": args.num_bases}
    arguments = {"num_classes": len(classes), "backbone": args.backbone, "stem": args.stem,
                 "output_stride": 8, "channels": args.channels, "decoder": args.decoder,
                 "attention": args.attention, **options}
    net = EMANet(**arguments, weights="none" if checkpoint or args.init else args.weights)
    net.set_output_stride(args.output_stride)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            # differs: the released 3e-4 is 9 / 30,000. Shorter runs need faster statistics.
            module.momentum = min(0.1, 9 / args.iters)
    if checkpoint:
        net.load_state_dict(checkpoint["model"])
    elif args.init:
        load_init(net, args.init, classes)
    return net, {"network": arguments, "dataset": args.dataset, "classes": classes}


def load_init(net, path, classes):
    """Starts from the network of a checkpoint. If its classes differ, the classifier stays new."""
    trained = load_checkpoint(path)
    if trained.classes != classes:
        print_on_rank0(f"{path} has other classes: the classifier is a new one")
        trained.classifier = net.classifier                 # copied onto itself
    try:
        net.load_state_dict(trained.state_dict())
    except RuntimeError as error:
        raise OSError(f"{path}: another network: give the flags that trained it") from error


# ---- The run
def train(args):
    # where to begin
    checkpoint = open_run(args)
    start = checkpoint["iteration"] if checkpoint else 0
    device = init_process(args.device)
    rank, world = rank_and_world()
    check_starts(args, start, world)
    if start == args.iters:
        print_on_rank0(f"the run in {args.out} is complete")
        return

    # data
    data, val = build_datasets(args, world)
    iterations = range(start + 1, args.iters + 1)
    batches = schedule(data, args.batch_size, args.seed, iterations, rank, world)
    loader = make_loader(
        TrainView(data, args.crop, args.seed), device, args.workers, batch_sampler=batches)

    # network and optimiser
    torch.manual_seed(args.seed)
    net, description = build_network(args, checkpoint, data.classes)
    net.to(device, memory_format=torch.channels_last)
    if world > 1 and device.type == "cuda":                 # torch synchronises BN on GPUs only
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    # `model` trains. `net`, with the same weights, is evaluated and saved.
    model = DistributedDataParallel(net) if world > 1 else net
    optimizer = build_optimizer(net, args.lr)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        checkpoint = None                                   # frees its memory

    # the loop
    amp = pick_amp(args.amp, device)
    log_start(args, data, val, net, start, device, amp)
    log_every = max(1, min(50, args.iters // 50))
    save_every = min(500, max(50, args.iters // 10))
    losses, since = [], time.time()
    for iteration, batch in zip(iterations, loader):
        # A seed for each iteration and process: a resumed run repeats the dropout.
        torch.manual_seed(hash((args.seed, iteration, rank)))
        lr = args.lr * (1 - (iteration - 1) / args.iters) ** 0.9               # the "poly" policy
        losses.append(training_step(model, optimizer, batch, lr, args.accumulate, device, amp))

        validating = iteration % args.eval_every == 0 or iteration == args.iters
        saving = validating or iteration % save_every == 0
        if saving or iteration % log_every == 0:
            # First: it ends the run before bad weights are saved.
            log_or_stop(args, iteration, lr, losses, since, net)
            if validating:
                validate(net, val, args, iteration, device, description)
            if saving and rank == 0:
                state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(),
                         "iteration": iteration, "args": vars(args)}
                save_checkpoint(description | state, f"{args.out}/last.pth")
            losses, since = [], time.time()


def validate(net, val, args, iteration, device, description):
    """Scores the network at output stride 8 (Sec. 6.1) and writes it to model.pth."""
    if dist.is_initialized():
        # Without SyncBN each process has its own statistics. Rank 0's are scored and saved.
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)
    net.set_output_stride(8)
    result = evaluate(net, val, device, workers=args.workers)
    net.set_output_stride(args.output_stride)
    print_on_rank0(summary(val, result))
    write_log(args, iteration=iteration, **{f"val_{key}": v for key, v in result.items()})
    if rank_and_world()[0] == 0:
        save_checkpoint(description | {"model": net.state_dict()}, f"{args.out}/model.pth")


# ---- What a first reading may skip: preparations
# These flags may differ on --resume.
MAY_CHANGE = ("data_root", "workers", "device", "out", "eval_every", "resume")


def open_run(args):
    """Prepares the folder --out. Returns the last.pth that --resume finds there, else None."""
    if args.resume:
        os.makedirs(args.out, exist_ok=True)
    else:
        new_folder(args.out, "--resume continues its run, another --out starts a new one")
    if not Path(args.out, "last.pth").exists():
        return None
    checkpoint = read_checkpoint(f"{args.out}/last.pth")
    for key, before in checkpoint["args"].items():
        now = getattr(args, key)
        if now != before and key not in MAY_CHANGE:
            sys.exit(f"error: the run in {args.out} has {key} {before}, not {now}: keep that, or "
                     "give another --out")
    return checkpoint


def check_starts(args, start, world):
    """Ends the job if processes found different checkpoints."""
    starts = [start] * world
    if world > 1:
        dist.all_gather_object(starts, start)
    if len(set(starts)) > 1:
        sys.exit(f"error: processes found different checkpoints: all must share {args.out}")


def build_datasets(args, world):
    """The data sets for training and validation."""
    data = build_dataset(args.dataset, args.data_root, args.split)
    val = build_dataset(args.dataset, args.data_root)
    for each in (data, val):
        if each.labels is None:
            sys.exit(f"error: {each.name} {each.split} has no labels")
    if len(data) < args.batch_size:
        sys.exit(f"error: {len(data)} images are fewer than --batch-size {args.batch_size}")
    if args.batch_size % (world * args.accumulate):
        sys.exit(f"error: --batch-size {args.batch_size} must be a multiple of {world} processes x "
                 f"--accumulate {args.accumulate}")
    return data, val


# ---- Files
def save_checkpoint(checkpoint, path):
    """Writes a checkpoint whole or not at all: the file gets its name once it is on the disk."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                # RuntimeError: torch's, on a full disk
        Path(temporary).unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: is the disk full?") from error


def log_start(args, data, val, net, start, device, amp):
    """Logs settings, weights, images and machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    origin = "last.pth" if start else args.init or net.backbone.weights_origin
    record = {"settings": vars(args), "start": start, "weights": origin,
              "images": f"{len(data)}, for validation {len(val)}",
              "machine": f"{rank_and_world()[1]} x {name}, {amp or torch.float32}, "
                         f"torch {torch.__version__}"}
    for key, value in record.items():
        print_on_rank0(f"{key}: {value}")
    # Mode "x" stops the second of two runs that start in one folder.
    write_log(args, mode="a" if args.resume else "x", **record)


def log_or_stop(args, iteration, lr, losses, since, net):
    """Logs the latest iterations. Ends the run if the loss or a weight is not finite."""
    loss = torch.stack(losses).mean()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    if not all(value.isfinite().all() for value in (loss, *net.parameters())):
        sys.exit(f"error: iteration {iteration}: the loss ({loss:.4f}) or a weight is not finite: "
                 "give a lower --lr and another --out")
    seconds = (time.time() - since) / len(losses)           # isfinite() waited for the GPU
    print_on_rank0(f"iter {iteration:6d}/{args.iters} | loss {loss:.4f} | lr {lr:.2e} | "
                   f"{1000 * seconds:.0f} ms | "
                   f"eta {seconds * (args.iters - iteration) / 60:.0f} min")
    write_log(args, iteration=iteration, loss=loss.item(), lr=lr, ms=1000 * seconds)


def write_log(args, mode="a", **record):
    if rank_and_world()[0] == 0:
        with open(f"{args.out}/log.jsonl", mode) as file:
            file.write(json.dumps(record) + "\n")


def main(argv=None):
    train(parse_args(argv))


if __name__ == "__main__":
    run(main, "stopped: --resume continues from the last checkpoint")
