"""Why a detector over FishNet learns late: its first 400 steps with features, or a pyramid, of another scale.

If the scale is the cause, a ResNet's features enlarged learn late, too, and FishNet's reduced, or with norms after
them, in time; if not, the cause is elsewhere.
"""

import json
import signal
import statistics
import tempfile
from argparse import Namespace
from collections import OrderedDict
from itertools import product
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import torch.nn as nn
from torch import Tensor

from timm_depla.engine import training
from timm_depla.engine.config import parse_args, updated
from timm_depla.engine.detection import train as detection
from timm_depla.engine.detection.flags import create_detection_parser
from timm_depla.engine.distributed import World
from timm_depla.engine.run import Run
from timm_depla.hub.record import create_record

from ..record import table
from . import study
from .arms import ARMS, NORM
from .conditioning import FIRST

RECORDS = study.RECORDS.with_name('starts.jsonl')
RATE = 0.027  # the best of each without norms
STEPS = 400  # of 1,544, in the third epoch of eight
LAST = 100  # the losses are means of


class Variant(NamedTuple):
    label: str
    model: str
    scale: float = 1.0  # of the features that the pyramid reads
    kwargs: Dict[str, Any] = {}


VARIANTS = (
    Variant('ResNet', 'maskrcnn_test_resnet_fpn'),
    Variant('ResNet, features times 3', 'maskrcnn_test_resnet_fpn', 3.0),
    Variant('FishNet', 'maskrcnn_test_fishnet_fpn'),
    Variant('FishNet, features divided by 3', 'maskrcnn_test_fishnet_fpn', 1 / 3),
    Variant('FishNet, norms in the pyramid', 'maskrcnn_test_fishnet_fpn', kwargs=NORM),
    Variant('FishNet-DEPLA', 'maskrcnn_test_fishnet_depla_fpn'),
    Variant('FishNet-DEPLA, norms in the pyramid', 'maskrcnn_test_fishnet_depla_fpn', kwargs=NORM),
)


def measure(variant: Variant, seed: int) -> None:
    """Begin to train a detector, and record the losses and the scale of its maps before training."""
    losses: List[Dict[str, float]] = []
    scales: Dict[str, float] = {}

    def scale(fpn: nn.Module, inputs: Tuple[Any]) -> Tuple[Any]:
        return (OrderedDict((name, variant.scale * x) for name, x in inputs[0].items()),)

    def watch(name: str, level: Any) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, maps: Any) -> None:
            if not maps[level].is_meta:  # as the plan counts operations
                scales.setdefault(name, maps[level].std().item())

        return hook

    def add(task: nn.Module, inputs: Any, out: Dict[str, Tensor]) -> None:
        losses.append({name: loss.item() for name, loss in out.items()})
        if len(losses) == STEPS:
            signal.raise_signal(signal.SIGTERM)

    def build(args: Namespace, world: World, is_fresh: bool = True) -> Run:
        run = detection.build(args, world, is_fresh)
        backbone = run.model.backbone
        backbone.body.register_forward_hook(watch('features', 0))
        backbone.fpn.register_forward_pre_hook(scale)
        backbone.fpn.register_forward_hook(watch('pyramid', '0'))
        run.state.task.register_forward_hook(add)
        return run

    flags = ['--recipe', 'scenes', '--model', variant.model, '--seed', str(seed), '--lr', str(RATE), '--device', 'cpu']
    with tempfile.TemporaryDirectory() as output:
        flags += ['--epochs', '8', '--val-interval', '8', '--workers', '0', '--output', output]
        args = parse_args(create_detection_parser(), flags)
        training.train(updated(args, model_kwargs={**args.model_kwargs, **variant.kwargs}), build)
    results = {key: statistics.mean(step[key] for step in losses[-LAST:]) for key in losses[0]}
    command = f'python -m benchmarks.evidence starts --seed {seed}'
    entry = create_record(command, {**scales, **results}, variant=variant.label, seed=seed)
    with RECORDS.open('a') as file:
        file.write(json.dumps(entry) + '\n')


def run(seed: int) -> None:
    """Measure each variant with a seed."""
    for variant in VARIANTS:
        measure(variant, seed)


def starts() -> str:
    """The scale (standard deviation) of the finest maps before training, and losses early in training."""
    runs = {(run['variant'], run['seed']): run['results'] for run in map(json.loads, RECORDS.read_text().splitlines())}
    rows = []
    for variant in VARIANTS:
        if found := [results for (label, _), results in runs.items() if label == variant.label]:
            scales = [' '.join(f'{results[key]:.1f}' for results in found) for key in ('features', 'pyramid')]
            losses = [' '.join(f'{results[key]:.2f}' for results in found) for key in ('loss_mask', 'loss')]
            rows.append([variant.label, *scales, *losses])
    return table(['', 'features', 'pyramid', 'mask loss', 'whole loss'], rows)


def seeds() -> str:
    """Detectors over FishNet, the first version too: how fast each seed starts, and where it ends."""
    arms = {name: arm for name, arm in ARMS.items() if name.startswith('backbone-fishnet')}
    rows = []
    for version, path in (('first version', FIRST), ('', None)):
        for (name, arm), rate in product(arms.items(), (0.009, 0.027, 0.03)):
            jobs = [study.Job('scenes', name, seed, rate) for seed in range(arm.seeds)]
            if found := [run['results'] for job in jobs if (run := study.load(job, path))]:
                losses = ' '.join(f'{results["train_loss"][2]:.2f}' for results in found)
                scores = ' '.join(f'{100 * results["eval_AP"][-1]:.1f}' for results in found)
                rows.append([', '.join(filter(None, (arm.label, version))), rate, losses, scores])
    return table(['', 'learning rate', 'training loss of the third epoch, each seed', 'box AP, each seed'], rows)
