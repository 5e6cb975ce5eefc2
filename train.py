"""Trains EMANet. The defaults of a data set are its recipe; every flag changes one setting of it.

    python train.py                                                    # built-in scenes: any machine, a few minutes
    torchrun --nproc_per_node=4 train.py --dataset voc                 # the paper's recipe on four GPUs
    python train.py --dataset folder --data-root my_images             # your own images (README), on one GPU
    python train.py --dataset voc --resume auto                        # continue an interrupted run

Writes to --out: model.pth (the network as last validated, for evaluate.py and visualize.py), last.pth (everything
needed to continue) and log.jsonl (the settings, then the numbers of each line that is printed).
"""
import argparse
import inspect
import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # before torch: threads that spin starve the loader's workers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from backbone import RESNETS, UserError, brief
from data import DATASETS, IGNORE, TrainView, build_dataset, global_batch, normalise, schedule
from ema import CHOICES, EMANet, load_checkpoint, read_checkpoint, save_checkpoint
from evaluate import evaluate, init_process, layout, make_loader, pick_amp, print_on_rank0, rank_and_world, run, summary

# The recipes: for each data set the defaults of the flags marked * in --help, and `layers`, which has no flag.
# PAPER is Sec. 6.1; what that leaves open, the gradient, is as in the released code; the stem is torchvision's.
PAPER = {"split": "trainaug", "backbone": "resnet101", "stem": "7x7", "weights": "imagenet", "output_stride": 16,
         "crop": 513, "batch_size": 16, "iters": 30000, "lr": 0.009, "channels": 512, "decoder": False,
         "eval_every": 3000, "layers": 4, "gradient": "none"}
EVAL_OUTPUT_STRIDE = 8                                    # of validation, and of model.pth, whatever it was trained at
# Scenes are a smoke test for any laptop: a small network from scratch, so a large lr.
SCENES = PAPER | {"split": "train", "backbone": "resnet18", "weights": "none", "output_stride": 8, "crop": 97,
                  "iters": 360, "lr": 0.1, "channels": 128, "eval_every": 180}
# Cells ask whether attention brings in what lies far away: a network that by itself sees little of the image.
# differs: all rounds in the graph. Without, half of cells-key is not learned (extras/evidence).
CELLS = SCENES | {"layers": 2, "gradient": "full", "crop": 193, "batch_size": 8, "iters": 400, "lr": 0.03,
                  "eval_every": 400}
RECIPES = {
    "voc": PAPER,
    "context": PAPER | {"split": "train", "iters": 15000, "eval_every": 1500},
    "cocostuff": PAPER | {"split": "train", "output_stride": 8},
    # The paper has no figure for the 164K release: 80,000 iterations, as others use.
    "cocostuff164k": PAPER | {"split": "train", "output_stride": 8, "iters": 80000, "eval_every": 8000},
    # First of three stages for VOC's test server; the next ones are --dataset voc --init (README, Train).
    "coco2voc": PAPER | {"split": "train", "iters": 150000, "eval_every": 15000},
    # A folder of images is small as a rule: half of VOC's iterations.
    "folder": PAPER | {"split": "train", "iters": 15000, "eval_every": 1500},
    "scenes": SCENES, "cells": CELLS, "cells-key": CELLS, "cells-local": CELLS}
