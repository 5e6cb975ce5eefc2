"""What a run promises when something goes wrong, then the drawer. SLOW=1 runs the long ones as well."""
import io
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}    # for children too
import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from scipy.io import savemat
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import evaluate
import train
from backbone import UserError
from data import build_dataset, global_batch
from ema import EMAU, EMANet, NonLocal, load_checkpoint, read_checkpoint, save_checkpoint
from extras import bases, bench, check_data, costs, curves, drawn
from extras.evidence import look
from extras.evidence import run as experiments

slow = pytest.mark.skipif(os.environ.get("SLOW") != "1", reason="takes long: set SLOW=1")


# ---- Kills, damaged files, full disks. A run of 8 iterations has a checkpoint after each second one.
@pytest.mark.parametrize("place, call, action, kept", [
    ("train.training_step", 4, "be killed", 2), ("train.training_step", 2, "be killed", None),
    ("torch.save", 1, "write half, be killed", None), ("torch.save", 3, "write half, be killed", 2),
    ("torch.save", 8, "write half, be killed", 8), ("torch.save", 2, "write half, be killed", 2),
    ("os.replace", 3, "be killed", 2), ("os.replace", 3, "do it, be killed", 4), ("train.evaluate", 2, "be killed", 4)],
    ids=["training", "before the first checkpoint", "half the first checkpoint", "half a last.pth", "half a model.pth",
         "half the first model.pth", "before the rename", "after the rename", "validating"])
def test_kill_costs_only_what_follows_the_last_checkpoint(place, call, action, kept, command, straight, tmp_path):
    """kill -9 at any moment costs what follows the last checkpoint; --resume auto ends with the very weights."""
    assert python(tmp_path, command, partial(at_call, place, call, action))[0] == -signal.SIGKILL
    assert kept == (read_checkpoint(last)["iteration"] if (last := tmp_path / "run/last.pth").exists() else None)
    if place == "torch.save" and kept:                        # resumed and killed again: the model is as last validated
        python(tmp_path, command, partial(at_call, "train.training_step", 1, "be killed"))
        assert same(*(read_checkpoint(tmp_path / f"run/{name}.pth")["model"] for name in ("last", "model")))
    out = succeed(tmp_path, command)
    assert (kept == 8 or f"iter {(kept or 0) + 1:6d}/8" in out) and f"iter {kept or 0:6d}/8" not in out
    check_same_end(tmp_path / "run", straight(1))


def test_torn_log_goes_on(command, straight, tmp_path):
    """Half a line at the end of log.jsonl, as a power cut or a full disk leaves it, hinders neither run nor readers."""
    python(tmp_path, command, partial(at_call, "train.training_step", 4, "be killed"))
    with open(tmp_path / "run/log.jsonl", "a") as file:
        file.write('{"iteration": 4, "lo')
    succeed(tmp_path, command)
    check_same_end(tmp_path / "run", straight(1))


def test_damage_is_found(tmp_path):
    """A byte changed at any of 100 places or a cut at any of 50: refused with one line, or every tensor is equal."""
    rng, refused = np.random.default_rng(0), 0
    good = {"model": {f"layer{i}.weight": torch.randn(8, 3 + i) for i in range(10)}, "config": {"a": 1}}
    path = tmp_path / "last.pth"
    save_checkpoint(good, path)
    content = path.read_bytes()
    for trial in range(150):
        place = rng.integers(len(content))
        flipped = bytes([content[place] ^ rng.integers(1, 256)])
        path.write_bytes(content[:place] + (flipped + content[place + 1:]) * (trial < 100))
        try:
            assert same(read_checkpoint(path), good) and trial < 100
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 100


READING = ["{} --out new --resume run/last.pth", "{}", "{} --out new --init run/last.pth",        # {}: the command
           "evaluate.py --ckpt run/last.pth --device cpu", "{} --out new --weights run/last.pth"]


@pytest.mark.parametrize("reading", READING[:-1])
def test_damaged_file_is_refused(reading, command, straight, tmp_path):
    """One flipped byte in a tensor of a checkpoint: refused by its check sum, with one line, whatever it is for."""
    shutil.copytree(straight(1), tmp_path / "run")
    path = tmp_path / "run/last.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    fail(tmp_path, reading.format(command), "last.pth: damaged", "check sum")
    assert path.read_bytes() == content


@pytest.mark.parametrize("reading", READING)
@pytest.mark.parametrize("zipped", [True, False])
def test_no_file_executes_code(reading, zipped, command, tmp_path):
    """A file with a payload, a zip or a bare pickle, is refused with one line, and its code does not run."""
    (tmp_path / "run").mkdir()
    torch.save({"model": {}, "net": {}, "conv1.weight": torch.zeros(1), "config": Payload(str(tmp_path / "created"))},
               tmp_path / "run/last.pth", _use_new_zipfile_serialization=zipped)
    fail(tmp_path, reading.format(command), "last.pth")
    assert not (tmp_path / "created").exists()


