"""What the bases of trained networks do, in numbers, and mIoU by the EM rounds (Fig. 4).

    python -m extras.bases --ckpt out/voc/model.pth
    python -m extras.bases --ckpt out/*/model.pth --em-iterations 1 2 3 4 8 16

Shapes: B images, C channels, N pixels of the feature map, K bases.
"""
import argparse
import sys

import torch

from data import DATASETS, normalise
from ema import EMAU, load_checkpoint
from evaluate import evaluate, init_process, open_dataset, pad, positive, run


@torch.no_grad()
def base_statistics(emau, x):
    """What the bases do on the pixels x (B, N, C), averaged over the images:

    used        bases that are the largest of some pixel, 1..K
    perplexity  exp of the entropy of z, mean over pixels: how many bases share a pixel, 1..K
    rank        effective rank of the centred X~ = z mu^T: exp of the entropy of the shares that
                its directions have in the variance
    """
    z, mu = (part.cpu() for part in emau.em(x, emau.iterations))  # (B, N, K), (B, C, K)
    entropy = -(z * z.clamp_min(1e-30).log()).sum(2)  # (B, N)
    # With centred z = q r, the small r mu^T has the singular values of the centred X~.
    _, r = torch.linalg.qr(z - z.mean(1, keepdim=True), mode="r")  # (B, K, K)
    share = torch.linalg.svdvals(r @ mu.transpose(1, 2)) ** 2  # (B, K)
    share = share / share.sum(1, keepdim=True).clamp_min(1e-30)  # (B, K)
    rank = -(share * share.clamp_min(1e-30).log()).sum(1)  # (B,)
    return {"used": sum(len(bases.unique()) for bases in z.argmax(2)) / len(z),
            "perplexity": entropy.exp().mean().item(), "rank": rank.exp().mean().item()}


@torch.no_grad()
def mean_statistics(net, data, device, count=16):
    """base_statistics of a network in eval mode, averaged over the first images of a data set."""
    each = []
    for i in range(min(count, len(data))):
        image = normalise(data[i][0][None].to(device))  # (1, 3, H, W)
        features = net.features(pad(image, net.output_stride))  # (1, C, h, w)
        x = net.attention.conv1(features).flatten(2).transpose(1, 2)  # (1, N, C)
        each.append(base_statistics(net.attention, x))
    return {key: sum(e[key] for e in each) / len(each) for key in each[0]}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage="bases.py --ckpt FILE... [flags, see --help]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", dest="paths", required=True, nargs="+", help="model.pth of one or several runs")
    add("--dataset", choices=DATASETS, help="default: the one each was trained on")
    add("--data-root", default="datasets", help="folder of the data set, default: datasets")
    add("--split", help="list of images, default: the one for validation")
    add("--em-iterations", type=positive, nargs="+", default=[], metavar="T",
        help="print mIoU with these numbers of EM rounds, too")
    add("--workers", type=int, default=2, help="processes that decode ahead, default: 2")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device = init_process(args.device)
    for path in args.paths:
        net, args.ckpt = load_checkpoint(path), path
        if not isinstance(net.attention, EMAU):
            sys.exit(f"error: {path} has no EMAU, so it has no bases")
        data = open_dataset(args, net)
        if args.em_iterations and data.labels is None:
            sys.exit(f"error: {data.name} {data.split} has no labels for --em-iterations")
        net.to(device, memory_format=torch.channels_last)
        found, K = mean_statistics(net, data, device), net.attention.mu.shape[2]
        print(f"{path} | {data.name} {data.split} | {found['used']:.1f} of {K} bases in use | "
              f"{found['perplexity']:.1f} share a pixel | effective rank {found['rank']:.1f}")
        if args.em_iterations:
            row = f"  trained at T = {net.attention.iterations:<3d}"
            for net.attention.iterations in args.em_iterations:
                miou = evaluate(net, data, device, workers=args.workers)["miou"]
                row += f"{100 * miou:8.2f}"
            print(f"  mIoU at T =       {''.join(f'{T:8d}' for T in args.em_iterations)}\n{row}")


if __name__ == "__main__":
    run(main)
