"""Where the accuracy comes from: reconstruction, the parts of the training, robustness to stain.

    pip install -r benchmarks/requirements.txt      # scikit-image, for the published recipe alone
    python benchmarks/accuracy.py ceiling --data DATA/consep
    python benchmarks/accuracy.py ablation --data DATA/consep --root DATA
    python benchmarks/accuracy.py recipes --data DATA/consep --root DATA
    python benchmarks/accuracy.py stain --data DATA/consep weights/consep.pt

`ablation` and `recipes` train by train.py's own command, at one small budget and with two seeds;
any other option goes to train.py, in every run. Scored are the images of --data that the training
held out. Each prints a table and writes it as JSON.
"""

import argparse
import functools
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the modules are no package

import infer
import peers
import train
from crops import HED, OPTICAL_DENSITY
from data import open_source
from dualunet import load_model, read_checkpoint
from evaluate import figures_of, finder, without_nan
from labels import UNKNOWN_CLASS, number_ids
from postprocess import centroids_of, density_map, measure, reconstruct
from runs import pick_device, pick_precision

PROTOCOL = """detection_f1, class_f1: HoVer-Net's, within 12 px at 40x, pooled over images.
dice, pq: all nuclei one class, IoU > 0.5, mean over images. ±: half the range of the seeds."""


# ---------------------------------------------------------------- parts


def load(path, args):
    """A checkpoint's network for inference, the set of --data, its held-out images there."""
    device = pick_device(args.device)
    model = load_model(path, device).fuse(pick_precision(device))
    source = open_source(args.data)
    held = read_checkpoint(path).get("split", {"val": []})["val"]
    indices = [i for i, name in enumerate(source.names) if name in held]
    if not indices:
        raise ValueError(f"{args.data}: none of the validation images of {path} is here; expected "
                         "the set it was trained on, and a checkpoint that train.py wrote")
    return model, source, indices


def report(args, note, rows):
    """Prints {row: [{figure: value} of each seed]} as markdown, and writes it as JSON."""
    columns = list(next(iter(rows.values()))[0])
    print(f"{args.data}; {note}\n\n| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for row, seeds in rows.items():
        cells = [row]
        for column in columns:
            values = np.array([figures[column] for figures in seeds])
            spread = f" ± {np.ptp(values) / 2:.3f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3f}{spread}".replace("nan", "n/a"))
        print(f"| {' | '.join(cells)} |")
    print(f"\n{PROTOCOL}")
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(without_nan({"data": args.data, "note": note, "rows": rows}), indent=1)
    (args.out / f"{args.command}.json").write_text(text + "\n", encoding="utf-8")


# ---------------------------------------------------------------- two reconstructions


def published(class_probability, density, **_):
    """Label map and classes by the published recipe."""
    labels = peers.published_instances(class_probability, density)
    inst_map, ids = number_ids(labels)
    type_map = class_probability.argmax(axis=0)
    return inst_map, measure(inst_map, type_map, peaks=np.zeros((len(ids), 2))).classes


def ours(class_probability, density, **options):
    """Label map and classes by `reconstruct`."""
    nuclei = reconstruct(class_probability, density, **options)
    return nuclei.inst_map, nuclei.classes


def from_truth(source, way, options, i, _):
    """Nuclei of image i by `way`, from its truth drawn as perfect maps."""
    _, inst_map, type_map = source.read(i)
    type_map = np.where(type_map == UNKNOWN_CLASS, 1, type_map)
    class_probability = np.eye(len(source.class_names) + 1, dtype=np.float32)[type_map]
    density = density_map(centroids_of(inst_map), inst_map.shape, combine=options["combine"],
                          sigma=train.peak_options(source.mpp)["sigma"])
    return way(class_probability.transpose(2, 0, 1), density, **options)


