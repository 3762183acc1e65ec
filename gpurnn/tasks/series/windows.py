"""Windows: what the model reads and what it should predict."""

import numpy as np

from ... import rng
from ...data import Batch
from ...data.moments import calendar_features, continue_moments
from ...dtypes import check_dtype
from .parts import residual_of


class Windows:
    """A batch source: windows of a table, and what comes after them, for a model of ``SeriesTask``.

    ends: the last row of each window. Inputs (T, B, F), targets (B, H), or (T, B, H) for training in the mode "every";
    for "recursive" the inputs are a pair, with what is known of the rows to come, (H, B, K). training: the windows are
    shuffled differently in every epoch, keyed by (seed, epoch). steps: instead of the horizon of the settings.
    """

    def __init__(self, table, ends, settings, facts, *, training=False, steps=None):
        self.ends, self.settings, self.facts, self.training = ends, settings, facts, training
        self.steps, self.residual = steps or settings.horizon, residual_of(settings, facts)
        self.dtype = check_dtype(settings.dtype)
        values = table.values
        if settings.log:
            with np.errstate(invalid="ignore", divide="ignore"):
                values = np.column_stack([np.log(values[:, 0]), values[:, 1:]])
            if not np.isfinite(values[:, 0]).all():
                raise ValueError("log needs a target above 0")
        scaled = (values - np.array(facts["mean"])) / np.array(facts["std"])
        self.z, self.inputs = scaled[:, 0], scaled[:, 1:]
        moments = table.moments
        if facts["calendar"]:
            ahead = int(ends.max()) + self.steps + 1 - len(table)
            if ahead > 0:
                coming = continue_moments(moments, ahead)
                if coming is None:
                    raise ValueError("the dates do not go on evenly at the end: no calendar for the rows to come")
                moments = moments + coming
        self.calendar = calendar_features(moments, facts["calendar"], len(table) + self.steps)
        self.z = np.concatenate([self.z, np.zeros(self.steps)])  # not known yet: these targets are never read

    def __len__(self):
        return -(-len(self.ends) // self.settings.batch)

    def batch(self, epoch, index):
        order = np.arange(len(self.ends))
        if self.training:
            order = np.argsort(rng.words(len(order), self.settings.seed, rng.name_key("windows"), epoch), kind="stable")
        chosen = order[index * self.settings.batch : (index + 1) * self.settings.batch]
        return self.collate(self.ends[chosen])

    def collate(self, ends):
        """The Batch of the windows that end with these rows, (B,)."""
        settings, season, residual = self.settings, self.facts["season"], self.residual
        rows = ends + np.arange(1 - settings.window, 1)[:, None]  # (T, B)
        anchor = 0.0
        if residual != "none":  # subtract a value that is known when the forecast is made
            anchor = self.z[rows[0] if settings.mode == "every" else ends]
        columns = [self.z[rows] - anchor]
        if residual == "season":
            columns.append(self.z[rows] - self.z[rows - season])
        inputs = np.stack(columns, axis=2)
        inputs = np.concatenate([inputs, self.inputs[rows], self.calendar[rows]], axis=2).astype(self.dtype)
        at = rows if settings.mode == "every" and self.training else ends
        targets = (self.z[at[..., None] + np.arange(1, self.steps + 1)] - self.base(at)).astype(self.dtype)
        if settings.mode == "recursive":
            coming = ends + np.arange(1, self.steps + 1)[:, None]  # (H, B)
            known = [self.calendar[coming]]
            if residual == "season":
                known.append((self.base(ends).T - anchor)[:, :, None])
            inputs = inputs, np.concatenate(known, axis=2).astype(self.dtype)
        return Batch(inputs, targets, loss_options={}, weight=len(ends), per_step=np.ndim(at) == 2)

    def base(self, ends):
        """What the model's output is added to, (..., H) for ``ends`` (...)."""
        ahead = np.arange(1, self.steps + 1)
        if self.residual == "none":
            return np.zeros(self.steps)
        if self.residual == "last":
            return np.repeat(self.z[ends][..., None], self.steps, axis=-1)
        return self.z[season_before(ends, ahead, self.facts["season"])]

    def restore(self, outputs, ends):
        """Outputs (B, H) of the model, float64, as values of the target."""
        return self.unscale(outputs + self.base(ends))

    def unscale(self, z):
        """Values of the target on the scale of the model, as those of the file."""
        values = z * self.facts["std"][0] + self.facts["mean"][0]
        return np.exp(values) if self.settings.log else values


def season_before(ends, ahead, season):
    """The rows with which a seasonal-naive forecast made at ``ends`` (...) answers ``ahead`` (H,): (..., H)."""
    return np.asarray(ends)[..., None] + ahead - season * -(-ahead // season)
