"""DINO and DINOv2 taken apart: what is hidden, what each loss does, what centring does, how collapse looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from pathfm.augment import Views
from pathfm.dinov2 import DinoV2
from pathfm.figures import image
from pathfm.losses import entropy, full, kde, koleo, sharpened, sinkhorn
from pathfm.representation import token_colours
from pathfm.story import hidden, pictures
from pathfm.vit import attention_maps, patch_tokens
from pathfm.watches import collapsed

TEACHERS = ("softmax", "sharpened", "centred too", "Sinkhorn")


def views_figure(by_method: dict[str, Views]) -> Figure:
    """A row a method: what the student gets of one tile, patches hidden by masks in grey.

    The tile is the first of which most views have hidden patches, in any method.
    """
    tile = sum(views.masks.any(-1).sum(0) for views in by_method.values()).argmax().item()
    columns = max(len(views.global_) + len(views.local) for views in by_method.values())
    size = 6.5, (6.5 / columns + 0.3) * len(by_method)  # two lines of title
    fig, axes = plt.subplots(len(by_method), columns, figsize=size, squeeze=False)
    for row, (name, views) in zip(axes, by_method.items(), strict=True):
        whole = list(pictures(views.global_[:, tile]))
        if views.masks.any():
            masks = views.masks[:, tile].numpy()
            whole = [hidden(view, mask) for view, mask in zip(whole, masks, strict=True)]
        shown = [*whole, *pictures(views.local[:, tile])]
        mpp = views.effective_mpp[:, tile].tolist()
        for k, ax in enumerate(row):
            ax.set_axis_off()
            if k < len(shown):
                image(ax, shown[k], mpp[k], f"{name}, {'global' if k < len(whole) else 'local'}\n{mpp[k]:.2f} µm/px")
    return fig


@torch.no_grad()
def ibot_map(model: DinoV2, views: Views, teacher_temperature: float) -> Tensor:
    """What it costs, in nats, to tell each hidden patch: (G, B, h, w), nan at patches that were not hidden.

    The mean over a view's hidden patches, then over views (0 where a view has none), is the iBOT loss of the step.
    """
    training = model.training
    model.eval()
    _, _, taught = model.teacher(views.global_, views.local[:0], views.masks, hide=False)
    _, _, said = model.student(views.global_, views.local, views.masks, hide=True)
    model.train(training)
    answers = model._centred(taught, model.patch_centre, teacher_temperature)
    costs = -(answers * (full(said) / model.config.student_temperature).log_softmax(-1)).sum(-1)
    found = torch.full(views.masks.shape, torch.nan)
    found[views.masks] = costs.cpu()
    side = views.global_.shape[-1] // model.patch_px
    return found.unflatten(-1, (side, side))


def ibot_figure(views: Views, costs: Tensor, guess: float, tiles: int = 3) -> Figure:
    """Global views, what is hidden of them, and the cost of each hidden patch; `guess` is that of no opinion."""
    with_masks = [k for k in range(views.masks.shape[1]) if views.masks[0, k].any()][:tiles]
    fig, axes = plt.subplots(len(with_masks), 3, figsize=(4.2, 1.4 * len(with_masks)), squeeze=False)
    for row, k in zip(axes, with_masks, strict=True):
        view = pictures(views.global_[0, k])
        image(row[0], view)
        image(row[1], hidden(view, views.masks[0, k].numpy()))
        drawn = row[2].imshow(costs[0, k].numpy(), vmin=0, vmax=guess, cmap="viridis")
        row[2].set_axis_off()
    for ax, title in zip(axes[0], ("view", "hidden", "cost, nats"), strict=True):
        ax.set_title(title, fontsize=8)
    fig.colorbar(drawn, ax=axes[:, 2].tolist(), shrink=0.8)
    return fig


def answers(logits: Tensor, temperature: float = 0.04, iterations: int = 3) -> dict[str, Tensor]:
    """The teacher's probabilities (B, K) of its logits (B, K), by what is done to them (TEACHERS)."""
    nothing = torch.zeros(logits.shape[-1])
    return dict(
        zip(
            TEACHERS,
            (
                sharpened(logits, nothing, 1.0),
                sharpened(logits, nothing, temperature),
                sharpened(logits, logits.mean(0), temperature),
                sinkhorn(logits, temperature, iterations),
            ),
            strict=True,
        )
    )


