"""How fast DualU-Net is beside its peers: ratios from one run, as a table, JSON and a plot.

    pip install -r benchmarks/requirements.txt      # scikit-image, for the published recipe alone
    python benchmarks/speed.py                      # about half an hour on two idle cores
    python benchmarks/speed.py --sections agreement --images CoNSeP/Test/Images
    python benchmarks/speed.py --sections network whole --device cuda

What is compared takes turns in one process, so that a busy machine slows all alike, and medians
are divided. Only a GPU, which is named, gets absolute figures. `area` needs Linux's /proc.
"""

import argparse
import contextlib
import copy
import ctypes
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
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
from data import (IMAGE_SUFFIXES, SYNTHETIC_CLASSES, centroids_of, density_map, read_image,
                  synthetic_tissue)
from dualunet import DualUNet, load_model, save_checkpoint
from metrics import compare
from postprocess import find_peaks, prominent_peaks, reconstruct, watershed

RESNEXT50 = {"num_classes": 4, "encoder": "resnext50_32x4d"}  # paper
SHIPPED = {"num_classes": 4, "encoder": "resnet18", "decoder_channels": (128, 64, 32, 16, 16)}


class Row(NamedTuple):
    """A line of the table: `what` takes `ratio` times as long as `base`, at best at most `goal`."""

    what: str
    base: str
    ratio: float
    goal: float | None
    note: str


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


def as_it_comes(case):
    """The case without `keep_memory`: glibc returns large blocks to the kernel."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc: nothing was changed
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-4, 65536), (-3, 32 << 20), (-1, 64 << 20)):
            libc.mallopt(option, value)
    case()
    infer.keep_memory()


def load(checkpoint, device):
    """The model as infer.py runs it."""
    return load_model(checkpoint, device).fuse(infer.pick_precision(torch.device(device)))


# ---------------------------------------------------------------- network


def arithmetic(model, images):
    """Parameters, and multiplications for a megapixel of output, in words."""
    with FlopCounterMode(display=False) as counter:
        pixels = run(model, images)[0][0, 0].numel()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{millions:.1f} M parameters, {counter.get_total_flops() / 2e3 / pixels:,.0f} GMAC/Mpx"


def network(args):
    """Forms of the network on one tile, and HoVer-Net's three decoders for as much output."""
    device, eager = infer.pick_device(args.device), "eager fp32"
    tile, small = (torch.rand(1, 3, side, side, device=device)
                   for side in ((64, 96) if args.quick else (1024, 256)))
    cases, notes = {}, {}
    for name, config in {"ResNeXt50": RESNEXT50, "shipped ResNet18": SHIPPED}.items():
        model = DualUNet(**config).to(device).eval()
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        forms = {eager: (model,), "channels-last fp32": (last,), "fused fp32": (model.fuse(),)}
        if bf16 := infer.pick_precision(device):
            forms |= {"channels-last bf16": (last, bf16), "fused bf16": (model.fuse(bf16),)}
        if args.compile:
            forms |= {f"{form}, compiled": (torch.compile(variant),)
                      for form, (variant, *_) in forms.items() if form.startswith("fused")}
        expected = torch.cat(run(model, tile), dim=1)
        for form, (variant, *dtype) in forms.items():
            cases[name, form] = case = partial(run, variant, tile, *dtype)
            error = (torch.cat(case(), dim=1) - expected).abs().max() / expected.abs().max()
            notes[name, form] = f"outputs differ by {error:.0e}"
        notes[name, eager] = arithmetic(model, tile)

    three, hovernet = ("HoVer-Net fast", eager), peers.HoVerNet().to(device).eval()
    cases[three], notes[three] = partial(run, hovernet, small), arithmetic(hovernet, small)
    seconds = take_turns(cases, args.repeats)
    seconds[three] *= tile[0, 0].numel() / run(hovernet, small)[0][0, 0].numel()
    goals = {("ResNeXt50", "fused fp32"): 0.72, ("ResNeXt50", "fused bf16"): 0.4}
    for (name, form), note in notes.items():
        base = "ResNeXt50" if form == eager else name, eager
        if device.type != "cpu":
            note += f", {tile[0, 0].numel() / 1e6 / seconds[name, form]:.1f} Mpx/s"
        ratio = seconds[name, form] / seconds[base]
        yield Row(f"{name}, {form}", ", ".join(base), ratio, goals.get((name, form)), note)


# ---------------------------------------------------------------- reconstruction


