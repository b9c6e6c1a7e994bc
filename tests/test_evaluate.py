"""evaluate.py: tables, files and pictures of a checkpoint or a folder; calibration."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import write_tiles
from PIL import Image
from torch import nn

import evaluate as script
from data import CONSEP_CLASSES, Source, open_source, synthetic_tissue
from dualunet import DualUNet, class_colors, save_checkpoint
from evaluate import (OFFSETS, calibrate, draw_images, figures_of, finder, main, middle,
                      score_source, scored_classes, spread, without_nan)
from outputs import Result, write_outputs
from postprocess import measure


def nuclei_of(inst_map, type_map):
    """A truth as if it had been predicted."""
    peaks = np.zeros((inst_map.max(), 2), np.int64)
    return measure(inst_map, type_map, peaks=peaks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain folder of four 96² tiles of synthetic tissue."""
    return write_tiles(tmp_path_factory.mktemp("data") / "tiles", range(30, 34))


@pytest.fixture(scope="module")
def predictions(folder, tmp_path_factory):
    """The truth of `folder` in the files that infer.py writes."""
    out = tmp_path_factory.mktemp("predictions")
    source = open_source(folder)
    colors = class_colors(CONSEP_CLASSES)
    for i, name in enumerate(source.names):
        image, inst_map, type_map = source.read(i)
        nuclei = nuclei_of(inst_map, type_map)
        result = Result(f"{name}.png", image, nuclei, list(CONSEP_CLASSES), colors, 0.25)
        write_outputs(out, name, result, ["csv", "tif"])
    return out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network that has learned nothing, and the split it claims to be trained with."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    model = DualUNet(num_classes=4, encoder="efficientnet_lite0", decoder_channels=[8] * 5)
    model.config |= {"class_names": list(CONSEP_CLASSES), "colors": class_colors(CONSEP_CLASSES),
                     "mpp": 0.25, "licence": None, "sigma": 5.0, "reconstruct": {}}
    save_checkpoint(path, model, split={"train": ["t0", "t1"], "val": ["t2"]})
    return path


def read_strictly(path):
    """A JSON file; nan and infinity are no JSON."""
    def refuse(name):
        raise ValueError(name)

    return json.loads(path.read_text(), parse_constant=refuse)


