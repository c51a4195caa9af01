"""`backbone_depla` over a network of (B, C, H, W) and one of (B, H, W, C) maps, as models for timm's tests."""

from timm.models import generate_default_cfgs, register_model

from timm_depla.models.insertion import backbone_depla

_CFG = dict(num_classes=1000, input_size=(3, 160, 160))
default_cfgs = generate_default_cfgs(
    {'backbone_depla_convnext.untrained': dict(_CFG), 'backbone_depla_mambaout.untrained': dict(_CFG)}
)


@register_model
def backbone_depla_convnext(pretrained=False, **kwargs):
    return backbone_depla(pretrained, backbone='test_convnext', **kwargs)


@register_model
def backbone_depla_mambaout(pretrained=False, **kwargs):
    return backbone_depla(pretrained, backbone='test_mambaout', **kwargs)
