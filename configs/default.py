"""Every field once, with its meaning, unit and the official value; the other configs change only what differs.

Rows in brackets are those of the table of the official code's oddities (SPEC 11).
"""

import ml_collections

STAGES = ("icl", "icl_pmd", "icl_pmd_pfr")


def stage(name: str) -> tuple[float, float]:
    """Whether a stage has PMD and PFR, as 0 or 1; ValueError for a stage that is none."""
    if name not in STAGES:
        raise ValueError(f"--config ...:{name}: no such stage; stages are {', '.join(STAGES)}.")
    return float("pmd" in name), float("pfr" in name)


def get_config() -> ml_collections.ConfigDict:
    """RICE with ViT-B/32 as the official code trains it, without a data set: set data.path."""
    c = ml_collections.ConfigDict()
    c.seed = 42  # of initialisation, order of data, augmentation and dropout
    c.batch_size = 96  # G: pairs (clip, shop image) of the global batch, on all devices; 0: fits the set, up to 64
    c.init_from = ""  # weights to start from: CLIP's, the official code's or a run's (docs/weights.md); empty: random
    c.num_updates = 5000  # optimiser steps; an incomplete batch at an epoch's end is dropped

    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # folder made by data_pipeline.convert; each host may have its own copy
    c.data.train_split = "train"  # trained on
    c.data.eval_split = "val"  # evaluated during training; empty: none; "auto": val if the set has it
    c.data.skip_clips = ()  # ids of training clips to leave out; part of the plan's fingerprint
    c.data.spread_products = False  # each product's clips evenly over an epoch, for a set whose batches repeat products
    c.data.num_frames = 10  # N: frame slots a clip in training
    c.data.eval_num_frames = 10  # and in evaluation
    c.data.image_size = 224  # px a side, what the encoder sees
    c.data.resize = 256  # px a side before the crop to image_size; with min_scale or max_aspect in evaluation only
    c.data.resize_mode = "stretch"  # or "keep_ratio": bicubic, shorter side, as CLIP [17]
    c.data.frame_sampling = "uniform"  # or "random": a sorted random subset of the clip's frames, in training
    c.data.tail_cut = True  # training drops a random tail of ten-frame clips (SPEC 9.2)
    c.data.test_tail_cut = False  # official: True, which makes Recall a random number [15]
    c.data.flip = True  # horizontal, p = 0.5, in training
    c.data.consistent_augment = False  # one crop and flip a clip instead of one a frame [16]
    c.data.min_scale = 1.0  # below 1: random-resized-crop of at least this share of the area, in training
    c.data.max_aspect = 1.0  # above 1: that crop's width : height is off by up to this factor, either way
    c.data.shrink_to = 0  # px: those crops are of pictures shrunk to this shorter side, to save memory; 0: as they are
    c.data.colour_jitter = 0.0  # strength of brightness, contrast and saturation changes, in training
    c.data.white_balance = 0.0  # red, green and blue each times 1 - this to 1 + this, in training
    c.data.erase = 0.0  # chance that training paints a square over, of 0.2 to 0.5 of the picture's side
    c.data.apply_exif = False  # turn pictures as their EXIF orientation says
    c.data.cache_bytes = 0  # memory for decoded and resized training pictures: the same pixels, for a set that fits
    c.data.threads = 4  # that read, decode and resize, a process
    c.data.workers = 0  # further processes that do; 0: threads of this one

    c.model = ml_collections.ConfigDict()
    c.model.patch_size = 32  # px
    c.model.stem_channels = ()  # of 3x3 convolutions of stride 2 in place of the patch embedding, one a halving
    c.model.stem_blocks = ()  # residual blocks, of two convolutions each, after each of them
    c.model.pool = "class_token"  # or "mean" of all tokens: what the embedding is made of
    c.model.width = 768  # D
    c.model.layers = 12  # L
    c.model.heads = 12  # of the encoder; CLIP: D/64
    c.model.hidden = 3072  # of the MLPs
    c.model.embedding = 512  # E
    c.model.activation = "quick_gelu"  # of the MLPs, or "gelu": must be the pretrained weights' own; a stem has ReLU
    c.model.decoder_heads = 8  # H; official 8, D/64 is what CLIP's blocks were trained with [3]
    c.model.decoder_self_eps = 1e-12  # LayerNorm of the decoder's self layer; 1e-5 everywhere else [6]
    c.model.cross_kv_norm = False  # LayerNorm before the decoder's keys and values [4]
    c.model.logit_scale_init = 4.0  # s: logits are s^2 cos [10]
    c.model.logit_bias_init = -10.0  # b of icl_form "sigmoid", whose logits are s^2 cos + b: most pairs are wrong ones
    c.model.dtype = "float32"  # of matmuls, or "bfloat16"; parameters, softmax and losses stay float32 [35, 36]
    c.model.remat = "none"  # "dots" or "full": blocks recomputed in the backward pass to save memory

    c.loss = ml_collections.ConfigDict()
    c.loss.icl = 1.0  # weight in the sum
    c.loss.icl_form = "softmax"  # over the global batch, as RICE; or "sigmoid" of each pair by itself, as SigLIP
    c.loss.icl_chunk = 0  # rows at once of the [rows, G] similarities in ICL and mining; 0: all
    c.loss.frame_icl = 0.0  # weight of ICL between a clip's even and odd frames; not in RICE, helps from random weights
    c.loss.patch_drop = 0.0  # share of each picture's patches that training does not encode
    c.loss.pmd = 1.0  # weight; 0 with pfr 0: the model has no decoder
    c.loss.pfr = 1.0  # weight
    c.loss.icl_same_product = "negative"  # other pairs of one product: "masked", or "positive" [9]
    c.loss.exclude_same_product = False  # mining skips pairs that show the anchor's product [7]
    c.loss.mining_direction = "image_to_clip"  # or "clip_to_image", "both" (their mean) [8]
    c.loss.cross_dropout = 0.1  # on the attention weights of matched pairs, in training [34]
    c.loss.pfr_attention = "prob_scaled"  # softmax weights times sqrt(D/H); or "prob", "score" [2]
    c.loss.pfr_mask_padding = False  # keep padding out of PFR's softmax [1]
    c.loss.pfr_with_class_token = True  # class tokens among PFR's rows, sources and targets [29]
    c.loss.micro_batch = 0  # pictures encoded at once, the rest recomputed in the backward pass; 0: all, none
    c.loss.pair_chunk = 0  # positive pairs decoded at once; 0: all
    c.loss.unit_slots = 8  # images that meet a clip's keys and values at one reading
    c.loss.unit_chunk = 8  # units decoded at once

    c.optimizer = ml_collections.ConfigDict()
    c.optimizer.learning_rate = 1e-6  # peak, of the encoder
    c.optimizer.decoder_lr_multiplier = 100.0  # decoder, pooler and heads (SPEC 7.1)
    c.optimizer.logit_scale_lr_multiplier = 1.0  # 100 in the official LPR model of ICL alone [10]
    c.optimizer.warmup_updates = 500  # linear from 0, then a cosine to 0 at num_updates
    c.optimizer.b1 = 0.9  # of Adam's first moment
    c.optimizer.b2 = 0.999  # of its second
    c.optimizer.eps = 1e-6  # of its denominator
    c.optimizer.eps_placing = "uncorrected"  # on sqrt(v) as the official AdamW, or "corrected" as usual [12]
    c.optimizer.weight_decay = 0.2  # times the learning rate, after the step
    c.optimizer.decay_rule = "official"  # all but biases; or "no_1d": matrices only [11]
    c.optimizer.clip_norm = 0.0  # largest norm of the gradient; 0: as it is
    c.optimizer.ema_decay = 0.0  # of an average of the weights that is evaluated instead of them; 0: none

    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = -1  # devices, of all hosts, along the batch; -1: what fsdp leaves
    c.mesh.fsdp = 1  # devices that share the parameters' memory

    c.max_nonfinite_updates = 10  # skipped in a row, loss or gradient not finite; one more stops the run
    c.stall_seconds = 600.0  # of waiting for one batch or step, before it is reported with all stacks; 0: never
    c.stall_ends = False  # after as long again the process ends with status 1, for a launcher to start it anew
    c.log_every = 50  # updates between lines of metrics.jsonl and TensorBoard
    c.eval_every = 500  # updates between evaluations on data.eval_split; 0: only at the end
    c.eval_flip = False  # evaluation adds each picture's mirror image to its pooled vector
    c.eval_batch_size = 64  # clips encoded at once, over all devices
    c.checkpoint_every = 500  # updates between checkpoints; one more at the end
    c.checkpoints_kept = 3  # newest ones
    c.checkpoints_kept_every = 0  # those after a multiple of so many updates are kept too; 0: none
    c.checkpoints_kept_best = True  # and the best by recall@1, among those that eval_every evaluates
    return c.lock()
