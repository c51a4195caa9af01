"""The pages name what is there, their commands parse, their code runs, and the README has the numbers of records."""

import argparse
import json
import os
import re
import runpy
import shlex
import statistics
import subprocess
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
from helpers import ROOT

from timm_depla.commands import VERBS, main
from timm_depla.engine.classification.flags import create_train_parser, create_validate_parser
from timm_depla.engine.config import parse_args
from timm_depla.engine.detection.flags import create_detection_parser, create_detection_validate_parser

SCRIPTS = {
    'train.py': create_train_parser,
    'train_detection.py': create_detection_parser,
    'validate.py': create_validate_parser,
    'validate_detection.py': create_detection_validate_parser,
}
MODULES = {f'timm-depla {verb}': module for verb, (module, _) in VERBS.items()}
MODULES |= {'-m hub.publish': MODULES['timm-depla publish'], '-m benchmarks': 'benchmarks.__main__'}
MODULES['-m benchmarks.evidence'] = 'benchmarks.evidence.__main__'
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)$', page.read_text(), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def test_links():
    for page in PAGES:
        for link in re.findall(r'\]\((?!https?://)([^)\s]+)\)', page.read_text()):
            path, _, anchor = link.partition('#')
            target = page.parent / path if path else page
            assert target.exists(), f'{page.name}: {link}'
            assert not anchor or anchor in anchors(target), f'{page.name}: {link}'


def ratio(samples):
    """Time or memory of a model over its base's, the first and the last of each sample."""
    return f'{statistics.median(sample[0] / sample[-1] for sample in samples):.2f}'


def test_numbers_of_the_readme():
    """Cost, results and differences are those of the records, of the paper and of the evidence."""
    text, benchmarks = (ROOT / 'README.md').read_text(), ROOT / 'benchmarks'
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines() if line.startswith('| ')]
    names = 'grid', 'neck', 'cost'
    grid, neck, cost = (json.loads((benchmarks / f'records/{name}.json').read_text())['results'] for name in names)
    costs = [row for row in rows if len(row) == 12 and row[0]]
    assert len(costs) >= 8
    for name, macs, parameters, *times, memory, _, _ in costs:
        model, _, form = name.strip('`').partition('`, ')
        if model in cost:
            kinds = ('inference',) if form else ('inference', 'training step')
            cells = {batch: grid['cells'][f'{model}+{form}'.rstrip('+') + f'/{batch}'] for batch in (1, 8, 32)}
            assert times[: 3 * len(kinds)] == [ratio(cell[kind]) for kind in kinds for cell in cells.values()], name
            assert macs == f'{cost[model]["fused" if form else "macs"] / 1e9:.2f}', name
            if form:
                assert [parameters, memory] == ['', ''], name
            else:
                counts = [f'{cost[model]["parameters"] / 1e6:.1f}', ratio([cells[32]['memory']])]
                assert [parameters, memory] == counts, name
        elif name.startswith('FPN-DEPLA'):
            wanted = [ratio(neck['neck']), ratio(neck['neck training']), ratio([neck['neck memory']])]
            assert [times[0], times[3], memory] == wanted
        else:
            assert [times[0], memory] == [ratio(neck['detector']), ratio([neck['detector training memory']])]
    paper = json.loads((benchmarks / 'paper_results.json').read_text()).values()
    tables = {str(part['table']): str(part['rows']) for part in paper if 'table' in part}
    results = [(re.search(r'\(Table (\d)\)', row[0]), row[2:4]) for row in rows]
    assert {table[1] for table, _ in results if table} == set(tables)
    assert all(value in tables[table[1]] for table, values in results if table for value in values)
    pages = ''.join((ROOT / 'docs' / page).read_text() for page in ('evidence.md', 'protocol.md', 'benchmarks.md'))
    differences = re.findall(r'[+-]\d\S+ (?:± [\d.]+|\([+-].*? to .*?\))', text)
    assert differences and [difference for difference in differences if difference not in pages] == []


def test_promises_are_tests():
    """Each test that docs/trust.md and docs/clients.md name is there, and each test of a client is named."""
    text = ''.join((ROOT / 'docs' / page).read_text() for page in ('trust.md', 'clients.md'))
    named = re.findall(r'`([\w/]*test_\w+\.py(?:::\w+)?)`', text)
    for name in named:
        file, _, test = name.partition('::')
        assert f'def {test}' in (ROOT / 'tests' / file).read_text(), name
    clients = re.findall(r'^def (test_\w+)', (ROOT / 'tests' / 'test_clients.py').read_text(), re.MULTILINE)
    assert {f'test_clients.py::{test}' for test in clients} <= set(named)


class Parsed(Exception):
    """Raised with a parser and what it parsed, before the command runs."""


def stop(parser):
    raise Parsed(parser, parser.parse_known_args()[0])


def parse(words, monkeypatch):
    """The words after a command of ours, their parser and what it parsed; None for any other command."""
    for i, word in enumerate(words):
        if word in SCRIPTS:
            parser = SCRIPTS[word]()
            return words[i + 1 :], parser, parse_args(parser, words[i + 1 :])
        if name := MODULES.get(' '.join(words[i : i + 2])):
            with monkeypatch.context() as patch, pytest.raises(Parsed) as parsed:
                patch.setattr(argparse.ArgumentParser, 'parse_args', stop)
                patch.setattr(sys, 'argv', words[i + 1 :])
                import_module(name).main()
            return words[i + 2 :], *parsed.value.args
    return None


