"""What `python -m pathfm <verb>` can do: one dataclass is one command line, and calling it does the work."""

from __future__ import annotations

from pathfm.verbs import evaluating, probing, slides, study

VERBS = {
    "run": study.Run,
    "notebook": study.Notebook,
    "store": study.Store,
    "sweep": study.Sweep,
    "cohort": slides.MakeCohort,
    "fetch": slides.Fetch,
    "index": slides.Index,
    "montage": slides.Montage,
    "tiles": slides.Tiles,
    "embed": probing.Embed,
    "probe": probing.Probe,
    "eva-config": probing.EvaConfig,
    "tasks": probing.Tasks,
    "evaluate": evaluating.Evaluate,
    "leaderboard": evaluating.Leaderboard,
    "instrument": study.Instrument,
    "methods": study.Methods,
    "domains": study.Domains,
    "slide-labels": study.SlideLabels,
    "export": study.Export,
}
