"""What a user may rely on, in the order of the paper; then command lines and bad input. No data, network or GPU needed.

    python -m pytest                                   # the ordinary tests
    SLOW=1 python -m pytest                            # the long ones as well

What the tests are made with (fixtures, tiny data sets, processes) is at the end of the file.
"""
import contextlib
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import traceback
import urllib.request
from functools import partial
from pathlib import Path
from unittest.mock import Mock

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}    # for children too
import numpy as np
import pytest
import scipy.io
import scipy.sparse
import scipy.special
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import data
import ema
import evaluate
import train
import visualize
from backbone import DilatedResNet, UserError
from data import Schedule, TrainView, build_dataset
from ema import EMAU, A2Block, EMANet, NonLocal, from_released, load_checkpoint, save_checkpoint

HERE = Path(__file__).resolve().parent
slow = pytest.mark.skipif(os.environ.get("SLOW") != "1", reason="takes long: set SLOW=1")


# ---- Secs. 3.1, 3.2 and 4.1: the E-step, and the whole unit against the equations
@pytest.mark.parametrize("channels, bases, iterations, lam",
                         [(6, 5, 3, 1.0), (3, 1, 1, 1.0), (4, 9, 2, 0.3), (8, 4, 7, 5.0)])
def test_unit_equals_the_equations(channels, bases, iterations, lam):
    """Eqs. 10-14: EMAU's output is that of a slow version written from the equations, for several C, K, T, lambda."""
    unit = make_unit(channels, bases, iterations, lam)
    images = torch.randn(2, channels, 4, 7).double()
    expected = torch.stack([oracle(unit, image) for image in images])
    assert torch.allclose(unit(images), expected, rtol=0, atol=1e-9)
    assert torch.allclose(unit.float()(images.float()).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [1e3, 1e-6, 0])
def test_unit_equals_the_equations_on_extreme_inputs(scale):
    """Eqs. 10-14: huge, tiny, constant and zero features give the numbers of the equations, and never nan."""
    unit = make_unit(bases=12)
    image = torch.randn(6, 5, 4).double() * scale
    assert torch.allclose(unit(image[None])[0], oracle(unit, image), rtol=1e-9, atol=1e-9)
    constant = torch.full((6, 5, 4), 3.0).double() * scale
    assert torch.allclose(unit(constant[None])[0], oracle(unit, constant), rtol=1e-9, atol=1e-9)
    unit.conv1.bias.data.zero_()                              # x = 0 for scale 0: all bases become empty
    assert torch.allclose(unit(constant[None])[0], oracle(unit, constant), rtol=1e-9, atol=1e-9)


def oracle(unit, image):
    """EMAU's forward in eval mode for one image (C, H, W), in loops from Eqs. 10-14 and Secs. 5.1 and 5.3."""
    weights = {key: value.double().numpy() for key, value in unit.state_dict().items()}
    residual = image.double().numpy().reshape(len(image), -1).T                # (N, C)
    x = residual @ weights["conv1.weight"][:, :, 0, 0].T + weights["conv1.bias"]
    mu = weights["mu"][0].T.copy()                                             # (K, C)
    for _ in range(unit.iterations):
        z = np.zeros((len(x), len(mu)))
        for n in range(len(x)):                                                # Eqs. 10-12
            exponents = [unit.lam * sum(x[n] * mu[k]) for k in range(len(mu))]
            kernels = [math.exp(e - max(exponents)) for e in exponents]
            z[n] = [kernel / sum(kernels) for kernel in kernels]
        for k in range(len(mu)):                                               # Eq. 13, then L2Norm
            mass = sum(z[n, k] for n in range(len(x)))
            mean = sum(z[n, k] * x[n] for n in range(len(x))) / mass if mass else np.zeros(x.shape[1])
            # A basis whose pixels add up to next to nothing is empty, and zero; it must not become a nan.
            mu[k] = mean / (math.sqrt(sum(mean * mean)) + (1e-12 / mass if mass else 1))
    x = np.stack([sum(z[n, k] * mu[k] for k in range(len(mu))) for n in range(len(x))])    # Eq. 14
    x = np.maximum(x, 0) @ weights["conv2.0.weight"][:, :, 0, 0].T
    x = (x - weights["conv2.1.running_mean"]) / np.sqrt(weights["conv2.1.running_var"] + 1e-5)
    x = x * weights["conv2.1.weight"] + weights["conv2.1.bias"]
    return torch.from_numpy(np.maximum(residual + x, 0).T.reshape(image.shape))


def test_responsibilities_sum_to_one():
    """Eq. 10: over the bases, the responsibilities for a pixel sum to one, in every round."""
    unit = make_unit()
    rounds = list(unit.em(torch.randn(2, 30, 6).double() * 3))
    assert len(rounds) == 3
    for z, _ in rounds:
        assert z.shape == (2, 30, 5) and (z >= 0).all() and torch.allclose(z.sum(2), torch.ones(2, 30).double())


def test_permuted_pixels_give_permuted_output():
    """Sec. 3.2: attention knows no positions, so that shuffling the pixels shuffles the output alike."""
    unit, x, order = make_unit(), torch.randn(1, 6, 5, 8).double(), torch.randperm(40)
    permuted = x.flatten(2)[:, :, order].view_as(x)
    assert torch.allclose(unit(permuted).flatten(2), unit(x).flatten(2)[:, :, order], atol=1e-12)


def test_batch_equals_its_images_one_by_one():
    """Sec. 3.2: every image has its own bases; its neighbours in the batch do not matter in eval mode."""
    torch.manual_seed(0)
    unit, images = EMAU(16, 8).eval(), torch.randn(3, 16, 9, 7)
    assert torch.allclose(unit(images), torch.cat([unit(image[None]) for image in images]), rtol=0, atol=1e-5)


def test_memory_grows_with_pixels_times_bases():
    """Sec. 3.2: no step holds an N x N matrix; the largest tensor is N x C or N x K, in training too."""
    unit, x = EMAU(16, 24).train(), torch.randn(2, 16, 40, 50, requires_grad=True)
    with Watched() as watched:
        unit(x).sum().backward()
    assert watched.numel == 2 * 40 * 50 * 24


class Watched(TorchDispatchMode):
    """The largest tensor that is made, and the dtypes of batched matrix products."""

    def __init__(self):
        super().__init__()
        self.numel, self.products = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *(t.numel() for t in tensors)])
        if "bmm" in str(function):
            self.products |= {t.dtype for t in tensors}
        return result


@pytest.mark.parametrize("channels, lam", [(3, 1.0), (6, 0.3), (8, 12.0)])
def test_e_step_is_that_of_a_mixture_on_the_sphere(channels, lam):
    """Sec. 3.2: for pixels of length one, Eq. 12 is the posterior of equally likely von Mises-Fisher distributions of
    concentration lambda, and the M-step with L2Norm their maximum of likelihood."""
    unit, x = random_em(0, 1, 40, channels, 5, 1, lam)
    x, mu = F.normalize(x, dim=2), unit.mu
    density = np.exp(von_mises_fisher(x[0].numpy(), mu[0].T.numpy(), lam))
    posterior = density / density.sum(1, keepdims=True)
    z = unit.e_step(x, mu)
    assert np.abs(z[0].numpy() - posterior).max() < 1e-12

    def expected_likelihood(mu):                                               # (C, K)
        return (posterior * von_mises_fisher(x[0].numpy(), mu.T.numpy(), lam)).sum()
    best = unit.m_step(x, z)[0]
    others = F.normalize(best + 0.1 * torch.randn(200, channels, 5).double(), dim=1)
    assert all(expected_likelihood(other) < expected_likelihood(best) for other in others)


def von_mises_fisher(x, mu, concentration):
    """log of the density on the sphere, of directions x (N, C) around mu (K, C): (N, K)."""
    C = x.shape[1]
    order = C / 2 - 1
    bessel = np.log(scipy.special.ive(order, concentration)) + concentration           # ive: scaled by exp(-kappa)
    return concentration * x @ mu.T + order * np.log(concentration) - C / 2 * np.log(2 * np.pi) - bessel


@pytest.mark.parametrize("lam", [0.5, 1.0, 7.0])
def test_gaussian_kernel_is_the_same(lam):
    """Sec. 4.1: with bases of length one, the kernel exp(-lambda/2 |x - mu|^2) gives the responsibilities of Eq. 12."""
    unit, x = random_em(1, 2, 30, 6, 5, 3, lam)
    for mu in [unit.mu] + [mu for _, mu in unit.em(x)]:
        gaussian = torch.softmax(-lam / 2 * (x[:, :, None] - mu.transpose(1, 2)[:, None]).square().sum(3), 2)
        assert torch.allclose(gaussian, unit.e_step(x, mu), rtol=0, atol=1e-10)


def test_cold_limit_is_k_means():
    """Sec. 4.1: for lambda to infinity the rounds are those of K-means on directions, as L2Norm makes it."""
    for seed in range(4):
        unit, x = random_em(seed, 1, 60, 4, 6, 10, 1e9)
        centres, pixels = unit.mu[0].T.numpy(), x[0].numpy()
        for z, mu in unit.em(x):
            nearest = np.array([max(range(6), key=lambda k: sum(pixel * centres[k])) for pixel in pixels])
            sums = np.stack([pixels[nearest == k].sum(0) for k in range(6)])
            centres = sums / np.maximum(np.sqrt((sums ** 2).sum(1, keepdims=True)), 1e-300)
            assert (z.max(2)[0] == 1).all() and np.array_equal(z[0].argmax(1), nearest)
            assert np.abs(mu[0].T.numpy() - centres).max() < 1e-12


# ---- Secs. 3.1 and 4: the likelihood, and what it costs
def test_likelihood_never_falls():
    """Secs. 3.1 and 4: the rounds are EM: in none of 500 random cases does the likelihood fall in any of 20 rounds. It
    is L2Norm that makes them so: with the plain mean of Eq. 13 it does fall in many."""
    assert sum(falls(seed, "l2") for seed in range(20)) == 0
    assert sum(falls(seed, "none") for seed in range(20)) > 100


def falls(seed, base_norm):
    """In how many of 25 random cases the likelihood falls in one of 20 rounds, for one size and temperature."""
    rng = np.random.default_rng(seed)
    channels, bases, lam, scale = rng.integers(2, 12), rng.integers(2, 12), rng.uniform(0.2, 4), rng.uniform(0.3, 3)
    unit, x = random_em(seed, 25, int(rng.integers(10, 60)), channels, bases, 20, lam, scale, base_norm=base_norm)
    likelihood = torch.stack([torch.logsumexp(lam * x @ mu, 2).sum(1) for mu in
                              [unit.mu.repeat(25, 1, 1), *(mu for _, mu in unit.em(x))]])       # (21, 25)
    assert base_norm == "none" or (likelihood[-1] > likelihood[0]).all()
    return (likelihood.diff(dim=0) < -1e-9 * likelihood[1:].abs()).any(0).sum().item()


def test_cost_is_linear_in_the_pixels():
    """Sec. 4: EMAU's multiply-adds grow as N, by 2 T + 1 products of x with the bases, and so do the A2 block's;
    Non-local's as N * N."""
    def macs(block, side):
        with FlopCounterMode(display=False) as counter:
            block(torch.zeros(1, 32, side, side))
        return counter.get_total_flops() / 2
    for N in (9 * 9, 18 * 18):
        assert macs(EMAU(32, 8), math.isqrt(N)) == N * (2 * 32 * 32 + (2 * 3 + 1) * 32 * 8)
        assert macs(A2Block(32, 8), math.isqrt(N)) == N * (2 * 32 * 32 + 4 * 32 * 8)
        assert macs(NonLocal(32), math.isqrt(N)) == N * 4 * 32 * 16 + 2 * N ** 2 * 16


# ---- Secs. 4.2 and 4.3: the M-step, and the re-estimation from few bases
def test_bases_have_length_one():
    """Secs. 4.2, 5.3: every basis that holds pixels has length one after every round."""
    for _, mu in make_unit().em(torch.randn(2, 30, 6).double() * 3):
        assert mu.shape == (2, 6, 5) and torch.allclose(mu.norm(dim=1), torch.ones(2, 5).double())


def test_variance_falls():
    """Sec. 4.3: for given bases of length one and lambda <= 1 the variance of any set of re-estimated pixels falls."""
    for seed, lam in ((0, 1.0), (1, 1.0), (2, 0.4)):
        unit, x = random_em(seed, 1, 60, 5, 7, 3, lam)
        *_, (_, mu) = unit.em(x)
        again = unit.e_step(x, mu) @ mu.transpose(1, 2)
        for size in (2, 3, 10, 60) * 50:
            chosen = torch.randperm(60)[:size]
            assert again[0, chosen].var(0).sum() < x[0, chosen].var(0).sum()


# ---- Sec. 5.1: the unit
def test_init_is_the_released_one():
    """Sec. 5.1: both 1x1 convolutions start with deviation sqrt(2 / C), the temperature of the E-step; bases with
    length one."""
    torch.manual_seed(0)
    unit = EMAU(256, 64)
    for conv in (unit.conv1, unit.conv2[0]):
        assert abs(conv.weight.std().item() / math.sqrt(2 / 256) - 1) < 0.02 and abs(conv.weight.mean()) < 1e-3
    assert unit.mu.shape == (1, 256, 64) and torch.allclose(unit.mu.norm(dim=1), torch.ones(1, 64))
    assert unit.conv1.bias is not None and unit.conv2[0].bias is None
    assert (unit.iterations, unit.lam, unit.alpha) == (3, 1.0, 0.9)


