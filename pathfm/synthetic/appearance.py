"""Why slides differ: latent variables drawn over nested levels, centre > patient > slide > region > nucleus.

A latent is `default + sd * sum over levels of sqrt(share) * strength * z`, z standard normal (on the logarithm for
positive ones). `strength` is what a knob sets: 0 off, 1 default, 2 strong. SHARES therefore are shares of variance.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

import numpy as np

from pathfm.errors import InputError, nearest
from pathfm.synthetic.painters import CLASSES, TissueParams

SETTINGS = {"off": 0.0, "default": 1.0, "strong": 2.0}

# Shares of variance by level at default knobs; ours. Biology belongs to patients, colour to laboratories.
SHARES = {
    "tissue": {"variants": 0.25, "patient": 0.30, "slide": 0.15, "region": 0.30},
    "stain": {"centre": 0.65, "patient": 0.05, "slide": 0.25, "region": 0.05},
    "scanner": {"centre": 0.80, "slide": 0.20},
    "shares": {"centre": 0.30, "patient": 0.40, "slide": 0.30},
}


@dataclass(frozen=True)
class Knobs:
    """How strong each random effect and each class cue is: "off", "default" or "strong".

    Raises InputError for an unknown setting. Build one from user input with `Knobs.of`.
    """

    centre: str = "default"  # stain and scanner of a laboratory
    patient: str = "default"  # build of the tissue, a little of the stain, class proportions
    slide: str = "default"  # staining run, thickness, scanner drift
    region: str = "default"  # patches within a slide
    nucleus: str = "default"  # nucleus to nucleus spread
    variants: str = "default"  # one of 40 morphological variants per patient and class, Zipf frequencies
    fine_cues: str = "default"  # what tells classes apart below 2 um: chromatin, nucleoli, outline
    coarse_cues: str = "default"  # what tells classes apart above 50 um: glands, fascicles
    proportions: str = "off"  # class proportions that differ between centres, by a factor of 1.5 or, strong, 2.2
    artefacts: str = "default"  # pen, folds, bubbles, blur: on none, two in five or four in five slides
    scanner_share: float = 0.5  # of the centre effect's variance: 0 all stain, 1 all scanner

    def __post_init__(self):
        for name, value in asdict(self).items():
            if name == "scanner_share":
                if not isinstance(value, int | float) or not 0 <= value <= 1:
                    raise InputError(f"knob scanner_share is {value!r}; give a number from 0 to 1")
            elif value not in SETTINGS:
                raise InputError(f"knob {name} cannot be {value!r}.{nearest(value, SETTINGS)}")

    @classmethod
    def of(cls, **settings) -> Knobs:
        """Knobs from names and settings; an unknown name is an InputError that offers the nearest."""
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                raise InputError(f"no knob is called {name!r}.{nearest(name, known)}")
        return cls(**settings)

    def strength(self, level: str) -> float:
        return SETTINGS[getattr(self, level)]


@dataclass(frozen=True)
class Latent:
    default: float
    sd: float  # between slides of one organ in different laboratories; of the logarithm where `log`
    log: bool = True
    low: float | None = None
    high: float | None = None

    def value(self, z):
        moved = self.default * np.exp(self.sd * z) if self.log else self.default + self.sd * z
        return np.clip(moved, self.low, self.high) if (self.low, self.high) != (None, None) else moved


# Optical density of one unit of dye in R, G, B. Around Ruifrok & Johnston 2001 (skimage's HED) and Macenko 2009.
STAIN = {
    "h_red": Latent(0.62, 0.13),
    "h_green": Latent(0.73, 0.05),
    "h_blue": Latent(0.32, 0.22),
    "e_red": Latent(0.11, 0.35),
    "e_green": Latent(0.88, 0.05),
    "e_blue": Latent(0.38, 0.22),
    "h_strength": Latent(1.0, 0.16, low=0.5, high=1.8),
    "e_strength": Latent(1.0, 0.18, low=0.5, high=1.8),
}
SCANNER = {
    "gamma": Latent(1.0, 0.10, low=0.7, high=1.4),
    "white_red": Latent(243, 0.007, high=254),
    "white_green": Latent(242, 0.006, high=254),
    "white_blue": Latent(243, 0.007, high=254),
    "blur_um": Latent(0.34, 0.25, low=0.15, high=0.8),  # standard deviation of the point spread
    "sharpen": Latent(0.4, 0.3, log=False, low=0.0, high=1.4),
    "noise": Latent(1.5, 0.35, low=0.3, high=4.0),  # grey levels
    "quality": Latent(82, 7, log=False, low=55, high=95),  # JPEG
}
TISSUE = {
    f.name: Latent(f.default, *(f.metadata[key] for key in ("sd", "log", "low", "high"))) for f in fields(TissueParams)
}
VARIANTS = 40
# What a class loses when a family of cues is off; "strong" moves it as far the other way.
_NEUTRAL = {
    "fine_cues": {"chromatin": 0.0, "nucleoli": 0.0, "outline": 0.0},
    "coarse_cues": {"gland_form": 0.0, "cribriform": 0.0, "fibre_wave": 0.0, "follicles": 0.0, "ghosts": 0.0},
}


@dataclass(frozen=True)
class Mimic:
    """A class that on some patients is drawn like another, but for the cues of one family.

    `painted_as` draws it with its own parameters, so that nothing else can tell the two; with the knob `family` off
    nothing at all does.
    """

    name: str
    painted_as: str
    family: str  # the knob: "fine_cues" (below 2 um) or "coarse_cues" (above 50 um)
    variants: tuple[int, int]  # n, k: the variants v of `name` with v % n == k show it
    own: dict[str, float]  # added to the painter's parameters, times the knob's strength
    both: dict[str, float] = field(default_factory=dict)  # that patient's parameters of both classes


# The confusable pairs: two by what fills the nuclei, two by architecture. How strong the cues are is ours.
MIMICS = (
    # Well differentiated: crypts and goblet cells, but coarse chromatin, nucleoli and uneven outlines.
    Mimic("tumour", "normal", "fine_cues", (6, 3), {"chromatin": 1.0, "nucleoli": 3.0, "outline": 1.5}),
    # Small cells in sheets like lymphocytes, but smooth chromatin and moulded outlines.
    Mimic("tumour", "lymphocytes", "fine_cues", (6, 5), {"chromatin": -0.6, "outline": 1.0}, {"follicles": 0.0}),
    # Bland cells: those of crypts, but glands back to back and cribriform.
    Mimic("tumour", "normal", "coarse_cues", (6, 1), {"crowding": 1.0}),
    # Fibromatosis: the nuclei and fibres of muscle, but in long waves, without fascicles.
    Mimic("stroma", "muscle", "coarse_cues", (4, 2), {"fascicle_um": 390.0, "fibre_wave": 1.5}),
)
_TAG = {name: index for index, name in enumerate(("tissue", "stain", "scanner", "shares", "labels", "variant"))}
_LEVEL = {name: index for index, name in enumerate(("centre", "patient", "slide", "region", "nucleus"))}


@dataclass(frozen=True)
class Origin:
    """Whose slide it is: `centre` of `centres`, patient and slide number within the cohort drawn with `seed`."""

    seed: int
    centre: int
    centres: int
    patient: int
    slide: int


def _rng(origin: Origin, tag: str, level: str, *more: int) -> np.random.Generator:
    ids = {"centre": (), "patient": (origin.patient,)}.get(level, (origin.patient, origin.slide))
    return np.random.default_rng([origin.seed, _TAG[tag], _LEVEL[level], *ids, *more])


def _z(origin: Origin, tag: str, level: str, size: int, *more: int) -> np.ndarray:
    """Standard normal draws of one level. Centres' are standardised over the cohort: never all alike."""
    rng = _rng(origin, tag, level, *more)
    if level != "centre":
        return rng.standard_normal(size)
    all_ = rng.standard_normal((origin.centres, size))
    if origin.centres > 1:
        all_ = (all_ - all_.mean(0)) / all_.std(0)
    return all_[origin.centre]


