"""Pictures of scenes: a small ray tracer in numpy, with shadows, fog and weather."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.world.scene import COLOURS, FLOORS, RGB, Bools, Floats, Scene, Solid

HALF_HEIGHT = {"sphere": 1.0, "cube": 0.8, "cylinder": 0.9, "cone": 1.0}  # in radii
BOUND = {"sphere": 1.001, "cube": 1.387, "cylinder": 1.192, "cone": 1.415}  # radius of the sphere around it, in radii
HALF_VIEW = math.tan(math.radians(19.5))  # half the shorter side of the picture, at distance 1


def moments(scene: Scene, frames: int) -> list[float]:
    """The times of the frames. An image shows some moment, but never one solid hidden behind the other."""
    if frames > 1:
        return [i / (frames - 1) for i in range(frames)]
    j = scene.jitter.moment
    return [0.5 + (math.copysign(0.35 + 0.15 * abs(j), j) if scene.motion == "behind" else 0.45 * j)]


class Pose(NamedTuple):
    x: float
    y: float
    z: float
    angle: float  # radians about the vertical; only a cube shows it


def poses(scene: Scene, time: float) -> list[Pose]:
    """Where the centre of each solid is, and how it is turned."""
    j = scene.jitter
    first = scene.solids[0]
    swing = 2 * time - 1  # -1 to 1 over the clip
    height = [HALF_HEIGHT[solid.shape] * solid.radius for solid in scene.solids]
    x, y, z, angle = 0.45 * j.sideways, height[0], 0.4 * j.depth, 0.75 * j.turn
    match scene.motion:
        case "left" | "right":
            x = 0.12 * j.sideways + (1 if scene.motion == "right" else -1) * swing * (1.2 + 0.08 * j.reach)
        case "closer" | "away":
            x *= 0.5
            z = (1 if scene.motion == "closer" else -1) * swing * (2.3 + 0.15 * j.reach) - 0.6
        case "spin":
            angle += scene.direction * time * (3.6 + 0.6 * j.reach)
        case "bounce":
            beats = time * (2.5 + 0.4 * j.reach) + 0.25 * (j.phase + 1)
            y += abs(math.sin(math.pi * beats)) * (1.0 + 0.1 * j.lift) * (1.9 / (1 + first.radius))
        case _:
            pass
    if len(scene.solids) == 1:
        return [Pose(x, y, z, angle)]
    if scene.motion == "behind":
        x, z = scene.direction * swing * (1.95 + 0.08 * j.reach) + 0.15 * j.sideways, z * 0.5 - 1.5
        return [Pose(x, y, z, angle), Pose(0.15 * j.sideways, height[1], 0.5, 0.75 * j.turn2)]
    side = 1 if scene.motion == "bounce" and j.side > 0 else -1
    gap = 1.0 + 0.06 * j.reach
    return [Pose(side * gap, y, 0.35 * j.depth, angle), Pose(-side * gap, height[1], 0.35 * j.depth2, 0.75 * j.turn2)]


class Eye(NamedTuple):
    position: RGB
    right: RGB
    up: RGB
    forward: RGB


def eye(scene: Scene, time: float) -> Eye:
    """The camera. It orbits right by travelling to the right around the scene, and pans right by turning right."""
    kind, _, way = scene.camera.partition(" ")
    sign = {"right": 1, "left": -1}.get(way, 0)
    pair = len(scene.solids) == 2
    around, turned, distance = 0.1 * scene.jitter.view, 0.0, 7.0 if pair else 6.4
    if kind == "orbit":
        around += sign * (time - 0.5) * 1.15
    if kind == "pan":
        turned = sign * (time - 0.5) * (0.20 if pair else 0.32)
    if kind == "dolly":
        distance = (5.5 if pair else 4.6) + 3.9 * (1 - time if way == "in" else time)
    height = 0.33 * distance + 0.1
    position = (distance * math.sin(around), height, distance * math.cos(around))
    fx, fy, fz = -math.sin(around - turned), (0.9 - height) / distance, -math.cos(around - turned)
    flat = math.hypot(fx, fz)
    norm = math.hypot(flat, fy)
    right = (-fz / flat, 0.0, fx / flat)
    forward = (fx / norm, fy / norm, fz / norm)
    up = (
        right[1] * forward[2] - right[2] * forward[1],
        right[2] * forward[0] - right[0] * forward[2],
        right[0] * forward[1] - right[1] * forward[0],
    )
    return Eye(position, right, up, forward)


class Weather(NamedTuple):
    zenith: RGB
    horizon: RGB  # also the colour of the fog
    tint: RGB
    ambient: float
    sun: float


WEATHER = {
    "day": Weather((0.30, 0.52, 0.92), (0.85, 0.92, 1.00), (1.00, 1.00, 1.00), 0.48, 0.60),
    "sunset": Weather((0.40, 0.22, 0.48), (0.98, 0.68, 0.46), (1.03, 0.95, 0.88), 0.48, 0.56),
    "night": Weather((0.01, 0.02, 0.08), (0.09, 0.11, 0.24), (0.90, 0.94, 1.06), 0.46, 0.54),
}
TILE = 2.0  # world units; smaller tiles alias in the distance, and an autoencoder then spends itself on them
FOG = 0.10  # per world unit beyond 5


def render(
    scene: Scene, *, width: int = 64, height: int = 64, frames: int = 17, supersample: int = 2
) -> NDArray[np.uint8]:
    """Pixels of the clip, [T, H, W, 3] in 0..255. Any size: the picture's shorter side always shows the same view."""
    if min(width, height, frames, supersample) < 1:
        raise ValueError(f"{width}x{height}x{frames} (supersample {supersample}) must all be at least 1")
    across, upward = _screen(width, height, supersample)
    clip = np.empty((frames, height, width, 3), np.uint8)
    view = backdrop = None
    for frame, time in enumerate(moments(scene, frames)):
        here = eye(scene, time)
        if backdrop is None or here != view:  # under a static camera the empty stage is drawn once
            view, backdrop = here, _backdrop(scene, here, across, upward)
        picture = _draw_solids(scene, poses(scene, time), here, backdrop)  # [3, N]
        picture = picture.reshape(3, supersample**2, height, width).mean(axis=1)
        clip[frame] = (picture.clip(0, 1) * 255 + 0.5).transpose(1, 2, 0)
    return clip


