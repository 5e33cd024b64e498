"""The grocery recipe on the drawn shop (data_pipeline.synthetic), shortened to minutes on a laptop's CPU.

ARG names the losses: icl, icl_pmd, or icl_pmd_pfr (default).
"""

from configs import default, grocery


def get_config(arg: str = "icl_pmd_pfr") -> default.Config:
    c = grocery.get_config(arg)
    c.unlock()
    c.num_updates = 320
    c.data.min_scale = 0.6  # crops must show most of a pattern
    c.data.resize = 72  # evaluation at the scale of training, as in grocery.py
    c.data.erase = 0.0  # more clips than grocery has, so less overfitting
    pmd, pfr = default.stage(arg)
    c.loss.pmd, c.loss.pfr = 0.2 * pmd, 0.02 * pfr  # so few updates must go to the embedding first
    c.log_every, c.eval_every, c.checkpoint_every = 20, 0, 80
    return c.lock()
