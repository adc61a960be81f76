from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigError
from cluster.placement.config import PlacementConfig
from cluster.placement.nodes import UNITS, Node, Request, choose_gpus
from cluster.placement.refusal import NoRoomError
from cluster.placement.seating import Gang
from cluster.roles import FleetPlan, Resources, Role
from cluster.scheduling.placement import gangs_of, place


def plan(samplers: int = 2, servers: int = 1, **resources: Resources) -> FleetPlan:
    def role(name: str, count: int = 1) -> Role:
        asked = resources.get(name, Resources())
        return Role(name=name, factory=object, config=None, resources=asked, count=count)

    return FleetPlan(
        sampler=role("sampler", samplers),
        reward_server=role("server", servers),
        moments_server=role("moments"),
        learner=role("learner"),
    )


def on_one(asked: FleetPlan, cpus: float, gpus: float = 0) -> list:
    return list(place(asked, [Node("here", cpus, gpus)]).roles)


def total(placements: list) -> float:
    return sum(p.count * p.num_cpus for p in placements)


@pytest.mark.parametrize(("samplers", "servers"), [(1, 1), (2, 1), (8, 4), (64, 32)])
def test_any_number_of_workers_fits_two_cores(samplers: int, servers: int) -> None:
    placements = on_one(plan(samplers, servers), cpus=2)
    assert total(placements) <= 2
    assert all(p.num_cpus > 0 for p in placements)


def test_nobody_takes_more_than_a_core_unasked() -> None:
    assert {p.num_cpus for p in on_one(plan(), cpus=64)} == {1.0}


def test_named_cpus_are_kept_and_the_rest_is_shared() -> None:
    placements = {p.role: p for p in on_one(plan(learner=Resources(num_cpus=4)), cpus=6)}
    assert placements["learner"].num_cpus == 4
    assert placements["sampler"].num_cpus == 0.5


