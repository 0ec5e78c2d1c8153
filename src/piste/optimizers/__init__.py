"""The shop window: one small file a family, each optimizer a short composition of rules and parts."""

from piste.optimizers.adabelief import AdaBelief as AdaBelief
from piste.optimizers.adafactor import Adafactor as Adafactor
from piste.optimizers.adam import Adam as Adam
from piste.optimizers.adam import AdamW as AdamW
from piste.optimizers.adam_family import ADOPT as ADOPT
from piste.optimizers.adam_family import AdEMAMix as AdEMAMix
from piste.optimizers.adam_family import LaProp as LaProp
from piste.optimizers.adam_family import NAdamW as NAdamW
from piste.optimizers.adam_family import StableAdamW as StableAdamW
from piste.optimizers.adan import Adan as Adan
from piste.optimizers.amos import Amos as Amos
from piste.optimizers.lamb import Lamb as Lamb
from piste.optimizers.lion import Lion as Lion
from piste.optimizers.madgrad import MADGRAD as MADGRAD
from piste.optimizers.madgrad import MirrorMADGRAD as MirrorMADGRAD
from piste.optimizers.muon import Muon as Muon
from piste.optimizers.muon import NorMuon as NorMuon
from piste.optimizers.novograd import NovoGrad as NovoGrad
from piste.optimizers.over9000 import LookaheadAdam as LookaheadAdam
from piste.optimizers.over9000 import Ralamb as Ralamb
from piste.optimizers.over9000 import RangerLars as RangerLars
from piste.optimizers.pnm import PNM as PNM
from piste.optimizers.pnm import AdaPNM as AdaPNM
from piste.optimizers.prodigy import Prodigy as Prodigy
from piste.optimizers.psgd import PSGDKron as PSGDKron
from piste.optimizers.radam import RAdam as RAdam
from piste.optimizers.ranger import Ranger as Ranger
from piste.optimizers.ranger import RangerAdaBelief as RangerAdaBelief
from piste.optimizers.ranger21 import Ranger21 as Ranger21
from piste.optimizers.rmsprop import RMSprop as RMSprop
from piste.optimizers.schedule_free import ScheduleFreeAdamW as ScheduleFreeAdamW
from piste.optimizers.schedule_free import ScheduleFreeRAdam as ScheduleFreeRAdam
from piste.optimizers.schedule_free import ScheduleFreeSGD as ScheduleFreeSGD
from piste.optimizers.sgd import SGD as SGD
from piste.optimizers.shampoo import Shampoo as Shampoo
from piste.optimizers.sm3 import SM3 as SM3
from piste.optimizers.soap import SOAP as SOAP

__all__ = [
    "ADOPT",
    "MADGRAD",
    "PNM",
    "SGD",
    "SM3",
    "SOAP",
    "AdEMAMix",
    "AdaBelief",
    "AdaPNM",
    "Adafactor",
    "Adam",
    "AdamW",
    "Adan",
    "Amos",
    "LaProp",
    "Lamb",
    "Lion",
    "LookaheadAdam",
    "MirrorMADGRAD",
    "Muon",
    "NAdamW",
    "NorMuon",
    "NovoGrad",
    "PSGDKron",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "Ralamb",
    "Ranger",
    "Ranger21",
    "RangerAdaBelief",
    "RangerLars",
    "ScheduleFreeAdamW",
    "ScheduleFreeRAdam",
    "ScheduleFreeSGD",
    "Shampoo",
    "StableAdamW",
]
