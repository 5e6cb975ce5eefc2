"""Trains EMANet. The defaults of a data set are its recipe; every flag changes one number of it.

    python train.py                                                    # built-in scenes: any machine, a few minutes
    torchrun --nproc_per_node=4 train.py --dataset voc                 # the paper's recipe on four GPUs
    python train.py --dataset folder --data-root my_images             # your own images, one GPU or none
    python train.py --dataset voc --resume auto                        # go on where a run was interrupted

Writes to --out: model.pth (the network as last validated, for evaluate.py and visualize.py), last.pth (everything
needed to go on) and log.jsonl (one line of numbers per printed line).
"""
import argparse
import fcntl
import functools
import json
import os
import platform
import signal
import time
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # before torch: threads that spin starve the loader's workers
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from backbone import RESNETS, UserError, first_line
from data import (
    CELL_SHIFTS,
    DATASETS,
    DRAWN,
    IGNORE,
    Cached,
    Schedule,
    TrainView,
    build_dataset,
    memory_format,
    normalise,
    pick_device,
    run,
    set_worker_apart,
    to_device,
)
from ema import EMANet, load_checkpoint, read_checkpoint, save_checkpoint
from evaluate import (
    MS_SCALES,
    PATIENCE,
    bases_line,
    batches,
    duration,
    evaluate,
    faults_named,
    init_distributed,
    leave,
    look_at_bases,
    note,
    pad,
    pick_amp,
    predict_batch,
    resize,
    summary,
)

# The recipes. "paper": the paper's own settings (Sec. 6.1); "released": those of the released code where it differs.
PAPER = {"split": "trainaug", "backbone": "resnet101", "stem": "7x7", "weights": "imagenet", "output_stride": 16,
         "eval_output_stride": 8, "crop": 513, "batch_size": 16, "iters": 30000, "lr": 0.009, "bn_momentum": 3e-4,
         "channels": 512, "decoder": False, "eval_every": 3000, "layers": 4, "gradient": "none"}
RECIPES = {
    ("voc", "paper"): PAPER,
    ("voc", "released"): PAPER | {"output_stride": 8, "stem": "deep", "weights": "resnet101-2a57e44d.pth",
                                  "decoder": True},
    ("context", "paper"): PAPER | {"split": "train", "iters": 15000, "eval_every": 1500},
    ("cocostuff", "paper"): PAPER | {"split": "train", "output_stride": 8},
    # The paper has no figure for the 164K release; twelve times the images get the iterations others give them.
    ("cocostuff164k", "paper"): PAPER | {"split": "train", "output_stride": 8, "iters": 80000, "eval_every": 8000},
    # First of three stages for VOC's test server; the next ones are --dataset voc --init (README, Train).
    ("coco2voc", "paper"): PAPER | {"split": "train", "iters": 150000, "eval_every": 15000},
    # A folder of images is small as a rule: half of VOC's iterations.
    ("folder", "paper"): PAPER | {"split": "train", "iters": 15000, "eval_every": 1500},
    # Scenes are a smoke test for any laptop: a small network from scratch, so a large lr.
    ("scenes", "paper"): PAPER | {"split": "train", "backbone": "resnet18", "weights": "none", "output_stride": 8,
                                  "crop": 97, "iters": 400, "lr": 0.1, "channels": 128, "eval_every": 200},
}
# Cells ask whether attention brings in what lies far away: a network that by itself sees little of the image.
# differs: all rounds in the graph. Without, the attention fails at this task (assets/evidence).
CELLS = RECIPES["scenes", "paper"] | {"layers": 2, "gradient": "full", "crop": 193, "batch_size": 8, "iters": 400,
                                      "lr": 0.03, "eval_every": 400}