def ceiling(args):
    """What is left of the truth after perfect maps, by the published recipe and by ours."""
    source = open_source(args.data)
    options = train.peak_options(source.mpp)
    del options["sigma"]
    ways = {"ours, unit peaks": (ours, "max"), "ours, summed peaks": (ours, "sum")}
    if peers.can_compare():
        ways = {"published": (published, "sum")} | ways
    indices, rows = range(len(source.names)), {}
    for row, (way, combine) in ways.items():
        find = functools.partial(from_truth, source, way, options | {"combine": combine})
        rows[row] = [figures_of(source, indices, ["nucleus"], find)]
    report(args, f"{len(indices)} images, their truth drawn as perfect maps", rows)


# ---------------------------------------------------------------- trainings at a small budget

BUDGET = (  # the preset consep, but for steps, batch, crop and average
    "--data consep crchisto monuseg nuinsseg tnbc gbm40 glioma_tcga dsb2018 "
    "--share 0.46 0.2 0.12 0.09 0.05 0.04 0.02 0.02 --unknown crchisto:miscellaneous "
    "--val train_5 train_10 train_15 train_20 train_25 --rare 0.5 --rare-shares 0.3 0.25 0.15 0.3 "
    "--encoder-weights imagenet --epochs 1 --steps 400 --batch 8 --crop 128 --val-images 0").split()
INGREDIENTS = {  # run -> in which options of train.py it differs from the base
    "base": "",
    "from-scratch": "--encoder-weights=",
    "no-crchisto": "--share 0.46 0 0.12 0.09 0.05 0.04 0.02 0.02",
    "no-image-skip": "--image-skip 0",
    "no-rare-classes": "--rare 0",
    "no-class-weights": "--class-weights none",
    "density-weight-1": "--density-weight 1",
    "no-average": "--average 0",
    "no-zoom-and-turns": "--scale 1 --aspect 1 --turn 0",
    "no-stain-blur-noise": "--stain 0 --shift 0 --blur 0 --noise 0",
}
TARGETS = {  # sums of peaks cannot be zoomed, so neither run zooms
    "summed-peaks": "--scale 1 --combine sum", "unit-peaks": "--scale 1"}
ELSEWHERE = {"out", "device", "workers", "given"}  # options that leave the result alone


def trained(words):
    """The last.pt of `python train.py WORDS`; a finished run is kept.

    Raises: ValueError for a folder with another run, RuntimeError where train.py fails.
    """
    wanted = vars(train.parse_options(words))
    last = Path(wanted["out"], "last.pt")
    if last.exists():
        saved = read_checkpoint(last)["options"]
        other = [name for name in wanted.keys() - ELSEWHERE if wanted[name] != saved.get(name)]
        if other:
            raise ValueError(f"{last.parent}: holds a run of another {', '.join(sorted(other))}; "
                             "choose another --out")
        return last
    print("python train.py", shlex.join(words), file=sys.stderr)
    command = [sys.executable, str(ROOT / "train.py"), *words]
    if code := subprocess.run(command, stdout=2).returncode:  # standard output has the table
        raise RuntimeError(f"{last.parent}: train.py ended with code {code}; its reason is above")
    return last


def runs_of(name, change, args):
    """`load`ed checkpoints of one recipe, one a seed."""
    for seed in args.seeds:
        out = str(args.out / f"{name}-{seed}")
        words = [*BUDGET, "--device", args.device, *args.others, *change.split(),
                 "--seed", str(seed), "--out", out]
        yield load(trained(words), args)


def note_of(args):
    return f"python train.py {shlex.join([*BUDGET, *args.others])} ..., mean of seeds {args.seeds}"


def ablation(args):
    """Trains the recipe, and with one part changed at a time."""
    rows = {}
    for name in args.only or INGREDIENTS:
        change = INGREDIENTS[name]
        for model, source, indices in runs_of(name, change, args):
            find = finder(model, source)
            figures = figures_of(source, indices, model.config["class_names"], find)
            rows.setdefault(f"{name}: {change}", []).append(figures)
    report(args, note_of(args), rows)


