"""Mistakes in the model, the losses, the optimizer, the ranking and the choice of frames: golden/sensitivity.txt.

One mistake of that list cannot be made here: decay of the decoder's unused embeddings, which this model does not have.
"""

from tests.mistakes import mistake

VIT, ARRAYS, DECODER, RICE = (f"rice_jax/models/{name}.py" for name in ("vit", "arrays", "decoder", "rice"))
EQUATIONS, GLOBAL_BATCH, PAIRS = (f"rice_jax/losses/{name}.py" for name in ("equations", "global_batch", "pairs"))
RANKS, RECALL = (f"rice_jax/retrieval/{name}.py" for name in ("ranking", "recall"))
OPTIMIZER, NAMING = "rice_jax/training/optimizer.py", "rice_jax/weights/naming.py"
FRAME_CHOICE, DEFAULT = "data_pipeline/input/sampling.py", "configs/default.py"

# The smallest of the golden files notices every mistake but those of the ones that only updates or fixtures show.
FORWARD = ("tests/test_golden.py", "-k", "rice_w64 and not updates and (losses or gradients or probes)")
UPDATES = ("tests/test_golden.py", "-k", "updates or schedule or groups")
SAMPLING = ("tests/input/test_sampling.py",)
RANKING = ("tests/retrieval/test_ranking.py", "-k", "official or ties or denominator")


QUICK = '"quick_gelu": lambda z: z * jax.nn.sigmoid(1.702 * z),'
RAW = 'jnp.matmul(10 * unit(pooled), unit(self.match), precision="highest")'
RESIDUAL = "-step * u - decay * (theta - step * u)"
REBUILT = "jax.lax.stop_gradient(clip_tokens), 0)"
UNCORRECTED = "correction * m / (jnp.sqrt(v) + eps)"
EVENLY = "return np.arange(slots) * (count - 1) // max(1, slots - 1)"

