"""Damages files and kills runs at random: what is left of them is a result or one sentence.

    python benchmarks/robustness.py fuzz             # 2,000 damaged files, read
    python benchmarks/robustness.py fuzz --only 17   # one case again, by its number
    python benchmarks/robustness.py kill             # 20 trainings and 20 folder runs, killed

MATLAB's files are left out: a damaged one can crash scipy's reader. Exit code 1 if anything fails.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the modules are no package

import infer
from convert import load_any_model
from data import CONSEP_CLASSES, nucleus_classes, open_source, synthetic_tissue
from dualunet import DualUNet, read_checkpoint, save_checkpoint
from images import image_size, read_image
from labels import read_predictions
from outputs import FORMATS

SECONDS, MEGABYTES, PIXELS = 60, 1024, 2**25  # what reading a small file may cost, size let in
H, W = 48, 67  # of the images
PNG = b"\x89PNG\r\n\x1a\n"


# ---------------------------------------------------------------- damage

ODD = (None, True, -1, 0, 0.5, 2**31, 1e300, math.nan, "odd\nline", "", [], {}, [None] * 5,
       ["a", 1], [-1] * 5, [10**6] * 5)
CHANGES = (  # of an array or a tensor; not every change exists for both
    lambda a: a + 0.5, lambda a: a * math.nan, lambda a: a + 1e300, lambda a: -1 * a,
    lambda a: a[None], lambda a: a[:-1], lambda a: a > 0, lambda a: a + 250, lambda a: a + 2**31,
    lambda a: a * 0, lambda a: a.astype(str), lambda a: a.astype(object), lambda a: a.to_sparse(),
    lambda a: a.flatten()[:1].expand(2**40))


def altered(rng, value):
    """The value with one thing changed, replaced or missing, however deep in dicts and lists."""
    if isinstance(value, np.ndarray | torch.Tensor):
        with contextlib.suppress(Exception):
            return rng.choice(CHANGES)(value)
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice(ODD)
    value = copy.copy(value)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    if rng.random() < 0.1:
        del value[key]
    else:
        value[key] = altered(rng, value[key])
    return value


def flipped(rng, data):
    """Some bytes changed, of the header or anywhere."""
    data, span = bytearray(data), min(rng.choice([len(data), 64, 512]), len(data))
    for _ in range(rng.choice([1, 2, 10, 100])):
        data[rng.randrange(span)] ^= rng.randrange(1, 256)
    return bytes(data)


def spliced(rng, data):
    """A part lost, doubled or zero, or all of the rest lost."""
    start, stop = sorted(rng.randrange(len(data)) for _ in range(2))
    part = rng.choice([b"", 2 * data[start:stop], bytes(stop - start)])
    return rng.choice([data[:start] + part + data[stop:], data[:start], b""])


def resized(rng, data):
    """Another width: none, or far more than the file holds."""
    width = rng.choice((0, 1, 5_000, 65_535, 2**31 - 1))
    for code in (">I", "<I", ">H", "<H"):
        limit = 256 ** struct.calcsize(code) - 1
        data = data.replace(struct.pack(code, W), struct.pack(code, min(width, limit)))
    if data.startswith(PNG):  # or its checksum would tell
        data = data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:]
    return data.replace(f", {W})".encode(), f", {width})".encode())  # .npy


# ---------------------------------------------------------------- files to damage


def encoded(image, kind, **options):
    """The bytes of an image in a format, b"" if Pillow cannot write it."""
    file = io.BytesIO()
    with contextlib.suppress(OSError, KeyError, ValueError):
        image.save(file, kind, **options)
    return file.getvalue()


def image_files():
    """[bytes, ...] of one picture in all formats, kinds of pixels and dialects."""
    # Kinds of pixels.
    pixels, _, _ = synthetic_tissue(3, (H, W))
    picture, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 1])
    modes = [picture.convert(mode) for mode in "RGB 1 L LA P CMYK RGBA YCbCr I F".split()]
    modes.append(Image.fromarray(np.array(grey, np.uint16) * 257))
    files = [encoded(mode, kind) for mode in modes for kind in ("PNG", "TIFF", "JPEG", "BMP")]

    # Formats, pages, compressions.
    pages = {"save_all": True, "append_images": [picture.rotate(180)]}
    for kind in ("GIF", "WEBP", "JPEG2000", "TIFF", "PNG"):
        files += [encoded(picture, kind), encoded(picture, kind, **pages)]
    for name in ("tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate"):
        files.append(encoded(picture, "TIFF", compression=name, big_tiff=True))

    # What they say of themselves.
    pages["append_images"] = [grey, grey]
    for text in ("ImageJ=1.53\nimages=3\nchannels=3\nmode=composite\nunit=micron",
                 '<OME><Pixels SizeC="3" SizeZ="1" SizeT="1" PhysicalSizeX="0.5"/></OME>'):
        files.append(encoded(grey, "TIFF", description=text, dpi=(50800, 50800), **pages))
    exif = Image.Exif()
    for exif[0x0112] in (*range(10), 99):  # orientation
        files += [encoded(picture, kind, exif=exif) for kind in ("JPEG", "PNG", "TIFF")]
    return [data for data in files if data]


def written(suffix, content):
    """The bytes of a file that holds arrays, a document or tensors; b"" where it cannot."""
    file = io.BytesIO()
    with contextlib.suppress(Exception):
        if suffix == ".pt":
            torch.save(content, file)
        elif suffix == ".npz":
            np.savez_compressed(file, **content)
        elif suffix == ".npy":
            np.save(file, content["inst_map"])
        elif suffix == ".png":
            Image.fromarray(content["inst_map"].astype(np.uint16)).save(file, "PNG")
        else:
            file.write(json.dumps(content).encode())
    return file.getvalue()


def save_tiny_model(path):
    torch.manual_seed(0)
    model = DualUNet(num_classes=2, encoder="efficientnet_lite0", decoder_channels=(8,) * 5)
    torch.nn.init.constant_(model.density_head.bias, 0.5)
    model.config |= {"class_names": ["one", "two"], "mpp": 0.25}
    save_checkpoint(path, model, half=True)


# ---------------------------------------------------------------- fuzz


def read_picture(path):
    shape, size = read_image(path, PIXELS).pixels.shape, image_size(path)
    assert sorted(shape[:2]) == sorted(size), f"{size} stated for pixels {shape}"  # EXIF may turn


def run_infer(image, checkpoint, out):
    """infer.py on one image; what it writes is whole, or as before. Raises: ValueError."""
    def outputs():
        return sorted(file.name for file in out.glob("a*"))

    before, whole = outputs(), sorted(f"a{suffix}" for suffix, _ in FORMATS.values())
    words = [image, "--checkpoint", checkpoint, "--out", out, "--device", "cpu", "--halo", 32,
             "--max-pixels", PIXELS, "--formats", *FORMATS]
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = infer.main([*map(str, words)])
    lines = [line for line in errors.getvalue().splitlines() if not line.startswith("warning: ")]
    assert outputs() == (before if code else whole), f"code {code}, outputs {outputs()}"
    assert len(lines) == (code > 0), f"code {code}, lines {lines}"
    if code:
        raise ValueError(lines[0])


def hang(*_):  # by SystemExit, which no `except Exception` catches
    raise SystemExit(f"takes more than {SECONDS} s of processor time")


def judge(read, folder):
    """How reading a damaged file in `folder` ends: "result", "refused", or what is wrong."""
    outcome, peak = "result", resource.getrusage(0).ru_maxrss
    signal.signal(signal.SIGPROF, hang)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read()
    except (ValueError, FileNotFoundError) as error:
        outcome = "refused"
        if "\n" in str(error) or str(folder) not in str(error):
            outcome = f"not one sentence that names the file: {error}"
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"{type(error).__name__}: {str(error)[:200]}, {place}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    grown = (resource.getrusage(0).ru_maxrss - peak) >> 10
    return f"takes {grown} MB" if grown > MEGABYTES else outcome


class Fuzz:
    """`case(n)` damages a file that (seed, n) chooses, has it read, and judges what came of it."""

    def __init__(self, folder, seed=0):
        # Whole files: a picture, checkpoints of ours and of the authors, what infer.py writes.
        self.folder, self.seed = Path(folder), seed
        self.picture, self.tiny = self.folder / "a.png", self.folder / "tiny.pt"
        image, self.inst_map, type_map = synthetic_tissue(3, (H, W))
        self.classes = nucleus_classes(self.inst_map, type_map).tolist()
        Image.fromarray(image).save(self.picture)
        save_tiny_model(self.tiny)
        ours = torch.load(self.tiny, weights_only=True)
        theirs = {}
        for name, value in ours["model"].items():
            name = name.replace("segmentation_decoder", "decoder").replace("_head", "_head.0")
            name = name.replace("density_decoder", "decoder_count").replace("density", "count")
            theirs[name] = value
        self.checkpoints = [ours, theirs, {"state_dict": theirs, "epoch": 3}]
        run_infer(self.picture, self.tiny, self.folder / "out")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of what it will not write one day
            self.images = image_files()

    # Each of these returns the file of a case, what it holds, and what reads it.

    def image(self, rng, folder):
        path, data = folder / "a.png", rng.choice(self.images)
        if rng.random() < 0.25:
            return path, data, partial(run_infer, path, self.tiny, folder / "out")
        return path, data, partial(read_picture, path)

    def checkpoint(self, rng, folder):
        path, content = folder / "a.pt", rng.choice(self.checkpoints)
        if rng.random() < 0.25:
            return path, content, partial(run_infer, self.picture, path, folder / "out")
        return path, content, partial(load_any_model, path)

    def output(self, rng, folder):
        """What a run left: it goes on from there, or is evaluated."""
        out = shutil.copytree(self.folder / "out", folder / "out")
        path = out / rng.choice(["run.jsonl", "summary.csv", "a_instances.tif", "a_nuclei.csv"])
        read = partial(read_predictions, out, "a", ["one", "two"])
        if not path.name.startswith("a"):
            read = partial(run_infer, self.picture, self.tiny, out)
        return path, path.read_bytes(), read

    def label(self, rng, folder):
        # A set of one image, with its classes in the label or beside it.
        types = {str(number): CONSEP_CLASSES[k - 1] for number, k in enumerate(self.classes, 1)}
        files = {"types/a.json": types, "classes.json": dict(enumerate(CONSEP_CLASSES, 1))}
        name = f"labels/a{rng.choice(['.npz', '.npy', '.png', '.geojson'])}"
        files[name] = {"inst_map": self.inst_map, "inst_type": np.array(self.classes)}
        if name.endswith(".geojson"):
            files = {name: json.loads((self.folder / "out" / "a_nuclei.geojson").read_text())}
        for part in ("images", "labels", "types"):
            (folder / part).mkdir()
        shutil.copy(self.picture, folder / "images")
        for path, content in files.items():
            (folder / path).write_bytes(written(Path(path).suffix, content))
        name = rng.choice([*files, name])
        return folder / name, files[name], lambda: open_source(folder).read(0)

    def case(self, n):
        """(kind, "result" or "refused" or what is wrong) of case n."""
        rng, folder = random.Random(f"{self.seed}/{n}"), self.folder / f"case{n}"
        folder.mkdir()
        kind = rng.choices([self.image, self.label, self.checkpoint, self.output],
                           [45, 30, 15, 10])[0]
        path, data, read = kind(rng, folder)
        damage = rng.choice([None, altered, altered, flipped, spliced, resized])
        if not isinstance(data, bytes):
            data = written(path.suffix, altered(rng, data) if damage is altered else data)
        if data and damage not in (None, altered):
            data = damage(rng, data)
        path.write_bytes(data)
        outcome = judge(read, self.folder)
        shutil.rmtree(folder)
        return kind.__name__, outcome


def fuzz(args):
    """Runs all cases; prints failures and how each kind ended. Returns the number of failures."""
    table = Counter()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzz(folder, args.seed)
        for n in range(args.cases) if args.only is None else [args.only]:
            print(n, end="\r", file=sys.stderr, flush=True)  # to know it if the interpreter crashes
            kind, outcome = fuzzer.case(n)
            if outcome not in ("result", "refused"):
                print(f"FAILED --seed {args.seed} --only {n}: {kind}: {outcome}", flush=True)
                outcome = "failed"
            table[kind, outcome] += 1
            table["all", outcome] += 1
    for kind in ("image", "label", "checkpoint", "output", "all"):
        result, refused, failed = (table[kind, end] for end in ("result", "refused", "failed"))
        print(f"{kind}: {result} gave a result, {refused} a sentence, {failed} failed")
    return table["all", "failed"]


# ---------------------------------------------------------------- kill


def run(words, out, wait=None):
    """Runs a script, and after `wait` s kills it; returns whether it ended by itself."""
    with open(f"{out}.log", "a") as log:
        process = subprocess.Popen([sys.executable, *words], stdout=log, stderr=log, cwd=ROOT)
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.kill()  # SIGKILL
            process.wait()
    if process.returncode > 0:
        raise RuntimeError(f"{words[0]} ended with {process.returncode}; see {out}.log:\n"
                           + Path(f"{out}.log").read_text())
    return process.returncode == 0


def check_training(out, whole, ended):
    """Asserts that no checkpoint is damaged, no epoch lost, and the end is the uninterrupted one.

    Returns whether all epochs are done.
    """
    reported = re.findall(r"^epoch (\d+) of", Path(f"{out}.log").read_text(), re.MULTILINE)
    saved = {path.name: read_checkpoint(path) for path in out.glob("*.pt")}
    epochs = saved["last.pt"]["epoch"] if "last.pt" in saved else 0
    assert epochs >= int(max(reported, default=0)), "an epoch is lost"
    wanted = {path.name: read_checkpoint(path) for path in whole.glob("*.pt")}
    done = epochs == wanted["last.pt"]["epoch"]
    assert done or not ended, "it ended too early"
    for file in wanted if done else ():
        for name, value in wanted[file]["model"].items():
            assert torch.equal(saved[file]["model"][name], value), f"{file}: {name} differs"
    return done


def check_outputs(out, whole, ended):
    """Asserts that every output is whole, and that the end has all of them and no leftovers."""
    names = {path.name for path in out.glob("*")}
    for name in names:
        if not name.endswith((".part", "run.jsonl", "summary.csv")):  # these have times
            assert (out / name).read_bytes() == (whole / name).read_bytes(), f"{name} differs"
    assert not ended or names == {path.name for path in whole.iterdir()}
    return ended


def kill_one(name, words, check, folder, kills):
    """Runs a command to its end again and again, and kills it at random moments `kills` times."""
    # Uninterrupted, for comparison.
    whole, start = folder / f"{name}-whole", time.time()
    run([*words, "--out", str(whole)], whole)
    seconds, killed, runs = time.time() - start, 0, 0

    while killed < kills:
        out, done = folder / f"{name}-{runs}", False
        while not done:
            call = [*words, "--out", str(out)]
            if (out / "last.pt").exists():
                call = ["train.py", "--resume", str(out)]
            wait = random.uniform(0.1, 0.8) * seconds if killed < kills else None
            ended = run(call, out, wait)
            killed += not ended
            done = check(out, whole, ended)
        runs += 1
    print(f"{name}: {killed} kills; {runs} runs went on to the end, each equal to the "
          "uninterrupted one", flush=True)


def kill(args):
    """Kills trainings and folder runs; raises where that costs anything. Returns 0."""
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        # A set of synthetic tissue.
        folder = Path(folder)
        save_tiny_model(folder / "tiny.pt")
        for part in ("images", "labels"):
            (folder / "set" / part).mkdir(parents=True)
        for i in range(8):
            image, inst_map, _ = synthetic_tissue(i, (160, 224))
            Image.fromarray(image).save(folder / f"set/images/{i}.png")
            Image.fromarray(inst_map.astype(np.uint16)).save(folder / f"set/labels/{i}.png")

        # The commands.
        train = (f"train.py --data {folder}/set --device cpu --workers 0 --epochs 6 --steps 3 "
                 "--crop 64 --batch 2 --encoder resnet18 --decoder-channels 8 8 8 8 8 "
                 "--class-weights none --precision fp32")
        predict = (f"infer.py {folder}/set/images --checkpoint {folder}/tiny.pt --device cpu "
                   f"--precision fp32 --tile 64 --halo 32 --formats {' '.join(FORMATS)}")
        kill_one("training", train.split(), check_training, folder, args.kills)
        kill_one("inference", predict.split(), check_outputs, folder, args.kills)
    return 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("fuzz", "kill"))
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--only", type=int, help="the number of one case to run again")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    failures = fuzz(args) if args.action == "fuzz" else kill(args)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
