"""``Sequential``: layers one after another, as one module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .._typing import Array, Lengths, State
from ..arrays import refuse_function
from ..errors import ShapeError, answers_unknown, check_flag
from ..module import Layers, Module, backward_of, check_unspent, no_layer
from ..recurrent import GRUCell, LSTMCell, RNNCell
from .common import feature_sizes
from .timesteps import Timesteps, axis_orders, repeats, without_time


def _follow_features(layers, size=None, before=None, place=""):
    """The number of features behind the layers, by name; None where it is not known.

    Raises ShapeError for a layer that reads another number of features than come in. size: how many these are, or
    None. before: the layer that they come from, for the message. place: of the Sequential around it, with a dot.
    """
    for name, layer in layers.items():
        shown = f"{place}{name}: {type(layer).__name__}"
        if isinstance(layer, Sequential) and type(layer).forward is Sequential.forward:
            size = _follow_features(layer.children, size, before, f"{place}{name}.")
        else:
            reads, size = feature_sizes(layer, size)
            if reads is not None and before is not None and reads != before[1]:
                raise ShapeError(
                    f"{shown} reads {reads} features, but {before[0]} before it gives {before[1]}. Give both one size"
                )
        before = None if size is None else (shown, size)
    return size


class Sequential(Module):
    """Layers one after another, with one flat buffer for all parameters; passes state, lengths, resets and masks on.

    A layer is stateful if it takes and returns a recurrent state (LSTM, GRU, RNN, and a Sequential with one of them).

    - Without a stateful layer: ``y = model(x)``, ``y, backward = model.forward(x)``, ``dx = backward(doutput)``.
    - With one: ``y, state = model(x)``, ``y, state, backward = model.forward(x)`` and
      ``dx, dstate = backward(doutput)``. The state is a tuple with one entry for each stateful layer, in order; as an
      argument it may be None for zeros.

    ``lengths``, ``reset`` and ``mask`` go to every layer that takes them. Where no timestep is, x and doutput may hold
    anything, NaN too, whichever layers come first and last. (doutput counts there if the last layer that knows masks
    has ``masked_output="repeat"``.)

    Parameters
    ----------
    *layers : Module, or one dict of them
        ``Sequential(layer, layer, ...)`` names the layers "0", "1", ...; ``Sequential({"rnn": layer, ...})`` takes your
        names. A layer that is placed twice shares its parameters. A layer belongs to one model only. Backend, dtype and
        batch_first are the layers' own.

    Raises
    ------
    ValueError
        There is no layer; backends or dtypes differ; a layer belongs to another model; or layers that know the time
        axis (recurrent, BatchNorm, Pooling, variational Dropout) differ in batch_first.
    ShapeError
        A layer reads another number of features than the layer before it gives.
    TypeError
        A layer is not a ``Module``, or is a single step such as ``LSTMCell``.

    Examples
    --------
    >>> model = gpurnn.Sequential(gpurnn.Embedding(65, 32), gpurnn.LSTM(32, 128), gpurnn.Linear(128, 65))
    >>> y, state = model(np.zeros((7, 2), int))
    >>> y.shape, len(state)
    ((7, 2, 65), 1)
    """

    stateful: bool
    once: bool
    takes_lengths = True
    _chain = True

    def __init__(self, *layers: Module | dict[str, Module]) -> None:
        if len(layers) == 1 and isinstance(layers[0], dict):
            named = layers[0]
        else:
            if len(layers) == 1 and isinstance(layers[0], (list, tuple)):
                raise TypeError(
                    f"Sequential: got a {type(layers[0]).__name__}. Give the layers one by one: Sequential(a, b)"
                )
            named = {str(number): layer for number, layer in enumerate(layers)}
        if not named:
            raise ValueError("Sequential needs at least one layer")
        name, first = next(iter(named.items()))
        if not isinstance(first, Module):
            raise TypeError(f"{name}: expected a gpurnn layer, got {no_layer(first)}")
        super().__init__()
        self.add_layers(named)

    def _check_layers(self, children):
        if not children:
            raise ValueError("a Sequential needs at least one layer, and this is its last one")
        for name, layer in children.items():
            if isinstance(layer, (RNNCell, LSTMCell, GRUCell)):
                raise TypeError(f"{name}: {type(layer).__name__} has no sequence form; the whole layer has step() too")
            if isinstance(layer, Layers):
                raise TypeError(f"{name}: a list of layers does not say how it runs. Give a gpurnn.Sequential")
        if len({order for layer in children.values() for order in axis_orders(layer)}) > 1:
            raise ValueError(
                "batch_first: some of these layers take (T, B, F) and some (B, T, F); give it to all or none"
            )
        if type(self).forward is Sequential.forward:  # one that overrides it need not run them in order
            _follow_features(children)

    def _layers_changed(self):
        self.stateful = any(layer.stateful for layer in self.children.values())
        self.once = any(layer.once for layer in self.children.values())

    @answers_unknown
    def __call__(
        self,
        x: Array,
        state: State = None,
        lengths: Lengths = None,
        *,
        reset: Array | None = None,
        mask: Array | None = None,
    ) -> Array | tuple[Array, State]:
        """The output, for inference; with a stateful layer ``(y, state)``.

        Parameters
        ----------
        x : Array
            What the first layer takes.
        state : tuple, optional
            One entry for each stateful layer; None means zeros.
        lengths : Lengths
            (B,) integers: the valid steps of each sequence.
        reset : Array of bool, optional
            (T, B), or (B, T) with ``batch_first``, or (T,) for one sequence: before these timesteps the states of all
            recurrent layers become their initial states. A Pooling then makes one vector of each part.
        mask : Array of bool, optional
            Likewise: False where no timestep is, as in recurrent layers, Pooling and BatchNorm.

        Raises
        ------
        ShapeError, DtypeError
            Those of the layers; ShapeError for a state with another number of entries.
        TypeError
            A layer of your own has a state and does not take ``reset`` or ``mask``, or no layer takes ``reset``.
        """
        given = Timesteps(lengths, reset, mask)
        given.check_taken(self.children)
        states, final, x = self._unpack(state), [], self._without_absent(x, given)
        for layer in self.children.values():
            x = layer(x, **self._context(layer, states, given))
            if layer.stateful:
                x, last = x
                final.append(last)
            given = Timesteps() if without_time(layer) else given
        return (x, tuple(final)) if self.stateful else x

    @answers_unknown
    def forward(
        self,
        x: Array,
        state: State = None,
        lengths: Lengths = None,
        *,
        reset: Array | None = None,
        mask: Array | None = None,
        retain: bool = False,
    ) -> tuple[Any, ...]:
        """The output and its backward, for training.

        Parameters
        ----------
        x, state, lengths, reset, mask
            As for a call.
        retain : bool
            Whether ``backward`` may be called more than once where a layer is recurrent; it always may where none is.

        Returns
        -------
        y : Array
            What the last layer returns.
        state : tuple
            One entry for each stateful layer; left out where there is none.
        backward : callable
            ``backward(doutput, dstate=None)`` adds to ``grads`` and returns ``(dx, dstate)``, the second one being the
            gradient with respect to the initial state; or ``backward(doutput)`` returns dx where no layer is stateful.

        Raises
        ------
        ShapeError, DtypeError, TypeError
            As for a call.
        """
        check_flag("retain", retain)
        everything = given = Timesteps(lengths, reset, mask)
        given.check_taken(self.children)
        states, final, backwards, first = self._unpack(state), [], [], x
        x = self._without_absent(x, given)
        for layer in self.children.values():
            context = self._context(layer, states, given)
            if retain and layer.once:
                context["retain"] = True
            x, *last, layer_backward = layer.forward(x, **context)
            final += last
            backwards.append((layer.stateful, layer_backward))
            given = Timesteps() if without_time(layer) else given
        absent = self._absent_in_output(first, x, everything)
        backward = self._as_now()._make_backward(backwards, self.versions(), x.shape, absent, retain)
        return (x, tuple(final), backward) if self.stateful else (x, backward)

    def _make_backward(self, backwards, versions, shape, absent, retain):
        """The backward of one forward, whose attributes ``self`` has (see ``_as_now``).

        backwards: (stateful, backward) of each layer. shape: of y. absent: see ``_absent_in_output``.
        """
        spent = []

        def check(dstate, name="dstate"):
            """``dstate`` as a list for the stateful layers; raises before any layer adds to its gradients."""
            dstates = self._unpack(dstate, name)
            running = [layer_backward for stateful, layer_backward in backwards if stateful]
            for number, (layer_backward, part) in enumerate(zip(running, dstates, strict=True)):
                if hasattr(layer_backward, "check"):  # a user's own layer may have none
                    layer_backward.check(part, f"{name}[{number}]")
            return dstates

        @backward_of(self)
        def backward(doutput, dstate=None):
            dstates = check(dstate)
            self.check_versions(versions)  # before a layer adds to its gradients
            check_unspent(spent)
            d = doutput
            if absent is not None:
                d = self.ops.asarray(d, "doutput")
                d = absent.zeroed(self, d) if d.shape == shape else d  # the last layer refuses another shape
            dinitial = []
            for stateful, layer_backward in reversed(backwards):
                if stateful:
                    d, first = layer_backward(d, dstates.pop())
                    dinitial.append(first)
                else:
                    d = layer_backward(d)
                if self.once and not retain and not spent:  # the last layer accepted doutput
                    spent.append(True)
            return (d, tuple(reversed(dinitial))) if self.stateful else d

        backward.check = check
        return backward

    def step(
        self, x: Array, state: State = None, *, reset: Array | None = None, mask: Array | None = None
    ) -> tuple[Array, State]:
        """One timestep, for streaming.

        Parameters
        ----------
        x : Array
            The input of one step, (B, features), or integers (B,) for an Embedding.
        state : tuple, optional
            What the step before returned; None means zeros.
        reset, mask : Array of bool, optional
            (B,): as in the ``step`` of a recurrent layer.

        Returns
        -------
        y : Array
            The output of this step.
        state : tuple
            One entry for each stateful layer, for the next step.
        """
        given = Timesteps(None, reset, mask)
        given.check_taken(self.children, "step")
        states, final = self._unpack(state), []
        for layer in self.children.values():
            if layer.stateful:
                x, last = layer.step(x, states.pop(0), **given.given_to(layer, "step"))
                final.append(last)
            else:
                x = layer(x, **given.given_to(layer))
        return x, tuple(final)

    def _step_parts(self):
        if type(self) is not Sequential:  # one that overrides a method computes something else
            return None
        parts = [layer._step_parts() for layer in self.children.values()]
        return None if None in parts else [one for some in parts for one in some]

    def _without_absent(self, x, given):
        """``x``, zero where no timestep is, if the first layer does not know where that is."""
        unread = given.read_by_none(self)
        if unread is None:
            return x
        x = self.ops.asarray(x, "x")
        if x.dtype.kind in "iub" or x.ndim not in (2, 3):
            return x
        return unread.zeroed(self, x)

    def _absent_in_output(self, x, y, given):
        """``Timesteps`` where doutput needs zeros, or None.

        It does where the last layer does not know which timesteps there are, and gives a y for each of them.
        """
        layers = list(self)
        unread = given.read_by_none(layers[::-1])
        if unread is not None and unread.mask is not None and repeats(layers):
            unread = unread._replace(mask=None)
        if unread is None:
            return None
        x = self.ops.asarray(x, "x")
        steps = x.shape if x.dtype.kind in "iu" else x.shape[:-1]
        return unread.copied(self.ops) if steps == y.shape[:-1] and y.ndim in (2, 3) else None

    def _context(self, layer, states, given):
        """What a layer's call takes besides x; the state of a stateful layer is taken from the front of ``states``."""
        context = {"state": states.pop(0)} if layer.stateful else {}
        return context | given.given_to(layer)

    def _unpack(self, state, name="state"):
        """A list with one entry for each stateful layer; raises ShapeError if the number of entries is another."""
        count = sum(layer.stateful for layer in self.children.values())
        if state is None:
            return [None] * count
        refuse_function(name, state)
        if not isinstance(state, (tuple, list)) or len(state) != count:
            got = f"{len(state)} entries" if isinstance(state, (tuple, list)) else type(state).__name__
            hint, d = "", name.partition("state")[0]  # "d" for gradients
            if count == 1 and got == "2 entries":
                hint = f". The pair of an LSTM is one entry: give (({d}h, {d}c),)"
            elif count == 1 and hasattr(state, "ndim"):
                hint = f". What one layer takes is one entry: give ({d}h,)"
            raise ShapeError(
                f"{name}: expected a tuple with one entry for each of {count} stateful layers, got {got}{hint}"
            )
        return list(state)

    def __getitem__(self, key: str | int) -> Module:
        """The layer of this name, or at this place."""
        return self.children[key] if isinstance(key, str) else list(self.children.values())[key]

    def __len__(self) -> int:
        return len(self.children)

    def __iter__(self) -> Iterator[Module]:
        return iter(self.children.values())
