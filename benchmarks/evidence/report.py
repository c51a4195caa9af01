"""Tables, verdicts and the plot of docs/evidence.md and protocol.md, from the records."""

import json
import re
import statistics
from itertools import zip_longest
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import timm
from scipy import stats

from ..record import table
from . import study
from .instruments import INSTRUMENTS
from .study import RATES, best_rate, final_jobs
from .variants import VARIANTS

DOCS = Path(__file__).parents[2] / 'docs'
PAGES = ('evidence.md', 'protocol.md', 'gallery.md')
PAPER = Path(__file__).parents[1] / 'paper_results.json'
TRAINED = [(data, name) for data, instrument in INSTRUMENTS.items() for name in instrument.variants]
LEVEL = 0.05  # of a verdict, after Holm's correction


class Table(NamedTuple):
    """Differences on one set, whose p values are corrected together."""

    data: str  # of INSTRUMENTS
    title: str
    claims: Sequence[Tuple[str, ...]]  # a variant, the one that it is compared with, and a metric if not the usual one
    paper: Sequence[Any] = ()  # for each claim, the rows of the paper that say the same


_FPN = [('fpn_temperature', ['fpn_depla', t], 'fpn', 'box_ap') for t in (0.2, 0.5, 1.0)]
_FISHNET = [
    ('coco_backbones', 'fishnet150_depla', 'fishnet150', f'mask_rcnn_{kind}_ap_s_m_l') for kind in ('box', 'mask')
]
_KNOWN = [(name, 'base') for name in ('se', 'gc', 'cbam', 'nl')]  # modules that gain on ImageNet
_INSERTED = [(name, 'lite0') for name in INSTRUMENTS['lite0-fashion'].variants[1:]] + [
    (name, 'lite0-control') for name in ('lite0-depla', 'lite0-adaptive')
]
TABLES = {
    'relations-120000': Table(
        'same-120000',
        'Same or different: top-1',
        [(name, 'base') for name in ('control', 'nl', 'depla')] + [('depla', 'control'), ('depla', 'nl')],
    ),
    'parts': Table(
        'same-120000',
        'Same or different, parts of DEPLA: top-1',
        [('depla', name) for name in ('kept', 'mean', 'adaptive')],
    ),
    'finetuning': Table('lite0-fashion', 'Fine-tuning on 1,000 images of Fashion-MNIST: top-1', _INSERTED),
    'finetuning-scattered': Table('lite0-garments', 'Fine-tuning on 1,000 scattered garments: top-1', _INSERTED),
    'detection-1000': Table(
        'scenes-1000',
        'Digits in scenes: box AP',
        [('fishnet-long', 'fishnet'), ('fishnet-depla', 'fishnet'), ('fishnet-depla', 'fishnet', 'mask_AP')]
        + [('fishnet-depla', 'fishnet-mean')],
        [None, *_FISHNET, None],
    ),
    'calibration': Table('fashion', 'Fashion-MNIST, known modules: top-1', _KNOWN),
    'claims': Table(
        'fashion',
        'Fashion-MNIST: top-1',
        [('depla', 'base')],
        [('imagenet_standard_training', 'resnet50_depla', 'resnet50', 'top1')],
    ),
    'detection': Table(
        'scenes',
        'Digits in scenes, first seeds: box AP',
        [
            ('fpn-depla-0.2', 'fpn'),
            ('fpn-depla-0.5', 'fpn'),
            ('fpn-depla-1.0', 'fpn'),
            ('fpn-depla-0.5', 'fpn-norm'),
            ('backbone-fishnet-depla', 'backbone-fishnet'),
            ('backbone-fishnet-depla-norm', 'backbone-fishnet-norm'),
        ],
        [*_FPN, None, _FISHNET[0], None],
    ),
    'relations': Table(
        'same',
        'Same or different, 60,000 images: top-1',
        [(name, 'base') for name in ('control', 'gc', 'nl', 'depla')] + [('depla', 'control')],
    ),
}


