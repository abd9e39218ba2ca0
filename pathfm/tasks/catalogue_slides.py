"""The tasks whose labels are of slides, and PathoROB's sets; sources as in `catalogue`."""

from __future__ import annotations

from pathfm.tasks.catalogue import IN_CAMELYON, IN_TCGA, NOWHERE
from pathfm.tasks.task import Task

OURS = (
    "the paper's is not published. Ours: five folds by site within a cancer type, so by patient too; fold 0 tests, 1 "
    "validates, `folds` gives the rest; floors: cancer type alone, site alone, both"
)
LABELS = "labels.csv with slide_id, label and, where no TCGA barcode says them, patient_id and site"
BIOMARKERS = (  # the paper's table of AUROC
    ("luad_tmb", "LUAD", "tumour mutational burden"),
    ("luad_egfr", "LUAD", "EGFR mutation"),
    ("luad_kras", "LUAD", "KRAS mutation"),
    ("crc_msi", "CRC", "microsatellite instability"),
    ("brca_tp53", "BRCA", "TP53 mutation"),
    ("brca_pik3ca", "BRCA", "PIK3CA mutation"),
    ("rcc_pbrm1", "RCC", "PBRM1 mutation"),
    ("rcc_bap1", "RCC", "BAP1 mutation"),
    ("coad_kras", "COAD", "KRAS mutation"),
    ("coad_tp53", "COAD", "TP53 mutation"),
)


def _exaone(name: str, cancer: str, what: str) -> Task:
    return Task(
        name=f"exaone_{name}",
        title=f"{cancer}: {what}, slide label (one of EXAONE Path 2.0's ten)",
        kind="slides",
        reader="slides",
        splits=OURS,
        url="https://arxiv.org/abs/2507.06639",
        citation="Pyeon et al. 2025, arXiv:2507.06639",
        overlap={"TCGA": "unknown", "GTEx": "no", "CAMELYON": "no"},
        unknown={
            "slides, labels and splits": "not published; some test sets are in-house, those of CPTAC have 18 to 52 "
            "slides, where differences are noise",
            "mpp": "the paper's patches are 256 px at 20x",
            "classes": "as the labels say; for TMB the cut-off is not published",
            "licence": "no data are given out",
            "seen in training": "the model was trained with slide labels of such biomarkers",
        },
        sources=(
            "the paper, as the project's notes quote it",
            "the model card of EXAONE-Path-LUAD-EGFR: in-house data",
        ),
        files=(LABELS,),
    )


def _pathorob(name: str, title: str, **facts) -> Task:
    return Task(
        name=f"pathorob_{name}",
        title=title,
        kind="robustness",
        reader="pathorob",
        url=f"https://huggingface.co/datasets/bifold-pathomics/PathoROB-{facts.pop('card')}",
        citation="Kömen et al. 2025, arXiv:2507.17845",
        sources=(
            "PathoROB README.md, data/metadata, robustness_index.py",
            "shards: PathoROB extract_features.py, data_manager.py; Soma's prepare_croma, which names and counts them",
            *facts.pop("more", ()),
        ),
        files=(
            f"{facts.pop('csv')}, of data/metadata in github.com/bifold-pathomics/PathoROB",
            "embeddings: <centre>.npz, an array a tile named <slide_id>-<patch_id>",
            f"or images as Hugging Face gives them out: {facts.pop('parquet')}",
            "or images exported from these: <slide_id>-<patch_id>.png",
        ),
        **facts,
    )