RECIPES |= {(name, "paper"): CELLS for name in CELL_SHIFTS}
RESUME = "; --resume auto goes on"                  # what to do when a run is broken off
SAVE_EVERY = 1000             # iterations between two last.pth at most, however rare the validations are
# What may differ between the command that began a run and the one that goes on with it
MAY_CHANGE = ("data_root", "workers", "device", "out", "resume", "eval_every", "compile", "cache", "bench")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=recipe_table())
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="scenes", help="data set (default: scenes, which needs no files)")
    add("--data-root", default="datasets", help="folder that holds the data set, see README (default: datasets)")
    add("--split", help="list of images to train on *")
    add("--context-classes", type=int, choices=(59, 60), default=59,
        help="PASCAL Context: ignore what is none of 59 classes, or learn it as one more (default: 59)")
    add("--crop", type=int, metavar="PIXELS", help="side of the square training crops *")
    add("--workers", type=int, default=2, help="processes per GPU that decode images ahead (default: 2)")
    add("--cache", action="store_true", help="keep the decoded images in memory (VOC trainaug: 8 GB per process)")
    add = parser.add_argument_group("network").add_argument
    add("--backbone", choices=RESNETS, help="depth of the ResNet *")
    add("--stem", choices=("7x7", "deep"), help="first layers: torchvision's 7x7, or the released code's three 3x3 *")
    add("--weights", help="backbone: imagenet (torchvision V1), imagenet-v2, none (from scratch), or a file *")
    add("--init", metavar="FILE", help="start from a checkpoint's network (other number of classes: new classifier)")
    add("--output-stride", type=int, choices=(8, 16, 32), help="in training; evaluation uses 8, as in the paper *")
    add("--channels", type=int, help="channels of the attention, 512 or 256 in the paper *")
    add("--decoder", action=argparse.BooleanOptionalAction, help="the released code's 3x3 before the classifier *")
    add = parser.add_argument_group("attention").add_argument
    add("--attention", choices=("emau", "nonlocal", "a2", "none"), default="emau",
        help="the unit, one of its relatives of Sec. 5.4, or nothing (default: emau)")
    add("--num-bases", type=int, default=64, help="K (default: 64)")
    add("--em-iterations", type=int, default=3, help="T (default: 3)")
    add("--lam", type=float, default=1.0, help="lambda of Eq. 12, the inverse temperature (default: 1)")
    add("--alpha", type=float, default=0.9, help="momentum of the bases, Eq. 15 (default: 0.9)")
    add("--base-update", choices=("average", "backprop", "fixed"), default="average",
        help="how the initial bases are kept, Sec. 5.2 (default: average)")
    add("--base-norm", choices=("l2", "layer", "none"), default="l2", help="of the bases, Sec. 5.3 (default: l2)")
    add("--gradient", choices=("none", "last", "full"),
        help="through the EM rounds: none as in the released code, the last E-step's, or all *")
    add = parser.add_argument_group("optimisation").add_argument
    add("--recipe", choices=("paper", "released"), default="paper", help="which defaults to take (default: paper)")
    add("--batch-size", type=int, help="crops per iteration, over all processes together *")
    add("--accumulate", type=int, default=1, help="cut the batch into so many parts, one after the other, when memory "
        "is short; the bases and BN then see the parts (default: 1)")
    add("--iters", type=int, help="iterations *")
    add("--lr", type=float, help="learning rate at the start; falls as (1 - i / iters) ** 0.9 *")
    add("--seed", type=int, default=0, help="of initialisation, order, crops and dropout (default: 0)")
    add = parser.add_argument_group("running").add_argument
    add("--out", metavar="DIR", help="output folder (default: out/DATASET)")
    add("--resume", metavar="auto|FILE", help="go on from --out's last.pth, if there is one, or from a file")
    add("--eval-every", type=int, metavar="ITERS", help="iterations between validations *")
    add("--amp", choices=("auto", "bf16", "off"), default="auto", help="bfloat16 autocast (default: where it is fast)")
    add("--compile", action="store_true", help="torch.compile the training step")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu) or a torch device")
    add("--bench", action="store_true", help="measure images/s of every stage instead, beside the released code's way")
    args = parser.parse_args()
    if (args.dataset, args.recipe) not in RECIPES:
        raise UserError(f"no recipe {args.recipe!r} for {args.dataset}: there is --recipe paper")
    for key in ("num_bases", "em_iterations", "lam", "alpha", "base_update", "base_norm", "gradient"):
        read = args.attention == "emau" or (args.attention, key) == ("a2", "num_bases")
        if not read and getattr(args, key) != parser.get_default(key):
            raise UserError(f"--{key.replace('_', '-')} is a setting of --attention emau, not of {args.attention}")
    for key, value in RECIPES[args.dataset, args.recipe].items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    args.out = args.out or f"out/{args.dataset}"
    for key, least in {"em_iterations": 1, "num_bases": 1, "channels": 2, "crop": 1, "batch_size": 1, "accumulate": 1,
                       "iters": 1, "eval_every": 1, "seed": 0, "workers": 0}.items():
        if getattr(args, key) < least:
            raise UserError(f"--{key.replace('_', '-')} {getattr(args, key)}: must be at least {least}")
    # The recipes' BN momentum is made for long runs: in a short one the statistics must arrive, 2% initial at its end.
    args.bn_momentum = max(args.bn_momentum, min(0.1, 4 / (args.iters * args.accumulate)))
    return args


