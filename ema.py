"""Expectation-maximization attention (Li et al., ICCV 2019): EMAU and its bases, and the network around it, EMANet.

    net = EMANet(num_classes=21, backbone="resnet50")
    net = load_checkpoint("model.pth")                 # this project's files, or those of the released code
    logits = net(images)                               # (B, 3, H, W) normalised -> (B, L, H, W)

Shapes: B images, C channels, N = H * W pixels of one feature map, K bases, L classes. In the maths x (B, N, C) are
the pixels, mu (B, C, K) the bases, z (B, N, K) the responsibilities. Equation and section numbers are the paper's.
"""
import math
import os
import re
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from backbone import DilatedResNet, UserError, first_line


# ---------------------------------------------------------------------------------------------------------------------
# The attention unit
class EMAU(nn.Module):
    """Expectation-maximization attention unit (Sec. 5, Fig. 2): 1x1 conv, EM on every image, ReLU, 1x1 conv + BN, sum.

    in:  features (B, C, H, W)
    out: features (B, C, H, W)

    lam is lambda of Eq. 12, the inverse temperature; alpha the momentum of Eq. 15. `mu` (1, C, K) are the initial
    bases mu^(0): in training mode they follow the batches as BN's statistics do, in eval mode they keep fixed.
    """

    def __init__(self, channels, num_bases=64, iterations=3, lam=1.0, alpha=0.9):
        super().__init__()
        self.iterations, self.lam, self.alpha = iterations, lam, alpha
        self.conv1 = nn.Conv2d(channels, channels, 1)         # no ReLU after it: inner products need both signs (5.1)
        self.conv2 = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.register_buffer("mu", l2_norm(torch.randn(1, channels, num_bases) * math.sqrt(2 / num_bases)))
        for conv in (self.conv1, self.conv2[0]):              # the released init. conv1's is the temperature: with
            nn.init.normal_(conv.weight, std=math.sqrt(2 / channels))      # torch's default, x is short and z uniform
        # EM runs without gradient, so conv1 gets none and never changes. Saying so here, before any wrapping, is what
        # lets DistributedDataParallel work: it waits for a gradient from every parameter that asks for one.
        self.conv1.requires_grad_(False)

    def forward(self, x):                                                      # (B, C, H, W)
        residual = x
        x = self.conv1(x).flatten(2).transpose(1, 2)                           # (B, N, C)
        with torch.autocast(x.device.type, enabled=False):                     # EM in float32 at least: sums over N
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            with torch.no_grad():
                for z, mu in self.em(x):                                       # (B, N, K), (B, C, K)
                    pass
            if self.training:
                self.update_bases(mu)
            x = z @ mu.transpose(1, 2)                                         # (B, N, C)  re-estimation, Eq. 14
        x = F.relu(x).transpose(1, 2).unflatten(2, residual.shape[2:])         # (B, C, H, W)
        return F.relu(residual + self.conv2(x))

    def em(self, x):
        """The EM rounds t = 1..T on pixels x (B, N, C): yields z^(t) (B, N, K) and mu^(t) (B, C, K) after each."""
        mu = self.mu.to(x.dtype).expand(len(x), -1, -1)                        # (B, C, K)  every image starts alike
        for _ in range(self.iterations):
            z = self.e_step(x, mu)
            mu = self.m_step(x, z)
            yield z, mu

    def e_step(self, x, mu):
        """Responsibilities (Eq. 12): z_nk = softmax over k of lambda * x_n . mu_k."""
        return torch.softmax(x @ (self.lam * mu), dim=2)                       # (B, N, K)  rows sum to one

    def m_step(self, x, z):
        """Bases (Eq. 13): the z-weighted mean of the pixels, divided by its length (Sec. 5.3)."""
        # differs: the released code also divides by sum_n z_nk. That is a positive factor per basis; L2Norm cancels it.
        return l2_norm(x.transpose(1, 2) @ z)                                  # (B, C, K)

    @torch.no_grad()
    def update_bases(self, mu):
        """Moving average of the initial bases (Eq. 15): mean over the global batch, L2Norm, then the momentum."""
        mean = mu.mean(dim=0, keepdim=True)                                    # (1, C, K)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)          # a sum; L2Norm takes the factor out. Before the momentum, or DDP, which
        #                                    hands rank 0's buffers to all, would throw the other ranks' part away
        # differs: the released code does this in its training loop, without normalising (mmseg does it as here).
        self.mu.lerp_(l2_norm(mean).to(self.mu.dtype), 1 - self.alpha)


def l2_norm(mu):
    """Divides every basis by its length (Sec. 5.3): mu (B, C, K), over C. The small term keeps empty bases finite."""
    return mu / (mu.norm(dim=1, keepdim=True) + 1e-12)                         # (B, C, K)


