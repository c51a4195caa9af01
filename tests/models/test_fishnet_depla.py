"""FishNet, with and without DEPLA, against the published network and timm's requirements of a model."""

import copy
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import create, gpu_autocast
from timm.layers import create_feature_extractor
from torch.utils.flop_counter import FlopCounterMode

from timm_depla.layers import Depla
from timm_depla.models import load_backbone
from timm_depla.models.fishnet_blocks import Blocks, JoinStage

FOLDER = Path(__file__).parent / 'fishnet'
MODELS = timm.list_models(module='fishnet_depla')
TINY = ['test_fishnet', 'test_fishnet_depla']
SIZE = 64


def published_state_dict():
    """Weights of fishnet99 under the published names, each drawn by a generator that its name seeds."""
    state = {}
    for name, shape in json.loads((FOLDER / 'keys_fishnet99.json').read_text()).items():
        draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        if name.endswith('num_batches_tracked'):
            draw = np.zeros((), dtype=np.int64)
        elif len(shape) == 4:
            draw = draw * np.sqrt(2.0 / np.prod(shape[1:]))
        elif name.endswith('running_var'):
            draw = np.exp(0.2 * draw)
        else:
            draw = 0.1 * draw + (1.0 if name.endswith('weight') else 0.0)
        state[name] = torch.from_numpy(np.asarray(draw, dtype=np.float32 if draw.shape else draw.dtype))
    return state


@pytest.fixture(scope='module', params=['module.', ''])
def published(request, tmp_path_factory):
    """A file in the format of the published checkpoints, with and without the prefix of nn.DataParallel."""
    state = {request.param + name: tensor for name, tensor in published_state_dict().items()}
    path = tmp_path_factory.mktemp('published') / 'fishnet99_ckpt.tar'
    torch.save(dict(epoch=99, arch='fishnet99', state_dict=state, best_prec1=torch.tensor(77.4), optimizer={}), path)
    return path


def test_registry():
    depths = [f'fishnet{depth}{suffix}' for depth in (99, 150, 201) for suffix in ('', '_depla')]
    assert sorted(MODELS) == sorted([*depths, *TINY])
    assert timm.list_models(module='fishnet_depla', name_matches_cfg=True) == MODELS
    assert timm.list_models('*fishnet*', pretrained=True) == []


def test_computes_what_the_published_network_computes(published):
    model = timm.create_model('fishnet99', checkpoint_path=published).double().eval()
    golden = np.load(FOLDER / 'golden_fishnet99.npz')
    stages = []
    for module in (model.pool, *model.tail, model.bridge, *model.body, *model.head):
        module.register_forward_hook(lambda module, inputs, out: stages.append(out))
    with torch.no_grad():
        logits = model(
            torch.from_numpy(np.random.default_rng(2021).standard_normal((2, 3, 96, 96)).astype('f4')).double()
        )
    assert np.abs(logits.numpy() - golden['logits']).max() < 1e-9 * np.abs(golden['logits']).max()
    assert len(stages) == 11
    for i, stage in enumerate(stages):
        statistics = [stage.mean().item(), stage.std().item(), *stage.shape[1:]]
        np.testing.assert_allclose(statistics, golden[f'stage_{i}'], rtol=1e-9, err_msg=f'stage {i}')


def test_every_way_to_load_a_published_checkpoint(published):
    expected = timm.create_model('fishnet99', checkpoint_path=published).state_dict()
    assert len(expected) == 599
    pretrained = timm.create_model('fishnet99', pretrained=True, pretrained_cfg_overlay=dict(file=str(published)))
    filled = timm.create_model('fishnet99_depla')
    report = load_backbone(filled, published)
    assert report.loaded == list(expected)
    assert set(report.new) == {name for name in filled.state_dict() if '.depla.' in name}
    assert str(report) == f'599 tensors loaded, {len(report.new)} of DEPLA new'
    given = timm.create_model('fishnet99')
    load_backbone(given, published_state_dict())
    for model in (pretrained, filled, given):
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    digits = timm.create_model('fishnet99', num_classes=10)
    assert load_backbone(digits, published).skipped == ['fc.weight', 'fc.bias']


@pytest.mark.parametrize(
    'name,message',
    [
        ('fishnet150_depla', r'255 missing \(tail.1.blocks.2.bn1.weight, .*\); 0 unexpected; 0 of another shape'),
        (
            'test_fishnet',
            r'0 missing; 195 unexpected \(.*\); .* of another shape \(stem.0.0.weight \(32, 3, 3, 3\) for',
        ),
        ('resnet18_depla', r'\d+ missing \(.*\); 500 unexpected \(conv1.0.weight'),
    ],
)
def test_published_checkpoint_of_another_network(published, name, message):
    with pytest.raises(ValueError, match=message):
        load_backbone(timm.create_model(name), published)


