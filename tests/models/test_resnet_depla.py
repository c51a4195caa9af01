"""Every registered ResNet: timm's requirements of a model, and the positions of DEPLA."""

import copy

import pytest
import timm
import torch
from helpers import create, gpu_autocast
from timm.layers import create_feature_extractor
from timm.utils import reparameterize_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from timm_depla.engine.plan import count_cost, count_macs
from timm_depla.layers import Depla, set_fused_depla
from timm_depla.models.candidate import fuse_in_training
from timm_depla.models.placement import default_positions

MODELS = timm.list_models(module='resnet_depla')
ARCHITECTURES = [
    'resnet18_depla', 'resnet50_depla', 'resnet50_depla_adaptive', 'seresnet18_depla', 'seresnet50_depla',
    'resnext50_32x4d_depla',
]  # fmt: skip
"""One of each kind of block; tests/timm_suite.py has all models."""
SIZE = 64


def depla_blocks(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Depla)}


def test_registry():
    names = [f'{se}resnet{depth}_depla' for se in ('', 'se') for depth in (18, 34, 50, 101, 152)]
    others = ['resnet50_depla_adaptive', 'seresnet50_depla_adaptive', 'resnext50_32x4d_depla', 'test_resnet_depla']
    assert sorted(MODELS) == sorted(names + others)
    assert timm.list_models(module='resnet_depla', name_matches_cfg=True) == MODELS
    assert timm.list_models('*_depla*', pretrained=True) == []


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_backward_gives_every_parameter_a_gradient(name):
    model = create(name, num_classes=7).train()
    out = model(torch.randn(2, 3, SIZE, SIZE))
    assert out.shape == (2, 7)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for block in depla_blocks(model).values():
        for key, parameter in block.named_parameters():
            assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_features(name):
    x = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = create(name).forward_intermediates(x, intermediates_only=True)
        for feature_cls in ('hook', 'getter'):
            backbone = create(name, features_only=True, feature_cls=feature_cls)
            features = backbone(x)
            assert [f.shape[1] for f in features] == backbone.feature_info.channels()
            assert [SIZE // f.shape[-1] for f in features] == backbone.feature_info.reduction()
            torch.testing.assert_close(features, expected)


@pytest.mark.parametrize('name', ['test_resnet_depla', 'resnet50_depla_adaptive'])  # all: tests/timm_suite.py
def test_script_and_fx(name):
    model, x = create(name), torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = model(x)
        traced = create_feature_extractor(model, ['fc'])
        for out in (traced(x)['fc'], torch.jit.script(traced)(x)['fc'], torch.jit.script(model)(x)):
            assert (out - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_export_with_dynamic_batch_and_size(name):
    model = create(name, num_classes=7)
    shape = {0: torch.export.Dim('batch'), 2: 32 * torch.export.Dim('h', min=1), 3: 32 * torch.export.Dim('w', min=1)}
    program = torch.export.export(model, (torch.randn(2, 3, SIZE, 96),), dynamic_shapes=(shape,)).module()
    x = torch.randn(3, 3, 96, 128)
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)


def test_compile():
    model, x = create('test_resnet_depla'), torch.randn(2, 3, SIZE, SIZE)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize('name', ['test_resnet_depla', 'resnet18_depla'])
def test_timm_interface(name):
    x = torch.randn(2, 3, SIZE, SIZE)
    model = timm.create_model(name, drop_path_rate=0.2, in_chans=1).eval()
    with torch.no_grad():
        assert model(x[:, :1]).shape == (2, 1000)
        model.reset_classifier(5, 'max')
        assert model(x[:, :1]).shape == (2, 5)
        assert model.get_classifier().out_features == 5
        model.prune_intermediate_layers([3])
        assert model(x[:, :1]).shape[1] == model.num_features
        assert timm.create_model(name, num_classes=0)(x).ndim == 2
        assert timm.create_model(name, num_classes=0, global_pool='')(x).ndim == 4
    meta = timm.create_model(name, device='meta', dtype=torch.bfloat16)
    assert {(t.device.type, t.dtype) for t in meta.parameters()} == {('meta', torch.bfloat16)}
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert len(set(groups.values())) > 4


@pytest.mark.parametrize('output_stride', [8, 16, 32])
def test_output_stride(output_stride):
    model = timm.create_model('test_resnet_depla', output_stride=output_stride, features_only=True).eval()
    features = model(torch.randn(1, 3, 128, 128))
    assert [f.shape[-1] for f in features] == [128 // r for r in model.feature_info.reduction()]
    assert model.feature_info.reduction()[-1] == output_stride


class Operations(TorchDispatchMode):
    """Records what runs: its name and the types of its tensors."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append((str(func), {t.dtype for t in args if isinstance(t, torch.Tensor)}))
        return func(*args, **(kwargs or {}))


def count_left_out(block, x):
    """How many of a block's norms do not run in a forward pass."""
    with Operations() as operations:
        block(x)
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in block.modules())
    return norms - sum('batch_norm' in name for name, _ in operations.called)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_fused_form_is_the_block(memory_format):
    """Outputs, gradients and statistics are the same where the candidate is not made, and where a hook on DEPLA is."""
    fused = create('test_resnet_depla').layer3[1].double().to(memory_format=memory_format)
    plain, hooked = copy.deepcopy(fused), copy.deepcopy(fused)
    heard = {}
    for name in ('bn3', 'depla'):
        hooked.get_submodule(name).register_forward_hook(lambda _, *heard_, name=name: heard.update({name: heard_}))
    x = (3 + torch.randn(4, 192, 27, 28).double()).contiguous(memory_format=memory_format)
    assert count_left_out(copy.deepcopy(fused).train(), x) == 2  # the candidate's and the output's
    for training in (True, True, False):
        results = []
        for block in (fused, plain, hooked):
            block.train(training).zero_grad()
            inputs = x.clone().requires_grad_()
            with set_fused_depla(block is not plain):
                out = block(inputs)
            (out.sin() * torch.arange(out.shape[1]).view(-1, 1, 1)).sum().backward()
            results.append([out, inputs.grad, *(p.grad for p in block.parameters()), *block.buffers()])
        torch.testing.assert_close(results[0], results[1])
        torch.testing.assert_close(results[0], results[2])
        (identity, candidate), refined = heard['depla']
        assert torch.equal(identity, x) and torch.equal(candidate, heard['bn3'][1])
        torch.testing.assert_close(torch.relu(refined), out)


LEFT_OUT = [('cpu', 1, 0), ('cpu', 8, 2), ('cuda', 8, 0), ('cuda', 96, 1)]


@pytest.mark.parametrize('device,batch,count', LEFT_OUT)
def test_fused_form_of_large_maps(device, batch, count):
    """On a CPU, the norms of candidate and output are left out; on a GPU the candidate's. Tensors have no data."""
    with FakeTensorMode():
        block = timm.create_model('resnet50_depla', device=device).layer3[1]
        x = torch.empty(batch, 1024, 14, 14, device=device)
        assert count_left_out(block.train(), x) == count
        with set_fused_depla(False):
            assert count_left_out(block, x) == 0
        assert count_left_out(block.eval(), x) == 0


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_fusing_keeps_single_precision_under_the_autocast_of_a_gpu(dtype):
    with gpu_autocast(dtype):
        block = timm.create_model('resnet50_depla', device='cuda').layer3[1].train()
        x = torch.randn(2, 256, 6, 6, device='cuda', dtype=dtype)
        with Operations() as operations:
            fuse_in_training(block.conv3, block.bn3, block.depla.candidate, x)
    products = [types for name, types in operations.called if name.startswith(('aten.mm', 'aten.mv'))]
    assert len(products) == 5 and all(types == {torch.float32} for types in products)


@pytest.mark.parametrize('name', ['resnet50_depla', 'seresnet50_depla', 'resnet50_depla_adaptive'])
def test_reparameterized_model_is_the_model(name):
    model, x = create(name).double(), torch.randn(1, 3, SIZE, 96).double()
    model.train()(x.expand(4, -1, -1, -1) + torch.randn(4, 3, SIZE, 96))  # statistics of its own
    fused = reparameterize_model(model.eval())
    with torch.no_grad():
        expected = model(x)
        assert (fused(x) - expected).abs().max() < 1e-10 * expected.abs().max()
    norms = [sum(isinstance(m, torch.nn.BatchNorm2d) for m in each.modules()) for each in (model, fused)]
    assert norms[0] - norms[1] == 3 * (4 if name.startswith('se') else 5)


def test_grad_checkpointing_gives_the_same_gradients():
    model, x = create('test_resnet_depla').train(), torch.randn(2, 3, SIZE, SIZE)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    for m in (model, other):
        m(x).square().mean().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(
    'num_blocks,positions',
    [(2, (1,)), (3, (1, 2)), (4, (1, 2, 3)), (5, (1, 2, 4)), (6, (1, 3, 5)), (23, (7, 14, 22)), (36, (11, 23, 35))],
)
def test_default_positions(num_blocks, positions):
    assert default_positions(num_blocks) == positions


@pytest.mark.parametrize('name,positions', [('resnet50_depla', (1, 3, 5)), ('resnet101_depla', (7, 14, 22))])
def test_depla_blocks_stand_in_stage_3(name, positions):
    model = timm.create_model(name, device='meta')
    assert list(depla_blocks(model)) == [f'layer3.{i}.depla' for i in positions]


def test_depla_arguments():
    depla = dict(stage=2, positions=(3,), num_groups=8, pooled_chs=12, maps_per_group=2, temperature=0.5)
    blocks = depla_blocks(timm.create_model('resnet50_depla', depla=depla, device='meta'))
    assert list(blocks) == ['layer2.3.depla']
    block = blocks['layer2.3.depla']
    assert block.rpn.temperature == 0.5
    assert block.rpn.logits.conv.weight.shape[:2] == (8 * 2, 512)
    assert block.proj.weight.shape == (512, 12)


def test_depla_argument_overrides_the_variant_key_by_key():
    blocks = depla_blocks(timm.create_model('resnet50_depla_adaptive', depla=dict(temperature=0.5), device='meta'))
    assert all(hasattr(b.bfn, 'query') and b.rpn.temperature == 0.5 for b in blocks.values())


@pytest.mark.parametrize(
    'depla,error,message',
    [
        (dict(temprature=0.5), TypeError, r"unknown depla argument \['temprature'\]; .*'temperature'"),
        (dict(stage=5), ValueError, 'stage must be one of 1 to 4, got 5'),
        (dict(positions=(1, 6)), ValueError, r'block indices of stage 3, 0 to 5, got \(1, 6\)'),
        (dict(positions=()), ValueError, r'block indices of stage 3, 0 to 5, got \(\)'),
        (dict(bfn='fancy'), ValueError, "bfn must be one of plain, adaptive, got 'fancy'"),
        (dict(temperature=0), ValueError, 'temperature must be from 0.001 to 1000, got 0'),
    ],
)
def test_bad_depla_argument(depla, error, message):
    with pytest.raises(error, match=message):
        timm.create_model('resnet50_depla', depla=depla, device='meta')


@pytest.mark.parametrize('zero_init_last', [True, False])
def test_initialisation_survives_timm(zero_init_last):
    """Ruling 6: Y's last norm is not zero in a DEPLA block; rulings 6 and 11: DEPLA keeps its own scale."""
    model = create('resnet50_depla', zero_init_last=zero_init_last)
    for i, block in enumerate(model.layer3):
        starts_at_zero = zero_init_last and i not in (1, 3, 5)
        assert block.bn3.weight.eq(0 if starts_at_zero else 1).all()
    for block in depla_blocks(model).values():
        fresh = Depla(1024)
        assert torch.equal(block.norm.weight, fresh.norm.weight) and 0 < block.norm.weight[0] < 1
        for name, parameter in block.named_parameters():
            if parameter.ndim > 1:
                assert abs(parameter.std() * parameter.shape[1] ** 0.5 - 1) < 4 / (2 * parameter.numel()) ** 0.5, name


@pytest.mark.parametrize(
    'name,gmacs,params',
    [
        ('resnet50', 4.09, 25.6),
        ('resnet50_depla', 4.18, 26.0),
        ('resnet50_depla_adaptive', 4.19, 26.1),
        ('resnet101_depla', 7.89, 45.0),
        ('test_resnet_depla', 0.04, 0.5),
    ],
)
def test_cost(name, gmacs, params):
    """Multiply-adds of convolutions and matrix products at the model's size (ruling 7), and parameters."""
    model = timm.create_model(name, device='meta').eval()
    cost = count_cost(model, model.default_cfg['input_size'])
    assert round(cost['macs'] / 1e9, 2) == gmacs
    assert round(cost['parameters'] / 1e6, 1) == params
    if name == 'resnet50':
        assert round(cost['activations'] / 1e6, 2) == 11.11  # as timm's table of results has it
    if name == 'resnet50_depla':  # fused, it has less than resnet50: it does not make the candidates
        assert round(count_macs(reparameterize_model(model), model.default_cfg['input_size']) / 1e9, 2) == 4.0


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


def test_batch_of_one_position_is_refused_as_by_batch_norm():
    depla, x = Depla(8).train(), torch.randn(1, 8, 1, 1)
    with pytest.raises(ValueError, match='Expected more than 1 value per channel when training'):
        depla(x, x)
