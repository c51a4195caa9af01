"""Parameters, multiply-adds and activations of each model, beside the multiply-adds that the paper prints.

Multiply-adds are those of convolutions and matrix products. Activations are the output elements of convolutions and
linear layers. All layers count. "Fused" is after timm's `reparameterize_model`: a residual block that does not make its
candidate skips its last convolution. `--model '*_depla*'` counts all networks.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Dict, List, Tuple

import timm
from timm.utils import reparameterize_model

from timm_depla.models.cost import count_cost, count_macs

from .record import table

FLAGS = dict(
    model=[
        'fishnet150_depla', 'resnet50_depla', 'resnet50_depla_adaptive', 'resnet101_depla', 'resnet152_depla',
        'seresnet50_depla', 'seresnet50_depla_adaptive', 'seresnet101_depla', 'regnety_040_depla',
    ]
)  # fmt: skip


def run(args: argparse.Namespace) -> Dict[str, Any]:
    results = {}
    for name in timm.list_models(args.model):
        base = name.split('_depla')[0]
        for model_name in (base, name) if timm.is_model(base) else (name,):
            model = timm.create_model(model_name, device='meta')
            size = model.default_cfg['input_size']
            fused = count_macs(reparameterize_model(model.eval()), size)
            results[model_name] = dict(size=size[-1], **count_cost(model, size), fused=fused)
    return results


def _printed() -> Dict[str, float]:
    """G multiply-adds that the paper prints, by the name of the model."""
    tables = json.loads((Path(__file__).parent / 'paper_results.json').read_text()).values()
    tables = [t for t in tables if isinstance(t, dict) and 'gflops' in t['columns']]
    return {row[0]: row[t['columns'].index('gflops')] for t in tables for row in t['rows']}


def render(results: Dict[str, Any]) -> str:
    printed, rows = _printed(), []
    for name, found in results.items():
        base = name.split('_depla')[0]
        if '_depla' in name and base in results:
            row = [f'`{name}`']
            for key, scale in (('macs', 1e9), ('activations', 1e6), ('parameters', 1e6)):
                row += [f'{found[key] / scale:.2f}', f'{found[key] / results[base][key]:.3f}']
            rows.append([*row, f'{found["fused"] / 1e9:.2f}', printed.get(name, '')])
    header = ['', 'G multiply-adds', 'over the base', 'M activations', 'over the base', 'M parameters', 'over the base']
    return table([*header, 'G multiply-adds, fused', "the paper's"], rows)


def summary(results: Dict[str, Any]) -> List[Tuple[str, str, str]]:
    return [
        (f'multiply-adds of `{name}`', f'{results[name]["macs"] / results[base]["macs"]:.3f}', f'`{base}`, 224 pixels')
        for name, base in (('resnet50_depla', 'resnet50'),)
        if name in results
    ]
