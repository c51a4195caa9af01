"""Checkpoints are whole or not used."""

import random
import shutil

import pytest

from timm_depla.engine.checkpoint import (
    BackgroundWriter,
    checkpoint_name,
    find_damage,
    link,
    list_checkpoints,
    newest_checkpoint,
    prune,
    write_checkpoint,
    write_file,
)
from timm_depla.engine.errors import TrainingError

FILES = ('model.safetensors', 'config.json', 'record.json', 'state.pt')


@pytest.fixture
def run(tmp_path):
    """Two checkpoints."""
    draw = random.Random(0)
    for epoch in (1, 2):
        files = {name: draw.randbytes(draw.randint(50, 5000)) for name in FILES}
        write_checkpoint(tmp_path / 'checkpoints' / checkpoint_name(epoch, 0), files)
    return tmp_path


def test_newest(run, tmp_path):
    assert newest_checkpoint(run).name == '0002-000000'
    assert newest_checkpoint(tmp_path / 'nowhere') is None
    (run / 'checkpoints' / '.0003-000000.part').mkdir()
    assert newest_checkpoint(run).name == '0002-000000'


@pytest.mark.parametrize('seed', range(50))
def test_damage_anywhere_is_found(run, seed, caplog):
    draw = random.Random(seed)
    newest = newest_checkpoint(run)
    path = draw.choice(sorted(newest.iterdir()))
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data))
    if seed % 2:
        del data[place:]
    else:
        data[place] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    assert newest_checkpoint(run).name == '0001-000000'
    assert '0002-000000 is damaged' in caplog.text


def test_missing_file_is_damage(run):
    newest = newest_checkpoint(run)
    (newest / 'state.pt').unlink()
    assert 'state.pt' in find_damage(newest)
    shutil.rmtree(newest)
    newest.mkdir()
    assert 'checksums.json' in find_damage(newest)
    (newest / 'checksums.json').write_text('{}')
    assert find_damage(newest) == 'config.json, model.safetensors, record.json, state.pt missing'


def test_damaged_checkpoint_is_written_anew(run):
    newest = newest_checkpoint(run)
    (newest / 'state.pt').write_bytes(b'')
    files = {name: b'new' for name in FILES}
    write_checkpoint(newest, files)
    assert find_damage(newest) is None
    assert (newest / 'state.pt').read_bytes() == b'new'
    write_checkpoint(newest, {name: b'other' for name in FILES})
    assert (newest / 'state.pt').read_bytes() == b'new'  # a whole one stays


def test_links_and_pruning(run):
    checkpoints = run / 'checkpoints'
    for epoch in range(3, 7):
        write_checkpoint(checkpoints / checkpoint_name(epoch, 0), {name: b'' for name in FILES})
    link(run / 'best', checkpoints / checkpoint_name(2, 0))
    link(run / 'best', checkpoints / checkpoint_name(3, 0))
    assert (run / 'best').resolve() == (checkpoints / '0003-000000').resolve()
    (checkpoints / '.0007-000000.part').mkdir()
    prune(run, [checkpoint_name(3, 0)])
    assert [folder.name for folder in list_checkpoints(run)] == ['0006-000000', '0005-000000', '0003-000000']
    assert not (checkpoints / '.0007-000000.part').exists()


def test_write_file_keeps_the_old_one(tmp_path):
    path = tmp_path / 'file'
    write_file(path, b'old')
    (tmp_path / '.file.part').mkdir()  # in the way
    with pytest.raises(TrainingError, match=f"cannot write '{path}'"):
        write_file(path, b'new')
    assert path.read_bytes() == b'old'


def test_background_writer_raises_at_the_next_call():
    writer = BackgroundWriter()

    def fail():
        raise TrainingError('no room')

    writer.submit(fail)
    with pytest.raises(TrainingError, match='no room'):
        writer.submit(fail)
    writer.wait()