def from_network(model, way, _, image):
    """Nuclei of an image by `way`, from the maps of its tiles put together."""
    height, width = image.shape[:2]
    tile, halo = infer.sides_of(model)
    maps = np.zeros((model.config["num_classes"] + 2, height + tile, width + tile), np.float32)
    for y0, x0, y1, x1 in infer.tile_cores(height, width, tile):
        window = infer.read_window(image, y0 - halo, x0 - halo, y1 + halo, x1 + halo)
        class_probability, density = infer.predict_maps(model, window[None])
        both = np.concatenate([class_probability[0], density])
        maps[:, y0:y1, x0:x1] = both[:, halo:halo + y1 - y0, halo:halo + x1 - x0]
    maps = maps[:, :height, :width]
    return way(maps[:-1], maps[-1], **model.config["reconstruct"])


def recipes(args):
    """Trains on summed peaks (published) and on unit peaks, and reconstructs both both ways."""
    ways = [published, ours] if peers.can_compare() else [ours]
    rows = {}
    for name, change in TARGETS.items():
        for model, source, indices in runs_of(name, change, args):
            for way in ways:
                find = functools.partial(from_network, model, way)
                figures = figures_of(source, indices, model.config["class_names"], find)
                row = f"{name}, reconstruction {way.__name__}: {change}"
                rows.setdefault(row, []).append(figures)
    report(args, note_of(args), rows)


# ---------------------------------------------------------------- stain


def stain_shift(scales, image):
    """The image (H, W, 3) uint8 with the amounts of H, E and residual scaled."""
    mix = np.linalg.inv(HED) @ np.diag(scales) @ HED
    image = 256 * np.exp(-OPTICAL_DENSITY[image] @ mix) - 1
    return image.round().clip(0, 255).astype(np.uint8)


def hue_shift(degrees, image):
    """The image (H, W, 3) uint8 turned about the axis of greys: by 120°, red becomes green."""
    angle = math.radians(degrees)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = np.eye(3) * math.cos(angle) + (1 - math.cos(angle)) / 3 + cross * math.sin(angle)
    return (image @ turn.T).round().clip(0, 255).astype(np.uint8)


SHIFTS = {"unshifted": np.asarray}  # train.py varies stains by 0.75 to 1.25, and no hue
for k in (0.5, 0.75, 1.25, 1.5):
    SHIFTS[f"haematoxylin x {k}"] = functools.partial(stain_shift, (k, 1, 1))
for k in (0.5, 0.75, 1.25, 1.5):
    SHIFTS[f"eosin x {k}"] = functools.partial(stain_shift, (1, k, 1))
for k in (-30, -15, 15, 30):
    SHIFTS[f"hue {k:+}°"] = functools.partial(hue_shift, k)


def stain(args):
    """Scores checkpoints (of several seeds: their mean) under shifts of stain and hue."""
    rows = {}
    for path in args.checkpoints:
        model, source, indices = load(path, args)
        find = finder(model, source)
        for row, shift in SHIFTS.items():
            def find_shifted(i, image):
                return find(i, shift(image))

            figures = figures_of(source, indices, model.config["class_names"], find_shifted)
            rows.setdefault(row, []).append(figures)
    report(args, f"mean of {', '.join(args.checkpoints)}", rows)


# ---------------------------------------------------------------- command line


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for action in (ceiling, ablation, recipes, stain):
        command = commands.add_parser(action.__name__, help=action.__doc__, allow_abbrev=False)
        command.set_defaults(action=action)
        option = command.add_argument
        option("--data", required=True, metavar="PATH", help="the set to score on")
        option("--device", default="auto", help="cpu, cuda, mps (default: the fastest here)")
        option("--out", type=Path, default=Path("runs", "accuracy"), help="folder to write into "
               "(default: runs/accuracy)")
        if action is stain:
            option("checkpoints", nargs="+", help="that train.py wrote")
        if action in (ablation, recipes):
            option("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
        if action is ablation:
            option("--only", nargs="+", choices=INGREDIENTS, help="rows (default: all)")
    args, args.others = parser.parse_known_args(argv)
    if args.others and args.command in ("ceiling", "stain"):
        parser.error(f"unrecognized arguments: {' '.join(args.others)}")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    try:
        args.action(args)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
