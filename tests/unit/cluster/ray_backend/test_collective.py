"""Members of a broadcast group, as threads of this process over gloo."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch

from cluster.errors import CheckpointError
from cluster.messages import WeightSnapshot
from cluster.weights import Packer, load_weights

pytest.importorskip("ray")  # a machine that is borrowed for its GPU may lack it
from cluster.ray_backend import collective
from cluster.ray_backend.collective import Ticket, load, open_rendezvous, receive, send

SMALL_PART = 1 << 16


class Role:
    """A learner or sampler that holds one tensor of a little more than one part."""

    def __init__(self) -> None:
        self.module = torch.nn.ParameterList([torch.zeros(SMALL_PART // 4 + 100)])
        self.version, self._pack = 0, Packer()

    def snapshot(self, send: object) -> WeightSnapshot:
        self.version += 1
        with torch.no_grad():
            self.module[0].fill_(self.version)
        return self._pack(self.module.state_dict(), self.version, send=send)

    def load_weights(self, snapshot: WeightSnapshot) -> tuple[str, float, float]:
        load_weights(self.module, snapshot)
        first, last = self.module[0][[0, -1]].tolist()
        return type(snapshot.buffer).__name__, first, last


@pytest.fixture(autouse=True)
def one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(collective, "PART", SMALL_PART)
    monkeypatch.setattr(collective.ray, "get", lambda stored: stored)


def broadcast(group: int, number: int, address: str, *roles: Role) -> tuple[WeightSnapshot, list]:
    """Returns the snapshot for the object store, and why each member failed."""
    tickets = [Ticket(group, number, rank, len(roles), False) for rank in range(len(roles))]
    with ThreadPoolExecutor(len(roles)) as pool:
        sent = pool.submit(send, roles[0], tickets[0], address)
        received = [
            pool.submit(receive, role, ticket, address)
            for role, ticket in zip(roles[1:], tickets[1:])
        ]
        snapshot, failure = sent.result()
        return snapshot, [failure, *(each.result() for each in received)]


def test_what_is_not_loaded_in_time_comes_from_the_object_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what arrives damaged, and when the group was left."""
    learner, one, other = Role(), Role(), Role()
    address = open_rendezvous(learner)
    first, failures = broadcast(1, 1, address, learner, one, other)
    assert failures == ["", "", ""]
    assert load(one, 1, 1.0, [first]) == ("Tensor", 1.0, 1.0)
    second, failures = broadcast(1, 2, address, learner, one, other)
    assert failures == ["", "", ""]
    assert load(other, 1, 1.0, [first]) == ("ndarray", 1.0, 1.0)  # the second is there already
    assert load(other, 2, 1.0, [second]) == ("Tensor", 2.0, 2.0)
    assert load(one, 2, 1.0, [second]) == ("Tensor", 2.0, 2.0)

    def damaged(snapshot: WeightSnapshot, device: torch.device) -> None:
        raise CheckpointError(f"snapshot {snapshot.version} is damaged")

    with monkeypatch.context() as changed:
        changed.setattr(collective, "open_snapshot", damaged)
        third, failures = broadcast(1, 3, address, learner, one, other)
    assert failures == ["", *["snapshot 3 is damaged"] * 2]
    assert load(one, 3, 1.0, [third]) == ("ndarray", 3.0, 3.0)
    address = open_rendezvous(learner)
    fourth, failures = broadcast(2, 4, address, learner, other)
    assert failures == ["", ""]
    assert load(other, 4, 1.0, [fourth]) == ("Tensor", 4.0, 4.0)
    collective.leave(other, 1)  # of a group that it is not in any more
    assert broadcast(2, 5, address, learner, other)[1] == ["", ""]
    for role in (learner, other):
        collective.leave(role, 2)
    sixth, failures = broadcast(2, 6, address, learner, other)
    assert failures == ["the group was left"] * 2
    assert load(other, 6, 1.0, [sixth]) == ("ndarray", 6.0, 6.0)
    assert load(other, 7, 0.0, [sixth]) == ("ndarray", 6.0, 6.0)  # of which nothing is known


def test_who_does_not_come_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective, "JOIN_S", 1.0)
    monkeypatch.setattr(collective, "PART_S", 1.0)
    learner = Role()
    address = open_rendezvous(learner)
    snapshot, failure = send(learner, Ticket(1, 1, 0, 2, False), address)
    assert snapshot.version == 1
    assert failure


def test_a_member_may_come_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later than gloo alone would wait."""
    monkeypatch.setattr(collective, "PART_S", 0.5)
    learner, late = Role(), Role()
    address = open_rendezvous(learner)
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send, learner, Ticket(1, 1, 0, 2, False), address)
        assert not wait([sent], 1.0).done
        assert receive(late, Ticket(1, 1, 1, 2, False), address) == ""
        assert sent.result()[1] == ""


def test_leaving_ends_the_wait_for_the_others() -> None:
    learner = Role()
    address = open_rendezvous(learner)
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send, learner, Ticket(1, 1, 0, 2, False), address)
        assert not wait([sent], 0.3).done
        collective.leave(learner, 1)
        assert sent.result(5)[1] == "the group was left before all had joined"
    collective.leave(learner, 2)  # before it was told to join that
    assert send(learner, Ticket(2, 2, 0, 2, False), open_rendezvous(learner))[1] == (
        "the group was left"
    )


@pytest.mark.gpu
def test_nccls_process_group_is_made_as_torch_has_it() -> None:
    """A group of one: NCCL wants a GPU for each of several."""
    learner = Role()
    learner.module.cuda()
    snapshot, failure = send(learner, Ticket(1, 1, 0, 1, True), open_rendezvous(learner))
    assert failure == ""
    assert snapshot.version == 1
