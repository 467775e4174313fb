"""Compiled rays: the first part that each one meets, and which points see a light. Twin of `rooms.intersect`.

Float32 operations come in the order of the torch code, so results differ by no more than its square roots do between
libraries. Rays are done in tiles of 64, one part after the other, which compilers turn into vector instructions.
"""
# mypy: allow-untyped-defs
# What numba compiles has no Python types.

from __future__ import annotations

import math

import numpy as np

from geo_pretrain.rooms.compiled.jit import entry, helper
from geo_pretrain.rooms.intersect import MISS, TILE
from geo_pretrain.rooms.scene import BOX, FRUSTUM

f = np.float32
LANES = TILE * TILE
FAR, TINY, SLACK = f(MISS), f(1e-12), f(1e-4)
ZERO, HALF, ONE = f(0), f(0.5), f(1)
LIFT = f(0.003)  # m from a surface to where its shadow ray ends


# ---- One part, many rays --------------------------------------------------------------------------------------------


@helper
def away_from_zero(x):
    """Return x, or the smallest allowed number with its sign."""
    size = max(abs(x), TINY)
    return -size if x < ZERO else size


@helper
def slab(o, d):
    """Intersect a ray with the slab [-1, 1]: where it enters and leaves."""
    inverse = ONE / away_from_zero(d)
    middle, reach = -o * inverse, abs(inverse)
    return middle - reach, middle + reach


@helper
def hit_box(o, d, count, t):
    """Intersect rays with the cube [-1, 1]^3: origin [3], directions [3, LANES] -> ray parameters [LANES]."""
    ox, oy, oz = o[0], o[1], o[2]
    for i in range(count):
        enter, leave = slab(ox, d[0, i])
        near, far = slab(oy, d[1, i])
        enter, leave = max(enter, near), min(leave, far)
        near, far = slab(oz, d[2, i])
        enter, leave = max(enter, near), min(leave, far)
        t[i] = enter if (leave >= enter) & (enter >= ZERO) else FAR


@helper
def clip(enter, leave, room, speed):
    """Cut a ray's interval at a plane that is `room` away from the origin and approached at `speed`."""
    at = room / speed
    return max(enter, at if speed < ZERO else -FAR), min(leave, FAR if speed < ZERO else at)


@helper
def hit_frustum(o, d, coef, count, t):
    """Intersect rays with the box of sides |x| <= c0 + c1 z and |y| <= c2 + c3 z."""
    ox, oy, oz = o[0], o[1], o[2]
    c1, c3 = coef[1], coef[3]
    wide, deep = coef[0] + c1 * oz, coef[2] + c3 * oz
    for i in range(count):
        dx, dy, dz = d[0, i], d[1, i], d[2, i]
        enter, leave = slab(oz, dz)
        enter, leave = clip(enter, leave, wide - ox, away_from_zero(dx - c1 * dz))
        enter, leave = clip(enter, leave, wide + ox, away_from_zero(-dx - c1 * dz))
        enter, leave = clip(enter, leave, deep - oy, away_from_zero(dy - c3 * dz))
        enter, leave = clip(enter, leave, deep + oy, away_from_zero(-dy - c3 * dz))
        t[i] = enter if (leave >= enter) & (enter >= ZERO) else FAR


@helper
def outside(ox, oy, oz, dx, dy, dz, c0, c1, c2, t):
    """Evaluate x^2 + y^2 - c0 - c1 z - c2 z^2 at a point of a ray: negative inside a quadric."""
    x, y, z = ox + t * dx, oy + t * dy, oz + t * dz
    return x * x + y * y - c0 - z * (c1 + c2 * z)


