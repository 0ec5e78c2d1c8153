"""Learning rates, betas, eps and decay."""

from __future__ import annotations

from math import log10

from piste.advise.finding import Found, rule
from piste.advise.setup import Setup
from piste.presets import presets

_L2_BY_DEFAULT = ("adam", "radam", "nadam", "adamax", "lookaheadadam", "adabelief", "rangeradabelief")
_OWN_RULE_FOR_LR = ("adan", "lion", "prodigy")
_ADAMW_SCALE = 1e-3  # where most people's learning rate for AdamW is


@rule("warning", "The learning rate is far from where this optimizer works", "the lr_prior of piste's presets")
def lr_out_of_range(setup: Setup) -> Found:
    """Learning rates of different algorithms are in different units: a good one for SGD is a hundred times AdamW's, a
    good one for Lion a third. Outside the range that papers and races have found, a run diverges or stands still."""
    span = setup.lr_range()
    if setup.lr is None or span is None or setup.family in _OWN_RULE_FOR_LR:
        return None
    low, high = span
    if low / 3 < setup.lr < 3 * high:
        return None
    center = setup.preset.lr_prior.center if setup.preset else (low * high) ** 0.5
    return f"lr={setup.lr:g}; looked for in {low:.1g} … {high:.1g}", setup.code(lr=center)


@rule(
    "warning",
    "Adan has AdamW's learning rate",
    "Xie et al. 2022, arXiv 2208.06677; W&B report cited by the cheat-sheet",
)
def adan_lr(setup: Setup) -> Found:
    """Adan takes learning rates 5 to 10 times AdamW's. At AdamW's own it seems to be a slower AdamW, which is what
    many comparisons of it have measured."""
    if setup.family != "adan" or setup.lr is None or 2 * _ADAMW_SCALE < setup.lr <= 0.5:
        return None
    return f"lr={setup.lr:g}", setup.code(lr=10 * setup.lr if setup.lr < 1 else 2e-2)


@rule(
    "error",
    "Adan's betas are in the other convention",
    "Xie et al. 2022, arXiv 2208.06677; sail-sg/Adan; lucidrains/Adan-pytorch",
)
def adan_betas(setup: Setup) -> Found:
    """The paper (and lucidrains' port) writes the fraction that is taken in, (0.02, 0.08, 0.01); the authors' code,
    timm and piste the fraction kept, (0.98, 0.92, 0.99). Each class given the other's trains something absurd."""
    betas = setup.setting("betas")
    if setup.family != "adan" or betas is None:
        return None
    of_paper = setup.origin == "adan_pytorch"
    if (max(betas) < 0.5) == of_paper:
        return None
    return f"betas={tuple(betas)}", setup.code(betas=tuple(round(1 - beta, 6) for beta in betas))


@rule("warning", "Lion has AdamW's learning rate", "Chen et al. 2023, arXiv 2302.06675")
def lion_lr(setup: Setup) -> Found:
    """Every number of Lion's step is as large as the learning rate, which Adam's only seldom are: take a third to a
    tenth of AdamW's."""
    if setup.family != "lion" or setup.lr is None or setup.lr < _ADAMW_SCALE:
        return None
    return f"lr={setup.lr:g}", setup.code(lr=setup.lr / 10)


@rule("note", "Lion has AdamW's weight decay", "Chen et al. 2023, arXiv 2302.06675")
def lion_decay(setup: Setup) -> Found:
    """Decay acts through its product with the learning rate. At a learning rate three to ten times smaller, it has to
    be three to ten times larger for the same effect."""
    if setup.family != "lion" or not 0 < setup.weight_decay <= 0.01:
        return None
    decay = 10 * setup.weight_decay
    return f"weight_decay={setup.weight_decay:g}", setup.code(f"piste.param_groups(model, weight_decay={decay:g})")


