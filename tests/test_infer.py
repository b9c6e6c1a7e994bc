"""Tests of tiling, of every file format, and of the command with good and bad input."""

import csv
import json
import shutil
import uuid
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import nn

import infer
from dualunet import DualUNet, load_model, save_checkpoint
from infer import predict, predict_tiles, read_window
from metrics import compare
from postprocess import contours, measure, reconstruct

NAMES, COLORS = ["plain", 'a "quoted", name', "ünïcode"], [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


class Lookup(nn.Module):
    """A network that answers with given maps: the image's colours say which pixel it looks at."""

    def __init__(self, type_map, density):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.maps = torch.from_numpy(type_map).long().ravel(), torch.from_numpy(density).ravel()
        self.config = {"num_classes": 3}
        index = np.arange(type_map.size).reshape(type_map.shape)
        self.image = np.stack((index >> 16, index >> 8 & 255, index & 255), 2).astype(np.uint8)
        self.eval()

    def forward(self, images):
        red, green, blue = (images * 255).round().long().unbind(1)
        index = red << 16 | green << 8 | blue
        certainty = (3 + index % 5)[..., None]
        logits = nn.functional.one_hot(self.maps[0][index], 4) * certainty
        return logits.permute(0, 3, 1, 2).float(), self.maps[1][index][:, None]


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


@pytest.fixture(scope="module")
def result():
    model = Lookup(*field(90, 130, 40))
    nuclei = predict(model, model.image)
    return infer.Result('it, "s" ü.png', model.image, nuclei, NAMES, COLORS, 0.5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = DualUNet(num_classes=2, encoder="resnet18", decoder_channels=(16, 16, 16, 16, 16))
    model.config |= {"class_names": ["one", "two"], "colors": COLORS[:2], "mpp": 0.25,
                     "licence": "CC0 (test)"}
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    save_checkpoint(path, model)
    return path


@pytest.fixture(scope="module")
def network(checkpoint):
    return infer.load_model(checkpoint)


# ---------------------------------------------------------------- tiles


@pytest.mark.parametrize("tile, halo, batch", [(64, 64, 4), (128, 96, 1), (160, 64, 3)])
def test_given_maps_are_reconstructed_the_same_on_every_grid(tile, halo, batch):
    type_map, density = field(210, 333, 250)
    model = Lookup(type_map, density)
    whole = reconstruct(type_map, density)
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
    tiles = list(predict_tiles(model, model.image, tile=64, halo=64))
    peaks = np.concatenate([nuclei.peaks + origin for origin, nuclei in tiles])
    owners = np.concatenate([[k] * len(nuclei.peaks) for k, (_, nuclei) in enumerate(tiles)])
    assert len(tiles) == 9 and len(set(map(tuple, peaks))) == len(peaks)
    for cell in set(map(tuple, peaks // 64)):
        assert len(set(owners[(peaks // 64 == cell).all(1)])) == 1
    for _, nuclei in tiles:
        assert nuclei.inst_map.max() == len(nuclei.areas)


def test_a_network_shows_the_grid_hardly(network):
    image = np.random.default_rng(0).integers(0, 256, (64, 120, 3), np.uint8)
    whole, tiled = (predict(network, image, tile=tile, batch=2, threshold=-9) for tile in (128, 64))
    assert len(whole.areas) > 20
    assert abs(len(whole.areas) - len(tiled.areas)) <= 1 + 0.02 * len(whole.areas)


@pytest.fixture(scope="module")
def shipped(root, tissue):
    """The shipped network, an image, and its nuclei in fp32 and one pass."""
    model, image = load_model(root / "weights" / "consep.pt"), tissue[0][:128]
    nuclei = predict(model, image, halo=32)
    assert len(nuclei.areas) > 15
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
    with (ProcessPoolExecutor(1, get_context("spawn")) if option == "workers"
          else nullcontext()) as pool:
        found = predict(model, image, pool=pool, **options)
    pair = compare(expected.inst_map, found.inst_map)
    same = 2 * (pair.iou > 0.5).sum() / (len(pair.true_area) + len(pair.pred_area))
    assert same >= (0.9 if option in ("bf16", "batch") else 0.999)  # of twenty nuclei
    if option == "workers":
        assert all(map(np.array_equal, found, predict(model, image, **options)))


def test_flips_are_the_mean_over_four_mirrorings(network):
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), np.uint8)
    _, probability, density = infer.predict_maps(network, image, flips=True)
    views = {axes: infer.predict_maps(network, np.flip(image, axes).copy())
             for axes in ((), (1,), (2,), (1, 2))}
    for got, k, shift in ((probability, 1, 1), (density, 2, 0)):
        expected = np.mean([np.flip(maps[k], [a + shift for a in axes])
                            for axes, maps in views.items()], axis=0)
        assert (np.allclose(got, expected, atol=1e-6)
                and not np.allclose(got, views[()][k], atol=1e-6))


def test_a_nucleus_between_two_classes_is_no_background():
    class InDoubt(nn.Linear):  # 0.4 background, 0.25 and 0.35 for two classes; then 0.6, 0.1, 0.3
        def forward(self, images):
            p = torch.tensor([[0.4, 0.25, 0.35], [0.6, 0.1, 0.3]]).log().T[None, :, None]
            return p, torch.zeros(1, 1, 1, 2)

    assert infer.predict_maps(
        InDoubt(1, 1), np.zeros((1, 1, 2, 3), np.uint8))[0].tolist() == [[[2, 0]]]


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


def test_nuclei_that_claim_taken_pixels_give_way():
    type_map = np.zeros((20, 40), np.uint8)
    type_map[5:15, 2:10] = type_map[5:15, 12:20] = type_map[5:15, 22:38] = 1
    density = np.zeros(type_map.shape, np.float32)
    density[10, 6] = density[10, 16] = density[10, 30] = 9
    nuclei, taken = reconstruct(type_map, density), np.zeros(type_map.shape, bool)
    assert infer.give_way(nuclei, taken) is nuclei
    taken[:, 5:11] = True  # most of the first
    taken[:, 25] = True  # splits the third into 3 and 12 columns
    found = infer.give_way(nuclei, taken)
    assert found.areas.tolist() == [80, 120] and found.peaks.tolist() == [[10, 16], [10, 30]]
    assert found.boxes[1].tolist() == [5, 26, 15, 38] and found.centroids[1].tolist() == [9.5, 31.5]
    assert np.isnan(found.probabilities).all() and found.classes.tolist() == [1, 1]
    again = measure(found.inst_map, type_map, peaks=found.peaks)
    assert np.array_equal(again.areas, found.areas) and not found.inst_map[taken].any()


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
    ]:
        with pytest.raises(kind, match=words):
            predict(model, image, **options)
    with pytest.raises(RuntimeError, match="model.eval()"):
        predict(model.train(), model.image)


# ---------------------------------------------------------------- writers


def test_geojson_is_what_qupath_opens(result, tmp_path):
    infer.write_geojson(tmp_path / "a", result)
    infer.write_geojson(tmp_path / "b", result)
    text = (tmp_path / "a").read_text(encoding="utf-8")
    assert text == (tmp_path / "b").read_text(encoding="utf-8")
    collection = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in GeoJSON"))
    assert collection["type"] == "FeatureCollection"
    assert len(collection["features"]) == len(result.nuclei.areas) > 20
    ids = {str(uuid.UUID(f["id"])) for f in collection["features"]}
    assert len(ids) == len(collection["features"])
    for row, feature in enumerate(collection["features"]):
        (ring,), kind = feature["geometry"]["coordinates"], result.nuclei.classes[row]
        assert feature["type"] == "Feature" and feature["geometry"]["type"] == "Polygon"
        assert ring[0] == ring[-1] and len(ring) >= 4
        x, y = np.array(ring).T
        assert abs(x[:-1] @ y[1:] - x[1:] @ y[:-1]) / 2 >= result.nuclei.areas[row]
        assert [y.min(), x.min(), y.max(), x.max()] == result.nuclei.boxes[row].tolist()
        assert feature["properties"] == {
            "objectType": "detection",
            "classification": {"name": NAMES[kind - 1], "color": list(COLORS[kind - 1])},
            "measurements": {
                "class_probability": round(float(result.nuclei.probabilities[row]), 4),
                "area_px": int(result.nuclei.areas[row]), "area_um2": result.nuclei.areas[row] / 4,
            },
        }


def test_csv_names_the_ids_of_the_label_map(result, tmp_path):
    infer.write_csv(tmp_path / "a.csv", result)
    infer.write_instances(tmp_path / "a.tif", result)
    label_map = Image.open(tmp_path / "a.tif")
    assert label_map.mode == "I" and label_map.tag_v2[258] == (32,)
    label_map = np.array(label_map)
    assert np.array_equal(label_map, result.nuclei.inst_map)
    text = (tmp_path / "a.csv").read_text(encoding="utf-8")
    assert text.startswith("id,x,y,class,class_probability,area_px,area_um2\n")
    rows = list(csv.DictReader(text.splitlines()))
    assert [int(row["id"]) for row in rows] == np.unique(label_map)[1:].tolist()
    for row in rows:
        y, x = np.nonzero(label_map == int(row["id"]))
        assert abs(float(row["x"]) - x.mean()) < 0.006 and abs(float(row["y"]) - y.mean()) < 0.006
        assert int(row["area_px"]) == len(x) and float(row["area_um2"]) == len(x) / 4
        assert row["class"] == NAMES[result.nuclei.classes[int(row["id"]) - 1] - 1]


def test_hovernet_json_holds_every_nucleus(result, tmp_path):
    infer.write_json(tmp_path / "a.json", result)
    written = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert written["mag"] == 20
    assert list(written["nuc"]) == [str(i + 1) for i in range(len(result.nuclei.areas))]
    first = written["nuc"]["1"]
    assert set(first) == {"bbox", "centroid", "contour", "type_prob", "type"}
    assert sum(first["bbox"], []) == result.nuclei.boxes[0].tolist()
    assert np.allclose(first["centroid"][::-1], result.nuclei.centroids[0], atol=0.006)
    assert first["contour"] == contours(result.nuclei.inst_map)[0][:-1, ::-1].tolist()
    assert first["type"] == result.nuclei.classes[0]


def test_overlay_draws_outlines_and_keeps_everything_else(result, tmp_path):
    infer.write_overlay(tmp_path / "a.png", result)
    picture, ids = np.array(Image.open(tmp_path / "a.png")), result.nuclei.inst_map
    height, width = ids.shape
    assert picture.shape[0] > height and picture.shape[1] >= width
    around = np.pad(ids, 1)
    beside = [np.roll(around, step, axis)[1:-1, 1:-1] for step in (1, -1) for axis in (0, 1)]
    edge = (ids > 0) & np.any([ids != other for other in beside], axis=0)
    expected = result.image.copy()
    expected[edge] = np.array(COLORS)[result.nuclei.classes[ids[edge] - 1] - 1]
    assert np.array_equal(picture[:height, :width], expected)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 7, 3), (5, 2, 3), (130, 257, 3)])
def test_pillow_reads_our_png(tmp_path, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    infer.write_png(tmp_path / "a.png", image)
    with Image.open(tmp_path / "a.png") as file:
        assert file.mode == "RGB" and np.array_equal(np.array(file), image)
    with Image.open(tmp_path / "a.png") as file:
        file.verify()  # the checks of every chunk


@pytest.mark.parametrize("count", [0, 1])
def test_no_nuclei_and_no_resolution_are_written_too(tmp_path, count):
    model = Lookup(*(maps * count for maps in field(9, 7, 1)))
    found = infer.Result("a.png", model.image, predict(model, model.image), NAMES, COLORS, None)
    infer.write_outputs(tmp_path, "a", found, list(infer.FORMATS))
    assert len(list(tmp_path.iterdir())) == len(infer.FORMATS)
    features = json.loads((tmp_path / "a_nuclei.geojson").read_text())["features"]
    rows = (tmp_path / "a_nuclei.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert len(features) == len(rows) == count == found.nuclei.inst_map.max()
    assert "area_um2" not in str(features) and all(row.endswith(",") for row in rows)
    assert json.loads((tmp_path / "a_nuclei.json").read_text())["mag"] is None


def test_unknown_probabilities_are_left_out(result, tmp_path):
    nuclei = result.nuclei._replace(
        probabilities=np.full(len(result.nuclei.areas), np.nan, np.float32))
    found = infer.Result("a.png", result.image, nuclei, NAMES, COLORS, 0.5)
    infer.write_outputs(tmp_path, "a", found, ["geojson", "csv", "json"])
    for suffix in ("geojson", "json"):
        text = (tmp_path / f"a_nuclei.{suffix}").read_text(encoding="utf-8")
        json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))
    assert "class_probability" not in (tmp_path / "a_nuclei.geojson").read_text(encoding="utf-8")
    rows = csv.DictReader((tmp_path / "a_nuclei.csv").read_text(encoding="utf-8").splitlines())
    assert {row["class_probability"] for row in rows} == {""}


def test_a_writer_that_fails_leaves_the_old_files_alone(result, tmp_path, monkeypatch):
    infer.write_outputs(tmp_path, "a", result, ["csv", "tif"])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(path, result):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(infer.FORMATS, "tif", ("_instances.tif", fail))
    with pytest.raises(OSError, match="No space"):
        infer.write_outputs(tmp_path, "a", result, ["overlay", "csv", "tif"])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---------------------------------------------------------------- command line


@pytest.fixture
def run(checkpoint, tmp_path, capsys):
    """Runs the command in a folder of its own; returns exit code, stdout and stderr."""
    def command(*words):
        words = [*words, "--checkpoint", checkpoint] if "--checkpoint" not in words else words
        words = [*words, "--out", tmp_path / "out", "--device", "cpu", "--halo", "32"]
        return infer.main([*map(str, words)]), *capsys.readouterr()
    return command


def outputs(folder):
    return sorted(p.name for p in folder.iterdir() if p.name != "run.jsonl")


def picture(path, height=40, width=50):
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_command_writes_every_format_and_closes_with_a_summary(run, tmp_path):
    code, out, err = run(picture(tmp_path / "a.png"), "--formats", *infer.FORMATS, "--mpp", "0.26")
    assert code == 0 and err == ""
    assert outputs(tmp_path / "out") == sorted(f"a{suffix}" for suffix, _ in infer.FORMATS.values())
    assert out.count("\n") == 1
    for words in ("nuclei (one ", "1 of 1 images", "megapixels", " s;", "CC0 (test)"):
        assert words in out


def test_one_bad_image_does_not_stop_a_folder(run, tmp_path):
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_text("no image")
    picture(tmp_path / "in" / "c.jpg", 1, 1)
    code, out, err = run(tmp_path / "in", "--formats", "csv")
    assert code == 1 and "2 of 3 images, 1 failed" in out
    assert err.startswith(f"error: {tmp_path / 'in' / 'b.png'}: ") and err.count("\n") == 1
    assert outputs(tmp_path / "out") == ["a_nuclei.csv", "c_nuclei.csv"]


def test_images_of_one_stem_keep_apart(run, tmp_path):
    picture(tmp_path / "in" / "a.png"), picture(tmp_path / "in" / "a.jpg")
    assert run(tmp_path / "in", "--formats", "csv")[0] == 0
    assert outputs(tmp_path / "out") == ["a.jpg_nuclei.csv", "a.png_nuclei.csv"]
    code, _, err = run(tmp_path / "in" / "a.png", picture(tmp_path / "other" / "A.png"))
    assert code == 2 and "would overwrite the outputs of" in err


def test_calls_that_make_no_sense_end_with_one_sentence(run, tmp_path):
    image = picture(tmp_path / "in" / "a.png")
    (tmp_path / "empty").mkdir(), (tmp_path / "fake.pt").write_text("no weights")
    for words, sentence in [
        ([tmp_path / "none.png"], "none.png: no such file or folder"),
        ([tmp_path / "empty"], "empty: no image inside; expected .png"),
        ([image, "--tile", 100], "tile is 100 and halo 32; expected multiples of 32"),
        ([image, "--batch", 0], "batch is 0"),
        ([image, "--mpp", "nan"], "--mpp is nan"),
        ([image, "--checkpoint", tmp_path / "none.pt"], "none.pt: no such checkpoint"),
        ([image, "--checkpoint", tmp_path / "fake.pt"], "fake.pt: "),
    ]:
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


def test_a_killed_run_goes_on_and_another_is_refused(run, tmp_path, monkeypatch):
    for name in "abc":
        picture(tmp_path / "in" / f"{name}.png")
    write, calls = infer.write_outputs, []

    def power_cut(*words):
        calls.append(words[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*words)

    monkeypatch.setattr(infer, "write_outputs", power_cut)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "in", "--formats", "csv")
    assert outputs(tmp_path / "out") == ["a_nuclei.csv"]
    code, out, _ = run(tmp_path / "in", "--formats", "csv")
    assert (code == 0 and calls == ["a", "b", "b", "c"]
            and "in 2 of 3 images, 0 failed, 1 done before" in out)

    code, _, err = run(tmp_path / "in", "--formats", "csv", "--tile", "64")
    assert code == 2 and "holds outputs of another tile" in err and "--overwrite" in err
    other = picture(tmp_path / "other" / "a.png")
    code, _, err = run(other, "--formats", "csv")
    assert code == 1 and "choose another --out, or replace it with --overwrite" in err
    assert run(other, "--formats", "csv", "--tile", "64", "--overwrite")[0] == 0


def test_classes_can_be_named_and_checkpoints_exported(run, checkpoint, tmp_path):
    image = picture(tmp_path / "a.png")
    code, _, err = run(image, "--classes", "x")
    assert code == 2 and f"--classes has 1 names; {checkpoint} has" in err
    names = [f"kind{k}" for k in range(load_model(checkpoint).config["num_classes"])]
    code, out, _ = run("--export", tmp_path / "half.pt", "--classes", ",".join(names))
    assert code == 0 and "kind0" in out
    assert load_model(tmp_path / "half.pt").config["class_names"] == names
    assert (tmp_path / "half.pt").stat().st_size < 0.6 * Path(checkpoint).stat().st_size
    code, _, err = run()
    assert code == 2 and "no image named" in err


def test_a_density_that_is_a_normalised_sum_gets_peaks_by_prominence(run, checkpoint, tmp_path):
    model = load_model(checkpoint)
    torch.save({"model": model.state_dict()}, tmp_path / "theirs.pth")  # as the authors ship it
    code, out, _ = run(picture(tmp_path / "a.png"), "--checkpoint", tmp_path / "theirs.pth")
    assert code == 0 and "peaks are found by prominence, h = 0.15" in out
