"""Students that begin with their teacher's channels."""

from functools import partial
from itertools import pairwise

import pytest
import tiny
import torch
from torch import nn

from lightning_compress import TargetError, initialize_from_teacher
from lightning_compress.channels.student import MatchedChannels
from lightning_compress.lab.models import (
    DCGAN,
    VAE,
    AutoencoderKL,
    RecurrentVAE,
    ResNet18,
    SimpleNet,
)

MODELS = {
    "dcgan": lambda w: DCGAN(image_size=16, width=16, width_multiplier=w),
    "vae": lambda w: VAE(image_size=16, width=16, latent_dim=6, width_multiplier=w),
    "values": lambda w: RecurrentVAE(steps=5, features=3, hidden=16, width_multiplier=w),
    "tokens": lambda w: RecurrentVAE(
        steps=5, vocab_size=9, hidden=16, embedding=16, width_multiplier=w
    ),
    "simple": lambda w: SimpleNet(
        image_size=8, channels=1, num_classes=3, width=16, width_multiplier=w
    ),
    "autoencoder": lambda w: AutoencoderKL(
        image_size=8, channels=1, latent_channels=2, width=16, halvings=1, width_multiplier=w
    ),
    "resnet": lambda w: ResNet18(
        image_size=16, channels=1, num_classes=3, width=16, width_multiplier=w
    ),
}
PARTS = [
    ("dcgan", "generator"),
    ("vae", "encoder"),
    ("vae", "decoder"),
    ("values", "encoder"),
    ("values", "decoder"),
    ("tokens", "encoder"),
    ("tokens", "decoder"),
    ("simple", "net"),
    ("resnet", "net"),
]
GROUPED = [("autoencoder", "decoder")]  # whose means over groups count dead channels too


def outputs(model, path):
    module, inputs = model.parts()[path]
    if path == "decoder" and len(inputs) == 3:  # a state of its own size
        inputs = (inputs[0], module.initial_state(inputs[2]), inputs[2])
    found = module.eval()(*inputs)
    return found if isinstance(found, tuple) else (found,)


randomize = partial(tiny.randomize, seed=0, low=0.2, spread=0.5)


@pytest.mark.parametrize(("name", "path"), PARTS)
def test_a_teacher_with_dead_channels_is_copied_exactly(name, path):
    """The channels that a teacher really has, scattered among dead ones, are all found."""
    make = MODELS[name]
    small, teacher, student = make(0.5), make(1.0), make(0.5)
    randomize(small)
    scatter(small.get_submodule(path), teacher.get_submodule(path))
    initialize_from_teacher(student.get_submodule(path), teacher.get_submodule(path))
    for ours, theirs in zip(outputs(student, path), outputs(teacher, path), strict=True):
        if ours.shape == theirs.shape:  # not the recurrent state
            torch.testing.assert_close(ours, theirs)


def scatter(small, wide):
    """Put a small network's channels at odd places of a wide one, zeros elsewhere: independent of
    the copy that is tested but for the knowledge which axes belong together."""
    matched = MatchedChannels(small, wide)
    source = dict(matched.student.named_parameters()) | dict(matched.student.named_buffers())
    places = []
    for group in matched.groups:
        order = torch.randperm(len(group.units), generator=torch.Generator().manual_seed(7))
        places.append(order[: group.count].sort().values.numpy())
    kept = matched.kept(places)
    with torch.no_grad():
        both = [*matched.teacher.named_parameters(), *matched.teacher.named_buffers()]
        for name, tensor in both:
            if not tensor.dim():
                continue
            tensor.fill_(1.0 if name.endswith("running_var") else 0.0)
            indices = [torch.arange(size) for size in tensor.shape]
            for dim, entries in kept.get(name, {}).items():
                indices[dim] = entries
            tensor[torch.meshgrid(*indices, indexing="ij")] = source[name]


@pytest.mark.parametrize(("name", "path"), [*PARTS, *GROUPED])
def test_an_equal_student_becomes_the_teacher(name, path):
    teacher, student = MODELS[name](1.0), MODELS[name](1.0)
    initialize_from_teacher(student.get_submodule(path), teacher.get_submodule(path))
    for key, value in teacher.get_submodule(path).state_dict().items():
        assert torch.equal(value, student.get_submodule(path).state_dict()[key]), key


