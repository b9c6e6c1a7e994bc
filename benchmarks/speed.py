"""How fast DualU-Net is beside the published one, as tables and JSON.

    pip install -r benchmarks/requirements.txt      # scikit-image, for the published recipe alone
    python benchmarks/speed.py                      # on an idle machine
    python benchmarks/speed.py --sections agreement --images CoNSeP/Train/Images
    python benchmarks/speed.py --sections network whole gpu --device cuda

What is compared takes turns in one run, so that a busy machine slows all alike, and the medians
are divided. Only `gpu` and `scales` give absolute figures. `area` needs Linux's /proc.
"""

import argparse
import contextlib
import copy
import ctypes
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the modules are no package

import infer
import peers
from data import synthetic_tissue
from dualunet import DualUNet, dual_loss, load_model
from images import list_images, read_image
from metrics import compare
from postprocess import centroids_of, density_map, reconstruct
from runs import keep_memory, pick_device, pick_precision
from train import average_into

NETWORKS = {
    "published": {"encoder": "resnext50_32x4d"},  # paper
    "shipped": {"encoder": "efficientnet_lite2", "decoder_channels": (192, 96, 48, 32, 16),
                "image_skip": 16}}
BASE = "published, eager fp32"
CROWDED = 9  # seed of a synthetic tile with 2,564 nuclei a megapixel


# ---------------------------------------------------------------- parts


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
    return {name: float(np.median(values[1:])) for name, values in seconds.items()}


def build(name, device):
    """With random weights, which take the same time as trained ones."""
    return DualUNet(num_classes=4, **NETWORKS[name]).to(device).eval()


def answer(model, images):
    with torch.inference_mode():
        return model(images)


def tissue(side, tile):
    """(side, side, 3) uint8: one tile of synthetic tissue again and again."""
    image = synthetic_tissue(CROWDED, tile)[0]
    times = side // tile
    return np.tile(image, (times, times, 1))


# ---------------------------------------------------------------- network


def network(args):
    """Forms of the published and of the shipped network on one tile of 1024²."""
    side = 64 if args.quick else 1024
    tile = torch.rand(1, 3, side, side, device=args.device)
    half = pick_precision(args.device)
    cases = {}
    for name in NETWORKS:
        model = build(name, args.device)
        forms = {"eager fp32": model, "fused fp32": model.fuse()}
        if half:
            forms["fused bf16"] = model.fuse(half)
        if args.compile:
            forms["fused, compiled"] = torch.compile(model.fuse(half))
        for form, variant in forms.items():
            cases[f"{name}, {form}"] = partial(answer, variant, tile)
    seconds = take_turns(cases, args.repeats)
    for name in cases:
        yield {"network": name, f"to {BASE}": seconds[name] / seconds[BASE]}


# ---------------------------------------------------------------- reconstruction


def perfect_maps(side):
    """inst_map, class_probability (5, H, W), and densities by maximum and by sum, of a tile."""
    _, inst_map, type_map = synthetic_tissue(CROWDED, side)
    class_probability = np.eye(5, dtype=np.float32)[type_map].transpose(2, 0, 1)
    centroids = centroids_of(inst_map)
    unit = density_map(centroids, inst_map.shape)
    summed = density_map(centroids, inst_map.shape, combine="sum")
    return inst_map, class_probability, unit, summed


def noisy(class_probability, density):
    """The maps as a network might give them: ragged outlines, uneven and noisy peaks."""
    rng = np.random.default_rng(0)

    def noise(scale):  # of unit variance
        field = ndimage.gaussian_filter(rng.standard_normal(density.shape, np.float32), scale)
        return field / field.std()

    class_probability = ndimage.gaussian_filter(class_probability, (0, 1, 1))
    class_probability[0] += 0.15 * noise(2)
    return class_probability, density * (0.75 + 0.1 * noise(12)) + 0.02 * noise(1.5)


def against_published(args):
    """Rows: the published recipe and ours, on perfect maps and on noisy ones."""
    inst_map, class_probability, unit, summed = perfect_maps(128 if args.quick else 1024)
    maps = {"perfect": ((class_probability, unit), (class_probability, summed)),
            "noisy": (noisy(class_probability, unit), noisy(class_probability, summed))}
    for kind, (with_unit, with_summed) in maps.items():
        cases = {"published recipe": partial(peers.published_nuclei, *with_summed),
                 "its label map alone": partial(peers.published_instances, *with_summed),
                 "ours": partial(reconstruct, *with_unit),
                 "ours, summed peaks": partial(reconstruct, *with_summed, combine="sum")}
        seconds = take_turns(cases, args.repeats)
        for name, case in cases.items():
            result = case()
            pair = compare(inst_map, result[0] if isinstance(result, tuple) else result)
            found = np.count_nonzero(pair.iou > 0.5)
            yield {"reconstruction": f"{name}, {kind} maps", "to": "published recipe",
                   "ratio": seconds[name] / seconds["published recipe"],
                   "nuclei found": f"{found:,} of {len(pair.true_area):,}"}