MISTAKES = (
    # -- model
    mistake(
        "exact (erf) GELU instead of QuickGELU",
        FORWARD,
        (VIT, QUICK, '"quick_gelu": lambda z: jax.nn.gelu(z, approximate=False),'),
    ),
    mistake(
        "tanh GELU instead of QuickGELU",
        FORWARD,
        (VIT, QUICK, '"quick_gelu": lambda z: jax.nn.gelu(z, approximate=True),'),
    ),
    mistake(
        "encoder LayerNorm eps 1e-6 instead of 1e-5",
        FORWARD,
        (VIT, '    eps: float = 1e-5\n    remat: str = "none"', '    eps: float = 1e-6\n    remat: str = "none"'),
    ),
    mistake(
        "decoder self layer eps 1e-5 instead of 1e-12",
        FORWARD,
        (DEFAULT, "decoder_self_eps: NotNegative = field(1e-12,", "decoder_self_eps: NotNegative = field(1e-5,"),
    ),
    mistake("encoder heads: 4 instead of D/64", FORWARD, (RICE, "heads=c.heads,", "heads=4,")),
    mistake(
        "decoder heads 2 instead of 8 (of the self layer)",
        FORWARD,
        (
            DECODER,
            "self.self_layer, self.cross_layer = block(eps=self.self_eps), block()",
            "self.self_layer, self.cross_layer = block(eps=self.self_eps).clone(heads=2), block()",
        ),
    ),
    mistake(
        "patch pixels flattened as (row, column, channel)",
        FORWARD,
        (
            VIT,
            'jnp.einsum("ngphqc,pqcd->nghd", patches, kernel.astype(self.dtype))',
            'jnp.einsum("ngphqc,pqcd->nghd", patches, kernel.transpose(2, 0, 1, 3).reshape(kernel.shape))',
        ),
    ),
    mistake(
        "ln_pre left out",
        FORWARD,
        (
            VIT,
            'self.resblocks(LayerNorm(self.eps, name="ln_pre")(x))',
            'self.resblocks(x + 0 * LayerNorm(self.eps, name="ln_pre")(x))',
        ),
    ),
    mistake(
        "tokens taken after ln_post",
        FORWARD,
        (
            VIT,
            'pooled = LayerNorm(self.eps, name="ln_post")(summary)',
            'norm = LayerNorm(self.eps, name="ln_post")\n        pooled, tokens = norm(summary), norm(tokens)',
        ),
    ),
    mistake(
        "frame vectors normalised before the mean",
        FORWARD,
        (ARRAYS, "unit((pooled * weight).sum(axis=-2)", "unit((unit(pooled) * weight).sum(axis=-2)"),
    ),
    mistake(
        "mean over all slots, padding included",
        FORWARD,
        (
            ARRAYS,
            "weight = mask[..., None].astype(pooled.dtype)",
            "weight = jnp.ones_like(mask[..., None], pooled.dtype)",
        ),
    ),
    # -- ICL
    mistake(
        "scale entering once (s instead of s^2)",
        FORWARD,
        (EQUATIONS, "jnp.square(scale) * cosines", "scale * cosines"),
    ),
    mistake("scale as exp(s)", FORWARD, (EQUATIONS, "jnp.square(scale) * cosines", "jnp.exp(scale) * cosines")),
    mistake(
        "one direction only",
        FORWARD,
        (
            EQUATIONS,
            "return (cross_entropy(clips, gathered.images) + cross_entropy(images, gathered.clips)) / 2",
            "return cross_entropy(clips, gathered.images)",
        ),
    ),
    # -- PMD
    mistake(
        "negatives mined the other way (clip anchors, image negatives)",
        FORWARD,
        (
            DEFAULT,
            'mining_direction: Literal["image_to_clip", "clip_to_image", "both"] = field(\n        "image_to_clip",',
            'mining_direction: Literal["image_to_clip", "clip_to_image", "both"] = field(\n        "clip_to_image",',
        ),
    ),
    mistake(
        "easiest instead of hardest negatives",
        FORWARD,
        (PAIRS, "jnp.where(excluded, -jnp.inf, similarity)", "jnp.where(excluded, -jnp.inf, -similarity)"),
    ),
    mistake(
        "no gradient into the negatives' tokens",
        FORWARD,
        (
            GLOBAL_BATCH,
            "keys_values=positives.keys_values,",
            "keys_values=jax.lax.stop_gradient(positives.keys_values),",
        ),
    ),
    mistake(
        "padding slots not masked in cross attention",
        FORWARD,
        (DECODER, "jnp.where(key_mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)", "scores"),
    ),
    mistake(
        "keys/values passed through ln_1",
        FORWARD,
        (DEFAULT, "cross_kv_norm: bool = field(False,", "cross_kv_norm: bool = field(True,"),
    ),
    mistake(
        "class tokens dropped from keys/values in PMD",
        FORWARD,
        (
            GLOBAL_BATCH,
            "keys_values, key_mask[clip], method",
            "keys_values, key_mask[clip] & "
            "(jnp.arange(key_mask.shape[1]) % encoded.image_tokens.shape[1] > 0)[None], method",
        ),
    ),
    mistake(
        "tokens patch-major with a frame-major mask",
        FORWARD,
        (GLOBAL_BATCH, "jnp.repeat(mask > 0, tokens.shape[2], axis=1)", "jnp.tile(mask > 0, (1, tokens.shape[2]))"),
    ),
    mistake(
        "pooling by mean instead of the class token",
        FORWARD,
        (
            GLOBAL_BATCH,
            "Positives(logit, keys_values, x[:, 0], pfr)",
            "Positives(logit, keys_values, x.mean(axis=1), pfr)",
        ),
    ),
    mistake(
        "ReLU of the pooler left out",
        FORWARD,
        (DECODER, "jax.nn.relu(self.dense(self.pooler_norm(x)))", "self.dense(self.pooler_norm(x))"),
    ),
    mistake("factor 10 left out", FORWARD, (DECODER, RAW, RAW.replace("10 * ", ""))),
    mistake("raw linear head instead of 10 cos", FORWARD, (DECODER, RAW, "pooled @ self.match")),
    mistake(
        "binary instead of 4-way cross entropy",
        FORWARD,
        (
            EQUATIONS,
            "return jnp.mean(jax.nn.logsumexp(logits, axis=1) - positive)",
            "return (jax.nn.softplus(-positive).sum() + jax.nn.softplus(logits[:, 1:]).sum()) / logits.size",
        ),
    ),
    mistake(
        "decoder blocks copied in the wrong order",
        FORWARD,
        (NAMING, 'transformer.layers.0", "decoder/self_layer")', 'transformer.layers.0", "decoder/cross_layer")'),
        (NAMING, 'transformer.layers.1", "decoder/cross_layer")', 'transformer.layers.1", "decoder/self_layer")'),
    ),
    # -- PFR
    mistake(
        "softmax masked",
        FORWARD,
        (DEFAULT, "pfr_mask_padding: bool = field(False,", "pfr_mask_padding: bool = field(True,"),
    ),
    mistake(
        "attention not multiplied by sqrt(head width)",
        FORWARD,
        (
            DEFAULT,
            'pfr_attention: Literal["prob_scaled", "prob", "score"] = field(\n        "prob_scaled",',
            'pfr_attention: Literal["prob_scaled", "prob", "score"] = field(\n        "prob",',
        ),
    ),
    mistake(
        "raw scores instead of softmax weights as input",
        FORWARD,
        (
            DEFAULT,
            'pfr_attention: Literal["prob_scaled", "prob", "score"] = field(\n        "prob_scaled",',
            'pfr_attention: Literal["prob_scaled", "prob", "score"] = field(\n        "score",',
        ),
    ),
    mistake(
        "no second softmax (head mean of the maps)",
        FORWARD,
        (
            DECODER,
            "return jax.nn.softmax(mixed, axis=-1)",
            "return mixed * 0 + self.read(scores, key_mask).mean(axis=1)",
        ),
    ),
    mistake(
        "padding tokens left in the source",
        FORWARD,
        (EQUATIONS, f"jnp.where(key_mask[..., None], {REBUILT}", "jax.lax.stop_gradient(clip_tokens)"),
    ),
    mistake("no gradient stop on source", FORWARD, (EQUATIONS, REBUILT, "clip_tokens, 0)")),
    mistake(
        "no gradient stop on target",
        FORWARD,
        (EQUATIONS, "target = jax.lax.stop_gradient(image_tokens)[", "target = image_tokens["),
    ),
    mistake(
        "class token left out of the loss",
        FORWARD,
        (
            EQUATIONS,
            "jnp.square(found - target.astype(found.dtype))",
            ("jnp.square(found - target.astype(found.dtype))[..., 1:, :]"),
        ),
    ),
    mistake(
        "sum over D instead of mean",
        FORWARD,
        (EQUATIONS, "return jnp.mean(jnp.square(found", "return found.shape[-1] * jnp.mean(jnp.square(found"),
    ),
    mistake(
        "last ReLU left out",
        FORWARD,
        (DECODER, 'jax.nn.relu(jnp.einsum("nkts,k->nts", ', '(jnp.einsum("nkts,k->nts", '),
    ),
    mistake(
        "ReLU as maximum(x,0) (derivative 1/2 at 0)",
        FORWARD,
        (DECODER, 'jax.nn.relu(jnp.einsum("nkts,k->nts", ', 'jnp.maximum(0, jnp.einsum("nkts,k->nts", '),
    ),
    # -- optimiser
    mistake(
        "eps on the corrected sqrt (usual Adam)",
        UPDATES,
        (
            DEFAULT,
            'eps_placing: Literal["uncorrected", "corrected"] = field(\n        "uncorrected",',
            'eps_placing: Literal["uncorrected", "corrected"] = field(\n        "corrected",',
        ),
    ),
    mistake("decay before the step", UPDATES, (OPTIMIZER, RESIDUAL, "-step * u - decay * theta")),
    mistake("no bias correction", UPDATES, (OPTIMIZER, UNCORRECTED, "m / (jnp.sqrt(v) + eps)")),
    mistake(
        "L2 in the gradient instead of decoupled decay",
        UPDATES,
        (
            OPTIMIZER,
            "_, state = adam.update(grads, state, params)",
            (
                "grads = jax.tree.map(lambda g, p: g + 0.2 * p, grads, params)\n"
                "        _, state = adam.update(grads, state, params)"
            ),
        ),
        (OPTIMIZER, RESIDUAL, "-step * u"),
    ),
    mistake("decay also on biases", UPDATES, (OPTIMIZER, 'return not name.endswith("bias")', "return True")),
    mistake(
        "no decay on LayerNorm weights",
        UPDATES,
        (OPTIMIZER, 'not name.endswith("bias")', 'not name.endswith(("bias", "/scale"))'),
    ),
    mistake(
        "no decay on anything with one dimension",
        UPDATES,
        (
            DEFAULT,
            'decay_rule: Literal["official", "no_1d"] = field("official",',
            'decay_rule: Literal["official", "no_1d"] = field("no_1d",',
        ),
    ),
    mistake(
        "decay not multiplied by 100 for the decoder",
        UPDATES,
        (OPTIMIZER, "decay = step * config", "decay = lr * config"),
    ),
    mistake(
        "heads and pooler at x1",
        UPDATES,
        (
            OPTIMIZER,
            'return 1.0 if name.startswith("encoder/")',
            (
                'return 1.0 if name.startswith(("encoder/", "reconstruction/", "decoder/pooler", "decoder/dense", '
                '"decoder/match"))'
            ),
        ),
    ),
    mistake(
        "logit scale at x100",
        UPDATES,
        (
            DEFAULT,
            "logit_scale_lr_multiplier: NotNegative = field(1.0,",
            "logit_scale_lr_multiplier: NotNegative = field(100.0,",
        ),
    ),
    mistake(
        "schedule one step early (first factor 1/w)",
        UPDATES,
        (OPTIMIZER, "u = jnp.asarray(update, float)", "u = jnp.asarray(update, float) + 1"),
    ),
    mistake(
        "linear instead of cosine decay",
        UPDATES,
        (
            OPTIMIZER,
            "jnp.square(jnp.sin(jnp.pi / 2 * jnp.clip((total - u) / (total - warmup), 0, 1)))",
            ("jnp.clip((total - u) / (total - warmup), 0, 1)"),
        ),
    ),
    mistake("beta2 0.98", UPDATES, (OPTIMIZER, "adam(o.b1, o.b2, o.eps)", "adam(o.b1, 0.98, o.eps)")),
    mistake("eps 1e-8", UPDATES, (OPTIMIZER, "adam(o.b1, o.b2, o.eps)", "adam(o.b1, o.b2, 1e-8)")),
    mistake(
        "clipping to norm 1",
        UPDATES,
        (DEFAULT, "clip_norm: NotNegative = field(0.0,", "clip_norm: NotNegative = field(1.0,"),
    ),
    # -- data and evaluation
    mistake(
        "rounded instead of truncated indices",
        SAMPLING,
        (FRAME_CHOICE, EVENLY, "return np.rint(np.arange(slots) * (count - 1) / max(1, slots - 1)).astype(np.int64)"),
    ),
    mistake(
        "end point left out (floor(k n/10))",
        SAMPLING,
        (FRAME_CHOICE, EVENLY, "return np.arange(slots) * count // slots"),
    ),
    mistake(
        "segment centres", SAMPLING, (FRAME_CHOICE, EVENLY, "return (2 * np.arange(slots) + 1) * count // (2 * slots)")
    ),
    mistake("first ten frames", SAMPLING, (FRAME_CHOICE, EVENLY, "return np.arange(slots)")),
    mistake(
        "ties broken towards the later image",
        RANKING,
        (RANKS, "(position_l[None, :] < first_q1)", "(position_l[None, :] > first_q1)"),
    ),
    mistake(
        "ties against the true image",
        RANKING,
        (
            RANKS,
            "(sortable_ql == best_q1) & (position_l[None, :] < first_q1)",
            ("(sortable_ql == best_q1) & (position_l[None, :] != first_q1)"),
        ),
    ),
    mistake(
        "only the first true image counts",
        RANKING,
        (RANKS, "for image_id in set(ids) if", "for image_id in list(ids)[:1] if"),
    ),
    mistake(
        "denominator = predicted queries",
        RANKING,
        (RECALL, "np.count_nonzero(rank_q <= k)) / denominator", "np.count_nonzero(rank_q <= k)) / len(rank_q)"),
    ),
)
