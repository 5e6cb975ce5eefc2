"""What a user may rely on, in the order of the paper, without data, network or GPU. Kills, signals
and damaged files: extras/test_extras.py. What the tests are made with is at the end."""
import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
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
from backbone import DilatedResNet
from data import TrainView, build_dataset, schedule
from ema import EMAU, EMANet, load_checkpoint

parametrize, raises = pytest.mark.parametrize, pytest.raises
FOLDER_CLASSES = ["road", "house boat", "tree", "sky"]


# ---- Secs. 3 to 5: EMAU
@parametrize("channels, bases, rounds, lam, gradient", [
    (6, 5, 3, 1.0, "none"), (3, 1, 1, 1.0, "full"), (4, 9, 2, 0.3, "full"), (8, 4, 7, 5.0, "none")])
def test_unit_equals_the_equations(channels, bases, rounds, lam, gradient):
    """Eqs. 10-14, Secs. 5.1 and 5.3: EMAU's output and rounds are those of loops over pixels."""
    unit = make_unit(channels, bases, rounds, lam, gradient=gradient)
    images = torch.randn(2, channels, 4, 7).double()
    x, outputs = unit.conv1(images).flatten(2).transpose(1, 2), unit(images)
    for i, image in enumerate(images):
        for t, (z, mu) in enumerate(slow_em(unit, image, unit.mu[0].T.numpy(), rounds, lam), 1):
            ours = (part[i].detach().numpy() for part in unit.em(x, t))
            assert all(map(np.allclose, ours, (z, mu.T)))
        y = torch.from_numpy(z @ mu).relu() @ unit.conv2[0].weight[:, :, 0, 0].T           # Eq. 14
        expected = F.relu(image + unit.conv2[1](y.T.reshape(1, *image.shape))[0])
        assert torch.allclose(outputs[i], expected, rtol=0, atol=1e-9)

def slow_em(unit, image, mu, rounds, lam=1.0):
    """Image (C, H, W), bases mu (K, C) -> z (N, K) and mu (K, C) of every round, as numpy."""
    x = unit.conv1(image[None])[0].flatten(1).T.detach().numpy()         # (N, C)  Sec. 5.1, no ReLU
    for _ in range(rounds):
        z = np.array([[math.exp(lam * sum(pixel * base)) for base in mu] for pixel in x])   # Eq. 12
        z = z / z.sum(1, keepdims=True)                                                     # Eq. 10
        mu = np.array([sum(z[n, k] * x[n] for n in range(len(x))) / (sum(z[:, k]) + 1e-6)   # Eq. 13
                       for k in range(len(mu))])              # with 1e-6 as in the released code
        mu = mu / (np.sqrt((mu ** 2).sum(1, keepdims=True)) + 1e-6)               # L2Norm, Sec. 5.3
        yield z, mu

def test_init_is_the_released_one():
    """Sec. 5.1: 1x1 convolutions begin with deviation sqrt(2 / C), bases with length one."""
    torch.manual_seed(0)
    unit = EMAU(256)
    for conv in (unit.conv1, unit.conv2[0]):
        assert abs(conv.weight.std().item() / math.sqrt(2 / 256) - 1) < 0.02
    assert unit.mu.shape == (1, 256, 64) and torch.allclose(unit.mu.norm(dim=1), torch.ones(1, 64))

@parametrize("options", [{}, {"gradient": "full"}, {"base_update": "fixed"}])
def test_bases_follow_the_moving_average(options):
    """Eq. 15, Sec. 5.2: training moves mu^(0) to the mean mu^(T) by a tenth, unless it is fixed."""
    unit = make_unit(**options).train()
    unit.e_step = lambda x, mu: torch.softmax(x @ mu, 2)      # as somebody may write it
    expected, share = unit.mu[0].T.numpy().copy(), 0 if "base_update" in options else 0.1  # (K, C)
    for _ in range(20):
        images = torch.randn(4, 6, 3, 5).double()
        last = [list(slow_em(unit, image, expected, 3))[-1][1] for image in images]
        expected = (1 - share) * expected + share * np.mean(last, axis=0)
        unit(images).sum().backward()
    unit.eval()(images)                                       # which does not move them
    assert np.abs(unit.mu[0].T.numpy() - expected).max() < 1e-9

@parametrize("number", range(6))
def test_two_processes_equal_one(number, pair, tiny):
    """Eq. 15, Sec. 6.1: two processes have the gradients and bases of one with the whole batch."""
    first, second = (results["steps"][number] for results in pair)
    for key, value in step_with(number).items():
        assert torch.equal(first[key], second[key])
        assert (first[key] - value).norm() <= 1e-3 * value.norm() + 1e-7, key

