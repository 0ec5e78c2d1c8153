"""The shop window: one small file a family, each optimizer a short composition of rules and parts."""

from piste.optimizers.adabelief import AdaBelief as AdaBelief
from piste.optimizers.adam import Adam as Adam
from piste.optimizers.adam import AdamW as AdamW
from piste.optimizers.radam import RAdam as RAdam
from piste.optimizers.ranger import Ranger as Ranger
from piste.optimizers.ranger import RangerAdaBelief as RangerAdaBelief
from piste.optimizers.rmsprop import RMSprop as RMSprop
from piste.optimizers.sgd import SGD as SGD

__all__ = ["SGD", "AdaBelief", "Adam", "AdamW", "RAdam", "RMSprop", "Ranger", "RangerAdaBelief"]