def recipe_table():
    """The recipes as text, for --help."""
    keys = [key for key in PAPER if key not in ("bn_momentum", "eval_output_stride", "decoder", "weights", "layers")]
    rows = [["* by recipe", *(key.replace("_", "-") for key in keys)]]
    rows += [[" ".join(name), *(str(recipe[key]) for key in keys)] for name, recipe in RECIPES.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:{width}s}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", "ImageNet weights, but none for scenes and cells; released: those of a file, and the decoder."])


# ---------------------------------------------------------------------------------------------------------------------
# The parts of a step
def training_data(args):
    data = build_dataset(args.dataset, args.data_root, args.split, args.context_classes)
    if not data.endless and len(data) < args.batch_size:
        raise UserError(f"{args.dataset} {args.split} has {len(data)} images, less than one batch of {args.batch_size}")
    return data


def build_network(args, num_classes, weights):
    return EMANet(num_classes, args.backbone, args.stem, weights, args.output_stride, args.channels, args.attention,
                  args.num_bases, args.em_iterations, args.lam, args.alpha, args.base_update, args.base_norm,
                  args.gradient, args.decoder, args.bn_momentum, args.layers)


def segmentation_loss(logits, label):
    """Cross entropy of logits (B, L, H, W) and label uint8 (B, H, W), summed over valid pixels, divided by ALL pixels.

    That is what the released code does and lr 0.009 was tuned to. It gives the same gradient for any number of
    processes, and 0 for a crop without labels, where a mean over valid pixels would be nan.
    """
    return F.cross_entropy(logits, label.long(), ignore_index=IGNORE, reduction="sum") / label.numel()


def batch_loss(model, batch, device, amp):
    """The loss of a batch as the loader gives it: uint8 goes to the device and becomes numbers there."""
    images, labels, boxes = (to_device(part, device) for part in batch)          # (B, 3, ., .), (B, ., .), (B, 4)
    images = normalise(images, boxes).contiguous(memory_format=memory_format(device))
    with torch.autocast(device.type, amp, enabled=amp is not None):
        return segmentation_loss(model(images), labels)


def build_optimizer(net, lr):
    """SGD as in the released code: weight decay on convolutions' weights alone, twice the lr on all biases."""
    groups = {"weights": [], "scales": [], "biases": []}    # convolutions'; BN's, and mu if it is a parameter; all biases
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad:                                    # EMAU's first convolution is frozen
                kind = "biases" if name == "bias" else "weights" if isinstance(module, nn.Conv2d) else "scales"
                groups[kind].append(p)
    return torch.optim.SGD([{"params": groups["weights"], "weight_decay": 1e-4, "lr_scale": 1},
                            {"params": groups["scales"], "weight_decay": 0, "lr_scale": 1},
                            {"params": groups["biases"], "weight_decay": 0, "lr_scale": 2}], lr=lr, momentum=0.9)


def share_buffers(net):
    """Gives rank 0's buffers to all: plain BN's statistics differ between processes, a saved network has but one."""
    if dist.is_initialized():
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Starting and going on
def prepare_out(args):
    """Makes the output folder and takes it for this process, without ever overwriting a run."""
    out = Path(args.out)
    there = out.is_dir()
    if there:
        take(out)
    if args.resume not in (None, "auto") and (out / "last.pth").exists() \
            and Path(args.resume).resolve().parent != out.resolve():
        raise UserError(f"{out} holds another run than {args.resume}: --out DIR goes on elsewhere")
    if any((out / name).exists() for name in ("last.pth", "model.pth", "log.jsonl")) and not args.resume:
        if args.dataset not in DRAWN:
            raise UserError(f"{out} holds a run already: --resume auto goes on with it, --out DIR starts another one")
        number = next(n for n in range(1, 10**6) if not Path(f"{out}-{n}").exists())
        out.rename(f"{out}-{number}")
        print(f"moved the earlier run from {out} to {out}-{number}")
        there = False
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.jsonl").open("a").close()                # found out now, not after the first thousand iterations
    except OSError as error:
        raise UserError(f"cannot write into {out}: {first_line(error)}; choose another --out") from None
    if not there:
        take(out)


