"""Nuclei data: readers, targets, augmentation, and a generator of synthetic tissue.

    source = open_source("CoNSeP")                # or PanNuke, images/ beside labels/, "synthetic"
    image, inst_map, type_map = source.read(0)    # (H, W, 3) uint8, (H, W) int32, (H, W) uint8
    crops = Crops([(source, range(len(source.names)), 1.0)], source.class_names, crop=256)
    image, type_map, density = crops[0]           # tensors, augmented, targets derived afterwards

`python data.py example.png` writes a tile of synthetic tissue. Arrays are (y, x); class 0 is
background; ids count from 1. Needs torch, numpy, scipy, pillow.
"""

import argparse
import contextlib
import csv
import functools
import json
import math
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy import ndimage

UNKNOWN_CLASS = 255  # in type_map: a nucleus whose class its set does not tell (as in dualunet.py)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
LABEL_SUFFIXES = (".npy", ".npz", ".mat", ".png", ".tif", ".tiff")
IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000")  # ours: none run programs
MAX_PIXELS = 2**28  # ours: declaring more is refused undecoded; transparency needs 18 bytes a pixel
CONSEP_CLASSES = ("miscellaneous", "inflammatory", "epithelial", "spindle-shaped")
CONSEP_TYPES = tuple(CONSEP_CLASSES[k] for k in (0, 1, 2, 2, 3, 3, 3))  # published: 7 types to 4
PANNUKE_CLASSES = ("neoplastic", "inflammatory", "connective", "dead", "epithelial")
PANNUKE_SPLITS = {1: (1, 2, 3), 2: (2, 1, 3), 3: (3, 2, 1)}  # published: train, val, test fold


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def naming(path, what, advice):
    """A bad file's errors, a dozen kinds, become one sentence that names it; no warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such {what}; check the path") from None
    except Exception as error:
        if str(error).startswith(f"{path}: "):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a readable {what} ({reason}); {advice}") from None


def open_image(path, max_pixels=MAX_PIXELS):
    """Pillow's image, only its header read, without Image.open's refusal from 179 megapixels."""
    Image.init()
    with open(path, "rb") as file:
        start = file.read(16)
    openers = [opener for opener, accepts in map(Image.OPEN.get, IMAGE_FORMATS)
               if accepts(start) is True]
    if not openers:
        raise ValueError("unknown format")
    image = openers[0](path)
    if image.width * image.height > max_pixels:
        image.close()
        raise ValueError(f"{path}: declares {image.width}x{image.height} pixels, more than "
                         f"{max_pixels}; cut it into parts or allow it with --max-pixels")
    return image


def read_image(path, max_pixels=MAX_PIXELS):
    """An image file as (H, W, 3) uint8 RGB, turned as its EXIF says; transparency falls on white.

    16 bits are scaled by 1/257; of several frames the first counts. Raises: as `naming` has it.
    """
    with naming(path, "image", "expected PNG, JPEG or TIFF"), open_image(path, max_pixels) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode[0] in "IF":  # grey of 16 or 32 bits
            grey = np.asarray(image)
            if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
                raise ValueError(f"{path}: {grey.dtype} {grey.min()}..{grey.max()}; "
                                 "expected 8 or 16 bits")
            return np.repeat((grey / 257).round().astype(np.uint8)[..., None], 3, axis=2)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))


MAT_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8",
             12: "i8", 13: "u8"}


def mat_elements(data, order):
    """(kind, content) of one element of a MATLAB file after the other."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(order + "II", data, at)
        start, end = at + 8, at + 8 + (size if kind == 15 else -(-size // 8) * 8)
        if kind >> 16:  # a short one: 2 bytes of kind, 2 of size, 4 of content
            kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        if len(data) < start + size:
            raise ValueError("cut short")
        yield kind, data[start:start + size]
        at = end


def read_mat(data):
    """{name: array} of the real arrays in a MATLAB 5 to 7 file; cells, structs, text are skipped.

    On some damaged files scipy's loadmat kills the process. Source: MathWorks, MAT-File Format.
    """
    order, arrays = "<" if data[126:128] == b"IM" else ">", {}
    if struct.unpack_from(order + "H", data, 124) != (0x100,):
        raise ValueError("another version of MATLAB's format; save it with -v7")
    for kind, content in mat_elements(data[128:], order):
        if kind == 15:  # compressed
            kind, content = next(mat_elements(
                zlib.decompressobj().decompress(content, 9 * MAX_PIXELS), order))
        (_, flags), (_, shape), (_, name), *values = mat_elements(content, order)
        if 6 <= struct.unpack_from(order + "I", flags)[0] & 255 <= 15:  # its class is a number's
            (stored, values), = values  # of two, the other would be imaginary
            array = np.frombuffer(values, order + MAT_TYPES[stored])
            arrays[name.decode("latin-1")] = array.reshape(
                np.frombuffer(shape, order + "i4"), order="F")
    return arrays


def read_labels(path):
    """A label file as (instance map int32, {name: array} of all in it).

    .npz and .mat hold `inst_map` and perhaps `type_map` (H, W) or `inst_type` (N,), indexed by the
    sorted ids (`id`: by the ids it lists); the others hold the instance map alone.
    """
    path = Path(path)
    with naming(path, "label file", f"expected {', '.join(LABEL_SUFFIXES)}"):
        if path.suffix.lower() == ".mat":
            arrays = read_mat(path.read_bytes())
        elif path.suffix.lower() in (".npy", ".npz"):
            with open(path, "rb") as file:
                arrays = np.load(file, allow_pickle=False)
                arrays = arrays if isinstance(arrays, np.ndarray) else dict(arrays)
        else:
            with open_image(path) as file:
                arrays = np.array(file)
        arrays = {"inst_map": arrays} if isinstance(arrays, np.ndarray) else arrays
    if "inst_map" not in arrays:
        found = ", ".join(k for k in arrays if not k.startswith("__")) or "nothing"
        raise ValueError(f"{path}: no array inst_map in it, found {found}; "
                         "store it under that name")
    labels = arrays["inst_map"]
    if labels.ndim != 2 or labels.dtype.kind not in "buif":
        raise ValueError(f"{path}: instance map is {labels.dtype} {labels.shape}; "
                         "expected (height, width)")
    if labels.size and not (labels.min() >= 0 and labels.max() < 2**31 and not (labels % 1).any()):
        raise ValueError(f"{path}: ids {labels.min()}..{labels.max()}; "
                         "expected whole numbers 0..2147483647")
    return labels.astype(np.int32), arrays


def read_names(path):
    """{id: name} of a JSON file, which holds that or a list of names."""
    with naming(path, "JSON file", 'expected {"1": "tumour"} or ["tumour"]'):
        content = json.loads(path.read_text(encoding="utf-8"))
        content = content.items() if isinstance(content, dict) else enumerate(content)
        return {int(i): str(name) for i, name in content}


# ---------------------------------------------------------------- synthetic tissue

SYNTHETIC_CLASSES = CONSEP_CLASSES
STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.12, 0.61, 0.78))  # H, E: Ruifrok; blood: ours
SLIDE_WHITE = np.float32((241, 239, 243))  # bare glass in CoNSeP
KINDS = {  # ours: pixels at 0.25 µm and optical densities, set beside CoNSeP; 5 to 7 have no label
    # semi-axes     pointed body  rim   clumps nucleoli eosin blood
    1: (5.2, 4.2,   2.0,    0.80, 0.00, 0.03,  0.00,    0.22, 0.00),  # shrunken and black: rare
    2: (7.9, 6.9,   2.0,    0.46, 0.12, 0.11,  0.00,    0.13, 0.00),  # small, round, dark
    3: (12.8, 9.0,  2.0,    0.17, 0.20, 0.08,  0.28,    0.11, 0.00),  # large, pale, with nucleoli
    4: (15.0, 4.6,  1.6,    0.22, 0.10, 0.07,  0.00,    0.12, 0.00),  # slim
    5: (9.5, 8.5,   2.0,    0.00, 0.00, 0.00,  0.00,    0.06, 0.40),  # red blood cell
    6: (16.0, 13.0, 2.0,    0.01, 0.05, 0.01,  0.00,    0.02, 0.00),  # vacuole
    7: (9.0, 6.0,   2.0,    0.10, 0.00, 0.05,  0.00,    0.14, 0.00),  # smudge
}


