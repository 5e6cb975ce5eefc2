"""What a user may rely on, in the order of the paper; then command lines and bad input. No data, network or GPU needed.

Kills, signals and broken files: extras/test_extras.py. What the tests are made with is at the end of the file.
"""
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}    # for children too
import numpy as np
import pytest
import scipy.io
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import data
import ema
import evaluate
import train
import visualize
from backbone import DilatedResNet, UserError
from data import TrainView, build_dataset, schedule
from ema import EMAU, A2Block, EMANet, NonLocal, load_checkpoint, save_checkpoint

HERE = Path(__file__).resolve().parent


# ---- Secs. 3 and 4: expectation and maximization
@pytest.mark.parametrize("channels, bases, rounds, lam, gradient", [
    (6, 5, 3, 1.0, "none"), (3, 1, 1, 1.0, "last"), (4, 9, 2, 0.3, "full"), (8, 4, 7, 5.0, "none")])
def test_unit_equals_the_equations(channels, bases, rounds, lam, gradient):
    """Eqs. 10-14, Secs. 5.1 and 5.3: EMAU's output is that of loops written from the equations, image by image."""
    unit, images = make_unit(channels, bases, rounds, lam, gradient=gradient), torch.randn(2, channels, 4, 7).double()
    expected = []
    for image in images:
        *_, (z, mu) = slow_em(unit, image, unit.mu[0].T.numpy(), rounds, lam)
        y = torch.from_numpy(z @ mu).relu() @ unit.conv2[0].weight[:, :, 0, 0].T                # Eq. 14
        expected.append(F.relu(image + unit.conv2[1](y.T.reshape(1, *image.shape))[0]))
    assert torch.allclose(unit(images), torch.stack(expected), rtol=0, atol=1e-9)


def slow_em(unit, image, mu, rounds, lam=1.0):
    """Image (C, H, W), bases mu (K, C) -> responsibilities z (N, K) and bases (K, C) of every round, as numpy."""
    x = unit.conv1(image[None])[0].flatten(1).T.detach().numpy()        # (N, C): a 1x1 convolution, no ReLU (Sec. 5.1)
    for _ in range(rounds):
        z = np.array([[math.exp(lam * sum(pixel * base)) for base in mu] for pixel in x])       # Eqs. 11, 12
        z = z / z.sum(1, keepdims=True)                                                         # Eq. 10
        mu = np.array([sum(z[n, k] * x[n] for n in range(len(x))) / sum(z[:, k]) for k in range(len(mu))])    # Eq. 13
        mu = mu / np.sqrt((mu ** 2).sum(1, keepdims=True))                                      # L2Norm, Sec. 5.3
        yield z, mu


def test_likelihood_never_falls():
    """Secs. 3.1 and 4: in none of 500 cases the likelihood falls in any round; without L2Norm it does in many."""
    falls = {"l2": 0, "none": 0}
    for seed in range(20):
        channels, bases, lam = 2 + seed // 2, 12 - seed // 2, 0.2 * (seed + 1)
        for norm in falls:
            unit = make_unit(channels, bases, 20, lam, seed, base_norm=norm)
            unit.mu, x = F.normalize(unit.mu, dim=1), 2 * torch.randn(25, 40, channels).double()
            likelihood = [torch.logsumexp(lam * x @ mu, 2).sum(1) for mu in [unit.mu, *(mu for _, mu in unit.em(x))]]
            steps = torch.stack(likelihood).diff(dim=0)                                 # (20, 25)
            falls[norm] += (steps < -1e-9 * likelihood[0].abs()).any(0).sum().item()
    assert falls["l2"] == 0 and falls["none"] > 100


# ---- Secs. 5.1 and 5.2: the unit, and the moving average of the bases
def test_init_is_the_released_one():
    """Sec. 5.1: 1x1 convolutions start with deviation sqrt(2 / C), the E-step's temperature; bases with length one."""
    torch.manual_seed(0)
    unit = EMAU(256)
    for conv in (unit.conv1, unit.conv2[0]):
        assert abs(conv.weight.std().item() / math.sqrt(2 / 256) - 1) < 0.02 and abs(conv.weight.mean()) < 1e-3
    assert unit.mu.shape == (1, 256, 64) and torch.allclose(unit.mu.norm(dim=1), torch.ones(1, 64))
    assert (unit.iterations, unit.lam, unit.alpha) == (3, 1.0, 0.9)


@pytest.mark.parametrize("gradient", ["none", "last", "full"])
def test_bases_follow_the_moving_average(gradient):
    """Eq. 15: in training mu^(0) moves to the mean of the batch's mu^(T), momentum 0.9, no norm; in eval mode never."""
    unit = make_unit(gradient=gradient).train()
    expected = unit.mu[0].T.numpy().copy()                    # (K, C)
    for _ in range(20):
        images = torch.randn(4, 6, 3, 5).double()
        last = [list(slow_em(unit, image, expected, 3))[-1][1] for image in images]
        expected = 0.9 * expected + 0.1 * np.mean(last, axis=0)
        unit(images).sum().backward()
    unit.eval()(images)
    assert np.abs(unit.mu[0].T.numpy() - expected).max() < 1e-9 and unit.mu.norm(dim=1).max() < 0.95


@pytest.mark.parametrize("number", range(7))
def test_two_processes_equal_one(number, pair, tiny):
    """Eq. 15, Sec. 6.1: two processes have the gradients and bases of one with the whole batch, whatever the option."""
    expected = step_with(number)
    first, second = (results["steps"][number] for results in pair)
    for key, value in expected.items():
        assert torch.equal(first[key], second[key])
        assert (first[key] - value).norm() <= 1e-3 * value.norm() + 1e-7, key


@pytest.mark.parametrize("base_update", ["average", "backprop", "fixed"])
def test_bases_are_kept_as_told(base_update):
    """Sec. 5.2: training moves mu^(0) by the average, by its gradient, or not at all."""
    torch.manual_seed(0)
    unit = EMAU(8, 4, base_update=base_update, gradient="full").train()
    before = unit.mu.clone()
    unit(torch.randn(2, 8, 5, 5)).square().mean().backward()
    assert torch.equal(unit.mu, before) == (base_update != "average")
    assert ("mu" in dict(unit.named_parameters())) == (base_update == "backprop")
    torch.optim.SGD(unit.parameters(), lr=0.1).step()
    assert torch.equal(unit.mu, before) == (base_update == "fixed")


