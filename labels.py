"""Reads label files: which pixel belongs to which nucleus, and the class of each nucleus.

    inst_map, ids, classes = read_labels("labels/tile.geojson", (1000, 1000))
    class_ids = match_classes("labels/tile.geojson", ids, classes, {"tumour": 1, "0": 255})

Masks, class maps and colours are no instance maps; they are refused. Arrays are (y, x).
Needs numpy, scipy, pillow and images.py.
"""

import contextlib
import csv
import json
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image
from scipy import ndimage

from images import IMAGE_SUFFIXES, explain_errors, list_images

UNKNOWN_CLASS = 255  # in type_map: a nucleus whose class is not known (as in dualunet.py)
LABEL_SUFFIXES = (".npy", ".npz", ".mat", ".png", ".tif", ".tiff", ".geojson")
ARRAYS = ("inst_map", "type_map", "inst_type", "id", "class")  # CoNSeP's, HoVer-Net's, Lizard's
CONVERT = ("XML: bring the outlines into QuPath and export GeoJSON; COCO and other JSON: draw "
           "every image's outlines as an instance map")
LAYOUTS = ("expected images/ beside labels/ (rename folders such as Images/ or masks/; save arrays "
           "of many tiles as an image and a label each), CoNSeP's Images/ beside Labels/*.mat, or "
           f"PanNuke's Fold 1/ to Fold 3/. {CONVERT}")
SMALLEST_PIECE = 10  # ours: pixels; real instance maps have smaller specks under many ids
COMPARABLE = 0.1  # ours: pieces below this share of the largest are specks too
MOST_PIECES = 3  # ours: no id of 937 real instance maps has more than 2 comparable pieces
BEYOND_ONE = 0.15  # ours: extra pieces per id; real maps of more than 20 ids have at most 0.06
REGION = 100  # ours: a region has this many times the median box area; real maps reach 21


# ---------------------------------------------------------------- finding files


def find_files(images, labels):
    """[(image, label files of its name)] of two folders, and a sentence on skipped files or "".

    The list of label files normally holds one path.
    """
    by_stem = {}
    for path in sorted(labels.iterdir()):
        if path.suffix.lower() in LABEL_SUFFIXES:
            by_stem.setdefault(path.stem, []).append(path)

    paths, skipped = list_images(images)
    if not paths:
        raise ValueError(f"{images}: no images in it; expected {', '.join(IMAGE_SUFFIXES)}")
    files = [(path, by_stem.pop(path.stem, [])) for path in paths]
    return files, skipped


def only_label(image, own, folder):
    """The label of an image. Raises: ValueError if there is none, or more than one."""
    if len(own) == 1:
        return own[0]
    # name some files: those whose name begins with the image's, else any
    names = sorted(path.name for path in folder.iterdir())
    starts = tuple(image.stem + mark for mark in "._-")
    near = [name for name in names if name.startswith(starts)]
    found = ", ".join((near or names)[:3])
    advice = f"rename or convert it ({CONVERT})"
    if not near and any(name.endswith(LABEL_SUFFIXES) for name in names):
        advice = "add its label, or take the image out"  # the other labels are all right
    suffixes = ", ".join(LABEL_SUFFIXES)
    raise ValueError(f"{image}: expected one label for it alone, {folder / image.stem} with one "
                     f"of {suffixes}; found {found or 'nothing'}: {advice}")


# ---------------------------------------------------------------- reading files


def read_names(path):
    """{number or id: name} from a JSON file with such an object or with a list of names.

    A name of null becomes "".
    """
    expected = 'expected {"1": "tumour", "2": null} or ["tumour", "stroma"]'
    with explain_errors(path, "JSON file", expected):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, list):
            content = dict(enumerate(content, 1))
        return {int(key): str(name or "") for key, name in content.items()}


def read_arrays(path):
    """{name: array} of the arrays in a label file that is not GeoJSON.

    A few damaged .mat files crash scipy's reader. That is a fault of scipy.
    """
    suffix = path.suffix.lower()
    advice = ("save it as .npy, .npz, .png, as TIFF of 8, 16 or 32 bits (no big-endian BigTIFF), "
              "or from MATLAB with -v7")
    with explain_errors(path, "label file", advice):
        if suffix == ".npy":
            return {"inst_map": np.load(path, allow_pickle=False)}
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files if name in ARRAYS}
        elif suffix == ".mat":
            arrays = scipy.io.loadmat(path, variable_names=ARRAYS)
        else:
            with Image.open(path, formats=("PNG", "TIFF")) as image:
                pages = getattr(image, "n_frames", 1)
                arrays = {"inst_map": np.array(image)}
            if pages > 1:
                raise ValueError(f"{path}: {pages} pages; expected one, the instance map: save it "
                                 "alone, and the classes in types/<name>.json")
    if "inst_map" not in arrays:
        raise ValueError(f"{path}: no array inst_map in it; store the instance map by that name")
    return arrays