def take(folder):
    """Locks a folder as long as this process lives. UserError if another run has it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is writing into {folder}: let it end, or choose another --out") from None
    except OSError:                                                # a file system without locks: as good as it gets
        return
    os.register_at_fork(after_in_child=functools.partial(os.close, handle))    # workers may outlive a killed run


def find_checkpoint(args, say=print):
    """The checkpoint to go on from, or None: the file named, or the newest whole one in --out."""
    if args.resume != "auto":
        return read_checkpoint(args.resume) if args.resume else None
    out, damage = Path(args.out), None
    for name in ("last.pth", "last.before.pth"):
        if (out / name).exists():
            try:
                checkpoint = read_checkpoint(out / name)
            except UserError as error:
                damage = damage or error
                say(f"warning: {error}; trying the one before it")
                continue
            if damage:                                       # out of the way, or the next save would keep it as the
                with suppress(FileNotFoundError):            # one before, instead of this
                    os.replace(out / "last.pth", out / "last.damaged.pth")
            return checkpoint
    if damage:
        raise damage
    if (out / "model.pth").exists():
        raise UserError(f"{out} holds a trained network, but no last.pth to go on from: --out DIR starts another run, "
                        f"--init {out}/model.pth from this network")
    return None


def check_resumable(args, checkpoint, data, say):
    """UserError unless the checkpoint can go on under these settings as the experiment it is; tells what changed."""
    if "optimizer" not in checkpoint:
        raise UserError(f"{args.resume}: a network, not a run: --resume takes a last.pth, --init starts from a network")
    before = checkpoint["config"]["training"]
    for key, value in vars(args).items():
        flag = f"--{key.replace('_', '-')}"
        if before.get(key) != value and key not in MAY_CHANGE:
            raise UserError(f"the run was started with {flag} {before.get(key)}, not {value}: go on with the same "
                            "settings, or start another run with --out DIR (and --init model.pth)")
        if before.get(key) != value and key not in ("out", "resume"):
            say(f"changed  {flag} from {before.get(key)} to {value}")
    for key, now in (("classes", list(data.classes)), ("images", len(data))):
        if checkpoint["config"]["data"].get(key) != now:
            raise UserError(f"the run was started with other {key} than {args.dataset} in {args.data_root} has now: "
                            "start another run with --out DIR (and --init model.pth)")


def load_init(net, path, say=print):
    """Starts from the network of a checkpoint; the classifier afresh where the number of classes differs."""
    state, mine = load_checkpoint(path).state_dict(), net.state_dict()
    if state["classifier.bias"].shape != mine["classifier.bias"].shape:
        say(f"{path} has {len(state['classifier.bias'])} classes, the data set {len(mine['classifier.bias'])}: "
            "the classifier starts afresh")
        state |= {key: value for key, value in mine.items() if key.startswith("classifier.")}
    differ = [key for key in mine.keys() | state.keys()
              if key not in mine or key not in state or mine[key].shape != state[key].shape]
    if differ:
        raise UserError(f"{path}: another network than the one asked for: {len(differ)} entries differ, e.g. "
                        f"{min(differ)}; give the --backbone, --stem, --channels ... it was made with")
    net.load_state_dict(state)


class Log:
    """log.jsonl: one JSON object per line; a line without an iteration says what the run is, at every start of it."""

    def __init__(self, path, header, start, validated=True):
        self.path, lines = path, []
        for line in path.read_text(errors="replace").splitlines() if start else ():
            try:
                record = json.loads(line)
                iteration = record.get("iteration", 0) + ("val_miou" in record and not validated)
            except (ValueError, AttributeError):
                break                                        # torn by the end of the earlier process
            if iteration <= start:                           # what came after the checkpoint will be logged again
                lines.append(line)
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_text("".join(line + "\n" for line in [*lines, json.dumps(header)]))
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {first_line(error)}") from None

    def write(self, **record):
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {first_line(error)}; --resume auto goes on") from None


class Stop:
    """Ctrl-C and SIGTERM: ask for an end after the step, the same in all processes. A second Ctrl-C leaves at once."""

    def __init__(self, world):
        self.signal, self.since = 0, 0.0
        # Of its own and on the CPU, so that asking every step does not wait for the GPU.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE)) if world > 1 else None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        # One Ctrl-C under torchrun arrives twice, from the terminal and from torchrun, but within a moment.
        if self.signal and number == signal.SIGINT and time.time() - self.since > 1:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self.since = number, time.time()

    def everywhere(self):
        """The signal's number if any process was asked, else 0."""
        if self.group is None:
            return self.signal
        asked = torch.tensor(self.signal)
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.group)
        return asked.item()


