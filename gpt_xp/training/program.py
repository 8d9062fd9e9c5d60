"""One step of training and one of evaluation, which JAX compiles; the optimizer is optax's.

The loss is `gpt_xp.lm_loss` in `transformer.py`, unchanged. Regularization works on the params from outside. Weight
decay shrinks the matrices (Loshchilov & Hutter 2019). Weight dropout zeroes random weights in each step (Wan et al.
2013, "Regularization of Neural Networks using DropConnect"). An average of the params over the steps may be evaluated
in place of the params (Polyak & Juditsky 1992).
"""

import importlib.util
from types import ModuleType
from typing import Any

import numpy as np

from gpt_xp.backend import Backend, import_library
from gpt_xp.config import GPT2Config
from gpt_xp.errors import BackendError, SettingError
from gpt_xp.installation import install_command
from gpt_xp.registry import get_backend
from gpt_xp.training.settings import TrainingSettings
from gpt_xp.transformer import lm_loss
from gpt_xp.tree import tree_map
from gpt_xp.types import Array, Namespace, NumpyArray, Params

FIX = install_command("train")
TrainState = dict[str, Any]  # a JAX pytree: the trained "params", their "average" or None, the "optimizer" state


def jax_backend(settings: TrainingSettings, hosts: str | None = None) -> Backend:
    """Return the JAX backend, on a mesh if the settings have one; `hosts` is that of `train`.

    Raises `BackendError` where JAX or optax is not installed, or lacks the dtype or the devices; `SettingError` where
    the mesh does not divide the batch.
    """
    for library in ("jax", "optax"):
        if importlib.util.find_spec(library) is None:
            raise BackendError(f"{library} is not installed", FIX)
    options: dict[str, Any] = {"device": settings.device, "dtype": settings.dtype, "threads": settings.threads}
    backend = get_backend("jax", mesh=settings.mesh, hosts=hosts, **options)
    import_library("optax", FIX)  # Imported last: it imports JAX, which reads the number of threads then.
    if (full := backend.full_batch(settings.batch_size)) != settings.batch_size:
        raise SettingError(
            f"batch_size {settings.batch_size} cannot be split equally over the {backend.device}: take {full}"
        )
    return backend


