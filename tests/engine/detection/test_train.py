"""Training and validation of detectors; what classifiers share is tested with them."""

import json
import logging
import re
import runpy
import shutil
import sys

import pytest
import timm
import torch
from helpers import ROOT, TORCHRUN, go_back, run, summary, write_recipe
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.models.detection import maskrcnn_resnet50_fpn

from benchmarks.differences import differences
from timm_depla.data import find_annotations
from timm_depla.detection import create_detector, from_pretrained
from timm_depla.detection.coco import METRICS, CocoDetection, evaluate_coco
from timm_depla.detection.predict import draw_detections, predict, read_image
from timm_depla.engine.checkpoint import list_checkpoints, read_state
from timm_depla.engine.config import parse_args, updated
from timm_depla.engine.detection.flags import create_detection_parser, create_detection_validate_parser
from timm_depla.engine.detection.train import build, train
from timm_depla.engine.detection.validate import validate
from timm_depla.engine.distributed import World
from timm_depla.engine.folder import RunFolder
from timm_depla.engine.plan import learning_rates
from timm_depla.errors import ConfigError, TrainingError
from timm_depla.loading import load_model


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    """All that draws, in a small recipe."""
    values = dict(model_ema=True, model_ema_decay=0.5, batch_size=3, epochs=2, recovery_interval=1, lr=0.005)
    path = tmp_path_factory.mktemp('recipe') / 'small.yaml'
    return write_recipe(path, dict(min_size=[96, 128], max_size=128), warmup_epochs=0, hflip=0.5, **values)


def fit(*argv):
    return train(parse_args(create_detection_parser(), [str(a) for a in argv]))


def made(*argv):
    """A run that is built and not trained."""
    return build(parse_args(create_detection_parser(), [str(a) for a in argv]), World(torch.device('cpu')))


def score(*argv):
    return validate(parse_args(create_detection_validate_parser(), [str(a) for a in argv])).scores


@pytest.fixture(scope='module')
def trained(small_scenes, recipe, tmp_path_factory):
    """A run whose checkpoints all stay."""
    output = tmp_path_factory.mktemp('output')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, 'prune', lambda *_: None)
        assert fit(small_scenes, '-c', recipe, '--output', output, '--experiment', 'run') == 0
    return output / 'run'


def test_resumes_exactly_from_any_step(trained, small_scenes, recipe, tmp_path):
    names = [checkpoint.name for checkpoint in list_checkpoints(trained)]
    assert len(names) >= 4
    for name in (names[-1], names[2], names[1]):
        go_back(trained, tmp_path / name, name)
        args = ['--output', tmp_path, '--experiment', name, '--resume', 'auto', '--workers', 1]
        assert fit(small_scenes, '-c', recipe, *args) == 0
        assert differences(tmp_path / name, trained) == []


def test_validation_reproduces_the_logged_precision(trained, small_scenes, capsys, tmp_path):
    file = tmp_path / 'results.json'
    scores = score(trained / 'last', '--results-file', file)
    row = summary(trained)[-1]
    for name in METRICS[:6]:
        assert scores[name] == float(row[f'eval_{name}'])
        assert scores[f'mask_{name}'] == float(row[f'eval_mask_{name}'])
    tables = capsys.readouterr().out
    assert len(re.findall(r'Average Precision  \(AP\) @\[ IoU=0.50:0.95 \| area= {0,3}all', tables)) == 2
    dataset = CocoDetection(small_scenes / 'val', small_scenes / 'annotations' / 'instances_val.json')
    results = json.loads(file.read_text())
    assert len(results) > 10
    for prefix, kind in {'': 'bbox', 'mask_': 'segm'}.items():
        again, _ = evaluate_coco(dataset.coco, results, kind)
        assert {f'{prefix}{name}': value for name, value in again.items()}.items() <= scores.items()
    fast = score(trained / 'last', '--evaluator', 'faster-coco-eval')
    assert fast == pytest.approx(scores, abs=1e-6)