def synthetic_tissue(seed, size=256):
    """Made-up H&E tissue at 0.25 µm per pixel with its truth, as `Source.read`; fixed by the seed.

    Glands, stroma with spindle-shaped nuclei along its fibres, inflammatory clusters, lumina,
    glass, blood; one tile in twenty has no nucleus. size: a side or (height, width).
    """
    rng, (h, w) = np.random.default_rng(seed), np.broadcast_to(size, 2).tolist()
    if min(h, w) < 8:
        raise ValueError(f"size is {h}x{w}; expected at least 8x8")

    def noise(scale):  # of about unit variance, its features `scale` pixels wide
        grid = rng.normal(0, 1.4, (int(h / scale) + 4, int(w / scale) + 4)).astype(np.float32)
        box = (1, 1, 1 + w / scale, 1 + h / scale)
        return np.array(Image.fromarray(grid).resize((w, h), Image.Resampling.BICUBIC, box=box))

    def above(field, level, width):  # 0 to 1, soft over `width`
        return ((field - level) / width + 0.5).clip(0, 1)

    # architecture: level sets of smooth fields are glands, lumina, glass and infiltrates
    ragged = 0.05 * noise(6) + 0.06 * noise(15)
    gland = noise(100) + rng.uniform(-1.2, 1.0) + ragged
    epithelium, lumen = above(gland, 0.3, 0.1), above(gland, rng.uniform(1.1, 2.5), 0.05)
    solid = (1 - lumen) * (1 - above(noise(150) + ragged, rng.uniform(0.7, 3.0), 0.05))
    infiltrate = above(noise(60), rng.uniform(-0.8, 1.8), 0.5) * (1 - epithelium)
    stroma = (1 - epithelium) * (1 - 0.7 * infiltrate)

    # fibres: noise stretched along the level sets of a bent ramp, which spindle nuclei follow too
    yy, xx = np.ogrid[:np.float32(h), :np.float32(w)]
    tilt, sheet = rng.uniform(0, math.pi), rng.standard_normal((256, 256), np.float32)
    across = yy * math.cos(tilt) - xx * math.sin(tilt) + 22 * noise(80) + 2.5 * noise(14)
    along = (xx * math.cos(tilt) + yy * math.sin(tilt)) / 12
    fibres = sum(ndimage.map_coordinates(sheet, (across / s, along / s), order=1, mode="grid-wrap")
                 for s in (2.0, 5.0))
    coarse, fine = noise(30), 3.5 * rng.standard_normal((h, w), np.float32)
    fine = ndimage.gaussian_filter(fine, 1, truncate=3)  # noise(3) would show its grid
    gaps = above(0.8 * fibres + 0.6 * coarse + 0.9 * infiltrate, rng.uniform(0.8, 2.4), 0.5)
    hema = rng.uniform(0.02, 0.09) + 0.06 * epithelium + 0.025 * (coarse + fine)
    eosin = 0.09 + 0.02 * (coarse + fine) + (0.015 + 0.025 * stroma) * fibres
    stains = (np.stack((hema, eosin, 0 * eosin)).clip(0)
              * solid * (1 - 0.9 * gaps * (1 - epithelium)))

    # cells: candidates, thinned to each kind's rate per pixel
    upright = np.exp(-((gland - 0.75) / rng.uniform(0.3, 1.2)) ** 2)  # from rings to solid sheets
    rates = solid * np.stack((
        0 * solid + 4e-5, 4e-3 * infiltrate + 5e-5, 7e-3 * epithelium * upright,
        rng.uniform(3e-4, 9e-4) * stroma, 4e-3 * stroma * above(noise(40), rng.uniform(2, 3), 0.3),
        rng.uniform(0, 2e-4) * epithelium, 0 * solid + 1e-4))
    rates[:4] *= rng.uniform(0.1, 0.8) * (rng.random() > 0.05)
    n = int(0.015 * (h + 12) * (w + 12))
    ys, xs = rng.integers(-6, h + 6, n), rng.integers(-6, w + 6, n)  # the border cuts some
    i, j = ys.clip(3, h - 4), xs.clip(3, w - 4)
    kinds = 1 + (rng.random(n) > np.cumsum(rates[:, i, j] / 0.015, 0)).sum(0)
    guide, g = np.stack((across, gland)), (kinds == 3).astype(int)  # epithelium stands on its edge
    slope = guide[g, i + 3, j] - guide[g, i - 3, j], guide[g, i, j + 3] - guide[g, i, j - 3]
    angles = np.arctan2(*slope) + (1 - g) * math.pi / 2 + rng.normal(0, 0.25, n)

    looks = rng.lognormal(0, (0.08, 0.15), (8, 2)).tolist()  # each kind's size and strength here
    inst_map, inst_type = np.zeros((h, w), np.int32), [0]
    for kind, y, x, angle in zip(*(array[kinds < 8].tolist() for array in (kinds, ys, xs, angles))):
        a, b, pointed, body, rim, clumps, nucleoli, eosin, blood = KINDS[kind]
        a, b = ((a, b) * rng.normal(looks[kind][0], 0.2, 2).clip(0.6, 1.7)).tolist()
        r = int(1.2 * max(a, b)) + 2
        box = slice(max(y - r, 0), y + r + 1), slice(max(x - r, 0), x + r + 1)
        dy, dx = yy[box[0]] - y, xx[:, box[1]] - x
        u = (dx * math.cos(angle) + dy * math.sin(angle)) / a
        v = (dy * math.cos(angle) - dx * math.sin(angle)) / b + rng.normal(0, 0.2) * u * u
        phi = np.arctan2(v, u)
        wobble = sum(rng.normal(0, 0.11 / k) * np.cos(k * phi + rng.uniform(0, 6.3))
                     for k in (2, 3, 5))
        rho = (abs(u) ** pointed + abs(v) ** pointed) ** (1 / pointed) / (1 + wobble)
        parts, _ = ndimage.label((rho < 1) & (inst_map[box] == 0))
        sizes = np.bincount(parts.ravel(), minlength=2)[1:]
        if sizes.max() < max(20, 0.85 * (rho < 1).sum()):
            continue  # no room
        mask = parts == sizes.argmax() + 1  # one 4-connected piece
        hema = body + rim * np.exp(-(((1 - rho) * min(a, b) - 0.7) / 1.3) ** 2)
        for cu, cv in rng.uniform(-0.5, 0.5, (2, 2)).tolist() if nucleoli else ():
            hema += nucleoli * np.exp(-((u - cu) * a / 2) ** 2 - ((v - cv) * b / 2) ** 2)
        hema = (hema + clumps * fine[box]).clip(0) * looks[kind][1] * rng.lognormal(0, 0.2)
        for stain, layer in zip(stains, (hema, eosin * (1 + 0.2 * fine[box]),
                                         blood * (0.7 + 0.3 * rho))):
            stain[box][mask] = layer[mask]
        if kind <= 4:
            inst_map[box][mask] = len(inst_type)
            inst_type.append(kind)

    # microscope: focus that drifts (above 1 it sharpens), stain and hue of the day, sensor noise
    soft, sharp = (ndimage.gaussian_filter(stains, (0, s, s), truncate=3) for s in (2, 0.7))
    stains = soft + (rng.uniform(0.6, 1.5) + 0.3 * noise(120)).clip(0.2, 1.8) * (sharp - soft)
    hues = np.float32(STAINS * rng.uniform(0.75, 1.3, (3, 1)) + rng.normal(0, 0.03, (3, 3)))
    image = SLIDE_WHITE * np.exp(-2.3 * np.tensordot(stains, hues, (0, 0)))  # (H, W, 3)
    image += rng.uniform(1, 3) * rng.standard_normal(image.shape, np.float32)
    return image.clip(0, 255).astype(np.uint8), inst_map, np.array(inst_type, np.uint8)[inst_map]


