"""Options of the loop that change its cost and not its numbers, and what it says when a step cannot be done."""

import contextlib
import shutil
import subprocess
import sys

import pytest
import torch
from structured_tiles import StructuredTiles
from test_dinov2 import tiny as tiny_v2
from test_pretrain import tiny

from pathfm import devices, remedies, training
from pathfm.augment import MultiCrop
from pathfm.depth import TileDrop
from pathfm.errors import InputError
from pathfm.feed import batches
from pathfm.pretrain import Run, pretrain
from pathfm.training import Training


def gradients(config, folder) -> dict[str, torch.Tensor]:
    """Of one step on the first batch, before clipping and stepping."""
    made = Training(config, [], folder)
    made.model.clip = lambda: torch.zeros(())
    made.optimiser.step = lambda: None
    stream = StructuredTiles(config.tile_px)
    made._one(0, next(iter(batches(stream, config, 0))), MultiCrop(config, made.model.patch_px))
    return {name: p.grad.clone() for name, p in made.named.items() if p.grad is not None}


@pytest.mark.parametrize("make", [tiny, tiny_v2])
def test_blocks_computed_again_have_equal_gradients(make, tmp_path, monkeypatch):
    """Stochastic depth drops the same the second time; and a block does run twice."""
    seen = []
    forward = TileDrop.forward
    monkeypatch.setattr(TileDrop, "forward", lambda self, x: seen.append(1) or forward(self, x))
    plain = gradients(make(), tmp_path)
    once, seen[:] = len(seen), []
    again = gradients(make(checkpoint_activations=True), tmp_path)
    assert len(seen) > once
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)


def test_shards_on_one_rank_are_the_whole(tmp_path):
    """As the recipes of large models have it."""
    runs = [pretrain(tiny(shard=on, steps=3), StructuredTiles(), folder=tmp_path / str(on)) for on in (False, True)]
    assert (runs[0].folder / "log.csv").read_bytes() == (runs[1].folder / "log.csv").read_bytes()
    assert torch.equal(runs[0].backbone.blocks[1].attn.qkv.weight, runs[1].backbone.blocks[1].attn.qkv.weight)
    assert not Training(tiny(shard=True), [], tmp_path / "alone").sharded


COMPILER = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


@COMPILER
def test_compiled_blocks_have_equal_gradients(tmp_path):
    """Of a whole step, without BatchNorm, before which biases have no gradient."""
    fields = {"depth": 1, "drop_path": 0.0, "local_views": 1, "head_norm": False}
    plain, compiled = (gradients(tiny(**fields, compile=on), tmp_path) for on in (False, True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for name, want in plain.items():
        assert (compiled[name] - want).norm() <= 1e-4 * want.norm() + 1e-6, name


@COMPILER
def test_a_compiled_block_of_dinov2_has_equal_tokens_and_gradients(tmp_path):
    """With LayerScale, on CLS, registers and patches, as a run makes it ready."""
    answers = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for on in (False, True):
        block = Training(tiny_v2(compile=on, depth=1, drop_path=0.0), [], tmp_path).model.student.backbone.blocks[0]
        x = torch.randn(2, 1 + 4 + 9, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        tokens, parameters = block(x), dict(block.named_parameters())
        assert "ls1.gamma" in parameters
        found = torch.autograd.grad(tokens.square().sum(), [x, *parameters.values()])
        answers.append({"tokens": tokens, "x": found[0], **dict(zip(parameters, found[1:], strict=True))})
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == on
    for name, want in answers[0].items():
        assert (answers[1][name] - want).norm() <= 1e-5 * want.norm() + 1e-7, name


@pytest.mark.parametrize("local_px, passes", [(16, [8, 8]), (32, [16])])
def test_crops_of_one_size_go_through_together(local_px, passes, tmp_path):
    made, seen = Training(tiny(local_px=local_px), [], tmp_path), []
    made.model.student.backbone.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    batch = next(iter(batches(StructuredTiles(), made.config, 0)))
    made._one(0, batch, MultiCrop(made.config))
    assert seen == passes  # 4 tiles in 2 global and 2 local views


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"batch_size": 6, "accumulate": 4}, "batch_size=6 cannot be split into accumulate=4 parts"),
        ({"accumulate": 4, "koleo": 0.1}, "batch_size=4 in accumulate=4 parts leaves koleo no neighbour.*take 8"),
        ({"accumulate": 4}, "batch_size=4 in accumulate=4 parts leaves BatchNorm"),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0 must be above 0"),
        ({"on_collapse": "halt"}, "on_collapse='halt' is unknown"),
    ],
)
def test_parts_that_cannot_be_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        tiny(**fields)


def test_ranks_that_cannot_have_equal_parts_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("pathfm.ranks.size", lambda: 3)
    with pytest.raises(InputError, match="batch_size=4 cannot be split over 3 ranks .* take a multiple of 3"):
        Training(tiny(), [], tmp_path)


# Out of memory, on a pretended GPU where each tile of a pass takes 10 bytes beside 100


@contextlib.contextmanager
def pretended(capacity: int, monkeypatch):
    seen = []
    forward = training.METHODS["dino"].forward

    def filling(model, views, now):
        seen.append(100 + 10 * views.global_.shape[1])
        if seen[-1] > capacity:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, views, now)

    monkeypatch.setattr(training.METHODS["dino"], "forward", filling)
    monkeypatch.setattr(remedies, "capacity_bytes", lambda device: capacity)
    monkeypatch.setattr(remedies, "forget_peak", lambda device: None)
    monkeypatch.setattr(remedies, "peak_bytes", lambda device: seen[-1])
    monkeypatch.setattr(remedies, "SPARE", 1.0)
    monkeypatch.setattr(Training, "_moments", lambda self: 0)
    yield