# --recipe released: VOC, where the released code differs from the paper.
RELEASED = PAPER | {"output_stride": 8, "stem": "deep", "weights": "resnet101-2a57e44d.pth", "decoder": True}
# EMANet's arguments that are settings of a run, under the same names: flags, and `layers` of the recipes
NETWORK = [key for key in inspect.signature(EMANet).parameters if key not in ("num_classes", "weights", "bn_momentum")]
# Settings that may change when a run is resumed
MAY_CHANGE = ("data_root", "workers", "device", "out", "resume", "eval_every", "compile")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="* by recipe: RECIPES in train.py has them for every data set")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="scenes", help="data set (default: scenes, which needs no files)")
    add("--data-root", default="datasets", help="folder that holds the data set, see README (default: datasets)")
    add("--split", help="list of images to train on *")
    add("--context-classes", type=int, choices=(59, 60), default=59, help="PASCAL Context; 60 learns the rest as well")
    add("--crop", type=int, metavar="PIXELS", help="side of the training crops, ideally k x output stride + 1 *")
    add("--workers", type=int, default=2, help="processes that decode ahead, for each GPU (default: 2)")
    add = parser.add_argument_group("network").add_argument
    add("--backbone", choices=RESNETS, help="depth of the ResNet *")
    add("--stem", choices=("7x7", "deep"), help="first layers: torchvision's 7x7, or the released code's three 3x3 *")
    add("--weights", help="backbone: imagenet (torchvision V1), imagenet-v2, none (from scratch), or a file *")
    add("--init", metavar="FILE", help="start from a checkpoint's network (other number of classes: new classifier)")
    add("--output-stride", type=int, choices=(8, 16, 32), help="in training; validation uses 8, as in the paper *")
    add("--channels", type=int, help="channels of the attention, 512 or 256 in the paper *")
    add("--decoder", action=argparse.BooleanOptionalAction, help="the released code's 3x3 before the classifier *")
    add = parser.add_argument_group("attention").add_argument
    add("--attention", choices=CHOICES["attention"], default="emau", help="EMAU, or a relative of Sec. 5.4, or none")
    add("--num-bases", type=int, default=64, help="K (default: 64)")
    add("--em-iterations", type=int, default=3, help="T (default: 3)")
    add("--lam", type=float, default=1.0, help="lambda of Eq. 12, the inverse temperature (default: 1)")
    add("--alpha", type=float, default=0.9, help="momentum of the bases, Eq. 15 (default: 0.9)")
    add("--base-update", choices=CHOICES["base_update"], default="average", help="how initial bases are kept, Sec. 5.2")
    add("--base-norm", choices=CHOICES["base_norm"], default="l2", help="of the bases, Sec. 5.3 (default: l2)")
    add("--gradient", choices=CHOICES["gradient"], help="through EM: none as released, the last E-step's, or full *")
    add = parser.add_argument_group("optimisation").add_argument
    add("--recipe", choices=("paper", "released"), default="paper", help="released: for voc only (default: paper)")
    add("--batch-size", type=int, help="crops per iteration, over all processes together *")
    add("--accumulate", type=int, default=1, help="backward passes per batch; BN sees one part at a time")
    add("--iters", type=int, help="iterations *")
    add("--lr", type=float, help="learning rate at the start; falls as (1 - i / iters) ** 0.9 *")
    add("--seed", type=int, default=0, help="of initialisation, order, crops and dropout (default: 0)")
    add = parser.add_argument_group("running").add_argument
    add("--out", metavar="DIR", help="output folder, new or empty (default: out/DATASET)")
    add("--resume", metavar="auto|FILE", help="continue from --out's last.pth, if there is one, or from a file")
    add("--eval-every", type=int, metavar="ITERS", help="iterations between validations *")
    add("--amp", choices=("auto", "bf16", "off"), default="auto", help="bfloat16 autocast (default: where it is fast)")
    add("--compile", action="store_true", help="torch.compile the network, for training")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu) or a torch device")
    # The recipe depends on two flags, which are read first; its values then are the defaults of the others.
    first, _ = parser.parse_known_args(argv)
    if first.recipe == "released" and first.dataset != "voc":
        raise UserError(f"--recipe released is for --dataset voc, {first.dataset} has --recipe paper alone")
    recipe = RELEASED if first.recipe == "released" else RECIPES[first.dataset]
    parser.set_defaults(out=f"out/{first.dataset}", **recipe)
    args = parser.parse_args(argv)
    for key, least in {"em_iterations": 1, "num_bases": 1, "channels": 2, "crop": 2, "batch_size": 1, "accumulate": 1,
                       "iters": 1, "eval_every": 1, "seed": 0, "workers": 0, "lr": 0, "lam": 0, "alpha": 0}.items():
        if not least <= getattr(args, key) < float("inf"):                     # nan, too
            raise UserError(f"--{key.replace('_', '-')} {getattr(args, key)}: must be at least {least}, and finite")
    if args.alpha > 1:
        raise UserError(f"--alpha {args.alpha}: must be at most 1, where the bases stay")
    return args


# ---- The parts of a step
def segmentation_loss(logits, label):
    """Cross entropy of logits (B, L, H, W) and label uint8 (B, H, W), summed over valid pixels, divided by ALL pixels.

    That is what the released code does and lr 0.009 was tuned to. It gives the same gradient for any number of
    processes, and 0 for a crop without labels, where a mean over valid pixels would be nan.
    """
    return F.cross_entropy(logits, label.long(), ignore_index=IGNORE, reduction="sum") / label.numel()


def batch_loss(model, batch, device, amp):
    """The loss of a batch as the loader gives it: images uint8 (B, 3, crop, crop), which become floats on the device,
    and labels uint8 (B, crop, crop)."""
    images, labels = (part.to(device, non_blocking=device.type == "cuda") for part in batch)
    with torch.autocast(device.type, amp, enabled=amp is not None):
        return segmentation_loss(model(normalise(images)), labels)


