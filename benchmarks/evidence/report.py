"""Tables, verdicts and plots of docs/evidence.md, from the records."""

import json
import statistics
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
from scipy import stats

from ..record import save_plot, table
from . import study
from .arms import ARMS
from .conditioning import conditioning, search
from .study import RATES, best_rate, final_jobs, load

DOCS = Path(__file__).parents[2] / 'docs' / 'evidence.md'
PLOT = DOCS.parent / 'evidence.svg'
PAPER = Path(__file__).parents[1] / 'paper_results.json'
TOP1 = 'eval_top1'
LOSS = 'train_loss'
DETECTION = ('AP', 'AP50', 'AP_S', 'AP_M', 'AP_L')

# Claims of the paper or questions of a reader, as a difference of two arms in a metric, and the paper's rows for it.
_STANDARD, _FPN, _COCO = 'imagenet_standard_training', 'fpn_temperature', 'coco_backbones'
CLAIMS = (
    ('DEPLA is better than the base', 'depla', 'base', TOP1, (_STANDARD, 'resnet50_depla', 'resnet50', 'top1')),
    ('so it is in every other of six blocks', 'depla-deep', 'base-deep', TOP1, None),
    ('so it is after three times as many epochs', 'depla-long', 'base-long', TOP1, None),
    (
        'adaptive DEPLA is better than the base', 'adaptive', 'base', TOP1,
        ('plain_vs_adaptive', 'resnet50_depla_adaptive', 'resnet50', 'top1'),
    ),
    ('DEPLA adds to SE', 'se-depla', 'se', TOP1, (_STANDARD, 'seresnet50_depla', 'seresnet50', 'top1')),
    (
        'adaptive is at least as good as plain DEPLA', 'adaptive', 'depla', TOP1,
        ('plain_vs_adaptive', 'resnet50_depla_adaptive', 'resnet50_depla', 'top1'),
    ),
    ('replacing the sum is better than adding to it', 'depla', 'kept', TOP1, None),
    ('DEPLA is better than as many other parameters', 'depla', 'pooled', TOP1, None),
    ('DEPLA is better than the base in FishNet', 'fishnet-depla', 'fishnet', TOP1, None),
    (
        'FPN-DEPLA is better than FPN', 'fpn-depla-0.5', 'fpn', 'eval_AP',
        (_FPN, ['fpn_depla', 0.5], 'fpn', 'box_ap'),
    ),
    ('so it is in masks (asked after these runs)', 'fpn-depla-0.5', 'fpn', 'eval_mask_AP', None),
    (
        'T = 0.5 is better than T = 1 in FPN-DEPLA', 'fpn-depla-0.5', 'fpn-depla-1.0', 'eval_AP',
        (_FPN, ['fpn_depla', 0.5], ['fpn_depla', 1.0], 'box_ap'),
    ),
    (
        'a lower T helps small objects', 'fpn-depla-0.2', 'fpn-depla-1.0', 'eval_AP_S',
        (_FPN, ['fpn_depla', 0.2], ['fpn_depla', 1.0], 'box_ap_s'),
    ),
    (
        'a FishNet-DEPLA backbone is better than FishNet', 'backbone-fishnet-depla', 'backbone-fishnet', 'eval_AP',
        (_COCO, 'fishnet150_depla', 'fishnet150', 'mask_rcnn_box_ap_s_m_l'),
    ),
    (
        'so it is in masks', 'backbone-fishnet-depla', 'backbone-fishnet', 'eval_mask_AP',
        (_COCO, 'fishnet150_depla', 'fishnet150', 'mask_rcnn_mask_ap_s_m_l'),
    ),
)  # fmt: skip


def _half_width(test: Any) -> float:
    """Half the 95% confidence interval of a t test of scipy."""
    low, high = test.confidence_interval(0.95)
    return float(high - low) / 2


def final(arm: str, metric: str) -> Optional[List[float]]:
    """A metric at the end of each final run, in the order of the seeds; None until all are on record.

    Accuracies and average precisions are in percent.
    """
    runs = [load(job) for job in final_jobs(arm)]
    if not runs or None in runs:
        return None
    scale = 100 if '_AP' in metric else 1  # recorded as a fraction
    return [scale * run['results'][metric][-1] for run in runs]


def average(values: Sequence[float]) -> Tuple[float, float]:
    """Mean of some runs and half its 95% confidence interval, by Student's t distribution."""
    return statistics.mean(values), _half_width(stats.ttest_1samp(values, 0))


def difference(arm: str, other: str, metric: str) -> Optional[Tuple[float, float]]:
    """Mean of an arm's metric minus another's, and half its 95% confidence interval.

    By Welch's t test for independent samples: two networks with the same seed share little but the data order.
    """
    values, others = final(arm, metric), final(other, metric)
    if values is None or others is None:
        return None
    test = stats.ttest_ind(values, others, equal_var=False)
    return statistics.mean(values) - statistics.mean(others), _half_width(test)


def _text(mean_and_half: Optional[Tuple[float, float]], sign: str = '') -> str:
    return 'not run' if mean_and_half is None else f'{mean_and_half[0]:{sign}.2f} ± {mean_and_half[1]:.2f}'


