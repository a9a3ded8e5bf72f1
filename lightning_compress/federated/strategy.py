"""Flower strategy wrapper of the server: compressed updates both ways for any strategy."""

# Flower is an extra: pyright also runs where it is not installed.
# pyright: reportMissingImports=false
from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from logging import WARNING
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from lightning_compress.federated.checkpoints import load_strategy, save_strategy
from lightning_compress.federated.messages import (
    FULL,
    HELLO,
    NOTE,
    arrays_key,
    note_of,
    payload_record,
    record_of,
    replaced,
    size_of,
    tensors_of_record,
    unpacked,
)
from lightning_compress.federated.updates import (
    UpdateCodec,
    UpdateError,
    add_update,
    decode_update,
    digest,
    encode_update,
)
from lightning_compress.lcz.memory import tensors_to_bytes

__all__ = ["CompressedStrategy", "OrderedGrid", "refuse_secure_aggregation"]

STATISTICS = ("running_mean", "running_var")  # names end so
Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


class CompressedStrategy(Strategy):
    """Wrapper of a Flower strategy: it sees full models, the network carries updates.

    Clients run the mod `CompressedUpdates` with the same two codecs. An update that is damaged,
    oversized, not finite or of another model is rejected by name; the round continues.
    BatchNorm's statistics are averaged by examples whatever the strategy, which sees parameters
    only: a step of Adam on a variance may leave it below 0.
    What a downward update does not send stays in the difference to the model that the clients
    hold, so it is sent later. A client that missed rounds gets the updates that it lacks, or the
    whole model where that is smaller.

    Args:
        strategy: any of Flower's, such as `FedAvg(fraction_evaluate=0.0)`.
        up: codec of the clients' updates.
        down: codec of the server's.
        seed: of the choice of clients, which depends on it and the round alone.
        checkpoint: file that is written after each round; a run that finds it resumes.
        on_round: called with each round's row of the ledger when the round is over.
        hello_timeout: seconds that new nodes have to say who they are; who does not gets the whole
            model. A node's first process has to import PyTorch before it can answer.

    Attributes:
        rounds: the ledger, a row a round: round, up, down (bytes), clients, refused (reason by
            client), seconds, codec_seconds (of this class), client_codec_seconds (of the slowest
            client's mod, as it says), quality where it is measured.

    Raises:
        ValueError: for a strategy of secure aggregation, which adds up what it cannot read.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        up: UpdateCodec,
        down: UpdateCodec,
        seed: int = 0,
        checkpoint: Path | None = None,
        on_round: Callable[[dict[str, Any]], object] | None = None,
        hello_timeout: float = 300.0,
    ) -> None:
        refuse_secure_aggregation(strategy)
        self.strategy, self.up, self.down, self.seed = strategy, up, down, seed
        self.checkpoint, self.on_round, self.hello_timeout = checkpoint, on_round, hello_timeout
        self.rounds: list[dict[str, Any]] = []
        self.done = 0  # rounds that a checkpoint brought
        self.version = 0
        self.exact: dict[str, Tensor] = {}  # the server's own model
        self.shared: dict[str, Tensor] = {}  # the model that clients of this version hold
        self.history: list[tuple[int, bytes]] = []  # downward updates by the version they lead to
        self.held: dict[int, int] = {}  # versions by node
        self.names: dict[int, str] = {}  # of nodes
        self._full: tuple[int, bytes] = (-1, b"")
        self.models: list[tuple[float, dict[str, Tensor]]] = []  # of the last round, by weight
        self._greetings = [0, 0]  # bytes down and up that no row has yet
        self._begun = 0.0

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Evaluate | None = None,
    ) -> Result:
        """Run the rounds that a checkpoint does not hold already; as Flower's `start`."""
        self.begin(tensors_of_record(initial_arrays))
        if self.checkpoint is not None and self.checkpoint.is_file():
            load_strategy(self, self.checkpoint)
        self.done = len(self.rounds)

        def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord | None:
            return self._ended(number, arrays, evaluate_fn)

        return super().start(
            grid,
            record_of(self.exact),
            max(num_rounds - self.done, 0),
            timeout,
            train_config,
            evaluate_config,
            evaluate,
        )

    def begin(self, arrays: Mapping[str, Tensor]) -> None:
        """Take the model before the first round; `start` does."""
        self.exact, self.shared = dict(arrays), dict(arrays)

    def _ended(
        self, number: int, arrays: ArrayRecord, evaluate_fn: Evaluate | None
    ) -> MetricRecord | None:
        """Close a round's row: measure, write the checkpoint, report."""
        if number == 0 and self.done:
            return None
        found = evaluate_fn(self.done + number, arrays) if evaluate_fn is not None else None
        if number == 0:
            return found
        row = self.rounds[-1]
        if found is not None:
            row["quality"] = dict(found)
        row["seconds"] = time.monotonic() - self._begun
        if self.checkpoint is not None:
            save_strategy(self, self.checkpoint)
        if self.on_round is not None:
            self.on_round(row)
        return found

    def summary(self) -> None:
        """Log the wrapped strategy's settings."""
        self.strategy.summary()

    def configure_train(
        self,
        server_round: int,
        arrays: ArrayRecord,  # noqa: ARG002 (`exact` is the same, with its counters)
        config: ConfigRecord,
        grid: Grid,
    ) -> Iterable[Message]:
        """The wrapped strategy's messages, with an update in place of the model."""
        number = self.done + server_round
        self._begun = time.monotonic()
        self.rounds.append({"round": number, "up": 0, "down": 0, "clients": 0, "refused": {},
                            "codec_seconds": 0.0, "client_codec_seconds": 0.0})  # fmt: skip
        configure = self.strategy.configure_train
        return self._configured(configure, number, config, grid)

    def configure_evaluate(
        self,
        server_round: int,
        arrays: ArrayRecord,  # noqa: ARG002
        config: ConfigRecord,
        grid: Grid,
    ) -> Iterable[Message]:
        """The same for evaluation by the clients."""
        configure, number = self.strategy.configure_evaluate, self.done + server_round
        return self._configured(configure, number, config, grid)

    def _configured(
        self,
        configure: Callable[..., Iterable[Message]],
        number: int,
        config: ConfigRecord,
        grid: Grid,
    ) -> list[Message]:
        self.meet(grid, number)
        ordered = OrderedGrid(grid, self.names)
        with _seeded(f"{self.seed}-{number}"):
            messages = list(configure(number, record_of(self._parameters()), config, ordered))
        self.meet(grid, number)  # the strategy may have waited for nodes
        row, sent = self.rounds[-1], []
        row["down"], row["up"] = row["down"] + self._greetings[0], row["up"] + self._greetings[1]
        self._greetings = [0, 0]
        start = time.monotonic()
        told = {"round": number, "version": self.version, "digest": digest(self._comparable())}
        for message in messages:
            node = message.metadata.dst_node_id
            payloads, base = self._payloads(self.held.get(node, -1))
            note = ConfigRecord({**told, "base": base})
            content = replaced(message.content, payload_record(payloads), note)
            sent.append(
                Message(
                    content,
                    dst_node_id=node,
                    message_type=message.metadata.message_type,
                    ttl=message.metadata.ttl,
                    group_id=message.metadata.group_id,
                )
            )
            row["down"] += size_of(sent[-1])
        row["codec_seconds"] += time.monotonic() - start
        return sent

    def _parameters(self) -> dict[str, Tensor]:
        """Parameters for the wrapped strategy: floats except BatchNorm's statistics."""
        return {
            name: one
            for name, one in self.exact.items()
            if one.is_floating_point() and not name.endswith(STATISTICS)
        }

    def _comparable(self) -> dict[str, Tensor]:
        return {name: self.shared[name] for name in self.down.methods(self.shared)}

    def _payloads(self, held: int) -> tuple[dict[str, bytes], int]:
        """The updates that lead on from a version, or the whole model; and where they begin."""
        chain = {f"{version:06d}": data for version, data in self.history if version > held}
        oldest = self.history[0][0] - 1 if self.history else self.version
        if held < oldest or self._too_long(sum(map(len, chain.values()))):
            return {FULL: self._whole()}, -1
        return chain, held

    def _too_long(self, size: int) -> bool:
        plain = sum(one.numel() * one.element_size() for one in self._comparable().values())
        return size > plain // 2 and size > len(self._whole())

    def _whole(self) -> bytes:
        if self._full[0] != self.version:
            counters = {n: one for n, one in self.shared.items() if not one.is_floating_point()}
            whole = tensors_to_bytes({**self._comparable(), **counters}, codec="fast")
            self._full = (self.version, whole)
        return self._full[1]

    def meet(self, grid: Grid, number: int) -> None:
        """Ask new nodes for their name and model version."""
        new = [node for node in grid.get_node_ids() if node not in self.names]
        if not new:
            return
        note = ConfigRecord({"round": number})
        hello = [
            Message(RecordDict({NOTE: note}), dst_node_id=node, message_type=HELLO) for node in new
        ]
        self._greetings[0] += sum(map(size_of, hello))
        for reply in grid.send_and_receive(hello, timeout=self.hello_timeout):
            self._greetings[1] += size_of(reply)
            if reply.has_content() and (told := note_of(reply.content)):
                node = reply.metadata.src_node_id
                self.names[node] = str(told.get("name", node))
                self.held[node] = _version(told)
        for node in new:  # who does not answer is known by its number, and gets the whole model
            self.names.setdefault(node, str(node))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Decode and check the replies, and let the wrapped strategy aggregate those that hold."""
        row, taken, statistics = self.rounds[-1], [], []
        for reply in sorted(replies, key=self._order):
            row["up"] += size_of(reply)
            start, node = time.monotonic(), reply.metadata.src_node_id
            try:
                model = self._decoded(reply)
                taken.append(self._for_strategy(reply, model))
                statistics.append((_examples(reply.content), model))
            except UpdateError as error:
                name = self.names.get(node, str(node))
                row["refused"][name] = str(error)
                log(WARNING, "round %s: client %s is left out: %s", row["round"], name, error)
            row["codec_seconds"] += time.monotonic() - start
        row["clients"], self.models = len(taken), statistics
        if not taken:
            return None, None
        arrays, metrics = self.strategy.aggregate_train(self.done + server_round, taken)
        if arrays is None:
            return None, metrics
        start = time.monotonic()
        self._advance({**_averaged(statistics), **tensors_of_record(arrays)})
        row["codec_seconds"] += time.monotonic() - start
        return record_of(self.exact), metrics

    def _order(self, reply: Message) -> tuple[bool, int, str]:
        """Sort replies by name, since sums of floats depend on their order."""
        name = self.names.get(reply.metadata.src_node_id, str(reply.metadata.src_node_id))
        return (not name.isdigit(), int(name) if name.isdigit() else 0, name)

    def _decoded(self, reply: Message) -> dict[str, Tensor]:
        """The client's whole model.

        Raises:
            UpdateError: when it is refused.
        """
        if reply.has_error():
            raise UpdateError(f"failed: {reply.error.reason}")
        note = note_of(reply.content)
        if not note:
            raise UpdateError("foreign: no update of the mod CompressedUpdates")
        node = reply.metadata.src_node_id
        self.held[node] = _version(note)
        self.names[node] = str(note.get("name", self.names.get(node, node)))
        if "need" in note:
            raise UpdateError(f"asks for the whole model: {note.get('reason')}")
        if _version(note) != self.version:
            raise UpdateError(f"foreign: version {note['version']}, not {self.version}")
        _check_metrics(reply.content)
        if isinstance(spent := note.get("codec_seconds"), float) and 0 < spent < math.inf:
            row = self.rounds[-1]
            row["client_codec_seconds"] = max(row["client_codec_seconds"], spent)
        payloads = unpacked(reply.content.array_records[arrays_key(reply.content)])
        if len(payloads) != 1:
            raise UpdateError(f"foreign: {len(payloads)} payloads where one belongs")
        update = decode_update(next(iter(payloads.values())), self.exact, self.up)
        return add_update(self.exact, update)

    def _for_strategy(self, reply: Message, model: Mapping[str, Tensor]) -> Message:
        """The reply as the wrapped strategy knows it, with arrays in place of the update."""
        arrays = {name: model[name] for name in self._parameters()}
        reply.content = replaced(reply.content, record_of(arrays), None)
        return reply

    def _advance(self, arrays: Mapping[str, Tensor]) -> None:
        """Take the new global model, and encode what leads the clients to it."""
        self.exact = {
            name: arrays[name].to(one.dtype) if name in arrays else one
            for name, one in self.exact.items()
        }
        sent = encode_update(self.exact, self.shared, self.down)
        self.shared = add_update(self.shared, sent.decoded)
        self.version += 1
        self.history.append((self.version, sent.payload))
        plain = sum(one.numel() * one.element_size() for one in self._comparable().values())
        while len(self.history) > 1 and sum(len(data) for _, data in self.history) > plain:
            self.history.pop(0)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """The wrapped strategy's sum of the replies that have content."""
        row, taken = self.rounds[-1], []
        for reply in replies:
            row["up"] += size_of(reply)
            if reply.has_content() and (note := note_of(reply.content)):
                self.held[reply.metadata.src_node_id] = _version(note)
                reply.content = _without_note(reply.content)
                if "need" not in note:
                    taken.append(reply)
        return self.strategy.aggregate_evaluate(self.done + server_round, taken)


