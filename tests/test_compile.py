"""Blocks compiled alone give what they give eagerly, without breaks, in few graphs; both training scripts take them."""

import copy

import pytest
import torch
from helpers import create, fit, validate
from torch._dynamo.utils import counters

from timm_depla import compile_blocks
from timm_depla.detection import create_detector
from timm_depla.engine.config import parse_args
from timm_depla.engine.detection.flags import create_detection_parser
from timm_depla.engine.detection.train import build
from timm_depla.engine.distributed import setup_world
from timm_depla.errors import ConfigError
from timm_depla.layers import Depla


@pytest.fixture(autouse=True)
def no_graphs():
    forget()


def forget():
    torch._dynamo.reset()
    counters.clear()


def step(network, x):
    """The output of a training step, the gradients, and the buffers after it."""
    out = network.train()(x)
    network.zero_grad()
    out.sin().mean().backward()
    return [out.detach(), *(p.grad for p in network.parameters()), *network.buffers()]


@pytest.mark.parametrize(
    'name,shapes,backend',
    [
        ('test_resnet_depla', 1, 'aot_eager'),
        ('resnet50_depla', 1, 'aot_eager'),
        ('test_regnet_depla', 1, 'eager'),
        ('test_fishnet_depla', 6, 'eager'),
    ],
)
def test_as_eager(name, shapes, backend):
    network = create(name).double()
    compiled = compile_blocks(copy.deepcopy(network), backend=backend)
    assert compiled.state_dict().keys() == network.state_dict().keys()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for actual, expected in zip(step(compiled, x), step(network, x), strict=True):
        torch.testing.assert_close(actual, expected)
    assert counters['stats']['unique_graphs'] <= shapes and not counters['graph_break']
    with torch.inference_mode():
        torch.testing.assert_close(compiled.eval()(x), network.eval()(x))
    copied = copy.deepcopy(compiled)  # as an average of the weights does
    assert not any(module._compiled_call_impl for module in copied.modules())


@pytest.mark.parametrize('dynamic,graphs', [(None, 4), (True, 2)])
def test_image_sizes_of_a_detector(dynamic, graphs):
    """Two shapes of blocks, in backbone and neck: at most two graphs of each for all sizes; with `dynamic`, one."""
    kwargs = dict(min_size=64, max_size=256, out_channels=32, pretrained_backbone=False)
    backbone = create_detector('maskrcnn_test_resnet_depla_fpn_depla', **kwargs).backbone.train()
    compile_blocks(backbone, backend='eager', dynamic=dynamic)
    sizes = [(64, 96), (96, 64), (128, 128), (64, 160), (96, 96), (224, 192)]
    for i, size in enumerate(sizes):
        with torch._dynamo.config.patch(error_on_recompile=i > (0 if dynamic else 1)):
            sum(level.square().mean() for level in backbone(torch.randn(5, 3, *size)).values()).backward()
    assert counters['stats']['unique_graphs'] == graphs and not counters['graph_break']


def test_in_the_scripts(tmp_path):
    """Training, its average and validation compile the blocks; what has none, or is compiled whole, is refused."""
    flags = ['--recipe', 'digits', '--epochs', 1, '--img-size', 32, '--workers', 0, '--device', 'cpu', '--model-ema']
    flags += ['--output', tmp_path, '--torchcompile-blocks', 'eager']
    fit(*flags, '--experiment', 'run')
    assert counters['stats']['unique_graphs'] == 3  # of training, of inference, and of its last, smaller batch
    forget()
    validate(tmp_path / 'run', '--torchcompile-blocks', 'eager', '--device', 'cpu')
    assert counters['stats']['unique_graphs'] > 0
    with pytest.raises(ConfigError, match='ResNet has no block with DEPLA'):
        fit(*flags, '--model', 'test_resnet')
    with pytest.raises(ConfigError, match='leave out --torchcompile-blocks'):
        fit(*flags, '--torchcompile')


def test_in_detection(tmp_path):
    argv = ['--recipe', 'scenes', '--device', 'cpu', '--output', str(tmp_path), '--torchcompile-blocks', 'eager']
    model = build(parse_args(create_detection_parser(), argv), setup_world('cpu')).model
    compiled = [module for module in model.modules() if module._compiled_call_impl]
    assert len(compiled) == sum(isinstance(module, Depla) for module in model.modules()) > 1
