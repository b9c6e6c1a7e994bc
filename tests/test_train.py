"""train.py: options, splits, the loop, resuming, several processes, evaluation, what goes wrong."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import train as script
from data import Source, open_source, synthetic_tissue
from dualunet import DualUNet, dual_loss, load_model, read_checkpoint
from train import main, merge_classes, parse_class_weights, parse_options, rate_at, split_source

TINY = ("--epochs 2 --steps 3 --batch 2 --crop 64 --decoder-channels 8 8 8 8 8 --workers 0 "
        "--class-weights none --precision fp32 --device cpu").split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain folder of five 96² tiles of synthetic tissue; the fifth validates."""
    root = tmp_path_factory.mktemp("data") / "tiles"
    for name in ("images", "labels", "types"):
        (root / name).mkdir(parents=True)
    names = ["miscellaneous", "inflammatory", "epithelial", "spindle-shaped"]
    (root / "classes.json").write_text(json.dumps(names))
    for i in range(5):
        image, inst_map, type_map = synthetic_tissue(i + 30, 96)
        Image.fromarray(image).save(root / "images" / f"t{i}.png")
        Image.fromarray(inst_map.astype(np.uint16)).save(root / "labels" / f"t{i}.png")
        types = {int(k): names[type_map[inst_map == k][0] - 1] for k in np.unique(inst_map)[1:]}
        (root / "types" / f"t{i}.json").write_text(json.dumps(types))
    return root


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A finished run of two tiny epochs."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["--data", str(folder), "--out", str(out), *TINY]) == 0
    return out


def test_published_recipe_is_what_the_paper_says():
    options = parse_options(["--published", "--batch", "4"])
    assert (options.encoder, options.combine, options.optimizer, options.rate) == (
        "resnext50_32x4d", "sum", "adam", 2e-4)
    assert options.batch == 4 and options.density_weight == 1 and options.average == 0
    rates = [rate_at(p, options) for p in (0, 0.69, 0.7, 0.89, 0.9, 0.99)]
    assert np.allclose(rates, [2e-4, 2e-4, 2e-5, 2e-5, 2e-6, 2e-6])


def test_cosine_rate_warms_up_and_falls():
    options = parse_options([])
    rates = [rate_at(p, options) for p in np.linspace(0, 0.999, 50)]
    assert (rates[0] < 1e-6 and max(rates) == pytest.approx(options.rate, rel=0.01)
            and rates[-1] < 0.02 * options.rate)


def test_splits_and_classes():
    source = Source([f"i{k}" for k in range(10)], ["b", "a"], None)
    assert split_source(source, None, None) == [[0, 1, 2, 3, 5, 6, 7, 8], [4, 9]]
    assert split_source(source, ["i0"], None)[1] == [0]
    pannuke = Source(["fold1/0", "fold2/0", "fold3/0"], ["a"], None, ["x", "y", "z"])
    assert split_source(pannuke, None, 2) == [[1], [0]]
    assert merge_classes(
        [source, Source([], ["nucleus"], None), Source([], ["c", "a"], None)]) == ["b", "a", "c"]
    assert merge_classes([Source([], ["nucleus"], None)] * 2) == ["nucleus"]


def test_class_weights_average_to_one_and_stay_finite_for_an_absent_class():
    crops = [(None, torch.tensor([[0, 0, 0], [1, 1, 255]]), None)]
    weights = parse_class_weights("sqrt", crops, 2, samples=1)
    assert torch.isfinite(weights).all() and weights[1] < weights[0] < weights[2]
    assert (weights * torch.tensor([0.6, 0.4, 0.0])).sum().item() == pytest.approx(1)
    crops = [(None, torch.tensor([[0, 0, 0], [1, 1, 1]]), None)]  # an outline favours neither side
    assert parse_class_weights("sqrt", crops, 1, samples=1).tolist() == [1, 1]
    assert parse_class_weights("1,2,3", crops, 2).tolist() == [1, 2, 3]
    assert parse_class_weights("none", crops, 2) is None
    with pytest.raises(ValueError, match="has 2 numbers; expected 3, background first"):
        parse_class_weights("1,2", crops, 2)


