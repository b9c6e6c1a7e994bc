"""Trains DualU-Net, on synthetic tissue when nothing else is named, and evaluates checkpoints.

    python train.py                                 # five minutes on two CPU cores with bfloat16
    python train.py --data CoNSeP --epochs 100      # or PanNuke's folder, or images/ beside labels/
    python train.py --evaluate weights/consep.pt --data CoNSeP
    torchrun --nproc-per-node 2 train.py --data CoNSeP

A run writes best.pt, last.pt, log.jsonl, curves.png and preview.png into its folder.
"""

import argparse
import copy
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, default_collate

from data import (PANNUKE_SPLITS, Crops, check_source, class_lookup, cut, open_source,
                  read_predictions)
from dualunet import (DualUNet, class_colors, dual_loss, load_encoder_weights, load_model,
                      read_checkpoint, save_checkpoint)
from infer import keep_memory, pick_device, pick_precision, predict, show_progress
from metrics import bootstrap_interval, panoptic_quality, score_image, summarise
from postprocess import contours

PUBLISHED = {  # the authors' recipe as it stands; add --encoder-weights, they started from ImageNet
    "encoder": "resnext50_32x4d", "decoder_channels": (256, 128, 64, 32, 16), "epochs": 100,
    "crop": 256, "optimizer": "adam", "rate": 2e-4, "weight_decay": 1e-4, "schedule": "step",
    "average": 0.0, "clip": 0.0, "density_weight": 1.0, "combine": "sum", "sigma": 5.0,
    "scale": 1.0, "turn": 0.0, "stain": 0.0, "blur": 0.0,
}
VAL_CROPS = 16  # ours: fixed crops whose loss is logged
VAL_IMAGES = 16  # ours: at most so many images of each set are segmented after an epoch