def test_run_is_never_overwritten(command, straight, tmp_path):
    """A folder that holds a run is refused with one line that names --resume auto and --out, and left untouched."""
    shutil.copytree(straight(1), tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for options in ("", f" --resume {straight(1)}/last.pth", f" --init {straight(1)}/model.pth"):
        fail(tmp_path, command.replace(" --resume auto", options), "run is not empty", "--resume auto", "--out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    (tmp_path / "run/last.pth").unlink()
    fail(tmp_path, command, "no last.pth", "--out")


@pytest.mark.parametrize("place, action", [("os.fsync", "find no space"), ("torch.save", "write half, find no space"),
                                           ("train.training_step", "allow no large files")])
def test_full_disk_costs_nothing(place, action, command, straight, tmp_path):
    """A checkpoint that cannot be written ends the run with one line; the old one is whole, and the run goes on."""
    fail(tmp_path, command, "cannot write run/", before=partial(at_call, place, 3, action))
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert read_checkpoint(tmp_path / "run/last.pth")["iteration"] == 2
    load_checkpoint(tmp_path / "run/model.pth")
    succeed(tmp_path, command)
    check_same_end(tmp_path / "run", straight(1))


@pytest.mark.parametrize("out", ["file", "file/run", "/proc/run", "run"])
def test_unwritable_out_is_one_line(out, command, tmp_path):
    """--out at or below a file, where nothing can be created, or with a folder in the log's place: one line."""
    (tmp_path / "file").touch()
    (tmp_path / "run/log.jsonl").mkdir(parents=True)
    fail(tmp_path, command.replace("--out run", f"--out {out}"), out)


# ---- Signals, lost processes and workers, numbers that are not finite
@pytest.mark.parametrize("world, place, call, when, number, rank", [
    *((world, "train.training_step", world + 2, "signal", *whom) for world in (1, 2) for whom in ((2, 0), (15, None))),
    (2, "dist.all_reduce", 10, "do it, signal", 15, 0)])      # the signals' in 3: after those of start and validation
def test_signal_ends_the_step_and_saves(world, place, call, when, number, rank, command, straight, tmp_path):
    """Ctrl-C to one process and its workers, or SIGTERM to all: all end the same step, save, leave with 128 + n; of a
    step with a validation (two processes') the resumed run does it."""
    hook = partial(at_call, place, call, f"{when} {number} to the group", rank=rank)
    for status, _, err in launch(tmp_path, command + " --workers 2", hook, world):
        assert status == 128 + number and not err, (status, err)
    assert f"stopped after iteration {world + 2}, all saved" in (tmp_path / "stdout0").read_text()
    assert read_checkpoint(tmp_path / "run/last.pth")["iteration"] == world + 2
    succeed(tmp_path, command, world)
    check_same_end(tmp_path / "run", straight(world))


def test_machines_that_do_not_share_a_folder(command, tmp_path):
    """Where one process finds a checkpoint and another none, each ends with one line: they would train two networks."""
    python(tmp_path, command, partial(at_call, "train.training_step", 4, "be killed"))
    for status, _, err in launch(tmp_path, command, partial(at_call, "train.find_checkpoint", 1, "find none", 1), 2):
        assert status == 1 and "different checkpoints in run" in err and err.count("\n") == 1, err


@pytest.mark.parametrize("place, call, action, number", [
    ("train.training_step", 4, "interrupt twice", 2), ("train.build_network", 1, "signal 15 to the group", 15)])
def test_nothing_waits_for_an_end(place, call, action, number, command, tmp_path):
    """A second Ctrl-C does not wait for the step's end, nor a signal before the first step; what was saved is there."""
    status, _, _ = python(tmp_path, command, partial(at_call, place, call, action))
    assert status == -number                                                     # and not -9, after the time of `start`
    assert not (tmp_path / "run").exists() or read_checkpoint(tmp_path / "run/last.pth")["iteration"] == 2


@slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_torchrun_stops_with_all_saved(number, command, straight, tmp_path):
    """SIGTERM or Ctrl-C to torchrun, workers alive: both processes finish the step and save, and the run goes on."""
    torchrun(tmp_path, command + " --workers 1", f"at_call('train.training_step', 3, 'signal {number} to torchrun')")
    iteration, = re.findall(r"stopped after iteration (\d), all saved", (tmp_path / "stdout").read_text())
    assert read_checkpoint(tmp_path / "run/last.pth")["iteration"] == int(iteration) in (3, 4)
    succeed(tmp_path, command, 2)
    check_same_end(tmp_path / "run", straight(2))


@pytest.mark.parametrize("place, action", [
    ("train.training_step", "be killed"), ("train.training_step", "leave"), ("train.training_step", "fail"),
    ("dist.all_reduce", "be killed"), ("train.save_checkpoint", "be killed"), ("train.evaluate", "leave")])
def test_lost_process_ends_the_job(action, place, command, tmp_path):
    """One of two processes is killed, leaves or fails: the other ends in seconds, with a non-zero status."""
    rank = int(place != "train.save_checkpoint")              # rank 0 alone saves
    results = launch(tmp_path, command, partial(at_call, place, 2, action, rank=rank), 2, 30)
    assert results[1 - rank][0] not in (0, -signal.SIGKILL), results


@slow
@pytest.mark.parametrize("place, number", [("train.training_step", 4), ("train.evaluate", 2)])
def test_hanging_process_ends_the_job(place, number, command, tmp_path):
    """One of two processes hangs: the other gives up after the timeout, with a non-zero status."""
    (status, _, err), _ = launch(tmp_path, command, partial(at_call, place, number, "hang", rank=1, timeout=4), 2, 30)
    assert status not in (0, -signal.SIGKILL), (status, err)


@slow
def test_torchrun_brings_a_killed_run_back(command, straight, tmp_path):
    """torchrun --max-restarts: one process is killed; its first restart ends with the very weights, without help."""
    hook = "at_call('train.training_step', 4, 'be killed once', rank=1)"
    assert torchrun(tmp_path, command + " --workers 1", hook, "--max-restarts=1") == 0
    assert "the checkpoint of iteration 2" in (tmp_path / "stdout").read_text()
    check_same_end(tmp_path / "run", straight(2))


@pytest.mark.parametrize("place, call, action", [
    ("train.training_step", 4, "kill a worker"), ("train.save_checkpoint", 2, "kill a worker"),
    ("evaluate.predict", 3, "kill a worker"), pytest.param("data.read_image", 2, "hang", marks=slow)])
def test_lost_worker_ends_the_run(place, call, action, command, tmp_path):
    """A data-loader worker that is killed, or hangs, ends the run with a non-zero status, at once or by the timeout."""
    status, _, err = python(tmp_path, command + " --workers 1", partial(at_call, place, call, action, timeout=5))
    assert status == 1 and re.search("worker .* killed|worker.* exited|timed out", err), (status, err)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=slow)])
