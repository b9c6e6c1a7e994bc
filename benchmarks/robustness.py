"""Shows that a damaged file ends in a result or one sentence, and that SIGKILL costs neither file nor result.

    python benchmarks/robustness.py fuzz --images FOLDER     # 2,000 cases: three minutes on one core
    python benchmarks/robustness.py fuzz --images FOLDER --only 17      # one case again, by its number
    python benchmarks/robustness.py kill                     # 20 kills each: 20 minutes on one core

Exit code 1 if anything failed. Needs Linux: /proc for memory, SIGPROF against hanging.
"""

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import random
import re
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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the modules are no package

import infer
from data import IMAGE_SUFFIXES, open_source, read_image, read_labels, synthetic_tissue
from dualunet import DualUNet, load_model, save_checkpoint

SECONDS, BYTES = 10, 2**30  # what one damaged file may cost: a valid one takes milliseconds
H, W = 48, 64  # of the images
MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0", b"MM\0*", b"II+\0", b"GIF89a", b"BM", b"%PDF-1.4",
         b"RIFF\0\0\0\0WEBP", b"\x93NUMPY\1\0", b"PK\3\4", b"MATLAB 5.0", b"\x80\2", b"\0" * 8)
ODD = (None, -1, 0, 2, 2**31, 1e300, float("nan"), "", "odd\nline", b"\xff", [], {}, [None] * 5, (8,) * 5, (-1,) * 5,
       (10**6,) * 5, ["a", "b"], ["a", 1], torch.zeros(1), torch.zeros(1).expand(2**40), True)
ODD_ARRAYS = (lambda a: a + 0.5, lambda a: a * np.nan, lambda a: a + 1e300, lambda a: -a.astype(int), lambda a: a[None],
              lambda a: a[:0], lambda a: a[:-1], lambda a: a.T, lambda a: a > 0, lambda a: a * 1j, lambda a: a + 250,
              lambda a: a.astype(str), lambda a: a.astype(object), lambda a: a.astype("m8[s]"), lambda a: a + 2**31,
              lambda a: a + np.uint64(2**63), lambda a: a * 0, lambda a: a.astype(">i4"), lambda a: np.array(None),
              lambda a: np.array(7), lambda a: np.zeros(a.shape, [("a", "i4"), ("b", "f8")]), lambda a: a[::-1])
ODD_TENSORS = (lambda t: t * torch.nan, lambda t: t[None], lambda t: t.double(), lambda t: t.to_sparse(),
               lambda t: t.to(torch.complex64), lambda t: t.int())


# ---------------------------------------------------------------- files and damage


def encoded(image, suffix, **options):
    """The bytes of an image in a format, or None where Pillow does not write it."""
    file = io.BytesIO()
    with contextlib.suppress(OSError, KeyError, ValueError):
        image.copy().save(file, Image.registered_extensions()[suffix], **options)
    return file.getvalue() or None


