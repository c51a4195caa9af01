"""Plans of the paper's training strategies."""

import math
import re

import pytest
from helpers import SMALL, fit

from timm_depla.data import digits_folder
from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.config import parse_args, updated
from timm_depla.engine.plan import learning_rates

STEPS = 5004  # of 256 images an epoch of ImageNet


def closed_form(epoch, epochs, start):
    """Linear warm-up to 0.2 over 5 epochs, within a half period of the cosine."""
    return start + (0.2 - start) * epoch / 5 if epoch < 5 else 0.1 * (1 + math.cos(math.pi * epoch / epochs))


@pytest.mark.parametrize(
    'recipe,epochs,start,points',
    [('better', 400, 0.0, [0, 2.5, 5, 200, 400]), ('standard', 100, 0.02, [0, 2.5, 5, *range(10, 101, 10)])],
)
def test_learning_rate(recipe, epochs, start, points):
    args = parse_args(create_train_parser(), ['--recipe', recipe])
    assert args.epochs == epochs
    expected = [closed_form(point, epochs, start) for point in points]
    assert learning_rates(updated(args, lr=args.lr_base), STEPS, points) == pytest.approx(expected, abs=1e-12)


BETTER = (
    'resnet50_depla, 23.98 M parameters, 4.18 G multiply-adds at 224 x 224',
    "1,438 training images of 'train', 359 validation images of 'validation', 10 classes",
    '1 process x 256 images = 256 images an update',
    '400 epochs x 5 steps = 2,000 steps',
    'rate    0 at epoch 0, ', '0.1999 at epoch 5, 0.1707 at epoch 100, 0.1 at epoch 200, 0.02929 at epoch 300',
    "aa='original'", 'mixup=0.2', 'smoothing=0.1', 'momentum=0.9', 'weight_decay=5e-05', 'warmup_epochs=5',
    "sched='cosine'", "opt='sgd'", 'hflip=0.5', 'color_jitter=0.0',
)  # fmt: skip
STANDARD = (
    '1 process x 32 images x 4 steps accumulated = 128 images an update',
    'rate    0.02 at epoch 0, ', '0.09938 at epoch 5, 0.08536 at epoch 25',  # 0.1 for a batch of 128
    'mixup=0.0',
)  # fmt: skip


@pytest.mark.parametrize(
    'flags,parts', [('better --batch-size 256', BETTER), ('standard --grad-accum-steps 4', STANDARD)]
)
def test_plan_of_a_strategy(flags, parts, capsys, tmp_path):
    assert fit(digits_folder(), '--recipe', *flags.split(), '--output', tmp_path / 'out', '--dry-run') == 0
    text = capsys.readouterr().out
    assert [part for part in (*parts, f'folder  {tmp_path / "out"}') if part not in text] == []
    assert ("aa='" in text) == ('better' in flags)
    assert not (tmp_path / 'out').exists()


def test_plan_of_a_run_has_what_differs_from_the_recipe(capsys, tmp_path):
    fit(*SMALL, '--epochs', 1, '--output', tmp_path, '--experiment', 'run')
    arguments = re.search(r'with    (.*?)\n(?! )', capsys.readouterr().out, re.S)[1]
    assert 'epochs=1' in arguments and 'img_size=32' in arguments and "experiment='run'" in arguments
    assert 'weight_decay' not in arguments and 'batch_size' not in arguments