def components(origin: Origin, tag: str, knobs: Knobs) -> dict[str, np.ndarray]:
    """What centre, patient and slide add to each latent of `tag` ("tissue", "stain", "scanner" or "shares").

    Level -> one value per latent, in standard deviations. The variants and regions of tissue, drawn per class,
    and the regions of stain, a field over the slide, come on top.
    """
    strength = {level: knobs.strength(level) for level in ("centre", "patient", "slide")}
    if tag == "stain":
        strength["centre"] *= np.sqrt(2 * (1 - knobs.scanner_share))
    elif tag == "scanner":
        strength["centre"] *= np.sqrt(2 * knobs.scanner_share)
    elif tag == "shares":
        strength["centre"] = 2 * knobs.strength("proportions")
    size = {"tissue": len(TISSUE), "stain": len(STAIN), "scanner": len(SCANNER), "shares": len(CLASSES)}[tag]
    return {
        level: np.sqrt(share) * strength[level] * _z(origin, tag, level, size)
        for level, share in SHARES[tag].items()
        if level in strength
    }


def _latents(origin: Origin, tag: str, table: dict[str, Latent], knobs: Knobs) -> dict[str, float]:
    total = sum(components(origin, tag, knobs).values())
    return {name: float(latent.value(z)) for (name, latent), z in zip(table.items(), total, strict=True)}


def stain(origin: Origin, knobs: Knobs) -> dict[str, float]:
    """Optical density per unit dye by channel, and the strength of both dyes, of one slide."""
    return _latents(origin, "stain", STAIN, knobs)


# A second stain in place of eosin: mean density by channel (DAB after Ruifrok & Johnston 2001), counterstain strength.
SPECIAL = {"DAB": ((0.30, 0.57, 0.78), 0.6)}


