"""Keeps the nuclei of large pictures on disk, tile by tile, and writes the outputs from there.

    save_nuclei("folder/0_0.npz", origin, nuclei)       # any process, any order
    tiles = Tiles("slide.svs", picture, "folder", class_names, colors)
    tiles.add(origin, nuclei)                           # in scan order
    write_outputs("predictions", "slide", tiles, ["csv", "geojson"], WRITERS)

Memory use does not grow with the slide, and an interrupted run resumes.
Needs outputs.py, pictures.py and postprocess.py beside it.
"""

import os
import zipfile
from contextlib import contextmanager, suppress

import numpy as np
from PIL import Image, ImageDraw

from outputs import FORMATS, Result, add_legend, contours, printable, write_csv, write_geojson
from pictures import moved
from postprocess import Nuclei


def save_nuclei(path, origin, nuclei, **more):
    """Writes the nuclei of a tile, counted from `origin`; the file is complete or absent."""
    part = path.with_suffix(f".{os.getpid()}.part")
    with open(part, "wb") as file:
        np.savez_compressed(file, origin=origin, **nuclei._asdict(), **more)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def load_arrays(path):
    """The {name: array} that `save_nuclei` wrote."""
    try:  # not `explain_errors`: the warnings that it silences are those of all threads
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, OSError, zipfile.BadZipFile):
        raise ValueError(f"{path}: damaged; delete it and run again") from None


def load_nuclei(path):
    """The (origin, nuclei) that `save_nuclei` wrote."""
    arrays = load_arrays(path)
    return tuple(arrays["origin"].tolist()), Nuclei(*(arrays[name] for name in Nuclei._fields))


@contextmanager
def writing_alone(folder, files):
    """Gives True if all files exist and no other process is writing the result.

    The lock ends with its process, so a killed process leaves nothing to clean up.
    """
    # If tiles are missing, another process will finish last.
    complete = all(path.exists() for path in files)
    if not complete:
        yield False
        return

    # If two processes finish at once, the lock decides.
    try:
        lock = open(folder / "lock", "w")
    except FileNotFoundError:  # another process has written the result meanwhile
        yield False
        return
    with lock:
        with suppress(ImportError):  # Windows
            import fcntl
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                complete = False
        yield complete and all(path.exists() for path in files)


class Tiles:
    """Everything that the writers need for a large picture: a `Result` for each tile.

    folder: holds the tiles with their outlines, in the order of `add`.
    """

    def __init__(self, name, picture, folder, class_names, colors):
        self.name, self.picture, self.folder = printable(name), picture, folder
        self.class_names, self.colors, self.mpp = class_names, colors, picture.mpp
        self.shape, self.files = picture.full, []
        self.total, self.area = np.zeros(len(class_names), int), 0

    def add(self, origin, nuclei):
        """Takes the nuclei of the next tile; no pixel may belong to two tiles."""
        rings = contours(nuclei.inst_map)
        path = self.folder / f"{len(self.files)}.npz"
        save_nuclei(path, origin, nuclei, lengths=[len(ring) for ring in rings],
                    corners=np.concatenate([np.zeros((0, 2), int), *rings]))
        self.files.append(path)
        self.total += np.bincount(nuclei.classes, minlength=len(self.total) + 1)[1:]
        self.area += int(nuclei.areas.sum())

    def parts(self):
        """Yields (origin, Result) of every tile, coordinates in the picture's pixels."""
        for path in self.files:
            # The nuclei.
            arrays = load_arrays(path)
            origin = arrays["origin"]
            nuclei = Nuclei(*(arrays[name] for name in Nuclei._fields))
            nuclei = moved(nuclei, origin)
            result = Result(self.name, None, nuclei, self.class_names, self.colors, self.mpp)

            # Their outlines.
            ends = np.cumsum(arrays["lengths"])
            result.rings = np.split(arrays["corners"] + origin, ends)[:-1]
            yield origin, result

    def counts(self):
        return self.total.tolist()

    def total_area(self):
        return self.area

    def rows(self):
        number = 0
        for _, result in self.parts():
            for row in result.rows():
                number += 1
                yield row._replace(id=number)

    def features(self):
        for _, result in self.parts():
            yield from result.features()


def write_thumbnail(path, tiles):
    """PNG: the picture at THUMBNAIL pixels a side at most, with outlines in class colours."""
    # The outlines.
    thumbnail = tiles.picture.thumbnail
    zoom = np.divide(thumbnail.shape[:2], tiles.shape)
    canvas = Image.fromarray(thumbnail)
    draw = ImageDraw.Draw(canvas)
    for _, result in tiles.parts():
        for ring, kind in zip(result.rings, result.nuclei.classes):
            line = (ring * zoom)[:, ::-1]
            draw.line(line.ravel().tolist(), tuple(tiles.colors[kind - 1]))

    # The legend.
    canvas = np.array(canvas)
    add_legend(canvas, tiles)
    Image.fromarray(canvas).save(path, "PNG", compress_level=1)


def write_label_map(path, tiles):
    """The label map in the picture's pixels, straight to disk."""
    np.lib.format.open_memmap(path, "w+", np.int32, tiles.shape)
    count = 0
    for (y, x), result in tiles.parts():
        ids = result.nuclei.inst_map
        label_map = np.lib.format.open_memmap(path, "r+")  # each time, or it stays in RAM
        target = label_map[y:y + ids.shape[0], x:x + ids.shape[1]]
        target[ids > 0] = ids[ids > 0] + count
        count += len(result.nuclei.areas)


WRITERS = {  # the FORMATS that do not need the whole picture in memory
    "overlay": (FORMATS["overlay"][0], write_thumbnail),
    "geojson": (FORMATS["geojson"][0], write_geojson),
    "csv": (FORMATS["csv"][0], write_csv),
    "npy": (FORMATS["npy"][0], write_label_map),
}
