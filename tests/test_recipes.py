"""Recipes: small files that say where each value comes from; and the two methods' configs."""

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch

import pathfm
from pathfm import closeup, config, pretrain, study
from pathfm.__main__ import main
from pathfm.config import METHODS, RECIPES, DinoV2Config, PretrainConfig, make_config, recipe
from pathfm.errors import InputError
from pathfm.options import Sampling
from pathfm.vit import make_backbone
from pathfm.weights import with_tag

FILES = sorted((Path(pathfm.__file__).parent / "recipes").glob("*.yaml"))
PUBLISHED = ["dino-vitb16", "dino-vitb8", "dino-vits16", "dino-vits8", "dinov2-vitl14", "midnight-vitg14"]


def test_the_recipes_are_there():
    assert {*PUBLISHED, "smoke", "demo", "dinov2-smoke", "dinov2-demo", "midnight-vitg14-highres"} == set(RECIPES)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_value_says_where_it_comes_from_and_is_one_of_its_method(file):
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.search(r"#.*\[(dino|dinov2|kaiko|midnight|openmidnight|virchow2|tellez|ours)\]", x) for x in lines)
    assert len(lines) == len(RECIPES[file.stem])
    assert type(recipe(file.stem)) is METHODS[RECIPES[file.stem].get("method", "dino")]


@pytest.mark.parametrize("name", RECIPES)
def test_models_exist_and_their_patch_divides_the_views(name):
    settings = recipe(name)
    assert settings.model in timm.list_models(settings.model)
    patch = int(re.search(r"patch(\d+)", settings.model)[1])
    assert settings.global_px % patch == settings.local_px % patch == 0


@pytest.mark.parametrize("name", [name for name in RECIPES if recipe(name).init == "imagenet"])
def test_imagenet_stands_for_self_supervised_weights_and_the_recorded_model_can_be_made(name):
    """timm's own choice for ViT-S/16, B/16 and B/8 would be a classifier trained with labels."""
    settings = recipe(name)
    about = timm.models.get_pretrained_cfg(with_tag(settings.model))
    assert about.tag == {"dino": "dino", "dinov2": "lvd142m"}[settings.method] and about.num_classes == 0
    with torch.device("meta"):
        model, _ = make_backbone(settings.model, "random", settings.global_px)
    assert model.pretrained_cfg["architecture"] == settings.model  # what an export names


def test_the_demo_recipe_is_the_one_that_was_measured():
    demo = recipe("demo")
    assert (demo.koleo, demo.stain, demo.steps, demo.batch_size, demo.base_lr) == (0.1, 0.5, 2400, 64, 4e-3)
    assert (demo.prototypes, demo.teacher_temperature, demo.global_px, demo.precision) == (1024, 0.02, 112, "auto")
    assert study.config("demo") == demo and study.config("smoke") == make_config(**config.SMOKE)


def test_the_viewer_shows_the_views_of_every_recipe():
    assert [closeup.recipe(name) for name in RECIPES] == [recipe(name) for name in RECIPES]
    assert closeup.recipe(closeup.PUBLISHED) == PretrainConfig()


def test_large_models_are_shared_out_where_there_are_several_gpus():
    assert {name for name in RECIPES if recipe(name).shard} == {
        "dinov2-vitl14",
        "midnight-vitg14",
        "midnight-vitg14-highres",
    }


def test_the_half_life_is_where_half_of_the_teacher_is_new():
    demo = recipe("demo")
    assert demo.momentum ** (demo.half_life_tiles / demo.batch_size) == pytest.approx(0.5)
    assert demo.half_life_tiles == pytest.approx(11_000, rel=0.01)
    assert math.isnan(demo.replace(momentum=1.0).half_life_tiles)


def test_the_published_models_are_those_of_the_paper():
    models = [recipe(name).model for name in PUBLISHED[:5]]
    sizes = ["base_patch16_224", "base_patch8_224", "small_patch16_224", "small_patch8_224"]
    assert models == [*(f"vit_{size}" for size in sizes), "vit_large_patch14_reg4_dinov2"]
    midnight = recipe("midnight-vitg14")
    assert (midnight.koleo, midnight.kde_kappa, midnight.global_px, midnight.local_px) == (0, 5, 224, 98)
    highres = recipe("midnight-vitg14-highres")
    assert (highres.model, highres.global_px, highres.local_px) == (midnight.model, 392, 168)


