"""Wrappers around any ``torch.optim.Optimizer`` (ours, torch's, a third party's), and a model's average beside one."""

from piste.wrappers.ema import ModelEMA as ModelEMA
from piste.wrappers.graft import Graft as Graft
from piste.wrappers.lookahead import Lookahead as Lookahead

__all__ = ["Graft", "Lookahead", "ModelEMA"]
