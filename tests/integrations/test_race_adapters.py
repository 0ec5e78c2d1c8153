"""Tasks from a LightningModule and from a Trainer, with the real frameworks: their loss and batches, our training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler
from torchmetrics.classification import MulticlassAccuracy
from transformers import Trainer, TrainingArguments

from piste.race import Splits, Task
from piste.race.adapters import lightning_task, trainer_task
from piste.race.contenders import make_contenders
from piste.race.data import fetch, length, training_batches
from piste.race.inspection import inspect_task, load_data
from piste.race.record import CONFIRM, FINISHED, RunKey, RunRecord
from piste.race.training import evaluate, fresh_model, run

CPU = torch.device("cpu")
CLASSES, STEPS = 3, 30


def raced(task: Task) -> RunRecord:
    """Inspect the task as the race does, and make one run of it."""
    splits = load_data(task)
    assert inspect_task(task.name, task, "f00d", splits, CPU).parameters > 0
    contender = make_contenders(("adamw",), ())[0]
    key = RunKey(task.name, "f00d", contender.name, "adamw", "one_cycle", {"lr": 0.03}, STEPS, 1, CONFIRM, "cpu", {})
    made = run(task, splits, contender, key, lambda step: None)
    assert made.status == FINISHED, made.message
    return made


def points(seed: int, count: int = 60) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=draw)
    return TensorDataset(x, x[:, :CLASSES].argmax(dim=1))


def loaders() -> tuple[DataLoader[Any], ...]:
    return tuple(DataLoader(points(seed), batch_size=12, shuffle=seed == 0) for seed in range(3))


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, CLASSES))
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        loss = nn.functional.cross_entropy(self.layers(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return {"loss": loss}

    def validation_step(self, batch: Any) -> None:
        x, y = batch
        self.accuracy.update(self.layers(x), y)
        self.log_dict({"val_acc": self.accuracy, "one": 1.0})


class Data(lightning.LightningDataModule):
    def setup(self, stage: str) -> None:
        self.made = {**getattr(self, "made", {}), stage: loaders()}

    def train_dataloader(self) -> Any:
        return self.made["fit"][0]

    def val_dataloader(self) -> Any:
        return self.made["fit"][1]

    def test_dataloader(self) -> Any:
        return self.made["test"][2]


@pytest.mark.parametrize("data", [Data, loaders])
def test_a_lightning_module_races(data: Callable[[], Any]) -> None:
    task = lightning_task("light", Classifier, data, metric="val_acc", higher_is_better=True, steps=STEPS)
    assert (task.batch_size, task.metric_name) == (12, "val_acc")
    made = raced(task)
    assert made.test_metric is not None
    assert made.test_metric > 0.6 > made.curve.valid_metric[0]


def test_scores_are_those_of_the_metric_and_start_anew_for_each_batch() -> None:
    task = lightning_task("light", Classifier, loaders, metric="val_acc", higher_is_better=True)
    splits, model = load_data(task), fresh_model(task, 0, CPU)
    x, y = fetch(splits.valid, torch.arange(length(splits.valid)))
    model.eval()
    right = (model.layers(x).argmax(1) == y).float().mean()  # type: ignore[operator]
    for _ in range(2):
        assert evaluate(task, model, splits.valid, CPU)[1] == pytest.approx(float(right))
    assert not {"log", "log_dict"} & set(vars(model))


class ByHand(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Silent(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        return None


@pytest.mark.parametrize(
    ("module", "metric", "message"),
    [
        (ByHand, None, "ByHand optimizes by hand"),
        (Silent, None, "training_step gives NoneType"),
        (Classifier, "f1", "validation_step does not log 'f1'; it logs val_acc, one"),
    ],
)
def test_modules_that_cannot_race(module: Any, metric: str | None, message: str) -> None:
    task = lightning_task("light", module, loaders, metric=metric, steps=STEPS)
    with pytest.raises(ValueError, match=message):
        inspect_task("light", task, "f00d", load_data(task), CPU)


def test_wrong_arguments_of_the_lightning_adapter() -> None:
    splits = Splits(*(points(seed) for seed in range(3)))
    with pytest.raises(ValueError, match="loss= is what this adapter makes"):
        lightning_task("light", Classifier, loaders, loss=max)
    with pytest.raises(ValueError, match="the size of batches is not known; legal: batch_size="):
        lightning_task("light", Classifier, lambda: splits)
    assert lightning_task("light", Classifier, lambda: splits, batch_size=7).batch_size == 7
    with pytest.raises(ValueError, match=r"data\(\) gives int; legal: three DataLoaders"):
        lightning_task("light", Classifier, lambda: 3)


class Words(Dataset[Any]):
    """Rows of unequal length, with a column that the model does not take."""

    def __init__(self, count: int = 40) -> None:
        draw = torch.Generator().manual_seed(count)
        self.rows = [
            {"input_ids": torch.randint(1, 20, (3 + i % 4,), generator=draw).tolist(), "labels": i % 2}
            for i in range(count)
        ]
        for row in self.rows:  # learnable: the first word says the label
            row["input_ids"][0] = 1 + row["labels"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8, padding_idx=0)
        self.out = nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.out(self.words(input_ids).sum(1) / attention_mask.sum(1, keepdim=True))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Padder:
    """As DataCollatorWithPadding: a tokenizer's class of mapping, no dict."""

    def __call__(self, examples: list[Any]) -> Any:
        from transformers import BatchEncoding

        rows = [torch.tensor(example["input_ids"]) for example in examples]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels = torch.tensor([example["labels"] for example in examples])
        return BatchEncoding({"input_ids": padded, "attention_mask": (padded > 0).long(), "labels": labels})