@parametrize("base_norm", ["l2", "layer", "none"])
def test_full_gradient_is_that_of_the_output(base_norm):
    """Sec. 5.2: gradient full has finite differences' derivatives by input, conv1 and mu^(0)."""
    options = {"base_norm": base_norm, "base_update": "backprop", "gradient": "full"}
    unit, names = make_unit(3, 2, lam=0.7, **options), ("mu", "conv1.weight", "conv1.bias")
    values = [unit.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def output(x, *values):
        return torch.func.functional_call(unit, dict(zip(names, values, strict=True)), x)
    images = torch.randn(2, 3, 3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(output, (images, *values), atol=1e-6)

def test_gradient_none_takes_em_as_a_constant():
    """Sec. 5.2, as released: only the sum and conv2 pass gradients on, and conv1 is frozen."""
    unit, images = make_unit(), torch.randn(2, 6, 4, 5).double().requires_grad_()
    z, mu = unit.em(unit.conv1(images).flatten(2).transpose(1, 2), 3)
    y = (z @ mu.transpose(1, 2)).transpose(1, 2).reshape(images.shape).relu().detach()
    wanted = [images, *unit.conv2.parameters()]
    ours, theirs = (torch.autograd.grad(output.square().sum(), wanted) for output in (
        unit(images), F.relu(images + unit.conv2(y))))
    assert all(map(torch.allclose, ours, theirs)) and not unit.conv1.weight.requires_grad

def test_norms_of_the_bases():
    """Sec. 5.3: means, divided by length or deviation; a basis without pixels is 0, in float16."""
    x, z = torch.randn(2, 30, 6).double() + 0.5, torch.rand(2, 30, 5).double()
    z[:, :, 1] = 0
    mean = torch.einsum("bnc,bnk->bck", x, z) / (z.sum(1, True) + 1e-6)
    centred = mean - mean.mean(1, True)                       # LayerNorm has an epsilon of 1e-5
    for norm, expected in (("none", mean), ("l2", mean / (mean.norm(dim=1, keepdim=True) + 1e-6)),
                           ("layer", centred / (centred.square().mean(1, True) + 1e-5).sqrt())):
        unit = make_unit(base_norm=norm)
        assert torch.allclose(unit.m_step(x, z), expected, rtol=0, atol=1e-12)
        assert (unit.m_step(x.half(), z.half()) - expected).abs().max() < 0.02

# ---- Sec. 6.1: the network, its weights and checkpoints
@parametrize("name, stem", [("resnet18", "7x7"), ("resnet34", "7x7"), ("resnet50", "deep"),
                            ("resnet50", "7x7"), ("resnet101", "7x7")])
def test_dilation_rates_and_feature_sizes(name, stem):
    """Sec. 6.1: output stride 8 and 16, set at any time: the released rates, sizes ceil(H / S)."""
    with torch.device("meta"):
        net, image = DilatedResNet(name, stem, output_stride=16), torch.zeros(1, 3, 97, 66)
    for stride, h, w, rate, rates in ((16, 7, 5, 1, [1, 4, 8]), (8, 13, 9, 2, [2, 8, 16])):
        net.set_output_stride(stride)
        assert net(image).shape == (1, net.out_channels, h, w)
        for layer, its_rates in ((net.layer1, [1] * 3), (net.layer2, [1] * 4),
                                 (net.layer3, [1] + [rate] * 22), (net.layer4, rates)):
            for block, wanted in zip(layer, its_rates, strict=False):
                convs = [m for m in block.modules() if getattr(m, "kernel_size", 1) == (3, 3)]
                assert convs and all(m.dilation == m.padding == (wanted, wanted) for m in convs)

def test_network_compiles_to_one_graph_and_can_be_exported(tiny):
    """torch.compile makes one graph of training, with eager's gradients and bases; export works."""
    graphs, images = [], torch.randn(2, 3, 33, 33)
    nets = [small_net(gradient="full"), small_net(gradient="full")]
    nets[0].compile(fullgraph=True, backend=lambda graph, _: graphs.append(1) or graph.forward)
    for net in (*nets, *nets):
        net.train()(images).square().sum().backward()
    assert len(graphs) == 1 and torch.allclose(*(net.attention.mu for net in nets))
    assert torch.allclose(*(net.reduce[0].weight.grad for net in nets))
    free = ({0: torch.export.Dim.DYNAMIC},)                   # any number of images
    exported = torch.export.export(net.eval(), (images,), dynamic_shapes=free).module()
    assert torch.allclose(exported(images[:1]), net(images[:1]), atol=1e-6)

def test_released_checkpoint(tmp_path):
    """Sec. 6.1: a released file loads as it is, for VOC: its 353 tensors, under their own names."""
    torch.manual_seed(0)
    path = tmp_path / "their.pth"
    net = small_net(21, backbone="resnet50", stem="deep", decoder=True)
    names = {"backbone.conv1.": "extractor.0.", "backbone.bn1.": "extractor.1.", "decoder.0.":
             "fc1.0.conv.", "decoder.1.": "fc1.0.bn.", "reduce.0.": "fc0.conv.", "reduce.1.":
             "fc0.bn.", "attention.": "emau.", "classifier.": "fc2."}
    names |= {f"backbone.layer{i}.": f"extractor.{i + 3}." for i in (1, 2, 3, 4)}
    theirs = {}
    for key, value in net.state_dict().items():
        ours = next(name for name in names if key.startswith(name))
        theirs["module." + names[ours] + key.removeprefix(ours)] = value
    torch.save({"net": theirs, "step": 30000}, path)
    again, image = load_checkpoint(path), torch.randn(1, 3, 33, 41)
    assert len(theirs) == 353 and again.dataset == "voc" and md5("\n".join(again.classes)) == VOC
    assert torch.equal(again(image), net.eval()(image)) and not again.training


def test_logits_are_upsampled_with_aligned_corners(tiny):
    """Sec. 6.1: every logit of the feature map lies on the pixel that it belongs to."""
    net, image = small_net().eval(), torch.randn(1, 3, 33, 41)
    logits = net.classifier(net.attention(net.reduce(net.backbone(image))))
    assert torch.allclose(net(image)[:, :, ::8, ::8], logits, atol=1e-6)

@parametrize("stem, other", [("7x7", "deep"), ("deep", "7x7")])
def test_backbone_weights_from_a_file(stem, other, tmp_path):
    """Sec. 6.1: ImageNet weights from a file, for either stem; another network's are refused."""
    source = (torchvision.models.resnet50() if stem == "7x7" else
              DilatedResNet("resnet50", stem)).state_dict()
    torch.save(source | {"fc.weight": torch.zeros(1000, 2048)}, path := tmp_path / "weights.pth")
    net = DilatedResNet("resnet50", stem, path)
    assert all(torch.equal(value, source[key]) for key, value in net.state_dict().items())
    for name, its_stem in (("resnet50", other), ("resnet101", stem)):
        with raises(OSError, match=rf"weights.pth: .*--backbone {name} .*--stem"):
            DilatedResNet(name, its_stem, path)

def test_checkpoint_of_the_drawn_scenes(tiny, tmp_path, monkeypatch):
    """`python train.py` needs no data; its checkpoints, on the disk when renamed, hold it all."""
    order, line = [], "--iters 1 --crop 33 --batch-size 2 --output-stride 16"
    spy(monkeypatch, os, "fsync", lambda _: order.append("fsync"))
    spy(monkeypatch, os, "replace", lambda _, path: order.append(Path(path).stem))
    assert "images: 10000, for validation 64" in command(train, f"{line} --out {tmp_path}/run")
    model, last = (torch.load(tmp_path / f"run/{name}.pth") for name in ("model", "last"))
    assert order == ["fsync", "model", "fsync", "last"] and last["iteration"] == 1
    assert set(last) == {*model, "optimizer", "iteration", "args"} and len(model) == 4
    assert model["network"]["output_stride"] == 8 and "weights" not in model["network"]
    out = command(evaluate, f"--ckpt {tmp_path}/run/model.pth --workers 0")
    assert f"eval scenes val ss | {validation(tmp_path / 'run')} | 64 images" in out

# ---- Sec. 6.1: the data sets
def test_voc_is_read_as_it_is_distributed(tmp_path):
    """Sec. 6.1, VOC: palette labels give class indices, 255 stays, and images are RGB."""
    raw = raw_label([*range(21), 255])
    base = write_release("voc", tmp_path, raw) / "VOCdevkit/VOC2012"
    for split, first in (("train", 0), ("val", 2)):
        voc = build_dataset("voc", tmp_path, split)
        assert tuple(voc.ids) == IDS[first:first + 2] and md5("\n".join(voc.classes)) == VOC
        for i, name in enumerate(voc.ids):
            image = Image.open(base / f"JPEGImages/{name}.jpg")
            assert np.array_equal(voc[i][0].permute(1, 2, 0), image)
            assert np.array_equal(voc[i][1], np.roll(raw, first + i))
    Image.fromarray(raw_label([0, 21])).save(base / f"SegmentationClass/{IDS[2]}.png")
    with raises(OSError, match=f"{IDS[2]}.png: label value 21 in voc, .* 0 to 20"):
        voc[0]

def test_trainaug_is_composed_of_voc_and_sbd(tmp_path):
    """Sec. 6.1, VOC: trainaug = VOC train and SBD, less VOC val; or SegmentationClassAug/."""
    raw, sbd = raw_label([0, 1, 255]), tmp_path / "benchmark_RELEASE/dataset"
    base = write_release("voc", tmp_path, raw) / "VOCdevkit/VOC2012"
    made(sbd / "train.txt").write_text(f"{IDS[1]}\n{IDS[2]}\nnew1\n")
    made(sbd / "val.txt").write_text(f"new2\n{IDS[3]}\n")
    for value, name in enumerate((*IDS, "new1", "new2"), 10):
        Image.fromarray(picture(SIZE)).save(base / f"JPEGImages/{name}.jpg")
        mask = raw_label([value])
        Image.fromarray(mask).save(made(base / f"SegmentationClassAug/{name}.png"))
        scipy.io.savemat(made(sbd / f"cls/{name}.mat"), {"GTcls": {"Segmentation": mask}})
    augmented = build_dataset("voc", tmp_path, "trainaug")
    wanted = dict(zip([*IDS[:2], "new1", "new2"], [raw, np.roll(raw, 1), 14, 15], strict=True))
    assert sorted(augmented.ids) == sorted(wanted)
    for i, name in enumerate(augmented.ids):
        assert (augmented[i][1].numpy() == wanted[name]).all() and name in augmented.images[i]
    shutil.rmtree(sbd)
    (base / "ImageSets/Segmentation/trainaug.txt").write_text("new2\n")
    assert (build_dataset("voc", tmp_path, "trainaug")[0][1] == 15).all()

@parametrize("name, num_classes, other", [("context", 59, 255), ("context60", 60, 0)])
def test_context_ids_become_classes(name, num_classes, other, tmp_path):
    """Sec. 6.3, PASCAL Context: 59 of 459 ids give classes; others are ignored, or class 0."""
    write_release(name, tmp_path, np.arange(460, dtype=np.uint16).reshape(20, 23))
    context = build_dataset(name, tmp_path, "train")
    text = "".join(f"{i}: {c}\n" for i, c in enumerate(context.classes[-59:], 1)) + "\n"
    assert md5(text) == "993901f2d930cc038c406845f08fa082"                        # 59_labels.txt
    found = context[0][1].flatten().tolist()                  # class of each id
    ids = " ".join(f"{c}={found.index(i)}" for i, c in enumerate(context.classes) if c != "other")
    assert md5(ids) == "6a782547fd2046c65763eba247ca3dd1"                   # as in its labels.txt
    assert found.count(other) == 460 - 59 and len(context.classes) == num_classes

@parametrize("form", [np.uint8, np.double])
def test_both_forms_of_coco_stuff_give_the_same_targets(form, tmp_path):
    """Sec. 6.3: COCO-Stuff 10K (.mat, 0 = unlabelled) and 164K (.png, id - 1) have 171 classes."""
    raw, gaps = raw_label(range(183)), (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
    kept = [i for i in range(1, 183) if i not in gaps]
    wanted = [kept.index(value) if value in kept else 255 for value in raw.flatten()]
    for name, label in (("cocostuff", raw.astype(form)), ("cocostuff164k", raw - 1)):  # 0 - 1 = 255
        coco = build_dataset(name, write_release(name, tmp_path / name, label), "train")
        assert coco[0][1].flatten().tolist() == wanted and tuple(coco.ids) == IDS[:2]
        names = "".join(f"{name}\n" for name in coco.classes)                        # labels.txt
        assert md5(names) == "f2d2af44c303543e1d75673b33a2320c"

def test_coco_gives_voc_classes(tmp_path):
    """Sec. 6.2.3: COCO's things of VOC's 20 kinds keep their kind, all else is background."""
    write_release("coco2voc", tmp_path, raw_label([*range(182), 255]))
    coco = build_dataset("coco2voc", tmp_path, "train")
    ids = [5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72]     # VOC's order
    wanted = [ids.index(i) + 1 if i in ids else 0 for i in range(1, 183)] + [255]
    assert coco[0][1].flatten().tolist()[:183] == wanted and md5("\n".join(coco.classes)) == VOC

@parametrize("name", ["voc", "context", "context60", "cocostuff", "cocostuff164k", "coco2voc",
                      "folder", "scenes"])
def test_data_sets_can_be_pickled(name, folder_root, tmp_path):
    """macOS and Python 3.14 pickle a data set to start workers: it comes back with equal items."""
    root = write_release(name, tmp_path, raw_label([2, 19])) if name in LAYOUTS else folder_root
    view = TrainView(build_dataset(name, root, "train"), 33, 0)
    again = pickle.loads(pickle.dumps(view))
    assert all(map(torch.equal, (*view.data[1], *view[5, 0]), (*again.data[1], *again[5, 0])))

def test_images_are_rgb_and_never_turned(tmp_path):
    """Labels lie as the file's pixels do, so EXIF must not turn it; gray becomes RGB; 8 bits."""
    gray = picture(SIZE)[:, :, 0]
    Image.fromarray(gray).save(tmp_path / "gray.png", exif=TURNED)
    assert np.array_equal(data.read_image(tmp_path / "gray.png"), np.stack([gray] * 3))
    for deep in (np.uint16, np.float32):
        Image.fromarray(gray.astype(deep)).save(tmp_path / "deep.tif")
        with raises(OSError, match="deep.tif: .*more than 8 bits"):
            data.read_image(tmp_path / "deep.tif")

def test_labels_are_index_images(tmp_path):
    """A label is a PNG of indices, 1-bit ones are 0 and 1; a JPEG of that name, or RGB, is not."""
    label, path = raw_label([0, 1]), str(tmp_path / "label.png")
    Image.fromarray(label.astype(bool)).save(path)
    assert Image.open(path).mode == "1" and np.array_equal(data.read_label(path), label)
    for image, kind in ((Image.fromarray(label), "JPEG"), (Image.new("RGB", (9, 9)), "PNG")):
        image.save(path, format=kind)
        with raises(OSError, match=f"label.png: {kind} .*PNG of class indices"):
            data.read_label(path)

def test_files_are_found_as_other_systems_leave_them(folder_root, tmp_path):
    """Links to folders, masks in capitals or beside the images, hidden files."""
    root = shutil.copytree(folder_root, tmp_path / "data")
    (root / "JPEGImages/city").rename(tmp_path / "city")
    (root / "JPEGImages/city").symlink_to(tmp_path / "city")
    (root / "SegmentationClass/train_0.png").rename(root / "SegmentationClass/train_0.PNG")
    Image.fromarray(raw_label([0])).save(root / "JPEGImages/train_0.png")         # beside its .jpg
    (root / "JPEGImages/._train_0.jpg").write_bytes(b"of a Mac")
    plain, theirs = (build_dataset("folder", place, "train") for place in (folder_root, root))
    assert all(all(map(torch.equal, plain[i], theirs[i])) for i in range(7))

def test_index_png_has_vocs_colours(tmp_path):
    """VOC: written labels are palette PNGs in the kit's colours; black is for a background."""
    label = np.arange(256, dtype=np.uint8)[None]
    data.save_index_png(label, tmp_path / "label.png", ["background"])
    image = Image.open(tmp_path / "label.png")
    assert image.mode == "P" and np.array_equal(image, label)
    colours = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 4: (0, 0, 128), 255: (224, 224, 192)}
    assert {i: image.convert("RGB").getpixel((i, 0)) for i in colours} == colours
    assert tuple(data.palette_of(["sky"])[0]) == (128, 0, 0)

# ---- Sec. 6.1: the training view, and the order of the images
@parametrize("axis", [0, 1])
@parametrize("scale", [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0])
def test_image_and_label_stay_in_register(scale, axis):
    """Sec. 6.1: label and image agree to half a source pixel; on average, to 0.05 of the crop's."""
    for crop, side in ((33, 63), (40, 63), (70, 60)):         # the last is larger than the image
        view, offsets, flips = TrainView(Ramp(side, side, axis, (scale,)), crop, 0), [], 0
        for image, label in (view[i, 0] for i in range(40)):
            assert image[0].shape == label.shape == (crop, crop)
            reds = image[0, 0, label[0] != 255]
            flips += (flipped := bool(reds[0] > reds[-1]))
            offset = (label - image[1 - axis] / 4)[label != 255]              # in source pixels
            assert offset.abs().max() <= 0.5 + 0.5 / 4 + 1e-6
            rows = label[label != 255].int()                  # or columns
            assert abs(rows.max() - rows.min() - min(side - 1, (crop - 1) / scale)) < 1.5
            offsets.append(scale * offset.mean().item() * (-1 if flipped and axis else 1))
        assert abs(np.mean(offsets)) < 0.05 and 8 < flips < 32

def test_scales_and_padding():
    """Sec. 6.1: an image is scaled by 0.5, 0.75 ... 2.0; beyond it, label 255 and mean colour."""
    view, heights = TrainView(Ramp(20, 24), 64, 0), []
    for image, label in (view[i, 0] for i in range(140)):
        heights.append((label != 255).any(1).sum().item())
        assert (image[:, label == 255] == torch.tensor([[124], [116], [104]])).all()
        assert (image[2] != 104).equal(label != 255)                           # Ramp's blue is 200
    assert set(heights) == {10, 15, 20, 25, 30, 35, 40} and min(map(heights.count, heights)) > 7
    for i in range(60):                                       # images of 1 and 2 pixels work, too
        assert TrainView(Ramp(1 + i % 2, 2), 2 + i % 3, 0)[i, 0][1].shape == (2 + i % 3,) * 2

def test_crops_and_epochs_leave_nothing_out():
    """Sec. 6.1: a crop may lie anywhere; an epoch has each image once, less the rest of a batch."""
    labels = [TrainView(Ramp(60, 60, i % 2), 20, 0)[i, 0][1] for i in range(400)]
    assert torch.stack(labels).unique().tolist() == list(range(60))
    batches = [[i for _, i in batch] for batch in schedule(range(11), 3, 0, range(1, 10))]
    epochs = [[*a, *b, *c] for a, b, c in (batches[:3], batches[3:6], batches[6:])]
    assert all(len({*epoch} & {*range(11)}) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]

# ---- Sec. 6.1: training
def test_loss_is_the_sum_over_valid_by_all_pixels():
    """Sec. 6.1: cross entropy of valid pixels by the number of all; 0 where all is ignored."""
    logits, label = torch.randn(1, 4, 3, 5, requires_grad=True), torch.randint(4, (1, 3, 5)).byte()
    label[0, 0] = 255
    total = sum(-torch.log_softmax(logits[0, :, h, w], 0)[int(label[0, h, w])].item()
                for h in (1, 2) for w in range(5))
    assert math.isclose(train.segmentation_loss(logits, label).item(), total / 15, rel_tol=1e-5)
    loss = train.segmentation_loss(logits, torch.full_like(label, 255))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()

@parametrize("options", [{}, {"base_update": "backprop", "gradient": "full"}])
def test_optimizer_decays_weights_only(options, tiny, monkeypatch):
    """Sec. 6.1: SGD decays weights of convolutions and linear layers; biases have twice the lr."""
    monkeypatch.setattr(train, "batch_loss", lambda net, *_: sum(p.sum() for p in net.parameters()))
    net = small_net(decoder=True, **options)
    net.linear = nn.Linear(3, 2)                              # another backbone may have these
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = train.build_optimizer(net, 9.0)               # the step's lr counts, not this one
    for _ in range(2):                                        # all gradients are 1
        train.training_step(net, optimizer, random_batch(), 0.2, 1, CPU, None)
    for name, p in net.named_parameters():
        wanted, momentum, decays = before[name], 0, p.ndim == 4 or name == "linear.weight"
        for _ in range(2 if options or not name.startswith("attention.conv1") else 0):  # frozen
            momentum = 0.9 * momentum + 1 + (1e-4 * wanted if decays else 0)
            wanted = wanted - 0.2 * (2 if name.endswith("bias") else 1) * momentum
        assert torch.allclose(p, wanted, rtol=0, atol=2e-6), name

def test_recipes_are_the_paper_s():
    """Secs. 6.1, 6.2.3, 6.3: the defaults are the paper's, scenes has its own, and a flag wins."""
    paper = {"lr": 0.009, "batch_size": 16, "crop": 513, "backbone": "resnet101", "stem": "7x7",
             "weights": "imagenet", "channels": 512, "decoder": False, "gradient": "none",
             "num_bases": 64, "iterations": 3, "lam": 1.0, "alpha": 0.9, "attention": "emau",
             "base_update": "average", "base_norm": "l2"}.items()
    for name, iters, stride in (
            ("voc", 30000, 16), ("context", 15000, 16), ("context60", 15000, 16),
            ("cocostuff", 30000, 8), ("cocostuff164k", 80000, 8), ("coco2voc", 150000, 16),
            ("folder", 15000, 16)):
        args = train.parse_args(["--dataset", name])
        assert (args.iters, args.output_stride) == (iters, stride)
        assert args.split == ("trainaug" if name == "voc" else "train")
        assert vars(args).items() >= paper and args.eval_every == iters // 10
    scenes = vars(train.parse_args([]))
    keys = ("dataset", "backbone", "weights", "output_stride", "crop", "iters")
    assert [scenes[key] for key in keys] == ["scenes", "resnet18", "none", 8, 97, 360]
    assert vars(train.parse_args(["--lr", "1", "--crop", "9"])) == scenes | {"lr": 1, "crop": 9}

@parametrize("iters, momentum", [(30, 0.1), (300, 0.03), (15000, 6e-4), (90000, 1e-4)])
def test_schedules_of_a_run(iters, momentum, run_train, monkeypatch):
    """Sec. 6.1: lr (1 - i / iterations) ** 0.9; BN's momentum is 9 / iterations, 0.1 at most."""
    def step(net, optimizer, batch, lr, *_):
        lrs.append(lr)
        assert {m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {momentum}
        return torch.tensor(0.0 if len(lrs) < 6 else math.nan)                # the end
    lrs = []
    monkeypatch.setattr(train, "training_step", step)
    with raises(SystemExit):
        run_train(f"--iters {iters} --lr 0.05 --eval-every 6")
    assert lrs[:6] == pytest.approx([0.05 * (1 - i / iters) ** 0.9 for i in range(6)])

def test_course_of_a_run(run_train, tmp_path, monkeypatch):
    """A line for each fiftieth, of means; a save for each tenth; validations at output stride 8."""
    clock, losses, seen = iter(range(999)), iter(torch.arange(1.0, 201)), []      # a second a look
    monkeypatch.setattr(train, "training_step", lambda *_: next(losses))
    monkeypatch.setattr(train, "time", mock.Mock(time=clock.__next__))
    spy(monkeypatch, EMANet, "set_output_stride", lambda _, stride: seen.append(stride))
    spy(monkeypatch, train, "save_checkpoint", lambda _, path: seen.append(Path(path).stem))
    out = run_train("--iters 200 --eval-every 150 --output-stride 16")
    lines = sorted({*range(4, 201, 4), 50, 150})
    means = {i: (before + 1 + i) / 2 for before, i in zip([0, *lines], lines, strict=False)}
    assert log_of(tmp_path / "run", "loss") == means
    assert seen == [16, "last", "last", 8, 16, "model", "last", 8, 16, "model", "last"]
    assert "\niter      4/200 | loss 2.5000 | lr 8.88e-03 | 250 ms | eta 1 min\n" in out

@parametrize("flags", [
    "--base-norm layer", "--base-norm none", "--gradient full", "--base-update fixed",
    "--gradient full --base-update backprop", "--attention nonlocal", "--attention a2",
    "--attention none", "--lam 4.0", "--alpha 0.5", "--em-iterations 6", "--decoder",
    "--channels 8 --num-bases 4"])
def test_every_option_trains_and_comes_back(flags, trained, run_train, folder_root, tmp_path):
    """Secs. 5 and 6: an option changes the losses, and evaluate.py says what the run said."""
    run_train(f"--iters 3 {flags}")
    assert log_of(tmp_path / "run", "loss") != log_of(trained, "loss")
    network = torch.load(tmp_path / "run/model.pth")["network"]
    for flag, value in re.findall(r"--(?:em-)?(\S+) (\w\S*)", flags):
        assert str(network[flag.replace("-", "_")]) == value
    line = f"--ckpt {tmp_path}/run/model.pth --data-root {folder_root} --workers 0"
    assert f"eval folder val ss | {validation(tmp_path / 'run')} | 5" in command(evaluate, line)

def test_two_processes_train_one_network(pair):
    """Two processes have parts and dropout of their own, one network and log, and one beginning."""
    parts, dropouts, losses = zip(*(zip(*results["run"], strict=True) for results in pair))
    assert not any(map(torch.equal, *parts)) and not any(map(torch.equal, *dropouts))
    assert not torch.equal(dropouts[0][0], dropouts[0][2])    # two parts an iteration
    assert pair[0]["log"] == pytest.approx(np.mean(losses, 0).reshape(3, 2).mean(1))    # 2 parts
    assert torch.equal(pair[0]["weights"], pair[1]["weights"])
    assert all("processes found different checkpoints" in results["said"] for results in pair)

def test_resumed_run_continues_exactly(run_train, tmp_path, monkeypatch):
    """Killed in mid-epoch and resumed, a run ends with the very weights, optimiser and losses."""
    write_net(small_net(decoder=True), tmp_path / "init.pth", decoder=True)
    flags = (f"--iters 6 --eval-every 2 --decoder --lr 0.05 --num-bases 8 --resume --weights x "
             f"--init {tmp_path}/init.pth")
    assert f"weights: {tmp_path}/init.pth" in run_train(flags, tmp_path / "straight")
    with monkeypatch.context() as patch, raises(KeyboardInterrupt):
        spy(patch, train, "training_step", mock.Mock(side_effect=[*[0] * 5, KeyboardInterrupt]))
        run_train(flags)
    (tmp_path / "init.pth").unlink()                          # the checkpoint has it all
    assert "start: 4\nweights: last.pth\n" in run_train(f"{flags} --eval-every 6 --workers 1")
    assert log_of(tmp_path / "straight", "loss") == log_of(tmp_path / "run", "loss")
    ends = [torch.load(tmp_path / out / "last.pth") for out in ("straight", "run")]
    tensors = [[*end["model"].values(), *(state["momentum_buffer"] for state in
                end["optimizer"]["state"].values())] for end in ends]
    assert all(map(torch.equal, *tensors)) and [end["iteration"] for end in ends] == [6, 6]

def test_resume_wants_the_same_settings(trained, tiny, folder_root, tmp_path):
    """--resume refuses a changed setting by name; a new flag or place or an edited list is fine."""
    out, root = (shutil.copytree(path, tmp_path / path.name) for path in (trained, folder_root))
    line, before = f"{TRAIN} --data-root {root} --out {out} --iters 3 --resume", content(out)
    fail(train, f"{line} --lr 0.1", str(out), "has lr 0.009, not 0.1", "--out")
    assert command(train, line) == f"the run in {out} is complete\n" and content(out) == before
    last = torch.load(out / "last.pth") | {"iteration": 2}
    del last["args"]["lam"]
    torch.save(last, out / "last.pth")
    (root / "ImageSets/Segmentation/train.txt").write_text("train_0\ntrain_2\n")
    assert "images: 2, for" in command(train, f"{line} --lam 2 --workers 1")

@parametrize("what", ["loss", "weight"])
def test_run_stops_where_it_is_not_finite(what, run_train, tmp_path, monkeypatch):
    """A loss or weight that is not finite stops the run at a log line, and none is saved."""
    def broken(net, *_):
        broke = next(calls) == 5
        net.classifier.bias.data += math.inf if broke else 0
        return torch.tensor(math.nan if broke and what == "loss" else 1.0)
    calls = iter(range(1, 9))
    monkeypatch.setattr(train, "training_step", broken)
    with raises(SystemExit, match=r"error: iteration 5: .*not finite.*--lr"):
        run_train("--iters 8 --eval-every 2")
    model, last = (torch.load(tmp_path / f"run/{name}.pth") for name in ("model", "last"))
    assert all(v.isfinite().all() for v in [*model["model"].values(), *last["model"].values()])
    assert last["iteration"] == 4

@parametrize("classes", [FOLDER_CLASSES, FOLDER_CLASSES[::-1]])
def test_init_from_another_network(classes, tmp_path, tiny):
    """--init takes the whole network, but for a classifier whose classes have other names."""
    source, net = small_net(seed=1), small_net()
    write_net(source, tmp_path / "model.pth")
    own = net.classifier.weight.clone() if classes != FOLDER_CLASSES else source.classifier.weight
    train.load_init(net, tmp_path / "model.pth", classes)
    assert torch.equal(net.classifier.weight, own)
    assert torch.equal(net.reduce[0].weight, source.reduce[0].weight)
    with raises(OSError, match="model.pth: another network"):
        train.load_init(small_net(channels=8), tmp_path / "model.pth", classes)

# ---- Sec. 6.1: evaluation
def test_metric_by_hand():
    """mIoU: one matrix over all labelled pixels, rows are labels; an absent class has no part."""
    label = torch.tensor([[0, 0, 0, 0, 1], [1, 2, 2, 255, 255]]).byte()
    prediction = torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 2, 0]])
    confusion = evaluate.confusion_matrix(prediction, label, 4)
    assert confusion.tolist() == [[2, 2, 0, 0], [0, 1, 1, 0], [0, 0, 2, 0], [0, 0, 0, 0]]
    miou, pixacc, macc, iou = evaluate.scores(confusion).values()
    assert (miou, pixacc, macc) == pytest.approx((17 / 36, 5 / 8, 2 / 3))
    assert iou == [1 / 2, 1 / 4, 2 / 3, None]
    miou, _, macc, _ = evaluate.scores(torch.tensor([[6, 0, 2], [1, 1, 0], [0, 0, 0]])).values()
    assert (miou, macc) == pytest.approx(((6 / 9 + 1 / 2) / 3, 5 / 8))           # class 2: IoU 0