def test_loss_that_is_not_finite_stops_the_run(world, command, straight, folder, tmp_path):
    """A loss that is not finite stops all processes with a line that names iteration and images; nothing is lost."""
    pairs = build_dataset("folder", folder, "train")
    images = ", ".join(pairs.ids[i] for i in global_batch(pairs, 2, 0, 4))
    results = launch(tmp_path, command, partial(at_call, "train.normalise", 4, "give nan", rank=world - 1), world)
    for status, out, err in results:
        assert status == 1 and f"the loss of iteration 4 is not finite (images {images})" in err, err
        assert "iter      4" not in out
    assert read_checkpoint(tmp_path / "run/last.pth")["iteration"] == 2
    succeed(tmp_path, command, world)
    check_same_end(tmp_path / "run", straight(world))


def test_first_iteration_that_is_not_finite_is_named():
    """Of several losses that are not finite the first is named; so is an update that leaves no finite weights."""
    net, args, scenes = torch.nn.Linear(1, 1), SimpleNamespace(batch_size=2, seed=0), build_dataset("scenes")
    net.weight.data.fill_(np.inf)
    for losses, words in (([1.0], "update of iteration 5"), ([1.0, np.nan, np.nan], "loss of iteration 4")):
        with pytest.raises(UserError, match=f"{words} is not finite"):
            train.check_finite(torch.tensor(losses), net, args=args, data=scenes, iteration=5)


def test_matrix_is_the_same_for_any_number_of_processes(folder, tmp_path):
    """7, 5 and 1 images by one, two and three processes: the same confusion matrix, entry by entry."""
    for world in (1, 2, 3):
        start(tmp_path, save_confusions, (folder, tmp_path, world), world)
    alone = torch.load(tmp_path / "1-0.pt")
    assert [images for _, images in alone] == [7, 5, 1] and all(matrix.sum() > 100 for matrix, _ in alone)
    assert [same(torch.load(path), alone) for path in tmp_path.glob("*.pt")] == [True] * 6


# ---- Broken and hostile files: (data set, file, what it becomes, what the line must say)
IMAGE, LABEL, LIST = "JPEGImages/train3.jpg", "SegmentationClass/train3.png", "ImageSets/Segmentation/train.txt"
MAT, SIZE = "annotations/train3.mat", (40, 50)
TWO_BITS = ("89504e470d0a1a0a0000000d494844520000000400000001020000000096e748b0"      # a PNG whose gray has two bits
            "0000000a49444154789c63900600001d001c8ef4f5210000000049454e44ae426082")
