"""What validation measures, and files of results."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from timm_depla.errors import as_config_error
from timm_depla.files import check_writable, write_file

PLAIN = 'plain_'  # before the names of the metrics of the weights without averaging


@dataclass(frozen=True)
class Metric:
    """A metric of validation, the column eval_NAME of summary.csv.

    Attributes:
        name: Its name for `--eval-metric`; lower is better for 'loss', higher for all others.
        label: Its name in logs and curves.
        panel: The title of its curves.
        digits: Decimals in the log; None leaves it out of the log.
    """

    name: str
    label: str
    panel: str
    digits: Optional[int] = None

    @property
    def column(self) -> str:
        return f'eval_{self.name}'

    def text(self, row: Dict[str, Any]) -> str:
        """Label and value in a row of the summary."""
        return f'{self.label} {row[self.column]:.{self.digits or 3}f}'


def choose(row: Dict[str, Any], metric: str) -> Tuple[float, str]:
    """The better of a row's two values of a metric, the lower the better, and its column."""
    sign = 1 if metric == 'loss' else -1
    columns = [column for column in (f'eval_{metric}', f'eval_{PLAIN}{metric}') if column in row]
    values = [sign * row[column] if math.isfinite(row[column]) else math.inf for column in columns]
    return min(zip(values, columns, strict=True), key=lambda pair: pair[0])


def rank(history: List[Dict[str, Any]], metric: str) -> List[Dict[str, Any]]:
    """The validated epochs' rows, best first; values that are not finite come last."""
    return sorted((row for row in history if f'eval_{metric}' in row), key=lambda row: choose(row, metric)[0])


def check_results(path: str) -> None:
    """Check that `--results-file` can be written, before the work is done; raise a ConfigError if not."""
    with as_config_error('--results-file: '):
        if path:
            check_writable(Path(path))


def write_results(path: str, text: str) -> None:
    """Write a `--results-file`, or raise a ConfigError."""
    with as_config_error(f"cannot write --results-file '{path}': ", OSError):
        write_file(Path(path), text.encode())
