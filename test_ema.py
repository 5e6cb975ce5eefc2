"""What a user may rely on, in the order of the paper; then command lines and bad input. No data, network or GPU needed.

    python -m pytest                                   # the ordinary tests
    SLOW=1 python -m pytest                            # the long ones as well
"""
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}    # for children too
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import data
import evaluate
import train
import visualize
from backbone import DilatedResNet, UserError
from data import Scenes, Schedule, TrainView, build_dataset, normalise
from ema import EMAU, EMANet, from_released, load_checkpoint, save_checkpoint

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
    data.run({"train.py": train, "evaluate.py": evaluate, "visualize.py": visualize}[argv[0]].main)


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


# ---------------------------------------------------------------------------------------------------------------------
# Secs. 4.2, 5.1 and 5.3: the M-step and its norm, the convolutions
def test_bases_have_length_one():
    """Sec. 5.3: every basis that holds pixels has length one after every round."""
    for _, mu in make_unit().em(torch.randn(2, 30, 6).double() * 3):
        assert mu.shape == (2, 6, 5) and torch.allclose(mu.norm(dim=1), torch.ones(2, 5).double())


def test_iterations_do_not_lower_the_likelihood():
    """Sec. 4.2: with L2Norm the rounds are EM of a mixture, so that its likelihood never falls."""
    for seed in range(5):
        unit = make_unit(iterations=6, lam=2.0, seed=seed)
        x = torch.randn(1, 50, 6).double() * 2
        likelihoods = [torch.logsumexp(2.0 * x @ mu, 2).sum() for _, mu in unit.em(x)]
        assert all(later >= earlier - 1e-9 for earlier, later in pairwise(likelihoods))
        assert likelihoods[-1] > likelihoods[0]


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


def test_schedule_shows_every_image_once_per_epoch():
    """Sec. 6.1: an epoch holds no image twice and leaves out less than a batch, in a new order every time."""
    batches = list(Schedule(range_like(11), 3, 0, 0, 9))
    epochs = [[index for batch in batches[e:e + 3] for _, index in batch] for e in (0, 3, 6)]
    assert all(len(set(epoch)) == 9 and set(epoch) <= set(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2]
    assert [batch[0][0] for batch in batches] == list(range(9))


@pytest.mark.parametrize("dataset", [range_like(17), Scenes("train")], ids=["finite", "endless"])
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
    training, validation = Scenes("train"), Scenes("val")
    assert len(validation) == len(validation.ids) == 64 and training.endless and not validation.endless
    counts = torch.zeros(9)
    for i in range(64):
        image, label = validation[i]
        assert image.dtype == label.dtype == torch.uint8 and image.shape == (3, *label.shape)
        counts += torch.bincount(label.flatten(), minlength=9)
    assert len(validation.classes) == 9 and (counts > 0.002 * counts.sum()).all()
    assert all(torch.equal(a, b) for a, b in zip(validation[7], Scenes("val")[7]))
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

    x, y = pixels(Scenes("train"), range(96))
    classifier = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 9))
    optimizer = torch.optim.Adam(classifier.parameters(), lr=0.01)
    for _ in range(500):
        batch = torch.randint(len(y), (2048,))
        optimizer.zero_grad()
        F.cross_entropy(classifier((x[batch] - x.mean(0)) / x.std(0)), y[batch]).backward()
        optimizer.step()
    test_x, test_y = pixels(Scenes("val"), range(64))
    prediction = classifier((test_x - x.mean(0)) / x.std(0)).argmax(1)
    miou = evaluate.scores(evaluate.confusion_matrix(prediction, test_y, 9))["miou"]
    assert 0.2 < miou < 0.6                                   # it has learned something, but not the scene


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
    """PAPER.md, Evaluation, one view at a time."""
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
    assert checkpoint["config"]["data"] == {"dataset": "folder", "classes": CLASSES}
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


def test_scenes_move_the_earlier_run_aside(tmp_path, capsys):
    """Scenes alone, so that the first command can be typed twice: the earlier run keeps its files under a new name."""
    for number in (1, 2):
        (tmp_path / "scenes").mkdir(exist_ok=True)
        (tmp_path / "scenes" / "model.pth").write_text(f"run {number}")
        args = type("Args", (), {"dataset": "scenes", "out": str(tmp_path / "scenes"), "resume": None})
        train.prepare_out(args)
        assert (tmp_path / f"scenes-{number}" / "model.pth").read_text() == f"run {number}"
        assert f"scenes-{number}" in capsys.readouterr().out and not (tmp_path / "scenes" / "model.pth").exists()


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
    ("--weights nothing.pth", ["nothing.pth"]), ("--device cuda", ["cuda"]), ("--device abacus", ["abacus"]),
    ("--eval-every 0", ["--eval-every"]), ("--accumulate 0", ["--accumulate"]), ("--batch-size 0", ["--batch-size"]),
    ("--iters 0", ["--iters"]), ("--crop 0", ["--crop"]), ("--workers -1", ["--workers"])])
def test_settings_that_cannot_be(flags, words, folder_root, tmp_path):
    """A setting that cannot work is named; nothing is written."""
    fail(tmp_path, f"{TRAIN} --data-root {folder_root} {flags}", *words)
    assert not list(tmp_path.glob("out/*/*.pth"))


def test_missing_validation_is_an_error_for_voc(voc_root, tmp_path):
    """VOC comes with its val list: without it the copy is not whole."""
    root = Path(shutil.copytree(voc_root, tmp_path / "voc"))
    (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").unlink()
    fail(tmp_path, f"train.py --dataset voc --data-root {root} --iters 1 {SMALL}", "val.txt")
