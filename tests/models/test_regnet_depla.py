"""Every registered RegNet: the positions of DEPLA, and timm's requirements of a model."""

import pytest
import timm
import torch
from helpers import create
from timm.layers import create_feature_extractor
from timm.utils import reparameterize_model

import timm_depla
from timm_depla.layers import Depla
from timm_depla.models import load_backbone

MODELS = timm.list_models(module='regnet_depla')
SIZE = 64


def test_registry():
    sizes = [f'y_{size}' for size in ('008', '016', '032', '040', '080')] + [f'x_{s}' for s in ('008', '016', '032')]
    assert sorted(MODELS) == sorted([f'regnet{size}_depla' for size in sizes] + ['test_regnet_depla'])
    assert timm.list_models(module='regnet_depla', name_matches_cfg=True) == MODELS
    assert set(MODELS) < set(timm_depla.list_models()) and timm_depla.list_models('*regnet*') == MODELS


@pytest.mark.parametrize('name', MODELS)
def test_backbone_is_timms_and_depla_stands_in_stage_3(name):
    model = timm.create_model(name, device='meta')
    blocks = [key for key, module in model.named_modules() if isinstance(module, Depla)]
    assert len(blocks) == 3 and all(key.startswith('s3.b') for key in blocks)
    assert blocks[-1] == f's3.b{len(list(model.s3.children()))}.depla'
    if name != 'test_regnet_depla':
        plain = timm.create_model(name.removesuffix('_depla'), device='meta').state_dict()
        backbone = {key: value for key, value in model.state_dict().items() if '.depla.' not in key}
        assert {k: v.shape for k, v in backbone.items()} == {k: v.shape for k, v in plain.items()}
        assert list(backbone) == list(plain)


@pytest.mark.parametrize('depla', [dict(), dict(bfn='adaptive'), dict(keep_candidate=True)])
def test_backward_gives_every_parameter_a_gradient(depla):
    model = create('test_regnet_depla', num_classes=7, drop_path_rate=0.1, depla=depla).train()
    model(torch.randn(2, 3, SIZE, SIZE)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for key, parameter in model.named_parameters():
        learns_later = depla.get('keep_candidate') and '.depla.norm' not in key
        assert '.depla.' not in key or learns_later or parameter.grad.abs().max() > 0, key


def test_script_fx_compile_and_export():
    model, x = create('test_regnet_depla'), torch.randn(2, 3, SIZE, 96)
    shape = {0: torch.export.Dim('batch'), 2: 32 * torch.export.Dim('h', min=1), 3: 32 * torch.export.Dim('w', min=1)}
    with torch.no_grad():
        expected = model(x)
        traced = create_feature_extractor(model, ['head.fc'])
        outs = [traced(x)['head.fc'], torch.jit.script(model)(x)]
        outs.append(torch.compile(model, fullgraph=True, backend='aot_eager')(x))
        program = torch.export.export(model, (torch.randn(3, 3, 96, 64),), dynamic_shapes=(shape,)).module()
        for out in (*outs, program(x)):
            assert (out - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize('output_stride', [8, 32])
def test_features(output_stride):
    x = torch.randn(1, 3, 128, 128)
    expected = create('test_regnet_depla', output_stride=output_stride).forward_intermediates(
        x, intermediates_only=True
    )
    for feature_cls in ('list', 'hook', 'getter'):
        backbone = create('test_regnet_depla', output_stride=output_stride, features_only=True, feature_cls=feature_cls)
        assert backbone.feature_info.reduction()[-1] == output_stride
        torch.testing.assert_close(backbone(x), expected)


def test_reparameterized_model_is_the_model():
    model, x = create('test_regnet_depla').double(), torch.randn(2, 3, SIZE, SIZE).double()
    model.train()(torch.randn(4, 3, SIZE, SIZE).double())  # statistics of its own
    fused = reparameterize_model(model.eval())
    assert isinstance(fused.s3.b2.conv3.conv, torch.nn.Identity)
    with torch.no_grad():
        assert (fused(x) - model(x)).abs().max() < 1e-10 * model(x).abs().max()


@pytest.mark.parametrize('name', ['regnety_008', 'regnetx_008'])
def test_kept_candidate_starts_from_the_plain_network(name):
    plain = create(name, num_classes=7, zero_init_last=False)
    model = create(f'{name}_depla', num_classes=7, depla=dict(keep_candidate=True))
    x = torch.randn(2, 3, SIZE, 96)
    with torch.no_grad():
        plain.train()(x)
        report = load_backbone(model, plain.state_dict())
        assert report.new and all('.depla.' in key for key in report.new) and not report.skipped
        expected = plain.eval()(x)
        assert (model(x) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_initialisation():
    """Ruling 6: Y's last norm is zero in the blocks without DEPLA only."""
    for name, block in create('regnety_008_depla').s3.named_children():
        assert block.conv3.bn.weight.eq(1 if hasattr(block, 'depla') else 0).all(), name


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"unknown depla argument \['temprature'\]"):
        timm.create_model('test_regnet_depla', depla=dict(temprature=1))
    with pytest.raises(ValueError, match='block indices of stage 4, 0 to 1, got'):
        timm.create_model('test_regnet_depla', depla=dict(stage=4, positions=[2]))
    with pytest.raises(ValueError, match='no DEPLA for RegNet blocks with pre-activation'):
        timm.create_model('test_regnet_depla', preact=True)