def crowded_maps(side):
    """Perfect maps, 3,000 nuclei a megapixel: inst_map, type_map, densities by maximum and sum.

    Ellipses on a shaken grid; synthetic_tissue has a third as many. How many the published recipe
    finds hangs on the shaking: of 3,136 nuclei 2,956 at 4 px, 2,107 at 6, 1,790 at 7.
    """
    rng = np.random.default_rng(0)
    centres = np.mgrid[9:side:18.3, 9:side:18.3].reshape(2, -1).T
    centres = centres + rng.uniform(-6, 6, centres.shape)
    ellipses = rng.uniform((6, 5, 0), (10, 7.5, np.pi), (len(centres), 3))
    inst_map, yy, xx = np.zeros((side, side), np.int32), *np.ogrid[:side, :side]
    for label, ((y, x), (a, b, angle)) in enumerate(zip(centres, ellipses), 1):
        box = tuple(slice(max(int(c) - 11, 0), int(c) + 12) for c in (y, x))
        turned = np.exp(1j * angle) * (yy[box[0]] - y + 1j * (xx[:, box[1]] - x))
        inside = np.hypot(turned.real / a, turned.imag / b) < 1
        inst_map[box][inside & (inst_map[box] == 0)] = label
    type_map = np.append(0, rng.integers(1, 5, len(centres))).astype(np.uint8)[inst_map]
    centroids, shape = centroids_of(inst_map), inst_map.shape
    return inst_map, type_map, *(density_map(centroids, shape, combine=c) for c in ("max", "sum"))


def disturb(type_map, *densities):
    """The maps as a network might give them: ragged outlines, uneven and noisy peaks."""
    rng = np.random.default_rng(0)

    def noise(scale):  # of unit variance
        field = ndimage.gaussian_filter(rng.standard_normal(type_map.shape, np.float32), scale)
        return field / field.std()

    mask = ndimage.gaussian_filter(np.float32(type_map > 0), 1) + 0.15 * noise(2) > 0.5
    gain, error = 0.75 + 0.1 * noise(12), 0.02 * noise(1.5)
    return type_map.clip(1) * mask, *(density * gain + error for density in densities)


def reconstruction(args):
    """The published recipe against ours, as a whole and by its steps."""
    if peers.h_maxima is None:
        print("left out: it needs pip install -r benchmarks/requirements.txt", file=sys.stderr)
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
        cases = {  # what -> its base, what to tell of its answer, the call
            recipe: (recipe, found, partial(peers.published_nuclei, types, summed)),
            "its instances alone": (
                recipe, found, partial(peers.published_instances, types, summed)),
            "reconstruct": (recipe, found, partial(reconstruct, types, unit)),
            'reconstruct, combine="sum"': (
                recipe, found, partial(reconstruct, types, summed, combine="sum")),
            maxima: (recipe, peaks, partial(peers.published_markers, summed)),
            "prominent_peaks": (maxima, peaks, partial(prominent_peaks, summed)),
            flood: (recipe, found, partial(peers.watershed, -unit, markers, mask=types > 0)),
            "watershed": (flood, found, partial(watershed, -unit, markers, types > 0)),
        }
        seconds = take_turns({what: call for what, (*_, call) in cases.items()}, args.repeats)
        for what, (base, tell, call) in cases.items():
            goal = 0.03 if what == "reconstruct" else None
            ratio = seconds[what] / seconds[base]
            yield Row(f"{what}, {kind} maps", base, ratio, goal, tell(call()))


# ---------------------------------------------------------------- whole


class Repeated:
    """An image or map made of one tile again and again: any size, no memory."""

    def __init__(self, tile, side):
        self.tile, self.shape = tile, (side, side, *tile.shape[2:])

    def __getitem__(self, window):
        rows, columns = (np.arange(s.start, s.stop) % len(self.tile) for s in window)
        return self.tile[rows[:, None], columns]


def command(path, args):
    """infer.py in a folder of its own, or it would see that its work is done."""
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        options = ["--checkpoint", str(args.checkpoint), "--device", args.device, "--out", out]
        assert infer.main([path, *options]) == 0