def whole_numbers(path, array):
    """The array as int32. Raises: ValueError for other values than whole numbers from 0."""
    if array.dtype.kind in "buif":
        with np.errstate(invalid="ignore"):  # nan
            numbers = array.astype(np.int32)
        if np.array_equal(numbers, array) and numbers.min(initial=0) >= 0:
            return numbers
    raise ValueError(f"{path}: {array.dtype} values that are not all whole numbers from 0 to "
                     "2147483647; expected 0 for background and an id for each nucleus")


def number_ids(inst_map):
    """The map int32 with ids from 1 without gaps, and its former ids in ascending order."""
    with_zero = np.append(0, inst_map)
    ids, index = np.unique(with_zero, return_inverse=True)
    index = index[1:].reshape(inst_map.shape)
    return index.astype(np.int32), ids[1:]


# ---------------------------------------------------------------- masks are not instances


def count_pieces(inst_map):
    """(N,) number of separate pieces of every id, without specks; ids count from 1."""
    pieces = []
    for number, box in enumerate(ndimage.find_objects(inst_map), 1):
        parts, count = ndimage.label(inst_map[box] == number, np.ones((3, 3)))
        if count > 1:
            areas = np.bincount(parts.ravel())[1:]
            least = max(SMALLEST_PIECE, COMPARABLE * areas.max())
            count = max(1, int(np.sum(areas >= least)))
        pieces.append(count)
    return np.array(pieces)


def check_instances(path, inst_map, ids, binary):
    """Raises ValueError if a map is a mask or holds classes instead of one id a nucleus.

    inst_map, ids: from `number_ids`. binary: the file holds a boolean or a 0/255 image.
    """
    if not len(ids):
        return
    # an inverted mask, or background with an id of its own
    areas = np.bincount(inst_map.ravel())[1:]
    share = areas / inst_map.size
    largest = share.argmax()
    if share[largest] > 0.5:
        raise ValueError(f"{path}: id {ids[largest]} covers {share[largest]:.0%} of the image; "
                         "background must be 0")

    # nuclei are one piece each; a few true ids of large sets have two
    pieces = count_pieces(inst_map)
    most = pieces.argmax()
    surplus = pieces.sum() - len(ids)
    allowed = 0 if binary else 1 + BEYOND_ONE * len(ids)
    if surplus > allowed or pieces[most] > MOST_PIECES:
        raise ValueError(f"{path}: id {ids[most]} covers {pieces[most]} separate pieces: a mask, "
                         "not instances; label its connected components (scipy.ndimage.label); "
                         f"ids: {len(ids)}, pieces in all: {pieces.sum()}")


# ---------------------------------------------------------------- GeoJSON, as QuPath writes it


def feature_class(feature):
    """The name of a feature's class, "" where it has none."""
    properties = feature.get("properties") or {}
    classification = properties.get("classification") or {}
    names = classification.get("names", [])  # QuPath's derived classes: ["Tumor", "Positive"]
    return classification.get("name") or ": ".join(names)


def feature_rings(feature):
    """The rings of a feature, (M, 2) float (x, y) each. A QuPath cell gives its nucleus."""
    geometry = feature.get("nucleusGeometry") or feature["geometry"]
    polygons = geometry["coordinates"]
    if geometry["type"] == "Polygon":
        polygons = [polygons]
    elif geometry["type"] != "MultiPolygon":
        raise ValueError(f"a feature is a {geometry['type']}; expected Polygon or MultiPolygon")
    rings = []
    for polygon in polygons:
        for ring in polygon:
            rings.append(np.array(ring, float)[:, :2])
    return rings


def read_features(path):
    """[(rings, class name)] of the features in a GeoJSON file."""
    result = []
    with explain_errors(path, "GeoJSON file", "export a FeatureCollection from QuPath"):
        content = json.loads(path.read_text(encoding="utf-8"))
        features = content  # QuPath writes a plain list if FeatureCollection is not ticked
        if isinstance(content, dict):
            if "features" not in content:
                raise ValueError("it has no features; an object alone is not all of an image")
            features = content["features"]
        for feature in features:
            rings = feature_rings(feature)
            if not rings:
                raise ValueError("a feature has no coordinates")
            result.append((rings, feature_class(feature)))
    return result


