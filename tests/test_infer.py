"""infer.py: tiles, the rule where two claim a nucleus, resolution, and the command."""

import csv
import math
import shutil
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import nn
from torch.nn.functional import avg_pool2d

import infer
import runs
from data import synthetic_tissue
from dualunet import DualUNet, save_checkpoint
from infer import predict, predict_maps, predict_tiles, read_window
from metrics import compare
from pictures import Picture, array_level
from postprocess import measure, reconstruct

COLORS = [(255, 0, 0), (0, 255, 0)]


class Lookup(nn.Module):
    """A network that answers with given maps: the image's colours say which pixel it looks at."""

    def __init__(self, type_map, density):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.maps = torch.from_numpy(type_map).long().ravel(), torch.from_numpy(density).ravel()
        self.config = {"num_classes": 3, "reconstruct": {}, "mpp": None}
        index = np.arange(type_map.size).reshape(type_map.shape)
        self.image = np.stack((index >> 16, index >> 8 & 255, index & 255), 2).astype(np.uint8)
        self.eval()

    def forward(self, images):
        red, green, blue = (images * 255).round().long().unbind(1)
        index = red << 16 | green << 8 | blue
        certainty = (3 + index % 5)[..., None]
        logits = nn.functional.one_hot(self.maps[0][index], 4) * certainty
        return logits.permute(0, 3, 1, 2).float(), self.maps[1][index][:, None]

    def whole(self):
        """The nuclei of the given maps, without tiles."""
        class_probability, density = predict_maps(self, self.image[None])
        return reconstruct(class_probability[0], density[0])


def field(height, width, count, seed=0):
    """type_map and density of `count` round nuclei, many of which touch, with some noise."""
    rng = np.random.default_rng(seed)
    away = np.ones((height, width))
    y, x = rng.integers(0, height, count), rng.integers(0, width, count)
    away[y, x] = 0
    distance, nearest = ndimage.distance_transform_edt(away, return_indices=True)
    type_map = np.where(distance < 6, 1 + (nearest[0] + nearest[1]) % 3, 0).astype(np.uint8)
    noise = rng.normal(0, 0.02, away.shape)
    return type_map, (np.exp(-distance**2 / 50) + noise).astype(np.float32)


class Darkness(nn.Linear):
    """A network for tests: nuclei are what is darker than its surroundings, in two classes."""

    config = {"num_classes": 2, "class_names": ["one", "two"], "colors": COLORS,
              "mpp": 0.25, "licence": "CC0 (test)", "reconstruct": {"threshold": 0.1}}

    def __init__(self):
        super().__init__(1, 1)
        self.config = dict(self.config)  # which --classes changes
        self.eval()

    def fuse(self, dtype):
        return self

    def forward(self, images):
        dark = avg_pool2d(1 - images.mean(1, keepdim=True), 5, 1, 2)
        dark = dark - avg_pool2d(dark, 31, 1, 15)
        blue = avg_pool2d(images[:, 2:] - images[:, :1], 15, 1, 7) - 0.1
        logits = torch.cat((0.02 - dark, dark + blue, dark - blue), 1) * 30
        return logits, avg_pool2d(dark, 5, 1, 2) * 4


def tiny_model(**config):
    torch.manual_seed(0)
    model = DualUNet(num_classes=2, encoder="resnet18", decoder_channels=(8, 8, 8, 8, 8))
    nn.init.normal_(model.segmentation_head.weight, std=0.1)
    nn.init.constant_(model.density_head.bias, 0.3)
    model.config |= {"class_names": ["one", "two"], "colors": COLORS, "mpp": 0.25, "sigma": 5.0,
                     "reconstruct": {}, "licence": "CC0 (test)"} | config
    return model.eval()


@pytest.fixture(scope="module")
def network():
    return tiny_model()


def agreement(a, b):
    """F1 of two label maps at IoU > 0.5."""
    pair = compare(a, b)
    return 2 * (pair.iou > 0.5).sum() / (len(pair.true_area) + len(pair.pred_area))


# ---------------------------------------------------------------- tiles


