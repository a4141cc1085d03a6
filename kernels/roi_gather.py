"""Triton kernels of the gradient of features that boxes were pooled from, without atomics, in three launches.

`weights_kernel` writes each cell's weight in each bin, axis by axis, and which bins reach a tile of cells at all;
`list_kernel` lists the boxes of each tile; `gather_kernel` sums over those lists, and writes each cell once.
"""

import triton
import triton.language as tl

from .roi_sampling import axis_bins, cell_weights, image_number, sample_count


@triton.jit
def weights_kernel(
    gradients,
    boxes,
    grad_loss,
    box_weights,
    weights,
    reached,
    REDUCTION: tl.constexpr,
    POOLING: tl.constexpr,
    EXTENT: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weights of a box along its axes: [box, axis, bin, cell], and [box, axis, tile] the bins that reach a tile.

    EXTENT is how many cells the tables have along z, y and x; none are read beyond a level's map. Weights along y hold
    the factor of the box's slopes, too: that of a mean over its bins, times its weight and upstream gradient. A program
    per box.
    """
    box = tl.program_id(0)
    level = 0
    if boxes.levels is not None:
        level = tl.load(boxes.levels + box).to(tl.int32)
    dtype: tl.constexpr = weights.dtype.element_ty
    bins: tl.constexpr = POOLING.bins
    for number in tl.static_range(len(POOLING.scales)):
        if level == number:
            size = gradients[number].size
            # In `dtype`: a plain 1.0 over a number would be float32.
            one = tl.full((), 1.0, dtype)
            factor = one / (gradients[number].channels * bins[0] * bins[1] * bins[2])
            if box_weights is not None:
                factor *= tl.load(box_weights + box)
            if REDUCTION == "mean":
                factor /= boxes.count
            factor *= tl.load(grad_loss + (box if REDUCTION == "none" else 0))
            shared = boxes.rois, weights, reached, box
            _axis_weights(one, size[2], *shared, 0, number, POOLING, EXTENT, TILE_Y, TILE_X, BLOCK)
            _axis_weights(factor, size[1], *shared, 1, number, POOLING, EXTENT, TILE_Y, TILE_X, BLOCK)
            if POOLING.volumes:
                _axis_weights(one, size[0], *shared, 2, number, POOLING, EXTENT, TILE_Y, TILE_X, BLOCK)


@triton.jit
def _axis_weights(
    factor,
    size,
    rois,
    weights,
    reached,
    box,
    axis: tl.constexpr,
    number: tl.constexpr,
    POOLING: tl.constexpr,
    EXTENT: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile: tl.constexpr = TILE_X if axis == 0 else (TILE_Y if axis == 1 else 1)
    tiles: tl.constexpr = BLOCK // tile
    bins: tl.constexpr = POOLING.bins[2 - axis]
    start, bin = axis_bins(rois, box, axis, number, POOLING)
    samples = sample_count(bin, POOLING)
    of_box = axis_table(weights, box, axis, POOLING, EXTENT)
    of_tiles = axis_tiles(reached, box, axis, EXTENT, TILE_Y, TILE_X)
    for first in range(0, size, BLOCK):
        cells = first + tl.arange(0, BLOCK)
        begin, end = tl.full((tiles,), bins, tl.int32), tl.zeros((tiles,), tl.int32)
        for index in range(bins):
            weight = tl.where(cells < size, cell_weights(cells, start, bin, index, samples, size), 0.0)
            tl.store(of_box + index * EXTENT[2 - axis] + cells, factor * weight, mask=cells < EXTENT[2 - axis])
            touched = tl.max(tl.reshape((weight != 0.0).to(tl.int32), (tiles, tile)), 1) != 0
            begin = tl.where(touched, tl.minimum(begin, index), begin)
            end = tl.where(touched, index + 1, end)
        places = first // tile + tl.arange(0, tiles)
        tl.store(of_tiles + places, begin << 16 | end, mask=places * tile < EXTENT[2 - axis])


@triton.jit
def axis_table(weights, box, axis: tl.constexpr, POOLING: tl.constexpr, EXTENT: tl.constexpr):
    """Where a box's weights along x, y or z (axis 0, 1, 2) begin."""
    bins: tl.constexpr = POOLING.bins
    x: tl.constexpr = bins[2] * EXTENT[2]
    y: tl.constexpr = bins[1] * EXTENT[1]
    z: tl.constexpr = bins[0] * EXTENT[0]
    before: tl.constexpr = 0 if axis == 0 else (x if axis == 1 else x + y)
    return weights + box.to(tl.int64) * (x + y + z) + before


@triton.jit
def axis_tiles(reached, box, axis: tl.constexpr, EXTENT: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """Where the bins that reach the tiles along x, y or z (axis 0, 1, 2) begin: the first << 16 | the last + 1."""
    x: tl.constexpr = EXTENT[2] // TILE_X
    y: tl.constexpr = EXTENT[1] // TILE_Y
    before: tl.constexpr = 0 if axis == 0 else (x if axis == 1 else x + y)
    return reached + box.to(tl.int64) * (x + y + EXTENT[0]) + before


@triton.jit
def _tile_place(tile, size, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """Column, row, slice and image of a level's tile."""
    columns, rows = tl.cdiv(size[2], TILE_X), tl.cdiv(size[1], TILE_Y)
    return tile % columns, tile // columns % rows, tile // columns // rows % size[0], tile // columns // rows // size[0]


@triton.jit
def list_kernel(
    gradients,
    boxes,
    reached,
    lists,
    counts,
    tile_ends,
    POOLING: tl.constexpr,
    EXTENT: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Which boxes reach a tile of cells, in their order; a program per tile."""
    tile = tl.program_id(0)
    axes: tl.constexpr = 3 if POOLING.volumes else 2
    begin = 0
    for number in tl.static_range(len(POOLING.scales)):
        if (tile >= begin) & (tile < tile_ends[number]):
            column, row, z, image = _tile_place(tile - begin, gradients[number].size, TILE_Y, TILE_X)
            count = 0
            for k in range(0, boxes.count, BLOCK_K):
                box = k + tl.arange(0, BLOCK_K)
                mask = box < boxes.count
                index = tl.load(boxes.rois + box * (1 + 2 * axes), mask=mask, other=-1.0)
                listed = mask & (image_number(index, boxes.images) == image)
                if boxes.levels is not None:
                    listed &= tl.load(boxes.levels + box, mask=mask, other=-1) == number
                listed &= _reach(reached, box, listed, 0, column, EXTENT, TILE_Y, TILE_X)
                listed &= _reach(reached, box, listed, 1, row, EXTENT, TILE_Y, TILE_X)
                if POOLING.volumes:
                    listed &= _reach(reached, box, listed, 2, z, EXTENT, TILE_Y, TILE_X)
                place = count + tl.cumsum(listed.to(tl.int32), 0) - 1
                tl.store(lists + tile.to(tl.int64) * boxes.count + place, box, mask=listed)
                count += tl.sum(listed.to(tl.int32))
            tl.store(counts + tile, count)
        begin = tile_ends[number]


@triton.jit
def _reach(
    reached, box, mask, axis: tl.constexpr, place, EXTENT: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr
):
    bins = tl.load(axis_tiles(reached, box, axis, EXTENT, TILE_Y, TILE_X) + place, mask=mask, other=0)
    return (bins >> 16) < (bins & 0xFFFF)


@triton.jit
def _gather_tile(
    gradient,
    slopes,
    weights,
    reached,
    listed,
    count,
    tile,
    block,
    slope_channels,
    POOLING: tl.constexpr,
    EXTENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    dtype: tl.constexpr = weights.dtype.element_ty
    bins: tl.constexpr = POOLING.bins
    size, stride = gradient.size, gradient.stride
    column, row, z, image = _tile_place(tile, size, TILE_Y, TILE_X)
    lane = tl.arange(0, TILE_Y * TILE_X)
    cell_y, cell_x = row * TILE_Y + lane // TILE_X, column * TILE_X + lane % TILE_X
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C, TILE_Y * TILE_X), dtype)

    for i in range(count):
        box = tl.load(listed + i)
        table_x = axis_table(weights, box, 0, POOLING, EXTENT) + cell_x
        table_y = axis_table(weights, box, 1, POOLING, EXTENT) + cell_y
        of_box = slopes + box.to(tl.int64) * (bins[0] * bins[1] * bins[2]) * slope_channels + c
        bins_x = tl.load(axis_tiles(reached, box, 0, EXTENT, TILE_Y, TILE_X) + column)
        bins_y = tl.load(axis_tiles(reached, box, 1, EXTENT, TILE_Y, TILE_X) + row)
        bins_z = bins[0]
        if POOLING.volumes:
            table_z = axis_table(weights, box, 2, POOLING, EXTENT) + z
            bins_z = tl.load(axis_tiles(reached, box, 2, EXTENT, TILE_Y, TILE_X) + z)
        for bin_z in range(bins_z >> 16, bins_z & 0xFFFF):
            for bin_y in range(bins_y >> 16, bins_y & 0xFFFF):
                weight_zy = tl.load(table_y + bin_y * EXTENT[1])
                if POOLING.volumes:
                    weight_zy *= tl.load(table_z + bin_z * EXTENT[0])
                for bin_x in range(bins_x >> 16, bins_x & 0xFFFF):
                    weight = weight_zy * tl.load(table_x + bin_x * EXTENT[2])
                    bin = (bin_z * bins[1] + bin_y) * bins[2] + bin_x
                    of_bin = tl.load(of_box + bin * slope_channels)
                    total += of_bin[:, None] * weight[None, :]

    mask = (c < gradient.channels)[:, None] & ((cell_y < size[1]) & (cell_x < size[2]))[None, :]
    cells = cell_y.to(tl.int64) * stride[3] + cell_x.to(tl.int64) * stride[4]
    if POOLING.volumes:
        cells += z.to(tl.int64) * stride[2]
    offsets = image.to(tl.int64) * stride[0] + (c.to(tl.int64) * stride[1])[:, None] + cells[None, :]
    tl.store(gradient.maps + offsets, total.to(gradient.maps.dtype.element_ty), mask=mask)


@triton.jit
def gather_kernel(
    gradients,
    slopes,
    weights,
    reached,
    boxes,
    lists,
    counts,
    tile_ends,
    slope_channels,
    POOLING: tl.constexpr,
    EXTENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    """Each cell of the gradient sums over the boxes that reach it, bin by bin, and is written once.

    A program per tile of cells and block of channels; neighbours share the boxes' slopes, so blocks of channels
    are the slowest.
    """
    tiles = tile_ends[len(POOLING.scales) - 1]
    tile, block = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    begin = 0
    for number in tl.static_range(len(POOLING.scales)):
        if (tile >= begin) & (tile < tile_ends[number]):
            _gather_tile(
                gradients[number],
                slopes,
                weights,
                reached,
                lists + tile.to(tl.int64) * boxes.count,
                tl.load(counts + tile),
                tile - begin,
                block,
                slope_channels,
                POOLING,
                EXTENT,
                BLOCK_C,
                TILE_Y,
                TILE_X,
            )
        begin = tile_ends[number]
