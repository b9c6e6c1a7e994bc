"""Scores a checkpoint, or a folder of predictions, on a labelled data set.

    python evaluate.py weights/consep.pt --data CoNSeP            # its own validation images
    python evaluate.py weights/consep.pt --data CoNSeP/Test --all # every image
    python evaluate.py predictions --data mydata                  # a folder that infer.py wrote

Prints a table, writes evaluation.json, and draws the worst images: input, truth, prediction.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from convert import load_any_model
from data import class_lookup, nucleus_classes, open_source
from dualunet import UNKNOWN_CLASS, class_colors, read_checkpoint
from images import check_mpp
from infer import predict
from labels import read_predictions
from metrics import bootstrap_interval, panoptic_quality, score_image, summarise
from outputs import outlined, titled_panel
from runs import (explain, keep_memory, names_in, pick_device, pick_precision, say,
                  show_progress)

RADIUS = 3.0  # µm between centroids of a pair; HoVer-Net: 12 px at 40x, 6 px at 20x
OFFSETS = (0.0, 0.2, 0.4, 0.6)  # ours: 0.8 widens the outlines of CoNSeP, the main set, too far


# ---------------------------------------------------------------- scores


def finder(model, source, **options):
    """The function find(i, image) -> (inst_map, classes); options are those of `predict`."""
    def find(i, image):
        nuclei = predict(model, image, mpp=source.mpp, **options)
        return nuclei.inst_map, nuclei.classes

    return find


def spread(indices, count):
    """At most `count` of the indices, evenly spread."""
    return indices[::math.ceil(len(indices) / count)]


def scored_classes(source, class_names):
    """The class names to score: only "nucleus" if the truth or the network has no others."""
    if list(source.class_names) == ["nucleus"] or list(class_names) == ["nucleus"]:
        return ["nucleus"]
    return list(class_names)


def score_source(source, indices, class_names, find):
    """`score_image` of each image; find(i, image) gives its predicted inst_map and classes."""
    names = scored_classes(source, class_names)
    lookup = class_lookup(source, names)
    scores = []
    for done, i in enumerate(indices):
        show_progress(f"evaluates {source.names[i]} ({done + 1} of {len(indices)})")
        image, inst_map, type_map = source.read(i)
        found_map, found_classes = find(i, image)
        true_classes = nucleus_classes(inst_map, lookup[type_map])
        if len(names) == 1:  # all nuclei in one class
            true_classes = found_classes = None
        scores.append(score_image(inst_map, true_classes, found_map, found_classes,
                                  num_classes=len(names), radius=RADIUS / source.mpp))
    show_progress("")
    return scores


def figures_of(source, indices, class_names, find):
    """The four figures that training logs for a set."""
    scores = score_source(source, indices, class_names, find)
    summary = summarise(scores, scored_classes(source, class_names))
    classification = summary["classification"]
    several = len(classification["f1"]) > 1
    return {"detection_f1": summary["detection"]["f1"],
            "class_f1": classification["mean"] if several else math.nan,
            "dice": summary["image_mean"]["dice"], "pq": summary["image_mean"]["pq"]}


def mean_of_defined(figures):
    """The mean of the figures that are not nan; 0 if there is none."""
    defined = [figure for figure in figures if not math.isnan(figure)]
    return sum(defined) / max(len(defined), 1)


# ---------------------------------------------------------------- calibration


def calibrate(model, sets, val_images, dtype=None):
    """Lowers the background's logit by the one of OFFSETS with the best mean PQ over the sets.

    Sets differ in how wide they draw outlines, so the network's may be too narrow for some. The
    offset goes into the head's bias, so that inference needs no option for it. sets: (source,
    indices) of validation images; at most `val_images` of each are used. Returns {offset: mean PQ}.
    """
    # try each on a copy
    bias = model.segmentation_head.bias
    network = model.fuse(dtype)
    quality = {}
    for offset in OFFSETS:
        network.segmentation_head.bias[0] = bias[0].detach() - offset
        figures = []
        for source, indices in sets:
            find = finder(network, source)
            indices = spread(indices, val_images)
            figures.append(figures_of(source, indices, ["nucleus"], find)["pq"])
        quality[offset] = mean_of_defined(figures)

    # keep the best
    with torch.no_grad():
        bias[0] -= max(quality, key=quality.get)
    return quality


# ---------------------------------------------------------------- pictures


def middle(shape, side):
    """Slices of the window in the middle, at most `side` pixels high and wide."""
    slices = []
    for length in shape:
        start = max((length - side) // 2, 0)
        slices.append(slice(start, start + side))
    return tuple(slices)


def draw_images(source, indices, find, class_names, colors, path, side=10**6):
    """Draws a row for each image: input, truth and prediction, at twice the size.

    side: of the shown window in the middle of each image.
    """
    lookup = class_lookup(source, class_names)
    rows, titles, unknown = [], [], False
    for i in indices:
        image, inst_map, type_map = source.read(i)
        found_map, found_classes = find(i, image)
        true_classes = nucleus_classes(inst_map, lookup[type_map])
        unknown |= UNKNOWN_CLASS in true_classes
        if len(class_names) == 1:  # the prediction may know more classes
            found_classes = np.ones_like(found_classes)

        # the window, and outlines on it
        window = middle(inst_map.shape, side)
        image = np.ascontiguousarray(image[window])
        height, width, _ = image.shape
        row = [np.asarray(Image.fromarray(image).resize((2 * width, 2 * height)))]
        for labels, classes in ((inst_map, true_classes), (found_map, found_classes)):
            row.append(outlined(image, labels[window], classes, colors, scale=2, width=2))
        rows.append(row)
        titles.append([source.names[i], "truth", "prediction"])
    titled_panel(rows, titles, class_names, colors, unknown).save(path)


# ---------------------------------------------------------------- the command


def row(title, *values):
    """Prints a line of the table; n/a if a figure is undefined."""
    cells = []
    for value in values:
        if not isinstance(value, str):
            value = "n/a" if math.isnan(value) else f"{value:.3f}"
        cells.append(f"{value:>10}")
    print(f"{title:<18}" + "".join(cells))


def print_table(summary, class_names):
    """Prints the figures of `summarise`, each under its protocol."""
    print(f"{summary['checkpoint']} on {summary['images']} images of {summary['data']}")
    for name in ("detection", "detection_capped"):
        part = summary[name]
        print(f"\ndetection ({part['protocol']})")
        row("", "f1", "precision", "recall")
        row("all nuclei", part["f1"], part["precision"], part["recall"])

    part, keys = summary["image_mean"], ("dice", "aji", "aji_plus", "dq", "sq", "pq")
    print(f"\noutlines ({part['protocol']})")
    row("", *keys, "area")
    row("all nuclei", *(part[key] for key in keys), summary["area_ratio"])
    print("area: predicted over true pixels")

    f1, capped, pooled = (summary[name] for name in (
        "classification", "classification_capped", "pooled"))
    print("\nclasses")
    for name, part in (("f1", f1), ("f1 capped", capped), ("dq, sq, pq", pooled)):
        print(f"{name}: {part['protocol']}")
    row("", "f1", "f1 capped", "dq", "sq", "pq")
    for name in class_names:
        row(name, f1["f1"][name], capped["f1"][name], *pooled["classes"][name].values())
    row("mean", f1["mean"], capped["mean"], "", "", pooled["mpq_plus"])
    row("all nuclei", "", "", pooled["dq"], pooled["sq"], pooled["pq"])

    low, high = summary["class_f1_interval"]
    if not math.isnan(low):
        print(f"mean f1, 95 % of bootstraps over images: {low:.3f} to {high:.3f}")
    elif summary["images"] < 3:
        print("mean f1: no interval, which needs three images or more")
    pannuke = summary["pannuke"]
    print(f"\n{pannuke['protocol']}: bPQ {pannuke['bpq']:.3f}, mPQ {pannuke['mpq']:.3f}")
    empty = [summary["names"][n] for n in summary["images_without_truth"]]
    if empty:
        print(f"no nucleus in the truth, so no DQ, SQ, PQ: {', '.join(empty)}")


def pick_images(source, options, split):
    """Indices of the images to score: those of --val, of the checkpoint's split, or all."""
    wanted = set(options.val or ([] if options.all else split["val"]))
    if strangers := sorted(set(options.val or []) - set(source.names)):
        raise ValueError(f"--val {strangers[0]}: no image of that name in {options.data}")
    indices = [i for i, name in enumerate(source.names) if name in wanted or not wanted]
    if not indices:
        raise ValueError(f"{options.data}: none of the validation images of {options.predicted} "
                         "is here; --all scores every image")
    seen = sorted({source.names[i] for i in indices} & set(split["train"]))
    if seen:
        print(f"warning: {options.predicted} was trained on {len(seen)} of these images, "
              f"{seen[0]} for one")
    return indices


