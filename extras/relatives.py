"""Relatives of EMAU that the paper compares it with: Non-local (Eq. 9) and the A2 block (Eq. 16).

    net = EMANet(num_classes=21, attention="nonlocal")      # or "a2", with num_bases as an option

Shapes are those of ema.py: B images, C channels, N = h * w pixels, K bases. `differs:` marks a
departure from the blocks' authors.
"""
import torch
from torch import nn


class NonLocal(nn.Module):
    """Non-local block, embedded Gaussian (Wang et al. 2018; Eq. 9). Every pixel is re-estimated
    from all N pixels, which serve as the bases. It costs N * N.

    in:  features (B, C, h, w)
    out: features (B, C, h, w), at the start the same as the input
    """
    # differs: the authors' phi and g see the features after a 2x2 max pooling, and their
    # convolutions start with deviation 0.01. Here they see all pixels and start as torch does it.

    def __init__(self, channels):
        super().__init__()
        self.theta = nn.Conv2d(channels, channels // 2, 1)  # queries
        self.phi = nn.Conv2d(channels, channels // 2, 1)    # keys
        self.g = nn.Conv2d(channels, channels // 2, 1)      # values
        self.out = nn.Sequential(
            nn.Conv2d(channels // 2, channels, 1, bias=False), nn.BatchNorm2d(channels))
        # The block begins as the identity, as the authors' does. A trained network that it is put
        # into is not disturbed.
        nn.init.zeros_(self.out[1].weight)

    def forward(self, features):  # (B, C, h, w)
        theta, phi, g = (conv(features).flatten(2).to(conv.weight.dtype)
                         for conv in (self.theta, self.phi, self.g))  # (B, C/2, N) each
        with torch.autocast(features.device.type, enabled=False):  # sums over N need float32
            # The scale is in the authors' code, not in their paper. It keeps the softmax soft.
            scores = theta.transpose(1, 2) @ phi / theta.shape[1] ** 0.5  # (B, N, N)
            y = g @ torch.softmax(scores, dim=2).transpose(1, 2)  # (B, C/2, N)
        # No ReLU follows the sum, as in the authors' block. EMAU ends with one.
        return features + self.out(y.unflatten(2, features.shape[2:]))  # (B, C, h, w)


class A2Block(nn.Module):
    """Double attention block (Chen et al. 2018; Eq. 16). It gathers K vectors from all pixels, then
    gives every pixel its own mixture of them: one round of EM, with learned weights in place of
    bases in both softmaxes. It costs N * K.

    in:  features (B, C, h, w)
    out: features (B, C, h, w)

    num_bases: K, the number of vectors.
    """
    # differs: the authors' block is narrower inside, and its last convolution widens it again. Here
    # phi keeps all C channels. That a BN follows the last convolution is EMAU's way.

    def __init__(self, channels, num_bases=64):
        super().__init__()
        self.phi = nn.Conv2d(channels, channels, 1)         # what is gathered
        self.theta = nn.Conv2d(channels, num_bases, 1)      # where each vector is gathered
        self.rho = nn.Conv2d(channels, num_bases, 1)        # which vectors a pixel takes
        self.out = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, features):  # (B, C, h, w)
        phi, theta, rho = (conv(features).flatten(2).to(conv.weight.dtype) for conv in
                           (self.phi, self.theta, self.rho))  # (B, C, N), (B, K, N), (B, K, N)
        with torch.autocast(features.device.type, enabled=False):  # sums over N need float32
            bases = phi @ torch.softmax(theta, dim=2).transpose(1, 2)  # (B, C, K)  means of pixels
            y = bases @ torch.softmax(rho, dim=1)  # (B, C, N)  mixtures of the bases
        return features + self.out(y.unflatten(2, features.shape[2:]))  # (B, C, h, w)


RELATIVES = {"nonlocal": NonLocal, "a2": A2Block}