def _screen(width: int, height: int, supersample: int) -> tuple[Floats, Floats]:
    """How far each ray leans to the right and upwards: two [N]."""
    scale = HALF_VIEW / min(width, height)
    sub = (np.arange(supersample) + 0.5) / supersample
    u = (2 * (np.arange(width) + sub[:, None]) - width) * scale  # [S, W]
    v = (height - 2 * (np.arange(height) + sub[:, None])) * scale  # [S, H]
    grid = (supersample, supersample, height, width)
    across = np.broadcast_to(u[None, :, None, :], grid)
    upward = np.broadcast_to(v[:, None, :, None], grid)
    return across.reshape(-1).astype(np.float32), upward.reshape(-1).astype(np.float32)


class Backdrop(NamedTuple):
    rays: Floats  # [3, N], unit length
    lit: Floats  # [3, N], sky and floor without solids
    shaded: Floats  # [3, N], the same with the whole floor in shadow
    floor: NDArray[np.intp]  # [F], the rays that meet the floor
    spot: Floats  # [2, F], where they meet it: x and z


def _backdrop(scene: Scene, here: Eye, across: Floats, upward: Floats) -> Backdrop:
    weather = WEATHER[scene.sky]
    rays = np.stack([f + across * r + upward * u for r, u, f in zip(here.right, here.up, here.forward, strict=True)])
    rays /= np.sqrt((rays * rays).sum(axis=0))
    lit = _column(weather.horizon) + (_column(weather.zenith) - _column(weather.horizon)) * (rays[1] * 3.2).clip(0, 1)
    shaded = lit.copy()

    floor = np.flatnonzero(rays[1] < -1e-3)
    down = rays[:, floor]  # [3, F]
    distance = -here.position[1] / down[1]
    x, z = here.position[0] + distance * down[0], here.position[2] + distance * down[2]
    tones = [_column(tone) for tone in FLOORS[scene.floor]]
    pattern = np.cos(x * (math.pi / TILE)) * np.cos(z * (math.pi / TILE))
    if scene.floor == "checkered":  # hard edges near by, blurred where a pixel covers much of a tile
        pattern = (pattern * (160 / (distance * distance))).clip(-1, 1)
    ground = tones[0] + (tones[1] - tones[0]) * (0.5 + 0.5 * pattern)
    ground *= _column(weather.tint)
    clear = np.exp((5 - distance).clip(None, 0) * FOG)
    fog = _column(weather.horizon) * (1 - clear)
    sun = _sun(scene)
    lit[:, floor] = ground * (weather.ambient + weather.sun * sun[1]) * clear + fog
    shaded[:, floor] = ground * (weather.ambient * 0.9) * clear + fog
    return Backdrop(rays, lit, shaded, floor, np.stack([x, z]))