def test_two_processes_measure_what_one_does(trained, tmp_path):
    one, two = tmp_path / 'one.json', tmp_path / 'two.json'
    threads = str(torch.get_num_threads())  # with others, sums are rounded otherwise
    run(*TORCHRUN, 'validate_detection.py', trained / 'last', '--results-file', two, OMP_NUM_THREADS=threads)
    score(trained / 'last', '--results-file', one)
    assert two.read_text() == one.read_text()


def test_faster_rcnn_with_what_is_optional(small_scenes, recipe, tmp_path, caplog):
    path = write_recipe(tmp_path / 'recipe.yaml', dict(min_size=96, max_size=128, depla={'temperature': 1.0}))
    options = ['--model', 'fasterrcnn_test_resnet_fpn_depla', '--amp', '--amp-dtype', 'bfloat16', '--channels-last']
    options += ['--epochs', 1, '--grad-accum-steps', 2, '--eval-metric', 'AP50', '--grad-checkpointing', '--opt']
    options += ['adamw', '--trainable-backbone-layers', 2, '--backbone-norm', 'frozen', '--output', tmp_path]
    caplog.set_level(logging.INFO)
    assert fit(small_scenes, '-c', path, *options, '--experiment', 'run') == 0
    assert not any('mask' in name for name in summary(tmp_path / 'run')[-1])
    best = r'best box AP50 \d\.\d{3} at epoch 0 \(checkpoints/0001-000000\): python validate_detection\.py'
    assert re.search(best, caplog.text)
    model = from_pretrained(tmp_path / 'run')
    assert model.backbone.fpn.top_down_blocks[0].rpn.temperature == 1.0
    assert model.class_names == [str(digit) for digit in range(10)]
    assert Image.open(tmp_path / 'run' / 'curves.png').size == (1200, 350)


def test_gradient_checkpointing_of_a_backbone_that_timm_wraps(small_scenes, recipe):
    argv = [small_scenes, '-c', recipe, '--grad-checkpointing']
    model = made(*argv, '--model', 'fasterrcnn_test_fishnet_depla_fpn').model
    assert any(getattr(module, 'grad_checkpointing', False) for module in model.backbone.body.modules())
    model.backbone(torch.rand(2, 3, 64, 64))['0'].mean().backward()
    assert all(parameter.grad is not None for parameter in model.backbone.body.model.stem.parameters())


@pytest.mark.parametrize('name,num_classes,save', [('a.safetensors', 3, save_file), ('a.pth', 1000, torch.save)])
def test_starts_from_a_classifier(name, num_classes, save, small_scenes, recipe, tmp_path):
    backbone = timm.create_model('test_resnet_depla', num_classes=num_classes)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.fill_(0.25)
    save(backbone.state_dict(), tmp_path / name)
    argv = [small_scenes, '-c', recipe, '--pretrained-path']
    run = made(*argv, tmp_path / name)
    model = run.model
    assert run.args.backbone_norm == 'frozen'
    assert model.backbone.body.layer4[0].conv1.weight.eq(0.25).all()
    assert not model.backbone.body.layer1[0].conv1.weight.requires_grad
    save_file({'a': torch.zeros(1)}, tmp_path / 'other.safetensors')
    with pytest.raises(ConfigError, match=r'other.safetensors.*these weights are of another architecture'):
        made(*argv, tmp_path / 'other.safetensors')


def test_starts_from_weights_of_torchvision(small_scenes, tmp_path):
    """COCO's 91 classes: the heads stay new, DEPLA too, all else is loaded."""
    source = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    save_file(source.state_dict(), tmp_path / 'coco.safetensors')
    argv = [small_scenes, '-c', 'scenes', '--model', 'maskrcnn_resnet50_fpn_depla', '--model-kwargs', 'min_size=96']
    own = made(*argv, '--initial-checkpoint', tmp_path / 'coco.safetensors').model.state_dict()
    equal = [name for name, value in source.state_dict().items() if torch.equal(value, own[name])]
    assert set(source.state_dict()) - set(equal) == {
        f'roi_heads.{name}.{kind}'
        for name in ('box_predictor.cls_score', 'box_predictor.bbox_pred', 'mask_predictor.mask_fcn_logits')
        for kind in ('weight', 'bias')
    }


