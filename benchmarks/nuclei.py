"""Both of eva's decoders on real nuclei: a trained teacher, its random twin, and floors without a network.

    python benchmarks/nuclei.py <folder of a teacher> --data ../shared/data/nuclei/dsb2018_he [--steps 100] [--runs 2]

64 microscope images of the 2018 Data Science Bowl (CC0). Groups of images that look alike each keep to one role, so all
that is tested is of one stain; intervals are by image and too narrow. Shorter than eva's 2,000 steps at 224 px: what
was done stands in every row of results/nuclei.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pathfm import export, features, transfer
from pathfm.runs import stamp, write_results
from pathfm.segment import SegmentationProtocol
from pathfm.storage import read_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--data", type=Path, default=transfer.test_data("nuclei/dsb2018_he"))
    parser.add_argument("--name", default="teacher", help="of the teacher: which run it is")
    parser.add_argument("--input-px", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--runs", type=int, default=2)
    given = parser.parse_args()
    if given.data is None:
        parser.error("the images are not in shared/data beside the project; give their folder as --data")
    torch.set_num_threads(1)
    how = {"input_px": given.input_px, "steps": given.steps, "batch_size": given.batch_size, "runs": given.runs}
    about = stamp()
    model, preprocess = export.load(given.teacher)
    networks = {"random weights": features.random_twin(model), "pretrained": model}
    images = transfer.read_nuclei(given.data)
    found = transfer.decoded(networks, preprocess, images, SegmentationProtocol(**how))
    how |= {"backbone": given.name, "weights": read_json(given.teacher / "config.json")["weights_sha256"][:10]}
    table = transfer.dice_table(found).assign(data=images.name, **how, **about)
    print(table.round(3).to_string())
    print(write_results("nuclei", table))


if __name__ == "__main__":
    main()