def fails(capsys, *arguments):
    """The sentence in which a call ends."""
    assert main([str(argument) for argument in arguments]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


# ---------------------------------------------------------------- the command


def test_truth_written_as_predictions_scores_one(folder, predictions, tmp_path, capsys):
    out = tmp_path / "scores"
    assert main([str(predictions), "--data", str(folder), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    summary = read_strictly(out / "evaluation.json")
    assert summary["names"] == ["t0", "t1", "t2", "t3"] and len(summary["per_image"]) == 4
    for part, figure in (("detection", "f1"), ("detection_capped", "f1"), ("image_mean", "pq"),
                         ("image_mean", "aji"), ("classification", "mean"), ("pannuke", "mpq")):
        assert summary[part][figure] == 1
    assert summary["area_ratio"] == 1 and summary["class_f1_interval"] == [1, 1]
    for name in (*CONSEP_CLASSES, "all nuclei", "mean"):
        assert f"\n{name} " in printed
    assert "95 % of bootstraps over images: 1.000 to 1.000" in printed
    assert "area: predicted over true pixels" in printed

    worst = sorted(path.name for path in out.glob("worst_*.png"))
    assert len(worst) == 3 and f"PQ 1.000, input, truth, prediction: {out / worst[0]}" in printed
    with Image.open(out / worst[0]) as picture:
        assert picture.width > 3 * 2 * 96 and picture.height > 2 * 96


def test_a_checkpoint_is_scored_on_its_own_validation_images(
        checkpoint, folder, tmp_path, capsys):
    call = [str(checkpoint), "--data", str(folder), "--precision", "fp32", "--device", "cpu",
            "--worst", "0", "--out"]
    assert main([*call, str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert read_strictly(tmp_path / "a" / "evaluation.json")["names"] == ["t2"]
    assert "on 1 images of" in printed and "was trained on" not in printed
    assert "mean f1: no interval, which needs three images or more" in printed
    assert main([*call, str(tmp_path / "b"), "--all"]) == 0
    printed = capsys.readouterr().out
    assert f"warning: {checkpoint} was trained on 2 of these images, t0 for one" in printed
    assert len(read_strictly(tmp_path / "b" / "evaluation.json")["names"]) == 4
    assert main([*call, str(tmp_path / "c"), "--val", "t0", "t3"]) == 0
    assert read_strictly(tmp_path / "c" / "evaluation.json")["names"] == ["t0", "t3"]
    assert "trained on 1 of these images, t0" in capsys.readouterr().out
    assert not list(tmp_path.glob("*/worst*"))


def test_wrong_calls_end_in_a_sentence(checkpoint, folder, predictions, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(checkpoint)])
    assert "the following arguments are required: --data" in capsys.readouterr().err
    assert "nowhere.pt: no such checkpoint" in fails(capsys, "nowhere.pt", "--data", folder)
    assert "nowhere: no such folder" in fails(capsys, checkpoint, "--data", "nowhere")
    assert f"--val stranger: no image of that name in {folder}" in fails(
        capsys, checkpoint, "--data", folder, "--val", "stranger")
    assert "--data-mpp: 72 µm per pixel is implausible" in fails(
        capsys, checkpoint, "--data", folder, "--data-mpp", "72")
    assert "tile is 50 and halo 128; expected multiples of 32" in fails(
        capsys, checkpoint, "--data", folder, "--tile", "50")
    assert f"none of the validation images of {checkpoint} is here; --all scores every image" in (
        fails(capsys, checkpoint, "--data", "synthetic"))
    (tmp_path / "empty").mkdir()
    assert "t0_instances.tif: no such" in fails(
        capsys, tmp_path / "empty", "--data", folder)
    assert not (tmp_path / "evaluation").exists()


def test_class_names_that_differ_are_named(checkpoint, folder, tmp_path, capsys):
    other = Source(["t"], ["tumour", "stroma"], lambda i: synthetic_tissue(1, 32))
    with pytest.raises(ValueError, match="class 'tumour' is not among miscellaneous, .*; name "
                       "them alike"):
        score_source(other, [0], list(CONSEP_CLASSES), None)


def test_an_interrupt_ends_in_one_sentence(folder, predictions, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "score_source", interrupt)
    assert main([str(predictions), "--data", str(folder)]) == 130
    error = capsys.readouterr().err
    assert error.endswith("\ninterrupted; nothing was written\n")


def test_notes_of_a_set_are_said(folder, predictions, tmp_path, capsys):
    note = folder / "labels" / "note.txt"
    note.write_text("hello")
    try:
        assert main([str(predictions), "--data", str(folder), "--out", str(tmp_path),
                     "--worst", "0"]) == 0
    finally:
        note.unlink()
    assert f"warning: {folder}" in capsys.readouterr().err


# ---------------------------------------------------------------- scores


def test_nuclei_of_unknown_class_count_as_nuclei_alone():
    image, inst_map, type_map = synthetic_tissue(30, 96)
    partial = type_map.copy()
    partial[np.isin(inst_map, [1, 2, 3])] = 255
    source = Source(["t"], CONSEP_CLASSES, lambda i: (image, inst_map, partial))
    found = nuclei_of(inst_map, type_map)
    classes = found.classes.copy()
    classes[:3] = classes[:3] % 4 + 1  # wrong, but nobody knows

    def find(i, image):
        return found.inst_map, classes

    figures = figures_of(source, [0], list(CONSEP_CLASSES), find)
    assert figures == {"detection_f1": 1, "class_f1": 1, "dice": 1, "pq": 1}
    classes[3] = classes[3] % 4 + 1
    assert figures_of(source, [0], list(CONSEP_CLASSES), find)["class_f1"] < 1


def test_where_one_side_says_only_nucleus_both_do():
    image, inst_map, type_map = synthetic_tissue(30, 96)
    typed = Source(["t"], CONSEP_CLASSES, lambda i: (image, inst_map, type_map))
    plain = Source(["t"], ["nucleus"], lambda i: (image, inst_map, np.minimum(type_map, 1)))
    assert scored_classes(typed, CONSEP_CLASSES) == list(CONSEP_CLASSES)
    assert scored_classes(plain, CONSEP_CLASSES) == ["nucleus"]
    assert scored_classes(typed, ["nucleus"]) == ["nucleus"]
    found = nuclei_of(inst_map, type_map)

    def find(i, image):
        return found.inst_map, found.classes

    for source, names in ((plain, list(CONSEP_CLASSES)), (typed, ["nucleus"])):
        figures = figures_of(source, [0], names, find)
        assert figures["pq"] == figures["detection_f1"] == 1 and math.isnan(figures["class_f1"])


def test_the_radius_follows_the_resolution():
    image, inst_map, type_map = synthetic_tissue(30, 96)
    found = nuclei_of(inst_map, type_map)
    for mpp, radius in ((0.25, 12), (0.5, 6)):
        source = Source(["t"], CONSEP_CLASSES, lambda i: (image, inst_map, type_map), None, mpp)
        scores = score_source(source, [0], list(CONSEP_CLASSES),
                              lambda i, image: (found.inst_map, found.classes))
        assert scores[0]["radius"] == radius


def test_predictions_know_the_resolution_of_the_set(monkeypatch):
    calls = []

    def predict(model, image, **options):
        calls.append(options)
        return nuclei_of(*synthetic_tissue(30, 96)[1:])

    monkeypatch.setattr(script, "predict", predict)
    find = finder("model", Source(["t"], CONSEP_CLASSES, None, None, 0.5), flips=True)
    inst_map, classes = find(0, "image")
    assert calls == [{"mpp": 0.5, "flips": True}] and len(classes) == inst_map.max()


def test_small_helpers():
    assert spread([1, 2, 3, 4, 5, 6, 7], 3) == [1, 4, 7] and spread([1, 2], 16) == [1, 2]
    assert without_nan({"a": [math.nan, 1.0], "b": (math.inf, "x"), "c": None}) == {
        "a": [None, 1.0], "b": [None, "x"], "c": None}
    assert middle((10, 7), 4) == (slice(3, 7), slice(1, 5))
    assert middle((3, 7), 4) == (slice(0, 4), slice(1, 5))


# ---------------------------------------------------------------- calibration


class Narrow(nn.Module):
    """Stands for a network whose nuclei grow as its background's logit falls."""

    def __init__(self):
        super().__init__()
        self.segmentation_head = nn.Conv2d(1, 3, 1)

    def fuse(self, dtype=None):
        copied = Narrow()
        copied.load_state_dict(self.state_dict())
        return copied.requires_grad_(False)


def disc(radius):
    rows, columns = np.indices((64, 64))
    return ((rows - 32) ** 2 + (columns - 32) ** 2 <= radius**2).astype(np.int32)


def test_calibration_lowers_the_bias_to_where_outlines_are_best(monkeypatch):
    model = Narrow()
    before = model.segmentation_head.bias.detach().clone()

    def predict(network, image, **options):
        lowered = float(before[0] - network.segmentation_head.bias[0])
        inst_map = disc(round(12 + 5 * lowered, 3))
        return nuclei_of(inst_map, inst_map.astype(np.uint8))

    monkeypatch.setattr(script, "predict", predict)

    def source_of(radius):
        truth = disc(radius)
        return Source(["t"], ["nucleus"], lambda i: (None, truth, truth.astype(np.uint8)))

    def lowered():
        return (before - model.segmentation_head.bias.detach()).tolist()

    quality = calibrate(model, [(source_of(14), [0])], 4)
    assert tuple(quality) == OFFSETS and max(quality, key=quality.get) == 0.4
    assert quality[0.4] == 1 and lowered() == pytest.approx([0.4, 0, 0], abs=1e-6)
    model.load_state_dict(model.state_dict() | {"segmentation_head.bias": before})
    sets = [(source_of(12), [0]), (source_of(13), [0]), (source_of(13), [0])]
    calibrate(model, sets, 4)  # the mean counts
    assert lowered()[0] == pytest.approx(0.2, abs=1e-6)
    model.load_state_dict(model.state_dict() | {"segmentation_head.bias": before})
    calibrate(model, [(source_of(8), [0])], 4)  # already too wide
    assert lowered()[0] == 0


# ---------------------------------------------------------------- pictures


def test_pictures_show_the_middle_of_images(tmp_path, monkeypatch):
    tiles = [synthetic_tissue(i, (80, 200)) for i in range(3)]
    source = Source(["t0", "t1", "t2"], CONSEP_CLASSES, tiles.__getitem__)
    nuclei = nuclei_of(*tiles[0][1:])
    drawn = []
    panel = script.titled_panel

    def spy(*arguments):
        drawn.append(arguments)
        return panel(*arguments)

    monkeypatch.setattr(script, "titled_panel", spy)
    path, colors = tmp_path / "p.png", class_colors(CONSEP_CLASSES)

    def find(i, image):
        return nuclei.inst_map, nuclei.classes

    draw_images(source, [1, 2], find, list(CONSEP_CLASSES), colors, path, side=100)
    (rows, titles, _, _, unknown), = drawn
    assert titles == [["t1", "truth", "prediction"], ["t2", "truth", "prediction"]]
    assert not unknown
    assert {picture.shape for row in rows for picture in row} == {(160, 200, 3)}
    large = Image.fromarray(tiles[1][0][:, 50:150]).resize((200, 160))
    assert np.array_equal(rows[0][0], np.asarray(large))
    with Image.open(path) as picture:
        assert picture.mode == "RGB"

    # a class that is not known is in the legend
    tiles[1][2][tiles[1][1] == 1] = 255
    draw_images(source, [1], find, list(CONSEP_CLASSES), colors, path)
    assert drawn[1][4] and drawn[1][0][0][0].shape == (160, 400, 3)

    # where all are nuclei, so are those of a network that knows more
    plain = Source(["t0"], ["nucleus"], lambda i: (*tiles[0][:2], np.minimum(tiles[0][2], 1)))
    draw_images(plain, [0], find, ["nucleus"], [(1, 2, 3)], path)
    truth, prediction = drawn[2][0][0][1:]
    assert np.array_equal(truth, prediction)
