"""Nuclei data: readers, targets, augmentation, and a generator of synthetic tissue.

    source = open_source("CoNSeP")                   # or PanNuke's folder, a plain folder, "synthetic"
    image, inst_map, type_map = source.read(0)       # (H, W, 3) uint8, (H, W) int32, (H, W) uint8
    crops = Crops([(source, range(len(source.names)), 1.0)], source.class_names, crop=256)
    image, type_map, density = crops[0]              # tensors, augmented, targets derived afterwards

Arrays are (y, x); class 0 is background; instance ids are positive. Needs torch, numpy, scipy, pillow.
"""

import csv
import functools
import json
import math
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy import io, ndimage

UNKNOWN_CLASS = 255  # in a type_map: a nucleus whose class the data set does not tell (as in dualunet.py)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
LABEL_SUFFIXES = (".npy", ".npz", ".mat", ".png", ".tif", ".tiff")
MAX_PIXELS = 2**30  # ours: a declared size beyond a gigapixel is refused before it is decoded

CONSEP_CLASSES = ("miscellaneous", "inflammatory", "epithelial", "spindle-shaped")
CONSEP_MERGE = np.array([0, 1, 2, 3, 3, 4, 4, 4], np.uint8)  # published: 7 raw types to 4
PANNUKE_CLASSES = ("neoplastic", "inflammatory", "connective", "dead", "epithelial")
PANNUKE_SPLITS = {1: (1, 2, 3), 2: (2, 1, 3), 3: (3, 2, 1)}  # published: train, validation, test fold


# ---------------------------------------------------------------- files


def read_image(path, max_pixels=MAX_PIXELS):
    """An image file as (H, W, 3) uint8 RGB, turned as its EXIF says; transparency falls on white.

    16-bit images are scaled by 1/257. Of several frames the first counts.
    Raises: FileNotFoundError; ValueError naming the file when it cannot be read or is too large.
    """
    try:
        with Image.open(path) as file:
            if file.width * file.height > max_pixels:
                raise ValueError(f"{path}: declares {file.width}x{file.height} pixels, more than {max_pixels}; "
                                 "cut it into parts or allow it with --max-pixels")
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I") or image.mode == "F":
                return grey_to_rgb(path, np.asarray(image))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image; check the path") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}") from None
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: cannot be decoded ({error}); save it again as PNG") from None
    except Exception as error:  # Pillow raises a dozen kinds on damaged files
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path}: not a readable image ({reason}); expected PNG, JPEG or TIFF") from None


def grey_to_rgb(path, grey):
    """16- or 32-bit grey (H, W) as (H, W, 3) uint8; refused where its range is not 0..65535."""
    if not (grey.min() >= 0 and grey.max() <= 65535 and np.issubdtype(grey.dtype, np.integer)):
        raise ValueError(f"{path}: {grey.dtype} values {grey.min()}..{grey.max()}; expected 8 or 16 bits, "
                         "save it so")
    return np.repeat((grey / 257).round().astype(np.uint8)[..., None], 3, axis=2)


def as_instances(path, labels):
    """A label map as int32 (H, W). Raises: ValueError naming the file for anything but ids in 0..2³¹-1."""
    labels = np.asarray(labels)
    if labels.ndim != 2:
        raise ValueError(f"{path}: instance map has shape {labels.shape}; expected (height, width)")
    if labels.dtype.kind not in "buif" or not np.isfinite(labels).all() or (labels % 1).any():
        raise ValueError(f"{path}: instance map of {labels.dtype} holds values that are no whole numbers; "
                         "expected one id a nucleus, 0 for background")
    if labels.size and (labels.min() < 0 or labels.max() >= 2**31):
        raise ValueError(f"{path}: ids {labels.min():.0f}..{labels.max():.0f}; expected 0..2147483647, relabel it")
    return labels.astype(np.int32)


def read_labels(path):
    """A label file as (instance map int32, {array name: array} found beside it).

    .npy, .png and .tif hold the instance map alone; .npz and .mat hold `inst_map` and perhaps
    `type_map` (H, W) or `inst_type` (N,), indexed by the sorted ids (`id`: by the ids it lists).
    """
    path = Path(path)
    try:
        if path.suffix == ".mat":
            arrays = io.loadmat(path)
        elif path.suffix in (".npy", ".npz"):
            arrays = np.load(path, allow_pickle=False)
            arrays = dict(arrays) if path.suffix == ".npz" else {"inst_map": arrays}
        else:
            with Image.open(path) as file:
                arrays = {"inst_map": np.array(file)}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such label file; check the path") from None
    except Exception as error:  # damaged files raise a dozen kinds, and pickles are refused
        raise ValueError(f"{path}: not a readable label file ({error}); expected "
                         f"{', '.join(LABEL_SUFFIXES)}") from None
    if "inst_map" not in arrays:
        found = ", ".join(k for k in arrays if not k.startswith("__")) or "nothing"
        raise ValueError(f"{path}: no array inst_map in it, found {found}; store the instance map under that name")
    return as_instances(path, arrays["inst_map"]), arrays


