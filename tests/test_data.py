"""data.py: readers of every layout, targets, augmentation, synthetic tissue, what bad files get."""

import json
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import io, ndimage
from torch.utils.data import DataLoader

import dualunet
from data import (
    CONSEP_CLASSES, UNKNOWN_CLASS, Crops, Source, augment, centroids_of, check_source, class_lookup,
    cut, density_map, main, mapped, open_image, open_source, read_image, read_labels,
    read_predictions, stain_shift, synthetic_tissue,
)


def write_folder(root, count=3, **label_arrays):
    """A plain folder of `count` 64² images with two square nuclei each."""
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    inst_map = np.zeros((64, 64), np.int32)
    inst_map[5:15, 5:15], inst_map[30:50, 30:40] = 3, 8  # ids with gaps
    for i in range(count):
        Image.fromarray(np.full((64, 64, 3), 40 * i + 80, np.uint8)).save(
            root / "images" / f"tile{i}.png")
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
    assert np.array_equal(found, np.select([inst_map == 3, inst_map == 8], [1, 2]))  # without gaps
    assert np.array_equal(type_map, inst_map > 0) and check_source(source) == ({}, [6])


@pytest.mark.parametrize("arrays", [
    {"type_map": "map"}, {"inst_type": np.array([[2], [1]])},
    {"id": np.array([8, 3]), "class": np.array([1, 2])},
])
def test_plain_folder_with_classes_inside_the_labels(tmp_path, arrays):
    inst_map = write_folder(tmp_path / "x")
    expected = np.select([inst_map == 3, inst_map == 8], [2, 1], 0)
    write_folder(tmp_path / "y",
                 **{k: expected if isinstance(v, str) else v for k, v in arrays.items()})
    (tmp_path / "y" / "classes.json").write_text('["a", "b"]')
    source = open_source(tmp_path / "y")
    assert source.class_names == ["a", "b"] and np.array_equal(source.read(0)[2], expected)


def test_plain_folder_with_types_beside_the_labels(tmp_path):
    inst_map = write_folder(tmp_path)
    (tmp_path / "types").mkdir()
    for i in range(3):
        (tmp_path / "types" / f"tile{i}.json").write_text(
            json.dumps({"3": "tumour", "8": "lymphocyte"}))
    source = open_source(tmp_path)
    assert source.class_names == ["lymphocyte", "tumour"]
    assert np.array_equal(source.read(2)[2], np.select([inst_map == 3, inst_map == 8], [2, 1], 0))
    for i, text in enumerate(('{"3": "tumour"}', '{"3": "tumour", "8": "stranger"}', "7")):
        (tmp_path / "types" / f"tile{i}.json").write_text(text)
    problems, counts = check_source(source)  # every problem, and what the rest holds
    assert [p.split(": ", 1)[1][:50] for p in problems.values()] == [
        "id 8 has a class or pixels but not both; expected ",
        "class 'stranger' is not among lymphocyte, tumour (",
        "not a readable JSON file ('int' object is not iter"] and counts == [0, 0]


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
    assert source.names == ["train_2", "train_10"] and source.class_names == CONSEP_CLASSES
    assert source.read(0)[2][::5, 3].tolist()[:7] == [1, 2, 3, 3, 4, 4, 4]
    io.savemat(tmp_path / "Train" / "Labels" / "train_2.mat",
               {"inst_map": inst_map, "type_map": inst_map + 1})
    with pytest.raises(ValueError, match=r"train_2.mat: class 8.0 is not among .* \(1..7\)"):
        source.read(0)


