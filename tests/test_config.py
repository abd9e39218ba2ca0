"""A configuration is checked when it is made, and an unknown or impossible value is named."""

import dataclasses
import json

import pytest

from pathfm.config import SMOKE, PretrainConfig
from pathfm.errors import InputError


def test_the_defaults_are_the_published_ones():
    config = PretrainConfig()
    assert (config.prototypes, config.momentum, config.teacher_temperature, config.clip) == (65536, 0.996, 0.04, 3.0)
    assert (config.global_scale, config.local_scale, config.local_views) == ((0.4, 1.0), (0.05, 0.4), 8)
    assert config.lr == 5e-4 and config.replace(batch_size=512).lr == 1e-3
    assert all(field.metadata["help"] for field in dataclasses.fields(config))


def test_an_unknown_field_offers_the_nearest():
    with pytest.raises(InputError, match=r"no field 'base_Ir'.*Did you mean 'base_lr'"):
        PretrainConfig.of(base_Ir=1e-3)


def test_json_and_papermill_values_become_the_fields_types():
    config = PretrainConfig.of(mpp=0.5, global_scale=[0.32, 1], clip=3)
    assert config.mpp == (0.5,) and config.global_scale == (0.32, 1.0) and type(config.clip) is float
    assert PretrainConfig.of(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"steps": 0}, "steps=0 must be above 0"),
        ({"steps": 2.5}, "steps=2.5 is no int"),
        ({"head_norm": 1}, "head_norm=1 is no bool"),
        ({"momentum": 1.2}, "momentum=1.2 must be within 0 and 1"),
        ({"workers": -1}, "workers=-1 must not be negative"),
        ({"mpp": ()}, "must be microns per pixel"),
        ({"mpp": "fine"}, "mpp='fine' is no tuple"),
        ({"global_scale": (1.0, 0.4)}, "must rise"),
        ({"blur": (0.5,)}, "must have 3 numbers"),
        ({"hue": 0.7}, "at most 0.5"),
        ({"width": 100, "heads": 3}, "no multiple of heads=3"),
        ({"batch_size": 1, "head_norm": True}, "BatchNorm"),
        ({"precision": "float16"}, "precision='float16' is unknown"),
        ({"device": "gpu"}, "device='gpu' is unknown"),
    ],
)
def test_values_that_cannot_work_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        PretrainConfig.of(**fields)


def test_smoke_is_small():
    config = PretrainConfig.of(**SMOKE)
    assert config.steps * config.batch_size <= 1000 and config.precision == "float32" and config.init == "random"
