"""Insert DEPLA around blocks of any convolutional or NHWC network of timm, which keeps its pretrained weights.

Paper: `Aggregation with Feature Detection`, Sun et al., ICCV 2021 -
https://openaccess.thecvf.com/content/ICCV2021/html/Sun_Aggregation_With_Feature_Detection_ICCV_2021_paper.html
"""

from contextlib import ExitStack
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.layers import get_device_dtype
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from timm_depla.layers import Depla, check_depla_args

from .builder import build_model, imagenet_cfg
from .placement import default_positions

__all__ = ['BlockWithDepla', 'insert_depla']  # register_model adds the entrypoint

REDUCTION = 16  # of the stage that has DEPLA, as in the paper's ResNet
TOKENS = 'works on tokens, not on maps'


class BlockWithDepla(nn.Module):
    """Compute block(X) + refinement(X, block(X)), which starts as block(X); the block must keep the map's shape.

    Args:
        block: The block.
        chs: Channels of its map.
        channels_last: Whether the map is (B, H, W, C) and not (B, C, H, W).
        depla: Arguments of `Depla`.
    """

    def __init__(self, block: nn.Module, chs: int, channels_last: bool, depla: Dict[str, Any], **dd) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.block = block
        self.depla = Depla(chs, **depla, add_identity=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        if self.channels_last:
            return self.depla(x.permute(0, 3, 1, 2), y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.depla(x, y)


def insert_depla(model: nn.Module, depla: Optional[Dict[str, Any]] = None) -> nn.Module:
    """Put DEPLA around blocks of a network, in place. The network's output is the same until DEPLA is trained.

    Example:
        model = insert_depla(timm.create_model('convnext_tiny', pretrained=True))

    Args:
        model: A network of timm whose blocks take and return maps (B, C, H, W) or (B, H, W, C).
        depla: Overrides of the paper's setting: `modules`, the names of blocks that keep the shape of their map
            (default: up to three of the stage at 1/16), and `Depla`'s num_groups, pooled_chs, maps_per_group,
            temperature and bfn.

    Returns:
        The model.

    Raises:
        TypeError: If `depla` has an unknown key.
        ValueError: If a module does not exist, already has DEPLA or changes the shape of its map, or if no block of
            the stage at 1/16 keeps the shape.
    """
    block_args = check_depla_args(depla, 'modules')
    names = block_args.pop('modules', None)
    if not hasattr(model, 'pretrained_cfg'):
        raise ValueError(f'{type(model).__name__} is no network of timm: make it by timm.create_model')
    if (keep := block_args.pop('keep_candidate', True)) is not True:
        raise ValueError(f'DEPLA around a block keeps what the block gives: leave out keep_candidate={keep!r}')
    stage = _find_stage(model) if names is None else ''
    if stage:
        names = _list_blocks(model, stage)
    elif not (isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names)):
        raise ValueError(f'modules must be a list of names, got {names!r}; leave it out for the default')
    modules = dict(model.named_modules())
    if unknown := [name for name in names if name not in modules]:
        raise ValueError(f'no module {unknown} in {type(model).__name__}; see model.named_modules()')
    shapes = _trace_shapes(model, names)
    kept = [name for name in names if isinstance(shapes[name], tuple)]
    if stage and kept:
        kept = [kept[i - 1] for i in default_positions(len(kept) + 1)]
    elif not kept or len(kept) < len(names):
        changed = [name for name in names if name not in kept]
        if len(set(shapes.values())) == 1 and TOKENS in shapes.values():
            raise ValueError(f'{type(model).__name__} {TOKENS}: DEPLA has no place in it')
        which = f'{changed[0]} and {len(changed) - 1} more' if len(changed) > 1 else ''.join(changed) or stage
        what = shapes[changed[0]] if changed else 'has no blocks'
        raise ValueError(f'{which} of {type(model).__name__} {what}: name other blocks, depla=dict(modules=[...])')
    channels_last = getattr(model, 'output_fmt', 'NCHW') == 'NHWC'
    for name in kept:
        parent, _, child = name.rpartition('.')
        chs = shapes[name][3 if channels_last else 1]
        block = BlockWithDepla(modules[name], chs, channels_last, block_args, **get_device_dtype(model))
        setattr(modules[parent], child, block.train(modules[name].training))
    return model


def _find_stage(model: nn.Module) -> str:
    """Name of the last stage at 1/16."""
    infos, modules = getattr(model, 'feature_info', []), dict(model.named_modules())
    found = [(i['module'], i['reduction']) for i in getattr(infos, 'info', infos) if i['module'] in modules]
    if stages := [name for name, reduction in found if reduction == REDUCTION]:
        return stages[-1]
    if TOKENS in _trace_shapes(model, [name for name, _ in found[-1:]]).values():
        raise ValueError(f'{type(model).__name__} {TOKENS}: DEPLA has no place in it')
    raise ValueError(f'{type(model).__name__} tells no stage at 1/{REDUCTION}: name blocks, depla=dict(modules=[...])')


def _list_blocks(model: nn.Module, stage: str) -> List[str]:
    """Names of the blocks of a stage, which timm keeps in it or in its `blocks`."""
    path = f'{stage}.blocks' if hasattr(model.get_submodule(stage), 'blocks') else stage
    return [f'{path}.{name}' for name, _ in model.get_submodule(path).named_children()]


def _describe(inputs: Tuple[Any, ...], output: Any) -> Union[str, Tuple[int, ...]]:
    """The shape of a module's map, or why it has no place for DEPLA."""
    if not isinstance(output, Tensor) or len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        return 'takes or gives several maps'
    if output.ndim != 4:
        return TOKENS
    return tuple(output.shape) if inputs[0].shape == output.shape else 'changes the shape of its map'


@torch.no_grad()
def _trace_shapes(model: nn.Module, names: Sequence[str]) -> Dict[str, Union[str, Tuple[int, ...]]]:
    """Run one image, and `_describe` each module."""
    shapes: Dict[str, Union[str, Tuple[int, ...]]] = dict.fromkeys(names, 'does not run')

    def listen(name: str, module: nn.Module, inputs: Tuple[Any, ...], output: Any) -> None:
        shapes[name] = 'has DEPLA' if isinstance(module, BlockWithDepla) else _describe(inputs, output)

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(model.get_submodule(name).register_forward_hook(partial(listen, name)))
        for module in model.modules():
            stack.callback(setattr, module, 'training', module.training)
        size = getattr(getattr(model, 'patch_embed', None), 'img_size', None) or model.pretrained_cfg['input_size'][1:]
        model.eval()(torch.zeros(1, model.in_chans, *size, **get_device_dtype(model)))
    return shapes


default_cfgs = generate_default_cfgs({'backbone_depla.untrained': imagenet_cfg()})


def _create_with_depla(backbone: str, has_weights: bool, overlay: Any, depla: Any, **kwargs) -> nn.Module:
    model = timm.create_model(backbone, pretrained=has_weights, pretrained_cfg_overlay=overlay, **kwargs)
    return insert_depla(model, depla)


@register_model
def backbone_depla(
    pretrained: bool = False,
    backbone: str = 'resnet50',
    depla: Optional[Dict[str, Any]] = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
    **kwargs,
) -> nn.Module:
    """Any network of timm, `backbone`, with DEPLA around some of its blocks: see `insert_depla`.

    Pretrained weights are timm's weights of the backbone (`pretrained_cfg_overlay` changes where from), or those of the
    whole model from a Hub repository or folder.
    """
    if fetching := {'checkpoint_path', 'has_weights', 'overlay'} & kwargs.keys():  # of files to load
        raise TypeError(f'unknown argument {sorted(fetching)}')
    if not (isinstance(backbone, str) and timm.is_model(backbone)):
        raise ValueError(f"backbone '{backbone}' is no model of timm; see timm.list_models()")
    if isinstance(pretrained_cfg, str) and pretrained_cfg != 'untrained':
        raise ValueError(f"the tag belongs to the backbone: backbone='{backbone.partition('.')[0]}.{pretrained_cfg}'")
    is_whole = pretrained_cfg is not None and not isinstance(pretrained_cfg, str)
    if not is_whole:
        pretrained_cfg = timm.get_pretrained_cfg(backbone).to_dict()
        pretrained_cfg.update(dict.fromkeys(('tag', 'url', 'file', 'state_dict', 'hf_hub_id')))
        pretrained_cfg['architecture'] = 'backbone_depla'
    if kwargs.get('features_only') and 'out_indices' not in kwargs:
        with torch.device('meta'):
            infos = timm.create_model(backbone).feature_info
        kwargs['out_indices'] = tuple(range(len(getattr(infos, 'info', infos))))
    return build_model(
        _create_with_depla,
        'backbone_depla',
        pretrained and is_whole,
        pretrained_cfg=pretrained_cfg,
        feature_cfg=dict(feature_cls='getter'),
        backbone=backbone,
        pretrained_cfg_overlay=pretrained_cfg_overlay if is_whole else None,
        has_weights=pretrained and not is_whole,
        overlay=None if is_whole else pretrained_cfg_overlay,
        depla=depla,
        **kwargs,
    )
