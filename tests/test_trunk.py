"""Seeding a DEPLA model with the weights of the network that it was built on."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_depla.models import load_trunk


@pytest.fixture
def model():
    return timm.create_model('resnet18_depla', num_classes=10)


@pytest.fixture
def trunk():
    torch.manual_seed(1)
    return timm.create_model('resnet18', num_classes=10)


def test_trunk_fills_all_but_depla(model, trunk):
    report = load_trunk(model, trunk.state_dict())
    assert set(report.loaded) == set(trunk.state_dict())
    assert set(report.new) == {k for k in model.state_dict() if '.depla.' in k}
    assert report.skipped == []
    assert all(torch.equal(model.state_dict()[k], v) for k, v in trunk.state_dict().items())
    assert str(report) == f'{len(report.loaded)} tensors loaded, {len(report.new)} of DEPLA new'


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_file(model, trunk, prefix, tmp_path):
    torch.save({'state_dict': {prefix + k: v for k, v in trunk.state_dict().items()}}, tmp_path / 'trunk.pth')
    save_file(trunk.state_dict(), tmp_path / 'trunk.safetensors')
    for name in ('trunk.pth', 'trunk.safetensors'):
        assert len(load_trunk(model, tmp_path / name).loaded) == len(trunk.state_dict())


def test_whole_model(model):
    assert load_trunk(timm.create_model('resnet18_depla', num_classes=10), model.state_dict()).new == []


def test_classifier_for_other_classes_is_skipped(model):
    report = load_trunk(model, timm.create_model('resnet18', num_classes=1000).state_dict())
    assert report.skipped == ['fc.weight', 'fc.bias']
    assert 'fc.weight' in str(report)


def test_other_architecture_names_both_lists_and_leaves_the_model_alone(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r'of another architecture.* 0 missing; \d+ unexpected \(.*layer1.2.conv1.weight'
    ):
        load_trunk(model, timm.create_model('resnet34', num_classes=10).state_dict())
    with pytest.raises(ValueError, match=r'\d+ of another shape \(.*\(64, 64, 1, 1\) for \(64, 64, 3, 3\)'):
        load_trunk(model, timm.create_model('resnet50', num_classes=10).state_dict())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_missing_source(model):
    with pytest.raises(FileNotFoundError, match=r"'nowhere\.pth' is neither a checkpoint file nor a model of timm"):
        load_trunk(model, 'nowhere.pth')