@pytest.mark.parametrize(
    'content,message',
    [
        (b'<!doctype html>', 'cannot be read as a checkpoint'),
        ([torch.zeros(1)], 'cannot be read as a checkpoint'),
        ({'epoch': 99}, 'holds something else than the tensors of a model'),
        ({'state_dict': {}}, 'holds something else than the tensors of a model'),
    ],
)
def test_file_that_is_no_checkpoint(content, message, tmp_path):
    path = tmp_path / 'fishnet99_ckpt.tar'
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        load_backbone(timm.create_model('test_fishnet'), path)


@pytest.mark.parametrize(
    'name,parameters,gmacs',
    [
        ('fishnet99', 16_628_904, 4.264),
        ('fishnet150', 24_959_400, 6.398),
        ('fishnet201', 44_584_552, 10.514),
        ('fishnet99_depla', 17_101_896, 4.392),
        ('fishnet150_depla', 25_432_392, 6.526),
        ('fishnet201_depla', 45_057_544, 10.643),
        ('test_fishnet_depla', 635_440, 0.041),
    ],
)
def test_cost(name, parameters, gmacs):
    model = timm.create_model(name, device='meta').eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.randn(1, *model.default_cfg['input_size'], device='meta'))
    assert round(counter.get_total_flops() / 2e9, 3) == gmacs
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_without_its_refinement_depla_is_the_original(memory_format):
    original, model = create('test_fishnet'), create('test_fishnet_depla')
    load_backbone(model, original.state_dict())
    x = torch.randn(2, 3, 97, 70).contiguous(memory_format=memory_format)
    blocks = [m for m in model.modules() if isinstance(m, Depla)]
    assert len(blocks) == 6
    with torch.no_grad():
        assert not torch.allclose(model(x), original(x))
        for block in blocks:
            block.norm.weight.zero_()
        torch.testing.assert_close(model(x), original(x))


@pytest.mark.parametrize('name', [*TINY, 'fishnet99_depla'])
def test_backward_gives_every_parameter_a_gradient(name):
    model = create(name, num_classes=7, drop_path_rate=0.1).train()
    out = model(torch.randn(2, 3, SIZE, SIZE))
    assert out.shape == (2, 7)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for name, module in model.named_modules():
        if isinstance(module, Depla):
            assert all(p.grad.abs().max() > 0 for p in module.parameters()), name


def test_maps_keep_their_type_under_the_autocast_of_a_gpu():
    """No map becomes one of float32, which would take twice the memory."""
    model, types = timm.create_model('test_fishnet_depla', device='meta').train(), {}
    for name, module in model.named_modules():
        if isinstance(module, (Blocks, JoinStage)):
            module.register_forward_hook(lambda _, inputs, out, name=name: types.update({name: out.dtype}))
    state = model.state_dict()
    with gpu_autocast(torch.bfloat16):
        state = {k: torch.empty(v.shape, dtype=v.dtype, device='cuda') for k, v in state.items()}
        torch.func.functional_call(model, state, torch.empty(2, 3, 96, 96, device='cuda'))
    assert len(types) > 12 and set(types.values()) == {torch.bfloat16}, types


