"""Sharpness-aware training for free: a loss that holds the model to what it said before, instead of a second pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from piste.checks import check_hyperparameters
from piste.storage import State
from piste.wrappers.base import Wrapper
from piste.wrappers.ema import ModelEMA

__all__ = ["MESA", "SAF"]


def _divergence(now: Tensor, past: Tensor, temperature: float) -> Tensor:
    """``tau^2 KL(softmax(past / tau) | softmax(now / tau))``, the mean over samples (Du et al. 2022, eq. 6)."""
    target = torch.log_softmax(past.to(now.dtype) / temperature, -1)
    loss = nn.functional.kl_div(torch.log_softmax(now / temperature, -1), target, reduction="none", log_target=True)
    return temperature**2 * loss.sum(-1).mean()


class _Trajectory(Wrapper):
    """An optimizer that a term of the loss belongs to; a step without it is refused."""

    name = "trajectory"

    def __init__(self, optimizer: torch.optim.Optimizer, weight: float, temperature: float, start: int) -> None:
        owner = type(self).__name__
        given = {"weight": weight, "temperature": temperature, "start": start}
        check_hyperparameters(owner, given, given)
        super().__init__(optimizer)
        self.weight, self.temperature, self.start = weight, temperature, start
        self._given = False

    def states(self) -> Mapping[str, State]:
        return {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the optimizer inside.

        Args:
            closure: computes the loss, :meth:`trajectory_loss` included, with its gradients, and returns it.

        Raises:
            RuntimeError: ``trajectory_loss`` was not called since the last step. Nothing was changed, unless by the
                closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._given:
            raise RuntimeError(
                f"{type(self).__name__}.step() without its part of the loss: add optimizer.trajectory_loss(...) to the "
                "loss before backward(), in every step"
            )
        self._given = False
        _, taken = self.inner_step(None)
        self._stepped(taken)
        return loss

    def _stepped(self, taken: bool) -> None:
        """What follows a step."""

    def _saved(self) -> dict[str, Any]:
        """What is saved beside the state of the optimizer inside."""
        raise NotImplementedError

    def _load(self, saved: dict[str, Any]) -> None:
        raise NotImplementedError

    def _packed(self) -> dict[str, Any]:
        return {**super()._packed(), self.name: self._saved()}

    def _unpack(self, state_dict: dict[str, Any]) -> None:
        if self.name not in state_dict:
            raise ValueError(
                f"state_dict has no {self.name!r}; it is not what {type(self).__name__}.state_dict() returns"
            )
        before = self._saved()
        self._load(state_dict[self.name])
        try:
            super()._unpack({k: v for k, v in state_dict.items() if k != self.name})
        except Exception:
            self._load(before)
            raise
        self._given = False

    def _checked(self, entries: Mapping[str, Any], weight: Tensor, name: str) -> dict[str, Any]:
        return {"step": 0}


class SAF(_Trajectory):
    r"""Sharpness-aware training for free: each sample's prediction stays near that of some epochs ago.

    .. math::
        L + \lambda \tau^2\, \mathrm{KL}\!\left(\mathrm{softmax}(z_{e - \tilde e} / \tau)\,\middle\|\,
            \mathrm{softmax}(z_e / \tau)\right)

    with the logits :math:`z_e` of a sample in epoch :math:`e`. The predictions are kept by the sample's index in the
    data set, and what counts as an epoch is that the sample was seen again: reshuffling changes nothing. Where several
    processes train (``torch.distributed``), each is told what the others saw. Some lists call this paper "ESAM".

    **When to use**: classification for many epochs, at the cost of a plain optimizer. **When not**: few epochs, as
    nothing happens before ``start``; data without a stable index; labels that are mixed (mixup), which past predictions
    were not for.

    State: that of the optimizer inside; and in host memory :math:`\tilde e + 1` predictions of 2 bytes a class for each
    sample: 10 GB for ImageNet, in each process.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        samples: size of the data set.
        classes: size of the logits' last axis.
        weight: :math:`\lambda`.
        temperature: :math:`\tau`.
        lag: :math:`\tilde e`, how many visits ago, 1 or more.
        start: how many visits of a sample pass before its past counts, ``lag`` or more.

    Raises:
        TypeError, ValueError: as usual, before anything is changed.
        RuntimeError: by a step without :meth:`trajectory_loss`.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = piste.SAF(torch.optim.SGD(model.parameters(), lr=0.1), samples=100, classes=3)
        >>> x, y, index = torch.randn(8, 4), torch.randint(3, (8,)), torch.arange(8)
        >>> logits = model(x)
        >>> loss = torch.nn.functional.cross_entropy(logits, y) + optimizer.trajectory_loss(logits, index)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Du, Zhou, Feng, Tan, Zhou, "Sharpness-aware training for free" (NeurIPS 2022, arXiv 2205.14083); defaults
    are those of its released code and README.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        samples: int,
        classes: int,
        weight: float = 0.3,
        temperature: float = 5.0,
        lag: int = 3,
        start: int = 5,
    ) -> None:
        super().__init__(optimizer, weight, temperature, start)
        given = {"samples": samples, "classes": classes, "lag": lag}
        check_hyperparameters("SAF", given, given)
        if start < lag:
            raise ValueError(f"SAF got start={start!r} with lag={lag!r}; legal: a whole number >= lag")
        self.lag = lag
        self._visits = torch.zeros(samples, dtype=torch.int32)
        self._logits = torch.zeros(lag + 1, samples, classes, dtype=torch.float16)

    def trajectory_loss(self, logits: Tensor, index: Tensor) -> Tensor:
        """This optimizer's part of the loss; remembers the logits.

        Args:
            logits: of a batch, of shape (samples, classes).
            index: which samples of the data set they are, a vector of whole numbers.

        Returns:
            One number, 0 for samples that have not been seen often enough.

        Raises:
            ValueError: shapes do not fit, or an index is outside of the data set. Nothing is remembered then.
        """
        slots, samples, classes = self._logits.shape
        whole = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
        if logits.ndim != 2 or logits.shape[1] != classes or index.shape != logits.shape[:1] or not whole:
            raise ValueError(
                f"SAF got logits of {tuple(logits.shape)} and index of {tuple(index.shape)} ({index.dtype}); legal: "
                f"logits of (n, {classes}) and n whole numbers, the places of these samples in the data set"
            )
        places = index.detach().to("cpu", torch.int64)
        if places.numel() and not (int(places.min()) >= 0 and int(places.max()) < samples):
            raise ValueError(
                f"SAF got index from {int(places.min())} to {int(places.max())}; legal: 0 to {samples - 1}"
            )
        visits = self._visits[places]
        past = self._logits[(visits - self.lag) % slots, places]
        known = visits >= self.start
        loss = logits.new_zeros(())
        if known.any():
            rows = known.nonzero().flatten().to(logits.device)
            loss = self.weight * _divergence(logits[rows], past[known].to(logits.device), self.temperature)
            loss = loss * (len(rows) / len(places))  # a mean over the batch, in which the others count as zero
        self._remember(*_of_all_processes(places, logits.detach().to("cpu", torch.float16)))
        self._given = True
        return loss

    def _remember(self, places: Tensor, logits: Tensor) -> None:
        visits = self._visits[places]
        self._logits[visits % len(self._logits), places] = logits
        self._visits[places] = visits + 1

    def _saved(self) -> dict[str, Any]:
        return {"visits": self._visits.clone(), "logits": self._logits.clone()}

    def _load(self, saved: dict[str, Any]) -> None:
        for name, mine in (("visits", self._visits), ("logits", self._logits)):
            value = saved.get(name)
            if not isinstance(value, Tensor) or value.shape != mine.shape:
                had = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"state_dict has {name} of {had}; expected {tuple(mine.shape)}")
        self._visits, self._logits = saved["visits"].clone().to("cpu"), saved["logits"].clone().to("cpu")