class Difference(NamedTuple):
    """A difference of two means by Welch's t test, as networks of one seed share little but the order of the data."""

    mean: float
    half: float  # of its 95% confidence interval
    p: float

    def __str__(self) -> str:
        return f'{self.mean:+.2f} ± {self.half:.2f}'


def final(data: str, variant: str, *metric: str) -> Optional[List[float]]:
    """The score in percent at the end of each run that counts, by seed; None until all are on record."""
    runs = [study.load(job) for job in final_jobs(data, variant)]
    return None if not runs or None in runs else [study.score(run, *metric) for run in runs]


def difference(data: str, variant: str, other: str, *metric: str) -> Optional[Difference]:
    """A variant less another; None until all runs of both are on record."""
    values, others = final(data, variant, *metric), final(data, other, *metric)
    if values is None or others is None:
        return None
    test = stats.ttest_ind(values, others, equal_var=False)
    low, high = test.confidence_interval(0.95)
    return Difference((low + high) / 2, (high - low) / 2, float(test.pvalue))


def correct(found: Sequence[Difference], claims: int) -> List[float]:
    """Holm's corrected p values, in the order given, as if the claims that have not been run had the greatest."""
    corrected, highest = [0.0] * len(found), 0.0
    for rank, i in enumerate(sorted(range(len(found)), key=lambda i: found[i].p)):
        highest = max(highest, min(1.0, (claims - rank) * found[i].p))
        corrected[i] = highest
    return corrected


def verdict(found: Difference, p: float) -> str:
    """'gains' or 'costs' where the corrected p value is below the level, else 'undecided'."""
    return 'undecided' if p >= LEVEL else 'gains' if found.mean > 0 else 'costs'


def _paper_difference(name: str, better: Any, worse: Any, column: str) -> str:
    """Difference of two rows of one of the paper's tables; rows are named by their first columns."""
    printed = json.loads(PAPER.read_text())[name]
    found = []
    for key in (better, worse):
        key = [key] if isinstance(key, str) else key
        row = next(row for row in printed['rows'] if row[: len(key)] == key)
        value = row[printed['columns'].index(column)]
        found.append(value[0] if isinstance(value, list) else value)  # AP, before AP by size
    return f'{found[0] - found[1]:+.1f}'


def _claims(name: str) -> List[Tuple[str, Optional[Difference], Any]]:
    """A table's claims: label, difference, which is None until it has been run, and the paper's rows."""
    data, _, claims, paper = TABLES[name]
    labels = [f'{VARIANTS[a].label} over {", ".join([VARIANTS[b].label, *metric])}' for a, b, *metric in claims]
    found = [difference(data, *claim) for claim in claims]
    return list(zip_longest([label.replace('_', ' ') for label in labels], found, paper))


def compare(name: str) -> str:
    """A table of the claims, run or not. The correction is over all of them."""
    claims, rows = _claims(name), []
    corrected = iter(correct([each for _, each, _ in claims if each], len(claims)))
    for label, each, paper in claims:
        row = [label, 'not run yet', '', '']
        if each:
            p = next(corrected)
            row = [label, str(each), f'{p:.4f}' if p >= 0.001 else '< 0.001', f'**{verdict(each, p)}**']
        rows.append([*row, *([_paper_difference(*paper) if paper else ''] if TABLES[name].paper else [])])
    header = ['difference', '95% interval', 'corrected p', '']
    return table([*header, *(["the paper's, on ImageNet or COCO"] if TABLES[name].paper else [])], rows)


