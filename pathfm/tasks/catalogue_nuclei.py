"""The tasks whose labels are of pixels: what is known of each, and where it was read; sources as in `catalogue`."""

from __future__ import annotations

from pathfm.tasks.catalogue import IN_TCGA, NOT_SAID, splits
from pathfm.tasks.task import Task

NUCLEI = (
    Task(
        name="consep",
        title="colorectal nuclei, four types of seven merged",
        kind="segmentation",
        reader="nuclei",
        classes=("background", "other", "inflammatory", "epithelial", "spindle-shaped"),
        mpp=0.25,
        tile_px=(1000, 1000),
        counts=splits(27, 14),
        splits="Train and Test of the source; eva uses Test as val, stops and reports on it, on a grid of 250 px",
        same_split=True,
        clean="test is the official Test; a fifth of Train validates, by image, as patients are unknown",
        licence="Apache-2.0",
        url="https://warwick.ac.uk/fac/cross_fac/tia/data/hovernet/",
        citation="Graham et al., Medical Image Analysis 2019, arXiv:1812.06499",
        overlap=NOT_SAID,
        unknown={
            "patients": "16 patients; which images are whose is not in the files",
            "TCGA": "where the slides come from could not be read",
            "download": "the official one was down when eva's documentation was written",
        },
        sources=("eva consep.md, consep.py", "vqdang/hover_net dataset.py: inst_map, type_map and the merged types"),
        files=(
            "{Train,Test}/Images/{train,test}_<n>.png",
            "{Train,Test}/Labels/{train,test}_<n>.mat with inst_map, type_map",
        ),
    ),
    Task(
        name="monusac",
        title="nuclei of four organs, four cell types; ambiguous ones are not scored",
        kind="segmentation",
        reader="nuclei",
        classes=("Background", "Epithelial", "Lymphocyte", "Neutrophil", "Macrophage", "Ambiguous"),
        mpp=0.25,
        counts=splits(209, 85),
        splits="training and testing data of the challenge; eva uses testing as val, stops and reports on it",
        same_split=True,
        clean="test is the official testing data; a fifth of the training patients validates",
        licence="CC BY-NC-SA 4.0",
        url="https://monusac-2020.grand-challenge.org/",
        citation="Verma et al., IEEE Transactions on Medical Imaging 2021, doi:10.1109/TMI.2021.3085712",
        overlap=IN_TCGA,
        sources=("eva monusac.md, monusac.py", "eva's configuration of MoNuSAC leaves index 5 out of the score"),
        files=(
            "{MoNuSAC_images_and_annotations,MoNuSAC Testing Data and Annotations}/<barcode>/<barcode>_<n>.xml",
            "{MoNuSAC_images_and_annotations,MoNuSAC Testing Data and Annotations}/<barcode>/<barcode>_<n>.tif",
        ),
    ),
    Task(
        name="masks",
        title="any folder of images and instance masks",
        kind="segmentation",
        reader="any",
        classes=("background", "nucleus"),
        splits="column role of the manifest, or NucleiSet.split",
        unknown={"everything": "what the manifest does not say"},
        files=("images/<name>.png, labels/<name>.png of instances, 0 the background, and optionally manifest.csv",),
    ),
)
