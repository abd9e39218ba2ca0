"""Images from compressed tiles: decode, paste, fade, resample, many of them without the interpreter's lock.

Two threads that met at that lock for every tile gained next to nothing.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from pathfm.decode import copy_bytes, joined
from pathfm.kernels import kernel
from pathfm.resample import resample
from pathfm.turbojpeg import WHOLE, part, pointer

WHITE = 255  # what is beyond the slide, and where it has no compressed tile

IMAGE = np.dtype(
    [
        ("first", "i8"),  # of its pieces, and one past the last
        ("last", "i8"),
        ("out", "i8"),  # address of its pixels, (out_height, out_width, 3) uint8
        ("out_width", "i8"),
        ("out_height", "i8"),
        ("x", "i8"),  # of the canvas in the scaled level, decoded pixels
        ("y", "i8"),
        ("width", "i8"),  # of the canvas
        ("height", "i8"),
        ("scale", "i8"),
        ("level_width", "i8"),  # before it is scaled
        ("level_height", "i8"),
        ("tile_width", "i8"),  # of its compressed tiles, before they are scaled
        ("tile_height", "i8"),
        ("head", "i8"),  # address of what their JPEGs begin with, and its length; see decode.Recipe
        ("head_length", "i8"),
        ("as_it_is", "i8"),
        ("resampled", "i8"),  # 0: the canvas is the image
        ("left", "f8"),  # as `resample` takes them
        ("top", "f8"),
        ("step", "f8"),
    ]
)
READY = np.dtype(
    [
        ("pixels", "i8"),  # address of a piece's pixels, (rows, columns, 3) uint8; 0: it is not decoded yet
        ("columns", "i8"),
        ("rows", "i8"),
        ("x", "i8"),  # of the first of them in the tile
        ("y", "i8"),
    ]
)


@kernel()
def paint(calls, pieces, data, ready, images, stream, tile, scratch):
    """Fill images; the number of the first piece whose JPEG is damaged, or -1.

    calls           turbojpeg.ADDRESSES
    pieces, ready   (P,) tilemap.PIECE and READY
    data            (P,) int64, the addresses of their bytes
    images          (n,) IMAGE
    stream, tile, scratch  uint8, room for the longest JPEG, a decoded tile and the largest canvas that is resampled
    """
    for n in range(len(images)):
        image = images[n]
        out = carray(pointer(image.out), (image.out_height, image.out_width, 3))
        canvas = out
        if image.resampled:
            canvas = scratch[: image.height * image.width * 3].reshape(image.height, image.width, 3)
        damaged = _paste(calls, pieces, data, ready, image, stream, tile, canvas)
        if damaged >= 0:
            return damaged
        if image.scale > 1:
            _fade(image, canvas)
        if image.resampled:
            resample(canvas, image.left, image.top, image.step, out)
    return -1


@kernel()
def _paste(calls, pieces, data, ready, image, stream, tile, canvas):
    """Bring an image's pieces onto the canvas, white beyond them; the number of a damaged one, or -1."""
    covered = 0
    for k in range(image.first, image.last):
        covered += (pieces[k].right - pieces[k].left) * (pieces[k].bottom - pieces[k].top)
    if covered < image.width * image.height:
        canvas[:] = WHITE
    head, flat = carray(pointer(image.head), (image.head_length,)), canvas.reshape(-1)
    for k in range(image.first, image.last):
        piece, done = pieces[k], ready[k]
        x, y, columns, rows = done.x, done.y, done.columns, done.rows
        pixels = tile
        if done.pixels:
            pixels = carray(pointer(done.pixels), (rows * columns * 3,))
        else:
            length = joined(head, image.as_it_is, carray(pointer(data[k]), (piece.length,)), stream)
            size, box = (image.tile_width, image.tile_height), (piece.left, piece.top, piece.right, piece.bottom)
            status, x, y, columns, rows = part(calls, stream[:length], *size, image.scale, *box, tile)
            if status != WHOLE:
                return k
        width = 3 * (piece.right - piece.left)
        for row in range(piece.top, piece.bottom):
            start = 3 * ((row - y) * columns + piece.left - x)
            at = 3 * ((piece.y + row) * image.width + piece.x + piece.left)
            copy_bytes(pixels[start : start + width], flat[at : at + width])
    return -1


@kernel()
def _fade(image, canvas):
    """Let the level's last column and row be white by the share of them that lies beyond the level."""
    column, row = image.level_width // image.scale - image.x, image.level_height // image.scale - image.y
    share = image.level_width % image.scale / image.scale
    if share > 0 and 0 <= column < image.width:
        _whiten(canvas[:, column], share)
    share = image.level_height % image.scale / image.scale
    if share > 0 and 0 <= row < image.height:
        _whiten(canvas[row], share)


@kernel()
def _whiten(line, share):
    for i in range(line.shape[0]):
        for c in range(3):
            line[i, c] = np.uint8(np.round(WHITE + np.float32(share) * np.float32(np.int32(line[i, c]) - WHITE)))
