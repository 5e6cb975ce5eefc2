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
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from backbone import DilatedResNet, UserError, first_line


# ---------------------------------------------------------------------------------------------------------------------
# The attention unit
class EMAU(nn.Module):
    """Expectation-maximization attention unit (Sec. 5, Fig. 2): 1x1 conv, EM on every image, ReLU, 1x1 conv + BN, sum.

    in:  features (B, C, H, W)
    out: features (B, C, H, W)

    num_bases K, iterations T; lam is lambda of Eq. 12, the inverse temperature; alpha the momentum of Eq. 15.
    base_update: how mu^(0), `mu` (1, C, K), is kept (Sec. 5.2): "average" of the batches, as BN keeps its statistics;
        "backprop", as a parameter; "fixed" at its init.
    base_norm: what follows every M-step (Sec. 5.3): "l2", "layer", "none".
    gradient: through the EM rounds: "none" (released code), the "last" E-step only, or "full", all rounds unrolled.
        The output is the same in all three. With "none" conv1 is never trained.
    """

    def __init__(self, channels, num_bases=64, iterations=3, lam=1.0, alpha=0.9, base_update="average",
                 base_norm="l2", gradient="none"):
        super().__init__()
        if base_update == "backprop" and gradient != "full":
            raise UserError(f"bases kept by backprop need gradient full, not {gradient}: no other reaches mu^(0)")
        self.iterations, self.lam, self.alpha = iterations, lam, alpha
        self.base_update, self.normalise, self.run_em = base_update, NORMS[base_norm], GRADIENTS[gradient]
        self.conv1 = nn.Conv2d(channels, channels, 1)         # no ReLU after it: inner products need both signs (5.1)
        self.conv2 = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        mu = l2_norm(torch.randn(1, channels, num_bases) * math.sqrt(2 / num_bases))       # (1, C, K)
        if base_update == "backprop":
            self.mu = nn.Parameter(mu)
        else:
            self.register_buffer("mu", mu)
        # The released init. conv1's is the temperature: with torch's default x is short, and z uniform.
        for conv in (self.conv1, self.conv2[0]):
            nn.init.normal_(conv.weight, std=math.sqrt(2 / channels))
        # With no gradient through EM conv1 never changes. Saying so here, before any wrapping, is what lets
        # DistributedDataParallel work: it waits for a gradient from every parameter that asks for one.
        self.conv1.requires_grad_(gradient != "none")

    def forward(self, x):                                                      # (B, C, H, W)
        residual = x
        x = self.pixels(x)                                                     # (B, N, C)
        with full_precision(x):                                                # EM in float32 at least: sums over N
            z, mu = self.run_em(self, x)                                       # (B, N, K), (B, C, K)
            if self.training and self.base_update == "average":
                self.update_bases(mu.detach())
            x = self.re_estimate(z, mu, like=x)                                # (B, C, N)
        x = F.relu(x).unflatten(2, residual.shape[2:])                         # (B, C, H, W)
        return F.relu(residual + self.conv2(x))

    def pixels(self, x):
        """What enters EM: features (B, C, H, W) -> pixels x (B, N, C) in at least float32."""
        x = self.conv1(x).flatten(2).transpose(1, 2)                           # (B, N, C)
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def em(self, x):
        """The EM rounds t = 1..T on pixels x (B, N, C): yields z^(t) (B, N, K) and mu^(t) (B, C, K) after each."""
        mu = self.initial_bases(x)                                             # (B, C, K)
        for _ in range(self.iterations):
            z = self.e_step(x, mu)                                             # (B, N, K)
            mu = self.m_step(x, z)                                             # (B, C, K)
            yield z, mu

    def initial_bases(self, x):
        """mu^(0), the same for every image: (B, C, K). A copy, as update_bases changes `mu` in place while the graph of
        a full gradient is alive (torch.compile takes it up again in the backward pass)."""
        return self.mu.to(x.dtype).repeat(x.shape[0], 1, 1)                    # (B, C, K)

    def e_step(self, x, mu):
        """Responsibilities (Eqs. 10-12, the kernel exp of the inner product): z_nk = softmax over k of lambda x_n . mu_k."""
        return torch.softmax(x @ (self.lam * mu), dim=2)                       # (B, N, K)  rows sum to one

    def m_step(self, x, z):
        """Bases (Eq. 13), normalised (Sec. 5.3): the sum of z_nk x_n over n. Its division by the sum of z_nk is in
        `normalise`: it cancels in all norms but "none"."""
        return self.normalise(x.transpose(1, 2) @ z, z)                        # (B, C, K)

    def re_estimate(self, z, mu, like):
        """X~ = Z mu^T (Eq. 14), transposed: in memory as the pixels `like` are, so that no layout has to change."""
        if like.is_contiguous():                                               # channels_last
            return (z @ mu.transpose(1, 2)).transpose(1, 2)                    # (B, C, N)
        return mu @ z.transpose(1, 2)                                          # (B, C, N)

    @torch.no_grad()
    def update_bases(self, mu):
        """Moving average of mu^(0) (Eq. 15): mean of mu^(T) over the global batch, normalised, then the momentum."""
        mean = mu.mean(dim=0, keepdim=True)                                    # (1, C, K)
        if dist.is_available() and dist.is_initialized():
            # Averaged before the momentum: DistributedDataParallel hands rank 0's buffers to all, and the other
            # ranks' part would be thrown away.
            dist.all_reduce(mean)                                              # (1, C, K)
            mean /= dist.get_world_size()
        # differs: the released code does this in its training loop, without normalising (mmseg does it as here).
        self.mu.lerp_(self.normalise(mean).to(self.mu.dtype), 1 - self.alpha)              # (1, C, K)