def build_optimizer(net, lr):
    """SGD as in the released code: weight decay on convolutions' weights alone, twice the lr on all biases."""
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    biases = [p for name, p in trained if name.endswith("bias")]
    weights = [p for name, p in trained if p.ndim == 4]                        # convolutions'
    scales = [p for name, p in trained if p.ndim != 4 and not name.endswith("bias")]       # BN's, and mu by backprop
    return torch.optim.SGD([{"params": weights, "weight_decay": 1e-4, "lr_scale": 1},
                            {"params": scales, "weight_decay": 0, "lr_scale": 1},
                            {"params": biases, "weight_decay": 0, "lr_scale": 2}], lr=lr, momentum=0.9)


def training_step(model, optimizer, batch, *, lr, accumulate, device, amp):
    """One iteration, with this process' share of the batch in `accumulate` backward passes; returns its loss."""
    model.train()
    torch.backends.cudnn.benchmark = True                                      # crops are all of one size
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    images, labels = (tensor.chunk(accumulate) for tensor in batch)
    total = 0
    for part in range(accumulate):
        model.require_backward_grad_sync = part + 1 == accumulate  # DistributedDataParallel's: exchange gradients once
        loss = batch_loss(model, (images[part], labels[part]), device, amp) / accumulate
        loss.backward()
        total = total + loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    return total                                                               # no .item(): the device need not wait


# ---- The run
def build_datasets(args):
    """The data sets for training and validation; no validation for a folder without a list for it."""
    data = build_dataset(args.dataset, args.data_root, args.split, args.context_classes)
    if not data.labelled:
        raise UserError(f"{args.dataset} {args.split} has no labels to train on")
    if len(data) < args.batch_size:
        raise UserError(f"{args.dataset} {args.split} has {len(data)} images, less than one batch of {args.batch_size}")
    if args.dataset == "folder" and not (Path(args.data_root) / "ImageSets/Segmentation/val.txt").exists():
        return data, None
    return data, build_dataset(args.dataset, args.data_root, context_classes=args.context_classes)


def build_network(args, num_classes, weights):
    settings = {key: getattr(args, key) for key in NETWORK}
    # 9 / iterations leaves exp(-9) of BN's initial running statistics at the end.
    # differs: the released code has 3e-4 always, which is 9 / 30,000; a short run would keep half-initial statistics.
    bn_momentum = min(0.1, max(3e-4, 9 / args.iters))
    # Running averages move once for each part: by these roots all parts together count as one update.
    settings["alpha"] = args.alpha ** (1 / args.accumulate)
    bn_momentum = 1 - (1 - bn_momentum) ** (1 / args.accumulate)
    return EMANet(num_classes, weights=weights, bn_momentum=bn_momentum, **settings)


SIGNALS = []                  # those that asked this process to stop


def ask_to_stop(number, frame):
    """The first Ctrl-C or SIGTERM: stop after this iteration, all saved. A second one kills."""
    SIGNALS.append(number)
    signal.signal(number, signal.SIG_DFL)


