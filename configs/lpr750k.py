"""The official recipe on LPR750K: --config lpr750k:STAGE, a stage of configs/default.py (docs/official.md 7.7)."""

from configs import default


def get_config(arg: str = "icl_pmd_pfr") -> default.Config:
    c = default.get_config()
    c.unlock()
    c.batch_size = 128  # as in the official README; its config files say 96
    c.loss.pmd, c.loss.pfr = default.stage(arg)
    if arg == "icl":
        c.optimizer.logit_scale_lr_multiplier = 100.0  # its norm_s is in a x100 group (docs/official.md 3.4)
    c.data.test_tail_cut = True  # as the official evaluation does [15]
    return c.lock()