@pytest.mark.parametrize("tile, halo, batch", [(64, 64, 4), (128, 96, 1), (160, 64, 3)])
def test_given_maps_are_reconstructed_the_same_on_every_grid(tile, halo, batch):
    model = Lookup(*field(210, 333, 250))
    whole = model.whole()
    steps = []
    tiled = predict(model, model.image, tile=tile, halo=halo, batch=batch,
                    progress=lambda done, tiles: steps.append((done, tiles)))
    assert len(whole.areas) > 150
    for name in ("inst_map", "peaks", "classes", "areas", "boxes"):
        assert np.array_equal(getattr(whole, name), getattr(tiled, name)), name
    assert np.allclose(whole.centroids, tiled.centroids, rtol=0, atol=1e-9)
    assert tiled.inst_map.dtype == np.int32 and np.isfinite(tiled.probabilities).all()
    count = -(-210 // tile) * -(-333 // tile)
    assert steps == [(i + 1, count) for i in range(count)]


def test_tiles_own_the_nuclei_whose_peak_lies_in_their_core():
    model = Lookup(*field(150, 150, 60))
    picture = Picture([array_level(model.image)])
    cores = infer.tile_cores(150, 150, 64)
    tiles = list(predict_tiles(model, picture, cores, halo=64))
    seen = set()
    for (y0, x0, y1, x1), (origin, nuclei) in zip(cores, tiles, strict=True):
        assert nuclei.inst_map.max() == len(nuclei.areas)
        for y, x in nuclei.peaks + origin:
            assert y0 <= y < y1 and x0 <= x < x1 and (y, x) not in seen
            seen.add((y, x))
    assert len(tiles) == 9 and len(seen) > 20


def test_a_network_shows_the_grid_hardly(network):
    image = np.random.default_rng(0).integers(0, 256, (64, 120, 3), np.uint8)
    whole, tiled = (predict(network, image, tile=tile, batch=2, threshold=-9) for tile in (128, 64))
    assert len(whole.areas) > 20
    assert abs(len(whole.areas) - len(tiled.areas)) <= 1 + 0.02 * len(whole.areas)


def test_the_tile_follows_the_image_and_the_memory(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(infer, "memory_of", lambda device: 2**35)
    assert infer.pick_tile(cpu) == 2048
    assert infer.pick_tile(cpu, batch=8) == 1024  # eight windows of 2304 are too much
    monkeypatch.setattr(infer, "memory_of", lambda device: 2**20)
    assert infer.pick_tile(cpu) == 256
    assert runs.memory_of(cpu) > 2**28


@pytest.mark.parametrize("shape, tile, part", [
    ((270, 270), 256, (160, 160)), ((512, 512), 256, (256, 256)), ((1000, 260), 256, (256, 160)),
    ((50, 2049), 2048, (64, 1056)), ((5824, 100), 2048, (1952, 128))])
def test_tiles_are_equal_parts(shape, tile, part):
    cores = infer.tile_cores(*shape, tile)
    assert cores[0] == (0, 0, *part)
    assert len(cores) == math.ceil(shape[0] / tile) * math.ceil(shape[1] / tile)
    covered = sum((y1 - y0) * (x1 - x0) for y0, x0, y1, x1 in cores)
    assert covered == infer.round_up(shape[0]) * infer.round_up(shape[1])


def test_batches_fill_two_megapixels():
    cores = infer.tile_cores(1024, 1280, 256) + infer.tile_cores(128, 128, 128)
    assert [len(batch) for batch in infer.batches_of(cores, 32)] == [20, 1]  # windows of 320²
    assert [len(batch) for batch in infer.batches_of(cores, 128)] == [8, 8, 4, 1]  # of 512²
    assert [len(batch) for batch in infer.batches_of(cores, 32, 9)] == [9, 9, 2, 1]
    assert [len(batch) for batch in infer.batches_of(cores, 2048)] == [1] * 21


@pytest.fixture(scope="module")
def shipped(root, tissue):
    """The shipped network, an image, and its nuclei in fp32 and one pass."""
    model = infer.load_any_model(root / "weights" / "consep.pt")
    image = tissue[0][:128]
    nuclei = predict(model, image, halo=32)
    assert len(nuclei.areas) > 10
    return model, image, nuclei


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own
@pytest.mark.filterwarnings("ignore:Guards may run slower")  # torch.compile on Python 3.13.0
@pytest.mark.parametrize("option", ["fused", "bf16", "batch", "workers", "compiled"])
def test_every_option_finds_the_same_nuclei(shipped, option):
    model, image, expected = shipped
    model = model.fuse(torch.bfloat16 if option == "bf16" else None)
    options = {"tile": 128, "halo": 128, "batch": 2} if option == "batch" else {"halo": 32}
    if option == "compiled":
        if not shutil.which("g++"):
            pytest.skip("torch.compile needs a C++ compiler")
        model = torch.compile(model)
    pool = nullcontext()
    if option == "workers":
        pool = ProcessPoolExecutor(1, get_context("spawn"))
    with pool as workers:
        found = predict(model, image, pool=workers, **options)
    wanted = 0.9 if option in ("bf16", "batch") else 0.999  # of twenty nuclei
    assert agreement(expected.inst_map, found.inst_map) >= wanted
    if option == "workers":
        assert all(map(np.array_equal, found, predict(model, image, **options)))


def test_flips_are_the_mean_over_four_mirrorings(network):
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), np.uint8)
    got = predict_maps(network, image, flips=True)
    plain = predict_maps(network, image)
    for k, first_axis in ((0, 2), (1, 1)):  # class_probability, density
        views = []
        for axes in ((), (0,), (1,), (0, 1)):
            mirrored = np.flip(image, [1 + axis for axis in axes]).copy()
            maps = predict_maps(network, mirrored)[k]
            views.append(np.flip(maps, [first_axis + axis for axis in axes]))
        assert np.allclose(got[k], np.mean(views, axis=0), atol=1e-6)
        assert not np.allclose(got[k], plain[k], atol=1e-6)


