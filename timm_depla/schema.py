"""What values flags and shared files may have: one kind for each, with its words for messages and its test."""

import math
from argparse import ArgumentTypeError
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Callable, Mapping, Optional

__all__ = [
    'DETECTOR', 'IMAGE_MODES', 'NAMES', 'RUN', 'TEXT', 'Kind', 'check', 'check_arguments', 'check_classifier',
    'is_integer', 'shorten',
]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of values. A kind of numbers, called with the text of a flag, parses it.

    Attributes:
        says: What such a value is: 'it must be {says}'.
        holds: Whether a value is of this kind; of a kind of numbers, whether a finite number is.
        parse: What makes a number of a text; None for kinds of other values.
    """

    says: str
    holds: Callable[[Any], bool]
    parse: Optional[Callable[[str], Any]] = None

    def __call__(self, text: str) -> Any:
        try:
            value = self.parse(text)
            is_right = math.isfinite(value) and self.holds(value)
        except (OverflowError, ValueError):  # an integer can be larger than any float
            is_right = False
        if not is_right:
            raise ArgumentTypeError(f'it must be {self.says}, not {shorten(text)}')
        return value

    def admits(self, value: Any) -> bool:
        """Whether a value of a file or of a caller is of this kind."""
        if self.parse is None:
            return self.holds(value)
        is_number = is_integer(value) or (self.parse is not int and isinstance(value, Real))
        try:
            return is_number and not isinstance(value, bool) and math.isfinite(value) and self.holds(value)
        except OverflowError:
            return False


def is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def shorten(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


def _whole_or_part(text: str) -> float:
    """A number of epochs, an int where it is whole."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _between(kind: type, low: float, high: float, says: str) -> Kind:
    return Kind(says, lambda value: low <= value <= high, kind)


finite = _between(float, -1e6, 1e6, 'a number from -1e6 to 1e6')
positive = Kind('above 0, at most 1e6', lambda value: 0 < value <= 1e6, float)
non_negative = _between(float, 0, 1e6, 'from 0 to 1e6')
decay = _between(float, 0.01, 10, 'from 0.01 to 10')
aspect = _between(float, 0.001, 1000, 'from 0.001 to 1000')
alpha = Kind('0, or from 0.001 to 1000', lambda value: value == 0 or 0.001 <= value <= 1000, float)
share = _between(float, 0, 1, 'from 0 to 1')
fraction = Kind('from 0 to below 1', lambda value: 0 <= value < 1, float)
crop = _between(float, 0.1, 2, 'from 0.1 to 2')
deviation = _between(float, 1e-4, 1e6, 'from 0.0001 to 1e6')
splits = Kind('0, or a whole number from 2 to 16', lambda value: value == 0 or 2 <= value <= 16, int)
few = _between(float, 0, 64, 'from 0 to 64')
boxes = _between(int, 1, 64, 'a whole number from 1 to 64')
epochs = Kind('0 or more', lambda value: 0 <= value < 2**31, _whole_or_part)
whole = _between(int, 0, 2**31 - 1, 'a whole number from 0 on')
count = _between(int, 1, 2**31 - 1, 'a whole number from 1 on')
classes = _between(int, 0, 10**6, 'a number of classes, at most 1000000')
workers = _between(int, 0, 1024, 'a number of processes from 0 to 1024')
seed = _between(int, 0, 2**32 - 1, 'a whole number from 0 to 4294967295')
side = _between(int, 1, 16384, 'a number of pixels from 1 to 16384')
port = _between(int, 1, 65535, 'a port from 1 to 65535')
channels = _between(int, 1, 4096, 'a number of channels from 1 to 4096')

TEXT = Kind('a text', lambda value: isinstance(value, str) and len(value) <= 1000)
_MAP = Kind('a map of names to values', lambda value: isinstance(value, dict))


def _list_of(kind: Kind, says: str, count: Optional[int] = None) -> Kind:
    """A list of `count` values of a kind, of one or more by default."""

    def holds(value: Any) -> bool:
        is_long = isinstance(value, (list, tuple)) and (len(value) == count if count else len(value) > 0)
        return is_long and all(map(kind.admits, value))

    return Kind(says, holds)


def _either(*kinds: Kind) -> Kind:
    """A value of one of these kinds, or none."""
    words = ' or '.join(kind.says for kind in kinds)
    return Kind(words, lambda value: value is None or any(kind.admits(value) for kind in kinds))


def _one_of(*values: str) -> Kind:
    return Kind(f'one of {", ".join(values)}', lambda value: isinstance(value, str) and value in values)


NAMES = _list_of(TEXT, 'a list of names')
_SIZE = Kind(
    'a list of channels, height and width',
    lambda value: _list_of(side, '', 3).holds(value) and channels.admits(value[0]),
)
_CONFIG = {
    'architecture': TEXT,
    'num_classes': _either(classes),
    'label_names': _either(NAMES),
    'model_args': _either(_MAP),
    'pretrained_cfg': _either(_MAP),
}
_PRETRAINED = {
    'input_size': _either(_SIZE),
    'test_input_size': _either(_SIZE),
    'crop_pct': _either(crop),
    'test_crop_pct': _either(crop),
    'crop_mode': _either(_one_of('center', 'squash', 'border')),
    'interpolation': _either(_one_of('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos', 'random')),
    'mean': _either(_list_of(finite, 'a list of numbers')),
    'std': _either(_list_of(deviation, 'a list of numbers from 0.0001 to 1e6')),
    'num_classes': _either(classes),
    'label_names': _either(NAMES),
}
IMAGE_MODES = ('L', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'LAB')
_TEXTS = ('class_map', 'data_dir', 'dataset', 'eval_metric', 'gp', 'input_key', 'interpolation', 'model', 'recipe',
          'target_key', 'train_split', 'val_split')  # fmt: skip
