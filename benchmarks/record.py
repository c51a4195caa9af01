"""Records of the benchmarks' results as JSON files, what has changed since, and Markdown tables."""

import ast
import csv
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from timm_depla.hub.record import create_record

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / 'benchmarks' / 'records'
SHOWN_BY = ('render', 'summary', 'plot')  # functions that change what is shown of a record, not what is measured


def save(name: str, command: str, arguments: Dict[str, Any], sources: Sequence[str], results: Dict[str, Any]) -> None:
    """Write records/NAME.json, with the digests of the sources that were measured."""
    digests = {source: digest(source) for source in sources}
    record = create_record(command, results, arguments=arguments, sources=digests)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f'{name}.json').write_text(format_record(record) + '\n')


def format_record(value: Any, levels: int = 3, indent: str = '') -> str:
    """JSON with a line for each entry of the outer dictionaries, such as a row of a table; short ones on a line."""
    is_outer = levels and isinstance(value, dict) and any(isinstance(item, dict) for item in value.values())
    if is_outer and len(json.dumps(value)) > 700:
        entries = [
            f'{indent} {json.dumps(str(key))}: {format_record(item, levels - 1, indent + " ")}'
            for key, item in value.items()
        ]
        return '{\n' + ',\n'.join(entries) + f'\n{indent}}}'
    return json.dumps(value)


def load(name: str) -> Dict[str, Any]:
    return json.loads((FOLDER / f'{name}.json').read_text())


def names() -> List[str]:
    return sorted(path.stem for path in FOLDER.glob('*.json'))


@cache
def digest(source: str) -> str:
    """Of a Python file or a folder of them: another code has another digest, comments and docstrings do not count."""
    path, found = ROOT / source, hashlib.sha256()
    files = path.rglob('*.py') if path.is_dir() else [path]
    for name in sorted(file.relative_to(ROOT).as_posix() for file in files):
        tree = ast.parse((ROOT / name).read_text(encoding='utf-8'))
        found.update(f'{name}\0{_code(tree)}\0'.encode())
    return found.hexdigest()[:12]


def _code(node: Any) -> Any:
    """What of a syntax tree runs in a measurement, alike in each version of Python."""
    if isinstance(node, list):
        return [_code(item) for item in node if not _is_left_out(item)]
    if isinstance(node, ast.AST):
        fields = [(name, _code(value)) for name, value in ast.iter_fields(node) if value not in (None, [])]
        return type(node).__name__, fields
    return node


def _is_left_out(node: Any) -> bool:
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_docstring or (isinstance(node, ast.FunctionDef) and node.name.startswith(SHOWN_BY))


def changes(record: Dict[str, Any]) -> Optional[List[str]]:
    """The sources of a record that have other code now; None if it names none."""
    if 'sources' not in record:
        return None
    return [source for source, found in record['sources'].items() if digest(source) != found]


def read_summary(run: Path) -> List[Dict[str, str]]:
    """The rows of a training's summary.csv; none before its first epoch."""
    path = run / 'summary.csv'
    return list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []


def table(header: List[str], rows: List[List[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)