def types_by_instance(path, inst_map, ids, classes, num_classes):
    """(H, W) uint8 class map from one class (1..K) an id. Raises: ValueError naming a wrong id or class."""
    ids, classes = np.ravel(ids).astype(np.int64), np.ravel(classes).astype(np.int64)
    present = np.unique(inst_map[inst_map > 0])
    if len(ids) != len(classes):
        raise ValueError(f"{path}: {len(classes)} classes for {len(ids)} nuclei; expected one each")
    if missing := set(present.tolist()) ^ set(ids.tolist()):
        raise ValueError(f"{path}: id {min(missing)} has a class or pixels but not both; expected both for every id")
    if len(classes) and not (1 <= classes.min() and classes.max() <= num_classes):
        raise ValueError(f"{path}: class ids {classes.min()}..{classes.max()}; the list of classes has {num_classes}")
    lookup = np.zeros(max(ids.max(initial=0), 0) + 1, np.uint8)
    lookup[ids] = classes
    return lookup[inst_map]


# ---------------------------------------------------------------- synthetic tissue

SYNTHETIC_CLASSES = ("miscellaneous", "inflammatory", "epithelial", "spindle-shaped")  # as CoNSeP's
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


def _paint(rng, kind, look, y, x, angle, label, stains, inst_map, chromatin, yy, xx):
    """Paint one object inside its own box of `stains` and `inst_map`; False if there is no room."""
    a, b, pointed, body, rim, clumps, nucleoli, eosin, blood = KINDS[kind]
    a, b = ((a, b) * rng.normal(look[0], 0.2, 2).clip(0.6, 1.7)).tolist()
    r = int(1.2 * max(a, b)) + 2
    box = slice(max(y - r, 0), y + r + 1), slice(max(x - r, 0), x + r + 1)
    dy, dx = yy[box[0]] - y, xx[:, box[1]] - x
    u = (dx * math.cos(angle) + dy * math.sin(angle)) / a
    v = (dy * math.cos(angle) - dx * math.sin(angle)) / b + rng.normal(0, 0.2) * u * u
    phi = np.arctan2(v, u)
    wobble = sum(rng.normal(0, 0.11 / k) * np.cos(k * phi + rng.uniform(0, 6.3)) for k in (2, 3, 5))
    rho = (abs(u) ** pointed + abs(v) ** pointed) ** (1 / pointed) / (1 + wobble)

    parts, _ = ndimage.label((rho < 1) & (inst_map[box] == 0))
    sizes = np.bincount(parts.ravel(), minlength=2)[1:]
    if sizes.max() < max(20, 0.85 * (rho < 1).sum()):
        return False
    mask = parts == sizes.argmax() + 1  # one 4-connected piece

    hema = body + rim * np.exp(-(((1 - rho) * min(a, b) - 0.7) / 1.3) ** 2)
    for cu, cv in rng.uniform(-0.5, 0.5, (2, 2)).tolist() if nucleoli else ():
        hema += nucleoli * np.exp(-((u - cu) * a / 2) ** 2 - ((v - cv) * b / 2) ** 2)
    hema = (hema + clumps * chromatin[box]).clip(0) * look[1] * rng.lognormal(0, 0.2)
    layers = hema, eosin * (1 + 0.2 * chromatin[box]), blood * (0.7 + 0.3 * rho)
    for stain, layer in zip(stains, layers):
        stain[box][mask] = layer[mask]
    inst_map[box][mask] = label
    return True


