"""Tables, verdicts and the plot of docs/evidence.md, protocol.md and search.md, from the records."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
from scipy import stats

from ..record import save_plot, table
from . import study
from .arms import ARMS, CONTEXT
from .conditioning import conditioning, search
from .proxies import PROXIES
from .starts import seeds, starts
from .study import RATES, best_rate, final_jobs

DOCS = Path(__file__).parents[2] / 'docs'
PAGES = ('evidence.md', 'protocol.md', 'search.md')
PAPER = Path(__file__).parents[1] / 'paper_results.json'
LEVEL = 0.05  # of a verdict, after Holm's correction

# Each claim: an arm, the one that it is compared with, and the rows of the paper's tables that say the same.
_STANDARD, _ADAPTIVE, _FPN, _COCO = (
    'imagenet_standard_training', 'plain_vs_adaptive', 'fpn_temperature', 'coco_backbones',
)  # fmt: skip
CALIBRATION = tuple((arm, 'base', None) for arm in CONTEXT)
CLAIMS = (
    ('depla', 'base', (_STANDARD, 'resnet50_depla', 'resnet50', 'top1')),
    ('adaptive', 'base', (_ADAPTIVE, 'resnet50_depla_adaptive', 'resnet50', 'top1')),
    ('kept', 'base', None),
    ('adaptive-kept', 'base', None),
    ('se-depla', 'se', (_STANDARD, 'seresnet50_depla', 'seresnet50', 'top1')),
    ('depla', 'pooled', None),
    ('depla-sgd', 'base-sgd', None),
    ('adaptive-sgd', 'base-sgd', None),
    ('kept-sgd', 'base-sgd', None),
    ('fishnet-depla', 'fishnet', None),
    ('inserted', 'again', None),
)
DETECTION = (
    ('fpn-depla-0.2', 'fpn', (_FPN, ['fpn_depla', 0.2], 'fpn', 'box_ap')),
    ('fpn-depla-0.5', 'fpn', (_FPN, ['fpn_depla', 0.5], 'fpn', 'box_ap')),
    ('fpn-depla-1.0', 'fpn', (_FPN, ['fpn_depla', 1.0], 'fpn', 'box_ap')),
    ('fpn-depla-0.5', 'fpn-norm', None),
    ('backbone-fishnet-depla', 'backbone-fishnet', (_COCO, 'fishnet150_depla', 'fishnet150', 'mask_rcnn_box_ap_s_m_l')),
    ('backbone-fishnet-depla-norm', 'backbone-fishnet-norm', None),
)


@dataclass(frozen=True)
class Difference:
    """A difference of two means by Welch's t test, as networks of one seed share little but the order of the data.

    Networks that start from the same trunks are compared in pairs.
    """

    mean: float
    half: float
    """Half of its 95% confidence interval."""
    p: float

    def __str__(self) -> str:
        return f'{self.mean:+.2f} ± {self.half:.2f}'


def final(data: str, arm: str) -> Optional[List[float]]:
    """Top-1 or box AP in percent at the end of each run that counts, by seed; None until all are on record."""
    runs = [study.load(job) for job in final_jobs(data, arm)]
    if not runs or None in runs:
        return None
    metric = study.metric(arm)
    scale = 100 if '_AP' in metric else 1  # recorded as a fraction
    return [scale * run['results'][metric][-1] for run in runs]


def average(values: Sequence[float]) -> str:
    """Mean of some runs and half its 95% confidence interval, by Student's t distribution."""
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return f'{statistics.mean(values):.2f} ± {(high - low) / 2:.2f}'


def difference(data: str, arm: str, other: str) -> Optional[Difference]:
    """An arm less another; None until all runs of both are on record."""
    values, others = final(data, arm), final(data, other)
    if values is None or others is None:
        return None
    test = stats.ttest_rel(values, others) if ARMS[arm].trunk else stats.ttest_ind(values, others, equal_var=False)
    low, high = test.confidence_interval(0.95)
    return Difference((low + high) / 2, (high - low) / 2, float(test.pvalue))


def correct(found: Sequence[Optional[Difference]]) -> List[Optional[float]]:
    """Holm's corrected p values, in the order given; None where there is no difference."""
    order = sorted((i for i, each in enumerate(found) if each is not None), key=lambda i: found[i].p)
    corrected: List[Optional[float]] = [None] * len(found)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * found[i].p))
        corrected[i] = highest
    return corrected


def verdict(found: Optional[Difference], p: Optional[float]) -> str:
    """'gains' or 'costs' where the corrected p value is below the level, else 'undecided'; 'not run' without runs."""
    if found is None or p is None:
        return 'not run'
    return 'undecided' if p >= LEVEL else 'gains' if found.mean > 0 else 'costs'


