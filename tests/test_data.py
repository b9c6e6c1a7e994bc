"""data.py: every layout, partial classes, the check and its warnings, synthetic tissue."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image
from scipy import io, ndimage

from data import (
    CONSEP_CLASSES, PANNUKE_CLASSES, UNKNOWN_CLASS, Source, check_source, class_lookup,
    contact_sheet, crowded_window, main, nucleus_classes, open_source, synthetic_tissue,
)


def write_folder(root, count=3, types=None, **label_arrays):
    """A plain folder of 64² images with two square nuclei each; returns their label map."""
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    inst_map = np.zeros((64, 64), np.int32)
    inst_map[5:15, 5:15], inst_map[30:50, 30:40] = 3, 8  # ids with gaps
    for i in range(count):
        Image.fromarray(np.full((64, 64, 3), 20 * i + 80, np.uint8)).save(
            root / "images" / f"tile{i}.png")
        if label_arrays:
            np.savez(root / "labels" / f"tile{i}.npz", inst_map=inst_map, **label_arrays)
        else:
            Image.fromarray(inst_map.astype(np.uint16)).save(root / "labels" / f"tile{i}.png")
    if types is not None:
        (root / "types").mkdir()
        for i in range(count):
            (root / "types" / f"tile{i}.json").write_text(json.dumps(types))
    return inst_map


def problems_of(path, capsys, *arguments):
    """What `python data.py` prints of a folder that has problems."""
    code = main([str(path), "--out", str(path.parent / "check"), *arguments])
    printed = capsys.readouterr().out
    assert code == (0 if "\n0 problems" in printed else 1)
    return printed


# ---------------------------------------------------------------- layouts


def test_plain_folder_of_one_class(tmp_path):
    inst_map = write_folder(tmp_path)
    source = open_source(tmp_path)
    assert (source.names, source.class_names) == (["tile0", "tile1", "tile2"], ["nucleus"])
    image, found, type_map = pickle.loads(pickle.dumps(source)).read(1)  # as a worker receives it
    assert image.shape == (64, 64, 3) and (image == 100).all() and found.dtype == np.int32
    assert np.array_equal(found, np.select([inst_map == 3, inst_map == 8], [1, 2]))
    assert np.array_equal(type_map, inst_map > 0) and type_map.dtype == np.uint8
    problems, counts, areas, examples = check_source(source)
    assert problems == {} and counts.sum() == counts[1] == 6 and areas == [100, 200] * 3
    assert examples == {1: "tile0"}


@pytest.mark.parametrize("arrays", [
    {"type_map": "map"}, {"inst_type": np.array([[2], [1]])},
    {"id": np.array([8, 3]), "class": np.array([1, 2])},
])
@pytest.mark.parametrize("names", ['["a", "b"]', '{"0": "none", "1": "a", "2": "b"}'])
def test_plain_folder_with_classes_inside_the_labels(tmp_path, arrays, names):
    inst_map = write_folder(tmp_path / "x")
    expected = np.select([inst_map == 3, inst_map == 8], [2, 1], 0)
    arrays = {key: expected if isinstance(value, str) else value for key, value in arrays.items()}
    write_folder(tmp_path / "y", **arrays)
    with pytest.raises(ValueError, match="class '2', which is not among nucleus, .* classes.json"):
        open_source(tmp_path / "y").read(0)
    (tmp_path / "y" / "classes.json").write_text(names)
    source = open_source(tmp_path / "y")
    assert source.class_names == ["a", "b"] and np.array_equal(source.read(0)[2], expected)


def test_ids_without_a_class_are_nuclei_of_unknown_class(tmp_path):
    inst_map = write_folder(tmp_path, types={"3": "tumour"})
    (tmp_path / "types" / "tile1.json").write_text('{"8": "lymphocyte", "3": null}')
    (tmp_path / "types" / "tile2.json").write_text("{}")
    source = open_source(tmp_path)
    assert source.class_names == ["lymphocyte", "tumour"]
    for i, expected in enumerate(([2, 255], [255, 1], [255, 255])):
        found = np.select([inst_map == 3, inst_map == 8], expected)
        assert np.array_equal(source.read(i)[2], found)
    problems, counts, _, _ = check_source(source)
    assert counts[[1, 2, 255]].tolist() == [1, 1, 4] and not problems
    write_folder(tmp_path / "list", inst_type=np.array([0, 1]))
    (tmp_path / "list" / "classes.json").write_text('["a", "b"]')
    assert nucleus_classes(*open_source(tmp_path / "list").read(0)[1:]).tolist() == [255, 1]


def test_named_classes_become_unknown_or_are_refused(tmp_path):
    write_folder(tmp_path, types={"3": "tumour", "8": "debris"})
    source = open_source(tmp_path, unknown=["debris"])
    assert source.class_names == ["tumour"]
    assert nucleus_classes(*source.read(0)[1:]).tolist() == [1, UNKNOWN_CLASS]
    source = open_source(tmp_path, classes=["stroma", "debris", "tumour"])
    assert source.class_names == ["stroma", "debris", "tumour"]
    assert nucleus_classes(*source.read(0)[1:]).tolist() == [3, 2]
    with pytest.raises(ValueError, match="class 'debris' is not among tumour; name them") as error:
        open_source(tmp_path, classes=["tumour"])
    assert str(error.value).startswith(f"{tmp_path}: ")
    with pytest.raises(ValueError, match="no class tumor to take as unknown; there are debris, tu"):
        open_source(tmp_path, unknown=["tumor"])
    source = open_source("synthetic", unknown=["miscellaneous"], count=1)
    assert source.class_names == list(CONSEP_CLASSES[1:]) and source.read(0)[2].max() == 255
    one = open_source(tmp_path, classes=["nucleus"])
    assert nucleus_classes(*one.read(0)[1:]).tolist() == [1, 1]
    write_folder(tmp_path / "plain")  # a set without classes stays one
    assert open_source(tmp_path / "plain", classes=["a", "b"]).class_names == ["nucleus"]


def test_geojson_labels_with_classes_of_their_own(tmp_path):
    write_folder(tmp_path)
    ring = [[2, 2], [9, 2], [9, 9], [2, 9], [2, 2]]
    for i, classification in enumerate(({"name": "Tumor"}, {"name": "Stroma"}, None)):
        properties = {"classification": classification} if classification else {}
        content = {"type": "FeatureCollection", "features": [
            {"geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties}]}
        (tmp_path / "labels" / f"tile{i}.png").unlink()
        (tmp_path / "labels" / f"tile{i}.geojson").write_text(json.dumps(content))
    source = open_source(tmp_path)
    assert source.class_names == ["Stroma", "Tumor"]
    assert [source.read(i)[2][5, 5] for i in range(3)] == [2, 1, UNKNOWN_CLASS]
    for i in range(2):
        (tmp_path / "labels" / f"tile{i}.geojson").write_text(json.dumps(content))
    assert open_source(tmp_path).class_names == ["nucleus"]  # nobody has a class
    assert open_source(tmp_path).read(0)[2][5, 5] == 1


def test_consep_layout_merges_seven_types_to_four(tmp_path):
    (tmp_path / "Train" / "Images").mkdir(parents=True)
    (tmp_path / "Train" / "Labels").mkdir()
    inst_map = np.zeros((40, 40))
    for k in range(7):
        inst_map[5 * k:5 * k + 4, 3:9] = k + 1
    for i in (10, 2):
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(
            tmp_path / "Train" / "Images" / f"train_{i}.png")
        io.savemat(tmp_path / "Train" / "Labels" / f"train_{i}.mat",
                   {"inst_map": inst_map, "type_map": inst_map})
    source = open_source(tmp_path)
    assert source.names == ["train_2", "train_10"] and source.mpp == 0.25
    assert source.class_names == list(CONSEP_CLASSES)
    assert source.read(0)[2][::5, 3].tolist()[:7] == [1, 2, 3, 3, 4, 4, 4]
    part = open_source(tmp_path, unknown=["epithelial"])
    assert part.read(0)[2][::5, 3].tolist()[:7] == [1, 2, 255, 255, 3, 3, 3]
    io.savemat(tmp_path / "Train" / "Labels" / "train_2.mat",
               {"inst_map": inst_map, "type_map": inst_map + 1})
    with pytest.raises(ValueError, match="train_2.mat: id 7 is of class '8', which is not among"):
        source.read(0)


def test_pannuke_layout_is_mapped_and_split_by_class(tmp_path):
    folder = tmp_path / "Fold 2"
    (folder / "images" / "fold2").mkdir(parents=True)
    (folder / "masks" / "fold2").mkdir(parents=True)
    masks = np.zeros((2, 256, 256, 6))
    masks[0, :8, :8, 0] = masks[0, 20:28, :8, 4] = 7  # one id in two channels is two nuclei
    masks[..., 5] = ~masks[..., :5].any(-1)
    np.save(folder / "images/fold2/images.npy", np.full((2, 256, 256, 3), 200.0))
    np.save(folder / "images/fold2/types.npy", np.array(["Breast", "Colon"]))
    np.save(folder / "masks/fold2/masks.npy", masks)
    source = open_source(tmp_path)
    assert source.names == ["fold2/0", "fold2/1"] and source.tissues == ["Breast", "Colon"]
    assert source.class_names == list(PANNUKE_CLASSES)
    image, inst_map, type_map = source.read(0)
    assert image.dtype == np.uint8 and inst_map.max() == 2 and (type_map > 0).sum() == 128
    assert (type_map[:8, :8] == 1).all() and (type_map[20:28, :8] == 5).all()
    assert source.read(1)[1].max() == 0  # an empty tile is background, nothing else
    assert check_source(source)[1][1:6].tolist() == [1, 0, 0, 0, 1]
    assert open_source(tmp_path, unknown=["neoplastic"]).read(0)[2][0, 0] == UNKNOWN_CLASS
    (folder / "masks/fold2/masks.npy").unlink()
    with pytest.raises(FileNotFoundError, match="masks.npy: no such array"):
        source.read(0)


def test_classes_meet_by_name():
    assert class_lookup(Source([], ["b", "a"], None), ["a", "b"])[:3].tolist() == [0, 2, 1]
    assert class_lookup(Source([], ["nucleus"], None), ["a", "b"])[[1, 255]].tolist() == [255, 255]
    lookup = class_lookup(Source([], ["a", "b"], None), ["nucleus"])
    assert lookup[[0, 1, 2, 255]].tolist() == [0, 1, 1, 1]
    with pytest.raises(ValueError, match="class 'c' is not among a, b"):
        class_lookup(Source([], ["c"], None), ["a", "b"])


# ---------------------------------------------------------------- what wrong folders get


def test_unknown_layouts_say_what_was_found_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder; give a data set or the word syn"):
        open_source(tmp_path / "none")
    for i, (names, found) in enumerate((
            ((), "nothing"), (("images/a.png", "masks/a.png"), "images, masks"),
            (("Images/a.png", "Labels/a.png"), "Images, Labels"),
            (("Tissue Images/a.tif", "Annotations/a.xml"), "Annotations, Tissue Images"),
            (("images.npy", "labels.npy"), "images.npy, labels.npy"),
            (("images/a.png", "coco.json"), "coco.json, images"))):
        root = tmp_path / str(i)
        root.mkdir()
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("")
        with pytest.raises(ValueError, match=f"found {found}; expected images/ beside labels/ .*"
                                             "rename.*many tiles.*CoNSeP.*PanNuke.*XML.*COCO"):
            open_source(root)


def test_missing_labels_say_what_was_found(tmp_path, capsys):
    write_folder(tmp_path / "set", count=6)
    labels, images = tmp_path / "set" / "labels", tmp_path / "set" / "images"
    (labels / "tile0.png").rename(labels / "tile0_mask.png")
    for i, suffix in enumerate((".json", ".xml"), 1):
        (labels / f"tile{i}.png").rename(labels / f"tile{i}{suffix}")
    (labels / "tile3.npy").write_text("")  # beside tile3.png
    (images / "tile4.bmp").write_bytes((images / "tile4.png").read_bytes())
    (labels / "tile5.png").unlink()
    (images / "scan.svs").write_text("")
    (images / "._tile0.png").write_text("")  # macOS leaves these
    (images / "more").mkdir()
    printed = problems_of(tmp_path / "set", capsys)
    for words in (
            "labels/tile0 with one of .npy", "; found tile0_mask.png: rename or convert it (XML:",
            "; found tile1.json: ", "; found tile2.xml: ", "; found tile3.npy, tile3.png: ",
            "tile4.png: expected one label for it alone", "6 problems", "set: 7 images, 2 nuc",
            "; found tile0_mask.png, tile1.json, tile2.xml: add its label, or take the image out",
            "skipped 1 file that is no picture (.svs); 1 subfolder is not searched: more"):
        assert words in printed
    for path in labels.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="tile0.png: expected one label.*; found nothing: rename"):
        open_source(tmp_path / "set").read(0)
    for path in images.glob("*.*"):
        path.unlink()
    with pytest.raises(ValueError, match="images: no images in it; expected .png"):
        open_source(tmp_path / "set")


def test_all_problems_at_once(tmp_path, capsys):
    write_folder(tmp_path / "set", count=5, types={"3": "a", "8": "b"})
    types, labels = tmp_path / "set" / "types", tmp_path / "set" / "labels"
    (types / "tile0.json").write_text("7")
    (types / "tile1.json").unlink()
    Image.fromarray(np.zeros((10, 12), np.uint8)).save(labels / "tile2.png")
    image = Image.new("RGB", (64, 64))
    image.save(tmp_path / "set" / "images" / "tile3.png", exif=bytes.fromhex(
        "4578696600004d4d002a000000080001011200030000000100060000"))  # orientation 6
    printed = problems_of(tmp_path / "set", capsys)
    for words in ("tile0.json: not a readable JSON file", "tile1.png: no classes in it; expected",
                  "tile2.png: labels are uint8 (10, 12), the image is (64, 64)",
                  "tile3.png: it has an EXIF orientation", "4 problems", "  a: 1\n  b: 1\n"):
        assert words in printed


def test_masks_stop_the_check_and_the_training(tmp_path, capsys):
    inst_map = write_folder(tmp_path / "set")
    for i in range(3):
        mask = np.uint8(255 * (inst_map > 0))
        Image.fromarray(mask).save(tmp_path / "set" / "labels" / f"tile{i}.png")
    printed = problems_of(tmp_path / "set", capsys)
    assert printed.count("id 255 covers 2 separate pieces: a mask") == 3
    assert "warning: no nucleus was read" not in printed  # the problems tell why
    with pytest.raises(ValueError, match="a mask, not instances"):
        open_source(tmp_path / "set").read(0)  # as training does


# ---------------------------------------------------------------- resolution


def test_resolution_is_what_the_images_state(tmp_path):
    write_folder(tmp_path)
    assert open_source(tmp_path).mpp == 0.25
    assert "no resolution in the images: assumed 0.25" in open_source(tmp_path).notes[-1]
    for i in range(3):
        Image.new("RGB", (64, 64)).save(tmp_path / "images" / f"tile{i}.png", dpi=(50800, 50800))
    source = open_source(tmp_path)
    assert source.mpp == pytest.approx(0.5, abs=1e-3)
    assert "the images state 0.5 µm per pixel" in source.notes[-1] and source.read(0)
    assert open_source(tmp_path, mpp=0.3).mpp == 0.3 and open_source(tmp_path, mpp=0.3).read(0)
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "tile1.png", dpi=(101600, 101600))
    with pytest.raises(ValueError, match="tile1.png: it states 0.25 µm per pixel, but the se"):
        open_source(tmp_path).read(1)
    with pytest.raises(ValueError, match="500 µm per pixel is implausible"):
        open_source(tmp_path, mpp=500)


# ---------------------------------------------------------------- the check


def test_the_check_warns_of_doubtful_classes_and_sizes(tmp_path, capsys):
    write_folder(tmp_path / "set", types={"3": "small", "8": "large"})
    (tmp_path / "set" / "types" / "tile1.json").write_text('{"3": "smal", "8": 1}')
    (tmp_path / "set" / "types" / "tile2.json").write_text("{}")
    printed = problems_of(tmp_path / "set", capsys, "--data-mpp", "0.1")
    for words in ("classes 'smal' and 'small' are nearly alike", "class '1' is a number among",
                  "class 'smal' has 1 nuclei, the first in tile1: misspelt, or too rare?",
                  "  large: 1\n", "\n0 problems", "of unknown class: 2",
                  "median diameter: 1.4 µm at 0.1 µm per pixel (usual: 6 to 10",
                  "warning: that is far off; 0.25 µm per pixel is 40x, 0.5 is 20x; give --data-m"):
        assert words in printed
    printed = problems_of(tmp_path / "set", capsys, "--classes", "small, large")
    for name in ("1", "smal"):
        assert (f"problem: class '{name}' is not among small, large; it has 1 nuclei, the first in "
                "tile1\n") in printed
    assert "\n2 problems" in printed
    printed = problems_of(tmp_path / "none", capsys)
    assert "problem: " in printed and "\n1 problem\n" in printed
    printed = problems_of(tmp_path / "set", capsys, "--data-mpp", "72")
    assert "problem: --data-mpp: 72 µm per pixel is implausible" in printed
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "set"), "--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    write_folder(tmp_path / "empty", count=1)
    Image.new("L", (64, 64)).save(tmp_path / "empty" / "labels" / "tile0.png")
    assert "warning: no nucleus was read" in problems_of(tmp_path / "empty", capsys)


def test_classes_without_end_are_refused(tmp_path):
    write_folder(tmp_path, types={"3": "a", "8": "b"})
    names = [f"nucleus {k}" for k in range(300)]
    (tmp_path / "classes.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match="300 classes, such as 'nucleus 0'; expected fewer than"):
        open_source(tmp_path)


def test_the_contact_sheet_shows_nuclei(tmp_path):
    inst_map = np.zeros((600, 500), np.int32)
    inst_map[510:560, 30:70], inst_map[100:105, 300:305] = 4, 9
    rows, columns = crowded_window(inst_map, 128)
    assert (inst_map[rows, columns] == 4).sum() == 2000 and columns.stop - columns.start == 128
    type_map = np.select([inst_map == 4, inst_map == 9], [UNKNOWN_CLASS, 1]).astype(np.uint8)
    sample = np.full((600, 500, 3), 200, np.uint8), inst_map, type_map
    names = [f"tile{i}" for i in range(30)]
    source = Source(names, ["a", "b"], dict.fromkeys(range(30), sample).get)
    sheet = contact_sheet(source, list(range(30)))
    assert sheet.width > 6 * 256 and sheet.height > 3 * 256  # every second of the 30
    write_folder(tmp_path / "set")
    assert main([str(tmp_path / "set"), "--out", str(tmp_path / "check")]) == 0
    assert (tmp_path / "check" / "contact_set.png").exists()


# ---------------------------------------------------------------- synthetic tissue


def test_synthetic_tissue_is_whole_and_the_same_for_the_same_seed():
    counts = []
    for seed in range(6):
        image, inst_map, type_map = synthetic_tissue(seed, (96, 160))
        assert image.shape == (96, 160, 3) and image.dtype == np.uint8
        assert inst_map.dtype == np.int32 and type_map.dtype == np.uint8
        counts.append(int(inst_map.max()))
        assert len(np.unique(inst_map)) == counts[-1] + 1
        assert np.array_equal(inst_map > 0, type_map > 0)
        for i in range(1, counts[-1] + 1):
            assert ndimage.label(inst_map == i)[1] == 1
            assert len(np.unique(type_map[inst_map == i])) == 1
        again = synthetic_tissue(seed, (96, 160))
        assert all(np.array_equal(a, b) for a, b in zip(again, (image, inst_map, type_map)))
    assert max(counts) > 10


def test_synthetic_nuclei_touch_are_dark_and_of_every_class():
    classes, touching = [], 0
    for seed in range(40):
        image, inst_map, type_map = synthetic_tissue(seed, 128)
        classes += nucleus_classes(inst_map, type_map).tolist()
        beside = (inst_map[1:] != inst_map[:-1]) & (inst_map[1:] > 0) & (inst_map[:-1] > 0)
        touching += beside.any()
        if inst_map.any():
            assert image[inst_map > 0].mean() < image[inst_map == 0].mean() - 20
    assert min(np.bincount(classes)[1:]) > 20 and touching > 30
    empty = [not synthetic_tissue(seed, 128)[1].any() for seed in range(100)]
    assert 1 < sum(empty) < 12  # about one in twenty
