"""A dilated ResNet: torchvision's network, its last strides replaced by dilation.

    net = DilatedResNet("resnet50", weights="imagenet", output_stride=8)
    net(torch.randn(1, 3, 513, 513)).shape  # (1, 2048, 65, 65)

Shapes: B images, H x W pixels, C channels, S the output stride.
"""
from pathlib import Path

import torch
from torch import nn
from torchvision import models

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


class UserError(Exception):
    """A mistake the user can correct, in one line: what, where, what to do. Scripts print it without a traceback."""

    def __init__(self, message):
        # DataLoader raises a worker's error again with the worker's traceback as its message: keep the end of that.
        super().__init__(str(message).split("UserError: ")[-1].strip())


class DilatedResNet(nn.Module):
    """ResNet-18 ... 152 without its classifier. Parameter names are torchvision's (conv1, bn1, layer1 ... layer4).

    in:  images (B, 3, H, W), normalised
    out: features (B, C, ceil(H / S), ceil(W / S)), C = `out_channels`: 512 for ResNet-18/34, else 2048

    stem: "7x7" (torchvision) or "deep": three 3x3 convolutions 64-64-128, as in the released EMANet.
    weights: "imagenet" (torchvision IMAGENET1K_V1), "imagenet-v2", a file, or "none" (random).
    layers: 4, or 2 for a small network that ends after layer2, at stride 8, with a quarter of the channels.
    """

    def __init__(self, name="resnet101", stem="7x7", weights="none", output_stride=8, layers=4):
        super().__init__()
        if name not in RESNETS or stem not in ("7x7", "deep"):
            raise ValueError(f"backbone {name!r}, stem {stem!r}: choose one of {RESNETS}, and 7x7 or deep")
        net = getattr(models, name)()
        if stem == "deep":
            deepen_stem(net)
        for part in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            setattr(self, part, getattr(net, part))
        self.out_channels = net.fc.in_features
        state, self.weights_origin = read_weights(name, stem, weights)
        if state is not None:
            try:
                self.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})
            except (RuntimeError, AttributeError) as error:
                raise UserError(f"{self.weights_origin}: does not fit {name} with the {stem} stem, give the --backbone "
                                f"and --stem it is for ({brief(error)})") from None
        if layers == 2:
            self.layer3 = self.layer4 = nn.Identity()
            self.out_channels //= 4
        self.set_output_stride(output_stride)

    def forward(self, x):  # (B, 3, H, W); shapes below for layers=4
        x = self.relu(self.bn1(self.conv1(x)))  # (B, 64 or 128, H/2, W/2)  sides are rounded up
        x = self.layer1(self.maxpool(x))  # (B, C/8, H/4, W/4)
        x = self.layer2(x)  # (B, C/4, H/8, W/8)
        x = self.layer3(x)  # (B, C/2, H/min(S, 16), W/min(S, 16))
        return self.layer4(x)  # (B, C, H/S, W/S)

    def set_output_stride(self, output_stride):
        """Sets strides and dilations for output stride 8, 16 or 32. They hold no weights, so a trained network may be
        changed: train at 16, evaluate at 8 (Sec. 6.1)."""
        small = isinstance(self.layer3, nn.Identity)             # layers=2: it ends at stride 8
        if output_stride not in ((8,) if small else (8, 16, 32)):
            raise UserError(f"output stride {output_stride}: it must be 8" + ("" if small else ", 16 or 32"))
        if small:
            return
        # layer3's stride and rate, layer4's stride and the rates of its blocks. The multi-grid (Sec. 6.1) multiplies
        # layer4's rate 32 / S by 1, 2, 4; but as in torchvision a layer's first block keeps the rate of the layer
        # before: at S = 8 the blocks have 2, 8, 16 instead of 4, 8, 16.
        stride3, rate3, stride4, rates4 = {
            8: (1, 2, 1, (2, 8, 16)),
            16: (2, 1, 1, (1, 4, 8)),
            32: (2, 1, 2, (1, 2, 4))}[output_stride]
        set_rates(self.layer3, stride3, (1,) + (rate3,) * (len(self.layer3) - 1))
        set_rates(self.layer4, stride4, rates4[:len(self.layer4)])


def set_rates(layer, stride, rates):
    """Gives the 3x3 convolutions of a layer's blocks their dilation rates, and the first block its stride."""
    for block, rate in zip(layer, rates, strict=True):
        for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)):
            conv.dilation = conv.padding = (rate, rate)            # torchvision refuses this for ResNet-18/34's blocks
    first = layer[0]
    strided = first.conv2 if hasattr(first, "conv3") else first.conv1        # Bottleneck's only 3x3, BasicBlock's first
    strided.stride = first.downsample[0].stride = (stride, stride)


def deepen_stem(net):
    """Replaces the 7x7 convolution by three 3x3, 64-64-128, and widens layer1's entrance to match."""
    net.conv1 = nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
        nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
        nn.Conv2d(64, 128, 3, padding=1, bias=False))
    net.bn1 = nn.BatchNorm2d(128)
    block = net.layer1[0]
    old, out = block.conv1, net.layer2[0].conv1.in_channels
    block.conv1 = nn.Conv2d(128, old.out_channels, old.kernel_size, padding=old.padding, bias=False)
    block.downsample = nn.Sequential(nn.Conv2d(128, out, 1, bias=False), nn.BatchNorm2d(out))
    for conv in (net.conv1[0], net.conv1[3], net.conv1[6], block.conv1, block.downsample[0]):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")      # as torchvision does elsewhere


# ---- Weights (skip at first reading)
def read_weights(name, stem, weights):
    """The backbone's weights: a state dict, or None for random ones, and where they come from, for the user to see."""
    if weights == "none":
        return None, "random (no ImageNet weights)"
    if weights in ("imagenet", "imagenet-v2"):
        if stem == "deep":
            raise UserError("torchvision has no ImageNet weights for the deep stem: give PyTorch-Encoding's file, e.g. "
                            "--weights resnet101-2a57e44d.pth, or --stem 7x7, or --weights none to start from scratch")
        version = {"imagenet": "IMAGENET1K_V1", "imagenet-v2": "IMAGENET1K_V2"}[weights]
        try:
            state = models.get_model_weights(name)[version].get_state_dict(progress=False, check_hash=True)
            return state, f"torchvision {name} {version}"
        except Exception as error:  # noqa: BLE001 - no such weights, no network, or a download damaged on its way
            raise UserError(f"cannot get {version} of {name} ({brief(error)}): fetch it elsewhere and give "
                            "--weights FILE, or --weights none to start from scratch") from None
    path = Path(weights)
    if not path.is_file():
        raise UserError(f"no weights at {path}: --weights takes imagenet, imagenet-v2, none or a file")
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # noqa: BLE001 - torch raises many kinds for a file that is no weights file
        raise UserError(f"{path}: not a file of weights that can be loaded safely: {brief(error)}") from None
    return state, str(path)


def brief(error):
    """The beginning of a library's message, which may run over many lines."""
    if "weights_only" in str(error):                 # torch's message advises to switch the protection off
        return "it holds other things than tensors and plain values"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2])[:200]
