"""Who trains the same VAE: a function each, that trains without end and calls `turn(steps)` after every few steps.

All minimise minus the mean ELBO of a minibatch, one draw a datum, by Adam at a rate of 1e-3, on rows in memory that are
shuffled each epoch. Imports are inside, since JAX's contestants live in an environment without torch.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

__all__ = ["CONTESTANTS", "NETS", "Setting"]

NETS = {
    "784-200-200-z50": {"hidden": (200, 200), "latents": 50, "activation": "tanh"},
    "784-400-z20": {"hidden": (400,), "latents": 20, "activation": "relu"},
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One contestant's task; JSON-able."""

    contestant: str
    batch: int = 100
    rows: int = 20_000
    features: int = 784
    hidden: tuple[int, ...] = (200, 200)
    latents: int = 50
    activation: str = "tanh"
    samples: int = 1  # ours alone
    precision: str = "float32"  # or bfloat16: of the matrix products; weights, densities and updates stay in float32
    dtype: str = "float32"  # of the data in memory
    threads: int = 2

    def data(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        return (rng.integers(0, 5, (self.rows, self.features), dtype=np.uint8) == 0).astype(self.dtype)

    def widths(self) -> tuple[list[int], list[int]]:
        """Of encoder and decoder, inputs and outputs included."""
        encoder = [self.features, *self.hidden, 2 * self.latents]
        return encoder, [self.latents, *reversed(self.hidden), self.features]

    @property
    def epoch(self) -> int:
        return self.rows // self.batch


Turn = Callable[[int], None]


def ours(setting: Setting, turn: Turn, compile: bool) -> None:
    """`aevb.fit` with its checks, averaged weights and history: one call, held open; no rows held out."""
    import torch

    import aevb
    from aevb import MLP, VAE, BayesNet, Bernoulli, DiagonalNormal, StandardNormal

    torch.manual_seed(0)
    hidden, latents, act = list(setting.hidden), setting.latents, setting.activation
    decoder = MLP(latents, hidden[::-1], setting.features, activation=act)
    encoder = MLP(setting.features, hidden, 2 * latents, activation=act)
    vae = VAE(
        BayesNet({"z": StandardNormal(latents), "x | z": Bernoulli(decoder)}),
        BayesNet({"z | x": DiagonalNormal(encoder)}),
    )
    every = min(100, setting.epoch)
    config = aevb.TrainConfig(
        steps=10**9, batch_size=setting.batch, samples=setting.samples, compile=compile, log_every=every,
        validation=0.0, patience=0, precision=setting.precision,
    )  # fmt: skip
    aevb.fit(vae, {"x": setting.data()}, config, progress=lambda record: turn(every))


def products(setting: Setting, turn: Turn) -> None:
    """The matrix products of a step and nothing else, into memory that is kept.

    A layer's output, the gradient of its weight, and, but for the encoder's first, the gradient of its input.
    """
    import torch

    calls = []
    for widths, first in zip(setting.widths(), (True, False), strict=True):
        values = [torch.rand(setting.batch, width) - 0.5 for width in widths]
        for (x, y), skip in zip(itertools.pairwise(values), [first] + [False] * len(values), strict=False):
            weight = torch.randn(y.shape[1], x.shape[1]) / x.shape[1]
            calls += [(x, weight.T, torch.empty_like(y)), (y.T, x, torch.empty_like(weight))]
            if not skip:
                calls.append((y, weight, torch.empty_like(x)))
    with torch.no_grad():
        while True:
            for _ in range(setting.epoch):
                for left, right, out in calls:
                    torch.mm(left, right, out=out)
            turn(setting.epoch)


def hand_written(setting: Setting, turn: Turn) -> None:
    """As a good engineer writes it by hand: one fused Adam, slices of a permutation, no checks and no logging."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits, softplus

    encoder, decoder = _torch_nets(setting)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3, fused=True)
    for rows in _batches(setting, turn):
        with _autocast(setting):
            loc, raw = encoder(rows).float().chunk(2, -1)
            scale = softplus(raw)
            logits = decoder(loc + scale * torch.randn_like(loc)).float()
        nll = binary_cross_entropy_with_logits(logits, rows, reduction="none").sum(-1)
        kl = 0.5 * (scale.square() + loc.square() - 1 - 2 * scale.log()).sum(-1)
        optimizer.zero_grad()
        (nll + kl).mean().backward()
        optimizer.step()


def with_pythae(setting: Setting, turn: Turn) -> None:
    """`BaseTrainer.train` as released, its own data set and collation with it."""
    import torch
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    encoder, decoder = _torch_nets(setting)

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = encoder

        def forward(self, x) -> ModelOutput:
            loc, log_covariance = self.net(x).float().chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=log_covariance)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = decoder

        def forward(self, z) -> ModelOutput:
            return ModelOutput(reconstruction=self.net(z).float().sigmoid())

    class Count(TrainingCallback):
        def on_train_step_end(self, training_config, **others) -> None:
            turn(1)

    config = VAEConfig(input_dim=(setting.features,), latent_dim=setting.latents, reconstruction_loss="bce")
    x = torch.from_numpy(setting.data())
    with tempfile.TemporaryDirectory() as folder:
        settings = BaseTrainerConfig(
            output_dir=folder, per_device_train_batch_size=setting.batch, num_epochs=10**9, learning_rate=1e-3,
            no_cuda=True,
        )  # fmt: skip
        model = VAE(config, encoder=Encoder(), decoder=Decoder())
        dataset = BaseDataset(x, torch.zeros(len(x)))
        with _autocast(setting):
            BaseTrainer(model, dataset, training_config=settings, callbacks=[Count()]).train()


def with_pyro(setting: Setting, turn: Turn, svi: bool) -> None:
    """Pyro, validation off: `SVI.step`, or the differentiable loss of `Trace_ELBO` with one fused Adam of torch."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVI, Trace_ELBO

    pyro.enable_validation(False)
    encoder, decoder = _torch_nets(setting)
    zeros, ones = torch.zeros(setting.latents), torch.ones(setting.latents)

    def model(x) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zeros, ones).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z).float()).to_event(1), obs=x)

    def guide(x) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, raw = encoder(x).float().chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, torch.nn.functional.softplus(raw)).to_event(1))

    if svi:
        inference = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        for rows in _batches(setting, turn):
            with _autocast(setting):
                inference.step(rows)
        return
    elbo = Trace_ELBO()
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3, fused=True)
    for rows in _batches(setting, turn):
        with _autocast(setting):
            loss = elbo.differentiable_loss(model, guide, rows) / len(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def with_numpyro(setting: Setting, turn: Turn) -> None:
    """`SVI.update` under `fori_loop` over an epoch: one compiled program, the shuffling in it."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import SVI, Trace_ELBO

    (encode, encoder_shape), (decode, decoder_shape) = _jax_nets(setting)

    def model(x) -> None:
        net = numpyro.module("decoder", decode, decoder_shape)
        with numpyro.plate("data", setting.batch):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(setting.latents), 1.0).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(1), obs=x)

    def guide(x) -> None:
        net = numpyro.module("encoder", encode, encoder_shape)
        with numpyro.plate("data", setting.batch):
            loc, raw = jnp.split(net(x), 2, -1)
            numpyro.sample("z", dist.Normal(loc, jax.nn.softplus(raw)).to_event(1))

    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    x = jnp.asarray(setting.data())
    state = svi.init(jax.random.key(0), x[: setting.batch])

    def epoch(state, key):
        order = jax.random.permutation(key, setting.rows)

        def step(i, carry):
            total, state = carry
            rows = jax.lax.dynamic_slice_in_dim(order, i * setting.batch, setting.batch)
            state, loss = svi.update(state, x[rows])
            return total + loss, state

        return jax.lax.fori_loop(0, setting.epoch, step, (0.0, state))

    run = jax.jit(epoch, donate_argnums=0)
    for number in itertools.count():
        total, state = run(state, jax.random.key(number))
        total.block_until_ready()
        turn(setting.epoch)


def with_jax(setting: Setting, turn: Turn) -> None:
    """JAX without a library: `scan` over an epoch."""
    import jax
    import jax.numpy as jnp
    from jax.example_libraries import optimizers

    ((init_q, encode), encoder_shape), ((init_p, decode), decoder_shape) = _jax_nets(setting)
    start, update, params_of = optimizers.adam(1e-3)
    x = jnp.asarray(setting.data())

    def loss(params, rows, key):
        loc, raw = jnp.split(encode(params[0], rows), 2, -1)
        scale = jax.nn.softplus(raw)
        logits = decode(params[1], loc + scale * jax.random.normal(key, loc.shape))
        nll = (jax.nn.softplus(logits) - rows * logits).sum(-1)
        kl = 0.5 * (scale**2 + loc**2 - 1 - 2 * jnp.log(scale)).sum(-1)
        return (nll + kl).mean()

    def epoch(state, key):
        order = jax.random.permutation(key, setting.rows)[: setting.epoch * setting.batch]

        def step(state, inputs):
            i, rows, key = inputs
            value, grads = jax.value_and_grad(loss)(params_of(state), x[rows], key)
            return update(i, grads, state), value

        keys = jax.random.split(key, setting.epoch)
        return jax.lax.scan(step, state, (jnp.arange(setting.epoch), order.reshape(-1, setting.batch), keys))

    keys = jax.random.split(jax.random.key(0))
    state = start((init_q(keys[0], encoder_shape)[1], init_p(keys[1], decoder_shape)[1]))
    run = jax.jit(epoch, donate_argnums=0)
    for number in itertools.count():
        state, losses = run(state, jax.random.key(number))
        losses.block_until_ready()
        turn(setting.epoch)


CONTESTANTS: dict[str, Callable[[Setting, Turn], None]] = {
    "aevb compiled": lambda setting, turn: ours(setting, turn, compile=True),
    "aevb eager": lambda setting, turn: ours(setting, turn, compile=False),
    "hand-written PyTorch": hand_written,
    "Pythae": with_pythae,
    "Pyro, SVI.step": lambda setting, turn: with_pyro(setting, turn, svi=True),
    "Pyro, torch's Adam": lambda setting, turn: with_pyro(setting, turn, svi=False),
    "NumPyro, fori_loop": with_numpyro,
    "JAX, scan": with_jax,
    "matrix products": products,
}


def _autocast(setting: Setting) -> contextlib.AbstractContextManager:
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bfloat16")


def _torch_nets(setting: Setting):
    """Encoder and decoder as plain sequences of layers."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    nonlinearity = {"tanh": nn.Tanh, "relu": nn.ReLU}[setting.activation]
    for widths in setting.widths():
        layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nonlinearity())]
        yield nn.Sequential(*layers[:-1])


