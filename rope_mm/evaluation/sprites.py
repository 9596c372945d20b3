"""What a picture shows, told by the nearest drawing: nothing is learned, and every sprite is judged right."""

from functools import lru_cache

import torch
from torch import Tensor

from rope_mm.data.synthetic.captioned_sprites import all_combinations
from rope_mm.data.synthetic.sprites import (
    FACTORS,
    MOTIONS,
    PLACES,
    VIDEO_FACTORS,
    palette,
    sprite_masks,
    trajectory,
)

CHUNK = 128  # pictures at once, each against some 5,000 drawings


def classify_sprites(pictures: Tensor) -> dict[str, Tensor]:
    """The shape, colour, row and column (n,) of the most likely drawing, under white noise, of each picture.

    ‖picture - background - mask x (colour - background)‖² is least among all masks and colours. "distance"
    (n,) is its root mean square, of values in [-1, 1]; an empty canvas has -1 as every factor.

    Args:
        pictures: (n, 3, y, x), whole numbers in 0 to 255 or others in -1 to 1.

    Raises:
        ValueError: another shape.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"pictures must be (n, 3, y, x), not {tuple(pictures.shape)}")
    drawn, masks = templates(pictures.shape[2], pictures.shape[3])
    colours, background = palette()
    paint = (colours - background) / 127.5
    scaled = pictures.cpu().float() / (1 if pictures.is_floating_point() else 127.5)
    light = scaled + pictures.is_floating_point() - background[:, None, None] / 127.5
    weight = masks.square().sum(1)[:, None] * paint.square().sum(1)  # (mask, colour)
    best, least = [], []
    for part in light.flatten(2).split(CHUNK):
        gain = 2 * torch.einsum("ncp,mp,kc->nmk", part, masks, paint) - weight
        most, index = gain.flatten(1).max(1)
        best.append(index)
        least.append(part.square().sum((1, 2)) - most)
    index = torch.cat(best) if best else torch.zeros(0, dtype=torch.long)
    mask, colour = index // len(colours), index % len(colours)
    factors = {name: drawn[name][mask] for name in ("shape", "row", "column")}
    factors["colour"] = torch.where(factors["shape"] < 0, -1, colour)
    distance = (torch.cat(least) if least else torch.zeros(0)).clamp_min(0) / light[:1].numel()
    return {**{name: factors[name] for name in FACTORS}, "distance": distance.sqrt()}


@lru_cache(maxsize=8)
def templates(y: int, x: int) -> tuple[dict[str, Tensor], Tensor]:
    """What is drawn (m,) and its mask (m, y x): each shape at each place, nudged or not; at last nothing."""
    names = {name: FACTORS[name] for name in ("shape", "row", "column")}
    drawn = all_combinations({**names, "down": range(3), "right": range(3)})
    nudge = torch.stack([drawn.pop("down"), drawn.pop("right")], 1) - 1
    masks = sprite_masks(drawn, (y, x), nudge).flatten(1)
    empty = {name: torch.cat([factor, torch.tensor([-1])]) for name, factor in drawn.items()}
    return empty, torch.cat([masks, torch.zeros(1, y * x)])


def classify_videos(clips: Tensor) -> dict[str, Tensor]:
    """The factors (n,) of clips (n, t, 3, y, x), frame by frame; see `classify_sprites`.

    Shape and colour are those of all frames where there is a sprite, row and column those of the first, and
    the motion explains all places; each is -1 if there is no such. "distance" is the mean of the frames'.

    Raises:
        ValueError: another shape, or less than two frames.
    """
    if clips.ndim != 5 or clips.shape[1] < 2:
        raise ValueError(f"clips must be (n, t, 3, y, x) with 2 frames or more, not {tuple(clips.shape)}")
    frames = clips.shape[1]
    seen = {
        name: part.unflatten(0, (-1, frames)) for name, part in classify_sprites(clips.flatten(0, 1)).items()
    }
    verdict = {name: agreed(seen[name]) for name in ("shape", "colour")}
    verdict |= {name: seen[name][:, 0] for name in PLACES}
    fits = torch.stack([motion_matches(seen, motion) for motion in range(len(MOTIONS))], 1)
    verdict["motion"] = torch.where(fits.any(1), fits.int().argmax(1), -1)
    return {**{name: verdict[name] for name in VIDEO_FACTORS}, "distance": seen["distance"].mean(1)}


def agreed(seen: Tensor) -> Tensor:
    """The one index (n,) that all frames (n, t) show which show any, or -1."""
    most = seen.amax(1)
    return torch.where(((seen == most[:, None]) | (seen < 0)).all(1), most, -1)


def motion_matches(seen: dict[str, Tensor], motion: int) -> Tensor:
    """Whether a motion, from the first frame's place, leads through the places (n, t) of all frames."""
    first = {name: seen[name][:, 0] for name in PLACES}
    first |= {name: torch.zeros_like(first["row"]) for name in ("shape", "colour")}
    way = trajectory({**first, "motion": torch.full_like(first["row"], motion)}, seen["row"].shape[1])
    away = way["shape"] < 0
    return torch.stack([torch.where(away, -1, way[name]) == seen[name] for name in PLACES]).all(0).all(1)
