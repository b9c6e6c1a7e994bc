"""Reads image files as RGB pixels, with their resolution and notes on doubtful points.

    image = read_image("tile.tif")
    image.pixels, image.mpp, image.mpp_source, image.notes

A file that is not understood is refused in one sentence. Needs numpy and pillow.
"""

import contextlib
import json
import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base as Tag
from PIL.TiffImagePlugin import ImageFileDirectory_v2

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".jp2",
                  ".gif")
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000")  # ours: none starts programs
MAX_PIXELS = 2**28  # ours: larger files are not decoded; some need 30 bytes a pixel
SAME_MPP = 0.05  # ours: a smaller difference is ignored, since the sizes of nuclei vary more
ADVICE = "copy it again, or save it as PNG"


class ImageFile(NamedTuple):
    """What `read_image` returns."""

    pixels: np.ndarray  # (H, W, 3) uint8 RGB
    mpp: float | None  # µm per pixel as stated; None if missing or implausible
    mpp_source: str  # such as "OME metadata", "" where mpp is None
    turned: bool  # an EXIF orientation other than 1 was applied
    notes: tuple[str, ...]  # sentences for the user, without the path


class Refused(ValueError):
    """A whole sentence on why a file is not read; `explain_errors` adds the path."""


@contextlib.contextmanager
def explain_errors(path, what, advice):
    """Turns every failure inside into one sentence that names the file; silences warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such {what}; check the path") from None
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:
        if str(error).startswith(f"{path}: "):
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = " ".join(reason.split())
        raise ValueError(f"{path}: not a readable {what} ({reason}); {advice}") from None


@contextlib.contextmanager
def open_image(path, max_pixels, page=0):
    """Pillow's image, only its header read; refused where it declares too many pixels."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, 179 megapixels, is below ours
    try:
        with Image.open(path, formats=FORMATS) as image:
            if page:
                image.seek(page)
            if image.width * image.height > max_pixels:
                raise Refused(f"declares {image.width}x{image.height} pixels, more than "
                              f"{max_pixels}; cut it into parts or allow it with --max-pixels")
            yield image
    except UnidentifiedImageError:
        raise Refused("unknown format or kind of pixels; save it as 8-bit RGB PNG") from None
    finally:
        Image.MAX_IMAGE_PIXELS = before


# ---------------------------------------------------------------- resolution

UNITS = {"nm": 1e-3, "um": 1, "micron": 1, "microns": 1, "mm": 1e3, "cm": 1e4,
         "inch": 25400}  # in µm


def plausible_mpp(value):
    """Whether a microscope can have this; printers' 72 to 600 dpi would be 353 to 42 µm."""
    return 0.05 <= value <= 5


def check_mpp(value, option="--mpp"):
    """Raises ValueError that names the option if the value is implausible."""
    if not plausible_mpp(value):
        raise ValueError(f"{option}: {value:g} µm per pixel is implausible; "
                         "0.25 is 40x, 0.5 is 20x")


def to_unit(name):
    """A unit in µm, NaN if it is no length. µ may be in a wrong encoding, or escaped."""
    name = name.strip().lower()
    if re.search("[^a-z]m$", name):
        name = "um"
    return UNITS.get(name, math.nan)


def header_mpp(image):
    """(µm per pixel from the dots per inch in the header, name of this source)."""
    source = "PNG pHYs" if image.format == "PNG" else f"{image.format} resolution tags"
    x, y = image.info.get("dpi", (0, 0))
    square = 0.95 * y < x < 1.05 * y
    return UNITS["inch"] / x if square else math.nan, source


def pick_mpp(candidates, notes):
    """The first plausible (µm per pixel, source), or (None, ""); adds contradictions to notes."""
    stated = [(mpp, source) for mpp, source in candidates if plausible_mpp(mpp)]
    if not stated:
        return None, ""
    mpp, source = stated[0]
    for value, other in stated:
        if max(mpp, value) > 1.05 * min(mpp, value):
            notes.append(f"it states {mpp:.4g} µm per pixel in its {source} and {value:.4g} in "
                         f"its {other}: the first is used")
    return float(mpp), source  # Pillow gives a fraction for TIFF


# ---------------------------------------------------------------- TIFF

NOT_READ = {6: "old-style JPEG", 33003: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000",
            22610: "JPEG XR", 34934: "JPEG XR", 34887: "LERC", 34933: "PNG", 50001: "WebP",
            50002: "JPEG XL"}
