"""Is this the released method? Compares numbers with a clone of the released code, on the CPU.

    git clone https://github.com/XiaLiPKU/EMANet ../EMANet
    python -m extras.parity --released ../EMANet

Both networks (ResNet-50, deep stem, decoder, stride 8) get the same weights and drawn scenes, in
float64. A row is a quantity and its largest difference, relative to its largest value. The last
line is the worst; above BOUND the exit status is 1.
"""
import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from torch import nn
from torch.utils.data import default_collate

import evaluate
import train
from data import TrainView, build_dataset, normalise
from ema import EMANet
from extras.released import convert

BOUND, CROP, BATCH, STEPS, LR = 1e-7, 97, 2, 20, 0.009
GROUPS = (("1x", 1, 1e-4), ("1y", 1, 0), ("2x", 2, 0))     # theirs: name, share of lr, decay
CPU = torch.device("cpu")


def load_released(folder):
    """The released modules network, dataset and train, under names that do not hide ours."""
    # BN is the only thing that is exchanged: theirs is for GPUs. Their logging is left out.
    stand_ins = {name: ModuleType(name) for name in ("bn_lib", "bn_lib.nn", "bn_lib.nn.modules",
                                                     "tensorboardX")}
    stand_ins["bn_lib.nn.modules"].SynchronizedBatchNorm2d = nn.BatchNorm2d
    stand_ins["bn_lib.nn.modules"].patch_replication_callback = stand_ins["tensorboardX"]
    stand_ins["tensorboardX"].SummaryWriter = None
    found = []
    with mock.patch.dict(sys.modules, stand_ins):
        for name in ("settings", "network", "dataset", "train"):
            path = Path(folder, f"{name}.py")
            if not path.is_file():
                raise FileNotFoundError(f"no {path}: --released takes a clone of the released code")
            spec = importlib.util.spec_from_file_location(name, path)
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found.append(module)
    return found[1:]


def build_pair(network):
    """Their network and ours with the same weights, in float64."""
    torch.manual_seed(0)
    with mock.patch("torch.load", lambda path: {}):         # in the place of the ImageNet weights
        theirs = network.EMANet(21, 50).double()
    # A randomly initialised ResNet-50 is chaotic: rounding grows to 0.1 in five steps. With small
    # last gammas in its blocks it is not.
    for name, p in theirs.named_parameters():
        if name.endswith("bn3.weight"):
            p.data *= 0.2
    ours = convert(theirs.state_dict())
    net = EMANet(**ours["network"]).double()
    net.load_state_dict(ours["model"])
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 3e-4
    return theirs, net


def batches(count):
    """Crops of drawn scenes, uint8 (B, 3, crop, crop), and labels (B, crop, crop) with stripes that
    are ignored."""
    view = TrainView(build_dataset("scenes", split="train"), CROP, seed=0)
    for i in range(count):
        images, labels = default_collate([view[i, BATCH * i + n] for n in range(BATCH)])
        labels[:, :, ::7] = 255
        yield images, labels


def difference(pairs):
    """The largest difference of pairs of tensors, each relative to its largest value."""
    return max(((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item() for a, b in pairs)


def compare_evaluation(dataset, theirs, net):
    """Logits of a batch, and of whole images of odd sizes; in eval mode."""
    images = double(next(batches(1))[0])  # (B, 3, crop, crop)
    yield "logits, evaluation", difference([(theirs(images), net(images))])
    for size in ((97, 97), (90, 75), (64, 129)):
        image = build_dataset("scenes")[0][0][:, :size[0], :size[1]]  # (3, H, W)
        padded, _ = dataset.pad_inf(double(image[None]))  # (1, 3, H', W')
        logits = theirs(padded)[0, :, :size[0], :size[1]]  # (L, H, W)
        yield (f"logits of a whole image, {size[0]}x{size[1]}",
               difference([(logits, evaluate.predict(net, image))]))


def compare_training(module, theirs, net):
    """Loss, gradients and everything that training changes, after one step and after twenty."""
    groups = [{"params": list(module.get_params(theirs, key)), "lr": scale * LR,
               "weight_decay": decay} for key, scale, decay in GROUPS]
    session = SimpleNamespace(
        net=nn.DataParallel(theirs), opt=torch.optim.SGD(groups, momentum=0.9))
    optimizer = train.build_optimizer(net, LR)
    optimizer.zero_grad = lambda: None                      # the gradients are looked at below
    for step, (images, labels) in enumerate(batches(STEPS), 1):
        torch.manual_seed(step)                             # Dropout drops the same channels
        loss = module.Session.train_batch(session, double(images), labels.long())
        torch.manual_seed(step)
        net.zero_grad()
        our_loss = train.training_step(net, optimizer, (images, labels), LR, 1, CPU, None)
        if step not in (1, STEPS):
            continue
        after = f"{step} step{'s' * (step > 1)}"
        yield f"loss, {after}", abs(loss - our_loss.item()) / loss
        state = convert(theirs.state_dict(keep_vars=True))["model"]
        pairs = [(state[name], value) for name, value in net.state_dict(keep_vars=True).items()]
        trained = [(a, b) for a, b in pairs if b.requires_grad]
        yield f"gradients, {after}", difference((a.grad, b.grad) for a, b in trained)
        yield f"parameters, {after}", difference(trained)
        yield f"momentum, {after}", difference(
            (session.opt.state[a]["momentum_buffer"], optimizer.state[b]["momentum_buffer"])
            for a, b in trained)
        yield f"BN statistics, bases, {after}", difference(
            (a, b) for a, b in pairs if not isinstance(b, nn.Parameter))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--released", required=True, metavar="DIR", help="the released code")
    args = parser.parse_args(argv)
    network, dataset, module = load_released(args.released)
    theirs, net = build_pair(network)
    count, ours = (sum(p.numel() for p in n.parameters()) for n in (theirs, net))
    rows = [("number of parameters", abs(count - ours) / count)]
    with mock.patch("train.normalise", double), mock.patch("evaluate.normalise", double):
        with torch.no_grad():
            rows += compare_evaluation(dataset, theirs.eval(), net.eval())
        rows += compare_training(module, theirs.train(), net)
    for name, value in rows:
        print(f"{name:36s} {value:8.1e}")
    worst = max(value for _, value in rows)
    print(f"the worst: {worst:.1e}")
    if not worst < BOUND:
        sys.exit(f"error: the networks differ: above {BOUND}")


def double(images):
    return normalise(images).double()


if __name__ == "__main__":
    evaluate.run(main)