def networks() -> str:
    """Each network: its parameters, the mean of the tuning seeds at each rate, the rate chosen, and each seed."""
    rows = []
    for data, name in TRAINED:
        variant, values, parameters, tried, results = VARIANTS[name], final(data, name), '', [], ['', '']
        for rate in RATES:
            runs = [study.load(job) for job in study.tuning_jobs(data, name, rate)]
            if scores := [study.score(run) for run in runs if run]:
                part = '' if None not in runs else f' ({len(scores)} of {len(runs)})'
                tried.append(f'{rate}: {statistics.mean(scores):.2f}{part}')
        if values:
            low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
            mean = f'{statistics.mean(values):.2f} ± {(high - low) / 2:.2f}'
            results = [mean, ' '.join(f'{value:.2f}' for value in values)]
        if values and not variant.is_detector:
            kwargs = INSTRUMENTS[data].model_kwargs(variant)
            model = timm.create_model(variant.model, device='meta', num_classes=10, in_chans=1, **kwargs)
            parameters = f'{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.3f}'
        if values or tried:
            rows.append([data, variant.label, parameters, ', '.join(tried), best_rate(data, name) or '', *results])
    return table(['set', '', 'M parameters', 'rates tried', 'rate', 'top-1 or box AP (%)', 'each seed'], rows)


def maps() -> str:
    """Where the maps of the networks fall whose maps were measured: 1 is a uniform map."""
    rows = []
    for data, name in TRAINED:
        for job in final_jobs(data, name):
            for block, groups in ((study.load(job) or {}).get('results', {}).get('maps') or {}).items():
                cells = [f'{statistics.mean(each):.2f} ({min(each):.2f} to {max(each):.2f})' for each in groups]
                rows.append([data, VARIANTS[name].label, job.seed, f'`{block}`', *cells])
    return table(['set', '', 'seed', 'block', 'ROI maps: mean (groups)', 'heatmaps'], rows)


def plot() -> None:
    """Plot the differences of evidence.md, in percentage points: each table whose claims have all been run."""
    from matplotlib import pyplot as plt

    page = (DOCS / 'evidence.md').read_text()
    claims = {each.title: _claims(name) for name, each in TABLES.items() if f'<!-- {name} -->' in page}
    panels = {title: rows for title, rows in claims.items() if all(found for _, found, _ in rows)}
    rows = sum(len(found) + 2 for found in panels.values())  # two for a title and the numbers below
    figure, top = plt.figure(figsize=(8, 0.28 * rows)), rows
    for title, found in panels.items():
        axes = figure.add_axes((0.42, (top - 1 - len(found)) / rows, 0.4, len(found) / rows))
        top -= len(found) + 2
        labels, differences = zip(*(row[:2] for row in found), strict=True)
        means, halves = [each.mean for each in differences], [each.half for each in differences]
        axes.errorbar(means, range(len(found)), xerr=halves, fmt='o', markersize=4, capsize=2, color='tab:blue')
        axes.set_yticks(range(len(found)), labels)
        axes.secondary_yaxis('right').set_yticks(range(len(found)), list(map(str, differences)))
        axes.axvline(0, color='0.7', linewidth=1)
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_title(title, loc='left', fontsize='medium', fontweight='bold')
    plt.close(figure)
    with plt.rc_context({'svg.hashsalt': '', 'svg.fonttype': 'none'}):  # text as text, the same bytes each time
        figure.savefig(path := DOCS / 'evidence.svg', format='svg', metadata={'Date': None})
    text = re.sub(r' d="[^"]*"', lambda match: f' {" ".join(match[0].split())}', path.read_text(encoding='utf-8'))
    path.write_text(re.sub(r'>\s+<(?!g id="axes)', '><', text) + '\n', encoding='utf-8')  # a line a group


def tables() -> Dict[str, str]:
    """By the name of its marker, each table of the pages."""
    made = {name: compare(name) for name in TABLES if any(found for _, found, _ in _claims(name))}
    return {**made, 'networks': networks(), 'maps': maps()}


def write() -> None:
    """Write each table between its markers in the pages, and draw the plot."""
    study.compact()
    made = tables()
    for name in PAGES:
        text = (DOCS / name).read_text()
        for mark, content in made.items():
            start, end = f'<!-- {mark} -->\n', '<!-- end -->'
            if start in text:
                before, rest = text.split(start)
                text = f'{before}{start}{content}\n{end}{rest.partition(end)[2]}'
        (DOCS / name).write_text(text)
    plot()
