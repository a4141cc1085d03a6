// One axis of images of a size, in units, as Axis of lidnet_fast/extractors/windows.py has it, which defines it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace lid {

// Units start, ..., stop - 1.
struct Range {
  int64_t start, stop;
  int64_t size() const { return stop - start; }
};

inline Range hull(Range a, Range b) { return {std::min(a.start, b.start), std::max(a.stop, b.stop)}; }

// Which edges of the image a window touches.
enum class Edge { inside, first, last, all };

// A layer that boxes are pooled from.
struct Layer {
  double stride;   // pixels per cell
  int64_t ratio;   // cells per unit
  int64_t cells;   // in the image
};

// A map's cells in a window of so many units.
struct MapCells {
  double per_unit, extra, most;
  double of(int64_t units) const { return std::min(static_cast<double>(units) * per_unit + extra, most); }
};

struct Axis {
  std::vector<Layer> layers;
  std::vector<MapCells> maps;
  std::vector<int64_t> buckets;
  int64_t units, first_free, last_free;

  // Units that RoIAlign of the layers reads for a box from `low` to `high`, in pixels.
  Range units_of(double low, double high, bool aligned) const {
    Range result{units, 0};
    for (const Layer& layer : layers) {
      const double shift = aligned ? 0.5 : 0.0, begin = low / layer.stride - shift, end = high / layer.stride - shift;
      const auto unit = [&](double cell) {
        return static_cast<int64_t>(std::min(std::max(0.0, cell), static_cast<double>(layer.cells - 1))) / layer.ratio;
      };
      result = hull(result, {unit(std::floor(begin)),
                             unit(std::floor(aligned ? end : std::max(end, begin + 1)) + 1) + 1});
    }
    return result;
  }

  // The units of a window that holds `needed`: its size as in `buckets`, at the edges that `needed` touches.
  Range fit(Range needed) const {
    const int64_t least = needed.start < first_free  ? needed.stop
                          : needed.stop > last_free ? units - needed.start
                                                    : needed.size();
    return place(needed, *std::lower_bound(buckets.begin(), buckets.end() - 1, least));
  }

  // The units of a window of `size` that holds `needed`; all units where none has room.
  Range place(Range needed, int64_t size) const {
    const bool first = needed.start < first_free, last = needed.stop > last_free;
    const bool room = first && last ? false
                      : first       ? size <= last_free
                      : last        ? size <= units - first_free
                                    : size <= last_free - first_free;
    if (!room) return {0, units};
    if (first) return {0, size};
    if (last) return {units - size, units};
    const int64_t centred = needed.start - (size - needed.size()) / 2;
    const int64_t start = std::clamp(centred, first_free, last_free - size);
    return {start, start + size};
  }

  Edge edge(Range window) const {
    const bool first = window.start < first_free, last = window.stop > last_free;
    return first && last ? Edge::all : first ? Edge::first : last ? Edge::last : Edge::inside;
  }
};

}  // namespace lid
