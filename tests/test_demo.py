"""The demo page, in a real browser if one is installed."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from helpers import ROOT, read_until
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from timm_depla.data import digits_folder
from timm_depla.demo import MAX_BYTES, WEIGHTS, examples, find_models, look, open_model, pixels_of, read_upload
from timm_depla.errors import ConfigError
from timm_depla.visualize import capture, find_blocks, load_any, prepare

DIGITS = f'local-dir:{WEIGHTS / "test_resnet_depla.digits"}'
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


def test_temperature_is_set_for_the_look_alone(digit):
    model = open_model(DIGITS)
    pixels = pil_to_tensor(Image.open(digit).convert('RGB'))
    found, without, image, blocks = look(model, pixels, 0.1)
    assert max(found, key=found.get) == '4' and without != found
    for probabilities in (found, without):
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert image.shape == (3, 128, 128)
    assert all(block.rpn.temperature == 1.0 for block in find_blocks(model).values())
    sharp = load_any(DIGITS)
    for block in find_blocks(sharp).values():
        block.rpn.temperature = 0.1
    expected = capture(sharp, prepare(sharp, pixels)[1])
    assert all(torch.equal(blocks[name].maps, expected[name].maps) for name in expected)


def test_drawing_becomes_a_digit_of_the_data_set():
    ink = np.zeros((280, 280, 4), np.uint8)
    ink[40:240, 130:150, 3] = 255
    digit = pixels_of({'layers': [Image.fromarray(ink)]})
    assert digit.shape == (3, 8, 8)
    assert (digit[..., 3:5] > 60).all() and (digit[..., :3] == 0).all()
    assert pixels_of(None) is None
    assert pixels_of({'layers': [Image.new('RGBA', (280, 280))]}) is None


def test_models_that_the_page_does_not_take(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r'is no run folder, checkpoint or model'):
        find_models([str(tmp_path / 'nowhere')])
    monkeypatch.setattr('timm_depla.demo.WEIGHTS', tmp_path / 'nowhere')
    with pytest.raises(ConfigError, match='no networks here: name runs or pretrained models with --model'):
        find_models([])


def test_examples(digit, tmp_path):
    folder = digits_folder() / 'validation'
    assert len(examples(str(folder))) <= 20 and len(examples(str(digit.parent))) > 10
    assert [Path(file).parent for file in examples()] == [folder / str(label) for label in range(10)]
    with pytest.raises(ConfigError, match='no images in'):
        examples(str(tmp_path))


@pytest.fixture(scope='module')
def uploads(tmp_path_factory):
    """The page's folder of uploads."""
    return tmp_path_factory.mktemp('uploads')