def synthetic_tissue(seed, size=256):
    """Made-up H&E tissue at 0.25 µm per pixel with its truth; the same for the same seed.

    Glands, stroma whose spindle-shaped nuclei follow its fibres, inflammatory clusters, lumina,
    glass, blood; "miscellaneous" is rare, one tile in twenty has no nucleus. `size` is a side or
    (height, width). Returns image (H, W, 3) uint8, inst_map (H, W) int32 and type_map (H, W)
    uint8, whose ids 1 to 4 follow SYNTHETIC_CLASSES.
    """
    rng = np.random.default_rng(seed)
    h, w = np.broadcast_to(size, 2).tolist()

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
    stains = np.stack((hema, eosin, 0 * eosin)).clip(0)
    stains *= solid * (1 - 0.9 * gaps * (1 - epithelium))

    # cells: candidates, thinned to each kind's rate per pixel, dropped where there is no room
    upright = np.exp(-((gland - 0.75) / rng.uniform(0.3, 1.2)) ** 2)  # from rings to solid sheets
    rates = solid * np.stack((
        0 * solid + 4e-5, 4e-3 * infiltrate + 5e-5, 7e-3 * epithelium * upright,
        rng.uniform(3e-4, 9e-4) * stroma, 4e-3 * stroma * above(noise(40), rng.uniform(2, 3), 0.3),
        rng.uniform(0, 2e-4) * epithelium, 0 * solid + 1e-4))
    rates[:4] *= rng.uniform(0.1, 0.8) * (rng.random() > 0.05)
    n = int(0.015 * (h + 12) * (w + 12))
    y, x = rng.integers(-6, h + 6, n), rng.integers(-6, w + 6, n)  # the border cuts some
    i, j = y.clip(3, h - 4), x.clip(3, w - 4)
    kinds = 1 + (rng.random(n) > np.cumsum(rates[:, i, j] / 0.015, 0)).sum(0)
    guide, g = np.stack((across, gland)), (kinds == 3).astype(int)  # epithelium stands on its edge
    slope = guide[g, i + 3, j] - guide[g, i - 3, j], guide[g, i, j + 3] - guide[g, i, j - 3]
    angles = np.arctan2(*slope) + (1 - g) * math.pi / 2 + rng.normal(0, 0.25, n)

    looks = rng.lognormal(0, (0.08, 0.15), (8, 2)).tolist()  # size and strength in this tile
    inst_map, inst_type = np.zeros((h, w), np.int32), [0]
    canvas = stains, inst_map, fine, yy, xx
    for kind, *place in zip(*(values.tolist() for values in (kinds, y, x, angles))):
        label = len(inst_type) if kind <= 4 else 0
        if kind in KINDS and _paint(rng, kind, looks[kind], *place, label, *canvas) and label:
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
    """A labelled data set: `read(i)` gives image (H, W, 3) uint8, inst_map int32 and type_map uint8."""

    names: Sequence[str]
    class_names: Sequence[str]
    read: Callable  # of a picklable kind: worker processes receive it
    tissues: Sequence[str] | None = None  # one a name, where the set tells


def check_sizes(path, image, *maps):
    """Raises ValueError naming the label file where a map's (H, W) is not the image's."""
    for array in maps:
        if array.shape != image.shape[:2]:
            raise ValueError(f"{path}: labels are {array.shape}, the image is {image.shape[:2]}; expected equal")


def read_consep(images, i):
    image, path = read_image(images[i]), images[i].parents[1] / "Labels" / f"{images[i].stem}.mat"
    inst_map, arrays = read_labels(path)
    types = np.asarray(arrays.get("type_map", np.zeros((0, 0))))
    check_sizes(path, image, inst_map, types)
    if types.max(initial=0) > 7 or types.min(initial=0) < 0:
        raise ValueError(f"{path}: class ids {types.min():.0f}..{types.max():.0f}; CoNSeP has 0..7")
    return image, inst_map, CONSEP_MERGE[types.astype(np.uint8)] * (inst_map > 0)


def consep_source(root):
    """CoNSeP as distributed: Images/*.png and Labels/*.mat, its 7 types merged to the published 4."""
    images = sorted((root / "Images").glob("*.png"), key=lambda p: (len(p.name), p.name))
    return Source([p.stem for p in images], CONSEP_CLASSES, functools.partial(read_consep, images))


