"""Parameter groups: what is decayed, layer-wise rates, tied and frozen weights, the table, bad input."""

from __future__ import annotations

import inspect
import io
import math

import pytest
import torch
from torch import nn

import piste
from piste.groups import describe_groups, param_groups


def decayed(model, **options):
    groups = param_groups(model, weight_decay=0.1, **options)
    return {name for group in groups for name in group["param_names"] if group["weight_decay"] == 0.1}


def names(model):
    return [name for name, _ in model.named_parameters()]


class Rms(nn.Module):
    """A norm by what it does, with a name that says so, and a scale of two axes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))


class FancyRmsNorm(Rms):
    pass


class DerivedFromNorm(nn.LayerNorm):
    pass


class AsHidden(FancyRmsNorm):
    """Its own name says nothing; that of its parent does."""


class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.foo = nn.LayerNorm(width)  # a norm whose attribute does not say so
        self.attention = nn.MultiheadAttention(width, 2, add_bias_kv=True)
        self.norm_bias = nn.Linear(width, width)  # a matrix whose attribute says what it is not
        self.scale = nn.Parameter(torch.ones(width))
        self.mlp = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))


class Transformer(nn.Module):
    def __init__(self, blocks=2, words=7, width=4):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 5, width))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.words = nn.Embedding(words, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.final = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)


def test_what_is_decayed_is_told_by_type_and_never_by_name():
    block = {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "norm_bias.weight",
        "mlp.0.weight",
        "mlp.2.weight",
    }
    expected = {"position", "words.weight", "head.weight"} | {f"blocks.{i}.{name}" for i in (0, 1) for name in block}
    assert decayed(Transformer()) == expected


def test_every_norm_of_torch_is_spared():
    arguments = {
        nn.LayerNorm: ((3, 4),),
        nn.RMSNorm: ((3, 4),),
        nn.GroupNorm: (2, 4),
        nn.LocalResponseNorm: (2,),
        nn.CrossMapLRN2d: (2,),
    }
    found = [
        cls
        for name, cls in inspect.getmembers(nn, inspect.isclass)
        if ("Norm" in name or "LRN" in name) and not name.startswith("Lazy")
    ]
    assert {nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm3d, *arguments} <= set(found)
    for cls in found:
        extra = {"affine": True} if "InstanceNorm" in cls.__name__ else {}
        norm = cls(*arguments.get(cls, (4,)), **extra)
        assert decayed(nn.ModuleList([nn.Linear(2, 2), norm])) == {"0.weight"}, cls


def test_custom_norms_are_known_by_the_name_of_a_class():
    assert decayed(nn.ModuleList([Rms(), FancyRmsNorm(), DerivedFromNorm((2, 2)), AsHidden()])) == {"0.weight"}


def test_types_and_lists_that_are_spared_on_request():
    class Declares(Transformer):
        def no_weight_decay(self):
            return {"position"}

    assert decayed(Transformer()) - decayed(Declares()) == {"position"}
    assert decayed(Transformer()) - decayed(Transformer(), no_decay=(nn.Embedding,)) == {"words.weight"}


def test_parametrized_layers():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    assert decayed(model) == {"parametrizations.weight.original0", "parametrizations.weight.original1"}


def test_groups_are_few_ordered_and_complete():
    model = Transformer()
    groups = param_groups(model, weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    for group in groups:
        assert group["param_names"] == [name for name in names(model) if name in group["param_names"]]
        assert all(p is model.get_parameter(n) for n, p in zip(group["param_names"], group["params"], strict=True))
    assert sorted(name for group in groups for name in group["param_names"]) == sorted(names(model))
    assert [group["param_names"] for group in param_groups(model, decay_norm_and_bias=True)] == [names(model)]
    assert [group["param_names"] for group in param_groups(model, weight_decay=0)] == [names(model)]


def test_embeddings_are_marked_for_full_precision_where_it_matters():
    large = Transformer(words=1024)
    marked = [group["param_names"] for group in param_groups(large) if group.get("state") == "fp32"]
    assert marked == [["words.weight"]]
    assert [len(param_groups(model)) for model in (large, Transformer(words=1023))] == [3, 2]
    assert all("state" not in group for group in param_groups(large, fp32_state=()))
    only = param_groups(large, fp32_state=(nn.Linear, nn.Embedding))
    assert [group["param_names"] for group in only if "state" in group] == [["words.weight", "head.weight"]]


def test_tied_weights_are_counted_once_with_the_care_of_every_owner():
    model = nn.ModuleDict({"head": nn.Linear(64, 64, bias=False), "words": nn.Embedding(64, 64)})
    model["words"].weight = model["head"].weight
    (group,) = param_groups(model)
    assert group["param_names"] == ["head.weight"]
    assert group["state"] == "fp32"
    assert decayed(model, no_decay=(nn.Embedding,)) == set()
    twice = nn.Linear(3, 3)
    assert [g["param_names"] for g in param_groups(nn.Sequential(twice, twice))] == [["0.weight"], ["0.bias"]]


def test_frozen_parameters():
    model = Transformer()
    model.blocks.requires_grad_(False)
    kept = {name for group in param_groups(model) for name in group["param_names"]}
    assert kept == {name for name, p in model.named_parameters() if p.requires_grad}
    kept = {name for group in param_groups(model, include_frozen=True) for name in group["param_names"]}
    assert kept == set(names(model))
    with pytest.raises(ValueError, match="all are frozen"):
        param_groups(model.requires_grad_(False))
    assert param_groups(model, include_frozen=True)


def rates(model, **options):
    groups = param_groups(model, layer_decay=0.5, lr=1.0, **options)
    return {name: group["lr"] for group in groups for name in group["param_names"]}


def test_layer_decay_counts_blocks_and_the_runs_between_them():
    found = rates(Transformer(blocks=3))
    assert found["position"] == found["words.weight"] == 0.5**4
    for block in range(3):
        inside = {rate for name, rate in found.items() if name.startswith(f"blocks.{block}.")}
        assert inside == {0.5 ** (3 - block)}
    assert found["final.weight"] == found["head.weight"] == 1.0
    groups = param_groups(Transformer(blocks=3), weight_decay=0.1, layer_decay=0.5, lr=1.0)
    assert len(groups) == 10  # five layers, decayed or not


def test_layer_decay_opens_containers_in_containers():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.main = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(2, 2)
            self.stages = nn.Sequential(nn.Sequential(Residual(), Residual()), nn.Sequential(Residual(), Residual()))
            self.between = nn.Linear(2, 2)
            self.last = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})

    order = ["stem", "stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1", "between", "last.a", "last.b"]
    for model, prefix in ((Net(), ""), (nn.Sequential(Net(), nn.Linear(2, 2)), "0.")):
        layers = [prefix + layer for layer in order] + (["1"] if prefix else [])
        expected = {layer: 0.5 ** (len(layers) - 1 - number) for number, layer in enumerate(layers)}
        for name, rate in rates(model).items():
            assert rate == next(r for layer, r in expected.items() if name.startswith(layer + "."))


def test_layer_decay_of_plain_and_tied_models():
    assert rates(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))) == {
        "0.weight": 0.5,
        "0.bias": 0.5,
        "2.weight": 1.0,
    }
    model = Transformer(blocks=1)
    model.head.weight = model.words.weight
    assert rates(model)["words.weight"] == 0.25  # as an embedding, where it stands first


def test_layer_decay_of_a_head_tied_to_a_block():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
            self.head = nn.Linear(2, 2)
            self.head.weight = self.blocks[0].weight

    assert rates(Tied()) == {
        "blocks.0.weight": 0.25,
        "blocks.0.bias": 0.25,
        "blocks.1.weight": 0.5,
        "blocks.1.bias": 0.5,
        "head.bias": 1.0,
    }


def test_layer_decay_with_a_depth_of_your_own_and_frozen_layers():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    found = rates(model, depth=lambda name: 0 if name.startswith("0") else 3)
    assert found["0.weight"] == 0.125
    assert found["1.weight"] == found["2.bias"] == 1.0
    model[2].requires_grad_(False)
    assert rates(model) == {"0.weight": 0.5, "0.bias": 0.5, "1.weight": 1.0, "1.bias": 1.0}


OPTIMIZERS = {
    "torch.SGD": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "torch.AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "torch.RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.1, foreach=True),
    "AdamW": lambda groups: piste.AdamW(groups, lr=0.1),
    "Ranger": lambda groups: piste.Ranger(groups, lr=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_optimizers_take_the_groups_with_their_names(make):
    def trained():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(70, 64), nn.Linear(64, 2), nn.LayerNorm(2))
        optimizer = make(param_groups(model, weight_decay=0.5, layer_decay=0.5, lr=0.1))
        model(torch.arange(3)).square().sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = trained()
    assert optimizer.param_groups[0]["param_names"] == ["0.weight"]
    assert {g["lr"] for g in optimizer.param_groups} == {0.1, 0.05, 0.025}
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    make(param_groups(model, layer_decay=0.5, lr=0.1)).load_state_dict(torch.load(file, weights_only=True))


def test_weight_decay_reaches_the_weights_it_should():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.5), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * (0.95 if name == "0.weight" else 1.0))


def test_the_table_says_what_went_where():
    model = Transformer(blocks=12, words=2048)
    model.position.requires_grad_(False)
    seen = []
    groups = param_groups(model, weight_decay=0.1, table=seen.append)
    (text,) = seen
    lines = text.splitlines()
    assert lines[0].split() == ["group", "weight_decay", "lr", "state", "tensors", "numbers", "parameters"]
    assert any(line.endswith("  blocks.*.mlp.*.weight x24") for line in lines)
    assert any(line.endswith("  final.weight") for line in lines)
    assert lines[-1] == "left out, frozen: position"
    fp32 = next(line.split() for line in lines if "words.weight" in line)
    assert fp32[1:] == ["0.1", "-", "fp32", "1", "8,192", "words.weight"]
    assert describe_groups(groups) == "\n".join(lines[:-1])
    optimizer = torch.optim.AdamW(groups, lr=torch.tensor(0.25))
    assert describe_groups(optimizer.param_groups).splitlines()[1].split()[:3] == ["0", "0", "0.25"]
    assert describe_groups([{"params": [nn.Parameter(torch.ones(3))]}]).endswith(
        "-   -      -        1        3  (no names)"
    )
    assert describe_groups([{"params": [("a", torch.ones(3))]}]).endswith("  a")


MODEL = nn.Linear(2, 2)
BAD = [
    ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ({"weight_decay": math.nan}, "weight_decay=nan"),
    ({"weight_decay": "0.1"}, "weight_decay='0.1'"),
    ({"layer_decay": 0.0, "lr": 1.0}, "layer_decay=0.0"),
    ({"layer_decay": 1.5, "lr": 1.0}, "layer_decay=1.5"),
    ({"layer_decay": 0.5}, "lr=None"),
    ({"layer_decay": 0.5, "lr": -1.0}, "lr=-1.0"),
    ({"lr": 0.1}, "lr=0.1"),
    ({"depth": len}, "depth="),
    ({"fp32_state": nn.Embedding}, "fp32_state="),
    ({"fp32_state": ("Embedding",)}, "fp32_state="),
    ({"no_decay": (int,)}, "no_decay="),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: str(value)[:30])
def test_bad_input(options, message):
    with pytest.raises(ValueError, match="is not legal") as caught:
        param_groups(MODEL, **options)
    assert str(caught.value).startswith(message)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_bad_models():
    with pytest.raises(TypeError, match="model is a list"):
        param_groups(list(MODEL.parameters()))
    with pytest.raises(ValueError, match="no parameter to train"):
        param_groups(nn.ReLU())
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet"):
        param_groups(nn.Sequential(nn.LazyLinear(3)))


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("weight_dekay", "weight_decay"),
        ("decay_norm_and_biases", "decay_norm_and_bias"),
        ("layerdecay", "layer_decay"),
        ("learning", None),
        ("unknown", None),
        ("model_", None),
    ],
)
def test_unknown_options_are_refused_with_the_nearest(option, meant):
    with pytest.raises(ValueError, match=f"^param_groups got an unknown option '{option}'") as caught:
        param_groups(MODEL, **{option: 0.1})
    assert (f"did you mean '{meant}'" in str(caught.value)) is (meant is not None)
    assert str(caught.value).endswith("lr, depth, include_frozen, table")