def test_the_gates_of_a_gru_give_the_same_units():
    teacher, student = nn.GRU(3, 4, num_layers=2), nn.GRU(3, 2, num_layers=2)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.view(3, 4, -1)[:, [0, 3]] *= 10  # units 0 and 3 matter, in each gate
    initialize_from_teacher(student, teacher)
    kept = torch.tensor([0, 3])
    rows = torch.cat([kept, kept + 4, kept + 8])
    assert torch.equal(student.weight_ih_l0, teacher.weight_ih_l0[rows])
    assert torch.equal(student.weight_hh_l1, teacher.weight_hh_l1[rows][:, kept])
    assert torch.equal(student.weight_ih_l1, teacher.weight_ih_l1[rows][:, kept])
    assert torch.equal(student.bias_hh_l1, teacher.bias_hh_l1[rows])


def test_the_largest_channels_go_along_in_every_layer():
    teacher = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    student = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        teacher[0].weight[1] *= 50
        teacher[1].running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    initialize_from_teacher(student, teacher)
    assert torch.equal(student[0].weight, teacher[0].weight[1:2])
    assert student[1].running_mean.tolist() == [2.0]
    assert torch.equal(student[3].weight, teacher[3].weight[:, 4:8])


class Sum(nn.Module):
    def __init__(self, width, other=None):
        super().__init__()
        self.a, self.b = nn.Linear(2, width), nn.Linear(2, other or width)
        self.out = nn.Linear(width, 1)

    def forward(self, x):
        return self.out(self.a(x) + self.b(x))


def test_summands_keep_the_same_channels():
    teacher, student = Sum(3), Sum(2)
    with torch.no_grad():
        teacher.a.weight.copy_(torch.tensor([[3.0, 0], [0, 0], [1, 0]]))
        teacher.b.weight.copy_(torch.tensor([[0.0, 0], [9, 0], [1, 0]]))
    initialize_from_teacher(student, teacher)  # norms 9, 81, 2: channels 0 and 1
    assert student.a.weight.tolist() == [[3, 0], [0, 0]]
    assert student.b.weight.tolist() == [[0, 0], [9, 0]]


class Tied(nn.Module):
    """Its last layer reads by the weight that its first one makes channels with."""

    def __init__(self, width):
        super().__init__()
        self.read = nn.Embedding(5, width)
        self.middle = nn.Linear(width, width)
        self.out = nn.Linear(width, 5, bias=False)
        self.out.weight = self.read.weight

    def forward(self, x):
        return self.out(self.middle(self.read(x)))


