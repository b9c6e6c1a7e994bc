"""Trains DualU-Net; without --data or --preset on synthetic tissue.

    python train.py                                   # a few minutes on two CPU cores
    python train.py --data mydata --encoder-weights imagenet
    python train.py --preset consep --root DATA       # as weights/consep.pt; minutes on a GPU
    torchrun --nproc-per-node 2 train.py --data mydata

A run writes best.pt, last.pt, log.jsonl, curves.png and preview.png into its folder.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, default_collate

from convert import load_any_model, load_encoder_weights
from crops import Crops
from data import PANNUKE_SPLITS, Source, open_source
from dualunet import (DualUNet, class_colors, dual_loss, load_model, read_checkpoint,
                      save_checkpoint)
from evaluate import (calibrate, draw_images, figures_of, finder, mean_of_defined, spread,
                      without_nan)
from outputs import draw_curves
from recipes import RESUMABLE, check_options, parse_options
from runs import (explain, keep_memory, pick_device, pick_precision, plural, say,
                  show_progress, time_left)

VAL_CROPS = 16  # ours: number of fixed validation crops whose loss is logged


# ---------------------------------------------------------------- data


class LabelledSet(NamedTuple):
    """A data set and its split."""

    name: str
    source: Source
    train: list  # indices of its images
    val: list


def split_source(source, val, fold):
    """Indices of the training and of the validation images."""
    everything = range(len(source.names))
    if fold and source.tissues:
        train_fold, val_fold, _ = (f"fold{k}/" for k in PANNUKE_SPLITS[fold])
        train = [i for i in everything if source.names[i].startswith(train_fold)]
        held = [i for i in everything if source.names[i].startswith(val_fold)]
        return train, held
    held = [i for i in everything if source.names[i] in (val or [])]
    held = held or [i for i in everything if i % 5 == 4]
    train = sorted(set(everything) - set(held))
    return train, held


def unknown_classes(options):
    """{set: its classes that count as unknown}, from --unknown."""
    unknown = {path: [] for path in options.data}
    for entry in options.unknown:
        path, _, name = entry.rpartition(":")
        if path not in unknown:
            raise ValueError(f"--unknown {entry}: expected SET:CLASS, the set one of "
                             f"{', '.join(options.data)}")
        unknown[path].append(name)
    return unknown


def open_sets(options):
    """The sets of --data, each with its split."""
    # find their folders
    folders = []
    for path in options.data:
        folder = path if path == "synthetic" else str(Path(options.root) / path)
        if path != "synthetic" and not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; the paths of --data begin at "
                                    f"--root {options.root}")
        folders.append(folder)

    # open and split them
    unknown = unknown_classes(options)
    mpp = options.data_mpp or [None]
    if len(mpp) == 1:
        mpp = mpp * len(folders)
    short = [Path(path).name for path in options.data]
    sets = []
    for path, folder, own_mpp in zip(options.data, folders, mpp):
        classes = options.classes
        if classes:
            classes = [name for name in classes if name not in unknown[path]]
        source = open_source(folder, classes=classes, unknown=unknown[path], mpp=own_mpp,
                             seed=options.seed)
        for note in source.notes:
            say("warning", folder, note)
        train, val = split_source(source, options.val, options.fold)
        if not train or not val:
            raise ValueError(f"{folder}: {len(train)} training and {len(val)} validation images; "
                             "expected some of each, see --val")
        name = Path(path).name
        name = name if short.count(name) == 1 else path
        sets.append(LabelledSet(name, source, train, val))

    # refuse --val and --fold if no set has them
    names = {name for labelled in sets for name in labelled.source.names}
    if strangers := sorted(set(options.val or []) - names):
        raise ValueError(f"--val {strangers[0]}: no image of that name in {', '.join(folders)}")
    if options.fold and not any(labelled.source.tissues for labelled in sets):
        raise ValueError(f"--fold {options.fold}: no PanNuke among {', '.join(folders)}")
    return sets


def merge_classes(sets, options):
    """The network's classes: --classes, or all names of the sets in order of appearance.

    "nucleus" is a class only if there is no other class.
    """
    if options.one_class:
        return ["nucleus"]
    if options.classes:
        return options.classes
    names = []
    for labelled in sets:
        names += [name for name in labelled.source.class_names if name not in names]
    return [name for name in names if name != "nucleus"] or names


def make_crops(sets, class_names, options):
    """Augmented training crops and plain validation crops; reads all images."""
    # the share of each set and of each class
    shares = options.share or [1.0]
    if len(sets) > 1 and not options.share:
        shares = []
        for labelled in sets:
            _, first, _ = labelled.source.read(labelled.train[0])
            shares.append(first.size * len(labelled.train))
    if options.rare_shares and len(options.rare_shares) != len(class_names):
        raise ValueError(f"--rare-shares has {len(options.rare_shares)} numbers for "
                         f"{len(class_names)} classes; give one a class")

    # the target and the augmentation of crops
    target = {"mpp": options.mpp, "sigma": peak_options(options.mpp)["sigma"],
              "combine": options.combine, "crop": options.crop, "seed": options.seed}
    geometry = {"scale": options.scale, "aspect": options.aspect, "turn": options.turn}
    color = {"stain": options.stain, "shift": options.shift, "blur": options.blur,
             "noise": options.noise}
    train_parts, val_parts = [], []
    for labelled, share in zip(sets, shares):
        train_parts.append((labelled.source, labelled.train, share))
        val_parts.append((labelled.source, labelled.val, share))
    train = Crops(train_parts, class_names, rare=options.rare, rare_shares=options.rare_shares,
                  geometry=geometry, color=color, **target)
    val = Crops(val_parts, class_names, **target)

    def progress(done, images):
        show_progress(f"reads images: {done} of {images}")

    for crops in (train, val):
        crops.load(options.workers, progress)
    show_progress("")
    return train, val


def class_weights(text, crops):
    """(K + 1,) float32 of --class-weights, or None."""
    if text == "none":
        return None
    if text != "sqrt":
        weights = []
        with contextlib.suppress(ValueError):
            weights = [float(number) for number in text.split(",")]
        expected = len(crops.class_names) + 1
        if len(weights) != expected:
            raise ValueError(f"--class-weights is {text}; expected sqrt, none, or {expected} "
                             "numbers with commas, background first")
        return torch.tensor(weights)

    frequency = crops.class_frequency()
    weights = np.maximum(frequency, 1e-3) ** -0.5  # finite even for an absent class
    # background weighs like the mean nucleus pixel; with a lower weight outlines get too wide
    weights[0] = np.average(weights[1:], weights=weights[1:] ** -2)
    mean = (weights * frequency).sum()
    return torch.tensor(weights / mean, dtype=torch.float32)


# ---------------------------------------------------------------- network


def peak_options(mpp):
    """The width of the target's peaks and the options that find peaks, scaled from 0.25 µm."""
    scale = 0.25 / mpp
    return {"sigma": 5 * scale,  # paper, at 0.25
            "min_distance": max(round(2 * scale), 1), "smooth": scale,
            "min_size": max(math.ceil(10 * scale**2), 1)}