BROKEN = {
    "truncated JPEG": ("folder", IMAGE, "cut", r"JPEGImages/train3.jpg: cannot be read"),
    "list that climbs": ("folder", LIST, b"../../secret", r"no ../../secret.jpg in"),
    "missing image": ("folder", IMAGE, "gone", r"no train3.jpg in .*1 of 7"),
    "missing val image": ("folder", "JPEGImages/val3.jpg", "gone", r"no val3.jpg in .*1 of 5"),
    "RGB label": ("folder", LABEL, np.zeros((*SIZE, 3)), r"train3.png: .*indices.*RGB"),
    "value too large": ("folder", LABEL, np.full(SIZE, 3), r"train3.png: label value 3 .*3 classes"),
    "another size": ("folder", LABEL, np.zeros((50, 40)), r"train3.png: label is 40x50, its image 50x40"),
    "missing list": ("folder", LIST, "gone", r"no list .*train.txt; lists there: one, val"),
    "empty list": ("folder", LIST, b"\n", r"train.txt: empty list"),
    "list not in UTF-8": ("folder", LIST, b"\xff\xfe\x00", r"train.txt: not a text file"),
    "gray of two bits": ("folder", LABEL, bytes.fromhex(TWO_BITS), r"train3.png: .*8-bit gray"),
    "missing classes": ("folder", "classes.txt", "gone", r"no classes.txt in"),
    "too many classes": ("folder", "classes.txt", b"x\n" * 255, r"classes.txt: 255 classes, at most 254"),
    "another data set's .mat": ("cocostuff", MAT, {"LabelMap": np.full(SIZE, 200)}, r"train3.mat: label value 200"),
    ".mat without a label": ("cocostuff", MAT, {"X": np.ones(SIZE)}, r"train3.mat: .*none of GTcls"),
    ".mat of 1.0": ("cocostuff", MAT, {"S": np.ones(SIZE), "names": np.ones((172, 1))}, "version 1.0"),
    ".mat with nan": ("cocostuff", MAT, {"S": np.where(np.eye(*SIZE) > 0, np.nan, 1)}, r"train3.mat: .*holds values"),
    ".mat with text": ("cocostuff", MAT, {"S": "text"}, r"train3.mat: cannot be read"),
    ".mat of three dimensions": ("cocostuff", MAT, {"S": np.ones((*SIZE, 3))}, r"train3.mat: label is")}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("what", BROKEN)
