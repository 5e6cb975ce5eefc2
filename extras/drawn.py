"""Pictures drawn by program, for runs without a data set: scenes (landscapes, the default of train.py) and cells.

    python train.py                                    # scenes: a smoke test of the whole system on any machine
    python train.py --dataset cells-key                # does the attention carry what lies far away?

Functions of (index, split), with numpy and Pillow alone; the data set around them is data.py's. Shapes: H x W pixels.
"""
import functools

import numpy as np
from PIL import Image, ImageDraw

# ---------------------------------------------------------------------------------------------------------------------
# Scenes
# Every scene is painted from five pots, and rivals share one: sky and sea, grass and tree, sand and house wall,
# mountain and roof (and hull and trunk), sun and sail (and lit window). Colour and brushwork belong to the pot, not to
# the class, and change with hour and season, so a close-up look cannot tell the rivals apart: context decides.
SKY, SEA, GRASS, SAND, MOUNTAIN, TREE, HOUSE, BOAT, SUN = range(9)
AIR, LEAF, EARTH, ROCK, GLOW = range(5)  # the pots

HOURS = np.array([  # zenith, horizon, tint of the light in percent
    [(62, 122, 192), (190, 220, 232), (102, 102, 99)],   # noon
    [(96, 88, 156), (252, 176, 112), (106, 91, 84)],     # dusk
    [(132, 144, 156), (212, 213, 208), (94, 96, 97)],    # overcast
    [(102, 138, 190), (246, 210, 202), (99, 96, 104)],   # dawn
    [(70, 142, 172), (238, 226, 194), (103, 101, 94)]])  # afternoon
POTS = np.array([  # leaf, earth, rock and glow of a scene are mixed from these
    [(98, 146, 62), (62, 116, 70), (204, 136, 58), (156, 162, 88), (212, 182, 88)],
    [(230, 206, 154), (214, 176, 134), (238, 222, 198), (200, 188, 176), (224, 190, 164)],
    [(108, 110, 140), (142, 100, 88), (104, 94, 132), (92, 110, 120), (166, 92, 72)],
    [(255, 242, 200), (255, 224, 144), (255, 250, 240), (255, 200, 130), (255, 234, 216)]])
DABS = (16, 5), (40, 44), (56, 56), (22, 60), (12, 12)  # how many dabs of each pot's brush go down and across a picture
LAYOUTS = ((SEA, SAND, GRASS), (SEA, GRASS), (SEA, SAND), (GRASS, SEA), (GRASS, SEA, SAND), (GRASS, SAND, SEA),
           (SEA, GRASS, SAND), (SAND, GRASS))  # the ground from the horizon to the viewer


def disc(x, y, radius):
    angle = np.arange(16) * (np.pi / 8)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1)


# Each thing has two kinds; a kind is a list of parts (pot, shade, outline), its foot at (0, 0), y pointing down.
TRUNK = ROCK, 0.7, [(-3, 0), (-2, -14), (2, -14), (3, 0)]
WALL = EARTH, 1.0, [(-12, 0), (-12, -13), (12, -13), (12, 0)]
HULL = ROCK, 0.85, [(-13, -6), (13, -6), (9, 0), (-9, 0)]
WINDOWS = [[(x - 2, -4), (x - 2, -9), (x + 2, -9), (x + 2, -4)] for x in (-6, 6)]
THINGS = {
    TREE: ([TRUNK, (LEAF, 0.86, disc(0, -19, 11)), (LEAF, 1.0, disc(-4, -21, 7)), (LEAF, 1.1, disc(4, -24, 6))],
           [TRUNK, (LEAF, 0.88, [(-11, -5), (0, -23), (11, -5)]), (LEAF, 0.98, [(-9.5, -11), (0, -29), (9.5, -11)]),
            (LEAF, 1.08, [(-8, -17), (0, -34), (8, -17)])]),
    HOUSE: ([WALL, (ROCK, 1.0, [(-14, -11), (-8, -23), (8, -23), (14, -11)])] + [(ROCK, 0.7, w) for w in WINDOWS],
            [WALL, (ROCK, 1.0, [(-14, -11), (0, -26), (14, -11)])] + [(GLOW, 1.0, w) for w in WINDOWS]),
    BOAT: ([(GLOW, 1.0, [(0, -5), (0, -28), (8, -16), (11, -6)]), (GLOW, 0.9, [(0, -5), (-1, -25), (-11, -6)]), HULL],
           [(GLOW, 1.0, [(-10, -6), (-6, -19), (5, -28), (11, -6)]), HULL])}


