"""Counts what the attention costs, beside the figures of the paper's Table 1 and Sec. 5.1.

    python -m extras.costs

Nothing is computed: under FakeTensorMode tensors have shapes and devices, but no numbers.
"""
import argparse

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from backbone import DilatedResNet
from ema import EMAU, A2Block, NonLocal, conv_bn_relu
from evaluate import run


def cost(module, channels, side, batch=2):
    """Per image, of a module on features (batch, channels, side, side): multiply-adds, parameters with the bases, and
    bytes kept for the backward pass. Call it, and make the module, under FakeTensorMode."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor                         # each storage once; held, so not reused
        return tensor

    module.train()
    own = {p.untyped_storage()._cdata for p in [*module.parameters(), *module.buffers()]}
    x = torch.empty(batch, channels, side, side, requires_grad=True)
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        module(x)
    macs = counter.get_total_flops() / 2 / batch                               # it counts a multiply-add as two
    activations = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own) / batch
    bases = sum(b.numel() for name, b in module.named_buffers() if name.split(".")[-1] == "mu")
    return macs, sum(p.numel() for p in module.parameters()) + bases, activations


def table_rows():
    """What, module, channels in, side, the paper's multiply-adds (G) and parameters (M), remark."""
    side = 65                                                                  # 513 pixels at stride 8
    em = EMAU(512)
    em.conv1 = em.conv2 = nn.Identity()
    return [
        ("ResNet-101, stride 8, deep stem", DilatedResNet("resnet101", "deep"), 3, 513, 190.6, 42.6, "the base of all"),
        ("+ EMANet(256): 3x3 + EMAU", nn.Sequential(conv_bn_relu(2048, 256), EMAU(256)), 2048, side, 21.1, 4.87, ""),
        ("+ EMANet(512): 3x3 + EMAU", nn.Sequential(conv_bn_relu(2048, 512), EMAU(512)), 2048, side, 43.1, 10.0, ""),
        ("+ EMANet(512), released decoder",
         nn.Sequential(conv_bn_relu(2048, 512), EMAU(512), conv_bn_relu(512, 256)), 2048, side, None, None,
         "Table 1 has no second 3x3"),
        ("+ DeepLabV3 head (torchvision)", DeepLabHead(2048, 21), 2048, side, 63.4, 15.5,
         "with its 3x3 and classifier; rates 12, 24, 36"),
        ("EM iterations alone (K=64, T=3)", em, 512, side, None, None, "of the size of the 1x1 conv, as Sec. 5.1 says"),
        ("EMAU alone", EMAU(512), 512, side, None, None, "about a third of the 3x3 conv, as Sec. 5.1 says"),
        ("1x1 conv 512-512", nn.Conv2d(512, 512, 1), 512, side, None, None, ""),
        ("3x3 conv 512-512", nn.Conv2d(512, 512, 3, padding=1), 512, side, None, None, ""),
        ("Non-local block", NonLocal(512), 512, side, None, None, "keeps an N x N map"),
        ("A2 block (K=64)", A2Block(512), 512, side, None, None, "")]


def print_table():
    """Table 1 as counted from this code, beside the paper's figures."""
    print("Per image of 513x513. GMAC: thousand million multiply-adds (the paper calls them FLOPs). MB: kept for the\n"
          "backward pass, float32. The paper's parameters and ours count the K*C bases.\n")
    print(f"{'':34s}{'GMAC':>8s}{'paper':>7s}{'M param':>9s}{'paper':>7s}{'MB kept':>9s}")
    for name, module, channels, size, paper_macs, paper_params, remark in table_rows():
        macs, params, kept = cost(module, channels, size)
        print(f"{name:34s}{macs / 1e9:8.2f}{paper_macs or '-':>7}{params / 1e6:9.3f}{paper_params or '-':>7}"
              f"{kept / 1e6:9.1f}   {remark}".rstrip())


def print_growth(sides=(33, 65, 97, 129)):
    """How the three blocks grow with the number of positions."""
    print("\nGrowth with the number of positions N:  GMAC (MB kept)")
    print(f"{'':34s}" + "".join(f"{f'{s}x{s}':>18s}" for s in sides))
    for name, block in (("EMAU", EMAU), ("A2 block", A2Block), ("Non-local block", NonLocal)):
        each = [cost(block(512), 512, s) for s in sides]
        print(f"{name:34s}" + "".join(f"{macs / 1e9:9.2f} ({kept / 1e6:6.0f})" for macs, _, kept in each))


def main(argv=None):
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    with FakeTensorMode():
        print_table()
        print_growth()


if __name__ == "__main__":
    run(main)
