"""The accuracy of a classifier over a loader, by one process or many."""

from argparse import Namespace
from typing import Any, Dict, Optional

import torch
import torch.nn as nn

from .report import progress
from .world import Interrupt, World

__all__ = ['autocast', 'evaluate']


def autocast(args: Namespace) -> torch.autocast:
    """The precision that the arguments ask for."""
    return torch.autocast(torch.device(args.device).type, dtype=getattr(torch, args.amp_dtype), enabled=args.amp)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Any,
    args: Namespace,
    world: World,
    interrupt: Optional[Interrupt] = None,
    observe: Any = None,
) -> Dict[str, float]:
    """Mean cross-entropy, and top-1 and top-5 accuracy in percent, over all processes' images.

    Args:
        model: The classifier, on the run's device.
        loader: Of `create_val_loader`: batches of images (B, C, H, W) and targets (B,); -1 leaves an image out.
        args: Arguments: `device`, `amp`, `amp_dtype`, `channels_last`.
        world: The processes that share the images.
        interrupt: Ends the evaluation early, with what it has.
        observe: Maps each batch's logits to those to be scored.

    Returns:
        `loss`, `top1`, `top5`, and `count`, the number of images.
    """
    model.eval()
    loss, top1, top5, count = (torch.zeros((), dtype=torch.float64) for _ in range(4))
    for images, targets in progress('validation', 'batches', iterable=loader) if world.is_primary else loader:
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(args):
            logits = model(images)
        logits = (logits if observe is None else observe(logits)).float()
        correct = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # (B, 5)
        loss += nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction='sum').cpu()
        top1 += correct[:, 0].sum().cpu()
        top5 += correct.any(1).sum().cpu()
        count += (targets >= 0).sum().cpu()
        loader.unreadable.collect()
        if interrupt is not None and interrupt.signal:
            break
    total = world.sum(*(value.item() for value in (loss, top1, top5, count)))
    number = max(total[3], 1.0)
    return {
        'loss': total[0] / number,
        'top1': 100 * total[1] / number,
        'top5': 100 * total[2] / number,
        'count': total[3],
    }
