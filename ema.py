"""Expectation-maximization attention (Li et al., ICCV 2019): EMAU and its bases, and the network around it, EMANet.

    net = EMANet(num_classes=21, backbone="resnet50")
    # or, from a file of this project or of the released code: net = load_checkpoint("model.pth")
    logits = net(images)                               # (B, 3, H, W) normalised -> (B, L, H, W)

Shapes: B images, C channels, N = h * w pixels of one feature map, K bases, L classes; images are H x W, features h x w,
h = ceil(H / S) with S the output stride. In the maths x (B, N, C) are the pixels, mu (B, C, K) the bases, z (B, N, K)
the responsibilities. Equation and section numbers are the paper's. `differs:` marks a departure from the paper or the
released code.
"""
import os
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from backbone import DilatedResNet, UserError, brief

CHOICES = {  # the values of the attention's options
    "attention": ("emau", "nonlocal", "a2", "none"),
    "base_update": ("average", "backprop", "fixed"),
    "base_norm": ("l2", "layer", "none"),
    "gradient": ("none", "last", "full")}


# ---- The attention unit
class EMAU(nn.Module):
    """Expectation-maximization attention unit (Sec. 5, Fig. 2): 1x1 conv, EM on every image, ReLU, 1x1 conv + BN, sum.

    in:  features (B, C, h, w)
    out: features (B, C, h, w)

    num_bases K, iterations T (rounds of EM); lam is lambda of Eq. 12, the inverse temperature; alpha the momentum of
        Eq. 15.
    base_update: how mu^(0), `mu` (1, C, K), is kept (Sec. 5.2): "average" of the batches, as BN keeps its statistics;
        "backprop", as a parameter; "fixed" at its init.
    base_norm: what follows every M-step (Sec. 5.3): "l2", "layer" (without gain and bias), "none".
    gradient: through the EM rounds: "none" (released code), the "last" E-step only, or "full", all rounds unrolled.
        The output is the same in all three. With "none" conv1 is never trained.
    """

    def __init__(self, channels, num_bases=64, iterations=3, lam=1.0, alpha=0.9, base_update="average",
                 base_norm="l2", gradient="none"):
        super().__init__()
        for option, value in (("base_update", base_update), ("base_norm", base_norm), ("gradient", gradient)):
            if value not in CHOICES[option]:
                raise ValueError(f"{option} {value!r}: choose one of {CHOICES[option]}")
        if base_update == "backprop" and gradient != "full":
            raise UserError(f"bases kept by backprop need gradient full, not {gradient}")
        self.iterations, self.lam, self.alpha = iterations, lam, alpha
        self.base_update, self.base_norm, self.gradient = base_update, base_norm, gradient
        self.conv1 = nn.Conv2d(channels, channels, 1)         # no ReLU after it: inner products need both signs (5.1)
        self.conv2 = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        mu = F.normalize(torch.randn(1, channels, num_bases), dim=1)  # (1, C, K)
        if base_update == "backprop":
            self.mu = nn.Parameter(mu)
        else:
            self.register_buffer("mu", mu)
        # The released init. conv1's scale acts as a temperature: with torch's default, x is so short that z is nearly
        # uniform.
        for conv in (self.conv1, self.conv2[0]):
            nn.init.kaiming_normal_(conv.weight)              # deviation sqrt(2 / C)
        # Frozen where EM passes no gradient on: DistributedDataParallel would wait for one.
        self.conv1.requires_grad_(gradient != "none")

    def forward(self, x):  # (B, C, h, w)
        residual = x
        x = self.pixels(x)  # (B, N, C)
        with torch.autocast(x.device.type, enabled=False):                     # sums over N pixels need float32
            for z, mu in self.em(x):  # (B, N, K), (B, C, K)
                pass                                                           # the last round's are used
            if self.training and self.base_update == "average":
                self.update_bases(mu)
            x = z @ mu.transpose(1, 2)  # (B, N, C)  X~, re-estimation, Eq. 14
        x = F.relu(x).transpose(1, 2).unflatten(2, residual.shape[2:])  # (B, C, h, w)
        return F.relu(residual + self.conv2(x))  # (B, C, h, w)

    def pixels(self, x):
        """What enters EM: features (B, C, h, w) -> pixels x (B, N, C), of the bases' dtype: float32 under autocast."""
        return self.conv1(x).to(self.mu.dtype).flatten(2).transpose(1, 2)  # (B, N, C)

    def em(self, x):
        """The EM rounds t = 1..T on pixels x (B, N, C): yields z^(t) (B, N, K) and mu^(t) (B, C, K) after each."""
        if self.gradient == "none":
            x = x.detach()                                                     # EM is a constant to the backward pass
        mu = self.mu.repeat(x.shape[0], 1, 1)  # (B, C, K)
        for _ in range(self.iterations):
            z = self.e_step(x, mu)  # (B, N, K)
            mu = self.m_step(x, z)  # (B, C, K)
            if self.gradient == "last":
                mu = mu.detach()                            # a constant: x learns by the last z alone
            yield z, mu

    def e_step(self, x, mu):
        """Responsibilities (Eqs. 10-12, the kernel exp of the inner product): z_nk = softmax_k of lambda x_n . mu_k."""
        return torch.softmax(x @ (self.lam * mu), dim=2)  # (B, N, K)  rows sum to one

    def m_step(self, x, z):
        """Bases (Eq. 13): the mean of the pixels weighted by z, then the norm of Sec. 5.3."""
        mu = x.transpose(1, 2) @ z  # (B, C, K)  sum over n of z_nk x_n
        # differs: the released code divides by the sum of z_nk before L2Norm. Both norms cancel that factor; without a
        # norm it makes the mean.
        if self.base_norm == "l2":
            return mu / (mu.norm(dim=1, keepdim=True) + 1e-12)  # (B, C, K)  finite for an empty basis
        if self.base_norm == "layer":
            return F.layer_norm(mu.transpose(1, 2), (mu.shape[1],)).transpose(1, 2)  # (B, C, K)
        return mu / (z.sum(dim=1, keepdim=True) + 1e-6)  # (B, C, K)

    @torch.no_grad()
    def update_bases(self, mu):
        """Moving average of mu^(0) (Eq. 15): the mean of mu^(T) over the global batch, then the momentum."""
        # differs: the released code does this in its training loop.
        mean = mu.mean(dim=0, keepdim=True)  # (1, C, K)
        if dist.is_available() and dist.is_initialized():
            # Otherwise rank 0's images alone would count: DistributedDataParallel copies its buffers to all.
            dist.all_reduce(mean)  # (1, C, K)
            mean /= dist.get_world_size()
        self.mu.lerp_(mean, 1 - self.alpha)  # (1, C, K)


