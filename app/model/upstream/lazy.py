"""Modules that upstream, torch and accelerate import at once, imported when they are first used.

A run seldom uses them, and together they take most of the time of a start. Each name below says who
imports it. What stands in for a module calls the module itself, or does what the module would do.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def import_later() -> None:
    """Postpone the modules below; before torch is imported, once a process."""
    for module in (
        # torch and torchvision, to mark what shall not be compiled
        _later("torch._dynamo", with_submodules=False, alone=("config",), stands_in=_no_compiler()),
        # sam3/model/memory.py and vitdet.py take a few layers of it; timm itself imports all models
        _later("timm"),
        # sam3/__init__.py builds video models
        _later("sam3"),
        # Triton's kernels for videos (sam3_tracker_utils.py:8) and of the focal loss
        # (loss_fns.py:15), which import torch's compiler; fixes.py leaves the latter out
        _later("sam3.model.edt", functions=("edt_triton",)),
        _later(
            "sam3.train.loss.sigmoid_focal_loss",
            functions=("triton_sigmoid_focal_loss", "triton_sigmoid_focal_loss_reduce"),
        ),
        # sam3/train/matcher.py:11 takes one function of it
        _later("scipy.optimize", stands_in={"linear_sum_assignment": _linear_sum_assignment}),
        # accelerate/commands/config/sagemaker.py
        _later("boto3"),
    ):
        sys.modules[module.__name__] = module
    if not any(isinstance(finder, _RoiAlignWithoutDynamo) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RoiAlignWithoutDynamo())


class _Later(types.ModuleType):
    """A module that runs when something of it is first read that nothing stands in for.

    Attributes:
        later: how it runs; gone, with this class, once it ran.
    """

    later: _Plan

    def __getattr__(self, attribute: str) -> Any:
        plan = vars(self)["later"]
        is_path_of_package = attribute == "__path__" and plan.folder is not None
        if attribute.startswith("__") and not is_path_of_package:
            raise AttributeError(attribute)
        if attribute in plan.alone and not plan.running:
            with plan.lock:
                self.__path__ = plan.folder
                try:
                    return importlib.import_module(f"{self.__name__}.{attribute}")
                finally:
                    del self.__path__
        _run(self)
        return getattr(self, attribute)


@dataclass
class _Plan:
    """The way in which a module is run later.

    Attributes:
        loader: of the module.
        folder: of a package, as its `__path__`.
        alone: submodules that may be imported before the package runs, as its attributes.
        lock: held while it runs; other threads wait for it.
        running: whether it runs now.
    """

    loader: importlib.abc.Loader
    folder: list[str] | None
    alone: Sequence[str]
    lock: threading.RLock = field(default_factory=threading.RLock)
    running: bool = False


def _run(module: types.ModuleType) -> None:
    """Run a module, unless it ran; raise AttributeError where this thread is running it."""
    plan: _Plan | None = vars(module).get("later")
    if plan is None:
        return
    with plan.lock:
        if plan.running:
            raise AttributeError(f"{module.__name__} is imported in a circle")
        if "later" not in vars(module):
            return  # another thread ran it meanwhile
        plan.running = True
        try:
            if plan.folder is not None:
                module.__path__ = plan.folder
            plan.loader.exec_module(module)
        finally:
            plan.running = False
        module.__class__ = types.ModuleType
        del module.later


def _later(
    name: str,
    *,
    with_submodules: bool = True,
    alone: Sequence[str] = (),
    functions: Sequence[str] = (),
    stands_in: Mapping[str, Any] | None = None,
) -> types.ModuleType:
    """Return a module that runs when it is first read, because its own imports take long.

    Args:
        with_submodules: let submodules be imported before the package runs: of timm, the layers.
        alone: where not: submodules that may be read before the package runs.
        functions: of the module, that may be imported before it runs; it runs when one is called.
        stands_in: what is read of the module until it runs.
    """
    package, *inner = name.split(".")
    path = _package_folder(package).joinpath(*inner)
    folder = [str(path)] if path.is_dir() else None
    file = path / "__init__.py" if folder else path.with_suffix(".py")
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=folder)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _Later
    vars(module)["later"] = _Plan(spec.loader, folder, alone)
    if not with_submodules:
        del module.__path__  # the import of a submodule reads it first

    def calling(function: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            _run(module)
            return getattr(module, function)(*args, **kwargs)

        return call

    vars(module).update({function: calling(function) for function in functions})
    vars(module).update(stands_in or {})
    return module


def _no_compiler() -> dict[str, Any]:
    """Return what torch and torchvision ask of `torch._dynamo` where nothing is compiled.

    They import the compiler to mark functions that it shall not compile, and places where a graph
    ends (torch/optim/optimizer.py:60). Before it is loaded there is nothing to mark.
    """

    def disable(fn: Any = None, *_: Any, **__: Any) -> Any:
        """Return the function as it is."""
        return disable if fn is None else fn

    def graph_break(msg: str = "") -> None:
        """Do nothing, as torch's own does outside of a compiled function."""

    return {"disable": disable, "graph_break": graph_break}


def _linear_sum_assignment(cost_matrix: Any, maximize: bool = False) -> Any:
    """Call SciPy's compiled function, which needs nothing else of `scipy.optimize`."""
    from scipy.optimize._lsap import linear_sum_assignment

    return linear_sum_assignment(cost_matrix, maximize)


class _RoiAlignWithoutDynamo(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import torchvision.ops.roi_align without torch's compiler, which takes seconds to import.

    The module asks it one question, when ROI align is called on a GPU: `is_compile_supported`. It
    gets a function that asks then. Goes when torchvision imports it no longer (roi_align.py:7).
    """

    NAME, COMPILER = "torchvision.ops.roi_align", "torch._dynamo.utils"

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the module's own spec, loaded by this class; None for all other modules."""
        if name != self.NAME or self.COMPILER in sys.modules:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        """Make the module as its own loader would."""
        return self.loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        """Run the module while a stand-in takes the compiler's place."""
        stand_in = types.ModuleType(self.COMPILER)
        stand_in.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
        sys.modules[self.COMPILER] = stand_in
        try:
            self.loader.exec_module(module)
        finally:
            del sys.modules[self.COMPILER]


def _is_compile_supported(device_type: Any) -> bool:
    """Ask torch's compiler, which is imported now."""
    from torch._dynamo.utils import is_compile_supported

    return bool(is_compile_supported(device_type))


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])