@pytest.mark.parametrize("block", [partial(EMAU, num_bases=16), NonLocal, A2Block])
def test_sums_over_pixels_stay_in_float32_under_autocast(block, monkeypatch):
    """Eqs. 9, 12-16: sums over thousands of pixels are in float32, whatever the precision around; mu, logits too."""
    found, unit = [], block(32).train()
    spy(monkeypatch, torch, "softmax", lambda x, dim: found.append(x.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        unit(torch.randn(2, 32, 20, 20))
        assert small_net().eval().head(torch.randn(1, 16, 9, 9)).dtype == torch.float32
    assert set(found) == {torch.float32} and getattr(unit, "mu", torch.zeros(1)).dtype == torch.float32


# ---- Sec. 5.2: gradients through the rounds
@pytest.mark.parametrize("base_norm", ["l2", "layer", "none"])
def test_full_gradient_is_that_of_the_output(base_norm):
    """Sec. 5.2: with gradient full, the derivatives by input, first convolution and mu^(0) are finite differences'."""
    unit = make_unit(3, 2, lam=0.7, base_norm=base_norm, base_update="backprop", gradient="full")
    names = ("mu", "conv1.weight", "conv1.bias")
    values = [unit.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def output(x, *values):
        return torch.func.functional_call(unit, dict(zip(names, values, strict=True)), x)
    images = torch.randn(2, 3, 3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(output, (images, *values), atol=1e-6)


def test_last_gradient_is_that_of_the_last_e_step():
    """Sec. 5.2: gradient last is that of softmax(lambda x mu^(T-1)) mu^(T)^T with the bases held constant."""
    unit, images = make_unit(lam=0.7, gradient="last"), torch.randn(2, 6, 4, 5).double().requires_grad_()
    leaves = [images, unit.conv1.weight, unit.conv1.bias, unit.conv2[0].weight]
    copy, weight, bias, second = copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    rounds = [list(slow_em(unit, image, unit.mu[0].T.numpy(), 3, 0.7)) for image in images]
    before, last = (torch.from_numpy(np.stack([image[t][1] for image in rounds])) for t in (1, 2))    # (B, K, C)
    x = F.conv2d(copy, weight, bias).flatten(2).transpose(1, 2)                                       # (B, N, C)
    x = (torch.softmax(0.7 * x @ before.transpose(1, 2), 2) @ last).transpose(1, 2).view_as(copy)
    expected = F.relu(copy + unit.conv2[1](F.conv2d(x.relu(), second)))
    direction = torch.randn(2, 6, 4, 5).double()
    ours = torch.autograd.grad((unit(images) * direction).sum(), leaves)
    theirs = torch.autograd.grad((expected * direction).sum(), copies)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-10) and b.abs().max() > 1e-3


# ---- Secs. 5.3 and 5.4: the norm of the bases, and the relatives
def test_norms_of_the_bases():
    """Sec. 5.3: L2Norm keeps the direction of every basis, LayerNorm turns it; "none" is Eq. 13 as it stands."""
    torch.manual_seed(0)
    x, z = torch.randn(2, 30, 6).double() + 0.5, torch.rand(2, 30, 5).softmax(2).double()
    mean = torch.stack([(z[b, :, k, None] * x[b]).sum(0) / z[b, :, k].sum() for b in range(2) for k in range(5)])
    mean = mean.unflatten(0, (2, 5)).transpose(1, 2)                                   # (B, C, K)
    l2, layer, none = (make_unit(base_norm=norm).m_step(x, z) for norm in ("l2", "layer", "none"))
    assert torch.allclose(none, mean, rtol=1e-5)
    assert all((make_unit(base_norm=norm).m_step(x, 0 * z) == 0).all() for norm in ("l2", "layer", "none"))    # empty
    assert torch.allclose(l2, mean / mean.square().sum(1, keepdim=True).sqrt(), atol=1e-12)
    assert torch.allclose(layer, (mean - mean.mean(1, True)) / mean.std(1, correction=0, keepdim=True), atol=2e-3)


def test_non_local_is_the_re_estimation_from_all_pixels():
    """Sec. 5.4: Non-local with identities as projections is Eq. 14 with the N pixels as bases, exactly."""
    block, unit, x = NonLocal(6).double(), make_unit(6), torch.randn(2, 6, 4, 5).double()
    block.theta = block.phi = block.g = nn.Conv2d(6, 6, 1, bias=False).double()
    nn.init.dirac_(block.theta.weight)
    block.out = nn.Identity()
    pixels = x.flatten(2).transpose(1, 2)                                              # (B, N, C)
    bases = pixels.transpose(1, 2)                                                     # (B, C, K = N)
    again = (unit.e_step(pixels, bases) @ bases.transpose(1, 2)).transpose(1, 2).view_as(x)
    assert torch.equal(block(x), F.relu(x + again))


def test_a2_block_gathers_and_distributes():
    """Eq. 16: K means of phi(x), weighted by a softmax over the pixels; a pixel gets its own softmax over them."""
    block = small_net(attention="a2", channels=6, num_bases=3).attention.double().eval()
    x = torch.randn(2, 6, 4, 5).double()
    phi, theta, rho = (conv(x).flatten(2) for conv in (block.phi, block.theta, block.rho))      # (B, ., N)
    gather = theta.exp() / theta.exp().sum(2, keepdim=True)
    distribute = rho.exp() / rho.exp().sum(1, keepdim=True)
    y = torch.einsum("bkn,bkm,bcm->bcn", distribute, gather, phi).view_as(x)
    assert torch.allclose(block(x), F.relu(x + block.out(y)), rtol=0, atol=1e-12) and gather.shape == (2, 3, 20)


# ---- Sec. 6.1: the network
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_dilation_rates(name):
    """Sec. 6.1: output stride 8 and 16 come from the released network's dilation rates, multi-grid included."""
    with torch.device("meta"):
        net = DilatedResNet(name, output_stride=16)
    for stride, rate, rates in ((16, 1, [1, 4, 8]), (32, 1, [1, 2, 4]), (8, 2, [2, 8, 16])):
        net.set_output_stride(stride)
        wanted = {net.layer1: [1] * len(net.layer1), net.layer2: [1] * len(net.layer2),
                  net.layer3: [1] + [rate] * (len(net.layer3) - 1), net.layer4: rates[:len(net.layer4)]}
        for layer, layer_rates in wanted.items():
            for block, block_rate in zip(layer, layer_rates, strict=True):
                convs = [m for m in block.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
                assert convs and all(m.dilation == m.padding == (block_rate, block_rate) for m in convs)


@pytest.mark.parametrize("name, stem", [("resnet18", "7x7"), ("resnet18", "deep"), ("resnet50", "7x7")])
@pytest.mark.parametrize("built, stride, layers", [(8, 8, 4), (8, 16, 4), (16, 8, 4), (8, 32, 4), (8, 8, 2)])
def test_feature_map_sizes(name, stem, built, stride, layers):
    """Sec. 6.1: ceil(H / S) x ceil(W / S) features, S changed later, too; a quarter of the channels after layer2."""
    with torch.device("meta"):
        net = EMANet(4, name, stem, output_stride=built, layers=layers).backbone
        net.set_output_stride(stride)
        features = net(torch.zeros(1, 3, 97, 66))
    assert features.shape == (1, net.out_channels, math.ceil(97 / stride), math.ceil(66 / stride))
    assert net.out_channels == (2048 if name == "resnet50" else 512) // (1 if layers == 4 else 4)


def test_deep_stem_starts_as_torchvision_s_convolutions_do():
    """Sec. 6.1: the deep stem's own convolutions have He's init, deviation sqrt(2 / fan out), as all others have."""
    torch.manual_seed(0)
    net = DilatedResNet("resnet50", "deep")
    for conv in (net.conv1[0], net.conv1[3], net.conv1[6], net.layer1[0].conv1, net.layer1[0].downsample[0]):
        assert abs(conv.weight.std() / math.sqrt(2 / conv.out_channels / conv.kernel_size[0] ** 2) - 1) < 0.06, conv


def test_decoder_drops_a_tenth_of_its_channels(tiny, monkeypatch):
    """The released decoder: 256 channels, in training a tenth of them dropped whole; in eval mode none."""
    net, seen = small_net(decoder=True), []
    spy(monkeypatch, net.classifier, "forward", seen.append)
    net.decoder[1].bias.data.fill_(9)                         # all channels alive
    net.train()(torch.randn(8, 3, 65, 65))
    net.eval()(torch.randn(8, 3, 65, 65))
    dropped, kept = ((features == 0).flatten(2).all(2).float() for features in seen)       # (B, 256)
    assert dropped.shape == (8, 256) and abs(dropped.mean() - 0.1) < 0.03 and kept.max() == 0


def test_save_reaches_the_disk_before_it_replaces(tmp_path, monkeypatch):
    """A checkpoint is on the disk before it takes the old one's place: no power cut leaves half of one."""
    order = []
    spy(monkeypatch, os, "fsync", lambda *_: order.append("fsync"))
    spy(monkeypatch, os, "replace", lambda *_: order.append("replace"))
    save_checkpoint({"net": 1}, tmp_path / "model.pth")
    assert order == ["fsync", "replace"] and torch.load(tmp_path / "model.pth") == {"net": 1}


@pytest.mark.parametrize("name, depths, classes, prefix, entries", [
    ("resnet50", (3, 4, 6, 3), 21, "", 353), ("resnet101", (3, 4, 23, 3), 60, "module.", 659),
    ("resnet152", (3, 8, 36, 3), 21, "", 965)])
def test_released_checkpoint_computes_what_the_released_network_does(name, depths, classes, prefix, entries, tmp_path):
    """Sec. 6.1: a released file loads as it is and gives the released logits; evaluate.py asks for its data set."""
    torch.manual_seed(0)
    state, images, path = {}, torch.randn(2, 3, 65, 49).double(), tmp_path / "released.pth"
    theirs = released_logits(state, images, depths, classes)
    torch.save({"net": {prefix + key: value for key, value in state.items()}, "step": 30000}, path)
    net = load_checkpoint(path)
    expected = {"num_classes": classes, "backbone": name, "stem": "deep", "channels": 512, "num_bases": 64,
                "decoder": True, "output_stride": 8, "em_iterations": 3, "layers": 4}
    assert len(state) == entries and expected.items() <= net.config.items() and net.trained_on == {}
    with torch.no_grad():
        assert (net.double()(images) - theirs).abs().max() < 2e-5 * theirs.std()
    fail(evaluate, f"--ckpt {path}", "--dataset")


@pytest.mark.parametrize("stem, other", [("7x7", "deep"), ("deep", "7x7")])
def test_backbone_weights_from_a_file(stem, other, tmp_path):
    """Sec. 6.1: ImageNet weights from a file, torchvision's layout or the deep stem's; the rest is an error."""
    source = (torchvision.models.resnet18() if stem == "7x7" else DilatedResNet("resnet18", stem)).state_dict()
    torch.save(source | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, tmp_path / "weights.pth")
    net = DilatedResNet("resnet18", stem, tmp_path / "weights.pth")
    assert "weights.pth" in net.weights_origin
    assert all(torch.equal(value, source[key]) for key, value in net.state_dict().items())
    torch.save({0: torch.zeros(1)}, tmp_path / "numbers.pth")
    for n, its_stem, file in (("18", other, "weights.pth"), ("34", stem, "weights.pth"), ("18", stem, "numbers.pth")):
        with pytest.raises(UserError, match=rf"{file}: .* resnet{n} with the {its_stem} .*--stem .*(Missing|'int')"):
            DilatedResNet(f"resnet{n}", its_stem, tmp_path / file)


def test_download_that_was_damaged_is_refused(tmp_path, monkeypatch):
    """Sec. 6.1: --weights imagenet checks what came over the network against the hash that torchvision publishes."""
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "sent.pth")    # it would load
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "urlopen", lambda _, get=torch.hub.urlopen: get(f"file://{tmp_path}/sent.pth"))
    with pytest.raises(UserError, match="cannot get IMAGENET1K_V1 of resnet18.*hash.*--weights none"):
        DilatedResNet("resnet18", weights="imagenet")


# ---- Sec. 6.1: the data sets
def test_voc_is_read_as_it_is_distributed(tmp_path):
    """Sec. 6.1, VOC: palette labels give class indices, 255 stays, images are RGB as in the file."""
    raw = raw_label([*range(21), 255])
    base = write_release("voc", root := tmp_path / "a/b", raw) / "VOCdevkit/VOC2012"
    for place in (tmp_path, tmp_path / "a", base.parent, base):                # one or two levels off
        with pytest.raises(UserError, match=f"--data-root {root}$"):
            build_dataset("voc", place)
    for split, first in (("train", 0), ("val", 2)):
        voc = build_dataset("voc", root, split)
        assert tuple(voc.ids) == IDS[first:first + 2] and len(voc.classes) == 21
        for i in range(2):
            image, label = voc[i]
            assert np.array_equal(image.permute(1, 2, 0), Image.open(base / f"JPEGImages/{voc.ids[i]}.jpg"))
            assert np.array_equal(label, np.roll(raw, first + i))
    names = torchvision.models.segmentation.FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"]
    assert build_dataset("voc", root, "trainval").labelled and voc.classes == ["background", *names[1:]]
    Image.fromarray(raw_label([0, 21])).save(base / f"SegmentationClass/{IDS[2]}.png")
    with pytest.raises(UserError, match="value 21 does not occur in voc"):
        voc[0]


@pytest.mark.parametrize("place", ["benchmark_RELEASE/dataset", "VOCaug/dataset", "VOCdevkit/VOCaug/dataset", "."])
def test_trainaug_is_composed_of_voc_and_sbd(place, tmp_path):
    """Sec. 6.1, VOC: trainaug = VOC train and all of SBD, less VOC val; VOC's mask where both have one."""
    raw = raw_label([0, 1, 255])
    base = write_release("voc", tmp_path, raw) / "VOCdevkit/VOC2012"
    made(tmp_path / place / "train.txt").write_text(f"{IDS[1]} 1\n{IDS[2]} 1\nnew1 1\n")
    made(tmp_path / place / "val.txt").write_text(f"new2\n{IDS[3]}\n")
    for value, name in enumerate((*IDS, "new1", "new2"), 10):
        Image.fromarray(picture(SIZE)).save(base / f"JPEGImages/{name}.jpg")
        scipy.io.savemat(made(tmp_path / place / f"cls/{name}.mat"), {"GTcls": {"Segmentation": np.full(SIZE, value)}})
    augmented = build_dataset("voc", tmp_path, "trainaug")
    assert sorted(augmented.ids) == [*IDS[:2], "new1", "new2"]
    for i, name in enumerate(augmented.ids):
        wanted = {IDS[0]: raw, IDS[1]: np.roll(raw, 1), "new1": np.full(SIZE, 14), "new2": np.full(SIZE, 15)}[name]
        assert np.array_equal(augmented[i][1], wanted) and Path(augmented.images[i]).stem == name


def test_trainaug_labels_may_come_merged(tmp_path):
    """Sec. 6.1, VOC: without SBD, trainaug is SegmentationClassAug/ and its list, but val VOC's own masks."""
    raw, merged = raw_label([*range(21), 255]), raw_label([3, 255])
    base = write_release("voc", tmp_path, raw) / "VOCdevkit/VOC2012"
    with pytest.raises(UserError, match="benchmark.tgz.*SegmentationClassAug/.*--split train"):
        build_dataset("voc", tmp_path, "trainaug")
    (base / "ImageSets/Segmentation/trainaug.txt").write_text("\n".join(IDS))
    for name in IDS:
        Image.fromarray(merged).save(made(base / f"SegmentationClassAug/{name}.png"))
    augmented = build_dataset("voc", tmp_path, "trainaug")
    assert len(augmented) == 4 and np.array_equal(augmented[3][1], merged)
    assert np.array_equal(build_dataset("voc", tmp_path, "val")[0][1], np.roll(raw, 2))


@pytest.mark.parametrize("num_classes, other", [(59, 255), (60, 0)])
def test_context_ids_become_classes(num_classes, other, tmp_path):
    """Sec. 6.3, PASCAL Context: 59 of 459 ids give classes, in the release's order; others are ignored, or class 0."""
    write_release("context", tmp_path, np.arange(460, dtype=np.uint16).reshape(20, 23))
    context = build_dataset("context", tmp_path, "train", num_classes)
    text = "".join(f"{number}: {name}\n" for number, name in enumerate(context.classes[-59:], 1)) + "\n"
    assert hashlib.md5(text.encode()).hexdigest() == "993901f2d930cc038c406845f08fa082"            # 59_labels.txt
    found = context[0][1].flatten().tolist()                  # class of each id
    ids = " ".join(f"{name}={found.index(c)}" for c, name in enumerate(context.classes) if name != "other")
    assert hashlib.md5(ids.encode()).hexdigest() == "6a782547fd2046c65763eba247ca3dd1"            # as in its labels.txt
    assert found.count(other) == 460 - 59 and len(set(found)) == 60 and len(context.classes) == num_classes


@pytest.mark.parametrize("form", [np.uint8, np.double])
def test_both_forms_of_coco_stuff_give_the_same_targets(form, tmp_path):
    """Sec. 6.3: COCO-Stuff 10K (.mat, 0 = unlabelled) and 164K (.png, id - 1, 255 = unlabelled): 171 classes alike."""
    raw = raw_label(range(183))
    small = write_release("cocostuff", tmp_path / "10k", raw.astype(form))
    large = write_release("cocostuff164k", tmp_path / "164k", raw - 1)                    # 0 - 1 is 255
    kept = [i for i in range(1, 183) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)]
    wanted = [kept.index(value) if value in kept else 255 for value in raw.flatten()]
    ours, theirs = build_dataset("cocostuff", small, "train"), build_dataset("cocostuff164k", large, "train")
    assert ours[0][1].flatten().tolist() == theirs[0][1].flatten().tolist() == wanted
    digest = hashlib.md5("".join(f"{name}\n" for name in ours.classes).encode()).hexdigest()    # cocostuff's labels.txt
    assert ours.classes == theirs.classes and digest == "f2d2af44c303543e1d75673b33a2320c"


def test_coco_gives_voc_classes(tmp_path):
    """Sec. 6.2.3: for VOC's test server COCO's things of VOC's 20 kinds keep their kind, all else is background."""
    write_release("cocostuff164k", tmp_path, raw_label([*range(182), 255]))
    found = build_dataset("coco2voc", tmp_path, "train")[0][1].flatten().tolist()[:183]
    ids = {5: 1, 2: 2, 16: 3, 9: 4, 44: 5, 6: 6, 3: 7, 17: 8, 62: 9, 21: 10, 67: 11, 18: 12, 19: 13, 4: 14, 1: 15,
           64: 16, 20: 17, 63: 18, 7: 19, 72: 20}             # COCO's id: VOC's class
    assert found == [ids.get(value + 1, 0) for value in range(182)] + [255]


def test_images_are_rgb_and_never_turned(tmp_path):
    """Labels lie as the pixels lie in the file, so EXIF must not turn the image; gray becomes RGB; 8 bits at most."""
    gray = picture(SIZE)[:, :, 0]
    Image.fromarray(picture(SIZE)).save(tmp_path / "turned.jpg", exif=TURNED)
    assert data.read_image(tmp_path / "turned.jpg").shape == (3, *SIZE)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    assert np.array_equal(data.read_image(tmp_path / "gray.png"), np.stack([gray] * 3))
    for deep in (np.uint16, np.float32):
        Image.fromarray(gray.astype(deep)).save(tmp_path / "gray.tif")
        with pytest.raises(UserError, match="more than 8 bits"):
            data.read_image(tmp_path / "gray.tif")


def test_index_png_has_vocs_colours(tmp_path):
    """VOC: written labels are palette PNGs of the same indices, in the colours of the development kit."""
    label = np.arange(256, dtype=np.uint8)[None]
    data.save_index_png(label, tmp_path / "label.png", data.palette_of(["background"]))
    image = Image.open(tmp_path / "label.png")
    assert image.mode == "P" and np.array_equal(image, label)
    colours = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 4: (0, 0, 128), 15: (192, 128, 128), 255: (224, 224, 192)}
    assert {index: image.convert("RGB").getpixel((index, 0)) for index in colours} == colours
    grey, label = torch.full((3, 1, 2), 100).byte(), torch.tensor([[0, 255]]).byte()
    assert np.array(data.overlay(grey, label, data.palette_of(["sky"]), 1.0)).tolist() == [[[128, 0, 0], [100] * 3]]


