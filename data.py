"""Reads data sets of nuclei in several layouts, makes synthetic tissue, and checks your set.

    source = open_source("CoNSeP")                # or PanNuke, images/ beside labels/, "synthetic"
    image, inst_map, type_map = source.read(0)    # (H, W, 3) uint8, (H, W) int32, (H, W) uint8

`python data.py FOLDER` checks a set and draws it. Arrays are (y, x); class 0 is background, 255 a
nucleus of unknown class; ids count from 1. Needs numpy, scipy, pillow, images.py, labels.py and
outputs.py.
"""

import argparse
import contextlib
import difflib
import functools
import itertools
import math
import sys
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import numpy as np
from PIL import ImageColor
from scipy import ndimage

from images import SAME_MPP, check_mpp, explain_errors, read_image
from labels import (LAYOUTS, UNKNOWN_CLASS, class_table, find_files, folder_classes, match_classes,
                    number_ids, only_label, read_labels, read_names)
from outputs import outlined, titled_panel

CONSEP_CLASSES = ("miscellaneous", "inflammatory", "epithelial", "spindle-shaped")
CONSEP_TYPES = (0, 1, 2, 2, 3, 3, 3)  # published: its seven types merged to the four
PANNUKE_CLASSES = ("neoplastic", "inflammatory", "connective", "dead", "epithelial")
PANNUKE_SPLITS = {1: (1, 2, 3), 2: (2, 1, 3), 3: (3, 2, 1)}  # published: train, val, test fold
USUAL_MPP = 0.25  # 40x: CoNSeP, PanNuke, and files that state nothing
FAR_OFF = (4, 12)  # ours: µm; medians of nine sets are 4.1 to 7.8, or half if 20x is taken for 40x
RARE = 20  # ours: a class of fewer nuclei teaches nothing, and may be a misspelt name
COLORS = ("cyan", "red", "blue", "lime", "yellow", "orange")  # of classes, in order; first CoNSeP's


class Source(NamedTuple):
    """A labelled set: `read(i)` gives image (H, W, 3) uint8, inst_map int32 and type_map uint8.

    type_map: 0 background, 1..K, UNKNOWN_CLASS. notes: sentences for the user.
    """

    names: Sequence[str]
    class_names: Sequence[str]
    read: Callable  # picklable, because worker processes receive it
    tissues: Sequence[str] | None = None  # one for each image, if the set states them
    mpp: float = USUAL_MPP  # µm per pixel
    notes: Sequence[str] = ()


# ---------------------------------------------------------------- classes


def nucleus_classes(inst_map, type_map):
    """(N,) int64: one class for each id present, in ascending order of id."""
    ids, first = np.unique(inst_map, return_index=True)
    classes = type_map.ravel()[first]
    return classes[ids > 0].astype(np.int64)


def class_lookup(source, class_names, unknown=()):
    """(256,) uint8 from a source's class ids to those of `class_names`.

    Classes of `unknown` become UNKNOWN_CLASS, and so does "nucleus" beside other class names.
    Raises: ValueError for a class that is neither in `class_names` nor in `unknown`.
    """
    lookup = np.ones(256, np.uint8)
    lookup[0] = 0
    if list(class_names) == ["nucleus"]:
        return lookup
    classes = {"nucleus": UNKNOWN_CLASS}
    classes |= {name: k for k, name in enumerate(class_names, 1)}
    classes |= dict.fromkeys(unknown, UNKNOWN_CLASS)
    lookup[UNKNOWN_CLASS] = UNKNOWN_CLASS
    for k, name in enumerate(source.class_names, 1):
        if name not in classes:
            raise ValueError(f"class {name!r} is not among {', '.join(class_names)}; "
                             "name them alike")
        lookup[k] = classes[name]
    return lookup


def read_chosen(read, lookup, i):
    """Image i of another source, as `Source.read` gives it, with classes from a lookup."""
    image, inst_map, type_map = read(i)
    return image, inst_map, lookup[type_map]


