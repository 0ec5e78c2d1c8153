"""Presets, the registry and `piste.create`: the cheat-sheet's dictionary, weight decay, overrides, names."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
import re
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import nn

import piste
from piste import optimizers
from piste.presets import LrPrior, Preset, WeightDecay, presets
from piste.registry import OPTIMIZERS, OptimizerInfo

# The block of the cheat-sheet, letter by letter.
SHEET = """
optimizer_config_mapping = {
    "adamw": {"optimizer": AdamW, "wd": {"true_wd": True, "bn_wd": True}},
    "ranger": {"optimizer": Ranger, "wd": {"true_wd": True, "bn_wd": False}},
    "ranger_nogc": {
        "optimizer": Ranger,
        "hyperparameters": {"use_gc": False},
        "wd": {"true_wd": True, "bn_wd": False},
    },
    "rangeradabelief": {"optimizer": RangerAdaBelief, "wd": {"true_wd": True, "bn_wd": False}},
    "rangeradabelief_nogc": {
        "optimizer": RangerAdaBelief,
        "hyperparameters": {"use_gc": False},
        "wd": {"true_wd": True, "bn_wd": False},
    },
    "sgd": {
        "optimizer": SGD,
        "hyperparameters": {"momentum": 0, "nesterov": False},
        "wd": {"true_wd": True, "bn_wd": False},
        "set_betas": False,
    },
    "sgd_momentum": {
        "optimizer": SGD,
        "hyperparameters": {"momentum": 0.9, "nesterov": False},
        "wd": {"true_wd": True, "bn_wd": False},
        "set_betas": False,
    },
    "sgd_nesterov": {
        "optimizer": SGD,
        "hyperparameters": {"momentum": 0.9, "nesterov": True},
        "wd": {"true_wd": True, "bn_wd": False},
        "set_betas": False,
    },
    "rmsprop": {
        "optimizer": RMSprop,
        "hyperparameters": {"momentum": 0.9},
        "wd": {"true_wd": True, "bn_wd": False},
        "set_betas": False,
    },
}
"""


def sheet(**classes):
    names = {name: getattr(piste, name) for name in ("AdamW", "Ranger", "RangerAdaBelief", "SGD", "RMSprop")} | classes
    exec(dedent(SHEET), names)
    return names["optimizer_config_mapping"]


OF_PISTE = sheet()
OF_TORCH = sheet(AdamW=torch.optim.AdamW, SGD=torch.optim.SGD, RMSprop=torch.optim.RMSprop)


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


WEIGHTS = {"0.weight", "2.weight"}


def zero_gradient_step(optimizer, model):
    """How much of each parameter is left after a step in which only the decay can act."""
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return {name: float(p.detach().flatten()[0]) for name, p in model.named_parameters()}


@pytest.mark.parametrize("mapping", [OF_PISTE, OF_TORCH], ids=["piste", "torch"])
def test_the_cheat_sheets_dictionary_is_taken_verbatim(mapping):
    before = copy.deepcopy(mapping)
    found = piste.presets.from_mapping(mapping)
    assert mapping == before
    assert list(found) == list(mapping)
    for name, entry in mapping.items():
        preset = found[name]
        assert preset.name == name
        assert preset.optimizer is entry["optimizer"]
        assert preset.hyperparameters == entry.get("hyperparameters", {})
        assert {"true_wd": preset.wd.true_wd, "bn_wd": preset.wd.bn_wd} == entry["wd"]
        assert preset.set_betas is entry.get("set_betas", True)
        assert preset.schedule == ("flat_cosine" if "ranger" in name else "one_cycle")


def test_the_built_in_nine_are_those_of_the_sheet():
    mine = piste.presets.from_mapping(OF_PISTE)
    same = ("optimizer", "hyperparameters", "wd", "set_betas", "schedule", "lr_prior")
    for name, preset in mine.items():
        for attribute in same:
            assert getattr(piste.presets[name], attribute) == getattr(preset, attribute), (name, attribute)


@pytest.mark.parametrize("name", OF_PISTE)
@pytest.mark.parametrize("mapping", [OF_PISTE, OF_TORCH], ids=["piste", "torch"])
def test_true_wd_and_bn_wd_mean_what_they_mean_there(mapping, name):
    """Decoupled decay multiplies by 1 - lr * wd; an L2 term would be averaged, normalised or delayed."""
    preset, model = piste.presets.from_mapping(mapping)[name], small_model()
    optimizer = piste.create(preset, model, lr=0.01, weight_decay=0.5)
    # The released RangerAdaBelief decays inside the direction, whose first step is lr / (1 - beta1) long.
    step = 0.01 / (1 - 0.95) if name.startswith("rangeradabelief") else 0.01
    left = 1 - step * 0.5
    for parameter, value in zero_gradient_step(optimizer, model).items():
        expected = left if parameter in WEIGHTS or preset.wd.bn_wd else 1.0
        assert value == pytest.approx(expected), parameter
    # An L2 term of the first step would push again from the momentum; decoupled decay leaves no trace in the state.
    for p in model.parameters():
        for key, state in optimizer.state[p].items():
            assert key in ("step", "slow") or not torch.as_tensor(state).any()


def test_l2_where_it_is_asked_for():
    mapping = {
        "a": {"optimizer": torch.optim.AdamW, "wd": {"true_wd": False}},
        "s": {"optimizer": torch.optim.SGD, "wd": {"true_wd": False, "bn_wd": False}},
        "p": {"optimizer": piste.AdamW, "wd": {"true_wd": False}},
    }
    for name, preset in piste.presets.from_mapping(mapping).items():
        model = small_model()
        optimizer = piste.create(preset, model, lr=0.1, weight_decay=0.5)
        value = zero_gradient_step(optimizer, model)["0.weight"]
        # Adam's first step is lr long whatever the gradient; SGD's is lr * wd * p.
        assert value == pytest.approx(0.95 if name == "s" else 0.9)


def test_torch_classes_are_used_wherever_they_can():
    mapping = piste.presets.from_mapping(OF_TORCH)
    for name, decay, expected in [
        ("adamw", 0.1, torch.optim.AdamW),
        ("sgd", 0.0, torch.optim.SGD),
        ("sgd", 0.1, piste.SGD),
        ("rmsprop", 0.0, torch.optim.RMSprop),
        ("rmsprop", 0.1, piste.RMSprop),
    ]:
        assert type(piste.create(mapping[name], small_model(), weight_decay=decay)) is expected
    assert type(piste.create(mapping["sgd"], small_model())) is torch.optim.SGD
    model = small_model()
    groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
    assert type(piste.create(mapping["sgd"], groups)) is piste.SGD
    radam = Preset("r", torch.optim.RAdam)
    assert piste.create(radam, model, weight_decay=0.1).param_groups[0]["decoupled_weight_decay"] is True


def test_classes_of_others():
    class Foreign(torch.optim.SGD):
        pass

    class Switchable(torch.optim.SGD):
        def __init__(self, params, lr=0.1, weight_decay=0.3, weight_decouple=False):
            self.seen = weight_decouple
            super().__init__(params, lr=lr, weight_decay=weight_decay)

    assert piste.create(Preset("b", Switchable), small_model()).seen is True
    assert piste.create(Preset("b", Switchable, wd=WeightDecay(true_wd=False)), small_model()).seen is False
    assert type(piste.create(Preset("a", Foreign), small_model())) is Foreign
    with pytest.raises(ValueError, match=r"true_wd=True cannot be had of .*Foreign; legal: weight_decay=0"):
        piste.create(Preset("a", Foreign), small_model(), weight_decay=0.1)


@pytest.mark.parametrize("name", sorted(presets))
def test_every_preset_makes_an_optimizer_that_trains_under_its_schedule(name):
    preset, model = piste.presets[name], small_model()
    optimizer = piste.create(name, model, lr=preset.lr_prior.center)
    assert type(optimizer) is preset.optimizer
    for group in optimizer.param_groups:
        for setting, value in preset.hyperparameters.items():
            assert setting == "lr" or group[setting] == value or group["weight_decay"] == 0.0
        assert group["decoupled_weight_decay"] is preset.wd.true_wd
    schedule = getattr(piste.schedules, preset.schedule)(optimizer, 12)
    x, y = torch.randn(16, 3), torch.randn(16, 2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_what_each_preset_decays():
    everything = {name for name, _ in small_model().named_parameters()}
    for name in presets:
        optimizer = piste.create(name, small_model(), weight_decay=0.1)
        decayed = {n for g in optimizer.param_groups if g["weight_decay"] == 0.1 for n in g["param_names"]}
        assert decayed == (everything if name == "adamw" else WEIGHTS), name
    optimizer = piste.create("adamw", small_model())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01]
    optimizer = piste.create("adamw_no_decay", small_model())
    assert [(group["weight_decay"], group["lr"]) for group in optimizer.param_groups] == [(0.01, 1e-5), (0.0, 1e-5)]
    bare = piste.AdamW(small_model().parameters())
    assert [group["weight_decay"] for group in bare.param_groups] == [0.01]


def test_schedules_never_cycle_the_momentum_of_a_preset_with_set_betas_false():
    for mapping in (piste.presets, piste.presets.from_mapping(OF_TORCH)):
        for name in OF_PISTE:
            optimizer = piste.create(mapping[name], small_model())
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "param_names": ["late"]})
            key = "betas" if "betas" in optimizer.param_groups[0] else "momentum"
            before = [group[key] for group in optimizer.param_groups]
            schedule = piste.schedules.one_cycle(optimizer, 4, moms=(0.8, 0.7, 0.6))
            optimizer.step()
            schedule.step()
            after = [group[key] for group in optimizer.param_groups]
            assert (after == before) is (not mapping[name].set_betas), name


@pytest.mark.parametrize("name", ["muon", "sam+normuon"])
def test_state_is_counted_without_a_warning(name, caplog):
    assert piste.state_bytes(name) >= 4
    assert not caplog.records


@pytest.mark.parametrize("name", ["adamw", "muon", "lookahead+ranger", "sam+sgd"])
def test_weights_without_names_are_named_by_their_place(name):
    def made():
        optimizer = piste.create(name, small_model(), lr=0.1)
        count = len(optimizer.param_groups)
        late = [nn.Parameter(torch.full((2,), 3.0)), nn.Parameter(torch.full((2, 2), 4.0))]
        optimizer.add_param_group({"params": late, **({"rule": "adamw"} if name == "muon" else {})})
        return optimizer, count, late

    optimizer, count, late = made()
    assert optimizer.param_groups[-1]["param_names"] == [f"group{count}.0", f"group{count}.1"]
    again, _, _ = made()
    again.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": late[:1]})
    assert len(optimizer.param_groups) == count + 1


def test_the_mark_survives_saving():
    optimizer = piste.create("sgd_momentum", small_model())
    again = piste.SGD(piste.param_groups(small_model(), weight_decay=0.0), momentum=0.5)
    again.load_state_dict(optimizer.state_dict())
    piste.schedules.one_cycle(again, 4)
    assert again.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize("name", ["ranger21", "sam+ranger21"])
def test_a_schedule_of_its_own_is_told_the_length_of_the_run(name):
    optimizer, schedule = piste.create_with_schedule(name, small_model(), 20)
    known = [(group["total_steps"], group["epochs"], group["batches_per_epoch"]) for group in optimizer.param_groups]
    assert set(known) == {(20, 1, 20)}
    assert schedule.state_dict()["curve"]["name"] == "Constant"
    piste.schedule_for(name, optimizer, 30)  # a second run is longer
    assert {group["total_steps"] for group in optimizer.param_groups} == {30}
    outer, _ = piste.create_with_schedule(name, small_model(), 20, schedule="flat_cosine")
    assert {group["total_steps"] for group in outer.param_groups} == {None}


def test_epochs_that_were_given_have_to_fit_the_length_of_the_run():
    epochs = {"epochs": 4, "batches_per_epoch": 5}
    optimizer, _ = piste.create_with_schedule("ranger21", small_model(), 20, use_cheb=True, **epochs)
    assert {group["epochs"] for group in optimizer.param_groups} == {4}
    with pytest.raises(ValueError, match="total_steps=21 with epochs=4 and batches_per_epoch=5"):
        piste.schedule_for("ranger21", optimizer, 21)
    assert "initial_lr" in optimizer.param_groups[0]
    fresh = piste.create("ranger21", small_model(), **epochs)
    for steps, message in ((21, "their product"), (0, "total_steps")):
        with pytest.raises(ValueError, match=message):
            piste.schedule_for("ranger21", fresh, steps)
    assert all("initial_lr" not in group for group in fresh.param_groups)


@pytest.mark.parametrize("name", ["sgd", "sgd_momentum", "sgd_nesterov", "rmsprop"])
def test_betas_are_refused_by_name(name):
    with pytest.raises(ValueError, match=r"betas=\(0.9, 0.99\).*set_betas=False"):
        piste.create(name, small_model(), betas=(0.9, 0.99))
    with pytest.raises(ValueError, match="sets betas, which its set_betas=False forbids"):
        Preset("mine", torch.optim.AdamW, {"betas": (0.9, 0.99)}, set_betas=False)


def test_eps_by_domain():
    for name in ("rangeradabelief", "rangeradabelief_nogc", "adabelief"):
        for domain, eps in [("vision", 1e-8), ("nlp", 1e-16), ("rl", 1e-12)]:
            optimizer = piste.create(name, small_model(), domain=domain)
            assert {group["eps"] for group in optimizer.param_groups} == {eps}
    assert piste.create("rangeradabelief", small_model()).param_groups[0]["eps"] == 1e-12
    assert piste.RangerAdaBelief(small_model().parameters()).param_groups[0]["eps"] == 1e-12
    with pytest.raises(ValueError, match=r"domain='visoin' is not legal \(did you mean 'vision'\?\)"):
        piste.create("rangeradabelief", small_model(), domain="visoin")
    with pytest.raises(ValueError, match="only for presets with domains: rangeradabelief"):
        piste.create("ranger", small_model(), domain="nlp")
    with pytest.raises(ValueError, match="both domain= and eps="):
        piste.create("rangeradabelief", small_model(), domain="nlp", eps=1e-8)


def test_overrides_reach_the_class_and_the_groups():
    tables = []
    optimizer = piste.create(
        "Ranger",
        small_model(),
        lr=2e-3,
        k=5,
        engine="reference",
        weight_decay=0.3,
        decay_norm_and_bias=True,
        table=tables.append,
    )
    (group,) = optimizer.param_groups
    assert (group["lr"], group["k"], group["weight_decay"]) == (2e-3, 5, 0.3)
    assert len(tables) == 1
    optimizer = piste.create("adamw", small_model(), layer_decay=0.5, decoupled_weight_decay=False)
    assert {group["lr"] for group in optimizer.param_groups} == {2e-3, 1e-3, 5e-4}
    assert not any(group["decoupled_weight_decay"] for group in optimizer.param_groups)
    optimizer = piste.create("adamw", small_model(), layer_decay=0.5, lr=1.0)
    assert {group["lr"] for group in optimizer.param_groups} == {1.0, 0.5, 0.25}


def rates(optimizer):
    return {group["lr"] for group in optimizer.param_groups}


@pytest.mark.parametrize("name", sorted(presets))
def test_without_lr_a_preset_starts_in_the_range_where_a_race_looks(name):
    preset = presets[name]
    fixed = {"adamw_no_decay": 1e-5, "adafactor": 1e-2}.get(name)
    expected = preset.lr_prior.center if fixed is None else fixed
    for made in (name, preset):
        assert rates(piste.create(made, small_model())) == {expected}
        assert rates(piste.create(made, list(small_model().parameters()))) == {expected}
    assert rates(piste.create(name, small_model(), lr=0.0)) == {0.0}
    if fixed is None:
        assert preset.hyperparameters.get("lr") is None


def test_the_learning_rates_of_the_older_optimizers_are_not_adams():
    found = {name: rates(piste.create(name, small_model())) for name in ("sgd", "sgd_momentum", "rmsprop")}
    assert found == {"sgd": {0.5}, "sgd_momentum": {0.05}, "rmsprop": {2e-4}}


def test_a_mapping_keeps_its_learning_rates():
    class Foreign(torch.optim.SGD):
        """Of a name that piste does not know, with a default of its own."""

        def __init__(self, params, lr=0.125, weight_decay=0.0):
            super().__init__(params, lr=lr, weight_decay=weight_decay)

    class Chooser(Foreign):
        """Sets its learning rate itself, as transformers' Adafactor does."""

        def __init__(self, params, lr=None):
            super().__init__(params, lr=0.75 if lr is None else lr)

    no_decay = {"true_wd": False, "bn_wd": True}
    found = piste.presets.from_mapping(
        {
            "said": {"optimizer": torch.optim.SGD, "hyperparameters": {"momentum": 0.9, "lr": 0.7}},
            "unsaid": {"optimizer": torch.optim.SGD, "hyperparameters": {"momentum": 0.9}},
            "foreign": {"optimizer": Foreign, "wd": no_decay},
            "chooser": {"optimizer": Chooser, "wd": no_decay},
        }
    )
    assert dict(found["unsaid"].hyperparameters) == {"momentum": 0.9}
    made = {name: rates(piste.create(preset, small_model())) for name, preset in found.items()}
    # Where the dictionary says nothing, the preset is the built-in one: sgd_momentum.
    assert made == {"said": {0.7}, "unsaid": {0.05}, "foreign": {0.125}, "chooser": {0.75}}
    assert found["foreign"].lr_prior == LrPrior(0.125, 1.5, 1.5)