# ---------------------------------------------------------------- data sets


class Source(NamedTuple):
    """A labelled set: `read(i)` gives image (H, W, 3) uint8, inst_map int32 and type_map uint8."""

    names: Sequence[str]
    class_names: Sequence[str]
    read: Callable  # of a picklable kind: worker processes receive it
    tissues: Sequence[str] | None = None  # one a name, where the set tells


def number_ids(inst_map):
    """The map int32 with ids from 1 without gaps, the ids it had, and where (flat) each begins."""
    ids, first, index = np.unique(np.append(0, inst_map), return_index=True, return_inverse=True)
    return index[1:].reshape(inst_map.shape).astype(np.int32), ids[1:], first[1:] - 1


def match_classes(path, ids, keys, values, names):
    """(N,) int64 class ids 1..K of `ids`; keys are ids, values names or places among `names`."""
    with naming(path, "list of classes", "expected one id and one class a nucleus"):
        ids, keys, values = (np.ravel(array).tolist() for array in (ids, keys, values))
        table = dict(zip(keys, values))
        if len(keys) != len(values):
            raise ValueError(f"{path}: {len(values)} classes for {len(keys)} nuclei; "
                             "expected one each")
        if odd := set(ids) ^ set(keys):
            raise ValueError(f"{path}: id {min(odd)} has a class or pixels but not both; "
                             "expected both")
        known = {name: k for k, name in enumerate(dict.fromkeys(names), 1)}
        known |= {place: known[name] for place, name in enumerate(names, 1)}
        if unknown := [value for value in values if value not in known]:
            raise ValueError(f"{path}: class {unknown[0]!r} is not among {', '.join(names)} "
                             f"(1..{len(names)})")
        return np.array([known[table[i]] for i in ids], np.int64)