def draw_scene(index, split, size=(97, 129)):
    """Paint scene `index` of the series `split` ("train" or "val"); same arguments, same bytes.

    Returns the image, uint8 (H, W, 3), and its label, uint8 (H, W), with class indices.
    """
    rng = np.random.default_rng([int(split == "val"), index])
    uniform = rng.uniform
    height, width = 96, 96 * size[1] / size[0]  # all lengths below are for a picture 96 high
    zoom = 2 * size[0] / height  # shapes are drawn at twice the size, then halved: smooth edges

    zenith, haze, light = HOURS[rng.integers(len(HOURS))] + uniform(-11, 11, (3, 3)) * [[1], [1], [0.6]]
    share = uniform(size=(4, 5, 1)) ** 4
    leaf, earth, rock, glow = (POTS * share).sum(1) / share.sum(1)                         # (3,) each
    upper_colour = np.stack([zenith, leaf * 1.12, earth * 1.06, rock * 1.08, glow])        # (5, 3)
    lower_colour = np.stack([haze, leaf * 0.84, earth * 0.9, rock * 0.9, glow * (1, 0.95, 0.85)])
    canvas = Image.new("L", (2 * size[1], 2 * size[0]))  # the number of the shape seen at each pixel, 0 for the sky
    draw = ImageDraw.Draw(canvas)
    shapes = []  # per shape: label, pot, upper edge, lower edge, the colour there and there

    def paint(label, pot, outline, shade=1.0, distance=0.0):
        outline = np.asarray(outline)
        colours = np.stack([upper_colour[pot], lower_colour[pot]])
        if label == SEA:
            colours = np.stack([0.75 * haze + 0.25 * zenith, zenith])  # the sky upside down
        elif label != SKY:
            colours = colours * (shade * uniform(0.9, 1.1)) + uniform(-9, 9, 3)
        draw.polygon([tuple(point) for point in np.rint(outline * zoom).astype(int).tolist()], fill=len(shapes))
        edges = outline[:, 1].min(), outline[:, 1].max()
        shapes.append((label, pot, *edges, *(colours + distance * (haze - colours))))

    def below(y, amplitude, knots, octaves):
        """All that lies below a fractal line across the picture."""
        x = np.linspace(-2, width + 2, 65)
        for count in knots * 2 ** np.arange(octaves):
            y = y + amplitude * np.interp(x, np.linspace(-2, width + 2, count + 1), uniform(-0.5, 0.5, count + 1))
            amplitude = amplitude / 2
        return [(-2, height + 2), *zip(x, y), (width + 2, height + 2)]

    # the backdrop: sky, sun, ridges one behind the other
    horizon = uniform(36, 50)
    paint(SKY, AIR, [(-2, 0), (width + 2, 0), (width + 2, horizon), (-2, horizon)])
    sun_x, sun_y, sunny = uniform(12, width - 12), uniform(12, horizon - 6), uniform() < 0.75
    if sunny:
        paint(SUN, GLOW, disc(sun_x, sun_y, uniform(9, 12)))
    for distance in (0.5, 0.2)[rng.choice(3, p=(0.45, 0.35, 0.2)):]:
        ridge = below(horizon - uniform(6, 16), uniform(10, 28), rng.integers(2, 5), 4)
        paint(MOUNTAIN, ROCK, ridge, distance=distance)

    # the ground, then the things on it from far to near, larger when nearer
    layout = LAYOUTS[rng.integers(len(LAYOUTS))]
    steps = (np.arange(1, len(layout)) + uniform(-0.15, 0.15, len(layout) - 1)) / len(layout)
    edges = [horizon, *(horizon + (height - horizon) * steps), height + 3]
    things = []
    for label, upper, lower in zip(layout, edges, edges[1:]):
        wave = 0 if label == SEA and upper == horizon else uniform(3, 7)
        paint(label, {SEA: AIR, GRASS: LEAF, SAND: EARTH}[label], below(upper, wave, 3, 2))
        counts = {SEA: {BOAT: rng.integers(1, 3)}, GRASS: {TREE: rng.integers(1, 3), HOUSE: rng.integers(0, 3)}}
        labels = [thing for thing, count in counts.get(label, {}).items() for _ in range(count)]
        for place, thing in zip(rng.permutation(len(labels)), labels):  # side by side, so that none hides its like
            things.append((uniform(upper + 4, lower - 3), (place + uniform(0.2, 0.8)) * width / len(labels), thing))
    for y, x, thing in sorted(things):
        scale = (0.85 + 0.7 * (y - horizon) / (height - horizon)) * uniform(0.9, 1.15, 2) * (rng.choice((-1, 1)), 1)
        for pot, shade, outline in THINGS[thing][rng.integers(2)]:
            paint(thing, pot, (outline + uniform(-0.5, 0.5, (len(outline), 2))) * scale + (x, y), shade)

    # from shape numbers to colours: every shape fades from its upper to its lower edge
    label, pot, upper, lower, first, last = (np.array(column) for column in zip(*shapes))  # (S,), the last two (S, 3)
    row, shape = np.arange(2 * size[0])[:, None], np.asarray(canvas)                       # (2H, 1), (2H, 2W)
    fade = first + ((row / zoom - upper) / (lower - upper)).clip(0, 1)[..., None] * (last - first)         # (2H, S, 3)
    image = fade.clip(0, 255).astype(np.uint8).reshape(-1, 3).take(row * len(shapes) + shape, 0)           # (2H, 2W, 3)
    image = np.asarray(Image.fromarray(image).reduce(2), np.float32)                       # (H, W, 3)
    label, pot = label.astype(np.uint8)[shape[::2, ::2]], pot[shape[::2, ::2]]             # (H, W) each

    # sunshine around the sun and in a column on the sea, the brushwork of the pots, the light of the hour, grain
    y, x = np.ogrid[:size[0], :size[1]]
    if sunny:
        away = (2 * x / zoom - sun_x) ** 2 + (label == SKY) * (2 * y / zoom - sun_y) ** 2
        shine = (pot == AIR) * 0.6 / (1 + away / 160)
        image += shine[..., None].astype(np.float32) * (glow.astype(np.float32) - image)
    dabs = [0.3 * rng.integers(0, 256, (*cells, 3)) + 0.7 * rng.integers(38, 218, (*cells, 1)) for cells in DABS]
    dabs = [Image.fromarray(brush.astype(np.uint8)).resize(size[::-1], Image.BICUBIC) for brush in dabs]
    strength = uniform(0.1, 0.2, 5).astype(np.float32)
    image += (np.stack(dabs)[pot, y, x] - np.float32(128)) * strength[pot][..., None]
    image = image * (light / 100).astype(np.float32) + rng.integers(-4, 5, (*size, 1), np.int8)
    return image.clip(0, 255).astype(np.uint8), label