@pytest.fixture(scope='module')
def address(uploads):
    """The page, served as the command does."""
    pytest.importorskip('gradio')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    command = [sys.executable, '-m', 'timm_depla.demo', '--port', str(port)]
    options = dict(cwd=ROOT, env={**os.environ, 'GRADIO_TEMP_DIR': str(uploads)}, text=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    read_until(process.stdout, 'Running on local URL')
    yield f'http://127.0.0.1:{port}'
    process.terminate()
    process.wait(timeout=30)


@pytest.fixture
def page(address):
    """A page on a desktop's width; at the end nothing may have gone wrong in its console."""
    pytest.importorskip('playwright')
    if CHROMIUM is None:
        (pytest.fail if os.environ.get('CI') else pytest.skip)('no Chromium')
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        page = browser.new_page(viewport={'width': 1280, 'height': 900})
        errors, requests = [], []
        page.on('console', lambda message: errors.append(message.text) if message.type == 'error' else None)
        page.on('pageerror', lambda error: errors.append(str(error)))
        page.on('request', lambda request: requests.append(request.url))
        page.goto(address)
        page.wait_for_selector('text=What DEPLA sees', timeout=60_000)
        yield page
        assert errors == []
        assert all(url.startswith((address, 'data:', 'blob:')) for url in requests)  # it works offline
        browser.close()


def wait_for(change, seconds=30):
    """What `change` returns once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := change():
            return value
        time.sleep(0.1)
    raise AssertionError('nothing changed')


def numbers(page):
    return next((t for t in page.locator('.prose').all_inner_texts() if t.startswith('Group')), '')


def pictures(page):
    return [page.locator('img').nth(i).get_attribute('src') for i in range(page.locator('img').count())]


def prediction(page):
    return page.locator('[data-testid=label-output-value]').first.inner_text()


def test_page_shows_what_is_asked(page):
    first = wait_for(lambda: numbers(page))  # an example is computed at once, for the strongest group
    assert prediction(page) == '4' and 'number 1 of 16 by how much it changes' in first
    before = pictures(page)
    page.set_input_files('input[type=file] >> nth=0', str(min((digits_folder() / 'validation/7').iterdir())))
    wait_for(lambda: prediction(page) == '7')
    wait_for(lambda: pictures(page) != before)
    text = wait_for(lambda: 'number 1 of 16' in numbers(page) and numbers(page))
    group = int(re.search(r'Group (\d+) is', text)[1])
    assert page.get_by_label('number input for Group').input_value() == str(group)
    before = pictures(page)

    slider = page.get_by_label('range slider for Group')
    slider.focus()
    step = -1 if group == 15 else 1
    page.keyboard.press('ArrowLeft' if group == 15 else 'ArrowRight')  # by keyboard
    second = wait_for(lambda: numbers(page).startswith(f'Group {group + step} is') and numbers(page))
    assert wait_for(lambda: pictures(page) != before)
    before = pictures(page)

    temperature = page.get_by_label('number input for Temperature')
    temperature.fill('0.1')
    temperature.press('Enter')
    third = wait_for(lambda: numbers(page) != second and numbers(page))
    peaks = [float(re.search(r'at one place (\S+) times', text)[1]) for text in (second, third)]
    assert peaks[1] > 1.5 * peaks[0]  # colder is sharper
    assert wait_for(lambda: pictures(page) != before)

    page.get_by_label('Block').click()
    page.get_by_role('option', name='layer3.1.depla').click()
    assert wait_for(lambda: numbers(page) != third)
    page.get_by_label('Model').click()
    page.get_by_role('option', name='test_fishnet_depla.digits').click()
    wait_for(lambda: 'layer' not in page.get_by_label('Block').input_value())
    assert wait_for(lambda: 'number 1 of' in numbers(page))


def test_page_on_a_phone(page):
    """It is no wider than the phone, and the maps come before the controls."""
    page.set_viewport_size({'width': 390, 'height': 844})
    wait_for(lambda: numbers(page))
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    tops = [wait_for(part.bounding_box)['y'] for part in (page.locator('img').last, page.get_by_label('Block'))]
    assert tops[0] < tops[1]


def test_drawing(page):
    page.get_by_role('tab', name='Draw').click()
    page.wait_for_selector('#drawing button[aria-label=Brush].highlight')  # it draws at once
    canvas = page.locator('canvas').first
    box = wait_for(canvas.bounding_box)
    x, y = box['x'] + box['width'] / 2, box['y'] + box['height'] / 2
    page.mouse.move(x, y - 80)
    page.mouse.down()
    for step in range(17):
        page.mouse.move(x, y - 80 + 10 * step)
    page.mouse.up()
    assert wait_for(lambda: prediction(page) == '1')


def test_bad_image_on_the_page(page, tmp_path):
    Image.new('RGB', (30, 5)).save(tmp_path / 'small.png')
    page.set_input_files('input[type=file] >> nth=0', str(tmp_path / 'small.png'))
    text = '30 x 5 pixels: too small, give one of 8 a side or more'
    assert '/' not in page.wait_for_selector(f'text={text}', timeout=30_000).inner_text()  # no path of the server


def ask(address, image=None, drawing=None, source='image'):
    """What the page answers to a request that names a file by its path, without an upload."""
    data = ['test_resnet_depla.digits', image, drawing, source, 'layer3.3.depla', 1.0]
    config = json.loads(urlopen(f'{address}/config').read())
    number = next(d['id'] for d in config['dependencies'] if d['api_name'] == 'update')
    body = json.dumps(dict(data=data, fn_index=number, session_hash='test')).encode()
    queue = f'{address}/gradio_api/queue'
    urlopen(Request(f'{queue}/join', body, {'Content-Type': 'application/json'}), timeout=30).read()
    with urlopen(f'{queue}/data?session_hash=test', timeout=30) as stream:
        for line in stream:
            if b'process_completed' in line:
                return json.loads(line.removeprefix(b'data: '))
    raise AssertionError('no answer')


def test_page_opens_its_uploads_alone(address, digit, uploads, tmp_path):
    """Files of the machine, there or not, are all refused alike; a pipe does not block."""
    Image.new('RGB', (8, 8)).save(tmp_path / 'secret.png')
    Image.new('L', (5000, 5000)).save(uploads / 'large.png')
    os.mkfifo(tmp_path / 'pipe')
    meta = {'meta': {'_type': 'gradio.FileData'}}  # by which gradio itself knows a file

    def draw(path):
        part = {'path': path, **meta}
        return ask(address, None, dict(background=None, layers=[part], composite=part), 'drawing')

    said = []
    for send in (lambda path: ask(address, {'path': path}), lambda path: ask(address, {'path': path, **meta}), draw):
        paths = [tmp_path / name for name in ('secret.png', 'pipe', 'nowhere.png')]
        answers = [send(str(path)) for path in (*paths, '/etc/passwd', f'{uploads}/../{paths[0]}')]
        assert not any(answer['success'] for answer in answers)
        (error,) = {answer['output']['error'] for answer in answers}
        said.append(error)
    assert said[0] == 'this is no image that was uploaded here'
    for answer in (ask(address, {'path': str(uploads / 'large.png'), **meta}), draw(str(uploads / 'large.png'))):
        assert 'more than 16,777,216' in answer['output']['error']
    assert ask(address, {'path': str(digit)})['success']  # one of the examples


def test_page_answers_its_own_host_alone(address):
    assert urlopen(Request(address, headers={'Host': 'localhost'})).status == 200
    with pytest.raises(HTTPError, match='400'):
        urlopen(Request(address, headers={'Host': 'evil.example'}))


def test_upload_has_limits(tmp_path, monkeypatch):
    pytest.importorskip('gradio')
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path))
    Image.new('L', (5000, 5000)).save(tmp_path / 'large.png')
    (tmp_path / 'many.png').write_bytes(bytes(MAX_BYTES + 1))
    (tmp_path / 'text.png').write_text('%!PS-Adobe-3.0 EPSF')
    for name, message in (
        ('large', 'more than 16,777,216'),
        ('many', 'more than 20,971,520 bytes'),
        ('text', 'cannot read .text.png. as an image'),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            read_upload(str(tmp_path / f'{name}.png'))
        assert '/' not in str(caught.value)  # no path of the server
