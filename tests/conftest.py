"""Fixtures that several test files share, such as a tiny synthetic cohort and its index, made once per session."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pathfm import reading
from pathfm.index import SlideIndex
from pathfm.synthetic import tiny_cohort


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """Four slides of 0.6 mm, two patients, 0.5 and 0.25 mpp in turn."""
    return tiny_cohort(tmp_path_factory.mktemp("tiny"), n=4)


@pytest.fixture(scope="session")
def index(cohort, tmp_path_factory):
    return SlideIndex.build(cohort, tmp_path_factory.mktemp("index"), workers=0)


@pytest.fixture
def quiet() -> Callable[[float], None]:
    """Reads that earlier tests have begun and dropped have ended; else they would be counted as this test's.

    The function waits so many seconds, at most, until those of this test have ended: BrokenBarrierError.
    """

    def fetchers_are_free(seconds: float) -> None:
        together = threading.Barrier(reading.FETCHERS)
        list(reading._fetchers(os.getpid()).map(lambda _: together.wait(seconds), range(reading.FETCHERS)))

    gc.collect()
    fetchers_are_free(60)
    return fetchers_are_free


@pytest.fixture
def style():
    """The project's figure style for one test, whatever another has set."""
    import matplotlib.pyplot as plt

    from pathfm import figures

    with plt.style.context([]):
        figures.use_style()
        yield
    plt.close("all")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real slides and tiles; skips where it is missing, fails there under CI=true."""
    given = os.environ.get("PATHFM_TEST_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "slides").is_dir():
        reason = "no real slides: set PATHFM_TEST_DATA to the folder that holds slides/ and tiles/"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def eva_python():
    """The interpreter that has kaiko-eva; skips without one."""
    from pathfm import InputError, eva

    try:
        return eva.interpreter()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A small exported backbone for eva to load."""
    import torch

    from pathfm.export import export
    from pathfm.vit import make_backbone

    torch.manual_seed(0)
    model = make_backbone("vit_small_patch16_224", "random", img_size=64, depth=2, width=48, heads=3)[0]
    return export(model.eval(), tmp_path_factory.mktemp("eva") / "teacher")
