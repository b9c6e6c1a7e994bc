"""The published reconstruction, written from the paper and the published config, to compare with.

Needs scikit-image (pip install -r benchmarks/requirements.txt), and only where it is called.
"""

import importlib.util
import sys

import numpy as np
from scipy import ndimage

H = 0.15  # published config


def can_compare():
    """Whether scikit-image is installed; says so where it is not."""
    if importlib.util.find_spec("skimage"):
        return True
    print("the published recipe is left out: pip install -r benchmarks/requirements.txt",
          file=sys.stderr)
    return False


def published_markers(density):
    """(H, W) labels of the h-maxima of the density stretched to [0, 1], or, where it has a
    negative value, to [-1, 1]: published, and it halves h."""
    from skimage.morphology import h_maxima

    low, high = density.min(), density.max()
    stretched = (density - low) / (high - low)
    if low < 0:
        stretched = 2 * stretched - 1
    return ndimage.label(h_maxima(stretched, H), np.ones((3, 3)))[0]


def published_instances(class_probability, density):
    """(H, W) labels: compact watershed of the distance transform, less pixels where two touch."""
    from skimage.segmentation import watershed

    mask = class_probability.argmax(axis=0) > 0
    distance = ndimage.distance_transform_edt(mask)
    labels = watershed(-distance, published_markers(density), mask=mask, compactness=1)
    lowest = ndimage.minimum_filter(np.where(labels > 0, labels, labels.max() + 1), 3)
    return np.where(ndimage.maximum_filter(labels, 3) == lowest, labels, 0)


def published_nuclei(class_probability, density):
    """The labels, and of each nucleus its class by majority and the centre of its box.

    Each nucleus takes a look at the whole image, which makes the time quadratic.
    """
    inst_map = published_instances(class_probability, density)
    type_map = class_probability.argmax(axis=0)
    nuclei = []
    for label in np.unique(inst_map)[1:]:
        pixels = inst_map == label
        y, x = np.nonzero(pixels)
        nucleus_class = np.bincount(type_map[pixels]).argmax()
        nuclei.append((nucleus_class, (y.min() + y.max()) / 2, (x.min() + x.max()) / 2))
    return inst_map, nuclei
