"""Settings and fixtures of all tests: one thread per process, as each core has a process, and a fixed seed."""

import os

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before PyTorch is imported, and for the processes that tests start

import pytest
import torch
from helpers import SMALL, fit

from timm_depla.data import digits_folder, scenes


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def digit():
    """The file of a four."""
    return min((digits_folder() / 'validation' / '4').iterdir())


@pytest.fixture(scope='session')
def small_scenes(tmp_path_factory):
    """A few digits in scenes. Tests copy them before they change them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, 'IMAGES', {'train': 9, 'val': 4})
        return scenes.scenes_folder(tmp_path_factory.mktemp('scenes') / 'scenes')


@pytest.fixture(scope='session')
def digits_run(tmp_path_factory):
    """A run of three epochs on the embedded digits, of 32 pixels. Tests copy it before they change it."""
    output = tmp_path_factory.mktemp('digits')
    fit(*SMALL, '--epochs', 3, '--output', output, '--experiment', 'run')
    return output / 'run'