def test_first_convolution_is_frozen():
    """Sec. 5.1: no gradient passes the EM rounds, so the first convolution says that it wants none and never moves."""
    torch.manual_seed(0)
    unit = EMAU(8, 4).train()
    before = {name: p.clone() for name, p in unit.named_parameters()}
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        unit(torch.randn(2, 8, 5, 5)).square().mean().backward()
        optimizer.step()
    for name, p in unit.named_parameters():
        frozen = name.startswith("conv1")
        assert p.requires_grad == (not frozen) and (p.grad is None) == frozen
        assert torch.equal(p, before[name]) == frozen, name


def test_no_relu_before_the_iterations():
    """Sec. 5.1: no ReLU before EM, so that the inner products of the unit's pixels with its bases have both signs."""
    unit, seen = make_unit(), []
    unit.e_step = lambda x, mu: seen.append(x @ mu) or EMAU.e_step(unit, x, mu)
    unit(torch.randn(2, 6, 8, 10).double())
    assert len(seen) == 3 and all(products.min() < -1 and products.max() > 1 for products in seen)


# ---- Sec. 5.2: the moving average of the bases
def test_bases_follow_the_moving_average():
    """Eq. 15: after 20 training steps mu^(0) is that of a loop written from the equation: the batch's mean of mu^(T), as
    it is, and momentum 0.9. No norm, so that bases that differ between images leave it shorter than one. An image looked
    at in eval mode does not move it."""
    unit = make_unit().train()
    expected = unit.mu.clone()
    for _ in range(20):
        images = torch.randn(4, 6, 3, 5).double()
        x = torch.einsum("bchw,dc->bhwd", images, unit.conv1.weight[:, :, 0, 0]).flatten(1, 2) + unit.conv1.bias
        total = torch.zeros(6, 5).double()
        for image in x:                                       # (N, C)
            mu = expected[0]                                  # (C, K): every image begins with the same bases
            for _ in range(3):
                kernel = (image @ mu).exp()
                mu = image.T @ (kernel / kernel.sum(1, keepdim=True))
                mu = mu / (mu ** 2).sum(0).sqrt()
            total += mu
        expected = 0.9 * expected + 0.1 * total[None] / 4
        unit(images)
        assert torch.allclose(unit.mu, expected, rtol=0, atol=1e-9)
    unit.eval()(images)
    assert torch.allclose(unit.mu, expected, rtol=0, atol=1e-9) and unit.mu.norm(dim=1).max() < 0.95


def test_two_processes_share_their_bases(pair):
    """Eq. 15: the mean runs over the global batch: two processes end with the bases of one that had all images; without
    a norm, which would hide a mean that is too long."""
    first, second = (results["bases"] for results in pair)
    assert torch.equal(first, second)
    assert torch.allclose(first, follow_bases(slice(None)), rtol=0, atol=1e-6)


def follow_bases(part):
    """The bases after three batches, of which this process sees a part; BN in eval mode."""
    torch.manual_seed(0)
    unit = EMAU(8, 4, base_norm="none").train()
    unit.conv2[1].eval()
    for images in torch.randn(3, 4, 8, 5, 7):
        unit(images[part])
    return unit.mu


@pytest.mark.parametrize("base_update", ["average", "backprop", "fixed"])
def test_bases_are_kept_as_told(base_update):
    """Sec. 5.2: training moves mu^(0) by the average, by its gradient, or not at all."""
    torch.manual_seed(0)
    unit = EMAU(8, 4, base_update=base_update, gradient="full").train()
    before = unit.mu.clone()
    learned = [name for name, _ in unit.named_parameters() if name == "mu"]
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.1)
    unit(torch.randn(2, 8, 5, 5)).square().mean().backward()
    moved = not torch.equal(unit.mu, before)                  # before the optimizer's step
    optimizer.step()
    assert moved == (base_update == "average") and learned == ["mu"] * (base_update == "backprop")
    assert torch.equal(unit.mu, before) == (base_update == "fixed")


@pytest.mark.parametrize("block", [partial(EMAU, num_bases=16), NonLocal])
def test_sums_over_pixels_stay_in_float32_under_autocast(block):
    """Eqs. 9 and 12-15: sums over thousands of pixels are in float32, whatever the precision around, and so is mu^(0)."""
    unit = block(32).train()
    with torch.autocast("cpu", torch.bfloat16), Watched() as watched:
        unit(torch.randn(2, 32, 20, 20))
    assert watched.products == {torch.float32} and getattr(unit, "mu", torch.zeros(1)).dtype == torch.float32