def open_predicted(options, source):
    """What is scored, a network or a folder: (class names, the split it was trained with, find)."""
    split = {"train": [], "val": []}
    path = options.predicted
    if Path(path).is_dir():
        class_names = list(source.class_names)

        def find(i, image):
            return read_predictions(path, source.names[i], class_names)

        return class_names, split, find

    device = pick_device(options.device)
    model = load_any_model(path, device)
    split = read_checkpoint(path).get("split", split)
    network = model.fuse(pick_precision(device, options.precision))
    find = finder(network, source, flips=options.flips, tile=options.tile)
    return model.config["class_names"], split, find


def evaluate(options):
    """Scores a checkpoint or a folder; prints, writes and draws."""
    # open the truth and the predictions
    if options.data_mpp is not None:
        check_mpp(options.data_mpp, "--data-mpp")
    source = open_source(options.data, classes=options.classes, mpp=options.data_mpp)
    for note in source.notes:
        say("warning", options.data, note)
    class_names, split, find = open_predicted(options, source)
    indices = pick_images(source, options, split)

    # the scores
    scores = score_source(source, indices, class_names, find)
    class_names = scored_classes(source, class_names)
    tissues = source.tissues and [source.tissues[i] for i in indices]
    summary = summarise(scores, class_names, tissues)

    def mean_f1(images):
        return summarise(images, class_names)["classification"]["mean"]

    summary |= {"checkpoint": str(options.predicted), "data": str(options.data),
                "flips": options.flips, "tile": options.tile,
                "names": [source.names[i] for i in indices],
                "class_f1_interval": bootstrap_interval(scores, mean_f1)}
    print_table(summary, class_names)

    # the files
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(without_nan(summary | {"per_image": scores}), indent=1)
    (out / "evaluation.json").write_text(text, encoding="utf-8")
    colors = class_colors(class_names)
    quality = [panoptic_quality(score["panoptic"])[2] for score in scores]
    for n in np.argsort(quality)[:options.worst]:  # an image without nuclei sorts last
        path = out / f"worst_{summary['names'][n].replace('/', '_')}.png"
        draw_images(source, [indices[n]], find, class_names, colors, path)
        print(f"PQ {quality[n]:.3f}, input, truth, prediction: {path}")
    return summary


