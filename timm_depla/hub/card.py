"""Model cards in the Hub's format; all numbers come from record.json."""

from typing import Any, Dict, List, Tuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

_PAPER = (
    'https://openaccess.thecvf.com/content/ICCV2021/html/Sun_Aggregation_With_Feature_Detection_ICCV_2021_paper.html'
)
_ARGUMENTS = (
    'batch_size', 'opt', 'lr', 'momentum', 'weight_decay', 'sched', 'warmup_epochs', 'decay_milestones', 'clip_grad',
    'smoothing', 'aa', 'mixup', 'cutmix', 'drop_path', 'model_ema', 'model_kwargs', 'seed',
)  # fmt: skip
_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ summary }}

{{ usage }}

## Evaluation

{{ record.dataset.name }}, split {{ record.dataset.split }}, {{ record.results.images }} images.{{ benchmark }}

{{ table }}

Measured by `{{ record.command }}` at commit `{{ record.commit }}` ({{ versions }}; {{ record.hardware }}).

## Training

{{ training }}

## Limitations and licence

{{ limitations }} The weights are under the {{ licence }} licence.

```bibtex
@inproceedings{sun2021depla,
  title = {Aggregation With Feature Detection}, booktitle = {ICCV}, year = {2021},
  author = {Sun, Shuyang and Yue, Xiaoyu and Qi, Xiaojuan and Ouyang, Wanli and Prisacariu, Victor Adrian and
            Torr, Philip H.S.}
}
```
"""
_CLASSIFIER_USAGE = """```python
import timm, timm_depla  # importing timm_depla registers the architecture
from timm.data import create_transform, resolve_model_data_config

model = timm.create_model('{source}', pretrained=True).eval()
transform = create_transform(**resolve_model_data_config(model), is_training=False)
probabilities = model(transform(image)[None]).softmax(-1)  # image: a PIL image of mode {mode}
```

`features_only=True`, `num_classes=` and `in_chans=` work as for any model of timm."""
_DETECTOR_USAGE = """```python
from timm_depla.detection import from_pretrained
from timm_depla.detection.predict import draw_detections, predict, read_image

model = from_pretrained('{source}')
image = read_image('photo.jpg')
drawn = draw_detections(image, predict(model, image), model.class_names)
```"""


_PRECISION = {'AP': 'box AP', 'mask_AP': 'mask AP'}  # of detectors


def _metrics(record: Dict[str, Any]) -> List[Tuple[str, str, str]]:
    """Label, the Hub's metric type and the printed value of each metric."""
    results = record['results']
    if record['task'] == 'image-classification':
        return [(f'top-{k} accuracy (%)', 'accuracy', f'{results[f"top{k}"]:.2f}') for k in (1, 5)]
    kinds = {key: label for key, label in _PRECISION.items() if key in results}
    return [(label, 'mean_average_precision', f'{results[key]:.3f}') for key, label in kinds.items()]


def _rows(record: Dict[str, Any]) -> Dict[str, str]:
    """The table: size, cost and metrics, with a detector's precision by overlap and size of the objects."""
    results, is_classifier = record['results'], record['task'] == 'image-classification'
    height, width = results['image_size'][-2:]
    rows = {
        'parameters': f'{results["parameters"] / 1e6:.2f} M',
        f'multiply-adds at {height} x {width}': f'{results["macs"] / 1e6:,.1f} M'
        + ('' if is_classifier else ' (backbone and neck)'),
        'classes': results['num_classes'],
    }
    rows.update({label: value for label, _, value in _metrics(record)})
    for key, label in _PRECISION.items():
        parts = [name for name in results if name.startswith(key) and name != key]
        if parts:
            more = ', '.join(f'{name.removeprefix("mask_")} {results[name]:.3f}' for name in parts)
            rows[label] += f' ({more})'
    return rows


def create_card(record: Dict[str, Any], recipe: Dict[str, Any], source: str, licence: str = 'apache-2.0') -> ModelCard:
    """The card of published weights, from what `publish` writes to record.json and recipe.yaml.

    They are loaded from `source`, a name on the Hub or a folder.
    """
    results, data, name, task = (record[key] for key in ('results', 'dataset', 'architecture', 'task'))
    is_classifier, published = task == 'image-classification', source.rpartition('/')[2]
    where = dict(dataset_type=data['id'], dataset_name=data['name'], dataset_split=data['split'])
    metadata = ModelCardData(
        model_name=published,
        library_name='timm' if is_classifier else 'timm_depla',
        license=licence,
        pipeline_tag=task,
        tags=[task, 'timm', *(['transformers'] if is_classifier else []), 'depla'],
        datasets=[data['hub_id']] if data.get('hub_id') else None,
        eval_results=[
            EvalResult(task, metric_type=kind, metric_name=label, metric_value=float(value), **where)
            for label, kind, value in _metrics(record)
        ],
    )
    epochs = f'{results["epochs"]}'
    if results['epochs'] < recipe['epochs']:
        epochs += f" of {recipe['epochs']} (a run's `best` checkpoint is chosen on the split above)"
    arguments = ', '.join(f'`{key}={recipe[key]!r}`' for key in _ARGUMENTS if recipe.get(key))
    what = '' if 'depla' in name else f'the base of `{name}_depla`, without '
    summary = f'`{name}` trained on {data["name"]} by timm-depla: {what}DEPLA, of '
    summary += f'[Aggregation with Feature Detection]({_PAPER}).'
    if 'candidates' in results:
        scores = ', '.join(f'{key} {value:.4g}' for key, value in results['candidates'].items())
        summary += f' The weights are the {results["weights"]} ({results["selected_by"]}: {scores}).'
    usage = _CLASSIFIER_USAGE if is_classifier else _DETECTOR_USAGE
    table = ['| | |', '| --- | --- |', *(f'| {label} | {value} |' for label, value in _rows(record).items())]
    return ModelCard.from_template(
        metadata,
        template_str=_TEMPLATE,
        name=published,
        summary=summary,
        usage=usage.format(source=source, mode='RGB' if results['image_size'][0] == 3 else 'L'),
        table='\n'.join(table),
        benchmark=f' {data["benchmark"]}' if 'benchmark' in data else '',
        record=record,
        versions=', '.join(f'{package} {version}' for package, version in record['versions'].items()),
        training=f'Epochs: {epochs}, of the recipe `{record["recipe"]}`, with {arguments}. `recipe.yaml` has all '
        'arguments that differ from the defaults. Time and energy of training were not recorded.',
        limitations=data['limitations'],
        licence=licence,
    )