RUN = {
    **_PRETRAINED,
    **dict.fromkeys(_TEXTS, Kind('a text', lambda value: value is None or isinstance(value, str))),
    'epochs': _either(epochs),
    'img_size': _either(side),
    'in_chans': _either(channels),
    'input_img_mode': _either(_one_of(*IMAGE_MODES)),
    'model_kwargs': _either(_MAP),
    'val_fraction': _either(fraction),
}
"""Arguments of a run, ours or timm's, that are read from its file alone."""
_MOST = ('box_detections_per_img', 'box_batch_size_per_image', 'rpn_batch_size_per_image', 'rpn_pre_nms_top_n_train',
         'rpn_pre_nms_top_n_test', 'rpn_post_nms_top_n_train', 'rpn_post_nms_top_n_test')  # fmt: skip
_SHARES = ('box_score_thresh', 'box_nms_thresh', 'box_fg_iou_thresh', 'box_bg_iou_thresh', 'box_positive_fraction',
           'rpn_score_thresh', 'rpn_nms_thresh', 'rpn_fg_iou_thresh', 'rpn_bg_iou_thresh',
           'rpn_positive_fraction')  # fmt: skip
DETECTOR = {
    'num_classes': _between(int, 2, 10**6, 'a number of classes, background included, from 2 on'),
    'out_channels': channels,
    'anchor_sizes': _list_of(_between(float, 1, 16384, ''), 'a list of five numbers of pixels', 5),
    'min_size': _either(side, _list_of(side, 'a list of such')),
    'max_size': _either(side),
    'fixed_size': _either(_list_of(side, 'a list of two sides in pixels', 2)),
    'image_mean': _either(_list_of(finite, 'a list of three numbers', 3)),
    'image_std': _either(_list_of(deviation, 'a list of three numbers from 0.0001 to 1e6', 3)),
    'trainable_backbone_layers': _either(whole),
    'backbone_kwargs': _either(_MAP),
    'depla': _either(_MAP),
    'neck_norm': _either(TEXT),
    **dict.fromkeys(_MOST, _either(_between(int, 1, 10**6, 'a whole number from 1 to 1000000'))),
    **dict.fromkeys(_SHARES, _either(share)),
}
"""Arguments of a detector whose values have a kind."""
_LOADING = {'cache_dir', 'checkpoint_path', 'has_weights', 'weights', 'weights_backbone'}  # and pretrained*
_FORM = {'device', 'dtype', 'exportable', 'features_only', 'model_name', 'name', 'out_indices', 'scriptable'}


def check(entry: Mapping[str, Any], kinds: Mapping[str, Kind], place: str) -> None:
    """Check a mapping's values, None where missing; a ValueError names the place, the key and the wrong value."""
    for key, kind in kinds.items():
        if not kind.admits(entry.get(key)):
            raise ValueError(f"{place}: '{key}' must be {kind.says}, not {shorten(entry.get(key))}")


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is a moderate number, a text, or a list or map of such."""
    if isinstance(value, (list, tuple, dict)):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return depth < 4 and len(value) <= 64 and all(_is_plain(item, depth + 1) for item in items)
    return value is None or isinstance(value, bool) or TEXT.admits(value) or finite.admits(value)


def check_arguments(arguments: Mapping[str, Any], place: str, flags: Optional[Mapping[str, str]] = None) -> None:
    """Check the arguments of a network that a file or a command line names.

    Args:
        arguments: The arguments, with those of a backbone in `backbone_kwargs`.
        place: Where they stand, for messages.
        flags: Arguments that do not belong there, with what to do.

    Raises:
        ValueError: If one would load or place weights, has a flag of its own, or is no plain value.
    """
    backbone = arguments.get('backbone_kwargs')
    if isinstance(backbone, dict):
        check_arguments(backbone, f'{place}, backbone_kwargs')
    for name, value in arguments.items():
        if flags and name in flags:
            raise ValueError(f"{place}: '{name}' does not belong here: {flags[name]}")
        if name.startswith('pretrained') or name in _LOADING:
            raise ValueError(f"{place}: '{name}' would load weights from elsewhere: remove it")
        if name in _FORM:
            raise ValueError(f"{place}: '{name}' is the caller's to choose: remove it")
        if not _is_plain(value):
            raise ValueError(f"{place}: '{name}' must be a moderate number, a text or a list, not {shorten(value)}")


def check_classifier(config: Mapping[str, Any], place: str) -> None:
    """Check the config.json of a classifier, in timm's format.

    ValueError if a value is not of its kind, an argument would load weights, or a class lacks a name.
    """
    check(config, _CONFIG, place)
    pretrained = config.get('pretrained_cfg') or config
    check(pretrained, _PRETRAINED, place)
    check_arguments(config.get('model_args') or {}, f'{place}, model_args')
    names = config.get('label_names') or pretrained.get('label_names')
    number = config['num_classes'] if 'num_classes' in config else pretrained.get('num_classes')
    if number is None:
        raise ValueError(f"{place}: 'num_classes' must be {classes.says}, not None")
    if names and number and len(names) != number:
        raise ValueError(f'{place}: label_names has {len(names)} names for {number} classes')