# ---- Sec. 5.2: gradients through the rounds
@pytest.mark.parametrize("base_norm", ["l2", "layer", "none"])
def test_full_gradient_is_that_of_the_output(base_norm):
    """Sec. 5.2: with gradient full, the derivatives by input, first convolution and mu^(0) are the output's, by finite
    differences in float64, after three rounds."""
    unit = make_unit(3, 2, lam=0.7, base_norm=base_norm, base_update="backprop", gradient="full")
    wanted = {name: p.detach().clone().requires_grad_() for name, p in unit.named_parameters()
              if name in ("mu", "conv1.weight", "conv1.bias")}

    def output(x, *values):
        return torch.func.functional_call(unit, dict(zip(wanted, values, strict=True)), x)
    images = torch.randn(2, 3, 3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(output, (images, *wanted.values()), atol=1e-6)


def test_last_gradient_is_that_of_the_last_e_step():
    """The last E-step's gradient is that of softmax(lambda x mu^(T-1)) mu^(T)^T with the bases held constant."""
    unit = make_unit(lam=0.7, gradient="last")
    images = torch.randn(2, 6, 4, 5).double().requires_grad_()
    direction = torch.randn(2, 6, 4, 5).double()
    (unit(images) * direction).sum().backward()
    ours = [images.grad, unit.conv1.weight.grad, unit.conv1.bias.grad, unit.conv2[0].weight.grad]

    copy = images.detach().requires_grad_()
    weight, bias, second = (p.detach().clone().requires_grad_() for p in
                            (unit.conv1.weight, unit.conv1.bias, unit.conv2[0].weight))
    x = torch.einsum("bchw,dc->bhwd", copy, weight[:, :, 0, 0]).flatten(1, 2) + bias   # (B, N, C)
    mu = [np.repeat(unit.mu.numpy(), 2, 0)]                                            # (B, C, K) each
    for _ in range(3):
        kernel = np.exp(0.7 * x.detach().numpy() @ mu[-1])
        y = x.detach().numpy().transpose(0, 2, 1) @ (kernel / kernel.sum(2, keepdims=True))
        mu.append(y / np.sqrt((y ** 2).sum(1, keepdims=True)))
    before, last = (torch.from_numpy(m) for m in mu[-2:])
    x = (torch.softmax(0.7 * x @ before, 2) @ last.transpose(1, 2)).relu()
    x = (x @ second[:, :, 0, 0].T).transpose(1, 2).view_as(copy)
    x = F.relu(copy + unit.conv2[1](x))
    (x * direction).sum().backward()
    theirs = [copy.grad, weight.grad, bias.grad, second.grad]
    assert all(torch.allclose(a, b, rtol=0, atol=1e-10) and b.abs().max() > 1e-3 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("training", [False, True])
def test_gradients_have_the_same_output(training):
    """The three gradients give the same output and move the bases alike; the first convolution learns but with none.
    In training the bases change in place and the backward pass does not mind."""
    outputs, bases, learned = [], [], {}
    images = torch.randn(2, 6, 4, 5).double()
    for gradient in ("none", "last", "full"):
        unit = make_unit(gradient=gradient).train(training)
        for _ in range(2):
            output = unit(images)
            output.sum().backward()
        outputs, bases = [*outputs, output], [*bases, unit.mu]
        learned[gradient] = unit.conv1.weight.grad is not None
    assert all(torch.equal(outputs[0], o) and torch.equal(bases[0], b) for o, b in zip(outputs, bases, strict=True))
    assert learned == {"none": False, "last": True, "full": True}


# ---- Sec. 5.3: the norm of the bases
def test_norms_of_the_bases():
    """Sec. 5.3: L2Norm keeps the direction of every basis, LayerNorm turns it; "none" is Eq. 13 as it stands."""
    torch.manual_seed(0)
    x, z = torch.randn(2, 30, 6).double() + 0.5, torch.rand(2, 30, 5).softmax(2).double()
    mean = torch.stack([(z[b, :, k, None] * x[b]).sum(0) / z[b, :, k].sum() for b in range(2) for k in range(5)])
    mean = mean.unflatten(0, (2, 5)).transpose(1, 2)                                   # (B, C, K)
    l2, layer, none = (make_unit(base_norm=norm).m_step(x, z) for norm in ("l2", "layer", "none"))
    assert torch.allclose(none, mean, rtol=1e-5)
    assert torch.allclose(F.cosine_similarity(l2, mean, dim=1), torch.ones(2, 5).double(), atol=1e-12)
    assert torch.allclose(layer, (mean - mean.mean(1, True)) / mean.std(1, correction=0, keepdim=True), atol=2e-3)
    assert F.cosine_similarity(layer, mean, dim=1).max() < 0.95


# ---- Sec. 5.4: the relatives
def test_non_local_is_the_re_estimation_from_all_pixels():
    """Sec. 5.4: Non-local with identities as projections is Eq. 14 with the N pixels as bases, exactly."""
    block, unit, x = NonLocal(6).double(), make_unit(6), torch.randn(2, 6, 4, 5).double()
    block.theta = block.phi = block.g = block.out = nn.Identity()
    pixels = x.flatten(2).transpose(1, 2)                                              # (B, N, C)
    bases = pixels.transpose(1, 2)                                                     # (B, C, K = N)
    again = (unit.e_step(pixels, bases) @ bases.transpose(1, 2)).transpose(1, 2).view_as(x)
    assert torch.equal(block(x), F.relu(x + again))


def test_a2_block_gathers_and_distributes():
    """Eq. 16: K vectors are means of phi(x) weighted by a softmax over the pixels; a pixel gets its softmax over them."""
    torch.manual_seed(0)
    block, x = A2Block(6, 5).double().eval(), torch.randn(2, 6, 4, 5).double()
    phi, theta, rho = (F.conv2d(x, conv.weight, conv.bias).flatten(2).transpose(1, 2)
                       for conv in (block.phi, block.theta, block.rho))                # (B, N, .)
    gather = theta.exp() / theta.exp().sum(1, keepdim=True)
    distribute = rho.exp() / rho.exp().sum(2, keepdim=True)
    bases = torch.einsum("bnk,bnc->bkc", gather, phi)
    y = torch.einsum("bnk,bkc->bcn", distribute, bases).view_as(x)
    assert torch.allclose(block(x), F.relu(x + block.out(y)), rtol=0, atol=1e-12)


def test_every_option_trains_in_two_processes(pair):
    """Secs. 5.2 and 5.4: DistributedDataParallel takes every gradient, update and relative: no parameter is left without
    its gradient, and both processes hold the same weights and bases."""
    first, second = (results["options"] for results in pair)
    assert len(first) == len(second) == 7
    for mine, others in zip(first, second, strict=True):
        assert all(torch.equal(value, others[key]) for key, value in mine.items())


# ---- Sec. 6.1: the network
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_dilation_rates(name):
    """Sec. 6.1: output stride 8 and 16 come from the released network's dilation rates, multi-grid included."""
    def rates(layer):
        found = [[m for m in block.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)] for block in layer]
        assert all(conv.padding == conv.dilation == convs[0].dilation for convs in found for conv in convs)
        return [convs[0].dilation[0] for convs in found]
    with torch.device("meta"):
        net = DilatedResNet(name, output_stride=8)
    depth3, depth4 = len(net.layer3), len(net.layer4)
    assert rates(net.layer1) + rates(net.layer2) == [1] * (len(net.layer1) + len(net.layer2))
    assert rates(net.layer3) == [1] + [2] * (depth3 - 1) and rates(net.layer4) == [2, 8, 16][:depth4]
    net.set_output_stride(16)
    assert rates(net.layer3) == [1] * depth3 and rates(net.layer4) == [1, 4, 8][:depth4]
    with pytest.raises(UserError, match="output stride 4"):
        net.set_output_stride(4)


@pytest.mark.parametrize("name, stem", [("resnet18", "7x7"), ("resnet18", "deep"), ("resnet50", "7x7")])
@pytest.mark.parametrize("stride, layers", [(8, 4), (16, 4), (32, 4), (8, 2)])
def test_feature_map_sizes(name, stem, stride, layers):
    """Sec. 6.1: the features are ceil(H / S) x ceil(W / S), so that S k + 1 pixels give k + 1 features; a network that ends
    after layer2 has a quarter of the channels, and stride 8 alone."""
    with torch.device("meta"):
        net = DilatedResNet(name, stem, output_stride=stride, layers=layers)
        features = net(torch.zeros(1, 3, 97, 66))
    channels = (2048 if name == "resnet50" else 512) // (1 if layers == 4 else 4)
    assert features.shape == (1, channels, -(-97 // stride), -(-66 // stride)) and net.out_channels == channels
    if layers == 2:
        with pytest.raises(UserError, match="output stride 16 is not available: choose 8$"):
            net.set_output_stride(16)


def test_deep_stem_starts_as_torchvision_s_convolutions_do():
    """Sec. 6.1: the deep stem's own convolutions have He's init, deviation sqrt(2 / fan out), as all others have."""
    torch.manual_seed(0)
    net = DilatedResNet("resnet50", "deep")
    for conv in (net.conv1[0], net.conv1[3], net.conv1[6], net.layer1[0].conv1, net.layer1[0].downsample[0]):
        wanted = math.sqrt(2 / (conv.out_channels * conv.kernel_size[0] ** 2))
        assert abs(conv.weight.std().item() / wanted - 1) < 0.06, conv


def test_output_stride_of_a_trained_network_can_change():
    """Sec. 6.1: train at 16, evaluate at 8: the same weights in a network built for 8 give the same logits."""
    net, images = small_net(output_stride=16).eval(), torch.randn(1, 3, 65, 49)
    twin = EMANet(**net.config | {"output_stride": 8}).eval()
    twin.load_state_dict(net.state_dict())
    with torch.no_grad():
        at_16 = net(images)
        net.set_output_stride(8)
        assert torch.equal(net(images), twin(images)) and not torch.allclose(net(images), at_16, atol=1e-3)
        net.set_output_stride(16)
        assert torch.equal(net(images), at_16)


def test_logits_have_the_size_of_the_images():
    """Sec. 6.1: bilinear upsampling with align_corners=True, to any size; the attention can be left out."""
    net, images = small_net(attention="none").eval(), torch.randn(2, 3, 41, 30)
    assert not any("attention" in name for name in net.state_dict())
    with torch.no_grad():
        logits = net(images)
        features = net.classifier(net.reduce(net.backbone(images)))
    assert torch.allclose(logits, F.interpolate(features, (41, 30), mode="bilinear", align_corners=True))


def test_decoder_drops_a_tenth_of_its_channels(tiny):
    """The released decoder: 256 channels, in training a tenth of them dropped whole; no decoder, nothing dropped."""
    net, seen = small_net(decoder=True), []
    net.classifier.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    net.decoder[1].bias.data.fill_(9)                         # all channels alive
    images = torch.randn(8, 3, 65, 65)
    net.train()(images)
    net.eval()(images)
    dropped, kept = ((features == 0).flatten(2).all(2).float() for features in seen)       # (B, 256)
    assert dropped.shape == (8, 256) and abs(dropped.mean() - 0.1) < 0.03 and kept.max() == 0


def test_checkpoint_comes_back_the_same(tmp_path):
    """A saved network loads with its weights, options and BN momentum, in eval mode."""
    net = small_net(decoder=True, lam=0.5, em_iterations=2, stem="deep", bn_momentum=0.2)
    write_net(net, tmp_path / "model.pth", {"dataset": "folder", "classes": ["a", "b", "c", "d"]})
    again = load_checkpoint(tmp_path / "model.pth")
    assert again.config == net.config and not again.training
    assert again.trained_on == {"dataset": "folder", "classes": ["a", "b", "c", "d"]}
    assert again.attention.lam == 0.5 and {m.momentum for m in again.modules() if isinstance(m, nn.BatchNorm2d)} == {0.2}
    assert all(torch.equal(again.state_dict()[key], value) for key, value in net.state_dict().items())


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    """A checkpoint reaches the disk before it takes the old one's place; a save that breaks off leaves the old one."""
    order, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: order.append("fsync") or sync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: order.append("replace") or replace(*paths))
    save_checkpoint({"net": {"old": torch.ones(3)}}, tmp_path / "model.pth")
    assert order == ["fsync", "replace"]
    with pytest.raises(Exception, match="lambda"):
        save_checkpoint({"net": {"new": torch.zeros(9)}, "broken": lambda: None}, tmp_path / "model.pth")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="cannot write .*model.pth.*No space"):
        save_checkpoint({"net": {}}, tmp_path / "model.pth")
    assert torch.equal(torch.load(tmp_path / "model.pth")["net"]["old"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


# The released checkpoints
def test_released_checkpoint_computes_what_the_released_network_does(released):
    """Sec. 6.1: a released file loads as it is, and its logits are those of the released code; evaluate.py asks what it was
    trained on."""
    state, path, images, theirs = released
    net = load_checkpoint(path)
    expected = {"num_classes": 21, "backbone": "resnet50", "stem": "deep", "channels": 512, "num_bases": 64,
                "decoder": True, "output_stride": 8, "em_iterations": 3, "lam": 1.0}
    assert len(state) == 353 and expected.items() <= net.config.items() and net.trained_on == {} and not net.training
    with torch.no_grad():
        assert (net.double()(images) - theirs).abs().max() < 2e-5 * theirs.std()
    fail(evaluate, f"--ckpt {path}", "--dataset")


def test_released_resnet101_is_read_off_the_names():
    """Sec. 6.1: depth and number of classes of a released network come from its tensors; also behind `module.`"""
    with torch.device("meta"):
        state = {}
        released_logits(state, torch.zeros(1, 3, 33, 33), (3, 4, 23, 3), 60)
        mapped, config = from_released({f"module.{key}": value for key, value in state.items()})
        shapes = {key: value.shape for key, value in EMANet(**config).state_dict().items()}
    assert len(state) == 659 and (config["backbone"], config["num_classes"]) == ("resnet101", 60)
    assert {key: value.shape for key, value in mapped.items()} == shapes


@pytest.mark.parametrize("change", ["fc2.bias", "extractor.6.3.conv2.weight", "emau.mu", "fc1.0.bn.weight", "foreign"])
def test_changed_released_checkpoint_is_refused(released, change, tmp_path):
    """Sec. 6.1: a released file with an entry too few, or one that is not the network's, is an error and no guess."""
    state = dict(released[0])
    if state.pop(change, None) is None:
        state["fc3.weight"] = torch.zeros(1)
    torch.save({"net": state, "step": 30000}, tmp_path / "changed.pth")
    with pytest.raises(UserError, match="changed.pth"):
        load_checkpoint(tmp_path / "changed.pth")


# Weights of the backbone
@pytest.mark.parametrize("stem, other", [("7x7", "deep"), ("deep", "7x7")])
def test_backbone_weights_from_a_file(stem, other, tmp_path):
    """Sec. 6.1: ImageNet weights from a file, torchvision's layout or the deep stem's; the rest is an error."""
    source = (torchvision.models.resnet18() if stem == "7x7" else DilatedResNet("resnet18", stem)).state_dict()
    torch.save(source | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, tmp_path / "weights.pth")
    net = DilatedResNet("resnet18", stem, tmp_path / "weights.pth")
    assert "weights.pth" in net.weights_origin
    assert all(torch.equal(value, source[key]) for key, value in net.state_dict().items())
    with pytest.raises(UserError, match=f"--stem {stem}"):
        DilatedResNet("resnet18", other, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="does not fit resnet34"):
        DilatedResNet("resnet34", stem, tmp_path / "weights.pth")


def test_hash_in_the_name_of_a_weights_file_is_checked(tmp_path):
    """Sec. 6.1: published files carry the beginning of their SHA-1 or SHA-256; one that does not match is damaged."""
    content = resnet18_file()
    for digest in (hashlib.sha1(content).hexdigest(), hashlib.sha256(content).hexdigest()):
        path = tmp_path / f"resnet18-{digest[:8]}.pth"
        path.write_bytes(content)
        assert DilatedResNet("resnet18", weights=path).weights_origin == str(path)
    path = tmp_path / "resnet18-deadbeef.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="resnet18-deadbeef.pth.*hash"):
        DilatedResNet("resnet18", weights=path)


def test_download_that_was_damaged_is_refused(tmp_path, monkeypatch):
    """Sec. 6.1: --weights imagenet checks what came over the network against the hash that torchvision publishes."""
    (tmp_path / "sent.pth").write_bytes(resnet18_file())      # it would load, but is not what was promised
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: urllib.request.urlopen(f"file://{tmp_path}/sent.pth"))
    with pytest.raises(UserError, match="cannot get IMAGENET1K_V1 of resnet18.*hash.*--weights none"):
        DilatedResNet("resnet18", weights="imagenet")


def test_weights_that_cannot_be_had_are_an_error(tmp_path):
    """Sec. 6.1: asking for weights never gives a random network; the line says how to go on."""
    (tmp_path / "text.pth").write_text("no weights")
    for options, words in [({"weights": "imagenet-v2"}, "cannot get IMAGENET1K_V2 of resnet18"),
                           ({"weights": "imagenet", "stem": "deep"}, "deep stem"),
                           ({"weights": str(tmp_path / "nothing.pth")}, "no weights at .*nothing.pth"),
                           ({"weights": str(tmp_path / "text.pth")}, "text.pth")]:
        with pytest.raises(UserError, match=words):
            DilatedResNet("resnet18", **options)


# ---- Sec. 6.1: the data sets
def test_voc_is_read_as_it_is_distributed(releases):
    """Sec. 6.1, VOC: palette labels give class indices, 255 stays, images are RGB as in the file; test has no labels."""
    base = releases["voc"] / "VOCdevkit/VOC2012"
    for split, first in (("train", 0), ("val", 2)):
        voc = build_dataset("voc", releases["voc"], split)
        assert list(voc.ids) == IDS["voc"][first:first + 2] and len(voc.classes) == 21
        for i in range(2):
            image, label = voc[i]
            assert (base / f"SegmentationClass/{voc.ids[i]}.png").read_bytes()[24:26] == bytes([8, 3])     # palette
            assert image.dtype == label.dtype == torch.uint8
            assert np.array_equal(image.permute(1, 2, 0), Image.open(base / f"JPEGImages/{voc.ids[i]}.jpg"))
            assert np.array_equal(label, mixed([*range(21), 255], first + i))
    assert (voc.classes[0], voc.classes[15], voc.classes[20]) == ("background", "person", "tvmonitor")
    test = build_dataset("voc", releases["voc"], "test")
    assert not test.labelled and len(test) == 2 and (test[0][1] == 255).all()


@pytest.mark.parametrize("place", ["benchmark_RELEASE/dataset", "VOCaug/dataset", "VOCdevkit/VOCaug/dataset", "."])
def test_trainaug_is_composed_of_voc_and_sbd(place, tmp_path):
    """Sec. 6.1, VOC: trainaug = VOC train and all of SBD, less VOC val; VOC's mask where both have one. In SBD's own
    layout, in VOCaug's and in torchvision's."""
    base, a, b, c, d, e, f = tmp_path / "VOCdevkit/VOC2012", *(f"2008_00000{i}" for i in range(6))
    for split, ids in {"train": [b, a], "val": [e, f]}.items():
        write_list(base / f"ImageSets/Segmentation/{split}.txt", ids)
        for i in ids:
            write_label(mixed([0, 1, 255]), base / f"SegmentationClass/{i}.png")
    for i in (a, b, c, d, e, f):
        write_image(base / f"JPEGImages/{i}.jpg")
    write_list(tmp_path / place / "train.txt", [b, c, e])
    write_list(tmp_path / place / "val.txt", [d, f])
    for i, value in ((b, 15), (c, 20), (d, 7), (e, 3), (f, 4)):
        write_mat(tmp_path / place / f"cls/{i}.mat", GTcls={
            "Boundaries": scipy.sparse.csc_matrix(SIZE, dtype=bool), "CategoriesPresent": value,
            "Segmentation": np.full(SIZE, value, np.uint8)})
    augmented = build_dataset("voc", tmp_path, "trainaug")
    labels = {str(i): augmented[n][1] for n, i in enumerate(augmented.ids)}
    assert len(augmented) == 4 and set(labels) == {a, b, c, d}
    assert all(np.array_equal(labels[i], mixed([0, 1, 255])) for i in (a, b))
    assert (labels[c] == 20).all() and (labels[d] == 7).all()
    assert [Path(path).stem for path in augmented.images] == [Path(path).stem for path in augmented.labels]


def test_trainaug_labels_may_come_merged(own_release):
    """Sec. 6.1, VOC: without SBD, trainaug is SegmentationClassAug/ and its list, whose gray labels are indices all the
    same; validation is VOC's own masks; without either the line names both ways."""
    root = own_release("voc")
    with pytest.raises(UserError, match="benchmark.tgz.*SegmentationClassAug/.*--split train"):
        build_dataset("voc", root, "trainaug")
    base = root / "VOCdevkit/VOC2012"
    write_list(base / "ImageSets/Segmentation/trainaug.txt", IDS["voc"])
    for i in IDS["voc"]:
        write_label(mixed([3, 255]), base / f"SegmentationClassAug/{i}.png", "L")
    assert all(np.array_equal(build_dataset("voc", root, "trainaug")[i][1], mixed([3, 255])) for i in range(4))
    assert np.array_equal(build_dataset("voc", root, "val")[0][1], mixed([*range(21), 255], 2))


# The ids that the release's labels.txt gives to the names of its 59_labels.txt
CONTEXT = dict(re.findall(r"(\w+)=(\d+)",
    "aeroplane=2 bag=9 bed=18 bedclothes=19 bench=22 bicycle=23 bird=25 boat=31 book=33 bottle=34 building=44 bus=45 "
    "cabinet=46 car=59 cat=65 ceiling=68 chair=72 cloth=80 computer=85 cow=98 cup=104 curtain=105 dog=113 door=115 "
    "fence=144 floor=158 flower=159 food=162 grass=187 ground=189 horse=207 keyboard=220 light=232 motorbike=258 "
    "mountain=259 mouse=260 person=284 plate=295 platform=296 pottedplant=308 road=324 rock=326 sheep=347 shelves=349 "
    "sidewalk=354 sign=355 sky=360 snow=366 sofa=368 table=397 track=415 train=416 tree=420 truck=424 tvmonitor=427 "
    "wall=440 water=445 window=454 wood=458"))


@pytest.mark.parametrize("num_classes", [59, 60])
def test_context_ids_become_classes(num_classes, own_release):
    """Sec. 6.3, PASCAL Context: of 459 ids, none of which wraps at 256, 59 give classes of the release's names in its
    order; all others are ignored, or class 0."""
    root, raw = own_release("context"), np.resize(np.arange(460, dtype=np.uint16), (20, 23))
    write_raw("context", raw, label_path("context", root, 2))
    Image.fromarray(picture((20, 23), 0)).save(root / f"VOCdevkit/VOC2010/JPEGImages/{IDS['context'][2]}.jpg")
    context = build_dataset("context", root, "val", num_classes)
    names = context.classes[num_classes - 59:]
    text = "".join(f"{number}: {name}\n" for number, name in enumerate(names, 1)) + "\n"
    assert hashlib.md5(text.encode()).hexdigest() == "993901f2d930cc038c406845f08fa082"            # 59_labels.txt
    found = context[0][1].flatten().tolist()
    given = {name: value for value in range(460) for c, name in enumerate(context.classes) if found[value] == c
             if name != "other"}
    assert given == {name: int(value) for name, value in CONTEXT.items()}
    others = {c for value, c in enumerate(found) if str(value) not in CONTEXT.values()}
    assert others == ({255} if num_classes == 59 else {0}) and len(context.classes) == num_classes


@pytest.mark.parametrize("form", ["uint8", "double"])
def test_both_forms_of_coco_stuff_give_the_same_targets(form, own_release):
    """Sec. 6.3, COCO-Stuff: 10K (.mat, 0 = unlabelled) and 164K (.png, id - 1, 255 = unlabelled) give the same 171
    classes with their names; removed ids and unlabelled pixels are ignored."""
    small, large = own_release("cocostuff"), own_release("cocostuff164k")
    for i in range(4):
        raw = np.resize(np.arange(183, dtype=np.uint8), SIZE)
        write_label((raw.astype(int) - 1).astype(np.uint8), label_path("cocostuff164k", large, i), "L")
        path = label_path("cocostuff", small, i)
        write_mat(path, S=raw.astype(form), names=names_cell(182))
    removed = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
    kept = [i for i in range(183) if i not in removed]
    for ours, theirs in (("train", "train"), ("test", "val")):
        ours, theirs = build_dataset("cocostuff", small, ours), build_dataset("cocostuff164k", large, theirs)
        assert len(ours) == len(theirs) == 2 and ours.classes == theirs.classes
        for i in range(2):
            wanted = [kept.index(value) if value in kept else 255 for value in raw.flatten()]
            assert ours[i][1].flatten().tolist() == theirs[i][1].flatten().tolist() == wanted
    digest = hashlib.sha256("".join(f"{name}\n" for name in ours.classes).encode()).hexdigest()
    assert digest == "183abbcf67345584c8fd5fab2fe93e56ec77e25836483a185e991318398bd248"    # cocostuff's labels.txt


def test_coco_gives_voc_classes(own_release):
    """Sec. 6.2.3: for VOC's test server COCO's things of VOC's 20 kinds keep their kind, all else is background."""
    root = own_release("cocostuff164k")
    for i in range(2):
        write_label(np.resize(np.array([*range(182), 255], np.uint8), SIZE), label_path("cocostuff164k", root, i), "L")
    found = build_dataset("coco2voc", root, "train")[0][1].flatten().tolist()[:183]
    assert found.pop() == 255
    ids = {5: 1, 2: 2, 16: 3, 9: 4, 44: 5, 6: 6, 3: 7, 17: 8, 62: 9, 21: 10, 67: 11, 18: 12, 19: 13, 4: 14, 1: 15, 64: 16,
           20: 17, 63: 18, 7: 19, 72: 20}                     # COCO's id: VOC's class
    assert found == [ids.get(value + 1, 0) for value in range(182)]


def test_own_folder_is_read(folder_root):
    """Your own images: .jpg, .jpeg and .png, class names with spaces, VOC's layout."""
    own = build_dataset("folder", folder_root, "train")
    assert own.classes == ["road", "house boat", "tree", "sky"] and len(own) == 7
    assert {Path(path).suffix for path in own.images} == {".jpg", ".png", ".jpeg"}
    for i in range(7):
        image, label = own[i]
        assert np.array_equal(image.permute(1, 2, 0), Image.open(own.images[i]))
        assert np.array_equal(label, blocks(label.shape, own.ids[i]))


def test_images_are_rgb_and_never_turned(tmp_path):
    """Labels lie as the pixels lie in the file, so that EXIF must not turn the image; gray becomes RGB; 16 bits are refused."""
    exif = Image.Exif()
    exif[0x0112] = 6                                          # "turn by 90 degrees"
    gray = picture((11, 17), 0)[:, :, 0]
    Image.fromarray(picture((11, 17), 0)).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    Image.fromarray(gray.astype(np.uint16) * 256).save(tmp_path / "gray16.png")
    assert data.read_image(tmp_path / "turned.jpg").shape == (3, 11, 17)
    assert np.array_equal(data.read_image(tmp_path / "gray.png"), np.stack([gray] * 3))
    with pytest.raises(UserError, match="gray16.png: .*16 bits"):
        data.read_image(tmp_path / "gray16.png")


def test_index_png_has_vocs_colours(tmp_path):
    """VOC: written labels are palette PNGs of the same indices, in the colours of the development kit."""
    label = np.arange(256, dtype=np.uint8).reshape(4, 64)
    data.save_index_png(label, tmp_path / "label.png", data.palette_of(["background"]))
    image = Image.open(tmp_path / "label.png")
    assert image.mode == "P" and np.array_equal(image, label)
    colours = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 4: (0, 0, 128), 7: (128, 128, 128), 8: (64, 0, 0),
               15: (192, 128, 128), 16: (0, 64, 0), 20: (0, 64, 128), 255: (224, 224, 192)}
    rgb = np.asarray(image.convert("RGB"))
    assert all(tuple(rgb[index // 64, index % 64]) == colour for index, colour in colours.items())
    assert data.palette_of(["sky"])[0].tolist() == [128, 0, 0]                 # black is for a background alone


def test_pixels_are_normalised_as_imagenet_s():
    """Sec. 6.1: red, green, blue, in this order, less 0.485, 0.456, 0.406, divided by 0.229, 0.224, 0.225."""
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = (np.array(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert np.allclose(data.normalise(images), (images.numpy() / 255 - mean) / std, rtol=0, atol=1e-5)


# ---- Sec. 6.1: the training view, and the order of the images
@pytest.mark.parametrize("axis", [0, 1])
def test_image_and_label_stay_in_register(axis):
    """Sec. 6.1: scale, crop and flip move image and label alike: they agree to half a pixel of the source."""
    flips = 0
    for iteration in range(60):
        image, label = TrainView(Ramp(45, 60, axis), 40, 0)[iteration, 0]
        assert image.shape == (3, 40, 40) and label.shape == (40, 40) and image.dtype == label.dtype == torch.uint8
        inside = label != 255
        assert (image[1 - axis].float() / 4 - label.float())[inside].abs().max() <= 0.5 + 0.5 / 4 + 1e-6
        left, *_, right = image[0, 0][inside[0]].tolist()
        flips += left > right
    assert 15 < flips < 45


def test_scales_are_the_seven_steps():
    """Sec. 6.1: the image is scaled by 0.5, 0.75 ... 2.0, each about as often."""
    heights = [(TrainView(Ramp(20, 24, 0), 64, 0)[i, 0][1] != 255).any(1).sum().item() for i in range(140)]
    assert set(heights) == {10, 15, 20, 25, 30, 35, 40} and min(map(heights.count, heights)) > 7


def test_crops_reach_every_pixel():
    """Sec. 6.1: a crop may lie anywhere in the image, its edges included."""
    seen = set()
    for iteration in range(400):                              # at no scale does the crop hold the whole image
        seen |= set(TrainView(Ramp(60, 60, iteration % 2), 20, 0)[iteration, 0][1].unique().tolist())
    assert seen == set(range(60))


def test_padding_is_ignored_and_of_the_mean_colour():
    """Sec. 6.1: beside a picture smaller than the crop, the label is 255 and the image (124, 116, 104)."""
    for i in range(30):
        image, label = TrainView(Ramp(20, 24, 0), 64, 0)[i, 0]
        assert (image[2] != 104).equal(label != 255) and (label == 255).any()              # Ramp's blue is 200
        assert (image[:, label == 255] == torch.tensor([[124], [116], [104]])).all()


def test_crops_depend_on_seed_and_iteration_alone(folder_root):
    """Sec. 6.1: workers and restarts give the same crops; another seed gives others."""
    def epoch(workers, seed=3, start=0):
        own = build_dataset("folder", folder_root, "train")
        loader = DataLoader(TrainView(own, 40, seed), num_workers=workers,
                            batch_sampler=Schedule(own, 2, seed, range(start, 5)))
        return [torch.cat([part.flatten() for part in batch]) for batch in loader]
    plain = epoch(0)
    assert len(plain) == 5 and not torch.equal(plain[0], plain[3])
    assert all(torch.equal(a, b) for a, b in zip(plain, epoch(2), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain[2:], epoch(1, start=2), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(plain, epoch(0, seed=4), strict=True))


def test_schedule_shows_every_image_once_per_epoch():
    """Sec. 6.1: an epoch holds no image twice and leaves out less than a batch, in a new order every time."""
    batches = list(Schedule(Ramp(length=11), 3, 0, range(9)))
    epochs = [[index for batch in batches[e:e + 3] for _, index in batch] for e in (0, 3, 6)]
    assert all(len(set(epoch)) == 9 and set(epoch) <= set(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2]
    assert [batch[0][0] for batch in batches] == list(range(9))
    endless = [index for batch in Schedule(Ramp(length=11, endless=True), 3, 0, range(2, 6)) for _, index in batch]
    assert endless == list(range(6, 18))                      # pictures that are drawn never come again


@pytest.mark.parametrize("endless", [False, True])
def test_schedule_is_the_same_for_any_number_of_processes(endless):
    """Sec. 6.1: the global batch of an iteration is the same however it is cut, and wherever the run was resumed."""
    schedule = partial(Schedule, Ramp(length=17, endless=endless), 8, 5)
    whole = list(schedule(range(6)))
    assert len(whole) == len(schedule(range(6))) == 6 and all(len(batch) == 8 for batch in whole)
    assert list(schedule(range(4, 6))) == whole[4:]
    for world, accumulate in [(2, 1), (4, 1), (1, 2), (2, 2), (1, 8)]:
        parts = [list(schedule(range(6), rank, world, accumulate)) for rank in range(world)]
        assert all(len(p) == 6 * accumulate and {len(b) for b in p} == {8 // world // accumulate} for p in parts)
        for i, batch in enumerate(whole):
            together = [key for p in parts for b in p[i * accumulate:(i + 1) * accumulate] for key in b]
            assert sorted(together) == sorted(batch)


# ---- Sec. 6.1: training
def test_loss_is_the_sum_over_valid_by_all_pixels():
    """Sec. 6.1: the cross entropy of valid pixels, divided by the number of all pixels, as lr 0.009 was tuned to; 0, with
    gradient 0, for a crop that is ignored altogether."""
    torch.manual_seed(0)
    logits, label = torch.randn(2, 4, 3, 5, requires_grad=True), torch.randint(0, 4, (2, 3, 5)).byte()
    label[0, 0], label[1, 2, 3] = 255, 255
    total = 0
    for b, h, w in np.ndindex(2, 3, 5):
        if label[b, h, w] != 255:
            total -= torch.log_softmax(logits[b, :, h, w], 0)[int(label[b, h, w])].item()
    assert math.isclose(train.segmentation_loss(logits, label).item(), total / 30, rel_tol=1e-5)
    loss = train.segmentation_loss(logits, torch.full((2, 3, 5), 255, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_optimizer_decays_convolutions_only(tiny):
    """Sec. 6.1: a step moves weights of convolutions by lr (gradient + 1e-4 weight), BN's by lr times the gradient, all
    biases by twice that, with momentum 0.9; EMAU's first convolution stays."""
    net, lr = small_net(decoder=True), 0.2
    optimizer, batch = train.build_optimizer(net, 9.0), random_batch()         # the step's lr counts, not this one
    momenta = {}
    for seed in range(2):
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        torch.manual_seed(seed)
        twin = small_net(decoder=True).train()
        twin.load_state_dict(net.state_dict())
        torch.manual_seed(seed)                               # the same dropout
        train.batch_loss(twin, batch, torch.device("cpu"), None).backward()
        torch.manual_seed(seed)
        train.training_step(net, optimizer, iter([batch]), lr=lr, accumulate=1, device=torch.device("cpu"), amp=None)
        for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
            if name.startswith("attention.conv1"):
                assert torch.equal(p, before[name])
                continue
            step = q.grad + (1e-4 * before[name] if p.ndim == 4 else 0)
            momenta[name] = 0.9 * momenta.get(name, 0) + step
            wanted = before[name] - lr * (2 if name.endswith("bias") else 1) * momenta[name]
            assert torch.allclose(p, wanted, rtol=0, atol=1e-6) and not torch.equal(p, before[name]), name


def test_accumulated_batch_is_one_batch():
    """--accumulate: a batch in two parts gives the loss and the step of the whole batch, where no BN sees the parts."""
    images, labels = random_batch(4)
    after = []
    for parts in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
        torch.manual_seed(0)
        net = nn.Conv2d(3, 4, 3, padding=1)
        loss, _ = train.training_step(net, train.build_optimizer(net, 0.1), iter([(images[p], labels[p]) for p in parts]),
                                      lr=0.1, accumulate=len(parts), device=torch.device("cpu"), amp=None)
        after.append((loss, net.weight, net.bias))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(*after, strict=True))


def test_accumulated_parts_move_averages_as_one_batch_does(tiny):
    """--accumulate 2: each part moves bases and BN statistics by so much that an iteration's momentum is kept."""
    args = train.parse_args(shlex.split(f"{TRAIN} --iters 15000 --alpha 0.81 --accumulate 2"))
    net = train.build_network(args, 4, "none")
    assert math.isclose(net.attention.alpha, 0.9) and math.isclose(net.reduce[1].momentum, 1 - math.sqrt(1 - 3e-4))


def test_recipes_are_the_paper_s():
    """Secs. 6.1, 6.2.3 and 6.3: the defaults of a data set are the paper's numbers; those of scenes are their own."""
    keys = ("split", "iters", "output_stride", "eval_output_stride", "lr", "batch_size", "crop", "backbone", "stem",
            "weights", "channels", "decoder", "bn_momentum", "gradient", "layers", "num_bases", "em_iterations", "lam",
            "alpha", "base_update", "base_norm", "attention")
    common = [16, 513, "resnet101", "7x7", "imagenet", 512, False, 3e-4, "none", 4, 64, 3, 1.0, 0.9, "average", "l2",
              "emau"]
    for name, *own in [("voc", "trainaug", 30000, 16, 8, 0.009), ("context", "train", 15000, 16, 8, 0.009),
                       ("cocostuff", "train", 30000, 8, 8, 0.009), ("coco2voc", "train", 150000, 16, 8, 0.009),
                       ("cocostuff164k", "train", 80000, 8, 8, 0.009), ("folder", "train", 15000, 16, 8, 0.009)]:
        assert [vars(train.parse_args(["--dataset", name]))[key] for key in keys] == own + common, name
    released = train.parse_args(["--dataset", "voc", "--recipe", "released"])
    assert (released.output_stride, released.stem, released.decoder, released.lr) == (8, "deep", True, 0.009)
    scenes = train.parse_args([])
    assert [scenes.dataset, *(vars(scenes)[key] for key in keys[:13])] == [
        "scenes", "train", 400, 8, 8, 0.1, 16, 97, "resnet18", "7x7", "none", 128, False, 0.0225]
    cells = train.parse_args(["--dataset", "cells-key"])
    assert (cells.layers, cells.gradient, cells.lr, cells.batch_size, cells.crop) == (2, "full", 0.03, 8, 193)


def test_short_runs_get_a_larger_bn_momentum(tiny):
    """Sec. 6.1: in fewer iterations than the recipe's BN's statistics must arrive all the same: momentum 9 / iterations,
    0.1 at most; the network gets it."""
    for iters, momentum in ((30, 0.1), (300, 0.03), (29000, 9 / 29000), (30000, 3e-4), (60000, 3e-4)):
        args = train.parse_args(["--dataset", "voc", "--iters", str(iters), "--weights", "none"])
        net = train.build_network(args, 21, "none")
        found = {m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)}
        assert len(found) == 1 and math.isclose(found.pop(), momentum), iters


def test_run_follows_its_schedule(tiny, folder_root, tmp_path, monkeypatch):
    """Sec. 6.1: the lr of iteration i is lr (1 - i / iterations) ** 0.9; training has its own output stride, validation 8;
    validations are on the whole val list; the checkpoint's best is the best."""
    steps, strides, mious = [], [], iter([0.2, 0.5, 0.3])
    monkeypatch.setattr(TinyBackbone, "set_output_stride", lambda self, stride: strides.append(stride))
    spy(monkeypatch, train, "training_step", lambda *_, **options: steps.append((options["lr"], strides[-1:])))
    evaluate_now = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda net, val, *args, **options: strides.append((len(val), strides[-1])) or (
        evaluate_now(net, val, *args, **options) | {"miou": next(mious)}))
    out = command(train, f"{TRAIN} --data-root {folder_root} --iters 6 --eval-every 2 --lr 0.05 --output-stride 16 --out",
                  tmp_path / "run")
    assert "folder train: 7 images, 4 classes; validation: 5" in out
    assert [lr for lr, _ in steps] == pytest.approx([0.05 * (1 - i / 6) ** 0.9 for i in range(6)])
    assert strides == [8, (5, 8), 16] * 3 and [at for _, at in steps] == [[], [], [16], [16], [16], [16]]
    assert torch.load(tmp_path / "run/last.pth")["best"] == 0.5
    assert list(log_of(tmp_path / "run", "best").values()) == [0.2, 0.5, 0.5]
    assert load_checkpoint(tmp_path / "run/model.pth").config["output_stride"] == 8


def test_seed_is_used_for_all_that_is_random(tiny, folder_root, tmp_path, monkeypatch):
    """--seed: initialisation, order and crops, and each iteration's dropout are functions of it, and of nothing else."""
    batches, dropout, asked = [], [], []
    spy(monkeypatch, TrainView, "__getitem__", lambda view, key: asked.append((view.seed, key)))
    spy(monkeypatch, train, "batch_loss", lambda model, batch, *_: (batches.append(batch[0]), dropout.append(torch.rand(4))))
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(batches))
        command(train, f"{TRAIN} --data-root {folder_root} --iters 2 --lr 0 --seed {seed} --out", tmp_path / run)
    a, b, c = (torch.load(tmp_path / run / "model.pth")["model"]["backbone.conv.weight"] for run in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert [seed for seed, _ in asked] == [0] * 8 + [1] * 4 and asked[:4] == asked[4:8]
    assert [key for _, key in asked[:4]] != [key for _, key in asked[8:]]
    for drawn in (batches, dropout):
        assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])
        assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[4])


@pytest.mark.parametrize("choice, dtype", [("off", torch.float32), ("bf16", torch.bfloat16)])
def test_amp_is_what_convolutions_compute_in(choice, dtype, tiny, folder_root, tmp_path):
    """--amp: bf16 makes convolutions compute in bfloat16, in training and in evaluation; off in float32."""
    seen = set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.add((torch.is_grad_enabled(), output.dtype))
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) else None)
    try:
        command(train, f"{TRAIN} --data-root {folder_root} --iters 1 --amp {choice} --out", tmp_path / "run")
        assert {found for training, found in seen if training} == {dtype}
        seen.clear()
        command(evaluate, f"--ckpt {tmp_path}/run/model.pth --data-root {folder_root} --workers 0 --amp {choice}")
        assert seen == {(False, dtype)}
    finally:
        hook.remove()


OPTIONS = ["--base-norm layer", "--base-norm none", "--gradient last", "--gradient full --base-norm none",
           "--gradient full --base-update backprop", "--base-update fixed", "--attention nonlocal",
           "--attention a2", "--attention none", "--lam 4 --alpha 0.5", "--em-iterations 6 --decoder"]


def test_every_option_trains_and_comes_back(tiny, folder_root, tmp_path):
    """Secs. 5 and 6: with every option of the attention a run changes its losses, ends with finite weights, and
    evaluate.py repeats its validation from the checkpoint, which holds the option."""
    ends = set()
    for number, flags in enumerate(OPTIONS):
        out, bases = tmp_path / str(number), "--num-bases 8" * ("--attention" not in flags)
        command(train, f"{PLAIN} {bases} --data-root {folder_root} --iters 4 --lr 0.1 {flags} --out", out)
        net = load_checkpoint(out / "model.pth")
        for flag, value in re.findall(r"--([a-z-]+) (\w\S*)", flags):
            assert str(net.config[flag.replace("-", "_")]) in (value, f"{value}.0"), flags
        assert all(value.isfinite().all() for value in net.state_dict().values())
        printed = command(evaluate, f"--ckpt {out}/model.pth --data-root {folder_root} --workers 0")
        assert last_line(printed, "folder")[:3] == validation(out), flags
        ends.add(list(log_of(out, "loss").values())[-1])
    assert len(ends) == len(OPTIONS)                          # the options do something


def test_two_processes_have_the_gradient_of_one(pair, tiny):
    """Sec. 6.1: the loss is divided so that two processes get the gradient of one with the whole batch."""
    for name, expected in gradients(slice(None)).items():
        assert torch.equal(pair[0]["gradients"][name], pair[1]["gradients"][name]), name
        assert (pair[0]["gradients"][name] - expected).norm() <= 1e-3 * expected.norm() + 1e-7, name


def test_two_processes_train_one_network(pair):
    """Under torchrun each process reads its part and drops its own channels; the log holds the mean of their losses."""
    first, second = (results["run"] for results in pair)
    assert not any(torch.equal(a, b) for part in ("images", "dropout") for a, b in zip(first[part], second[part], strict=True))
    assert first["log"] == pytest.approx([(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)])


def test_run_that_diverges_is_stopped(tiny, folder_root):
    """A loss or a weight that is not finite ends the run; the line names iteration, images and remedy."""
    net, own = small_net(), build_dataset("folder", folder_root, "train")
    schedule = Schedule(own, 7, 0, range(10))
    train.check_finite(torch.tensor([1.0, 2.0]), net, iteration=10, data=own, schedule=schedule)
    with pytest.raises(UserError, match=r"loss of iteration 9 .*train_\d.*--lr"):
        train.check_finite(torch.tensor([1.0, math.nan, 1.0]), net, iteration=10, data=own, schedule=schedule)
    net.classifier.weight.data[0] = math.inf
    with pytest.raises(UserError, match="update of iteration 10 .*--lr"):
        train.check_finite(torch.tensor([1.0, 2.0]), net, iteration=10, data=own, schedule=schedule)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_continues_exactly(workers, tiny, folder_root, tmp_path, monkeypatch):
    """Asked to stop in mid-epoch and resumed, a run gives the weights, optimizer and losses of one that was not, bit by
    bit; with dropout, and whatever the number of workers."""
    line = f"{TRAIN} --data-root {folder_root} --iters 6 --eval-every 3 --decoder --lr 0.05 --workers {workers} --resume auto"
    command(train, f"{line} --out", tmp_path / "straight")
    with monkeypatch.context() as patch:
        steps = []
        spy(patch, train, "training_step", lambda *_, **options: steps.append(1) or len(steps) == 5 and
            os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as end:
            command(train, f"{line} --out", tmp_path / "resumed")
        assert end.value.code == 128 + 15 and torch.load(tmp_path / "resumed/last.pth")["iteration"] == 5
    assert "the checkpoint of iteration 5" in command(train, f"{line} --out", tmp_path / "resumed")
    straight, resumed = (torch.load(tmp_path / run / "last.pth") for run in ("straight", "resumed"))
    assert log_of(tmp_path / "straight", "loss") == log_of(tmp_path / "resumed", "loss")
    assert straight["best"] == resumed["best"] and straight["iteration"] == resumed["iteration"] == 6
    assert all(torch.equal(resumed["model"][key], value) for key, value in straight["model"].items())
    momenta = [[value["momentum_buffer"] for value in run["optimizer"]["state"].values()] for run in (straight, resumed)]
    assert len(momenta[0]) > 8 and all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))


def test_resume_wants_the_same_run(trained, own_folder, tmp_path):
    """--resume with another setting or other images, or from a network that is no run, is an error; in a folder that
    holds a run nothing begins."""
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    line = f"{TRAIN} --data-root {own_folder} --iters 3 --out {out}"
    fail(train, f"{line} --resume auto --lr 0.1", "another lr", "0.009", "0.1", "--out")
    fail(train, line, str(out), "--resume auto", "--out")
    fail(train, f"--out {out}", str(out), "--resume auto", "--out")                        # scenes, too
    fail(train, f"{line} --resume {trained}/last.pth", str(out), "--out")
    fail(train, f"{line}2 --resume {trained}/model.pth", "model.pth", "--init")
    fail(train, f"{line}2 --resume {trained}/nothing.pth", "nothing.pth")
    write_list(own_folder / "ImageSets/Segmentation/train.txt", [f"train_{i}" for i in range(6)])
    fail(train, f"{line} --resume auto", "another images (7, not 6)")
    assert all(path.read_bytes() == (trained / path.name).read_bytes() for path in out.iterdir())


def test_init_from_another_network(tmp_path, capsys, tiny):
    """--init takes the whole network; with another number of classes the classifier is new, and it says so."""
    source, path = small_net(4, seed=1), tmp_path / "model.pth"
    write_net(source, path)
    same, other, own = small_net(4), small_net(6), small_net(6).state_dict()
    train.load_init(same, path)
    assert "new one" not in capsys.readouterr().out
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in same.state_dict().items())
    train.load_init(other, path)
    assert re.search("4 classes.* 6.*new one", capsys.readouterr().out)
    for key, value in other.state_dict().items():
        assert torch.equal(value, (own if key.startswith("classifier.") else source.state_dict())[key]), key
    for different in (small_net(4, channels=8), small_net(4, decoder=True), small_net(4, attention="none")):
        with pytest.raises(UserError, match="model.pth"):
            train.load_init(different, path)


# ---- Sec. 6.1: evaluation
def test_metric_by_hand():
    """mIoU: one matrix over all pixels with a label; rows are labels; a class that occurs nowhere does not count."""
    label = torch.tensor([[0, 0, 0, 0, 1], [1, 2, 2, 255, 255]]).byte()
    prediction = torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 2, 0]])
    confusion = evaluate.confusion_matrix(prediction, label, 4)
    assert confusion.dtype == torch.int64
    assert confusion.tolist() == [[2, 2, 0, 0], [0, 1, 1, 0], [0, 0, 2, 0], [0, 0, 0, 0]]
    result = evaluate.scores(confusion)
    assert result["iou"][:3] == pytest.approx([2 / 4, 1 / 4, 2 / 3]) and math.isnan(result["iou"][3])
    assert result["acc"][:3] == pytest.approx([2 / 4, 1 / 2, 2 / 2]) and math.isnan(result["acc"][3])
    assert [result[key] for key in ("miou", "pixacc", "macc")] == pytest.approx([17 / 36, 5 / 8, 2 / 3])
    # Class 2 is predicted but never right: its IoU is 0 and counts, its accuracy is undefined and does not.
    result = evaluate.scores(torch.tensor([[6, 0, 2], [1, 1, 0], [0, 0, 0]]))
    assert [result[key] for key in ("miou", "pixacc", "macc")] == pytest.approx([(6 / 9 + 1 / 2) / 3, 7 / 10, 5 / 8])


