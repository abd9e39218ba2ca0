"""The rules of the protocols give every value that eva's configurations hold."""

import pytest

from pathfm.errors import InputError
from pathfm.protocols import protocol

# Images of train and validate, classes, and the configurations' own values.
PATIENCE_2026 = {
    "bach": (268, 132, 4, 1250),
    "crc": (100_000, 7180, 9, 7),
    "mhist": (2175, 977, 2, 278),
    "patch_camelyon": (262_144, 32_768, 2, 3),
    "bracs": (3657, 312, 7, 167),
    "breakhis": (1132, 339, 4, 500),
    "gleason_arvaniti": (15_303, 2482, 4, 42),
}
OF_2024 = {
    "bach": (268, 132, 4, 400, 256, 0.000625, "balanced accuracy"),
    "crc": (100_000, 7180, 9, 24, 4096, 0.01, "balanced accuracy"),
    "mhist": (2175, 977, 2, 51, 256, 0.000625, "accuracy"),
    "patch_camelyon": (262_144, 32_768, 2, 9, 4096, 0.01, "accuracy"),
}


@pytest.mark.parametrize("task", PATIENCE_2026)
def test_eva_2026(task):
    *size, patience = PATIENCE_2026[task]
    found = protocol("eva-2026", *size)
    assert (found.patience, found.batch_size, found.lr, found.runs) == (patience, 256, 3e-4, 5)
    assert (found.optimiser, found.schedule, found.monitor) == ("AdamW", "constant", "balanced accuracy")
    assert (found.max_steps, found.every, found.min_delta, found.one_start) == (12_500, 1, 0, False)


@pytest.mark.parametrize("task", OF_2024)
def test_eva_2024(task):
    *size, patience, batch, lr, monitor = OF_2024[task]
    found = protocol("eva-2024", *size)
    assert (found.patience, found.batch_size, found.lr, found.monitor) == (patience, batch, pytest.approx(lr), monitor)
    assert (found.optimiser, found.schedule, found.runs, found.one_start) == ("SGD", "cosine", 5, True)


def test_ten_shots():
    found = protocol("eva-2026-10shot", 262_144, 32_768, 2)
    assert (found.patience, found.runs, found.shots, found.every, found.min_delta) == (125, 50, 10, 10, 1e-4)
    assert (found.optimiser, found.lr, found.monitor) == ("AdamW", 3e-4, "balanced accuracy")


def test_an_unknown_protocol_is_answered_with_a_near_one():
    with pytest.raises(InputError, match="Did you mean 'eva-2024'"):
        protocol("eva2024", 100, 100, 2)
