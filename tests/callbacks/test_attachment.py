"""Attachment: methods of a LightningModule that ask the callbacks, and otherwise stay what the user wrote."""

import copy
import functools
import inspect
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import MethodType, ModuleType
from typing import Any

import lightning.pytorch
import pytest
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_qat.callbacks.attachment import ModuleHooks, attach, averaged_models, callbacks_of, detach, is_attached
from tests.callbacks._models import FLAVORS, Net, _Methods, adamw, fit, loader, trainer


class Recorder(lightning.pytorch.Callback, ModuleHooks):
    """Writes down what happens in which order."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        attach(pl_module)
        attach(pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        detach(pl_module)

    def layers_created(self, pl_module: Any) -> None:
        self.seen.append("layers_created")

    def building_optimizers(self, pl_module: Any) -> AbstractContextManager[Any]:
        return self._around("optimizers")

    def running_training_step(self, pl_module: Any) -> AbstractContextManager[Any]:
        return self._around("step")

    @contextmanager
    def _around(self, name: str) -> Iterator[None]:
        self.seen.append(f"{name} begins")
        yield
        self.seen.append(f"{name} ends")

    def loading_checkpoint(self, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.seen.append("loading")

    def saving_checkpoint(self, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["mark"] = 1

    def training_step_done(self, pl_module: Any, output: Any, batch: Any) -> Any:
        self.seen.append(f"output of {len(batch[0])} samples")
        return output

    def before_manual_backward(self, pl_module: Any, loss: Tensor) -> Tensor:
        self.seen.append("backward")
        return 2 * loss


class Manual(Net):
    """Optimizes by hand and keeps the gradient of its only step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self(batch[0]).sum())
        self.gradient = self.head.bias.grad.clone()
        optimizer.step()


@pytest.mark.parametrize(("pl", "kind"), FLAVORS)
def test_order_of_hooks(pl: ModuleType, kind: type[Any]) -> None:
    recorder, model = Recorder(), kind()
    fit(model, recorder, train=loader(16), pl=pl, limit_train_batches=1)
    assert recorder.seen == [
        "layers_created",  # setup
        "layers_created",  # configure_model
        "optimizers begins",
        "optimizers ends",
        "step begins",
        "output of 8 samples",
        "step ends",
    ]
    assert type(model) is kind


def test_loss_of_manual_backward_is_the_callbacks() -> None:
    model, recorder = Manual(), Recorder()
    fit(model, recorder, train=loader(8))
    assert recorder.seen[-4:] == ["step begins", "backward", "output of 8 samples", "step ends"]
    assert torch.equal(model.gradient, torch.full((3,), 16.0))  # 2 x the 8 samples


def test_checkpoints_of_weights_alone_and_their_loading_are_seen(tmp_path: Any) -> None:
    recorder = Recorder()

    class Saves(lightning.pytorch.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)

    fit(Net(), recorder, Saves(), limit_train_batches=1)
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["mark"] == 1
    trainer(recorder).test(Net(), loader(8), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert recorder.seen[-1] == "loading"


@pytest.mark.parametrize(("pl", "kind"), FLAVORS)
def test_what_lightning_looks_at_stays(pl: ModuleType, kind: type[Any]) -> None:
    class Bare(pl.LightningModule):  # type: ignore[name-defined,misc]
        pass

    check: Any = is_overridden if pl is lightning.pytorch else None
    if check is None:
        from pytorch_lightning.utilities.model_helpers import is_overridden as check
    for module in (Bare(), kind()):
        names = ("setup", "configure_model", "configure_optimizers", "training_step", "on_save_checkpoint")
        before = {name: (check(name, module), inspect.signature(getattr(module, name))) for name in names}
        attach(module)
        assert {name: (check(name, module), inspect.signature(getattr(module, name))) for name in names} == before
        assert isinstance(module, pl.LightningModule)
        assert type(module).__qualname__ == module.__class__.__mro__[1].__qualname__


def _decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def test_a_decorated_step_without_batch_index_gets_none() -> None:
    class Decorated(Net):
        @_decorated
        def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
            return _Methods.training_step(self, batch, 0)

    recorder = Recorder()
    fit(Decorated(), recorder, limit_train_batches=1)
    assert "output of 8 samples" in recorder.seen


def _sgd(module: Net) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.5)


def test_methods_set_on_the_instance_take_part_and_come_back() -> None:
    """LightningCLI sets configure_optimizers on the instance; torch.compile sets the steps."""
    model, recorder = Net(), Recorder()
    own = MethodType(_sgd, model)
    model.configure_optimizers = own  # type: ignore[method-assign]
    made = fit(model, recorder, limit_train_batches=1)
    assert recorder.seen.count("optimizers begins") == 1
    assert type(made.optimizers[0]) is torch.optim.SGD
    assert vars(model)["configure_optimizers"] is own


def test_a_copy_of_an_attached_module_refers_to_itself() -> None:
    model = Net()
    model.configure_optimizers = MethodType(_sgd, model)  # type: ignore[method-assign]
    model.trainer = trainer(Recorder())
    attach(model)
    twin = copy.deepcopy(model)
    assert is_attached(model)
    assert type(twin) is Net
    assert callbacks_of(twin._trainer) == []
    twin.first.weight.data.zero_()
    assert twin.configure_optimizers().param_groups[0]["params"][0] is twin.first.weight
    assert float(model.first.weight.detach().abs().sum()) > 0


def test_attached_modules_pickle() -> None:
    model = Net(optimizer=adamw)
    attach(model)
    twin = pickle.loads(pickle.dumps(model))
    assert type(twin) is Net
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_module_without_trainer_behaves_as_written() -> None:
    model = Net()
    attach(model)
    model.setup("fit")
    model.configure_model()
    assert type(model.configure_optimizers()) is torch.optim.AdamW
    detach(model)
    detach(model)
    assert type(model) is Net


def test_classes_with_a_metaclass_of_their_own() -> None:
    from abc import ABC, abstractmethod

    class Task(Net, ABC):
        @abstractmethod
        def name(self) -> str: ...

    class Concrete(Task):
        def name(self) -> str:
            return "concrete"

    model = Concrete()
    attach(model)
    assert model.name() == "concrete"
    assert isinstance(model, Task)


def test_a_classmethod_constructor_and_super_still_work() -> None:
    class Child(Net):
        def configure_optimizers(self) -> Any:
            return super().configure_optimizers()

        @classmethod
        def build(cls) -> "Child":
            return cls()

    model = Child.build()
    attach(model)
    assert type(model.configure_optimizers()) is torch.optim.AdamW
    assert type(type(model).build()).__qualname__ == Child.__qualname__


def test_averaged_models_are_found_by_what_they_keep() -> None:
    callback = lightning.pytorch.callbacks.EMAWeightAveraging()
    made = trainer(callback)
    assert averaged_models(made) == []
    model = Net()
    callback._average_model = torch.optim.swa_utils.AveragedModel(model)
    assert [(name, type(found)) for name, found in averaged_models(made)] == [("EMAWeightAveraging", Net)]
    assert averaged_models(None) == []


def test_a_registry_of_subclasses_stays() -> None:
    """A module that is built from the registry later must be the user's own, without callbacks in its methods."""
    registry = {}

    class Registered(Net):
        def __init_subclass__(cls) -> None:
            registry[cls.__name__] = cls

    class Task(Registered):
        pass

    model = Task()
    attach(model)
    assert registry == {"Task": Task}
    detach(model)
    assert type(model) is Task