def choose_classes(source, classes, unknown):
    """The source with the classes that `open_source` was given."""
    own = source.class_names
    if not set(unknown) <= set(own):
        raise ValueError(f"no class {', '.join(unknown)} to take as unknown; there are "
                         f"{', '.join(own)}")
    names = classes or [name for name in own if name not in unknown]
    lookup = class_lookup(source, names, unknown)
    read = functools.partial(read_chosen, source.read, lookup)
    return source._replace(class_names=names, read=read)


# ---------------------------------------------------------------- folders


def read_folder(files, labels, class_names, known, mpp, i):
    """Image i of a folder, as `Source.read` gives it.

    labels: a folder. known: from `class_table`. mpp: that of the set;
    an image that states another is refused. None: do not check.
    """
    path, own = files[i]
    label_path = only_label(path, own, labels)
    image = read_image(path)
    # refuse an image that its labels may not fit
    if image.turned:
        raise ValueError(f"{path}: it has an EXIF orientation, but labels may be drawn on it "
                         "turned or not; save it as PNG without EXIF, turned as its labels are")
    if mpp and image.mpp and abs(image.mpp - mpp) > SAME_MPP * mpp:
        raise ValueError(f"{path}: it states {image.mpp:g} µm per pixel, but the set is read at "
                         f"{mpp:g}; resample it with its labels, or give --data-mpp for all")

    # nuclei, and their classes in the labels or beside them
    inst_map, ids, classes = read_labels(label_path, image.pixels.shape[:2])
    named = label_path
    types_path = labels.with_name("types") / f"{path.stem}.json"
    if label_path.suffix.lower() != ".geojson" and types_path.exists():
        named, classes = types_path, read_names(types_path)
    if classes is None:
        if len(class_names) > 1:
            raise ValueError(f"{label_path}: no classes in it; expected type_map, inst_type or "
                             f"{types_path} ({{}} where no class is known)")
        classes = dict.fromkeys(ids.tolist(), class_names[0])
    class_ids = match_classes(named, ids, classes, known)
    class_ids = np.append(0, class_ids).astype(np.uint8)
    return image.pixels, inst_map, class_ids[inst_map]


def folder_source(root, consep, mpp):
    """images/*, labels/<name>.*, classes in types/<name>.json or the labels; or CoNSeP's folders.

    mpp: of the images; None: as the first image states. Images that state another are refused.
    """
    images, labels = root / "images", root / "labels"
    if consep:
        images, labels = root / "Images", root / "Labels"
    files, skipped = find_files(images, labels)

    # names; CoNSeP's are sorted by length, so that train_2 comes before train_10
    if consep:
        files.sort(key=lambda pair: len(pair[0].name))
        names = {number: CONSEP_CLASSES[k] for number, k in enumerate(CONSEP_TYPES, 1)}
        mpp = mpp or USUAL_MPP
    else:
        names = folder_classes(root, files)
    class_names, known = class_table(names)
    image_names = [image.stem for image, _ in files]

    # resolution
    notes = [skipped] if skipped else []
    expected = None
    if mpp is None:
        expected = USUAL_MPP
        note = ("no resolution in the images: assumed 0.25 µm per pixel (40x); give --data-mpp "
                "otherwise")
        with contextlib.suppress(OSError, ValueError):  # reported when the image is read
            stated = read_image(files[0][0]).mpp
            if stated:
                expected = stated
                note = f"the images state {stated:g} µm per pixel"
        notes.append(note)
    read = functools.partial(read_folder, files, labels, class_names, known, expected)
    return Source(image_names, class_names, read, None, mpp or expected, notes)


# ---------------------------------------------------------------- PanNuke


def mapped(path):
    """A memory-mapped array."""
    with explain_errors(path, "array", "expected PanNuke's own .npy"):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def read_pannuke(root, names, n):
    """Tile n, as `Source.read` gives it. If channels of the mask overlap, the first wins."""
    fold, i = names[n].split("/")
    folder = root / f"Fold {fold[-1]}"
    image = mapped(folder / "images" / fold / "images.npy")[int(i)]  # often float64 0..255
    masks = mapped(folder / "masks" / fold / "masks.npy")[int(i)]  # (256, 256, 6)

    # ids by class, background last; the same id in two channels is two nuclei
    masks = masks[..., :5].astype(np.int64)
    channel = np.argmax(masks > 0, axis=2)
    ids = np.take_along_axis(masks, channel[..., None], axis=2)
    ids = ids[..., 0]
    type_map = np.where(ids > 0, channel + 1, 0)
    inst_map, _ = number_ids(6 * ids + type_map)
    return image.clip(0, 255).astype(np.uint8), inst_map, type_map.astype(np.uint8)