@parametrize("size, stride", [((41, 57), 8), ((38, 30), 8), ((38, 45), 16)])
def test_prediction_follows_the_protocol(size, stride):
    """Sec. 6.1: whole images, normalised, padded with 0 to S k + 1; six scales and mirrors."""
    net, image = small_net(output_stride=stride).eval(), torch.from_numpy(picture(size))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    whole = ((image / 255 - mean) / std).permute(2, 0, 1)[None]
    resize, logits = partial(F.interpolate, mode="bilinear", align_corners=True), {}
    for scale, mirror in ((s, m) for s in (0.5, 0.75, 1, 1.25, 1.5, 1.75) for m in ((), (3,))):
        h, w = int(scale * size[0]), int(scale * size[1])
        view = torch.zeros(1, 3, *(next(n for n in range(side, side + stride) if n % stride == 1)
                                   for side in (h, w)))
        view[:, :, :h, :w] = resize(whole.flip(mirror), (h, w))
        logits[scale, mirror] = resize(net(view)[:, :, :h, :w], size).flip(mirror)[0]
    assert evaluate.predict(net, torch.zeros(3, 1, 9).byte(), ms_flip=True).shape == (4, 1, 9)
    predict = partial(evaluate.predict, net, image.permute(2, 0, 1))
    assert torch.allclose(predict(), logits[1, ()], atol=1e-4)
    assert torch.allclose(predict(ms_flip=True), sum(logits.values()), rtol=1e-4, atol=1e-3)

