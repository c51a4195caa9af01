"""Publishing and pulling, against a server of the Hub's protocol; huggingface_hub is not mocked."""

import json
import os
import pickle
import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from helpers import ROOT, SMALL, change_arguments, fit, run, write_recipe
from hub_server import serve
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import timm_depla.hub.publish as publish_module
from benchmarks.evidence.fashion import fashion_folder
from hub.rewrite import rewrite
from timm_depla.data import digits_folder
from timm_depla.detection import from_pretrained
from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.config import parse_args
from timm_depla.engine.detection import train as detection
from timm_depla.engine.detection.flags import create_detection_parser
from timm_depla.engine.run import CHANGE_NOTHING
from timm_depla.errors import ConfigError
from timm_depla.files import SUMS, find_change, write_file
from timm_depla.hub.publish import FILES, publish, without_folders

WEIGHTS = sorted(path for path in (ROOT / 'hub' / 'weights').iterdir())
SCRIPT = """
import json, pathlib, sys, torch, timm, timm_depla
from timm_depla.detection import from_pretrained

def load(source, cache):
    model = timm.create_model(source, pretrained=True, cache_dir=cache).eval()
    return model(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32))

def detect(source, cache):
    return from_pretrained(source)([torch.linspace(0, 1, 3 * 64 * 64).reshape(3, 64, 64)])[0]
"""
TRY = """
found = {}
for name in NAMES:
    cache = pathlib.Path(sys.argv[1], name)
    try:
        (detect if name.startswith('detector') else load)(f'hf-hub:user/{name}', cache)
        found[name] = 'loaded'
    except Exception as error:
        found[name] = f'{type(error).__name__}: {error}'
        print(found[name], file=sys.stderr)
print(json.dumps(found))
"""


@pytest.fixture(scope='module')
def runs(small_scenes, tmp_path_factory):
    """A classifier, whose weights are averaged, and a detector, each hardly trained."""
    output = tmp_path_factory.mktemp('runs')
    average = ['--model-ema', '--model-ema-decay', 0.5]
    fit(*SMALL, *average, '--epochs', 1, '--output', output, '--experiment', 'classifier')
    values = dict(batch_size=2, epochs=1, device='cpu', output=str(output), experiment='detector')
    recipe = write_recipe(output / 'recipe.yaml', dict(min_size=64, max_size=64), **values)
    detection.train(parse_args(create_detection_parser(), [str(small_scenes), '-c', str(recipe)]))
    return output


def write(source, output, **options):
    """Do what `publish` does, in this process."""
    defaults = dict(push='', dataset_name='', dataset_hub_id='', licence='mit')
    return publish(Namespace(source=str(source), output=str(output), **{**defaults, **options}))


def run_publish(source, folder, *argv, **environment):
    return run('-m', 'hub.publish', source, '--output', folder, *argv, CUDA_VISIBLE_DEVICES='', **environment)


def run_script(text, tmp_path, **environment):
    return run('-c', SCRIPT + text, tmp_path, HF_HOME=str(tmp_path / 'cache'), **environment)


@pytest.fixture(scope='module')
def published(runs, tmp_path_factory):
    """Repository folders of both runs."""
    output = tmp_path_factory.mktemp('published')
    for name in ('classifier', 'detector'):
        write(runs / name, output / name)
    return output


def test_publish_then_pull_then_offline(runs, tmp_path):
    """The same outputs bit for bit: from the folder, in a process with an empty cache, and with the server gone."""
    with serve() as hub:
        environment = dict(HF_ENDPOINT=hub.url, HF_TOKEN='hf_token', HF_HOME=str(tmp_path / 'other'))
        for name in ('classifier', 'detector'):
            hub.commit(f'user/{name}', {'pytorch_model.bin': b'old', '.gitattributes': b''})
            result = run_publish(runs / name, tmp_path / name, '--push', f'user/{name}', **environment)
            assert f'{hub.url}/user/{name}/commit/' in result.stdout
            sent = hub.find(f'user/{name}', 'main')[1]
            assert set(sent) == {*FILES, '.gitattributes'}
            assert sent['model.safetensors'] == (tmp_path / name / 'model.safetensors').read_bytes()
        pinned = hub.find('user/classifier', 'main')[0]
        hub.commit('user/classifier', {'model.safetensors': b'newer and broken'})
        script = f"""
torch.save([load('hf-hub:user/classifier@{pinned}', None), detect('hf-hub:user/detector', None)], sys.argv[1] + '/out')
"""
        run_script(script, tmp_path, HF_ENDPOINT=hub.url)
        assert not any('pytorch_model' in request for request in hub.requests)
    pulled = (tmp_path / 'out').read_bytes()
    run_script(script, tmp_path, HF_ENDPOINT=hub.url)  # nobody answers there
    assert (tmp_path / 'out').read_bytes() == pulled
    local = script.replace(f'hf-hub:user/classifier@{pinned}', f'local-dir:{tmp_path / "classifier"}')
    run_script(local.replace('hf-hub:user/detector', str(tmp_path / 'detector')), tmp_path)
    assert (tmp_path / 'out').read_bytes() == pulled