def refuse_secure_aggregation(*parts: Any) -> None:
    """Reject strategies and mods of secure aggregation.

    Raises:
        ValueError: with the reason.
    """
    for part in parts:
        name = getattr(part, "__name__", type(part).__name__)
        if "secagg" in name.lower().replace("_", "") or "secureagg" in name.lower():
            raise ValueError(
                f"{name} cannot be combined with entropy-coded updates: secure aggregation adds "
                "masked integers of one fixed length, of which the server only learns the sum, "
                "while entropy-coded updates differ in length and have to be decoded one by one "
                "before they are added. Use one of the two"
            )


def _version(note: ConfigRecord) -> int:
    version = note.get("version", -1)
    return version if isinstance(version, int) else -1


def _check_metrics(content: RecordDict) -> None:
    for record in content.metric_records.values():
        for key, value in record.items():
            values = value if isinstance(value, list) else [value]
            if not all(torch.tensor(float(one)).isfinite() for one in values):
                raise UpdateError(f"not finite: metric {key!r} is {value}")
            if key == "num-examples" and min(values, default=0) < 0:
                raise UpdateError(f"foreign: num-examples={value}")


def _examples(content: RecordDict) -> float:
    """How much a client's statistics weigh; all alike where they do not say."""
    for record in content.metric_records.values():
        value = record.get("num-examples")
        if isinstance(value, (int, float)):
            return float(value)
    return 1.0


