"""Where the accuracy comes from: training's ingredients, reconstruction, robustness to stain.

    pip install -r benchmarks/requirements.txt      # scikit-image, for the published recipe alone
    python benchmarks/accuracy.py ablation --data CoNSeP MoNuSeg NuInsSeg TNBC --steps 300 --seeds 0
    python benchmarks/accuracy.py recipes --data CoNSeP runs/ablation/{base,sum}-0/last.pt
    python benchmarks/accuracy.py stain --data CoNSeP runs/ablation/{base,stain}-0/last.pt

`ablation` trains what the other two compare. All figures are of validation images, which a
checkpoint knows, in the first set of --data. Each prints a table and writes it as JSON.
"""

import argparse
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the modules are no package

import infer
import peers
import train
from data import open_source, stain_shift
from dualunet import load_model, read_checkpoint
from metrics import summarise
from postprocess import reconstruct

FIGURES = {  # column -> where `summarise` has it
    "detection F1": ("detection", "f1"), "class F1": ("classification", "mean"),
    "Dice": ("image_mean", "dice"), "DQ": ("image_mean", "dq"), "SQ": ("image_mean", "sq"),
    "PQ": ("image_mean", "pq"), "pooled PQ": ("pooled", "pq"),
}
PROTOCOL = """Detection and class F1: HoVer-Net's, within 12 px, pooled over images. Dice, DQ, SQ, PQ:
all nuclei one class, IoU > 0.5, mean over images. Pooled PQ: of counts summed over images."""
VERSUS = {  # how a figure compares with the first row's, and its form
    "difference": (lambda figure, first: figure - first, "+.3f"),
    "ratio": (lambda figure, first: figure / first if first else math.nan, ".2f"),
}


# ---------------------------------------------------------------- parts


def load(path, args):
    """A checkpoint's network for inference, the first data set, its validation images there."""
    device, source = infer.pick_device(args.device), open_source(args.data[0])
    model = load_model(path, device).fuse(infer.pick_precision(device))
    held = read_checkpoint(path).get("split", {"val": ()})["val"]
    indices = [i for i, name in enumerate(source.names) if name in held]
    if not indices:
        raise ValueError(f"{args.data[0]}: none of {path}'s validation images is here; expected "
                         "the set it was trained on, and a checkpoint as train.py writes it")
    return model, source, indices


def score(source, indices, class_names, find, columns):
    """{column: figure} of the nuclei that find(i, image) gives."""
    scores = train.score_source(source, indices, class_names, find)
    summary = summarise(scores, train.scored_classes(source, class_names))
    return {column: summary[FIGURES[column][0]][FIGURES[column][1]] for column in columns}


def show(figure, form=".3f"):
    return "n/a" if math.isnan(figure) else format(figure, form)


def report(args, count, note, rows, versus=None, **more):
    """Prints {row: {column: figure}} as markdown; writes it, the comparison and `more` as JSON."""
    heading = f"{args.data[0]}, {count} validation image{'s' * (count > 1)}; {note}"
    first = next(iter(rows.values()))
    print(f"{heading}\n\n| | {' | '.join(first)} |\n|{'---|' * (len(first) + 1)}")
    for name, row in rows.items():
        cells = [show(figure) for figure in row.values()]
        if versus:
            compare, form = VERSUS[versus]
            beside = {column: compare(figure, first[column]) for column, figure in row.items()}
            more.setdefault(versus, {})[name] = beside
            cells = [f"{cell} ({show(value, form)})" for cell, value in zip(cells, beside.values())]
        print(f"| {' | '.join((name, *cells))} |")
    print(f"\n{PROTOCOL}")
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(train.finite({"heading": heading, "rows": rows} | more), indent=1)
    (args.out / f"{args.command}.json").write_text(text + "\n", encoding="utf-8")


# ---------------------------------------------------------------- ablation

NUCLEI = os.path.relpath(ROOT / "weights" / "nuclei.pt")  # its own training is beyond the budget
INGREDIENTS = {  # run -> in which options of train.py it differs from the base
    "base": "", "sum": "--combine sum", "stain": "--stain 0", "scale": "--scale 1",
    "turn": "--turn 0", "blur": "--blur 0", "density": "--density-weight 1", "average": "--average 0",
    "classes": "--class-weights none", "alone": "--data {first}", "init": "--init {nuclei}",
    "zoom": "--zoom 1.25 --batch {smaller}",  # as many pixels for the network
}


def differing(first, second):
    """The options of two trainings that differ, but for where they ran."""
    ignored = ("out", "resume", "device", "workers")
    return [k for k in first if k not in ignored and first[k] != second.get(k, first[k])]


