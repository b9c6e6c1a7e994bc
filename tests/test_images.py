"""Image files: read to the pixel, or refused in one sentence; what is doubtful is said."""

import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from images import (check_mpp, colour_notes, explain_errors, image_size, list_images,
                    plausible_mpp, read_image, resample)

SIDES = 40, 56


@pytest.fixture(scope="module")
def rgb():
    """(40, 56, 3) uint8 in the colours of H&E: dark purple discs on pink."""
    y, x = np.mgrid[:SIDES[0], :SIDES[1]]
    disc = np.hypot(y % 20 - 9, x % 20 - 9) < 6
    noise = np.random.default_rng(0).integers(-9, 10, (*SIDES, 3))
    picture = np.where(disc[..., None], (90, 50, 130), (225, 160, 200)) + noise
    return picture.astype(np.uint8)


def deep(rgb, bits=16):
    """The picture in uint16 samples that use so many bits."""
    return np.rint(rgb * ((2**bits - 1) / 255)).astype(np.uint16)


def tiff_page(samples, *, planar=False, deflate=False, order="<", **tags):
    """({tag: value}, strips) of one page; more tags by number, as t254=1."""
    samples = samples if samples.ndim == 3 else samples[..., None]
    height, width, depth = samples.shape
    data = samples.astype(samples.dtype.newbyteorder(order))
    strips = [data.tobytes()]
    if planar:
        strips = [data[..., k].tobytes() for k in range(depth)]
    if deflate:
        strips = [zlib.compress(strip) for strip in strips]
    page = {256: width, 257: height, 258: (8 * samples.itemsize,) * depth,
            259: 8 if deflate else 1, 262: 2 if depth >= 3 else 1, 277: depth, 278: height,
            284: 2 if planar else 1}
    for name, value in tags.items():
        page[int(name[1:])] = value
    return page, strips