def lopsided(tiles: int = 64, prototypes: int = 8, seed: int = 0) -> Tensor:
    """Logits (tiles, prototypes) of a teacher that prefers its first prototype, whatever the tile."""
    logits = 0.1 * torch.randn(tiles, prototypes, generator=torch.Generator().manual_seed(seed))
    logits[:, 0] += 0.3
    return logits


def answers_figure(by_name: dict[str, Tensor]) -> Figure:
    """Bars: above the answer to one tile, below the mean answer over the batch."""
    fig, axes = plt.subplots(2, len(by_name), figsize=(6.5, 2.8), sharex=True, sharey=True, squeeze=False)
    for (above, below), (name, p) in zip(axes.T, by_name.items(), strict=True):
        above.bar(range(p.shape[1]), p[0].numpy())
        below.bar(range(p.shape[1]), p.mean(0).numpy())
        above.set_title(name, fontsize=8)
        below.set(xlabel="prototype", xticks=range(p.shape[1]))
    axes[0, 0].set_ylabel("one tile")
    axes[1, 0].set_ylabel("mean of batch")
    return fig


def answers_table(by_name: dict[str, Tensor]) -> pd.DataFrame:
    """Entropy of one tile's answer and of the mean answer, as shares of ln K: 0 and 0 or 1 and 1 is collapse."""
    rows = {
        name: {"one tile": float(entropy(p).mean()), "mean of batch": float(entropy(p.mean(0)))}
        for name, p in by_name.items()
    }
    return pd.DataFrame(rows).T / np.log(next(iter(by_name.values())).shape[1])


SPREADERS: dict[str, Callable[[Tensor], Tensor]] = {"KoLeo": koleo, "KDE": kde}


def on_circle(
    spreader: Callable[[Tensor], Tensor], points: int = 12, steps: int = 300, rate: float = 0.01
) -> np.ndarray:
    """(steps + 1, points) angles, radians, of a crowd on a circle that goes down the gradient of `spreader`."""
    angle = torch.linspace(-0.2, 0.25, points, dtype=torch.float64) ** 3 * 20 + 0.1 * torch.arange(points)
    angle = angle.clone().requires_grad_(True)
    seen = [angle.detach().numpy().copy()]
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(spreader(torch.stack([angle.cos(), angle.sin()], 1)), angle)
        with torch.no_grad():
            angle -= rate * points * gradient
        seen.append(angle.detach().numpy().copy())
    return np.stack(seen)


def gaps(angles: np.ndarray) -> np.ndarray:
    """(points,) gaps between neighbours on the circle, in shares of the even gap, smallest first."""
    around = np.sort(np.mod(angles, 2 * np.pi))
    apart = np.diff(around, append=around[0] + 2 * np.pi)
    return np.sort(apart) * len(angles) / (2 * np.pi)


def circle_figure(paths: dict[str, np.ndarray]) -> Figure:
    """Points on a circle: at the start, and where each of `paths` (steps, points) ends."""
    shown = {"start": next(iter(paths.values()))[0], **{name: path[-1] for name, path in paths.items()}}
    fig, axes = plt.subplots(1, len(shown), figsize=(2.1 * len(shown), 2.2))
    for ax, (name, angle) in zip(axes, shown.items(), strict=True):
        ax.add_patch(plt.Circle((0, 0), 1, fill=False, color="0.8"))
        ax.plot(np.cos(angle), np.sin(angle), "o", ms=5)
        ax.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal", title=name)
        ax.set_axis_off()
    return fig


def maps_figure(networks: dict[str, nn.Module], images: Tensor, px: int = 0) -> Figure:
    """A row a tile: the image, then of each network CLS attention of its last block and the PCA of patch tokens.

    images  (B, 3, H, W) normalised; components are shared by the tiles of one network, not between networks
    """
    shown = pictures(images)
    columns = 1 + 2 * len(networks)
    fig, axes = plt.subplots(len(images), columns, figsize=(1.3 * columns, 1.35 * len(images)), squeeze=False)
    for k, picture in enumerate(shown):
        image(axes[k, 0], picture, title="tile" if not k else None)
    for n, (name, network) in enumerate(networks.items()):
        attention = attention_maps(network, images).mean(1).cpu().numpy()
        colours, _ = token_colours(patch_tokens(network, images).cpu().numpy())
        for k in range(len(images)):
            image(axes[k, 1 + 2 * n], attention[k], title=f"attention,\n{name}" if not k else None)
            image(axes[k, 2 + 2 * n], colours[k], title=f"PCA,\n{name}" if not k else None)
    return fig