def test_faults(published, tmp_path):
    """Each ends in a clear error, or loads after all; no pickle is asked for, and nothing half-written stays."""
    files = {name: (published / 'classifier' / name).read_bytes() for name in FILES}
    detector = {name: (published / 'detector' / name).read_bytes() for name in FILES}
    config = json.loads(files['config.json'])

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'executed',)

    weights, evil = files['model.safetensors'], {'model.safetensors': None, 'pytorch_model.bin': pickle.dumps(Evil())}
    damaged = r'RuntimeError: model.safetensors is damaged \(.*\): remove it from the cache'
    repositories = {
        'whole': ({}, 'loaded'),
        'truncated': ({'model.safetensors': weights[: len(weights) // 2]}, damaged),
        'tampered': ({'model.safetensors': weights[:8] + b'x' + weights[9:]}, damaged),
        'pickle': (evil, 'RuntimeError: the repository has no model.safetensors, and timm_depla loads nothing else'),
        'architecture': ({'config.json': json.dumps({**config, 'architecture': 'resnet51'}).encode()}, '.*resnet51'),
        'argument': ({'config.json': json.dumps({**config, 'model_args': {'dept': 3}}).encode()}, '.*dept'),
        'nowhere': (None, '.*user/nowhere'),
        'detector-pickle': (evil, "ValueError: 'hf-hub:user/detector-pickle' has no checkpoint"),
        'detector-truncated': ({'model.safetensors': weights[:9999]}, '.* is damaged: model.safetensors has 9999'),
        'detector-nowhere': (None, "ValueError: cannot pull 'hf-hub:user/detector-nowhere'"),
        'cut': ({}, 'loaded'),  # the connection, which is taken up again
        'busy': ({}, 'loaded'),  # the second time
        'down': ({}, '.*500'),
    }
    with serve() as hub:
        hub.cut['cut/model.safetensors'] = 1000
        hub.failures = {'busy/model.safetensors': [500], 'down/config.json': [500] * 50}
        for name, (changes, _) in repositories.items():
            whole = detector if name.startswith('detector') else files
            if changes is not None:
                hub.commit(f'user/{name}', {**whole, **changes, 'which': name.encode()})
        result = run_script(TRY.replace('NAMES', repr([*repositories, 'busy'])), tmp_path, HF_ENDPOINT=hub.url)
        found = json.loads(result.stdout)
        assert all(re.match(message, found[name], re.S) for name, (_, message) in repositories.items()), found
        assert re.search(r'HfHubHTTPError: .*500.*user/busy/resolve/main/model.safetensors', result.stderr)
        assert not any('pytorch_model' in request for request in hub.requests) and not hub.cut
    assert not (tmp_path / 'executed').exists()
    assert not [path for path in tmp_path.rglob('*.incomplete')]


def numbers(text):
    """Numbers as they are printed."""
    return re.findall(r'(?<![\w.-])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?(?!\w)', text)


@pytest.mark.parametrize('name', ['classifier', 'detector'])
def test_card(name, published):
    folder = published / name
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    card = ModelCard.load(folder / 'README.md')  # reads, and so checks, the metadata
    record = json.loads((folder / 'record.json').read_text())
    results = record['results']
    assert card.data.license == 'mit'
    assert card.data.library_name == {'classifier': 'timm', 'detector': 'timm_depla'}[name]
    assert len(card.data.eval_results) == 2
    for result in card.data.eval_results:
        key = {'top-1 accuracy (%)': 'top1', 'top-5 accuracy (%)': 'top5'}.get(result.metric_name)
        key = key or result.metric_name.replace('box ', '').replace('mask ', 'mask_')
        assert result.metric_value == pytest.approx(results[key], abs=0.006)
    printed = card.text.split('## Evaluation')[1].split('```bibtex')[0]
    assert record['commit'] in printed
    assert record['hardware'] in printed
    assert all(f'{package} {version}' in printed for package, version in record['versions'].items())
    known = [*numbers(json.dumps([results, record['dataset']]))]
    tables = printed.split('Measured by')[0] + printed.split('## Training')[1]
    for number in numbers(re.sub(r'`[^`]*`|top-\d|AP\d+', '', tables)):
        half = 0.5 * 10 ** -len(number.partition('.')[2])
        value = float(number.replace(',', ''))
        assert any(abs(float(k) / scale - value) <= half * 1.001 for k in known for scale in (1, 1e6)), number
    assert f"'local-dir:{name}'" in card.text or f"'{name}'" in card.text
    assert not any(str(folder.parent) in (folder / name).read_text(errors='replace') for name in FILES)
    assert set(json.loads((folder / SUMS).read_text())) == set(FILES) - {SUMS, 'README.md'}
    assert find_change(folder) is None
    digits, config = [str(digit) for digit in range(10)], json.loads((folder / 'config.json').read_text())
    assert (config['label_names'] if name == 'classifier' else from_pretrained(folder).class_names) == digits


@pytest.mark.parametrize('name', ['classifier', 'detector'])
def test_recipe_states_what_differs_and_trains_alike(name, runs, published):
    create = create_train_parser if name == 'classifier' else create_detection_parser
    stated = yaml.safe_load((published / name / 'recipe.yaml').read_text())
    args = vars(parse_args(create(), ['--recipe', str(published / name / 'recipe.yaml')]))
    trained = yaml.safe_load((runs / name / 'args.yaml').read_text())
    assert len(stated) < 30 and stated['epochs'] == 1
    assert {key for key in {*args, *trained} - {*CHANGE_NOTHING} if args[key] != trained[key]} == set()


def test_the_better_of_average_and_plain_weights(runs, published):
    record = json.loads((published / 'classifier' / 'record.json').read_text())['results']
    assert set(record['candidates']) == {'average of the weights', 'weights without averaging'}
    assert record['candidates'][record['weights']] == max(record['candidates'].values()) == record['top1']
    weights = load_file(published / 'classifier' / 'model.safetensors')
    kept = load_file(runs / 'classifier' / 'best' / 'model.safetensors')
    assert all(torch.equal(weights[name], kept[name]) for name in kept)  # training keeps the better ones, too


def test_dry_run_sends_nothing(runs, tmp_path):
    with serve() as hub:
        argv = ['--push', 'user/name', '--dry-run']
        result = run_publish(runs / 'classifier', tmp_path / 'out', *argv, HF_ENDPOINT=hub.url)
        assert "would be sent to 'user/name'" in result.stdout
        assert [line.split()[0] for line in result.stdout.splitlines()[:6]] == list(FILES)
        assert hub.requests == []


def test_bad_publishing(runs, published, tmp_path):
    with pytest.raises(ConfigError, match=r'is no run of train.py or train_detection.py'):
        write(published / 'classifier', tmp_path / 'out')
    (tmp_path / 'used').mkdir()
    (tmp_path / 'used' / 'thesis.tex').touch()
    outputs = {tmp_path / 'used': r"used' holds something else \(thesis.tex\)", '/dev/null': 'is no folder'}
    for output, message in {**outputs, '/proc/nowhere': 'cannot write --output'}.items():
        with pytest.raises(ConfigError, match=message):
            write(runs / 'classifier', output)
    planted = tmp_path / 'planted'
    shutil.copytree(runs / 'classifier', planted, symlinks=True)
    (planted / 'args.yaml').write_text('eval_metric: x')
    with pytest.raises(ConfigError, match=r"args.yaml' is no run's: it has no epochs, recipe, val_split"):
        write(planted, tmp_path / 'out')
    with serve() as hub:
        result = run_publish(runs / 'classifier', tmp_path / 'out', '--push', 'a/b/c', HF_ENDPOINT=hub.url, fails=True)
    assert re.search(r"hub.publish: error: cannot push to 'a/b/c': Repo id must", result.stderr)
    assert 'Traceback' not in result.stderr


def test_a_killed_publication_is_noticed_and_mended(runs, published, tmp_path, monkeypatch):
    """The sums are written first: half of a new folder over an old one is damaged, until it is published again."""
    shutil.copytree(published / 'classifier', tmp_path / 'out')

    def die(path, data):
        write_file(path, data)
        if path.name == 'config.json':
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(publish_module, 'write_file', die)
        write(runs / 'detector', tmp_path / 'out')
    assert find_change(tmp_path / 'out').startswith('recipe.yaml ')
    write(runs / 'detector', tmp_path / 'out')
    assert find_change(tmp_path / 'out') is None


def test_changes_of_a_published_model(published):
    """Classes, channels and features, as for any model of timm."""
    source = f'local-dir:{published / "classifier"}'
    original = timm.create_model(source, pretrained=True)
    changed = timm.create_model(source, pretrained=True, num_classes=3, in_chans=1)
    assert changed.get_classifier().weight.shape[0] == 3
    assert torch.allclose(changed.conv1[0].weight[:, 0], original.conv1[0].weight.sum(1), atol=1e-6)
    features = timm.create_model(source, pretrained=True, features_only=True)
    assert torch.equal(features.layer3[0].conv1.weight, original.layer3[0].conv1.weight)


def test_torch_hub():
    model = torch.hub.load(str(ROOT), 'test_resnet_depla', source='local', num_classes=3)
    assert model.num_classes == 3


@pytest.mark.parametrize('folder', WEIGHTS, ids=lambda path: path.name)
def test_shipped_weights(folder, tmp_path):
    """`hub.rewrite` changes nothing: the card is that of the record. The validation command gives its numbers again."""
    record = json.loads((folder / 'record.json').read_text())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3e6
    rewrite(folder, tmp_path)
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in FILES)
    assert find_change(folder) is None
    argv = []
    if record['dataset']['id'] == 'fashion_mnist':
        try:
            argv = ['--dataset', 'torch/fashion_mnist', '--data-dir', fashion_folder()]
        except RuntimeError as error:
            (pytest.fail if os.environ.get('CI') else pytest.skip)(str(error))
    found = record['results']
    if record['task'] != 'image-classification':
        result = run('validate_detection.py', folder, '--device', 'cpu')
        assert f'maxDets=100 ] = {found["AP"]:.3f}' in result.stdout, result.stderr
    else:
        result = run('validate.py', f'local-dir:{folder}', '--device', 'cpu', *argv)
        assert f'{found["images"]} images: top-1 {found["top1"]:.2f}  top-5' in result.stderr, result.stderr


def test_nothing_of_the_machine_is_published(runs, tmp_path):
    """Paths in any argument, and the name of the user."""
    copy = tmp_path / 'run'
    shutil.copytree(runs / 'classifier', copy, symlinks=True)
    data = tmp_path / 'secret'
    shutil.copytree(digits_folder(), data / 'digits')
    (data / 'classes.txt').write_text('\n'.join(map(str, range(10))))
    planted = dict(data_dir=str(data / 'digits'), val_split=str(data / 'digits' / 'validation'))
    planted.update(class_map=str(data / 'classes.txt'), aa=f'see {data}/notes', opt_kwargs={'x': f'~{tmp_path}'})
    change_arguments(copy, **planted, recipe='x`\n\n# A heading')
    write(copy, tmp_path / 'out', dataset_name='digits')
    for name in set(FILES) - {'model.safetensors'}:
        text = (tmp_path / 'out' / name).read_text()
        assert 'secret' not in text and str(tmp_path) not in text and str(Path.home()) not in text, name
        assert '\n# A heading' not in text
    names = {'label_names': ['/m/01', 'and/or'], 'x': f'{Path.home()}/a b', 'y': f'{Path.home().name}/z/q'}
    assert without_folders(names) == {'label_names': ['/m/01', 'and/or'], 'x': 'a b', 'y': 'user/z/q'}


def test_an_edited_card_is_kept(runs, tmp_path, caplog):
    for _ in range(2):
        write(runs / 'classifier', tmp_path / 'out')
    assert not (tmp_path / 'out' / 'README.edited.md').exists()
    (tmp_path / 'out' / 'README.md').write_text('mine')
    write(runs / 'classifier', tmp_path / 'out')
    assert (tmp_path / 'out' / 'README.edited.md').read_text() == 'mine'
    assert 'the edited card is kept' in caplog.text
    (tmp_path / 'out' / 'README.md').write_text('mine again')
    with pytest.raises(ConfigError, match='has an edited README'):
        write(runs / 'classifier', tmp_path / 'out')