SAMPLE_KINDS = {2: "signed integer", 3: "floating-point"}


class Page(NamedTuple):
    """A page of a TIFF file."""

    number: int  # from 0
    height: int
    width: int
    tags: ImageFileDirectory_v2  # {tag: value}

    def first(self, tag, default=1):
        """The number of a tag, or the first of its numbers."""
        value = self.tags.get(tag, default)
        return value[0] if isinstance(value, tuple) else value

    @property
    def is_grey(self):
        photometric = self.first(Tag.PhotometricInterpretation)
        return photometric in (0, 1) and self.first(Tag.SamplesPerPixel) == 1

    def __str__(self):
        return f"page {self.number + 1} ({self.width}x{self.height})"


def tiff_pages(path):
    """All pages of a TIFF file, [] for other files. (Pillow stops at a page it cannot read.)"""
    pages, seen = [], set()
    with open(path, "rb") as file:
        start = file.read(8)
        if start[:4] == b"MM\0+":
            raise Refused("big-endian BigTIFF is read by OpenSlide alone, if it has tiles; "
                          "pip install openslide-python openslide-bin, or save it as another TIFF")
        if start[:4] not in (b"II*\0", b"MM\0*", b"II+\0"):
            return []
        start += file.read(8) if b"+" in start[:4] else b""
        offset = ImageFileDirectory_v2(start).next
        while offset and offset not in seen:
            seen.add(offset)
            tags = ImageFileDirectory_v2(start)
            tags.next = 0  # stays 0 if the directory is cut short
            file.seek(offset)
            tags.load(file)
            offset = tags.next
            sides = tags.get(Tag.ImageLength), tags.get(Tag.ImageWidth)
            if all(isinstance(side, int) and side > 0 for side in sides):
                pages.append(Page(len(seen) - 1, *sides, tags))
    if not pages:
        raise Refused("this TIFF file has no page with a size; copy it again")
    return pages


def main_pages(pages):
    """The largest full-resolution pages of one size; grey ones only if none has colour."""
    # no pyramid level or thumbnail (bit 0) and no mask (bit 2), as the tag says
    full = [page for page in pages if not page.first(Tag.NewSubfileType, 0) & 5] or pages
    largest = max(full, key=lambda page: page.height * page.width)
    equals = [page for page in full if page[1:3] == largest[1:3]]
    return [page for page in equals if not page.is_grey] or equals


def check_page(page):
    """Refuses by name what Pillow cannot decode, or decodes wrongly."""
    bits = page.first(Tag.BitsPerSample)
    kind = SAMPLE_KINDS.get(page.first(Tag.SampleFormat), "integer")
    if kind != "integer" or bits > 16:
        raise Refused(f"{bits}-bit {kind} samples are not supported; save it as 8-bit RGB")

    compression = page.first(Tag.Compression)
    if compression in NOT_READ:
        raise Refused(f"{NOT_READ[compression]} inside TIFF is not supported; "
                      "save it as LZW or deflate")
    photometric = page.first(Tag.PhotometricInterpretation)
    planar = page.first(Tag.PlanarConfiguration) == 2
    if bits > 8 and (planar or photometric not in (1, 2)):
        raise Refused("16-bit samples are supported as interleaved RGB and as grey with black at "
                      "0, not in separate planes; save it as 8-bit RGB")
    if photometric == 6 and compression == 1 and page.tags.get(Tag.YCbCrSubSampling) != (1, 1):
        raise Refused("uncompressed YCbCr with subsampling is not supported; save it as RGB")


# Each reader returns (channels of a picture, µm per pixel); any error means that nothing is stated.


def imagej_states(text, page):
    fields = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    unit = to_unit(fields.get("unit", ""))
    dots = page.first(Tag.XResolution, math.inf)
    return int(fields.get("channels", 1)), unit / float(dots)


def ome_states(text, page):
    # of several pictures the one of this page's width
    start = re.search(rf'<(\w+:)?Pixels\b[^>]* SizeX="{page.width}"[^>]*>', text)[0]
    fields = dict(re.findall(r'(\w+)="([^"]*)"', start))
    unit = to_unit(fields.get("PhysicalSizeXUnit", "um"))
    side = fields.get("PhysicalSizeX", "nan")
    return int(fields.get("SizeC", 1)), unit * float(side)


