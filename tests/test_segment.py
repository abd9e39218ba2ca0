"""Decoders, loss and score of segmentation against references written apart; sets from disk to a figure."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import miniatures
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_features import tiny_vit

from pathfm import InputError, export, figures, maps, nuclei_tiles, segment, tasks
from pathfm.segment import EVA, SegmentationProtocol
from pathfm.segmentation import DECODERS, TokensOnly, WithImage, dice, dice_loss, of_images
from pathfm.synthetic import Truth, tiny_cohort
from pathfm.tasks.nuclei import from_folder

SMALL = SegmentationProtocol(input_px=32, steps=30, batch_size=8, patience=20, runs=1)


def test_decoders_have_evas_layers():
    """Shapes and counts as eva 73b61a7 has them for a ViT-S and five classes."""
    sizes = {name: sum(p.numel() for p in make(384, 5).parameters()) for name, make in DECODERS.items()}
    conv = lambda i, o, k: i * o * k * k + o  # noqa: E731
    assert sizes["image"] == conv(384, 64, 3) + 128 + conv(67, 32, 3) + 64 + conv(32, 32, 3) + 64 + conv(32, 5, 1)
    assert sizes["tokens"] == conv(384, 64, 3) + conv(64, 5, 3)


def test_the_decoder_with_the_image_step_by_step():
    torch.manual_seed(0)
    model = WithImage(6, 3).eval()
    tokens, images = torch.randn(2, 6, 4, 4), torch.randn(2, 3, 32, 32)
    x = tokens.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def layer(x, part):
        x = F.conv2d(x, part[0].weight, part[0].bias, padding=1)
        return F.relu(F.batch_norm(x, torch.zeros(x.shape[1]), torch.ones(x.shape[1]), part[1].weight, part[1].bias))

    x = F.interpolate(layer(x, model.tokens[1]), (32, 32), mode="bilinear", align_corners=False)
    x = layer(layer(torch.cat([x, images], 1), model.joined[0]), model.joined[1])
    assert torch.allclose(model(tokens, images), F.conv2d(x, model.classifier.weight, model.classifier.bias), atol=1e-5)


def test_the_decoder_of_tokens_sees_no_image():
    model, tokens = TokensOnly(6, 3), torch.randn(2, 6, 4, 4)
    images = torch.randn(2, 3, 40, 40)
    assert torch.equal(model(tokens, images), model(tokens, torch.zeros(2, 3, 40, 40)))
    assert model(tokens, images).shape == (2, 3, 40, 40)
    with_image = WithImage(6, 3).eval()
    assert not torch.allclose(with_image(tokens, images), with_image(tokens, 2 * images))


def plain_loss(logits, target):
    """Class by class and pixel by pixel."""
    p = torch.softmax(logits.double(), 1)
    losses = []
    for c in range(logits.shape[1]):
        both = each = 0.0
        for b in range(len(p)):
            for value, t in zip(p[b, c].flatten(), target[b].flatten(), strict=True):
                both, each = both + value.item() * (t == c).item(), each + value.item() + (t == c).item()
        losses.append(1 - (2 * both + 1e-5) / (each + 1e-5))
    return np.mean(losses)


def test_the_loss_is_dice_over_the_batch():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    assert dice_loss(logits, target).item() == pytest.approx(plain_loss(logits, target), abs=1e-6)
    right = 60.0 * F.one_hot(target, 3).movedim(-1, 1)
    assert dice_loss(right, target).item() == pytest.approx(0, abs=1e-4)


def test_ignored_pixels_move_no_weight():
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    target = torch.randint(0, 3, (1, 4, 4))
    target[0, 0] = 5
    dice_loss(logits, target, ignored=5).backward()
    assert (logits.grad[0, :, 0] == 0).all() and (logits.grad[0, :, 1:] != 0).any()


def test_dice_by_hand():
    truth = np.array([[0, 0, 1, 1], [0, 0, 1, 5]])
    said = np.array([[0, 1, 1, 1], [0, 0, 0, 1]])
    found = dice(said, truth, 6, ignored=5)
    assert found[:2] == pytest.approx([2 * 3 / (4 + 4), 2 * 2 / (4 + 3)]) and np.isnan(found[2:]).all()
    clean = dice(said, truth, 6, ignored=5, clean=True)
    assert clean[1] == pytest.approx(2 * 2 / (3 + 3))  # what is said of the ambiguous pixel does not count
    each = np.array([[0.9, 0.4, 0.8], [0.9, 0.2, np.nan], [1.0, np.nan, np.nan]])
    assert of_images(each)[:2] == pytest.approx([0.6, 0.2]) and np.isnan(of_images(each)[2])


def checker(side=8, px=64, seed=0):
    """An image whose dark squares are its nuclei."""
    mask = np.kron(np.random.default_rng(seed).integers(0, 2, (px // side, px // side)), np.ones((side, side), int))
    return np.where(mask[..., None], [90, 60, 130], [235, 200, 220]).astype(np.uint8), mask


@pytest.fixture
def squares(tmp_path):
    """Nine images of dark squares on pink, three a role."""
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    lines = ["file,patient_id,role"]
    for i in range(9):
        pixels, mask = checker(seed=i)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(mask.astype(np.uint16)).save(tmp_path / "labels" / f"{i}.png")
        lines.append(f"{i}.png,p{i},{('probe-train', 'validate', 'test')[i % 3]}")
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    return from_folder(tmp_path, mpp=0.5)


def test_what_is_in_the_image_is_learnt(squares):
    protocol = SegmentationProtocol(input_px=32, steps=80, batch_size=3, patience=80, runs=2, slow_epochs=0)
    found = segment.fit(tiny_vit(), squares, protocol, name="random weights")
    row = found.summary().iloc[0]
    assert row["dice"] > 0.9 and row["low"] <= row["dice"] <= row["high"]
    assert (row["role"], row["runs"], row["n_images"], row["n_quarantined"]) == ("test", 2, 3, 0)
    assert not row["stopped on report"] and found.each.shape == (2, 3, 2)
    said = found.predict(found.reported.images)
    again = np.array([dice(a, t, 2) for a, t in zip(said, found.reported.masks, strict=True)])
    assert np.allclose(again, found.each[0])


def test_tokens_alone_are_coarser_than_tokens_and_image(squares):
    """Squares of half a patch: what the image adds is the outline."""
    how = {"input_px": 32, "steps": 60, "batch_size": 3, "patience": 60, "runs": 1, "slow_epochs": 0}
    scores = [
        segment.fit(tiny_vit(), squares, SegmentationProtocol(decoder=name, **how)).interval().value
        for name in ("image", "tokens")
    ]
    assert scores[0] > scores[1] + 0.1


def test_a_run_repeats(squares):
    protocol = SegmentationProtocol(input_px=32, steps=25, batch_size=3, patience=25, runs=2, slow_epochs=0)
    one, two = (segment.fit(tiny_vit(), squares, protocol) for _ in range(2))
    assert np.array_equal(one.each, two.each) and np.array_equal(one.steps, two.steps)
    assert not np.array_equal(one.each[0], one.each[1])


def alone(images, protocol: SegmentationProtocol, seed: int):
    """A run as a plain loop would train it: the step of its best epoch, the score of validate, Dice of test."""
    model, own = tiny_vit().eval(), protocol.input_px
    held, vision = {}, export.Preprocess(own)
    for role in ("probe-train", "validate", "test"):
        cut = segment.pieces(images, np.flatnonzero(images.table["role"] == role), protocol)
        x = vision(cut.images, resize=False)
        with torch.no_grad():
            tokens = model.forward_intermediates(x, indices=1, norm=False, intermediates_only=True)[0]
        held[role] = tokens, x, torch.from_numpy(cut.masks).long()
    torch.manual_seed(seed)
    decoder, step, best, waited = DECODERS[protocol.decoder](tokens.shape[1], 2), 0, (0, -1.0, None), 0
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=protocol.lr)

    def said(role):
        decoder.eval()
        with torch.no_grad():
            answers = decoder(*held[role][:2]).argmax(dim=1).numpy()
        return np.array([dice(a, t, 2) for a, t in zip(answers, held[role][2].numpy(), strict=True)])

    for epoch in range(1000):
        for group in optimiser.param_groups:
            group["lr"] = protocol.lr / (3 if epoch < protocol.slow_epochs else 1)
        decoder.train()
        for rows in torch.randperm(len(held["probe-train"][2])).split(protocol.batch_size):
            tokens, x, masks = (part[rows] for part in held["probe-train"])
            loss = dice_loss(decoder(tokens, x), masks)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
            if step == protocol.steps:
                break
        now = np.mean(of_images(said("validate")))
        best, waited = ((step, now, said("test")), 0) if now > best[1] else (best, waited + 1)
        if step == protocol.steps or waited == protocol.patience:
            return best


@pytest.mark.parametrize("decoder, near", [("tokens", 1e-3), ("image", 0.03)])
def test_runs_trained_at_once_are_the_runs_trained_alone(squares, decoder, near, monkeypatch):
    """Ends before the last step included. In front of batch norm biases wander by rounding, hence the wider bound."""
    how = {"input_px": 32, "steps": 24, "batch_size": 2, "patience": 2, "runs": 3, "slow_epochs": 1, "decoder": decoder}
    protocol = SegmentationProtocol(**how)
    monkeypatch.setattr(segment, "BYTES_AT_ONCE", {"cpu": 2**40})
    together = segment.fit(tiny_vit(), squares, protocol)
    for run in range(3):
        step, score, each = alone(squares, protocol, run)
        assert together.steps[run] == step and together.validate[run] == pytest.approx(score, abs=near)
        assert np.allclose(together.each[run], each, atol=near)
    assert len(set(together.steps)) > 1


def test_crops_are_drawn_by_each_run_for_itself(squares, monkeypatch):
    how = {"input_px": 32, "steps": 12, "batch_size": 2, "patience": 2, "runs": 2, "slow_epochs": 0, "crops": True}
    protocol = SegmentationProtocol(decoder="tokens", **how)
    apart = segment.fit(tiny_vit(), squares, protocol)
    monkeypatch.setattr(segment, "BYTES_AT_ONCE", {"cpu": 2**40})
    together = segment.fit(tiny_vit(), squares, protocol)
    assert np.array_equal(together.steps, apart.steps) and np.allclose(together.each, apart.each, atol=1e-3)
    assert not np.allclose(together.each[0], together.each[1], atol=1e-3)


def test_consep_is_cut_into_windows(tmp_path):
    """Miniature images of 20 px, in windows of 10: four pieces each, whose masks are the quarters of the image's."""
    images = tasks.read(miniatures.consep(tmp_path), tmp_path)
    protocol = SegmentationProtocol(window_px=10, input_px=10)
    found = segment.pieces(images, np.array([3]), protocol)
    assert found.images.shape == (4, 10, 10, 3)
    rows = [np.concatenate(list(found.masks[part]), axis=1) for part in (slice(0, 2), slice(2, 4))]
    assert np.array_equal(np.concatenate(rows), images.masks(3).types)
    assert EVA["consep"].window_px == 250 and EVA["consep"].patience == 200