# ---- The relatives (Secs. 3.3, 5.4): drop-in blocks of the same shape, which end with convolution, BN and sum as EMAU
class NonLocal(nn.Module):
    """Non-local block (Eq. 9): every pixel is re-estimated from all N pixels, which serve as the bases. Costs N * N."""
    # differs: its authors' block pools the pixels, scales the scores, starts BN's gamma at 0, ends without ReLU.

    def __init__(self, channels):
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(channels, channels // 2, 1) for _ in range(3))
        self.out = nn.Sequential(nn.Conv2d(channels // 2, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):  # (B, C, h, w)
        query, key, value = (conv(x).to(conv.weight.dtype).flatten(2).transpose(1, 2)
                             for conv in (self.theta, self.phi, self.g))  # (B, N, C/2) each
        with torch.autocast(x.device.type, enabled=False):                     # in float32, as EM is
            z = torch.softmax(query @ key.transpose(1, 2), dim=2)  # (B, N, N)
            y = (z @ value).transpose(1, 2).unflatten(2, x.shape[2:])  # (B, C/2, h, w)
        return F.relu(x + self.out(y))  # (B, C, h, w)


class A2Block(nn.Module):
    """Double attention block (Eq. 16): gathers K vectors from all pixels, hands every pixel its mixture of them.
    One round of EM whose two softmaxes have weights of their own, learned by back-propagation."""
    # differs: its authors' block is narrower inside; the paper's variant that shares theta and rho is not offered.

    def __init__(self, channels, num_bases=64):
        super().__init__()
        self.phi = nn.Conv2d(channels, channels, 1)
        self.theta, self.rho = nn.Conv2d(channels, num_bases, 1), nn.Conv2d(channels, num_bases, 1)
        self.out = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):  # (B, C, h, w)
        values, gather, distribute = (conv(x).to(conv.weight.dtype).flatten(2)
                                      for conv in (self.phi, self.theta, self.rho))  # (B, C, N), (B, K, N), (B, K, N)
        with torch.autocast(x.device.type, enabled=False):                     # in float32, as EM is
            bases = values @ torch.softmax(gather, dim=2).transpose(1, 2)  # (B, C, K)  means over the pixels
            y = bases @ torch.softmax(distribute, dim=1)  # (B, C, N)  mixtures of the bases
        return F.relu(x + self.out(y.unflatten(2, x.shape[2:])))  # (B, C, h, w)


# ---- The network
class EMANet(nn.Module):
    """Dilated ResNet, 3x3 reduction, attention, classifier, bilinear upsampling with align_corners=True (Sec. 6.1).

    in:  images (B, 3, H, W), normalised
    out: logits (B, num_classes, H, W)

    decoder adds the released code's 3x3 convolution to 256, BN, ReLU, Dropout2d, which Table 1 does not count.
    EMANet(**net.config) builds the same network again.
    """

    def __init__(self, num_classes, backbone="resnet101", stem="7x7", weights="none", output_stride=8, channels=512,
                 attention="emau", num_bases=64, em_iterations=3, lam=1.0, alpha=0.9, base_update="average",
                 base_norm="l2", gradient="none", decoder=False, bn_momentum=3e-4, layers=4):
        super().__init__()
        # The first line, so that locals() are the arguments. Not the weights: a checkpoint brings them.
        self.config = {key: value for key, value in locals().items() if key not in ("self", "__class__", "weights")}
        self.trained_on = {}                                                   # filled by load_checkpoint
        self.backbone = DilatedResNet(backbone, stem, weights, output_stride, layers)
        self.reduce = conv_bn_relu(self.backbone.out_channels, channels)
        self.decoder = nn.Sequential(*conv_bn_relu(channels, 256), nn.Dropout2d(0.1)) if decoder else nn.Identity()
        self.classifier = nn.Conv2d(256 if decoder else channels, num_classes, 1)
        # The attention is built last, so that for a given seed all other weights are the same whatever it is.
        if attention == "emau":
            self.attention = EMAU(channels, num_bases, em_iterations, lam=lam, alpha=alpha, base_update=base_update,
                                  base_norm=base_norm, gradient=gradient)
        elif attention == "nonlocal":
            self.attention = NonLocal(channels)
        elif attention == "a2":
            self.attention = A2Block(channels, num_bases)
        elif attention == "none":
            self.attention = nn.Identity()
        else:
            raise ValueError(f"attention {attention!r}: choose one of {CHOICES['attention']}")
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = bn_momentum

    def forward(self, images):  # (B, 3, H, W)
        logits = self.head(self.features(images))  # (B, L, h, w)
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=True)  # (B, L, H, W)

    def features(self, images):
        """What the attention sees: images (B, 3, H, W) -> (B, C, h, w)."""
        return self.reduce(self.backbone(images))  # (B, C, h, w)

    def head(self, x):
        """Attention and classifier: features (B, C, h, w) -> logits (B, L, h, w) of the weights' dtype."""
        x = self.decoder(self.attention(x))  # (B, C or 256, h, w)
        with torch.autocast(x.device.type, enabled=False):           # in bfloat16 several classes often get one logit
            return self.classifier(x.to(self.classifier.weight.dtype))  # (B, L, h, w)

    def set_output_stride(self, output_stride):
        """Changes the output stride (8, 16, 32) of the network, trained or not: dilations hold no weights."""
        self.backbone.set_output_stride(output_stride)
        self.config["output_stride"] = output_stride


def conv_bn_relu(c_in, c_out):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


# ---- Checkpoints (skip at first reading): plain dicts of tensors and Python values, so that no code runs on loading
# model.pth: {"model": state dict, "config": {"network": EMANet's arguments, "data": name, classes, "training": flags}}
# last.pth: the same, and "optimizer", "iteration". A released file: {"net": state dict}
def save_checkpoint(checkpoint, path):
    """Writes a checkpoint whole or not at all: to a temporary file, synced to the disk, then renamed. UserError if it
    cannot be written; the previous file is intact then."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                                   # RuntimeError: torch's, on a full disk
        raise UserError(f"cannot write {path} ({brief(error)}): the previous file is intact; make room, "
                        "then --resume auto continues") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path):
    """Reads a checkpoint's dict onto the CPU. UserError: damaged by its check sums (those of torch before 1.6 have
    none), or no checkpoint."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}: train.py writes model.pth and last.pth into its --out folder")
    try:
        if zipfile.is_zipfile(path):                          # torch writes check sums, but does not look at them
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"the check sum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)   # never unpickles code
        if not ("net" in checkpoint or {"model", "config"} <= checkpoint.keys()):
            raise ValueError("it needs the keys model and config, or net for a released one")
    except Exception as error:  # noqa: BLE001 - a torn file can raise anything
        raise UserError(f"{path}: damaged, or not a checkpoint: {brief(error)}") from None
    return checkpoint