# ---- Sec. 6.1: the training view, and the order of the images
@pytest.mark.parametrize("axis", [0, 1])
def test_image_and_label_stay_in_register(axis):
    """Sec. 6.1: scale, crop and flip move image and label alike: they agree to half a pixel of the source."""
    flips = 0
    for iteration in range(60):
        image, label = TrainView(Ramp(45, 60, axis), 40, 0)[iteration, 0]
        assert image.shape == (3, 40, 40) and label.shape == (40, 40) and image.dtype == label.dtype == torch.uint8
        inside = label != 255
        assert (image[1 - axis].float() / 4 - label.float())[inside].abs().max() <= 0.5 + 0.5 / 4 + 1e-6
        left, *_, right = image[0, 0][inside[0]].tolist()
        flips += left > right
    assert 15 < flips < 45


def test_scales_are_the_seven_steps():
    """Sec. 6.1: the image is scaled by 0.5, 0.75 ... 2.0, each about as often."""
    heights = [(TrainView(Ramp(20, 24, 0), 64, 0)[i, 0][1] != 255).any(1).sum().item() for i in range(140)]
    assert set(heights) == {10, 15, 20, 25, 30, 35, 40} and min(map(heights.count, heights)) > 7


def test_crops_reach_every_pixel():
    """Sec. 6.1: a crop may lie anywhere in the image, its edges included."""
    labels = [TrainView(Ramp(60, 60, i % 2), 20, 0)[i, 0][1] for i in range(400)]      # no crop holds the whole image
    assert torch.stack(labels).unique().tolist() == list(range(60))