class Program:
    """The compiled functions of a run.

    It begins with `params`, a tree of NumPy arrays, of which the lower `settings.freeze` blocks never change. Losses
    are in nats per token. Trained params are float32; half precision multiplies copies of them.
    """

    def __init__(self, settings: TrainingSettings, config: GPT2Config, params: Params, backend: Backend) -> None:
        self._settings, self._config, self._backend = settings, config, backend
        self._xp = _training_namespace(backend.xp)
        self._schedule = make_schedule(settings)
        self._optimizer = make_optimizer(settings, self._schedule)
        self._learning_rate = backend.compile(self._schedule)
        self._params = params
        self._frozen = tree_map(lambda leaf: backend.shard(leaf, backend.dtype), split(params, settings.freeze)[1])
        self._start = backend.compile(self._first_state)
        self._train = backend.compile(self._train_step, donate=("state",))
        self._evaluate = backend.compile(self._loss)

    def initial_state(self) -> TrainState:
        """Return the state before the first step, on the device."""
        trained, _ = split(self._params, self._settings.freeze)
        return self._start(tree_map(lambda leaf: self._backend.shard(leaf, "float32"), trained))  # type: ignore[no-any-return]

    def train(self, state: TrainState, tokens: NumpyArray, step: int) -> tuple[TrainState, Array]:
        """Take step number `step`; return the new state and the loss.

        `tokens` are int32 [accumulate, batch_size, n + 1]. The state that is passed in is consumed.
        """
        return self._train(state, self._frozen, self._backend.asarray(tokens), np.int32(step))  # type: ignore[no-any-return]

    def evaluate(self, state: TrainState, tokens: NumpyArray) -> float:
        """Return the loss of the params (their average, if there is one) on `tokens`, int32 [rows, n + 1]."""
        return float(self._backend.to_numpy(self._evaluate(_best(state), self._frozen, self._backend.asarray(tokens))))

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step number `step`."""
        return float(self._learning_rate(np.int32(step)))

    def to_device(self, state: Any) -> TrainState:
        """Return a state of NumPy arrays on the device."""
        import jax

        return jax.tree.map(self._backend.shard, state)  # type: ignore[no-any-return]

    def weights(self, state: TrainState) -> Params:
        """Return the params that `evaluate` uses as NumPy arrays, with the frozen ones."""
        return join(tree_map(self._backend.to_numpy, _best(state)), split(self._params, self._settings.freeze)[1])

    def _first_state(self, trained: Params) -> TrainState:
        # This is compiled, so that the arrays are placed like those of a step. Otherwise the second step would be
        # compiled again.
        average = tree_map(lambda leaf: leaf + 0, trained) if self._settings.average else None
        return self._placed({"params": trained, "average": average, "optimizer": self._optimizer.init(trained)})

    def _placed(self, state: TrainState) -> TrainState:
        """Keep each array of the state on the devices that `Backend.shard` chooses, so that one program is compiled."""
        import jax

        return jax.tree.map(self._backend.constrain, state)  # type: ignore[no-any-return]

    def _loss(self, trained: Params, frozen: Params, tokens: Array) -> Array:
        params = join(tree_map(lambda leaf: leaf.astype(self._backend.dtype), trained), frozen)
        return lm_loss(params, tokens, self._config, xp=self._xp)

    def _train_step(self, state: TrainState, frozen: Params, tokens: Array, step: Array) -> tuple[TrainState, Array]:
        import jax
        import jax.numpy as jnp
        import optax

        settings = self._settings

        def loss_of(params: Params, rows: Array, key: Array) -> Array:
            return self._loss(drop_weights(params, settings.weight_dropout, key), frozen, rows)

        def add(total: Any, part: tuple[Array, Array]) -> tuple[Any, None]:
            found = jax.value_and_grad(loss_of)(state["params"], *part)
            return jax.tree.map(lambda a, b: a + b / settings.accumulate, total, found), None

        keys = jax.random.split(
            jax.random.fold_in(jax.random.key(settings.seed, impl="rbg"), step), settings.accumulate
        )
        zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state["params"]))
        (loss, grads), _ = jax.lax.scan(add, zeros, (tokens, keys))
        updates, inner = self._optimizer.update(grads, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        average = None if state["average"] is None else _averaged(state["average"], params, settings.average, step)
        return self._placed({"params": params, "average": average, "optimizer": inner}), loss


def make_schedule(settings: TrainingSettings) -> Any:
    """Return the learning rate as a function of the step: a linear rise, then a cosine down."""
    import optax

    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if settings.warmup else settings.learning_rate,
        peak_value=settings.learning_rate,
        warmup_steps=settings.warmup,
        decay_steps=max(settings.steps, settings.warmup + 1),
        end_value=settings.learning_rate * settings.min_learning_rate,
    )


def make_optimizer(settings: TrainingSettings, schedule: Any) -> Any:
    """Return AdamW on clipped gradients, as an `optax.GradientTransformation`.

    Gains and biases are not decayed; matrices are, the embeddings included, as in nanoGPT.
    """
    import jax
    import optax

    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(
            schedule,
            b1=settings.beta1,
            b2=settings.beta2,
            weight_decay=settings.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )


def split(params: Params, n_frozen: int) -> tuple[Params, Params]:
    """Return the trained and the frozen params. With frozen blocks, the embeddings are frozen too."""
    if not n_frozen:
        return params, {}
    return (
        {"blocks": params["blocks"][n_frozen:], "ln_f": params["ln_f"]},
        {"wte": params["wte"], "wpe": params["wpe"], "blocks": params["blocks"][:n_frozen]},
    )


def join(trained: Params, frozen: Params) -> Params:
    """Return the params that `split` has split."""
    return frozen | trained | {"blocks": [*frozen.get("blocks", []), *trained["blocks"]]}


def drop_weights(params: Params, rate: float, key: Array) -> Params:
    """Zero each weight of the matrices in the blocks with probability `rate`, and divide the others by 1 - `rate`."""
    import jax

    if not rate:
        return params

    def drop(weight: Array, key: Array) -> Array:
        if weight.ndim < 2:
            return weight
        return weight * jax.random.bernoulli(key, 1 - rate, weight.shape) / (1 - rate)

    leaves, structure = jax.tree.flatten(params["blocks"])
    blocks = jax.tree.unflatten(structure, map(drop, leaves, jax.random.split(key, len(leaves))))
    return params | {"blocks": blocks}


def _averaged(average: Params, params: Params, decay: float, step: Array) -> Params:
    import jax
    import jax.numpy as jnp

    # At first the average is over few steps. Otherwise the random initial params would stay in it for long.
    keep = jnp.minimum(decay, (step + 1) / (step + 10))
    return jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, average, params)  # type: ignore[no-any-return]


def _best(state: TrainState) -> Params:
    return state["params"] if state["average"] is None else state["average"]  # type: ignore[no-any-return]


def _training_namespace(xp: Namespace) -> Namespace:
    """Return `xp` with a `max` that has no gradient.

    `transformer.py` subtracts a maximum before the exponential, so that nothing overflows, and the result does not
    depend on it. XLA does not know that, and the gradient of `max` would take longer than the rest of a softmax.
    """
    import jax

    namespace = ModuleType("jax.numpy for training")
    vars(namespace).update(vars(xp) | {"max": lambda x, **settings: jax.lax.stop_gradient(xp.max(x, **settings))})
    return namespace
