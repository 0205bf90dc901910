"""One GPU's step, which those of the splits are compared with."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import torch

from glm5_patch.checkpoint.names import expected_tensors, own_part
from glm5_patch.testing.parity import kept_share
from glm5_patch.topk.source import Selection

from .model import Model


class Reference:
    """One GPU's step: its gradients by the tensors that make them, its top-k and its experts.

    Every rank runs the same step by itself, and keeps a part of the gradients on the host.
    """

    def __init__(self, model: Model, length: int):
        self.length = length
        self.topk_indices: dict[tuple[int, int], torch.Tensor] = {}
        self.experts: dict[tuple[int, int], torch.Tensor] = {}
        """[tokens, experts of a token] by microbatch and layer."""
        with self._observed(model), routed_by(model, self._record):
            model.step(length)
        self._sources = sorted(sources for _, _, sources in model.gradients())
        self._shapes = expected_tensors(model.hf)
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        own = set(self._sources[rank::ranks])
        self._gradients = {
            sources: parameter.main_grad.to("cpu", model.dtype, copy=True)
            for _, parameter, sources in model.gradients()
            if sources in own
        }

    @contextmanager
    def _observed(self, model: Model):
        def keep(layer_number, topk_indices):
            key = model.microbatch, layer_number
            if key not in self.topk_indices:  # else a recompute
                self.topk_indices[key] = topk_indices.cpu()

        computing = [core for core in model.cores() if core.topk_source.computes]
        for core in computing:
            core.observer = keep
        yield
        for core in computing:
            del core.observer

    @contextmanager
    def replayed(self, model: Model, differing: list[float]):
        """Layers attend to the recorded keys; the share that they would not have selected is
        appended."""
        rows = model.routed_positions(self.length)

        def experts(key, scores, topk, choose):
            chosen = self.experts[key][rows].to(scores.device)
            return scores.gather(1, chosen), chosen

        with ExitStack() as undo:
            undo.enter_context(routed_by(model, experts))
            for core in model.cores():
                self._replay(core, model, differing)
                undo.callback(delattr, core.topk_source, "selection")
            yield

    def _record(self, key, scores, topk, choose):
        probs, chosen = choose(scores, topk)
        self.experts[key] = chosen.cpu()
        return probs, chosen

    def _replay(self, core, model: Model, differing: list[float]) -> None:
        source = core.topk_source
        select = source.selection  # of the class

        def selection(indexer, hidden_states, q_latent, layout, wants_inputs=False):
            found, inputs = select(indexer, hidden_states, q_latent, layout, wants_inputs)
            recorded = self.topk_indices[model.microbatch, source.source]
            recorded = recorded[:, layout.queries.places.cpu()].to(found.device)
            if source.computes and not torch.is_grad_enabled():
                differing.append(1 - kept_share(found, recorded))
            return Selection(recorded, inputs)

        source.selection = selection

    def distance(self, model: Model) -> float:
        """Relative L2, over the parameters of all ranks."""
        squares = torch.zeros(2, dtype=torch.float64, device=model.device)
        held = {sources: (name, parameter) for name, parameter, sources in model.gradients()}
        for number, sources in enumerate(self._sources):
            whole = self._whole(number, model)
            if sources in held:
                name, parameter = held[sources]
                expected = own_part(name, whole, parameter).float()
                squares[0] += (parameter.main_grad.float() - expected).square().sum()
                squares[1] += expected.square().sum()
        torch.distributed.all_reduce(squares)
        return (squares[0] / squares[1]).sqrt().item()

    def _whole(self, number: int, model: Model) -> list[torch.Tensor]:
        """The gradient of each tensor that makes one parameter, from the rank that has it."""
        sources = self._sources[number]
        shapes = [self._shapes[source] for source in sources]
        if sources in self._gradients:
            whole = self._gradients[sources].to(model.device)
        else:
            rows = sum(shape[0] for shape in shapes)
            shape = (rows, *shapes[0][1:])
            whole = torch.empty(shape, dtype=model.dtype, device=model.device)
        torch.distributed.broadcast(whole, src=number % torch.distributed.get_world_size())
        return whole.split([shape[0] for shape in shapes])


class Routing:
    """What a router of megatron-core asks for its experts."""

    def __init__(self, model: Model, layer_number: int, answer):
        self.model, self.layer_number, self.answer = model, layer_number, answer

    def get_replay_topk(self, scores, topk, num_groups, group_topk, default_compute_topk):
        def choose(scores, topk):
            return default_compute_topk(scores, topk, num_groups, group_topk)

        return self.answer((self.model.microbatch, self.layer_number), scores, topk, choose)


@contextmanager
def routed_by(model: Model, answer):
    """Every router gets its experts from ``answer(key, scores, topk, choose)``."""
    routers = list(model.routers())
    for layer_number, router in routers:
        router.router_replay = Routing(model, layer_number, answer)
    yield
    for _, router in routers:
        router.router_replay = None
