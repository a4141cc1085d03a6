"""Fields of view: which part of a slice a sample shows, and which lesion boxes are in it."""

import numpy as np

# A lesion cut by the edge of the field of view is kept when its centre is inside, at least this many pixels from it.
_CENTRE_MARGIN = 1.0
_SMALLEST_SIDE = 2.0


def draw_origin(
    rng: np.random.Generator, lesion: np.ndarray | None, image_size: tuple[int, int], size: tuple[int, int]
) -> tuple[int, int]:
    """First row and column of a field of view of `size` rows and columns: around a lesion's box, or anywhere."""
    room = (image_size[0] - size[0], image_size[1] - size[1])
    if lesion is None:
        return int(rng.integers(room[0] + 1)), int(rng.integers(room[1] + 1))
    x1, y1, x2, y2 = lesion
    # The lesion lies anywhere in the inner 80 % of the field of view: a fixed place would be learnt.
    shift = rng.uniform(-0.4, 0.4, 2)
    y0 = (y1 + y2) / 2 + shift[0] * size[0] - size[0] / 2
    x0 = (x1 + x2) / 2 + shift[1] * size[1] - size[1] / 2
    return int(np.clip(y0, 0, room[0])), int(np.clip(x0, 0, room[1]))


def boxes_in_view(
    boxes: np.ndarray, window: tuple[int, int, int, int], flips: tuple[bool, bool] = (False, False)
) -> np.ndarray:
    """Boxes [n, 4] of a slice as they are in its field of view, cut at its edges and flipped with it.

    Args:
        boxes: (x1, y1, x2, y2) in pixels of the slice.
        window: first row, first column, rows and columns of the field of view.
        flips: whether rows, and columns, are in reverse order.
    """
    y0, x0, rows, columns = window
    limit = np.array([columns, rows], np.float32)
    boxes = boxes - np.array([x0, y0, x0, y0], np.float32)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    boxes = boxes[((centres > _CENTRE_MARGIN) & (centres < limit - _CENTRE_MARGIN)).all(1)]
    corners = np.clip(boxes.reshape(-1, 2, 2), 0, limit)
    corners = corners[(corners[:, 1] - corners[:, 0] > _SMALLEST_SIDE).all(1)]
    for axis, flipped in ((1, flips[0]), (0, flips[1])):
        if flipped:
            corners[:, :, axis] = limit[axis] - corners[:, ::-1, axis]
    return corners.reshape(-1, 4)