SLIDES = (
    Task(
        name="camelyon16_small",
        title="lymph node metastasis of the slide, at most 1,000 tiles a slide",
        kind="slides",
        reader="slides",
        classes=("normal", "tumor"),
        mpp=0.25,
        counts={
            **{("train", None): 216, ("val", None): 54, ("test", None): 129},
            **{("test", "normal"): 80, ("test", "tumor"): 49},
        },
        splits="test is the challenge's without the duplicate; val are PCam's 54 validation slides. eva: 224 px tiles "
        "at 0.25 um/px, stops on val, reports both, 20 runs",
        licence="CC0 1.0",
        url="https://camelyon17.grand-challenge.org/Data/",
        citation="Ehteshami Bejnordi et al., JAMA 2017, doi:10.1001/jama.2017.14585",
        overlap=IN_CAMELYON,
        unknown={
            "patients": "399 slides of 399 cases by a paper that uses them; the slide stands for the patient",
            "site of test slides": "not in the files; training slides from normal_101 and tumor_071 on are Utrecht's",
            "training slides a class": "160 normal and 110 tumor by the paper, other copies differ by a slide; so not "
            "checked",
        },
        sources=(
            "eva camelyon16.md, camelyon16.py, camelyon16_small.yaml",
            "PathoROB data/metadata/camelyon.csv: 47 training slides with their centre; PathoROB README: licence",
            "the paper's abstract: test slides a class",
        ),
        files=("training/{normal,tumor}/*.tif", "testing/reference.csv", "testing/images/test_<n>.tif"),
    ),
    Task(
        name="panda_small",
        title="prostate biopsies, ISUP grade 0 to 5, a fifth of PANDA, at most 200 tiles a slide",
        kind="slides",
        reader="slides",
        classes=("0", "1", "2", "3", "4", "5"),
        mpp=0.5,
        counts={("train", None): 955, ("val", None): 477, ("test", None): 477},
        splits="eva's draw of 10, 5 and 5 % of every grade, seed 42, after leaving out a tenth with noisy labels; it "
        "stops on val and reports both, 20 runs",
        licence="CC BY-NC-SA 4.0",
        url="https://www.kaggle.com/competitions/prostate-cancer-grade-assessment/data",
        citation="Bulten et al., Nature Medicine 2022, doi:10.1038/s41591-021-01620-2",
        overlap=NOWHERE,
        unknown={"patients": "not published: biopsies of one patient may be on two sides of eva's split"},
        sources=("eva panda.md, panda_small.md, panda.py, core/data/splitting/stratified.py",),
        files=(
            "train_with_noisy_labels.csv: train.csv of analokmaus/kaggle-panda-challenge-public, with noise_ratio_10",
            "train_images/<image_id>.tiff",
        ),
    ),
    Task(
        name="tp53",
        title="TP53 mutated or not, slides of TCGA",
        kind="slides",
        reader="slides",
        splits=OURS,
        licence="open access data of TCGA",
        url="https://portal.gdc.cancer.gov",
        citation="The Cancer Genome Atlas; the task: arXiv:2404.15217",
        overlap=IN_TCGA,
        unknown={
            "slides, cancer types and split of the paper": "never published, nor shipped in eva's releases",
            "classes": "as the labels say",
            "mpp": "that of the tile stream",
        },
        sources=(
            "the model cards of 1aurent/*.kaiko: TP53 scores",
            "the barcode's second field is the tissue source site, by TCGA's convention",
        ),
        files=(f"{LABELS}; cancer_type is required",),
    ),
    *(_exaone(*one) for one in BIOMARKERS),
    Task(
        name="labels",
        title="any table of slide labels",
        kind="slides",
        reader="slides",
        splits="column role, or five folds by site within a cancer type",
        unknown={"everything": "what the table does not say"},
        files=(LABELS,),
    ),
)

ROBUSTNESS = (
    _pathorob(
        "camelyon",
        "lymph node, normal or tumour, two centres; robustness index at k 11",
        card="camelyon",
        parquet="data/train-00000-of-00001.parquet",
        classes=("normal", "tumor"),
        counts={(None, None): 20_400, (None, "normal"): 10_200, (None, "tumor"): 10_200},
        licence="CC0 1.0",
        overlap=IN_CAMELYON,
        unknown={
            "mpp": "not in the repository",
            "image size": "not in the repository; a public reader of the shards says 256 px",
        },
        csv="camelyon.csv",
    ),
    _pathorob(
        "tcga",
        "cancer types and centres of TCGA-UT in pairs of two and two; robustness index at k 61",
        card="tcga",
        parquet="data/train-00000-of-00003.parquet and on",
        counts={(None, None): 112_800},
        licence="CC BY-NC-SA 4.0",
        overlap=IN_TCGA,
        unknown={
            "mpp": "not in the repository",
            "image size": "not in the repository; a public reader of the shards says 256 px",
            "classes": "tcga_2x2.csv could not be read",
            "tiles": "counted are rows of tcga_2x2.csv, one for every pair of a tile; how many tiles is not known",
        },
        csv="tcga_2x2.csv",
        more=(
            "rows: clemsgrs/croma's notes on the index's tables; both balanced accuracies that PathoROB records of the "
            "set are whole multiples of 1 / 112,800",
        ),
    ),
    _pathorob(
        "tolkach",
        "oesophagus, six tissue classes, three centres; robustness index at k 46",
        card="tolkach_esca",
        parquet="data/train-00000-of-00001.parquet",
        classes=("ADVENT", "MUSC_PROP", "REGR_TU", "SH_MAG", "SH_OES", "TUMOR"),
        counts={(None, None): 9_000}
        | {(None, c): 1_500 for c in ("ADVENT", "MUSC_PROP", "REGR_TU", "SH_MAG", "SH_OES", "TUMOR")},
        licence="CC BY-SA 4.0",
        overlap={**NOWHERE, "TCGA": "no"},
        unknown={
            "mpp": "thunder says 0.78 of the tiles they were taken from",
            "image size": "256 px in thunder, of the tiles they were taken from",
            "TCGA": "the fourth centre is TCGA; the reduced table of the index leaves it out",
        },
        csv="tolkach_esca_reduced.csv",
    ),
)