@pytest.mark.parametrize("make, classes", [(miniatures.consep, 5), (miniatures.monusac, 5)])
def test_the_public_sets_go_through(make, classes, tmp_path):
    task = make(tmp_path)
    images = tasks.read(task, tmp_path)
    crops = EVA[task.name].crops
    found = segment.fit(
        tiny_vit(img_size=16), images,
        SegmentationProtocol(input_px=16, steps=4, batch_size=8, patience=4, runs=1, crops=crops),
    )  # fmt: skip
    row = found.summary().iloc[0]
    assert row["role"] == "validate" and row["stopped on report"]  # as eva reports these two
    assert found.predict(found.reported.images).max() < classes  # no decoder says Ambiguous
    assert ("dice without Ambiguous" in row) == (task.name == "monusac")
    assert 0 <= row["dice"] <= 1


def test_wrong_calls_say_what_would_be_right(squares, tmp_path):
    with pytest.raises(InputError, match="unknown decoder 'images'. Did you mean 'image'"):
        segment.fit(tiny_vit(), squares, SegmentationProtocol(decoder="images"))
    with pytest.raises(InputError, match="refuses an input of 64 x 64 px"):
        segment.fit(tiny_vit(), squares, SegmentationProtocol(input_px=64))
    with pytest.raises(InputError, match="gives no patch tokens"):
        segment.fit(torch.nn.Linear(3, 3), squares, SMALL)
    with pytest.raises(InputError, match="no image of .* has the role validate; draw roles"):
        segment.fit(tiny_vit(), squares.subset(squares.table["role"] != "validate"), SMALL)
    with pytest.raises(InputError, match="has the role probe-train"):
        segment.fit(tiny_vit(), from_folder_without_roles(squares), SMALL)


