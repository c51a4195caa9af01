"""Folders of a user's own images: what is used, what is not, and predictions on them."""

import csv
import json
import os
import shutil
import sys

import numpy as np
import pytest
import yaml
from helpers import fit, summary, validate
from huggingface_hub import constants
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from timm_depla.data import check_data, find_images
from timm_depla.engine.classification.datasets import open_splits
from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.config import parse_args
from timm_depla.errors import ConfigError
from timm_depla.layers import Depla
from timm_depla.predict import classify, main, render
from timm_depla.visualize import load_any

FAST = ['--model', 'test_resnet', '--img-size', 32, '--batch-size', 4, '--workers', 1, '--epochs', 1]
SPLIT = ['--val-fraction', 0.3]
COLOURS = {'blue': (20, 40, 200), 'red': (200, 40, 20)}


@pytest.fixture
def photos(tmp_path):
    """DIR/CLASS/IMAGE, 20 images of each of two classes."""
    for name, colour in COLOURS.items():
        (tmp_path / 'photos' / name).mkdir(parents=True)
        for i in range(20):
            Image.new('RGB', (40, 30), colour).save(tmp_path / 'photos' / name / f'{i}.png')
    return tmp_path / 'photos'


def splits(folder, *argv):
    """The file names of both splits."""
    args = parse_args(create_train_parser(), [str(a) for a in [folder, *SPLIT, *argv]])
    return [set(dataset.filenames()) for dataset in open_splits(args)[1:]]


def test_a_folder_without_splits_is_divided_by_class_and_stays_so(photos):
    with pytest.raises(ConfigError, match=r"no folder or tar file 'train' in .*: divide '.*photos' by --val-fraction"):
        fit(photos, *FAST)
    train, val = splits(photos)
    assert len(train | val) == 40 and not train & val
    for name in COLOURS:
        assert 1 <= sum(file.startswith(name) for file in val) <= 12
    for i in range(20, 60):
        shutil.copy(photos / 'red' / '0.png', photos / 'red' / f'{i}.png')
    shutil.copytree(photos, photos.parent / 'elsewhere' / 'train')
    grown = splits(photos)
    assert train < grown[0] and val < grown[1]
    assert splits(photos.parent / 'elsewhere') == grown  # a training split alone is divided alike
    (photos.parent / 'elsewhere' / 'val').mkdir()
    with pytest.raises(ConfigError, match="has a validation split, 'val': leave out --val-fraction"):
        splits(photos.parent / 'elsewhere')


def test_small_classes_have_both_parts(photos):
    for i in range(2, 20):
        (photos / 'red' / f'{i}.png').unlink()
    train, val = splits(photos, '--val-fraction', 0.001)
    assert sorted(file.split('/')[0] for file in val) == ['blue', 'red']
    assert sum(file.startswith('red') for file in train) == 1


def test_a_divided_folder_from_training_to_predictions(photos, tmp_path, monkeypatch, capsys):
    """The run remembers how it was divided, and validates and predicts by itself, in the fused form."""

    def predict(*argv):
        monkeypatch.setattr(sys, 'argv', ['predict', *map(str, argv)])
        capsys.readouterr()
        main()

    argv = [*FAST, '--model', 'test_resnet_depla', '--epochs', 3, '--lr', 0.05, '--warmup-epochs', 0]
    assert fit(photos, *SPLIT, *argv, '--output', tmp_path, '--experiment', 'run') == 0
    assert yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())['val_fraction'] == 0.3
    (row,) = validate(tmp_path / 'run')
    assert row['images'] == len(splits(photos)[1])
    assert row['top1'] == max(float(epoch['eval_top1']) for epoch in summary(tmp_path / 'run'))
    more = ['--resume', tmp_path / 'run', '--resume-with-changes', '--epochs', 4]  # of the finished run
    assert fit('--recipe', tmp_path / 'run/args.yaml', *more) == 0
    assert len(summary(tmp_path / 'run')) == 4
    files = [tmp_path / name for name in ('sheet.png', 'table.csv', 'table.json')]
    used = set()
    with register_module_forward_pre_hook(lambda module, _: used.add(module)):
        predict(tmp_path / 'run', photos / 'red', photos / 'blue/0.png', '--output', *files)
    blocks = [module for module in used if isinstance(module, Depla)]
    assert blocks and all(block.bias is not None for block in blocks)
    rows = json.loads(files[2].read_text())
    assert len(rows) == 21 == len(capsys.readouterr().out.splitlines())
    for row in rows:
        assert sum(found['score'] for found in row['predictions']) == pytest.approx(1)
        assert {found['label'] for found in row['predictions']} == set(COLOURS)
    found, _ = classify(load_any(str(tmp_path / 'run')), photos / 'blue/0.png')  # as trained
    pairs = zip(rows[-1]['predictions'], found, strict=True)
    assert all(a['label'] == b['label'] and a['score'] == pytest.approx(b['score'], abs=1e-5) for a, b in pairs)
    table = list(csv.DictReader(files[1].open()))
    assert [row['image'] for row in table[::2]] == [row['image'] for row in rows]
    sheet = np.asarray(Image.open(files[0])).reshape(-1, 3)
    assert all((sheet == colour).all(1).any() for colour in COLOURS.values())
    (photos / 'red' / 'no.png').write_text('no image')
    with pytest.raises(ConfigError, match="1 of 21 images cannot be read: '"):
        predict(tmp_path / 'run', photos / 'red')
    assert len(capsys.readouterr().out.splitlines()) == 20
    with pytest.raises(ConfigError, match='name a file that ends in'):
        predict('x', 'y', '--output', 'z')


