"""The options of train.py, and the recipes of the shipped weights and of the paper.

    options = parse_options(["--preset", "consep", "--root", "DATA"])    # an argparse.Namespace
    options.batch, options.given                                         # 20, ["preset", "root"]
"""

import argparse
import math
import sys
import time

from data import CONSEP_CLASSES, PANNUKE_SPLITS
from dualunet import DENSITY_WEIGHT
from images import check_mpp
from runs import names_in, plural


# ---------------------------------------------------------------- recipes

FULL = {"encoder_weights": "imagenet", "batch": 32, "crop": 256, "average": 0.999, "epochs": 4,
        "calibrate": True, "data_mpp": [0.25]}
NUCLEI = FULL | {  # freely licensed data only
    "data": ["nuinsseg", "tnbc", "dsb2018"], "share": [0.7, 0.2, 0.1], "one_class": True,
    "scale": 1.4, "steps": 1350, "seed": 1, "licence": "CC BY 4.0"}
PRESETS = {
    "consep": FULL | {  # weights/consep.pt
        "data": ["consep", "crchisto", "monuseg", "nuinsseg", "tnbc", "gbm40", "glioma_tcga",
                 "dsb2018"],
        "share": [0.46, 0.20, 0.12, 0.09, 0.05, 0.04, 0.02, 0.02],
        "classes": list(CONSEP_CLASSES),  # in this order
        "unknown": ["crchisto:miscellaneous"],  # it is not the miscellaneous of CoNSeP
        "val": ["train_5", "train_10", "train_15", "train_20", "train_25"],
        "rare": 0.5, "rare_shares": [0.3, 0.25, 0.15, 0.3], "steps": 1350,
        "batch": 20, "crop": 320,  # nearly as many pixels as 32 crops of 256²
        "licence": "non-commercial research"},
    "nuclei": NUCLEI,  # weights/nuclei.pt
    "nuclei20x": NUCLEI | {"mpp": 0.5, "crop": 192, "steps": 520},  # weights/nuclei20x.pt
    "published": {  # of the paper; it began with an ImageNet encoder, so add --encoder-weights
        "encoder": "resnext50_32x4d", "decoder_channels": [256, 128, 64, 32, 16], "image_skip": 0,
        "epochs": 100, "crop": 256, "optimizer": "adam", "rate": 2e-4, "encoder_rate": 1.0,
        "weight_decay": 1e-4, "schedule": "step", "average": 0.0, "clip": 0.0,
        "density_weight": 1.0, "combine": "sum", "scale": 1.0, "aspect": 1.0, "turn": 0.0,
        "stain": 0.0, "shift": 0.0, "blur": 0.0, "noise": 0.0},
}
OF_THE_SETS = {  # options of a preset that belong to its data sets
    "data_mpp", "share", "val", "classes", "unknown", "rare_shares", "licence"}
RESUMABLE = {  # what may change when a run is continued
    "resume", "epochs", "calibrate", "val_images", "workers", "device", "precision", "compile"}
MOVED = {  # options of earlier versions -> what replaces them
    "--check-data": "run python data.py FOLDER",
    "--evaluate": "run python evaluate.py CHECKPOINT --data FOLDER",
    "--published": "give --preset published"}


# ---------------------------------------------------------------- the command line


