"""Shows that damaged files end in a result or one sentence, and SIGKILL costs no file or result.

    python benchmarks/robustness.py fuzz --data CoNSeP NuInsSeg  # 2,500 cases, 5 min on one core
    python benchmarks/robustness.py fuzz --only 17               # one case again, by its number
    python benchmarks/robustness.py kill                         # 20 kills each, 10 min on one core

Exit code 1 if anything failed.
"""

import argparse
import contextlib
import io
import json
import math
import os
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
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the modules are no package

import infer
from data import number_ids, open_source, read_image, read_labels, synthetic_tissue
from dualunet import DualUNet, load_model, save_checkpoint

SECONDS, KILOBYTES, PIXELS = 60, 2**20, 2**25  # cost allowed (1 x 65,535 pixels: 13 s), size let in
H, W = 48, 64  # of the images
MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0", b"MM\0*", b"II+\0", b"GIF89a", b"BM",
         b"%PDF-1.4", b"RIFF\0\0\0\0WEBP", b"\x93NUMPY\1\0", b"PK\3\4", b"MATLAB 5.0", b"\0" * 8)
ODD = (None, -1, 0, 2**31, 1e300, math.nan, "odd\nline", b"\xff", [], {}, [None] * 5, (-1,) * 5,
       (10**6,) * 5, ["a", 1], torch.zeros(1), torch.zeros(1).expand(2**40))
CHANGES = (lambda a: a + 0.5, lambda a: a * math.nan, lambda a: a + 1e300, lambda a: -1 * a,
           lambda a: a[None], lambda a: a.T, lambda a: a[:-1], lambda a: a > 0, lambda a: a * 1j,
           lambda a: a + 250, lambda a: a + 2**31, lambda a: a * 0, lambda a: a + np.uint64(2**63),
           lambda a: a.astype(str), lambda a: a.astype(object), lambda a: a.astype("m8[s]"),
           lambda a: np.zeros(a.shape, [("a", "i4"), ("b", "f8")]), lambda a: a.to_sparse(),
           lambda a: a.double())
WRITERS = {
    ".mat": savemat, ".pt": lambda file, entries: torch.save(entries, file),
    ".npz": lambda file, arrays: np.savez_compressed(file, **arrays),
    ".npy": lambda file, arrays: np.save(file, arrays["inst_map"]),
    ".png": lambda file, arrays:
        Image.fromarray(arrays["inst_map"].astype(np.uint16)).save(file, "PNG"),
}


# ---------------------------------------------------------------- files


def encoded(image, suffix, **options):
    """The bytes of an image in a format, none if Pillow cannot write it (12 warns, 13 refuses)."""
    file = io.BytesIO()
    with contextlib.suppress(OSError, KeyError, ValueError, DeprecationWarning):
        image.copy().save(file, Image.registered_extensions()[suffix], **options)
    return file.getvalue()


def image_files():
    """{kind: [bytes, ...]}: all formats, modes and turns."""
    pixels, exif = synthetic_tissue(3, (H, W))[0], Image.Exif()
    tissue, wide = Image.fromarray(pixels), pixels[..., 1] * np.uint16(257)
    modes = {mode: tissue.convert(mode) for mode in "RGB 1 L LA P CMYK RGBA RGBX YCbCr HSV".split()}
    raw = {"I;16": wide, "I;16B": wide.astype(">u2"), "I": wide.astype("i4"),
           "F": wide.astype("f4"), "LAB": pixels}
    modes |= {mode: Image.frombytes(mode, (W, H), a.tobytes()) for mode, a in raw.items()}
    files = {mode: [encoded(image, s) for s in (".png", ".tif", ".jpg", ".bmp")]
             for mode, image in modes.items()}
    files["compressed"] = [encoded(tissue, ".tif", compression=c)
                           for c in ("tiff_lzw", "jpeg", "packbits")]
    files["transparent"] = [encoded(modes[mode], ".png", transparency=t) for mode, t in (
        ("P", bytes(range(256))), ("P", 3), ("RGB", (9, 9, 9)), ("L", 99))]
    files["animated"] = [encoded(tissue, s, save_all=True, append_images=[tissue.rotate(180)])
                         for s in (".gif", ".tif", ".apng", ".webp")]
    files["EXIF-rotated"] = []
    for exif[0x0112] in (*range(10), 99):
        files["EXIF-rotated"] += [encoded(tissue, s, exif=exif) for s in (".jpg", ".png", ".tif")]
    return {kind: good for kind, candidates in files.items()
            if (good := [data for data in candidates if data])}


