"""FishNet against the published network, its features and sizes, and what DEPLA adds to it."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import create, gpu_autocast

from timm_depla.models import load_backbone
from timm_depla.models.fishnet_blocks import Blocks, JoinStage

FOLDER = Path(__file__).parent / 'fishnet'
NORM = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
TINY = ['test_fishnet', 'test_fishnet_depla']


def published_shapes():
    """Name and shape of each tensor of the published fishnet99; in the file, a norm is its number of channels."""
    for prefix, modules in json.loads((FOLDER / 'keys_fishnet99.json').read_text()).items():
        for module, shape in modules.items():
            shapes = [[shape]] * 4 + [[]] if isinstance(shape, int) else [shape[:4], shape[:1]][: len(shape) - 3]
            yield from ((f'{prefix}.{module}.{name}', s) for name, s in zip(NORM, shapes, strict=False))


def published_state_dict():
    """Weights of fishnet99 under the published names, each drawn by a generator that its name seeds."""
    state = {}
    for name, shape in published_shapes():
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


def test_computes_what_the_published_network_computes(published):
    model = timm.create_model('fishnet99', checkpoint_path=published).double().eval()
    golden = np.load(FOLDER / 'golden_fishnet99.npz')
    stages = []
    for module in (model.pool, *model.tail, model.bridge, *model.body, *model.head):
        module.register_forward_hook(lambda module, inputs, out: stages.append(out))
    x = np.random.default_rng(2021).standard_normal((2, 3, 96, 96)).astype('f4')
    with torch.no_grad():
        logits = model(torch.from_numpy(x).double())
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
    assert report.loaded == list(expected) and len(report.new) == len(filled.state_dict()) - 599
    given = timm.create_model('fishnet99')
    load_backbone(given, published_state_dict())
    for model in (pretrained, filled, given):
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    with pytest.raises(ValueError, match=r'255 missing \(tail.1.blocks.2.bn1.weight, .*\); 0 unexpected; 0 of another'):
        load_backbone(timm.create_model('fishnet150_depla'), published)


@pytest.mark.parametrize('content', [b'<!doctype html>', [torch.zeros(1)], {'epoch': 99}, {'state_dict': {}}])
def test_file_that_is_no_checkpoint(content, tmp_path):
    path = tmp_path / 'fishnet99_ckpt.tar'
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    message = 'something else than the tensors' if isinstance(content, dict) else 'cannot be read as a checkpoint'
    with pytest.raises(ValueError, match=message):
        load_backbone(timm.create_model('test_fishnet'), path)


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


@pytest.mark.parametrize('indices', [(1, 3), (0,)])
def test_some_features(indices):
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = create('test_fishnet_depla').forward_intermediates(x, intermediates_only=True)
        backbone = create('test_fishnet_depla', features_only=True, out_indices=indices)
        assert backbone.feature_info.reduction() == [[2, 4, 8, 16, 32][i] for i in indices]
        torch.testing.assert_close(backbone(x), [expected[i] for i in indices])


@pytest.mark.parametrize('name', TINY)
@pytest.mark.parametrize('size', [(29, 29), (31, 64), (50, 101), (127, 33)])
def test_sizes_that_are_no_multiple_of_32(name, size):
    model = create(name).train()
    out, levels = model.forward_intermediates(torch.randn(2, 3, *size))
    out.mean().backward()
    assert tuple(out.shape[2:]) == tuple(max(-(-side // 4) // 8, 1) for side in size)
    assert tuple(levels[1].shape[2:]) == tuple(-(-side // 4) for side in size)


def test_layer_groups_follow_the_fish():
    model = timm.model_entrypoint('fishnet99_depla')(depla=None, norm_layer='batchnorm2d', device='meta')
    for coarse, count in ((True, 12), (False, 23)):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        names = ['stem.0', 'tail.0', 'tail.2', 'bridge', 'body.0', 'body.2.depla', 'head.0', 'head.2.transfer', 'fc']
        first = [min(group for name, group in groups.items() if name.startswith(f'{part}.')) for part in names]
        assert first == sorted(first)
        assert len(set(groups.values())) == count


@pytest.mark.parametrize('name', TINY)
def test_bad_size(name):
    with pytest.raises(ValueError, match=r'at least 29 x 29 pixels, .* got 28 x 64; resize or pad'):
        create(name)(torch.randn(1, 3, 28, 64))