def _paper_difference(name: str, better: Sequence[Any], worse: Sequence[Any], column: str) -> str:
    """Difference of two rows of one of the paper's tables; rows are named by their first columns."""
    printed = json.loads(PAPER.read_text())[name]
    found = []
    for key in (better, worse):
        key = [key] if isinstance(key, str) else key
        row = next(row for row in printed['rows'] if row[: len(key)] == key)
        value = row[printed['columns'].index(column)]
        found.append(value[0] if isinstance(value, list) else value)  # AP, before AP by size
    return f'{found[0] - found[1]:+.1f}'


def _compare(claims: Sequence[Tuple[str, str, Any]], sets: Sequence[str]) -> str:
    """A table of claims on each set where a claim has been run. The correction is over the claims of a set."""
    rows = []
    for data in sets:
        found = [difference(data, arm, other) for arm, other, _ in claims]
        for (arm, other, paper), each, p in zip(claims, found, correct(found), strict=True):
            if each is not None:
                row = [data, f'{ARMS[arm].label} less {ARMS[other].label}', str(each)]
                row.append(f'{p:.3f}' if p >= 0.001 else '< 0.001')
                row.append('' if paper is None else _paper_difference(*paper))
                rows.append([*row, f'**{verdict(each, p)}**'])
    return table(['set', 'difference', '95% interval', 'corrected p', "the paper's, on ImageNet or COCO", ''], rows)


def calibration() -> str:
    return _compare(CALIBRATION, list(PROXIES))


def claims() -> str:
    return _compare(CLAIMS, list(PROXIES))


def detection() -> str:
    return _compare(DETECTION, ['scenes'])


def networks() -> str:
    rows = []
    for data in (*PROXIES, 'scenes'):
        for name, arm in ARMS.items():
            values = final(data, name)
            if values is None:
                continue
            parameters = ''
            if arm.task == 'classification':
                kwargs = {**arm.kwargs, **(PROXIES[data].kwargs if arm.model.startswith('narrow_resnet') else {})}
                model = timm.create_model(arm.model, device='meta', num_classes=10, in_chans=1, **kwargs)
                parameters = f'{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.3f}'
            seeds = ' '.join(f'{value:.2f}' for value in values)
            rows.append([data, arm.label, parameters, best_rate(data, name), average(values), seeds])
    return table(['set', '', 'M parameters', 'learning rate', 'top-1 or box AP (%)', 'each seed'], rows)


def tuning() -> str:
    """Mean of the tuning seeds at each learning rate, and how many seeds there are where not yet all are."""
    rows = []
    for data in (*PROXIES, 'scenes'):
        for name in ARMS:
            cells = []
            for rate in RATES:
                jobs = study.tuning_jobs(data, name, rate)
                runs = [run for job in jobs if (run := study.load(job))]
                scores = [run['results'][study.metric(name)][-1] * (100 if data == 'scenes' else 1) for run in runs]
                part = '' if len(scores) in (0, len(jobs)) else f' ({len(scores)} of {len(jobs)})'
                cells.append(f'{statistics.mean(scores):.2f}{part}' if scores else '')
            if any(cells):
                rows.append([data, ARMS[name].label, *cells])
    return table(['set', '', *RATES], rows)


def plot() -> None:
    """Plot the difference of each finished claim, a panel for each set."""
    from matplotlib import pyplot as plt

    panels: Dict[str, Dict[str, Difference]] = {}
    for data, asked in [(data, (*CALIBRATION, *CLAIMS)) for data in PROXIES] + [('scenes', DETECTION)]:
        for arm, other, _ in asked:
            if found := difference(data, arm, other):
                panels.setdefault(data, {})[f'{ARMS[arm].label} less {ARMS[other].label}'] = found
    if not panels:
        return
    heights = [len(found) + 2 for found in panels.values()]
    figure, places = plt.subplots(
        len(panels), figsize=(8, 0.28 * sum(heights)), height_ratios=heights, squeeze=False, layout='constrained'
    )
    for axes, (title, found) in zip(places.flat, panels.items(), strict=True):
        means, halves = [each.mean for each in found.values()], [each.half for each in found.values()]
        axes.errorbar(means, list(found), xerr=halves, fmt='o', markersize=4, capsize=2, color='tab:blue')
        axes.axvline(0, color='0.7', linewidth=1)
        axes.invert_yaxis()
        axes.margins(y=0.5 / len(found))
        axes.set_xlabel(f'{title}: percentage points')
    save_plot(figure, DOCS / 'evidence.svg')
    plt.close(figure)


def write() -> None:
    """Write each table between its markers in the pages, where there are any, and draw the plot."""
    for name in PAGES:
        text = (DOCS / name).read_text()
        for make in (calibration, claims, detection, networks, tuning, conditioning, starts, seeds, search):
            start, end = f'<!-- {make.__name__} -->\n', '\n<!-- end -->'
            if start in text:
                before, rest = text.split(start)
                text = before + start + make() + end + rest.partition(end)[2]
        (DOCS / name).write_text(text)
    plot()
