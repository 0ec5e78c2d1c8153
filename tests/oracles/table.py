"""Every typed formula, by the name of the class that has to follow it."""

from __future__ import annotations

from oracles import dual, formulas, modern, momentum
from oracles.formulas import Formula

FORMULAS: dict[str, Formula] = {
    "AdaBelief": formulas.adabelief,
    "AdaPNM": momentum.adapnm,
    "Adam": formulas.adam,
    "AdamW": formulas.adamw,
    "Adan": modern.adan,
    "Lamb": modern.lamb,
    "Lion": modern.lion,
    "MADGRAD": dual.madgrad,
    "MirrorMADGRAD": dual.mirror_madgrad,
    "NovoGrad": momentum.novograd,
    "PNM": momentum.pnm,
    "RAdam": formulas.radam,
    "RMSprop": formulas.rmsprop,
    "Ranger": formulas.ranger,
    "RangerAdaBelief": formulas.ranger_adabelief,
    "SGD": formulas.sgd,
}