def tifffile_states(text, page):
    fields = json.loads(text)
    sides = dict(zip(fields["axes"], fields["shape"]))
    return sides.get("C") or sides.get("S", 1), math.nan


def aperio_states(text, page):
    return 1, float(re.search(r"MPP *= *([0-9.]+)", text)[1])


DIALECTS = {"ImageJ": imagej_states, "OME": ome_states, "shape": tifffile_states,
            "Aperio": aperio_states}


def read_description(text, page):
    """(source, channels, µm per pixel); 1 channel and nan if it is unknown or broken."""
    for name, reader in DIALECTS.items():
        if name in text[:2000]:
            with contextlib.suppress(ValueError, LookupError, TypeError, ArithmeticError):
                return f"{name} metadata", *reader(text, page)
    return "metadata", 1, math.nan


# ---------------------------------------------------------------- samples


def lower_bytes(path, page):
    """(H, W, 3 or 4) uint8: low bytes of 16-bit colours. A swapped order makes Pillow keep them."""
    with open_image(path, math.inf, page) as image:
        for i, tile in enumerate(image.tile):
            name, *rest = tile.args if isinstance(tile.args, tuple) else (tile.args,)
            order = "L" if name.endswith("B") else "B"
            image.tile[i] = tile._replace(args=(name[:-1] + order, *rest))
        return np.array(ImageOps.exif_transpose(image))


def decode(path, max_pixels, page=0):
    """(samples (H, W, 3 or 4) uint8 or uint16, turned by EXIF; orientation; [`header_mpp`])."""
    with open_image(path, max_pixels, page) as image:
        deep = re.search(r";16[BLN]\b", str(image.tile[:1]))
        orientation = image.getexif().get(Tag.Orientation, 1)  # for a PNG Pillow decodes here
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            samples = np.array(image).astype(np.uint16)[..., None].repeat(3, axis=2)
        elif deep:
            samples = np.array(image).astype(np.uint16) * 256 + lower_bytes(path, page)
        else:
            clear = "A" in image.getbands() or "transparency" in image.info
            samples = np.array(image.convert("RGBA" if clear else "RGB"))
        return samples, orientation, [header_mpp(image)]


def to_8_bits(samples, notes):
    """Converts uint16 samples to uint8, scaled by the number of bits in use."""
    # images of 10 to 14-bit cameras are stored with 16 bits
    largest = int(samples[..., :3].max())
    bits = min(n for n in (8, 10, 12, 14, 16) if largest < 2**n)
    if bits < 16:
        notes.append(f"its 16-bit samples reach only {largest}: read as {bits}-bit samples")
    scaled = np.rint(np.arange(2**16) * (255 / (2**bits - 1)))
    return scaled.clip(0, 255).astype(np.uint8)[samples]


def on_white(samples, notes):
    """RGB pixels of uint8 samples; transparent ones are laid on white."""
    if samples.shape[2] == 3:
        return np.ascontiguousarray(samples)
    if not samples[..., 3].any():
        notes.append("it is transparent everywhere: its transparency was ignored")
        return samples[..., :3].copy()
    image = Image.fromarray(samples)
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


# ---------------------------------------------------------------- one picture


