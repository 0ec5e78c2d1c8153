"""What else is worth a race: nothing here is wrong."""

from __future__ import annotations

import logging

from torch import nn

from piste.advise.finding import Found, rule
from piste.advise.setup import Setup
from piste.memory import MemoryEstimate, estimate_memory

logger = logging.getLogger("piste")

_LARGE, _LARGE_BATCH = 100_000_000, 4096
_STATE_WORTH_SAVING = 1 << 28
_NUMBERS_WORTH_COUNTING = 1 << 23  # with fewer, no optimizer keeps so much
_ADAM_LIKE = ("adam", "adamw", "nadam", "nadamw", "radam", "ranger", "adan", "stableadamw", "laprop", "lookaheadadam")


def _race(names: str) -> str:
    return f"piste race TASK.py --optimizers {names}"


@rule(
    "suggestion",
    "AdamW rather than Adafactor, where its state fits",
    "Rae et al. 2021 (Gopher), arXiv 2112.11446; the cheat-sheet",
)
def adafactor_for_language(setup: Setup) -> Found:
    """Gopher's authors found Adafactor less stable and worse than AdamW at large sizes. What AdamW's state costs in 8
    bits is a quarter, and often fits after all."""
    if setup.family != "adafactor" or setup.field != "nlp" or setup.size < _LARGE:
        return None
    cost, coded = _cost(setup, "adamw"), _cost(setup, "adamw", state="8bit")
    numbers = f"AdamW's state: {_gib(cost.state)}, in 8 bits {_gib(coded.state)}" if cost and coded else "AdamW"
    return numbers, "optimizer = piste.create('adamw', model, state='8bit')"


@rule("suggestion", "SGD or RMSprop for a convolutional net", "the cheat-sheet; Wilson et al. 2017, arXiv 1705.08292")
def older_for_vision(setup: Setup) -> Found:
    """On convolutional nets SGD with Nesterov's momentum 0.9, and RMSprop with momentum 0.9, may generalise better than
    adaptive methods, with half of Adam's state or less."""
    adaptive = setup.family in (*_ADAM_LIKE, "lion", "adabelief", "lamb")
    if not adaptive or setup.field != "vision" or setup.has_attention or not setup.has(nn.Conv2d, nn.Conv3d):
        return None
    return f"{type(setup.inner).__name__} on convolutions", _race(f"sgd_nesterov,rmsprop,{_here(setup)}")


def _here(setup: Setup) -> str:
    return setup.preset.name if setup.preset else "adamw"


@rule(
    "suggestion", "SAM for a vision transformer or an MLP-Mixer", "Chen et al. 2022, arXiv 2106.01548; the cheat-sheet"
)
def sam_for_transformers(setup: Setup) -> Found:
    """Without strong augmentation these nets end in sharp minima, and SAM has helped them more than others; at two
    passes a step, or 1.2 with LookSAM. It needs more than one epoch to be of use."""
    fits = setup.field == "vision" and (setup.has_attention or setup.is_mixer)
    if not fits or setup.sam is not None or (setup.epochs is not None and setup.epochs <= 1):
        return None
    return "attention or a mixer, on images", _race(f"{_here(setup)},sam+{_here(setup)},looksam+{_here(setup)}")


@rule(
    "suggestion",
    "The MADGRAD form for a transformer",
    "Wright & Demeure 2021; lessw2020/Ranger21; the cheat-sheet, use_madgrad",
)
def madgrad_for_transformers(setup: Setup) -> Found:
    """Ranger21's authors, and the cheat-sheet, expect its MADGRAD core to do better on transformers; MADGRAD's own
    authors give large ones its mirror form."""
    if not setup.has_attention:
        return None
    if setup.family == "ranger21" and not setup.setting("use_madgrad", True):
        return "Ranger21 with its AdamW core", setup.code(use_madgrad=True)
    if setup.family == "madgrad" and setup.size >= _LARGE:
        return f"MADGRAD on {setup.size:,} numbers", "optimizer = piste.create('mirrormadgrad', model)"
    return None


@rule("suggestion", "A layer-wise optimizer for a large batch", "You et al. 2020, arXiv 1904.00962; the cheat-sheet")
def lamb_for_large_batches(setup: Setup) -> Found:
    """At batches of thousands one learning rate for all layers is limited by the most sensitive one. LAMB makes each
    layer's step a fraction of its weights; its learning rate grows with the root of the batch."""
    if setup.batch_size is None or setup.batch_size < _LARGE_BATCH or setup.family not in ("sgd", "adam", "adamw"):
        return None
    return f"batch_size={setup.batch_size:,}", _race(f"{_here(setup)},lamb")


@rule(
    "suggestion",
    "A larger eps for Adam on images",
    "Choi et al. 2019, arXiv 1910.05446; the cheat-sheet (1.0, 0.1, 0.01, 1e-4)",
)
def eps_for_vision(setup: Setup) -> Found:
    """eps blends Adam into SGD with momentum, and 1e-8 is its smallest sensible value, not a tuned one. On image nets
    values up to 1 have won when eps was searched."""
    eps = setup.setting("eps")
    if setup.family not in ("adam", "adamw", "nadam", "radam") or eps is None or eps > 1e-8 or setup.field != "vision":
        return None
    if setup.has_attention:
        return None
    return (
        f"eps={float(eps):g}",
        f"for eps in (1.0, 0.1, 0.01, 1e-4):\n    {setup.code(eps=0.1).replace('eps=0.1', 'eps=eps')}",
    )


@rule(
    "suggestion", "Memory that can be saved", "piste.estimate_memory on this model; docs/precision.md for what it costs"
)
def memory_to_save(setup: Setup) -> Found:
    """Moments in bfloat16, 8 or 4 bits keep the algorithm and cost a little precision of its averages; Lion, SM3 and
    Adafactor keep less by being other algorithms."""
    if not (setup.memory or setup.size >= _NUMBERS_WORTH_COUNTING):
        return None
    now = _cost(setup, _here(setup))
    if now is None or setup.setting("state", "fp32") != "fp32":
        return None
    if now.peak <= setup.memory if setup.memory else now.state < _STATE_WORTH_SAVING:
        return None
    options = {state: _cost(setup, _here(setup), state=state) for state in ("bf16", "8bit", "4bit")}
    options |= {name: _cost(setup, name) for name in ("lion", "adafactor")}
    sizes = ", ".join(f"{name} {_gib(cost.state)}" for name, cost in options.items() if cost is not None)
    limit = f"; a step needs {_gib(now.peak)} of {_gib(setup.memory)}" if setup.memory else ""
    coded = setup.code(cls=_ours(setup), state="8bit", foreach=None, fused=None)
    return f"state now {_gib(now.state)}{limit}; {sizes}", coded


def _ours(setup: Setup) -> str:
    return f"piste.{setup.preset.optimizer.__name__}" if setup.preset else "piste.AdamW"


def _cost(setup: Setup, name: str, **settings: str) -> MemoryEstimate | None:
    """What an optimizer costs on the model; None where that cannot be told."""
    try:
        return estimate_memory(setup.model, name, **settings)
    except Exception as error:  # a model that cannot be copied, say: advice goes on without numbers
        logger.debug("advise: no estimate for %s: %s", name, error)
        return None


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


RULES = (
    *(adafactor_for_language, older_for_vision, sam_for_transformers, madgrad_for_transformers),
    *(lamb_for_large_batches, eps_for_vision, memory_to_save),
)
