"""What a user may rely on, in the order of the paper; then command lines and bad input. No data, network or GPU needed.

    python -m pytest                                   # the ordinary tests
    SLOW=1 python -m pytest                            # the long ones as well
"""
import argparse
import fcntl
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}    # for children too
import numpy as np
import pytest
import scipy.io
import scipy.sparse
import scipy.special
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFile
from scipy.io import savemat
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import data
import ema
import evaluate
import train
import visualize
from backbone import DilatedResNet, UserError
from data import CELL_SHIFTS, DATASETS, Drawn, Schedule, TrainView, build_dataset, class_names, normalise
from ema import (
    EMAU,
    A2Block,
    EMANet,
    NonLocal,
    base_statistics,
    from_released,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)

HERE = Path(__file__).resolve().parent
# torchvision announces the end of decode_jpeg at every image; its successor needs ffmpeg's libraries.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities")
slow = pytest.mark.skipif(os.environ.get("SLOW") != "1", reason="takes long: set SLOW=1")


# ---------------------------------------------------------------------------------------------------------------------
# Child processes
# Importing torch takes seconds, so that scripts run in processes forked from a server that has imported it already.
# Nothing of a test's state gets into them, and one that hangs can be killed.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["test_ema"])
os.environ["PYTHONPATH"] = str(HERE)                      # where the server finds it, wherever pytest was started


def launch(folder, target, *args, world=1, timeout=120):
    """Runs target(*args) in `world` processes, as torchrun would: [(exit status, stdout, stderr) of each]."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        outputs = Path(folder) / f"rank{rank}.stdout", Path(folder) / f"rank{rank}.stderr"
        children.append((SERVER.Process(target=child, args=(env if world > 1 else {}, outputs, target, args)), outputs))
        children[-1][0].start()
    deadline = time.monotonic() + timeout
    for process, _ in children:
        process.join(max(0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [(process.exitcode, *(path.read_text() for path in outputs)) for process, outputs in children]


def child(env, outputs, target, args):
    os.environ.update({key: str(value) for key, value in env.items()})
    multiprocessing.set_start_method(None, force=True)        # the loader's workers: not from this server, as usual
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    target(*args)


def script(argv, cwd, before):
    os.chdir(cwd)
    sys.argv = argv
    if before:
        before()
    scripts = {"data.py": data, "train.py": train, "evaluate.py": evaluate, "visualize.py": visualize}
    data.run(scripts[argv[0]].main)


def python(cwd, command, before=None, world=1):
    """What `python COMMAND` does in folder `cwd`: (exit status, stdout, stderr), a list of them if world > 1.
    `before` is called in the process before the script."""
    results = launch(cwd, script, shlex.split(command), cwd, before, world=world)
    return results[0] if world == 1 else results


def succeed(cwd, command, **options):
    status, out, err = python(cwd, command, **options)
    assert status == 0, err or out
    return out


def fail(cwd, command, *words):
    """The command must end with one line on stderr that holds all the words, and exit status 1."""
    status, _, err = python(cwd, command)
    assert status == 1, (status, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    for word in words:
        assert str(word) in err, (word, err)


def log_of(out, key):
    """{iteration: value} of the lines of log.jsonl that have the key; every iteration must be there once."""
    records = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    pairs = [(record["iteration"], record[key]) for record in records if key in record]
    assert len(dict(pairs)) == len(pairs), "an iteration is in the log twice"
    return dict(pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Data sets, as small as can be and in the real formats
def picture(size, seed):
    """A soft random image, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    return np.asarray(Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize(size[::-1], Image.BILINEAR))


def blocks(size, seed, num_classes):
    """A label of rectangles, uint8 (H, W), with a rim of ignored pixels on the left."""
    rng = np.random.default_rng((seed, 1))
    cells = Image.fromarray(rng.integers(0, num_classes, (3, 4)).astype(np.uint8))
    label = np.array(cells.resize(size[::-1], Image.NEAREST))
    label[:, :2] = 255
    return label


def write_label(label, path, mode="P"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label)
    if mode == "P":                                           # colours do not matter, but they are not their indices
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    image.save(path)


def write_dataset(base, splits, num_classes, suffixes=(".jpg",), label_folder="SegmentationClass", mode="P"):
    """Adds images, labels and lists to `base`, in VOC's layout: splits is {name: number of images}."""
    for folder in ("JPEGImages", label_folder, "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    for split, count in splits.items():
        ids = [f"{split}_{i:06d}" for i in range(count)]
        (base / "ImageSets/Segmentation" / f"{split}.txt").write_text("".join(f"{i}\n" for i in ids))
        for n, name in enumerate(ids):
            size, seed = [(11, 17), (60, 80), (57, 41), (33, 64)][n % 4], sum(name.encode())
            Image.fromarray(picture(size, seed)).save(base / "JPEGImages" / f"{name}{suffixes[n % len(suffixes)]}")
            write_label(blocks(size, seed, num_classes), base / label_folder / f"{name}.png", mode)


@pytest.fixture(scope="session")
def voc_root(tmp_path_factory):
    """VOC 2012 with 5 images to train on (their labels gray, in SegmentationClassAug), 3 to validate, 2 to test."""
    root = tmp_path_factory.mktemp("voc")
    base = root / "VOCdevkit" / "VOC2012"
    write_dataset(base, {"val": 3, "train": 2}, 21)
    write_dataset(base, {"trainaug": 5}, 21, label_folder="SegmentationClassAug", mode="L")
    write_dataset(base, {"test": 2}, 21, label_folder="unused")
    shutil.rmtree(base / "unused")
    return root


CLASSES = ["road", "house boat", "tree", "sky"]


@pytest.fixture(scope="session")
def folder_root(tmp_path_factory):
    """A user's own folder: 7 images to train on, 5 to validate, four classes."""
    root = tmp_path_factory.mktemp("folder")
    write_dataset(root, {"train": 7, "val": 5}, len(CLASSES), (".jpg", ".png", ".jpeg"))
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


@pytest.fixture
def own_folder(folder_root, tmp_path):
    """A copy of the folder that a test may break."""
    return Path(shutil.copytree(folder_root, tmp_path / "data"))


# Seven images in batches of two: an epoch is three iterations. Log lines come with every iteration.
SMALL = "--backbone resnet18 --weights none --channels 32 --num-bases 8 --crop 48 --batch-size 2 --output-stride 16"
TRAIN = f"train.py --dataset folder --iters 6 --eval-every 4 --lr 0.05 --decoder --workers 0 {SMALL}"


@pytest.fixture(scope="session")
def run_folder(folder_root, tmp_path_factory):
    """The output folder of a run of six iterations on the user's own folder; not to be changed."""
    cwd = tmp_path_factory.mktemp("run")
    succeed(cwd, f"{TRAIN} --data-root {folder_root}")
    return cwd / "out" / "folder"


SIZE = (11, 17)
RELEASES = ("voc", "context", "cocostuff", "cocostuff164k")
CONTEXT_VALUES = {284: 15, 420: 54, 397: 11, 19: 52, 80: 28, 105: 42, 2: 1, 458: 59, 431: 0, 0: 0, 459: 0, 28: 0, 164: 0}
STUFF_VALUES = {0: 255, 1: 0, 11: 10, 12: 255, 13: 11, 25: 23, 26: 255, 27: 24, 29: 255, 30: 255, 45: 255, 66: 255,
                68: 255, 69: 255, 71: 255, 83: 255, 90: 79, 91: 255, 92: 80, 182: 170}   # id: class
IDS = {"voc": ["2007_000032", "2008_000008", "2010_000003", "2011_000009"],
       "context": ["2008_000008", "2008_000015", "2009_000001", "2010_000002"],
       "cocostuff": [f"COCO_train2014_{i:012d}" for i in (77, 349, 825, 1139)],
       "cocostuff164k": [f"{i:012d}" for i in (9, 25, 139, 285)]}       # the first two to train, the others to validate
VALUES = {"voc": [*range(21), 255], "context": list(CONTEXT_VALUES), "cocostuff": list(STUFF_VALUES),
          "cocostuff164k": [(i - 1) % 256 for i in STUFF_VALUES]}
TRAIN_AND_VAL = {"voc": ("train", "val"), "context": ("train", "val"), "cocostuff": ("train", "test"),
                 "cocostuff164k": ("train", "val")}


def mixed(values, seed=0):
    """A raw label map that holds every one of the values, uint8 or uint16."""
    values = np.array(values)
    at = np.random.default_rng(seed).permutation(np.arange(SIZE[0] * SIZE[1]) % len(values)).reshape(SIZE)
    return values[at].astype(np.uint16 if values.max() > 255 else np.uint8)


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(SIZE, sum(path.stem.encode()))).save(path)


def write_mat(path, **variables):
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, variables, do_compression=True)


