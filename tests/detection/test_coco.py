"""COCO-format data: what is read, what is refused, and average precision against the reference."""

import contextlib
import copy
import io
import json
import logging
import os

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

from timm_depla.data import scenes
from timm_depla.detection.coco import METRICS, CocoDetection, create_transform, evaluate_coco, to_results


@pytest.fixture
def dataset(small_scenes):
    return CocoDetection(small_scenes / 'train', small_scenes / 'annotations' / 'instances_train.json')


@pytest.fixture
def rewrite(small_scenes, tmp_path):
    """Open the training split with its annotations changed."""

    def open_changed(change, **kwargs):
        content = json.loads((small_scenes / 'annotations' / 'instances_train.json').read_text())
        change(content)
        path = tmp_path / 'changed.json'
        path.write_text(json.dumps(content))
        return CocoDetection(small_scenes / 'train', path, **kwargs)

    return open_changed


def test_scenes_are_exact_and_always_the_same(dataset):
    areas = [a['area'] for a in dataset.coco.anns.values()]
    assert min(areas) < 32**2 < 96**2 < max(areas)
    for annotation in dataset.coco.anns.values():
        mask = dataset.coco.annToMask(annotation)
        ys, xs = np.nonzero(mask)
        assert annotation['area'] == mask.sum()
        assert annotation['bbox'] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
    draw = [(3, np.full((8, 8), 255, np.uint8))]
    first, second = (scenes.draw_scene(np.random.default_rng((0, 5)), draw) for _ in range(2))
    assert (first[0] == second[0]).all()
    assert sum(mask.astype(int) for _, mask in first[1]).max() == 1


def test_sample(dataset):
    image, target = dataset[3]
    annotations = dataset.coco.imgToAnns[target['image_id']]
    assert image.shape == (3, 320, 320) and image.dtype == torch.uint8
    assert target['labels'].tolist() == [a['category_id'] for a in annotations]
    assert dataset.class_names[target['labels'][0] - 1] == str(annotations[0]['category_id'] - 1)
    for box, mask, annotation in zip(target['boxes'], target['masks'], annotations, strict=True):
        x, y, width, height = annotation['bbox']
        assert box.tolist() == [x, y, x + width, y + height]
        assert mask.sum() == annotation['area']


def test_flip_moves_boxes_and_masks_with_the_image(rewrite):
    (image, target), (other_image, other) = (
        rewrite(bool, transform=create_transform(is_training, 1.0))[3] for is_training in (False, True)
    )
    assert image.dtype == torch.float32 and 0 <= image.min() < image.max() <= 1
    assert torch.equal(other_image, image.flip(2))
    assert torch.equal(other['masks'], target['masks'].flip(2))
    assert torch.equal(other['boxes'][:, [2, 0]], 320 - target['boxes'][:, [0, 2]])


def test_gaps_crowds_polygons_and_images_without_objects(dataset, rewrite, caplog):
    def change(content):
        for category in content['categories']:
            category['id'] = 7 * category['id'] + 3
        for annotation in content['annotations']:
            annotation['category_id'] = 7 * annotation['category_id'] + 3
        first, second = content['annotations'][:2]
        first['iscrowd'] = 1
        x, y, width, height = second['bbox']
        second['segmentation'] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        content['annotations'] = [a for a in content['annotations'] if a['image_id'] != 9]
        content['images'].reverse()

    changed = rewrite(change)
    assert changed.category_ids == [7 * i + 3 for i in range(1, 11)]
    index = dataset.image_ids.index(dataset.coco.anns[2]['image_id'])
    assert changed.image_ids == dataset.image_ids
    crowds = sum(a['iscrowd'] for a in changed.coco.imgToAnns[changed.image_ids[index]])
    assert changed[index][1]['labels'].tolist() == dataset[index][1]['labels'].tolist()[crowds:]
    empty = changed[changed.image_ids.index(9)][1]
    assert empty['boxes'].shape == (0, 4) and empty['masks'].shape == (0, 320, 320)
    caplog.set_level(logging.INFO)
    training = rewrite(change, is_training=True)
    assert 9 not in training.image_ids
    assert f'left out {len(changed) - len(training)} images without objects' in caplog.text


