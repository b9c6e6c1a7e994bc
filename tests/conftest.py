"""What the tests share: the modules on the path, warnings as errors, a tile of synthetic tissue."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root():
    """The repository's folder."""
    return ROOT


@pytest.fixture(scope="session")
def tissue():
    """One tile of synthetic tissue: image (256, 256, 3) uint8, inst_map int32, type_map uint8."""
    from data import synthetic_tissue

    return synthetic_tissue(3)


def write_tiles(folder, seeds, types=True):
    """A plain folder of 96² tiles t0, t1, ... of synthetic tissue, with or without classes."""
    from data import CONSEP_CLASSES, nucleus_classes, synthetic_tissue

    for name in ("images", "labels", "types"):
        (folder / name).mkdir(parents=True)
    if types:
        (folder / "classes.json").write_text(json.dumps(CONSEP_CLASSES))
    for i, seed in enumerate(seeds):
        image, inst_map, type_map = synthetic_tissue(seed, 96)
        Image.fromarray(image).save(folder / "images" / f"t{i}.png")
        Image.fromarray(inst_map.astype(np.uint16)).save(folder / "labels" / f"t{i}.png")
        names = {}
        for number, k in enumerate(nucleus_classes(inst_map, type_map), 1):
            names[number] = CONSEP_CLASSES[k - 1]
        if types:
            (folder / "types" / f"t{i}.json").write_text(json.dumps(names))
    return folder
