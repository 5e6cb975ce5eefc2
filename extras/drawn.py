"""Scenes: landscapes that a program draws, for runs without a data set (the default of train.py).

    python train.py             # a smoke test of the whole system on any machine

Shapes: H x W pixels of a picture, S polygons in it. Lengths are for a picture 96 high.
"""
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset


class Scenes(Dataset):
    """Scenes as a data set, drawn when they are asked for: 10,000 for training, 64 for validation.

    item: image uint8 (3, H, W), label uint8 (H, W)
    """
    name, scales, labels = "scenes", (1.0,), "drawn"

    def __init__(self, split):
        if split not in ("train", "val"):
            raise FileNotFoundError(f"scenes have no split {split!r}: there are train and val")
        self.split, self.classes = split, [
            "sky", "sea", "grass", "sand", "mountain", "tree", "house", "boat", "sun"]
        self.ids = [f"scene{i:02d}" for i in range(64 if split == "val" else 10_000)]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        image, label = map(torch.from_numpy, draw_scene(i, self.split))
        return image.permute(2, 0, 1), label  # (3, H, W), (H, W)


# A scene is painted from five pots, and rivals share one: sky and sea, grass and tree, sand and
# house wall, mountain and roof, sun and sail. Colour and brushwork belong to the pot, not to the
# class, and change with hour and season. So a close-up cannot tell the rivals apart: context does.
SKY, SEA, GRASS, SAND, MOUNTAIN, TREE, HOUSE, BOAT, SUN = range(9)
AIR, LEAF, EARTH, ROCK, GLOW = range(5)                     # the pots
H, W, HEIGHT, WIDTH = 97, 129, 96, 96 * 129 / 97            # in pixels, and as a length
ZOOM = 2 * H / HEIGHT             # polygons are drawn at twice the size, then halved: smooth edges

HOURS = np.array([  # zenith, horizon, tint of the light in percent
    [(62, 122, 192), (190, 220, 232), (102, 102, 99)],      # noon
    [(96, 88, 156), (252, 176, 112), (106, 91, 84)],        # dusk
    [(132, 144, 156), (212, 213, 208), (94, 96, 97)],       # overcast
    [(102, 138, 190), (246, 210, 202), (99, 96, 104)],      # dawn
    [(70, 142, 172), (238, 226, 194), (103, 101, 94)]])     # afternoon
POTS = np.array([  # leaf, earth, rock and glow of a scene are mixed from these
    [(98, 146, 62), (62, 116, 70), (204, 136, 58), (156, 162, 88), (212, 182, 88)],
    [(230, 206, 154), (214, 176, 134), (238, 222, 198), (200, 188, 176), (224, 190, 164)],
    [(108, 110, 140), (142, 100, 88), (104, 94, 132), (92, 110, 120), (166, 92, 72)],
    [(255, 242, 200), (255, 224, 144), (255, 250, 240), (255, 200, 130), (255, 234, 216)]])
DABS = (16, 5), (40, 44), (56, 56), (22, 60), (12, 12)      # of each pot's brush, down and across
LAYOUTS = (  # the ground from the horizon to the viewer
    (SEA, SAND, GRASS), (SEA, GRASS), (SEA, SAND), (GRASS, SEA), (GRASS, SEA, SAND),
    (GRASS, SAND, SEA), (SEA, GRASS, SAND), (SAND, GRASS))


def disc(x, y, radius):
    angle = np.arange(16) * (np.pi / 8)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1)


# Each thing has two kinds. A kind is a list of parts (pot, shade, outline), its foot at (0, 0).
TRUNK = ROCK, 0.7, [(-3, 0), (-2, -14), (2, -14), (3, 0)]
WALL = EARTH, 1.0, [(-12, 0), (-12, -13), (12, -13), (12, 0)]
HULL = ROCK, 0.85, [(-13, -6), (13, -6), (9, 0), (-9, 0)]
WINDOWS = [[(x - 2, -4), (x - 2, -9), (x + 2, -9), (x + 2, -4)] for x in (-6, 6)]
DARK, LIT = [(ROCK, 0.7, window) for window in WINDOWS], [(GLOW, 1.0, window) for window in WINDOWS]
THINGS = {
    TREE: ([TRUNK, (LEAF, 0.86, disc(0, -19, 11)), (LEAF, 1.0, disc(-4, -21, 7)),
            (LEAF, 1.1, disc(4, -24, 6))],
           [TRUNK, (LEAF, 0.88, [(-11, -5), (0, -23), (11, -5)]),
            (LEAF, 0.98, [(-9.5, -11), (0, -29), (9.5, -11)]),
            (LEAF, 1.08, [(-8, -17), (0, -34), (8, -17)])]),
    HOUSE: ([WALL, (ROCK, 1.0, [(-14, -11), (-8, -23), (8, -23), (14, -11)]), *DARK],
            [WALL, (ROCK, 1.0, [(-14, -11), (0, -26), (14, -11)]), *LIT]),
    BOAT: ([(GLOW, 1.0, [(0, -5), (0, -28), (8, -16), (11, -6)]),
            (GLOW, 0.9, [(0, -5), (-1, -25), (-11, -6)]), HULL],
           [(GLOW, 1.0, [(-10, -6), (-6, -19), (5, -28), (11, -6)]), HULL])}