def test_padding_is_ignored_and_of_the_mean_colour():
    """Sec. 6.1: beside a picture smaller than the crop, the label is 255 and the image (124, 116, 104)."""
    for i in range(30):
        image, label = TrainView(Ramp(20, 24, 0), 64, 0)[i, 0]
        assert (image[2] != 104).equal(label != 255) and (label == 255).any()              # Ramp's blue is 200
        assert (image[:, label == 255] == torch.tensor([[124], [116], [104]])).all()


def test_crops_depend_on_seed_and_iteration_alone(folder_root):
    """Sec. 6.1: an item is a function of (seed, iteration, index), so that workers and restarts cannot change it."""
    own = build_dataset("folder", folder_root, "train")
    crops = TrainView(own, 40, 3)
    first, second = crops[0, 5], crops[1, 5]
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[0], TrainView(own, 40, 4)[0, 5][0])
    assert all(map(torch.equal, second, TrainView(own, 40, 3)[1, 5]))


def test_schedule_shows_every_image_once_per_epoch():
    """Sec. 6.1: an epoch holds no image twice and leaves out less than a batch, in a new order every time."""
    batches = list(schedule(Ramp(length=11), 3, 0, range(1, 10)))
    epochs = [[index for batch in batches[e:e + 3] for _, index in batch] for e in (0, 3, 6)]
    assert all(len(set(epoch)) == 9 and set(epoch) <= set(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2]
    assert [batch[0][0] for batch in batches] == list(range(1, 10))


def test_schedule_is_the_same_for_any_number_of_processes():
    """Sec. 6.1: the global batch of an iteration is the same however it is cut, and wherever the run was resumed."""
    deal = partial(schedule, Ramp(length=17), 8, 5)
    whole = list(deal(range(1, 7)))
    assert len(whole) == 6 and all(len(batch) == 8 for batch in whole)
    assert list(deal(range(5, 7))) == whole[4:]
    for world in (2, 4, 8):
        shares = [list(deal(range(1, 7), rank, world)) for rank in range(world)]
        assert all(len(share) == 6 and {len(batch) for batch in share} == {8 // world} for share in shares)
        for i, batch in enumerate(whole):
            assert sorted(key for share in shares for key in share[i]) == sorted(batch)


# ---- Sec. 6.1: training
def test_loss_is_the_sum_over_valid_by_all_pixels():
    """Sec. 6.1: valid pixels' cross entropy by the number of all, as lr 0.009 was tuned to; 0 where all is ignored."""
    torch.manual_seed(0)
    logits, label = torch.randn(2, 4, 3, 5, requires_grad=True), torch.randint(0, 4, (2, 3, 5)).byte()
    label[0, 0] = 255
    total = sum(-torch.log_softmax(logits[b, :, h, w], 0)[int(label[b, h, w])].item()
                for b, h, w in np.ndindex(2, 3, 5) if label[b, h, w] != 255)
    assert math.isclose(train.segmentation_loss(logits, label).item(), total / 30, rel_tol=1e-5)
    loss = train.segmentation_loss(logits, torch.full_like(label, 255))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("options", [{}, {"base_update": "backprop", "gradient": "full"}])
def test_optimizer_decays_convolutions_only(options, tiny, monkeypatch):
    """Sec. 6.1: SGD of momentum 0.9, decay 1e-4 for convolutions' weights alone, twice the lr for all biases."""
    monkeypatch.setattr(train, "batch_loss", lambda net, *_: sum(p.sum() for p in net.parameters()))   # gradients 1
    net = small_net(decoder=True, **options)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = train.build_optimizer(net, 9.0)               # the step's lr counts, not this one
    for _ in range(2):
        train.training_step(net, optimizer, random_batch(), lr=0.2, accumulate=1, device=CPU, amp=None)
    for name, p in net.named_parameters():
        wanted, momentum = before[name], 0
        for _ in range(0 if name.startswith("attention.conv1") and not options else 2):          # frozen as released
            momentum = 0.9 * momentum + 1 + (1e-4 * wanted if p.ndim == 4 else 0)
            wanted = wanted - 0.2 * (2 if name.endswith("bias") else 1) * momentum
        assert torch.allclose(p, wanted, rtol=0, atol=2e-6), name


def test_accumulated_batch_is_one_batch(monkeypatch):
    """--accumulate: a batch in three parts gives the loss and step of the whole batch, where no BN sees the parts."""
    after, passes = [], []
    spy(monkeypatch, train, "batch_loss", lambda _, batch, *__: passes.append([len(part) for part in batch]))
    for parts in (1, 3):
        torch.manual_seed(0)
        net = nn.Conv2d(3, 4, 3, padding=1)
        loss = train.training_step(net, train.build_optimizer(net, 0.1), random_batch(), lr=0.1, accumulate=parts,
                                   device=CPU, amp=None)
        after.append((loss, net.weight, net.bias))
    assert passes == [[6, 6], *[[2, 2]] * 3]
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(*after, strict=True))


def test_recipes_are_the_paper_s():
    """Secs. 6.1, 6.2.3 and 6.3: the defaults of a data set are the paper's numbers; those of scenes are their own."""
    keys = ("split", "iters", "output_stride", "lr", "batch_size", "crop", "backbone", "stem", "weights", "channels",
            "decoder", "gradient", "layers", "num_bases", "em_iterations", "lam", "alpha", "base_update", "base_norm",
            "attention")
    common = [0.009, 16, 513, "resnet101", "7x7", "imagenet", 512, False, "none", 4, 64, 3, 1.0, 0.9, "average", "l2",
              "emau"]
    for name, *own in [("voc", "trainaug", 30000, 16), ("context", "train", 15000, 16),
                       ("cocostuff", "train", 30000, 8), ("cocostuff164k", "train", 80000, 8),
                       ("coco2voc", "train", 150000, 16), ("folder", "train", 15000, 16)]:
        args = vars(train.parse_args(["--dataset", name]))
        assert [args[key] for key in keys] == own + common and args["iters"] == 10 * args["eval_every"], name
    released = train.parse_args(["--dataset", "voc", "--recipe", "released"])
    assert (released.output_stride, released.stem, released.decoder, released.lr) == (8, "deep", True, 0.009)
    assert train.parse_args(["--dataset", "voc", "--recipe", "released", "--no-decoder"]).decoder is False
    scenes = train.parse_args([])
    assert [scenes.dataset, scenes.eval_every, *(vars(scenes)[key] for key in keys[:11])] == [
        "scenes", 180, "train", 360, 8, 0.1, 16, 97, "resnet18", "7x7", "none", 128, False]
    cells = train.parse_args(["--dataset", "cells-key"])
    assert (cells.layers, cells.gradient, cells.lr, cells.iters, cells.crop) == (2, "full", 0.03, 400, 193)


@pytest.mark.parametrize("flags, momentum, alpha", [
    ("--iters 30", 0.1, 0.9), ("--iters 300", 0.03, 0.9), ("--iters 15000", 6e-4, 0.9), ("--iters 30000", 3e-4, 0.9),
    ("--iters 60000", 3e-4, 0.9), ("--accumulate 2 --alpha 0.81", 1 - math.sqrt(1 - 3e-4), 0.9)])
def test_momentum_of_bn_and_bases(flags, momentum, alpha, tiny):
    """Sec. 6.1, Eq. 15: BN's momentum is 9 / iterations, that of 30,000 at least; parts of a batch take its root."""
    net = train.build_network(train.parse_args(["--dataset", "voc", *flags.split()]), 21, "none")
    found = {m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(found) == 1 and math.isclose(found.pop(), momentum) and math.isclose(net.attention.alpha, alpha)


def test_learning_rate_follows_the_poly_policy(run_train, monkeypatch):
    """Sec. 6.1: the lr of iteration i is lr (1 - i / iterations) ** 0.9."""
    lrs = []
    spy(monkeypatch, train, "training_step", lambda *_, lr, **options: lrs.append(lr))
    run_train("--iters 6 --lr 0.05")
    assert lrs == pytest.approx([0.05 * (1 - i / 6) ** 0.9 for i in range(6)])


def test_run_validates_at_output_stride_8(run_train, tmp_path, monkeypatch):
    """Sec. 6.1: a run trains at its own output stride and validates the whole list at 8."""
    seen = []
    spy(monkeypatch, train, "evaluate", lambda net, val, *_, **options: seen.append(f"{len(val)} images"))
    spy(monkeypatch, TinyBackbone, "set_output_stride", lambda net, stride: seen.append(stride))
    spy(monkeypatch, train, "training_step", lambda *_, **options: seen.append("step"))
    run_train("--iters 6 --eval-every 2 --output-stride 16")
    assert seen == ["step", "step", 8, "5 images", 16] * 3
    assert load_checkpoint(tmp_path / "run/model.pth").config["output_stride"] == 8


def test_seed_is_used_for_all_that_is_random(run_train, tmp_path, monkeypatch):
    """--seed: initialisation, order and crops, and each iteration's dropout are functions of it and of nothing else."""
    asked, dropout = [], []
    spy(monkeypatch, TrainView, "__getitem__", lambda view, key: asked.append((view.seed, *key)))
    spy(monkeypatch, train, "batch_loss", lambda *_: dropout.append(torch.rand(4).tolist()))
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(asked))
        run_train(f"--iters 2 --lr 0 --seed {seed}", tmp_path / out)
    a, b, c = (torch.load(tmp_path / out / "model.pth")["model"]["backbone.0.weight"] for out in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert asked[:4] == asked[4:8] and {seed for seed, _, _ in asked[8:]} == {1}
    assert [index for _, _, index in asked[:4]] != [index for _, _, index in asked[8:]]
    assert dropout[:2] == dropout[2:4] and dropout[0] not in (dropout[1], dropout[4])


@pytest.mark.parametrize("choice, dtype", [("off", torch.float32), ("bf16", torch.bfloat16)])
def test_amp_is_what_convolutions_compute_in(choice, dtype, run_train, folder_root, tmp_path, monkeypatch):
    """--amp: bf16 makes convolutions compute in bfloat16, in training and in evaluation; off in float32."""
    seen = []
    monkeypatch.setattr(TinyBackbone, "forward", lambda net, x: seen.append(net[0](x)) or seen[-1].relu())
    assert f"x cpu, {dtype}".replace("torch.", "") in run_train(f"--iters 1 --amp {choice}")
    assert [output.dtype for output in seen] == [dtype, *[torch.float32] * 5]            # one step, five validated
    seen.clear()
    command(evaluate, f"--ckpt {tmp_path}/run/model.pth --data-root {folder_root} --workers 0 --amp {choice}")
    assert {output.dtype for output in seen} == {dtype}


def test_compiled_run_is_the_same(trained, run_train, tmp_path, monkeypatch):
    """--compile: all steps run one compiled graph, validation none; losses, mIoU and names of weights are as ever."""
    graphs, compiler = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compiler(net, backend=lambda graph, _: graphs.append(1) or graph))
    run_train("--iters 3 --compile")
    assert len(graphs) == 1 and log_of(tmp_path / "run", "loss") == log_of(trained, "loss")
    assert validation(tmp_path / "run") == validation(trained) and load_checkpoint(tmp_path / "run/model.pth")


@pytest.mark.parametrize("flags", [
    "--base-norm layer", "--base-norm none", "--gradient last", "--gradient full --base-norm none",
    "--gradient full --base-update backprop", "--base-update fixed", "--attention nonlocal", "--attention a2",
    "--attention none", "--lam 4.0", "--alpha 0.5", "--em-iterations 6", "--decoder", "--channels 8 --num-bases 4"])
def test_every_option_trains_and_comes_back(flags, trained, run_train, folder_root, tmp_path):
    """Secs. 5 and 6: an option changes the losses; the checkpoint holds it and gives evaluate.py what the run had."""
    run_train(f"--iters 3 {flags}")
    assert log_of(tmp_path / "run", "loss") != log_of(trained, "loss")
    config = load_checkpoint(tmp_path / "run/model.pth").config
    assert all(str(config[flag.replace("-", "_")]) == value for flag, value in re.findall(r"--(\S+) (\w\S*)", flags))
    printed = command(evaluate, f"--ckpt {tmp_path}/run/model.pth --data-root {folder_root} --workers 0")
    assert f"eval folder val ss | {validation(tmp_path / 'run')} | 5 images" in printed


def test_log_lines_are_means(run_train, tmp_path, monkeypatch):
    """Each fiftieth of a run has a line: mean loss, seconds and wait for data, time left; so has a long evaluation."""
    losses, clock, saved = iter(torch.arange(1.0, 201)), iter(range(1000)), []  # one second from line to line
    monkeypatch.setattr(train, "training_step", lambda *_, **options: (next(clock), next(losses))[1])
    monkeypatch.setattr(train, "time", mock.Mock(time=clock.__next__))
    monkeypatch.setattr(evaluate, "time", mock.Mock(time=iter(range(0, 1000, 6)).__next__))
    spy(monkeypatch, train, "save_checkpoint", lambda _, path: saved.append(path.stem))
    out, lines = run_train("--iters 200 --eval-every 150"), sorted({*range(4, 201, 4), 150})
    means = {i: (before + 1 + i) / 2 for before, i in zip([0, *lines], lines, strict=False)}
    assert log_of(tmp_path / "run", "loss") == means and " ".join(saved) == "last last model last model"
    assert re.search(r"iter +4/200 .* lr 8.88e-03 \| 3250 ms \(data 31%\) \| 0.6 img/s .* eta 0:10:37", out)
    assert "\n  1/5 images | eta 0:00:48\n  2/5 images | eta 0:00:36\n" in out
    assert [set(log_of(tmp_path / "run", key).values()) for key in ("ms", "data_ms")] == [{3250, 3500}, {1000}]


def test_two_processes_train_one_network(pair):
    """Two processes read their own parts and drop their own channels; the log has the mean loss; weights are one's."""
    first, second = (results["run"] for results in pair)
    for (images, dropout, _), (other_images, other_dropout, _) in zip(first, second, strict=True):
        assert not torch.equal(images, other_images) and not torch.equal(dropout, other_dropout)
    means = [(a + b) / 2 for (*_, a), (*_, b) in zip(first, second, strict=True)]
    assert pair[0]["log"] == pytest.approx([(a + b) / 2 for a, b in zip(means[::2], means[1::2], strict=True)])
    assert torch.equal(pair[0]["weights"], pair[1]["weights"])


def test_resumed_run_continues_exactly(run_train, tmp_path, monkeypatch):
    """Stopped in mid-epoch and resumed, a run gives weights, optimizer and losses of one that was not, bit by bit."""
    write_net(small_net(decoder=True, num_bases=64), tmp_path / "init.pth")
    flags, steps = f"--iters 6 --eval-every 3 --decoder --lr 0.05 --weights x --init {tmp_path}/init.pth --resume", []
    assert f"weights  {tmp_path}/init.pth" in run_train(f"{flags} auto", tmp_path / "straight")
    with monkeypatch.context() as patch:
        spy(patch, train, "training_step",
            lambda *_, **options: steps.append(1) or len(steps) == 5 and train.ask_to_stop(signal.SIGTERM, None))
        assert "stopped after iteration 5" in run_train(f"{flags} auto")
    assert "the checkpoint of iteration 5" in run_train(f"{flags} {tmp_path}/run/last.pth --eval-every 6 --device cpu")
    assert log_of(tmp_path / "straight", "loss") == log_of(tmp_path / "run", "loss")
    ends = [torch.load(tmp_path / out / "last.pth") for out in ("straight", "run")]
    assert ends[0]["iteration"] == ends[1]["iteration"] == 6
    tensors = [[*end["model"].values(), *(state["momentum_buffer"] for state in end["optimizer"]["state"].values())]
               for end in ends]
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def test_resume_wants_the_same_run(trained, folder_root, tmp_path):
    """--resume with other settings or images, or from a mere network, is an error; an existing run stays as it is."""
    root, out = (Path(shutil.copytree(path, tmp_path / path.name)) for path in (folder_root, trained))
    line = f"{TRAIN} --data-root {root} --iters 3 --out {out}"
    fail(train, f"{line} --resume auto --lr 0.1", "another lr", "0.009", "0.1", "--out")
    fail(train, f"{line} --resume auto --batch-size 4", "another batch-size (2, not 4)")
    fail(train, f"{line}2 --resume {trained}/model.pth", "model.pth", "--init")
    (root / "ImageSets/Segmentation/train.txt").write_text("train_0\ntrain_1\ntrain_2\n")
    fail(train, f"{line} --resume auto", "another images (7, not 3)")
    assert all(path.read_bytes() == (trained / path.name).read_bytes() for path in out.iterdir())


@pytest.mark.parametrize("num_classes", [4, 6])
def test_init_from_another_network(num_classes, tmp_path, capsys, tiny):
    """--init takes the whole network; with another number of classes the classifier is new, and it says so."""
    source, net, own = small_net(4, seed=1), small_net(num_classes), small_net(num_classes).state_dict()
    write_net(source, tmp_path / "model.pth")
    train.load_init(net, tmp_path / "model.pth")
    assert bool(re.search("4 classes.* 6.*new one", capsys.readouterr().out)) == (num_classes == 6)
    for key, value in net.state_dict().items():
        afresh = num_classes == 6 and key.startswith("classifier.")
        assert torch.equal(value, own[key] if afresh else source.state_dict()[key]), key
    with pytest.raises(UserError, match="model.pth"):
        train.load_init(small_net(channels=8), tmp_path / "model.pth")


# ---- Sec. 6.1: evaluation
def test_metric_by_hand():
    """mIoU: one matrix over all pixels with a label; rows are labels; a class that occurs nowhere does not count."""
    label = torch.tensor([[0, 0, 0, 0, 1], [1, 2, 2, 255, 255]]).byte()
    prediction = torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 2, 0]])
    confusion = evaluate.confusion_matrix(prediction, label, 4)
    assert confusion.tolist() == [[2, 2, 0, 0], [0, 1, 1, 0], [0, 0, 2, 0], [0, 0, 0, 0]]
    result = evaluate.scores(confusion)
    assert (result["iou"], result["acc"]) == ([2 / 4, 1 / 4, 2 / 3, None], [2 / 4, 1 / 2, 2 / 2, None])
    assert [result[key] for key in ("miou", "pixacc", "macc")] == pytest.approx([17 / 36, 5 / 8, 2 / 3])
    result = evaluate.scores(torch.tensor([[6, 0, 2], [1, 1, 0], [0, 0, 0]]))          # class 2: IoU 0, no accuracy
    assert [result[key] for key in ("miou", "pixacc", "macc")] == pytest.approx([(6 / 9 + 1 / 2) / 3, 7 / 10, 5 / 8])


