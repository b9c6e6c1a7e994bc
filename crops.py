"""Training crops: windows of labelled images, rotated, zoomed and with changed stain.

    crops = Crops([(source, range(27), 1.0)], source.class_names, crop=256)
    crops.load(workers=2)                    # reads every image once and keeps it
    image, type_map, density = crops[0]      # (3, 256, 256), (256, 256), (1, 256, 256)

The density is computed once for each image and warped together with it, so a crop costs a few
milliseconds. Arrays and coordinates are (y, x). Needs torch, numpy, scipy, pillow, and data.py
with the modules that it imports.
"""

import math
import signal
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from data import UNKNOWN_CLASS, class_lookup, nucleus_classes
from images import SAME_MPP, reflect, resample
from postprocess import centroids_of, density_map

CACHE_BYTES = 8 * 2**30  # ours: images that do not fit are read again for every crop
HED = np.array([[0.650, 0.704, 0.286],   # haematoxylin: optical density of red, green, blue
                [0.072, 0.990, 0.105],   # eosin
                [0.268, 0.570, 0.776]])  # residual; all three Ruifrok, Johnston 2001
TRANSMISSION = np.arange(1, 257) / 256  # of light, for each pixel value
OPTICAL_DENSITY = -np.log(TRANSMISSION).astype(np.float32)


# ---------------------------------------------------------------- one image


class Sample(NamedTuple):
    """An image with its targets, ready to be cropped."""

    image: np.ndarray  # (H, W, 3) uint8
    type_map: np.ndarray  # (H, W) uint8, classes of the network
    density: np.ndarray  # (H, W) uint8, 255 at the centre of each nucleus
    centroids: np.ndarray  # (N, 2)
    classes: np.ndarray  # (N,) classes of the network


def nearest(side, full):
    """(side,) indices: for each of `side` pixels, the nearest of `full` pixels on the same length.

    If two are equally near, the lower and the higher one alternate, so that nothing shifts.
    """
    zoom = full / side
    centers = zoom * (np.arange(side) + 0.5)  # in pixel corners
    centers[::2] += 1e-6
    centers[1::2] -= 1e-6
    return centers.astype(int)


def prepare(source, i, lookup, mpp, sigma, combine):
    """Image i of a source at `mpp` µm per pixel, with its targets."""
    image, inst_map, type_map = source.read(i)
    type_map = lookup[type_map]
    centroids = centroids_of(inst_map)  # (N, 2)
    classes = nucleus_classes(inst_map, type_map)  # (N,)

    # to the network's resolution
    scale = source.mpp / mpp
    if abs(scale - 1) > SAME_MPP:
        height = max(round(image.shape[0] * scale), 1)
        width = max(round(image.shape[1] * scale), 1)
        rows = nearest(height, image.shape[0])
        columns = nearest(width, image.shape[1])
        image = resample(image, (height, width))
        zoom = np.divide((height, width), type_map.shape)
        centroids = zoom * (centroids + 0.5) - 0.5
        type_map = type_map[rows[:, None], columns]

    # the density in 8 bits, which Pillow can warp
    density = density_map(centroids, type_map.shape, sigma=sigma, combine=combine)
    density = np.round(255 * density).astype(np.uint8)
    return Sample(image, type_map, density, centroids, classes)


def cut(arrays, y0, x0, height, width):
    """The window of each array (H, W, ...) that begins at y0, x0; outside is reflected."""
    full_height, full_width = arrays[0].shape[:2]
    rows = reflect(y0, y0 + height, full_height)
    columns = reflect(x0, x0 + width, full_width)
    top, bottom = rows.min(), rows.max() + 1
    left, right = columns.min(), columns.max() + 1
    windows = []
    for array in arrays:
        window = array[top:bottom, left:right]
        if window.shape[:2] != (height, width):  # a part of it is reflected
            window = window.take(rows - top, axis=0)
            window = window.take(columns - left, axis=1)
        windows.append(window)
    return windows