def odd(rng, entries):
    """The dict; every other time one entry is changed, replaced, gone or under another name."""
    entries, name = dict(entries), rng.choice(sorted(entries))
    if rng.random() < 0.5:
        value, replaced = entries.pop(name), rng.random() < 0.4
        with contextlib.suppress(Exception):  # not every change exists for every value
            value = rng.choice(ODD) if replaced else rng.choice(CHANGES)(value)
        entries |= rng.choice([{name: value}] * 8 + [{"renamed": value}, {}])
    return entries


def written(suffix, entries):
    """The bytes of a file that holds the entries, none where they cannot be written."""
    file = io.BytesIO()
    if suffix != ".pt" and any(isinstance(value, torch.Tensor) for value in entries.values()):
        return b""  # one of them, expanded, would be written out to its 4 TB
    with contextlib.suppress(Exception):
        WRITERS[suffix](file, entries)
    return file.getvalue()


# ---------------------------------------------------------------- damage


def resized(rng, data):
    """Another size in the header: none, too little, or far more than the file holds."""
    h, w = (rng.choice((0, 1, 100, 5_000, 65_535, 2**31 - 1)) for _ in "hw")
    if data.startswith(MAGIC[0]):  # PNG
        chunk = b"IHDR" + struct.pack(">II", w, h) + data[24:29]
        return data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    for tag, side in ((256, w), (257, h)):  # TIFF
        entry = struct.pack("<HHII", tag, 4, 1, side)
        data = re.sub(re.escape(entry[:2]) + b"[\3\4]\0\1\0\0\0....", lambda _: entry, data,
                      flags=re.DOTALL)
    for code, limit in ((">HH", 2**16 - 1), ("<ii", 2**31 - 1)):  # JPEG, .mat
        data = data.replace(struct.pack(code, H, W),
                            struct.pack(code, min(h, limit), min(w, limit)))
    return data.replace(*(f"'shape': ({a}, {b}), }}".encode().ljust(50)  # .npy
                          for a, b in ((H, W), (h, w))))


def flipped(rng, data):
    data, span = bytearray(data), min(rng.choice([len(data), 64, 512]), len(data))
    for _ in range(rng.choice([1, 2, 10, 100])):
        data[rng.randrange(span)] ^= rng.randrange(1, 256)
    return bytes(data)


def spliced(rng, data):
    a, b = sorted(rng.randrange(len(data)) for _ in "ab")
    return data[:a] + rng.choice([b"", data[a:b] * 2, bytes(b - a)]) + data[b:]


DAMAGE = {
    "none": lambda rng, data: data, "bytes flipped": flipped,
    "lost, doubled, zeros": spliced, "wrong size": resized,
    "cut short": lambda rng, data: data[:rng.randrange(len(data) if rng.random() < 0.7 else 64)],
    "wrong magic": lambda rng, data: rng.choice(MAGIC) + data[rng.choice([0, 8]):],
    "empty": lambda rng, data: b"",
}


# ---------------------------------------------------------------- fuzz


def hang(*_):  # by SystemExit, which no `except Exception` catches
    raise SystemExit(f"takes more than {SECONDS} s of processor time")