def hostile(args):
    """Rows: maps that could take long, against a real-looking one; 4 megapixels each."""
    side = 128 if args.quick else 1024
    _, class_probability, unit, _ = perfect_maps(side)
    class_probability, unit = noisy(class_probability, unit)
    real = np.tile(class_probability, (1, 2, 2)), np.tile(unit, (2, 2))

    # All of these are foreground.
    y, x = np.indices((2 * side, 2 * side))
    nuclei = np.stack([0.0 * y, 0.0 * y + 1])
    noise = np.random.default_rng(0).random(y.shape)
    maps = {"real-looking": real, "flat": (nuclei, 0.0 * y + 0.5),
            "checkerboard": (nuclei, (y + x) % 2), "noise": (nuclei, noise)}
    for combine in ("max", "sum"):
        cases = {name: partial(reconstruct, *both, combine=combine) for name, both in maps.items()}
        seconds = take_turns(cases, args.repeats)
        for name in cases:
            yield {"reconstruction": f"{name}, combine={combine}", "to": "real-looking",
                   "ratio": seconds[name] / seconds["real-looking"], "nuclei found": ""}


def reconstruction(args):
    """The published recipe against ours, and maps that could take long."""
    if peers.can_compare():
        yield from against_published(args)
    yield from hostile(args)


# ---------------------------------------------------------------- from file to files


def as_pytorch_comes(case):
    """The case without `keep_memory`: glibc returns large blocks to the kernel."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc: nothing was changed
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 65536)  # M_MMAP_MAX
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: where glibc's own rule leads
        libc.mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD: likewise
    case()
    keep_memory()


def command(path, args):
    """infer.py in a folder of its own, or it would see that its work is done."""
    words = [path, "--checkpoint", args.weights / "consep.pt", "--device", args.device, "--out"]
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        code = infer.main([*map(str, words), out])
    assert code == 0, f"infer.py ended with code {code}; its reason is above"


def whole(args):
    """infer.py from file to files, against the published network alone and without a halo."""
    tile = 64 if args.quick else 1024
    images = torch.rand(1, 3, tile, tile, device=args.device)
    eager = partial(answer, build("published", args.device), images)
    cases = {"as PyTorch comes": partial(as_pytorch_comes, eager), "memory kept": eager}
    sides = tile, 2 * tile, 4 * tile
    for side in sides:
        path = Path(args.folder, f"{side}.png")
        Image.fromarray(tissue(side, tile)).save(path)
        cases[side] = partial(command, path, args)

    seconds = take_turns(cases, args.repeats)
    for side in sides:
        a_tile = seconds[side] / (side // tile) ** 2
        row = {"infer.py, its loading included": f"{side} x {side} pixels"}
        for heap in ("as PyTorch comes", "memory kept"):
            row[f"to {BASE}, {heap}"] = a_tile / seconds[heap]
        if args.device.type != "cpu":
            row["Mpx/s"] = side**2 / 1e6 / seconds[side]
        yield row


def memory(field):
    """MB that this process holds (VmRSS) or held at its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def cost(side, args):
    """Seconds of infer.py on a slide, and MB at its peak beyond what was held before."""
    # An array on disk, at most 4096² of it tissue, the rest empty glass.
    tile, path = min(side, 1024), Path(args.folder, "slide.npy")
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (side, side, 3))
    image = tissue(min(side, 4096), tile)
    for y in range(0, side, tile):
        array[y:y + tile] = 255
        if y < len(image):
            array[y:y + tile, :len(image)] = image[y:y + tile]
    del array, image

    # The peak begins anew.
    Path("/proc/self/clear_refs").write_text("5")
    held, start = memory("VmRSS"), time.perf_counter()
    command(path, args)
    return time.perf_counter() - start, memory("VmHWM") - held


def area(args):
    """Time and memory of infer.py against area; above 100 megapixels tiles wait on disk."""
    sides = (64, 128) if args.quick else (1024, 4096, 10240, 20480)
    args = argparse.Namespace(**vars(args) | {"device": torch.device("cpu")})
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        costs = pool.starmap(cost, [(side, args) for side in sides], chunksize=1)
    for side, (seconds, megabytes) in zip(sides, costs):
        yield {"slide": f"{side} x {side} pixels", "time, to the first": seconds / costs[0][0],
               "peak memory, MB": round(megabytes)}


def agreement(args):
    """How many nuclei stay the same under infer.py's options; without --images, synthetic ones."""
    images = [synthetic_tissue(CROWDED, 128 if args.quick else 1024)[0]]
    if args.images:
        images = [read_image(path).pixels for path in list_images(args.images)[0][:4]]
    model = load_model(args.weights / "consep.pt", args.device)
    fused, half = model.fuse(), model.fuse(torch.bfloat16)
    cases = {"eager fp32": (model, {}), "fused fp32": (fused, {}), "fused bf16": (half, {}),
             "fused fp32, batches of 4": (fused, {"batch": 4}),
             "fused fp32, halo of 128": (fused, {"halo": 128}),
             "fused fp32, tiles of 1024": (fused, {"tile": 1024})}
    expected = None
    for name, (form, options) in cases.items():
        found = [infer.predict(form, image, **options).inst_map for image in images]
        expected = expected or found
        pairs = [compare(*both) for both in zip(expected, found)]
        matched = sum(np.count_nonzero(pair.iou > 0.5) for pair in pairs)
        total = sum(len(pair.true_area) + len(pair.pred_area) for pair in pairs)
        nuclei = sum(len(pair.pred_area) for pair in pairs)
        yield {"option": name, "nuclei": nuclei, "F1 to the first": f"{2 * matched / total:.4f}"}