def test_groups_with_their_own_rates_keep_them():
    model = small_model()
    groups = [{"params": list(model.parameters()), "lr": 0.3}]
    assert rates(piste.create("adamw", groups)) == {0.3}


def test_a_preset_of_any_class_looks_around_its_default():
    assert Preset("a", torch.optim.Adadelta).lr_prior == LrPrior(1.0, 1.5, 1.5)
    assert Preset("a", torch.optim.SGD, lr_prior=LrPrior(3.0)).lr_prior == LrPrior(3.0)
    with pytest.raises(TypeError, match=r"preset .a.: lr_prior=0\.1; legal: an LrPrior"):
        Preset("a", torch.optim.SGD, lr_prior=0.1)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("momentun", "'momentum'"),
        ("weigth_decay", "'weight_decay'"),
        ("layer_decya", "'layer_decay'"),
        ("enigne", "'engine'"),
    ],
)
def test_unknown_overrides_are_refused_with_the_nearest(override, hint):
    with pytest.raises(ValueError, match=f"unknown option '{override}' \\(did you mean .*{hint}"):
        piste.create("sgd_momentum", small_model(), **{override: 0.1})


@pytest.mark.parametrize("name", ["RangerAdaBelief", "ranger-adabelief", "ranger_adabelief", "RANGERADABELIEF"])
def test_names_are_found_whatever_their_case_and_hyphens(name):
    assert type(piste.create(name, small_model())) is piste.RangerAdaBelief
    assert piste.optimizer_info(name).optimizer is piste.RangerAdaBelief


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match="no optimizer 'sgd_momentun' \\(did you mean 'sgd_momentum'"):
        piste.create("sgd_momentun", small_model())
    with pytest.raises(ValueError, match="no optimizer 'rangerr' \\(did you mean 'ranger'"):
        piste.create("rangerr", small_model())
    with pytest.raises(ValueError, match=r"no optimizer 'qqq'; piste.list_optimizers\(\)"):
        piste.create("qqq", small_model())
    with pytest.raises(ValueError, match="no optimizer class 'AdmaW' \\(did you mean 'AdamW'"):
        piste.optimizer_info("AdmaW")
    with pytest.raises(KeyError, match="did you mean 'sgd_momentum'"):
        piste.presets["sgd_momentun"]
    with pytest.raises(TypeError, match="name is a type"):
        piste.create(piste.SGD, small_model())
    with pytest.raises(TypeError, match="one tensor"):
        piste.create("sgd", nn.Parameter(torch.ones(2)))


