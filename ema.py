"""Expectation-maximization attention (Li et al., ICCV 2019): EMAU, its bases, and EMANet.

    net = EMANet(num_classes=21, backbone="resnet50")
    net = load_checkpoint("model.pth")      # a file of train.py, or of the released code
    logits = net(images)                    # (B, 3, H, W) normalised -> (B, L, H, W)

Shapes: B images, C channels, N = h * w pixels of one feature map, K bases, L classes. Images are
H x W, features h x w with h = ceil(H / S), S the output stride. In the maths x (B, N, C) are the
pixels, mu (B, C, K) the bases, z (B, N, K) the responsibilities. Equation and section numbers
are the paper's. `differs:` marks a departure from the paper or the released code.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from backbone import DilatedResNet, read_checkpoint

ATTENTIONS = ("emau", "nonlocal", "a2", "none")             # what EMANet can be built with
BASE_UPDATES = ("average", "backprop", "fixed")             # options of EMAU
BASE_NORMS = ("l2", "layer", "none")
GRADIENTS = ("none", "full")


class EMAU(nn.Module):
    """Expectation-maximization attention unit (Sec. 5, Fig. 2). It costs N * K where self-attention
    costs N * N, and before the last convolution its output has at most rank K.

    in:  features (B, C, h, w)
    out: features (B, C, h, w)

    num_bases: K. iterations: T, the rounds of EM. lam: lambda of Eq. 12, the inverse temperature.
    alpha: the momentum of Eq. 15.
    base_update: how the initial bases mu^(0), `mu` (1, C, K), are updated (Sec. 5.2): "average"
        over the training batches, "backprop" as a parameter, or "fixed" at their init.
    base_norm: what follows each M-step (Sec. 5.3): "l2", "layer" (without gain and bias), "none".
    gradient: "none" (as released) takes EM as a constant in the backward pass and freezes conv1 at
        its init; setting the attribute later does not unfreeze it. "full" goes through all rounds.
    Other options raise ValueError.
    """

    def __init__(self, channels, num_bases=64, iterations=3, lam=1.0, alpha=0.9,
                 base_update="average", base_norm="l2", gradient="none"):
        super().__init__()
        for value, choices in ((base_update, BASE_UPDATES), (base_norm, BASE_NORMS),
                               (gradient, GRADIENTS)):
            if value not in choices:
                raise ValueError(f"{value!r}: choose one of {choices}")
        if base_update == "backprop" and gradient != "full":
            raise ValueError("base_update backprop needs gradient full: mu gets none otherwise")
        if iterations < 1:
            raise ValueError(f"{iterations} EM iterations: there must be at least one")
        self.iterations, self.lam, self.alpha = iterations, lam, alpha
        self.base_update, self.base_norm, self.gradient = base_update, base_norm, gradient

        # No ReLU after conv1: inner products need both signs (Sec. 5.1).
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.conv2 = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        # The released init. conv1's scale acts as a temperature, and torch's smaller default makes
        # z nearly uniform.
        nn.init.kaiming_normal_(self.conv1.weight)          # deviation sqrt(2 / C)
        nn.init.kaiming_normal_(self.conv2[0].weight)
        # DistributedDataParallel would wait for a gradient that never comes.
        self.conv1.requires_grad_(gradient == "full")
        mu = F.normalize(torch.randn(1, channels, num_bases), dim=1)  # (1, C, K)
        if base_update == "backprop":
            self.mu = nn.Parameter(mu)
        else:
            self.register_buffer("mu", mu)

    def forward(self, features):  # (B, C, h, w)
        x = self.conv1(features).flatten(2).transpose(1, 2)  # (B, N, C)
        if self.gradient == "none":
            x = x.detach()                                  # backward takes EM as a constant
        with torch.autocast(x.device.type, enabled=False):  # sums over N pixels need float32
            z, mu = self.em(x.to(self.mu.dtype), self.iterations)  # (B, N, K), (B, C, K)
            if self.training and self.base_update == "average":
                self.update_bases(mu)
            x = z @ mu.transpose(1, 2)  # (B, N, C)  re-estimation, Eq. 14
        x = F.relu(x).transpose(1, 2).unflatten(2, features.shape[2:])  # (B, C, h, w)
        return F.relu(features + self.conv2(x))  # (B, C, h, w)

    def em(self, x, iterations):
        """Rounds of EM on the pixels x (B, N, C), from mu^(0). Returns the last round's z (B, N, K)
        and mu (B, C, K)."""
        mu = self.mu.repeat(x.shape[0], 1, 1)  # (B, C, K)  a copy: update_bases changes self.mu
        for _ in range(iterations):
            z = self.e_step(x, mu)  # (B, N, K)
            mu = self.m_step(x, z)  # (B, C, K)
        return z, mu

    def e_step(self, x, mu):
        """Responsibilities (Eqs. 10-12): z_nk = softmax over k of lambda x_n . mu_k."""
        # To change the kernel, change this line. For bases of unit length the Euclidean kernel
        # exp(-lambda |x - mu|^2) gives the same z as the inner product with 2 lambda. mu^(0), an
        # average, is shorter, so the first round differs.
        return torch.softmax(x @ (self.lam * mu), dim=2)  # (B, N, K)  rows sum to one

    def m_step(self, x, z):
        """Bases (Eq. 13): means of the pixels weighted by z, then the norm of Sec. 5.3."""
        # Both 1e-6 are from the released code. They keep a basis without pixels finite.
        mu = x.transpose(1, 2) @ z / (z.sum(dim=1, keepdim=True) + 1e-6)  # (B, C, K)
        if self.base_norm == "l2":
            mu = mu / (mu.norm(dim=1, keepdim=True) + 1e-6)  # (B, C, K)
        elif self.base_norm == "layer":
            mu = F.layer_norm(mu.transpose(1, 2), mu.shape[1:2]).transpose(1, 2)  # (B, C, K)
        return mu

    @torch.no_grad()
    def update_bases(self, mu):
        """Moving average of mu^(0) (Eq. 15) with the mean of mu^(T) (B, C, K) over the batches of
        all processes. The mean is exact if all batches have the same size."""
        # differs: the released code does this in its training loop, for one process.
        mean = mu.mean(dim=0, keepdim=True)  # (1, C, K)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)  # (1, C, K)
            mean /= dist.get_world_size()
        self.mu.lerp_(mean, 1 - self.alpha)  # (1, C, K)


class EMANet(nn.Module):
    """Dilated ResNet, 3x3 reduction, attention, classifier, bilinear upsampling (Sec. 6.1).

    in:  images (B, 3, H, W), normalised
    out: logits (B, num_classes, H, W)

    channels: C of the attention, 512 or 256 in the paper.
    decoder: adds the released code's second 3x3 convolution, which Table 1 does not count.
    attention: "emau", its relatives "nonlocal" and "a2" (extras/relatives.py), or "none".
    options: keyword arguments of the attention. An unknown one raises TypeError.
    """

    def __init__(self, num_classes, *, backbone="resnet101", stem="7x7", weights="none",
                 output_stride=8, channels=512, decoder=False, attention="emau", **options):
        super().__init__()
        self.backbone = DilatedResNet(backbone, stem, weights, output_stride)
        self.reduce = conv_bn_relu(self.backbone.out_channels, channels)
        self.decoder = nn.Sequential()
        if decoder:
            self.decoder = nn.Sequential(*conv_bn_relu(channels, 256), nn.Dropout2d(0.1))
        self.classifier = nn.Conv2d(256 if decoder else channels, num_classes, 1)
        # Built last, so that one seed initialises everything else alike for all kinds.
        if attention == "emau":
            self.attention = EMAU(channels, **options)
        elif attention == "none":
            self.attention = nn.Sequential(**options)       # empty; it rejects any option
        else:
            from extras.relatives import RELATIVES
            self.attention = RELATIVES[attention](channels, **options)

    def forward(self, images):  # (B, 3, H, W)
        x = self.attention(self.reduce(self.backbone(images)))  # (B, C, h, w)
        x = self.decoder(x)  # (B, C or 256, h, w)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 logits often tie
            logits = self.classifier(x.to(self.classifier.weight.dtype))  # (B, L, h, w)
        return F.interpolate(
            logits, images.shape[2:], mode="bilinear", align_corners=True)  # (B, L, H, W)

    @property
    def output_stride(self):
        return self.backbone.output_stride

    def set_output_stride(self, output_stride):
        """Changes the output stride (8 or 16) of the network, trained or not."""
        self.backbone.set_output_stride(output_stride)


def conv_bn_relu(c_in, c_out):
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


def load_checkpoint(path):
    """The network of a checkpoint, in eval mode on the CPU.

    A checkpoint of train.py is the dict {"model": state dict, "network": EMANet's arguments,
    "dataset": name, "classes": [names]}; the last two become attributes of the network. A
    released checkpoint has the key "net". Any other file raises OSError.
    """
    checkpoint = read_checkpoint(path)
    try:
        if "net" in checkpoint:
            from extras.released import convert
            checkpoint = convert(checkpoint["net"])
        net = EMANet(**checkpoint["network"])
        net.load_state_dict(checkpoint["model"])
        net.dataset, net.classes = checkpoint["dataset"], checkpoint["classes"]
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"{path}: not a checkpoint of train.py or the released code, or this code "
                      f"builds another network ({reason})") from error
    return net.eval()