@helper
def hit_quadric(o, d, coef, count, t):
    """Intersect rays with x^2 + y^2 <= c0 + c1 z + c2 z^2 inside |z| <= 1."""
    ox, oy, oz = o[0], o[1], o[2]
    c0, c1, c2 = coef[0], coef[1], coef[2]
    slope = HALF * c1 + c2 * oz
    for i in range(count):
        dx, dy, dz = d[0, i], d[1, i], d[2, i]
        a = away_from_zero(dx * dx + dy * dy - c2 * dz * dz)
        b = ox * dx + oy * dy - slope * dz
        vertex = min(max(-b / a, -FAR), FAR)
        square = -outside(ox, oy, oz, dx, dy, dz, c0, c1, c2, vertex) / a
        reach = math.sqrt(max(square, ZERO))
        first, second = vertex - reach, vertex + reach
        real = square >= ZERO
        best = FAR
        good = real & (first >= ZERO) & (abs(oz + first * dz) <= ONE)
        best = min(best, first if good else FAR)
        good = real & (second >= ZERO) & (abs(oz + second * dz) <= ONE)
        best = min(best, second if good else FAR)
        cap, _ = slab(oz, dz)
        cap = min(max(cap, -FAR), FAR)
        good = (cap >= ZERO) & (outside(ox, oy, oz, dx, dy, dz, c0, c1, c2, cap) <= ZERO)
        t[i] = min(best, cap if good else FAR)


@helper
def hit(kind, o, d, coef, count, t):
    """Intersect rays with a part of any kind."""
    if kind == BOX:
        hit_box(o, d, count, t)
    elif kind == FRUSTUM:
        hit_frustum(o, d, coef, count, t)
    else:
        hit_quadric(o, d, coef, count, t)


@helper
def unit(x, y, z, matrix, k):
    """Component k of a world vector in a part's unit frame."""
    return x * matrix[0, k] + y * matrix[1, k] + z * matrix[2, k]


# ---- The camera -----------------------------------------------------------------------------------------------------


@helper
def part_strips(center, rotation, bound, pose, edge_x, edge_y, columns, rows):
    """Test conservatively in which tile columns and rows each part may be seen; return its least depth [P]."""
    parts = len(columns)
    nearest = np.empty(parts, np.float32)
    axes, middle = np.empty((3, 3), np.float32), np.empty(3, np.float32)
    for p in range(parts):
        for j in range(3):
            middle[j] = ZERO
            for i in range(3):
                middle[j] += (center[p, i] - pose[i, 3]) * pose[i, j]
            for k in range(3):
                axes[k, j] = ZERO
                for i in range(3):
                    axes[k, j] += rotation[p, i, k] * pose[i, j] * bound[p, k]
        reach = abs(axes[0, 2]) + abs(axes[1, 2]) + abs(axes[2, 2])
        nearest[p] = middle[2] - reach - SLACK
        front = middle[2] + reach > ZERO
        for axis, edges, seen in ((0, edge_x, columns), (1, edge_y, rows)):
            for strip in range(len(edges) - 1):
                low = high = ZERO
                for k in range(3):
                    low += abs(axes[k, axis] - axes[k, 2] * edges[strip])
                    high += abs(axes[k, axis] - axes[k, 2] * edges[strip + 1])
                low += middle[axis] - middle[2] * edges[strip]
                high = middle[axis] - middle[2] * edges[strip + 1] - high
                seen[p, strip] = front & (low > -SLACK) & (high < SLACK)
    return nearest