def _column(colour: RGB) -> Floats:
    return np.array(colour, np.float32)[:, None]


def _sun(scene: Scene) -> RGB:
    x, y, z = 0.6 * scene.jitter.light, 0.8, 0.6
    norm = math.sqrt(x * x + y * y + z * z)
    return (x / norm, y / norm, z / norm)


def _draw_solids(scene: Scene, where: Sequence[Pose], here: Eye, backdrop: Backdrop) -> Floats:
    """The frame with shadows and solids on it, [3, N]. Solids cast shadows on the floor only."""
    picture = backdrop.lit.copy()
    sun = _sun(scene)
    for solid, pose in zip(scene.solids, where, strict=True):
        dark = backdrop.floor[_shadow(solid, pose, sun, backdrop.spot)]
        picture[:, dark] = backdrop.shaded.take(dark, axis=1)
    depth = np.full(picture.shape[1], np.inf, np.float32) if len(where) > 1 else None
    weather = WEATHER[scene.sky]
    for solid, pose in zip(scene.solids, where, strict=True):
        origin = (here.position[0] - pose.x, here.position[1] - pose.y, here.position[2] - pose.z)
        near = _near(origin, backdrop.rays, BOUND[solid.shape] * solid.radius)
        origin, rays = (
            _turned(np.array(origin, np.float32)[:, None], pose),
            _turned(backdrop.rays.take(near, axis=1), pose),
        )
        distance, normal = _meet(solid, origin, rays)
        seen = np.isfinite(distance)
        if depth is not None:
            seen &= distance < depth[near]
        at, rays, normal = near[seen], rays[:, seen], normal[:, seen]
        if depth is not None:
            depth[at] = distance[seen]
        light = _turned(_column(sun), pose)
        facing = (normal * light).sum(axis=0)
        bounced = (rays * light).sum(axis=0) - 2 * (normal * rays).sum(axis=0) * facing
        gloss = 0.22 * np.square(np.square(np.square(np.square(bounced.clip(0, None)))))  # a power is 10x slower
        shade = weather.ambient + weather.sun * facing.clip(0, None) + 0.12 * normal[1]
        picture[:, at] = _column(COLOURS[solid.colour]) * _column(weather.tint) * shade + gloss
    return picture


def _near(origin: RGB, rays: Floats, radius: float) -> NDArray[np.intp]:
    """[M], the rays from origin that pass the world's centre within the radius. Tracing only these is 5x faster."""
    along = origin[0] * rays[0] + origin[1] * rays[1] + origin[2] * rays[2]
    apart = origin[0] ** 2 + origin[1] ** 2 + origin[2] ** 2 - radius**2
    return np.flatnonzero((along < 0) & (along * along > apart))


def _shadow(solid: Solid, pose: Pose, sun: RGB, spot: Floats) -> NDArray[np.intp]:
    """The indices of the spots on the floor [2, F] that the solid keeps the sun from."""
    x, z = spot[0] - pose.x, spot[1] - pose.z
    along = x * sun[0] - pose.y * sun[1] + z * sun[2]
    away = x * x + pose.y**2 + z * z - along * along
    near = np.flatnonzero(away < (BOUND[solid.shape] * solid.radius) ** 2)
    origin = np.stack([x[near], np.full(len(near), -pose.y, np.float32), z[near]])
    ray = _turned(_column(sun), pose)
    distance, _ = _meet(solid, _turned(origin, pose), np.broadcast_to(ray, origin.shape))
    return near[np.isfinite(distance)]