def write_tiff(path, *pages, order="<"):
    """A TIFF file of pages from `tiff_page`: of each the directory, then the strips."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    content = bytearray(start + bytes(4))
    link = 4  # where the next directory's place is noted
    for tags, strips in pages:
        directory = ImageFileDirectory_v2(start + bytes(4))
        for tag, value in tags.items():
            directory[tag] = value.encode() if isinstance(value, str) else value
        sizes = [len(strip) for strip in strips]
        directory[273] = tuple(sum(sizes[:i]) for i in range(len(sizes)))  # after the directory
        directory[279] = tuple(sizes)
        place = len(content)
        content[link:link + 4] = struct.pack(order + "L", place)
        content += directory.tobytes(place) + b"".join(strips)
        link = place + 2 + 12 * len(directory)
    path.write_bytes(content)
    return path


def planes(rgb, description=""):
    """A grey page for each colour."""
    return [tiff_page(rgb[..., k], t270=description) for k in range(3)]


def png16(rgb):
    """The bytes of a 16-bit RGB PNG, which Pillow cannot write."""
    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    height, width = rgb.shape[:2]
    rows = np.zeros((height, 1 + width * 6), np.uint8)
    rows[:, 1:] = rgb.astype(">u2").view(np.uint8).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b""))


def ome(channels=1, more="", depths=1):
    return (f'<?xml version="1.0"?><OME xmlns="o"><Image><Pixels SizeX="{SIDES[1]}" '
            f'SizeY="{SIDES[0]}" SizeC="{channels}" SizeZ="{depths}" SizeT="1" {more}>'
            '<Channel/></Pixels></Image></OME>')


def save(rgb, path, **options):
    if path.suffix == ".webp":
        options |= {"lossless": True, "exact": True}
    Image.fromarray(rgb).save(path, **options)


# ---------------------------------------------------------------- ordinary files


@pytest.mark.parametrize("name, options", [
    ("a.png", {}), ("a.bmp", {}), ("a.tif", {}), ("a.tif", {"compression": "tiff_lzw"}),
    ("a.tif", {"compression": "tiff_adobe_deflate"}), ("a.webp", {}), ("a.jp2", {}),
    ("a.tif", {"big_tiff": True}), ("a.png", {"format": "JPEG2000"})])
def test_ordinary_files_are_read_to_the_pixel(tmp_path, rgb, name, options):
    save(rgb, tmp_path / name, **options)
    image = read_image(tmp_path / name)
    assert np.array_equal(image.pixels, rgb) and image.pixels.dtype == np.uint8
    assert image[1:] == (None, "", False, ())
    assert image_size(tmp_path / name) == SIDES


@pytest.mark.parametrize("name, mode, error", [
    ("a.jpg", "RGB", 12), ("a.jfif", "RGB", 12), ("a.jpg", "CMYK", 12), ("a.tif", "CMYK", 0),
    ("a.tif", "YCbCr", 3), ("a.png", "P", 60), ("a.gif", "P", 60)])
def test_other_colour_spaces_come_close(tmp_path, rgb, name, mode, error):
    image = Image.fromarray(rgb)
    image = image.quantize(256) if mode == "P" else image.convert(mode)
    options = {"quality": 98, "subsampling": 0} if "j" in name else {}
    image.save(tmp_path / name, **options)
    assert np.abs(read_image(tmp_path / name).pixels.astype(int) - rgb).max() <= error


@pytest.mark.parametrize("order", "<>")
def test_tiff_of_either_byte_order_and_in_planes(tmp_path, rgb, order):
    for options in ({}, {"planar": True}, {"planar": True, "deflate": True}):
        page = tiff_page(rgb, order=order, **options)
        path = write_tiff(tmp_path / "a.tif", page, order=order)
        assert np.array_equal(read_image(path).pixels, rgb)


# ---------------------------------------------------------------- resolution, pages, depth


def stated(path):
    image = read_image(path)
    return image.mpp and round(image.mpp, 4), image.mpp_source


def dots(number, unit=None):
    """Resolution tags; unit 1: none, 2: inch, 3: cm."""
    return {"t282": number, "t283": number} | ({"t296": unit} if unit else {})


@pytest.mark.parametrize("tags, mpp", [
    (dots(20000.0, 3), 0.5), (dots(101600.0, 2), 0.25), (dots(101600.0), 0.25),
    (dots(20000.0, 1), None), (dots(10.0, 3), None), (dots(72.0, 2), None),  # vips writes 10 a cm
    (dots(300.0, 2), None), (dots(0.0, 3), None), (dots(20000.0, 3) | {"t283": 40000.0}, None)])
def test_resolution_tags(tmp_path, rgb, tags, mpp):
    path = write_tiff(tmp_path / "a.tif", tiff_page(rgb, **tags))
    assert stated(path) == (mpp, "TIFF resolution tags" if mpp else "")


@pytest.mark.parametrize("description, tags, mpp", [
    ("ImageJ=1.53\nunit=micron\n", dots(4.0, 1), 0.25),
    ("ImageJ=1.53\nunit=\\u00B5m\n", dots(2.0), 0.5), ("ImageJ=1\nunit=µm\n", dots(2.0), 0.5),
    ("ImageJ=1\nunit=mm\n", dots(2000.0, 1), 0.5), ("ImageJ=1\nunit=pixel\n", dots(4.0, 1), None),
    ("ImageJ=1.53\nunit=micron\n", {}, None),
    (ome(more='PhysicalSizeX="0.5"'), {}, 0.5),
    (ome(more='PhysicalSizeX="0.5" PhysicalSizeXUnit="µm"'), {}, 0.5),
    (ome(more='PhysicalSizeX="0.5" PhysicalSizeXUnit="&#181;m"'), {}, 0.5),
    (ome(more='PhysicalSizeX="250" PhysicalSizeXUnit="nm"'), {}, 0.25),
    (ome(more='PhysicalSizeX="1" PhysicalSizeXUnit="pixel"'), {}, None),
    ("Aperio Image Library v11\n2220x2967|AppMag = 20|MPP = 0.4990", {}, 0.499)])
def test_resolution_in_a_description(tmp_path, rgb, description, tags, mpp):
    path = write_tiff(tmp_path / "a.tif", tiff_page(rgb, t270=description, **tags))
    source = re.match("ImageJ|Aperio|", description)[0] or "OME"
    assert stated(path) == (mpp, f"{source} metadata" if mpp else "")


def test_two_resolutions_that_differ(tmp_path, rgb):
    page = tiff_page(rgb, t270=ome(more='PhysicalSizeX="0.5"'), **dots(40000.0, 3))
    image = read_image(write_tiff(tmp_path / "a.tif", page))
    assert image.mpp == 0.5
    assert image.notes == ("it states 0.5 µm per pixel in its OME metadata and 0.25 in its TIFF "
                           "resolution tags: the first is used",)
    page[0][270] = ome(more='PhysicalSizeX="500"')
    assert stated(write_tiff(tmp_path / "a.tif", page)) == (0.25, "TIFF resolution tags")


@pytest.mark.parametrize("name, dpi, wanted", [
    ("a.png", 50800, (0.5, "PNG pHYs")), ("a.png", 72, (None, "")), ("a.png", 600, (None, "")),
    ("a.jpg", 50800, (0.5, "JPEG resolution tags")), ("a.jpg", 300, (None, "")),
    ("a.bmp", 101600, (0.25, "BMP resolution tags"))])
def test_resolution_of_other_formats(tmp_path, rgb, name, dpi, wanted):
    save(rgb, tmp_path / name, dpi=(dpi, dpi))
    assert stated(tmp_path / name) == wanted


def test_plausible_resolutions():
    assert all(map(plausible_mpp, (0.05, 0.25, 0.5, 1, 5)))
    assert not any(map(plausible_mpp, (0, -1, 0.049, 5.1, 25400 / 600, 500, np.inf, np.nan)))
    check_mpp(0.5)
    for value in (500, 0, float("nan")):
        with pytest.raises(ValueError, match=f"--x: {value:g} µm per pixel is implausible; "
                                             "0.25 is 40x, 0.5 is 20x"):
            check_mpp(value, "--x")


@pytest.mark.parametrize("description, source", [
    ("ImageJ=1.11a\nimages=3\nchannels=3\nmode=composite\n", "ImageJ"), (ome(3), "OME"),
    ('{"shape": [3, 40, 56], "axes": "CYX"}', "shape"),
    ('{"shape": [3, 40, 56], "axes": "SYX"}', "shape")])
@pytest.mark.parametrize("bits", [8, 16])
def test_grey_pages_that_are_channels_are_joined(tmp_path, rgb, description, source, bits):
    samples = rgb if bits == 8 else deep(rgb)
    path = write_tiff(tmp_path / "a.tif", *planes(samples, description))
    image = read_image(path)
    assert np.array_equal(image.pixels, rgb) and image_size(path) == SIDES
    assert image.notes == (
        f"three grey pages were joined as red, green and blue, as its {source} metadata say",)


@pytest.mark.parametrize("number, description", [
    (3, ""), (3, "ImageJ=1.11a\nimages=3\nslices=3\n"), (3, ome(1, depths=3)), (3, ome(4)),
    (3, '{"shape": [3, 40, 56]}'), (3, '{"shape": [3, 40, 56], "axes": "ZYX"}'),
    (1, ome(3)), (6, ome(3, depths=2)), (6, "ImageJ=1.53\nimages=6\nchannels=3\nslices=2\n")])
def test_other_grey_pages_are_refused(tmp_path, rgb, number, description):
    path = write_tiff(tmp_path / "a.tif", *(2 * planes(rgb, description))[:number])
    with pytest.raises(ValueError, match=f"a.tif: {number} grey pages of one size, . channels by "
                                         "its .*metadata; expected 3 of both: save it as RGB"):
        read_image(path)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("deflate", [False, True])
def test_16_bit_samples_are_scaled_by_the_bits_in_use(tmp_path, rgb, order, bits, deflate):
    wide = deep(rgb, bits)
    wide[0, 0] = 2**bits - 1
    said = "" if bits == 16 else f"its 16-bit samples reach only .*: read as {bits}-bit samples"
    page = tiff_page(wide, order=order, deflate=deflate)
    image = read_image(write_tiff(tmp_path / "a.tif", page, order=order))
    assert np.array_equal(image.pixels[1:], rgb[1:])
    assert re.fullmatch(said, "".join(image.notes))
    (tmp_path / "b.png").write_bytes(png16(wide))
    assert np.array_equal(read_image(tmp_path / "b.png").pixels, image.pixels)

    # grey
    page = tiff_page(wide[..., 1], order=order, deflate=deflate)
    image = read_image(write_tiff(tmp_path / "c.tif", page, order=order))
    assert np.array_equal(image.pixels[1:], np.repeat(rgb[1:, :, 1:2], 3, axis=2))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_transparency_falls_on_white_unless_it_is_everywhere(tmp_path, rgb, name):
    clear = np.dstack([rgb, np.zeros(SIDES, np.uint8)])
    save(clear, tmp_path / name)
    image = read_image(tmp_path / name)
    assert np.array_equal(image.pixels, rgb)
    assert image.notes == ("it is transparent everywhere: its transparency was ignored",)
    clear[20:, :, 3] = 255
    save(clear, tmp_path / name)
    image = read_image(tmp_path / name)
    assert np.array_equal(image.pixels[20:], rgb[20:]) and (image.pixels[:20] == 255).all()


def test_16_bit_transparency(tmp_path, rgb):
    wide = np.dstack([deep(rgb), np.full(SIDES, 65535, np.uint16)])
    for extra in (0, 1, 2):  # unspecified, premultiplied, plain
        image = read_image(write_tiff(tmp_path / "b.tif", tiff_page(wide, t338=extra)))
        assert np.array_equal(image.pixels, rgb) and image.notes == ()


def test_the_largest_full_resolution_page_is_read(tmp_path, rgb):
    label, macro = np.zeros((9, 13, 3), np.uint8), np.zeros((90, 130, 3), np.uint8)
    path = write_tiff(tmp_path / "a.tif", tiff_page(label), tiff_page(rgb),
                      tiff_page(rgb[::2, ::2], t254=1), tiff_page(macro, t254=9),
                      tiff_page(rgb[..., 0], t254=4), tiff_page(rgb[..., 0]))  # two masks
    image = read_image(path)
    assert np.array_equal(image.pixels, rgb) and image_size(path) == SIDES
    assert image.notes == ("page 2 (56x40) was read, the largest at full resolution; not read: "
                           "page 1 (13x9), page 3 (28x20), page 4 (130x90)",)
    # the pixels of the page that is read count, and no others
    assert read_image(path, max_pixels=40 * 56).notes == image.notes
    with pytest.raises(ValueError, match="a.tif: declares 56x40 pixels, more than 2239; cut it"):
        read_image(path, max_pixels=40 * 56 - 1)


def test_equal_pages_are_a_stack_whose_middle_is_read(tmp_path, rgb):
    blank = np.full_like(rgb, 245)
    image = read_image(write_tiff(tmp_path / "a.tif", *map(tiff_page, (blank, rgb, blank))))
    assert np.array_equal(image.pixels, rgb)
    assert image.notes == ("3 pages of one size, a focus stack or time series: the middle one, "
                           "page 2, was read",)


# ---------------------------------------------------------------- refusals, orientation, colours


def test_what_pillow_cannot_read_or_reads_wrongly_is_refused(tmp_path, rgb):
    compressions = {34712: "JPEG 2000", 33003: "JPEG 2000", 33005: "JPEG 2000", 50001: "WebP",
                    34887: "LERC", 50002: "JPEG XL", 6: "old-style JPEG", 34933: "PNG",
                    34934: "JPEG XR"}
    kinds = [(np.float32, 3, "32-bit floating-point"), (np.float16, 3, "16-bit floating-point"),
             (np.int16, 2, "16-bit signed integer"), (np.int8, 2, "8-bit signed integer"),
             (np.uint32, 1, "32-bit integer")]
    wide = deep(rgb)
    refused = [
        (tiff_page(wide, planar=True), "16-bit samples are supported as .* not in separate planes"),
        (tiff_page(wide, planar=True, deflate=True), "16-bit samples are supported as interleaved"),
        (tiff_page(wide[..., 0], t262=0), "16-bit samples are .* grey with black at 0"),
        (tiff_page(rgb, t262=6, t530=(2, 2)), "uncompressed YCbCr with subsampling"),
        (tiff_page(rgb, t262=6), "uncompressed YCbCr with subsampling"),
        (tiff_page(rgb, t259=12345), "unknown format or kind of pixels"),
        (tiff_page(rgb, t262=32803), "unknown format or kind of pixels")]
    for code, name in compressions.items():
        refused.append((tiff_page(rgb, t259=code),
                        f"{name} inside TIFF is not supported; save it as LZW or deflate"))
    for dtype, code, name in kinds:
        for samples in (rgb, rgb[..., 0]):
            page = tiff_page(samples.astype(dtype), t339=code)
            refused.append((page, f"{name} samples are not supported; save it as 8-bit RGB"))

    large = tiff_page(np.tile(rgb, (2, 2, 1)))
    for page, sentence in refused:
        for pages in ([page], [page, large]):  # Pillow cannot pass by a strange first page
            path = write_tiff(tmp_path / "a.tif", *pages)
            with pytest.raises(ValueError, match=f"a.tif: {sentence}"):
                read_image(path)


@pytest.mark.parametrize("content, sentence", [
    (b"hello, this is text", "unknown format"), (b"", "unknown format"),
    (b"II*\0\x08\0\0\0\0\0\0\0\0\0", "this TIFF file has no page"),
    (b"MM\0+\0\x08\0\0\0\0\0\0\0\0\0\x10", "big-endian BigTIFF .* pip install .*openslide-bin"),
    (None, "no such image; check the path")])
def test_what_is_no_image_is_named(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "a.tif").write_bytes(content)
    for function in (read_image, image_size):
        with pytest.raises(FileNotFoundError if content is None else ValueError) as error:
            function(tmp_path / "a.tif")
        assert re.match(f"{tmp_path / 'a.tif'}: {sentence}", str(error.value))


def test_size_limit_is_ours_not_pillows(tmp_path, monkeypatch, rgb):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for name in ("a.png", "a.tif"):
        save(rgb, tmp_path / name)
        assert image_size(tmp_path / name) == SIDES
        assert np.array_equal(read_image(tmp_path / name).pixels, rgb)
        with pytest.raises(ValueError, match=f"{name}: declares 56x40 pixels, more than 9;"):
            read_image(tmp_path / name, max_pixels=9)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_reported(tmp_path, rgb, orientation):
    turned = {1: rgb, 2: rgb[:, ::-1], 3: rgb[::-1, ::-1], 4: rgb[::-1], 5: rgb.swapaxes(0, 1),
              6: np.rot90(rgb, -1), 7: rgb[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(rgb)}
    page = tiff_page(rgb, t274=orientation)
    write_tiff(tmp_path / "a.tif", page)
    write_tiff(tmp_path / "second.tif", tiff_page(rgb[:9, :9]), page)
    write_tiff(tmp_path / "deep.tif", tiff_page(deep(rgb), t274=orientation))
    exif = Image.Exif()
    exif[274] = orientation
    save(rgb, tmp_path / "a.png", exif=exif)
    save(rgb, tmp_path / "a.webp", exif=exif)
    for path in tmp_path.iterdir():
        image = read_image(path)
        assert np.array_equal(image.pixels, turned[orientation]), path
        assert image.turned == (orientation > 1)
        assert image_size(path) == SIDES


def test_colours_of_h_and_e_pass(rgb, tissue):
    purple = np.where(rgb[..., :1] > 150, (200, 185, 220), (110, 70, 150))  # without eosin
    glass = np.full((600, 600, 3), 243, np.uint8)  # with little tissue on it
    glass[300:340, 100:156] = rgb
    for picture in (rgb, tissue[0], purple.astype(np.uint8), glass):
        assert colour_notes(picture) == []


def test_other_colours_are_named(rgb):
    fluorescence = np.zeros_like(rgb)
    fluorescence[..., 2] = (255 - rgb[..., 1]) // 2
    for picture, sentence in (
            (rgb[..., [1, 0, 2]], "far from H&E: it absorbs [0-9]+% red"),
            (rgb[..., [0, 2, 1]], "far from H&E"), (rgb[..., [0, 0, 0]], "it is grey; expected"),
            (rgb // 16, "nearly black"), (0 * rgb, "nearly black, with grey levels 0 to 0"),
            (fluorescence, "most of it is black; expected H&E on a bright background"),
            (rgb // 10 + 230, "nearly white"), (rgb // 80 + 128, "nearly of one colour")):
        note, = colour_notes(picture)
        assert re.search(sentence, note)


# ---------------------------------------------------------------- resampling, folders, errors


@pytest.mark.parametrize("shape", [(50, 50), (51, 51), (64, 64), (100, 100), (101, 33), (250, 200)])
def test_resampling_shifts_nothing(shape):
    y, x = np.mgrid[:101, :101] - 50
    disc = np.where(np.hypot(y - 5, x + 9) < 20, 40, 240).astype(np.uint8)  # off centre
    picture = resample(np.repeat(disc[..., None], 3, axis=2), shape)
    assert picture.shape == (*shape, 3) and picture.dtype == np.uint8
    weight = 240.0 - picture[..., 0]
    for axis, side, centre in ((0, shape[0], 55), (1, shape[1], 41)):
        centroid = (weight.sum(1 - axis) * np.arange(side)).sum() / weight.sum()
        assert abs((centroid + 0.5) * 101 / side - 0.5 - centre) < 0.03


def test_folders_are_listed_and_the_rest_is_counted(tmp_path):
    names = ("a.jp2", "b.PNG", "c.webp", "d.jfif", "e.gif", "f.ome.tif")
    for name in (*names, "g.czi", "h.txt", "i", "s.qptiff", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / "other.png").mkdir()
    paths, skipped = list_images(tmp_path)
    assert [path.name for path in paths] == list(names)
    assert skipped == ("skipped 4 files that are no pictures (.czi, .qptiff, .txt, no suffix); "
                       "1 subfolder is not searched: other.png")
    (tmp_path / "sub").mkdir()
    paths, skipped = list_images(tmp_path, (".qptiff", ".czi", ".txt"))
    assert (len(paths), skipped) == (9, "skipped 1 file that is no picture (no suffix); "
                                        "2 subfolders are not searched: other.png, sub")
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        list_images(tmp_path / "none")


@pytest.mark.parametrize("error, sentence", [
    (KeyError("a\nb"), r"x.json: not a readable file \('a\\nb'\); mend it"),
    (MemoryError(), r"x.json: not a readable file \(MemoryError\); mend it"),
    (ValueError("x.json: as it is"), "x.json: as it is"),
    (PermissionError(13, "Permission denied"), r"x.json: .* \(Permission denied\); mend it")])
def test_errors_are_one_sentence_that_names_the_file(error, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        with explain_errors("x.json", "file", "mend it"):
            raise error


def test_damaged_files_end_in_a_picture_or_one_sentence(tmp_path, rgb):
    wide, path = deep(rgb), tmp_path / "damaged"
    files = [png16(wide)]
    for pages in (planes(rgb, ome(3)), [tiff_page(wide, deflate=True)],
                  [tiff_page(rgb[::2]), tiff_page(rgb)]):
        files.append(write_tiff(path, *pages).read_bytes())
    rng = np.random.default_rng(1)
    for trial in range(200):
        damaged = bytearray(files[trial % 4])
        for at in rng.integers(0, rng.choice((200, len(damaged))), 3):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged[:rng.integers(0, 2 * len(damaged))])
        try:
            assert read_image(path, max_pixels=10**6).pixels.shape[2] == 3
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def test_a_resolution_of_pillows_fractions_is_a_plain_number(tmp_path):
    path = tmp_path / "a.tif"
    Image.new("RGB", (64, 64), (200, 120, 180)).save(path, dpi=(50800, 50800))
    mpp = read_image(path).mpp
    assert type(mpp) is float and mpp == pytest.approx(0.5)