def test_one_batch_overfits(tissue):
    torch.manual_seed(0)
    model = DualUNet(num_classes=4, encoder="resnet18", decoder_channels=(16, 16, 16, 16, 16))
    image, inst_map, type_map = (torch.from_numpy(a[:96, :96].copy()) for a in tissue)
    batch = (image.permute(2, 0, 1)[None] / 255).repeat(2, 1, 1, 1)
    type_map, target = (type_map[None].repeat(2, 1, 1),
                        (inst_map > 0)[None, None].repeat(2, 1, 1, 1).float())
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(40):
        terms = dual_loss(*model(batch), type_map, target)
        first = terms["loss"].item() if step == 0 else first
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    assert terms["loss"].item() < 0.35 * first


def test_a_run_leaves_checkpoints_log_and_pictures(run, folder):
    assert {p.name for p in run.iterdir()} == {
        "best.pt", "last.pt", "log.jsonl", "curves.png", "preview.png"}
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2]
    assert {"loss", "ce", "dice", "mse", "val_loss", "tiles", "rate"} <= records[0].keys()
    with Image.open(run / "preview.png") as preview:
        assert preview.size == (3 * 512, 512)
    config = load_model(run / "best.pt").config
    assert (config["class_names"][3] == "spindle-shaped" and config["mpp"] == 0.25
            and config["combine"] == "max")
    assert read_checkpoint(run / "best.pt")["split"] == {
        "train": ["t0", "t1", "t2", "t3"], "val": ["t4"]}


def test_resumed_equals_uninterrupted_bit_for_bit(run, folder, tmp_path, monkeypatch):
    validate, calls = script.validate, []

    def power_cut(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(*args)

    monkeypatch.setattr(script, "validate", power_cut)
    with pytest.raises(KeyboardInterrupt):
        main(["--data", str(folder), "--out", str(tmp_path / "cut"), *TINY])
    monkeypatch.setattr(script, "validate", validate)
    assert main(["--resume", str(tmp_path / "cut")]) == 0
    whole, resumed = (read_checkpoint(p / "last.pt") for p in (run, tmp_path / "cut"))
    for part in ("model", "training"):
        assert all(torch.equal(a, b) for a, b in zip(
            whole[part].values(), resumed[part].values(), strict=True))
    for a, b in zip(whole["optimizer"]["state"].values(), resumed["optimizer"]["state"].values(),
                    strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    drop = {"seconds"}
    assert [{k: v for k, v in r.items() if k not in drop} for r in whole["records"]] == [
        {k: v for k, v in r.items() if k not in drop} for r in resumed["records"]]


def test_an_earlier_run_is_not_overwritten(run, folder, capsys):
    assert main(["--data", str(folder), "--out", str(run), *TINY]) == 1
    assert f"holds a run; go on with --resume {run}" in capsys.readouterr().err


def test_init_keeps_all_but_a_class_head_of_another_size(run, folder, tmp_path, capsys):
    options = ["--data", str(folder), "--one-class", "--init", str(run / "best.pt"),
               "--out", str(tmp_path / "r")]
    assert main([*options, *TINY, "--epochs", "1"]) == 0
    assert "but for the class head, whose size differs" in capsys.readouterr().out
    assert load_model(tmp_path / "r" / "best.pt").config["class_names"] == ["nucleus"]
    assert main([*options, *TINY, "--encoder", "resnet34", "--out", str(tmp_path / "s")]) == 1
    assert "another encoder than --encoder resnet34" in capsys.readouterr().err


def test_zoom_is_kept_and_goes_on_with_init(folder, tmp_path):
    first, second = (["--data", str(folder), *TINY, "--epochs", "1", "--out", str(tmp_path / name)]
                     for name in "ab")
    assert main([*first, "--zoom", "1.25"]) == 0
    assert main([*second, "--init", str(tmp_path / "a" / "best.pt")]) == 0
    assert [load_model(tmp_path / name / "last.pt").config["zoom"] for name in "ab"] == [1.25, 1.25]


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
        folder, tmp_path, monkeypatch, capsys):
    loss = script.dual_loss
    monkeypatch.setattr(script, "dual_loss",
                        lambda *a, **k: {n: v * np.nan for n, v in loss(*a, **k).items()})
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: pytest.fail("stepped"))
    assert main(["--data", str(folder), "--out", str(tmp_path / "r"), *TINY]) == 1
    error = capsys.readouterr().err
    assert "loss is nan at epoch 1, step 1, before the weights changed; look at t" in error