def parse_options(argv=None):
    """The command line as a namespace; unknown options are refused with exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name, default=None, **kwargs):
        if default is not None and "nargs" not in kwargs:
            kwargs["type"] = type(default)
        parser.add_argument(name, default=default, **kwargs)

    add("--data", ["synthetic"], nargs="+", metavar="PATH", help="data sets; one that only says "
        "'nucleus' teaches outlines and peaks where another has classes")
    add("--share", nargs="+", type=float, metavar="S",
        help="of the crops from each set; default: by area")
    add("--one-class", action="store_true", help="leave classes aside: every nucleus is a nucleus")
    add("--val", nargs="+", metavar="NAME",
        help="validation images; default: every fifth of each set")
    add("--fold", type=int, choices=PANNUKE_SPLITS,
        help="PanNuke's published split: 1-2-3, 2-1-3 or 3-2-1")
    add("--mpp", 0.25, help="micrometres a pixel of the data, kept in the checkpoint; 0.25 is 40x")
    add("--licence", "that of the training data", help="of the weights, kept in the checkpoint")
    add("--out", time.strftime("runs/%Y%m%d-%H%M%S"), metavar="FOLDER",
        help="default: runs/ and the time")
    add("--published", action="store_true", help="the paper's recipe: changes the defaults below")
    add("--encoder", "resnet18", help="small enough for a CPU; resnext50_32x4d is the paper's")
    add("--decoder-channels", (128, 64, 32, 16, 16), nargs=5, type=int, metavar="C",
        help="half the paper's: 27 MB on disk")
    add("--zoom", 0.0, help="the network sees images enlarged so much: 1.25 finds more small "
        "nuclei in 1.6 times the time; 0: as --init does, else 1")
    add("--encoder-weights", metavar="FILE_OR_URL", help="ImageNet weights of the encoder")
    add("--init", metavar="CHECKPOINT",
        help="start from its weights; a class head of another size starts anew")
    add("--resume", metavar="FOLDER", help="go on exactly where the run in this folder stopped")
    add("--epochs", 8,
        help="the synthetic default learns enough in five minutes; real data want 100")
    add("--steps", 0, help="an epoch; 0: as many as cover the training pixels once, at least 50")
    add("--batch", 8, help="crops a step; published")
    add("--crop", 192,
        help="side of a crop in pixels; a CPU sees more tissue in more, smaller ones")
    add("--optimizer", "adamw", choices=("adamw", "adam"),
        help="from scratch, decoupled decay does better")
    add("--rate", 1.5e-3, help="from scratch; pretrained encoders want 2e-4")
    add("--weight-decay", 0.01, help="torch's default for adamw")
    add("--clip", 1.0, help="norm of the gradient; from scratch the first steps jump; 0: none")
    add("--schedule", "cosine", choices=("cosine", "step"),
        help="step: x0.1 at 70 and at 90 percent")
    add("--average", 0.998,
        help="decay of the averaged weights, which are what is evaluated and kept; 0: none")
    add("--class-weights", "sqrt", help="nuclei by 1/sqrt(frequency), background as "
        "their mean; or none; or K + 1 numbers with commas")
    add("--density-weight", 20.0, help="of the density's loss; with 1 it is undertrained")
    add("--combine", "max", choices=("max", "sum"),
        help="of overlapping peaks: every nucleus peaks at 1")
    add("--sigma", 5.0, help="of a peak in pixels; published")
    add("--scale", 1.25, help="largest zoom in augmentation; 1: none")
    add("--turn", 45.0, help="largest turn in degrees beyond the quarter turns; 0: those alone")
    add("--stain", 1.0, help="strength of stain variation; 0: none")
    add("--blur", 0.2, help="share of crops that are blurred")
    add("--seed", 0, help="of weights, crops and synthetic tissue")
    add("--workers", 1, help="processes that prepare crops; one keeps two cores busy")
    add("--device", "auto", help="cuda, mps or cpu; auto takes the first there is")
    add("--precision", "auto", choices=("auto", "bf16", "fp32"),
        help="auto: bf16 where the processor has it")
    add("--compile", action="store_true",
        help="torch.compile: slow at the first step, then a fifth faster")
    add("--check-data", action="store_true",
        help="no training: read all of --data and list every problem")
    add("--evaluate", metavar="CHECKPOINT",
        help="no training: score it, or a folder that infer.py wrote")
    add("--all", action="store_true",
        help="evaluate all images, not the checkpoint's validation images alone")
    add("--flips", action="store_true",
        help="evaluate with the mean over four mirrorings, as infer.py --flips")
    add("--worst", 3, help="images that --evaluate draws, truth beside prediction")
    if parser.parse_known_args(argv)[0].published:
        parser.set_defaults(**PUBLISHED)
    return parser.parse_args(argv)


# ---------------------------------------------------------------- data


def split_source(source, val, fold):
    """Indices of the training and of the validation images."""
    if fold and source.tissues:
        prefixes = [f"fold{k}/" for k in PANNUKE_SPLITS[fold][:2]]
        return [[i for i, name in enumerate(source.names) if name.startswith(p)] for p in prefixes]
    held = [name in val if val else i % 5 == 4 for i, name in enumerate(source.names)]
    return [[i for i, h in enumerate(held) if h == wanted] for wanted in (False, True)]


def merge_classes(sources):
    """Names of all classes in the order met; "nucleus" counts only where there is no other."""
    names = list(dict.fromkeys(name for source in sources for name in source.class_names))
    return [name for name in names if name != "nucleus"] or names


def parse_class_weights(text, crops, num_classes, samples=256):
    """(K + 1,) float32, mean 1 over the training pixels, or None; finite for an absent class."""
    if text == "none":
        return None
    if text != "sqrt":
        weights = [float(w) for w in text.split(",")]
        if len(weights) != num_classes + 1:
            raise ValueError(f"--class-weights has {len(weights)} numbers; expected "
                             f"{num_classes + 1}, background first")
        return torch.tensor(weights)
    counts = sum(np.bincount(crops[n][1].numpy().ravel(), minlength=256) for n in range(samples))
    frequency = counts[:num_classes + 1] / max(counts[:num_classes + 1].sum(), 1)  # known classes
    weights = np.maximum(frequency, 1e-3) ** -0.5
    # background as the mean nucleus pixel; a lighter one widens outlines
    weights[0] = np.average(weights[1:], weights=weights[1:] ** -2)
    return torch.tensor(weights / (weights * frequency).sum(), dtype=torch.float32)


def to_device(images, device):
    return images.to(device, non_blocking=True, memory_format=torch.channels_last).float() / 255


# ---------------------------------------------------------------- evaluation


def nucleus_classes(inst_map, type_map):
    """One class for each id present, in ascending order of id."""
    ids, first = np.unique(inst_map, return_index=True)
    return type_map.ravel()[first[ids > 0]].astype(np.int64)


def scored_classes(source, class_names):
    """The names to score under: where the truth only says "nucleus", so do the scores."""
    return ["nucleus"] if list(source.class_names) == ["nucleus"] else list(class_names)


def score_source(source, indices, class_names, find):
    """`score_image` of every image; find(i, image) gives its predicted inst_map and classes."""
    names = scored_classes(source, class_names)
    lookup, scores = class_lookup(source, names), []
    for done, i in enumerate(indices):
        show_progress(f"evaluates {source.names[i]} ({done + 1} of {len(indices)})")
        image, inst_map, type_map = source.read(i)
        found_map, found_classes = find(i, image)
        classes = (None, None) if len(names) == 1 else (
            nucleus_classes(inst_map, lookup[type_map]), found_classes)
        scores.append(score_image(inst_map, classes[0], found_map, classes[1],
                                  num_classes=len(names)))
    show_progress("")
    return scores


def finder(model, precision, **options):
    """The function that `score_source` asks for the nuclei of an image; options are `predict`'s."""
    def find(i, image):
        nuclei = predict(model, image, dtype=precision, **options)
        return nuclei.inst_map, nuclei.classes

    return find


