"""benchmarks/accuracy.py: its commands on a tiny set, each with table and JSON; the hue shift."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "benchmarks"))
import accuracy
import peers
import train
from data import synthetic_tissue
from dualunet import read_checkpoint

TINY = ("--steps 2 --batch 2 --crop 64 --rate 1e-6 --average 0.5 --class-weights none --workers 0 "
        "--precision fp32 --device cpu --init").split() + [str(ROOT / "weights" / "consep.pt")]


@pytest.fixture
def folder(tmp_path):
    """A plain folder of two 96² tiles of synthetic tissue."""
    root = tmp_path / "tiles"
    for name in ("images", "labels", "types"):
        (root / name).mkdir(parents=True)
    names = ["miscellaneous", "inflammatory", "epithelial", "spindle-shaped"]
    (root / "classes.json").write_text(json.dumps(names))
    for i in range(2):
        image, inst_map, type_map = synthetic_tissue(i + 33, 96)
        Image.fromarray(image).save(root / "images" / f"t{i}.png")
        Image.fromarray(inst_map.astype(np.uint16)).save(root / "labels" / f"t{i}.png")
        types = {int(k): names[type_map[inst_map == k][0] - 1] for k in np.unique(inst_map)[1:]}
        (root / "types" / f"t{i}.json").write_text(json.dumps(types))
    return root


def test_commands_agree_with_each_other(folder, tmp_path, monkeypatch, capfd):
    def run(command, *words):
        out = tmp_path / "runs"
        status = accuracy.main(
            [command, "--data", str(folder), "--out", str(out), *map(str, words)])
        printed = capfd.readouterr()
        assert status == 0, printed.err
        results = json.loads((out / f"{command}.json").read_text())
        assert all(f"\n| {row} | " in printed.out for row in results["rows"])
        figures = [figure for row in results["rows"].values() for figure in row.values()]
        assert (all(np.isfinite(figure) and 0 <= figure <= 1 for figure in figures)
                and max(figures) > 0.1)
        return results, printed

    budget = [*TINY, "--val", "t1", "--seeds", 0, "--only", "base"]
    _, printed = run("ablation", *budget, "--threads", 1)
    assert "last.pt" in printed.err and "epoch" not in printed.out

    def here(command, **_):  # without another start of python, for speed
        trainings.append(command[command.index("--out") + 1])
        return subprocess.CompletedProcess(command, train.main(command[2:]))

    trainings = []
    monkeypatch.setattr(accuracy.subprocess, "run", here)
    ablation, printed = run("ablation", *budget, "sum", "alone")
    checkpoints = [tmp_path / "runs" / name / "last.pt" for name in ("base-0", "sum-0")]
    assert trainings == [str(checkpoints[1].parent)]  # the base was not trained again
    assert (list(ablation["rows"]) == ["base", "--combine sum"]
            and ablation["rows"]["base"] == ablation["seeds"]["base"]["0"])
    assert set(ablation["difference"]["base"].values()) == {0} and "(+0.000)" in printed.out
    assert accuracy.main(
        ["ablation", "--data", str(folder), "--out", str(tmp_path / "runs"), "--crop", "32"]) == 1
    assert "holds a run of another" in capfd.readouterr().err

    recipes, printed = run("recipes", *checkpoints)
    assert len(recipes["rows"]) == 2 * (4 if peers.h_maxima else 3) and "warning" not in printed.out
    assert ("left out" in printed.out) == (peers.h_maxima is None)
    for row, way in (("base", "max: local maxima > 0.3, flooding of -density (ours)"),
                     ("--combine sum", "sum: h-maxima 0.15, flooding of -density")):
        same = recipes["rows"][way].keys() & ablation["rows"][row].keys()
        assert (len(same) == 4
                and all(recipes["rows"][way][k] == ablation["rows"][row][k] for k in same))
    assert accuracy.main(["recipes", "--data", str(folder), *map(str, checkpoints[::-1])]) == 1
    assert "expected max: give the one of max first" in capfd.readouterr().err

    stain, _ = run("stain", checkpoints[0])
    assert len(stain["rows"]) == 13 and (
        stain["rows"]["unshifted"][f"{checkpoints[0]} PQ"] == ablation["rows"]["base"]["PQ"])
    assert (set(stain["ratio"]["unshifted"].values()) == {1}
            and len({str(row) for row in stain["rows"].values()}) > 6)
    with Image.open(tmp_path / "runs" / "stain.png") as plot:
        assert len(plot.convert("RGB").getcolors(10**6)) > 3
    assert read_checkpoint(checkpoints[0])["split"] == {"train": ["t0"], "val": ["t1"]}


def test_hue_shift_turns_the_hue_alone(tissue):
    image = tissue[0]
    assert (np.array_equal(accuracy.hue_shift(image, 0), image)
            and np.array_equal(accuracy.hue_shift(image, 360), image))
    turned = accuracy.hue_shift(image, 30)
    assert ((turned.max(-1) == image.max(-1)).all() and (turned.min(-1) == image.min(-1)).all()
            and (turned != image).any())
    assert np.abs(accuracy.hue_shift(turned, -30).astype(int) - image).max() <= 1
    pixels = np.uint8([[[255, 0, 0], [200, 100, 100], [90, 90, 90], [0, 0, 0]]])
    assert accuracy.hue_shift(pixels, 120).tolist() == [
        [[0, 255, 0], [100, 200, 100], [90, 90, 90], [0, 0, 0]]]
    assert accuracy.hue_shift(pixels, -120)[0, 0].tolist() == [0, 0, 255]