def test_degenerate_boxes_are_left_out_counted_and_named(rewrite, caplog):
    def change(content):
        content['annotations'][0]['bbox'] = [10, 10, 0, 5]
        content['annotations'][1]['bbox'] = [330, 10, 20, 20]

    dataset = rewrite(change)
    assert 'left out 2 boxes without an area in the image: annotations 1 [10, 10, 0, 5], 2 [330,' in caplog.text
    assert sum(len(dataset[i][1]['labels']) for i in range(len(dataset))) == len(dataset.coco.anns) - 2


def test_bad_files(rewrite, tmp_path):
    with pytest.raises(ValueError, match=r"no annotation file '.*nowhere\.json'"):
        CocoDetection(tmp_path, tmp_path / 'nowhere.json')
    (tmp_path / 'broken.json').write_text('{"images": [')
    os.mkfifo(tmp_path / 'pipe')
    for name, message in (('broken.json', 'is not JSON'), ('pipe', 'pipe is no file')):
        with pytest.raises(ValueError, match=message):
            CocoDetection(tmp_path, tmp_path / name)
    with pytest.raises(ValueError, match='has no objects to train on'):
        rewrite(lambda content: content.update(annotations=[]), is_training=True)

    def change(content):
        content['images'][0].update(width=300)
        for annotation in content['annotations']:
            del annotation['segmentation']

    dataset = rewrite(change)
    with pytest.raises(ValueError, match=r"image '000000\.jpg' is 320 x 320 pixels, its annotation says 300 x 320"):
        dataset[0]


def random_results(dataset, seed):
    """Detections near the objects, some missed, some of another class, some where there is nothing."""
    random = np.random.default_rng(seed)
    results = []
    for image_id in dataset.image_ids:
        boxes, labels, scores, masks = [], [], [], []
        for annotation in dataset.coco.imgToAnns[image_id] * 2:
            if random.random() < 0.3:
                continue
            shift = random.integers(-6, 7, 2) * random.integers(0, 2)
            mask = np.roll(dataset.coco.annToMask(annotation), shift, (0, 1))
            x, y, width, height = annotation['bbox']
            x, y = x + shift[1], y + shift[0]
            boxes.append([x, y, x + width * random.uniform(0.8, 1.2), y + height])
            labels.append(annotation['category_id'] if random.random() < 0.8 else random.integers(1, 11))
            scores.append(round(random.random(), 2))  # with ties
            masks.append(mask[None].astype(np.float32))
        detections = dict(boxes=torch.tensor(boxes).reshape(-1, 4), labels=torch.tensor(labels, dtype=torch.int64))
        detections.update(scores=torch.tensor(scores), masks=torch.from_numpy(np.array(masks)).reshape(-1, 1, 320, 320))
        results += to_results(image_id, detections, dataset.category_ids)
    return results


@pytest.mark.parametrize('iou_type', ['bbox', 'segm'])
def test_precision_is_that_of_pycocotools(dataset, tmp_path, iou_type):
    results = random_results(dataset, 0)
    assert list(results[0]) == ['image_id', 'category_id', 'bbox', 'score', 'segmentation']
    before = copy.deepcopy(results)
    values, table = evaluate_coco(dataset.coco, results, iou_type)
    assert results == before
    path = tmp_path / 'results.json'
    kept = [{k: v for k, v in r.items() if k != 'bbox'} for r in results] if iou_type == 'segm' else results
    path.write_text(json.dumps(kept))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        reference = COCOeval(dataset.coco, dataset.coco.loadRes(str(path)), iou_type)
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    assert values == dict(zip(METRICS, reference.stats.tolist(), strict=True))
    assert 0.1 < values['AP'] < 0.9
    assert printed.getvalue().endswith(table) and len(table.splitlines()) == len(METRICS)


@pytest.mark.parametrize('iou_type', ['bbox', 'segm'])
def test_the_fast_evaluation_agrees(dataset, iou_type):
    for seed in range(20):
        results = random_results(dataset, seed)
        values, _ = evaluate_coco(dataset.coco, results, iou_type)
        fast, _ = evaluate_coco(dataset.coco, results, iou_type, fast=True)
        assert fast == pytest.approx(values, rel=0, abs=1e-6)


@pytest.mark.parametrize('fast', [False, True])
def test_no_detections(dataset, fast):
    assert [evaluate_coco(dataset.coco, [], iou_type, fast)[0]['AP'] for iou_type in ('bbox', 'segm')] == [0, 0]


MASK = {'size': [320, 320]}