@functools.lru_cache
def mapped(path):
    """A memory-mapped .npy; opened by each process for itself. Raises: ValueError naming the file."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); expected PanNuke's own .npy") from None


def read_pannuke(index, n):
    images, masks, i = index[n]
    image = np.clip(mapped(images)[i], 0, 255).astype(np.uint8)  # often float64 holding 0..255
    mask = np.asarray(mapped(masks)[i][..., :5])  # (256, 256, 5) ids; the sixth channel is background
    first = (mask > 0).argmax(-1)  # where channels overlap, the first counts
    ids = np.take_along_axis(mask, first[..., None], -1)[..., 0].astype(np.int64)
    type_map = ((first + 1) * (ids > 0)).astype(np.uint8)
    codes, inst_map = np.unique(ids * 8 + type_map, return_inverse=True)  # ids may repeat among channels
    inst_map = inst_map.reshape(ids.shape) + (codes[0] > 0)
    return image, inst_map.astype(np.int32), type_map


def pannuke_source(root):
    """PanNuke as distributed: Fold {k}/{images/fold{k}/{images,types},masks/fold{k}/masks}.npy, mapped."""
    index, names, tissues = [], [], []
    for k in (1, 2, 3):
        if not (root / f"Fold {k}").is_dir():
            continue
        images, masks, types = (root / f"Fold {k}" / name for name in (
            f"images/fold{k}/images.npy", f"masks/fold{k}/masks.npy", f"images/fold{k}/types.npy"))
        if not len(mapped(images)) == len(mapped(masks)) == len(mapped(types)):
            raise ValueError(f"{root / f'Fold {k}'}: images, masks and types differ in number; download again")
        index += [(images, masks, i) for i in range(len(mapped(images)))]
        names += [f"fold{k}/{i}" for i in range(len(mapped(images)))]
        tissues += map(str, mapped(types))
    return Source(names, PANNUKE_CLASSES, functools.partial(read_pannuke, index), tissues)


def read_json(path):
    """A JSON file's content. Raises: ValueError naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None


def read_folder(pairs, class_names, i):
    image_path, path = pairs[i]
    image, (inst_map, arrays) = read_image(image_path), read_labels(path)
    check_sizes(path, image, inst_map)
    ids, first = np.unique(inst_map, return_index=True)
    ids, first = ids[ids > 0], first[ids > 0]
    types_path = path.parents[1] / "types" / f"{path.stem}.json"
    if types_path.exists():
        path, types = types_path, read_json(types_path)
        if unknown := set(types.values()) - set(class_names):
            raise ValueError(f"{path}: class {unknown.pop()!r} is not among {', '.join(class_names)}")
        ids, types = list(types), [class_names.index(name) + 1 for name in types.values()]
    elif "type_map" in arrays:
        types = np.asarray(arrays["type_map"])
        check_sizes(path, image, types)
        types = types.ravel()[first]
    elif "inst_type" in arrays or "class" in arrays:  # "class" and "id": Lizard, CoNIC
        types, ids = arrays.get("inst_type", arrays.get("class")), arrays.get("id", ids)
    elif len(class_names) > 1:
        raise ValueError(f"{path}: no classes in it; expected type_map, inst_type or {types_path}")
    else:
        types = np.ones(len(ids), np.uint8)
    return image, inst_map, types_by_instance(path, inst_map, ids, types, len(class_names))


