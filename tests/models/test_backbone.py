"""Loading a plain network's weights into the DEPLA model that is built on it."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_depla.layers import Depla
from timm_depla.models import load_backbone


@pytest.fixture
def model():
    return timm.create_model('resnet18_depla', num_classes=10)


@pytest.fixture
def plain():
    return timm.create_model('resnet18', num_classes=10)


def test_backbone_fills_all_but_depla(model, plain):
    report = load_backbone(model, plain.state_dict())
    assert set(report.loaded) == set(plain.state_dict())
    assert set(report.new) == {k for k in model.state_dict() if '.depla.' in k}
    assert report.skipped == []
    assert all(torch.equal(model.state_dict()[k], v) for k, v in plain.state_dict().items())
    assert str(report) == f'{len(report.loaded)} tensors loaded, {len(report.new)} of DEPLA new'
    for classes in (1000, 0):
        report = load_backbone(timm.create_model('resnet18_depla', num_classes=classes), plain)
        assert report.skipped == ['fc.weight', 'fc.bias'] and 'fc.weight' in str(report)


@pytest.mark.parametrize(
    'name,source,message',
    [
        ('resnet18_depla', 'resnet34', r'another architecture.* 0 missing; \d+ unexpected \(.*layer1.2.conv1.weight'),
        ('resnet18_depla', 'resnet50', r'\d+ of another shape \(.*\(64, 64, 1, 1\) for \(64, 64, 3, 3\)'),
        ('resnet34_depla', 'resnet18', r'\d+ missing \(layer1.2.conv1.weight, .*\); 0 unexpected; 0 of another shape'),
    ],
)
def test_other_architecture_names_the_lists_and_leaves_the_model_alone(name, source, message):
    model = timm.create_model(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_backbone(model, timm.create_model(source))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize(
    'name', ['resnet18', 'resnet50', 'seresnet50', 'resnext50_32x4d', 'regnety_008', 'regnetx_008', 'fishnet150']
)
@pytest.mark.parametrize('bfn', ['plain', 'adaptive'])
def test_kept_candidate_starts_from_the_plain_network(name, bfn):
    """The same logits, and a gradient for what makes the refinement differ from zero."""
    plain = timm.create_model(name, num_classes=7, **({} if 'fish' in name else dict(zero_init_last=False)))
    model = timm.create_model(f'{name}_depla', num_classes=7, depla=dict(bfn=bfn, keep_candidate=True))
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        plain.train()(x)  # running statistics of its own
        assert load_backbone(model, plain.state_dict()).new
        expected = plain.eval()(x)
        assert (model.eval()(x) - expected).abs().max() <= 1e-6 * expected.abs().max()
    model.train()(x).square().mean().backward()
    blocks = [module for module in model.modules() if isinstance(module, Depla)]
    assert blocks and all(block.norm.weight.grad.abs().max() > 0 for block in blocks)


def test_sources(model, plain, tmp_path):
    """A network, files with and without the prefix of nn.DataParallel, the whole model, and folders with it."""
    (tmp_path / 'best').mkdir()
    save_file(model.state_dict(), tmp_path / 'best' / 'model.safetensors')
    save_file(plain.state_dict(), tmp_path / 'plain.safetensors')
    for prefix in ('', 'module.'):
        state = {prefix + name: tensor for name, tensor in plain.state_dict().items()}
        torch.save({'state_dict': state}, tmp_path / f'{prefix}plain.pth')
    for source in (plain, *(tmp_path / name for name in ('plain.safetensors', 'plain.pth', 'module.plain.pth'))):
        filled = timm.create_model('resnet18_depla', num_classes=10)
        assert load_backbone(filled, source).new
        assert torch.equal(filled.layer3[0].conv1.weight, plain.layer3[0].conv1.weight)
    for source in (model.state_dict(), tmp_path, tmp_path / 'best'):
        filled = timm.create_model('resnet18_depla', num_classes=10)
        assert load_backbone(filled, source).new == []
        assert torch.equal(filled.layer3[0].conv1.weight, model.layer3[0].conv1.weight)
    with pytest.raises(FileNotFoundError, match=r'has no model.safetensors, in it or in its folder best'):
        load_backbone(model, tmp_path.parent)
    with pytest.raises(FileNotFoundError, match=r"'nowhere\.pth' is neither a checkpoint file nor a model of timm"):
        load_backbone(model, 'nowhere.pth')
