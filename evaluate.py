"""Evaluates a checkpoint by the paper's protocol: whole images, output stride 8, mIoU over one confusion matrix.

    python evaluate.py --ckpt out/voc/model.pth                        # single scale
    python evaluate.py --ckpt out/voc/model.pth --ms-flip              # six scales, each with its mirror image
    torchrun --nproc_per_node=4 evaluate.py --ckpt out/voc/model.pth   # every image still counts exactly once

Shapes: H x W pixels of one image, L classes.
"""
import argparse
import functools
import math
import os
import re
import tarfile
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # before torch: threads that spin starve the loader's workers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader

from backbone import UserError, first_line
from data import (
    CELL_SHIFTS,
    DATASETS,
    build_dataset,
    memory_format,
    normalise,
    palette_of,
    pick_device,
    run,
    save_index_png,
    set_worker_apart,
    to_device,
)
from ema import EMAU, base_statistics, full_precision, load_checkpoint

PATIENCE = 600                                          # seconds after which a process that hangs ends the job
BATCH_PIXELS = 2 ** 20                                  # of the images that go through the network together
MS_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)           # of two forks of the released code, which itself has none


# ---------------------------------------------------------------------------------------------------------------------
# Inference and the metric
def predict(net, image, ms_flip=False):
    """Logits of one whole image: uint8 (3, H, W) on the network's device -> float (L, H, W).

    With ms_flip the sum of the logits over MS_SCALES and both mirrorings.
    """
    return predict_batch(net, [image], ms_flip)[0][0]


@torch.no_grad()
def predict_batch(net, images, ms_flip=False, iterations=(None,), amp=None):
    """As predict, for images that padding makes equally large at every scale (equal `padded_sizes`), and for several
    numbers T of EM rounds on the same features: a list per T of lists per image of logits (L, H, W)."""
    totals, own = [[0] * len(images) for _ in iterations], getattr(net.attention, "iterations", None)
    originals = [normalise(image[None]) for image in images]                   # (1, 3, H, W) each
    for scale in MS_SCALES if ms_flip else (1.0,):
        views = [resize(image, scale) for image in originals]                  # (1, 3, h, w) each
        if ms_flip:
            views += [view.flip(3) for view in views]
        views = torch.cat([pad(view) for view in views])                       # (B or 2B, 3, 8k+1, 8l+1)
        with torch.autocast(views.device.type, amp, enabled=amp is not None):
            features = net.features(views)                                     # (B or 2B, C, k+1, l+1) at stride 8
            for T, total in zip(iterations, totals, strict=True):
                if T is not None:
                    net.attention.iterations = T
                logits = net.head(features)                                    # (B or 2B, L, k+1, l+1)
                with full_precision(logits):
                    for i, image in enumerate(originals):
                        h, w = (upsampling(k, padded, side, scale, logits.device) for k, padded, side in
                                zip(logits.shape[2:], views.shape[2:], image.shape[2:], strict=True))
                        wide = logits[i] @ w                                   # (L, k+1, W)
                        if ms_flip:
                            wide = wide + logits[len(images) + i] @ w.flip(1)              # un-mirrored
                        total[i] = total[i] + h.T @ wide                       # (L, H, W)
    if own is not None:
        net.attention.iterations = own
    return totals


def resize(image, scale):
    """A view of the multi-scale protocol: normalised image (1, 3, H, W) -> (1, 3, h, w)"""
    size = [view_side(side, scale) for side in image.shape[2:]]
    return image if scale == 1 else F.interpolate(image, size, mode="bilinear", align_corners=True)


def view_side(side, scale):
    """Pixels of a view along an image's side."""
    return max(1, int(side * scale))


def pad(images):
    """Zeros at the right and bottom up to 8k + 1 pixels, so that align_corners puts every feature (of output stride 8)
    on a pixel: (B, 3, H, W) -> (B, 3, 8k+1, 8l+1). The padding takes part in EM, as in the released code."""
    return F.pad(images, (0, -(images.shape[3] - 1) % 8, 0, -(images.shape[2] - 1) % 8))


def padded_sizes(size, ms_flip):
    """The sizes of an image's views after padding: images that agree in them can go through the network together."""
    return tuple((view_side(side, scale) + 6) // 8 * 8 + 1 for scale in (MS_SCALES if ms_flip else (1.0,))
                 for side in size)


