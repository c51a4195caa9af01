"""Cost of each model: parameters, multiply-adds and activations, beside the multiply-adds that the paper prints.

Multiply-adds are those of convolutions and matrix products, activations the output elements of convolutions and linear
layers, both with every layer of the model counted. "Fused" counts those after timm's `reparameterize_model`: a residual
block that does not make its candidate skips its last convolution.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Dict

import timm
from timm.utils import reparameterize_model

from timm_depla.models.cost import count_cost, count_macs

from .record import table


def add_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--model', nargs='+', default=['*_depla*'], help='models, with wildcards')


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
    printed = _printed()
    rows = [
        [
            f'`{name}`',
            r['size'],
            *(f'{r[key] / 1e9:.2f}' for key in ('macs', 'fused')),
            printed.get(name, ''),
            *(f'{r[key] / 1e6:.1f}' for key in ('activations', 'parameters')),
        ]
        for name, r in results.items()
    ]
    return table(['model', 'pixels', 'G multiply-adds', 'fused', 'in the paper', 'M activations', 'M parameters'], rows)
