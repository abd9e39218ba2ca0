"""Tiled TIFFs of every codec that is read here, written tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import simplejpeg
import tifffile
from slide_files import shrink

JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
APERIO = "Aperio Image Library test\r\n{0}x{1} |AppMag = 20|MPP = 0.5"


def adobe(transform: int) -> bytes:
    return b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])


def texture(width: int, height: int, seed: int = 0, blur: float = 1.5) -> np.ndarray:
    """Smooth colourful noise: (height, width, 3) uint8."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3))
    return np.clip(128 + 160 * blur * cv2.GaussianBlur(noise, (0, 0), blur), 0, 255).astype(np.uint8)


def segments(jpeg: bytes) -> tuple[dict[int, list[bytes]], bytes]:
    """The segments of a JPEG by kind, and the rest from its frame on."""
    found, at = {}, 2
    while jpeg[at + 1] not in (0xC0, 0xC2):
        length = 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        found.setdefault(jpeg[at + 1], []).append(jpeg[at : at + length])
        at += length
    rest = jpeg[at:]
    return found, rest


def jpeg(tile: np.ndarray, colour: str, subsampling: str) -> bytes:
    if colour == "ycbcr":
        return simplejpeg.encode_jpeg(np.ascontiguousarray(tile), 75, "RGB", subsampling)
    return imagecodecs.jpeg8_encode(tile, level=75, colorspace="RGB", outcolorspace="RGB", subsampling="444")


def marked(data: bytes, marker: str, colour: str, shared: bool) -> tuple[bytes, bytes]:
    """(stream, shared tables) of a JPEG whose colours are said by `marker`: "none", "JFIF" or "Adobe"."""
    found, rest = segments(data)
    head = {"none": b"", "JFIF": JFIF, "Adobe": adobe(int(colour == "ycbcr"))}[marker]
    tables = b"".join(found.get(0xDB, []))
    if shared:
        return b"\xff\xd8" + head + rest, b"\xff\xd8" + tables + b"\xff\xd9"
    return b"\xff\xd8" + head + tables + rest, b""


def tiles_of(pixels: np.ndarray, side: int) -> Iterator[np.ndarray]:
    """Row by row; the last ones filled up with the image's edge."""
    for top in range(0, pixels.shape[0], side):
        for left in range(0, pixels.shape[1], side):
            tile = pixels[top : top + side, left : left + side]
            missing = (0, side - tile.shape[0]), (0, side - tile.shape[1]), (0, 0)
            yield np.pad(tile, missing, "edge")


def write_jpeg(
    path: Path,
    pixels: np.ndarray,
    colour: str = "ycbcr",
    marker: str = "JFIF",
    subsampling: str = "420",
    side: int = 256,
    shared: bool = False,
    levels=(1,),
    empty=(),
    **tiff,
) -> Path:
    """An Aperio-like SVS; `empty` are (level, tile) that hold no bytes."""
    with tifffile.TiffWriter(path, **tiff) as file:
        for number, level in enumerate(levels):
            image = pixels if level == 1 else np.round(shrink(pixels, level)).astype(np.uint8)
            encoded = [marked(jpeg(t, colour, subsampling), marker, colour, shared) for t in tiles_of(image, side)]
            streams = [b"" if (number, k) in empty else stream for k, (stream, _) in enumerate(encoded)]
            extra = {"jpegtables": encoded[0][1]} if shared else {}
            if colour == "rgb":
                extra["compressionargs"] = {"outcolorspace": "rgb"}  # else the tag says YCbCr
            file.write(
                iter(streams),
                shape=image.shape,
                dtype=np.uint8,
                tile=(side, side),
                compression="jpeg",
                photometric=colour,
                metadata=None,
                description=APERIO.format(*image.shape[1::-1]),
                **extra,
            )
    return path


def write_jpeg2000(path: Path, streams: list[bytes], size: tuple[int, int], side: int, tag: int) -> Path:
    """An Aperio-like SVS of JPEG 2000 codestreams; size is (width, height)."""
    with tifffile.TiffWriter(path) as file:
        file.write(
            iter(streams),
            shape=(size[1], size[0], 3),
            dtype=np.uint8,
            tile=(side, side),
            compression=tag,
            photometric="rgb",
            metadata=None,
            description=APERIO.format(*size),
        )
    return path


def jpeg2000(tile: np.ndarray, transform: bool) -> bytes:
    """A codestream; `transform` lets it turn RGB into YCbCr itself, else its components are stored as they are."""
    return bytes(imagecodecs.jpeg2k_encode(tile, level=45, codecformat="j2k", mct=transform))
