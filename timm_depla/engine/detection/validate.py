"""Average precision of a detector, by one process or many; implements `validate_detection.py`."""

import json
import logging
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from torchvision.models.detection import FasterRCNN

from timm_depla.data import UnreadableError
from timm_depla.detection import create_detector, from_pretrained
from timm_depla.detection.coco import CocoDetection, evaluate_coco, to_results
from timm_depla.errors import ConfigError
from timm_depla.files import escape
from timm_depla.loading import load_weights, run_arguments, trained_data

from ..config import parse_args, updated
from ..device import autocast, compile_depla
from ..distributed import Interrupt, World, explain_lost_peers, setup_world
from ..metrics import check_results, write_results
from ..progress import progress
from .flags import create_detection_validate_parser
from .loaders import ValidationLoader, open_split

_logger = logging.getLogger(__name__)


@dataclass
class Evaluation:
    """Result of an evaluation.

    Attributes:
        scores: COCO's metrics of boxes, 'AP' to 'AR_L', and of masks, 'mask_AP' to 'mask_AR_L', from 0 to 1.
        tables: COCO's tables, by kind: 'bbox' and 'segm'. In the primary process only.
        results: The detections in COCO's format. In the primary process only.
        images: Number of validated images.
    """

    scores: Dict[str, float] = field(default_factory=dict)
    tables: Dict[str, str] = field(default_factory=dict)
    results: List[Dict[str, Any]] = field(default_factory=list)
    images: int = 0


@torch.inference_mode()
def evaluate(
    model: FasterRCNN, loader: ValidationLoader, args: Namespace, world: World, interrupt: Optional[Interrupt] = None
) -> Evaluation:
    """Average precision and recall over all processes' images, as COCO defines them.

    Args:
        model: The detector, on the run's device; its label i is the i-th category of `loader.category_ids`.
        loader: The images.
        args: Arguments: `device`, `amp`, `amp_dtype`, `evaluator`.
        world: The processes that share the images.
        interrupt: Ends the evaluation early, by Interrupted.
    """
    model.eval()
    found: List[Dict[str, Any]] = []
    for images, targets in progress('validation', 'images', iterable=loader) if world.is_primary else loader:
        with autocast(args):
            detections = model(images)
        for target, detection in zip(targets, detections, strict=True):
            found += to_results(target['image_id'], detection, loader.category_ids)
        if interrupt is not None and interrupt.signal:
            break
    if interrupt is not None:
        interrupt.check()
    shares = world.gather(found)
    evaluation = Evaluation(images=len(loader.dataset))
    if world.is_primary:
        place = {image_id: i for i, image_id in enumerate(loader.dataset.image_ids)}
        evaluation.results = sorted((r for share in shares for r in share), key=lambda r: place[r['image_id']])
        for prefix, kind in {'': 'bbox', 'mask_': 'segm'}.items():
            if kind == 'bbox' or (model.roi_heads.has_mask() and loader.dataset.has_masks):
                fast = args.evaluator == 'faster-coco-eval'
                scores, evaluation.tables[kind] = evaluate_coco(loader.dataset.coco, evaluation.results, kind, fast)
                evaluation.scores.update({f'{prefix}{name}': score for name, score in scores.items()})
    evaluation.scores = world.broadcast(evaluation.scores)
    return evaluation


def _open(args: Namespace) -> Tuple[FasterRCNN, CocoDetection]:
    """Open the detector (a run, a checkpoint, or a weights file with `args.model`) and the data."""
    path = Path(args.target)
    is_weights = path.is_file() and bool(args.model)
    try:
        model = None if is_weights else from_pretrained(path.parent if path.is_file() else args.target)
        dataset = open_split(args, args.val_split)
        if model is None:
            classes = args.classes or len(dataset.category_ids) + 1
            model = create_detector(args.model, num_classes=classes)
            model.category_ids = list(range(1, classes)) if args.classes else dataset.category_ids
            load_weights(model, args.target, heads=())
    except ConfigError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        hint = '; a file of weights needs --model' if path.is_file() and not args.model else ''
        raise ConfigError(f'{error}{hint}') from error
    return model, dataset


def validate(args: Namespace) -> Evaluation:
    """Validate a detector on `args.data_dir`, by default on the data that its run was trained with.

    Prints COCO's tables, and writes the detections if `args.results_file` asks for them. ConfigError if the target does
    not load, the data is missing or unreadable, or their categories do not match.
    """
    split = args.val_split or run_arguments(args.target).get('val_split', 'val')
    args = updated(args, data_dir=args.data_dir or trained_data(args.target)['data_dir'], val_split=split)
    check_results(args.results_file)
    world = setup_world(args.device)
    model, dataset = _open(args)
    model.to(world.device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    compile_depla(args, model)
    if unknown := set(dataset.category_ids) - set(model.category_ids):
        raise ConfigError(f"'{args.target}' does not know the categories {sorted(unknown)[:5]} of '{args.data_dir}'")
    loader = ValidationLoader(args, dataset, world, model.category_ids)
    try:
        with explain_lost_peers(world):
            evaluation = evaluate(model, loader, args, world)
    except UnreadableError as error:
        raise ConfigError(f'cannot read an image: {str(error).splitlines()[-1]}') from error
    if world.is_primary:
        for kind, table in evaluation.tables.items():
            print(f'{escape(f"{kind}, {args.target} on {args.data_dir} {args.val_split}")}\n{table}', flush=True)
        if args.results_file:
            write_results(args.results_file, json.dumps(evaluation.results) + '\n')
    return evaluation


def main() -> None:
    """Run the command line."""
    validate(parse_args(create_detection_validate_parser()))
