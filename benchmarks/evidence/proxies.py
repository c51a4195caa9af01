"""The small data sets that stand in for ImageNet: public or made of public ones, for two CPU cores."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List

from . import scattered
from .fashion import fashion_folder


@dataclass(frozen=True)
class Proxy:
    """A data set, its recipe and the shape of the networks on it.

    Args:
        label: Its name in the tables.
        data: Gives the flags of the data.
        recipe: File in this folder.
        kwargs: Arguments of the ResNets.
    """

    label: str
    data: Callable[[], List[str]]
    recipe: str
    kwargs: Dict[str, Any] = field(default_factory=dict)

    def flags(self) -> List[str]:
        return [*self.data(), '--recipe', str(Path(__file__).with_name(self.recipe))]


def _scattered(name: str) -> Callable[[], List[str]]:
    return lambda: ['--data-dir', str(scattered.cached(name))]


def _fashion() -> List[str]:
    return ['--dataset', 'torch/fashion_mnist', '--data-dir', str(fashion_folder())]


PROXIES = {
    'digits': Proxy('scattered digits', _scattered('digits'), 'scattered.yaml'),
    'garments': Proxy('scattered garments', _scattered('garments'), 'garments.yaml'),
    'fashion': Proxy('Fashion-MNIST', _fashion, 'fashion.yaml', dict(stage=2)),  # 7 x 7 positions
}