def _batches(setting: Setting, turn: Turn) -> Iterator:
    """Batches of shuffled epochs, for ever."""
    import torch

    x = torch.from_numpy(setting.data())
    while True:
        for rows in torch.randperm(setting.rows)[: setting.epoch * setting.batch].split(setting.batch):
            yield x[rows]
        turn(setting.epoch)


def _jax_nets(setting: Setting):
    """Encoder and decoder, each a pair (init, apply) of stax with the shape of its input."""
    import jax
    import jax.numpy as jnp

    nonlinearity = {"tanh": jnp.tanh, "relu": jax.nn.relu}[setting.activation]
    precision = jnp.dtype(setting.precision)

    def net(widths):
        def init(key, shape):
            pairs = list(itertools.pairwise(widths))
            keys = jax.random.split(key, len(pairs))
            weights = [jax.random.normal(k, pair) / pair[0] ** 0.5 for k, pair in zip(keys, pairs, strict=True)]
            return (*shape[:-1], widths[-1]), [(w, jnp.zeros(w.shape[1])) for w in weights]

        def apply(params, h, **_):
            for i, (weight, bias) in enumerate(params):
                h = h.astype(precision) @ weight.astype(precision) + bias.astype(precision)
                h = nonlinearity(h) if i < len(params) - 1 else h
            return h.astype(jnp.float32)

        return (init, apply), (setting.batch, widths[0])

    return [net(widths) for widths in setting.widths()]