def build_model(options, class_names):
    """A new network."""
    model = DualUNet(num_classes=len(class_names), encoder=options.encoder,
                     decoder_channels=options.decoder_channels, image_skip=options.image_skip)
    peaks = peak_options(options.mpp)
    model.config |= {
        "class_names": class_names, "colors": class_colors(class_names), "mpp": options.mpp,
        "licence": options.licence, "sigma": peaks.pop("sigma"),
        "reconstruct": peaks | {"combine": options.combine},
        # measured: windows far larger than the crops harm
        "tile": max(256, 32 * math.ceil(options.crop / 32)), "halo": 32}
    return model


def load_weights(model, options):
    """Loads the weights that --init or --encoder-weights names."""
    if options.init:
        start_from(model, options.init)
    elif options.encoder_weights:
        load_encoder_weights(model, options.encoder_weights)


def start_from(model, path):
    """Copies the weights of a checkpoint of the same architecture; its classes may differ."""
    # all but the class head
    start = load_any_model(path)
    given, own = start.state_dict(), model.state_dict()
    for name, value in own.items():
        if name.startswith("segmentation_head"):
            continue
        if name not in given or given[name].shape != value.shape:
            raise ValueError(f"{path}: its {name} does not fit; give the --encoder, "
                             "--decoder-channels and --image-skip that it was trained with")
        own[name] = given[name]

    # of the class head, the rows of classes with the same name
    names, start_names = model.config["class_names"], start.config["class_names"]
    common = [name for name in names if name in start_names]
    rows = [0] + [names.index(name) + 1 for name in common]
    start_rows = [0] + [start_names.index(name) + 1 for name in common]
    fresh = [name for name in names if name not in common]
    note = f"; it does not know {', '.join(fresh)}" if fresh else ""

    # of a single class, its row for all: outlines are good from the first step on
    if fresh and len(start_names) == 1:
        rows, start_rows = list(range(len(names) + 1)), [0] + [1] * len(names)
        note += f", which begin as its {start_names[0]}"
    if len(rows) > 1:
        for name in ("segmentation_head.weight", "segmentation_head.bias"):
            own[name][rows] = given[name][start_rows]
    model.load_state_dict(own)
    print(f"starts from {path}{note}")