@pytest.mark.parametrize("size, stride", [((41, 57), 8), ((38, 30), 8), ((38, 45), 16), ((70, 38), 32)])
def test_prediction_follows_the_protocol(size, stride):
    """Sec. 6.1: whole images, ImageNet's mean and deviation, padded with 0 to S k + 1; six scales and their mirrors."""
    net, image = small_net(output_stride=stride).eval(), torch.from_numpy(picture(size)).permute(2, 0, 1)
    mean, std = (255 * torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    resize, logits = partial(F.interpolate, mode="bilinear", align_corners=True), {}
    with torch.no_grad():
        for scale in (0.5, 0.75, 1, 1.25, 1.5, 1.75):
            h, w = int(scale * size[0]), int(scale * size[1])
            sides = [next(n for n in range(side, side + stride) if n % stride == 1) for side in (h, w)]
            for mirror in ((), (3,)):
                view = torch.zeros(1, 3, *sides)
                view[:, :, :h, :w] = resize(((image.float() - mean) / std)[None].flip(mirror), (h, w))
                logits[scale, mirror] = resize(net(view)[:, :, :h, :w], size).flip(mirror)[0]
    assert torch.allclose(evaluate.predict(net, image), logits[1, ()], atol=1e-4)
    assert torch.allclose(evaluate.predict(net, image, ms_flip=True), sum(logits.values()), rtol=1e-4, atol=1e-3)


def test_saved_pngs_hold_the_scored_predictions(trained, tiny, folder_root, tmp_path):
    """--save-png writes class indices of the images' sizes, which give the printed scores; every class is named."""
    out = command(evaluate, f"--ckpt {trained}/model.pth --data-root {folder_root} --workers 2 --save-png {tmp_path}")
    counts = np.zeros((4, 4))
    for path in (folder_root / "SegmentationClass").glob("val*.png"):
        label, png = np.array(Image.open(path)), np.array(Image.open(tmp_path / path.name))
        np.add.at(counts, (label[label != 255], png[label != 255]), 1)
    hits = counts.diagonal()
    iou = hits / (counts.sum(0) + counts.sum(1) - hits)
    assert f"| mIoU {100 * iou.mean():.2f} | pixAcc {100 * hits.sum() / counts.sum():.2f} |" in out
    assert re.findall(r"  (road|house boat|tree|sky) +(\S+)\n", out) == [
        (name, f"{100 * value:.2f}") for name, value in zip(("road", "house boat", "tree", "sky"), iou, strict=True)]


@pytest.mark.parametrize("flags, rounds, views", [("", 3, 1), ("--em-iterations 1", 1, 1), ("--em-iterations 7", 7, 1),
                                                  ("--ms-flip", 3, 6), ("--output-stride 16", 3, 1)])
def test_evaluation_with_other_rounds_and_strides(flags, rounds, views, trained, tiny, folder_root, monkeypatch):
    """Fig. 4: --em-iterations and --output-stride other than in training; --ms-flip at six scales."""
    steps, sides = [], []
    spy(monkeypatch, EMAU, "e_step", lambda unit, x, mu: steps.append(mu))
    spy(monkeypatch, EMANet, "forward", lambda net, x: sides.extend(x.shape[2:]))
    out = command(evaluate, f"--ckpt {trained}/model.pth --data-root {folder_root} --workers 0 {flags}")
    assert f"eval folder val {'ms-flip' if views > 1 else 'ss'} | " in out and "| 5 images |" in out
    assert len(steps) == 5 * rounds * views and len(sides) == 2 * 5 * views
    assert {side % 16 for side in sides} == ({1} if "16" in flags else {1, 9})


@pytest.mark.parametrize("name, flags, classes", [
    ("voc", "--split train", 21), ("context", "", 59), ("context", "--context-classes 60", 60), ("cocostuff", "", 171),
    ("cocostuff164k", "", 171)])
def test_data_sets_from_training_to_evaluation(name, flags, classes, tiny, tmp_path):
    """Sec. 6.3: train.py and evaluate.py on a data set as its authors distribute it."""
    line = f"--data-root {write_release(name, tmp_path / 'data', raw_label([2, 19]))} --workers 0"
    out = command(train, f"{TRAIN} --dataset {name} --iters 2 {line} {flags} --out {tmp_path}/run")
    assert f"{name} train: 2 images, {classes} classes; validation: 2" in out
    assert len(log_of(tmp_path / "run", "val_iou")[2]) == classes
    out = command(evaluate, f"--ckpt {tmp_path}/run/model.pth {line}")
    split = "test" if name == "cocostuff" else "val"
    assert f"eval {name} {split} ss | {validation(tmp_path / 'run')} | 2 images" in out
    assert ("  other " in out) == (classes == 60)


def test_predictions_for_the_test_server(tiny, tmp_path):
    """Sec. 6.2: VOC's test images have no labels: their predictions are written, and not scored."""
    write_net(small_net(21, attention="none"), tmp_path / "model.pth", {"dataset": "voc"})
    line = f"--ckpt {tmp_path}/model.pth --data-root {tmp_path} --split test --workers 0"
    write_release("voc", tmp_path, raw_label([0]))
    fail(evaluate, line, "no labels", "--save-png")
    fail(evaluate, f"{line} --em-iterations 3", "attention none")
    fail(evaluate, f"{line} --em-iterations 0", "at least 1")
    fail(train, f"{TRAIN} --dataset voc --data-root {tmp_path} --split test --out {tmp_path}/out", "no labels")
    assert "2 predictions" in command(evaluate, f"{line} --save-png {tmp_path}/results/png")
    assert {path.stem for path in (tmp_path / "results/png").iterdir()} == set(IDS[2:])


# ---- Sec. 6.5: pictures
def test_maps_are_the_responsibilities_of_every_round():
    """Fig. 5: what is drawn are the unit's own rounds on the padded image."""
    net, image = small_net(output_stride=16).eval(), torch.from_numpy(picture((41, 60))).permute(2, 0, 1)
    with torch.no_grad():
        features = net.reduce(net.backbone(F.pad(data.normalise(image[None]), (0, 5, 0, 8))))    # 49 x 65
        rounds = net.attention.em(net.attention.conv1(features).flatten(2).transpose(1, 2))
        expected = torch.cat([z for z, _ in rounds]).transpose(1, 2).reshape(3, 8, 4, 5)
    assert torch.allclose(visualize.responsibilities(net, image), expected, atol=1e-5)


def test_pictures_of_a_data_set(trained, tiny, folder_root, tmp_path, monkeypatch):
    """Fig. 5: one picture for each image of a data set, and the prediction as an index PNG as evaluate.py writes it."""
    line, drawn = f"--ckpt {trained}/model.pth --data-root {folder_root}", []
    spy(monkeypatch, visualize, "picture", lambda *given: drawn.append(given))
    command(visualize, f"{line} --count 6 --bases 7,3 --size 32 --out {tmp_path}/new/pictures")
    image, label, _, maps, *_ = drawn[2]
    z = visualize.responsibilities(load_checkpoint(trained / "model.pth"), image)
    assert torch.allclose(maps[:, :, ::8, ::8], z[:, [7, 3]])
    assert torch.equal(label, build_dataset("folder", folder_root)[2][1])
    command(evaluate, f"{line} --workers 0 --save-png {tmp_path}/png")
    for name in ("val_0", "val_1", "val_2", "val_3", "val 4"):
        assert (tmp_path / f"new/pictures/{name}.png").exists()
        drawn = (tmp_path / f"new/pictures/{name}_prediction.png").read_bytes()
        assert drawn == (tmp_path / f"png/{name}.png").read_bytes()
    for bases in ("64", "-1", "x", "1,,2"):
        fail(visualize, f"{line} --out {tmp_path} --bases={bases}", "--bases", "63")


def test_picture_shows_label_prediction_and_rounds(monkeypatch):
    """Fig. 5: label and prediction in their colours; below, a basis' rounds on one scale, and no row over another."""
    rows, texts, label = [], [], torch.ones(64, 64).byte()
    spy(monkeypatch, visualize, "grid", rows.extend)
    spy(monkeypatch, visualize.ImageDraw.ImageDraw, "text", lambda draw, place, text, *_: texts.append(text))
    maps = torch.ones(2, 1, 64, 64) * torch.tensor([1.0, 0.5]).view(2, 1, 1, 1)
    black = torch.zeros(3, 64, 64).byte()
    sheet = visualize.picture(black, label, 2 * label, maps, [7], ["background", "road", "sky"])
    seen = [panel.getpixel((9, 9)) for row in rows for panel, _ in row]
    assert seen == [(0, 0, 0), (76, 0, 0), (0, 76, 0), (128, 0, 0), (252, 255, 164), (188, 55, 84)]
    assert texts[:6] == ["road", "sky", "image", "label", "prediction", ""]
    assert [sheet.getpixel((9, y)) for y in (280, 281, 309, 310)] == [(0, 0, 0), (255,) * 3, (255,) * 3, seen[4]]


def test_bases_shown_by_default_are_the_fullest():
    """Fig. 5: without --bases the four that hold the most pixels in the last round are shown, the fullest first."""
    z = torch.rand(3, 8, 6, 10)
    for base, columns in {5: [0, 2, 3, 6], 0: [1, 5, 9], 6: [4, 8], 2: [7]}.items():
        z[2, base, :, columns] += 1
    assert visualize.choose_bases(None, z) == [5, 0, 6, 2]


def test_pictures_of_own_images(tiny, tmp_path):
    """--image: turned as EXIF says; a pixel of the prediction has the class of the small pixel its centre lies in."""
    Image.fromarray(picture((60, 90))).save(made(tmp_path / "photos/turned.png"), exif=TURNED)
    small = Image.fromarray(np.rot90(picture((60, 90)), -1).copy())
    small.thumbnail((64, 64), Image.Resampling.BILINEAR)
    small = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    net = small_net(21).eval()
    net.classifier.bias.data -= evaluate.predict(net, small).mean((1, 2))      # so that it sees several classes
    write_net(net, tmp_path / "photos/model.pth", {"dataset": "voc"})          # beside the images, and no image
    line = f"--ckpt {tmp_path}/photos/model.pth --size 64 --image {tmp_path}/photos"
    command(visualize, f"{line} --out {tmp_path}/out")
    classes = evaluate.predict(net, small).argmax(0).numpy()
    rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip((90, 60), classes.shape, strict=True))
    drawn = np.array(Image.open(tmp_path / "out/turned_prediction.png"))
    assert len(np.unique(classes)) > 1 and np.array_equal(drawn, classes[rows][:, columns])
    shutil.copy(tmp_path / "photos/turned.png", tmp_path / "photos/turned.JPG")
    write_net(small_net(attention="none"), tmp_path / "photos/model.pth")
    assert "turned.JPG.png and" in command(visualize, f"{line} --out {tmp_path}/two")              # none overwritten
    for rest in ("", "/turned.png", " --bases 1"):              # the images would be overwritten; there are no bases
        fail(visualize, f"{line}{rest} --out {tmp_path}/photos", "photos", "no bases" if "bases" in rest else "--out")


