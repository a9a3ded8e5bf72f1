"""Flower mod of the client: decodes updates of the server and encodes those of the client."""

# Flower is an extra: pyright also runs where it is not installed.
# pyright: reportMissingImports=false
from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.federated.messages import (
    FULL,
    HELLO,
    NOTE,
    arrays_key,
    note_of,
    payload_record,
    record_of,
    replaced,
    tensors_of_record,
    unpacked,
)
from lightning_compress.federated.stores import FolderStore, RecordStore, Store
from lightning_compress.federated.updates import (
    UpdateCodec,
    UpdateError,
    add_update,
    decode_update,
    digest,
    encode_update,
)
from lightning_compress.lcz.memory import tensors_from_bytes

__all__ = ["CompressedUpdates", "client_name", "store_of"]

PART = "update"
_AFTER = 1 << 62  # later than any round


def client_name(context: Context) -> str:
    """Name of a client: its partition, else its node."""
    return str(context.node_config.get("partition-id", context.node_id))


def store_of(context: Context, folder: Path | None) -> Store:
    """State store of a client: below the folder, else in Flower's context."""
    if folder is None:
        return RecordStore(context.state, ConfigRecord)
    return FolderStore(folder / client_name(context))


class CompressedUpdates:
    """Flower mod: the app behind it receives and returns whole models, the network updates.

    The server's side is `CompressedStrategy`, with the same two codecs. A client keeps the model
    that it holds, what its updates did not send (error feedback), and the tensors that stay at
    home. Where it cannot follow (a new process without its state), it asks for the whole model.

    Args:
        up: codec of the updates that it sends.
        down: codec of the updates that it receives.
        initial: makes the model before the first round, equal on server and clients (the same
            seed): the first model then costs nothing. None: the server sends it.
        folder: where states are kept, a folder a client; None: in Flower's context, which a
            restarted process loses.
    """

    def __init__(
        self,
        up: UpdateCodec,
        down: UpdateCodec,
        *,
        initial: Callable[[], Mapping[str, Tensor]] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.up, self.down, self.initial, self.folder = up, down, initial, folder

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Answer a greeting, or decode, call the app, encode."""
        store = store_of(context, self.folder)
        note = note_of(message.content)
        if message.metadata.message_type == HELLO:
            state = store.load(PART, int(str(note.get("round", _AFTER))))
            first = -1 if self.initial is None else 0  # not made here: every client is greeted
            return self._noted(
                message, context, version=first if state is None else state["version"]
            )
        if not note:
            raise UpdateError(
                "foreign: the message holds no compressed update: wrap the server's strategy in "
                "CompressedStrategy, or leave the mod CompressedUpdates out"
            )
        number = int(str(note["round"]))
        training = message.metadata.message_type.split(".")[0] == "train"
        start = time.monotonic()
        held = self._held(store, number if training else number + 1)
        try:
            arrays = self._received(message.content, note, held)
        except UpdateError as error:
            return self._noted(message, context, version=-1, need=FULL, reason=str(error))
        state = held or {"residual": {}, "home": {}}
        inner = replaced(message.content, record_of({**arrays, **state["home"]}), None)
        message.content, spent = inner, time.monotonic() - start
        reply = call_next(message, context)
        if not reply.has_content():
            return reply
        state = {**state, "version": int(str(note["version"])), "arrays": arrays}
        if training:
            return self._sent(reply, context, store, number, state, spent)
        store.save(PART, number, state)
        reply.content[NOTE] = self._note(context, version=state["version"])
        return reply

    def answer(self, app: ClientApp) -> None:
        """Let an app answer the server's greeting with its name and model version.

        Without it the app's nodes get the whole model when the server first meets them.
        """

        @app.query(HELLO.split(".")[1], mods=[self])
        def hello(message: Message, context: Context) -> Message:  # noqa: ARG001
            raise AssertionError("the mod answers")

    def _held(self, store: Store, before: int) -> dict[str, Any] | None:
        state = store.load(PART, before)
        if state is None and self.initial is not None:
            arrays = {name: one.detach().clone() for name, one in self.initial().items()}
            return {"version": 0, "arrays": arrays, "residual": {}, "home": {}}
        return state

    def _received(
        self, content: RecordDict, note: ConfigRecord, held: dict[str, Any] | None
    ) -> dict[str, Tensor]:
        """The server's model of this round.

        Raises:
            UpdateError: when it cannot be had from what came and what is held.
        """
        payloads = unpacked(content.array_records[arrays_key(content)])
        if FULL in payloads:
            arrays = self._full(payloads[FULL], held)
        else:
            arrays = self._followed(payloads, int(str(note["base"])), held)
        if digest(self._comparable(arrays)) != note["digest"]:
            raise UpdateError("the model held and the updates received do not give the server's")
        return arrays

    def _comparable(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: arrays[name] for name in self.down.methods(arrays)}

    def _full(self, payload: bytes, held: dict[str, Any] | None) -> dict[str, Tensor]:
        try:
            arrays = tensors_from_bytes(payload)
        except CorruptArtifactError as error:
            raise UpdateError(f"damaged: {error}") from None
        return {**(held["arrays"] if held else {}), **arrays}

    def _followed(
        self, payloads: Mapping[str, bytes], base: int, held: dict[str, Any] | None
    ) -> dict[str, Tensor]:
        if held is None or held["version"] < base:
            have = "none" if held is None else held["version"]
            raise UpdateError(f"updates from version {base} on, but version {have} is held")
        arrays = held["arrays"]
        for version, payload in sorted((int(name), data) for name, data in payloads.items()):
            if version > held["version"]:
                arrays = add_update(arrays, decode_update(payload, arrays, self.down))
        return arrays

    def _sent(
        self,
        reply: Message,
        context: Context,
        store: Store,
        number: int,
        state: dict[str, Any],
        spent: float,
    ) -> Message:
        start, key = time.monotonic(), arrays_key(reply.content)
        new = tensors_of_record(reply.content.array_records[key])
        sent = encode_update(new, state["arrays"], self.up, state["residual"])
        home = {name: one for name, one in new.items() if name not in sent.decoded}
        store.save(PART, number, {**state, "residual": sent.residual, "home": home})
        spent += time.monotonic() - start
        note = self._note(context, version=state["version"], codec_seconds=spent)
        reply.content = replaced(reply.content, payload_record({PART: sent.payload}), note)
        return reply

    def _note(self, context: Context, **entries: Any) -> ConfigRecord:
        return ConfigRecord({"name": client_name(context), **entries})

    def _noted(self, message: Message, context: Context, **entries: Any) -> Message:
        return Message(RecordDict({NOTE: self._note(context, **entries)}), reply_to=message)