def batches(pairs, ms_flip):
    """Collects (index, image, label) into lists that can go through the network together."""
    waiting = {}                                                               # padded sizes -> list of pairs
    for pair in pairs:
        key = padded_sizes(pair[1].shape[1:], ms_flip)
        waiting.setdefault(key, []).append(pair)
        if (len(waiting[key]) + 1) * pair[1][0].numel() > BATCH_PIXELS:
            yield waiting.pop(key)
        elif sum(map(len, waiting.values())) >= 64:                            # of many sizes: memory stays bounded
            yield waiting.pop(max(waiting, key=lambda k: len(waiting[k])))
    yield from waiting.values()


@functools.lru_cache(256)
def upsampling(k, padded, side, scale, device):
    """One axis of the way from a view's logits back to the image, as a matrix (k, side): k logits are interpolated to
    the padded view, the padding is cut off, the rest interpolated to the image. One product takes both steps at once,
    and the mirror image's rows join in before the second axis: exact, and cheaper than full-size logits per view."""
    matrix = F.interpolate(torch.eye(k)[None], padded, mode="linear", align_corners=True)  # (1, k, padded)
    matrix = matrix[:, :, :view_side(side, scale)]                                         # (1, k, view)
    return F.interpolate(matrix, side, mode="linear", align_corners=True)[0].to(device)    # (k, side)


def confusion_matrix(prediction, label, num_classes):
    """Counts int64 (L, L): rows the label's class, columns the predicted one. Label 255 does not count."""
    # Ignored pixels are counted too, in rows L..255, and cut off: cheaper than picking the others out by a mask.
    cells = label.flatten().long() * num_classes + prediction.flatten()        # (H * W,)
    return torch.bincount(cells, minlength=256 * num_classes)[:num_classes ** 2].view(num_classes, num_classes)


def scores(confusion):
    """mIoU, pixel accuracy, mean accuracy (0..1), IoU and accuracy per class (L,) of a confusion matrix (L, L).

    A class that occurs neither in the labels nor in the predictions has IoU nan and does not count in the mean.
    """
    confusion = confusion.cpu().double()
    hits, labelled, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)       # (L,) each
    iou = hits / (labelled + predicted - hits)                                             # (L,)
    return {"miou": iou.nanmean().item(), "pixacc": (hits.sum() / labelled.sum()).item(),
            "macc": (hits / labelled).nanmean().item(), "iou": iou.tolist(), "acc": (hits / labelled).tolist()}


@torch.no_grad()
def evaluate(net, data, device, ms_flip=False, rank=0, world=1, workers=2, save_png=None, progress=False,
             iterations=(None,), amp=None):
    """Scores a network on a whole data set: a list of one dict, `scores` and `images`, `seconds`; or of one for every
    number T of EM rounds in `iterations`. Leaves `net` in eval mode.

    Of `world` processes each takes every world-th image; the matrices are summed, so each image counts exactly once.
    save_png: a folder for the predictions (at the last T) as index PNGs of the original size. amp: see pick_amp.
    """
    net.eval()
    mine, start, L = range(rank, len(data), world), time.time(), len(data.classes)
    confusion = torch.zeros(len(iterations), L, L, dtype=torch.int64, device=device)
    loader = DataLoader(data, batch_size=None, sampler=mine, num_workers=min(workers, len(mine)),
                        pin_memory=device.type == "cuda", worker_init_fn=set_worker_apart,
                        timeout=PATIENCE if workers and mine else 0)
    pairs = ((i, *pair) for i, pair in zip(mine, loader, strict=True))
    seen, reported = 0, start
    for batch in batches(pairs, ms_flip):
        indices, images, labels = zip(*batch, strict=True)
        images, labels = ([to_device(each, device) for each in pair] for pair in (images, labels))
        for matrix, logits in zip(confusion, predict_batch(net, images, ms_flip, iterations, amp), strict=True):
            predictions = [each.max(0)[1] for each in logits]                  # (H, W) each; max is faster than argmax
            for prediction, label in zip(predictions, labels, strict=True):
                matrix += confusion_matrix(prediction, label, L)
        if save_png:
            for i, prediction in zip(indices, predictions, strict=True):
                path = Path(save_png) / f"{data.ids[i]}.png"
                save_index_png(prediction.cpu().numpy(), path, palette_of(data.classes))
        seen += len(batch)
        if progress and time.time() - reported > 5:
            reported = time.time()
            rate = seen / (reported - start)
            print(f"  {seen * world}/{len(data)} images | {rate * world:.1f} img/s"
                  f" | eta {duration((len(mine) - seen) / rate)}", flush=True)
    seen = torch.tensor(seen, device=device)
    if world > 1:
        dist.all_reduce(confusion)
        dist.all_reduce(seen)
    assert seen == len(data), f"{seen} images evaluated, {len(data)} in the data set"
    return [{**scores(matrix), "images": len(data), "seconds": time.time() - start} for matrix in confusion]


