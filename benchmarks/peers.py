"""What DualU-Net is timed against: HoVer-Net's three decoders and the published reconstruction.

Written from the papers, for clocks and not for predictions: HoVer-Net's weights are random.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

try:
    from skimage.morphology import h_maxima
    from skimage.segmentation import watershed
except ImportError:  # the caller then does without the reconstruction
    h_maxima = watershed = None


# ---------------------------------------------------------------- HoVer-Net


def conv(channels, out_channels, kernel, *, stride=1, padding=0, groups=1):
    """Pre-activation: BatchNorm, ReLU, convolution."""
    weights = nn.Conv2d(channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), weights)


class Residual(nn.Module):
    """Bottleneck: 1×1, 3×3 with the stride, 1×1 to four times the width."""

    def __init__(self, channels, width, stride):
        super().__init__()
        middle = conv(width, width, 3, stride=stride, padding=1)
        self.body = nn.Sequential(conv(channels, width, 1), middle, conv(width, 4 * width, 1))
        self.shortcut = nn.Identity()
        if channels != 4 * width:
            self.shortcut = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)

    def forward(self, x):
        return self.body(x) + self.shortcut(x)


class Dense(nn.Module):
    """Adds 32 channels: 1×1 to 128, 3×3 in four groups and without padding."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(conv(channels, 128, 1), conv(128, 32, 3, groups=4))

    def forward(self, x):
        return torch.cat([x[..., 1:-1, 1:-1], self.body(x)], dim=1)


def decoder_level(in_channels, channels, units):
    """3×3 without padding, dense units, 1×1; upsampling comes before."""
    grown = [channels + 32 * unit for unit in range(units + 1)]
    return nn.Sequential(nn.Conv2d(in_channels, channels, 3, bias=False),
                         *map(Dense, grown[:-1]), conv(grown[-1], grown[-1], 1))


class HoVerNet(nn.Module):
    """HoVer-Net's fast form: (N, 3, 256, 256) in, maps (N, 2 | 2 | K + 1, 164, 164) out.

    Source: Graham et al. 2019, doi.org/10.1016/j.media.2019.101563.
    """

    def __init__(self, num_classes=4):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 7, padding=3, bias=False)
        self.stages, channels = nn.ModuleList(), 64
        for width, units, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            more = (Residual(4 * width, width, 1) for _ in range(units - 1))
            self.stages.append(nn.Sequential(Residual(channels, width, stride), *more))
            channels = 4 * width
        self.bottom = nn.Conv2d(channels, 1024, 1, bias=False)
        self.branches = nn.ModuleList(
            nn.ModuleList([decoder_level(1024, 256, 8), decoder_level(512, 128, 4),
                           nn.Conv2d(256, 64, 3, padding=1, bias=False), conv(64, outputs, 1)])
            for outputs in (2, 2, num_classes + 1))  # nuclei, distances, classes

    def forward(self, images):
        x, skips, maps = self.stem(images), [], []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)  # 256 at /1, 512 at /2, 1024 at /4, 2048 at /8
        bottom = self.bottom(x)
        for *levels, head in self.branches:
            x = bottom
            for level, skip in zip(levels, skips[-2::-1]):
                x = F.interpolate(x, scale_factor=2, mode="nearest")
                margin = (x.shape[-1] - skip.shape[-1]) // 2  # negative: the skip's centre is taken
                x = level(x + F.pad(skip, 4 * (margin,)))
            maps.append(head(x))
        return maps


# ---------------------------------------------------------------- the published reconstruction


def published_markers(density, h=0.15):
    """The h-maxima of the map stretched to [0, 1], or to [-1, 1] if it has a negative value."""
    low, high = density.min(), density.max()
    stretched = (density - low) / (high - low)
    maxima = h_maxima(2 * stretched - 1 if low < 0 else stretched, h)
    return ndimage.label(maxima, np.ones((3, 3)))[0]


def published_instances(type_map, density):
    """(H, W) labels: compact watershed of the distance transform, less pixels where two touch."""
    mask = type_map > 0
    distance, markers = ndimage.distance_transform_edt(mask), published_markers(density)
    labels = watershed(-distance, markers, mask=mask, compactness=1)
    lowest = ndimage.minimum_filter(np.where(labels > 0, labels, labels.max() + 1), 3)
    return np.where(ndimage.maximum_filter(labels, 3) == lowest, labels, 0)


def published_nuclei(type_map, density):
    """Labels, and (class, y, x) a nucleus: its majority and its box's centre, each from a look at
    the whole image, which makes the time quadratic."""
    inst_map, nuclei = published_instances(type_map, density), []
    for label in np.unique(inst_map)[1:]:
        pixels = inst_map == label
        y, x = np.nonzero(pixels)
        kind = np.bincount(type_map[pixels]).argmax()
        nuclei.append((kind, (y.min() + y.max()) / 2, (x.min() + x.max()) / 2))
    return inst_map, nuclei