def test_tokens_that_are_not_finite_are_no_score(squares):
    model = tiny_vit()
    with torch.no_grad():
        model.pos_embed[0, 1, 0] = torch.nan
    with pytest.raises(InputError, match="tokens of 'broken' hold NaN or infinity; look at the weights"):
        segment.fit(model, squares, SMALL, name="broken")


def test_intervals_say_what_they_are_drawn_over(squares):
    import dataclasses

    found = segment.fit(tiny_vit(), squares, dataclasses.replace(SMALL, steps=2), device="cpu")
    assert found.resampled == "by patient"
    unknown = dataclasses.replace(squares, table=squares.table.drop(columns="patient_id"))
    assert dataclasses.replace(found, images=unknown).resampled == "by image (too narrow)"


def from_folder_without_roles(images):
    import dataclasses

    return dataclasses.replace(images, table=images.table.drop(columns="role"))


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nuclei")
    cohort = tiny_cohort(folder, n=2, side_um=300, mpp=0.5, role="validate")
    return cohort, nuclei_tiles.synthetic_nuclei(cohort, per_slide=3, tile_px=96, folder=folder / "tiles")


def test_synthetic_masks_lie_on_dark_nuclei(synthetic):
    cohort, images = synthetic
    assert len(images) >= 3 and images.classes == nuclei_tiles.CLASSES and len(images.quarantined) == 0
    for row in range(len(images)):
        pixels, (instances, types) = images.image(row).astype(float).mean(axis=2), images.masks(row)
        assert pixels[types > 0].mean() < pixels[types == 0].mean() - 20
        assert ((instances > 0) == (types > 0)).all()
    truth = Truth.open(cohort.table["path"].iloc[0])
    mask = nuclei_tiles.draw(truth.nuclei, 0, 0, 600, 0.5) // nuclei_tiles.STEP
    lymphocytes = truth.nuclei[truth.nuclei["kind"] == "lymphocyte"]
    area = np.pi / 4 * (truth.nuclei["major_um"] * truth.nuclei["minor_um"]).sum() / 0.25
    assert 0.5 * area < (mask > 0).sum() <= 1.05 * area + 50 and len(lymphocytes) <= len(truth.nuclei)
    again = nuclei_tiles.synthetic_nuclei(
        cohort, per_slide=3, tile_px=96, folder=images.table["path"][0].rsplit("/", 2)[0]
    )
    assert again.table["digest"].tolist() == images.table["digest"].tolist()


