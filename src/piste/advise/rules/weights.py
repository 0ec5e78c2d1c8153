"""Which weights the optimizer holds, and how it treats them."""

from __future__ import annotations

from collections import Counter
from math import exp

from torch import Tensor, nn

from piste.advise.finding import Found, rule
from piste.advise.setup import EMBEDDINGS, Setup, listed
from piste.routing import matrix_groups

_ENOUGH_TO_QUANTISE = 4096


def _held(setup: Setup) -> set[int]:
    return {id(tensor) for _, tensor in setup.pairs()}


def _missing(setup: Setup) -> list[str]:
    held = _held(setup)
    return [weight.name for weight in setup.trained if id(weight.tensor) not in held]


def _strangers(setup: Setup) -> list[Tensor]:
    return [tensor for _, tensor in setup.pairs() if id(tensor) not in setup.weights]


def _replaced(setup: Setup) -> bool:
    """Are weights of this model missing for which others of the same shape are held?"""
    shapes = Counter(tensor.shape for tensor in _strangers(setup))
    held = _held(setup)
    return any(shapes[weight.tensor.shape] for weight in setup.trained if id(weight.tensor) not in held)


@rule("error", "The optimizer holds other weights than the model's", "PyTorch documentation of torch.optim, on devices")
def weights_replaced(setup: Setup) -> Found:
    """An optimizer keeps the tensors it was made with. Moving, casting, wrapping or re-initialising a model afterwards
    may give it new parameters, which are then never updated. Make the optimizer last."""
    if not _replaced(setup):
        return None
    return (
        f"it holds {len(_strangers(setup))} tensors that are not in the model, and lacks {listed(_missing(setup))}",
        (f"model = model.to(device)  # first\n{setup.code()}"),
    )


@rule("error", "Weights that are trained are missing from the optimizer", "PyTorch documentation of torch.optim")
def weights_missing(setup: Setup) -> Found:
    """A parameter with requires_grad=True gets gradients and never moves unless the optimizer holds it. Where that is
    meant, freezing it saves its gradient's time and memory."""
    missing = _missing(setup)
    if not missing or _replaced(setup):
        return None
    module = missing[0].rpartition(".")[0]
    frozen = f"model.get_submodule({module!r}).requires_grad_(False)"
    return listed(missing), f"{setup.code()}\n# or, where it is meant:\n{frozen}"


@rule("note", "Frozen weights are in the optimizer", "PyTorch documentation of torch.optim")
def weights_frozen(setup: Setup) -> Found:
    """They never get a gradient, so they are skipped; but a gradient left over from before they were frozen is applied,
    and their state is saved. Leave them out, or add them as a group when they are unfrozen."""
    frozen = [tensor for _, tensor in setup.pairs() if not tensor.requires_grad]
    if not frozen:
        return None
    return listed(setup.names_of(frozen) or ["tensors that are not the model's"]), setup.code()


@rule("error", "A weight is in the optimizer twice", "torch.optim.Optimizer.add_param_group, which warns of it")
def weight_twice(setup: Setup) -> Found:
    """Tied weights are one tensor under two names. An optimizer that is given both takes two steps with it each time,
    and decays it twice. ``model.parameters()`` and ``piste.param_groups`` give it once."""
    counts = Counter(id(tensor) for _, tensor in setup.pairs())
    twice = {id(tensor): tensor for _, tensor in setup.pairs() if counts[id(tensor)] > 1}
    if not twice:
        return None
    return listed(setup.names_of(twice.values()) or [f"{len(twice)} tensors"]), setup.code()


@rule(
    "warning",
    "Norm scales and biases are decayed",
    "Goyal et al. 2017, arXiv 1706.02677; the cheat-sheet, “AdamW no decay for bias/layernorm weight”",
)
def norms_decayed(setup: Setup) -> Found:
    """Weight decay acts on the size of functions through the size of matrices. Scales of norms, biases and other
    vectors are few and not what overfits; decay pulls scales towards 0, where they shrink the signal instead."""
    if setup.family == "amos":
        return None
    spared = [tensor for _, tensor in setup.decays() if setup.is_vector_or_norm(tensor)]
    if not spared:
        return None
    return f"{len(spared)} of them, such as {listed(setup.names_of(spared))}", setup.code()


@rule(
    "note",
    "Rows of an embedding decay between the rare steps that train them",
    "Loshchilov & Hutter 2019, arXiv 1711.05101, on what decay does without a gradient; arithmetic",
)
def embeddings_decayed(setup: Setup) -> Found:
    """A row of an embedding gets a gradient only when its token is in the batch, but decoupled decay shrinks it in
    every step. Over a long run rows of rare tokens fade."""
    if setup.steps is None or setup.lr is None or not setup.trace or not setup.decoupled:
        return None
    decayed = {id(tensor): decay for decay, tensor in setup.decays()}
    found = [w for w in setup.weights.values() if id(w.tensor) in decayed and _is_only_embedding(w.owners)]
    if not found:
        return None
    mean = sum(setup.trace.rates) / len(setup.trace.rates) / setup.trace.peak
    strength = setup.lr * mean * setup.steps * max(decayed[id(w.tensor)] for w in found)
    if strength < 0.5:
        return None
    return f"an unused row of {listed([w.name for w in found])} keeps {exp(-strength):.0%} of its size", setup.code(
        f"piste.param_groups(model, weight_decay={setup.weight_decay:g}, no_decay=(nn.Embedding,))"
    )