def test_matlab_files_are_read_as_scipy_reads_them_and_survive_damage(tmp_path):
    path, arrays = tmp_path / "a.mat", {
        "inst_map": np.arange(40.0).reshape(5, 8), "id": np.arange(3, dtype=np.int16)[None],
        "one": np.float32([[2]]), "flags": np.eye(2) > 0}
    for compressed in (False, True):
        io.savemat(path, arrays | {"cell": np.array([1, "x"], object), "s": {"a": "text"}},
                   do_compression=compressed)
        whole, found = path.read_bytes(), read_labels(path)[1]
        assert (found.keys() == arrays.keys()
                and all(np.array_equal(found[k], v) for k, v in arrays.items()))
        rng = np.random.default_rng(0)
        for _ in range(300):  # loadmat dies of a dozen of them
            damaged = bytearray(whole[:rng.integers(len(whole) // 2, len(whole) + 1)])
            damaged[rng.integers(len(damaged))] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                read_labels(path)
            except ValueError as error:
                assert str(error).startswith(f"{path}: ")
    for values, words in ((np.eye(3) * 1j, "not a readable label file"),
                          (np.eye(3) * 0.5, "expected whole numbers")):
        io.savemat(path, {"inst_map": values})
        with pytest.raises(ValueError, match=words):
            read_labels(path)
    io.savemat(path, arrays, format="4")
    with pytest.raises(ValueError, match="save it with -v7"):
        read_labels(path)


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
    assert ((type_map[:8, :8] == 1).all() and (type_map[20:28, :8] == 5).all()
            and (type_map > 0).sum() == 128)
    assert source.read(1)[1].max() == 0  # an empty tile is background, nothing else
    assert check_source(source)[1] == [1, 0, 0, 0, 1]
    np.save(folder / "images/fold2/types.npy", np.array(["Breast"]))
    mapped.cache_clear()
    with pytest.raises(ValueError, match="Fold 2: images, masks and types differ in number"):
        open_source(tmp_path)


def test_wrong_data_ends_in_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError,
                       match="no such folder; give a data set or the word synthetic"):
        open_source(tmp_path / "none")
    with pytest.raises(ValueError, match="no labelled images found; expected CoNSeP"):
        open_source(tmp_path)
    write_folder(tmp_path / "size")
    Image.fromarray(np.zeros((10, 12), np.uint8)).save(tmp_path / "size" / "labels" / "tile0.png")
    with pytest.raises(ValueError,
                       match=r"tile0.png: labels are \(10, 12\), the image is \(64, 64\)"):
        open_source(tmp_path / "size").read(0)
    (tmp_path / "size" / "labels" / "tile1.png").unlink()
    with pytest.raises(ValueError, match="no label for tile1.png"):
        open_source(tmp_path / "size")
    write_folder(tmp_path / "class", inst_type=np.array([1, 9]))
    (tmp_path / "class" / "classes.json").write_text('["a", "b"]')
    with pytest.raises(ValueError, match=r"class 9 is not among a, b \(1..2\)"):
        open_source(tmp_path / "class").read(0)
    np.save(tmp_path / "pickle.npy", np.array([{}], object), allow_pickle=True)
    for name, value in (("float", 0.5), ("negative", -1), ("huge", 2**40)):
        np.save(tmp_path / f"{name}.npy", np.full((4, 4), value))
    np.savez(tmp_path / "other.npz", masks=np.zeros((4, 4)))
    (tmp_path / "text.mat").write_text("hello")
    for name, words in {
        "pickle.npy": "not a readable label file",
        "float.npy": "ids 0.5..0.5; expected whole numbers",
        "negative.npy": "ids -1..-1; expected whole", "huge.npy": "numbers 0..2147483647",
        "other.npz": "no array inst_map in it, found masks", "text.mat": "not a readable label",
    }.items():
        with pytest.raises(ValueError, match=f"{name}.*{words}"):
            read_labels(tmp_path / name)


def test_predictions_come_back_with_their_classes(tmp_path):
    Image.fromarray(np.array([[0, 1], [2, 2]], np.int32)).save(tmp_path / "x_instances.tif")
    (tmp_path / "x_nuclei.csv").write_text("id,class\n2,a\n1,b\n")
    assert read_predictions(tmp_path, "x", ["a", "b"])[1].tolist() == [2, 1]
    for text, words in (("id,class\n2,a\n", "id 1 has a class or pixels but not both"),
                        ("a\n1\n", "run infer.py again"),
                        ("id,class\n1,a\n2,c\n", "class 'c' is not among a, b")):
        (tmp_path / "x_nuclei.csv").write_text(text)
        with pytest.raises(ValueError, match=f"x_nuclei.csv: .*{words}"):
            read_predictions(tmp_path, "x", ["a", "b"])


def test_images_of_every_mode(tmp_path):
    grey = np.arange(0, 240, 10, np.uint8).reshape(4, 6)
    rgb = np.repeat(grey[..., None], 3, 2)
    image, other = Image.fromarray(rgb), [Image.fromarray(255 - rgb)]
    for name, kind in (("grey.png", np.uint8), ("sixteen.png", np.uint16),
                       ("big_endian.tif", ">u2")):
        Image.fromarray(grey.astype(kind) * (1 if kind is np.uint8 else 257)).save(tmp_path / name)
    for mode in ("RGBA", "LA"):
        image.convert(mode).save(tmp_path / f"{mode}.png")
    image.convert("P").save(tmp_path / "palette.png", transparency=bytes([255] * 256))
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    for name in ("frames.tif", "frames.png", "frames.gif"):
        image.save(tmp_path / name, save_all=True, append_images=other)  # the first frame counts
    for path in tmp_path.iterdir():
        assert np.abs(read_image(path).astype(int) - rgb).max() <= 40 * (
            path.name == "palette.png"), path.name
    image.convert("1", dither=0).save(tmp_path / "bit.png")
    assert np.array_equal(read_image(tmp_path / "bit.png"), np.uint8(rgb >= 128) * 255)
    image.quantize(8).save(tmp_path / "clear.png", transparency=bytes(8))
    assert (read_image(tmp_path / "clear.png") == 255).all()  # nothing there is glass, not ink
    image.save(tmp_path / "turned.tif", tiffinfo={274: 6})  # EXIF: to be turned by 90 degrees
    assert np.array_equal(read_image(tmp_path / "turned.tif"), np.rot90(rgb, -1))


def write_header(path, width, height):
    """A PNG of the declared size that holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"0")), (b"IEND", b"")))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def test_bad_images_end_in_a_sentence(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:300])
    Image.fromarray(np.full((2, 2), 1e6, np.float32)).save(tmp_path / "float.tif")
    for name, *size in (("bomb.png", 50_000, 50_000), ("nothing.png", 0, 5), ("short.png", 9, 9)):
        write_header(tmp_path / name, *size)
    for name, words in {"text.png": "not a readable image", "program.png": "unknown format",
                        "short.png": "truncated", "bomb.png": "declares 50000x50000 pixels",
                        "nothing.png": "not a readable image", "cut.jpg": "not a readable image",
                        "float.tif": "expected 8 or 16 bits"}.items():
        with pytest.raises(ValueError, match=f"{name}: .*{words}"):
            read_image(tmp_path / name)
    for words, read, *arguments in (("g: declares 50000x50000", read_labels, "bomb.png"),
                                    ("none: no such image", read_image, "none"),
                                    ("more than 100; cut it", read_image, "whole.jpg", 100)):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            read(tmp_path / arguments[0], *arguments[1:])
    for side in 10_000, 15_000:  # Pillow alone would warn of the one, refuse the other
        write_header(tmp_path / "large.png", side, side)
        with open_image(tmp_path / "large.png") as image:
            assert image.size == (side, side) and Image.MAX_IMAGE_PIXELS < side**2


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
    assert density_map([(-3, 5)], (8, 8))[0, 5] == pytest.approx(np.exp(-9 / 50))  # peak is outside
    with pytest.raises(ValueError, match="expected 'max' or 'sum'"):
        density_map([(1, 1)], (8, 8), combine="mean")


def test_a_turned_nucleus_keeps_its_peak(tissue):
    for n in range(12):
        image, inst_map, type_map = augment(tissue, np.random.default_rng(n), 96, stain=0, blur=0)
        assert image.shape == (128, 128, 3) and np.array_equal(inst_map > 0, type_map > 0)
        if inst_map.any():  # the labels moved with the image
            assert image[inst_map > 0].mean() < image[inst_map == 0].mean()
    for n in range(12):  # without zoom, turn and stain: pixels as they are, moved
        image, whole, _ = augment(tissue, np.random.default_rng(n), 96,
                                  scale=1.0, turn=0, stain=0, blur=0)
        assert ({tuple(p) for p in image.reshape(-1, 3).tolist()}
                <= {tuple(p) for p in tissue[0].reshape(-1, 3).tolist()})
    assert np.allclose(centroids_of(whole),
                       [ndimage.center_of_mass(whole == i) for i in np.unique(whole)[1:]])


def test_reflection_makes_other_nuclei():
    inst_map = np.zeros((8, 8), np.int32)
    inst_map[1:3, 1:3], inst_map[6:, 5:] = 1, 2  # the second reaches the corner, and its own image
    sample = (np.zeros((8, 8, 3), np.uint8), inst_map, (inst_map > 0).astype(np.uint8))
    image, found, types = cut(sample, -4, -4, 16, 16)
    assert (np.array_equal(types, np.pad(sample[2], 4, mode="reflect"))
            and np.array_equal(found > 0, types > 0))
    assert len(np.unique(found)) - 1 == 4 + 4 and image.shape == (16, 16, 3)
    assert np.array_equal(cut(sample, 0, 0, 8, 8)[1], inst_map)  # whole at every border
    assert cut([m[:1, :1] for m in sample], -2, -1, 5, 6)[0].shape == (5, 6, 3)


def test_stain_shift_of_nothing_changes_nothing_and_more_haematoxylin_is_darker(tissue):
    assert np.abs(
        stain_shift(tissue[0], np.ones(3), np.zeros(3)).astype(int) - tissue[0]).max() <= 1
    assert stain_shift(tissue[0], np.array([1.5, 1, 1]), np.zeros(3)).mean() < tissue[0].mean()


def test_crops_depend_on_seed_and_number_alone(tissue):
    source = Source(["tile"], CONSEP_CLASSES, {0: tissue}.get)
    crops, other = (Crops([(source, [0], 1.0)], CONSEP_CLASSES, crop=64, seed=seed)
                    for seed in (0, 1))
    again = pickle.loads(pickle.dumps(crops))  # as a worker process receives it
    crops[3]
    for a, b in zip(crops[7], again[7]):
        assert np.array_equal(a.numpy(), b.numpy())
    assert not np.array_equal(crops[7][0].numpy(), other[7][0].numpy())
    image, type_map, density = crops[7]
    assert (image.shape == (3, 64, 64) and type_map.shape == (64, 64)
            and density.shape == (1, 64, 64))
    assert crops.name(7) == "tile"


def test_worker_processes_may_be_spawned():
    source = open_source("synthetic", count=2, size=64)
    crops = Crops([(source, [0, 1], 1.0)], source.class_names, crop=32)
    alone = list(DataLoader(crops, 2, sampler=range(4)))
    assert crops.cache and not pickle.loads(pickle.dumps(crops)).cache  # images are not sent along
    spawned = DataLoader(crops, 2, sampler=range(4), num_workers=1, multiprocessing_context="spawn")
    for a, b in zip(alone, spawned, strict=True):
        assert all(map(torch.equal, a, b))


def test_classes_meet_by_name():
    assert class_lookup(Source([], ["b", "a"], None), ["a", "b"])[:3].tolist() == [0, 2, 1]
    assert (class_lookup(Source([], ["nucleus"], None), ["a", "b"])[1]
            == UNKNOWN_CLASS == dualunet.UNKNOWN_CLASS)
    assert class_lookup(Source([], ["a", "b"], None), ["nucleus"])[:3].tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="class 'c' is not among a, b"):
        class_lookup(Source([], ["c"], None), ["a", "b"])


# ---------------------------------------------------------------- synthetic tissue


def test_synthetic_tissue_is_whole_and_the_same_for_the_same_seed():
    counts = []
    for seed in range(6):
        image, inst_map, type_map = synthetic_tissue(seed, (96, 160))
        assert (image.shape == (96, 160, 3) and image.dtype == np.uint8
                and inst_map.dtype == np.int32)
        counts.append(int(inst_map.max()))
        assert (len(np.unique(inst_map)) == counts[-1] + 1
                and np.array_equal(inst_map > 0, type_map > 0))
        for i in range(1, counts[-1] + 1):
            assert (ndimage.label(inst_map == i)[1] == 1
                    and len(np.unique(type_map[inst_map == i])) == 1)
        assert all(np.array_equal(a, b) for a, b in zip(synthetic_tissue(seed, (96, 160)),
                                                        (image, inst_map, type_map)))
    assert max(counts) > 10
    with pytest.raises(ValueError, match="size is 4x9; expected at least 8x8"):
        synthetic_tissue(0, (4, 9))


def test_the_command_writes_a_tile(tmp_path, capsys):
    main([str(tmp_path / "tile.png"), "--size", "64", "--seed", "1"])
    assert read_image(tmp_path / "tile.png").shape == (64, 64, 3)
    assert "tile.png: 64x64 pixels of synthetic tissue, nuclei: " in capsys.readouterr().out
    for arguments, words in ([["tile.xyz"], "unknown file extension"],
                             [["tile.png", "--size", "0"], "at least 8x8"]):
        with pytest.raises(SystemExit, match="2"):
            main([str(tmp_path / arguments[0]), *arguments[1:]])
        assert words in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["tile.png"]
