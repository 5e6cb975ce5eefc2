"""What the bases of trained networks do, in numbers (Sec. 6.5), and mIoU by the number of EM rounds (Fig. 4).

    python -m extras.bases --ckpt out/voc/model.pth
    python -m extras.bases --ckpt out/*/model.pth --em-iterations 1 2 3 4 8 16

Shapes: B images, C channels, N pixels of the feature map, K bases.
"""
import argparse

import torch
import torch.nn.functional as F

from backbone import UserError
from data import DATASETS, normalise
from ema import EMAU, load_checkpoint
from evaluate import evaluate, layout, open_dataset, pad, pick_amp, pick_device, run


@torch.no_grad()
def base_statistics(emau, x):
    """What the bases do on pixels x (B, N, C), after T rounds, averaged over the images. Python floats:

    length      mean |x|: together with lambda the temperature of Eq. 12
    perplexity  exp of the entropy of z, mean over pixels: how many bases a pixel is shared by, 1..K
    used        bases that are the largest of some pixel, 1..K
    cosine      mean cosine between two bases
    rank        effective rank of the centred X~: exp of the entropy of its eigenvalues' shares of the variance
    """
    z, mu = (each.cpu() for each in list(emau.em(x))[-1])                      # (B, N, K), (B, C, K)  the last round's
    K = mu.shape[2]
    entropy = -(z * z.clamp_min(1e-30).log()).sum(2)                           # (B, N)
    unit = F.normalize(mu, dim=1)                                              # (B, C, K)
    cosines = unit.transpose(1, 2) @ unit                                      # (B, K, K)
    # r mu^T has the spectrum of X~ less its mean, and is small. On the CPU: not every device has a QR decomposition.
    _, r = torch.linalg.qr(z - z.mean(1, keepdim=True), mode="r")              # (B, K, K)
    share = torch.linalg.svdvals(r @ mu.transpose(1, 2)) ** 2                  # (B, K)
    share = share / share.sum(1, keepdim=True).clamp_min(1e-30)                # (B, K)
    return {"length": x.norm(dim=2).mean().item(), "perplexity": entropy.exp().mean().item(),
            "used": sum(len(k.unique()) for k in z.argmax(2)) / len(z),
            "cosine": ((cosines.sum((1, 2)) - K) / (K * max(K - 1, 1))).mean().item(),
            "rank": (-(share * share.clamp_min(1e-30).log()).sum(1)).exp().mean().item()}


@torch.no_grad()
def pixels_of(net, image):
    """What enters EM, of one image uint8 (3, H, W) on the network's device: (1, N, C)."""
    features = net.features(pad(normalise(image[None]), net.config["output_stride"]))      # (1, C, h, w)
    return net.attention.pixels(features)                                                  # (1, N, C)


def mean_statistics(net, data, device, count=16):
    """base_statistics of a network in eval mode, averaged over the first `count` images of a data set."""
    each = []
    for i in range(min(count, len(data))):
        x = pixels_of(net, data[i][0].to(device))                              # (1, N, C)
        if not x.isfinite().all():
            raise UserError(f"the features of {data.ids[i]} are not finite: the training of this network diverged")
        each.append(base_statistics(net.attention, x))
    return {key: sum(e[key] for e in each) / len(each) for key in each[0]}


def statistics_line(bases, num_bases):
    """The numbers of mean_statistics in a line, with a warning where the attention does nothing."""
    line = (f"bases | |x| {bases['length']:.1f} | perplexity of z {bases['perplexity']:.1f} of {num_bases} | "
            f"{bases['used']:.0f} in use | cosine {bases['cosine']:.2f} | effective rank {bases['rank']:.1f}")
    if bases["rank"] < min(3, num_bases / 2) or bases["perplexity"] > 0.75 * num_bases:
        line += ("\nwarning: the attention is nearly dead, or the task a simple one: all pixels get about the same "
                 "mixture of bases (--gradient full lets it learn more)")
    return line


def rounds_table(rows, iterations):
    """Fig. 4: mIoU by T in training (rows) and in evaluation (columns); rows: (path, T in training, mIoUs 0..1)."""
    lines = [f"  {'mIoU at T =':18s}" + "".join(f"{T:>8}" for T in iterations)]
    lines += [f"  {f'trained at T = {T}':18s}" + "".join(f"{100 * miou:8.2f}" for miou in mious) + f"   {path}"
              for path, T, mious in rows]
    return "\n".join(lines)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, nargs="+", help="model.pth of train.py, or a released checkpoint; one or several")
    add("--dataset", choices=DATASETS, help="data set (default: the one the checkpoint was trained on)")
    add("--data-root", default="datasets", help="folder that holds the data set (default: datasets)")
    add("--split", help="list of images (default: the data set's for validation)")
    add("--count", type=int, default=16, help="images to take the statistics of (default: 16)")
    add("--em-iterations", type=int, nargs="+", metavar="T", help="print mIoU with these numbers of EM rounds as well")
    add("--amp", choices=("auto", "bf16", "off"), default="off", help="for mIoU: bfloat16 autocast (default: off)")
    add("--workers", type=int, default=2, help="for mIoU: processes that decode ahead (default: 2)")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu) or a torch device")
    args = parser.parse_args(argv)
    for name, value, least in (("count", args.count, 1), ("workers", args.workers, 0),
                               ("em-iterations", min(args.em_iterations or [1]), 1)):
        if value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    return args


def main(argv=None):
    args = parse_args(argv)
    nets = [load_checkpoint(path) for path in args.ckpt]
    for path, net in zip(args.ckpt, nets, strict=True):
        if not isinstance(net.attention, EMAU):
            raise UserError(f"{path}: has attention {net.config['attention']}, without bases and EM rounds")
    if not args.dataset and len(names := {net.trained_on.get("dataset", "unknown") for net in nets}) > 1:
        raise UserError(f"the checkpoints are of {' and '.join(sorted(names))}: --dataset says what to look at")
    data = [open_dataset(args, net) for net in nets][-1]             # opened for each: every class count has to fit
    if args.em_iterations and not data.labelled:
        raise UserError(f"{data.name} {data.split} has no labels to score by")
    device, rows = pick_device(args.device), []
    for path, net in zip(args.ckpt, nets, strict=True):
        net.to(device, memory_format=layout(device))
        print(f"{path} | {data.name} {data.split}\n"
              f"{statistics_line(mean_statistics(net, data, device, args.count), net.config['num_bases'])}", flush=True)
        mious = []
        for T in args.em_iterations or ():
            net.attention.iterations = T
            result = evaluate(net, data, device, amp=pick_amp(args.amp, device), workers=args.workers)
            mious.append(result["miou"])
        rows.append((path, net.config["em_iterations"], mious))
        net.cpu()                                                    # room for the next one
    if args.em_iterations:
        print(rounds_table(rows, args.em_iterations))


if __name__ == "__main__":
    run(main)