def test_windows_continue_the_image_as_numpy_reflects_it():
    image = np.random.default_rng(0).integers(0, 256, (5, 1, 3), np.uint8)
    padded = np.pad(image, ((64, 59), (32, 31), (0, 0)), "reflect")
    assert np.array_equal(read_window(image, -64, -32, 64, 32), padded)


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (65, 1), (31, 33)])
def test_any_size_works(network, shape):
    image = np.full((*shape, 3), 200, np.uint8)
    nuclei = predict(network, image, tile=32, halo=32, batch=4)
    assert nuclei.inst_map.shape == shape
    assert nuclei.inst_map.max(initial=0) == len(nuclei.peaks)


def test_of_a_memmap_no_more_than_a_window_is_read(tmp_path):
    class Reader:
        shape = (150, 90, 3)

        def __getitem__(self, window):
            sizes.append(memmap[window].shape[:2])
            return memmap[window]

    sizes, model = [], Lookup(*field(150, 90, 40))
    np.save(tmp_path / "image.npy", model.image)
    memmap = np.load(tmp_path / "image.npy", mmap_mode="r")
    whole = predict(model, model.image)
    assert np.array_equal(predict(model, memmap).inst_map, whole.inst_map)
    assert np.array_equal(predict(model, Reader(), tile=32, halo=32).inst_map, whole.inst_map)
    assert np.max(sizes) == 96


def test_the_model_says_how_to_reconstruct(network):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    picky = network
    picky.config = network.config | {"reconstruct": {"min_size": 10**6}}
    assert not len(predict(picky, image, halo=32, threshold=-9).areas)
    assert len(predict(picky, image, halo=32, threshold=-9, min_size=1).areas)
    network.config["reconstruct"] = {}


def test_bad_arguments_are_named():
    model = Lookup(*field(40, 40, 3))
    for kind, words, image, options in [
        (ValueError, "multiples of 32", model.image, {"tile": 100}),
        (ValueError, "multiples of 32", model.image, {"tile": 0}),
        (ValueError, "multiples of 32", model.image, {"halo": -32}),
        (ValueError, "at least 1 tile", model.image, {"batch": 0}),
        (ValueError, r"expected \(height, width, 3\)", model.image[..., 0], {}),
        (ValueError, r"expected \(height, width, 3\)", model.image[:0], {}),
        (ValueError, "expected uint8", model.image / 255, {}),
        (ValueError, "image is a str; expected an array", "image.png", {}),
        (ValueError, "mpp: 500 µm per pixel is implausible", model.image, {"mpp": 500}),
    ]:
        with pytest.raises(kind, match=words):
            predict(model, image, **options)
    with pytest.raises(RuntimeError, match="model.eval()"):
        predict(model.train(), model.image)