def validate(model, crops, held, loss_options, device, precision):
    """Loss terms over fixed crops, and F1, Dice and PQ of whole images, one set after the other."""
    images, type_map, density = default_collate([crops[n] for n in range(VAL_CROPS)])
    with (torch.inference_mode(),
          torch.autocast(device.type, precision, enabled=precision is not None)):
        maps = model(to_device(images, device))
        terms = dual_loss(*maps, type_map.to(device), density.to(device), **loss_options)
    figures = {f"val_{name}": value.item() for name, value in terms.items()}
    totals, class_names = [], model.config["class_names"]
    for name, (source, indices) in held.items():
        scores = score_source(source, indices, class_names, finder(model, precision))
        summary = summarise(scores, scored_classes(source, class_names))
        several = len(summary["classification"]["f1"]) > 1
        figures[name] = {
            "detection_f1": summary["detection"]["f1"],
            "class_f1": summary["classification"]["mean"] if several else math.nan,
            "dice": summary["image_mean"]["dice"], "pq": summary["image_mean"]["pq"],
        }
        defined = [figures[name][k] for k in ("detection_f1", "class_f1", "pq")
                   if not math.isnan(figures[name][k])]
        totals.append(sum(defined) / max(len(defined), 1))
    return figures | {"score": sum(totals) / len(totals)}


# ---------------------------------------------------------------- pictures


def draw_curves(records, path):
    """The log as a picture: losses left, scores of the first validation set right, over epochs."""
    canvas = Image.new("RGB", (900, 360), "white")
    draw = ImageDraw.Draw(canvas)
    first = next(name for name, value in records[0].items() if isinstance(value, dict))
    panels = (("loss", {name: [r[name] for r in records]
                        for name in ("loss", "val_loss", "val_ce", "val_dice")}),
              (f"validation: {first}", {name: [r[first][name] for r in records]
                                        for name in records[0][first]}))
    for left, (title, lines) in zip((60, 510), panels):
        values = [v for line in lines.values() for v in line if math.isfinite(v)]
        high = 1.0 if left > 60 else 1.05 * max(values)
        draw.text((left, 12), f"{title}, {len(records)} epochs", fill="black")
        for tick in range(5):
            draw.line((left, 310 - 67 * tick, left + 360, 310 - 67 * tick), fill="#cccccc")
            draw.text((left - 36, 304 - 67 * tick), f"{high * tick / 4:.2f}", fill="black")
        for i, (name, line) in enumerate(lines.items()):
            ink = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")[i]
            points = [(left + 360 * (n + 1) / len(line), 310 - 268 * v / high)
                      for n, v in enumerate(line) if math.isfinite(v)]
            draw.line([(left, points[0][1]), *points] if points else [], fill=ink, width=2)
            draw.text((left + 90 * i, 324), name, fill=ink)
    canvas.save(path)


