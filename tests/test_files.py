"""Untrusted files: images that are decompression bombs, of another format, or of more than eight bits."""

import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from timm_depla.files import check_writable, find_change, format_json, list_sums, open_image, read_mapping


def png(*chunks):
    """A PNG file of these chunks."""
    parts = (struct.pack('>I', len(d)) + name + d + struct.pack('>I', zlib.crc32(name + d)) for name, d in chunks)
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


HEADER = struct.pack('>IIBBBBB', 4, 4, 8, 0, 0, 0, 0)
HUGE = struct.pack('>IIBBBBB', 60_000, 60_000, 8, 0, 0, 0, 0)
PIXELS = zlib.compress(bytes(5 * 4))


@pytest.mark.parametrize(
    'data,message',
    [
        (png((b'IHDR', HUGE), (b'IDAT', PIXELS), (b'IEND', b'')), 'pixels'),
        (png((b'IHDR', HEADER), (b'zTXt', b'a\0\0' + zlib.compress(bytes(2**26))), (b'IEND', b'')), 'it is damaged: '),
        (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n', 'cannot identify image'),
        (b'', 'cannot identify image'),
        (png((b'IHDR', HEADER), (b'IDAT', PIXELS[:5]), (b'IEND', b'')), 'truncated|damaged|broken'),
    ],
)
def test_bad_image_is_one_error(data, message, tmp_path):
    (tmp_path / 'image.jpg').write_bytes(data)
    with pytest.raises(OSError, match=message):
        open_image(tmp_path / 'image.jpg', 'RGB')


def test_size_is_limited_before_decoding(tmp_path):
    Image.new('L', (100, 50)).save(tmp_path / 'image.png')
    assert open_image(tmp_path / 'image.png', 'RGB', 5000).size == (100, 50)
    with pytest.raises(OSError, match='it has 100 x 50 pixels, more than 4,999'):
        open_image(tmp_path / 'image.png', 'RGB', 4999)


def test_sixteen_bits_keep_their_scale(tmp_path):
    levels = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    Image.fromarray(levels).save(tmp_path / 'image.png')
    found = np.asarray(open_image(tmp_path / 'image.png', 'L')).astype(int)
    assert np.abs(found - levels / 257).max() <= 0.5


def test_json_has_a_line_a_key_and_reads_back():
    value = {'a': list(range(9)), 'b': {'c': 'x' * 90, 'd': None}, 'e': {'f': [0.1]}}
    text = format_json(value)
    assert json.loads(text) == value and format_json(value['e']) == '{"f": [0.1]}'
    assert [line.strip()[:3] for line in text.splitlines()] == ['{', '"a"', '"b"', '"c"', '"d"', '},', '"e"', '}']


def test_changed_file_is_named(tmp_path):
    files = {'a': b'1234', 'b': b'5678'}
    for name, data in {**files, 'checksums.json': list_sums(files)}.items():
        (tmp_path / name).write_bytes(data)
    assert find_change(tmp_path) is None and find_change(tmp_path / 'nowhere') is None
    (tmp_path / 'b').write_bytes(b'5679')
    assert find_change(tmp_path) == 'b was changed'
    for text in ('[]', '{"a": 1}', '{"c": {}}', '[' * 10_000, '\x00'):
        (tmp_path / 'checksums.json').write_text(text)
        assert find_change(tmp_path)
    (tmp_path / 'checksums.json').unlink()
    os.mkfifo(tmp_path / 'checksums.json')  # which does not block
    assert 'OSError: checksums.json is no file' in find_change(tmp_path)
    (tmp_path / 'checksums.json').unlink()
    (tmp_path / 'state.json').write_text('{}')  # a checkpoint of training has sums
    assert find_change(tmp_path) == 'checksums.json is missing'


@pytest.mark.parametrize(
    'use,message',
    [(read_mapping, 'pipe.json is no file'), (lambda path: open_image(path, 'L'), 'pipe.json is no file'),
     (check_writable, 'it is a pipe or a device')],
)  # fmt: skip
def test_pipe_is_neither_read_nor_replaced(use, message, tmp_path):
    os.mkfifo(tmp_path / 'pipe.json')
    with pytest.raises((OSError, ValueError), match=message):
        use(tmp_path / 'pipe.json')