@pytest.mark.parametrize("size, stride", [((41, 57), 8), ((38, 30), 8), ((38, 45), 16), ((70, 38), 32)])
def test_prediction_follows_the_protocol(size, stride):
    """Sec. 6.1: the whole image, padded right and bottom with 0 to S k + 1, S the network's own stride; with --ms-flip
    the sum over scales 0.5, 0.75, 1, 1.25, 1.5, 1.75 and their mirror images."""
    net, (height, width) = small_net(output_stride=stride).eval(), size
    image = tensor_picture(size)
    mean, std = (255 * torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def protocol(scales, mirrors):
        total = torch.zeros(4, height, width)
        for scale in scales:
            for mirror in mirrors:
                columns = torch.arange(width - 1, -1, -1) if mirror else torch.arange(width)
                h, w = int(scale * height), int(scale * width)
                view = F.interpolate(((image.float() - mean) / std)[None][..., columns], (h, w), mode="bilinear",
                                     align_corners=True)
                padded = torch.zeros(1, 3, *(next(n for n in range(m, m + stride) if n % stride == 1) for m in (h, w)))
                padded[:, :, :h, :w] = view
                logits = net(padded)[:, :, :h, :w]
                total += F.interpolate(logits, size, mode="bilinear", align_corners=True)[0][..., columns]
        return total
    with torch.no_grad():
        assert torch.allclose(evaluate.predict(net, image), protocol((1,), (False,)), atol=1e-4)
        expected = protocol((0.5, 0.75, 1, 1.25, 1.5, 1.75), (False, True))
        assert torch.allclose(evaluate.predict(net, image, ms_flip=True), expected, rtol=1e-4, atol=1e-3)


def test_two_processes_count_every_image_once(pair, tiny, folder_root):
    """Evaluation of 7, 5 and 1 images by two processes gives the numbers of one process: none padded, none lost."""
    alone = [scores_of(folder_root, split) for split in ("train", "val", "one")]
    assert [result["images"] for result in alone] == [7, 5, 1] and len({result["miou"] for result in alone}) == 3
    assert all(repr(results["scores"]) == repr(alone) for results in pair)     # as text: nan equals nan there


def test_saved_pngs_hold_the_scored_predictions(trained, folder_root, tmp_path):
    """evaluate.py repeats the validation of train.py; --save-png: the written indices, of the images' sizes, scored
    against the labels, give the printed numbers; every class is named."""
    out = command(evaluate, f"--ckpt {trained}/model.pth --data-root {folder_root} --workers 2 --save-png", tmp_path)
    own, pairs = build_dataset("folder", folder_root), []
    for i, name in enumerate(own.ids):
        png = Image.open(tmp_path / f"{name}.png")
        assert png.mode == "P" and png.size == Image.open(own.images[i]).size
        pairs += [(int(t), int(p)) for t, p in zip(own[i][1].flatten(), np.array(png).flatten(), strict=True) if t != 255]
    counts = [[pairs.count((t, p)) for p in range(4)] for t in range(4)]
    ious = [counts[c][c] / (sum(counts[c]) + sum(row[c] for row in counts) - counts[c][c]) for c in range(4)]
    right = sum(counts[c][c] for c in range(4)) / len(pairs)
    assert last_line(out, "folder") == [round(100 * np.mean(ious), 2), round(100 * right, 2), validation(trained)[2], 5]
    assert last_line(out, "folder")[:3] == validation(trained)
    assert all(f"  {name} " in out for name in ("road", "house boat", "tree", "sky"))


def test_evaluation_with_other_rounds_and_strides(tiny, folder_root, tmp_path, monkeypatch):
    """Fig. 4: --em-iterations T and --output-stride S evaluate a network with other rounds and another stride than those
    it was trained with, and --ms-flip with its twelve views."""
    write_net(small_net(lam=20.0), tmp_path / "model.pth")
    rounds, views, line = [], [], f"--ckpt {tmp_path}/model.pth --data-root {folder_root} --workers 0"
    spy(monkeypatch, EMAU, "e_step", lambda unit, x, mu: rounds.append(len(x)))
    spy(monkeypatch, EMANet, "forward", lambda net, x: views.append((net.config["output_stride"], *x.shape)))
    for flags, wanted in (("", 15), ("--em-iterations 1", 5), ("--em-iterations 7", 35), ("--ms-flip", 90)):
        rounds.clear()
        assert last_line(command(evaluate, f"{line} {flags}"), "folder", "ms-flip" if "ms" in flags else "ss")[3] == 5
        assert len(rounds) == wanted
    views.clear()
    command(evaluate, f"{line} --output-stride 16")
    assert len(views) == 5 and all(stride == 16 and h % 16 == w % 16 == 1 for stride, _, _, h, w in views)
    write_net(small_net(attention="none"), tmp_path / "none.pth")
    fail(evaluate, f"--ckpt {tmp_path}/none.pth --data-root {folder_root} --em-iterations 2", "--em-iterations", "none")


@pytest.mark.parametrize("name, flags, classes", [("voc", "--split train", 21), ("context", "", 59), ("cocostuff", "", 171),
                                                  ("context", "--context-classes 60", 60), ("cocostuff164k", "", 171)])
def test_data_sets_from_training_to_evaluation(name, flags, classes, tiny, releases, tmp_path):
    """Sec. 6.3: train.py and evaluate.py on a data set as its authors distribute it."""
    line = f"--data-root {releases[name]} --workers 0"
    out = command(train, f"{PLAIN} --dataset {name} --iters 2 {line} {flags} --out", tmp_path / "run")
    assert f"{name} train: 2 images, {classes} classes; validation: 2" in out
    out = command(evaluate, f"--ckpt {tmp_path}/run/model.pth {line}")
    split = "test" if name == "cocostuff" else "val"
    assert last_line(out, name, split=split) == [*validation(tmp_path / "run"), 2] and ("  other " in out) == (classes == 60)
    if name == "voc":                                         # no labels: predictions for the test server
        fail(evaluate, f"--ckpt {tmp_path}/run/model.pth {line} --split test", "no labels", "--save-png")
        assert "2 predictions" in command(evaluate, f"--ckpt {tmp_path}/run/model.pth {line} --split test --save-png",
                                          tmp_path / "png")
        assert len(list((tmp_path / "png").iterdir())) == 2


# ---- Sec. 6.5: pictures
def test_maps_are_the_responsibilities_of_the_prediction():
    """Fig. 5: what is drawn are the unit's own rounds on the padded image, beside the prediction of evaluate.py."""
    net, image = small_net().eval(), tensor_picture((41, 60))
    prediction, z = visualize.predict_with_bases(net, image)
    with torch.no_grad():
        assert torch.equal(prediction, evaluate.predict(net, image).argmax(0).byte())
        features = net.reduce(net.backbone(F.pad(data.normalise(image[None]), (0, 5))))    # 41 x 65 pixels
        rounds = net.attention.em(net.attention.conv1(features).flatten(2).transpose(1, 2))
        expected = torch.cat([z for z, _ in rounds]).transpose(1, 2).reshape(3, 8, 6, 9)
    assert torch.allclose(z, expected, atol=1e-5) and torch.allclose(z.sum(1), torch.ones(3, 6, 9))
    assert visualize.predict_with_bases(small_net(attention="none").eval(), image)[1] is None


def test_pictures_of_a_data_set(trained, folder_root, tmp_path):
    """Fig. 5: for images of a data set one picture each, and the prediction as an index PNG as evaluate.py writes it."""
    line = f"--ckpt {trained}/model.pth --data-root {folder_root}"
    command(visualize, f"{line} --count 2 --bases 7,3 --out", tmp_path / "pictures")
    command(evaluate, f"{line} --workers 0 --save-png", tmp_path / "png")
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        "bases.png", *(f"val_{i}{end}.png" for i in range(2) for end in ("", "_prediction"))}
    for name in ("val_0", "val_1"):
        assert Image.open(tmp_path / f"pictures/{name}.png").mode == "RGB"
        drawn, scored = (Image.open(tmp_path / path) for path in (f"pictures/{name}_prediction.png", f"png/{name}.png"))
        assert drawn.mode == "P" and np.array_equal(drawn, scored) and drawn.getpalette() == scored.getpalette()
    for bases in ("8", "-1", "x", "1,,2"):
        fail(visualize, f"{line} --out {tmp_path} --bases={bases}", "--bases", "7")