def pannuke_source(root):
    """PanNuke's files: Fold {k}/{images/fold{k}/{images,types},masks/fold{k}/masks}.npy, mapped."""
    names, tissues = [], []
    for k in (1, 2, 3):
        folder = root / f"Fold {k}"
        if folder.is_dir():
            types = mapped(folder / "images" / f"fold{k}" / "types.npy")
            names += [f"fold{k}/{i}" for i in range(len(types))]
            tissues += types.tolist()
    read = functools.partial(read_pannuke, root, names)
    return Source(names, list(PANNUKE_CLASSES), read, tissues)


# ---------------------------------------------------------------- check


def check_source(source):
    """Reads a whole set: {i: problem of image i}, (256,) nuclei of each class, all areas.

    The fourth result, {class id: name of the first image with such a nucleus}, helps to find it.
    """
    problems, examples = {}, {}
    counts = np.zeros(256, np.int64)
    areas = []
    for i in range(len(source.names)):
        try:
            _, inst_map, type_map = source.read(i)
        except (ValueError, OSError) as error:
            problems[i] = str(error)
            continue
        classes = nucleus_classes(inst_map, type_map)
        counts += np.bincount(classes, minlength=256)
        areas += np.bincount(inst_map.ravel())[1:].tolist()
        for k in np.unique(classes).tolist():
            examples.setdefault(k, source.names[i])
    return problems, counts, areas, examples


def strange_classes(names, classes, counts, examples):
    """Sentences on the classes of a set that the user's list `classes` lacks."""
    result = []
    for k, name in enumerate(names, 1):
        if name not in classes:
            where = examples.get(k, "none that could be read")
            result.append(f"class {name!r} is not among {', '.join(classes)}; it has {counts[k]} "
                          f"nuclei, the first in {where}")
    return result


def doubtful_classes(names, counts, examples):
    """Sentences on doubtful classes: numbers among names, similar names, rare classes."""
    result = []
    numbers = [name for name in names if name.isdecimal()]
    if 0 < len(numbers) < len(names):
        result.append(f"class {numbers[0]!r} is a number among names")
    for first, second in itertools.combinations(names, 2):
        match = difflib.SequenceMatcher(None, first.casefold(), second.casefold())
        if match.ratio() > 0.85:
            result.append(f"classes {first!r} and {second!r} are nearly alike: one class?")
    for k, name in enumerate(names, 1):
        if counts[k] < RARE and len(names) > 1:
            where = f", the first in {examples[k]}" if k in examples else ""
            result.append(f"class {name!r} has {counts[k]} nuclei{where}: misspelt, or too rare?")
    return result


def crowded_window(inst_map, side):
    """Slices of the square, of `side` pixels at most, that holds most of the nuclei's pixels."""
    side = min(side, *inst_map.shape)
    inside = (inst_map > 0).astype(np.float32)
    filled = ndimage.uniform_filter(inside, side)
    centre = ndimage.maximum_position(filled)
    last = np.subtract(inst_map.shape, side)
    corner = np.subtract(centre, side // 2).clip(0, last)
    y, x = corner.tolist()
    return slice(y, y + side), slice(x, x + side)


def contact_sheet(source, indices, side=128):
    """A Pillow image of outlined nuclei: 24 crops at most, from all over the set, six a row."""
    colors = [ImageColor.getrgb(name) for name in COLORS] * 42  # for all 252 classes
    step = 1 + (len(indices) - 1) // 24
    pictures, titles = [], []
    for n, i in enumerate(indices[::step]):
        image, inst_map, type_map = source.read(i)
        window = crowded_window(inst_map, side)
        inst_map, _ = number_ids(inst_map[window])
        classes = nucleus_classes(inst_map, type_map[window])
        picture = outlined(image[window], inst_map, classes, colors, scale=2, width=2)

        # a new row when the last one is full
        if n % 6 == 0:
            pictures.append([])
            titles.append([])
        pictures[-1].append(picture)
        titles[-1].append(source.names[i])
    return titled_panel(pictures, titles, source.class_names, colors, unknown=True)


# ---------------------------------------------------------------- synthetic tissue

KINDS = (  # ours: two semi-axes in pixels and the haematoxylin, for each of CONSEP_CLASSES
    (4.5, 4.0, 1.30),  # shrunken and black
    (6.5, 6.0, 0.80),  # round and dark
    (11.0, 8.5, 0.40),  # large and pale
    (14.0, 4.5, 0.55),  # slim
)
STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11))  # H, E: Ruifrok, Johnston 2001


