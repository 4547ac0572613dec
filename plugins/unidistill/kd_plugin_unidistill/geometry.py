"""Where UniDistill looks: nine points of each box, and a Gaussian around its centre, on maps of an area.

Boxes are float [B, M, 8 or more]: x, y, z, dx, dy, dz, yaw (counter-clockwise from +x; metres, radians), ...,
and the label last, -1 where there is no box. Maps are [B, C, H, W] with rows along y and columns along x;
``area`` = (x0, y0, x1, y1) is what they cover in metres, so cell i is [i, i + 1) cell sizes from the edge.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Area = tuple[float, float, float, float]
MIN_OVERLAP = 0.7
CORNERS = ((-0.5, -0.5), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5))


def present(boxes: Tensor) -> Tensor:
    """Bool [B, M]: the rows that are boxes."""
    return boxes[..., -1] >= 0


def nine_points(boxes: Tensor) -> Tensor:
    """[B, M, 9, 2] in metres: four corners in order around the box, its centre, four edges' midpoints."""
    centre, size, yaw = boxes[..., :2], boxes[..., 3:5], boxes[..., 6]
    offsets = size.unsqueeze(-2) * boxes.new_tensor(CORNERS)  # [B, M, 4, 2]
    cos, sin = yaw.cos()[..., None], yaw.sin()[..., None]
    dx, dy = offsets.unbind(-1)
    corners = torch.stack([cos * dx - sin * dy, sin * dx + cos * dy], -1) + centre.unsqueeze(-2)
    edges = (corners + corners.roll(-1, -2)) / 2
    return torch.cat([corners, centre.unsqueeze(-2), edges], -2)


def sample(maps: Tensor, points: Tensor, area: Area, *, swapped: bool = False) -> Tensor:
    """Bilinear values [B, M, P, C] of maps at points [B, M, P, 2] in metres; 0 outside; float32 at least.

    ``swapped``: x and y exchanged after normalisation, which reads the mirror image of the point, as the
    released code does.
    """
    low, high = points.new_tensor(area[:2]), points.new_tensor(area[2:])
    grid = 2 * (points - low) / (high - low) - 1
    grid = grid.flip(-1) if swapped else grid
    with torch.autocast(maps.device.type, enabled=False):
        wide = torch.promote_types(maps.dtype, torch.float32)
        found = F.grid_sample(maps.to(wide), grid.to(wide), align_corners=False)
    return found.permute(0, 2, 3, 1)


def gaussian_radius(height: Tensor, width: Tensor, min_overlap: float = MIN_OVERLAP) -> Tensor:
    """CornerNet's radius, in cells, as CenterNet and its successors compute it (roots over 2, not over 2a)."""
    total, product = height + width, height * width
    r1 = total + (total**2 - 4 * product * (1 - min_overlap) / (1 + min_overlap)).sqrt()
    r2 = 2 * total + (4 * total**2 - 16 * (1 - min_overlap) * product).sqrt()
    b3 = -2 * min_overlap * total
    r3 = b3 + (b3**2 - 16 * min_overlap * (min_overlap - 1) * product).sqrt()
    return torch.minimum(torch.minimum(r1, r2), r3) / 2


def box_mask(boxes: Tensor, area: Area, size: tuple[int, int]) -> Tensor:
    """[B, H, W]: the largest over the boxes of exp(-d^2 / 2 s^2), d in cells from the centre's cell.

    s = (2 r + 1) / 6, nothing beyond r cells in x or y, r = floor of the Gaussian radius (0 is one cell).
    Boxes whose centre is outside the area count for nothing.
    """
    rows, columns = size
    cell = boxes.new_tensor([(area[2] - area[0]) / columns, (area[3] - area[1]) / rows])
    centre = torch.floor((boxes[..., :2] - boxes.new_tensor(area[:2])) / cell)
    inside = ((centre >= 0) & (centre < centre.new_tensor([columns, rows]))).all(-1) & present(boxes)
    extent = boxes[..., 3:5] / cell
    radius = torch.floor(gaussian_radius(extent[..., 1], extent[..., 0]))[..., None]
    sigma = (2 * radius + 1) / 6
    along = [_gaussian(centre[..., axis, None], n, radius, sigma) for axis, n in enumerate((columns, rows))]
    drawn = along[1].unsqueeze(-1) * along[0].unsqueeze(-2)  # [B, M, H, W]
    return torch.where(inside[..., None, None], drawn, 0.0).amax(1)


def _gaussian(centre: Tensor, cells: int, radius: Tensor, sigma: Tensor) -> Tensor:
    away = torch.arange(cells, device=centre.device, dtype=centre.dtype) - centre
    value = torch.exp(-away.square() / (2 * sigma.square()))
    return torch.where(away.abs() <= radius, value, 0.0)


def cell_of(area: Area, size: tuple[int, int]) -> tuple[float, float]:
    """Width (x) and height (y) of a cell in metres."""
    return (area[2] - area[0]) / size[1], (area[3] - area[1]) / size[0]


def is_area(area: Area) -> bool:
    return all(map(math.isfinite, area)) and area[0] < area[2] and area[1] < area[3]
