"""train.py: options, splits, classes, the loop, resuming, calibration, several processes."""

import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import write_tiles
from PIL import Image

import train as script
from data import CONSEP_CLASSES, Source, open_source
from dualunet import DualUNet, dual_loss, load_model, read_checkpoint, save_checkpoint
from evaluate import OFFSETS
from recipes import PRESETS, make_parser
from train import (LabelledSet, average_into, build_model, class_weights, main,
                   load_weights, make_crops, make_optimizer, merge_classes, open_sets,
                   parse_options, peak_options, rate_at, split_source, start_from)

SMALL = "--encoder efficientnet_lite0 --decoder-channels 8 8 8 8 8 --image-skip 4".split()
TINY = SMALL + ("--epochs 2 --steps 2 --batch 2 --crop 64 --workers 0 --val-images 2 "
                "--class-weights none --precision fp32 --device cpu").split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain folder of five 96² tiles of synthetic tissue; the fifth validates."""
    return write_tiles(tmp_path_factory.mktemp("data") / "tiles", range(30, 35))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A finished run of two tiny epochs."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["--data", str(folder), "--out", str(out), *TINY]) == 0
    return out


def fails(capsys, *arguments):
    """The sentence in which a call ends."""
    assert main(list(arguments)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


# ---------------------------------------------------------------- options


def test_help_is_in_groups_and_every_option_holds_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")  # an option is a line
    with pytest.raises(SystemExit, match="0"):
        parse_options(["--help"])
    printed = capsys.readouterr().out
    titles = ["data", "model", "optimisation", "augmentation", "output and machine"]
    places = [printed.index(f"\n{title}:\n") for title in titles]
    assert places == sorted(places)
    entries = {}
    for entry in re.split(r"\n  (?=--)", printed):
        entries[entry.split()[0]] = " ".join(entry.split("\n\n")[0].split())
    for name, default in vars(make_parser().parse_args([])).items():
        if isinstance(default, list):
            default = " ".join(map(str, default))
        if name == "out":
            default = "runs/DATE-TIME"
        words = "none" if default in (None, "") else default
        if default is False:
            words = "off"
        assert entries[f"--{name.replace('_', '-')}"].endswith(f"(default: {words})"), name


def test_what_is_given_counts_more_than_a_preset_and_that_more_than_a_default():
    options = parse_options(["--preset", "consep", "--batch", "8", "--mpp", "0.25"])
    assert options.batch == 8 and options.crop == 320 and options.schedule == "cosine"
    assert options.given == ["batch", "mpp", "preset"]
    assert options.unknown == ["crchisto:miscellaneous"] and len(options.val) == 5
    for name in ("consep", "nuclei", "nuclei20x"):
        options = parse_options(["--preset", name])
        assert options.calibrate and options.encoder_weights == "imagenet"
        assert len(options.data) == len(options.share)
        assert options.epochs * options.steps >= 2000
    assert options.mpp == 0.5 and options.one_class
    own = parse_options(["--preset", "consep", "--data", "mine"])
    assert own.data == ["mine"] and own.share is own.val is own.classes is None
    assert own.unknown == [] and own.rare == 0.5 and own.crop == 320
    assert not parse_options([]).calibrate
    parser = make_parser()
    assert all(set(preset) <= set(vars(parser.parse_args([]))) for preset in PRESETS.values())


def test_published_recipe_is_what_the_paper_says():
    options = parse_options(["--preset", "published"])
    assert (options.encoder, options.combine, options.optimizer, options.rate) == (
        "resnext50_32x4d", "sum", "adam", 2e-4)
    assert options.density_weight == 1 and options.average == 0 and options.image_skip == 0
    rates = [rate_at(p, options) for p in (0, 0.69, 0.7, 0.89, 0.9, 0.99)]
    assert np.allclose(rates, [2e-4, 2e-4, 2e-5, 2e-5, 2e-6, 2e-6])


def test_cosine_rate_warms_up_and_falls():
    options = parse_options([])
    rates = [rate_at(p, options) for p in np.linspace(0, 0.999, 50)]
    assert rates[0] < 1e-5 and max(rates) == pytest.approx(options.rate, rel=0.01)
    assert rates[-1] < 0.006 * options.rate


@pytest.mark.parametrize("word, advice", [
    ("--check-data", "run python data.py FOLDER"),
    ("--evaluate", "run python evaluate.py CHECKPOINT --data FOLDER"),
    ("--published", "give --preset published"),
])
def test_options_that_moved_name_what_replaces_them(word, advice, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--data", "x", word])
    assert capsys.readouterr().err == f"error: {word} is gone; {advice}\n"


@pytest.mark.parametrize("arguments, words", [
    ("--batch 1 --crop 32", "--batch 1 --crop 32: crop and batch too small for batch "
     "normalisation; raise either"),
    ("--crop 31", "--crop is 31; expected at least 32"),
    ("--batch 0", "--batch is 0; expected at least 1"),
    ("--val-images -1", "--val-images is -1; expected at least 0"),
    ("--mpp 500", "--mpp: 500 µm per pixel is implausible; 0.25 is 40x, 0.5 is 20x"),
    ("--data-mpp 0.25 72 --data a b", "--data-mpp: 72 µm per pixel is implausible"),
    ("--share 1 2", "--share has 2 numbers for 1 set; give one a set"),
    ("--data a b c --data-mpp 0.5 0.5", "--data-mpp has 2 numbers for 3 sets; give one a set"),
    ("--combine sum", "--combine sum needs --scale 1"),
    ("--calibrate --val-images 0", "--calibrate needs --val-images of at least 1"),
    ("--data nowhere", "nowhere: no such folder; the paths of --data begin at --root ."),
    ("--preset consep --root here", "here/consep: no such folder; the paths of --data begin at "
     "--root here"),
    ("--unknown synthetic:a --data synthetic", "no class .?a.? to take as unknown"),
    ("--unknown other:a", "--unknown other:a: expected SET:CLASS, the set one of synthetic"),
    ("--val stranger", "--val stranger: no image of that name in synthetic"),
    ("--fold 1", "--fold 1: no PanNuke among synthetic"),
    ("--classes a,b", "epithelial|miscellaneous"),
    ("--resume ../nosuch", r"\.\./nosuch: no run to resume, for it has no last.pt; check the "
     "folder"),
    ("--device cuda:99", "--device cuda:99: not usable"),
])
def test_calls_that_make_no_sense_end_in_a_sentence(arguments, words, tmp_path, capsys):
    call = arguments.split()
    if "--resume" not in call:
        call += ["--out", str(tmp_path / "r")]
    error = fails(capsys, *call)
    assert re.search(words, error)
    assert not (tmp_path / "r").exists()


# ---------------------------------------------------------------- data


def test_splits():
    source = Source([f"i{k}" for k in range(10)], ["b", "a"], None)
    assert split_source(source, None, None) == ([0, 1, 2, 3, 5, 6, 7, 8], [4, 9])
    assert split_source(source, ["i0"], None) == ([1, 2, 3, 4, 5, 6, 7, 8, 9], [0])
    assert split_source(source, ["elsewhere"], None)[1] == [4, 9]
    pannuke = Source(["fold1/0", "fold2/0", "fold3/0", "fold2/1"], ["a"], None, list("xyzx"))
    assert split_source(pannuke, None, 1) == ([0], [1, 3])
    assert split_source(pannuke, None, 2) == ([1, 3], [0])
    assert split_source(pannuke, None, 3) == ([2], [1, 3])


def sets_of(*class_names):
    return [LabelledSet(str(k), Source([], names, None), [], [])
            for k, names in enumerate(class_names)]


def test_classes_of_several_sets():
    options = parse_options([])
    assert merge_classes(sets_of(["b", "a"], ["nucleus"], ["c", "a"]), options) == ["b", "a", "c"]
    assert merge_classes(sets_of(["nucleus"], ["nucleus"]), options) == ["nucleus"]
    given = parse_options(["--classes", "a, b"])
    assert merge_classes(sets_of(["b"]), given) == ["a", "b"]
    assert merge_classes(sets_of(["b", "a"]), parse_options(["--one-class"])) == ["nucleus"]


def test_sets_are_opened_with_their_classes_and_notes(folder, tmp_path, capsys):
    (folder / "images" / "readme.txt").write_text("what are these")
    try:
        options = parse_options(["--data", folder.name, "--root", str(folder.parent), "--unknown",
                                 f"{folder.name}:miscellaneous"])
        [labelled] = open_sets(options)
    finally:
        (folder / "images" / "readme.txt").unlink()
    warnings = capsys.readouterr().err
    assert warnings.startswith(f"warning: {folder}") and "(.txt)" in warnings
    assert labelled.name == folder.name
    assert labelled.source.class_names == list(CONSEP_CLASSES[1:])
    truth = [open_source(folder).read(i)[2] for i in range(5)]
    for i, expected in enumerate(truth):
        found = labelled.source.read(i)[2]
        assert np.array_equal(found == 255, expected == 1)
        assert np.array_equal(found == 3, expected == 4)

    # also where other sets know that class
    twins = parse_options(["--data", str(folder), str(folder / ".." / "tiles")])
    assert [labelled.name for labelled in open_sets(twins)] == twins.data
    both = parse_options(["--data", str(folder), "synthetic", "--classes",
                          ",".join(CONSEP_CLASSES), "--unknown", f"{folder}:miscellaneous"])
    sets = open_sets(both)
    assert merge_classes(sets, both) == list(CONSEP_CLASSES)
    assert "miscellaneous" in sets[1].source.class_names
    for i, expected in enumerate(truth):
        assert np.array_equal(sets[0].source.read(i)[2] == 255, expected == 1)

    fixed = parse_options(["--data", str(folder), "--classes", "other," + ",".join(CONSEP_CLASSES)])
    assert open_sets(fixed)[0].source.class_names[0] == "other"
    few = parse_options(["--data", str(folder), "--val", "t0", "t1", "t2", "t3", "t4"])
    with pytest.raises(ValueError, match="0 training and 5 validation images; .* see --val"):
        open_sets(few)


def test_shares_follow_the_area_unless_given():
    small, large = (open_source("synthetic", count=5, size=size) for size in (64, 128))
    sets = [LabelledSet(name, source, [0, 1, 2, 3], [4])
            for name, source in (("small", small), ("large", large))]
    options = parse_options(["--data", "small", "large", "--crop", "32", "--workers", "0"])
    crops, val_crops = make_crops(sets, CONSEP_CLASSES, options)
    assert crops.shares.tolist() == [0.2, 0.8]
    assert val_crops.geometry is val_crops.color is None and crops.geometry and crops.color
    options.share = [3, 1]
    assert make_crops(sets, CONSEP_CLASSES, options)[0].shares.tolist() == [0.75, 0.25]
    options.rare_shares = [1, 2]
    with pytest.raises(ValueError, match="--rare-shares has 2 numbers for 4 classes"):
        make_crops(sets, CONSEP_CLASSES, options)


class FakeCrops:
    def __init__(self, frequency):
        self.class_names = ["a", "b", "c"][:len(frequency) - 1]
        self.class_frequency = lambda: np.array(frequency)


def test_class_weights_average_to_one_and_stay_finite_for_an_absent_class():
    weights = class_weights("sqrt", FakeCrops([0.6, 0.4, 0.0]))
    assert torch.isfinite(weights).all() and weights[1] < weights[2]
    assert (weights * torch.tensor([0.6, 0.4, 0.0])).sum().item() == pytest.approx(1)
    # an outline favours neither side
    assert class_weights("sqrt", FakeCrops([0.7, 0.3])).tolist() == pytest.approx([1, 1])
    assert class_weights("1,2,3", FakeCrops([0.6, 0.2, 0.2])).tolist() == [1, 2, 3]
    assert class_weights("none", FakeCrops([0.6, 0.2, 0.2])) is None
    for text in ("1,2", "many"):
        with pytest.raises(ValueError, match=f"--class-weights is {text}; expected sqrt, none, or "
                           "3 numbers with commas, background first"):
            class_weights(text, FakeCrops([0.6, 0.2, 0.2]))


# ---------------------------------------------------------------- network


def test_peaks_scale_with_the_resolution():
    assert peak_options(0.25) == {"sigma": 5, "min_distance": 2, "smooth": 1, "min_size": 10}
    assert peak_options(0.5) == {"sigma": 2.5, "min_distance": 1, "smooth": 0.5, "min_size": 3}


def test_a_model_says_what_it_is():
    options = parse_options([*SMALL, "--mpp", "0.5", "--licence", "CC0", "--combine", "sum"])
    config = build_model(options, ["a", "b"]).config
    assert config["num_classes"] == 2 and config["class_names"] == ["a", "b"]
    assert config["mpp"] == 0.5 and config["licence"] == "CC0" and config["sigma"] == 2.5
    assert config["reconstruct"] == {"min_distance": 1, "smooth": 0.5, "min_size": 3,
                                     "combine": "sum"}
    assert len(config["colors"]) == 2


def test_the_optimizer_has_every_parameter_once_and_vectors_do_not_decay():
    model = build_model(parse_options(SMALL), ["a"])
    groups = make_optimizer(model, parse_options(SMALL)).param_groups
    taken = [id(p) for group in groups for p in group["params"]]
    assert sorted(taken) == sorted(id(p) for p in model.parameters())
    for group in groups:
        assert (group["weight_decay"] > 0) == all(p.ndim > 1 for p in group["params"])
    encoder = {id(p) for p in model.encoder.parameters()}
    for group in groups:
        assert group["scale"] == (0.4 if id(group["params"][0]) in encoder else 1.0)
    published = make_optimizer(model, parse_options(["--optimizer", "adam"]))
    assert type(published) is torch.optim.Adam
    assert all(group["weight_decay"] > 0 for group in published.param_groups)


def test_the_average_follows_and_copies_counters():
    models = [build_model(parse_options(SMALL), ["a"]) for _ in range(2)]
    average, model = models
    model.segmentation_decoder.blocks[0].conv1[1].num_batches_tracked += 5
    before = average.segmentation_head.weight.clone()
    average_into(average, model, 0.9)
    expected = 0.9 * before + 0.1 * model.segmentation_head.weight
    assert torch.allclose(average.segmentation_head.weight, expected)
    assert average.segmentation_decoder.blocks[0].conv1[1].num_batches_tracked == 5
    average_into(average, model, 0.0)
    for a, b in zip(average.state_dict().values(), model.state_dict().values()):
        assert torch.equal(a, b)


def test_one_batch_overfits(tissue):
    torch.manual_seed(0)
    model = DualUNet(num_classes=4, encoder="resnet18", decoder_channels=(16, 16, 16, 16, 16))
    image, inst_map, type_map = (torch.from_numpy(part[:64, :64].copy()) for part in tissue)
    images = (image.permute(2, 0, 1)[None] / 255).repeat(2, 1, 1, 1)
    type_map = type_map[None].repeat(2, 1, 1)
    target = (inst_map > 0)[None, None].repeat(2, 1, 1, 1).float()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        terms = dual_loss(*model(images), type_map, target)
        losses.append(terms["loss"].item())
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    assert losses[-1] < 0.35 * losses[0]


# ---------------------------------------------------------------- a run


def test_a_run_leaves_checkpoints_log_and_pictures(run):
    assert {path.name for path in run.iterdir()} == {
        "best.pt", "last.pt", "log.jsonl", "curves.png", "preview.png"}
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]
    expected = {"loss", "ce", "dice", "mse", "val_loss", "rate", "score", "seconds"}
    assert expected <= records[0].keys()
    assert {"detection_f1", "class_f1", "dice", "pq"} == {
        *next(figures for figures in records[0].values() if isinstance(figures, dict))}
    config = load_model(run / "best.pt").config
    assert config["class_names"] == list(CONSEP_CLASSES) and config["mpp"] == 0.25
    assert config["reconstruct"]["combine"] == "max"
    saved = read_checkpoint(run / "best.pt")
    assert saved["split"] == {"train": ["t0", "t1", "t2", "t3"], "val": ["t4"]}
    assert saved["options"]["batch"] == 2 and saved["epoch"] in (1, 2)


def test_a_run_says_what_it_does(folder, tmp_path, capsys):
    other = write_tiles(tmp_path / "other", range(30, 35), types=False)
    call = ["--data", str(folder), str(other), "--share", "3", "1", "--seed", "2", *TINY,
            "--epochs", "1", "--val-images", "0"]
    assert main([*call, "--out", str(tmp_path / "r")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("tiles: 4 training and 1 validation images at 0.25 µm per pixel, "
                        "75 % of the crops")
    assert lines[1].startswith("other: 4 training and 1 validation images")
    assert re.match(r"training nuclei: miscellaneous [\d,]+, inflammatory [\d,]+, .*, of unknown "
                    r"class [\d,]+$", lines[2])
    assert lines[3] == "1 epoch of 2 steps of 2 crops of 64², on cpu in fp32"
    assert re.fullmatch(r"first step: \d+\.\d s", lines[4])
    assert re.match(r"epoch 1 of 1, \d+ s, 0 s left: loss \d\.\d+, val_loss \d\.\d+", lines[5])
    assert lines[6] == f"the run is in {tmp_path / 'r'}" and len(lines) == 7
    record = json.loads((tmp_path / "r" / "log.jsonl").read_text())
    assert record["score"] is None  # nan is no JSON
    assert (tmp_path / "r" / "best.pt").exists() and not (tmp_path / "r" / "preview.png").exists()


def test_progress_tells_the_time_left(folder, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(script, "show_progress", said.append)
    call = ["--data", str(folder), *TINY, "--val-images", "0", "--out", str(tmp_path / "r")]
    assert main(call) == 0
    assert "reads images: 4 of 4" in said
    steps = [text for text in said if text.startswith("epoch")]
    assert len(steps) == 4
    assert re.fullmatch(r"epoch 1 of 2, step 1 of 2: loss \d\.\d+, \d+ s left", steps[0])
    assert steps[-1].endswith(", 0 s left")


def same(a, b):
    """Whether two parts of a checkpoint are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b or (a != a and b != b)


