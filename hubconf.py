"""Entrypoints of torch.hub: `torch.hub.load(REPOSITORY, 'resnet50_depla', num_classes=10)`, one for each model."""

import timm

import timm_depla  # noqa: F401  (registers the models)

dependencies = ['torch', 'timm']

for _module in ('resnet_depla', 'fishnet_depla'):
    for _name in timm.list_models(module=_module):
        globals()[_name] = timm.model_entrypoint(_name)