def without_nan(value):
    """The value with None in place of nan, which JSON lacks."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def parse_options(argv=None):
    """The command line; unknown options are refused with exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("predicted", metavar="CHECKPOINT", help="a checkpoint, or a folder that infer.py wrote")
    add("--data", required=True, metavar="PATH", help="the labelled data set")
    add("--all", action="store_true", help="score every image (default: the checkpoint's "
        "validation images)")
    add("--val", nargs="+", metavar="NAME", help="score these images")
    add("--classes", type=names_in, metavar="A,B,C", help="the classes of the data; any other name "
        "is an error")
    add("--data-mpp", type=float, metavar="MPP", help="µm per pixel of the images (default: as "
        "the files state, else 0.25)")
    add("--flips", action="store_true", help="mean over four mirrorings, in four times the time")
    add("--tile", type=int, help="largest side of a tile, a multiple of 32 (default: as "
        "infer.py takes)")
    add("--worst", type=int, default=3, metavar="N", help="how many images to draw (default: 3)")
    add("--out", default="evaluation", metavar="FOLDER", help="where to write (default: "
        "evaluation)")
    add("--device", default="auto", help="cuda, mps or cpu (default: the first available)")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="default: bf16 if "
        "the processor has it")
    return parser.parse_args(argv)


def main(argv=None):
    """Runs the command; returns 0, 1 for an error, or 130 when it was interrupted."""
    options = parse_options(argv)
    keep_memory()
    try:
        evaluate(options)
    except (OSError, ValueError, RuntimeError) as error:
        show_progress("")
        print(f"error: {explain(error, options.out)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