def outlined(image, inst_map, classes, colors):
    """The image twice as large, every nucleus outlined in its class's colour; (2H, 2W, 3) uint8."""
    ids, compact = np.unique(inst_map, return_inverse=True)
    compact = compact.reshape(inst_map.shape).astype(np.int32) + (ids[0] > 0)
    canvas = Image.fromarray(image).resize((2 * image.shape[1], 2 * image.shape[0]))
    draw = ImageDraw.Draw(canvas)
    for ring, k in zip(contours(compact), classes):
        draw.line([(2 * x, 2 * y) for y, x in ring.tolist()], fill=tuple(colors[k - 1]), width=2)
    return np.asarray(canvas)


def panel(image, truth, found, colors):
    """Input, truth and prediction side by side; truth and found are (inst_map, type_map)."""
    views = [np.asarray(Image.fromarray(image).resize((2 * image.shape[1], 2 * image.shape[0])))]
    for inst_map, type_map in (truth, found):
        classes = np.minimum(nucleus_classes(inst_map, type_map), len(colors))  # unknown as last
        views.append(outlined(image, inst_map, classes, colors))
    return np.concatenate(views, axis=1)


def draw_preview(model, source, indices, path, side=256, **options):
    """The middle of three validation images, a row each: input, truth, prediction."""
    rows, lookup = [], class_lookup(source, model.config["class_names"])
    for i in indices[:3]:
        whole, inst_map, type_map = source.read(i)
        found = predict(model, whole, **options)
        window = *((length - side) // 2 for length in inst_map.shape), side, side
        image, *truth = cut((whole, inst_map, lookup[type_map]), *window)
        _, *found = cut((whole, found.inst_map, np.append(0, found.classes)[found.inst_map]),
                        *window)
        rows.append(panel(image, truth, found, model.config["colors"]))
    Image.fromarray(np.concatenate(rows)).save(path)


# ---------------------------------------------------------------- training


def finite(value):
    """The value with nan, which JSON lacks, as None."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report(out, records, held):
    """The last epoch's line for people, all epochs' lines for machines, and the curves."""
    last = records[-1]
    print(f"epoch {last['epoch']}, {last['seconds']:.0f} s: loss {last['loss']:.3f}, "
          f"val_loss {last['val_loss']:.3f}",
          *(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in last[name].items()
                                    if not math.isnan(v)) for name in held), sep="; ", flush=True)
    (out / "log.jsonl").write_text(
        "".join(json.dumps(finite(r)) + "\n" for r in records), encoding="utf-8")
    draw_curves(records, out / "curves.png")


def open_data(options):
    """Training and plain validation crops, {set: (source, indices)} to segment, names by split."""
    sources = [open_source(path, seed=options.seed) for path in options.data]
    splits = [split_source(source, options.val, options.fold) for source in sources]
    for path, (images, val) in zip(options.data, splits):
        if not images or not val:
            raise ValueError(f"{path}: {len(images)} training and {len(val)} validation images; "
                             "expected some of each, see --val")
    if options.share and len(options.share) != len(sources):
        raise ValueError(f"--share has {len(options.share)} numbers; "
                         f"expected one for each of {len(sources)} sets")
    class_names = ["nucleus"] if options.one_class else merge_classes(sources)
    areas = [len(images) * source.read(images[0])[1].size
             for source, (images, _) in zip(sources, splits)]
    augmentation = {"scale": options.scale, "turn": options.turn, "stain": options.stain,
                    "blur": options.blur}
    crops = [Crops([(source, images[part], share) for source, images, share
                    in zip(sources, splits, options.share or areas)],
                   class_names, crop=options.crop, seed=options.seed, sigma=options.sigma,
                   combine=options.combine, **variation)
             for part, variation in enumerate((
                 augmentation, {"scale": 1.0, "turn": 0.0, "stain": 0.0, "blur": 0.0}))]
    names = [Path(path).name for path in options.data]
    names = names if len(set(names)) == len(names) else options.data
    held = {name: (source, val[::-(-len(val) // VAL_IMAGES)])
            for name, source, (_, val) in zip(names, sources, splits)}
    split = {part: [source.names[i] for source, images in zip(sources, splits) for i in images[k]]
             for k, part in enumerate(("train", "val"))}
    steps = options.steps or max(50, round(sum(areas) / options.crop**2 / options.batch))
    return *crops, class_names, held, split, steps


def rate_at(progress, options):
    """The learning rate when `progress` in [0, 1) of the training is done."""
    if options.schedule == "step":
        return options.rate * 0.1 ** ((progress >= 0.7) + (progress >= 0.9))  # published
    warm = min(1.0, (progress + 1e-6) / 0.02)
    return options.rate * warm * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


@torch.no_grad()
def average_into(average, model, decay):
    """Moves the averaged weights towards the model's; counters are copied."""
    for a, b in zip(average.state_dict().values(), model.state_dict().values()):
        a.lerp_(b, 1 - decay) if a.is_floating_point() else a.copy_(b)


def build_model(options, class_names):
    """A new network, or one that begins with --encoder-weights or --init."""
    init = load_model(options.init) if options.init else None
    model = DualUNet(num_classes=len(class_names), encoder=options.encoder,
                     decoder_channels=options.decoder_channels,
                     zoom=options.zoom or (init.config["zoom"] if init else 1.0))
    if options.encoder_weights:
        load_encoder_weights(model, options.encoder_weights)
    if init:
        start, own = init.state_dict(), model.state_dict()
        if start.keys() != own.keys():
            raise ValueError(f"{options.init}: another encoder than --encoder {options.encoder}; "
                             "name its own")
        kept = {k: v for k, v in start.items() if v.shape == own[k].shape}
        if others := [k for k in start if k not in kept and not k.startswith("segmentation_head.")]:
            raise ValueError(f"{options.init}: {others[0]} has another size; "
                             "give its own --decoder-channels")
        model.load_state_dict(own | kept)
        new = " but for the class head, whose size differs" * (len(kept) < len(start))
        print(f"starts from {options.init}{new}")
    model.config |= {
        "class_names": class_names, "colors": class_colors(class_names), "mpp": options.mpp,
        "licence": options.licence, "combine": options.combine, "sigma": options.sigma,
    }
    return model


def train(options):
    """The whole training, from data to pictures.

    All randomness comes from (seed, number of the crop), so a resumed run needs no random state.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    state = {"records": [], "epoch": 0, "best": -1.0}
    if options.resume:
        out = Path(options.resume)
        saved = read_checkpoint(out / "last.pt")
        if "optimizer" not in saved:
            raise ValueError(f"{out}/last.pt: holds no training to go on with; "
                             "start from its weights with --init")
        state = {k: saved[k] for k in ("records", "epoch", "best")}
        machine = {k: getattr(options, k) for k in ("device", "workers", "resume")}
        options = argparse.Namespace(**vars(options) | saved["options"] | machine)
    else:
        out = Path(options.out)
        if (out / "last.pt").exists():
            raise ValueError(f"{out} holds a run; go on with --resume {out}, or give another --out")
        out.mkdir(parents=True, exist_ok=True)
    device = pick_device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    precision = pick_precision(device, options.precision)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(options.seed)

    crops, val_crops, class_names, held, split, steps = open_data(options)

    model = build_model(options, class_names).to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(model) if options.average else model
    weights = parse_class_weights(options.class_weights, crops, len(class_names))
    loss_options = {"class_weights": None if weights is None else weights.to(device),
                    "density_weight": options.density_weight}
    optimizer = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[options.optimizer](
        model.parameters(), lr=options.rate, weight_decay=options.weight_decay)
    if options.resume:
        model.load_state_dict(saved["training"])
        average.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if rank == 0:  # a kill between last.pt and these may have cost them
            report(out, state["records"], held)
            draw_preview(average.eval(), *next(iter(held.values())), out / "preview.png",
                         dtype=precision)
    network = model if world == 1 else torch.nn.parallel.DistributedDataParallel(model)
    network = torch.compile(network) if options.compile else network
    began = time.monotonic()

    for epoch in range(state["epoch"], options.epochs):
        model.train()
        first = epoch * steps * options.batch * world
        items = range(first + rank, first + steps * options.batch * world, world)
        loader = DataLoader(crops, options.batch, sampler=items, num_workers=options.workers)
        sums = {}
        for step, (images, type_map, density) in enumerate(loader):
            rate = rate_at((epoch + step / steps) / options.epochs, options)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(device.type, precision, enabled=precision is not None):
                maps = network(to_device(images, device))
            terms = dual_loss(*maps, type_map.to(device), density.to(device), **loss_options)
            if not torch.isfinite(terms["loss"]):
                names = dict.fromkeys(crops.name(n) for n
                                      in items[step * options.batch:][:options.batch])
                raise RuntimeError(
                    f"loss is {terms['loss'].item()} at epoch {epoch + 1}, step {step + 1}, before "
                    f"the weights changed; look at {', '.join(names)}, or lower --rate and go on "
                    f"with --resume {out}")
            optimizer.zero_grad(set_to_none=True)
            terms["loss"].backward()
            if options.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            optimizer.step()
            if options.average:
                done = epoch * steps + step + 1
                average_into(average, model, min(options.average, done / (done + 10)))
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item()
            show_progress(f"epoch {epoch + 1} of {options.epochs}, step {step + 1} of {steps}: "
                          f"loss {sums['loss'] / (step + 1):.3f}, {time.monotonic() - began:.0f} s")

        if rank == 0:
            figures = ({"epoch": epoch + 1} | {name: value / steps for name, value in sums.items()}
                       | {"rate": rate})
            figures |= validate(average.eval(), val_crops, held, loss_options, device, precision)
            state["records"].append(figures | {"seconds": round(time.monotonic() - began, 1)})
            state |= {"epoch": epoch + 1, "best": max(state["best"], figures["score"]),
                      "split": split, "options": vars(options)}
            if figures["score"] == state["best"]:  # before last.pt: a crash between remakes it
                save_checkpoint(out / "best.pt", average, half=True, **state)
            save_checkpoint(out / "last.pt", average, **state, training=model.state_dict(),
                            optimizer=optimizer.state_dict())
            report(out, state["records"], held)
            draw_preview(average, *next(iter(held.values())), out / "preview.png", dtype=precision)
        if world > 1:
            dist.barrier()
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        print(f"best.pt, last.pt, log.jsonl, curves.png and preview.png are in {out}")


# ---------------------------------------------------------------- main


def print_table(summary, class_names):
    """The figures of `summarise`, each under its protocol; n/a where undefined."""
    def row(title, *values):
        print(f"{title:<18}" + "".join(
            f"{v:>10}" if isinstance(v, str) else
            f"{'n/a' if math.isnan(v) else format(v, '.3f'):>10}" for v in values))

    detection, mean, pooled, pannuke = (
        summary[k] for k in ("detection", "image_mean", "pooled", "pannuke"))
    f1, low_high = summary["classification"], summary["class_f1_interval"]
    print(f"{summary['checkpoint']} on {summary['images']} images of {summary['data']}")
    for title, part, keys in (("detection", detection, ("f1", "precision", "recall")),
                              ("outlines", mean, ("dice", "aji", "aji_plus", "dq", "sq", "pq"))):
        print(f"\n{title} ({part['protocol']})")
        row("", *keys)
        row("all nuclei", *(part[k] for k in keys))
    print(f"\nclasses (f1: {f1['protocol']}; dq, sq, pq: {pooled['protocol']})")
    row("", "f1", "dq", "sq", "pq")
    for name in class_names:
        row(name, f1["f1"][name], *pooled["classes"][name].values())
    row("mean", f1["mean"], "", "", pooled["mpq_plus"])
    row("all nuclei", "", pooled["dq"], pooled["sq"], pooled["pq"])
    print("mean f1, 95 % of bootstraps over images: {:.3f} to {:.3f}".format(*low_high))
    print(f"\n{pannuke['protocol']}: bPQ {pannuke['bpq']:.3f}, mPQ {pannuke['mpq']:.3f}")
    if empty := [summary["names"][n] for n in summary["images_without_truth"]]:
        print(f"no nucleus in the truth, so no DQ, SQ, PQ: {', '.join(empty)}")


def evaluate(options):
    """Scores a checkpoint or infer.py's folder on the first of --data; prints, writes, draws."""
    source, out = open_source(options.data[0]), Path(options.out)
    split = {"train": [], "val": []}
    if Path(options.evaluate).is_dir():
        class_names = list(source.class_names)

        def find(i, image):
            return read_predictions(options.evaluate, source.names[i], class_names)
    else:
        device = pick_device(options.device)
        model = load_model(options.evaluate, device).fuse(pick_precision(device, options.precision))
        class_names = model.config["class_names"]
        split = read_checkpoint(options.evaluate).get("split", split)
        find = finder(model, None, flips=options.flips)

    wanted = options.val or ([] if options.all else split["val"])
    indices = [i for i, name in enumerate(source.names) if not wanted or name in wanted]
    if not indices:
        raise ValueError(f"{options.data[0]}: none of {options.evaluate}'s validation images is "
                         "here; use --all")
    names = [source.names[i] for i in indices]
    if seen := sorted(set(names) & set(split["train"])):
        print(f"warning: {options.evaluate} was trained on {len(seen)} of these images, "
              f"{seen[0]} for one")

    scores = score_source(source, indices, class_names, find)
    class_names = scored_classes(source, class_names)
    summary = summarise(scores, class_names,
                        source.tissues and [source.tissues[i] for i in indices])
    low, high = bootstrap_interval(
        scores, lambda s: summarise(s, class_names)["classification"]["mean"])
    summary |= {"checkpoint": str(options.evaluate), "data": str(options.data[0]), "names": names,
                "class_f1_interval": [low, high]}
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(
        json.dumps(finite(summary | {"per_image": scores}), indent=1))
    print_table(summary, class_names)
    quality = [panoptic_quality(score["panoptic"])[2] for score in scores]
    for n in np.argsort(quality)[:options.worst]:  # an image with nothing to find sorts last
        image, inst_map, type_map = source.read(indices[n])
        found_map, found_classes = find(indices[n], image)
        found_types = np.append(0, found_classes)[found_map]
        path = out / f"worst_{names[n].replace('/', '_')}.png"
        picture = panel(image, (inst_map, class_lookup(source, class_names)[type_map]),
                        (found_map, found_types), class_colors(class_names))
        Image.fromarray(picture).save(path)
        print(f"PQ {quality[n]:.3f}, input, truth, prediction: {path}")
    return summary


def check_data(options):
    """Reads images and labels, lists all problems at once, counts classes, draws contact sheets."""
    out, bad = Path(options.out), 0
    out.mkdir(parents=True, exist_ok=True)
    for path in options.data:
        source = open_source(path)
        problems, counts = check_source(source)
        bad += len(problems)
        print(f"{path}: {len(source.names)} images;",
              ", ".join(f"{name} {n:,}" for name, n in zip(source.class_names, counts)),
              *problems.values(), sep="\n  ")
        good = [i for i in range(len(source.names)) if i not in problems]
        tiles = [np.full((256, 256, 3), 255, np.uint8)] * 24
        for n, i in enumerate(good[::-(-len(good) // 24) or 1]):  # corners of 24 images throughout
            image, inst_map, type_map = cut(source.read(i), 0, 0, 128, 128)
            tiles[n] = outlined(image, inst_map, nucleus_classes(inst_map, type_map),
                                class_colors(source.class_names))
        sheet = np.concatenate([np.concatenate(tiles[row:row + 6], axis=1)
                                for row in range(0, 24, 6)])
        Image.fromarray(sheet).save(out / f"contact_{Path(path).name}.png")
    print(f"{bad} problems; contact sheets are in {out}")
    if bad:
        raise ValueError(f"{bad} files cannot be trained on: mend or remove them")


def main(argv=None):
    options = parse_options(argv)
    keep_memory()
    try:
        action = check_data if options.check_data else evaluate if options.evaluate else train
        action(options)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