def trained(words, threads):
    """The last.pt of `python train.py WORDS`; a finished run is kept, one cut short goes on.

    Raises: ValueError for a folder with another run, RuntimeError where train.py fails.
    """
    wanted = vars(train.parse_options(words))
    last = Path(wanted["out"], "last.pt")
    if last.exists():
        saved = read_checkpoint(last)
        if other := differing(wanted, saved["options"]):
            raise ValueError(f"{last.parent}: holds a run of another {', '.join(other)}; choose "
                             "another --out")
        if saved["epoch"] == wanted["epochs"]:
            return last
        words = [*words, "--resume", str(last.parent)]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, str(ROOT / "train.py"), *words]
    if code := subprocess.run(command, env=environment, stdout=2).returncode:  # 1 is the table's
        raise RuntimeError(f"{last.parent}: train.py ended with code {code}; its reason is above")
    return last


def ablation(args):
    """Trains the recipe, and with one ingredient changed at a time, at a small equal budget."""
    rows, seeds = {}, {}
    columns = [column for column in FIGURES if column not in ("DQ", "SQ")]
    budget = [w for k in ("steps", "batch", "crop") for w in (f"--{k}", str(getattr(args, k)))]
    base = ["--data", *args.data, "--epochs", "1", *budget, "--device", args.device, *args.others]
    for name in INGREDIENTS:
        if name not in args.only or name == "alone" and len(args.data) == 1:
            continue
        change = [w.format(first=args.data[0], nuclei=NUCLEI, smaller=round(args.batch / 1.25**2))
                  for w in INGREDIENTS[name].split()]
        row, seeds[name] = " ".join(change) or "base", {}
        for seed in args.seeds:
            run = ["--seed", str(seed), "--out", str(args.out / f"{name}-{seed}")]
            model, source, indices = load(trained([*base, *change, *run], args.threads), args)
            find, class_names = train.finder(model, None), model.config["class_names"]
            seeds[name][seed] = score(source, indices, class_names, find, columns)
        values = [list(figures.values()) for figures in seeds[name].values()]
        rows[row] = dict(zip(columns, np.mean(values, axis=0).tolist()))
    note = (f"{args.steps} steps of {args.batch} crops of {args.crop}² from {', '.join(args.data)}; "
            f"mean over seeds {args.seeds}; in brackets the difference to the first row")
    report(args, len(indices), note, rows, "difference", seeds=seeds)


# ---------------------------------------------------------------- recipes

RECIPES = {  # name -> label map of (type_map, density)
    "local maxima > 0.2, flooding of -density":
        lambda *maps: reconstruct(*maps, threshold=0.2).inst_map,
    "local maxima > 0.3, flooding of -density (ours)":
        lambda *maps: reconstruct(*maps, threshold=0.3).inst_map,
    "h-maxima 0.15, flooding of -density":
        lambda *maps: reconstruct(*maps, combine="sum").inst_map,
    "h-maxima 0.15, compact watershed of the distance (published)": peers.published_instances,
}


def whole_maps(model, image):
    """type_map, density (H, W) of one pass over the reflected image, as `predict` sees a tile."""
    halo, (height, width) = infer.HALO, image.shape[:2]
    bottom, right = (side + -side % infer.STRIDE + halo for side in (height, width))
    window = infer.read_window(image, -halo, -halo, bottom, right)
    types, _, density = infer.predict_maps(model, window[None])
    inside = 0, slice(halo, halo + height), slice(halo, halo + width)
    return types[inside], density[inside]


def recipes(args):
    """Reconstructs the same learned maps in several ways: of unit peaks, and of their sum."""
    first, second = (read_checkpoint(path).get("options", {}) for path in args.checkpoints)
    if other := [k for k in differing(first, second) if k != "combine"]:
        print(f"warning: the checkpoints differ in {', '.join(other)}, not in --combine alone")
    ways, rows = dict(RECIPES), {}
    if peers.h_maxima is None:
        ways.popitem()
        print("The published recipe is left out: pip install -r benchmarks/requirements.txt")
    columns = [column for column in FIGURES if column != "class F1"]
    for target, path in zip(("max", "sum"), args.checkpoints):
        model, source, indices = load(path, args)
        if model.config["combine"] != target:
            raise ValueError(f"{path}: trained with --combine {model.config['combine']}; expected "
                             f"{target}: give the one of max first, then the one of sum")
        maps = functools.cache(lambda i: whole_maps(model, source.read(i)[0]))
        for way, instances in ways.items():
            rows[f"{target}: {way}"] = score(
                source, indices, ["nucleus"], lambda i, _: (instances(*maps(i)), None), columns)
    report(args, len(indices), "before the colon --combine of the training", rows)


# ---------------------------------------------------------------- stain


