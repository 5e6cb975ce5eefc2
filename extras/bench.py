"""Images per second of each stage, beside a re-implementation of the released code's approach.

    python -m extras.bench --dataset voc --data-root DIR --backbone resnet101 --amp bf16

Takes train.py's flags: those of data, network, attention, --batch-size, --accumulate, --workers,
--amp and --device count. Other programs may use the machine as well: the two ways take turns, and
their medians are compared. Shapes: H x W pixels of one image.
"""
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

import train
from data import IGNORE, TrainView, normalise, schedule
from evaluate import init_process, make_loader, pick_amp, predict, run


class Ours:
    """This project's way: crops in uint8, channels_last, bfloat16 as --amp says."""
    view, memory_format = TrainView, torch.channels_last

    def __init__(self, args, data, device, amp):
        self.args, self.device, self.amp = args, device, amp
        args.weights, args.init = "none", None
        self.net, _ = train.build_network(args, None, data.classes)
        self.net.to(device, memory_format=self.memory_format)
        self.optimizer = train.build_optimizer(self.net, 1e-6)
        self.crops = self.view(data, args.crop, args.seed)
        self.keys, batches = (schedule(data, args.batch_size, args.seed, range(1, 10 ** 6))
                              for _ in range(2))
        self.loader = iter(make_loader(self.crops, device, args.workers, batch_sampler=batches))
        self.batch, self.waits = self.load(), []

    def load(self):
        return default_collate([self.crops[key] for key in next(self.keys)])

    def train(self):
        since = time.time()
        batch = next(self.loader)
        self.waits.append(time.time() - since)
        self.step(batch)

    def step(self, batch):
        train.training_step(self.net, self.optimizer, batch, 1e-6, self.args.accumulate,
                            self.device, self.amp)

    def predict(self, image, ms_flip):
        predict(self.net, image, ms_flip, self.amp).max(0)


class WholeImageView(TrainView):
    """The released training view: the whole image becomes floating point, is scaled, then cut."""

    def __getitem__(self, key):
        rng = np.random.default_rng((self.seed, *key))
        image, label = self.data[key[1]]  # (3, H, W), (H, W)
        scale, crop = rng.choice(self.data.scales), self.crop
        h, w = (int(side * scale) for side in label.shape)
        image = F.interpolate(
            normalise(image[None]), (h, w), mode="bilinear", align_corners=True)[0]  # (3, h, w)
        label = F.interpolate(label[None, None].float(), (h, w), mode="nearest")[0, 0]  # (h, w)
        beyond = (0, max(0, crop - w), 0, max(0, crop - h))
        image, label = F.pad(image, beyond), F.pad(label, beyond, value=IGNORE)
        top, left = (rng.integers(side - crop + 1) for side in label.shape)
        image = image[:, top:top + crop, left:left + crop].contiguous()  # (3, crop, crop)
        label = label[top:top + crop, left:left + crop].long()  # (crop, crop)
        return (image.flip(2), label.flip(1)) if rng.random() < 0.5 else (image, label)


class Released(Ours):
    """The released way: floating point from the loader on, float32, contiguous tensors."""
    view, memory_format = WholeImageView, torch.contiguous_format

    def step(self, batch):
        self.net.train()
        images, labels = (part.to(self.device) for part in batch)
        train.segmentation_loss(self.net(images), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def compare(name, ways, images, work, seconds):
    """Prints a row: images/s where work(way) does so many. Returns that of ours."""
    rates, begun = ([], []), time.time()
    while len(rates[0]) < 3 or time.time() - begun < seconds:                  # the first warms up
        for way, rate in zip(ways, rates):
            since = time.time()
            work(way)
            if way.device.type == "cuda":
                torch.cuda.synchronize()
            rate.append(images / (time.time() - since))
    ours, released = (np.median(rate[1:]) for rate in rates)
    print(f"{name:34s}{ours:9.2f}{released:10.2f}{ours / released:8.2f}", flush=True)
    return ours


def measure_step(way):
    """FLOPs of a training step, and the most memory that its tensors held in GiB."""
    with FlopCounterMode(display=False) as counter:         # this step also warms up
        way.step(way.batch)
    torch.cuda.reset_peak_memory_stats()
    way.step(way.batch)
    return counter.get_total_flops(), torch.cuda.max_memory_allocated() / 2 ** 30


def matrix_rate(size=8192):
    """FLOP/s of products of large bfloat16 matrices."""
    matrix = torch.randn(size, size, dtype=torch.bfloat16, device="cuda")  # (size, size)
    for _ in range(2):                                      # the first time warms up
        torch.cuda.synchronize()
        since = time.time()
        for _ in range(20):
            matrix @ matrix
        torch.cuda.synchronize()
    return 20 * 2 * size ** 3 / (time.time() - since)


def bench(args, seconds=8):
    device = init_process(args.device)
    data, _ = train.build_datasets(args, world=1)
    ours, gpu = Ours(args, data, device, pick_amp(args.amp, device)), device.type == "cuda"
    print(f"{torch.cuda.get_device_name() if gpu else 'cpu'}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads | {args.dataset}, crop {args.crop}, batch "
          f"{args.batch_size} | {args.backbone}, output stride {args.output_stride}\n"
          f"ours: {'bfloat16' if ours.amp else 'float32'}, channels_last; released: float32, "
          f"contiguous\n\n{'images/s':34s}{'ours':>9s}{'released':>10s}{'ratio':>8s}", flush=True)
    flops, memory = measure_step(ours) if gpu else (0, 0)   # before the other takes memory
    ways, B = (ours, Released(args, data, device, None)), args.batch_size

    supply = compare("loading, one core", ways, B, Ours.load, seconds)
    demand = compare("training step, data at hand", ways, B, lambda w: w.step(w.batch), seconds)
    both = compare(f"training with {args.workers} workers", ways, B, Ours.train, seconds)
    image = data[0][0].to(device)  # (3, H, W)
    torch.backends.cudnn.benchmark = False                  # as in evaluation
    for way in ways:
        del way.loader                                      # ends its workers
        way.net.eval().set_output_stride(8)
    compare("evaluation, single scale", ways, 1, lambda way: way.predict(image, False), seconds)
    compare("evaluation, ms-flip", ways, 1, lambda way: way.predict(image, True), seconds)

    waiting = 100 * np.median(ours.waits[1:]) * both / B
    print(f"\nOne core loads {supply / demand:.1f} times what our step takes. With {args.workers} "
          f"workers it waits for data {waiting:.0f}% of the time.")
    if gpu:
        rate, matrices = flops * demand / B, matrix_rate()
        print(f"Our step holds {memory:.1f} GiB and does {rate / 1e12:.1f} TFLOP/s, "
              f"{100 * rate / matrices:.0f}% of the {matrices / 1e12:.0f} of bfloat16 matrices.")


def main(argv=None):
    bench(train.parse_args(argv))


if __name__ == "__main__":
    run(main)