# ---------------------------------------------------------------- two tiles, one nucleus


def nuclei_of(inst_map, peaks):
    nuclei = measure(inst_map, np.minimum(inst_map, 1), peaks=peaks)
    return nuclei._replace(probabilities=np.ones(len(peaks), np.float32))


def test_nuclei_that_claim_taken_pixels_give_way():
    inst_map = np.zeros((20, 40), np.int32)
    inst_map[5:15, 2:10], inst_map[5:15, 12:20], inst_map[5:15, 22:38] = 1, 2, 3
    nuclei, taken = nuclei_of(inst_map, [(10, 6), (10, 16), (10, 30)]), np.zeros((20, 40), bool)
    assert infer.give_way(nuclei, taken) is nuclei
    taken[:, 5:11] = True  # most of the first
    taken[:, 25] = True  # splits the third into 3 and 12 columns
    found = infer.give_way(nuclei, taken)
    assert found.areas.tolist() == [80, 120] and found.peaks.tolist() == [[10, 16], [10, 30]]
    assert found.boxes[1].tolist() == [5, 26, 15, 38] and found.centroids[1].tolist() == [9.5, 31.5]
    assert found.probabilities.tolist() == [1, 1] and found.classes.tolist() == [1, 1]
    assert not found.inst_map[taken].any()


def test_a_nucleus_of_two_tiles_is_kept_once_and_no_pixel_twice():
    # Four tiles whose windows overlap; the same nucleus in the middle of each, a bit shifted.
    tiles = []
    for y, x in ((0, 0), (0, 20), (20, 0), (20, 20)):
        inst_map = np.zeros((60, 60), np.int32)
        shift = (y + x) // 20
        inst_map[35 - y + shift:45 - y + shift, 35 - x:45 - x] = 1  # the nucleus that all see
        inst_map[2:6, 2:6] = 2  # one of its own
        tiles.append(((y, x), nuclei_of(inst_map, [(40 - y, 40 - x), (4, 4)])))
    found = list(infer.without_overlap(tiles))
    assert [len(nuclei.areas) for _, nuclei in found] == [2, 1, 1, 1]
    assert [origin for origin, _ in found] == [(0, 0), (0, 20), (20, 0), (20, 20)]
    claims = np.zeros((80, 80), int)
    for (y, x), nuclei in found:
        claims[y:y + 60, x:x + 60] += nuclei.inst_map > 0
    assert claims.max() == 1 and claims.sum() == 100 + 4 * 16


# ---------------------------------------------------------------- resolution


@pytest.mark.parametrize("mpp", [0.5, 1.0, 0.125, 0.3])
def test_a_picture_of_another_resolution_keeps_its_pixels_and_is_not_shifted(mpp):
    """A symmetric picture gives a symmetric answer: as far from the left as from the right."""
    class Bright(nn.Linear):  # a nucleus is what is brighter than half
        config = {"num_classes": 1, "mpp": 0.25, "reconstruct": {"min_size": 1}}

        def forward(self, images):
            light = images.mean(1, keepdim=True) - 0.5
            return torch.cat((-light, light), 1) * 20, light.clip(0) * 2

    picture = np.zeros((48, 64, 3), np.uint8)
    y, x = np.mgrid[:48, :64]
    for centre in (15.5, 47.5):
        picture[np.hypot(y - 23.5, x - centre) < 9] = 255
    nuclei = predict(Bright(1, 1).eval(), picture, mpp=mpp, halo=32)
    assert nuclei.inst_map.shape == (48, 64) and len(nuclei.areas) == 2
    assert np.abs(nuclei.centroids - [(23.5, 15.5), (23.5, 47.5)]).max() < 0.05
    assert np.abs(nuclei.areas / 256 - 1).max() < 0.12
    mirrored = nuclei.inst_map[::-1, ::-1] > 0
    assert np.mean(mirrored != (nuclei.inst_map > 0)) < 0.003
    for (y0, x0, y1, x1), peak in zip(nuclei.boxes, nuclei.peaks):
        assert y0 <= peak[0] < y1 and x0 <= peak[1] < x1


