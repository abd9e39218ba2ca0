"""DINOv2: student, teacher, masks, parameter groups and clipping against references; a tiny run, resumed, exported."""

import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from structured_tiles import StructuredTiles

from pathfm import losses
from pathfm.augment import MultiCrop, Views
from pathfm.config import DinoV2Config, make_config
from pathfm.dinov2 import DinoV2
from pathfm.export import export, load
from pathfm.pretrain import Run, pretrain
from pathfm.schedules import schedule, set_rates
from pathfm.vit import make_backbone, tokens_seen

TINY = {
    "method": "dinov2", "model": "vit_small_patch14_reg4_dinov2", "mpp": (1.0, 2.0), "tile_px": 48, "global_px": 42,
    "local_px": 28, "local_views": 2, "init": "random", "depth": 2, "width": 32, "heads": 2, "layer_scale": 0.1,
    "drop_path": 0.2, "prototypes": 32, "head_hidden": 32, "head_bottleneck": 16, "separate_head": True,
    "patch_prototypes": 24, "patch_hidden": 32, "patch_bottleneck": 16, "centring": "sinkhorn", "momentum": 0.9,
    "mask_ratio": (0.3, 0.6), "steps": 8, "batch_size": 4, "base_lr": 0.064, "precision": "float32", "device": "cpu",
    "threads": 1, "checkpoint_every": 3, "watch_every": 4, "watch_tiles": 40,
}  # fmt: skip


def tiny(**fields) -> DinoV2Config:
    return make_config(**{**TINY, **fields})


def made(**fields) -> DinoV2:
    torch.manual_seed(0)
    model = DinoV2(tiny(**fields)).double()
    with torch.no_grad():
        model.student.mask_token.normal_()
    return model