def full_precision(x):
    """Autocast off for the device of x. The meta device, where costs are counted, knows no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


# What EMAU's options choose from. Sec. 5.3: sums of pixels (B, C, K), for an M-step with their z, -> bases (B, C, K)
def l2_norm(mu, z=None):
    """Divides every basis by its length. The small term keeps an empty basis finite."""
    # differs: the released code divides by sum_n z_nk first. That is a positive factor per basis; L2Norm cancels it.
    return mu / (mu.norm(dim=1, keepdim=True) + 1e-12)                         # (B, C, K)


def layer_norm(mu, z=None):
    """Mean 0 and deviation 1 over the channels of every basis, which turns it. Cancels the sum of z as well."""
    return F.layer_norm(mu.transpose(1, 2), mu.shape[1:2]).transpose(1, 2)     # (B, C, K)


def weighted_mean(mu, z=None):
    """No normalisation: Eq. 13 as it stands."""
    return mu if z is None else mu / (z.sum(dim=1, keepdim=True) + 1e-6)       # (B, C, K)


def no_gradient(emau, x):
    """EM outside the graph: pixels x (B, N, C) -> z^(T) (B, N, K), mu^(T) (B, C, K), constants."""
    with torch.no_grad():
        return full_gradient(emau, x)


def last_gradient(emau, x):
    """z^(T) once more, with gradient, from the constant mu^(T-1); mu^(T) a constant. What Hamburger does for its
    matrix factorisation: the gradient of a fixed point's last step."""
    with torch.no_grad():
        mu = emau.initial_bases(x)                                             # (B, C, K)
        for _, following in emau.em(x):
            before, mu = mu, following
    return emau.e_step(x, before), mu


def full_gradient(emau, x):
    """All rounds in the graph, as a recurrent network unrolled (the paper speaks of it so in Sec. 5.2)."""
    for z, mu in emau.em(x):                                                   # (B, N, K), (B, C, K)
        pass
    return z, mu


NORMS = {"l2": l2_norm, "layer": layer_norm, "none": weighted_mean}
GRADIENTS = {"none": no_gradient, "last": last_gradient, "full": full_gradient}


@torch.no_grad()
def base_statistics(emau, x):
    """What the bases do on pixels x (B, N, C), after T rounds, averaged over the images. Python floats:

    length      mean |x|: together with lambda the temperature of Eq. 12
    perplexity  exp of the entropy of z, mean over pixels: how many bases a pixel is shared by, 1..K
    used        bases that are the largest of some pixel, 1..K
    cosine      mean cosine between two bases
    rank        effective rank of the centred X~: exp of the entropy of its eigenvalues' shares of the variance
    """
    # on the CPU: not every device has a QR decomposition
    z, mu = (each.cpu() for each in full_gradient(emau, x))                    # (B, N, K), (B, C, K)
    K = mu.shape[2]
    entropy = -(z * z.clamp_min(1e-30).log()).sum(2)                           # (B, N)
    unit = l2_norm(mu)                                                         # (B, C, K)
    cosines = unit.transpose(1, 2) @ unit                                      # (B, K, K)
    # r mu^T has the spectrum of X~ less its mean, and is small
    _, r = torch.linalg.qr(z - z.mean(1, keepdim=True), mode="r")              # (B, K, K)
    share = torch.linalg.svdvals(r @ mu.transpose(1, 2)) ** 2                  # (B, K)
    share = share / share.sum(1, keepdim=True).clamp_min(1e-30)
    return {"length": x.norm(dim=2).mean().item(), "perplexity": entropy.exp().mean().item(),
            "used": sum(len(k.unique()) for k in z.argmax(2)) / len(z),
            "cosine": ((cosines.sum((1, 2)) - K) / (K * max(K - 1, 1))).mean().item(),
            "rank": (-(share * share.clamp_min(1e-30).log()).sum(1)).exp().mean().item()}