def read_folder(files, class_names, i):
    image_path, path, types_path = files[i]
    image, (inst_map, arrays) = read_image(image_path), read_labels(path)
    for labels in (inst_map, arrays.get("type_map", inst_map)):
        if labels.shape != image.shape[:2]:
            raise ValueError(f"{path}: labels are {labels.shape}, the image is {image.shape[:2]}")
    inst_map, ids, first = number_ids(inst_map)
    # `id` and `class`: as in Lizard, CoNIC
    keys, values = arrays.get("id", ids), arrays.get("inst_type", arrays.get("class"))
    if types_path.exists():
        path, types = types_path, read_names(types_path)
        keys, values = list(types), list(types.values())
    elif "type_map" in arrays:
        keys, values = ids, arrays["type_map"].ravel()[first]
    elif values is None and len(class_names) == 1:
        keys, values = ids, ids * 0 + 1
    elif values is None:
        raise ValueError(f"{path}: no classes in it; expected type_map, inst_type or {types_path}")
    classes = match_classes(path, ids, keys, values, class_names)
    return image, inst_map, np.append(0, classes).astype(np.uint8)[inst_map]


def folder_source(root, consep=False):
    """images/*, labels/<name>.*, classes from types/<name>.json or the labels; or CoNSeP's folders.

    Class names come from classes.json, else from the types files, else every nucleus is "nucleus".
    """
    images, labels = ("Images", "Labels") if consep else ("images", "labels")
    images = [p for p in (root / images).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES]
    images.sort(key=lambda p: (consep and len(p.name), p.name))  # CoNSeP: train_2 before train_10
    labels = {p.stem: p for p in sorted((root / labels).iterdir())
              if p.suffix.lower() in LABEL_SUFFIXES}
    if missing := [p.name for p in images if p.stem not in labels]:
        raise ValueError(f"{root}: no label for {missing[0]} ({len(missing)} such); expected "
                         f"labels/<name> with one of {', '.join(LABEL_SUFFIXES)}")
    if consep:
        class_names = CONSEP_TYPES
    elif (root / "classes.json").exists():
        class_names = list(read_names(root / "classes.json").values())
    else:
        types = map(read_names, (root / "types").glob("*.json"))
        class_names = sorted({name for names in types for name in names.values()}) or ["nucleus"]
    files = [(p, labels[p.stem], root / "types" / f"{p.stem}.json") for p in images]
    read = functools.partial(read_folder, files, class_names)
    return Source([p.stem for p in images], CONSEP_CLASSES if consep else class_names, read)