def training_figure(run) -> Figure:
    """A run's loss and its teacher's entropies beside what a guess costs, and its looks at validation tiles."""
    log, looks, prototypes = run.log, run.watches, run.config.prototypes
    guess = np.log(prototypes)
    fig, axes = plt.subplots(1, 3, figsize=(6.5, 2.2))
    axes[0].plot(log["step"], log["loss"], label="loss")
    axes[0].axhline(guess, color="0.5", lw=1, ls="--", label=f"a guess, ln {prototypes}")
    axes[0].set(xlabel="step", ylabel="nats", title="Loss", ylim=(0, 1.15 * max(guess, log["loss"].max())))
    axes[1].plot(log["step"], log["teacher_entropy"], label="of one tile")
    axes[1].plot(log["step"], log["prototype_entropy"], label="of a batch's mean")
    axes[1].set(xlabel="step", ylabel="nats", title="Teacher's entropy", ylim=(0, 1.15 * guess))
    for name, label in (("knn", "kNN accuracy"), ("odcorr", "ODCorr")):
        if name in looks:
            axes[2].plot(looks["step"], looks[name], marker="o", ms=3, label=label)
    axes[2].set(xlabel="step", ylabel="0 to 1", title="Validation tiles", ylim=(0, 1))
    for ax, place in zip(axes, ("lower left", "lower left", "upper left"), strict=True):
        if ax.lines:
            ax.legend(loc=place)
    return fig


def compared(runs: dict[str, object]) -> pd.DataFrame:
    """A row a run: tiles seen, parts of the loss at the last step, and the watches at the first and last look."""
    rows = {}
    for name, run in runs.items():
        log, looks, config = run.log, run.watches, run.config
        last = log.iloc[-1]
        rows[name] = {
            "tiles": config.steps * config.batch_size,
            **{part: last.get(part, np.nan) for part in ("loss", "dino", "ibot", "koleo")},
            **{f"{what}, {when}": looks[what].iloc[at] for what in ("rankme", "spread", "knn") if what in looks
               for when, at in (("first", 0), ("last", -1))},
        }  # fmt: skip
    return pd.DataFrame(rows).T


def collapse_table(runs: dict[str, object]) -> pd.DataFrame:
    """A row a run: the last look at its teacher as shares of ln K and of the first look, and the watch's verdict.

    What an answer tells of its tile is the entropy of the mean answer less that of one.
    """
    rows = {}
    for name, run in runs.items():
        looks, most = run.watches, np.log(run.config.prototypes)
        first, last = looks.iloc[0], looks.iloc[-1]
        said = collapsed(first, last, run.config)
        rows[name] = {
            "entropy, one tile": last["teacher_entropy"] / most,
            "entropy, mean": last["prototype_entropy"] / most,
            "told": (last["prototype_entropy"] - last["teacher_entropy"]) / most,
            "spread / first": last["spread"] / first["spread"],
            "RankMe / first": last["rankme"] / first["rankme"],
            "verdict": said.split(": ")[1].split(" (")[0] if said else "healthy",
        }
    return pd.DataFrame(rows).T


def collapse_figure(
    runs: dict[str, object], what: Sequence[str] = ("teacher_entropy", "prototype_entropy", "spread")
) -> Figure:
    """The watches of several runs, a panel each."""
    fig, axes = plt.subplots(1, len(what), figsize=(6.5, 2.5))
    for ax, name in zip(axes, what, strict=True):
        for label, run in runs.items():
            ax.plot(run.watches["step"], run.watches[name], marker="o", ms=3, label=label)
        unit = "" if name == "spread" else ", nats"
        ax.set(title=name.replace("_", " ") + unit, xlabel="step", ylim=(0, None))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs))
    return fig