@torch.no_grad()
def look_at_bases(net, data, device, count=16):
    """What the bases do on the first `count` images (Sec. 6.5 in numbers): ema.base_statistics, averaged. {} if there
    are none."""
    if not isinstance(net.attention, EMAU):
        return {}
    net.eval()
    each = []
    for i in range(min(count, len(data))):
        features = net.features(pad(normalise(data[i][0][None].to(device))))   # (1, C, h, w)
        if not features.isfinite().all():
            return {}                                                          # a run that diverges: its loss says so
        each.append(base_statistics(net.attention, net.attention.pixels(features)))
    return {key: sum(e[key] for e in each) / len(each) for key in each[0]}


def bases_line(bases, num_bases):
    """The numbers of look_at_bases in a line, with a warning where the attention does nothing."""
    line = (f"bases | |x| {bases['length']:.1f} | perplexity of z {bases['perplexity']:.1f} of {num_bases} | "
            f"{bases['used']:.0f} in use | cosine {bases['cosine']:.2f} | effective rank {bases['rank']:.1f}")
    if bases["rank"] < min(3, num_bases / 2) or bases["perplexity"] > 0.75 * num_bases:
        line += ("\nwarning: the attention is nearly dead, or the task a simple one: all pixels get about the same mixture of "
                 "bases (--gradient full lets it learn more)")
    return line


def summary(data, result, ms_flip=False):
    """The line that ends every evaluation. Percentages."""
    return (f"eval {data.name} {data.split} {'ms-flip' if ms_flip else 'ss'} | mIoU {100 * result['miou']:.2f} | "
            f"pixAcc {100 * result['pixacc']:.2f} | mAcc {100 * result['macc']:.2f} | {result['images']} images | "
            f"{result['seconds']:.0f} s")


def rounds_table(table, iterations):
    """Fig. 4: mIoU by T in training (rows) and in evaluation (columns); table: (path, T in training, mIoUs 0..1)."""
    lines = [f"  {'mIoU at T =':18s}" + "".join(f"{T:>8}" for T in iterations)]
    lines += [f"  {f'trained at T = {T}':18s}" + "".join(f"{100 * miou:8.2f}" for miou in mious) + f"   {path}"
              for path, T, mious in table]
    return "\n".join(lines)


def note(data, result):
    """A line on what a score means, for the data sets where one has to know; else None."""
    if data.name in CELL_SHIFTS:
        one, twenty = (50 + 50 * math.erf(CELL_SHIFTS[data.name] / 2 * math.sqrt(n / 2)) for n in (1, 20))
        return (f"  striped cells: {50 * sum(result['acc'][:2]):.1f}% right, of which 50% is chance; the brightness of one "
                f"cell tells {one:.0f}%, that of twenty {twenty:.0f}%")
    if data.name != "context":
        return None
    if len(data.classes) == 60:
        return "  60 classes: everything else is learned and scored as a class of its own"
    return (f"  59 classes, everything else ignored. EncNet and its followers print mIoU x 59/60, here "
            f"{100 * result['miou'] * 59 / 60:.2f}, as '60 classes'; the paper does not say which of these its 53.1 is")


def pack_submission(data, folder, path):
    """The predictions as VOC's test server wants them. comp6: trained on more than VOC's own segmentation data."""
    with tarfile.open(path, "w:gz") as archive:
        for name in data.ids:
            archive.add(Path(folder) / f"{name}.png", f"results/VOC2012/Segmentation/comp6_test_cls/{name}.png")
    print(f"wrote {path}: {len(data)} predictions, to upload at http://host.robots.ox.ac.uk:8080")


