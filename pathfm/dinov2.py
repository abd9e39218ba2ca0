"""DINOv2: DINO, and the student tells hidden patches as the teacher sees them (iBOT), with spread features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pathfm import ranks
from pathfm.augment import Views
from pathfm.config import DinoV2Config
from pathfm.dino import Dino, Encoder, Outcome, entropies, is_bare
from pathfm.losses import Heard, dino_loss, entropy, ibot_loss, kde, koleo, sharpened, sinkhorn
from pathfm.schedules import Schedule
from pathfm.vit import DinoHead, drop_path_everywhere, tokens_seen

STEM = ("patch_embed", "pos_embed", "cls_token", "reg_token")  # of the backbone, before its first block


class MaskedEncoder(Encoder):
    """A backbone, the token that stands for a hidden patch, a head on CLS and one on patches (the same, if shared)."""

    def __init__(self, backbone: nn.Module, head: nn.Module, patch_head: nn.Module | None):
        super().__init__(backbone, head)
        self.patch_head = patch_head
        self.mask_token = nn.Parameter(torch.zeros(1, backbone.num_features))

    def forward(self, global_: Tensor, local: Tensor, masks: Tensor, hide: bool) -> tuple[Tensor, Tensor, Tensor]:
        """CLS features (V, B, D) and logits (V, B, K) of views as in `Views`, and patch logits (M, K').

        masks  (G, B, N) on the CPU, True at the M patches that are answered, in the order of the masks
        hide   whether those are hidden from the backbone in global views
        """
        images, picked = global_.flatten(0, 1), masks.flatten(0, 1)
        together = len(local) > 0 and local.shape[1:] == global_.shape[1:]
        seen = torch.cat([images, local.flatten(0, 1)]) if together else images
        hidden = torch.zeros(len(seen), picked.shape[1], dtype=torch.bool)
        hidden[: len(picked)] = picked & hide
        tokens = tokens_seen(self.backbone, seen, hidden.to(images.device, non_blocking=True), self.mask_token)
        apart = [self.backbone(local.flatten(0, 1))] if len(local) and not together else []
        features = torch.cat([tokens[:, 0], *apart])
        at = picked.flatten().nonzero()[:, 0].to(images.device, non_blocking=True)
        patches = tokens[: len(images), self.backbone.num_prefix_tokens :].flatten(0, 1).index_select(0, at)
        shape = (-1, global_.shape[1])
        answer = self.head if self.patch_head is None else self.patch_head
        return features.unflatten(0, shape), self.head(features).unflatten(0, shape), answer(patches)


class DinoV2(Dino):
    """Student, teacher and centres. Oquab et al. 2023, section 4, and their code."""

    def __init__(self, config: DinoV2Config):
        super().__init__(config)
        prototypes = config.patch_prototypes if config.separate_head else config.prototypes
        self.register_buffer("patch_centre", torch.zeros(prototypes))

    def encoder(self, backbone: nn.Module) -> MaskedEncoder:
        """The student, new heads on a backbone."""
        c, patch_head = self.config, None
        if c.drop_path_uniform and c.drop_path:
            drop_path_everywhere(backbone, c.drop_path)
        head = super().encoder(backbone).head
        if c.separate_head:
            sizes = c.patch_prototypes, c.patch_hidden, c.patch_bottleneck
            patch_head = DinoHead(backbone.num_features, *sizes, norm_last_layer=c.norm_last_layer)
        return MaskedEncoder(backbone, head, patch_head)

    def forward(self, views: Views, now: Schedule) -> Outcome:
        """The loss of a batch of views with their masks, and what the teacher said."""
        c, nothing = self.config, views.local[:0]
        with torch.no_grad():
            _, logits, patch_logits = self.teacher(views.global_, nothing, views.masks, hide=False)
            with torch.autocast(logits.device.type, enabled=False):
                p = self.answers(logits, now.teacher_temperature)
                patch_p = self._centred(patch_logits, self.patch_centre, now.teacher_temperature)
        features, student, patch_student = self.student(views.global_, views.local, views.masks, hide=True)
        with torch.autocast(logits.device.type, enabled=False):
            seen, zero = features[: len(logits)], logits.new_zeros((), dtype=torch.float32)
            parts = {
                "dino": dino_loss(student, p, c.student_temperature),
                "ibot": ibot_loss(patch_student, patch_p, views.masks.flatten(0, 1), c.student_temperature),
                "koleo": sum(koleo(view) for view in seen) if c.koleo else zero,
                "kde": sum(kde(view, c.kde_kappa) for view in seen) if c.kde else zero,
            }
        loss = parts["dino"] + c.ibot * parts["ibot"] + c.koleo * parts["koleo"] + c.kde * parts["kde"]
        log = {name: part.detach() for name, part in parts.items()} | entropies(p)
        log["patch_entropy"] = ranks.mean_row(entropy(patch_p))
        heard = {"centre": logits, "patch_centre": patch_logits} if c.centring == "centre" else {}
        return Outcome(loss, {name: Heard.of(said) for name, said in heard.items()}, log)

    def answers(self, logits: Tensor, temperature: float) -> Tensor:
        """The teacher's probabilities (..., K) of its logits on CLS."""
        return self._centred(logits, self.centre, temperature)

    def _centred(self, logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
        if self.config.centring == "sinkhorn":
            return sinkhorn(logits, temperature, self.config.sinkhorn_iterations)
        return sharpened(logits, centre, temperature)

    def groups(self) -> list[dict]:
        """The student's parameters for AdamW by rate and weight decay: blocks learn faster the higher they stand.

        `rate` is layer_decay to the power of the layers above: heads and the last norm 0, block i of L L - i, what
        comes before the blocks L + 1; the patch embedding's once more by patch_embed_lr.
        """
        groups: dict[tuple, dict] = {}
        for name, p in self.student.named_parameters():
            if p.requires_grad:
                rate, decay, prototypes = self._rate(name), 0.0 if is_bare(name, p) else 1.0, "last_layer" in name
                settings = {"rate": rate, "decay": decay, "prototypes": prototypes}
                groups.setdefault((rate, decay, prototypes), {"params": [], **settings})["params"].append(p)
        return list(groups.values())

    def _rate(self, name: str) -> float:
        c, blocks = self.config, len(self.student.backbone.blocks)
        where, _, rest = name.partition(".")
        above = 0
        if where == "mask_token" or (where == "backbone" and rest.startswith(STEM)):
            above = blocks + 1
        elif rest.startswith("blocks."):
            above = blocks - int(rest.split(".")[1])
        return c.layer_decay**above * (c.patch_embed_lr if "patch_embed" in name else 1.0)

    def hold_prototypes(self, now: Schedule) -> None:
        """Nothing: DINOv2 holds them by a rate of 0 (`schedules.set_rates`)."""

    def clip(self) -> Tensor:
        """Bounds the norm of the gradients of the backbone and of each head; returns the norm of all before."""
        student, limit = self.student, self.config.clip or torch.inf
        heads = [list(head.parameters()) for head in (student.head, student.patch_head) if head is not None]
        parts = [[*student.backbone.parameters(), student.mask_token], *heads]
        return torch.stack([ranks.whole(nn.utils.clip_grad_norm_(part, limit)) for part in parts]).norm()
