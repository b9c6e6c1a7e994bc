"""How fast DualU-Net is beside its peers: ratios from one run, as a table, JSON and a plot.

    pip install -r benchmarks/requirements.txt      # scikit-image, for the published recipe alone
    python benchmarks/speed.py                      # about 20 minutes on two idle cores
    python benchmarks/speed.py --sections network whole --device cuda

What is compared takes turns in one process, so that a busy machine slows all alike, and medians
are divided. Only a GPU, which is named, gets absolute figures. `area` needs Linux's /proc.
"""

import argparse
import collections
import contextlib
import copy
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules are no package

import infer
import peers
from data import centroids_of, density_map, synthetic_tissue
from dualunet import DualUNet, load_model, save_checkpoint
from metrics import compare
from postprocess import find_peaks, prominent_peaks, reconstruct, watershed

RESNEXT50 = {"num_classes": 4, "encoder": "resnext50_32x4d"}  # paper
SHIPPED = {"num_classes": 4, "encoder": "resnet18", "decoder_channels": (128, 64, 32, 16, 16)}


class Row(NamedTuple):
    """A line of the table: `what` takes `ratio` times as long as `base`, at most `goal`."""

    what: str
    base: str
    ratio: float
    goal: float | None = None
    note: str = ""


def take_turns(cases, repeats):
    """Median seconds of every case in {name: callable}, after a turn that only warms up."""
    seconds = {name: [] for name in cases}
    for _ in range(repeats + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def run(model, images, dtype=None):
    with torch.inference_mode(), torch.autocast(images.device.type, dtype, enabled=bool(dtype)):
        return model(images)


def load_fast(checkpoint, device):
    """The model of a file in its fastest form."""
    return load_model(checkpoint, device).fuse(infer.pick_precision(device))


# ---------------------------------------------------------------- network


def arithmetic(model, images):
    """Parameters, and multiplications for a megapixel of output, in words."""
    with FlopCounterMode(display=False) as counter:
        pixels = run(model, images)[0][0, 0].numel()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{millions:.1f} M parameters, {counter.get_total_flops() / 2e3 / pixels:,.0f} GMAC/Mpx"


def network(args):
    """Forms of the network on one tile, and HoVer-Net's three decoders for as much output."""
    device, bf16 = args.device, infer.pick_precision(args.device)
    images = torch.rand(1, 3, *(2 * [64 if args.quick else 1024]), device=device)
    small = torch.rand(1, 3, *(2 * [128 if args.quick else 256]), device=device)
    cases, notes, eager = {}, {}, "eager fp32"
    for name, config in {"ResNeXt50": RESNEXT50, "shipped ResNet18": SHIPPED}.items():
        model = DualUNet(**config).to(device).eval()
        fused, last = copy.deepcopy(model).fuse(), copy.deepcopy(model).to(memory_format=torch.channels_last)
        forms = {eager: (model,), "channels-last fp32": (last,), "fused fp32": (fused,)}
        if bf16:
            forms |= {"channels-last bf16": (last, bf16), "fused bf16": (copy.deepcopy(model).fuse(bf16),)}
        if args.compile:
            forms["compiled fp32"] = (torch.compile(fused),)
        expected = torch.cat(run(model, images), dim=1)
        for form, (variant, *dtype) in forms.items():
            case = cases[name, form] = partial(run, variant, images, *dtype)
            error = (torch.cat(case(), dim=1) - expected).abs().max() / expected.abs().max()
            notes[name, form] = f"outputs differ by {error:.0e}"
        notes[name, eager] = arithmetic(model, images)

    three, hovernet = ("HoVer-Net fast", eager), peers.HoVerNet().to(device).eval()
    cases[three], notes[three] = partial(run, hovernet, small), arithmetic(hovernet, small)
    seconds = take_turns(cases, args.repeats)
    seconds[three] *= images[0, 0].numel() / run(hovernet, small)[0][0, 0].numel()
    goals = {("ResNeXt50", "fused fp32"): 0.72, ("ResNeXt50", "fused bf16"): 0.4}
    for (name, form), note in notes.items():
        base = (name if form != eager else "ResNeXt50"), eager
        ratio = seconds[name, form] / seconds[base]
        if device.type == "cuda":
            note += f", {images[0, 0].numel() / 1e6 / seconds[name, form]:.1f} Mpx/s"
        yield Row(f"{name}, {form}", ", ".join(base), ratio, goals.get((name, form)), note)


# ---------------------------------------------------------------- reconstruction


def crowded_maps(side):
    """Perfect maps, 3,000 nuclei a megapixel: inst_map, type_map, densities by maximum and sum."""
    every = (1.75 * np.arange(side)).astype(int)  # shrunk: the tissue itself is not so dense
    tissue = synthetic_tissue(3, int(1.75 * side))[1:]
    inst_map, type_map = (values[every[:, None], every] for values in tissue)
    centroids, shape = centroids_of(inst_map), inst_map.shape
    return inst_map, type_map, *(density_map(centroids, shape, combine=c) for c in ("max", "sum"))


def disturb(type_map, *densities):
    """The maps as a network might give them: ragged outlines, stray classes, uneven noisy peaks."""
    rng, shape = np.random.default_rng(0), type_map.shape

    def noise(scale):  # of unit variance
        field = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), scale)
        return field / field.std()

    mask = ndimage.gaussian_filter(np.float32(type_map > 0), 1) + 0.15 * noise(2) > 0.5
    stray, gain, error = rng.random(shape) < 0.1, 0.75 + 0.1 * noise(12), 0.02 * noise(1.5)
    types = np.where(stray | (type_map == 0), rng.integers(1, 5, shape), type_map)
    return np.uint8(types * mask), *(density * gain + error for density in densities)


