"""What networks are trained on: public sets or images made of them, for two CPU cores, and which networks and seeds."""

from functools import partial
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from timm_depla.data import digits_folder
from timm_depla.data.scenes import scenes_folder

from . import drawn
from .fashion import Garments, by_class, fashion_folder
from .lite0 import lite0_weights
from .scattered import Scattered
from .shapes import Shapes
from .variants import Variant


class Instrument(NamedTuple):
    """A set of images, how networks are trained on it, and which."""

    recipe: str  # a file beside this one, or of timm_depla
    variants: Sequence[str]
    images: Optional[drawn.Drawn] = None
    arguments: Dict[str, Any] = {}  # of each network
    val_images: Optional[int] = None  # of scenes, if not theirs
    seeds: Sequence[int] = range(10)  # that count
    tuning_seeds: Sequence[int] = (100, 101, 102)  # to choose the learning rate
    rates: Sequence[float] = (0.003, 0.009, 0.027)  # to try; extended while the best is at its end

    def flags(self, name: str) -> List[str]:
        """Those of a training's images and recipe."""
        recipe = Path(__file__).with_name(self.recipe)
        flags = ['--recipe', str(recipe) if recipe.is_file() else self.recipe]
        if self.recipe.startswith('lite0'):
            flags += ['--pretrained-path', str(lite0_weights())]
        if self.images is not None:
            return ['--data-dir', str(drawn.cached(name, self.images)), *flags]
        if self.recipe == 'scenes':
            folder = scenes_folder(digits_folder().parent / name, self.val_images)
            flags += ['--channels-last'] if self.val_images else []  # a fifth faster; the first runs did without
            return ['--data-dir', str(folder), *flags, '--epochs', '8', '--val-interval', '8']
        return ['--dataset', 'torch/fashion_mnist', '--data-dir', str(fashion_folder()), *flags]

    def model_kwargs(self, variant: Variant) -> Dict[str, Any]:
        return {**variant.kwargs, **self.arguments}


_FRESH = {'train': 60000, 'validation': 5000}  # images, each seen once
_RELATIONS = ('base', 'control', 'gc', 'nl', 'depla')
_LITE0 = ('lite0', 'lite0-control', 'lite0-se', 'lite0-gc', 'lite0-nl', 'lite0-depla', 'lite0-adaptive')
_FEW = {'train': 1000, 'validation': 2000}  # images
_FINETUNE = partial(Instrument, 'lite0.yaml', _LITE0)
INSTRUMENTS = {
    'same': Instrument('relations.yaml', _RELATIONS, Shapes(_FRESH), seeds=range(6), tuning_seeds=(100, 101)),
    'same-120000': Instrument(
        'relations.yaml',
        ('base', 'control', 'nl', 'depla', 'kept', 'mean', 'adaptive'),
        Shapes({**_FRESH, 'train': 120000}),
        seeds=range(10, 20),
        tuning_seeds=(110, 111, 112),
    ),
    'fashion': Instrument(
        'fashion.yaml', ('base', 'se', 'gc', 'cbam', 'nl', 'depla'), arguments=dict(stage=2)
    ),  # 7 x 7 positions
    'lite0-fashion': _FINETUNE(Garments(_FEW)),
    'lite0-garments': _FINETUNE(Scattered(by_class, 48, (12, 40), 8, _FEW, is_lit=True)),
    'scenes': Instrument(
        'scenes',
        ('fpn', 'fpn-depla-0.2', 'fpn-depla-0.5', 'fpn-depla-1.0', 'fpn-norm', 'backbone-fishnet')
        + ('backbone-fishnet-depla', 'backbone-fishnet-norm', 'backbone-fishnet-depla-norm'),
        seeds=range(5),
        tuning_seeds=(100,),
        rates=(0.009, 0.027, 0.081),
    ),
    'scenes-1000': Instrument(
        'scenes',
        ('fishnet', 'fishnet-long', 'fishnet-mean', 'fishnet-depla'),
        val_images=1000,
        seeds=range(10, 22),
        tuning_seeds=(110, 111, 112),
        rates=(0.009, 0.027, 0.081),
    ),
}
