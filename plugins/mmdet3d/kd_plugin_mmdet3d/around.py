"""What an exported detector does outside its graph, in numpy: voxels or projection before, boxes after.

This file ships with the artefact, with ``SETTINGS`` filled in. Settings: ``points`` (voxels) or ``image``
(projection), ``centre`` or ``anchors`` (decoding), ``nms`` and ``most``; each as the functions below read it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SETTINGS: dict[str, Any] = {}
Array = Any


def preprocess(inputs: dict[str, Any]) -> dict[str, Array]:
    """``points``: a list of [N, C] clouds; or ``img`` [B, 3, H, W] of 0 to 255 with ``lidar2img`` [B, 4, 4]."""
    return before(inputs, SETTINGS)


def postprocess(outputs: dict[str, Array]) -> dict[str, Array]:
    """``boxes`` [B, most, 9]: x, y, z of the bottom, sizes, yaw, score, label; best first, label -1 for none."""
    return after(outputs, SETTINGS)


def before(inputs: dict[str, Any], settings: dict[str, Any]) -> dict[str, Array]:
    if "image" in settings:
        return projected(inputs["img"], inputs["lidar2img"], **settings["image"])
    made = [voxels(np.asarray(cloud, np.float32), **settings["points"]) for cloud in inputs["points"]]
    return {name: np.stack([each[name] for each in made]) for name in made[0]}


def after(outputs: dict[str, Array], settings: dict[str, Any]) -> dict[str, Array]:
    maps = [np.asarray(outputs[f"head_{i}"], np.float32) for i in range(len(outputs))]
    kind = "centre" if "centre" in settings else "anchors"
    decode = centres if kind == "centre" else anchored
    found = [decode([each[row] for each in maps], **settings[kind]) for row in range(len(maps[0]))]
    return {"boxes": np.stack([padded(rows, settings["most"]) for rows in found])}


def voxels(cloud: Array, low: Any, size: Any, grid: Any, points: int, count: int) -> dict[str, Array]:
    """Hard voxelisation as mmcv's: voxels in the order of their first points, the first points of each.

    ``voxels`` [count, points, C], ``num_points`` [count] (0: no voxel), ``coords`` int64 [count, 2] (row, column).
    """
    cell = np.floor((cloud[:, :3] - np.array(low, np.float32)) / np.array(size, np.float32)).astype(np.int64)
    inside = ((cell >= 0) & (cell < np.array(grid))).all(1)
    cloud, cell = cloud[inside], cell[inside]
    flat = (cell[:, 2] * grid[1] + cell[:, 1]) * grid[0] + cell[:, 0]
    _, first, member = np.unique(flat, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))[member]  # of a point's voxel, by its first point
    order = np.argsort(rank, kind="stable")
    starts = np.searchsorted(rank[order], np.arange(len(first)))
    place = np.empty(len(rank), np.int64)
    place[order] = np.arange(len(rank)) - starts[rank[order]]
    kept = (place < points) & (rank < count)
    made = np.zeros((count, points, cloud.shape[1]), np.float32)
    made[rank[kept], place[kept]] = cloud[kept]
    number, coords = np.zeros(count, np.float32), np.zeros((count, 2), np.int64)
    np.add.at(number, rank[kept], 1)
    coords[rank[kept]] = cell[kept][:, [1, 0]]
    return {"voxels": made, "num_points": number, "coords": coords}


def projected(
    image: Array, lidar2img: Array, mean: Any, std: Any, low: Any, high: Any, cells: Any
) -> dict[str, Array]:
    """``img`` normalised, and ``grid`` [B, Z, Y X, 2]: where each cell's centre is in the image, -1 to 1."""
    axes = [np.linspace(a, b, n, dtype=np.float32) for a, b, n in zip(low, high, cells, strict=True)]
    z, y, x = np.meshgrid(axes[2], axes[1], axes[0], indexing="ij")
    points = np.stack([x, y, z, np.ones_like(x)], -1).reshape(-1, 4)
    seen = points @ np.asarray(lidar2img, np.float32).transpose(0, 2, 1)
    pixel = seen[..., :2] / seen[..., 2:3]
    height, width = image.shape[-2:]
    grid = pixel / np.array([width, height], np.float32) * 2 - 1
    centre, spread = (np.array(each, np.float32)[:, None, None] for each in (mean, std))
    normal = (image - centre) / spread
    return {
        "img": normal.astype(np.float32),
        "grid": grid.reshape(len(image), cells[2], -1, 2).astype(np.float32),
    }


def centres(
    maps: list[Array],
    order: list[int],
    most: int,
    cell: Any,
    low: Any,
    ranges: Any,
    score: float,
    logs: bool,
    nms: Any,
) -> Array:
    """CenterPoint's decoding of one task, maps reg, height, dim, rot, vel and heat map, in the head's order."""
    reg, height, dim, rot, heat = (maps[i] for i in order)
    found = sigmoid(heat).reshape(len(heat), -1)
    best = np.sort(np.argsort(-found, 1, kind="stable")[:, :most], 1)
    pairs = [(found[c, i], c, i) for c in range(len(found)) for i in best[c]]
    pairs = sorted(pairs, key=lambda p: -p[0])[:most]
    rows = []
    for value, label, index in pairs:
        r, c = divmod(int(index), heat.shape[2])
        x, y = (c + reg[0, r, c]) * cell[0] + low[0], (r + reg[1, r, c]) * cell[1] + low[1]
        size = np.exp(dim[:, r, c]) if logs else dim[:, r, c]
        yaw = np.arctan2(rot[0, r, c], rot[1, r, c])
        rows.append([x, y, height[0, r, c], *size, yaw, value, label])
    boxes = np.array(rows, np.float32)
    boxes = boxes[boxes[:, 7] > score]
    inside = (boxes[:, :3] >= np.array(ranges[:3], np.float32)) & (
        boxes[:, :3] <= np.array(ranges[3:], np.float32)
    )
    boxes = boxes[inside.all(1)]
    boxes = boxes[suppressed(boxes, **nms)]
    boxes[:, 2] -= boxes[:, 5] / 2
    return boxes


