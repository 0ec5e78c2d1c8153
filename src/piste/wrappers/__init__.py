"""Wrappers around any ``torch.optim.Optimizer``: ours, torch's, a third party's."""

from piste.wrappers.lookahead import Lookahead as Lookahead

__all__ = ["Lookahead"]