def draw_scene(index, split):
    """Scene `index` of the series "train" or "val", always the same bytes: image uint8 (H, W, 3)
    and class indices uint8 (H, W)."""
    painting = Painting(np.random.default_rng([int(split == "val"), index]))
    painting.paint_backdrop()
    painting.paint_ground()
    return painting.render()


class Painting:
    """A scene on its way, polygon over polygon."""

    def __init__(self, rng):
        self.rng = rng
        hour = HOURS[rng.integers(len(HOURS))] + rng.uniform(-11, 11, (3, 3)) * [[1], [1], [0.6]]
        self.zenith, self.haze, self.light = hour  # (3,) each
        share = rng.uniform(size=(4, 5, 1)) ** 4  # (4, 5, 1)
        leaf, earth, rock, self.glow = (POTS * share).sum(1) / share.sum(1)  # (3,) each
        # Each pot has a colour for the upper edge of a polygon and one for the lower.
        upper = [self.zenith, leaf * 1.12, earth * 1.06, rock * 1.08, self.glow]
        lower = [self.haze, leaf * 0.84, earth * 0.9, rock * 0.9, self.glow * (1, 0.95, 0.85)]
        self.pots = np.stack([upper, lower], 1)  # (5, 2, 3)
        self.canvas = Image.new("L", (2 * W, 2 * H))        # the number of the polygon on top
        self.polygons = []        # class, pot, upper edge, lower edge, the colour there and there

    def paint(self, label, pot, outline, shade=1.0, distance=0.0):
        outline, colours = np.asarray(outline), self.pots[pot]  # (points, 2), (2, 3)
        if label == SEA:                                    # the sky upside down
            colours = np.stack([0.75 * self.haze + 0.25 * self.zenith, self.zenith])  # (2, 3)
        elif label != SKY:
            colours = colours * (shade * self.rng.uniform(0.9, 1.1)) + self.rng.uniform(-9, 9, 3)
        points = np.rint(outline * ZOOM).astype(int).flatten().tolist()        # x, y, x, y ...
        ImageDraw.Draw(self.canvas).polygon(points, fill=len(self.polygons))
        edges = outline[:, 1].min(), outline[:, 1].max()
        self.polygons.append((label, pot, *edges, *(colours + distance * (self.haze - colours))))

    def below(self, y, amplitude, knots, octaves):
        """The outline of all that lies below a fractal line across the picture."""
        x = np.linspace(-2, WIDTH + 2, 65)  # (65,)
        for count in knots * 2 ** np.arange(octaves):
            at = np.linspace(-2, WIDTH + 2, count + 1)  # (count + 1,)
            y = y + amplitude * np.interp(x, at, self.rng.uniform(-0.5, 0.5, count + 1))  # (65,)
            amplitude = amplitude / 2
        return [(-2, HEIGHT + 2), *zip(x, y), (WIDTH + 2, HEIGHT + 2)]

    def paint_backdrop(self):
        """Sky, sun, and ridges one behind the other."""
        rng, uniform = self.rng, self.rng.uniform
        self.horizon = uniform(36, 50)
        corners = [(-2, 0), (WIDTH + 2, 0), (WIDTH + 2, self.horizon), (-2, self.horizon)]
        self.paint(SKY, AIR, corners)
        self.sun = uniform(12, WIDTH - 12), uniform(12, self.horizon - 6)
        self.sunny = uniform() < 0.75
        if self.sunny:
            self.paint(SUN, GLOW, disc(*self.sun, uniform(9, 12)))
        for distance in (0.5, 0.2)[rng.choice(3, p=(0.45, 0.35, 0.2)):]:
            top = self.horizon - uniform(6, 16)
            ridge = self.below(top, uniform(10, 28), rng.integers(2, 5), 4)
            self.paint(MOUNTAIN, ROCK, ridge, distance=distance)

    def paint_ground(self):
        """The ground, then the things on it from far to near, larger when nearer."""
        rng, uniform, horizon = self.rng, self.rng.uniform, self.horizon
        ground = LAYOUTS[rng.integers(len(LAYOUTS))]
        steps = np.arange(1, len(ground)) + uniform(-0.15, 0.15, len(ground) - 1)
        steps = horizon + (HEIGHT - horizon) * (steps / len(ground))
        edges, things = [horizon, *steps, HEIGHT + 3], []
        for label, upper, lower in zip(ground, edges, edges[1:]):
            wave = 0 if label == SEA and upper == horizon else uniform(3, 7)
            pot = {SEA: AIR, GRASS: LEAF, SAND: EARTH}[label]
            self.paint(label, pot, self.below(upper, wave, 3, 2))
            counts = {SEA: {BOAT: rng.integers(1, 3)},
                      GRASS: {TREE: rng.integers(1, 3), HOUSE: rng.integers(0, 3)}}
            labels = [thing for thing, n in counts.get(label, {}).items() for _ in range(n)]
            # They stand side by side, so that none hides its like.
            for place, thing in zip(rng.permutation(len(labels)), labels):
                y = uniform(upper + 4, lower - 3)
                things.append((y, (place + uniform(0.2, 0.8)) * WIDTH / len(labels), thing))
        for y, x, thing in sorted(things):
            scale = 0.85 + 0.7 * (y - horizon) / (HEIGHT - horizon)
            scale = scale * uniform(0.9, 1.15, 2) * (rng.choice((-1, 1)), 1)  # (2,)
            for pot, shade, outline in THINGS[thing][rng.integers(2)]:
                outline = outline + uniform(-0.5, 0.5, (len(outline), 2))  # (points, 2)
                self.paint(thing, pot, outline * scale + (x, y), shade)

    def render(self):
        """From polygons to the image and its label. Each fades from its upper to its lower edge."""
        label, pot, upper, lower, first, last = (np.array(column) for column in zip(*self.polygons))
        polygon, row = np.asarray(self.canvas), np.arange(2 * H)[:, None]  # (2H, 2W), (2H, 1)
        fade = ((row / ZOOM - upper) / (lower - upper)).clip(0, 1)[..., None]  # (2H, S, 1)
        colours = (first + fade * (last - first)).clip(0, 255).astype(np.uint8)  # (2H, S, 3)
        image = colours.reshape(-1, 3).take(row * len(label) + polygon, 0)  # (2H, 2W, 3)
        image = np.asarray(Image.fromarray(image).reduce(2), np.float32)  # (H, W, 3)
        polygon = polygon[::2, ::2]  # (H, W)
        label, pot = label.astype(np.uint8)[polygon], pot[polygon]  # (H, W) each
        return self.light_up(image, label, pot), label

    def light_up(self, image, label, pot):
        """Adds sunshine in the sky and on the sea, brushwork, the light of the hour, and grain."""
        y, x = np.ogrid[:H, :W]  # (H, 1), (1, W)
        if self.sunny:
            sun_x, sun_y = self.sun
            away = (2 * x / ZOOM - sun_x) ** 2 + (label == SKY) * (2 * y / ZOOM - sun_y) ** 2
            shine = ((pot == AIR) * 0.6 / (1 + away / 160)).astype(np.float32)  # (H, W)
            image = image + shine[..., None] * (self.glow.astype(np.float32) - image)  # (H, W, 3)
        integers = self.rng.integers
        dabs = [0.3 * integers(0, 256, (*cells, 3)) + 0.7 * integers(38, 218, (*cells, 1))
                for cells in DABS]
        dabs = np.stack([Image.fromarray(brush.astype(np.uint8)).resize((W, H), Image.BICUBIC)
                         for brush in dabs])  # (5, H, W, 3)
        strength = self.rng.uniform(0.1, 0.2, 5).astype(np.float32)[pot][..., None]  # (H, W, 1)
        image = image + (dabs[pot, y, x] - np.float32(128)) * strength  # (H, W, 3)
        image = image * (self.light / 100).astype(np.float32) + integers(-4, 5, (H, W, 1), np.int8)
        return image.clip(0, 255).astype(np.uint8)