@helper
def shell_hit(room, pose, x, y, parts, depth, index):
    """Find where the rays of a tile leave the room: depth and face."""
    ox, oy, oz = pose[0, 3], pose[1, 3], pose[2, 3]
    low_x, low_y, high_x, high_y = -room[0] / f(2), -room[1] / f(2), room[0] / f(2), room[1] / f(2)
    for i in range(LANES):
        a, b = x[i % TILE], y[i // TILE]
        dx = away_from_zero(pose[0, 0] * a + pose[0, 1] * b + pose[0, 2])
        dy = away_from_zero(pose[1, 0] * a + pose[1, 1] * b + pose[1, 2])
        dz = away_from_zero(pose[2, 0] * a + pose[2, 1] * b + pose[2, 2])
        at_x = max((low_x - ox) / dx, (high_x - ox) / dx)
        at_y = max((low_y - oy) / dy, (high_y - oy) / dy)
        at_z = max((ZERO - oz) / dz, (room[2] - oz) / dz)
        at, face = at_x, 2 + (dx > ZERO)
        at, face = (at_y, 4 + (dy > ZERO)) if at_y < at else (at, face)
        at, face = (at_z, 0 + (dz > ZERO)) if at_z < at else (at, face)
        depth[i], index[i] = at, parts + face


@helper
def tile_hit(kind, coef, room, pose, x, y, chosen, nearest, origin, basis, d, t, depth, index):
    """Find the first hits of a tile's rays: depth and part [LANES]. `chosen` parts come nearest first."""
    parts = len(nearest)
    shell_hit(room, pose, x, y, parts, depth, index)
    farthest = depth.max()
    for p in chosen:
        if nearest[p] > farthest:
            break
        b = basis[p]
        for k in range(3):
            for row in range(TILE):
                down = b[1, k] * y[row] + b[2, k]
                for column in range(TILE):
                    d[k, row * TILE + column] = down + b[0, k] * x[column]
        hit(kind[p], origin[p], d, coef[p], LANES, t)
        met, ours, shell = False, np.int32(p), np.int32(parts)
        for i in range(LANES):
            nearer = (t[i] < depth[i]) | ((t[i] == depth[i]) & ((ours > index[i]) | (index[i] >= shell)))
            depth[i] = t[i] if nearer else depth[i]
            index[i] = ours if nearer else index[i]
            met |= nearer
        if met:
            farthest = depth.max()


@helper
def choose(parts, seen, chosen):
    """Copy the parts that are seen; return their number."""
    count = 0
    for p in parts:
        if seen[p]:
            chosen[count] = p
            count += 1
    return count


@entry
def cast(shapes, room, pose, x, y, edge_x, edge_y, depth, part, edges):
    """Cast all rays of an image, in tile order; x [V, columns, TILE] and y of V views, the first through pixel centers.

    Writes depth and part [tiles * LANES] of the first view. Rays of other views that meet another part than their
    pixel's center are appended to `edges` (spot, view, part, depth); returns their number.
    """
    columns, rows = x.shape[1], y.shape[1]
    in_column, in_row = np.empty((shapes.parts, columns), np.bool_), np.empty((shapes.parts, rows), np.bool_)
    nearest = part_strips(shapes.center, shapes.rotation, shapes.bound, pose, edge_x, edge_y, in_column, in_row)
    order = np.argsort(nearest)
    origin, basis = np.empty((shapes.parts, 3), np.float32), np.empty((shapes.parts, 3, 3), np.float32)
    for p in range(shapes.parts):
        center, matrix = shapes.center[p], shapes.to_unit[p]
        for k in range(3):
            origin[p, k] = unit(pose[0, 3] - center[0], pose[1, 3] - center[1], pose[2, 3] - center[2], matrix, k)
            for i in range(3):
                basis[p, i, k] = unit(pose[0, i], pose[1, i], pose[2, i], matrix, k)
    d, t = np.empty((3, LANES), np.float32), np.empty(LANES, np.float32)
    z, other = np.empty(LANES, np.float32), np.empty(LANES, np.int32)
    along, chosen = np.empty(shapes.parts, np.int64), np.empty(shapes.parts, np.int64)  # in a row of tiles, in a tile
    kind, coef, found, wide = shapes.kind, shapes.coef, 0, 0
    for tile in range(rows * columns):
        row, column = tile // columns, tile % columns
        if column == 0:
            wide = choose(order, in_row[:, row], along)
        count = choose(along[:wide], in_column[:, column], chosen)
        start = tile * LANES
        ours, parts = depth[start : start + LANES], part[start : start + LANES]
        for view in range(len(x)):
            into, ids = (ours, parts) if view == 0 else (z, other)
            across, down, near = x[view, column], y[view, row], chosen[:count]
            tile_hit(kind, coef, room, pose, across, down, near, nearest, origin, basis, d, t, into, ids)
            if view:
                for i in range(LANES):
                    if other[i] != parts[i]:
                        edges.spot[found], edges.sample[found] = start + i, view
                        edges.part[found], edges.depth[found] = other[i], z[i]
                        found += 1
    return found


# ---- Shadows --------------------------------------------------------------------------------------------------------


@helper
def near_segments(radii, casts, offset, square, low, high, points, count, near):
    """Test conservatively which parts may lie between a light and points [3, count] (relative to it): near [P].

    A part is out of the way when its sphere misses the cone around the points, or its box misses theirs and the light.
    """
    cx = cy = cz = ZERO
    low_x = low_y = low_z = high_x = high_y = high_z = ZERO  # the light
    for i in range(count):
        x, y, z = points[0, i], points[1, i], points[2, i]
        cx, cy, cz = cx + x, cy + y, cz + z
        low_x, low_y, low_z = min(low_x, x), min(low_y, y), min(low_z, z)
        high_x, high_y, high_z = max(high_x, x), max(high_y, y), max(high_z, z)
    share = ONE / f(count)
    cx, cy, cz = cx * share, cy * share, cz * share
    spread = ZERO
    for i in range(count):
        x, y, z = points[0, i] - cx, points[1, i] - cy, points[2, i] - cz
        spread = max(spread, x * x + y * y + z * z)
    spread = f(math.sqrt(spread))
    distance = math.sqrt(cx * cx + cy * cy + cz * cz)
    ax, ay, az = cx / distance, cy / distance, cz / distance
    sine = min(spread / distance, f(0.999))
    cosine = math.sqrt(ONE - sine * sine)
    inside = spread >= f(0.9) * distance  # the light is (nearly) among the points: no cone
    for p in range(len(radii)):
        radius = radii[p] + SLACK
        along = offset[0, p] * ax + offset[1, p] * ay + offset[2, p] * az
        aside = math.sqrt(max(square[p] - along * along, ZERO))
        in_cone = (aside * cosine - along * sine < radius) & (along - radius < distance + spread) & (along > -radius)
        in_box = (low[0, p] < high_x) & (high[0, p] > low_x) & (low[1, p] < high_y)
        in_box &= (high[1, p] > low_y) & (low[2, p] < high_z) & (high[2, p] > low_z)
        near[p] = (in_cone | inside) & in_box & casts[p]


@helper
def hide(kind, coef, to_unit, origin, near, points, count, d, t, dark):
    """Test which segments from a light to points [3, count] (relative to it) meet a part that is `near`."""
    dark[:count] = False
    for p in range(len(near)):
        if not near[p]:
            continue
        matrix = to_unit[p]
        for k in range(3):
            for i in range(count):
                d[k, i] = unit(points[0, i], points[1, i], points[2, i], matrix, k)
        hit(kind[p], origin[p], d, coef[p], count, t)
        lit = 0
        for i in range(count):
            dark[i] |= t[i] < ONE
            lit += not dark[i]
        if lit == 0:
            return


@entry
def shadows(shapes, lights, point, normal, strength):
    """Set the strength [L, N] of each light to 0 at those points [3, N] from which a part hides it."""
    d, t, points = np.empty((3, LANES), np.float32), np.empty(LANES, np.float32), np.empty((3, LANES), np.float32)
    lane, dark, near = np.empty(LANES, np.int64), np.empty(LANES, np.bool_), np.empty(shapes.parts, np.bool_)
    offset, origin = np.empty((3, shapes.parts), np.float32), np.empty((shapes.parts, 3), np.float32)
    square = np.empty(shapes.parts, np.float32)
    for light in range(len(lights)):
        lx, ly, lz = lights[light, 0], lights[light, 1], lights[light, 2]
        for p in range(shapes.parts):
            x, y, z = shapes.center[p, 0] - lx, shapes.center[p, 1] - ly, shapes.center[p, 2] - lz
            offset[0, p], offset[1, p], offset[2, p], square[p] = x, y, z, x * x + y * y + z * z
            for k in range(3):
                origin[p, k] = unit(-x, -y, -z, shapes.to_unit[p], k)
        low, high = offset - shapes.reach - SLACK, offset + shapes.reach + SLACK
        for start in range(0, point.shape[1], LANES):
            count = 0
            for i in range(start, min(start + LANES, point.shape[1])):
                if strength[light, i] > ZERO:
                    points[0, count] = point[0, i] + LIFT * normal[0, i] - lx
                    points[1, count] = point[1, i] + LIFT * normal[1, i] - ly
                    points[2, count] = point[2, i] + LIFT * normal[2, i] - lz
                    lane[count] = i
                    count += 1
            if count == 0:
                continue
            near_segments(shapes.radius, shapes.casts, offset, square, low, high, points, count, near)
            hide(shapes.kind, shapes.coef, shapes.to_unit, origin, near, points, count, d, t, dark)
            for i in range(count):
                if dark[i]:
                    strength[light, lane[i]] = ZERO