@rule("note", "Lion trains on small batches", "Chen et al. 2023, arXiv 2302.06675, on batch sizes")
def lion_batch(setup: Setup) -> Found:
    """A sign tells nothing of how sure it is: noise in a small batch moves every weight as far as a clear gradient.
    Its authors see its advantage from batches of 64 upwards, growing with the batch."""
    if setup.family != "lion" or setup.batch_size is None or setup.batch_size >= 64:
        return None
    return (
        f"batch_size={setup.batch_size}",
        f"optimizer = piste.create('adamw', model, weight_decay={setup.weight_decay / 10:g})",
    )


@rule("warning", "Prodigy's lr is not 1", "Mishchenko & Defazio 2023, arXiv 2306.06101; prodigyopt")
def prodigy_lr(setup: Setup) -> Found:
    """Prodigy finds the learning rate; lr multiplies what it finds. Leave it at 1 and let a schedule move it; its
    authors' knob for larger or smaller estimates is d_coef."""
    if setup.family != "prodigy" or setup.lr is None or 0.3 <= setup.lr <= 3:
        return None
    return f"lr={setup.lr:g}", setup.code(lr=1.0)


@rule("warning", "Prodigy warms up without its safeguard", "prodigyopt, on safeguard_warmup")
def prodigy_warmup(setup: Setup) -> Found:
    """While a warm-up keeps steps small, Prodigy's estimate takes their smallness for a reason to take longer ones.
    safeguard_warmup leaves the learning rate out of that estimate."""
    guarded = setup.setting("safeguard_warmup", True)
    if setup.family != "prodigy" or guarded or setup.scheduler is None or not setup.trace or setup.trace.begins > 0.5:
        return None
    return f"the schedule begins at {setup.trace.begins:.2g} of its peak", setup.code(safeguard_warmup=True)


@rule(
    "warning",
    "AdaBelief's eps is not that of the field",
    "juntang-zhuang/Adabelief-Optimizer, README on epsilon; the cheat-sheet",
)
def adabelief_eps(setup: Setup) -> Found:
    """eps is inside AdaBelief's second moment, in every step, and decides whether it behaves like SGD or like Adam: its
    authors take 1e-8 where SGD does well (vision), 1e-16 where Adam does (language), 1e-12 for reinforcement
    learning."""
    eps, known = setup.setting("eps"), presets["adabelief"].domains.get(setup.field)
    if setup.family not in ("adabelief", "rangeradabelief") or eps is None or known is None or eps >= 1e-6:
        return None
    if abs(log10(float(eps)) - log10(known["eps"])) < 2:
        return None
    return f"eps={float(eps):g}, field {setup.field}: {known['eps']:g}", setup.code(eps=known["eps"])


@rule("error", "AdaBelief has Ranger's eps", "juntang-zhuang/Adabelief-Optimizer, README on epsilon")
def adabelief_eps_too_large(setup: Setup) -> Found:
    """AdaBelief adds eps to its second moment in every step, which at beta2 0.999 keeps it above 1000 eps. Ranger's
    1e-5, the default of the package ranger-adabelief, swamps it: what is left is momentum."""
    eps = setup.setting("eps")
    if setup.family not in ("adabelief", "rangeradabelief") or eps is None or eps < 1e-6:
        return None
    known = presets["adabelief"].domains.get(setup.field, {"eps": 1e-12})
    return f"eps={float(eps):g}", setup.code(eps=known["eps"])


@rule("error", "AdaBelief's fixed decay shrinks the weights in every step", "adabelief-pytorch 0.2.1, fixed_decay")
def adabelief_fixed_decay(setup: Setup) -> Found:
    """With fixed_decay weights are multiplied by 1 - weight_decay in each step, whatever the learning rate: 1e-2 halves
    them every 70 steps."""
    fixed = setup.setting("fixed_decay", getattr(setup.inner, "fixed_decay", False))
    if setup.family != "adabelief" or not fixed or setup.weight_decay < 1e-4:
        return None
    return f"weight_decay={setup.weight_decay:g}", setup.code(fixed_decay=False)