@pytest.mark.parametrize(
    'part,changes,message',
    [
        ('images', dict(id='1'), r"images\[0\]: 'id' must be a whole number, not '1'"),
        ('images', dict(id=2), r"images\[1\] has the 'id' 2 of another of the images"),
        ('images', dict(file_name='gone.jpg'), r"1 images are not in '.*train': gone\.jpg"),
        ('images', dict(file_name='../../etc/passwd'), "must be a path within the folder, not '../../etc"),
        ('images', dict(file_name='x' * 300), r"1 images are not in '.*train': xxx"),
        ('images', dict(file_name='x' * 5000), "'file_name' must be a path within the folder"),
        ('images', dict(file_name='/etc/passwd'), "'file_name' must be a path within the folder"),
        ('images', dict(height=0), r"images\[0\]: 'height' must be a number of pixels, not 0"),
        ('images', dict(width=None), "'width' must be a number of pixels, not None"),
        ('categories', dict(name=3), r"categories\[0\]: 'name' must be a text, not 3"),
        ('annotations', dict(category_id=99), 'annotation 1 is of category 99, not listed'),
        ('annotations', dict(image_id=999), 'annotation 1 is of image 999, which is not listed'),
        ('annotations', dict(bbox=[1, 2, 3]), r"annotations\[0\]: 'bbox' must be four numbers, .*, not \[1, 2, 3\]"),
        ('annotations', dict(bbox=[1, 2, 3, float('nan')]), 'must be four numbers'),
        ('annotations', dict(iscrowd=2), "'iscrowd' must be 0 or 1, not 2"),
        ('annotations', dict(area='x'), "'area' must be a number, not 'x'"),
        ('annotations', dict(segmentation=[[1, 2]]), 'has a polygon that is no list of three points or more'),
        ('annotations', dict(segmentation=[[1, 2, 3, 4, 5, None]]), 'has a polygon'),
        ('annotations', dict(segmentation=[[0, 0, 1e9, 0, 1e9, 1e9]]), 'has a polygon that is no list'),
        ('annotations', dict(segmentation=[[0, 0, 320, 320] * 2**14]), 'of 20,970,880 pixels, more than 8,388,608'),
        ('annotations', dict(segmentation={'size': [1, 1], 'counts': [1]}), 'is no mask of 320 x 320 pixels'),
        ('annotations', dict(segmentation={**MASK, 'counts': [5]}), 'do not fill 320 x 320 pixels'),
        ('annotations', dict(segmentation={**MASK, 'counts': 'PPPPPP'}), 'that are no run lengths'),
        ('annotations', dict(segmentation={**MASK, 'counts': '\x7f~'}), 'that are no run lengths'),
        ('annotations', dict(segmentation={**MASK, 'counts': 3}), 'that are no run lengths'),
        ('annotations', dict(segmentation='abc'), 'is no mask of'),
        ('annotations', 7, r'annotations\[0\] is no mapping: 7'),
        ('images', {}, 'it needs the lists images'),
        ('categories', None, "not in COCO's format: it needs the lists images, annotations, categories"),
    ],
)
def test_schema_names_the_entry_and_the_value(rewrite, part, changes, message):
    """Of a part, the first entry is changed or replaced, or the part has another type or is not there."""

    def change(content):
        if not changes:
            content[part] = changes
        else:
            content[part][0] = {**content[part][0], **changes} if isinstance(changes, dict) else changes

    with pytest.raises(ValueError, match=message):
        rewrite(change)


def test_compressed_masks_are_read_and_absent_areas_computed(rewrite):
    """What pycocotools writes passes the check, whole and compressed, and areas are those of the masks."""
    random = np.random.default_rng(0)
    masks = [np.asfortranarray(random.random((320, 320)) < p).astype(np.uint8) for p in (0.01, 0.5, 0.999, 0, 1)]

    def change(content):
        template = content['annotations'][0]
        del template['area'], template['iscrowd']
        content['annotations'] = []
        for i, mask in enumerate(masks):
            encoded = coco_mask.encode(mask)
            segmentation = dict(size=encoded['size'], counts=encoded['counts'].decode())
            content['annotations'].append({**template, 'id': i + 1, 'segmentation': segmentation})

    annotations = rewrite(change).coco.anns
    assert [annotations[i + 1]['area'] for i in range(5)] == [mask.sum() for mask in masks]
    assert all(annotation['iscrowd'] == 0 for annotation in annotations.values())