def test_bases_shown_by_default_are_the_fullest(trained, folder_root, tmp_path, monkeypatch):
    """Fig. 5: without --bases the four that hold the most pixels are shown, the fullest first."""
    def fake(net, image):
        h, w = (-(-side // 8) + (side % 8 != 1) for side in image.shape[1:])
        z = torch.zeros(3, 8, h, w)                           # 7 x 8 pixels: 4, 2, 1 and 1 columns of bases 5, 0, 6, 2
        for base, columns in {5: [0, 2, 3, 6], 0: [1, 5], 6: [4], 2: [7]}.items():
            z[:, base, :, columns] = torch.rand(h, len(columns)) + 1
        z[:, 2, 0], z[:, 6, 0, 7] = 0, 2                      # 6 has one pixel more than 2
        return torch.zeros(image.shape[1:], dtype=torch.uint8), z
    monkeypatch.setattr(visualize, "predict_with_bases", fake)
    for name, flags in (("default", ""), ("named", "--bases 5,0,6,2"), ("others", "--bases 5,0,6,1")):
        torch.manual_seed(0)
        command(visualize, f"--ckpt {trained}/model.pth --data-root {folder_root} --count 1 {flags} --out", tmp_path / name)
    default, named, others = ((tmp_path / f"{name}/val_0.png").read_bytes() for name in ("default", "named", "others"))
    assert default == named != others


def test_pictures_of_own_images(tiny, tmp_path):
    """--image takes a file or a folder, turned as EXIF says; the prediction of the small image is written at the original
    size, each pixel with the class of the small pixel that its centre lies in."""
    exif = Image.Exif()
    exif[0x0112] = 6                                          # "turn by 90 degrees"
    (tmp_path / "photos").mkdir()
    Image.fromarray(picture((60, 90), 3)).save(tmp_path / "photos/turned.png", exif=exif)
    Image.fromarray(picture((88, 128), 4)).save(tmp_path / "photos/large.png")
    (tmp_path / "photos/notes.txt").write_text("no image")
    net = small_net(seed=4).eval()
    net.classifier.bias.data.zero_()                          # so that it sees several classes
    write_net(net, tmp_path / "model.pth", {"dataset": "folder", "classes": ["a", "b", "c", "d"]})
    line = f"--ckpt {tmp_path}/model.pth --size 64 --out {tmp_path}/out --image {tmp_path}/photos"
    command(visualize, f"{line} --bases 0,5")
    for name, upright in (("turned", np.rot90(picture((60, 90), 3), -1)), ("large", picture((88, 128), 4))):
        small = Image.fromarray(np.ascontiguousarray(upright))
        small.thumbnail((64, 64), Image.Resampling.BILINEAR)
        classes = evaluate.predict(net, torch.from_numpy(np.array(small)).permute(2, 0, 1)).argmax(0).numpy()
        rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(upright.shape, classes.shape, strict=False))
        assert len(np.unique(classes)) > 1
        assert np.array_equal(Image.open(tmp_path / f"out/{name}_prediction.png"), classes[rows][:, columns])
    fail(visualize, f"{line}/notes.txt", "notes.txt")
    fail(visualize, f"{line}/nothing.jpg", "nothing.jpg")
    fail(visualize, f"{line} --out {tmp_path}/photos", "--out", "photos")                   # they would be overwritten


# ---- Command lines
def test_scripts_work_together(folder_root, tmp_path):
    """As processes: torchrun trains in two of them, evaluate.py repeats the last validation, visualize.py draws."""
    out = process(tmp_path, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}",
                  HERE / "train.py", *f"{TRAIN} --iters 2 --data-root {folder_root}".split())
    assert "2 x cpu" in out and out.count("iter      2/2") == 1 and "random (no ImageNet weights)" in out
    assert list(log_of(tmp_path / "out/folder", "loss")) == [1, 2]
    line = f"--ckpt out/folder/model.pth --data-root {folder_root}"
    assert f"evaluate.py --ckpt out/folder/model.pth --data-root {folder_root}" in out
    printed = process(tmp_path, HERE / "evaluate.py", *line.split())
    assert last_line(printed, "folder") == [*validation(tmp_path / "out/folder"), 5]
    process(tmp_path, HERE / "visualize.py", *line.split(), "--count", "1")
    assert (tmp_path / "out/folder/pictures/val_0.png").exists()