def load_checkpoint(path):
    """Builds the network of a checkpoint, in eval mode on the CPU: this project's files and the released code's.

    `net.trained_on` says on what data: {"dataset": name, "classes": [names]}; empty for a released file.
    """
    checkpoint = read_checkpoint(path)
    try:
        if "net" in checkpoint:
            checkpoint = from_released(checkpoint["net"])
        net = EMANet(**checkpoint["config"]["network"])
        net.load_state_dict(checkpoint["model"])
        net.trained_on = dict(checkpoint["config"]["data"])
    except Exception as error:  # noqa: BLE001 - a bad config can raise anything
        raise UserError(f"{path}: does not fit the network it describes: {brief(error)}") from None
    return net.eval()


RELEASED_NAMES = {  # the released network's names -> ours. Its extractor is a Sequential of the ResNet's parts.
    "extractor.0.": "backbone.conv1.", "extractor.1.": "backbone.bn1.", "extractor.4.": "backbone.layer1.",
    "extractor.5.": "backbone.layer2.", "extractor.6.": "backbone.layer3.", "extractor.7.": "backbone.layer4.",
    "fc0.conv.": "reduce.0.", "fc0.bn.": "reduce.1.", "emau.": "attention.", "fc1.0.conv.": "decoder.0.",
    "fc1.0.bn.": "decoder.1.", "fc2.": "classifier.", "module.": ""}


def from_released(released):
    """A released network as a checkpoint of this project; what differs between networks is read off the shapes."""
    state = {}
    for key, value in released.items():
        for theirs, ours in RELEASED_NAMES.items():
            key = key.replace(theirs, ours)
        state[key] = value                                                     # an unknown name will fail to load
    _, channels, num_bases = state["attention.mu"].shape
    depth = len({key.split(".")[2] for key in state if key.startswith("backbone.layer3.")})
    network = {"num_classes": len(state["classifier.bias"]), "stem": "deep", "decoder": True, "channels": channels,
               "num_bases": num_bases, "backbone": {6: "resnet50", 23: "resnet101", 36: "resnet152"}[depth]}
    return {"model": state, "config": {"network": network, "data": {}}}
