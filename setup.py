"""The readme of the package page: README.md, whose links to files lead to the repository, if project.urls names one."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
REPOSITORY = re.search(r'^Repository = "(.+)"', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)
TARGET = rf'[\1]({REPOSITORY[1]}/blob/main/\2)' if REPOSITORY else r'\1'


def page() -> str:
    text = re.sub(r'^!\[.*\n\n', '', (ROOT / 'README.md').read_text(encoding='utf-8'), flags=re.MULTILINE)  # figures
    return re.sub(r'\[([^\]]+)\]\((?!https?:)([^)]+)\)', TARGET, text)


setup(long_description=page(), long_description_content_type='text/markdown')
