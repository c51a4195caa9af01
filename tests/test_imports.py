"""Imports point one way: engine -> data, detection, models -> layers; see the layout in CONTRIBUTING.md."""

import ast
import re
from pathlib import Path

import timm_depla

ALLOWED = {
    'layers': set(),
    'models': {'files', 'layers', 'schema'},
    'data': {'files'},
    'detection': {'files', 'layers', 'schema'},
    'engine': {'files', 'schema', 'data', 'detection', 'models', 'layers', 'version'},
    'hub': {'data', 'detection', 'engine', 'files', 'version'},
    'recipes': set(),
}


def imported_parts(path, root):
    """Top-level parts of timm_depla that a file imports, absolute or relative."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ['timm_depla', *path.relative_to(root).parts[:-1]]
            base = package[: len(package) - node.level + 1] if node.level else []
            names = ['.'.join([*base, *((node.module or '').split('.') if node.module else [])])]
            if node.module is None or node.module == 'timm_depla':
                names = [f'{names[0]}.{alias.name}' for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split('.')
            if parts[0] == 'timm_depla' and len(parts) > 1:
                yield parts[1]


def test_imports_point_one_way():
    root = Path(timm_depla.__file__).parent
    parts = {path.name for path in root.iterdir() if path.is_dir() and path.name != '__pycache__'}
    assert parts == set(ALLOWED)
    for part, allowed in ALLOWED.items():
        for path in (root / part).rglob('*.py'):
            extra = set(imported_parts(path, root)) - allowed - {part}
            assert not extra, f'{path} imports {extra}'


def test_nothing_imports_the_benchmarks():
    root = Path(timm_depla.__file__).parent.parent
    for path in [*root.glob('*.py'), *root.glob('hub/*.py'), *root.glob('timm_depla/**/*.py')]:
        assert not re.search(r'^\s*(from|import) benchmarks', path.read_text(), re.MULTILINE), path
