"""Every kind of data set that timm reads, resumed from any step and shared by processes."""

import io
import random
import shutil
import tarfile
from importlib.util import find_spec

import numpy as np
import pytest
import timm
import torch
from helpers import equal, fit, validate
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms.v2.functional import pil_to_tensor

from timm_depla.data import TensorResizedCrop, check_source, read_pixels
from timm_depla.engine.classification.datasets import count_classes, open_splits
from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.classification.loaders import TrainLoader, create_val_loader, resolve_data
from timm_depla.engine.config import parse_args, updated
from timm_depla.engine.distributed import World
from timm_depla.errors import ConfigError, TrainingError
from timm_depla.files import open_image

CPU = torch.device('cpu')
SHORT = ['--model', 'test_resnet', '--img-size', 32, '--batch-size', 4, '--epochs', 1, '--workers', 1]
LABELS = [i % 3 for i in range(40)]
needs_torchcodec = pytest.mark.skipif(find_spec('torchcodec') is None, reason='no torchcodec')


def image(index):
    """An image whose pixels tell its index."""
    return Image.new('RGB', (16, 16), (6 * index, 6 * index, 6 * index))


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """The same 40 images of three classes as a folder, as tar files, as WebDataset shards and as parquet files."""
    root = tmp_path_factory.mktemp('data')
    (root / 'tars').mkdir()
    for split in ('train', 'validation'):
        for index, label in enumerate(LABELS):
            folder = root / 'folder' / split / f'class{label}'
            folder.mkdir(parents=True, exist_ok=True)
            image(index).save(folder / f'{index:02}.png')
        with tarfile.open(root / 'tars' / f'{split}.tar', 'w') as tar:
            tar.add(root / 'folder' / split, '.')
    datasets = pytest.importorskip('datasets')
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(3)})
    (root / 'shards').mkdir()
    (root / 'parquet').mkdir()
    for shard in range(4):
        indices = range(10 * shard, 10 * shard + 10)
        with tarfile.open(root / 'shards' / f'data-{shard}.tar', 'w') as tar:
            for index in indices:
                file = root / 'folder' / 'train' / f'class{LABELS[index]}' / f'{index:02}.png'
                add(tar, file.name, file.read_bytes())
                add(tar, f'{index:02}.cls', str(LABELS[index]).encode())
        columns = {'image': [image(i) for i in indices], 'label': [LABELS[i] for i in indices]}
        table = datasets.Dataset.from_dict(columns, features=features)
        for split in ('train', 'validation'):
            table.to_parquet(str(root / 'parquet' / f'{split}-{shard}.parquet'))
    with pytest.MonkeyPatch.context() as patch:  # it waits five seconds after each pass, for PyArrow's threads
        patch.setattr(datasets.config, 'SLEEP_TIME_ON_THREADS_SHUTDOWN', 0.1)
        yield root


@pytest.fixture
def flags(data):
    shards = ['--train-split', 'data-{0..3}.tar', '--val-split', 'data-{0..3}.tar', '--num-classes', 3]
    return {
        'folder': ['--data-dir', data / 'folder'],
        'torch': ['--data-dir', data / 'folder', '--dataset', 'torch/image_folder'],
        'hfds': ['--dataset', f'hfds/{data / "parquet"}'],
        'hfids': ['--dataset', f'hfids/{data / "parquet"}', '--num-classes', 3],
        'wds': ['--data-dir', data / 'shards', '--dataset', 'wds/', *shards],
    }


def arguments(*argv):
    return parse_args(create_train_parser(), [str(a) for a in ['--img-size', 8, '--batch-size', 4, *argv]])


def load(args, rank=0, size=1):
    world = World(CPU, rank, size)
    args, train_set, val_set = open_splits(args)
    args = updated(args, num_classes=count_classes(args, train_set))
    config = resolve_data(args)
    return TrainLoader(args, train_set, config, world), create_val_loader(args, val_set, config, world)


@pytest.mark.parametrize(
    'kind,workers', [('folder', 0), ('folder', 2), ('torch', 2), ('hfds', 2), ('hfids', 2), ('wds', 0), ('wds', 2)]
)
def test_any_step_of_any_epoch(kind, workers, flags):
    args = arguments(*flags[kind], '--workers', workers, '--mixup', 0.2, '--reprob', 0.5)
    whole = [list(load(args)[0].epoch(epoch)) for epoch in range(2)]
    assert not equal(whole[0], whole[1])
    loader = load(args)[0]
    assert len(loader) == len(whole[1]) == 10
    for start in (0, 3, 10):
        assert equal(list(loader.epoch(1, start)), whole[1][start:])
    assert equal(list(loader.epoch(0)), whole[0])


