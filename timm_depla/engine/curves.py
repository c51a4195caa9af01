"""curves.png: loss, metrics and learning rate by epoch."""

import io
import math
from typing import Any, Dict, List, Optional, Sequence

from .metrics import Metric


def draw_curves(history: List[Dict[str, Any]], metrics: Sequence[Metric]) -> bytes:
    """Loss, metrics and learning rate by epoch, as a PNG file; empty without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return b''
    panels: Dict[str, Dict[str, Optional[str]]] = {'loss': {'train_loss': 'training'}}
    for metric in metrics:
        panels.setdefault(metric.panel, {})[metric.column] = metric.label
    panels['learning rate'] = {'lr': None}
    figure = Figure(figsize=(4 * len(panels), 3.5))
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.14, top=0.91, wspace=0.2)
    for axes, (title, columns) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for column, label in columns.items():
            rows = [row for row in history if column in row]
            axes.plot([row['epoch'] for row in rows], [row[column] for row in rows], '.-', label=label)
        axes.set(xlabel='epoch', title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if title == 'learning rate':
            axes.ticklabel_format(axis='y', scilimits=(-2, 3))
            continue
        axes.legend(frameon=False)
        shown = [row[column] for row in history[1:] for column in columns if math.isfinite(row.get(column, math.nan))]
        # the first epoch of a longer run would flatten the rest
        if title == 'loss' and shown and len(history) > 5 and axes.get_ylim()[1] > 3 * max(shown):
            axes.set_ylim(min(shown) - 0.1 * max(shown), 1.3 * max(shown))
    data = io.BytesIO()
    figure.savefig(data, format='png', dpi=100)
    return data.getvalue()
