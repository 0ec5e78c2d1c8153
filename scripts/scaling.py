"""The tables of docs/scaling.md: bytes, operations and traffic of a step on many devices, from formulas.

    python -m scripts.scaling            # writes them into docs/scaling.md

``tests/test_distribution.py`` holds the formulas against what four real processes keep, compute and send. Operations
are those of products and decompositions; what goes element by element is bound by memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

from piste.costs import flops
from piste.distribution import Job, divided
from piste.kronecker import Kronecker, kronecker
from piste.orthogonal import orthogonalizer
from piste.renewals import rebasing, rooting
from piste.whitening import whitening

__all__ = ["FAMILIES", "MODELS", "Cost", "Family", "cost", "page", "transformer"]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
DEVICES = (1, 8, 64, 1024)
START, END = "<!-- tables: python -m scripts.scaling -->\n", "<!-- end of tables -->\n"

Shape = Sequence[int]

#: how Shampoo (Meta's form) and SOAP cut weights up by default
SHAMPOO, SOAP = kronecker(1024, 1024, backwards=True), kronecker(None, longest=10_000)
#: and which factors PSGDKron gives them, in how many of its steps it fits those once it has trained for long
PSGD, FITTED = whitening(8192, "none", merge=True), 0.03


class Weight(NamedTuple):
    """A weight of a model: its shape, how many matrices it holds, and whether it maps features to features."""

    shape: tuple[int, ...]
    split: int = 1
    hidden: bool = True


class Family(NamedTuple):
    """What an optimizer does to a matrix.

    Attributes:
        name: for the tables.
        state: bytes of what goes with the weight, element by element or axis by axis.
        matrices: bytes of what the process keeps that works on it.
        work: operations of products and decompositions in a step, renewals by their share.
        brought: how many tensors of its size go to that process in a step, where the weight is sharded.
        sent: how many come back.
        light: how many more of both, where it is sharded, for what each process else works out for itself.
        hidden_only: are embeddings and heads left to AdamW?
        blocks: how weights fall into blocks that different processes can work on, if they do.
    """

    name: str
    state: Callable[[Shape], float]
    matrices: Callable[[Shape], float] = lambda shape: 0.0
    work: Callable[[Weight], float] = lambda weight: 0.0
    brought: int = 0
    sent: int = 0
    light: tuple[int, int] = (0, 0)
    hidden_only: bool = False
    blocks: Kronecker | None = None


def _each(number: float) -> Callable[[Shape], float]:
    return lambda shape: number * prod(shape)


def _factored(shape: Shape) -> float:
    """A number for each row and each column."""
    return 4.0 * (shape[0] + prod(shape[1:])) if len(shape) > 1 else 4.0 * prod(shape)


def muon(steps: int = 5) -> Family:
    iterate = orthogonalizer("quintic", "auto")
    return Family(
        "Muon",
        state=_each(4.0),
        work=lambda w: flops(iterate, w.shape, (steps, w.split)),
        brought=1,
        sent=1,
        hidden_only=True,
    )


def shampoo(every: int = 10, how: Kronecker = SHAMPOO, *, graft: bool = True) -> Family:
    """Meta's form: factors and roots, statistics in every step, the momentum multiplied by the roots."""
    roots = rooting(how, "eigen", False)
    return Family(
        f"Shampoo, every={every}",
        state=_each(8.0 if graft else 4.0),
        matrices=lambda shape: 8.0 * how.layout(shape).total,
        work=lambda w: flops(how.gram, w.shape) + flops(how.times, w.shape) + flops(roots, w.shape) / every,
        brought=2,  # the gradient and the momentum
        sent=1,
        # lengths of blocks, of the magnitude and of the step, which is here already
        light=(1, 2) if graft and how.block else (0, 0),
        blocks=how,
    )


def soap(every: int = 10, how: Kronecker = SOAP) -> Family:
    """Factors and bases; the gradient into the basis, the step out of it; the first moment into each new basis."""
    bases = rebasing(how, "qr")

    def work(w: Weight) -> float:
        product = flops(how.times, w.shape)
        renewal = flops(bases, w.shape) + flops(how.moved, w.shape) + flops(how.rebased, w.shape)
        return flops(how.gram, w.shape) + 2 * product + renewal / every

    return Family(
        f"SOAP, every={every}",
        state=_each(8.0),
        matrices=lambda shape: 8.0 * how.layout(shape).total,
        work=work,
        brought=2,  # the gradient, and the step in the basis
        sent=2,
    )


