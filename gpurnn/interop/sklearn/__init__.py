"""Estimators for scikit-learn: sequences into classes or numbers, and forecasts of a series.

    from gpurnn.interop.sklearn import SequenceClassifier
    SequenceClassifier(hidden_size=32).fit(X, y).predict(X)

They work in ``cross_validate`` and in ``GridSearchCV``, and the first two in pipelines; see docs/sklearn.md.
"""

try:
    import sklearn as _sklearn  # noqa: F401
except ImportError as error:
    raise ImportError('gpurnn.interop.sklearn needs scikit-learn. Run pip install "gpurnn[sklearn]"') from error

from .forecaster import Forecaster
from .sequences import SequenceClassifier, SequenceRegressor

__all__ = ["Forecaster", "SequenceClassifier", "SequenceRegressor"]
