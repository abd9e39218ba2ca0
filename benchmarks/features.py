"""How much of the bare forward pass an extraction keeps, and what bfloat16 changes.

    python benchmarks/features.py <tile folder> [--model vit_small_patch16_224] [--n 512] [--device cpu]

Bare: the same network on tensors that are ready, in batches of the same size. Extraction: images decoded from
their files, prepared, embedded, checked and written; decoding runs ahead in a thread. Both are timed in turns, and
the median of the ratios is printed, in CPU time of the process and in wall time: on one core the first is what
decoding and preparing cost, the second what is left after they overlap on others. Then, for float32 and bfloat16:
agreement of the 20 nearest neighbours, and the linear and kNN probes where the folder has classes. An extraction keeps
freed memory (devices.kept_memory); the bare pass is timed as it comes and so, too. Results go to results/features.csv.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from unittest import mock

import numpy as np
import pandas as pd
import torch

from pathfm import extractors, probe, vit
from pathfm.benchmarks import TileSet
from pathfm.devices import kept_memory
from pathfm.features import extract
from pathfm.runs import stamp, write_results

BATCH = 32


def timed(run) -> tuple[float, float]:
    """Seconds of CPU and wall."""
    start = time.process_time(), time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time() - start[0], time.perf_counter() - start[1]


@torch.inference_mode()
def bare(model, ready: torch.Tensor, precision: str) -> None:
    with torch.autocast(ready.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        for batch in ready.split(BATCH):
            model.forward_features(batch)


def unasked(make, precision: str, *others) -> tuple[extractors.Extractor, None]:
    """`extractors.choose` without a look at what bfloat16 changes, which only a large set pays for easily."""
    return make(precision), None


def speed(model, tiles: TileSet, precision: str, device: str, rounds: int) -> pd.DataFrame:
    """A row a round: tiles a second, and seconds of a bare pass over those of the extraction."""
    preprocess = extractors._timm_preprocess(model)
    images = np.stack([extractors._square(tiles.image(row)) for row in range(len(tiles))])
    ready = torch.cat([preprocess(part) for part in np.array_split(images, -(-len(images) // BATCH))]).to(device)
    rows = []
    for _ in range(rounds):
        forward = timed(lambda: bare(model, ready, precision))
        with kept_memory(torch.device(device)):
            kept = timed(lambda: bare(model, ready, precision))
        with tempfile.TemporaryDirectory() as folder:
            how = {"folder": folder, "batch_size": BATCH, "precision": precision}
            with mock.patch.object(extractors, "choose", unasked):
                whole = timed(lambda how=how: extract(model, tiles, **how))
        ratios = {"cpu": forward[0] / whole[0], "wall": forward[1] / whole[1]}
        ratios |= {"cpu, memory kept": kept[0] / whole[0], "wall, memory kept": kept[1] / whole[1]}
        rows.append({**ratios, "tiles/s": len(tiles) / whole[1]})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    told = parser.parse_args()
    torch.manual_seed(0)
    model = vit.make_backbone(told.model, "random")[0].eval().to(told.device)
    tiles = TileSet.from_folder(told.folder)
    tiles = tiles.subset(np.unique(np.linspace(0, len(tiles) - 1, min(told.n, len(tiles))).astype(int)))
    found, rows = {}, []
    for precision in ("float32", "bfloat16"):
        table = speed(model, tiles, precision, told.device, told.rounds)
        rows.append({"model": told.model, "precision": precision, "n": len(tiles), "rounds": told.rounds})
        rows[-1] |= table.median().to_dict() | {"cpu_low": table["cpu"].min(), "cpu_high": table["cpu"].max()}
        with tempfile.TemporaryDirectory() as folder:
            one = extract(model, tiles, folder=folder, precision=precision)
            found[precision] = one.of(tiles.split("tile"))
            found[precision] = type(one)(one.name, np.array(one.x), found[precision].tiles, one.provenance)
    agreed = extractors.agreement(found["float32"].x, found["bfloat16"].x, tiles.y)
    for row in rows:
        one = found[row["precision"]]
        row |= {how.__name__: how(one).balanced_accuracy for how in (probe.linear, probe.knn)}
    rows[1] |= {f"agreement_{name}": value for name, value in agreed._asdict().items()}
    table = pd.DataFrame(rows)
    print(table.round(4).T.to_string())
    print(write_results("features", table.assign(**stamp())))


if __name__ == "__main__":
    main()