@rule("warning", "Weight decay is an L2 term inside Adam", "Loshchilov & Hutter 2019, arXiv 1711.05101")
def l2_in_adam(setup: Setup) -> Found:
    """L2 goes through Adam's denominator, so weights with large gradients are hardly decayed. Values that are usual for
    AdamW mean decoupled decay; torch's Adam, RAdam and NAdam need to be told."""
    if setup.family not in _L2_BY_DEFAULT or setup.decoupled is not False or setup.weight_decay < 1e-3:
        return None
    if setup.family == "adam" and setup.origin == "torch":
        return f"weight_decay={setup.weight_decay:g}", setup.code(cls="torch.optim.AdamW")
    return f"weight_decay={setup.weight_decay:g}", setup.code(decoupled_weight_decay=True)


@rule(
    "note",
    "beta2 = 0.999 on a long run of a language model",
    "Brown et al. 2020, arXiv 2005.14165 (0.95); Wortsman et al. 2023, arXiv 2304.13013",
)
def long_run_beta2(setup: Setup) -> Found:
    """A second moment that averages over a thousand steps is out of date when gradients grow quickly, and then a step
    is far too long: the spikes of large language-model runs. They are trained at beta2 0.95, or with StableAdamW."""
    betas, families = setup.setting("betas"), ("adam", "adamw", "nadam", "nadamw", "soap", "muon", "normuon", "lamb")
    if setup.family not in families or betas is None or setup.field != "nlp" or not setup.has_attention:
        return None
    if (setup.steps or 0) < 10_000 or betas[1] < 0.99:
        return None
    return f"betas={tuple(betas)}, {setup.steps:,} steps", setup.code(betas=(setup.made_with("betas")[0], 0.95))


@rule(
    "note",
    "Rectification lasts longer than the run",
    "Liu et al. 2019, arXiv 1908.03265; Ma & Yarats 2019, arXiv 1910.04209",
)
def rectified_short_run(setup: Setup) -> Found:
    """RAdam and what is built on it warm themselves up over about 2 / (1 - beta2) steps. In a run that is not much
    longer, the learning rate is never reached."""
    families = ("radam", "ranger", "rangeradabelief", "ralamb", "rangerlars")
    betas = setup.setting("betas")
    rectified = setup.family in families or (setup.family == "adabelief" and setup.setting("rectify", False))
    if not rectified or betas is None or setup.steps is None or setup.steps * (1 - betas[1]) >= 2:
        return None
    warmup = 2 / (1 - betas[1])
    return f"{warmup:,.0f} steps of warm-up, {setup.steps:,} steps in all", setup.code(
        betas=(setup.made_with("betas")[0], 0.99)
    )


@rule("warning", "EfficientNet's eps in torch's RMSprop", "timm's RMSpropTF; Tan & Le 2019, arXiv 1905.11946")
def rmsprop_eps(setup: Setup) -> Found:
    """TensorFlow's RMSprop adds eps under the root, torch's behind it: the recipe's 1e-3 is a floor of 0.03 there and
    of 0.001 here. Its recipes want TensorFlow's form."""
    eps = setup.setting("eps")
    if setup.family != "rmsprop" or setup.setting("tf", False) or eps is None or not 1e-4 <= eps <= 1e-2:
        return None
    return f"eps={float(eps):g}", setup.code(cls="piste.RMSprop", tf=True, foreach=None)


@rule(
    "note",
    "MADGRAD has the decay of another optimizer",
    "Defazio & Jelassi 2021, arXiv 2101.11075; the package's README",
)
def madgrad_decay(setup: Setup) -> Found:
    """MADGRAD's L2 term enters sums that are kept for ever. Its authors advise between none and a tenth of the decay
    that is usual on the problem."""
    if setup.family != "madgrad" or setup.decoupled or setup.weight_decay < 5e-3:
        return None
    return f"weight_decay={setup.weight_decay:g}", setup.code(
        f"piste.param_groups(model, weight_decay={setup.weight_decay / 10:g})"
    )