def test_user_errors_are_one_line(tmp_path):
    """What the user can put right ends a script with one line on stderr and exit status 1."""
    result = subprocess.run([sys.executable, HERE / "train.py", "--dataset", "voc"], cwd=tmp_path, capture_output=True,
                            text=True, check=False)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
    assert result.stderr.startswith("error: no folder datasets: --data-root")


@pytest.mark.parametrize("name, images, classes", [("scenes", 64, 9), ("cells-key", 400, 4)])
def test_drawn_data_need_no_files(name, images, classes, tiny, tmp_path, monkeypatch):
    """`python train.py` alone trains on pictures drawn by program, and evaluate.py on its result needs no data either."""
    monkeypatch.chdir(tmp_path)
    out = command(train, f"--dataset {name} --iters 2 --crop 33 --batch-size 2 --channels 8 --num-bases 4 --workers 0")
    assert f"{name} train: endless images, {classes} classes; validation: {images}" in out
    assert f"python evaluate.py --ckpt out/{name}/model.pth\n" in out
    printed = command(evaluate, f"--ckpt out/{name}/model.pth --workers 0")
    assert last_line(printed, name) == [*validation(tmp_path / "out" / name), images]


@slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("gradient", ["none", "full"])
def test_network_can_be_compiled(gradient, tiny):
    """--compile: the same gradients and bases to 1e-5."""
    net, twin = small_net(gradient=gradient), small_net(gradient=gradient)
    compiled, images = torch.compile(net), torch.randn(2, 3, 33, 41)
    for model in (compiled, twin):
        model(images).square().mean().backward()
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-5)), name
    assert torch.allclose(net.attention.mu, twin.attention.mu, rtol=0, atol=1e-5)


