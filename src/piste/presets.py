"""Named, sourced configurations: which optimizer, with which settings, on which weights, under which schedule.

    >>> from piste.presets import presets
    >>> presets["sgd_nesterov"].hyperparameters
    {'momentum': 0.9, 'nesterov': True}
    >>> presets["ranger"].schedule
    'flat_cosine'

`piste.create` turns a preset into an optimizer on a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from piste import optimizers
from piste.lr_priors import LrPrior, habits
from piste.preset import Preset, Presets, WeightDecay

__all__ = ["LrPrior", "Preset", "Presets", "WeightDecay", "presets"]

_NORMS_SPARED = WeightDecay(true_wd=True, bn_wd=False)
_L2_NORMS_SPARED = WeightDecay(true_wd=False, bn_wd=False)
_MAPPING = "the cheat-sheet's optimizer_config_mapping"
_EPS = "eps per domain: the README of juntang-zhuang/Adabelief-Optimizer, section on epsilon"
_DOMAINS = {"vision": {"eps": 1e-8}, "nlp": {"eps": 1e-16}, "rl": {"eps": 1e-12}}


def _preset(
    name: str,
    optimizer: type[torch.optim.Optimizer],
    hyperparameters: Mapping[str, Any],
    wd: WeightDecay,
    source: str,
    description: str,
    **others: Any,
) -> Preset:
    schedule, prior = habits(optimizer.__name__, hyperparameters)
    defaults: dict[str, Any] = {"schedule": schedule, "lr_prior": prior}
    return Preset(name, optimizer, hyperparameters, wd, source=source, description=description, **(defaults | others))


#: the built-in presets: the cheat-sheet's nine, its last recipe, and one for each class that it does not configure
presets = Presets(
    {
        preset.name: preset
        for preset in (
            # the cheat-sheet decays norms and biases here (bn_wd) and has a recipe of its own that spares them; the
            # presets below that are not its own spare them, as is the custom
            _preset(
                "adamw",
                optimizers.AdamW,
                {},
                WeightDecay(true_wd=True, bn_wd=True),
                f"{_MAPPING}; Loshchilov & Hutter 2019, arXiv 1711.05101",
                "AdamW that decays every parameter: the baseline that others must beat.",
            ),
            _preset(
                "adamw_no_decay",
                optimizers.AdamW,
                {"lr": 1e-5, "weight_decay": 0.01},
                _NORMS_SPARED,
                "the cheat-sheet's recipe “AdamW no decay for bias/layernorm weight”",
                "AdamW for fine-tuning transformers: small steps, norms and biases not decayed.",
                lr_prior=LrPrior(2e-5, 1.0, 1.0),
            ),
            _preset(
                "ranger",
                optimizers.Ranger,
                {},
                _NORMS_SPARED,
                f"{_MAPPING}; Wright 2019, lessw2020/Ranger-Deep-Learning-Optimizer",
                "Rectified Adam with Lookahead on centralized gradients; the cheat-sheet's favourite.",
            ),
            _preset(
                "ranger_nogc",
                optimizers.Ranger,
                {"use_gc": False},
                _NORMS_SPARED,
                f"{_MAPPING}; Wright 2019, lessw2020/Ranger-Deep-Learning-Optimizer",
                "Ranger without gradient centralization.",
            ),
            _preset(
                "ranger21",
                optimizers.Ranger21,
                {},
                _NORMS_SPARED,
                "Wright & Demeure 2021, arXiv 2106.13731; ranger21 0.1.0",
                "Ranger's heir with eight more ideas; say total_steps= for the schedule inside, and no other.",
                schedule="constant",
            ),
            _preset(
                "ranger21_madgrad",
                optimizers.Ranger21,
                {"use_madgrad": True},
                _NORMS_SPARED,
                "Wright & Demeure 2021, arXiv 2106.13731; ranger21 0.1.0",
                "Ranger21 on MADGRAD's dual averages in Adam's place, which the cheat-sheet suggests for transformers.",
                schedule="constant",
            ),
            _preset(
                "rangeradabelief",
                optimizers.RangerAdaBelief,
                {},
                _NORMS_SPARED,
                f"{_MAPPING}; Zhuang et al. 2020, arXiv 2010.07468; {_EPS}",
                "Ranger with AdaBelief's second moment; say domain= to get its eps right.",
                domains=_DOMAINS,
            ),
            _preset(
                "rangeradabelief_nogc",
                optimizers.RangerAdaBelief,
                {"use_gc": False},
                _NORMS_SPARED,
                f"{_MAPPING}; Zhuang et al. 2020, arXiv 2010.07468; {_EPS}",
                "RangerAdaBelief without gradient centralization.",
                domains=_DOMAINS,
            ),
            _preset(
                "sgd",
                optimizers.SGD,
                {"momentum": 0, "nesterov": False},
                _NORMS_SPARED,
                _MAPPING,
                "Plain gradient descent: no state, much tuning.",
                set_betas=False,
            ),
            _preset(
                "sgd_momentum",
                optimizers.SGD,
                {"momentum": 0.9, "nesterov": False},
                _NORMS_SPARED,
                _MAPPING,
                "SGD with momentum: the one to beat on convolutional nets.",
                set_betas=False,
            ),
            _preset(
                "sgd_nesterov",
                optimizers.SGD,
                {"momentum": 0.9, "nesterov": True},
                _NORMS_SPARED,
                f"{_MAPPING}; Sutskever et al. 2013",
                "SGD with Nesterov momentum; the cheat-sheet's choice among the older optimizers, for vision.",
                set_betas=False,
            ),
            _preset(
                "rmsprop",
                optimizers.RMSprop,
                {"momentum": 0.9},
                _NORMS_SPARED,
                f"{_MAPPING}; Hinton et al. 2012, lecture 6e",
                "RMSprop with momentum, torch's form.",
                set_betas=False,
            ),
            _preset(
                "adam",
                optimizers.Adam,
                {},
                _L2_NORMS_SPARED,
                "Kingma & Ba 2015, arXiv 1412.6980",
                "Adam with L2, if any decay; adamw is its better-behaved form.",
            ),
            _preset(
                "radam",
                optimizers.RAdam,
                {},
                _L2_NORMS_SPARED,
                "Liu et al. 2019, arXiv 1908.03265",
                "Adam that warms itself up; its default settings, as in torch.",
            ),
            _preset(
                "laprop",
                optimizers.LaProp,
                {},
                _NORMS_SPARED,
                "Ziyin et al. 2020, arXiv 2002.04839",
                "Momentum of normalised gradients: calmer than Adam where they are noisy.",
            ),
            _preset(
                "adopt",
                optimizers.ADOPT,
                {},
                _NORMS_SPARED,
                "Taniguchi et al. 2024, arXiv 2411.02853",
                "Adam that converges at any beta2, with its authors' clipping.",
            ),
            _preset(
                "nadamw",
                optimizers.NAdamW,
                {},
                _NORMS_SPARED,
                "Dozat 2016; Dahl et al. 2023, arXiv 2306.07179",
                "AdamW with Nesterov's momentum, the baseline of AlgoPerf.",
            ),
            _preset(
                "stableadamw",
                optimizers.StableAdamW,
                {},
                _NORMS_SPARED,
                "Wortsman et al. 2023, arXiv 2304.13013",
                "AdamW that shortens surprising steps, in the place of gradient clipping.",
            ),
            _preset(
                "ademamix",
                optimizers.AdEMAMix,
                {},
                _NORMS_SPARED,
                "Pagliardini et al. 2024, arXiv 2409.03137",
                "AdamW with a second, very slow average; say warmup_steps= on long runs.",
            ),
            _preset(
                "adan",
                optimizers.Adan,
                {"weight_decay": 0.02},
                _NORMS_SPARED,
                "Xie et al. 2022, arXiv 2208.06677",
                "Adaptive Nesterov momentum; learning rates five to ten times AdamW's.",
            ),
            _preset(
                "lamb",
                optimizers.Lamb,
                {},
                _NORMS_SPARED,
                "You et al. 2020, arXiv 1904.00962",
                "Adam with layer-wise steps as long as the weights: large batches.",
            ),
            _preset(
                "lion",
                optimizers.Lion,
                {"weight_decay": 0.1},
                _NORMS_SPARED,
                "Chen et al. 2023, arXiv 2302.06675",
                "The sign of momentum: half of Adam's state, a third of its learning rate, ten times its decay.",
            ),
            _preset(
                "lookaheadadam",
                optimizers.LookaheadAdam,
                {},
                _L2_NORMS_SPARED,
                "mgrankin/over9000; Zhang et al. 2019, arXiv 1907.08610",
                "Adam with Lookahead, the plain pair of over9000.",
            ),
            _preset(
                "ralamb",
                optimizers.Ralamb,
                {},
                _NORMS_SPARED,
                "mgrankin/over9000, its trust ratio repaired",
                "Rectified Adam with LAMB's steps as long as the weights.",
                schedule="flat_cosine",
            ),
            _preset(
                "rangerlars",
                optimizers.RangerLars,
                {},
                _NORMS_SPARED,
                "mgrankin/over9000, its trust ratio repaired",
                "Ralamb with Lookahead.",
            ),
            _preset(
                "over9000",
                optimizers.RangerLars,
                {"trust_denominator": "weights", "late_start": True},
                _NORMS_SPARED,
                "mgrankin/over9000 as released",
                "RangerLars as its published results had it: a trust ratio near 1, Lookahead that starts late.",
            ),
            _preset(
                "shampoo",
                optimizers.Shampoo,
                {},
                _NORMS_SPARED,
                "Shi et al. 2023, arXiv 2309.06497",
                "Shampoo at Adam's length, its roots renewed every ten steps.",
            ),
            _preset(
                "shampoo_meta",
                optimizers.Shampoo,
                {"every": 100, "start": 100, "block_size": 8192, "weight_decay": 1e-5},
                _NORMS_SPARED,
                "facebookresearch/optimizers, example 3 of its README",
                "Meta's Shampoo as its authors use it in Adam's place: large blocks, roots every hundred steps.",
            ),
            _preset(
                "shampoo_google",
                optimizers.Shampoo,
                {
                    "form": "google",
                    "graft": "sgd",
                    "eps": 1e-6,
                    "relative_eps": True,
                    "root": "newton",
                    "start": 6,
                    "nesterov": True,
                },
                _L2_NORMS_SPARED,
                "Anil et al. 2020, arXiv 2002.09018; google-research scalable_shampoo, its defaults",
                "Google's Shampoo at the length of SGD with Nesterov momentum; roots every ten steps, not every step.",
                lr_prior=LrPrior(0.05),
            ),
            _preset(
                "shampoo_onesided",
                optimizers.Shampoo,
                {"sides": "one"},
                _NORMS_SPARED,
                "Xie et al. 2025, arXiv 2503.10537; An et al. 2025, arXiv 2503.20762",
                "Shampoo from the shorter side alone, by an inverse square root, at Adam's length.",
            ),
            _preset(
                "shampoo_corrected",
                optimizers.Shampoo,
                {"corrected": True, "graft": "none", "eps": 1e-8, "start": 1},
                _NORMS_SPARED,
                "Vyas et al. 2024, arXiv 2409.11321; facebookresearch/optimizers, EigenvalueCorrectedShampoo",
                "SOAP as Meta has it: momentum stays in the weights' basis and no step is left out.",
            ),
            _preset(
                "psgdkron",
                optimizers.PSGDKron,
                {},
                _NORMS_SPARED,
                "Li 2018, arXiv 1512.04202; Li 2024, arXiv 2402.11858; kron_torch",
                "Momentum whitened by triangular factors that are found by descent.",
                set_betas=False,
            ),
            _preset(
                "soap",
                optimizers.SOAP,
                {},
                _NORMS_SPARED,
                "Vyas et al. 2024, arXiv 2409.11321",
                "Adam in the eigenbasis of Shampoo's factors, renewed every ten steps.",
            ),
            _preset(
                "sm3",
                optimizers.SM3,
                {},
                _NORMS_SPARED,
                "Anil et al. 2019, arXiv 1901.11150",
                "Adagrad in the memory of momentum alone; constant learning rate after a warm-up.",
                set_betas=False,
            ),
            _preset(
                "madgrad",
                optimizers.MADGRAD,
                {},
                _L2_NORMS_SPARED,
                "Defazio & Jelassi 2021, arXiv 2101.11075",
                "Dual averaging with a cube root, its default settings; sweep the learning rate anew.",
                set_betas=False,
            ),
            _preset(
                "mirrormadgrad",
                optimizers.MirrorMADGRAD,
                {},
                _NORMS_SPARED,
                "Defazio & Jelassi 2021, the package madgrad 1.3",
                "MADGRAD's mirror form, for large transformers.",
                set_betas=False,
            ),
            _preset(
                "muon",
                optimizers.Muon,
                {},
                _NORMS_SPARED,
                "Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982",
                "Orthogonal momentum for hidden matrices, AdamW for embeddings, heads, norms and biases.",
            ),
            _preset(
                "normuon",
                optimizers.NorMuon,
                {},
                _NORMS_SPARED,
                "Li et al. 2025, arXiv 2510.05491",
                "Muon whose rows are brought to one size.",
            ),
            _preset(
                "novograd",
                optimizers.NovoGrad,
                {"weight_decay": 1e-3},
                _L2_NORMS_SPARED,
                "Ginsburg et al. 2019, arXiv 1905.11286",
                "Momentum of layer-wise normalised gradients, at half of Adam's memory.",
            ),
            _preset(
                "pnm",
                optimizers.PNM,
                {},
                _L2_NORMS_SPARED,
                "Xie et al. 2021, arXiv 2103.17182",
                "SGD with positive-negative momentum: more noise, the same mean.",
                set_betas=False,
            ),
            _preset(
                "adapnm",
                optimizers.AdaPNM,
                {},
                _NORMS_SPARED,
                "Xie et al. 2021, arXiv 2103.17182",
                "Adam with positive-negative momentum and amsgrad, its authors' settings.",
            ),
            _preset(
                "adafactor",
                optimizers.Adafactor,
                {"lr": 1e-2},
                _NORMS_SPARED,
                "Shazeer & Stern 2018, arXiv 1804.04235",
                "Adam's second moment in rows and columns, steps relative to the weight's size: next to no state.",
            ),
            _preset(
                "amos",
                optimizers.Amos,
                {"momentum": 0.9},
                _NORMS_SPARED,
                "Tian & Parikh 2022, arXiv 2210.11693",
                "Decay towards scales that the model's layers call for; they are filled in from the modules.",
                schedule="constant",
            ),
            _preset(
                "prodigy",
                optimizers.Prodigy,
                {"safeguard_warmup": True},  # its companion schedule warms up; as prodigyopt advises then
                _NORMS_SPARED,
                "Mishchenko & Defazio 2023, arXiv 2306.06101; prodigyopt, on safeguard_warmup",
                "AdamW that finds its learning rate; lr is the schedule alone and begins at 1.",
            ),
            _preset(
                "schedulefreesgd",
                optimizers.ScheduleFreeSGD,
                {},
                _L2_NORMS_SPARED,
                "Defazio et al. 2024, arXiv 2405.15682",
                "SGD that averages in the place of a schedule; eval() and train() switch its weights.",
                schedule="constant",
            ),
            _preset(
                "schedulefreeadamw",
                optimizers.ScheduleFreeAdamW,
                {},
                _NORMS_SPARED,
                "Defazio et al. 2024, arXiv 2405.15682",
                "AdamW that averages in the place of a schedule; eval() and train() switch its weights.",
                schedule="constant",
            ),
            _preset(
                "schedulefreeradam",
                optimizers.ScheduleFreeRAdam,
                {},
                _NORMS_SPARED,
                "Defazio et al. 2024, arXiv 2405.15682",
                "The same with RAdam's rectifier as its warm-up.",
                schedule="constant",
            ),
            _preset(
                "adabelief",
                optimizers.AdaBelief,
                {},
                _NORMS_SPARED,
                f"Zhuang et al. 2020, arXiv 2010.07468; adabelief-pytorch 0.2; {_EPS}",
                "AdaBelief, rectified and decoupled; say domain= to get its eps right.",
                domains=_DOMAINS,
            ),
        )
    }
)