def reconstruction(args):
    """The published recipe against ours, as a whole and by its steps."""
    if peers.h_maxima is None:
        print("reconstruction left out: pip install -r benchmarks/requirements.txt", file=sys.stderr)
        return
    inst_map, *perfect = crowded_maps(128 if args.quick else 1024)
    recipe, maxima, flood = "published recipe", "scikit-image h_maxima", "scikit-image watershed"

    def found(answer):
        pair = compare(inst_map, answer[0] if isinstance(answer, tuple) else answer)
        return f"{(pair.iou > 0.5).sum():,} of {len(pair.true_area):,} nuclei found"

    def peaks(answer):
        return f"{answer.max() if answer.shape == inst_map.shape else len(answer):,} peaks"

    for kind, (types, unit, summed) in (("perfect", perfect), ("noisy", disturb(*perfect))):
        points, markers = find_peaks(unit), np.zeros(inst_map.shape, np.int32)
        markers[tuple(points.T)] = np.arange(1, len(points) + 1)
        cases = {  # what -> its base, its goal, what to tell of its answer, the call
            recipe: (recipe, None, found, partial(peers.published_nuclei, types, summed)),
            f"{recipe} without its loop": (
                recipe, None, found, partial(peers.published_instances, types, summed)),
            "reconstruct": (recipe, 0.03, found, partial(reconstruct, types, unit)),
            'reconstruct, combine="sum"': (
                recipe, None, found, partial(reconstruct, types, summed, combine="sum")),
            maxima: (recipe, None, peaks, partial(peers.published_markers, summed)),
            "prominent_peaks": (maxima, None, peaks, partial(prominent_peaks, summed)),
            flood: (recipe, None, found, partial(peers.watershed, -unit, markers, mask=types > 0)),
            "watershed": (flood, None, found, partial(watershed, -unit, markers, types > 0)),
        }
        seconds = take_turns({what: case for what, (*_, case) in cases.items()}, args.repeats)
        for what, (base, goal, tell, case) in cases.items():
            ratio = seconds[what] / seconds[base]
            yield Row(f"{what}, {kind} maps", base, ratio, goal, tell(case()))


