"""Our recipe for LPR750K from CLIP's weights: --config rice:STAGE, stages as in lpr750k.py. Needs init_from.

Each departure from the official recipe has its reason beside it. They are reasons, not measurements: no run on LPR750K
stands behind them. Numbers in brackets are rows of SPEC 11.
"""

from configs import lpr750k
from configs.default import Config


def get_config(arg: str = "icl_pmd_pfr") -> Config:
    c = lpr750k.get_config(arg)
    c.unlock()
    c.data.test_tail_cut = False  # all frames, so that two evaluations of one model agree [15]
    c.data.consistent_augment = True  # a clip is one camera: its frames share a crop and a side [16]
    c.data.resize_mode = "keep_ratio"  # as CLIP's pictures were, products neither squeezed nor stretched [17]

    c.model.decoder_heads = 12  # the heads of 64 that the decoder's blocks were trained with in CLIP [3]
    c.model.cross_kv_norm = True  # as those blocks had it: their keys and values expect normalised tokens [4]
    c.model.decoder_self_eps = 1e-5  # one epsilon everywhere; 1e-12 is below bfloat16's and float16's reach [6]
    c.model.logit_scale_init = 10.0  # s^2 = 100, where CLIP's own temperature ended; 16 makes soft targets [10]

    c.loss.icl_same_product = "positive"  # other clips of one product are right answers, not wrong ones [9]
    c.loss.exclude_same_product = True  # the hardest "negative" is else the same product once more [7]
    c.loss.mining_direction = "both"  # a clip's hard images are what retrieval has to tell apart [8]
    c.loss.pfr_attention = "prob"  # times sqrt(D/H) the second softmax picks one token from the start [2, 37]
    c.loss.pfr_mask_padding = True  # weight on padding shrinks what short clips rebuild [1]
    c.loss.pfr_with_class_token = False  # patches from patches, as the paper says [29]

    c.optimizer.logit_scale_lr_multiplier = 100.0  # in every stage; at the encoder's 1e-6 it would stand still [10]
    c.optimizer.b2 = 0.98  # CLIP's own, and the official one on MovingFashion: 0.999 remembers a fifth of the run
    c.optimizer.eps_placing = "corrected"  # the usual AdamW, whose first steps are not held back [12]
    c.optimizer.decay_rule = "no_1d"  # norms, biases, class token and temperature have no reason to shrink [11]
    return c.lock()