@parametrize("flags, mode, views, ends", [
    ("", "ss", 1, {1, 9}), ("--ms-flip", "ms-flip", 6, {1, 9}), ("--output-str 16", "ss", 1, {1})])
def test_saved_pngs_hold_the_scored_predictions(
        flags, mode, views, ends, trained, tiny, folder_root, tmp_path, monkeypatch):
    """--save-png writes class indices of the images' sizes, which give the printed scores."""
    sides, counts, root = [], np.zeros((4, 4)), folder_root / "SegmentationClass"
    spy(monkeypatch, EMANet, "forward", lambda net, x: sides.extend(x.shape[2:]))
    line = f"--ckpt {trained}/model.pth --data-root {folder_root} --save-png {tmp_path}/png {flags}"
    out = command(evaluate, line)
    assert len(sides) == 10 * views and {side % 16 for side in sides} == ends
    for name in build_dataset("folder", folder_root).ids:
        label, png = (np.array(Image.open(f / f"{name}.png")) for f in (root, tmp_path / "png"))
        np.add.at(counts, (label[label != 255], png[label != 255]), 1)
    hits = counts.diagonal()
    iou = 100 * hits / (counts.sum(0) + counts.sum(1) - hits)
    pixacc, macc = 100 * hits.sum() / counts.sum(), 100 * (hits / counts.sum(1)).mean()
    assert all(f"  {c:20s} {value:6.2f}\n" in out for c, value in zip(FOLDER_CLASSES, iou))
    assert (f"\neval folder val {mode} | mIoU {iou.mean():.2f} | pixAcc {pixacc:.2f} | mAcc "
            f"{macc:.2f} | 5 images | ") in out and re.search(r"\| \d+ s\n$", out)

