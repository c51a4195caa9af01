"""Tables, verdicts and plots of docs/evidence.md, from the records."""

import statistics
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

import timm
from scipy import stats

from ..record import table
from .arms import ARMS
from .study import RATES, TUNING_SEEDS, best_rate, final_jobs, load

DOCS = Path(__file__).parents[2] / 'docs' / 'evidence.md'
PLOT = DOCS.parent / 'evidence.svg'
TOP1 = 'eval_top1'
LOSS = 'train_loss'
DETECTION = ('AP', 'AP50', 'AP_S', 'AP_M', 'AP_L')

# The paper's claims, as a difference of two arms in a metric: what is claimed, the arm, what it is better than.
CLAIMS = (
    ('DEPLA is better than the base', 'depla', 'base', TOP1),
    ('adaptive DEPLA is better than the base', 'adaptive', 'base', TOP1),
    ('DEPLA adds to SE', 'se-depla', 'se', TOP1),
    ('adaptive is at least as good as plain DEPLA', 'adaptive', 'depla', TOP1),
    ('replacing the sum is better than adding to it', 'depla', 'added', TOP1),
    ('DEPLA is better than as many other parameters', 'depla', 'pooled', TOP1),
    ('DEPLA is better than the base in FishNet', 'fishnet-depla', 'fishnet', TOP1),
    ('FPN-DEPLA is better than FPN', 'fpn-depla-0.5', 'fpn', 'eval_AP'),
    ('T = 0.5 is better than T = 1 in FPN-DEPLA', 'fpn-depla-0.5', 'fpn-depla-1.0', 'eval_AP'),
    ('a lower T helps small objects', 'fpn-depla-0.2', 'fpn-depla-1.0', 'eval_AP_S'),
    ('a FishNet-DEPLA backbone is better than FishNet', 'backbone-fishnet-depla', 'backbone-fishnet', 'eval_AP'),
)

# The plot: what is measured, on which base, and the arms.
_RESNETS = [name for name, arm in ARMS.items() if arm.task == 'classification' and 'fishnet' not in name]
PANELS = (
    ('top-1', TOP1, 'base', [name for name in _RESNETS if name != 'base']),
    ('top-1', TOP1, 'fishnet', ['fishnet-depla']),
    ('box AP', 'eval_AP', 'fpn', ['fpn-depla-0.2', 'fpn-depla-0.5', 'fpn-depla-1.0']),
    ('box AP', 'eval_AP', 'backbone-fishnet', ['backbone-fishnet-depla']),
)