def _averaged(models: list[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """BatchNorm's statistics, averaged by examples."""
    total = sum(weight for weight, _ in models) or 1.0
    names = [name for name in models[0][1] if name.endswith(STATISTICS)]
    weighted = [(weight / total, model) for weight, model in models]
    return {
        name: torch.stack([weight * model[name].double() for weight, model in weighted]).sum(0)
        for name in names
    }


def _without_note(content: RecordDict) -> RecordDict:
    return RecordDict({name: one for name, one in content.items() if name != NOTE})


@contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """Flower draws clients from Python's own random stream."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


class OrderedGrid(Grid):
    """A grid whose nodes come in the order of their names: node numbers differ from run to run."""

    def __init__(self, grid: Grid, names: Mapping[int, str]) -> None:
        self._grid, self._names = grid, names

    def get_node_ids(self) -> list[int]:
        """In the order of names."""

        def order(node: int) -> tuple[bool, int, str]:
            name = self._names.get(node, str(node))
            return (not name.isdigit(), int(name) if name.isdigit() else 0, name)

        return sorted(self._grid.get_node_ids(), key=order)

    def set_run(self, run: Any) -> None:
        """As the grid's."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """As the grid's."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """As the grid's."""
        return self._grid.create_message(*args, **kwargs)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the grid's."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the grid's."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """As the grid's."""
        return self._grid.send_and_receive(messages, timeout=timeout)
