"""Every network: timm's requirements of a model, and its arguments. tests/timm_suite.py has timm's own tests."""

import copy

import pytest
import timm
import torch
from helpers import create
from timm.layers import create_feature_extractor
from timm.utils import reparameterize_model
from torch.utils.flop_counter import FlopCounterMode

import timm_depla
from timm_depla.layers import Depla
from timm_depla.models.cost import count_cost, count_macs

TINY = ['test_resnet_depla', 'test_regnet_depla', 'test_fishnet', 'test_fishnet_depla']
RESNETS = [
    'resnet18_depla', 'resnet50_depla', 'resnet50_depla_adaptive', 'seresnet18_depla', 'seresnet50_depla',
    'resnext50_32x4d_depla',
]  # one of each kind of block  # fmt: skip
SIZE = 64


def depla_blocks(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Depla)}


def test_registry():
    resnets = [f'{se}resnet{depth}_depla' for se in ('', 'se') for depth in (18, 34, 50, 101, 152)]
    resnets += ['resnet50_depla_adaptive', 'seresnet50_depla_adaptive', 'resnext50_32x4d_depla', 'test_resnet_depla']
    sizes = ['y_008', 'y_016', 'y_032', 'y_040', 'y_080', 'x_008', 'x_016', 'x_032']
    regnets = [*(f'regnet{size}_depla' for size in sizes), 'test_regnet_depla']
    fishnets = [f'{name}{end}' for name in ('fishnet99', 'fishnet150', 'fishnet201', 'test_fishnet')
                for end in ('', '_depla')]  # fmt: skip
    for module, names in dict(resnet_depla=resnets, regnet_depla=regnets, fishnet_depla=fishnets).items():
        assert sorted(timm.list_models(module=module)) == sorted(names)
        assert sorted(timm.list_models(module=module, name_matches_cfg=True)) == sorted(names)
    assert sorted(timm_depla.list_models()) == sorted([*resnets, *regnets, *fishnets, 'backbone_depla'])
    assert sorted(timm_depla.list_models('*regnet*')) == sorted(regnets)
    assert timm.list_models(['*_depla*', '*fishnet*'], pretrained=True) == []


@pytest.mark.parametrize(
    'name,depla',
    [
        *((name, None) for name in (*RESNETS, *TINY, 'fishnet99_depla')),
        ('test_regnet_depla', dict(bfn='adaptive')),
        ('test_regnet_depla', dict(keep_candidate=True)),
    ],
)
def test_backward_gives_every_parameter_a_gradient(name, depla):
    model = create(name, num_classes=7, drop_path_rate=0.1, **(dict(depla=depla) if depla else {})).train()
    out = model(torch.randn(2, 3, SIZE, SIZE))
    assert out.shape == (2, 7)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for block in depla_blocks(model).values():
        for key, parameter in block.named_parameters():
            learns_later = block.keep_candidate and not key.startswith('norm.')
            assert learns_later or parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize('name', [*RESNETS, *TINY])
def test_features(name):
    x = torch.randn(1, 3, SIZE, 96)
    with torch.no_grad():
        expected = create(name).forward_intermediates(x, intermediates_only=True)
        for feature_cls in ('getter', 'fx') if 'fish' in name else ('list', 'hook', 'getter'):
            backbone = create(name, features_only=True, feature_cls=feature_cls)
            features = backbone(x)
            assert [f.shape[1] for f in features] == backbone.feature_info.channels()
            assert [SIZE // f.shape[2] for f in features] == backbone.feature_info.reduction()
            torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['test_resnet_depla', 'test_regnet_depla'])
