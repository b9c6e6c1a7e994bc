"""Damaged files end in one sentence, degenerate images in a result, and one image in one answer."""

import csv
import io
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
from postprocess import reconstruct
from test_infer import Lookup, field

sys.path.insert(0, str(ROOT / "benchmarks"))
from robustness import Fuzz


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = DualUNet(num_classes=2, encoder="resnet18", decoder_channels=(8,) * 5)
    for head in (model.segmentation_head, model.count_head):
        torch.nn.init.normal_(head[0].weight, std=0.1)
    torch.nn.init.constant_(model.count_head[0].bias, 0.2)
    tissue = torch.from_numpy(np.stack([synthetic_tissue(seed, 128)[0] for seed in range(4)]))
    with torch.no_grad():  # the norms' statistics, without which maps are flat
        for _ in range(20):
            model(tissue.permute(0, 3, 1, 2) / 255)
    model.eval()
    model.config |= {"class_names": ["one", "two"], "colors": [(255, 0, 0), (0, 255, 0)],
                     "mpp": 0.25}
    return model


@pytest.fixture(scope="module")
def checkpoint(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    save_checkpoint(path, network)
    return path


def test_damaged_files_end_in_a_result_or_one_sentence(tmp_path):
    fuzz = Fuzz(tmp_path, seed=1)
    outcomes = [(n, *fuzz.case(n)) for n in range(150)]
    assert [case for case in outcomes if case[-1] not in ("result", "refused")] == []
    assert {"result", "refused"} == {outcome for *_, outcome in outcomes}


NOISE = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)


@pytest.mark.parametrize("image", [
    np.full((70, 90, 3), 255, np.uint8), np.zeros((70, 90, 3), np.uint8), NOISE, NOISE[:1, :1],
    NOISE[:1, :2], np.broadcast_to(np.uint8([200, 120, 180]), (70, 90, 3)),
    np.resize(NOISE, (1, 5000, 3)), np.resize(NOISE, (5000, 1, 3)),
], ids="white black noise pixel pair colour row column".split())
def test_degenerate_images_are_images(network, image):
    nuclei = predict(network, image, tile=64, halo=32, batch=8)
    assert nuclei.inst_map.shape == image.shape[:2] and nuclei.inst_map.dtype == np.int32
    assert np.array_equal(np.unique(nuclei.inst_map[nuclei.inst_map > 0]),
                          np.arange(1, len(nuclei.areas) + 1))
    assert np.array_equal(np.bincount(nuclei.inst_map.ravel())[1:], nuclei.areas)


@pytest.mark.parametrize("radius", [31, 32, 45, 70, 110])
def test_a_nucleus_larger_than_tile_and_halo_is_found_once(radius):
    y, x = np.ogrid[:256, :256]
    distance = np.hypot(y - 120, x - 130)
    model = Lookup((distance < radius).astype(np.uint8),
                   np.exp(-(distance / radius) ** 2).astype(np.float32))
    nuclei = predict(model, model.image, tile=64, halo=32)
    assert nuclei.peaks.tolist() == [[120, 130]]
    core = 32 + min(120 - 64, 130 - 128, 128 - 120, 192 - 130)  # its tile saw so far at least
    assert ((nuclei.inst_map[distance < min(radius, core)] == 1).all()
            and not nuclei.inst_map[distance >= radius].any())
    assert np.array_equal(predict(model, model.image).inst_map > 0, distance < radius)


def test_one_nucleus_may_fill_the_image():
    y, x = np.ogrid[:64, :64]
    model = Lookup(np.ones((64, 64), np.uint8),
                   np.exp(-np.hypot(y - 20, x - 40) / 50).astype(np.float32))
    nuclei = predict(model, model.image, tile=64, halo=32)
    assert nuclei.peaks.tolist() == [[20, 40]] and (nuclei.inst_map == 1).all()


def test_a_line_of_100_000_pixels_has_the_nuclei_of_its_maps():
    maps = field(1, 100_000, 400)
    model, whole = Lookup(*maps), reconstruct(*maps)
    nuclei = predict(model, model.image, tile=4096, halo=32)
    assert len(whole.areas) > 200 and np.array_equal(nuclei.inst_map, whole.inst_map)


def test_batch_and_tile_size_leave_the_nuclei_alone(network):
    image = synthetic_tissue(5, (200, 330))[0]
    one = predict(network, image, tile=128, halo=128)
    assert len(one.areas) > 30
    for tile, batch, wanted in ((128, 4, 0.999), (512, 1, 0.95)):  # trained: 0.99 (design page)
        other = predict(network, image, tile=tile, halo=128, batch=batch)
        matched = np.count_nonzero(compare(one.inst_map, other.inst_map).iou > 0.5)
        assert 2 * matched >= wanted * (len(one.areas) + len(other.areas))
    assert all(map(np.array_equal, other, predict(network, image, tile=512, halo=128)))  # exactly


NAMES = ['a "quoted", name.png', "two\nlines.png", "ünï 細胞.png", "=1+1'; --.png"]


def test_awkward_names_and_repeated_runs_give_the_same_valid_files(checkpoint, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for seed, name in enumerate(NAMES):
        Image.fromarray(synthetic_tissue(seed, (60, 80))[0]).save(tmp_path / "in" / name)
    for out in ("a", "b"):
        words = [tmp_path / "in", "--checkpoint", checkpoint, "--out", tmp_path / out,
                 "--device", "cpu", "--precision", "fp32", "--halo", 32,
                 "--classes", 'o"n;e\n,zwölf', "--formats", *infer.FORMATS]
        assert infer.main([*map(str, words)]) == 0, capsys.readouterr().err
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert len(files) == len(infer.FORMATS) * len(NAMES) + 1
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes()
               for f in files)
    ids, classes = [], set()
    for name in NAMES:
        read = {
            suffix: (tmp_path / "a" / f"{name[:-4]}_nuclei.{suffix}").read_bytes().decode("utf-8")
            for suffix in ("csv", "geojson", "json")}
        rows, features = (list(csv.DictReader(io.StringIO(read["csv"]))),
                          json.loads(read["geojson"])["features"])
        assert [r["class"] for r in rows] == [
            f["properties"]["classification"]["name"] for f in features]
        assert len(json.loads(read["json"])["nuc"]) == len(rows)
        ids, classes = ids + [f["id"] for f in features], classes | {r["class"] for r in rows}
    assert len(ids) == len(set(ids)) > 50 and classes == {'o"n;e\n', "zwölf"}