def test_validates_weights_whose_labels_are_category_ids(small_scenes, tmp_path):
    """As torchvision's are for COCO: 91 labels for 80 categories."""
    model = create_detector('fasterrcnn_test_resnet_fpn', num_classes=15)
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    argv = [tmp_path / 'model.safetensors', '--data-dir', small_scenes, '--workers', 0]
    scores = score(*argv, '--model', 'fasterrcnn_test_resnet_fpn', '--classes', 15)
    assert 0 <= scores['AP'] < 0.1
    with pytest.raises(ConfigError, match=r'a file of weights needs --model'):
        score(*argv)


def test_predicts_and_draws(trained, small_scenes, tmp_path):
    image = small_scenes / 'val' / '000000.jpg'
    model = from_pretrained(trained)
    pixels = read_image(image)
    found = predict(model, pixels, threshold=0.02)
    assert found['masks'].shape == (len(found['boxes']), 320, 320)
    assert found['scores'].min() >= 0.02
    drawn = draw_detections(pixels, found, model.class_names)
    assert drawn.shape == pixels.shape and not torch.equal(drawn, pixels)
    assert torch.equal(draw_detections(pixels, predict(model, pixels, 1.0), model.class_names), pixels)
    outputs = [tmp_path / name for name in ('det.png', 'det.json', 'det.csv')]
    run('-m', 'timm_depla.predict', trained, image, '--output', *outputs, '--threshold', 0.02)
    assert Image.open(outputs[0]).size == (640, 640)  # twice as large, for the labels
    ((name, rows),) = (row.values() for row in json.loads(outputs[1].read_text()))
    assert name == str(image) and [row['score'] for row in rows] == pytest.approx(found['scores'].tolist(), abs=1e-4)
    assert rows[0]['box'] == pytest.approx(found['boxes'][0].tolist(), abs=0.01)
    assert len(outputs[2].read_text().splitlines()) == 1 + len(rows)
    result = run('-m', 'timm_depla.predict', tmp_path, image, fails=True)
    assert result.stderr.startswith('timm_depla.predict: error: ')


@pytest.mark.parametrize('names', [('train2017', 'val2017'), ('Train', 'VALID'), ('train', 'val')])
def test_names_of_splits(names, tmp_path):
    """A recipe's train2017 and val2017, the flags' train and val, and what the folder has need not be the same."""
    (tmp_path / 'annotations').mkdir()
    for name in (*names, 'test-dev'):
        (tmp_path / 'annotations' / f'instances_{name}.json').touch()
    for splits in (('train', 'val'), ('train2017', 'val2017'), names):
        assert tuple(find_annotations(tmp_path, split)[0] for split in splits) == names


@pytest.mark.parametrize(
    'argv,message',
    [
        (['--model', 'maskrcnn_resnet50'], "no detector 'maskrcnn_resnet50': give fasterrcnn or maskrcnn"),
        (['--model-kwargs', 'min_sise=3'], r"cannot create detector .* unknown argument \['min_sise'\]"),
        (['--model-kwargs', 'num_classes=3'], "'num_classes' does not belong here: it follows from the categories"),
        (['--val-split', 'dev'], r'no annotation file .*instances_dev.json.* there are the splits train, val'),
        (['--gp', 'max'], "'--gp' of timm is not here: it is for classifiers"),
        (['--recipe', 'better'], "no recipe 'better'.*coco_1x, coco_fishnet, scenes"),
    ],
)
def test_bad_arguments(argv, message, small_scenes, recipe, tmp_path):
    with pytest.raises(ConfigError, match=message):
        fit(small_scenes, '-c', recipe, '--output', tmp_path, *argv)


def test_bad_data(trained, small_scenes, recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"no annotation file '.*nowhere.annotations.instances_train.json'"):
        fit(tmp_path / 'nowhere', '-c', recipe)
    data = shutil.copytree(small_scenes, tmp_path / 'data')
    annotations = data / 'annotations' / 'instances_val.json'
    content = json.loads(annotations.read_text())
    content['categories'].append(dict(id=99, name='more'))
    annotations.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r'differ in the categories \[99\]'):
        fit(data, '-c', recipe)
    with pytest.raises(ConfigError, match=r"does not know the categories \[99\] of '.*data'"):
        score(trained, '--data-dir', data)
    del content['categories'][-1]
    for annotation in content['annotations']:
        del annotation['segmentation']
    annotations.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r'learns masks, which the annotations have not: give --model fasterrcnn_'):
        fit(data, '-c', recipe)
    assert set(score(trained, '--data-dir', data)) == set(METRICS)  # of boxes alone
    annotations.unlink()
    with pytest.raises(ConfigError, match=r'no annotation file .*there are the splits train: name them'):
        fit(data, '-c', recipe)


