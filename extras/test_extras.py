"""What a run promises when something goes wrong, then the drawer. SLOW=1: all of it."""
import io
import json
import math
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
from functools import partial
from itertools import count
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import savemat
from torch import nn
from torchvision.models.resnet import BasicBlock

import data
import evaluate
import train
from backbone import read_checkpoint
from ema import EMANet
from extras import bases, bench, check_data, costs, curves, drawn
from extras.evidence import frozen, photographs
from extras.relatives import A2Block, NonLocal

HERE = Path(__file__).resolve().parent.parent
slow = pytest.mark.skipif(os.environ.get("SLOW") != "1", reason="takes long: set SLOW=1")
FORK = multiprocessing.get_context("fork")                  # importing torch takes seconds
TOGETHER = FORK.Barrier(2)
check_equal = partial(torch.testing.assert_close, rtol=0, atol=0)
# ---- A run of 8 iterations writes a model.pth and then a last.pth after each second one.
STEP, SAVE, VALIDATION = "train.training_step", "torch.save", "train.evaluate"
MOMENTS = [(STEP, 4, "", 2), (SAVE, 8, "half, ", 6), (VALIDATION, 2, "", 2)]
TROUBLES = [  # processes, which one (None: all), function, which call, what happens, last.pth then
    (1, 0, STEP, 1, "SIGKILL", 0), (1, 0, SAVE, 1, "half, SIGKILL", 0),
    (1, 0, SAVE, 2, "half, SIGKILL", 0), (1, 0, SAVE, 3, "half, SIGKILL", 2),
    (1, 0, "os.replace", 4, "SIGKILL", 2), (1, 0, "os.replace", 4, "do it, SIGKILL", 4),
    (1, 0, STEP, 4, "SIGTERM", 2), (1, 0, SAVE, 8, "half, SIGINT", 6),
    (1, 0, VALIDATION, 2, "SIGHUP", 2), (2, 1, STEP, 4, "SIGKILL", 2),
    (2, 0, SAVE, 8, "half, SIGKILL", 6), (2, None, VALIDATION, 2, "SIGINT", 2),
    (1, 0, "os.fsync", 3, "no space", 2), (1, 0, SAVE, 3, "half, no space", 2),
    (1, 0, STEP, 3, "no large files", 2), (2, 1, STEP, 3, "leave", 2), (2, 1, STEP, 4, "fail", 2),
    (2, 1, VALIDATION, 2, "leave", 2), (1, 0, STEP, 4, "kill a worker", 2),
    (1, 0, "evaluate.predict", 8, "kill a worker", 2),
    *(pytest.param(*case, marks=slow) for case in (
        (1, 0, "data.read_image", 9, "hang", 4), (2, 1, STEP, 4, "hang", 2),
        (2, 1, VALIDATION, 2, "hang", 2), *((world, 0, place, call, half + name, saved)
            for world in (1, 2) for place, call, half, saved in MOMENTS
            for name in ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT"))))]
@pytest.mark.parametrize("world, rank, place, call, action, saved", TROUBLES)
def test_trouble_costs_what_follows_the_last_checkpoint(
        world, rank, place, call, action, saved, here, monkeypatch):
    """Whatever happens: all processes end, and with --resume the run ends as if undisturbed."""
    monkeypatch.setattr(evaluate, "TIMEOUT", 3 if action == "hang" else 600)
    flags = "--workers 1" if "worker" in action or place == "data.read_image" else ""
    results = launch(flags, world, place, call, action, rank)
    own = {"SIGKILL": -9, "SIGTERM": -15, "SIGHUP": -1, "leave": 0}.get(action.split()[-1], 1)
    for i, (status, _, _) in enumerate(results):            # -9: it had to be killed
        assert status == own if rank in (None, i) else status not in (0, -9), results
    if "no" in action.split():
        check_line(results[0], "cannot write run/model.pth: is the disk full?")
        assert sorted(os.listdir("run")) == ["last.pth", "log.jsonl", "model.pth"]
    files = {path.name: read_checkpoint(path) for path in here.glob("run/*.pth")}
    assert files.get("last.pth", {"iteration": 0})["iteration"] == saved
    check_end(launch("", world), saved + 1)

def test_one_of_two_simultaneous_runs_gets_through(here, monkeypatch):
    """Two runs begin in one new folder: one ends with one line, the other is not disturbed."""
    monkeypatch.setattr(sys.modules[__name__], "COMMAND", COMMAND.replace("--resume", ""))
    *winner, loser = sorted(launch("", 2, "train.init_process", 1, "begin together, alone", None))
    check_line(loser, "run/log.jsonl")
    check_end(winner, 1)
    assert len(Path("run/log.jsonl").read_text().splitlines()) == 1 + 8 + 4

def test_variables_of_a_cluster_start_no_group(here, monkeypatch):
    """WORLD_SIZE, which clusters set, without torchrun's LOCAL_RANK: the process runs alone."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_end(launch(), 1)

def test_matrix_is_the_same_for_any_number_of_processes(here, monkeypatch):
    """7, 5 and 1 images by one, two and three processes: each pixel counts once (Sec. 6.1)."""
    def save_confusions(argv):
        device = evaluate.init_process("cpu")
        torch.manual_seed(0)
        net, (rank, world) = EMANet(3, backbone="resnet18", channels=8), evaluate.rank_and_world()
        sets = [data.build_dataset("folder", "../folder", n) for n in ("train", "val", "test")]
        torch.save([evaluate.evaluate(net, images, device, workers=0)["confusion"]
                    for images in sets], f"{world}-{rank}.pt")
    monkeypatch.setattr(evaluate, "scores", lambda confusion: {"confusion": confusion})
    for world in (1, 2, 3):
        launch("", world, main=save_confusions)
    found = [torch.load(path) for path in sorted(here.glob("*.pt"))]
    assert [confusion.sum() for confusion in found[0]] == [14000, 10000, 2000]
    check_equal(found, 6 * found[:1])

def test_damage_is_found(here):
    """A byte changed at any of 100 places, a cut at any of 50: refused, or the same tensors."""
    rng, path, lines = np.random.default_rng(0), here / "last.pth", []
    good = {f"{i}.weight": torch.randn(8, 3 + i) for i in range(10)}
    train.save_checkpoint(good, path)
    whole = path.read_bytes()
    for trial in range(150):
        content, place = bytearray(whole), rng.integers(len(whole))
        content[place] ^= rng.integers(1, 256)
        path.write_bytes(content if trial < 100 else whole[:place])
        try:
            check_equal(read_checkpoint(path), good)
        except OSError as error:
            lines.append(str(error))
    assert len(lines) > 130 and all(str(path) in line and "\n" not in line for line in lines)

class Payload:
    """Unpickled, it creates a file."""
    def __reduce__(self):
        return open, ("created", "w")

@pytest.mark.parametrize("kind", ["wrong bit", "code in a zip", "code in a pickle"])
@pytest.mark.parametrize("script, flags", [
    (train, ""), (train, "--out new --init run/last.pth"), (evaluate, "--ckpt run/last.pth"),
    (train, "--out new --weights run/last.pth")])
def test_bad_checkpoint_is_refused(script, flags, kind, here):
    """A bit of a tensor is wrong, or there is code: one line, whatever it is for; no code runs."""
    code, content = Payload() if "code" in kind else {}, io.BytesIO()
    torch.save({"net": {}, "model": torch.zeros(9999), "args": code}, content,
               _use_new_zipfile_serialization="pickle" not in kind)
    content.getbuffer()[20000] ^= kind == "wrong bit"
    os.mkdir("run")
    Path("run/last.pth").write_bytes(content.getvalue())
    with pytest.raises(SystemExit) as caught:
        evaluate.run(lambda: script.main(((COMMAND if script == train else "") + flags).split()))
    check_line((1, "", f"{caught.value}\n"), "run/last.pth: damaged")
    assert not Path("created").exists()

IMAGE, LABEL = "JPEGImages/train3.jpg", "SegmentationClass/train3.png"
LIST, MAT, SIZE = "ImageSets/Segmentation/train.txt", "annotations/train3.mat", (50, 40)
BROKEN = {  # file, what is done to it, what the line must say
    "truncated JPEG": (IMAGE, lambda file: os.truncate(file, 900), "train3.jpg: not an image, or"),
    "missing image": (IMAGE, os.remove, "JPEGImages: 1 of 7 files are missing, such as ['train3']"),
    "missing list": (LIST, os.remove, f"there is no root/{LIST}"),
    "missing classes": ("classes.txt", os.remove, "there is no root/classes.txt"),
    "16-bit image": (IMAGE, partial(Image.new("I;16", SIZE).save, format="PNG"), "than 8 bits"),
    "RGB label": (LABEL, Image.new("RGB", SIZE).save, "train3.png: PNG RGB: a label"),
    "JPEG as label": (LABEL, partial(shutil.copy, f"root/{IMAGE}"), "png: JPEG RGB: a label"),
    "value too large": (LABEL, Image.new("L", SIZE, 3).save, "train3.png: label value 3 "),
    "another size": (LABEL, Image.new("L", (40, 50)).save, "png: the label and its image"),
    "another data set's .mat": (MAT, lambda file: savemat(file, {"S": np.full((40, 50), 200)}),
                                "train3.mat: label value 200 "),
    ".mat without a label": (MAT, lambda file: savemat(file, {"X": 1}), "mat: not a label file")}
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("what", BROKEN)
def test_broken_file_is_named(what, workers, here):
    """Every broken file gives one line that names it, from data-loader workers too."""
    file, change, words = BROKEN[what]
    shutil.copytree("../folder", "root")
    change(f"root/{file}")
    dataset = "cocostuff" if file == MAT else "folder"
    result, = launch(f"--dataset {dataset} --data-root root --workers {workers}")
    check_line(result, "root", words)

# ---- Scripts as a user starts them, with data-loader workers
LOOP = ("(trap exit INT; for i in 1 2 3 4 5; do " + sys.executable + " -m torch.distributed.run "
        "--standalone --nproc_per_node=2 {} && break; sleep 0.2; done)")
LONG = "--iters 9999 --eval-every 9999 --workers 2"
@pytest.mark.parametrize("trouble, words", [
    ("Ctrl-C", "stopped.*"), ("damage", "error: .*.jpg: not an image, or damaged .*")])
@pytest.mark.parametrize("script, flags", [
    (train, LONG), (evaluate, "--ckpt ../undisturbed1/model.pth --split many")])
def test_script_says_one_line(script, flags, trouble, words, here):
    """Ctrl-C, or a damaged image that a worker meets: one line on stderr, and exit status 1."""
    shutil.copytree("../folder", "root")
    for path in here.glob("root/JPEGImages/*") if trouble == "damage" else ():
        path.write_bytes(path.read_bytes()[:-60])
    process = user(script, f"{flags} --data-root root")
    if trouble == "Ctrl-C":
        interrupt(process)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and re.fullmatch(f"{words}\n", err), err

@slow
def test_shell_loop_brings_a_run_back(here):
    """README's loop around torchrun: a process is killed once; the run ends as if undisturbed."""
    loop = user(train, "", LOOP, "'torch.manual_seed', 5, 'die once', 1")
    output, err = loop.communicate(timeout=90)
    assert re.findall(r"iter +(\d)/8", output) == [*"123345678"], err
    check_end([(loop.returncode, output[output.rindex("settings"):], err)] * 2, 3)

@slow
def test_interrupt_ends_the_shell_loop(here):
    """Ctrl-C ends the loop, torchrun, its processes and their workers, and nothing begins again."""
    loop = user(train, LONG, LOOP)
    interrupt(loop)
    assert "settings" not in loop.communicate(timeout=60)[0]
    assert subprocess.run(["pgrep", "-f", f"{here}/job.py"], check=False).returncode == 1

# ---- The drawer
def test_non_local_is_the_re_estimation_from_all_pixels():
    """Eq. 9: a pixel becomes a mean of all g(x), by exp(theta . phi / sqrt(C / 2)); at first, x."""
    block, x = NonLocal(6).double().eval(), torch.randn(2, 6, 4, 5).double()
    assert torch.equal(block(x), x)
    block.out[1].weight.data += torch.rand(6)
    theta, phi, g = (conv(x).flatten(2) for conv in (block.theta, block.phi, block.g))  # (B, 3, N)
    weights = torch.einsum("bcn,bcm->bnm", theta, phi).div(math.sqrt(3)).exp()
    y = torch.einsum("bnm,bcm->bcn", weights / weights.sum(2, keepdim=True), g).view(2, 3, 4, 5)
    assert torch.allclose(block(x), x + block.out(y), rtol=0, atol=1e-12)

def test_a2_block_gathers_and_distributes():
    """Eq. 16: K means of phi(x) by a softmax over the pixels; a pixel's own softmax over them."""
    block, x = A2Block(6, num_bases=3).double().eval(), torch.randn(2, 6, 4, 5).double()
    phi, theta, rho = (conv(x).flatten(2) for conv in (block.phi, block.theta, block.rho))
    gather, distribute = theta.softmax(2), rho.softmax(1)                             # (B, K, N)
    y = torch.einsum("bkn,bkm,bcm->bcn", distribute, gather, phi).view_as(x)
    assert torch.allclose(block(x), x + block.out(y), rtol=0, atol=1e-12)

@pytest.mark.parametrize("change, words", [
    (lambda: None, ""), (lambda: os.truncate(f"root/{IMAGE}", 900), "train3.jpg: not an image"),
    (lambda: os.remove("root/JPEGImages/val3.jpg"), "1 of 5 files are missing"),
    (lambda: os.remove("root/ImageSets/Segmentation/val.txt"), "there is no .*val.txt"),
    (lambda: [Image.new("L", SIZE, 255 * (i % 2)).save(path) for i, path in enumerate(
        Path("root/SegmentationClass").iterdir())], "1 of 3 classes occur")])
def test_faults_of_a_copy_are_named(change, words, here, capsys):
    """check_data reads every pair: what is broken, missing or the only class is a fault."""
    shutil.copytree("../folder", "root")
    change()
    line = ["--dataset", "folder", "--data-root", "root", "--all", "--out", "sheet"]
    if words:
        with pytest.raises(SystemExit, match="^error: 1 fault in root$"):
            check_data.main(line)
        assert re.search(f"FAULT: .*{words}", capsys.readouterr().out)
        return
    check_data.main(line)
    out = capsys.readouterr().out
    shares = [float(share) for share in re.findall(r"([\d.]+) %\n", out)]
    assert "7 of 7 pairs" in out and "5 of 5 pairs" in out and "FAULT" not in out
    assert len(shares) == 4 and abs(sum(shares) - 100) < 0.1 and Path("sheet/folder.png").exists()

def test_costs_of_table_1(capsys):
    """Table 1: EMANet(256) adds 21.1 GMAC and 4.87 M parameters, EMANet(512) 43.1 and 10.0."""
    costs.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "3x3 + EMAU" in line]
    assert [" ".join(row[5:9]) for row in rows] == [
        "20.97 21.1 4.867 4.87", "43.06 43.1 9.997 10.0"]

def test_table_of_rounds(tmp_path, capsys, monkeypatch):
    """Fig. 4: a row for each checkpoint, a column for each T, and in it what evaluate.py says."""
    monkeypatch.setattr(drawn.Scenes, "__len__", lambda self: 4)
    torch.manual_seed(2)
    network = {"num_classes": 9, "backbone": "resnet18", "channels": 8}
    facts = {"model": EMANet(**network).state_dict(), "dataset": "scenes",
             "classes": drawn.Scenes("val").classes}
    paths = [str(tmp_path / f"{T}.pth") for T in (1, 8)]
    for T, path in zip((1, 8), paths):
        torch.save(facts | {"network": network | {"iterations": T}}, path)
        evaluate.main(["--ckpt", path, "--workers", "0"])
    said = re.findall(r"mIoU ([\d.]+)", capsys.readouterr().out)
    bases.main(["--ckpt", *paths, "--em-iterations", "1", "8", "--workers", "0"])
    rows = re.findall(r"trained at T = (\d) +([\d.]+) +([\d.]+)\n", capsys.readouterr().out)
    assert rows == [("1", *said), ("8", *said)] and said[0] != said[1]

def test_curves_take_the_last_record(tmp_path):
    """What a resumed run logs again counts, a torn line is left out, and the rest is drawn."""
    first, lost, again = ({"iteration": i, "loss": x} for i, x in ((1, 3.0), (2, 9.0), (2, 2.0)))
    records = {"settings": {}}, first, lost, again, {"iteration": 2, "val_miou": 0.5}
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, records)) + '\n{"iteration": 3, "lo')
    assert curves.read_log(log) == {1: first, 2: again | {"val_miou": 0.5}}
    curves.main([str(log)])
    colours = dict(map(reversed, Image.open(tmp_path / "curves.png").getcolors(1 << 20)))
    assert colours[178, 34, 34] > 500                       # the line of the first run

