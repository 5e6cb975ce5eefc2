"""A dilated ResNet: torchvision's network, its last strides replaced by dilation.

    net = DilatedResNet("resnet50", weights="imagenet", output_stride=8)
    net(torch.randn(1, 3, 513, 513)).shape  # (1, 2048, 65, 65)

Shapes: B images, H x W pixels, C channels, S the output stride.
"""
import zipfile

import torch
from torch import nn
from torchvision import models

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


class DilatedResNet(nn.Module):
    """ResNet-18 ... 152 without its classifier. Parameter names are torchvision's.

    in:  images (B, 3, H, W), normalised
    out: features (B, C, ceil(H / S), ceil(W / S)); C is 512 for ResNet-18 and 34, else 2048

    stem: "7x7" (torchvision) or "deep", three 3x3 convolutions as in the released EMANet.
    weights: "imagenet" (torchvision's IMAGENET1K_V1), a file, or "none" (random).

    Another backbone can take this one's place in EMANet. It needs the same arguments and feature
    sizes, the attributes `out_channels` (C), `output_stride` and `weights_origin` (a text for the
    log), and the method `set_output_stride`.
    """

    def __init__(self, name="resnet101", stem="7x7", weights="none", output_stride=8):
        super().__init__()
        net = models.get_model(name)
        if stem == "deep":
            deepen_stem(net)
        for part in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            setattr(self, part, getattr(net, part))
        self.out_channels = net.fc.in_features
        self.weights_origin = "random (no ImageNet weights)"
        if weights != "none":
            self.load_weights(name, weights)
        self.set_output_stride(output_stride)

    def forward(self, x):  # (B, 3, H, W)
        x = self.relu(self.bn1(self.conv1(x)))  # (B, 64 or 128, H/2, W/2)  sides are rounded up
        x = self.layer1(self.maxpool(x))  # (B, C/8, H/4, W/4)
        x = self.layer2(x)  # (B, C/4, H/8, W/8)
        x = self.layer3(x)  # (B, C/2, H/S, W/S)
        return self.layer4(x)  # (B, C, H/S, W/S)

    def set_output_stride(self, output_stride):
        """Sets strides and dilation rates for output stride 8 or 16. They hold no weights, so a
        trained network may be changed: train at 16, evaluate at 8 (Sec. 6.1)."""
        if output_stride not in (8, 16):
            raise ValueError(f"output stride {output_stride}: it must be 8 or 16")
        self.output_stride = output_stride
        # layer4's rates are 4 (at stride 16: 2) times the multi-grid 1, 2, 4 (Sec. 6.1), but a
        # layer's first block keeps the previous layer's rate, as in torchvision: 2, 8, 16.
        blocks = len(self.layer3)
        if output_stride == 8:
            set_rates(self.layer3, [1] + [2] * (blocks - 1), stride=1)
            set_rates(self.layer4, [2, 8, 16], stride=1)
        else:
            set_rates(self.layer3, [1] * blocks, stride=2)
            set_rates(self.layer4, [1, 4, 8], stride=1)

    def load_weights(self, name, weights):
        """Loads ImageNet weights. OSError if they are unavailable, or another network's."""
        if weights == "imagenet":
            self.weights_origin = f"torchvision {name} IMAGENET1K_V1"
            try:
                pretrained = models.get_model_weights(name).IMAGENET1K_V1
                state = pretrained.get_state_dict(progress=False, check_hash=True)
            except (OSError, RuntimeError) as error:        # no network, or a damaged download
                raise OSError(f"cannot download {self.weights_origin} ({error}): "
                              "give --weights FILE") from error
        else:
            self.weights_origin = weights
            state = read_checkpoint(weights)
        try:
            self.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
        except RuntimeError as error:
            raise OSError(
                f"{self.weights_origin}: not for --backbone {name} with this --stem") from error


def set_rates(layer, rates, stride):
    """Sets the dilation rate of each block's 3x3 convolutions and the stride of the first block."""
    for block, rate in zip(layer, rates):                   # ResNet-18 has only two blocks
        for module in block.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.dilation = module.padding = (rate, rate)
    first = layer[0]
    strided = first.conv2 if hasattr(first, "conv3") else first.conv1      # Bottleneck, BasicBlock
    strided.stride = (stride, stride)
    first.downsample[0].stride = (stride, stride)


def deepen_stem(net):
    """Replaces the 7x7 convolution by three 3x3, 64-64-128, in ResNet-50, 101 and 152."""
    net.conv1 = nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1, bias=False))
    net.bn1 = nn.BatchNorm2d(128)
    first = net.layer1[0]                                   # its input now has 128 channels, not 64
    first.conv1 = nn.Conv2d(128, 64, 1, bias=False)
    first.downsample[0] = nn.Conv2d(128, 256, 1, bias=False)


def read_checkpoint(path):
    """The dict that torch.save wrote to a file: weights, or a checkpoint. Runs no code in it.
    OSError if there is no such file, or it is damaged."""
    try:
        # torch writes checksums but never compares them.
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("wrong checksum")
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (FileNotFoundError, PermissionError):            # their messages name the file
        raise
    except Exception as error:                              # damaged files raise many kinds
        raise OSError(f"{path}: damaged, or not a weights file: get it again") from error