@rule("warning", "AdEMAMix starts at full strength", "Pagliardini et al. 2024, arXiv 2409.03137")
def ademamix_warmup(setup: Setup) -> Found:
    """Its slow average is not bias-corrected and weighs several times the fast one; without a warm-up of alpha and
    beta3 over the run, its authors see early divergence."""
    unset = [setup.setting(key) for key in ("warmup_steps", "alpha_warmup", "beta3_warmup", "t_alpha_beta3")]
    if setup.family != "ademamix" or any(unset) or (setup.steps or 0) < 1000:
        return None
    return f"{setup.steps:,} steps and no warm-up of its own", setup.code(warmup_steps=setup.steps)


@rule(
    "note",
    "SGD without momentum at the learning rate of SGD with it",
    "torch.optim.SGD; Goyal et al. 2017, arXiv 1706.02677; the cheat-sheet",
)
def sgd_without_momentum(setup: Setup) -> Found:
    """Plain SGD at a learning rate meant for momentum is ten times slower than it looks: momentum 0.9 adds up ten
    steps. The cheat-sheet's settings are momentum 0.9 and Nesterov."""
    if setup.family != "sgd" or setup.setting("momentum", 0) or setup.lr is None or not setup.trained:
        return None
    if len(setup.trained) < 3 or setup.lr > 0.1:
        return None
    return f"momentum=0, lr={setup.lr:g}", setup.code(momentum=0.9, nesterov=True)


@rule(
    "warning",
    "Ranger21's released code decays one tensor alone",
    "ranger21 0.1.0, reproduced in tests/test_parity_ranger21.py",
)
def ranger21_decay(setup: Setup) -> Found:
    """In the released code decay and norm loss stand beside the loop over parameters instead of in it: they act on the
    last tensor of a group, and all others have none."""
    as_released = setup.origin == "ranger21" or setup.setting("faithful", False)
    if setup.family != "ranger21" or not as_released or not setup.weight_decay:
        return None
    return f"weight_decay={setup.weight_decay:g} for one tensor", setup.code(
        cls="piste.Ranger21", faithful=None, total_steps=setup.steps
    )


@rule(
    "error",
    "Amos's extra decay makes weights grow",
    "pytorch_optimizer's Amos, run; Tian & Parikh 2022, arXiv 2210.11693",
)
def amos_extra_l2(setup: Setup) -> Found:
    """pytorch_optimizer's Amos subtracts extra_l2 from the decay where the paper adds it: at 0.1 and a small gradient,
    weights grow by five percent in a step."""
    if setup.family != "amos" or setup.origin != "pytorch_optimizer" or not setup.setting("extra_l2", 0):
        return None
    return f"extra_l2={setup.setting('extra_l2'):g}", setup.code(cls="piste.Amos", extra_l2=None)


@rule(
    "note",
    "Gradients are clipped that the optimizer clips itself",
    "Shazeer & Stern 2018, arXiv 1804.04235; Wortsman et al. 2023, arXiv 2304.13013; timm's Lamb",
)
def clipped_twice(setup: Setup) -> Found:
    """Adafactor and StableAdamW shorten each tensor's step where its gradient is surprising, and LAMB of timm and apex
    clips the global norm to 1 unasked. A clip outside on top makes comparisons unfair and tuning harder."""
    own = setup.family in ("adafactor", "stableadamw") or (setup.family == "lamb" and setup.setting("max_grad_norm"))
    if not own or not setup.clip_norm:
        return None
    return (
        f"clip_norm={setup.clip_norm:g} before {type(setup.inner).__name__}",
        "# without clip_grad_norm_\noptimizer.step()",
    )


RULES = (
    *(lr_out_of_range, adan_lr, adan_betas, lion_lr, lion_decay, lion_batch, prodigy_lr, prodigy_warmup),
    *(adabelief_eps, adabelief_eps_too_large, adabelief_fixed_decay, l2_in_adam, long_run_beta2),
    *(rectified_short_run, rmsprop_eps, madgrad_decay, ademamix_warmup, sgd_without_momentum),
    *(ranger21_decay, amos_extra_l2, clipped_twice),
)
