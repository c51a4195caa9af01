"""The small data sets that stand in for ImageNet: public or made of public ones, for two CPU cores."""

from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple

from . import scattered
from .fashion import fashion_folder
from .variants import Variant


class Proxy(NamedTuple):
    """A data set, its recipe and the shape of the networks on it.

    Args:
        data: Gives the flags of the data.
        recipe: File in this folder.
        kwargs: Arguments of the ResNets.
    """

    data: Callable[[], List[str]]
    recipe: str
    kwargs: Dict[str, Any] = {}

    def flags(self) -> List[str]:
        return [*self.data(), '--recipe', str(Path(__file__).with_name(self.recipe))]


PROXIES = {
    'digits': Proxy(lambda: ['--data-dir', str(scattered.cached('digits'))], 'scattered.yaml'),
    'garments': Proxy(lambda: ['--data-dir', str(scattered.cached('garments'))], 'garments.yaml'),
    'fashion': Proxy(
        lambda: ['--dataset', 'torch/fashion_mnist', '--data-dir', str(fashion_folder())],
        'fashion.yaml',
        dict(stage=2),  # 7 x 7 positions
    ),
}
DATA = (*PROXIES, 'scenes')


def arguments(variant: Variant, data: str) -> Dict[str, Any]:
    """The arguments of a network on a set."""
    return variant.kwargs if variant.is_detector else {**variant.kwargs, **PROXIES[data].kwargs}
