"""The settings of the task ``series``."""

from dataclasses import dataclass

from ...data.dates import check_date_format
from ...losses import mae, mse
from ..settings import Settings, changed, encoding_setting, setting

LOSSES = {"mse": mse, "mae": mae}
_DELIMITERS = {"tab": "\t", "comma": ",", "semicolon": ";"}
_MARKS = {"space": " ", "none": ""}


@dataclass
class SeriesSettings(Settings):
    """window, horizon: W and H, rows read and rows forecast."""

    hidden: int = changed(Settings, "hidden", 32)
    dropout: float = changed(Settings, "dropout", 0.0, "Share of each recurrent layer's outputs dropped.")
    lr: float = changed(Settings, "lr", 3e-3)
    epochs: int = changed(Settings, "epochs", 30)
    valid: float = changed(Settings, "valid", 0.1, "Share of the rows, before the test part, kept for validation.")
    test: float = setting(0.1, "Share of the rows, at the end, kept for the test.", low=0, high=1, high_open=True)
    split: str | None = setting(None, "Rows of training, validation and test, such as 8640/2880/2880.")
    target: str | None = setting(None, "Column to forecast.", shown="the last that holds numbers", of_model=True)
    inputs: str | None = setting(
        None, "Further columns to read, such as 'a,b'; 'all' for all that hold numbers.", of_model=True
    )
    date: str | None = setting(
        None,
        "Column of the date; 'none': the rows are in order already.",
        shown="the one that holds dates",
        of_model=True,
    )
    date_format: str | None = setting(
        None,
        "How dates are written, such as '%d.%m.%Y %H:%M'; 'epoch' for seconds since 1970.",
        shown="found from the file",
    )
    sort: bool = setting(False, "Sort the rows by date if they are not in order.")
    delimiter: str | None = setting(
        None, "Separator between cells: a character, or 'tab'.", shown="found from the file"
    )
    decimal: str | None = setting(None, "Decimal mark.", choices=(".", ","), shown="found from the file")
    thousands: str | None = setting(
        None, "Thousands separator.", choices=(".", ",", "'", "space", "none"), shown="found from the file"
    )
    encoding: str | None = encoding_setting()
    calendar: bool = setting(False, "Read hour, weekday and month too, as sine and cosine.", of_model=True)
    fill: str = setting(
        "none",
        "How to fill a missing value: the one before, one on the line between its neighbors, or drop the row.",
        choices=("none", "previous", "linear", "drop"),
    )
    window: int = setting(48, "Rows that are read for a forecast.")
    horizon: int = setting(12, "Rows that are forecast.")
    mode: str = setting(
        "direct",
        "direct: all values from the last state; every: from every state; recursive: one by one, by a decoder.",
        choices=("direct", "every", "recursive"),
        of_model=True,
    )
    residual: str = setting(
        "auto",
        "What is learned: the value itself, or its difference from the last one or from the one a season before. "
        "auto: the difference from whichever of these two is the better forecast.",
        choices=("auto", "none", "last", "season"),
        of_model=True,
    )
    log: bool = setting(False, "Take the logarithm of the target: for growth in per cent.", of_model=True)
    season: int | None = setting(None, "Rows of a season.", shown="guessed by autocorrelation", of_model=True)
    loss: str = setting("mse", "Loss to train with.", choices=tuple(LOSSES))
    interval: str | None = setting(
        None, "Learn prediction intervals, such as '80,95' (per cent).", shown="none", of_model=True
    )

    def __post_init__(self):
        if isinstance(self.fill, bool):  # as older runs have it
            self.fill = "previous" if self.fill else "none"
        super().__post_init__()
        self.levels  # noqa: B018  (raises)
        if self.valid + self.test >= 1:
            raise ValueError(f"valid and test: nothing is left for training, got {self.valid:g} and {self.test:g}")
        if self.delimiter is not None and (len(self.cell_delimiter) != 1 or self.cell_delimiter in '\r\n"'):
            raise ValueError(f"delimiter should be one character, or 'tab', got {self.delimiter!r}")
        if self.decimal is not None and self.decimal == self.thousands:
            raise ValueError(f"decimal and thousands should be different marks, got {self.decimal!r} for both")
        if self.date_format is not None:
            check_date_format(self.date_format)

    @property
    def levels(self):
        """The shares that prediction intervals should cover, ascending: [0.8, 0.95] of "80,95"."""
        try:
            levels = sorted({float(part) / 100 for part in self._level_parts})
        except ValueError:
            levels = [0.0]
        if self.interval is not None and not (levels and levels[0] > 0 and levels[-1] < 1):
            raise ValueError(f"interval should be per cents between 0 and 100, such as 80,95, got {self.interval!r}")
        return levels

    @property
    def _level_parts(self):
        return [part.strip().removesuffix("%") for part in (self.interval or "").split(",") if part.strip()]

    def check_levels(self):
        """Raise ValueError for levels that mean another thing than they say; old runs may have such."""
        if self.levels and self.levels[0] <= 0.01:
            share = min(self._level_parts, key=float)
            raise ValueError(
                f"interval should be per cents above 1, got {self.interval!r}: {share} is a share: write "
                f"{100 * float(share):g} for {100 * float(share):g} %"
                if float(share) < 1
                else f"interval should be per cents above 1, such as 80, got {self.interval!r}"
            )
        if len(self.levels) < len(self._level_parts):
            raise ValueError(f"interval should be per cents that differ from one another, got {self.interval!r}")

    @property
    def quantiles(self):
        """The quantiles at the ends of the intervals, ascending."""
        return [*((1 - level) / 2 for level in reversed(self.levels)), *((1 + level) / 2 for level in self.levels)]

    @property
    def cell_delimiter(self):
        """The separator between cells, as a character, or None."""
        return _DELIMITERS.get(self.delimiter, self.delimiter)

    @property
    def thousands_mark(self):
        """The thousands separator, as a character, "" for nothing, or None."""
        return _MARKS.get(self.thousands, self.thousands)