@functools.lru_cache
def mapped(root, k, name):
    """A memory-mapped array of fold k; opened by each process for itself."""
    path = (root / f"Fold {k}" / ("masks" if name == "masks" else "images")
            / f"fold{k}" / f"{name}.npy")
    with naming(path, "array", "expected PanNuke's own .npy"):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def read_pannuke(root, names, n):
    k, i = map(int, names[n].removeprefix("fold").split("/"))
    image = np.clip(mapped(root, k, "images")[i], 0, 255).astype(np.uint8)  # often float64 0..255
    masks = mapped(root, k, "masks")[i][..., :5].astype(np.int64)  # ids by class; sixth: background
    first = (masks > 0).argmax(-1)  # where channels overlap, the first counts
    ids = np.take_along_axis(masks, first[..., None], -1)[..., 0]
    return image, number_ids(ids * 5 + first)[0], ((first + 1) * (ids > 0)).astype(np.uint8)


def pannuke_source(root):
    """PanNuke's files: Fold {k}/{images/fold{k}/{images,types},masks/fold{k}/masks}.npy, mapped."""
    names, tissues = [], []
    for k in (k for k in (1, 2, 3) if (root / f"Fold {k}").is_dir()):
        images, masks, types = (mapped(root, k, name) for name in ("images", "masks", "types"))
        if not images.shape[:3] == masks.shape[:3] == (len(types), 256, 256):
            raise ValueError(f"{root / f'Fold {k}'}: images, masks and types differ in number; "
                             "download again")
        names += [f"fold{k}/{i}" for i in range(len(types))]
        tissues += map(str, types)
    return Source(names, PANNUKE_CLASSES, functools.partial(read_pannuke, root, names), tissues)