@pytest.mark.parametrize('kind', ['folder', 'wds'])
def test_mixing(kind, flags):
    """A mixed batch is a weighted sum of it and itself in reverse order, as the targets say, until mixing ends."""
    argv = [*flags[kind], '--smoothing', 0, '--scale', 1, 1, '--hflip', 0]
    mixed, _ = load(arguments(*argv, '--mixup', 0.4, '--mixup-off-epoch', 2))
    plain, _ = load(arguments(*argv))
    weights = []
    for (images, soft), (originals, labels) in zip(mixed.epoch(1), plain.epoch(1), strict=True):
        hot = torch.nn.functional.one_hot(labels, 3)
        different = (hot != hot.flip(0)).any(1)
        if different.any():
            weights.append(soft[different].gather(1, labels[different, None])[0].item())
            assert torch.allclose(images, weights[-1] * originals + (1 - weights[-1]) * originals.flip(0), atol=1e-5)
    assert any(0.01 < weight < 0.99 for weight in weights)
    for images, soft in mixed.epoch(2):
        assert images.is_contiguous()
        assert set(soft.flatten().tolist()) == {0, 1}


@pytest.mark.parametrize('kind', ['folder', 'hfds', 'wds'])
def test_epoch_has_each_image_once(kind, flags):
    loader, _ = load(arguments(*flags[kind], '--no-aug', '--workers', 2))
    seen = sorted(value for images, _ in loader.epoch(0) for value in images[:, 0, 0, 0].tolist())
    assert len(set(seen)) == 40


@pytest.mark.parametrize('kind', ['folder', 'torch', 'hfds', 'hfids', 'wds'])
@pytest.mark.parametrize('size', [1, 2, 3])
def test_validation_counts_each_image_once(kind, size, flags):
    seen = []
    for rank in range(size):
        args = arguments(*flags[kind], '--workers', 1)
        for images, targets in load(args, rank, size)[1]:
            seen += zip(images[:, 0, 0, 0].tolist(), targets.tolist(), strict=True)
    assert len(seen) == len(set(seen)) == 40
    assert sorted(label for _, label in seen) == sorted(LABELS)


def test_stream_of_unknown_length_is_counted(flags, caplog):
    caplog.set_level('INFO')
    assert len(load(arguments(*flags['wds'], '--workers', 1))[0]) == 10
    assert "counted 40 images of 'data-{0..3}.tar': --train-num-samples saves the counting" in caplog.text
    with pytest.raises(ConfigError, match=r'the length of .*data-4.tar. is not known: give --train-num-samples'):
        load(arguments(*flags['wds'], '--train-split', 'data-{0..4}.tar'))


def test_tar(data):
    """A folder with train.tar and validation.tar."""
    loader, val_loader = load(arguments('--data-dir', data / 'tars', '--workers', 2))
    folder, _ = load(arguments('--data-dir', data / 'folder', '--workers', 2))
    assert equal(list(loader.epoch(1, 7)), list(folder.epoch(1, 7)))
    assert sum(len(targets) for _, targets in val_loader) == 40
    with pytest.raises(ConfigError, match=r"no folder or tar file 'train' in '.*train.tar'"):
        load(arguments('--data-dir', data / 'tars' / 'train.tar'))
    with pytest.raises(ConfigError, match='would both read'):
        load(arguments('--data-dir', data / 'tars' / 'train.tar', '--train-split', '.', '--val-split', '.'))


@needs_torchcodec  # and the torch that it needs, which rounds less
@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic', 'random'])
@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_tensor_resized_crop_is_the_crop_but_for_rounding(mode, interpolation):
    crop = RandomResizedCropAndInterpolation((24, 40), interpolation=interpolation)
    generator = np.random.default_rng(0)
    for size in ((50, 37), (200, 300), (30, 400)):
        pixels = Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)
        for seed in range(5):
            crops = []
            tensor_crop = TensorResizedCrop(crop)
            for transform, source in ((crop, pixels), (tensor_crop, pixels), (tensor_crop, pil_to_tensor(pixels))):
                random.seed(seed)
                out = transform(source)
                out = pil_to_tensor(out) if isinstance(out, Image.Image) else out
                assert out.shape == (len(mode), 24, 40)
                crops.append((out.numpy().astype(int), random.random()))
            difference = abs(crops[0][0] - crops[1][0])
            assert difference.max() <= 2 and (difference > 0).mean() < 0.1
            assert crops[0][1] == crops[1][1]  # both drew as much
            np.testing.assert_equal(crops[1], crops[2])


