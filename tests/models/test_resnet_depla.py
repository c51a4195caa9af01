"""DEPLA in a residual block: its places, its initialisation, and the fused form."""

import copy

import pytest
import timm
import torch
from helpers import create, gpu_autocast
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from timm_depla.layers import Depla, set_fused_depla
from timm_depla.models.candidate import fuse_in_training
from timm_depla.models.placement import default_positions


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


LEFT_OUT = [('cpu', 1, 64, 0), ('cpu', 8, 64, 2), ('cpu', 8, 256, 1), ('cuda', 8, 64, 0), ('cuda', 96, 64, 1)]


@pytest.mark.parametrize('device,batch,base_width,count', LEFT_OUT)
def test_fused_form_of_large_maps(device, batch, base_width, count):
    """On a CPU, the norms of a narrow candidate and of the output are left out; on a GPU the candidate's."""
    with FakeTensorMode():
        block = timm.create_model('resnet50_depla', base_width=base_width, device=device).layer3[1]
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


@pytest.mark.parametrize(
    'num_blocks,positions',
    [(2, (1,)), (3, (1, 2)), (4, (1, 2, 3)), (5, (1, 2, 4)), (6, (1, 3, 5)), (23, (7, 14, 22)), (36, (11, 23, 35))],
)
def test_default_positions(num_blocks, positions):
    assert default_positions(num_blocks) == positions


@pytest.mark.parametrize('zero_init_last', [True, False])
def test_initialisation_survives_timm(zero_init_last):
    """Ruling 6: Y's last norm is not zero in a DEPLA block; rulings 6 and 11: DEPLA keeps its own scale."""
    model = create('resnet50_depla', zero_init_last=zero_init_last)
    fresh = Depla(1024)
    for i, block in enumerate(model.layer3):
        has_depla = i in (1, 3, 5)
        assert block.bn3.weight.eq(0 if zero_init_last and not has_depla else 1).all()
        if not has_depla:
            continue
        assert torch.equal(block.depla.norm.weight, fresh.norm.weight) and 0 < fresh.norm.weight[0] < 1
        for name, parameter in block.depla.named_parameters():
            if parameter.ndim > 1:
                assert abs(parameter.std() * parameter.shape[1] ** 0.5 - 1) < 4 / (2 * parameter.numel()) ** 0.5, name