# ---------------------------------------------------------------------------------------------------------------------
# The relatives (Secs. 3.3, 5.4): drop-in blocks of the same shape, with the same output convolution, BN and sum
class NonLocal(nn.Module):
    """Non-local block (Eq. 9): every pixel is re-estimated from all N pixels, which serve as the bases. Costs N * N."""

    def __init__(self, channels):
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(channels, channels // 2, 1) for _ in range(3))
        self.out = nn.Sequential(nn.Conv2d(channels // 2, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):                                                      # (B, C, H, W)
        query, key, value = (f(x).flatten(2).transpose(1, 2) for f in (self.theta, self.phi, self.g))  # (B, N, C/2)
        z = torch.softmax(query @ key.transpose(1, 2), dim=2)                  # (B, N, N)
        y = (z @ value).transpose(1, 2).unflatten(2, x.shape[2:])              # (B, C/2, H, W)
        return F.relu(x + self.out(y))


class A2Block(nn.Module):
    """Double attention block (Eq. 16): gathers K vectors from all pixels, hands every pixel its mixture of them.
    One round of EM whose two softmaxes have weights of their own, learned by back-propagation."""

    def __init__(self, channels, num_bases=64):
        super().__init__()
        self.phi = nn.Conv2d(channels, channels, 1)
        self.theta, self.rho = nn.Conv2d(channels, num_bases, 1), nn.Conv2d(channels, num_bases, 1)
        self.out = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):                                                      # (B, C, H, W)
        gather = torch.softmax(self.theta(x).flatten(2), dim=2)                # (B, K, N)  over the pixels
        bases = self.phi(x).flatten(2) @ gather.transpose(1, 2)                # (B, C, K)
        distribute = torch.softmax(self.rho(x).flatten(2), dim=1)              # (B, K, N)  over the bases
        y = (bases @ distribute).unflatten(2, x.shape[2:])                     # (B, C, H, W)
        return F.relu(x + self.out(y))


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
                 attention="emau", num_bases=64, em_iterations=3, lam=1.0, alpha=0.9, base_update="average",
                 base_norm="l2", gradient="none", decoder=False, bn_momentum=3e-4, layers=4):
        super().__init__()
        self.config = {key: value for key, value in locals().items() if key not in ("self", "__class__", "weights")}
        self.backbone = DilatedResNet(backbone, stem, weights, output_stride, layers)
        self.reduce = conv_bn_relu(self.backbone.out_channels, channels)
        self.attention = {
            "emau": lambda: EMAU(channels, num_bases, em_iterations, lam, alpha, base_update, base_norm, gradient),
            "nonlocal": lambda: NonLocal(channels), "a2": lambda: A2Block(channels, num_bases),
            "none": nn.Identity}[attention]()
        self.decoder = nn.Sequential(*conv_bn_relu(channels, 256), nn.Dropout2d(0.1)) if decoder else nn.Identity()
        self.classifier = nn.Conv2d(256 if decoder else channels, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = bn_momentum

    def forward(self, images):                                                 # (B, 3, H, W)
        logits = self.head(self.features(images))                              # (B, L, H/S, W/S)
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=True)    # (B, L, H, W)

    def features(self, images):
        """What the attention sees: images (B, 3, H, W) -> (B, C, H/S, W/S)."""
        return self.reduce(self.backbone(images))

    def head(self, x):
        """Attention and classifier: features (B, C, H/S, W/S) -> logits (B, L, H/S, W/S) in at least float32."""
        x = self.decoder(self.attention(x))                                    # (B, C or 256, H/S, W/S)
        # In evaluation not under autocast: bfloat16 logits tie. In training that gains nothing.
        with nullcontext() if self.training else full_precision(x):
            logits = self.classifier(x if self.training else x.to(torch.promote_types(x.dtype, torch.float32)))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))     # (B, L, H/S, W/S)

    def set_output_stride(self, output_stride):
        """Changes the output stride (8, 16, 32) of the network, trained or not: dilations hold no weights."""
        self.backbone.set_output_stride(output_stride)
        self.config["output_stride"] = output_stride