# ---------------------------------------------------------------------------------------------------------------------
# The network
class EMANet(nn.Module):
    """Dilated ResNet, 3x3 reduction, attention, classifier, bilinear upsampling with align_corners=True (Sec. 6.1).

    in:  images (B, 3, H, W), normalised
    out: logits (B, num_classes, H, W)

    decoder adds the released code's 3x3 convolution to 256, BN, ReLU, Dropout2d, which the paper's Table 1 has not.
    The arguments are kept in `config`, so that EMANet(**net.config) builds the same network again.
    """

    def __init__(self, num_classes, backbone="resnet101", stem="7x7", weights="none", output_stride=8, channels=512,
                 attention="emau", num_bases=64, em_iterations=3, lam=1.0, alpha=0.9, decoder=False, bn_momentum=3e-4):
        super().__init__()
        self.config = {key: value for key, value in locals().items() if key not in ("self", "__class__", "weights")}
        self.backbone = DilatedResNet(backbone, stem, weights, output_stride)
        self.reduce = conv_bn_relu(self.backbone.out_channels, channels)
        if attention == "emau":
            self.attention = EMAU(channels, num_bases, em_iterations, lam, alpha)
        else:
            self.attention = nn.Identity()
        self.decoder = nn.Sequential(*conv_bn_relu(channels, 256), nn.Dropout2d(0.1)) if decoder else nn.Identity()
        self.classifier = nn.Conv2d(256 if decoder else channels, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = bn_momentum

    def forward(self, images):                                                 # (B, 3, H, W)
        x = self.reduce(self.backbone(images))                                 # (B, C, H/S, W/S)
        x = self.decoder(self.attention(x))                                    # (B, C or 256, H/S, W/S)
        logits = self.classifier(x)                                            # (B, L, H/S, W/S)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))   # bfloat16 steps would show after scaling
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=True)    # (B, L, H, W)

    def set_output_stride(self, output_stride):
        """Changes the output stride (8, 16, 32) of the network, trained or not: dilations hold no weights."""
        self.backbone.set_output_stride(output_stride)
        self.config["output_stride"] = output_stride


def conv_bn_relu(c_in, c_out):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: plain dicts of tensors and Python values, so that they load without running code
def save_checkpoint(checkpoint, path):
    """Writes a checkpoint whole or not at all: to a temporary file beside it, to the disk, then renamed."""
    temporary = Path(path).with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path):
    """Reads a checkpoint's dict onto the CPU, checking every byte of it; UserError if `path` holds no whole one."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}: train.py writes model.pth and last.pth into its --out folder")
    try:
        if zipfile.is_zipfile(path):                          # torch writes check sums, but does not look at them
            with zipfile.ZipFile(path) as archive:
                if (record := archive.testzip()) is not None:
                    raise UserError(f"{path}: damaged: check sum of {record} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)   # never unpickles code
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - a torn file makes torch and zipfile raise many kinds
        raise UserError(f"{path}: damaged, or not a checkpoint: {first_line(error)}") from None
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    config = parts.get("config")
    ours = isinstance(parts.get("model"), dict) and isinstance(config, dict) and {"network", "data"} <= config.keys()
    if not ours and not isinstance(parts.get("net"), dict):
        raise UserError(f"{path}: not a checkpoint of EMANet (keys model and config, or net for a released one)")
    return checkpoint


def load_checkpoint(path):
    """Builds the network of a checkpoint, in eval mode on the CPU: this project's files and the released code's.

    `net.data` says what it was trained on: {"dataset": name, "classes": [names]}; empty for a released file.
    """
    checkpoint = read_checkpoint(path)
    if "net" in checkpoint:
        state, config, data = *from_released(checkpoint["net"], path), {}
    else:
        state, config, data = checkpoint["model"], checkpoint["config"]["network"], checkpoint["config"]["data"]
    try:
        net = EMANet(**config)
        net.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{path}: does not fit the network it describes: {first_line(error)}") from None
    net.data = data
    return net.eval()


RELEASED_NAMES = {  # the released network's names -> ours. Its extractor is a Sequential of the ResNet's parts.
    r"extractor\.0": "backbone.conv1", r"extractor\.1": "backbone.bn1",
    **{rf"extractor\.{i + 3}": f"backbone.layer{i}" for i in (1, 2, 3, 4)},
    r"fc0\.conv": "reduce.0", r"fc0\.bn": "reduce.1", r"emau": "attention",
    r"fc1\.0\.conv": "decoder.0", r"fc1\.0\.bn": "decoder.1", r"fc2": "classifier"}


def from_released(released, path):
    """State dict and EMANet arguments of a released network, the arguments read off its names and shapes."""
    state = {}
    for key, value in released.items():
        key = key.removeprefix("module.")
        new = next((ours + key[m.end():] for theirs, ours in RELEASED_NAMES.items()
                    if (m := re.match(theirs + r"(?=\.)", key))), None)
        if new is None:
            raise UserError(f"{path}: has an entry {key!r} that the released EMANet has not")
        state[new] = value
    try:
        depth = sum(re.fullmatch(r"backbone\.layer3\.\d+\.conv1\.weight", key) is not None for key in state)
        _, channels, bases = state["attention.mu"].shape
        config = {"num_classes": len(state["classifier.bias"]),
                  "backbone": {6: "resnet50", 23: "resnet101", 36: "resnet152"}[depth],
                  "stem": "deep" if "backbone.conv1.0.weight" in state else "7x7",
                  "channels": channels, "num_bases": bases, "decoder": "decoder.0.weight" in state}
    except (KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a released EMANet (R50, R101 or R152): {first_line(error)} not found") from None
    return state, config
