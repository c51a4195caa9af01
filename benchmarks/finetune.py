"""Fine-tuning with DEPLA inserted and without, by the recipe `finetune` from the same weights.

timm's `test_convnext` is trained on the embedded digits 0 to 4 and fine-tuned on all ten, alone and with DEPLA. The
scores are those of the weight average in the last epoch. DEPLA adds weights that train at the full rate, where the
network alone has only its classifier. There is no control with as many parameters, so a gain may be due to them.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Tuple

from timm_depla.data import digits_folder
from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.classification.train import train
from timm_depla.engine.config import parse_args

from .pairs import mean_text, score_cells
from .record import read_summary, table

BACKBONE = 'test_convnext'
IMAGES = ['--img-size', '64', '--crop-pct', '1', '--hflip', '0', '--color-jitter', '0', '--scale', '0.8', '1']
VARIANTS = {
    'alone': ['--model', BACKBONE],
    'with DEPLA': ['--model', 'backbone_depla', '--model-kwargs', f'backbone={BACKBONE}'],
}
FLAGS = dict(epochs=20, seed=[0, 1, 2, 3, 4])


def _train(output: str, name: str, *flags: str) -> float:
    """Validation top-1 of the last epoch of a run."""
    train(parse_args(create_train_parser(), [*flags, *IMAGES, '--output', output, '--experiment', name]))
    return round(float(read_summary(Path(output, name))[-1]['eval_top1']), 3)


def _write_half(folder: Path) -> Path:
    """Link the digits 0 to 4 in their own folder."""
    for split in ('train', 'validation'):
        (folder / split).mkdir(parents=True)
        for label in range(5):
            (folder / split / str(label)).symlink_to(digits_folder() / split / str(label))
    return folder


def run(args: argparse.Namespace) -> Dict[str, Any]:
    results: Dict[str, Any] = dict(epochs=args.epochs, pretrained=[], **{name: [] for name in VARIANTS})
    for seed in map(str, args.seed):
        with tempfile.TemporaryDirectory() as output:
            half = str(_write_half(Path(output, 'half')))
            recipe = ['--recipe', 'digits', '--epochs', '8', '--model', BACKBONE, '--opt', 'adamw', '--lr', '0.004']
            results['pretrained'].append(_train(output, 'pretrained', half, *recipe, '--seed', seed))
            recipe = [str(digits_folder()), '--recipe', 'finetune', '--epochs', str(args.epochs), '--seed', seed]
            recipe += ['--initial-checkpoint', f'{output}/pretrained/best/model.safetensors']
            for name, model in VARIANTS.items():
                results[name].append(_train(output, name.replace(' ', ''), *recipe, *model))
                print(name, seed, results[name][-1], flush=True)
    return results


def _gain(results: Dict[str, Any]) -> str:
    return mean_text([score - alone for score, alone in zip(results['with DEPLA'], results['alone'], strict=True)])


def render(results: Dict[str, Any]) -> str:
    gains = {'alone': '', 'with DEPLA': _gain(results)}
    rows = [[name, *score_cells(results[name]), gain] for name, gain in gains.items()]
    before = f'{statistics.mean(results["pretrained"]):.2f}'
    about = (
        f'{results["epochs"]} epochs of fine-tuning; top-1 in percent. On the five digits, the networks had {before}.'
    )
    return f'{about}\n\n{table(["", "each seed", "mean", "gain"], rows)}'


def summary(results: Dict[str, Any]) -> List[Tuple[str, str, str]]:
    what, on = (
        'top-1 of fine-tuning with DEPLA, difference in points',
        f'fine-tuning without, {len(results["alone"])} seeds',
    )
    return [(what, _gain(results), on)]