# ---------------------------------------------------------------------------------------------------------------------
def train(args):
    rank, world, device = init_distributed(args.device)
    master, out = rank == 0, Path(args.out)
    say = print if master else lambda *a, **k: None
    stop = Stop(world)
    torch.manual_seed(args.seed)

    # data
    if args.batch_size % (world * args.accumulate):
        raise UserError(f"--batch-size {args.batch_size} cannot be shared by {world} processes x --accumulate "
                        f"{args.accumulate}")
    data = training_data(args)
    val_list = Path(args.data_root) / "ImageSets" / "Segmentation" / "val.txt"
    if args.dataset == "folder" and not val_list.exists():
        val = None
        say(f"no validation: there is no list {val_list}")
    else:
        val = build_dataset(args.dataset, args.data_root, context_classes=args.context_classes)
    if args.cache and not data.endless:
        say(f"decoding {len(data)} images to keep them in memory ...", flush=True)
        data = Cached(data, args.workers)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and (not args.resume or any(out.glob("last*.pth"))):
        args.resume = "auto"                                 # torchrun --max-restarts brings a broken job back
    if master:
        prepare_out(args)
    if world > 1:
        dist.barrier()
    checkpoint = find_checkpoint(args, say)
    if checkpoint:
        check_resumable(args, checkpoint, data, say)

    if world > 1:                                                # on several machines each may have an --out of its own
        starts = [None] * world
        dist.all_gather_object(starts, checkpoint["iteration"] if checkpoint else 0)
        if len(set(starts)) > 1:
            raise UserError(f"the processes would go on at different iterations ({starts}): --out must be a folder "
                            "that all machines share")

    # network. Only rank 0 needs weights: DistributedDataParallel hands its to all.
    weights = "none" if checkpoint or args.init or not master else args.weights
    net = build_network(args, len(data.classes), weights)
    if checkpoint:
        net.load_state_dict(checkpoint["model"])
    elif args.init:
        load_init(net, args.init, say)
    net.to(device, memory_format=memory_format(device))
    sync_bn = world > 1 and device.type == "cuda"
    if sync_bn:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    amp = pick_amp(args.amp, device)
    model = torch.compile(net) if args.compile else net          # evaluation uses `net`: its image sizes vary
    if world > 1:
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    optimizer = build_optimizer(net, args.lr)
    start, best, window = 0, 0.0, []                             # window: the losses since the last log line
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        start, best, window = checkpoint["iteration"], checkpoint["best"], list(checkpoint["window"].to(device))

    # what one needs to compare with the paper
    local = args.batch_size // world // args.accumulate
    say(f"recipe   {args.dataset} {args.recipe}: {args.iters} iterations of {args.batch_size} crops of {args.crop} "
        f"pixels ({world} processes x {local} x {args.accumulate} parts), lr {args.lr} poly 0.9, seed {args.seed}")
    em = (f" K={args.num_bases} T={args.em_iterations} lambda={args.lam:g} alpha={args.alpha:g} bases "
          f"{args.base_update}, norm {args.base_norm}, gradient {args.gradient}") if args.attention == "emau" else ""
    say(f"network  {args.backbone}, {args.stem} stem, output stride {args.output_stride} (validation: "
        f"{args.eval_output_stride}), {args.channels} channels, attention {args.attention}{em}"
        f"{', decoder' * args.decoder}")
    say(f"weights  {'the checkpoint' if checkpoint else args.init or net.backbone.weights_origin}")
    say(f"data     {data.name} {data.split}: {'endless' if data.endless else len(data)} images, "
        f"{len(data.classes)} classes; validation: {len(val) if val else 'none'}"
        + (" (images that are trained on, too)" if val and set(data.ids) & set(val.ids) and not data.endless else ""))
    say(f"BN       momentum {args.bn_momentum:g}, " + ("synchronised over the processes" if sync_bn else
        "per process: torch synchronises BN on GPUs only" if world > 1 else "one process"))
    say(f"machine  {world} x {device_name(device)}, {'bfloat16 autocast' if amp else 'float32'}, torch "
        f"{torch.__version__}, torchvision {torchvision.__version__}, python {platform.python_version()}")
    if args.crop % 8 != 1:
        say(f"note     crops of 8k + 1 pixels, as {args.crop // 8 * 8 + 1}, lie on the feature grid as whole images do")
    if args.accumulate > 1:
        say(f"note     bases and BN see micro-batches of {local * world} crops, not the batch of {args.batch_size}")
    if checkpoint:
        say(f"going on at iteration {start}" + (f", with {world} processes, not {checkpoint['world']}: BN's statistics "
            "and rounding will differ" if checkpoint["world"] != world else ""), flush=True)
    config = {"network": net.config | {"output_stride": args.eval_output_stride},
              "data": {"dataset": data.name, "classes": list(data.classes), "images": len(data)},
              "training": vars(args)}
    log = Log(out / "log.jsonl", {"args": vars(args), "torch": torch.__version__, "device": device_name(device),
                                  "world": world}, start, not checkpoint or checkpoint["validated"]) if master else None

    def losses():
        """The losses of the window, averaged over the processes. A loss that is not finite ends the run, everywhere."""
        values = torch.stack(window) if window else torch.zeros(0, device=device)
        if world > 1:
            dist.all_reduce(values)
            values /= world
        if not values.isfinite().all():
            bad = done - len(window) + int(values.isfinite().logical_not().nonzero()[0])
            raise UserError(f"the loss of iteration {bad + 1} is not finite (images {image_ids(data, schedule, bad)}): "
                            "lower --lr or look at these images; --resume auto goes on from the last checkpoint")
        return values

    def save(validated):
        """last.pth: everything to go on. A run that is killed while validating must validate when it goes on."""
        nonlocal window
        window = list(losses())                              # as they are loaded again: averages over the processes
        if not all(p.isfinite().all() for p in net.parameters()):
            raise UserError(f"weights are not finite after iteration {done} (images "
                            f"{image_ids(data, schedule, done - 1)}): lower --lr or look at these images; --resume "
                            "auto repeats from the checkpoint before")
        share_buffers(net)
        if master:
            save_checkpoint({"model": net.state_dict(), "config": config, "optimizer": optimizer.state_dict(),
                             "iteration": done, "best": best, "validated": validated, "world": world,
                             "window": torch.stack(window) if window else torch.zeros(0)}, out / "last.pth", keep=True)

    def validate():
        nonlocal best
        if val:
            net.set_output_stride(args.eval_output_stride)
            result, = evaluate(net, val, device, rank=rank, world=world, workers=args.workers)
            bases = look_at_bases(net, val, device) if master else {}
            net.set_output_stride(args.output_stride)
            best = max(best, result["miou"])
            initial = (1 - args.bn_momentum) ** (done * args.accumulate)
            unsettled = f" | BN statistics are {100 * initial:.0f}% initial" if initial > 0.03 else ""
            if line := note(val, result):
                say(line)
            say(summary(val, result) + unsettled, flush=True)
            if bases:
                say(bases_line(bases, args.num_bases), flush=True)
            if master:
                log.write(iteration=done, best=best, **{"val_" + key: value for key, value in result.items()},
                          **{"bases_" + key: value for key, value in bases.items()})
        if master:
            save_checkpoint({"model": net.state_dict(), "config": config}, out / "model.pth")
        save(validated=True)

    # loop
    schedule = Schedule(data, args.batch_size, args.seed, start, args.iters, rank, world, args.accumulate)
    loader = iter(DataLoader(TrainView(data, args.crop, args.seed), batch_sampler=schedule, num_workers=args.workers,
                             pin_memory=device.type == "cuda", worker_init_fn=set_worker_apart,
                             timeout=PATIENCE if args.workers else 0))

    def step(iteration, lr):
        """One iteration: the loss of this process' part of the batch (a tensor), the seconds spent waiting for data."""
        net.train()
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        # Dropout's randomness is a function of (seed, iteration, rank), so that no state of it has to be saved.
        torch.manual_seed(int(np.random.SeedSequence((args.seed, iteration, rank)).generate_state(1)[0]))
        loss, waited = 0, 0.0
        for part in range(args.accumulate):
            before = time.time()
            batch = next(loader)
            waited += time.time() - before
            last = part == args.accumulate - 1
            with nullcontext() if last or world == 1 else model.no_sync():     # processes exchange gradients once
                part_loss = batch_loss(model, batch, device, amp) / args.accumulate
                part_loss.backward()
            loss = loss + part_loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss, waited                                                    # no .item(): the device need not wait

    def report(loss, lr, pace, waited):
        """The log line; pace: seconds per iteration, waited: those of them spent waiting for data."""
        memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0
        speed = args.batch_size / pace
        say(f"iter {done:6d}/{args.iters} | loss {loss:.4f} | lr {lr:.2e} | {1000 * pace:.0f} ms (data "
            f"{100 * waited / pace:.0f}%) | {speed:.1f} img/s | {f'mem {memory:.1f} GB | ' if memory else ''}"
            f"eta {duration(pace * (args.iters - done))}", flush=True)
        if master:
            log.write(iteration=done, loss=loss, lr=lr, ms=1000 * pace, data_ms=1000 * waited, images_per_second=speed,
                      memory_gb=memory)

    log_every = max(1, min(50, args.iters // 50))
    done = start
    with faults_named(lambda: f" at iteration {done + 1} (images {image_ids(data, schedule, done)})", RESUME):
        if checkpoint and not checkpoint["validated"]:
            validate()
        begun = since = time.time()
        waited, logged = 0.0, start
        for iteration in range(start, args.iters):
            lr = args.lr * (1 - iteration / args.iters) ** 0.9                 # the "poly" policy
            loss, seconds = step(iteration, lr)
            window.append(loss)
            waited, done = waited + seconds, iteration + 1

            if done % log_every == 0 or done == args.iters:
                mean = losses().mean().item()                                  # waits for the device: time is true now
                pace = (time.time() - since) / (done - logged)
                report(mean, lr, pace, waited / (done - logged))
                window, waited, logged, since = [], 0.0, done, time.time()

            now_validate = done % args.eval_every == 0 or done == args.iters
            asked = stop.everywhere()
            if asked or now_validate or done % SAVE_EVERY == 0:
                save(validated=not now_validate)
                if asked:
                    say(f"stopped after iteration {done}, all saved: the same command with --resume auto goes on",
                        flush=True)
                    leave()
                    return 128 + asked
                if now_validate:
                    validate()
                since, logged, waited = time.time(), done, 0.0

    say(f"done in {duration(time.time() - begun)}: wrote {out}/model.pth (the network), {out}/last.pth (to go on) and "
        f"{out}/log.jsonl (the numbers)")
    where = "" if args.dataset in DRAWN else f" --data-root {args.data_root}"
    where += "" if val else f" --split {args.split}"
    say(f"next:    python evaluate.py --ckpt {out}/model.pth{where}\n"
        f"         python visualize.py --ckpt {out}/model.pth{where}")
    leave()


def image_ids(data, schedule, iteration):
    """The ids of a batch's images, for a message."""
    return ", ".join(str(i) if data.endless else str(data.ids[i]) for i in schedule.indices(iteration))


# ---------------------------------------------------------------------------------------------------------------------
# --bench: how fast is every stage here, and how fast the released code's way of doing it?
class WholeImageView(TrainView):
    """The released code's training view: the whole image becomes floating point, is scaled, then cut."""

    def __getitem__(self, key):
        image, raw = self.data.read(key[1])                                    # (3, H, W), (H, W)
        rng = np.random.default_rng(key)
        image, raw = normalise(image[None]), torch.from_numpy(self.data.to_classes(raw, key[1])).float()[None, None]
        size = [max(1, int(side * scale)) for scale in [rng.choice(self.data.scales)] for side in raw.shape[2:]]
        image = F.interpolate(image, size, mode="bilinear", align_corners=True)
        raw = F.interpolate(raw, size, mode="nearest")
        pad = (0, max(0, self.crop - size[1]), 0, max(0, self.crop - size[0]))
        image, raw = F.pad(image, pad)[0], F.pad(raw, pad, value=IGNORE)[0, 0]
        top, left = (int(rng.integers(side - self.crop + 1)) for side in raw.shape)
        crop = slice(top, top + self.crop), slice(left, left + self.crop)
        return image[(slice(None), *crop)].contiguous(), raw[crop].long()


def one_view_at_a_time(net, image, ms_flip):
    """Prediction of the released code's forks: every view alone, its logits brought to full size."""
    total = 0
    for scale in MS_SCALES if ms_flip else (1.0,):
        for mirror in (False, True)[:1 + ms_flip]:
            view = resize(normalise(image[None]), scale)
            h, w = view.shape[2:]
            logits = net(pad(view.flip(3) if mirror else view).contiguous())[:, :, :h, :w]
            logits = F.interpolate(logits, image.shape[1:], mode="bilinear", align_corners=True)
            total = total + (logits.flip(3) if mirror else logits)
    return total[0].argmax(0)


def bench(args, seconds=8):
    """Prints images/s of loader, training step, both, and evaluation, ours beside the released way. The two take turns
    in one process and the medians are compared, because other programs may use the machine as well."""
    device, local = pick_device(args.device), args.batch_size
    amp = pick_amp(args.amp, device)
    data = training_data(args)
    images = [data.read(i)[0].to(device) for i in range(2)]
    keys = iter(Schedule(data, args.batch_size, args.seed, 0, 10**6))
    nets = [build_network(args, len(data.classes), "none").to(device) for _ in range(2)]
    nets[0].to(memory_format=memory_format(device))
    optimizers = [build_optimizer(net, 1e-6) for net in nets]
    views = TrainView(data, args.crop, args.seed), WholeImageView(data, args.crop, args.seed)
    print(f"{device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads | {args.dataset}, crop "
          f"{args.crop}, batch {local} | {args.backbone}, output stride {args.output_stride}\n"
          f"ours: {'bfloat16' if amp else 'float32'}, channels_last; released way: float32, contiguous\n\n"
          f"{'images/s':34s}{'ours':>9s}{'released':>10s}{'ratio':>8s}")

    def row(name, ours, released):
        """Each function does some work and returns the number of images."""
        rates, begun = ([], []), time.time()
        while len(rates[0]) < 3 or time.time() - begun < seconds:              # the first round warms up
            for function, rate in zip((ours, released), rates, strict=True):
                since = time.time()
                count = function()
                if device.type != "cpu":
                    torch.accelerator.synchronize(device)
                rate.append(count / (time.time() - since))
        medians = [float(np.median(rate[1:])) for rate in rates]
        print(f"{name:34s}{medians[0]:9.2f}{medians[1]:10.2f}{medians[0] / medians[1]:8.2f}", flush=True)
        return medians[0]

    def load(view):
        return len([view[key] for key in next(keys)[:8]])

    def step(i, batch):
        if i == 0:
            loss = batch_loss(nets[0].train(), batch, device, amp)
        else:
            loss = segmentation_loss(nets[1].train()(batch[0].to(device)), batch[1].to(device))
        loss.backward()
        optimizers[i].step()
        optimizers[i].zero_grad(set_to_none=True)
        return len(batch[0])

    @torch.no_grad()
    def evaluation(i, ms_flip):
        some = images[:1] if ms_flip else images
        if i == 1:
            return len([one_view_at_a_time(nets[1].eval(), image, ms_flip) for image in some])
        for batch in batches([(i, image, None) for i, image in enumerate(some)], ms_flip):
            for logits in predict_batch(nets[0].eval(), [image for _, image, _ in batch], ms_flip, amp=amp)[0]:
                logits.max(0)
        return len(some)

    crops = torch.utils.data.default_collate([views[0][key] for key in next(keys)])
    floats = normalise(crops[0], crops[2]), crops[1]                           # the released loader's work
    supply = row("loading, one core", lambda: load(views[0]), lambda: load(views[1]))
    if args.cache and not data.endless:
        cached = TrainView(Cached(data, args.workers), args.crop, args.seed)
        row("loading, one core, --cache", lambda: load(cached), lambda: load(views[1]))
    demand = row("training step, data at hand", lambda: step(0, crops),
                 lambda: step(1, floats))
    loaders = [iter(DataLoader(view, batch_sampler=Schedule(data, local, args.seed, 0, 10**6), num_workers=args.workers,
                               pin_memory=device.type == "cuda")) for view in views]
    row(f"training with {args.workers} workers for each", lambda: step(0, next(loaders[0])),
        lambda: step(1, next(loaders[1])))
    loaders.clear()                                                            # ends their workers
    for net in nets:
        net.set_output_stride(args.eval_output_stride)
    for ms_flip, name in ((False, "evaluation, single scale"), (True, "evaluation, ms-flip")):
        row(name + ", bf16" * bool(amp), functools.partial(evaluation, 0, ms_flip),
            functools.partial(evaluation, 1, ms_flip))
    print(f"\nThe training step limits: one core loads {supply / demand:.1f} times what it takes." if supply > demand
          else f"\nLoading limits: the step takes what {demand / supply:.1f} cores load; --workers "
          f"{int(demand / supply) + 1} or more, or --cache.")


def device_name(device):
    """The name of the GPU or processor, for the record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def main():
    args = parse_args()
    try:
        with faults_named(remedy=RESUME):
            return bench(args) if args.bench else train(args)
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory ran out ({first_line(error)}): --accumulate 2 halves what a step needs, "
                        "--crop and --output-stride 16 lower it as well") from None


if __name__ == "__main__":
    run(main)
