"""One image file: the JPEG that a prepared data set keeps of it, and its pixels as RGB of 8 bits."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from obowlab.data.beton import MAX_SIDE

MAX_PIXELS = 89_000_000
"""What Pillow, too, decodes without a warning: 270 MB as RGB."""

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # such images are refused, in a sentence
warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)  # its colours are kept

JPEG_QUALITY = 95
"""Of images that are not RGB or grayscale JPEG files already."""


@dataclass(frozen=True)
class DecodedImage:
    """An image that was decoded once completely: the JPEG bytes to keep and its size in pixels."""

    jpeg: bytes
    height: int
    width: int


class UnreadableImageError(Exception):
    """An image file cannot become a record; the text says why."""


def to_jpeg(data: bytes) -> DecodedImage:
    """Decode an image file and return JPEG bytes: its own if it is an RGB or grayscale JPEG, else encoded anew with quality 95.

    Both loaders decode either to the RGB pixels that torchvision's ImageFolder gives. Orientation tags are ignored, as there and
    in the authors' code.

    Raises:
        UnreadableImageError: it cannot be decoded, is too large for the format, or has values of no known range.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            check_size(image)
            image.load()
            width, height = image.size
            jpeg = data
            if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
                buffer = io.BytesIO()
                to_rgb(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
                jpeg = buffer.getvalue()
    except UnidentifiedImageError:  # its own text holds a memory address
        raise UnreadableImageError("not an image in a format Pillow knows") from None
    except UnreadableImageError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files; every one is reported
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error
    return DecodedImage(jpeg=jpeg, height=height, width=width)


def check_size(image: Image.Image) -> None:
    """Refuse an image by its header, before a file of kilobytes becomes gigabytes of pixels.

    Raises:
        UnreadableImageError: it is too large.
    """
    width, height = image.size
    if max(width, height) > MAX_SIDE:
        raise UnreadableImageError(f"{width}x{height} pixels: sides of at most {MAX_SIDE} fit")
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(f"{width}x{height} pixels: at most {MAX_PIXELS // 10**6} million are decoded")


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as RGB of 8 bits; values of more bits are scaled.

    Raises:
        UnreadableImageError: their range is not known.
    """
    return (_eight_bits(image) if image.mode[0] in "IF" else image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale an image of 16-bit values by 1/257 and one of floats in [0, 1] by 255; Pillow would cut values at 255.

    Raises:
        UnreadableImageError: its range is not known: other integers and floats, and values in the lowest sixteenth of the range,
            which are dark, or of fewer bits than their container.
    """
    values = np.asarray(image, np.float64)
    low, high = float(values.min()), float(values.max())
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))
    limit = 65535.0 if sixteen else 1.0
    if not (sixteen or image.mode == "F") or not (0 <= low <= high <= limit) or 0 < high < limit / 16:
        kind = "floats" if image.mode == "F" else "integers of 16 bits" if sixteen else "integers"
        raise UnreadableImageError(f"{kind} from {low:g} to {high:g}, whose range is not known: convert it to 8 bits")
    return Image.fromarray(np.rint(values * (255.0 / limit)).astype(np.uint8))