def image_seeds(folder):
    """{kind: [(suffix, bytes), ...]}: every format and exotic mode, and up to 20 files of a folder."""
    pixels, exif = synthetic_tissue(3, (H, W))[0], Image.Exif()
    tissue, wide = Image.fromarray(pixels), pixels[..., 1] * np.uint16(257)
    modes = {mode: tissue.convert(mode) for mode in "RGB 1 L LA P CMYK RGBA RGBX YCbCr HSV".split()}
    raw = {"I;16": wide, "I;16B": wide.astype(">u2"), "I": wide.astype("i4"), "F": wide.astype("f4"), "LAB": pixels}
    modes |= {mode: Image.frombytes(mode, (W, H), a.tobytes()) for mode, a in raw.items()}
    modes["PA"], frames = modes["P"].convert("PA"), {"save_all": True, "append_images": [tissue.rotate(180)]}
    seeds = {mode: [(s, encoded(im, s)) for s in (".png", ".tif", ".jpg", ".bmp")] for mode, im in modes.items()}
    seeds["RGB"] += [(".tif", encoded(tissue, ".tif", compression=c)) for c in ("tiff_lzw", "jpeg", "packbits")]
    seeds["transparent"] = [(".png", encoded(modes[mode], ".png", transparency=t)) for mode, t in (
        ("P", bytes(range(256))), ("P", 3), ("RGB", (9, 9, 9)), ("L", 99))]
    seeds["animated"] = [(s, encoded(tissue, kind, **frames)) for s in (".png", ".jpg", ".tif")
                         for kind in (".gif", ".tif", ".apng", ".webp")]
    seeds["EXIF-rotated"] = []
    for exif[0x0112] in (*range(10), 99):
        seeds["EXIF-rotated"] += [(s, encoded(tissue, s, exif=exif)) for s in (".jpg", ".png", ".tif")]
    real = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES) if folder else []
    seeds["real"] = [(p.suffix, p.read_bytes()) for p in real[::-(-len(real) // 20) or 1]]
    return {kind: good for kind, files in seeds.items() if (good := [file for file in files if file[1]])}


def label_file(rng, suffix, inst_map, types):
    """The bytes of a label file; every other one odd in one array's type, shape, range or name."""
    arrays, file = {"inst_map": inst_map, rng.choice(["type_map", "inst_type"]): types[inst_map]}, io.BytesIO()
    if rng.random() < 0.5:
        arrays = {"inst_map": inst_map, rng.choice(["inst_type", "class"]): types[1:], "id": np.arange(1, len(types))}
    name = rng.choice([*arrays])
    with contextlib.suppress(Exception):  # not every oddity exists for every array and in every format
        if rng.random() < 0.5:
            arrays |= {name if rng.random() < 0.9 else "renamed": rng.choice(ODD_ARRAYS)(arrays[name])}
        if suffix == ".mat":
            savemat(file, arrays, do_compression=rng.random() < 0.3)
        elif suffix == ".png":
            Image.fromarray(arrays["inst_map"].astype(np.uint16)).save(file, "PNG")
        else:
            np.save(file, arrays["inst_map"]) if suffix == ".npy" else np.savez_compressed(file, **arrays)
    return file.getvalue()


def odd_checkpoint(rng, checkpoint):
    """The bytes of a checkpoint in which one entry is odd or gone, some bare or wrapped."""
    checkpoint, file = {k: dict(v) if isinstance(v, dict) else v for k, v in checkpoint.items()}, io.BytesIO()
    part = rng.choice([checkpoint, checkpoint["model"], checkpoint["model_config"]])
    name = rng.choice(sorted(part))
    value, odd = part.pop(name), rng.choice(ODD)
    if isinstance(value, torch.Tensor) and rng.random() < 0.5:
        odd = rng.choice(ODD_TENSORS)(value)
    if rng.random() < 0.9:
        part[name if rng.random() < 0.9 else 7] = odd
    model = checkpoint.get("model")
    torch.save(rng.choice([checkpoint] * 4 + [model, {"state_dict": model}]), file)
    return file.getvalue()


def resized(rng, data):
    """Another size in the header: none, too little, or far more than the file holds."""
    h, w = (rng.choice((0, 1, 100, 5_000, 65_535, 2**31 - 1)) for _ in "hw")
    if data.startswith(MAGIC[0]):  # PNG
        chunk = b"IHDR" + struct.pack(">II", w, h) + data[24:29]
        return data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    for magic, at, size in ((b"\xff\xd8", data.find(b"\xff\xc0") + 5, struct.pack(">HH", h & 65535, w & 65535)),
                            (b"BM", 18, struct.pack("<ii", w, h)),
                            (b"GIF", 6, struct.pack("<HH", w & 65535, h & 65535))):
        if data.startswith(magic):
            return data[:at] + size + data[at + len(size):]
    for tag, side in ((256, w), (257, h)):  # TIFF
        entry = struct.pack("<HHII", tag, 4, 1, side)
        data = re.sub(re.escape(entry[:2]) + b"[\3\4]\0\1\0\0\0....", lambda _: entry, data, flags=re.DOTALL)
    shapes = [f"'shape': ({a}, {b}), }}".encode().ljust(50) for a, b in ((H, W), (h, w))]  # .npy
    return data.replace(*shapes).replace(struct.pack("<ii", H, W), struct.pack("<ii", h, w))  # .mat


def flipped(rng, data):
    data, span = bytearray(data), min(rng.choice([len(data), 64, 512]), len(data))
    for _ in range(rng.choice([1, 2, 10, 100])):
        data[rng.randrange(span)] ^= rng.randrange(1, 256)
    return bytes(data)


def spliced(rng, data):
    """A piece of the file is lost, doubled, or zeros."""
    a, b = sorted(rng.randrange(len(data)) for _ in "ab")
    return data[:a] + rng.choice([b"", data[a:b] * 2, bytes(b - a)]) + data[b:]


DAMAGE = {
    "none": lambda rng, data: data, "bytes flipped": flipped, "piece lost": spliced, "wrong size": resized,
    "cut short": lambda rng, data: data[:rng.randrange(len(data) if rng.random() < 0.7 else 64)],
    "wrong magic": lambda rng, data: rng.choice(MAGIC) + data[rng.choice([0, 8]):], "empty": lambda rng, data: b"",
}


# ---------------------------------------------------------------- fuzz


class Hang(BaseException):
    """The alarm rang; no `except Exception` catches it."""


def alarm(*_):
    raise Hang(f"more than {SECONDS} s of processor time")


def peak(clear=False):
    """Peak resident bytes of this process since last cleared."""
    if clear:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


class Fuzz:
    """`case(n)` damages a file that (seed, n) chooses, has it read, and judges what came of it."""

    def __init__(self, folder, *, seed=0, images=None):
        self.folder, self.seed, self.tiny = Path(folder), seed, Path(folder) / "tiny.pt"
        self.images = image_seeds(images)
        torch.manual_seed(0)
        model = DualUNet(num_classes=2, encoder="resnet18", decoder_channels=(8,) * 5)
        model.config |= {"class_names": ["one", "two"], "mpp": 0.25}
        save_checkpoint(self.tiny, model, half=True)
        self.model, self.checkpoint = load_model(self.tiny), torch.load(self.tiny, weights_only=True)
        image, self.inst_map, type_map = synthetic_tissue(3, (H, W))
        self.picture, self.types = encoded(Image.fromarray(image), ".png"), np.zeros(self.inst_map.max() + 1, np.uint8)
        self.types[self.inst_map] = type_map

    def command(self, folder, image, checkpoint=None):
        """Runs infer.py; the tiny model is loaded once and for all."""
        words = [image, "--checkpoint", checkpoint or self.tiny, "--out", folder / "out", "--device", "cpu",
                 "--halo", 32, "--formats", *infer.FORMATS]
        with contextlib.nullcontext() if checkpoint else mock.patch("infer.load_model", lambda *_: self.model):
            return infer.main([*map(str, words)])

    def prepare(self, rng, folder):
        """Writes a case's files; returns kind, damage, the file in question, the call, the check of its result."""
        kind = rng.choices(["image", "labels", "checkpoint", "run.jsonl"], [55, 25, 15, 5])[0]
        damage = rng.choice([*DAMAGE])
        picture, commanded = folder / "images" / "a.png", rng.random() < 0.25
        for path in (picture, folder / "labels" / "a", folder / "out" / "a"):
            path.parent.mkdir(parents=True)
        picture.write_bytes(self.picture)

        if kind == "image":
            mode = rng.choice([*self.images])
            suffix, data = rng.choice(self.images[mode])
            kind, path, commanded = f"image {mode}", picture.with_suffix(suffix), commanded and mode != "real"  # slow
            call, check = lambda: read_image(path), lambda a: a.dtype == "u1" and a.shape[2:] == (3,) and a.size
        elif kind == "labels":
            suffix, commanded = rng.choice([".mat", ".npy", ".npz", ".png"]), False
            kind, path = f"labels {suffix}", folder / "labels" / f"a{suffix}"
            data = label_file(rng, suffix, self.inst_map, self.types)
            (folder / "classes.json").write_text('["a", "b", "c", "d"]' if suffix in (".mat", ".npz") else '["a"]')
            call, check = lambda: read_labels(path)[0], lambda a: a.dtype == "i4" and a.ndim == 2
            if rng.random() < 0.7:
                call, check = lambda: open_source(folder).read(0), lambda arrays: (
                    [(a.dtype, a.shape[:2]) for a in arrays] == [(t, (H, W)) for t in ("u1", "i4", "u1")])
        elif kind == "checkpoint":
            path = folder / "a.pt"
            data = odd_checkpoint(rng, self.checkpoint) if rng.random() < 0.5 else self.tiny.read_bytes()
            call, check = lambda: load_model(path), lambda model: not model.training
        else:  # what a killed run left
            path, commanded = folder / "out" / "run.jsonl", True
            self.command(folder, picture)
            data = path.read_bytes()
        path.write_bytes(DAMAGE[damage](rng, data) if len(data) > 8 else data)
        if commanded:
            image, checkpoint = path if "image" in kind else picture, path if kind == "checkpoint" else None
            return f"{kind} > infer.py", damage, path, lambda: self.command(folder, image, checkpoint), None
        return kind, damage, path, call, check

    def case(self, n):
        """(kind, damage, "result" or "refused" or what is wrong) of case n."""
        rng, folder = random.Random(f"{self.seed}/{n}"), self.folder / f"case{n}"
        result, sentence, faults = None, None, []
        with open(os.devnull, "w") as quiet, warnings.catch_warnings(record=True) as warned, \
                contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            kind, damage, path, call, check = self.prepare(rng, folder)
            warnings.simplefilter("always")
            errors.seek(errors.truncate(0))
            terminal, old, before, began = os.dup(2), signal.signal(signal.SIGPROF, alarm), peak(True), time.process_time()
            os.dup2(quiet.fileno(), 2)  # libtiff's own remarks, which nothing in Python silences
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                result = call()
            except (ValueError, FileNotFoundError) as error:
                sentence = f"error: {error}\n"
            except (Exception, Hang, SystemExit) as error:
                faults.append(f"{type(error).__name__}: {error}, {traceback.extract_tb(error.__traceback__)[-1]}")
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.signal(signal.SIGPROF, old)
                os.dup2(terminal, 2)
                os.close(terminal)
        seconds, grown, said = time.process_time() - began, peak() - before, errors.getvalue()
        if check is None and not faults:  # infer.py
            made = sorted(p.name for p in (folder / "out").glob("*") if p.name != "run.jsonl")
            whole = sorted(f"a{suffix}" for suffix, _ in infer.FORMATS.values())
            sentence, said = (said, "") if result else (None, said)
            if made != (whole if result == 0 or kind.startswith("run.jsonl") else []):
                faults.append(f"exit code {result} with the outputs {made}")
        elif sentence is None and not faults and not check(result):
            faults.append("a result of the wrong kind")
        if sentence and not (sentence.count("\n") == 1 and sentence.startswith("error: ") and str(folder) in sentence):
            faults.append(f"not one sentence that names the file: {sentence!r}")
        faults += [f"stderr says {said!r}"] * bool(said) + [f"warns {w.message}" for w in warned]
        faults += [f"leaves {p.name}" for p in folder.rglob("*") if p.suffix in (".part", ".tmp")]
        faults += [f"takes {seconds:.0f} s"] * (seconds > SECONDS) + [f"takes {grown >> 20} MB"] * (grown > BYTES)
        shutil.rmtree(folder)
        return kind, damage, "; ".join(faults) or ("refused" if sentence else "result")


@functools.lru_cache
def fuzzer(folder, seed, images):
    return Fuzz(folder, seed=seed, images=images)


def one_case(words, n):
    return fuzzer(*words).case(n)


def fuzz(args):
    """Runs all cases in a process that may crash; prints every failure and the tables. Returns the failures."""
    table, failed, pool = Counter(), 0, None
    with tempfile.TemporaryDirectory() as folder:
        for n in range(args.cases) if args.only is None else [args.only]:
            pool = pool or ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            try:
                kind, damage, outcome = pool.submit(one_case, (folder, args.seed, args.images), n).result()
            except BrokenProcessPool:
                kind, damage, outcome, pool = "?", "?", "the interpreter crashes", None
            if outcome not in ("result", "refused"):
                print(f"FAILED --seed {args.seed} --only {n}: {kind}, damage {damage}: {outcome}", flush=True)
                failed, outcome = failed + 1, "failed"
            table.update([(kind, outcome), (f"damage: {damage}", outcome)])
        pool and pool.shutdown()
    print(f"\n{args.cases if args.only is None else 1} cases{'':<30}{'result':>9}{'refused':>9}{'failed':>9}")
    for row in sorted({row for row, _ in table}):
        print(f"{row:<40}" + "".join(f"{table[row, outcome]:>9}" for outcome in ("result", "refused", "failed")))
    return failed


# ---------------------------------------------------------------- kill


def same(a, b):
    """Whether two checkpoints' values are equal, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def run(words, log, folder=None, pattern="", wait=None):
    """Runs a script; after `wait` s, and once it writes a file of the pattern, kills it.

    Returns the exit code, seconds, and whether a file was being written.
    """
    def writes():
        with contextlib.suppress(FileNotFoundError):  # renamed by now
            return any(path.stat().st_mtime > started for path in folder.glob(pattern))

    began, started, writing = time.monotonic(), time.time(), False
    with open(log, "w") as file:
        process = subprocess.Popen([sys.executable, *map(str, words)], stdout=file, stderr=file, cwd=ROOT,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        while wait is not None and process.poll() is None:
            if time.monotonic() - began > wait and (not pattern or writes()):
                time.sleep(random.uniform(0, 0.03) if pattern else 0)
                process.kill()  # SIGKILL
                process.wait()
                writing = bool(pattern and writes())
                break
            time.sleep(0.001)
        code = process.wait()
    if code > 0:
        raise RuntimeError(f"{words[0]} ended with {code}:\n{Path(log).read_text()}")
    return code, time.monotonic() - began, writing


def check_training(out, log, reference, ended):
    """Checkpoints load, at most the last epoch reported is lost; in the end all is as in the reference."""
    saved = {p.name: torch.load(p, weights_only=True) for p in out.glob("*.pt")}  # raises if cut short
    reported = max(map(int, re.findall(r"^epoch (\d+), ", log.read_text(), re.MULTILINE)), default=0)
    assert saved.get("last.pt", {"epoch": 0})["epoch"] >= reported - 1, f"epoch {reported} was reported and is lost"
    if ended:
        for name, key in [("best.pt", "model"), *(("last.pt", k) for k in ("model", "training", "optimizer", "epoch"))]:
            assert same(saved[name][key], torch.load(reference / name, weights_only=True)[key]), f"{name}: {key}"
        logs = [[json.loads(line) | {"seconds": 0} for line in (folder / "log.jsonl").read_text().splitlines()]
                for folder in (out, reference)]
        assert logs[0] == logs[1], "log.jsonl differs"
        for name in ("curves.png", "preview.png"):
            assert (out / name).read_bytes() == (reference / name).read_bytes(), f"{name} differs"


def check_inference(out, log, reference, ended):
    """Each output is whole or not there; in the end all are there and nothing else is."""
    for path in out.glob("[!.]*[!l]"):  # all but run.jsonl
        assert path.read_bytes() == (reference / path.name).read_bytes(), f"{path.name} is not whole"
    assert not ended or {p.name for p in out.iterdir()} == {p.name for p in reference.iterdir()}, "files are left over"


def kill(args):
    """Kills a training and a folder's inference at random moments, half of them while a file is written."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "in").mkdir()
        for i in range(8):
            Image.fromarray(synthetic_tissue(i, (160, 224))[0]).save(folder / "in" / f"{i}.png")
        random.seed(args.seed)
        train = ("train.py --epochs 6 --steps 3 --crop 64 --batch 2 --decoder-channels 8 8 8 8 8 --val synthetic_3 "
                 "--class-weights none --precision fp32 --workers 0 --device cpu --seed 1 --out").split()
        predict = ["infer.py", folder / "in", "--checkpoint", Fuzz(folder).tiny, "--device", "cpu", "--precision", "fp32",
                   "--tile", 64, "--halo", 32, "--formats", *infer.FORMATS, "--out"]
        for name, words, pattern, check in (("training", train, "*.tmp", check_training),
                                            ("inference", predict, ".*.part", check_inference)):
            if name not in args.what:
                continue
            reference, log, kills, writing, runs = folder / f"{name} whole", folder / "log", 0, 0, 0
            _, seconds, _ = run([*words, reference], log)
            while kills < args.kills:
                runs, code, out = runs + 1, 1, folder / f"{name} {runs}"
                while code:
                    first, resume = not out.exists(), name == "training" and (out / "last.pt").exists()
                    call = ["train.py", "--device", "cpu", "--workers", 0, "--resume", out] if resume else [*words, out]
                    write = random.random() < 0.5
                    wait = random.uniform(0.1 if write else 0.2, 0.7 if write else 1) * seconds
                    code, took, caught = run(call, log, out, pattern * write, wait if kills < args.kills else None)
                    kills, writing = kills + bool(code), writing + caught
                    seconds = took if first and not code else seconds  # other work on the machine comes and goes
                    check(out, log, reference, not code)
            print(f"{name}: {kills} kills, {writing} of them while a file was written; "
                  f"{runs} runs went on to the end, each equal to the uninterrupted one", flush=True)
    return 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("fuzz", "kill"))
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--only", type=int, help="the number of one case to run again")
    parser.add_argument("--images", help="a folder of images to damage beside those made here")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--what", nargs="+", default=["training", "inference"], help="to kill")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    return 1 if (fuzz if args.action == "fuzz" else kill)(args) else 0


if __name__ == "__main__":
    sys.exit(main())
