"""DEPLA in RegNets: its places, and what is left of timm's network."""

import pytest
import timm
from helpers import create

from timm_depla.layers import Depla


@pytest.mark.parametrize('name', timm.list_models(module='regnet_depla'))
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


def test_initialisation():
    """Ruling 6: Y's last norm is zero in the blocks without DEPLA only."""
    for name, block in create('regnety_008_depla').s3.named_children():
        assert block.conv3.bn.weight.eq(1 if hasattr(block, 'depla') else 0).all(), name