# ---------------------------------------------------------------------------------------------------------------------
# Cells
# A task with known answers, for attention and nothing else: about 40 cells, half of them striped. The striped cells of
# an image are all of class 0 or all of class 1, which differ by `shift` in the mean of a cell's brightness, itself of
# deviation 1: with shift 0.5 one cell tells 60% (the normal distribution's Phi(shift / 2)), the mean of twenty 87%
# (Phi(shift / 2 * sqrt(20))). Only who looks all over the image, at stripes alone, gets there.
SHIFTS = {"cells": 0.5,            # pool: many weak witnesses
          "cells-key": 0.0,        # key: the square in a corner decides, black or white
          "cells-local": 4.0}      # a control: every cell tells by itself (98%)
CELL_UNIT = 16                     # grey levels


def draw_cells(index, split, shift, side=193):
    """Paints picture `index` of the series `split` ("train" or "val"); same arguments, same bytes.

    Returns the image, uint8 (H, W, 3), and its label, uint8 (H, W): 0 or 1 striped, 2 lines, 3 checks, 255 the square.
    """
    rng = np.random.default_rng([int(split == "val"), index])
    bright = index % 2                                                         # the class of all striped cells
    count = rng.integers(36, 45)
    at = rng.uniform(0, side, (2, count, 1)).astype(np.float32)                # centres of the cells
    y, x = ((np.arange(side, dtype=np.float32) - centre) ** 2 for centre in at)            # (count, side) each
    cell = (y[:, :, None] + x[:, None]).argmin(0)                              # (H, W)  the nearest centre's number
    texture = rng.choice(3, count, p=(0.5, 0.25, 0.25))
    brightness = rng.normal(size=count) + (texture == 0) * shift * (bright - 0.5)
    row, column = np.indices((side, side)) // 2 % 2                            # stripes of two pixels
    pattern = np.stack([column, row, row ^ column])[texture[cell], np.arange(side)[:, None], np.arange(side)]  # (H, W)
    image = 128 + CELL_UNIT * (brightness[cell] + 2 * pattern - 1) + rng.normal(0, 4, (side, side))
    label = np.where(texture == 0, bright, texture + 1).astype(np.uint8)[cell]
    if shift == 0:
        image[:16, :16], label[:16, :16] = 255 * bright, 255
    return np.repeat(image.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2), label


# Name: function (index, split) -> image, label; number of pictures to validate on; names of the classes
PICTURES = {"scenes": (draw_scene, 64, ["sky", "sea", "grass", "sand", "mountain", "tree", "house", "boat", "sun"])}
CELLS = ["dark stripes", "bright stripes", "lines", "checks"]
PICTURES |= {name: (functools.partial(draw_cells, shift=shift), 400, CELLS)
             for name, shift in SHIFTS.items()}