def texts(values):
    """Values as the words of a command line, numbers as numbers."""
    if isinstance(values, dict):
        values = [f'{key}={value}' for key, value in values.items()]
    values = values if isinstance(values, list) else [] if isinstance(values, bool) else [values]
    words = [str(value).replace(' ', '') for value in values]
    return [float(word) if re.fullmatch(r'[\d.]+', word) else word for word in words]


def test_command_lines_parse(monkeypatch):
    """Every command of the pages is parsed to the values that it shows."""
    blocks = (block for page in PAGES for block in re.findall(r'```sh\n(.*?)```', page.read_text(), re.DOTALL))
    lines = [line for block in blocks for line in block.replace('\\\n', ' ').splitlines()]
    commands = {line: parse(shlex.split(line, comments=True), monkeypatch) for line in lines}
    commands = {line: command for line, command in commands.items() if command}
    assert len(commands) > 40
    for line, (argv, parser, args) in commands.items():
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parser = action.choices[argv[0]]
        flags = [i for i, word in enumerate(argv) if word.startswith('-')] + [len(argv)]
        for start, end in pairwise(flags):
            action = parser._option_string_actions[argv[start]]
            value = getattr(args, action.dest)
            assert texts(value) == texts(argv[start + 1 : end] or action.const or []), line
            assert not isinstance(value, bool) or value is (argv[start][2:].replace('-', '_') == action.dest), line
        values = [text for value in vars(args).values() for text in texts(value)]
        assert set(texts(argv[: flags[0]])) <= set(values), line


PYTHON = [
    pytest.param(block, id=f'{page.name}-{number}')
    for page in PAGES
    for number, block in enumerate(re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize('block', PYTHON)
def test_python_runs(block, monkeypatch, capsys):
    """Each block alone, from the project's folder, prints what its comments say.

    Weights of the Hub stay away, and RUN and the like are not there.
    """
    if re.search(r'output/|ORG/NAME|_ckpt.tar', block):
        compile(block, 'block', 'exec')
        return
    away = re.compile(r'(pretrained\w*)=True')
    lines = [line if 'local-dir' in line else away.sub(r'\1=False', line) for line in block.splitlines()]
    plain = "load_backbone(model, timm.create_model('resnet50'))"
    block = '\n'.join(lines).replace("load_backbone(model, 'resnet50.a1_in1k')", plain)
    monkeypatch.chdir(ROOT)
    exec(compile(block, 'block', 'exec'), {})
    printed = capsys.readouterr().out
    for expected in re.findall(r'^print\(.*\)  # (.*)$', block, re.MULTILINE):
        assert expected in printed


def shapes(text):
    """The lines of a session, as the epochs, the machine and the random weights leave them."""
    lines = [re.sub(r'\(.*?\)|[\d.]+(e-\d+)?|(?<=\.jpg).*', '', line) for line in text.splitlines()]
    return [line for line in lines if not line.startswith(('rate', 'device', 'best', 'demo/lite'))]


def test_session(tmp_path):
    """The page has the commands of `docs/session.py`, and they still print what it shows."""
    pytest.importorskip('sklearn')
    pytest.importorskip('skimage')
    session = runpy.run_path(str(ROOT / 'docs/session.py'))
    transcript = (ROOT / 'docs/session.md').read_text().split('```')[1].removeprefix('console\n')
    assert re.findall(r'^\$ (.*)$', transcript, re.MULTILINE) == list(session['COMMANDS'])
    commands = [command.replace('epochs 8', 'epochs 2') for command in session['COMMANDS']]
    text = session['transcribe'](tmp_path, commands)
    assert list(dict.fromkeys(shapes(text))) == list(dict.fromkeys(shapes(transcript)))
    assert (tmp_path / 'sheet.jpg').is_file() and len((tmp_path / 'predictions.csv').read_text().splitlines()) == 31


def test_fine_tuning_page(tmp_path, monkeypatch, capfd):
    """Every command and the code of the page, in order from an empty folder; the training takes an epoch each."""
    pytest.importorskip('sklearn')
    (tmp_path / 'hub').symlink_to(ROOT / 'hub')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PATH', f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    for language, block in re.findall(r'```(sh|python)\n(.*?)```', (ROOT / 'docs/finetune.md').read_text(), re.DOTALL):
        if language == 'python':
            exec(compile(block, 'block', 'exec'), {})
        elif 'mkdir' in block:
            subprocess.run(['bash', '-euc', block], check=True)
        else:
            for line in re.sub(r'--epochs \d+', '--epochs 1', block.replace('\\\n', '')).splitlines():
                first, *argv = shlex.split(line)
                monkeypatch.setattr(sys, 'argv', argv if first == 'python' else [first, *argv])
                with pytest.raises(SystemExit, match=r'^0$'):
                    runpy.run_path(str(ROOT / argv[0]), run_name='__main__') if first == 'python' else main()
    printed = capfd.readouterr()
    assert re.search(r'^[358] \d+%$', printed.out, re.MULTILINE)
    assert '120 tensors loaded, 26 of DEPLA new, head left as it was' in printed.err
