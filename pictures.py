"""Arrays, image files and slides as pictures at the resolution of a model.

    picture = open_picture("slide.svs")        # needs: pip install openslide-python openslide-bin
    picture.resample_to(0.25)                  # µm per pixel
    picture.shape, picture[0:512, 0:512]       # any window, (h, w, 3) uint8

Needs images.py and postprocess.py beside it.
"""

import math
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from images import (IMAGE_SUFFIXES, MAX_PIXELS, SAME_MPP, colour_notes, explain_errors, image_size,
                    plausible_mpp, read_image)
from postprocess import measure, select

SLIDE_SUFFIXES = (  # what OpenSlide 4 opens; and .npy, an array on disk
    ".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm", ".czi", ".qptiff",
    ".tif", ".tiff", ".npy")
LARGE = 10**8  # ours: pixels above which nuclei are kept on disk
THUMBNAIL = 4096  # ours: longest side of a large picture's overlay; tissue is searched on it
GLASS = 230  # ours: a pixel with a darker channel is tissue; glass has 235 to 255


# ---------------------------------------------------------------- pictures


def differ(mpp, wanted):
    """Whether a picture at `mpp` must be resampled to `wanted`; either may be None."""
    return bool(mpp and wanted and abs(wanted / mpp - 1) >= SAME_MPP)


class Level(NamedTuple):
    """One resolution of a picture."""

    down: float  # pixels of the picture per pixel of the level
    shape: tuple  # (h, w)
    read: callable  # read(y0, x0, y1, x1) -> (h, w, 3) uint8