# ---------------------------------------------------------------- augmentation


def random_affine(rng, *, scale=1.3, aspect=1.08, turn=0.7):
    """A random (2, 2) matrix from offsets (y, x) in the crop to offsets in the image, and its zoom.

    scale, aspect: largest zoom in or out, and largest stretch. turn: share of crops turned by any
    angle. The others make quarter turns, mostly without zoom, so that no pixel is resampled.
    """
    angle = rng.uniform(0, 4)  # in quarter turns
    zoom = scale ** rng.uniform(-1, 1)
    stretch = aspect ** rng.uniform(-1, 1)
    quarters = rng.random() >= turn
    if quarters:
        angle = round(angle)
        stretch = 1.0
        if rng.random() < 0.7:
            zoom = 1.0
    mirror = rng.choice((-1, 1))
    c = math.cos(angle * math.pi / 2)
    s = math.sin(angle * math.pi / 2)
    if quarters:
        c, s = round(c), round(s)  # exact, because Pillow rounds 143.999999 down
    rotation = np.array([[c, -s], [s, c]])
    down = 1 / (zoom * stretch)  # image pixels per crop pixel
    across = mirror * stretch / zoom
    return rotation * (down, across), zoom


class View(NamedTuple):
    """The part of an image that a crop shows."""

    center: np.ndarray  # (y, x); the first pixel covers [0, 1] x [0, 1]
    matrix: np.ndarray  # (2, 2) from offsets (y, x) in the crop to offsets in the image
    zoom: float


def warp(sample, view, crop):
    """Cuts a square of side `crop`: image and type_map uint8, density float32."""
    # cut the part of the image that the crop shows, plus two pixels for the bicubic filter
    half = np.full(2, crop / 2)
    reach = np.abs(view.matrix) @ half + 2  # (2,)
    first = np.floor(view.center - reach).astype(int)
    last = np.ceil(view.center + reach).astype(int)
    height, width = last - first
    arrays = sample.image, sample.type_map, sample.density
    windows = cut(arrays, *first, height, width)

    # Pillow maps pixel corners of the crop to pixel corners of the window, as (x, y)
    (yy, yx), (xy, xx) = view.matrix
    y, x = view.center - first - view.matrix @ half
    affine = xx, xy, x, yx, yy, y
    warped = []
    for window, resampling in zip(windows, ("BICUBIC", "NEAREST", "NEAREST")):
        picture = Image.fromarray(window)
        picture = picture.transform((crop, crop), Image.Transform.AFFINE, affine,
                                    Image.Resampling[resampling])
        warped.append(np.asarray(picture))

    # give zoomed peaks their old width: at zoom z, raise exp(-r²/2σ²) to the power z²
    image, type_map, density = warped
    values = np.arange(256) / 255
    powers = (values ** view.zoom**2).astype(np.float32)
    return image, type_map, powers[density]


def random_stain(image, rng, *, stain=0.25, shift=0.07, blur=0.25, noise=0.25):
    """The image (H, W, 3) uint8 with changed stain, sometimes blurred, sometimes noisy.

    stain, shift: the amounts of haematoxylin, eosin and residual are scaled by 1 ± stain and
    shifted by ± shift in optical density. blur, noise: share of the images that get it.
    """
    # stain: to optical density, to amounts of stain, and back
    scales = 1 + stain * rng.uniform(-1, 1, 3)
    shifts = shift * rng.uniform(-1, 1, 3)
    scaled = np.diag(scales) @ HED
    mix = np.linalg.solve(HED, scaled).astype(np.float32)
    density = OPTICAL_DENSITY[image] @ mix  # (H, W, 3)
    density += (shifts @ HED).astype(np.float32)
    image = 256 * np.exp(-density) - 1

    # blur and sensor noise
    if rng.random() < blur:
        sigma = rng.uniform(0.4, 1.5)
        image = ndimage.gaussian_filter(image, (sigma, sigma, 0), truncate=3)
    if rng.random() < noise:
        amount = 255 * rng.uniform(0, 0.03)
        image += amount * rng.standard_normal(image.shape, np.float32)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------- crops