@pytest.mark.parametrize('output_stride', [8, 16, 32])
def test_output_stride(name, output_stride):
    model = create(name, output_stride=output_stride, features_only=True)
    features = model(torch.randn(1, 3, 128, 128))
    assert [128 // f.shape[-1] for f in features] == model.feature_info.reduction()
    assert model.feature_info.reduction()[-1] == output_stride


def convert(model, form):
    """A function that computes what the model computes."""
    if form == 'script':
        return torch.jit.script(model)
    if form == 'compile':
        return torch.compile(model, fullgraph=True, backend='aot_eager')
    if form == 'export':
        height, width = (32 * torch.export.Dim(name, min=1) for name in 'hw')
        shape = {0: torch.export.Dim('batch'), 2: height, 3: width}
        return torch.export.export(model, (torch.randn(2, 3, 96, 64).double(),), dynamic_shapes=(shape,)).module()
    node = model.pretrained_cfg['classifier']
    traced = create_feature_extractor(model, [node])
    traced = traced if form == 'fx' else torch.jit.script(traced)
    return lambda x: traced(x)[node]


FORMS = ['script', 'compile', 'export', 'fx', 'script of fx']


@pytest.mark.parametrize(
    'name,form',
    [
        *((name, form) for name in (*TINY, 'resnet50_depla_adaptive') for form in FORMS),
        *((name, 'export') for name in RESNETS if name != 'resnet50_depla_adaptive'),
    ],
)
def test_converted_network(name, form):
    """For another batch and size than it was exported with."""
    if (name, form) == ('test_fishnet_depla', 'export') and torch.__version__ < (2, 15):
        pytest.skip('before 2.15, torch takes many minutes to simplify the sizes of FishNet-DEPLA')
    model, x = create(name, num_classes=7).double(), torch.randn(3, 3, SIZE, 128).double()
    with torch.no_grad():
        expected = model(x)
        assert (convert(model, form)(x) - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize('name', TINY)
def test_timm_interface(name):
    x = torch.randn(2, 3, SIZE, SIZE)
    model = create(name, drop_rate=0.1, drop_path_rate=0.2, in_chans=1)
    assert all(block.drop_path.drop_prob > 0 for block in depla_blocks(model).values())
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert len(set(groups.values())) > 4
    with torch.no_grad():
        assert model(x[:, :1]).shape == (2, 1000)
        model.reset_classifier(5, 'max')
        assert model(x[:, :1]).shape == (2, 5)
        assert model.get_classifier().out_features == 5
        assert create(name, num_classes=0)(x).shape == (2, model.num_features)
        assert create(name, num_classes=0, global_pool='')(x).shape == (2, model.num_features, 2, 2)
        model.prune_intermediate_layers([3])
        assert model(x[:, :1]).shape[1] == model.num_features
    meta = timm.create_model(name, device='meta', dtype=torch.bfloat16)
    assert {(t.device.type, t.dtype) for t in meta.parameters()} == {('meta', torch.bfloat16)}


@pytest.mark.parametrize(
    'name,norms',
    [
        ('resnet50_depla', 15),
        ('seresnet50_depla', 12),
        ('resnet50_depla_adaptive', 15),
        ('test_regnet_depla', 15),
        ('test_fishnet_depla', 24),
    ],
)
def test_reparameterized_model_is_the_model(name, norms):
    """Without the norms of DEPLA, and without the candidate's where only DEPLA reads it."""
    model, x = create(name).double(), torch.randn(1, 3, SIZE, 96).double()
    model.train()(x.expand(4, -1, -1, -1) + torch.randn(4, 3, SIZE, 96))  # statistics of its own
    fused = reparameterize_model(model.eval())
    with torch.no_grad():
        expected = model(x)
        assert (fused(x) - expected).abs().max() < 1e-10 * expected.abs().max()
    before, after = (sum(isinstance(m, torch.nn.BatchNorm2d) for m in each.modules()) for each in (model, fused))
    assert before - after == norms


@pytest.mark.parametrize('name', ['test_resnet_depla', 'test_regnet_depla', 'test_fishnet_depla'])
def test_grad_checkpointing_gives_the_same_gradients(name):
    """With less memory."""
    model, x = create(name).train(), torch.randn(2, 3, SIZE, SIZE)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    saved = []
    for m in (model, other):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            m(x).square().mean().backward()
        saved.append(sum(sizes))
    torch.testing.assert_close([p.grad for p in other.parameters()], [p.grad for p in model.parameters()])
    assert saved[1] < 0.7 * saved[0]


@pytest.mark.parametrize(
    'name,parameters,gmacs',
    [
        ('resnet50', 25_557_032, 4.09),
        ('resnet50_depla', 26_010_296, 4.18),
        ('resnet50_depla_adaptive', 26_057_192, 4.19),
        ('resnet101_depla', 45_002_424, 7.89),
        ('fishnet99', 16_628_904, 4.26),
        ('fishnet150', 24_959_400, 6.40),
        ('fishnet201', 44_584_552, 10.51),
        ('fishnet99_depla', 17_101_896, 4.41),
        ('fishnet150_depla', 25_432_392, 6.55),
        ('fishnet201_depla', 45_057_544, 10.66),
        ('test_resnet_depla', 493_008, 0.04),
        ('test_fishnet_depla', 635_440, 0.04),
    ],
)
def test_cost(name, parameters, gmacs):
    """Multiply-adds of convolutions and matrix products at the network's size (ruling 7), and parameters."""
    model = timm.create_model(name, device='meta').eval()
    size = model.default_cfg['input_size']
    cost = count_cost(model, size)
    assert (cost['parameters'], round(cost['macs'] / 1e9, 2)) == (parameters, gmacs)
    if name == 'resnet50':
        assert round(cost['activations'] / 1e6, 2) == 11.11  # as timm's table of results has it
    if name == 'resnet50_depla':  # fused, it has less than resnet50: it does not make the candidates
        assert round(count_macs(reparameterize_model(model), size) / 1e9, 2) == 4.0
    if name == 'fishnet150_depla':  # the fused form, where X is up-sampled after DEPLA (ruling 12)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, *size, device='meta'))
        assert round(counter.get_total_flops() / 2e9, 2) == 6.53


@pytest.mark.parametrize('name', ['test_resnet_depla', 'test_fishnet_depla', 'test_regnet_depla'])
@pytest.mark.parametrize('bfn', ['plain', 'adaptive'])
def test_empty_batch(name, bfn):
    """Gradients of zero and statistics as they were, as in the base."""
    model, x = create(name, depla=dict(bfn=bfn)).train(), torch.empty(0, 3, 64, 64)
    before = {key: buffer.clone() for key, buffer in model.named_buffers() if buffer.is_floating_point()}
    model(x).sum().backward()
    assert all(torch.equal(parameter.grad, torch.zeros_like(parameter)) for parameter in model.parameters())
    assert all(torch.equal(model.get_buffer(key), value) for key, value in before.items())
    assert model.eval()(x).shape == (0, 1000)


FISH = [f'{part}.{i}' for part in ('body', 'head') for i in range(3)]


@pytest.mark.parametrize(
    'name,depla,places,bfn',
    [
        ('resnet50_depla', dict(stage=2, positions=(3,)), ['layer2.3'], 'plain'),
        ('resnet50_depla', {}, ['layer3.1', 'layer3.3', 'layer3.5'], 'plain'),
        ('resnet50_depla_adaptive', {}, ['layer3.1', 'layer3.3', 'layer3.5'], 'adaptive'),  # the variant's, kept
        ('resnet101_depla', {}, ['layer3.7', 'layer3.14', 'layer3.22'], 'plain'),
        ('fishnet99', dict(bfn='adaptive'), FISH, 'adaptive'),
    ],
)
def test_depla_arguments(name, depla, places, bfn):
    given = dict(num_groups=8, pooled_chs=12, maps_per_group=2, temperature=0.5)
    blocks = depla_blocks(timm.create_model(name, depla={**depla, **given}, device='meta'))
    assert list(blocks) == [f'{place}.depla' for place in places]
    for block in blocks.values():
        assert (block.rpn.temperature, hasattr(block.bfn, 'query')) == (0.5, bfn == 'adaptive')
        assert block.rpn.logits.conv.weight.shape[:2] == (8 * 2, block.identity_chs)
        assert block.proj.weight.shape == (block.identity_chs, 12)


@pytest.mark.parametrize(
    'name,kwargs,error,message',
    [
        ('resnet50_depla', dict(depla=dict(temprature=0.5)), TypeError, r"argument \['temprature'\]; .*'temperature'"),
        ('test_regnet_depla', dict(depla=dict(keep_candidate='False')), ValueError, r"\[False, True\], got 'False'"),
        ('test_fishnet_depla', dict(depla=dict(keep_candidate='no')), ValueError, r"one of \[False, True\], got 'no'"),
        ('test_regnet_depla', dict(depla=dict(layers=[9])), TypeError, r"unknown depla argument \['layers'\]"),
        ('resnet50_depla', dict(depla='adaptive'), TypeError, r"\['adaptive'\]; depla is a map .*'temperature'"),
        ('resnet50_depla', dict(depla=dict(stage=3.0)), ValueError, 'stage must be one of 1 to 4, got 3.0'),
        ('resnet50_depla', dict(depla=dict(stage=5)), ValueError, 'stage must be one of 1 to 4, got 5'),
        ('resnet50_depla', dict(depla=dict(positions=(1, 6))), ValueError, r'of stage 3, 0 to 5, got \(1, 6\)'),
        ('resnet50_depla', dict(depla=dict(positions=2)), ValueError, 'block indices of stage 3, 0 to 5, got 2'),
        ('test_regnet_depla', dict(depla=dict(stage=4, positions=[2])), ValueError, 'indices of stage 4, 0 to 1, got'),
        ('test_regnet_depla', dict(preact=True), ValueError, 'no DEPLA for RegNet blocks with pre-activation'),
        ('fishnet150_depla', dict(depla=dict(stage=3)), TypeError, r"unknown depla argument \['stage'\]"),
        ('fishnet150_depla', dict(output_stride=16), ValueError, 'output_stride must be 32, got 16: .*indices 0 to 4'),
        ('fishnet150_depla', dict(width=18), ValueError, 'width must be a positive multiple of 4, got 18'),
    ],
)
def test_bad_argument(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model(name, device='meta', **kwargs)
