"""FishNet, with optional DEPLA.

Papers: `FishNet: A Versatile Backbone for Image, Region, and Pixel Level Prediction`, Sun et al., NeurIPS 2018 -
https://arxiv.org/abs/1901.03495, and `Aggregation with Feature Detection`, Sun et al., ICCV 2021 -
https://openaccess.thecvf.com/content/ICCV2021/html/Sun_Aggregation_With_Feature_Detection_ICCV_2021_paper.html

The tail down-samples the image to 1/32, the body up-samples it to 1/4, and the head down-samples it again. Every stage
of body and head joins its main path with a branch, a feature of an earlier part. FishNet concatenates the two; with
DEPLA, the main path is refined with the branch first. The widths are the same, so the weights are those of FishNet.
"""

from typing import Any, Dict, List, Optional, Sequence, Tuple, Type, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, create_classifier, get_device_dtype, get_norm_layer
from timm.models import clean_state_dict, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor

from timm_depla.layers import check_depla_args

from .builder import build_model, imagenet_cfg
from .fishnet_blocks import Blocks, Bridge, Join, JoinStage, TailStage, check_size, conv_norm, squeeze
from .placement import init_depla

__all__ = ['FishNet']  # register_model adds each entrypoint


# Widths in multiples of the stem's output, which has 64 channels in the published networks.
TAIL = ((1, 2), (2, 4), (4, 8))  # in and out
BRIDGE = (8, 16, 8)  # in, inside and out
BODY = (Join(8, 8, branch=4), Join(12, 6, branch=2, dilation=2), Join(8, 4, branch=1, dilation=4))
HEAD = (Join(5, 5, branch=8), Join(13, 13, branch=12), Join(25, 25, branch=8))
LEVELS = ((1, 2, 'stem'), (5, 4, 'body.2'), (13, 8, 'head.0'), (25, 16, 'head.1'), (33, 32, 'head.2'))  # with reduction


