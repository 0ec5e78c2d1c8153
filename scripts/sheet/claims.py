"""What the cheat-sheet claims, and what would show it: pairs of contenders to be compared on tasks, seed by seed."""

from __future__ import annotations

from dataclasses import dataclass

from scripts.sheet.races import MAIN, TASKS

VISION = ("digits", "digits_mixer", "digits_noise")
PATCHES = ("digits_vit", "digits_mixer")
TEXT = ("char_transformer", "zipf_bigram")
ACTING = ("cartpole",)

BETTER = "better"
ALIKE = "alike"
KEEPS_UP = "keeps up"
SOONER = "sooner"


@dataclass(frozen=True)
class Entry:
    """A contender of one of the races."""

    optimizer: str
    arm: str = MAIN

    def __str__(self) -> str:
        return self.optimizer if self.arm == MAIN else f"{self.optimizer} ({self.arm.replace('_', '-')})"


@dataclass(frozen=True)
class Duel:
    """Two contenders on some tasks.

    Args:
        expected: ``"better"``, ``"keeps up"`` (is not behind), ``"alike"`` (no difference), or ``"sooner"`` (fewer
            steps to where the second ends).
    """

    first: Entry
    second: Entry
    tasks: tuple[str, ...]
    expected: str = BETTER


@dataclass(frozen=True)
class Claim:
    """A sentence of the sheet.

    Args:
        words: what it says, in short.
        duels: what would show it; none if these tasks cannot.
        beside: what else is to be known; where there are no duels, the reason.
        measured: the mark of a claim that other pages measure, ``"supported"`` or ``"refuted"``.
    """

    words: str
    duels: tuple[Duel, ...] = ()
    beside: str = ""
    measured: str = ""


def _duels(
    first: str, others: tuple[str, ...], tasks: tuple[str, ...] = TASKS, expected: str = BETTER
) -> tuple[Duel, ...]:
    return tuple(Duel(Entry(first), Entry(other), tasks, expected) for other in others)


def _arms(optimizer: str, arms: tuple[str, ...], tasks: tuple[str, ...], against: str = MAIN) -> tuple[Duel, ...]:
    return tuple(Duel(Entry(optimizer, arm), Entry(optimizer, against), tasks) for arm in arms)


_EPS = ("eps=1", "eps=0.1", "eps=0.01", "eps=1e-4")

