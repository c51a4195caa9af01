"""`timm-depla VERB`, and what an installed package must not need: a clone, git."""

import subprocess
import sys

import pytest

from timm_depla.commands import VERBS, main
from timm_depla.errors import command_for
from timm_depla.hub import record


@pytest.mark.parametrize('verb', VERBS)
def test_verbs(verb, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['timm-depla'])
    with pytest.raises(SystemExit) as ended:
        main([verb, '--help'])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith('usage: ')
    with pytest.raises(SystemExit) as ended:
        main([verb, '--no-such-flag'])
    assert ended.value.code not in (0, None)


def test_verbs_are_listed(capsys):
    for argv, code in (([], 0), (['tarin'], 2)):
        with pytest.raises(SystemExit, match=str(code)):
            main(argv)
        told = ''.join(capsys.readouterr())
        assert all(verb in told for verb in VERBS)


def test_a_command_is_named_as_it_was_started(monkeypatch):
    assert command_for('train_detection.py') == 'python train_detection.py'
    monkeypatch.setattr(sys, 'argv', ['timm-depla validate'])
    assert command_for('train_detection.py') == 'timm-depla train-detection'


def test_records_name_a_commit_of_their_own_clone_alone(tmp_path, monkeypatch):
    git = ['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=a@b.c']
    for command in (['init', '-q'], ['commit', '-q', '--allow-empty', '-m', 'other']):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(record, '__file__', str(tmp_path / 'timm_depla' / 'hub' / 'record.py'))
    assert len(record._commit()) == 40
    monkeypatch.setenv('PATH', '')
    assert record._commit() == ''
    monkeypatch.undo()
    monkeypatch.setattr(record, '__file__', str(tmp_path / 'site-packages' / 'timm_depla' / 'hub' / 'record.py'))
    assert record._commit() == ''