def read_predictions(folder, name, class_names):
    """What infer.py wrote of an image: inst_map and one class id (1..K) a nucleus, sorted by id."""
    table = Path(folder) / f"{name}_nuclei.csv"
    inst_map, ids, _ = number_ids(read_labels(Path(folder) / f"{name}_instances.tif")[0])
    with (naming(table, "table", "run infer.py again"),
          open(table, newline="", encoding="utf-8") as file):
        rows = {int(row["id"]): row["class"] for row in csv.DictReader(file)}
    return inst_map, match_classes(table, ids, list(rows), list(rows.values()), class_names)


def read_synthetic(seed, size, i):
    return synthetic_tissue((seed, i), size)


def open_source(path, *, count=120, size=256, seed=0):
    """The data set at `path`, its layout recognised; "synthetic" gives `count` generated images.

    Raises: ValueError naming the layouts when none fits, FileNotFoundError when nothing is there.
    """
    if str(path) == "synthetic":
        read = functools.partial(read_synthetic, seed, size)
        return Source([f"synthetic_{i}" for i in range(count)], SYNTHETIC_CLASSES, read)
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"{path}: no such folder; give a data set or the word synthetic")
    root = root / "Train" if (root / "Train" / "Images").is_dir() else root
    found = {p.name for p in root.glob("*")}  # names in their case: is_dir() ignores it on Windows
    plain, consep = {"images", "labels"} <= found, {"Images", "Labels"} <= found
    source = folder_source(root, consep) if plain or consep else pannuke_source(root)
    if not source.names:
        raise ValueError(f"{path}: no labelled images found; expected CoNSeP (Images/*.png, "
                         "Labels/*.mat), PanNuke (Fold 1/...) or images/ beside labels/")
    return source


def check_source(source):
    """Reads all images: ({i: a sentence on the fault}, [nuclei of each class in the good ones])."""
    problems, counts = {}, np.zeros(256, np.int64)
    for i in range(len(source.names)):
        try:
            _, inst_map, type_map = source.read(i)
            counts += np.bincount(type_map.ravel()[number_ids(inst_map)[2]], minlength=256)
        except (ValueError, OSError) as error:
            problems[i] = str(error)
    return problems, counts[1:len(source.class_names) + 1].tolist()


# ---------------------------------------------------------------- crops to train on


def centroids_of(inst_map):
    """(N, 2) float64 centroids (y, x): the mean pixel index of every id, in order of the ids."""
    y, x = np.nonzero(inst_map)
    _, index, area = np.unique(inst_map[y, x], return_inverse=True, return_counts=True)
    return np.stack([np.bincount(index, weights=axis, minlength=len(area)) / area
                     for axis in (y, x)], 1)