def duration(seconds):
    """3h18m, 4m05s or 12s."""
    m, s = divmod(round(seconds), 60)
    return f"{m // 60}h{m % 60:02d}m" if m >= 60 else f"{m}m{s:02d}s" if m else f"{s}s"


@contextmanager
def faults_named(where=lambda: "", remedy=""):
    """Makes one line of what others do to this process: a data-loader worker or another process that dies or hangs."""
    try:
        yield
    except RuntimeError as error:
        if re.search(r"DataLoader (worker \(pid|timed out)", str(error)):
            raise UserError(f"a data-loader worker died or hung{where()}: {first_line(error)}. If memory ran out, "
                            f"use fewer --workers{remedy}") from None
        lost = re.search("gloo|nccl|connection|timed out|timeout", str(error), re.IGNORECASE)
        if lost and "WORLD_SIZE" in os.environ:
            raise UserError(f"another process of the job died or hung for {PATIENCE} s ({first_line(error)}): its own "
                            f"message says why{remedy}") from None
        raise


def init_distributed(device_name):
    """rank, world size and device of this process: of torchrun's group, which is joined here, or of a lone process."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, pick_device(device_name)
    device, local = pick_device(device_name), int(os.environ["LOCAL_RANK"])
    if device.type == "mps":
        raise UserError("several processes cannot share mps: use --device cpu, or one process")
    if device.type == "cuda":
        if local >= (count := torch.cuda.device_count()) > 1:          # where every process sees one alone, it takes it
            raise UserError(f"there are {count} GPUs: torchrun --nproc_per_node={count} at most")
        device = torch.device("cuda", local % count)
        torch.cuda.set_device(device)
    # Under torchrun --max-restarts the store outlives the processes. Each start gets a part of its own, or gloo would
    # look for those that died at the addresses they left there.
    timeout = timedelta(seconds=PATIENCE)
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                            timeout=timeout)
    return rank, world, device


def leave():
    """Ends a distributed run. Nobody leaves while another still talks to it: torch 2.10's gloo can hang then."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def pick_amp(choice, device):
    """bfloat16 where the hardware computes with it, else None. It needs no gradient scaler, as float16 would."""
    fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
            device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
    return torch.bfloat16 if choice == "bf16" or choice == "auto" and fast else None


# ---------------------------------------------------------------------------------------------------------------------
def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, nargs="+", help="model.pth of train.py, or a released checkpoint; "
                        "several are compared")
    parser.add_argument("--dataset", choices=DATASETS, help="data set (default: the one the checkpoint was trained on)")
    parser.add_argument("--data-root", default="datasets", help="folder that holds the data set (default: datasets)")
    parser.add_argument("--split", help="list of images to evaluate (default: the data set's for validation)")
    parser.add_argument("--ms-flip", action="store_true", help="six scales and their mirror images (paper: MS + Flip)")
    parser.add_argument("--output-stride", type=int, help="8, 16 or 32 (default: the checkpoint's, 8 in the paper)")
    parser.add_argument("--em-iterations", type=int, nargs="+", metavar="T", help="evaluate with these numbers of EM "
                        "rounds, in one pass over the images (default: the checkpoint's)")
    parser.add_argument("--amp", choices=("auto", "bf16", "off"), default="off", help="bfloat16 autocast: faster, mIoU "
                        "moves in the second decimal (default: off)")
    parser.add_argument("--bases", action="store_true", help="say what the bases do: their use, spread and rank")
    parser.add_argument("--save-png", metavar="DIR", help="write the predictions there as index PNGs, original size")
    parser.add_argument("--submission", metavar="FILE", help="write the predictions of --split test as a .tar.gz "
                        "for VOC's test server (and as PNGs into FILE_png/)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode ahead (default: 2)")
    parser.add_argument("--device", default="auto", help="auto (cuda, then mps, then cpu) or a torch device")
    args = parser.parse_args()
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: must be at least 0")
    if args.em_iterations and min(args.em_iterations) < 1:
        raise UserError(f"--em-iterations {min(args.em_iterations)}: at least one round is needed")
    return args