def draw_nucleus(rng, place, inst_map, hematoxylin, kind):
    """Draws a nucleus at a random place if there is room; returns whether there was.

    place: (H, W) complex, x + iy of each pixel: a complex product is a rotation.
    """
    long, short, stain = KINDS[kind] * rng.uniform(0.75, 1.3, 3)
    y, x = rng.integers(inst_map.shape)
    box = slice(max(y - 20, 0), y + 20), slice(max(x - 20, 0), x + 20)
    turn = np.exp(1j * rng.uniform(0, np.pi))
    offset = (place[box] - place[y, x]) * turn
    ellipse = np.hypot(offset.real / long, offset.imag / short) < 1

    # draw the part on free ground, if that is one piece and most of the nucleus
    free = ellipse & (inst_map[box] == 0)
    _, pieces = ndimage.label(free)
    if pieces != 1 or free.sum() < 0.8 * ellipse.sum():
        return False
    inst_map[box][free] = inst_map.max() + 1
    hematoxylin[box][free] = stain
    return True


def synthetic_tissue(seed, size=256):
    """Synthetic H&E tissue at 0.25 µm per pixel, as from `Source.read`; the seed determines it.

    Classes are CONSEP_CLASSES; one tile in twenty has no nucleus. size: a side or (height, width).
    """
    rng = np.random.default_rng(seed)
    shape = tuple(np.broadcast_to(size, 2))
    rows, columns = np.indices(shape)
    place = columns + 1j * rows
    inst_map = np.zeros(shape, np.int32)
    hematoxylin = np.full(shape, 0.08)
    fibres = rng.normal(0, 0.7, shape)
    eosin = 0.25 + ndimage.gaussian_filter(fibres, 4)

    # nuclei; in one tile of twenty there are none
    crowding = rng.uniform(-0.00025, 0.005)
    tries = int(inst_map.size * max(crowding, 0))
    types = [0]
    for kind in rng.choice(4, tries, p=(0.1, 0.3, 0.4, 0.2)):
        if draw_nucleus(rng, place, inst_map, hematoxylin, kind):
            types.append(kind + 1)
    type_map = np.array(types, np.uint8)[inst_map]
    eosin[inst_map > 0] = 0.12

    # the microscope: blur, absorption by the stains, noise
    stains = ndimage.gaussian_filter((hematoxylin, eosin), (0, 0.8, 0.8))
    density = np.tensordot(stains, STAINS, (0, 0))  # (H, W, 3)
    image = 240 * np.exp(-1.8 * density)
    image += rng.normal(0, 3, image.shape)
    return image.clip(0, 255).astype(np.uint8), inst_map, type_map


def read_synthetic(seed, size, i):
    """Tile i of the synthetic set, as `Source.read` gives it."""
    return synthetic_tissue((seed, i), size)


# ---------------------------------------------------------------- any data set, and the command