# ---- Command lines, and bad input: one line that says what, where, and what to do
def test_scripts_work_together(folder_root, tmp_path):
    """As processes: torchrun trains in two of them, evaluate.py repeats the last validation, visualize.py draws."""
    def printed(line):
        return subprocess.check_output([sys.executable, *line.split()], cwd=tmp_path, text=True, timeout=120)
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2"
    out = printed(f"{torchrun} {HERE}/train.py {TRAIN} --iters 2 --data-root {folder_root}")
    assert "2 x cpu" in out and out.count("iter      2/2") == 1 and "random (no ImageNet weights)" in out
    line = f"evaluate.py --ckpt out/folder/model.pth --data-root {folder_root}"
    assert f"{line}\n" in out and (tmp_path / "out/folder/log.jsonl").read_text().count("\n") == 4
    out = printed(f"{torchrun} {HERE}/{line} --save-png png")
    assert out.count(f"eval folder val ss | {validation(tmp_path / 'out/folder')} | 5 images") == 1
    assert len(list((tmp_path / "png").iterdir())) == 5
    assert printed(f"{HERE}/{line.replace('evaluate', 'visualize')} --count 1").count("wrote out/folder/pictures/") == 1


def test_drawn_data_need_no_files(tiny, tmp_path, monkeypatch):
    """`python train.py` trains on pictures drawn by program, and evaluate.py on its result needs no data either."""
    monkeypatch.chdir(tmp_path)
    out = command(train, "--iters 2 --crop 33 --batch-size 2 --workers 0")
    assert "scenes train: 10000 images, 9 classes; validation: 64" in out
    first, second = (build_dataset("scenes", split=split) for split in ("train", "val"))
    assert not torch.equal(first[0][0], second[0][0]) and first.scales == (1.0,)
    printed = command(evaluate, "--ckpt out/scenes/model.pth --workers 0")
    assert f"eval scenes val ss | {validation(tmp_path / 'out/scenes')} | 64 images" in printed


