"""Reading and cropping of training images by TorchCodec and PyTorch, which is faster than Pillow."""

import io
import random
from contextlib import suppress
from typing import Any, BinaryIO, Union

import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms.v2.functional import InterpolationMode, pil_to_tensor, resize

from timm_depla.files import open_image

__all__ = ['TensorResizedCrop', 'read_pixels']


def read_pixels(file: BinaryIO, mode: str) -> Union[torch.Tensor, Image.Image]:
    """Decode an RGB JPEG to its pixels (3, H, W), any other file as `open_image` does.

    Raises:
        ModuleNotFoundError: If TorchCodec is not installed.
    """
    from torchcodec.decoders import decode_jpeg

    data = file.read()
    if mode == 'RGB' and data.startswith(b'\xff\xd8'):
        with suppress(RuntimeError):  # Pillow then decodes the file or raises an error
            pixels = decode_jpeg(data, mode='UNCHANGED')
            if len(pixels) == 3:
                return pixels
    return open_image(io.BytesIO(data), mode)


class TensorResizedCrop(RandomResizedCropAndInterpolation):
    """timm's random resized crop by PyTorch to pixels (C, H, W), with the same random boxes and interpolations.

    Rounding may differ.

    Args:
        crop: timm's transform to replace.

    Raises:
        ValueError: If it is no random resized crop, or its interpolation is neither bilinear nor bicubic.
    """

    def __init__(self, crop: Any):
        if not isinstance(crop, RandomResizedCropAndInterpolation):
            raise ValueError(f'{type(crop).__name__} is no random resized crop')
        modes = crop.interpolation if isinstance(crop.interpolation, (tuple, list)) else [crop.interpolation]
        if unknown := set(modes) - {InterpolationMode.BILINEAR, InterpolationMode.BICUBIC}:
            raise ValueError(f'PyTorch resizes bilinearly and bicubically, not by {unknown.pop().value}')
        self.__dict__.update(crop.__dict__)

    def __call__(self, img: Union[torch.Tensor, Image.Image]) -> torch.Tensor:
        top, left, height, width = self.get_params(img, self.scale, self.ratio)
        modes = self.interpolation
        mode = random.choice(modes) if isinstance(modes, (tuple, list)) else modes
        if isinstance(img, torch.Tensor):
            rows = img.permute(1, 2, 0)[top : top + height, left : left + width]
            pixels = rows.contiguous().permute(2, 0, 1)  # copied in memory order, which is fastest
        else:
            pixels = pil_to_tensor(img.crop((left, top, left + width, top + height)))
        return resize(pixels, list(self.size), mode, antialias=True)