class Twice(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.shared = nn.Linear(2, width), nn.Linear(width, width)
        self.out = nn.Linear(width, 1)

    def forward(self, x):
        return self.out(self.shared(self.shared(self.first(x))))


class CatSum(nn.Module):
    def __init__(self, one, two):
        super().__init__()
        self.a, self.b = nn.Linear(3, one), nn.Linear(3, two)
        self.both, self.out = nn.Linear(3, one + two), nn.Linear(one + two, 2)

    def forward(self, x):
        return self.out(torch.cat([self.a(x), self.b(x)], 1) + self.both(x))


@pytest.mark.parametrize(
    ("small", "student", "teacher", "x"),
    [
        (Tied(2), Tied(2), Tied(4), torch.arange(5)),
        (Twice(2), Twice(2), Twice(5), torch.ones(3, 2)),
        (CatSum(2, 3), CatSum(2, 3), CatSum(4, 6), torch.ones(2, 3)),
    ],
)
def test_channels_that_meet_in_one_weight_or_sum_are_chosen_once(small, student, teacher, x):
    randomize(small)
    scatter(small, teacher)
    initialize_from_teacher(student, teacher)
    torch.testing.assert_close(student(x), teacher(x))


def test_each_level_of_a_recurrent_layer_chooses_units_of_its_own():
    teacher, student = nn.LSTM(3, 4, num_layers=2), nn.LSTM(3, 2, num_layers=2)
    kept = [torch.tensor([0, 3]), torch.tensor([1, 2])]
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            parameter.view(4, 4, -1)[:, kept[int(name[-1])]] *= 10
    initialize_from_teacher(student, teacher)
    rows = torch.cat([kept[1] + 4 * gate for gate in range(4)])
    assert torch.equal(student.weight_ih_l1, teacher.weight_ih_l1[rows][:, kept[0]])
    assert torch.equal(student.weight_hh_l1, teacher.weight_hh_l1[rows][:, kept[1]])


def normed(width, groups, affine=True):
    return nn.Sequential(
        nn.Conv2d(2, width, 1),
        nn.GroupNorm(groups, width, affine=affine),
        nn.PReLU(width),
        nn.Conv2d(width, 3, 1),
    )


@torch.no_grad()
def sized(teacher, norms):
    """Rows of the first layer with these norms."""
    weight = teacher[0].weight.flatten(1)
    weight *= (torch.tensor(norms) / weight.norm(dim=1))[:, None]


@pytest.mark.parametrize("affine", [True, False])
def test_each_group_of_a_norm_gives_as_many_channels(affine):
    """Means over a group stay those of the teacher's group, less the channels that go."""
    student, teacher = normed(4, 2, affine), normed(8, 2, affine)
    sized(teacher, [1.0, 3, 2, 4, 50, 60, 80, 70])  # all of the largest are in the last group
    initialize_from_teacher(student, teacher)
    kept = [1, 3, 6, 7]
    assert torch.equal(student[0].weight, teacher[0].weight[kept])
    assert torch.equal(student[2].weight, teacher[2].weight[kept])
    assert torch.equal(student[3].weight, teacher[3].weight[:, kept])


def test_half_a_decoder_with_group_norms_begins_with_its_teachers_channels():
    teacher, student = (MODELS["autoencoder"](width).decoder for width in (1.0, 0.5))
    initialize_from_teacher(student, teacher)
    whole = {tuple(row.flatten().tolist()) for row in teacher[0].weight}
    rows = [tuple(row.flatten().tolist()) for row in student[0].weight]
    assert len(rows) == len({*rows}) == len(whole) // 2
    assert {*rows} <= whole


def test_groups_of_equal_size_go_along_whole():
    student, teacher = normed(4, 2), normed(8, 4)
    sized(teacher, [1.0, 9, 1, 1, 9, 1, 1, 1])
    initialize_from_teacher(student, teacher)
    kept = [0, 1, 4, 5]
    assert torch.equal(student[0].weight, teacher[0].weight[kept])
    assert torch.equal(student[1].weight, teacher[1].weight[kept])
    x = torch.randn(3, 2, 4, 4)
    expected = teacher[1](teacher[0](x))[:, kept]
    torch.testing.assert_close(student[1](student[0](x)), expected)


class Branchy(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


class Attends(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.v, self.out = nn.Linear(2, width), nn.Linear(2, width), nn.Linear(width, 2)

    def forward(self, x):
        q, v = self.q(x), self.v(x)
        return self.out(nn.functional.scaled_dot_product_attention(q, q, v))


def linear(*sizes):
    return nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(sizes)])


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (linear(2, 3, 1), linear(2, 4, 5, 1), "differ in structure"),
        (linear(2, 3, 1), linear(5, 4, 1), "inputs of 2 and 5 differ in size"),
        (linear(2, 3, 1), linear(2, 4, 7), "1 is an output and has 1 channels"),
        (linear(2, 5, 1), linear(2, 4, 1), "0: the student has 5 channels, the teacher only 4"),
        (nn.Sequential(nn.Bilinear(2, 2, 2)), nn.Sequential(nn.Bilinear(2, 2, 2)), "Bilinear"),
        (Branchy(2, 2), Branchy(2, 2), "Branchy cannot be traced"),
        (nn.GRU(2, 2, bidirectional=True), nn.GRU(2, 4, bidirectional=True), "bidirectional"),
        (
            nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)),
            nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)),
            "are not known here",
        ),
        (nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Conv1d(2, 3, 1)), "0: Linear and Conv1d"),
        (normed(6, 3), normed(8, 2), "3 groups of 2 channels in the student, 2 of 4 in the"),
        (Attends(4), Attends(8), "as attention does"),
        (Sum(2, 2), Sum(4, 4).requires_grad_(False), None),
    ],
)
def test_what_cannot_be_matched_is_said_and_nothing_is_changed(student, teacher, message):
    if message is None:
        initialize_from_teacher(student, teacher)
        return
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(TargetError, match=message):
        initialize_from_teacher(student, teacher)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