def density_map(centroids, shape, sigma=5.0, combine="max"):
    """A Gaussian peak on each nucleus: (H, W) float32 in [0, 1]; zeros where there is none.

    centroids: (N, 2) (y, x), may lie outside. combine: "max" gives every nucleus a peak of exactly
    1 at its centroid's pixel, whatever its neighbours and the crop; "sum" is published: Gaussians
    added up and divided by the image's maximum, where close nuclei melt and isolated ones fade.
    """
    if combine not in ("max", "sum"):
        raise ValueError(f"combine is {combine!r}; expected 'max' or 'sum'")
    pad = math.ceil(4 * sigma) if combine == "max" else 0  # a peak just outside still reaches in
    points = np.zeros((shape[0] + 2 * pad, shape[1] + 2 * pad))
    y, x = np.round(np.asarray(centroids, float).reshape(-1, 2)).astype(int).T + pad
    inside = (y >= 0) & (x >= 0) & (y < points.shape[0]) & (x < points.shape[1])
    if not inside.any():
        return np.zeros(shape, np.float32)
    points[y[inside], x[inside]] = 1
    if combine == "sum":
        density = ndimage.gaussian_filter(points, sigma, mode="constant")
        return (density / density.max()).astype(np.float32)
    distance = ndimage.distance_transform_edt(points == 0)[pad:pad + shape[0], pad:pad + shape[1]]
    return np.exp(-(distance**2) / (2 * sigma**2)).astype(np.float32)


HED = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105],
                [0.268, 0.570, 0.776]])  # Ruifrok, Johnston 2001
OPTICAL_DENSITY = -np.log((np.arange(256) + 1) / 256).astype(np.float32)


def stain_shift(image, scale, shift):
    """The image (H, W, 3) uint8 with haematoxylin, eosin and residual amounts scaled and shifted.

    scale, shift: 3 floats each, 1 and 0 for no change; shift is in optical density.
    """
    mix, offset = np.linalg.inv(HED) @ np.diag(scale) @ HED, shift @ HED
    od = OPTICAL_DENSITY[image] @ mix.astype(np.float32) + offset.astype(np.float32)
    return np.clip(256 * np.exp(-od) - 1 + 0.5, 0, 255).astype(np.uint8)


def cut(sample, y0, x0, height, width):
    """A window of (image, inst_map, type_map), reflected outside; mirrored nuclei get new ids."""
    index, folds = [], []
    for start, size, length in zip((y0, x0), (height, width), sample[1].shape):
        last = max(length - 1, 1)  # the mirrors stand on pixels 0 and `last`
        turn, phase = np.divmod(np.arange(start, start + size), 2 * last)
        index.append((last - abs(phase - last)) % length)
        folds.append(2 * (turn - turn.min()) + (phase > last))
    image, inst_map, type_map = (array[np.ix_(*index)] for array in sample)
    copy = folds[0][:, None] * (folds[1].max() + 1) + folds[1]
    inst_map = np.where(inst_map > 0, inst_map + copy * (int(sample[1].max()) + 1), 0)
    return image, inst_map.astype(np.int32), type_map


