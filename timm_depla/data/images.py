"""timm's image data set, with unreadable images named."""

from typing import Any, Tuple

import torch.multiprocessing
from PIL import Image
from timm.data import ImageDataset

__all__ = ['CheckedImages', 'UnreadableError']

_MAX_ATTEMPTS = 10  # unreadable images in a row


class UnreadableError(RuntimeError):
    """Too many images in a row cannot be read."""


class CheckedImages(ImageDataset):
    """An image data set that reports what it cannot read, from whichever process reads it.

    In training the next readable image takes an unreadable one's place; in validation a blank with target -1 does, to
    be left out.

    Args:
        dataset: timm's data set to read from.
        is_training: Whether to replace unreadable images.

    Attributes:
        unreadable: Queue of (file name, cause).

    Raises:
        UnreadableError: From indexing, if ten images in a row cannot be read.
    """

    def __init__(self, dataset: ImageDataset, is_training: bool):
        super().__init__(
            '',
            reader=dataset.reader,
            input_img_mode=dataset.input_img_mode or 'RGB',
            transform=dataset.transform,
            target_transform=dataset.target_transform,
        )
        self.is_training = is_training
        self.unreadable = torch.multiprocessing.Queue()

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        for _ in range(_MAX_ATTEMPTS):
            try:
                file, target, *_ = self.reader[index]
                image = Image.open(file).convert(self.input_img_mode)
                break
            except Exception as error:  # a damaged file can make Pillow raise anything
                self.unreadable.put((str(self.filename(index)), str(error) or repr(error)))
                if not self.is_training:
                    return self.transform(Image.new(self.input_img_mode, (256, 256))), -1
                index = (index + 1) % len(self)
        else:
            raise UnreadableError(f'{_MAX_ATTEMPTS} images in a row cannot be read, up to {self.filename(index - 1)}')
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, -1 if target is None else target
