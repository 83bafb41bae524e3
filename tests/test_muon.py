"""Muon against torch.optim.Muon, matrix by matrix."""

import pytest
import torch
from torch import nn

from configs.semantic_schema import SemanticOptimConfig
from model import muon
from model.checkpoint import read_tensors, save_checkpoint
from model.muon import LEAST_SIZE, orthogonalise, split_group
from model.optim import (
    adamw,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
)

LR, MUON_LR = 1e-3, 2e-2


class Net(nn.Module):
    """One parameter of every kind that is told apart."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.first = nn.Conv1d(1, 24, 7)  # too narrow for Muon
        self.conv = nn.Conv1d(24, 32, 3)
        self.twin = nn.Conv1d(24, 32, 3)
        self.lstm = nn.LSTM(32, 32)
        self.tall = nn.Linear(32, 64)
        self.label_embeddings = nn.Parameter(torch.randn(20, 64))

    def forward(self, tokens):  # [B, T] -> [B, T - 2, 20]
        x = self.embed(tokens).mT + self.first(torch.ones(1, 1, tokens.shape[1] + 6))
        x = (self.conv(x) + self.twin(x).tanh()).mT
        return self.tall(self.lstm(x)[0]) @ self.label_embeddings.T


MATRICES = ("conv.weight", "twin.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "tall.weight")


def make(seed=0, lr=LR, muon_lr=MUON_LR):
    torch.manual_seed(seed)
    model = Net()
    group = {"params": list(model.parameters()), "weight_decay": 0.1}
    return model, adamw(split_group(model, group, muon_lr / lr), lr, (0.9, 0.98))


def learn(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        torch.manual_seed(100 + step)
        loss = model(torch.randint(40, (4, 12))).logsumexp(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_it_equals_the_optimisers_of_torch(monkeypatch):
    monkeypatch.setitem(muon.DTYPES, "cpu", torch.bfloat16)  # as torch.optim.Muon everywhere
    model, optimizer = make()
    expected, _ = make()
    state = dict(expected.named_parameters())
    rest = [p for name, p in state.items() if name not in MATRICES]
    torch_adamw = torch.optim.AdamW(rest, LR, (0.9, 0.98), weight_decay=0.1)
    flat = {}  # name -> matrices that torch.optim.Muon takes
    for name in MATRICES:
        count = 4 if name.startswith("lstm") else 1
        flat[name] = [nn.Parameter(m.clone()) for m in state[name].data.flatten(1).chunk(count)]
    torch_muon = torch.optim.Muon(
        [m for found in flat.values() for m in found],
        MUON_LR,
        weight_decay=0.1,
        adjust_lr_fn="match_rms_adamw",
    )
    for step in range(4):
        learn(model, optimizer, 1, step)
        torch.manual_seed(100 + step)
        expected(torch.randint(40, (4, 12))).logsumexp(-1).mean().backward()
        for name, matrices in flat.items():
            parts = state[name].grad.flatten(1).chunk(len(matrices))
            for matrix, part in zip(matrices, parts, strict=True):
                matrix.grad = part.clone()
        torch_adamw.step()
        torch_muon.step()
        for name, matrices in flat.items():
            state[name].data.copy_(torch.cat(list(matrices)).view_as(state[name]))
        expected.zero_grad()
    before = dict(make()[0].named_parameters())
    for name, p in model.named_parameters():
        change, error = (p - before[name]).norm(), (p - state[name]).norm()
        assert change > LR, name
        assert error < 0.01 * change, name


def test_few_matrices_at_a_time_are_moved_as_all_at_once(monkeypatch):
    together, apart = make(), make()
    learn(*together, 3)
    batches = []

    def counted(matrices):
        batches.append(len(matrices))
        return orthogonalise(matrices)

    monkeypatch.setattr(muon, "NUMBERS", 1)
    monkeypatch.setattr(muon, "orthogonalise", counted)
    learn(*apart, 3)
    assert batches == 3 * [1, 1, 1, 4, 4]  # the gates of an LSTM are one parameter's
    for ours, theirs in zip(apart[0].parameters(), together[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(3, 16, 200), (2, 96, 24), (1, 64, 64)])
def test_all_directions_move_alike(shape):
    torch.manual_seed(0)
    left, values, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, -1.3, values.shape[1])  # from 1 to 0.05
    found = torch.linalg.svdvals(orthogonalise(10 * (left * values) @ right))
    assert found.amin() > 0.6
    assert found.amax() < 1.3


def test_who_gets_muon():
    model, optimizer = make()
    names = {p: name for name, p in model.named_parameters()}
    found = [g for g in optimizer.param_groups if "num_blocks" in g]
    assert sorted(names[p] for g in found for p in g["params"]) == sorted(MATRICES)
    assert [g["num_blocks"] for g in found] == [1, 4]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(names)


def test_narrow_matrices_and_groups_of_convolutions():
    width = LEAST_SIZE
    model = nn.ModuleList([nn.Linear(64, width), nn.Linear(64, width - 1)])
    model.append(nn.Conv1d(4 * width, 4 * width, 8, groups=4))
    model.append(nn.Conv1d(4 * width, 4 * width, 8, groups=8))  # each has half of the rows
    group = {"params": list(model.parameters()), "weight_decay": 0.0}
    found = {g.get("num_blocks"): g["params"] for g in split_group(model, group, 1.0)}
    assert [found[1], found[4]] == [[model[0].weight], [model[2].weight]]
    assert found.keys() == {None, 1, 4}


def test_captured_rates_are_set_in_place():
    model = Net()
    group = {"params": list(model.parameters()), "weight_decay": 0.0}
    optimizer = adamw(split_group(model, group, 10.0), LR, (0.9, 0.98), capturable=True)
    before = [g["lr"] for g in optimizer.param_groups]
    set_learning_rate(optimizer, 0.5)
    assert all(a is g["lr"] for a, g in zip(before, optimizer.param_groups, strict=True))
    assert [float(lr) for lr in before] == [0.5, 5.0, 5.0]


def test_a_run_goes_on_with_the_optimiser_that_it_was_begun_with():
    model, optimizer = make()
    learn(model, optimizer, 1)
    tensors = optimizer_tensors(optimizer, model)
    adam = adamw([{"params": list(model.parameters()), "weight_decay": 0.0}], LR, (0.9, 0.98))
    with pytest.raises(ValueError, match=r"optim\.muon_lr: this run was begun with Muon"):
        load_optimizer_tensors(adam, model, tensors)
    learn(model, adam, 1)
    with pytest.raises(ValueError, match=r"optim\.muon_lr: this run was begun without Muon"):
        load_optimizer_tensors(optimizer, model, optimizer_tensors(adam, model))


def test_rates_keep_their_ratio():
    _, optimizer = make()
    set_learning_rate(optimizer, LR / 2)
    rates = {"num_blocks" in g: g["lr"] for g in optimizer.param_groups}
    assert rates == {False: LR / 2, True: pytest.approx(MUON_LR / 2)}


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, optimizer = make()
    learn(whole, optimizer, 5)
    first, optimizer = make()
    learn(first, optimizer, 3)
    tensors = {"model": first.state_dict(), "optimizer": optimizer_tensors(optimizer, first)}
    save_checkpoint(tmp_path, 3, tensors, {})
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    second, optimizer = make(seed=1)
    second.load_state_dict(read_tensors(checkpoint, "model"))
    load_optimizer_tensors(optimizer, second, read_tensors(checkpoint, "optimizer"))
    learn(second, optimizer, 2, start=3)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_muon_it_is_adamw():
    config = SemanticOptimConfig()
    model = Net()
    groups = make_optimizer(model, config).param_groups
    assert not any("num_blocks" in group for group in groups)
    groups = make_optimizer(model, config, muon_lr=config.muon_lr).param_groups
    decay = {"num_blocks" in g: g["weight_decay"] for g in groups if g["params"]}
    assert decay[True] == config.weight_decay


def test_a_step_that_is_found_bad_changes_nothing():
    """Whatever its gradient; the next step is the one that it would have been."""
    (model, optimizer), (other, untouched) = make(), make()
    for net, steps in ((model, optimizer), (other, untouched)):
        learn(net, steps, 3)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(float("nan"))
    optimizer.step()
    ours, theirs = optimizer_tensors(optimizer, model), optimizer_tensors(untouched, other)
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())
    parameters = dict(other.named_parameters())
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), torch.tensor(1.0)
    optimizer.zero_grad()
    for net, steps in ((model, optimizer), (other, untouched)):
        learn(net, steps, 1, start=3)
    for name, p in model.named_parameters():  # up to the rounding of a rate in fp32
        torch.testing.assert_close(p, dict(other.named_parameters())[name], atol=1e-7, rtol=1e-6)


def test_a_gradient_is_clipped_as_torch_clips_it():
    (model, optimizer), (other, clipped) = make(), make()
    for net, steps in ((model, optimizer), (other, clipped)):
        torch.manual_seed(7)
        (100 * net(torch.randint(40, (4, 12)))).logsumexp(-1).mean().backward()
        if steps is optimizer:
            norm = torch.nn.utils.get_total_norm(p.grad for p in net.parameters())
            steps.grad_scale = (norm / 0.5).clamp(min=1)
        else:
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        assert norm > 1
        steps.step()
    for name, value in optimizer_tensors(optimizer, model).items():
        torch.testing.assert_close(value, optimizer_tensors(clipped, other)[name])
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, dict(other.named_parameters())[name])
