r"""`fit`: Algorithm 1 of the notes (AEVB). Minibatch, noise, gradient, update; unbiased for the whole data set.

Step t takes the next rows of an endless stream of permutations, each drawn from (seed, epoch), and seeds torch's
generator with (seed, t), or for part a of a batch that is cut with (seed, t, a): draws, dropout and per-epoch
binarisation are functions of the step, so a run that resumes at step t goes on as if it had never stopped, on as many
processes as may be, and a dropped step can be replayed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aevb.bayesnet import VAE
from aevb.bounds import evaluating, holes_in, prepare, terms
from aevb.checkpoint import Run, explained, holds_nothing, load, load_weights, made_here, save
from aevb.config import Discrete, InputError, TrainConfig
from aevb.training.batches import Dataset, Order, dataset, key, split_blocks, split_rows
from aevb.training.log import History, Interrupt, dead_dimensions, told_collapse, told_dead
from aevb.training.processes import Processes, join
from aevb.training.schedules import kl_weight, learning_rate
from aevb.training.step import NOTHING, OBJECTIVES, Objective, Step, check_memory
from aevb.training.tiers import Tiers, wanted_tier
from aevb.training.updates import OptimizerState

__all__ = ["OBJECTIVES", "fit"]

_log = logging.getLogger("aevb")
_CHUNK, _ENTRIES = 8192, 2**23
"""Most rows that are looked at together outside of training, and numbers in them: rows of a sparse matrix are wide, and
what a model makes of them is several times as large."""
_MOST_DROPPED = 20
"""Non-finite steps in a row that end a run."""


def fit(
    vae: VAE,
    data: Mapping[str, Any] | Dataset,
    config: TrainConfig | None = None,
    *,
    objective: str | Objective = "elbo",
    validation: Mapping[str, Any] | Dataset | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
    describe: Mapping[str, Any] | None = None,
) -> Run:
    r"""Maximise a bound on :math:`\sum_n \log p(x_n)` by stochastic gradient ascent (AEVB, the notes' Algorithm 1).

    The loss of a step is minus the mean bound of its rows, an unbiased estimate of 1/N of the data set's. Rows held out
    by `config.validation` choose the weights that are kept: the best of the averaged ones, by their ELBO (the term of
    `with_classifier` with it), or by the importance-weighted bound, with as many draws, where that is the objective.

    Started by torchrun or srun on several processes, each calls this alike, begins with the first one's weights, and is
    left with the same run; the first writes. Together they take the `config.shards` parts of every batch.

    Args:
        vae: Model, trained in place; left with the kept weights.
        data: Node names to arrays `(N, *event)`, NaN for missing; or an object with `len` and `take(indices)`.
        config: Schedule, checks and stopping rule; `TrainConfig()` if None.
        objective: A name from `OBJECTIVES`, or any `(vae, values, **tensors) -> (N,)` in nats, higher is better, which
            is handed `kl_weight` and, if it names it, `bound` `(N,)`, the ELBO at that weight; a module's own
            parameters are trained too. History reports the ELBO beside it.
        validation: Rows that choose the kept weights, in the form of `data`; None holds out `config.validation` of it.
        out: Folder for checkpoints and `history.csv`; must not hold a run, unless `resume`.
        resume: Go on from the newest checkpoint in `out`.
        progress: Called with each record of the history, in the process that writes.
        describe: What the data are, JSON-able, for the run's record.

    Returns:
        The run: model, configuration, history.

    Raises:
        InputError: For data the model cannot take, a batch that cannot fit memory, or an `out` that exists.
        FloatingPointError: If too many steps in a row are not finite; names the term, the rows and the parameters.
        KeyboardInterrupt: On Ctrl-C, after a checkpoint was written to `out`.
        SystemExit: On SIGTERM, likewise, with status 143.
        ConnectionError: If another process of the job has ended.

    Example:
        >>> import aevb
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(200, 5) @ torch.randn(5, 5)
        >>> vae = aevb.build_vae(aevb.ModelConfig(features=5, latents=2), x)
        >>> run = fit(vae, {"x": x}, aevb.TrainConfig(steps=200, validate_every=100))
        >>> run.history[-1]["bound"] > run.history[0]["bound"]
        True
    """
    config = config or TrainConfig()
    target = None if out is None else Path(out)
    if target is not None and not resume and not holds_nothing(target):
        raise InputError(f"`{target}` exists already; a run is never overwritten. Choose another folder, or resume it.")
    if resume and target is None:
        raise InputError("`resume` needs the folder of the run in `out`.")
    processes = join(next((p.device.type for p in vae.parameters()), "cpu"))
    if target is not None and not resume and processes.is_writer:
        with explained(target):
            target.mkdir(parents=True, exist_ok=True)
    trainer = None
    try:
        with torch.random.fork_rng(), Interrupt() as interrupt:
            trainer = _Trainer(vae, data, config, objective, target, dict(describe or {}), validation, processes)
            if resume:
                trainer.restore()
            elif target is not None:
                trainer.checkpoint()  # so that from here on the run can be resumed, whatever stops it
            trainer.train(interrupt, progress)
            return trainer.finish()
    except Exception:
        # What failed before its first step would only stand in the way of the next try.
        unused = not resume and processes.is_writer and (trainer is None or trainer.step == 0)
        if target is not None and unused:
            shutil.rmtree(target, ignore_errors=True)
        raise


class _Trainer:
    """The state of one call of `fit`; every attribute below `step` goes into a checkpoint."""

    def __init__(
        self, vae: VAE, data: Mapping[str, Any] | Dataset, config: TrainConfig, objective: str | Objective,
        out: Path | None, describe: dict[str, Any], validation: Mapping[str, Any] | Dataset | None = None,
        processes: Processes | None = None,
    ) -> None:  # fmt: skip
        self.vae, self.config, self.out, self.describe = vae, config, out, describe
        self.processes = processes or Processes()
        self.data = dataset(data)
        self.judged = self.data
        whole = config if validation is None else dataclasses.replace(config, validation=0.0)
        training: Tensor | list[range]
        if (blocks := getattr(self.data, "blocks", None)) is not None:
            training, self.held_out = split_blocks(blocks, whole)
        else:
            training, self.held_out = split_rows(len(self.data), whole)
        if validation is not None:
            self.judged = dataset(validation)
            self.held_out = torch.arange(len(self.judged))
        self.order = Order(training, config.batch_size, config.seed)
        self.parts = self.processes.parts(config.shards, self.order.batch_size)
        modules = [vae, objective] if isinstance(objective, nn.Module) else [vae]
        if self.processes.device is not None:
            for module in modules:
                module.to(self.processes.device)
        params = [p for module in modules for p in module.parameters() if p.requires_grad]
        if not params:
            raise InputError("`vae` has no parameters to train. Give p or q a conditional with a net.")
        self.reference = params[0]
        check_memory(vae, self.order.batch_size // config.shards * config.samples)
        for module in modules:  # which each process may have begun with weights of its own
            self.processes.share_([*module.parameters(), *module.buffers()])
        self.state = OptimizerState.start(params, config, list(vae.buffers()))
        name = objective if isinstance(objective, str) else getattr(objective, "__qualname__", None)
        self.told, first = name or type(objective).__qualname__, self.batch(0)
        self.given, width = frozenset(first), sum(value[0].numel() for value in first.values())
        self.chunk = max(1, min(_CHUNK, _ENTRIES // max(1, width)))
        self.inner = Step(vae, objective, self.state, config, self._check_data(), self.order.count, self.processes)
        self.inner.measure(self.batch(0))
        if config.shards > 1:
            few = self.order.batch(0)[: max(2, self.order.batch_size // config.shards)]
            self.inner.check_rows_apart(self._take(self.data, few), lambda: self._seed("apart", 0))
        tier = wanted_tier(config, vae, self.order.batch_size)
        self.tiers = Tiers(self.inner, config, tier, self.reference.device)
        self.history = History([], out if self.processes.is_writer else None)
        self.step = 0
        self.best: dict[str, Tensor] | None = None
        self.best_bound, self.stale = -math.inf, 0
        self.seconds = 0.0
        self.finished = False
        self.collapsed: set[str] = set()

    def batch(self, step: int, part: int = 0) -> dict[str, Tensor]:
        """The rows of one step, or of a part of it, torch's generator seeded for them."""
        rows, shards = self.order.batch(step), self.config.shards
        if shards > 1:
            rows = rows.tensor_split(shards)[part]
            self._seed(f"step {step} part", part)
        else:
            self._seed("step", step)
        return self._take(self.data, rows)

    def _take(self, data: Dataset, indices: Tensor) -> dict[str, Tensor]:
        taken = self.vae.p.to_states(data.take(indices))
        return {name: value.to(self.reference) for name, value in taken.items()}

    def _seed(self, purpose: str, number: int) -> None:
        number = key(self.config.seed, purpose, number)
        # torch.manual_seed, which asks every backend, takes 90 times as long.
        torch.default_generator.manual_seed(number)
        if self.reference.device.type == "cuda":
            torch.cuda.manual_seed(number)

    def _check_data(self) -> tuple[str, ...]:
        """See every row once before training; returns the names that have holes, and keeps the rows' fingerprint."""
        self._seed("check", 0)
        holes: set[str] = set()
        digest = hashlib.blake2b(digest_size=16)
        for data in (self.data, *([] if self.judged is self.data else [self.judged])):
            for indices in torch.arange(len(data)).split(self.chunk):
                taken = data.take(indices)
                holes.update(holes_in(prepare(self.vae, taken)))
                for name in sorted(taken):
                    digest.update(name.encode())
                    digest.update(taken[name].detach().cpu().contiguous().numpy().data)
        self.fingerprint = digest.hexdigest()
        if len(set(self.processes.gather(int(self.fingerprint[:15], 16)))) > 1:
            raise InputError(
                "`data` are not the same in all processes. Read them from one source, or seed what draws them."
            )
        return tuple(sorted(holes))

    def train(self, interrupt: Interrupt, progress: Callable[[dict[str, Any]], None] | None) -> None:
        """Step until the last step, until validation stops improving, or until asked to stop."""
        self.vae.train()
        with self.tiers.ready() as take_step:
            began, dropped_in_row = time.monotonic() - self.seconds, 0
            while self.step < self.config.steps and not self.finished:
                rate, weight = learning_rate(self.config, self.step), kl_weight(self.config, self.step)
                # Reading a number back waits for the device: on a processor it costs nothing, elsewhere a log interval.
                meter = self.inner.meter
                look = self.reference.device.type == "cpu" or self.step % self.config.log_every == 0
                before = int(meter.dropped) if self.reference.device.type == "cpu" else 0
                for part in self.parts:
                    take_step(self.batch(self.step, part), rate, weight)
                asked = interrupt.asked is not None
                together = None if self.inner.total is None else self.inner.take_total(rate, asked)
                meter.steps += 1
                if look:
                    fresh = int(meter.dropped) - before
                    dropped_in_row = self._dropped(dropped_in_row + fresh, weight) if fresh else 0
                self.step += 1
                self.seconds = time.monotonic() - began
                self._at_step(rate, weight, progress)
                # Of several processes each stops with the others, and so at a step that they all know.
                if interrupt.asked is not None if together is None else (look and bool(together)):
                    if self.out is not None:
                        self.checkpoint()
                    raise interrupt.asked or SystemExit(128 + signal.SIGTERM)

    def _at_step(self, rate: float, weight: float, progress: Callable[[dict[str, Any]], None] | None) -> None:
        config, last = self.config, self.step == self.config.steps
        validation = None
        if len(self.held_out) and (self.step % config.validate_every == 0 or last):
            validation = self._validate()
        if self.step % config.log_every == 0 or last or self.finished:
            record: dict[str, Any] = {"step": self.step, "epoch": self.step * self.order.batch_size / self.order.count}
            record |= self.inner.meter.read()
            # A node with one value for the data set, or that some rows observe, is no code of a datum.
            kept = {*self.vae.shared, *self.given}
            record["dead"] = dead_dimensions({n: k for n, k in record["kl_dims"].items() if n not in kept})
            record |= {"learning_rate": rate, "kl_weight": weight, "seconds": self.seconds}
            if self.processes.is_writer:
                self._watch(record, last or self.finished)
            if validation is not None:
                record["validation"] = validation
            self.history.add(record)
            if self.processes.is_writer:
                _log.info("step %d: bound %.4f nats", self.step, record["bound"])
                if progress is not None:
                    progress(record)
            self.tiers.look_again()
            self.state.drop_tiny_()
        elif validation is not None:
            self.history.add({"step": self.step, "validation": validation, "seconds": self.seconds})
        if self.out is not None and self.step % config.checkpoint_every == 0:
            self.checkpoint()

    def _watch(self, record: dict[str, Any], ended: bool) -> None:
        """Name the dead latent dimensions: at once where a whole node has collapsed, the others at the end."""
        # A young encoder uses nothing yet: a collapse is called one after a tenth of the run at full KL weight.
        ripe = self.step >= self.config.steps / 10 + self.config.kl_warmup_steps
        for node, dims in record["dead"].items():
            whole = len(dims) == self.inner.meter.groups[node]
            if whole and (ripe or ended) and node not in self.collapsed:
                self.collapsed.add(node)
                _log.warning("%s", told_collapse(node, self.step, record["kl_weight"]))
            elif dims and ended and not whole:
                _log.info("%s", told_dead(node, dims, self.inner.meter.groups[node]))

    def _dropped(self, in_row: int, weight: float) -> int:
        """Tell what was not finite in the step just dropped, by replaying it; too many in a row end the run."""
        if in_row == 1 or in_row >= _MOST_DROPPED:
            told = f"Step {self.step} is not finite and was left out: {self._cause(weight)}."
            self.tiers.look_again()
            if in_row >= _MOST_DROPPED:
                if self.out is not None:
                    self.checkpoint()
                raise FloatingPointError(
                    f"{_MOST_DROPPED} steps in a row were not finite; the weights are those before them. {told} "
                    "Lower `learning_rate`, set `clip_norm`, or look at those rows."
                )
            if self.processes.is_writer:
                _log.warning("%s", told)
        return in_row

    def _cause(self, weight: float) -> str:
        """What was not finite in the step, in whichever part of it, and whosever."""
        if self.config.shards == 1:
            return self.inner.explain(self.batch(self.step), weight)
        found = [(part, self.inner.explain(self.batch(self.step, part), weight)) for part in self.parts]
        told = [f"in part {part}, {cause}" for part, cause in found if cause != NOTHING]
        return "; ".join(filter(None, self.processes.tell("; ".join(told)))) or NOTHING

    def _validate(self) -> float:
        """Bound of the held-out rows under the averaged weights, with the same draws each time; keeps the best.

        Of a q trained by iwae the ELBO may fall while its own bound rises: it would keep the first weights. In the
        bound of a labelled row q(y | x) plays no part, so that what an objective has beside it is judged, too.
        """
        weighted = self.inner.objective == "iwae"
        beside = getattr(self.inner.objective, "beside", None)
        draws = self.config.samples if weighted else 1
        rows, size = len(self.held_out), self.processes.size
        chunks = self.held_out.split(max(1, min(self.chunk // draws, math.ceil(rows / self.config.shards))))
        totals = torch.zeros(len(chunks), dtype=torch.float64, device=self.processes.device)
        with self._showing(self.averaged()), evaluating(self.vae):
            for number, indices in enumerate(chunks):
                if number % size != self.processes.rank:
                    continue
                self._seed("validation", number)
                values = self._take(self.judged, indices)
                discrete: Discrete = "sum" if self.config.discrete == "sum" else "sample"
                found = terms(
                    self.vae, values, draws, kl="sampled" if weighted else "auto", holes=holes_in(values),
                    discrete=discrete, data_size=self.order.count,
                )  # fmt: skip
                shape = (draws, len(indices))
                if weighted:
                    per_row = found.log_weights().expand(shape).logsumexp(0) - math.log(draws)
                else:
                    per_row = found.weighted().expand(shape)
                totals[number] = float((per_row if beside is None else per_row + beside(self.vae, values)).sum())
            # Each chunk comes from one process and is added to zeros, so that the sum has the same bits for any number.
            bound = float(sum(self.processes.sum_(totals).tolist()) / rows)
            if bound > self.best_bound:
                self.best_bound, self.stale = bound, 0
                self.best = _copy(self.vae)
            elif kl_weight(self.config, self.step) >= self.config.beta:
                self.stale += 1
                self.finished = 0 < self.config.patience <= self.stale
        return bound

    def averaged(self) -> dict[str, Tensor] | None:
        """The model's state with averaged weights; None where averaging is off."""
        if not self.state.average:
            return None
        averages = {id(p): a for p, a in zip(self.state.params, self.state.average, strict=True)}
        own = {
            name: averages[id(p)] for name, p in self.vae.named_parameters(remove_duplicate=False) if id(p) in averages
        }
        statistics = {id(b): a for b, a in zip(self.state.running, self.state.running_average, strict=True)}
        state = _copy(self.vae)
        own |= {
            name: statistics[id(b)]
            for name, b in self.vae.named_buffers(remove_duplicate=False)
            if id(b) in statistics and name in state
        }
        return state | own

    @contextlib.contextmanager
    def _showing(self, weights: dict[str, Tensor] | None) -> Iterator[None]:
        """The model with other weights for a while."""
        self.tiers.look_again()
        if weights is None:
            yield
            return
        own = _copy(self.vae)
        self.vae.load_state_dict(weights)
        try:
            yield
        finally:
            self.vae.load_state_dict(own)

    def kept(self) -> dict[str, Tensor] | None:
        """The best weights seen in validation, else the averaged ones."""
        return self.best if self.best is not None else self.averaged()

    def run(self) -> Run:
        """The run as it stands, the model as it is."""
        tensors = {f"optimizer/{name}": value for name, value in self.state.tensors().items()}
        tensors |= {f"param/{i}": p.detach() for i, p in enumerate(self.state.params)}
        tensors |= {f"buffer/{name}": value for name, value in self.vae.named_buffers()}
        tensors |= {f"best/{name}": value for name, value in (self.best or {}).items()}
        tensors |= {"meter/sums": self.inner.meter.sums, "meter/dropped": self.inner.meter.dropped}
        numbers = {
            "step": self.step, "best_bound": self.best_bound, "stale": self.stale, "seconds": self.seconds,
            "finished": self.finished, "since_log": self.inner.meter.steps, "rows": len(self.data),
            "held_out": len(self.held_out), "objective": self.told, "collapsed": sorted(self.collapsed),
            "threads": torch.get_num_threads(),
            "device": self.reference.device.type, "tier": self.tiers.tier, "fingerprint": self.fingerprint,
        }  # fmt: skip
        return Run(
            vae=self.vae, config=self.config, history=self.history.records, path=self.out, data=self.describe,
            made=made_here(),
            resume={"tensors": {name: value.clone() for name, value in tensors.items()}, "numbers": numbers},
        )  # fmt: skip

    def checkpoint(self) -> None:
        """Save the kept weights, and all that training needs to go on."""
        if self.processes.is_writer:
            run = self.run()
            with self._showing(self.kept()):
                save(run, keep=self.config.keep_checkpoints)
        self.processes.barrier()

    def restore(self) -> None:
        """Take up the newest checkpoint in `out`."""
        assert self.out is not None
        own = _copy(self.vae)
        found = load(self.out, self.vae)
        self.vae.load_state_dict(own)
        self._check_resumable(found)
        tensors, numbers = found.resume["tensors"], found.resume["numbers"]
        self.state.load({name[10:]: value for name, value in tensors.items() if name.startswith("optimizer/")})
        with torch.no_grad():
            for i, p in enumerate(self.state.params):
                p.copy_(tensors[f"param/{i}"])
        for name, buffer in self.vae.named_buffers():
            buffer.copy_(tensors[f"buffer/{name}"])
        self.best = {name[5:]: value for name, value in tensors.items() if name.startswith("best/")} or None
        self.step, self.best_bound, self.stale = numbers["step"], numbers["best_bound"], numbers["stale"]
        self.seconds, self.finished = numbers["seconds"], numbers["finished"]
        self.collapsed = set(numbers.get("collapsed", ()))
        self.inner.meter.sums.copy_(tensors["meter/sums"])
        self.inner.meter.dropped.copy_(tensors["meter/dropped"])
        self.inner.meter.steps = numbers["since_log"]
        self.history.take_up(found.history)
        self.describe = self.describe or found.data

    def _check_resumable(self, found: Run) -> None:
        if not found.resume:
            raise InputError(f"`{self.out}` holds weights but no state of training. Train anew, into another folder.")
        if any(f"optimizer/{name}" not in found.resume["tensors"] for name in self.state.tensors()):
            raise InputError(
                f"`{self.out}` was trained by another version of aevb, whose optimizer keeps another state. Go on with "
                "that version, or train anew; its weights can be loaded."
            )
        ours, theirs = self.config.to_json(), found.config.to_json()
        free = {"patience", "log_every", "checkpoint_every", "keep_checkpoints"}
        # else the rate, or the weight of the KL, depends on how many steps are to come
        if self.config.schedule == "constant" and self.config.kl_cycles == 1:
            free.add("steps")
        changed = sorted(name for name in ours if name not in free and ours[name] != theirs[name])
        if changed:
            told = ", ".join(f"{name} was {theirs[name]}, is {ours[name]}" for name in changed)
            raise InputError(
                f"`{self.out}` was trained otherwise ({told}); it cannot go on so. Give the same settings."
            )
        numbers = found.resume["numbers"]
        here = {
            "objective": self.told,
            "rows": len(self.data),
            "held_out": len(self.held_out),
            "threads": torch.get_num_threads(),
            "device": self.reference.device.type,
        }
        if found.made and (odd := [name for name, value in made_here().items() if found.made.get(name) != value]):
            told = ", ".join(f"{name} was {found.made.get(name)}, is {made_here()[name]}" for name in odd)
            _log.warning("The run goes on elsewhere than it began (%s); its last digits may differ.", told)
        for name, value in here.items():
            if numbers.get(name, value) != value:
                raise InputError(
                    f"`{self.out}` was trained with {name} {numbers[name]}, now {value}; the run would not be the "
                    f"same. Resume it with the same {name} (threads: torch.set_num_threads, or OMP_NUM_THREADS)."
                )
        if numbers.get("fingerprint", self.fingerprint) != self.fingerprint:
            raise InputError(
                f"The data are not those that `{self.out}` was trained on: their content is another. Restore them, or "
                "train anew."
            )
        self.tiers.go_on_in(numbers.get("tier", self.tiers.tier))

    def finish(self) -> Run:
        """Leave the model with the kept weights, and save."""
        weights = self.kept()
        run = self.run()
        if weights is not None:
            load_weights(self.vae, weights, "its own best weights")
        self.vae.eval()
        if self.out is not None and self.processes.is_writer:
            save(run, keep=self.config.keep_checkpoints)
        self.processes.barrier()  # nobody reads the run before it is there
        return run


def _copy(vae: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in vae.state_dict().items()}