@pytest.mark.parametrize('name', MODELS)
def test_features(name):
    x = torch.randn(1, 3, SIZE, 96, device='meta')
    backbone = timm.create_model(name, features_only=True, device='meta')
    features = backbone(x)
    assert backbone.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert [f.shape[1] for f in features] == backbone.feature_info.channels()
    assert [tuple(f.shape[2:]) for f in features] == [(SIZE // r, 96 // r) for r in (2, 4, 8, 16, 32)]


def test_features_are_those_of_the_classifier():
    x = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = create('test_fishnet_depla').forward_intermediates(x, intermediates_only=True)
        for indices in ((0, 1, 2, 3, 4), (1, 3), (0,)):
            backbone = create('test_fishnet_depla', features_only=True, out_indices=indices)
            torch.testing.assert_close(backbone(x), [expected[i] for i in indices])
        traced = create('test_fishnet_depla', features_only=True, feature_cls='fx')(x)
    for feature, wanted in zip(traced, expected, strict=True):
        assert (feature - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize('name', TINY)
@pytest.mark.parametrize('size', [(29, 29), (31, 64), (50, 101), (127, 33)])
def test_sizes_that_are_no_multiple_of_32(name, size):
    model = create(name).train()
    out, levels = model.forward_intermediates(torch.randn(2, 3, *size))
    out.mean().backward()
    assert tuple(out.shape[2:]) == tuple(max(-(-side // 4) // 8, 1) for side in size)
    assert tuple(levels[1].shape[2:]) == tuple(-(-side // 4) for side in size)


@pytest.mark.parametrize('name', TINY)
def test_script_fx_and_compile(name):
    model, x = create(name).double(), torch.randn(2, 3, SIZE, 96).double()
    with torch.no_grad():
        expected = model(x)
        for actual in (
            create_feature_extractor(model, ['fc'])(x)['fc'],
            torch.jit.script(model)(x),
            torch.compile(model, fullgraph=True, backend='aot_eager')(x),
        ):
            assert (actual - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize('name', TINY)
def test_export_with_dynamic_batch_and_size(name):
    if 'depla' in name and torch.__version__ < (2, 15):
        pytest.skip('before 2.15, torch takes many minutes to simplify the sizes of FishNet-DEPLA')
    model, x = create(name).double(), torch.randn(2, 3, SIZE, 96).double()
    shape = {0: torch.export.Dim('batch'), 2: 32 * torch.export.Dim('h', min=1), 3: 32 * torch.export.Dim('w', min=1)}
    program = torch.export.export(model, (x,), dynamic_shapes=(shape,)).module()
    other = torch.randn(3, 3, 96, 128).double()
    with torch.no_grad():
        expected = model(other)
        assert (program(other) - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize('name', TINY)
def test_timm_interface(name):
    x = torch.randn(2, 3, SIZE, SIZE)
    model = create(name, drop_rate=0.1, drop_path_rate=0.2, in_chans=1)
    with torch.no_grad():
        assert model(x[:, :1]).shape == (2, 1000)
        model.reset_classifier(5, 'max')
        assert model(x[:, :1]).shape == (2, 5)
        assert model.get_classifier().out_features == 5
        model.prune_intermediate_layers([3])
        assert model(x[:, :1]).shape[1] == model.num_features == model.feature_info[3]['num_chs']
        assert create(name, num_classes=0)(x).shape == (2, 198)
        assert create(name, num_classes=0, global_pool='')(x).shape == (2, 198, 2, 2)
    meta = timm.create_model(name, device='meta', dtype=torch.bfloat16)
    assert {(t.device.type, t.dtype) for t in meta.parameters()} == {('meta', torch.bfloat16)}


def test_layer_groups_follow_the_fish():
    model = create('fishnet99_depla', device='meta')
    for coarse, count in ((True, 12), (False, 23)):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        names = ['stem.0', 'tail.0', 'tail.2', 'bridge', 'body.0', 'body.2.depla', 'head.0', 'head.2.transfer', 'fc']
        first = [min(group for name, group in groups.items() if name.startswith(f'{part}.')) for part in names]
        assert first == sorted(first)
        assert len(set(groups.values())) == count


def test_grad_checkpointing_gives_the_same_gradients():
    model, x = create('test_fishnet_depla').train(), torch.randn(2, 3, SIZE, SIZE)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    saved = []
    for m in (model, other):
        count = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, count=count: count.append(t.numel()) or t, lambda t: t):
            m(x).square().mean().backward()
        saved.append(sum(count))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert saved[1] < 0.7 * saved[0]


@pytest.mark.parametrize(
    'kwargs,error,message',
    [
        (dict(depla=dict(temprature=0.5)), TypeError, r"unknown depla argument \['temprature'\]; .*'temperature'"),
        (dict(depla=dict(stage=3)), TypeError, r"unknown depla argument \['stage'\]"),
        (dict(depla=dict(bfn='fancy')), ValueError, "bfn must be one of plain, adaptive, got 'fancy'"),
        (dict(depla=dict(temperature=0)), ValueError, 'temperature must be from 0.001 to 1000, got 0'),
        (dict(output_stride=16), ValueError, 'output_stride must be 32, got 16: .*out_indices 0 to 4'),
        (dict(width=18), ValueError, 'width must be a positive multiple of 4, got 18'),
    ],
)
def test_bad_argument(kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model('fishnet150_depla', device='meta', **kwargs)


@pytest.mark.parametrize('name', TINY)
def test_bad_size(name):
    with pytest.raises(ValueError, match=r'at least 29 x 29 pixels, .* got 28 x 64; resize or pad'):
        create(name)(torch.randn(1, 3, 28, 64))


def test_depla_arguments():
    model = timm.create_model('fishnet99', depla=dict(temperature=0.5, bfn='adaptive', num_groups=8), device='meta')
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, Depla)}
    assert list(blocks) == [f'{part}.{i}.depla' for part in ('body', 'head') for i in range(3)]
    assert all(b.rpn.temperature == 0.5 and b.rpn.num_groups == 8 and hasattr(b.bfn, 'query') for b in blocks.values())
