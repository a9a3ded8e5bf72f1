"""ArtifactCallback: writes the `.lcz` file when training ends, and beside each checkpoint."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_compress.callbacks.base import is_trial_run
from lightning_compress.errors import require
from lightning_compress.files import check_writable
from lightning_compress.lcz.artifact import save_compressed
from lightning_compress.lcz.codecs import check_codec
from lightning_compress.lcz.info import ArtifactInfo
from lightning_compress.sharding import is_sharded, local_part
from lightning_compress.terminal import ShownArguments

__all__ = ["ArtifactCallback"]


class ArtifactCallback(ShownArguments, Callback):
    """Write the compressed file of a model when `fit` ends.

    To get the weights back, in any program:

        from lightning_compress import load_compressed
        net = MyNetwork()
        load_compressed("model.lcz", net)

    List it last: callbacks that change the weights when `fit` ends come before it then.

    Args:
        path: of the file; a relative one lies in the trainer's log folder.
        beside_checkpoints: also write `<checkpoint>.lcz` beside each checkpoint file, with the
            weights that are in it, and remove it with the checkpoint. Strategies that write
            checkpoints as folders have none.
        submodule: path of the module to save; None: the deployed part (`deployed_module()`), or
            the whole LightningModule where it does not say. A sharded one (FSDP2) is gathered
            tensor by tensor, and the first process writes.
        graph: the file also holds the ONNX model of the module, which is exported when `fit` ends
            and checked against PyTorch: `onnx_session("model.lcz")` runs it, without torch. Weights
            on grids are integers in it. Its sample inputs are what the module was given in
            training, or those of the model's `parts()`: a graph each, by their names, where there
            are several. Files beside checkpoints hold none. Where the export is refused, a warning
            says why, and the file holds the weights alone.
        codec: as in `save_compressed`.
        options: other arguments of `save_compressed`, such as `float_dtype="fp16"`.

    Attributes:
        info: what the file holds, once it is written.

    Raises:
        ValueError: for an unknown codec.
        OSError: when `fit` starts, if the file could not be written when it ends.
        MissingExtraError: when `fit` starts, if what `graph` needs is not installed.

    >>> ArtifactCallback("model.lcz", codec="fast").path.name
    'model.lcz'
    """

    def __init__(
        self,
        path: str | Path = "model.lcz",
        *,
        beside_checkpoints: bool = False,
        submodule: str | None = None,
        graph: bool = False,
        codec: str = "auto",
        **options: Any,
    ) -> None:
        check_codec(codec)
        self.path = Path(path)
        self.beside_checkpoints = beside_checkpoints
        self.submodule = submodule
        self.graph = graph
        self.options: dict[str, Any] = {"codec": codec, **options}
        self.info: ArtifactInfo | None = None
        self._seen: Any = None  # SeenInputs, while fit runs

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find a wrong `submodule` or folder before anything is trained; listen to checkpoints."""
        shipped = self._shipped(pl_module)
        if self.graph:
            self._watch(shipped)
        folder = self._target(trainer).parent
        if trainer.is_global_zero:
            check_writable(folder)
        if self.beside_checkpoints and trainer.is_global_zero:
            inner = trainer.strategy.checkpoint_io
            trainer.strategy.checkpoint_io = _Beside(
                inner, lambda path, checkpoint: self._beside(pl_module, path, checkpoint)
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file: after averaging and quantization, which end with training."""
        target, shipped = self._target(trainer), self._shipped(pl_module)
        # The parts of a sharded module are with all processes; one of them writes.
        if not trainer.is_global_zero and not any(map(is_sharded, shipped.state_dict().values())):
            return
        if is_trial_run(trainer):  # find errors, and leave the file of a real run alone
            with tempfile.TemporaryDirectory() as folder:
                self._write(pl_module, shipped, Path(folder) / target.name)
            rank_zero_info(f"fast_dev_run: {target} is writable; nothing was written")
            return
        self._write(pl_module, shipped, target)

    def _write(self, module: LightningModule, shipped: nn.Module, target: Path) -> None:
        graphs = self._graphs(module, shipped) if self.graph else {}
        self.info = self._save(shipped, target, **({"graph": graphs} if graphs else {}))

    def fit_results(self) -> dict[str, Any]:
        """The file's `ArtifactInfo`, for fits that run in another process."""
        return {"info": self.info}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Remove the checkpoint hook."""
        self._stop(trainer)

    def on_exception(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        exception: BaseException,  # noqa: ARG002
    ) -> None:
        """Remove the checkpoint hook: there is no teardown then."""
        self._stop(trainer)

    def _watch(self, shipped: nn.Module) -> None:
        for name in ("onnx", "onnxscript", "onnxruntime"):
            require(name, extra="onnx")
        from lightning_compress.conversion.graphs import SeenInputs

        self._seen = SeenInputs(shipped)

    def _graphs(self, pl_module: LightningModule, shipped: nn.Module) -> dict[str, bytes]:
        """The ONNX models by name; none, and a warning, where they cannot be made."""
        from lightning_compress.conversion.graphs import exported_graphs, sampled_parts

        try:
            if any(map(is_sharded, shipped.state_dict().values())):
                raise ValueError("the module is sharded: load the file into a plain one and export")
            parts = sampled_parts(pl_module, shipped, self._seen and self._seen.inputs)
            if parts is None:
                raise ValueError(
                    f"{type(shipped).__name__} was never called with tensors in training: name "
                    "with submodule= one that is, or set example_input_array"
                )
            return exported_graphs(parts)
        except (ValueError, RuntimeError, TypeError) as error:  # training is worth its file
            warnings.warn(f"{self.path} holds no graph: {error}", stacklevel=2)
            return {}

    def _stop(self, trainer: Trainer) -> None:
        if self._seen is not None:
            self._seen.stop()
            self._seen = None
        if isinstance(listener := trainer.strategy.checkpoint_io, _Beside):
            trainer.strategy.checkpoint_io = listener.inner

    def _target(self, trainer: Trainer) -> Path:
        # In every process: asking a Trainer for its folder is a message between them.
        return Path(trainer.log_dir or trainer.default_root_dir) / self.path

    def _beside(
        self, pl_module: LightningModule, path: Path, checkpoint: Mapping[str, Any]
    ) -> None:
        """What the checkpoint holds may be an average: it is not what the module holds now."""
        shipped = self._shipped(pl_module)
        own = {_place(tensor): key for key, tensor in pl_module.state_dict().items()}
        stored: Mapping[str, Tensor] = checkpoint.get("state_dict", {})
        keys = {name: own.get(_place(tensor), "") for name, tensor in shipped.state_dict().items()}
        state = {name: stored[key] for name, key in keys.items() if key in stored}
        self._save(shipped, path, state=state)

    def _save(self, shipped: nn.Module, target: Path, **more: Any) -> ArtifactInfo:
        target.parent.mkdir(parents=True, exist_ok=True)
        return save_compressed(shipped, target, **self.options, **more)

    def _shipped(self, pl_module: LightningModule) -> nn.Module:
        if self.submodule is not None:
            return pl_module.get_submodule(self.submodule)
        deployed: Any = getattr(pl_module, "deployed_module", None)
        return pl_module if deployed is None else deployed()


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Identity of a tensor's storage; scalars and empty tensors have their own."""
    return local_part(tensor).data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


class _Beside(CheckpointIO):
    """Writes and removes files together with those of another CheckpointIO."""

    def __init__(
        self, inner: CheckpointIO, write: Callable[[Path, Mapping[str, Any]], None]
    ) -> None:
        self.inner = inner
        self._write = write

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        self.inner.save_checkpoint(checkpoint, path, storage_options)
        self._write(Path(path).with_suffix(".lcz"), checkpoint)

    def load_checkpoint(self, *args: Any, **options: Any) -> Any:
        return self.inner.load_checkpoint(*args, **options)

    def remove_checkpoint(self, path: Any) -> None:
        self.inner.remove_checkpoint(path)
        Path(path).with_suffix(".lcz").unlink(missing_ok=True)

    def teardown(self) -> None:
        self.inner.teardown()