def psgd(fitted: float = FITTED) -> Family:
    """Momentum whitened by factors, which are fitted to it in part of the steps."""
    return Family(
        "PSGDKron",
        state=_each(4.0),
        matrices=lambda shape: 4.0 * sum(map(prod, PSGD.sizes(PSGD.axes(shape)))),
        work=lambda w: flops(PSGD.whitened, w.shape) + fitted * flops(PSGD.fitted, w.shape),
        brought=1,  # the momentum
        sent=1,
    )


ADAMW = Family("AdamW", _each(8.0))
FAMILIES = (
    Family("SGD with momentum, Lion", _each(4.0)),
    ADAMW,
    Family('AdamW, state="8bit"', _each(2 + 3 * 4 / 256)),
    Family("Adafactor", _factored),
    muon(),
    shampoo(10),
    shampoo(100),
    soap(10),
    psgd(),
)


class Cost(NamedTuple):
    """Of a step, on the device that has the most of it: bytes kept, operations, bytes sent."""

    state: float
    work: float
    sent: float


def cost(family: Family, weights: Sequence[Weight], devices: int, *, sharded: bool) -> Cost:
    """What an optimizer costs beside the model, its gradients and their averaging.

    Args:
        family: the optimizer.
        weights: of the model.
        devices: how many share it.
        sharded: FSDP2; else every device has all weights, and work is shared (``distribute=``).
    """
    mine = [w for w in weights if w.hidden or not family.hidden_only]
    others = [w for w in weights if not w.hidden and family.hidden_only]
    loads, held, sizes, work = ([0.0] * devices for _ in range(4))
    jobs = [Job(w.shape, family.work(w), family.blocks) for w in mine]
    for (owners, cut), w in zip(divided(jobs, loads), mine, strict=True):
        shapes = [w.shape] if cut is None else [tuple(s.stop - s.start for s in box) for box in cut.boxes]
        for owner, shape in zip(owners, shapes, strict=True):
            held[owner] += family.matrices(shape)
            work[owner] += family.work(w._replace(shape=shape))
            sizes[owner] += 4.0 * prod(shape) if family.sent else 0.0
    spread = sum(family.state(w.shape) for w in mine) + sum(ADAMW.state(w.shape) for w in others)
    elsewhere, total = (devices - 1) / devices, sum(sizes)
    if sharded:
        brought, sent = family.brought + family.light[0], family.sent + family.light[1]
        # its own parts to the owners of other weights, and of what it owns their parts to all others
        traffic = (brought * (total / devices) + sent * max(sizes)) * elsewhere
    elif max(sizes) * devices <= 2 * total:
        traffic = family.sent * max(sizes) * (devices - 1)  # all gather as many bytes from each as the most one has
    else:
        traffic = family.sent * 2 * total * elsewhere  # few owners: a sum with zeros, which goes round twice
    return Cost(spread / (devices if sharded else 1) + max(held), max(work), traffic)


def transformer(layers: int, width: int, words: int = 32_768) -> list[Weight]:
    """Queries, keys and values in one weight, their output, two layers of a perceptron; a table of words, tied."""
    block = [
        Weight((3 * width, width), split=3), Weight((width, width)),
        Weight((4 * width, width)), Weight((width, 4 * width)),
    ]  # fmt: skip
    return [Weight((words, width), hidden=False), *block * layers]


MODELS = {"0.1 B": (12, 768), "1 B": (20, 2048), "10 B": (40, 4608), "100 B": (124, 8192)}


def _short(number: float) -> str:
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.3g}"


def page() -> str:
    """The tables."""
    lines: list[str] = []
    for name, (layers, width) in MODELS.items():
        weights = transformer(layers, width)
        count = sum(prod(w.shape) for w in weights)
        lines += ["", f"### {name} weights: {layers} layers of width {width:,}, {_short(count)} numbers", ""]
        for sharded, title in ((True, "sharded (FSDP2)"), (False, "replicas (DDP) that share work")):
            lines.append(f"| {title}: bytes, operations, bytes sent | " + " | ".join(map(str, DEVICES)) + " |")
            lines.append("|---" * (1 + len(DEVICES)) + "|")
            for family in FAMILIES:
                if sharded or family.work(weights[-1]):
                    cells = [" / ".join(map(_short, cost(family, weights, n, sharded=sharded))) for n in DEVICES]
                    lines.append(f"| {family.name} | " + " | ".join(cells) + " |")
            lines.append("")
    return "\n".join(lines[1:])


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{START}\n{page()}\n{END}{after}", encoding="utf-8")
    print(page())


if __name__ == "__main__":
    main()