def conv_bn_relu(c_in, c_out):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: plain dicts of tensors and Python values, so that they load without running code
def save_checkpoint(checkpoint, path, keep=False):
    """Writes a checkpoint whole or not at all: to a temporary file beside it, to the disk, then renamed. keep: the
    one before it stays, as NAME.before.pth. UserError if it cannot be written; what was there is untouched then."""
    path = Path(path)
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, path.with_suffix(".before.pth"))                  # killed here, the older one is found
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                                   # RuntimeError: torch's, on a full disk
        if "DataLoader" in str(error):                         # a worker that dies interrupts whatever goes on
            raise
        cause = error.__context__ if isinstance(error.__context__, OSError) else error     # torch hides the disk's
        raise UserError(f"cannot write {path} ({first_line(cause)}): the checkpoint before it is whole; make room, and "
                        "--resume auto goes on") from None
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
        net = EMANet(**config | {"weights": "none"})
        net.load_state_dict(state, strict=True)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - settings made in bad faith raise many kinds
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


# ---------------------------------------------------------------------------------------------------------------------
# python ema.py: what it costs (Table 1, Sec. 5.1)
def cost(module, channels, side, batch=2):
    """Per image, of a module on features (batch, channels, side, side): multiply-adds, parameters with the bases, and
    bytes kept for the backward pass. Counted on the meta device, where nothing is computed."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor                         # each storage once; held, so not reused
        return tensor

    module = module.to("meta").train()
    own = {p.untyped_storage()._cdata for p in [*module.parameters(), *module.buffers()]}
    x = torch.empty(batch, channels, side, side, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        module(x)
    macs = counter.get_total_flops() / 2 / batch                               # it counts a multiply-add as two
    activations = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own) / batch
    bases = sum(b.numel() for name, b in module.named_buffers() if name.split(".")[-1] == "mu")
    return macs, sum(p.numel() for p in module.parameters()) + bases, activations


def print_costs():
    """Prints Table 1 as counted from this code, beside the paper's figures."""
    reduce, side = conv_bn_relu, 65                                            # 513 pixels at stride 8
    em = EMAU(512)
    em.conv1 = em.conv2 = nn.Identity()
    rows = [  # what, module, channels in, side, the paper's multiply-adds (G) and parameters (M), remark
        ("ResNet-101, stride 8, deep stem", DilatedResNet("resnet101", "deep"), 3, 513, 190.6, 42.6, "the base of all"),
        ("+ EMANet(256): 3x3 + EMAU", nn.Sequential(reduce(2048, 256), EMAU(256)), 2048, side, 21.1, 4.87, ""),
        ("+ EMANet(512): 3x3 + EMAU", nn.Sequential(reduce(2048, 512), EMAU(512)), 2048, side, 43.1, 10.0, ""),
        ("+ EMANet(512), released decoder", nn.Sequential(reduce(2048, 512), EMAU(512), reduce(512, 256)), 2048, side,
         None, None, "Table 1 has no second 3x3"),
        ("+ DeepLabV3 head (torchvision)", DeepLabHead(2048, 21), 2048, side, 63.4, 15.5,
         "with its 3x3 and classifier; rates 12, 24, 36"),
        ("EM iterations alone (K=64, T=3)", em, 512, side, None, None, "of the size of the 1x1 conv, as Sec. 5.1 says"),
        ("EMAU alone", EMAU(512), 512, side, None, None, "about a third of the 3x3 conv, as Sec. 5.1 says"),
        ("1x1 conv 512-512", nn.Conv2d(512, 512, 1), 512, side, None, None, ""),
        ("3x3 conv 512-512", nn.Conv2d(512, 512, 3, padding=1), 512, side, None, None, ""),
        ("Non-local block", NonLocal(512), 512, side, None, None, "keeps an N x N map"),
        ("A2 block (K=64)", A2Block(512), 512, side, None, None, ""),
    ]
    print("Per image of 513x513. GMAC: thousand million multiply-adds (the paper calls them FLOPs). MB: kept for the\n"
          "backward pass, float32. The paper's parameters and ours count the K*C bases.\n")
    print(f"{'':34s}{'GMAC':>8s}{'paper':>7s}{'M param':>9s}{'paper':>7s}{'MB kept':>9s}")
    for name, module, channels, size, paper_macs, paper_params, remark in rows:
        macs, params, kept = cost(module, channels, size)
        print(f"{name:34s}{macs / 1e9:8.2f}{paper_macs or '-':>7}{params / 1e6:9.3f}{paper_params or '-':>7}"
              f"{kept / 1e6:9.1f}   {remark}".rstrip())
    print("\nGrowth with the number of positions N:  GMAC (MB kept)")
    sides = (33, 65, 97, 129)
    print(f"{'':34s}" + "".join(f"{f'{s}x{s}':>18s}" for s in sides))
    for name, block in (("EMAU", EMAU), ("A2 block", A2Block), ("Non-local block", NonLocal)):
        each = [cost(block(512), 512, s) for s in sides]
        print(f"{name:34s}" + "".join(f"{m / 1e9:9.2f} ({b / 1e6:6.0f})" for m, _, b in each))


if __name__ == "__main__":
    print_costs()
