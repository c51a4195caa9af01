"""`host_depla` with two more hosts, one of (B, C, H, W) and one of (B, H, W, C) maps, as models for timm's tests."""

from timm.models import generate_default_cfgs, register_model

from timm_depla.models.insertion import host_depla

_CFG = dict(num_classes=1000, input_size=(3, 160, 160))
default_cfgs = generate_default_cfgs(
    {'host_depla_convnext.untrained': dict(_CFG), 'host_depla_mambaout.untrained': dict(_CFG)}
)


@register_model
def host_depla_convnext(pretrained=False, **kwargs):
    return host_depla(pretrained, host='test_convnext', **kwargs)


@register_model
def host_depla_mambaout(pretrained=False, **kwargs):
    return host_depla(pretrained, host='test_mambaout', **kwargs)
