"""Nuclei of whole images: tiled prediction from Python, and the command that writes files.

    python infer.py image.png                # predictions/image_overlay.png, _nuclei.geojson, ...

    model = load_model("weights/consep.pt")
    nuclei = predict(model, image)           # (H, W, 3) uint8: array, memmap, anything sliced
    nuclei.inst_map, nuclei.centroids, nuclei.classes

Network and reconstruction run tile by tile. A tile is a core with a margin around it, the halo. A
nucleus belongs to the tile whose core holds its peak; maps of tiles are not blended. The network
needs memory for a batch of tiles only. Under torchrun (RANK and WORLD_SIZE), processes share the
images of a folder and the tiles of a slide. Copy the modules that it imports with it.
"""

import argparse
import math
import os
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from convert import load_any_model
from dualunet import class_colors
from images import MAX_PIXELS, check_mpp, reflect
from outputs import FORMATS, Result, summary_row, write_outputs, write_summary
from pictures import (LARGE, Picture, array_level, differ, is_large, measure_again, moved,
                      open_picture)
from postprocess import Nuclei, reconstruct, select
from runs import (Estimate, Journal, closing_lines, explain, find_images, keep_memory, leave_note,
                  memory_of, names_in, note_of, opening_line, pick_device, pick_precision, say,
                  show_progress, start_pool, wait_for_notes)
from slides import WRITERS, Tiles, load_nuclei, save_nuclei, writing_alone

STRIDE = 32  # the encoders' total stride; tiles start at multiples of it, so all share a grid
HALO = 128  # ours, where a file states none: 99.9 % of nuclei are as without tiles; with 64, 99 %
TILES = (2048, 1024, 512, 256)  # ours: with halo 128 they read 1.27, 1.56, 2.25, 4 times the area
BATCH_PIXELS = 2**21  # ours: in a batch of windows; one small window does not fill a GPU
WINDOW_BYTES = 700  # measured: the most that a pixel of a window takes (ConvNeXt-B in fp32)
CHECKPOINT = Path(__file__).parent / "weights" / "consep.pt"


# ---------------------------------------------------------------- tiles


def check_tiling(tile, halo, batch):
    """Raises ValueError if no grid of tiles has these sizes."""
    if tile <= 0 or halo < 0 or tile % STRIDE or halo % STRIDE:
        raise ValueError(f"tile is {tile} and halo {halo}; expected multiples of {STRIDE}, "
                         f"the tile at least {STRIDE}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1 tile")


def round_up(side):
    """The next multiple of STRIDE."""
    return math.ceil(side / STRIDE) * STRIDE


def pick_tile(device, halo=HALO, batch=None):
    """The first of TILES of which `batch` windows (None: one) take at most half of the memory."""
    allowed = memory_of(device) / 2
    for tile in TILES:
        pixels = (batch or 1) * (tile + 2 * halo) ** 2
        if pixels * WINDOW_BYTES <= allowed:
            return tile
    return TILES[-1]


def tile_cores(height, width, tile):
    """Cores (y0, x0, y1, x1) in scan order: each side in equal parts of at most `tile`.

    Parts and sides are rounded up to STRIDE, so the last part of a side may be smaller.
    """
    bottom, right = round_up(height), round_up(width)
    high = round_up(height / math.ceil(height / tile))
    wide = round_up(width / math.ceil(width / tile))
    cores = []
    for y0 in range(0, height, high):
        y1 = min(y0 + high, bottom)
        for x0 in range(0, width, wide):
            x1 = min(x0 + wide, right)
            cores.append((y0, x0, y1, x1))
    return cores


def sides_of(model, tile=None, halo=None):
    """(tile, halo): as given, else as the model's file says, else None and HALO."""
    if tile is None:
        tile = model.config.get("tile")
    if halo is None:
        halo = model.config.get("halo")
    return tile, HALO if halo is None else halo


def lay_tiles(model, picture, tile, halo, batch):
    """The cores of a picture. Raises: ValueError for a grid that cannot be laid."""
    if tile is None:
        tile = pick_tile(next(model.parameters()).device, halo, batch)
    check_tiling(tile, halo, batch)
    return tile_cores(*picture.shape[:2], tile)


