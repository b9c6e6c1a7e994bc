"""Helpers of the commands: the machine, the list of images, the journal, the messages.

    device = pick_device("auto")
    images, skipped = find_images(["folder"], out="predictions")
    journal = Journal("predictions", settings, overwrite=False)

Needs images.py and pictures.py beside it.
"""

import ctypes
import glob
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import torch

from images import IMAGE_SUFFIXES, list_images
from pictures import SLIDE_SUFFIXES, differ

LOG_SECONDS = 30  # between lines of progress in a log


# ---------------------------------------------------------------- the machine


def pick_device(name):
    """The torch device of that name. Raises: ValueError when it cannot be used here."""
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            local_rank = int(os.environ.get("LOCAL_RANK", 0))  # processes share the GPUs
            name = f"cuda:{local_rank % torch.cuda.device_count()}"
        elif torch.backends.mps.is_available():
            name = "mps"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: not usable ({reason}); try --device auto") from None


def pick_precision(device, name="auto"):
    """The `dtype` of --precision: auto is bf16 if the processor has it (CPU: from torch 2.6)."""
    if name != "auto":
        return torch.bfloat16 if name == "bf16" else None
    able = False
    if device.type == "cuda":
        able = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        features = getattr(torch.cpu, "get_capabilities", dict)()
        able = any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if able else None


def keep_memory():
    """Makes glibc keep freed memory, which saves a quarter of the time on a CPU.

    By default it returns large blocks, and then the kernel must clear every page of the next ones.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block has pages of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: none, the heap never shrinks
        libc.mallopt(-8, 1)  # M_ARENA_MAX: one heap for all threads


def start_worker():
    """Runs first in every process of the pool."""
    keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that owns the pool handles Ctrl-C


def start_pool(workers, device):
    """Processes that reconstruct, or None. workers: None with a GPU is one a core, at most 8."""
    if workers is None:
        workers = min(os.cpu_count(), 8) if device.type == "cuda" else 0
    if not workers:
        return None
    return ProcessPoolExecutor(workers, get_context("spawn"), start_worker)  # as on Windows


def memory_of(device):
    """Total bytes of the device. (With the free bytes, the tile would differ from run to run.)"""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = 2**33  # if the system does not state it
    with suppress(AttributeError, ValueError, OSError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # a container's limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


# ---------------------------------------------------------------- which images


def find_images(paths, out):
    """({image: what the names of its outputs begin with}, sentences on skipped files).

    paths: of images and folders. Outputs begin with the stem, or with the whole name if several
    images share a stem.
    Raises: ValueError for a path without an image, and if two would write the same files.
    """
    # Collect the files.
    images, skipped = [], []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder; check the path")
        if path.is_file():
            images.append(path)
            continue
        inside, rest = list_images(path, SLIDE_SUFFIXES)
        if not inside:
            raise ValueError(f"{path}: no image inside{f', {rest}' if rest else ''}; "
                             f"expected {', '.join(IMAGE_SUFFIXES)}")
        if path.resolve() == Path(out).resolve():
            raise ValueError(f"{path}: is --out too, so outputs would become input; choose another")
        images += inside
        if rest:
            skipped.append(f"{path}: {rest}")

    # Name their outputs.
    images = list(dict.fromkeys(images))
    times = Counter(path.stem.casefold() for path in images)  # Windows ignores case
    stems, owners = {}, {}
    for path in images:
        stem = path.name if times[path.stem.casefold()] > 1 else path.stem
        other = owners.setdefault(stem.casefold(), path)
        if other != path:
            raise ValueError(f"{path}: would overwrite the outputs of {other}; run them one by one "
                             "with different --out")
        stems[path] = stem
    return stems, skipped


# ---------------------------------------------------------------- which are done


def source_of(path):
    """Identifies an input and its state: path, size, time of change."""
    state = path.stat()
    return [os.fsencode(path.resolve()).decode(errors="replace"), state.st_size, state.st_mtime_ns]


class Journal:
    """run.jsonl: a line for each image done, from which an interrupted run resumes.

    A line holds the settings, the input (path, size, time of change), the files written and the row
    of summary.csv. Lines are only appended, each in one piece, so several processes may write.
    Raises: ValueError for outputs of other settings, unless they may be overwritten.
    """

    def __init__(self, folder, settings, overwrite):
        self.folder, self.settings, self.overwrite = Path(folder), settings, overwrite
        self.path = self.folder / "run.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        entries = self.entries()
        before = entries[-1]["settings"] if entries else settings
        differing = [name for name, value in settings.items() if before.get(name) != value]
        if differing and not overwrite:
            raise ValueError(f"{folder}: holds outputs of another {', '.join(differing)}; "
                             "choose another --out, or replace them with --overwrite")

    def entries(self):
        """All intact lines; a line that a kill cut short is ignored."""
        entries = []
        if self.path.exists():
            for line in self.path.read_bytes().splitlines():
                with suppress(ValueError, TypeError, KeyError, AttributeError):
                    entry = json.loads(line)
                    check = entry.pop("check")
                    if check == zlib.crc32(json.dumps(entry).encode()):
                        entries.append(entry)
        return entries

    def done(self):
        """{what outputs begin with: line} of this call's settings; later lines replace earlier."""
        same = [entry for entry in self.entries() if entry["settings"] == self.settings]
        return {entry["image"]: entry for entry in same}

    def covers(self, path, entry):
        """Whether the image is done. Raises: ValueError if its outputs are another image's."""
        if self.overwrite or entry is None:
            return False
        if entry["source"] != source_of(path):
            raise ValueError(f"{path}: {entry['outputs'][0]} is of {entry['source'][0]}, or of an "
                             "earlier state of this file; choose another --out, or replace it "
                             "with --overwrite")
        return all((self.folder / name).exists() for name in entry["outputs"])

    def open_folder(self, path, stem, cores):
        """A folder for these tiles of this file under these settings, and no others."""
        text = json.dumps([self.settings, source_of(path), cores])
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        folder = self.folder / f".{stem}.{key}"
        folder.mkdir(exist_ok=True)
        return folder

    def remove_folders(self, stem):
        """Removes an image's tiles, also those of other settings."""
        for folder in self.folder.glob(f".{glob.escape(stem)}.{'?' * 12}"):
            shutil.rmtree(folder, ignore_errors=True)

    def add(self, path, stem, **more):
        """Notes that the image is done. more: outputs, row, counts, mpp_source."""
        entry = {"image": stem, "source": source_of(path), "settings": self.settings,
                 "time": time.time(), **more}
        entry["check"] = zlib.crc32(json.dumps(entry).encode())
        with open(self.path, "ab", buffering=0) as file:
            file.write(f"\n{json.dumps(entry)}\n".encode())  # the first \n ends a cut line
            os.fsync(file.fileno())