def interval(values: Sequence[float]) -> Tuple[float, float]:
    """Mean and half the width of its 95% confidence interval by Student's t distribution."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(stats.t.ppf(0.975, len(values) - 1)) * error


def final(arm: str, metric: str) -> Optional[List[float]]:
    """A metric at the end of each run that counts, in the order of the seeds; None until all are on record.

    Accuracies and average precisions are in percent.
    """
    runs = [load(job) for job in final_jobs(arm)]
    if not runs or None in runs:
        return None
    scale = 100 if '_AP' in metric else 1  # which is on record as a fraction
    return [scale * run['results'][metric][-1] for run in runs]


def difference(arm: str, other: str, metric: str) -> Optional[Tuple[float, float]]:
    """Mean of an arm's metric less another's, seed by seed, and half its 95% confidence interval."""
    values, others = final(arm, metric), final(other, metric)
    if values is None or others is None:
        return None
    return interval([a - b for a, b in zip(values, others, strict=True)])


def _text(mean_and_half: Optional[Tuple[float, float]], sign: str = '') -> str:
    return 'not run' if mean_and_half is None else f'{mean_and_half[0]:{sign}.2f} ± {mean_and_half[1]:.2f}'


def _task(task: str) -> List[str]:
    return [name for name, arm in ARMS.items() if arm.task == task]


def classification() -> str:
    rows = []
    for name in _task('classification'):
        values, losses = final(name, TOP1), final(name, LOSS)
        base = 'fishnet' if name.startswith('fishnet') else 'base'
        gain = difference(name, base, TOP1) if name != base else None
        model = timm.create_model(ARMS[name].model, device='meta', num_classes=10, in_chans=1, **ARMS[name].kwargs)
        rows.append(
            [
                ARMS[name].label,
                f'{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.3f}',
                best_rate(name) or '',
                _text(values and interval(values)),
                _text(gain, '+') if name != base else '',
                f'{statistics.mean(losses):.3f}' if losses else '',
                ' '.join(f'{value:.2f}' for value in values or ()),
            ]
        )
    header = ['', 'M parameters', 'learning rate', 'top-1 (%)', 'less the base', 'training loss', 'each seed']
    return table(header, rows)


def tuning() -> str:
    rows = []
    for name in _task('classification'):
        runs = {rate: [load((name, seed, rate)) for seed in TUNING_SEEDS] for rate in RATES}
        row = [
            '' if None in found else f'{statistics.mean(run["results"][TOP1][-1] for run in found):.2f}'
            for found in runs.values()
        ]
        rows.append([ARMS[name].label, *row])
    return table(['', *(f'learning rate {rate}' for rate in RATES)], rows)


def detection() -> str:
    rows = []
    for name in _task('detection'):
        for kind, prefix in (('box', ''), ('mask', 'mask_')):
            values = [final(name, f'eval_{prefix}{metric}') for metric in DETECTION]
            rows.append([ARMS[name].label, kind, *(_text(v and interval(v)) for v in values)])
    return table(['', '', *DETECTION], rows)


def verdict(found: Optional[Tuple[float, float]]) -> str:
    """Confirmed or refuted where the interval is on one side of zero."""
    if found is None:
        return 'not run'
    mean, half = found
    return 'undecided' if abs(mean) <= half else 'confirmed' if mean > 0 else 'refuted'


def claims() -> str:
    rows = []
    for claim, arm, other, metric in CLAIMS:
        found = difference(arm, other, metric)
        rows.append(
            [
                claim,
                f'{ARMS[arm].label} less {ARMS[other].label}, {metric.removeprefix("eval_").replace("_", " ")}',
                _text(found, '+'),
                f'**{verdict(found)}**',
            ]
        )
    return table(['claim', 'measured', 'difference', ''], rows)


def plot() -> None:
    """What each arm that has run gains over its base in top-1, or in AP of boxes, with its interval."""
    from matplotlib import pyplot as plt

    panels = {
        f'{title}, less {ARMS[base].label}': {
            ARMS[name].label: gain for name in names if (gain := difference(name, base, metric))
        }
        for title, metric, base, names in PANELS
    }
    panels = {title: gains for title, gains in panels.items() if gains}
    if not panels:
        return
    heights = [len(gains) + 2 for gains in panels.values()]
    figure, rows = plt.subplots(
        len(panels), figsize=(7, 0.28 * sum(heights)), height_ratios=heights, squeeze=False, layout='constrained'
    )
    for axes, (title, gains) in zip(rows.flat, panels.items(), strict=True):
        means, halves = zip(*gains.values(), strict=True)
        axes.errorbar(means, list(gains), xerr=halves, fmt='o', markersize=4, capsize=2, color='tab:blue')
        axes.axvline(0, color='0.7', linewidth=1)
        axes.invert_yaxis()
        axes.margins(y=0.5 / len(gains))
        axes.set_title(title, fontsize='medium')
    rows.flat[-1].set_xlabel('percentage points, mean and 95% confidence interval over the seeds')
    figure.savefig(PLOT, metadata={'Date': None})
    plt.close(figure)


def write() -> None:
    """Put each table between its marks in docs/evidence.md, and draw the plot beside it."""
    text = DOCS.read_text()
    for make in (claims, classification, detection, tuning):
        start, end = f'<!-- {make.__name__} -->\n', '\n<!-- end -->'
        before, rest = text.split(start)
        text = before + start + make() + end + rest.partition(end)[2]
    DOCS.write_text(text)
    plot()
