"""Wrappers by name: what ``"sam+adamw"`` puts round the preset ``adamw``, and what other lists call it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from piste import wrappers
from piste.wrappers.base import Wrapper

__all__ = ["WRAPPINGS", "Wrapping"]


@dataclass(frozen=True)
class Wrapping:
    """A wrapper with its settings, to be put round any preset.

    Args:
        name: what stands before the ``+``.
        wrapper: its class.
        description: when to take it, in a sentence.
        source: the paper.
        gradient_evaluations: forward-backward passes of a step, as multiples of what the optimizer inside needs, by
            default settings.
        settings: arguments of the class where they differ from its defaults.
        labels: what some lists call this paper; several wrappings may have the same.
        needs: what it has to be told in each step, beyond one loss for a batch; empty for most.
    """

    name: str
    wrapper: type[Wrapper]
    description: str
    source: str
    gradient_evaluations: float = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    needs: str = ""

    @property
    def arguments(self) -> dict[str, Any]:
        """Every argument but the optimizer and the model, with its default; ``inspect.Parameter.empty`` for none."""
        parameters = list(inspect.signature(self.wrapper).parameters.values())[1:]
        return {p.name: self.settings.get(p.name, p.default) for p in parameters if p.name != "model"}

    @property
    def takes_model(self) -> bool:
        """Does the wrapper look at the model itself?"""
        return "model" in inspect.signature(self.wrapper).parameters

    @property
    def needs_model(self) -> bool:
        """Is there no wrapper without the model?"""
        return (
            self.takes_model and inspect.signature(self.wrapper).parameters["model"].default is inspect.Parameter.empty
        )


_SAM, _ASAM, _SAF = "Foret et al. 2021, arXiv 2010.01412", "Kwon et al. 2021, arXiv 2102.11600", "arXiv 2205.14083"
_LOOKSAM = "Liu et al. 2022, arXiv 2203.02714"

#: every wrapper that a name can ask for
WRAPPINGS: Mapping[str, Wrapping] = {
    wrapping.name: wrapping
    for wrapping in (
        Wrapping(
            "sam",
            wrappers.SAM,
            "The gradient where the loss is highest nearby: small or noisy data, vision transformers.",
            _SAM,
            2,
        ),
        Wrapping(
            "asam",
            wrappers.SAM,
            "SAM in a neighbourhood that scales with the weights; a ten times larger rho.",
            _ASAM,
            2,
            {"adaptive": "asam", "rho": 0.5},
            ("adaptive sam",),
        ),
        Wrapping(
            "gsam",
            wrappers.GSAM,
            "SAM that narrows the gap to the loss nearby; rho follows the learning rate.",
            "Zhuang et al. 2022, arXiv 2203.08065",
            2,
        ),
        Wrapping(
            "looksam",
            wrappers.LookSAM,
            "SAM whose second pass is made in every fifth step and remembered in between.",
            _LOOKSAM,
            1.2,
            labels=("efficient sam",),
        ),
        Wrapping(
            "looklayersam",
            wrappers.LookSAM,
            "LookSAM that moves every tensor by a share of its own norm: batches of thousands.",
            _LOOKSAM,
            1.2,
            {"layerwise": True},
        ),
        Wrapping(
            "esam",
            wrappers.ESAM,
            "SAM that perturbs some weights and makes its second pass with some samples.",
            "Du et al. 2022, arXiv 2110.03141",
            1.5,
            needs="a loss for each sample of a batch",
        ),
        Wrapping(
            "saf",
            wrappers.SAF,
            "Predictions held near those of some epochs ago, in the place of a second pass.",
            f"Du et al. 2022, {_SAF}",
            labels=("esam",),
            needs="logits and the index of each sample, in trajectory_loss()",
        ),
        Wrapping(
            "mesa",
            wrappers.MESA,
            "Predictions held near those of the averaged weights, in the place of a second pass.",
            f"Du et al. 2022, {_SAF}",
            labels=("esam",),
            needs="logits and the model's inputs, in trajectory_loss()",
        ),
        Wrapping(
            "lookahead",
            wrappers.Lookahead,
            "Slow weights that follow the fast ones every few steps.",
            "Zhang et al. 2019, arXiv 1907.08610",
        ),
    )
}