def fill_rings(inst_map, rings, value):
    """Writes `value` where a pixel's centre lies inside the rings, by the even-odd rule.

    A line through the centres of a row of pixels crosses edges of the rings. Each crossing
    switches the pixels to its right between outside and inside. Rings along pixel edges give
    exactly the pixels that they enclose.
    """
    # edges from every corner to the next
    start = np.concatenate(rings)  # (E, 2) x, y
    end = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])

    # the part of the map that they reach
    width, height = inst_map.shape[::-1]
    left, top = start.min(axis=0).clip(0, (width, height)).astype(int)
    right, bottom = np.ceil(start.max(axis=0)).clip(0, (width, height)).astype(int)
    window = inst_map[top:bottom, left:right]

    # find the edges that cross the line of each row
    centre = np.arange(top, bottom) + 0.5
    starts_above = start[:, 1:] <= centre  # (E, rows)
    ends_above = end[:, 1:] <= centre
    edge, row = np.nonzero(starts_above != ends_above)

    # the first pixel whose centre is right of each crossing
    x0, y0 = start[edge].T
    x1, y1 = end[edge].T
    part = (centre[row] - y0) / (y1 - y0)
    x = x0 + part * (x1 - x0)
    column = np.ceil(x - 0.5).astype(int)
    column = column.clip(left, right) - left

    # a pixel is inside after an odd number of crossings
    crossings = np.zeros((bottom - top, right - left + 1), np.int32)
    np.add.at(crossings, (row, column), 1)
    inside = crossings.cumsum(axis=1) % 2 == 1
    window[inside[:, :-1]] = value


def check_boxes(path, boxes, shape):
    """Raises ValueError for regions or features outside the image; boxes: (N, 4) x0, y0, x1, y1"""
    height, width = shape
    x0, y0, x1, y1 = boxes.T
    outside = (x1 <= 0) | (y1 <= 0) | (x0 >= width) | (y0 >= height)
    areas = (x1 - x0) * (y1 - y0)
    region = areas > REGION * np.median(areas)
    for k in np.flatnonzero(outside | region):
        place = f"x {x0[k]:g} to {x1[k]:g}, y {y0[k]:g} to {y1[k]:g}"
        problem = "is a region, not a nucleus"
        if outside[k]:
            problem = f"lies outside the image of {height}x{width}"
        raise ValueError(f"{path}: feature {k + 1} ({place}) {problem}; export the nuclei of "
                         "this image alone, at full resolution")


def read_geojson(path, shape):
    """The features as an id map (H, W) int32 and {id: class name}.

    Feature k gets id k, counted from 1. Where features overlap, the later one wins. Parts outside
    the image are cut off; a feature that covers no pixel's centre is left out.
    """
    inst_map = np.zeros(shape, np.int32)
    features = read_features(path)
    boxes = []
    for number, (rings, _) in enumerate(features, 1):
        fill_rings(inst_map, rings, number)
        corners = np.concatenate(rings)
        boxes.append((*corners.min(axis=0), *corners.max(axis=0)))
    if boxes:
        check_boxes(path, np.array(boxes), shape)

    classes = {}
    for number in np.unique(inst_map[inst_map > 0]).tolist():
        classes[number] = features[number - 1][1]
    return inst_map, classes


# ---------------------------------------------------------------- nuclei and their classes


def majority_types(path, inst_map, type_map):
    """(N,) the most frequent value of type_map in each nucleus; ids of inst_map count from 1."""
    types = whole_numbers(path, type_map)
    width = int(types.max(initial=0)) + 1
    if width > 256:
        raise ValueError(f"{path}: type_map goes up to {width - 1}; expected classes 0..255")
    pairs = inst_map.ravel() * width + types.ravel()
    count = int(inst_map.max(initial=0)) + 1
    votes = np.bincount(pairs, minlength=count * width)
    votes = votes.reshape(count, width)
    return votes[1:].argmax(axis=1)


def array_classes(path, inst_map, ids, arrays):
    """{id: class number} from the arrays beside the map; None if they state no classes."""
    keys = arrays.get("id", ids)  # Lizard lists its ids, in any order
    values = arrays.get("inst_type", arrays.get("class"))
    if "type_map" in arrays:
        keys, values = ids, majority_types(path, inst_map, arrays["type_map"])
    if values is None:
        return None
    keys = np.ravel(keys)
    values = np.ravel(values)
    if len(keys) != len(values):
        raise ValueError(f"{path}: {len(values)} classes for {len(keys)} nuclei; "
                         "expected one each")
    numbers = whole_numbers(path, values)
    return dict(zip(keys.tolist(), numbers.tolist()))