class Crops(torch.utils.data.Dataset):
    """Endless random crops: item n depends only on (seed, n), not on workers or order.

    parts: (source, indices of its images, share of the crops). Classes are matched by name to
    `class_names`. mpp, sigma, combine: resolution and density target of the network.
    rare: share of the crops that lie around a nucleus whose class is drawn first, evenly or by
    `rare_shares` (one number a class). It needs a set with at least two classes.
    geometry, color: options of `random_affine` and `random_stain`; None switches them off.
    Item: image (3, crop, crop) uint8, type_map (crop, crop) uint8, density (1, crop, crop) float32.
    """

    def __init__(self, parts, class_names, *, crop, seed=0, mpp=0.25, sigma=5.0, combine="max",
                 rare=0.0, rare_shares=None, geometry=None, color=None):
        self.sources, self.indices, shares = zip(*parts)
        self.shares = np.array(shares, float) / sum(shares)
        self.class_names = list(class_names)
        self.lookups = [class_lookup(source, class_names) for source in self.sources]
        self.target = mpp, sigma, combine
        self.crop = crop
        self.seed = seed
        self.rare = rare
        self.rare_shares = np.ones(len(class_names))
        if rare_shares:
            self.rare_shares = np.array(rare_shares)
        self.geometry = geometry
        self.color = color

        self.cache = {}  # (part, i) -> Sample
        self.cached = 0  # bytes
        self.shapes = []  # (images, 2) of each part; this and the next are filled by `load`
        self.nuclei = []  # (N, 4) of each part: class, i, y, x

    def __getstate__(self):
        # or a spawned worker would receive all images
        return self.__dict__ | {"cache": {}, "cached": 0}

    def load(self, workers=0, progress=None):
        """Reads every image once, keeps it if there is room, and notes its shape and nuclei.

        workers: processes that read. progress: called with the images read and their number.
        Raises: what the sources raise for an image or label that is not understood.
        """
        parts, numbers = [], []
        for part, indices in enumerate(self.indices):
            parts += [part] * len(indices)
            numbers += indices

        # read, in several processes if asked; they ignore Ctrl-C, this one handles it
        pool = None
        if workers > 1:
            pool = ProcessPoolExecutor(workers, initializer=signal.signal,
                                       initargs=(signal.SIGINT, signal.SIG_IGN))
        try:
            if pool:
                samples = pool.map(self.read, parts, numbers, chunksize=4)
            else:
                samples = map(self.read, parts, numbers)
            self.note(parts, numbers, samples, progress)
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)

    def note(self, parts, numbers, samples, progress):
        """Keeps the samples as they arrive, and fills `shapes` and `nuclei`."""
        shapes = [[] for _ in self.sources]
        nuclei = [[] for _ in self.sources]
        for done, (part, i, sample) in enumerate(zip(parts, numbers, samples), 1):
            self.keep(part, i, sample)
            shapes[part].append(sample.type_map.shape)
            where = np.full(len(sample.classes), i)
            table = np.column_stack((sample.classes, where, sample.centroids))
            nuclei[part].append(table)
            if progress:
                progress(done, len(numbers))
        self.shapes = [np.array(rows) for rows in shapes]
        self.nuclei = [np.concatenate(rows) for rows in nuclei]

    def read(self, part, i):
        """Image i of a part, from its files."""
        source, lookup = self.sources[part], self.lookups[part]
        return prepare(source, i, lookup, *self.target)

    def keep(self, part, i, sample):
        """Keeps an image in memory while there is room."""
        size = sum(array.nbytes for array in sample)
        if self.cached + size <= CACHE_BYTES:
            self.cached += size
            self.cache[part, i] = sample

    def sample(self, part, i):
        """Image i of a part, from memory if it is kept there."""
        sample = self.cache.get((part, i))
        if sample is None:
            sample = self.read(part, i)
            self.keep(part, i, sample)
        return sample

    def pixels(self):
        """Total number of pixels of all images."""
        shapes = np.concatenate(self.shapes)
        return int(shapes.prod(axis=1).sum())

    def class_counts(self):
        """{class name: nuclei} over all parts, and the nuclei of unknown class."""
        table = np.concatenate(self.nuclei)
        classes = table[:, 0].astype(int)
        counts = np.bincount(classes, minlength=256).tolist()
        known = dict(zip(self.class_names, counts[1:]))
        return known, counts[UNKNOWN_CLASS]

    def class_frequency(self, samples=256):
        """(K + 1,) float: share of the pixels of each class, background first, in drawn crops."""
        counts = np.zeros(256)
        for n in range(samples):
            _, part, i, view = self.draw(n)
            sample = self.sample(part, i)
            _, type_map, _ = warp(sample, view, self.crop)
            counts += np.bincount(type_map.ravel(), minlength=256)
        counts = counts[:len(self.class_names) + 1]  # without the unknown
        return counts / max(counts.sum(), 1)

    def pick_rare(self, rng, part):
        """(i, center) near a nucleus whose class is drawn first.

        None if this crop is not one of the share `rare`, or the part has fewer than two classes.
        """
        classes = self.nuclei[part][:, 0]
        present = np.unique(classes).astype(int)
        present = present[present <= len(self.class_names)]  # without the unknown
        if len(present) < 2 or rng.random() >= self.rare:
            return None
        shares = self.rare_shares[present - 1]
        k = rng.choice(present, p=shares / shares.sum())
        row = rng.choice(np.flatnonzero(classes == k))
        _, i, y, x = self.nuclei[part][row]
        away = self.crop * rng.uniform(-0.4, 0.4, 2)
        center = (y + 0.5, x + 0.5) + away
        return int(i), center

    def pick(self, rng):
        """Draws the place of a crop: part, i, and its centre (y, x), see `View`."""
        parts = len(self.shares)
        part = int(rng.choice(parts, p=self.shares))
        place = self.pick_rare(rng, part)
        if place:
            return part, *place

        # any place; large images are drawn more often
        shapes = self.shapes[part]
        areas = shapes.prod(axis=1)
        number = rng.choice(len(areas), p=areas / areas.sum())
        i = int(self.indices[part][number])
        shape = shapes[number]
        margin = np.minimum(0.35 * self.crop, shape / 2)
        center = rng.uniform(margin, shape - margin)
        return part, i, center

    def draw(self, n):
        """Everything random about crop n except its colours: generator, part, i, view."""
        rng = np.random.default_rng((self.seed, n))
        part, i, center = self.pick(rng)
        matrix, zoom = np.eye(2), 1.0
        if self.geometry is not None:
            matrix, zoom = random_affine(rng, **self.geometry)
        if zoom == 1:  # align with pixels, so that a quarter turn resamples nothing
            half = self.crop / 2
            center = np.round(center - half) + half
        return rng, part, i, View(center, matrix, zoom)

    def name(self, n):
        """The name of the image that crop n is taken from."""
        _, part, i, _ = self.draw(n)
        return self.sources[part].names[i]

    def __getitem__(self, n):
        rng, part, i, view = self.draw(n)
        sample = self.sample(part, i)
        image, type_map, density = warp(sample, view, self.crop)
        if self.color is not None:
            image = random_stain(image, rng, **self.color)
        image = torch.from_numpy(image.transpose(2, 0, 1).copy())
        type_map = torch.from_numpy(type_map.copy())
        density = torch.from_numpy(density)
        return image, type_map, density[None]
