"""Points that are as far apart as experts are, for methods that need centres."""

import numpy as np
from numpy.typing import NDArray


def coordinates(distances_EE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Places experts so that their Euclidean distances are the given ones: classical scaling (Torgerson 1952).

    With ``J = I - 1/E`` and the squared distances D2, ``B = -J D2 J / 2`` holds the inner products of the points around
    their mean; with its eigenvalues l and eigenvectors v, the coordinates are ``v sqrt(l)``. For Euclidean distances
    that is exact, and means of coordinates are means of the features. Other distances may have no such points: B then
    has negative eigenvalues, which are left out, and the points are the closest in the sense of B.

    Args:
        distances_EE: Symmetric ``[E, E]`` distances with a zero diagonal.

    Returns:
        Coordinates ``[E, D]`` float64, the widest direction first, 1 <= D <= E. The entry of each direction that is
        largest in size is positive, so that the same distances always give the same points.
    """
    experts = len(distances_EE)
    squares_EE = np.square(distances_EE)
    rows_E = squares_EE.mean(axis=1)
    inner_EE = -(squares_EE - rows_E[:, None] - rows_E[None] + rows_E.mean()) / 2
    values, vectors = np.linalg.eigh(inner_EE)
    # One direction at least, also where all experts are equal.
    kept = max(1, int((values > experts * np.finfo(np.float64).eps * values[-1]).sum()))
    values, vectors = np.maximum(values[::-1][:kept], 0), vectors[:, ::-1][:, :kept]
    leading = vectors[np.abs(vectors).argmax(axis=0), np.arange(kept)]
    points_ED: NDArray[np.float64] = vectors * np.where(leading < 0, -1.0, 1.0) * np.sqrt(values)
    return points_ED
