"""Synthetic road scenes, seen by a LiDAR and a camera: one ray caster, so both sensors see the same boxes and shadows.

LiDAR frame: x forward, y left, z up, the sensors at the origin, the ground at z = -1.6. Two classes: car, truck.
Boxes are x, y, z of the bottom's centre, dx, dy, dz, yaw (counter-clockwise from +x), label.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from kdcore import Data

Array = NDArray[Any]
Count = Annotated[int, Field(gt=0)]
AREA = (0.0, -12.8, 25.6, 12.8)  # x0, y0, x1, y1 in metres
CLASSES = ("car", "truck")
SIZES = np.array([[4.0, 1.8, 1.6], [7.0, 2.6, 3.0]])
GROUND, MOST = -1.6, 8
HEIGHT, WIDTH, FOCAL = 64, 128, 64.0  # pixels; 90 degrees across
BEAMS, AZIMUTHS = 24, 160
LIGHT = np.array([0.3, -0.5, 0.8])
COLOURS = np.array([[200.0, 60.0, 60.0], [60.0, 90.0, 200.0]])


def scenes(
    *,
    train: Count = 96,
    val: Count = 32,
    test: Count = 96,
    noise: Annotated[float, Field(ge=0)] = 0.03,
    seed: int = 0,
) -> Data:
    """Scenes of 2 to 6 vehicles in an area of 25.6 m by 25.6 m; the splits are drawn from ``seed`` one after another.

    Keys: ``points``, a list of [N, 4] (x, y, z, reflectance), ranges with relative ``noise``; ``img`` float32
    [B, 3, 64, 128] of 0 to 255; ``lidar2img`` [B, 4, 4]; ``boxes`` and ``target`` [B, 8, 8], label -1 where there is none.
    """
    return Data(
        train=Scenes(0, train, noise, seed),
        val=Scenes(train, val, noise, seed),
        test=Scenes(train + val, test, noise, seed),
        labels=CLASSES,
        description="synthetic vehicles, ray-cast LiDAR and camera",
    )


class Scenes:
    """Scenes ``first`` to ``first + count``, made when the first of them is asked for; the id is the number."""

    def __init__(self, first: int, count: int, noise: float, seed: int) -> None:
        self.first, self.count, self.noise, self.seed = first, count, noise, seed

    def __len__(self) -> int:
        return self.count

    def batch(self, index: Tensor) -> dict[str, Any]:
        made = [scene(self.seed, self.first + int(i), self.noise) for i in index]
        boxes = torch.stack([each["boxes"] for each in made])
        return {
            "id": self.first + index,
            "points": [each["points"] for each in made],
            "img": torch.stack([each["img"] for each in made]),
            "lidar2img": torch.from_numpy(lidar2img()).expand(len(made), 4, 4).clone(),
            "boxes": boxes,
            "target": boxes.clone(),
        }


@lru_cache(maxsize=4096)
def scene(seed: int, number: int, noise: float) -> dict[str, Tensor]:
    """One scene, a function of its arguments alone."""
    rng = np.random.default_rng((seed, number, 3303))
    boxes = vehicles(rng)
    rows = np.zeros((MOST, 8), np.float32)
    rows[:, -1] = -1
    rows[: len(boxes)] = boxes
    return {
        "boxes": torch.from_numpy(rows),
        "points": torch.from_numpy(lidar(boxes, noise, rng)),
        "img": torch.from_numpy(camera(boxes, rng)),
    }


def vehicles(rng: np.random.Generator) -> Array:
    """[N, 8]: vehicles that stand apart, in sight of the camera."""
    found: list[Array] = []
    wanted = int(rng.integers(2, 7))
    for _ in range(200):
        if len(found) == wanted:
            break
        label = int(rng.random() < 0.35)
        size = SIZES[label] * rng.uniform(0.9, 1.1, 3)
        x, y = rng.uniform(5, 23), rng.uniform(-11, 11)
        clear = all(np.hypot(x - b[0], y - b[1]) > (size[0] + b[3]) / 2 for b in found)
        if clear and abs(y) < 0.9 * x:
            found.append(np.array([x, y, GROUND, *size, rng.uniform(-np.pi, np.pi), label]))
    return np.stack(found)


def lidar(boxes: Array, noise: float, rng: np.random.Generator) -> Array:
    """Float32 [N, 4]: returns of vehicles and ground, a tenth of them lost."""
    elevation = np.deg2rad(np.linspace(-18, 6, BEAMS))[:, None]
    azimuth = np.deg2rad(np.linspace(-45, 45, AZIMUTHS))[None]
    rays = np.stack(
        np.broadcast_arrays(
            np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)
        ),
        -1,
    ).reshape(-1, 3)
    distance, hit, normals = cast(rays, boxes)
    kept = (distance < 40) & (rng.random(len(rays)) > 0.1)
    reflectance = np.where(hit >= 0, 0.3 + 0.5 * np.abs((rays * normals).sum(-1)), 0.1)
    seen = rays * (distance * (1 + noise * rng.standard_normal(len(rays))))[:, None]
    return np.concatenate([seen, reflectance[:, None]], 1)[kept].astype(np.float32)


def camera(boxes: Array, rng: np.random.Generator) -> Array:
    """Float32 [3, HEIGHT, WIDTH] of 0 to 255: shaded vehicles, textured ground, sky."""
    u, v = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    rays = np.stack([np.full_like(u, FOCAL), WIDTH / 2 - u, HEIGHT / 2 - v], -1).reshape(-1, 3)
    distance, hit, normals = cast(rays, boxes)
    shade = 0.5 + 0.5 * np.clip(normals @ (LIGHT / np.linalg.norm(LIGHT)), 0, 1)
    tint = rng.uniform(0.7, 1.1, (len(boxes), 1)) * COLOURS[boxes[:, -1].astype(int)]
    colour = np.where((hit >= 0)[:, None], tint[np.clip(hit, 0, None)] * shade[:, None], 150.0)
    ground = (hit < 0) & np.isfinite(distance)
    colour[ground] = 95.0 + 10 * np.sin(rays[ground, :2] * distance[ground, None]).sum(-1, keepdims=True)
    noisy = colour + 6 * rng.standard_normal(colour.shape)
    return np.clip(noisy, 0, 255).reshape(HEIGHT, WIDTH, 3).transpose(2, 0, 1).astype(np.float32)


def cast(rays: Array, boxes: Array) -> tuple[Array, Array, Array]:
    """Of rays [R, 3] from the origin: distance in ray lengths (inf: sky), the box hit (-1: none), the face's normal."""
    with np.errstate(divide="ignore"):
        distance = np.where(rays[:, 2] < 0, GROUND / rays[:, 2], np.inf)
    hit = np.full(len(rays), -1)
    normals = np.tile([0.0, 0.0, 1.0], (len(rays), 1))
    for index, box in enumerate(boxes):
        near, axis, sign, turn = _slab(rays, box)
        closer = near < distance
        distance, hit = np.where(closer, near, distance), np.where(closer, index, hit)
        face = np.zeros_like(rays)
        face[np.arange(len(rays)), axis] = sign
        normals = np.where(closer[:, None], face @ turn.T, normals)
    return distance, hit, normals


def _slab(rays: Array, box: Array) -> tuple[Array, Array, Array, Array]:
    """Where rays enter a box (inf: nowhere), through which axis's face and on which side, and the box's rotation."""
    x, y, z, dx, dy, dz, yaw, _ = box
    cos, sin = np.cos(yaw), np.sin(yaw)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    origin = -np.array([x, y, z + dz / 2]) @ turn
    direction = rays @ turn
    direction = np.where(np.abs(direction) < 1e-9, 1e-9, direction)
    half = np.array([dx, dy, dz]) / 2
    enter = (-np.sign(direction) * half - origin) / direction
    leave = (np.sign(direction) * half - origin) / direction
    near, axis = enter.max(1), enter.argmax(1)
    met = (near < leave.min(1)) & (near > 0)
    sign = -np.sign(direction[np.arange(len(rays)), axis])
    return np.where(met, near, np.inf), axis, sign, turn


def lidar2img() -> NDArray[np.float32]:
    """[4, 4]: LiDAR coordinates to (u d, v d, d, 1), d the depth."""
    return np.array(
        [[WIDTH / 2, -FOCAL, 0, 0], [HEIGHT / 2, 0, -FOCAL, 0], [1, 0, 0, 0], [0, 0, 0, 1]], np.float32
    )
