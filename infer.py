"""Nuclei of whole images: tiled prediction from Python, and the command that writes files.

    python infer.py image.png                # predictions/image_overlay.png, _nuclei.geojson, ...

    model = load_model("weights/consep.pt")
    nuclei = predict(model, image)           # (H, W, 3) uint8: array, memmap, any sliced reader
    nuclei.inst_map, nuclei.centroids, nuclei.classes

Network and reconstruction run tile by tile, and a nucleus belongs to the tile whose core holds its
peak: nothing is blended or stitched, and memory is bounded by the tile. Under torchrun, processes
share the images of a folder and the tiles of a slide.
Needs dualunet.py, postprocess.py and data.py beside it, and slides.py for slides.
"""

import argparse
import csv
import ctypes
import json
import math
import os
import struct
import sys
import time
import uuid
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial
from itertools import groupby, islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from data import IMAGE_SUFFIXES, MAX_PIXELS, naming, open_image, read_image
from dualunet import class_colors, load_model, save_checkpoint
from postprocess import Nuclei, contours, measure, reconstruct, select

STRIDE = 32  # the encoders' total stride: windows that start on it are cut into the same cells
TILE = 1024  # ours: with halo 128 the network reads 1.56 times the image's area
HALO = 128  # ours: 99.9 % of nuclei as from one pass over the whole image; 64 px give 99 %
SLIDE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".svslide", ".npy")
LARGE = 10**8  # ours: pixels above which an image is worked on as a slide is, its outputs by tiles
CHECKPOINT = Path(__file__).parent / "weights" / "consep.pt"


# ---------------------------------------------------------------- tiles


def check_tiling(tile, halo, batch):
    """Raises ValueError where no such grid can be laid."""
    if tile <= 0 or halo < 0 or tile % STRIDE or halo % STRIDE:
        raise ValueError(f"tile is {tile} and halo {halo}; expected multiples of {STRIDE}, "
                         f"the tile at least {STRIDE}")
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1 tile")


def core_size(core):
    return core[2] - core[0], core[3] - core[1]


