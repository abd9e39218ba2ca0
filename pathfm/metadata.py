"""The scale of a slide by its own metadata: tags of TIFF, Aperio's pairs, the XML of OME and Philips."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

from pathfm.errors import InputError

MPP_TOLERANCE = 0.01  # a level this close to the mpp asked for is returned as it is
COARSEST_TAG_MPP = 20.0  # a TIFF resolution tag beyond this is meant for printers (72 dpi is 353 um/px)
THREE_WAYS = "give it one: a column 'mpp' in the cohort, Slide.open(path, mpp=...), or mend the file's own metadata"
OME_UM = {"µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "Å": 1e-4, "pm": 1e-6, "in": 25_400.0}


class Unsupported(Exception):
    """Why a slide's compressed tiles cannot be read from here; OpenSlide may know it."""


def text_of(page, tag: str) -> str | None:
    found = page.tags.get(int(tag) if tag.isdigit() else tag)
    if found is None:
        return None
    value = found.value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def properties_of(vendor: str, page) -> dict[str, str]:
    """What says the scale, under OpenSlide's names."""
    found = {"openslide.vendor": vendor}
    if vendor == "aperio":
        pairs = (part.split("=", 1) for part in page.description.split("|")[1:] if "=" in part)
        values = {key.strip(): value.strip() for key, value in pairs}
        mpp = values.get("MPP"), values.get("MPP")
    elif vendor == "philips":
        mpp = philips_spacings(page.description)[0]
    elif vendor == "ome":
        mpp = _ome_mpp(page.description)
    else:
        mpp = None, None
    found |= {f"openslide.mpp-{axis}": str(value) for axis, value in zip("xy", mpp, strict=True) if value is not None}
    unit = text_of(page, "ResolutionUnit")
    found["tiff.ResolutionUnit"] = {"3": "centimeter", "1": "none"}.get((unit or "2")[-1], "inch")
    for axis in "XY":
        tag = page.tags.get(f"{axis}Resolution")
        if tag is not None and tag.value[1]:
            found[f"tiff.{axis}Resolution"] = repr(tag.value[0] / tag.value[1])
    return found


def _ome_mpp(description: str) -> tuple[float | None, float | None]:
    """um per pixel of the first image of OME-XML."""
    pixels = next((node for node in _xml(description).iter() if node.tag.endswith("}Pixels")), None)
    if pixels is None:
        return None, None
    sides = []
    for axis in "XY":
        unit = OME_UM.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        size = pixels.get(f"PhysicalSize{axis}")
        sides.append(float(size) * unit if size and unit else None)
    return sides[0], sides[1]


def philips_spacings(description: str) -> list[tuple[float, float]]:
    """(x, y) um per pixel of each level of a Philips slide's first whole-slide image."""
    for image in _xml(description).iter("DataObject"):
        kinds = [node.text for node in image.findall("Attribute") if node.get("Name") == "PIM_DP_IMAGE_TYPE"]
        if kinds != ["WSI"]:
            continue
        nodes = (
            node
            for level in image.iter("DataObject")
            if level.get("ObjectType") == "PixelDataRepresentation"
            for node in level.findall("Attribute")
            if node.get("Name") == "DICOM_PIXEL_SPACING"
        )
        pairs = [re.findall(r"[\d.eE+-]+", node.text or "") for node in nodes]
        if not pairs or any(len(pair) != 2 for pair in pairs):
            break
        return [(1e3 * float(across), 1e3 * float(down)) for down, across in pairs]
    raise Unsupported("its description gives no spacing of pixels for its levels")


def _xml(text: str) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(text.encode("utf-8"))
    except ElementTree.ParseError as error:
        raise Unsupported(f"its description is no XML ({error})") from None


def mpp_of(properties, path) -> float:
    """Microns per level-0 pixel from the file's metadata."""
    x, y = (_positive(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
    if x is None or y is None:
        x, y = (_tag_mpp(properties, axis) for axis in "XY")
    if x is None or y is None or _printers(properties, x):
        raise InputError(f"{path} has no mpp (microns per pixel); {THREE_WAYS}")
    if abs(x - y) > MPP_TOLERANCE * min(x, y):
        raise InputError(f"{path} has pixels that are not square: {x:g} x {y:g} um. If the file is wrong, {THREE_WAYS}")
    return checked_mpp((x + y) / 2, path)


def _printers(properties, mpp: float) -> bool:
    generic = properties.get("openslide.vendor", "generic-tiff") == "generic-tiff"
    return generic and mpp > COARSEST_TAG_MPP


def _tag_mpp(properties, axis: str) -> float | None:
    """um/px from a TIFF resolution tag, which counts pixels per centimetre or inch."""
    per_unit = _positive(properties.get(f"tiff.{axis}Resolution"))
    unit_um = {"centimeter": 10_000.0, "inch": 25_400.0}.get(properties.get("tiff.ResolutionUnit"))
    if per_unit is None or unit_um is None or unit_um / per_unit > COARSEST_TAG_MPP:
        return None
    return unit_um / per_unit


def _positive(text) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def checked_mpp(mpp, path) -> float:
    value = _positive(mpp)
    if value is None or not 0.01 <= value <= 1000:
        raise InputError(f"{path} has mpp {mpp!r}; microns per pixel lie between 0.01 and 1000")
    return value
