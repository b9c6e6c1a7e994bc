"""data.py: readers of every layout, targets, augmentation, synthetic tissue, and what bad files get for an answer."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image
from scipy import io, ndimage

import dualunet
from data import (
    CONSEP_CLASSES, UNKNOWN_CLASS, Crops, Source, augment, centroids_of, class_lookup, cut, density_map, open_source,
    read_image, read_labels, stain_shift, synthetic_tissue,
)


def write_folder(root, count=3, **label_arrays):
    """A plain folder of `count` 64² images with two square nuclei each."""
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    inst_map = np.zeros((64, 64), np.int32)
    inst_map[5:15, 5:15], inst_map[30:50, 30:40] = 3, 8  # ids with gaps
    for i in range(count):
        Image.fromarray(np.full((64, 64, 3), 40 * i + 80, np.uint8)).save(root / "images" / f"tile{i}.png")
        if label_arrays:
            np.savez(root / "labels" / f"tile{i}.npz", inst_map=inst_map, **label_arrays)
        else:
            Image.fromarray(inst_map.astype(np.uint16)).save(root / "labels" / f"tile{i}.png")
    return inst_map


# ---------------------------------------------------------------- readers


def test_plain_folder_of_one_class(tmp_path):
    inst_map = write_folder(tmp_path)
    source = open_source(tmp_path)
    assert (source.names, source.class_names) == (["tile0", "tile1", "tile2"], ["nucleus"])
    image, found, type_map = source.read(1)
    assert image.shape == (64, 64, 3) and (image == 120).all() and found.dtype == np.int32
    assert np.array_equal(found, inst_map) and np.array_equal(type_map, inst_map > 0)


@pytest.mark.parametrize("arrays", [
    {"type_map": "map"}, {"inst_type": np.array([[2], [1]])}, {"id": np.array([8, 3]), "class": np.array([1, 2])},
])
def test_plain_folder_with_classes_inside_the_labels(tmp_path, arrays):
    inst_map = write_folder(tmp_path / "x")
    expected = np.select([inst_map == 3, inst_map == 8], [2, 1], 0)
    arrays = {k: expected if v is not None and isinstance(v, str) else v for k, v in arrays.items()}
    write_folder(tmp_path / "y", **arrays)
    (tmp_path / "y" / "classes.json").write_text('["a", "b"]')
    source = open_source(tmp_path / "y")
    assert source.class_names == ["a", "b"] and np.array_equal(source.read(0)[2], expected)


def test_plain_folder_with_types_beside_the_labels(tmp_path):
    inst_map = write_folder(tmp_path)
    (tmp_path / "types").mkdir()
    for i in range(3):
        (tmp_path / "types" / f"tile{i}.json").write_text(json.dumps({"3": "tumour", "8": "lymphocyte"}))
    source = open_source(tmp_path)
    assert source.class_names == ["lymphocyte", "tumour"]
    assert np.array_equal(source.read(2)[2], np.select([inst_map == 3, inst_map == 8], [2, 1], 0))
    (tmp_path / "types" / "tile0.json").write_text('{"3": "tumour"}')
    with pytest.raises(ValueError, match="tile0.json: id 8 has a class or pixels but not both"):
        source.read(0)
    (tmp_path / "types" / "tile0.json").write_text('{"3": "tumour", "8": "stranger"}')
    with pytest.raises(ValueError, match="tile0.json: class 'stranger' is not among lymphocyte, tumour"):
        source.read(0)


def test_consep_layout_merges_seven_types_to_four(tmp_path):
    (tmp_path / "Train" / "Images").mkdir(parents=True)
    (tmp_path / "Train" / "Labels").mkdir()
    inst_map = np.zeros((40, 40))
    for k in range(7):
        inst_map[5 * k:5 * k + 4, 3:9] = k + 1
    for i in (10, 2):
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "Train" / "Images" / f"train_{i}.png")
        io.savemat(tmp_path / "Train" / "Labels" / f"train_{i}.mat", {"inst_map": inst_map, "type_map": inst_map})
    source = open_source(tmp_path)
    assert source.names == ["train_2", "train_10"] and source.class_names == CONSEP_CLASSES
    assert source.read(0)[2][::5, 3].tolist()[:7] == [1, 2, 3, 3, 4, 4, 4]
    io.savemat(tmp_path / "Train" / "Labels" / "train_2.mat", {"inst_map": inst_map, "type_map": inst_map + 1})
    with pytest.raises(ValueError, match="train_2.mat: class ids 1..8; CoNSeP has 0..7"):
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
    image, inst_map, type_map = source.read(0)
    assert image.dtype == np.uint8 and inst_map.max() == 2
    assert (type_map[:8, :8] == 1).all() and (type_map[20:28, :8] == 5).all() and (type_map > 0).sum() == 128
    assert source.read(1)[1].max() == 0  # an empty tile is background, nothing else


def test_wrong_data_ends_in_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder; give a data set or the word synthetic"):
        open_source(tmp_path / "none")
    with pytest.raises(ValueError, match="no labelled images found; expected CoNSeP"):
        open_source(tmp_path)
    write_folder(tmp_path / "size")
    Image.fromarray(np.zeros((10, 12), np.uint8)).save(tmp_path / "size" / "labels" / "tile0.png")
    with pytest.raises(ValueError, match=r"tile0.png: labels are \(10, 12\), the image is \(64, 64\)"):
        open_source(tmp_path / "size").read(0)
    (tmp_path / "size" / "labels" / "tile1.png").unlink()
    with pytest.raises(ValueError, match="no label for tile1.png"):
        open_source(tmp_path / "size")
    write_folder(tmp_path / "class", inst_type=np.array([1, 9]))
    (tmp_path / "class" / "classes.json").write_text('["a", "b"]')
    with pytest.raises(ValueError, match="class ids 1..9; the list of classes has 2"):
        open_source(tmp_path / "class").read(0)
    np.save(tmp_path / "pickle.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "float.npy", np.full((4, 4), 0.5))
    np.save(tmp_path / "negative.npy", np.full((4, 4), -1))
    np.save(tmp_path / "huge.npy", np.full((4, 4), 2**40))
    np.savez(tmp_path / "other.npz", masks=np.zeros((4, 4)))
    (tmp_path / "text.mat").write_text("hello")
    for name, words in {"pickle.npy": "not a readable label file", "float.npy": "no whole numbers",
                        "negative.npy": "ids -1..-1; expected 0", "huge.npy": "expected 0..2147483647",
                        "other.npz": "no array inst_map in it, found masks", "text.mat": "not a readable label"}.items():
        with pytest.raises(ValueError, match=f"{name}.*{words}"):
            read_labels(tmp_path / name)


def test_images_of_every_mode(tmp_path):
    grey = np.arange(0, 240, 10, np.uint8).reshape(4, 6)
    rgb = np.repeat(grey[..., None], 3, 2)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    Image.fromarray(np.dstack([rgb, np.full((4, 6), 255, np.uint8)])).save(tmp_path / "rgba.png")
    Image.fromarray(rgb).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(rgb).save(tmp_path / "rgb.tif")
    for name in ("grey.png", "sixteen.png", "rgba.png", "rgb.tif"):
        assert np.array_equal(read_image(tmp_path / name), rgb), name
    assert read_image(tmp_path / "palette.png").shape == (4, 6, 3)
    Image.fromarray(np.zeros((2, 2, 4), np.uint8)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 255).all()  # nothing there is glass, not ink
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    Image.fromarray(rgb).save(tmp_path / "turned.tif", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.tif"), np.rot90(rgb, -1))


def test_bad_images_end_in_a_sentence(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:300])
    Image.fromarray(np.full((2, 2), 1e6, np.float32)).save(tmp_path / "float.tif")
    for name, words in {"text.png": "not a readable image", "cut.jpg": "not a readable image",
                        "float.tif": "expected 8 or 16 bits"}.items():
        with pytest.raises(ValueError, match=f"{name}: .*{words}"):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match="declares 64x64 pixels, more than 100"):
        read_image(tmp_path / "whole.jpg", max_pixels=100)
    with pytest.raises(FileNotFoundError, match="no such image"):
        read_image(tmp_path / "none.png")


# ---------------------------------------------------------------- targets and augmentation


def test_density_peaks_at_one_whatever_the_neighbours():
    centroids = [(20, 20), (20, 26), (50, 40)]
    density = density_map(centroids, (64, 64))
    assert [density[y, x] for y, x in centroids] == [1, 1, 1] and density.dtype == np.float32
    yy, xx = np.mgrid[:64, :64]
    plain = np.max([np.exp(-((yy - y) ** 2 + (xx - x) ** 2) / 50) for y, x in centroids], 0)
    assert np.allclose(density, plain, atol=1e-6)
    published = density_map(centroids, (64, 64), combine="sum")
    assert published.max() == 1 and published[50, 40] < 0.8  # the isolated nucleus fades
    assert not density_map([], (8, 8)).any() and not density_map([], (8, 8), combine="sum").any()
    assert density_map([(-3, 5)], (8, 8))[0, 5] == pytest.approx(np.exp(-9 / 50))  # its peak lies outside
    with pytest.raises(ValueError, match="expected 'max' or 'sum'"):
        density_map([(1, 1)], (8, 8), combine="mean")


def test_a_turned_nucleus_keeps_its_peak(tissue):
    for n in range(12):
        image, inst_map, type_map = augment(tissue, np.random.default_rng(n), 96, stain=0, blur=0)
        assert image.shape == (128, 128, 3) and inst_map.shape == type_map.shape == (128, 128)
        assert np.array_equal(inst_map > 0, type_map > 0)
        if inst_map.any():
            od = -np.log((image.mean(-1) + 1) / 256)
            assert od[inst_map > 0].mean() > od[inst_map == 0].mean()  # the labels moved with the image
    _, whole, _ = augment(tissue, np.random.default_rng(0), 96, scale=1.0)
    inner = whole[16:112, 16:112]
    inside = [i for i in np.unique(inner)[1:] if (whole == i).sum() == (inner == i).sum()]
    for i in inside:
        y, x = ndimage.center_of_mass(whole == i)
        found = centroids_of(whole)[np.unique(whole)[1:].tolist().index(i)]
        assert np.allclose((y, x), found)


def test_reflection_makes_other_nuclei():
    inst_map = np.zeros((8, 8), np.int32)
    inst_map[1:3, 1:3] = 5
    sample = (np.zeros((8, 8, 3), np.uint8), inst_map, (inst_map > 0).astype(np.uint8))
    image, found, types = cut(sample, -6, -6, 20, 20)
    assert image.shape == (20, 20, 3) and np.array_equal(found > 0, types > 0)
    assert len(np.unique(found)) - 1 == 4 + 0 + ndimage.label(found)[1] - 4
    assert np.array_equal(cut(sample, 0, 0, 8, 8)[1] > 0, inst_map > 0)
    assert np.array_equal(image[:, :, 0], np.pad(sample[0][..., 0], 6, mode="reflect"))


def test_stain_shift_of_nothing_changes_nothing_and_more_haematoxylin_is_darker(tissue):
    image = tissue[0]
    same = stain_shift(image, np.ones(3), np.zeros(3))
    assert np.abs(same.astype(int) - image).max() <= 1
    assert stain_shift(image, np.array([1.5, 1, 1]), np.zeros(3)).mean() < image.mean()


def test_crops_depend_on_seed_and_number_alone(tissue):
    source = Source(["tile"], CONSEP_CLASSES, Always(tissue))
    make = lambda seed: Crops([(source, [0], 1.0)], CONSEP_CLASSES, crop=64, seed=seed)  # noqa: E731
    crops = make(0)
    again = pickle.loads(pickle.dumps(make(0)))  # as a worker process receives it
    crops[3]
    for a, b in zip(crops[7], again[7]):
        assert np.array_equal(a.numpy(), b.numpy())
    assert not np.array_equal(crops[7][0].numpy(), make(1)[7][0].numpy())
    image, type_map, density = crops[7]
    assert image.shape == (3, 64, 64) and type_map.shape == (64, 64) and density.shape == (1, 64, 64)
    assert crops.name(7) == "tile"


class Always:
    """A reader that returns one sample; picklable, as readers must be."""

    def __init__(self, sample):
        self.sample = sample

    def __call__(self, i):
        return self.sample


def test_classes_meet_by_name():
    read = Always(None)
    assert class_lookup(Source([], ["b", "a"], read), ["a", "b"])[:3].tolist() == [0, 2, 1]
    assert class_lookup(Source([], ["nucleus"], read), ["a", "b"])[1] == UNKNOWN_CLASS == dualunet.UNKNOWN_CLASS
    assert class_lookup(Source([], ["a", "b"], read), ["nucleus"])[:3].tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="class 'c' is not among a, b"):
        class_lookup(Source([], ["c"], read), ["a", "b"])


# ---------------------------------------------------------------- synthetic tissue


def test_synthetic_tissue_is_whole_and_the_same_for_the_same_seed():
    counts = []
    for seed in range(6):
        image, inst_map, type_map = synthetic_tissue(seed, (96, 160))
        assert image.shape == (96, 160, 3) and image.dtype == np.uint8 and inst_map.dtype == np.int32
        ids = np.unique(inst_map)
        assert ids.tolist() == list(range(len(ids))) and np.array_equal(inst_map > 0, type_map > 0)
        for i in ids[1:]:
            assert ndimage.label(inst_map == i)[1] == 1 and len(np.unique(type_map[inst_map == i])) == 1
        counts.append(len(ids) - 1)
        assert all(np.array_equal(a, b) for a, b in zip(synthetic_tissue(seed, (96, 160)), (image, inst_map, type_map)))
    assert max(counts) > 10