class FishNet(nn.Module):
    """FishNet; if `depla` is given, with DEPLA in the six stages of its body and head.

    Args:
        tail, bridge, body, head: Residual blocks on the main path of each stage.
        body_branches, head_branches: Residual blocks in the branch of each stage.
        width: Channels of the stem, a multiple of 4. All other widths are in proportion.
        depla: None for FishNet as published, else overrides of the paper's setting of DEPLA: `Depla`'s num_groups,
            pooled_chs, maps_per_group, temperature, bfn and keep_candidate. Every stage keeps the candidate by
            concatenation, so keep_candidate only makes the refinement start at zero.
        output_stride: Must be 32: the body resamples by fixed factors.
        drop_path_rate: Stochastic depth of the last block of the main path; it grows linearly from the first.
        num_classes, in_chans, global_pool, drop_rate, norm_layer, device, dtype: As in timm's ResNet.

    Raises:
        TypeError: If `depla` has an unknown key.
        ValueError: If the width or output stride is impossible, an argument of `Depla` is out of range, or images have
            fewer than 29 pixels on a side.
    """

    def __init__(
        self,
        tail: Sequence[int],
        bridge: int,
        body: Sequence[int],
        head: Sequence[int],
        body_branches: Sequence[int],
        head_branches: Sequence[int],
        width: int = 64,
        depla: Optional[Dict[str, Any]] = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'avg',
        output_stride: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Union[str, Type[nn.Module]] = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if width < 4 or width % 4:
            raise ValueError(f'width must be a positive multiple of 4, got {width!r}; the published networks have 64')
        if output_stride != 32:
            raise ValueError(
                f'output_stride must be 32, got {output_stride!r}: the body of FishNet resamples by fixed factors. '
                'features_only=True has finer features, down to 1/2 (out_indices 0 to 4)'
            )
        check_depla_args(depla)
        dd = {'device': device, 'dtype': dtype}
        layers = dict(norm_layer=get_norm_layer(norm_layer), **dd)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.feature_info = [dict(num_chs=c * width, reduction=r, module=name) for c, r, name in LEVELS]

        rates = iter(calculate_drop_path_rates(drop_path_rate, [*tail, bridge, *body, *head], stagewise=True))
        self.stem = nn.Sequential(
            conv_norm(in_chans, width // 2, stride=2, **layers),
            conv_norm(width // 2, width // 2, **layers),
            conv_norm(width // 2, width, **layers),
        )
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.tail = nn.ModuleList(TailStage(width * c1, width * c2, next(rates), **layers) for c1, c2 in TAIL)
        self.bridge = Bridge(*(width * c for c in BRIDGE), next(rates), **layers)
        self.body, self.head = (
            nn.ModuleList(
                JoinStage(join, width, down, next(rates), num_blocks, depla, **layers)
                for join, num_blocks in zip(joins, branches, strict=True)
            )
            for joins, branches, down in ((BODY, body_branches, False), (HEAD, head_branches, True))
        )
        final_chs = self.feature_info[-1]['num_chs']
        self.final = squeeze(final_chs, **layers)
        self.num_features = self.head_hidden_size = final_chs // 2
        self.num_levels = len(self.feature_info)
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool, **dd)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise convolutions and the classifier by their fan-out, except DEPLA (ruling 11)."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        init_depla(self)

    def load_state_dict(self, state_dict: Dict[str, Any], *args, **kwargs):
        """Load a state dict, also one with the names of the published checkpoints."""
        return super().load_state_dict(checkpoint_filter_fn(state_dict, self), *args, **kwargs)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Layer groups from stem to head, by stage (`coarse`) or by block of the main path."""

        def match(part: str) -> Any:
            stage = rf'^{part}\.(\d+)'
            return stage if coarse else [(rf'{stage}\.blocks\.(\d+)', None), (stage, (99999,))]

        return dict(
            stem=r'^stem',
            tail=match('tail'),
            bridge=r'^bridge' if coarse else [(r'^bridge\.blocks\.(\d+)', None), (r'^bridge', None)],
            body=match('body'),
            head=match('head'),
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of each stage in the backward pass instead of storing their activations."""
        for module in self.modules():
            if isinstance(module, Blocks):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> Union[str, nn.Module]:
        return 'fc' if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Create a new classifier; keep the pooling if `global_pool` is None."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        dd = get_device_dtype(self)
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool_type, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_levels(self, x: Tensor, num_levels: int) -> List[Tensor]:
        """The first `num_levels` of five features of images x: the stem's (/2) and the head's (/4, /8, /16, /32)."""
        check_size(x)
        levels = [self.stem(x)]
        if num_levels == 1:
            return levels
        f0 = self.pool(levels[0])
        f1 = self.tail[0](f0)
        f2 = self.tail[1](f1)
        f3 = self.tail[2](f2)
        f4 = self.bridge(f3)
        f5 = self.body[0](f4, f2)
        f6 = self.body[1](f5, f1)
        levels.append(self.body[2](f6, f0))
        for stage, branch in zip(self.head, (f6, f5, f4)):  # noqa: B905  (a pruned head has fewer stages)
            if len(levels) < num_levels:
                levels.append(stage(levels[-1], branch))
        return levels

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Features of images x at levels 0 (the stem, /2) and 1 to 4 (the head, /4 to /32).

        `indices` are levels: an int n means the last n, None means all. The rest is as in timm's ResNet.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        levels = self.forward_levels(x, max_index + 1 if stop_early else self.num_levels)
        intermediates = [level for i, level in enumerate(levels) if i in take_indices]
        if intermediates_only:
            return intermediates
        x = levels[-1]
        return self.final(x) if len(levels) == self.num_levels else x, intermediates

    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """Remove the layers that the levels at `indices` do not need; return the indices, counted from zero.

        `prune_norm`, or removing the last level, also removes the final convolution and the classifier; `prune_head`
        removes the classifier.
        """
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        self.num_levels = max_index + 1
        self.head = self.head[: max(self.num_levels - 2, 0)]
        if self.num_levels == 1:
            self.tail, self.bridge, self.body = nn.ModuleList(), nn.Identity(), nn.ModuleList()
        prune_final = prune_norm or self.num_levels < len(self.feature_info)
        if prune_final:
            self.final = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_final or prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to unpooled features (B, num_features, H / 32, W / 32)."""
        return self.final(self.forward_levels(x, self.num_levels)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


# Published name of each part: the stages are numbered consecutively, and each is a list of unnamed modules.
_PUBLISHED_NAMES = {
    **{f'conv{i + 1}.': f'stem.{i}.' for i in range(3)},
    **{f'fish.fish.{i}.0.': f'tail.{i}.blocks.' for i in range(3)},
    'fish.fish.3.0.': 'bridge.squeeze.',
    'fish.fish.3.1.': 'bridge.expand.',
    'fish.fish.3.2.': 'bridge.blocks.',
    'fish.fish.3.3.0.': 'bridge.attention.',
    **{f'fish.fish.{4 + i}.0.': f'body.{i}.blocks.' for i in range(3)},
    **{f'fish.fish.{4 + i}.1.': f'body.{i}.transfer.' for i in range(3)},
    **{f'fish.fish.{7 + i}.0.': f'head.{i}.blocks.' for i in range(3)},
    **{f'fish.fish.{7 + i}.1.': f'head.{i}.transfer.' for i in range(3)},
    'fish.fish.9.3.': 'final.',
    'fish.fish.9.4.1.': 'fc.',
}


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, Tensor]:
    """Give the tensors of a published checkpoint the names of ours.

    Args:
        state_dict: A state dict, alone or as `state_dict` of a training dictionary, with or without the prefix
            `module.`. If it already has our names, it keeps them.
        model: The FishNet to load it into, with or without DEPLA.
    """
    state_dict = clean_state_dict(state_dict.get('state_dict', state_dict))
    if not any(name.startswith('fish.') for name in state_dict):
        return state_dict
    renamed = {}
    for name, tensor in state_dict.items():
        published = next((p for p in _PUBLISHED_NAMES if name.startswith(p)), '')
        renamed[_PUBLISHED_NAMES.get(published, '') + name.removeprefix(published)] = tensor
    if 'fc.weight' in renamed:
        renamed['fc.weight'] = renamed['fc.weight'].flatten(1)  # a 1x1 convolution
    return renamed


# Residual blocks of tail, bridge, body and head, and in the branches of body and head.
_BLOCKS = {
    'fishnet99': ((2, 2, 6), 2, (1, 1, 1), (1, 2, 2), (1, 1, 1), (1, 1, 4)),
    'fishnet150': ((2, 4, 8), 4, (2, 2, 2), (2, 2, 4), (2, 2, 2), (2, 2, 4)),
    'fishnet201': ((3, 4, 12), 4, (2, 2, 2), (2, 3, 10), (2, 2, 2), (2, 2, 9)),
    'test_fishnet': ((1, 1, 1), 1, (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
}


def _create_fishnet(variant: str, pretrained: bool, **kwargs) -> FishNet:
    name = variant.removesuffix('_depla')
    parts = ('tail', 'bridge', 'body', 'head', 'body_branches', 'head_branches')
    model_args = dict(zip(parts, _BLOCKS[name], strict=True), depla=None if name == variant else {})
    model_args.update(feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), feature_cls='getter'))
    model_args.update((key, value) for key, value in kwargs.items() if value is not None)  # as timm.create_model does
    return build_model(FishNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **model_args)


def _cfg(**kwargs) -> Dict[str, Any]:
    return imagenet_cfg(first_conv='stem.0.0', classifier='fc', **kwargs)


_PAPER = dict(paper_name='FishNet: A Versatile Backbone for Image, Region, and Pixel Level Prediction')
_TINY = dict(input_size=(3, 128, 128), pool_size=(4, 4))
default_cfgs = generate_default_cfgs(
    {
        f'{name}{form}.untrained': _cfg(**(_TINY if name == 'test_fishnet' else {}), **paper)
        for form, paper in (('', _PAPER), ('_depla', {}))
        for name in _BLOCKS
    }
)


@register_model
def fishnet99(pretrained: bool = False, **kwargs) -> FishNet:
    """FishNet-99."""
    return _create_fishnet('fishnet99', pretrained, **kwargs)


@register_model
def fishnet99_depla(pretrained: bool = False, **kwargs) -> FishNet:
    """FishNet-99 with plain DEPLA."""
    return _create_fishnet('fishnet99_depla', pretrained, **kwargs)


@register_model
def fishnet150(pretrained: bool = False, **kwargs) -> FishNet:
    """FishNet-150."""
    return _create_fishnet('fishnet150', pretrained, **kwargs)


@register_model
def fishnet150_depla(pretrained: bool = False, **kwargs) -> FishNet:
    """FishNet-150 with plain DEPLA."""
    return _create_fishnet('fishnet150_depla', pretrained, **kwargs)


@register_model
def fishnet201(pretrained: bool = False, **kwargs) -> FishNet:
    """FishNet-201."""
    return _create_fishnet('fishnet201', pretrained, **kwargs)


@register_model
def fishnet201_depla(pretrained: bool = False, **kwargs) -> FishNet:
    """FishNet-201 with plain DEPLA."""
    return _create_fishnet('fishnet201_depla', pretrained, **kwargs)


@register_model
def test_fishnet(pretrained: bool = False, **kwargs) -> FishNet:
    """Tiny FishNet, for tests and the embedded digits."""
    return _create_fishnet('test_fishnet', pretrained, **{'width': 12, **kwargs})


@register_model
def test_fishnet_depla(pretrained: bool = False, **kwargs) -> FishNet:
    """Tiny FishNet with plain DEPLA, for tests and the embedded digits."""
    return _create_fishnet('test_fishnet_depla', pretrained, **{'width': 12, **kwargs})