def make_optimizer(model, options):
    """Adam or AdamW: the encoder has its own rate; AdamW does not decay biases and norms."""
    groups = {}
    for name, parameter in model.named_parameters():
        encoder = name.startswith("encoder.")
        decays = options.optimizer == "adam" or parameter.ndim > 1
        groups.setdefault((encoder, decays), []).append(parameter)
    settings = []
    for (encoder, decays), parameters in groups.items():
        settings.append({
            "params": parameters, "scale": options.encoder_rate if encoder else 1.0,
            "weight_decay": options.weight_decay if decays else 0.0})
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    return kind(settings, lr=options.rate)


def rate_at(progress, options):
    """The learning rate after the part `progress`, in [0, 1), of the training."""
    if options.schedule == "step":
        falls = (progress >= 0.7) + (progress >= 0.9)
        return options.rate * 0.1**falls  # published
    warm = min(1.0, (progress + 1e-5) / 0.02)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return options.rate * warm * (0.005 + 0.995 * cosine)


@torch.no_grad()
def average_into(average, model, decay):
    """Moves the averaged weights and statistics towards the model's; counters are copied."""
    for a, b in zip(average.state_dict().values(), model.state_dict().values()):
        if a.is_floating_point():
            a.lerp_(b, 1 - decay)
        else:
            a.copy_(b)


# ---------------------------------------------------------------- a run


class Place(NamedTuple):
    """Where this process computes."""

    device: torch.device
    precision: torch.dtype | None  # of autocast
    rank: int = 0  # among `world` processes that train one network
    world: int = 1


@dataclass
class Run:
    """The parts and the state of one training."""

    options: argparse.Namespace
    out: Path
    place: Place
    sets: list
    crops: Crops
    val_crops: Crops
    steps: int  # of an epoch
    model: DualUNet  # what the optimizer changes
    average: DualUNet  # what is validated and saved; without --average it is `model`
    optimizer: torch.optim.Optimizer
    loss_options: dict
    records: list  # a dict for each finished epoch
    begun: int = 0  # epochs that an earlier call finished


def begin(options):
    """The run's options, its folder, and the content of its last.pt (None for a new run).

    Raises: ValueError if the folder and the options do not fit each other.
    """
    if not options.resume:
        out = Path(options.out)
        if (out / "last.pt").exists():
            raise ValueError(f"{out} holds a run; continue it with --resume {out}, or give "
                             "another --out")
        return options, out, None

    # read the run to continue
    out = Path(options.resume)
    if not (out / "last.pt").exists():
        raise ValueError(f"{out}: no run to resume, for it has no last.pt; check the folder")
    saved = read_checkpoint(out / "last.pt")
    if "optimizer" not in saved:
        raise ValueError(f"{out}/last.pt: holds no training to continue; "
                         "start from its weights with --init")

    # its options hold, except the RESUMABLE ones that are given
    if refused := [name for name in options.given if name not in RESUMABLE]:
        raise ValueError(f"--{refused[0].replace('_', '-')} cannot change beside --resume; "
                         "a new run may start from these weights with --init")
    changed = {name: getattr(options, name) for name in options.given}
    merged = argparse.Namespace(**vars(options) | saved["options"] | changed)
    done = saved["epoch"]
    if merged.epochs < done or (merged.epochs == done and "calibrate" not in changed):
        raise ValueError(f"{out}: {done} epochs are done; extend the run with --epochs "
                         f"{done + 4}, say, or calibrate it with --calibrate")
    print(f"resumes {out} after epoch {done} of {merged.epochs}")
    return merged, out, saved


