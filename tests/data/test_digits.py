"""The embedded data set: real, split as documented, written once and verified on reuse."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from timm_depla.data import digits_folder
from timm_depla.errors import ConfigError


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return digits_folder(tmp_path_factory.mktemp('cache') / 'digits')


def test_holds_every_digit_once_under_its_class(folder):
    """And every class is divided alike."""
    images, labels = load_digits(return_X_y=True)
    paths = sorted(folder.glob('*/*/*.png'))
    assert sorted(int(p.stem) for p in paths) == list(range(1797))
    for path in paths[::100]:
        assert int(path.parent.name) == labels[int(path.stem)]
        expected = images[int(path.stem)].reshape(8, 8) * (255 / 16)
        assert np.abs(np.asarray(Image.open(path)) - expected).max() <= 0.5
    labels = [sorted((folder / split).iterdir()) for split in ('train', 'validation')]
    counts = np.array([[len(list(label.iterdir())) for label in split] for split in labels])
    assert counts.sum(1).tolist() == [1438, 359]
    assert (abs(counts[1] - counts.sum(0) / 5) <= 0.5).all()


def test_reused_as_it_is_and_written_again_when_damaged(folder, caplog):
    image = sorted((folder / 'train' / '3').iterdir())[0]
    before = image.stat().st_mtime_ns
    assert digits_folder(folder) == folder
    assert image.stat().st_mtime_ns == before
    for damage in (image.unlink, lambda: image.write_bytes(b'no image')):
        damage()
        digits_folder(folder)
        assert Image.open(image).size == (8, 8)
    assert caplog.text.count('is incomplete or was changed; writing it again') == 2


def test_folder_that_cannot_be_written():
    with pytest.raises(ConfigError, match="cannot write '/proc/nowhere/digits': "):
        digits_folder('/proc/nowhere/digits')


def test_first_starts_at_once(tmp_path):
    """Processes that find no digits write them once, and all have them."""
    code = 'from timm_depla.data import digits_folder; print(len(list(digits_folder().rglob("*.png"))))'
    env = {**os.environ, 'XDG_CACHE_HOME': str(tmp_path)}
    command = [sys.executable, '-c', code]
    started = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in started] == ['1797'] * 3
    assert all(process.returncode == 0 for process in started)