def test_benchmark_has_a_row_for_every_stage(capsys):
    """Images/s of each stage, and how many times the released way's; then the wait for data."""
    bench.bench(train.parse_args(["--crop=33", "--batch-size=2", "--workers=1"]), seconds=0)
    rows = re.findall(r"(.+?)  +([\d.]+) +([\d.]+) +([\d.]+)\n", out := capsys.readouterr().out)
    assert [row[0] for row in rows] == [
        "loading, one core", "training step, data at hand", "training with 1 workers",
        "evaluation, single scale", "evaluation, ms-flip"]
    ours, released, ratio = np.array([row[1:] for row in rows], float).T
    assert ours / released == pytest.approx(ratio, rel=0.02, abs=0.01)
    assert re.search(r"loads [\d.]+ times .* waits for data \d+% of", out)

@pytest.mark.parametrize("module, flags", [(photographs, None), (frozen, ["--table"])])
def test_tables_of_the_evidence(module, flags, capsys):
    """The tables on the page of the evidence are those of the runs beside it."""
    frozen.main(flags) if flags else print(photographs.table())
    page, out = Path(module.__file__).with_name("README.md").read_text(), capsys.readouterr().out
    assert out.count("\n") > 3 and all(table in page for table in out.strip().split("\n\n"))

# ---- Machinery: small data, and runs to break
COMMAND = ("--dataset folder --data-root ../folder --iters 8 --eval-every 2 --lr 0.5 --crop 33 "
           "--backbone resnet18 --weights none --channels 16 --num-bases 4 --decoder --amp off "
           "--batch-size 2 --workers 0 --device cpu --out run --resume ")
