"""Pictures and animations that people bring, as a viewer shows them: upright, in sRGB, flat.

What a file says about its own look is obeyed: EXIF orientation, ICC profile, PNG's gamma, 16 bits a sample, CMYK,
transparency, and an animation's own durations. Pictures are PIL images in mode RGB.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from model.media.errors import BadMedia

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 2**26  # of one frame
MAX_FRAMES = 4096  # decoded, whatever is kept of them
SRGB = ImageCms.createProfile("sRGB")
SRGB_GAMMA = 1 / 2.2  # what PNG's gAMA says of a file that is as good as sRGB
DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # one channel of 16 bits a sample
FLOOR_SECONDS = Fraction(1, 100)  # browsers show a frame that is shorter, or does not say, for a tenth
UNSAID = Fraction(1, 10)
Image.MAX_IMAGE_PIXELS = None  # Pillow warns at one size and raises at another: `open_picture` draws the bound
Ground: TypeAlias = tuple[int, int, int]
BLACK: Ground = (0, 0, 0)


def open_picture(file: Path | io.BytesIO) -> Image.Image | None:
    """A picture or an animation, opened and not decoded; None where the bytes are neither but may be a video.

    Raises BadMedia for one that is too large, before anything of it is decoded.
    """
    try:
        picture = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        return None
    except Exception as error:
        raise BadMedia(f"is a picture that cannot be read ({_first_line(error)})") from None
    if picture.width * picture.height > MAX_PIXELS:
        raise BadMedia(f"is {picture.width}x{picture.height}, the most is {MAX_PIXELS:,} pixels")
    return picture


def is_animated(picture: Image.Image) -> bool:
    """Whether it has several frames. Raises BadMedia."""
    try:
        return getattr(picture, "n_frames", 1) > 1
    except Exception as error:
        raise BadMedia(f"is an animation that cannot be read to its end ({_first_line(error)})") from None


def shown_picture(picture: Image.Image, ground: Ground = BLACK) -> Image.Image:
    """The picture as a viewer shows it on a ground of this colour. Raises BadMedia."""
    try:
        picture.load()
        return flat(_in_srgb(_turned(picture)), ground)
    except BadMedia:
        raise
    except Exception as error:  # decoders raise what they like on damaged files
        raise BadMedia(f"is a picture that cannot be read ({_first_line(error)})") from None


def shown_animation(picture: Image.Image, ground: Ground = BLACK) -> Iterator[Image.Image]:
    """Each frame of an animation, played through once. Raises BadMedia."""
    for number in range(getattr(picture, "n_frames", 1)):
        _seek(picture, number)
        yield shown_picture(picture, ground)


def durations(file: Path | bytes) -> list[Fraction]:
    """The seconds for which each frame of an animation is shown. Raises BadMedia.

    Opens it anew: of an APNG that was sought through once, Pillow does not find its first frames again.
    """
    picture = open_picture(file if isinstance(file, Path) else io.BytesIO(file))
    assert picture is not None
    with picture:
        count = getattr(picture, "n_frames", 1)
        if count > MAX_FRAMES:
            raise BadMedia(f"has {count:,} frames, the most is {MAX_FRAMES:,}")
        return [_seek(picture, number) for number in range(count)]


def _seek(picture: Image.Image, number: int) -> Fraction:
    """Goes to a frame of an animation; the seconds for which it is shown."""
    try:
        picture.seek(number)
        picture.load()  # only then WebP's is known, and APNG's next frame can be found
        said = Fraction(picture.info.get("duration") or 0).limit_denominator(1000) / 1000
    except Exception as error:
        raise BadMedia(f"is an animation that cannot be read to its end ({_first_line(error)})") from None
    return said if said > FLOOR_SECONDS else UNSAID


def flat(picture: Image.Image, ground: Ground = BLACK) -> Image.Image:
    """In mode RGB; what is transparent shows the ground, never the colours that lie under it."""
    if picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        whole = Image.new("RGBA", picture.size, (*ground, 255))
        return Image.alpha_composite(whole, picture).convert("RGB")
    return picture.convert("RGB")


def _turned(picture: Image.Image) -> Image.Image:
    """Upright. A picture whose EXIF cannot be read is shown as it lies, as viewers do."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:
        return picture


def _in_srgb(picture: Image.Image) -> Image.Image:
    """In sRGB and 8 bits a sample, by its profile or its gamma where it has one; transparency is kept."""
    if picture.mode in DEEP:
        samples = np.asarray(picture.convert("I"), np.int64)
        picture = Image.fromarray((samples.clip(0, 65535) / 257 + 0.5).astype(np.uint8))
    profile = picture.info.get("icc_profile")
    if profile:
        return _by_profile(picture, profile)
    gamma = picture.info.get("gamma")
    if gamma and "srgb" not in picture.info and abs(gamma - SRGB_GAMMA) > 0.01:
        return _by_gamma(picture, float(gamma))
    return picture


def _by_profile(picture: Image.Image, profile: bytes) -> Image.Image:
    """Converted by its ICC profile; unchanged, as in viewers, where that is damaged or of another kind of colour."""
    if "transparency" in picture.info or picture.mode in ("P", "PA"):
        has_alpha = "transparency" in picture.info or picture.mode == "PA"
        picture = picture.convert("RGBA" if has_alpha else "RGB")
    alpha = picture.getchannel("A") if picture.mode in ("RGBA", "LA") else None
    colours = picture.convert(picture.mode.removesuffix("A")) if alpha else picture
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(colours, source, SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return picture
    assert converted is not None
    if alpha:
        converted.putalpha(alpha)
    return converted


def _by_gamma(picture: Image.Image, gamma: float) -> Image.Image:
    """A PNG whose samples are light to the power of `gamma`, in place of sRGB's own curve."""
    light = (np.arange(256) / 255) ** (1 / gamma)
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    curve = [round(255 * each) for each in srgb]
    if picture.mode in ("P", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    kept = {"RGBA": 1, "LA": 1}.get(picture.mode, 0)
    channels = len(picture.getbands()) - kept
    return picture.point(curve * channels + list(range(256)) * kept)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
