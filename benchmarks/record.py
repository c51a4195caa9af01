"""Records of the benchmarks' results as JSON files, and Markdown tables."""

import json
import re
from pathlib import Path
from typing import Any, Dict, List

from timm_depla.files import format_json
from timm_depla.hub.record import create_record

FOLDER = Path(__file__).parent / 'records'


def save(name: str, command: str, arguments: Dict[str, Any], results: Dict[str, Any]) -> None:
    """Write records/NAME.json."""
    record = create_record(command, results, arguments=arguments)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f'{name}.json').write_text(format_json(record) + '\n')


def load(name: str) -> Dict[str, Any]:
    return json.loads((FOLDER / f'{name}.json').read_text())


def names() -> List[str]:
    return sorted(path.stem for path in FOLDER.glob('*.json'))


def table(header: List[str], rows: List[List[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)


def save_plot(figure: Any, path: Path) -> None:
    """Save a figure as SVG with text as text and a line a path; the same figure gives the same bytes."""
    import matplotlib

    matplotlib.rcParams.update({'svg.hashsalt': '', 'svg.fonttype': 'none'})
    figure.savefig(path, format='svg', metadata={'Date': None})
    text = path.read_text(encoding='utf-8')
    path.write_text(re.sub(r' d="[^"]*"', lambda match: ' '.join(match[0].split('\n')), text), encoding='utf-8')