@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to be in, beside folder/, and a tiny network, for forked processes too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.models, "get_model", tiny_resnet)
    if not Path("../folder").exists():
        write_folder(Path("../folder"))
        launch("--out ../undisturbed1")
        launch("--out ../undisturbed2", 2)
    return tmp_path

def tiny_resnet(name):
    """In the place of torchvision's, so that a run takes less than a second."""
    def layer(c_in):
        down = nn.Sequential(nn.Conv2d(c_in, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        return nn.Sequential(BasicBlock(c_in, 16, 2, down))
    net = nn.Module()
    net.conv1, net.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
    net.relu, net.maxpool, net.fc = nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Linear(16, 1)
    net.layer1, net.layer2, net.layer3, net.layer4 = nn.Sequential(), layer(8), layer(16), layer(16)
    return net

def write_folder(root):
    """Images of 50 x 40 pixels and three classes, for folder and cocostuff."""
    rng = np.random.default_rng(0)
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "images",
                 "annotations", "imageLists"):
        (root / part).mkdir(parents=True)
    (root / "classes.txt").write_text("ground\nred\ngreen\n")
    for split, number in {"train": 7, "val": 5, "test": 1}.items():
        names = [f"{split}{i}" for i in range(number)]
        for name in names:
            label = np.kron(rng.integers(0, 3, (4, 5)), np.ones((10, 10))).astype(np.uint8)
            image = (np.eye(3)[label] * 120 + rng.integers(0, 130, (40, 50, 3))).astype(np.uint8)
            for images in ("JPEGImages", "images"):
                Image.fromarray(image).save(root / f"{images}/{name}.jpg")
            Image.fromarray(label).save(root / f"SegmentationClass/{name}.png")
            savemat(root / f"annotations/{name}.mat", {"S": label + 1})
        for lists in ("ImageSets/Segmentation", "imageLists"):
            (root / f"{lists}/{split}.txt").write_text("\n".join(names))
    (root / "ImageSets/Segmentation/many.txt").write_text("val0\nval1\n" * 1000)

def check_line(result, *words):
    """A process ended with one line on stderr that has all the words, and exit status 1."""
    status, _, err = result
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1, result
    assert all(word in err for word in words), err

def check_end(results, first):
    """A run went on from iteration `first` and ended as one that nothing disturbed, bit by bit."""
    assert not any(status for status, _, _ in results), results
    assert re.findall(r"iter +(\d)/8", results[0][1]) == [str(i) for i in range(first, 9)]
    weights, others = [], []
    for out in ("run", f"../undisturbed{len(results)}"):
        last, model = (read_checkpoint(f"{out}/{name}.pth") for name in ("last", "model"))
        log = {}                                            # the last record of an iteration counts
        for record in map(json.loads, Path(f"{out}/log.jsonl").read_text().splitlines()):
            log.setdefault(record.get("iteration"), {}).update(record)
        others.append([last["iteration"], last["optimizer"].pop("param_groups"), *(
            (log[i]["loss"], log[i]["lr"], log[i].get("val_iou")) for i in range(1, 9))])
        weights.append([last["model"], last["optimizer"], model["model"]])
    check_equal(*weights)
    assert others[0] == others[1] and others[0][0] == 8

# ---- Machinery: processes
def launch(flags="", world=1, *changed_call, main=train.main):
    """What torchrun does with COMMAND and flags, after at_call(*changed_call) in each process:
    their (exit status, stdout, stderr). Whoever is not done in 30 s is killed."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]                       # a free one

    def begin(rank):
        if world > 1:
            os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{world}",
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        for stream, name in (("stdout", "out"), ("stderr", "err")):
            file = io.FileIO(f"{name}{rank}", "w")
            setattr(sys, stream, io.TextIOWrapper(file, write_through=True))
        at_call(*changed_call) if changed_call else None
        evaluate.run(lambda: main((COMMAND + flags).split()))

    processes = [FORK.Process(target=begin, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        process.kill()
        process.join()
    return [(process.exitcode, Path(f"out{rank}").read_text(), Path(f"err{rank}").read_text())
            for rank, process in enumerate(processes)]

def user(script, flags, line="exec " + sys.executable + " {}", changed_call="'torch.save', 0, ''"):
    """A shell's line with a script in it, as a process, after at_call(changed_call) in each."""
    Path("job.py").write_text(
        f"import runpy, torchvision, {__name__} as tests\nif __name__ == '__main__':\n"
        f"    torchvision.models.get_model = tests.tiny_resnet\n    tests.at_call({changed_call})\n"
        f"    runpy.run_path({script.__file__!r}, run_name='__main__')\n")
    line = line.format(f"{os.getcwd()}/job.py {COMMAND if script == train else ''}{flags}")
    return subprocess.Popen(["bash", "-c", line], text=True, start_new_session=True, stdout=-1,
                            stderr=-1, env=os.environ | {"PYTHONPATH": str(HERE)})

def interrupt(process):
    """Ctrl-C when it has trained or evaluated for a while."""
    while not re.search("iter |00/2000", line := process.stdout.readline()):
        assert line, process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)