def open_source(path, *, classes=None, unknown=(), mpp=None, count=120, size=256, seed=0):
    """The data set at `path`, its layout recognised; "synthetic" gives `count` generated images.

    classes: the only class names allowed, in this order; None takes the set's own. unknown: names
    of classes that become UNKNOWN_CLASS. mpp: of the images; None: as they state.
    Raises: FileNotFoundError; ValueError that lists what was found if no layout fits.
    """
    if mpp is not None:
        check_mpp(mpp, "--data-mpp")
    root = Path(path)
    if (root / "Train" / "Images").is_dir():
        root = root / "Train"
    found = sorted(child.name for child in root.glob("*"))  # exact case, unlike is_dir()

    # its layout
    if str(path) == "synthetic":
        names = [f"synthetic_{i}" for i in range(count)]
        read = functools.partial(read_synthetic, seed, size)
        source = Source(names, list(CONSEP_CLASSES), read)
    elif not root.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; give a data set or the word synthetic")
    elif any(root.glob("Fold [123]")):
        source = pannuke_source(root)
    elif "Images" in found and any(root.glob("Labels/*.mat")):
        source = folder_source(root, True, mpp)
    elif "images" in found and "labels" in found:
        source = folder_source(root, False, mpp)
    else:
        raise ValueError(f"{root}: found {', '.join(found[:9]) or 'nothing'}; {LAYOUTS}")

    # a set without classes keeps its one class
    if (classes or unknown) and list(source.class_names) != ["nucleus"]:
        try:
            source = choose_classes(source, classes, unknown)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return source._replace(mpp=mpp or source.mpp)


def check_folder(path, out, classes, mpp):
    """Checks one set, prints a report, draws a contact sheet; returns the number of problems."""
    try:
        source = open_source(path, mpp=mpp)
    except (OSError, ValueError) as error:
        print(f"{path}\n  problem: {error}")
        return 1
    problems, counts, areas, examples = check_source(source)
    sentences = list(problems.values())
    if classes and list(source.class_names) != ["nucleus"]:
        sentences += strange_classes(source.class_names, classes, counts, examples)

    # print the counts
    print(f"{path}: {len(source.names)} images, {len(areas):,} nuclei")
    for k, name in enumerate(source.class_names, 1):
        print(f"  {name}: {counts[k]:,}")
    print(f"  of unknown class: {counts[UNKNOWN_CLASS]:,}")
    for note in source.notes:
        print(f"  note: {note}")

    # print what looks wrong
    for doubt in doubtful_classes(source.class_names, counts, examples):
        print(f"  warning: {doubt}")
    if areas:
        area = np.median(areas)
        diameter = 2 * math.sqrt(area / math.pi) * source.mpp  # µm
        print(f"  median diameter: {diameter:.1f} µm at {source.mpp:g} µm per pixel "
              "(usual: 6 to 10 µm)")
        if not FAR_OFF[0] <= diameter <= FAR_OFF[1]:
            print("  warning: that is far off; 0.25 µm per pixel is 40x, 0.5 is 20x; give "
                  "--data-mpp")
    elif not problems:
        print("  warning: no nucleus was read; are these the right labels?")
    for sentence in sentences:
        print(f"  problem: {sentence}")

    # draw the readable images
    good = [i for i in range(len(source.names)) if i not in problems]
    if good:
        out.mkdir(parents=True, exist_ok=True)
        sheet = out / f"contact_{path.resolve().name}.png"
        contact_sheet(source, good).save(sheet)
        print(f"  drawn in {sheet}")
    return len(sentences)


def main(argv=None):
    """Runs the command; returns 0, 1 for problems or an error, or 130 when interrupted."""
    # options
    parser = argparse.ArgumentParser(description="Checks data sets: reads all, lists every "
                                     "problem, counts the classes, draws a contact sheet.")
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="data sets to check")
    add("--out", type=Path, default=Path("check"), help="folder of contact sheets (default: check)")
    add("--classes", help="the only class names allowed, as a,b,c (default: the set's own)")
    add("--data-mpp", type=float, help="µm per pixel (default: as the images state, else 0.25)")
    options = parser.parse_args(argv)
    classes = None
    if options.classes:
        classes = [name.strip() for name in options.classes.split(",")]

    # work
    problems = 0
    try:
        for path in options.folders:
            problems += check_folder(path, options.out, classes, options.data_mpp)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    print("1 problem" if problems == 1 else f"{problems} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