def _turned(vectors: Floats, pose: Pose) -> Floats:
    """Vectors [3, M] as the turned solid sees them."""
    c, s = math.cos(pose.angle), math.sin(pose.angle)
    x, y, z = vectors
    return np.stack([x * c - z * s, y, x * s + z * c])


def _meet(solid: Solid, origin: Floats, rays: Floats) -> tuple[Floats, Floats]:
    """Where rays [3, M] from origin [3, 1 or M] first meet a solid around 0: distance [M] (or inf), normal [3, M]."""
    size = solid.radius
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        match solid.shape:
            case "sphere":
                return _meet_sphere(size, origin, rays)
            case "cube":
                return _meet_cube(HALF_HEIGHT["cube"] * size, origin, rays)
            case "cylinder":
                return _meet_cylinder(0.78 * size, HALF_HEIGHT["cylinder"] * size, origin, rays)
            case _:
                return _meet_cone(size, HALF_HEIGHT["cone"] * size, origin, rays)


def _meet_sphere(radius: float, origin: Floats, rays: Floats) -> tuple[Floats, Floats]:
    b = (origin * rays).sum(axis=0)
    q = b * b - (origin * origin).sum(axis=0) + radius * radius
    distance = _if(q > 0, -b - np.sqrt(q))
    return distance, np.divide(origin + distance * rays, radius, dtype=np.float32)


def _meet_cube(half: float, origin: Floats, rays: Floats) -> tuple[Floats, Floats]:
    inverse = 1 / rays
    middle, reach = -origin * inverse, half * np.abs(inverse)
    enter, leave = middle - reach, (middle + reach).min(axis=0)  # [3, M], [M]
    last = enter.max(axis=0)
    return _if(last < leave, last), -np.sign(rays) * (enter == last)


def _meet_cylinder(radius: float, half: float, origin: Floats, rays: Floats) -> tuple[Floats, Floats]:
    ox, oy, oz = origin
    dx, dy, dz = rays
    a, b, c = dx * dx + dz * dz, ox * dx + oz * dz, ox * ox + oz * oz - radius * radius
    q = b * b - a * c
    wall = (-b - np.sqrt(q)) / a
    wall = _if((q > 0) & (np.abs(oy + wall * dy) < half), wall)
    up = -np.sign(dy)
    lid = _lid(radius, (up * half - oy) / dy, origin, rays)
    distance = np.minimum(wall, lid)
    on_wall = wall < lid
    normal = np.stack([on_wall * (ox + distance * dx) / radius, ~on_wall * up, on_wall * (oz + distance * dz) / radius])
    return distance, normal


def _meet_cone(radius: float, half: float, origin: Floats, rays: Floats) -> tuple[Floats, Floats]:
    ox, oy, oz = origin
    dx, dy, dz = rays
    slope = radius / (2 * half)  # at height y the cone is slope * (half - y) wide
    below = half - oy
    a = dx * dx + dz * dz - slope**2 * dy * dy
    b = ox * dx + oz * dz + slope**2 * below * dy
    q = b * b - a * (ox * ox + oz * oz - slope**2 * below * below)
    root = np.sqrt(q)
    walls = [(-b - root) / a, (-b + root) / a]
    wall = np.minimum(*[_if((q > 0) & (np.abs(oy + t * dy) < half), t) for t in walls])
    lid = _lid(radius, (-half - oy) / dy, origin, rays)
    distance = np.minimum(wall, lid)
    on_wall = wall < lid
    x, z = ox + distance * dx, oz + distance * dz
    lean = on_wall / (np.sqrt(x * x + z * z) * math.sqrt(1 + slope**2) + 1e-6)
    rise = np.where(on_wall, np.float32(slope / math.sqrt(1 + slope**2)), np.float32(-1))
    return distance, np.stack([x * lean, rise, z * lean])


def _lid(radius: float, distance: Floats, origin: Floats, rays: Floats) -> Floats:
    x, z = origin[0] + distance * rays[0], origin[2] + distance * rays[2]
    return _if(x * x + z * z < radius * radius, distance)


def _if(met: Bools, distance: Floats) -> Floats:
    """The distance of rays that meet what lies ahead of them, infinity for the others."""
    return np.where(met & (distance > 1e-3), distance, np.float32(np.inf))
