"""Damaged files end in one sentence, degenerate images in a result, and one image in one answer."""

import csv
import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import infer
from data import synthetic_tissue
from dualunet import DualUNet, save_checkpoint
from infer import predict
from metrics import compare
from outputs import FORMATS
from test_infer import Lookup, field

sys.path.insert(0, str(ROOT / "benchmarks"))
import robustness


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = DualUNet(num_classes=2, encoder="resnet18", decoder_channels=(8,) * 5)
    for head in (model.segmentation_head, model.density_head):
        torch.nn.init.normal_(head.weight, std=0.1)
    torch.nn.init.constant_(model.density_head.bias, 0.2)
    tissue = np.stack([synthetic_tissue(seed, 128)[0] for seed in range(4)])
    images = torch.from_numpy(tissue).permute(0, 3, 1, 2) / 255
    with torch.no_grad():  # the norms' statistics, without which maps are flat
        for _ in range(20):
            model(images)
    model.config |= {"class_names": ["one", "two"], "colors": [(255, 0, 0), (0, 255, 0)],
                     "mpp": 0.25}
    return model.eval()


def test_damaged_files_end_in_a_result_or_one_sentence(tmp_path):
    fuzz = robustness.Fuzz(tmp_path, seed=1)
    outcomes = [(n, *fuzz.case(n)) for n in range(120)]
    assert [case for case in outcomes if case[-1] not in ("result", "refused")] == []
    assert {kind for _, kind, _ in outcomes} == {"image", "label", "checkpoint", "output"}
    assert {outcome for *_, outcome in outcomes} == {"result", "refused"}


def test_a_reader_that_fails_otherwise_is_caught(tmp_path):
    def raises(error):
        raise error

    def judge(error):
        return robustness.judge(lambda: raises(error), tmp_path)

    assert judge(ValueError(f"{tmp_path}/a.png: damaged")) == "refused"
    assert judge(ValueError("damaged")) == "not one sentence that names the file: damaged"
    assert judge(KeyError("x")).startswith("KeyError: 'x', ")
    assert judge(UserWarning("odd")).startswith("UserWarning: odd")
    assert robustness.judge(lambda: None, tmp_path) == "result"


NOISE = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)


@pytest.mark.parametrize("image", [
    np.full((70, 90, 3), 255, np.uint8), np.zeros((70, 90, 3), np.uint8), NOISE, NOISE[:1, :1],
    NOISE[:1, :2], np.broadcast_to(np.uint8([200, 120, 180]), (70, 90, 3)),
    np.resize(NOISE, (1, 3000, 3)), np.resize(NOISE, (3000, 1, 3)),
], ids="white black noise pixel pair colour row column".split())
def test_degenerate_images_are_images(network, image):
    nuclei = predict(network, image, tile=64, halo=32, batch=8)
    assert nuclei.inst_map.shape == image.shape[:2] and nuclei.inst_map.dtype == np.int32
    areas = np.bincount(nuclei.inst_map.ravel(), minlength=1)[1:]
    assert np.array_equal(areas, nuclei.areas) and (areas > 0).all()


@pytest.mark.parametrize("radius", [31, 32, 45, 70, 110])
def test_a_nucleus_larger_than_tile_and_halo_is_found_once(radius):
    y, x = np.ogrid[:256, :256]
    distance = np.hypot(y - 120, x - 130)
    density = np.exp(-(distance / radius) ** 2).astype(np.float32)
    model = Lookup((distance < radius).astype(np.uint8), density)
    nuclei = predict(model, model.image, tile=64, halo=32)
    assert nuclei.peaks.tolist() == [[120, 130]]
    seen = 32 + min(120 - 64, 130 - 128, 128 - 120, 192 - 130)  # its tile saw so far at least
    assert (nuclei.inst_map[distance < min(radius, seen)] == 1).all()
    assert not nuclei.inst_map[distance >= radius].any()
    whole = predict(model, model.image, tile=256)
    assert np.array_equal(whole.inst_map > 0, distance < radius)


def test_one_nucleus_may_fill_the_image():
    y, x = np.ogrid[:64, :64]
    density = np.exp(-np.hypot(y - 20, x - 40) / 50).astype(np.float32)
    model = Lookup(np.ones((64, 64), np.uint8), density)
    nuclei = predict(model, model.image, tile=64, halo=32)
    assert nuclei.peaks.tolist() == [[20, 40]] and (nuclei.inst_map == 1).all()


def test_a_line_of_100_000_pixels_has_the_nuclei_of_its_maps():
    model = Lookup(*field(1, 100_000, 400))
    whole = model.whole()
    nuclei = predict(model, model.image, tile=4096, halo=32)
    assert len(whole.areas) > 200 and np.array_equal(nuclei.inst_map, whole.inst_map)


def test_batch_and_tile_size_leave_the_nuclei_alone(network):
    image = synthetic_tissue(5, (200, 330))[0]
    one = predict(network, image, tile=128, halo=128)
    assert len(one.areas) > 30
    for tile, batch, wanted in ((128, 4, 0.999), (512, 1, 0.95)):  # a trained network: 0.99
        other = predict(network, image, tile=tile, halo=128, batch=batch)
        matched = np.count_nonzero(compare(one.inst_map, other.inst_map).iou > 0.5)
        assert 2 * matched >= wanted * (len(one.areas) + len(other.areas))
    again = predict(network, image, tile=512, halo=128)
    assert all(np.array_equal(*both) for both in zip(other, again))  # exactly


NAMES = ['a "quoted", name.png', "two\nlines.png", "ünï 細胞.png", "=1+1'; --.png"]


def test_awkward_names_and_repeated_runs_give_the_same_valid_files(network, tmp_path, capsys):
    # Two runs on a folder of awkward names.
    save_checkpoint(tmp_path / "tiny.pt", network)
    folder = tmp_path / "in"
    folder.mkdir()
    for seed, name in enumerate(NAMES):
        Image.fromarray(synthetic_tissue(seed + 1, (60, 80))[0]).save(folder / name)
    for out in ("a", "b"):
        words = [folder, "--checkpoint", tmp_path / "tiny.pt", "--out", tmp_path / out,
                 "--device", "cpu", "--precision", "fp32", "--halo", 32,
                 "--classes", 'o"n\n;e,zwölf', "--formats", *FORMATS]
        assert infer.main([*map(str, words)]) == 0, capsys.readouterr().err

    # They wrote the same, but for times.
    files = {path.name for path in (tmp_path / "a").iterdir()} - {"run.jsonl", "summary.csv"}
    assert len(files) == len(FORMATS) * len(NAMES)
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    # And the files agree with each other.
    ids, classes = [], set()
    for name in NAMES:
        stem = str(tmp_path / "a" / name[:-4])
        with open(f"{stem}_nuclei.csv", encoding="utf-8", newline="") as file:
            rows = [row["class"] for row in csv.DictReader(file)]
        with open(f"{stem}_nuclei.geojson", encoding="utf-8") as file:
            features = json.load(file)["features"]
        with open(f"{stem}_nuclei.json", encoding="utf-8") as file:
            assert len(json.load(file)["nuc"]) == len(rows)
        assert rows == [f["properties"]["classification"]["name"] for f in features]
        ids += [feature["id"] for feature in features]
        classes.update(rows)
    assert len(ids) == len(set(ids)) > 50 and classes == {'o"n\n;e', "zwölf"}