class Doubling(Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, **kwargs)
        return (2 * loss, None) if return_outputs else 2 * loss


def make_trainer(folder: Path, kind: type[Trainer] = Trainer, **changes: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=8, use_cpu=True, report_to=[], disable_tqdm=True
    )
    settings = {"model": Reader(), "train_dataset": Words(), "eval_dataset": Words(20), "data_collator": Padder()}
    return kind(args=arguments, **{**settings, **changes})


@pytest.mark.parametrize("kind", [Trainer, Doubling])
def test_a_trainer_races(tmp_path: Path, kind: type[Trainer]) -> None:
    task = trainer_task("words", lambda: make_trainer(tmp_path, kind), steps=STEPS, domain="nlp")
    assert task.batch_size == 8
    splits = load_data(task)
    assert [length(part) for part in (splits.train, splits.valid, splits.report)] == [40, 10, 10]
    batch = next(training_batches(splits.train, 8, seed=0))
    assert batch["input_ids"].shape[0] == 8
    model = fresh_model(task, 0, CPU)
    factor = 2 if kind is Doubling else 1
    torch.testing.assert_close(task.loss(model, batch), factor * model(**batch)["loss"])
    made = raced(task)
    assert made.test_loss is not None
    assert made.test_loss < made.curve.valid_loss[0] / 2


@pytest.mark.parametrize("from_init", [False, True])
def test_seeds_decide_initial_weights(tmp_path: Path, from_init: bool) -> None:
    """A trainer seeds torch when it is made."""
    changes: dict[str, Any] = {"model": None, "model_init": Reader} if from_init else {}
    make = (lambda: make_trainer(tmp_path, **changes)) if from_init else (lambda: make_trainer(tmp_path))
    task = trainer_task("words", make, steps=STEPS)
    first, again, other = (fresh_model(task, seed, CPU).out.weight for seed in (0, 0, 1))  # type: ignore[union-attr]
    assert torch.equal(first, again)  # type: ignore[arg-type]
    assert not torch.equal(first, other)  # type: ignore[arg-type]


def test_scores_on_data_of_their_own_and_a_metric(tmp_path: Path) -> None:
    def accuracy(model: nn.Module, batch: Any) -> Tensor:
        return (model(**batch)["logits"].argmax(1) == batch["labels"]).float().mean()

    named = {"metric": accuracy, "metric_name": "accuracy", "higher_is_better": True}
    task = trainer_task("words", lambda: make_trainer(tmp_path), report=Words(30), steps=STEPS, **named)
    splits = load_data(task)
    assert [length(part) for part in (splits.valid, splits.report)] == [20, 30]
    made = raced(task)
    assert made.test_metric is not None
    assert made.test_metric > 0.8


class Weighted(Trainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        return WeightedRandomSampler([1.0] * 40, 40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_dataset": None}, "the trainer needs one eval_dataset"),
        ({"eval_dataset": {"a": Words(4)}}, "the trainer needs one eval_dataset"),
        ({"kind": Weighted}, "train is a DataLoader with a WeightedRandomSampler"),
    ],
)
def test_trainers_that_cannot_race(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_task("words", lambda: make_trainer(tmp_path, **changes))
