"""Entrypoints of torch.hub: `torch.hub.load(REPOSITORY, 'resnet50_depla', num_classes=10)`, one for each model."""

import timm

import timm_depla

dependencies = ['torch', 'timm']

for _name in timm_depla.list_models():
    globals()[_name] = timm.model_entrypoint(_name)