def train(args):
    # processes
    device = init_process(args.device)
    amp = pick_amp(args.amp, device)
    rank, world = rank_and_world()
    if args.batch_size % (world * args.accumulate):
        raise UserError(f"--batch-size {args.batch_size} cannot be shared by {world} processes x --accumulate "
                        f"{args.accumulate}")

    # data
    data, val = build_datasets(args)
    checkpoint = find_checkpoint(args)

    # network
    torch.manual_seed(args.seed % 2**63)
    # One process fetches the backbone's weights: DistributedDataParallel copies its network to the others.
    needs_weights = rank == 0 and not (checkpoint or args.init)
    net = build_network(args, len(data.classes), args.weights if needs_weights else "none")
    config = {"network": net.config | {"output_stride": EVAL_OUTPUT_STRIDE},
              "data": {"dataset": data.name, "classes": data.classes, "images": len(data)},
              "training": {key: value for key, value in vars(args).items() if key not in MAY_CHANGE}}
    if checkpoint:
        check_same_run(config, checkpoint)
        net.load_state_dict(checkpoint["model"])
    elif args.init:
        load_init(net, args.init)
    net.to(device, memory_format=layout(device))
    if world > 1 and device.type == "cuda":                      # torch synchronises BN on GPUs only
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    model = torch.compile(net) if args.compile else net          # evaluation uses `net`: its image sizes vary
    if world > 1:
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    # optimiser, and where to continue
    optimizer = build_optimizer(net, args.lr)
    start = 0
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["iteration"]
    if world > 1:
        starts = torch.tensor([start, -start])
        dist.all_reduce(starts, dist.ReduceOp.MAX)               # the largest start, and minus the smallest:
        if starts.sum():                                         # their sum is 0 if all agree
            raise UserError(f"the processes found different checkpoints in {args.out}: all machines must share it")
    # Not before: with nothing to save a signal should end the process, which may be waiting for one that has failed.
    SIGNALS.clear()                                              # a notebook may train again after a Ctrl-C
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)
    iterations = range(start + 1, args.iters + 1)
    batches = schedule(data, args.batch_size, args.seed, iterations, rank, world)
    loader = iter(make_loader(TrainView(data, args.crop, args.seed), device, args.workers, batch_sampler=batches))

    # all checks have passed: the output folder
    out, log = Path(args.out), Path(args.out) / "log.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    origin = f"the checkpoint of iteration {start}" if checkpoint else args.init or net.backbone.weights_origin
    log_start(log, args, data, val, origin=origin, device=device, amp=amp)
    validations = {*range(args.eval_every, args.iters, args.eval_every), args.iters}         # after these iterations
    if start in validations:                                     # a kill may have cut this one off: it follows a save
        validate(net, val, out, config, args=args, device=device, iteration=start)

    log_every = max(1, min(50, args.iters // 50))
    save_every = max(100, min(1000, args.iters // 10))           # last.pth, however rare the validations are
    losses, waited, since = [], 0.0, time.time()                 # since the last log line; seconds waited for data
    for iteration in iterations:
        # step. Dropout's randomness is a function of (seed, iteration, rank), so that no state of it has to be saved.
        torch.manual_seed(((args.seed * args.iters + iteration) * world + rank) % 2**63)
        lr = args.lr * (1 - (iteration - 1) / args.iters) ** 0.9               # the "poly" policy
        asked = time.time()
        batch = next(loader)
        waited += time.time() - asked
        loss = training_step(model, optimizer, batch, lr=lr, accumulate=args.accumulate, device=device, amp=amp)
        losses.append(loss)
        stop = torch.tensor(max(SIGNALS, default=0))             # a copy: what comes during the exchange has to wait
        if world > 1:
            dist.all_reduce(stop, dist.ReduceOp.MAX)             # on the CPU: the GPU need not wait
        stop = stop.item()
        save = stop or iteration in validations or iteration % save_every == 0
        log_now = save or iteration % log_every == 0

        # log
        if log_now:
            recent = torch.stack(losses)  # (iterations,)
            if world > 1:
                dist.all_reduce(recent)
                recent /= world
            check_finite(recent, net, args=args, data=data, iteration=iteration)
            log_iterations(log, args, device, iteration=iteration, loss=recent.mean().item(), lr=lr,
                           seconds=(time.time() - since) / len(losses), data_seconds=waited / len(losses))

        # save, stop, validate: a kill during the validation costs nothing
        if save and world > 1:                                   # without SyncBN statistics differ: all take rank 0's
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)
        if save and rank == 0:
            save_checkpoint({"model": net.state_dict(), "config": config, "optimizer": optimizer.state_dict(),
                             "iteration": iteration}, out / "last.pth")
        if stop and iteration < args.iters:
            print_on_rank0(f"stopped after iteration {iteration}, all saved: --resume auto continues")
            return 128 + stop
        if iteration in validations:
            validate(net, val, out, config, args=args, device=device, iteration=iteration)
        if log_now:                                              # validation and saving are no iteration's time
            losses, waited, since = [], 0.0, time.time()

    where = "" if args.data_root == "datasets" else f" --data-root {args.data_root}"
    where += "" if val else f" --split {args.split}"
    print_on_rank0(f"done: model.pth, last.pth and log.jsonl are in {out}\n"
                   f"next: python evaluate.py --ckpt {out}/model.pth{where}\n"
                   f"      python visualize.py --ckpt {out}/model.pth{where}")
    return 0


def validate(net, val, out, config, *, args, device, iteration):
    """Scores the network, if there is something to validate on, and writes it as model.pth."""
    if val:
        net.set_output_stride(EVAL_OUTPUT_STRIDE)
        result = evaluate(net, val, device, workers=args.workers)
        net.set_output_stride(args.output_stride)
        print_on_rank0(summary(val, result))
        write_log(out / "log.jsonl", iteration=iteration, **{f"val_{key}": value for key, value in result.items()})
    if rank_and_world()[0] == 0:
        save_checkpoint({"model": net.state_dict(), "config": config}, out / "model.pth")


# ---- Starting, resuming, failing (skip at first reading)
def load_init(net, path):
    """Starts from the network of a checkpoint; with a new classifier where the number of classes differs."""
    source = load_checkpoint(path)
    state, old, new = source.state_dict(), source.config["num_classes"], net.config["num_classes"]
    if old != new:
        print_on_rank0(f"{path} has {old} classes, the data set {new}: the classifier is a new one")
        state |= {key: value for key, value in net.state_dict().items() if key.startswith("classifier.")}
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path}: another network than the one asked for ({brief(error)}): give the --backbone, "
                        "--stem, --channels ... it was made with") from None


def find_checkpoint(args):
    """The checkpoint to continue from, or None for a run that begins. Only its own continuation overwrites a run."""
    out, last = Path(args.out), Path(args.out) / "last.pth"
    if args.resume == "auto" and not last.exists():
        if (out / "model.pth").exists():
            raise UserError(f"{out} has a model.pth, but no last.pth to continue from: --out DIR starts another run")
        return None                              # a new run, or one killed before its first checkpoint
    if args.resume == "auto":
        path = last
    else:
        path = Path(args.resume) if args.resume else None
    elsewhere = path is None or path.parent.resolve() != out.resolve()
    if elsewhere and out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: --resume auto continues the run in it, --out DIR starts another")
    if path is None:
        return None
    checkpoint = read_checkpoint(path)
    if "optimizer" not in checkpoint:
        raise UserError(f"{path}: a network, not a run: --resume takes a last.pth, --init starts from a network")
    return checkpoint


def check_same_run(config, checkpoint):
    """UserError if a run would continue with other settings or other data than it was started with."""
    for part in ("training", "data"):
        for key, now in config[part].items():
            was = checkpoint["config"].get(part, {}).get(key)
            if was != now:
                raise UserError(f"the run was started with another {key.replace('_', '-')} ({str(was)[:60]}, not "
                                f"{str(now)[:60]}): keep it, or start another run with --out DIR")


def check_finite(losses, net, *, args, data, iteration):
    """UserError if one of the losses (iterations,), the last that of `iteration`, or a weight is not finite."""
    bad = losses.isfinite().logical_not().nonzero().flatten().tolist()
    if not bad and all(p.isfinite().all() for p in net.parameters()):
        return
    if bad:
        first = iteration - len(losses) + 1
        iteration = first + bad[0]
    images = ", ".join(str(data.ids[i]) for i in global_batch(data, args.batch_size, args.seed, iteration))
    raise UserError(f"the {'loss' if bad else 'update'} of iteration {iteration} is not finite (images {images}): "
                    "look at these images, or start again with a lower --lr and another --out")


# ---- Logging (skip at first reading)
def log_start(path, args, data, val, *, origin, device, amp):
    """Prints and writes what one needs to know to compare a run with the paper, or to repeat it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    machine = f"{rank_and_world()[1]} x {name}, {'bfloat16' if amp else 'float32'}, torch {torch.__version__}"
    print_on_rank0("settings " + " ".join(f"{key}={value}" for key, value in vars(args).items()))
    print_on_rank0(f"weights  {origin}")
    print_on_rank0(f"data     {data.name} {data.split}: {len(data)} images, {len(data.classes)} classes; "
                   f"validation: {len(val) if val else 'none'}")
    print_on_rank0(f"machine  {machine}")
    write_log(path, args=vars(args), machine=machine)


def write_log(path, **record):
    if rank_and_world()[0] == 0:
        try:
            with open(path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path} ({error}): make room, then --resume auto continues") from None


def log_iterations(path, args, device, *, iteration, loss, lr, seconds, data_seconds):
    """Prints and writes a line about the latest iterations: mean loss, seconds each took, and waited for data."""
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    eta = timedelta(seconds=int(seconds * (args.iters - iteration)))
    print_on_rank0(f"iter {iteration:6d}/{args.iters} | loss {loss:.4f} | lr {lr:.2e} | {1000 * seconds:.0f} ms (data "
                   f"{100 * data_seconds / seconds:.0f}%) | {args.batch_size / seconds:.1f} img/s | mem {memory:.1f} GB"
                   f" | eta {eta}")
    write_log(path, iteration=iteration, loss=loss, lr=lr, ms=1000 * seconds, data_ms=1000 * data_seconds,
              memory_gb=memory)


def main(argv=None):
    return train(parse_args(argv))


if __name__ == "__main__":
    run(main)
