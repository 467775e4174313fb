"""Compiled light: where rays meet surfaces, what arrives there, and the image. Twin of `rooms.render`, to rounding.

Points and normals are float32 in the order of the torch code, so shadow rays are the same, too.
"""
# mypy: allow-untyped-defs
# What numba compiles has no Python types.

from __future__ import annotations

import math

import numpy as np

from geo_pretrain.rooms.compiled.jit import lean_entry, lean_helper
from geo_pretrain.rooms.intersect import TILE
from geo_pretrain.rooms.scene import M_BASE, M_EMIT, M_GLOSS, M_SECOND, M_SHINE, QUADRIC, SHELL

f = np.float32
LANES = TILE * TILE
ZERO, HALF, ONE = f(0), f(0.5), f(1)


@lean_helper
def dot(a, b):
    """Inner product of two vectors."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@lean_helper
def sign(x):
    """Return -1, 0 or 1."""
    return f((x > ZERO) - (x < ZERO))


@lean_helper
def solid_normal(x, y, z, half, coef, quadric, sphere):
    """Compute the outward unit normal of a solid at a point of its unit frame."""
    cap = (abs(z) - ONE) * half[2]
    # Signed excess over each bounding surface, in meters; the largest is the face that the point lies on.
    if quadric:
        first = (x * x + y * y - coef[0] - z * (coef[1] + coef[2] * z)) * half[0] * HALF
        second = f(-1e9)
    else:
        first = (abs(x) - (coef[0] + coef[1] * z)) * half[0]
        second = (abs(y) - (coef[2] + coef[3] * z)) * half[1]
    on_cap = (cap > max(first, second)) & (not sphere)
    if on_cap:
        n = ZERO, ZERO, sign(z)
    elif quadric:
        n = x, y, -(HALF * coef[1] + coef[2] * z)
    elif first >= second:
        n = sign(x), ZERO, -coef[1]
    else:
        n = ZERO, sign(y), -coef[3]
    n = n[0] / half[0], n[1] / half[1], n[2] / half[2]
    length = f(max(math.sqrt(dot(n, n)), 1e-9))
    return n[0] / length, n[1] / length, n[2] / length


@lean_helper
def shell_normal(face):
    """Return the normal of a shell face, into the room."""
    x = y = z = ZERO
    if face < 2:
        z = ONE if face == 0 else -ONE
    elif face < 4:
        x = ONE if face == 2 else -ONE
    else:
        y = ONE if face == 4 else -ONE
    return x, y, z


@lean_helper
def face_coordinates(local, normal, half, rolled):
    """Compute coordinates along the face (m) and its half extent; round sides are unrolled."""
    if rolled:
        angle = math.atan2(local[1] / half[1], local[0] / half[0])
        return angle * half[0], local[2], half[0] * f(3.14), half[2]
    a, b, c = abs(normal[0]), abs(normal[1]), abs(normal[2])
    if (a >= b) & (a >= c):
        return local[1], local[2], half[1], half[2]
    if b >= c:
        return local[0], local[2], half[0], half[2]
    return local[0], local[1], half[0], half[1]


@lean_entry
def surface(shapes, pose, x, y, focal, part, depth, spots, samples, hits):
    """Compute what shading needs where rays meet parts [N] at depth [N].

    Rays through pixel centers come first, in tile order, then others: of pixel `spots`, through x and y of `samples`.
    """
    columns, rows = x.shape[1], y.shape[1]
    pixels = columns * rows * LANES
    for i in range(len(part)):
        spot, sample = (i, 0) if i < pixels else (spots[i - pixels], samples[i - pixels])
        tile, lane = spot // LANES, spot % LANES
        a, b = x[sample, tile % columns, lane % TILE], y[sample, tile // columns, lane // TILE]
        rx = pose[0, 0] * a + pose[0, 1] * b + pose[0, 2]
        ry = pose[1, 0] * a + pose[1, 1] * b + pose[1, 2]
        rz = pose[2, 0] * a + pose[2, 1] * b + pose[2, 2]
        p, z = part[i], depth[i]
        half, coef, rotation, center = shapes.half[p], shapes.coef[p], shapes.rotation[p], shapes.center[p]
        at = pose[0, 3] + rx * z, pose[1, 3] + ry * z, pose[2, 3] + rz * z
        offset = at[0] - center[0], at[1] - center[1], at[2] - center[2]
        local = dot(offset, rotation[:, 0]), dot(offset, rotation[:, 1]), dot(offset, rotation[:, 2])
        quadric, sphere = shapes.kind[p] == QUADRIC, shapes.sphere[p]
        if shapes.kind[p] == SHELL:
            n = normal = shell_normal(p - shapes.parts)
        else:
            n = solid_normal(local[0] / half[0], local[1] / half[1], local[2] / half[2], half, coef, quadric, sphere)
            normal = dot(rotation[0], n), dot(rotation[1], n), dot(rotation[2], n)
        cosine = -(rx * normal[0] + ry * normal[1] + rz * normal[2]) / math.sqrt(rx * rx + ry * ry + rz * rz)
        face = face_coordinates(local, n, half, quadric & (sphere | (abs(n[2]) < f(0.9))))
        for k in range(3):
            hits.point[k, i], hits.normal[k, i], hits.local[k, i] = at[k], normal[k], local[k]
        for k in range(4):
            hits.face[k, i] = face[k]
        hits.cosine[i], hits.footprint[i] = cosine, z / focal / max(cosine, f(0.15))


# ---- Light ----------------------------------------------------------------------------------------------------------


@lean_helper
def sunlit(point, sun, wall, rects, room):
    """Test whether the line to the sun leaves the room through a window pane."""
    axis = 0 if wall < 2 else 1
    plane = -room[axis] / f(2) if wall % 2 == 0 else room[axis] / f(2)
    share = (plane - point[axis]) / (sun[axis] - point[axis])
    across = point[1 - axis] + (sun[1 - axis] - point[1 - axis]) * share
    height = point[2] + (sun[2] - point[2]) * share
    for k in range(len(rects)):  # noqa: SIM110 - numba compiles no generator
        if rects[k, 0] < across < rects[k, 1] and rects[k, 2] < height < rects[k, 3]:
            return True
    return False


@lean_entry
def arriving(lights, room, hits, strength):
    """Compute how strongly each light reaches points, before cosine and shadow: strength [L, N], 0 from behind."""
    for light in range(len(lights.position)):
        at, facing, axis = lights.position[light], lights.facing[light], lights.normal[light]
        for i in range(hits.point.shape[1]):
            point = hits.point[0, i], hits.point[1, i], hits.point[2, i]
            away = point[0] - at[0], point[1] - at[1], point[2] - at[2]
            reach = ZERO
            if away[0] * hits.normal[0, i] + away[1] * hits.normal[1, i] + away[2] * hits.normal[2, i] < ZERO:
                square = dot(away, away)
                if light == lights.sun:
                    reach = ONE if sunlit(point, at, lights.wall, lights.rects, room) else ZERO
                else:
                    reach = ONE / (HALF + square)
                    if facing > ZERO:
                        reach *= max(dot(away, axis) / max(math.sqrt(square), f(1e-3)), ZERO)
            strength[light, i] = reach if reach * lights.color[light, 0] > f(1e-4) else ZERO


@lean_helper
def darkening(gap, along):
    """Darken ambient light near a plane, unless the surface lies in it."""
    return 1 - 0.35 * (1 - abs(along)) * math.exp(-max(gap, ZERO) / f(0.28)) if gap < f(4) else 1.0


@lean_helper
def ambient(point, normal, room):
    """Compute the share of ambient light, less in the room's edges and on undersides."""
    share = darkening(room[0] / f(2) - abs(point[0]), normal[0]) * darkening(room[1] / f(2) - abs(point[1]), normal[1])
    share *= darkening(point[2], normal[2]) * darkening(room[2] - point[2], normal[2])
    return share * (0.8 + 0.2 * normal[2])