@pytest.mark.parametrize("flags, words", [
    ("--batch-size 8", ["7 images", "8"]), ("--batch-size 3 --accumulate 2", ["--batch-size 3"]),
    ("--recipe released", ["released", "folder"]), ("--init nothing.pth", ["nothing.pth"]),
    ("--weights nothing.pth", ["nothing.pth"]), (f"--weights {__file__}", ["test_ema.py: not a file of weights"]),
    ("--weights imagenet --stem deep", ["deep stem"]), ("--weights imagenet-v2", ["IMAGENET1K_V2 of resnet18"]),
    ("--device cuda", ["--device cuda"]), ("--base-update backprop --gradient last", ["backprop", "gradient full"]),
    ("--dataset cells --output-stride 16", ["output stride 16"]), ("--dataset voc", ["VOCdevkit", "--data-root"]),
    ("--data-root nothing", ["nothing", "--data-root"]), *((flag, [flag, "at least"]) for flag in (
        "--eval-every 0", "--accumulate 0", "--batch-size 0", "--iters 0", "--crop 1", "--workers -1", "--seed -1",
        "--em-iterations 0", "--lr -1", "--alpha nan")), ("--alpha 2", ["at most 1"])])
def test_settings_that_cannot_be(flags, words, folder_root, tmp_path):
    """A setting that cannot work is named, never replaced by another; nothing is written."""
    fail(train, f"{TRAIN} --iters 1 --data-root {folder_root} --out {tmp_path}/out {flags}", *words)
    assert not (tmp_path / "out").exists()


def test_folder_without_validation(tiny, folder_root, tmp_path):
    """Your own folder without a val list is trained on all the same, and the start says so."""
    root = Path(shutil.copytree(folder_root, tmp_path / "data"))
    (root / "ImageSets/Segmentation/val.txt").unlink()
    out = command(train, f"{TRAIN} --iters 1 --data-root {root} --out {tmp_path}/run")
    assert "validation: none" in out and f"model.pth --data-root {root} --split train\n" in out


@pytest.mark.parametrize("content", [{"conv1.weight": torch.zeros(3)}, {"net": {"wte": torch.zeros(3)}},
                                     {"model": {}, "config": {"network": {"num_classes": 4}, "data": {}}}])
def test_bad_checkpoints(content, tmp_path):
    """A file that is not there, no checkpoint, another project's, or lacks weights is refused by name."""
    path = tmp_path / "last.pth"
    fail(evaluate, f"--ckpt {path}", "no checkpoint at", "last.pth")
    torch.save(content, path)
    fail(evaluate, f"--ckpt {path}", "last.pth: ")


def test_checkpoint_and_data_that_do_not_fit(trained, tiny, folder_root, tmp_path):
    """A network is not scored on data of other classes, or of the same in another order."""
    root = Path(shutil.copytree(folder_root, tmp_path / "data"))
    fail(evaluate, f"--ckpt {trained}/model.pth --dataset scenes", "4 classes", "9")
    (root / "classes.txt").write_text("sky\ntree\nhouse boat\nroad\n")
    fail(evaluate, f"--ckpt {trained}/model.pth --data-root {root}", "other names, or another order")


# ---- What the tests are made with: units and networks
CPU = torch.device("cpu")


class TinyBackbone(nn.Sequential):
    """Stands in for the ResNet where only the rest matters: one convolution, an eighth of the size."""
    out_channels, weights_origin = 8, "tiny"

    def __init__(self, backbone, stem, weights, *options):
        assert weights == "none"
        super().__init__(nn.Conv2d(3, 8, 9, stride=8, padding=4), nn.ReLU())

    def set_output_stride(self, output_stride):
        pass


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(ema, "DilatedResNet", TinyBackbone)


def make_unit(channels=6, bases=5, iterations=3, lam=1.0, seed=0, **options):
    """An EMAU in float64 and eval mode whose BN does something."""
    torch.manual_seed(seed)
    unit = EMAU(channels, bases, iterations, lam, **options).double().eval()
    bn = unit.conv2[1]
    for tensor in (bn.weight.data, bn.bias.data, bn.running_mean, bn.running_var):
        tensor.copy_(torch.rand(channels) + 0.5)
    return unit


def small_net(num_classes=4, seed=0, **options):
    torch.manual_seed(seed)
    return EMANet(num_classes, **{"backbone": "resnet18", "channels": 16, "num_bases": 8} | options)


def write_net(net, path, trained_on=None):
    trained_on = trained_on or {"dataset": "folder", "classes": ["a", "b", "c", "d"]}
    save_checkpoint({"model": net.state_dict(), "config": {"network": net.config, "data": trained_on}}, path)