class MESA(_Trajectory):
    r"""Memory-efficient SAF: predictions stay near those of the averaged weights on the same batch.

    .. math::
        L + \lambda \tau^2\, \mathrm{KL}\!\left(\mathrm{softmax}(\bar z / \tau)\,\middle\|\,
            \mathrm{softmax}(z / \tau)\right)

    with the logits :math:`\bar z` of the model in evaluation mode with an exponential moving average of its weights.

    **When to use**: as SAF, where predictions of all samples do not fit or samples have no index. **When not**: where
    one more forward pass is too much; beside another :class:`piste.ModelEMA` of the same decay: use ``optimizer.ema``.

    State: that of the optimizer inside, and 4 bytes per parameter for the average, saved.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        model: the model, as it is trained.
        weight: :math:`\lambda`.
        temperature: :math:`\tau`.
        decay: of the average.
        start: how many steps pass before it counts.

    Raises:
        TypeError, ValueError: as usual, before anything is changed.
        RuntimeError: by a step without :meth:`trajectory_loss`.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = piste.MESA(torch.optim.SGD(model.parameters(), lr=0.1), model)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> logits = model(x)
        >>> loss = torch.nn.functional.cross_entropy(logits, y) + optimizer.trajectory_loss(logits, x)
        >>> loss.backward()
        >>> optimizer.step()

    Source: as :class:`SAF`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        weight: float = 0.8,
        temperature: float = 5.0,
        decay: float = 0.9995,
        start: int = 0,
    ) -> None:
        super().__init__(optimizer, weight, temperature, start)
        #: the average, a :class:`piste.ModelEMA`
        self.ema = ModelEMA(model, decay, warmup=False)
        self.steps = 0

    def trajectory_loss(self, logits: Tensor, *inputs: Any, **named: Any) -> Tensor:
        """This optimizer's part of the loss.

        Args:
            logits: what the model made of these inputs, of shape (samples, classes).
            *inputs: what the model is called with.
            **named: likewise.

        Returns:
            One number, 0 before there is an average.
        """
        loss = logits.new_zeros(())
        if self.ema.updates and self.steps >= self.start:
            loss = self.weight * _divergence(logits, self._past(*inputs, **named), self.temperature)
        self._given = True
        return loss

    @torch.no_grad()
    def _past(self, *inputs: Any, **named: Any) -> Tensor:
        model = self.ema.model
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            found: Tensor = torch.func.functional_call(model, self.ema.tensors(), inputs, named)
        finally:
            for module, training in modes:
                module.training = training
        return found

    def _stepped(self, taken: bool) -> None:
        if taken:
            self.steps += 1
            self.ema.update(self.optimizer)

    def _saved(self) -> dict[str, Any]:
        return {"ema": self.ema.state_dict(), "steps": self.steps}

    def _load(self, saved: dict[str, Any]) -> None:
        self.ema.load_state_dict(saved["ema"])
        self.steps = int(saved["steps"])


def _of_all_processes(places: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """What all processes have to remember, in the order of processes; their batches may differ in size."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return places, logits
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, (places, logits))
    return torch.cat([pair[0] for pair in gathered]), torch.cat([pair[1] for pair in gathered])