@pytest.mark.parametrize("arguments, words", [
    (["--data", "nowhere"], "nowhere: no such folder"),
    (["--resume", "nowhere"], "nowhere.*no such checkpoint"),
    (["--evaluate", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
])
def test_wrong_calls_end_in_a_sentence(arguments, words, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(words, error)


def test_two_processes_train_as_one(folder, root, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", "train.py", "--data", str(folder),
               "--out", str(tmp_path / "r"), *TINY, "--epochs", "1"]
    subprocess.run(command, cwd=root, check=True, capture_output=True, timeout=200)
    record = json.loads((tmp_path / "r" / "log.jsonl").read_text())
    assert np.isfinite(record["loss"]) and load_model(tmp_path / "r" / "best.pt")


# ---------------------------------------------------------------- evaluation


def test_truth_written_as_predictions_scores_one(folder, tmp_path, capsys):
    from infer import Result, write_outputs
    from postprocess import measure

    source = open_source(folder)
    (tmp_path / "found").mkdir()
    for i, name in enumerate(source.names):
        image, inst_map, type_map = source.read(i)
        peaks = np.zeros((inst_map.max(), 2), np.int64)
        nuclei = measure(inst_map, type_map, peaks=peaks)
        result = Result(f"{name}.png", image, nuclei, source.class_names, [(0, 0, 0)] * 4, 0.25)
        write_outputs(tmp_path / "found", name, result, ["csv", "tif"])
    arguments = ["--evaluate", str(tmp_path / "found"), "--data", str(folder),
                 "--out", str(tmp_path / "scores")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
    assert (summary["detection"]["f1"] == summary["image_mean"]["pq"]
            == summary["image_mean"]["aji"] == 1)
    assert summary["classification"]["mean"] == summary["pannuke"]["mpq"] == 1
    assert "1.000" in printed and "0." not in (
        printed.replace("0.5", "").replace("t0.png", "").split("PanNuke")[0])
    assert len(list((tmp_path / "scores").glob("worst_*.png"))) == 3


def test_a_checkpoint_is_scored_on_its_own_validation_images(run, folder, tmp_path, capsys):
    arguments = ["--evaluate", str(run / "best.pt"), "--data", str(folder),
                 "--precision", "fp32", "--out"]
    assert main([*arguments, str(tmp_path / "a")]) == 0
    assert json.loads((tmp_path / "a" / "evaluation.json").read_text())["names"] == ["t4"]
    assert "warning" not in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "b"), "--all", "--worst", "0"]) == 0
    assert "was trained on 4 of these images" in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "c"), "--val", "stranger"]) == 1
    assert "none of" in capsys.readouterr().err


def test_check_data_lists_every_problem_at_once(folder, tmp_path, capsys):
    arguments = ["--check-data", "--data", str(folder), "--out", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "5 images" in printed and "0 problems" in printed and "epithelial" in printed
    assert (tmp_path / "contact_tiles.png").exists()
    (folder / "labels" / "t1.png").rename(folder / "labels" / "t1.bak")
    (folder / "labels" / "t1.png").write_text("no labels")
    Image.new("L", (5, 5)).save(folder / "images" / "t3.png")
    try:
        assert main(arguments) == 1
        printed = capsys.readouterr()
        assert "t1.png: " in printed.out and "t3.png: " in printed.out and "2 files" in printed.err
    finally:
        (folder / "labels" / "t1.bak").rename(folder / "labels" / "t1.png")
        Image.fromarray(synthetic_tissue(33, 96)[0]).save(folder / "images" / "t3.png")
