"""Writes and draws the nuclei of an image: overlay, tables, label maps, panels, curves.

    result = Result("image.png", image, nuclei, class_names, colors, mpp=0.25)
    write_outputs("predictions", "image", result, ["overlay", "geojson", "csv", "tif"])

Arrays are (y, x); files hold (x, y), because their formats do. Needs postprocess.py beside it.
"""

import csv
import json
import math
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont
from scipy import ndimage

from postprocess import Nuclei

GREY = (100, 100, 100)  # ours: nuclei of unknown class
SCREEN = 2000  # ours: px; larger images are viewed scaled down, so their lines are thicker
LOSSES = ("loss", "val_loss", "val_ce", "val_dice")  # the curves; val_mse would be too low to see
SCORES = ("pq", "class_f1")  # the curves of every validation set


# ---------------------------------------------------------------- drawing


def neighbours(values):
    """The values above, below, left and right of every pixel, 0 outside: four (H, W) arrays."""
    framed = np.pad(values, 1)
    return framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:]


def grown(mask):
    """The mask (H, W) and its 4-neighbours."""
    for beside in neighbours(mask):
        mask = mask | beside
    return mask


def outlined(image, inst_map, classes, colors, scale=1, width=1):
    """The image, `scale` times as large, with every nucleus outlined in its class's colour.

    classes: (N,) of the ids 1..N; inst_map may lack some of them; 255 (unknown) is grey.
    Lines lie inside the nuclei, `width` pixels thick. A light border, the casing, surrounds them,
    because blue and red are hard to see on purple. Returns (scale * H, scale * W, 3) uint8.
    """
    if scale > 1:
        height, columns = inst_map.shape
        image = Image.fromarray(image).resize((scale * columns, scale * height))
        inst_map = inst_map.repeat(scale, axis=0).repeat(scale, axis=1)

    # The line grows from the outermost pixels of a nucleus, and the casing grows from the line.
    inside = inst_map > 0
    line = np.zeros(inst_map.shape, bool)
    for beside in neighbours(inst_map):
        line |= inst_map != beside
    line &= inside
    for _ in range(width - 1):
        line = grown(line) & inside
    casing = line
    for _ in range((width + 1) // 2):
        casing = grown(casing)
    casing &= ~inside

    # Paint.
    palette = np.full((256, 3), GREY, np.uint8)
    palette[1:len(colors) + 1] = colors
    canvas = np.array(image)
    canvas[casing] = 0.4 * canvas[casing] + 153  # 60 % white
    canvas[line] = palette[classes[inst_map[line] - 1]]
    return canvas


def legend(labels, colors, size):
    """A white Pillow image with a line for each label: a square in its colour, and the text."""
    font = ImageFont.load_default(size)
    widest = max([font.getlength(label) for label in labels], default=0)
    step = 3 * size // 2
    box = Image.new("RGB", (round(widest) + 3 * size, len(labels) * step + size // 2), "white")
    draw = ImageDraw.Draw(box)
    x = y = size // 2
    for label, color in zip(labels, colors):
        draw.rectangle((x, y, x + size, y + size), fill=tuple(color))
        draw.text((x + step, y + x), label, "black", font, anchor="lm")
        y += step
    return box


def add_legend(canvas, result):
    """Draws a see-through legend into a corner of (H, W, 3) uint8; a tiny image gets none.

    It lists the classes that occur, because --keep may leave others out.
    """
    labels, colors = [], []
    for name, count, color in zip(result.class_names, result.counts(), result.colors):
        if count:
            labels.append(f"{name} {count:,}")
            colors.append(color)
    if not labels:
        return
    size = max(10, max(canvas.shape) // 85)
    box = np.asarray(legend(labels, colors, size))
    height, width, _ = box.shape
    corner = canvas[:height, :width]
    if corner.shape == box.shape and 4 * box.size <= canvas.size:
        corner[:] = 0.75 * box + 0.25 * corner


def titled_panel(rows, titles, class_names, colors, unknown=False):
    """A Pillow image of pictures in rows, each under its title, beside a legend of the classes.

    rows: lists of (H, W, 3) uint8; titles: lists of str, one for each picture.
    unknown: whether the legend explains grey, the colour of class 255.
    """
    # A cell of the grid has room for the largest picture, its title and a gap.
    shapes = [picture.shape for row in rows for picture in row]
    height, width, _ = np.max(shapes, axis=0).tolist()
    size = min(max(width // 24, 12), 24)
    cell_height, cell_width = height + 2 * size, width + size

    # The legend stands at the right.
    labels, inks = list(class_names), list(colors)
    if unknown:
        labels, inks = [*labels, "unknown"], [*inks[:len(labels)], GREY]
    box = legend(labels, inks, size)
    left = len(rows[0]) * cell_width
    bottom = max(len(rows) * cell_height, box.height) + size
    page = Image.new("RGB", (left + box.width, bottom), "white")
    page.paste(box, (left, size))

    # The cell cuts off a title that is too long.
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            cell = Image.new("RGB", (width, cell_height), "white")
            draw = ImageDraw.Draw(cell)
            draw.text((0, size), titles[r][c], "black", anchor="lm", font_size=size)
            cell.paste(Image.fromarray(picture), (0, 2 * size))
            page.paste(cell, (size + c * cell_width, r * cell_height))
    return page


# ---------------------------------------------------------------- curves


def nice_ticks(high):
    """Ticks from 0 to `high`, in at most seven steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(high / 7))
    step = next(k * power for k in (1, 2, 5, 10) if 7 * k * power >= high)
    return [k * step for k in range(int(high / step) + 1)]


def plot(lines, inks, last, highest):
    """A picture (H, W, 3) of lines, each a list of (epoch, value), with numbers at the axes.

    The axes go from 0 to the epoch `last` and the value `highest`; higher values are cut off.
    """
    width, height, margin = 760, 520, 90
    page = Image.new("RGB", (width + 2 * margin, height + 2 * margin), "white")
    draw = ImageDraw.Draw(page)

    def place(epoch, value):
        y = 1 - min(value / highest, 1)
        return margin + width * epoch / last, margin + height * y

    # Values are numbered at the left, epochs below.
    for tick in nice_ticks(highest):
        x, y = place(0, tick)
        draw.line((x, y, x + width, y), fill="#d8d8d8", width=2)
        draw.text((x - 12, y), f"{tick:g}", "black", anchor="rm", font_size=24)
    for tick in nice_ticks(last):
        if tick == round(tick):
            x, y = place(tick, 0)
            draw.text((x, y + 24), f"{tick:g}", "black", anchor="mm", font_size=24)
    x, y = place(last / 2, 0)
    draw.text((x, y + 60), "epoch", "black", anchor="mm", font_size=24)

    # A dot marks the end of a line; after one epoch there is only the dot.
    for line, ink in zip(lines, inks):
        places = [place(epoch, value) for epoch, value in line]
        draw.line(places, fill=ink, width=4)
        draw.circle(places[-1], 8, fill=ink)
    return np.asarray(page)


def draw_curves(records, path):
    """Draws the losses of a run at the left and its validation scores at the right.

    records: a dict for every epoch, with epoch, LOSSES, and a dict with SCORES for each set.
    """
    # Every line is a list of (epoch, value), without nan.
    lines = {}
    for record in records:
        figures = {name: record[name] for name in LOSSES}
        for part, values in record.items():
            if isinstance(values, dict):
                figures |= {f"{part} {name}": values[name] for name in SCORES}
        for name, value in figures.items():
            if math.isfinite(value):
                lines.setdefault(name, []).append((record["epoch"], value))
    losses = {name: lines.pop(name) for name in LOSSES if name in lines}
    names = [*losses, *lines]

    # Losses go up to three times the median, so that a wild value does not flatten the rest.
    highest = 0
    for line in losses.values():
        _, values = zip(*line)
        highest = max(highest, min(3 * np.median(values), max(values)))

    # Draw at twice the size and reduce it, because Pillow's lines have jagged edges.
    hues = [360 * k // len(names) for k in range(len(names))]
    inks = [ImageColor.getrgb(f"hsl({hue}, 90%, 40%)") for hue in hues]
    last = records[-1]["epoch"]
    left = plot(losses.values(), inks, last, highest or 1)
    right = plot(lines.values(), inks[len(losses):], last, 1)
    titles = ["losses", "scores of whole validation images"]
    page = titled_panel([[left, right]], [titles], names, inks)
    page.reduce(2).save(path, "PNG")


# ---------------------------------------------------------------- outlines


def contours(inst_map):
    """The outer outline of every nucleus along pixel edges: a list of (M, 2) int, one an id.

    Pixel (y, x) covers [y, y+1] x [x, x+1]. A ring lists its corners clockwise on the screen,
    first = last; its shoelace area is pixels plus holes. Pixels that touch at a corner share a
    ring. If an id has separate pieces, only the first one gets a ring.

        # # .      a---b        a (0, 0)  b (0, 2)  c (1, 2)
        # # #      |   c-d      d (1, 3)  e (2, 3)  f (2, 0)  a (0, 0)
                   f-----e
    """
    # Find the edges: the sides of pixels where a nucleus ends. The number of an edge is
    # 4 * pixel + side: a flat index, and 0 top, 1 right, 2 bottom, 3 left. They run clockwise.
    framed = np.pad(inst_map, 1)
    ids, stride = framed.ravel(), framed.shape[1]
    across = np.array((-stride, 1, stride, -1))  # the step over side 0, 1, 2, 3
    pixel = np.flatnonzero(ids)
    found = []
    for side, step in enumerate(across):
        ends = ids[pixel] != ids[pixel + step]
        found.append(4 * pixel[ends] + side)
    edges = np.sort(np.concatenate(found))

    # Choose the edge that follows. Edge --> runs over pixel P of nucleus #; ? may be anything.
    #      . .             . .              ? #
    #      -->             -->--            -->      The last turn closes a hole where
    #      P .             P #              P ?      pixels touch at a corner.
    #      turns right     goes on          turns left
    pixel, side = np.divmod(edges, 4)
    to_the_right, to_the_left = (side + 1) % 4, (side + 3) % 4
    ahead = pixel + across[to_the_right]
    beyond = ahead + across[side]
    chosen = 4 * pixel + to_the_right
    chosen = np.where(ids[ahead] == ids[pixel], 4 * ahead + side, chosen)
    chosen = np.where(ids[beyond] == ids[pixel], 4 * beyond + to_the_left, chosen)
    following = np.searchsorted(edges, chosen)

    # Find where edges begin, in coordinates of inst_map, and whether the outline turns there.
    begin_of_side = np.array(((-1, -1), (-1, 0), (0, 0), (0, -1)))
    begins = np.stack(np.divmod(pixel, stride), axis=1) + begin_of_side[side]
    turns = np.zeros(len(edges), bool)
    turns[following] = side[following] != side

    # The first edge of an id is part of its outer outline and begins at a corner. Walk from there.
    _, first = np.unique(ids[pixel], return_index=True)
    turns, following = turns.tolist(), following.tolist()  # faster than arrays here
    outlines = []
    for start in first.tolist():
        walk, edge = [start], following[start]
        while edge != start:
            if turns[edge]:
                walk.append(edge)
            edge = following[edge]
        outlines.append(begins[[*walk, start]])
    return outlines


# ---------------------------------------------------------------- results and their files


def printable(text):
    """The text on one line; bytes that are no valid text become "?"."""
    return " ".join(text.encode(errors="replace").decode().split())


class Row(NamedTuple):
    id: int  # its value in the label map
    x: float  # mean of pixel indices
    y: float
    kind: int  # class, 1..K
    class_probability: float | None
    area_px: int
    area_um2: float | None


@dataclass
class Result:
    """Everything that the writers need for an image."""

    name: str  # the image's file name
    image: np.ndarray | None  # (H, W, 3) uint8; only the overlay needs it
    nuclei: Nuclei
    class_names: list  # K str
    colors: list  # K (r, g, b)
    mpp: float | None  # µm per pixel of the image

    def __post_init__(self):
        self.name = printable(self.name)

    @property
    def shape(self):
        return self.nuclei.inst_map.shape

    @cached_property
    def rings(self):
        """The outlines of `contours`; two writers share them."""
        return contours(self.nuclei.inst_map)

    def counts(self):
        """Nuclei of every class, zeros included: K int."""
        counts = np.bincount(self.nuclei.classes, minlength=len(self.class_names) + 1)
        return counts[1:].tolist()

    def total_area(self):
        """Pixels of all nuclei."""
        return int(self.nuclei.areas.sum())

    def rows(self):
        """Yields a Row for every nucleus."""
        nuclei = self.nuclei
        centroids = nuclei.centroids.round(2).tolist()
        classes, areas = nuclei.classes.tolist(), nuclei.areas.tolist()
        probabilities = nuclei.probabilities.astype(float).round(4).tolist()
        for i, (y, x) in enumerate(centroids):
            probability = None if math.isnan(probabilities[i]) else probabilities[i]
            area_um2 = None if self.mpp is None else round(areas[i] * self.mpp**2, 3)
            yield Row(i + 1, x, y, classes[i], probability, areas[i], area_um2)

    def polygons(self):
        """Yields the rings of every nucleus: its outline, then its holes."""
        inst_map, boxes = self.nuclei.inst_map, self.nuclei.boxes
        places = ndimage.find_objects(inst_map)
        for i, ring in enumerate(self.rings):
            rings = [ring]
            y, x = ring.T
            enclosed = x[1:] @ (y[1:] - y[:-1])
            if enclosed > self.nuclei.areas[i]:  # rare
                inside = inst_map[places[i]] == i + 1
                holes, _ = ndimage.label(ndimage.binary_fill_holes(inside) & ~inside)
                rings += [boxes[i, :2] + hole for hole in contours(holes)]
            yield rings

    def features(self):
        """Yields the GeoJSON text of every nucleus, as QuPath takes it."""
        encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
        for row, rings, (y, x) in zip(self.rows(), self.polygons(), self.nuclei.peaks):
            identity = f"{self.name}/{y},{x}"  # the same in every run
            measurements = {}
            for key in ("class_probability", "area_px", "area_um2"):
                value = getattr(row, key)
                if value is not None:
                    measurements[key] = value
            yield encode({
                "type": "Feature",
                "id": str(uuid.uuid5(uuid.NAMESPACE_URL, identity)),
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [ring[:, ::-1].tolist() for ring in rings],
                },
                "properties": {
                    "objectType": "detection",
                    "classification": {
                        "name": self.class_names[row.kind - 1],
                        "color": list(self.colors[row.kind - 1]),
                    },
                    "measurements": measurements,
                },
            })


def write_overlay(path, result):
    """PNG of the image's size: outlines in their classes' colours, a legend in the corner."""
    nuclei = result.nuclei
    width = math.ceil(max(result.shape) / SCREEN)
    canvas = outlined(result.image, nuclei.inst_map, nuclei.classes, result.colors, width=width)
    add_legend(canvas, result)
    Image.fromarray(canvas).save(path, "PNG", compress_level=1)


def write_geojson(path, result):
    """QuPath's FeatureCollection, one feature a line."""
    separator = ""
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"type":"FeatureCollection","features":[\n')
        for feature in result.features():
            file.write(separator + feature)
            separator = ",\n"
        file.write("\n]}\n")


def write_csv(path, result):
    """One row a nucleus; `id` is its value in the label map."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write("id,x,y,class,class_probability,area_px,area_um2\n")
        writer = csv.writer(file, lineterminator="\n")
        for row in result.rows():
            writer.writerow(row._replace(kind=result.class_names[row.kind - 1]))


def write_instances(path, result):
    """The label map as a TIFF of 32-bit integers."""
    Image.fromarray(result.nuclei.inst_map).save(path, "TIFF", compression="tiff_adobe_deflate")


def write_json(path, result):
    """HoVer-Net's JSON; contours are open, as in HoVer-Net, but run along pixel edges."""
    nuclei = {}
    for row, box, ring in zip(result.rows(), result.nuclei.boxes, result.rings):
        nuclei[str(row.id)] = {
            "bbox": box.reshape(2, 2).tolist(),
            "centroid": [row.x, row.y],
            "contour": ring[:-1, ::-1].tolist(),
            "type_prob": row.class_probability,
            "type": row.kind,
        }
    magnification = None if result.mpp is None else round(10 / result.mpp)  # 0.25 µm: 40x
    text = json.dumps({"mag": magnification, "nuc": nuclei}, allow_nan=False)
    path.write_text(text, encoding="utf-8")


def write_npy(path, result):
    """The label map as numpy's own int32 file."""
    with open(path, "wb") as file:
        np.save(file, result.nuclei.inst_map)


FORMATS = {  # name -> (what follows the image's name, writer)
    "overlay": ("_overlay.png", write_overlay),
    "geojson": ("_nuclei.geojson", write_geojson),
    "csv": ("_nuclei.csv", write_csv),
    "tif": ("_instances.tif", write_instances),
    "json": ("_nuclei.json", write_json),
    "npy": ("_instances.npy", write_npy),
}


@contextmanager
def complete(path):
    """Gives a temporary path; its file is renamed to `path` if the block ends without an error."""
    key = uuid.uuid5(uuid.NAMESPACE_URL, ascii(path.name))  # some writers refuse odd names
    part = path.with_name(f".{key}.part")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_outputs(folder, stem, result, formats, writers=FORMATS):
    """Writes all formats at once, and renames them only when all are complete."""
    with ExitStack() as stack, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = []
        for name in formats:
            suffix, writer = writers[name]
            part = stack.enter_context(complete(Path(folder) / f"{stem}{suffix}"))
            jobs.append(pool.submit(writer, part, result))
        for job in jobs:
            job.result()  # raises what the writer raised


def summary_row(result, *, seconds, mm2=None):
    """A row of summary.csv, {column: value}; None if the resolution is not known.

    mm2: analysed area, of a large picture the tiles with tissue (default: the whole image).
    """
    megapixels = math.prod(result.shape) / 1e6
    counts, mpp = result.counts(), result.mpp
    nuclei = sum(counts)
    density = mean_area = None
    if mpp is not None:
        if mm2 is None:
            mm2 = megapixels * mpp**2
        density = round(nuclei / mm2, 2) if mm2 else None
        mean_area = round(result.total_area() * mpp**2 / nuclei, 2) if nuclei else None
        mm2 = round(mm2, 6)
    first = {"name": result.name, "megapixels": megapixels, "um_per_pixel": mpp, "mm2": mm2,
             "nuclei": nuclei}
    last = {"nuclei_per_mm2": density, "mean_area_um2": mean_area, "seconds": round(seconds, 2)}
    return first | dict(zip(result.class_names, counts)) | last


def write_summary(path, rows):
    """Writes summary.csv from the rows of one or more images."""
    with complete(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