class Picture:
    """A picture: `.shape` and `[y0:y1, x0:x1]` are at the resolution set by `resample_to`.

    levels: finest first. mpp: µm per pixel of the finest, None if not stated; source: where it is
    stated. notes: sentences for the user.
    """

    def __init__(self, levels, *, mpp=None, source="", notes=()):
        self.levels, self.mpp, self.source, self.notes = levels, mpp, source, notes
        self.full = levels[0].shape  # (H, W) of the picture itself
        self.resample_to(None)

    def resample_to(self, wanted):
        """Sets the resolution of the windows to `wanted` µm per pixel, None for the picture's."""
        height, width = self.full
        if differ(self.mpp, wanted):
            scale = self.mpp / wanted
            height = max(round(height * scale), 1)
            width = max(round(width * scale), 1)
        self.shape = height, width, 3
        self.ratio = np.divide(self.full, (height, width))  # own pixels per pixel of a window

    @property
    def resampled(self):
        return self.shape[:2] != self.full

    @property
    def large(self):
        """Whether the picture or its resampled form does not fit into memory."""
        own, seen = math.prod(self.full), math.prod(self.shape[:2])
        return max(own, seen) > LARGE

    def load(self):
        """The whole picture (H, W, 3) uint8; it stays in memory from now on."""
        pixels = self.levels[0].read(0, 0, *self.full)
        self.levels = [array_level(pixels)]
        return pixels

    def __getitem__(self, window):
        """(h, w, 3) uint8; the slices need start and stop. Pixel centres map to pixel centres."""
        rows, columns = window
        start = np.array((rows.start, columns.start))
        stop = np.array((rows.stop, columns.stop))
        if not self.resampled:
            return self.levels[0].read(*start, *stop)

        # Take the coarsest level that is fine enough.
        finest = max(*self.ratio, 1) + 0.01
        level = [level for level in self.levels if level.down < finest][-1]
        zoom = self.ratio / level.down  # pixels of the level per pixel of the window

        # Read a margin for the filter, so that pixels do not depend on the window.
        height, width = stop - start
        stop = np.minimum(stop * zoom, level.shape)
        start = np.minimum(start * zoom, stop - 0.5)
        margin = np.ceil(2 * zoom) + 2
        first = np.maximum(start - margin, 0).astype(int)
        last = np.minimum(stop + margin, level.shape).astype(int)
        pixels = Image.fromarray(level.read(*first, *last))

        # Pillow wants (x, y).
        top, left = start - first
        bottom, right = stop - first
        box = left, top, right, bottom
        return np.asarray(pixels.resize((width, height), Image.Resampling.BICUBIC, box))

    def to_own_pixels(self, origin, nuclei):
        """(origin, nuclei) of a window of this picture, in pixels of the picture itself."""
        if not self.resampled:
            return origin, nuclei
        # Own rows and columns, and for each the two nearest of the window: mostly the same one.
        first, nearest = [], []
        for start, side, ratio, full in zip(origin, nuclei.inst_map.shape, self.ratio, self.full):
            low = max(math.ceil(start * ratio - 0.5), 0)
            high = min(math.ceil((start + side) * ratio - 0.5), full)
            places = (np.arange(low, high) + 0.5) / ratio - 0.5 - start
            before = np.ceil(places - 0.5).clip(0, side - 1)
            after = np.floor(places + 0.5).clip(0, side - 1)
            first.append(low)
            nearest += [before.astype(int), after.astype(int)]

        # If two are equally near, rows take the smaller id and columns the larger one, so that the
        # background wins half of the cases. (Always one side would shift nuclei; always the larger
        # id would enlarge them.)
        above, below, left, right = nearest
        inst_map = np.minimum(nuclei.inst_map[above], nuclei.inst_map[below])
        inst_map = np.maximum(inst_map[:, left], inst_map[:, right])
        peaks = (nuclei.peaks + origin + 0.5) * self.ratio
        nuclei = measure_again(nuclei, inst_map, peaks.astype(int) - first)
        return tuple(first), select(nuclei, nuclei.areas > 0)

    @cached_property
    def thumbnail(self):
        """(h, w, 3) uint8, at most THUMBNAIL pixels a side."""
        fine_enough = [level for level in self.levels if max(level.shape) >= THUMBNAIL]
        level = fine_enough[-1] if fine_enough else self.levels[0]
        height, width = level.shape
        times = math.ceil(max(height, width) / THUMBNAIL)
        # Read in strips, because there may be only one huge level.
        rows = times * max(2**24 // width // times, 1)
        strips = []
        for y in range(0, height, rows):
            strip = Image.fromarray(level.read(y, 0, min(y + rows, height), width))
            strips.append(np.asarray(strip.reduce(times)))
        return np.concatenate(strips)

    def has_tissue(self, core):
        """Whether a tile's core (y0, x0, y1, x1) shows anything but glass."""
        zoom = np.divide(self.thumbnail.shape[:2], self.shape[:2])
        y0, x0, y1, x1 = core * np.tile(zoom, 2)
        pixels = self.thumbnail[int(y0):math.ceil(y1), int(x0):math.ceil(x1)]
        return bool((pixels < GLASS).any())

    def pixels_in(self, cores):
        """How many of the picture's own pixels lie in these cores."""
        pixels = 0
        for y0, x0, y1, x1 in cores:
            height = min(y1, self.shape[0]) - y0
            width = min(x1, self.shape[1]) - x0
            pixels += height * width
        return pixels * math.prod(self.ratio)


def measure_again(nuclei, inst_map, peaks):
    """The nuclei on another label map with the same ids; classes and probabilities stay."""
    measured = measure(inst_map, np.minimum(inst_map, 1), peaks=peaks)
    return measured._replace(classes=nuclei.classes, probabilities=nuclei.probabilities)


def moved(nuclei, origin):
    """The nuclei of a window, with the window's origin (y, x) added to their coordinates."""
    return nuclei._replace(
        peaks=nuclei.peaks + origin,
        centroids=nuclei.centroids + origin,
        boxes=nuclei.boxes + np.tile(origin, 2))


def array_level(array):
    """The single level of anything with `.shape` (H, W, 3) that can be sliced."""
    def read(y0, x0, y1, x1):
        return array[y0:y1, x0:x1]

    return Level(1.0, tuple(array.shape[:2]), read)


# ---------------------------------------------------------------- files


def read_npy(path, y0, x0, y1, x1):
    """A window of an array on disk; mapped each time, since pages that are read stay in RAM."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array[y0:y1, x0:x1].copy()


def open_array(path):
    with explain_errors(path, "array", "expected uint8 (height, width, 3)"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or not array.size:
            raise ValueError(f"{array.dtype} {array.shape}")
    return Picture([Level(1.0, array.shape[:2], partial(read_npy, path))])


def read_region(slide, path, number, down, corner, y0, x0, y1, x1):
    """A window (h, w, 3) uint8 of a level, counted from the corner; unscanned parts are white.

    corner: (y, x) in pixels of the finest level, as OpenSlide expects it.
    """
    x, y = corner[1] + round(x0 * down), corner[0] + round(y0 * down)
    size = int(x1 - x0), int(y1 - y0)
    with explain_errors(path, "slide", f"level {number} fails at y {y}, x {x}: copy it again"):
        region = slide.read_region((x, y), number, size)
    white = Image.new("RGBA", size, "white")
    region = Image.alpha_composite(white, region)
    return np.asarray(region)[..., :3]


def scanned_part(properties, height, width):
    """(y, x, height, width) of the stated bounds in the finest level, as in QuPath; else all."""
    try:
        names = ("bounds-y", "bounds-x", "bounds-height", "bounds-width")
        y, x, h, w = (int(properties[f"openslide.{name}"]) for name in names)
    except (KeyError, ValueError):
        return 0, 0, height, width
    inside = y >= 0 and x >= 0 and h > 0 and w > 0 and y + h <= height and x + w <= width
    return (y, x, h, w) if inside else (0, 0, height, width)


def stated_mpp(properties):
    """µm per pixel, None if the slide states none or an implausible one."""
    try:
        mpp = (float(properties["openslide.mpp-x"]) + float(properties["openslide.mpp-y"])) / 2
    except (KeyError, ValueError):
        return None
    return mpp if plausible_mpp(mpp) else None


def open_slide(path, openslide):
    """The scanned part of a slide."""
    with explain_errors(path, "slide", "copy it again"):
        slide = openslide.OpenSlide(path)
    width, height = slide.level_dimensions[0]
    y, x, height, width = scanned_part(slide.properties, height, width)

    # Its levels
    levels = []
    for number, down in enumerate(slide.level_downsamples):
        shape = math.ceil(height / down), math.ceil(width / down)
        levels.append(Level(down, shape, partial(read_region, slide, path, number, down, (y, x))))
    mpp = stated_mpp(slide.properties)
    return Picture(levels, mpp=mpp, source="the slide" if mpp else "")


def openslide_for(path):
    """The module openslide if it shall read the file, else None.

    A small TIFF that no scanner wrote is left to images.py, which handles more channels and bit
    depths. Raises: ValueError for a slide that cannot be read here.
    """
    suffix = path.suffix.lower()
    if suffix not in SLIDE_SUFFIXES:
        return None

    # Does OpenSlide know the file?
    try:
        import openslide
        vendor = openslide.OpenSlide.detect_format(path)
    except (ImportError, OSError):  # OSError: its C library is missing
        openslide = vendor = None
    if vendor == "generic-tiff":
        with suppress(ValueError, OSError):
            if math.prod(image_size(path)) <= LARGE:
                return None
    if vendor:
        return openslide

    # If not, Pillow may read it.
    if suffix in (*IMAGE_SUFFIXES, ".qptiff"):
        return None
    if openslide is None:
        raise ValueError(f"{path}: slides need OpenSlide; "
                         "pip install openslide-python openslide-bin")
    raise ValueError(f"{path}: not a slide that OpenSlide knows; copy it again")


def open_picture(path, max_pixels=MAX_PIXELS):
    """Opens the picture in a file; OpenSlide is asked first, if it is installed.

    max_pixels: larger image files are refused undecoded. Raises: FileNotFoundError, ValueError.
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        return open_array(path)
    openslide = openslide_for(path)
    if openslide:
        picture = open_slide(path, openslide)
        picture.notes = colour_notes(picture.thumbnail)
        return picture
    image = read_image(path, max_pixels)
    return Picture([array_level(image.pixels)], mpp=image.mpp, source=image.mpp_source,
                   notes=image.notes)


def is_large(path):
    """Whether the file holds more than LARGE pixels. It decodes nothing and raises nothing."""
    with suppress(ValueError, OSError):
        if path.suffix.lower() == ".npy":
            return open_array(path).large
        openslide = openslide_for(path)
        if openslide:
            return open_slide(path, openslide).large
        return math.prod(image_size(path)) > LARGE
    return False