def judge(call, folder):
    """How a call on a damaged file in `folder` ends: "result", "refused", or what is wrong."""
    outcome, old, peak = (
        "result", signal.signal(signal.SIGPROF, hang), resource.getrusage(0).ru_maxrss)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            call()
    except (ValueError, FileNotFoundError) as error:
        good = "\n" not in str(error) and str(folder) in str(error)
        outcome = "refused" if good else f"not one sentence that names the file: {error}"
    except (Exception, SystemExit) as error:
        outcome = (f"{type(error).__name__}: {error}, "
                   f"{traceback.extract_tb(error.__traceback__)[-1]}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
    left = [p.name for p in folder.rglob("*") if p.suffix in (".part", ".tmp")]
    grown = resource.getrusage(0).ru_maxrss - peak
    return (f"warns {warned[0].message}" if warned else f"leaves {left}" if left else
            f"takes {grown >> 10} MB" if grown > KILOBYTES else outcome)


def infer_image(folder, checkpoint):
    """infer.py, its sentence raised as a ValueError; its outputs are whole, or as before."""
    def outputs():
        return sorted(p.name for p in (folder / "out").glob("a*"))

    before, whole = outputs(), sorted(f"a{suffix}" for suffix, _ in infer.FORMATS.values())
    words = [folder / "images" / "a.png", "--checkpoint", checkpoint, "--out", folder / "out",
             "--device", "cpu", "--halo", 32, "--max-pixels", PIXELS, "--formats", *infer.FORMATS]
    with (contextlib.redirect_stdout(io.StringIO()),
          contextlib.redirect_stderr(io.StringIO()) as errors):
        code = infer.main([*map(str, words)])
    assert outputs() == (before if code else whole), (
        f"exit code {code} with the outputs {outputs()}")
    if code:
        raise ValueError(errors.getvalue().removeprefix("error: ").removesuffix("\n"))
    assert not errors.getvalue(), errors.getvalue()


def save_tiny_model(path):
    torch.manual_seed(0)
    model = DualUNet(num_classes=2, encoder="resnet18", decoder_channels=(8,) * 5)
    model.config |= {"class_names": ["one", "two"], "mpp": 0.25}
    save_checkpoint(path, model, half=True)


class Fuzz:
    """`case(n)` damages a file that (seed, n) chooses, has it read, and judges what came of it."""

    def __init__(self, folder, *, seed=0, data=()):
        self.folder, self.seed, self.tiny, self.images = (
            Path(folder), seed, Path(folder) / "tiny.pt", image_files())
        save_tiny_model(self.tiny)
        self.checkpoint = torch.load(self.tiny, weights_only=True)
        image, inst_map, type_map = synthetic_tissue(3, (H, W))
        self.picture, (_, ids, first) = (
            encoded(Image.fromarray(image), ".png"), number_ids(inst_map))
        types = ({"type_map": type_map}, {"inst_type": type_map.flat[first]},
                 {"id": ids, "class": type_map.flat[first]})
        self.labels = [{"inst_map": inst_map} | arrays for arrays in types]
        real = [sorted(Path(root).rglob(f"{part}/*.*"))
                for root in data for part in ("[Ii]mages", "[Ll]abels")]
        # 20 from all over each
        self.real = [path for paths in real for path in paths[::-(-len(paths) // 20) or 1]]

    def prepare(self, rng, folder):
        """Writes a case's files; returns kind, file to damage, its bytes, and what reads it."""
        path, commanded = folder / "images" / "a.png", rng.random() < 0.25
        path.parent.mkdir(parents=True)
        path.write_bytes(self.picture)
        kind = rng.choices(["image", "labels", "checkpoint", "journal", "real"],
                           [45, 25, 15, 5, 10 * bool(self.real)])[0]
        if kind == "image":
            mode = rng.choice([*self.images])
            call = ((lambda: infer_image(folder, self.tiny)) if commanded
                    else lambda: read_image(path, PIXELS))
            return f"image {mode}", path, rng.choice(self.images[mode]), call
        if kind == "labels":
            suffix = rng.choice([".mat", ".npz", ".npy", ".png"])
            path = folder / "labels" / f"a{suffix}"
            path.parent.mkdir()
            (folder / "classes.json").write_text(
                '["a", "b", "c", "d"]' if suffix in (".mat", ".npz") else '["a"]')
            data = written(suffix, odd(rng, rng.choice(self.labels)))
            return f"labels {suffix}", path, data, lambda: open_source(folder).read(0)
        if kind == "checkpoint":
            path, part = folder / "a.pt", rng.choice(["model", "model_config"])
            entries = odd(rng, self.checkpoint | {part: odd(rng, self.checkpoint[part])})
            data = written(".pt", rng.choice([entries, entries, entries, entries.get("model", {})]))
            return kind, path, data, lambda: (
                infer_image(folder, path) if commanded else load_model(path))
        if kind == "journal":  # what a killed run left
            infer_image(folder, self.tiny)
            path = folder / "out" / "run.jsonl"
            return kind, path, path.read_bytes(), lambda: infer_image(folder, self.tiny)
        source = rng.choice(self.real)
        path, read = folder / source.name, (
            read_image if source.parent.name in ("images", "Images") else read_labels)
        return (f"real {source.parent.name.lower()} {source.suffix}", path, source.read_bytes(),
                lambda: read(path))

    def case(self, n):
        """(kind, damage, "result" or "refused" or what is wrong) of case n."""
        rng, folder = random.Random(f"{self.seed}/{n}"), self.folder / f"case{n}"
        damage = rng.choice([*DAMAGE])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what makes the damage
            kind, path, data, call = self.prepare(rng, folder)
            path.write_bytes(DAMAGE[damage](rng, data) if data else data)
        outcome = judge(call, folder)
        shutil.rmtree(folder)
        return kind, damage, outcome


def fuzz(args):
    """Runs all cases; prints failures and how each kind and damage ended. Returns the failures."""
    table = Counter()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzz(folder, seed=args.seed, data=args.data)
        for n in range(args.cases) if args.only is None else [args.only]:
            print(n, end="\r", file=sys.stderr, flush=True)  # to know it if the interpreter crashes
            kind, damage, outcome = fuzzer.case(n)
            if outcome not in ("result", "refused"):
                print(f"FAILED --seed {args.seed} --only {n}: {kind}, damage {damage}: {outcome}",
                      flush=True)
                outcome = "failed"
            table.update([(row, outcome) for row in ("all", kind, f"damage: {damage}")])
    print(f"{'':<40}{'result':>9}{'refused':>9}{'failed':>9}")
    for row in sorted({row for row, _ in table}):
        print(f"{row:<40}" + "".join(f"{table[row, outcome]:>9}"
                                     for outcome in ("result", "refused", "failed")))
    return table["all", "failed"]


# ---------------------------------------------------------------- kill


def content(path):
    """What of a file must be the same in every run; raises where the file is cut short."""
    if path.suffix == ".pt":
        saved = torch.load(path, weights_only=True)
        return {k: saved.get(k)
                for k in ("model", "training", "optimizer", "epoch", "best", "split")}
    if path.name == "log.jsonl":
        return [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()]
    return read_image(path).tobytes() if path.suffix == ".png" else path.read_bytes()


def same(a, b):
    """Whether two values are equal, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def run(words, out, wait=None):
    """Runs a script, and after `wait` s kills it; returns whether it ended by itself."""
    with open(f"{out}.log", "a") as log:
        process = subprocess.Popen([sys.executable, *map(str, words)], stdout=log, stderr=log,
                                   cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.kill()  # SIGKILL
            process.wait()
    if process.returncode > 0:
        raise RuntimeError(
            f"{words[0]} ended with {process.returncode}:\n{Path(f'{out}.log').read_text()}")
    return process.returncode == 0


def unfinished(out):
    return {p.name for p in out.glob("*") if p.suffix in (".tmp", ".part")}


def check(out, whole, ended, rewritten):
    """Asserts that files are whole, in the end as in the uninterrupted run, and no epoch lost."""
    names, wanted = ({p.name for p in place.glob("*")} for place in (out, whole))
    assert names == wanted or not ended, f"{names ^ wanted} are missing or left over"
    for name in names - unfinished(out):
        if ended or not name.endswith(rewritten):
            equal = same(content(out / name), content(whole / name))
            assert equal or name.endswith(".pt") and not ended, f"{name} is not as it should be"
    reported = re.findall(r"^epoch (\d+), ", Path(f"{out}.log").read_text(), re.MULTILINE)
    assert not reported or (
        content(out / "last.pt")["epoch"] >= max(map(int, reported))), "an epoch is lost"


def kill(args):
    """Kills trainings and folder runs at random moments; prints what that cost. Returns 0."""
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_tiny_model(folder / "tiny.pt")
        (folder / "in").mkdir()
        for i in range(8):
            Image.fromarray(synthetic_tissue(i, (160, 224))[0]).save(folder / "in" / f"{i}.png")
        train = ("train.py --device cpu --workers 0 --epochs 6 --steps 3 --crop 64 --batch 2 "
                 "--decoder-channels 8 8 8 8 8 --val synthetic_3 --class-weights none "
                 "--precision fp32 --seed 1").split()
        predict = ["infer.py", folder / "in", "--checkpoint", folder / "tiny.pt", "--device", "cpu",
                   "--precision", "fp32", "--tile", 64, "--halo", 32, "--formats", *infer.FORMATS]
        for name, words, rewritten in (("training", train, (".png", ".jsonl")),
                                       ("inference", predict, ".jsonl")):
            whole, began, kills, caught, runs = folder / f"{name} whole", time.time(), 0, 0, 0
            run([*words, "--out", whole], whole)
            seconds = time.time() - began
            while kills < args.kills:
                out, ended, runs = folder / f"{name} {runs}", False, runs + 1
                while not ended:
                    call = ([*words[:5], "--resume", out] if (out / "last.pt").exists()
                            else [*words, "--out", out])
                    before, wait = unfinished(out), (
                        random.uniform(0.2, 1) * seconds if kills < args.kills else None)
                    ended = run(call, out, wait)
                    kills, caught = kills + (not ended), caught + bool(unfinished(out) - before)
                    check(out, whole, ended, rewritten)
            print(f"{name}: {kills} kills, {caught} of them left an unfinished file; {runs} runs "
                  "went on to the end, each equal to the uninterrupted one", flush=True)
    return 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("fuzz", "kill"))
    parser.add_argument("--cases", type=int, default=2500)
    parser.add_argument("--only", type=int, help="the number of one case to run again")
    parser.add_argument("--data", nargs="+", default=(),
                        help="data sets to damage beside the files made here")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    return 1 if (fuzz if args.action == "fuzz" else kill)(args) else 0


if __name__ == "__main__":
    sys.exit(main())