# ---- Sec. 6.5: pictures
def test_maps_are_the_responsibilities_of_every_round():
    """Fig. 5: (K, T, H, W), the unit's own rounds on the padded image, enlarged."""
    net = small_net(output_stride=16).eval()
    image, mu = torch.from_numpy(picture((41, 60))).permute(2, 0, 1), net.attention.mu[0].T.numpy()
    padded = F.pad(data.normalise(image[None]), (0, 5, 0, 8))                 # 49 x 65 pixels
    features, z = net.reduce(net.backbone(padded)), visualize.responsibilities(net, image)
    for t, (wanted, _) in enumerate(slow_em(net.attention, features[0], mu, 3)):
        wanted = torch.from_numpy(wanted.T.reshape(8, 4, 5)[:, :3, :4]).float()
        assert torch.allclose(z[:, t, ::16, ::16], wanted, atol=1e-4)
    assert z.shape == (8, 3, 41, 60)

def test_pictures_of_a_data_set(trained, tiny, folder_root, tmp_path, monkeypatch):
    """Fig. 5: a picture for each of --count images, with their labels and the bases asked for."""
    line, given = f"--ckpt {trained}/model.pth --data-root {folder_root}", []
    spy(monkeypatch, visualize, "picture", lambda *args: given.append(args))
    out = command(visualize, f"{line} --count 2 --bases 7 3 --out {tmp_path}/new/pictures")
    assert f"wrote {tmp_path}/new/pictures/city/val_1.png; bases, from top to bottom: [7, 3]" in out
    net, (image, label, prediction, maps, _) = load_checkpoint(trained / "model.pth"), given[1]
    assert all(map(torch.equal, (image, label), build_dataset("folder", folder_root)[1]))
    assert torch.equal(prediction, evaluate.predict(net, image).argmax(0)) and len(given) == 2
    z = visualize.responsibilities(net, image)
    assert torch.allclose(maps, z[[7, 3]], atol=1e-6)
    pixels = (z[:, -1] == z[:, -1].max(0)[0]).sum((1, 2))     # the four fullest, by default
    assert str(sorted(range(64), key=lambda k: -pixels[k])[:4]) in command(
        visualize, f"{line} --count 2 --out {tmp_path}/other").splitlines()[1]
    fail(visualize, f"{line} --bases 64", "--bases", "0 to 63")