@pytest.mark.parametrize('workers', [0, 1])
def test_unreadable_images(workers, trained, small_scenes, recipe, tmp_path):
    shutil.copytree(small_scenes, tmp_path / 'data')
    args = [tmp_path / 'data', '-c', recipe, '--output', tmp_path, '--workers', workers]
    (tmp_path / 'data' / 'val' / '000001.jpg').write_bytes(b'')
    with pytest.raises(TrainingError, match=r'loading data failed: .*val/000001.jpg: cannot identify image'):
        fit(*args, '--experiment', 'val')
    for name in ('000001.jpg', '000002.jpg'):
        (tmp_path / 'data' / 'train' / name).write_bytes(b'')
    with pytest.raises(TrainingError, match=r"2 of the \d+ images of the split 'train' cannot be read, more than 1%"):
        fit(*args, '--experiment', 'train')
    with pytest.raises(ConfigError, match=r'cannot read an image: .*val/000001.jpg: cannot identify image'):
        score(trained, '--data-dir', tmp_path / 'data', '--workers', workers)


def test_checkpoint_of_something_else(trained, small_scenes, tmp_path):
    path = tmp_path / 'changed'
    shutil.copytree((trained / 'last').resolve(), path)
    config = json.loads((path / 'config.json').read_text())
    config['model_args']['out_channels'] = 24
    (path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"changed' is damaged: config.json has"):
        from_pretrained(path)
    for name in ('checksums.json', 'state.json'):
        (path / name).unlink()
    with pytest.raises(ValueError, match=r"the weights in '.*changed' are of another detector .*backbone.fpn"):
        from_pretrained(path)
    (path / 'config.json').write_text(json.dumps(dict(architecture='resnet18', num_classes=10)))
    with pytest.raises(ConfigError, match=r"changed' holds no detector but 'resnet18'"):
        score(path, '--data-dir', small_scenes)
    with pytest.raises(ConfigError, match=r"run' holds a detector: python validate_detection.py validates it"):
        load_model(str(trained))
    (path / 'model.safetensors').write_bytes(b'1234')
    with pytest.raises(ValueError, match=r"changed' cannot be read"):
        from_pretrained(path)
    with pytest.raises(ConfigError, match=r"changed' is no run folder, so its data is unknown"):
        score(path)


def test_missing_package(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['train_detection.py'])
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    monkeypatch.setattr('timm_depla.errors.find_spec', lambda name: None)
    with pytest.raises(SystemExit, match=r'train_detection.py: error: .*pip install "timm-depla\[detection\]"'):
        runpy.run_path(str(ROOT / 'train_detection.py'), run_name='__main__')


@pytest.mark.parametrize('recipe,epochs,milestones', [('coco_1x', 12, (8, 11)), ('coco_fishnet', 24, (20, 22))])
def test_schedule_of_coco(recipe, epochs, milestones):
    args = parse_args(create_detection_parser(), ['-c', recipe])
    assert (args.epochs, args.train_split, args.val_split) == (epochs, 'train2017', 'val2017')
    args = updated(args, lr=args.lr_base)
    points = [0.07, 1, *(m + shift for m in milestones for shift in (-0.01, 0))]
    expected = [0.02, 0.02, 0.02, 0.002, 0.002, 0.0002]
    assert learning_rates(args, 7329, points) == pytest.approx(expected, rel=1e-4)
    assert learning_rates(args, 7329, [0]) == pytest.approx([2e-5])


def test_weights_of_a_checkpoint_are_those_of_the_average(trained):
    weights = load_file(trained / 'last' / 'model.safetensors')
    state = read_state(trained / 'last')
    assert weights.keys() == state['state_dict'].keys()
    assert any(not torch.equal(weights[name], state['state_dict'][name]) for name in weights)