def test_gpus_choose_the_device() -> None:
    asked = plan(samplers=4, sampler=Resources(num_gpus=0.25))
    placements = {p.role: p for p in on_one(asked, cpus=8, gpus=1)}
    assert placements["sampler"].device == "cuda"
    assert placements["learner"].device == "cpu"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            plan(learner=Resources(num_cpus=4)),
            "4 CPUs are asked for by name, and 4 workers would share the rest",
        ),
        (plan(samplers=500), "ask for fewer workers"),
        (plan(sampler=Resources(num_gpus=1)), "asks for 2 GPUs, but there are 0"),
        (
            plan(
                samplers=1,
                learner=Resources(num_gpus=0.7),
                sampler=Resources(num_gpus=0.2),
                server=Resources(num_gpus=0.1),
            ),
            "asks for 1 GPU, but there are 0",
        ),
    ],
)
def test_what_cannot_fit_is_refused(asked: FleetPlan, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        on_one(asked, cpus=2)


# Nodes and fractions.


def gpu(share: float, **others: float) -> Resources:
    return Resources(num_gpus=share, **others)


def nodes(*gpus: float, cpus: float = 8) -> list[Node]:
    return [Node(f"node-{at}", cpus, each) for at, each in enumerate(gpus)]


@pytest.mark.parametrize(
    ("asked", "there", "without"),
    [
        (plan(samplers=3, sampler=gpu(0.6)), nodes(1, 1), r"sampler-2 \(1 CPU, 0\.6 GPU\)"),
        (plan(samplers=1, sampler=gpu(2)), nodes(1, 1), r"sampler \(1 CPU, 2 GPU\)"),
        (plan(samplers=1, learner=gpu(0.75), sampler=gpu(0.75)), nodes(1, 0.5), "sampler"),
        (plan(learner=gpu(1), samplers=1, sampler=gpu(0.5)), nodes(1.5, 0), None),
        (plan(learner=gpu(1), samplers=1, sampler=gpu(0.5)), nodes(0.75, 0.75), "learner"),
        (plan(learner=Resources(num_cpus=6)), nodes(0, 0, cpus=4), r"learner \(6 CPU, 0 GPU\)"),
        (plan(learner=gpu(1, num_cpus=6)), [Node("a", 8), Node("b", 2, 1)], "learner"),
    ],
)  # fmt: skip
def test_what_fits_the_sum_but_no_node_is_refused(
    asked: FleetPlan, there: list[Node], without: str | None
) -> None:
    if without is None:
        place(asked, there)
        return
    message = rf"fits the CPUs and GPUs of all nodes together, but no node has room for {without}"
    with pytest.raises(ConfigError, match=message):
        place(asked, there)


def test_the_refusal_shows_who_is_there_and_what_is_free() -> None:
    with pytest.raises(ConfigError) as caught:
        place(plan(learner=gpu(0.7), samplers=2, sampler=gpu(0.65)), nodes(1, 1))
    assert str(caught.value).splitlines()[:3] == [
        "the fleet fits the CPUs and GPUs of all nodes together, but no node has room for "
        "sampler-1 (1 CPU, 0.65 GPU)",
        "  node-0 (8 CPUs, 1 GPU): 7.99 CPUs, 0.3 GPUs left beside learner (0.7 of GPU 0)",
        "  node-1 (8 CPUs, 1 GPU): 7.99 CPUs, 0.35 GPUs left beside sampler-0 (0.65 of GPU 0)",
    ]


def test_a_sum_that_is_too_small_is_shown_by_node_too() -> None:
    with pytest.raises(ConfigError, match=r"asks for 3 GPUs, but there are 2") as caught:
        place(plan(learner=gpu(1), samplers=2, sampler=gpu(1)), nodes(1, 1))
    assert "node-0 (8 CPUs, 1 GPU), node-1 (8 CPUs, 1 GPU)" in str(caught.value)
    with pytest.raises(ConfigError, match=r"does not fit 16 CPUs.*node-1 \(8 CPUs, 1 GPU\)"):
        place(plan(learner=Resources(num_cpus=17)), nodes(1, 1))


def test_seats_name_node_and_gpu() -> None:
    asked = plan(samplers=2, learner=gpu(1), sampler=gpu(0.5), server=gpu(0.5))
    found = place(asked, [Node("cpus", 8), Node("gpus", 8, 3)])
    assert found.note == ""
    seats = {seat.worker: seat for seat in found.seats}
    assert seats["moments"].node == "cpus"  # Ray leaves nodes with GPUs to those that need them
    assert [str(seats[name]) for name in ("learner", "sampler-0", "sampler-1", "server")] == [
        "learner (GPU 0)",
        "sampler-0 (0.5 of GPU 1)",
        "sampler-1 (0.5 of GPU 1)",
        "server (0.5 of GPU 2)",
    ]


def test_what_ray_would_not_place_by_itself_has_seats() -> None:
    """Ray spreads workers once a node is half used; two halves would leave no whole GPU."""
    asked = plan(samplers=1, learner=gpu(0.5), sampler=gpu(0.5), server=gpu(1))
    found = place(asked, nodes(1, 1))
    assert found.note == ""
    placed = {seat.worker: seat.node for seat in found.seats}
    assert placed["learner"] == placed["sampler"] != placed["server"]


def test_a_gpu_that_ray_may_share_in_another_way_has_a_note() -> None:
    """.4 goes beside .5, since that GPU is the fullest: .6 and .5 then share no other."""
    asked = plan(samplers=1, learner=gpu(0.5), moments=gpu(0.4), sampler=gpu(0.6), server=gpu(0.5))
    assert "may leave none for server (1 CPU, 0.5 GPU)" in place(asked, nodes(2)).note


def test_gpus_that_others_use_in_part_have_a_note() -> None:
    """1.5 free GPUs may be two of which .75 are left: no worker gets a whole one."""
    asked = plan(samplers=1, learner=gpu(1), sampler=gpu(0.5), server=gpu(0))
    assert "which parts Ray does not tell: free are node-0 (8 CPUs, 1.5 GPUs)" in (
        place(asked, nodes(1.5)).note
    )
    on_cpus = plan(samplers=1, learner=gpu(0), sampler=gpu(0), server=gpu(0))
    assert place(on_cpus, nodes(1.5)).note == ""


def test_largest_first_is_tried_too() -> None:
    asked = plan(samplers=2, learner=gpu(0.4), sampler=gpu(0.3), server=gpu(1))
    assert place(asked, nodes(1, 1)).seats  # .4 + .3 + .3, and 1


def test_equal_shares_fit_whole_into_each_node() -> None:
    """Seven workers on two nodes of two CPUs: of 4/7 CPU, three fit a node; so they get less."""
    found = place(plan(samplers=4, servers=1), nodes(0, 0, cpus=2))
    assert {role.num_cpus for role in found.roles} <= {0.57, 0.45}
    per_node = [sum(seat.node == f"node-{at}" for seat in found.seats) for at in (0, 1)]
    assert sum(per_node) == 7
    assert max(per_node) * found.roles[0].num_cpus <= 2


def test_choice_of_gpus_is_rays() -> None:
    free = [UNITS, 3000, 6000]
    assert choose_gpus(free, 2500) == [1]
    assert choose_gpus(free, 5000) == [2]
    assert choose_gpus(free, 7000) == [0]
    assert choose_gpus(free, UNITS) == [0]
    assert choose_gpus(free, 2 * UNITS) is None
    assert choose_gpus(free[1:], 6001) is None
    assert choose_gpus([], 0) == []


def test_many_workers_are_placed_quickly() -> None:
    found = place(plan(samplers=512, sampler=gpu(0.25)), nodes(*[8] * 16, cpus=64))
    gpus = [(seat.node, seat.gpus) for seat in found.seats if seat.gpus]
    assert len(gpus) == 512
    assert max(gpus.count(each) for each in set(gpus)) == 4


def test_resources_validate() -> None:
    with pytest.raises(ValueError, match="num_cpus and num_gpus must be >= 0"):
        Resources(num_gpus=-1)
    with pytest.raises(ValueError, match="num_threads must be >= 1"):
        Resources(num_threads=0)


# Labels, accelerator types, strategies.


def with_options(asked: FleetPlan, **options: object) -> FleetPlan:
    return replace(asked, placement=PlacementConfig(**options))  # type: ignore[arg-type]


LABELLED = [
    Node("head", 8, labels={"tessera-role": "head"}),
    Node("a", 8, 2, {"tessera-role": "sampler"}, "L4"),
    Node("b", 8, 2, {"tessera-role": "learner"}, "H100"),
]


def seats_of(asked: FleetPlan, there: list[Node]) -> dict[str, str]:
    return {seat.worker: seat.node for seat in place(asked, there).seats}


def test_labels_and_types_choose_nodes() -> None:
    found = seats_of(
        plan(
            sampler=gpu(1, labels={"tessera-role": "sampler"}),
            learner=gpu(1, accelerator_type="H100"),
            server=gpu(0.5, labels={"tessera-role": "!in(sampler,head)"}),
            moments=Resources(labels={"tessera-role": "head"}),
        ),
        LABELLED,
    )
    assert found == {
        "learner": "b", "sampler-0": "a", "sampler-1": "a", "server": "b", "moments": "head"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("resources", "lines"),
    [
        (
            {"sampler": gpu(1, labels={"tessera-role": "samplers"})},
            [
                "no node has room for sampler-0 (1 CPU, 1 GPU, tessera-role=samplers)",
                "  head (8 CPUs, 0 GPUs): has tessera-role=head, needed is tessera-role=samplers",
                "  a (8 CPUs, 2 GPUs): has tessera-role=sampler, needed is tessera-role=samplers",
                "  b (8 CPUs, 2 GPUs): has tessera-role=learner, needed is tessera-role=samplers",
            ],
        ),
        (
            {"learner": gpu(1, accelerator_type="H200", labels={"zone": "a"})},
            [
                "no node has room for learner (1 CPU, 1 GPU, H200, zone=a)",
                "  head (8 CPUs, 0 GPUs): has no known accelerator, needed is H200",
                "  a (8 CPUs, 2 GPUs): has L4, needed is H200",
                "  b (8 CPUs, 2 GPUs): has H100, needed is H200",
            ],
        ),
        (
            {"server": Resources(labels={"zone": "a"})},
            [
                "no node has room for server (1 CPU, 0 GPU, zone=a)",
                "  head (8 CPUs, 0 GPUs): has no label zone, needed is zone=a",
                "  a (8 CPUs, 2 GPUs): has no label zone, needed is zone=a",
                "  b (8 CPUs, 2 GPUs): has no label zone, needed is zone=a",
            ],
        ),
    ],
)
def test_what_no_node_has_is_said_by_node(
    resources: dict[str, Resources], lines: list[str]
) -> None:
    with pytest.raises(NoRoomError) as caught:
        place(plan(**resources), LABELLED)
    assert str(caught.value).splitlines()[:-1] == lines
    assert "change labels or accelerator_type of the role" in str(caught.value)


def test_a_labelled_node_without_room_is_told_from_others() -> None:
    with pytest.raises(NoRoomError) as caught:
        place(plan(samplers=3, sampler=gpu(1, labels={"tessera-role": "sampler"})), LABELLED)
    said = str(caught.value)
    assert "no node has room for sampler-2 (1 CPU, 1 GPU, tessera-role=sampler)" in said
    assert (
        "a (8 CPUs, 2 GPUs): 7.98 CPUs, 0 GPUs left beside sampler-0 (GPU 0), sampler-1 (GPU 1)"
        in said
    )
    assert "b (8 CPUs, 2 GPUs): has tessera-role=learner" in said


@pytest.mark.parametrize(
    ("sampler", "lacks"),
    [
        (Resources(num_cpus=9), "too few CPUs"),
        (gpu(2, num_cpus=1), "too few unused GPUs"),
        (gpu(0.75, num_cpus=1), "no GPU has 0.75 free"),
    ],
)
def test_what_an_empty_node_lacks_is_said(sampler: Resources, lacks: str) -> None:
    there = [*nodes(0.5), Node("others", 99, 9, {"zone": "x"})]
    sampler = replace(sampler, labels={"zone": "!x"})
    with pytest.raises(NoRoomError, match=rf"node-0 \(8 CPUs, 0.5 GPUs\): {lacks}"):
        place(plan(samplers=1, sampler=sampler), there)


def test_learners_are_packed() -> None:
    asked = plan(learner=gpu(1), sampler=gpu(0))
    asked = replace(asked, learner=replace(asked.learner, count=4))
    for way, count in (("pack", 1), ("any", 2)):
        there = [Node("small", 8, 2), Node("big", 8, 4)]
        found = seats_of(with_options(asked, learners=way), there)
        assert len({node for name, node in found.items() if name.startswith("learner")}) == count


def test_reward_servers_are_spread() -> None:
    asked = plan(servers=4, server=Resources(num_cpus=1))
    for way, counts in (("spread", [1, 1, 1, 1]), ("any", [4])):
        there = [Node(name, 64) for name in "abcd"]
        found = seats_of(with_options(asked, reward_servers=way), there)
        where = [node for name, node in found.items() if name.startswith("server")]
        assert sorted(map(where.count, set(where))) == counts


@pytest.mark.parametrize(("samplers", "servers"), [(2, 2), (4, 2), (2, 4), (3, 2), (1, 3)])
def test_samplers_and_reward_servers_are_kept_together(samplers: int, servers: int) -> None:
    asked = plan(samplers, servers, sampler=gpu(0.5, num_cpus=1), server=gpu(0.25, num_cpus=1))
    asked = with_options(asked, samplers_with_reward_servers=True)
    found = place(asked, nodes(*[2] * 4))
    where = {seat.worker: seat.node for seat in found.seats}
    together = [gang for gang in found.gangs if len(gang) > 1]
    assert len(together) == min(samplers, servers)
    for gang in together:
        assert {request.role for request in gang} == {"sampler", "server"}
        assert len({where[request.worker] for request in gang}) == 1
    assert sorted(seat.worker for seat in found.seats) == sorted(
        request.worker for gang in found.gangs for request in gang
    )


def test_pairs_that_no_node_holds_are_refused() -> None:
    asked = plan(2, 2, sampler=gpu(0.75), server=gpu(0.5))
    assert place(asked, nodes(1, 1, 1)).seats
    with pytest.raises(NoRoomError, match=r"sampler-0 \(1 CPU, 0.75 GPU\) together with server-0"):
        place(with_options(asked, samplers_with_reward_servers=True), nodes(1, 1, 1))


# Against brute force.

CPUS, GPUS = st.integers(0, 3), st.sampled_from([0, 0.25, 0.5, 0.75, 1, 2])
ZONES = st.sampled_from(["", "x", "y"])


@st.composite
def fleets(draw: st.DrawFn) -> tuple[FleetPlan, list[Node]]:
    def resources() -> Resources:
        zone = draw(ZONES)
        return Resources(
            num_cpus=draw(st.integers(1, 2)),
            num_gpus=draw(GPUS),
            labels={"zone": zone} if zone else {},
            accelerator_type=draw(st.sampled_from(["", "", "L4"])),
        )

    asked = plan(
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        sampler=resources(),
        server=resources(),
        learner=resources(),
        moments=Resources(num_cpus=0.01),
    )
    there = [
        Node(
            f"node-{at}",
            draw(st.integers(1, 5)),
            draw(st.sampled_from([0, 0.5, 1, 1.5, 2])),
            {"zone": draw(ZONES)} if draw(st.booleans()) else {},
            draw(st.sampled_from(["", "L4"])),
        )
        for at in range(draw(st.integers(1, 3)))
    ]
    return with_options(asked, samplers_with_reward_servers=draw(st.booleans())), there


def allowed(request: Request, node: Node) -> bool:
    zone = request.labels.get("zone")
    kind = request.accelerator_type
    return (not zone or node.labels.get("zone") == zone) and kind in ("", node.accelerator_type)


def fits(gangs: Sequence[Gang], there: list[Node]) -> bool:
    """Every node for every gang, and every set of GPUs for every worker of it."""
    left = [
        (round(n.cpus * UNITS), tuple(min(UNITS, round((n.gpus - at) * UNITS)) for at in range(8)))
        for n in there
    ]

    def after(room: tuple, gang: Gang) -> Iterator[tuple]:
        if not gang:
            yield room
            return
        cpus, gpus = room
        whole, part = divmod(gang[0].gpus, UNITS)
        for chosen in combinations(range(len(gpus)), whole or (1 if part else 0)):
            need = UNITS if whole else part
            if gang[0].cpus <= cpus and all(gpus[at] >= need for at in chosen):
                rest = tuple(g - need * (at in chosen) for at, g in enumerate(gpus))
                yield from after((cpus - gang[0].cpus, rest), gang[1:])

    def search(gangs: Sequence[Gang], left: list) -> bool:
        if not gangs:
            return True
        return any(
            search(gangs[1:], [*left[:at], room, *left[at + 1 :]])
            for at, node in enumerate(there)
            if all(allowed(each, node) for each in gangs[0])
            for room in set(after(left[at], gangs[0]))
        )

    return search(gangs, left)


@settings(max_examples=300, deadline=None)
@given(fleets())
def test_what_fits_is_seated_and_nothing_else(drawn: tuple[FleetPlan, list[Node]]) -> None:
    asked, there = drawn
    gangs = gangs_of(asked, 0.01)
    try:
        found = place(asked, there)
    except NoRoomError:
        found = None
    assert fits(gangs, there) == (found is not None)
    if found is None:
        return
    requests = {each.worker: each for gang in found.gangs for each in gang}
    named = {node.name: node for node in there}
    assert [seat.worker for seat in found.seats] == list(requests)
    used: dict[tuple[str, int], float] = {}
    cpus: dict[str, float] = {}
    for seat in found.seats:
        request, node = requests[seat.worker], named[seat.node]
        assert allowed(request, node)
        cpus[node.name] = cpus.get(node.name, 0) + request.cpus
        assert len(seat.gpus) == (request.gpus // UNITS or bool(request.gpus))
        for gpu_at in seat.gpus:
            key = node.name, gpu_at
            used[key] = used.get(key, 0) + min(request.gpus, UNITS)
            assert used[key] <= round(min(node.gpus - gpu_at, 1) * UNITS)
    assert all(units <= named[name].cpus * UNITS for name, units in cpus.items())
    where = {seat.worker: seat.node for seat in found.seats}
    assert all(len({where[each.worker] for each in gang}) == 1 for gang in found.gangs)