def read_tiff(path, pages, max_pixels, notes):
    """(samples, orientation, [(µm per pixel, source)]) of a TIFF file; adds to the notes."""
    # choose the page, and read the description of the file
    equals = main_pages(pages)
    page = equals[(len(equals) - 1) // 2]
    for checked in (pages[0], *equals):  # Pillow opens no page if it cannot read the first
        check_page(checked)
    description = str(pages[0].tags.get(Tag.ImageDescription))
    source, channels, mpp = read_description(description, page)
    samples, orientation, stated = decode(path, max_pixels, page.number)

    # several pages of one size: three colours, which are joined, or a focus stack or time series
    if page.is_grey and max(len(equals), channels) > 1:
        if not len(equals) == channels == 3:
            raise Refused(f"{len(equals)} grey pages of one size, {channels} channels by its "
                          f"{source}; expected 3 of both: save it as RGB, or one page alone")
        colours = [decode(path, max_pixels, each.number)[0][..., 0] for each in equals]
        samples = np.stack(colours, axis=2)
        notes.append(f"three grey pages were joined as red, green and blue, as its {source} say")
    elif len(equals) > 1:
        notes.append(f"{len(equals)} pages of one size, a focus stack or time series: the middle "
                     f"one, page {page.number + 1}, was read")

    # name the pages that were not read
    others = [str(other) for other in pages if other[1:3] != page[1:3]]
    if others:
        notes.append(f"{page} was read, the largest at full resolution; "
                     f"not read: {', '.join(others[:9])}")
    return samples, orientation, [(mpp, source), *stated]


def colour_notes(pixels):
    """Sentences on how RGB pixels differ from H&E."""
    # thresholds: ours; of 898 images of ten sets they name only one, which shows bare glass

    # sample about 512x512 pixels; those with a high optical density are tissue
    height, width = pixels.shape[:2]
    sample = pixels[::max(1, height // 512), ::max(1, width // 512)].reshape(-1, 3)
    low, median, high = np.percentile(sample.mean(1), (0.5, 50, 99.5))
    density = -np.log((sample + 1.0) / 256)
    tissue = density.sum(1) > 0.3

    # brightness
    if high - low < 10 or not tissue.any():
        name = "white" if low > 215 else "black" if high < 25 else "of one colour"
        return [f"it is nearly {name}, with grey levels {low:.0f} to {high:.0f}: no tissue in it?"]
    if median < 20:
        return ["most of it is black; expected H&E on a bright background"]

    # colour: the shares of red, green and blue in the optical density
    if np.percentile(np.ptp(sample[tissue], axis=1), 99) < 8:
        return ["it is grey; expected the colours of H&E"]
    red, green, blue = density[tissue].sum(0) / density[tissue].sum()
    if green < 0.32 or max(red, blue) > 0.42:
        return [f"its colours are far from H&E: it absorbs {red:.0%} red, {green:.0%} green and "
                f"{blue:.0%} blue; H&E absorbs green most"]
    return []


def read_image(path, max_pixels=MAX_PIXELS):
    """Reads an image file, see `ImageFile`; colour profiles are ignored.

    Raises: FileNotFoundError, ValueError; one sentence that begins with the path.
    """
    notes = []
    with explain_errors(path, "image", ADVICE):
        if pages := tiff_pages(path):
            samples, orientation, stated = read_tiff(path, pages, max_pixels, notes)
        else:
            samples, orientation, stated = decode(path, max_pixels)
        if samples.dtype == np.uint16:
            samples = to_8_bits(samples, notes)
        pixels = on_white(samples, notes)
        mpp, source = pick_mpp(stated, notes)
        notes += colour_notes(pixels)
    return ImageFile(pixels, mpp, source, orientation in range(2, 9), tuple(notes))


def image_size(path):
    """(height, width) of the image, before EXIF turns it; decodes nothing."""
    with explain_errors(path, "image", ADVICE):
        if pages := tiff_pages(path):
            return main_pages(pages)[0][1:3]
        with open_image(path, math.inf) as image:
            return image.height, image.width


def reflect(start, stop, size):
    """Indices start..stop-1 of a line of `size` pixels, reflected at its ends again and again."""
    period = max(2 * (size - 1), 1)
    index = np.arange(start, stop) % period
    return np.minimum(index, period - index)


def resample(pixels, shape):
    """(h, w, 3) uint8 of RGB pixels, bicubic; both cover the same area, so nothing shifts."""
    height, width = shape
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def list_images(folder, suffixes=()):
    """(sorted paths of the images, a sentence on skipped files or ""); suffixes: also accepted."""
    wanted = IMAGE_SUFFIXES + tuple(suffixes)
    with explain_errors(folder, "folder", "give a folder of images"):
        entries = sorted(Path(folder).iterdir())
    paths, folders, strangers = [], [], []
    for path in entries:
        suffix = path.suffix.lower()
        if path.name.startswith("."):  # hidden
            continue
        if path.is_dir():
            folders.append(path.name)
        elif suffix in wanted:
            paths.append(path)
        else:
            strangers.append(suffix or "no suffix")

    # what is skipped
    sentences = []
    if strangers:
        what = "file that is no picture" if len(strangers) == 1 else "files that are no pictures"
        kinds = ", ".join(sorted(set(strangers)))
        sentences.append(f"skipped {len(strangers)} {what} ({kinds})")
    if folders:
        what = "subfolder is" if len(folders) == 1 else "subfolders are"
        sentences.append(f"{len(folders)} {what} not searched: {', '.join(folders)}")
    return paths, "; ".join(sentences)
