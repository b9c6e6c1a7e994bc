"""Slides, and images too large for one label map: tile by tile, from file to files.

    python infer.py slide.svs                          # pip install openslide-python openslide-bin
    torchrun --nproc-per-node 4 infer.py slide.svs     # four processes share the tiles

The nuclei of a tile wait in a file of their own until all tiles are done: memory does not grow with
the slide, a killed run resumes, and processes need not talk. infer.py imports this on demand.
"""

import glob
import hashlib
import math
import os
import shutil
import sys
import zipfile
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.spatial import cKDTree

from data import MAX_PIXELS, naming, read_image
from infer import (FORMATS, SLIDE_SUFFIXES, Result, core_size, explain, gather, legend,
                   measure_anew, predict, predict_tiles, tile_cores, write_csv,
                   write_geojson, write_outputs)
from postprocess import Nuclei, contours, select

THUMBNAIL = 4096  # ours: longest side in pixels of the overlay, on which tissue is looked for too
GLASS = 230  # ours: a thumbnail's pixel with a darker channel is tissue; glass is at 235 to 255
SAME = 4  # ours: px; peaks of two tiles so close are one nucleus, which both took for theirs


# ---------------------------------------------------------------- resolution


def pick_scale(path, mpp, wanted):
    """Pixels of the input to a pixel of what the network sees; warns where they are far apart."""
    if not mpp or not wanted or abs(wanted / mpp - 1) < 0.05:  # ours: as nuclei's sizes vary anyway
        return 1.0
    if not 0.8 <= wanted / mpp <= 1.25:
        print(f"warning: {path}: {mpp:.3g} µm per pixel, resampled to the checkpoint's "
              f"{wanted:.3g}: expect less than at that resolution", file=sys.stderr)
    return wanted / mpp


def rescale(origin, nuclei, scale, shape):
    """(origin, nuclei) in pixels of an image of `shape` (H, W), from ones `scale` times as wide."""
    bounds = [np.clip(np.ceil(np.add(start, (0, side)) * scale - 0.5), 0, whole).astype(int)
              for start, side, whole in zip(origin, nuclei.inst_map.shape, shape)]
    rows, columns = (np.minimum((np.arange(*ends) + 0.5) / scale - start, side - 1).astype(int)
                     for ends, start, side in zip(bounds, origin, nuclei.inst_map.shape))
    first = bounds[0][0], bounds[1][0]
    peaks = ((nuclei.peaks + origin + 0.5) * scale).astype(int)
    peaks = np.minimum(peaks, np.subtract(shape[:2], 1)) - first
    measured = measure_anew(nuclei, nuclei.inst_map[rows[:, None], columns], peaks)
    return first, select(measured, measured.areas > 0)


def predict_resampled(path, model, image, mpp, **options):
    """`predict` at the checkpoint's resolution, of an image (H, W, 3) of `mpp` µm per pixel."""
    scale = pick_scale(path, mpp, model.config["mpp"])
    if scale == 1:
        return predict(model, image, **options)
    height, width = (max(round(side / scale), 1) for side in image.shape[:2])
    resized = np.asarray(Image.fromarray(image).resize((width, height)))
    return rescale((0, 0), predict(model, resized, **options), scale, image.shape[:2])[1]


# ---------------------------------------------------------------- reading


def read_region(slide, path, level, y0, x0, y1, x1):
    """(h, w, 3) uint8 of an OpenSlide's level, in its pixels; what was not scanned is white."""
    down = slide.level_downsamples[level]
    with naming(path, "slide", f"level {level} fails at y {y0}, x {x0}: copy it again"):
        region = slide.read_region((round(x0 * down), round(y0 * down)), level, (x1 - x0, y1 - y0))
    return np.asarray(Image.alpha_composite(
        Image.new("RGBA", region.size, "white"), region))[..., :3]


def read_npy(path, y0, x0, y1, x1):
    """(h, w, 3) of an array on disk; mapped anew each time, or what was read would stay in RAM."""
    return np.load(path, mmap_mode="r", allow_pickle=False)[y0:y1, x0:x1].copy()


