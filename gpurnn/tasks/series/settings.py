"""The settings of the task ``series``."""

from dataclasses import dataclass

from ...losses import mae, mse
from ..settings import Settings, changed, setting

LOSSES = {"mse": mse, "mae": mae}


@dataclass
class SeriesSettings(Settings):
    """window, horizon: W and H, rows read and rows forecast."""

    hidden: int = changed(Settings, "hidden", 32)
    dropout: float = changed(Settings, "dropout", 0.0, "Share of the activations behind each recurrent layer dropped.")
    lr: float = changed(Settings, "lr", 3e-3)
    epochs: int = changed(Settings, "epochs", 30)
    valid: float = changed(Settings, "valid", 0.1, "Share of the rows, before the test part, kept for validation.")
    test: float = setting(0.1, "Share of the rows, at the end, kept for the test.", low=0, high=1, high_open=True)
    split: str | None = setting(None, "Rows of training, validation and test, such as 8640/2880/2880.")
    target: str | None = setting(None, "Column to forecast.", shown="the last")
    inputs: str | None = setting(None, "Further columns to read, such as 'a,b'; 'all' for all that hold numbers.")
    date: str | None = setting(None, "Column of the date.", shown="the first, if it holds dates")
    calendar: bool = setting(False, "Read hour, weekday and month too, as sine and cosine.")
    fill: bool = setting(False, "Fill a missing value with the one before.")
    window: int = setting(48, "Rows that are read for a forecast.")
    horizon: int = setting(12, "Rows that are forecast.")
    mode: str = setting(
        "direct",
        "How: all from the last state, from every state, or one after another by a decoder.",
        choices=("direct", "every", "recursive"),
    )
    residual: str = setting(
        "none",
        "What is learnt: the value, its distance from the last, or from the season before.",
        choices=("none", "last", "season"),
    )
    log: bool = setting(False, "Take the logarithm of the target: for growth in per cent.")
    season: int | None = setting(None, "Rows of a season.", shown="guessed by autocorrelation")
    loss: str = setting("mse", "What training lowers.", choices=tuple(LOSSES))

    def __post_init__(self):
        super().__post_init__()
        if self.valid + self.test >= 1:
            raise ValueError(f"valid and test: nothing is left for training, got {self.valid:g} and {self.test:g}")