def whole(args):
    """infer.py with the shipped model, from file to files, against what it cannot do without."""
    side, tile = (128, 64) if args.quick else (4096, 1024)
    halo, resnext = infer.HALO, DualUNet(**RESNEXT50).to(args.device).eval()
    model = load(args.checkpoint, args.device)
    image = Repeated(synthetic_tissue(8, tile)[0], side)
    window = infer.read_window(image, -halo, -halo, tile + halo, tile + halo)[None]
    network = partial(infer.predict_maps, model, window)
    types, probability, density = (m[0, ..., halo:-halo, halo:-halo] for m in network())
    for length in (tile, side):
        Image.fromarray(image[0:length, 0:length]).save(f"{args.folder}/{length}.png")
    eager = partial(run, resnext, torch.rand(1, 3, tile, tile, device=args.device))
    seconds = take_turns({
        "as it comes": partial(as_it_comes, eager),
        "memory kept": eager,
        "load": partial(load, args.checkpoint, args.device),
        "network": network,
        "reconstruct": partial(reconstruct, types, density, class_probability=probability),
        "tile": partial(command, f"{args.folder}/{tile}.png", args),
        "whole": partial(command, f"{args.folder}/{side}.png", args),
    }, args.repeats)

    tiles, note = (side // tile) ** 2, f"weights: {args.checkpoint.name}"
    one, all_of_it = (seconds[name] - seconds["load"] for name in ("tile", "whole"))
    if args.device != "cpu":
        speed = side**2 / 1e6 / all_of_it
        note += f", {speed:.1f} Mpx/s, {2667 / speed / 3600:.2f} h for 100,000 x 80,000, 1/3 tissue"
    name = f"infer.py after loading, {side} x {side} pixels"
    for heap, goal in (("as it comes", 0.25), ("memory kept", None)):
        yield Row(name, f"ResNeXt50 network alone, {heap}, {tiles} tiles without halo",
                  all_of_it / seconds[heap] / tiles, goal, note)
    yield Row("its network", name, seconds["network"] * tiles / all_of_it, None, "halo included")
    yield Row(f"infer.py after loading, {tile} x {tile} pixels", "its network and reconstruction",
              one / (seconds["network"] + seconds["reconstruct"]), 1.25, "halo included")


# ---------------------------------------------------------------- agreement


def agreement(args):
    """Images under each option of infer.py: the time, and the nuclei that stay eager fp32's."""
    side = 128 if args.quick else 1024
    paths = sorted(args.images.iterdir()) if args.images else []
    paths = [path for path in paths if path.suffix in IMAGE_SUFFIXES]
    images = [read_image(path) for path in paths[:4]] or [synthetic_tissue(8, side)[0]]
    model = load_model(args.checkpoint, args.device)
    eager, fused, half = "eager fp32, tiles of 1024", model.fuse(), model.fuse(torch.bfloat16)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        cases = {
            eager: (model, {}), "fused fp32": (fused, {}), "fused bf16": (half, {}),
            "fused fp32, tiles of 256": (fused, {"tile": 256}),
            "fused fp32, tiles of 256 in batches of 4": (fused, {"tile": 256, "batch": 4}),
            "fused fp32, two workers": (fused, {"pool": pool}),
        }
        if args.compile:
            cases["fused fp32, compiled"] = torch.compile(fused), {}
        found, seconds = {}, {}
        for what, (form, options) in cases.items():
            infer.predict(form, images[0][:64, :64], **options)  # starts workers, compiles
            start = time.perf_counter()
            found[what] = [infer.predict(form, image, **options).inst_map for image in images]
            seconds[what] = time.perf_counter() - start
    for what, maps in found.items():
        pairs = [compare(*both) for both in zip(found[eager], maps)]
        matched = sum(np.count_nonzero(pair.iou > 0.5) for pair in pairs)
        f1 = 2 * matched / sum(len(pair.true_area) + len(pair.pred_area) for pair in pairs)
        total = sum(len(pair.true_area) for pair in pairs)
        ratio = seconds[what] / seconds[eager]
        yield Row(what, eager, ratio, None, f"F1 {f1:.4f} of {total:,} nuclei")


# ---------------------------------------------------------------- area


def memory(field):
    """MB that this process holds (VmRSS) or held at its peak (VmHWM)."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def cost(job, side, args):
    """Median seconds of a job, and MB at its peak beyond model and input; in a fresh process.

    The first turn, in which pages are used for the first time, only warms up; of a slide of 4096²
    or more it is the only one.
    """
    tile, seconds = min(side, 1024), []
    if job == "reconstruct":
        _, types, unit, _ = crowded_maps(tile)
        types, unit = (Repeated(values, side)[0:side, 0:side] for values in (types, unit))
        call = partial(reconstruct, types, unit)
    else:  # infer.py on an array on disk: tiles wait there, and are merged
        path, image = Path(args.folder) / "slide.npy", Repeated(synthetic_tissue(8, tile)[0], side)
        array = np.lib.format.open_memmap(path, "w+", np.uint8, (side, side, 3))
        tissue = max(args.tissue * 10**6 // side // tile, 1) * tile  # rows; below them is glass
        for y in range(0, side, tile):
            array[y:y + tile] = image[y:min(y + tile, side), 0:side] if y < tissue else 255
        del array
        held_model = load(args.checkpoint, "cpu")  # not counted
        held_model(torch.zeros(1, 3, 32, 32))
        call = partial(command, str(path), args)
    infer.keep_memory()  # or the first use of every page is what is timed
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    held = memory("VmRSS")
    for _ in range(args.repeats + 1 if job == "reconstruct" or side < 4096 else 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:] or seconds), memory("VmHWM") - held


def plot(path, curves):
    """PNG of {name: [(Mpx, seconds a megapixel over those of 1 Mpx, MB), ...]}."""
    canvas = Image.new("RGB", (1100, 400), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    titles = "time a megapixel, relative", "peak memory, MB"
    for panel, (title, digits) in enumerate(zip(titles, (".1f", ",.0f")), 1):
        left, top, width, height = 540 * panel - 470, 50, 440, 290
        highest = 1.1 * max(point[panel] for points in curves.values() for point in points)
        draw.text((left, 20), f"{title}, against megapixels", "black", font)
        draw.rectangle((left, top, left + width, top + height), outline="gray")
        for tick in range(5):
            at = left - 8, top + height * (1 - tick / 4)
            draw.text(at, f"{highest * tick / 4:{digits}}", "black", font, anchor="rm")
        for row, (name, points) in enumerate(curves.items()):
            color = ("crimson", "royalblue")[row]
            draw.text((left + 150 * row, 374), name, color, font)
            xs = np.linspace(left, left + width, len(points))  # areas quadruple: a log axis
            ys = [top + height * (1 - point[panel] / highest) for point in points]
            draw.line(list(zip(xs, ys)), color, 3)
            for x, point in zip(xs, points):
                draw.text((x, top + height + 8), f"{point[0]:g}", "black", font, anchor="mt")
    canvas.save(path)


def area(args):
    """Time and memory against area: reconstruction in one call, and a slide from file to files."""
    sides = (128, 256) if args.quick else (512, 1024, 2048, 4096, 8192)
    tasks = [("reconstruct", side) for side in sides]
    tasks += [("slide", side) for side in args.slides or sides]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        costs = dict(zip(tasks, pool.starmap(cost, [(*task, args) for task in tasks], chunksize=1)))
    curves = {}
    for (job, side), (seconds, megabytes) in costs.items():
        first = sides[1] if job == "reconstruct" or not args.slides else args.slides[0]
        size, ratio = side**2 / 2**20, seconds / costs[job, first][0]
        curves.setdefault(job, []).append((size, ratio * (first / side) ** 2, megabytes))
        goal = 70 if (job, side) == ("reconstruct", 8192) else None
        note = f"{megabytes:,.0f} MB"
        yield Row(f"{job}, {size:g} Mpx", f"{first**2 / 2**20:g} Mpx", ratio, goal, note)
    plot(args.out.with_suffix(".png"), curves)


# ---------------------------------------------------------------- command line

SECTIONS = {section.__name__: section
            for section in (network, reconstruction, agreement, whole, area)}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="Times DualU-Net beside its peers.")
    option = parser.add_argument
    option("--quick", action="store_true", help="tiny sizes and one turn, to see that all runs")
    option("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    option("--device", default="cpu", help="cpu or cuda, for network and whole (default: cpu)")
    option("--compile", action="store_true", help="torch.compile too; needs a C++ compiler")
    option("--images", type=Path,
           help="folder whose first four images agreement takes (default: synthetic)")
    option("--slides", type=int, nargs="+", help="sides in pixels of area's slides, such as 5000 "
           "20000, the first the base (default: those of reconstruct)")
    option("--tissue", type=int, default=17, help="megapixels of a slide of area that are tissue, "
           "at most: what takes the time (default: 17)")
    option("--repeats", type=int, default=5, help="turns, whose median counts (default: 5)")
    option("--out", type=Path, default=Path(__file__).with_suffix(".json"),
           help="JSON file, the plot beside it (default: benchmarks/speed.json)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    args.repeats = 1 if args.quick else args.repeats
    infer.keep_memory()  # as infer.py does, for all alike
    machine = {
        "cpu": torch.cpu.get_capabilities().get("cpu_name"), "cores": os.cpu_count(),
        "gpu": None if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "torch": torch.__version__,
        "bf16": infer.pick_precision(torch.device(args.device)) is not None,
    }
    print(", ".join(f"{key}: {value}" for key, value in machine.items()))
    results = {"machine": machine}
    with tempfile.TemporaryDirectory() as args.folder:
        args.checkpoint = infer.CHECKPOINT
        if not args.checkpoint.exists():
            args.checkpoint, model = Path(args.folder) / "random.pt", DualUNet(**SHIPPED)
            model.config["class_names"] = list(SYNTHETIC_CLASSES)
            save_checkpoint(args.checkpoint, model)
        for name in args.sections:
            print(f"\n### {name}\n\n| what | ratio | to | goal | |\n|---|---|---|---|---|")
            results[name] = []
            for row in SECTIONS[name](args):
                what, base, ratio, goal, note = row
                print(f"| {what} | {ratio:.3g} | {base} | {goal or ''} | {note} |")
                results[name].append(row._asdict())
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
