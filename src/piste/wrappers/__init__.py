"""Wrappers around any ``torch.optim.Optimizer`` (ours, torch's, a third party's), and a model's average beside one."""

from piste.wrappers.ema import ModelEMA as ModelEMA
from piste.wrappers.graft import Graft as Graft
from piste.wrappers.lookahead import Lookahead as Lookahead
from piste.wrappers.sharpness import SAM as SAM
from piste.wrappers.sharpness_family import ESAM as ESAM
from piste.wrappers.sharpness_family import GSAM as GSAM
from piste.wrappers.sharpness_family import LookSAM as LookSAM
from piste.wrappers.sharpness_loop import sharpness_step as sharpness_step
from piste.wrappers.trajectory import MESA as MESA
from piste.wrappers.trajectory import SAF as SAF

__all__ = ["ESAM", "GSAM", "MESA", "SAF", "SAM", "Graft", "LookSAM", "Lookahead", "ModelEMA", "sharpness_step"]