@pytest.mark.parametrize(
    'target,kinds,message',
    [('pipe', ['', 'torch/image_folder', 'wds/'], 'is a pipe or a device: remove it'),
     ('.', ['', 'torch/image_folder'], 'links lead to .* a second time: remove one')],
)  # fmt: skip
def test_data_that_need_not_end(target, kinds, message, photos):
    """A pipe for an image or a shard, and a folder within itself."""
    os.mkfifo(photos / 'pipe') if target == 'pipe' else None
    (photos / 'x.png').symlink_to(target)
    for kind in kinds:
        with pytest.raises(ConfigError, match=message):
            splits(photos, '--dataset', kind, '--train-split', '.', '--val-split', '.', '--val-fraction', 0)
    with pytest.raises(ConfigError, match=message):
        find_images(photos)
    (photos / '_x_tarinfos.pickle').symlink_to('nowhere')
    with pytest.raises(ValueError, match=r'_x_tarinfos.pickle. is a link: remove it'):
        check_data(photos / 'x.tar')


def test_names_of_any_characters():
    """Of files, which need not be text, and of classes."""
    results = [([dict(label='a\nb', score=1.0)], Image.new('RGB', (8, 8)))]
    assert all(render(suffix, ['\udcff\n'], results) for suffix in ('.csv', '.json', '.png'))


@pytest.mark.parametrize('names', [('Train', 'Val'), ('TRAIN', 'TEST'), ('train', 'Validation')])
def test_splits_in_any_case(names, photos, tmp_path):
    for name in names:
        shutil.copytree(photos, tmp_path / 'data' / name)
    train, val = splits(tmp_path / 'data', '--val-fraction', 0)
    assert len(train) == len(val) == 40


def write_kinds(folder):
    """Images of every kind, and files that are none."""
    grey = Image.fromarray(np.tile(np.arange(0, 65536, 2048, dtype=np.uint16), (32, 1)))
    colour, other = Image.new('RGB', (32, 32), COLOURS['red']), Image.new('RGB', (32, 32), COLOURS['blue'])
    colour.save(folder / 'still.gif')
    for name in ('moving.gif', 'animated.png', 'animated.webp'):
        colour.save(folder / name, save_all=True, append_images=[other])
    grey.save(folder / 'deep.png')
    colour.convert('CMYK').save(folder / 'print.jpg')
    exif = Image.Exif()
    exif[0x0112] = 6
    colour.save(folder / 'turned.jpg', exif=exif)
    colour.quantize(4).save(folder / 'palette.png')
    colour.convert('RGBA').save(folder / 'clear.PNG')
    for name in ('1.bmp', '2.tiff', '3.tif', '4.JPG', '5.webp'):
        colour.save(folder / name)
    (folder / 'empty.jpg').touch()
    colour.resize((200, 200)).effect_spread(50).save(folder / 'cut.jpg')
    (folder / 'cut.jpg').write_bytes((folder / 'cut.jpg').read_bytes()[:900])
    (folder / 'text.png').write_text('this is no image')
    (folder / 'notes.txt').write_text('nor is this')
    (folder / 'raw.heic').write_bytes(b'0')


