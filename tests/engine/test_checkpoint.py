"""Checkpoints are intact, or they are not used."""

import json
import random
import shutil
from argparse import Namespace

import pytest
import torch

from timm_depla.engine.checkpoint import (
    checkpoint_name,
    find_damage,
    list_checkpoints,
    newest_checkpoint,
    pack_state,
    read_state,
    write_checkpoint,
    write_file,
)
from timm_depla.engine.folder import RunFolder
from timm_depla.engine.metrics import Metric
from timm_depla.errors import TrainingError

FILES = ('model.safetensors', 'config.json', 'record.json', 'state.json', 'state.safetensors')


def files(epoch, fill=None):
    """Content of a checkpoint at the start of an epoch, random where `fill` is None."""
    draw = random.Random(epoch)
    content = {name: draw.randbytes(draw.randint(50, 5000)) if fill is None else fill for name in FILES}
    return {**content, 'record.json': json.dumps(dict(epoch=epoch, step=0)).encode()}


@pytest.fixture
def run(tmp_path):
    """Two checkpoints."""
    for epoch in (1, 2):
        write_checkpoint(tmp_path / 'checkpoints' / checkpoint_name(epoch, 0), files(epoch))
    return tmp_path


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


def test_missing_files_are_damage_and_written_anew(run):
    newest = newest_checkpoint(run)
    (newest / 'state.json').unlink()
    assert 'state.json' in find_damage(newest)
    for path in newest.iterdir():
        path.unlink()
    assert 'checksums.json' in find_damage(newest)
    (newest / 'checksums.json').write_text('{}')
    assert find_damage(newest) == f'{", ".join(FILES)} missing'
    write_checkpoint(newest, files(2, b'new'))
    assert find_damage(newest) is None
    assert (newest / 'state.json').read_bytes() == b'new'
    write_checkpoint(newest, files(2, b'other'))
    assert (newest / 'state.json').read_bytes() == b'new'  # a whole one stays


def folder(run):
    args = Namespace(eval_metric='top1', checkpoint_hist=1, save_epochs=[5])
    return RunFolder(run, args, [Metric('top1', 'top-1', 'accuracy')])


def test_links_and_pruning(run):
    """The best, the two newest and what was asked for stay; `best` and `last` lead to theirs."""
    checkpoints = run / 'checkpoints'
    for epoch in range(3, 8):
        write_checkpoint(checkpoints / checkpoint_name(epoch, 0), files(epoch, b''))
    (checkpoints / '.0008-000000.part').mkdir()
    history = [dict(epoch=epoch, eval_top1=-abs(epoch - 2), eval_plain_top1=-9, lr=0.1) for epoch in range(7)]
    for _ in range(2):
        folder(run).publish('0007-000000', history)
    assert [f.name[:4] for f in list_checkpoints(run)] == ['0007', '0006', '0005', '0003']
    assert [(run / name).resolve().name for name in ('best', 'last')] == ['0003-000000', '0007-000000']
    assert not (checkpoints / '.0008-000000.part').exists()


def test_write_file_keeps_the_old_one(tmp_path):
    path = tmp_path / 'file'
    write_file(path, b'old')
    (tmp_path / '.file.part').mkdir()  # in the way
    with pytest.raises(TrainingError, match=f"cannot write '{path}'"):
        write_file(path, b'new')
    assert path.read_bytes() == b'old'


def test_failed_write_is_raised_at_the_next_call(run):
    (run / 'checkpoints').rename(run / 'away')
    (run / 'checkpoints').write_text('in the way')
    state = dict(position=(3, 0), history=[])
    for call in (RunFolder.wait, lambda writer: writer.save(state, {}, b'')):
        writer = folder(run)
        writer.save(state, {}, b'')
        with pytest.raises(TrainingError, match=r'cannot write .*0003-000000'):
            call(writer)


def test_only_exact_names_are_checkpoints(run):
    """And they are sorted as numbers, and known by the position inside."""
    checkpoints = run / 'checkpoints'
    write_checkpoint(checkpoints / '10000-000000', files(10000))
    write_checkpoint(checkpoints / '9999-000000', files(9999))
    for name in ('3x-0y', '0001-000000.backup', '0001-00', '99999-000000.part', 'a0003-000000'):
        shutil.copytree(checkpoints / '0001-000000', checkpoints / name)
    names = ['10000-000000', '9999-000000', '0002-000000', '0001-000000']
    assert [folder.name for folder in list_checkpoints(run)] == names
    folder(run).prune([])
    assert (checkpoints / '0001-000000.backup').is_dir() and len(list_checkpoints(run)) == 2


def test_swapped_checkpoints_are_damaged(run, caplog):
    checkpoints = run / 'checkpoints'
    (checkpoints / '0002-000000').rename(checkpoints / 'other')
    (checkpoints / '0001-000000').rename(checkpoints / '0002-000000')
    assert find_damage(checkpoints / '0002-000000') == 'it is the checkpoint 0001-000000 under another name'
    assert newest_checkpoint(run) is None


def test_state_comes_back_as_it_was(tmp_path):
    """But for tuples, which are lists."""
    state = {
        'position': [1, 2],
        'optimizer': {'state': {0: {'step': torch.tensor(3.0), 'm': torch.randn(2, 3)}}, 'groups': [[0.9, 1]]},
        'floats': [0.1, float('inf'), 1e-300], 'none': None, 'flag': True, 'half': torch.ones(2, dtype=torch.bfloat16),
    }  # fmt: skip
    write_checkpoint(tmp_path / 'state', pack_state({**state, 'position': (1, 2)}))
    torch.testing.assert_close(read_state(tmp_path / 'state'), state, rtol=0, atol=0)
    with pytest.raises(TypeError, match='no state of type set'):
        pack_state({'a': {1}})
    for text in ('[]', '{"a": {"tensor": "9"}}', '{"a": {"tensor": []}}', '{', '1'):
        (tmp_path / 'state' / 'state.json').write_text(text)
        with pytest.raises(ValueError):
            read_state(tmp_path / 'state')