# ---------------------------------------------------------------- whole


class Repeated:
    """An image or map made of one tile again and again: any size, no memory."""

    def __init__(self, tile, side):
        self.tile, self.shape = tile, (side, side, *tile.shape[2:])

    def __getitem__(self, window):
        rows, columns = (np.arange(s.start, s.stop) % len(self.tile) for s in window)
        return self.tile[rows[:, None], columns]


def whole(args):
    """infer.py with the shipped model, from file to files, against what it cannot do without."""
    side, tile = (256, 128) if args.quick else (4096, 1024)
    model, halo = load_fast(args.checkpoint, args.device), infer.HALO
    image = Repeated(synthetic_tissue(8, tile)[0], side)
    window = infer.read_window(image, -halo, -halo, tile + halo, tile + halo)[None]
    maps = [values[0, ..., halo:-halo, halo:-halo] for values in infer.predict_maps(model, window)]
    resnext = DualUNet(**RESNEXT50).to(args.device).eval()
    pixels = torch.rand(1, 3, tile, tile, device=args.device)
    cases = {
        "load": partial(load_fast, args.checkpoint, args.device),
        "ResNeXt50": partial(run, resnext, pixels),
        "network": partial(infer.predict_maps, model, window),
        "reconstruct": partial(reconstruct, maps[0], maps[2], class_probability=maps[1]),
    }
    for name, length in (("tile", tile), ("whole", side)):
        path = f"{args.folder}/{name}.png"
        Image.fromarray(image[0:length, 0:length]).save(path)
        command = [path, "--checkpoint", str(args.checkpoint), "--device", str(args.device)]
        cases[name] = partial(infer.main, [*command, "--out", args.folder])
    with contextlib.redirect_stdout(io.StringIO()):
        seconds = take_turns(cases, args.repeats)

    tiles, name = (side / tile) ** 2, f"infer.py, {side} x {side} pixels, after loading"
    seconds["whole"] -= seconds["load"]
    speed = side**2 / 1e6 / seconds["whole"]
    note = f"weights: {args.checkpoint.name}"
    if args.device.type == "cuda":
        note += f", {speed:.1f} Mpx/s, {100 * 80 / 3 / speed / 3.6:.2f} h for 100,000 x 80,000, a third tissue"
    yield Row(name, f"ResNeXt50 network alone, {tiles:.0f} tiles, no halo",
              seconds["whole"] / seconds["ResNeXt50"] / tiles, 0.25, note)
    yield Row("its network, halo included", name, seconds["network"] * tiles / seconds["whole"])
    yield Row(f"infer.py, {tile} x {tile} pixels, after loading", "network with halo, reconstruction",
              (seconds["tile"] - seconds["load"]) / (seconds["network"] + seconds["reconstruct"]), 1.25)


# ---------------------------------------------------------------- area