# ---- Bad input: one line that says what, where, and what to do
@pytest.mark.parametrize("flags, words", [
    ("--batch-size 8", ["7 images", "8"]), ("--batch-size 3 --accumulate 2", ["--batch-size 3"]),
    ("--recipe released", ["released", "folder"]), ("--init nothing.pth", ["nothing.pth"]),
    ("--weights nothing.pth", ["nothing.pth"]), ("--attention nonlocal", ["--num-bases", "nonlocal"]),
    ("--base-update backprop", ["backprop", "gradient full"]), ("--device cuda", ["cuda"]), ("--device abacus", ["abacus"]),
    *((f"--{key} {value}", [f"--{key} {value}", "at least"]) for key, value in (
        ("eval-every", 0), ("accumulate", 0), ("batch-size", 0), ("iters", 0), ("crop", 1), ("workers", -1), ("seed", -1)))])
def test_settings_that_cannot_be(flags, words, folder_root, tmp_path):
    """A setting that cannot work is named; nothing is written."""
    fail(train, f"{TRAIN} --data-root {folder_root} --out {tmp_path}/out {flags}", *words)
    assert not (tmp_path / "out").exists()


def test_files_that_are_missing(own_folder, releases, tmp_path):
    """A data root that is not the data set's, a list, image or label that is missing: named before anything starts."""
    line = f"{TRAIN} --out {tmp_path}/out --data-root"
    fail(train, f"{line} {tmp_path}/nothing", "nothing", "--data-root")
    fail(train, f"{line} {own_folder} --dataset voc", str(own_folder), "VOCdevkit", "--data-root")
    fail(train, f"{line} {own_folder} --split nothing", "nothing.txt", "train, val")
    fail(train, f"{line} {releases['voc']}/VOCdevkit --dataset voc --split train", f"--data-root {releases['voc']}")
    (own_folder / "SegmentationClass/val_2.png").unlink()
    fail(train, f"{line} {own_folder}", "val_2.png", "1 of 5")
    (own_folder / "JPEGImages/train_0.jpg").unlink()
    fail(train, f"{line} {own_folder}", "train_0.jpg", "1 of 7")
    (own_folder / "classes.txt").write_text("\n")
    fail(train, f"{line} {own_folder}", "classes.txt", "empty")
    (own_folder / "classes.txt").unlink()
    fail(train, f"{line} {own_folder}", "classes.txt", "--data-root")


def test_folder_without_validation(own_folder, tiny, tmp_path):
    """Your own folder without a val list is trained on all the same, and the start says so."""
    (own_folder / "ImageSets/Segmentation/val.txt").unlink()
    assert "validation: none" in command(train, f"{TRAIN} --iters 1 --data-root {own_folder} --out", tmp_path / "run")
    assert load_checkpoint(tmp_path / "run/model.pth").config["num_classes"] == 4


@pytest.mark.parametrize("how, words", [("size", "pixels"), ("value", "label value 4"), ("rgb", "RGB"), ("16 bits", "I;16"),
                                        ("truncated", "cannot be read")])
def test_bad_labels(how, words, own_folder, trained):
    """A label of another size, with a value that is no class, of another kind, or torn, is named, from a worker too."""
    path = own_folder / "SegmentationClass/val_1.png"
    label = np.array(Image.open(path))
    if how in ("size", "value"):
        label[0, 5] = 4
        write_label(label if how == "value" else label[:-1], path)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    else:
        Image.fromarray(label.astype(np.uint16) if how == "16 bits" else np.stack([label] * 3, 2)).save(path)
    workers = int(how == "rgb")
    fail(evaluate, f"--ckpt {trained}/model.pth --data-root {own_folder} --workers {workers}", path.name, words)


def test_truncated_images(own_folder, tiny, tmp_path):
    """A JPEG or PNG that breaks off is named."""
    for path in (own_folder / "JPEGImages").glob("train*"):
        path.write_bytes(path.read_bytes()[:-60])
    for i in range(3):
        with pytest.raises(UserError, match=rf"train_{i}\..*cannot be read"):
            build_dataset("folder", own_folder, "train")[i]
    fail(train, f"{TRAIN} --data-root {own_folder} --out {tmp_path}/run", "JPEGImages/train_", "cannot be read")


@pytest.mark.parametrize("name, value", [("voc", 21), ("context", 460), ("cocostuff", 183), ("cocostuff164k", 182)])
def test_values_that_are_no_labels(name, value, own_release):
    """A raw label value that the data set has not is an error, and never a class."""
    root = own_release(name)
    write_raw(name, mixed([0, value]), label_path(name, root, 0))
    with pytest.raises(UserError, match=f"label value {value} does not occur in {name}"):
        build_dataset(name, root, "train")[0]


def test_coco_stuff_version_1_0_is_refused(own_release):
    """COCO-Stuff 10K: version 1.0 numbers its labels differently; the line names the file to get."""
    root = own_release("cocostuff")
    write_mat(label_path("cocostuff", root, 0), S=mixed(range(2, 173)), names=names_cell(172))
    with pytest.raises(UserError, match="version 1.0.*cocostuff-10k-v1.1.zip"):
        build_dataset("cocostuff", root, "train")[0]


