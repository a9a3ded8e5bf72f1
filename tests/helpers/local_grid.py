"""Flower's grid in one process: nodes are contexts, a message is a call. No server of ours."""

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class LocalGrid(Grid):
    """So many nodes behind one client app.

    `change` may alter a reply on its way up, by node; a node in `silent` never answers.
    """

    def __init__(self, app, clients, *, first=1000):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.app, self.first = app, first
        self.contexts = {}
        for place in range(clients):
            self.join(place, clients)
        self.change, self.silent, self.sent = {}, set(), []

    def join(self, place, clients):
        node = self.first + 7 * (clients - place)  # not in the order of the partitions
        config = {"partition-id": place, "num-partitions": clients}
        self.contexts[node] = Context(1, node, config, RecordDict(), {})
        return node

    def node(self, place):
        (found,) = [n for n, c in self.contexts.items() if c.node_config["partition-id"] == place]
        return found

    def get_node_ids(self):
        return list(self.contexts)

    def set_run(self, run): ...

    @property
    def run(self):
        return None

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    push_messages = pull_messages = create_message

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.sent.append(message)
            if node in self.silent:
                continue
            # The content is shared by all messages in Flower's strategies: each node gets its own.
            own = Message(
                RecordDict(dict(message.content)),
                dst_node_id=node,
                message_type=message.metadata.message_type,
            )
            try:
                reply = self.app(own, self.contexts[node])
            except Exception as error:
                reply = Message(Error(code=0, reason=str(error)), reply_to=own)
            if reply.has_content() and node in self.change:
                self.change[node](reply)
            replies.append(reply)
        return replies
