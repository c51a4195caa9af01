"""The pages of the documentation name what is there."""

import re
from pathlib import Path

import pytest
from helpers import ROOT

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)$', page.read_text(), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links(page):
    for link in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
        path, _, anchor = link.partition('#')
        if link.startswith(('http://', 'https://')):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_promises_are_tests():
    """Each test that docs/trust.md names is there."""
    for name in re.findall(r'`(test_\w+\.py(?:::\w+)?)`', (ROOT / 'docs' / 'trust.md').read_text()):
        file, _, test = name.partition('::')
        assert f'def {test}' in (Path(__file__).parent / file).read_text(), name
