"""What a reader of exported weights should know: data, recipe, numbers, overlap with public test sets, licence."""

from __future__ import annotations

import json
import re
from typing import Any

import pandas as pd

from pathfm.options import DRAWS

# Sources of tissue by how their slides are named: TCGA's and GTEx's barcodes, CAMELYON16's and 17's files.
NAMED = {"TCGA": r"TCGA-\w\w-", "GTEx": r"GTEX-\w+-", "CAMELYON": r"(normal|tumor|test|patient)_\d{3}(_node_\d)?$"}
SYNTHETIC, UNKNOWN = "synthetic", "unknown"
OURS = "Apache-2.0, as pathfm: its tissue is synthetic and its start random"
ASK = "not stated: whoever shares these weights names it, within what the licences of slides and start allow"


def of_run(params: dict[str, Any], looks: pd.DataFrame, which: str = "teacher", licence: str = "") -> dict[str, Any]:
    """The card of a run's weights, by heading: strings, or JSON values.

    params   the run's params.json
    looks    the run's watches.csv, a row a look at validation tiles
    which    "teacher" or "student"
    licence  of the weights, and of these alone
    """
    stream, config = params["stream"], params["config"]
    tissue = stream.get("tissue", {})
    return {
        "Weights": f"The {which}'s backbone after {config['steps']} steps of {config['batch_size']} tiles, "
        f"{config['method']}; heads are left out.",
        "Start": params["init"],
        "Data": data(stream, config),
        "Public test sets": overlap(tissue, params["init"]),
        "Metrics": metrics(looks),
        "Robustness index": robustness(looks),
        "Licence": licence or (OURS if set(tissue) == {SYNTHETIC} and params["init"] == "random weights" else ASK),
        "Recipe": {**config, "init": params["init"]},
        "Tiles": stream,
        "Provenance": params["sessions"],
    }


def tissue_of(slides: pd.DataFrame) -> dict[str, int]:
    """Slides (a table with slide_id and path) by where their tissue comes from: NAMED, "synthetic" or "unknown"."""
    from pathfm.synthetic.slides import sidecar

    def source(name: str, path: str) -> str:
        known = (source for source, pattern in NAMED.items() if re.match(pattern, name, re.I))
        return next(known, SYNTHETIC if sidecar(path, ".truth.npz").is_file() else UNKNOWN)

    paths = slides["path"] if "path" in slides else slides["slide_id"]
    found = [source(str(name), str(path)) for name, path in zip(slides["slide_id"], paths, strict=True)]
    return {name: found.count(name) for name in dict.fromkeys(found)}


def data(stream: dict[str, Any], config: dict[str, Any]) -> str:
    """One paragraph: slides, patients, centres, magnifications."""
    if "slides" not in stream:
        return f"Tiles of {stream['stream']}, without slides; mpp {_listed(config['mpp'])}."
    centres, options = stream.get("centres", []), stream.get("options", {})
    scales = _listed(row["mpp"] for row in stream["mixture"]) if "mixture" in stream else _listed(config["mpp"])
    tissue = ", ".join(f"{n} {name}" for name, n in stream.get("tissue", {}).items())
    return (
        f"{stream['slides']} slides of {stream['patients']} patients; tissue: {tissue or 'not told'}. "
        f"Training centres: {', '.join(centres) if centres else 'not told'}. Microns per pixel: "
        f"{options.get('mpp') or scales}; "
        f"tiles of {options.get('tile_px', config['tile_px'])} px with at least {config['min_tissue']:.0%} tissue."
        f"{_drawn(options)}"
    )


def _drawn(options: dict[str, Any]) -> str:
    """How tiles were drawn, where it was not each slide and each position alike."""
    plain = {"resample": "auto", "context_px": options.get("tile_px")}
    said = {name: options.get(name) for name in (*DRAWS, "resample")}
    said = {name: value for name, value in said.items() if value and value != plain.get(name)}
    values = [f"{name}={_listed(value) if isinstance(value, list) else value}" for name, value in said.items()]
    return f" Drawn with {'; '.join(values)}." if values else ""


def _listed(values) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def overlap(tissue: dict[str, int], start: str) -> str:
    """Which public tasks have patients or slides in tissue of these sources, by `pathfm.tasks.contamination`."""
    from pathfm import tasks

    table = tasks.contamination().set_index("task")
    table = table[[tasks.about(name).url != "" for name in table.index]]  # not what a user brings
    sources = [name for name in tissue if name in NAMED]
    said = []
    for answer, meaning in (("yes", "overlap the training data"), ("unknown", "may overlap them")):
        hit = table.index[(table[sources] == answer).any(axis=1)] if sources else []
        said += [f"{', '.join(hit)}: {meaning} ({', '.join(sources)})."] if len(hit) else []
    if UNKNOWN in tissue or not tissue:
        said.append("Slides whose names tell no source: whether a public test set holds their tissue is not known.")
    if set(tissue) == {SYNTHETIC}:
        said.append("None overlaps the training data: all of its slides are synthetic.")
    if start != "random weights":
        said.append(f"What the start ({start}) has seen comes on top.")
    return " ".join(said)


def metrics(looks: pd.DataFrame) -> dict[str, dict] | str:
    """The last look at the validation tiles, and the first for comparison; None where there was no number."""
    if not len(looks):
        return "The run was not watched on validation tiles."
    first, last = looks.iloc[0], looks.iloc[-1]
    return {name: {"first": _short(first[name]), "last": _short(last[name])} for name in looks}


def robustness(looks: pd.DataFrame) -> str:
    """One sentence on the robustness index of the last look."""
    if "robustness_index" not in looks or looks["robustness_index"].isna().all():
        return "Not measured: the watched tiles have no two centres that both hold every class."
    return f"{looks['robustness_index'].iloc[-1]:.2f} on the watched tiles (0.5 and less: the centre decides)."


def _short(value: float) -> float | None:
    return None if pd.isna(value) else float(f"{value:.4g}")


def markdown(config: dict[str, Any]) -> str:
    """README.md of an exported folder, from its config.json."""
    about = config["pretrained_cfg"]
    lines = [
        f"# {config['architecture']}, pretrained with pathfm",
        "",
        "```python",
        'model = timm.create_model("local-dir:<this folder>", pretrained=True)  # images to CLS (B, D)',
        "tokens = model.forward_features(images)  # CLS, registers, then a token a patch",
        'model, preprocess = pathfm.load("<this folder, or its address>")  # uint8 tiles: model(preprocess(tiles))',
        "```",
        "",
        f"Input: {about['input_size'][1]} px tiles, RGB from 0 to 1 less mean {about['mean'][0]:g}, over std "
        f"{about['std'][0]:g}. Output: the CLS token, {config['num_features']} features.",
        "",
    ]
    for heading, content in config["pathfm"].items():
        text = content if isinstance(content, str) else f"```json\n{json.dumps(content, indent=2, default=str)}\n```"
        lines += [f"## {heading}", "", text, ""]
    return "\n".join(lines)
