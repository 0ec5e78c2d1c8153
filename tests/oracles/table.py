"""Every typed formula, by the name of the class that has to follow it."""

from __future__ import annotations

from oracles import dual, factored, formulas, matrix, modern, momentum, over9000, ranger21, relatives, self_tuning
from oracles.formulas import Formula

FORMULAS: dict[str, Formula] = {
    "AdaBelief": formulas.adabelief,
    "AdaPNM": momentum.adapnm,
    "Amos": factored.amos,
    "Adafactor": factored.adafactor,
    "Adam": formulas.adam,
    "AdamW": formulas.adamw,
    "ADOPT": relatives.adopt,
    "AdEMAMix": relatives.ademamix,
    "LaProp": relatives.laprop,
    "NAdamW": relatives.nadamw,
    "StableAdamW": relatives.stable_adamw,
    "Adan": modern.adan,
    "Lamb": modern.lamb,
    "Lion": modern.lion,
    "LookaheadAdam": over9000.lookahead_adam,
    "MADGRAD": dual.madgrad,
    "MirrorMADGRAD": dual.mirror_madgrad,
    "Muon": matrix.muon,
    "NorMuon": matrix.normuon,
    "NovoGrad": momentum.novograd,
    "PNM": momentum.pnm,
    "RAdam": formulas.radam,
    "Ralamb": over9000.ralamb,
    "RMSprop": formulas.rmsprop,
    "Ranger": formulas.ranger,
    "Ranger21": ranger21.ranger21,
    "RangerAdaBelief": formulas.ranger_adabelief,
    "RangerLars": over9000.ranger_lars,
    "SM3": over9000.sm3,
    "PSGDKron": matrix.psgd_kron,
    "Prodigy": self_tuning.prodigy,
    "ScheduleFreeAdamW": self_tuning.schedule_free_adamw,
    "ScheduleFreeRAdam": self_tuning.schedule_free_radam,
    "ScheduleFreeSGD": self_tuning.schedule_free_sgd,
    "SGD": formulas.sgd,
    "Shampoo": matrix.shampoo,
    "SOAP": matrix.soap,
}