def folder_source(root):
    """A plain folder: images/*, labels/<name>.*, and classes from types/<name>.json or inside the labels.

    Names come from classes.json (a list), else from the types files; without either every nucleus is
    one class, "nucleus".
    """
    images = sorted(p for p in (root / "images").iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    labels = {p.stem: p for p in (root / "labels").iterdir() if p.suffix.lower() in LABEL_SUFFIXES}
    if missing := [p.name for p in images if p.stem not in labels]:
        raise ValueError(f"{root}: no label for {missing[0]} ({len(missing)} such); expected labels/<name> with "
                         f"one of {', '.join(LABEL_SUFFIXES)}")
    if (root / "classes.json").exists():
        class_names = list(read_json(root / "classes.json"))
    else:
        class_names = sorted(set().union(*(read_json(p).values() for p in (root / "types").glob("*.json"))))
    pairs = [(p, labels[p.stem]) for p in images]
    class_names = class_names or ["nucleus"]
    return Source([p.stem for p in images], class_names, functools.partial(read_folder, pairs, class_names))


def read_predictions(folder, name, class_names):
    """What infer.py wrote of an image: its inst_map and one class id (1..K) a nucleus, in order of id."""
    table = Path(folder) / f"{name}_nuclei.csv"
    inst_map, _ = read_labels(Path(folder) / f"{name}_instances.tif")
    with open(table, newline="", encoding="utf-8") as file:
        found = {int(row["id"]): row["class"] for row in csv.DictReader(file)}
    if sorted(found) != list(range(1, int(inst_map.max()) + 1)):
        raise ValueError(f"{table}: {len(found)} rows for ids up to {inst_map.max()} in the label map; run infer.py again")
    classes = [found[i] for i in sorted(found)]
    if unknown := set(classes) - set(class_names):
        raise ValueError(f"{table}: class {unknown.pop()!r} is not among {', '.join(class_names)}")
    return inst_map, np.array([class_names.index(name) + 1 for name in classes], np.int64)


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
    source = None
    for folder in (root / "Train", root):
        if (folder / "Images").is_dir() and (folder / "Labels").is_dir():
            source = consep_source(folder)
            break
    else:
        if (root / "images").is_dir() and (root / "labels").is_dir():
            source = folder_source(root)
        elif any(root.glob("Fold ?")):
            source = pannuke_source(root)
    if source is None or not source.names:
        raise ValueError(f"{path}: no labelled images found; expected CoNSeP (Images/*.png, Labels/*.mat), "
                         "PanNuke (Fold 1/...) or images/ beside labels/")
    return source


# ---------------------------------------------------------------- targets


def centroids_of(inst_map):
    """(N, 2) float64 centroids (y, x): the mean pixel index of every id, in the order of the ids."""
    y, x = np.nonzero(inst_map)
    _, index, area = np.unique(inst_map[y, x], return_inverse=True, return_counts=True)
    return np.stack([np.bincount(index, weights=axis, minlength=len(area)) / area for axis in (y, x)], 1)


def density_map(centroids, shape, sigma=5.0, combine="max"):
    """A Gaussian peak on each nucleus: (H, W) float32 in [0, 1]; zeros where there is none.

    centroids: (N, 2) (y, x), may lie outside. combine: "max" gives every nucleus a peak of exactly 1
    at its centroid's pixel, whatever its neighbours and the crop; "sum" is the published form, Gaussians
    added up and divided by the image's maximum, where close nuclei melt and isolated ones fade.
    """
    y, x = np.round(np.asarray(centroids, float).reshape(-1, 2)).astype(int).T
    pad = int(np.ceil(4 * sigma)) if combine == "max" else 0  # a peak just outside still reaches in
    inside = (y >= -pad) & (x >= -pad) & (y < shape[0] + pad) & (x < shape[1] + pad)
    if not inside.any():
        return np.zeros(shape, np.float32)
    if combine == "max":
        empty = np.ones((shape[0] + 2 * pad, shape[1] + 2 * pad), bool)
        empty[y[inside] + pad, x[inside] + pad] = False
        distance = ndimage.distance_transform_edt(empty)[pad:shape[0] + pad, pad:shape[1] + pad]
        return np.exp(-(distance**2) / (2 * sigma**2)).astype(np.float32)
    if combine == "sum":
        points = np.zeros(shape)
        points[y[inside], x[inside]] = 1
        points = ndimage.gaussian_filter(points, sigma, mode="constant")
        return (points / points.max()).astype(np.float32)
    raise ValueError(f"combine is {combine!r}; expected 'max' or 'sum'")


# ---------------------------------------------------------------- augmentation

HED_FROM_OD = np.linalg.inv(  # Ruifrok and Johnston 2001: rows haematoxylin, eosin, residual
    np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
)
OPTICAL_DENSITY = -np.log((np.arange(256) + 1) / 256).astype(np.float32)


def stain_shift(image, scale, shift):
    """The image with its haematoxylin, eosin and residual amounts scaled and shifted.

    image: (H, W, 3) uint8; scale, shift: 3 floats each (1 and 0 change nothing), shift in optical
    density. Returns (H, W, 3) uint8.
    """
    mix = HED_FROM_OD @ np.diag(scale) @ np.linalg.inv(HED_FROM_OD)
    od = OPTICAL_DENSITY[image] @ mix.astype(np.float32) + (shift @ np.linalg.inv(HED_FROM_OD)).astype(np.float32)
    return np.clip(256 * np.exp(-od) - 1 + 0.5, 0, 255).astype(np.uint8)


def reflect(start, stop, length):
    """Indices start..stop-1 folded into 0..length-1 as np.pad's "reflect", and the fold each came from."""
    index = np.arange(start, stop)
    period = max(2 * (length - 1), 1)
    phase = index % period
    return np.minimum(phase, period - phase) if length > 1 else index * 0, index // max(length - 1, 1)


def cut(sample, y0, x0, height, width):
    """A window of (image, inst_map, type_map), extended by reflection; a mirrored nucleus is another one."""
    (iy, fold_y), (ix, fold_x) = (reflect(s, s + n, length) for s, n, length in
                                  zip((y0, x0), (height, width), sample[1].shape))
    image, inst_map, type_map = (array[iy[:, None], ix] for array in sample)
    fold = (fold_y - fold_y.min())[:, None] * (np.ptp(fold_x) + 1) + (fold_x - fold_x.min())
    if fold.any():
        code = inst_map + fold * (int(sample[1].max()) + 1)
        inst_map = np.where(inst_map > 0, np.unique(code, return_inverse=True)[1].reshape(code.shape) + 1, 0)
    return image, inst_map.astype(np.int32), type_map


def augment(sample, rng, crop, *, scale=1.25, blur=0.2, stain=1.0, margin=16):
    """A random crop of (image, inst_map, type_map) under flips, quarter turns, scale, blur and stain variation.

    scale: largest zoom in or out; blur: how often; stain: strength, 0 for none. The result is
    crop + 2·margin wide, so that a nucleus cut by the crop keeps its true centroid.
    """
    side = crop + 2 * margin
    zoom = np.exp(rng.uniform(-1, 1) * np.log(scale))
    window = round(side / zoom)
    y0, x0 = (int(rng.integers(0, max(length - round(crop / zoom), 0) + 1)) - round(margin / zoom)
              for length in sample[1].shape)
    image, inst_map, type_map = cut(sample, y0, x0, window, window)
    if window != side:
        resize = functools.partial(Image.Image.resize, size=(side, side))
        image = np.array(resize(Image.fromarray(image), resample=Image.Resampling.BICUBIC))
        inst_map, type_map = (np.array(resize(Image.fromarray(m), resample=Image.Resampling.NEAREST))
                              for m in (inst_map, type_map))
    turns, mirror = rng.integers(4), rng.integers(2)
    image, inst_map, type_map = (np.rot90(m[:, ::-1] if mirror else m, turns) for m in (image, inst_map, type_map))
    if rng.random() < blur:
        image = ndimage.gaussian_filter(image, (*[rng.uniform(0.4, 1.4)] * 2, 0))
    if stain:
        image = stain_shift(image, 1 + stain * rng.uniform(-0.3, 0.3, 3), stain * rng.uniform(-0.08, 0.08, 3))
    return image, inst_map, type_map


def class_lookup(source, class_names):
    """(256,) uint8 from a source's class ids to those of `class_names`. Raises: ValueError for a stranger."""
    lookup = np.zeros(256, np.uint8)
    for k, name in enumerate(source.class_names, 1):
        if list(class_names) == ["nucleus"]:
            lookup[k] = 1
        elif name in class_names:
            lookup[k] = class_names.index(name) + 1
        elif list(source.class_names) == ["nucleus"]:
            lookup[k] = UNKNOWN_CLASS
        else:
            raise ValueError(f"class {name!r} is not among {', '.join(class_names)}; name classes alike in all sets")
    return lookup


class Crops(torch.utils.data.Dataset):
    """Endless augmented crops: item n depends on (seed, n) alone, whatever the workers and the order.

    parts: (source, indices of its images, share of the crops). Classes are merged by name into
    `class_names`; a set that only says "nucleus" teaches UNKNOWN_CLASS where there are several.
    An item is image (3, crop, crop) uint8, type_map (crop, crop) uint8, density (1, crop, crop) float32.
    """

    def __init__(self, parts, class_names, *, crop, seed=0, sigma=5.0, combine="max", cache=128, **augmentation):
        self.sources = [source for source, *_ in parts]
        self.indices = [list(indices) for _, indices, _ in parts]
        self.shares = np.array([share for *_, share in parts]) / sum(share for *_, share in parts)
        self.lookups = [class_lookup(source, class_names) for source in self.sources]
        self.crop, self.seed, self.sigma, self.combine, self.augmentation = crop, seed, sigma, combine, augmentation
        self.cache, self.cache_size = {}, cache  # the last images read, in each worker

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
        image, inst_map, type_map = augment(self.cache[part, i], rng, self.crop, **self.augmentation)
        margin = (inst_map.shape[0] - self.crop) // 2
        inner = slice(margin, margin + self.crop)
        density = density_map(centroids_of(inst_map) - margin, (self.crop, self.crop), self.sigma, self.combine)
        return (torch.from_numpy(image[inner, inner].transpose(2, 0, 1).copy()),
                torch.from_numpy(self.lookups[part][type_map[inner, inner]]), torch.from_numpy(density)[None])