def read_window(image, y0, x0, y1, x1):
    """A window (h, w, 3) uint8, reflected outside the image; only the needed part is read."""
    rows = reflect(y0, y1, image.shape[0])
    columns = reflect(x0, x1, image.shape[1])
    top, bottom = int(rows.min()), int(rows.max()) + 1
    left, right = int(columns.min()), int(columns.max()) + 1
    pixels = np.asarray(image[top:bottom, left:right])
    if pixels.dtype != np.uint8:
        raise ValueError(f"image holds {pixels.dtype}; expected uint8 RGB, 0 to 255")
    return pixels.take(rows - top, axis=0).take(columns - left, axis=1)  # faster than indexing


def predict_maps(model, images, *, dtype=None, flips=False):
    """Class probabilities and density of a batch of images.

    images: (N, H, W, 3) uint8. dtype: None or a half precision. flips: mean over four mirrorings.
    Returns class_probability (N, K+1, H, W) and density (N, H, W), float32.
    """
    device = next(model.parameters()).device
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        images = torch.from_numpy(images).to(device)
        images = images.permute(0, 3, 1, 2).float() / 255  # (N, 3, H, W)

        def view(*axes):
            logits, density = model(images.flip(axes))
            maps = torch.cat([logits.float().softmax(1), density.float()], dim=1)
            return maps.flip(axes)  # (N, K+2, H, W)

        maps = view()
        if flips:
            maps = (maps + view(2) + view(3) + view(2, 3)) / 4
        maps = maps.cpu().numpy()
    return maps[:, :-1], maps[:, -1]


def nuclei_of_core(core, halo, shape, class_probability, density, options):
    """(origin, nuclei) of a tile, from its maps: the nuclei whose peak lies in its core."""
    # Cut off the reflected margin: the network needed it, but its nuclei are mirror images.
    y0, x0, y1, x1 = core
    top, left = y0 - halo, x0 - halo  # of the maps, in the picture
    origin = max(top, 0), max(left, 0)
    rows = slice(origin[0] - top, shape[0] - top)
    columns = slice(origin[1] - left, shape[1] - left)
    class_probability = class_probability[:, rows, columns]
    nuclei = reconstruct(class_probability, density[rows, columns], **options)

    # Keep the nuclei of this core; the others belong to other tiles.
    y, x = (nuclei.peaks + origin).T
    inside = (y0 <= y) & (y < y1) & (x0 <= x) & (x < x1)
    return origin, select(nuclei, inside)