def find_place(options):
    """The device and the rank of this process; torchrun sets the rank."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Place(device, pick_precision(device, options.precision), rank, world)


def start_run(options, out, saved):
    """Opens the data and builds the network, new or from `saved`."""
    # the data
    place = find_place(options)
    torch.manual_seed(options.seed)
    sets = open_sets(options)
    class_names = merge_classes(sets, options)
    crops, val_crops = make_crops(sets, class_names, options)
    if not any(len(table) for table in crops.nuclei):
        raise ValueError(f"{', '.join(options.data)}: no nucleus in the labels of the training "
                         "images; look at them with python data.py")
    cover = crops.pixels() / options.crop**2 / options.batch
    steps = options.steps or max(50, round(cover))

    # the network, its average, its loss
    model = build_model(options, class_names)
    if not saved:
        load_weights(model, options)
    model = model.to(place.device, memory_format=torch.channels_last)
    average = copy.deepcopy(model) if options.average else model
    weights = class_weights(options.class_weights, crops)
    if weights is not None:
        weights = weights.to(place.device)
    loss_options = {"class_weights": weights, "density_weight": options.density_weight}
    optimizer = make_optimizer(model, options)
    run = Run(options, out, place, sets, crops, val_crops, steps, model, average, optimizer,
              loss_options, [])

    # continue where it stopped; crops depend only on (seed, number), so no random state is kept
    if saved:
        model.load_state_dict(saved["training"])
        average.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        run.records = saved["records"]
        run.begun = saved["epoch"]
    return run


# ---------------------------------------------------------------- validation


def to_device(images, device):
    """A batch of uint8 images as floats in [0, 1] on the device."""
    images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    return images.float() / 255


@torch.inference_mode()
def val_loss(run):
    """The loss terms of the averaged network on fixed crops."""
    device, precision = run.place.device, run.place.precision
    batch = [run.val_crops[n] for n in range(VAL_CROPS)]
    images, type_map, density = default_collate(batch)
    with torch.autocast(device.type, precision, enabled=precision is not None):
        maps = run.average(to_device(images, device))
    terms = dual_loss(*maps, type_map.to(device), density.to(device), **run.loss_options)
    return {f"val_{name}": value.item() for name, value in terms.items()}


def validate(run):
    """Loss terms on fixed crops, figures of each set on whole images, and their mean: the score."""
    record = val_loss(run)
    if not run.options.val_images:
        return record | {"score": math.nan}

    network = run.average.fuse(run.place.precision)
    class_names, colors = network.config["class_names"], network.config["colors"]
    scores = []
    for labelled in run.sets:
        indices = spread(labelled.val, run.options.val_images)
        find = finder(network, labelled.source)
        figures = figures_of(labelled.source, indices, class_names, find)
        record[labelled.name] = figures
        scores.append(mean_of_defined(figures[name] for name in ("detection_f1", "class_f1", "pq")))

    # three images of the first set
    first = run.sets[0].source
    draw_images(first, run.sets[0].val[:3], finder(network, first), class_names, colors,
                run.out / "preview.png", side=256)
    return record | {"score": sum(scores) / len(scores)}


def calibrate_best(run):
    """Lowers the background's logit in best.pt if that improves the outlines."""
    path = run.out / "best.pt"
    saved = read_checkpoint(path)
    model = load_model(path, run.place.device)
    if earlier := saved.get("calibration"):  # take it back
        with torch.no_grad():
            model.segmentation_head.bias[0] += max(earlier, key=earlier.get)
    sets = [(labelled.source, labelled.val) for labelled in run.sets]
    quality = calibrate(model, sets, run.options.val_images, run.place.precision)
    extra = {name: saved[name] for name in ("epoch", "records", "split", "options")}
    save_checkpoint(path, model, half=True, calibration=quality, **extra)
    offset = max(quality, key=quality.get)
    print(f"best.pt is calibrated: its background logit is lowered by {offset:g}, which takes the "
          f"mean PQ from {quality[0.0]:.3f} to {quality[offset]:.3f}")


