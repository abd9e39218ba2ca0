"""The tasks whose images are tiles: what is known of each, and where it was read.

eva is kaiko-ai/eva at 73b61a7 (April 2026), its documentation under docs/datasets and its code under
src/eva/vision/data/datasets; thunder is MICS-Lab/thunder at 6fe47e0; PathoROB is bifold-pathomics/PathoROB at 46594e9.
"""

from __future__ import annotations

from pathfm.tasks.task import Task

NOWHERE = {"TCGA": "no", "GTEx": "no", "CAMELYON": "no"}
IN_TCGA = {**NOWHERE, "TCGA": "yes"}
IN_CAMELYON = {**NOWHERE, "CAMELYON": "yes"}
NOT_SAID = {"TCGA": "unknown", "GTEx": "no", "CAMELYON": "no"}
NO_PATIENTS = "not published: intervals are by image and too narrow, and parts of train may share a patient"

CRC = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
CRC_VAL = dict(zip(CRC, (1338, 847, 339, 634, 1035, 592, 741, 421, 1233), strict=True))
CRC_TRAIN = dict(zip(CRC, (10407, 10566, 11512, 11557, 8896, 13536, 8763, 10446, 14317), strict=True))
BRACS = ("0_N", "1_PB", "2_UDH", "3_FEA", "4_ADH", "5_DCIS", "6_IC")
BRACS_COUNTS = {
    "train": (357, 714, 389, 624, 387, 665, 521),
    "val": (46, 43, 46, 49, 41, 40, 47),
    "test": (81, 79, 82, 83, 79, 85, 81),
}
CRC_CLEAN = (
    "test is CRC-VAL-HE-7K (other patients); a fifth of the 100,000 validates, by image, as patients are unknown"
)
CRC_WHY = {
    "patients": NO_PATIENTS,
    "TCGA": "the files of CRC-VAL-HE-7K are named <class>-TCGA-<letters>, the record names its own biobanks",
}
MHIST = {("train", "HP"): 1545, ("train", "SSA"): 630, ("val", "HP"): 617, ("val", "SSA"): 360}
STAD = {"train": {"MSIMUT": 50_285, "MSS": 50_285}, "test": {"MSIMUT": 27_904, "MSS": 90_104}}
MSI_WHY = {
    "licence": "that of the record could not be read; H. M. Balaha's index of data sets says CC BY 4.0",
    "official validation": "the record has train and test only; what those who report it stopped on is not published",
}


def _by_class(split: str | None, counts: dict[str, int]) -> dict[tuple[str | None, str | None], int]:
    return {(split, name): n for name, n in counts.items()}


def splits(train: int | None = None, val: int | None = None, test: int | None = None) -> dict:
    """Expected counts of the official splits, as `Task.counts` holds them."""
    return {(name, None): n for name, n in (("train", train), ("val", val), ("test", test)) if n is not None}


def _msi(name: str, cancer: str, title: str, counts: dict, more: dict[str, str]) -> Task:
    return Task(
        name=name,
        title=f"{title}: microsatellite instable or highly mutated against stable, tumour tiles",
        kind="tiles",
        reader="folders",
        classes=("MSIMUT", "MSS"),
        mpp=0.5,
        tile_px=(224, 224),
        counts=counts,
        splits="train 70 %, test 30 % of the patients; training tiles balanced; Macenko-normalised. Not in eva",
        clean="a fifth of the training patients validates",
        url="https://zenodo.org/records/2530835",
        citation="Kather et al., Nature Medicine 2019, doi:10.1038/s41591-019-0462-y",
        overlap=IN_TCGA,
        unknown=MSI_WHY | more,
        sources=(
            "the record as a public repository quotes it: 224 px, 0.5 um/px, split by patient, 46,704 + 46,704",
            "a mirror of the colorectal tiles: 192,312 of 432 patients; file names of two public scripts",
            "LG-AI-EXAONE/EXAONEPath README.md: accuracy of both",
            "tiles a split and class: H. M. Balaha's index of data sets; all eight add up to its 411,890 of the record",
        ),
        files=(
            f"{cancer}_TRAIN_MSS/MSS/blk-<letters>-TCGA-xx-xxxx-01Z-00-DX1.png, or {cancer}_TRAIN/MSS/...",
            f"{cancer}_{{TRAIN,TEST}}_{{MSS,MSIMUT}}/{{MSS,MSIMUT}}/blk-<letters>-<TCGA barcode>.png",
        ),
    )