def test_bare_parameters_are_all_decayed_and_that_is_said(caplog):
    with caplog.at_level(logging.WARNING, logger="piste"):
        piste.create("adamw", small_model().parameters())
        piste.create("sgd", small_model().parameters())
        piste.create("ranger", piste.param_groups(small_model()))
        assert not caplog.records
        optimizer = piste.create("ranger", small_model().named_parameters())
    assert "bare parameters do not say" in caplog.text
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01]
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"
    with pytest.raises(ValueError, match=r"layer_decay=0.5 with bare parameters; legal: only with a model"):
        piste.create("adamw", small_model().parameters(), layer_decay=0.5)


def test_presets_are_frozen_and_can_be_copied():
    preset = piste.presets["sgd_momentum"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset.schedule = "constant"
    with pytest.raises(TypeError):
        preset.hyperparameters["momentum"] = 0.5
    with pytest.raises(TypeError):
        piste.presets["mine"] = preset
    with pytest.raises(TypeError):
        piste.presets["adabelief"].domains["nlp"]["eps"] = 1.0
    for twin in (pickle.loads(pickle.dumps(preset)), copy.deepcopy(preset), dataclasses.replace(preset)):
        assert twin == preset
    settings = {"momentum": 0.9}
    mine = Preset("mine", torch.optim.SGD, settings)
    settings["momentum"] = 0.1
    assert mine.hyperparameters["momentum"] == 0.9


def test_every_preset_says_what_it_is():
    for name, preset in piste.presets.items():
        assert preset.name == name
        assert preset.source
        assert preset.description.endswith(".")
        assert preset.gradient_evaluations == 1
        assert preset.lr_prior.decades_below + preset.lr_prior.decades_above == 2.0
        assert callable(getattr(piste.schedules, preset.schedule))
        flat = ("ranger" in name and "ranger21" not in name) or name in ("over9000", "ralamb")  # 21 brings its own
        assert (preset.schedule == "flat_cosine") is flat
        assert set(preset.domains) == ({"vision", "nlp", "rl"} if "belief" in name else set())


BAD = [
    ({"m": {"optimizer": torch.optim.SGD, "hyperparameter": {}}}, "did you mean 'hyperparameters'"),
    ({"m": {"optimizer": torch.optim.SGD, "hyperparameters": {"momentun": 1}}}, "did you mean 'momentum'"),
    ({"m": {"optimizer": torch.optim.SGD, "wd": {"true_dw": True}}}, "did you mean 'true_wd'"),
    ({"m": {"optimizer": torch.optim.SGD, "wd": {"true_wd": 1}}}, "true_wd=1 is not legal"),
    ({"m": {"optimizer": torch.optim.SGD, "set_betas": "no"}}, "set_betas='no' is not legal"),
    ({"m": {"optimizer": torch.optim.SGD, "schedule": "one_cycel"}}, "did you mean 'one_cycle'"),
    ({"m": {"optimizer": "SGD"}}, "optimizer='SGD'"),
    ({"m": {"optimizer": nn.Linear}}, "legal: a torch.optim.Optimizer class"),
    ({"m": {}}, "optimizer=None"),
    ({"m": torch.optim.SGD}, "legal: a dictionary with the keys"),
    ({"m": {"optimizer": torch.optim.SGD, "wd": True}}, "legal: a dictionary with the keys"),
]


@pytest.mark.parametrize(("mapping", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_mappings(mapping, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        piste.presets.from_mapping(mapping)
    assert message in str(caught.value)
    assert "'m'" in str(caught.value) or "true_wd" in message or "one_cycle" in message


def test_bad_priors():
    for arguments in [(0.0,), (-1.0,), (float("nan"),), (float("inf"),), (1e-3, -1.0), (1e-3, float("nan"))]:
        with pytest.raises(ValueError, match="is not legal; legal: center > 0"):
            LrPrior(*arguments)


def test_list_optimizers():
    assert piste.list_optimizers() == sorted(piste.presets)
    assert piste.list_optimizers("ranger*") == [
        "ranger",
        "ranger21",
        "ranger21_madgrad",
        "ranger_nogc",
        "rangeradabelief",
        "rangeradabelief_nogc",
        "rangerlars",
    ]
    assert piste.list_optimizers("SGD-?esterov") == ["sgd_nesterov"]
    assert piste.list_optimizers("nothing") == []


def test_the_registry_has_every_class_once():
    assert [info.name for info in OPTIMIZERS] == sorted(optimizers.__all__, key=str.lower)
    for info in OPTIMIZERS:
        assert isinstance(info, OptimizerInfo)
        assert info.optimizer is getattr(piste, info.name)
        assert info.source
        assert info.oracle
        assert piste.presets[info.name.lower()].optimizer is info.optimizer


# The settings under which a class keeps all it can keep.
ALL_STATE = {
    "Shampoo": {"form": "google"},
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adam": {"amsgrad": True},
    "AdamW": {"amsgrad": True},
    "LookaheadAdam": {"amsgrad": True},
    "NovoGrad": {"lr": 0.05, "amsgrad": True, "weight_decay": 0.05},
    "AdaBelief": {"amsgrad": True, "rectify": False},
    "Adafactor": {"lr": 0.1, "beta1": 0.9},
    "Amos": {"momentum": 0.9},
}


@pytest.mark.parametrize("info", OPTIMIZERS, ids=lambda info: info.name)
def test_the_registry_names_the_state_of_a_class(info):
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 3))]  # some rules keep other states of matrices
    optimizer = info.optimizer(weights, **ALL_STATE.get(info.name, {}))
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.step()
    # kept only where somebody brings them, or by the other form
    given = {"statistics", *(("bases", "eigenvalues") if info.name == "Shampoo" else ())}
    assert {name for weight in weights for name in optimizer.state[weight]} == {"step", *info.state} - given


def test_with_decay_takes_a_class_that_can_do_it() -> None:
    sgd = Preset("sgd", torch.optim.SGD)
    assert (sgd.wd.true_wd, sgd.with_decay().optimizer) == (True, piste.SGD)
    assert sgd.with_decay(true_wd=False).optimizer is torch.optim.SGD  # whose decay is L2
    assert sgd.with_decay(true_wd=False).wd.true_wd is False
    assert piste.presets["sam+adamw"].with_decay(true_wd=False).wrappings == ("sam",)
    with pytest.raises(ValueError, match=r"true_wd=True cannot be had of torch.optim.*Rprop"):
        Preset("rprop", torch.optim.Rprop).with_decay()


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda model: piste.AdamW(model), "AdamW got params=Linear; legal: an iterable of tensors, pairs or groups"),
        (lambda model: piste.AdamW(None), "AdamW got params=NoneType; legal: an iterable"),
        (lambda model: piste.create("adamw", nn.Linear), "model_or_params is the class Linear; legal: a model"),
        (lambda model: piste.create("adamw", None), "model_or_params is NoneType; legal: a model"),
        (lambda model: piste.race_optimizer(3), "model_or_params is int; legal: a model"),
        (lambda model: piste.estimate_memory(3, "adamw"), "model is a int; legal: an instance of nn.Module"),
        (lambda model: piste.AdamW(model.parameters()).load_state_dict(None), "state_dict is NoneType; legal: what an"),
        (lambda model: piste.JointStep([3]), "JointStep got optimizers with a int; legal: instances of Optimizer"),
    ],
)
def test_what_is_of_the_wrong_kind_is_named_with_what_belongs_there(act: Any, words: str) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        act(nn.Linear(2, 1))


def test_a_misspelt_argument_of_a_class_finds_its_name() -> None:
    with pytest.raises(ValueError, match=r"unknown option 'weigth_decay' \(did you mean 'weight_decay'"):
        piste.AdamW(nn.Linear(2, 1).parameters(), weigth_decay=0.1)  # type: ignore[call-arg]


def test_two_passes_are_not_put_into_two_passes() -> None:
    inside = piste.Lookahead(piste.SAM(piste.SGD(nn.Linear(2, 1).parameters())))
    with pytest.raises(ValueError, match="GSAM got an optimizer that is in SAM already"):
        piste.GSAM(inside)
