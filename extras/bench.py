"""How fast is every stage here, and how fast is the released code's way of doing it? Images/s of both, and the ratio.

    python -m extras.bench --dataset voc --data-root DIR --backbone resnet50

Takes train.py's flags (and prints its --help): those of data, network and attention, --recipe, --batch-size, --workers,
--amp and --device count, the others, --weights too, have nothing to say here. The two ways take turns in one process
and their medians are compared, because other programs may use the machine as well.
Shapes: H x W pixels of one image, L classes.
"""
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

import train
from data import IGNORE, TrainView, normalise, schedule
from evaluate import MS_SCALES, layout, make_loader, pad, pick_amp, pick_device, predict, run


class WholeImageView(TrainView):
    """The released code's training view: the whole image becomes floating point, is scaled, then cut."""

    def __getitem__(self, key):
        rng = np.random.default_rng((self.seed, *key))
        image, label = self.data[key[1]]                                       # (3, H, W), (H, W)
        scale = rng.choice(self.data.scales)
        h, w = (max(1, int(side * scale)) for side in label.shape)
        image = F.interpolate(normalise(image[None]), (h, w), mode="bilinear", align_corners=True)[0]      # (3, h, w)
        label = F.interpolate(label[None, None].float(), (h, w), mode="nearest")[0, 0]                     # (h, w)
        beyond = (0, max(0, self.crop - w), 0, max(0, self.crop - h))
        image, label = F.pad(image, beyond), F.pad(label, beyond, value=IGNORE)
        top, left = (rng.integers(side - self.crop + 1) for side in label.shape)
        image = image[:, top:top + self.crop, left:left + self.crop]           # (3, crop, crop)
        label = label[top:top + self.crop, left:left + self.crop]              # (crop, crop)
        return (image.flip(2), label.long().flip(1)) if rng.random() < 0.5 else (image.contiguous(), label.long())


class Ours:
    """This project's way: crops in uint8, channels_last, bfloat16 where it is fast."""
    view = TrainView

    def __init__(self, args, data, device):
        self.device, self.net = device, train.build_network(args, len(data.classes), "none")
        self.net.to(device, memory_format=layout(device))
        self.amp = pick_amp(args.amp, device)
        self.setup(args, data)

    def setup(self, args, data):
        """The optimiser, the crops one by one, and the loader with its workers."""
        self.optimizer = train.build_optimizer(self.net, 1e-6)
        self.crops = self.view(data, args.crop, args.seed)
        self.keys, batches = (schedule(data, args.batch_size, args.seed, range(1, 10 ** 6)) for _ in range(2))
        self.batch = default_collate([self.crops[key] for key in next(self.keys)])
        self.loader = iter(make_loader(self.crops, self.device, args.workers, batch_sampler=batches))

    # Each of these does some work and returns the number of images.
    def load(self):
        return len([self.crops[key] for key in next(self.keys)[:8]])

    def step(self, batch):
        self.loss(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return len(batch[0])

    def evaluate(self, images, ms_flip):
        for image in images:
            self.predict(image, ms_flip).max(0)
        return len(images)

    def loss(self, batch):
        return train.batch_loss(self.net, batch, self.device, self.amp)

    def predict(self, image, ms_flip):
        return predict(self.net, image, ms_flip, self.amp)                     # (L, H, W)


class Released(Ours):
    """The released code's way: floating point from the loader on, float32, the layout that torch begins with."""
    view = WholeImageView

    def __init__(self, args, data, device):
        self.device, self.net = device, train.build_network(args, len(data.classes), "none").to(device)
        self.setup(args, data)

    def loss(self, batch):
        return train.segmentation_loss(self.net(batch[0].to(self.device)), batch[1].to(self.device))

    @torch.no_grad()
    def predict(self, image, ms_flip):
        """That of its forks: every view alone, its logits brought to full size."""
        size, total = image.shape[1:], 0
        image = normalise(image[None])                                         # (1, 3, H, W)
        for scale in MS_SCALES if ms_flip else (1.0,):
            h, w = (max(1, int(side * scale)) for side in size)
            for mirror in (False, True)[:1 + ms_flip]:
                view = F.interpolate(image, (h, w), mode="bilinear", align_corners=True)       # (1, 3, h, w)
                view = pad(view.flip(3) if mirror else view, self.net.config["output_stride"])
                logits = self.net(view)[:, :, :h, :w]                          # (1, L, h, w)
                logits = F.interpolate(logits, size, mode="bilinear", align_corners=True)      # (1, L, H, W)
                total = total + (logits.flip(3) if mirror else logits)
        return total[0]                                                        # (L, H, W)


def compare(name, ways, work, seconds):
    """Prints a row: images/s of work(way), which returns a number of images, for both ways. Returns that of ours."""
    rates, begun = ([], []), time.time()
    while len(rates[0]) < 3 or time.time() - begun < seconds:                  # the first round warms up
        for way, rate in zip(ways, rates, strict=True):
            since = time.time()
            count = work(way)
            if way.device.type != "cpu":
                torch.accelerator.synchronize(way.device)
            rate.append(count / (time.time() - since))
    ours, released = (float(np.median(rate[1:])) for rate in rates)
    print(f"{name:34s}{ours:9.2f}{released:10.2f}{ours / released:8.2f}", flush=True)
    return ours


def bench(args, seconds=8):
    """Prints the table: loading, training step, both together, evaluation; and which of the first two limits."""
    device = pick_device(args.device)
    data, _ = train.build_datasets(args)
    ways = Ours(args, data, device), Released(args, data, device)
    amp = "bfloat16" if ways[0].amp else "float32"
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} threads | {args.dataset}, crop "
          f"{args.crop}, batch {args.batch_size} | {args.backbone}, output stride {args.output_stride}\n"
          f"ours: {amp}, channels_last; released way: float32, contiguous\n\n"
          f"{'images/s':34s}{'ours':>9s}{'released':>10s}{'ratio':>8s}", flush=True)

    torch.backends.cudnn.benchmark = True                                      # crops are all of one size
    for way in ways:
        way.net.train()
    supply = compare("loading, one core", ways, lambda way: way.load(), seconds)
    demand = compare("training step, data at hand", ways, lambda way: way.step(way.batch), seconds)
    compare(f"training with {args.workers} workers for each", ways, lambda way: way.step(next(way.loader)), seconds)

    torch.backends.cudnn.benchmark = False                                     # images are of many sizes
    images = [data[i][0].to(device) for i in range(2)]                         # (3, H, W) each
    for way in ways:
        del way.loader                                                         # ends its workers
        way.net.eval()
        way.net.set_output_stride(train.EVAL_OUTPUT_STRIDE)
    compare("evaluation, single scale", ways, lambda way: way.evaluate(images, False), seconds)
    compare("evaluation, ms-flip", ways, lambda way: way.evaluate(images[:1], True), seconds)
    print(f"\nThe training step limits: one core loads {supply / demand:.1f} times what it takes." if supply > demand
          else f"\nLoading limits: the step takes what {demand / supply:.1f} cores load; --workers "
          f"{int(demand / supply) + 1} or more.")


def main(argv=None):
    bench(train.parse_args(argv))


if __name__ == "__main__":
    run(main)