# ---------------------------------------------------------------- what the terminal says


class Progress:
    """Rewrites one line on a terminal; in a log, writes a line every LOG_SECONDS."""

    def __init__(self):
        self.last = time.monotonic()

    def __call__(self, text):
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif text and time.monotonic() - self.last >= LOG_SECONDS:
            print(text, file=sys.stderr, flush=True)
            self.last = time.monotonic()


show_progress = Progress()


def say(kind, path, sentence):
    """A warning or an error about a file, on a line of its own."""
    show_progress("")
    print(f"{kind}: {sentence if sentence.startswith(str(path)) else f'{path}: {sentence}'}",
          file=sys.stderr)


def explain(error, path):
    """One sentence about a failure at `path`."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return f"{path}: out of memory; use a smaller --tile or --batch"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or path}: {error.strerror}; check path, permissions and free space"
    return str(error)


def time_left(seconds, part):
    """The remaining time as text; the finished part (0 to 1) of the work took `seconds`."""
    left = seconds * (1 - part) / part
    if left < 90:
        return f"{left:.0f} s left"
    if left < 5400:
        return f"{left / 60:.0f} min left"
    return f"{left / 3600:.1f} h left"


class Estimate:
    """Estimates the remaining time from the sizes of the files."""

    def __init__(self, images):
        self.sizes = {path: max(path.stat().st_size, 1) for path in images}
        self.total, self.over = sum(self.sizes.values()), 0
        self.start = time.perf_counter()
        show_progress.last = time.monotonic()

    def leave_out(self, path):
        self.total -= self.sizes[path]

    def end(self, path):
        self.over += self.sizes[path]

    def begin(self, path, number):
        """The function to call with the number of finished tiles and of all tiles of an image."""
        place = f"{path} ({number + 1} of {len(self.sizes)})"

        def progress(done, tiles):
            part = (self.over + self.sizes[path] * done / tiles) / self.total
            left = time_left(time.perf_counter() - self.start, part)
            show_progress(f"{place}: {done} of {tiles} tiles, {left}")

        return progress


def names_in(text):
    """The names in a text with commas between them."""
    return [name.strip() for name in text.split(",")]


def plural(count, name):
    return f"{count:,} {name}" if count == 1 else f"{count:,} {name}s"


def opening_line(count, checkpoint, config, device, dtype):
    """The first line: images, checkpoint, classes, resolution, device and precision."""
    precision = "bf16" if dtype else "fp32"
    resolution = f" at {config['mpp']:g} µm per pixel" if config["mpp"] else ""
    line = (f"{plural(count, 'image')}; {Path(checkpoint).name}: {', '.join(config['class_names'])}"
            f"{resolution}; on {device.type} in {precision}")
    if config["reconstruct"].get("combine") == "sum":
        line += "; density trained as a normalised sum: peaks are found by prominence"
    return line


def resolution_lines(entries, wanted):
    """("0.5 µm per pixel (source)", lines on files that state no resolution)."""
    # Group the images by resolution and by who states it.
    sources, missing = {}, Counter()
    for entry in entries:
        mpp, source = entry["row"]["um_per_pixel"], entry["mpp_source"]
        if mpp is None or source == "assumed":
            missing[mpp] += 1
        else:
            sources.setdefault(f"{mpp:.3g}", {})[source] = differ(mpp, wanted)

    # Say it.
    stated = []
    for mpp, names in list(sources.items())[:3]:
        resampled = f"; resampled to {wanted:.3g}" if any(names.values()) else ""
        stated.append(f"{mpp} µm per pixel ({', '.join(names)}{resampled})")
    more = f" and {len(sources) - 3} others, see summary.csv" if len(sources) > 3 else ""
    lines = []
    for mpp, count in missing.items():
        where = "the file" if count == 1 else f"{count} files"
        if mpp is None:
            lines.append(f"no resolution in {where} or the checkpoint; --mpp gives areas in µm²")
        else:
            lines.append(f"no resolution in {where}: assumed {mpp:.3g} µm per pixel "
                         f"({10 / mpp:.0f}x); give --mpp otherwise")
    return ", ".join(stated) + more, lines


def class_doubts(class_names, counts):
    """A line if nearly all of many nuclei have one class, as in tissue unlike the training data."""
    most, total = max(counts), sum(counts)
    if len(counts) == 1 or total < 100 or most < 0.95 * total:
        return []
    return [f"nearly all nuclei are called {class_names[counts.index(most)]}: doubt the classes if "
            "the tissue is unlike the training data"]


def closing_lines(new, old, failed, config, seconds, out):
    """The last lines: failures, nuclei of each class, megapixels, seconds, output folder."""
    # Failures come first, then what was done before.
    lines = []
    if failed:
        lines.append(f"{plural(len(failed), 'image')} failed, see above")
    if old:
        nuclei = sum(entry["row"]["nuclei"] for entry in old)
        lines.append(f"{plural(len(old), 'image')} already done ({nuclei:,} nuclei); "
                     "--overwrite does it again")

    # What was done now.
    if new:
        counts = [sum(column) for column in zip(*(entry["counts"] for entry in new))]
        classes = []
        for name, n in zip(config["class_names"], counts):
            if name in new[0]["row"]:  # it is not if --keep leaves it out
                classes.append(f"{name} {n:,}")
        megapixels = sum(entry["row"]["megapixels"] for entry in new)
        lines.append(f"{sum(counts):,} nuclei in {plural(len(new), 'image')}: {', '.join(classes)}")
        if len(classes) == len(counts):
            lines += class_doubts(config["class_names"], counts)
        stated, assumed = resolution_lines(new, config["mpp"])
        lines.append(f"{megapixels:.2f} megapixels{f' at {stated}' if stated else ''} "
                     f"in {seconds:.1f} s")
        lines += assumed
        lines.append(f"written to {out}, with a row an image in summary.csv")
    if new and not failed:
        lines[-1] += f"; licence of the weights: {config['licence'] or 'not stated'}"
    return lines


# ---------------------------------------------------------------- processes that share work
#
# They do not communicate. Each takes images or tiles by its rank, and writes a file at its end.


def note_of(folder, rank):
    return Path(folder) / f".process-{rank}-ended"


def leave_note(folder, rank, failed):
    """Tells the first process that this one has ended, and which images failed."""
    part = note_of(folder, rank).with_suffix(".part")
    part.write_text(json.dumps(sorted(failed)), encoding="utf-8")
    os.replace(part, note_of(folder, rank))


def wait_for_notes(folder, ranks):
    """Waits until the other processes have ended; returns their failed images.

    Under torchrun, a process that ends with an error stops the others. So only the first process
    returns an error, and it ends last.
    """
    failed = set()
    for rank in range(1, ranks):
        note = note_of(folder, rank)
        while not note.exists():
            show_progress(f"waiting for process {rank} of {ranks}")
            time.sleep(0.1)
        failed |= set(json.loads(note.read_text(encoding="utf-8")))
        note.unlink()
    return failed