def _is_only_embedding(owners: list[nn.Module]) -> bool:
    return all(isinstance(owner, EMBEDDINGS) for owner in owners)


@rule("warning", "Muon orthogonalizes embeddings or the head", "Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982")
def muon_on_embeddings(setup: Setup) -> Found:
    """Muon is meant for matrices between hidden layers. Rows of an embedding are looked up one by one, and a head's
    outputs are classes: both have no use for an orthogonal update, and their authors give them to AdamW."""
    if setup.family not in ("muon", "normuon"):
        return None
    wrong = [t for group, t in setup.pairs() if t.ndim > 1 and _orthogonalized(setup, group) and _aside(setup, t)]
    if not wrong:
        return None
    return listed(setup.names_of(wrong)), setup.code(
        cls="piste.Muon", ns_coefficients=None, ns_steps=None, adjust_lr_fn=None, rule=None
    )


def _orthogonalized(setup: Setup, group: dict[str, object]) -> bool:
    return group.get("rule", "muon") != "adamw" and group.get("use_muon", True) is not False


def _aside(setup: Setup, tensor: Tensor) -> bool:
    """Would piste's own Muon leave this weight to AdamW?"""
    weight = setup.weights.get(id(tensor))
    if weight is None or any(isinstance(owner, EMBEDDINGS) for owner in weight.owners):
        return weight is not None
    try:
        groups = matrix_groups("Muon", setup.model, None, heads=None, aux=(), matrices=(), aux_lr=None, table=None)
    except ValueError:  # the head cannot be told from other layers
        return False
    known = (nn.Linear, nn.modules.conv._ConvNd)
    return isinstance(weight.owners[0], known) and any(
        group["rule"] == "adamw" and any(p is tensor for p in group["params"]) for group in groups
    )


@rule(
    "note",
    "Gradients of embeddings are centralized",
    "Yong et al. 2020, arXiv 2004.01461: meant for dense layers and convolutions",
)
def embeddings_centralized(setup: Setup) -> Found:
    """Gradient centralization takes the mean out of each row. A row of a dense layer makes one output; a row of an
    embedding is a token's whole vector, which is held at a constant mean for no reason."""
    central = [
        tensor
        for group, tensor in setup.pairs()
        if group.get("use_gc") and not group.get("gc_conv_only") and tensor.numel() >= _ENOUGH_TO_QUANTISE
    ]
    names = setup.names_of(central, *EMBEDDINGS)
    if not names:
        return None
    return listed(names), (
        f"groups = piste.param_groups(model, weight_decay={setup.weight_decay:g})\n"
        "for group in groups:\n"
        '    group["use_gc"] = "state" not in group  # large embeddings have groups of their own, which say state\n'
        f"{setup.code('groups', weight_decay=None)}"
    )


@rule(
    "warning",
    "Embeddings have quantised state",
    "Dettmers et al. 2022, arXiv 2110.02861; huggingface/transformers issue 14819; the cheat-sheet",
)
def embeddings_quantised(setup: Setup) -> Found:
    """Gradients of an embedding are zero but for a few rows, and large where they are not: second moments of one block
    span more decades than 8 bits hold. The 8-bit paper and its users keep that state in 32 bits."""
    of_class = any(mark in type(setup.inner).__name__.lower() for mark in ("8bit", "4bit"))
    coded = [
        tensor
        for group, tensor in setup.pairs()
        if tensor.numel() >= _ENOUGH_TO_QUANTISE
        and (group.get("state") in ("8bit", "4bit") or (of_class and group.get("optim_bits") != 32))
    ]
    names = setup.names_of(coded, *EMBEDDINGS)
    if not names:
        return None
    ours = setup.code() if not of_class else setup.code(cls=f"piste.{_named(setup)}", state="8bit", optim_bits=None)
    return listed(names), ours


def _named(setup: Setup) -> str:
    return "AdamW" if setup.preset is None else setup.preset.optimizer.__name__


@rule("warning", "Amos has not been told the scales of the layers", "Tian & Parikh 2022, arXiv 2210.11693")
def amos_unscaled(setup: Setup) -> Found:
    """Amos decays each weight towards the size its layer calls for: 1 for norm scales, about one over the root of the
    fan-in for dense layers. With one scale for all, layers are stunted or left too large."""
    scales = {group.get("scale") for group in setup.groups}
    shapes = {weight.tensor.shape for weight in setup.trained}
    if setup.family != "amos" or len(scales) > 1 or len(shapes) < 2:
        return None
    return "all weights have one scale", setup.code(cls="piste.Amos", scale=None)


@rule(
    "warning",
    "A trust ratio that is switched off",
    "timm and apex, whose LAMB skips it where weight_decay is 0 (always_adapt, use_nvlamb)",
)
def lamb_without_ratio(setup: Setup) -> Found:
    """LAMB of timm and of apex scales a layer's step by the size of its weights only where that layer is decayed. With
    no decay at all it is plain Adam under another name."""
    told = [group.get("always_adapt", group.get("use_nvlamb")) for group in setup.groups]
    if setup.family != "lamb" or setup.weight_decay > 0 or not any(flag is False for flag in told):
        return None
    return "weight_decay is 0 in every group", setup.code(cls="piste.Lamb", always_adapt=None, use_nvlamb=None)


RULES = (
    *(weights_replaced, weights_missing, weights_frozen, weight_twice),
    *(norms_decayed, embeddings_decayed, muon_on_embeddings, embeddings_centralized),
    *(embeddings_quantised, amos_unscaled, lamb_without_ratio),
)
