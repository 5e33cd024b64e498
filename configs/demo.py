"""The grocery recipe on the drawn shop (data_pipeline.synthetic), cut to what a laptop's CPU does in minutes.

ARG names the losses: icl, icl_pmd, or icl_pmd_pfr (default).
"""

from configs import default, grocery


def get_config(arg: str = "icl_pmd_pfr") -> default.Config:
    c = grocery.get_config(arg)
    c.unlock()
    c.num_updates = 320
    c.data.min_scale = 0.6  # most of a pattern must be seen
    c.data.resize = 72  # evaluation at training's scale, as in grocery.py
    c.data.erase = 0.0  # and with more clips than grocery's there is less to learn by heart
    pmd, pfr = default.stage(arg)
    c.loss.pmd, c.loss.pfr = 0.2 * pmd, 0.02 * pfr  # in so few updates the embedding comes first
    c.log_every, c.eval_every, c.checkpoint_every = 20, 0, 80
    return c.lock()
