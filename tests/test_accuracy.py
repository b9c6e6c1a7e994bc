"""benchmarks/accuracy.py: its commands on a tiny set, each with table and JSON; the shifts."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, write_tiles

sys.path.insert(0, str(ROOT / "benchmarks"))
import accuracy
import peers
import train

TINY = ("--val t1 --init {root}/weights/consep.pt --rate 1e-6 --average 0.5 --class-weights none "
        "--epochs 1 --steps 2 --batch 2 --crop 64 --val-images 0 --workers 0 "
        "--precision fp32 --data {folder}")


@pytest.fixture
def folder(tmp_path):
    """A plain folder of two 96² tiles of synthetic tissue."""
    return write_tiles(tmp_path / "tiles", (33, 34))


@pytest.fixture
def run(folder, tmp_path, monkeypatch, capfd):
    """Runs a command; returns its JSON, what it printed, and which runs it trained."""
    trainings = []

    def train_here(command, **_):  # without another start of python, for speed
        trainings.append(command[command.index("--out") + 1].split("/")[-1])
        return subprocess.CompletedProcess(command, train.main(command[2:]))

    def run(command, *words, code=0):
        trainings.clear()
        words = [command, "--data", folder, "--out", tmp_path / "runs", "--device", "cpu", *words]
        assert accuracy.main([*map(str, words)]) == code, capfd.readouterr().err
        printed = capfd.readouterr()
        if code:
            return printed.err
        results = json.loads((tmp_path / "runs" / f"{command}.json").read_text())
        for row, seeds in results["rows"].items():
            assert f"\n| {row} | " in printed.out
            values = [figures[name] for figures in seeds for name in ("detection_f1", "dice", "pq")]
            assert all(0 <= value <= 1 for value in values)
        return results["rows"], trainings

    monkeypatch.setattr(accuracy, "BUDGET", TINY.format(root=ROOT, folder=folder).split())
    monkeypatch.setattr(accuracy.subprocess, "run", train_here)
    return run


def test_perfect_maps_give_nearly_all_nuclei(run):
    rows, _ = run("ceiling")
    assert rows["ours, unit peaks"][0]["detection_f1"] > 0.97
    assert ("published" in rows) == bool(peers.can_compare())
    assert rows["ours, unit peaks"][0]["pq"] >= max(row[0]["pq"] for row in rows.values())


def test_ablation_and_stain_train_score_and_agree(run, tmp_path):
    rows, trainings = run("ablation", "--seeds", 0, "--only", "base", "no-average")
    assert trainings == ["base-0", "no-average-0"]
    assert list(rows) == ["base: ", "no-average: --average 0"]

    # a finished run is kept, and another in its place refused
    again, trainings = run("ablation", "--seeds", 0, "--only", "base")
    assert trainings == [] and again["base: "] == rows["base: "]
    error = run("ablation", "--seeds", 0, "--only", "base", "--crop", "32", code=1)
    assert "holds a run of another crop; choose another --out" in error

    stained, _ = run("stain", tmp_path / "runs" / "base-0" / "last.pt")
    assert list(stained) == list(accuracy.SHIFTS)
    assert stained["unshifted"] == rows["base: "]
    assert len({str(figures) for figures in stained.values()}) > 4
    error = run("stain", ROOT / "weights" / "consep.pt", code=1)
    assert "expected the set it was trained on" in error


def test_recipes_reconstruct_as_predict_does(run, tmp_path, monkeypatch):
    rows, trainings = run("recipes", "--seeds", 0)
    assert trainings == ["summed-peaks-0", "unit-peaks-0"]
    assert len(rows) == (4 if peers.can_compare() else 2)
    monkeypatch.setattr(accuracy, "SHIFTS", {"unshifted": np.asarray})
    predicted, _ = run("stain", tmp_path / "runs" / "unit-peaks-0" / "last.pt")
    assert rows["unit-peaks, reconstruction ours: --scale 1"] == predicted["unshifted"]


def test_a_failed_training_is_named(run, monkeypatch):
    monkeypatch.setattr(train, "main", lambda words: 1)
    error = run("ablation", "--seeds", 0, "--only", "base", code=1)
    assert "train.py ended with code 1; its reason is above" in error


def test_shifts_change_their_stain_alone(tissue):
    image = tissue[0]
    assert np.array_equal(accuracy.hue_shift(0, image), image)
    assert np.array_equal(accuracy.stain_shift((1, 1, 1), image), image)
    turned = accuracy.hue_shift(120, image)
    assert np.array_equal(turned, np.roll(image, 1, axis=2))
    paler = accuracy.stain_shift((0.5, 1, 1), image)
    assert paler.mean() > image.mean() and (paler >= image).mean() > 0.9