def at_call(place, number, actions, rank=0):
    """Actions, comma between, precede the n-th call of a function on one rank, or all (None)."""
    owner, name = place.rsplit(".", 1)
    owner, calls = sys.modules[owner], count(1)
    original = getattr(owner, name)

    def changed(*args, **options):
        if next(calls) == number and rank in (None, int(os.environ.get("RANK", "0"))):
            for action in actions.split(", "):
                ACTIONS[action](partial(original, *args, **options))
        return original(*args, **options)
    setattr(owner, name, changed)

def write_half(save):
    checkpoint, file = save.args
    save.func(checkpoint, buffer := io.BytesIO())
    file.write(buffer.getvalue()[:buffer.tell() // 2])
    file.flush()

def hang(call):
    """Until the first process says why it ends, or for 40 s."""
    for _ in range(400):
        if "Traceback" not in Path("err0").read_text():
            time.sleep(0.1)
    os._exit(1)

ACTIONS = {
    "half": write_half, "do it": lambda call: call(),
    "begin together": lambda call: TOGETHER.wait(20),
    "alone": lambda call: os.environ.pop("LOCAL_RANK"),
    "lose np": lambda call: delattr(data, "np"),
    "lose ILLEGAL": lambda call: delattr(data, "ILLEGAL"),
    "no space": lambda call: Path("/dev/full").write_bytes(b" "),
    "no large files": lambda call: resource.setrlimit(resource.RLIMIT_FSIZE, (99999, 99999)),
    "leave": lambda call: os._exit(0), "fail": lambda call: 1 / 0, "hang": hang,
    "kill a worker": lambda call: (multiprocessing.active_children()[-1].kill(), time.sleep(0.3)),
    "die once": lambda call: Path("died").exists() or (
        Path("died").touch(), os.kill(os.getpid(), signal.SIGKILL)),
    **{name: lambda call, number=number: os.kill(os.getpid(), number)
       for name, number in signal.Signals.__members__.items()}}
