"""Triton kernels of the gradient of features that boxes were pooled from, without atomics."""

import triton
import triton.language as tl

from .roi_sampling import axis_bins, bin_touches, boxes_touch, cell_weights, image_number, sample_count


@triton.jit
def list_kernel(
    sizes,
    row_ends,
    rois,
    box_levels,
    lists,
    counts,
    boxes,
    images,
    LEVELS: tl.constexpr,
    SCALES: tl.constexpr,
    VOLUMES: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_Y: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Which boxes touch a tile of rows, in their order; a program per tile."""
    row = tl.program_id(0)
    axes: tl.constexpr = 3 if VOLUMES else 2
    begin = 0
    for number in tl.static_range(LEVELS):
        if (row >= begin) & (row < row_ends[number]):
            tiles = tl.cdiv(sizes[number][1], TILE_Y)
            first = (row - begin) % tiles * TILE_Y
            z = (row - begin) // tiles % sizes[number][0]
            image = (row - begin) // tiles // sizes[number][0]
            count = 0
            for k in range(0, boxes, BLOCK_K):
                box = k + tl.arange(0, BLOCK_K)
                mask = box < boxes
                index = tl.load(rois + box * (1 + 2 * axes), mask=mask, other=-1.0)
                listed = mask & (image_number(index, images) == image)
                listed &= boxes_touch(rois, box, mask, 1, SCALES[number], first, first + TILE_Y - 1, VOLUMES, ALIGNED)
                if VOLUMES:
                    listed &= boxes_touch(rois, box, mask, 2, SCALES[number], z, z, VOLUMES, ALIGNED)
                if box_levels is not None:
                    listed &= tl.load(box_levels + box, mask=mask, other=-1) == number
                place = count + tl.cumsum(listed.to(tl.int32), 0) - 1
                tl.store(lists + row.to(tl.int64) * boxes + place, box, mask=listed)
                count += tl.sum(listed.to(tl.int32))
            tl.store(counts + row, count)
        begin = row_ends[number]


@triton.jit
def _gather_tile(
    gradient,
    stride,
    size,
    channels,
    SCALE: tl.constexpr,
    rois,
    derivatives,
    lists,
    row,
    count,
    place,
    column,
    block,
    most_channels,
    BLOCK_C: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    VOLUMES: tl.constexpr,
    SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BINS_Z: tl.constexpr,
    BINS_Y: tl.constexpr,
    BINS_X: tl.constexpr,
):
    dtype: tl.constexpr = rois.dtype.element_ty
    tiles = tl.cdiv(size[1], TILE_Y)
    first_y, first_x = place % tiles * TILE_Y, column * TILE_X
    cell_z = place // tiles % size[0]
    image = (place // tiles // size[0]).to(tl.int64)
    lane = tl.arange(0, TILE_Y * TILE_X)
    cell_y, cell_x = first_y + lane // TILE_X, first_x + lane % TILE_X
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C, TILE_Y * TILE_X), dtype)

    for i in range(count):
        box = tl.load(lists + i)
        start_x, bin_x = axis_bins(rois, box, 0, SCALE, BINS_X, VOLUMES, ALIGNED)
        start_y, bin_y = axis_bins(rois, box, 1, SCALE, BINS_Y, VOLUMES, ALIGNED)
        samples_x, samples_y = sample_count(bin_x, SAMPLES), sample_count(bin_y, SAMPLES)
        of_box = derivatives + box.to(tl.int64) * (BINS_Z * BINS_Y * BINS_X) * most_channels + c
        for z in range(BINS_Z):
            weight_z = tl.full((1,), 1.0, dtype)
            if VOLUMES:
                start_z, bin_z = axis_bins(rois, box, 2, SCALE, BINS_Z, VOLUMES, ALIGNED)
                weight_z = cell_weights(
                    cell_z + tl.arange(0, 1), start_z, bin_z, z, sample_count(bin_z, SAMPLES), size[0]
                )
            for y in range(BINS_Y):
                if bin_touches(first_y, first_y + TILE_Y - 1, start_y, bin_y, y, size[1]):
                    weight_zy = weight_z * cell_weights(cell_y, start_y, bin_y, y, samples_y, size[1])
                    for x in range(BINS_X):
                        if bin_touches(first_x, first_x + TILE_X - 1, start_x, bin_x, x, size[2]):
                            weight = weight_zy * cell_weights(cell_x, start_x, bin_x, x, samples_x, size[2])
                            bin = (z * BINS_Y + y) * BINS_X + x
                            of_bin = tl.load(of_box + bin * most_channels, mask=c < channels, other=0.0)
                            total += of_bin[:, None] * weight[None, :]

    mask = (c < channels)[:, None] & ((cell_y < size[1]) & (cell_x < size[2]))[None, :]
    cells = cell_y.to(tl.int64) * stride[3] + cell_x.to(tl.int64) * stride[4]
    if VOLUMES:
        cells += cell_z.to(tl.int64) * stride[2]
    offsets = image * stride[0] + (c.to(tl.int64) * stride[1])[:, None] + cells[None, :]
    tl.store(gradient + offsets, total.to(gradient.dtype.element_ty), mask=mask)


@triton.jit
def gather_kernel(
    gradients,
    strides,
    sizes,
    channels,
    row_ends,
    ends,
    rois,
    derivatives,
    lists,
    counts,
    boxes,
    channel_blocks,
    most_channels,
    LEVELS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    VOLUMES: tl.constexpr,
    SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BINS_Z: tl.constexpr,
    BINS_Y: tl.constexpr,
    BINS_X: tl.constexpr,
):
    """Each cell of the gradient sums over the boxes that touch it, bin by bin, and is written once.

    A program per tile of cells and block of channels.
    """
    program = tl.program_id(0)
    begin, row_begin = 0, 0
    for number in tl.static_range(LEVELS):
        if (program >= begin) & (program < ends[number]):
            # Neighbouring programs share the boxes' derivatives: blocks of channels are the slowest, then rows.
            columns = tl.cdiv(sizes[number][2], TILE_X)
            rows = row_ends[number] - row_begin
            column = (program - begin) % columns
            place = (program - begin) // columns % rows
            block = (program - begin) // columns // rows
            row = row_begin + place
            _gather_tile(
                gradients[number],
                strides[number],
                sizes[number],
                channels[number],
                SCALES[number],
                rois,
                derivatives,
                lists + row.to(tl.int64) * boxes,
                row,
                tl.load(counts + row),
                place,
                column,
                block,
                most_channels,
                BLOCK_C,
                TILE_Y,
                TILE_X,
                VOLUMES,
                SAMPLES,
                ALIGNED,
                BINS_Z,
                BINS_Y,
                BINS_X,
            )
        begin, row_begin = ends[number], row_ends[number]