def results_in_order(submit, items, depth):
    """Yields the results of the futures submit(item) in order; `depth` of them run ahead."""
    waiting = deque()
    for item in items:
        waiting.append(submit(item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def batches_of(cores, halo, batch=None):
    """Lists of at most `batch` cores (None: of BATCH_PIXELS), consecutive and of one size."""
    def core_size(core):
        return core[2] - core[0], core[3] - core[1]

    for (height, width), group in groupby(cores, core_size):
        group = list(group)
        pixels = (height + 2 * halo) * (width + 2 * halo)
        count = batch or max(1, BATCH_PIXELS // pixels)
        for first in range(0, len(group), count):
            yield group[first:first + count]


def predict_tiles(model, picture, cores, *, halo=HALO, batch=None, dtype=None, flips=False,
                  pool=None, **options):
    """Yields (origin, nuclei) of every core; the arguments are those of `predict`.

    Label map and coordinates count from the origin (y, x), in the picture's own pixels.
    """
    options = model.config.get("reconstruct", {}) | options

    # Read windows, and let the network make maps of them, a batch at a time.
    def read(chunk):
        windows = []
        for y0, x0, y1, x1 in chunk:
            windows.append(read_window(picture, y0 - halo, x0 - halo, y1 + halo, x1 + halo))
        return chunk, np.stack(windows)

    def jobs():
        with ThreadPoolExecutor(1) as reader:  # reads while the network computes
            ahead = partial(reader.submit, read)
            for chunk, windows in results_in_order(ahead, batches_of(cores, halo, batch), 1):
                both = predict_maps(model, windows, dtype=dtype, flips=flips)
                for core, class_probability, density in zip(chunk, *both):
                    yield core, halo, picture.shape, class_probability, density, options

    # Reconstruct nuclei from the maps, here or in the pool's processes.
    def reconstruct_in_pool(job):
        return pool.submit(nuclei_of_core, *job)

    if pool is None:
        tiles = (nuclei_of_core(*job) for job in jobs())
    else:
        tiles = results_in_order(reconstruct_in_pool, jobs(), 2 * os.cpu_count())
    for origin, nuclei in tiles:
        yield picture.to_own_pixels(origin, nuclei)


# ---------------------------------------------------------------- tiles collected


def give_way(nuclei, taken):
    """The nuclei without the pixels `taken` (h, w) bool, measured again.

    A nucleus keeps its largest remaining piece. If that is half of it or less, it is dropped: then
    both tiles have found the same nucleus, each with a peak in its own core.
    """
    lost = np.unique(nuclei.inst_map[taken])
    lost = lost[lost > 0]
    if not len(lost):
        return nuclei
    inst_map = np.where(taken, 0, nuclei.inst_map)
    for number in lost:
        y0, x0, y1, x1 = nuclei.boxes[number - 1]
        box = inst_map[y0:y1, x0:x1]
        pieces, count = ndimage.label(box == number)
        if count > 1:
            largest = np.bincount(pieces[pieces > 0]).argmax()
            box[(pieces > 0) & (pieces != largest)] = 0
    measured = measure_again(nuclei, inst_map, nuclei.peaks)
    return select(measured, 2 * measured.areas > nuclei.areas)


def window(start, stop):
    """The index of a window of an array; start, stop: (y, x)."""
    return slice(start[0], stop[0]), slice(start[1], stop[1])


def without_overlap(tiles):
    """Yields tiles (origin, nuclei), given in scan order, so that no pixel is in two nuclei.

    The maps of neighbouring tiles differ a little, so nuclei at their border may claim the same
    pixels. The earlier tile keeps them, and the nuclei of the later tile lose them.
    """
    earlier = []  # (start, stop, packed mask) of tiles that later tiles may overlap
    for origin, nuclei in tiles:
        start = np.array(origin)
        stop = start + nuclei.inst_map.shape
        earlier = [tile for tile in earlier if tile[1][0] > start[0]]

        # Mark the pixels that earlier tiles hold.
        taken = np.zeros(nuclei.inst_map.shape, bool)
        for other_start, other_stop, packed in earlier:
            top_left = np.maximum(start, other_start)
            bottom_right = np.minimum(stop, other_stop)
            if (top_left < bottom_right).all():
                width = other_stop[1] - other_start[1]
                mask = np.unpackbits(packed, axis=1, count=width).view(bool)
                mask = mask[window(top_left - other_start, bottom_right - other_start)]
                taken[window(top_left - start, bottom_right - start)] |= mask

        nuclei = give_way(nuclei, taken)
        packed = np.packbits(nuclei.inst_map > 0, axis=1)  # one bit a pixel
        earlier.append((start, stop, packed))
        yield origin, nuclei


def predict(model, image, *, mpp=None, tile=None, halo=None, batch=None, dtype=None, flips=False,
            pool=None, progress=None, **options):
    """All nuclei of an image of any size, ids in the scan order of the peaks.

    image: anything with `.shape` (H, W, 3) and `image[y0:y1, x0:x1]` -> uint8 RGB.
    mpp: its µm per pixel (None: the model's). If it differs from the model's by 5 % or more, the
    network sees a resampled image; the nuclei are still in the image's own pixels.
    tile, halo: largest side of a tile's core and width of the margin around it, multiples of 32
    (None: as the model's file says, else see `pick_tile` and HALO).
    batch: number of tiles that the network takes at once (None: as many as make two megapixels).
    dtype: None, or a half precision for autocast. flips: the mean over four mirrorings of every
    tile, more accurate in four times the time. pool: an executor that reconstructs while the GPU
    computes. progress: called with the number of finished tiles and of all tiles. options: those
    of `reconstruct`. Raises: ValueError for a grid or a shape that does not fit.
    """
    if not hasattr(image, "shape"):
        raise ValueError(f"image is a {type(image).__name__}; expected an array (height, width, 3),"
                         " such as images.read_image(path).pixels")
    if mpp is not None:
        check_mpp(mpp, "mpp")
    if len(image.shape) != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {tuple(image.shape)}; expected (height, width, 3)")
    if model.training:
        raise RuntimeError("model is in training mode: call model.eval() before predicting")
    picture = image
    if not isinstance(image, Picture):
        picture = Picture([array_level(image)], mpp=mpp)
        picture.resample_to(model.config.get("mpp"))
    tile, halo = sides_of(model, tile, halo)
    cores = lay_tiles(model, picture, tile, halo, batch)
    tiles = predict_tiles(model, picture, cores, halo=halo, batch=batch, dtype=dtype, flips=flips,
                          pool=pool, **options)

    # Collect the nuclei of all tiles in one label map and one table.
    inst_map = np.zeros(picture.full, np.int32)
    found, count = [], 0
    for done, (origin, nuclei) in enumerate(without_overlap(tiles), 1):
        ids = nuclei.inst_map
        target = inst_map[window(origin, np.add(origin, ids.shape))]
        target += np.where(ids > 0, ids + np.int32(count), 0)
        count += len(nuclei.areas)
        found.append(moved(nuclei, origin)[1:])
        if progress:
            progress(done, len(cores))

    # Number them by the peaks' y, then x.
    columns = [np.concatenate(values) for values in zip(*found)]
    order = np.lexsort(columns[0].T[::-1])
    ids = np.zeros(count + 1, np.int32)
    ids[order + 1] = np.arange(1, count + 1)
    return Nuclei(ids[inst_map], *(values[order] for values in columns))


# ---------------------------------------------------------------- the command


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description="Finds, outlines and classifies the nuclei in H&E images.")
    option = parser.add_argument
    option("images", nargs="*", help="image files, slides, or folders of them")
    option("--out", default="predictions", type=Path, help="where to write (default: predictions)")
    option("--checkpoint", default=CHECKPOINT, help="file (default: weights/consep.pt)")
    option("--mpp", type=float, help="µm per pixel of the images: 0.25 at 40x, 0.5 at 20x "
           "(default: as the file states, else as the checkpoint)")
    option("--formats", nargs="+", choices=FORMATS, default=["overlay", "geojson", "csv", "tif"],
           help="files to write; npy is the label map for numpy, json is HoVer-Net's format; "
           f"images above {LARGE // 10**6} megapixels get no tif and no json (default: overlay "
           "geojson csv tif)")
    option("--keep", nargs="+", metavar="CLASS", help="classes to write (default: all)")
    option("--overwrite", action="store_true", help="replace existing outputs")
    option("--classes", help="names for the checkpoint's classes, with commas between")
    option("--flips", action="store_true",
           help="mean over four mirrorings: more accurate, four times the time")
    option("--device", default="auto", help="cpu, cuda, cuda:1 or mps (default: a GPU, if any)")
    option("--precision", default="auto", choices=("auto", "bf16", "fp32"),
           help="precision of the network except its heads (default: bf16 if the processor has it)")
    option("--tile", type=int, help="largest side of a tile without margin, a multiple of 32 "
           f"(default: the checkpoint's, else what memory allows, at most {TILES[0]})")
    option("--halo", type=int, help="margin around a tile, a multiple of 32 (default: the "
           f"checkpoint's, else {HALO})")
    option("--batch", type=int, help="tiles computed at once; more need more memory "
           "(default: as many as make 2 megapixels)")
    option("--workers", type=int, help="processes that turn maps into nuclei while the network "
           "computes (default: with a GPU one per core, at most 8; else none)")
    option("--compile", action="store_true", help="use torch.compile: takes a minute "
           "and needs a C++ compiler")
    option("--max-pixels", type=int, default=MAX_PIXELS,
           help=f"refuse image files of more pixels (default: {MAX_PIXELS})")
    option("--export", nargs="?", const="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def prepare(args):
    """Loads the model onto its device. Raises: ValueError, OSError for a wrong call."""
    if args.export is not None:
        raise ValueError("--export is gone; run python convert.py theirs.pth ours.pt")
    if not args.images:
        raise ValueError("no image named; expected python infer.py image.png")
    if args.mpp is not None:
        check_mpp(args.mpp)

    # The model, and the names of its classes.
    model = load_any_model(args.checkpoint, pick_device(args.device))
    if args.classes:
        names = names_in(args.classes)
        if len(names) != model.config["num_classes"]:
            raise ValueError(f"--classes has {len(names)} names; {args.checkpoint} has "
                             f"{model.config['num_classes']} classes")
        model.config |= {"class_names": names, "colors": class_colors(names)}
    unknown = set(args.keep or ()) - set(model.config["class_names"])
    if unknown:
        raise ValueError(f"--keep {', '.join(sorted(unknown))}: no such class; "
                         f"choose from {', '.join(model.config['class_names'])}")
    return model


@dataclass
class Work:
    """The settings that all images of a call share."""

    model: torch.nn.Module
    tile: int | None
    options: dict  # further arguments of `predict`
    formats: list
    keep: list | None  # names of classes
    mpp: float | None
    max_pixels: int
    journal: Journal

    def do(self, path, stem, share, progress):
        """Finds and writes the nuclei of an image; of a large one only the tiles in `share`."""
        # The picture at the model's resolution.
        start, wanted = time.perf_counter(), self.model.config["mpp"]
        picture = open_picture(path, self.max_pixels)
        for note in picture.notes:
            say("warning", path, note)
        if self.mpp is not None:
            if differ(picture.mpp, self.mpp):
                say("warning", path, f"it states {picture.mpp:.3g} µm per pixel "
                    f"({picture.source}), but --mpp {self.mpp:g} is used")
            picture.mpp, picture.source = self.mpp, "--mpp"
        elif picture.mpp is None:
            picture.mpp, picture.source = wanted, "assumed"
        picture.resample_to(wanted)

        # Its nuclei.
        if picture.large:
            self.do_large(path, stem, picture, start, share, progress)
            return
        image, config = picture.load(), self.model.config
        nuclei = predict(self.model, picture, tile=self.tile, progress=progress, **self.options)
        result = Result(path.name, image, self.kept(nuclei), config["class_names"],
                        config["colors"], picture.mpp)
        self.write(path, stem, result, self.formats, FORMATS, picture, start)

    def do_large(self, path, stem, picture, start, share, progress):
        """Like `do`, but tiles wait on disk; the process that ends the last one writes all."""
        formats = [name for name in self.formats if name in WRITERS]
        left_out = [FORMATS[name][0] for name in self.formats if name not in WRITERS]
        if not formats:
            raise ValueError(f"{path}: {' and '.join(left_out)} would not fit into memory; "
                             f"add one of {', '.join(WRITERS)} to --formats")

        # Lay the tiles, and open a folder that only this file with these settings uses.
        halo, batch = self.options["halo"], self.options["batch"]
        cores = lay_tiles(self.model, picture, self.tile, halo, batch)
        cores = [core for core in cores if picture.has_tissue(core)]
        folder = self.journal.open_folder(path, stem, cores)
        files = {core: folder / f"{core[0]}_{core[1]}.npz" for core in cores}

        # Compute the missing tiles of this process.
        mine = [core for core in cores[share] if not files[core].exists()]
        tiles = predict_tiles(self.model, picture, mine, **self.options)
        for done, (core, (origin, nuclei)) in enumerate(zip(mine, tiles), 1):
            save_nuclei(files[core], origin, nuclei)
            progress(done, len(mine))

        # Write the result once all tiles are there.
        with writing_alone(folder, files.values()) as alone:
            if not alone:
                return
            config = self.model.config
            result = Tiles(path.name, picture, folder, config["class_names"], config["colors"])
            for origin, nuclei in without_overlap(map(load_nuclei, files.values())):
                result.add(origin, self.kept(nuclei))
            self.write(path, stem, result, formats, WRITERS, picture, start, cores)
            self.journal.remove_folders(stem)
        if left_out:
            show_progress("")
            print(f"{path}: {math.prod(picture.full) / 1e6:,.0f} megapixels, so "
                  f"{' and '.join(left_out)} would not fit into memory; "
                  "--formats npy has the label map")

    def kept(self, nuclei):
        """The nuclei of the classes to write."""
        if self.keep is None:
            return nuclei
        names = np.array(["", *self.model.config["class_names"]])
        return select(nuclei, np.isin(names[nuclei.classes], self.keep))

    def write(self, path, stem, result, formats, writers, picture, start, cores=None):
        """Writes the outputs, and notes that the image is done."""
        write_outputs(self.journal.folder, stem, result, formats, writers)
        mm2 = None
        if cores is not None and picture.mpp:
            mm2 = picture.pixels_in(cores) * picture.mpp**2 / 1e6
        row = summary_row(result, seconds=time.perf_counter() - start, mm2=mm2)
        if self.keep is not None:  # others were not written, which is not 0
            for name in set(result.class_names) - set(self.keep):
                del row[name]
        outputs = [stem + writers[name][0] for name in formats]
        self.journal.add(path, stem, outputs=outputs, row=row, counts=result.counts(),
                         mpp_source=picture.source)


def do_all(work, images, done, rank, ranks):
    """Processes this process's images; returns the output stems of those that failed."""
    failed, estimate = set(), Estimate(images)
    for number, (path, stem) in enumerate(images.items()):
        # A process has its own images, and its share of the tiles of every large image.
        share = slice(None)
        if ranks > 1 and is_large(path):
            share = slice(rank, None, ranks)
            done = work.journal.done()  # another process may have finished it
        elif number % ranks != rank:
            estimate.leave_out(path)
            continue
        try:
            if work.journal.covers(path, done.get(stem)):
                estimate.leave_out(path)
                continue
            work.do(path, stem, share, estimate.begin(path, number))
        except (ValueError, OSError, MemoryError, torch.cuda.OutOfMemoryError) as error:
            say("error", path, explain(error, path))
            failed.add(stem)
        estimate.end(path)
    show_progress("")
    return failed


def write_rows(journal):
    """Writes summary.csv: the rows of all images that are done."""
    rows = [entry["row"] for entry in journal.done().values()]
    if rows:
        write_summary(journal.folder / "summary.csv", rows)


def run(args, rank, ranks):
    """Runs the command, or this process's share of it; returns the exit code."""
    # Open everything first, so that a wrong call fails here.
    try:
        model = prepare(args)
        config, device = model.config, next(model.parameters()).device
        tile, halo = sides_of(model, args.tile, args.halo)
        check_tiling(STRIDE if tile is None else tile, halo, args.batch)
        images, skipped = find_images(args.images, args.out)
        dtype = pick_precision(device, args.precision)
        settings = {
            "checkpoint": zlib.crc32(Path(args.checkpoint).read_bytes()), "mpp": args.mpp,
            "classes": config["class_names"], "tile": tile, "halo": halo,
            "precision": str(dtype), "flips": args.flips, "formats": args.formats,
            "keep": args.keep}
        journal = Journal(args.out, settings, args.overwrite)
        before = journal.done()
        note_of(args.out, rank).unlink(missing_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {explain(error, args.out)}", file=sys.stderr)
        return 2
    if not rank:
        opening = opening_line(len(images), args.checkpoint, config, device, dtype)
        print("\n".join([*skipped, opening]), flush=True)

    # The work.
    fused = model.fuse(dtype)
    fused = torch.compile(fused) if args.compile else fused
    pool = start_pool(args.workers, device)
    options = {"halo": halo, "batch": args.batch, "flips": args.flips, "pool": pool}
    work = Work(fused, tile, options, args.formats, args.keep, args.mpp, args.max_pixels,
                journal)
    start = time.perf_counter()
    try:
        failed = do_all(work, images, before, rank, ranks)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
        if not rank:
            write_rows(journal)  # of an interrupted run, too
    if rank:
        leave_note(args.out, rank, failed)
        return 0

    # The first process reports for all.
    failed |= wait_for_notes(args.out, ranks)
    done = journal.done()
    entries = [done[stem] for stem in images.values() if stem in done and stem not in failed]
    write_rows(journal)
    new = [entry for entry in entries if entry != before.get(entry["image"])]
    old = [entry for entry in entries if entry == before.get(entry["image"])]
    lines = closing_lines(new, old, failed, config, time.perf_counter() - start, args.out)
    print("\n".join(lines))
    return 1 if failed else 0


def main(argv=None):
    """Runs the command; returns 0, 1 if an image failed, 2 for a wrong call, 130 if stopped."""
    args = parse_arguments(argv)
    keep_memory()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        return run(args, rank, ranks)
    except OSError as error:  # a spreadsheet may hold summary.csv, or the disk is full
        print(f"error: {explain(error, args.out)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        show_progress("")
        print(f"stopped: what is done is kept in {args.out}; the same command goes on from there",
              file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