def views(model: DinoV2, seed: int = 0, **fields) -> Views:
    images = torch.randint(0, 256, (4, 48, 48, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    drawn = MultiCrop(model.config, model.patch_px)(images, torch.ones(4), torch.Generator().manual_seed(seed))
    return drawn._replace(global_=drawn.global_.double(), local=drawn.local.double(), **fields)


# One step, in float64


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("centring", ["sinkhorn", "centre"])
def test_the_loss_is_that_of_the_paper_view_by_view(separate, centring, equal):
    """Every view goes through the networks alone; the losses have slow references of their own elsewhere.

    equal   local views as large as global ones: all of the student's go through at once
    """
    size = {"local_px": TINY["global_px"]} if equal else {}
    model = made(separate_head=separate, centring=centring, drop_path=0.0, koleo=0.1, kde=0.2, ibot=0.7, **size)
    torch.manual_seed(1)
    model.centre.normal_(std=0.1), model.patch_centre.normal_(std=0.1)
    batch, now = views(model), schedule(model.config, 5)
    student, teacher, masks = model.student, model.teacher, batch.masks
    own = lambda net: net.patch_head if separate else net.head  # noqa: E731

    said = [teacher.backbone.forward_features(view) for view in batch.global_]
    cls = torch.stack([teacher.head(tokens[:, 0]) for tokens in said])
    patches = torch.cat([own(teacher)(tokens[i, 5:][m]) for tokens, ms in zip(said, masks, strict=True)
                         for i, m in enumerate(ms)])  # fmt: skip
    if centring == "sinkhorn":
        p, q = (losses.sinkhorn(x, now.teacher_temperature, 3) for x in (cls, patches))
    else:
        p = torch.softmax((cls - model.centre) / now.teacher_temperature, -1)
        q = torch.softmax((patches - model.patch_centre) / now.teacher_temperature, -1)

    features, answers, hidden = [], [], []
    for view, ms in zip(batch.global_, masks, strict=True):
        tokens = tokens_seen(student.backbone, view, ms, student.mask_token)
        features.append(tokens[:, 0])
        hidden += [own(student)(tokens[i, 5:][m]) for i, m in enumerate(ms)]
    features += [student.backbone(view) for view in batch.local]
    answers = torch.stack([student.head(x) for x in features])
    want = losses.dino_loss(answers, p) + 0.7 * losses.ibot_loss(torch.cat(hidden), q, masks.flatten(0, 1))
    want = want + sum(0.1 * losses.koleo(x) + 0.2 * losses.kde(x) for x in features[:2])

    passes = []
    held = student.backbone.norm.register_forward_hook(lambda *_: passes.append(1))
    outcome = model(batch, now)
    held.remove()
    assert len(passes) == (1 if equal else 2)
    assert float(outcome.loss.detach()) == pytest.approx(float(want.detach()), rel=1e-6)
    parameters = [p for p in student.parameters() if p.requires_grad]
    got, wanted = (torch.autograd.grad(loss, parameters) for loss in (outcome.loss, want))
    assert all((a - b).norm() <= 1e-6 * b.norm() for a, b in zip(got, wanted, strict=True))
    assert all(g.abs().sum() > 0 for g in got)  # nothing is left out, the mask token neither
    assert set(outcome.heard) == (set() if centring == "sinkhorn" else {"centre", "patch_centre"})


def test_a_hidden_patch_cannot_be_seen_and_keeps_its_place():
    backbone, _ = make_backbone("vit_small_patch14_reg4_dinov2", "random", 42, depth=2, width=32, heads=2)
    x, token = torch.randn(1, 3, 42, 42), torch.randn(1, 32)
    hidden = torch.zeros(1, 9, dtype=torch.bool)
    hidden[0, 4] = True
    other = x.clone()
    other[..., 14:28, 14:28] = 0
    assert torch.equal(tokens_seen(backbone, x, hidden, token), tokens_seen(backbone, other, hidden, token))
    assert not torch.equal(tokens_seen(backbone, x, ~hidden, token), tokens_seen(backbone, other, ~hidden, token))
    nothing = torch.zeros_like(hidden)
    assert torch.equal(tokens_seen(backbone, x, nothing, token), backbone.forward_features(x))
    elsewhere = hidden.roll(1, 1)
    seen = [tokens_seen(backbone, torch.zeros_like(x), mask, token) for mask in (hidden, elsewhere)]
    assert not torch.allclose(seen[0], seen[1])  # position embeddings differ


def test_blocks_that_are_computed_again_give_the_same_gradients():
    model = made()
    batch, gradients = views(model), []
    for again in (False, True):
        model.student.backbone.set_grad_checkpointing(again)
        torch.manual_seed(3)  # of stochastic depth
        loss = model(batch, schedule(model.config, 5)).loss
        gradients.append(torch.autograd.grad(loss, model.student.backbone.blocks[0].attn.qkv.weight)[0])
    assert torch.allclose(*gradients, rtol=1e-9)


def test_the_teacher_sees_everything_and_nothing_is_dropped_from_it():
    model = made(drop_path=0.5)
    rates = {who: {getattr(m, "drop_prob", None) for m in part.modules()} for who, part in model.named_children()}
    assert rates["student"] == {None, 0.5} and rates["teacher"] == {None, 0.0}
    assert {b.drop_path1.drop_prob for b in model.student.backbone.blocks} == {0.5}  # uniform
    one = views(model)
    hidden = model.student.backbone.eval() and one._replace(masks=torch.ones_like(one.masks))
    tokens = model.teacher(hidden.global_, hidden.local[:0], hidden.masks, hide=False)
    token = model.teacher.mask_token.data.clone()
    model.teacher.mask_token.data.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(
        tokens, model.teacher(hidden.global_, hidden.local[:0], hidden.masks, hide=False), strict=True))  # fmt: skip
    assert not torch.equal(token, model.teacher.mask_token.data)


def test_registers_and_layer_scale_are_timms():
    model = made()
    assert model.student.backbone.num_prefix_tokens == 5
    assert torch.equal(model.student.backbone.blocks[1].ls2.gamma, torch.full((32,), 0.1).double())
    plain, _ = make_backbone("vit_small_patch16_224", "random", 32, 0.0, 2, 32, 2, registers=3, layer_scale=1e-5)
    assert plain.num_reg_tokens == 3 and plain.blocks[0].ls1.gamma[0] == 1e-5


# Parameter groups, schedules, clipping


def slow_group(name: str, blocks: int, decay: float, patch: float) -> tuple[float, float]:
    """Rate and weight decay by the rules in DINOv2's param_groups.py, from a parameter's name alone."""
    layer = blocks + 1
    if name.startswith("backbone.") or name == "mask_token":
        if any(part in name for part in ("pos_embed", "patch_embed", "mask_token", "cls_token", "reg_token")):
            layer = 0
        elif "blocks." in name:
            layer = int(name.split("blocks.")[1].split(".")[0]) + 1
    rate = decay ** (blocks + 1 - layer) * (patch if "patch_embed" in name else 1)
    return rate, 0.0 if name.endswith(".bias") or "norm" in name or "gamma" in name else 1.0


def test_parameter_groups_are_the_authors():
    model = made(layer_decay=0.5, patch_embed_lr=0.2)
    found = {id(p): group for group in model.groups() for p in group["params"]}
    named = {n: p for n, p in model.student.named_parameters() if p.requires_grad}
    assert len(found) == len(named) == sum(len(group["params"]) for group in model.groups())
    for name, p in named.items():
        rate, decay = slow_group(name, 2, 0.5, 0.2)
        assert found[id(p)]["rate"] == pytest.approx(rate) and found[id(p)]["decay"] == decay, name
        assert found[id(p)]["prototypes"] == ("last_layer" in name), name
    assert {g["rate"] for g in model.groups()} == {1.0, 0.5, 0.25, 0.125, 0.125 * 0.2}


def test_rates_follow_the_schedules_and_prototypes_stand_still_first():
    config = tiny(steps=100, warmup=0.1, freeze_last_layer=0.03, layer_decay=0.5, weight_decay_end=0.2, batch_size=256)
    groups = DinoV2(config).groups()
    for step in (0, 2, 3, 50, 99):
        set_rates(groups, schedule(config, step))
        peak = 0.064 / 2  # at 256 of 1024 tiles
        lr = peak * step / 9 if step < 10 else 1e-6 + (peak - 1e-6) * 0.5 * (1 + math.cos(math.pi * (step - 10) / 90))
        decay = 0.2 + (0.04 - 0.2) * 0.5 * (1 + math.cos(math.pi * step / 100))
        for group in groups:
            assert group["lr"] == pytest.approx(0 if group["prototypes"] and step < 3 else lr * group["rate"], rel=1e-9)
            assert group["weight_decay"] == pytest.approx(decay * group["decay"], rel=1e-9)


def test_gradients_are_clipped_by_backbone_and_head():
    model = made(clip=0.5)
    outcome = model(views(model), schedule(model.config, 5))
    (1e3 * outcome.loss).backward()
    parts = {"backbone": ("backbone", "mask_token"), "head": ("head",), "patch_head": ("patch_head",)}
    named = [(name, p) for name, p in model.student.named_parameters() if p.grad is not None]

    def norms():
        return [torch.cat([p.grad.flatten() for n, p in named if n.startswith(w)]).norm() for w in parts.values()]

    before = norms()
    assert float(model.clip()) == pytest.approx(float(torch.stack(before).norm()))
    assert min(before) > 0.5 and torch.stack(norms()).tolist() == pytest.approx([0.5] * 3, rel=1e-4)


def test_teacher_and_centres_are_moving_averages():
    model = made(centring="centre")
    before = {name: value.clone() for name, value in model.teacher.state_dict().items()}
    outcome = model(views(model), schedule(model.config, 5))
    with torch.no_grad():
        for p in model.student.parameters():
            p.add_(0.1)
    model.follow([outcome], 0.75)
    for name, value in model.teacher.state_dict().items():
        want = 0.75 * before[name] + 0.25 * model.student.state_dict()[name]
        assert torch.allclose(value, want, atol=1e-12) or not model.student.get_parameter(name).requires_grad
    assert outcome.heard["centre"].rows == 8 and outcome.heard["patch_centre"].rows > 0
    for name, (total, rows) in outcome.heard.items():
        assert torch.allclose(getattr(model, name), 0.1 * total / rows, rtol=1e-6)


# A run


def numbers(folder: Path) -> tuple[bytes, ...]:
    return tuple((folder / name).read_bytes() for name in ("log.csv", "watches.csv", "teacher/model.safetensors"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    return pretrain(tiny(), StructuredTiles(48), StructuredTiles(48, seed=1), tmp_path_factory.mktemp("whole"))


def test_a_run_logs_every_part_of_its_loss(whole):
    parts = {"dino", "ibot", "koleo", "kde", "teacher_entropy", "prototype_entropy", "patch_entropy"}
    assert parts <= set(whole.log) and whole.log.notna().all().all()
    assert type(whole.config) is DinoV2Config
    total = whole.log["dino"] + whole.log["ibot"] + 0.1 * whole.log["koleo"]
    assert (total - whole.log["loss"]).abs().max() < 1e-4


def test_bfloat16_follows_float32(whole, tmp_path):
    half = pretrain(tiny(precision="bfloat16", watch_every=0, steps=8), StructuredTiles(48), folder=tmp_path)
    assert (half.log["loss"] - whole.log["loss"]).abs().max() < 0.3
    assert load(half.teacher)[0].cls_token.dtype == torch.float32


@pytest.mark.parametrize("step", [2, 5])
def test_a_stopped_run_goes_on_to_the_same_bits(step, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny(), StructuredTiles(48, breaks_at=4 * step + 1), StructuredTiles(48, seed=1), tmp_path)
    pretrain(tiny(), StructuredTiles(48), StructuredTiles(48, seed=1), tmp_path)
    assert numbers(tmp_path) == numbers(whole.folder)


def test_the_export_is_a_backbone_that_timm_loads(whole):
    theirs = timm.create_model(f"local-dir:{whole.teacher}", pretrained=True).eval()
    x = torch.rand(2, 3, 42, 42)
    with torch.no_grad():
        assert torch.equal(theirs(x), whole.backbone.eval()(x))
    assert theirs.num_reg_tokens == 4 and theirs.blocks[0].ls1.gamma.abs().sum() > 0


CENTRED = {"centring": "centre", "centre_momentum": 0.8, "separate_head": False, "norm_last_layer": True, "steps": 100,
           "base_lr": 0.008, "teacher_temperature": 0.04, "teacher_temperature_start": 0.04}  # fmt: skip


@pytest.mark.parametrize("fields", [{}, CENTRED])
def test_structured_tiles_bring_the_loss_below_that_of_no_opinion(fields, tmp_path):
    """On views from which the kind of stripes can be told, and with blocks that do something from the start."""
    easy = {"global_scale": (0.5, 1.0), "local_scale": (0.2, 0.5), "jitter": 0.0, "drop_path": 0.0, "layer_scale": 1.0}
    quick = {"batch_size": 16, "base_lr": 0.016, "momentum": 0.95, "layer_decay": 1.0, "patch_embed_lr": 1.0}
    sharp = {"teacher_temperature": 0.02, "teacher_temperature_start": 0.02, "steps": 80, "watch_every": 0}
    config = tiny(**{**easy, **quick, **sharp, **fields})
    log = pretrain(config, StructuredTiles(48), folder=tmp_path).log.tail(10).mean()
    assert log["dino"] < math.log(config.prototypes) - 0.3
    patches = config.patch_prototypes if config.separate_head else config.prototypes
    assert log["ibot"] < 0.5 * math.log(patches) - 0.05  # half the views have hidden patches
    assert log["prototype_entropy"] > 1  # more than two prototypes are in use


def test_high_resolution_goes_on_from_an_export(whole, tmp_path):
    config = tiny(init=str(whole.teacher), global_px=70, local_px=42, tile_px=80)
    model, (start, _) = DinoV2(config), load(whole.teacher)
    assert model.student.backbone.pos_embed.shape == (1, 25, 32)
    grid = start.pos_embed.view(1, 3, 3, 32).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (5, 5), mode="bicubic", antialias=True).permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.allclose(model.student.backbone.pos_embed, grid, atol=1e-6)
    with torch.no_grad():
        x = torch.rand(2, 3, 70, 70)
        assert torch.allclose(model.teacher.backbone.eval()(x), start(x), atol=1e-6)
    run = pretrain(config.replace(steps=1, watch_every=0), StructuredTiles(80), folder=tmp_path)
    assert load(run.teacher)[1].input_px == 70
    export(run.backbone, tmp_path / "again")
    assert load(tmp_path / "again")[0].pos_embed.shape == (1, 25, 32)