def tile_cores(height, width, tile):
    """Cores (y0, x0, y1, x1), the last ending at the image's sides rounded up to STRIDE."""
    bottom, right = (-(-side // STRIDE) * STRIDE for side in (height, width))
    return [(y, x, min(y + tile, bottom), min(x + tile, right))
            for y in range(0, height, tile) for x in range(0, width, tile)]


def reflect(start, stop, size):
    """Indices start..stop-1 of a line 0..size-1 that goes on by reflection, however often."""
    period = max(2 * (size - 1), 1)
    index = np.arange(start, stop) % period
    return np.minimum(index, period - index)


def read_window(image, y0, x0, y1, x1):
    """(h, w, 3) uint8 of the reflected image; only the part that it shows is read."""
    rows, columns = reflect(y0, y1, image.shape[0]), reflect(x0, x1, image.shape[1])
    top, left = rows.min(), columns.min()
    pixels = np.asarray(image[top:rows.max() + 1, left:columns.max() + 1])
    if pixels.dtype != np.uint8:
        raise ValueError(f"image holds {pixels.dtype}; expected uint8 RGB, 0 to 255")
    return pixels.take(rows - top, 0).take(columns - left, 1)  # by index, twice the time


def predict_maps(model, images, *, dtype=None, flips=False):
    """What the network says of a batch: what reconstruction needs, no more.

    images: (N, H, W, 3) uint8. dtype: None or the half precision to use. flips: mean of four views.
    Returns type_map (N, H, W) uint8, probability (N, K+1, H, W) and density (N, H, W) float32.
    """
    device = next(model.parameters()).device
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        images = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255  # N, 3, H, W

        def view(*axes):  # probability and density of the batch mirrored along axes
            logits, density = model(images.flip(axes))
            return torch.cat([logits.float().softmax(1), density.float()], dim=1).flip(axes)

        both = (view() + view(2) + view(3) + view(2, 3)) / 4 if flips else view()
        # Not the argmax of all: a nucleus between two classes would lose pixels to the background.
        # (`argmax` takes nine times as long as `max` on a CPU.)
        type_map = (both[:, 1:-1].max(1).indices + 1) * (both[:, 0] < 0.5)
        maps = type_map.to(torch.uint8), both[:, :-1], both[:, -1]
        return tuple(values.cpu().numpy() for values in maps)


def own_nuclei(core, halo, shape, type_map, probability, density, options):
    """(origin, nuclei): those whose peak lies in the core, from the maps of core and halo."""
    # Mirrored pixels served the network; a mirrored nucleus must not win a peak.
    origin = max(core[0] - halo, 0), max(core[1] - halo, 0)
    rows, columns = (slice(start - first + halo, side - first + halo)
                     for start, first, side in zip(origin, core, shape))
    nuclei = reconstruct(type_map[rows, columns], density[rows, columns],
                         class_probability=probability[:, rows, columns], **options)
    y, x = nuclei.peaks.T + np.reshape(origin, (2, 1))
    own = (core[0] <= y) & (y < core[2]) & (core[1] <= x) & (x < core[3])
    return origin, select(nuclei, own)


def ahead(submit, items, depth):
    """Yields the results of the futures submit(item) in order, while `depth` more are under way."""
    waiting = deque()
    for item in items:
        waiting.append(submit(item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def predict_tiles(model, image, *, cores=None, tile=TILE, halo=HALO, batch=1, dtype=None,
                  flips=False, pool=None, **options):
    """Yields the nuclei that each tile owns; arguments as in `predict`.

    cores: those of `tile_cores` to look at (default: all).
    Each item is (origin, nuclei): map and coordinates of these nuclei begin at origin (y, x) of the
    image. Windows of one size come together, to share batches.
    """
    check_tiling(tile, halo, batch)
    if len(image.shape) != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {tuple(image.shape)}; expected (height, width, 3)")
    if model.training:
        raise RuntimeError("model is in training mode: call model.eval() before predicting")
    options = {"combine": model.config.get("combine", "max")} | options
    cores = sorted(tile_cores(*image.shape[:2], tile) if cores is None else cores, key=core_size)
    batches = (chunk for _, group in groupby(cores, core_size)
               for chunk in iter(lambda group=group: list(islice(group, batch)), []))

    def read(cores):
        return cores, np.stack([read_window(image, y0 - halo, x0 - halo, y1 + halo, x1 + halo)
                                for y0, x0, y1, x1 in cores])

    def jobs():
        with ThreadPoolExecutor(1) as reader:  # reads while the network computes
            for cores, windows in ahead(partial(reader.submit, read), batches, 1):
                for core, *maps in zip(cores, *predict_maps(model, windows, dtype=dtype,
                                                            flips=flips)):
                    yield core, halo, image.shape, *maps, options

    if pool is None:
        yield from (own_nuclei(*job) for job in jobs())
    else:
        yield from ahead(lambda job: pool.submit(own_nuclei, *job), jobs(), 2 * os.cpu_count())


def measure_anew(nuclei, inst_map, peaks):
    """The nuclei on another label map with the same ids; classes and probabilities stay."""
    measured = measure(inst_map, np.append(0, nuclei.classes)[inst_map], peaks=peaks)
    return measured._replace(classes=nuclei.classes, probabilities=nuclei.probabilities)


def give_way(nuclei, taken):
    """A tile's nuclei without the pixels `taken` (h, w) bool by other tiles, measured anew.

    Where the maps of two tiles differ a little, neighbours may claim the same pixels. The later
    nucleus keeps the largest piece that is left, or goes if that is less than half: then it is the
    earlier one once more, its peak seen in two cores.
    """
    cut = np.unique(nuclei.inst_map[taken])
    cut = cut[cut > 0] - 1
    if not len(cut):
        return nuclei
    inst_map = np.where(taken, 0, nuclei.inst_map)
    for row, (y0, x0, y1, x1) in zip(cut, nuclei.boxes[cut]):
        box = inst_map[y0:y1, x0:x1]
        pieces, count = ndimage.label(box == row + 1)
        if count > 1:
            box[(pieces > 0) & (pieces != np.bincount(pieces[pieces > 0]).argmax())] = 0
    measured = measure_anew(nuclei, inst_map, nuclei.peaks)
    return select(measured, 2 * measured.areas > nuclei.areas)


def predict(model, image, *, tile=TILE, halo=HALO, batch=1, dtype=None, flips=False, pool=None,
            progress=None, **options):
    """All nuclei of an image of any size, ids in the scan order of the peaks.

    image: anything with `.shape` (H, W, 3) and `image[y0:y1, x0:x1]` -> uint8 RGB.
    tile, halo: side of a tile's core and the margin read around it, multiples of 32.
    batch: tiles that the network takes at once. dtype: None, or half precision by autocast.
    flips: the mean over four mirrorings of every tile counts: better, four times the time.
    pool: an executor that reconstructs while a GPU computes (default: in turn, best on a CPU).
    progress: called with the tiles done and their number. options: those of `reconstruct`.
    From given maps every tile size makes the same nuclei, while no cluster outgrows the halo.
    Raises: ValueError for a grid or a shape that does not fit.
    """
    inst_map, found, count = np.zeros(image.shape[:2], np.int32), [], 0
    tiles = predict_tiles(model, image, tile=tile, halo=halo, batch=batch, dtype=dtype, flips=flips,
                          pool=pool, **options)
    for done, ((y, x), nuclei) in enumerate(tiles, 1):
        height, width = nuclei.inst_map.shape
        target = inst_map[y:y + height, x:x + width]
        nuclei = give_way(nuclei, target > 0)
        target += np.where(nuclei.inst_map > 0, nuclei.inst_map + np.int32(count), 0)
        count += len(nuclei.areas)
        found.append(nuclei._replace(peaks=nuclei.peaks + (y, x), boxes=nuclei.boxes + (y, x, y, x),
                                     centroids=nuclei.centroids + (y, x))[1:])
        if progress:
            progress(done, len(tile_cores(*image.shape[:2], tile)))
    columns = [np.concatenate(values) for values in zip(*found)]
    order = np.lexsort(columns[0].T[::-1])  # by the peaks' y, then x
    ids = np.zeros(count + 1, np.int32)
    ids[order + 1] = np.arange(1, count + 1)
    return Nuclei(ids[inst_map], *(values[order] for values in columns))


# ---------------------------------------------------------------- writers


@dataclass
class Result:
    """What the writers know of an image."""

    name: str  # the image's file name
    image: np.ndarray  # (H, W, 3) uint8
    nuclei: Nuclei
    class_names: list  # K str
    colors: list  # K (r, g, b)
    mpp: float | None  # µm per pixel

    @property
    def shape(self):
        return self.nuclei.inst_map.shape

    @cached_property
    def rings(self):
        """Closed outlines of pixel corners, (M, 2) (y, x) a nucleus; two writers share them."""
        return contours(self.nuclei.inst_map)

    def counts(self):
        """Nuclei of every class, zeros included: K int."""
        return np.bincount(self.nuclei.classes, minlength=len(self.class_names) + 1)[1:].tolist()

    def rows(self):
        """Plain (id, x, y, class id, probability or None, area in px, in µm² or None) a nucleus."""
        n = self.nuclei
        y, x = n.centroids.T.round(2).tolist()
        probabilities = [None if math.isnan(p) else p
                         for p in n.probabilities.astype(float).round(4).tolist()]
        um2 = [None] * len(x) if self.mpp is None else (n.areas * self.mpp**2).round(3).tolist()
        ids = range(1, len(x) + 1)
        return zip(ids, x, y, n.classes.tolist(), probabilities, n.areas.tolist(), um2)

    def features(self):
        """The GeoJSON of every nucleus, as QuPath takes it."""
        encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
        classes = [{"name": n, "color": list(c)} for n, c in zip(self.class_names, self.colors)]
        for row, ring, (y, x) in zip(self.rows(), self.rings, self.nuclei.peaks.tolist()):
            _, _, _, kind, probability, area, um2 = row
            measurements = {"class_probability": probability, "area_px": area, "area_um2": um2}
            yield encode({
                "type": "Feature",
                "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{self.name}/{y},{x}")),
                "geometry": {"type": "Polygon", "coordinates": [ring[:, ::-1].tolist()]},
                "properties": {
                    "objectType": "detection",
                    "classification": classes[kind - 1],
                    "measurements": {k: v for k, v in measurements.items() if v is not None},
                },
            })


def legend(result, width):
    """A strip (h, at least width, 3): a square in its colour, name and count for every class."""
    size = min(max(width // 60, 12), 40)
    font = ImageFont.load_default(size)
    labels = [f"{name} {n:,}" for name, n in zip(result.class_names, result.counts())]
    step = int(max(map(font.getlength, labels))) + 3 * size
    columns = max(width // step, 1)
    strip = Image.new("RGB", (max(width, step), -(-len(labels) // columns) * 2 * size), "black")
    draw = ImageDraw.Draw(strip)
    for k, (label, color) in enumerate(zip(labels, result.colors)):
        x, y = k % columns * step + size // 2, k // columns * 2 * size + size // 2
        draw.rectangle((x, y, x + size, y + size), fill=tuple(color))
        draw.text((x + 3 * size // 2, y), label, fill="white", font=font)
    return np.asarray(strip)


def write_png(path, image):
    """An (H, W, 3) uint8 image as PNG (w3.org/TR/png) in less than half of Pillow's time.

    Pillow tries five filters on every row; here all rows are differences (filter 1, "Sub"), which
    makes files a sixth to a quarter larger than Pillow's of the same level.
    """
    height, width = image.shape[:2]
    rows = np.ones((height, 1 + 3 * width), np.uint8)
    rows[:, 1:] = image.reshape(height, -1)
    rows[:, 4:] -= rows[:, 1:-3]
    packer = zlib.compressobj(1, strategy=zlib.Z_RLE)  # photographs hardly repeat
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in ((b"IHDR", header), (b"IDAT", packer.compress(rows) + packer.flush()),
                           (b"IEND", b"")):
            check = zlib.crc32(data, zlib.crc32(kind))
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check))


def write_overlay(path, result):
    """PNG: the image, every outline in its class's colour, and the legend in a strip below."""
    ids = result.nuclei.inst_map
    height, width = ids.shape
    edge = np.zeros(ids.shape, bool)  # pixels of a nucleus with another id, or the frame, beside
    edge[[0, -1]] = edge[:, [0, -1]] = True
    for pixels, edges in ((ids, edge), (ids.T, edge.T)):
        differ = pixels[1:] != pixels[:-1]
        edges[1:] |= differ
        edges[:-1] |= differ
    y, x = np.divmod(np.flatnonzero(edge & (ids > 0)), width)
    strip = legend(result, width)
    canvas = np.zeros((height + len(strip), strip.shape[1], 3), np.uint8)
    canvas[height:] = strip
    canvas[:height, :width] = result.image
    colors = np.array(result.colors, np.uint8)[result.nuclei.classes - 1]  # (N, 3)
    canvas[y, x] = colors[ids[y, x] - 1]
    write_png(path, canvas)


def write_geojson(path, result):
    """QuPath's FeatureCollection, one feature a line."""
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"type":"FeatureCollection","features":[\n')
        file.writelines(",\n" * (k > 0) + feature for k, feature in enumerate(result.features()))
        file.write("\n]}\n")


def write_csv(path, result):
    """One row a nucleus; `id` is its value in the label map."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow("id,x,y,class,class_probability,area_px,area_um2".split(","))
        writer.writerows((i, x, y, result.class_names[kind - 1], *rest)
                         for i, x, y, kind, *rest in result.rows())


def write_instances(path, result):
    """The label map as a TIFF of 32-bit integers."""
    Image.fromarray(result.nuclei.inst_map).save(path, "TIFF", compression="tiff_adobe_deflate")


def write_json(path, result):
    """HoVer-Net's JSON; contours are open as they are there, but run along pixel edges."""
    boxes = result.nuclei.boxes.reshape(-1, 2, 2).tolist()
    nuclei = {str(i): {"bbox": box, "centroid": [x, y], "contour": ring[:-1, ::-1].tolist(),
                       "type_prob": probability, "type": kind}
              for (i, x, y, kind, probability, *_), box, ring
              in zip(result.rows(), boxes, result.rings)}
    mag = None if result.mpp is None else round(10 / result.mpp)  # 0.25 µm per pixel is 40x
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps({"mag": mag, "nuc": nuclei}, separators=(",", ":"), allow_nan=False))


def write_npy(path, result):
    """The label map as numpy's own int32 file."""
    with open(path, "wb") as file:
        np.save(file, result.nuclei.inst_map)


FORMATS = {  # name -> what follows the image's name, writer
    "overlay": ("_overlay.png", write_overlay),
    "geojson": ("_nuclei.geojson", write_geojson),
    "csv": ("_nuclei.csv", write_csv),
    "tif": ("_instances.tif", write_instances),
    "json": ("_nuclei.json", write_json),
    "npy": ("_instances.npy", write_npy),
}


def write_outputs(folder, stem, result, formats, writers=FORMATS):
    """Writes all formats under temporary names and renames them only when all are complete."""
    paths = [Path(folder) / f"{stem}{writers[name][0]}" for name in formats]
    parts = [path.with_name(f".{path.name}.part") for path in paths]

    def write(name, part):
        writers[name][1](part, result)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # more would wait for each other
            list(pool.map(write, formats, parts))  # raises what they raise
        for part, path in zip(parts, paths):
            os.replace(part, path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


# ---------------------------------------------------------------- command line


def find_images(paths, out):
    """Images named or inside a named folder -> what their outputs begin with.

    That is the stem, or the whole name where several share a stem.
    Raises: ValueError for a path without an image, and where two would write the same files.
    """
    images = {}
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder; check the path")
        inside = [path] if path.is_file() else [
            p for p in sorted(path.iterdir())
            if p.suffix.lower() in IMAGE_SUFFIXES + SLIDE_SUFFIXES and not p.name.startswith(".")]
        if not inside:
            raise ValueError(f"{path}: no image inside; expected {', '.join(IMAGE_SUFFIXES)}")
        if path.resolve() == Path(out).resolve():
            raise ValueError(f"{path}: is --out too, so outputs would become input; choose another")
        images |= dict.fromkeys(inside)
    times = Counter(path.stem.casefold() for path in images)  # Windows takes A for a
    writers = {}
    for path in images:
        images[path] = path.name if times[path.stem.casefold()] > 1 else path.stem
        if (other := writers.setdefault(images[path].casefold(), path)) != path:
            raise ValueError(f"{path}: would overwrite the outputs of {other}; run them one by one "
                             "with different --out")
    return images


def pick_device(name):
    """The torch device of that name. Raises: ValueError when it cannot be used here."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: not usable ({reason}); try --device auto") from None


def pick_precision(device, name="auto"):
    """The `dtype` of --precision: auto is bf16 where the processor has it (CPU: from torch 2.6)."""
    if name != "auto":
        return torch.bfloat16 if name == "bf16" else None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else None
    able = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return torch.bfloat16 if any(map(able.get, ("avx512_bf16", "amx_bf16", "bf16"))) else None


def keep_memory():
    """Has glibc, where that is the C library, keep what is freed: a quarter off the time on a CPU.

    It gives large blocks back, and the kernel then has to clear every page of the next ones.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block has pages of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: none, the heap never shrinks
        libc.mallopt(-8, 1)  # M_ARENA_MAX: one heap for all threads


class Journal:
    """What a folder of outputs holds: run.jsonl has the settings, then a line for each image done.

    A run that was killed goes on where it was, and only with the settings it began with.
    Raises: ValueError for outputs of other settings, unless they may be overwritten.
    """

    def __init__(self, folder, settings, overwrite):
        self.path, self.overwrite, self.done = Path(folder) / "run.jsonl", overwrite, {}
        self.settings = json.dumps(settings)
        if not overwrite and self.path.exists() and self.path.stat().st_size:
            try:
                text = self.path.read_bytes()
                whole = text[:text.rfind(b"\n") + 1]  # no line cut short by a full disk or a kill
                first, *lines = map(json.loads, whole.splitlines())
                if whole != text:
                    self.path.write_bytes(whole)
                self.done = dict(lines)
                differing = [k for k, v in settings.items() if first.get(k) != v]
            except (ValueError, TypeError, AttributeError):
                raise ValueError(f"{self.path}: damaged; choose another --out, "
                                 "or --overwrite") from None
            if differing:
                raise ValueError(f"{folder}: holds outputs of another {', '.join(differing)}; "
                                 "choose another --out, or replace them with --overwrite")
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(self.settings + "\n", encoding="utf-8")

    def covers(self, path, stem, formats):
        """Whether the image was done before. Raises: ValueError where its outputs are another's."""
        outputs = [self.path.with_name(stem + FORMATS[name][0]) for name in formats]
        source = [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
        if not self.overwrite and stem in self.done and self.done[stem] != source:
            raise ValueError(f"{path}: {outputs[0]} is of {self.done[stem][0]}, or of an earlier "
                             "state of this file; choose another --out, "
                             "or replace it with --overwrite")
        if self.done.get(stem) == source and all(output.exists() for output in outputs):
            return True
        self.pending = json.dumps([stem, source]) + "\n"
        return False

    def add(self):
        """Notes that the image last asked for is done."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(self.pending)


def explain(error, path):
    """One sentence about a failure at `path`."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return f"{path}: out of memory; use a smaller --tile or --batch"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or path}: {error.strerror}; check path, permissions and free space"
    return str(error) if str(error).startswith(str(path)) else f"{path}: {error}"


def show_progress(text):
    """Rewrites one line on a terminal; says nothing in a log."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def is_slide(path):
    """Whether slides.py takes the file: of its formats, or an image too large for its outputs."""
    if path.suffix.lower() in SLIDE_SUFFIXES:
        return True
    with naming(path, "image", "expected PNG, JPEG or TIFF"), open_image(path, math.inf) as file:
        return file.width * file.height > LARGE


def gather(value):
    """The list of what every process of a torchrun passes here; all wait for the last."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description="Finds, outlines and classifies the nuclei in H&E images.")
    option = parser.add_argument
    option("images", nargs="*", help="image files, or folders of them")
    option("--checkpoint", default=CHECKPOINT,
           help="ours or the authors' (default: weights/consep.pt)")
    option("--classes", help="names of the classes, with commas, where the checkpoint has none")
    option("--export", metavar="FILE",
           help="write the checkpoint in our format, half precision, and stop")
    option("--out", default="predictions", type=Path, help="where to write (default: predictions)")
    option("--overwrite", action="store_true", help="replace outputs of other settings or images")
    option("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the fastest here)")
    option("--precision", default="auto", choices=("auto", "bf16", "fp32"),
           help="of the network's body (default: bf16 where the processor computes in it)")
    option("--tile", type=int, default=TILE, help="side of a tile's core, a multiple of 32: larger "
           f"wastes less on the halo, smaller needs less memory (default: {TILE})")
    option("--halo", type=int, default=HALO, help="margin read around a core, a multiple of 32: at "
           f"{HALO} the grid changes 0.1 %% of the nuclei, at 64 about 1 %% (default: {HALO})")
    option("--batch", type=int, default=1, help="tiles at once; memory grows with it (default: 1)")
    option("--flips", action="store_true",
           help="mean over four mirrorings: better, four times the time")
    option("--workers", type=int, help="processes that reconstruct beside the network (default: "
           "one a core up to 8 for a GPU, else none: the network has all cores)")
    option("--compile", action="store_true",
           help="torch.compile; a minute first, needs a C++ compiler")
    option("--formats", nargs="+", choices=FORMATS, default=["overlay", "geojson", "csv", "tif"],
           help="files to write (default: all but npy, the label map too, and json, HoVer-Net's); "
           "slides and images above 100 megapixels have neither tif nor json")
    option("--mpp", type=float, help="µm per pixel of the image, which is resampled to the "
           "checkpoint's (default: a slide's own, else the checkpoint's)")
    option("--max-pixels", type=int, default=MAX_PIXELS, help="refuse larger images undecoded, "
           f"since an image is held in memory whole (default: {MAX_PIXELS})")
    return parser.parse_args(argv)


def prepare(args):
    """The model on its device, the dtype to use. Raises: ValueError, OSError for a wrong call."""
    check_tiling(args.tile, args.halo, args.batch)
    if args.mpp is not None and not 0 < args.mpp < math.inf:
        raise ValueError(f"--mpp is {args.mpp}; expected µm per pixel, about 0.25 at 40x")
    device = pick_device(args.device)
    model = load_model(args.checkpoint, device)
    if args.classes:
        names = args.classes.split(",")
        if len(names) != model.config["num_classes"]:
            raise ValueError(f"--classes has {len(names)} names; {args.checkpoint} has "
                             f"{model.config['num_classes']} classes")
        model.config |= {"class_names": names, "colors": class_colors(names)}
    if args.mpp is not None and args.export:
        model.config["mpp"] = args.mpp
    return model, pick_precision(device, args.precision)


def find_nuclei(path, model, args, mpp, **options):
    """What the writers want of an image that fits into memory."""
    image = read_image(path, args.max_pixels)
    if args.mpp is None:
        nuclei = predict(model, image, **options)
    else:
        from slides import predict_resampled
        nuclei = predict_resampled(path, model, image, args.mpp, **options)
    name = path.name.encode(errors="replace").decode()  # a name need not be valid text
    return Result(name, image, nuclei, model.config["class_names"], model.config["colors"], mpp)


def run(args, rank, ranks):
    """Does all that is asked for, or this process's share; returns the exit code."""
    try:
        model, dtype = prepare(args)
        config = model.config
        if args.export:
            save_checkpoint(args.export, model, half=True)
            print(f"wrote {args.export}: {config['encoder']}, {', '.join(config['class_names'])}")
            return 0
        if not args.images:
            raise ValueError("no image named; expected python infer.py image.png")
        images, mpp = find_images(args.images, args.out), args.mpp or config["mpp"]
        if rank:
            gather(None)  # the first process opens the journal for all
        journal = Journal(args.out, {
            "checkpoint": zlib.crc32(Path(args.checkpoint).read_bytes()),
            "classes": config["class_names"], "mpp": mpp, "tile": args.tile, "halo": args.halo,
            "precision": str(dtype), "flips": args.flips, "formats": args.formats,
        }, args.overwrite and not rank)
        if not rank:
            gather(None)
    except (ValueError, OSError) as error:
        print(f"error: {explain(error, '')}", file=sys.stderr)
        return 2

    model = model.fuse(dtype)
    device = next(model.parameters()).device
    model = torch.compile(model) if args.compile else model
    workers = args.workers
    if workers is None:
        workers = min(os.cpu_count(), 8) * (device.type == "cuda")
    spawn = get_context("spawn")  # as on Windows
    pool = ProcessPoolExecutor(workers, spawn, initializer=keep_memory) if workers else None
    if config["combine"] == "sum" and not rank:
        print("density trained as a normalised sum: peaks are found by prominence, h = 0.15")
    counts, pixels, failed, before = np.zeros(config["num_classes"], int), 0, 0, 0
    start = time.perf_counter()
    for number, (path, stem) in enumerate(images.items()):
        options = {"tile": args.tile, "halo": args.halo, "batch": args.batch, "flips": args.flips,
                   "pool": pool, "progress": lambda done, tiles: show_progress(
                       f"{path} ({number + 1} of {len(images)}): {done} of {tiles} tiles")}
        mine = number % ranks == rank  # answers for this image; of a slide all take their tiles
        try:
            slide = is_slide(path)
            if not mine and not slide:
                continue
            if slide:
                import slides  # needed by few, and asks for OpenSlide
            formats = slides.choose(path, args.formats) if slide else args.formats
            if journal.covers(path, stem, formats):
                before += mine
                continue
            if slide:
                result = slides.process(path, stem, model, args, journal, (rank, ranks, mine),
                                        formats, **options)
            else:
                result = find_nuclei(path, model, args, mpp, **options)
                write_outputs(args.out, stem, result, formats)
            if mine:
                journal.add()
                counts += result.counts()
                pixels += math.prod(result.shape)
        except (ValueError, OSError, MemoryError, torch.cuda.OutOfMemoryError) as error:
            show_progress("")
            if mine:
                print(f"error: {explain(error, path)}", file=sys.stderr)
            failed += mine
    show_progress("")
    if pool:
        pool.shutdown()
    counts, pixels, failed, before = map(sum, zip(*gather((counts, pixels, failed, before))))
    if not rank:
        classes = ", ".join(f"{name} {n:,}" for name, n in zip(config["class_names"], counts))
        print(f"{counts.sum():,} nuclei ({classes}) in {len(images) - failed - before} of "
              f"{len(images)} images, {failed} failed, {before} done before; "
              f"{pixels / 1e6:.2f} megapixels in {time.perf_counter() - start:.1f} s; "
              f"written to {args.out}; licence of the weights: {config['licence'] or 'not stated'}")
    return 1 if failed else 0


def main(argv=None):
    """Runs the command; returns 0, 1 when an image failed, or 2 when the call makes no sense."""
    args = parse_arguments(argv)
    keep_memory()
    rank, ranks = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    if ranks == 1:
        return run(args, rank, ranks)
    dist.init_process_group("gloo", timeout=timedelta(days=30))  # the first to finish waits
    try:
        return run(args, rank, ranks)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