def hue_shift(image, degrees):
    """The image (H, W, 3) uint8 with all hues turned; saturation and value of HSV stay.

    In float: Pillow's HSV, of 255 hues, would change even an image that is turned by 0.
    """
    r, g, b = channels = np.moveaxis(image.astype(np.float32), -1, 0)  # (3, H, W)
    high, span = channels.max(0), np.ptp(channels, axis=0)
    hue = np.select([high == r, high == g], [g - b, b - r + 2 * span], r - g + 4 * span)
    sixths = hue / np.maximum(span, 1) + degrees / 60  # grey has no span, and stays
    ramps = (sixths + np.reshape((5, 3, 1), (3, 1, 1))) % 6
    channels = high - span * np.minimum(ramps, 4 - ramps).clip(0, 1)
    return np.moveaxis(channels, 0, -1).round().astype(np.uint8)


STRENGTHS = (0.5, 0.75, 1.25, 1.5)  # train.py's variation covers 0.7 to 1.3, and no hue
SHIFTS = {  # form of a row (the font of Pillow lacks ×) -> amounts, function of (image, amount)
    "unshifted": ((0,), lambda image, _: image),
    "haematoxylin x{:g}": (STRENGTHS, lambda image, k: stain_shift(image, (k, 1, 1), np.zeros(3))),
    "eosin x{:g}": (STRENGTHS, lambda image, k: stain_shift(image, (1, k, 1), np.zeros(3))),
    "hue {:+g}°": ((-30, -15, 15, 30), hue_shift),
}


def plot(path, rows, names):
    """PNG of PQ: a panel for each kind of shift, a line for each checkpoint."""
    canvas = Image.new("RGB", (1080, 290 + 20 * len(names)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    highest = max(row[f"{name} PQ"] for row in rows.values() for name in names)
    top = math.ceil(10 * highest) / 10 if highest > 0 else 1.0  # nan is not
    for n, (form, (amounts, _)) in enumerate(list(SHIFTS.items())[1:]):
        kind, xs = form.split()[0], [60 + 350 * n + 70 * k for k in range(5)]
        shifts = [form.format(amount) for amount in amounts]
        shifts.insert(2, "unshifted")
        draw.text((xs[0], 12), f"PQ, {kind}", "black", font)
        for y, value in ((240, 0), (140, top / 2), (40, top)):
            draw.line((xs[0], y, xs[-1], y), "#cccccc")
            draw.text((xs[0] - 8, y), f"{value:.2f}", "black", font, anchor="rm")
        for x, shift in zip(xs, shifts):
            draw.text((x, 250), shift.removeprefix(kind), "black", font, anchor="mt")
        for i, name in enumerate(names):
            ink = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")[i % 6]
            line = [(x, rows[shift][f"{name} PQ"]) for x, shift in zip(xs, shifts)]
            draw.line([(x, 240 - 200 * v / top) for x, v in line if v >= 0], ink, 3)
            draw.text((60, 276 + 20 * i), name, ink, font)
    canvas.save(path)


def stain(args):
    """Scores checkpoints, against the truth, under graded shifts of stain strength and hue."""
    rows = {}
    for path in args.checkpoints:
        model, source, indices = load(path, args)
        find, class_names = train.finder(model, None), model.config["class_names"]
        for form, (amounts, shift) in SHIFTS.items():
            for amount in amounts:
                figures = score(source, indices, class_names, lambda i, image: find(
                    i, shift(image, amount)), ("detection F1", "PQ"))
                row = rows.setdefault(form.format(amount), {})
                row |= {f"{path} {column}": figure for column, figure in figures.items()}
    report(args, len(indices), "in brackets the ratio to the unshifted image", rows, "ratio")
    plot(args.out / "stain.png", rows, args.checkpoints)


# ---------------------------------------------------------------- command line


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for action in (ablation, recipes, stain):
        words = {"help": action.__doc__, "description": action.__doc__, "allow_abbrev": False}
        option = commands.add_parser(action.__name__, **words).add_argument
        option("--data", nargs="+" if action is ablation else 1, required=True, metavar="PATH")
        option("--device", default="auto", help="cpu, cuda, mps (default: the fastest here)")
        option("--threads", type=int, help="of the processor (default: one a core)")
        option("--out", type=Path, default=Path("runs", action.__name__),
               help=f"folder to write into (default: runs/{action.__name__})")
        if action is not ablation:
            option("checkpoints", nargs=2 if action is recipes else "+",
                   help="of train.py" + " with --combine max, then sum" * (action is recipes))
            continue
        option("--steps", type=int, default=300, help="of training (default: 300)")
        option("--batch", type=int, default=8, help="crops a step (default: 8)")
        option("--crop", type=int, default=128, help="side of a crop in px (default: 128)")
        option("--seeds", type=int, nargs="+", default=[0], help="a run for each (default: 0)")
        option("--only", nargs="+", choices=INGREDIENTS, default=list(INGREDIENTS),
               help="rows (default: all). Any other option goes to train.py, in every run")
    args, args.others = parser.parse_known_args(argv)
    if args.others and args.command != "ablation":
        parser.error(f"unrecognized arguments: {' '.join(args.others)}")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        {"ablation": ablation, "recipes": recipes, "stain": stain}[args.command](args)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