# ---------------------------------------------------------------- what is said and kept


def describe(run):
    """Prints the sets, their nuclei, and the length of the training."""
    for labelled, share in zip(run.sets, run.crops.shares):
        print(f"{labelled.name}: {len(labelled.train)} training and {len(labelled.val)} validation "
              f"images at {labelled.source.mpp:g} µm per pixel, {100 * share:.0f} % of the crops")
    known, unknown = run.crops.class_counts()
    counts = [f"{name} {count:,}" for name, count in known.items()]
    if unknown:
        counts.append(f"of unknown class {unknown:,}")
    print(f"training nuclei: {', '.join(counts)}")
    options, place = run.options, run.place
    print(f"{plural(options.epochs, 'epoch')} of {run.steps} steps of {options.batch} crops of "
          f"{options.crop}², on {place.device.type} in {'bf16' if place.precision else 'fp32'}",
          flush=True)


def show_step(run, epoch, step, loss, start):
    """Shows the progress of the epoch, and the remaining time of the run."""
    seconds = time.monotonic() - start
    if step == 0 and epoch == run.begun:
        print(f"first step: {seconds:.1f} s", flush=True)
    epochs_left = run.options.epochs - epoch
    part = (step + 1) / (epochs_left * run.steps)
    left = time_left(seconds, part)
    show_progress(f"epoch {epoch + 1} of {run.options.epochs}, step {step + 1} of {run.steps}: "
                  f"loss {loss:.3f}, {left}")


def report(run):
    """Prints the last epoch, writes all epochs to log.jsonl, and draws the curves."""
    last = run.records[-1]
    seconds, epochs_left = last["seconds"], run.options.epochs - last["epoch"]
    left = time_left(seconds, 1 / (epochs_left + 1))
    parts = [f"epoch {last['epoch']} of {run.options.epochs}, {seconds:.0f} s, {left}: "
             f"loss {last['loss']:.3f}, val_loss {last['val_loss']:.3f}"]
    for name, figures in last.items():
        if isinstance(figures, dict):
            known = [f"{k} {v:.3f}" for k, v in figures.items() if not math.isnan(v)]
            parts.append(f"{name}: {', '.join(known)}")
    show_progress("")
    print("; ".join(parts), flush=True)
    lines = [json.dumps(without_nan(record)) + "\n" for record in run.records]
    (run.out / "log.jsonl").write_text("".join(lines), encoding="utf-8")
    draw_curves(run.records, run.out / "curves.png")


def save(run):
    """Writes last.pt, and best.pt if the score is the best so far."""
    score = run.records[-1]["score"]
    scores = [record["score"] for record in run.records if not math.isnan(record["score"])]
    split = {"train": [], "val": []}
    for labelled in run.sets:
        names = labelled.source.names
        split["train"] += [names[i] for i in labelled.train]
        split["val"] += [names[i] for i in labelled.val]
    state = {"epoch": len(run.records), "records": run.records, "split": split,
             "options": vars(run.options)}
    if not scores or score == max(scores):  # first, so that a kill before last.pt repeats both
        save_checkpoint(run.out / "best.pt", run.average, half=True, **state)
    save_checkpoint(run.out / "last.pt", run.average, **state, training=run.model.state_dict(),
                    optimizer=run.optimizer.state_dict())


# ---------------------------------------------------------------- training


def make_loader(run, epoch):
    """This process's crops of an epoch, in batches."""
    options, place = run.options, run.place
    count = run.steps * options.batch * place.world
    numbers = range(epoch * count + place.rank, (epoch + 1) * count, place.world)
    return DataLoader(run.crops, options.batch, sampler=numbers, num_workers=options.workers,
                      pin_memory=place.device.type == "cuda")


