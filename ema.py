"""Expectation-maximization attention (Li et al., ICCV 2019): EMAU, its bases, and EMANet.

    net = EMANet(num_classes=21, backbone="resnet50")
    net = load_checkpoint("model.pth")      # written by train.py or the released code
    logits = net(images)                    # (B, 3, H, W) normalised -> (B, L, H, W)

Shapes: B images, C channels, N = h * w pixels of one feature map, K bases, L classes. Images are
H x W, features h x w with h = ceil(H / S), S the output stride. These symbols, and the numbers of
equations and sections, are the paper's:

    x   (B, N, C)  the pixels
    mu  (B, C, K)  the bases
    z   (B, N, K)  the responsibilities: how much of each pixel each basis takes

`differs:` marks a departure from the paper or from the code that its authors released.
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
    """Expectation-maximization attention unit (Sec. 5, Fig. 2). It compares each of the N pixels
    with K bases, where self-attention compares it with all N pixels. Each pixel then becomes a
    mixture of the bases.

    in:  features (B, C, h, w)
    out: features (B, C, h, w)

    num_bases: K.
    iterations: T, the number of EM rounds.
    lam: lambda of Eq. 12, the inverse temperature.
    alpha: the momentum of Eq. 15.
    base_update: how the initial bases mu^(0) change in training (Sec. 5.2). "average": a moving
        average over the batches. "backprop": they are a parameter. "fixed": not at all.
    base_norm: the normalisation after each M-step (Sec. 5.3): "l2", "layer" or "none".
    gradient: "none" (as released): EM is a constant in the backward pass, and conv1 stays as it
        was initialised. "full": the gradient goes through all rounds.
    """

    def __init__(self, channels, num_bases=64, iterations=3, lam=1.0, alpha=0.9,
                 base_update="average", base_norm="l2", gradient="none"):
        super().__init__()
        assert base_update in BASE_UPDATES, base_update
        assert base_norm in BASE_NORMS, base_norm
        assert gradient in GRADIENTS, gradient
        assert iterations >= 1, iterations
        self.iterations = iterations
        self.lam = lam
        self.alpha = alpha
        self.base_update = base_update
        self.base_norm = base_norm
        self.gradient = gradient

        # No ReLU after conv1: inner products need both signs (Sec. 5.1).
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.conv2 = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        # The weights start as in the released code. With torch's default, which is smaller, z would
        # be nearly uniform.
        nn.init.kaiming_normal_(self.conv1.weight)
        nn.init.kaiming_normal_(self.conv2[0].weight)
        # Frozen, or DistributedDataParallel would wait for a gradient that never comes.
        self.conv1.requires_grad_(gradient == "full")
        mu = F.normalize(torch.randn(1, channels, num_bases), dim=1)  # (1, C, K)
        if base_update == "backprop":
            assert gradient == "full", "base_update backprop needs gradient full"
            self.mu = nn.Parameter(mu)
        else:
            self.register_buffer("mu", mu)

    def forward(self, features):  # (B, C, h, w)
        # As in Fig. 2, from left to right: conv1, EM, re-estimation of the pixels, conv2, sum.
        x = self.conv1(features).flatten(2).transpose(1, 2)  # (B, N, C)
        if self.gradient == "none":
            x = x.detach()                                  # EM is a constant in the backward pass
        with torch.autocast(x.device.type, enabled=False):  # sums over N pixels need float32
            z, mu = self.em(x.to(self.mu.dtype), self.iterations)  # (B, N, K), (B, C, K)
            if self.training and self.base_update == "average":
                self.update_bases(mu)
            y = z @ mu.transpose(1, 2)  # (B, N, C)  each pixel becomes a mixture of bases, Eq. 14
        y = F.relu(y).transpose(1, 2).unflatten(2, features.shape[2:])  # (B, C, h, w)
        return F.relu(features + self.conv2(y))  # (B, C, h, w)

    def em(self, x, iterations):
        """Rounds of EM on the pixels x (B, N, C), from the initial bases. Returns the last round's
        z (B, N, K) and mu (B, C, K)."""
        # A copy: update_bases overwrites self.mu, and the backward pass may need the old one.
        mu = self.mu.repeat(x.shape[0], 1, 1)  # (B, C, K)
        for _ in range(iterations):
            z = self.e_step(x, mu)  # (B, N, K)
            mu = self.m_step(x, z)  # (B, C, K)
        return z, mu

    def e_step(self, x, mu):
        """Responsibilities (Eqs. 10-12): z_nk = softmax over k of lambda x_n . mu_k."""
        # Another kernel goes here. The Euclidean one, exp(-lambda |x - mu|^2), gives the same as
        # this one with 2 lambda, if the bases have length 1. The initial ones, being averages, are
        # shorter, so that the first round differs.
        return torch.softmax(x @ (self.lam * mu), dim=2)  # (B, N, K)  rows sum to one

    def m_step(self, x, z):
        """Bases (Eq. 13): means of the pixels weighted by z, then normalised (Sec. 5.3)."""
        # Each 1e-6, as released, keeps a basis without pixels finite.
        mu = x.transpose(1, 2) @ z / (z.sum(dim=1, keepdim=True) + 1e-6)  # (B, C, K)
        if self.base_norm == "l2":
            mu = mu / (mu.norm(dim=1, keepdim=True) + 1e-6)  # (B, C, K)
        elif self.base_norm == "layer":
            mu = F.layer_norm(mu.transpose(1, 2), [mu.shape[1]]).transpose(1, 2)  # (B, C, K)
        return mu

    @torch.no_grad()
    def update_bases(self, mu):
        """Moves the initial bases towards the final ones (B, C, K), averaged over the images of all
        processes. Every process must have equally many images."""
        # differs: the released code does this in its training loop, under DataParallel.
        mean = mu.mean(dim=0, keepdim=True)  # (1, C, K)
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.mu.copy_(self.alpha * self.mu + (1 - self.alpha) * mean)  # Eq. 15


class EMANet(nn.Module):
    """Dilated ResNet, 3x3 reduction, attention, classifier, bilinear upsampling (Sec. 6.1).

    in:  images (B, 3, H, W), normalised
    out: logits (B, num_classes, H, W)

    channels: C of the attention, 512 or 256 in the paper.
    decoder: add a second 3x3 convolution, which the released code has and Table 1 does not.
    attention: "emau", its relatives "nonlocal" and "a2" (extras/relatives.py), or "none".
    options: keyword arguments of the attention.
    """

    def __init__(self, num_classes, *, backbone="resnet101", stem="7x7", weights="none",
                 output_stride=8, channels=512, decoder=False, attention="emau", **options):
        super().__init__()
        self.backbone = DilatedResNet(backbone, stem, weights, output_stride)
        self.reduce = conv_bn_relu(self.backbone.out_channels, channels)
        self.decoder = nn.Identity()
        if decoder:
            self.decoder = nn.Sequential(*conv_bn_relu(channels, 256), nn.Dropout2d(0.1))
        self.classifier = nn.Conv2d(256 if decoder else channels, num_classes, 1)
        # Last, so that a seed gives the other layers the same weights with any attention.
        if attention == "emau":
            self.attention = EMAU(channels, **options)
        elif attention == "none":
            self.attention = nn.Identity()
        else:
            from extras.relatives import RELATIVES
            self.attention = RELATIVES[attention](channels, **options)

    def forward(self, images):  # (B, 3, H, W)
        x = self.attention(self.features(images))  # (B, C, h, w)
        x = self.decoder(x)  # (B, C or 256, h, w)
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16 close logits would tie
            logits = self.classifier(x.to(self.classifier.weight.dtype))  # (B, L, h, w)
        return F.interpolate(
            logits, images.shape[2:], mode="bilinear", align_corners=True)  # (B, L, H, W)

    def features(self, images):  # (B, 3, H, W)
        """What the attention sees."""
        x = self.backbone(images)  # (B, 512 or 2048, h, w)
        return self.reduce(x)  # (B, C, h, w)

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
    released checkpoint, {"net": state dict}, is converted first. OSError if it is neither.
    """
    checkpoint = read_checkpoint(path)
    if "net" in checkpoint:
        from extras.released import convert
        checkpoint = convert(checkpoint["net"])
    if "network" not in checkpoint:
        raise OSError(f"{path}: not a checkpoint of train.py or of the released code")
    net = EMANet(**checkpoint["network"])
    net.load_state_dict(checkpoint["model"])
    net.dataset = checkpoint["dataset"]
    net.classes = checkpoint["classes"]
    return net.eval()
