"""A slow, literal transcription of the paper's equations: the oracle of the block and of FPN-DEPLA."""

import math

import torch


def randomized(block):
    """Give every parameter and running statistic a value of its own, in float64 and evaluation mode."""
    block = block.double().eval()
    for name, tensor in block.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor))
        if name.endswith('running_var'):
            tensor.abs_().add_(0.5)
    return block


# The transcription: nested lists of floats, one loop an index, nothing shared with the package.


def upsample(x, height, width):
    """Bilinear, half-pixel centres, edges repeated: x[c][i][j] -> (C, height, width)."""

    def taps(size, index, target):
        position = max((index + 0.5) * size / target - 0.5, 0.0)
        low = min(int(position), size - 1)
        return low, min(low + 1, size - 1), position - low

    def value(channel, i, j):
        i0, i1, a = taps(len(channel), i, height)
        j0, j1, b = taps(len(channel[0]), j, width)
        top = (1 - b) * channel[i0][j0] + b * channel[i0][j1]
        return (1 - a) * top + a * ((1 - b) * channel[i1][j0] + b * channel[i1][j1])

    return [[[value(channel, i, j) for j in range(width)] for i in range(height)] for channel in x]


def softmax(values):
    shifted = [math.exp(v - max(values)) for v in values]
    return [v / sum(shifted) for v in shifted]


def conv1x1(weight, x, bias=None):
    """weight[o][i], x[i][n] -> (O, N)."""
    return [
        [sum(row[i] * x[i][n] for i in range(len(row))) + (bias[o] if bias else 0.0) for n in range(len(x[0]))]
        for o, row in enumerate(weight)
    ]


def norm(xs, w, name, training):
    """BatchNorm of xs[image][c][n], by the statistics of the batch in training."""
    out = [[] for _ in xs]
    for c, weight in enumerate(w[f'{name}.weight']):
        mean, var = w[f'{name}.running_mean'][c], w[f'{name}.running_var'][c]
        if training:
            values = [v for x in xs for v in x[c]]
            mean = sum(values) / len(values)
            var = sum((v - mean) ** 2 for v in values) / len(values)
        for x, maps in zip(xs, out, strict=True):
            maps.append([(v - mean) / math.sqrt(var + 1e-5) * weight + w[f'{name}.bias'][c] for v in x[c]])
    return out


def literal(
    block, identities, candidates, num_groups, pooled_chs, maps_per_group, temperature, bfn, keep_candidate,
    training=False,
):  # fmt: skip
    """The equations in the paper's order: identities[image][c][i][j], candidates[image][c][i][j] -> (B, C1, H, W)."""
    w = {k: v.flatten(1).tolist() if v.ndim > 1 else v.tolist() for k, v in block.state_dict().items()}
    height = max(len(identities[0][0]), len(candidates[0][0]))
    width = max(len(identities[0][0][0]), len(candidates[0][0][0]))
    xs, ys = (
        [[[v for row in rows for v in row] for rows in upsample(image, height, width)] for image in images]
        for images in (identities, candidates)
    )
    positions, groups, chs, depth = range(height * width), range(num_groups), range(pooled_chs), range(maps_per_group)

    def conv_norm(name, maps):  # ruling 5
        return norm([conv1x1(w[f'{name}.conv.weight'], x) for x in maps], w, f'{name}.norm', training)

    logits = conv_norm('rpn.logits', xs)
    ms = [[softmax([v / temperature for v in row]) for row in image] for image in logits]  # ms[image][d * L + l][n]
    zs = []  # zs[image][c][l]
    for m, v in zip(ms, conv_norm('candidate', ys), strict=True):  # v[d * C + c][n]
        z = [
            [sum(m[d * num_groups + g][n] * v[d * pooled_chs + c][n] for d in depth for n in positions) for g in groups]
            for c in chs
        ]
        zs.append(z)
    if bfn == 'plain':
        log_maps = [[[math.log(max(len(positions) * v, 1e-6)) for v in row] for row in m] for m in ms]  # ruling 4(b)
        bs = conv_norm('bfn.heatmap', log_maps)
    else:
        bs = []
        for q, z in zip(conv_norm('bfn.query', xs), zs, strict=True):
            k = conv1x1(w['bfn.key.weight'], z, w['bfn.key.bias'])
            length = [math.sqrt(sum(k[c][g] ** 2 for c in chs)) for g in groups]  # ruling 10
            bs.append([[sum(q[c][n] * k[c][g] for c in chs) / length[g] for n in positions] for g in groups])
    fs = []
    for b, z in zip(bs, zs, strict=True):
        b = [softmax(row) for row in b]
        z = conv1x1(w['bfn.transform.weight'], z, w['bfn.transform.bias'])
        f = [[sum(z[c][g] * len(positions) * b[g][n] for g in groups) for n in positions] for c in chs]  # ruling 4(a)
        fs.append(conv1x1(w['proj.weight'], f))
    out = norm(fs, w, 'norm', training)
    for x, y, image in zip(xs, ys, out, strict=True):
        for c, row in enumerate(image):
            image[c] = [x[c][n] + row[n] + (y[c][n] if keep_candidate else 0.0) for n in positions]
    return torch.tensor(out, dtype=torch.float64).unflatten(2, (height, width))