def special_stain(stain: dict[str, float], name: str) -> dict[str, float]:
    """`stain` with another dye in place of eosin; what differed between laboratories still does."""
    if name not in SPECIAL:
        raise InputError(f"no stain is called {name!r}.{nearest(name, ['H&E', *SPECIAL])}")
    density, counterstain = SPECIAL[name]
    changed = dict(stain, h_strength=stain["h_strength"] * counterstain)
    for channel, value in zip(("e_red", "e_green", "e_blue"), density, strict=True):
        changed[channel] = value * stain[channel] / STAIN[channel].default
    return changed


def scanner(origin: Origin, knobs: Knobs) -> dict[str, float]:
    """Tone curve, white balance, blur, sharpening, noise and JPEG quality of one slide."""
    return _latents(origin, "scanner", SCANNER, knobs)


def region_sd(knobs: Knobs) -> float:
    """Standard deviation of the smooth field that multiplies the dyes within a slide, of the logarithm."""
    return STAIN["h_strength"].sd * np.sqrt(SHARES["stain"]["region"]) * knobs.strength("region")


def departure(knobs: Knobs) -> float:
    """Spread of tissue parameters between the classes of a slide, and again between pieces of a class, in sd."""
    return float(np.sqrt(SHARES["tissue"]["region"] / 2) * knobs.strength("region"))


def variant(origin: Origin, class_name: str) -> int:
    """Which of the VARIANTS this patient's `class_name` shows; frequencies fall as 1 / rank (Zipf)."""
    weights = 1 / np.arange(1, VARIANTS + 1)
    rng = _rng(origin, "variant", "patient", CLASSES.index(class_name))
    return int(rng.choice(VARIANTS, p=weights / weights.sum()))


def tissue(origin: Origin, knobs: Knobs, immune: float = 0.0) -> dict[str, TissueParams]:
    """How each class is built on one slide: class -> TissueParams; `immune` is the label latent B1."""
    shared = sum(components(origin, "tissue", knobs).values())
    built = {}
    for index, class_name in enumerate(CLASSES):
        which = variant(origin, class_name)
        form = np.random.default_rng([_TAG["variant"], index, which]).standard_normal(len(TISSUE))
        region = _z(origin, "tissue", "region", len(TISSUE), index)
        z = shared + np.sqrt(SHARES["tissue"]["variants"]) * knobs.strength("variants") * form
        z = dict(zip(TISSUE, z + departure(knobs) * region, strict=True))
        z["inflammation"] += 1.4 * immune
        values = {name: float(latent.value(z[name])) for name, latent in TISSUE.items()}
        values["variation"] = knobs.strength("nucleus")
        built[class_name] = _cued(values, knobs)
    for mimic in mimics(origin, knobs):
        built[mimic.painted_as] |= mimic.both
        strength = knobs.strength(mimic.family)
        own = {name: built[mimic.painted_as][name] + strength * add for name, add in mimic.own.items()}
        built[mimic.name] = built[mimic.painted_as] | {name: _within(name, value) for name, value in own.items()}
    return {name: TissueParams(**values) for name, values in built.items()}


def mimics(origin: Origin, knobs: Knobs) -> list[Mimic]:
    """Which classes of this patient are drawn like another; none without variants."""
    shown = {name: variant(origin, name) for name in {mimic.name for mimic in MIMICS}}
    return [m for m in MIMICS if knobs.variants != "off" and shown[m.name] % m.variants[0] == m.variants[1]]


def _within(name: str, value: float) -> float:
    return float(np.clip(value, TISSUE[name].low, TISSUE[name].high))


def _cued(values: dict[str, float], knobs: Knobs) -> dict[str, float]:
    """`values` with the cues that a knob governs turned down or up."""
    for knob, neutral in _NEUTRAL.items():
        strength = knobs.strength(knob)
        for name, base in neutral.items():
            values[name] = _within(name, base + strength * (values[name] - base))
    return values


def shares(origin: Origin, typical: dict[str, float], knobs: Knobs) -> dict[str, float]:
    """Wanted fraction of each class on one slide. Centres differ only with the knob `proportions`."""
    factor = np.exp(0.35 * sum(components(origin, "shares", knobs).values()))
    return {name: float(value * f) for (name, value), f in zip(typical.items(), factor, strict=True)}


LABEL_NOISE = {"B1": 0.7, "B2": 0.7, "B3": 0.7}  # puts the oracle on the latent at AUC 0.85 to 0.92


def labels(origin: Origin) -> tuple[dict[str, float], dict[str, int]]:
    """The latents behind the slide labels (standard normal) and the labels themselves.

    B0 a coin, B1 lymphocyte density, B2 nucleoli of tumour nuclei, B3 distance of lymphocytes to tumour.
    """
    rng = _rng(origin, "labels", "slide")
    coin = int(rng.random() < 0.5)
    latent = {name: float(rng.standard_normal()) for name in LABEL_NOISE}
    noisy = {name: z + LABEL_NOISE[name] * rng.standard_normal() for name, z in latent.items()}
    return latent, {"B0": coin, **{name: int(value > 0) for name, value in noisy.items()}}