@lean_helper
def mirrored(material, parts, ambient, room, point, ray):
    """Compute the color of the bare room in a direction."""
    distance, face, height = f(1e9), 0, ZERO
    for axis in range(3):
        d = ray[axis] if abs(ray[axis]) > f(1e-12) else f(1e-12)
        low = ZERO if axis == 2 else -room[axis] / f(2)
        high = room[2] if axis == 2 else room[axis] / f(2)
        at = max((low - point[axis]) / d, (high - point[axis]) / d)
        if at < distance:
            distance, face = at, (0 if axis == 2 else 2 + 2 * axis) + int(d > ZERO)
    m = material[parts + face]
    height = min(max((point[2] + ray[2] * distance) / room[2], ZERO), ONE)
    base, second, light, more = m[M_BASE : M_BASE + 3], m[M_SECOND : M_SECOND + 3], ambient, 0.2 + 0.25 * height
    return (
        0.5 * (base[0] + second[0]) * (light[0] + more),
        0.5 * (base[1] + second[1]) * (light[1] + more),
        0.5 * (base[2] + second[2]) * (light[2] + more),
    )


@lean_entry
def shade(shapes, lights, room, eye, part, hits, strength, color):
    """Turn the surface colors [3, N] into the radiance towards the camera at `eye`."""
    for i in range(len(part)):
        m = shapes.material[part[i]]
        gloss, shine = m[M_GLOSS], m[M_SHINE]
        point = hits.point[0, i], hits.point[1, i], hits.point[2, i]
        normal = hits.normal[0, i], hits.normal[1, i], hits.normal[2, i]
        view = eye[0] - point[0], eye[1] - point[1], eye[2] - point[2]
        length = math.sqrt(dot(view, view))
        view = view[0] / length, view[1] / length, view[2] / length
        share = ambient(point, normal, room)
        r, g, b = lights.ambient[0] * share, lights.ambient[1] * share, lights.ambient[2] * share
        sr = sg = sb = 0.0
        for light in range(len(strength)):
            reach = strength[light, i]
            if reach == ZERO:
                continue
            at, tint = lights.position[light], lights.color[light]
            towards = at[0] - point[0], at[1] - point[1], at[2] - point[2]
            length = math.sqrt(dot(towards, towards))
            towards = towards[0] / length, towards[1] / length, towards[2] / length
            lit = reach * max(dot(towards, normal), ZERO)
            r, g, b = r + lit * tint[0], g + lit * tint[1], b + lit * tint[2]
            if gloss > f(0.02):
                middle = towards[0] + view[0], towards[1] + view[1], towards[2] + view[2]
                sine = dot(middle, normal) / max(math.sqrt(dot(middle, middle)), f(1e-6))
                peak = reach * max(sine, ZERO) ** shine * gloss * (0.25 + shine / 40)
                sr, sg, sb = sr + peak * tint[0], sg + peak * tint[1], sb + peak * tint[2]
        r = color[0, i] * (r + m[M_EMIT]) + sr
        g = color[1, i] * (g + m[M_EMIT]) + sg
        b = color[2, i] * (b + m[M_EMIT]) + sb
        if gloss > f(0.05):
            facing = max(dot(normal, view), ZERO)
            ray = (
                f(2) * facing * normal[0] - view[0],
                f(2) * facing * normal[1] - view[1],
                f(2) * facing * normal[2] - view[2],
            )
            seen = mirrored(shapes.material, shapes.parts, lights.ambient, room, point, ray)
            share = gloss * (0.25 + 0.75 * (1 - facing) ** 4) * 0.8
            r, g, b = r + (seen[0] - r) * share, g + (seen[1] - g) * share, b + (seen[2] - b) * share
        color[0, i], color[1, i], color[2, i] = r, g, b


# ---- The image ------------------------------------------------------------------------------------------------------


@lean_helper
def pixel(spot, width):
    """Row and column of a pixel from its number in tile order."""
    tile, lane, columns = spot // LANES, spot % LANES, width // TILE
    return tile // columns * TILE + lane // TILE, tile % columns * TILE + lane % TILE


@lean_entry
def assemble(shapes, part, depth, color, hits, spots, weight, images):
    """Move pixels from tiles to images, and average them with the other rays of the pixels `spots`."""
    height, width = images.depth.shape
    pixels = height * width
    for i in range(pixels):
        row, column = pixel(i, width)
        for k in range(3):
            images.radiance[row, column, k] = color[k, i]
        images.depth[row, column], images.slant[row, column] = depth[i], hits.cosine[i]
        images.gloss[row, column] = shapes.material[part[i], M_GLOSS]
        images.semantic[row, column] = shapes.semantic[part[i]]
        images.instance[row, column] = shapes.instance[part[i]]
    for i in range(len(spots)):
        row, column = pixel(spots[i], width)
        for k in range(3):
            images.radiance[row, column, k] += weight * (color[k, pixels + i] - color[k, spots[i]])
