"""The block at initialisation: does its output vary over positions, and does every weight receive a gradient?

The spatial share is the deviation over positions of what DEPLA adds to the identity, over its whole deviation. A
gradient is its norm over that of the weight in `layer3.5`, relative to that of the block's `conv3`.
"""

import argparse
from typing import Any, Dict

import numpy as np
import timm
import torch
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

from timm_depla.layers import Depla
from timm_depla.layers.depla import BFNS

from .record import table

FLAGS = dict(batch_size=16, seed=0)


def _crops(count: int) -> torch.Tensor:
    """Random crops of the two photographs that scikit-learn ships, (B, 3, 224, 224), normalised."""
    to_float = v2.ToDtype(torch.float32, scale=True)
    normalize = v2.Normalize(timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    transform = v2.Compose([v2.RandomResizedCrop(224, scale=(0.05, 0.3)), to_float, normalize])
    photographs = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in load_sample_images().images]
    return torch.stack([transform(photographs[i % 2]) for i in range(count)])


def _measure(bfn: str, args: argparse.Namespace) -> Dict[str, Any]:
    torch.manual_seed(args.seed)
    x, labels = _crops(args.batch_size), torch.randint(1000, (args.batch_size,))
    model = timm.create_model('resnet50_depla', depla=dict(bfn=bfn)).train()
    shares = []

    def measure_share(module: torch.nn.Module, inputs: Any, out: torch.Tensor) -> None:
        refinement = out - inputs[0]
        shares.append((refinement.flatten(2).var(2).mean().sqrt() / refinement.std()).item())

    for module in model.modules():
        if isinstance(module, Depla):
            module.register_forward_hook(measure_share)
    torch.nn.functional.cross_entropy(model(x), labels).backward()
    gradients = {
        name: (parameter.grad.norm() / parameter.norm()).item()
        for name, parameter in model.layer3[5].named_parameters()
        if parameter.ndim > 1
    }
    relative = {k[6:]: v / gradients['conv3.weight'] for k, v in gradients.items() if k.startswith('depla.')}
    return dict(spatial_share=shares, relative_gradient=relative)


def run(args: argparse.Namespace) -> Dict[str, Any]:
    return {bfn: _measure(bfn, args) for bfn in BFNS}


def render(results: Dict[str, Any]) -> str:
    weights = list(dict.fromkeys(key for found in results.values() for key in found['relative_gradient']))
    rows = []
    for name, found in results.items():
        gradients = found['relative_gradient']
        shares = ' '.join(f'{share:.2f}' for share in found['spatial_share'])
        rows.append([name, shares, *(f'{gradients[key]:.2g}' if key in gradients else '' for key in weights)])
    return table(['', 'spatial share by block', *(f'gradient of `{key}`' for key in weights)], rows)
