"""Feature pyramid network whose top-down pathway aggregates with DEPLA.

Paper: `Aggregation with Feature Detection`, Sun et al., ICCV 2021 -
https://openaccess.thecvf.com/content/ICCV2021/html/Sun_Aggregation_With_Feature_Detection_ICCV_2021_paper.html
Between every two levels, DEPLA refines the lateral feature of the finer level (the identity X) with the merged feature
of the coarser one (the candidate Y), where FPN adds them (ruling 13 of docs/rulings.md).
"""

from collections import OrderedDict
from typing import Any, Callable, Dict, List, Optional

import torch.nn as nn
from torch import Tensor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from timm_depla.layers import Depla, check_depla_args

__all__ = ['FeaturePyramidNetworkDepla']


class FeaturePyramidNetworkDepla(FeaturePyramidNetwork):
    """torchvision's FeaturePyramidNetwork with DEPLA instead of the sum; shared modules have the same names.

    Args:
        in_channels_list: Channels of each feature map, finest first.
        out_channels: Channels of the pyramid.
        extra_blocks: Further levels, from the pyramid's and the original maps.
        norm_layer: Norm after the pyramid's convolutions, none by default. DEPLA uses it too, or BatchNorm if None.
        depla: Overrides of `temperature=0.5`, `bfn='adaptive'` and `Depla`'s other defaults.

    Raises:
        TypeError: If `depla` has an unknown key.
        ValueError: If an argument of `Depla` is out of range.
    """

    def __init__(
        self,
        in_channels_list: List[int],
        out_channels: int,
        extra_blocks: Optional[ExtraFPNBlock] = None,
        norm_layer: Optional[Callable[..., nn.Module]] = None,
        depla: Optional[Dict[str, Any]] = None,
    ) -> None:
        super().__init__(in_channels_list, out_channels, extra_blocks, norm_layer)
        depla = {'temperature': 0.5, 'bfn': 'adaptive', **check_depla_args(depla)}
        self.top_down_blocks = nn.ModuleList(  # the coarsest step first
            Depla(out_channels, **depla, norm_layer=norm_layer or nn.BatchNorm2d) for _ in in_channels_list[1:]
        )

    def forward(self, x: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Map feature maps by name, finest first, to the pyramid's maps by name.

        Each level has a 1x1 lateral convolution, DEPLA with the next coarser level, and a 3x3 output convolution.
        """
        names, maps = list(x.keys()), list(x.values())
        laterals = [inner(maps[i]) for i, inner in enumerate(self.inner_blocks)]
        merged = [laterals.pop()]  # finest first
        for top_down in self.top_down_blocks:
            merged.insert(0, top_down(laterals.pop(), merged[0]))
        results = [layer(merged[i]) for i, layer in enumerate(self.layer_blocks)]
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, maps, names)
        return OrderedDict([(name, result) for name, result in zip(names, results)])  # noqa: B905  (TorchScript)