def test_a_resolution_that_differs_little_is_left_alone():
    network, image = Darkness(), synthetic_tissue(1, 96)[0]
    same = predict(network, image, halo=32)
    assert np.array_equal(predict(network, image, halo=32, mpp=0.26).inst_map, same.inst_map)
    other = predict(network, image, halo=32, mpp=0.27)
    assert not np.array_equal(other.inst_map, same.inst_map)


# ---------------------------------------------------------------- command line


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Runs the command in a folder of its own; returns exit code, stdout and stderr."""
    def command(*words):
        if "--checkpoint" not in words:
            (tmp_path / "tiny.pt").write_text("stands for a network")
            monkeypatch.setattr(infer, "load_any_model", lambda path, device: Darkness())
            words = [*words, "--checkpoint", tmp_path / "tiny.pt"]
        words = [*words, "--out", tmp_path / "out", "--device", "cpu", "--halo", "32"]
        return infer.main([*map(str, words)]), *capsys.readouterr()
    return command


def outputs(folder):
    return sorted(p.name for p in folder.iterdir() if p.name not in ("run.jsonl", "summary.csv"))


def picture(path, height=40, width=50, **options):
    """Synthetic tissue in a file."""
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(synthetic_tissue(1, (height, width))[0]).save(path, **options)
    return path


def test_command_writes_every_format_and_says_what_it_does(run, tmp_path):
    code, out, err = run(picture(tmp_path / "a.png"), "--formats", *infer.FORMATS, "--mpp", "0.26")
    assert code == 0 and err == ""
    assert outputs(tmp_path / "out") == sorted(f"a{suffix}" for suffix, _ in infer.FORMATS.values())
    first, *last = out.splitlines()
    precision = "bf16" if infer.pick_precision(torch.device("cpu")) else "fp32"
    assert first == (f"1 image; tiny.pt: one, two at 0.25 µm per pixel; "
                     f"on cpu in {precision}")
    assert len(last) == 3 and " nuclei in 1 image: one " in last[0]
    assert last[1].startswith("0.00 megapixels at 0.26 µm per pixel (--mpp) in ")
    assert last[2] == (f"written to {tmp_path / 'out'}, with a row an image in summary.csv; "
                       "licence of the weights: CC0 (test)")


def test_the_resolution_of_a_file_is_used_and_said(run, tmp_path):
    picture(tmp_path / "in" / "a.png", dpi=(50800, 50800))  # 0.5 µm
    picture(tmp_path / "in" / "b.png")
    picture(tmp_path / "in" / "c.png", dpi=(72, 72))
    code, out, err = run(tmp_path / "in", "--formats", "csv")
    assert code == 0
    assert "0.5 µm per pixel (PNG pHYs; resampled to 0.25)" in out
    assert "no resolution in 2 files: assumed 0.25 µm per pixel (40x); give --mpp otherwise" in out
    rows = summary(tmp_path / "out")
    assert [row["um_per_pixel"] for row in rows] == ["0.5", "0.25", "0.25"]
    code, _, err = run(tmp_path / "in", "--mpp", "500")
    assert code == 2 and "500 µm per pixel is implausible; 0.25 is 40x, 0.5 is 20x" in err


def summary(folder):
    with open(folder / "summary.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_one_bad_image_does_not_stop_a_folder(run, tmp_path):
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_text("no image")
    picture(tmp_path / "in" / "c.jpg", 8, 9)
    (tmp_path / "in" / "notes.txt").write_text("")
    (tmp_path / "in" / "sub").mkdir()
    code, out, err = run(tmp_path / "in", "--formats", "csv")
    assert code == 1 and out.splitlines()[0] == (
        f"{tmp_path / 'in'}: skipped 1 file that is no picture (.txt); "
        "1 subfolder is not searched: sub")
    assert out.splitlines()[2] == "1 image failed, see above" and "licence" not in out
    assert f"error: {tmp_path / 'in' / 'b.png'}: " in err
    assert outputs(tmp_path / "out") == ["a_nuclei.csv", "c_nuclei.csv"]
    assert [row["name"] for row in summary(tmp_path / "out")] == ["a.png", "c.jpg"]


def test_notes_on_a_picture_are_warnings_that_name_it(run, tmp_path):
    Image.new("RGB", (40, 30), "white").save(tmp_path / "white.png")
    code, _, err = run(tmp_path / "white.png", "--formats", "csv")
    assert code == 0 and err.startswith(f"warning: {tmp_path / 'white.png'}: it is nearly white")


def test_a_resolution_that_the_file_denies_is_said(run, tmp_path):
    image = picture(tmp_path / "a.png", dpi=(50800, 50800))
    code, _, err = run(image, "--formats", "csv", "--mpp", "0.25")
    assert code == 0 and err == (f"warning: {image}: it states 0.5 µm per pixel (PNG pHYs), but "
                                 "--mpp 0.25 is used\n")
    assert run(image, "--formats", "csv", "--mpp", "0.51", "--overwrite")[2] == ""


def test_a_summary_that_cannot_be_written_ends_in_a_sentence(run, tmp_path):
    (tmp_path / "out" / "summary.csv").mkdir(parents=True)  # as if a spreadsheet held it
    code, _, err = run(picture(tmp_path / "a.png"), "--formats", "csv")
    assert code == 1 and err.startswith("error: ") and "check path, permissions" in err
    assert outputs(tmp_path / "out") == ["a_nuclei.csv"] and err.count("\n") == 1


def test_images_of_one_stem_keep_apart(run, tmp_path):
    picture(tmp_path / "in" / "a.png"), picture(tmp_path / "in" / "a.jpg")
    assert run(tmp_path / "in", "--formats", "csv")[0] == 0
    assert outputs(tmp_path / "out") == ["a.jpg_nuclei.csv", "a.png_nuclei.csv"]
    code, _, err = run(tmp_path / "in" / "a.png", picture(tmp_path / "other" / "A.png"))
    assert code == 2 and "would overwrite the outputs of" in err


def test_calls_that_make_no_sense_end_with_one_sentence(run, tmp_path):
    image = picture(tmp_path / "in" / "a.png")
    (tmp_path / "empty").mkdir(), (tmp_path / "fake.pt").write_text("no weights")
    (tmp_path / "texts").mkdir(), (tmp_path / "texts" / "a.txt").write_text("")
    load = infer.load_any_model
    for words, sentence in [
        ([], "no image named"),
        ([tmp_path / "none.png"], "none.png: no such file or folder"),
        ([tmp_path / "empty"], "empty: no image inside; expected .png"),
        ([tmp_path / "texts"], "no image inside, skipped 1 file that is no picture (.txt)"),
        ([image, "--tile", 100], "tile is 100 and halo 32; expected multiples of 32"),
        ([image, "--tile", 0], "tile is 0"),
        ([image, "--batch", 0], "batch is 0"),
        ([image, "--mpp", "nan"], "nan µm per pixel is implausible"),
        ([image, "--keep", "three"], "--keep three: no such class; choose from one, two"),
        ([image, "--classes", "x"], "--classes has 1 names"),
        ([image, "--classes", "x, y", "--keep", "one"], "no such class; choose from x, y"),
        ([image, "--export", "half.pt"], "--export is gone; run python convert.py theirs.pth"),
        ([image, "--checkpoint", tmp_path / "none.pt"], "none.pt: no such checkpoint"),
        ([image, "--checkpoint", tmp_path / "fake.pt"], "fake.pt: "),
    ]:
        infer.load_any_model = load
        code, out, err = run(*words)
        assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
        assert sentence in err
    (tmp_path / "out").write_text("in the way")
    code, _, err = run(image)
    assert code == 2 and f"{tmp_path / 'out'}: File exists" in err
    with pytest.raises(ValueError, match="--device cuda:99: not usable"):
        infer.pick_device("cuda:99")


def test_failures_are_explained_in_a_sentence(run, tmp_path, monkeypatch):
    image = picture(tmp_path / "a.png")
    for error, sentence in [(MemoryError(), "out of memory; use a smaller --tile"),
                            (OSError(28, "No space left"), "No space left; check path"),
                            (ValueError("density has 3 non-finite values"), "density has 3")]:
        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(infer, "predict", fail)
        code, _, err = run(image)
        assert code == 1 and err.startswith(f"error: {image}: {sentence}") and err.count("\n") == 1
    assert not outputs(tmp_path / "out")


def test_an_interrupted_run_resumes_and_another_is_refused(run, tmp_path, monkeypatch):
    for name in "abc":
        picture(tmp_path / "in" / f"{name}.png")
    write, calls = infer.write_outputs, []

    def stopped(*words):
        calls.append(words[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*words)

    monkeypatch.setattr(infer, "write_outputs", stopped)
    code, _, err = run(tmp_path / "in", "--formats", "csv")
    assert code == 130 and err == (f"stopped: what is done is kept in {tmp_path / 'out'}; "
                                   "the same command goes on from there\n")
    assert outputs(tmp_path / "out") == ["a_nuclei.csv"]
    assert [row["name"] for row in summary(tmp_path / "out")] == ["a.png"]
    code, out, _ = run(tmp_path / "in", "--formats", "csv")
    assert code == 0 and calls == ["a", "b", "b", "c"]
    assert "1 image already done (" in out and "nuclei in 2 images" in out
    rows = summary(tmp_path / "out")
    assert [row["name"] for row in rows] == ["a.png", "b.png", "c.png"]

    # A third time nothing is left to do.
    code, out, _ = run(tmp_path / "in", "--formats", "csv")
    nuclei = sum(int(row["nuclei"]) for row in rows)
    assert code == 0 and out.splitlines()[1:] == [
        f"3 images already done ({nuclei:,} nuclei); --overwrite does it again"]
    assert summary(tmp_path / "out") == rows and len(calls) == 4

    # Other settings, another image of the same name, a file that is gone.
    code, _, err = run(tmp_path / "in", "--formats", "csv", "--tile", "64")
    assert code == 2 and "holds outputs of another tile" in err and "--overwrite" in err
    other = picture(tmp_path / "other" / "a.png")
    code, _, err = run(other, "--formats", "csv")
    assert code == 1 and "choose another --out, or replace it with --overwrite" in err
    (tmp_path / "out" / "b_nuclei.csv").unlink()
    assert run(tmp_path / "in", "--formats", "csv")[0] == 0 and calls[4:] == ["b"]
    code, out, _ = run(other, "--formats", "csv", "--tile", "64", "--overwrite")
    assert code == 0 and "already" not in out


def test_only_the_classes_to_keep_are_written(run, tmp_path, monkeypatch):
    image = picture(tmp_path / "a.png", 96, 96)
    assert run(image, "--formats", "csv", "npy")[0] == 0
    with open(tmp_path / "out" / "a_nuclei.csv", encoding="utf-8") as file:
        every = [row["class"] for row in csv.DictReader(file)]
    kept = every[0]
    words = "--formats", "csv", "npy", "--keep", kept, "--overwrite"
    code, out, _ = run(image, *words)
    assert code == 0
    with open(tmp_path / "out" / "a_nuclei.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [name for name in every if name == kept]
    assert np.load(tmp_path / "out" / "a_instances.npy").max() == len(rows)
    row = summary(tmp_path / "out")[0]
    assert int(row["nuclei"]) == int(row[kept]) == len(rows)
    other = {"one": "two", "two": "one"}[kept]  # was not written, which is not 0
    assert other not in row and f"nuclei in 1 image: {kept} {len(rows)}\n" in out


def test_a_density_that_is_a_normalised_sum_gets_peaks_by_prominence(run, tmp_path):
    save_checkpoint(tmp_path / "sum.pt", tiny_model(reconstruct={"combine": "sum"}))
    code, out, _ = run(picture(tmp_path / "a.png"), "--checkpoint", tmp_path / "sum.pt")
    assert code == 0 and "peaks are found by prominence" in out.splitlines()[0]


def test_tile_and_halo_are_the_callers_or_the_files_or_the_defaults():
    model = nn.Identity()
    model.config = {}
    assert infer.sides_of(model) == (None, infer.HALO)
    model.config |= {"tile": 256, "halo": 32}
    assert infer.sides_of(model) == (256, 32)
    assert infer.sides_of(model, tile=64, halo=0) == (64, 0)
