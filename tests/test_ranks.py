"""Two processes with half a batch each are one process with all of it: losses, gradients, centres, Sinkhorn-Knopp."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_dinov2 import made, views

from pathfm import losses, ranks
from pathfm.augment import Views
from pathfm.schedules import schedule

B, D, K = 3, 5, 7  # rows a rank


def everything(x: torch.Tensor, logits: torch.Tensor, uneven: torch.Tensor) -> dict[str, torch.Tensor]:
    """What depends on the batch, of rows (B, D), their logits (B, K), and a number of rows of their own (M, K)."""
    x = x.clone().requires_grad_()
    weight = torch.linspace(-1, 1, D * D, dtype=x.dtype).view(D, D).requires_grad_()  # a network that ranks share
    found = {}
    for name, loss in (("koleo", losses.koleo), ("kde", losses.kde)):
        value = loss(x @ weight)
        gradients = torch.autograd.grad(value, (x, weight))
        found |= {name: value.detach(), f"{name} of rows": gradients[0], f"{name} of weights": gradients[1]}
    for name, rows in (("all", logits), ("uneven", uneven)):
        found[f"centre {name}"] = losses.moved_centre(torch.ones(K, dtype=x.dtype), [losses.Heard.of(rows)], 0.9)
        found[f"sinkhorn {name}"] = losses.sinkhorn(rows, 0.1)
    return found


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2 * B, n, generator=drawn, dtype=torch.float64) for n in (D, K, K))


def halves(of_rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A rank's half; of the third, the first rank has one row and the second the rest."""
    x, logits, uneven = batch()
    mine = slice(of_rank * B, (of_rank + 1) * B)
    return x[mine], logits[mine], uneven[:1] if of_rank == 0 else uneven[1:]


def of_tiles(batch: Views, tiles: slice) -> Views:
    return Views(*(part[:, tiles] for part in batch))


def a_step(centring: str, tiles: slice) -> dict[str, torch.Tensor]:
    """Loss, gradients and centres of DINOv2 on some of four tiles, whose views and masks all ranks draw alike."""
    model = made(centring=centring, drop_path=0.0, koleo=0.1, kde=0.2)
    with ranks.apart():
        drawn = views(model)
    outcome = model(of_tiles(drawn, tiles), schedule(model.config, 5))
    outcome.loss.backward()
    model.follow([outcome], 0.9)
    named = model.student.named_parameters()
    gradients = {f"{centring} {name}": p.grad for name, p in named if p.grad is not None}
    centres = {f"{centring} moved {name}": centre for name, centre in model.named_buffers(recurse=False)}
    return {f"{centring} loss": outcome.loss.detach(), **gradients, **centres}


SCRIPT = """
import sys, torch, torch.distributed as dist
from test_ranks import a_step, everything, halves
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/meet", rank=rank, world_size=2)
tiles = slice(2 * rank, 2 * rank + 2)
found = everything(*halves(rank)) | a_step("centre", tiles) | a_step("sinkhorn", tiles)
torch.save(found, f"{sys.argv[2]}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    here = Path(__file__).parent
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), str(folder)], cwd=here) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_losses_and_gradients_of_two_processes_are_those_of_one(two):
    one = everything(*batch())
    for name in ("koleo", "kde"):
        mean = torch.stack([found[name] for found in two]).mean()
        assert torch.allclose(mean, one[name], rtol=1e-6), name
        averaged = torch.stack([found[f"{name} of weights"] for found in two]).mean(0)  # as data-parallel training does
        assert torch.allclose(averaged, one[f"{name} of weights"], rtol=1e-6, atol=1e-12), name
        rows = torch.cat([found[f"{name} of rows"] for found in two]) / 2
        assert torch.allclose(rows, one[f"{name} of rows"], rtol=1e-6, atol=1e-12), name


def test_a_rank_alone_would_find_something_else(two):
    """Or the test above could not fail."""
    alone = [everything(*halves(rank)) for rank in range(2)]
    for name in ("koleo", "kde", "centre all", "sinkhorn all"):
        assert not torch.allclose(alone[0][name], two[0][name], rtol=1e-3), name


@pytest.mark.parametrize("rows", ["all", "uneven"])
def test_centre_and_sinkhorn_are_of_the_global_batch(two, rows):
    one = everything(*batch())
    for found in two:
        assert torch.allclose(found[f"centre {rows}"], one[f"centre {rows}"], rtol=1e-6)
    assert torch.allclose(torch.cat([found[f"sinkhorn {rows}"] for found in two]), one[f"sinkhorn {rows}"], rtol=1e-6)


@pytest.mark.parametrize("centring", ["centre", "sinkhorn"])
def test_a_step_of_dinov2_on_two_processes_is_that_of_one(two, centring):
    one = a_step(centring, slice(0, 4))
    for name, value in one.items():
        found = [rank[name] for rank in two]
        if "moved" in name:
            assert torch.allclose(found[0], found[1], rtol=1e-6, atol=1e-12), name
        mean = torch.stack(found).mean(0)
        assert (mean - value).norm() <= 1e-6 * value.norm(), name
    assert sum("moved" in name and value.norm() > 0 for name, value in one.items()) == 2 * (centring == "centre")


def test_one_process_holds_all_there_is():
    x = torch.randn(3, 4)
    assert ranks.gathered(x) is x and ranks.summed(x) is x and ranks.largest(x) is x
    assert ranks.own_rows(x).tolist() == [0, 1, 2] and ranks.size() == 1
    assert torch.equal(ranks.mean_row(x), x.mean(0)) and ranks.share(x, 3) is x