def _task(task: str) -> List[str]:
    return [name for name, arm in ARMS.items() if arm.task == task]


def classification() -> str:
    rows = []
    for name in _task('classification'):
        arm = ARMS[name]
        values, losses = final(name, TOP1), final(name, LOSS)
        model = timm.create_model(arm.model, device='meta', num_classes=10, in_chans=1, **arm.kwargs)
        rows.append(
            [
                arm.label,
                f'{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.3f}',
                best_rate(name) or '',
                _text(values and average(values)),
                '' if name == arm.base else f'{_text(difference(name, arm.base, TOP1), "+")} ({ARMS[arm.base].label})',
                f'{statistics.mean(losses):.3f}' if losses else '',
                ' '.join(f'{value:.2f}' for value in values or ()),
            ]
        )
    header = ['', 'M parameters', 'learning rate', 'top-1 (%)', 'gain (over)', 'training loss', 'each seed']
    return table(header, rows)


def tuning() -> str:
    rows = []
    for name in _task('classification'):
        if not ARMS[name].rate_of:
            tops = study.tuning(name)
            rows.append(
                [ARMS[name].label, *('' if (top := tops.get(rate)) is None else f'{top:.2f}' for rate in RATES)]
            )
    return table(['', *RATES], rows)


def detection() -> str:
    rows = []
    for name in _task('detection'):
        for kind, prefix in (('box', ''), ('mask', 'mask_')):
            values = [final(name, f'eval_{prefix}{metric}') for metric in DETECTION]
            seeds = ' '.join(f'{value:.2f}' for value in values[0] or ())
            rows.append([ARMS[name].label, kind, *(_text(v and average(v)) for v in values), seeds])
    return table(['', '', *DETECTION, 'AP of each seed'], rows)


def verdict(found: Optional[Tuple[float, float]]) -> str:
    """'confirmed' or 'refuted' if the interval excludes zero, else 'undecided'; 'not run' without runs."""
    if found is None:
        return 'not run'
    mean, half = found
    return 'undecided' if abs(mean) <= half else 'confirmed' if mean > 0 else 'refuted'


def _paper_difference(name: str, better: Sequence[Any], worse: Sequence[Any], column: str) -> float:
    """Difference of two rows of one of the paper's tables; rows are named by their first columns."""
    printed = json.loads(PAPER.read_text())[name]
    found = []
    for key in (better, worse):
        key = [key] if isinstance(key, str) else key
        row = next(row for row in printed['rows'] if row[: len(key)] == key)
        value = row[printed['columns'].index(column)]
        found.append(value[0] if isinstance(value, list) else value)  # AP, before AP by size
    return found[0] - found[1]


def claims() -> str:
    rows = []
    for claim, arm, other, metric, paper in CLAIMS:
        found = difference(arm, other, metric)
        rows.append(
            [
                claim,
                f'{ARMS[arm].label} less {ARMS[other].label}, {metric.removeprefix("eval_").replace("_", " ")}',
                '' if paper is None else f'{_paper_difference(*paper):+.1f}',
                _text(found, '+'),
                f'**{verdict(found)}**',
            ]
        )
    return table(['claim', 'measured', "the paper's", 'ours', ''], rows)


def plot() -> None:
    """Plot the gain of each finished arm over its base, with its interval: in top-1, or in box AP.

    Each base of detection has its own panel, since their intervals differ in size.
    """
    from matplotlib import pyplot as plt

    panels: Dict[str, Dict[str, Tuple[float, float]]] = {}
    for name, arm in ARMS.items():
        base = ARMS[arm.base].label
        metric, title = (TOP1, 'top-1') if arm.task == 'classification' else ('eval_AP', f'box AP over {base}')
        if name != arm.base and (gain := difference(name, arm.base, metric)):
            panels.setdefault(title, {})[f'{arm.label} less {base}'] = gain
    if not panels:
        return
    heights = [len(gains) + 2 for gains in panels.values()]
    figure, rows = plt.subplots(
        len(panels), figsize=(8, 0.28 * sum(heights)), height_ratios=heights, squeeze=False, layout='constrained'
    )
    for axes, (title, gains) in zip(rows.flat, panels.items(), strict=True):
        means, halves = zip(*gains.values(), strict=True)
        axes.errorbar(means, list(gains), xerr=halves, fmt='o', markersize=4, capsize=2, color='tab:blue')
        axes.axvline(0, color='0.7', linewidth=1)
        axes.invert_yaxis()
        axes.margins(y=0.5 / len(gains))
        axes.set_xlabel(f'{title}, percentage points')
    save_plot(figure, PLOT)
    plt.close(figure)


def write() -> None:
    """Write each table between its markers in docs/evidence.md, if there are any, and draw the plot."""
    text = DOCS.read_text()
    for make in (conditioning, search, claims, classification, detection, tuning):
        start, end = f'<!-- {make.__name__} -->\n', '\n<!-- end -->'
        if start in text:
            before, rest = text.split(start)
            text = before + start + make() + end + rest.partition(end)[2]
    DOCS.write_text(text)
    plot()
