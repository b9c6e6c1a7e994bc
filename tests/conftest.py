"""What the tests share: the modules on the path, warnings as errors, a tile of synthetic tissue."""

import sys
from pathlib import Path

import pytest
import torch

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