def test_pictures_of_own_images(tiny, tmp_path, monkeypatch):
    """--image: a folder's images, turned as EXIF says and shrunk; pictures/ may be rewritten."""
    Image.fromarray(picture((600, 900))).save(made(tmp_path / "own/turned.png"), exif=TURNED)
    Image.fromarray(picture((20, 30))).save(tmp_path / "own/turned.JPG")
    write_net(small_net(attention="none"), tmp_path / "own/model.pth", attention="none")
    line, given = f"--ckpt {tmp_path}/own/model.pth --image {tmp_path}/own", []
    spy(monkeypatch, visualize, "picture", lambda *args: given.append(args))
    names = [re.findall(r"/own/pictures/(\S+);", command(visualize, line)) for _ in range(2)]
    assert names == [["turned.JPG.png", "turned.png.png"]] * 2
    wanted = Image.fromarray(np.rot90(picture((600, 900)), -1).copy())
    wanted.thumbnail((513, 513))
    assert np.array_equal(given[1][0].permute(1, 2, 0), wanted) and (given[1][1] == 255).all()

# ---- Command lines, and bad input: one line that says what, where, and what to do
def test_scripts_work_together(folder_root, tmp_path):
    """torchrun: two processes train; evaluate.py repeats the last validation, by any number."""
    def printed(line):
        words = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2 {line}"
        return subprocess.check_output(words.split(), cwd=tmp_path, text=True, timeout=120)
    out = printed(f"{train.__file__} {TRAIN} --iters 2 --data-root {folder_root}")
    assert "machine: 2 x cpu" in out and out.count("iter      2/2") == 1
    line = f"--ckpt out/folder/model.pth --data-root {folder_root}"
    last = f"eval folder val ss | {validation(tmp_path / 'out/folder')} | 5 images"
    assert printed(f"{evaluate.__file__} {line} --save-png png").count(last) == 1
    assert len([*(tmp_path / "png").rglob("*.png")]) == 5
    assert last in command(evaluate, line.replace("out/", f"{tmp_path}/out/"))