def released_logits(state, images, depths, num_classes):
    """The forward pass of the released network in eval mode at output stride 8; makes entries that `state` lacks."""
    def entry(key, *shape, scale=1.0, shift=0.0):
        if key not in state:
            state[key] = (shift + scale * torch.randn(shape)).to(images.device)
        return state[key].to(images.dtype)

    def conv(x, key, c_out, size=1, stride=1, rate=1, bias=False):
        weight = entry(f"{key}.weight", c_out, x.shape[1], size, size, scale=math.sqrt(2 / (x.shape[1] * size * size)))
        return F.conv2d(x, weight, entry(f"{key}.bias", c_out) if bias else None, stride, rate * (size // 2), rate)

    def bn(x, key, scale=1.0):
        c = x.shape[1]
        weight, bias = entry(f"{key}.weight", c, scale=0.1 * scale, shift=scale), entry(f"{key}.bias", c, scale=0.2)
        mean, var = entry(f"{key}.running_mean", c, scale=0.2), entry(f"{key}.running_var", c, scale=0.1, shift=1.0)
        state.setdefault(f"{key}.num_batches_tracked", torch.tensor(30000))
        return F.batch_norm(x, mean, var, weight, bias)

    x = F.relu(bn(conv(images, "extractor.0.0", 64, 3, stride=2), "extractor.0.1"))
    x = F.relu(bn(conv(x, "extractor.0.3", 64, 3), "extractor.0.4"))
    x = F.max_pool2d(F.relu(bn(conv(x, "extractor.0.6", 128, 3), "extractor.1")), 3, 2, 1)
    for stage, depth, rates in zip((4, 5, 6, 7), depths, ([1] * 3, [1] * 8, [1] + [2] * 35, [2, 8, 16]), strict=True):
        for block, rate in zip(range(depth), rates, strict=False):
            key, stride, width = f"extractor.{stage}.{block}", 2 if (stage, block) == (5, 0) else 1, 4 << stage
            y = F.relu(bn(conv(x, f"{key}.conv1", width), f"{key}.bn1"))
            y = F.relu(bn(conv(y, f"{key}.conv2", width, 3, stride, rate), f"{key}.bn2"))
            y = bn(conv(y, f"{key}.conv3", 4 * width), f"{key}.bn3", 0.3)
            if block == 0:
                x = bn(conv(x, f"{key}.downsample.0", 4 * width, stride=stride), f"{key}.downsample.1")
            x = F.relu(x + y)
    x = F.relu(bn(conv(x, "fc0.conv", 512, 3), "fc0.bn"))
    y = conv(x, "emau.conv1", 512, bias=True).flatten(2)                               # (B, C, N)
    mu = entry("emau.mu", 1, 512, 64, scale=1 / math.sqrt(512))
    for _ in range(3):
        z = torch.softmax(y.transpose(1, 2) @ mu, 2)                                   # (B, N, K)
        mu = y @ (z / (1e-6 + z.sum(1, keepdim=True)))                                 # (B, C, K)
        mu = mu / (1e-6 + mu.norm(dim=1, keepdim=True))
    y = F.relu((mu @ z.transpose(1, 2)).view_as(x))
    x = F.relu(x + bn(conv(y, "emau.conv2.0", 512), "emau.conv2.1"))
    x = conv(F.relu(bn(conv(x, "fc1.0.conv", 256, 3), "fc1.0.bn")), "fc2", num_classes, bias=True)
    return F.interpolate(x, images.shape[2:], mode="bilinear", align_corners=True)


# ---- What the tests are made with: data sets, as small as can be and in the real formats
SIZE = (11, 17)
TURNED = Image.Exif()
TURNED[0x0112] = 6                                            # "turn by 90 degrees"
IDS = ("2007_000032", "2008_000008", "2009_000001", "2010_000003")      # two to train, two to validate
LAYOUTS = {  # where a data set has its images, labels and lists
    "voc": ("VOCdevkit/VOC2012/JPEGImages", "VOCdevkit/VOC2012/SegmentationClass",
            "VOCdevkit/VOC2012/ImageSets/Segmentation"),
    "context": ("VOCdevkit/VOC2010/JPEGImages", "trainval", "VOCdevkit/VOC2010/ImageSets/Main"),
    "cocostuff": ("images", "annotations", "imageLists"),
    "cocostuff164k": ("images/{}2017", "annotations/{}2017", "unused")}


def write_release(name, root, raw):
    """A data set in the layout that its archives unpack to; the label of image i is `raw` (H, W) rolled on by i."""
    images, labels, lists = LAYOUTS[name]
    for i, image in enumerate(IDS):
        split = "train" if i < 2 else "val"
        Image.fromarray(picture(raw.shape, i)).save(made(root / images.format(split) / f"{image}.jpg"))
        path, label = made(root / labels.format(split) / image), np.roll(raw, i)
        if name == "context":
            scipy.io.savemat(f"{path}.mat", {"LabelMap": label.astype(np.uint16)})
        elif name == "cocostuff":
            scipy.io.savemat(f"{path}.mat", {"S": label, "names": np.zeros((182, 1))})
        else:
            label = Image.fromarray(label)
            if name == "voc":                                 # colours do not matter, but they are not their indices
                label.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
            label.save(f"{path}.png")
    for split, ids in {"train": IDS[:2], "val": IDS[2:], "test": IDS[2:], "trainval": IDS}.items():
        made(root / lists / f"{split}.txt").write_text("\n".join(ids))
    return root


def raw_label(values):
    """A raw label map that holds every one of the values, uint8 or uint16."""
    return np.resize(np.array(values, np.uint16 if max(values) > 255 else np.uint8), SIZE)


def picture(size, seed=0):
    """A soft random image, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    return np.array(Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize(size[::-1], Image.BILINEAR))


def made(path):
    """The path, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="session")
def folder_root(tmp_path_factory):
    """A user's own folder: 7 images to train on, 5 to validate, four classes, several sizes and formats."""
    root = tmp_path_factory.mktemp("folder")
    (root / "classes.txt").write_text("road\nhouse boat \ntree\nsky\n")
    for split, count in {"train": 7, "val": 5}.items():
        names = [f"{split} {i}" if i == 4 else f"{split}_{i}" for i in range(count)]           # names may have spaces
        made(root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names), encoding="utf-8-sig")
        for i, name in enumerate(names):
            size, suffix = [(41, 56), (60, 48), (57, 41), (33, 64)][i % 4], (".jpg", ".png", ".jpeg", ".JPG")[i % 4]
            label = np.random.default_rng(i).choice([0, 1, 2, 3, 255], size).astype(np.uint8)
            Image.fromarray(picture(size, i)).save(made(root / f"JPEGImages/{name}{suffix}"))
            Image.fromarray(label).save(made(root / f"SegmentationClass/{name}.png"))
    return root


class Ramp:
    """Images whose colour says where each pixel lies, and so does its label: red = 4 * column, green = 4 * row."""
    scales = data.Pairs.scales

    def __init__(self, height=1, width=1, axis=0, length=1):
        rows, columns = np.mgrid[:height, :width].astype(np.uint8)
        self.image = torch.from_numpy(np.stack([4 * columns, 4 * rows, 200 + 0 * rows]))
        self.label, self.length = torch.from_numpy((rows, columns)[axis]), length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return self.image, self.label


def random_batch():
    """Six images and labels as the loader gives them; one image has more ignored pixels than the others."""
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (6, 33, 33)).byte()
    labels[0, :20] = 255
    return torch.randint(0, 256, (6, 3, 33, 33)).byte(), labels


# ---- What the tests are made with: scripts and processes
TRAIN = ("--dataset folder --backbone resnet18 --weights none --channels 16 --crop 33 --batch-size 2 --workers 0 "
         "--amp off")


def command(script, line):
    """What script.main prints, called with the words of the line; pytest keeps its own handlers of signals."""
    with mock.patch("train.signal"), mock.patch("sys.stdout", io.StringIO()) as printed:
        script.main(line.split())
    return printed.getvalue()


@pytest.fixture
def run_train(tiny, folder_root, tmp_path):
    """run_train(flags): what train.py prints, run on the user's own folder with a tiny network."""
    def run(flags, out=tmp_path / "run"):
        return command(train, f"{TRAIN} --data-root {folder_root} --out {out} {flags}")
    return run


@pytest.fixture(scope="session")
def trained(folder_root, tmp_path_factory):
    """The output folder of a run of three iterations, not to be changed; for tests with `tiny`."""
    out = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ema, "DilatedResNet", TinyBackbone)
        command(train, f"{TRAIN} --data-root {folder_root} --iters 3 --out {out}")
    return out


def fail(script, line, *words):
    """script.main must end with one line that holds all the words."""
    with pytest.raises(UserError) as error:
        command(script, line)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def spy(monkeypatch, owner, name, look):
    """Calls look with the arguments of owner.name before each call of it."""
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **options: (look(*args, **options), function(*args, **options))[1])


def log_of(out, key):
    """{iteration: value} of the lines of log.jsonl that have the key; of two of one iteration the last counts."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {record["iteration"]: record[key] for record in records if key in record}


def validation(out):
    """The last validation of a run in the words of evaluate.py's last line."""
    miou, pixacc, macc = (100 * list(log_of(out, f"val_{key}").values())[-1] for key in ("miou", "pixacc", "macc"))
    return f"mIoU {miou:.2f} | pixAcc {pixacc:.2f} | mAcc {macc:.2f}"


@pytest.fixture(scope="session")
def pair(folder_root, tmp_path_factory):
    """The results of two processes, as under torchrun."""
    folder = tmp_path_factory.mktemp("pair")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(in_a_group, (folder, folder_root, port), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def in_a_group(rank, folder, root, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    ema.DilatedResNet = TinyBackbone
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    steps = [step_with(number, slice(rank, None, 2)) for number in range(len(OPTIONS))]
    dist.destroy_process_group()

    run, nets, batch_loss = [], [], train.batch_loss

    def watched(model, batch, *rest):
        dropout, loss = torch.rand(4), batch_loss(model, batch, *rest)
        run.append((batch[0], dropout, loss.item()))
        nets.append(model)
        return loss
    train.batch_loss = watched                                # this process ends afterwards
    command(train, f"{TRAIN} --data-root {root} --iters 3 --lr 0.05 --batch-size 4 --accumulate 2 --out {folder}/run")
    log = list(log_of(folder / "run", "loss").values())
    weights = torch.cat([p.detach().flatten() for p in nets[0].parameters()])
    torch.save({"steps": steps, "run": run, "log": log, "weights": weights}, folder / f"{rank}.pt")


OPTIONS = [{}, {"base_norm": "none"}, {"gradient": "last"}, {"gradient": "full", "base_update": "fixed"},
           {"gradient": "full", "base_update": "backprop"}, {"attention": "nonlocal"}, {"attention": "a2"}]


def step_with(number, part=slice(None)):
    """Gradients and bases after two passes over this process's part of a batch; BN in eval mode."""
    net = small_net(**OPTIONS[number]).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model = nn.parallel.DistributedDataParallel(net) if dist.is_initialized() else net
    for _ in range(2):                                        # DDP finds out about unused parameters in the second step
        net.zero_grad()
        train.batch_loss(model, [x[part] for x in random_batch()], CPU, None).backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    return found | {name: buffer for name, buffer in net.named_buffers() if name == "attention.mu"}


