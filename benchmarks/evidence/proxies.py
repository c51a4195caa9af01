"""The small data sets that stand in for ImageNet: public or made of public ones, for two CPU cores."""

from pathlib import Path
from typing import Any, Dict, List

from . import scattered
from .fashion import fashion_folder
from .variants import Variant

PROXIES = {'digits': 'scattered.yaml', 'garments': 'garments.yaml', 'fashion': 'fashion.yaml'}  # the recipe of each
DATA = (*PROXIES, 'scenes')


def flags(data: str) -> List[str]:
    """Those of a set's images and recipe."""
    recipe = ['--recipe', str(Path(__file__).with_name(PROXIES[data]))]
    if data == 'fashion':
        return ['--dataset', 'torch/fashion_mnist', '--data-dir', str(fashion_folder()), *recipe]
    return ['--data-dir', str(scattered.cached(data)), *recipe]


def arguments(variant: Variant, data: str) -> Dict[str, Any]:
    """The arguments of a network on a set."""
    return {**variant.kwargs, 'stage': 2} if data == 'fashion' else variant.kwargs  # 7 x 7 positions