@parametrize("script, flag", [(evaluate, "--save-png"), (visualize, "--out"), (train, "--out")])
def test_results_never_land_on_existing_files(script, flag, trained, tiny, folder_root, tmp_path):
    """A folder for results that has something in it is refused and left as it is."""
    root = shutil.copytree(folder_root, tmp_path / "data")
    (tmp_path / "link").symlink_to(root / "SegmentationClass")
    line = f"{TRAIN} --iters 1" if script is train else f"--ckpt {trained}/model.pth"
    for place in (root, root / "SegmentationClass", tmp_path / "link"):
        fail(script, f"{line} --data-root {root} {flag} {place}", f"{place} is not empty: ")
    assert [*content(root).values()] == [*content(folder_root).values()]

@parametrize("flags, status, words", [
    ("--batch-size 0", 2, ["--batch-size"]), ("--iters 0", 2, ["--iters"]),
    ("--stem deep", 2, ["--backbone"]), ("--em-iterations 0", 2, ["--em-iterations"]),
    ("--dataset coco", 2, ["cocostuff"]), ("--base-update backprop", 2, ["--gradient full"]),
    ("--attention ema", 2, ["a2"]), ("--split x", 1, ["x.txt"]), ("--device cuda", 1, ["0 GPUs"]),
    ("--batch-size 8", 1, ["--batch-size 8", "7 images"]), ("--init no.pth", 1, ["no.pth"]),
    ("--batch-size 3 --accumulate 2", 1, ["--batch-size 3", "--accumulate 2"]),
    (f"--weights {__file__}", 1, ["test_ema.py: "]), ("--weights no.pth", 1, ["no.pth"]),
    ("--weights imagenet", 1, ["resnet18 IMAGENET1K_V1", "invalid hash", "--weights FILE"]),
    ("--dataset voc", 1, ["trainaug.txt", "README"]), ("--data-root no", 1, ["--data-root"])])
def test_settings_that_cannot_be(flags, status, words, folder_root, tmp_path, monkeypatch):
    """A setting that cannot work is named in one line and never replaced; nothing is written."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "urlopen", lambda _, get=torch.hub.urlopen: get(
        f"file://{folder_root}/classes.txt"))                 # a download that is damaged
    line = f"{TRAIN} --iters 1 --data-root {folder_root} --out {tmp_path}/out {flags}"
    assert fail(train, line, *words) == status and not list((tmp_path / "out").glob("*"))

def test_checkpoint_and_data_that_do_not_fit(trained, tiny, folder_root, tmp_path):
    """A network is not scored on data of other classes, or of the same in another order."""
    root = shutil.copytree(folder_root, tmp_path / "data")
    fail(evaluate, f"--ckpt {trained}/model.pth --dataset scenes", "other classes than scenes")
    (root / "classes.txt").write_text("\n".join(FOLDER_CLASSES[::-1]))
    fail(evaluate, f"--ckpt {trained}/model.pth --data-root {root}", "another order")

def test_images_without_labels(trained, tiny, folder_root, tmp_path):
    """A list without masks gets predictions but no scores, and no run validates on it."""
    root = shutil.copytree(folder_root, tmp_path / "data")
    assert [mask.unlink() for mask in root.glob("SegmentationClass/**/val*.png")] == 5 * [None]
    out = command(evaluate, f"--ckpt {trained}/model.pth --data-root {root} --save-png {root}/new")
    assert out.endswith("ss | no pixel has a label\n") and len([*root.glob("new/**/*.png")]) == 5
    fail(train, f"{TRAIN} --data-root {root} --out {root}/run", "folder val has no labels")

# ---- What the tests are made with: units and networks
CPU = torch.device("cpu")
class TinyBackbone(nn.Sequential):
    """Stands in for the ResNet where only the rest matters: one convolution, of stride 8."""
    out_channels, weights_origin = 8, "tiny"
    def __init__(self, name, stem, weights, output_stride):
        super().__init__(nn.Conv2d(3, 8, 9, stride=8, padding=4), nn.ReLU())
        self.output_stride = output_stride
    def set_output_stride(self, output_stride):
        self.output_stride = output_stride

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

def arguments(num_classes=4, attention="emau", **options):
    small = {"backbone": "resnet18", "channels": 16, "attention": attention}
    bases = {"num_bases": 8} if attention in ("emau", "a2") else {}
    return {"num_classes": num_classes} | small | bases | options

def small_net(*num_classes, seed=0, **options):
    torch.manual_seed(seed)
    return EMANet(**arguments(*num_classes, **options))

def write_net(net, path, **options):
    torch.save({"model": net.state_dict(), "network": arguments(**options), "dataset": "folder",
                "classes": FOLDER_CLASSES}, path)

# ---- What the tests are made with: data sets, as small as can be and in the real formats
TURNED = Image.Exif()
TURNED[0x0112] = 6                                            # "turn by 90 degrees"
def picture(size, seed=0):                                    # a soft random image, uint8 (H, W, 3)
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return np.array(Image.fromarray(small).resize(size[::-1], Image.BILINEAR))

def made(path):                                               # the path, when its folder is made
    path.parent.mkdir(parents=True, exist_ok=True)
    return path

@pytest.fixture(scope="session")
def folder_root(tmp_path_factory):
    """A user's own folder: 7 images to train on, 5 to validate, of several sizes and formats."""
    root = tmp_path_factory.mktemp("folder")
    (root / "classes.txt").write_text("road\nhouse boat \ntree\nsky\n")
    for split, count in {"train": 7, "val": 5}.items():
        names = [f"{split}_{i}" for i in range(count)]
        names[1], names[4] = f"city/{split}_1", f"{split} 4"
        path = made(root / f"ImageSets/Segmentation/{split}.txt")
        path.write_text("\n".join(names), encoding="utf-8-sig")
        for i, name in enumerate(names):
            size = [(41, 56), (60, 48), (57, 41), (33, 64)][i % 4]
            path = made(root / f"JPEGImages/{name}{('.jpg', '.png', '.jpeg', '.JPG')[i % 4]}")
            Image.fromarray(picture(size, i)).save(path)
            label = np.random.default_rng(i).choice([0, 1, 2, 3, 255], size).astype(np.uint8)
            Image.fromarray(label).save(made(root / f"SegmentationClass/{name}.png"))
    return root