def open_dataset(args, net):
    """The data set of the command line, or else of the checkpoint; UserError where the two do not fit together."""
    name = args.dataset or net.data.get("dataset")
    if name not in DATASETS:
        raise UserError("the checkpoint does not say what it was trained on: add --dataset, e.g. --dataset voc")
    data = build_dataset(name, args.data_root, args.split, 60 if net.config["num_classes"] == 60 else 59)
    if len(data.classes) != net.config["num_classes"]:
        raise UserError(f"the checkpoint has {net.config['num_classes']} classes, {name} has {len(data.classes)}: "
                        "they cannot be compared")
    if net.data.get("classes", list(data.classes)) != list(data.classes):
        raise UserError(f"the checkpoint's classes have other names, or another order, than those of {name} in "
                        f"{args.data_root}: scores would mean nothing")
    return data


def open_network(path, args):
    """The network of a checkpoint, as the command line wants it."""
    net = load_checkpoint(path)
    if args.output_stride:
        net.set_output_stride(args.output_stride)
    if args.em_iterations and not isinstance(net.attention, EMAU):
        raise UserError(f"--em-iterations: {path} has attention {net.config['attention']}, which has no EM rounds")
    return net


def main():
    with faults_named():
        evaluate_checkpoints(parse_args())


def evaluate_checkpoints(args):
    nets = [open_network(path, args) for path in args.ckpt]
    if not args.dataset and len(names := {net.data.get("dataset", "unknown") for net in nets}) > 1:
        raise UserError(f"the checkpoints are of {' and '.join(sorted(names))}: --dataset says what to score them on")
    data = [open_dataset(args, net) for net in nets][-1]          # opened for each: every class count has to fit
    if args.submission:
        if (data.name, data.split) != ("voc", "test") or not args.submission.endswith((".tar.gz", ".tgz")):
            raise UserError(f"--submission {args.submission}: is a .tar.gz of --dataset voc --split test")
        args.save_png = args.save_png or args.submission.removesuffix(".tar.gz").removesuffix(".tgz") + "_png"
    if not (data.labelled or args.save_png):
        raise UserError(f"{data.name} {data.split} has no labels to score by: --save-png DIR writes the predictions")
    if args.save_png:
        if len(nets) > 1:
            raise UserError("--save-png and --submission take the predictions of one checkpoint, not of several")
        Path(args.save_png).mkdir(parents=True, exist_ok=True)
    rank, world, device = init_distributed(args.device)
    say = print if rank == 0 else lambda *a, **k: None
    table = []
    for path, net in zip(args.ckpt, nets, strict=True):
        net.to(device, memory_format=memory_format(device))
        say(f"{path} | {net.config['backbone']}, output stride {net.config['output_stride']} | {data.name} "
            f"{data.split}, {len(data)} images | {world} x {device}, torch {torch.__version__}", flush=True)
        results = evaluate(net, data, device, args.ms_flip, rank, world, args.workers, args.save_png, rank == 0,
                           args.em_iterations or (None,), pick_amp(args.amp, device))
        rounds = net.config["em_iterations"] if isinstance(net.attention, EMAU) else "-"
        table.append((path, rounds, [result["miou"] for result in results]))
        if args.bases and rank == 0 and (bases := look_at_bases(net, data, device)):
            print(bases_line(bases, net.config["num_bases"]))
        net.cpu()
    result = results[-1]
    if rank == 0 and args.submission:
        pack_submission(data, args.save_png, args.submission)
    if rank == 0 and data.labelled:
        if len(nets) > 1:
            print(f"{args.ckpt[-1]}:")
        for name, iou in zip(data.classes, result["iou"], strict=True):
            print(f"  {name:20s} " + ("     -  (does not occur)" if math.isnan(iou) else f"{100 * iou:6.2f}"))
        if args.em_iterations or len(nets) > 1:
            print(rounds_table(table, args.em_iterations or ["own"]))
        if line := note(data, result):
            print(line)
        print(summary(data, result, args.ms_flip))
    elif rank == 0:
        print(f"wrote {len(data)} predictions to {args.save_png} (no labels to score them by)")
    leave()


if __name__ == "__main__":
    run(main)