def anchored(
    maps: list[Array],
    ranges: Any,
    sizes: Any,
    turns: Any,
    score: float,
    first: int,
    offsets: Any,
    nms: Any,
    most: int,
) -> Array:
    """Anchor3DHead's decoding: the best ``first`` anchors, each class's suppression, the direction's half turn."""
    scores, codes, ways = (each.transpose(1, 2, 0) for each in maps)
    rows, columns = scores.shape[:2]
    prior = anchors(rows, columns, ranges, sizes, turns)
    scores = sigmoid(scores.reshape(len(prior), -1))
    codes, ways = codes.reshape(len(prior), 7), ways.reshape(len(prior), 2).argmax(1)
    best = np.argsort(-scores.max(1), kind="stable")[:first]
    boxes, scores, ways = decoded(prior[best], codes[best]), scores[best], ways[best]
    found = []
    for label in range(scores.shape[1]):
        there = scores[:, label] > score
        mine = np.concatenate([boxes[there], scores[there, label, None], np.full((there.sum(), 1), label)], 1)
        kept = suppressed(mine, **nms)
        turned = mine[kept]
        base = turned[:, 6] - offsets[0]
        base = base - np.floor(base / np.pi + offsets[1]) * np.pi
        turned[:, 6] = base + offsets[0] + np.pi * ways[there][kept]
        found.append(turned)
    every = np.concatenate(found)
    return every[np.argsort(-every[:, 7], kind="stable")[:most]]


def anchors(rows: int, columns: int, ranges: Any, sizes: Any, turns: Any) -> Array:
    """[rows columns sizes turns, 7] at the cells' centres; one range a size."""
    made = np.zeros((rows, columns, len(sizes), len(turns), 7), np.float32)
    for index, (area, size) in enumerate(zip(ranges, sizes, strict=True)):
        x, y = (
            area[k] + (np.arange(n) + 0.5) * (area[k + 3] - area[k]) / n for k, n in ((0, columns), (1, rows))
        )
        made[:, :, index, :, 0], made[:, :, index, :, 1] = x[None, :, None], y[:, None, None]
        made[:, :, index, :, 2], made[:, :, index, :, 3:6] = area[2], size
        made[:, :, index, :, 6] = turns
    return made.reshape(-1, 7)


def decoded(prior: Array, code: Array) -> Array:
    """Boxes [N, 7] of anchors and codes (DeltaXYZWLHR)."""
    diagonal = np.hypot(prior[:, 3], prior[:, 4])[:, None]
    size = np.exp(code[:, 3:6]) * prior[:, 3:6]
    flat = code[:, :2] * diagonal + prior[:, :2]
    z = code[:, 2:3] * prior[:, 5:6] + prior[:, 2:3] + prior[:, 5:6] / 2 - size[:, 2:3] / 2
    return np.concatenate([flat, z, size, code[:, 6:] + prior[:, 6:7]], 1)


def suppressed(boxes: Array, overlap: float, before: int, after: int) -> Array:
    """Indices kept, best score first: none overlaps a better one by more than ``overlap`` (turned boxes, on the plane)."""
    order = list(np.argsort(-boxes[:, 7], kind="stable")[:before]) if len(boxes) else []
    shapes = {i: polygon(boxes[i]) for i in order}
    kept: list[int] = []
    for i in order:
        if all(iou(shapes[i], shapes[j]) <= overlap for j in kept):
            kept.append(i)
    return np.array(kept[:after], np.int64)


def polygon(box: Array) -> Array:
    """[4, 2] corners, counter-clockwise."""
    cos, sin = np.cos(box[6]), np.sin(box[6])
    offsets = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * box[3:5] / 2
    return offsets @ np.array([[cos, sin], [-sin, cos]]) + box[:2]


def iou(one: Array, two: Array) -> float:
    """Intersection over union of two convex polygons."""
    if (one.max(0) < two.min(0)).any() or (two.max(0) < one.min(0)).any():
        return 0.0
    shared = area(clipped(one, two))
    return shared / max(area(one) + area(two) - shared, 1e-9)


def clipped(subject: Array, window: Array) -> Array:
    """Sutherland and Hodgman: the part of a convex polygon inside another."""
    points = list(subject)
    for a, b in zip(window, np.roll(window, -1, 0), strict=True):
        side = [(b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0]) for p in points]
        kept = []
        for i, point in enumerate(points):
            j = (i + 1) % len(points)
            if side[i] >= 0:
                kept.append(point)
            if (side[i] >= 0) != (side[j] >= 0):
                kept.append(point + (points[j] - point) * side[i] / (side[i] - side[j]))
        points = kept
        if not points:
            break
    return np.array(points).reshape(-1, 2)


def area(points: Array) -> float:
    x, y = points.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def padded(rows: Array, most: int) -> Array:
    made = np.zeros((most, 9), np.float32)
    made[:, 8] = -1
    best = rows[np.argsort(-rows[:, 7], kind="stable")[:most]]
    made[: len(best)] = best
    return made
