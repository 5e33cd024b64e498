"""The official training step (docs/official.md 2 to 7) in plain PyTorch, for a comparison of times.

Parameters are a dict by the official names. Like the official code, the decoder matches all tokens of an image with
each of its four clips, and with its own clip once more for PFR. Unlike it, all pairs are decoded at once and not two
images at a time. Attention that needs neither dropout nor its weights is torch's own fused attention.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rice_jax.config import Config

TOWER, DECODER = "image_encoder.model", "transformer.transformer"
HARD = 3


class OfficialStep:
    """Parameters, moments and the training step `update`. Sizes and rates are those of `config`."""

    def __init__(self, tensors: Mapping[str, np.ndarray], config: Config) -> None:
        self.config = config
        self.parameters = {name: torch.tensor(array).requires_grad_() for name, array in tensors.items()}
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.parameters.items()}
        self.updates = 0

    def update(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """Changes the parameters and returns the losses before that, {"icl", "pmd", "pfr"}.

        batch: video [B,N,3,px,px] and image [B,3,px,px], normalised; mask [B,N].
        """
        losses = self.losses(batch)
        sum(losses.values()).backward()
        self._descend()
        return {name: loss.item() for name, loss in losses.items()}

    # --- losses -------------------------------------------------------------------------------------------------------

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        p, mask = self.parameters, batch["mask"]
        count, slots = mask.shape
        image_tokens, image_pooled = self._encode(batch["image"])
        frame_tokens, frame_pooled = self._encode(batch["video"].flatten(0, 1))
        weight = mask[..., None].float()
        clips = functional.normalize((frame_pooled.view(count, slots, -1) * weight).sum(1) / weight.sum(1), dim=-1)
        images = functional.normalize(image_pooled, dim=-1)

        scale, own = p["transformer.logit_scale"], torch.arange(count)
        logits = (scale * clips) @ (scale * images).T
        icl = (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2

        tokens = frame_tokens.shape[1]
        clip_tokens = frame_tokens.reshape(count, slots * tokens, -1)
        shown = mask.bool().repeat_interleave(tokens, dim=1)
        with torch.no_grad():
            similarity = (images @ clips.T).fill_diagonal_(-math.inf)
            hard = similarity.argsort(dim=1, descending=True)[:, :HARD]
        candidates = torch.cat([own[:, None], hard], dim=1).flatten()  # [B * 4]
        x = self._decode(image_tokens.repeat_interleave(1 + HARD, dim=0), clip_tokens[candidates], shown[candidates])[0]
        logits = self._matching(x).view(count, 1 + HARD)
        pmd = -logits.log_softmax(dim=1)[:, 0].mean()

        attention = self._decode(image_tokens, clip_tokens, shown)[1]
        rec = "transformer.heads.rec"
        hidden = functional.conv2d(attention, p[f"{rec}.0.weight"], p[f"{rec}.0.bias"]).relu()
        mixed = functional.conv2d(hidden, p[f"{rec}.2.weight"], p[f"{rec}.2.bias"]).relu()[:, 0]
        rebuilt = mixed.softmax(dim=-1) @ (clip_tokens * shown[..., None]).detach()
        return {"icl": icl, "pmd": pmd, "pfr": functional.mse_loss(rebuilt, image_tokens.detach())}

    def _encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        p, c = self.parameters, self.config.model
        x = functional.conv2d(pictures, p[f"{TOWER}.conv1.weight"], stride=c.patch_size).flatten(2).transpose(1, 2)
        first = p[f"{TOWER}.class_embedding"].expand(len(x), 1, -1)
        x = self._norm(f"{TOWER}.ln_pre", torch.cat([first, x], dim=1) + p[f"{TOWER}.positional_embedding"])
        for layer in range(c.layers):
            x = self._block(f"{TOWER}.transformer.resblocks.{layer}", x, c.heads)
        return x, self._norm(f"{TOWER}.ln_post", x[:, 0]) @ p[f"{TOWER}.proj"]

    def _decode(self, image_tokens: Tensor, clip_tokens: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
        """Returns all tokens after both layers [n,T,D], and the cross attention times sqrt(head width) [n,H,T,S]."""
        p, heads, name = self.parameters, self.config.model.decoder_heads, f"{DECODER}.transformer.layers.1"
        x = self._block(f"{DECODER}.transformer.layers.0", image_tokens, heads, eps=1e-12)
        weights, biases = p[f"{name}.attn.in_proj_weight"].chunk(3), p[f"{name}.attn.in_proj_bias"].chunk(3)
        inputs = (self._norm(f"{name}.ln_1", x), clip_tokens, clip_tokens)
        q, k, v = (
            functional.linear(y, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)
            for y, w, b in zip(inputs, weights, biases, strict=True)
        )
        root = q.shape[-1] ** 0.5
        scores = (q / root) @ k.transpose(-1, -2)
        scores = scores.masked_fill(~shown[:, None, None], torch.finfo(scores.dtype).min)
        attention = scores.softmax(dim=-1)
        mixed = functional.dropout(attention, self.config.loss.cross_dropout) @ v
        x = x + self._linear(f"{name}.attn.out_proj", mixed.transpose(1, 2).flatten(2))
        return self._feed_forward(name, x), attention * root

    def _matching(self, x: Tensor) -> Tensor:
        pooled = self._norm(f"{DECODER}.pooler.layer_norm", x)[:, 0]
        pooled = functional.linear(pooled, self.parameters[f"{DECODER}.pooler.dense.weight"]).relu()
        return 10 * functional.cosine_similarity(pooled, self.parameters["transformer.heads.vim.weight"], dim=-1)

    def _block(self, name: str, x: Tensor, heads: int, eps: float = 1e-5) -> Tensor:
        p = self.parameters
        joined = functional.linear(
            self._norm(f"{name}.ln_1", x, eps), p[f"{name}.attn.in_proj_weight"], p[f"{name}.attn.in_proj_bias"]
        )
        q, k, v = joined.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self._feed_forward(name, x + self._linear(f"{name}.attn.out_proj", mixed), eps)

    def _feed_forward(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        hidden = self._linear(f"{name}.mlp.c_fc", self._norm(f"{name}.ln_2", x, eps))
        return x + self._linear(f"{name}.mlp.c_proj", hidden * torch.sigmoid(1.702 * hidden))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        return functional.layer_norm(
            x, x.shape[-1:], self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"], eps
        )

    # --- the optimiser ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _descend(self) -> None:
        """Applies AdamW of transformers 4.10: warm-up, cosine, a rate and a decay per tensor (docs/official.md 7)."""
        o, u, total = self.config.optimizer, self.updates, self.config.num_updates
        cosine = 0.5 * (1 + math.cos(math.pi * (u - o.warmup_updates) / (total - o.warmup_updates)))
        rate = o.learning_rate * (u / o.warmup_updates if u < o.warmup_updates else cosine)
        self.updates += 1
        correction = math.sqrt(1 - o.b2**self.updates) / (1 - o.b1**self.updates)
        for name, parameter in self.parameters.items():
            slow = name.startswith("image_encoder") or name == "transformer.logit_scale"
            lr = rate * (1 if slow else o.decoder_lr_multiplier)
            grad, (m, v) = parameter.grad, self.moments[name]
            m.mul_(o.b1).add_(grad, alpha=1 - o.b1)
            v.mul_(o.b2).addcmul_(grad, grad, value=1 - o.b2)
            parameter.addcdiv_(m, v.sqrt().add_(o.eps), value=-lr * correction)
            if "bias" not in name:
                parameter.mul_(1 - lr * o.weight_decay)
            parameter.grad = None