def without_seconds(records):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


@pytest.fixture(scope="module")
def cut(folder, tmp_path_factory):
    """The run of `run`, interrupted in its second epoch; and what it said then."""
    out = tmp_path_factory.mktemp("runs") / "cut"
    validate, calls = script.validate, []

    def power_cut(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "validate", power_cut)
        assert main(["--data", str(folder), "--out", str(out), *TINY]) == 130
    return out


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(run, cut, monkeypatch, capsys):
    monkeypatch.setattr(script, "load_weights", lambda *_: pytest.fail("begins anew"))
    assert main(["--resume", str(cut)]) == 0
    assert f"resumes {cut} after epoch 1 of 2\n" in capsys.readouterr().out
    whole, resumed = (read_checkpoint(folder / "last.pt") for folder in (run, cut))
    for part in ("model", "training", "optimizer"):
        assert same(whole[part], resumed[part]), part
    assert same(without_seconds(whole["records"]), without_seconds(resumed["records"]))
    assert len((cut / "log.jsonl").read_text().splitlines()) == 2


def test_epochs_extend_a_run_and_calibrate_may_follow(cut, capsys):
    assert main(["--resume", str(cut), "--epochs", "3"]) == 0
    saved = read_checkpoint(cut / "last.pt")
    assert saved["epoch"] == 3 and saved["options"]["epochs"] == 3
    assert "3 epochs are done; extend the run with --epochs 7, say" in fails(
        capsys, "--resume", str(cut))
    assert "3 epochs are done" in fails(capsys, "--resume", str(cut), "--epochs", "2")

    before = read_checkpoint(cut / "best.pt")
    assert main(["--resume", str(cut), "--calibrate"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"best\.pt is calibrated: its background logit is lowered by [\d.]+, which "
                     r"takes the mean PQ from 0\.\d+ to 0\.\d+", printed)
    after = read_checkpoint(cut / "best.pt")
    for part in ("epoch", "split", "options", "class_names", "mpp", "reconstruct", "licence"):
        assert after[part] == before[part], part
    assert list(after["calibration"]) == list(OFFSETS)
    for name, value in before["model"].items():
        if name != "segmentation_head.bias":
            assert torch.equal(after["model"][name], value), name
    lowered = before["model"]["segmentation_head.bias"] - after["model"]["segmentation_head.bias"]
    best = max(after["calibration"], key=after["calibration"].get)
    assert torch.allclose(lowered, torch.tensor([best, 0, 0, 0, 0]), atol=1e-6)


def test_a_second_calibration_replaces_the_first(run, tmp_path, monkeypatch):
    def lower(model, *_):
        with torch.no_grad():
            model.segmentation_head.bias[0] -= 0.4
        return {0.0: 0.5, 0.4: 0.6}

    monkeypatch.setattr(script, "calibrate", lower)
    copy = shutil.copytree(run, tmp_path / "copy")
    before = read_checkpoint(copy / "best.pt")["model"]["segmentation_head.bias"]
    for _ in range(2):
        assert main(["--resume", str(copy), "--calibrate"]) == 0
        after = read_checkpoint(copy / "best.pt")["model"]["segmentation_head.bias"]
        assert (before - after).tolist() == pytest.approx([0.4, 0, 0, 0, 0], abs=1e-6)


def test_without_validation_images_a_preset_is_not_calibrated(run, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "calibrate", None)
    copy = shutil.copytree(run, tmp_path / "copy")
    saved = torch.load(copy / "last.pt")
    torch.save(saved | {"options": saved["options"] | {"calibrate": True}}, copy / "last.pt")
    assert main(["--resume", str(copy), "--epochs", "3", "--val-images", "0"]) == 0
    assert len((copy / "log.jsonl").read_text().splitlines()) == 3


def test_options_beside_resume_are_refused(run, tmp_path, capsys):
    for arguments, name in ((["--batch", "4"], "--batch"), (["--one-class"], "--one-class"),
                            (["--out", "x"], "--out"), (["--preset", "consep"], "--preset"),
                            (["--decoder-channels", *"88888"], "--decoder-channels")):
        error = fails(capsys, "--resume", str(run), *arguments)
        assert f"{name} cannot change beside --resume" in error and "--init" in error
    (tmp_path / "last.pt").write_bytes((run / "best.pt").read_bytes())
    assert "holds no training to continue; start from its weights with --init" in fails(
        capsys, "--resume", str(tmp_path))


def test_an_earlier_run_is_not_overwritten(run, folder, capsys):
    error = fails(capsys, "--data", str(folder), "--out", str(run), *TINY)
    assert f"{run} holds a run; continue it with --resume {run}, or give another --out" in error


def test_an_interrupt_ends_in_one_sentence(run, folder, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "train_epoch", interrupt)
    assert main(["--resume", str(run), "--epochs", "3"]) == 130
    error = capsys.readouterr().err
    assert error.endswith(f"\ninterrupted; continue with: python train.py --resume {run}\n")
    assert main(["--data", str(folder), "--out", str(tmp_path / "r"), *TINY]) == 130
    error = capsys.readouterr().err
    assert error.endswith("\ninterrupted before the end of the first epoch; nothing is saved\n")


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
        folder, tmp_path, monkeypatch, capsys):
    loss = script.dual_loss

    def broken(*maps, **options):
        terms = loss(*maps, **options)
        return terms | {"loss": terms["loss"] * math.nan}

    monkeypatch.setattr(script, "dual_loss", broken)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: pytest.fail("stepped"))
    error = fails(capsys, "--data", str(folder), "--out", str(tmp_path / "r"), *TINY)
    assert re.search(r"loss is nan at epoch 1, step 1; look at the images t\d(, t\d)?, or lower "
                     r"--rate$", error)