@needs_torchcodec
@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'JPEG L', 'JPEG CMYK', 'JPEG progressive'])
def test_pixels_are_those_that_pillow_reads(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((70, 50), Image.Resampling.BICUBIC)
    extension, _, variant = kind.partition(' ')
    file = io.BytesIO()
    picture = picture.convert(variant) if variant in ('L', 'CMYK') else picture
    picture.save(file, extension, progressive=variant == 'progressive')
    images = []
    for read in (open_image, read_pixels):
        file.seek(0)
        images.append(read(file, 'RGB'))
    assert isinstance(images[1], torch.Tensor) == (kind in ('JPEG', 'JPEG progressive'))
    images[1] = images[1].permute(1, 2, 0) if isinstance(images[1], torch.Tensor) else images[1]
    difference = abs(np.asarray(images[0], dtype=int) - np.asarray(images[1], dtype=int))
    assert difference.max() <= 1  # another version of libjpeg may round differently
    with pytest.raises(OSError, match='truncated'):
        read_pixels(io.BytesIO(file.getvalue()[:-200]), 'RGB')


@needs_torchcodec
@pytest.mark.parametrize('argv', [[], ['--vflip', 0.5, '--color-jitter', 0], ['--aa', 'original', '--aug-splits', 2]])
def test_resize_backend(argv, flags):
    batches = {}
    for backend in ('pil', 'torch'):
        args = arguments(*flags['folder'], *argv, '--workers', 0, '--resize-backend', backend)
        batches[backend] = list(load(args)[0].epoch(1))
    for (images, targets), (others, other_targets) in zip(*batches.values(), strict=True):
        assert torch.equal(targets, other_targets)
        assert (images - others).abs().max() < 0.05  # two of 255, over the standard deviation


def test_processes_share_an_epoch(flags):
    """Two processes with half the batch see what one sees, augmented alike."""
    single = list(load(arguments(*flags['folder']))[0].epoch(1))
    ranks = [list(load(arguments(*flags['folder'], '-b', 2), rank, 2)[0].epoch(1)) for rank in range(2)]
    for whole, *halves in zip(single, *ranks, strict=True):
        assert torch.equal(whole[0], torch.stack([half[0] for half in halves], 1).flatten(0, 1))


def test_files_of_a_batch(flags, data):
    loader, _ = load(arguments(*flags['folder'], '--no-aug', '--train-interpolation', 'nearest'))
    images, _ = list(loader.epoch(1))[2]
    for pixels, name in zip(images, loader.files(1, 2), strict=True):
        value = (pixels[0, 0, 0] * 0.229 + 0.485) * 255
        assert round(value.item()) == Image.open(data / 'folder' / 'train' / name).getpixel((0, 0))[0]


def test_unreadable_validation_image_is_left_out(flags, data, tmp_path):
    shutil.copytree(data / 'folder', tmp_path / 'folder')
    (tmp_path / 'folder' / 'validation' / 'class0' / '00.png').write_bytes(b'')
    _, loader = load(arguments('--data-dir', tmp_path / 'folder'))
    targets = torch.cat([targets for _, targets in loader])
    assert len(targets) == 40
    assert (targets == -1).sum() == 1


@pytest.mark.parametrize(
    'argv,message',
    [
        (['--dataset', 'tfds/mnist'], 'tfds/ reads by TensorFlow'),
        (['--dataset', 'hfds//dev'], "cannot open the split 'train' of 'hfds//dev'"),
        (['--mixup', 0.2, '-b', 5], 'mixing takes an even batch, not 5'),
        (['--mixup', 0.2, '--aug-splits', 2], '--aug-splits does not go with mixup'),
        (['--resize-backend', 'torch', '--no-aug'], 'Resize is no random resized crop: leave out --resize-backend'),
        (['--resize-backend', 'torch', '--train-interpolation', 'lanczos'], 'not by lanczos: leave out --resize'),
        (['--class-map', 'no.txt'], "no file 'no.txt': check --class-map"),
        (['--in-chans', 4, '--aa', 'original'], "--aa 'original' takes grey and colour images, not those of 4"),
        (['-b', 41], 'a batch of 41 is larger than the training set of 40 images'),
        (['--class-map', 'map.pkl'], r"map.pkl' is a pickle, which is not read: write it as a text file"),
        (['--dataset', 'hfids/PARQUET', '--num-classes', 3, '--aug-repeats', 2], 'need a data set with random access'),
    ],
)
def test_bad_data_arguments(argv, message, flags, data, tmp_path):
    (tmp_path / 'map.pkl').touch()
    places = {'map.pkl': tmp_path / 'map.pkl', 'hfids/PARQUET': f'hfids/{data / "parquet"}'}
    argv = [places.get(a, a) for a in argv]
    if '--resize-backend' in argv:
        pytest.importorskip('torchcodec')
    with pytest.raises(ConfigError, match=message):
        load(arguments(*([] if '--dataset' in argv else flags['folder']), *argv))


@pytest.mark.parametrize(
    'source',
    ['pipe:id', ' PIPE:id', 'file:/etc/passwd', 'ais://x', "https://host/a'; id; '", 'https://host/$(id)', 'hf://a b',
     f'{{0..{9**400}}}.tar', '{a,b}' * 30, '{a..Z}' * 9],
)  # fmt: skip
def test_stream_that_a_shell_would_read_is_refused(source):
    with pytest.raises(ConfigError, match='is not read: '):
        check_source(source)
    for allowed in ('', '/data/shards', 'https://host/{train,val}-{000..127}.tar', 'hf://datasets/a/b', 's3://b/1'):
        check_source(allowed)  # it would raise


@pytest.mark.parametrize(
    'split,message',
    [('train', 'epoch 0 ended after 0 of 10 steps: the data has fewer images than'),
     ('val', 'validation got 0 images with a class that can be read, of 40')],
)  # fmt: skip
def test_stream_that_delivers_too_little_is_an_error(split, message, flags, tmp_path):
    argv = ['--train-num-samples', 40, '--val-num-samples', 40, f'--{split}-split', 'data-{7..8}.tar', *SHORT]
    with pytest.raises(TrainingError, match=message):
        fit(*flags['wds'], *argv, '--output', tmp_path)


@pytest.mark.parametrize('damaged', ['train', 'val'])
def test_unreadable_samples_of_a_stream_count(damaged, data, flags, tmp_path):
    """Two of 40 samples, an image and a label, are more than 1%."""
    shards = tmp_path / 'shards'
    shutil.copytree(data / 'shards', shards)
    with tarfile.open(data / 'shards' / 'data-0.tar') as source, tarfile.open(shards / 'data-0.tar', 'w') as target:
        for i, member in enumerate(source.getmembers()):
            add(target, member.name, {0: b'no image', 3: b'dog'}.get(i, source.extractfile(member).read()))
    splits = {'train': 'data-{1..3}.tar', 'val': 'data-{1..3}.tar', damaged: 'data-{0..3}.tar'}
    argv = ['--data-dir', shards, '--train-split', splits['train'], '--val-split', splits['val']]
    argv += ['--train-num-samples', 30, '--val-num-samples', 30, '--output', tmp_path]
    with pytest.raises(TrainingError, match=r'[12] of the 3[02] images of the split .* cannot be read, more than 1%'):
        fit(*flags['wds'], *argv, *SHORT)


@pytest.mark.parametrize('argv', [['--in-chans', 1], ['--input-size', 1, 32, 32]])
@pytest.mark.parametrize('augmentation', ['original', 'rand-m9-mstd0.5', 'augmix-m5'])
def test_grey_images(argv, augmentation, data, tmp_path):
    """One channel decides the mode of the images and what augmentation fills with; the run tells it to validation."""
    argv = ['--data-dir', data / 'folder', '--model', 'test_resnet_depla', '--epochs', 1, '--batch-size', 8, *argv]
    argv += ['--aa', augmentation, '--color-jitter', 0.4, '--grayscale-prob', 0.5, '--workers', 0]
    argv += [] if '--input-size' in argv else ['--img-size', 32]
    assert fit(*argv, '--output', tmp_path, '--experiment', 'run') == 0
    assert timm.create_model(f'local-dir:{tmp_path / "run" / "best"}').conv1[0].weight.shape[1] == 1
    (row,) = validate(tmp_path / 'run')
    assert row['images'] == 40