def read_labels(path, shape):
    """Reads inst_map (H, W) int32 with ids from 1, the file's own ids (N,), {id: class} or None.

    shape: (H, W) of the image. A class is a name or a number, "" or 0 if it is unknown. .npz and
    .mat hold `inst_map`. For classes they may hold `type_map` (H, W), or `inst_type` (N,) in
    ascending order of id, or Lizard's `id` and `class`. Raises: ValueError naming the file.
    """
    if path.suffix.lower() == ".geojson":
        labels, classes = read_geojson(path, shape)
        inst_map, ids = number_ids(labels)
        check_instances(path, inst_map, ids, binary=False)
        return inst_map, ids, classes

    # the arrays of the file
    arrays = read_arrays(path)
    for name in {"inst_map", "type_map"} & arrays.keys():
        array = arrays[name]
        if array.shape != tuple(shape):
            raise ValueError(f"{path}: labels are {array.dtype} {array.shape}, the image is "
                             f"{tuple(shape)}; expected one id a pixel: no colours, and classes "
                             "apart, such as inst_map and type_map in an .npz")
    labels = arrays["inst_map"]

    # one id a nucleus, and its class
    inst_map, ids = number_ids(whole_numbers(path, labels))
    binary = labels.dtype == bool or ids.tolist() == [255]
    check_instances(path, inst_map, ids, binary)
    return inst_map, ids, array_classes(path, inst_map, ids, arrays)


def match_classes(path, ids, classes, known):
    """(N,) int64 class ids of the nuclei `ids`.

    classes: {id: name or number}; an id that is missing has class "0". known: {name or number, as
    text: class id}, with "0".
    """
    # a class without pixels: the two files do not belong together
    strangers = set(classes) - set(ids.tolist())
    if strangers:
        raise ValueError(f"{path}: id {min(strangers)} has a class but no pixels in the labels; "
                         "expected classes of the labelled nuclei alone")

    result = np.zeros(len(ids), np.int64)
    for place, number in enumerate(ids.tolist()):
        name = str(classes.get(number) or 0)
        if name not in known:
            raise ValueError(f"{path}: id {number} is of class {name!r}, which is not among "
                             f"{', '.join(known)}; rename it, or list all classes in classes.json")
        result[place] = known[name]
    return result


def class_table(names):
    """The class names, and {name or number, as text: class id} for `match_classes`.

    names: {name or number that stands for it in files: class name}.
    """
    class_names = list(dict.fromkeys(names.values()))
    if len(class_names) >= UNKNOWN_CLASS:
        raise ValueError(f"{len(class_names)} classes, such as {class_names[0]!r}; expected fewer "
                         f"than {UNKNOWN_CLASS}")
    class_ids = {name: k for k, name in enumerate(class_names, 1)}
    known = dict(class_ids)
    for key, name in names.items():
        known[str(key)] = class_ids[name]
    known["0"] = 1 if class_names == ["nucleus"] else UNKNOWN_CLASS
    return class_names, known


def folder_classes(root, files):
    """{name or number in a plain folder's files: class name}; files: from `find_files`.

    They come from classes.json, else from types/ and GeoJSON files; else the class is "nucleus".
    """
    if (root / "classes.json").exists():
        names = read_names(root / "classes.json")
        return {number: name for number, name in names.items() if number and name}
    found = set()
    for image, own in files:
        types = root / "types" / f"{image.stem}.json"
        with contextlib.suppress(ValueError):  # reported when the image is read
            if own and own[0].suffix.lower() == ".geojson":
                found |= {name for _, name in read_features(own[0])}
            elif types.exists():
                found |= set(read_names(types).values())
    names = sorted(found - {"", "0"})
    return {name: name for name in names} or {1: "nucleus"}


def read_predictions(folder, name, class_names):
    """Reads what infer.py wrote for an image: inst_map (H, W) int32, (N,) class ids 1..K by id."""
    # the label map
    path = Path(folder) / f"{name}_instances.tif"
    labels = whole_numbers(path, read_arrays(path)["inst_map"])
    inst_map, ids = number_ids(labels)

    # the table beside it has a row for each of its ids
    table = Path(folder) / f"{name}_nuclei.csv"
    with explain_errors(table, "table", "run infer.py again"):
        with open(table, newline="", encoding="utf-8") as file:
            classes = {int(row["id"]): row["class"] for row in csv.DictReader(file)}
    if list(class_names) == ["nucleus"]:  # scored without classes, whatever was predicted
        classes = dict.fromkeys(classes, "nucleus")
    known = {class_name: k for k, class_name in enumerate(class_names, 1)}
    return inst_map, match_classes(table, ids, classes, known)