SIZE = (11, 17)
VOC = "9ce439bcfb44c304e49a0fe1ae398f69"     # of the names that torchvision has for VOC's classes
IDS = ("2007_000032", "2008_000008", "2009_000001", "2010_000003")      # two to train on
LAYOUTS = {  # where a data set has its images, labels and lists
    "voc": ("VOCdevkit/VOC2012/JPEGImages", "VOCdevkit/VOC2012/SegmentationClass",
            "VOCdevkit/VOC2012/ImageSets/Segmentation"),
    "context": ("VOCdevkit/VOC2010/JPEGImages", "trainval", "VOCdevkit/VOC2010/ImageSets/Main"),
    "cocostuff": ("images", "annotations", "imageLists"),
    "cocostuff164k": ("images/{}2017", "annotations/{}2017", "unused")}
LAYOUTS |= {"context60": LAYOUTS["context"], "coco2voc": LAYOUTS["cocostuff164k"]}
def write_release(name, root, raw):
    """A data set as its archives unpack; the label of image i is `raw` (H, W) rolled on by i."""
    images, labels, lists = LAYOUTS[name]
    for i, image in enumerate(IDS):
        split, label = "train" if i < 2 else "val", np.roll(raw, i)
        path = made(root / images.format(split) / f"{image}.jpg")
        Image.fromarray(picture(raw.shape, i)).save(path)
        path = made(root / labels.format(split) / image)
        if name.startswith("context"):
            scipy.io.savemat(f"{path}.mat", {"LabelMap": label.astype(np.uint16)})
        elif name == "cocostuff":
            scipy.io.savemat(f"{path}.mat", {"S": label, "names": np.zeros((182, 1))})
        else:
            label = Image.fromarray(label)
            if name == "voc":                                 # the colours are not their indices
                label.putpalette(np.random.default_rng(0).bytes(768))
            label.save(f"{path}.png")
            shutil.copy(f"{path}.png", f"{path}_labelTrainIds.png")           # another project's
    for split, ids in {"train": IDS[:2], "val": IDS[2:], "test": IDS[2:], "trainval": IDS}.items():
        made(root / lists / f"{split}.txt").write_text("\n".join(ids))
    return root

def raw_label(values):
    """A raw label map that holds every one of the values, uint8 or uint16."""
    return np.resize(np.array(values, np.uint16 if max(values) > 255 else np.uint8), SIZE)

def md5(text):
    return hashlib.md5(text.encode()).hexdigest()

class Ramp:
    """An image whose red is 4 * column and green 4 * row; its label is the row or the column."""

    def __init__(self, height, width, axis=0, scales=data.SegmentationDataset.scales):
        rows, columns = np.mgrid[:height, :width].astype(np.uint8)
        self.image = torch.from_numpy(np.stack([4 * columns, 4 * rows, 200 + 0 * rows]))
        self.label, self.scales = torch.from_numpy((rows, columns)[axis]), scales

    def __getitem__(self, i):
        return self.image, self.label

def random_batch():
    """Six images and labels as the loader gives them; one has more ignored pixels."""
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (6, 33, 33)).byte()
    labels[0, :20] = 255
    return torch.randint(0, 256, (6, 3, 33, 33)).byte(), labels

# ---- What the tests are made with: scripts and processes
TRAIN = ("--dataset folder --backbone resnet18 --weights none --channels 16 --crop 33 "
         "--batch-size 2 --workers 0 --amp off")
def command(script, line):
    """What script.main prints, called with the words of the line."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
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
    with mock.patch("ema.DilatedResNet", TinyBackbone):
        command(train, f"{TRAIN} --data-root {folder_root} --iters 3 --out {out}")
    return out

def fail(script, line, *words):
    """The script must end with one line that has all the words. Returns the exit status."""
    with contextlib.redirect_stderr(io.StringIO()) as said, raises(SystemExit) as end:
        evaluate.run(partial(script.main, line.split()))
    text, status = end.value.code, 1
    if text == 2:
        (usage, text), status = said.getvalue().splitlines(), 2
        assert usage.startswith("usage: ")
    assert "error: " in text and "\n" not in text and all(word in text for word in words), text
    return status

def spy(monkeypatch, owner, name, look):
    """Calls look with the arguments of owner.name before each call of it."""
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **options: (
        look(*args, **options), function(*args, **options))[1])

def content(folder):
    """{path: bytes} of all files in a folder."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

def log_of(out, key):
    """{iteration: value} of log.jsonl's lines with the key; the last of an iteration counts."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {record["iteration"]: record[key] for record in records if key in record}

def validation(out):
    """The last validation of a run in the words of evaluate.py's last line."""
    miou, pixacc, macc, iou = (
        [*log_of(out, f"val_{key}").values()][-1] for key in ("miou", "pixacc", "macc", "iou"))
    some = f" ({len(iou) - iou.count(None)} of {len(iou)} classes occur)" if None in iou else ""
    return f"mIoU {100 * miou:.2f}{some} | pixAcc {100 * pixacc:.2f} | mAcc {100 * macc:.2f}"

@pytest.fixture(scope="session")
def pair(folder_root, tmp_path_factory):
    """The results of two processes, as under torchrun."""
    folder = tmp_path_factory.mktemp("pair")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(in_a_group, (folder, folder_root, port), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]

def in_a_group(rank, folder, root, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ema.DilatedResNet = TinyBackbone                          # this process ends afterwards
    run, nets, batch_loss = [], [], train.batch_loss
    def watched(model, batch, *rest):
        dropout, loss = torch.rand(4), batch_loss(model, batch, *rest)
        run.append((batch[0], dropout, loss.item()))
        nets.append(model)
        return loss
    line = (f"{TRAIN} --data-root {root} --iters 3 --lr 0.05 --batch-size 4 --accumulate 2 "
            f"--out {folder}/run")
    with mock.patch("train.batch_loss", watched):
        command(train, line)                                  # the two form a group, and stay one
    train.open_run, train.init_process = lambda _: {"iteration": rank}, lambda _: CPU
    with raises(SystemExit) as end:
        command(train, line)
    torch.save({"steps": [step_with(i, slice(rank, None, 2)) for i in range(len(OPTIONS))],
                "weights": torch.cat([p.detach().flatten() for p in nets[0].parameters()]),
                "log": [*log_of(folder / "run", "loss").values()], "run": run,
                "said": end.value.code}, folder / f"{rank}.pt")
    dist.barrier()                                            # as in evaluate.run
    dist.destroy_process_group()

OPTIONS = [{}, {"base_norm": "none"}, {"gradient": "full", "base_update": "fixed"},
           {"gradient": "full", "base_update": "backprop"}, {"attention": "nonlocal"},
           {"attention": "a2"}]
def step_with(number, part=slice(None)):
    """Gradients and bases after two passes over this process's part of a batch; BN in eval mode."""
    net = small_net(**OPTIONS[number]).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().weight.data.fill_(1)                # Non-local's begins with 0
    model = nn.parallel.DistributedDataParallel(net) if dist.is_initialized() else net
    for _ in range(2):                  # DDP finds out about unused parameters in the second step
        net.zero_grad()
        train.batch_loss(model, [x[part] for x in random_batch()], CPU, None).backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    return found | {name: b for name, b in net.named_buffers() if name == "attention.mu"}
