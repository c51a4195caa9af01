"""DEPLA around blocks of timm's networks: outputs are unchanged before training, and timm's functions work."""

import pytest
import timm
import torch
from helpers import create
from timm.models import save_for_hf

import timm_depla
from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.config import parse_args, updated
from timm_depla.engine.optimizer import create_optimizer
from timm_depla.errors import ConfigError
from timm_depla.layers import Depla
from timm_depla.models import load_backbone
from timm_depla.models.insertion import BlockWithDepla

BACKBONES = {
    'convnext_tiny': ['stages.2.blocks.1', 'stages.2.blocks.5', 'stages.2.blocks.8'],
    'efficientnet_b0': ['blocks.4.1', 'blocks.4.2'],
    'mobilenetv3_large_100': ['blocks.4.1'],
    'resnetv2_50': ['stages.2.blocks.1', 'stages.2.blocks.3', 'stages.2.blocks.5'],
    'regnetz_c16': ['stages.2.3', 'stages.2.7', 'stages.2.11'],
    'swin_tiny_patch4_window7_224': ['layers.2.blocks.0', 'layers.2.blocks.3', 'layers.2.blocks.5'],
    'hgnetv2_b0': ['stages.2.blocks.1'],
    'nfnet_f0': ['stages.2.1', 'stages.2.3', 'stages.2.5'],
}


def inserted(model):
    return [name for name, module in model.named_modules() if isinstance(module, BlockWithDepla)]


@pytest.mark.parametrize('backbone', BACKBONES)
def test_backbone_is_unchanged_and_every_weight_of_depla_can_learn(backbone):
    model = create(backbone, num_classes=7)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model(x)
        assert timm_depla.insert_depla(model) is model and not model.training
        assert inserted(model) == BACKBONES[backbone]
        assert torch.equal(model(x), expected)
    model.train()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if '.depla.' in n], lr=0.1)
    for _ in range(2):  # the refinement starts at zero, and what is before it learns from the second step on
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert '.depla.' not in name or parameter.grad.abs().max() > 0, name


def test_modules_by_name():
    model = create('resnet18').train()
    timm_depla.insert_depla(model, dict(modules=['layer2.1', 'layer4.1'], bfn='adaptive'))
    assert inserted(model) == ['layer2.1', 'layer4.1']
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(hasattr(module.bfn, 'query') for module in model.modules() if isinstance(module, Depla))
    with pytest.raises(ValueError, match=r'^layer2.1 and 1 more of ResNet has DEPLA'):
        timm_depla.insert_depla(model, dict(modules=inserted(model)))
    with pytest.raises(ValueError, match='Sequential is no network of timm: make it by timm'):
        timm_depla.insert_depla(torch.nn.Sequential(model))


@pytest.mark.parametrize(
    'backbone,depla,error,message',
    [
        ('densenet121', {}, ValueError, r'^features.denseblock3.denselayer1 and 23 more of DenseNet takes or'),
        ('test_vit', {}, ValueError, '^VisionTransformer works on tokens, not on maps: DEPLA has no place in it$'),
        ('vgg11', {}, ValueError, r'^features\.\d+ of VGG has no blocks: name other blocks'),
        ('twins_pcpvt_small', {}, ValueError, '^Twins tells no stage at 1/16: name blocks'),
        ('test_resnet', {}, ValueError, '^layer3.0 of ResNet changes the shape of its map: name other blocks'),
        ('test_resnet', dict(modules=['layer3.7']), ValueError, r"no module \['layer3.7'\] in ResNet"),
        ('test_resnet', dict(modules=['layer3']), ValueError, '^layer3 of ResNet changes the shape of its map'),
        ('test_resnet', dict(positions=[1]), TypeError, r"unknown depla argument \['positions'\]"),
        ('test_resnet', dict(modules=['layer4'], keep_candidate=False), ValueError, 'leave out keep_candidate=False'),
        ('test_resnet', dict(keep_candidate='False'), ValueError, "leave out keep_candidate='False'"),
    ],
)
def test_what_cannot_be_served_says_why(backbone, depla, error, message):
    model = create(backbone)
    before = list(model.state_dict())
    with pytest.raises(error, match=message):
        timm_depla.insert_depla(model, depla)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize('backbone', ['test_convnext', 'test_mambaout'])
def test_entrypoint(backbone):
    x = torch.randn(2, 3, 160, 128)
    model, plain = create('backbone_depla', backbone=backbone, depla=dict(temperature=0.5)), create(backbone)
    assert len(inserted(model)) and model.pretrained_cfg['architecture'] == 'backbone_depla'
    assert model.pretrained_cfg['mean'] == plain.pretrained_cfg['mean'] and not model.pretrained_cfg.get('hf_hub_id')
    with torch.no_grad():
        load_backbone(model, plain.state_dict())  # a plain network's names
        assert torch.equal(model(x), plain(x))
        for form in (torch.jit.script(model), torch.export.export(model, (x,)).module()):
            torch.testing.assert_close(form(x), plain(x))
        features = create('backbone_depla', backbone=backbone, features_only=True)
        assert [f.shape[1] for f in features(x)] == features.feature_info.channels()
        assert features.feature_info.channels() == create(backbone, features_only=True).feature_info.channels()
    for tag, name, message in (('', 'convnext_tini', 'no model of timm'), ('.a', backbone, f"='{backbone}.a'")):
        with pytest.raises(ValueError, match=message):
            timm.create_model(f'backbone_depla{tag}', backbone=name)


def test_weights_of_the_whole_come_back(tmp_path):
    arguments = dict(backbone='test_convnext', depla=dict(bfn='adaptive'), num_classes=7)
    model, x = create('backbone_depla', **arguments), torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        fresh = model(x)
        for module in model.modules():
            if isinstance(module, Depla):
                module.norm.weight.fill_(1)
        expected = model(x)
    assert not torch.equal(expected, fresh)
    save_for_hf(model, tmp_path, model_args=arguments, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert type(loaded).__name__ == 'ConvNeXt' and torch.equal(loaded(x), expected)


def test_backbone_learns_at_its_own_rate():
    args = parse_args(create_train_parser(), ['--recipe', 'finetune', '--lr', '0.01', '--warmup-epochs', '0'])
    model = create('backbone_depla', backbone='test_convnext', num_classes=7)
    optimizer, *_ = create_optimizer(args, model, 10)
    found = [(id(p), group['lr'], group['weight_decay']) for group in optimizer.param_groups for p in group['params']]
    groups = {key: values for key, *values in found}
    assert len(groups) == len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        rate = 0.01 if '.depla.' in name or name.startswith('head.fc') else 0.001
        decay = 0.05 if parameter.ndim > 1 and not name.endswith('.bias') else 0
        assert groups[id(parameter)] == [pytest.approx(rate), decay], name
    with pytest.raises(ConfigError, match='--backbone-lr-scale and --layer-decay both scale the rate'):
        create_optimizer(updated(args, layer_decay=0.7), model, 10)
