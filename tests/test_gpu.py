"""The block and its networks on a GPU: the results of a CPU, exact repetition, compilers and graphs."""

import copy

import pytest
import torch
from helpers import create, step

from timm_depla.layers import Depla, set_fused_depla
from timm_depla.layers.depla import BFNS
from timm_depla.models.candidate import LARGE_ON_GPU

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')

NETWORKS = ['test_resnet_depla', 'test_fishnet_depla']


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('bfn', BFNS)
def test_block_as_on_a_cpu(bfn, memory_format):
    block = Depla(64, bfn=bfn, temperature=0.5).double()
    on_gpu = copy.deepcopy(block).cuda()
    x, y = torch.randn(2, 2, 64, 9, 7, dtype=torch.float64)
    inputs = [t.contiguous(memory_format=memory_format) for t in (x, y)]
    actual = step(on_gpu, *(t.cuda() for t in inputs))
    assert actual[0].is_contiguous(memory_format=memory_format)
    torch.testing.assert_close([tensor.cpu() for tensor in actual], step(block, *inputs))


@pytest.mark.parametrize('dtype,bound', [(torch.float16, 5e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('size', [16, 256])
@pytest.mark.parametrize('bfn', BFNS)
def test_autocast(bfn, size, dtype, bound):
    block = Depla(64, bfn=bfn, temperature=0.5).cuda()
    x, y = torch.randn(2, 4, 64, size, size, device='cuda')
    expected = copy.deepcopy(block).double().train()(x.double(), y.double())
    with torch.autocast('cuda', dtype):
        actual = step(block, x, y, scale=2**16)  # as for float16
    assert (actual[0] - expected).abs().max() < bound * expected.abs().max()
    assert all(gradient.isfinite().all() for gradient in actual)


def test_fused_training():
    """Of large maps, training does not make the candidate: the step is that of the modules one by one."""
    block = create('resnet50_depla').layer3[1].double().cuda()
    x = torch.randn(88, 1024, 14, 14, device='cuda', dtype=torch.float64)
    assert x.numel() >= LARGE_ON_GPU
    fused = step(copy.deepcopy(block), x)
    with set_fused_depla(False):
        plain = step(block, x)
    torch.testing.assert_close(fused, plain)


@pytest.mark.parametrize('name', NETWORKS)
def test_a_step_repeats_exactly(name, monkeypatch):
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    x = torch.randn(4, 3, 96, 96, device='cuda')
    torch.use_deterministic_algorithms(True)  # an operation without an exact form raises
    try:
        first, second = (step(create(name).cuda(), x) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize('name', NETWORKS)
def test_compiled_step(name):
    network = create(name).double().cuda()
    x = torch.randn(4, 3, 96, 96, device='cuda', dtype=torch.float64)
    expected = step(copy.deepcopy(network), x)
    torch.testing.assert_close(step(torch.compile(network), x), expected)


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('name', NETWORKS)
def test_step_under_autocast(name, compiled):
    network, x = create(name).cuda(), torch.randn(4, 3, 96, 96, device='cuda')
    expected = step(copy.deepcopy(network).double(), x.double())[0]
    with torch.autocast('cuda', torch.bfloat16):
        out = (torch.compile(network) if compiled else network).train()(x)
    assert (out - expected).abs().max() < 0.1 * expected.abs().max()
    out.float().sin().mean().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize('name', NETWORKS)
def test_graph_of_inference(name):
    """A CUDA graph of the network gives for other images what the network gives."""
    network, images = create(name).cuda(), torch.randn(2, 1, 3, 96, 96, device='cuda')
    x = images[0].clone()
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            network(x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = network(x)
        for image in images:
            x.copy_(image)
            graph.replay()
            torch.testing.assert_close(out, network(image))
