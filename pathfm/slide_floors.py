"""What labels of slides are guessed from without looking at tissue: nothing, size, cancer type, hospital."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

SIZE = ["width_px", "height_px", "mpp", "tissue_mm2"]  # of a slide
BY_SIZE = "size, mpp and tissue area alone"


def chance(slides: pd.DataFrame) -> dict[str, pd.Series]:
    """The same of every slide with role test: log-odds 0 by slide_id."""
    return {"chance": pd.Series(0.0, slides.loc[slides["role"] == "test", "slide_id"])}


def size_alone(slides: pd.DataFrame, label: str = "label") -> dict[str, pd.Series]:
    """What the SIZE of slides with role test says, those of it that vary: log-odds of the second class by slide_id.

    Of a logistic regression on standardised logarithms, classes weighted equally, fitted on probe-train.
    """
    known = [column for column in SIZE if slides[column].nunique() > 1 and (slides[column] > 0).all()]
    if not known:
        return {}
    train, test = (slides["role"] == role for role in ("probe-train", "test"))
    x = np.log(slides[known].to_numpy(float))
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    said = model.fit(x[train], slides.loc[train, label].astype(str)).decision_function(x[test])
    return {BY_SIZE: pd.Series(said, slides.loc[test, "slide_id"])}