def test_memory_that_is_too_small_names_the_options(folder, tmp_path, monkeypatch, capsys):
    def too_much(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    monkeypatch.setattr(script, "train_epoch", too_much)
    assert fails(capsys, "--data", str(folder), "--out", str(tmp_path / "r"), *TINY) == (
        "error: out of memory; use a smaller --batch or --crop")


def test_init_keeps_all_but_the_rows_of_other_classes(run, tmp_path, capsys):
    other = build_model(parse_options(SMALL), ["nucleus"])
    head = other.segmentation_head.weight.clone()
    start_from(other, run / "best.pt")
    assert capsys.readouterr().out == f"starts from {run / 'best.pt'}; it does not know nucleus\n"
    assert torch.equal(other.segmentation_head.weight, head)
    loaded = load_model(run / "best.pt").state_dict()
    for name, value in other.state_dict().items():
        if not name.startswith("segmentation_head"):
            assert torch.equal(value, loaded[name]), name
    wider = build_model(parse_options([*SMALL, "--decoder-channels", *"99999"]), ["nucleus"])
    with pytest.raises(ValueError, match="best.pt: its .* does not fit; give the --encoder"):
        start_from(wider, run / "best.pt")

    # classes meet by name, in any order
    options = parse_options([*SMALL, "--init", str(run / "best.pt")])
    names = ["epithelial", "tumour", "miscellaneous"]
    model = build_model(options, names)
    load_weights(model, options)
    head = model.segmentation_head
    assert capsys.readouterr().out.endswith("best.pt; it does not know tumour\n")
    loaded = loaded["segmentation_head.weight"]
    assert torch.equal(head.weight[[0, 1, 3]], loaded[[0, 3, 1]])
    assert not any(torch.equal(head.weight[2], row) for row in loaded)

    # of a network of one class, every new class takes the row, and so the outlines
    save_checkpoint(tmp_path / "one.pt", other)
    start_from(model, tmp_path / "one.pt")
    assert capsys.readouterr().out.endswith("miscellaneous, which begin as its nucleus\n")
    assert torch.equal(head.weight[1:], other.segmentation_head.weight[1:].expand(3, -1, -1, -1))
    assert torch.equal(head.bias[0], other.segmentation_head.bias[0])


def test_labels_without_any_nucleus_are_refused(tmp_path, capsys):
    empty = write_tiles(tmp_path / "empty", range(30, 35), types=False)
    for path in (empty / "labels").iterdir():
        Image.new("L", (96, 96)).save(path)
    error = fails(capsys, "--data", str(empty), "--out", str(tmp_path / "r"), *TINY)
    assert error == (f"error: {empty}: no nucleus in the labels of the training images; look at "
                     "them with python data.py")


def test_partial_classes_and_another_resolution_go_the_whole_way(folder, tmp_path, capsys):
    partial = write_tiles(tmp_path / "partial", range(30, 35))
    for path in (partial / "types").iterdir():
        types = json.loads(path.read_text())
        path.write_text(json.dumps(dict(list(types.items())[::2])))
    call = ["--data", str(partial), "--mpp", "0.5", "--data-mpp", "0.25", *TINY, "--epochs", "1",
            "--class-weights", "sqrt", "--crop", "32"]
    assert main([*call, "--out", str(tmp_path / "r")]) == 0
    printed = capsys.readouterr().out
    total = sum(open_source(folder).read(i)[1].max() for i in range(4))
    unknown = int(re.search(r"of unknown class (\d+)", printed)[1])
    assert 0.3 * total < unknown < 0.6 * total
    config = load_model(tmp_path / "r" / "best.pt").config
    assert config["mpp"] == 0.5 and config["sigma"] == 2.5
    assert config["reconstruct"]["min_distance"] == 1


def test_two_processes_train_as_one(folder, root, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", "train.py", "--data", str(folder),
               "--out", str(tmp_path / "r"), *TINY, "--epochs", "1"]
    ended = subprocess.run(command, cwd=root, capture_output=True, timeout=200, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("training nuclei") == ended.stdout.count("epoch 1 of 1, ") == 1
    record = json.loads((tmp_path / "r" / "log.jsonl").read_text())
    assert np.isfinite(record["loss"]) and load_model(tmp_path / "r" / "best.pt")