def test_broken_file_is_named(what, workers, tmp_path):
    """Every broken or hostile file gives one line that names it, through data-loader workers too."""
    name, words = write_broken(tmp_path, what)
    with pytest.raises(UserError, match=words) as caught:
        dataset = build_dataset(name, tmp_path, "val" if "val image" in what else "train")
        loader = iter(evaluate.make_loader(dataset, torch.device("cpu"), workers, batch_size=None, sampler=range(7)))
        try:
            list(loader)
        finally:
            if workers:
                loader._shutdown_workers()                    # left to the garbage collector it takes 10 s
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("script", ["train.py", pytest.param("evaluate.py", marks=slow)])
def test_broken_file_is_all_a_script_says(script, command, straight, tmp_path):
    """A real process that meets a broken image in a data-loader worker says one line, nothing after it, and exits 1."""
    write_folder(tmp_path)
    for path in (tmp_path / "JPEGImages").iterdir():
        path.write_bytes(path.read_bytes()[:-60])
    options = command.split()[1:] if script == "train.py" else ["--ckpt", straight(1) / "model.pth", "--device", "cpu"]
    done = subprocess.run([sys.executable, HERE / script, *options, "--data-root", tmp_path, "--workers", "2"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and re.fullmatch(r"error: .*/\w+.jpg: cannot be read .*\n", done.stderr), done.stderr


# ---- The drawer: pictures, copies, costs, bases, curves, benchmark, evidence
@pytest.mark.parametrize("name", data.DRAWN)
def test_pictures_are_functions_of_index_and_split(name):
    """A picture is the same bytes each time, another one for another index, and training never sees one of val."""
    draw, count, classes = drawn.PICTURES[name]
    image, label = draw(3, "train")
    shape = (97, 129) if name == "scenes" else (193, 193)
    assert image.shape == (*shape, 3) and label.shape == shape and image.dtype == label.dtype == np.uint8
    assert all((a == b).all() for a, b in zip((image, label), draw(3, "train"), strict=True))
    assert (image != draw(3, "val")[0]).any() and (image != draw(4, "train")[0]).any()
    found = np.unique(np.concatenate([draw(i, "train")[1].ravel() for i in range(20)]))
    assert set(found) - {255} == set(range(len(classes))) and (255 in found) == (name == "cells-key")
    assert classes == build_dataset(name).classes and len(build_dataset(name)) == count


def test_scenes_need_context():
    """Scenes: the most frequent class of each of 4096 colours is right for fewer than 70% of the pixels."""
    def pixels(split, count):
        pairs = [drawn.draw_scene(i, split) for i in range(count)]
        colours = np.concatenate([(image // 16).reshape(-1, 3) @ [256, 16, 1] for image, _ in pairs])      # (pixels,)
        return colours, np.concatenate([label.ravel() for _, label in pairs])                              # (pixels,)
    np.add.at(counts := np.zeros((4096, 9)), pixels("train", 60), 1)
    colours, label = pixels("val", 15)
    assert 0.4 < (counts.argmax(1)[colours] == label).mean() < 0.7


@pytest.mark.parametrize("name, shift", [("cells", 0.5), ("cells-key", 0.0), ("cells-local", 4.0)])
def test_cells_tell_their_class_by_brightness_alone(name, shift):
    """Cells: all stripes of a picture are of one class; the two differ by the shift in a cell's mean brightness."""
    draw, means = drawn.PICTURES[name][0], ([], [])
    for i in range(120):
        image, label = draw(i, "train")
        bright, = set(np.unique(label)) & {0, 1}
        assert bright == i % 2
        means[bright].append(image[..., 0][label == bright].mean() / drawn.CELL_UNIT)
        key = (label == 255)[:16, :16].all() and (image[:16, :16] == 255 * bright).all()
        assert key if name == "cells-key" else 255 not in label
    assert np.mean(means[1]) - np.mean(means[0]) == pytest.approx(shift, abs=0.15)


def test_official_numbers_of_images():
    """The numbers of images that the authors of the data sets give."""
    official = check_data.OFFICIAL
    assert {"train": 1464, "val": 1449, "trainaug": 10582}.items() <= official["voc"].items()
    assert {"train": 4998, "val": 5105}.items() <= official["context"].items()
    assert {"train": 9000, "test": 1000}.items() <= official["cocostuff"].items()
    assert official["cocostuff164k"] == official["coco2voc"] == {"train": 118287, "val": 5000}


def test_whole_copy_has_no_faults(folder, tmp_path, capsys):
    """A whole copy: the number of images, every pair read, the share of each class, a contact sheet, no fault."""
    check_data.main(["--dataset", "folder", "--data-root", str(folder), "--all", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "train     7 images" in out and "7 of 7 pairs read are whole" in out and "FAULT" not in out
    shares = [float(share) for share in re.findall(r"^    .*?([\d.]+) %$", out, re.MULTILINE)]
    assert len(shares) == 4 and sum(shares) == pytest.approx(100, abs=0.1)
    assert len(Image.open(tmp_path / "folder.png").getcolors(1 << 20)) > 100


@pytest.mark.parametrize("what", BROKEN)
def test_fault_of_a_copy_is_named(what, tmp_path, capsys):
    """Every kind of fault ends the check with an error, and is named."""
    name, words = write_broken(tmp_path, what)
    with pytest.raises(UserError) as caught:
        check_data.main(["--dataset", name, "--data-root", str(tmp_path), "--all", "--out", str(tmp_path / "out")])
    assert re.search(words, capsys.readouterr().out + str(caught.value))


def test_costs_of_table_1(capsys):
    """Table 1: 43.06 GMAC and 9.997 M parameters at 512 channels, 20.97 and 4.867 at 256; the paper's 43.1 and 21.1."""
    costs.main([])
    out = capsys.readouterr().out
    row = r"^\+ EMANet\({}\): 3x3 \+ EMAU +{} +{} +{} +{} "
    assert re.search(row.format(512, 43.06, 43.1, 9.997, "10.0"), out, re.MULTILINE), out
    assert re.search(row.format(256, 20.97, 21.1, 4.867, 4.87), out, re.MULTILINE), out


def test_growth_with_the_number_of_pixels():
    """Secs. 1, 5.1: multiply-adds and memory of EMAU grow with N, those of Non-local with N * N."""
    with FakeTensorMode():
        (emau, nonlocal_), (emau_4, nonlocal_4) = ([costs.cost(block(512), 512, side) for block in (EMAU, NonLocal)]
                                                   for side in (64, 128))
    assert [emau_4[i] / emau[i] for i in (0, 2)] == pytest.approx([4, 4], rel=0.01)
    # scores and sum take N * N * C/2 multiply-adds each; N x N float32 numbers are kept
    growth = [(nonlocal_4[i] - 4 * nonlocal_[i]) / 12 / 64 ** 4 for i in (0, 2)]
    assert growth == pytest.approx([512, 4], rel=0.01)


EYE, ROW = torch.eye(8)[None], torch.arange(1.0, 9)               # (1, C, K) with C = K = 8


@pytest.mark.parametrize("z, mu, expected", [
    (torch.full((1, 32, 8), 1 / 8), EYE, {"perplexity": 8, "used": 1, "cosine": 0, "rank": 1}),            # uniform
    (EYE.repeat(1, 4, 1), EYE, {"perplexity": 1, "used": 8, "cosine": 0, "rank": 7}),     # one base each, less the mean
    (EYE.repeat(1, 4, 1), torch.ones(1, 8, 1) * ROW, {"perplexity": 1, "used": 8, "cosine": 1, "rank": 1}),   # one line
    (EYE[:, [0, 1] * 8], EYE, {"perplexity": 1, "used": 2, "cosine": 0, "rank": 1})])                     # two bases
def test_statistics_of_constructed_bases(z, mu, expected):
    """Perplexity, use, cosine and effective rank where they are known; length is the mean norm of the pixels."""
    emau = SimpleNamespace(em=lambda pixels: iter([(z * 0 + 1 / 8, EYE), (z, mu)]))        # the last round counts
    found = bases.base_statistics(emau, torch.full((1, z.shape[1], 4), 1.5))
    assert found == pytest.approx(expected | {"length": 3}, abs=1e-3)


@pytest.mark.parametrize("perplexity, rank, dead", [(20, 6, False), (63, 6, True), (20, 1.2, True)])
def test_dead_attention_is_warned_of(perplexity, rank, dead):
    """A warning that names --gradient full where z is nearly uniform or X~ has no rank; none where attention works."""
    statistics = {"length": 10, "perplexity": perplexity, "used": 30, "cosine": 0.1, "rank": rank}
    line = bases.statistics_line(statistics, 64)
    assert line.startswith(f"bases | |x| 10.0 | perplexity of z {perplexity}.0 of 64 | 30 in use | cosine 0.10 | ")
    assert ("\nwarning: the attention is nearly dead" in line and "--gradient full" in line) == dead


def test_table_of_rounds(command, folder, straight, tmp_path, capsys):
    """Fig. 4: a row for each checkpoint, a column for each T; what evaluate.py gives with that T."""
    paths = [str(straight(1) / "model.pth"), str(straight(2) / "model.pth")]
    options = ["--data-root", str(folder), "--device", "cpu", "--workers", "0"]
    bases.main(["--ckpt", *paths, "--em-iterations", "1", "3", *options])
    out = capsys.readouterr().out
    assert out.count("bases | |x| ") == 2 and re.search(r"mIoU at T = +1 +3\n", out)
    rows = re.findall(r"  trained at T = 3 +([\d.]+) +([\d.]+)   (.*)", out)
    assert [row[2] for row in rows] == paths
    for T, found in zip(("1", "3"), rows[0], strict=False):
        evaluate.main(["--ckpt", paths[0], "--em-iterations", T, *options])
        assert f"mIoU {found} " in capsys.readouterr().out


def test_curves_take_the_last_record(tmp_path):
    """What a resumed run logged again replaces what it had logged; a torn last line is left out; the rest is drawn."""
    records = [{"args": {}}, {"iteration": 1, "loss": 3.0}, {"iteration": 2, "loss": 9.0}, {"args": {}},
               {"iteration": 2, "loss": 2.0}, {"iteration": 2, "val_miou": 0.5}]
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, records)) + '\n{"iteration": 3, "lo')
    headers, found = curves.read_log(log)
    assert len(headers) == 2 and found == {1: records[1], 2: {"iteration": 2, "loss": 2.0, "val_miou": 0.5}}
    curves.main([str(log), "--out", str(tmp_path / "curves")])
    assert len(Image.open(tmp_path / "curves.png").getcolors(1 << 20)) > 4


def test_benchmark_has_a_row_for_every_stage(command, folder, monkeypatch, capsys):
    """bench: images/s of loading, step, both, single scale and ms-flip, ours beside the released way; what limits."""
    monkeypatch.setattr(train, "RECIPES", SMALL)
    bench.bench(train.parse_args(command.split()[1:] + ["--workers", "1"]), seconds=0)
    out = capsys.readouterr().out
    for stage in ("loading, one core", "training step, data", "training with 1 workers", "single scale", "ms-flip"):
        row = re.search(rf"^.*{stage}.*? ([\d.]+) +([\d.]+) +([\d.]+)$", out, re.MULTILINE)
        ours, released, ratio = (float(value) for value in row.groups())
        assert ours / released == pytest.approx(ratio, rel=0.02, abs=0.01)
    assert "limit" in out.splitlines()[-1]


NOT_RUN = {"cells-sweep", "cells-key-sweep", "cells-sizes"}


@pytest.mark.parametrize("name", sorted({*look.JSONL, *experiments.EXPERIMENTS} - NOT_RUN))
def test_tables_of_the_evidence(name, capsys):
    """The tables in extras/evidence/README.md are those of the .jsonl beside it."""
    look.main([name, "--table"]) if name in look.JSONL else experiments.main([name, "--table"])
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    readme = [line.rstrip() for line in (HERE / "extras/evidence/README.md").read_text().splitlines()]
    assert len(printed) > 3 and readme[readme.index(printed[0]):][:len(printed)] == printed


# ---- Machinery: small data, and runs to break
HERE = Path(__file__).resolve().parent.parent


def write_folder(root):
    """Seven images to train on, five for validation, of 50 x 40 pixels, three classes; also as COCO-Stuff's files."""
    rng = np.random.default_rng(0)
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "images", "annotations", "imageLists"):
        (root / part).mkdir(parents=True)
    (root / "classes.txt").write_text("ground\nred\ngreen\n")
    for split, count in (("train", 7), ("val", 5), ("one", 1)):
        ids = [f"{split}{i}" for i in range(count)]
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(ids))
        for name in ids:
            label = np.kron(rng.integers(0, 3, (4, 5)), np.ones((10, 10))).astype(np.uint8)
            image = np.eye(3)[label] * 120 + rng.integers(0, 130, (40, 50, 3))
            Image.fromarray(image.astype(np.uint8)).save(root / f"JPEGImages/{name}.jpg", quality=90)
            data.save_index_png(label, root / f"SegmentationClass/{name}.png", data.palette_of(["background"]))
            Image.fromarray(image.astype(np.uint8)).save(root / f"images/{name}.jpg")
            savemat(root / f"annotations/{name}.mat", {"S": label + 1})
        (root / f"imageLists/{split}.txt").write_text("\n".join(ids))
    return root


def write_broken(root, what):
    """A small data set with one of the BROKEN files: its name, and what the line about it must say."""
    name, file, content, words = BROKEN[what]
    write_folder(root)
    if isinstance(content, bytes):
        (root / file).write_bytes(content)
    elif isinstance(content, np.ndarray):
        Image.fromarray(content.astype(np.uint8)).save(root / file)
    elif isinstance(content, dict):
        savemat(root / file, content)
    elif content == "cut":
        (root / file).write_bytes((root / file).read_bytes()[:-60])
    else:
        (root / file).unlink()
    return name, words


class Payload(str):
    """Unpickled, it creates a file."""

    def __reduce__(self):
        return open, (str(self), "w")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="session")
def command(folder):
    """A command whose runs get broken; it writes to run/."""
    return ("train.py --dataset folder --iters 8 --eval-every 2 --lr 0.05 --backbone resnet18 --weights none --crop 33 "
            "--channels 16 --num-bases 4 --decoder --batch-size 2 --workers 0 --amp off --device cpu --resume auto "
            f"--out run --data-root {folder}")


@pytest.fixture(scope="session")
def straight(command, tmp_path_factory):
    """straight(world): the output folder of a run by so many processes that nothing disturbs; not to be changed."""
    @cache
    def straight_run(world):
        cwd = tmp_path_factory.mktemp("straight")
        succeed(cwd, command, world)
        return cwd / "run"
    return straight_run


def check_same_end(run, expected):
    """Both runs have ended, with the same network, optimizer, losses and scores, bit by bit."""
    last, other = read_checkpoint(run / "last.pth"), read_checkpoint(expected / "last.pth")
    assert last["iteration"] == other["iteration"] == 8
    assert same(last["model"], other["model"]) and same(last["optimizer"], other["optimizer"])
    assert same(read_checkpoint(run / "model.pth")["model"], other["model"])
    logs = [curves.read_log(out / "log.jsonl")[1] for out in (run, expected)]
    for key in ("loss", "lr", "val_miou"):
        assert [r.get(key) for r in logs[0].values()] == [r.get(key) for r in logs[1].values()], key


def same(a, b):
    """Whether nested dicts and lists of tensors and numbers are equal bit by bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def save_confusions(root, folder, world):
    """Saves the confusion matrix of an untrained network on each split, by so many processes, and the counts."""
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    evaluate.scores = lambda confusion: {"matrix": confusion.clone()}
    torch.manual_seed(0)
    net = EMANet(3, "resnet18", channels=8, num_bases=4, layers=2)
    results = [evaluate.evaluate(net, build_dataset("folder", root, split), torch.device("cpu"), workers=0)
               for split in ("train", "val", "one")]
    torch.save([(result["matrix"], result["images"]) for result in results],
               folder / f"{world}-{evaluate.rank_and_world()[0]}.pt")


# ---- Machinery: processes. Importing torch takes seconds, so children are forked from a server that has imported it.
# What a test does to a child goes through a hook that is called there before the script: mostly at_call and an action.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["test_extras"])
os.environ["PYTHONPATH"] = f"{HERE}{os.pathsep}{HERE / 'extras'}"


def child(env, outputs, target, args):
    os.setsid()
    os.environ.update({key: str(value) for key, value in env.items()})
    multiprocessing.set_start_method(None, force=True)        # the loader's workers: not from this server, as usual
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    target(*args)


def script(cwd, command, hook):
    os.chdir(cwd)
    sys.argv = command.split()
    train.RECIPES |= SMALL
    (hook or bool)()
    evaluate.run({"train.py": train, "evaluate.py": evaluate}[sys.argv[0]].main)


SMALL = {"folder": train.RECIPES["folder"] | {"layers": 2, "output_stride": 8}}


def start(cwd, target, args, world=1, seconds=60):
    """Runs target(*args) in `world` processes, as torchrun would: their (status, stdout, stderr). Whoever is not done
    in time is killed."""
    processes, deadline = [], time.monotonic() + seconds
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]                         # a free one
    for rank in range(world):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        outputs = cwd / f"stdout{rank}", cwd / f"stderr{rank}"
        processes.append(SERVER.Process(target=child, args=(env if world > 1 else {}, outputs, target, args)))
        processes[-1].start()
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        process.kill()
        process.join()
    return [(process.exitcode, *((cwd / f"{name}{rank}").read_text() for name in ("stdout", "stderr")))
            for rank, process in enumerate(processes)]


def launch(cwd, command, hook=None, world=1, seconds=60):
    """What torchrun does with the command in folder `cwd`: (exit status, stdout, stderr) of each process."""
    return start(cwd, script, (cwd, command, hook), world, seconds)


def python(cwd, command, hook=None):
    return launch(cwd, command, hook)[0]


def succeed(cwd, command, world=1):
    results = launch(cwd, command, None, world)
    assert [status for status, _, _ in results] == [0] * world, results
    return results[0][1]


def fail(cwd, command, *words, before=None):
    """The command must end with one line on stderr that holds all the words, and exit status 1."""
    status, _, err = python(cwd, command, before)
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1, (status, err)
    assert all(word in err for word in words), (words, err)


def torchrun(cwd, command, hook, *flags):
    """Runs the command under a real torchrun of two processes, the hook (an expression) called in each: its status."""
    (cwd / "job.py").write_text("from test_extras import *\nif __name__ == '__main__':\n"
                                f"    script({str(cwd)!r}, {command!r}, lambda: {hook})\n")
    with open(cwd / "stdout", "w") as output:
        return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                               *flags, "job.py"], cwd=cwd, stdout=output, stderr=subprocess.STDOUT,
                              start_new_session=True, timeout=90, check=False).returncode


def at_call(place, number, action, rank=0, timeout=600):
    """The n-th call of a function, on one rank or all (None), is this action's, which may call the original."""
    owner, name = place.split(".")
    owner = torch.distributed if owner == "dist" else sys.modules[owner]
    original, count, evaluate.TIMEOUT = getattr(owner, name), itertools.count(1), timeout

    def changed(*args, **options):
        if next(count) == number and rank in (None, int(os.environ.get("RANK", "0"))):
            return ACTIONS[action](partial(original, *args, **options))
        return original(*args, **options)
    setattr(owner, name, changed)


def first(act):
    """The action that does this, then what was called."""
    return lambda call: (act(), call())[1]


def write_half(then):
    def write(save):
        checkpoint, file = save.args
        buffer = io.BytesIO()
        save.func(checkpoint, buffer)
        file.write(buffer.getvalue()[:buffer.tell() // 2])
        file.flush()
        then(save)
    return write


def hang(call):
    """Until the first process has said why it ends, which this one cannot know of."""
    while "Traceback" not in Path("stderr0").read_text():
        time.sleep(0.1)
    be_killed()


def be_killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


ACTIONS = {
    "be killed": be_killed, "do it, be killed": lambda call: (call(), be_killed()), "leave": lambda call: os._exit(0),
    "be killed once": first(lambda: os.environ["TORCHELASTIC_RESTART_COUNT"] != "0" or be_killed()),
    "fail": lambda call: 1 / 0, "hang": hang, "write half, be killed": write_half(be_killed),
    "write half, find no space": write_half(lambda call: Path("/dev/full").write_bytes(b" ")),
    "find no space": lambda call: Path("/dev/full").write_bytes(b" "),
    "allow no large files": first(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))),
    "kill a worker": first(lambda: (multiprocessing.active_children()[-1].kill(), time.sleep(0.3))),
    "find none": lambda call: None, "give nan": lambda call: call() * float("nan"),
    "interrupt twice": first(lambda: [(os.killpg(0, signal.SIGINT), time.sleep(t)) for t in (0.1, 100)]),
    **{f"signal {n} to the group": first(partial(os.killpg, 0, n)) for n in (signal.SIGINT, signal.SIGTERM)},
    "do it, signal 15 to the group": lambda call: (call(), os.killpg(0, signal.SIGTERM)),
    **{f"signal {n} to torchrun": first(lambda n=n: os.kill(os.getppid(), n)) for n in (signal.SIGINT, signal.SIGTERM)}}