def memory(field):
    """MB that this process holds (VmRSS) or held at its peak (VmHWM)."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def cost(job, side, checkpoint):
    """Median seconds of a job, and MB at its peak beyond model and input; in a fresh process."""
    tile, seconds = min(side, 1024), []
    if job == "reconstruct":
        _, types, unit, _ = crowded_maps(tile)
        call = partial(reconstruct, *(Repeated(m, side)[0:side, 0:side] for m in (types, unit)))
    else:
        model = load_fast(checkpoint, torch.device("cpu"))
        image = Repeated(synthetic_tissue(8, tile)[0], side)
        call = partial(collections.deque, infer.predict_tiles(model, image), maxlen=0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    held = memory("VmRSS")
    for _ in range(max(1, 4096 // side)):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), memory("VmHWM") - held


def plot(path, curves):
    """PNG of {name: [(Mpx, relative seconds a megapixel, MB), ...]}, each area 4 times the last."""
    canvas = Image.new("RGB", (1100, 400), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    for panel, title in enumerate(("time a megapixel, relative", "peak memory, MB")):
        left, top, width, height = 70 + 540 * panel, 50, 440, 290
        highest = 1.1 * max(point[1 + panel] for points in curves.values() for point in points)
        draw.rectangle((left, top, left + width, top + height), outline="gray")
        draw.text((left, 20), f"{title}, against megapixels", "black", font)
        for tick in range(5):
            y = top + height * (1 - tick / 4)
            draw.text((left - 8, y), f"{highest * tick / 4:.3g}", "black", font, anchor="rm")
        for row, (name, points) in enumerate(curves.items()):
            color = ("crimson", "royalblue")[row]
            draw.text((left + 12, top + 10 + 22 * row), name, color, font)
            corners = [(left + width * i / (len(points) - 1), top + height * (1 - p[1 + panel] / highest))
                       for i, p in enumerate(points)]
            draw.line(corners, color, 3)
            for (x, _), point in zip(corners, points):
                draw.text((x, top + height + 8), f"{point[0]:g}", "black", font, anchor="mt")
    canvas.save(path)


def area(args):
    """Time and memory against area: reconstruction in one call, and all of it tile by tile."""
    sides, first = ((128, 256), 256) if args.quick else ((512, 1024, 2048, 4096, 8192), 1024)
    jobs = "reconstruct", "predict_tiles"
    tasks = [(job, side, args.checkpoint) for side in sides for job in jobs]
    with multiprocessing.get_context("forkserver").Pool(1, maxtasksperchild=1) as pool:
        costs = dict(zip(tasks, pool.starmap(cost, tasks, chunksize=1)))
    curves = {job: [] for job in jobs}
    for (job, side, _), (seconds, megabytes) in costs.items():
        megapixels = side**2 / 2**20
        ratio = seconds / costs[job, first, args.checkpoint][0]
        curves[job].append((megapixels, ratio * (first / side) ** 2, megabytes))
        goal = 70 if (job, side) == ("reconstruct", 8192) else None
        yield Row(f"{job}, {megapixels:g} Mpx", f"{first**2 / 2**20:g} Mpx", ratio, goal, f"{megabytes:,.0f} MB")
    plot(args.out.with_suffix(".png"), curves)


# ---------------------------------------------------------------- command line

SECTIONS = {section.__name__: section for section in (network, reconstruction, whole, area)}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Times DualU-Net beside its peers.")
    option = parser.add_argument
    option("--quick", action="store_true", help="tiny sizes, one turn: to see that it runs")
    option("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    option("--device", default="cpu", help="for network and whole; the goals are a CPU's")
    option("--compile", action="store_true", help="torch.compile too: a minute's wait, a C++ compiler")
    option("--repeats", type=int, default=5, help="turns; their median counts (default: 5)")
    option("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="JSON; plot beside it")
    args = parser.parse_args(argv)
    args.device, args.repeats = infer.pick_device(args.device), 1 if args.quick else args.repeats
    machine = {
        "cpu": torch.cpu.get_capabilities().get("cpu_name"), "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else None,
        "torch": torch.__version__, "bf16": infer.pick_precision(args.device) is not None,
    }
    print(", ".join(f"{key}: {value}" for key, value in machine.items()))
    sections = {}
    with tempfile.TemporaryDirectory() as args.folder:
        args.checkpoint = infer.CHECKPOINT
        if not args.checkpoint.exists():
            args.checkpoint = Path(args.folder) / "random.pt"
            save_checkpoint(args.checkpoint, DualUNet(**SHIPPED))
        for name in args.sections:
            print(f"\n### {name}\n\n| what | ratio | to | goal | |\n|---|---|---|---|---|")
            sections[name] = []
            for row in SECTIONS[name](args):
                sections[name].append(row._asdict())
                print(f"| {row.what} | {row.ratio:.3g} | {row.base} | {row.goal or ''} | {row.note} |")
    args.out.write_text(json.dumps({"machine": machine, "sections": sections}, indent=1))


if __name__ == "__main__":
    main()