@pytest.mark.parametrize("kind", ["missing", "truncated", "flipped", "empty", "text", "payload", "bare", "foreign", "net"])
def test_bad_checkpoints(kind, trained, folder_root, tmp_path):
    """A checkpoint that is missing, torn, damaged in one byte, no checkpoint at all or hostile is refused, by name, and
    no code in it is run; a run does not begin anew from one."""
    path, content = tmp_path / "last.pth", bytearray((trained / "last.pth").read_bytes())
    weights = torch.load(trained / "last.pth")["model"]["attention.conv1.weight"].numpy().tobytes()
    if kind == "flipped":
        content[content.index(weights) + 100] ^= 16
    if kind in ("truncated", "flipped", "empty", "text"):
        path.write_bytes({"truncated": content[:len(content) // 2], "empty": b"", "text": b"no"}.get(kind, content))
    elif kind != "missing":
        hostile = type("Hostile", (), {"__reduce__": lambda self: (open, (str(tmp_path / "created"), "w"))})
        torch.save({"payload": {"model": {}, "config": hostile()}, "net": {"net": [1, 2, 3]},
                    "foreign": {"model": {"wte": torch.zeros(3)}, "config": {"n_layer": 12}},          # nanoGPT's
                    "bare": torchvision.models.resnet18().state_dict()}[kind], path)
    fail(evaluate, f"--ckpt {path}", "last.pth")
    if kind in ("truncated", "flipped", "payload"):
        fail(train, f"{TRAIN} --data-root {folder_root} --resume auto --out {tmp_path}", "last.pth")
    assert not (tmp_path / "created").exists()


def test_checkpoint_and_data_that_do_not_fit(trained, own_folder, releases):
    """A network is not scored on data of other classes, or of the same in another order."""
    line = f"--ckpt {trained}/model.pth --data-root"
    fail(evaluate, f"{line} {releases['voc']} --dataset voc", "4 classes", "21")
    (own_folder / "classes.txt").write_text("sky\ntree\nhouse boat\nroad\n")
    fail(evaluate, f"{line} {own_folder}", "other names, or another order")


def test_gpus_that_are_not_there(monkeypatch):
    """A GPU that is not there, and more processes than GPUs, are named before CUDA or NCCL fail."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert evaluate.pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="cuda:2.* sees 2 "):
        evaluate.pick_device("cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="--nproc_per_node=2 at most"):
        evaluate.init_distributed("auto")


# ---- What the tests are made with: units and networks
class TinyBackbone(nn.Module):
    """Stands in for the ResNet where only the rest matters: one convolution, an eighth of the size."""
    out_channels, weights_origin = 8, "tiny"

    def __init__(self, *args):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 9, stride=8, padding=4)

    def forward(self, x):
        return self.conv(x).relu()

    def set_output_stride(self, output_stride):
        pass


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(ema, "DilatedResNet", TinyBackbone)


def make_unit(channels=6, bases=5, iterations=3, lam=1.0, seed=0, **options):
    """An EMAU in float64 and eval mode whose BN does something."""
    torch.manual_seed(seed)
    unit = EMAU(channels, bases, iterations, lam, **options).double().eval()
    bn = unit.conv2[1]
    for tensor in (bn.weight.data, bn.bias.data, bn.running_mean, bn.running_var):
        tensor.copy_(torch.rand(channels) + 0.5)
    return unit


def random_em(seed, images, pixels, channels, bases, iterations, lam, scale=2.0, **options):
    """A unit and pixels x (B, N, C) for it, in float64, with bases of length one to start from."""
    unit = make_unit(channels, bases, iterations, lam, seed, **options)
    unit.mu = F.normalize(unit.mu, dim=1)                     # again, as it was float32
    return unit, scale * torch.randn(images, pixels, channels).double()


def small_net(num_classes=4, seed=0, **options):
    torch.manual_seed(seed)
    return EMANet(num_classes, **{"backbone": "resnet18", "channels": 16, "num_bases": 8} | options)


def write_net(net, path, trained_on=None):
    config = {"network": net.config, "data": trained_on or {"dataset": "folder"}}
    save_checkpoint({"model": net.state_dict(), "config": config}, path)


def resnet18_file():
    buffer = io.BytesIO()
    torch.save(torchvision.models.resnet18().state_dict(), buffer)
    return buffer.getvalue()


# The released network, names and shapes written out: a deep stem in `extractor.0`, layers in 4..7, heads fc0 and fc1.
@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """A released ResNet-50 checkpoint: its state dict, its file, two images and the logits of the released network."""
    torch.manual_seed(0)
    state, images, path = {}, torch.randn(2, 3, 65, 49).double(), tmp_path_factory.mktemp("released") / "resnet50.pth"
    logits = released_logits(state, images)
    torch.save({"net": state, "step": 30000}, path)
    return state, path, images, logits


def released_logits(state, images, depths=(3, 4, 6, 3), num_classes=21):
    """The forward pass of the released network in eval mode at output stride 8. Entries that `state` lacks are made on the
    way, random but tame: so it writes out the names and shapes of a released file as well."""
    def entry(key, *shape, scale=1.0, shift=0.0):
        if key not in state:
            state[key] = (shift + scale * torch.randn(shape)).to(images.device)
        return state[key].to(images.dtype)

    def conv(x, key, c_out, size=1, stride=1, rate=1, bias=False):
        weight = entry(f"{key}.weight", c_out, x.shape[1], size, size, scale=math.sqrt(2 / (x.shape[1] * size * size)))
        return F.conv2d(x, weight, entry(f"{key}.bias", c_out) if bias else None, stride, rate * (size // 2), rate)

    def bn(x, key, scale=1.0):
        c = x.shape[1]
        weight, bias = entry(f"{key}.weight", c, scale=0.1 * scale, shift=scale), entry(f"{key}.bias", c, scale=0.2)
        mean, var = entry(f"{key}.running_mean", c, scale=0.2), entry(f"{key}.running_var", c, scale=0.1, shift=1.0)
        state.setdefault(f"{key}.num_batches_tracked", torch.tensor(30000))
        return F.batch_norm(x, mean, var, weight, bias)

    x = F.relu(bn(conv(images, "extractor.0.0", 64, 3, stride=2), "extractor.0.1"))
    x = F.relu(bn(conv(x, "extractor.0.3", 64, 3), "extractor.0.4"))
    x = F.max_pool2d(F.relu(bn(conv(x, "extractor.0.6", 128, 3), "extractor.1")), 3, 2, 1)
    for stage, depth, rates in zip((4, 5, 6, 7), depths, ([1] * 3, [1] * 4, [1] + [2] * 22, [2, 8, 16]), strict=True):
        for block, rate in zip(range(depth), rates, strict=False):
            key, stride, width = f"extractor.{stage}.{block}", 2 if (stage, block) == (5, 0) else 1, 4 << stage
            y = F.relu(bn(conv(x, f"{key}.conv1", width), f"{key}.bn1"))
            y = F.relu(bn(conv(y, f"{key}.conv2", width, 3, stride, rate), f"{key}.bn2"))
            y = bn(conv(y, f"{key}.conv3", 4 * width), f"{key}.bn3", 0.3)
            if block == 0:
                x = bn(conv(x, f"{key}.downsample.0", 4 * width, stride=stride), f"{key}.downsample.1")
            x = F.relu(x + y)
    x = F.relu(bn(conv(x, "fc0.conv", 512, 3), "fc0.bn"))
    y = conv(x, "emau.conv1", 512, bias=True).flatten(2)                               # (B, C, N)
    mu = entry("emau.mu", 1, 512, 64, scale=1 / math.sqrt(512))
    for _ in range(3):
        z = torch.softmax(y.transpose(1, 2) @ mu, 2)                                   # (B, N, K)
        mu = y @ (z / (1e-6 + z.sum(1, keepdim=True)))                                 # (B, C, K)
        mu = mu / (1e-6 + mu.norm(dim=1, keepdim=True))
    y = F.relu((mu @ z.transpose(1, 2)).view_as(x))
    x = F.relu(x + bn(conv(y, "emau.conv2.0", 512), "emau.conv2.1"))
    x = conv(F.relu(bn(conv(x, "fc1.0.conv", 256, 3), "fc1.0.bn")), "fc2", num_classes, bias=True)
    return F.interpolate(x, images.shape[2:], mode="bilinear", align_corners=True)


# ---- What the tests are made with: data sets, as small as can be and in the real formats
SIZE = (11, 17)
IDS = {"voc": ["2007_000032", "2008_000008", "2010_000003", "2011_000009"],
       "context": ["2008_000008", "2008_000015", "2009_000001", "2010_000002"],
       "cocostuff": [f"COCO_train2014_{i:012d}" for i in (77, 349, 825, 1139)],
       "cocostuff164k": [f"{i:012d}" for i in (9, 25, 139, 285)]}       # the first two to train, the others to validate


def picture(size, seed):
    """A soft random image, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    return np.array(Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize(size[::-1], Image.BILINEAR))


def tensor_picture(size):
    return torch.from_numpy(picture(size, 0)).permute(2, 0, 1)


def mixed(values, seed=0):
    """A raw label map that holds every one of the values, uint8 or uint16."""
    values = np.array(values)
    at = np.random.default_rng(seed).permutation(np.arange(SIZE[0] * SIZE[1]) % len(values)).reshape(SIZE)
    return values[at].astype(np.uint16 if values.max() > 255 else np.uint8)


def blocks(size, name):
    """A label of rectangles of four classes, uint8 (H, W), with a rim of ignored pixels on the left."""
    rng = np.random.default_rng((sum(name.encode()), 1))
    label = np.array(Image.fromarray(rng.integers(0, 4, (3, 4)).astype(np.uint8)).resize(size[::-1], Image.NEAREST))
    label[:, :2] = 255
    return label


def write_label(label, path, mode="P"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label)
    if mode == "P":                                           # colours do not matter, but they are not their indices
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    image.save(path)


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(SIZE, sum(path.stem.encode()))).save(path)


def write_mat(path, **variables):
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, variables, do_compression=True)


def write_list(path, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{i}\n" for i in ids))


def names_cell(count):
    return np.array([f"class {i}" for i in range(count)], object)[:, None]


def label_path(name, root, i):
    """Where a data set keeps the label of its i-th image."""
    folder = {"voc": "VOCdevkit/VOC2012/SegmentationClass", "context": "trainval", "cocostuff": "annotations",
              "cocostuff164k": f"annotations/{'train' if i < 2 else 'val'}2017"}[name]
    return root / folder / f"{IDS[name][i]}{'.mat' if name in ('context', 'cocostuff') else '.png'}"


def write_raw(name, raw, path):
    """A raw label map as the file that the data set's authors distribute."""
    if name == "context":
        write_mat(path, LabelMap=raw.astype(np.uint16))
    elif name == "cocostuff":
        write_mat(path, S=raw, names=names_cell(182), captions=np.array(["a picture"], object))
    else:
        write_label(raw, path, "P" if name == "voc" else "L")


@pytest.fixture(scope="session")
def releases(tmp_path_factory):
    """{name: root} of the data sets in the layout their archives unpack to, four images each; not to be changed."""
    roots = {name: tmp_path_factory.mktemp(name) for name in IDS}
    lists = {"voc": "VOCdevkit/VOC2012/ImageSets/Segmentation", "context": "VOCdevkit/VOC2010/ImageSets/Main",
             "cocostuff": "imageLists"}
    images = {"voc": "VOCdevkit/VOC2012/JPEGImages", "context": "VOCdevkit/VOC2010/JPEGImages", "cocostuff": "images"}
    values = {"voc": [*range(21), 255], "context": [0, 2, 19, 284, 420, 458, 459], "cocostuff": range(183),
              "cocostuff164k": [*range(11), 12, 181, 255]}
    for name, root in roots.items():
        for i, image in enumerate(IDS[name]):
            write_image(root / images.get(name, f"images/{'train' if i < 2 else 'val'}2017") / f"{image}.jpg")
            write_raw(name, mixed(values[name], i), label_path(name, root, i))
        if name in lists:
            for split, ids in {"train": IDS[name][:2], "val": IDS[name][2:], "test": IDS[name][2:]}.items():
                write_list(root / lists[name] / f"{split}.txt", ids)
    return roots


@pytest.fixture
def own_release(releases, tmp_path):
    """A copy of a release that a test may break."""
    return lambda name: Path(shutil.copytree(releases[name], tmp_path / name))


@pytest.fixture(scope="session")
def folder_root(tmp_path_factory):
    """A user's own folder: 7 images to train on, 5 to validate, four classes."""
    root = tmp_path_factory.mktemp("folder")
    (root / "JPEGImages").mkdir()
    write_list(root / "classes.txt", ["road", "house boat", "tree", "sky"])
    for split, count in {"train": 7, "val": 5, "one": 1}.items():
        ids = [f"{'val' if split == 'one' else split}_{i}" for i in range(count)]
        write_list(root / f"ImageSets/Segmentation/{split}.txt", ids)
        for n, name in enumerate(ids):
            size = [(41, 56), (60, 48), (57, 41), (33, 64)][n % 4]
            suffix = (".jpg", ".png", ".jpeg")[n % 3]
            Image.fromarray(picture(size, sum(name.encode()))).save(root / f"JPEGImages/{name}{suffix}")
            write_label(blocks(size, name), root / f"SegmentationClass/{name}.png")
    return root


@pytest.fixture
def own_folder(folder_root, tmp_path):
    """A copy of the folder that a test may break."""
    return Path(shutil.copytree(folder_root, tmp_path / "data"))


class Ramp:
    """Images whose colour says where each pixel lies, and so does its label: red = 4 * column, green = 4 * row."""
    scales = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)

    def __init__(self, height=1, width=1, axis=0, length=1, endless=False):
        rows, columns = np.mgrid[:height, :width].astype(np.uint8)
        self.image = torch.from_numpy(np.stack([4 * columns, 4 * rows, 200 + 0 * rows]))
        self.label, self.length, self.endless = torch.from_numpy((rows, columns)[axis]), length, endless

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return self.image, self.label


# ---- What the tests are made with: scripts and processes
PLAIN = "--dataset folder --backbone resnet18 --weights none --channels 16 --crop 33 --batch-size 2 --workers 0 --amp off"
TRAIN = f"{PLAIN} --num-bases 8"


def command(script, line, out=None):
    """What script.main prints, called with the words of the line, `out` behind them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            script.main(shlex.split(line) + [str(out)] * (out is not None))
    except BaseException as error:                            # a loader kept alive here would be waited for later
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return printed.getvalue()


def fail(script, line, *words):
    """script.main must end with one line that holds all the words."""
    with pytest.raises(UserError) as error:
        command(script, line)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def process(cwd, *words):
    """What `python WORDS` prints."""
    result = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=120,
                            check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def spy(monkeypatch, owner, name, look):
    """Calls look with the arguments of owner.name before each call of it."""
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **options: (look(*args, **options), function(*args, **options))[1])


def log_of(out, key):
    """{iteration: value} of the lines of log.jsonl that have the key; of two of one iteration the last counts."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {record["iteration"]: record[key] for record in records if key in record}


def last_line(printed, name, mode="ss", split="val"):
    """mIoU, pixAcc, mAcc and the number of images of the last line of an evaluation."""
    found = re.fullmatch(rf"eval {name} {split} {mode} \| mIoU (\S+) \| pixAcc (\S+) \| mAcc (\S+) \| (\d+) images \| \d+ s",
                         printed.splitlines()[-1])
    return [*map(float, found.groups()[:3]), int(found[4])]


def validation(out):
    """mIoU, pixAcc and mAcc of the last validation of a run."""
    return [round(100 * list(log_of(out, f"val_{key}").values())[-1], 2) for key in ("miou", "pixacc", "macc")]


@pytest.fixture(scope="session")
def run_of_three_iterations(folder_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ema, "DilatedResNet", TinyBackbone)
        command(train, f"{TRAIN} --data-root {folder_root} --iters 3 --out", out)
    return out


@pytest.fixture
def trained(run_of_three_iterations, tiny):
    """The output folder of a run on the user's own folder, not to be changed; of a tiny network."""
    return run_of_three_iterations


def random_batch(count=2):
    """Images and labels as the loader gives them; one image has more ignored pixels than the others."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (count, 33, 33), generator=generator).byte()
    labels[0, :20] = 255
    return torch.randint(0, 256, (count, 3, 33, 33), generator=generator).byte(), labels


def gradients(part):
    """Gradients of a network whose BN is in eval mode, from this process's part of a batch."""
    net = small_net().train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model = DistributedDataParallel(net) if dist.is_initialized() else net
    for _ in range(2):                                        # DDP finds out about unused parameters in the second step
        net.zero_grad()
        train.batch_loss(model, [x[part] for x in random_batch(4)], torch.device("cpu"), None).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.requires_grad}


def scores_of(root, split):
    result = evaluate.evaluate(small_net(), build_dataset("folder", root, split), torch.device("cpu"), workers=0)
    return {key: value for key, value in result.items() if key != "seconds"}


def after_three_steps(**options):
    """Weights and bases of a network with these options; BN's statistics differ between processes on the CPU."""
    net = small_net(**options).train()
    model, optimizer = DistributedDataParallel(net), train.build_optimizer(net, 0.1)
    for i in range(3):
        torch.manual_seed(10 * i + dist.get_rank())
        optimizer.zero_grad()
        train.segmentation_loss(model(torch.randn(2, 3, 33, 33)), torch.randint(0, 4, (2, 33, 33))).backward()
        optimizer.step()
    return {key: value for key, value in net.state_dict().items() if not re.search("running|tracked", key)}


def run_of_a_group(folder, root):
    """What a process of a group sees of a run."""
    seen = {"images": [], "dropout": [], "losses": []}
    step = train.training_step

    def watched(model, optimizer, loader, **options):
        seen["dropout"].append(torch.rand(4))
        loss, seconds = step(model, optimizer, loader, **options)
        seen["losses"].append(loss.item())
        return loss, seconds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "training_step", watched)
        spy(patch, train, "batch_loss", lambda model, batch, *_: seen["images"].append(batch[0]))
        command(train, f"{TRAIN} --data-root {root} --iters 3 --lr 0.05 --out", folder / "run")
    return seen | {"log": list(log_of(folder / "run", "loss").values())}


def in_a_group(rank, folder, root, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    ema.DilatedResNet = TinyBackbone
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {"bases": follow_bases(slice(2 * rank, 2 * rank + 2)), "gradients": gradients(slice(rank, None, 2)),
               "scores": [scores_of(root, split) for split in ("train", "val", "one")],
               "options": [after_three_steps(**options) for options in (
                   {"gradient": "last"}, {"gradient": "full"}, {"gradient": "full", "base_update": "backprop"},
                   {"base_update": "fixed"}, {"attention": "nonlocal"}, {"attention": "a2"}, {"attention": "none"})]}
    dist.destroy_process_group()
    torch.save(results | {"run": run_of_a_group(folder, root)}, folder / f"{rank}.pt")


@pytest.fixture(scope="session")
def pair(folder_root, tmp_path_factory):
    """What two processes compute together, as under torchrun."""
    folder = tmp_path_factory.mktemp("pair")
    torch.multiprocessing.spawn(in_a_group, (folder, folder_root, free_port()), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