def test_every_file_is_used_or_named(photos, tmp_path, caplog):
    caplog.set_level('INFO')
    shutil.copytree(photos, tmp_path / 'data' / 'val')
    photos = photos.rename(tmp_path / 'data' / 'train')
    write_kinds(photos / 'red')
    (photos / 'green').mkdir()
    shutil.copy(photos / 'blue' / '0.png', photos / 'loose.png')
    argv = [tmp_path / 'data', *FAST, '--output', tmp_path / 'out']
    with pytest.raises(ConfigError) as caught:
        fit(*argv)
    said = str(caught.value)
    assert "3 of the 57 images of the split 'train' cannot be read" in said and not (tmp_path / 'out').exists()
    for name, cause in (('empty.jpg', 'cannot identify'), ('cut.jpg', 'truncated'), ('text.png', 'cannot identify')):
        assert f'  red/{name}: ' in said and cause in said
    assert "3 of the 57 images of the split 'train' have several frames, of which the first is read:" in caplog.text
    assert '\n  red/animated.png\n  red/animated.webp\n  red/moving.gif' in caplog.text
    assert "1 of the 57 images of the split 'train' are turned by EXIF alone, which is not applied" in caplog.text
    assert "not used: files of other kinds (1 .txt, 1 .heic): 'red/notes.txt', 'red/raw.heic'; " in caplog.text
    assert "images in no folder of a class (1): 'loose.png'; folders of classes without images (1): 'g" in caplog.text
    for name in ('empty.jpg', 'cut.jpg'):
        (photos / 'red' / name).unlink()
    assert fit(*argv, '--experiment', 'one') == 0  # unreadable is less than the floor
    used = splits(tmp_path / 'data', '--val-fraction', 0)[0]
    plain = {'deep.png', 'clear.PNG', 'print.jpg', 'palette.png', '1.bmp', '2.tiff', '3.tif', '4.JPG', '5.webp'}
    assert {f'red/{name}' for name in ('still.gif', *plain)} <= used


def test_classes_of_one_split_alone(photos, tmp_path):
    for name, only in (('train', 'cat'), ('val', 'dog')):
        shutil.copytree(photos, tmp_path / 'data' / name)
        (tmp_path / 'data' / name / 'red').rename(tmp_path / 'data' / name / only)
    with pytest.raises(ConfigError, match=r"'cat' in 'train' alone; 'dog' in 'validation' alone: add .*--class-map"):
        splits(tmp_path / 'data', '--val-fraction', 0)
    (tmp_path / 'map.txt').write_text('blue\ncat\ndog\n')
    assert len(splits(tmp_path / 'data', '--val-fraction', 0, '--class-map', tmp_path / 'map.txt')[0]) == 40
    (tmp_path / 'map.txt').write_text('wolf\n')
    with pytest.raises(ConfigError, match=r"no classes with images in .* classes that are not in .*: 'blue', 'cat'"):
        splits(tmp_path / 'data', '--val-fraction', 0, '--class-map', tmp_path / 'map.txt')


def test_weights_that_cannot_be_fetched_fail_at_once(photos, monkeypatch, caplog):
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')  # nobody answers there
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    for argv in (['--initial-checkpoint', 'resnet18.a1_in1k'], ['--model', 'resnet18.a1_in1k', '--pretrained']):
        with pytest.raises(ConfigError, match=r'127.0.0.1:9 cannot be reached, and its cache lacks the weights'):
            fit(photos, *SPLIT, *FAST, *argv)
    assert 'Retrying' not in caplog.text


def test_dry_run_tries_what_training_needs(photos, tmp_path, caplog, capsys):
    argv = [photos, *SPLIT, *FAST, '--dry-run', '--output', tmp_path / 'out']
    assert fit(*argv, '--recipe', 'digits', '--lr', 100) == 0
    assert '(1,000 times the recipe)' in capsys.readouterr().out
    for flag, value, message in (
        ('--initial-checkpoint', 'nowhere.pth', r"cannot load 'nowhere\.pth'"),
        ('--initial-checkpoint', 'hub/weights/test_resnet_depla.digits', r'cannot load .*test_resnet_depla.digits'),
        ('--kd-model-name', 'hub/weights/test_resnet_depla.digits', r'teacher .* has 10 classes, not 2'),
        ('--aa', 'orignal', "'orignal'.*did you mean 'original"),
        ('--opt', 'adamv', "'adamv'.*did you mean 'adam"),
        ('--sched', 'cosin', "'cosin'.*did you mean 'cosine"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit(*argv, flag, value)
    assert not (tmp_path / 'out').exists()
