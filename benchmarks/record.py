"""Records: what a benchmark found, with the command, commit, versions and hardware that it was found with."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Dict, List

import timm
import torch

import timm_depla

FOLDER = Path(__file__).parent / 'records'


def _commit() -> str:
    """The commit of the code, marked where the working tree differs from it."""

    def git(*args: str) -> str:
        command = ['git', '-C', str(Path(__file__).parent.parent), *args]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    written = (':!docs/benchmarks.md', ':!benchmarks/records')  # by the benchmarks themselves
    return git('rev-parse', 'HEAD') + ('-modified' if git('status', '--porcelain', '-uno', '--', *written) else '')


COMMIT = _commit()  # on import: the code that runs, whatever is committed meanwhile


def _processor() -> str:
    """The processor's name, as Linux tells it where it does."""
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), platform.machine())


def create_record(command: str, results: Dict[str, Any], **more: Any) -> Dict[str, Any]:
    """Results with the command, commit, versions and hardware that they come from."""
    return {
        'command': command,
        **more,
        'commit': COMMIT,
        'versions': {
            'python': platform.python_version(),
            'torch': torch.__version__,
            'timm': timm.__version__,
            'timm_depla': timm_depla.__version__,
        },
        'hardware': f'{_processor()}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads',
        'results': results,
    }


def save(name: str, command: str, arguments: Dict[str, Any], results: Dict[str, Any]) -> None:
    """Write records/NAME.json."""
    record = create_record(command, results, arguments=arguments)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f'{name}.json').write_text(json.dumps(record, indent=1) + '\n')


def load(name: str) -> Dict[str, Any]:
    return json.loads((FOLDER / f'{name}.json').read_text())


def names() -> List[str]:
    return sorted(path.stem for path in FOLDER.glob('*.json'))


def table(header: List[str], rows: List[List[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)