USAGE = """Trains DualU-Net; without --data or --preset on synthetic tissue.

    python train.py                                   # a few minutes on two CPU cores
    python train.py --data mydata --encoder-weights imagenet
    python train.py --preset consep --root DATA       # as weights/consep.pt; minutes on a GPU
    torchrun --nproc-per-node 2 train.py --data mydata
"""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and every option with its default."""

    def _get_help_string(self, action):
        default = action.default
        if action.dest == "help":
            return action.help
        if isinstance(default, list):
            default = " ".join(str(value) for value in default)
        if default in (None, ""):
            default = "none"
        elif default is False:
            default = "off"
        text = f"{action.help} (default: {default})"
        return text.replace("%Y%m%d-%H%M%S", "DATE-TIME")  # % has a meaning for argparse


def add_data(parser):
    add = parser.add_argument_group("data").add_argument
    add("--data", default=["synthetic"], nargs="+", metavar="PATH", help="folders of data sets; "
        "beside sets with classes, a set without them teaches only outlines")
    add("--root", default=".", metavar="FOLDER", help="where the paths of --data begin")
    add("--share", nargs="+", type=float, metavar="S", help="share of the crops that each set "
        "gives; without it, in proportion to its area")
    add("--val", nargs="+", metavar="NAME", help="names of validation images; a set without any "
        "of these holds out every fifth image")
    add("--fold", type=int, choices=PANNUKE_SPLITS, help="PanNuke's published split: 1 trains on "
        "fold 1 and validates on 2, 2 on 2 and 1, 3 on 3 and 2")
    add("--classes", type=names_in, metavar="A,B,C", help="the class names; any other name in the "
        "data is an error")
    add("--unknown", nargs="+", default=[], metavar="SET:CLASS", help="treat this class of this "
        "set as unknown: it teaches only outlines")
    add("--one-class", action="store_true", help="ignore the classes and train only 'nucleus'")
    add("--mpp", type=float, default=0.25, help="µm per pixel that the network sees; images of "
        "another resolution are resampled to it")
    add("--data-mpp", nargs="+", type=float, metavar="MPP", help="µm per pixel of the images, one "
        "number or one for each set; without it as the files state, else 0.25")


def add_model(parser):
    add = parser.add_argument_group("model").add_argument
    add("--encoder", default="efficientnet_lite2", help="name of the encoder; the paper has "
        "resnext50_32x4d")
    add("--decoder-channels", default=[192, 96, 48, 32, 16], nargs=5, type=int, metavar="C",
        help="widths of both decoders, deepest first")
    add("--image-skip", type=int, default=16, metavar="C", help="channels that the last decoder "
        "block takes from the image itself; 0 (published): none")
    add("--encoder-weights", metavar="FILE", help="ImageNet weights: a file, a URL, or the word "
        "imagenet for those of the installed package")
    add("--init", metavar="CHECKPOINT", help="start from these weights; classes that they lack "
        "start at random")
    add("--resume", metavar="FOLDER", help="continue the run in this folder; --epochs extends it")


def add_optimisation(parser):
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=8, help="number of epochs; the network is validated "
        "and saved after each")
    add("--steps", type=int, default=0, help="number of steps in an epoch; 0: as many as "
        "cover the training pixels once, at least 50")
    add("--batch", type=int, default=8, help="number of crops in a step")
    add("--crop", type=int, default=192, help="side of a crop in pixels")
    add("--rate", type=float, default=2e-3, help="learning rate, after a warm-up of 2 %% of the "
        "steps")
    add("--encoder-rate", type=float, default=0.4, help="the encoder's rate as a part of --rate")
    add("--schedule", default="cosine", choices=("cosine", "step"), help="cosine: the rate falls "
        "to 0.5 %%; step: it falls to a tenth at 70 %% of the steps and again at 90 %%")
    add("--optimizer", default="adamw", choices=("adamw", "adam"), help="adamw decays only "
        "kernels; adam (published) decays all parameters")
    add("--weight-decay", type=float, default=0.03, help="weight decay of the optimizer")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient; 0: no limit")
    add("--average", type=float, default=0.99, help="decay of the running average of the weights, "
        "which is validated and saved; 0: no average; use 0.999 for long runs")
    add("--class-weights", default="sqrt", help="class weights of the cross-entropy: "
        "sqrt is 1/sqrt(frequency), with background like the mean nucleus pixel; none; or numbers "
        "with commas between, background first")
    add("--density-weight", type=float, default=DENSITY_WEIGHT, help="weight of "
        "the density's loss")
    add("--combine", default="max", choices=("max", "sum"), help="how overlapping peaks of the "
        "density target combine; sum is published")
    add("--calibrate", action="store_true", help="at the end, lower the background's logit so that "
        "outlines of the validation images are best")
    add("--seed", type=int, default=0, help="seed of random weights, crops and synthetic tissue")


def add_augmentation(parser):
    add = parser.add_argument_group("augmentation").add_argument
    add("--scale", type=float, default=1.3, help="largest zoom in or out; 1: none")
    add("--aspect", type=float, default=1.08, help="largest stretch; 1: none")
    add("--turn", type=float, default=0.7, help="share of the crops turned by any angle; the "
        "others make quarter turns")
    add("--stain", type=float, default=0.25, help="the amount of each stain is scaled by 1 ± this")
    add("--shift", type=float, default=0.07, help="the amount of each stain is shifted by ± this "
        "optical density")
    add("--blur", type=float, default=0.25, help="share of the crops that are blurred")
    add("--noise", type=float, default=0.25, help="share of the crops that get noise")
    add("--rare", type=float, default=0.0, help="share of the crops around a nucleus whose class "
        "is drawn first, so that rare classes are seen more often")
    add("--rare-shares", nargs="+", type=float, metavar="S", help="how often each class is drawn; "
        "without it, all equally often")


def add_machine(parser):
    add = parser.add_argument_group("output and machine").add_argument
    add("--out", default="runs/%Y%m%d-%H%M%S", metavar="FOLDER", help="folder of the run")
    add("--licence", default="that of the training data", help="licence of the weights, stored "
        "in the checkpoint")
    add("--val-images", type=int, default=16, metavar="N", help="validation images of each set "
        "to segment after an epoch; 0: none, and best.pt is the last epoch")
    add("--workers", type=int, default=1, help="processes that prepare crops; use 8 with a GPU")
    add("--device", default="auto", help="cuda, mps or cpu; auto: the first available")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="auto: bf16 if the "
        "processor has it")
    add("--compile", action="store_true", help="use torch.compile: the first step is slow, the "
        "others are faster")


def make_parser():
    """The command line, in groups, the everyday options first."""
    parser = argparse.ArgumentParser(description=USAGE, formatter_class=Formatter)
    parser.add_argument("--preset", choices=PRESETS, help="recipe of a shipped file or the paper; "
                        "your own options override it, and --data replaces its sets")
    add_data(parser)
    add_model(parser)
    add_optimisation(parser)
    add_augmentation(parser)
    add_machine(parser)
    return parser


def parse_options(argv=None):
    """The command line as a namespace; given options override the preset, and that the defaults.

    `given` lists the options that the user wrote. Unknown options are refused with exit code 2.
    """
    parser = make_parser()
    for word in sys.argv[1:] if argv is None else argv:
        if word in MOVED:
            parser.exit(2, f"error: {word} is gone; {MOVED[word]}\n")

    # argparse sets no default where the namespace has the name, so None marks what was not given
    defaults = vars(parser.parse_args([]))
    nothing = argparse.Namespace(**dict.fromkeys(defaults))
    written = vars(parser.parse_args(argv, nothing))
    given = {name: value for name, value in written.items() if value is not None}
    preset = dict(PRESETS.get(given.get("preset"), {}))
    if "data" in given:  # keep the recipe without the options of its sets
        preset = {name: value for name, value in preset.items() if name not in OF_THE_SETS}
    options = argparse.Namespace(**defaults | preset | given)
    options.given = sorted(given)
    if "out" not in given:
        options.out = time.strftime(options.out)
    return options


def check_options(options):
    """Raises ValueError for numbers out of range, or that do not fit together."""
    smallest = {"epochs": 1, "steps": 0, "batch": 1, "crop": 32, "val_images": 0, "workers": 0}
    for name, least in smallest.items():
        value = getattr(options, name)
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected at least {least}")
    check_mpp(options.mpp)
    for mpp in options.data_mpp or []:
        check_mpp(mpp, "--data-mpp")

    # BatchNorm at stride 32 needs two values
    values = options.batch * math.ceil(options.crop / 32) ** 2
    if values < 2:
        raise ValueError(f"--batch {options.batch} --crop {options.crop}: crop and batch too small "
                         "for batch normalisation; raise either")
    if options.combine == "sum" and options.scale != 1:
        raise ValueError("--combine sum needs --scale 1: peaks that add up cannot be zoomed")
    if "calibrate" in options.given and not options.val_images:
        raise ValueError("--calibrate needs --val-images of at least 1")

    # one number a set, or one resolution for all
    sets = len(options.data)
    for name, values, allowed in (("share", options.share, (0, sets)),
                                  ("data-mpp", options.data_mpp, (0, 1, sets))):
        count = len(values or ())
        if count not in allowed:
            raise ValueError(f"--{name} has {plural(count, 'number')} for "
                             f"{plural(sets, 'set')}; give one a set")