def augment(sample, rng, crop, *, scale=1.25, turn=45.0, blur=0.2, stain=1.0, margin=16):
    """A random crop of (image, inst_map, type_map), flipped, turned, scaled, blurred, stained anew.

    scale: largest zoom in or out; turn: largest turn in degrees beyond the quarter turns; blur:
    how often; stain: strength, 0 for none. The result is crop + 2·margin wide, so that a nucleus
    cut by the crop keeps its true centroid.
    """
    side, zoom = crop + 2 * margin, np.exp(rng.uniform(-1, 1) * np.log(scale))
    angle = math.radians(turn * rng.uniform(-1, 1))
    c, s = math.cos(angle) / zoom, math.sin(angle) / zoom
    window = math.ceil(side * (abs(c) + abs(s)))  # holds the turned square
    y0, x0 = (int(rng.integers(0, max(length - round(crop / zoom), 0) + 1))
              + (round(crop / zoom) - window) // 2 for length in sample[1].shape)
    sample = cut(sample, y0, x0, window, window)
    affine = (c, -s, (window - side * (c - s)) / 2,  # from output to input x, y
              s, c, (window - side * (s + c)) / 2)
    filters = Image.Resampling.BICUBIC, Image.Resampling.NEAREST, Image.Resampling.NEAREST
    sample = [np.array(Image.fromarray(m).transform(
        (side, side), Image.Transform.AFFINE, affine, f)) for m, f in zip(sample, filters)]
    turns, mirror = rng.integers(4), rng.integers(2)
    image, inst_map, type_map = (np.rot90(m[:, ::-1] if mirror else m, turns) for m in sample)
    if rng.random() < blur:
        image = ndimage.gaussian_filter(image, (*[rng.uniform(0.4, 1.4)] * 2, 0))
    if stain:
        image = stain_shift(image, 1 + stain * rng.uniform(-0.3, 0.3, 3),
                            stain * rng.uniform(-0.08, 0.08, 3))
    return image, inst_map, type_map


def class_lookup(source, class_names):
    """(256,) uint8, a source's class ids to those of `class_names`; a stranger is a ValueError."""
    classes = {name: k for k, name in enumerate(class_names, 1)}
    if list(class_names) == ["nucleus"]:
        classes = dict.fromkeys(source.class_names, 1)
    elif list(source.class_names) == ["nucleus"]:
        classes = {"nucleus": UNKNOWN_CLASS} | classes
    if strangers := [name for name in source.class_names if name not in classes]:
        raise ValueError(f"class {strangers[0]!r} is not among {', '.join(class_names)}; "
                         "name them alike")
    lookup = np.zeros(256, np.uint8)
    lookup[1:len(source.class_names) + 1] = [classes[name] for name in source.class_names]
    return lookup


class Crops(torch.utils.data.Dataset):
    """Endless augmented crops: item n depends on (seed, n) alone, whatever the workers and order.

    parts: (source, indices of its images, share of the crops). Classes are merged by name into
    `class_names`; a set that only says "nucleus" teaches UNKNOWN_CLASS where there are several.
    Item: image (3, crop, crop) uint8, type_map (crop, crop) uint8, density (1, crop, crop) float32.
    """

    def __init__(self, parts, class_names, *, crop, seed=0, sigma=5.0, combine="max", cache=128,
                 **augmentation):
        self.sources, self.indices, shares = zip(*parts)
        self.shares = np.array(shares) / sum(shares)
        self.lookups = [class_lookup(source, class_names) for source in self.sources]
        self.crop, self.seed, self.density = crop, seed, (sigma, combine)
        self.augmentation = augmentation
        self.cache, self.cache_size = {}, cache  # the last images read, in each worker

    def __getstate__(self):
        return self.__dict__ | {"cache": {}}  # a spawned worker would get all its images by pipe

    def pick(self, n):
        """Crop n's random generator, and which image (part, i) it is cut from."""
        rng = np.random.default_rng((self.seed, n))
        part = int(rng.choice(len(self.shares), p=self.shares))
        return rng, (part, int(rng.choice(self.indices[part])))

    def name(self, n):
        part, i = self.pick(n)[1]
        return self.sources[part].names[i]

    def __getitem__(self, n):
        rng, (part, i) = self.pick(n)
        if (part, i) not in self.cache:
            if len(self.cache) >= self.cache_size:
                self.cache.pop(next(iter(self.cache)))  # the oldest
            self.cache[part, i] = self.sources[part].read(i)
        image, inst_map, type_map = augment(self.cache[part, i], rng, self.crop,
                                            **self.augmentation)
        margin = (inst_map.shape[0] - self.crop) // 2
        inner = (slice(margin, margin + self.crop),) * 2
        density = density_map(centroids_of(inst_map) - margin, (self.crop, self.crop),
                              *self.density)
        return (torch.from_numpy(image[inner].transpose(2, 0, 1).copy()),
                torch.from_numpy(self.lookups[part][type_map[inner]]),
                torch.from_numpy(density)[None])


def main(argv=None):
    """Writes a tile of synthetic tissue."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("image", type=Path, help="file to write, such as example.png")
    parser.add_argument("--size", type=int, default=512,
                        help="side in pixels of 0.25 µm (default: 512)")
    parser.add_argument("--seed", type=int, default=0,
                        help="another seed, another tile (default: 0)")
    args = parser.parse_args(argv)
    source = open_source("synthetic", count=1, size=args.size, seed=args.seed)
    part = args.image.with_name(f".part_{args.image.name}")
    try:
        Image.fromarray(source.read(0)[0]).save(part)
        os.replace(part, args.image)
    except (ValueError, OSError) as error:
        parser.error(f"{args.image}: {error}")
    counts = ", ".join(f"{n} {name}"
                       for n, name in zip(check_source(source)[1], source.class_names))
    print(f"{args.image}: {args.size}x{args.size} pixels of synthetic tissue, nuclei: {counts}")


if __name__ == "__main__":
    main()
