"""Checksums of the files in a folder, so that a changed byte is found before it is used."""

import hashlib
import json
from pathlib import Path
from typing import Dict, Optional

__all__ = ['FILE', 'find_change', 'list_sums']

FILE = 'checksums.json'


def list_sums(files: Dict[str, bytes]) -> bytes:
    """The content of checksums.json for these files."""
    sums = {name: {'bytes': len(data), 'sha256': hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    return (json.dumps(sums, indent=2) + '\n').encode()


def find_change(folder: Path) -> Optional[str]:
    """Say which file differs from the folder's checksums.json and how, or None if none does or there is none."""
    if not (folder / FILE).exists():
        return None
    try:
        for name, expected in json.loads((folder / FILE).read_text()).items():
            data = (folder / name).read_bytes()
            if len(data) != expected['bytes']:
                return f'{name} has {len(data)} bytes, not {expected["bytes"]}'
            if hashlib.sha256(data).hexdigest() != expected['sha256']:
                return f'{name} was changed'
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        return f'{type(error).__name__}: {error}'
    return None
