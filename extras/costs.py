"""Counts what the attention costs, beside the figures of the paper's Table 1 and Sec. 5.1.

    python -m extras.costs

Nothing is computed: under FakeTensorMode tensors have shapes and devices, but no numbers.
"""
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from backbone import DilatedResNet
from ema import EMAU, conv_bn_relu
from extras.relatives import A2Block, NonLocal


def cost(module, channels, side, batch=2):
    """Per image of (channels, side, side): multiply-adds, parameters with the bases, and bytes kept
    for the backward pass. Call it under FakeTensorMode."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage                      # each storage once
        return tensor

    x = torch.empty(batch, channels, side, side, requires_grad=True)
    with (FlopCounterMode(display=False) as counter,
          torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)):
        module.train()(x)
    macs = counter.get_total_flops() / 2 / batch            # it counts a multiply-add as two
    parameters = {t.untyped_storage()._cdata for t in [*module.parameters(), *module.buffers()]}
    memory = sum(storage.nbytes() for key, storage in kept.items() if key not in parameters) / batch
    bases = sum(b.numel() for name, b in module.named_buffers() if name.split(".")[-1] == "mu")
    return macs, sum(p.numel() for p in module.parameters()) + bases, memory


def table_rows():
    """Name, module, channels, side, the paper's multiply-adds (G) and parameters (M), remark."""
    resnet, em = DilatedResNet("resnet101", "deep"), EMAU(512)
    em.conv1 = em.conv2 = nn.Identity()
    head256 = nn.Sequential(conv_bn_relu(2048, 256), EMAU(256))
    head512 = nn.Sequential(conv_bn_relu(2048, 512), EMAU(512))
    decoder = nn.Sequential(head512, conv_bn_relu(512, 256))
    return [  # 513 pixels are 65 at stride 8
        ("ResNet-101, stride 8, deep stem", resnet, 3, 513, 190.6, 42.6, "the base of all"),
        ("+ EMANet(256): 3x3 + EMAU", head256, 2048, 65, 21.1, 4.87, ""),
        ("+ EMANet(512): 3x3 + EMAU", head512, 2048, 65, 43.1, 10.0, ""),
        ("+ EMANet(512), released decoder", decoder, 2048, 65, "-", "-",
         "Table 1 has no second 3x3"),
        ("+ DeepLabV3 head (torchvision)", DeepLabHead(2048, 21), 2048, 65, 63.4, 15.5,
         "with 3x3 and classifier, rates 12, 24, 36"),
        ("EM iterations alone (K=64, T=3)", em, 512, 65, "-", "-", "about the 1x1 conv (Sec. 5.1)"),
        ("EMAU alone", EMAU(512), 512, 65, "-", "-", "about a third of the 3x3 conv (Sec. 5.1)"),
        ("1x1 conv 512-512", nn.Conv2d(512, 512, 1), 512, 65, "-", "-", ""),
        ("3x3 conv 512-512", nn.Conv2d(512, 512, 3, padding=1), 512, 65, "-", "-", ""),
        ("Non-local block", NonLocal(512), 512, 65, "-", "-", "keeps an N x N map"),
        ("A2 block (K=64)", A2Block(512), 512, 65, "-", "-", "")]


def print_table():
    print("Per image of 513x513. GMAC: 10^9 multiply-adds, which the paper calls FLOPs.\n"
          "MB: kept for the backward pass in float32. Parameters include the K*C bases, as in the "
          f"paper.\n\n{'':34s}{'GMAC':>8s}{'paper':>7s}{'M param':>9s}{'paper':>7s}{'MB':>9s}")
    for name, module, channels, side, paper_macs, paper_params, remark in table_rows():
        macs, params, memory = cost(module, channels, side)
        print(f"{name:34s}{macs / 1e9:8.2f}{paper_macs:>7}{params / 1e6:9.3f}{paper_params:>7}"
              f"{memory / 1e6:9.1f}   {remark}".rstrip())


def main():
    with FakeTensorMode():
        print_table()


if __name__ == "__main__":
    main()
