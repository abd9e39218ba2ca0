"""Cohorts of synthetic slides: which slides there are, and making the ones that are missing."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from pathfm.errors import InputError, nearest
from pathfm.storage import atomic_path, cache_dir, progress, read_json
from pathfm.synthetic import appearance
from pathfm.synthetic.appearance import Knobs, Origin
from pathfm.synthetic.layout import KINDS
from pathfm.synthetic.slides import SlideSpec, is_made, make_slide

_OPTIONAL = ("necrosis", "mucus", "adipose", "muscle", None)  # which class a slide lacks, in turn
_PYRAMIDS = {"1-4-16": 4, "1-2-4-8": 1}  # and where in _OPTIONAL each begins, so that every role shows every class
# Artefacts of the slides in turn; the length is coprime to every other cycle.
_SPOILT = {
    "off": ((),),
    "default": ((), ("pen",), (), ("fold",), (), ("bubble",), (), ("blur",), (), (), ()),
    "strong": (("pen",), ("fold",), ("blur", "bubble"), ("pen", "fold"), ("bubble",), ("fold", "blur"), ()),
}


@dataclass(frozen=True)
class Design:
    """A cohort before it is drawn.

    roles   of each centre in turn, the role of each of its patients in turn; its length is the number of centres
    """

    roles: tuple[tuple[str, ...], ...]
    second_slide_every: int  # patients, 0 for never
    side_um: tuple[float, float]
    fine_every: int  # slides, at 0.25 mpp; the others at 0.5
    knobs: Knobs = field(default_factory=Knobs)


def _repeat(**counts: int) -> tuple[str, ...]:
    return tuple(role.replace("_", "-") for role, count in counts.items() for _ in range(count))


DESIGNS = {
    # Proves the machinery; no findings. Two centres teach, one validates, one is the test.
    "embedded": Design(
        roles=(_repeat(pretrain=2, probe_train=2),) * 2 + (_repeat(validate=4), _repeat(test=4)),
        second_slide_every=2,
        side_um=(2000, 2800),
        fine_every=3,
    ),
    # Findings. Five centres teach and hold three patients each for an in-domain test.
    "study": Design(
        roles=(_repeat(pretrain=10, probe_train=5, test=3),) * 5 + (_repeat(validate=18),) + (_repeat(test=18),) * 2,
        second_slide_every=4,
        side_um=(2000, 2000),
        fine_every=1,
    ),
    # For tuning: `study` in small, drawn with other seeds.
    "development": Design(
        roles=(_repeat(pretrain=4, probe_train=3),) * 5 + (_repeat(validate=8),) + (_repeat(test=5),) * 2,
        second_slide_every=0,
        side_um=(2000, 2000),
        fine_every=1,
    ),
    # Slide labels.
    "bags": Design(
        roles=(_repeat(probe_train=45, validate=15, test=15),) * 4,
        second_slide_every=0,
        side_um=(2000, 2000),
        fine_every=0,
    ),
}


def specs(name: str, seed: int = 0, knobs: Knobs | None = None) -> list[SlideSpec]:
    """The slides of the cohort called `name`. Raises InputError, with the nearest name, where there is none."""
    if name not in DESIGNS:
        raise InputError(f"no synthetic cohort is called {name!r}.{nearest(name, DESIGNS)}")
    return list(_specs(name, DESIGNS[name], seed, knobs or DESIGNS[name].knobs))


def _specs(name: str, design: Design, seed: int, knobs: Knobs) -> Iterator[SlideSpec]:
    patient = slide = 0
    drawn = Counter()  # classes are lacking in turn within a resolution and pyramid: these predict none
    spoilt = _SPOILT[knobs.artefacts]
    for centre, roles in enumerate(design.roles):
        within = 0
        seen = {0.25: centre, 0.5: centre}  # pyramids alternate within a centre and resolution
        for role in roles:
            doubled = design.second_slide_every and patient % design.second_slide_every == 0
            for _ in range(2 if doubled else 1):
                fine = bool(design.fine_every) and (within + centre) % design.fine_every == 0
                mpp = 0.25 if fine else 0.5
                origin = Origin(seed, centre, len(design.roles), patient, slide)
                rng = np.random.default_rng([seed, 900, slide])
                width, height = (16 * round(side / mpp / 16) for side in rng.uniform(*design.side_um, 2))
                pyramid = tuple(_PYRAMIDS)[seen[mpp] % 2]
                lacks = _OPTIONAL[(_PYRAMIDS[pyramid] + drawn[mpp, pyramid]) % len(_OPTIONAL)]
                drawn[mpp, pyramid] += 1
                yield SlideSpec(
                    slide_id=f"{name}-{slide:03d}",
                    origin=origin,
                    mpp=mpp,
                    width_px=width,
                    height_px=height,
                    pyramid=pyramid,
                    kind=KINDS[rng.choice(len(KINDS), p=[0.5, 0.3, 0.2])],
                    absent=(lacks,) if lacks else (),
                    artefacts=spoilt[slide % len(spoilt)],
                    patient_id=f"{name}-P{patient:03d}",
                    role=role,
                    knobs=knobs,
                )
                seen[mpp] += 1
                within += 1
                slide += 1
            patient += 1


def make_cohort(
    name: str = "embedded",
    folder: str | Path | None = None,
    seed: int = 0,
    workers: int | None = None,
    knobs: Knobs | None = None,
):
    """The synthetic cohort called `name`, as a pathfm Cohort; slides that are already there are not drawn again.

    folder    default: <cache>/<name>-<generator hash>, with the seed and knobs where they are not the default
    workers   processes; default one per core
    Stopped at any moment it goes on where it was. Raises InputError for an unknown name, a full disk, or a
    folder that holds slides of another generator.
    """
    todo = specs(name, seed, knobs)
    return make_slides(todo, Path(folder) if folder else _home(name, seed, todo[0].knobs), name, workers)


def embedded():
    """The cohort that every notebook and test can rely on: 24 slides, 16 patients, 4 centres.

    In centres 0 and 1 two patients each pretrain and two train probes; centre 2 validates, centre 3 is the test.
    """
    return make_cohort("embedded")


def tiny_cohort(folder: str | Path, n: int = 4, side_um: float = 600, mpp=(0.5, 0.25), seed: int = 0, **spec):
    """`n` small slides for tests, about a second each: patients in pairs, two centres, all four roles in turn.

    mpp    one value, or several in turn
    spec   any other field of SlideSpec, for all slides
    """
    scales = mpp if isinstance(mpp, tuple | list) else (mpp,)
    roles = ("pretrain", "probe-train", "validate", "test")
    todo = []
    for slide in range(n):
        patient, scale = slide // 2, scales[slide % len(scales)]
        side_px = 16 * round(side_um / scale / 16)
        fields = {
            "slide_id": f"tiny-{slide:03d}",
            "origin": Origin(seed, patient % 2, 2, patient, slide),
            "mpp": scale,
            "width_px": side_px,
            "height_px": side_px,
            "pyramid": ("1-4-16", "1-2-4-8")[(slide // 2) % 2],
            "patient_id": f"tiny-P{patient:03d}",
            "role": roles[patient % 4],
        }
        todo.append(SlideSpec(**{**fields, **spec}))
    return make_slides(todo, Path(folder), "tiny", workers=1)


def make_slides(todo: list[SlideSpec], folder: Path, name: str, workers: int | None = None):
    """Draw what is missing of `todo` into `folder`, write cohort.csv beside it and return the Cohort."""
    from filelock import FileLock

    from pathfm.cohort import Cohort

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {folder} ({error.strerror}); choose a folder that can be written") from None
    with FileLock(folder / ".lock"):
        _refuse_strangers(folder)
        for leftover in folder.glob(".*.partial*"):  # of a process that was killed
            leftover.unlink()
        missing = [spec for spec in todo if not is_made(spec, folder)]
        for _ in progress(_drawn(missing, folder, workers), f"drawing {name}", len(missing), "slide"):
            pass
        with atomic_path(folder / "cohort.csv") as partial:
            table(todo).to_csv(partial, index=False)
    return Cohort(Cohort.read(folder / "cohort.csv").table, name)


def table(todo: list[SlideSpec]) -> pd.DataFrame:
    """One row a slide in the columns of a cohort, with the slide labels B0 to B3."""
    rows = []
    for spec in todo:
        rows.append(
            {
                "slide_id": spec.slide_id,
                "path": f"{spec.slide_id}.svs",
                "patient_id": spec.patient_id,
                "centre": f"centre-{spec.origin.centre}",
                "scanner": f"scanner-{spec.origin.centre}",
                "organ": "synthetic bowel",
                "stain": "H&E",
                "mpp": spec.mpp,
                "role": spec.role,
                **appearance.labels(spec.origin)[1],
            }
        )
    return pd.DataFrame(rows)


def _home(name: str, seed: int, knobs: Knobs) -> Path:
    from pathfm.synthetic import generator_hash

    parts = [name, generator_hash()]
    if seed:
        parts.append(f"seed{seed}")
    changed = [f"{knob}={value}" for knob, value in vars(knobs).items() if value != getattr(DESIGNS[name].knobs, knob)]
    return cache_dir() / "-".join(parts + changed)


def _refuse_strangers(folder: Path) -> None:
    """Slides of two generators never share a folder."""
    from pathfm.synthetic import generator_hash

    for latents in sorted(folder.glob("*.latents.json"))[:1]:
        found = read_json(latents)["generator"]
        if found != generator_hash():
            raise InputError(
                f"{folder} holds slides of generator {found}, this is {generator_hash()}; choose another folder"
            )


def _drawn(missing: list[SlideSpec], folder: Path, workers: int | None) -> Iterator[str]:
    """Slide ids as they are finished."""
    workers = min(workers or _cores(), len(missing))
    if workers <= 1:
        for spec in missing:
            make_slide(spec, folder)
            yield spec.slide_id
        return
    # Fine slides take longest: begin with them, so that no core waits for one at the end.
    waiting = sorted(missing, key=lambda spec: spec.width_px * spec.height_px)
    processes = [_Worker(folder) for _ in range(workers)]
    try:
        with ThreadPoolExecutor(workers) as threads:
            running = {threads.submit(worker.draw, waiting.pop()): worker for worker in processes}
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    worker = running.pop(future)
                    yield future.result()
                    if waiting:
                        running[threads.submit(worker.draw, waiting.pop())] = worker
    finally:
        for worker in processes:
            worker.stop()


class _Worker:
    """A Python of its own that draws one slide after another.

    Not multiprocessing: its children would run a caller's unguarded script again, and wait here for ever.
    """

    def __init__(self, folder: Path):
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-c", "from pathfm.synthetic.cohorts import serve; serve()", str(folder)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )

    def draw(self, spec: SlideSpec) -> str:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(asdict(spec)) + "\n")
            self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if not reply:
            raise InputError(
                f"the process drawing {spec.slide_id} was stopped, perhaps for want of memory (it needs 1 GB); "
                "run again with fewer workers: finished slides are kept"
            )
        reply = json.loads(reply)
        if "error" in reply:
            raise InputError(reply["error"]) if reply["input"] else RuntimeError(reply["error"])
        return reply["slide_id"]

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


def serve() -> None:
    """Draw the slides whose SlideSpec comes in, a line each, into the folder given as the argument."""
    import cv2

    cv2.setNumThreads(1)
    replies, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        spec = SlideSpec.from_json(json.loads(line))
        try:
            make_slide(spec, Path(sys.argv[1]))
            reply = {"slide_id": spec.slide_id}
        except InputError as error:
            reply = {"error": str(error), "input": True}
        except Exception:
            reply = {"error": f"{spec.slide_id}\n{traceback.format_exc()}", "input": False}
        print(json.dumps(reply), file=replies, flush=True)


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
