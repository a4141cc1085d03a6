"""Triton kernels of the gradient of features that boxes were pooled from, without atomics."""

import triton
import triton.language as tl

from .roi_sampling import axis_bins, bin_touches, boxes_touch, cell_weights, image_number, sample_count


@triton.jit
def list_kernel(
    gradients, boxes, lists, counts, row_ends, POOLING: tl.constexpr, TILE_Y: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Which boxes touch a tile of rows, in their order; a program per tile."""
    row = tl.program_id(0)
    axes: tl.constexpr = 3 if POOLING.volumes else 2
    begin = 0
    for number in tl.static_range(len(POOLING.scales)):
        if (row >= begin) & (row < row_ends[number]):
            size = gradients[number].size
            tiles = tl.cdiv(size[1], TILE_Y)
            first = (row - begin) % tiles * TILE_Y
            z = (row - begin) // tiles % size[0]
            image = (row - begin) // tiles // size[0]
            count = 0
            for k in range(0, boxes.count, BLOCK_K):
                box = k + tl.arange(0, BLOCK_K)
                mask = box < boxes.count
                index = tl.load(boxes.rois + box * (1 + 2 * axes), mask=mask, other=-1.0)
                listed = mask & (image_number(index, boxes.images) == image)
                listed &= boxes_touch(boxes.rois, box, mask, 1, first, first + TILE_Y - 1, number, POOLING)
                if POOLING.volumes:
                    listed &= boxes_touch(boxes.rois, box, mask, 2, z, z, number, POOLING)
                if boxes.levels is not None:
                    listed &= tl.load(boxes.levels + box, mask=mask, other=-1) == number
                place = count + tl.cumsum(listed.to(tl.int32), 0) - 1
                tl.store(lists + row.to(tl.int64) * boxes.count + place, box, mask=listed)
                count += tl.sum(listed.to(tl.int32))
            tl.store(counts + row, count)
        begin = row_ends[number]


@triton.jit
def _gather_tile(
    gradient,
    rois,
    derivatives,
    listed,
    count,
    place,
    column,
    block,
    most_channels,
    number: tl.constexpr,
    POOLING: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    dtype: tl.constexpr = rois.dtype.element_ty
    bins: tl.constexpr = POOLING.bins
    size, stride = gradient.size, gradient.stride
    tiles = tl.cdiv(size[1], TILE_Y)
    first_y, first_x = place % tiles * TILE_Y, column * TILE_X
    cell_z = place // tiles % size[0]
    image = (place // tiles // size[0]).to(tl.int64)
    lane = tl.arange(0, TILE_Y * TILE_X)
    cell_y, cell_x = first_y + lane // TILE_X, first_x + lane % TILE_X
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C, TILE_Y * TILE_X), dtype)

    for i in range(count):
        box = tl.load(listed + i)
        start_x, bin_x = axis_bins(rois, box, 0, number, POOLING)
        start_y, bin_y = axis_bins(rois, box, 1, number, POOLING)
        samples_x, samples_y = sample_count(bin_x, POOLING), sample_count(bin_y, POOLING)
        of_box = derivatives + box.to(tl.int64) * (bins[0] * bins[1] * bins[2]) * most_channels + c
        for z in range(bins[0]):
            weight_z = tl.full((1,), 1.0, dtype)
            if POOLING.volumes:
                start_z, bin_z = axis_bins(rois, box, 2, number, POOLING)
                weight_z = cell_weights(
                    cell_z + tl.arange(0, 1), start_z, bin_z, z, sample_count(bin_z, POOLING), size[0]
                )
            for y in range(bins[1]):
                if bin_touches(first_y, first_y + TILE_Y - 1, start_y, bin_y, y, size[1]):
                    weight_zy = weight_z * cell_weights(cell_y, start_y, bin_y, y, samples_y, size[1])
                    for x in range(bins[2]):
                        if bin_touches(first_x, first_x + TILE_X - 1, start_x, bin_x, x, size[2]):
                            weight = weight_zy * cell_weights(cell_x, start_x, bin_x, x, samples_x, size[2])
                            bin = (z * bins[1] + y) * bins[2] + x
                            of_bin = tl.load(of_box + bin * most_channels, mask=c < gradient.channels, other=0.0)
                            total += of_bin[:, None] * weight[None, :]

    mask = (c < gradient.channels)[:, None] & ((cell_y < size[1]) & (cell_x < size[2]))[None, :]
    cells = cell_y.to(tl.int64) * stride[3] + cell_x.to(tl.int64) * stride[4]
    if POOLING.volumes:
        cells += cell_z.to(tl.int64) * stride[2]
    offsets = image * stride[0] + (c.to(tl.int64) * stride[1])[:, None] + cells[None, :]
    tl.store(gradient.maps + offsets, total.to(gradient.maps.dtype.element_ty), mask=mask)


@triton.jit
def gather_kernel(
    gradients,
    boxes,
    derivatives,
    lists,
    counts,
    row_ends,
    ends,
    most_channels,
    POOLING: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    """Each cell of the gradient sums over the boxes that touch it, bin by bin, and is written once.

    A program per tile of cells and block of channels.
    """
    program = tl.program_id(0)
    begin, row_begin = 0, 0
    for number in tl.static_range(len(POOLING.scales)):
        if (program >= begin) & (program < ends[number]):
            # Neighbouring programs share the boxes' derivatives: blocks of channels are the slowest, then rows.
            columns = tl.cdiv(gradients[number].size[2], TILE_X)
            rows = row_ends[number] - row_begin
            column = (program - begin) % columns
            place = (program - begin) // columns % rows
            block = (program - begin) // columns // rows
            row = row_begin + place
            _gather_tile(
                gradients[number],
                boxes.rois,
                derivatives,
                lists + row.to(tl.int64) * boxes.count,
                tl.load(counts + row),
                place,
                column,
                block,
                most_channels,
                number,
                POOLING,
                BLOCK_C,
                TILE_Y,
                TILE_X,
            )
        begin, row_begin = ends[number], row_ends[number]
