"""Where each optimizer comes from: its paper, what it keeps, and the implementation it is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from piste import optimizers
from piste.optimizer import Optimizer

__all__ = ["OPTIMIZERS", "OptimizerInfo"]


@dataclass(frozen=True)
class OptimizerInfo:
    """One row of the registry.

    Args:
        name: of the class.
        optimizer: the class.
        family: the file of ``piste.optimizers`` it stands in.
        state: the tensors it may keep per weight, in the worst case of its settings.
        source: the paper or the code that defines it.
        oracle: the independent implementation that tests compare it with.
    """

    name: str
    optimizer: type[Optimizer]
    family: str
    state: tuple[str, ...]
    source: str
    oracle: str


def _info(optimizer: type[Optimizer], state: str, source: str, oracle: str) -> OptimizerInfo:
    family = optimizer.__module__.rpartition(".")[2]
    return OptimizerInfo(optimizer.__name__, optimizer, family, tuple(state.split()), source, oracle)


#: every optimizer class of piste, in the order of their names
OPTIMIZERS: tuple[OptimizerInfo, ...] = (
    _info(optimizers.AdaBelief, "m s smax", "Zhuang et al. 2020, arXiv 2010.07468", "adabelief-pytorch 0.2.1"),
    _info(
        optimizers.Adafactor,
        "row col v m",
        "Shazeer & Stern 2018, arXiv 1804.04235",
        "float64 formulas, transformers 5.23.0, torch.optim.Adafactor",
    ),
    _info(optimizers.Adam, "m v vmax", "Kingma & Ba 2015, arXiv 1412.6980", "torch.optim.Adam"),
    _info(optimizers.AdamW, "m v vmax", "Loshchilov & Hutter 2019, arXiv 1711.05101", "torch.optim.AdamW"),
    _info(optimizers.Adan, "m d n previous", "Xie et al. 2022, arXiv 2208.06677", "timm Adan"),
    _info(optimizers.AdaPNM, "odd even v vmax", "Xie et al. 2021, arXiv 2103.17182", "pytorch_optimizer AdaPNM"),
    _info(optimizers.AdEMAMix, "m slow v", "Pagliardini et al. 2024, arXiv 2409.03137", "pytorch_optimizer AdEMAMix"),
    _info(optimizers.ADOPT, "m v", "Taniguchi et al. 2024, arXiv 2411.02853", "timm Adopt"),
    _info(optimizers.Amos, "v b m", "Tian & Parikh 2022, arXiv 2210.11693", "float64 formulas, jestimator 0.3.3"),
    _info(optimizers.Lamb, "m v", "You et al. 2020, arXiv 1904.00962", "timm Lamb, pytorch-lamb 1.0.0"),
    _info(optimizers.LaProp, "m v", "Ziyin et al. 2020, arXiv 2002.04839", "timm LaProp"),
    _info(optimizers.Lion, "m", "Chen et al. 2023, arXiv 2302.06675", "timm Lion"),
    _info(
        optimizers.LookaheadAdam,
        "m v vmax slow",
        "Zhang et al. 2019, arXiv 1907.08610",
        "torch.optim.Adam, timm Lookahead",
    ),
    _info(optimizers.MADGRAD, "nu s x0", "Defazio & Jelassi 2021, arXiv 2101.11075", "madgrad 1.3, timm MADGRAD"),
    _info(optimizers.MirrorMADGRAD, "nu z", "Defazio & Jelassi 2021, madgrad 1.3", "madgrad 1.3"),
    _info(
        optimizers.Muon,
        "buf m v",
        "Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982",
        "torch.optim.Muon, float64 formulas",
    ),
    _info(optimizers.NAdamW, "m v product", "Dozat 2016", "torch.optim.NAdam"),
    _info(optimizers.NorMuon, "buf rows m v", "Li et al. 2025, arXiv 2510.05491", "float64 formulas"),
    _info(optimizers.NovoGrad, "m v vmax", "Ginsburg et al. 2019, arXiv 1905.11286", "timm NvNovoGrad"),
    _info(optimizers.PNM, "odd even", "Xie et al. 2021, arXiv 2103.17182", "pytorch_optimizer PNM"),
    _info(optimizers.Prodigy, "m v s x0", "Mishchenko & Defazio 2023, arXiv 2306.06101", "prodigyopt 1.1.2"),
    _info(
        optimizers.PSGDKron,
        "m factors",
        "Li 2018, arXiv 1512.04202; Li 2024, arXiv 2402.11858",
        "float64 formulas, numbers of kron_torch 884427c",
    ),
    _info(optimizers.RAdam, "m v", "Liu et al. 2019, arXiv 1908.03265", "torch.optim.RAdam"),
    _info(optimizers.Ralamb, "m v", "Grankin 2019, mgrankin/over9000", "float64 formulas"),
    _info(optimizers.Ranger, "m v slow", "Wright 2019, ranger.py 20.4.11", "float64 formulas"),
    _info(
        optimizers.Ranger21,
        "odd even v vmax slow",
        "Wright & Demeure 2021, arXiv 2106.13731",
        "float64 formulas, ranger21 0.1.0",
    ),
    _info(optimizers.RangerAdaBelief, "m s slow", "Zhuang et al. 2020, arXiv 2010.07468", "ranger-adabelief 0.1.0"),
    _info(optimizers.RangerLars, "m v slow", "Grankin 2019, mgrankin/over9000", "float64 formulas"),
    _info(optimizers.RMSprop, "v gbar buf", "Hinton et al. 2012, lecture 6e", "torch.optim.RMSprop, timm RMSpropTF"),
    _info(optimizers.ScheduleFreeAdamW, "z v", "Defazio et al. 2024, arXiv 2405.15682", "schedulefree 1.4.1"),
    _info(optimizers.ScheduleFreeRAdam, "z v", "Defazio et al. 2024, arXiv 2405.15682", "schedulefree 1.4.1"),
    _info(optimizers.ScheduleFreeSGD, "z", "Defazio et al. 2024, arXiv 2405.15682", "schedulefree 1.4.1"),
    _info(optimizers.SGD, "buf", "Sutskever et al. 2013", "torch.optim.SGD"),
    _info(
        optimizers.Shampoo,
        "factors roots bases m v m_graft eigenvalues statistics",
        "Gupta et al. 2018, arXiv 1802.09568; Anil et al. 2020, arXiv 2002.09018; Shi et al. 2023, arXiv 2309.06497",
        "float64 formulas, numbers of facebookresearch/optimizers",
    ),
    _info(
        optimizers.SM3, "buf acc acc0 acc1", "Anil et al. 2019, arXiv 1901.11150", "optax 0.2.8 sm3, float64 formulas"
    ),
    _info(
        optimizers.SOAP,
        "factors bases m v statistics",
        "Vyas et al. 2024, arXiv 2409.11321",
        "float64 formulas, the authors' soap.py",
    ),
    _info(optimizers.StableAdamW, "m v", "Wortsman et al. 2023, arXiv 2304.13013", "torch-optimi StableAdamW"),
)
