"""The block against a slow, literal transcription of the paper's equations, and what follows from them."""

import copy
import inspect
import math
import re

import pytest
import torch
import torch.nn as nn
from helpers import ROOT, run
from timm.layers import DropPath
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transcription import literal, randomized

from timm_depla.layers import Depla, set_fused_depla
from timm_depla.layers.depla import BFNS
from timm_depla.models.candidate import Moments

ARGS = dict(num_groups=3, pooled_chs=4, maps_per_group=2)
SIZES = [((3, 4), (3, 4)), ((5, 6), (2, 3)), ((2, 3), (4, 6)), ((2, 6), (4, 3))]


@pytest.mark.parametrize(
    'form,batch,temperature,sizes',
    [
        *(('evaluation', 2, temperature, sizes) for temperature in (0.2, 0.5, 1.0, 2.0) for sizes in SIZES),
        *((form, batch, 0.5, SIZES[0]) for form in ('training', 'fused training') for batch in (1, 3)),
    ],
)
@pytest.mark.parametrize('keep_candidate', [False, True])
@pytest.mark.parametrize('bfn', BFNS)
def test_matches_literal_transcription(bfn, keep_candidate, form, batch, temperature, sizes):
    kwargs = dict(ARGS, temperature=temperature, bfn=bfn, keep_candidate=keep_candidate)
    candidate_chs, training = 6 if keep_candidate else 5, form != 'evaluation'
    block = randomized(Depla(6, candidate_chs, **kwargs)).train(training)
    x, y = torch.randn(batch, 6, *sizes[0]).double(), torch.randn(batch, candidate_chs, *sizes[1]).double()
    expected = literal(block, x.tolist(), y.tolist(), **kwargs, training=training)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        with set_fused_depla(form != 'training', always=True):
            actual = block(x.contiguous(memory_format=memory_format), y.contiguous(memory_format=memory_format))
        assert (actual - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize('size', [(4, 6), (6, 3), (5, 7)])  # repeated in both directions, in one, and unevenly
@pytest.mark.parametrize('keep_candidate', [False, True])
@pytest.mark.parametrize('bfn', BFNS)
def test_nearest_up_sampling_of_the_identity_is_up_sampling_first(bfn, keep_candidate, size):
    candidate_chs = 6 if keep_candidate else 5
    block = randomized(Depla(6, candidate_chs, **ARGS, bfn=bfn, keep_candidate=keep_candidate, upsample='nearest'))
    x, y = torch.randn(2, 6, 2, 3).double(), torch.randn(2, candidate_chs, *size).double()
    with torch.no_grad():
        expected = block(nn.functional.interpolate(x, size), y)
        for form in (block, torch.jit.script(block)):
            torch.testing.assert_close(form(x, y), expected)


@pytest.mark.parametrize('sizes', [((2, 3), (2, 3)), ((4, 3), (2, 2)), ((2, 2), (3, 4))])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('training,is_fused', [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize('bfn', BFNS)
def test_gradcheck(bfn, training, is_fused, memory_format, sizes):
    block = randomized(Depla(4, 3, num_groups=2, pooled_chs=3, maps_per_group=2, bfn=bfn, temperature=0.5))
    x, y = torch.randn(1, 4, *sizes[0]).double(), torch.randn(1, 3, *sizes[1]).double()
    x, y = (t.contiguous(memory_format=memory_format).requires_grad_() for t in (x, y))

    def call(x, y, *values):
        named = dict(zip((n for n, _ in block.named_parameters()), values, strict=True))
        with set_fused_depla(is_fused, always=True):
            return torch.func.functional_call(block.train(training), named, (x, y))

    assert torch.autograd.gradcheck(call, (x, y, *block.parameters()))


@pytest.mark.parametrize('bfn', BFNS)
def test_equivariant_to_positions_batch_and_resolution(bfn):
    """Repeating every pixel repeats every output pixel (ruling 4)."""
    block = randomized(Depla(6, **ARGS, bfn=bfn))
    x, y = torch.randn(2, 3, 6, 4, 5).double()
    expected = block(x, y)
    positions, images = torch.randperm(20), torch.randperm(3)

    def shuffle(t):
        return t.flatten(2)[:, :, positions].reshape_as(t)

    torch.testing.assert_close(block(shuffle(x), shuffle(y)), shuffle(expected))
    torch.testing.assert_close(block(x.flip(3), y.flip(3)), expected.flip(3))
    torch.testing.assert_close(block(x[images], y[images]), expected[images])
    larger = nn.Upsample(scale_factor=3)
    torch.testing.assert_close(block(larger(x), larger(y)), larger(expected))


@pytest.mark.parametrize('dtype,bound', [(torch.float16, 5e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('temperature', [0.5, 1.0])
@pytest.mark.parametrize('bfn', BFNS)
def test_autocast_at_detection_size(bfn, temperature, dtype, bound):
    block = Depla(64, bfn=bfn, temperature=temperature)
    x, y = torch.randn(2, 1, 64, 256, 256)
    with torch.no_grad():
        for module in block.modules():
            module.momentum = 1.0  # statistics of one batch
        block(x, y)
        block.eval()
        expected = copy.deepcopy(block).double()(x.double(), y.double())
        with torch.autocast('cpu', dtype=dtype):
            actual = block(x, y)
            half = block(x.to(dtype), y.to(dtype))
    assert (actual.dtype, half.dtype) == (torch.float32, dtype)
    assert (actual - expected).abs().max() < bound * expected.abs().max()


@pytest.mark.parametrize('bfn', BFNS)
def test_autocast_survives_one_hot_maps(bfn):
    """One pixel outshines 65,535 others: B * N is 65,536 there, more than float16 can hold."""
    block = Depla(64, bfn=bfn).train()
    x, y = torch.randn(2, 2, 64, 256, 256)
    x[:, :, 7, 9] *= 100
    x.requires_grad_()
    with torch.autocast('cpu', dtype=torch.float16):
        out = block(x, y)
    out.float().mean().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest result of any operation."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize('bfn', BFNS)
def test_memory_is_linear_in_positions(bfn):
    block, x = Depla(64, bfn=bfn), torch.randn(1, 64, 24, 32, requires_grad=True)
    with LargestTensor() as largest:
        block(x, x).sum().backward()
    assert largest.numel == 64 * 24 * 32  # C1 = L * D = C * D channels; L * C * D * N would be 16 times as many


@pytest.mark.parametrize('bfn', BFNS)
def test_compile_under_autocast(bfn):
    block = Depla(8, 6, **ARGS, bfn=bfn).eval()
    x, y = torch.randn(2, 8, 6, 8), torch.randn(2, 6, 3, 4)
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        compiled = torch.compile(block, fullgraph=True, backend='aot_eager')
        torch.testing.assert_close(compiled(x, y), block(x, y))


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('size', [(6, 8), (3, 4), (6, 4), (4, 5)])
@pytest.mark.parametrize('kwargs', [dict(), dict(keep_candidate=True), dict(upsample='nearest')])
@pytest.mark.parametrize('bfn', BFNS)
def test_fused_form_is_the_block(bfn, kwargs, size, memory_format):
    """Outputs, gradients and statistics in training; in evaluation there is one form."""
    fused = Depla(8, **ARGS, bfn=bfn, temperature=0.2, init_scale=1.0, **kwargs).double()
    plain = copy.deepcopy(fused)
    x, y = torch.randn(2, 3, 8, 6, 8).double()
    x, y = (t.contiguous(memory_format=memory_format) for t in (x[..., : size[0], : size[1]], y))
    for training in (True, True, False):
        results = []
        for block, is_fused in ((fused, True), (plain, False)):
            block.train(training).zero_grad()
            inputs = [x.clone().requires_grad_(), y.clone().requires_grad_()]
            with set_fused_depla(is_fused, always=True):
                out = block(*inputs)
            assert out.is_contiguous(memory_format=memory_format)
            (out.sin() * torch.arange(8).view(-1, 1, 1)).sum().backward()
            buffers = dict(block.named_buffers())
            kept = [buffers[name] for name in buffers if size == (6, 8) or 'running_var' not in name]  # n / (n - 1)
            results.append([out, *(t.grad for t in (*inputs, *block.parameters())), *kept])
        if training or size == (6, 8):
            torch.testing.assert_close(*results)


def test_fused_norm_of_inference_keeps_the_type():
    """The sum has the type of the identity, half precision under autocast."""
    block = Depla(8, **ARGS)
    x, y = torch.randn(2, 3, 8, 6, 7)
    block(x, y)  # statistics of its own
    expected = block.eval()(x, y)
    block.reparameterize()
    with torch.autocast('cpu', torch.bfloat16):
        half = block(x.bfloat16(), y.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize('norm_dtype', [torch.bfloat16, torch.float32])
def test_half_precision_weights(norm_dtype):
    block = Depla(8).train()
    x, y = torch.randn(2, 3, 8, 6, 7)
    expected = block(x, y)
    block.to(torch.bfloat16).norm.to(norm_dtype)
    out = block(x.bfloat16(), y.bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() < 0.03 * expected.abs().max()
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())


def test_one_position_in_training():
    block, x = Depla(8).train(), torch.randn(2, 8, 1, 1)
    assert block(x, x).isfinite().all()
    with pytest.raises(ValueError, match='more than 1 value per channel when training'):
        block(x[:1], x[:1])


def test_moments_have_their_gradients():
    rows = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Moments.apply, rows) and torch.autograd.gradgradcheck(Moments.apply, rows)


@pytest.mark.parametrize('dtype,bound', [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_moments_of_half_precision(dtype, bound):
    """They are summed in single precision; a gradient of numbers that float16 would round to zero is not lost."""
    rows = torch.randn(4096, 8).to(dtype)
    found = []
    for each in (rows.clone().requires_grad_(), rows.double().requires_grad_()):
        mean, moments = Moments.apply(each)
        (mean.sum() + (moments * torch.arange(8.0)).sum()).backward()
        found.append((mean, moments, each.grad))
    for actual, expected in zip(*found, strict=True):
        assert (actual - expected).abs().max() < bound * expected.abs().max()
    assert found[0][0].dtype == torch.float32 and found[0][2].dtype == dtype
    assert (found[0][0] - found[1][0]).abs().max() < 1e-6


def test_drop_path_drops_the_refinement():
    x, y = torch.randn(2, 2, 8, 6, 7)
    block = Depla(8, drop_path=DropPath(1.0))
    assert torch.equal(block.train()(x, y), x)
    assert not torch.allclose(block.eval()(x, y), x)


@pytest.mark.parametrize(
    'kwargs,message',
    [
        *((dict(temperature=t), f'must be from 0.001 to 1000, got {t!r}') for t in (0.0, '0.5', math.nan, math.inf)),
        (dict(bfn=['plain']), r"bfn must be one of \['plain', 'adaptive'\], got \['plain'\]"),
        (dict(num_groups='16'), "num_groups must be a whole number from 1 on, got '16'"),
        (dict(pooled_chs=1.5), 'pooled_chs must be a whole number from 1 on, got 1.5'),
        (dict(num_groups=True), 'num_groups must be a whole number from 1 on, got True'),
        (dict(maps_per_group=0), 'maps_per_group must be a whole number from 1 on, got 0'),
        (dict(candidate_chs=6, keep_candidate=True), 'keep_candidate adds maps of one width, got 8 and 6 channels'),
        (dict(upsample='cubic'), r"upsample must be one of \['bilinear', 'nearest'\], got 'cubic'"),
    ],
)
def test_bad_argument(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Depla(8, **kwargs)


def test_bad_channels():
    block = Depla(8, 6)
    for identity_chs, candidate_chs in [(6, 6), (8, 8)]:
        with pytest.raises(ValueError, match=f'for 8 identity and 6 candidate .* {identity_chs} and {candidate_chs};'):
            block(torch.randn(1, identity_chs, 4, 4), torch.randn(1, candidate_chs, 4, 4))


def test_documentation_shows_the_code_of_forward():
    text = (ROOT / 'docs' / 'models.md').read_text(encoding='utf-8')
    shown = re.findall(r'^\| `(.+?)` \| ', text.partition('| code | paper |')[2].partition('\n\n')[0], re.MULTILINE)
    code = inspect.getsource(Depla.forward).rpartition('"""')[2].strip().splitlines()
    assert shown == [line.partition('  #')[0].strip() for line in code]


@pytest.mark.parametrize('value,expected', [('', 'True'), ('0', 'False')])
def test_environment_variable_is_the_switch(value, expected):
    code = 'from timm_depla.layers.fused import use_fused_depla; print(use_fused_depla())'
    assert run('-c', code, TIMM_DEPLA_FUSED=value).stdout.strip() == expected


def test_vmap():
    """Over images, and for the gradient of each image; BatchNorm in training is not of PyTorch's vmap."""
    model = Depla(8, num_groups=2).eval()
    x, y = torch.randn(2, 3, 2, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.func.vmap(model)(x, y)[1], model(x[1], y[1]))
    parameters = dict(model.named_parameters())

    def loss(parameters, x, y):
        return torch.func.functional_call(model, parameters, (x[None], y[None])).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x[:, 0], y[:, 0])
    loss(parameters, x[1, 0], y[1, 0]).backward()
    torch.testing.assert_close(grads['proj.weight'][1], model.proj.weight.grad)