def test_an_ellipse_has_its_area_place_and_direction():
    one = {"x_um": 20.0, "y_um": 12.0, "major_um": 16.0, "minor_um": 6.0, "angle": 0.5, "kind": "epithelial"}
    mask = nuclei_tiles.draw(pd.DataFrame([one]), 0, 0, 80, 0.5)
    y, x = (np.nonzero(mask)[axis] + 0.5 for axis in (0, 1))
    assert set(np.unique(mask)) == {0, nuclei_tiles.STEP + 3}
    assert len(x) * 0.25 == pytest.approx(np.pi * 8 * 3, rel=0.02)
    assert (x.mean() / 2, y.mean() / 2) == pytest.approx((20, 12), abs=0.05)
    axes = np.linalg.eigh(np.cov(x, y))[1][:, 1]
    assert np.arctan(axes[1] / axes[0]) == pytest.approx(0.5, abs=0.02)
    moved = nuclei_tiles.draw(pd.DataFrame([one]), 18, 10, 8, 0.5)  # a window inside it
    assert np.array_equal(moved > 0, mask[20:28, 36:44] > 0)


def test_places_without_nuclei_are_an_error(synthetic, tmp_path):
    with pytest.raises(InputError, match="no place of 5 um in tiny has 15 nuclei"):
        nuclei_tiles.synthetic_nuclei(synthetic[0], tile_px=10, folder=tmp_path)


def test_predictions_beside_truth(squares, style, tmp_path):
    found = segment.fit(tiny_vit(), squares, SMALL, name="random weights")
    fig = maps.predicted_nuclei(found, n=3)
    assert len(fig.axes) == 9
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["nucleus"]
    shares = [fig.axes[6 + column].get_title(plt.rcParams["axes.titlelocation"]) for column in range(3)]
    said = found.predict(found.reported.images)
    assert shares == [
        f"{(a == t).mean():.0%} of the pixels right" for a, t in zip(said, found.reported.masks, strict=True)
    ]
    assert any("µm" in text.get_text() for text in fig.axes[0].texts)
    assert figures.save(fig, "nuclei", tmp_path).stat().st_size > 1000


def test_an_outline_has_its_types_colour():
    image, types = np.full((8, 8, 3), 200, np.uint8), np.zeros((8, 8), int)
    types[2:6, 2:6] = 1
    found = maps.outlined(image, types)
    assert found[2, 3].tolist() == [230, 159, 0] and found[0, 0].tolist() == [222, 222, 222]
    assert found[3, 3].tolist() != found[2, 3].tolist()


@pytest.mark.real
def test_real_nuclei_are_found_better_than_by_a_guess(real_data):
    """dsb2018_he through both decoders on random weights; all background scores 0, all nucleus the share it covers."""
    images = tasks.read("masks", real_data / "nuclei" / "dsb2018_he").subset(np.arange(0, 64, 2)).split("tile")
    protocol = SegmentationProtocol(input_px=64, steps=30, batch_size=8, patience=30, runs=1, slow_epochs=0)
    found = segment.fit(tiny_vit(img_size=64), images, protocol)
    truth = found.reported.masks
    guess = np.nanmean([dice(np.ones_like(t), t, 2)[1] for t in truth])
    assert found.interval().value > guess + 0.05