def test_dinov2_defaults_are_the_authors():
    settings = DinoV2Config()
    assert (settings.momentum, settings.layer_decay, settings.patch_embed_lr) == (0.992, 0.9, 0.2)
    assert (settings.mask_probability, settings.mask_ratio, settings.koleo, settings.ibot) == (0.5, (0.1, 0.5), 0.1, 1)
    assert settings.replace(batch_size=1024).lr == 4e-3
    assert settings.replace(batch_size=256).lr == pytest.approx(4e-3 * math.sqrt(1 / 4))
    assert all(field.metadata["help"] for field in dataclasses.fields(settings))


def test_a_record_makes_the_config_again():
    for name in ("smoke", "dinov2-smoke"):
        assert make_config(**dataclasses.asdict(recipe(name))) == recipe(name)


def test_a_recipe_is_changed_by_fields_and_unknown_names_offer_the_nearest():
    assert recipe("dinov2-smoke", steps=3).steps == 3
    assert study.config("dinov2-smoke", "mask_ratio=0.2,0.4", steps=5).mask_ratio == (0.2, 0.4)
    with pytest.raises(InputError, match="recipe='dinov2-vitL14' is unknown. Did you mean 'dinov2-vitl14'"):
        recipe("dinov2-vitL14")
    with pytest.raises(InputError, match="DinoV2Config has no field 'mask_ration'. Did you mean 'mask_ratio'"):
        recipe("dinov2-smoke", mask_ration=(0.1, 0.2))
    with pytest.raises(InputError, match="PretrainConfig has no field 'ibott'"):
        recipe("smoke", ibott=1.0)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"method": "dinov3"}, "method='dinov3' is unknown. Did you mean 'dinov2'"),
        ({"method": "dinov2", "centring": "sinkhorn-knopp"}, "centring='sinkhorn-knopp' is unknown. Did you mean"),
        ({"method": "dinov2", "batch_size": 1}, "batch_size=1 leaves koleo no neighbour"),
        ({"method": "dinov2", "batch_size": 1, "koleo": 0, "kde": 0.1}, "batch_size=1 leaves kde no other tile"),
        (
            {"method": "dinov2", "batch_size": 4, "mask_probability": 0.1},
            "mask_probability=0.1 of 8 global views hides",
        ),
        ({"method": "dinov2", "head_norm": True}, "head_norm=True would mix"),
        ({"method": "dinov2", "mask_ratio": (0.5, 0.1)}, "mask_ratio=.* must rise"),
        ({"method": "dinov2", "mask_ratio": (0.5, 1.1)}, "mask_ratio=.* within 0 and 1"),
        ({"method": "dinov2", "layer_decay": 0}, "layer_decay=0.0 must be above 0"),
        ({"batch_size": 1, "stain_transfer": 0.5}, "leaves stain_transfer no other tile"),
        ({"batch_size": 1, "randstain": 0.5}, "leaves randstain no law"),
        ({"mpp": ("fine", "coarse")}, "mpp=.* are not numbers"),
        ({"randstain_lab": (1.0,)}, "must have 0 or 12 numbers"),
        ({"blur_sigma_um": (0.1,)}, "must have 0 or 2 numbers"),
        ({"crop": "translate"}, "crop='translate' cuts up to 253 px, but tile_px=252"),
        ({"crop": "shift"}, "crop='shift' is unknown"),
    ],
)
def test_values_that_cannot_work_are_named(fields, message):
    tile_px = {"tile_px": 252} if fields.get("crop") == "translate" else {}
    with pytest.raises(InputError, match=message):
        make_config(**fields, **tile_px)