TILES = (
    Task(
        name="bach",
        title="breast microscopy, four classes (ICIAR 2018)",
        kind="tiles",
        reader="folders",
        classes=("Benign", "InSitu", "Invasive", "Normal"),
        mpp=0.42,
        tile_px=(2048, 1536),
        counts=_by_class(None, dict.fromkeys(("Benign", "InSitu", "Invasive", "Normal"), 100)) | splits(268, 132),
        splits="eva: ranges of image numbers, no patient on both sides; it stops and reports on val, and leaves BACH "
        "out of its average: at 224 px the effective mpp is near 2.9",
        same_split=True,
        clean="test is eva's val; of its training ranges, those that start at 90, 169, 273 and 368 validate",
        licence="CC BY-NC-ND 4.0",
        url="https://zenodo.org/records/3632035",
        citation="Aresta et al., Medical Image Analysis 2019, arXiv:1808.04277",
        overlap=NOWHERE,
        unknown={
            "patients": "given for a part of the images only; none is in eva's train and val, some may be in two "
            "training ranges, so in train and validate of the clean split (column block is the range)",
            "number": "eva's documentation says 408, its code and the challenge 400",
            "image size in pixels": "2048 x 1536 on the challenge's page",
        },
        sources=("eva bach.md, bach.py", "the challenge's page Dataset: 400 images, 100 a class, 0.42 um"),
        files=("ICIAR2018_BACH_Challenge/Photos/{Benign,InSitu,Invasive,Normal}/{b,is,iv,n}001.tif to 100.tif",),
    ),
    Task(
        name="crc",
        title="colorectal tissue, nine classes, training tiles colour-normalised (NCT-CRC-HE-100K, CRC-VAL-HE-7K)",
        kind="tiles",
        reader="folders",
        classes=CRC,
        mpp=0.5,
        tile_px=(224, 224),
        counts=_by_class("train", CRC_TRAIN) | _by_class("val", CRC_VAL) | splits(100_000, 7_180),
        splits="the two sets; eva stops and reports on CRC-VAL-HE-7K",
        same_split=True,
        clean=CRC_CLEAN,
        licence="CC BY 4.0",
        url="https://zenodo.org/records/1214456",
        citation="Kather et al., PLoS Medicine 2019, doi:10.1371/journal.pmed.1002730",
        overlap=NOT_SAID,
        unknown=CRC_WHY
        | {"difficulty": "colour histograms alone are known to score over 0.82: say so beside any score"},
        sources=(
            "eva crc.md, crc.py",
            "counts a class as two public repositories list them; they add up to eva's totals",
        ),
        files=("NCT-CRC-HE-100K/<class>/<class>-<8 letters>.tif", "CRC-VAL-HE-7K/<class>/<class>-TCGA-<8 letters>.tif"),
    ),
    Task(
        name="crc_nonorm",
        title="as crc, training tiles as scanned (NCT-CRC-HE-100K-NONORM)",
        kind="tiles",
        reader="folders",
        classes=CRC,
        mpp=0.5,
        tile_px=(224, 224),
        counts=_by_class("val", CRC_VAL) | splits(100_000, 7_180),
        splits="the two sets; not in eva's leaderboard",
        same_split=True,
        clean=CRC_CLEAN,
        licence="CC BY 4.0",
        url="https://zenodo.org/records/1214456",
        citation="Kather et al., PLoS Medicine 2019, doi:10.1371/journal.pmed.1002730",
        overlap=NOT_SAID,
        unknown=CRC_WHY
        | {"training images a class": "tiles were drawn anew from the same slides; no counts could be read"},
        sources=("eva crc.md",),
        files=("NCT-CRC-HE-100K-NONORM/<class>/<class>-<8 letters>.tif", "CRC-VAL-HE-7K/<class>/..."),
    ),
    Task(
        name="mhist",
        title="colorectal polyps: hyperplastic or sessile serrated, majority of seven pathologists",
        kind="tiles",
        reader="listed",
        classes=("HP", "SSA"),
        mpp=2.0,
        tile_px=(224, 224),
        counts=MHIST | _by_class(None, {"HP": 2162, "SSA": 990}) | splits(2_175, 977),
        splits="train and test of annotations.csv; eva uses test as val, stops and reports on it (SSA is its class 0)",
        same_split=True,
        clean="test is the official test; a fifth of train validates, by image, as patients are unknown",
        licence="Dataset Research Use Agreement, by form",
        url="https://bmirds.github.io/MHIST",
        citation="Wei et al., AIME 2021, arXiv:2101.12355",
        overlap=NOWHERE,
        unknown={"patients": NO_PATIENTS},
        sources=(
            "eva mhist.md, mhist.py",
            "images a class as a public repository checks them, and in each split as another lists them; they add up "
            "to eva's totals",
        ),
        files=("annotations.csv with Image Name, Majority Vote Label, Partition", "images/MHIST_<3 letters>.png"),
    ),
    Task(
        name="pcam",
        title="lymph node, metastasis in the central 32 px (PatchCamelyon)",
        kind="tiles",
        reader="packed",
        classes=("no_tumor", "tumor"),
        mpp=0.972,
        tile_px=(96, 96),
        counts=splits(262_144, 32_768, 32_768),
        splits="train, valid and test, no slide in two of them; eva stops on val and reports both",
        licence="CC0 1.0",
        url="https://zenodo.org/records/2546921",
        citation="Veeling et al., MICCAI 2018, arXiv:1806.03962",
        overlap=IN_CAMELYON,
        unknown={
            "mpp": "0.243 at level 0, downsampled by 4, by its README; eva rounds to 1.0",
            "images a class": "near 50/50 in each split, exact numbers not published",
        },
        sources=("PCam's README", "eva patch_camelyon.md, patch_camelyon.py"),
        files=(
            "camelyonpatch_level_2_split_{train,valid,test}_meta.csv (optional: the slide of each image)",
            "camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5, after gunzip",
        ),
    ),
    Task(
        name="pcam_10shot",
        title="PatchCamelyon from ten training images a class",
        kind="tiles",
        reader="packed",
        classes=("no_tumor", "tumor"),
        mpp=0.972,
        tile_px=(96, 96),
        counts=splits(262_144, 32_768, 32_768),
        splits="as pcam, of train 10 images a class and run; eva makes 50 runs",
        licence="CC0 1.0",
        url="https://zenodo.org/records/2546921",
        citation="Veeling et al., MICCAI 2018, arXiv:1806.03962",
        overlap=IN_CAMELYON,
        unknown={"the draws of eva's runs": "ours follow its sampler from seed 42; not compared with a run of eva"},
        sources=("eva patch_camelyon_10shot.yaml, samplers/classification/balanced.py", "eva leaderboards.md: 50 runs"),
        files=("camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5, after gunzip",),
    ),
    Task(
        name="breakhis",
        title="breast microscopy at 40X, four of eight tumour types",
        kind="tiles",
        reader="folders",
        classes=("TA", "MC", "F", "DC"),
        mpp=None,
        tile_px=(700, 460),
        counts=_by_class(None, {"TA": 149, "MC": 205, "F": 253, "DC": 864}) | splits(1_132, 339),
        splits="eva: 14 patients are val; it stops and reports on them, and keeps types with seven patients or more",
        same_split=True,
        clean="test is eva's val; a fifth of the other patients validates",
        licence="CC BY 4.0",
        url="https://web.inf.ufpr.br/vri/databases/breast-cancer-histopathological-database-breakhis/",
        citation="Spanhol et al., IEEE Transactions on Biomedical Engineering 2016, doi:10.1109/TBME.2015.2496264",
        overlap=NOWHERE,
        unknown={
            "mpp": "eva says 0.25, as of a 40x scanner; these are photographs through a microscope, whose 40X is the "
            "visual magnification",
            "images a class in each split": "no source could be read",
        },
        sources=(
            "eva breakhis.md, breakhis.py",
            "images a type at 40X as a public repository lists them; they add up to eva's totals",
        ),
        files=("BreaKHis_v1/histology_slides/breast/**/40X/SOB_[BM]_<type>-<year>-<patient>-40-<number>.png",),
    ),
    Task(
        name="bracs",
        title="breast lesions, seven classes, regions of interest",
        kind="tiles",
        reader="folders",
        classes=BRACS,
        mpp=0.25,
        counts={(s, c): n for s, ns in BRACS_COUNTS.items() for c, n in zip(BRACS, ns, strict=True)}
        | splits(3_657, 312, 570),
        splits="train, val and test of the source, by patient; eva stops on val and reports both",
        licence="CC BY-NC 4.0",
        url="https://www.bracs.icar.cnr.it/download/",
        citation="Brancati et al., Database 2022, doi:10.1093/database/baac093",
        overlap=NOWHERE,
        unknown={"patients": "in the source's spreadsheet, not in the files' names; the slide stands for the patient"},
        sources=(
            "eva bracs.md, bracs.py",
            "a public repository's check of all 4,539 files: counts a class, 387 slides",
        ),
        files=("BRACS_RoI/latest_version/{train,val,test}/<n>_<class>/BRACS_<slide>_<class>_<number>.png",),
    ),
    Task(
        name="gleason",
        title="prostate tissue microarrays, benign or Gleason pattern 3 to 5 (Arvaniti)",
        kind="tiles",
        reader="folders",
        classes=("benign", "gleason_3", "gleason_4", "gleason_5"),
        mpp=0.23,
        tile_px=(750, 750),
        counts=splits(15_303, 2_482, 4_967),
        splits="by array: ZT111, ZT199 and ZT204 train, ZT76 val, ZT80 test (labels of pathologist 1); eva leaves the "
        "test out as unstable, stops and reports on val",
        same_split=True,
        clean="the paper's own: ZT76 validates, ZT80 tests",
        left_out=("test",),
        licence="CC0 1.0",
        url="https://doi.org/10.7910/DVN/OCYCMP",
        citation="Arvaniti et al., Scientific Reports 2018, doi:10.1038/s41598-018-30535-1",
        overlap=NOT_SAID,
        unknown={
            "images a class": "no source could be read",
            "patients": "641 and 245 patients by eva; the core in the file's name stands for the patient",
            "TCGA": "where the arrays come from could not be read",
        },
        sources=("eva gleason_arvaniti.md, gleason_arvaniti.py",),
        files=(
            "train_validation_patches_750/<core>/<core>_patch_<n>_class_<0..3>.jpg",
            "{train_validation_patches_750,test_patches_750/patho_1}/<core>/<core>_patch_<n>_class_<0..3>.jpg",
        ),
    ),
    Task(
        name="til",
        title="tumour-infiltrating lymphocytes in 23 cancer types, two or more in 50 um",
        kind="tiles",
        reader="folders",
        classes=("til-negative", "til-positive"),
        mpp=0.5,
        tile_px=(100, 100),
        counts=splits(209_221, 38_601, 56_275),
        splits="train, val and test of the source. Not in eva; EXAONE Path 1.0 reports accuracy",
        clean="the official one, and drawn again by patient should a patient be on two sides of it",
        url="https://zenodo.org/records/6604094",
        citation="Abousamra et al., Frontiers in Oncology 2022, doi:10.3389/fonc.2021.806603",
        overlap=IN_TCGA,
        unknown={
            "licence": "that of the record could not be read",
            "images a class": "no source could be read",
            "whether the split is by patient": "not stated where it could be read; checked when it is read",
            "labels": "a part of the training labels are a model's, by the paper's abstract",
        },
        sources=("thunder tcga_tils.yaml, tcga_tils.py", "the paper's abstract: 50 um, 100 px"),
        files=("TCGA-TILs/images-tcga-tils/<study>/{train,val,test}/{til-negative,til-positive}/<barcode>_<hash>.png",),
    ),
    _msi(
        "msi_crc",
        "CRC_DX",
        "colorectal cancer",
        _by_class("train", {"MSIMUT": 46_704, "MSS": 46_704}) | {("test", "MSS"): 70_569},
        {"test tiles of MSIMUT": "29,335 by that index, 28,335 if the mirror's 192,312 are all; so not checked"},
    ),
    _msi(
        "msi_stad",
        "STAD",
        "stomach cancer",
        {key: n for split, each in STAD.items() for key, n in _by_class(split, each).items()},
        {},
    ),
    Task(
        name="folder",
        title="any data set: a folder a class, or a manifest.csv with file and label",
        kind="tiles",
        reader="any",
        splits="column role of the manifest, or TileSet.split",
        unknown={"everything": "what the manifest does not say"},
        files=(
            "<class>/<image>, or manifest.csv with file, label and optionally patient_id, slide_id, centre, role, mpp",
        ),
    ),
)