def scales(args):
    """The weights for 40x and for 20x on one picture at 0.25 µm per pixel."""
    side, mpp = 128 if args.quick else 2048, 0.25
    image = tissue(side, side // 2)
    cases = {}
    for name in ("nuclei.pt", "nuclei20x.pt"):
        model = load_model(args.weights / name, args.device).fuse(pick_precision(args.device))
        cases[name] = partial(infer.predict, model, image, mpp=mpp)
    seconds = take_turns(cases, args.repeats)
    mm2 = (side * mpp / 1000) ** 2
    for name in cases:
        yield {"weights": name, "mm² a second": mm2 / seconds[name],
               "speed, to nuclei.pt": seconds["nuclei.pt"] / seconds[name]}


# ---------------------------------------------------------------- gpu


def training_step(model, average, optimizer, images, type_map, density, dtype):
    """A step as train.py's, without the loading of crops."""
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        maps = model(images)
    loss = dual_loss(*maps, type_map, density)["loss"]
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    average_into(average, model, 0.999)


def gpu(args):
    """Absolute figures of a card: the network on batches of 8 x 1024², and a training step."""
    device, half = args.device, pick_precision(args.device)
    if device.type != "cuda" and not args.quick:
        print("gpu is left out: give --device cuda", file=sys.stderr)
        return
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    torch.backends.cudnn.benchmark = True  # all inputs have one size

    # The networks.
    batch, side = (2, 64) if args.quick else (8, 1024)
    images = torch.rand(batch, 3, side, side, device=device)
    published, shipped = build("published", device), build("shipped", device)
    forms = {BASE: published, "published, fused bf16": published.fuse(half),
             "shipped, fused bf16": shipped.fuse(half)}
    seconds = take_turns(
        {name: partial(answer, form, images) for name, form in forms.items()}, args.repeats)
    for name in forms:
        speed = batch * side**2 / 1e6 / seconds[name]
        yield {"card": card, "what": f"{name}, batches of {batch} x {side}²",
               "figure": f"{speed:.3g} Mpx/s"}

    # A step of training.
    batch, side = (2, 64) if args.quick else (32, 256)
    images = torch.rand(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)
    type_map = torch.randint(0, 5, (batch, side, side), device=device)
    density = torch.rand(batch, 1, side, side, device=device)
    model = shipped.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    step = partial(training_step, model, copy.deepcopy(model), optimizer, images, type_map, density,
                   half)
    seconds = take_turns({"step": step}, args.repeats)["step"]
    yield {"card": card, "what": f"training step of {batch} crops of {side}²",
           "figure": f"{1000 * seconds:.0f} ms"}


# ---------------------------------------------------------------- command line

SECTIONS = {"network": network, "reconstruct": reconstruction, "whole": whole, "area": area,
            "agreement": agreement, "scales": scales, "gpu": gpu}


def print_rows(rows):
    """Prints the rows as a markdown table while they come, and returns them."""
    done = []
    for row in rows:
        if not done:
            print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
        cells = []
        for value in row.values():
            cells.append(f"{value:.3g}" if isinstance(value, float) else str(value))
        print(f"| {' | '.join(cells)} |", flush=True)
        done.append(row)
    return done


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--quick", action="store_true", help="tiny sizes and one turn, to see that all runs")
    option("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    option("--device", default="cpu", help="cpu or cuda (default: cpu)")
    option("--compile", action="store_true", help="torch.compile too; needs a C++ compiler")
    option("--images", type=Path, help="folder whose first four images agreement takes")
    option("--weights", type=Path, default=ROOT / "weights", help="default: weights")
    option("--repeats", type=int, default=5, help="turns, whose median counts (default: 5)")
    option("--out", type=Path, default=Path(__file__).with_suffix(".json"),
           help="JSON file (default: benchmarks/speed.json)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    args.repeats = 1 if args.quick else args.repeats
    args.device = pick_device(args.device)
    keep_memory()  # as infer.py does, for all alike
    results = {"cores": os.cpu_count(), "torch": torch.__version__,
               "cpu": torch.cpu.get_capabilities().get("cpu_name"),
               "bf16": pick_precision(args.device) is not None}
    print(results)
    with tempfile.TemporaryDirectory() as args.folder:
        for name in args.sections:
            print(f"\n### {name}\n", flush=True)
            results[name] = print_rows(SECTIONS[name](args))
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