def check_loss(run, loss, epoch, step, numbers):
    """Raises RuntimeError if the loss is not finite; it names the images of the step."""
    if math.isfinite(loss):
        return
    batch = numbers[step * run.options.batch:][:run.options.batch]
    names = sorted({run.crops.name(n) for n in batch})
    saved = f"; --resume {run.out} continues from epoch {epoch}" if epoch else ""
    raise RuntimeError(f"loss is {loss} at epoch {epoch + 1}, step {step + 1}; look at the images "
                       f"{', '.join(names)}, or lower --rate{saved}")


def train_epoch(run, network, epoch):
    """Trains one epoch; returns the mean of every loss term, and the last rate."""
    options, (device, precision, rank, _) = run.options, run.place
    start = time.monotonic()
    loader = make_loader(run, epoch)
    sums = torch.zeros(4, device=device)
    run.model.train()
    torch.backends.cudnn.benchmark = True  # all crops have one size, unlike validation's windows
    for step, (images, type_map, density) in enumerate(loader):
        # rate
        done = epoch * run.steps + step
        rate = rate_at(done / (options.epochs * run.steps), options)
        for group in run.optimizer.param_groups:
            group["lr"] = rate * group["scale"]

        # forward
        images = to_device(images, device)
        type_map = type_map.to(device, non_blocking=True)
        density = density.to(device, non_blocking=True)
        with torch.autocast(device.type, precision, enabled=precision is not None):
            maps = network(images)

        # loss, checked before the weights change
        terms = dual_loss(*maps, type_map, density, **run.loss_options)
        loss = terms["loss"].item()  # the only point where a step waits for the device
        check_loss(run, loss, epoch, step, loader.sampler)

        # backward, clip, step
        run.optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        if options.clip:
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), options.clip)
        run.optimizer.step()

        # average, which follows faster in the first steps
        if options.average:
            average_into(run.average, run.model, min(options.average, (done + 1) / (done + 11)))

        # log
        sums += torch.stack([value.detach() for value in terms.values()])
        if rank == 0:
            show_step(run, epoch, step, loss, start)
    torch.backends.cudnn.benchmark = False
    means = (sums / run.steps).tolist()
    return dict(zip(terms, means)) | {"rate": rate}


def train(options):
    """Runs the whole training: all epochs, validation, saving, calibration."""
    options, out, saved = begin(options)
    check_options(options)
    run = start_run(options, out, saved)
    place = run.place
    network = run.model
    if place.world > 1:
        network = torch.nn.parallel.DistributedDataParallel(network)
    if options.compile:
        network = torch.compile(network)
    if place.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        describe(run)

    # one process validates and writes; the others wait
    for epoch in range(run.begun, options.epochs):
        start = time.monotonic()
        record = {"epoch": epoch + 1} | train_epoch(run, network, epoch)
        if place.rank == 0:
            run.average.eval()
            record |= validate(run)
            record["seconds"] = round(time.monotonic() - start, 1)
            run.records.append(record)
            save(run)
            report(run)
        if place.world > 1:
            dist.barrier()
    if place.world > 1:
        dist.destroy_process_group()
    if place.rank == 0 and options.calibrate and options.val_images:
        calibrate_best(run)
    print(f"the run is in {out}")


def main(argv=None):
    """Runs the command; returns 0, 1 for an error, or 130 when it was interrupted."""
    options = parse_options(argv)
    keep_memory()
    out = Path(options.resume or options.out)
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        with contextlib.redirect_stdout(sys.stdout if first else None):  # only the first prints
            train(options)
    except torch.cuda.OutOfMemoryError:
        message = "out of memory; use a smaller --batch or --crop"
    except (OSError, ValueError, RuntimeError) as error:
        message = explain(error, out)
    except KeyboardInterrupt:
        message = "interrupted before the end of the first epoch; nothing is saved"
        if (out / "last.pt").exists():
            message = f"interrupted; continue with: python train.py --resume {out}"
        show_progress("")
        print(f"\n{message}", file=sys.stderr)
        return 130
    else:
        return 0
    show_progress("")
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