def open_levels(path, max_pixels):
    """([(downsampling, (H, W), read)], µm/px or None), finest first; read(y0, x0, y1, x1) -> RGB.

    Raises: ValueError for a file that is no slide, and where OpenSlide is missing.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        with naming(path, "array", "expected uint8 (height, width, 3)"):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or not array.size:
                raise ValueError(f"{array.dtype} {array.shape}")
        return [(1.0, array.shape[:2], partial(read_npy, path))], None
    try:
        import openslide
    except (ImportError, OSError):  # its library, too, may be missing
        openslide = None
    if openslide and openslide.OpenSlide.detect_format(path):
        with naming(path, "slide", "copy it again"):
            slide = openslide.OpenSlide(path)
        sides = [float(slide.properties.get(f"openslide.mpp-{axis}", "nan")) for axis in "xy"]
        levels = [(slide.level_downsamples[level], size[::-1],
                   partial(read_region, slide, path, level))
                  for level, size in enumerate(slide.level_dimensions)]
        return levels, None if math.isnan(sum(sides)) else sum(sides) / 2
    if suffix in SLIDE_SUFFIXES:
        reason = "not a slide that OpenSlide knows; copy it again" if openslide else (
            "slides need OpenSlide; pip install openslide-python openslide-bin")
        raise ValueError(f"{path}: {reason}")
    image = read_image(path, max_pixels)
    return [(1.0, image.shape[:2], lambda y0, x0, y1, x1: image[y0:y1, x0:x1])], None


class Slide:
    """A picture in a checkpoint's resolution: `.shape` and `[y0:y1, x0:x1]`, for `predict_tiles`.

    full: (H, W) of the picture; mpp: its µm per pixel or None; scale: its pixels to one pixel here.
    """

    def __init__(self, path, *, mpp=None, wanted=None, max_pixels=MAX_PIXELS):
        self.levels, own = open_levels(path, max_pixels)
        self.full, self.mpp = self.levels[0][1], mpp or own
        if wanted and not self.mpp and len(self.levels) > 1:
            raise ValueError(f"{path}: a slide without resolution; "
                             "give --mpp, 0.25 at 40x, 0.5 at 20x")
        self.scale = pick_scale(path, self.mpp, wanted)
        self.shape = *(max(round(side / self.scale), 1) for side in self.full), 3

    def __getitem__(self, window):
        (y0, y1), (x0, x1) = ((s.start, s.stop) for s in window)
        down, (height, width), read = [level for level in self.levels
                                       if level[0] < max(self.scale, 1) + 0.01][-1]
        zoom = self.scale / down  # the level's pixels to one here
        if zoom == 1:
            return read(y0, x0, y1, x1)
        margin = 2 + math.ceil(2 * zoom)  # the filter's reach: pixels do not depend on the window
        top, left = (max(int(start * zoom) - margin, 0) for start in (y0, x0))
        bottom, right = (min(int(stop * zoom) + margin, side)
                         for stop, side in ((y1, height), (x1, width)))
        box = (x0 * zoom - left, y0 * zoom - top,
               min(x1 * zoom, right) - left, min(y1 * zoom, bottom) - top)
        pixels = Image.fromarray(read(top, left, bottom, right))
        return np.asarray(pixels.resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC, box))

    @cached_property
    def thumbnail(self):
        """((h, w, 3) uint8 of at most THUMBNAIL px a side, the picture's pixels to one of its)."""
        large = [level for level in self.levels if max(level[1]) >= THUMBNAIL]
        down, (height, width), read = large[-1] if large else self.levels[0]
        times = -(-max(height, width) // THUMBNAIL)
        rows = times * max(2**24 // width // times, 1)  # in strips, for there may be a single level
        strips = [Image.fromarray(read(y, 0, min(y + rows, height), width)).reduce(times)
                  for y in range(0, height, rows)]
        return np.concatenate([np.asarray(strip) for strip in strips]), down * times

    def has_tissue(self, core):
        """Whether a tile's core shows anything but glass."""
        pixels, times = self.thumbnail
        y0, x0, y1, x1 = (side * self.scale / times for side in core)
        return (pixels[int(y0):math.ceil(y1), int(x0):math.ceil(x1)] < GLASS).any()


# ---------------------------------------------------------------- tiles on disk


def save_tile(path, core, origin, nuclei, slide):
    """Keeps a tile's nuclei, in the picture's pixels, with their outlines; whole or not at all."""
    if slide.scale != 1:
        origin, nuclei = rescale(origin, nuclei, slide.scale, slide.full)
    y, x = nuclei.peaks.T + np.reshape(origin, (2, 1))
    y0, x0, y1, x1 = np.multiply(core, slide.scale)
    inner = np.min((y - y0, x - x0, y1 - y, x1 - x), axis=0) > SAME * slide.scale
    rings = contours(nuclei.inst_map)
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        np.savez_compressed(file, origin=origin, inner=inner, lengths=[len(ring) for ring in rings],
                            rings=np.concatenate([np.zeros((0, 2), int), *rings]),
                            **nuclei._asdict())
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class Tiles:
    """What the writers know of a slide: `Result`, one tile after the other."""

    def __init__(self, name, slide, files, config):
        self.name, self.slide, self.shape, self.files = name, slide, slide.full, files
        self.class_names, self.colors = config["class_names"], config["colors"]
        self.mpp = slide.mpp or config["mpp"]
        self.again = self.find_again()
        self.total = sum((np.array(result.counts()) for _, result in self.parts()),
                         np.zeros(len(self.colors), int))

    def load(self, path):
        """((y, x) where it begins, nuclei, outlines, which lie far from the core's border)."""
        try:  # not `naming`: the warnings that it silences are those of all threads
            with np.load(path, allow_pickle=False) as arrays:
                nuclei = Nuclei(*(arrays[name] for name in Nuclei._fields))
                rings = np.split(arrays["rings"],
                                 np.cumsum(arrays["lengths"])[:-1])[:len(nuclei.areas)]
                return arrays["origin"], nuclei, rings, arrays["inner"]
        except (ValueError, OSError, KeyError, zipfile.BadZipFile):
            raise ValueError(f"{path}: damaged; delete it and run again") from None

    def find_again(self):
        """{number of a file: rows} of nuclei that an earlier tile has as well."""
        peaks, owners = [np.zeros((0, 2))], [np.zeros((0, 2), int)]
        for number, path in enumerate(self.files):
            origin, nuclei, _, inner = self.load(path)
            rows = np.flatnonzero(~inner)
            peaks.append(nuclei.peaks[rows] + origin)
            owners.append(np.stack((rows * 0 + number, rows), axis=1))
        peaks, owners = np.concatenate(peaks), np.concatenate(owners)
        pairs = cKDTree(peaks).query_pairs(SAME * self.slide.scale, output_type="ndarray")
        tiles = owners[pairs, 0]  # (P, 2)
        again = owners[pairs[tiles[:, 0] != tiles[:, 1]].max(axis=1, initial=0)]
        return {number: again[again[:, 0] == number, 1]
                for number in np.unique(again[:, 0]).tolist()}

    def parts(self):
        """Yields (origin, Result) of every tile, coordinates in the picture's pixels."""
        for number, path in enumerate(self.files):
            origin, nuclei, rings, _ = self.load(path)
            keep = np.ones(len(nuclei.areas), bool)
            keep[self.again.get(number, [])] = False
            nuclei = nuclei._replace(
                peaks=nuclei.peaks + origin, centroids=nuclei.centroids + origin,
                boxes=nuclei.boxes + np.tile(origin, 2))
            result = Result(self.name, None, select(nuclei, keep), self.class_names, self.colors,
                            self.mpp)
            result.rings = [ring + origin for ring, kept in zip(rings, keep) if kept]
            yield origin, result

    def counts(self):
        return self.total.tolist()

    def rows(self):
        rows = (row for _, result in self.parts() for row in result.rows())
        return ((i, *rest) for i, (_, *rest) in enumerate(rows, 1))

    def features(self):
        return (feature for _, result in self.parts() for feature in result.features())


def write_thumbnail(path, tiles):
    """PNG: the slide, THUMBNAIL pixels a side at most, outlines in their classes' colours."""
    pixels, times = tiles.slide.thumbnail
    strip = Image.fromarray(legend(tiles, pixels.shape[1]))
    canvas = Image.new("RGB", (strip.width, len(pixels) + strip.height))
    canvas.paste(Image.fromarray(pixels))
    canvas.paste(strip, (0, len(pixels)))
    draw = ImageDraw.Draw(canvas)
    for _, result in tiles.parts():
        for ring, kind in zip(result.rings, result.nuclei.classes):
            draw.line((ring[:, ::-1] / times).ravel().tolist(), tuple(tiles.colors[kind - 1]))
    canvas.save(path, "PNG", compress_level=1)


def write_label_map(path, tiles):
    """The label map in the slide's pixels, straight to disk; where two overlap, the first stays."""
    np.lib.format.open_memmap(path, "w+", np.int32, tiles.shape)
    count = 0
    for (y, x), result in tiles.parts():
        ids = result.nuclei.inst_map
        target = np.lib.format.open_memmap(path, "r+")[y:y + ids.shape[0], x:x + ids.shape[1]]
        free = (target == 0) & (ids > 0)
        target[free] = ids[free] + count
        count += len(result.nuclei.areas)


WRITERS = {
    "overlay": (FORMATS["overlay"][0], write_thumbnail),
    "geojson": (FORMATS["geojson"][0], write_geojson),
    "csv": (FORMATS["csv"][0], write_csv),
    "npy": (FORMATS["npy"][0], write_label_map),
}


# ---------------------------------------------------------------- the whole


def choose(path, formats):
    """Those of the formats that a slide is written in. Raises: ValueError where there are none."""
    chosen = [name for name in formats if name in WRITERS]
    if not chosen:
        raise ValueError(f"{path}: {' and '.join(formats)} would not fit into memory; "
                         f"add one of {', '.join(WRITERS)}")
    return chosen


def process(path, stem, model, args, journal, share, formats, *, progress, **options):
    """Finds and writes a slide's nuclei; returns `Tiles` to the process that wrote, None to others.

    share: (rank, ranks, whether this one writes). Raises: ValueError, OSError, in all processes.
    """
    rank, ranks, writes = share
    config, error = model.config, None
    key = hashlib.sha256((journal.settings + journal.pending).encode()).hexdigest()[:12]
    folder = Path(args.out) / f".{stem}.{key}"  # of this file under these settings, and no other
    try:
        slide = Slide(path, mpp=args.mpp, wanted=config["mpp"], max_pixels=args.max_pixels)
        folder.mkdir(exist_ok=True)
        cores = sorted(filter(slide.has_tissue, tile_cores(*slide.shape[:2], args.tile)),
                       key=core_size)
        files = {core: folder / f"{core[0]}_{core[1]}.npz" for core in cores}
        own = [core for core in cores[rank::ranks] if not files[core].exists()]
        tiles = predict_tiles(model, slide, cores=own, **options)
        for done, (core, (origin, nuclei)) in enumerate(zip(own, tiles), 1):
            save_tile(files[core], core, origin, nuclei, slide)
            progress(len(cores[rank::ranks]) - len(own) + done, len(cores[rank::ranks]))
    except (ValueError, OSError, MemoryError, torch.cuda.OutOfMemoryError) as failure:
        error = explain(failure, path)
    if errors := [error for error in gather(error) if error]:  # all arrive, or some wait for ever
        kept = "; what is done is kept, the same call goes on" if any(folder.glob("*.npz")) else ""
        raise ValueError(errors[0] + kept)
    if not writes:
        return None
    name = path.name.encode(errors="replace").decode()
    result = Tiles(name, slide, [files[core] for core in sorted(cores)], config)
    write_outputs(args.out, stem, result, formats, WRITERS)
    for leftover in Path(args.out).glob(f".{glob.escape(stem)}.{'?' * 12}"):
        shutil.rmtree(leftover, ignore_errors=True)
    return result