@pytest.mark.parametrize(
    "name, millions",
    [("dino-vits16", 21.7), ("dino-vitb8", 85.8), ("dinov2-vitl14", 303.2), ("midnight-vitg14", 1134.8)],
)
def test_a_recipe_makes_a_model_of_the_published_size(name, millions):
    """Without memory for it: shapes alone. Sizes at 224 px, so with fewer positions than timm's 518 px weights."""
    settings = recipe(name, init="random")
    with torch.device("meta"):
        model = pretrain.METHODS[settings.method](settings)
    assert sum(p.numel() for p in model.teacher.backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    assert model.student.head(torch.empty(1, model.student.backbone.num_features, device="meta")).shape == (
        1,
        settings.prototypes,
    )


def test_the_command_line_takes_a_recipe_and_its_methods_fields(monkeypatch, capsys):
    told = []
    monkeypatch.setattr("pathfm.__main__.pretrain", lambda *given: told.append(given))
    assert main(["pretrain", "c.csv", "f", "--recipe", "dinov2-vitl14", "--steps=7", "--mask-ratio", "0.1,0.3"]) == 0
    wanted = recipe("dinov2-vitl14", steps=7, mask_ratio=(0.1, 0.3))
    assert told.pop() == (wanted, "c.csv", "f", "", Sampling.of(wanted))
    assert main(["pretrain", "c.csv", "f", "--method", "dinov2"]) == 0 and told.pop()[0] == DinoV2Config()
    assert main(["pretrain", "c.csv", "f"]) == 0 and told.pop()[0] == PretrainConfig()
    assert main(["pretrain", "c.csv", "f", "--recipe=dmo"]) == 2
    assert "Did you mean 'demo'" in capsys.readouterr().err


def test_a_config_is_of_its_method():
    with pytest.raises(InputError, match="method='dinov2' is not of PretrainConfig; take DinoV2Config"):
        PretrainConfig(method="dinov2")


RUNNING = {"watch_every", "watch_tiles", "checkpoint_every", "threads", "precision"}


def test_the_pairs_of_trials_in_notebook_03_are_all_that_differ_in_one_setting_and_their_gains_the_files():
    """Its table against results/recipe_search.csv, whose settings change the recipe of the trial."""
    root = Path(__file__).parent.parent
    trials = pd.read_csv(root / "results" / "recipe_search.csv").set_index("trial")
    settings = {}
    for trial, text in trials["settings"].items():
        told = json.loads(text)
        own = {name: told.pop(name) for name in ("slide_run", "slide_centre") if name in told}  # no longer there
        fields = dataclasses.asdict(recipe(told.pop("recipe", "smoke"), **told))
        settings[trial] = {name: value for name, value in {**fields, **own}.items() if name not in RUNNING}

    def differing(one: str, other: str) -> set[str]:
        a, b = settings[one], settings[other]
        return {name for name in a | b if a.get(name) != b.get(name)}

    cells = json.loads((root / "notebooks" / "03_pretraining.ipynb").read_text())["cells"]
    text = next(text for text in ("".join(cell["source"]) for cell in cells) if "**no grid**" in text)
    rows = re.findall(r"^\|[^|]+\|[^|]+\|[^|]+\| (\w+), (\w+) \| ([\d.]+) → ([\d.]+) \|$", text, re.MULTILINE)
    assert len(rows) == 13
    for one, other, *gains in rows:
        assert gains == [f"{100 * trials['gain_seed12'][trial]:.1f}" for trial in (one, other)]
        assert len(differing(one, other)) <= 3, differing(one, other)
    late = [f"l{k}" for k in range(22)]  # DINOv2's, one change a trial
    early = itertools.combinations([trial for trial in settings if trial not in late], 2)
    single = {frozenset(pair) for pair in early if len(differing(*pair)) == 1}
    assert len(single) == 8 and single <= {frozenset(row[:2]) for row in rows}
    changes = {trial: len(differing("k4" if trial in ("l20", "l21") else "l1", trial)) for trial in late}
    assert changes == dict.fromkeys(late, 1) | {"l1": 0, "l5": 2, "l13": 2}
    gains = 100 * trials["gain_seed12"]
    others = gains[late[2:20]]
    assert f"{others.min():.1f} to {others.max():.1f} points\nin 200 steps where l1 has {gains['l1']:.1f}" in text
    best = f"{gains['l20']:.1f} and {gains['l21']:.1f} in 600 steps where k4 has {gains['k4']:.1f}"
    assert best in text and {others.idxmax(), others.drop("l4").idxmax()} == {"l4", "l17"}