@pytest.mark.parametrize(
    "parts, shard, said",
    [(1, False, "batch_size=9, or accumulate=2"), (1, True, "batch_size=9, or accumulate=2"), (2, False, None)],
)
def test_a_full_gpu_says_what_would_fit_and_that_does(parts, shard, said, tmp_path, monkeypatch):
    config = tiny(batch_size=16, steps=1, watch_every=0, accumulate=parts, shard=shard)
    with pretended(195, monkeypatch):
        if said is None:
            assert len(pretrain(config, StructuredTiles(), folder=tmp_path).log) == 1
            return
        with pytest.raises(InputError, match=rf"out of memory with 16 tiles at once.*9 would fit: take {said}") as told:
            pretrain(config, StructuredTiles(), folder=tmp_path)
        assert "checkpoint_activations=True" in str(told.value)


def test_a_gpu_too_small_for_a_few_tiles_says_so(tmp_path, monkeypatch):
    config = tiny(batch_size=16, steps=1, watch_every=0)
    with pretended(105, monkeypatch), pytest.raises(InputError, match="out of memory .* Take accumulate=2"):
        pretrain(config, StructuredTiles(), folder=tmp_path)


def test_a_full_cpu_gives_the_same_advice_without_a_number_and_that_fits(tmp_path, monkeypatch):
    """By the allocator's own error, from a forward pass that asks for more than there is of 16 tiles, not of 8."""
    forward = training.METHODS["dino"].forward

    def filling(model, views, now):
        torch.empty(2**60 if views.global_.shape[1] > 8 else 1, dtype=torch.uint8)
        return forward(model, views, now)

    monkeypatch.setattr(training.METHODS["dino"], "forward", filling)
    config = tiny(batch_size=16, steps=1, watch_every=0)
    with pytest.raises(InputError, match="16 tiles at once on this machine .* Take accumulate=2 or a smaller") as told:
        pretrain(config, StructuredTiles(), folder=tmp_path)
    assert "would fit" not in str(told.value)
    assert len(pretrain(config.replace(accumulate=2), StructuredTiles(), folder=tmp_path).log) == 1


def test_other_errors_of_a_step_are_not_taken_for_full_memory(tmp_path, monkeypatch):
    def wrong(model, views, now):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(training.METHODS["dino"], "forward", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        pretrain(tiny(steps=1, watch_every=0), StructuredTiles(), folder=tmp_path)
    assert remedies.is_full(MemoryError()) and remedies.is_full(RuntimeError("MPS backend out of memory (MPS ..."))


def test_advice_for_full_memory_can_be_followed():
    """Parts that divide the batch; none of less than a tile."""
    assert "Take accumulate=3 or" in str(remedies.full_memory(tiny(batch_size=9), None, 1))
    assert "accumulate" not in str(remedies.full_memory(tiny(batch_size=1, head_norm=False), None, 1)).split(").")[1]


def test_tiles_that_fit_are_what_is_left_over_what_a_tile_takes():
    assert remedies.tiles_that_fit(lambda tiles: 1000 + 7 * tiles, 1700) == int((0.9 * 1700 - 1000) / 7)
    config = tiny(batch_size=24)
    assert [remedies.accumulate_for(config, fits, 2) for fits in (12, 11, 5, 1)] == [1, 2, 3, 12]
    assert "Not one tile would fit" in str(remedies.full_memory(config, 0, 1))


def test_kde_spreads_the_features_of_a_run(tmp_path):
    """The same short run with and without: the mean likeness of two tiles' features ends lower, and the loss falls."""
    fields = {"layer_scale": 1.0, "jitter": 0.0, "drop_path": 0.0, "koleo": 0.0, "batch_size": 16, "steps": 40}
    fields |= {"global_scale": (0.5, 1.0), "local_scale": (0.2, 0.5), "layer_decay": 1.0, "base_lr": 0.016}
    runs = {}
    for kde in (0.0, 0.5):
        config = tiny_v2(**fields, kde=kde, watch_every=40)
        runs[kde] = pretrain(config, StructuredTiles(48), StructuredTiles(48, seed=1), tmp_path / str(kde))
    features = {kde: of_tiles(run) for kde, run in runs.items()}
    assert features[0.5] < features[0.0] - 0.1
    log = runs[0.5].log
    assert log["kde"].tail(5).mean() < log["kde"].head(5).mean() - 0.3
    assert log["dino"].tail(5).mean() < log["dino"].head(5).mean() - 0.1
    assert runs[0.5].watches["rankme"].iloc[-1] > 2


def of_tiles(run: Run) -> float:
    """Mean cosine of the teacher's features of two tiles."""
    images = torch.stack([torch.tensor(StructuredTiles(48, seed=3)[i].image) for i in range(64)])
    with torch.no_grad():
        x = torch.nn.functional.normalize(run.backbone(images[:, 3:45, 3:45].permute(0, 3, 1, 2) / 127.5 - 1), dim=-1)
    return float((x @ x.mT).fill_diagonal_(0).sum() / 64 / 63)


@pytest.mark.skipif(not devices._libc("mallopt"), reason="no glibc")
def test_on_a_cpu_freed_memory_is_used_again_and_given_back_afterwards():
    """Page faults of tensors of 64 MB, in a process of its own."""
    code = """
import resource, torch
from pathfm.devices import kept_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
with kept_memory(torch.device("cpu")):
    with kept_memory(torch.device("cpu")):  # as where an extraction is part of a run: its end gives nothing back
        faults()
    for _ in range(16):  # at first glibc may hold back the gap before an aligned tensor: the rest is then too small
        kept = faults()
with kept_memory(torch.device("meta")):
    print(kept, faults(), faults())
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, *fresh = map(int, told.stdout.split())
    assert kept < 100 and min(fresh) > 10_000