CLAIMS = (
    Claim("Ranger seems to work really well", _duels("ranger", ("adamw",)), "Measured against AdamW."),
    Claim(
        "Ranger works better under flat-then-cosine than under one-cycle",
        (Duel(Entry("ranger"), Entry("ranger", "one_cycle"), TASKS),),
    ),
    Claim(
        "For Adam's kind try eps = 1, 0.1, 0.01 (or 1e-4)",
        (
            *_arms("adamw", _EPS, ("digits", "char_transformer")),
            *_arms("ranger", _EPS, ("digits", "char_transformer")),
        ),
        "Each value had a search for the learning rate of its own, around the same prior.",
    ),
    Claim(
        "RangerAdaBelief: eps = 1e-8 for vision rather than 1e-16",
        _arms("rangeradabelief", ("eps=1e-8",), ("digits",), against="eps=1e-16"),
    ),
    Claim(
        "RangerAdaBelief: eps = 1e-16 for text rather than 1e-8",
        _arms("rangeradabelief", ("eps=1e-16",), ("char_transformer",), against="eps=1e-8"),
    ),
    Claim(
        "RangerAdaBelief: eps = 1e-12 for reinforcement learning rather than 1e-8 or 1e-16",
        tuple(
            Duel(Entry("rangeradabelief", "eps=1e-12"), Entry("rangeradabelief", f"eps={other}"), ACTING)
            for other in ("1e-8", "1e-16")
        ),
    ),
    Claim(
        "AdamW may still be competitive (beside optimizers with RAdam's warm-up)",
        tuple(
            Duel(Entry("adamw"), Entry(other), TASKS, KEEPS_UP)
            for other in ("ranger", "rangeradabelief", "ranger21", "adabelief")
        ),
    ),
    Claim(
        "SGD with Nesterov momentum, or RMSprop, can generalise better in vision",
        (*_duels("sgd_nesterov", ("adamw",), VISION), *_duels("rmsprop", ("adamw",), VISION)),
        "Scores are of data that neither training nor tuning saw.",
    ),
    Claim(
        "… and maybe for text",
        (*_duels("sgd_nesterov", ("adamw",), TEXT), *_duels("rmsprop", ("adamw",), TEXT)),
    ),
    Claim(
        "8-bit states save up to 75 % of memory",
        beside="AdamW keeps 2.05 bytes a weight instead of 8, 74 % less, at no loss that six seeds show: "
        "[precision](precision.md). Of the whole of training memory it is less.",
        measured="supported",
    ),
    Claim(
        "8-bit optimizers may need embeddings in fp32",
        beside="Our maps hold the range of an embedding's moments ([precision](precision.md)); "
        "`piste.create` keeps embeddings in 32 bits all the same. What needs it is larger than these tasks.",
    ),
    Claim(
        "SAM is useful for vision",
        (*_duels("sam+adamw", ("adamw",), VISION), *_duels("sam+sgd_momentum", ("sgd_momentum",), VISION)),
        "At equal steps, which are twice the gradient evaluations.",
    ),
    Claim(
        "SAM is useful for text",
        (*_duels("sam+adamw", ("adamw",), TEXT), *_duels("sam+sgd_momentum", ("sgd_momentum",), TEXT)),
        "At equal steps, which are twice the gradient evaluations.",
    ),
    Claim(
        "SAM may be especially good for ViT and MLP-Mixer",
        (*_duels("sam+adamw", ("adamw",), PATCHES), *_duels("sam+sgd_momentum", ("sgd_momentum",), PATCHES)),
    ),
    Claim(
        "SAM prevents overfitting",
        (
            *_duels("sam+adamw", ("adamw",), ("digits_noise",)),
            *_duels("sam+sgd_momentum", ("sgd_momentum",), ("digits_noise",)),
        ),
        "Four labels in ten are wrong there, and the model could learn them by heart. With rho tuned as well: "
        "[sharpness](sharpness.md).",
    ),
    Claim(
        "SAM has no real benefit where every example is seen once",
        beside="Every task here shows its examples more than once.",
    ),
    Claim(
        "SAM should not be used with fp16",
        beside="No fp16 hardware took part; see [sharpness](sharpness.md).",
    ),
    Claim(
        "GSAM is better than SAM",
        _duels("gsam+adamw", ("sam+adamw",)),
        "Its own rho and alpha were not tuned.",
    ),
    Claim(
        "ESAM is faster than (G)SAM, and competitive",
        beside="ESAM needs the loss of every example, which a task does not give; it is tested and not raced.",
    ),
    Claim(
        "Ranger21 needs no schedule from outside",
        beside="It was raced with none, and no run was lost; where it ended is in the table.",
        measured="supported",
    ),
    Claim(
        "Ranger21 with use_madgrad may be better for transformers",
        (Duel(Entry("ranger21_madgrad", "madgrad"), Entry("ranger21"), ("char_transformer", "digits_vit")),),
    ),
    Claim(
        "Shampoo: more memory than Adam",
        beside="Factors and roots of both sides beside Adam's moments: bytes in [matrix optimizers](matrix.md).",
        measured="supported",
    ),
    Claim(
        "Shampoo: better performance (for large models)",
        (*_duels("shampoo", ("adamw",)), *_duels("shampoo_google", ("adamw",))),
        "No model here is large.",
    ),
    Claim(
        "Adan beats AdamW in vision, text and reinforcement learning",
        _duels("adan", ("adamw",), (*VISION, *TEXT, *ACTING)),
    ),
    Claim("Adan beats SAM", _duels("adan", ("sam+adamw", "sam+sgd_momentum"), (*VISION, *TEXT))),
    Claim("Adan beats SGD", _duels("adan", ("sgd_momentum",), (*VISION, *TEXT, *ACTING))),
    Claim("Adan beats AdaBelief", _duels("adan", ("adabelief",), (*VISION, *TEXT, *ACTING))),
    Claim("Adan performs very similar to AdamW …", _duels("adan", ("adamw",), expected=ALIKE)),
    Claim(
        "… but slower",
        beside="It moves 44 bytes a weight where AdamW moves 28: [benchmarks](benchmarks.md).",
        measured="supported",
    ),
    Claim(
        "Adan wants betas (0.02, 0.08, 0.01)",
        beside="These are one minus the betas of its code; `piste.Adan` refuses them unless "
        '`betas_convention="paper"` says so.',
        measured="supported",
    ),
    Claim(
        "Adan may be the best of all: to be compared with Lookahead, Ranger21, RangerAdaBelief",
        _duels("adan", ("lookahead+adamw", "ranger21", "rangeradabelief")),
    ),
    Claim("Amos is better than AdamW", _duels("amos", ("adamw",))),
    Claim("Amos converges faster than AdamW, by up to 70 % of the steps", _duels("amos", ("adamw",), expected=SOONER)),
    Claim(
        "Amos halves the memory of slot variables",
        beside="4.0 bytes a weight and a little instead of 8, measured in tests/test_memory.py.",
        measured="supported",
    ),
    Claim(
        "AdamW might be better than Adafactor for large language models",
        _duels("adamw", ("adafactor",), TEXT),
        "The language models here are small.",
    ),
    Claim(
        "Adafactor, NovoGrad and SM3 for when memory is short",
        beside="Measured bytes a weight: `piste list`. NovoGrad keeps one buffer, the other two next to nothing of a "
        "matrix.",
        measured="supported",
    ),
    Claim("LAMB for performance", _duels("lamb", ("adamw",)), "Made for batches a thousand times as large."),
    Claim(
        "AdamW: no decay on biases and norms of transformers",
        beside="A recipe for fine-tuning: nothing is fine-tuned here.",
    ),
    Claim(
        "foreach=True makes torch's optimizers faster",
        beside="AdamW's, on a CPU: on four of five sets of weights, not on ResNet-50's "
        "([benchmarks](benchmarks.md)). GPUs took no part.",
        measured="supported",
    ),
)