def write_list(path, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{i}\n" for i in ids))


def names_cell(count):
    return np.array([f"class {i}" for i in range(count)], object)[:, None]


def label_path(name, root, i):
    """Where a data set keeps the label of its i-th image."""
    folder = {"voc": "VOCdevkit/VOC2012/SegmentationClass", "context": "trainval", "cocostuff": "annotations",
              "cocostuff164k": f"annotations/{'train' if i < 2 else 'val'}2017"}[name]
    return root / folder / f"{IDS[name][i]}{'.mat' if name in ('context', 'cocostuff') else '.png'}"


def write_raw(name, raw, path):
    """A raw label map as the file that the data set's authors distribute."""
    if name == "context":
        write_mat(path, LabelMap=raw.astype(np.uint16))
    elif name == "cocostuff":
        write_mat(path, S=raw, names=names_cell(182), captions=np.array(["a picture"], object))
    else:
        write_label(raw, path, "P" if name == "voc" else "L")


def write_release(name, root):
    """A data set of four images in the layout its archives unpack to."""
    lists = {"voc": "VOCdevkit/VOC2012/ImageSets/Segmentation", "context": "VOCdevkit/VOC2010/ImageSets/Main",
             "cocostuff": "imageLists"}
    images = {"voc": "VOCdevkit/VOC2012/JPEGImages", "context": "VOCdevkit/VOC2010/JPEGImages", "cocostuff": "images"}
    for i, image in enumerate(IDS[name]):
        write_image(root / images.get(name, f"images/{'train' if i < 2 else 'val'}2017") / f"{image}.jpg")
        write_raw(name, mixed(VALUES[name], i), label_path(name, root, i))
    if name in lists:
        first, second = TRAIN_AND_VAL[name]
        for split, ids in {first: IDS[name][:2], second: IDS[name][2:],
                           "all" if name == "cocostuff" else "trainval": IDS[name]}.items():
            write_list(root / lists[name] / f"{split}.txt", ids)
    return root


def write_sbd(base, ids):
    """SBD's part: {id: (its list, value)}, masks of that one class without any border, as the release has them."""
    for split in ("train", "val"):
        write_list(base / f"{split}.txt", [i for i, (its, _) in ids.items() if its == split])
    boundaries = np.empty((20, 1), object)
    for c in range(20):
        boundaries[c, 0] = scipy.sparse.csc_matrix(SIZE, dtype=bool)
    for i, (_, value) in ids.items():
        write_mat(base / "cls" / f"{i}.mat", GTcls={"Boundaries": boundaries, "CategoriesPresent": value,
                                                   "Segmentation": np.full(SIZE, value, np.uint8)})


@pytest.fixture(scope="session")
def releases(tmp_path_factory):
    """{name: root} of the data sets as distributed, four images each; not to be changed."""
    return {name: write_release(name, tmp_path_factory.mktemp(name)) for name in RELEASES}


@pytest.fixture
def own_release(releases, tmp_path):
    """A copy of a release that a test may break."""
    return lambda name: Path(shutil.copytree(releases[name], tmp_path / name))


def write_network(path, num_classes, **options):
    """A checkpoint of a small untrained network."""
    write_net(small_net(num_classes, **options), path, trained_on={})
    return path


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    """{number of classes: checkpoint}, one for every data set."""
    folder = tmp_path_factory.mktemp("networks")
    return {count: write_network(folder / f"{count}.pth", count) for count in (21, 59, 171)}


# ---------------------------------------------------------------------------------------------------------------------
# Secs. 3.2 and 4.1: the E-step, and the whole unit against the equations
def oracle(unit, image):
    """EMAU's forward in eval mode for one image (C, H, W), in loops from Eqs. 10-14 and Secs. 5.1 and 5.3."""
    weights = {key: value.double().numpy() for key, value in unit.state_dict().items()}
    residual = image.double().numpy().reshape(len(image), -1).T                # (N, C)
    x = residual @ weights["conv1.weight"][:, :, 0, 0].T + weights["conv1.bias"]
    mu = weights["mu"][0].T.copy()                                             # (K, C)
    for _ in range(unit.iterations):
        z = np.zeros((len(x), len(mu)))
        for n in range(len(x)):                                                # Eqs. 10-12
            exponents = [unit.lam * sum(x[n] * mu[k]) for k in range(len(mu))]
            kernels = [math.exp(e - max(exponents)) for e in exponents]
            z[n] = [kernel / sum(kernels) for kernel in kernels]
        for k in range(len(mu)):                                               # Eq. 13, then L2Norm
            mass = sum(z[n, k] for n in range(len(x)))
            mean = sum(z[n, k] * x[n] for n in range(len(x))) / mass if mass else np.zeros(x.shape[1])
            # A basis whose pixels add up to next to nothing is empty, and zero; it must not become a nan.
            mu[k] = mean / (math.sqrt(sum(mean * mean)) + (1e-12 / mass if mass else 1))
    x = np.stack([sum(z[n, k] * mu[k] for k in range(len(mu))) for n in range(len(x))])    # Eq. 14
    x = np.maximum(x, 0) @ weights["conv2.0.weight"][:, :, 0, 0].T
    x = (x - weights["conv2.1.running_mean"]) / np.sqrt(weights["conv2.1.running_var"] + 1e-5)
    x = x * weights["conv2.1.weight"] + weights["conv2.1.bias"]
    return torch.from_numpy(np.maximum(residual + x, 0).T.reshape(image.shape))


def make_unit(channels=6, bases=5, iterations=3, lam=1.0, seed=0, **options):
    """An EMAU in float64 and eval mode whose BN does something."""
    torch.manual_seed(seed)
    unit = EMAU(channels, bases, iterations, lam, **options).double().eval()
    bn = unit.conv2[1]
    for tensor in (bn.weight.data, bn.bias.data, bn.running_mean, bn.running_var):
        tensor.copy_(torch.rand(channels) + 0.5)
    return unit


@pytest.mark.parametrize("channels, bases, iterations, lam",
                         [(6, 5, 3, 1.0), (3, 1, 1, 1.0), (4, 9, 2, 0.3), (8, 4, 7, 5.0)])
def test_unit_equals_the_equations(channels, bases, iterations, lam):
    """Eqs. 10-14: EMAU's output is that of a slow version written from the equations, for several C, K, T, lambda."""
    unit = make_unit(channels, bases, iterations, lam)
    images = torch.randn(2, channels, 4, 7).double()
    expected = torch.stack([oracle(unit, image) for image in images])
    assert torch.allclose(unit(images), expected, rtol=0, atol=1e-9)
    assert torch.allclose(unit.float()(images.float()).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [1e3, 1e-6, 0])
def test_unit_equals_the_equations_on_extreme_inputs(scale):
    """Eqs. 10-14: huge, tiny, constant and zero features give the numbers of the equations, and never nan."""
    unit = make_unit(bases=12)
    image = torch.randn(6, 5, 4).double() * scale
    assert torch.allclose(unit(image[None])[0], oracle(unit, image), rtol=1e-9, atol=1e-9)
    constant = torch.full((6, 5, 4), 3.0).double() * scale
    assert torch.allclose(unit(constant[None])[0], oracle(unit, constant), rtol=1e-9, atol=1e-9)
    unit.conv1.bias.data.zero_()                              # x = 0 for scale 0: all bases become empty
    assert torch.allclose(unit(constant[None])[0], oracle(unit, constant), rtol=1e-9, atol=1e-9)


def test_responsibilities_sum_to_one():
    """Eq. 10: over the bases, the responsibilities for a pixel sum to one, in every round."""
    unit = make_unit()
    rounds = list(unit.em(torch.randn(2, 30, 6).double() * 3))
    assert len(rounds) == 3
    for z, _ in rounds:
        assert z.shape == (2, 30, 5) and (z >= 0).all() and torch.allclose(z.sum(2), torch.ones(2, 30).double())


def test_permuted_pixels_give_permuted_output():
    """Sec. 3.2: attention knows no positions, so that shuffling the pixels shuffles the output alike."""
    unit, x, order = make_unit(), torch.randn(1, 6, 5, 8).double(), torch.randperm(40)
    permuted = x.flatten(2)[:, :, order].view_as(x)
    assert torch.allclose(unit(permuted).flatten(2), unit(x).flatten(2)[:, :, order], atol=1e-12)


def test_batch_equals_its_images_one_by_one():
    """Sec. 3.2: every image has its own bases; its neighbours in the batch do not matter in eval mode."""
    torch.manual_seed(0)
    unit, images = EMAU(16, 8).eval(), torch.randn(3, 16, 9, 7)
    assert torch.allclose(unit(images), torch.cat([unit(image[None]) for image in images]), rtol=0, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_memory_grows_with_pixels_times_bases():
    """Sec. 3.2: no step holds an N x N matrix; the largest tensor is N x C or N x K, in training too."""
    unit, x = EMAU(16, 24).train(), torch.randn(2, 16, 40, 50, requires_grad=True)
    with LargestTensor() as largest:
        unit(x).sum().backward()
    assert largest.numel == 2 * 40 * 50 * 24


class TinyBackbone(nn.Module):
    """Stands in for the ResNet where only the head matters: one convolution, an eighth of the size."""
    out_channels, weights_origin = 8, "none"

    def __init__(self, *args):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 9, stride=8, padding=4)

    def forward(self, x):
        return self.conv(x).relu()

    def set_output_stride(self, output_stride):
        pass


def shrink():
    ema.DilatedResNet = TinyBackbone                          # in a child process, before a script


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(ema, "DilatedResNet", TinyBackbone)


def random_em(seed, images, pixels, channels, bases, iterations, lam, scale=2.0, **options):
    """A unit and pixels x (B, N, C) for it, in float64, with bases of length one to start from."""
    unit = make_unit(channels, bases, iterations, lam, seed, **options)
    unit.mu = F.normalize(unit.mu, dim=1)                     # again, as it was float32
    return unit, scale * torch.randn(images, pixels, channels).double()


def write_net(net, path, trained_on=None):
    save_checkpoint({"model": net.state_dict(), "config": {"network": net.config,
                     "data": {"dataset": "folder"} if trained_on is None else trained_on}}, path)


def von_mises_fisher(x, mu, concentration):
    """log of the density on the sphere, of directions x (N, C) around mu (K, C): (N, K)."""
    C = x.shape[1]
    order = C / 2 - 1
    bessel = np.log(scipy.special.ive(order, concentration)) + concentration           # ive: scaled by exp(-kappa)
    return concentration * x @ mu.T + order * np.log(concentration) - C / 2 * np.log(2 * np.pi) - bessel


@pytest.mark.parametrize("channels, lam", [(3, 1.0), (6, 0.3), (8, 12.0)])
def test_e_step_is_that_of_a_mixture_on_the_sphere(channels, lam):
    """Sec. 3.2: for pixels of length one, Eq. 12 is the posterior of equally likely von Mises-Fisher distributions of
    concentration lambda, and the M-step with L2Norm their maximum of likelihood."""
    unit, x = random_em(0, 1, 40, channels, 5, 1, lam)
    x, mu = F.normalize(x, dim=2), unit.mu
    density = np.exp(von_mises_fisher(x[0].numpy(), mu[0].T.numpy(), lam))
    posterior = density / density.sum(1, keepdims=True)
    z = unit.e_step(x, mu)
    assert np.abs(z[0].numpy() - posterior).max() < 1e-12

    def expected_likelihood(mu):                                               # (C, K)
        return (posterior * von_mises_fisher(x[0].numpy(), mu.T.numpy(), lam)).sum()
    best = unit.m_step(x, z)[0]
    others = F.normalize(best + 0.1 * torch.randn(200, channels, 5).double(), dim=1)
    assert all(expected_likelihood(other) < expected_likelihood(best) for other in others)
    if channels == 3:                                         # a density: it sums to one over the sphere
        heights = np.linspace(-1, 1, 2001)
        around = von_mises_fisher(np.stack([0 * heights, np.sqrt(1 - heights ** 2), heights], 1),
                                  np.array([[0., 0., 1.]]), lam)
        assert abs(2 * np.pi * np.trapezoid(np.exp(around[:, 0]), heights) - 1) < 1e-6


@pytest.mark.parametrize("lam", [0.5, 1.0, 7.0])
def test_gaussian_kernel_is_the_same(lam):
    """Sec. 4.1: with bases of length one, the kernel exp(-lambda/2 |x - mu|^2) gives the responsibilities of Eq. 12."""
    unit, x = random_em(1, 2, 30, 6, 5, 3, lam)
    for mu in [unit.initial_bases(x)] + [mu for _, mu in unit.em(x)]:
        gaussian = torch.softmax(-lam / 2 * (x[:, :, None] - mu.transpose(1, 2)[:, None]).square().sum(3), 2)
        assert torch.allclose(gaussian, unit.e_step(x, mu), rtol=0, atol=1e-10)


def k_means(x, centres, rounds, spherical):
    """Assignments (N,) and centres (K, C) of every round; Lloyd's algorithm, or that on directions."""
    for _ in range(rounds):
        if spherical:
            nearest = [max(range(len(centres)), key=lambda k: sum(pixel * centres[k])) for pixel in x]
        else:
            nearest = [min(range(len(centres)), key=lambda k: sum((pixel - centres[k]) ** 2)) for pixel in x]
        members = [x[[at == k for at in nearest]] for k in range(len(centres))]
        means = np.stack([m.mean(0) if len(m) else 0 * c for m, c in zip(members, centres, strict=True)])
        lengths = np.sqrt((means ** 2).sum(1, keepdims=True))
        centres = means / np.maximum(lengths, 1e-300) if spherical else means
        yield np.array(nearest), centres


def test_cold_limit_is_k_means():
    """Sec. 4.1: for lambda to infinity the rounds are those of K-means on directions. Plain K-means shares the first
    assignment, from bases of length one, and its mean up to the length; not the rounds that follow."""
    same = []
    for seed in range(4):
        unit, x = random_em(seed, 1, 60, 4, 6, 10, 1e9)
        start = unit.mu[0].T.numpy()
        ours = [(z[0].argmax(1).numpy(), z[0], mu[0].T.numpy()) for z, mu in unit.em(x)]
        for (at, z, mu), (nearest, centres) in zip(ours, k_means(x[0].numpy(), start, 10, True), strict=True):
            assert (z.max(1)[0] == 1).all() and np.array_equal(at, nearest) and np.abs(mu - centres).max() < 1e-12
        plain = list(k_means(x[0].numpy(), start, 10, False))
        (nearest, centres), (last, _) = plain[0], plain[-1]
        assert np.array_equal(ours[0][0], nearest)
        held = np.unique(nearest)
        before = make_unit(4, 6, 1, 1e9, seed, base_norm="none").m_step(x, ours[0][1][None])[0].T.numpy()[held]
        assert np.abs(before - centres[held]).max() < 1e-6 and np.abs(ours[0][2][held] - centres[held]).max() > 0.1
        same.append((ours[-1][0] == last).mean())
    assert 0.5 < np.mean(same) < 0.97


# ---------------------------------------------------------------------------------------------------------------------
# Secs. 3.1 and 4: the likelihood, and what it costs
def falls(seed, base_norm):
    """In how many of 25 random cases the likelihood falls in one of 20 rounds, for one size and temperature."""
    rng = np.random.default_rng(seed)
    channels, bases, lam, scale = rng.integers(2, 12), rng.integers(2, 12), rng.uniform(0.2, 4), rng.uniform(0.3, 3)
    unit, x = random_em(seed, 25, int(rng.integers(10, 60)), channels, bases, 20, lam, scale, base_norm=base_norm)
    likelihood = torch.stack([torch.logsumexp(lam * x @ mu, 2).sum(1) for mu in
                              [unit.initial_bases(x), *(mu for _, mu in unit.em(x))]])       # (21, 25)
    assert base_norm == "none" or (likelihood[-1] > likelihood[0]).all()
    return (likelihood.diff(dim=0) < -1e-9 * likelihood[1:].abs()).any(0).sum().item()


def test_likelihood_never_falls():
    """Secs. 3.1 and 4: the rounds are EM: in none of 500 random cases does the likelihood fall in any of 20 rounds. It
    is L2Norm that makes them so: with the plain mean of Eq. 13 it does fall in many."""
    assert sum(falls(seed, "l2") for seed in range(20)) == 0
    assert sum(falls(seed, "none") for seed in range(20)) > 100


def test_cost_is_linear_in_the_pixels():
    """Sec. 4: multiply-adds and kept bytes of EMAU grow as N, and so do those of the A2 block; Non-local's as N * N."""
    def exponents(block, small, large):
        first, second = ema.cost(block(), 512, small), ema.cost(block(), 512, large)
        return [math.log(second[i] / first[i]) / math.log((large / small) ** 2) for i in (0, 2)]
    assert max(exponents(lambda: EMAU(512), 33, 129)) <= 1.05
    assert max(exponents(lambda: A2Block(512), 33, 129)) <= 1.05
    assert min(exponents(lambda: NonLocal(512), 129, 513)) > 1.9
    positions = 33 * 33                                       # by hand: convolutions, and per round x mu and x^T z
    assert ema.cost(EMAU(512), 512, 33)[0] == positions * (2 * 512 * 512 + (2 * 3 + 1) * 512 * 64)
    assert ema.cost(NonLocal(512), 512, 33)[0] == positions * 4 * 512 * 256 + 2 * positions ** 2 * 256


# ---------------------------------------------------------------------------------------------------------------------
# Sec. 4.3: the re-estimation
def test_output_has_low_rank():
    """Sec. 4.3: N pixels are re-estimated from K bases: X~ has rank K at most, where X has rank C."""
    unit, x = random_em(0, 2, 50, 12, 5, 3, 1.0)
    *_, (z, mu) = unit.em(x)
    assert torch.linalg.matrix_rank(x).tolist() == [12, 12]
    assert torch.linalg.matrix_rank(z @ mu.transpose(1, 2)).tolist() == [5, 5]


def re_estimate(unit, mu, x):
    """Eqs. 12 and 14 for given bases mu (1, C, K): x (..., C) -> x~ (..., C)."""
    return unit.e_step(x.view(1, -1, len(mu[0])), mu).matmul(mu.transpose(1, 2)).view_as(x)


def test_variance_falls():
    """Sec. 4.3: for given bases of length one and lambda <= 1, the variance of any set of pixels falls, since x -> x~
    has the Jacobian lambda Cov_z(mu). For a large lambda it need not."""
    for seed, lam in ((0, 1.0), (1, 1.0), (2, 0.4)):
        unit, x = random_em(seed, 1, 60, 5, 7, 3, lam)
        *_, (_, mu) = unit.em(x)
        again = re_estimate(unit, mu, x)
        for size in (2, 3, 10, 60):
            for _ in range(50):
                chosen = torch.randperm(60)[:size]
                assert again[0, chosen].var(0).sum() < x[0, chosen].var(0).sum()
        point = x[0, 0]
        jacobian = torch.func.jacrev(partial(re_estimate, unit, mu))(point)
        z = unit.e_step(point[None, None], mu)[0, 0]
        mean = mu[0] @ z
        assert torch.allclose(jacobian, lam * ((mu[0] * z) @ mu[0].T - torch.outer(mean, mean)), atol=1e-12)
        assert torch.linalg.matrix_norm(jacobian, 2) < lam
    unit, mu = make_unit(1, 2, lam=9.0), torch.tensor([[[1.0, -1.0]]]).double()
    x = torch.tensor([[[0.1], [-0.1]]]).double()
    assert re_estimate(unit, mu, x).var() > 40 * x.var()


# ---------------------------------------------------------------------------------------------------------------------
# Secs. 4.2, 5.1 and 5.3: the M-step and its norm, the convolutions
def test_bases_have_length_one():
    """Sec. 5.3: every basis that holds pixels has length one after every round."""
    for _, mu in make_unit().em(torch.randn(2, 30, 6).double() * 3):
        assert mu.shape == (2, 6, 5) and torch.allclose(mu.norm(dim=1), torch.ones(2, 5).double())


def test_init_is_the_released_one():
    """Sec. 5.1: both 1x1 convolutions start with deviation sqrt(2 / C), the temperature of the E-step; bases with
    length one."""
    torch.manual_seed(0)
    unit = EMAU(256, 64)
    for conv in (unit.conv1, unit.conv2[0]):
        assert abs(conv.weight.std().item() / math.sqrt(2 / 256) - 1) < 0.02 and abs(conv.weight.mean()) < 1e-3
    assert unit.mu.shape == (1, 256, 64) and torch.allclose(unit.mu.norm(dim=1), torch.ones(1, 64))
    assert unit.conv1.bias is not None and unit.conv2[0].bias is None
    assert (unit.iterations, unit.lam, unit.alpha) == (3, 1.0, 0.9)


def test_first_convolution_is_frozen():
    """Sec. 5.1: no gradient passes the EM rounds, so the first convolution says that it wants none and never moves."""
    torch.manual_seed(0)
    unit = EMAU(8, 4).train()
    before = {name: p.clone() for name, p in unit.named_parameters()}
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        unit(torch.randn(2, 8, 5, 5)).square().mean().backward()
        optimizer.step()
    for name, p in unit.named_parameters():
        frozen = name.startswith("conv1")
        assert p.requires_grad == (not frozen) and (p.grad is None) == frozen
        assert torch.equal(p, before[name]) == frozen, name


def test_no_relu_before_the_iterations():
    """Sec. 5.1: a ReLU before EM would make every inner product with a basis non-negative, and all bases alike; without
    it they have both signs."""
    unit, x = random_em(0, 1, 80, 8, 6, 3, 1.0)
    for pixels, low in ((x, -1), (x.relu(), 0)):
        for _, mu in unit.em(pixels):
            products, cosines = pixels @ mu, mu.transpose(1, 2) @ mu
            assert (products.min() < low) if low else (products.min() >= 0)
            assert (cosines.min() < 0) if low else (cosines.min() >= 0)


def test_em_itself_holds_the_bases_alone():
    """Sec. 5.1: beside the two convolutions and BN, EMAU holds K * C numbers, however its bases are kept."""
    for options in ({}, {"base_update": "fixed"}, {"base_update": "backprop", "gradient": "full"}):
        own = {key: value.numel() for key, value in EMAU(32, 8, **options).state_dict().items() if "conv" not in key}
        assert own == {"mu": 8 * 32}


# ---------------------------------------------------------------------------------------------------------------------
# Sec. 5.2: the moving average of the bases
def test_bases_follow_the_moving_average():
    """Eq. 15: mu0 becomes alpha * mu0 + (1 - alpha) * L2Norm(mean of the batch's bases), with every training batch."""
    unit = make_unit(alpha=0.7).train()
    expected = unit.mu.clone()
    for _ in range(3):
        images = torch.randn(4, 6, 3, 5).double()
        x = F.conv2d(images, unit.conv1.weight, unit.conv1.bias).flatten(2).transpose(1, 2)
        *_, (_, mu) = unit.em(x)                              # from the bases before this batch
        mean = mu.mean(0, keepdim=True)
        expected = 0.7 * expected + 0.3 * mean / mean.norm(dim=1, keepdim=True)
        unit(images)
        assert torch.allclose(unit.mu, expected, rtol=0, atol=1e-12)
    assert expected.norm(dim=1).max() < 1 + 1e-12


def test_evaluation_leaves_the_bases_alone():
    """Eq. 15: an image looked at in eval mode does not move the bases."""
    unit = make_unit()
    before = unit.mu.clone()
    unit(torch.randn(4, 6, 3, 5).double())
    assert torch.equal(unit.mu, before)


def test_iterations_stay_in_float32_under_autocast():
    """Eqs. 12-15: sums over thousands of pixels are taken in float32 at least, whatever the precision around."""
    torch.manual_seed(0)
    unit, images = EMAU(32, 16).train(), torch.randn(2, 32, 20, 20)
    twin = EMAU(32, 16).train()
    twin.load_state_dict(unit.state_dict())
    seen = []
    unit.e_step = lambda x, mu: seen.append((x.dtype, mu.dtype)) or EMAU.e_step(unit, x, mu)
    with torch.autocast("cpu", torch.bfloat16):
        half = unit(images)
    assert seen == [(torch.float32, torch.float32)] * 3 and unit.mu.dtype == torch.float32
    whole = twin(images)
    assert (half.float() - whole).abs().mean() < 0.02 * whole.abs().mean()
    assert torch.allclose(unit.mu, twin.mu, rtol=0, atol=5e-3) and not torch.equal(unit.mu, twin.mu)


def follow_bases(part):
    """The bases after three batches, of which this process sees a part; BN in eval mode."""
    torch.manual_seed(0)
    unit = EMAU(8, 4).train()
    unit.conv2[1].eval()
    for images in torch.randn(3, 4, 8, 5, 7):
        unit(images[part])
    return unit.mu


def follow_bases_with_others(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save(follow_bases(slice(2 * rank, 2 * rank + 2)), folder / f"mu{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_their_bases(tmp_path):
    """Eq. 15: the mean runs over the global batch: two processes end with the bases of one that had all images."""
    for status, _, err in launch(tmp_path, follow_bases_with_others, tmp_path, world=2):
        assert status == 0, err
    first, second = (torch.load(tmp_path / f"mu{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    assert torch.allclose(first, follow_bases(slice(None)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("base_update", ["average", "backprop", "fixed"])
def test_bases_are_kept_as_told(base_update):
    """Sec. 5.2: training moves mu^(0) by the average, by its gradient, or not at all."""
    torch.manual_seed(0)
    unit = EMAU(8, 4, base_update=base_update, gradient="full").train()
    before = unit.mu.clone()
    learned = [name for name, _ in unit.named_parameters() if name == "mu"]
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.1)
    unit(torch.randn(2, 8, 5, 5)).square().mean().backward()
    moved = not torch.equal(unit.mu, before)                  # before the optimizer's step
    optimizer.step()
    assert moved == (base_update == "average") and learned == ["mu"] * (base_update == "backprop")
    assert torch.equal(unit.mu, before) == (base_update == "fixed")


def test_bases_by_back_propagation_need_the_whole_gradient(folder_root, tmp_path):
    """Sec. 5.2: bases kept by back-propagation need a gradient that reaches them; any other is refused in a line."""
    for gradient in ("none", "last"):
        with pytest.raises(UserError, match=f"gradient full, not {gradient}"):
            EMAU(8, 4, base_update="backprop", gradient=gradient)
    fail(tmp_path, f"{TRAIN} --data-root {folder_root} --base-update backprop", "backprop", "gradient full")


def gradient_norms(lam, rounds):
    """|dL/dmu^(0)| for several T: random features and the released init, C = 256, K = 64, N = 31 * 31."""
    torch.manual_seed(0)
    unit = EMAU(256, 64, lam=lam, base_update="backprop", gradient="full").double().eval()
    features, direction = torch.randn(2, 1, 256, 31, 31).double()
    norms = []
    for unit.iterations in rounds:
        unit.mu.grad = None
        (unit(features.relu()) * direction).sum().backward()
        norms.append(unit.mu.grad.norm().item())
    return norms


def test_gradient_of_the_initial_bases_vanishes_or_explodes():
    """Sec. 5.2: through T rounds the gradient of mu^(0) falls by about ten with every round at lambda = 1, and grows
    when the responsibilities are sharp: the unrolled EM is a recurrent network."""
    one, four, sixteen = gradient_norms(1.0, (1, 4, 16))
    assert four < 1e-2 * one and sixteen < 1e-8 * one
    one, four, sixteen = gradient_norms(4.0, (1, 4, 16))
    assert four > 2 * one and sixteen > 10 * one


def test_norms_of_the_bases():
    """Sec. 5.3: L2Norm keeps the direction of every basis, LayerNorm turns it; "none" is Eq. 13 as it stands."""
    torch.manual_seed(0)
    x, z = torch.randn(2, 30, 6).double() + 0.5, torch.rand(2, 30, 5).softmax(2).double()
    mean = torch.stack([(z[b, :, k, None] * x[b]).sum(0) / z[b, :, k].sum() for b in range(2) for k in range(5)])
    mean = mean.unflatten(0, (2, 5)).transpose(1, 2)                                   # (B, C, K)
    l2, layer, none = (make_unit(base_norm=norm).m_step(x, z) for norm in ("l2", "layer", "none"))
    assert torch.allclose(none, mean, rtol=1e-5)
    assert torch.allclose(F.cosine_similarity(l2, mean, dim=1), torch.ones(2, 5).double(), atol=1e-12)
    assert torch.allclose(layer, (mean - mean.mean(1, True)) / mean.std(1, correction=0, keepdim=True), atol=2e-3)
    assert F.cosine_similarity(layer, mean, dim=1).max() < 0.95


# ---------------------------------------------------------------------------------------------------------------------
# Sec. 5.2: gradients through the rounds
@pytest.mark.parametrize("base_norm", ["l2", "layer", "none"])
def test_full_gradient_is_that_of_the_output(base_norm):
    """Sec. 5.2: with gradient full, the derivatives by input, first convolution and mu^(0) are the output's, by finite
    differences in float64, after three rounds."""
    unit = make_unit(3, 2, lam=0.7, base_norm=base_norm, base_update="backprop", gradient="full")
    wanted = {name: p.detach().clone().requires_grad_() for name, p in unit.named_parameters()
              if name in ("mu", "conv1.weight", "conv1.bias")}

    def output(x, *values):
        return torch.func.functional_call(unit, dict(zip(wanted, values, strict=True)), x)
    images = torch.randn(2, 3, 3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(output, (images, *wanted.values()), atol=1e-6)


def test_last_gradient_is_that_of_the_last_e_step():
    """The last E-step's gradient is that of softmax(lambda x mu^(T-1)) mu^(T)^T with the bases held constant."""
    unit = make_unit(lam=0.7, gradient="last")
    images = torch.randn(2, 6, 4, 5).double().requires_grad_()
    direction = torch.randn(2, 6, 4, 5).double()
    (unit(images) * direction).sum().backward()
    ours = [images.grad, unit.conv1.weight.grad, unit.conv1.bias.grad, unit.conv2[0].weight.grad]

    copy = images.detach().requires_grad_()
    weight, bias, second = (p.detach().clone().requires_grad_() for p in
                            (unit.conv1.weight, unit.conv1.bias, unit.conv2[0].weight))
    x = torch.einsum("bchw,dc->bhwd", copy, weight[:, :, 0, 0]).flatten(1, 2) + bias   # (B, N, C)
    mu = [np.repeat(unit.mu.numpy(), 2, 0)]                                            # (B, C, K) each
    for _ in range(3):
        kernel = np.exp(0.7 * x.detach().numpy() @ mu[-1])
        y = x.detach().numpy().transpose(0, 2, 1) @ (kernel / kernel.sum(2, keepdims=True))
        mu.append(y / np.sqrt((y ** 2).sum(1, keepdims=True)))
    before, last = (torch.from_numpy(m) for m in mu[-2:])
    x = (torch.softmax(0.7 * x @ before, 2) @ last.transpose(1, 2)).relu()
    x = (x @ second[:, :, 0, 0].T).transpose(1, 2).view_as(copy)
    x = F.relu(copy + unit.conv2[1](x))
    (x * direction).sum().backward()
    theirs = [copy.grad, weight.grad, bias.grad, second.grad]
    assert all(torch.allclose(a, b, rtol=0, atol=1e-10) and b.abs().max() > 1e-3 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("training", [False, True])
def test_gradients_have_the_same_output(training):
    """The three gradients give the same output and move the bases alike; the first convolution learns but with none.
    In training the bases change in place and the backward pass does not mind."""
    outputs, bases, learned = [], [], {}
    images = torch.randn(2, 6, 4, 5).double()
    for gradient in ("none", "last", "full"):
        unit = make_unit(gradient=gradient).train(training)
        for _ in range(2):
            output = unit(images)
            output.sum().backward()
        outputs, bases = [*outputs, output], [*bases, unit.mu]
        learned[gradient] = unit.conv1.weight.grad is not None
    assert all(torch.equal(outputs[0], o) and torch.equal(bases[0], b) for o, b in zip(outputs, bases, strict=True))
    assert learned == {"none": False, "last": True, "full": True}


OPTIONS = [{"gradient": "last"}, {"gradient": "full"}, {"gradient": "full", "base_update": "backprop"},
           {"base_update": "fixed"}, {"attention": "nonlocal"}, {"attention": "a2"}, {"attention": "none"}]


def train_with_others(folder):
    shrink()
    dist.init_process_group("gloo")
    for number, options in enumerate(OPTIONS):
        net = small_net(**options).train()
        model, optimizer = DistributedDataParallel(net), train.build_optimizer(net, 0.1)
        for i in range(3):                                    # DDP finds out about unused parameters in the second step
            torch.manual_seed(10 * i + dist.get_rank())
            optimizer.zero_grad()
            train.segmentation_loss(model(torch.randn(2, 3, 33, 33)), torch.randint(0, 4, (2, 33, 33))).backward()
            optimizer.step()
        kept = {key: value for key, value in net.state_dict().items() if not re.search("running|tracked", key)}
        torch.save(kept, folder / f"{number}.{dist.get_rank()}.pt")
    dist.destroy_process_group()


def test_every_option_trains_in_two_processes(tmp_path):
    """DistributedDataParallel takes every gradient, update and relative: no parameter is left without its gradient, and
    both processes hold the same weights and bases."""
    for status, _, err in launch(tmp_path, train_with_others, tmp_path, world=2):
        assert status == 0, err
    for number, options in enumerate(OPTIONS):
        first, second = (torch.load(tmp_path / f"{number}.{rank}.pt") for rank in (0, 1))
        assert all(torch.equal(value, second[key]) for key, value in first.items()), options


# ---------------------------------------------------------------------------------------------------------------------
# Sec. 5.4: the relatives
def test_non_local_is_the_re_estimation_from_all_pixels():
    """Sec. 5.4: Non-local with identities as projections is Eq. 14 with the N pixels as bases, exactly."""
    block, unit, x = NonLocal(6).double(), make_unit(6), torch.randn(2, 6, 4, 5).double()
    block.theta = block.phi = block.g = block.out = nn.Identity()
    pixels = x.flatten(2).transpose(1, 2)                                              # (B, N, C)
    bases = pixels.transpose(1, 2)                                                     # (B, C, K = N)
    again = (unit.e_step(pixels, bases) @ bases.transpose(1, 2)).transpose(1, 2).view_as(x)
    assert torch.equal(block(x), F.relu(x + again))


def a2_and_em(x, mu):
    """X~ of the A2 block whose projections are the bases mu (C, K), and of one round of EM from them: (B, N, C)."""
    C, K = mu.shape
    block = A2Block(C, K).double()
    for conv in (block.theta, block.rho):
        conv.weight.data, conv.bias.data = mu.T.clone()[:, :, None, None], torch.zeros(K).double()
    block.phi, block.out, outputs = nn.Identity(), nn.Identity(), []
    block.out.register_forward_hook(lambda module, args, output: outputs.append(output))
    block(x.transpose(1, 2)[:, :, :, None])                                            # (B, C, N, 1)
    unit = make_unit(C, K, 1, base_norm="none")
    unit.mu = mu[None]
    (z, bases), = unit.em(x)
    return outputs[0][:, :, :, 0].transpose(1, 2), z @ bases.transpose(1, 2)


def test_a2_block_and_one_round_of_em():
    """Sec. 5.4: both hand out by a softmax over the bases. The A2 block gathers by a softmax over the pixels, EM by that
    over the bases, divided by its sum over the pixels: equal where all pixels have the same sum of kernels, and else
    not: for random pixels X~ differs by 6 % at |x . mu| = 0.1, by half at 1 (the released init), by 150 % at 3."""
    torch.manual_seed(0)
    base = torch.randn(6).double()
    same = torch.stack([base[torch.randperm(6)] for _ in range(40)])[None]     # permuted, so that all sums are equal
    assert torch.allclose(*a2_and_em(same, torch.eye(6).double()), rtol=0, atol=1e-5)
    mu = F.normalize(torch.randn(64, 16).double(), dim=0)
    for scale, low, high in ((0.1, 0.05, 0.07), (1, 0.4, 0.7), (3, 1.2, 1.8)):
        a2, em = a2_and_em(scale * torch.randn(1, 400, 64).double(), mu)
        assert low < ((a2 - em).norm() / em.norm()).item() < high


# ---------------------------------------------------------------------------------------------------------------------
# Sec. 6.1: the network
def rates(layer):
    """Dilation of the 3x3 convolutions, block by block; their padding must be the same."""
    found = []
    for block in layer:
        convs = [m for m in block.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert all(conv.padding == conv.dilation == convs[0].dilation for conv in convs)
        found.append(convs[0].dilation[0])
    return found


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_dilation_rates(name):
    """Sec. 6.1: output stride 8 and 16 come from the released network's dilation rates, multi-grid included."""
    with torch.device("meta"):
        net = DilatedResNet(name, output_stride=8)
    depth3, depth4 = len(net.layer3), len(net.layer4)
    assert rates(net.layer1) + rates(net.layer2) == [1] * (len(net.layer1) + len(net.layer2))
    assert rates(net.layer3) == [1] + [2] * (depth3 - 1) and rates(net.layer4) == [2, 8, 16][:depth4]
    net.set_output_stride(16)
    assert rates(net.layer3) == [1] * depth3 and rates(net.layer4) == [1, 4, 8][:depth4]
    with pytest.raises(UserError, match="output stride 4"):
        net.set_output_stride(4)


@pytest.mark.parametrize("name, stem", [("resnet18", "7x7"), ("resnet18", "deep"), ("resnet50", "7x7")])
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_feature_map_sizes(name, stem, stride):
    """Sec. 6.1: the features are ceil(H / S) x ceil(W / S), so that 8k + 1 pixels give k + 1 features."""
    with torch.device("meta"):
        net = DilatedResNet(name, stem, output_stride=stride)
        features = net(torch.zeros(1, 3, 97, 66))
    assert features.shape == (1, net.out_channels, -(-97 // stride), -(-66 // stride))


@pytest.mark.parametrize("name, channels, reach", [("resnet18", 128, 99), ("resnet50", 512, 99)])
def test_backbone_that_ends_early(name, channels, reach, tmp_path):
    """layers=2: the same weights' first half, at stride 8; a feature depends on `reach` pixels, no more; no other
    stride. What cells need: a network that does not see the whole image."""
    whole = getattr(torchvision.models, name)().state_dict()
    torch.save(whole, tmp_path / "weights.pth")
    net = DilatedResNet(name, weights=tmp_path / "weights.pth", layers=2).eval()
    assert all(torch.equal(value, whole[key]) for key, value in net.state_dict().items())
    images = torch.randn(1, 3, 193, 193, requires_grad=True)
    features = net(images)
    assert features.shape == (1, channels, 25, 25) and net.out_channels == channels
    features[0, :, 12, 12].sum().backward()
    rows = images.grad.abs().sum((0, 1, 3)).nonzero()
    assert rows.min() >= 96 - reach // 2 and rows.max() <= 96 + reach // 2
    with pytest.raises(UserError, match="output stride 16 is not available: choose 8$"):
        net.set_output_stride(16)


def small_net(num_classes=4, seed=0, **options):
    torch.manual_seed(seed)
    return EMANet(num_classes, **{"backbone": "resnet18", "channels": 16, "num_bases": 8} | options)


def test_output_stride_of_a_trained_network_can_change():
    """Sec. 6.1: train at 16, evaluate at 8: the same weights in a network built for 8 give the same logits."""
    net, images = small_net(output_stride=16).eval(), torch.randn(1, 3, 65, 49)
    twin = EMANet(**net.config | {"output_stride": 8}).eval()
    twin.load_state_dict(net.state_dict())
    with torch.no_grad():
        at_16 = net(images)
        net.set_output_stride(8)
        assert torch.equal(net(images), twin(images)) and not torch.allclose(net(images), at_16, atol=1e-3)
        net.set_output_stride(16)
        assert torch.equal(net(images), at_16)


def test_logits_have_the_size_of_the_images():
    """Sec. 6.1: bilinear upsampling with align_corners=True, to any size; the attention can be left out."""
    net, images = small_net(attention="none").eval(), torch.randn(2, 3, 41, 30)
    assert not any("attention" in name for name in net.state_dict())
    with torch.no_grad():
        logits = net(images)
        features = net.classifier(net.reduce(net.backbone(images)))
    assert torch.allclose(logits, F.interpolate(features, (41, 30), mode="bilinear", align_corners=True))


def test_head_has_the_papers_parameters():
    """Table 1: the head of EMANet(512) has 9.997M parameters and EMANet(256) 4.867M, bases counted."""
    for channels, millions in ((512, 9.997), (256, 4.867)):
        with torch.device("meta"):
            net = EMANet(21, "resnet101", channels=channels)
        numel = sum(p.numel() for m in (net.reduce, net.attention) for p in m.parameters()) + net.attention.mu.numel()
        assert round(numel / 1e6, 3) == millions


def test_checkpoint_comes_back_the_same(tmp_path):
    """Sec. 6.1: a saved network loads with its weights and options, in eval mode."""
    net = small_net(decoder=True, lam=0.5, em_iterations=2, stem="deep", bn_momentum=0.2)
    config = {"network": net.config, "data": {"dataset": "folder", "classes": CLASSES}}
    save_checkpoint({"model": net.state_dict(), "config": config}, tmp_path / "model.pth")
    again = load_checkpoint(tmp_path / "model.pth")
    assert again.config == net.config and again.data == config["data"] and not again.training
    assert again.attention.lam == 0.5 and again.reduce[1].momentum == 0.2
    assert all(torch.equal(again.state_dict()[key], value) for key, value in net.state_dict().items())


def test_failed_save_leaves_the_old_checkpoint(tmp_path):
    """A save that breaks off half-way, as on a full disk, leaves the file before it, and nothing else."""
    save_checkpoint({"net": {"old": torch.ones(3)}}, tmp_path / "model.pth")
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint({"net": {"new": torch.zeros(9)}, "broken": lambda: None}, tmp_path / "model.pth")
    assert torch.equal(torch.load(tmp_path / "model.pth")["net"]["old"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


# The released network, names and shapes written out: a deep stem in `extractor.0`, layers in 4..7, heads fc0 and fc1.
RELEASED = {"resnet50": ((3, 4, 6, 3), 353), "resnet101": ((3, 4, 23, 3), 659)}


def released_state(name, num_classes, channels=512):
    """A state dict with the names and shapes of a released network, its values random but tame."""
    state = {}

    def conv(key, c_out, c_in, size, bias=False):
        state[f"{key}.weight"] = torch.randn(c_out, c_in, size, size) * math.sqrt(2 / (c_in * size * size))
        if bias:
            state[f"{key}.bias"] = torch.randn(c_out)

    def bn(key, c, scale=1.0):
        state[f"{key}.weight"], state[f"{key}.bias"] = scale * (0.5 + torch.rand(c)), 0.2 * torch.randn(c)
        state[f"{key}.running_mean"], state[f"{key}.running_var"] = 0.2 * torch.randn(c), 0.5 + torch.rand(c)
        state[f"{key}.num_batches_tracked"] = torch.tensor(30000)

    for i, (c_out, c_in) in enumerate([(64, 3), (64, 64), (128, 64)]):
        conv(f"extractor.0.{3 * i}", c_out, c_in, 3)
        bn(f"extractor.0.{3 * i + 1}" if i < 2 else "extractor.1", c_out)
    c_in = 128
    for stage, count in enumerate(RELEASED[name][0]):
        width = 64 << stage
        for block in range(count):
            key = f"extractor.{stage + 4}.{block}"
            for i, (c, size) in enumerate([(width, 1), (width, 3), (4 * width, 1)], 1):
                conv(f"{key}.conv{i}", c, c_in if i == 1 else width, size)
                bn(f"{key}.bn{i}", c, 0.3 if i == 3 else 1.0)
            if block == 0:
                conv(f"{key}.downsample.0", 4 * width, c_in, 1)
                bn(f"{key}.downsample.1", 4 * width)
            c_in = 4 * width
    conv("fc0.conv", channels, 2048, 3)
    bn("fc0.bn", channels)
    state["emau.mu"] = F.normalize(torch.randn(1, channels, 64), dim=1)
    conv("emau.conv1", channels, channels, 1, bias=True)
    conv("emau.conv2.0", channels, channels, 1)
    bn("emau.conv2.1", channels)
    conv("fc1.0.conv", 256, channels, 3)
    bn("fc1.0.bn", 256)
    conv("fc2", num_classes, 256, 1, bias=True)
    return state


def released_forward(state, images):
    """The forward pass of the released ResNet-50 network in eval mode at output stride 8, from its state dict."""
    def conv(x, key, stride=1, rate=1):
        weight = state[f"{key}.weight"]
        return F.conv2d(x, weight, state.get(f"{key}.bias"), stride, rate * (weight.shape[2] // 2), rate)

    def bn(x, key):
        mean, var, scale, shift = (state[f"{key}.{part}"][:, None, None]
                                   for part in ("running_mean", "running_var", "weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = F.relu(bn(conv(images, "extractor.0.0", stride=2), "extractor.0.1"))
    x = F.relu(bn(conv(x, "extractor.0.3"), "extractor.0.4"))
    x = F.max_pool2d(F.relu(bn(conv(x, "extractor.0.6"), "extractor.1")), 3, 2, 1)
    for stage, dilations in {4: [1] * 3, 5: [1] * 4, 6: [1, 2, 2, 2, 2, 2], 7: [2, 8, 16]}.items():
        for block, rate in enumerate(dilations):
            key, stride = f"extractor.{stage}.{block}", 2 if (stage, block) == (5, 0) else 1
            y = F.relu(bn(conv(x, f"{key}.conv1"), f"{key}.bn1"))
            y = F.relu(bn(conv(y, f"{key}.conv2", stride, rate), f"{key}.bn2"))
            y = bn(conv(y, f"{key}.conv3"), f"{key}.bn3")
            if block == 0:
                x = bn(conv(x, f"{key}.downsample.0", stride), f"{key}.downsample.1")
            x = F.relu(x + y)
    x = F.relu(bn(conv(x, "fc0.conv"), "fc0.bn"))
    y = conv(x, "emau.conv1").flatten(2)                                       # (B, C, N)
    mu = state["emau.mu"]
    for _ in range(3):
        z = torch.softmax(y.transpose(1, 2) @ mu, 2)                           # (B, N, K)
        mu = y @ (z / (1e-6 + z.sum(1, keepdim=True)))                         # (B, C, K)
        mu = mu / (1e-6 + mu.norm(dim=1, keepdim=True))
    y = F.relu((mu @ z.transpose(1, 2)).view_as(x))
    x = F.relu(x + bn(conv(y, "emau.conv2.0"), "emau.conv2.1"))
    x = conv(F.relu(bn(conv(x, "fc1.0.conv"), "fc1.0.bn")), "fc2")
    return F.interpolate(x, images.shape[2:], mode="bilinear", align_corners=True)


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """A released ResNet-50 checkpoint: its state dict and its file."""
    torch.manual_seed(0)
    state, path = released_state("resnet50", 21), tmp_path_factory.mktemp("released") / "resnet50.pth"
    torch.save({"net": state, "step": 30000}, path)
    return state, path


def test_released_checkpoint_computes_what_the_released_network_does(released):
    """Sec. 6.1: a released file loads as it is, and its logits are those of the released code."""
    state, path = released
    assert len(state) == RELEASED["resnet50"][1]
    net = load_checkpoint(path)
    expected = {"num_classes": 21, "backbone": "resnet50", "stem": "deep", "channels": 512, "num_bases": 64,
                "decoder": True, "output_stride": 8, "em_iterations": 3, "lam": 1.0}
    assert expected.items() <= net.config.items() and net.data == {} and not net.training
    images = torch.randn(2, 3, 65, 49).double()
    with torch.no_grad():
        theirs = released_forward({key: value.double() for key, value in state.items()}, images)
        ours = net.double()(images)
    assert (ours - theirs).abs().max() < 2e-5 * theirs.std()


@pytest.mark.parametrize("name, num_classes", [("resnet50", 60), ("resnet101", 21)])
def test_released_architecture_is_read_off_the_names(name, num_classes):
    """Sec. 6.1: depth and number of classes of a released network come from its tensors; also behind `module.`"""
    with torch.device("meta"):
        state = released_state(name, num_classes)
        assert len(state) == RELEASED[name][1]
        mapped, config = from_released({f"module.{key}": value for key, value in state.items()}, "file")
        shapes = {key: value.shape for key, value in EMANet(**config).state_dict().items()}
    assert config["backbone"] == name and config["num_classes"] == num_classes
    assert {key: value.shape for key, value in mapped.items()} == shapes


@slow
def test_released_resnet101_loads(tmp_path):
    """Sec. 6.1: the released ResNet-101 network, 659 entries."""
    torch.save({"net": released_state("resnet101", 21), "step": 30000}, tmp_path / "resnet101.pth")
    with torch.no_grad():
        assert load_checkpoint(tmp_path / "resnet101.pth")(torch.randn(1, 3, 33, 33)).shape == (1, 21, 33, 33)


@pytest.mark.parametrize("change", ["fc2.bias", "extractor.6.3.conv2.weight", "emau.mu", "fc1.0.bn.weight", "foreign"])
def test_changed_released_checkpoint_is_refused(released, change, tmp_path):
    """Sec. 6.1: a released file with an entry too few, or one that is not the network's, is an error and no guess."""
    state = dict(released[0])
    if state.pop(change, None) is None:
        state["fc3.weight"] = torch.zeros(1)
    torch.save({"net": state, "step": 30000}, tmp_path / "changed.pth")
    with pytest.raises(UserError, match="changed.pth"):
        load_checkpoint(tmp_path / "changed.pth")


# Weights of the backbone
def with_fc(state):
    return state | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}


@pytest.mark.parametrize("stem", ["7x7", "deep"])
def test_backbone_weights_from_a_file(stem, tmp_path):
    """Sec. 6.1: ImageNet weights from a file, torchvision's layout or the deep stem's; the rest is an error."""
    source = (torchvision.models.resnet18() if stem == "7x7" else DilatedResNet("resnet18", stem)).state_dict()
    torch.save(with_fc(source), tmp_path / "weights.pth")
    net = DilatedResNet("resnet18", stem, tmp_path / "weights.pth")
    assert "weights.pth" in net.weights_origin
    assert all(torch.equal(value, source[key]) for key, value in net.state_dict().items())
    other = {"7x7": "deep", "deep": "7x7"}[stem]
    with pytest.raises(UserError, match=f"--stem {stem}"):
        DilatedResNet("resnet18", other, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="does not fit resnet34"):
        DilatedResNet("resnet34", stem, tmp_path / "weights.pth")


def test_hash_in_the_name_of_a_weights_file_is_checked(tmp_path):
    """Sec. 6.1: published files carry the beginning of their SHA-1 or SHA-256; one that does not match is damaged."""
    buffer = io.BytesIO()
    torch.save(with_fc(torchvision.models.resnet18().state_dict()), buffer)
    content = buffer.getvalue()
    for digest in (hashlib.sha1(content).hexdigest(), hashlib.sha256(content).hexdigest()):
        path = tmp_path / f"resnet18-{digest[:8]}.pth"
        path.write_bytes(content)
        assert DilatedResNet("resnet18", weights=path).weights_origin == str(path)
    path = tmp_path / "resnet18-deadbeef.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="resnet18-deadbeef.pth.*hash"):
        DilatedResNet("resnet18", weights=path)


def test_weights_that_cannot_be_had_are_an_error(tmp_path, monkeypatch):
    """Sec. 6.1: asking for ImageNet weights never gives a random network; the line says how to go on."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")   # a port where nobody listens: no network
    monkeypatch.delenv("no_proxy", raising=False)
    (tmp_path / "text.pth").write_text("no weights")
    for options, words in [({"weights": "imagenet"}, "cannot download .*--weights none"),
                           ({"weights": "imagenet-v2"}, "no IMAGENET1K_V2 weights for resnet18"),
                           ({"weights": "imagenet", "stem": "deep"}, "deep stem"),
                           ({"weights": str(tmp_path / "nothing.pth")}, "no weights at .*nothing.pth"),
                           ({"weights": str(tmp_path / "text.pth")}, "text.pth")]:
        with pytest.raises(UserError, match=words):
            DilatedResNet("resnet18", **options)


# ---------------------------------------------------------------------------------------------------------------------
# Sec. 6.1: data
def test_voc_is_read_as_it_is_distributed(voc_root):
    """Sec. 6.1, VOC: palette labels give class indices, 255 stays, sizes are the images', the test split has none."""
    voc = build_dataset("voc", voc_root, "val")
    assert len(voc) == 3 and len(voc.classes) == 21 and (voc.classes[0], voc.classes[15]) == ("background", "person")
    for i, name in enumerate(voc.ids):
        base = voc_root / "VOCdevkit" / "VOC2012"
        header = (base / "SegmentationClass" / f"{name}.png").read_bytes()[:26]
        assert header[24:26] == bytes([8, 3])                 # the fixture is faithful: 8 bits, palette
        image, label = voc[i]
        assert image.dtype == label.dtype == torch.uint8 and image.shape[1:] == label.shape
        expected = np.asarray(Image.open(base / "JPEGImages" / f"{name}.jpg"))
        assert np.array_equal(image.permute(1, 2, 0), expected)
        assert np.array_equal(label, blocks(label.shape, sum(name.encode()), 21)) and (label == 255).any()
    test = build_dataset("voc", voc_root, "test")
    assert not test.labelled and len(test) == 2 and (test[0][1] == 255).all()


def test_trainaug_labels_come_from_the_merged_folder(voc_root):
    """Sec. 6.1, VOC: trainaug reads SegmentationClassAug/, whose labels are gray; they are indices all the same."""
    augmented = build_dataset("voc", voc_root, "trainaug")
    assert len(augmented) == 5
    for i, name in enumerate(augmented.ids):
        _, label = augmented[i]
        assert np.array_equal(label, blocks(label.shape, sum(name.encode()), 21))


def test_own_folder_is_read(folder_root):
    """Your own images: .jpg, .jpeg and .png, class names with spaces, VOC's layout."""
    own = build_dataset("folder", folder_root, "train")
    assert own.classes == CLASSES and len(own) == 7 and {Path(p).suffix for p in own.images} == {".jpg", ".png", ".jpeg"}
    for i, name in enumerate(own.ids):
        image, label = own[i]
        assert np.array_equal(image.permute(1, 2, 0), np.asarray(Image.open(own.images[i])))
        assert np.array_equal(label, blocks(label.shape, sum(name.encode()), len(CLASSES)))


def test_images_are_rgb_and_never_turned(folder_root, tmp_path):
    """Labels are stored as the pixels lie in the file, so that EXIF must not turn the image; gray becomes RGB."""
    exif = Image.Exif()
    exif[0x0112] = 6                                          # "turn by 90 degrees"
    Image.fromarray(picture((11, 17), 0)).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(picture((11, 17), 0)[:, :, 0]).save(tmp_path / "gray.jpg")
    Image.fromarray(picture((11, 17), 0)[:, :, 0]).save(tmp_path / "gray.png")
    for name in ("turned.jpg", "gray.jpg", "gray.png"):
        assert data.read_image(tmp_path / name).shape == (3, 11, 17)


def test_index_png_has_vocs_colours(tmp_path):
    """VOC: written labels are palette PNGs of the same indices, in the colours of the development kit."""
    label = np.arange(256, dtype=np.uint8).reshape(4, 64)
    data.save_index_png(label, tmp_path / "label.png", data.voc_palette())
    image = Image.open(tmp_path / "label.png")
    assert image.mode == "P" and np.array_equal(np.asarray(image), label)
    colours = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 4: (0, 0, 128), 7: (128, 128, 128), 8: (64, 0, 0),
               15: (192, 128, 128), 16: (0, 64, 0), 20: (0, 64, 128), 255: (224, 224, 192)}
    rgb = np.asarray(image.convert("RGB"))
    assert all(tuple(rgb[index // 64, index % 64]) == colour for index, colour in colours.items())


class Ramp(data.Pairs):
    """One image whose colour says where each pixel lies, and so does its label: red = 4 * column, green = 4 * row."""

    def __init__(self, height, width, axis):
        super().__init__("ramp", "train", ["c"] * 200, ["0"], ["0"], ["0"], np.arange(256).astype(np.uint8))
        rows, columns = np.mgrid[:height, :width].astype(np.uint8)
        self.image = torch.from_numpy(np.stack([4 * columns, 4 * rows, 200 + 0 * rows]))
        self.label = (rows, columns)[axis]

    def read(self, i):
        return self.image, self.label


@pytest.mark.parametrize("axis", [0, 1])
def test_image_and_label_stay_in_register(axis):
    """Sec. 6.1: scale, crop and flip move image and label alike: they agree to half a pixel of the source."""
    flips = 0
    for iteration in range(60):
        image, label, (top, bottom, left, right) = TrainView(Ramp(45, 60, axis), 40, 0)[iteration, 0]
        assert image.shape == (3, 40, 40) and label.shape == (40, 40) and image.dtype == label.dtype == torch.uint8
        place = image[1 - axis].float() / 4
        inside = label[top:bottom, left:right].float()
        assert (place[top:bottom, left:right] - inside).abs().max() <= 0.5 + 0.5 / 4 + 1e-6
        flips += bool(image[0, 0, left] > image[0, 0, right - 1])
    assert 15 < flips < 45


def test_scales_are_the_seven_steps():
    """Sec. 6.1: the image is scaled by 0.5, 0.75 ... 2.0, each about as often."""
    heights = [TrainView(Ramp(20, 24, 0), 64, 0)[i, 0][2].tolist()[1] for i in range(140)]
    assert set(heights) == {10, 15, 20, 25, 30, 35, 40} and min(map(heights.count, heights)) > 7


def test_crops_reach_every_pixel():
    """Sec. 6.1: a crop may lie anywhere in the image, its edges included."""
    seen = set()
    for iteration in range(400):                              # at no scale does the crop hold the whole image
        seen |= set(TrainView(Ramp(60, 60, iteration % 2), 20, 0)[iteration, 0][1].unique().tolist())
    assert seen == set(range(60))


def test_padding_is_ignored_and_zero():
    """Sec. 6.1: beside a picture smaller than the crop, the label is 255 and the normalised image exactly 0."""
    views = [TrainView(Ramp(20, 24, 0), 64, 0)[i, 0] for i in range(30)]
    images, labels, boxes = (torch.stack(parts) for parts in zip(*views))
    normalised = normalise(images, boxes)
    assert normalised.dtype == torch.float32 and (normalised.abs().sum(1) > 0).equal(labels != 255)
    mean, std = torch.tensor(data.MEAN)[:, None, None], torch.tensor(data.STD)[:, None, None]
    plain = (images / 255 - mean) / std
    assert torch.allclose(normalised, plain * (labels != 255)[:, None], atol=1e-5)
    assert torch.allclose(normalise(images), plain, atol=1e-5)


def epoch_of(folder_root, workers, seed=3, start=0):
    loader = DataLoader(TrainView(build_dataset("folder", folder_root, "train"), 40, seed), num_workers=workers,
                        batch_sampler=Schedule(range_like(7), 2, seed, start, 5))
    return [torch.cat([part.flatten() for part in batch]) for batch in loader]


def range_like(length):
    """A data set to schedule, of which only the length matters."""
    return Ramp.__new__(type("Sized", (Ramp,), {"__len__": lambda self: length}))


def test_crops_depend_on_seed_and_iteration_alone(folder_root):
    """Sec. 6.1: workers and restarts give the same crops; another seed gives others."""
    plain = epoch_of(folder_root, 0)
    assert len(plain) == 5 and not torch.equal(plain[0], plain[3])
    for other in (epoch_of(folder_root, 1), epoch_of(folder_root, 2)):
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain[2:], epoch_of(folder_root, 1, start=2), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(plain, epoch_of(folder_root, 0, seed=4), strict=True))


def test_cached_data_give_the_same_crops(folder_root):
    """--cache: images kept decoded give the very crops that the files give."""
    files = build_dataset("folder", folder_root, "train")
    views = [TrainView(kept, 33, 5) for kept in (files, data.Cached(files, 1))]
    for key in ((i, i) for i in range(7)):
        assert all(torch.equal(a, b) for a, b in zip(views[0][key], views[1][key], strict=True))


def test_schedule_shows_every_image_once_per_epoch():
    """Sec. 6.1: an epoch holds no image twice and leaves out less than a batch, in a new order every time."""
    batches = list(Schedule(range_like(11), 3, 0, 0, 9))
    epochs = [[index for batch in batches[e:e + 3] for _, index in batch] for e in (0, 3, 6)]
    assert all(len(set(epoch)) == 9 and set(epoch) <= set(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2]
    assert [batch[0][0] for batch in batches] == list(range(9))


@pytest.mark.parametrize("dataset", [range_like(17), Drawn("scenes", "train")], ids=["finite", "endless"])
def test_schedule_is_the_same_for_any_number_of_processes(dataset):
    """Sec. 6.1: the global batch of an iteration is the same however it is cut, and wherever the run was resumed."""
    whole = list(Schedule(dataset, 8, 5, 0, 6))
    assert len(whole) == len(Schedule(dataset, 8, 5, 0, 6)) == 6 and all(len(batch) == 8 for batch in whole)
    assert list(Schedule(dataset, 8, 5, 4, 6)) == whole[4:]
    for world, accumulate in [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 8)]:
        parts = [list(Schedule(dataset, 8, 5, 0, 6, rank, world, accumulate)) for rank in range(world)]
        assert all(len(p) == 6 * accumulate and {len(b) for b in p} == {8 // world // accumulate} for p in parts)
        for i, batch in enumerate(whole):
            together = [key for p in parts for b in p[i * accumulate:(i + 1) * accumulate] for key in b]
            assert sorted(together) == sorted(batch)


def test_scenes_are_the_same_everywhere():
    """Scenes: a picture is a function of its index alone; 64 to validate, none of them in training; nine classes."""
    training, validation = Drawn("scenes", "train"), Drawn("scenes", "val")
    assert len(validation) == len(validation.ids) == 64 and training.endless and not validation.endless
    counts = torch.zeros(9)
    for i in range(64):
        image, label = validation[i]
        assert image.dtype == label.dtype == torch.uint8 and image.shape == (3, *label.shape)
        counts += torch.bincount(label.flatten(), minlength=9)
    assert len(validation.classes) == 9 and (counts > 0.002 * counts.sum()).all()
    assert all(torch.equal(a, b) for a, b in zip(validation[7], Drawn("scenes", "val")[7]))
    assert not torch.equal(training[7][0], validation[7][0]) and not torch.equal(training[7][0], training[8][0])


def test_scenes_need_context():
    """Scenes: a classifier that sees mean colour and variance of 5x5 pixels stays below 60 mIoU: context decides."""
    torch.manual_seed(0)

    def pixels(scenes, indices):
        features, labels = [], []
        for i in indices:
            image, label = scenes[i]
            image = image[None].float() / 255
            mean = F.avg_pool2d(image, 5, 1)
            deviation = (F.avg_pool2d(image ** 2, 5, 1) - mean ** 2).clamp(min=0).sqrt()
            keep = torch.randperm(mean[0, 0].numel())[:1500]
            features.append(torch.cat([mean, deviation * 5], 1)[0].flatten(1).T[keep])
            labels.append(label[2:-2, 2:-2].flatten()[keep].long())
        return torch.cat(features), torch.cat(labels)

    x, y = pixels(Drawn("scenes", "train"), range(96))
    classifier = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 9))
    optimizer = torch.optim.Adam(classifier.parameters(), lr=0.01)
    for _ in range(500):
        batch = torch.randint(len(y), (2048,))
        optimizer.zero_grad()
        F.cross_entropy(classifier((x[batch] - x.mean(0)) / x.std(0)), y[batch]).backward()
        optimizer.step()
    test_x, test_y = pixels(Drawn("scenes", "val"), range(64))
    prediction = classifier((test_x - x.mean(0)) / x.std(0)).argmax(1)
    miou = evaluate.scores(evaluate.confusion_matrix(prediction, test_y, 9))["miou"]
    assert 0.2 < miou < 0.6                                   # it has learned something, but not the scene


def test_cells_hold_the_answers_they_are_said_to_hold():
    """Cells: what the brightness of one place tells, that of all striped ones, and the square, by rules that know the
    task: 60%, 87% and nothing; 50%, 50% and all; 98% from any one cell."""
    for name, shift in CELL_SHIFTS.items():
        cells = Drawn(name, "val")
        assert len(cells) == len(cells.ids) == 400 and not cells.endless and Drawn(name, "train").endless
        one, many, corner, sizes = [], [], [], []
        for i in range(200):
            image, label = cells[i]
            assert image.shape == (3, 193, 193) and label.shape == (193, 193) and image.dtype == label.dtype == torch.uint8
            striped = label < 2
            assert (label[striped] == i % 2).all() and set(label.unique().tolist()) <= {i % 2, 2, 3, 255}
            assert ((label == 255).sum() == 256) == (shift == 0)
            mean = F.avg_pool2d(image[:1].float(), 4, 1)[0]                    # a period of every texture
            inside = F.avg_pool2d(striped[None].float(), 4, 1)[0] == 1
            mean = mean[inside] - 128
            one.append(((mean > 0) == i % 2).float().mean())
            many.append((mean.mean() > 0).item() == i % 2)
            corner.append((image[0, 5, 5] > 128).item() == i % 2)
            sizes.append(striped.float().mean())
        assert 0.45 < np.mean(sizes) < 0.55                                    # half of the cells
        told = [np.mean(rule) for rule in (one, many, corner)]
        wanted = {"cells": (0.6, 0.84, 0.5), "cells-key": (0.5, 0.5, 1), "cells-local": (0.975, 1, 0.75)}[name]
        assert all(abs(t - w) < 0.06 for t, w in zip(told[:2], wanted[:2], strict=True)), (name, told)
        assert (told[2] == 1) == (name == "cells-key")
        again = Drawn(name, "val")[7]
        assert all(torch.equal(a, b) for a, b in zip(cells[7], again, strict=True))
        assert not torch.equal(Drawn(name, "train")[7][0], again[0])


@pytest.mark.parametrize("num_classes", [59, 60])
def test_context_ids_become_classes(num_classes, releases):
    """Sec. 6.3, PASCAL Context: 459 ids give the 59 classes, none wraps at 256; the others are ignored, or class 0."""
    for split, first in (("train", 0), ("val", 2)):
        context = build_dataset("context", releases["context"], split, num_classes)
        assert len(context) == 2 and len(context.classes) == num_classes
        for i in range(2):
            image, label = context[i]
            raw = mixed(VALUES["context"], first + i)
            expected = np.vectorize(CONTEXT_VALUES.get)(raw)
            if num_classes == 59:
                expected = np.where(expected == 0, 255, expected - 1)
            assert image.shape[1:] == label.shape == SIZE and np.array_equal(label, expected)
            named = {284: "person", 420: "tree", 397: "table", 19: "bedclothes", 80: "cloth", 105: "curtain"}
            for value, name in named.items():
                assert {context.classes[c] for c in label[torch.from_numpy(raw == value)].tolist()} == {name}


def test_context_classes_are_the_release_s():
    """Sec. 6.3: the names are the release's 59_labels.txt, byte for byte; their ids put them in alphabetical order."""
    names, ids = class_names("context"), [int(i) for i in data.CONTEXT_IDS.split()]
    text = "".join(f"{number}: {name}\n" for number, name in enumerate(names, 1)) + "\n"
    assert hashlib.md5(text.encode()).hexdigest() == "993901f2d930cc038c406845f08fa082"
    assert len(set(ids)) == 59 and [name for _, name in sorted(zip(ids, names, strict=True))] == sorted(names)


@pytest.mark.parametrize("labels", ["VOCdevkit/trainval", "VOCdevkit/VOC2010/trainval"])
@pytest.mark.parametrize("year", ["VOC2010", "VOC2012"])
def test_context_may_be_unpacked_beside_or_inside_voc(labels, year, own_release):
    """Sec. 6.3: trainval/ lies beside, below or inside VOCdevkit; the images are VOC 2010's, or the same of 2012."""
    root = own_release("context")
    (root / "trainval").rename(root / labels)
    if year == "VOC2012":
        (root / "VOCdevkit/VOC2012").mkdir()
        (root / "VOCdevkit/VOC2010/JPEGImages").rename(root / "VOCdevkit/VOC2012/JPEGImages")
    context = build_dataset("context", root)
    assert list(context.ids) == IDS["context"][2:] and (context[0][1] == 14).any()      # person


def compact_mat(path, values):
    """What MATLAB itself writes for a matrix of class double that holds small whole numbers: doubles kept as uint8."""
    def element(kind, content):
        return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)
    miint8, miuint8, miint32, miuint32, mimatrix, mxdouble = 1, 2, 5, 6, 14, 6
    matrix = (element(miuint32, struct.pack("<II", mxdouble, 0)) + element(miint32, struct.pack("<ii", *values.shape))
              + element(miint8, b"S") + element(miuint8, values.astype(np.uint8).tobytes(order="F")))
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x100) + b"IM" + element(mimatrix, matrix))


@pytest.mark.parametrize("form", ["uint8", "double", "double kept as uint8"])
def test_both_forms_of_coco_stuff_give_the_same_targets(form, own_release):
    """Sec. 6.3, COCO-Stuff: 10K (.mat, 0 = unlabelled) and 164K (.png, id - 1, 255 = unlabelled) give the same classes;
    removed ids and unlabelled pixels are ignored."""
    small, large = own_release("cocostuff"), own_release("cocostuff164k")
    for i in range(4):
        raw, path = mixed(VALUES["cocostuff"], i), label_path("cocostuff", small, i)
        if form == "double":
            write_mat(path, S=raw.astype(float), names=names_cell(182))
        elif form == "double kept as uint8":
            compact_mat(path, raw)
            assert scipy.io.whosmat(path) == [("S", SIZE, "double")] and scipy.io.loadmat(path)["S"].dtype == np.uint8
    for splits in (("train", "train"), ("test", "val")):
        ours, theirs = build_dataset("cocostuff", small, splits[0]), build_dataset("cocostuff164k", large, splits[1])
        assert len(ours) == len(theirs) == 2 and ours.classes == theirs.classes
        for i in range(2):
            raw = mixed(VALUES["cocostuff"], i + 2 * (splits[0] == "test"))
            label = ours[i][1]
            assert label.dtype == torch.uint8 and np.array_equal(label, np.vectorize(STUFF_VALUES.get)(raw))
            assert torch.equal(label, theirs[i][1])


def read_all_values(name, root):
    """The classes of the raw values 0..181 and 255 of a 164K file."""
    values = np.array([*range(182), 255], np.uint8)
    for i in range(2):
        write_label(np.resize(values, (11, 19)), label_path("cocostuff164k", root, i), "L")
        Image.fromarray(picture((11, 19), i)).save(root / "images/train2017" / f"{IDS['cocostuff164k'][i]}.jpg")
    return dict(zip(values.tolist(), build_dataset(name, root, "train")[0][1].flatten().tolist(), strict=False))


def test_coco_stuff_classes(own_release):
    """Sec. 6.3, COCO-Stuff: 171 distinct names in the release's order, one for each id that is in use."""
    names = class_names("cocostuff")
    digest = hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()
    assert len(set(names)) == 171 and digest == "183abbcf67345584c8fd5fab2fe93e56ec77e25836483a185e991318398bd248"
    classes = read_all_values("cocostuff164k", own_release("cocostuff164k"))
    assert [c for c in classes.values() if c != 255] == list(range(171))
    assert [value + 1 for value, c in classes.items() if c == 255] == [12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91, 256]


def test_coco_gives_voc_classes(own_release):
    """Sec. 6.2.3: for VOC's test server COCO's things of VOC's 20 kinds keep their kind, all else is background."""
    root = own_release("cocostuff164k")
    stuff, voc = read_all_values("cocostuff164k", root), read_all_values("coco2voc", root)
    assert voc.pop(255) == 255
    called = {"aeroplane": "airplane", "motorbike": "motorcycle", "sofa": "couch", "tvmonitor": "tv",
              "diningtable": "dining table", "pottedplant": "potted plant"}             # VOC's name: COCO's
    pairs = {(class_names("voc")[c], class_names("cocostuff")[stuff[value]]) for value, c in voc.items() if c}
    assert pairs == {(name, called.get(name, name)) for name in class_names("voc")[1:]}
    assert build_dataset("coco2voc", root, "val").classes == class_names("voc")


@pytest.mark.parametrize("place", ["benchmark_RELEASE/dataset", "VOCaug/dataset", "VOCdevkit/VOCaug/dataset", "."])
def test_trainaug_is_composed_of_voc_and_sbd(place, tmp_path):
    """Sec. 6.1, VOC: trainaug = VOC train and all of SBD, less VOC val; VOC's mask where both have one. In SBD's own
    layout, in VOCaug's and in torchvision's."""
    base, a, b, c, d, e, f = tmp_path / "VOCdevkit/VOC2012", *(f"2008_00000{i}" for i in range(6))
    for split, ids in {"train": [b, a], "val": [e, f]}.items():
        write_list(base / f"ImageSets/Segmentation/{split}.txt", ids)
        for i in ids:
            write_label(mixed([0, 1, 255]), base / f"SegmentationClass/{i}.png")
    for i in (a, b, c, d, e, f):
        write_image(base / f"JPEGImages/{i}.jpg")
    write_sbd(tmp_path / place, {b: ("train", 15), c: ("train", 20), d: ("val", 7), e: ("train", 3), f: ("val", 4)})
    augmented = build_dataset("voc", tmp_path, "trainaug")
    labels = {str(i): label for i, (_, label) in zip(augmented.ids, augmented, strict=False)}
    assert len(augmented) == 4 and set(labels) == {a, b, c, d}
    assert all(np.array_equal(labels[i], mixed([0, 1, 255])) for i in (a, b))
    assert (labels[c] == 20).all() and (labels[d] == 7).all()
    assert [Path(path).stem for path in augmented.images] == [Path(path).stem for path in augmented.labels]
    assert all(np.array_equal(label, mixed([0, 1, 255])) for _, label in map(build_dataset("voc", tmp_path).__getitem__,
                                                                           range(2)))


def test_trainaug_without_sbd_says_what_to_do(releases):
    """Sec. 6.1, VOC: where neither SBD nor a merged folder is, the line names both ways, and training without."""
    with pytest.raises(UserError, match="benchmark.tgz.*SegmentationClassAug/.*--split train"):
        build_dataset("voc", releases["voc"], "trainaug")


def test_recipes_are_the_paper_s():
    """Secs. 6.1, 6.2.3 and 6.3: --help shows a recipe for every data set, with the paper's numbers."""
    head, *rows = [re.split(r"\s{2,}", line) for line in train.recipe_table().split("\n\n")[0].splitlines()]
    table = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    assert {name.split()[0] for name in table} == set(DATASETS)
    for name, split, iters, stride in [("voc", "trainaug", 30000, 16), ("context", "train", 15000, 16),
                                       ("cocostuff", "train", 30000, 8), ("coco2voc", "train", 150000, 16)]:
        found = [table[f"{name} paper"][key] for key in ("split", "iters", "output-stride", "lr", "batch-size", "crop",
                                                         "backbone", "channels")]
        assert found == [split, str(iters), str(stride), "0.009", "16", "513", "resnet101", "512"], name
        assert table[f"{name} paper"]["gradient"] == "none"           # as in the released code; cells need more
    assert table["cells paper"]["gradient"] == "full"


# ---------------------------------------------------------------------------------------------------------------------
# Sec. 6.1: training
def test_loss_is_the_sum_over_valid_by_all_pixels():
    """Sec. 6.1: the cross entropy of valid pixels, divided by the number of all pixels, as lr 0.009 was tuned to."""
    torch.manual_seed(0)
    logits, label = torch.randn(2, 4, 3, 5), torch.randint(0, 4, (2, 3, 5)).byte()
    label[0, 0], label[1, 2, 3] = 255, 255
    total = 0
    for b, h, w in np.ndindex(2, 3, 5):
        if label[b, h, w] != 255:
            total -= torch.log_softmax(logits[b, :, h, w], 0)[int(label[b, h, w])].item()
    assert math.isclose(train.segmentation_loss(logits, label).item(), total / 30, rel_tol=1e-5)


def test_batch_without_labels_gives_no_gradient():
    """Sec. 6.1: a crop that is ignored altogether gives loss 0 and gradient 0, not nan."""
    logits = torch.randn(2, 4, 3, 5, requires_grad=True)
    loss = train.segmentation_loss(logits, torch.full((2, 3, 5), 255, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_optimizer_decays_convolutions_only():
    """Sec. 6.1: weight decay on the weights of convolutions alone, twice the lr on all biases, momentum 0.9."""
    net = small_net(decoder=True)
    groups = {id(p): g for g in train.build_optimizer(net, 0.1).param_groups for p in g["params"]}
    learned = [p for p in net.parameters() if p.requires_grad]
    assert len(groups) == len(learned) == len(list(net.parameters())) - 2      # but for EMAU's first convolution
    for name, p in net.named_parameters():
        if p.requires_grad:
            group = groups[id(p)]
            assert group["weight_decay"] == (1e-4 if p.ndim == 4 else 0) and group["momentum"] == 0.9, name
            assert group["lr_scale"] == (2 if name.endswith("bias") else 1), name


def gradients(part):
    """Gradients and bases of a network whose BN is in eval mode, from this process's part of a batch."""
    net = small_net().train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model = DistributedDataParallel(net) if dist.is_initialized() else net
    images, labels = torch.randn(4, 3, 33, 33), torch.randint(0, 4, (4, 33, 33)).byte()
    labels[0, :20] = 255                                      # the parts have different numbers of valid pixels
    for _ in range(2):                                        # DDP finds out about unused parameters in the second step
        net.zero_grad()
        train.segmentation_loss(model(images[part]), labels[part]).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.requires_grad} | {"mu": net.attention.mu}


def gradients_with_others(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save(gradients(slice(rank, None, 2)), folder / f"gradients{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(tmp_path):
    """Sec. 6.1: the loss is divided so that two processes get the gradient of one with the whole batch."""
    for status, _, err in launch(tmp_path, gradients_with_others, tmp_path, world=2):
        assert status == 0, err
    ranks = [torch.load(tmp_path / f"gradients{rank}.pt") for rank in (0, 1)]
    for name, expected in gradients(slice(None)).items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        assert (ranks[0][name] - expected).norm() <= 1e-3 * expected.norm() + 1e-7, name


def test_init_from_another_network(tmp_path, capsys):
    """--init takes the whole network; with another number of classes the classifier starts afresh, and says so."""
    source, path = small_net(4, seed=1), tmp_path / "model.pth"
    config = {"network": source.config, "data": {}}
    save_checkpoint({"model": source.state_dict(), "config": config}, path)
    same, other, own = small_net(4), small_net(6), small_net(6).state_dict()
    train.load_init(same, path)
    assert "afresh" not in capsys.readouterr().out
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in same.state_dict().items())
    train.load_init(other, path)
    assert re.search("4 classes.* 6.*afresh", capsys.readouterr().out)
    for key, value in other.state_dict().items():
        assert torch.equal(value, (own if key.startswith("classifier.") else source.state_dict())[key]), key
    for different in (small_net(4, channels=8), small_net(4, decoder=True), small_net(4, attention="none")):
        with pytest.raises(UserError, match="model.pth"):
            train.load_init(different, path)


# ---------------------------------------------------------------------------------------------------------------------
# Sec. 6.1: evaluation
def test_metric_by_hand():
    """mIoU: one matrix over all pixels with a label; rows are labels; a class that occurs nowhere does not count."""
    label = torch.tensor([[0, 0, 0, 1], [1, 1, 255, 255]]).byte()
    prediction = torch.tensor([[0, 0, 1, 1], [1, 0, 2, 0]])
    confusion = evaluate.confusion_matrix(prediction, label, 4)
    assert confusion.dtype == torch.int64
    assert confusion.tolist() == [[2, 1, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    result = evaluate.scores(confusion)
    assert result["iou"][:2] == [0.5, 0.5] and all(map(math.isnan, result["iou"][2:]))
    assert math.isclose(result["miou"], 0.5) and math.isclose(result["pixacc"], 4 / 6)
    assert math.isclose(result["macc"], 2 / 3)
    # Class 2 is predicted but never right: its IoU is 0 and counts, its accuracy is undefined and does not.
    result = evaluate.scores(torch.tensor([[6, 0, 2], [1, 1, 0], [0, 0, 0]]))
    assert result["iou"] == [6 / 9, 1 / 2, 0]
    assert math.isclose(result["miou"], (6 / 9 + 1 / 2) / 3) and math.isclose(result["macc"], (6 / 8 + 1 / 2) / 2)
    assert math.isclose(result["pixacc"], 7 / 10)


def protocol(net, image, scales, mirrors):
    """The protocol of six scales and mirror images, written out one view at a time."""
    height, width = image.shape[1:]
    mean, std = (255 * torch.tensor(v)[:, None, None] for v in (data.MEAN, data.STD))
    total = torch.zeros(net.config["num_classes"], height, width)
    for scale in scales:
        for mirror in mirrors:
            view = (image.float() - mean) / std
            if mirror:
                view = view[:, :, torch.arange(width - 1, -1, -1)]
            h, w = int(scale * height), int(scale * width)
            view = F.interpolate(view[None], (h, w), mode="bilinear", align_corners=True)
            padded = torch.zeros(1, 3, next(n for n in range(h, h + 8) if n % 8 == 1),
                                 next(n for n in range(w, w + 8) if n % 8 == 1))
            padded[:, :, :h, :w] = view
            logits = F.interpolate(net(padded)[:, :, :h, :w], (height, width), mode="bilinear", align_corners=True)[0]
            total += logits[:, :, torch.arange(width - 1, -1, -1)] if mirror else logits
    return total


@pytest.mark.parametrize("size", [(41, 57), (38, 30)])
def test_prediction_follows_the_protocol(size):
    """Sec. 6.1: whole image, padded right and bottom to 8k + 1 with 0; with --ms-flip six scales and their mirrors."""
    net = small_net().eval()
    image = torch.from_numpy(picture(size, 0).copy()).permute(2, 0, 1)
    with torch.no_grad():
        single, multiple = evaluate.predict(net, image), evaluate.predict(net, image, ms_flip=True)
        assert torch.allclose(single, protocol(net, image, (1,), (False,)), atol=1e-4)
        expected = protocol(net, image, (0.5, 0.75, 1, 1.25, 1.5, 1.75), (False, True))
    assert torch.allclose(multiple, expected, rtol=1e-4, atol=1e-3)


def scores_of(root, split):
    torch.manual_seed(0)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    dataset = build_dataset("folder", root, split)
    result, = evaluate.evaluate(small_net(), dataset, torch.device("cpu"), rank=rank, world=world, workers=0)
    return {key: value for key, value in result.items() if key != "seconds"}


def scores_with_others(root, folder):
    dist.init_process_group("gloo")
    torch.save([scores_of(root, split) for split in ("train", "val", "one")], folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


def test_two_processes_count_every_image_once(own_folder, tmp_path):
    """Evaluation on 7, 5 and 1 images by two processes gives the numbers of one process: none padded, none lost."""
    lists = own_folder / "ImageSets/Segmentation"
    (lists / "one.txt").write_text((lists / "val.txt").read_text().split()[0])
    for status, _, err in launch(tmp_path, scores_with_others, own_folder, tmp_path, world=2):
        assert status == 0, err
    alone = [scores_of(own_folder, split) for split in ("train", "val", "one")]
    assert [result["images"] for result in alone] == [7, 5, 1] and len({result["miou"] for result in alone}) == 3
    for rank in (0, 1):                                       # as text: nan equals nan there
        assert repr(torch.load(tmp_path / f"{rank}.pt")) == repr(alone)


def test_table_1(capsys):
    """Table 1: `python ema.py` counts the paper's multiply-adds and parameters to 1 %, for all but DeepLabV3's head."""
    ema.print_costs()
    out = capsys.readouterr().out
    rows = {line[:34].strip(): [float(cell) for cell in re.findall(r"(?<!\S)(?:[\d.]+)(?!\S)", line[34:76])]
            for line in out.splitlines() if re.match(r".{34} *[\d.]+ ", line)}
    for name, paper_macs, paper_params in [("ResNet-101, stride 8, deep stem", 190.6, 42.6),
                                           ("+ EMANet(256): 3x3 + EMAU", 21.1, 4.87),
                                           ("+ EMANet(512): 3x3 + EMAU", 43.1, 10.0)]:
        macs, printed_macs, params, printed_params, _ = rows[name]
        assert (printed_macs, printed_params) == (paper_macs, paper_params)
        assert abs(macs / paper_macs - 1) < 0.01 and abs(params / paper_params - 1) < 0.01
    # Sec. 5.1: the rounds cost what a 1x1 convolution does, the unit a third of a 3x3
    alone, unit, one, three = (rows[name][0] for name in ("EM iterations alone (K=64, T=3)", "EMAU alone",
                                                          "1x1 conv 512-512", "3x3 conv 512-512"))
    assert 0.8 < alone / one < 1.1 and 0.3 < unit / three < 0.35


# ---------------------------------------------------------------------------------------------------------------------
# Command lines
LAST_LINE = (r"eval {} {} {} \| mIoU (\d+\.\d\d) \| pixAcc (\d+\.\d\d) \| mAcc (\d+\.\d\d) \| (\d+) images \| \d+ s")


def last_line(out, dataset, split="val", protocol="ss"):
    """The figures of the line that ends an evaluation."""
    line = out.strip().splitlines()[-1]
    match = re.fullmatch(LAST_LINE.format(dataset, split, protocol), line)
    assert match, line
    return [float(value) for value in match.groups()]


def validation(out):
    """The figures that train.py logged with its last validation, as evaluate.py prints them."""
    return [round(100 * list(log_of(out, f"val_{key}").values())[-1], 2) for key in ("miou", "pixacc", "macc")]


def plain(cwd, *argv, timeout=120):
    """A command exactly as a user starts it."""
    result = subprocess.run([sys.executable, *argv], cwd=cwd, capture_output=True, text=True,
                            timeout=timeout, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_reader_that_leaves(folder_root, tmp_path):
    """`python data.py ... | head`: no traceback when nobody reads any more."""
    process = subprocess.Popen([sys.executable, HERE / "data.py", "--dataset", "folder", "--data-root", folder_root],
                               cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 1


def test_scenes_from_training_to_evaluation(tmp_path):
    """`python train.py` needs no data; `python evaluate.py` on its result gives the same numbers as its validation."""
    out = plain(tmp_path, HERE / "train.py", *shlex.split(
        "--iters 4 --crop 64 --batch-size 4 --backbone resnet18 --channels 32 --num-bases 8 --seed 1"))
    path = tmp_path / "out/scenes/model.pth"
    assert path.exists() and (tmp_path / "out/scenes/last.pth").exists()
    assert "random (no ImageNet weights)" in out and "iter      4/4 | loss " in out
    assert "python evaluate.py --ckpt out/scenes/model.pth" in out
    assert list(log_of(path.parent, "loss")) == [1, 2, 3, 4]
    *figures, images = last_line(plain(tmp_path, HERE / "evaluate.py", "--ckpt", path), "scenes")
    assert figures == validation(path.parent) and images == 64


def test_torchrun_trains(folder_root, tmp_path):
    """`torchrun --nproc_per_node=2 train.py` on the CPU: two processes, one log, one network."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = plain(tmp_path, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}",
                HERE / TRAIN.split()[0], *TRAIN.replace("--iters 6", "--iters 2").split()[1:],
                "--data-root", folder_root)
    assert "2 processes" in out and out.count("iter      2/2") == 1
    assert list(log_of(tmp_path / "out/folder", "loss")) == [1, 2]


def test_folder_from_training_to_evaluation(run_folder, folder_root, tmp_path):
    """Your own folder: evaluate.py repeats the validation of train.py; the log has every iteration once."""
    assert sorted(path.name for path in run_folder.iterdir()) == ["last.before.pth", "last.pth", "log.jsonl", "model.pth"]
    assert list(log_of(run_folder, "loss")) == [1, 2, 3, 4, 5, 6] and list(log_of(run_folder, "val_miou")) == [4, 6]
    checkpoint = torch.load(run_folder / "model.pth", weights_only=True)
    assert checkpoint["config"]["data"] == {"dataset": "folder", "classes": CLASSES, "images": 7}
    out = succeed(tmp_path, f"evaluate.py --ckpt {run_folder}/model.pth --data-root {folder_root} --save-png png")
    *figures, images = last_line(out, "folder")
    assert figures == validation(run_folder) and images == 5 and all(name in out for name in CLASSES)
    for i, name in enumerate(build_dataset("folder", folder_root).ids):
        image = Image.open(tmp_path / "png" / f"{name}.png")
        assert image.mode == "P" and image.size[::-1] == [(11, 17), (60, 80), (57, 41), (33, 64)][i % 4]
    out = succeed(tmp_path, f"evaluate.py --ckpt {run_folder}/last.pth --data-root {folder_root} --split train "
                            "--ms-flip --output-stride 16 --workers 0")
    assert last_line(out, "folder", "train", "ms-flip")[3] == 7


def test_saved_pngs_hold_the_scored_predictions(run_folder, folder_root, tmp_path):
    """--save-png: the written indices, scored against the labels, give the printed numbers."""
    out = succeed(tmp_path, f"evaluate.py --ckpt {run_folder}/model.pth --data-root {folder_root} --save-png png")
    confusion = 0
    for i, name in enumerate(build_dataset("folder", folder_root).ids):
        prediction = torch.from_numpy(np.array(Image.open(tmp_path / "png" / f"{name}.png"))).long()
        confusion = confusion + evaluate.confusion_matrix(prediction, build_dataset("folder", folder_root)[i][1], 4)
    assert round(100 * evaluate.scores(confusion)["miou"], 2) == last_line(out, "folder")[0]


def test_voc_from_training_to_evaluation(run_folder, voc_root, tmp_path):
    """VOC: train on trainaug, from a network of other classes; evaluate on val, write the test server's predictions."""
    out = succeed(tmp_path, f"train.py --dataset voc --data-root {voc_root} --iters 2 --out run {SMALL} --decoder "
                            f"--accumulate 2 --init {run_folder}/model.pth")
    assert re.search("4 classes.* 21.*afresh", out) and f"weights  {run_folder}/model.pth" in out
    evaluation = f"evaluate.py --ckpt run/model.pth --data-root {voc_root}"
    *figures, images = last_line(succeed(tmp_path, evaluation), "voc")
    assert figures == validation(tmp_path / "run") and images == 3
    fail(tmp_path, f"{evaluation} --split test", "no labels", "--save-png")
    out = succeed(tmp_path, f"{evaluation} --split test --save-png test")
    assert "2 predictions" in out and "nan" not in out
    assert np.asarray(Image.open(tmp_path / "test/test_000001.png")).max() <= 20


def test_missing_validation_list_is_said(own_folder, tmp_path):
    """Your own folder without a val list is trained on all the same, with a line that says so."""
    (own_folder / "ImageSets/Segmentation/val.txt").unlink()
    out = succeed(tmp_path, f"{TRAIN} --iters 1 --data-root {own_folder}")
    assert "no validation" in out and "val.txt" in out
    assert load_checkpoint(tmp_path / "out/folder/model.pth").config["num_classes"] == 4


@pytest.mark.parametrize("name", ["train.py", "evaluate.py", "visualize.py"])
def test_help_names_every_flag(name, tmp_path):
    """--help: every flag of the design, and not more than can be read."""
    flags = {"train.py": "dataset data-root split recipe backbone stem weights init output-stride crop batch-size "
                         "accumulate iters lr eval-every workers amp compile resume out seed device attention "
                         "channels num-bases em-iterations lam alpha decoder",
             "evaluate.py": "ckpt dataset data-root split ms-flip output-stride save-png workers device",
             "visualize.py": "ckpt dataset data-root split image bases log out device"}[name].split()
    out = succeed(tmp_path, f"{name} --help")
    found = set(re.findall(r"^  --([a-z-]+)", out, re.MULTILINE))
    assert set(flags) <= found and len(found) <= 35


# Looking (Fig. 5)
def test_maps_are_the_responsibilities_of_the_prediction():
    """Fig. 5: what is drawn are the units' own rounds on the padded image, beside the prediction of evaluate.py."""
    net = small_net().eval()
    image = torch.from_numpy(picture((41, 60), 0).copy()).permute(2, 0, 1)
    prediction, z = visualize.look(net, image)
    with torch.no_grad():
        assert torch.equal(prediction, evaluate.predict(net, image).argmax(0).byte())
        features = net.reduce(net.backbone(F.pad(normalise(image[None]), (0, 5))))         # 41 x 65 pixels
        rounds = net.attention.em(net.attention.conv1(features).flatten(2).transpose(1, 2))
        expected = torch.cat([z for z, _ in rounds]).transpose(1, 2).reshape(3, 8, 6, 9)
    assert torch.allclose(z, expected, atol=1e-5) and torch.allclose(z.sum(1), torch.ones(3, 6, 9))
    maps = visualize.responsibility_maps(z, [5, 2], (41, 60))
    assert maps.shape == (3, 2, 41, 60) and torch.allclose(maps[:, :, ::8, ::8], z[:, [5, 2], :, :8], atol=1e-5)
    assert visualize.look(small_net(attention="none").eval(), image)[1] is None


def test_pictures_of_a_data_set(run_folder, folder_root, tmp_path):
    """Fig. 5: for images of a data set one picture each, and the prediction as an index PNG as evaluate.py writes it."""
    command = f"visualize.py --ckpt {run_folder}/model.pth --data-root {folder_root} --out pictures"
    out = succeed(tmp_path, f"{command} --count 2 --bases 7,3")
    succeed(tmp_path, f"evaluate.py --ckpt {run_folder}/model.pth --data-root {folder_root} --save-png png --workers 0")
    names = ["val_000000", "val_000001"]
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        "bases.png", *(f"{name}{end}.png" for name in names for end in ("", "_prediction"))}
    for name in names:
        assert f"wrote pictures/{name}.png" in out and Image.open(tmp_path / f"pictures/{name}.png").mode == "RGB"
        drawn, scored = (Image.open(tmp_path / path) for path in (f"pictures/{name}_prediction.png", f"png/{name}.png"))
        assert drawn.mode == "P" and np.array_equal(drawn, scored) and drawn.getpalette() == scored.getpalette()
    for bases in ("8", "-1", "x", "1,,2"):
        fail(tmp_path, f"{command} --bases={bases}", "--bases", "7")


def test_pictures_of_own_images(run_folder, tmp_path):
    """--image takes a file or a folder, large images too, turned as their EXIF data says; nothing else is needed."""
    exif = Image.Exif()
    exif[0x0112] = 6                                          # "turn by 90 degrees"
    (tmp_path / "photos").mkdir()
    Image.fromarray(picture((40, 60), 0)).save(tmp_path / "photos/turned.jpg", exif=exif)
    Image.fromarray(picture((50, 70), 0)[:, :, 0]).save(tmp_path / "photos/gray.png")
    (tmp_path / "photos/notes.txt").write_text("no image")
    command = f"visualize.py --ckpt {run_folder}/model.pth --size 32 --out . --image"
    succeed(tmp_path, f"{command} photos --bases random")
    sizes = {name: Image.open(tmp_path / f"{name}_prediction.png").size for name in ("turned", "gray")}
    assert sizes == {"turned": (40, 60), "gray": (70, 50)}
    fail(tmp_path, f"{command} photos/notes.txt", "notes.txt")
    fail(tmp_path, f"{command} photos/nothing.jpg", "nothing.jpg")
    fail(tmp_path, "visualize.py", "--ckpt")


def test_curves_of_a_run(run_folder, tmp_path):
    """--log draws the loss and the validations of a run, and says it where a file is no log."""
    succeed(tmp_path, f"visualize.py --log {run_folder}/log.jsonl --out .")
    assert len(Image.open(tmp_path / "curves.png").convert("RGB").getcolors(1 << 20)) > 4
    (tmp_path / "text.jsonl").write_text("no log\n")
    (tmp_path / "number.jsonl").write_text("1\n")
    for name in ("text.jsonl", "number.jsonl", "nothing.jsonl"):
        fail(tmp_path, f"visualize.py --log {name} --out .", name)


def test_benchmark_measures_every_stage(folder_root, capsys, monkeypatch):
    """--bench: a table of images/s, ours beside the released way, and what limits."""
    monkeypatch.setattr(sys, "argv", shlex.split(f"{TRAIN} --data-root {folder_root} --bench --cache --workers 1"))
    train.bench(train.parse_args(), seconds=0)
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if re.search(r"( +\d+\.\d\d){3}$", line)]
    assert [row.split()[0] for row in rows] == ["loading,"] * 2 + ["training"] * 2 + ["evaluation,"] * 2
    assert "limit" in lines[-1]


# Going on
def die_at(iteration):
    """Makes train.py die, as in a power cut, right after the log line of an iteration."""
    write = train.Log.write

    def write_and_die(self, **record):
        write(self, **record)
        if record["iteration"] == iteration:
            os.kill(os.getpid(), signal.SIGKILL)
    train.Log.write = write_and_die


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_continues_exactly(workers, run_folder, folder_root, tmp_path):
    """Stopped in mid-epoch and resumed, a run gives the weights, optimizer and losses of one that was not, bit by
    bit; with dropout, and whatever the number of workers."""
    command = f"{TRAIN} --data-root {folder_root} --workers {workers} --resume auto"
    assert python(tmp_path, command, before=partial(die_at, 5))[0] == -signal.SIGKILL
    out = tmp_path / "out" / "folder"
    assert torch.load(out / "last.pth")["iteration"] == 4 and max(log_of(out, "loss")) == 5
    assert "going on at iteration 4" in succeed(tmp_path, command)
    straight, resumed = (torch.load(path / "last.pth") for path in (run_folder, out))
    assert log_of(run_folder, "loss") == log_of(out, "loss")
    assert log_of(run_folder, "val_miou") == log_of(out, "val_miou")
    assert resumed["iteration"] == straight["iteration"] == 6 and resumed["best"] == straight["best"]
    assert all(torch.equal(resumed["model"][key], value) for key, value in straight["model"].items())
    momenta = [[value["momentum_buffer"] for value in run["optimizer"]["state"].values()] for run in (straight, resumed)]
    assert len(momenta[0]) > 50 and all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))
    assert straight["optimizer"]["param_groups"] == resumed["optimizer"]["param_groups"]


@pytest.mark.parametrize("world", [1, 2])
def test_logged_losses_survive_a_resume(world, folder_root, tmp_path):
    """A log line is a mean over iterations and processes: it is the same if the run stopped in the midst of them."""
    command = f"{TRAIN.replace('--iters 6 --eval-every 4', '--iters 100 --eval-every 5')} --data-root {folder_root}"
    for out, deaths in [("straight", [8]), ("resumed", [6, 8])]:               # last.pth at 5, log lines at 2, 4, 6, 8
        for death in deaths:
            python(tmp_path, f"{command} --out {out} --resume auto", before=partial(die_at, death), world=world)
    assert list(log_of(tmp_path / "straight", "loss")) == [2, 4, 6, 8]
    assert log_of(tmp_path / "straight", "loss") == log_of(tmp_path / "resumed", "loss")


def test_torn_log_does_not_stop_a_resume(run_folder, folder_root, tmp_path):
    """A power cut may leave half a line at the end of log.jsonl: going on drops it."""
    shutil.copytree(run_folder, tmp_path / "out/folder")
    with open(tmp_path / "out/folder/log.jsonl", "a") as file:
        file.write('{"iteration": 7, "lo')
    succeed(tmp_path, f"{TRAIN} --data-root {folder_root} --resume auto")
    assert list(log_of(tmp_path / "out/folder", "loss")) == [1, 2, 3, 4, 5, 6]


def test_resume_wants_the_same_experiment(run_folder, folder_root, tmp_path):
    """--resume with another setting, or from a network that is no run, is an error."""
    command = f"{TRAIN} --data-root {folder_root} --out new --resume {run_folder}"
    fail(tmp_path, f"{command}/last.pth --lr 0.1", "--lr 0.05", "0.1")
    fail(tmp_path, f"{command}/model.pth", "model.pth", "--init")
    fail(tmp_path, f"{command}/nothing.pth", "nothing.pth")


def test_existing_run_is_never_overwritten(run_folder, folder_root, tmp_path):
    """A second run into the same folder: one line that names --resume auto and --out, and not a byte changed."""
    out = tmp_path / "out" / "folder"
    shutil.copytree(run_folder, out)
    command = f"{TRAIN} --data-root {folder_root}"
    fail(tmp_path, command, "out/folder", "--resume auto", "--out")
    fail(tmp_path, f"{command} --resume {run_folder}/last.pth", "out/folder", "--out")     # another run's checkpoint
    assert sorted(path.name for path in out.iterdir()) == ["last.before.pth", "last.pth", "log.jsonl", "model.pth"]
    assert all(path.read_bytes() == (run_folder / path.name).read_bytes() for path in out.iterdir())


def test_scenes_move_the_earlier_run_aside(tmp_path):
    """Drawn data alone, so that the first command can be typed twice: the earlier run keeps its files, renamed."""
    for number in (1, 2):
        (tmp_path / "scenes").mkdir(exist_ok=True)
        (tmp_path / "scenes" / "model.pth").write_text(f"run {number}")
        args = argparse.Namespace(dataset="scenes", out=str(tmp_path / "scenes"), resume=None)
        (status, out, err), = launch(tmp_path, train.prepare_out, args)
        assert status == 0 and f"scenes-{number}" in out, err
        assert (tmp_path / f"scenes-{number}" / "model.pth").read_text() == f"run {number}"
        assert not (tmp_path / "scenes" / "model.pth").exists()


def test_resume_never_starts_over(run_folder, folder_root, tmp_path):
    """--resume auto where last.pth was deleted: the trained network is not written over by a new run."""
    out = shutil.copytree(run_folder, tmp_path / "out/folder")
    for path in out.glob("last*.pth"):
        path.unlink()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    fail(tmp_path, f"{TRAIN} --data-root {folder_root} --resume auto", "out/folder", "no last.pth", "--init", "--out")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def keep_states(folder):
    """Makes train.py write what this process holds before and after rank 0's buffers are given to all."""
    share = train.share_buffers

    def share_and_keep(net):
        before = {key: value.clone() for key, value in net.state_dict().items()}
        share(net)
        train.share_buffers = share                            # the first time only: later they are equal already
        torch.save((before, net.state_dict()), folder / f"state{dist.get_rank()}.pt")
    train.share_buffers = share_and_keep


def test_two_processes_end_with_one_network(folder_root, tmp_path):
    """Two processes that train: parameters and bases are equal all along, BN statistics from the validation on."""
    command = f"{TRAIN} --data-root {folder_root} --iters 3 --batch-size 4 --accumulate 2"
    (status, out, err), (other, silent, _) = python(tmp_path, command, partial(keep_states, tmp_path), world=2)
    assert status == other == 0, err
    silent = [line for line in silent.splitlines() if not line.startswith("[Gloo]")]      # torch 2.10 says it everywhere
    assert "2 processes x 1 x 2 parts" in out and not silent
    (before, after), (before_other, after_other) = (torch.load(tmp_path / f"state{rank}.pt") for rank in (0, 1))
    for key in after:
        assert torch.equal(after[key], after_other[key]), key
        if not re.search("running|tracked", key):
            assert torch.equal(before[key], before_other[key]), key
    assert not torch.equal(before["reduce.1.running_mean"], before_other["reduce.1.running_mean"])     # plain BN
    saved = torch.load(tmp_path / "out/folder/model.pth")["model"]
    assert all(torch.equal(saved[key], value) for key, value in after.items())
    assert list(log_of(tmp_path / "out/folder", "loss")) == [1, 2, 3]


@pytest.mark.parametrize("name, flags, classes", [("context", "", 59), ("context", "--context-classes 60", 60),
                                                  ("cocostuff", "", 171), ("cocostuff164k", "", 171)])
def test_data_sets_from_training_to_evaluation(name, flags, classes, releases, tmp_path):
    """Sec. 6.3: train.py and evaluate.py on a data set as its authors distribute it; Context says what it counts."""
    root = releases[name]
    out = succeed(tmp_path, f"train.py --dataset {name} --data-root {root} --iters 12 --lr 0.2 {flags} --workers 0 {SMALL}")
    assert f"{name} train: 2 images, {classes} classes; validation: 2" in out
    out = succeed(tmp_path, f"evaluate.py --ckpt out/{name}/model.pth --data-root {root} --workers 0")
    *figures, images = last_line(out, name, TRAIN_AND_VAL[name][1])
    assert figures == validation(tmp_path / "out" / name) and images == 2
    assert all(f"  {c} " in out for c in build_dataset(name, root).classes) and ("  other " in out) == (classes == 60)
    assert figures[1] > 0, figures
    if classes == 59:
        assert re.search(r"59 classes, everything else ignored.* x 59/60, here \d+\.\d\d,", out)
        assert "x 59/60, here 53.10," in evaluate.note(build_dataset(name, root), {"miou": 0.54})
    assert ("60 classes: everything else is learned" in out) == (classes == 60)


def test_cells_from_training_to_pictures(tmp_path):
    """--dataset cells: training says how many of the striped cells are right, evaluation says the same, with a network
    that is cut after layer2; the earlier run of a drawn data set is moved aside."""
    command = "train.py --dataset cells-key --iters 2 --batch-size 2 --channels 8 --num-bases 4 --workers 0"
    out = succeed(tmp_path, command)
    right = re.search(r"striped cells: (\d+\.\d)% right.*one cell tells 50%, that of twenty 50%", out)[1]
    assert "endless images, 4 classes; validation: 400" in out and "evaluate.py --ckpt out/cells-key/model.pth\n" in out
    acc = log_of(tmp_path / "out/cells-key", "val_acc")[2]
    assert float(right) == pytest.approx(50 * (acc[0] + acc[1]), abs=0.05)
    net = load_checkpoint(tmp_path / "out/cells-key/model.pth")
    assert net.config["layers"] == 2 and not any(key.startswith("backbone.layer3") for key in net.state_dict())
    assert len(succeed(tmp_path, "visualize.py --ckpt out/cells-key/model.pth --count 2").splitlines()) == 3
    fail(tmp_path, "evaluate.py --ckpt out/cells-key/model.pth --output-stride 16", "choose 8")


def test_three_stages_for_the_test_server(releases, tmp_path):
    """Sec. 6.2.3: COCO, then trainaug, then trainval, each from the last one's network; then the file that VOC's
    server takes: a .tar.gz of palette PNGs of the original sizes below results/."""
    root = tmp_path / "datasets"
    shutil.copytree(releases["voc"], root)
    shutil.copytree(releases["cocostuff164k"], root, dirs_exist_ok=True)
    write_sbd(root / "benchmark_RELEASE/dataset", {"2009_000001": ("train", 15), "2011_000009": ("val", 3)})
    base = root / "VOCdevkit/VOC2012"
    write_image(base / "JPEGImages/2009_000001.jpg")
    write_dataset(base, {"test": 3}, 21, label_folder="unused")
    command = f"--workers 0 --iters 2 {SMALL}"
    assert "2 images, 21 classes" in succeed(tmp_path, f"train.py --dataset coco2voc {command}")
    assert "voc trainaug: 3 images" in succeed(
        tmp_path, f"train.py --dataset voc --lr 0.001 --init out/coco2voc/model.pth {command}")
    out = succeed(tmp_path, f"train.py --dataset voc --lr 0.0001 --split trainval --init out/voc/model.pth "
                            f"--out out/trainval {command}")
    assert "voc trainval: 4 images" in out and "weights  out/voc/model.pth" in out and "afresh" not in out
    evaluation = "evaluate.py --ckpt out/trainval/model.pth --workers 0"
    assert last_line(succeed(tmp_path, evaluation), "voc")[:3] == validation(tmp_path / "out/trainval")
    out = succeed(tmp_path, f"{evaluation} --split test --submission test.tar.gz")
    assert "wrote test.tar.gz: 3 predictions" in out
    with tarfile.open(tmp_path / "test.tar.gz", "r:gz") as archive:
        assert archive.getnames() == [f"results/VOC2012/Segmentation/comp6_test_cls/test_{i:06d}.png" for i in range(3)]
        for i, member in enumerate(archive.getmembers()):
            prediction = Image.open(archive.extractfile(member))
            assert member.isfile() and prediction.mode == "P" and np.max(prediction) <= 20
            assert prediction.size == Image.open(base / f"JPEGImages/test_{i:06d}.jpg").size
            assert prediction.getpalette() == data.voc_palette().flatten().tolist()
    fail(tmp_path, f"{evaluation} --split test --submission test.zip", "test.zip", ".tar.gz")


# The check
def shares(out):
    """{class: percent} as python data.py prints it."""
    return {name.strip(): float(share) for name, share in re.findall(r"^    (.{20}) +([\d.]+) %$", out, re.MULTILINE)}


@pytest.mark.parametrize("name", RELEASES)
def test_check_of_a_good_copy(name, releases, tmp_path):
    """`python data.py`: counts beside the official ones, class shares, a picture to look at, exit status 0."""
    out = succeed(tmp_path, f"data.py --dataset {name} --data-root {releases[name]} --all")
    for split in TRAIN_AND_VAL[name]:
        official = data.OFFICIAL[name][split]
        assert re.search(rf"^  {split} +2 images, {official - 2} fewer than the official {official}$", out, re.MULTILINE)
    assert "FAULT" not in out and "2 of 2 pairs read are whole" in out
    copy, found = build_dataset(name, releases[name], "train"), shares(out)
    assert list(found) == [*copy.classes, "(ignored)"] and abs(sum(found.values()) - 100) < 1
    for c in (0, 14, 255):
        share = 100 * torch.stack([copy[i][1] for i in range(2)]).eq(c).float().mean().item()
        assert abs(found["(ignored)" if c == 255 else copy.classes[c]] - share) < 0.006
    sheet = Image.open(tmp_path / f"out/check/{name}.png").convert("RGB")
    assert len(sheet.getcolors(1 << 20)) > 10


def test_check_names_every_fault(own_release, tmp_path):
    """`python data.py` on a broken copy: a line for every fault, once, and exit status 1."""
    root = own_release("cocostuff164k")
    for i, raw in ((0, np.full(SIZE, 182)), (2, np.zeros((17, 11)))):
        write_raw("cocostuff164k", raw.astype(np.uint8), label_path("cocostuff164k", root, i))
    status, out, err = python(tmp_path, f"data.py --dataset cocostuff164k --data-root {root}")
    assert status == 1 and err == f"error: 2 faults found in {root}\n"
    assert re.findall(r"FAULT: .*/(\d+)\.png: (label value 182|label is 11x17)", out) == [
        (IDS["cocostuff164k"][0], "label value 182"), (IDS["cocostuff164k"][2], "label is 11x17")]
    assert out.count("1 of 2 pairs read are whole") == 2
    fail(tmp_path, f"data.py --dataset cocostuff --data-root {root} --download", "cocostuff cannot be downloaded")


COMBINATIONS = [f"--base-update {update} --base-norm {norm} --gradient {gradient}"
                for update in ("average", "backprop", "fixed") for norm in ("l2", "layer", "none")
                for gradient in ("none", "last", "full") if update != "backprop" or gradient == "full"]
COMBINATIONS += ["--attention nonlocal", "--attention a2 --num-bases 5", "--attention none", "--lam 4 --alpha 0.5",
                 "--num-bases 3 --em-iterations 1", "--em-iterations 6 --channels 24 --decoder", "--accumulate 2"]


def train_and_evaluate(folder, root):
    """train.py and evaluate.py for every combination in turn, in one process, where only the head matters."""
    os.chdir(folder)
    shrink()
    for number, flags in enumerate(COMBINATIONS):
        print(f"\n=== {flags}")
        sys.argv = shlex.split(f"train.py --dataset folder --data-root {root} --iters 10 --lr 0.05 --crop 40 --weights none "
                               f"--batch-size 2 --workers 0 --channels 16 --out {number} {flags}"
                               + " --num-bases 8" * ("--num-bases" not in flags and "--attention" not in flags))
        data.run(train.main)
        sys.argv = shlex.split(f"evaluate.py --ckpt {number}/model.pth --data-root {root} --workers 0")
        data.run(evaluate.main)


def test_every_option_trains_and_comes_back(folder_root, tmp_path, tiny):
    """Every flag of the attention, alone and together: ten iterations, then evaluate.py repeats the validation from the
    checkpoint, which holds the options."""
    (status, out, err), = launch(tmp_path, train_and_evaluate, tmp_path, folder_root)
    assert status == 0, (err, out.split("\n=== ")[-1])
    parts = out.split("\n=== ")[1:]
    assert len(parts) == len(COMBINATIONS) == 28
    figures = []
    for number, (flags, part) in enumerate(zip(COMBINATIONS, parts, strict=True)):
        *figure, images = last_line(part, "folder")
        assert figure == validation(tmp_path / str(number)) and images == 5, flags
        config = load_checkpoint(tmp_path / f"{number}/model.pth").config
        for flag, value in re.findall(r"--([a-z-]+) (\w\S*)", flags):
            if flag != "accumulate":
                assert str(config[flag.replace("-", "_")]) in (value, f"{value}.0"), flags
        figures.append(list(log_of(tmp_path / str(number), "loss").values())[-1])
    assert all(map(math.isfinite, figures)) and len(set(figures)) > 15            # the flags do something


def test_rounds_at_evaluation(folder_root, tmp_path, tiny):
    """Fig. 4: evaluate.py --em-iterations evaluates several T in one pass, as one by one; and several checkpoints, as
    a table of T in training by T in evaluation."""
    for trained in (1, 3):
        write_net(small_net(seed=trained, em_iterations=trained, lam=20.0), tmp_path / f"{trained}.pth")
    command = f"evaluate.py --data-root {folder_root} --workers 0 --ckpt"
    out = succeed(tmp_path, f"{command} 1.pth 3.pth --em-iterations 1 2 4", before=shrink)
    assert re.search(r"mIoU at T = +1 +2 +4$", out, re.MULTILINE)
    found = {path: [float(m) for m in row.split()] for row, path in
             re.findall(r"^  trained at T = \d((?: +[\d.]+){3})   (\S+)$", out, re.MULTILINE)}
    alone = {path: [last_line(succeed(tmp_path, f"{command} {path} --em-iterations {T}", before=shrink),
                                       "folder")[0] for T in (1, 2, 4)] for path in ("1.pth", "3.pth")}
    assert found == alone and all(len(set(row)) > 1 for row in alone.values())
    own = last_line(succeed(tmp_path, f"{command} 1.pth", before=shrink), "folder")[0]
    assert own == found["1.pth"][0]                           # without the flag: the T it was trained with


def test_table_of_rounds_shows_whole_numbers():
    """Fig. 4: the table of T in training and evaluation, with figures of two digits before the point."""
    lines = evaluate.rounds_table([("a.pth", 3, [0.7852, 0.8005]), ("b.pth", 16, [0.1, 1.0])], [1, 16]).splitlines()
    assert [line.split() for line in lines] == [["mIoU", "at", "T", "=", "1", "16"],
                                                ["trained", "at", "T", "=", "3", "78.52", "80.05", "a.pth"],
                                                ["trained", "at", "T", "=", "16", "10.00", "100.00", "b.pth"]]


def test_rounds_need_em(folder_root, tmp_path):
    """--em-iterations is refused where the attention has no rounds, and below one."""
    for attention, rounds, *words in (("a2", 2, "a2.pth", "no EM rounds"), ("emau", 0, "--em-iterations 0")):
        write_net(small_net(attention=attention), tmp_path / f"{attention}.pth")
        fail(tmp_path, f"evaluate.py --ckpt {attention}.pth --data-root {folder_root} --em-iterations {rounds}", *words)


def slow_statistics(unit, x):
    """ema.base_statistics for the pixels of one image (N, C), in numpy, from their definitions."""
    *_, (z, mu) = unit.em(x[None])
    x, z, mu = x.numpy(), z[0].numpy(), mu[0].T.numpy()
    perplexity = np.mean([np.exp(-sum(p * np.log(p) for p in row if p > 0)) for row in z])
    cosine = [a @ b / np.sqrt((a @ a) * (b @ b)) for i, a in enumerate(mu) for j, b in enumerate(mu) if i != j]
    variances = np.linalg.eigvalsh(np.cov((z @ mu).T)).clip(0)
    share = variances[variances > 1e-14 * variances.sum()] / variances.sum()
    return {"length": np.mean(np.sqrt((x ** 2).sum(1))), "perplexity": perplexity,
            "used": len({int(np.argmax(row)) for row in z}), "cosine": np.mean(cosine),
            "rank": np.exp(-(share * np.log(share)).sum())}


@pytest.mark.parametrize("scale, options", [(1.0, {}), (4.0, {"lam": 2.0}), (1.0, {"base_norm": "none"})])
def test_statistics_of_the_bases(scale, options):
    """Sec. 6.5 in numbers: length, perplexity, use, cosine and rank are those of a slow version, image by image."""
    unit, x = random_em(0, 3, 70, 6, 9, 3, **{"lam": 1.0} | options, scale=scale)
    expected = [slow_statistics(unit, image) for image in x]
    for key, value in base_statistics(unit, x).items():
        assert math.isclose(value, np.mean([e[key] for e in expected]), rel_tol=1e-6), key


def test_dead_attention_is_said(folder_root, run_folder, tmp_path, tiny):
    """--bases prints what the bases do, and train.py logs it with every validation; where all pixels get about the
    same mixture of bases, a warning says so."""
    assert all(list(log_of(run_folder, f"bases_{key}")) == [4, 6] for key in ("rank", "perplexity", "used", "length"))
    command = f"evaluate.py --data-root {folder_root} --workers 0 --bases --ckpt"
    line = r"^bases \| \|x\| ([\d.]+) \| perplexity of z ([\d.]+) of 8 \| (\d+) in use \| cosine (\S+) \| effective rank (\S+)$"
    for name, scale in (("alive", 4.0), ("dead", 1e-3)):
        net = small_net(channels=64, lam=4.0).eval()
        net.attention.conv1.weight.data *= scale
        net.attention.conv1.bias.data *= scale
        write_net(net, tmp_path / f"{name}.pth")
        out = succeed(tmp_path, f"{command} {name}.pth", before=shrink)
        printed = [float(value) for value in re.search(line, out, re.MULTILINE).groups()]
        with torch.no_grad():
            features = [net.features(evaluate.pad(data.normalise(image[None])))
                        for image, _ in (build_dataset("folder", folder_root)[i] for i in range(5))]
            each = [slow_statistics(net.attention, net.attention.pixels(f)[0]) for f in features]
        assert np.allclose(printed, [np.mean([e[key] for e in each]) for key in each[0]], atol=0.51, rtol=0.02)
        assert ("warning: the attention is nearly dead" in out) == (name == "dead"), out


def test_the_same_bases_over_several_images():
    """Fig. 5: one row per image, a panel per basis: white where the basis answers for all, dark where for nothing."""
    image = torch.from_numpy(picture((17, 33), 0).copy()).permute(2, 0, 1)
    left = torch.zeros(2, 3, 3, 5)                                             # (T, K, h, w)
    left[-1, 1, :, :2], left[-1, 2, :, 3:] = 1, 1
    sheet = np.asarray(visualize.bases_over_images([("a", image, left), ("b", image, left.flip(3))], [1, 2]))
    step, panel = 256 + visualize.GAP, round(256 * 17 / 33)
    rows = [visualize.GAP + visualize.TEXT + visualize.GAP // 2 + i * (panel + visualize.TEXT + 2 * visualize.GAP)
            for i in range(2)]
    bright = [[[int(sheet[y + panel // 2, visualize.GAP + k * step + x].sum()) for x in (20, 235)] for k in (1, 2)]
              for y in rows]
    assert sheet.shape[1] == visualize.GAP + 3 * step
    dark, white = (int(visualize.HEAT[i].sum()) for i in (0, -1))
    assert bright == [[[white, dark], [dark, white]], [[dark, white], [white, dark]]]


def test_network_can_be_exported():
    """torch.export with any number of images gives the same logits to 1e-5."""
    net, images = small_net(decoder=True).eval(), torch.randn(3, 3, 33, 41)
    exported = torch.export.export(net, (images[:2],), dynamic_shapes={"images": {0: torch.export.Dim("B", min=1)}})
    with torch.no_grad():
        for count in (1, 3):
            assert torch.allclose(exported.module()(images[:count]), net(images[:count]), rtol=0, atol=1e-5)


@slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("gradient", ["none", "full"])
def test_network_can_be_compiled(gradient, tiny):
    """torch.compile gives the same logits and, in training, the same gradients and bases to 1e-5."""
    net, twin = small_net(gradient=gradient), small_net(gradient=gradient)
    compiled, images = torch.compile(net), torch.randn(2, 3, 33, 41)
    for model in (compiled, twin):
        model(images).square().mean().backward()
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-5)), name
    assert torch.allclose(net.attention.mu, twin.attention.mu, rtol=0, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(torch.compile(net.eval())(images), twin.eval()(images), rtol=0, atol=1e-5)


def test_evidence_is_what_the_runs_gave():
    """The tables of assets/evidence/README.md are those that its scripts print from the logs, and the README's table of
    cells has their means and deviations."""
    evidence = HERE / "assets" / "evidence"
    told, front = (evidence / "README.md").read_text().splitlines(), (HERE / "README.md").read_text()
    looks = ["robustness", "compactness"]
    scripts = {"run.py": sorted({path.stem for path in evidence.glob("*.jsonl")} - set(looks)), "look.py": looks}
    assert {"cells", "cells-key", "camvid"} <= set(scripts["run.py"])
    for name, what in scripts.items():
        printed = plain(HERE, evidence / name, *what, "--table").splitlines()
        assert len(printed) > 8 and not [line for line in printed if line not in told]
    for name in ("cells", "cells-key"):
        lines = [json.loads(line) for line in (evidence / f"{name}.jsonl").read_text().splitlines()]
        for arm in {line["arm"] for line in lines}:
            right = [50 * sum(line["acc"][:2]) for line in lines if line["arm"] == arm]
            assert len(right) == 5 and f"{np.mean(right):.1f} ± {np.std(right, ddof=1):.1f}" in front, (name, arm)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit status 1
def test_wrong_data_root(tmp_path, voc_root, folder_root):
    """A data root that is not there, or not the data set's, is named."""
    fail(tmp_path, "train.py --dataset voc", "no folder datasets", "--data-root")
    fail(tmp_path, f"train.py --dataset voc --data-root {folder_root}", folder_root, "VOCdevkit", "--data-root")
    fail(tmp_path, f"train.py --dataset folder --data-root {voc_root}", "classes.txt", "--data-root")
    fail(tmp_path, f"train.py --dataset voc --data-root {voc_root} --split nothing", "nothing.txt", "trainaug")
    assert not (tmp_path / "out").exists()


def test_missing_files(tmp_path, own_folder):
    """An id on a list without its image or its label is named, before anything starts; also one to validate."""
    command = f"{TRAIN} --data-root {own_folder}"
    mask = own_folder / "SegmentationClass/train_000003.png"
    mask.rename(tmp_path / "mask.png")
    fail(tmp_path, command, "train_000003.png", "1 of 7")
    (tmp_path / "mask.png").rename(mask)
    (own_folder / "JPEGImages/train_000000.jpg").rename(tmp_path / "image.jpg")
    fail(tmp_path, command, "train_000000.jpg", "1 of 7")
    (tmp_path / "image.jpg").rename(own_folder / "JPEGImages/train_000000.jpg")
    (own_folder / "SegmentationClass/val_000002.png").unlink()
    fail(tmp_path, command, "val_000002.png", "1 of 5")


def broken_label(path, how):
    label = np.array(Image.open(path))
    if how == "size":
        write_label(label[:-1], path)
    elif how == "value":
        label[0, 5] = 4
        write_label(label, path)
    elif how == "rgb":
        Image.open(path).convert("RGB").save(path)
    elif how == "16 bits":
        Image.fromarray(label.astype(np.uint16)).save(path)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize("how, words", [("size", "pixels"), ("value", "label value 4"), ("rgb", "RGB"), ("16 bits", "I;16"),
                                        ("truncated", "cannot be read")])
def test_bad_labels(how, words, own_folder, tmp_path):
    """A label of another size, with a value that is no class, of another kind, or torn, is named."""
    path = own_folder / "SegmentationClass/val_000001.png"
    broken_label(path, how)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: .*{re.escape(words)}"):
        build_dataset("folder", own_folder, "val")[1]
    train_path = own_folder / "SegmentationClass/train_000001.png"
    shutil.copy(path, train_path)                             # the same size by construction
    with pytest.raises(UserError, match=re.escape(str(train_path))):
        for iteration in range(40):                           # the crop of some iteration shows it
            TrainView(build_dataset("folder", own_folder, "train"), 48, 0)[iteration, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_label_ends_a_run_with_one_line(workers, own_folder, tmp_path, run_folder):
    """A label that is no index image, met in this process or in a worker of the loader, ends evaluate.py cleanly."""
    broken_label(own_folder / "SegmentationClass/val_000001.png", "rgb")
    fail(tmp_path, f"evaluate.py --ckpt {run_folder}/model.pth --data-root {own_folder} --workers {workers}",
         "val_000001.png", "RGB")


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_image_ends_a_run_with_one_line(workers, own_folder, tmp_path):
    """A JPEG or PNG that breaks off is named, by train.py as well, from wherever in the loader it was met."""
    for path in sorted((own_folder / "JPEGImages").glob("train*")):
        path.write_bytes(path.read_bytes()[:-60])
        with pytest.raises(UserError, match=path.name):
            data.read_image(path)
    fail(tmp_path, f"{TRAIN} --data-root {own_folder} --workers {workers}", "JPEGImages/train_00000", "cannot be read")


def test_classes_that_do_not_fit(run_folder, voc_root, own_folder, tmp_path):
    """A network of 4 classes is not evaluated on data of 21; a list of classes must be there."""
    fail(tmp_path, f"evaluate.py --ckpt {run_folder}/model.pth --dataset voc --data-root {voc_root}", "4", "21")
    (own_folder / "classes.txt").write_text("\n")
    fail(tmp_path, f"{TRAIN} --data-root {own_folder}", "classes.txt")
    (own_folder / "classes.txt").unlink()
    fail(tmp_path, f"{TRAIN} --data-root {own_folder}", "classes.txt")


def test_released_file_wants_a_dataset(released, tmp_path):
    """A released file does not say what it was trained on: evaluate.py asks for --dataset."""
    fail(tmp_path, f"evaluate.py --ckpt {released[1]}", "--dataset")


class Payload:
    """What a hostile checkpoint holds: loading it with pickle would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def write_bad_checkpoint(kind, good, path):
    content = bytearray(good.read_bytes())
    if kind == "truncated":
        path.write_bytes(content[:len(content) // 2])
    elif kind == "flipped":
        content[len(content) // 2] ^= 16
        path.write_bytes(content)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no checkpoint\n")
    elif kind == "picture":
        Image.fromarray(picture((11, 17), 0)).save(path, "PNG")
    elif kind == "payload":
        torch.save({"model": {}, "config": Payload(path.with_name("created"))}, path)
    elif kind == "bare":
        torch.save(torchvision.models.resnet18().state_dict(), path)
    elif kind == "foreign":                                   # nanoGPT's checkpoints have these keys, too
        torch.save({"model": {"wte": torch.zeros(3)}, "config": {"n_layer": 12}}, path)
    elif kind == "net":
        torch.save({"net": [1, 2, 3]}, path)


@pytest.mark.parametrize("kind", ["missing", "truncated", "flipped", "empty", "text", "picture", "payload", "bare",
                                  "foreign", "net"])
def test_bad_checkpoints(kind, run_folder, tmp_path):
    """A checkpoint that is missing, torn, damaged in one byte, no checkpoint at all or hostile is refused, by name."""
    write_bad_checkpoint(kind, run_folder / "model.pth", tmp_path / "model.pth")
    fail(tmp_path, "evaluate.py --ckpt model.pth", "model.pth")
    assert not (tmp_path / "created").exists()


def test_damaged_last_checkpoint_is_not_resumed(run_folder, folder_root, tmp_path):
    """--resume auto from a torn last.pth, and none before it, stops; it does not start again from nothing."""
    shutil.copytree(run_folder, tmp_path / "out/folder")
    write_bad_checkpoint("truncated", run_folder / "last.pth", tmp_path / "out/folder/last.pth")
    (tmp_path / "out/folder/last.before.pth").unlink()
    fail(tmp_path, f"{TRAIN} --data-root {folder_root} --resume auto", "last.pth", "damaged")


@pytest.mark.parametrize("flags, words", [
    ("--batch-size 8", ["7 images", "8"]), ("--batch-size 3 --accumulate 2", ["--batch-size 3"]),
    ("--recipe released", ["released", "folder"]), ("--init nothing.pth", ["nothing.pth"]),
    ("--weights nothing.pth", ["nothing.pth"]), ("--attention nonlocal --num-bases 4", ["--num-bases", "nonlocal"]),
    ("--bench --batch-size 8", ["7 images", "batch of 8"]), ("--device cuda", ["cuda"]), ("--device abacus", ["abacus"]),
    ("--eval-every 0", ["--eval-every"]), ("--accumulate 0", ["--accumulate"]), ("--batch-size 0", ["--batch-size"]),
    ("--iters 0", ["--iters"]), ("--crop 0", ["--crop"]), ("--workers -1", ["--workers"])])
def test_settings_that_cannot_be(flags, words, folder_root, tmp_path):
    """A setting that cannot work is named; nothing is written."""
    fail(tmp_path, f"{TRAIN} --data-root {folder_root} {flags}", *words)
    assert not list(tmp_path.glob("out/*/*.pth"))


def test_classes_of_other_names_are_not_scored(run_folder, own_folder, tmp_path):
    """evaluate.py: as many classes in another order would give a wrong mIoU, and no sign of it."""
    (own_folder / "classes.txt").write_text("\n".join(reversed(CLASSES)))
    fail(tmp_path, f"evaluate.py --ckpt {run_folder}/model.pth --data-root {own_folder}", "other names, or another order")


def test_pictures_that_cannot_be_written(run_folder, folder_root, tmp_path):
    """visualize.py and evaluate.py: a folder that cannot be made is one line."""
    (tmp_path / "file").write_text("")
    fail(tmp_path, f"visualize.py --ckpt {run_folder}/model.pth --data-root {folder_root} --out file/x", "file/x")
    fail(tmp_path, f"evaluate.py --ckpt {run_folder}/model.pth --data-root {folder_root} --save-png file/x", "file/x")


def test_gpus_that_are_not_there(monkeypatch):
    """A GPU that is not there, and more processes than GPUs, are named before CUDA or NCCL fail."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert data.pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="cuda:2: there are 2 GPUs"):
        data.pick_device("cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="--nproc_per_node=2 at most"):
        evaluate.init_distributed("auto")


def test_missing_validation_is_an_error_for_voc(voc_root, tmp_path):
    """VOC comes with its val list: without it the copy is not whole."""
    root = Path(shutil.copytree(voc_root, tmp_path / "voc"))
    (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").unlink()
    fail(tmp_path, f"train.py --dataset voc --data-root {root} --iters 1 {SMALL}", "val.txt")


def lose_list(root):
    (root / "VOCdevkit/VOC2010/ImageSets/Main/val.txt").unlink()


def lose_mask(root):
    label_path("cocostuff", root, 2).unlink()


def labels_of(name, root, change):
    for i in range(4):                                        # all four: whatever is read first shows it
        raw = change(mixed(VALUES[name], i).astype(np.uint16))
        write_raw(name, raw.astype(np.uint16 if name == "context" else np.uint8), label_path(name, root, i))


def exceed(name, value):
    return lambda root: labels_of(name, root, lambda raw: np.where(np.arange(11)[:, None] < 6, value, raw))


def version_1_0(root):
    for i in range(4):
        write_mat(label_path("cocostuff", root, i), S=mixed(range(2, 173), i), names=names_cell(172))


def empty_mats(name):
    return lambda root: [label_path(name, root, i).write_bytes(b"") for i in range(4)]


def unpack_deeper(root):
    root.rename(root.with_name("moved"))
    root.mkdir()
    root.with_name("moved").rename(root / "archive")


BROKEN = {  # what: data set, the damage, words of the line, --data-root below the copy
    "missing list": ("context", lose_list, "no list .*/Main/val.txt; lists there: train, trainval", ""),
    "lost mask": ("cocostuff", lose_mask, "no COCO_train2014_000000000825.mat in .*/annotations: 1 of 2", ""),
    "version 1.0": ("cocostuff", version_1_0, r"/annotations/COCO.*\.mat: .*version 1.0.*cocostuff-10k-v1.1.zip", ""),
    "VOC class 21": ("voc", exceed("voc", 21), r"/SegmentationClass/.*\.png: label value 21 .* 21 classes", ""),
    "Context id 460": ("context", exceed("context", 460), r"/trainval/.*\.mat: label value 460", ""),
    "10K id 183": ("cocostuff", exceed("cocostuff", 183), r"/annotations/.*\.mat: label value 183", ""),
    "164K value 182": ("cocostuff164k", exceed("cocostuff164k", 182), r"/annotations/.*\.png: label value 182", ""),
    "another size": ("context", lambda root: labels_of("context", root, lambda raw: raw.T),
                     r"/trainval/.*\.mat: label is 11x17, its image 17x11", ""),
    "empty .mat": ("cocostuff", empty_mats("cocostuff"), r"/annotations/COCO.*\.mat: cannot be read", ""),
    **{f"{name} too deep": (name, unpack_deeper, "--data-root .*/archive", "") for name in RELEASES},
    **{f"{name} one level off": (name, lambda root: None, rf"--data-root /\S*/{name}$", below) for name, below in
       zip(RELEASES, ("VOCdevkit", "VOCdevkit", "annotations", "images"), strict=True)}}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_copies(what, own_release, networks, tmp_path):
    """A copy that is not whole, or not where it is looked for: one line that names file and remedy, from data.py,
    train.py and evaluate.py alike."""
    name, damage, words, below = BROKEN[what]
    root = own_release(name)
    damage(root)
    options = f"--dataset {name} --data-root {root / below}"
    classes = {"voc": 21, "context": 59}.get(name, 171)
    for command in (f"train.py --split train --iters 9 --workers 0 {SMALL} {options}",
                    f"evaluate.py --ckpt {networks[classes]} --workers 0 {options}", f"data.py {options}"):
        status, out, err = python(tmp_path, command)
        assert status == 1 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out + err, err
        lines = out.splitlines() if "faults found" in err or "fault found" in err else []
        assert any(re.search(words, line) for line in [*lines, err.strip()]), (command, out, err)


# ---------------------------------------------------------------------------------------------------------------------
# Faults: what a power cut, a full disk, a lost process or a hostile file does to a run
# An epoch is three iterations, so that a checkpoint lies in the midst of one; a log line comes with every iteration.
FAULTY = ("train.py --dataset folder --iters 8 --eval-every 2 --lr 0.05 --backbone resnet18 --weights none "
          "--channels 16 --num-bases 4 --crop 33 --batch-size 2 --output-stride 16 --resume auto --out run")


@pytest.fixture(scope="session")
def faulty(folder_root):
    """The command whose runs get broken; it writes to run/."""
    return f"{FAULTY} --data-root {folder_root}"


@pytest.fixture(scope="session")
def straight(faulty, tmp_path_factory):
    """straight(world): the output folder of a run by `world` processes that nothing disturbs; not to be changed."""
    @cache
    def straight_run(world):
        cwd = tmp_path_factory.mktemp("straight")
        finish_run(cwd, faulty, world)
        return cwd / "run"
    return straight_run


def finish_run(cwd, command, world=1):
    """The command as it is, to its end, by so many processes: what it printed."""
    results = python(cwd, f"{command} --workers 0", world=world)
    results = [results] if world == 1 else results
    assert [status for status, _, _ in results] == [0] * world, [err for _, _, err in results]
    return results[0][1]


def flat(value):
    """All tensors and numbers in nested dicts and lists, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, (list, tuple)) else [value]


def same(a, b):
    """Whether two parts of checkpoints are equal bit by bit."""
    pairs = list(zip(flat(a), flat(b), strict=True))
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def check_same_run(run, straight):
    """Both runs have ended, with the same weights, optimizer, losses and scores, bit by bit."""
    last, expected = read_checkpoint(run / "last.pth"), read_checkpoint(straight / "last.pth")
    assert last["iteration"] == expected["iteration"] == 8 and last["validated"]
    for part in ("model", "optimizer", "window", "best"):
        assert same(last[part], expected[part]), part
    for key in ("loss", "lr", "val_miou", "val_iou", "bases_rank"):
        assert log_of(run, key) == log_of(straight, key), key
    assert same(read_checkpoint(run / "model.pth")["model"], expected["model"])


def check_message(status, err, *words):
    """One line on stderr that holds all the words, exit status 1."""
    assert status == 1, (status, err)
    line, = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err and err.rstrip().endswith(line), err
    for word in words:
        assert re.search(word, line), (word, line)
    return line


# What happens in a child, through `before`. Each is told in which process, and when.
def both(*actions):
    for action in actions:
        action()


def at_iteration(number, action, place="normalise", rank=0):
    """Makes train.py call action() at a place in its n-th iteration (counted in this process) on one rank."""
    owner = train.Stop if place == "everywhere" else train
    original, count = getattr(owner, place), iter(range(1, 10**6))

    def act_too(*args, **options):
        now = next(count) == number and int(os.environ.get("RANK", "0")) == rank
        changed = action() if now else None
        return original(*args, **options) if changed is None else changed(original(*args, **options))
    setattr(owner, place, act_too)


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def raise_error():
    raise ValueError("a bug")


def hang(folder):
    """Like a process without network: until the other one has given up, which it cannot know of."""
    while "error: " not in (folder / "rank0.stderr").read_text():
        time.sleep(0.1)
    be_killed()


def poison():
    """An image whose values are not finite."""
    return lambda images: images * float("nan")


def poison_update(number):
    """Makes the n-th step of the optimizer destroy the weights, while the loss still is finite."""
    step, count = torch.optim.SGD.step, iter(range(1, 10**6))

    def step_astray(self, *args):
        if next(count) == number:
            self.param_groups[0]["params"][0].grad.fill_(float("nan"))
        return step(self, *args)
    torch.optim.SGD.step = step_astray


def kill_a_worker():
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    time.sleep(0.5)


def fill_the_disk(room):
    """From now on files of this process cannot grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


def be_patient(seconds):
    evaluate.PATIENCE = train.PATIENCE = seconds


def write_slowly():
    """Makes checkpoints come in twenty pieces, and both renames wait, so that a kill may hit any of it."""
    save, replace = torch.save, os.replace

    def save_slowly(checkpoint, file):
        buffer = io.BytesIO()
        save(checkpoint, buffer)
        content = buffer.getbuffer()
        for start in range(0, len(content), len(content) // 20):
            file.write(content[start:start + len(content) // 20])
            file.flush()
            time.sleep(0.02)

    def replace_slowly(*paths):
        time.sleep(0.15)
        replace(*paths)
        time.sleep(0.15)
    torch.save, os.replace = save_slowly, replace_slowly


def break_off(number, error):
    """Makes the n-th write of a checkpoint break off half-way."""
    save, count = torch.save, iter(range(1, 10**6))

    def save_half(checkpoint, file):
        if next(count) < number:
            return save(checkpoint, file)
        buffer = io.BytesIO()
        save(checkpoint, buffer)
        file.write(buffer.getbuffer()[:buffer.tell() // 2])
        raise error
    torch.save = save_half


def log_to_full_disk():
    init = train.Log.__init__

    def init_full(self, *args):
        init(self, *args)
        self.path = Path("/dev/full")
    train.Log.__init__ = init_full


def begin(cwd, command, before=None):
    """`python COMMAND` in folder `cwd`, in a process group of its own as in a terminal: the process, still running."""
    outputs = cwd / "stdout", cwd / "stderr"
    for path in outputs:
        path.write_text("")
    argv = shlex.split(command)
    process = SERVER.Process(target=child, args=({}, outputs, script, (argv, cwd, partial(both, os.setsid, *before))))
    process.start()
    return process


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)


def keep_digests(folder):
    """Makes train.py keep every last.pth it has written, by its iteration."""
    save = train.save_checkpoint

    def save_and_keep(checkpoint, path, keep=False):
        save(checkpoint, path, keep)
        if keep:
            shutil.copy(path, folder / f"{checkpoint['iteration']}.pth")
    train.save_checkpoint = save_and_keep


@slow
def test_kill_at_any_moment_loses_nothing(faulty, straight, tmp_path):
    """Killed at 20 random moments, half of them in the midst of writing, a run always finds a whole checkpoint of
    what an undisturbed run had there, and ends with its very weights, optimizer, losses and scores."""
    rng = random.Random(0)
    succeed(tmp_path, f"{faulty} --workers 0", before=partial(keep_digests, tmp_path))
    undisturbed = {n: read_checkpoint(tmp_path / f"{n}.pth") for n in (2, 4, 6, 8)}
    check_same_run(tmp_path / "run", straight(1))
    in_a_write, found = 0, set()
    for chain in range(4):                                    # five kills on the way of each of four runs
        shutil.rmtree(tmp_path / "run")
        for kill in range(5):
            in_write, out = kill % 2 == chain % 2 or kill == 4, tmp_path / "run"
            process = begin(tmp_path, f"{faulty} --workers {rng.choice([0, 1])}", [write_slowly] if in_write else [])
            if in_write:
                for _ in range(rng.randint(1, 2)):            # last.pth is written, and model.pth
                    wait_for(lambda out=out: any(out.glob("*.tmp")), process)
                    time.sleep(rng.uniform(0, 0.9))
            else:
                time.sleep(rng.uniform(0.5, 3))
            process.kill()
            process.join()
            in_a_write += any(out.glob("*.tmp"))
            args = type("Args", (), {"resume": "auto", "out": out})
            if checkpoint := train.find_checkpoint(args):
                expected = undisturbed[checkpoint["iteration"]]
                found.add(checkpoint["iteration"])
                assert all(same(checkpoint[part], expected[part]) for part in ("model", "optimizer", "window"))
            else:
                assert not any(out.glob("last*.pth"))
        succeed(tmp_path, f"{faulty} --workers 0")
        check_same_run(out, straight(1))
        assert sorted(path.name for path in out.iterdir()) == ["last.before.pth", "last.pth", "log.jsonl", "model.pth"]
    assert in_a_write >= 5 and len(found) >= 2, (in_a_write, found)


def test_flips_and_cuts_are_found(tmp_path, capsys):
    """One byte changed at 100 places or a file cut at 50 lengths: it is refused with one line and the one before taken;
    or the byte meant nothing, and every tensor is equal."""
    torch.manual_seed(0)
    rng, refused = random.Random(0), 0
    good = {"model": {f"layer{i}.weight": torch.randn(8, 3 + i) for i in range(10)}, "window": torch.zeros(0), "best": 0.5,
            "config": {"network": {"channels": 16}, "data": {"dataset": "folder"}}, "optimizer": {"lr": 0.1}}
    save_checkpoint(good | {"iteration": 1}, tmp_path / "last.pth", keep=True)
    save_checkpoint(good | {"iteration": 2}, tmp_path / "last.pth", keep=True)
    path, content = tmp_path / "last.pth", (tmp_path / "last.pth").read_bytes()
    args = type("Args", (), {"resume": "auto", "out": tmp_path})
    for trial in range(150):
        broken = bytearray(content)
        if trial < 100:
            broken[rng.randrange(len(content))] ^= rng.randint(1, 255)
        else:
            broken = broken[:rng.randrange(len(content))]
        path.write_bytes(broken)
        checkpoint = train.find_checkpoint(args)
        warning = capsys.readouterr().out
        if checkpoint["iteration"] == 1:
            refused += 1
            assert warning.startswith(f"warning: {path}: ") and warning.count("\n") == 1, warning
        else:
            assert trial < 100 and same(checkpoint, good | {"iteration": 2}) and not warning
    assert refused > 100
    for name in ("last.pth", "last.before.pth"):
        (tmp_path / name).write_bytes(content[:99])
    with pytest.raises(UserError, match="last.pth: damaged"):
        train.find_checkpoint(args)


def test_damaged_checkpoint_costs_no_good_one(faulty, straight, tmp_path):
    """With a damaged last.pth the run goes on from the one before, says so, and keeps that until a new one is whole."""
    shutil.copytree(straight(1), tmp_path / "run")
    out = tmp_path / "run"
    content = bytearray((out / "last.pth").read_bytes())
    content[len(content) // 3] ^= 1
    (out / "last.pth").write_bytes(content)
    before = (out / "last.before.pth").read_bytes()
    status, text, err = python(tmp_path, f"{faulty} --workers 0", before=partial(die_between_renames, 1))
    assert status == -signal.SIGKILL and "warning: run/last.pth: damaged" in text, err
    assert "trying the one before" in text and "going on at iteration 8" in text
    assert before == (out / "last.before.pth").read_bytes() or read_checkpoint(out / "last.pth")
    finish_run(tmp_path, faulty)
    check_same_run(out, straight(1))


def die_between_renames(number):
    """Makes train.py die after last.pth has become last.before.pth, or before a new one takes its place."""
    replace, count = os.replace, iter(range(1, 10**6))

    def replace_and_die(source, target):
        if str(target).endswith("last.pth") and next(count) == number:
            be_killed()
        replace(source, target)
    os.replace = replace_and_die


@pytest.mark.parametrize("flag", ["evaluate.py --ckpt", "visualize.py --ckpt", "--resume", "--init", "--weights"])
def test_code_in_a_file_is_never_run(flag, faulty, tmp_path):
    """A file with a payload is refused by name wherever it is given, and its code does not run; zip or bare pickle."""
    for zipped in (True, False):
        torch.save({"model": {}, "net": {}, "conv1.weight": torch.zeros(1), "config": Payload(tmp_path / "created")},
                   tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
        command = flag if flag.endswith("--ckpt") else f"{faulty} {flag}"
        fail(tmp_path, f"{command} bad.pth", "bad.pth")
        assert not (tmp_path / "created").exists() and not (tmp_path / "run" / "last.pth").exists()


@pytest.mark.parametrize("place", [pytest.param("before", marks=slow), pytest.param("between", marks=slow), "model"])
def test_kill_while_validating(place, faulty, straight, tmp_path):
    """Killed before, while or after it writes the result of a validation, a run validates again; the log has it once."""
    command = f"{faulty} --workers 0"
    killer = {"before": partial(at_iteration, 2, be_killed, "evaluate"),
              "between": partial(at_iteration, 2, be_killed, "look_at_bases"),
              "model": partial(at_iteration, 5, be_killed, "save_checkpoint")}[place]    # last, model, last; last, MODEL
    assert python(tmp_path, command, killer)[0] == -signal.SIGKILL
    checkpoint = read_checkpoint(tmp_path / "run/last.pth")
    assert checkpoint["iteration"] == 4 and not checkpoint["validated"]
    assert "eval folder val" in succeed(tmp_path, command).split("going on at iteration 4")[1].split("iter      5")[0]
    check_same_run(tmp_path / "run", straight(1))


@slow
@pytest.mark.parametrize("torn", [b'{"iteration": 4, "lo', b"\x00" * 300, b"\xff\xfe{", b"7\n"])
def test_any_end_of_the_log_is_mended(torn, faulty, straight, tmp_path):
    """Half a line, zeros or noise at the end of log.jsonl, as power cuts leave them, are dropped when a run goes on."""
    assert python(tmp_path, f"{faulty} --workers 0", partial(die_at, 3))[0] == -signal.SIGKILL
    with open(tmp_path / "run/log.jsonl", "ab") as file:
        file.write(torn)
    finish_run(tmp_path, faulty)
    check_same_run(tmp_path / "run", straight(1))


# Two processes
@slow
@pytest.mark.parametrize("action, place, words", [
    (be_killed, "normalise", "another process of the job died"),
    (be_killed, "everywhere", "another process of the job died"),
    (raise_error, "normalise", "another process of the job died"),
    (hang, "normalise", "another process of the job .*hung for 6 s"),
    (hang, "everywhere", "another process of the job .*hung for 6 s"),
    (hang, "evaluate", "another process of the job .*hung for 6 s")])
def test_lost_process_ends_the_job(action, place, words, faulty, straight, tmp_path):
    """One of two processes is killed, hangs or fails: the other ends in time, with a message; then the run goes on."""
    action = partial(action, tmp_path) if action is hang else action
    number, rank = (2 if place == "evaluate" else 4), 1
    began = time.monotonic()
    (status, _, err), (other, _, other_err) = python(tmp_path, f"{faulty} --workers 1", partial(
        both, partial(be_patient, 6), partial(at_iteration, number, action, place, rank)), world=2)
    assert time.monotonic() - began < 6 + 10 + 10, "the job did not end in time"        # 10 more for its start
    check_message(status, err, words, "--resume auto")
    assert other == (1 if action is raise_error else -signal.SIGKILL)
    assert ("a bug" in other_err) == (action is raise_error)
    finish_run(tmp_path, faulty, world=2)
    check_same_run(tmp_path / "run", straight(2))


@slow
def test_error_of_one_process_is_said_by_it(own_folder, tmp_path):
    """A broken image that one of two processes meets: that one names it, the other says that another one failed."""
    for path in (own_folder / "JPEGImages").glob("val*"):
        path.write_bytes(path.read_bytes()[:-60])
    results = python(tmp_path, f"{FAULTY} --data-root {own_folder} --workers 1", partial(be_patient, 6), world=2)
    errors = "".join(err for _, _, err in results)
    assert [status for status, _, _ in results] == [1, 1] and "Traceback" not in errors, errors
    assert re.search(r"JPEGImages/val_00000\d.*cannot be read", errors), errors


def test_scoring_ends_with_a_lost_process(straight, folder_root, tmp_path):
    """evaluate.py by two processes of which one is killed: the other ends in time, with a message."""
    killer = partial(at_rank, 1, be_killed)
    (status, _, err), (other, _, _) = python(tmp_path, f"evaluate.py --ckpt {straight(1)}/model.pth --workers 0 "
                                             f"--data-root {folder_root}", killer, world=2)
    assert other == -signal.SIGKILL
    check_message(status, err, "another process")


def at_rank(rank, action):
    be_patient(6)
    if int(os.environ["RANK"]) == rank:
        evaluate.predict_batch = lambda *args: action()


def torchrun(cwd, command, *flags):
    """A real torchrun of two processes, in a session of its own, as it runs: (process, stdout's path)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    name, *rest = shlex.split(command)
    output = cwd / "stdout"
    with output.open("w") as file:
        return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                                 f"--master_port={port}", *flags, HERE / name, *rest], cwd=cwd, stdout=file,
                                stderr=subprocess.STDOUT, start_new_session=True), output


def finish(process, seconds=90):
    try:
        return process.wait(seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@slow
def test_torchrun_stops_with_all_saved(faulty, tmp_path):
    """SIGTERM to torchrun: both processes leave after the same step with all saved, and the run goes on."""
    command = f"{faulty} --iters 24 --eval-every 10 --workers 1"
    process, output = torchrun(tmp_path, command)
    lines = re.compile(r"iter +\d+/24")
    while len(lines.findall(output.read_text())) < 3 and process.poll() is None:
        time.sleep(0.02)
    process.terminate()                                       # its ranks have sessions of their own: it hands it on
    status, text = finish(process), output.read_text()
    stopped = re.findall(r"stopped after iteration (\d+), all saved: .*--resume auto", text)
    assert status != 0 and len(stopped) == 1, text
    assert "Traceback" not in re.sub(r"Traceback(.|\n)*SignalException.*", "", text), text        # torchrun's own
    last = read_checkpoint(tmp_path / "run/last.pth")
    assert last["iteration"] == int(stopped[0]) and 3 <= last["iteration"] < 24 and last["world"] == 2
    assert f"going on at iteration {stopped[0]}" in finish_run(tmp_path, command, world=2)
    finish_run(tmp_path, command.replace("--out run", "--out straight"), world=2)
    ends = [read_checkpoint(tmp_path / name / "last.pth") for name in ("run", "straight")]
    assert all(same(ends[0][part], ends[1][part]) for part in ("model", "optimizer"))
    assert log_of(tmp_path / "run", "loss") == log_of(tmp_path / "straight", "loss")


@slow
def test_torchrun_brings_a_killed_run_back(faulty, straight, tmp_path):
    """torchrun --max-restarts 3: one process is killed, and without anybody's help the run goes on and ends as it would
    have; without --resume in the command."""
    process, output = torchrun(tmp_path, f"{faulty} --workers 1".replace("--resume auto", ""), "--max-restarts=3")
    while not (tmp_path / "run/last.pth").exists() and process.poll() is None:
        time.sleep(0.01)
    for pid in [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if ppid(path) == process.pid]:
        if b"LOCAL_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes():
            os.kill(pid, signal.SIGKILL)
    status, text = finish(process, 180), output.read_text()
    assert status == 0 and "going on at iteration" in text, text
    check_same_run(tmp_path / "run", straight(2))


def ppid(stat):
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


# Signals
def log_lines(cwd):
    return (cwd / "stdout").read_text().count("\niter ")


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_step_and_saves(number, faulty, straight, tmp_path):
    """SIGTERM, or a terminal's Ctrl-C that reaches workers too: the step is finished, all is saved, and a line says how
    to go on; which then gives what an undisturbed run gives."""
    process = begin(tmp_path, f"{faulty} --workers 1", [partial(at_iteration, 5, partial(time.sleep, 0.6))])
    wait_for(lambda: log_lines(tmp_path) >= 4, process)
    time.sleep(0.2)
    os.killpg(process.pid, number)
    process.join(20)
    text, err = (tmp_path / "stdout").read_text(), (tmp_path / "stderr").read_text()
    stopped = re.findall(r"stopped after iteration (\d+), all saved: .*--resume auto", text)
    assert process.exitcode == 128 + number and len(stopped) == 1 and not err, (process.exitcode, text, err)
    assert read_checkpoint(tmp_path / "run/last.pth")["iteration"] == int(stopped[0]) < 8
    finish_run(tmp_path, faulty)
    check_same_run(tmp_path / "run", straight(1))


@slow
def test_second_ctrl_c_leaves_at_once(faulty, tmp_path):
    """A second Ctrl-C, more than a moment after the first, does not wait for the step; one that comes with the first,
    as under torchrun, is no second one."""
    process = begin(tmp_path, f"{faulty} --workers 1", [partial(at_iteration, 3, partial(time.sleep, 100))])
    wait_for(lambda: log_lines(tmp_path) >= 2, process)
    time.sleep(0.5)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.1)
    process.join(1.2)
    assert process.is_alive()
    os.killpg(process.pid, signal.SIGINT)
    process.join(3)
    status = process.exitcode
    process.kill()
    assert status == 130
    assert read_checkpoint(tmp_path / "run/last.pth")["iteration"] == 2


# Disks
@pytest.mark.parametrize("action, words", [
    (partial(break_off, 7, OSError(28, "No space left on device")), "No space left"),
    pytest.param(partial(break_off, 7, RuntimeError("PytorchStreamWriter failed writing file")), "failed", marks=slow),
    pytest.param(partial(at_iteration, 6, partial(fill_the_disk, 3 << 20)), "File too large", marks=slow),
    pytest.param(partial(at_iteration, 5, partial(fill_the_disk, 60 << 20)), "File too large", marks=slow)],
    ids=["error", "torch's error", "no room", "little room"])
def test_write_that_fails_costs_nothing(action, words, faulty, straight, tmp_path):
    """A checkpoint that cannot be written, wherever it breaks off, ends the run with one line that says so. The one
    before it is whole and the run goes on from it."""
    status, _, err = python(tmp_path, f"{faulty} --workers 0", action)
    check_message(status, err, r"cannot write run/(last|model)\.pth", words, "--resume auto")
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert read_checkpoint(tmp_path / "run/last.pth")["iteration"] == 4
    read_checkpoint(tmp_path / "run/last.before.pth"), load_checkpoint(tmp_path / "run/model.pth")
    finish_run(tmp_path, faulty)
    check_same_run(tmp_path / "run", straight(1))


def test_full_disk_costs_nothing(tmp_path):
    """On a real file system of 1 MB: the second checkpoint does not fit, the first one stays whole, nothing else does."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", mount], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        small, large = ({"net": {"w": torch.arange(n)}} for n in (50_000, 90_000))             # 0.4 and 0.7 MB
        save_checkpoint(small, mount / "last.pth", keep=True)
        for checkpoint in (large, large):
            with pytest.raises(UserError, match=r"cannot write .*last.pth .*No space left"):
                save_checkpoint(checkpoint, mount / "last.pth", keep=True)
            assert same(read_checkpoint(mount / "last.pth"), small)
            assert [path.name for path in mount.iterdir()] == ["last.pth"]
        (mount / "log.jsonl").touch()
        with pytest.raises(OSError, match="No space"):
            (mount / "more").write_bytes(bytes(1 << 20))
        with pytest.raises(UserError, match="log.jsonl"):
            train.Log(mount / "log.jsonl", {"args": "x" * 5000}, 0)
    finally:
        subprocess.run(["umount", mount], check=True)


@slow
def test_full_disk_under_the_log(faulty, straight, tmp_path):
    """A log line that cannot be written ends the run with one line; the run goes on when there is room again."""
    status, _, err = python(tmp_path, f"{faulty} --workers 0", log_to_full_disk)
    check_message(status, err, "cannot write /dev/full", "No space left", "--resume auto")
    finish_run(tmp_path, faulty)
    check_same_run(tmp_path / "run", straight(1))


def test_unwritable_out_is_found_at_start(faulty, tmp_path):
    """--out below a file, or where nothing can be created, is named before the first iteration; by all processes."""
    (tmp_path / "file").write_text("")
    fail(tmp_path, faulty.replace("--out run", "--out file/run"), "file/run", "--out")
    fail(tmp_path, faulty.replace("--out run", "--out file"), "file", "--out")
    fail(tmp_path, faulty.replace("--out run", "--out /proc/run"), "/proc/run", "--out")
    (tmp_path / "run/log.jsonl").mkdir(parents=True)
    fail(tmp_path, faulty, "run", "--out")
    results = python(tmp_path, faulty.replace("--out run", "--out file/run"), partial(be_patient, 6), world=2)
    assert [status for status, _, _ in results] == [1, 1] and "file/run" in results[0][2]
    assert not any("Traceback" in err for _, _, err in results), results


def test_two_runs_never_share_a_folder(faulty, tmp_path):
    """A second run into the folder of one that is not over is refused, with --resume auto as well, and touches nothing;
    a run that was killed leaves the folder at once, though its workers live on for a while."""
    process = begin(tmp_path, f"{faulty} --workers 1", [write_slowly])
    wait_for(lambda: any((tmp_path / "run").glob("*.tmp")), process)
    try:
        second = faulty.replace("--out run", f"--out {tmp_path / 'run'}")
        (tmp_path / "second").mkdir()                         # where its outputs go
        fail(tmp_path / "second", second, "run: let it end")
        fail(tmp_path / "second", second.replace("--resume auto", ""), "run: let it end")
    finally:
        process.kill()
        process.join()
    handle = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)
    succeed(tmp_path, f"{faulty} --workers 0")


# Numbers and workers
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=slow)])
def test_loss_that_is_not_finite_stops_all(world, faulty, straight, tmp_path):
    """An image that makes the loss nan, on whichever process: all stop, with iteration and images; last.pth is from
    before, and goes on."""
    results = python(tmp_path, f"{faulty} --workers 1", partial(at_iteration, 4, poison, rank=world - 1), world=world)
    ids = r"train_00000\d, train_00000\d"
    for status, out, err in [results] if world == 1 else results:
        check_message(status, err, rf"the loss of iteration 4 is not finite \(images {ids}\)", "--resume auto")
        assert "iter      4" not in out
    assert read_checkpoint(tmp_path / "run/last.pth")["iteration"] == 2 and 4 not in log_of(tmp_path / "run", "loss")
    finish_run(tmp_path, faulty, world)
    check_same_run(tmp_path / "run", straight(world))


@slow
def test_weights_that_are_not_finite_are_never_saved(faulty, straight, tmp_path):
    """An update that destroys the weights right before a checkpoint is due: the run stops, the good one stays."""
    check_message(*python(tmp_path, f"{faulty} --workers 1", partial(poison_update, 4))[::2], "iteration 4 ", "train_0000")
    assert read_checkpoint(tmp_path / "run/last.pth")["iteration"] == 2
    finish_run(tmp_path, faulty)
    check_same_run(tmp_path / "run", straight(1))


@pytest.mark.parametrize("every", [1, 8])
def test_divergence_is_said(every, faulty, tmp_path):
    """A learning rate far too high ends with one line that names the iteration and --lr, even where weights that are
    not finite get validated before the next loss shows it."""
    status, _, err = python(tmp_path, faulty.replace("--lr 0.05 ", "--lr 1e30 ").replace(
        "--eval-every 2", f"--eval-every {every}"))
    check_message(status, err, r"iteration \d", "--lr")


@slow
@pytest.mark.parametrize("place", ["normalise", "save_checkpoint", "everywhere", "evaluate"])
def test_dead_worker_is_named(place, faulty, straight, tmp_path):
    """A data-loader worker that is killed, wherever the run is just then: one line with the iteration and its images,
    at once; the checkpoint is whole and goes on."""
    began = time.monotonic()
    status, _, err = python(tmp_path, f"{faulty} --workers 1", partial(
        at_iteration, {"save_checkpoint": 4, "evaluate": 2}.get(place, 4), kill_a_worker, place))
    assert time.monotonic() - began < 25
    check_message(status, err, r"data-loader worker", r"iteration [45] ", r"train_00000\d, train_00000\d")
    finish_run(tmp_path, faulty)
    check_same_run(tmp_path / "run", straight(1))


def test_dead_worker_of_a_validation_is_named(straight, folder_root, faulty, tmp_path):
    """A worker that is killed while it reads images to validate: one line, by train.py and by evaluate.py."""
    for command in (f"{faulty} --workers 1",
                    f"evaluate.py --ckpt {straight(1)}/model.pth --data-root {folder_root} --workers 1"):
        status, _, err = python(tmp_path, command, kill_in_prediction)
        check_message(status, err, "data-loader worker")


def kill_in_prediction():
    sizes = evaluate.padded_sizes

    def kill_and_tell(*args):                                 # called for each image as it comes from the loader
        kill_a_worker()
        return sizes(*args)
    evaluate.padded_sizes = kill_and_tell


def test_changes_of_a_run_are_told(faulty, straight, own_folder, tmp_path):
    """Going on with other --workers is told, another --seed, batch or data set is refused, and nothing is touched."""
    shutil.copytree(straight(1), tmp_path / "run")
    assert "changed  --workers from 0 to 1" in succeed(tmp_path, f"{faulty} --workers 1")
    last = (tmp_path / "run/last.pth").read_bytes()
    fail(tmp_path, f"{faulty} --seed 1", "--seed 0", "1")
    fail(tmp_path, f"{faulty} --batch-size 4", "--batch-size 2", "4")
    fail(tmp_path, faulty.replace("--dataset folder", "--dataset scenes"), "--dataset folder", "scenes")
    with open(own_folder / "classes.txt", "a") as file:
        file.write("another class\n")
    fail(tmp_path, f"{FAULTY} --data-root {own_folder} --workers 1", "class")
    assert (tmp_path / "run/last.pth").read_bytes() == last


# Evaluation
def matrices(root, split):
    """The confusion matrix and scores of an untrained network, by as many processes as there are."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    found, scores = [], evaluate.scores
    evaluate.scores = lambda confusion: found.append(confusion.clone()) or scores(confusion)
    try:
        result, = evaluate.evaluate(small_net(), build_dataset("folder", root, split), torch.device("cpu"), rank=rank,
                                    world=world, workers=rank)
    finally:
        evaluate.scores = scores
    return found[0], result["images"]


def matrices_with_others(root, folder):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.save([matrices(root, split) for split in ("train", "val", "one")], folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_matrix_is_the_same_for_any_number_of_processes(world, own_folder, tmp_path):
    """7, 5 and 1 images by two and three processes: the confusion matrix of one process, entry by entry."""
    lists = own_folder / "ImageSets/Segmentation"
    (lists / "one.txt").write_text((lists / "val.txt").read_text().split()[0])
    for status, _, err in launch(tmp_path, matrices_with_others, own_folder, tmp_path, world=world):
        assert status == 0, err
    alone = [matrices(own_folder, split) for split in ("train", "val", "one")]
    assert [images for _, images in alone] == [7, 5, 1] and all(matrix.sum() > 100 for matrix, _ in alone)
    for rank in range(world):
        assert same(torch.load(tmp_path / f"{rank}.pt"), alone)


# Broken and hostile files
FUZZED = (23, 31)                                               # height and width of the fuzzed images


def fuzz_images():
    """Whole image files of many kinds: [(name, bytes)]."""
    rgb = Image.fromarray(picture(FUZZED, 3))
    found = []
    for name, image, format_, options in [
            ("rgb.jpg", rgb, "JPEG", {}), ("progressive.jpg", rgb, "JPEG", {"progressive": True}),
            ("gray.jpeg", rgb.convert("L"), "JPEG", {}), ("cmyk.jpg", rgb.convert("CMYK"), "JPEG", {}),
            ("rgb.png", rgb, "PNG", {}), ("gray.png", rgb.convert("L"), "PNG", {}), ("1.png", rgb.convert("1"), "PNG", {}),
            ("palette.png", rgb.quantize(20), "PNG", {"transparency": 3}), ("alpha.png", rgb.convert("RGBA"), "PNG", {}),
            ("16.png", Image.fromarray(np.arange(23 * 31).reshape(FUZZED).astype(np.uint16) * 90), "PNG", {}),
            ("gif.jpg", rgb, "GIF", {}), ("bmp.png", rgb, "BMP", {}), ("tiff.jpg", rgb, "TIFF", {}),
            ("webp.png", rgb, "WEBP", {}), ("jpeg.png", rgb, "JPEG", {}), ("png.jpg", rgb, "PNG", {})]:
        buffer = io.BytesIO()
        image.save(buffer, format_, **options)
        found.append((name, buffer.getvalue()))
    return found


def fuzz_labels(folder):
    """Whole label files of the four kinds: [(name, bytes, table, number of classes)]."""
    label = np.random.default_rng(0).integers(1, 20, FUZZED).astype(np.uint8)
    names = np.array([f"class {i}" for i in range(182)], dtype=object).reshape(182, 1)
    voc = data.label_table({c: c for c in (*range(21), 255)})
    found = []
    for compressed in (False, True):
        for name, content, table in [
                ("sbd", {"GTcls": {"Segmentation": label, "Boundaries": np.zeros(3), "CategoriesPresent": [1, 2]}}, voc),
                ("context", {"LabelMap": label.astype(np.uint16) + 400}, data.label_table({c: c % 59 for c in range(460)})),
                ("cocostuff", {"S": label, "names": names, "captions": names[:3], "regionMapStuff": label.astype(float)},
                 data.label_table(data.coco_table(0)))]:
            path = folder / f"{name}{compressed}.mat"
            savemat(path, content, do_compression=compressed)
            found.append((path.name, path.read_bytes(), table, {"sbd": 21, "context": 59, "cocostuff": 171}[name]))
    for mode in ("P", "L"):
        path = folder / f"{mode}.png"
        write_label(label, path, mode)
        found.append((path.name, path.read_bytes(), voc, 21))
    return found


def mutate(content, others, rng):
    """The bytes of a file after one of the accidents that happen to files."""
    broken, n = bytearray(content), len(content)
    kind, at = rng.randrange(8), rng.randrange(n)
    if kind == 0:
        return content[:at]                                   # cut
    if kind == 1:
        return rng.choice(others)[:rng.randrange(1, 64)] + content[rng.randrange(1, 64):]    # another one's header
    if kind == 2:
        return content[:at] + rng.randbytes(rng.randrange(1, 40)) + content[at:]             # insertion
    if kind == 3:
        broken[at:at + rng.randrange(1, 64)] = bytes(len(broken[at:at + rng.randrange(1, 64)]))       # a zeroed block
    elif kind == 4:
        del broken[at:at + rng.randrange(1, 40)]
    elif kind == 5:
        return rng.choice(others)                             # another file under this name
    else:
        for _ in range(rng.choice([1, 1, 3])):                # flips, many of them in the header
            broken[rng.randrange(n if kind == 6 else min(n, 200))] ^= 1 << rng.randrange(8)
    return bytes(broken)


def expect_read(path, read, faults):
    """read() gives True, or raises a UserError of one line that names the file; all else is a fault."""
    try:
        if not read():
            faults.append(f"{path.name}: wrong size, type or label")
    except UserError as error:
        if path.name not in str(error) or "\n" in str(error) or len(str(error)) > 1000:
            faults.append(f"{path.name}: unclear: {error}")
        return 0
    except BaseException as error:  # noqa: BLE001 - any other exception is what is looked for
        faults.append(f"{path.name}: {type(error).__name__}: {error}")
    return 1


def fuzz(folder, seed, per_file):
    """Mutates images, labels and lists, reads them as training and evaluation do; prints a line for every fault."""
    rng, faults, counts, read = random.Random(seed), [], [0, 0], 0
    data.MAX_PIXELS = 10**6
    images, labels = fuzz_images(), fuzz_labels(folder)
    Image.fromarray(picture(FUZZED, 3)).save(folder / "whole.png")
    write_label(np.ones(FUZZED, np.uint8), folder / "whole_label.png")
    voc = data.label_table({c: c for c in (*range(21), 255)})

    def fits(image, label, table, classes, path):
        pair = data.Pairs("voc", "val", ["c"] * classes, ["x"], [str(image)], [str(label)], table)
        x, y = pair[0]
        crop, target, _ = TrainView(pair, 33, seed)[rng.randrange(9), 0]
        return all(i.dtype == torch.uint8 and i.shape == (3, *size) and t.dtype == torch.uint8 and t.shape == size
                   and ((t < classes) | (t == 255)).all()
                   for i, t, size in [(x, y, tuple(x.shape[1:])), (crop, target, (33, 33))])

    def readable(path):
        image = data.read_image(path, turn=rng.random() < 0.5)
        return image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3 and image[0].numel() <= 10**6

    for name, content in images:
        for i in range(per_file):
            path = folder / f"{seed}_{i}_{name}"
            path.write_bytes(mutate(content, [c for _, c in images], rng))
            (folder / "now").write_text(path.name)            # for the case that it hangs or crashes
            read += expect_read(path, lambda path=path: readable(path), faults)
            counts[0] += 1
    for name, content, table, classes in labels:
        for i in range(per_file):
            path = folder / f"{seed}_{i}_{name}"
            path.write_bytes(mutate(content, [c for _, c, *_ in labels], rng))
            (folder / "now").write_text(path.name)
            read += expect_read(path, lambda path=path, table=table, classes=classes: fits(
                folder / "whole.png", path, table, classes, path), faults)
            counts[0] += 1
    listed = "".join(f"2007_{i:06d}\n" for i in range(40)).encode()
    for i in range(5 * per_file):
        path = folder / f"{seed}_{i}_list.txt"
        path.write_bytes(mutate(listed, [images[0][1], b"\xef\xbb\xbf" + listed, listed.replace(b"\n", b"\r\n")], rng))
        (folder / "now").write_text(path.name)
        read += expect_read(path, lambda path=path, i=i: all(
            entry.strip() and "\n" not in entry for entry in data.read_list(path, whole_line=i % 2 == 0)), faults)
        counts[0] += 1
    assert fits(folder / "whole.png", folder / "whole_label.png", voc, 21, None)
    print("\n".join(faults))
    print(f"{counts[0]} files, {read} read, {len(faults)} faults")


def fuzz_result(folder, seed, per_file, timeout):
    (status, out, err), = launch(folder, fuzz, folder, seed, per_file, timeout=timeout)
    assert status == 0, (status, (folder / "now").read_text(), err[-2000:])
    files, read, faults = map(int, re.search(r"(\d+) files, (\d+) read, (\d+) faults", out).groups())
    assert faults == 0, out[:5000]
    return files, read


def test_mutated_files_are_read_or_named(tmp_path):
    """Over 500 images, masks, .mat files and lists, cut, flipped, mixed up: each is read with the right size and legal
    labels, or named in one line. Nothing else is raised, nothing hangs."""
    files, read = fuzz_result(tmp_path, seed=0, per_file=19, timeout=60)
    assert files >= 500 and files / 20 < read < files * 3 / 4, (files, read)


@slow
def test_many_more_mutated_files_are_read_or_named(tmp_path):
    """As above, for thousands of files."""
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        fuzz_result(tmp_path / str(seed), seed, per_file=100, timeout=120)


MATS = {
    "text": {"S": "a label"}, "cell": {"S": np.array([["a", "b"]], dtype=object)},
    "numbers": {"LabelMap": np.array([[1, 2], [3, 4]], dtype=object)}, "logical": {"S": np.ones((23, 31), bool)},
    "three": {"S": np.ones((23, 31, 3), np.uint8)}, "nan": {"LabelMap": np.full((23, 31), np.nan)},
    "negative": {"S": np.full((23, 31), -1, np.int16)}, "half": {"LabelMap": np.full((23, 31), 2.5)},
    "complex": {"S": np.full((23, 31), 1 + 1j)}, "infinite": {"S": np.full((23, 31), np.inf)},
    "large": {"LabelMap": np.full((23, 31), 65536 + 3, np.uint32)}, "struct": {"S": {"Segmentation": np.ones(3)}},
    "no field": {"GTcls": {"Boundaries": np.ones((23, 31))}}, "no struct": {"GTcls": np.ones((23, 31), np.uint8)},
    "empty": {"S": np.zeros((0, 0))}, "sbd empty": {"GTcls": {"Segmentation": np.zeros((0, 0))}}, "other": {"x": 1},
    "sbd text": {"GTcls": {"Segmentation": "abc"}}, "sbd cell": {"GTcls": {"Segmentation": np.array([["a", "b"]], object)}},
    "version 1.0": {"S": np.ones((23, 31)), "names": np.array([["a"]] * 92, object)}}


@pytest.mark.filterwarnings("ignore:.*discard|invalid value")
@pytest.mark.parametrize("kind", MATS)
def test_strange_mat_files_are_named(kind, tmp_path):
    """A .mat file that holds no label, or no whole numbers, is named in one line."""
    Image.fromarray(picture(FUZZED, 3)).save(tmp_path / "image.png")
    savemat(tmp_path / "label.mat", MATS[kind])
    table = data.label_table({c: c for c in range(21)})
    pair = data.Pairs("voc", "val", ["c"] * 21, ["x"], [str(tmp_path / "image.png")], [str(tmp_path / "label.mat")], table)
    if kind == "logical":
        assert (pair[0][1] == 1).all()
    else:
        with pytest.raises(UserError, match=r"label\.mat: [^\n]*$"):
            pair[0]


def test_every_kind_of_image_is_read(tmp_path):
    """CMYK, gray, one bit, 16 bits, palettes with transparency, alpha: all become RGB, with the grays they show."""
    gray = np.arange(FUZZED[0] * FUZZED[1]).reshape(FUZZED) * 90
    Image.fromarray(gray.astype(np.uint16)).save(tmp_path / "16.png")
    assert np.array_equal(data.read_image(tmp_path / "16.png")[1], gray >> 8)
    for name, content in fuzz_images():
        path = tmp_path / name
        path.write_bytes(content)
        image = data.read_image(path)
        assert image.shape == (3, *FUZZED) and image.dtype == torch.uint8 and image.float().std() > 5, name
        if name in ("rgb.png", "alpha.png", "bmp.png", "png.jpg"):
            assert np.array_equal(image.permute(1, 2, 0), picture(FUZZED, 3)), name
        elif name != "16.png":
            assert np.array_equal(image.permute(1, 2, 0), Image.open(path).convert("RGB")), name


def test_image_cut_anywhere_is_named(tmp_path):
    """A JPEG or PNG cut at any point is named; never read as half an image."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    for name, content in fuzz_images():
        if name in ("rgb.jpg", "progressive.jpg", "cmyk.jpg", "gray.jpeg", "rgb.png", "palette.png"):
            for length in [*range(0, len(content) - 22, 9), len(content) - 22]:     # a PNG's last 21 bytes are check sums and its end mark
                path = tmp_path / f"cut{length}{name}"
                path.write_bytes(content[:length])
                for turn in (False, True):
                    with pytest.raises(UserError, match=rf"{path.name}: [^\n]*$"):
                        data.read_image(path, turn)


def test_huge_files_are_refused_by_their_header(tmp_path, monkeypatch):
    """Images and labels of too many pixels are refused with one line before they are unpacked."""
    began = time.monotonic()
    for size in [(20_000, 20_000), (2**31 - 1, 2**31 - 1)]:
        header = b"IHDR" + size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
        path = tmp_path / "huge.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big") + b"\0\0\0\0IDAT")
        for read in (data.read_image, partial(data.read_image, turn=True), data.read_label):
            with pytest.raises(UserError, match=rf"huge.png: {size[0]}x{size[1]} pixels, more than the limit"):
                read(path)
    assert time.monotonic() - began < 1
    monkeypatch.setattr(data, "MAX_PIXELS", 700)
    for name, content in fuzz_images():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: 31x23 pixels, more than the limit of 700 \(data.MAX_PIXELS\)"):
            data.read_image(tmp_path / name)
    for name, content, *_ in fuzz_labels(tmp_path):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: 31x23 pixels, more than the limit"):
            data.read_label(tmp_path / name)


@slow
def test_smallest_images_and_odd_names(own_folder, straight, tmp_path):
    """Images of 1x1, 1x9 and 5x1 pixels, and names with spaces and letters of any script, are trained on, evaluated at
    one and at six scales, and drawn."""
    names = ["one pixel", "grün und weiß", "写真 1", "Ёлка.v2"]
    for n, (name, size) in enumerate(zip(names, [(1, 1), (1, 9), (5, 1), (40, 30)], strict=True)):
        Image.fromarray(picture(size, n)).save(own_folder / "JPEGImages" / f"{name}{['.png', '.jpg'][n % 2]}")
        write_label(np.full(size, n, np.uint8), own_folder / "SegmentationClass" / f"{name}.png")
    for split in ("train", "val"):
        (own_folder / "ImageSets/Segmentation" / f"{split}.txt").write_text("\r\n".join(names), encoding="utf-8-sig")
    dataset = build_dataset("folder", own_folder, "train")
    for i in range(4):
        seen = [TrainView(dataset, 9, 0)[iteration, i] for iteration in range(40)]
        assert all(x.shape == (3, 9, 9) and ((y == i) | (y == 255)).all() and (y == i).any() for x, y, _ in seen)
    succeed(tmp_path, f"{FAULTY} --data-root {own_folder} --workers 1 --iters 2")
    out = succeed(tmp_path, f"evaluate.py --ckpt run/model.pth --data-root {own_folder} --ms-flip --save-png png")
    assert "| 4 images |" in out
    assert {path.stem: Image.open(path).size for path in (tmp_path / "png").iterdir()} == dict(
        zip(names, [(1, 1), (9, 1), (1, 5), (30, 40)], strict=True))
    succeed(tmp_path, f"visualize.py --ckpt run/model.pth --data-root {own_folder} --out pictures")
    succeed(tmp_path, f"visualize.py --ckpt run/model.pth --image '{own_folder}/JPEGImages/one pixel.png' --out pictures")


def test_own_images_are_turned(straight, tmp_path):
    """--image: a photograph is shown as its camera says it stands; a data set's images never are turned."""
    exif = Image.Exif()
    exif[0x0112] = 6                                          # "turn by 90 degrees"
    Image.fromarray(picture((11, 17), 0)).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    Image.fromarray(picture((11, 17), 0)).save(tmp_path / "photo.png", exif=exif)
    for name in ("photo.jpg", "photo.png"):
        upright = np.rot90(np.asarray(data.read_image(tmp_path / name).permute(1, 2, 0)), -1)
        assert np.abs(data.read_image(tmp_path / name, turn=True).permute(1, 2, 0).numpy().astype(int) - upright).max() < 9
    succeed(tmp_path, f"visualize.py --ckpt {straight(1)}/model.pth --image photo.jpg --out pictures")
    assert Image.open(tmp_path / "pictures/photo_prediction.png").size == (11, 17)


CONFIGS = [("network", "attention", "other"), ("network", "num_classes", -1), ("network", "num_classes", "4"),
           ("network", "backbone", ["resnet18"]), ("network", "output_stride", 7), ("network", "channels", 2.5),
           ("network", "unknown", 1),
           ("data", "dataset", "other"), ("data", "dataset", 3)]


@pytest.mark.parametrize("part, key, value", CONFIGS)
def test_strange_settings_in_a_checkpoint_are_refused(part, key, value, straight, folder_root, tmp_path):
    """A checkpoint whose settings no train.py has written, if made in bad faith, is refused with one line."""
    checkpoint = read_checkpoint(straight(1) / "model.pth")
    checkpoint["config"][part][key] = value
    torch.save(checkpoint, tmp_path / "strange.pth")
    args = type("Args", (), {"dataset": None, "data_root": folder_root, "split": None, "output_stride": None,
                             "em_iterations": None, "workers": 0})
    with pytest.raises(UserError, match=r"^[^\n]*$"):
        evaluate.open_dataset(args, evaluate.open_network(tmp_path / "strange.pth", args))
