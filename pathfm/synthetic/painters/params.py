"""What differs between patients: one flat table of numbers, each with its typical spread and the reason."""

from __future__ import annotations

from dataclasses import dataclass, field

CLASSES = ("tumour", "normal", "stroma", "muscle", "lymphocytes", "adipose", "mucus", "necrosis")
TUMOUR, NORMAL, STROMA, MUSCLE, LYMPHOCYTES, ADIPOSE, MUCUS, NECROSIS = range(1, 9)  # 0 is glass


def _p(default: float, sd: float, why: str, scale: str = "um", log: bool = True, low=None, high=None):
    """A field: `sd` between patients, of the logarithm where `log`; `scale` is the cue's size in the image."""
    meta = {"sd": sd, "why": why, "scale": scale, "log": log, "low": low, "high": high}
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class TissueParams:
    """How one patient's (or one region's) tissue is built. A default is typical; 1.0 mostly means "as published".

    Field metadata: `sd` between patients (of the logarithm where `log` is true), `why` in a phrase, `scale` one
    of "fine" (visible below 2 um only), "cell", "coarse" (visible above 50 um only) or "colour", and `low`,
    `high`, the range that can be drawn (None: unbounded).
    """

    # cells
    nuclear_size: float = _p(1.0, 0.07, "diameter of every nucleus", "cell", low=0.6, high=1.8)
    nuclear_density: float = _p(1.0, 0.12, "nuclei per area, all classes", "cell", low=0.3, high=2.0)
    elongation: float = _p(1.0, 0.08, "length over width of epithelial nuclei", "cell", low=0.6, high=1.8)
    pleomorphism: float = _p(1.0, 0.25, "spread of tumour nuclear size and darkness", "cell", low=0.0, high=3.0)
    mitoses: float = _p(12.0, 0.6, "mitotic figures per mm2 of tumour", "cell", low=0.0, high=200.0)
    variation: float = _p(1.0, 0.0, "nucleus to nucleus spread of size, form and darkness", "cell", low=0.0, high=2.0)
    # below 2 um
    chromatin: float = _p(1.0, 0.25, "grain of the chromatin", "fine", low=0.0, high=5.0)
    nucleoli: float = _p(1.0, 0.4, "nucleoli per epithelial nucleus", "fine", low=0.0, high=9.0)
    outline: float = _p(1.0, 0.2, "irregularity of the nuclear outline", "fine", low=0.0, high=6.0)
    # epithelial architecture
    gland_um: float = _p(130.0, 0.18, "spacing of tumour glands or nests", "coarse", low=50.0, high=400.0)
    gland_form: float = _p(0.7, 0.2, "0 solid sheets, 1 open glands", "coarse", False, 0.0, 1.0)
    cribriform: float = _p(0.3, 0.2, "share of glands with several lumina", "coarse", False, 0.0, 1.0)
    septa_um: float = _p(7.0, 0.25, "half the width of the stroma between tumour glands", "coarse", low=1.0, high=40.0)
    crypt_um: float = _p(78.0, 0.08, "diameter of normal crypts", "coarse", low=40.0, high=140.0)
    crypt_cut: float = _p(0.5, 0.3, "0 crypts cut across, 1 cut along", "coarse", False, 0.0, 1.0)
    crowding: float = _p(0.0, 0.0, "0 separate crypts, above it packed and cribriform ones", "coarse", False, 0.0, 2.0)
    goblet: float = _p(1.0, 0.25, "goblet cells in normal crypts", "cell", low=0.0, high=2.0)
    # connective tissue
    inflammation: float = _p(
        1.0, 0.5, "lymphocytes and plasma cells outside lymphoid tissue", "cell", low=0.0, high=6.0
    )
    fibre_um: float = _p(1.0, 0.15, "thickness of collagen and muscle fibres", "cell", low=0.4, high=2.5)
    fibre_wave: float = _p(1.0, 0.3, "waviness of collagen", "coarse", low=0.0, high=6.0)
    fascicle_um: float = _p(110.0, 0.2, "width of a muscle fascicle", "coarse", low=40.0, high=900.0)
    looseness: float = _p(0.5, 0.2, "clefts and oedema between fibres", "cell", False, 0.0, 1.0)
    vessels: float = _p(1.0, 0.3, "vessels per area of stroma", "coarse", low=0.0, high=4.0)
    fat_cell_um: float = _p(78.0, 0.12, "diameter of adipocytes", "coarse", low=30.0, high=160.0)
    fat_wall_um: float = _p(1.3, 0.15, "thickness of adipocyte walls", "fine", low=0.6, high=4.0)
    follicles: float = _p(1.0, 0.4, "germinal centres per area of lymphoid tissue", "coarse", low=0.0, high=4.0)
    mucin: float = _p(1.0, 0.25, "density of mucus", "colour", low=0.2, high=2.5)
    ghosts: float = _p(1.0, 0.3, "dead architecture still visible in necrosis", "coarse", low=0.0, high=2.0)
    dust: float = _p(1.0, 0.4, "pyknotic nuclei and nuclear dust in necrosis", "cell", low=0.0, high=3.0)
    # amount of dye, before stain and scanner
    eosin: float = _p(1.0, 0.06, "eosin taken up", "colour", low=0.3, high=2.0)
    haematoxylin: float = _p(1.0, 0.06, "haematoxylin taken up", "colour", low=0.3, high=2.0)
    basophilia: float = _p(1.0, 0.15, "haematoxylin in tumour cytoplasm", "colour", low=0.0, high=2.5)
